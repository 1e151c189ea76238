package amqpd_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"net"
	"os"
	"strconv"
	"testing"

	"github.com/touchmark/touchmark/pkg/amqp"
	"github.com/touchmark/touchmark/pkg/amqpd"
	"github.com/touchmark/touchmark/pkg/door"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

// service is a running AMQP door.
type service struct {
	*registrationtest.Fixture
	*registrationtest.Listener
	over func(testing.TB, *tls.Conn) net.Conn // what AMQP is spoken on; nil for TLS itself
}

func open(t testing.TB, f *registrationtest.Fixture, edit ...func(*amqpd.Config, *door.Config)) *service {
	t.Helper()
	return &service{Fixture: f, Listener: f.Listen(t, func(ctx context.Context, l net.Listener, cert func(*tls.ClientHelloInfo) (*tls.Certificate, error)) error {
		cfg, dc := amqpd.Config{Registrar: f.Registrar(), Now: f.Now, ResponseDelay: -1}, door.Config{TLS: door.TLSConfig(cert), Log: registrationtest.Log(t)}
		for _, e := range edit {
			e(&cfg, &dc)
		}
		return door.New(dc).Serve(ctx, l, amqpd.New(cfg).Handle)
	})}
}

func newDoor(t testing.TB, edit ...func(*amqpd.Config, *door.Config)) *service {
	t.Helper()
	return open(t, registrationtest.NewFixture(t, "hub-a.example.net"), edit...)
}

// conn is one device's connection, spoken to in frames.
type conn struct {
	c      net.Conn
	r      *bufio.Reader
	closed bool // the door refused the connection
	next   uint32
}

func (d *service) dial(t testing.TB, c *tls.Certificate) *conn {
	t.Helper()
	var nc net.Conn = d.Dial(t, c)
	if d.over != nil {
		nc = d.over(t, nc.(*tls.Conn))
	}
	return &conn{c: nc, r: bufio.NewReader(nc)}
}

// end says that nothing more comes.
func (c *conn) end() { _ = c.c.(*tls.Conn).CloseWrite() }

func (c *conn) write(t testing.TB, b []byte) {
	t.Helper()
	if _, err := c.c.Write(b); err != nil {
		t.Fatal(err)
	}
}

func frames(ps ...amqp.Performative) (b []byte) {
	for _, p := range ps {
		b = amqp.AppendFrame(b, 0, p, nil)
	}
	return b
}

func (c *conn) send(t testing.TB, ps ...amqp.Performative) {
	t.Helper()
	c.write(t, frames(ps...))
}

func (c *conn) read(t testing.TB) amqp.Frame {
	t.Helper()
	f, err := amqp.ReadFrame(c.r, 1<<20)
	if err != nil {
		t.Fatalf("waiting for a frame: %v", err)
	}
	return f
}

// expect returns the next frame's body, which must be of that type.
func expect[T amqp.Performative](t testing.TB, c *conn) T {
	t.Helper()
	f := c.read(t)
	b, ok := f.Body.(T)
	if !ok {
		t.Fatalf("frame %T %+v, want %T", f.Body, f.Body, b)
	}
	return b
}

func (c *conn) header(t testing.TB, send, want amqp.Protocol) {
	t.Helper()
	c.write(t, amqp.AppendHeader(nil, send))
	if p, err := amqp.ReadHeader(c.r); err != nil || p != want {
		t.Fatalf("header %d, %v", p, err)
	}
}

// gone checks that the door hung up, and that nothing came before that.
func (c *conn) gone(t testing.TB, why string) {
	t.Helper()
	if _, err := c.r.ReadByte(); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%s: the connection is still there: %v", why, err)
	}
}

func plainInit(d registrationtest.Device) *amqp.SASLInit {
	return &amqp.SASLInit{Mechanism: "PLAIN", InitialResponse: []byte("\x00" + d.Scope + "/registrations/" + d.ID + "\x00" + d.Token), Hostname: registrationtest.Host}
}

func address(d registrationtest.Device) string { return d.Scope + "/registrations/" + d.ID }

func version(d registrationtest.Device) amqp.Map {
	return amqp.Map{{Key: amqp.Symbol("com.microsoft:client-version"), Value: "a test/1.0"}, {Key: amqp.Symbol("com.microsoft:api-version"), Value: d.APIVersion}}
}

func receiver(d registrationtest.Device) *amqp.Attach {
	return &amqp.Attach{Name: "in", Handle: 0, Role: amqp.Receiver, SndSettleMode: amqp.SendMixed, Source: &amqp.Source{Address: address(d)}, Target: &amqp.Target{Address: "local_endpoint"}, Properties: version(d)}
}

