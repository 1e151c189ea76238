package door

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"
)

// However many addresses come and go, so many are remembered; and never is one forgotten that has a connection.
func TestCallersForget(t *testing.T) {
	c := callers{most: 1, perSecond: 1e-6, room: 100, by: make(map[netip.Prefix]*caller)}
	at := func(i int) netip.Prefix {
		return network(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}))
	}
	for i := range 50 {
		c.take(at(i))
	}
	for i := range 10_000 {
		if n := at(1000 + i); c.take(n) {
			c.give(n)
		}
		if len(c.by) > 100 {
			t.Fatalf("%d addresses are remembered", len(c.by))
		}
	}
	for i := range 50 {
		if x := c.by[at(i)]; x == nil || x.open != 1 {
			t.Errorf("address %d: %v", i, x)
		}
	}
}

// Whatever comes, a header is read whole or refused, and no further than it says; what is taken names somebody.
func FuzzProxyHeader(f *testing.F) {
	for _, s := range []string{
		proxySignature + "\x21\x11\x00\x0c\xcb\x00\x71\x05\x7f\x00\x00\x01\x12\x34\x22\xb3",
		proxySignature + "\x21\x11\x00\x0f\xcb\x00\x71\x05\x7f\x00\x00\x01\x12\x34\x22\xb3\x04\x00\x00",
		proxySignature + "\x21\x11\x00\x13\xcb\x00\x71\x05\x7f\x00\x00\x01\x12\x34\x22\xb3\x03\x00\x04abcd",
		proxySignature + "\x21\x21\x00\x24" + "\x20\x01\x0d\xb8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x05" + "\x20\x01\x0d\xb8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x06" + "\x12\x34\x22\xb3",
		proxySignature + "\x20\x00\x00\x00",
		proxySignature + "\x21\x11\xff\xff",
		"PROXY TCP4 203.0.113.5 127.0.0.1 4660 8883\r\n",
		"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\x00\x00\x00\x00\x00",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(bytes.Clone(b))
		from, head, err := readProxyHeader(r)
		took := len(b) - r.Len()
		switch {
		case head != nil:
			if err == nil || !bytes.Equal(head, b[:proxyHead]) || from.IsValid() {
				t.Fatalf("% x: %v, % x, %v", b, from, head, err)
			}
		case err != nil:
			if from.IsValid() {
				t.Fatalf("% x: %v with %v", b, from, err)
			}
		default:
			if took != proxyHead+int(binary.BigEndian.Uint16(b[14:])) || from.IsValid() == (b[12] == 0x20) || from.Addr().Is4In6() {
				t.Fatalf("% x: %v of %d octets", b, from, took)
			}
		}
	})
}

// An address is one network's, however it is written.
func FuzzAddress(f *testing.F) {
	for _, s := range []string{"192.0.2.1:1", "[2001:db8::1]:443", "2001:db8::1", "::ffff:192.0.2.1", "fe80::1%eth0", "", "@", "[::]:0"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		a := parseAddress(s)
		if a.Is4In6() || a.Zone() != "" {
			t.Fatalf("%q: %v", s, a)
		}
		if n := network(a); a.IsValid() && (!n.Contains(a) || n.Bits() != map[bool]int{true: 32, false: 64}[a.Is4()]) {
			t.Fatalf("%q: %v", s, n)
		}
	})
}
