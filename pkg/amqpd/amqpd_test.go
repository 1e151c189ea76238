package amqpd_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/amqp"
	"github.com/touchmark/touchmark/pkg/amqpd"
	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/door"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

// DPS-D 1 to 46, and 78, 80, 84 to 87 with them: over PLAIN with a token, and bare with a certificate or nothing.
func TestDoor(t *testing.T) { registrationtest.Doors(t, registrationtest.NewFixture, serve) }

func serve(t *testing.T, f *registrationtest.Fixture) func(testing.TB, registrationtest.Device) registrationtest.Conn {
	d := open(t, f)
	return func(t testing.TB, device registrationtest.Device) registrationtest.Conn { return d.connect(t, device) }
}

// DPS-D 78: a bare opening without a client certificate, and one that says so by ANONYMOUS.
func TestNoProof(t *testing.T) {
	d := newDoor(t)
	for _, by := range []string{"bare", "ANONYMOUS"} {
		c := d.dial(t, nil)
		if by != "bare" {
			c.header(t, amqp.SASL, amqp.SASL)
			expect[*amqp.SASLMechanisms](t, c)
			c.send(t, &amqp.SASLInit{Mechanism: "ANONYMOUS", InitialResponse: []byte("nobody")})
			if o := expect[*amqp.SASLOutcome](t, c); o.Code != amqp.SASLOK {
				t.Errorf("outcome %d", o.Code)
			}
		}
		c.header(t, amqp.AMQP, amqp.AMQP)
		c.send(t, opening, beginning)
		e, ok := expect[*amqp.Open](t, c).Properties.Get(amqp.Symbol("com.microsoft:open-error")).(*amqp.Error)
		if !ok || refusal(t, e).Status != 401 {
			t.Errorf("%s: open-error %+v", by, e)
		}
		if again := expect[*amqp.Close](t, c).Error; again == nil || again.Description != e.Description || again.Condition != e.Condition {
			t.Errorf("%s: close %+v", by, again)
		}
		c.send(t, &amqp.Close{})
		c.gone(t, by)
	}
	// ANONYMOUS and EXTERNAL with a certificate are what a bare opening with one is.
	for _, mechanism := range []amqp.Symbol{"ANONYMOUS", "EXTERNAL"} {
		device := registrationtest.ByCertificate("own-cert", d.Own.TLS())
		c := d.dial(t, device.Certificate)
		c.header(t, amqp.SASL, amqp.SASL)
		expect[*amqp.SASLMechanisms](t, c)
		c.send(t, &amqp.SASLInit{Mechanism: mechanism})
		if o := expect[*amqp.SASLOutcome](t, c); o.Code != amqp.SASLOK {
			t.Fatalf("%s: outcome %d", mechanism, o.Code)
		}
		c.header(t, amqp.AMQP, amqp.AMQP)
		c.send(t, opening)
		expect[*amqp.Open](t, c)
		c.begin(t, device, 10)
		if a := c.Register(t, ""); a.Status != 202 {
			t.Errorf("%s: %d %s", mechanism, a.Status, a.Body)
		}
	}
}

