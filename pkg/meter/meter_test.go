package meter_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/touchmark/touchmark/hsm/hsmtest"
	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/meter"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

// samples are the metrics that a meter serves, as Prometheus' own strict parser reads them.
func samples(t *testing.T, m *meter.Meter) map[string]float64 {
	t.Helper()
	const program = `import json, sys
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse
out = {}
for family in parse(sys.stdin.read()):
    for s in family.samples:
        key = s.name + "{" + ",".join("%s=%s" % l for l in sorted(s.labels.items())) + "}"
        assert key not in out, key
        out[key] = s.value
json.dump(out, sys.stdout)
`
	r := httptest.NewRequest("GET", "/metrics", nil)
	r.Header.Set("Accept", "application/openmetrics-text; version=1.0.0")
	w := httptest.NewRecorder()
	m.Metrics().ServeHTTP(w, r)
	if w.Code != 200 || !strings.HasPrefix(w.Header().Get("Content-Type"), "application/openmetrics-text") {
		t.Fatalf("%d %s\n%s", w.Code, w.Header().Get("Content-Type"), w.Body)
	}
	cmd := exec.Command("/usr/bin/python3", "-c", program)
	cmd.Stdin = w.Body
	text := w.Body.String()
	out, err := cmd.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) && !bytes.Contains(exit.Stderr, []byte("ModuleNotFoundError")) {
			t.Fatalf("%s\n%s", exit.Stderr, text)
		}
		hsmtest.Require(t, "python3-prometheus-client")
	}
	all := make(map[string]float64)
	if err := json.Unmarshal(out, &all); err != nil {
		t.Fatal(err)
	}
	return all
}

// a hub that answers as it is told.
type toldHub struct {
	registration.Hub
	err error
}

func (h *toldHub) Check(context.Context) error { return h.err }

