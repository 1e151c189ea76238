package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	sdk "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/meter"
	"github.com/touchmark/touchmark/pkg/registration"
)

// metricsOf reads a service's metrics, without a type's help and without buckets.
func metricsOf(t *testing.T, address any) map[string]string {
	t.Helper()
	res, err := http.Get(fmt.Sprintf("http://%s/metrics", address))
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	all := make(map[string]string)
	for lines := bufio.NewScanner(res.Body); lines.Scan(); {
		if name, value, ok := strings.Cut(lines.Text(), "} "); ok {
			all[strings.TrimPrefix(name, "touchmark_dps_")+"}"] = value
		}
	}
	return all
}

// An operator watches a service: every device that comes is in the metrics, in the log and in the log of attempts, with the reason
// for each refusal; usage adds up over a start; and nothing that is secret is in the log at its most talkative. DPS-S 101.
func TestMonitoring(t *testing.T) {
	t.Setenv("TOUCHMARK_PASSPHRASE", "words for a test")
	dir := t.TempDir()
	args := []string{"--https", "127.0.0.1:0", "--mqtt", "127.0.0.1:0", "--amqp", "127.0.0.1:0", "--metrics", "127.0.0.1:0", "--log", "json", "--log-level", "debug", "--log-mask-addresses"}
	cmd, ready, log := startServe(t, dir, args...)
	mintAll(t, dir)
	stamps, err := filepath.Glob(filepath.Join(dir, "stamps", "*"))
	if err != nil {
		t.Fatal(err)
	}
	for i, stamp := range stamps {
		protocol := []string{"https", "mqtt", "amqp"}[i%3]
		if code, text := attempt(t, dir, "register", "--stamp", stamp, "--protocol", protocol, "--endpoint", ready[protocol].(string), "--ca", "svc/ca.pem"); code != 0 {
			t.Fatalf("%s: exit code %d\n%s", stamp, code, text)
		}
	}
	wrong := wrongKey(t, filepath.Join(dir, "stamps", "symmetric-individual000001"))
	for range 2 {
		if code, text := attempt(t, dir, "register", "--stamp", wrong, "--protocol", "mqtt", "--endpoint", ready["mqtt"].(string), "--ca", "svc/ca.pem"); code == 0 {
			t.Fatalf("the wrong key was let in\n%s", text)
		}
	}
	svc := openTestService(t, dir)
	get := func(path string, query url.Values, out any) error {
		return svc.call(t.Context(), "GET", path, query, nil, nil, out)
	}

	all := metricsOf(t, ready["metrics"])
	assigned := 0
	for name, value := range all {
		if strings.HasPrefix(name, "device_assignments_total{") {
			var n int
			_, _ = fmt.Sscan(value, &n)
			assigned += n
		}
	}
	if assigned != len(stamps) || all[`attestation_attempts_total{kind="symmetricKey",protocol="mqtt",scope="0ne00112233",status="unauthorized"}`] != "2" ||
		all[`door_handshakes_total{door="amqp",result="success"}`] == "0" || all[`service_requests_total{api_version="2021-10-01",code="200",operation="bundles.post"}`] != fmt.Sprint(len(allProfiles)) ||
		all[`certificate_expiry_timestamp_seconds{name="tls"}`] == "" {
		t.Errorf("%d of %d assignments; %v", assigned, len(stamps), all)
	}
	for path, want := range map[string]string{"/readyz": `{"parts":{"store":"ok"},"ready":true}`, "/healthz": `{"alive":true}`} {
		res, err := http.Get("http://" + ready["metrics"].(string) + path)
		if err != nil {
			t.Fatal(err)
		}
		b, _ := io.ReadAll(res.Body)
		_ = res.Body.Close()
		if strings.TrimSpace(string(b)) != want {
			t.Errorf("%s: %s", path, b)
		}
	}
	if res, err := svc.client.Get("https://" + svc.host + "/readyz"); err != nil || res.StatusCode != 200 {
		t.Errorf("at the door: %v", err)
	} else {
		b, _ := io.ReadAll(res.Body)
		_ = res.Body.Close()
		if string(bytes.TrimSpace(b)) != `{"ready":true}` {
			t.Errorf("at the door: %s", b)
		}
	}

	// Why was it refused?
	var d registration.Diagnosis
	if err := get("/touchmark/diagnose/symmetric-individual000001", nil, &d); err != nil {
		t.Fatal(err)
	}
	if len(d.Attempts) != 2 || d.Attempts[1].Rule != "signature" || d.Attempts[1].Times != 2 || d.Attempts[0].Result != "assigned" || d.Attempts[1].Remote != "127.0.0.0" ||
		d.Enrollment == nil || d.Registration == nil || !slices.ContainsFunc(d.Explanation, func(s string) bool { return strings.Contains(s, "signed with another key") }) {
		t.Errorf("%+v", d)
	}
	var a registration.Attempt
	if err := get("/touchmark/attempts/"+d.Attempts[1].TrackingID, nil, &a); err != nil || a.RegistrationID != "symmetric-individual000001" {
		t.Errorf("%+v, %v", a, err)
	}
	if err := get("/touchmark/attempts/"+dps.NewUUID(), nil, &a); err == nil {
		t.Error("an attempt that there was not")
	}
	chain, err := os.ReadFile(filepath.Join(dir, "stamps", "x509-group000000", "device-chain.pem"))
	if err != nil {
		t.Fatal(err)
	}
	d = registration.Diagnosis{}
	if err := svc.call(t.Context(), "POST", "/touchmark/diagnose/x509-group000000", nil, nil, bytes.NewReader(chain), &d); err != nil || d.Trial == nil || d.Trial.Result != "admitted" {
		t.Errorf("%+v, %v", d.Trial, err)
	}
	for _, hostile := range []string{"", "no PEM", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", strings.Repeat(string(chain), 9)} {
		if err := svc.call(t.Context(), "POST", "/touchmark/diagnose/x509-group000000", nil, nil, strings.NewReader(hostile), &d); err == nil {
			t.Errorf("%.40q is taken for a chain", hostile)
		}
	}
	if err := svc.call(t.Context(), "DELETE", "/touchmark/diagnose/symmetric-individual000001", nil, nil, nil, nil); err != nil {
		t.Error(err)
	}
	d = registration.Diagnosis{}
	if err := get("/touchmark/diagnose/symmetric-individual000001", nil, &d); err != nil || len(d.Attempts) != 0 {
		t.Errorf("%+v, %v", d, err)
	}

	// Usage that was asked for is kept, whatever becomes of the process then; and so is the rest when it stops.
	var before, after meter.Report
	if err := get("/touchmark/usage", nil, &before); err != nil {
		t.Fatal(err)
	}
	registers := func(r *meter.Report) (n int64) {
		for _, day := range r.Days {
			for _, u := range day.Usage {
				if u.API == "device" && u.Operation == "register" && u.Result == "success" {
					n += u.Calls
				}
			}
		}
		return n
	}
	if registers(&before) != int64(len(stamps)) || before.Billable < int64(len(stamps)) || before.IDScope != "0ne00112233" {
		t.Errorf("%+v", before)
	}
	if err := cmd.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	cmd, ready, _ = startServe(t, dir, args...)
	if code, text := attempt(t, dir, "register", "--stamp", stamps[0], "--endpoint", ready["https"].(string), "--ca", "svc/ca.pem"); code != 0 {
		t.Fatal(text)
	}
	stopServe(t, cmd)
	_, _, _ = startServe(t, dir, args...)
	svc = openTestService(t, dir)
	if err := get("/touchmark/usage", url.Values{"from": {before.From}}, &after); err != nil || registers(&after) != registers(&before)+1 {
		t.Errorf("%d registrations before, %+v, %v", registers(&before), after, err)
	}
	d = registration.Diagnosis{}
	if err := get("/touchmark/diagnose/"+filepath.Base(stamps[0]), nil, &d); err != nil || len(d.Attempts) != 2 {
		t.Errorf("behind a kill and a stop: %+v, %v", d.Attempts, err)
	}

	// The log.
	text := log.String()
	records := make(map[string]int)
	for line := range strings.Lines(text) {
		var r map[string]any
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			t.Fatalf("%v in %s", err, line)
		}
		category, ok := r["category"].(string)
		if !ok {
			continue
		}
		records[category+" "+fmt.Sprint(r["operation"])+" "+fmt.Sprint(r["result"])]++
		for _, key := range []string{"time", "level", "operation", "result", "httpStatus", "apiVersion", "protocol", "idScope", "durationMs"} {
			if r[key] == nil {
				t.Errorf("no %s in %s", key, line)
			}
		}
		if r["result"] != "Success" && r["trackingId"] == nil {
			t.Errorf("no tracking ID in %s", line)
		}
	}
	for _, want := range []string{"DeviceOperations register Success", "DeviceOperations register ClientError", "DeviceOperations status Success", "ServiceOperations bundles.post Success", "ServiceOperations diagnose.get Success"} {
		if records[want] == 0 {
			t.Errorf("no record of %s: %v", want, records)
		}
	}
	if strings.Contains(text, "127.0.0.1") {
		t.Error("an address is in the log whole")
	}
	secrets := []string{"SharedAccessSignature", "sig=", base64.StdEncoding.EncodeToString(svc.key)}
	for _, stamp := range append(stamps, wrong) {
		b, err := os.ReadFile(filepath.Join(stamp, "provisioning.json"))
		var doc struct{ SymmetricKey string }
		if err == nil {
			err = json.Unmarshal(b, &doc)
		}
		if err != nil {
			t.Fatal(err)
		}
		if doc.SymmetricKey != "" {
			secrets = append(secrets, doc.SymmetricKey, url.QueryEscape(doc.SymmetricKey))
		}
	}
	for _, s := range secrets {
		if strings.Contains(text, s) {
			t.Errorf("a secret is in the log: %.12s…", s)
		}
	}
}

