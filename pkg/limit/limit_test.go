package limit_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/limit"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

const hub = "hub-a.example.net"

// counted counts what reaches the service behind it.
type counted struct {
	registration.Registrar
	registers, others atomic.Int64
}

func (c *counted) Register(ctx context.Context, req *registration.Request) (*dps.OperationStatus, error) {
	c.registers.Add(1)
	return c.Registrar.Register(ctx, req)
}

func (c *counted) Status(ctx context.Context, req *registration.Request, op string) (*dps.OperationStatus, error) {
	c.others.Add(1)
	return c.Registrar.Status(ctx, req, op)
}

// behind returns a limiter in front of a counted service.
func behind(r registration.Registrar, cfg limit.Config) (*limit.Limiter, *counted) {
	c := &counted{Registrar: r}
	cfg.Registrar = c
	if cfg.Scopes == nil {
		cfg.Scopes = func(s string) bool { return s == dps.Fold(registrationtest.Scope) }
	}
	return limit.New(cfg), c
}

func request(d registrationtest.Device, remote, body string) *registration.Request {
	r := &registration.Request{IDScope: d.Scope, RegistrationID: d.ID, APIVersion: d.APIVersion, Proof: attest.Proof{Token: d.Token}, Protocol: "test", Remote: remote, Body: []byte(body)}
	if d.Certificate != nil {
		for _, der := range d.Certificate.Certificate {
			c, err := x509.ParseCertificate(der)
			if err != nil {
				panic(err)
			}
			r.Proof.Certificates = append(r.Proof.Certificates, c)
		}
	}
	return r
}

func code(err error) int {
	var e *dps.Error
	if !errors.As(err, &e) {
		return 0
	}
	return e.Code.Status()
}

func ticket(op string) bool { return strings.HasPrefix(op, "4.") }

// conn holds a limiter against the contract of doors: in a conversation without pressure nobody notices it.
type conn struct {
	l *limit.Limiter
	d registrationtest.Device
}

func answer(v *dps.OperationStatus, err error) registrationtest.Answer {
	r := dps.NewReply(v, err)
	return registrationtest.Answer{Status: r.Status, Hint: r.RetryAfter, Body: r.Body}
}

func (c conn) Register(t testing.TB, body string) registrationtest.Answer {
	return answer(c.l.Register(t.Context(), request(c.d, "127.0.0.1:1", body)))
}

func (c conn) Status(t testing.TB, op, _ string) registrationtest.Answer {
	return answer(c.l.Status(t.Context(), request(c.d, "127.0.0.1:1", ""), op))
}

func TestUnnoticed(t *testing.T) {
	for name, cfg := range map[string]limit.Config{"on": {PerDevice: 100}, "off": {Off: true}} {
		t.Run(name, func(t *testing.T) { registrationtest.Doors(t, registrationtest.NewFixture, unnoticed(cfg)) })
	}
}

func unnoticed(cfg limit.Config) registrationtest.Serve {
	return func(t *testing.T, f *registrationtest.Fixture) func(testing.TB, registrationtest.Device) registrationtest.Conn {
		l, _ := behind(f.Registrar(), cfg)
		return func(_ testing.TB, d registrationtest.Device) registrationtest.Conn { return conn{l, d} }
	}
}

// run is a device that obeys: it registers, waits as it is told, and asks until there is an end.
func run(t testing.TB, l registration.Registrar, req *registration.Request) (deferred int, st *dps.OperationStatus, err error) {
	wait := func() {
		n := 3
		if st.RetryAfter != "" {
			if _, err := fmt.Sscan(st.RetryAfter, &n); err != nil || n != 5 {
				t.Errorf("hint %q", st.RetryAfter)
			}
			deferred++
		}
		time.Sleep(time.Duration(n) * time.Second)
	}
	if st, err = l.Register(t.Context(), req); err != nil {
		return 0, nil, err
	}
	if st.RegistrationState != nil { // DPS-D 6
		t.Errorf("register answered %+v", st)
	}
	for op := st.OperationID; !st.Status.Terminal(); {
		wait()
		if st, err = l.Status(t.Context(), req, op); err != nil {
			return deferred, nil, err
		}
		if s := st.RegistrationState; st.OperationID != op || s == nil || s.RegistrationID != req.RegistrationID || s.Status != st.Status ||
			!st.Status.Terminal() && (s.AssignedHub != "" || s.DeviceID != "") { // DPS-D 7
			t.Errorf("status answered %+v, %+v", st, s)
		}
	}
	return deferred, st, nil
}

