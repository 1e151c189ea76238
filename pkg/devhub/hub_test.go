package devhub_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/devhub"
	"github.com/touchmark/touchmark/pkg/door"
	"github.com/touchmark/touchmark/pkg/mqtt"
	"github.com/touchmark/touchmark/pkg/mqttd"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

const (
	hubName = "hub1.example.net"
	version = "?api-version=2021-04-12"
)

var (
	secret  = []byte("a secret of a test, and no other")
	dataKey = bytes.Repeat([]byte{7}, 32)
	// deviceKey is that of the vectors in service API, sections 2.2 and 5.6.
	deviceKey = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
	otherKey  = base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{9}, 32))
)

// hub is a hub with its MQTT door.
type hub struct {
	*devhub.Hub
	f *registrationtest.Fixture
	l *registrationtest.Listener
}

func open(t testing.TB, edit ...func(*devhub.Config)) *hub {
	t.Helper()
	f := registrationtest.NewFixture(t, hubName)
	cfg := devhub.Config{Name: hubName, Secret: secret, DataKey: dataKey, Now: f.Now, Log: registrationtest.Log(t)}
	for _, e := range edit {
		e(&cfg)
	}
	h, err := devhub.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	})
	return &hub{h, f, nil}
}

// listen opens the door that the hub shares with the registration service.
func (h *hub) listen(t testing.TB) *hub {
	t.Helper()
	h.l = h.f.Listen(t, func(ctx context.Context, l net.Listener, cert func(*tls.ClientHelloInfo) (*tls.Certificate, error)) error {
		d := door.New(door.Config{TLS: door.TLSConfig(cert), Log: registrationtest.Log(t)})
		return d.Serve(ctx, l, mqttd.New(mqttd.Config{Hub: h.Hub, Registrar: h.f.Registrar(), Now: h.f.Now, ResponseDelay: -1}).Handle)
	})
	return h
}

func (h *hub) token(policy string, secondary bool) string {
	key, _ := h.Key(policy, secondary)
	return attesttest.ServiceToken(key, hubName, policy, h.f.Now().Add(time.Hour))
}

// call calls the registry; header is name, value, name, value.
func (h *hub) call(token, method, target, body string, header ...string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, "https://"+hubName+target, strings.NewReader(body))
	r.Header.Set("Authorization", token)
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

// do calls the registry as its owner and wants that status.
func (h *hub) do(t testing.TB, want int, method, path, body string, header ...string) map[string]any {
	t.Helper()
	w := h.call(h.token("iothubowner", false), method, path+version, body, header...)
	if w.Code != want {
		t.Fatalf("%s %s %.200s: %d %s, want %d", method, path, body, w.Code, w.Body, want)
	}
	var doc map[string]any
	if w.Body.Len() > 0 && w.Body.Bytes()[0] == '{' {
		if err := json.Unmarshal(w.Body.Bytes(), &doc); err != nil {
			t.Fatal(err)
		}
	}
	if want >= 400 && doc["errors"] == nil && !strings.Contains(fmt.Sprint(doc["Message"]), w.Header().Get("Iothub-Errorcode")) && !strings.Contains(fmt.Sprint(doc["Message"]), "errorCode") {
		t.Errorf("%s %s: header %q and body %s differ", method, path, w.Header().Get("Iothub-Errorcode"), w.Body)
	}
	return doc
}

// device makes a device with the key of the vectors.
func (h *hub) device(t testing.TB, id string) {
	t.Helper()
	h.do(t, 200, "PUT", "/devices/"+url.PathEscape(id), fmt.Sprintf(`{"deviceId":%q,"authentication":{"symmetricKey":{"primaryKey":%q,"secondaryKey":%q}}}`, id, deviceKey, otherKey))
}

func (h *hub) deviceToken(id, key string, in time.Duration) string {
	b, _ := base64.StdEncoding.DecodeString(key)
	return attesttest.SignToken(b, url.QueryEscape(hubName+"/devices/"+id), "", h.f.Now().Add(in))
}

// client is a device's connection, in packets.
type client struct {
	c net.Conn
	r *bufio.Reader
}

// login is a CONNECT in its parts.
type login struct {
	id, user, password string
	resume             bool // clean session 0
	keepAlive          byte
	will               string // its topic
	certificate        *tls.Certificate
	more               []byte // sent right behind it
}

func (h *hub) login(id string) login {
	return login{id: id, user: hubName + "/" + id + "/?api-version=2021-04-12&DeviceClientType=a%20test", password: h.deviceToken(id, deviceKey, time.Hour)}
}

