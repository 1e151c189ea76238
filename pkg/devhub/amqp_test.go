package devhub_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/amqp"
	"github.com/touchmark/touchmark/pkg/amqpd"
	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/devhub"
	"github.com/touchmark/touchmark/pkg/door"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

// bus is a service's AMQP connection, in frames.
type bus struct {
	c net.Conn
	r *bufio.Reader
}

func (h *hub) listenAMQP(t testing.TB) *registrationtest.Listener {
	t.Helper()
	return h.f.Listen(t, func(ctx context.Context, l net.Listener, cert func(*tls.ClientHelloInfo) (*tls.Certificate, error)) error {
		d := door.New(door.Config{TLS: door.TLSConfig(cert), Log: registrationtest.Log(t)})
		return d.Serve(ctx, l, amqpd.New(amqpd.Config{Hub: h.Hub, Registrar: h.f.Registrar(), Now: h.f.Now, ResponseDelay: -1}).Handle)
	})
}

// dialBus connects as far as open, without SASL.
func dialBus(t testing.TB, l *registrationtest.Listener, host string) *bus {
	t.Helper()
	c := l.Dial(t, nil)
	b := &bus{c, bufio.NewReader(c)}
	b.raw(t, amqp.AppendHeader(nil, amqp.AMQP))
	b.write(t, &amqp.Open{ContainerID: "test", Hostname: host, MaxFrameSize: 4096, ChannelMax: 1<<16 - 1, IdleTimeout: 60_000}, nil)
	if p, err := amqp.ReadHeader(b.r); err != nil || p != amqp.AMQP {
		t.Fatalf("%v, %v", p, err)
	}
	b.read(t, &amqp.Open{})
	return b
}

func (b *bus) raw(t testing.TB, p []byte) {
	t.Helper()
	if _, err := b.c.Write(p); err != nil {
		t.Fatal(err)
	}
}

func (b *bus) write(t testing.TB, body amqp.Performative, payload []byte) {
	t.Helper()
	b.raw(t, amqp.AppendFrame(nil, 0, body, payload))
}

// read returns the next frame, which must be of a type.
func (b *bus) read(t testing.TB, want amqp.Performative) amqp.Frame {
	t.Helper()
	for {
		f, err := amqp.ReadFrame(b.r, 1<<20)
		if err != nil {
			t.Fatalf("waiting for %T: %v", want, err)
		}
		if _, ok := want.(*amqp.Flow); f.Body == nil || !ok && isFlow(f.Body) {
			continue // it keeps the connection alive, or gives credit again
		}
		if fmt.Sprintf("%T", f.Body) != fmt.Sprintf("%T", want) {
			t.Fatalf("%+v, want %T", f.Body, want)
		}
		return f
	}
}

func isFlow(p amqp.Performative) bool {
	_, ok := p.(*amqp.Flow)
	return ok
}

// links begins and attaches $cbs both ways, with credit.
func (b *bus) links(t testing.TB) {
	t.Helper()
	b.write(t, &amqp.Begin{IncomingWindow: 100, OutgoingWindow: 100}, nil)
	b.read(t, &amqp.Begin{})
	b.attach(t, 0, amqp.Sender, "$cbs")
	b.read(t, &amqp.Flow{})
	b.attach(t, 1, amqp.Receiver, "$cbs")
	handle, credit := uint32(1), uint32(50)
	b.write(t, &amqp.Flow{IncomingWindow: 100, OutgoingWindow: 100, Handle: &handle, LinkCredit: &credit}, nil)
}

func (b *bus) attach(t testing.TB, handle uint32, role bool, address string) *amqp.Attach {
	t.Helper()
	a := &amqp.Attach{Name: fmt.Sprint(handle), Handle: handle, Role: role, Source: &amqp.Source{Address: address}, Target: &amqp.Target{Address: address}}
	if role == amqp.Sender {
		a.InitialDeliveryCount = new(uint32)
	}
	b.write(t, a, nil)
	return b.read(t, &amqp.Attach{}).Body.(*amqp.Attach)
}

func (b *bus) send(t testing.TB, handle, id uint32, m *amqp.Message) {
	t.Helper()
	b.write(t, &amqp.Transfer{Handle: handle, DeliveryID: &id, DeliveryTag: []byte{byte(id)}}, amqp.AppendMessage(nil, m))
}

