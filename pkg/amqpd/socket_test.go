package amqpd_test

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"slices"
	"testing"

	"github.com/coder/websocket"

	"github.com/touchmark/touchmark/pkg/amqp"
	"github.com/touchmark/touchmark/pkg/amqpd"
	"github.com/touchmark/touchmark/pkg/door"
	"github.com/touchmark/touchmark/pkg/httpd"
	"github.com/touchmark/touchmark/pkg/mqtt"
	"github.com/touchmark/touchmark/pkg/mqttd"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

// openSocket serves AMQP and MQTT inside WebSockets, beside HTTPS.
func openSocket(t testing.TB, f *registrationtest.Fixture) *service {
	t.Helper()
	d := &service{Fixture: f, Listener: f.Listen(t, func(ctx context.Context, l net.Listener, cert func(*tls.ClientHelloInfo) (*tls.Certificate, error)) error {
		return httpd.New(httpd.Config{Registrar: f.Registrar(), Now: f.Now, Door: door.New(door.Config{TLS: door.TLSConfig(cert, "http/1.1")}),
			Sockets: map[string]door.Handler{
				"amqpwsb10": amqpd.New(amqpd.Config{Registrar: f.Registrar(), Protocol: "amqp-ws", Now: f.Now, ResponseDelay: -1}).Handle,
				"mqtt":      mqttd.New(mqttd.Config{Registrar: f.Registrar(), Protocol: "mqtt-ws", Now: f.Now, ResponseDelay: -1}).Handle}}).Serve(ctx, l)
	})}
	d.over = socket("/$iothub/websocket", "AMQPWSB10")
	return d
}

// socket makes a WebSocket of a connection.
func socket(path, protocol string) func(testing.TB, *tls.Conn) net.Conn {
	return func(t testing.TB, c *tls.Conn) net.Conn {
		t.Helper()
		ws, res, err := websocket.Dial(t.Context(), "https://"+registrationtest.Host+":443"+path, &websocket.DialOptions{Subprotocols: []string{protocol},
			CompressionMode: websocket.CompressionContextTakeover,
			HTTPClient:      &http.Client{Transport: &http.Transport{DialTLSContext: func(context.Context, string, string) (net.Conn, error) { return c, nil }}}})
		if err != nil {
			t.Fatal(err)
		}
		if res.Header.Get("Sec-WebSocket-Protocol") != protocol || res.Header.Get("Sec-WebSocket-Extensions") != "" { // DPS-D 91, 93
			t.Fatalf("%s: %v", protocol, res.Header)
		}
		t.Cleanup(func() { _ = ws.CloseNow() })
		return websocket.NetConn(context.Background(), ws, websocket.MessageBinary)
	}
}

// DPS-D 1 to 46, and 78, 80, 84 to 87 with them, inside WebSockets.
func TestSocketDoor(t *testing.T) {
	registrationtest.Doors(t, registrationtest.NewFixture, serveSocket)
}

func serveSocket(t *testing.T, f *registrationtest.Fixture) func(testing.TB, registrationtest.Device) registrationtest.Conn {
	d := openSocket(t, f)
	return func(t testing.TB, device registrationtest.Device) registrationtest.Conn { return d.connect(t, device) }
}

// DPS-D 91, 94: AMQP on the paths of every SDK, MQTT, and plain HTTPS, on one port and by one certificate.
func TestSocketPaths(t *testing.T) {
	d := openSocket(t, registrationtest.NewFixture(t, "hub-a.example.net"))
	for _, path := range []string{"/", "/mqtt", "/$iothub/websocket?iothub-no-client-cert=true"} {
		for _, protocol := range []string{"AMQPWSB10", "amqpwsb10"} {
			d.over = socket(path, protocol)
			for _, device := range []registrationtest.Device{d.Derived("dev-1"), registrationtest.ByCertificate("own-cert", d.Own.TLS())} {
				if a := d.connect(t, device).Register(t, ""); a.Status != 202 {
					t.Errorf("%s, %s, %s: %d", path, protocol, device.ID, a.Status)
				}
			}
		}
	}
	dev := d.Derived("dev-1")
	d.over = socket("/", "MQTT")
	c := d.dial(t, nil)
	c.write(t, mqtt.AppendConnect(nil, "dev-1", address(dev)+"/api-version="+dev.APIVersion, []byte(dev.Token), 0))
	if p, err := mqtt.Read(c.r, 100); err != nil || p.Type != mqtt.Connack {
		t.Errorf("MQTT: %+v, %v", p, err)
	}
	d.over = nil
	c = d.dial(t, nil)
	c.write(t, []byte("GET /x HTTP/1.1\r\nHost: h\r\n\r\n"))
	b := make([]byte, 12)
	if _, err := io.ReadFull(c.r, b); err != nil || string(b) != "HTTP/1.1 404" {
		t.Errorf("plain HTTPS: %q, %v", b, err)
	}
}

// A WebSocket's frames are not AMQP's: several AMQP frames come in one, and one in several.
func TestSocketFrames(t *testing.T) { // DPS-D 92
	d := openSocket(t, registrationtest.NewFixture(t, "hub-a.example.net"))
	dev := d.Derived("dev-1")
	all := append(amqp.AppendHeader(nil, amqp.SASL), frames(plainInit(dev))...)
	all = append(amqp.AppendHeader(all, amqp.AMQP), frames(opening, beginning, receiver(dev), sender(dev), granting(10))...)
	for _, size := range []int{1, 5, len(all)} {
		c := d.dial(t, nil)
		for b := range slices.Chunk(all, size) {
			c.write(t, b)
		}
		if p, err := amqp.ReadHeader(c.r); err != nil || p != amqp.SASL {
			t.Fatal(p, err)
		}
		expect[*amqp.SASLMechanisms](t, c)
		expect[*amqp.SASLOutcome](t, c)
		if p, err := amqp.ReadHeader(c.r); err != nil || p != amqp.AMQP {
			t.Fatal(p, err)
		}
		expect[*amqp.Open](t, c)
		expect[*amqp.Begin](t, c)
		expect[*amqp.Attach](t, c)
		expect[*amqp.Attach](t, c)
		expect[*amqp.Flow](t, c)
		if a := c.Register(t, ""); a.Status != 202 {
			t.Errorf("frames of %d octets: %d %s", size, a.Status, a.Body)
		}
	}
}
