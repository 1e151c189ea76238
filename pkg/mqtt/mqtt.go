// Package mqtt reads and writes MQTT 3.1.1 control packets (OASIS MQTT 3.1.1). It is a codec: no connection, no session,
// no broker.
//
// [Read] takes one packet from a buffered reader and checks it strictly; the Append functions write packets behind a slice.
// Names of clauses, such as [MQTT-3.1.2-1], are the standard's.
package mqtt

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode/utf8"
)

// A Type is a control packet type.
type Type byte

// The types, by their numbers on the wire (§2.2.1).
const (
	Connect     Type = 1
	Connack     Type = 2
	Publish     Type = 3
	Puback      Type = 4
	Subscribe   Type = 8
	Suback      Type = 9
	Unsubscribe Type = 10
	Unsuback    Type = 11
	Pingreq     Type = 12
	Pingresp    Type = 13
	Disconnect  Type = 14
)

// Errors of a reader.
var (
	// ErrMalformed says that the peer does not speak MQTT 3.1.1.
	ErrMalformed = errors.New("malformed MQTT packet")
	// ErrTooLarge says that a packet is larger than the reader takes.
	ErrTooLarge = errors.New("MQTT packet is too large")
)

// SubackFailure is the return code for a filter that was not granted.
const SubackFailure = 0x80

// A Packet is one control packet; which fields count depends on its type. Byte slices are the packet's own.
type Packet struct {
	Type Type

	// CONNECT. A protocol level other than 4 leaves the rest unread.
	ProtocolName  string
	ProtocolLevel byte
	CleanSession  bool
	KeepAlive     uint16 // seconds
	ClientID      string
	Username      string
	HasUsername   bool
	Password      []byte
	HasWill       bool
	WillTopic     string
	Will          []byte
	WillQoS       byte

	// CONNACK: the return code, and whether a session is present. SUBACK uses Codes.
	ReturnCode     byte
	SessionPresent bool

	// PUBLISH.
	Topic   string
	Payload []byte
	QoS     byte
	Retain  bool
	Dup     bool

	// ID is the packet identifier, where the type has one.
	ID uint16

	// SUBSCRIBE and UNSUBSCRIBE: filters, and for the former the requested QoS of each.
	Filters []string
	Codes   []byte
}

// Read reads one packet of at most limit octets behind its fixed header. At the end of input between packets the error is
// io.EOF.
func Read(r *bufio.Reader, limit int) (*Packet, error) {
	first, err := r.ReadByte()
	if err != nil {
		return nil, err
	}
	size, shift := 0, 0
	for {
		b, err := r.ReadByte()
		if err != nil {
			return nil, unexpected(err)
		}
		size |= int(b&0x7f) << shift
		if b&0x80 == 0 {
			if b == 0 && shift > 0 {
				return nil, fmt.Errorf("%w: remaining length is not in its shortest form", ErrMalformed)
			}
			break
		}
		if shift += 7; shift > 21 { // §2.2.3: four octets at most
			return nil, fmt.Errorf("%w: remaining length", ErrMalformed)
		}
	}
	if size > limit {
		return nil, fmt.Errorf("%w: %d octets", ErrTooLarge, size)
	}
	// Memory grows with what has come, not with what was announced.
	body := make([]byte, min(size, 4096))
	for read := 0; ; {
		n, err := io.ReadFull(r, body[read:])
		if read += n; err != nil {
			return nil, unexpected(err)
		}
		if read == size {
			return parse(first, body)
		}
		body = append(body, make([]byte, min(size-read, read))...)
	}
}

func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