// plainService is a service that a test calls without a client's patience.
type plainService struct {
	host   string
	key    []byte
	client *http.Client
}

func openTestService(t *testing.T, dir string) *plainService {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, "svc", "owner.connection"))
	if err != nil {
		t.Fatal(err)
	}
	s := &plainService{}
	for part := range strings.SplitSeq(strings.TrimSpace(string(b)), ";") {
		switch name, value, _ := strings.Cut(part, "="); name {
		case "HostName":
			s.host = value
		case "SharedAccessKey":
			if s.key, err = base64.StdEncoding.DecodeString(value); err != nil {
				t.Fatal(err)
			}
		}
	}
	roots, err := loadRoots(filepath.Join(dir, "svc", "ca.pem"))
	if err != nil {
		t.Fatal(err)
	}
	s.client = &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}}
	t.Cleanup(s.client.CloseIdleConnections)
	return s
}

func (s *plainService) token() string {
	host, _, _ := strings.Cut(s.host, ":")
	return attesttest.ServiceToken(s.key, host, "provisioningserviceowner", time.Now().Add(time.Hour))
}

// call makes one call. What is not 2xx is a *dps.Error.
func (s *plainService) call(ctx context.Context, method, path string, query url.Values, header http.Header, body io.Reader, out any) error {
	if query == nil {
		query = url.Values{}
	}
	query.Set("api-version", "2021-10-01")
	req, err := http.NewRequestWithContext(ctx, method, "https://"+s.host+path+"?"+query.Encode(), body)
	if err != nil {
		return err
	}
	for k, v := range header {
		req.Header[k] = v
	}
	req.Header.Set("Authorization", s.token())
	res, err := s.client.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode/100 != 2 {
		var doc struct{ ErrorCode dps.Code }
		if err := json.NewDecoder(res.Body).Decode(&doc); err != nil {
			return err
		}
		return &dps.Error{Code: doc.ErrorCode, RetryAfter: res.Header.Get("Retry-After")}
	}
	if out == nil {
		return nil
	}
	return json.NewDecoder(res.Body).Decode(out)
}

