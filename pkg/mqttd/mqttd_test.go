package mqttd_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/door"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/mqtt"
	"github.com/touchmark/touchmark/pkg/mqttd"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

const (
	responses     = "$dps/registrations/res/#"
	registerTopic = "$dps/registrations/PUT/iotdps-register/?$rid="
	statusTopic   = "$dps/registrations/GET/iotdps-get-operationstatus/?$rid="
)

// service is a running MQTT door.
type service struct {
	*registrationtest.Fixture
	*registrationtest.Listener
	over func(testing.TB, *tls.Conn) net.Conn // what MQTT is spoken on; nil for TLS itself
}

func open(t testing.TB, f *registrationtest.Fixture, edit ...func(*mqttd.Config, *door.Config)) *service {
	t.Helper()
	return &service{Fixture: f, Listener: f.Listen(t, func(ctx context.Context, l net.Listener, cert func(*tls.ClientHelloInfo) (*tls.Certificate, error)) error {
		cfg, dc := mqttd.Config{Registrar: f.Registrar(), Now: f.Now, ResponseDelay: -1}, door.Config{TLS: door.TLSConfig(cert), Log: registrationtest.Log(t)}
		for _, e := range edit {
			e(&cfg, &dc)
		}
		return door.New(dc).Serve(ctx, l, mqttd.New(cfg).Handle)
	})}
}

func newDoor(t testing.TB, edit ...func(*mqttd.Config, *door.Config)) *service {
	t.Helper()
	return open(t, registrationtest.NewFixture(t, "hub-a.example.net"), edit...)
}

// conn is one device's connection, spoken to in packets.
type conn struct {
	c      net.Conn
	r      *bufio.Reader
	closed bool // the door refused the CONNECT
	rid    int
}

func (d *service) dial(t testing.TB, c *tls.Certificate) *conn {
	t.Helper()
	var nc net.Conn = d.Dial(t, c)
	if d.over != nil {
		nc = d.over(t, nc.(*tls.Conn))
	}
	return &conn{c: nc, r: bufio.NewReader(nc)}
}

func (c *conn) write(t testing.TB, b []byte) {
	t.Helper()
	if _, err := c.c.Write(b); err != nil {
		t.Fatal(err)
	}
}

// read returns the next packet, which must be of that type.
func (c *conn) read(t testing.TB, want mqtt.Type) *mqtt.Packet {
	t.Helper()
	p, err := mqtt.Read(c.r, 1<<20)
	if err != nil {
		t.Fatalf("waiting for packet %d: %v", want, err)
	}
	if p.Type != want {
		t.Fatalf("packet %d, want %d", p.Type, want)
	}
	return p
}

// gone checks that the door hung up, and that nothing came before that.
func (c *conn) gone(t testing.TB, why string) {
	t.Helper()
	if p, err := mqtt.Read(c.r, 1<<20); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%s: the connection is still there: %v, %v", why, p, err)
	}
}

func username(d registrationtest.Device) string {
	return d.Scope + "/registrations/" + d.ID + "/api-version=" + d.APIVersion + "&ClientVersion=a test/1.0 (raw; with, anything)"
}

// connack reads an acknowledgement of CONNECT octet by octet: DPS-D 63 wants session present 0.
func (c *conn) connack(t testing.TB) (code byte) {
	t.Helper()
	var b [4]byte
	if _, err := io.ReadFull(c.r, b[:]); err != nil {
		t.Fatalf("waiting for CONNACK: %v", err)
	}
	if b[0] != 0x20 || b[1] != 2 || b[2] != 0 {
		t.Fatalf("CONNACK % x", b)
	}
	return b[3]
}

