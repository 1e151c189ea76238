package mqttd_test

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/door"
	"github.com/touchmark/touchmark/pkg/mqtt"
	"github.com/touchmark/touchmark/pkg/mqttd"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

// frame is a packet with whatever its first octet and its body are.
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

func text(s string) []byte { return append([]byte{byte(len(s) >> 8), byte(len(s))}, s...) }

// connect is a CONNECT in its parts.
func connect(protocol string, level, flags byte, fields ...string) []byte {
	b := append(text(protocol), level, flags, 0, 60)
	for _, f := range fields {
		b = append(b, text(f)...)
	}
	return frame(0x10, b...)
}

func publish(first byte, topic string, id []byte, body string) []byte {
	return frame(first, bytes.Join([][]byte{text(topic), id, []byte(body)}, nil)...)
}

// heard is what a door sends until it hangs up: the packets' first octets in hexadecimal, with a CONNACK's code, a
// response's status and a failed SUBACK's mark behind it.
func (c *conn) heard(t *testing.T) string {
	t.Helper()
	var said []string
	for {
		first, err := c.r.ReadByte()
		if err != nil {
			if !hungUp(err) {
				said = append(said, "still there")
			}
			return strings.Join(said, " ")
		}
		_ = c.r.UnreadByte()
		if first>>4 == byte(mqtt.Connack) {
			said = append(said, fmt.Sprintf("CONNACK %d", c.connack(t)))
			continue
		}
		p, err := mqtt.Read(c.r, 1<<20)
		switch {
		case err != nil:
			return fmt.Sprint(said, err)
		case p.Type == mqtt.Suback:
			said = append(said, fmt.Sprintf("SUBACK %x", p.Codes))
		case p.Type == mqtt.Publish:
			said = append(said, topicForm.FindStringSubmatch(p.Topic)[1])
		case p.Type == mqtt.Puback:
			said = append(said, "PUBACK")
		default:
			said = append(said, fmt.Sprintf("%d", p.Type))
		}
	}
}

func hungUp(err error) bool {
	return err == io.EOF || strings.Contains(err.Error(), "connection reset") || strings.Contains(err.Error(), "broken pipe") || strings.Contains(err.Error(), "close notify")
}