// Five thousand devices behind one address are switched on within a minute, or all at once, or with payloads; nobody is
// refused.
func TestFactory(t *testing.T) {
	for name, c := range map[string]struct {
		n      int
		within time.Duration
		body   string
		put    int // how many may be put off
	}{"within a minute": {5000, time.Minute, "", 0}, "with payloads": {1000, 12 * time.Second, `{"payload":{"a":"` + strings.Repeat("x", 1000) + `"}}`, 0}, "at once": {5000, time.Millisecond, "", 5000}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := registrationtest.NewFixture(t, hub)
				l, behind := behind(f.Service, limit.Config{})
				start := time.Now()
				var put, polls atomic.Int64
				var wg sync.WaitGroup
				for i := range c.n {
					wg.Go(func() {
						time.Sleep(time.Duration(rand.Int64N(int64(c.within))))
						req := request(f.Derived(fmt.Sprintf("dev-%d", i)), fmt.Sprintf("198.51.100.7:%d", i), c.body)
						deferred, st, err := run(t, l, req)
						if err != nil || st.Status != dps.Assigned {
							t.Errorf("dev-%d: %+v, %v", i, st, err)
						}
						polls.Add(int64(deferred))
						if deferred > 0 {
							put.Add(1)
						}
					})
				}
				wg.Wait()
				if int(put.Load()) > c.put || behind.registers.Load() != int64(c.n) {
					t.Errorf("%d devices put off, %d registrations", put.Load(), behind.registers.Load())
				}
				t.Logf("%d devices in %v of simulated time; %d put off, %d times", c.n, time.Since(start).Round(time.Second), put.Load(), polls.Load())
			})
		})
	}
}