func text(s string) []byte { return append([]byte{byte(len(s) >> 8), byte(len(s))}, s...) }

func frame(first byte, body ...byte) []byte {
	n := len(body)
	b := []byte{first}
	for {
		digit := byte(n % 128)
		if n /= 128; n > 0 {
			digit |= 0x80
		}
		if b = append(b, digit); n == 0 {
			return append(b, body...)
		}
	}
}

func (l login) packet() []byte {
	flags := byte(0x80)
	if !l.resume {
		flags |= 2
	}
	fields := [][]byte{text(l.id)}
	if l.will != "" {
		flags |= 4
		fields = append(fields, text(l.will), text(`"gone"`))
	}
	fields = append(fields, text(l.user))
	if l.password != "" {
		flags |= 0x40
		fields = append(fields, text(l.password))
	}
	return append(frame(0x10, append(append(text("MQTT"), 4, flags, 0, l.keepAlive), bytes.Join(fields, nil)...)...), l.more...)
}

// connect connects and returns the CONNACK's code, and whether a session was there.
func (h *hub) connect(t testing.TB, l login) (c *client, code byte, present bool) {
	t.Helper()
	conn := h.l.Dial(t, l.certificate)
	c = &client{conn, bufio.NewReader(conn)}
	c.write(t, l.packet())
	p := c.read(t, mqtt.Connack)
	return c, p.ReturnCode, p.SessionPresent
}

// enter connects a device that must be let in.
func (h *hub) enter(t testing.TB, l login) *client {
	t.Helper()
	c, code, _ := h.connect(t, l)
	if code != 0 {
		t.Fatalf("%s: return code %d", l.id, code)
	}
	return c
}

func (c *client) write(t testing.TB, b []byte) {
	t.Helper()
	if _, err := c.c.Write(b); err != nil {
		t.Fatal(err)
	}
}

func (c *client) read(t testing.TB, want mqtt.Type) *mqtt.Packet {
	t.Helper()
	p, err := mqtt.Read(c.r, 1<<20)
	if err != nil || p.Type != want {
		t.Fatalf("want packet %d: %+v, %v", want, p, err)
	}
	return p
}

// gone wants that the hub has hung up, and said nothing before.
func (c *client) gone(t testing.TB, why string) {
	t.Helper()
	if p, err := mqtt.Read(c.r, 1<<20); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%s: the connection is still there: %+v, %v", why, p, err)
	}
}

func (c *client) subscribe(t testing.TB, filter string, qos byte) byte {
	t.Helper()
	c.write(t, mqtt.AppendSubscribe(nil, 9, filter, qos))
	return c.read(t, mqtt.Suback).Codes[0]
}

func (c *client) publish(t testing.TB, topic, body string) {
	t.Helper()
	c.write(t, mqtt.AppendPublish(nil, topic, 1, 5, []byte(body)))
	c.read(t, mqtt.Puback)
}

// ping wants that everything before has been seen.
func (c *client) ping(t testing.TB) {
	t.Helper()
	c.write(t, []byte{0xc0, 0})
	c.read(t, mqtt.Pingresp)
}

func (h *hub) messages(t testing.TB, id string) []*devhub.Message {
	t.Helper()
	all, ok := h.Messages(id)
	if !ok {
		t.Fatalf("there is no %s", id)
	}
	return all
}