func (d *service) connect(t testing.TB, device registrationtest.Device) *conn {
	t.Helper()
	c := d.dial(t, device.Certificate)
	c.write(t, mqtt.AppendConnect(nil, device.ID, username(device), []byte(device.Token), 0))
	if code := c.connack(t); code != 0 {
		if code != 5 {
			t.Fatalf("CONNACK %d", code)
		}
		c.closed = true
		return c
	}
	c.write(t, mqtt.AppendSubscribe(nil, 1, responses, 1))
	if p := c.read(t, mqtt.Suback); p.ID != 1 || !bytes.Equal(p.Codes, []byte{1}) {
		t.Fatalf("SUBACK %+v", p)
	}
	return c
}

var topicForm = regexp.MustCompile(`^\$dps/registrations/res/(\d{3})/\?\$rid=([^&]*)(?:&retry-after=(\d+))?$`)

// ask publishes a request and reads its answer: DPS-D 68, 69, 71.
func (c *conn) ask(t testing.TB, topic, rid, rest, body string) registrationtest.Answer {
	t.Helper()
	if c.closed {
		return registrationtest.Answer{Status: 401}
	}
	c.write(t, mqtt.AppendPublish(nil, topic+rid+rest, 1, 77, []byte(body)))
	if p := c.read(t, mqtt.Puback); p.ID != 77 {
		t.Fatalf("PUBACK %d", p.ID)
	}
	p := c.read(t, mqtt.Publish)
	m := topicForm.FindStringSubmatch(p.Topic)
	if m == nil || m[2] != rid || p.QoS != 1 || p.ID == 0 || p.Dup || p.Retain {
		t.Fatalf("response %+v", p)
	}
	c.write(t, mqtt.AppendPuback(nil, p.ID))
	status, _ := strconv.Atoi(m[1])
	return registrationtest.Answer{Status: status, Hint: m[3], Body: p.Payload}
}

func (c *conn) next() string {
	c.rid++
	return strconv.Itoa(c.rid)
}

func (c *conn) Register(t testing.TB, body string) registrationtest.Answer {
	return c.ask(t, registerTopic, c.next(), "", body)
}

func (c *conn) Status(t testing.TB, operation, body string) registrationtest.Answer {
	return c.ask(t, statusTopic, c.next(), "&operationId="+operation, body)
}

func TestDoor(t *testing.T) { registrationtest.Doors(t, registrationtest.NewFixture, serve) }

func serve(t *testing.T, f *registrationtest.Fixture) func(testing.TB, registrationtest.Device) registrationtest.Conn {
	d := open(t, f)
	return func(t testing.TB, device registrationtest.Device) registrationtest.Conn { return d.connect(t, device) }
}

// A device whose request would be refused is turned away at its CONNECT; others are not, and a bad token is told first.
func TestOverloaded(t *testing.T) {
	d := newDoor(t, func(c *mqttd.Config, _ *door.Config) {
		c.Overloaded = func(r *registration.Request) bool {
			return r.IDScope == registrationtest.Scope && r.RegistrationID != "dev-2" && strings.HasPrefix(r.Remote, "127.0.0.1:")
		}
	})
	late := d.Derived("dev-1")
	late.Token = attesttest.Token(d.GroupKey, late.Scope, late.ID, d.Now().Add(-time.Hour))
	for _, x := range []struct {
		registrationtest.Device
		code byte
	}{{d.Derived("dev-1"), 3}, {d.Derived("dev-2"), 0}, {late, 5}} {
		c := d.dial(t, nil)
		c.write(t, mqtt.AppendConnect(nil, x.ID, username(x.Device), []byte(x.Token), 0))
		if code := c.connack(t); code != x.code {
			t.Errorf("%s: CONNACK %d, want %d", x.ID, code, x.code)
		}
		if x.code != 0 {
			c.gone(t, x.ID)
		}
	}
}

