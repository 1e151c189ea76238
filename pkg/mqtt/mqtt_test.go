package mqtt_test

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"reflect"
	"strings"
	"testing"

	"github.com/touchmark/touchmark/pkg/mqtt"
)

func read(b []byte) (*mqtt.Packet, error) {
	return mqtt.Read(bufio.NewReader(bytes.NewReader(b)), 4096)
}

func TestRoundTrip(t *testing.T) {
	for name, c := range map[string]struct {
		wire []byte
		want mqtt.Packet
	}{
		"connect": {mqtt.AppendConnect(nil, "dev", "scope/user", []byte("pw"), 180), mqtt.Packet{Type: mqtt.Connect, ProtocolName: "MQTT", ProtocolLevel: 4,
			CleanSession: true, KeepAlive: 180, ClientID: "dev", Username: "scope/user", HasUsername: true, Password: []byte("pw")}},
		"connack":     {mqtt.AppendConnack(nil, 5), mqtt.Packet{Type: mqtt.Connack, ReturnCode: 5}},
		"publish 0":   {mqtt.AppendPublish(nil, "a/b", 0, 0, []byte("x")), mqtt.Packet{Type: mqtt.Publish, Topic: "a/b", Payload: []byte("x")}},
		"publish 1":   {mqtt.AppendPublish(nil, "a", 1, 7, bytes.Repeat([]byte("x"), 300)), mqtt.Packet{Type: mqtt.Publish, Topic: "a", QoS: 1, ID: 7, Payload: bytes.Repeat([]byte("x"), 300)}},
		"puback":      {mqtt.AppendPuback(nil, 9), mqtt.Packet{Type: mqtt.Puback, ID: 9}},
		"subscribe":   {mqtt.AppendSubscribe(nil, 3, "f/#", 2), mqtt.Packet{Type: mqtt.Subscribe, ID: 3, Filters: []string{"f/#"}, Codes: []byte{2}}},
		"suback":      {mqtt.AppendSuback(nil, 3, []byte{1, 0x80}), mqtt.Packet{Type: mqtt.Suback, ID: 3, Codes: []byte{1, 0x80}}},
		"unsuback":    {mqtt.AppendUnsuback(nil, 4), mqtt.Packet{Type: mqtt.Unsuback, ID: 4}},
		"unsubscribe": {[]byte{0xa2, 5, 0, 4, 0, 1, 'f'}, mqtt.Packet{Type: mqtt.Unsubscribe, ID: 4, Filters: []string{"f"}}},
		"pingreq":     {[]byte{0xc0, 0}, mqtt.Packet{Type: mqtt.Pingreq}},
		"pingresp":    {mqtt.AppendPingresp(nil), mqtt.Packet{Type: mqtt.Pingresp}},
		"disconnect":  {mqtt.AppendDisconnect(nil), mqtt.Packet{Type: mqtt.Disconnect}},
	} {
		got, err := read(c.wire)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if len(got.Payload) == 0 {
			got.Payload = nil
		}
		if !reflect.DeepEqual(*got, c.want) {
			t.Errorf("%s: %+v", name, *got)
		}
		for n := 1; n < len(c.wire); n++ {
			if _, err := read(c.wire[:n]); !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("%s cut after %d: %v", name, n, err)
			}
		}
	}
	if _, err := read(nil); !errors.Is(err, io.EOF) {
		t.Errorf("nothing: %v", err)
	}
}

func TestMalformed(t *testing.T) {
	connect := mqtt.AppendConnect(nil, "dev", "u", nil, 0)
	edit := func(at int, v byte) []byte {
		b := bytes.Clone(connect)
		b[at] = v
		return b
	}
	for name, b := range map[string][]byte{
		"reserved type":           {0x00, 0},
		"type 15":                 {0xf0, 0},
		"flags of connect":        edit(0, 0x11),
		"reserved connect flag":   edit(9, 0x83),
		"will QoS without will":   edit(9, 0x8a),
		"password without user":   edit(9, 0x42),
		"length of five octets":   {0x30, 0x80, 0x80, 0x80, 0x80, 1},
		"length not shortest":     {0xc0, 0x80, 0},
		"subscribe without flags": {0x80, 6, 0, 1, 0, 1, 'f', 0},
		"subscribe to nothing":    {0x82, 2, 0, 1},
		"subscribe, QoS 3":        {0x82, 6, 0, 1, 0, 1, 'f', 3},
		"packet ID 0":             {0x82, 6, 0, 0, 0, 1, 'f', 0},
		"publish, QoS 3":          {0x36, 5, 0, 1, 'a', 0, 1},
		"publish to a filter":     {0x30, 3, 0, 1, '#'},
		"publish to nothing":      {0x30, 2, 0, 0},
		"U+0000":                  {0x30, 3, 0, 1, 0},
		"not UTF-8":               {0x30, 3, 0, 1, 0xff},
		"something behind":        {0xc0, 1, 0},
		"string past the end":     {0x30, 3, 0, 9, 'a'},
	} {
		if p, err := read(b); !errors.Is(err, mqtt.ErrMalformed) {
			t.Errorf("%s: %+v, %v", name, p, err)
		}
	}
	if _, err := read([]byte{0x30, 0xff, 0x7f}); !errors.Is(err, mqtt.ErrTooLarge) {
		t.Errorf("too large: %v", err)
	}
	// MQTT 5 is told apart, not refused as malformed: it gets an answer. DPS-D 65.
	p, err := read([]byte{0x10, 13, 0, 4, 'M', 'Q', 'T', 'T', 5, 2, 0, 60, 0, 0, 0})
	if err != nil || p.ProtocolLevel != 5 {
		t.Errorf("MQTT 5: %+v, %v", p, err)
	}
}

func FuzzRead(f *testing.F) {
	f.Add(mqtt.AppendConnect(nil, "dev", "0ne1/registrations/dev/api-version=2019-03-31", []byte("SharedAccessSignature sr=a"), 180))
	f.Add(mqtt.AppendPublish(nil, "$dps/registrations/PUT/iotdps-register/?$rid=1", 1, 2, []byte(`{"registrationId":"dev"}`)))
	f.Add(mqtt.AppendSubscribe(nil, 1, "$dps/registrations/res/#", 1))
	f.Add([]byte{0x10, 13, 0, 4, 'M', 'Q', 'T', 'T', 5, 2, 0, 60, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bufio.NewReader(bytes.NewReader(b))
		for {
			p, err := mqtt.Read(r, 1<<16)
			if err != nil {
				return
			}
			if strings.Contains(p.Topic, "\x00") || len(p.Filters) > 64 || p.QoS > 2 {
				t.Fatalf("%+v", p)
			}
			if p.Type == mqtt.Publish { // what was accepted is written back the same
				again, err := read(mqtt.AppendPublish(nil, p.Topic, p.QoS, p.ID, p.Payload))
				if len(p.Payload) < 4000 && len(p.Topic) < 4000-len(p.Payload) && (err != nil || again.Topic != p.Topic || !bytes.Equal(again.Payload, p.Payload)) {
					t.Fatalf("%+v, %v", again, err)
				}
			}
		}
	})
}