// DPS-D 28, 102: a device beyond its rate gets a ticket; any replica takes it up once there is room, one registration comes of it however
// often it is asked for, and another device's ticket is an unknown operation.
func TestTicket(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := registrationtest.NewFixture(t, hub)
		one, first := behind(f.Service, limit.Config{})
		other, second := behind(f.Replica(hub), limit.Config{})
		off, third := behind(f.Replica(hub), limit.Config{Off: true})
		req := request(f.Derived("dev-1"), "192.0.2.1:1", `{"registrationId":"dev-1","payload":null}`)
		var op string
		for op == "" {
			st, err := one.Register(t.Context(), req)
			if err != nil {
				t.Fatal(err)
			}
			if ticket(st.OperationID) {
				op = st.OperationID
			}
		}
		if n := first.registers.Load(); n != 20 {
			t.Errorf("put off after %d registrations", n)
		}
		if st, err := one.Status(t.Context(), req, op); err != nil || st.Status != dps.Assigning || st.RetryAfter != "5" || first.others.Load() != 0 {
			t.Errorf("still no room: %+v, %v", st, err)
		}
		// Somebody else's, and one that is none.
		stranger := request(f.Derived("dev-2"), "192.0.2.2:1", "")
		for _, bad := range []string{op, op[:54] + "g", "4.0000000000000000.00000000-0000-4000-8000-000000000000"} {
			if _, err := one.Status(t.Context(), stranger, bad); code(err) != 404 {
				t.Errorf("ticket %s: %v", bad, err)
			}
		}
		forged := request(f.ByKey("dev-1", f.OwnKey), "192.0.2.9:1", "")
		if _, err := other.Status(t.Context(), forged, op); code(err) != 401 {
			t.Errorf("a ticket with another proof: %v", err)
		}
		forged.Operation = op
		if _, err := f.Service.Register(t.Context(), forged); code(err) != 401 {
			t.Errorf("a ticket with another proof, registered: %v", err)
		}
		var want []byte
		var wg sync.WaitGroup
		for _, l := range []*limit.Limiter{other, other, off, off} { // several at once
			wg.Go(func() {
				if st, err := l.Status(t.Context(), req, op); err != nil || st.Status != dps.Assigned || st.OperationID != op {
					t.Errorf("%+v, %v", st, err)
				}
			})
		}
		wg.Wait()
		for i, l := range []*limit.Limiter{other, off, one, other} {
			time.Sleep(time.Minute)
			if i == 3 {
				f.Advance(90 * time.Minute) // the token has expired, as it may while a device waits
			}
			got := dps.NewReply(l.Status(t.Context(), req, op))
			if want == nil {
				want = got.Body
			}
			if got.Status != 200 || !bytes.Equal(got.Body, want) { // DPS-D 27
				t.Errorf("told again: %d %s, want %s", got.Status, got.Body, want)
			}
		}
		// A newer registration is another operation, and the ticket's is as it was.
		f.Advance(-2 * time.Hour)
		if st, err := other.Register(t.Context(), req); err != nil || ticket(st.OperationID) {
			t.Errorf("%+v, %v", st, err)
		}
		if got := dps.NewReply(other.Status(t.Context(), req, op)); !bytes.Equal(got.Body, want) {
			t.Errorf("after a newer one: %s, want %s", got.Body, want)
		}
		if second.registers.Load()+third.registers.Load() < 4 {
			t.Error("the replicas were not asked")
		}
	})
}