// login shows a token and returns the status.
func (b *bus) login(t testing.TB, token string) any {
	t.Helper()
	b.send(t, 0, 0, &amqp.Message{Properties: &amqp.Properties{MessageID: "id 1"}, ApplicationProperties: amqp.Map{{Key: "operation", Value: "put-token"}}, Value: token})
	b.read(t, &amqp.Disposition{})
	f := b.read(t, &amqp.Transfer{})
	m, err := amqp.DecodeMessage(f.Payload)
	if err != nil || m.Properties.CorrelationID != "id 1" {
		t.Fatalf("%+v, %v", m, err)
	}
	return m.ApplicationProperties.Get("status-code")
}

// A service shows its token and sends to devices; without the right it does not.
func TestAMQP(t *testing.T) {
	registrationtest.Goroutines(t)
	h := open(t)
	h.device(t, "dev+1")
	l := h.listenAMQP(t)
	b := dialBus(t, l, strings.ToUpper(hubName))
	b.links(t)
	if a := b.attach(t, 2, amqp.Sender, "/messages/devicebound"); a.Target != nil { // before the token
		t.Errorf("%+v", a)
	}
	if d := b.read(t, &amqp.Detach{}).Body.(*amqp.Detach); d.Error == nil || d.Error.Condition != "amqp:unauthorized-access" {
		t.Errorf("%+v", d)
	}
	key, _ := h.Key("service", false)
	for token, want := range map[string]int32{"": 401, "x": 401, h.token("device", false): 401, h.token("registryReadWrite", false): 401, attesttest.ServiceToken(secret, hubName, "service", h.f.Now().Add(time.Hour)): 401,
		attesttest.ServiceToken(key, "hub2.example.net", "service", h.f.Now().Add(time.Hour)): 401, attesttest.ServiceToken(key, hubName, "service", h.f.Now().Add(-time.Hour)): 401} {
		if got := b.login(t, token); got != want {
			t.Errorf("%v", got)
		}
	}
	if got := b.login(t, h.token("service", true)); got != int32(200) {
		t.Fatalf("%v", got)
	}
	if a := b.attach(t, 3, amqp.Receiver, "/messages/serviceBound/feedback"); a.Source != nil {
		t.Errorf("%+v", a)
	}
	if d := b.read(t, &amqp.Detach{}).Body.(*amqp.Detach); d.Error.Condition != "amqp:not-found" {
		t.Errorf("%+v", d)
	}
	b.attach(t, 2, amqp.Sender, "amqps://"+hubName+"/messages/deviceBound")
	b.read(t, &amqp.Flow{})
	outcome := func(id uint32, m *amqp.Message) any {
		t.Helper()
		b.send(t, 2, id, m)
		d := b.read(t, &amqp.Disposition{}).Body.(*amqp.Disposition)
		if d.First != id || !d.Settled || d.Role != amqp.Receiver {
			t.Errorf("%+v", d)
		}
		return d.State
	}
	expiry := amqp.Timestamp(h.f.Now().Add(time.Minute).UnixMilli())
	good := &amqp.Message{Properties: &amqp.Properties{To: "/devices/dev%2B1/messages/devicebound", MessageID: amqp.UUID{1}, ContentType: "text/plain", AbsoluteExpiryTime: &expiry},
		ApplicationProperties: amqp.Map{{Key: "n", Value: int32(7)}, {Key: "s", Value: "x"}}, Data: []byte("hi")}
	if _, ok := outcome(1, good).(*amqp.Accepted); !ok {
		t.Error("refused")
	}
	for to, want := range map[any]amqp.Symbol{"/devices/nobody/messages/devicebound": "amqp:not-found", "elsewhere": "amqp:not-found", 7: "amqp:not-found"} {
		if n, ok := to.(int); ok {
			to = uint64(n)
		}
		if r, ok := outcome(2, &amqp.Message{Properties: &amqp.Properties{To: to}, Data: []byte("x")}).(*amqp.Rejected); !ok || r.Error.Condition != want {
			t.Errorf("%v: %+v", to, r)
		}
	}
	if r, ok := outcome(3, &amqp.Message{Data: make([]byte, 1)}).(*amqp.Rejected); !ok || r.Error == nil {
		t.Error("nobody")
	}
	// In parts, and more than there is credit for at once.
	whole := amqp.AppendMessage(nil, good)
	id := uint32(4)
	for range 60 {
		b.write(t, &amqp.Transfer{Handle: 2, DeliveryID: &id, DeliveryTag: []byte{1}, More: true}, whole[:20])
		b.write(t, &amqp.Transfer{Handle: 2, More: true, Aborted: id%2 == 0}, whole[20:30])
		if id%2 == 1 {
			b.write(t, &amqp.Transfer{Handle: 2}, whole[30:])
			b.read(t, &amqp.Disposition{})
		}
		id++
	}
	doc := h.do(t, 200, "GET", "/devices/dev+1", "")
	if doc["cloudToDeviceMessageCount"] != 31.0 {
		t.Errorf("%v", doc["cloudToDeviceMessageCount"])
	}
	b.write(t, &amqp.Close{}, nil)
	for {
		f, err := amqp.ReadFrame(b.r, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := f.Body.(*amqp.Close); ok {
			break
		}
	}
}

// Whatever breaks the protocol ends the connection, and is told why.
func TestAMQPHostile(t *testing.T) {
	registrationtest.Goroutines(t)
	h := open(t, func(c *devhub.Config) { c.Second = 50 * time.Millisecond })
	l := h.listenAMQP(t)
	for name, x := range map[string]struct {
		begin bool
		send  func(*bus, *testing.T)
	}{
		"a link before a session":  {false, func(b *bus, t *testing.T) { b.write(t, &amqp.Attach{Name: "a"}, nil) }},
		"another channel":          {false, func(b *bus, t *testing.T) { b.raw(t, amqp.AppendFrame(nil, 1, &amqp.Begin{}, nil)) }},
		"a second open":            {true, func(b *bus, t *testing.T) { b.write(t, &amqp.Open{ContainerID: "x", MaxFrameSize: 512}, nil) }},
		"a second session":         {true, func(b *bus, t *testing.T) { b.write(t, &amqp.Begin{}, nil) }},
		"a handle beyond":          {true, func(b *bus, t *testing.T) { b.write(t, &amqp.Attach{Name: "a", Handle: 8}, nil) }},
		"a handle twice":           {true, func(b *bus, t *testing.T) { b.write(t, &amqp.Attach{Name: "a", Handle: 0}, nil) }},
		"a transfer to nobody":     {true, func(b *bus, t *testing.T) { b.send(t, 5, 1, &amqp.Message{}) }},
		"a transfer the wrong way": {true, func(b *bus, t *testing.T) { b.send(t, 1, 1, &amqp.Message{}) }},
		"a transfer without an ID": {true, func(b *bus, t *testing.T) { b.write(t, &amqp.Transfer{Handle: 0}, nil) }},
		"a message that is none": {true, func(b *bus, t *testing.T) {
			id := uint32(1)
			b.write(t, &amqp.Transfer{Handle: 0, DeliveryID: &id}, []byte{0, 1, 2})
		}},
		"a frame that is none":      {true, func(b *bus, t *testing.T) { b.raw(t, []byte{0, 0, 0, 9, 2, 0, 0, 0, 7}) }},
		"a frame that is too large": {true, func(b *bus, t *testing.T) { b.raw(t, []byte{0xff, 0, 0, 9, 2, 0, 0, 0}) }},
		"a message without end": {true, func(b *bus, t *testing.T) {
			id := uint32(1)
			for range 5 {
				b.write(t, &amqp.Transfer{Handle: 0, DeliveryID: &id, More: true}, make([]byte, 60_000))
			}
		}},
		"answers that are not taken": {true, func(b *bus, t *testing.T) {
			for i := range uint32(9) {
				b.send(t, 0, i, &amqp.Message{Value: "x"})
			}
		}},
		"silence": {true, func(*bus, *testing.T) {}},
	} {
		t.Run(name, func(t *testing.T) {
			b := dialBus(t, l, hubName)
			if x.begin {
				b.write(t, &amqp.Begin{IncomingWindow: 100, OutgoingWindow: 100}, nil)
				b.read(t, &amqp.Begin{})
				b.attach(t, 0, amqp.Sender, "$cbs")
				b.read(t, &amqp.Flow{})
				b.attach(t, 1, amqp.Receiver, "$cbs")
			}
			x.send(b, t)
			closed := false
			for {
				f, err := amqp.ReadFrame(b.r, 1<<20)
				if err != nil {
					break
				}
				if c, ok := f.Body.(*amqp.Close); ok {
					closed = c.Error != nil
				}
			}
			if !closed && name != "silence" {
				t.Error("the hub hung up without a word")
			}
		})
	}
	// Another host is the registration service's, which wants to know who is there.
	c := l.Dial(t, nil)
	b := &bus{c, bufio.NewReader(c)}
	b.raw(t, amqp.AppendHeader(nil, amqp.AMQP))
	b.write(t, &amqp.Open{ContainerID: "test", Hostname: "dps.example.net", MaxFrameSize: 4096}, nil)
	if _, err := amqp.ReadHeader(b.r); err != nil {
		t.Fatal(err)
	}
	if o := b.read(t, &amqp.Open{}).Body.(*amqp.Open); o.ContainerID != "touchmark" {
		t.Errorf("%+v", o)
	}
	b.read(t, &amqp.Close{})
}
