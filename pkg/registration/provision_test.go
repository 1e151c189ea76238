package registration_test

import (
	"bytes"
	"context"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
	"github.com/touchmark/touchmark/pkg/sqlstore"
	"github.com/touchmark/touchmark/pkg/sqlstore/sqlstoretest"
)

// A fault is what happens to one step, a call to a hub or a transaction.
type fault int

const (
	none    fault = iota
	fails         // without effect
	lost          // with effect, and no answer
	dies          // the process is killed before
	diesNow       // the process is killed when it has taken effect
	full          // refused for good
)

// A plant is the hubs of a test, whose state survives every kill, and the steps that a service makes.
type plant struct {
	mu    sync.Mutex
	hubs  map[string]map[string]*known
	steps []string
	fault func(step int, name string) fault
	lies  bool // Admit says that the device was there
}

type known struct {
	registration.HubDevice
	tags, desired map[string]any
}

// step decides what happens to a step, and does it. It does not return when the process dies.
func (p *plant) step(name string, do func() error) error {
	p.mu.Lock()
	p.steps = append(p.steps, name)
	n, f := len(p.steps)-1, none
	if p.fault != nil {
		f = p.fault(n, name)
	}
	p.mu.Unlock()
	temporary := &registration.HubError{Hub: name, Status: 503, Code: "Busy", Temporary: true, Err: errors.New("busy")}
	switch f {
	case fails:
		return temporary
	case full:
		return &registration.HubError{Hub: name, Status: 403, Code: "IotHubQuotaExceeded", Err: errors.New("quota")}
	case dies:
		runtime.Goexit()
	}
	err := do()
	if err == nil && f == lost {
		return temporary
	}
	if f == diesNow {
		runtime.Goexit()
	}
	return err
}

type testHub struct {
	p    *plant
	name string
}

func (p *plant) open(_ string, h registration.LinkedHub) (registration.Hub, error) {
	return testHub{p, h.Name}, nil
}

func (h testHub) with(id string, f func(all map[string]*known, d *known) error) error {
	h.p.mu.Lock()
	defer h.p.mu.Unlock()
	all := h.p.hubs[h.name]
	if all == nil {
		all = map[string]*known{}
		h.p.hubs[h.name] = all
	}
	return f(all, all[id])
}

func (h testHub) Check(context.Context) error { return nil }

func (h testHub) Device(_ context.Context, id string) (d *registration.HubDevice, err error) {
	err = h.p.step("device "+h.name, func() error {
		return h.with(id, func(_ map[string]*known, k *known) error {
			if k == nil {
				return &registration.HubError{Hub: h.name, Status: 404, Err: registration.ErrNotFound}
			}
			c := k.HubDevice
			d = &c
			return nil
		})
	})
	if err != nil {
		d = nil
	}
	return d, err
}

func (h testHub) Admit(_ context.Context, d *registration.HubDevice) (created bool, err error) {
	err = h.p.step("admit "+h.name, func() error {
		return h.with(d.ID, func(all map[string]*known, k *known) error {
			c := *d
			if created = k == nil; created {
				k = &known{tags: map[string]any{}, desired: map[string]any{}}
				all[d.ID] = k
			} else {
				c.Disabled = k.Disabled
			}
			if c.IoTEdge {
				c.Scope = "edge://" + h.name + "/" + d.ID
			}
			k.HubDevice = c
			return nil
		})
	})
	return created && !h.p.lies, err
}

func (h testHub) Remove(_ context.Context, id string) error {
	return h.p.step("remove "+h.name, func() error {
		return h.with(id, func(all map[string]*known, _ *known) error { delete(all, id); return nil })
	})
}

func (h testHub) Twin(_ context.Context, id string) (t *registration.HubTwin, err error) {
	err = h.p.step("twin "+h.name, func() error {
		return h.with(id, func(_ map[string]*known, k *known) error {
			if k == nil {
				return &registration.HubError{Hub: h.name, Status: 404, Err: registration.ErrNotFound}
			}
			t = &registration.HubTwin{}
			t.Tags, _ = json.Marshal(k.tags)
			t.Desired, _ = json.Marshal(k.desired)
			return nil
		})
	})
	return t, err
}

func (h testHub) MergeTwin(_ context.Context, id string, t *registration.HubTwin) error {
	return h.p.step("merge "+h.name, func() error {
		return h.with(id, func(_ map[string]*known, k *known) error {
			if k == nil {
				return &registration.HubError{Hub: h.name, Status: 404, Err: registration.ErrNotFound}
			}
			for raw, into := range map[*json.RawMessage]map[string]any{&t.Tags: k.tags, &t.Desired: k.desired} {
				if *raw != nil {
					if err := json.Unmarshal(*raw, &into); err != nil {
						return err
					}
				}
			}
			return nil
		})
	})
}

// at returns the hubs that have a device of that ID.
func (p *plant) at(id string) (hubs []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, name := range slices.Sorted(maps.Keys(p.hubs)) {
		if p.hubs[name][id] != nil {
			hubs = append(hubs, name)
		}
	}
	return hubs
}

func (p *plant) device(hub, id string) *known {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.hubs[hub][id]
}

// A stepped store has each transaction be a step.
type stepped struct {
	registration.Store
	p *plant
}

func (s stepped) Update(ctx context.Context, f func(registration.Tx) error) error {
	return s.p.step("store", func() error { return s.Store.Update(ctx, f) })
}

// A site is a fixture whose scope is in the store, with the plant's hubs.
type site struct {
	*registrationtest.Fixture
	p *plant
	t *testing.T

	replica func() registration.Store // of a process; nil: the fixture's own
}

func newSite(t *testing.T, kind registration.HubKind, hubs ...string) *site {
	store, err := sqlstore.Open(t.Context(), sqlstore.Config{DataKey: make([]byte, 32)}) // in memory: there are hundreds of sites
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = store.Close() })
	s := &site{Fixture: registrationtest.NewFixtureOn(t, store), p: &plant{hubs: map[string]map[string]*known{}}, t: t}
	s.link(kind, hubs...)
	return s
}