func sender(d registrationtest.Device) *amqp.Attach {
	return &amqp.Attach{Name: "out", Handle: 1, Role: amqp.Sender, SndSettleMode: amqp.SendMixed, Source: &amqp.Source{Address: "remote_endpoint"}, Target: &amqp.Target{Address: address(d)}, InitialDeliveryCount: new(uint32), Properties: version(d)}
}

func granting(n uint32) *amqp.Flow {
	return &amqp.Flow{NextIncomingID: new(uint32), IncomingWindow: 1000, OutgoingWindow: 1000, Handle: new(uint32), DeliveryCount: new(uint32), LinkCredit: &n}
}

var (
	opening   = &amqp.Open{ContainerID: "device", Hostname: registrationtest.Host, MaxFrameSize: 1<<32 - 1, ChannelMax: 1<<16 - 1}
	beginning = &amqp.Begin{IncomingWindow: 1<<31 - 1, OutgoingWindow: 65536, HandleMax: 1<<32 - 1}
)

// login opens a connection up to open. With a token it is by PLAIN, else bare.
func (d *service) login(t testing.TB, device registrationtest.Device) *conn {
	t.Helper()
	c := d.dial(t, device.Certificate)
	if device.Token != "" {
		c.header(t, amqp.SASL, amqp.SASL)
		expect[*amqp.SASLMechanisms](t, c)
		c.send(t, plainInit(device))
		if o := expect[*amqp.SASLOutcome](t, c); o.Code != amqp.SASLOK {
			if o.Code != amqp.SASLAuth {
				t.Fatalf("outcome %d", o.Code)
			}
			c.closed = true
			return c
		}
	}
	c.header(t, amqp.AMQP, amqp.AMQP)
	c.send(t, opening)
	if o := expect[*amqp.Open](t, c); o.Properties.Get(amqp.Symbol("com.microsoft:open-error")) != nil {
		expect[*amqp.Close](t, c)
		c.closed = true
	} else if o.ContainerID == "" || o.MaxFrameSize != 65536 || o.ChannelMax < 1 || o.IdleTimeout == 0 {
		t.Errorf("open %+v", o)
	}
	return c
}

// begin opens a session and, with an n, both links and that much credit for answers.
func (c *conn) begin(t testing.TB, d registrationtest.Device, n uint32) {
	t.Helper()
	c.send(t, beginning)
	if b := expect[*amqp.Begin](t, c); b.RemoteChannel == nil || *b.RemoteChannel != 0 || b.IncomingWindow < 2048 || b.OutgoingWindow < 2048 {
		t.Fatalf("begin %+v", b)
	}
	c.send(t, receiver(d))
	if a := expect[*amqp.Attach](t, c); a.Name != "in" || a.Role != amqp.Sender || a.Source == nil || a.Source.Address != address(d) || a.Target.Address != "local_endpoint" || a.MaxMessageSize == 0 || a.RcvSettleMode != amqp.ReceiveFirst || a.InitialDeliveryCount == nil {
		t.Fatalf("attach %+v", a)
	}
	c.send(t, sender(d))
	if a := expect[*amqp.Attach](t, c); a.Name != "out" || a.Role != amqp.Receiver || a.Target == nil || a.Target.Address != address(d) {
		t.Fatalf("attach %+v", a)
	}
	if f := expect[*amqp.Flow](t, c); *f.Handle != 1 || *f.LinkCredit != 50 {
		t.Fatalf("flow %+v", f)
	}
	if n > 0 {
		c.send(t, granting(n))
	}
}

func (d *service) connect(t testing.TB, device registrationtest.Device) *conn {
	t.Helper()
	c := d.login(t, device)
	if !c.closed {
		c.begin(t, device, 1000)
	}
	return c
}

// transfer makes the frames of one delivery.
func (c *conn) transfer(m *amqp.Message, size int) (b []byte) {
	payload := amqp.AppendMessage(nil, m)
	id := c.next
	c.next++
	for first := true; first || len(payload) > 0; first = false {
		t := &amqp.Transfer{Handle: 1, More: len(payload) > size}
		if first {
			t.DeliveryID, t.DeliveryTag, t.MessageFormat = &id, []byte{byte(id)}, new(uint32)
		}
		chunk := payload[:min(size, len(payload))]
		payload = payload[len(chunk):]
		b = amqp.AppendFrame(b, 0, t, chunk)
	}
	return b
}

func register(body string) *amqp.Message {
	m := &amqp.Message{ApplicationProperties: amqp.Map{{Key: "iotdps-operation-type", Value: "iotdps-register"}, {Key: "iotdps-forceRegistration", Value: false}}}
	if body != "" {
		m.Data = []byte(body)
	}
	return m
}