func parse(first byte, body []byte) (*Packet, error) {
	p := &Packet{Type: Type(first >> 4)}
	flags := first & 0x0f
	want := byte(0)
	if p.Type == Subscribe || p.Type == Unsubscribe {
		want = 2
	}
	if p.Type != Publish && flags != want { // [MQTT-2.2.2-2]
		return nil, fmt.Errorf("%w: flags of packet type %d", ErrMalformed, p.Type)
	}
	b := &buffer{rest: body}
	switch p.Type {
	case Connect:
		p.connect(b)
	case Connack:
		ack := b.byte()
		p.SessionPresent, p.ReturnCode = ack == 1, b.byte()
		b.check(ack <= 1)
	case Publish:
		p.Dup, p.QoS, p.Retain = flags&8 != 0, flags>>1&3, flags&1 != 0
		p.Topic = b.text()
		b.check(p.QoS < 3 && !(p.Dup && p.QoS == 0))                  // [MQTT-3.3.1-4], [MQTT-3.3.1-2]
		b.check(p.Topic != "" && !strings.ContainsAny(p.Topic, "+#")) // [MQTT-3.3.2-2]
		if p.QoS > 0 {
			p.ID = b.uint16()
			b.check(p.ID != 0) // [MQTT-2.3.1-1]
		}
		p.Payload, b.rest = b.rest, nil
	case Puback, Unsuback:
		p.ID = b.uint16() // 0 is tolerated: some clients acknowledge everything
	case Suback:
		p.ID = b.uint16()
		p.Codes, b.rest = b.rest, nil
		b.check(len(p.Codes) > 0)
	case Subscribe, Unsubscribe:
		p.ID = b.uint16()
		b.check(p.ID != 0 && len(b.rest) > 0) // [MQTT-3.8.3-3], [MQTT-3.10.3-2]
		for !b.bad && len(b.rest) > 0 {
			filter := b.text()
			b.check(filter != "")
			p.Filters = append(p.Filters, filter)
			if p.Type == Subscribe {
				qos := b.byte()
				b.check(qos < 3) // [MQTT-3-8.3-4]
				p.Codes = append(p.Codes, qos)
			}
			b.check(len(p.Filters) <= maxFilters)
		}
	case Pingreq, Pingresp, Disconnect:
	default:
		return nil, fmt.Errorf("%w: packet type %d", ErrMalformed, p.Type)
	}
	if b.bad || len(b.rest) > 0 {
		return nil, fmt.Errorf("%w: body of packet type %d", ErrMalformed, p.Type)
	}
	return p, nil
}

// maxFilters bounds the filters of one packet.
const maxFilters = 64

func (p *Packet) connect(b *buffer) {
	p.ProtocolName, p.ProtocolLevel = b.text(), b.byte()
	if b.bad {
		return
	}
	if p.ProtocolName != "MQTT" || p.ProtocolLevel != 4 {
		b.rest = nil // another version: the caller answers and hangs up [MQTT-3.1.2-2]
		return
	}
	flags := b.byte()
	p.CleanSession = flags&2 != 0
	p.KeepAlive = b.uint16()
	p.ClientID = b.text()
	will, willQoS, willRetain := flags&4 != 0, flags>>3&3, flags&0x20 != 0
	b.check(flags&1 == 0 && (will || willQoS == 0 && !willRetain) && willQoS < 3) // [MQTT-3.1.2-3], -11, -13, -14, -15
	if p.HasWill = will; will {
		p.WillTopic, p.Will, p.WillQoS = b.text(), b.bytes(), willQoS
	}
	p.HasUsername = flags&0x80 != 0
	if p.HasUsername {
		p.Username = b.text()
	}
	if flags&0x40 != 0 {
		b.check(p.HasUsername) // [MQTT-3.1.2-22]
		p.Password = b.bytes()
	}
}

// buffer reads fields; after the first that is not there everything is bad.
type buffer struct {
	rest []byte
	bad  bool
}

func (b *buffer) check(ok bool) { b.bad = b.bad || !ok }

func (b *buffer) byte() byte {
	if len(b.rest) < 1 {
		b.bad, b.rest = true, nil
		return 0
	}
	v := b.rest[0]
	b.rest = b.rest[1:]
	return v
}