// DPS-D 79, 80, and section 12.2: an array, octet by octet; and how the security layer ends.
func TestSASL(t *testing.T) {
	d := newDoor(t)
	c := d.dial(t, nil)
	c.write(t, []byte("AMQP\x03\x01\x00\x00"))
	want := "AMQP\x03\x01\x00\x00" + "\x00\x00\x00\x3b\x02\x01\x00\x00" + "\x00\x53\x40\xc0\x2e\x01\xe0\x2b\x04\xb3" +
		"\x00\x00\x00\x05PLAIN\x00\x00\x00\x03TPM\x00\x00\x00\x08EXTERNAL\x00\x00\x00\x09ANONYMOUS"
	b := make([]byte, len(want))
	if _, err := io.ReadFull(c.r, b); err != nil || string(b) != want {
		t.Errorf("mechanisms % x, %v", b, err)
	}
	dev := d.Derived("dev-1")
	with := func(edit func(*registrationtest.Device)) *amqp.SASLInit {
		x := dev
		edit(&x)
		return plainInit(x)
	}
	raw := func(s string) *amqp.SASLInit { return &amqp.SASLInit{Mechanism: "PLAIN", InitialResponse: []byte(s)} }
	for name, x := range map[string]struct {
		init *amqp.SASLInit
		code uint8
	}{
		"good":         {plainInit(dev), 0},
		"another case": {with(func(x *registrationtest.Device) { x.ID = "DEV-1" }), 0},
		"unknown key":  {with(func(x *registrationtest.Device) { x.Token = d.ByKey("dev-1", d.OwnKey).Token }), 0},
		"long names":   {with(func(x *registrationtest.Device) { *x = d.Derived(strings.Repeat("d", 128)) }), 0},
		"expired": {with(func(x *registrationtest.Device) {
			x.Token = attesttest.Token(d.GroupKey, x.Scope, x.ID, d.Now().Add(-time.Hour))
		}), 1},
		"no token":       {with(func(x *registrationtest.Device) { x.Token = "" }), 1},
		"not a token":    {with(func(x *registrationtest.Device) { x.Token = "secret" }), 1},
		"no response":    {&amqp.SASLInit{Mechanism: "PLAIN"}, 1},
		"no zeros":       {raw("dev-1"), 1},
		"an authzid":     {raw("admin\x00" + address(dev) + "\x00" + dev.Token), 1},
		"more zeros":     {raw("\x00" + address(dev) + "\x00" + dev.Token + "\x00"), 1},
		"wrong word":     {raw("\x00" + dev.Scope + "/devices/dev-1\x00" + dev.Token), 1},
		"no scope":       {raw("\x00/registrations/dev-1\x00" + dev.Token), 1},
		"one part more":  {raw("\x00" + address(dev) + "/x\x00" + dev.Token), 1},
		"EXTERNAL alone": {&amqp.SASLInit{Mechanism: "EXTERNAL"}, 1},
		"unknown":        {&amqp.SASLInit{Mechanism: "SCRAM-SHA-256"}, 1},
		"lower case":     {&amqp.SASLInit{Mechanism: "plain", InitialResponse: plainInit(dev).InitialResponse}, 1},
		"TPM, no key":    {&amqp.SASLInit{Mechanism: "TPM", InitialResponse: []byte("\x00scope\x00dev-1\x00")}, 1},
		"TPM, no zeros":  {&amqp.SASLInit{Mechanism: "TPM", InitialResponse: []byte("scope")}, 1},
	} {
		c := d.dial(t, nil)
		c.header(t, amqp.SASL, amqp.SASL)
		expect[*amqp.SASLMechanisms](t, c)
		c.send(t, x.init)
		if o := expect[*amqp.SASLOutcome](t, c); o.Code != x.code {
			t.Errorf("%s: outcome %d, want %d", name, o.Code, x.code)
		} else if o.Code != 0 {
			c.end()
			c.gone(t, name)
		}
	}
	if a := d.connect(t, d.ByKey("dev-1", d.OwnKey)).Register(t, ""); a.Status != 401 {
		t.Errorf("unknown key: %d", a.Status)
	}
}

// challenger has a blob for every TPM, or an error.
type challenger struct {
	registration.Registrar
	blob []byte
	err  error
	got  atomic.Pointer[registration.Request]
}

func (r *challenger) Challenge(_ context.Context, req *registration.Request) ([]byte, error) {
	r.got.Store(req)
	return r.blob, r.err
}

