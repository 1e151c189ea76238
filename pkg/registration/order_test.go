package registration_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/touchmark/touchmark/hsm/signed"
	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/bundle"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/evidence"
	"github.com/touchmark/touchmark/pkg/order"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

// A party is whoever signs: an owner or a station.
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

// A factory has an owner, a station that holds the orders, and two that work on leases, before a service with a closed group.
type factory struct {
	*registrationtest.Fixture
	service       *registration.Service
	owner, holder party
	one, two      party
	ca            *attesttest.Holder
	order         *order.Order
	trusted       []crypto.PublicKey
	issuer        string
	requireOrder  bool
}

func newFactory(t testing.TB) *factory {
	f := &factory{Fixture: registrationtest.NewFixture(t, "a.example"), owner: newParty(t), holder: newParty(t), one: newParty(t), two: newParty(t)}
	f.ca = attesttest.CA(t, nil, "ordered")
	var err error
	if f.issuer, err = evidence.KeyHash(f.ca.Certificate.PublicKey); err != nil {
		t.Fatal(err)
	}
	f.trusted = []crypto.PublicKey{f.holder.key.Public(), f.one.key.Public(), f.two.key.Public()}
	f.service = f.serve(false)
	f.order = f.newOrder("PO-1", 10)
	return f
}

func (f *factory) serve(requireOrders bool) *registration.Service {
	return registration.New(registration.Config{Store: f.Store, Scope: registrationtest.Scope, Settings: registration.Settings{Hubs: registration.Records("a.example")}, Now: f.Now,
		Owners: []crypto.PublicKey{f.owner.key.Public()}, RequireOrders: requireOrders})
}

func (f *factory) newOrder(id string, quantity int64) *order.Order {
	return &order.Order{Version: 1, ID: id, Product: "pump", Profile: "x509-group", ProfileSHA256: strings.Repeat("ab", 32), Quantity: quantity,
		Serials: order.Serials{From: "SN0001", To: "SN0100"}, IDScope: registrationtest.Scope, GlobalEndpoint: "dps.example.net", Issuer: f.issuer,
		Holder: f.holder.id, Stations: []string{f.one.id, f.two.id}, NotBefore: f.Now().Truncate(time.Second), NotAfter: f.Now().AddDate(0, 1, 0)}
}