// The profile azure refuses an operator's calls above a thousand in a minute with 429, 429001 and an integer Retry-After. DPS-S 100.
func TestQuotaProfile(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	cmd, _, _ := startServe(t, dir, "--https", "127.0.0.1:0", "--mqtt", "off", "--amqp", "off", "--quotas", "azure", "--quiet")
	svc := openTestService(t, dir)
	var refused *dps.Error
	n := 0
	for ; n < 2100 && refused == nil; n++ { // a minute may end meanwhile
		if e := new(dps.Error); errors.As(svc.call(t.Context(), "GET", "/enrollments/nobody", nil, nil, nil, nil), &e) && e.Code != dps.CodeNoEnrollment {
			refused = e
		}
	}
	if refused == nil || refused.Code != dps.CodeThrottled || n <= 1000 {
		t.Fatalf("after %d calls: %v", n, refused)
	}
	if wait, err := strconv.Atoi(refused.RetryAfter); err != nil || wait < 1 || wait > 60 {
		t.Errorf("Retry-After %q", refused.RetryAfter)
	}
	stopServe(t, cmd)
	// The profile is the scope's: the next start need not name it, and may take it away.
	startServe(t, dir, "--https", "127.0.0.1:0", "--mqtt", "off", "--amqp", "off", "--quotas", "none", "--quiet")
	svc = openTestService(t, dir)
	for range 1100 {
		if e := new(dps.Error); errors.As(svc.call(t.Context(), "GET", "/enrollments/nobody", nil, nil, nil, nil), &e) && e.Code != dps.CodeNoEnrollment {
			t.Fatal(e)
		}
	}
}