// link has these hubs linked, and no others.
func (s *site) link(kind registration.HubKind, hubs ...string) {
	s.edit(func(sc *registration.Scope) {
		sc.Hubs = nil
		for _, h := range hubs {
			sc.Hubs = append(sc.Hubs, registration.LinkedHub{Name: h, Kind: kind})
		}
	})
}

func (s *site) edit(f func(*registration.Scope)) {
	s.t.Helper()
	_, _, err := registration.EditScope(s.t.Context(), s.Store, registrationtest.Scope, registration.Actor{Name: "test"}, "put", s.Now(), func(sc *registration.Scope) (*registration.Scope, error) {
		if sc == nil {
			sc = &registration.Scope{ID: registrationtest.Scope, Name: "plant"}
		}
		f(sc)
		return sc, nil
	})
	if err != nil {
		s.t.Fatal(err)
	}
}

// start is a process on the site's store; with faults its transactions are steps, too.
func (s *site) start(edit ...func(*registration.Config)) *registration.Scopes {
	store := s.Store
	if s.replica != nil {
		store = s.replica()
	}
	cfg := registration.Config{Store: stepped{store, s.p}, OpenHub: s.p.open, Now: s.Now}
	for _, f := range edit {
		f(&cfg)
	}
	return registration.NewScopes(registration.ScopesConfig{Config: cfg})
}

// own has the device own-key be where an enrollment says.
func (s *site) own(edit func(*dps.IndividualEnrollment)) {
	s.t.Helper()
	e := dps.IndividualEnrollment{RegistrationID: "own-key", Enrollment: registrationtest.Symmetric(s.OwnKey, s.OtherKey)}
	e.InitialTwin = &dps.InitialTwin{Tags: json.RawMessage(`{"site":"A7"}`), Properties: &dps.TwinProperties{Desired: json.RawMessage(`{"interval":30}`)}}
	edit(&e)
	s.PutDocument(s.t, registration.Individual, "own-key", e)
}

func static(hub string) func(*dps.IndividualEnrollment) {
	return func(e *dps.IndividualEnrollment) {
		e.AllocationPolicy, e.IoTHubs = dps.AllocationStatic, []string{hub}
	}
}

// try has the device register, and reports whether the process lived.
func (s *site) try(scopes *registration.Scopes, d registrationtest.Device) (lived bool, st *dps.RegistrationState, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		var op *dps.OperationStatus
		if op, err = scopes.Register(s.t.Context(), request(d)); err == nil {
			if op, err = scopes.Status(s.t.Context(), request(d), op.OperationID); err == nil {
				st = op.RegistrationState
			}
		}
		lived = true
	}()
	<-done
	return lived, st, err
}

// heal is a fresh process without faults, after the leases of the one that was killed: it comes to rest.
func (s *site) heal() *registration.Scopes {
	s.t.Helper()
	s.p.fault = nil
	scopes := s.start()
	for range 12 {
		s.Advance(time.Minute / 2)
		if _, err := scopes.ProvisionDue(s.t.Context()); err != nil {
			s.t.Fatal(err)
		}
	}
	svc, err := scopes.Service(s.t.Context(), registrationtest.Scope)
	if err != nil {
		s.t.Fatal(err)
	}
	if tasks, _, err := svc.Tasks(s.t.Context(), "", 10); err != nil || len(tasks) > 0 {
		s.t.Errorf("the outbox is not empty: %+v, %v", tasks, err)
	}
	return scopes
}

func (s *site) assign(scopes *registration.Scopes, d registrationtest.Device) *dps.RegistrationState {
	s.t.Helper()
	_, st, err := s.try(scopes, d)
	if err != nil || st.Status != dps.Assigned {
		s.t.Fatalf("%s: %+v, %v", d.ID, st, err)
	}
	return st
}

func (s *site) device() registrationtest.Device { return s.ByKey("own-key", s.OwnKey) }

func (s *site) record(id string) (r *registration.Registration) {
	s.t.Helper()
	err := s.Store.View(s.t.Context(), func(tx registration.Tx) (err error) {
		r, err = tx.Registration(strings.ToLower(registrationtest.Scope), id)
		return err
	})
	if err != nil && !errors.Is(err, registration.ErrNotFound) {
		s.t.Fatal(err)
	}
	return r
}

// whole says what is wrong with a device at rest: it is at one hub at most, which is the one that its record names.
func (s *site) whole(id string) error {
	r := s.record(strings.ToLower(id))
	var want []string
	if r != nil && r.Hub != "" {
		want = []string{r.Hub}
	}
	if got := s.p.at(id); !slices.Equal(got, want) {
		return fmt.Errorf("the device is at %v, its record says %v", got, want)
	}
	if r == nil {
		return nil
	}
	for _, op := range r.Operations {
		if !op.State.Status.Terminal() {
			return fmt.Errorf("an operation is %s for ever", op.State.Status)
		}
	}
	if r.State.Status == dps.Assigned && r.State.AssignedHub != r.Hub {
		return fmt.Errorf("assigned to %s, and at %s", r.State.AssignedHub, r.Hub)
	}
	return nil
}

