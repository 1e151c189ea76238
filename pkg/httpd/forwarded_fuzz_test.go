package httpd

import (
	"net/netip"
	"os"
	"strings"
	"testing"
)

// What is taken for an address was written there, and nothing left of it was believed unless all behind it are proxies'.
func FuzzForwardedFor(f *testing.F) {
	for _, s := range []string{"203.0.113.5", "198.51.100.1, 203.0.113.5, 10.1.2.3", "203.0.113.5\n10.1.2.3 ,127.0.0.1", "[2001:db8::5]:4660", "::ffff:10.0.0.1", "unknown, 10.1.2.3", ",,", "fe80::1%eth0", strings.Repeat("10.1.1.1,", 40)} {
		f.Add(s)
	}
	proxies := netip.MustParsePrefix("10.0.0.0/8")
	trusted := func(s string) bool {
		a, err := netip.ParseAddr(s)
		return err == nil && proxies.Contains(a)
	}
	f.Fuzz(func(t *testing.T, s string) {
		lines := strings.Split(s, "\n")
		from := forwardedFor(lines, trusted)
		if !from.IsValid() {
			return
		}
		if from.Is4In6() || from.Zone() != "" {
			t.Fatalf("%q: %v", s, from)
		}
		// Whatever its sender writes before it changes nothing.
		if !proxies.Contains(from) {
			if again := forwardedFor(append([]string{"198.51.100.1, rubbish"}, lines...), trusted); again != from {
				t.Fatalf("%q: %v, and %v with more before it", s, from, again)
			}
		}
	})
}

// A certificate that is read is one that stands there, in one of the two forms; the rest is refused, without a panic.
func FuzzForwardedCertificate(f *testing.F) {
	for _, name := range []string{"client-cert", "client-cert-chain", "envoy"} {
		b, err := os.ReadFile("testdata/" + name + ".txt")
		if err != nil {
			f.Fatal(err)
		}
		f.Add(strings.TrimSpace(string(b)), ":AAAA:")
	}
	f.Add(`By=a;Hash=b;Cert="c\"";Subject="d,e;f=g"`, ":AA==:, :AA==:")
	f.Add(`Cert="%2D",Cert=x`, "")
	f.Fuzz(func(t *testing.T, a, b string) {
		for _, lines := range [][]string{nil, {a}, {a, b}} {
			for _, chain := range [][]string{nil, {b}, {b, a}} {
				if all, err := clientCert(lines, chain); err != nil && all != nil || len(all) > maxForwardedChain || err == nil && len(all) == 0 && len(lines)+len(chain) > 0 {
					t.Fatalf("%q, %q: %d certificates, %v", lines, chain, len(all), err)
				}
			}
			if all, err := envoyCert(lines); err != nil && all != nil || len(all) > maxForwardedChain || err == nil && len(all) == 0 && lines != nil {
				t.Fatalf("%q: %d certificates, %v", lines, len(all), err)
			}
		}
	})
}
