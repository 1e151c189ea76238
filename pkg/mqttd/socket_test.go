package mqttd_test

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/http"
	"runtime"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/door"
	"github.com/touchmark/touchmark/pkg/httpd"
	"github.com/touchmark/touchmark/pkg/mqtt"
	"github.com/touchmark/touchmark/pkg/mqttd"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

// openSocket serves MQTT inside WebSockets, beside HTTPS.
func openSocket(t testing.TB, f *registrationtest.Fixture, edit ...func(*mqttd.Config, *door.Config)) *service {
	t.Helper()
	d := &service{Fixture: f, Listener: f.Listen(t, func(ctx context.Context, l net.Listener, cert func(*tls.ClientHelloInfo) (*tls.Certificate, error)) error {
		cfg, dc := mqttd.Config{Registrar: f.Registrar(), Protocol: "mqtt-ws", Now: f.Now, ResponseDelay: -1}, door.Config{TLS: door.TLSConfig(cert, "http/1.1")}
		for _, e := range edit {
			e(&cfg, &dc)
		}
		return httpd.New(httpd.Config{Registrar: f.Registrar(), Now: f.Now, Door: door.New(dc),
			Sockets: map[string]door.Handler{"mqtt": mqttd.New(cfg).Handle}}).Serve(ctx, l)
	})}
	d.over = func(t testing.TB, c *tls.Conn) net.Conn {
		return websocket.NetConn(context.Background(), upgrade(t, c, "/$iothub/websocket", "mqtt"), websocket.MessageBinary)
	}
	return d
}

// upgrade makes a WebSocket of a connection.
func upgrade(t testing.TB, c *tls.Conn, path, protocol string) *websocket.Conn {
	t.Helper()
	ws, res, err := websocket.Dial(t.Context(), "https://"+registrationtest.Host+":443"+path, &websocket.DialOptions{Subprotocols: []string{protocol},
		CompressionMode: websocket.CompressionContextTakeover,
		HTTPClient:      &http.Client{Transport: &http.Transport{DialTLSContext: func(context.Context, string, string) (net.Conn, error) { return c, nil }}}})
	if err != nil {
		t.Fatal(err)
	}
	if ws.Subprotocol() != protocol || res.Header.Get("Sec-WebSocket-Extensions") != "" { // DPS-D 91, 93
		t.Fatalf("%s: %v", protocol, res.Header)
	}
	t.Cleanup(func() { _ = ws.CloseNow() })
	return ws
}

func TestSocketDoor(t *testing.T) {
	registrationtest.Doors(t, registrationtest.NewFixture, serveSocket)
}

func serveSocket(t *testing.T, f *registrationtest.Fixture) func(testing.TB, registrationtest.Device) registrationtest.Conn {
	d := openSocket(t, f)
	return func(t testing.TB, device registrationtest.Device) registrationtest.Conn { return d.connect(t, device) }
}

// DPS-D 91, 94: on any path, in any spelling, on the port and with the certificate of HTTPS.
func TestSocketPaths(t *testing.T) {
	d := openSocket(t, registrationtest.NewFixture(t, "hub-a.example.net"))
	for _, path := range []string{"/", "/mqtt", "/$iothub/websocket", "/$iothub/websocket?iothub-no-client-cert=true", "/enrollments/x?api-version=2021-10-01"} {
		for _, protocol := range []string{"mqtt", "MQTT", "Mqtt"} {
			d.over = func(t testing.TB, c *tls.Conn) net.Conn {
				return websocket.NetConn(context.Background(), upgrade(t, c, path, protocol), websocket.MessageBinary)
			}
			if a := d.connect(t, d.Derived("dev-1")).Register(t, ""); a.Status != 202 {
				t.Errorf("%s, %s: %d", path, protocol, a.Status)
			}
		}
	}
	// The certificate counts, whatever the query says of it.
	d.over = func(t testing.TB, c *tls.Conn) net.Conn {
		return websocket.NetConn(context.Background(), upgrade(t, c, "/?iothub-no-client-cert=true", "mqtt"), websocket.MessageBinary)
	}
	if a := d.connect(t, registrationtest.ByCertificate("own-cert", d.Own.TLS())).Register(t, ""); a.Status != 202 {
		t.Errorf("by certificate: %d", a.Status)
	}
	c := d.Dial(t, nil)
	if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: h\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 12)
	if _, err := io.ReadFull(c, b); err != nil || string(b) != "HTTP/1.1 404" {
		t.Errorf("plain HTTPS: %q, %v", b, err)
	}
}