// Every step of every way to a hub, broken before and after it took effect, and the process killed there: a fresh process brings
// the device to exactly one hub, which the record names, with its whole twin; and when it comes again it is where it belongs.
// DPS-S 87, 94.
func TestFaults(t *testing.T) {
	type scenario struct {
		before, change func(*site)
		hub            string // where the device ends, and its tags
		tags           string
		id             string
	}
	settle := func(s *site) {
		s.own(static("a.example"))
		s.assign(s.start(), s.device())
		s.p.device("a.example", "own-key").tags["grown"] = "old" // by its operator
		s.p.device("a.example", "own-key").Disabled = true
	}
	policy := func(migrate bool) func(*site) {
		return func(s *site) {
			s.own(func(e *dps.IndividualEnrollment) {
				static("b.example")(e)
				e.ReprovisionPolicy = &dps.ReprovisionPolicy{UpdateHubAssignment: true, MigrateDeviceData: migrate}
			})
		}
	}
	for name, sc := range map[string]scenario{
		"first":   {nil, func(s *site) { s.own(static("a.example")) }, "a.example", "map[site:A7]", "own-key"},
		"migrate": {settle, policy(true), "b.example", "map[grown:old site:A7]", "own-key"},
		"reset":   {settle, policy(false), "b.example", "map[site:A7]", "own-key"},
		"renamed": {settle, func(s *site) {
			s.own(func(e *dps.IndividualEnrollment) { static("a.example")(e); e.DeviceID = "Pump" })
		}, "a.example", "map[site:A7]", "Pump"},
		"gone at the hub": {func(s *site) {
			settle(s)
			delete(s.p.hubs["a.example"], "own-key")
		}, func(s *site) { s.own(static("a.example")) }, "a.example", "map[site:A7]", "own-key"},
		"in two minds": {func(s *site) {
			settle(s)
			policy(true)(s)
			s.p.fault = func(_ int, step string) fault { // where it is to go first fails when half is done
				if step == "merge b.example" {
					return fails
				}
				return none
			}
			s.try(s.start(), s.device())
			if at := s.p.at("own-key"); len(at) != 2 {
				s.t.Fatalf("it is at %v", at)
			}
		}, func(s *site) { s.own(static("c.example")) }, "c.example", "map[grown:old site:A7]", "own-key"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			run := func(f func(int, string) fault, lies bool) (s *site, lived bool) {
				s = newSite(t, registration.HubAzure, "a.example", "b.example", "c.example")
				s.p.lies = lies
				if sc.before != nil {
					sc.before(s)
				}
				sc.change(s)
				s.p.steps, s.p.fault = nil, f
				lived, _, _ = s.try(s.start(), s.device())
				return s, lived
			}
			check := func(what string, s *site) {
				t.Helper()
				scopes := s.heal()
				ids := []string{"own-key"}
				if sc.id != "own-key" {
					ids = []string{s.record("own-key").DeviceID}
					if n := len(s.p.at("own-key")) + len(s.p.at(sc.id)); n != 1 {
						t.Errorf("%s: at %d places", what, n)
					}
				}
				if err := s.whole(ids[0]); err != nil && sc.id == "own-key" && name != "gone at the hub" {
					t.Errorf("%s: %v", what, err)
				}
				st := s.assign(scopes, s.device())
				if at := s.p.at(sc.id); st.AssignedHub != sc.hub || !slices.Equal(at, []string{sc.hub}) || st.DeviceID != sc.id {
					t.Fatalf("%s: the device is told %s, and is at %v", what, st.AssignedHub, at)
				}
				if sc.id != "own-key" && len(s.p.at("own-key")) > 0 {
					t.Errorf("%s: under its former name it is still there", what)
				}
				d := s.p.device(sc.hub, sc.id)
				if tags := fmt.Sprint(d.tags); tags != sc.tags || d.desired["interval"] != 30.0 {
					t.Errorf("%s: its tags are %s, its desired properties %v", what, tags, d.desired)
				}
				if sc.before != nil && name != "gone at the hub" && sc.id == "own-key" && !d.Disabled {
					t.Errorf("%s: it is enabled again", what)
				}
				if want := base64.StdEncoding.EncodeToString(s.OwnKey); d.Keys.PrimaryKey != want || d.Keys.SecondaryKey != base64.StdEncoding.EncodeToString(s.OtherKey) {
					t.Errorf("%s: it has other keys", what)
				}
				if orphans, err := must(scopes.Service(t.Context(), registrationtest.Scope)).Orphans(t.Context(), registration.Orphan{}, 10); err != nil || len(orphans) > 0 {
					t.Errorf("%s: orphans %v, %v", what, orphans, err)
				}
			}
			s, _ := run(nil, false)
			steps := s.p.steps
			if s.p.at(sc.id)[0] != sc.hub {
				t.Fatalf("without faults it is at %v after %q", s.p.at(sc.id), steps)
			}
			check("without faults", s)
			s, _ = run(nil, true)
			check("a hub that lies", s)
			for i := range steps {
				for f, what := range map[fault]string{fails: "fails", lost: "answer lost", dies: "killed before", diesNow: "killed after"} {
					if steps[i] == "store" && (f == fails || f == lost) {
						continue // a store keeps its word
					}
					s, lived := run(func(n int, _ string) fault {
						if n == i {
							return f
						}
						return none
					}, false)
					if lived != (f == fails || f == lost) {
						t.Fatalf("step %d was not reached", i)
					}
					check(fmt.Sprintf("step %d of %q %s", i, steps, what), s)
				}
			}
		})
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func (s *site) service(scopes *registration.Scopes) *registration.Service {
	return must(scopes.Service(s.t.Context(), registrationtest.Scope))
}

// A hub that refuses for good fails the registration with what it said; the device stays where it was, and what was made for it
// elsewhere goes away. A hub that is busy for too long does the same.
func TestGiveUp(t *testing.T) {
	for name, f := range map[string]fault{"full": full, "busy": fails} {
		for _, at := range []string{"admit b.example", "merge b.example"} {
			t.Run(name+" at "+at, func(t *testing.T) {
				s := newSite(t, registration.HubAzure, "a.example", "b.example")
				s.own(static("a.example"))
				s.assign(s.start(), s.device())
				s.own(static("b.example"))
				s.p.fault = func(_ int, step string) fault {
					if step == at {
						return f
					}
					return none
				}
				scopes := s.start()
				_, st, err := s.try(scopes, s.device())
				if f == fails {
					if err != nil || st.Status != dps.Assigning || st.AssignedHub != "" {
						t.Fatalf("while the hub is busy: %+v, %v", st, err)
					}
					if page, _, err := s.service(scopes).Tasks(t.Context(), "", 10); err != nil || len(page) != 1 || page[0].State != "assigning" || page[0].Hub != "b.example" || !strings.Contains(page[0].LastError, "busy") {
						t.Errorf("%+v, %v", page, err)
					}
					for range 10 {
						s.Advance(30 * time.Second)
						if _, err := scopes.ProvisionDue(t.Context()); err != nil {
							t.Fatal(err)
						}
					}
					st = must(s.service(scopes).GetRegistration(t.Context(), "own-key"))
				}
				if st.Status != dps.Failed || st.ErrorCode != int(dps.CodeHubRefused) || !strings.HasPrefix(st.ErrorMessage, "IoT hub b.example: ") {
					t.Errorf("%+v, %v", st, err)
				}
				s.heal()
				if err := s.whole("own-key"); err != nil || s.p.at("own-key")[0] != "a.example" {
					t.Errorf("%v: %v", s.p.at("own-key"), err)
				}
				if st := s.assign(s.start(), s.device()); st.AssignedHub != "b.example" || st.Substatus != dps.DeviceDataMigrated {
					t.Errorf("when the hub takes devices again: %+v", st)
				}
			})
		}
	}
}

// A hub that would not be told of a new key still has the device, which is taken from it when it goes elsewhere.
func TestRefusedInPlace(t *testing.T) {
	for name, change := range map[string]func(*dps.IndividualEnrollment){
		"refused":    func(e *dps.IndividualEnrollment) { static("a.example")(e) },
		"overtaken":  func(e *dps.IndividualEnrollment) { static("a.example")(e) },
		"taken away": func(e *dps.IndividualEnrollment) { static("c.example")(e) },
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t, registration.HubAzure, "a.example", "b.example", "c.example")
			s.own(static("a.example"))
			s.assign(s.start(), s.device())
			s.p.fault = func(_ int, step string) fault {
				switch {
				case name == "refused" && step == "admit a.example":
					return full
				case step == "admit a.example" || step == "admit c.example":
					return fails
				}
				return none
			}
			s.own(change)
			s.try(s.start(), s.device())
			if name == "overtaken" {
				s.own(func(e *dps.IndividualEnrollment) { change(e); e.ProvisioningStatus = dps.EnrollmentDisabled })
				s.try(s.start(), s.device())
			}
			s.own(static("b.example"))
			s.assign(s.start(), s.device())
			s.heal()
			if err := s.whole("own-key"); err != nil {
				t.Error(err)
			}
		})
	}
}