// Who is let in, and how the others are refused. Service API, section 5.6.
func TestConnect(t *testing.T) {
	registrationtest.Goroutines(t)
	ca := attesttest.CA(t, nil, "hub CA")
	mine, stranger, below := attesttest.Leaf(t, nil, "mine"), attesttest.Leaf(t, nil, "mine"), attesttest.Leaf(t, ca, "by-ca")
	roots := x509.NewCertPool()
	roots.AddCert(ca.Certificate)
	h := open(t, func(c *devhub.Config) { c.Roots = roots }).listen(t)
	h.device(t, "dev-1")
	h.device(t, "Dev-1")
	h.device(t, "off")
	h.do(t, 200, "PUT", "/devices/off", `{"deviceId":"off","status":"disabled"}`, "If-Match", "*")
	one, two := sha1.Sum(mine.Certificate.Raw), sha256.Sum256(mine.Certificate.Raw)
	h.do(t, 200, "PUT", "/devices/sha1", fmt.Sprintf(`{"deviceId":"sha1","authentication":{"type":"selfSigned","x509Thumbprint":{"secondaryThumbprint":"%x"}}}`, one))
	h.do(t, 200, "PUT", "/devices/sha256", fmt.Sprintf(`{"deviceId":"sha256","authentication":{"type":"selfSigned","x509Thumbprint":{"primaryThumbprint":%q}}}`, strings.ToUpper(hex.EncodeToString(two[:]))))
	h.do(t, 200, "PUT", "/devices/by-ca", `{"deviceId":"by-ca","authentication":{"type":"certificateAuthority"}}`)
	h.do(t, 200, "PUT", "/devices/none", `{"deviceId":"none","authentication":{"type":"none"}}`)
	// The vector of service API, section 5.6.
	const vector = "SharedAccessSignature sr=hub1.example.net%2Fdevices%2Fdev-1&sig=nzPF46Mgp3Stx8ns6EmV8bEFDWbEPufL9bYUzLp967Q%3D&se=1893456000"
	policy := func(name, resource string) string {
		key, _ := h.Key(name, false)
		return attesttest.SignToken(key, url.QueryEscape(resource), name, h.f.Now().Add(time.Hour))
	}
	with := func(id string, edit func(*login)) login {
		l := h.login(id)
		edit(&l)
		return l
	}
	for name, x := range map[string]struct {
		l    login
		want byte
	}{
		"primary key":                {h.login("dev-1"), 0},
		"secondary key":              {with("dev-1", func(l *login) { l.password = h.deviceToken("dev-1", otherKey, time.Hour) }), 0},
		"the vector":                 {with("dev-1", func(l *login) { l.password = vector }), 0},
		"no version":                 {with("dev-1", func(l *login) { l.user = hubName + "/dev-1" }), 0},
		"another version, no mark":   {with("dev-1", func(l *login) { l.user = hubName + "/dev-1/api-version=2019-10-01" }), 0},
		"the hub in capitals":        {with("dev-1", func(l *login) { l.user = strings.ToUpper(hubName) + "/dev-1/" }), 0},
		"a policy, for the hub":      {with("dev-1", func(l *login) { l.password = policy("device", hubName) }), 0},
		"a policy, for the device":   {with("dev-1", func(l *login) { l.password = policy("iothubowner", hubName+"/devices/dev-1") }), 0},
		"a policy, for another":      {with("dev-1", func(l *login) { l.password = policy("device", hubName+"/devices/dev") }), 5},
		"a policy without the right": {with("dev-1", func(l *login) { l.password = policy("service", hubName) }), 5},
		"no such policy":             {with("dev-1", func(l *login) { l.password = policy("admin", hubName) }), 5},
		"a wrong key": {with("dev-1", func(l *login) {
			l.password = h.deviceToken("dev-1", base64.StdEncoding.EncodeToString(secret), time.Hour)
		}), 5},
		"a token for another":           {with("dev-1", func(l *login) { l.password = h.deviceToken("Dev-1", deviceKey, time.Hour) }), 5},
		"a token for the hub":           {with("dev-1", func(l *login) { l.password = h.deviceToken("", deviceKey, time.Hour) }), 5},
		"an expired token":              {with("dev-1", func(l *login) { l.password = h.deviceToken("dev-1", deviceKey, -time.Second) }), 5},
		"no token":                      {with("dev-1", func(l *login) { l.password = "" }), 5},
		"no token at all":               {with("dev-1", func(l *login) { l.password = "x" }), 5},
		"another's name":                {with("dev-1", func(l *login) { l.id = "Dev-1" }), 5},
		"disabled":                      {h.login("off"), 5},
		"unknown":                       {h.login("nobody"), 5},
		"a module":                      {with("dev-1", func(l *login) { l.id, l.user = "dev-1/module", hubName+"/dev-1/module/" }), 2},
		"no ID":                         {with("dev-1", func(l *login) { l.id = "" }), 2},
		"SHA-1":                         {login{id: "sha1", user: hubName + "/sha1/", certificate: mine.TLS()}, 0},
		"SHA-256":                       {login{id: "sha256", user: hubName + "/sha256/", certificate: mine.TLS()}, 0},
		"another certificate":           {login{id: "sha256", user: hubName + "/sha256/", certificate: stranger.TLS()}, 5},
		"no certificate":                {login{id: "sha256", user: hubName + "/sha256/"}, 5},
		"a certificate for keys":        {login{id: "dev-1", user: hubName + "/dev-1/", certificate: mine.TLS()}, 5},
		"a token for a certificate":     {with("sha256", func(*login) {}), 5},
		"below a CA":                    {login{id: "by-ca", user: hubName + "/by-ca/", certificate: below.TLS()}, 0},
		"not below a CA":                {login{id: "by-ca", user: hubName + "/by-ca/", certificate: attesttest.Leaf(t, nil, "by-ca").TLS()}, 5},
		"below a CA, for another":       {login{id: "by-ca", user: hubName + "/by-ca/", certificate: attesttest.Leaf(t, ca, "another").TLS()}, 5},
		"kind none":                     {h.login("none"), 5},
		"the registration service's ID": {login{id: "dev-1", user: "0ne00000001/registrations/dev-1/api-version=x", password: vector}, 5},
	} {
		t.Run(name, func(t *testing.T) {
			c, code, present := h.connect(t, x.l)
			if code != x.want || present {
				t.Fatalf("return code %d, session present %t; want %d", code, present, x.want)
			}
			if code == 0 {
				c.ping(t)
				c.write(t, []byte{0xe0, 0})
			}
			c.gone(t, name)
		})
	}
}

