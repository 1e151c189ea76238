package httpd_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/door"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/exchange"
	"github.com/touchmark/touchmark/pkg/httpd"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

// service is a running HTTPS door.
type service struct {
	*registrationtest.Fixture
	*registrationtest.Listener
}

func open(t testing.TB, f *registrationtest.Fixture, edit ...func(*httpd.Config, *door.Config)) *service {
	t.Helper()
	return &service{f, f.Listen(t, func(ctx context.Context, l net.Listener, cert func(*tls.ClientHelloInfo) (*tls.Certificate, error)) error {
		cfg := httpd.Config{Registrar: f.Registrar(), Now: f.Now, Handlers: map[string]http.Handler{"enrollments": mounted{}}}
		cfg.Log = registrationtest.Log(t)
		dc := door.Config{TLS: door.TLSConfig(cert, "http/1.1"), Log: cfg.Log}
		for _, e := range edit {
			e(&cfg, &dc)
		}
		cfg.Door = door.New(dc)
		return httpd.New(cfg).Serve(ctx, l)
	})}
}

// mounted is a handler beside the device API, which reads no bodies.
type mounted struct{}

func (mounted) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	exchange.Fail(w, r, slog.New(slog.DiscardHandler), dps.NewError(dps.CodeUnauthorized, "Unauthorized", nil))
}

// conn is one connection, kept open: every answer is read to its end and the next request follows.
type conn struct {
	*service
	device registrationtest.Device
	c      *tls.Conn
	r      *bufio.Reader
}

func (d *service) dial(t testing.TB, device registrationtest.Device) *conn {
	t.Helper()
	c := d.Dial(t, device.Certificate)
	return &conn{d, device, c, bufio.NewReader(c)}
}

// over speaks on a connection that is there.
func (c *conn) over(raw net.Conn, cert *tls.Certificate) {
	c.c = tls.Client(raw, c.TLS(cert))
	c.r = bufio.NewReader(c.c)
}

// do sends a request and reads the answer, and checks what holds for every answer (device API, section 10.3): DPS-D 60.
func (c *conn) do(t testing.TB, method, path, body string, header ...string) (*http.Response, []byte) {
	t.Helper()
	text := fmt.Sprintf("%s %s HTTP/1.1\r\nHost: %s\r\nContent-Length: %d\r\n", method, path, registrationtest.Host, len(body))
	if c.device.Token != "" {
		text += "authorization: " + c.device.Token + "\r\n"
	}
	for _, h := range header {
		text += h + "\r\n"
	}
	if _, err := io.WriteString(c.c, text+"\r\n"+body); err != nil {
		t.Fatal(err)
	}
	res, err := http.ReadResponse(c.r, &http.Request{Method: method})
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	if res.StatusCode != http.StatusNoContent && (res.Header.Get("Content-Type") != "application/json; charset=utf-8" || res.ContentLength != int64(len(b)) || !json.Valid(b)) {
		t.Errorf("%s %s: %s of %d octets: %q", method, path, res.Header.Get("Content-Type"), res.ContentLength, b)
	}
	if res.Header.Get("WWW-Authenticate") != "" || res.Header.Get("X-Ms-Request-Id") == "" || res.TransferEncoding != nil {
		t.Errorf("%s %s: headers %v", method, path, res.Header)
	}
	return res, b
}

func (c *conn) path(rest string) string {
	return "/" + c.device.Scope + "/registrations/" + c.device.ID + rest + "?api-version=" + c.device.APIVersion
}

func answer(res *http.Response, b []byte) registrationtest.Answer {
	return registrationtest.Answer{Status: res.StatusCode, Hint: res.Header.Get("Retry-After"), Body: b}
}

func (c *conn) Register(t testing.TB, body string) registrationtest.Answer {
	return answer(c.do(t, "PUT", c.path("/register"), body))
}

func (c *conn) Status(t testing.TB, operation, body string) registrationtest.Answer {
	return answer(c.do(t, "GET", c.path("/operations/"+operation), body))
}

func TestDoor(t *testing.T) { registrationtest.Doors(t, registrationtest.NewFixture, serve) }

func serve(t *testing.T, f *registrationtest.Fixture) func(testing.TB, registrationtest.Device) registrationtest.Conn {
	d := open(t, f)
	return func(t testing.TB, device registrationtest.Device) registrationtest.Conn { return d.dial(t, device) }
}

func newDoor(t testing.TB, edit ...func(*httpd.Config, *door.Config)) *service {
	t.Helper()
	return open(t, registrationtest.NewFixture(t, "hub-a.example.net"), edit...)
}

