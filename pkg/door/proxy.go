package door

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net/netip"
)

// The PROXY protocol, version 2 ("The PROXY protocol, versions 1 & 2", section 2.2).
const (
	proxySignature = "\r\n\r\n\x00\r\nQUIT\n"
	proxyHead      = 16
	maxProxyBody   = 4 << 10
	proxyCRC       = 0x03 // PP2_TYPE_CRC32C
)

var (
	errNoProxyHeader = errors.New("a trusted proxy sent no PROXY header")
	errProxyHeader   = errors.New("bad PROXY header")
)

// readProxyHeader reads a PROXY header and returns whom it speaks for: nobody (the zero AddrPort) where the proxy speaks for
// itself. Where there is no header, it returns what it read, with errNoProxyHeader.
func readProxyHeader(r io.Reader) (from netip.AddrPort, head []byte, err error) {
	b := make([]byte, proxyHead)
	if _, err := io.ReadFull(r, b); err != nil {
		return from, nil, err
	}
	if string(b[:12]) != proxySignature {
		return from, b, errNoProxyHeader
	}
	n := int(binary.BigEndian.Uint16(b[14:]))
	if n > maxProxyBody {
		return from, nil, fmt.Errorf("%w: %d octets", errProxyHeader, n)
	}
	b = append(b, make([]byte, n)...)
	if _, err := io.ReadFull(r, b[proxyHead:]); err != nil {
		return from, nil, err
	}
	from, err = parseProxyHeader(b)
	return from, nil, err
}

// parseProxyHeader reads a whole header, whose signature and length are right.
func parseProxyHeader(b []byte) (from netip.AddrPort, err error) {
	bad := func(what string) (netip.AddrPort, error) {
		return netip.AddrPort{}, fmt.Errorf("%w: %s", errProxyHeader, what)
	}
	body := b[proxyHead:]
	switch b[12] {
	case 0x20: // LOCAL: a health check; what else it says is to be ignored
		return from, nil
	case 0x21:
	default:
		return bad("neither PROXY nor LOCAL of version 2")
	}
	var size int // of one address
	switch b[13] {
	case 0x11: // TCP over IPv4
		size = 4
	case 0x21: // TCP over IPv6
		size = 16
	default:
		return bad("not TCP over IPv4 or IPv6")
	}
	if len(body) < 2*size+4 {
		return bad("addresses are cut short")
	}
	a, _ := netip.AddrFromSlice(body[:size])
	if a = a.Unmap(); a.IsUnspecified() || a.IsMulticast() {
		return bad("nobody's address")
	}
	from = netip.AddrPortFrom(a, binary.BigEndian.Uint16(body[2*size:]))
	var sum []byte
	for more := body[2*size+4:]; len(more) > 0; {
		if len(more) < 3 || len(more)-3 < int(binary.BigEndian.Uint16(more[1:])) {
			return bad("an extension is cut short")
		}
		value := more[3 : 3+int(binary.BigEndian.Uint16(more[1:]))]
		if more[0] == proxyCRC {
			if sum != nil || len(value) != 4 {
				return bad("checksums")
			}
			sum = value
		}
		more = more[3+len(value):]
	}
	if sum != nil {
		said := bytes.Clone(sum)
		clear(sum)
		if crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)) != binary.BigEndian.Uint32(said) {
			return bad("checksum")
		}
	}
	return from, nil
}