// DPS-D 63, 65, 66, 77, and section 11.1.
func TestConnect(t *testing.T) {
	d := newDoor(t)
	dev := d.Derived("dev-1")
	packet := func(edit func(*registrationtest.Device), id string) []byte {
		x := dev
		if edit != nil {
			edit(&x)
		}
		return mqtt.AppendConnect(nil, id, username(x), []byte(x.Token), 0)
	}
	user := func(s string) []byte { return mqtt.AppendConnect(nil, "dev-1", s, []byte(dev.Token), 0) }
	level5 := bytes.Replace(packet(nil, "dev-1"), []byte("MQTT\x04"), []byte("MQTT\x05"), 1)
	scope := registrationtest.Scope
	for name, x := range map[string]struct {
		packet []byte
		code   byte
	}{
		"good":                  {packet(nil, "dev-1"), 0},
		"another case":          {packet(nil, "DEV-1"), 0},
		"session kept":          {clean(packet(nil, "dev-1")), 0},
		"other client ID":       {packet(nil, "dev-2"), 5},
		"no client ID":          {packet(nil, ""), 2},
		"client ID with spaces": {packet(nil, "a b"), 2},
		"MQTT 5":                {level5, 1},
		"expired": {packet(func(x *registrationtest.Device) {
			x.Token = attesttest.Token(d.GroupKey, scope, "dev-1", d.Now().Add(-time.Hour))
		}, "dev-1"), 5},
		"not a token":     {packet(func(x *registrationtest.Device) { x.Token = "secret" }, "dev-1"), 5},
		"unknown key":     {packet(func(x *registrationtest.Device) { x.Token = d.ByKey("dev-1", d.OwnKey).Token }, "dev-1"), 0},
		"short user name": {user(scope + "/registrations/dev-1"), 5},
		"no version":      {user(scope + "/registrations/dev-1/ClientVersion=1"), 5},
		"wrong word":      {user(scope + "/devices/dev-1/api-version=2019-03-31"), 5},
		"empty user name": {user(""), 5},
		"question mark":   {user(scope + "/registrations/dev-1/?api-version=2019-03-31&x=y"), 0},
		"version last":    {user(scope + "/registrations/dev-1/ClientVersion=1/2 (3)&api-version=2019-03-31"), 0},
		"long user name":  {user(scope + "/registrations/dev-1/api-version=2019-03-31&ClientVersion=" + strings.Repeat("x", 1000)), 5},
	} {
		c := d.dial(t, nil)
		c.write(t, x.packet)
		if code := c.connack(t); code != x.code {
			t.Errorf("%s: CONNACK %d, want %d", name, code, x.code)
		} else if code != 0 {
			c.gone(t, name)
		}
	}
	c := d.connect(t, d.ByKey("dev-1", d.OwnKey))
	if a := c.Register(t, ""); a.Status != 401 {
		t.Errorf("unknown key: %d", a.Status)
	}
}

// clean clears the flag of a clean session.
func clean(connect []byte) []byte {
	i := bytes.Index(connect, []byte("MQTT\x04")) + 5
	connect[i] &^= 2
	return connect
}

// DPS-D 67 to 71, 75: subscriptions, request IDs, and QoS 0.
func TestSubscribe(t *testing.T) {
	d := newDoor(t)
	for qos, want := range []byte{0, 1, 1} {
		c := d.connect(t, d.Derived("dev-1"))
		c.write(t, mqtt.AppendSubscribe(nil, 9, responses, byte(qos)))
		if p := c.read(t, mqtt.Suback); p.ID != 9 || !bytes.Equal(p.Codes, []byte{want}) {
			t.Errorf("QoS %d: SUBACK %+v", qos, p)
		}
		c.write(t, mqtt.AppendPublish(nil, registerTopic+"1", 0, 0, nil))
		if p := c.read(t, mqtt.Publish); p.QoS != want || p.ID == 0 == (want == 1) {
			t.Errorf("QoS %d: response %+v", qos, p)
		}
		c.write(t, []byte{0xa2, byte(4 + len(responses)), 0, 10, 0, byte(len(responses))})
		c.write(t, []byte(responses))
		if p := c.read(t, mqtt.Unsuback); p.ID != 10 {
			t.Errorf("UNSUBACK %+v", p)
		}
		c.write(t, mqtt.AppendDisconnect(nil))
		c.gone(t, "after DISCONNECT")
	}
	c := d.connect(t, d.Derived("dev-1"))
	for _, rid := range []string{"1", "1", "6f9619ff-8b86-d011-b42d-00cf4fc964ff", "", "a%20b"} {
		for range 2 {
			a := c.ask(t, registerTopic, rid, "", "")
			var op struct{ OperationID string }
			if err := json.Unmarshal(a.Body, &op); err != nil || a.Status != 202 {
				t.Errorf("$rid %q: %d %s", rid, a.Status, a.Body)
			}
			if a := c.ask(t, statusTopic, rid, "&operationId="+op.OperationID, ""); a.Status != 200 { // of the same name
				t.Errorf("status, $rid %q: %d %s", rid, a.Status, a.Body)
			}
		}
	}
	// The operation before the request ID, and unknown parameters.
	a := c.ask(t, "$dps/registrations/GET/iotdps-get-operationstatus/?operationId=x&y=z&$rid=", "7", "", "")
	if a.Status != 404 {
		t.Errorf("unknown operation: %d %s", a.Status, a.Body)
	}
}