// What a body carries is not lost: such requests are served or refused.
func TestNotDeferrable(t *testing.T) {
	f := registrationtest.NewFixture(t, hub)
	l, _ := behind(f.Service, limit.Config{PerDevice: 0.001}) // four requests
	d := f.Derived("dev-1")
	for range 4 {
		if st, err := l.Register(t.Context(), request(d, "192.0.2.1:1", "")); err != nil || ticket(st.OperationID) {
			t.Fatal(st, err)
		}
	}
	for _, body := range []string{"", "{}", `{"registrationId":"DEV-1"}`, `{"payload":null}`, `{"payload":{"a":1},"payload":null}`, `{"what":"ever"}`} {
		if st, err := l.Register(t.Context(), request(d, "192.0.2.1:1", body)); err != nil || !ticket(st.OperationID) || st.RetryAfter != "5" || len(st.OperationID) != 55 {
			t.Errorf("%s: %+v, %v", body, st, err)
		}
	}
	preview := func(body string) *registration.Request {
		r := request(d, "192.0.2.1:1", body)
		r.APIVersion = "2025-07-01-preview"
		return r
	}
	tpm := request(d, "192.0.2.1:1", "")
	tpm.Proof.TPM = &attest.TPMKeys{EK: []byte{1}}
	for _, r := range []*registration.Request{preview(`{"payload":{}}`), preview(`{"Payload":0}`), preview(`{"payload":null,"payload":""}`), preview(`{"csr":"MIIB"}`),
		preview(`{"clientCertificateCsr":"MIIB"}`), preview(`{"tpm":{"endorsementKey":"AA=="}}`), preview(`{"registrationId":"dev-2"}`), preview("{"), preview("{}" + strings.Repeat(" ", 600)), tpm} {
		_, err := l.Register(t.Context(), r)
		if e := dps.AsError(err); e.Code != dps.CodeThrottled || e.RetryAfter != "5" {
			t.Errorf("%s: %v", r.Body, err)
		}
	}
	for name, f := range map[string]func(*registration.Request) error{
		"lookup":    func(r *registration.Request) error { _, err := l.Lookup(t.Context(), r); return err },
		"challenge": func(r *registration.Request) error { _, err := l.Challenge(t.Context(), r); return err },
		"status of what cannot be an operation": func(r *registration.Request) error {
			_, err := l.Status(t.Context(), r, "ä"+strings.Repeat("x", 99))
			return err
		},
	} {
		if err := f(request(d, "192.0.2.1:1", "")); code(err) != 429 {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Who ignores hints is told 429, and an address that sends too much; neither costs the service anything. Those who obey
// afterwards are served.
func TestIgnoredHints(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := registrationtest.NewFixture(t, hub)
		var log bytes.Buffer
		l, behind := behind(f.Service, limit.Config{Log: slog.New(slog.NewTextHandler(&log, nil))})
		for name, next := range map[string]func(i int) *registration.Request{
			"device": func(int) *registration.Request { return request(f.Derived("dev-1"), "192.0.2.1:1", "") },
			"address": func(i int) *registration.Request {
				return request(f.Derived(fmt.Sprintf("dev-%d", i)), fmt.Sprintf("[2001:db8::%x]:1", i), "")
			},
		} {
			behind.registers.Store(0)
			log.Reset()
			var served, deferred, refused int
			ids := map[string]bool{}
			devices := make([]*registration.Request, 300) // so many that none is beyond its own rate
			for i := range devices {
				devices[i] = next(i)
			}
			n := map[string]int{"device": 500, "address": 40_000}[name]
			for i := range n {
				st, err := l.Register(t.Context(), devices[i%len(devices)])
				switch {
				case code(err) == 429:
					refused++
					ids[dps.AsError(err).TrackingID] = true
				case err != nil:
					t.Fatal(err)
				case ticket(st.OperationID):
					deferred++
				default:
					served++
				}
			}
			rate := map[string]int{"device": 20, "address": 5000}[name]
			if served != rate || deferred != 5*rate || refused != n-6*rate || int(behind.registers.Load()) != served {
				t.Errorf("%s: %d served, %d deferred, %d refused, %d reached the service", name, served, deferred, refused, behind.registers.Load())
			}
			// One line, under the tracking ID that all of them were told.
			if lines := strings.Count(log.String(), "\n"); lines != 1 || len(ids) != 1 || !strings.Contains(log.String(), "limit="+name) || !strings.Contains(log.String(), "remote=") {
				t.Errorf("%s: %d tracking IDs; %s", name, len(ids), log.String())
			}
			if !l.Overloaded(next(0)) || l.Overloaded(request(f.Derived("dev-1"), "192.0.2.77:1", "")) {
				t.Errorf("%s: Overloaded", name)
			}
			time.Sleep(time.Minute)
			if l.Overloaded(next(0)) {
				t.Errorf("%s: Overloaded after a minute", name)
			}
			log.Reset()
			for {
				if st, err := l.Register(t.Context(), next(0)); err != nil {
					t.Fatal(err)
				} else if ticket(st.OperationID) {
					break
				}
			}
			if want := fmt.Sprintf("deferred=%d refused=%d", 5*rate, refused); name == "device" && !strings.Contains(log.String(), want) {
				t.Errorf("%s: want %s in %s", name, want, log.String())
			}
			time.Sleep(time.Minute)
		}
	})
}

// A stranger who names a device does not keep it out, from whatever addresses he comes; nor do many unknown scopes.
func TestStrangers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := registrationtest.NewFixture(t, hub)
		l, _ := behind(f.Service, limit.Config{})
		for i := range 2000 {
			r := request(f.ByKey("dev-1", f.OwnKey), fmt.Sprintf("203.0.113.%d:1", i%250), "")
			for _, r.IDScope = range []string{registrationtest.Scope, fmt.Sprintf("0ne%08X", i)} {
				if _, err := l.Register(t.Context(), r); code(err) != 401 {
					t.Fatalf("a stranger: %v", err)
				}
			}
		}
		req := request(f.Derived("dev-1"), "192.0.2.1:1", "")
		if deferred, st, err := run(t, l, req); err != nil || st.Status != dps.Assigned || deferred != 0 {
			t.Errorf("the device: put off %d times, %+v, %v", deferred, st, err)
		}
		// Who proves himself from everywhere, though, is one device.
		late := 0
		for i := range 100 {
			st, err := l.Register(t.Context(), request(f.Derived("dev-1"), fmt.Sprintf("198.51.100.%d:1", i), ""))
			if err != nil {
				t.Fatal(err)
			}
			if ticket(st.OperationID) {
				late++
			}
		}
		if late != 100-19 { // one of the twenty was the status request
			t.Errorf("%d of 100 registrations from everywhere were put off", late)
		}
	})
}

