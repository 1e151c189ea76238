package httpd_test

import (
	"crypto/tls"
	"encoding/base64"
	"encoding/pem"
	"io"
	"net"
	"net/netip"
	"net/url"
	"strings"
	"testing"

	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/door"
	"github.com/touchmark/touchmark/pkg/httpd"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

// behind is a door that trusts this machine as a proxy that ends TLS.
func behind(form httpd.ForwardedCertificate) func(*httpd.Config, *door.Config) {
	return func(c *httpd.Config, d *door.Config) {
		sockets(c, d)
		c.Forwarded = form
		d.TLSProxies, d.Proxies, d.HeaderOptional = []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}, []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}, true
	}
}

func rfc9440(chain ...*attesttest.Holder) []string {
	item := func(h *attesttest.Holder) string { return ":" + h.Base64() + ":" }
	header := []string{"Client-Cert: " + item(chain[0])}
	var rest []string
	for _, h := range chain[1:] {
		rest = append(rest, item(h))
	}
	if rest != nil {
		header = append(header, "Client-Cert-Chain: "+strings.Join(rest, ", "))
	}
	return header
}

func escaped(chain ...*attesttest.Holder) string {
	var b strings.Builder
	for _, h := range chain {
		_ = pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: h.Certificate.Raw})
	}
	return `"` + strings.ReplaceAll(url.PathEscape(b.String()), "+", "%2B") + `"`
}

func envoy(leaf *attesttest.Holder, chain ...*attesttest.Holder) []string {
	value := "By=spiffe://lab/proxy;Hash=468ed33be74eee6556d90c0149c1309e9ba61d6425303443c0748a02dd8de688;Cert=" + escaped(leaf) +
		`;Subject="CN=a \"device\", O=x";URI=`
	if chain != nil {
		value += ";Chain=" + escaped(chain...)
	}
	return []string{"X-Forwarded-Client-Cert: " + value}
}

// A certificate that a trusted proxy forwards is the device's, in the form that was chosen, for requests and WebSockets.
func TestForwardedCertificate(t *testing.T) {
	for form, header := range map[httpd.ForwardedCertificate]func(...*attesttest.Holder) []string{
		httpd.ClientCert: rfc9440,
		httpd.EnvoyCert:  func(c ...*attesttest.Holder) []string { return envoy(c[0], c...) },
	} {
		t.Run(string(form), func(t *testing.T) {
			d := newDoor(t, behind(form))
			dev := attesttest.Leaf(t, d.Mid, "dev-2")
			proxy := attesttest.Leaf(t, d.Root, "dev-9") // the proxy has a certificate itself, a device's even
			register := func(id string, c *attesttest.Holder, header ...string) int {
				device := registrationtest.ByCertificate(id, nil)
				if c != nil {
					device.Certificate = c.TLS()
				}
				conn := d.dial(t, device)
				res, _ := conn.do(t, "PUT", conn.path("/register"), "", header...)
				return res.StatusCode
			}
			for what, x := range map[string]struct {
				id     string
				own    *attesttest.Holder
				header []string
				want   int
			}{
				"a whole chain":              {"dev-2", nil, header(dev, d.Mid, d.Root), 202},
				"beside the proxy's":         {"dev-2", proxy, header(dev, d.Mid), 202},
				"without its intermediate":   {"dev-2", nil, header(dev), 401},
				"another device's":           {"dev-3", nil, header(dev, d.Mid), 401},
				"the proxy's is no device's": {"dev-9", proxy, nil, 401},
				"self-signed":                {"own-cert", nil, header(d.Own), 202},
			} {
				if got := register(x.id, x.own, x.header...); got != x.want {
					t.Errorf("%s: %d, want %d", what, got, x.want)
				}
			}
			ws, c, err := d.upgrade(t, proxy.TLS(), []string{"mqtt"}, header(dev, d.Mid)...)
			if err != nil {
				t.Fatal(err)
			}
			if said := message(t, ws); said != "dev-2 2 "+c.LocalAddr().String() {
				t.Errorf("in a WebSocket: %s", said)
			}
			// One connection of a proxy carries many devices, and none has another's certificate.
			conn := d.dial(t, registrationtest.ByCertificate("dev-2", proxy.TLS()))
			for i := range 4 {
				var h []string
				want := 401
				if i%2 == 0 {
					h, want = header(dev, d.Mid), 202
				}
				if res, b := conn.do(t, "PUT", conn.path("/register"), "", h...); res.StatusCode != want {
					t.Errorf("request %d: %d %s", i, res.StatusCode, b)
				}
			}
		})
	}
}

