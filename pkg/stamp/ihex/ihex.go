// Package ihex writes and reads Intel HEX, the text form in which programmers take bytes at an address.
//
// [Build] makes the text of one run of bytes, [Parse] reads text into runs ([Segment]). The format is Intel's "Hexadecimal
// Object File Format Specification" (revision A, 1988) with 32-bit addresses: data, extended linear address and end of file
// records; segment and start addresses (types 02, 03 and 05) belong to programs and are refused.
//
// Functions are pure and may be called by many goroutines. A text holds at most 16 MiB of data in
// 65,536 segments.
package ihex

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
)

// Limits of a text: octets of data, octets of text for them in lines that are worth reading, and segments.
const (
	maxData     = 16 << 20
	maxText     = 4 * maxData
	maxSegments = 1 << 16
)

// Record types.
const (
	typeData   = 0x00
	typeEnd    = 0x01
	typeLinear = 0x04
)

// A Segment is a run of bytes without a gap.
type Segment struct {
	Address uint32
	Data    []byte
}

// Build makes the text of data at an address, with 16 or 32 octets in a line. Lines end in a newline and, after the first,
// begin at multiples of their width; hexadecimal digits are capitals. Data that reach beyond 32 bits of address are an error.
func Build(address uint32, data []byte, width int) ([]byte, error) {
	switch {
	case width != 16 && width != 32:
		return nil, fmt.Errorf("intel HEX lines of %d octets: want 16 or 32", width)
	case len(data) == 0 || len(data) > maxData:
		return nil, fmt.Errorf("intel HEX of %d octets: want 1 to %d", len(data), maxData)
	case uint64(address)+uint64(len(data)) > math.MaxUint32+1:
		return nil, fmt.Errorf("%d octets at 0x%08x reach beyond 32 bits of address", len(data), address)
	}
	out := make([]byte, 0, len(data)*2+(len(data)/width+2)*12)
	upper := -1
	for at := uint64(address); len(data) > 0; {
		if u := int(at >> 16); u != upper {
			// A line cannot cross 64 KiB, as width divides that.
			out = appendRecord(out, 0, typeLinear, []byte{byte(u >> 8), byte(u)})
			upper = u
		}
		n := min(width-int(at)%width, len(data))
		out = appendRecord(out, uint16(at), typeData, data[:n])
		at, data = at+uint64(n), data[n:]
	}
	return appendRecord(out, 0, typeEnd, nil), nil
}

func appendRecord(out []byte, offset uint16, kind byte, data []byte) []byte {
	record := append([]byte{byte(len(data)), byte(offset >> 8), byte(offset), kind}, data...)
	var sum byte
	for _, b := range record {
		sum += b
	}
	out = append(out, ':')
	out = append(out, bytes.ToUpper(hex.AppendEncode(nil, append(record, -sum)))...)
	return append(out, '\n')
}

// Parse reads a text strictly: capitals, lines that end in a newline (all with a carriage return before it, or none), right
// checksums, rising addresses without overlap, and one end record, which is the last line. Lines that follow each other
// without a gap make one segment.
func Parse(text []byte) ([]Segment, error) {
	if len(text) > maxText {
		return nil, fmt.Errorf("intel HEX text is larger than %d octets", maxText)
	}
	var segments []Segment
	var base, next uint64 // next is where the data so far end
	var linear bool       // a linear address was there
	first, _, _ := bytes.Cut(text, []byte("\n"))
	returns := bytes.HasSuffix(first, []byte("\r"))
	for n, total := 1, 0; ; n++ {
		line, rest, ended := bytes.Cut(text, []byte("\n"))
		line, cr := bytes.CutSuffix(line, []byte("\r"))
		if !ended || cr != returns {
			return nil, fmt.Errorf("line %d: want an end record, and line ends of one kind", n)
		}
		offset, kind, data, err := parseRecord(line)
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
		at := base + uint64(offset)
		switch {
		case kind == typeEnd && offset == 0 && len(data) == 0:
			if len(rest) > 0 {
				return nil, fmt.Errorf("line %d: text after the end record", n+1)
			}
			return segments, nil
		case kind == typeLinear && offset == 0 && len(data) == 2:
			base, linear = uint64(data[0])<<24|uint64(data[1])<<16, true
		case kind != typeData:
			return nil, fmt.Errorf("line %d: a record of type %02X and %d octets: want data, linear addresses and an end", n, kind, len(data))
		case len(data) == 0:
			return nil, fmt.Errorf("line %d: a data record without data", n)
		case int(offset)+len(data) > 1<<16 && (!linear || at+uint64(len(data)) > 1<<32):
			// With a linear address it goes on beyond 64 KiB; without one it might as well begin again at 0.
			return nil, fmt.Errorf("line %d: data across a boundary of 64 KiB", n)
		case at < next:
			return nil, fmt.Errorf("line %d: address 0x%08x comes after data up to 0x%08x", n, at, next)
		default:
			if total += len(data); total > maxData || at > next && len(segments) == maxSegments {
				return nil, fmt.Errorf("line %d: more than %d octets of data, or %d segments", n, maxData, maxSegments)
			}
			if len(segments) == 0 || at > next {
				segments = append(segments, Segment{Address: uint32(at)})
			}
			last := &segments[len(segments)-1]
			last.Data = append(last.Data, data...)
			next = at + uint64(len(data))
		}
		text = rest
	}
}

// parseRecord parses a line without its end.
func parseRecord(line []byte) (offset uint16, kind byte, data []byte, err error) {
	if len(line) < 11 || len(line) > 11+2*255 || len(line)%2 == 0 || line[0] != ':' {
		return 0, 0, nil, errors.New("want a colon and pairs of hexadecimal digits")
	}
	if bytes.ContainsAny(line, "abcdef") {
		return 0, 0, nil, errors.New("want capitals for hexadecimal digits")
	}
	record := make([]byte, len(line)/2)
	if _, err := hex.Decode(record, line[1:]); err != nil {
		return 0, 0, nil, err
	}
	var sum byte
	for _, b := range record {
		sum += b
	}
	if sum != 0 {
		return 0, 0, nil, errors.New("the checksum does not match")
	}
	if int(record[0]) != len(record)-5 {
		return 0, 0, nil, fmt.Errorf("the record says %d octets and has %d", record[0], len(record)-5)
	}
	return uint16(record[1])<<8 | uint16(record[2]), record[3], record[4 : len(record)-1], nil
}