func sign(t testing.TB, o interface {
	Sign(crypto.Signer) ([]byte, error)
}, by party) []byte {
	t.Helper()
	b, err := o.Sign(by.key)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func (f *factory) lease(t testing.TB, id string, station party, quantity int64, serials order.Serials) []byte {
	t.Helper()
	l := &order.Lease{Version: 1, ID: f.order.ID + "/" + id, Order: string(sign(t, f.order, f.owner)), Station: station.id, Quantity: quantity, Serials: serials,
		NotBefore: f.order.NotBefore, NotAfter: f.order.NotAfter}
	b, err := l.Sign(f.holder.key, []crypto.PublicKey{f.owner.key.Public()})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func (f *factory) group() bundle.Entry {
	return bundle.Entry{Closed: true, Group: &dps.EnrollmentGroup{EnrollmentGroupID: "ordered", Enrollment: registrationtest.Signers(f.ca, nil)}}
}

// hash is a key hash out of a word.
func hash(word string) string { return fmt.Sprintf("%064x", []byte(word)) }

// unit is a group's device of that serial; its key is one of the serial and revision, unless it is given.
func unit(n int, revision int64, key ...string) bundle.Entry {
	serial := fmt.Sprintf("SN%04d", n)
	k := hash(fmt.Sprintf("%s.%d", serial, revision))
	if len(key) > 0 {
		k = key[0]
	}
	return bundle.Entry{Serial: serial, Revision: revision, Device: &bundle.GroupDevice{RegistrationID: "Pump-" + serial, Group: "ordered", KeyHash: k}}
}

func units(from, to int) (all []bundle.Entry) {
	for n := from; n <= to; n++ {
		all = append(all, unit(n, 0))
	}
	return all
}

func gone(n int, revision int64, state bundle.State) bundle.Entry {
	u := unit(n, revision)
	return bundle.Entry{Serial: u.Serial, Revision: revision, Retired: &bundle.RetiredDevice{RegistrationID: u.Device.RegistrationID, Group: "ordered", KeyHash: u.Device.KeyHash,
		State: state, Reason: "for a test", At: time.Unix(1767225600, 0)}}
}

// permitted gives an entry of a returned unit the owner's permit.
func (f *factory) permitted(t testing.TB, grant []byte, e bundle.Entry) bundle.Entry {
	t.Helper()
	if e.Retired == nil || e.Retired.State != bundle.Returned || e.Retired.Permit != "" || grant == nil {
		return e
	}
	g, err := order.Describe(grant)
	if err != nil {
		return e
	}
	b, err := (&order.Permit{Version: 1, Order: g.Order.ID, Units: []order.PermitUnit{{Serial: e.Serial, Revision: e.Revision}}, At: time.Unix(1767225600, 0).UTC(), Reason: "seen"}).Sign(f.owner.key)
	if err != nil {
		t.Fatal(err)
	}
	r := *e.Retired
	r.Permit = string(b)
	e.Retired = &r
	return e
}

// bundle writes entries into a bundle of a station, and imports what comes out of it: nothing gets in but through the reader.
func (f *factory) bundle(t testing.TB, s *registration.Service, station party, grant []byte, dryRun bool, e ...bundle.Entry) (registration.ImportResult, error) {
	t.Helper()
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "b.tmb")
	w, err := bundle.NewWriter(bundle.WriterConfig{Path: path, IDScope: registrationtest.Scope, Created: f.Now(), Signer: station.key, Recipients: []age.Recipient{id.Recipient()}})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abort()
	w.SetGrant(grant)
	for i := range e {
		p := f.permitted(t, grant, e[i])
		if err := w.Add(&p); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := w.Close(); err != nil {
		t.Fatal(err)
	}
	in := mustOpen(t, path)
	r, err := bundle.Open(in, bundle.OpenConfig{Trusted: f.trusted, Identities: []age.Identity{id}})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	return s.Import(t.Context(), r.Entries(), registration.ImportConfig{Station: r.KeyID(), Grant: r.Grant(), Holders: f.trusted, RequireOrder: f.requireOrder, DryRun: dryRun})
}

func (f *factory) must(t testing.TB, station party, grant []byte, e ...bundle.Entry) registration.ImportResult {
	t.Helper()
	res, err := f.bundle(t, f.service, station, grant, false, e...)
	if err != nil {
		t.Fatal(err)
	}
	return res
}

func counts(r registration.ImportResult) string {
	return fmt.Sprintf("%d new, %d unchanged, %d conflicting, %d replaced, %d retired, %d stale, %d refused", r.New, r.Unchanged, r.Conflicting, r.Replaced, r.Retired, r.Stale, r.Refused)
}

func (f *factory) tally(t testing.TB, id string) registration.Tally {
	t.Helper()
	v, err := f.service.Order(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	return v.Tally
}

// Invariant 2, at the operator's: nothing comes in beyond its order. Each attempt is made by stations that the service trusts.
func TestOverProduction(t *testing.T) {
	block := func(from, to string) order.Serials { return order.Serials{From: from, To: to} }
	whole := func(t *testing.T, f *factory) []byte { return sign(t, f.order, f.owner) }
	for _, c := range []struct {
		name string
		try  func(t *testing.T, f *factory) (registration.ImportResult, error)
		// bundle says that nothing of it is taken; else so many units are, and so many entries refused, or conflicting.
		bundle                     bool
		imported, refused, clashes int64
		why                        string
	}{
		{name: "more devices than the order", imported: 10, refused: 5, why: "spent", try: func(t *testing.T, f *factory) (registration.ImportResult, error) {
			return f.bundle(t, f.service, f.holder, whole(t, f), false, append(units(1, 15), f.group())[:]...)
		}},
		{name: "a second bundle goes beyond it", imported: 10, refused: 2, why: "spent", try: func(t *testing.T, f *factory) (registration.ImportResult, error) {
			f.must(t, f.holder, whole(t, f), units(1, 6)...)
			return f.bundle(t, f.service, f.holder, whole(t, f), false, units(5, 12)...)
		}},
		{name: "the order signed again is the same order", imported: 10, refused: 10, why: "spent", try: func(t *testing.T, f *factory) (registration.ImportResult, error) {
			f.must(t, f.holder, whole(t, f), units(1, 10)...)
			return f.bundle(t, f.service, f.holder, whole(t, f), false, units(11, 20)...)
		}},
		{name: "orders and leases together", imported: 10, refused: 3, why: "PO-1 is spent", try: func(t *testing.T, f *factory) (registration.ImportResult, error) {
			f.must(t, f.one, f.lease(t, "a", f.one, 5, block("SN0001", "SN0005")), units(1, 5)...)
			f.must(t, f.two, f.lease(t, "b", f.two, 4, block("SN0006", "SN0009")), units(6, 9)...)
			return f.bundle(t, f.service, f.holder, whole(t, f), false, units(10, 13)...)
		}},
		{name: "beyond the lease", imported: 3, refused: 2, why: "PO-1/a is spent", try: func(t *testing.T, f *factory) (registration.ImportResult, error) {
			return f.bundle(t, f.service, f.one, f.lease(t, "a", f.one, 3, block("SN0001", "SN0010")), false, units(1, 5)...)
		}},
		{name: "serials outside the lease", imported: 3, refused: 2, why: "does not have this serial", try: func(t *testing.T, f *factory) (registration.ImportResult, error) {
			return f.bundle(t, f.service, f.one, f.lease(t, "a", f.one, 3, block("SN0001", "SN0003")), false, units(1, 5)...)
		}},
		{name: "serials outside the range", imported: 1, refused: 1, why: "does not have this serial", try: func(t *testing.T, f *factory) (registration.ImportResult, error) {
			return f.bundle(t, f.service, f.holder, whole(t, f), false, unit(100, 0), unit(101, 0))
		}},
		{name: "no serial at all", refused: 1, why: "does not have this serial", try: func(t *testing.T, f *factory) (registration.ImportResult, error) {
			u := unit(1, 0)
			u.Serial = ""
			return f.bundle(t, f.service, f.holder, whole(t, f), false, u)
		}},
		{name: "a station that the order does not name", bundle: true, why: "for other stations", try: func(t *testing.T, f *factory) (registration.ImportResult, error) {
			return f.bundle(t, f.service, f.one, whole(t, f), false, units(1, 1)...)
		}},
		{name: "another station's lease", bundle: true, why: "for other stations", try: func(t *testing.T, f *factory) (registration.ImportResult, error) {
			return f.bundle(t, f.service, f.two, f.lease(t, "a", f.one, 3, block("SN0001", "SN0003")), false, units(1, 1)...)
		}},
		{name: "another order's grant", bundle: true, why: "for other stations", try: func(t *testing.T, f *factory) (registration.ImportResult, error) {
			other := f.newOrder("PO-2", 1000)
			other.Holder, other.Stations, other.Serials = f.two.id, nil, order.Serials{}
			return f.bundle(t, f.service, f.holder, sign(t, other, f.owner), false, units(1, 1)...)
		}},
		{name: "units of one order in a bundle of another", refused: 5, why: "does not have this serial", try: func(t *testing.T, f *factory) (registration.ImportResult, error) {
			other := f.newOrder("PO-2", 10)
			other.Serials = block("SN0201", "SN0300")
			return f.bundle(t, f.service, f.holder, sign(t, other, f.owner), false, units(1, 5)...)
		}},
		{name: "an edited order", bundle: true, why: "does not verify", try: func(t *testing.T, f *factory) (registration.ImportResult, error) {
			b := whole(t, f)
			e, err := signed.Parse(b)
			if err != nil {
				t.Fatal(err)
			}
			var envelope map[string]any
			if err := json.Unmarshal(b, &envelope); err != nil {
				t.Fatal(err)
			}
			envelope["payload"] = bytes.Replace(e.Unverified(), []byte(`"quantity":10`), []byte(`"quantity":99`), 1)
			forged, err := json.Marshal(struct {
				PayloadType any `json:"payloadType"`
				Payload     any `json:"payload"`
				Signatures  any `json:"signatures"`
			}{envelope["payloadType"], envelope["payload"], envelope["signatures"]})
			if err != nil {
				t.Fatal(err)
			}
			return f.bundle(t, f.service, f.holder, forged, false, units(1, 1)...)
		}},
		{name: "an order that a station signed itself", bundle: true, why: "not signed by", try: func(t *testing.T, f *factory) (registration.ImportResult, error) {
			return f.bundle(t, f.service, f.holder, sign(t, f.order, f.holder), false, units(1, 1)...)
		}},
		{name: "one order ID, two documents", bundle: true, why: "another content", try: func(t *testing.T, f *factory) (registration.ImportResult, error) {
			f.must(t, f.holder, whole(t, f), units(1, 1)...)
			return f.bundle(t, f.service, f.holder, sign(t, f.newOrder("PO-1", 99), f.owner), false, units(2, 2)...)
		}, imported: 1},
		{name: "one lease ID, two documents", bundle: true, why: "another content", try: func(t *testing.T, f *factory) (registration.ImportResult, error) {
			f.must(t, f.one, f.lease(t, "a", f.one, 2, block("SN0001", "SN0002")), units(1, 2)...)
			return f.bundle(t, f.service, f.one, f.lease(t, "a", f.one, 8, block("SN0001", "SN0008")), false, units(1, 8)...)
		}, imported: 2},
		{name: "an order for another ID scope", bundle: true, why: "ID scope", try: func(t *testing.T, f *factory) (registration.ImportResult, error) {
			f.order.IDScope = "0ne00000001"
			return f.bundle(t, f.service, f.holder, whole(t, f), false, units(1, 1)...)
		}},
		{name: "a lease cut by another station", bundle: true, why: "another station than the holder", try: func(t *testing.T, f *factory) (registration.ImportResult, error) {
			// The order names its holder; a station that is trusted, and holds none, signs the same text.
			good, err := signed.Parse(f.lease(t, "a", f.two, 3, block("SN0001", "SN0003")))
			if err != nil {
				t.Fatal(err)
			}
			forged, err := signed.Sign(f.two.key, good.PayloadType(), good.Unverified())
			if err != nil {
				t.Fatal(err)
			}
			return f.bundle(t, f.service, f.two, forged, false, units(1, 3)...)
		}},
		{name: "one serial from two stations", imported: 1, clashes: 1, why: "station", try: func(t *testing.T, f *factory) (registration.ImportResult, error) {
			f.order.Serials = order.Serials{Pattern: "SN####"} // a pattern alone does not part the leases
			f.must(t, f.one, f.lease(t, "a", f.one, 3, f.order.Serials), unit(1, 0))
			return f.bundle(t, f.service, f.two, f.lease(t, "b", f.two, 3, f.order.Serials), false, unit(1, 0, hash("copy")))
		}},
		{name: "one serial from two stations, by another name", imported: 1, clashes: 1, why: "station", try: func(t *testing.T, f *factory) (registration.ImportResult, error) {
			f.order.Serials = order.Serials{Pattern: "SN####"}
			f.must(t, f.one, f.lease(t, "a", f.one, 3, f.order.Serials), unit(1, 0))
			u := unit(1, 1, hash("copy"))
			u.Device.RegistrationID = "pump-1-copy"
			return f.bundle(t, f.service, f.two, f.lease(t, "b", f.two, 3, f.order.Serials), false, u)
		}},
		{name: "one serial twice from one station, by another name", imported: 1, clashes: 1, why: "station", try: func(t *testing.T, f *factory) (registration.ImportResult, error) {
			u := unit(1, 0, hash("copy"))
			u.Device.RegistrationID = "pump-1-copy"
			return f.bundle(t, f.service, f.holder, whole(t, f), false, unit(1, 0), u)
		}},
		{name: "an older bundle after a rework", imported: 1, why: "the service has revision 1", try: func(t *testing.T, f *factory) (registration.ImportResult, error) {
			f.must(t, f.holder, whole(t, f), unit(1, 0))
			f.must(t, f.holder, whole(t, f), gone(1, 0, bundle.Reworked), unit(1, 1))
			res, err := f.bundle(t, f.service, f.holder, whole(t, f), false, unit(1, 0))
			if res.Stale != 1 {
				t.Errorf("replayed: %s", counts(res))
			}
			return res, err
		}},
		{name: "reworks beyond the quantity", imported: 10, refused: 1, why: "spent", try: func(t *testing.T, f *factory) (registration.ImportResult, error) {
			f.must(t, f.holder, whole(t, f), units(1, 10)...)
			return f.bundle(t, f.service, f.holder, whole(t, f), false, gone(1, 0, bundle.Reworked), unit(1, 1), unit(11, 0))
		}},
		{name: "scrapped units make no room", imported: 9, refused: 1, why: "spent", try: func(t *testing.T, f *factory) (registration.ImportResult, error) {
			f.must(t, f.holder, whole(t, f), units(1, 10)...)
			return f.bundle(t, f.service, f.holder, whole(t, f), false, gone(1, 0, bundle.Scrapped), unit(11, 0))
		}},
		{name: "units scrapped before they left count", imported: 8, refused: 1, why: "spent", try: func(t *testing.T, f *factory) (registration.ImportResult, error) {
			f.must(t, f.holder, whole(t, f), gone(50, 0, bundle.Scrapped), gone(51, 0, bundle.Scrapped))
			return f.bundle(t, f.service, f.holder, whole(t, f), false, units(1, 9)...)
		}},
		{name: "a CA that the order does not name", refused: 1, why: "CA", try: func(t *testing.T, f *factory) (registration.ImportResult, error) {
			g := f.group()
			g.Group.EnrollmentGroupID = "rogue"
			g.Group.Enrollment = registrationtest.Signers(attesttest.CA(t, nil, "rogue"), nil)
			return f.bundle(t, f.service, f.holder, whole(t, f), false, g)
		}},
		{name: "no order where one is required", bundle: true, why: "it has none", try: func(t *testing.T, f *factory) (registration.ImportResult, error) {
			return f.bundle(t, f.serve(true), f.holder, nil, false, units(1, 1)...)
		}},
		{name: "no order where the caller requires one", bundle: true, why: "it has none", try: func(t *testing.T, f *factory) (registration.ImportResult, error) {
			f.requireOrder = true
			return f.bundle(t, f.service, f.holder, nil, false, units(1, 1)...)
		}},
		{name: "an order, and a service that knows no owner", bundle: true, why: "no owner", try: func(t *testing.T, f *factory) (registration.ImportResult, error) {
			return f.bundle(t, f.Service, f.holder, whole(t, f), false, units(1, 1)...)
		}},
		{name: "an ordered device, replaced without an order", imported: 1, clashes: 1, why: "no order", try: func(t *testing.T, f *factory) (registration.ImportResult, error) {
			f.must(t, f.holder, whole(t, f), unit(1, 0))
			return f.bundle(t, f.service, f.holder, nil, false, unit(1, 1))
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newFactory(t)
			f.must(t, f.holder, nil, f.group())
			res, err := c.try(t, f)
			if c.bundle {
				if !errors.Is(err, registration.ErrOrder) || !strings.Contains(err.Error(), c.why) {
					t.Errorf("%v, want %q", err, c.why)
				}
			} else if err != nil {
				t.Fatal(err)
			} else {
				named := append(append(res.Refusals, res.Conflicts...), res.StaleEntries...)
				if int64(res.Refused) != c.refused || int64(res.Conflicting) != c.clashes || len(named) == 0 || !strings.Contains(named[0].Reason, c.why) {
					t.Errorf("%s: %+v", counts(res), named)
				}
				if c.clashes > 0 && strings.Contains(c.name, "two stations") && !(strings.Contains(named[0].Reason, f.one.id) && strings.Contains(named[0].Reason, f.two.id)) {
					t.Errorf("it does not name both stations: %s", named[0].Reason)
				}
			}
			orders, _, err := f.service.QueryOrders(t.Context(), "", 10)
			if err != nil {
				t.Fatal(err)
			}
			var imported, refused int64
			for _, o := range orders {
				imported += o.Imported
				refused += o.Refused
				list, _, err := f.service.QueryRefusals(t.Context(), o.ID, "", 100)
				if err != nil || int64(len(list)) != o.Refused {
					t.Errorf("%d refusals are kept of %d, %v", len(list), o.Refused, err)
				}
			}
			want := c.refused
			if c.clashes > 0 && c.why == "station" {
				want = c.clashes // between stations
			}
			if imported != c.imported || refused != want {
				t.Errorf("%d imported, %d refused", imported, refused)
			}
		})
	}
}

// What is refused today may come tomorrow, when the owner was shown that a unit is no more.
func TestReturned(t *testing.T) {
	f := newFactory(t)
	f.order.Quantity = 3
	grant := sign(t, f.order, f.owner)
	f.must(t, f.holder, grant, append([]bundle.Entry{f.group()}, units(1, 3)...)...)
	step := func(want string, tally registration.Tally, e ...bundle.Entry) {
		t.Helper()
		dry, err := f.bundle(t, f.service, f.holder, grant, true, e...)
		if err != nil {
			t.Fatal(err)
		}
		res := f.must(t, f.holder, grant, e...)
		if counts(res) != want || counts(dry) != want {
			t.Errorf("%s, dry %s, want %s: %+v", counts(res), counts(dry), want, res)
		}
		if got := f.tally(t, "PO-1"); got != tally {
			t.Errorf("tally %+v, want %+v", got, tally)
		}
	}
	step("0 new, 0 unchanged, 0 conflicting, 0 replaced, 0 retired, 0 stale, 1 refused", registration.Tally{Used: 3, Imported: 3, Refused: 1}, unit(4, 0))
	step("0 new, 0 unchanged, 0 conflicting, 0 replaced, 1 retired, 0 stale, 0 refused", registration.Tally{Used: 3, Imported: 2, Scrapped: 1, Refused: 1}, gone(2, 0, bundle.Scrapped))
	// The owner's permit for another unit, for another order, and the station's own.
	for name, permit := range map[string]*order.Permit{"another unit": {Order: "PO-1", Units: []order.PermitUnit{{Serial: "X"}}}, "another order": {Order: "PO-2", Units: []order.PermitUnit{{Serial: unit(2, 0).Serial}}},
		"another revision": {Order: "PO-1", Units: []order.PermitUnit{{Serial: unit(2, 0).Serial, Revision: 1}}},
		"the station's":    {Order: "PO-1", Units: []order.PermitUnit{{Serial: unit(2, 0).Serial}}}} {
		permit.Version, permit.At = 1, time.Unix(1767225600, 0).UTC()
		by := f.owner.key
		if name == "the station's" {
			by = f.holder.key
		}
		b, err := permit.Sign(by)
		if err != nil {
			t.Fatal(err)
		}
		e := gone(2, 0, bundle.Returned)
		e.Retired.Permit = string(b)
		if res := f.must(t, f.holder, grant, e); res.Retired != 0 || len(res.Conflicts) != 1 || !strings.Contains(res.Conflicts[0].Reason, "permit") {
			t.Errorf("%s: %+v", name, res)
		}
	}
	step("0 new, 0 unchanged, 0 conflicting, 0 replaced, 1 retired, 0 stale, 0 refused", registration.Tally{Used: 2, Imported: 2, Returned: 1, Refused: 1}, gone(2, 0, bundle.Returned))
	step("1 new, 0 unchanged, 0 conflicting, 0 replaced, 0 retired, 0 stale, 0 refused", registration.Tally{Used: 3, Imported: 3, Returned: 1}, unit(4, 0))
	step("0 new, 1 unchanged, 0 conflicting, 0 replaced, 0 retired, 0 stale, 0 refused", registration.Tally{Used: 3, Imported: 3, Returned: 1}, unit(4, 0))
	step("0 new, 1 unchanged, 0 conflicting, 0 replaced, 0 retired, 1 stale, 0 refused", registration.Tally{Used: 3, Imported: 3, Returned: 1}, unit(2, 0), gone(2, 0, bundle.Scrapped))
	// What was voided was never heard of: it takes nothing, and gives nothing.
	step("0 new, 0 unchanged, 0 conflicting, 0 replaced, 1 retired, 0 stale, 0 refused", registration.Tally{Used: 3, Imported: 3, Returned: 1, Voided: 1}, gone(9, 0, bundle.Voided))
	if list, _, err := f.service.QueryOrderDevices(t.Context(), "PO-1", false, "", 10); err != nil || len(list) != 4 || list[1].State != "returned" || list[3].State != "imported" {
		t.Errorf("%+v, %v", list, err)
	}
}

// state is all that a service knows of ordered units, but for what no two runs have in common.
func (f *factory) state(t testing.TB) string {
	t.Helper()
	var out strings.Builder
	if err := f.Store.View(t.Context(), func(tx registration.Tx) error {
		out.Reset()
		scope := strings.ToLower(registrationtest.Scope)
		g, err := tx.Grant(scope, "PO-1")
		if err != nil {
			return err
		}
		fmt.Fprintf(&out, "%+v\n", g.Tally)
		devices, err := tx.Devices(scope, "PO-1", false, "", 1000)
		if err != nil {
			return err
		}
		for _, d := range devices {
			fmt.Fprintf(&out, "%+v", *d)
			if r, err := tx.Record(scope, registration.Individual, d.ID); err == nil {
				var in dps.IndividualEnrollment
				if err := json.Unmarshal(r.Document, &in); err != nil {
					return err
				}
				in.ETag = ""
				b, _ := json.Marshal(in)
				fmt.Fprintf(&out, " %s %s %x", b, r.Keys, r.Content)
			} else if !errors.Is(err, registration.ErrNotFound) {
				return err
			}
			for rev := range int64(4) {
				for _, key := range []string{"", hash(fmt.Sprintf("%s.%d", d.Serial, rev))} {
					if e, err := tx.Ending(scope, d.ID, rev, key); err == nil {
						fmt.Fprintf(&out, " %d:%s", rev, e.State)
					}
				}
				ended, err := tx.KeyEnded(scope, hash(fmt.Sprintf("%s.%d", d.Serial, rev)))
				if err != nil {
					return err
				}
				fmt.Fprintf(&out, " %v", ended)
			}
			fmt.Fprintln(&out)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

// Whatever the order in which bundles arrive, and however often, the service ends up knowing the same.
func TestAnyOrder(t *testing.T) {
	ind := func(n int, revision int64, k byte) bundle.Entry {
		e := key(k)
		e.Attestation.SymmetricKey.SecondaryKey = e.Attestation.SymmetricKey.PrimaryKey
		return bundle.Entry{Serial: fmt.Sprintf("SN%04d", n), Revision: revision, Individual: &dps.IndividualEnrollment{RegistrationID: fmt.Sprintf("ind-%d", n), Enrollment: e}}
	}
	indGone := func(n int, revision int64, s bundle.State) bundle.Entry {
		e := gone(n, revision, s)
		e.Retired.RegistrationID, e.Retired.Group, e.Retired.KeyHash = fmt.Sprintf("ind-%d", n), "", ""
		return e
	}
	renamed := func(e bundle.Entry, id string) bundle.Entry {
		if e.Device != nil {
			e.Device.RegistrationID = id
		} else {
			e.Retired.RegistrationID = id
		}
		return e
	}
	bundles := [][]bundle.Entry{
		{unit(1, 0), unit(2, 0), unit(3, 0), unit(4, 0), unit(5, 0), ind(20, 0, 'a'), ind(21, 0, 'b'), ind(22, 0, 'c')},
		{gone(1, 0, bundle.Reworked), unit(1, 1), gone(2, 0, bundle.Scrapped), indGone(20, 0, bundle.Reworked), ind(20, 1, 'd')},
		{gone(1, 1, bundle.Reworked), unit(1, 2), gone(2, 0, bundle.Returned), indGone(21, 0, bundle.Scrapped)},
		{unit(3, 1), unit(2, 1), ind(22, 1, 'e')},                                           // replaced, and nothing says how the older ones ended
		{gone(7, 0, bundle.Voided), unit(7, 0, hash("another"))},                            // voided, and begun again
		{gone(8, 0, bundle.Scrapped), gone(9, 2, bundle.Reworked)},                          // known by their ends alone
		{renamed(gone(4, 0, bundle.Reworked), "pump-sn0004"), renamed(unit(4, 1), "new-4")}, // the next identity has another name
		{renamed(unit(5, 1), "new-5")},
	}
	var want string
	r := mathrand.New(mathrand.NewPCG(1, 2))
	for round := range 24 {
		f := newFactory(t)
		f.order.Quantity = 100
		grant := sign(t, f.order, f.owner)
		f.must(t, f.holder, grant, f.group())
		seq := r.Perm(len(bundles))
		if round == 0 {
			slices.Sort(seq)
		}
		for _, n := range append(seq, seq[:r.IntN(len(seq))]...) {
			e := slices.Clone(bundles[n])
			if round > 0 {
				r.Shuffle(len(e), func(i, j int) { e[i], e[j] = e[j], e[i] })
			}
			if res := f.must(t, f.holder, grant, e...); res.Conflicting+res.Refused > 0 {
				t.Fatalf("sequence %v: bundle %d: %s: %+v", seq, n, counts(res), res)
			}
			if r.IntN(3) == 0 {
				f.must(t, f.holder, grant, bundles[n]...)
			}
		}
		got := strings.ReplaceAll(f.state(t), f.holder.id, "holder")
		if round == 0 {
			want = got
			if !strings.HasPrefix(got, "{Used:11 Imported:8 Seen:0 Refused:0 Voided:1 Reworked:5 Scrapped:2 Returned:1}") {
				t.Errorf("%s", got)
			}
		}
		if got != want {
			t.Fatalf("sequence %v ends in\n%s\nand not in\n%s", seq, got, want)
		}
	}
}

// An operator's word holds through reworks: who was blocked stays blocked.
func TestBlockedStaysBlocked(t *testing.T) {
	f := newFactory(t)
	ind := func(revision int64, k byte) bundle.Entry {
		return bundle.Entry{Serial: "SN0001", Revision: revision, Individual: &dps.IndividualEnrollment{RegistrationID: "ind-1", Enrollment: key(k)}}
	}
	f.must(t, f.holder, nil, ind(0, 'a'))
	off := key('a')
	off.ProvisioningStatus = dps.EnrollmentDisabled
	f.Put(t, registration.Individual, "ind-1", off)
	for revision := range int64(3) {
		if res := f.must(t, f.holder, nil, ind(revision+1, byte('b'+revision))); res.Replaced != 1 {
			t.Fatalf("%s: %+v", counts(res), res)
		}
		if st := register(t, f.service, f.ByKey("ind-1", bytes.Repeat([]byte{byte('b' + revision)}, 32))); st.Status != dps.Disabled {
			t.Errorf("revision %d: %s", revision+1, st.Status)
		}
	}
	// A new revision of one that ended is enabled.
	f.must(t, f.holder, nil, bundle.Entry{Serial: "SN0002", Individual: &dps.IndividualEnrollment{RegistrationID: "ind-2", Enrollment: key('a')}})
	e := gone(2, 0, bundle.Reworked)
	e.Retired.RegistrationID, e.Retired.Group = "ind-2", ""
	f.must(t, f.holder, nil, e)
	if st := register(t, f.service, f.ByKey("ind-2", bytes.Repeat([]byte{'a'}, 32))); st.Status != dps.Disabled {
		t.Errorf("ended: %s", st.Status)
	}
	f.must(t, f.holder, nil, bundle.Entry{Serial: "SN0002", Revision: 1, Individual: &dps.IndividualEnrollment{RegistrationID: "ind-2", Enrollment: key('b')}})
	if st := register(t, f.service, f.ByKey("ind-2", bytes.Repeat([]byte{'b'}, 32))); st.Status != dps.Assigned {
		t.Errorf("reworked: %s", st.Status)
	}
	if _, err := f.service.Register(t.Context(), request(f.ByKey("ind-2", bytes.Repeat([]byte{'a'}, 32)))); dps.AsError(err).Code != dps.CodeUnauthorized {
		t.Errorf("the old board: %v", err)
	}
	// Without an order a station replaces its own devices, and no other station's.
	if res := f.must(t, f.one, nil, bundle.Entry{Serial: "SN0002", Revision: 2, Individual: &dps.IndividualEnrollment{RegistrationID: "ind-2", Enrollment: key('z')}}); res.Conflicting != 1 {
		t.Errorf("another station: %s", counts(res))
	}
}

// First seen: counted once, with the living identity.
func TestFirstSeen(t *testing.T) {
	f := newFactory(t)
	grant := f.lease(t, "a", f.one, 5, order.Serials{From: "SN0001", To: "SN0005"})
	ind := func(n int, revision int64, k byte) bundle.Entry {
		return bundle.Entry{Serial: fmt.Sprintf("SN%04d", n), Revision: revision, Individual: &dps.IndividualEnrollment{RegistrationID: fmt.Sprintf("ind-%d", n), Enrollment: key(k)}}
	}
	f.must(t, f.one, grant, ind(1, 0, 'a'), ind(2, 0, 'b'))
	for range 2 {
		register(t, f.service, f.ByKey("ind-1", bytes.Repeat([]byte{'a'}, 32)))
	}
	for _, id := range []string{"PO-1", "PO-1/a"} {
		if got := f.tally(t, id); got != (registration.Tally{Used: 2, Imported: 2, Seen: 1}) {
			t.Errorf("%s: %+v", id, got)
		}
	}
	if list, _, err := f.service.QueryOrderDevices(t.Context(), "PO-1", true, "", 10); err != nil || len(list) != 1 || list[0].Serial != "SN0002" {
		t.Errorf("unseen: %+v, %v", list, err)
	}
	f.must(t, f.one, grant, ind(1, 1, 'c'))
	if got := f.tally(t, "PO-1"); got != (registration.Tally{Used: 2, Imported: 2}) {
		t.Errorf("reworked: %+v", got)
	}
	if list, next, err := f.service.QueryOrderDevices(t.Context(), "PO-1", true, "", 1); err != nil || len(list) != 1 || next != "ind-1" {
		t.Errorf("a page: %+v, %q, %v", list, next, err)
	}
	if _, _, err := f.service.QueryRefusals(t.Context(), "PO-9", "", 1); dps.AsError(err).Code != dps.CodeNotFound {
		t.Errorf("an order that never was: %v", err)
	}
}

func mustOpen(t testing.TB, path string) *os.File {
	t.Helper()
	in, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = in.Close() })
	return in
}

// Many bundles of one order at once do not overdraw it together.
func TestOrderAtOnce(t *testing.T) {
	f := newFactory(t)
	grant := sign(t, f.order, f.owner)
	f.must(t, f.holder, grant, f.group())
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			if _, err := f.bundle(t, f.service, f.holder, grant, false, units(1+5*i, 7+5*i)...); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if got := f.tally(t, "PO-1"); got.Used != 10 || got.Imported != 10 || got.Refused < 20 {
		t.Errorf("%+v", got)
	}
}