// Nobody else's word counts: not that of an address that is not trusted, not without the option, not in the other form, and
// not by a proxy that passes on what is not TLS's.
func TestForwardedByOthers(t *testing.T) {
	untrusted := func(c *httpd.Config, d *door.Config) {
		behind(httpd.ClientCert)(c, d)
		d.TLSProxies = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}
	}
	// One that passes TLS on is a device's means to write any header.
	passing := func(c *httpd.Config, d *door.Config) {
		untrusted(c, d)
		d.Proxies = append(d.Proxies, netip.MustParsePrefix("127.0.0.1/32"))
	}
	for name, edit := range map[string]func(*httpd.Config, *door.Config){
		"from an address that is not trusted": untrusted, "from one that passes TLS on": passing, "without the option": behind(""), "in the other form": behind(httpd.EnvoyCert),
	} {
		d := newDoor(t, edit)
		header := append(rfc9440(d.Own), "X-Forwarded-For: 203.0.113.5")
		c := d.dial(t, registrationtest.ByCertificate("own-cert", nil))
		if res, b := c.do(t, "PUT", c.path("/register"), "", header...); res.StatusCode != 401 {
			t.Errorf("%s: %d %s", name, res.StatusCode, b)
		}
		ws, wc, err := d.upgrade(t, nil, []string{"mqtt"}, header...)
		if err != nil {
			t.Fatal(err)
		}
		from := "203.0.113.5:0"
		if strings.Contains(name, "not trusted") {
			from = wc.LocalAddr().String()
		}
		if said := message(t, ws); said != "nobody 0 "+from {
			t.Errorf("%s, in a WebSocket: %s", name, said)
		}
		// A certificate of TLS counts where none is forwarded.
		if name != "in the other form" {
			c := d.dial(t, registrationtest.ByCertificate("own-cert", d.Own.TLS()))
			if res, b := c.do(t, "PUT", c.path("/register"), ""); res.StatusCode != 202 {
				t.Errorf("%s, by TLS: %d %s", name, res.StatusCode, b)
			}
		}
	}
	// A proxy below TLS names the caller; what the caller writes above it is the caller's.
	d := newDoor(t, behind(httpd.ClientCert))
	told := func(d *service, from string) net.Conn {
		raw, err := net.Dial("tcp", d.Addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = raw.Close() })
		_, _ = io.WriteString(raw, "\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c"+from+"\x7f\x00\x00\x01\x12\x34\x22\xb3")
		return raw
	}
	raw := told(d, "\xcb\x00\x71\x05")
	c := &conn{service: d, device: registrationtest.ByCertificate("own-cert", nil)}
	c.over(raw, nil)
	if res, b := c.do(t, "PUT", c.path("/register"), "", append(rfc9440(d.Own), "X-Forwarded-For: 198.51.100.9")...); res.StatusCode != 401 {
		t.Errorf("above a PROXY header: %d %s", res.StatusCode, b)
	}
	// Where that proxy tells nobody, its caller may write the header: it cannot be one that ends TLS.
	d = newDoor(t, passing)
	if err := tls.Client(told(d, "\xcb\x00\x71\x05"), d.TLS(nil)).Handshake(); err != nil {
		t.Errorf("a PROXY header: %v", err)
	}
	forged := tls.Client(told(d, "\xc0\x00\x02\x01"), d.TLS(nil))
	if err := forged.Handshake(); err == nil {
		t.Error("a PROXY header spoke for a proxy that ends TLS")
	}
}

