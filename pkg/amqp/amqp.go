// Package amqp reads and writes AMQP 1.0 (OASIS AMQP 1.0, parts 1 to 5): types, frames, performatives, SASL and messages. It
// is a codec: no connection, no session, no link, and it serves both ends.
//
// [ReadHeader] and [ReadFrame] take a protocol header and a frame from a buffered reader; a [Frame] holds one of the
// performatives, such as [Open] or [Transfer]. [DecodeMessage] reads what a delivery carried. The Append functions write
// behind a slice. [Decode] and [Append] are for single values.
//
// Input is read strictly: one type per field, mandatory fields, sizes that agree to the octet. Nesting and the number of
// values are bounded, and memory grows with what has come, not with what was announced. Byte slices that come out of the
// decoder share memory with what went in.
//
// AMQP's types are Go's of the same width: ubyte is uint8, int is int32, null is nil. The others are declared here, and a
// list is []any. What a known descriptor stands before is a pointer to its struct; all else is a *Described.
package amqp

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// Errors of a reader.
var (
	// ErrMalformed says that the peer does not speak AMQP 1.0.
	ErrMalformed = errors.New("malformed AMQP")
	// ErrTooLarge says that a frame, or the number or depth of its values, is beyond what the reader takes.
	ErrTooLarge = errors.New("AMQP frame is too large")
)

func malformed(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrMalformed}, args...)...)
}

// A Protocol is the protocol ID of a header.
type Protocol byte

// The protocols that a header can open (part 2, §2.2; part 5, §5.3.1).
const (
	AMQP Protocol = 0
	SASL Protocol = 3
)

// ErrHeader says that what came instead of a protocol header is none that is known.
var ErrHeader = errors.New("unknown AMQP protocol header")

// ReadHeader reads the eight octets that open a protocol.
func ReadHeader(r io.Reader) (Protocol, error) {
	var b [8]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return 0, err
	}
	p := Protocol(b[4])
	if [8]byte(AppendHeader(nil, p)) != b || p != AMQP && p != SASL {
		return 0, fmt.Errorf("%w: % x", ErrHeader, b)
	}
	return p, nil
}

// AppendHeader appends a protocol header.
func AppendHeader(b []byte, p Protocol) []byte {
	return append(b, 'A', 'M', 'Q', 'P', byte(p), 1, 0, 0)
}

// MinMaxFrameSize is the least that a peer must take (part 2, §2.8.1), and the most that a SASL frame may have (part 5,
// §5.3.1).
const MinMaxFrameSize = 512

// A Frame is one frame.
type Frame struct {
	// SASL tells a frame of the security layer, which has no channel.
	SASL    bool
	Channel uint16
	// Body is nil in a frame that only says that somebody is there.
	Body Performative
	// Payload is the part of a message behind a [Transfer].
	Payload []byte
}

// ReadFrame reads one frame of at most limit octets. At the end of input between frames the error is io.EOF.
func ReadFrame(r *bufio.Reader, limit uint32) (Frame, error) {
	var head [8]byte
	if n, err := io.ReadFull(r, head[:]); err != nil {
		if n == 0 {
			return Frame{}, err
		}
		return Frame{}, unexpected(err)
	}
	size, doff := binary.BigEndian.Uint32(head[:]), int(head[4])*4
	if size > limit {
		return Frame{}, fmt.Errorf("%w: %d octets", ErrTooLarge, size)
	}
	if doff < 8 || doff > int(size) {
		return Frame{}, malformed("frame of %d octets whose data begin at %d", size, doff)
	}
	body := make([]byte, min(int(size)-8, 2048))
	for read := 0; ; {
		n, err := io.ReadFull(r, body[read:])
		if read += n; err != nil {
			return Frame{}, unexpected(err)
		}
		if read == int(size)-8 {
			break
		}
		body = append(body, make([]byte, min(int(size)-8-read, read))...)
	}
	body = body[doff-8:] // behind an extended header, which has no use
	f := Frame{Channel: binary.BigEndian.Uint16(head[6:])}
	switch head[5] {
	case 0:
		if len(body) == 0 {
			return f, nil
		}
	case 1:
		f.SASL, f.Channel = true, 0 // part 5, §5.3.1: the two octets are ignored
	default:
		return Frame{}, malformed("frame type %d", head[5])
	}
	v, rest, err := Decode(body)
	if err != nil {
		return Frame{}, err
	}
	p, ok := v.(Performative)
	if !ok || p.sasl() != f.SASL {
		return Frame{}, malformed("frame of %T", v)
	}
	if _, ok := p.(*Transfer); !ok && len(rest) > 0 {
		return Frame{}, malformed("%d octets behind %T", len(rest), p)
	}
	f.Body, f.Payload = p, rest
	return f, nil
}

func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// AppendFrame appends a frame with a performative, and behind a transfer its payload. A nil body makes the empty frame.
func AppendFrame(b []byte, channel uint16, body Performative, payload []byte) []byte {
	start := len(b)
	kind := byte(0)
	if body != nil && body.sasl() {
		kind = 1
	}
	b = append(b, 0, 0, 0, 0, 2, kind, byte(channel>>8), byte(channel))
	if body != nil {
		b = append(Append(b, body), payload...)
	}
	binary.BigEndian.PutUint32(b[start:], uint32(len(b)-start))
	return b
}