// DPS-D 67: a subscription to anything else is refused, and the connection ends soon: some devices do not read the code.
func TestForeignFilter(t *testing.T) {
	d := newDoor(t, func(c *mqttd.Config, _ *door.Config) { c.Second = 100 * time.Millisecond })
	for _, filter := range []string{"#", "$dps/registrations/res/+", "$dps/registrations/res/202/#"} {
		c := d.dial(t, nil)
		dev := d.Derived("dev-1")
		c.write(t, mqtt.AppendConnect(nil, "dev-1", username(dev), []byte(dev.Token), 0))
		c.connack(t)
		c.write(t, mqtt.AppendSubscribe(nil, 1, filter, 1))
		if p := c.read(t, mqtt.Suback); !bytes.Equal(p.Codes, []byte{0x80}) {
			t.Errorf("%s: SUBACK % x", filter, p.Codes)
		}
		c.gone(t, filter)
	}
}

// DPS-D 74: a CONNECT waits for nothing that a request waits for. The service is stuck here, with many devices at it; a
// device that comes now, by token or by certificate, is let in all the same.
func TestConnectUnderLoad(t *testing.T) {
	f := registrationtest.NewFixture(t, "hub-a.example.net")
	free := make(chan struct{})
	d := open(t, f, func(c *mqttd.Config, _ *door.Config) {
		c.Registrar, c.ResponseDelay = &stuck{f.Service, free}, time.Millisecond
	})
	t.Cleanup(sync.OnceFunc(func() { close(free) })) // before the door is closed
	var waiting []*conn
	for i := range 100 {
		dev := d.Derived(fmt.Sprint("dev-", i))
		if i%10 == 0 {
			dev = registrationtest.ByCertificate("own-cert", d.Own.TLS())
		}
		c := d.connect(t, dev) // SUBACK and all
		c.write(t, mqtt.AppendPublish(nil, registerTopic+"1", 1, 2, nil))
		c.read(t, mqtt.Puback)
		waiting = append(waiting, c)
	}
	for range waiting {
		free <- struct{}{}
	}
	for _, c := range waiting {
		c.read(t, mqtt.Publish)
	}
}

// stuck is a service whose requests wait until they are let go.
type stuck struct {
	registration.Registrar
	free chan struct{}
}

func (s *stuck) Register(ctx context.Context, req *registration.Request) (*dps.OperationStatus, error) {
	select {
	case <-s.free:
	case <-ctx.Done():
	}
	return s.Registrar.Register(ctx, req)
}