// DPS-D 57 to 62: what SDKs really send, ten times on one connection.
func TestRequestsAsSDKsSendThem(t *testing.T) {
	d := newDoor(t)
	c := d.dial(t, d.Derived("a:b"))
	scope := registrationtest.Scope
	for i := range 10 {
		segment := []string{"a:b", "a%3Ab", "a%3ab", "A:B"}[i%4]
		res, b := c.do(t, "PUT", "/"+scope+"/registrations/"+segment+"/register?api-version=2019-03-31&forceRegistration=true", `{"registrationId":"a:b"}`,
			"UserAgent: sdk/1.0", "Content-Encoding: utf-8", "Content-Type: application/json; charset=utf-8", "Accept: application/json", "Connection: keep-alive")
		if res.StatusCode != 202 || res.Header.Get("Retry-After") != "3" {
			t.Fatalf("%s: %d %s", segment, res.StatusCode, b)
		}
		var op struct{ OperationID string }
		_ = json.Unmarshal(b, &op)
		res, b = c.do(t, "GET", "/"+scope+"/registrations/"+segment+"/operations/"+op.OperationID+"?api-version=2019-03-31", "{}")
		if res.StatusCode != 200 || !bytes.Contains(b, []byte(`"deviceId":"a:b"`)) || res.Close {
			t.Fatalf("%s: %d %s", segment, res.StatusCode, b)
		}
	}
	// Some write the port into Host, some no Content-Type and no length.
	_, _ = fmt.Fprintf(c.c, "PUT %s HTTP/1.1\r\nHost: %s:443\r\nauthorization: %s\r\n\r\n", c.path("/register"), registrationtest.Host, c.device.Token)
	res, err := http.ReadResponse(c.r, nil)
	if err != nil || res.StatusCode != 202 {
		t.Fatalf("%v, %v", res, err)
	}
	_, _ = io.Copy(io.Discard, res.Body)
	_, _ = io.WriteString(c.c, "GET /x/registrations/y HTTP/1.1\r\nHost: "+registrationtest.Host+":443\r\n\r\n")
	res, err = http.ReadResponse(c.r, nil)
	if err != nil || res.StatusCode != 405 || res.Header.Get("Allow") != "POST" {
		t.Errorf("%v, %v", res, err)
	}
}

// Device API, section 10.4.
func TestLookup(t *testing.T) {
	d := newDoor(t)
	c := d.dial(t, d.Derived("dev-1"))
	lookup := func() (int, string) {
		res, b := c.do(t, "POST", c.path(""), `{"registrationId":"dev-1"}`)
		return res.StatusCode, string(b)
	}
	if code, b := lookup(); code != 404 {
		t.Errorf("before it registered: %d %s", code, b)
	}
	c.Register(t, "")
	if code, b := lookup(); code != 200 || !strings.HasPrefix(b, `{"registrationId":"dev-1"`) || !strings.Contains(b, `"assignedHub":"hub-a.example.net"`) {
		t.Errorf("after it registered: %d %s", code, b)
	}
	c.device = d.ByKey("dev-1", d.OwnKey)
	if code, b := lookup(); code != 401 {
		t.Errorf("with another key: %d %s", code, b)
	}
}

// DPS-D 60, and section 10.1: what is not a call of the API.
func TestWrongRequests(t *testing.T) {
	d := newDoor(t)
	good := "/" + registrationtest.Scope + "/registrations/dev-1/register"
	for _, x := range []struct {
		method, path string
		want         int
	}{
		{"PUT", good, 400},                              // no api-version
		{"PUT", good + "?api-version=latest", 400},      // not a date
		{"POST", good + "?api-version=2019-03-31", 405}, //
		{"PUT", "/s/registrations/d?api-version=2019-03-31", 405},
		{"DELETE", "/s/registrations/d/operations/o?api-version=2019-03-31", 405},
		{"GET", "/", 404},
		{"GET", "/s/registrations", 404},
		{"GET", "/s/registrations/d/getDeviceUpdate?api-version=2019-03-31", 404},
		{"PUT", "/s/devices/d/register?api-version=2019-03-31", 404},
		{"PUT", "//registrations/d/register?api-version=2019-03-31", 404},
		{"PUT", "/s/registrations//register?api-version=2019-03-31", 404},
		{"PUT", "/s/registrations/%zz/register?api-version=2019-03-31", 400},
		{"PUT", "/" + registrationtest.Scope + "/registrations/a%2Fb/register?api-version=2019-03-31", 400},
		{"PUT", "/" + registrationtest.Scope + "/registrations/" + strings.Repeat("a", 129) + "/register?api-version=2019-03-31", 400},
		{"GET", "/" + strings.Repeat("a", 4000), 400},
		{"GET", "/" + strings.Repeat("a/", 40), 404},
	} {
		c := d.dial(t, d.Derived("dev-1"))
		if strings.Contains(x.path, "%zz") { // net/http answers this one itself, before there is a request
			_, _ = io.WriteString(c.c, x.method+" "+x.path+" HTTP/1.1\r\nHost: h\r\n\r\n")
			if res, err := http.ReadResponse(c.r, nil); err != nil || res.StatusCode != 400 {
				t.Errorf("%s: %v, %v", x.path, res, err)
			}
			continue
		}
		res, b := c.do(t, x.method, x.path, "")
		if res.StatusCode != x.want || !regexp.MustCompile(`"errorCode":`+fmt.Sprint(x.want)).Match(b) {
			t.Errorf("%s %.80s: %d %s", x.method, x.path, res.StatusCode, b)
		}
	}
}

