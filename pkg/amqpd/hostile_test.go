package amqpd_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/amqp"
	"github.com/touchmark/touchmark/pkg/amqpd"
	"github.com/touchmark/touchmark/pkg/door"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

// raw is a frame of a kind and channel around anything.
func raw(kind byte, channel uint16, body string) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(8+len(body)))
	return append(binary.BigEndian.AppendUint16(append(b, 2, kind), channel), body...)
}

func on(channel uint16, p amqp.Performative) []byte { return amqp.AppendFrame(nil, channel, p, nil) }

func u32(n uint32) *uint32 { return &n }

// What is not the protocol is answered with why, at the level where it went wrong, and ends there; nothing of it reaches
// memory beyond its limits, and the next device is served.
func TestHostile(t *testing.T) {
	d := newDoor(t, func(c *amqpd.Config, _ *door.Config) { c.Second = 100 * time.Millisecond })
	dev := d.Derived("dev-1")
	one := amqp.AppendMessage(nil, register(""))
	delivery := func(edit func(*amqp.Transfer), payload []byte) []byte {
		tr := &amqp.Transfer{Handle: 1, DeliveryID: u32(0), DeliveryTag: []byte{0}}
		edit(tr)
		return amqp.AppendFrame(nil, 0, tr, payload)
	}
	again := func(n int, b []byte) []byte { return bytes.Repeat(b, n) }
	attaches := func(n int) (b []byte) {
		for i := range n {
			a := sender(dev)
			a.Handle, a.Name = uint32(i), strings.Repeat("n", i)
			b = append(b, on(0, a)...)
		}
		return b
	}
	without := func(a *amqp.Attach, edit func(*amqp.Attach)) []byte { edit(a); return on(0, a) }
	flow := func(edit func(*amqp.Flow)) []byte {
		f := &amqp.Flow{IncomingWindow: 1, OutgoingWindow: 1}
		edit(f)
		return on(0, f)
	}
	deep := func(n int) string {
		return "\x00\x53\x10\xc0" + string([]byte{byte(n + 1)}) + "\x0a" + strings.Repeat("\x00", n)
	}
	lists := func(n int) string { // each in another
		b := "\x45"
		for range n {
			b = "\xd0" + string(binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(nil, uint32(4+len(b))), 1)) + b
		}
		return b
	}
	const (
		fresh    = iota // TLS and nothing else
		sasl            // behind the mechanisms
		headers         // bare, behind the header
		opened          // behind open
		begun           // behind begin
		attached        // with both links and credit for answers
	)
	const (
		silent   = amqp.Symbol("")                  // hung up, without a word
		outcome  = amqp.Symbol("outcome 1")         // of SASL
		decode   = amqp.Symbol("amqp:decode-error") //
		framing  = amqp.Symbol("amqp:connection:framing-error")
		denied   = amqp.Symbol("amqp:not-allowed")
		field    = amqp.Symbol("amqp:invalid-field")
		handle   = amqp.Symbol("amqp:session:unattached-handle")
		inUse    = amqp.Symbol("amqp:session:handle-in-use")
		oversize = amqp.Symbol("amqp:link:message-size-exceeded")
		argument = amqp.Symbol("com.microsoft:argument-error")
		stays    = amqp.Symbol("is served") // it means nothing, and the conversation goes on
	)
	mechanism := func(name amqp.Symbol, response string) []byte {
		return frames(&amqp.SASLInit{Mechanism: name, InitialResponse: []byte(response)})
	}
	header := func(p amqp.Protocol) []byte { return amqp.AppendHeader(nil, p) }
	cases := []struct {
		name  string
		stage int
		send  []byte
		want  amqp.Symbol
	}{
		{"HTTP", fresh, []byte("GET / HTTP/1.1\r\n\r\n"), "header"},
		{"MQTT", fresh, []byte("\x10\x26\x00\x04MQTT\x04\x82"), "header"},
		{"TLS inside TLS", fresh, []byte("AMQP\x02\x01\x00\x00"), "header"},
		{"AMQP 0.9.1", fresh, []byte("AMQP\x00\x00\x09\x01"), "header"},
		{"AMQP 1.1", fresh, []byte("AMQP\x00\x01\x01\x00"), "header"},
		{"lower case", fresh, []byte("amqp\x00\x01\x00\x00"), "header"},
		{"half a header", fresh, []byte("AMQP\x00"), silent},
		{"nothing", fresh, nil, silent},

		{"SASL header again", sasl, header(amqp.SASL), outcome},
		{"AMQP header instead of init", sasl, header(amqp.AMQP), outcome},
		{"open instead of init", sasl, frames(opening), outcome},
		{"an empty frame", sasl, raw(1, 0, ""), outcome},
		{"a response first", sasl, frames(&amqp.SASLResponse{Response: []byte{0}}), outcome},
		{"an outcome of one's own", sasl, frames(&amqp.SASLOutcome{}), outcome},
		{"mechanisms", sasl, frames(&amqp.SASLMechanisms{Mechanisms: []amqp.Symbol{"PLAIN"}}), outcome},
		{"no mechanism", sasl, raw(1, 0, "\x00\x53\x41\x45"), outcome},
		{"a mechanism that is a string", sasl, raw(1, 0, "\x00\x53\x41\xc0\x08\x01\xa1\x05PLAIN"), outcome},
		{"octets behind init", sasl, raw(1, 0, "\x00\x53\x41\xc0\x08\x01\xa3\x05PLAIN\x40"), outcome},
		{"init in a frame of AMQP", sasl, raw(0, 0, "\x00\x53\x41\xc0\x08\x01\xa3\x05PLAIN"), outcome},
		{"a frame of 4 GiB", sasl, []byte("\xff\xff\xff\xff\x02\x01\x00\x00"), outcome},
		{"a frame of 16 KiB", sasl, []byte("\x00\x00\x40\x00\x02\x01\x00\x00"), outcome},
		{"a frame of type 2", sasl, raw(2, 0, "\x00\x53\x41\x45"), outcome},
		{"EXTERNAL without a certificate", sasl, mechanism("EXTERNAL", address(dev)), outcome},
		{"XOAUTH2", sasl, mechanism("XOAUTH2", "user=x"), outcome},
		{"a token of 3 KiB", sasl, mechanism("PLAIN", "\x00"+address(dev)+"\x00"+strings.Repeat("x", 3000)), outcome},
		{"an authcid of 3 KiB", sasl, mechanism("PLAIN", "\x00"+dev.Scope+"/registrations/"+strings.Repeat("x", 3000)+"\x00"+dev.Token), outcome},
		{"half of init", sasl, frames(plainInit(dev))[:40], silent},
		{"init, twice", sasl, again(2, frames(plainInit(dev))), "header"},
		{"SASL once more behind its outcome", sasl, append(frames(plainInit(dev)), header(amqp.SASL)...), "header"},
		{"response behind the outcome", sasl, append(frames(plainInit(dev)), frames(&amqp.SASLResponse{Response: []byte{0}})...), "header"},

		{"begin before open", headers, frames(beginning), denied},
		{"close before open", headers, frames(&amqp.Close{}), denied},
		{"an empty frame before open", headers, raw(0, 0, ""), denied},
		{"SASL behind a bare header", headers, frames(plainInit(dev)), denied},
		{"a header again", headers, header(amqp.AMQP), framing},
		{"nothing in open", headers, raw(0, 0, "\x00\x53\x10\x45"), decode},
		{"open without its list", headers, raw(0, 0, "\x00\x53\x10\x40"), decode},
		{"open with eleven fields", headers, raw(0, 0, "\x00\x53\x10\xc0\x0f\x0b\xa1\x01x"+strings.Repeat("\x40", 10)), decode},
		{"a number for a name", headers, raw(0, 0, "\x00\x53\x10\xc0\x02\x01\x43"), decode},
		{"a name that is not UTF-8", headers, raw(0, 0, "\x00\x53\x10\xc0\x04\x01\xa1\x01\xff"), decode},
		{"an unknown descriptor", headers, raw(0, 0, "\x00\x53\x99\x45"), decode},
		{"no descriptor", headers, raw(0, 0, "\x45"), decode},
		{"a descriptor described, fifty times", headers, raw(0, 0, strings.Repeat("\x00", 50)), framing},
		{"fifty descriptors within open", headers, raw(0, 0, deep(249)), framing},
		{"lists within lists, by the hundred", headers, raw(0, 0, "\x00"+lists(100)+"\x45"), framing},
		{"lists within lists, by the thousand", opened, raw(0, 0, "\x00\x53\x18"+lists(5000)), framing},
		{"a frame shorter than its head", headers, []byte("\x00\x00\x00\x07\x02\x00\x00\x00"), decode},
		{"data before the head's end", headers, []byte("\x00\x00\x00\x10\x01\x00\x00\x00\x00\x53\x10\xc0\x03\x01\xa1\x00"), decode},
		{"data behind the frame's end", headers, []byte("\x00\x00\x00\x10\x05\x00\x00\x00\x00\x53\x10\xc0\x03\x01\xa1\x00"), decode},
		{"an open of 9 KiB", headers, frames(&amqp.Open{ContainerID: strings.Repeat("x", 9000), MaxFrameSize: 512}), framing},
		{"frames of 511 octets", headers, frames(&amqp.Open{ContainerID: "x", MaxFrameSize: 511}), field},
		{"an idle-time-out of a millisecond", headers, frames(&amqp.Open{ContainerID: "x", MaxFrameSize: 512, IdleTimeout: 1}), denied},
		{"half of open", headers, frames(opening)[:20], silent},

		{"open again", opened, frames(opening), denied},
		{"SASL behind open", opened, frames(plainInit(dev)), framing},
		{"attach before begin", opened, frames(sender(dev)), denied},
		{"flow before begin", opened, frames(granting(1)), denied},
		{"transfer before begin", opened, delivery(func(*amqp.Transfer) {}, one), denied},
		{"disposition before begin", opened, frames(&amqp.Disposition{Role: true}), denied},
		{"end before begin", opened, frames(&amqp.End{}), denied},
		{"detach before begin", opened, frames(&amqp.Detach{}), denied},
		{"a channel beyond channel-max", opened, on(2, beginning), framing},
		{"the last channel there is", opened, on(65535, beginning), framing},
		{"begin as an answer", opened, frames(&amqp.Begin{RemoteChannel: new(uint16), IncomingWindow: 1, OutgoingWindow: 1}), denied},
		{"begin without windows", opened, raw(0, 0, "\x00\x53\x11\xc0\x03\x02\x40\x43"), decode},
		{"a frame of 1 MiB", opened, []byte("\x00\x10\x00\x00\x02\x00\x00\x00"), framing},
		{"a string of 4 GiB", opened, raw(0, 0, "\x00\x53\x18\xb1\xff\xff\xff\xff"), decode},
		{"a list of 4 G items", opened, raw(0, 0, "\x00\x53\x18\xd0\x00\x00\x00\x04\xff\xff\xff\xff"), decode},
		{"a list that ends before its size", opened, raw(0, 0, "\x00\x53\x18\xc0\x03\x01\x40\x40"), decode},
		{"an array of 4 G nulls", opened, raw(0, 0, "\x00\x53\x18\xf0\x00\x00\x00\x05\xff\xff\xff\xff\x40"), decode},
		{"an array of 250 empty lists", opened, raw(0, 0, "\x00\x53\x18\xe0\x02\xfa\x45"), decode},
		{"a map of three", opened, raw(0, 0, "\x00\x53\x18\xc1\x04\x03\x40\x41\x42"), decode},
		{"a key twice", opened, raw(0, 0, "\x00\x53\x18\xc1\x05\x04\x43\x41\x43\x42"), decode},
		{"two thousand values", opened, raw(0, 0, "\x00\x53\x18\xd0\x00\x00\x07\xd4\x00\x00\x07\xd0"+strings.Repeat("\x40", 2000)), framing},
		{"a negative count", opened, raw(0, 0, "\x00\x53\x18\xd0\x80\x00\x00\x00\x80\x00\x00\x00"), decode},
		{"a size less than its count", opened, raw(0, 0, "\x00\x53\x18\xd0\x00\x00\x00\x03\x00\x00\x00"), decode},
		{"a boolean of 2", opened, raw(0, 0, "\x00\x53\x18\x56\x02"), decode},
		{"a symbol beyond ASCII", opened, raw(0, 0, "\x00\x53\x18\xa3\x01\x80"), decode},
		{"a character beyond Unicode", opened, raw(0, 0, "\x00\x53\x18\x73\x00\x11\x00\x00"), decode},
		{"a constructor that is none", opened, raw(0, 0, "\x00\x53\x18\x3f"), decode},
		{"a payload behind begin", opened, amqp.AppendFrame(nil, 0, beginning, []byte("x")), decode},
		{"empty frames", opened, again(100, raw(0, 0, "")), stays},
		{"an empty frame on a channel that is not there", opened, raw(0, 77, ""), stays},

		{"begin again", begun, frames(beginning), denied},
		{"a handle beyond handle-max", begun, without(sender(dev), func(a *amqp.Attach) { a.Handle = 8 }), framing},
		{"the last handle there is", begun, without(sender(dev), func(a *amqp.Attach) { a.Handle = 1<<32 - 1 }), framing},
		{"a flood of attaches", begun, attaches(200), framing},
		{"a settle mode that is none", begun, without(sender(dev), func(a *amqp.Attach) { a.SndSettleMode = 3 }), decode},
		{"another settle mode that is none", begun, without(sender(dev), func(a *amqp.Attach) { a.RcvSettleMode = 2 }), decode},
		{"a source for a target", begun, raw(0, 0, "\x00\x53\x12\xc0\x12\x07\xa1\x01x\x43\x42\x40\x40\x40\x00\x53\x28\x45\x40\x40\x40\x40"), decode},
		{"another device's address", begun, without(sender(dev), func(a *amqp.Attach) { a.Target.Address = dev.Scope + "/registrations/dev-2" }), "amqp:unauthorized-access"},
		{"a coordinator of transactions", begun, raw(0, 0, "\x00\x53\x12\xc0\x0e\x07\xa1\x01x\x43\x42\x40\x40\x40\x00\x53\x30\x45"), decode},
		{"a terminus too large to be said back", begun, without(receiver(dev), func(a *amqp.Attach) { a.Name = strings.Repeat("n", 60_000) }), stays},
		{"transfer without attach", begun, delivery(func(*amqp.Transfer) {}, one), handle},
		{"flow without attach", begun, frames(granting(1)), handle},
		{"detach without attach", begun, frames(&amqp.Detach{Handle: 3}), handle},
		{"a session that ends and goes on", begun, append(frames(&amqp.End{}), frames(sender(dev))...), denied},

		{"a handle in use", attached, frames(sender(dev)), inUse},
		{"transfer to the link of answers", attached, delivery(func(x *amqp.Transfer) { x.Handle = 0 }, one), denied},
		{"transfer to another handle", attached, delivery(func(x *amqp.Transfer) { x.Handle = 7 }, one), handle},
		{"transfer without an ID", attached, delivery(func(x *amqp.Transfer) { x.DeliveryID = nil }, one), field},
		{"transfer without a tag", attached, delivery(func(x *amqp.Transfer) { x.DeliveryTag = nil }, one), field},
		{"a tag of 33 octets", attached, delivery(func(x *amqp.Transfer) { x.DeliveryTag = make([]byte, 33) }, one), decode},
		{"a tag of 60,000 octets", attached, delivery(func(x *amqp.Transfer) { x.DeliveryTag = make([]byte, 60_000) }, one), decode},
		{"a delivery within another", attached, append(delivery(func(x *amqp.Transfer) { x.More = true }, one), delivery(func(x *amqp.Transfer) { x.DeliveryID = u32(1) }, one)...), field},
		{"sixty messages on credit for fifty", attached, func() (b []byte) {
			for i := range 60 { // credit comes back as they are worked off, so that none is too many
				b = append(b, delivery(func(x *amqp.Transfer) { x.DeliveryID, x.More = u32(uint32(i)), true }, nil)...)
				b = append(b, delivery(func(x *amqp.Transfer) { x.DeliveryID, x.Aborted = nil, true }, nil)...)
			}
			return b
		}(), stays},
		{"a message of 200 KiB", attached, again(4, delivery(func(x *amqp.Transfer) { x.More = true }, make([]byte, 50_000))), oversize},
		{"a message of 80 KiB on each of two links", attached, func() []byte {
			other := sender(dev)
			other.Name, other.Handle = "other", 2
			b := append(on(0, other), again(2, delivery(func(x *amqp.Transfer) { x.More = true }, make([]byte, 40_000)))...)
			return append(b, again(2, delivery(func(x *amqp.Transfer) { x.Handle, x.More = 2, true }, make([]byte, 40_000)))...)
		}(), oversize},
		{"a message without end", attached, again(3000, delivery(func(x *amqp.Transfer) { x.More = true }, nil)), stays},
		{"an empty message", attached, delivery(func(*amqp.Transfer) {}, nil), argument},
		{"a message of rubbish", attached, delivery(func(*amqp.Transfer) {}, []byte("{}")), argument},
		{"a message with its body first", attached, delivery(func(*amqp.Transfer) {}, append(amqp.Append(nil, &amqp.Described{Descriptor: uint64(0x75), Value: []byte("{}")}), one...)), argument},
		{"a message with two bodies", attached, delivery(func(*amqp.Transfer) {}, append(amqp.AppendMessage(nil, &amqp.Message{Data: []byte("{}")}), amqp.AppendMessage(nil, &amqp.Message{Value: "{}"})...)), argument},
		{"properties twice", attached, delivery(func(*amqp.Transfer) {}, again(2, amqp.Append(nil, &amqp.Properties{}))), argument},
		{"properties that are a map", attached, delivery(func(*amqp.Transfer) {}, []byte("\x00\x53\x73\xc1\x01\x00")), argument},
		{"a correlation ID that is a list", attached, delivery(func(*amqp.Transfer) {}, amqp.Append(nil, &amqp.Properties{CorrelationID: []any{"x"}})), argument},
		{"keys that are numbers", attached, delivery(func(*amqp.Transfer) {}, amqp.AppendMessage(nil, &amqp.Message{ApplicationProperties: amqp.Map{{Key: int32(1), Value: "x"}}})), argument},
		{"data that is text", attached, delivery(func(*amqp.Transfer) {}, amqp.Append(nil, &amqp.Described{Descriptor: uint64(0x75), Value: "{}"})), argument},
		{"a message of lists within lists", attached, delivery(func(*amqp.Transfer) {}, []byte("\x00\x53\x77"+lists(4000))), argument},
		{"an operation of another device", attached, delivery(func(*amqp.Transfer) {}, amqp.AppendMessage(nil, status("5.0000000000000000.00000000-0000-0000-0000-000000000000", ""))), "amqp:not-found"},
		{"a message cut short", attached, delivery(func(*amqp.Transfer) {}, one[:len(one)-1]), argument},
		{"credit of 4 G, and none", attached, append(frames(granting(1<<32-1)), frames(granting(0))...), stays},
		{"credit for what was never sent", attached, flow(func(f *amqp.Flow) { f.Handle, f.DeliveryCount, f.LinkCredit = u32(0), u32(1<<31), u32(5) }), stays},
		{"a window from the future", attached, flow(func(f *amqp.Flow) { f.NextIncomingID, f.IncomingWindow = u32(1<<31), 1<<32-1 }), stays},
		{"drain on our own link", attached, flow(func(f *amqp.Flow) { f.Handle, f.Drain, f.LinkCredit = u32(1), true, u32(9) }), stays},
		{"a disposition of everything", attached, frames(&amqp.Disposition{Role: amqp.Receiver, First: 0, Last: u32(1<<32 - 1), Settled: true}), stays},
		{"a disposition of a sender", attached, frames(&amqp.Disposition{Role: amqp.Sender, First: 9}), stays},
		{"an aborted delivery", attached, append(delivery(func(x *amqp.Transfer) { x.More = true }, one), delivery(func(x *amqp.Transfer) { x.Aborted = true }, nil)...), stays},
		{"half a frame", attached, delivery(func(*amqp.Transfer) {}, one)[:20], silent},
	}
	before := runtime.NumGoroutine()
	for _, x := range cases {
		var c *conn
		switch x.stage {
		case fresh, sasl, headers:
			var device registrationtest.Device
			if x.stage == headers {
				device = registrationtest.ByCertificate("own-cert", d.Own.TLS())
			}
			c = d.dial(t, device.Certificate)
			switch x.stage {
			case sasl:
				c.header(t, amqp.SASL, amqp.SASL)
				expect[*amqp.SASLMechanisms](t, c)
			case headers:
				c.header(t, amqp.AMQP, amqp.AMQP)
			}
		case attached:
			c = d.connect(t, dev)
		default:
			c = d.login(t, dev)
			if x.stage == begun {
				c.send(t, beginning)
				expect[*amqp.Begin](t, c)
			}
		}
		c.write(t, x.send)
		switch x.want {
		case stays:
			c.write(t, frames(&amqp.Close{}))
			if e := ending(t, c, x.name); e != nil {
				t.Errorf("%s: %+v", x.name, e)
			}
		case silent:
			c.end() // nothing more comes: half a connection is the end of it
			if b, err := io.ReadAll(c.r); err != nil || len(b) > 0 {
				t.Errorf("%s: % x, %v", x.name, b, err)
			}
		case "header":
			if x.stage == sasl {
				expect[*amqp.SASLOutcome](t, c)
			}
			want := amqp.SASL
			if x.stage == sasl {
				want = amqp.AMQP
			}
			if p, err := amqp.ReadHeader(c.r); err != nil || p != want {
				t.Errorf("%s: header %d, %v", x.name, p, err)
			}
			c.end()
			c.gone(t, x.name)
		case outcome:
			if o := expect[*amqp.SASLOutcome](t, c); o.Code != amqp.SASLAuth {
				t.Errorf("%s: outcome %d", x.name, o.Code)
			}
			c.end()
			c.gone(t, x.name)
		default:
			if x.stage == headers {
				expect[*amqp.Open](t, c)
			}
			if e := ending(t, c, x.name); e == nil || e.Condition != x.want || !strings.HasPrefix(e.Description, "{") {
				t.Errorf("%s: %+v, want %s", x.name, e, x.want)
			}
		}
		_ = c.c.Close()
	}
	if a := d.connect(t, dev).Register(t, ""); a.Status != 202 {
		t.Errorf("the next device: %d %s", a.Status, a.Body)
	}
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for range 1000 {
		if runtime.NumGoroutine() <= before+2 { // the next device's connection, and its timer
			break
		}
		<-tick.C
	}
	if n := runtime.NumGoroutine(); n > before+2 {
		t.Errorf("%d goroutines, %d before", n, before)
	}
	t.Logf("%d cases", len(cases))
}