// The very proof that was refused is refused again without a judgement, for half a minute and at this address; any other is
// judged, and who never stops is told 429.
func TestRefusals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := registrationtest.NewFixture(t, hub)
		l, behind := behind(f.Service, limit.Config{PerDevice: 100})
		wrong := request(f.ByKey("dev-1", f.OwnKey), "192.0.2.1:1", "")
		var e *dps.Error
		for i := range 20 {
			_, err := l.Register(t.Context(), wrong)
			got := dps.AsError(err)
			if got.Code != dps.CodeUnauthorized || got.Message != "Unauthorized" {
				t.Fatalf("attempt %d: %v", i, err)
			}
			if i >= 3 && got.TrackingID != e.TrackingID {
				t.Errorf("attempt %d has a tracking ID that the log has not", i)
			}
			e = got
		}
		if n := behind.registers.Load(); n != 3 {
			t.Errorf("%d judgements", n)
		}
		if _, err := l.Register(t.Context(), wrong); code(err) != 429 || dps.AsError(err).RetryAfter != "5" {
			t.Errorf("after many: %v", err)
		}
		// Another proof, another spelling, another address, another question: each is judged.
		for name, r := range map[string]*registration.Request{
			"proof":    request(f.ByKey("dev-1", f.OtherKey), "192.0.2.1:1", ""),
			"spelling": request(registrationtest.Device{Scope: wrong.IDScope, ID: "DEV-1", APIVersion: "2019-03-31", Token: wrong.Proof.Token}, "192.0.2.1:1", ""),
			"address":  request(f.ByKey("dev-1", f.OwnKey), "192.0.2.2:1", ""),
		} {
			before := behind.registers.Load()
			if _, err := l.Register(t.Context(), r); code(err) != 401 || behind.registers.Load() != before+1 {
				t.Errorf("another %s: %v, %d judgements", name, err, behind.registers.Load()-before)
			}
		}
		if _, err := l.Status(t.Context(), wrong, "5.x"); code(err) != 401 || behind.others.Load() != 1 {
			t.Errorf("another question: %v", err)
		}
		for range 25 {
			_, _ = l.Register(t.Context(), wrong)
		}
		good := request(f.Derived("dev-1"), "192.0.2.1:1", "")
		if deferred, st, err := run(t, l, good); err != nil || st.Status != dps.Assigned || deferred != 0 {
			t.Errorf("mended: %+v, %v", st, err)
		}
		// An operator makes the wrong key the right one: it counts at the next judgement.
		f.Put(t, registration.Individual, "dev-1", registrationtest.Symmetric(f.OwnKey, nil))
		time.Sleep(30 * time.Second)
		if _, st, err := run(t, l, wrong); err != nil || st.Status != dps.Assigned {
			t.Errorf("enrolled since: %+v, %v", st, err)
		}
	})
}

// challenging is a service that has TPMs prove themselves.
type challenging struct{ registration.Registrar }

func (challenging) Register(context.Context, *registration.Request) (*dps.OperationStatus, error) {
	return nil, &registration.Challenge{Blob: []byte{1}, Refusal: dps.NewError(dps.CodeUnauthorized, "Unauthorized", nil)}
}

