package registration_test

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
	"github.com/touchmark/touchmark/pkg/sqlstore"
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
					if d := must(s.service(scopes).Diagnose(t.Context(), "own-key", nil, nil)); d.Task == nil || d.Task.Hub != "b.example" || !strings.Contains(strings.Join(d.Explanation, " "), "Hub b.example has yet to be told: 1 attempts") {
						t.Errorf("%+v", d)
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
	t.Run("unlinked before its twin was written", func(t *testing.T) {
		s := newSite(t, registration.HubAzure, "a.example")
		s.own(static("a.example"))
		s.p.fault = func(_ int, step string) fault {
			if step == "merge a.example" {
				return fails
			}
			return none
		}
		scopes := s.start()
		if _, st, err := s.try(scopes, s.device()); err != nil || st.Status != dps.Assigning {
			t.Fatalf("%+v, %v", st, err)
		}
		s.link(registration.HubAzure, "b.example")
		scopes = s.heal()
		if orphans := must(s.service(scopes).Orphans(t.Context(), registration.Orphan{}, 10)); len(orphans) != 1 || orphans[0].Hub != "a.example" {
			t.Fatalf("%+v", orphans)
		}
		s.link(registration.HubAzure, "a.example")
		if st := s.assign(scopes, s.device()); st.AssignedHub != "a.example" {
			t.Errorf("%+v", st)
		}
		if d := s.p.device("a.example", "own-key"); fmt.Sprint(d.tags, d.desired) != "map[site:A7] map[interval:30]" {
			t.Errorf("%v, %v", d.tags, d.desired)
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