// A former hub that does not answer keeps no device waiting for long: it is asked for days to forget the device, in everybody's
// sight, and then the device is an orphan there. One that is unlinked keeps it at once.
func TestFormerHub(t *testing.T) {
	moved := func(t *testing.T) (*site, *registration.Scopes) {
		s := newSite(t, registration.HubAzure, "a.example", "b.example")
		s.own(static("a.example"))
		s.assign(s.start(), s.device())
		s.own(static("b.example"))
		return s, s.start()
	}
	due := func(s *site, scopes *registration.Scopes, times int, step time.Duration) {
		for range times {
			s.Advance(step)
			if _, err := scopes.ProvisionDue(s.t.Context()); err != nil {
				s.t.Fatal(err)
			}
		}
	}
	for _, back := range []bool{true, false} {
		t.Run(fmt.Sprintf("back %t", back), func(t *testing.T) {
			s, scopes := moved(t)
			s.p.fault = func(_ int, step string) fault {
				if step == "remove a.example" {
					return fails
				}
				return none
			}
			if _, st, err := s.try(scopes, s.device()); err != nil || st.Status != dps.Assigning {
				t.Fatalf("%+v, %v", st, err)
			}
			due(s, scopes, 3, 31*time.Second)
			if st := must(s.service(scopes).GetRegistration(t.Context(), "own-key")); st.Status != dps.Assigned || st.AssignedHub != "b.example" || st.Substatus != dps.DeviceDataMigrated {
				t.Fatalf("%+v", st)
			}
			page, _, err := s.service(scopes).Tasks(t.Context(), "", 10)
			if err != nil || len(page) != 1 || page[0].State != "cleanup" || page[0].Away[0].Hub != "a.example" {
				t.Fatalf("%+v, %v", page, err)
			}
			if st := s.assign(scopes, s.device()); st.Substatus != dps.ReprovisionedToInitialAssignment {
				t.Errorf("it comes again meanwhile: %+v", st)
			}
			if back {
				s.heal()
				if err := s.whole("own-key"); err != nil {
					t.Error(err)
				}
				return
			}
			due(s, scopes, 24*8, time.Hour)
			orphans := must(s.service(scopes).Orphans(t.Context(), registration.Orphan{}, 10))
			if len(orphans) != 1 || orphans[0].Hub != "a.example" || orphans[0].DeviceID != "own-key" || !strings.Contains(orphans[0].Reason, "busy") {
				t.Fatalf("%+v", orphans)
			}
			if err := s.service(scopes).ForgetOrphan(t.Context(), orphans[0], registration.Actor{Name: "test"}); err != nil {
				t.Error(err)
			}
			s.heal()
		})
	}
	t.Run("unlinked", func(t *testing.T) {
		s, scopes := moved(t)
		s.link(registration.HubAzure, "b.example")
		if st := s.assign(scopes, s.device()); st.AssignedHub != "b.example" {
			t.Errorf("%+v", st)
		}
		orphans := must(s.service(scopes).Orphans(t.Context(), registration.Orphan{}, 10))
		if len(orphans) != 1 || orphans[0].Hub != "a.example" {
			t.Fatalf("%+v", orphans)
		}
		// Its data could not be read: there they still are, and here it is a new device.
		if d := s.p.device("b.example", "own-key"); fmt.Sprint(d.tags) != "map[site:A7]" {
			t.Errorf("%v", d.tags)
		}
		s.link(registration.HubAzure, "a.example", "b.example")
		s.own(static("a.example"))
		if st := s.assign(scopes, s.device()); st.AssignedHub != "a.example" {
			t.Errorf("%+v", st)
		}
		if orphans := must(s.service(scopes).Orphans(t.Context(), registration.Orphan{}, 10)); len(orphans) > 0 {
			t.Errorf("it is an orphan where it was assigned: %+v", orphans)
		}
		s.heal()
		if err := s.whole("own-key"); err != nil {
			t.Error(err)
		}
	})
}

