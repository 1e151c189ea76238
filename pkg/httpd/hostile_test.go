package httpd_test

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/door"
	"github.com/touchmark/touchmark/pkg/httpd"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

// Whatever stands on the wire, the door answers with a status, or hangs up (0), and never takes it for a registration.
func TestHostileRequests(t *testing.T) {
	registrationtest.Goroutines(t)
	d := newDoor(t, func(c *httpd.Config, _ *door.Config) { c.HeaderTimeout, c.RequestTimeout = time.Second, time.Second })
	dev := d.Derived("dev-1")
	path := "/" + registrationtest.Scope + "/registrations/dev-1/register?api-version=2019-03-31"
	put := func(rest string) string {
		return "PUT " + path + " HTTP/1.1\r\nHost: h\r\nAuthorization: " + dev.Token + "\r\n" + rest
	}
	at := func(path, rest string) string {
		return "PUT " + path + " HTTP/1.1\r\nHost: h\r\nAuthorization: " + dev.Token + "\r\n" + rest + "Content-Length: 0\r\n\r\n"
	}
	scope := "/" + registrationtest.Scope
	register := "/registrations/dev-1/register?api-version=2019-03-31"
	for name, x := range map[string]struct {
		send string
		want []int
	}{
		"nothing at all":                     {"", nil},
		"half a line":                        {"PUT /", []int{400}},
		"half a header":                      {put("X: y"), []int{400}},
		"a body that breaks off":             {put("Content-Length: 100\r\n\r\n{"), []int{400}},
		"a body longer than announced":       {put("Content-Length: 2\r\n\r\n{}}}"), []int{202}},                                      // the rest is half a request
		"lines that end in LF":               {strings.ReplaceAll(put("Content-Length: 2\r\n\r\n"), "\r\n", "\n") + "{}", []int{202}}, // RFC 9112 §2.2 allows it
		"no Host":                            {"PUT " + path + " HTTP/1.1\r\n\r\n", []int{400}},
		"two Hosts":                          {put("Host: i\r\n\r\n"), []int{400}},
		"a Host of dirt":                     {"PUT " + path + " HTTP/1.1\r\nHost: a b\r\n\r\n", []int{400}},
		"two lengths":                        {put("Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}}"), []int{400}},
		"a negative length":                  {put("Content-Length: -2\r\n\r\n{}"), []int{400}},
		"a length with a sign":               {put("Content-Length: +2\r\n\r\n{}"), []int{400}},
		"a length in hexadecimal":            {put("Content-Length: 0x2\r\n\r\n{}"), []int{400}},
		"a length beyond 64 bits":            {put("Content-Length: 99999999999999999999\r\n\r\n{}"), []int{400}},
		"a terabyte":                         {put("Content-Length: 1099511627776\r\n\r\n{}"), []int{413}},
		"length and chunks":                  {put("Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"), []int{202}}, // chunks win, the connection ends (RFC 9112 §6.3)
		"an unknown transfer coding":         {put("Transfer-Encoding: gzip\r\n\r\n"), []int{501}},
		"a hidden transfer coding":           {put("Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n"), []int{400}},
		"chunked twice":                      {put("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"), []int{501}},
		"a chunk of negative size":           {put("Transfer-Encoding: chunked\r\n\r\n-1\r\n"), []int{400}},
		"a chunk beyond 64 bits":             {put("Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n"), []int{400}},
		"a chunk that lies":                  {put("Transfer-Encoding: chunked\r\n\r\n2\r\n{}x0\r\n\r\n"), []int{400}},
		"chunks of one octet":                {put("Transfer-Encoding: chunked\r\n\r\n" + strings.Repeat("1;"+strings.Repeat("x", 200)+"\r\n \r\n", 2000) + "0\r\n\r\n"), []int{400}},
		"a space before the colon":           {put("X : y\r\n\r\n"), []int{400}},
		"a header without a name":            {put(": y\r\n\r\n"), []int{400}},
		"a NUL in a header":                  {put("X: \x00\r\n\r\n"), []int{400}},
		"a folded header":                    {put("X: a\r\n b\r\nContent-Length: 2\r\n\r\n{}"), []int{202}}, // read as one line (RFC 9112 §5.2)
		"a thousand headers":                 {put(strings.Repeat("X: y\r\n", 5000) + "\r\n"), []int{431}},
		"one long header":                    {put("X: " + strings.Repeat("x", 64<<10) + "\r\n\r\n"), []int{431}},
		"HTTP/0.9":                           {"GET /\r\n", []int{400}},
		"HTTP/3.0":                           {"GET / HTTP/3.0\r\nHost: h\r\n\r\n", []int{505}},
		"HTTP/2":                             {"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", []int{404}},
		"a method of dirt":                   {"P(T " + path + " HTTP/1.1\r\nHost: h\r\n\r\n", []int{400}},
		"CONNECT":                            {"CONNECT other:443 HTTP/1.1\r\nHost: other:443\r\n\r\n", []int{404}},
		"OPTIONS *":                          {"OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n", []int{200}},
		"TRACE":                              {"TRACE " + path + " HTTP/1.1\r\nHost: h\r\n\r\n", []int{405}},
		"another host in the line":           {"PUT http://other" + path + " HTTP/1.1\r\nHost: h\r\n\r\n", []int{401}},
		"up and down the path":               {at(scope+"/x/../registrations/dev-1/register?api-version=2019-03-31", ""), []int{404}},
		"dots, escaped":                      {at(scope+"/%2e%2e/registrations/dev-1/register?api-version=2019-03-31", ""), []int{404}},
		"an escaped slash in the ID":         {at(scope+"/registrations/dev-1%2Fregister?api-version=2019-03-31", ""), []int{405}},
		"an escaped slash in the scope":      {at(scope+"%2Fregistrations/registrations/dev-1/register?api-version=2019-03-31", ""), []int{401}},
		"an escape that is none":             {at(scope+"/registrations/dev%2/register?api-version=2019-03-31", ""), []int{400}},
		"an escape twice":                    {at(scope+"/registrations/dev%252D1/register?api-version=2019-03-31", ""), []int{400}},
		"an overlong escape":                 {at(scope+"/registrations/dev%C0%AF1/register?api-version=2019-03-31", ""), []int{400}},
		"a NUL, escaped":                     {at(scope+"/registrations/dev-1%00/register?api-version=2019-03-31", ""), []int{400}},
		"a line break, escaped":              {at(scope+"/registrations/dev-1%0d%0aX:y/register?api-version=2019-03-31", ""), []int{400}},
		"a dot behind the ID":                {at(scope+"/registrations/dev-1./register?api-version=2019-03-31", ""), []int{400}},
		"a plus for a space":                 {at(scope+"/registrations/dev+1/register?api-version=2019-03-31", ""), []int{400}},
		"a Kelvin sign":                      {at(scope+"/registrations/%E2%84%AA-1/register?api-version=2019-03-31", ""), []int{400}},
		"letters, escaped: still the device": {at(scope+"/registrations/%64ev-1/register?api-version=2019-03-31", ""), []int{202}},
		"another scope":                      {at("/0ne00000000"+register, ""), []int{401}},
		"a scope of 4 kB":                    {at("/"+strings.Repeat("a", 4000)+register, ""), []int{400}},
		"another version first":              {at(scope+"/registrations/dev-1/register?api-version=x&api-version=2019-03-31", ""), []int{400}},
		"a version with a semicolon":         {at(scope+"/registrations/dev-1/register?x;api-version=2019-03-31", ""), []int{400}},
		"a compressed body":                  {put("Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\n\x1f\x8b\x08\x00"), []int{400}},
		"a body of JSON lines":               {put("Content-Length: 5\r\n\r\n{}\n{}"), []int{400}},
		"a body nested 20,000 deep":          {put("Content-Length: 40012\r\n\r\n{\"payload\":" + strings.Repeat("[", 20_000) + strings.Repeat("]", 20_000) + "}"), []int{400}},
		"a number beyond doubles":            {put("Content-Length: 17\r\n\r\n{\"payload\":1e999}"), []int{202}}, // a payload is passed on, not read
		"an unwanted expectation":            {put("Expect: miracles\r\nContent-Length: 0\r\n\r\n"), []int{417}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := d.Dial(t, nil)
			go func() {
				_, _ = io.WriteString(c, x.send) // the door may hang up in the middle
				_ = c.CloseWrite()
			}()
			r := bufio.NewReader(c)
			var got []int
			for {
				res, err := http.ReadResponse(r, nil)
				if err != nil {
					break
				}
				if _, err := io.Copy(io.Discard, res.Body); err != nil {
					t.Error(err)
				}
				got = append(got, res.StatusCode)
			}
			if fmt.Sprint(got) != fmt.Sprint(x.want) {
				t.Errorf("%v, want %v", got, x.want)
			}
		})
	}
	t.Cleanup(func() { d.fine(t) })
}