// DPS-S 101: each metric moves by one for one event, and no other of ours does.
func TestMetrics(t *testing.T) {
	f := registrationtest.NewFixture(t)
	m := meter.New(meter.Config{Store: f.Store, Now: f.Now, Known: func(scope string) bool { return scope == strings.ToLower(registrationtest.Scope) }})
	hubs := []string{"hub-a.example"}
	service := func() *registration.Service {
		return registration.New(registration.Config{Store: m.Store(f.Store), Scope: registrationtest.Scope, Settings: registration.Settings{Hubs: registration.Records(hubs...)}, Now: f.Now, Attempt: m.Attempt})
	}
	s := service()
	scope := "scope=" + strings.ToLower(registrationtest.Scope)
	req := func(d registrationtest.Device) *registration.Request {
		return &registration.Request{IDScope: d.Scope, RegistrationID: d.ID, APIVersion: d.APIVersion, Proof: attest.Proof{Token: d.Token}, Protocol: "mqtt", Remote: "192.0.2.1:1"}
	}
	var operation string
	register := func(s *registration.Service, d registrationtest.Device) {
		if st, err := m.Registrar(s).Register(t.Context(), req(d)); err == nil {
			operation = st.OperationID
		}
	}
	call := func(method, path string, status int) {
		h := m.Handler(func(*http.Request) string { return strings.ToLower(registrationtest.Scope) }, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(status) }))
		h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest(method, path, nil))
	}
	const p = "touchmark_dps_"
	attest := func(status string) string {
		return p + "attestation_attempts_total{kind=symmetricKey,protocol=mqtt," + scope + ",status=" + status + "}"
	}
	devices := func(operation, code string) []string {
		return []string{p + "device_requests_total{code=" + code + ",operation=" + operation + "}", p + "device_request_duration_seconds_count{operation=" + operation + "}"}
	}
	down := &toldHub{err: &registration.HubError{Hub: "hub-b", Err: errors.New("nobody there"), Temporary: true}}
	broken := errors.New("disk on fire")
	for _, c := range []struct {
		name string
		do   func()
		want []string
	}{
		{"assigned", func() { register(s, f.Derived("dev-1")) }, append(devices("register", "200"), attest("success"),
			p+"registration_attempts_total{hub=hub-a.example,"+scope+",status=assigned}", p+"device_assignments_total{hub=hub-a.example,"+scope+",substatus=initialAssignment}")},
		{"asked again", func() { _, _ = m.Registrar(s).Status(t.Context(), req(f.Derived("dev-1")), operation) }, devices("status", "200")},
		{"looked up", func() { _, _ = m.Registrar(s).Lookup(t.Context(), req(f.Derived("dev-1"))) }, devices("lookup", "200")},
		{"refused", func() { register(s, f.ByKey("own-key", []byte("a key of somebody else's"))) }, append(devices("register", "401"), attest("unauthorized"),
			p+"registration_attempts_total{hub=none,"+scope+",status=refused}")},
		{"no hub", func() { hubs = nil; register(service(), f.Derived("dev-2")) }, append(devices("register", "200"), attest("success"), p+"registration_attempts_total{hub=none,"+scope+",status=failed}")},
		{"disabled", func() {
			e := registrationtest.Symmetric(f.OwnKey, nil)
			e.ProvisioningStatus = dps.EnrollmentDisabled
			f.Put(t, registration.Individual, "own-key", e)
			register(s, f.ByKey("own-key", f.OwnKey))
		}, append(devices("register", "200"), attest("disabled"), p+"registration_attempts_total{hub=none,"+scope+",status=disabled}")},
		{"registered, and not yet at its hub", func() {
			m.Attempt(strings.ToLower(registrationtest.Scope), &registration.Attempt{Operation: "register", Result: "assigning", Protocol: "mqtt", Proof: "symmetricKey"})
		}, []string{attest("success")}},
		{"at its hub", func() {
			p := registration.Provisioning{Hub: "hub-a.example", Outcome: "assigned", Substatus: dps.DeviceDataMigrated}
			m.Attempt(strings.ToLower(registrationtest.Scope), p.Attempt(f.Now()))
		}, []string{p + "registration_attempts_total{hub=hub-a.example," + scope + ",status=assigned}", p + "device_assignments_total{hub=hub-a.example," + scope + ",substatus=deviceDataMigrated}"}},
		{"an operation", func() { call("GET", "/enrollments/dev-1?api-version=2021-10-01", 200) }, []string{p + "service_requests_total{api_version=2021-10-01,code=200,operation=enrollment.get}",
			p + "service_request_duration_seconds_count{operation=enrollment.get}"}},
		{"a refused one", func() { call("POST", "/enrollmentGroups/query?api-version=made-up", 401) }, []string{p + "service_requests_total{api_version=other,code=401,operation=group.query}",
			p + "service_request_duration_seconds_count{operation=group.query}"}},
		{"a device's, at the same door", func() { call("GET", "/0neX/registrations/dev/operations/op", 200) }, nil},
		{"throttled", func() { m.Throttled("service", "operations") }, []string{p + "throttled_total{api=service,limit=operations}"}},
		{"a webhook", func() { m.Webhook("200", time.Second) }, []string{p + "webhook_requests_total{code=200}", p + "webhook_request_duration_seconds_count{}"}},
		{"a hub that answers", func() { _ = m.WatchHub("hub-a", &toldHub{}).Check(t.Context()) }, []string{p + "hub_requests_total{code=ok,hub=hub-a,operation=check}",
			p + "hub_request_duration_seconds_count{hub=hub-a,operation=check}", p + "hub_up{hub=hub-a}"}},
		{"a hub that does not", func() { _ = m.WatchHub("hub-b", down).Check(t.Context()) }, []string{p + "hub_requests_total{code=unreachable,hub=hub-b,operation=check}",
			p + "hub_request_duration_seconds_count{hub=hub-b,operation=check}"}},
		{"lost attempts", func() { m.Lost(1) }, []string{p + "attempts_lost_total{}"}},
		{"a store that fails", func() {
			_ = m.Store(f.Store).Update(t.Context(), func(registration.Tx) error { return broken })
		}, []string{p + "store_errors_total{kind=update}", p + "store_duration_seconds_count{kind=update}"}},
		{"a refusal in the store", func() {
			_ = m.Store(f.Store).View(t.Context(), func(registration.Tx) error { return registration.ErrNotFound })
		}, []string{p + "store_duration_seconds_count{kind=view}"}},
	} {
		before := samples(t, m)
		c.do()
		after := samples(t, m)
		var moved []string
		for _, name := range slices.Sorted(maps.Keys(after)) {
			if !strings.HasPrefix(name, p) || strings.Contains(name, "_bucket{") || strings.Contains(name, "_sum{") || strings.Contains(name, "_created{") ||
				strings.HasPrefix(name, p+"store_duration") && !strings.Contains(c.name, "store") { // how many transactions a request takes is not ours to say
				continue
			}
			if by := after[name] - before[name]; by != 0 {
				if by != 1 {
					t.Errorf("%s: %s moved by %v", c.name, name, by)
				}
				moved = append(moved, name)
			}
		}
		if slices.Sort(c.want); !slices.Equal(moved, c.want) {
			t.Errorf("%s: moved\n  %s\nwant\n  %s", c.name, strings.Join(moved, "\n  "), strings.Join(c.want, "\n  "))
		}
	}
	if all := samples(t, m); all[p+"hub_up{hub=hub-a}"] != 1 || all["go_goroutines{}"] == 0 {
		t.Error("a hub that answers is not up, or Go's own metrics are missing")
	}
	for name := range samples(t, m) {
		if strings.Contains(name, "dev-1") || strings.Contains(name, "own-key") {
			t.Errorf("a registration ID is a label: %s", name)
		}
	}
}