// A newer decision ends what an older one began: the enrollment is disabled, or its hub goes, or the record is deleted while a hub
// is busy. DPS-S 96.
func TestOvertaken(t *testing.T) {
	for name, change := range map[string]func(*site, *registration.Scopes){
		"disabled": func(s *site, _ *registration.Scopes) {
			s.own(func(e *dps.IndividualEnrollment) {
				static("b.example")(e)
				e.ProvisioningStatus = dps.EnrollmentDisabled
			})
		},
		"no hub": func(s *site, _ *registration.Scopes) { s.own(static("c.example")) },
		"back":   func(s *site, _ *registration.Scopes) { s.own(static("a.example")) },
		"record": func(s *site, _ *registration.Scopes) {
			s.own(static("a.example"))
			s.edit(func(sc *registration.Scope) { sc.Hubs[0].Kind = registration.HubRecord })
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t, registration.HubAzure, "a.example", "b.example")
			s.own(static("a.example"))
			scopes := s.start()
			s.assign(scopes, s.device())
			s.own(static("b.example"))
			s.p.fault = func(_ int, step string) fault {
				if step == "merge b.example" {
					return fails
				}
				return none
			}
			op := must(scopes.Register(t.Context(), request(s.device())))
			if at := s.p.at("own-key"); len(at) != 2 {
				t.Fatalf("%v", at)
			}
			change(s, scopes)
			_, st, err := s.try(scopes, s.device())
			s.heal()
			if name == "record" { // which is told nothing: its device goes away there, too
				if at := s.p.at("own-key"); !slices.Equal(at, []string{"a.example"}) || err != nil || st.Status != dps.Assigned {
					t.Errorf("at %v: %+v, %v", at, st, err)
				}
				return
			}
			if err := s.whole("own-key"); err != nil || s.p.at("own-key")[0] != "a.example" {
				t.Errorf("at %v: %v; it was told %+v", s.p.at("own-key"), err, st)
			}
			if old, err := scopes.Status(t.Context(), request(s.device()), op.OperationID); err != nil || !old.Status.Terminal() {
				t.Errorf("the older operation: %+v, %v", old, err)
			}
		})
	}
	t.Run("deleted", func(t *testing.T) {
		s := newSite(t, registration.HubAzure, "a.example", "b.example")
		s.own(static("a.example"))
		scopes := s.start()
		s.assign(scopes, s.device())
		svc := s.service(scopes)
		if err := svc.DeleteRegistration(t.Context(), registration.Actor{}, "own-key", ""); err != nil {
			t.Fatal(err)
		}
		s.heal()
		if at := s.p.at("own-key"); !slices.Equal(at, []string{"a.example"}) {
			t.Errorf("after its record was deleted it is at %v", at)
		}
		s.p.fault = func(_ int, step string) fault {
			if step == "merge b.example" {
				return fails
			}
			return none
		}
		s.own(static("b.example"))
		s.try(scopes, s.device())
		if err := svc.DeleteRegistration(t.Context(), registration.Actor{}, "own-key", ""); err != nil {
			t.Fatal(err)
		}
		s.heal()
		if at := s.p.at("own-key"); !slices.Equal(at, []string{"a.example"}) {
			t.Errorf("after its record was deleted midway it is at %v", at)
		}
		s.assign(s.start(), s.Derived("dev-1"))
		if err := svc.DeleteEnrollment(t.Context(), registration.Actor{}, registration.Group, "keys", ""); err != nil {
			t.Fatal(err)
		}
		if st, err := svc.GetRegistration(t.Context(), "dev-1"); err != nil || !slices.Equal(s.p.at("dev-1"), []string{st.AssignedHub}) {
			t.Errorf("after its group was deleted: %+v, %v, at %v", st, err, s.p.at("dev-1"))
		}
	})
}