// The door is the registration service's too: who names an ID scope is none of the hub's.
func TestDoorIsShared(t *testing.T) {
	h := open(t).listen(t)
	d := h.f.Derived("dev-1")
	c := h.enter(t, login{id: d.ID, user: d.Scope + "/registrations/" + d.ID + "/api-version=" + d.APIVersion, password: d.Token})
	if code := c.subscribe(t, "$dps/registrations/res/#", 1); code != 1 {
		t.Errorf("%d", code)
	}
}

// Whatever does not belong to the conversation ends it.
func TestHostile(t *testing.T) {
	registrationtest.Goroutines(t)
	h := open(t).listen(t)
	h.device(t, "dev-1")
	publish := func(first byte, topic, body string) []byte {
		id := []byte{0, 5}
		if first&6 == 0 {
			id = nil
		}
		return frame(first, bytes.Join([][]byte{text(topic), id, []byte(body)}, nil)...)
	}
	const events = "devices/dev-1/messages/events/"
	for name, b := range map[string][]byte{
		"QoS 2":                          publish(0x34, events, "x"),
		"another's telemetry":            publish(0x30, "devices/dev-2/messages/events/", "x"),
		"a module's":                     publish(0x30, "devices/dev-1/modules/m/messages/events/", "x"),
		"another topic":                  publish(0x30, "hello", "x"),
		"a topic for devices":            publish(0x30, "devices/dev-1/messages/devicebound/", "x"),
		"a bag that is not encoded":      publish(0x30, events+"a=%zz", "x"),
		"a bag with a name twice":        publish(0x30, events+"a=1&a=2", "x"),
		"a bag without a name":           publish(0x30, events+"=1", "x"),
		"a bag that is too large":        publish(0x30, events+strings.Repeat("a=1&", 101), "x"),
		"a topic that is too long":       publish(0x30, events+strings.Repeat("a", 4096), "x"),
		"a message that is too large":    publish(0x30, events, strings.Repeat("x", 256<<10+1)),
		"twins without an ID":            publish(0x30, "$iothub/twin/GET/", ""),
		"twins without a mark":           publish(0x30, "$iothub/twin/GET/$rid=1", ""),
		"an ID that is too long":         publish(0x30, "$iothub/twin/GET/?$rid="+strings.Repeat("1", 257), ""),
		"desired properties":             publish(0x30, "$iothub/twin/PATCH/properties/desired/?$rid=1", "{}"),
		"an answer without a status":     publish(0x30, "$iothub/methods/res/?$rid=1", "{}"),
		"an answer with a wrong status":  publish(0x30, "$iothub/methods/res/x/?$rid=1", "{}"),
		"an answer that is too large":    publish(0x30, "$iothub/methods/res/200/?$rid=1", strings.Repeat("1", 128<<10+1)),
		"a second CONNECT":               h.login("dev-1").packet(),
		"a packet of the server's":       {0xd0, 0},
		"a packet that is none":          {0xf0, 0},
		"a length that is too large":     {0x30, 0xff, 0xff, 0xff, 0x7f},
		"a SUBSCRIBE that is empty":      {0x82, 2, 0, 1},
		"a PUBLISH that breaks its type": {0x36, 2, 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			c := h.enter(t, h.login("dev-1"))
			c.write(t, b)
			c.gone(t, name)
		})
	}
	for name, will := range map[string]string{"a will of another's": "devices/dev-2/messages/events/", "a will that is no message": "hello", "a will's bag": events + "a=%"} {
		l := h.login("dev-1")
		l.will = will
		conn := h.l.Dial(t, nil)
		c := &client{conn, bufio.NewReader(conn)}
		c.write(t, l.packet())
		c.gone(t, name)
	}
	if n := len(h.messages(t, "dev-1")); n != 0 {
		t.Errorf("%d messages came of it", n)
	}
	// What is not understood and does no harm.
	c := h.enter(t, h.login("dev-1"))
	for _, filter := range []string{"#", "devices/dev-2/messages/devicebound/#", "$dps/registrations/res/#", "devices/+/messages/devicebound/#"} {
		if code := c.subscribe(t, filter, 1); code != mqtt.SubackFailure {
			t.Errorf("filter %s: %d", filter, code)
		}
	}
	c.write(t, mqtt.AppendPuback(nil, 77))
	c.publish(t, "$iothub/methods/res/200/?$rid=nobody", "{}")
	c.ping(t)
}