// Traces go to a collector where one is named: spans of devices, and of operators in the operators' own traces. There is no secret in
// them.
func TestTraces(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	spans := make(map[string]string) // by name, the trace of the last
	var bodies bytes.Buffer
	stub := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(r.Body)
		var in collector.ExportTraceServiceRequest
		if err == nil {
			err = proto.Unmarshal(b, &in)
		}
		if err != nil || r.URL.Path != "/v1/traces" {
			t.Errorf("%s: %v", r.URL, err)
		}
		mu.Lock()
		defer mu.Unlock()
		bodies.Write(b)
		for _, rs := range in.ResourceSpans {
			for _, ss := range rs.ScopeSpans {
				for _, s := range ss.Spans {
					spans[s.Name] = fmt.Sprintf("%x", s.TraceId)
				}
			}
		}
		w.Header().Set("Content-Type", "application/x-protobuf")
	}))
	defer stub.Close()
	dir := t.TempDir()
	cmd, ready, _ := startServe(t, dir, "--https", "127.0.0.1:0", "--mqtt", "off", "--amqp", "off", "--otlp-endpoint", stub.URL)
	svc := openTestService(t, dir)
	const trace = "4bf92f3577b34da6a3ce929d0e0e4736"
	header := http.Header{"Traceparent": {"00-" + trace + "-00f067aa0ba902b7-01"}}
	if err := svc.call(t.Context(), "GET", "/touchmark/info", nil, header, nil, nil); err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequest("PUT", fmt.Sprintf("https://%s/0ne00112233/registrations/dev-1/register?api-version=2019-03-31", ready["https"]), strings.NewReader(`{"registrationId":"dev-1"}`))
	if err != nil {
		t.Fatal(err)
	}
	req.Header = header.Clone()
	req.Header.Set("Authorization", "SharedAccessSignature sr=0ne00112233%2Fregistrations%2Fdev-1&sig=c2VjcmV0c2VjcmV0&se=9999999999&skn=registration")
	res, err := svc.client.Do(req)
	if err != nil || res.StatusCode != 401 {
		t.Fatal(res, err)
	}
	_ = res.Body.Close()
	stopServe(t, cmd) // sends what is left
	mu.Lock()
	defer mu.Unlock()
	if spans["service.info.get"] != trace || spans["device.register"] == "" || spans["device.register"] == trace {
		t.Errorf("%v", spans)
	}
	for _, secret := range []string{"c2VjcmV0", "SharedAccess", string(svc.key)} {
		if bytes.Contains(bodies.Bytes(), []byte(secret)) {
			t.Errorf("%q is in the traces", secret)
		}
	}
	for _, bad := range []string{"collector", "ftp://collector", "https://name:hunter2@collector"} {
		code, text := attempt(t, dir, "serve", "--data", "svc", "--https", "127.0.0.1:0", "--mqtt", "off", "--amqp", "off", "--otlp-endpoint", bad)
		if code != exitUsage || strings.Contains(text, "hunter2") {
			t.Errorf("%s: exit code %d\n%s", bad, code, text)
		}
	}
}

// admitting is a hub that takes every device.
type admitting struct{ registration.Hub }

func (admitting) Admit(context.Context, *registration.HubDevice) (bool, error) { return true, nil }

// Calls of a hub are counted, and are part of the trace of what they are made for.
func TestWatchedHub(t *testing.T) {
	sent := tracetest.NewInMemoryExporter()
	p := sdk.NewTracerProvider(sdk.WithSyncer(sent))
	w := &watched{meter: meter.New(meter.Config{}), traces: &tracing{p, p.Tracer("test")}}
	ctx, parent := w.traces.tracer.Start(t.Context(), "parent")
	if created, err := w.hub("hub-a.example.net", admitting{}).Admit(ctx, &registration.HubDevice{ID: "dev-1"}); !created || err != nil {
		t.Error(created, err)
	}
	parent.End()
	spans := sent.GetSpans()
	if len(spans) != 2 || spans[0].Name != "hub.admit" || spans[0].Parent.SpanID() != parent.SpanContext().SpanID() {
		t.Errorf("%+v", spans)
	}
	off := &watched{meter: w.meter}
	if created, err := off.hub("hub-a.example.net", admitting{}).Admit(t.Context(), &registration.HubDevice{ID: "dev-1"}); !created || err != nil {
		t.Error(created, err)
	}
	r := httptest.NewRecorder()
	w.meter.Metrics().ServeHTTP(r, httptest.NewRequest("GET", "/metrics", nil))
	if !strings.Contains(r.Body.String(), `touchmark_dps_hub_requests_total{code="ok",hub="hub-a.example.net",operation="admit"} 2`) {
		t.Error(r.Body)
	}
}
