package load

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/device"
	"github.com/touchmark/touchmark/pkg/door"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/httpd"
	"github.com/touchmark/touchmark/pkg/mqttd"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
	"github.com/touchmark/touchmark/pkg/sqlstore"
)

const hub = "hub-a.example.net"

// today makes a certificate good today.
func today(c *x509.Certificate) {
	c.NotBefore, c.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
}

// start runs a service on the real clock, with doors that are impatient, and returns how to put load on it. Registrar may
// wrap the service that devices meet.
func start(t *testing.T, wrap func(registration.Registrar) registration.Registrar) Config {
	t.Helper()
	store, err := sqlstore.Open(t.Context(), sqlstore.Config{Path: filepath.Join(t.TempDir(), "service.db"), DataKey: bytes.Repeat([]byte{7}, 32)})
	if err != nil {
		t.Fatal(err)
	}
	svc := registration.New(registration.Config{Store: store, Scope: registrationtest.Scope, Settings: registration.Settings{Hubs: registration.Records(hub, "hub-b.example.net")}})
	key := bytes.Repeat([]byte("g"), 64)
	root := attesttest.CA(t, nil, "factory root", today)
	put := func(id string, a dps.Attestation) {
		b, err := json.Marshal(dps.EnrollmentGroup{EnrollmentGroupID: id, Enrollment: dps.Enrollment{Attestation: &a}})
		if err == nil {
			_, err = svc.PutEnrollment(t.Context(), registration.Actor{}, registration.Group, id, b, "")
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	put("keys", dps.Attestation{Type: dps.AttestationSymmetricKey, SymmetricKey: &dps.SymmetricKeyAttestation{
		PrimaryKey: base64.StdEncoding.EncodeToString(key), SecondaryKey: base64.StdEncoding.EncodeToString(make([]byte, 32))}})
	put("line", *registrationtest.Signers(root, nil).Attestation)

	server := attesttest.Leaf(t, nil, "dps.example.net", today)
	dc := door.Config{TLS: door.TLSConfig(func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return server.TLS(), nil }, "http/1.1"), HandshakeTimeout: time.Second}
	var reg registration.Registrar = svc
	if wrap != nil {
		reg = wrap(svc)
	}
	ws := door.New(dc)
	handle := func(protocol string) door.Handler {
		return mqttd.New(mqttd.Config{Registrar: reg, Protocol: protocol, ResponseDelay: -1, Second: 100 * time.Millisecond}).Handle
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error)
	cfg := Config{Endpoints: make(map[string]*Endpoint), RootCAs: x509.NewCertPool(), Prefix: "load", Devices: 200,
		Hubs:         []string{hub, "hub-b.example.net"},
		Attestations: []Attestation{Symmetric(registrationtest.Scope, "keys", 1, key), X509(registrationtest.Scope, 1, []*x509.Certificate{root.Certificate}, root.Key)}}
	cfg.RootCAs.AddCert(server.Certificate)
	doors := map[string]func(net.Listener) error{
		"https": func(l net.Listener) error {
			return httpd.New(httpd.Config{Registrar: reg, Door: door.New(dc), HeaderTimeout: time.Second}).Serve(ctx, l)
		},
		"mqtt": func(l net.Listener) error { return door.New(dc).Serve(ctx, l, handle("mqtt")) },
		"mqtt-ws": func(l net.Listener) error {
			srv := &http.Server{ReadHeaderTimeout: time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if c, err := websocket.Accept(w, r, &websocket.AcceptOptions{Subprotocols: []string{"mqtt"}}); err == nil {
					ws.Handle(ctx, &door.Conn{Conn: websocket.NetConn(ctx, c, websocket.MessageBinary), Remote: r.RemoteAddr, Certificates: r.TLS.PeerCertificates}, handle("mqtt-ws"))
				}
			})}
			defer context.AfterFunc(ctx, func() { _ = srv.Close() })()
			_ = srv.Serve(ws.Listener(ctx, l))
			return nil
		},
	}
	for protocol, serve := range doors {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		go func() { done <- serve(l) }()
		if cfg.Endpoints[protocol], err = Resolve(t.Context(), l.Addr().String(), false); err != nil {
			t.Fatal(err)
		}
		cfg.Protocols = append(cfg.Protocols, Weight{protocol, 1})
	}
	t.Cleanup(func() {
		stop()
		for range doors {
			if err := <-done; err != nil {
				t.Errorf("serving: %v", err)
			}
		}
		_ = store.Close()
	})
	return cfg
}