// What others choose does not make labels without end.
func TestBoundedLabels(t *testing.T) {
	f := registrationtest.NewFixture(t)
	m := meter.New(meter.Config{Store: f.Store})
	for i := range 500 {
		m.Hub(fmt.Sprintf("hub-%d", i), "check", "200", 0)
		m.Attempt(fmt.Sprintf("scope-%d", i), &registration.Attempt{Operation: "register", Result: "refused", Code: 401002, Protocol: "mqtt", Proof: "x509"})
		r := httptest.NewRequest("PUT", fmt.Sprintf("/touchmark/made-up-%d/x?api-version=%d", i, i), nil)
		m.Handler(func(*http.Request) string { return "" }, http.NotFoundHandler()).ServeHTTP(httptest.NewRecorder(), r)
	}
	series := make(map[string]int)
	all := samples(t, m)
	for name := range all {
		series[name[:strings.Index(name, "{")]]++
	}
	if series["touchmark_dps_hub_requests_total"] != 101 || series["touchmark_dps_attestation_attempts_total"] != 101 || series["touchmark_dps_service_requests_total"] != 1 {
		t.Errorf("%v", series)
	}
	if n := all["touchmark_dps_hub_requests_total{code=200,hub=other,operation=check}"]; n != 400 {
		t.Errorf("%v calls of other hubs", n)
	}
}

