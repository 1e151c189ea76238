package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/hub"
	"github.com/touchmark/touchmark/pkg/hub/hubtest"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/sqlstore"
)

// Issue 6: the service is killed again and again while devices register, operators make enrollments and import bundles, hubs come, go and
// change their weights, and hubs fail now and then. At rest every device that was told its assignment is at the one hub that its record
// names, with its whole twin; no device is at two hubs, but for those that are listed as orphans because a hub was unlinked; and nothing
// is left to tell. What an operator was told is made or imported is there whole, and an import that was cut off is so when it was
// repeated.
//
// TOUCHMARK_TEST_KILLS is how often it is killed: 100 for a release.
func TestHubKill(t *testing.T) {
	t.Parallel()
	kills, _ := strconv.Atoi(os.Getenv("TOUCHMARK_TEST_KILLS"))
	if kills == 0 {
		kills = 5
	}
	d := newKillDrill(t)
	for range kills {
		next := []*killBundle{d.line.mixed(t), d.line.long(t)}
		if rand.IntN(4) == 0 {
			slices.Reverse(next)
		}
		d.operator.waiting = append(d.operator.waiting, next...)
		d.live(t)
		d.editHubs(t)
	}
	for _, s := range d.stubs {
		s.Fail(nil)
	}
	d.lastStart(t)
	d.rest(t)
	moved, told := 0, 0
	for _, n := range d.told {
		moved, told = moved+n.moved, told+n.times
	}
	o := &d.operator
	t.Logf("%d kills; %d assignments told to %d devices, %d of them to another hub than before, %d devices of bundles; %d enrollments made, %d of them by bulk; "+
		"%d bundles imported, %d units; of %d imports that were cut off %d were in by halves and %d whole; %d orphans of unlinked hubs",
		kills, told, len(d.told), moved, len(d.line.fleet), len(o.made), o.byBulk, len(o.imported), d.units(), o.cut, o.halves, o.unheard, d.orphans)
	if told == 0 || moved == 0 || len(o.made) == o.byBulk || o.byBulk == 0 || len(d.line.fleet) == 0 || kills >= 100 && o.halves == 0 {
		t.Error("of some of that there was none")
	}
}

const (
	killScope   = "0ne0A1B2C3D"
	killDevices = 60 // that come in by the group that is there from the beginning
	killCallers = 8
)

// A killDrill is a service with three hubs, and all who call it.
type killDrill struct {
	dir      string
	flags    []string
	dataKey  []byte
	names    []string // of the hubs
	stubs    map[string]*hubtest.Stub
	devices  []*killDevice
	line     *killLine
	operator killOperator
	orphans  int

	mu   sync.Mutex
	told map[string]*toldDevice // under mu; by device
}

func newKillDrill(t *testing.T) *killDrill {
	d := &killDrill{dir: t.TempDir(), names: []string{"hub-a.example.net", "hub-b.example.net", "hub-c.example.net"},
		stubs: map[string]*hubtest.Stub{}, told: map[string]*toldDevice{}}
	for _, name := range d.names {
		d.stubs[name] = hubtest.StartStub(t)
	}
	d.line = newKillLine(t, d.dir)
	d.flags = []string{"--https", "127.0.0.1:0", "--mqtt", "off", "--amqp", "off", "--no-limits", "--quiet", "--id-scope", killScope, "--owner", "owner.pem"}
	first, _, _ := startServe(t, d.dir, d.flags...)
	if err := first.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = first.Wait()
	d.dataKey = d.read(t, dataKeyFile)
	d.line.sealTo(t, d.read(t, recipientFile))
	d.link(t, func(int, *registration.LinkedHub) bool { return true })

	groupKey := bytes.Repeat([]byte("g"), 64)
	for i := range killDevices {
		id := "dev-" + strconv.Itoa(i)
		d.devices = append(d.devices, &killDevice{id: id, key: attest.DeriveKey(groupKey, id)})
	}
	d.inStore(t, func(store *sqlstore.Store) error {
		key := base64.StdEncoding.EncodeToString(groupKey)
		group, err := json.Marshal(dps.EnrollmentGroup{EnrollmentGroupID: "line", Enrollment: comesAgain(dps.Attestation{Type: dps.AttestationSymmetricKey,
			SymmetricKey: &dps.SymmetricKeyAttestation{PrimaryKey: key, SecondaryKey: key}})})
		if err == nil {
			_, err = registration.New(registration.Config{Store: store, Scope: killScope}).PutEnrollment(t.Context(), registration.Actor{}, registration.Group, "line", group, "")
		}
		return err
	})
	for _, s := range d.stubs {
		s.Fail(func(*http.Request) hubtest.Fault {
			switch rand.IntN(20) {
			case 0:
				return hubtest.Fault{Status: 503}
			case 1:
				return hubtest.Fault{Status: 503, After: true}
			}
			return hubtest.Fault{}
		})
	}
	return d
}

