package registration_test

import (
	"context"
	"crypto/x509"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
	"github.com/touchmark/touchmark/pkg/sqlstore"
	"github.com/touchmark/touchmark/pkg/sqlstore/sqlstoretest"
)

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

// tenant makes a scope with hubs, and away has one of them forget a device.
func tenant(t *testing.T, store registration.Store, id string, names ...string) {
	hubs := registration.Records(names...)
	for i := range hubs {
		hubs[i].Kind = registration.HubAzure
	}
	must2(registration.EditScope(t.Context(), store, id, registration.Actor{}, "create", time.Now(), func(*registration.Scope) (*registration.Scope, error) {
		return &registration.Scope{ID: id, Name: "name-" + id, Settings: registration.Settings{Hubs: hubs}}, nil
	}))
}

func away(t *testing.T, store registration.Store, scope, id, hub string, due time.Time) {
	t.Helper()
	if err := store.Update(t.Context(), func(tx registration.Tx) error {
		return tx.PutTask(scope, &registration.Task{ID: id, Begun: due, Due: due, Hub: hub, Away: []registration.Place{{Hub: hub, DeviceID: id}}})
	}); err != nil {
		t.Fatal(err)
	}
}

// What waits for a place gets the next one that is free, those first that have waited longest, without another look into the store.
func TestLine(t *testing.T) {
	store := must(sqlstore.Open(t.Context(), sqlstore.Config{DataKey: make([]byte, 32)}))
	defer store.Close()
	tenant(t, store, "0neone", "hub.example")
	const devices = 300
	start := time.Now().Add(-time.Hour)
	for i := range devices {
		away(t, store, "0neone", fmt.Sprintf("d%03d", i), "hub.example", start.Add(time.Duration(i)*time.Second))
	}
	var looks int
	var mu sync.Mutex
	var order []string
	scopes := registration.NewScopes(registration.ScopesConfig{Config: registration.Config{Store: looking{store, &looks},
		OpenHub: func(string, registration.LinkedHub) (registration.Hub, error) {
			return removing{remove: func() {}}, nil
		},
		OnProvision: func(p registration.Provisioning) {
			mu.Lock()
			defer mu.Unlock()
			order = append(order, p.RegistrationID)
		}}})
	if n := must(scopes.ProvisionDue(t.Context())); n != devices || looks != 2 { // the second finds nothing
		t.Errorf("%d of %d, with %d looks", n, devices, looks)
	}
	for i, id := range order {
		if at, _ := strconv.Atoi(id[1:]); at > i+8 { // all before it have begun, and no more than eight of them are not done
			t.Errorf("%s was number %d", id, i)
		}
	}
}

// looking counts how often it is asked what is due.
type looking struct {
	registration.Store
	looks *int
}

func (l looking) View(ctx context.Context, f func(registration.Tx) error) error {
	return l.Store.View(ctx, func(tx registration.Tx) error { return f(lookingTx{tx, l.looks}) })
}

type lookingTx struct {
	registration.Tx
	looks *int
}

func (l lookingTx) DueTasks(from, now time.Time, limit int) ([]*registration.Task, error) {
	*l.looks++
	return l.Tx.DueTasks(from, now, limit)
}

// A tenant with many hubs that hang, and more to be told to them than is looked at in one go, has no other tenant's hub wait.
func TestTenantHangs(t *testing.T) {
	store := must(sqlstore.Open(t.Context(), sqlstore.Config{DataKey: make([]byte, 32)}))
	defer store.Close()
	now := time.Now()
	var hubs []string
	for i := range 10 {
		hubs = append(hubs, fmt.Sprintf("hub-%d.example", i))
	}
	tenant(t, store, "0nebusy", hubs...)
	tenant(t, store, "0nequiet", "hub.example")
	for i := range 700 {
		away(t, store, "0nebusy", fmt.Sprint("d", i), hubs[i%len(hubs)], now.Add(time.Duration(i-1000)*time.Millisecond))
	}
	away(t, store, "0nequiet", "d", "hub.example", now.Add(-100*time.Millisecond))
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