// What hubs are told of devices of every kind, and when: DPS-S 97 and 98.
func TestTold(t *testing.T) {
	s := newSite(t, registration.HubAzure, "a.example")
	scopes := s.start()
	keys := func(id string) string {
		d := s.p.device("a.example", id)
		if d == nil || d.Keys == nil || d.Thumbprints != nil {
			t.Fatalf("%s is known as %+v", id, d)
		}
		return d.Keys.PrimaryKey + " " + d.Keys.SecondaryKey
	}
	derived := func(key []byte, id string) string {
		return base64.StdEncoding.EncodeToString(attest.DeriveKey(key, id))
	}
	second := bytes.Repeat([]byte("s"), 32)
	s.assign(scopes, s.Derived("Dev-1"))
	if got, want := keys("Dev-1"), derived(s.GroupKey, "Dev-1")+" "+derived(second, "Dev-1"); got != want {
		t.Errorf("keys derived of a group: %s, want %s", got, want)
	}
	// A tool that folds the ID first.
	s.assign(scopes, s.ByKey("Dev-2", attest.DeriveKey(s.GroupKey, "dev-2")))
	if got, want := keys("Dev-2"), derived(s.GroupKey, "dev-2")+" "+derived(second, "dev-2"); got != want {
		t.Errorf("keys of a folded ID: %s, want %s", got, want)
	}
	// Certificates.
	leaf := attesttest.Leaf(t, s.Root, "press-7")
	req := &registration.Request{IDScope: registrationtest.Scope, RegistrationID: "press-7", APIVersion: "2019-03-31", Proof: attest.Proof{Certificates: []*x509.Certificate{leaf.Certificate}}}
	must(scopes.Register(t.Context(), req))
	thumb := func(c *x509.Certificate) string {
		sum := sha256.Sum256(c.Raw)
		return fmt.Sprintf("%X", sum)
	}
	if d := s.p.device("a.example", "press-7"); d.Keys != nil || !slices.Equal(d.Thumbprints, []string{thumb(leaf.Certificate)}) {
		t.Errorf("by certificate: %+v", d)
	}
	rolled := attesttest.Leaf(t, s.Root, "press-7")
	req.Proof.Certificates[0] = rolled.Certificate
	must(scopes.Register(t.Context(), req))
	if d := s.p.device("a.example", "press-7"); !slices.Equal(d.Thumbprints, []string{thumb(rolled.Certificate)}) {
		t.Errorf("with another certificate: %+v", d)
	}
	both := dps.X509Certificates{Primary: &dps.X509Certificate{Certificate: s.Own.Base64()}, Secondary: &dps.X509Certificate{Certificate: attesttest.Leaf(t, nil, "own-cert").Base64()}}
	s.Put(t, registration.Individual, "own-cert", dps.Enrollment{Attestation: &dps.Attestation{Type: dps.AttestationX509, X509: &dps.X509Attestation{ClientCertificates: &both}}})
	must(scopes.Register(t.Context(), &registration.Request{IDScope: registrationtest.Scope, RegistrationID: "own-cert", APIVersion: "2019-03-31", Proof: attest.Proof{Certificates: []*x509.Certificate{s.Own.Certificate}}}))
	if d := s.p.device("a.example", "own-cert"); len(d.Thumbprints) != 2 || d.Thumbprints[0] != thumb(s.Own.Certificate) || d.Thumbprints[1] == d.Thumbprints[0] {
		t.Errorf("by an enrolled certificate: %+v", d)
	}
	calls := func(what string, want bool, f func()) {
		t.Helper()
		s.p.steps = nil
		f()
		if got := slices.ContainsFunc(s.p.steps, func(x string) bool { return x != "store" }); got != want {
			t.Errorf("%s: hubs were called: %t (%v)", what, got, s.p.steps)
		}
	}
	s.Advance(time.Hour)
	calls("again an hour later", false, func() { s.assign(scopes, s.Derived("Dev-1")) })
	calls("again at once", true, func() { s.assign(scopes, s.Derived("Dev-1")) })
	s.p.device("a.example", "Dev-1").tags["kept"] = true
	s.Advance(time.Hour)
	next := bytes.Repeat([]byte("n"), 64)
	s.Put(t, registration.Group, "keys", registrationtest.Symmetric(next, s.GroupKey))
	calls("the group's key is rolled", true, func() { s.assign(scopes, s.Derived("Dev-1")) })
	if got, want := keys("Dev-1"), derived(next, "Dev-1")+" "+derived(s.GroupKey, "Dev-1"); got != want || s.p.device("a.example", "Dev-1").tags["kept"] != true {
		t.Errorf("after the key was rolled: %s, want %s", got, want)
	}
	s.Advance(time.Hour)
	g := registrationtest.Symmetric(next, s.GroupKey)
	g.Capabilities = &dps.Capabilities{IoTEdge: true}
	s.Put(t, registration.Group, "keys", g)
	calls("it becomes an edge device", true, func() { s.assign(scopes, s.Derived("Dev-1")) })
	if !s.p.device("a.example", "Dev-1").IoTEdge {
		t.Error("it is no edge device")
	}
	// It comes back by an individual enrollment: another key, the same device.
	s.Put(t, registration.Individual, "dev-2", registrationtest.Symmetric(s.OwnKey, s.OtherKey))
	s.p.device("a.example", "Dev-2").tags["kept"] = true
	if st := s.assign(scopes, s.ByKey("dev-2", s.OwnKey)); st.DeviceID != "Dev-2" || !strings.HasPrefix(keys("Dev-2"), base64.StdEncoding.EncodeToString(s.OwnKey)) || s.p.device("a.example", "Dev-2").tags["kept"] != true {
		t.Errorf("by another enrollment: %+v", st)
	}
	// Under the policy never it stays, with its new key.
	s.Advance(time.Hour)
	s.link(registration.HubAzure, "a.example", "b.example")
	s.own(static("a.example"))
	s.assign(scopes, s.device())
	s.own(func(e *dps.IndividualEnrollment) {
		static("b.example")(e)
		e.ReprovisionPolicy = &dps.ReprovisionPolicy{}
		e.Attestation.SymmetricKey.SecondaryKey = base64.StdEncoding.EncodeToString(next)
	})
	if st := s.assign(scopes, s.device()); st.AssignedHub != "a.example" || !strings.HasSuffix(keys("own-key"), " "+base64.StdEncoding.EncodeToString(next)) {
		t.Errorf("never: %+v", st)
	}
	for _, id := range []string{"Dev-1", "Dev-2", "press-7", "own-key"} {
		if err := s.whole(id); err != nil {
			t.Errorf("%s: %v", id, err)
		}
	}
}