// comesAgain is an enrollment whose devices go to another hub, with their twins, whenever that is chosen for them.
func comesAgain(a dps.Attestation) dps.Enrollment {
	return dps.Enrollment{Attestation: &a, ProvisioningStatus: dps.EnrollmentEnabled,
		InitialTwin:       &dps.InitialTwin{Tags: json.RawMessage(`{"site":"A7"}`)},
		ReprovisionPolicy: &dps.ReprovisionPolicy{UpdateHubAssignment: true, MigrateDeviceData: true}}
}

func (d *killDrill) read(t *testing.T, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(d.dir, "svc", name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// inStore has the store of the service while it is down.
func (d *killDrill) inStore(t *testing.T, f func(*sqlstore.Store) error) {
	t.Helper()
	store, err := sqlstore.Open(t.Context(), sqlstore.Config{Path: filepath.Join(d.dir, "svc", storeFile), DataKey: d.dataKey})
	if err == nil {
		err = f(store)
		if cerr := store.Close(); err == nil {
			err = cerr
		}
	}
	if err != nil {
		t.Fatal(err)
	}
}

func (d *killDrill) link(t *testing.T, edit func(i int, h *registration.LinkedHub) bool) {
	t.Helper()
	d.inStore(t, func(store *sqlstore.Store) error {
		_, _, err := registration.EditScope(t.Context(), store, killScope, registration.Actor{Name: "test"}, "link", time.Now(), func(sc *registration.Scope) (*registration.Scope, error) {
			sc.Hubs = nil
			for i, name := range d.names {
				if h := d.stubs[name].Linked(name); edit(i, &h) {
					sc.Hubs = append(sc.Hubs, h)
				}
			}
			return sc, nil
		})
		return err
	})
}

// editHubs gives hubs other weights, and unlinks one now and then.
func (d *killDrill) editHubs(t *testing.T) {
	t.Helper()
	gone := 1 + rand.IntN(6) // the first one is named at each start
	d.link(t, func(i int, h *registration.LinkedHub) bool {
		h.Weight, h.Reserved = 1+rand.IntN(1000), rand.IntN(4) == 0
		return i != gone
	})
}

// live starts the service, has all call it, and kills it while an import is under way, or with the answer to it. Calls are not cut off with
// it: what it answered last counts as well. Once ctx has ended they may fail.
func (d *killDrill) live(t *testing.T) {
	t.Helper()
	cmd, ready, _ := startServe(t, d.dir, d.flags...)
	ctx, dying := context.WithCancel(t.Context())
	defer dying()
	svc, err := (&app{}).openService(filepath.Join(d.dir, "svc", connectionFile), "")
	if err != nil {
		t.Fatal(err)
	}
	kill := func() {
		dying()
		_ = cmd.Process.Kill()
	}
	var load sync.WaitGroup
	fleet := d.line.fleet // what is imported now comes in after the next start
	for range killCallers {
		load.Go(func() { d.register(ctx, t, ready["https"].(string), fleet) })
	}
	o := &d.operator
	load.Go(func() { o.makeEnrollments(ctx, t, svc) })
	load.Go(func() {
		before, done := context.WithTimeout(ctx, time.Duration(200+rand.IntN(700))*time.Millisecond)
		defer done()
		o.importUntil(before, t, d)
		timer := time.AfterFunc(time.Duration((0.3+1.2*rand.Float64())*float64(o.took)), kill)
		o.importNext(ctx, t, d)
		timer.Stop()
		kill()
	})
	load.Wait()
	_ = cmd.Wait()
}

// units is how many came in with bundles.
func (d *killDrill) units() (n int64) {
	for _, b := range d.operator.imported {
		n += b.units
	}
	return n
}

// lastStart has the operator repeat what was cut off, and then all imports: they find everything there.
func (d *killDrill) lastStart(t *testing.T) {
	t.Helper()
	cmd, _, _ := startServe(t, d.dir, d.flags...)
	o := &d.operator
	for len(o.waiting) > 0 {
		if !o.importNext(t.Context(), t, d) {
			break
		}
	}
	for _, b := range o.imported {
		if res, err := d.importBundle(t, b, "--dry-run"); err != nil || res.Unchanged != b.entries {
			t.Errorf("%s was imported, and would be again: %+v, %v", b.name, res, err)
		}
	}
	stopServe(t, cmd)
}

// rest lets the outbox run dry, and looks at what there is then.
func (d *killDrill) rest(t *testing.T) {
	t.Helper()
	pool := hub.NewPool(hub.PoolConfig{})
	defer pool.Close()
	d.inStore(t, func(store *sqlstore.Store) error {
		later := time.Now()
		scopes := registration.NewScopes(registration.ScopesConfig{Config: registration.Config{Store: store, OpenHub: pool.Hub, GiveUp: time.Hour, Now: func() time.Time { return later }}})
		for range 5 { // leases end, and pauses
			later = later.Add(time.Minute)
			if _, err := scopes.ProvisionDue(t.Context()); err != nil {
				return err
			}
		}
		s, err := scopes.Service(t.Context(), killScope)
		if err != nil {
			return err
		}
		if left, _, err := s.Tasks(t.Context(), "", 10); err != nil || len(left) > 0 {
			t.Errorf("left to tell: %+v, %v", left, err)
		}
		orphans, err := s.Orphans(t.Context(), registration.Orphan{}, 10000)
		if err != nil {
			return err
		}
		d.orphans = len(orphans)
		known := map[string][]string{}
		for name, stub := range d.stubs {
			for _, id := range stub.Devices() {
				if !slices.ContainsFunc(orphans, func(o *registration.Orphan) bool { return o.Hub == name && o.DeviceID == id }) {
					known[id] = append(known[id], name)
				}
			}
		}
		order, err := s.Order(t.Context(), killOrder)
		if err != nil {
			return err
		}
		return store.View(t.Context(), func(tx registration.Tx) error {
			scope, seen := dps.Fold(killScope), int64(0)
			for _, device := range slices.Concat(d.devices, d.line.fleet) {
				if err := d.atRest(t, tx, pool, device, known[device.id]); err != nil {
					return err
				}
			}
			for _, device := range d.line.fleet {
				known, err := tx.Device(scope, device.id)
				if err != nil || !known.Seen && d.told[device.id] != nil {
					t.Errorf("%s was imported, and told %+v: %+v, %v", device.id, d.told[device.id], known, err)
				} else if known.Seen {
					seen++
				}
			}
			for _, id := range d.operator.made {
				if _, err := tx.Record(scope, registration.Individual, id); err != nil {
					t.Errorf("%s was made: %v", id, err)
				}
			}
			for _, b := range d.operator.imported {
				for fingerprint, id := range b.certificates {
					if _, owner, err := tx.CertificateOwner(scope, fingerprint); err != nil || owner != id {
						t.Errorf("a certificate of %s in %s is %q's: %v", id, b.name, owner, err)
					}
				}
			}
			units := d.units()
			// Each unit counts once, however often its bundle came.
			if want := (registration.Tally{Used: units, Imported: units, Seen: seen}); order.Tally != want {
				t.Errorf("the order counts %+v, want %+v", order.Tally, want)
			}
			return nil
		})
	})
}

// atRest checks what became of a device, which is at those hubs.
func (d *killDrill) atRest(t *testing.T, tx registration.Tx, pool *hub.Pool, device *killDevice, at []string) error {
	t.Helper()
	id, told := device.id, d.told[device.id]
	r, _ := tx.Registration(dps.Fold(killScope), id)
	switch {
	case r == nil || r.Hub == "":
		if told != nil || len(at) > 0 {
			t.Errorf("%s was told %+v, has no record, and is at %v", id, told, at)
		}
		return nil
	case !slices.Equal(at, []string{r.Hub}):
		t.Errorf("%s is at %v, its record says %s", id, at, r.Hub)
		return nil
	case told != nil && r.State.Status != dps.Assigned && r.State.Status != dps.Failed:
		t.Errorf("%s is %s for ever", id, r.State.Status)
	}
	h, err := pool.Hub(killScope, d.stubs[r.Hub].Linked(r.Hub))
	if err != nil {
		return err
	}
	if twin, err := h.Twin(t.Context(), id); err != nil || !bytes.Contains(twin.Tags, []byte(`"A7"`)) {
		t.Errorf("%s at %s: twin %+v, %v", id, r.Hub, twin, err)
	}
	return nil
}
