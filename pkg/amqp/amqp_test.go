package amqp_test

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"errors"
	"io"
	"math"
	"reflect"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/touchmark/touchmark/pkg/amqp"
)

func octets(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Every constructor there is (part 1, §1.6), and what its value is written as again: the shortest form.
var values = []struct {
	wire  string
	value any
	again string // empty for the same
}{
	{"40", nil, ""},
	{"41", true, ""}, {"42", false, ""}, {"5601", true, "41"}, {"5600", false, "42"},
	{"5007", uint8(7), ""}, {"600102", uint16(258), ""},
	{"43", uint32(0), ""}, {"5201", uint32(1), ""}, {"7000000001", uint32(1), "5201"}, {"7001020304", uint32(0x01020304), ""},
	{"44", uint64(0), ""}, {"5301", uint64(1), ""}, {"800000000000000001", uint64(1), "5301"}, {"800102030405060708", uint64(0x0102030405060708), ""},
	{"51ff", int8(-1), ""}, {"61fffe", int16(-2), ""},
	{"54fd", int32(-3), ""}, {"71fffffffd", int32(-3), "54fd"}, {"7180000000", int32(math.MinInt32), ""},
	{"55fc", int64(-4), ""}, {"81fffffffffffffffc", int64(-4), "55fc"}, {"818000000000000000", int64(math.MinInt64), ""},
	{"723f800000", float32(1), ""}, {"823ff0000000000000", float64(1), ""},
	{"7422500000", amqp.Decimal32{0x22, 0x50}, ""}, {"842234000000000000", amqp.Decimal64{0x22, 0x34}, ""},
	{"9422080000000000000000000000000000", amqp.Decimal128{0x22, 8}, ""},
	{"730001f600", amqp.Char(0x1f600), ""}, {"83ffffffffffffffff", amqp.Timestamp(-1), ""},
	{"98000102030405060708090a0b0c0d0e0f", amqp.UUID{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, ""},
	{"a0020001", []byte{0, 1}, ""}, {"b0000000020001", []byte{0, 1}, "a0020001"},
	{"a102c3a4", "ä", ""}, {"b100000002c3a4", "ä", "a102c3a4"}, {"a100", "", ""},
	{"a30178", amqp.Symbol("x"), ""}, {"b30000000178", amqp.Symbol("x"), "a30178"},
	{"45", []any{}, ""}, {"c00100", []any{}, "45"}, {"c0040240a100", []any{nil, ""}, ""}, {"d0000000070000000240a100", []any{nil, ""}, "c0040240a100"},
	{"c10100", amqp.Map{}, ""}, {"d100000006000000024341", amqp.Map{{Key: uint32(0), Value: true}}, "c103024341"},
	{"e00402500708", &amqp.Array{Code: 0x50, Items: []any{uint8(7), uint8(8)}}, ""}, {"e0020050", &amqp.Array{Code: 0x50, Items: []any{}}, ""},
	{"f00000000d00000002700000000100000002", &amqp.Array{Code: 0x70, Items: []any{uint32(1), uint32(2)}}, "e00a02700000000100000002"},
	{"e00402560100", &amqp.Array{Code: 0x56, Items: []any{true, false}}, ""},
	{"e00701b30000000178", &amqp.Array{Code: 0xb3, Items: []any{amqp.Symbol("x")}}, ""},
	{"e00701c00401a10161", &amqp.Array{Code: 0xc0, Items: []any{[]any{"a"}}}, ""}, {"e00701e00402500708", nested, ""},
	{"e00702005379500708", &amqp.Array{Code: 0x50, Descriptor: uint64(0x79), Items: []any{uint8(7), uint8(8)}}, ""},
	{"00537940", &amqp.Described{Descriptor: uint64(0x79)}, ""}, {"00a3017841", &amqp.Described{Descriptor: amqp.Symbol("x"), Value: true}, ""},
	{"000053794041", &amqp.Described{Descriptor: &amqp.Described{Descriptor: uint64(0x79)}, Value: true}, ""},
	{"00532445", &amqp.Accepted{}, ""}, {"00a312" + hex.EncodeToString([]byte("amqp:accepted:list")) + "45", &amqp.Accepted{}, "00532445"},
	{"00531dc00701a30478787878", &amqp.Error{Condition: "xxxx"}, ""}, {"00531dc00903a304787878784040", &amqp.Error{Condition: "xxxx"}, "00531dc00701a30478787878"},
}

var nested = &amqp.Array{Code: 0xe0, Items: []any{&amqp.Array{Code: 0x50, Items: []any{uint8(7), uint8(8)}}}}

func TestValues(t *testing.T) {
	for _, x := range values {
		b := octets(t, x.wire)
		v, rest, err := amqp.Decode(append(b, 0xff))
		if err != nil || !bytes.Equal(rest, []byte{0xff}) || !reflect.DeepEqual(v, x.value) {
			t.Errorf("%s: %#v, % x, %v", x.wire, v, rest, err)
			continue
		}
		want := x.again
		if want == "" {
			want = x.wire
		}
		if got := hex.EncodeToString(amqp.Append(nil, v)); got != want {
			t.Errorf("%s: written as %s, want %s", x.wire, got, want)
		}
		for n := range b {
			if v, _, err := amqp.Decode(b[:n]); !errors.Is(err, amqp.ErrMalformed) {
				t.Errorf("%s, cut to %d octets: %#v, %v", x.wire, n, v, err)
			}
		}
	}
	for _, n := range []int{0, 1, 251, 252, 253, 254, 255, 256, 257, 1000, 70_000} { // on both sides of every size
		for _, v := range []any{strings.Repeat("s", n), amqp.Symbol(strings.Repeat("s", n)), bytes.Repeat([]byte{1}, n), []any{strings.Repeat("s", n)},
			amqp.Map{{Key: "k", Value: strings.Repeat("s", n)}}, &amqp.Array{Code: 0xb1, Items: []any{strings.Repeat("s", n)}}} {
			b := amqp.Append(nil, v)
			if back, rest, err := amqp.Decode(b); err != nil || len(rest) > 0 || !reflect.DeepEqual(back, v) {
				t.Errorf("%T of %d octets: %v", v, n, err)
			}
		}
	}
	many := make([]any, 300)
	if back, _, err := amqp.Decode(amqp.Append(nil, many)); err != nil || !reflect.DeepEqual(back, many) {
		t.Errorf("300 nulls: %v", err)
	}
}

// What is no AMQP, or too much of it.
func TestRefusedValues(t *testing.T) {
	nest := func(b []byte, n int) []byte {
		for range n {
			b = amqp.Append(nil, []any{&amqp.Described{Descriptor: uint64(0x99), Value: amqp.Map{{Key: "k", Value: rawList(b)}}}})
		}
		return b
	}
	for name, x := range map[string]struct {
		wire string
		want error
	}{
		"nothing": {"", amqp.ErrMalformed}, "constructor 01": {"01", amqp.ErrMalformed}, "constructor 4f": {"4f", amqp.ErrMalformed}, "constructor 99": {"99" + strings.Repeat("00", 16), amqp.ErrMalformed},
		"constructor a2": {"a20100", amqp.ErrMalformed}, "constructor c5": {"c50100", amqp.ErrMalformed},
		"boolean 2": {"5602", amqp.ErrMalformed}, "UTF-8": {"a102c328", amqp.ErrMalformed}, "ASCII": {"a301ff", amqp.ErrMalformed}, "a surrogate": {"730000d800", amqp.ErrMalformed},
		"a character of 32 bits": {"73ffffffff", amqp.ErrMalformed}, "octets left in a list": {"c0030140" + "40", amqp.ErrMalformed}, "a count without octets": {"c00102", amqp.ErrMalformed},
		"a list without a count": {"c000", amqp.ErrMalformed}, "an odd map": {"c10201" + "40", amqp.ErrMalformed}, "a key twice": {"c1050443414342", amqp.ErrMalformed},
		"an array of nulls": {"e0020140", amqp.ErrMalformed}, "an array of true": {"e0030241" + "00", amqp.ErrMalformed}, "an array without a constructor": {"e00100", amqp.ErrMalformed},
		"an array that counts more": {"e00303" + "5007", amqp.ErrMalformed}, "an array that counts less": {"e004015007" + "08", amqp.ErrMalformed},
		"4 GiB": {"b1ffffffff61", amqp.ErrMalformed}, "4 G items": {"d0ffffffffffffffff", amqp.ErrMalformed},
		"an error without its condition": {"00531d45", amqp.ErrMalformed}, "an error of four fields": {"00531dc00604a3017840" + "4040", amqp.ErrMalformed}, "an error that is a map": {"00531dc10100", amqp.ErrMalformed},
		"descriptors": {strings.Repeat("00", 1000), amqp.ErrTooLarge}, "1,025 values": {"d000000405" + "00000401" + strings.Repeat("40", 1025), amqp.ErrTooLarge},
		"depth": {hex.EncodeToString(nest([]byte{0x40}, 5)), amqp.ErrTooLarge}, "arrays in arrays": {arrays(40), amqp.ErrTooLarge},
	} {
		if v, _, err := amqp.Decode(octets(t, x.wire)); !errors.Is(err, x.want) {
			t.Errorf("%s: %#v, %v", name, v, err)
		}
	}
	if _, _, err := amqp.Decode(nest([]byte{0x40}, 3)); err != nil {
		t.Errorf("a depth that has a use: %v", err)
	}
	// However much is announced, what is allocated has octets behind it.
	b := octets(t, "d0000003e8000003e4"+strings.Repeat("40", 996))
	if n := testing.AllocsPerRun(10, func() { _, _, _ = amqp.Decode(b) }); n > 20 {
		t.Errorf("%v allocations", n)
	}
}

// rawList reads a value back, to put it into another.
func rawList(b []byte) any {
	v, _, _ := amqp.Decode(b)
	return v
}

func arrays(n int) string {
	b := []byte{0x50}
	for range n {
		b = append([]byte{0xe0, byte(len(b) + 1), 1}, b...)
	}
	return hex.EncodeToString(b)
}

func u32(n uint32) *uint32 { return &n }

// Every performative, with every field.
var performatives = []amqp.Performative{
	&amqp.Open{ContainerID: "c", Hostname: "h", MaxFrameSize: 512, ChannelMax: 1, IdleTimeout: 1000, OutgoingLocales: amqp.Symbol("en"), IncomingLocales: amqp.Symbols("de"),
		OfferedCapabilities: amqp.Symbol("x"), DesiredCapabilities: amqp.Symbol("y"), Properties: amqp.Map{{Key: amqp.Symbol("e"), Value: &amqp.Error{Condition: "amqp:x", Description: "d", Info: amqp.Map{}}}}},
	&amqp.Open{ContainerID: "", MaxFrameSize: 1<<32 - 1, ChannelMax: 1<<16 - 1},
	&amqp.Begin{RemoteChannel: new(uint16), NextOutgoingID: 1, IncomingWindow: 2, OutgoingWindow: 3, HandleMax: 4, OfferedCapabilities: "o", DesiredCapabilities: "d", Properties: amqp.Map{}},
	&amqp.Attach{Name: "n", Handle: 1, Role: amqp.Receiver, SndSettleMode: amqp.SendSettled, RcvSettleMode: amqp.ReceiveSecond,
		Source:    &amqp.Source{Address: "a", Durable: 2, ExpiryPolicy: "never", Timeout: 9, Dynamic: true, DynamicNodeProperties: amqp.Map{}, DistributionMode: "copy", Filter: amqp.Map{}, DefaultOutcome: &amqp.Released{}, Outcomes: amqp.Symbols("amqp:accepted:list"), Capabilities: amqp.Symbol("q")},
		Target:    &amqp.Target{Address: "b", Durable: 1, ExpiryPolicy: "never", Timeout: 8, Dynamic: true, DynamicNodeProperties: amqp.Map{}, Capabilities: amqp.Symbol("q")},
		Unsettled: amqp.Map{}, IncompleteUnsettled: true, InitialDeliveryCount: u32(7), MaxMessageSize: 1 << 40, OfferedCapabilities: "o", DesiredCapabilities: "d", Properties: amqp.Map{{Key: amqp.Symbol("p"), Value: int32(-1)}}},
	&amqp.Flow{NextIncomingID: u32(0), IncomingWindow: 1, NextOutgoingID: 2, OutgoingWindow: 3, Handle: u32(0), DeliveryCount: u32(5), LinkCredit: u32(6), Available: u32(0), Drain: true, Echo: true, Properties: amqp.Map{}},
	&amqp.Flow{},
	&amqp.Transfer{Handle: 1, DeliveryID: u32(0), DeliveryTag: make([]byte, 32), MessageFormat: u32(0), Settled: new(bool), More: true, RcvSettleMode: new(uint8), State: &amqp.Received{SectionNumber: 1, SectionOffset: 2}, Resume: true, Aborted: true, Batchable: true},
	&amqp.Disposition{Role: amqp.Receiver, First: 1, Last: u32(2), Settled: true, State: &amqp.Modified{DeliveryFailed: true, UndeliverableHere: true, MessageAnnotations: amqp.Map{}}, Batchable: true},
	&amqp.Disposition{State: &amqp.Rejected{Error: &amqp.Error{Condition: "x"}}},
	&amqp.Detach{Handle: 1, Closed: true, Error: &amqp.Error{Condition: "x"}}, &amqp.End{}, &amqp.End{Error: &amqp.Error{Condition: "x"}}, &amqp.Close{Error: &amqp.Error{Condition: "x"}},
	&amqp.SASLMechanisms{Mechanisms: []amqp.Symbol{"PLAIN", "TPM"}}, &amqp.SASLInit{Mechanism: "PLAIN", InitialResponse: []byte("\x00a\x00b"), Hostname: "h"},
	&amqp.SASLChallenge{Challenge: []byte{0}}, &amqp.SASLResponse{Response: []byte{}}, &amqp.SASLOutcome{Code: amqp.SASLTemporary, AdditionalData: []byte("x")},
}

func TestFrames(t *testing.T) {
	var b []byte
	for _, p := range performatives {
		b = amqp.AppendFrame(b, 3, p, nil)
	}
	b = amqp.AppendFrame(b, 65535, &amqp.Transfer{Handle: 1}, []byte("payload"))
	b = amqp.AppendFrame(b, 9, nil, nil)
	for _, r := range []io.Reader{bytes.NewReader(b), iotest.OneByteReader(bytes.NewReader(b)), iotest.DataErrReader(bytes.NewReader(b))} {
		br := bufio.NewReader(r)
		for _, p := range performatives {
			f, err := amqp.ReadFrame(br, 4096)
			if err != nil || !reflect.DeepEqual(f.Body, p) || len(f.Payload) > 0 || f.SASL == (f.Channel == 3) {
				t.Fatalf("%T: %+v, %v", p, f, err)
			}
		}
		if f, err := amqp.ReadFrame(br, 4096); err != nil || f.Channel != 65535 || string(f.Payload) != "payload" {
			t.Fatalf("%+v, %v", f, err)
		}
		if f, err := amqp.ReadFrame(br, 4096); err != nil || f.Channel != 9 || f.Body != nil || f.SASL {
			t.Fatalf("%+v, %v", f, err)
		}
		if _, err := amqp.ReadFrame(br, 4096); err != io.EOF {
			t.Fatal(err)
		}
	}
	for n := 1; n < 79; n++ { // within the first
		if _, err := amqp.ReadFrame(bufio.NewReader(bytes.NewReader(b[:n])), 4096); err != io.ErrUnexpectedEOF {
			t.Errorf("%d octets: %v", n, err)
		}
	}
	if _, err := amqp.ReadFrame(bufio.NewReader(bytes.NewReader(b)), 30); !errors.Is(err, amqp.ErrTooLarge) {
		t.Error(err)
	}
	// An extended header is skipped.
	ext := append(octets(t, "00000014 03000000 deadbeef 0053 18c0020140 41"), 0)
	if _, err := amqp.ReadFrame(bufio.NewReader(bytes.NewReader(ext)), 4096); !errors.Is(err, amqp.ErrMalformed) { // an octet behind it
		t.Error(err)
	}
	if f, err := amqp.ReadFrame(bufio.NewReader(bytes.NewReader(octets(t, "00000010 03000000 deadbeef 00531845"))), 4096); err != nil || !reflect.DeepEqual(f.Body, &amqp.Close{}) {
		t.Errorf("%+v, %v", f, err)
	}
}

func TestHeader(t *testing.T) {
	for _, p := range []amqp.Protocol{amqp.AMQP, amqp.SASL} {
		if got, err := amqp.ReadHeader(bytes.NewReader(amqp.AppendHeader(nil, p))); err != nil || got != p {
			t.Error(got, err)
		}
	}
	for _, s := range []string{"AMQP\x02\x01\x00\x00", "AMQP\x00\x01\x00\x01", "AMQP\x00\x00\x09\x01", "GET / HT"} {
		if _, err := amqp.ReadHeader(strings.NewReader(s)); !errors.Is(err, amqp.ErrHeader) {
			t.Errorf("%q: %v", s, err)
		}
	}
	if _, err := amqp.ReadHeader(strings.NewReader("AMQP")); err != io.ErrUnexpectedEOF {
		t.Error(err)
	}
}

func TestMessage(t *testing.T) {
	created := amqp.Timestamp(1)
	m := &amqp.Message{Properties: &amqp.Properties{MessageID: uint64(1), UserID: []byte("u"), To: "t", Subject: "s", ReplyTo: "r", CorrelationID: amqp.UUID{1}, ContentType: "c", ContentEncoding: "e",
		AbsoluteExpiryTime: &created, CreationTime: &created, GroupID: "g", GroupSequence: u32(0), ReplyToGroupID: "x"}, ApplicationProperties: amqp.Map{{Key: "k", Value: int32(3)}}, Data: []byte("body")}
	if back, err := amqp.DecodeMessage(amqp.AppendMessage(nil, m)); err != nil || !reflect.DeepEqual(back, m) {
		t.Errorf("%+v, %v", back, err)
	}
	m = &amqp.Message{Value: "value"}
	if back, err := amqp.DecodeMessage(amqp.AppendMessage(nil, m)); err != nil || !reflect.DeepEqual(back, m) {
		t.Errorf("%+v, %v", back, err)
	}
	b := amqp.AppendMessage(nil, &amqp.Message{Data: []byte("one")})
	whole := append(bytes.Clone(b), amqp.AppendMessage(nil, &amqp.Message{Data: []byte("two")})...)
	if back, err := amqp.DecodeMessage(whole); err != nil || string(back.Data) != "onetwo" || !bytes.HasPrefix(whole, b) {
		t.Errorf("%+v, %v", back, err)
	}
}

// Whatever comes: no panic, and what is read is the same after it was written and read again.
func FuzzDecode(f *testing.F) {
	for _, x := range values {
		f.Add(octets(f, x.wire))
	}
	for _, p := range performatives {
		f.Add(amqp.Append(nil, p))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		v, rest, err := amqp.Decode(b)
		if err != nil {
			if !errors.Is(err, amqp.ErrMalformed) && !errors.Is(err, amqp.ErrTooLarge) {
				t.Fatal(err)
			}
			return
		}
		out := amqp.Append(nil, v)
		back, left, err := amqp.Decode(out)
		if err != nil || len(left) > 0 {
			t.Fatalf("% x written as % x: %v", b[:len(b)-len(rest)], out, err)
		}
		if again := amqp.Append(nil, back); !bytes.Equal(again, out) { // which NaN is equal in, too
			t.Fatalf("% x, then % x", out, again)
		}
	})
}

func FuzzFrames(f *testing.F) {
	var b []byte
	for _, p := range performatives {
		b = amqp.AppendFrame(b, 1, p, nil)
	}
	f.Add(b)
	f.Add(amqp.AppendFrame(amqp.AppendFrame(nil, 0, nil, nil), 0, &amqp.Transfer{}, []byte("payload")))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bufio.NewReader(bytes.NewReader(b))
		for {
			x, err := amqp.ReadFrame(r, 1<<16)
			if err != nil {
				return
			}
			out := amqp.AppendFrame(nil, x.Channel, x.Body, x.Payload)
			y, err := amqp.ReadFrame(bufio.NewReader(bytes.NewReader(out)), 1<<20)
			if err != nil || y.SASL != x.SASL || y.Channel != x.Channel || !bytes.Equal(y.Payload, x.Payload) {
				t.Fatalf("%+v, then %+v, %v", x, y, err)
			}
			if again := amqp.AppendFrame(nil, y.Channel, y.Body, y.Payload); !bytes.Equal(again, out) {
				t.Fatalf("% x, then % x", out, again)
			}
		}
	})
}

func FuzzMessage(f *testing.F) {
	f.Add(amqp.AppendMessage(nil, &amqp.Message{Properties: &amqp.Properties{CorrelationID: "x"}, ApplicationProperties: amqp.Map{{Key: "iotdps-operation-type", Value: "iotdps-register"}}, Data: []byte("{}")}))
	f.Add(amqp.AppendMessage(nil, &amqp.Message{Value: ""}))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := amqp.DecodeMessage(b)
		if err != nil {
			return
		}
		out := amqp.AppendMessage(nil, m)
		back, err := amqp.DecodeMessage(out)
		if err != nil || !bytes.Equal(amqp.AppendMessage(nil, back), out) {
			t.Fatalf("% x, then % x, %v", b, out, err)
		}
	})
}
