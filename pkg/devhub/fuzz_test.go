package devhub

import (
	"bufio"
	"bytes"
	"encoding/json"
	"maps"
	"net"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/amqp"
	"github.com/touchmark/touchmark/pkg/door"
	"github.com/touchmark/touchmark/pkg/mqtt"
)

// A bag that is taken is written so that it is taken again as the same, and fits a topic.
func FuzzBag(f *testing.F) {
	f.Add("%24.mid=m%201&%24.ct=application%2Fjson&a%26b=c+d&e")
	f.Add("?a=1&")
	f.Fuzz(func(t *testing.T, s string) {
		system, properties, err := parseBag(s)
		if err != nil {
			return
		}
		text := bag(system, properties)
		system2, properties2, err := parseBag(text)
		if err != nil || !maps.Equal(system, system2) || !maps.Equal(properties, properties2) || strings.ContainsAny(text, "+#\x00") {
			t.Fatalf("%q becomes %q: %v", s, text, err)
		}
	})
}

func FuzzTopics(f *testing.F) {
	f.Add("hub1.example.net/dev-1/?api-version=2021-04-12&model-id=dtmi%3Aa%3Bb", "200/?$rid=7")
	f.Fuzz(func(t *testing.T, user, answer string) {
		if host, id, model, ok := parseUsername(user); ok && (strings.Contains(host+id, "/") || !strings.HasPrefix(user, host+"/"+id) || len(model) > 256) {
			t.Fatalf("%q: %q, %q, %q", user, host, id, model)
		}
		if _, rid, ok := parseAnswer(answer); ok && (rid == "" || strings.Contains(rid, "&") || len(rid) > 256) {
			t.Fatalf("%q: %q", answer, rid)
		}
	})
}

// Merging keeps its arguments, is done when it is done twice, and never grows past the limits.
func FuzzMerge(f *testing.F) {
	f.Add(`{"a":{"b":1,"c":[1,null]}}`, `{"a":{"b":null,"d":"x"},"e":null}`)
	f.Add(`{}`, `{"a":{"b":{"c":{"d":{"e":{"f":{"g":{"h":{"i":{"j":{"k":1}}}}}}}}}}}`)
	f.Fuzz(func(t *testing.T, one, two string) {
		values, err1 := parseObject([]byte(one))
		patch, err2 := parseObject([]byte(two))
		if err1 != nil || err2 != nil {
			return
		}
		before, _ := json.Marshal([]object{values, patch})
		out := merged(values, patch)
		again := merged(out, patch)
		after, _ := json.Marshal([]object{values, patch})
		if string(before) != string(after) || !reflect.DeepEqual(out, again) {
			t.Fatalf("%s and %s: %v, then %v", one, two, out, again)
		}
		for name, v := range patch {
			if _, there := out[name]; there != (v != nil) {
				t.Fatalf("%q of %s", name, two)
			}
		}
		tw := newTwin(time.Unix(0, 0))
		next, told, err := tw.apply(twinPatch{tags: values, desired: patch}, false, time.Unix(1, 0))
		if err != nil {
			return
		}
		if n, err := size(next.Desired.Values, maxDepth); err != nil || n > maxProperty || told["$version"] != int64(2) {
			t.Fatalf("%d, %v", n, err)
		}
		if _, err := json.Marshal(next.Desired.document(true)); err != nil {
			t.Fatal(err)
		}
	})
}