// Every protocol with every attestation, devices that come again, and every other caller hostile in every way: no answer is
// wrong, nobody is left without one.
func TestRun(t *testing.T) {
	cfg := start(t, nil)
	cfg.Concurrency, cfg.Duration, cfg.Ramp, cfg.Reconnect, cfg.Hostile = 8, 5*time.Second, 100*time.Millisecond, 0.3, 0.5
	cfg.WatchPID, cfg.ResumeTLS = os.Getpid(), true
	if runtime.GOOS == "linux" {
		cfg.Sources = 4
	}
	var told atomic.Uint64
	cfg.Progress = func(p Progress) { told.Store(p.Done) }
	rep, err := Run(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	if rep.Wrong > 0 || rep.ErrorShare > 0 || len(rep.Lines) != 6 || rep.Total.Assigned != rep.Total.Count || told.Load() == 0 {
		t.Errorf("%+v, wrong: %q", rep.Total, rep.Wrongs)
	}
	for _, l := range rep.Lines {
		if l.Assigned == 0 || l.In == 0 || l.Out == 0 || l.Latency.P50 <= 0 || l.Latency.P50 > l.Latency.P99 || l.Latency.P99 > l.Latency.Max || l.Histogram.Count() != l.Assigned {
			t.Errorf("%+v", l)
		}
	}
	for _, h := range harms() {
		i := slices.IndexFunc(rep.Hostile, func(o Hostile) bool { return o.Kind == h.kind })
		if i < 0 || rep.Hostile[i].Count == 0 || len(rep.Hostile[i].Errors) > 0 {
			t.Errorf("%s: %+v", h.kind, rep.Hostile)
		}
	}
	if w := rep.Watch; runtime.GOOS == "linux" && (w.First.RSS == 0 || w.Last.Files == 0 || len(w.Series) == 0 || w.Err != "" || w.CPU == 0) {
		t.Errorf("%+v", w)
	}
}

// liar tells devices what they must not be told.
type liar struct {
	registration.Registrar
	register func(*registration.Request, *dps.OperationStatus, error) (*dps.OperationStatus, error)
	status   func(*registration.Request, *dps.OperationStatus, error) (*dps.OperationStatus, error)
}

func (l *liar) Register(ctx context.Context, r *registration.Request) (*dps.OperationStatus, error) {
	st, err := l.Registrar.Register(ctx, r)
	if l.register != nil {
		return l.register(r, st, err)
	}
	return st, err
}

func (l *liar) Status(ctx context.Context, r *registration.Request, op string) (*dps.OperationStatus, error) {
	st, err := l.Registrar.Status(ctx, r, op)
	if l.status != nil {
		return l.status(r, st, err)
	}
	return st, err
}

// What the service says that must not be is found: a load that finds nothing has looked.
func TestWrongAnswers(t *testing.T) {
	type tell = func(*registration.Request, *dps.OperationStatus, error) (*dps.OperationStatus, error)
	answer := func(edit func(*dps.OperationStatus)) tell {
		return func(_ *registration.Request, st *dps.OperationStatus, err error) (*dps.OperationStatus, error) {
			if err != nil {
				return nil, err
			}
			o := *st
			edit(&o)
			return &o, nil
		}
	}
	state := func(edit func(*dps.RegistrationState)) tell {
		return answer(func(st *dps.OperationStatus) {
			if st.RegistrationState != nil {
				s := *st.RegistrationState
				edit(&s)
				st.RegistrationState = &s
			}
		})
	}
	refuse := func(code dps.Code) tell {
		return func(*registration.Request, *dps.OperationStatus, error) (*dps.OperationStatus, error) {
			return nil, dps.NewError(code, "No", nil)
		}
	}
	for name, c := range map[string]struct {
		liar
		text string
		busy bool // no answer, and not a wrong one
	}{
		"another's device ID":  {liar: liar{status: state(func(s *dps.RegistrationState) { s.DeviceID = "load-other" })}, text: "device ID"},
		"another's ID":         {liar: liar{status: state(func(s *dps.RegistrationState) { s.RegistrationID = "load-other" })}, text: "registration ID"},
		"foreign hub":          {liar: liar{status: state(func(s *dps.RegistrationState) { s.AssignedHub = "hub-x.example.net" })}, text: "hub"},
		"new again":            {liar: liar{status: state(func(s *dps.RegistrationState) { s.Substatus = dps.InitialAssignment })}, text: "substatus"},
		"never new":            {liar: liar{status: state(func(s *dps.RegistrationState) { s.Substatus = dps.ReprovisionedToInitialAssignment })}, text: "substatus"},
		"other group":          {liar: liar{status: state(func(s *dps.RegistrationState) { s.SymmetricKey = &dps.SymmetricKeyState{EnrollmentGroupID: "x"} })}, text: "group"},
		"inside is not out":    {liar: liar{status: state(func(s *dps.RegistrationState) { s.Status = dps.Failed })}, text: "inside"},
		"refused":              {liar: liar{register: refuse(dps.CodeUnauthorized)}, text: "refused"},
		"refused later":        {liar: liar{status: refuse(dps.CodeNotFound)}, text: "refused"},
		"busy":                 {liar: liar{register: refuse(dps.CodeThrottled)}, busy: true},
		"down":                 {liar: liar{status: refuse(dps.CodeServiceOverloaded)}, busy: true},
		"the end is no end":    {liar: liar{status: answer(func(st *dps.OperationStatus) { st.RegistrationState = nil })}, text: "nothing more"},
		"no state":             {liar: liar{status: answer(func(st *dps.OperationStatus) { st.Status, st.RegistrationState = dps.Assigning, nil })}, text: "without a registrationState"},
		"another's operation":  {liar: liar{status: answer(func(st *dps.OperationStatus) { st.OperationID = "other" })}, text: "operation"},
		"disabled":             {liar: liar{status: state(func(s *dps.RegistrationState) { s.Status = dps.Disabled })}, text: "disabled"},
		"whoever comes is let": {liar: liar{register: lenient, status: lenient}, text: "assigned"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cfg := start(t, func(r registration.Registrar) registration.Registrar { c.Registrar = r; return &c.liar })
			cfg.Concurrency, cfg.Duration, cfg.Devices, cfg.Hostile, cfg.Timeout = 4, time.Minute, 8, 0.2, 2*time.Second
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			cfg.Progress = func(p Progress) {
				if p.Wrong > 0 || c.busy && p.Done > 10 { // found, or looked for
					stop()
				}
			}
			rep, err := Run(ctx, cfg)
			if !errors.Is(err, context.Canceled) {
				t.Fatalf("nothing was found: %+v, %v", rep, err)
			}
			found := slices.ContainsFunc(rep.Wrongs, func(s string) bool { return strings.Contains(s, c.text) })
			if c.busy != (rep.Wrong == 0) || !c.busy && !found || c.busy && rep.ErrorShare != 1 {
				t.Errorf("%d wrong answers, %.2f errors %v: %q", rep.Wrong, rep.ErrorShare, rep.Total.Errors, rep.Wrongs)
			}
		})
	}
}

