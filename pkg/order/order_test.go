package order

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/touchmark/touchmark/hsm/signed"
)

type party struct {
	key *ecdsa.PrivateKey
	id  string
}

func newParty(t testing.TB) party {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	id, err := signed.KeyID(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return party{key, id}
}

func (p party) pub() []crypto.PublicKey { return []crypto.PublicKey{p.key.Public()} }

var day = time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC)

func newOrder(holder, station party) *Order {
	return &Order{
		Version: version, ID: "PO-1234", Product: "pump 3", Profile: "x509-group", ProfileSHA256: strings.Repeat("ab", 32), Quantity: 50,
		Serials: Serials{From: "SN00001", To: "SN00100"}, IDScope: "0ne00112233", GlobalEndpoint: "global.azure-devices-provisioning.net",
		Issuer: strings.Repeat("cd", 32), Holder: holder.id, Stations: []string{station.id}, NotBefore: day, NotAfter: day.AddDate(0, 1, 0),
	}
}

func newLease(o *Order, envelope []byte, station party) *Lease {
	return &Lease{Version: version, ID: o.ID + "/a", Order: string(envelope), Station: station.id, Quantity: 10,
		Serials: Serials{From: "SN00011", To: "SN00020"}, NotBefore: day, NotAfter: day.AddDate(0, 0, 7)}
}