// A hub that is linked nowhere any more is neither up nor down: an alert on one that was down ends with it.
func TestHubUnlinked(t *testing.T) {
	f := registrationtest.NewFixture(t)
	m := meter.New(meter.Config{Store: f.Store})
	link := func(names ...string) {
		t.Helper()
		_, _, err := registration.EditScope(t.Context(), f.Store, registrationtest.Scope, registration.Actor{}, "put", f.Now(), func(*registration.Scope) (*registration.Scope, error) {
			return &registration.Scope{ID: registrationtest.Scope, Name: "plant-a", Settings: registration.Settings{Hubs: registration.Records(names...)}}, nil
		})
		if err == nil {
			err = m.Count(t.Context())
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	up := func(want ...string) {
		t.Helper()
		var got []string
		for name, v := range samples(t, m) {
			if hub, ok := strings.CutPrefix(name, "touchmark_dps_hub_up{hub="); ok {
				got = append(got, fmt.Sprint(strings.TrimSuffix(hub, "}"), " ", v))
			}
		}
		if slices.Sort(got); !slices.Equal(got, want) {
			t.Errorf("%q, not %q", got, want)
		}
	}
	down := &toldHub{err: &registration.HubError{Hub: "b.example", Err: errors.New("nobody there"), Temporary: true}}
	call := func() {
		_ = m.WatchHub("a.example", &toldHub{}).Check(t.Context())
		_ = m.WatchHub("b.example", down).Check(t.Context())
	}
	call()
	link("a.example", "b.example")
	up("a.example 1", "b.example 0")
	link("a.example")
	up("a.example 1")
	call()
	link("a.example", "b.example")
	up("a.example 1", "b.example 0")
	link()
	up()
}

// Gauges say what they are told: what ends when, what waits, what is there.
func TestGauges(t *testing.T) {
	f := registrationtest.NewFixture(t)
	_, _, err := registration.EditScope(t.Context(), f.Store, registrationtest.Scope, registration.Actor{}, "put", f.Now(), func(*registration.Scope) (*registration.Scope, error) {
		return &registration.Scope{ID: registrationtest.Scope, Name: "plant-a", Settings: registration.Settings{Hubs: registration.Records("a.example", "b.example")}}, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	end := f.Now().Add(time.Hour)
	m := meter.New(meter.Config{Store: f.Store, Sources: meter.Sources{
		Certificates: func() []meter.Certificate {
			return []meter.Certificate{{Name: "tls", NotAfter: end.Add(time.Hour)}, {Name: "tls", NotAfter: end}, {Name: `odd "name"`, NotAfter: end}}
		},
		Doors: func() map[string]meter.Door {
			return map[string]meter.Door{"https": {Connections: 3, Handshakes: 9, FailedHandshakes: 1}}
		},
	}})
	ca := attesttest.CA(t, nil, "a CA of the scope")
	if _, err := f.Service.PutCACertificate(t.Context(), registration.Actor{}, "root-1", ca.Base64(), nil, ""); err != nil {
		t.Fatal(err)
	}
	if err := m.Count(t.Context()); err != nil {
		t.Fatal(err)
	}
	all := samples(t, m)
	scope := ",type="
	for name, want := range map[string]float64{
		"outbox_depth{}": 0, "certificate_expiry_timestamp_seconds{name=tls}": float64(end.Unix()), `certificate_expiry_timestamp_seconds{name=odd "name"}`: float64(end.Unix()),
		"door_connections{door=https}": 3, "door_handshakes_total{door=https,result=success}": 9, "door_handshakes_total{door=https,result=failed}": 1,
		"objects{scope=0ne00c0ffee" + scope + "enrollment}": 2, "objects{scope=0ne00c0ffee" + scope + "group}": 2, "objects{scope=0ne00c0ffee" + scope + "hub}": 2,
		"objects{scope=0ne00c0ffee" + scope + "registration}": 0, "objects{scope=0ne00c0ffee" + scope + "certificate}": 1,
		"certificate_expiry_timestamp_seconds{name=ca 0ne00c0ffee/root-1}": float64(ca.Certificate.NotAfter.Unix()),
	} {
		if got, ok := all["touchmark_dps_"+name]; !ok || got != want {
			t.Errorf("%s is %v, want %v", name, got, want)
		}
	}
}

// Usage of replicas adds up in one store, by day, and says what Azure would bill. What was not let in is not counted, nor what
// strangers ask for in scopes that there are not.
func TestUsage(t *testing.T) {
	f := registrationtest.NewFixture(t, "hub-a.example")
	folded := strings.ToLower(registrationtest.Scope)
	replica := func() *meter.Meter {
		return meter.New(meter.Config{Store: f.Store, Now: f.Now, Known: func(scope string) bool { return scope == folded }})
	}
	a, b := replica(), replica()
	req := func(scope, id string) *registration.Request {
		d := f.Derived(id)
		return &registration.Request{IDScope: scope, RegistrationID: d.ID, APIVersion: d.APIVersion, Proof: attest.Proof{Token: d.Token}}
	}
	day := registration.DayOf(f.Now())
	for i, m := range []*meter.Meter{a, b, a} {
		r := m.Registrar(f.Service)
		op, err := r.Register(t.Context(), req(registrationtest.Scope, fmt.Sprint("dev-", i)))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.Status(t.Context(), req(registrationtest.Scope, fmt.Sprint("dev-", i)), op.OperationID); err != nil {
			t.Fatal(err)
		}
		if _, err := r.Register(t.Context(), req("0neMadeUp", "dev")); err == nil {
			t.Fatal("another scope's device was let in")
		}
		m.Service(&meter.Call{API: registration.UsageService, Operation: "enrollment.put", Status: 200, Scope: folded})
		m.Service(&meter.Call{API: registration.UsageService, Operation: "enrollment.put", Status: 401, Scope: folded})
		m.Service(&meter.Call{API: registration.UsageService, Operation: "enrollment.put", Status: 429, Scope: folded})
		m.Service(&meter.Call{API: registration.UsageOwn, Operation: "usage.get", Status: 200, Scope: folded})
	}
	f.Advance(24 * time.Hour)
	b.Service(&meter.Call{API: registration.UsageService, Operation: "enrollment.get", Status: 404, Scope: folded})
	if err := errors.Join(a.Flush(t.Context()), b.Flush(t.Context()), b.Flush(t.Context())); err != nil {
		t.Fatal(err)
	}
	r, err := a.Report(t.Context(), registrationtest.Scope, day, "")
	if err != nil {
		t.Fatal(err)
	}
	lines := make(map[string]int64)
	for _, d := range r.Days {
		for _, i := range d.Usage {
			lines[fmt.Sprint(d.Date == day, " ", i.API, " ", i.Operation, " ", i.Result, " ", i.Billable)] = i.Calls
		}
	}
	want := map[string]int64{"true device register success true": 3, "true device status success false": 3, "true service enrollment.put success true": 3,
		"true service enrollment.put throttled false": 3, "true touchmark usage.get success false": 3, "false service enrollment.get refused true": 1}
	if !maps.Equal(lines, want) || r.Calls != 16 || r.Billable != 7 || len(r.Days) != 2 || r.Days[0].Calls != 15 || r.Days[0].Billable != 6 || r.IDScope != registrationtest.Scope {
		t.Errorf("%+v\n%v", r, lines)
	}
	for _, c := range [][2]string{{"yesterday", ""}, {"", "2026-13-01"}, {"2026-11-02", "2026-11-01"}, {"2020-01-01", "2026-11-01"}} {
		if _, err := a.Report(t.Context(), registrationtest.Scope, c[0], c[1]); dps.AsError(err).Code != dps.CodeInvalidArgument {
			t.Errorf("%q: %v", c, err)
		}
	}
}

// A store that fails for a while costs no usage.
func TestUsageSurvivesStore(t *testing.T) {
	f := registrationtest.NewFixture(t)
	s := &failing{Store: f.Store, broken: true}
	m := meter.New(meter.Config{Store: s, Now: f.Now})
	call := func() {
		m.Service(&meter.Call{API: registration.UsageService, Operation: "enrollment.put", Status: 200, Scope: "0nea"})
	}
	call()
	if err := m.Flush(t.Context()); err == nil {
		t.Fatal("kept in a store that fails")
	}
	call()
	s.broken = false
	if r, err := m.Report(t.Context(), "0neA", "", ""); err != nil || r.Calls != 2 {
		t.Errorf("%+v, %v", r, err)
	}
}

type failing struct {
	registration.Store
	broken bool
}

func (s *failing) Update(ctx context.Context, f func(registration.Tx) error) error {
	if s.broken {
		return errors.New("disk on fire")
	}
	return s.Store.Update(ctx, f)
}

// What looks like a secret is taken out of the log, wherever it stands in it, and addresses where it is asked for.
func TestRedact(t *testing.T) {
	var out bytes.Buffer
	log := slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{ReplaceAttr: meter.Redact(true)}))
	const hidden = "c2VjcmV0"
	log.Warn("calling https://user:"+hidden+"@hook.example/allocate?code="+hidden, "remote", "192.0.2.77:4711",
		"cause", fmt.Errorf(`Post "https://hook.example/a?code=%s&x=1": refused`, hidden),
		"token", "SharedAccessSignature sr=scope%2fregistrations%2fdev&sig="+hidden+"&se=1",
		"connection", "HostName=h;SharedAccessKeyName=owner;SharedAccessKey="+hidden, "document", `{"primaryKey": "`+hidden+`"}`)
	log.With("in", slog.GroupValue(slog.String("group", "https://h.example/?code="+hidden))).Info("x", "url", "https://hub.example/devices/d", "n", 5)
	text := out.String()
	if strings.Contains(text, hidden) || strings.Contains(text, "192.0.2.77") {
		t.Error(text)
	}
	for _, kept := range []string{"remote=192.0.2.0", "https://hook.example/a?[redacted]", "sr=scope", "SharedAccessKeyName=owner", "https://hub.example/devices/d", "n=5"} {
		if !strings.Contains(text, kept) {
			t.Errorf("no %s in\n%s", kept, text)
		}
	}
}

// Ready says so while every part works and the service is not stopping; strangers are not told which part does not.
func TestReadiness(t *testing.T) {
	stop := make(chan struct{})
	var broken error
	fresh := func() *meter.Readiness {
		return &meter.Readiness{Stopping: stop, Parts: map[string]func(context.Context) error{"store": func(context.Context) error { return broken }}}
	}
	get := func(h http.Handler, code int, want string) {
		t.Helper()
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest("GET", "/readyz", nil))
		if w.Code != code || strings.TrimSpace(w.Body.String()) != want {
			t.Errorf("%d %s, want %d %s", w.Code, w.Body, code, want)
		}
	}
	get(meter.Alive(), 200, `{"alive":true}`)
	get(fresh().Handler(true), 200, `{"parts":{"store":"ok"},"ready":true}`)
	broken = errors.New("disk on fire")
	get(fresh().Handler(true), 503, `{"parts":{"store":"disk on fire"},"ready":false}`)
	get(fresh().Handler(false), 503, `{"ready":false}`)
	broken = nil
	close(stop)
	get(fresh().Handler(true), 503, `{"parts":{"service":"is stopping"},"ready":false}`)
}