// Messages from devices are kept, bounded, and handed to the sinks before they are acknowledged.
func TestTelemetry(t *testing.T) {
	registrationtest.Goroutines(t)
	var mu sync.Mutex
	var told []*devhub.Message
	var lines bytes.Buffer
	h := open(t, func(c *devhub.Config) {
		c.Lines = &lines
		c.Telemetry = func(m *devhub.Message) {
			mu.Lock()
			defer mu.Unlock()
			told = append(told, m)
		}
	}).listen(t)
	h.device(t, "dev-1")
	l := h.login("dev-1")
	l.will = "devices/dev-1/messages/events/why=will"
	c := h.enter(t, l)
	c.publish(t, "devices/dev-1/messages/events/%24.mid=m%201&%24.ct=application%2Fjson&a%26b=c%2Bd", `{"t":21.5}`)
	c.publish(t, "devices/dev-1/messages/events", "\xff")
	c.write(t, append(frame(0x31, append(text("devices/dev-1/messages/events/"), "kept?"...)...), 0xc0, 0))
	c.read(t, mqtt.Pingresp)
	got := h.messages(t, "dev-1")
	if len(got) != 3 || got[0].System["mid"] != "m 1" || got[0].Properties["a&b"] != "c+d" || string(got[0].Body) != `{"t":21.5}` || got[2].Properties["mqtt-retain"] != "true" {
		t.Fatalf("%+v", got)
	}
	_ = c.c.Close()
	for range 1000 { // the will comes when the hub has seen the end
		if len(h.messages(t, "dev-1")) == 4 {
			break
		}
		<-time.After(10 * time.Millisecond)
	}
	if got = h.messages(t, "dev-1"); len(got) != 4 || got[3].Properties["iothub-MessageType"] != "Will" || got[3].Properties["why"] != "will" {
		t.Fatalf("%+v", got)
	}
	c = h.enter(t, l)
	c.write(t, []byte{0xe0, 0})
	c.gone(t, "goodbye")
	w := h.call(h.token("service", true), "GET", "/devices/dev-1/messages/events"+version, "")
	if w.Code != 200 || !strings.Contains(w.Body.String(), `"body":{"t":21.5}`) || !strings.Contains(w.Body.String(), `"bodyBase64":"/w=="`) {
		t.Errorf("%d %s", w.Code, w.Body)
	}
	c = h.enter(t, h.login("dev-1"))
	for i := range 120 {
		c.write(t, mqtt.AppendPublish(nil, "devices/dev-1/messages/events/", 1, uint16(i+1), fmt.Append(nil, i)))
	}
	for range 120 {
		c.read(t, mqtt.Puback)
	}
	if got = h.messages(t, "dev-1"); len(got) != 100 || string(got[99].Body) != "119" {
		t.Errorf("%d messages, the last %s", len(got), got[len(got)-1].Body)
	}
	// Over HTTPS with the same token.
	if w := h.call(h.deviceToken("dev-1", otherKey, time.Hour), "POST", "/devices/dev-1/messages/events"+version, "7", "iothub-app-x", "y"); w.Code != 204 {
		t.Errorf("%d %s", w.Code, w.Body)
	}
	if w := h.call(h.token("iothubowner", false), "POST", "/devices/dev-1/messages/events"+version, "7"); w.Code != 401 {
		t.Errorf("a policy's token: %d", w.Code)
	}
	mu.Lock()
	defer mu.Unlock()
	if len(told) != 125 || bytes.Count(lines.Bytes(), []byte("\n")) != 125 || told[124].Properties["x"] != "y" {
		t.Errorf("%d told, %d lines", len(told), bytes.Count(lines.Bytes(), []byte("\n")))
	}
}