// No header and no token that is not exactly a proof of this device admits it.
func TestHostileProofs(t *testing.T) {
	registrationtest.Goroutines(t)
	d := newDoor(t)
	dev := d.Derived("dev-1")
	key := attest.DeriveKey(d.GroupKey, "dev-1")
	good := dev.Token
	part := func(name string) string {
		_, rest, _ := strings.Cut(good, name+"=")
		value, _, _ := strings.Cut(rest, "&")
		return value
	}
	with := func(name, value string) string { return strings.Replace(good, name+"="+part(name), name+"="+value, 1) }
	token := func(key []byte, scope, id string, in time.Duration) string {
		return attesttest.Token(key, scope, id, d.Now().Add(in))
	}
	t.Run("tokens", func(t *testing.T) {
		for name, header := range map[string]string{
			"none":                             "",
			"another scheme":                   strings.Replace(good, "SharedAccessSignature", "Bearer", 1),
			"Basic":                            "Basic ZGV2LTE6cGFzc3dvcmQ=",
			"no scheme":                        strings.TrimPrefix(good, "SharedAccessSignature "),
			"a scheme and a tab":               strings.Replace(good, " ", "\t", 1),
			"two tokens in one":                good + ", " + good,
			"the resource twice":               good + "&sr=" + part("sr"),
			"the signature twice":              good + "&sig=" + part("sig"),
			"no resource":                      strings.Replace(good, "sr=", "sx=", 1),
			"no signature":                     with("sig", ""),
			"a signature of zeros":             with("sig", strings.Repeat("A", 43)+"%3D"),
			"a short signature":                with("sig", "QUJD"),
			"a long signature":                 with("sig", strings.Repeat("A", 88)),
			"a signature that is not base64":   with("sig", strings.Repeat("*", 44)),
			"a signature escaped wrong":        with("sig", "%ZZ"+part("sig")),
			"a longer life":                    with("se", "9999999999"),
			"a negative expiry":                with("se", "-1"),
			"an expiry in hexadecimal":         with("se", "0x7fffffff"),
			"an expiry in scientific notation": with("se", "9e9"),
			"an expiry with a blank":           with("se", part("se")+" "),
			"an expiry of other digits":        with("se", "１７００００００００"),
			"an expiry beyond 64 bits":         with("se", strings.Repeat("9", 30)),
			"a resource with a slash behind":   token(key, registrationtest.Scope, "dev-1/", time.Hour),
			"a resource of the scope":          strings.Replace(token(key, registrationtest.Scope, "", time.Hour), "registrations%2F", "", 1),
			"another device's resource":        token(key, registrationtest.Scope, "dev-2", time.Hour),
			"another device's token":           d.Derived("dev-2").Token,
			"another scope's":                  token(key, "0ne00000000", "dev-1", time.Hour),
			"expired an hour ago":              token(key, registrationtest.Scope, "dev-1", -time.Hour),
			"expired at the epoch":             token(key, registrationtest.Scope, "dev-1", -time.Duration(d.Now().UnixNano())),
			"signed with nothing":              token(nil, registrationtest.Scope, "dev-1", time.Hour),
			"signed with the group's key":      token(d.GroupKey, registrationtest.Scope, "dev-1", time.Hour),
			"signed for another's derived key": token(attest.DeriveKey(d.GroupKey, "dev-2"), registrationtest.Scope, "dev-1", time.Hour),
			"4 kB of token":                    good + "&x=" + strings.Repeat("x", 4096),
		} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				x := dev
				x.Token = header
				if a := d.dial(t, x).Register(t, ""); a.Status != 401 || !bytes.Contains(a.Body, []byte(`"errorCode":401002`)) {
					t.Errorf("%d %s", a.Status, a.Body)
				}
			})
		}
	})
	// A token is one device's, whatever certificate stands beside it: the token decides.
	both := d.Derived("dev-2")
	both.ID, both.Certificate = "dev-1", attesttest.Leaf(t, d.Root, "dev-1").TLS()
	if a := d.dial(t, both).Register(t, ""); a.Status != 401 {
		t.Errorf("another's token beside an own certificate: %d %s", a.Status, a.Body)
	}
	// Of two Authorization headers the first counts.
	c := d.dial(t, dev)
	res, b := c.do(t, "PUT", c.path("/register"), "", "Authorization: "+d.Derived("dev-2").Token)
	if res.StatusCode != 202 {
		t.Errorf("a second header: %d %s", res.StatusCode, b)
	}
	// What was captured on one connection is worth something on another only as long as the token lives.
	dev.Token = token(key, registrationtest.Scope, "dev-1", time.Minute)
	for range 2 {
		if a := d.dial(t, dev).Register(t, ""); a.Status != 202 {
			t.Errorf("replayed at once: %d", a.Status)
		}
	}
	d.Advance(10 * time.Minute)
	if a := d.dial(t, dev).Register(t, ""); a.Status != 401 {
		t.Errorf("replayed after its time: %d", a.Status)
	}
	d.fine(t)
}