// DPS-D 81, 82: the mechanism TPM, octet by octet, to a TPM that takes its time.
func TestSASLTPM(t *testing.T) {
	t.Parallel()
	const second = 20 * time.Millisecond
	f := registrationtest.NewFixture(t, "hub-a.example.net")
	r := &challenger{Registrar: f.Service, blob: bytes.Repeat([]byte("blob"), 826/4+1)[:826]}
	var log bytes.Buffer
	d := open(t, f, func(c *amqpd.Config, _ *door.Config) {
		c.Registrar, c.Second, c.Log = r, second, slog.New(slog.NewTextHandler(&log, nil))
	})
	ek, srk := bytes.Repeat([]byte{1, 0}, 158), bytes.Repeat([]byte{0, 2}, 142)
	device := f.ByKey("own-key", f.OwnKey)
	begin := func() *conn {
		c := d.dial(t, nil)
		c.header(t, amqp.SASL, amqp.SASL)
		expect[*amqp.SASLMechanisms](t, c)
		c.send(t, &amqp.SASLInit{Mechanism: "TPM", InitialResponse: append([]byte("\x00"+device.Scope+"\x00own-key\x00"), ek...)})
		return c
	}
	respond := func(c *conn, b []byte) { c.send(t, &amqp.SASLResponse{Response: append([]byte{0}, b...)}) }
	challenge := func(c *conn, want ...byte) []byte {
		head, err := c.r.Peek(4)
		if err != nil || head[0]|head[1] != 0 || head[2] > 2 || head[2] == 2 && head[3] > 0 {
			t.Errorf("a SASL frame of % x octets, %v", head, err)
		}
		b := expect[*amqp.SASLChallenge](t, c).Challenge
		if len(b) == 0 || b[0] != want[0] {
			t.Fatalf("challenge % x", b)
		}
		return b[1:]
	}
	c := begin()
	if b := challenge(c, 0); len(b) > 0 {
		t.Errorf("the first challenge has % x behind its zero", b)
	}
	respond(c, srk)
	first := challenge(c, 0x80)
	respond(c, nil)
	blob := append(first, challenge(c, 0xc1)...)
	if len(first) != 470 || !bytes.Equal(blob, r.blob) {
		t.Errorf("segments of %d and %d octets", len(first), len(blob)-len(first))
	}
	time.Sleep(61 * second)
	respond(c, []byte(device.Token))
	if o := expect[*amqp.SASLOutcome](t, c); o.Code != amqp.SASLOK {
		t.Fatalf("outcome %d", o.Code)
	}
	if q := r.got.Load(); q.IDScope != device.Scope || q.RegistrationID != "own-key" || !bytes.Equal(q.Proof.TPM.EK, ek) || !bytes.Equal(q.Proof.TPM.SRK, srk) || q.Protocol != "amqp" || q.Proof.Token != "" {
		t.Errorf("the challenge was for %+v", q)
	}
	c.header(t, amqp.AMQP, amqp.AMQP)
	c.send(t, opening)
	expect[*amqp.Open](t, c)
	c.begin(t, device, 10)
	if a := c.Register(t, ""); a.Status != 202 {
		t.Errorf("registering with the token: %d %s", a.Status, a.Body)
	}
	// A response that is none, a token that is none, and a TPM that is not known.
	for name, end := range map[string]func(*conn){
		"no control octet":   func(c *conn) { c.send(t, &amqp.SASLResponse{}) },
		"wrong control":      func(c *conn) { c.send(t, &amqp.SASLResponse{Response: []byte{1}}) },
		"a second init":      func(c *conn) { c.send(t, plainInit(device)) },
		"frames of AMQP":     func(c *conn) { c.send(t, opening) },
		"words in an answer": func(c *conn) { respond(c, srk); challenge(c, 0x80); respond(c, []byte("x")) },
		"no token": func(c *conn) {
			respond(c, srk)
			challenge(c, 0x80)
			respond(c, nil)
			challenge(c, 0xc1)
			respond(c, []byte("x"))
		},
	} {
		c := begin()
		challenge(c, 0)
		end(c)
		if o := expect[*amqp.SASLOutcome](t, c); o.Code != amqp.SASLAuth {
			t.Errorf("%s: outcome %d", name, o.Code)
		}
	}
	for _, x := range []struct {
		err  error
		code uint8
	}{{dps.NewError(dps.CodeUnauthorized, "Unauthorized", nil), 1}, {dps.NewError(dps.CodeThrottled, "Slow down", nil), 4}, {io.EOF, 4}} {
		r.err = x.err
		c := begin()
		challenge(c, 0)
		respond(c, srk)
		if o := expect[*amqp.SASLOutcome](t, c); o.Code != x.code {
			t.Errorf("%v: outcome %d", x.err, o.Code)
		}
	}
	// Two segments, full, and a blob that would need a third: RSA 3072 twice.
	for size, code := range map[int]uint8{2 * 470: amqp.SASLOK, 2*470 + 1: amqp.SASLAuth} {
		r.blob, r.err = make([]byte, size), nil
		c := begin()
		challenge(c, 0)
		respond(c, srk)
		if code == amqp.SASLOK {
			challenge(c, 0x80)
			respond(c, nil)
			challenge(c, 0xc1)
			respond(c, []byte(device.Token))
		}
		if o := expect[*amqp.SASLOutcome](t, c); o.Code != code {
			t.Errorf("a blob of %d octets: outcome %d", size, o.Code)
		}
	}
	if s := log.String(); strings.Count(s, "level=INFO") != 1 || !strings.Contains(s, "does not fit") || !strings.Contains(s, "registrationId=own-key octets=941") {
		t.Error(s)
	}
	r.err = registration.ErrHangUp
	c = begin()
	challenge(c, 0)
	respond(c, srk)
	c.gone(t, "hung up on")
}