// DPS-D 73: everything in one segment, before anything was answered; and a publish before the subscription.
func TestPipelined(t *testing.T) {
	d := newDoor(t)
	for name, subscribeFirst := range map[string]bool{"in order": true, "published first": false} {
		dev := d.Derived("dev-1")
		c := d.dial(t, nil)
		b := mqtt.AppendConnect(nil, "dev-1", username(dev), []byte(dev.Token), 0)
		sub := mqtt.AppendSubscribe(nil, 1, responses, 1)
		pub := mqtt.AppendPublish(nil, registerTopic+"1", 1, 2, nil)
		if subscribeFirst {
			b = append(append(b, sub...), pub...)
		} else {
			b = append(append(b, pub...), sub...)
		}
		c.write(t, b)
		if code := c.connack(t); code != 0 {
			t.Fatalf("%s: CONNACK %d", name, code)
		}
		order := []mqtt.Type{mqtt.Suback, mqtt.Puback, mqtt.Publish}
		if !subscribeFirst {
			order = []mqtt.Type{mqtt.Puback, mqtt.Suback, mqtt.Publish}
		}
		for _, want := range order {
			c.read(t, want)
		}
	}
}

// DPS-D 28, and section 6.2: a repeated register does not begin a second operation.
func TestDuplicate(t *testing.T) {
	d := newDoor(t)
	c := d.connect(t, d.Derived("dev-1"))
	first := c.Register(t, "")
	pub := mqtt.AppendPublish(nil, registerTopic+"1", 1, 5, nil)
	pub[0] |= 8 // DUP
	c.write(t, pub)
	c.read(t, mqtt.Puback)
	if p := c.read(t, mqtt.Publish); !bytes.Equal(p.Payload, first.Body) {
		t.Errorf("%s, and again %s", first.Body, p.Payload)
	}
	if next := c.Register(t, ""); bytes.Equal(next.Body, first.Body) {
		t.Error("a new request got the old operation")
	}
}

// DPS-D 72: not before 50 ms, for the SDK that would miss it.
func TestResponseDelay(t *testing.T) {
	d := newDoor(t, func(c *mqttd.Config, _ *door.Config) { c.ResponseDelay = 0 })
	c := d.connect(t, d.Derived("dev-1"))
	c.write(t, mqtt.AppendPublish(nil, registerTopic+"1", 1, 2, nil))
	c.read(t, mqtt.Puback)
	start := time.Now()
	p := c.read(t, mqtt.Publish)
	if took := time.Since(start); took < 50*time.Millisecond {
		t.Errorf("the response came after %v", took)
	}
	var op struct{ OperationID string }
	if err := json.Unmarshal(p.Payload, &op); err != nil {
		t.Fatal(err)
	}
	quickest := time.Hour // a busy machine has its moments
	for range 5 {
		start := time.Now()
		if a := c.ask(t, statusTopic, "1", "&operationId="+op.OperationID, ""); a.Status != 200 {
			t.Fatal(a.Status)
		}
		quickest = min(quickest, time.Since(start))
	}
	if quickest < 50*time.Millisecond || quickest > 2*time.Second {
		t.Errorf("the state came after %v at best", quickest)
	}
}

// DPS-D 76: the answer fits the buffers of small devices.
func TestSize(t *testing.T) {
	d := open(t, registrationtest.NewFixture(t, strings.Repeat("h", 25)))
	id, group := strings.Repeat("d", 20), strings.Repeat("g", 20)
	key := bytes.Repeat([]byte("x"), 64)
	d.Put(t, registration.Group, group, registrationtest.Symmetric(key, key[1:]))
	for _, dev := range []registrationtest.Device{registrationtest.ByCertificate(id, attesttest.Leaf(t, d.Root, id).TLS()), d.ByKey(id, attest.DeriveKey(key, id))} {
		c := d.connect(t, dev)
		a := c.Register(t, "")
		op := regexp.MustCompile(`"operationId":"([^"]+)"`).FindSubmatch(a.Body)[1]
		if topic := len(statusTopic) + len("1&operationId=") + len(op); topic > 127 {
			t.Errorf("the status topic has %d octets", topic)
		}
		a = c.Status(t, string(op), "")
		if size := len(a.Body) + len("$dps/registrations/res/200/?$rid=1"); size > 640 || !bytes.Contains(a.Body, []byte(`"status":"assigned"`)) {
			t.Errorf("topic and body have %d octets: %s", size, a.Body)
		}
	}
}

