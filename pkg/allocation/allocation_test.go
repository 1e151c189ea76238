package allocation_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/touchmark/touchmark/pkg/allocation"
)

// DPS-S 88: 10,000 IDs over hubs weighted 1 and 3; the same again; a hub that goes moves its own.
func TestHashed(t *testing.T) {
	hubs := []allocation.Hub{{Name: "A.example", Weight: 1}, {Name: "b.example", Weight: 3}, {Name: "c.example"}}
	at := func(i int, hubs []allocation.Hub) string {
		return strings.ToLower(hubs[allocation.Hashed(fmt.Sprintf("dev-%d", i), hubs)].Name)
	}
	count := map[string]int{}
	for i := range 10000 {
		was := at(i, hubs)
		count[was]++
		folded := []allocation.Hub{{Name: "c.EXAMPLE", Weight: 1}, {Name: "a.example"}, {Name: "b.example", Weight: 3}}
		if now := at(i, folded); now != was {
			t.Fatalf("device %d: %s, and in another order and spelling %s", i, was, now)
		}
		if now := at(i, hubs[1:]); now != was && was != "a.example" {
			t.Fatalf("device %d moved from %s to %s when a hub went that it was not at", i, was, now)
		}
		heavier := []allocation.Hub{hubs[0], {Name: "b.example", Weight: 6}, hubs[2]}
		if now := at(i, heavier); now != was && now != "b.example" {
			t.Fatalf("device %d moved from %s to %s when another got heavier", i, was, now)
		}
	}
	for name, want := range map[string]int{"a.example": 2000, "b.example": 6000, "c.example": 2000} {
		if n := count[name]; n < want*93/100 || n > want*107/100 {
			t.Errorf("%s has %d devices, want %d or so", name, n, want)
		}
	}
	if i := allocation.Hashed("dev", nil); i != -1 {
		t.Errorf("of none: %d", i)
	}
}

const good = `
[networks]
"10.0.0.0/8" = "eu"
"10.9.0.0/16" = "us"
"2001:db8::/32" = "us"
[latency.eu]
WestEurope = 8
northeurope = 8.0
eastus = 95
[latency.us]
westeurope = 90
eastus = 12.5
`

func TestTable(t *testing.T) {
	hubs := []allocation.Hub{{Name: "w", Location: "westeurope"}, {Name: "n", Location: "NorthEurope"}, {Name: "e", Location: "eastus"}, {Name: "nowhere"}}
	table, err := allocation.Parse("latency.toml", []byte(good))
	if err != nil {
		t.Fatal(err)
	}
	rows, err := allocation.Parse("latency.CSV", []byte("network,location,milliseconds\n10.0.0.0/8,westeurope,8\n10.0.0.0/8,northeurope,8\n10.0.0.0/8,eastus,95\n10.9.0.0/16,eastus,12.5\n2001:db8::/32,eastus,12\n"))
	if err != nil {
		t.Fatal(err)
	}
	for from, want := range map[string]string{
		"10.1.2.3": "w n", "10.9.1.1": "e", "::ffff:10.9.1.1": "e", "2001:db8::1": "e", "2001:db8::1%eth0": "e", "192.0.2.1": "w n e nowhere", "fe80::1": "w n e nowhere",
	} {
		for _, x := range []*allocation.Table{table, rows} {
			var got []string
			for _, h := range x.Nearest(netip.MustParseAddr(from), hubs) {
				got = append(got, h.Name)
			}
			if strings.Join(got, " ") != want {
				t.Errorf("from %s: %v, want %s", from, got, want)
			}
		}
	}
	// A network that knows no way to these hubs is no reason to look into a wider one: nobody knows.
	if got := rows.Nearest(netip.MustParseAddr("10.9.1.1"), hubs[:2]); len(got) != 2 {
		t.Errorf("%v", got)
	}
	var none *allocation.Table
	if got := none.Nearest(netip.MustParseAddr("10.9.1.1"), hubs); len(got) != 4 {
		t.Errorf("without a table: %v", got)
	}
	for _, bad := range []string{
		"[networks]\n\"10.0.0.1/8\" = \"eu\"\n[latency.eu]\nx = 1", "[networks]\n\"10.0.0.0/8\" = \"eu\"", "[networks]\n\"::ffff:10.0.0.0/104\" = \"eu\"\n[latency.eu]\nx = 1",
		"[latency.eu]\nx = -1", "[latency.eu]\nx = nan", "[latency.eu]\nx = 1e9", "[latency.eu]\nx = 1\nX = 2", "[latency.eu]\n\"\" = 2", "[latencies]\n", "[networks]\n\"10.0.0.0\" = \"eu\"",
	} {
		if _, err := allocation.Parse("bad.toml", []byte(bad)); err == nil || !strings.HasPrefix(err.Error(), "bad.toml") {
			t.Errorf("%s: %v", bad, err)
		}
	}
	for _, bad := range []string{"", "10.0.0.0/8,a,1", "network,location,milliseconds\n10.0.0.0/8,a", "network,location,milliseconds\n10.0.0.0/8,a,x", "network,location,milliseconds\n10.0.0.1/8,a,1",
		"network,location,milliseconds\n10.0.0.0/8,a,1\n10.0.0.0/8,A,1"} {
		if _, err := allocation.Parse("bad.csv", []byte(bad)); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}

// Whatever an operator's file says, it is refused or answers.
func FuzzTable(f *testing.F) {
	f.Add("t.toml", good)
	f.Add("t.csv", "network,location,milliseconds\n10.0.0.0/8,westeurope,8\n::/0,eastus,95\n")
	hubs := []allocation.Hub{{Name: "w", Location: "westeurope"}, {Name: "e", Location: "eastus"}}
	f.Fuzz(func(t *testing.T, name, text string) {
		table, err := allocation.Parse(name, []byte(text))
		if err != nil {
			return
		}
		for _, from := range []string{"10.1.1.1", "::1", "255.255.255.255"} {
			if got := table.Nearest(netip.MustParseAddr(from), hubs); len(got) == 0 || len(got) > len(hubs) {
				t.Errorf("from %s: %v", from, got)
			}
		}
	})
}