// What cannot be read is refused, and never taken for no certificate.
func TestForwardedRubbish(t *testing.T) {
	d := newDoor(t, behind(httpd.ClientCert))
	good := rfc9440(d.Own)[0]
	for name, header := range map[string][]string{
		"no byte sequence":    {"Client-Cert: " + d.Own.Base64()},
		"half a one":          {"Client-Cert: :" + d.Own.Base64()},
		"with parameters":     {good + ";a=1"},
		"empty":               {"Client-Cert: "},
		"nothing inside":      {"Client-Cert: ::"},
		"not base64":          {"Client-Cert: :!!!!:"},
		"not a certificate":   {"Client-Cert: :AAAA:"},
		"two":                 {good, good},
		"two in one":          {good + ", " + strings.TrimPrefix(good, "Client-Cert: ")},
		"octets behind it":    {"Client-Cert: :" + base64.StdEncoding.EncodeToString(append(append([]byte{}, d.Own.Certificate.Raw...), 0)) + ":"},
		"a chain alone":       {"Client-Cert-Chain: :" + d.Own.Base64() + ":"},
		"a chain of rubbish":  {good, "Client-Cert-Chain: rubbish"},
		"an empty chain":      {good, "Client-Cert-Chain: "},
		"a hole in the chain": {good, "Client-Cert-Chain: :" + d.Root.Base64() + ":,,:" + d.Root.Base64() + ":"},
		"nine certificates":   {good, "Client-Cert-Chain: " + strings.TrimSuffix(strings.Repeat(":"+d.Root.Base64()+":,", 8), ",")},
	} {
		c := d.dial(t, registrationtest.ByCertificate("own-cert", d.Own.TLS()))
		if res, b := c.do(t, "PUT", c.path("/register"), "", header...); res.StatusCode != 400 {
			t.Errorf("%s: %d %s", name, res.StatusCode, b)
		}
	}
	d = newDoor(t, behind(httpd.EnvoyCert))
	one := strings.TrimPrefix(envoy(d.Own)[0], "X-Forwarded-Client-Cert: ")
	for name, value := range map[string]string{
		"two elements":           one + "," + one,
		"one and nothing":        one + ",",
		"no certificate":         "Hash=00;Subject=\"CN=own-cert\"",
		"empty":                  "",
		"an open quote":          `Cert="-----BEGIN`,
		"an open escape":         `Cert="a\`,
		"no value":               "Cert",
		"no name":                "=a",
		"a pair and nothing":     one + ";",
		"Cert twice":             "Cert=" + escaped(d.Own) + ";Cert=" + escaped(d.Own),
		"two in Cert":            "Cert=" + escaped(d.Own, d.Root),
		"Cert not the first":     "Cert=" + escaped(d.Own) + ";Chain=" + escaped(d.Root, d.Own),
		"a bad escape":           `Cert="%zz"`,
		"PEM of something else":  `Cert="` + url.PathEscape(string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: []byte("x")}))) + `"`,
		"words before it":        `Cert="hello%20` + strings.TrimPrefix(escaped(d.Own), `"`),
		"words behind it":        `Cert=` + strings.TrimSuffix(escaped(d.Own), `"`) + `hello"`,
		"something behind quote": `Cert="a"b`,
		"nine in Chain":          "Chain=" + escaped(d.Own, d.Root, d.Root, d.Root, d.Root, d.Root, d.Root, d.Root, d.Root),
	} {
		c := d.dial(t, registrationtest.ByCertificate("own-cert", d.Own.TLS()))
		if res, b := c.do(t, "PUT", c.path("/register"), "", "X-Forwarded-Client-Cert: "+value); res.StatusCode != 400 && res.StatusCode != 431 {
			t.Errorf("%s: %d %s", name, res.StatusCode, b)
		}
	}
	for name, value := range map[string]string{
		"Chain alone": "Chain=" + escaped(d.Own), "in other case": "cert=" + escaped(d.Own), "without quotes": "Hash=1;Cert=" + strings.Trim(escaped(d.Own), `"`),
	} {
		c := d.dial(t, registrationtest.ByCertificate("own-cert", nil))
		if res, b := c.do(t, "PUT", c.path("/register"), "", "X-Forwarded-Client-Cert: "+value); res.StatusCode != 202 {
			t.Errorf("%s: %d %s", name, res.StatusCode, b)
		}
	}
}