// DPS-D 83: every SDK writes the address in its own way.
func TestAddresses(t *testing.T) {
	d := newDoor(t)
	dev := d.Derived("dev-1")
	good := address(dev)
	for address, ok := range map[string]bool{
		good: true, "/" + good: true, "amqps://" + registrationtest.Host + "/" + good: true, "amqps://" + registrationtest.Host + ":5671/" + good: true, strings.ToUpper(good): true,
		dev.Scope + "/registrations/dev-2": false, "0ne00000000/registrations/dev-1": false, "": false, "//" + good: false, good + "/": false, "amqps://" + good: false, "x/" + good: false,
		dev.Scope + "/devices/dev-1": false, "$management": false, "amqps://host": false,
	} {
		for _, a := range []*amqp.Attach{receiver(dev), sender(dev)} {
			if a.Role == amqp.Receiver {
				a.Source.Address = address
			} else {
				a.Target.Address = address
			}
			c := d.login(t, dev)
			c.send(t, beginning, a)
			expect[*amqp.Begin](t, c)
			back := expect[*amqp.Attach](t, c)
			if mine := a.Role == amqp.Receiver && back.Source != nil || a.Role == amqp.Sender && back.Target != nil; mine != ok {
				t.Errorf("%s: %+v", address, back)
			}
			if !ok {
				x := expect[*amqp.Detach](t, c)
				if !x.Closed || x.Handle != a.Handle || refusal(t, x.Error).Status != 401 {
					t.Errorf("%s: %+v", address, x)
				}
				c.send(t, &amqp.Detach{Handle: a.Handle, Closed: true}, &amqp.Close{})
				expect[*amqp.Close](t, c) // and no second detach
			}
		}
	}
	// No address, and one that is no string.
	for _, s := range []*amqp.Source{nil, {}, {Address: amqp.Symbol(good)}, {Dynamic: true}} {
		c := d.login(t, dev)
		a := receiver(dev)
		a.Source = s
		c.send(t, beginning, a)
		expect[*amqp.Begin](t, c)
		expect[*amqp.Attach](t, c)
		expect[*amqp.Detach](t, c)
	}
	// A certificate's holder is who its first link says, on all of them.
	c := d.login(t, registrationtest.ByCertificate("own-cert", d.Own.TLS()))
	c.begin(t, registrationtest.ByCertificate("own-cert", nil), 10)
	other := receiver(dev)
	other.Handle = 2
	c.send(t, other)
	if a := expect[*amqp.Attach](t, c); a.Source != nil {
		t.Errorf("%+v", a)
	}
	expect[*amqp.Detach](t, c)
	if a := c.Register(t, ""); a.Status != 202 {
		t.Errorf("behind a refused link: %d", a.Status)
	}
}

