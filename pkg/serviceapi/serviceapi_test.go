package serviceapi_test

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/door"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/httpd"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
	"github.com/touchmark/touchmark/pkg/serviceapi"
)

// The names of the first scope and of another, and where their hosts stand.
const (
	domain      = "scopes.example.net"
	ownName     = "plant-a"
	otherName   = "plant-b"
	otherScope  = "0ne000000B"
	ownerRights = "ServiceConfig, DeviceConnect, EnrollmentWrite"
)

var (
	ownerKey  = []byte(strings.Repeat("o", 64))
	secondKey = []byte(strings.Repeat("p", 64))
	start     = registration.Actor{Name: "test"}
)

// service is an HTTPS door with the service API of two scopes, and the enrollments of the fixture in the first; or one at each of
// several replicas.
type service struct {
	*registrationtest.Fixture
	doors []*registrationtest.Listener
	turn  atomic.Int64
	plain *http.Client // without a certificate
}

// replicas starts the fixtures of the tests below TestReplicas; those of others are on a file.
var replicas atomic.Pointer[registrationtest.Fresh]

func fixture(t testing.TB, hubs ...string) *registrationtest.Fixture {
	t.Helper()
	if strings.HasPrefix(t.Name(), "TestReplicas/") {
		return (*replicas.Load())(t, hubs...)
	}
	return registrationtest.NewFixture(t, hubs...)
}