func lenient(r *registration.Request, st *dps.OperationStatus, err error) (*dps.OperationStatus, error) {
	if err != nil {
		now := dps.Time{Time: time.Now()}
		st = &dps.OperationStatus{OperationID: "any", Status: dps.Assigned, RegistrationState: &dps.RegistrationState{RegistrationID: r.RegistrationID,
			Status: dps.Assigned, AssignedHub: hub, DeviceID: r.RegistrationID, Substatus: dps.InitialAssignment, CreatedDateTimeUTC: &now}}
	}
	return st, nil
}

// slow holds every register request until the test lets go, or for a while.
type slow struct {
	registration.Registrar
	wait func()
}

func (s *slow) Register(ctx context.Context, r *registration.Request) (*dps.OperationStatus, error) {
	s.wait()
	return s.Registrar.Register(ctx, r)
}

// A service that is slow shows as latency: the time counts from when a device should have called, though there was no place for
// it then.
func TestCoordinatedOmission(t *testing.T) {
	cfg := start(t, func(r registration.Registrar) registration.Registrar {
		return &slow{r, func() { time.Sleep(50 * time.Millisecond) }}
	})
	cfg.Rate, cfg.Duration, cfg.MaxOutstanding = 100, 2*time.Second, 2
	rep, err := Run(t.Context(), cfg)
	if err != nil || rep.Wrong > 0 || rep.Client.Full == 0 || rep.Total.Count != 200 || rep.Total.Errors["never sent off"] == 0 {
		t.Fatalf("%+v, %v", rep, err)
	}
	for _, p := range rep.Phases {
		if p.Name == "register" && rep.Total.Latency.Max < 4*p.Latency.Max {
			t.Errorf("the longest wait was %v ms, and for one answer over %s %v ms", rep.Total.Latency.Max, p.Protocol, p.Latency.Max)
		}
	}
}