// DPS-D 18, 84, and bodies of every kind.
func TestMessages(t *testing.T) {
	d := newDoor(t)
	c := d.connect(t, d.Derived("dev-1"))
	for _, id := range []any{"6f9619ff-8b86-d011-b42d-00cf4fc964ff", amqp.UUID{1, 2, 3}, uint64(7), uint64(1 << 40), []byte("octets"), "", nil} {
		m := register("")
		m.Properties = &amqp.Properties{MessageID: uint64(9), CorrelationID: id}
		if a := c.ask(t, m); a.Status != 202 { // which compares them
			t.Errorf("%v: %d", id, a.Status)
		}
	}
	body := `{"registrationId":"dev-1","payload":{"a":1}}`
	for _, m := range []*amqp.Message{{Value: body}, {Value: []byte(body)}, {Data: []byte{}}, {Value: []any{"x"}}, {Value: amqp.Map{}}} {
		m.ApplicationProperties = register("").ApplicationProperties
		if a := c.ask(t, m); a.Status != 202 {
			t.Errorf("%+v: %d %s", m, a.Status, a.Body)
		}
	}
	for _, m := range []*amqp.Message{{}, {ApplicationProperties: amqp.Map{}}, {ApplicationProperties: amqp.Map{{Key: "iotdps-operation-type", Value: "reboot"}}},
		{ApplicationProperties: amqp.Map{{Key: "iotdps-operation-type", Value: int32(1)}}}, {Value: "{", ApplicationProperties: register("").ApplicationProperties}} {
		if a := c.ask(t, m); a.Status != 400 {
			t.Errorf("%+v: %d %s", m, a.Status, a.Body)
		}
	}
	// Everything that only brokers want, the body in two pieces, and every piece in a frame of its own.
	var b []byte
	for _, s := range []amqp.Described{{Descriptor: uint64(0x70), Value: []any{true, uint8(4)}}, {Descriptor: uint64(0x71), Value: amqp.Map{}}, {Descriptor: amqp.Symbol("amqp:message-annotations:map"), Value: amqp.Map{{Key: amqp.Symbol("x"), Value: nil}}},
		{Descriptor: uint64(0x74), Value: register("").ApplicationProperties}, {Descriptor: uint64(0x75), Value: []byte(body[:9])}, {Descriptor: uint64(0x75), Value: []byte(body[9:])}, {Descriptor: uint64(0x78), Value: amqp.Map{}}} {
		b = amqp.Append(b, &s)
	}
	id := c.next
	c.next++
	var out []byte
	for i := range b {
		tr := &amqp.Transfer{Handle: 1, More: i < len(b)-1}
		if i == 0 {
			tr.DeliveryID, tr.DeliveryTag = &id, []byte("tag")
		}
		out = amqp.AppendFrame(out, 0, tr, b[i:i+1])
	}
	for i := range out { // and every octet by itself
		c.write(t, out[i:i+1])
	}
	if x := expect[*amqp.Disposition](t, c); x.First != id {
		t.Errorf("%+v", x)
	}
	c.answer(t)
	// The record, by an operation that no SDK uses.
	op := c.Register(t, "")
	var st dps.OperationStatus
	if err := json.Unmarshal(op.Body, &st); err != nil {
		t.Fatal(err)
	}
	c.Status(t, st.OperationID, "")
	a := c.ask(t, &amqp.Message{ApplicationProperties: amqp.Map{{Key: "iotdps-operation-type", Value: "iotdps-get-registration"}}})
	var state dps.RegistrationState
	if err := json.Unmarshal(a.Body, &state); err != nil || state.RegistrationID != "dev-1" || state.Status != dps.Assigned {
		t.Errorf("%s, %v", a.Body, err)
	}
}

// moody answers as it is told to.
type moody struct {
	registration.Registrar
	answer *dps.OperationStatus
	err    error
}

func (m *moody) Register(ctx context.Context, req *registration.Request) (*dps.OperationStatus, error) {
	if m.answer == nil && m.err == nil {
		return m.Registrar.Register(ctx, req)
	}
	return m.answer, m.err
}

// DPS-D 87: refusals by condition and document, with hints where a device may come back; and a hint made bad on purpose.
func TestRefusals(t *testing.T) {
	f := registrationtest.NewFixture(t, "hub-a.example.net")
	m := &moody{Registrar: f.Service}
	d := open(t, f, func(c *amqpd.Config, _ *door.Config) { c.Registrar = m })
	c := d.connect(t, d.Derived("dev-1"))
	for code, hint := range map[dps.Code]string{dps.CodeBadRequest: "", dps.CodeTooLarge: "", dps.CodeNotFound: "", dps.CodeThrottled: "3", dps.CodeInternal: "3", dps.CodeServiceOverloaded: "3"} {
		m.err = dps.NewError(code, "No", nil)
		if a := c.Register(t, ""); a.Status != code.Status() || a.Hint != hint {
			t.Errorf("%d: %+v", code, a)
		}
	}
	m.err = errors.New("the store is on fire")
	if a := c.Register(t, ""); a.Status != 500 || bytes.Contains(a.Body, []byte("fire")) {
		t.Errorf("%s", a.Body)
	}
	m.err, m.answer = nil, &dps.OperationStatus{OperationID: "op", Status: dps.Assigning, RetryAfter: "soon"}
	c.write(t, c.transfer(register(""), 1000))
	expect[*amqp.Disposition](t, c)
	if p := c.answer(t).ApplicationProperties; p.Get("retry-after") != "soon" || p.Get("Retry-After") != "soon" {
		t.Errorf("%v", p)
	}
	// What came settled is refused by its link's end.
	m.err, m.answer = dps.NewError(dps.CodeThrottled, "Slow down", nil), nil
	id, settled := c.next, true
	c.write(t, amqp.AppendFrame(nil, 0, &amqp.Transfer{Handle: 1, DeliveryID: &id, DeliveryTag: []byte{1}, Settled: &settled}, amqp.AppendMessage(nil, register(""))))
	if x := expect[*amqp.Detach](t, c); x.Handle != 1 || refusal(t, x.Error).Status != 429 {
		t.Errorf("%+v", x)
	}
	m.err = registration.ErrHangUp
	c = d.connect(t, d.Derived("dev-1"))
	c.write(t, c.transfer(register(""), 1000))
	c.gone(t, "hung up on")
}