func open(t testing.TB, edit ...func(*serviceapi.Config)) *service {
	t.Helper()
	f := fixture(t, "hub-a.example.net")
	d := &service{Fixture: f}
	for id, name := range map[string]string{registrationtest.Scope: ownName, otherScope: otherName} {
		if _, _, err := registration.EditScope(t.Context(), f.Store, id, start, "create", f.Now(), func(*registration.Scope) (*registration.Scope, error) {
			return &registration.Scope{ID: id, Name: name, Settings: registration.Settings{Hubs: registration.Records("hub-a.example.net", "hub-b.example.net")}}, nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	log := registrationtest.Log(t)
	cfg := serviceapi.Config{First: registrationtest.Scope, Hosts: []string{registrationtest.Host}, Domain: domain, Log: log, Now: f.Now}
	for _, e := range edit {
		e(&cfg)
	}
	for _, r := range f.Replicas() {
		cfg := cfg
		cfg.Scopes = registration.NewScopes(registration.ScopesConfig{Config: registration.Config{Store: r.Store, Now: f.Now, Log: log}})
		handlers := serviceapi.New(cfg).Handlers()
		d.doors = append(d.doors, f.Listen(t, func(ctx context.Context, l net.Listener, cert func(*tls.ClientHelloInfo) (*tls.Certificate, error)) error {
			return httpd.New(httpd.Config{Registrar: cfg.Scopes, Handlers: handlers, Log: log, Now: f.Now, Door: door.New(door.Config{TLS: door.TLSConfig(cert, "http/1.1"), Log: log})}).Serve(ctx, l)
		}))
	}
	d.plain = d.client(t, nil)
	return d
}

// client connects to the doors whatever the URL's host: each request goes to another one than the last, of whichever client.
func (d *service) client(t testing.TB, cert *tls.Certificate) *http.Client {
	if cert == nil && d.plain != nil {
		return d.plain
	}
	turns := turns{turn: &d.turn}
	for _, l := range d.doors {
		tr := &http.Transport{TLSClientConfig: l.TLS(cert), MaxIdleConnsPerHost: 64, DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, l.Addr)
		}}
		t.Cleanup(tr.CloseIdleConnections)
		turns.all = append(turns.all, tr)
	}
	return &http.Client{Transport: turns, Timeout: time.Minute}
}

// turns takes one transport after the other.
type turns struct {
	turn *atomic.Int64
	all  []*http.Transport
}

func (s turns) RoundTrip(r *http.Request) (*http.Response, error) {
	return s.all[int(s.turn.Add(1))%len(s.all)].RoundTrip(r)
}

// ask makes one call of a device's.
func (d *service) ask(t testing.TB, dev registrationtest.Device, method, path string) string {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, "https://"+registrationtest.Host+"/"+dev.Scope+"/registrations/"+dev.ID+path+"?api-version="+dev.APIVersion, nil)
	if err != nil {
		t.Fatal(err)
	}
	if dev.Token != "" {
		req.Header.Set("Authorization", dev.Token)
	}
	res, err := d.client(t, dev.Certificate).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// register registers a device and returns what its status is then.
func (d *service) register(t testing.TB, dev registrationtest.Device) string {
	t.Helper()
	var op struct{ OperationID string }
	s := d.ask(t, dev, "PUT", "/register")
	if json.Unmarshal([]byte(s), &op) != nil || op.OperationID == "" {
		return s
	}
	return d.ask(t, dev, "GET", "/operations/"+op.OperationID)
}

// operator is a client of the service API, of one host and with one authorization.
type operator struct {
	c     *http.Client
	host  string
	token string
}

func newOperator(t testing.TB, edit ...func(*serviceapi.Config)) (*service, *operator) {
	t.Helper()
	d := open(t, edit...)
	d.Policy(t, "owner", ownerRights, ownerKey, secondKey)
	return d, d.operator(t, ownerKey, "owner")
}

func (d *service) operator(t testing.TB, key []byte, policy string) *operator {
	t.Helper()
	return d.at(t, registrationtest.Host, key, policy)
}

// at is an operator at a host, with a token for it.
func (d *service) at(t testing.TB, host string, key []byte, policy string) *operator {
	return &operator{d.client(t, nil), host, attesttest.ServiceToken(key, host, policy, d.Now().Add(time.Hour))}
}

// do makes a request and checks what holds for every answer. DPS-S 3.
func (o *operator) do(t testing.TB, method, path, body string, header ...string) (*http.Response, []byte) {
	t.Helper()
	var reader io.Reader
	if body != "" {
		reader = strings.NewReader(body)
	}
	req, err := http.NewRequestWithContext(t.Context(), method, "https://"+o.host+path, reader)
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range header {
		name, value, _ := strings.Cut(h, ": ")
		if req.Header.Set(name, value); value == "" {
			req.Header.Del(name)
		}
	}
	res, err := o.c.Do(req)
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	if res.StatusCode != http.StatusNoContent && (res.Header.Get("Content-Type") != "application/json; charset=utf-8" || res.ContentLength != int64(len(b)) || !json.Valid(b)) {
		t.Errorf("%s %s: %s of %d octets: %q", method, path, res.Header.Get("Content-Type"), res.ContentLength, b)
	}
	for name, want := range map[string]string{"WWW-Authenticate": "", "Strict-Transport-Security": "max-age=31536000; includeSubDomains", "X-Content-Type-Options": "nosniff"} {
		if got := res.Header.Get(name); got != want {
			t.Errorf("%s %s: %s is %q", method, path, name, got)
		}
	}
	if res.Header.Get("X-Ms-Request-Id") == "" {
		t.Errorf("%s %s has no request ID", method, path)
	}
	return res, b
}

// call makes a call; the path has no api-version.
func (o *operator) call(t testing.TB, method, path, body string, header ...string) (*http.Response, []byte) {
	t.Helper()
	sep := "?"
	if strings.Contains(path, "?") {
		sep = "&"
	}
	return o.do(t, method, path+sep+"api-version=2021-10-01", body, append([]string{"Authorization: " + o.token}, header...)...)
}

// want makes a call that must be answered with a status, and for errors with a code.
func (o *operator) want(t testing.TB, status int, code dps.Code, method, path, body string, header ...string) map[string]any {
	t.Helper()
	res, b := o.call(t, method, path, body, header...)
	var doc map[string]any
	if len(b) > 0 && b[0] == '{' {
		if err := json.Unmarshal(b, &doc); err != nil {
			t.Fatal(err)
		}
	}
	got, _ := doc["errorCode"].(float64)
	if res.StatusCode != status || dps.Code(got) != code {
		t.Fatalf("%s %s %.200s: %d %s", method, path, body, res.StatusCode, b)
	}
	for _, name := range []string{"trackingId", "message", "timestampUtc"} { // DPS-S 1
		if code != 0 && doc[name] == nil {
			t.Errorf("%s %s: %s has no %s", method, path, b, name)
		}
	}
	if code != 0 && res.Header.Get("X-Ms-Error-Code") != fmt.Sprint(int(code)) {
		t.Errorf("%s %s: X-Ms-Error-Code is %s", method, path, res.Header.Get("X-Ms-Error-Code"))
	}
	return doc
}