// A device reads its twin, reports, and is told of changes.
func TestTwinOfDevice(t *testing.T) {
	h := open(t).listen(t)
	h.device(t, "dev-1")
	c := h.enter(t, h.login("dev-1"))
	for _, filter := range []string{"$iothub/twin/res/#", "$iothub/twin/PATCH/properties/desired/#"} {
		if code := c.subscribe(t, filter, 0); code != 0 {
			t.Fatalf("%s: %d", filter, code)
		}
	}
	ask := func(topic, body string) *mqtt.Packet {
		t.Helper()
		c.write(t, mqtt.AppendPublish(nil, topic, 0, 0, []byte(body)))
		return c.read(t, mqtt.Publish)
	}
	if p := ask("$iothub/twin/GET/?$rid=a-1", ""); p.Topic != "$iothub/twin/res/200/?$rid=a-1" || string(p.Payload) != `{"desired":{"$version":1},"reported":{"$version":1}}` {
		t.Errorf("%s %s", p.Topic, p.Payload)
	}
	h.do(t, 200, "PATCH", "/twins/dev-1", `{"properties":{"desired":{"a":{"b":1,"c":2},"x":null,"$version":7,"$metadata":{}}}}`)
	if p := c.read(t, mqtt.Publish); p.Topic != "$iothub/twin/PATCH/properties/desired/?$version=2" || string(p.Payload) != `{"$version":2,"a":{"b":1,"c":2},"x":null}` {
		t.Errorf("%s %s", p.Topic, p.Payload)
	}
	h.do(t, 200, "PUT", "/twins/dev-1", `{"properties":{"desired":{"n":1}}}`)
	if p := c.read(t, mqtt.Publish); string(p.Payload) != `{"$version":3,"a":null,"n":1}` {
		t.Errorf("%s %s", p.Topic, p.Payload)
	}
	if p := ask("$iothub/twin/PATCH/properties/reported/?$rid=2&$version=1", `{"f":"1.2","o":{"p":[1,2]}}`); p.Topic != "$iothub/twin/res/204/?$rid=2&$version=2" || len(p.Payload) != 0 {
		t.Errorf("%s %s", p.Topic, p.Payload)
	}
	if p := ask("$iothub/twin/PATCH/properties/reported/?$rid=3", `{"o":{"p":null}}`); p.Topic != "$iothub/twin/res/204/?$rid=3&$version=3" {
		t.Errorf("%s %s", p.Topic, p.Payload)
	}
	for _, bad := range []string{``, `[]`, `{"a":1,"a":2}`, `{"$x":1}`, `{"a b":1}`, `{"a":` + strings.Repeat(`{"a":`, 10) + `1` + strings.Repeat(`}`, 11), `{"a":4503599627370497}`, `{"a":1}x`} {
		if p := ask("$iothub/twin/PATCH/properties/reported/?$rid=4", bad); p.Topic != "$iothub/twin/res/400/?$rid=4" || !bytes.Contains(p.Payload, []byte("ArgumentInvalid")) {
			t.Errorf("%s: %s %s", bad, p.Topic, p.Payload)
		}
	}
	if p := ask("$iothub/twin/GET/?$rid=5", ""); string(p.Payload) != `{"desired":{"$version":3,"n":1},"reported":{"$version":3,"f":"1.2","o":{}}}` {
		t.Errorf("%s", p.Payload)
	}
	// Tags are none of the device's business.
	h.do(t, 200, "PATCH", "/twins/dev-1", `{"tags":{"a":1}}`)
	c.ping(t)
}