// What hubs are told of devices whose keys the service makes: a TPM's, and the operational certificates of an issuer's.
func TestToldMade(t *testing.T) {
	s := newSite(t, registration.HubAzure, "a.example")
	a := s.NewAuthority(t, 100*24*time.Hour)
	scopes := s.start(func(c *registration.Config) { c.Issuers = map[string]registration.Issuer{"ops": s.Issuer(t, a)} })
	s.Service = s.service(scopes)
	d := newTPMDevice(t, s.Fixture, "tpm-1", nil)
	s.Put(t, registration.Individual, d.id, d.enrollment(""))
	for range 2 { // each time with a key of its own
		st := d.state(s.Service, d.request(d.prove(s.Service), false))
		if st.Status != dps.Assigned || st.TPM == nil {
			t.Fatalf("%+v", st)
		}
		if err := d.Activate(t.Context(), st.TPM.AuthenticationKey); err != nil {
			t.Fatal(err)
		}
		k := s.p.device("a.example", "tpm-1")
		key, err := base64.StdEncoding.DecodeString(k.Keys.PrimaryKey)
		if err != nil || !d.has(key) || k.Keys.SecondaryKey != k.Keys.PrimaryKey {
			t.Errorf("the hub has another key than the TPM: %v", err)
		}
	}
	for name, e := range map[string]dps.Enrollment{"keys": registrationtest.Symmetric(s.GroupKey, nil), "line": registrationtest.Signers(s.Root, nil)} {
		e.ClientCertificateIssuancePolicy = &dps.ClientCertificateIssuancePolicy{CertificateAuthorityName: "ops"}
		s.Put(t, registration.Group, name, e)
	}
	leaf := newLeaf(t, s.Root, "press-7")
	for _, proof := range []struct {
		id string
		attest.Proof
	}{{"dev-1", attest.Proof{Token: s.Derived("dev-1").Token}}, {"press-7", attest.Proof{Certificates: leaf}}} {
		req := &registration.Request{IDScope: registrationtest.Scope, RegistrationID: proof.id, APIVersion: "2025-07-01-preview", Proof: proof.Proof,
			Body: []byte(registrationtest.CSRBody(proof.id, registrationtest.CSR(t, registrationtest.ECKey(t, elliptic.P256()), proof.id)))}
		op := must(scopes.Register(t.Context(), req))
		st := must(scopes.Status(t.Context(), req, op.OperationID)).RegistrationState
		if st.Status != dps.Assigned || len(st.IssuedCertificateChain) == 0 {
			t.Fatalf("%s: %+v", proof.id, st)
		}
		want := []string{fmt.Sprintf("%X", sha256.Sum256(st.IssuedCertificateChain[0]))}
		if proof.Certificates != nil {
			want = append([]string{fmt.Sprintf("%X", sha256.Sum256(leaf[0].Raw))}, want...)
		}
		if k := s.p.device("a.example", proof.id); !slices.Equal(k.Thumbprints, want) || k.Keys != nil {
			t.Errorf("%s is known by %v, want %v", proof.id, k.Thumbprints, want)
		}
		if st := must(s.Service.GetRegistration(t.Context(), proof.id)); st.IssuedCertificateChain != nil {
			t.Error("the record shows a chain")
		}
	}
}

// A hub that never answers holds up a register call for some seconds, and its task is taken up again; other hubs' devices do not wait.
func TestHang(t *testing.T) {
	t.Parallel()
	s := newSite(t, registration.HubAzure, "a.example", "b.example")
	s.own(static("a.example"))
	hangs := make(chan struct{})
	scopes := s.start(func(cfg *registration.Config) {
		cfg.OpenHub = func(_ string, h registration.LinkedHub) (registration.Hub, error) {
			return hanging{testHub{s.p, h.Name}, hangs}, nil
		}
	})
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	var op *dps.OperationStatus
	wg.Go(func() { op = must(scopes.Register(ctx, request(s.device()))) })
	<-hangs
	s.Put(t, registration.Group, "keys", func() dps.Enrollment {
		e := registrationtest.Symmetric(s.GroupKey, nil)
		e.AllocationPolicy, e.IoTHubs = dps.AllocationStatic, []string{"b.example"}
		return e
	}())
	if st := s.assign(scopes, s.Derived("dev-1")); st.AssignedHub != "b.example" {
		t.Errorf("%+v", st)
	}
	cancel() // the device has gone; its registration has not
	wg.Wait()
	if st, err := scopes.Status(t.Context(), request(s.device()), op.OperationID); err != nil || st.Status != dps.Assigning {
		t.Errorf("%+v, %v", st, err)
	}
	s.heal()
	if err := s.whole("own-key"); err != nil {
		t.Error(err)
	}
}

type hanging struct {
	testHub
	entered chan struct{}
}

func (h hanging) Admit(ctx context.Context, d *registration.HubDevice) (bool, error) {
	if h.name != "a.example" {
		return h.testHub.Admit(ctx, d)
	}
	close(h.entered)
	<-ctx.Done()
	return false, ctx.Err()
}

// Many replicas, many registrations of few devices, hubs that come and go and are busy: at rest each device is at the one hub that its
// record names.
func TestManyMinds(t *testing.T) {
	t.Run("SQLite", func(t *testing.T) {
		manyMinds(newSite(t, registration.HubAzure, "a.example", "b.example", "c.example"))
	})
	t.Run("PostgreSQL", func(t *testing.T) { // each replica with a store of its own
		store := func(dsn string) registration.Store {
			s, err := sqlstore.Open(t.Context(), sqlstore.Config{DSN: dsn, DataKey: make([]byte, 32)})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = s.Close() })
			return s
		}
		dsn := sqlstoretest.Start(t).Database(t)
		s := &site{Fixture: registrationtest.NewFixtureOn(t, store(dsn)), p: &plant{hubs: map[string]map[string]*known{}}, t: t}
		s.link(registration.HubAzure, "a.example", "b.example", "c.example")
		s.replica = func() registration.Store { return store(dsn) }
		manyMinds(s)
	})
}

func manyMinds(s *site) {
	t := s.t
	var n atomic.Int64
	s.p.fault = func(step int, name string) fault {
		if name == "store" {
			return none
		}
		return []fault{none, none, none, fails, lost}[n.Add(1)*7919%5]
	}
	var wg sync.WaitGroup
	for i := range 6 {
		scopes := s.start()
		wg.Go(func() {
			for j := range 20 {
				if _, _, err := s.try(scopes, s.Derived(fmt.Sprintf("dev-%d", (i+j)%4))); err != nil && dps.AsError(err).Code != dps.CodeServiceOverloaded && dps.AsError(err).Code != dps.CodeNotFound {
					t.Error(err) // an operation may be forgotten after four more
				}
				if j%5 == 0 {
					s.Advance(2 * time.Second)
					_, _ = scopes.ProvisionDue(t.Context())
				}
			}
		})
	}
	for i := range 8 {
		s.link(registration.HubAzure, [][]string{{"a.example", "b.example"}, {"b.example", "c.example"}, {"a.example", "c.example"}, {"a.example", "b.example", "c.example"}}[i%4]...)
	}
	wg.Wait()
	scopes := s.heal()
	for i := range 4 {
		id := fmt.Sprintf("dev-%d", i)
		s.assign(scopes, s.Derived(id))
		for _, o := range must(s.service(scopes).Orphans(t.Context(), registration.Orphan{}, 100)) {
			if o.ID == id { // left at a hub while it was unlinked
				_ = testHub{s.p, o.Hub}.Remove(t.Context(), o.DeviceID)
			}
		}
		if err := s.whole(id); err != nil {
			t.Errorf("%s: %v", id, err)
		}
	}
}

