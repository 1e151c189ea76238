package httpd_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/touchmark/touchmark/pkg/door"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/httpd"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

// whoAndEcho tells the caller who they are and gives back what they say.
func whoAndEcho(_ context.Context, c *door.Conn) error {
	_ = c.SetReadDeadline(time.Now().Add(time.Minute))
	name := "nobody"
	if len(c.Certificates) > 0 {
		name = c.Certificates[0].Subject.CommonName
	}
	if _, err := fmt.Fprintf(c, "%s %d %s", name, len(c.Certificates), c.Remote); err != nil {
		return err
	}
	_, err := io.Copy(c, c)
	return err
}

func sockets(c *httpd.Config, _ *door.Config) {
	c.Sockets = map[string]door.Handler{"mqtt": whoAndEcho, "amqpwsb10": whoAndEcho}
}

// upgrade makes a WebSocket of a new connection, with further headers.
func (d *service) upgrade(t testing.TB, certificate *tls.Certificate, protocols []string, header ...string) (*websocket.Conn, *tls.Conn, error) {
	t.Helper()
	c := d.Dial(t, certificate)
	h := http.Header{}
	for _, line := range header {
		name, value, _ := strings.Cut(line, ": ")
		h.Add(name, value)
	}
	ws, _, err := websocket.Dial(t.Context(), "https://"+registrationtest.Host+"/$iothub/websocket?x=y", &websocket.DialOptions{Subprotocols: protocols, HTTPHeader: h,
		HTTPClient: &http.Client{Transport: &http.Transport{DialTLSContext: func(context.Context, string, string) (net.Conn, error) { return c, nil }}}})
	if err == nil {
		t.Cleanup(func() { _ = ws.CloseNow() })
	}
	return ws, c, err
}

func message(t testing.TB, ws *websocket.Conn) string {
	t.Helper()
	kind, b, err := ws.Read(t.Context())
	if err != nil || kind != websocket.MessageBinary {
		t.Fatalf("%v, %v", kind, err)
	}
	return string(b)
}

// The protocol is the first that both know, in the client's spelling; and the door knows the device as it does elsewhere.
func TestSocket(t *testing.T) { // DPS-D 91
	d := newDoor(t, sockets)
	for _, x := range []struct {
		offered []string
		chosen  string
	}{
		{[]string{"mqtt"}, "mqtt"}, {[]string{"MQTT"}, "MQTT"}, {[]string{"AMQPWSB10"}, "AMQPWSB10"}, {[]string{"amqpwsb10"}, "amqpwsb10"},
		{[]string{"mqttv3.1", "AMQPWSB10", "mqtt"}, "AMQPWSB10"},
	} {
		ws, c, err := d.upgrade(t, d.Own.TLS(d.Root), x.offered, "Origin: https://elsewhere.example", "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits")
		if err != nil || ws.Subprotocol() != x.chosen {
			t.Fatalf("%v: %v, %v", x.offered, ws, err)
		}
		if said := message(t, ws); said != "own-cert 2 "+c.LocalAddr().String() {
			t.Errorf("%s: %s", x.chosen, said)
		}
	}
	ws, _, err := d.upgrade(t, nil, []string{"mqtt"})
	if err != nil {
		t.Fatal(err)
	}
	message(t, ws)
	go func() { _, _, _ = ws.Read(context.Background()) }() // takes the pong
	if err := ws.Ping(t.Context()); err != nil {
		t.Errorf("ping: %v", err)
	}
}

// DPS-D 93.
func TestSocketText(t *testing.T) {
	d := newDoor(t, sockets)
	ws, _, err := d.upgrade(t, nil, []string{"mqtt"})
	if err != nil {
		t.Fatal(err)
	}
	message(t, ws)
	if err := ws.Write(t.Context(), websocket.MessageText, []byte("hello")); err != nil {
		t.Fatal(err)
	}
	if _, _, err := ws.Read(t.Context()); websocket.CloseStatus(err) != websocket.StatusUnsupportedData {
		t.Errorf("text: %v", err)
	}
}

const key = "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="