// A challenge is an answer and no refusal.
func TestChallengeIsNoRefusal(t *testing.T) {
	l, behind := behind(challenging{}, limit.Config{})
	for range 20 {
		_, err := l.Register(t.Context(), request(registrationtest.Device{Scope: registrationtest.Scope, ID: "tpm-1"}, "192.0.2.1:1", ""))
		if c := (*registration.Challenge)(nil); !errors.As(err, &c) {
			t.Fatal(err)
		}
	}
	if n := behind.registers.Load(); n != 20 {
		t.Errorf("%d challenges", n)
	}
}

// Octets of bodies are counted by scope.
func TestBytes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := registrationtest.NewFixture(t, hub)
		l, _ := behind(f.Service, limit.Config{})
		body := `{"payload":"` + strings.Repeat("x", 60<<10) + `"}`
		var served, refused int
		for i := range 400 { // 24 MiB
			switch _, err := l.Register(t.Context(), request(f.Derived(fmt.Sprintf("dev-%d", i)), fmt.Sprintf("192.0.2.%d:1", i%250), body)); code(err) {
			case 429:
				refused++
			case 0:
				served++
			default:
				t.Fatal(err)
			}
		}
		if served != 16<<20/len(body) || refused != 400-served {
			t.Errorf("%d served, %d refused", served, refused)
		}
		if st, err := l.Register(t.Context(), request(f.Derived("dev-1"), "192.0.2.1:1", "")); err != nil || ticket(st.OperationID) {
			t.Errorf("without a body: %+v, %v", st, err)
		}
	})
}

// slow is a service of many scopes whose every answer takes a while.
type slow struct {
	registration.Registrar
	takes map[string]time.Duration
	now   atomic.Int64
	most  atomic.Int64
}

func (s *slow) Register(_ context.Context, req *registration.Request) (*dps.OperationStatus, error) {
	for n, m := s.now.Add(1), s.most.Load(); n > m && !s.most.CompareAndSwap(m, n); m = s.most.Load() {
	}
	defer s.now.Add(-1)
	time.Sleep(s.takes[req.IDScope])
	return &dps.OperationStatus{OperationID: "5.x", Status: dps.Assigning}, nil
}

// A flood in one scope, of fifty times what another scope asks, does not slow that one down; nor does one whose work hangs.
func TestFairness(t *testing.T) {
	const n = 250 // of scope B, in five seconds
	for name, takes := range map[string]time.Duration{"busy": 20 * time.Millisecond, "hanging": time.Minute} {
		t.Run(name, func(t *testing.T) {
			measure := func(flood bool) (p50, p99 time.Duration) {
				synctest.Test(t, func(t *testing.T) {
					s := &slow{takes: map[string]time.Duration{"a": takes, "b": 20 * time.Millisecond}}
					l := limit.New(limit.Config{Registrar: s, Scopes: func(string) bool { return true }, Places: 32, PerScope: -1, PerAddress: -1})
					register := func(scope string, i int) (time.Duration, error) {
						start := time.Now()
						st, err := l.Register(t.Context(), request(registrationtest.Device{Scope: scope, ID: fmt.Sprintf("dev-%d", i)}, "192.0.2.1:1", ""))
						if err == nil && ticket(st.OperationID) {
							err = errors.New("put off")
						}
						return time.Since(start), err
					}
					var wg sync.WaitGroup
					var inTime atomic.Int64
					if flood {
						for i := range 50 * n {
							wg.Go(func() {
								time.Sleep(time.Duration(i) * 5 * time.Second / (50 * n))
								if _, err := register("a", i); err == nil {
									inTime.Add(1)
								}
							})
						}
					}
					took := make([]time.Duration, n)
					for i := range took {
						wg.Go(func() {
							time.Sleep(time.Duration(i)*5*time.Second/n + 7*time.Microsecond)
							var err error
							if took[i], err = register("b", i); err != nil {
								t.Errorf("scope B was not served: %v", err)
							}
						})
					}
					wg.Wait()
					if s.most.Load() > 32 {
						t.Errorf("%d requests were worked on at a time", s.most.Load())
					}
					if flood {
						t.Logf("of %d requests of scope A %d were served at once, the rest put off", 50*n, inTime.Load())
					}
					slices.Sort(took)
					p50, p99 = took[len(took)/2], took[len(took)*99/100]
				})
				return p50, p99
			}
			i50, i99 := measure(false)
			f50, f99 := measure(true)
			t.Logf("scope B alone: p50 %v, p99 %v; while A floods: p50 %v, p99 %v", i50, i99, f50, f99)
			// Simulated time: it is what was waited, and not how fast this machine is.
			if f99 > 2*i99 {
				t.Errorf("scope B waits: p99 %v, and %v while A floods", i99, f99)
			}
		})
	}
}