func newLeaf(t *testing.T, by *attesttest.Holder, id string) []*x509.Certificate {
	return []*x509.Certificate{attesttest.Leaf(t, by, id).Certificate}
}

// A tenant with many hubs that hang, and more to be told to them than is looked at in one go, has no other tenant's hub wait.
func TestTenantHangs(t *testing.T) {
	store := must(sqlstore.Open(t.Context(), sqlstore.Config{DataKey: make([]byte, 32)}))
	defer store.Close()
	now := time.Now()
	tenant := func(id string, names ...string) {
		hubs := registration.Records(names...)
		for i := range hubs {
			hubs[i].Kind = registration.HubAzure
		}
		must2(registration.EditScope(t.Context(), store, id, registration.Actor{}, "create", now, func(*registration.Scope) (*registration.Scope, error) {
			return &registration.Scope{ID: id, Name: "name-" + id, Settings: registration.Settings{Hubs: hubs}}, nil
		}))
	}
	away := func(scope, id, hub string, due time.Time) {
		if err := store.Update(t.Context(), func(tx registration.Tx) error {
			return tx.PutTask(scope, &registration.Task{ID: id, Begun: due, Due: due, Hub: hub, Away: []registration.Place{{Hub: hub, DeviceID: id}}})
		}); err != nil {
			t.Fatal(err)
		}
	}
	var hubs []string
	for i := range 10 {
		hubs = append(hubs, fmt.Sprintf("hub-%d.example", i))
	}
	tenant("0nebusy", hubs...)
	tenant("0nequiet", "hub.example")
	for i := range 700 {
		away("0nebusy", fmt.Sprint("d", i), hubs[i%len(hubs)], now.Add(time.Duration(i-1000)*time.Millisecond))
	}
	away("0nequiet", "d", "hub.example", now.Add(-100*time.Millisecond))
	asked, free := make(chan struct{}), make(chan struct{})
	scopes := registration.NewScopes(registration.ScopesConfig{Config: registration.Config{Store: store, OpenHub: func(scope string, h registration.LinkedHub) (registration.Hub, error) {
		return removing{remove: func() {
			if dps.Fold(scope) == "0nequiet" {
				close(asked)
			} else {
				<-free
			}
		}}, nil
	}}})
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { scopes.Provision(ctx) })
	select {
	case <-asked:
	case <-time.After(20 * time.Second):
		t.Error("the other tenant's hub is not told")
	}
	cancel()
	close(free)
	wg.Wait()
}

type removing struct {
	registration.Hub
	remove func()
}

func (r removing) Remove(context.Context, string) error {
	r.remove()
	return nil
}

func must2[A, B any](a A, b B, err error) (A, B) {
	if err != nil {
		panic(err)
	}
	return a, b
}

// Those who watch are told which operation came to its end, and how: the log of attempts completes its entry by that.
func TestWatched(t *testing.T) {
	s := newSite(t, registration.HubAzure, "a.example")
	s.own(static("a.example"))
	var told []registration.Provisioning
	scopes := s.start(func(cfg *registration.Config) {
		cfg.OnProvision = func(p registration.Provisioning) { told = append(told, p) }
	})
	var want []string
	for _, f := range []fault{none, full} {
		s.p.fault = func(_ int, name string) fault {
			if name != "store" {
				return f
			}
			return none
		}
		s.Advance(time.Minute) // so soon that the hub is asked again
		want = append(want, must(scopes.Register(t.Context(), request(s.device()))).OperationID)
	}
	if len(told) != 2 || told[0].Outcome != "assigned" || told[0].OperationID != want[0] || told[0].Substatus != dps.InitialAssignment ||
		told[1].Outcome != "failed" || told[1].OperationID != want[1] || told[1].Substatus != dps.ReprovisionedToInitialAssignment {
		t.Errorf("operations %q: %+v", want, told)
	}
}

// Hundreds of devices that wait for a hub that hangs keep none waiting whose hub answers, however late it came.
func TestManyHang(t *testing.T) {
	s := newSite(t, registration.HubAzure, "a.example", "b.example")
	s.Put(t, registration.Group, "keys", func() dps.Enrollment {
		e := registrationtest.Symmetric(s.GroupKey, nil)
		e.AllocationPolicy, e.IoTHubs = dps.AllocationStatic, []string{"a.example"}
		return e
	}())
	s.own(static("b.example"))
	reached := make(chan struct{})
	over := sync.OnceFunc(func() { close(reached) })
	hangs := false
	scopes := s.start(func(cfg *registration.Config) {
		cfg.OnProvision = func(p registration.Provisioning) {
			if p.Outcome == "assigned" {
				over()
			}
		}
		cfg.OpenHub = func(_ string, h registration.LinkedHub) (registration.Hub, error) {
			return stuck{testHub{s.p, h.Name}, func(ctx context.Context) {
				if hangs && h.Name == "a.example" {
					select {
					case <-reached:
					case <-ctx.Done():
						t.Error("a device waits for another one's hub")
						over()
					}
				}
			}}, nil
		}
	})
	s.p.fault = func(_ int, name string) fault {
		if name != "store" {
			return fails
		}
		return none
	}
	for i := range 600 {
		must(scopes.Register(t.Context(), request(s.Derived(fmt.Sprint("dev-", i)))))
	}
	s.Advance(time.Second)
	must(scopes.Register(t.Context(), request(s.device())))
	s.Advance(time.Minute)
	s.p.fault, hangs = func(_ int, name string) fault {
		if strings.Contains(name, "a.example") {
			return fails
		}
		return none
	}, true
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); scopes.Provision(ctx) }()
	<-reached
	cancel()
	<-done
}

type stuck struct {
	testHub
	wait func(context.Context)
}

func (h stuck) Device(ctx context.Context, id string) (*registration.HubDevice, error) {
	h.wait(ctx)
	return h.testHub.Device(ctx, id)
}