// A conversation ends soon after a refusal by proof, with a word.
func TestLinger(t *testing.T) {
	d := newDoor(t, func(c *amqpd.Config, _ *door.Config) { c.Second = 50 * time.Millisecond })
	c := d.connect(t, d.ByKey("dev-1", d.OwnKey))
	if a := c.Register(t, ""); a.Status != 401 {
		t.Fatal(a.Status)
	}
	if x := expect[*amqp.Close](t, c); x.Error == nil || x.Error.Condition != "amqp:connection:forced" {
		t.Errorf("%+v", x)
	}
	c.send(t, &amqp.Close{})
	c.gone(t, "after 401")
}

// DPS-D 88: every ending is answered, and things begin anew behind it.
func TestEndings(t *testing.T) {
	d := newDoor(t)
	dev := d.Derived("dev-1")
	c := d.login(t, dev)
	for range 3 {
		c.begin(t, dev, 10)
		c.next = 0
		if a := c.Register(t, ""); a.Status != 202 {
			t.Fatal(a.Status)
		}
		c.send(t, &amqp.Detach{Handle: 0, Closed: true}, &amqp.Detach{Handle: 1}, &amqp.End{})
		if x := expect[*amqp.Detach](t, c); x.Handle != 0 || !x.Closed || x.Error != nil {
			t.Errorf("%+v", x)
		}
		if x := expect[*amqp.Detach](t, c); x.Handle != 1 || x.Closed {
			t.Errorf("%+v", x)
		}
		if x := expect[*amqp.End](t, c); x.Error != nil {
			t.Errorf("%+v", x)
		}
	}
	c.send(t, &amqp.Close{})
	if x := expect[*amqp.Close](t, c); x.Error != nil {
		t.Errorf("%+v", x)
	}
	c.gone(t, "after close")
}

// DPS-D 88: idle-time-outs, the peer's and ours. A second has 20 ms here.
func TestIdle(t *testing.T) {
	t.Parallel()
	const second = 20 * time.Millisecond
	d := newDoor(t, func(c *amqpd.Config, _ *door.Config) { c.Second = second })
	silent := d.login(t, d.Derived("dev-1"))
	talker := d.dial(t, d.Own.TLS())
	talker.header(t, amqp.AMQP, amqp.AMQP)
	o := *opening
	o.IdleTimeout = 30_000
	talker.send(t, &o)
	expect[*amqp.Open](t, talker)
	start := time.Now()
	for range 30 {
		if f := talker.read(t); f.Body != nil {
			t.Fatalf("%+v", f.Body)
		}
		talker.write(t, amqp.AppendFrame(nil, 0, nil, nil))
	}
	if took := time.Since(start); took > 30*15*second {
		t.Errorf("thirty empty frames took %v", took/second*time.Second)
	}
	// Silence of ours is the silence that was announced, twice.
	if x := expect[*amqp.Close](t, silent); x.Error == nil || x.Error.Condition != "amqp:connection:forced" {
		t.Errorf("%+v", x)
	}
	if took := time.Since(start); took < 200*second {
		t.Errorf("silence was cut after %v", took/second*time.Second)
	}
	// And nobody stays for ever, whatever is said.
	for {
		f, err := amqp.ReadFrame(talker.r, 1000)
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := f.Body.(*amqp.Close); ok {
			break
		}
		_, _ = talker.c.Write(amqp.AppendFrame(nil, 0, nil, nil))
	}
	if took := time.Since(start); took < 550*second {
		t.Errorf("the conversation was cut after %v", took/second*time.Second)
	}
	// Less than a second would be more work than talk.
	c := d.dial(t, d.Own.TLS())
	c.header(t, amqp.AMQP, amqp.AMQP)
	o.IdleTimeout = 1
	c.send(t, &o)
	expect[*amqp.Open](t, c)
	if x := expect[*amqp.Close](t, c); x.Error == nil || x.Error.Condition != "amqp:not-allowed" {
		t.Errorf("%+v", x)
	}
}