// TLS that is not what the service has ends in the handshake, or right behind it.
func TestHostileTLS(t *testing.T) {
	registrationtest.Goroutines(t)
	d := newDoor(t, func(_ *httpd.Config, c *door.Config) { c.HandshakeTimeout = time.Second })
	for name, send := range map[string]string{
		"plain HTTP":                  "GET / HTTP/1.1\r\nHost: h\r\n\r\n",
		"a record of 64 KiB":          "\x16\x03\x01\xff\xff" + strings.Repeat("x", 65535),
		"an empty record, for ever":   strings.Repeat("\x16\x03\x01\x00\x00", 10_000),
		"application data at once":    "\x17\x03\x03\x00\x05hello",
		"an alert":                    "\x15\x03\x03\x00\x02\x02\x28",
		"SSL 2":                       "\x80\x2e\x01\x00\x02\x00\x15\x00\x00\x00\x10",
		"a hello cut in the middle":   "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + strings.Repeat("\x00", 60),
		"a hello of another length":   "\x16\x03\x01\x00\x08\x01\xff\xff\xff\x03\x03\x00\x00",
		"heartbeats":                  "\x18\x03\x03\x00\x03\x01\x40\x00",
		"HTTP/2 with prior knowledge": "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c, err := net.Dial("tcp", d.Addr)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(30 * time.Second))
			go func() { _, _ = io.WriteString(c, send) }()
			b, _ := io.ReadAll(c) // an alert or nothing, and the end; net/http's own "HTTP request to an HTTPS server" is not asked for
			if len(b) > 7 || len(b) > 0 && b[0] != 21 {
				t.Errorf("%q", b)
			}
		})
	}
	// A client may not begin anew: renegotiation is refused (device API, section 14).
	cfg := d.TLS(nil)
	cfg.MaxVersion, cfg.Renegotiation = tls.VersionTLS12, tls.RenegotiateFreelyAsClient
	c, err := tls.Dial("tcp", d.Addr, cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if v := c.ConnectionState().Version; v != tls.VersionTLS12 {
		t.Errorf("version %s", strconv.FormatUint(uint64(v), 16))
	}
	t.Cleanup(func() { d.fine(t) })
}

// fine checks that the next device is served.
func (d *service) fine(t *testing.T) {
	t.Helper()
	if a := d.dial(t, d.ByKey("dev-1", attest.DeriveKey(d.GroupKey, "dev-1"))).Register(t, ""); a.Status != 202 {
		t.Errorf("the next device: %d %s", a.Status, a.Body)
	}
}