// ending reads up to the frame that says what is wrong, and what it says.
func ending(t testing.TB, c *conn, name string) *amqp.Error {
	t.Helper()
	for {
		f, err := amqp.ReadFrame(c.r, 1<<20)
		if err != nil {
			if !errors.Is(err, io.EOF) {
				t.Errorf("%s: %v", name, err)
			}
			return nil
		}
		switch b := f.Body.(type) {
		case *amqp.Close:
			return b.Error
		case *amqp.End:
			if b.Error != nil {
				return b.Error
			}
		case *amqp.Detach:
			return b.Error
		case *amqp.Disposition:
			if r, ok := b.State.(*amqp.Rejected); ok {
				return r.Error
			}
		}
	}
}

// Answers that nobody takes are held, and not without end; and what fits no frame of the device's is not sent.
func TestHeld(t *testing.T) {
	d := newDoor(t, func(c *amqpd.Config, _ *door.Config) { c.Second = 20 * time.Millisecond })
	dev := d.Derived("dev-1")
	c := d.login(t, dev)
	c.begin(t, dev, 0)
	for range 9 {
		c.write(t, c.transfer(register(""), 1000))
	}
	if e := ending(t, c, "nine answers without credit"); e == nil || e.Condition != "amqp:resource-limit-exceeded" {
		t.Errorf("%+v", e)
	}
	c = d.login(t, dev)
	c.begin(t, dev, 0)
	c.write(t, c.transfer(register(""), 1000))
	expect[*amqp.Disposition](t, c)
	c.send(t, &amqp.Detach{Handle: 0}) // and its answers come on the link that takes its place
	expect[*amqp.Detach](t, c)
	c.send(t, receiver(dev), granting(1))
	expect[*amqp.Attach](t, c)
	c.answer(t)
	c = d.dial(t, d.Own.TLS())
	c.header(t, amqp.AMQP, amqp.AMQP)
	o, a := *opening, receiver(registrationtest.ByCertificate("own-cert", nil))
	o.MaxFrameSize, a.Name = 512, strings.Repeat("n", 1000)
	c.send(t, &o, beginning, a)
	if e := ending(t, c, "a name to be said back"); e == nil || e.Condition != "amqp:resource-limit-exceeded" {
		t.Errorf("%+v", e)
	}
}