// Whoever stops a load gets what there is, at once, and leaves nobody behind.
func TestStop(t *testing.T) {
	let := make(chan struct{})
	var calls atomic.Int32
	ctx, stop := context.WithCancel(t.Context())
	cfg := start(t, func(r registration.Registrar) registration.Registrar {
		return &slow{r, func() {
			if calls.Add(1) > 20 {
				stop()
				<-let
			}
		}}
	})
	cfg.Rate, cfg.Duration, cfg.Hostile = 200, time.Hour, 0.2
	rep, err := Run(ctx, cfg)
	close(let)
	if !errors.Is(err, context.Canceled) || rep == nil || rep.Total.Assigned == 0 || rep.Wrong > 0 || rep.ErrorShare > 0 {
		t.Errorf("%+v, %v", rep, err)
	}
}

func TestConfig(t *testing.T) {
	base := start(t, nil)
	base.Rate, base.Duration = 1, time.Second
	for why, edit := range map[string]func(*Config){
		"no devices": func(c *Config) { c.Devices = 0 }, "no time": func(c *Config) { c.Duration = 0 }, "all ramp": func(c *Config) { c.Ramp = time.Hour },
		"both": func(c *Config) { c.Concurrency = 1 }, "neither": func(c *Config) { c.Rate = 0 }, "share": func(c *Config) { c.Hostile = 1.5 },
		"no endpoint": func(c *Config) { c.Protocols = Mix{{"amqp", 1}} }, "nobody": func(c *Config) { c.Attestations = nil },
		"no way": func(c *Config) { c.Attestations[0].Protocols = []string{"amqp"} }, "sources": func(c *Config) { c.Sources = 1000 },
		"foreign CA": func(c *Config) { c.RootCAs = x509.NewCertPool() },
	} {
		cfg := base
		cfg.Attestations = slices.Clone(base.Attestations)
		edit(&cfg)
		if rep, err := Run(t.Context(), cfg); err == nil || rep != nil {
			t.Errorf("%s: %+v, %v", why, rep, err)
		}
	}
}

func TestResolve(t *testing.T) {
	for name, ok := range map[string]bool{"127.0.0.1:443": true, "[::1]:443": true, "localhost:8883": true, "[::ffff:127.0.0.1]:1": true,
		"192.0.2.1:443": false, "[2001:db8::1]:443": false, "0.0.0.0:443": false, "[::]:443": false, "[::ffff:192.0.2.1]:443": false, "169.254.0.1:1": false} {
		_, err := Resolve(t.Context(), name, false)
		if ok != (err == nil) || !ok && !errors.Is(err, ErrNotLoopback) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := Resolve(t.Context(), name, true); err != nil {
			t.Errorf("%s, anywhere: %v", name, err)
		}
	}
	for _, name := range []string{"", "localhost", "localhost:nothing", "localhost:99999"} {
		if _, err := Resolve(t.Context(), name, true); err == nil {
			t.Errorf("%q is an endpoint", name)
		}
	}
}

func TestMix(t *testing.T) {
	m, err := ParseMix("https=3,mqtt,amqp=0", "https", "mqtt", "amqp")
	if err != nil || !slices.Equal(m, Mix{{"https", 3}, {"mqtt", 1}}) {
		t.Errorf("%v, %v", m, err)
	}
	n := make([]int, 2)
	for range 4000 {
		n[m.pick()]++
	}
	if n[0] < 2*n[1] || n[0] > 4*n[1] {
		t.Errorf("3 to 1 became %v", n)
	}
	for _, s := range []string{"", "coap", "https=-1", "https=x", "https=01", "https=9999999", "https,https", "https=0", "https,", "https= 1"} {
		if m, err := ParseMix(s, "https", "mqtt"); err == nil {
			t.Errorf("%q is %v", s, m)
		}
	}
}