// Messages to a device wait for it, come again until they are acknowledged, and are marked as such.
func TestToDevice(t *testing.T) {
	registrationtest.Goroutines(t)
	h := open(t).listen(t)
	h.device(t, "dev-1")
	const filter = "devices/dev-1/messages/devicebound/#"
	send := func(body string) {
		t.Helper()
		if err := h.Send(&devhub.Message{DeviceID: "dev-1", System: map[string]string{"mid": "m 1"}, Properties: map[string]string{"a&": "b"}, Body: []byte(body)}); err != nil {
			t.Fatal(err)
		}
	}
	l := h.login("dev-1")
	l.resume = true
	send("1")
	c, _, present := h.connect(t, l)
	if code := c.subscribe(t, filter, 2); code != 1 || present {
		t.Fatalf("QoS %d, session present %t", code, present)
	}
	first := c.read(t, mqtt.Publish)
	if first.Topic != "devices/dev-1/messages/devicebound/%24.mid=m%201&%24.to=%2Fdevices%2Fdev-1%2Fmessages%2FdeviceBound&a%26=b" || first.QoS != 1 || first.Dup || string(first.Payload) != "1" {
		t.Fatalf("%+v", first)
	}
	send("2")
	second := c.read(t, mqtt.Publish)
	c.write(t, append(mqtt.AppendPuback(nil, second.ID), 0xe0, 0))
	c.gone(t, "goodbye")
	if doc := h.do(t, 200, "GET", "/devices/dev-1", ""); doc["cloudToDeviceMessageCount"] != 1.0 || doc["connectionState"] != "Disconnected" {
		t.Errorf("%v", doc)
	}
	// The session lasts: no SUBSCRIBE is needed.
	c, _, present = h.connect(t, l)
	if p := c.read(t, mqtt.Publish); !present || p.ID != first.ID || !p.Dup || string(p.Payload) != "1" {
		t.Fatalf("session present %t, %+v", present, p)
	}
	c.write(t, append(mqtt.AppendPuback(nil, first.ID), 0xc0, 0))
	c.read(t, mqtt.Pingresp)
	// A clean one begins anew, and leaves nothing.
	clean := h.enter(t, h.login("dev-1"))
	c.gone(t, "taken over")
	clean.ping(t)
	send("3")
	clean.ping(t)
	clean.subscribe(t, filter, 0)
	if p := clean.read(t, mqtt.Publish); p.QoS != 0 || string(p.Payload) != "3" {
		t.Errorf("%+v", p)
	}
	clean.write(t, []byte{0xe0, 0})
	clean.gone(t, "goodbye")
	if _, _, present = h.connect(t, l); present {
		t.Error("a clean session left something")
	}
	// Bounds.
	for i := range 50 {
		send(fmt.Sprint(i))
	}
	h.do(t, 403, "POST", "/devices/dev-1/messages/devicebound", "x")
	h.do(t, 404, "POST", "/devices/nobody/messages/devicebound", "x")
	h.do(t, 413, "POST", "/devices/dev-1/messages/devicebound", strings.Repeat("x", 64<<10+1))
	h.f.Advance(61 * time.Minute)
	h.do(t, 204, "POST", "/devices/dev-1/messages/devicebound", "last", "iothub-expiry", h.f.Now().Add(time.Hour).Format(time.RFC3339))
	if doc := h.do(t, 200, "GET", "/devices/dev-1", ""); doc["cloudToDeviceMessageCount"] != 1.0 {
		t.Errorf("after an hour: %v", doc["cloudToDeviceMessageCount"])
	}
}

// Methods, and what goes wrong with them.
func TestMethods(t *testing.T) {
	registrationtest.Goroutines(t)
	h := open(t, func(c *devhub.Config) { c.Second = 20 * time.Millisecond }).listen(t)
	h.device(t, "dev-1")
	invoke := func(body string) (answer chan *httptest.ResponseRecorder) {
		answer = make(chan *httptest.ResponseRecorder, 1)
		go func() { answer <- h.call(h.token("service", false), "POST", "/twins/dev-1/methods"+version, body) }()
		return answer
	}
	if w := <-invoke(`{"methodName":"m"}`); w.Code != 404 || w.Header().Get("Iothub-Errorcode") != "DeviceNotOnline" || !strings.Contains(w.Body.String(), "404103") {
		t.Errorf("offline: %d %s", w.Code, w.Body)
	}
	waiting := invoke(`{"methodName":"m","payload":{"a":[1.50]},"connectTimeoutInSeconds":300}`)
	c := h.enter(t, h.login("dev-1"))
	c.subscribe(t, "$iothub/methods/POST/#", 0)
	called := func() (rid string) {
		t.Helper()
		p := c.read(t, mqtt.Publish)
		rid, ok := strings.CutPrefix(p.Topic, "$iothub/methods/POST/m/?$rid=")
		if !ok {
			t.Fatalf("%s", p.Topic)
		}
		return rid
	}
	rid := called()
	c.publish(t, "$iothub/methods/res/200/?$rid="+rid, `{"b":2}`)
	if w := <-waiting; w.Code != 200 || w.Body.String() != `{"payload":{"b":2},"status":200}` {
		t.Errorf("%d %s", w.Code, w.Body)
	}
	c.publish(t, "$iothub/methods/res/200/?$rid="+rid, `{"b":2}`) // late, and twice
	none := invoke(`{"methodName":"m"}`)
	c.publish(t, "$iothub/methods/res/-1/?$rid="+called(), "")
	if w := <-none; w.Code != 200 || w.Body.String() != `{"payload":null,"status":-1}` {
		t.Errorf("no payload: %d %s", w.Code, w.Body)
	}
	broken := invoke(`{"methodName":"m"}`)
	c.publish(t, "$iothub/methods/res/200/?$rid="+called(), "{")
	if w := <-broken; w.Code != 502 {
		t.Errorf("no JSON: %d %s", w.Code, w.Body)
	}
	late := invoke(`{"methodName":"m","responseTimeoutInSeconds":5}`)
	called()
	if w := <-late; w.Code != 504 || !strings.Contains(w.Body.String(), "504101") {
		t.Errorf("no answer: %d %s", w.Code, w.Body)
	}
	left := invoke(`{"methodName":"m","responseTimeoutInSeconds":300}`)
	called()
	_ = c.c.Close()
	if w := <-left; w.Code != 404 || !strings.Contains(w.Body.String(), "404103") {
		t.Errorf("gone: %d %s", w.Code, w.Body)
	}
	for _, bad := range []string{`{}`, `{"methodName":"a b"}`, `{"methodName":"a/b"}`, `{"methodName":"#"}`, `{"methodName":1}`, `{"methodName":"m","responseTimeoutInSeconds":4}`,
		`{"methodName":"m","connectTimeoutInSeconds":301}`, `{"methodName":"m","responseTimeoutInSeconds":"5"}`, `{"methodName":"m","payload":1,"payload":2}`} {
		h.do(t, 400, "POST", "/twins/dev-1/methods", bad)
	}
	h.do(t, 413, "POST", "/twins/dev-1/methods", `{"methodName":"m","payload":"`+strings.Repeat("x", 128<<10)+`"}`)
	h.do(t, 404, "POST", "/twins/nobody/methods", `{"methodName":"m"}`)
}

