package hub_test

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/hub"
	"github.com/touchmark/touchmark/pkg/hub/hubtest"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

// clock is one that goes on when it is told.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func newClock() *clock { return &clock{now: time.Date(2026, 6, 1, 0, 0, 0, 0, time.UTC)} }

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) Forward(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

func pooled(t *testing.T, p *hub.Pool, scope string, linked registration.LinkedHub) registration.Hub {
	t.Helper()
	h, err := p.Hub(scope, linked)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// hold has a stub wait with its answers, and tell of each call that has arrived.
func hold(s *hubtest.Stub, wait chan struct{}) (arrived chan struct{}) {
	arrived = make(chan struct{}, 100)
	s.Fail(func(*http.Request) hubtest.Fault {
		arrived <- struct{}{}
		return hubtest.Fault{Wait: wait}
	})
	return arrived
}

func codeOf(err error) string {
	if e, ok := errors.AsType[*registration.HubError](err); ok {
		return e.Code
	}
	return fmt.Sprint(err)
}

// A hub that does not answer is left alone, longer each time, and asked by one call whether it is there again.
func TestPoolBreaker(t *testing.T) {
	registrationtest.Goroutines(t)
	s := hubtest.StartStub(t)
	other := hubtest.StartStub(t)
	c := newClock()
	var mu sync.Mutex
	seen := map[string]int{}
	p := hub.NewPool(hub.PoolConfig{Base: hub.Config{Now: c.Now}, Observe: func(hub, operation, code string, d time.Duration) {
		mu.Lock()
		defer mu.Unlock()
		if d < 0 {
			t.Error(d)
		}
		seen[hub+" "+operation+" "+code]++
	}})
	defer p.Close()
	h, fine := pooled(t, p, "0ne1", s.Linked("hub-a")), pooled(t, p, "0ne1", other.Linked("hub-b"))
	s.Fail(always(hubtest.Fault{Status: 429}))
	for range 10 { // answers, all of them
		temporary(t, h.Check(t.Context()))
	}
	s.Fail(always(hubtest.Fault{Status: 401}))
	for range 10 {
		forGood(t, h.Check(t.Context()))
	}
	s.Fail(always(hubtest.Fault{Status: 503}))
	for range 5 {
		temporary(t, h.Check(t.Context()))
	}
	s.Calls()
	pause := time.Second
	for range 8 {
		for range 3 {
			_, err := h.Device(t.Context(), "d")
			if e := temporary(t, err); e.Code != "CircuitOpen" || e.RetryAfter <= 0 || e.RetryAfter > pause || !errors.Is(err, hub.ErrCircuitOpen) {
				t.Fatalf("%+v", e)
			} else if last, ok := errors.AsType[*registration.HubError](e.Err); !ok || last.Status != 503 || !strings.Contains(err.Error(), "status 503") || strings.Contains(err.Error(), "statistics") {
				t.Fatalf("it does not say what the hub did, or says of what: %v", err) // the calls that failed read statistics
			}
		}
		c.Forward(pause - time.Millisecond)
		if err := h.Check(t.Context()); codeOf(err) != "CircuitOpen" {
			t.Fatal(err)
		}
		c.Forward(time.Millisecond)
		if e := temporary(t, h.Check(t.Context())); e.Status != 503 {
			t.Fatal(e)
		}
		pause = min(2*pause, time.Minute)
	}
	if calls := s.Calls(); len(calls) != 8 {
		t.Errorf("%d calls while it was open, want 8", len(calls))
	}
	if err := fine.Check(t.Context()); err != nil {
		t.Errorf("another hub: %v", err)
	}

	c.Forward(pause)
	wait := make(chan struct{})
	arrived := hold(s, wait)
	done := make(chan error)
	go func() { done <- h.Check(t.Context()) }()
	<-arrived
	if err := h.Check(t.Context()); codeOf(err) != "CircuitOpen" {
		t.Errorf("beside the one that tells: %v", err)
	}
	close(wait)
	if err := <-done; err != nil {
		t.Error(err)
	}
	for range 10 {
		if err := h.Check(t.Context()); err != nil {
			t.Error(err)
		}
	}
	mu.Lock()
	defer mu.Unlock()
	for what, want := range map[string]int{"hub-a check 429": 10, "hub-a check 401": 10, "hub-a check 503": 13, "hub-a device CircuitOpen": 24, "hub-a check CircuitOpen": 9, "hub-a check ok": 11, "hub-b check ok": 1} {
		if seen[what] != want {
			t.Errorf("%s: told %d times, want %d", what, seen[what], want)
		}
	}
	if len(seen) != 7 {
		t.Errorf("%v", seen)
	}
}

// Calls that were under way when it opened, and fail later, do not keep it open for longer.
func TestPoolBreakerLateFailures(t *testing.T) {
	registrationtest.Goroutines(t)
	s := hubtest.StartStub(t)
	c := newClock()
	p := hub.NewPool(hub.PoolConfig{Base: hub.Config{Now: c.Now}})
	defer p.Close()
	h := pooled(t, p, "0ne1", s.Linked("hub-a"))
	wait := make(chan struct{})
	arrived := make(chan struct{}, 12)
	s.Fail(func(*http.Request) hubtest.Fault {
		arrived <- struct{}{}
		return hubtest.Fault{Wait: wait, Status: 503}
	})
	results := make(chan error)
	for range 12 {
		go func() { results <- h.Check(t.Context()) }()
	}
	for range 12 {
		<-arrived
	}
	close(wait)
	for range 12 {
		temporary(t, <-results)
	}
	s.Fail(nil)
	if err := h.Check(t.Context()); codeOf(err) != "CircuitOpen" {
		t.Error(err)
	}
	c.Forward(time.Second)
	if err := h.Check(t.Context()); err != nil {
		t.Errorf("after the first pause: %v", err)
	}
}

// One that hangs has so many calls, and no more, to itself.
func TestPoolConcurrency(t *testing.T) {
	registrationtest.Goroutines(t)
	s := hubtest.StartStub(t)
	p := hub.NewPool(hub.PoolConfig{Concurrency: 2})
	defer p.Close()
	h := pooled(t, p, "0ne1", s.Linked("hub-a"))
	wait := make(chan struct{})
	s.Fail(always(hubtest.Fault{Wait: wait}))
	const calls = 30
	results := make(chan error, calls)
	for range calls {
		go func() { results <- h.Check(t.Context()) }()
	}
	for range calls - 2 - 8 {
		if e := temporary(t, <-results); e.Code != "Busy" || e.RetryAfter <= 0 {
			t.Error(e)
		}
	}
	if n := len(s.Calls()); n > 2 {
		t.Errorf("%d calls at once", n)
	}
	close(wait)
	for range 10 {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
}

// Hubs of a pool by scope, name and connection string.
func TestPoolKeeps(t *testing.T) {
	a, b, c := hubtest.StartStub(t), hubtest.StartStub(t), hubtest.StartStub(t)
	t.Run("those that differ", func(t *testing.T) {
		registrationtest.Goroutines(t)
		p := hub.NewPool(hub.PoolConfig{})
		first, second := pooled(t, p, "0ne1", a.Linked("hub")), pooled(t, p, "0ne2", b.Linked("hub"))
		for range 3 {
			if err := errors.Join(first.Check(t.Context()), second.Check(t.Context())); err != nil {
				t.Fatal(err)
			}
		}
		if x, y := len(a.Calls()), len(b.Calls()); x != 3 || y != 3 {
			t.Errorf("%d and %d calls", x, y)
		}
		moved := pooled(t, p, "0ne1", c.Linked("HUB"))
		if err := errors.Join(moved.Check(t.Context()), moved.Check(t.Context())); err != nil {
			t.Fatal(err)
		}
		if x, z := len(a.Calls()), len(c.Calls()); x != 0 || z != 2 {
			t.Errorf("%d and %d calls", x, z)
		}
		if err := p.Close(); err != nil {
			t.Error(err)
		}
		if err := first.Check(t.Context()); codeOf(err) != "Closed" {
			t.Error(err)
		}
	})
	t.Run("more than it may", func(t *testing.T) {
		registrationtest.Goroutines(t)
		p := hub.NewPool(hub.PoolConfig{MaxHubs: 2})
		hubs := []registration.Hub{pooled(t, p, "s", a.Linked("a")), pooled(t, p, "s", b.Linked("b")), pooled(t, p, "s", c.Linked("c"))}
		for i := range 9 {
			if err := hubs[i%3].Check(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		wait := make(chan struct{})
		results := make(chan error)
		for i, s := range []*hubtest.Stub{a, b} {
			arrived := hold(s, wait)
			go func() { results <- hubs[i].Check(t.Context()) }()
			<-arrived
		}
		if err := hubs[2].Check(t.Context()); codeOf(err) != "Busy" {
			t.Error(err)
		}
		// A changed one closes the former after its last call.
		if err := pooled(t, p, "s", c.Linked("a")).Check(t.Context()); err != nil {
			t.Error(err)
		}
		close(wait)
		for range 2 {
			if err := <-results; err != nil {
				t.Error(err)
			}
		}
		p.Close()
	})
	p := hub.NewPool(hub.PoolConfig{})
	bad := a.Linked("hub")
	bad.ConnectionString = strings.Replace(bad.ConnectionString, "Port=", "Port=x", 1)
	if _, err := p.Hub("s", bad); err == nil || strings.Contains(err.Error(), "MDEy") {
		t.Error(err)
	}
}

// The backend behind a webhook fails.
func TestBackendFaults(t *testing.T) {
	registrationtest.Goroutines(t)
	for _, c := range []struct {
		name      string
		fault     hubtest.Fault
		status    int
		code      string
		temporary bool
	}{
		{"hangs", hubtest.Fault{Hang: true}, 0, "Timeout", true},
		{"cuts the connection", hubtest.Fault{Cut: true}, 0, "Unreachable", true},
		{"throttles", hubtest.Fault{Status: 429, Header: http.Header{"Retry-After": {"7"}}}, 429, "", true},
		{"500 after it was done", hubtest.Fault{Status: 500, After: true}, 500, "", true},
		{"401", hubtest.Fault{Status: 401, Body: `{"version":1,"error":{"code":"Unauthorized","message":"no"}}`}, 401, "Unauthorized", false},
		{"404 of a proxy", hubtest.Fault{Status: 404, Body: "<html>"}, 404, "", false},
		{"welcomes everybody", hubtest.Fault{Status: 200, Body: "<html>"}, 200, "InvalidAnswer", false},
		{"says nothing", hubtest.Fault{Status: 204}, 204, "InvalidAnswer", false},
		{"has no version", hubtest.Fault{Status: 200, Body: `{}`}, 200, "InvalidAnswer", false},
		{"has another version", hubtest.Fault{Status: 200, Body: `{"version":2}`}, 200, "InvalidAnswer", false},
		{"has what we do not know", hubtest.Fault{Status: 200, Body: `{"version":1,"more":1}`}, 200, "InvalidAnswer", false},
		{"answers more", hubtest.Fault{Status: 200, Body: `{"version":1,"created":true,"twin":{},"device":{"deviceId":"there"}}`}, 200, "InvalidAnswer", false},
		{"says 10 MB", hubtest.Fault{Status: 200, Body: strings.Repeat(" ", 10<<20)}, 200, "InvalidAnswer", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := hubtest.StartBackend(t)
			cfg := hub.Config{Hub: b.Linked("back")}
			if c.fault.Hang {
				cfg.Timeout = 200 * time.Millisecond
			}
			h := open(t, cfg)
			b.Fail(always(c.fault))
			for _, m := range methods {
				err := m.call(t.Context(), h, hubtest.Keys())
				e, ok := errors.AsType[*registration.HubError](err)
				if !ok || e.Status != c.status || e.Code != c.code || e.Temporary != c.temporary || strings.Contains(err.Error(), "code=") || errors.Is(err, registration.ErrNotFound) {
					t.Errorf("%s: %v, %+v", m.name, err, e)
				}
			}
		})
	}
	b := hubtest.StartBackend(t)
	h := open(t, hub.Config{Hub: b.Linked("back")})
	admit(t, h, &registration.HubDevice{ID: "there", Keys: hubtest.Keys()})
	for _, body := range []string{
		`{"version":1,"device":{"deviceId":"other"}}`, `{"version":1,"device":{"deviceId":"there","keys":{"primaryKey":"x"}}}`,
		`{"version":1,"twin":{"tags":[1]}}`, `{"version":1,"twin":{"tags":{},"reported":{}}}`, `{"version":1}`, `{"version":1,"created":null}`,
	} {
		b.Fail(always(hubtest.Fault{Status: 200, Body: body}))
		for _, name := range []string{"device", "create", "twin"} {
			i := slices.IndexFunc(methods, func(m method) bool { return m.name == name })
			if e := forGood(t, methods[i].call(t.Context(), h, hubtest.Keys())); e.Code != "InvalidAnswer" {
				t.Errorf("%s: %s: %v", body, name, e)
			}
		}
	}
	wrong := b.Linked("back")
	wrong.ConnectionString = strings.Replace(wrong.ConnectionString, "Secret=MDEy", "Secret=MDEz", 1)
	b.Fail(nil)
	if e := forGood(t, open(t, hub.Config{Hub: wrong}).Check(t.Context())); e.Status != 401 {
		t.Error(e)
	}
}

// A hub that is left alone keeps its own words: those who wait for it read what it did, and never of whose device it was.
func TestPoolBreakerTold(t *testing.T) {
	registrationtest.Goroutines(t)
	s, c := hubtest.StartStub(t), newClock()
	p := hub.NewPool(hub.PoolConfig{Base: hub.Config{Now: c.Now}})
	defer p.Close()
	f := registrationtest.NewFixture(t)
	linked := s.Linked("hub-a")
	if _, _, err := registration.EditScope(t.Context(), f.Store, registrationtest.Scope, registration.Actor{}, "put", f.Now(), func(*registration.Scope) (*registration.Scope, error) {
		return &registration.Scope{ID: registrationtest.Scope, Name: "told", Settings: registration.Settings{Hubs: []registration.LinkedHub{linked}}}, nil
	}); err != nil {
		t.Fatal(err)
	}
	scopes := registration.NewScopes(registration.ScopesConfig{Config: registration.Config{Store: f.Store, Now: f.Now, OpenHub: p.Hub}})
	s.Fail(always(hubtest.Fault{Status: 503}))
	h := pooled(t, p, registrationtest.Scope, linked)
	for range 5 {
		_, err := h.Device(t.Context(), "somebody-elses")
		temporary(t, err)
	}
	s.Calls()
	d := f.ByKey("own-key", f.OwnKey)
	if _, err := scopes.Register(t.Context(), &registration.Request{IDScope: d.Scope, RegistrationID: d.ID, APIVersion: d.APIVersion, Proof: attest.Proof{Token: d.Token}}); err != nil {
		t.Fatal(err)
	}
	svc, err := scopes.Service(t.Context(), registrationtest.Scope)
	if err != nil {
		t.Fatal(err)
	}
	told := func(text string) {
		t.Helper()
		if !strings.Contains(text, "503") || strings.Contains(text, "CircuitOpen") || strings.Contains(text, "somebody-elses") {
			t.Errorf("told %q", text)
		}
	}
	page, _, err := svc.Tasks(t.Context(), "", 10)
	if err != nil || len(page) != 1 {
		t.Fatalf("%+v, %v", page, err)
	}
	told(page[0].LastError)
	f.Advance(registration.DefaultGiveUp + time.Minute)
	if _, err := scopes.ProvisionDue(t.Context()); err != nil {
		t.Fatal(err)
	}
	st, err := svc.GetRegistration(t.Context(), "own-key")
	if err != nil || st.ErrorCode != int(dps.CodeHubRefused) {
		t.Fatalf("%+v, %v", st, err)
	}
	told(st.ErrorMessage)
	if calls := s.Calls(); len(calls) != 0 {
		t.Errorf("it was called: %v", calls)
	}
}