// Who says nothing, or half of it, is hung up on at every step.
func TestHalfOpen(t *testing.T) {
	t.Parallel()
	d := newDoor(t, func(c *amqpd.Config, _ *door.Config) { c.Second = 10 * time.Millisecond })
	for name, send := range map[string][]byte{
		"silent": nil, "half a header": []byte("AMQP"), "no init": amqp.AppendHeader(nil, amqp.SASL), "half of init": append(amqp.AppendHeader(nil, amqp.SASL), frames(plainInit(d.Derived("dev-1")))[:30]...),
		"no AMQP behind SASL": append(amqp.AppendHeader(nil, amqp.SASL), frames(plainInit(d.Derived("dev-1")))...), "no open": amqp.AppendHeader(nil, amqp.AMQP),
		"TPM that never answers": append(amqp.AppendHeader(nil, amqp.SASL), frames(&amqp.SASLInit{Mechanism: "TPM", InitialResponse: []byte("\x00s\x00d\x00ek")})...),
	} {
		c := d.dial(t, nil)
		c.write(t, send)
		if _, err := io.ReadAll(c.c); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// hung never answers what devices ask but to be registered, as long as it may.
type hung struct{ registration.Registrar }

func (hung) Status(ctx context.Context, _ *registration.Request, _ string) (*dps.OperationStatus, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

func (hung) Challenge(ctx context.Context, _ *registration.Request) ([]byte, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

// A registrar that hangs holds nobody for ever, nor the door's end.
func TestHungRegistrar(t *testing.T) {
	f := registrationtest.NewFixture(t, "hub-a.example.net")
	d := open(t, f, func(c *amqpd.Config, _ *door.Config) { c.Registrar, c.Second = hung{f.Service}, 10*time.Millisecond })
	if a := d.connect(t, d.Derived("dev-1")).Status(t, "x", ""); a.Status != 500 {
		t.Errorf("%d %s", a.Status, a.Body)
	}
	c := d.dial(t, nil)
	c.header(t, amqp.SASL, amqp.SASL)
	expect[*amqp.SASLMechanisms](t, c)
	c.send(t, &amqp.SASLInit{Mechanism: "TPM", InitialResponse: []byte("\x00" + registrationtest.Scope + "\x00own-key\x00ek")})
	expect[*amqp.SASLChallenge](t, c)
	c.send(t, &amqp.SASLResponse{Response: []byte("\x00srk")})
	if o := expect[*amqp.SASLOutcome](t, c); o.Code != amqp.SASLTemporary {
		t.Errorf("outcome %d", o.Code)
	}
}