func status(operation, body string) *amqp.Message {
	return &amqp.Message{Data: []byte(body), ApplicationProperties: amqp.Map{{Key: "iotdps-operation-type", Value: "iotdps-get-operationstatus"}, {Key: "iotdps-operation-id", Value: operation}}}
}

// ask sends a request and reads its answer: DPS-D 84 to 87.
func (c *conn) ask(t testing.TB, m *amqp.Message) registrationtest.Answer {
	t.Helper()
	if c.closed {
		return registrationtest.Answer{Status: 401}
	}
	id := c.next
	c.write(t, c.transfer(m, 60_000))
	d := expect[*amqp.Disposition](t, c)
	if d.Role != amqp.Receiver || d.First != id || !d.Settled || d.Last != nil && *d.Last != id {
		t.Fatalf("disposition %+v", d)
	}
	if r, ok := d.State.(*amqp.Rejected); ok {
		return refusal(t, r.Error)
	}
	if _, ok := d.State.(*amqp.Accepted); !ok {
		t.Fatalf("state %T", d.State)
	}
	answer := c.answer(t)
	var a registrationtest.Answer
	a.Status, a.Body = 200, answer.Data
	if answer.Value != nil || answer.Data == nil {
		t.Errorf("the answer is %+v", answer)
	}
	var want any
	if m.Properties != nil {
		want = m.Properties.CorrelationID
	}
	if p := answer.Properties; (p == nil) != (want == nil) || p != nil && !equal(p.CorrelationID, want) {
		t.Errorf("correlation-id %+v, want %#v", p, want)
	}
	if h := answer.ApplicationProperties.Get("retry-after"); h != nil {
		n, ok := h.(int32)
		if !ok || answer.ApplicationProperties.Get("Retry-After") != h {
			t.Errorf("hints %#v", answer.ApplicationProperties)
		}
		a.Status, a.Hint = 202, strconv.Itoa(int(n))
	}
	return a
}

func equal(a, b any) bool {
	x, ok := a.([]byte)
	y, ok2 := b.([]byte)
	if ok || ok2 {
		return bytes.Equal(x, y)
	}
	return a == b
}

// answer reads a message, and settles it.
func (c *conn) answer(t testing.TB) *amqp.Message {
	t.Helper()
	var payload []byte
	var id uint32
	for first := true; ; first = false {
		f := c.read(t)
		tr, ok := f.Body.(*amqp.Transfer)
		if !ok || tr.Handle != 0 || first && (tr.DeliveryID == nil || len(tr.DeliveryTag) == 0 || tr.Settled == nil || *tr.Settled) {
			t.Fatalf("transfer %T %+v", f.Body, f.Body)
		}
		if first {
			id = *tr.DeliveryID
		}
		if payload = append(payload, f.Payload...); !tr.More {
			break
		}
	}
	c.send(t, &amqp.Disposition{Role: amqp.Receiver, First: id, Settled: true, State: &amqp.Accepted{}})
	m, err := amqp.DecodeMessage(payload)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

var conditions = map[int]amqp.Symbol{400: "com.microsoft:argument-error", 413: "com.microsoft:argument-error", 401: "amqp:unauthorized-access", 404: "amqp:not-found",
	429: "com.microsoft:device-container-throttled", 500: "amqp:internal-error", 503: "amqp:internal-error"}

// refusal reads an error of the wire: DPS-D 87.
func refusal(t testing.TB, e *amqp.Error) registrationtest.Answer {
	t.Helper()
	var doc struct{ ErrorCode int }
	if e == nil {
		t.Fatal("a refusal without an error")
	}
	if err := json.Unmarshal([]byte(e.Description), &doc); err != nil || e.Condition != conditions[doc.ErrorCode/1000] {
		t.Errorf("error %+v: %v", e, err)
	}
	a := registrationtest.Answer{Status: doc.ErrorCode / 1000, Body: []byte(e.Description)}
	if h, ok := e.Info.Get(amqp.Symbol("retry-after")).(int32); ok {
		if e.Info.Get(amqp.Symbol("Retry-After")) != h {
			t.Errorf("info %v", e.Info)
		}
		a.Hint = strconv.Itoa(int(h))
	}
	return a
}

func (c *conn) Register(t testing.TB, body string) registrationtest.Answer {
	return c.ask(t, register(body))
}

func (c *conn) Status(t testing.TB, operation, body string) registrationtest.Answer {
	return c.ask(t, status(operation, body))
}