// Percentiles are as exact as the histogram says, whatever the durations.
func TestHistogram(t *testing.T) {
	var h, half Histogram
	var all []time.Duration
	rnd := rand.New(rand.NewPCG(1, 2))
	for i := range 20_000 {
		d := time.Duration(rnd.ExpFloat64() * float64(rnd.IntN(1000)) * float64(time.Millisecond))
		all = append(all, d)
		if i%2 == 0 {
			h.Add(d)
		} else {
			half.Add(d)
		}
	}
	h.Merge(&half)
	slices.Sort(all)
	for _, q := range []float64{0, 0.01, 0.5, 0.9, 0.99, 0.999, 1} {
		want := all[max(int(q*float64(len(all)))-1, 0)]
		if got := h.Quantile(q); got < want || float64(got) > float64(want)*1.016+float64(time.Microsecond) {
			t.Errorf("quantile %v is %v, want %v", q, got, want)
		}
	}
	if h.Max() != all[len(all)-1] || h.Count() != uint64(len(all)) {
		t.Errorf("%d, at most %v", h.Count(), h.Max())
	}
	var last time.Duration
	for i := range h.counts {
		from, to := bounds(i)
		if from != last || to <= from || bucketOf(from) != i || bucketOf(to-1) != i {
			t.Fatalf("bucket %d is from %v to %v, and the one before to %v", i, from, to, last)
		}
		last = to
	}
	h.Add(1 << 62)
	h.Add(-1)
}

func TestDue(t *testing.T) {
	const rate, ramp = 100.0, 10 * time.Second
	var last time.Duration
	byRamp := 0
	for n := range uint64(2000) {
		d := due(n, rate, ramp)
		if d < last {
			t.Fatalf("caller %d is due at %v, after %v", n, d, last)
		}
		if last = d; d < ramp {
			byRamp++
		}
	}
	if byRamp != 500 || due(1500, rate, ramp).Round(time.Millisecond) != 20*time.Second || due(50, rate, 0) != time.Second/2 {
		t.Errorf("%d in the ramp, the 1500th at %v, the 50th without ramp at %v", byRamp, due(1500, rate, ramp), due(50, rate, 0))
	}
}

// A series stays small however long it is, and the averages are of the first and the last minute.
func TestWatch(t *testing.T) {
	w := &Watch{}
	for i := range 100_000 {
		w.add(Sample{Seconds: float64(i), RSS: int64(i), CPU: float64(i) / 2})
	}
	w.finish()
	if len(w.Series) > maxSeries || len(w.Series) < maxSeries/2-1 || w.First.RSS != 29 || w.Last.RSS != 99_969 || w.CPU != 0.5 {
		t.Errorf("%d samples, %+v, %+v", len(w.Series), w.First, w.Last)
	}
	for i := range w.Series[1:] {
		if w.Series[i+1].Seconds-w.Series[i].Seconds != float64(w.each) {
			t.Fatalf("samples %d apart: %v, %v", w.each, w.Series[i], w.Series[i+1])
		}
	}
}

// Who asks for another's operation and is put off before anything was looked at asks again, and wants 404 then.
func TestPutOff(t *testing.T) {
	for name, c := range map[string]struct {
		puts  int32
		state func(*registration.Request) *dps.RegistrationState
		wrong bool
	}{
		"once": {puts: 1, state: func(*registration.Request) *dps.RegistrationState { return nil }},
		"of itself": {puts: 1, state: func(r *registration.Request) *dps.RegistrationState {
			return &dps.RegistrationState{RegistrationID: r.RegistrationID, Status: dps.Assigning}
		}},
		"of another": {puts: 1, wrong: true, state: func(*registration.Request) *dps.RegistrationState {
			return &dps.RegistrationState{RegistrationID: "another", Status: dps.Assigning}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var asked atomic.Int32
			cfg := start(t, func(r registration.Registrar) registration.Registrar {
				return &liar{Registrar: r, status: func(r *registration.Request, st *dps.OperationStatus, err error) (*dps.OperationStatus, error) {
					if asked.Add(1) > c.puts {
						return st, err
					}
					return &dps.OperationStatus{OperationID: "5.x", Status: dps.Assigning, RetryAfter: "5", RegistrationState: c.state(r)}, nil
				}}
			})
			cfg.Concurrency, cfg.Duration, cfg.Devices = 1, time.Second, 1
			if err := cfg.check(); err != nil {
				t.Fatal(err)
			}
			var err error
			if cfg.shared, err = tlsConfigs(&cfg, device.Config{}); err != nil {
				t.Fatal(err)
			}
			tribes, err := populate(t.Context(), &cfg)
			if err != nil {
				t.Fatal(err)
			}
			r := &run{cfg: &cfg, tribes: tribes, ledger: newLedger(&cfg)}
			wrong, err := r.mustNotFind(t.Context(), tribes[0].honest, "https", "5.0123456789abcdef.00000000-0000-4000-8000-000000000000")
			if (wrong != "") != c.wrong || err != nil || !c.wrong && asked.Load() != c.puts+1 {
				t.Errorf("%q, %v, asked %d times", wrong, err, asked.Load())
			}
		})
	}
}