// What is no upgrade is refused with an error document, by status and without a word of WebSocket; the connection is a
// plain one still. Nothing of the service API answers behind an upgrade.
func TestSocketAbuse(t *testing.T) {
	d := newDoor(t, sockets)
	good := []string{"Connection: keep-alive, Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", key, "Sec-WebSocket-Protocol: mqtt"}
	without := func(i int, instead ...string) []string {
		return append(append(append([]string{}, good[:i]...), good[i+1:]...), instead...)
	}
	c := d.dial(t, d.Derived("dev-1"))
	for name, x := range map[string]struct {
		method, path, body string
		header             []string
		status             int
	}{
		"POST":                     {"POST", "/", "", good, 405},
		"PUT":                      {"PUT", c.path("/register"), "", good, 405},
		"a body":                   {"GET", "/", "{}", good, 400},
		"no Connection":            {"GET", "/", "", without(0), 400},
		"version 8":                {"GET", "/", "", without(2, "Sec-WebSocket-Version: 8"), 400},
		"no version":               {"GET", "/", "", without(2), 400},
		"two versions":             {"GET", "/", "", append(good, "Sec-WebSocket-Version: 8"), 400},
		"no key":                   {"GET", "/", "", without(3), 400},
		"two keys":                 {"GET", "/", "", append(good, key), 400},
		"a short key":              {"GET", "/", "", without(3, "Sec-WebSocket-Key: AAAA"), 400},
		"no base64":                {"GET", "/", "", without(3, "Sec-WebSocket-Key: !!!!"), 400},
		"no protocol":              {"GET", "/", "", without(4), 400},
		"an empty protocol":        {"GET", "/", "", without(4, "Sec-WebSocket-Protocol: ,"), 400},
		"an unknown protocol":      {"GET", "/$iothub/websocket", "", without(4, "Sec-WebSocket-Protocol: stomp"), 400},
		"a protocol and more":      {"GET", "/", "", without(4, "Sec-WebSocket-Protocol: mqtt;q=1"), 400},
		"the service API":          {"GET", "/enrollments/x?api-version=2021-10-01", "", without(4), 400},
		"bundles":                  {"POST", "/touchmark/bundles?api-version=2021-10-01", "", good, 405},
		"another upgrade":          {"GET", "/", "", []string{"Connection: Upgrade", "Upgrade: h2c"}, 404},
		"another, service API":     {"GET", "/enrollments/x?api-version=2021-10-01", "", []string{"Connection: Upgrade", "Upgrade: h2c"}, 401},
		"two upgrades, no version": {"GET", "/", "", []string{"Connection: Upgrade", "Upgrade: h2c, websocket"}, 400},
	} {
		res, b := c.do(t, x.method, x.path, x.body, x.header...)
		var doc struct{ ErrorCode dps.Code }
		if err := json.Unmarshal(b, &doc); err != nil || res.StatusCode != x.status || doc.ErrorCode.Status() != x.status || res.Header.Get("Upgrade")+res.Header.Get("Sec-WebSocket-Accept") != "" {
			t.Errorf("%s: %d %s %v", name, res.StatusCode, b, res.Header)
		}
		if res.Close {
			c = d.dial(t, d.Derived("dev-1"))
		}
	}
	// HTTP/1.0 has no upgrades.
	_, _ = io.WriteString(c.c, "GET / HTTP/1.0\r\nHost: h\r\n"+strings.Join(good, "\r\n")+"\r\n\r\n")
	if res, err := http.ReadResponse(c.r, nil); err != nil || res.StatusCode != 400 {
		t.Errorf("HTTP/1.0: %v, %v", res, err)
	}
	// Where no door has sockets there are none.
	plain := newDoor(t)
	if res, _ := plain.dial(t, plain.Derived("dev-1")).do(t, "GET", "/", "", good...); res.StatusCode != 404 {
		t.Errorf("without sockets: %d", res.StatusCode)
	}
}

// Frames that break RFC 6455 end the connection.
func TestSocketFrames(t *testing.T) {
	d := newDoor(t, sockets)
	var conns []*conn
	frames := map[string]string{
		"not masked":             "\x82\x01a",
		"a reserved bit":         "\xc2\x81\x00\x00\x00\x00a", // compressed, though nobody agreed
		"a reserved opcode":      "\x83\x81\x00\x00\x00\x00a",
		"a continuation first":   "\x80\x81\x00\x00\x00\x00a",
		"a fragmented ping":      "\x09\x80\x00\x00\x00\x00",
		"a ping of 126 octets":   "\x89\xfe\x00\x7e\x00\x00\x00\x00" + strings.Repeat("a", 126),
		"a length with its sign": "\x82\xff\xff\xff\xff\xff\xff\xff\xff\xff\x00\x00\x00\x00a",
		"a close of one octet":   "\x88\x81\x00\x00\x00\x00a",
		"a bad close code":       "\x88\x82\x00\x00\x00\x00\x03\xed",
		"half a frame":           "",
	}
	for _, frame := range frames {
		c := d.dial(t, registrationtest.Device{})
		_, _ = io.WriteString(c.c, "GET / HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"+key+"\r\nSec-WebSocket-Protocol: mqtt\r\n\r\n"+frame)
		if res, err := http.ReadResponse(c.r, nil); err != nil || res.StatusCode != 101 {
			t.Fatalf("%v, %v", res, err)
		}
		if frame == "" {
			_, _ = io.WriteString(c.c, "\x82\x8a\x00\x00")
			_ = c.c.CloseWrite()
		}
		conns = append(conns, c)
	}
	for i, c := range conns { // each is waited for a little, for its goodbye
		if _, err := io.Copy(io.Discard, c.r); err != nil && isTimeout(err) {
			t.Errorf("%d of %v: still there", i, frames)
		}
	}
}

func isTimeout(err error) bool {
	var ne net.Error
	return errors.As(err, &ne) && ne.Timeout()
}

// A WebSocket brings in so much and no more, though it be empty frames.
func TestSocketOctets(t *testing.T) {
	d := newDoor(t, sockets)
	c := d.dial(t, registrationtest.Device{})
	_, _ = io.WriteString(c.c, "GET / HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"+key+"\r\nSec-WebSocket-Protocol: mqtt\r\n\r\n")
	empty := strings.Repeat("\x82\x80\x00\x00\x00\x00", 1000)
	w := bufio.NewWriterSize(c.c, 1<<16)
	sent := 0
	for ; sent < 64<<20; sent += len(empty) {
		if _, err := io.WriteString(w, empty); err != nil {
			break
		}
	}
	if sent >= 64<<20 {
		t.Error("64 MiB of empty frames were taken")
	}
}