// Whatever comes before a device is known, the door says what the protocol has for it, and hangs up.
func TestHostileConnect(t *testing.T) {
	registrationtest.Goroutines(t)
	d := newDoor(t, func(c *mqttd.Config, _ *door.Config) { c.Second = 100 * time.Millisecond })
	dev := d.Derived("dev-1")
	user := username(dev)
	hello := func(id, user, password string) []byte { return connect("MQTT", 4, 0xc2, id, user, password) }
	scope := registrationtest.Scope
	for name, x := range map[string]struct {
		send []byte
		want string
	}{
		"nothing but a type":               {[]byte{0x10}, ""},
		"a length that never ends":         {[]byte{0x10, 0xff, 0xff, 0xff, 0xff, 0x7f}, ""},
		"a length written too long":        {append([]byte{0x10, 0x8c, 0x80, 0x00}, make([]byte, 12)...), ""},
		"half a CONNECT":                   {hello("dev-1", user, dev.Token)[:40], ""},
		"flags on the type":                {append([]byte{0x11}, hello("dev-1", user, dev.Token)[1:]...), ""},
		"a reserved flag":                  {connect("MQTT", 4, 0xc3, "dev-1", user, dev.Token), ""},
		"a will of QoS 3":                  {connect("MQTT", 4, 0xde, "dev-1", "topic", "message", user, dev.Token), ""},
		"a will that is not there":         {connect("MQTT", 4, 0xc6, "dev-1", user, dev.Token), ""},
		"will flags without a will":        {connect("MQTT", 4, 0xe2, "dev-1", user, dev.Token), ""},
		"a password without a name":        {connect("MQTT", 4, 0x42, "dev-1", dev.Token), ""},
		"octets behind it":                 {connect("MQTT", 4, 0xc2, "dev-1", user, dev.Token, "more"), ""},
		"a text beyond the packet":         {frame(0x10, append(append(text("MQTT"), 4, 0xc2, 0, 60), 0xff, 0xff, 'd')...), ""},
		"an ID that is no UTF-8":           {hello("dev-\xff", user, dev.Token), ""},
		"an ID with a surrogate":           {hello("dev-\xed\xa0\x80", user, dev.Token), ""},
		"an ID with a NUL":                 {hello("dev-\x00", user, dev.Token), ""},
		"a name that is no UTF-8":          {hello("dev-1", user+"\xc0\xaf", dev.Token), ""},
		"a password of 64 KiB":             {hello("dev-1", user, strings.Repeat("x", 65535)), ""},
		"MQIsdp":                           {connect("MQIsdp", 3, 0xc2, "dev-1", user, dev.Token), "CONNACK 1"},
		"MQTT in small letters":            {connect("mqtt", 4, 0xc2, "dev-1", user, dev.Token), "CONNACK 1"},
		"MQTT 5":                           {connect("MQTT", 5, 0xc2, "", "dev-1", user, dev.Token), "CONNACK 1"},
		"a bridge":                         {connect("MQTT", 0x84, 0xc2, "dev-1", user, dev.Token), "CONNACK 1"},
		"no ID":                            {hello("", user, dev.Token), "CONNACK 2"},
		"an ID of 129":                     {hello(strings.Repeat("a", 129), user, dev.Token), "CONNACK 2"},
		"an ID with a slash":               {hello("dev/1", user, dev.Token), "CONNACK 2"},
		"an ID with a space":               {hello("dev 1", user, dev.Token), "CONNACK 2"},
		"an ID of another alphabet":        {hello("dеv-1", user, dev.Token), "CONNACK 2"},
		"another's name":                   {hello("dev-2", user, dev.Token), "CONNACK 5"},
		"a name of 2 KiB":                  {hello("dev-1", user+strings.Repeat("x", 2048), dev.Token), "CONNACK 5"},
		"another word":                     {hello("dev-1", scope+"/devices/dev-1/api-version=2019-03-31", dev.Token), "CONNACK 5"},
		"no version":                       {hello("dev-1", scope+"/registrations/dev-1", dev.Token), "CONNACK 5"},
		"an empty version":                 {hello("dev-1", scope+"/registrations/dev-1/api-version=", dev.Token), "CONNACK 5"},
		"a version that is no date":        {hello("dev-1", scope+"/registrations/dev-1/api-version=latest", dev.Token), "CONNACK 5"},
		"an escaped slash":                 {hello("dev-1", scope+"%2Fregistrations%2Fdev-1/api-version=2019-03-31", dev.Token), "CONNACK 5"},
		"an escaped letter":                {hello("dev-1", scope+"/registrations/dev%2D1/api-version=2019-03-31", dev.Token), "CONNACK 5"},
		"a token that is none":             {hello("dev-1", user, "password"), "CONNACK 5"},
		"a token with a part twice":        {hello("dev-1", user, dev.Token+"&se=9999999999"), "CONNACK 5"},
		"a token cut short":                {hello("dev-1", user, dev.Token[:60]), "CONNACK 5"},
		"no CONNECT but a ping":            {frame(0xc0), ""},
		"no CONNECT but a request":         {mqtt.AppendPublish(nil, registerTopic+"1", 1, 2, nil), ""},
		"no CONNECT but a good-bye":        {frame(0xe0), ""},
		"an answer to nothing":             {frame(0x20, 0, 0), ""},
		"another protocol: HTTP":           {[]byte("GET / HTTP/1.1\r\nHost: h\r\n\r\n"), ""},
		"another protocol: AMQP":           {[]byte("AMQP\x00\x01\x00\x00"), ""},
		"another protocol: TLS within TLS": {[]byte("\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03"), ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := d.dial(t, nil)
			_, _ = c.c.Write(x.send) // the door may hang up in the middle
			_ = c.c.(*tls.Conn).CloseWrite()
			if got := c.heard(t); got != x.want {
				t.Errorf("%q, want %q", got, x.want)
			}
		})
	}
	t.Cleanup(func() { d.fine(t) })
}