// What ends a connection: another one, the token's end, silence, an operator.
func TestEnds(t *testing.T) {
	registrationtest.Goroutines(t)
	h := open(t, func(c *devhub.Config) { c.Second = 100 * time.Millisecond }).listen(t)
	for _, id := range []string{"taken", "expired", "silent", "disabled", "rolled", "removed", "kept"} {
		h.device(t, id)
	}
	kept := h.enter(t, h.login("kept"))
	first := h.enter(t, h.login("taken"))
	h.enter(t, h.login("taken"))
	first.gone(t, "another one")
	short := h.login("expired")
	short.password = h.deviceToken("expired", deviceKey, time.Second)
	h.enter(t, short).gone(t, "an expired token")
	silent := h.login("silent")
	silent.keepAlive = 1
	h.enter(t, silent).gone(t, "silence")
	for id, end := range map[string]func(){
		"disabled": func() {
			h.do(t, 200, "PUT", "/devices/disabled", `{"deviceId":"disabled","status":"disabled"}`, "If-Match", "*")
		},
		"rolled": func() {
			h.do(t, 200, "PUT", "/devices/rolled", `{"deviceId":"rolled","authentication":{"symmetricKey":{"primaryKey":"","secondaryKey":""}}}`, "If-Match", "*")
		},
		"removed": func() { h.do(t, 204, "DELETE", "/devices/removed", "", "If-Match", `"*"`) },
	} {
		c := h.enter(t, h.login(id))
		c.ping(t)
		end()
		c.gone(t, id)
	}
	if doc := h.do(t, 200, "GET", "/statistics/service", ""); doc["connectedDeviceCount"] != 2.0 { // kept, and the second of taken
		t.Errorf("%v", doc)
	}
	kept.ping(t)
	if err := h.Close(); err != nil {
		t.Error(err)
	}
	kept.gone(t, "the hub's end")
	if _, code, _ := h.connect(t, h.login("kept")); code != 3 {
		t.Errorf("closed: return code %d", code)
	}
}

// A device that does not read does not stop who tells it something, and is hung up on.
func TestDeaf(t *testing.T) {
	h := open(t, func(c *devhub.Config) { c.Second = 50 * time.Millisecond }).listen(t)
	h.device(t, "deaf")
	c := h.enter(t, h.login("deaf"))
	c.subscribe(t, "$iothub/twin/PATCH/properties/desired/#", 0)
	large := strings.Repeat("x", 4000)
	for i := range 1000 {
		h.do(t, 200, "PATCH", "/twins/deaf", fmt.Sprintf(`{"properties":{"desired":{"n":%d,"a":%q,"b":%[2]q,"c":%[2]q,"d":%[2]q,"e":%[2]q}}}`, i, large))
		if doc := h.do(t, 200, "GET", "/devices/deaf", ""); doc["connectionState"] == "Disconnected" {
			return
		}
	}
	for range 1000 {
		if doc := h.do(t, 200, "GET", "/devices/deaf", ""); doc["connectionState"] == "Disconnected" {
			return
		}
		<-time.After(10 * time.Millisecond)
	}
	t.Error("still connected")
}

var _ http.Handler = (*devhub.Hub)(nil)