func (b *buffer) uint16() uint16 {
	if len(b.rest) < 2 {
		b.bad, b.rest = true, nil
		return 0
	}
	v := binary.BigEndian.Uint16(b.rest)
	b.rest = b.rest[2:]
	return v
}

func (b *buffer) bytes() []byte {
	n := int(b.uint16())
	if len(b.rest) < n {
		b.bad, b.rest = true, nil
		return nil
	}
	v := b.rest[:n]
	b.rest = b.rest[n:]
	return v
}

// text reads a UTF-8 string without U+0000 [MQTT-1.5.3-1], [MQTT-1.5.3-2].
func (b *buffer) text() string {
	v := b.bytes()
	b.check(utf8.Valid(v))
	s := string(v)
	b.check(!strings.Contains(s, "\x00"))
	return s
}

func appendText[T string | []byte](b []byte, s T) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(len(s)))
	return append(b, s...)
}

func appendHeader(b []byte, t Type, flags byte, size int) []byte {
	b = append(b, byte(t)<<4|flags)
	for {
		c := byte(size & 0x7f)
		if size >>= 7; size > 0 {
			b = append(b, c|0x80)
			continue
		}
		return append(b, c)
	}
}

// AppendConnect appends a CONNECT with a user name and, unless it is nil, a password.
func AppendConnect(b []byte, clientID, username string, password []byte, keepAlive uint16) []byte {
	size := 10 + 2 + len(clientID) + 2 + len(username)
	flags := byte(0x82) // user name, clean session
	if password != nil {
		size += 2 + len(password)
		flags |= 0x40
	}
	b = appendHeader(b, Connect, 0, size)
	b = append(appendText(b, "MQTT"), 4, flags)
	b = binary.BigEndian.AppendUint16(b, keepAlive)
	b = appendText(appendText(b, clientID), username)
	if password != nil {
		b = appendText(b, password)
	}
	return b
}

// AppendConnack appends a CONNACK without a session.
func AppendConnack(b []byte, code byte) []byte { return append(b, byte(Connack)<<4, 2, 0, code) }

// AppendPublish appends a PUBLISH; at QoS 0 the ID does not count.
func AppendPublish(b []byte, topic string, qos byte, id uint16, payload []byte) []byte {
	size := 2 + len(topic) + len(payload)
	if qos > 0 {
		size += 2
	}
	b = appendText(appendHeader(b, Publish, qos<<1, size), topic)
	if qos > 0 {
		b = binary.BigEndian.AppendUint16(b, id)
	}
	return append(b, payload...)
}

func appendAck(b []byte, t Type, id uint16) []byte {
	return binary.BigEndian.AppendUint16(append(b, byte(t)<<4, 2), id)
}

// AppendPuback appends a PUBACK.
func AppendPuback(b []byte, id uint16) []byte { return appendAck(b, Puback, id) }

// AppendUnsuback appends an UNSUBACK.
func AppendUnsuback(b []byte, id uint16) []byte { return appendAck(b, Unsuback, id) }

// AppendSuback appends a SUBACK with a return code for each filter.
func AppendSuback(b []byte, id uint16, codes []byte) []byte {
	b = binary.BigEndian.AppendUint16(appendHeader(b, Suback, 0, 2+len(codes)), id)
	return append(b, codes...)
}

// AppendSubscribe appends a SUBSCRIBE for one filter.
func AppendSubscribe(b []byte, id uint16, filter string, qos byte) []byte {
	b = binary.BigEndian.AppendUint16(appendHeader(b, Subscribe, 2, 5+len(filter)), id)
	return append(appendText(b, filter), qos)
}

// AppendPingresp appends a PINGRESP.
func AppendPingresp(b []byte) []byte { return append(b, byte(Pingresp)<<4, 0) }

// AppendDisconnect appends a DISCONNECT.
func AppendDisconnect(b []byte) []byte { return append(b, byte(Disconnect)<<4, 0) }