// DPS-D 64: silence, with and without a keep-alive. A second has 20 ms here.
func TestKeepAlive(t *testing.T) {
	t.Parallel()
	const second = 20 * time.Millisecond
	d := newDoor(t, func(c *mqttd.Config, _ *door.Config) { c.Second = second })
	dev := d.Derived("dev-1")
	connect := func(keepAlive uint16) *conn {
		c := d.dial(t, nil)
		c.write(t, mqtt.AppendConnect(nil, "dev-1", username(dev), []byte(dev.Token), keepAlive))
		c.connack(t)
		return c
	}
	start := time.Now()
	quiet, strict, pinging := d.connect(t, dev), connect(10), connect(20)
	cut := make(chan time.Duration, 1)
	go func() {
		_, err := strict.r.ReadByte()
		if errors.Is(err, io.EOF) {
			cut <- time.Since(start)
		}
		close(cut)
	}()
	for range 12 {
		time.Sleep(5 * second)
		pinging.write(t, []byte{0xc0, 0})
		pinging.read(t, mqtt.Pingresp)
	}
	if a := quiet.Register(t, ""); a.Status != 202 {
		t.Errorf("after 60 s of silence: %d", a.Status)
	}
	// And nobody stays for ever.
	quiet.gone(t, "ten minutes")
	took := time.Since(start)
	if took < 500*second {
		t.Errorf("the conversation was cut after %v", took/second*time.Second)
	}
	// One and a half times ten seconds, and long before those who promised nothing.
	if at, ok := <-cut; !ok || at < 15*second || at > took/4 {
		t.Errorf("keep-alive of 10 s: cut after %v of %v", at/second*time.Second, took/second*time.Second)
	}
}

// Half-open connections are cut, and one address cannot take all places.
func TestHalfOpen(t *testing.T) {
	d := newDoor(t, func(c *mqttd.Config, d *door.Config) {
		c.Second, d.HandshakeTimeout, d.MaxPerAddress = 30*time.Millisecond, 300*time.Millisecond, 4
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
	mute, slow := d.dial(t, nil), d.dial(t, nil)
	slow.write(t, []byte{0x10, 0x7f, 0, 4})
	over, err := net.Dial("tcp", d.Addr)
	if err != nil {
		t.Fatal(err)
	}
	defer over.Close()
	for name, x := range map[string]net.Conn{"one too many": over, "silent": silent, "half a handshake": half, "no CONNECT": mute.c, "half a CONNECT": slow.c} {
		_ = x.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err := io.ReadAll(x); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: still open", name)
		}
	}
	if a := d.connect(t, d.Derived("dev-1")).Register(t, ""); a.Status != 202 {
		t.Errorf("the device behind them: %d %s", a.Status, a.Body)
	}
}

// After a refusal the connection is closed a moment later (section 11.1).
func TestLinger(t *testing.T) {
	d := newDoor(t, func(c *mqttd.Config, _ *door.Config) { c.Second = 50 * time.Millisecond })
	c := d.connect(t, d.ByKey("dev-1", d.OwnKey))
	if a := c.Register(t, ""); a.Status != 401 {
		t.Fatal(fmt.Sprint(a.Status))
	}
	c.gone(t, "after 401")
}

// hung never answers a question of what became of an operation, as long as it may.
type hung struct{ registration.Registrar }

func (hung) Status(ctx context.Context, _ *registration.Request, _ string) (*dps.OperationStatus, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

// A registrar that hangs holds nobody for ever, nor the door's end.
func TestHungRegistrar(t *testing.T) {
	f := registrationtest.NewFixture(t, "hub-a.example.net")
	d := open(t, f, func(c *mqttd.Config, _ *door.Config) { c.Registrar, c.Second = hung{f.Service}, 10*time.Millisecond })
	if a := d.connect(t, d.Derived("dev-1")).Status(t, "x", ""); a.Status != 500 {
		t.Errorf("%d %s", a.Status, a.Body)
	}
}