// What parse takes json.Unmarshal takes too, as the same.
func FuzzParse(f *testing.F) {
	f.Add([]byte(`{"a":[1.50,{"b":null}],"c":"\u00e4"}`))
	f.Add([]byte(`{"a":1,"a":2}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		v, err := parse(b)
		if err != nil {
			return
		}
		if !json.Valid(b) {
			t.Fatalf("%q was taken", b)
		}
		text, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		again, err := parse(text)
		if err != nil || !reflect.DeepEqual(v, again) {
			t.Fatalf("%q becomes %q: %v", b, text, err)
		}
	})
}

func FuzzQuery(f *testing.F) {
	f.Add("SELECT * FROM devices WHERE tags.a = 'it''s' AND properties.reported.b != 1.5")
	f.Fuzz(func(t *testing.T, s string) {
		conditions, err := parseQuery(s)
		if err != nil {
			return
		}
		for _, c := range conditions {
			if len(c.path) == 0 || c.meets(object{}) {
				t.Fatalf("%q: %+v", s, c)
			}
		}
	})
}

// Whatever a device publishes, the hub neither panics nor waits.
func FuzzPublish(f *testing.F) {
	f.Add("$iothub/twin/PATCH/properties/reported/?$rid=1", []byte(`{"a":1}`), byte(1))
	f.Add("devices/dev-1/messages/events/a=b", []byte("x"), byte(0))
	f.Add("$iothub/methods/res/200/?$rid=1", []byte("{}"), byte(1))
	f.Fuzz(func(t *testing.T, topic string, payload []byte, qos byte) {
		h, err := Open(t.Context(), Config{Name: "hub", Secret: make([]byte, 16)})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := h.put("dev-1", object{"deviceId": "dev-1"}, ""); err != nil {
			t.Fatal(err)
		}
		s := &session{h: h, id: "dev-1", out: make(chan []byte, maxOut)}
		d := h.devices["dev-1"]
		d.session, d.subs = s, map[string]byte{twinFilter: 1, desiredFilter: 0}
		_ = s.publish(&mqtt.Packet{Topic: topic, Payload: payload, QoS: qos % 3, ID: 1})
	})
}

// deaf is a connection that takes everything and says nothing.
type deaf struct{ net.Conn }

func (deaf) Write(b []byte) (int, error)      { return len(b), nil }
func (deaf) SetWriteDeadline(time.Time) error { return nil }

// Whatever frames a service sends, the hub neither panics nor keeps more than it may.
func FuzzService(f *testing.F) {
	id, credit := uint32(0), uint32(9)
	var talk []byte
	for _, body := range []amqp.Performative{&amqp.Begin{IncomingWindow: 9}, &amqp.Attach{Name: "a", Target: &amqp.Target{Address: "$cbs"}}, &amqp.Attach{Name: "b", Handle: 1, Role: amqp.Receiver, Source: &amqp.Source{Address: "$cbs"}},
		&amqp.Flow{IncomingWindow: 9, Handle: &credit, LinkCredit: &credit}, &amqp.Attach{Name: "c", Handle: 2, Target: &amqp.Target{Address: "/messages/devicebound"}}} {
		talk = amqp.AppendFrame(talk, 0, body, nil)
	}
	message := &amqp.Message{Properties: &amqp.Properties{To: "/devices/dev-1/messages/devicebound", MessageID: "1"}, ApplicationProperties: amqp.Map{{Key: "operation", Value: "put-token"}}, Value: "x"}
	for handle := range uint32(3) {
		f.Add(amqp.AppendFrame(talk, 0, &amqp.Transfer{Handle: handle, DeliveryID: &id}, amqp.AppendMessage(nil, message)))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := Open(t.Context(), Config{Name: "hub", Secret: make([]byte, 16)})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := h.put("dev-1", object{"deviceId": "dev-1"}, ""); err != nil {
			t.Fatal(err)
		}
		s := &sender{h: h, c: &door.Conn{Conn: deaf{}}, trusted: true, maxFrame: 512, links: make(map[uint32]*serviceLink)}
		for r := bufio.NewReader(bytes.NewReader(b)); ; {
			frame, err := amqp.ReadFrame(r, maxServiceFrame)
			if err != nil || s.frame(frame) != nil {
				break
			}
			kept := 0
			for _, l := range s.links {
				kept += len(l.partial)
			}
			if len(s.links) > maxServiceHandle+1 || len(s.held) > maxHeld || kept > (maxServiceHandle+1)*maxServiceMessage {
				t.Fatalf("%d links, %d answers, %d octets", len(s.links), len(s.held), kept)
			}
		}
	})
}
