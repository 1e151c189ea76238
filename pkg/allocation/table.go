package allocation

import (
	"bytes"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"math"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/touchmark/touchmark/pkg/settings"
)

// A Table says how long it takes from the networks that devices are in to the locations of hubs. The zero Table knows
// nothing.
type Table struct {
	networks map[netip.Prefix]string       // to a region
	bits     [2][]int                      // lengths of the networks' prefixes, IPv4 and IPv6, longest first
	latency  map[string]map[string]float64 // in milliseconds, by region and folded location
}

// Limits of a table.
const (
	// MaxTable bounds its file, in octets.
	MaxTable   = 16 << 20
	maxLatency = 60_000
)

// file is a table in TOML.
type file struct {
	Networks map[string]string             `toml:"networks"`
	Latency  map[string]map[string]float64 `toml:"latency"`
}

// Parse reads a table. A name that ends in ".csv" is CSV: a line "network,location,milliseconds" and then one for each pair.
// Anything else is TOML: a table networks, from networks ("10.8.0.0/16") to regions of the operator's own naming, and for each
// region a table latency.REGION, from hub locations to milliseconds. The name stands in errors, which list all faults of a TOML file.
func Parse(name string, b []byte) (*Table, error) {
	if len(b) > MaxTable {
		return nil, fmt.Errorf("%s: a latency table has at most %d MiB", name, MaxTable>>20)
	}
	t := &Table{networks: make(map[netip.Prefix]string), latency: make(map[string]map[string]float64)}
	if strings.HasSuffix(strings.ToLower(name), ".csv") {
		if err := t.parseCSV(b); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		return t.index(), nil
	}
	var in file
	f := settings.Decode(name, b, &in)
	for network, region := range in.Networks {
		if err := t.addNetwork(network, region); err != nil {
			f.Key("networks", "%v", err)
		} else if in.Latency[region] == nil {
			f.Key("networks", "network %s is in region %.100q, which has no table latency", network, region)
		}
	}
	for region, to := range in.Latency {
		for location, ms := range to {
			if err := t.addLatency(region, location, ms); err != nil {
				f.Key("latency."+region, "%v", err)
			}
		}
	}
	if err := f.Err(); err != nil {
		return nil, err
	}
	return t.index(), nil
}

func (t *Table) parseCSV(b []byte) error {
	r := csv.NewReader(bytes.NewReader(b))
	r.FieldsPerRecord, r.ReuseRecord = 3, true
	head, err := r.Read()
	if err != nil || !slices.Equal(head, []string{"network", "location", "milliseconds"}) {
		return errors.New(`the first line must be "network,location,milliseconds"`)
	}
	for {
		row, err := r.Read()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		line, _ := r.FieldPos(0)
		ms, err := strconv.ParseFloat(row[2], 64)
		if err == nil {
			if p, perr := parseNetwork(row[0]); perr != nil {
				err = perr
			} else {
				t.networks[p] = row[0] // each network is a region of its own
				err = t.addLatency(row[0], row[1], ms)
			}
		}
		if err != nil {
			return fmt.Errorf("line %d: %w", line, err)
		}
	}
}

// parseNetwork takes one spelling of a network: without host bits, an IPv4 network as one.
func parseNetwork(text string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(text)
	if err != nil || p.Masked() != p || p.Addr().Is4In6() || p.String() != text {
		return p, fmt.Errorf("%.100q is no network such as 10.8.0.0/16 or 2001:db8::/32", text)
	}
	return p, nil
}

func (t *Table) addNetwork(text, region string) error {
	p, err := parseNetwork(text)
	if err == nil {
		t.networks[p] = region
	}
	return err
}

func (t *Table) addLatency(region, location string, ms float64) error {
	if !(ms >= 0 && ms <= maxLatency) {
		return fmt.Errorf("the way from %.100q to %.100q takes %v: want milliseconds, 0 to %d", region, location, ms, maxLatency)
	}
	if t.latency[region] == nil {
		t.latency[region] = make(map[string]float64)
	}
	location = strings.ToLower(location)
	if _, twice := t.latency[region][location]; twice || location == "" {
		return fmt.Errorf("the way from %.100q to %.100q is given twice, or leads nowhere", region, location)
	}
	t.latency[region][location] = ms
	return nil
}

func (t *Table) index() *Table {
	for p := range t.networks {
		of := &t.bits[family(p.Addr())]
		if !slices.Contains(*of, p.Bits()) {
			*of = append(*of, p.Bits())
		}
	}
	for _, of := range t.bits {
		slices.SortFunc(of, func(a, b int) int { return b - a })
	}
	return t
}

func family(a netip.Addr) int {
	if a.Is4() {
		return 0
	}
	return 1
}

// Nearest returns the hubs that are nearest to an address: those with the lowest latency from the longest of its networks. Where
// the table knows no way from there to any of the hubs, that is all of them. The table may be nil.
func (t *Table) Nearest(from netip.Addr, hubs []Hub) []Hub {
	if t == nil || !from.IsValid() {
		return hubs
	}
	from = from.Unmap().WithZone("")
	for _, bits := range t.bits[family(from)] {
		p, err := from.Prefix(bits)
		if err != nil {
			continue
		}
		region, ok := t.networks[p]
		if !ok {
			continue
		}
		least, nearest := math.Inf(1), []Hub(nil)
		for _, h := range hubs {
			switch ms, known := t.latency[region][strings.ToLower(h.Location)]; {
			case !known || ms > least:
			case ms < least:
				least, nearest = ms, append(nearest[:0], h)
			default:
				nearest = append(nearest, h)
			}
		}
		if nearest != nil {
			return nearest
		}
		return hubs
	}
	return hubs
}