// The address is the rightmost that no trusted proxy has.
func TestForwardedFor(t *testing.T) {
	d := newDoor(t, behind(""))
	for name, x := range map[string]struct {
		header []string
		want   string
	}{
		"one":                     {[]string{"X-Forwarded-For: 203.0.113.5"}, "203.0.113.5:0"},
		"made up before it":       {[]string{"X-Forwarded-For: 198.51.100.1, 203.0.113.5"}, "203.0.113.5:0"},
		"through two proxies":     {[]string{"X-Forwarded-For: 198.51.100.1, 203.0.113.5, 10.1.2.3"}, "203.0.113.5:0"},
		"in two lines":            {[]string{"X-Forwarded-For: 203.0.113.5", "X-Forwarded-For: 10.1.2.3 ,127.0.0.1"}, "203.0.113.5:0"},
		"IPv6":                    {[]string{"X-Forwarded-For: 2001:db8::5"}, "[2001:db8::5]:0"},
		"IPv4 in IPv6":            {[]string{"X-Forwarded-For: ::ffff:203.0.113.5"}, "203.0.113.5:0"},
		"with a port":             {[]string{"X-Forwarded-For: 203.0.113.5:4660, 10.0.0.1:1"}, "203.0.113.5:0"},
		"IPv6 with a port":        {[]string{"X-Forwarded-For: [2001:db8::5]:4660"}, "[2001:db8::5]:0"},
		"proxies only":            {[]string{"X-Forwarded-For: 10.9.9.9, 10.1.2.3"}, "10.9.9.9:0"},
		"unknown behind a proxy":  {[]string{"X-Forwarded-For: 198.51.100.1, unknown, 10.1.2.3"}, "10.1.2.3:0"},
		"rubbish":                 {[]string{"X-Forwarded-For: rubbish"}, ""},
		"empty":                   {[]string{"X-Forwarded-For: "}, ""},
		"a comma":                 {[]string{"X-Forwarded-For: 203.0.113.5,"}, ""},
		"none":                    {nil, ""},
		"hops without end":        {[]string{"X-Forwarded-For: 203.0.113.5" + strings.Repeat(",10.1.1.1", 40)}, "10.1.1.1:0"},
		"another header for that": {[]string{"Forwarded: for=203.0.113.5", "X-Real-Ip: 203.0.113.5"}, ""},
	} {
		ws, c, err := d.upgrade(t, nil, []string{"mqtt"}, x.header...)
		if err != nil {
			t.Fatal(err)
		}
		if x.want == "" {
			x.want = c.LocalAddr().String()
		}
		if said := message(t, ws); said != "nobody 0 "+x.want {
			t.Errorf("%s: %s, want %s", name, said, x.want)
		}
	}
}

// Devices behind a proxy are counted by their own address, while they are there.
func TestForwardedCounts(t *testing.T) {
	d := newDoor(t, behind(""), func(_ *httpd.Config, d *door.Config) { d.MaxPerAddress = 1 })
	first, _, err := d.upgrade(t, nil, []string{"mqtt"}, "X-Forwarded-For: 2001:db8::1")
	if err != nil {
		t.Fatal(err)
	}
	message(t, first)
	if _, _, err := d.upgrade(t, nil, []string{"mqtt"}, "X-Forwarded-For: 2001:db8::2"); err == nil || !strings.Contains(err.Error(), "429") {
		t.Errorf("a second of one /64: %v", err)
	}
	c := d.dial(t, d.Derived("dev-1"))
	if res, b := c.do(t, "PUT", c.path("/register"), "", "X-Forwarded-For: 2001:db8::3"); res.StatusCode != 429 || res.Header.Get("Retry-After") == "" {
		t.Errorf("a request from there: %d %s", res.StatusCode, b)
	}
	for range 3 { // a request is over when it is answered
		if res, b := c.do(t, "PUT", c.path("/register"), "", "X-Forwarded-For: 2001:db8:0:1::1"); res.StatusCode != 202 {
			t.Errorf("a request from elsewhere: %d %s", res.StatusCode, b)
		}
	}
	if err := first.CloseNow(); err != nil {
		t.Fatal(err)
	}
	for {
		if _, _, err := d.upgrade(t, nil, []string{"mqtt"}, "X-Forwarded-For: 2001:db8::2"); err == nil {
			return
		}
	}
}
