package door_test

import (
	"encoding/binary"
	"hash/crc32"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/door"
)

const signature = "\r\n\r\n\x00\r\nQUIT\n"

// proxyHeader is the beginning of a header: version and command, family, a length, and what follows.
func proxyHeader(command, family byte, n int, body string) string {
	return signature + string([]byte{command, family}) + string(binary.BigEndian.AppendUint16(nil, uint16(n))) + body
}

func ipv4(extensions string) string {
	body := "\xcb\x00\x71\x05" + "\x7f\x00\x00\x01" + "\x12\x34" + "\x22\xb3" + extensions // 203.0.113.5:4660
	return proxyHeader(0x21, 0x11, len(body), body)
}

func ipv6(from string) string {
	a, b := netip.MustParseAddr(from).As16(), netip.MustParseAddr("::1").As16()
	body := string(a[:]) + string(b[:]) + "\x12\x34\x22\xb3"
	return proxyHeader(0x21, 0x21, len(body), body)
}

// checked is a header with its checksum, and the offset of that.
func checked() []byte {
	b := []byte(ipv4("\x04\x00\x02\x00\x00" + "\x03\x00\x04\x00\x00\x00\x00" + "\x02\x00\x03a.b"))
	at := strings.Index(string(b), "\x03\x00\x04\x00") + 3
	binary.BigEndian.PutUint32(b[at:], crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
	return b
}

// A trusted proxy tells whom it speaks for, in one form; everything else ends the connection before TLS begins.
func TestProxyHeader(t *testing.T) {
	trusted := []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("10.0.0.0/8")}
	r := open(t, door.Config{Proxies: trusted, HandshakeTimeout: 2 * time.Second}, nil)
	for name, x := range map[string]struct{ header, remote string }{
		"IPv4":                     {ipv4(""), "203.0.113.5:4660"},
		"IPv4, with extensions":    {ipv4("\x01\x00\x08http/1.1\x04\x00\x00"), "203.0.113.5:4660"},
		"with a checksum":          {string(checked()), "203.0.113.5:4660"},
		"IPv6":                     {ipv6("2001:db8::5"), "[2001:db8::5]:4660"},
		"IPv4 in IPv6":             {ipv6("::ffff:203.0.113.5"), "203.0.113.5:4660"},
		"for another proxy":        {ipv6("::ffff:10.1.2.3"), "10.1.2.3:4660"},
		"LOCAL":                    {proxyHeader(0x20, 0, 0, ""), ""},
		"LOCAL, with an address":   {proxyHeader(0x20, 0x11, 12, strings.Repeat("\x01", 12)), ""},
		"LOCAL, with who knows it": {proxyHeader(0x20, 0xff, 5, "abcde"), ""},
	} {
		c := r.raw(t, x.header)
		remote := say(t, r.over(c), "hello")
		if x.remote == "" {
			x.remote = c.LocalAddr().String()
		}
		if remote != x.remote {
			t.Errorf("%s: %s, want %s", name, remote, x.remote)
		}
	}
	wrong := checked()
	wrong[len(wrong)-1] ^= 1
	for name, header := range map[string]string{
		"none":                      "",
		"version 1":                 "PROXY TCP4 203.0.113.5 127.0.0.1 4660 8883\r\n",
		"another version":           proxyHeader(0x31, 0x11, 12, strings.Repeat("\x01", 12)),
		"an unknown command":        proxyHeader(0x22, 0x11, 12, strings.Repeat("\x01", 12)),
		"no family":                 proxyHeader(0x21, 0x00, 0, ""),
		"UDP":                       proxyHeader(0x21, 0x12, 12, strings.Repeat("\x01", 12)),
		"a Unix socket":             proxyHeader(0x21, 0x31, 216, strings.Repeat("\x01", 216)),
		"short for IPv4":            proxyHeader(0x21, 0x11, 11, strings.Repeat("\x01", 11)),
		"short for IPv6":            proxyHeader(0x21, 0x21, 35, strings.Repeat("\x01", 35)),
		"nobody":                    proxyHeader(0x21, 0x11, 12, strings.Repeat("\x00", 12)),
		"everybody":                 proxyHeader(0x21, 0x11, 12, "\xe0"+strings.Repeat("\x00", 11)),
		"an extension cut short":    ipv4("\x04\x00\x05abc"),
		"an extension's head":       ipv4("\x04\x00"),
		"a wrong checksum":          string(wrong),
		"a short checksum":          ipv4("\x03\x00\x03abc"),
		"two checksums":             ipv4(strings.Repeat("\x03\x00\x04abcd", 2)),
		"too long":                  proxyHeader(0x21, 0x11, 4097, strings.Repeat("\x00", 4097)),
		"twice":                     ipv4("") + ipv4(""),
		"the signature but for one": strings.Replace(ipv4(""), "QUIT", "QUIU", 1),
	} {
		if err := r.over(r.raw(t, header)).Handshake(); err == nil {
			t.Errorf("%s: let in", name)
		}
	}
}

// A header from anybody else is a bad handshake: nobody but a proxy says who they are.
func TestProxyHeaderFromOthers(t *testing.T) {
	r := open(t, door.Config{Proxies: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}}, nil)
	if err := r.over(r.raw(t, ipv4(""))).Handshake(); err == nil {
		t.Error("let in")
	}
	c := r.raw(t, "")
	if remote := say(t, r.over(c), "hello"); remote != c.LocalAddr().String() {
		t.Error(remote)
	}
}

// Where proxies speak HTTP they may leave the header out, and nothing of the handshake is lost for having been looked at.
func TestOptionalProxyHeader(t *testing.T) {
	r := open(t, door.Config{Proxies: []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}, HeaderOptional: true}, nil)
	c := r.raw(t, "")
	if remote := say(t, r.over(c), "hello"); remote != c.LocalAddr().String() {
		t.Error(remote)
	}
	if remote := say(t, r.over(r.raw(t, ipv4(""))), "hello"); remote != "203.0.113.5:4660" {
		t.Error(remote)
	}
	if err := r.over(r.raw(t, ipv4("\x04\x00"))).Handshake(); err == nil {
		t.Error("half a header was let in")
	}
}

// Who comes by a proxy is counted by their own address, and the proxy not at all.
func TestPerAddressBehindProxy(t *testing.T) {
	r := open(t, door.Config{MaxPerAddress: 1, Proxies: []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}}, nil)
	for _, from := range []string{"2001:db8:0:1::1", "2001:db8:0:2::1", "2001:db8:0:3::1"} {
		say(t, r.over(r.raw(t, ipv6(from))), "hello")
	}
	if err := r.over(r.raw(t, ipv6("2001:db8:0:2::2"))).Handshake(); err == nil {
		t.Error("a second connection of one /64")
	}
	for range 3 {
		say(t, r.over(r.raw(t, proxyHeader(0x20, 0, 0, ""))), "health check")
	}
}