// DPS-D 92: a frame's end means nothing. Packets come in frames of every size, empty ones too, and fragments.
func TestSocketFrames(t *testing.T) {
	d := openSocket(t, registrationtest.NewFixture(t, "hub-a.example.net"))
	dev := d.Derived("dev-1")
	all := mqtt.AppendConnect(nil, dev.ID, username(dev), []byte(dev.Token), 0)
	all = mqtt.AppendSubscribe(all, 1, responses, 1)
	all = mqtt.AppendPublish(all, registerTopic+"1", 1, 2, nil)
	for _, size := range []int{1, 2, 3, 7, len(all)/3 + 1, len(all)} {
		var ws *websocket.Conn
		d.over = func(t testing.TB, c *tls.Conn) net.Conn {
			ws = upgrade(t, c, "/", "mqtt")
			return websocket.NetConn(context.Background(), ws, websocket.MessageBinary)
		}
		c := d.dial(t, nil)
		for at := 0; at < len(all); at += size {
			c.write(t, all[at:min(at+size, len(all))])
			if at%5 == 0 {
				c.write(t, nil)
			}
		}
		if code := c.connack(t); code != 0 {
			t.Fatalf("frames of %d: CONNACK %d", size, code)
		}
		for _, want := range []mqtt.Type{mqtt.Suback, mqtt.Puback, mqtt.Publish} {
			c.read(t, want)
		}
		// One message in fragments.
		w, err := ws.Writer(t.Context(), websocket.MessageBinary)
		if err != nil {
			t.Fatal(err)
		}
		pub := mqtt.AppendPublish(nil, registerTopic+"2", 1, 3, nil)
		for i := range pub {
			if _, err := w.Write(pub[i : i+1]); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		c.read(t, mqtt.Puback)
		c.read(t, mqtt.Publish)
	}
}

// A frame may say that it is as long as it likes: what counts is the packet in it, and how fast it comes.
func TestSocketSizes(t *testing.T) {
	d := openSocket(t, registrationtest.NewFixture(t, "hub-a.example.net"), func(c *mqttd.Config, d *door.Config) {
		c.Second, d.Slack, d.MinRate = 50*time.Millisecond, 300*time.Millisecond, 1<<20
	})
	var below *tls.Conn
	d.over = func(t testing.TB, c *tls.Conn) net.Conn {
		below = c
		return websocket.NetConn(context.Background(), upgrade(t, c, "/", "mqtt"), websocket.MessageBinary)
	}
	frame := func(n uint64, begin string) []byte { // masked with zeroes
		return append(append(binary.BigEndian.AppendUint64([]byte{0x82, 0xff}, n), 0, 0, 0, 0), begin...)
	}
	for name, begin := range map[string]string{
		"a packet of 256 MB":     "\x10\xff\xff\xff\x7f",
		"a bad length":           "\x10\xff\xff\xff\xff\xff",
		"half a packet, no more": "\x10\x64\x00\x04MQTT",
		"nothing at all":         "",
	} {
		c := d.dial(t, nil)
		if _, err := below.Write(frame(1<<62, begin)); err != nil {
			t.Fatal(err)
		}
		c.gone(t, name)
	}
	// Frames that bring nothing bring nobody further either: the deadline of the first packet holds.
	c := d.dial(t, nil)
	for {
		if _, err := below.Write([]byte{0x82, 0x80, 0, 0, 0, 0}); err != nil {
			break
		}
	}
	c.gone(t, "empty frames")
}

// Deadlines work through a WebSocket: who is silent is cut, and so is who does not read.
func TestSocketDeadlines(t *testing.T) {
	d := openSocket(t, registrationtest.NewFixture(t, "hub-a.example.net"), func(c *mqttd.Config, _ *door.Config) { c.Second = 50 * time.Millisecond })
	d.dial(t, nil).gone(t, "silent from the start")
	dev := d.Derived("dev-1")
	c := d.dial(t, nil)
	c.write(t, mqtt.AppendConnect(nil, dev.ID, username(dev), []byte(dev.Token), 10))
	c.connack(t)
	for range 3 {
		c.write(t, []byte{0xc0, 0}) // PINGREQ
		c.read(t, mqtt.Pingresp)
	}
	c.gone(t, "silent for longer than its keep-alive")

	deaf := d.Dial(t, nil)
	ws := upgrade(t, deaf, "/", "mqtt")
	nc := websocket.NetConn(context.Background(), ws, websocket.MessageBinary)
	b := mqtt.AppendConnect(nil, dev.ID, username(dev), []byte(dev.Token), 0)
	for range 500 {
		b = append(b, 0xc0, 0)
	}
	for {
		if _, err := nc.Write(b); err != nil {
			return // it was cut, and it never read
		}
		b = b[:0]
		for range 4000 {
			b = append(b, 0xc0, 0)
		}
	}
}

// The close handshake is complete, whoever begins it; a drain ends those who wait.
func TestSocketEnd(t *testing.T) {
	d := openSocket(t, registrationtest.NewFixture(t, "hub-a.example.net"))
	var ws *websocket.Conn
	d.over = func(t testing.TB, c *tls.Conn) net.Conn {
		ws = upgrade(t, c, "/", "mqtt")
		return websocket.NetConn(context.Background(), ws, websocket.MessageBinary)
	}
	d.connect(t, d.Derived("dev-1"))
	if err := ws.Close(websocket.StatusNormalClosure, "bye"); err != nil {
		t.Errorf("closed by the device: %v", err)
	}
	c := d.connect(t, d.Derived("dev-1"))
	c.write(t, mqtt.AppendDisconnect(nil))
	if _, _, err := ws.Reader(t.Context()); websocket.CloseStatus(err) != websocket.StatusNormalClosure {
		t.Errorf("closed by the door: %v", err)
	}
	d.connect(t, d.Derived("dev-1")) // and one stays until the service stops
}

// Who is in a WebSocket counts with everybody else, by address and in all.
func TestSocketCounts(t *testing.T) {
	d := openSocket(t, registrationtest.NewFixture(t, "hub-a.example.net"), func(_ *mqttd.Config, d *door.Config) { d.MaxPerAddress = 2 })
	a := d.connect(t, d.Derived("dev-1"))
	d.connect(t, d.Derived("dev-2"))
	c, err := net.Dial("tcp", d.Addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetReadDeadline(time.Now().Add(30 * time.Second))
	var ne net.Error
	if _, err := c.Read(make([]byte, 1)); err == nil || errors.As(err, &ne) && ne.Timeout() {
		t.Errorf("a third connection: %v", err)
	}
	if x := a.Register(t, ""); x.Status != 202 {
		t.Errorf("%d", x.Status)
	}
}

// What an idle device costs, here and there: for the log, and with a bound that only a leak would pass.
func TestSocketMemory(t *testing.T) {
	const n = 300
	f := registrationtest.NewFixture(t, "hub-a.example.net")
	measure := func(d *service, raw bool) uint64 {
		dev := d.Derived("dev-1")
		var before, after runtime.MemStats
		sum := func(m *runtime.MemStats) {
			runtime.GC()
			runtime.GC()
			runtime.ReadMemStats(m)
		}
		hello := mqtt.AppendConnect(nil, dev.ID, username(dev), []byte(dev.Token), 0)
		cert := attesttest.Leaf(t, nil, "dev-1").TLS()
		var all []*tls.Conn
		sum(&before)
		for range n {
			c := d.Dial(t, cert)
			if raw {
				_, _ = c.Write(hello)
			} else {
				_, _ = io.WriteString(c, "GET / HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Protocol: mqtt\r\n\r\n")
				head := make([]byte, 1)
				for end := 0; end < 4; {
					if _, err := io.ReadFull(c, head); err != nil {
						t.Fatal(err)
					}
					if head[0] == "\r\n\r\n"[end] {
						end++
					} else {
						end = 0
					}
				}
				frame := append([]byte{0x82, 0x80 | 126}, binary.BigEndian.AppendUint16(nil, uint16(len(hello)))...)
				_, _ = c.Write(append(append(frame, 0, 0, 0, 0), hello...))
			}
			if _, err := io.ReadFull(c, make([]byte, 4)); err != nil {
				t.Fatal(err)
			}
			all = append(all, c)
		}
		sum(&after)
		runtime.KeepAlive(all)
		return (after.HeapInuse + after.StackInuse - before.HeapInuse - before.StackInuse) / n
	}
	plain, socket := measure(open(t, f), true), measure(openSocket(t, f), false)
	t.Logf("an idle device, its client's end included: %d octets in MQTT, %d in MQTT in a WebSocket", plain, socket)
	if socket > plain+64<<10 {
		t.Errorf("a WebSocket costs %d octets more", socket-plain)
	}
}

// Pings and pongs between packets are nobody's packet: the conversation goes on behind them, and a ping is answered however long
// the door has said nothing. Inside a packet they win no time.
func TestSocketPings(t *testing.T) {
	const slack = 200 * time.Millisecond // and the time for a write
	d := openSocket(t, registrationtest.NewFixture(t, "hub-a.example.net"), func(c *mqttd.Config, d *door.Config) {
		c.Second, d.Slack, d.MinRate = slack/10, slack, 1<<20
	})
	var ws *websocket.Conn
	var below *tls.Conn
	d.over = func(t testing.TB, c *tls.Conn) net.Conn {
		below, ws = c, upgrade(t, c, "/", "mqtt")
		return websocket.NetConn(context.Background(), ws, websocket.MessageBinary)
	}
	c := d.connect(t, d.Derived("dev-1"))
	for _, pong := range []bool{false, true} {
		<-time.After(slack + slack/2)
		answered := make(chan error, 1)
		go func() {
			_, err := mqtt.Read(c.r, 100) // takes the WebSocket's pong as well
			answered <- err
		}()
		if pong {
			if _, err := below.Write([]byte{0x8a, 0x80, 0, 0, 0, 0}); err != nil {
				t.Fatal(err)
			}
		} else if err := ws.Ping(t.Context()); err != nil {
			t.Fatalf("ping: %v", err)
		}
		<-time.After(slack + slack/2)
		c.write(t, []byte{0xc0, 0})
		if err := <-answered; err != nil {
			t.Fatalf("after a control frame (pong: %v): %v", pong, err)
		}
	}
	c.write(t, []byte{0x30})
	for start := time.Now(); time.Since(start) < 40*slack; <-time.After(slack / 10) {
		if _, err := below.Write([]byte{0x8a, 0x80, 0, 0, 0, 0}); err != nil {
			return
		}
	}
	t.Error("pongs held half a packet open")
}