// Invariant 9: bytes from outside meet a limit before they meet memory.
func TestLimits(t *testing.T) {
	d := newDoor(t)
	c := d.dial(t, d.Derived("dev-1"))
	// A body that is announced too large is refused before it is read.
	_, _ = fmt.Fprintf(c.c, "PUT %s HTTP/1.1\r\nHost: h\r\nContent-Length: 99999999\r\nAuthorization: %s\r\n\r\n", c.path("/register"), c.device.Token)
	if res, err := http.ReadResponse(c.r, nil); err != nil || res.StatusCode != 413 {
		t.Errorf("announced: %v, %v", res, err)
	}
	// One of unknown length is read up to the limit.
	c = d.dial(t, d.Derived("dev-1"))
	_, _ = fmt.Fprintf(c.c, "PUT %s HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nAuthorization: %s\r\n\r\n", c.path("/register"), c.device.Token)
	chunked := c.c
	go func() {
		for range 100 {
			if _, err := fmt.Fprintf(chunked, "1000\r\n%s\r\n", strings.Repeat(" ", 0x1000)); err != nil {
				return
			}
		}
	}()
	if res, err := http.ReadResponse(c.r, nil); err != nil || res.StatusCode != 413 {
		t.Errorf("chunked: %v, %v", res, err)
	}
	// Headers.
	c = d.dial(t, d.Derived("dev-1"))
	_, _ = fmt.Fprintf(c.c, "PUT %s HTTP/1.1\r\nHost: h\r\nX: %s\r\n\r\n", c.path("/register"), strings.Repeat("x", 64<<10))
	if res, err := http.ReadResponse(c.r, nil); err != nil || res.StatusCode != 431 {
		t.Errorf("headers: %v, %v", res, err)
	}
	// Expect: 100-continue is honoured.
	c = d.dial(t, d.Derived("dev-1"))
	_, _ = fmt.Fprintf(c.c, "PUT %s HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\nExpect: 100-continue\r\nAuthorization: %s\r\n\r\n", c.path("/register"), c.device.Token)
	if line, err := c.r.ReadString('\n'); err != nil || !strings.HasPrefix(line, "HTTP/1.1 100 ") {
		t.Fatalf("%q, %v", line, err)
	}
	_, _ = c.r.ReadString('\n')
	_, _ = io.WriteString(c.c, "{}")
	if res, err := http.ReadResponse(c.r, nil); err != nil || res.StatusCode != 202 {
		t.Errorf("continued: %v, %v", res, err)
	}
}

// Connections that say nothing, or half of something, are closed and give their place back.
func TestHalfOpen(t *testing.T) {
	d := newDoor(t, func(c *httpd.Config, d *door.Config) {
		d.HandshakeTimeout, c.HeaderTimeout, d.MaxConnections = 300*time.Millisecond, 300*time.Millisecond, 3
	})
	silent, err := net.Dial("tcp", d.Addr)
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	half, err := net.Dial("tcp", d.Addr)
	if err != nil {
		t.Fatal(err)
	}
	defer half.Close()
	_, _ = half.Write([]byte("\x16\x03\x01\x02"))
	c := d.dial(t, d.Derived("dev-1"))
	_, _ = io.WriteString(c.c, "PUT /x HTTP/1.1\r\nHost: ")
	// All places are taken; the next device waits in the backlog until they are free again, and is served.
	if a := d.dial(t, d.Derived("dev-1")).Register(t, ""); a.Status != 202 {
		t.Errorf("the device behind them: %d %s", a.Status, a.Body)
	}
	for name, x := range map[string]net.Conn{"silent": silent, "half a handshake": half, "half a header": c.c} {
		_ = x.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err := io.ReadAll(x); err != nil && strings.Contains(err.Error(), "timeout") {
			t.Errorf("%s: still open", name)
		}
	}
}