// DPS-D 89: nothing is sent without credit, or beyond the window; drain and echo are answered.
func TestCredit(t *testing.T) {
	d := newDoor(t)
	dev := d.Derived("dev-1")
	c := d.login(t, dev)
	c.begin(t, dev, 0)
	echo := func() *amqp.Flow {
		c.send(t, &amqp.Flow{NextIncomingID: new(uint32), IncomingWindow: 1000, OutgoingWindow: 1, Echo: true})
		return expect[*amqp.Flow](t, c)
	}
	for range 3 {
		c.write(t, c.transfer(register(""), 1000))
		expect[*amqp.Disposition](t, c)
	}
	if f := echo(); f.Handle != nil || *f.NextIncomingID != 3 || f.NextOutgoingID != 0 { // and no answer before it
		t.Errorf("%+v", f)
	}
	c.send(t, granting(1))
	c.answer(t)
	echo()
	c.send(t, granting(1)) // the same credit, told again
	echo()
	// No window, then one.
	f := granting(3)
	f.IncomingWindow = 1
	c.send(t, f, &amqp.Flow{NextIncomingID: new(uint32), IncomingWindow: 2, OutgoingWindow: 1})
	c.answer(t)
	c.send(t, &amqp.Flow{NextIncomingID: new(uint32), IncomingWindow: 2, OutgoingWindow: 1, Echo: true})
	if f := expect[*amqp.Flow](t, c); f.NextOutgoingID != 2 {
		t.Errorf("%+v", f)
	}
	c.send(t, &amqp.Flow{NextIncomingID: new(uint32), IncomingWindow: 100, OutgoingWindow: 1})
	c.answer(t)
	// Drain: what credit is left is used up by nothing.
	f = granting(10)
	f.Drain = true
	c.send(t, f)
	if f := expect[*amqp.Flow](t, c); !f.Drain || *f.LinkCredit != 0 || *f.DeliveryCount != 10 {
		t.Errorf("%+v %d %d", f, *f.LinkCredit, *f.DeliveryCount)
	}
	c.write(t, c.transfer(register(""), 1000))
	expect[*amqp.Disposition](t, c)
	echo()
	f = granting(11)
	c.send(t, f)
	c.answer(t)
	f.Echo = true
	c.send(t, f)
	if f := expect[*amqp.Flow](t, c); f.Handle == nil || *f.LinkCredit != 0 || *f.DeliveryCount != 11 {
		t.Errorf("%+v", f)
	}
	// Our credit comes back before it is used up, as often as it takes.
	c = d.connect(t, dev)
	granted := uint32(50)
	for range 120 {
		c.write(t, c.transfer(&amqp.Message{}, 1000))
		if x := expect[*amqp.Disposition](t, c); x.State == nil {
			t.Fatal(x)
		}
		if granted--; granted == 25 {
			if f := expect[*amqp.Flow](t, c); *f.Handle != 1 || *f.LinkCredit != 50 {
				t.Fatalf("%+v", f)
			}
			granted = 50
		}
	}
}

// A device that takes frames of 512 octets has its answers in several.
func TestSmallFrames(t *testing.T) {
	d := newDoor(t)
	dev := registrationtest.ByCertificate("own-cert", d.Own.TLS())
	c := d.dial(t, dev.Certificate)
	c.header(t, amqp.AMQP, amqp.AMQP)
	o := *opening
	o.MaxFrameSize = 512
	c.send(t, &o)
	expect[*amqp.Open](t, c)
	c.begin(t, dev, 100)
	a := c.Register(t, "")
	var st dps.OperationStatus
	if err := json.Unmarshal(a.Body, &st); err != nil {
		t.Fatal(err)
	}
	m := status(st.OperationID, "")
	m.Properties = &amqp.Properties{CorrelationID: strings.Repeat("x", 400)}
	if a := c.ask(t, m); a.Status != 200 {
		t.Errorf("%d %s", a.Status, a.Body)
	}
}