func TestOrder(t *testing.T) {
	owner, holder, station, stranger := newParty(t), newParty(t), newParty(t), newParty(t)
	o := newOrder(holder, station)
	b, err := o.Sign(owner.key)
	if err != nil {
		t.Fatal(err)
	}
	g, err := Open(b, owner.pub(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := g.For(holder.key.Public()); err != nil {
		t.Error(err)
	}
	if err := g.For(station.key.Public()); !errors.Is(err, ErrStation) {
		t.Errorf("a station that holds no lease works on the order itself: %v", err)
	}
	if err := g.Admits("SN00100"); err != nil {
		t.Error(err)
	}
	if err := g.Admits("SN00101"); !errors.Is(err, ErrSerial) {
		t.Errorf("beyond the range: %v", err)
	}
	m := Making{Profile: o.Profile, ProfileSHA256: o.ProfileSHA256, IDScope: o.IDScope, Endpoint: o.GlobalEndpoint, Issuer: o.Issuer}
	if err := g.Covers(m); err != nil {
		t.Error(err)
	}
	for name, edit := range map[string]func(*Making){
		"profile": func(m *Making) { m.Profile = "other" }, "content": func(m *Making) { m.ProfileSHA256 = strings.Repeat("00", 32) },
		"scope": func(m *Making) { m.IDScope = "0ne00999999" }, "endpoint": func(m *Making) { m.Endpoint = "evil.example.net" },
		"issuer": func(m *Making) { m.Issuer = "" },
	} {
		other := m
		edit(&other)
		if err := g.Covers(other); !errors.Is(err, ErrProduct) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := Open(b, stranger.pub(), nil); !errors.Is(err, signed.ErrUntrusted) {
		t.Errorf("an order of somebody else's: %v", err)
	}

	l := newLease(o, b, station)
	leased, err := l.Sign(holder.key, owner.pub())
	if err != nil {
		t.Fatal(err)
	}
	g, err = Open(leased, owner.pub(), holder.pub())
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(g.For(station.key.Public()), g.Admits("SN00011"), g.Covers(m)); err != nil || g.ID() != "PO-1234/a" || g.Quantity() != 10 {
		t.Error(g, err)
	}
	if err := g.Admits("SN00021"); !errors.Is(err, ErrSerial) {
		t.Errorf("beyond the lease: %v", err)
	}
	if _, err := l.Sign(stranger.key, owner.pub()); !errors.Is(err, ErrStation) {
		t.Errorf("a stranger cuts a lease: %v", err)
	}
	// A stranger who signs leases and is trusted as a holder of other orders.
	forged, err := seal(stranger.key, leaseType, l)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Open(forged, owner.pub(), append(holder.pub(), stranger.pub()...)); !errors.Is(err, ErrStation) {
		t.Errorf("another holder's lease: %v", err)
	}
	// An order that the holder wrote himself.
	own, err := o.Sign(holder.key)
	if err != nil {
		t.Fatal(err)
	}
	self := newLease(o, own, station)
	forged, err = seal(holder.key, leaseType, self)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Open(forged, owner.pub(), holder.pub()); !errors.Is(err, signed.ErrUntrusted) {
		t.Errorf("a lease of an order that nobody gave: %v", err)
	}
	for name, edit := range map[string]func(*Lease){
		"quantity": func(l *Lease) { l.Quantity = 51; l.Serials = Serials{} }, "longer": func(l *Lease) { l.NotAfter = day.AddDate(1, 0, 0) },
		"earlier": func(l *Lease) { l.NotBefore = day.AddDate(0, 0, -1) }, "station": func(l *Lease) { l.Station = stranger.id },
		"name": func(l *Lease) { l.ID = "PO-9/a" }, "no name": func(l *Lease) { l.ID = "PO-1234/" }, "more than serials": func(l *Lease) { l.Quantity = 11 },
	} {
		bad := newLease(o, b, station)
		edit(bad)
		forged, err := seal(holder.key, leaseType, bad)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Open(forged, owner.pub(), holder.pub()); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// One document is not taken for another.
	if _, _, err := OpenOrder(leased, append(owner.pub(), holder.pub()...)); !errors.Is(err, signed.ErrCorrupt) {
		t.Errorf("a lease is no order: %v", err)
	}
	// Invariant 7: no octet changes unnoticed.
	for i := range leased {
		bad := bytes.Clone(leased)
		bad[i] ^= 1
		if _, err := Open(bad, owner.pub(), holder.pub()); err == nil {
			t.Fatalf("octet %d (%q) was changed and not noticed", i, leased[i])
		}
	}
}

func TestCheck(t *testing.T) {
	owner, holder, station := newParty(t), newParty(t), newParty(t)
	for name, edit := range map[string]func(*Order){
		"version":         func(o *Order) { o.Version = 2 },
		"ID":              func(o *Order) { o.ID = "a/b" },
		"quantity":        func(o *Order) { o.Quantity = 0 },
		"negative":        func(o *Order) { o.Quantity = -1 },
		"too many":        func(o *Order) { o.Quantity = 101 },
		"window":          func(o *Order) { o.NotAfter = o.NotBefore },
		"holder":          func(o *Order) { o.Holder = "me" },
		"station":         func(o *Order) { o.Stations = append(o.Stations, o.Stations[0]) },
		"half a range":    func(o *Order) { o.Serials.To = "" },
		"range backwards": func(o *Order) { o.Serials.From, o.Serials.To = o.Serials.To, o.Serials.From },
		"range of words":  func(o *Order) { o.Serials = Serials{From: "SNA", To: "SNB"} },
		"serial twice":    func(o *Order) { o.Serials = Serials{List: []string{"a", "a"}}; o.Quantity = 2 },
		"profile":         func(o *Order) { o.ProfileSHA256 = strings.ToUpper(o.ProfileSHA256) },
	} {
		o := newOrder(holder, station)
		edit(o)
		if _, err := o.Sign(owner.key); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestSerials(t *testing.T) {
	for _, c := range []struct {
		s       Serials
		in, out []string
		n       int64
	}{
		{Serials{}, []string{"anything"}, []string{"", strings.Repeat("x", 129)}, 0},
		{Serials{Pattern: `PUMP-##@\#`}, []string{"PUMP-12Z#"}, []string{"PUMP-12z#", "PUMP-1Z#", "PUMP-12ZA", "PUMP-12Z#0", "pump-12Z#"}, 0},
		{Serials{From: "SN00009", To: "SN00010"}, []string{"SN00009", "SN00010"}, []string{"SN00008", "SN00011", "SN0001", "SN0009x", "SN000100"}, 2},
		{Serials{From: "A1-0998", To: "A1-1001"}, []string{"A1-0999", "A1-1000"}, []string{"A1-09:9", "A1-1002"}, 4},
		{Serials{From: "X5", To: "X5"}, []string{"X5"}, []string{"X4", "X6"}, 1},
		{Serials{List: []string{"b", "a"}}, []string{"a", "b"}, []string{"c", "A"}, 2},
		{Serials{Pattern: "SN##", From: "SN10", To: "SN20"}, []string{"SN10"}, []string{"SN09", "SN21"}, 11},
	} {
		if err := c.s.check(); err != nil {
			t.Errorf("%+v: %v", c.s, err)
		}
		for _, in := range c.in {
			if !c.s.Has(in) {
				t.Errorf("%+v does not have %q", c.s, in)
			}
		}
		for _, out := range c.out {
			if c.s.Has(out) {
				t.Errorf("%+v has %q", c.s, out)
			}
		}
		if n, _ := c.s.Count(); n != c.n {
			t.Errorf("%+v counts %d", c.s, n)
		}
		for serial := range c.s.All {
			if !c.s.Has(serial) {
				t.Errorf("%+v yields %q", c.s, serial)
			}
		}
	}
}

func TestCut(t *testing.T) {
	gone := map[string]bool{"SN003": true, "SN007": true}
	taken := func(s string) (bool, error) { return gone[s], nil }
	s := Serials{From: "SN001", To: "SN012"}
	for _, c := range []struct {
		n        int64
		from, to string
	}{{2, "SN001", "SN002"}, {3, "SN004", "SN006"}, {4, "SN008", "SN011"}, {5, "SN008", "SN012"}} {
		part, err := s.Cut(c.n, taken)
		if err != nil || part.From != c.from || part.To != c.to {
			t.Errorf("%d: %+v, %v", c.n, part, err)
		}
	}
	if _, err := s.Cut(6, taken); err == nil {
		t.Error("six together were found")
	}
	l := Serials{List: []string{"SN003", "x", "y"}}
	if part, err := l.Cut(2, taken); err != nil || !slices.Equal(part.List, []string{"x", "y"}) {
		t.Errorf("%+v, %v", part, err)
	}
	if part, err := (&Serials{Pattern: "#"}).Cut(2, taken); err != nil || part.Pattern != "#" {
		t.Errorf("%+v, %v", part, err)
	}
}

func TestPapers(t *testing.T) {
	owner, station, stranger := newParty(t), newParty(t), newParty(t)
	r := &Return{Version: version, Lease: "PO-1/a", Station: station.id, At: day, Used: 1, Serials: []string{"SN1"}}
	b, err := r.Sign(station.key)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := OpenReturn(b, station.key.Public()); err != nil || got.Used != 1 {
		t.Error(got, err)
	}
	if _, err := OpenReturn(b, stranger.key.Public()); !errors.Is(err, signed.ErrUntrusted) {
		t.Errorf("another station's: %v", err)
	}
	for _, bad := range []Return{{Version: version, Station: stranger.id}, {Version: version, Station: station.id, Used: 2}, {Version: version, Station: station.id, Used: -1}} {
		b, err := bad.Sign(station.key)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := OpenReturn(b, station.key.Public()); !errors.Is(err, ErrInvalid) {
			t.Errorf("%+v: %v", bad, err)
		}
	}
	p := &Permit{Version: version, Order: "PO-1", Units: []PermitUnit{{"SN1", 2}}, At: day, Reason: "seen destroyed"}
	if b, err = p.Sign(owner.key); err != nil {
		t.Fatal(err)
	}
	if got, err := OpenPermit(b, owner.pub()); err != nil || !got.Covers("PO-1", "SN1", 2) || got.Covers("PO-1", "SN1", 0) || got.Covers("PO-2", "SN1", 2) {
		t.Error(got, err)
	}
	if _, err := OpenPermit(b, station.pub()); !errors.Is(err, signed.ErrUntrusted) {
		t.Errorf("a permit of the station's own: %v", err)
	}
	rep := &Report{Version: version, Grant: "PO-1", Station: station.id, At: day, Ordered: 3, Exported: 1, Leases: []LeaseLine{{Lease: "PO-1/a", Quantity: 2, Used: 2}}}
	if b, err = rep.Sign(station.key); err != nil {
		t.Fatal(err)
	}
	if got, err := OpenReport(b, station.pub()); err != nil || !got.Balanced() {
		t.Error(got, err)
	}
	rep.Leases[0].Used = -1
	if rep.Balanced() {
		t.Error("a lease is out, and the report balances")
	}
}

func FuzzOpen(f *testing.F) {
	owner, holder, station := newParty(f), newParty(f), newParty(f)
	o := newOrder(holder, station)
	b, err := o.Sign(owner.key)
	if err != nil {
		f.Fatal(err)
	}
	l, err := newLease(o, b, station).Sign(holder.key, owner.pub())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add(l)
	f.Fuzz(func(t *testing.T, in []byte) {
		if g, err := Open(in, owner.pub(), holder.pub()); err == nil && !bytes.Equal(bytes.TrimSuffix(in, []byte("\n")), b) && !bytes.Equal(bytes.TrimSuffix(in, []byte("\n")), l) {
			t.Errorf("taken: %v", g)
		}
		if g, err := Describe(in); err == nil {
			_ = fmt.Sprint(g.ID(), g.Quantity(), g.Admits("SN00001"))
		}
	})
}

func FuzzSerials(f *testing.F) {
	f.Add("SN##", "SN01", "SN10", "SN05")
	f.Fuzz(func(t *testing.T, pattern, from, to, serial string) {
		s := Serials{Pattern: pattern, From: from, To: to}
		if s.check() != nil {
			return
		}
		n, counted := s.Count()
		if s.Has(serial) && from != "" && (!counted || n < 1 || len(serial) != len(from)) {
			t.Errorf("%+v has %q, of %d", s, serial, n)
		}
	})
}