// A caller that announces a body and sends none, on a path where nobody reads it, is answered or cut; so is one that does not
// take its answers; and one address cannot take all places.
func TestSlowCallers(t *testing.T) {
	d := newDoor(t, func(c *httpd.Config, d *door.Config) {
		c.HeaderTimeout, c.RequestTimeout, d.MaxPerAddress = 200*time.Millisecond, 200*time.Millisecond, 4
	})
	var slow []net.Conn
	for _, path := range []string{"PUT /nope", "PUT /enrollments/x?api-version=2021-10-01", "POST /x/registrations/y/register"} {
		c := d.dial(t, d.Derived("dev-1"))
		_, _ = io.WriteString(c.c, path+" HTTP/1.1\r\nHost: h\r\nContent-Length: 1000\r\n\r\n")
		slow = append(slow, c.c)
	}
	greedy := d.dial(t, d.Derived("dev-1"))
	cut := make(chan struct{}) // it reads nothing for longer than an answer may wait
	go func() {
		defer close(cut)
		for {
			if _, err := io.WriteString(greedy.c, "GET / HTTP/1.1\r\nHost: h\r\n\r\n"); err != nil {
				return
			}
		}
	}()
	over, err := net.Dial("tcp", d.Addr)
	if err != nil {
		t.Fatal(err)
	}
	defer over.Close()
	_ = over.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := over.Read(make([]byte, 1)); !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("a fifth connection: %v", err)
	}
	select {
	case <-cut:
	case <-time.After(time.Minute):
		t.Error("who takes no answers is still there")
	}
	for i, c := range slow {
		_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("caller %d is still there", i)
		}
	}
	if a := d.dial(t, d.Derived("dev-1")).Register(t, ""); a.Status != 202 {
		t.Errorf("the next device: %d %s", a.Status, a.Body)
	}
}

// DPS-D 47, 95.
func TestTLS(t *testing.T) {
	d := newDoor(t)
	asked := 0
	authorities := func(c *tls.Config) {
		c.GetClientCertificate = func(r *tls.CertificateRequestInfo) (*tls.Certificate, error) {
			if asked++; len(r.AcceptableCAs) != 0 {
				t.Errorf("%d acceptable authorities", len(r.AcceptableCAs))
			}
			return &tls.Certificate{}, nil
		}
	}
	for name, x := range map[string]struct {
		edit func(*tls.Config)
		ok   bool
	}{
		"1.2 only":                    {func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }, true},
		"1.3 only":                    {func(c *tls.Config) { c.MinVersion = tls.VersionTLS13 }, true},
		"1.1 only":                    {func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS10, tls.VersionTLS11 }, false},
		"no name":                     {func(c *tls.Config) { c.ServerName, c.InsecureSkipVerify = "", true }, true},
		"no list of authorities":      {authorities, true},
		"no list of authorities, 1.2": {func(c *tls.Config) { authorities(c); c.MaxVersion = tls.VersionTLS12 }, true},
	} {
		cfg := d.TLS(nil)
		x.edit(cfg)
		c, err := tls.Dial("tcp", d.Addr, cfg)
		if (err == nil) != x.ok {
			t.Errorf("%s: %v", name, err)
		}
		if err == nil {
			_, _ = io.WriteString(c, "GET / HTTP/1.1\r\nHost: h\r\n\r\n") // by 1.3 the server's word comes after ours
			if res, err := http.ReadResponse(bufio.NewReader(c), nil); err != nil || res.StatusCode != 404 {
				t.Errorf("%s: %v, %v", name, res, err)
			}
			_ = c.Close()
		}
	}
	if asked != 2 {
		t.Errorf("asked for a certificate %d times", asked)
	}
}

// A service that stops does not wait for devices that keep their connection and say nothing: the door's end, behind the
// test, would be an error.
func TestStopWithIdleConnection(t *testing.T) {
	d := newDoor(t)
	if a := d.dial(t, d.Derived("dev-1")).Register(t, ""); a.Status != 202 {
		t.Errorf("%d %s", a.Status, a.Body)
	}
}

// hung answers neither what became of an operation nor of a device, as long as it may.
type hung struct{ registration.Registrar }

func (hung) Status(ctx context.Context, _ *registration.Request, _ string) (*dps.OperationStatus, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

func (hung) Lookup(ctx context.Context, _ *registration.Request) (*dps.RegistrationState, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

// A registrar that hangs holds nobody for ever, nor the door's end.
func TestHungRegistrar(t *testing.T) {
	f := registrationtest.NewFixture(t, "hub-a.example.net")
	d := open(t, f, func(c *httpd.Config, _ *door.Config) { c.Registrar, c.RequestTimeout = hung{f.Service}, time.Second })
	c := d.dial(t, d.Derived("dev-1"))
	if a := c.Status(t, "x", ""); a.Status != 500 {
		t.Errorf("status: %d %s", a.Status, a.Body)
	}
	if res, b := c.do(t, "POST", c.path(""), ""); res.StatusCode != 500 {
		t.Errorf("lookup: %d %s", res.StatusCode, b)
	}
}