// Scopes that wait get places in turn, however many wait in each.
func TestTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &slow{takes: map[string]time.Duration{"a": time.Millisecond, "b": time.Millisecond, "c": time.Millisecond}}
		l := limit.New(limit.Config{Registrar: s, Scopes: func(string) bool { return true }, Places: 1})
		var mu sync.Mutex
		var order string
		var wg sync.WaitGroup
		for _, x := range []struct {
			scope string
			n     int
		}{{"a", 100}, {"b", 3}, {"c", 10}} {
			for i := range x.n {
				wg.Go(func() {
					st, err := l.Register(t.Context(), request(registrationtest.Device{Scope: x.scope, ID: fmt.Sprintf("dev-%d", i)}, "192.0.2.1:1", ""))
					if err != nil || ticket(st.OperationID) {
						t.Errorf("%s: %+v, %v", x.scope, st, err)
					}
					mu.Lock()
					defer mu.Unlock()
					order += x.scope
				})
				synctest.Wait()
			}
		}
		wg.Wait()
		if want := "a" + strings.Repeat("abc", 3) + strings.Repeat("ac", 7) + strings.Repeat("a", 89); order != want {
			t.Errorf("order %s\nwant  %s", order, want)
		}
	})
}

// More names in one scope than are told apart take nothing from another's.
func TestNames(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := limit.New(limit.Config{Registrar: &slow{}, Scopes: func(string) bool { return true }, Keys: 1000})
		put := map[string]int{}
		for i := range 10_000 {
			time.Sleep(100 * time.Microsecond)
			for _, scope := range []string{"a", "b"} {
				if scope == "b" && i%100 != 0 {
					continue
				}
				st, err := l.Register(t.Context(), request(registrationtest.Device{Scope: scope, ID: fmt.Sprintf("dev-%d", i)}, fmt.Sprintf("192.0.%d.%d:1", i>>8, i&0xff), ""))
				if err != nil || ticket(st.OperationID) {
					put[scope]++
				}
			}
		}
		if put["a"] < 9_000 || put["b"] != 0 {
			t.Errorf("put off: %v", put)
		}
	})
}

// A request whose caller is gone gives its turn up.
func TestGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &slow{takes: map[string]time.Duration{"a": time.Hour}}
		l := limit.New(limit.Config{Registrar: s, Scopes: func(string) bool { return true }, Places: 4, Wait: time.Minute, Queue: 2})
		ctx, gone := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		start := time.Now()
		register := func(i int) (*dps.OperationStatus, error) {
			return l.Register(ctx, request(registrationtest.Device{Scope: "a", ID: fmt.Sprintf("dev-%d", i)}, "192.0.2.1:1", ""))
		}
		for i := range 5 { // three places, two in the queue
			wg.Go(func() {
				st, err := register(i)
				if took := time.Since(start); err != nil || ticket(st.OperationID) != (took == time.Second) {
					t.Errorf("%+v, %v after %v", st, err, took)
				}
			})
		}
		synctest.Wait()
		if st, err := register(5); err != nil || !ticket(st.OperationID) || time.Since(start) != 0 {
			t.Errorf("the queue is full: %+v, %v", st, err)
		}
		time.Sleep(time.Second)
		gone()
		wg.Wait()
	})
}