// Whatever a device that is connected sends, the door answers what the protocol has for it, or hangs up.
func TestHostileConversation(t *testing.T) {
	registrationtest.Goroutines(t)
	d := newDoor(t, func(c *mqttd.Config, _ *door.Config) { c.Second = 100 * time.Millisecond })
	ask := func(rest, body string) []byte { return mqtt.AppendPublish(nil, registerTopic+rest, 1, 7, []byte(body)) }
	bye := frame(0xe0)
	one := []byte{0, 7}
	for name, x := range map[string]struct {
		send []byte
		want string
	}{
		"a second CONNECT":              {connect("MQTT", 4, 0x02, "dev-1"), ""},
		"SUBSCRIBE without its flags":   {frame(0x80, append(one, append(text(responses), 1)...)...), ""},
		"SUBSCRIBE to nothing":          {frame(0x82, one...), ""},
		"SUBSCRIBE with the ID 0":       {frame(0x82, append([]byte{0, 0}, append(text(responses), 1)...)...), ""},
		"SUBSCRIBE at QoS 3":            {frame(0x82, append(one, append(text(responses), 3)...)...), ""},
		"SUBSCRIBE without a QoS":       {frame(0x82, append(one, text(responses)...)...), ""},
		"SUBSCRIBE to an empty filter":  {frame(0x82, append(one, append(text(""), 1)...)...), ""},
		"SUBSCRIBE to everything":       {append(mqtt.AppendSubscribe(nil, 7, "#", 1), bye...), "SUBACK 80"},
		"SUBSCRIBE to others' answers":  {append(mqtt.AppendSubscribe(nil, 7, "$dps/registrations/+/#", 1), bye...), "SUBACK 80"},
		"SUBSCRIBE in capitals":         {append(mqtt.AppendSubscribe(nil, 7, "$DPS/registrations/res/#", 1), bye...), "SUBACK 80"},
		"UNSUBSCRIBE from nothing":      {frame(0xa2, one...), ""},
		"UNSUBSCRIBE without its flags": {frame(0xa0, append(one, text(responses)...)...), ""},
		"PUBLISH at QoS 2":              {publish(0x34, registerTopic+"1", one, ""), ""},
		"PUBLISH at QoS 3":              {publish(0x36, registerTopic+"1", one, ""), ""},
		"PUBLISH with the ID 0":         {publish(0x32, registerTopic+"1", []byte{0, 0}, ""), ""},
		"PUBLISH without an ID":         {publish(0x32, "t", nil, ""), ""},
		"PUBLISH, DUP at QoS 0":         {publish(0x38, registerTopic+"1", nil, ""), ""},
		"PUBLISH to nothing":            {publish(0x32, "", one, ""), ""},
		"PUBLISH to a filter":           {publish(0x32, responses, one, ""), ""},
		"PUBLISH to a topic with NUL":   {publish(0x32, registerTopic+"\x00", one, ""), ""},
		"PUBLISH to no UTF-8":           {publish(0x32, registerTopic+"\xff", one, ""), ""},
		"a topic beyond its packet":     {frame(0x30, 0xff, 0xff, 'a'), ""},
		"another topic":                 {publish(0x32, "devices/dev-1/messages/events/", one, ""), "PUBACK"},
		"the topic in capitals":         {publish(0x32, strings.ToUpper(registerTopic)+"1", one, ""), "PUBACK"},
		"the topic, escaped":            {publish(0x32, "%24dps/registrations/PUT/iotdps-register/?$rid=1", one, ""), "PUBACK"},
		"an answer's topic":             {publish(0x32, "$dps/registrations/res/200/?$rid=1", one, "{}"), "PUBACK"},
		"256 MiB announced":             {[]byte{0x32, 0xff, 0xff, 0xff, 0x7f}, ""},
		"129 KiB":                       {publish(0x32, registerTopic+"1", one, strings.Repeat(" ", 129<<10)), ""},
		"a length of five octets":       {[]byte{0x30, 0xff, 0xff, 0xff, 0xff, 0xff}, ""},
		"a server's CONNACK":            {frame(0x20, 0, 0), ""},
		"a server's SUBACK":             {frame(0x90, 0, 1, 1), ""},
		"a server's PINGRESP":           {frame(0xd0), ""},
		"PUBREC":                        {frame(0x50, one...), ""},
		"PUBREL":                        {frame(0x62, one...), ""},
		"PUBCOMP":                       {frame(0x70, one...), ""},
		"PUBACK with octets behind it":  {frame(0x40, 0, 1, 2), ""},
		"PINGREQ with a body":           {frame(0xc0, 0), ""},
		"DISCONNECT with a body":        {frame(0xe0, 0), ""},
		"type 0":                        {frame(0x00), ""},
		"type 15":                       {frame(0xf0), ""},
		"a body of 65 KiB":              {append(ask("1", `{"payload":"`+strings.Repeat("x", 65<<10)+`"}`), bye...), "PUBACK 413"},
		"a body nested 20,000 deep":     {append(ask("1", `{"payload":`+strings.Repeat("[", 20_000)+strings.Repeat("]", 20_000)+`}`), bye...), "PUBACK 400"},
		"a body of NUL":                 {append(ask("1", "\x00\x00"), bye...), "PUBACK 400"},
		"a body with a byte order mark": {append(ask("1", "\ufeff{}"), bye...), "PUBACK 400"},
		"a body in UTF-16":              {append(ask("1", "{\x00}\x00"), bye...), "PUBACK 400"},
		"a body that is compressed":     {append(ask("1", "\x1f\x8b\x08\x00\x00"), bye...), "PUBACK 400"},
		"two names for a member":        {append(ask("1", `{"registrationId":"dev-1","REGISTRATIONID":"dev-2"}`), bye...), "PUBACK 400"},
		"a member twice":                {append(ask("1", `{"registrationId":"dev-2","registrationId":"dev-1"}`), bye...), "PUBACK 202"}, // the last one counts, and it is the device's own
		"an operation of 60 KiB":        {append(mqtt.AppendPublish(nil, statusTopic+"1&operationId="+strings.Repeat("5", 60<<10), 1, 7, nil), bye...), "PUBACK 404"},
		"no operation":                  {append(mqtt.AppendPublish(nil, statusTopic+"1", 1, 7, nil), bye...), "PUBACK 404"},
		"two operations":                {append(mqtt.AppendPublish(nil, statusTopic+"1&operationId=a&operationId=b", 1, 7, nil), bye...), "PUBACK 404"},
		"answers to nobody, ten times":  {append(frame(0xa2, append(one, text(responses)...)...), bytes.Repeat(ask("1", ""), 10)...), "11 PUBACK PUBACK PUBACK PUBACK PUBACK"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := d.connect(t, d.Derived("dev-1"))
			_, _ = c.c.Write(x.send) // the door may hang up in the middle
			if got := c.heard(t); got != x.want {
				t.Errorf("%q, want %q", got, x.want)
			}
		})
	}
	t.Cleanup(func() { d.fine(t) })
}

// fine checks that the next device is served.
func (d *service) fine(t *testing.T) {
	t.Helper()
	if a := d.connect(t, d.Derived("dev-1")).Register(t, ""); a.Status != 202 {
		t.Errorf("the next device: %d %s", a.Status, a.Body)
	}
}

// What was asked is answered though a part of the next packet has come, and however many packets end in the middle of a segment.
func TestPartOfNext(t *testing.T) {
	d := newDoor(t)
	dev := d.Derived("dev-1")
	c := d.dial(t, nil)
	c.write(t, append(mqtt.AppendConnect(nil, dev.ID, username(dev), []byte(dev.Token), 0), 0xc0))
	if code := c.connack(t); code != 0 {
		t.Fatalf("CONNACK %d", code)
	}
	for range 1000 { // the octet left over is the next PINGREQ's first
		c.write(t, []byte{0, 0xc0})
		c.read(t, mqtt.Pingresp)
	}
	c.write(t, append([]byte{0}, bytes.Repeat([]byte{0xc0, 0}, 10_000)...))
	for range 10_001 {
		c.read(t, mqtt.Pingresp)
	}
}