// DPS-D 90: one SDK asks for sender unsettled and receiver second, and settles in two steps.
func TestSecond(t *testing.T) {
	d := newDoor(t)
	dev := d.Derived("dev-1")
	c := d.login(t, dev)
	in, out := receiver(dev), sender(dev)
	for _, a := range []*amqp.Attach{in, out} {
		a.SndSettleMode, a.RcvSettleMode = amqp.SendUnsettled, amqp.ReceiveSecond
	}
	c.send(t, beginning, in, out, granting(10))
	expect[*amqp.Begin](t, c)
	for range 2 {
		if a := expect[*amqp.Attach](t, c); a.SndSettleMode != amqp.SendUnsettled || a.RcvSettleMode != amqp.ReceiveFirst {
			t.Errorf("%+v", a)
		}
	}
	expect[*amqp.Flow](t, c)
	a := c.Register(t, "")
	var st dps.OperationStatus
	if err := json.Unmarshal(a.Body, &st); err != nil {
		t.Fatal(err)
	}
	c.write(t, c.transfer(status(st.OperationID, "iotdps-get-operationstatus"), 1000))
	expect[*amqp.Disposition](t, c)
	answer := c.read(t)
	tr, ok := answer.Body.(*amqp.Transfer)
	if m, err := amqp.DecodeMessage(answer.Payload); !ok || err != nil || tr.Settled == nil || *tr.Settled || !bytes.Contains(m.Data, []byte(`"status":"assigned"`)) {
		t.Fatalf("%+v %q, %v", answer.Body, answer.Payload, err)
	}
	c.send(t, &amqp.Disposition{Role: amqp.Receiver, First: *tr.DeliveryID, State: &amqp.Accepted{}})
	x := expect[*amqp.Disposition](t, c)
	if _, ok = x.State.(*amqp.Accepted); !ok || x.Role != amqp.Sender || !x.Settled || x.First != *tr.DeliveryID {
		t.Errorf("%+v", x)
	}
}

// Section 12.6: not before 50 ms behind the disposition, for the SDK that would miss it.
func TestResponseDelay(t *testing.T) {
	d := newDoor(t, func(c *amqpd.Config, _ *door.Config) { c.ResponseDelay = 0 })
	c := d.connect(t, d.Derived("dev-1"))
	c.write(t, c.transfer(register(""), 1000))
	expect[*amqp.Disposition](t, c)
	start := time.Now()
	c.answer(t)
	if took := time.Since(start); took < 50*time.Millisecond {
		t.Errorf("the response came after %v", took)
	}
}

// Everything in one piece, before anything was answered, as far as a peer without credit may go; and requests that come at
// once are answered in order.
func TestPipelined(t *testing.T) {
	d := newDoor(t)
	dev := d.Derived("dev-1")
	c := d.dial(t, nil)
	out := append(amqp.AppendHeader(nil, amqp.SASL), frames(plainInit(dev))...)
	out = append(amqp.AppendHeader(out, amqp.AMQP), frames(opening, beginning, sender(dev), receiver(dev), granting(10))...)
	for i := range 3 {
		m := register("")
		m.Properties = &amqp.Properties{CorrelationID: uint64(i)}
		out = append(out, c.transfer(m, 50)...)
	}
	c.write(t, append(out, frames(&amqp.Detach{Handle: 0, Closed: true}, &amqp.Close{})...))
	for _, want := range []amqp.Protocol{amqp.SASL, amqp.AMQP} {
		if p, err := amqp.ReadHeader(c.r); err != nil || p != want {
			t.Fatal(p, err)
		}
		if want == amqp.SASL {
			expect[*amqp.SASLMechanisms](t, c)
			expect[*amqp.SASLOutcome](t, c)
		}
	}
	expect[*amqp.Open](t, c)
	expect[*amqp.Begin](t, c)
	expect[*amqp.Attach](t, c)
	expect[*amqp.Flow](t, c)
	expect[*amqp.Attach](t, c)
	for i := range 3 {
		expect[*amqp.Disposition](t, c)
		f := c.read(t)
		if m, err := amqp.DecodeMessage(f.Payload); err != nil || m.Properties.CorrelationID != uint64(i) {
			t.Errorf("%+v, %v", m, err)
		}
	}
	expect[*amqp.Detach](t, c)
	expect[*amqp.Close](t, c)
	c.gone(t, "after close")
}
