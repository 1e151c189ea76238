package hub

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/touchmark/touchmark/pkg/registration"
)

// errAddress says that an address may not be called.
var errAddress = errors.New("address is not allowed")

// addresses says which addresses may be called. They are judged when they are dialled: a name may mean another one by then.
type addresses struct{ loopbackOnly, publicOnly bool }

func (a addresses) control(_, address string, _ syscall.RawConn) error {
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return err
	}
	ip := ap.Addr().Unmap().WithZone("")
	if a.loopbackOnly && !ip.IsLoopback() {
		return fmt.Errorf("%w: %v is no loopback address, and this is without TLS", errAddress, ip)
	}
	if a.publicOnly && !isPublic(ip) {
		return fmt.Errorf("%w: %v is not public", errAddress, ip)
	}
	return nil
}

// notPublic are the networks that net/netip has no word for: this network, shared addresses (RFC 6598), protocol assignments, and
// documentation, measurement, and reserved ones; and those in IPv6 that stand for IPv4 (RFC 6052, 8215, 3056, 4380).
var notPublic = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"), netip.MustParsePrefix("100.64.0.0/10"), netip.MustParsePrefix("192.0.0.0/24"),
	netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("198.18.0.0/15"), netip.MustParsePrefix("198.51.100.0/24"),
	netip.MustParsePrefix("203.0.113.0/24"), netip.MustParsePrefix("240.0.0.0/4"),
	netip.MustParsePrefix("64:ff9b::/96"), netip.MustParsePrefix("64:ff9b:1::/48"), netip.MustParsePrefix("2002::/16"),
	netip.MustParsePrefix("2001::/32"), netip.MustParsePrefix("::/96"),
}

func isPublic(ip netip.Addr) bool {
	return ip.IsGlobalUnicast() && !ip.IsPrivate() && !slices.ContainsFunc(notPublic, func(p netip.Prefix) bool { return p.Contains(ip) })
}

// newClient returns a client that follows no redirects, reads no compressed bodies, and keeps few connections.
func newClient(allowed addresses, connect time.Duration, connections int, roots *x509.CertPool) *http.Client {
	proxy := http.ProxyFromEnvironment
	if allowed != (addresses{}) {
		proxy = nil // it would call addresses that we do not see
	}
	return &http.Client{
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: &http.Transport{
			Proxy:                  proxy,
			DialContext:            (&net.Dialer{Timeout: connect, Control: allowed.control}).DialContext,
			TLSClientConfig:        &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
			TLSHandshakeTimeout:    connect,
			MaxConnsPerHost:        connections,
			MaxIdleConns:           4 * connections,
			MaxIdleConnsPerHost:    connections,
			IdleConnTimeout:        time.Minute,
			MaxResponseHeaderBytes: 32 << 10,
			DisableCompression:     true,
		},
	}
}

// An answer is what came back, whatever its status.
type answer struct {
	status int
	header http.Header
	body   []byte
}

var errTooLarge = errors.New("answer is too large")

// exchange sends a request and reads the whole answer, of at most limit octets. Its errors do not show the URL, which may hold a
// secret; of one that has a status the head of the answer did come.
func exchange(client *http.Client, r *http.Request, limit int) (answer, error) {
	res, err := client.Do(r)
	if err != nil {
		if u, ok := errors.AsType[*url.Error](err); ok {
			err = u.Err
		}
		return answer{}, err
	}
	defer res.Body.Close()
	a := answer{status: res.StatusCode, header: res.Header}
	a.body, err = io.ReadAll(io.LimitReader(res.Body, int64(limit)+1))
	if err != nil {
		return a, fmt.Errorf("reading the answer: %w", err)
	}
	if len(a.body) > limit {
		return a, fmt.Errorf("%w: more than %d octets", errTooLarge, limit)
	}
	return a, nil
}

// rest calls a hub over HTTPS.
type rest struct {
	name    string // the hub's
	client  *http.Client
	timeout time.Duration
	now     func() time.Time
	limit   int
}

func newREST(cfg Config, conn *Connection, limit int) rest {
	if cfg.MaxConnections <= 0 {
		cfg.MaxConnections = 16
	}
	return rest{cfg.Hub.Name, newClient(addresses{conn.Plain, cfg.PublicOnly}, cfg.ConnectTimeout, cfg.MaxConnections, conn.roots), cfg.Timeout, cfg.Now, limit}
}

// Close closes connections that wait for the next call.
func (h *rest) Close() error {
	h.client.CloseIdleConnections()
	return nil
}

func (h *rest) call(ctx context.Context, doing, method, url string, header http.Header, body []byte) (answer, error) {
	ctx, cancel := context.WithTimeout(ctx, h.timeout)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, method, url, bytes.NewReader(body))
	if err != nil {
		return answer{}, newError(h.name, codeArgument, false, errors.New(doing+": its URL is none"))
	}
	r.Header = header
	r.Header.Set("User-Agent", "touchmark")
	if body != nil {
		r.Header.Set("Content-Type", "application/json; charset=utf-8")
	}
	a, err := exchange(h.client, r, h.limit)
	switch {
	case errors.Is(err, errTooLarge) && a.status/100 != 2:
		a.body = nil // the status says enough
	case errors.Is(err, errTooLarge):
		return a, h.invalid(doing, a.status, err)
	case err != nil:
		return a, noAnswer(h.name, doing, err)
	}
	return a, nil
}

// invalid is the error of an answer that no hub gives: asking again is of no use.
func (h *rest) invalid(doing string, status int, err error) error {
	return &registration.HubError{Hub: h.name, Status: status, Code: codeInvalid, Err: fmt.Errorf("%s: status %d: %w", doing, status, err)}
}

// refused is the error of an answer that says no.
func (h *rest) refused(doing string, a answer, name, message string) *registration.HubError {
	e := &registration.HubError{Hub: h.name, Status: a.status, Code: code(name), RetryAfter: retryAfter(a.header.Get("Retry-After"), h.now())}
	e.Temporary = a.status == http.StatusTooManyRequests || a.status == http.StatusRequestTimeout || a.status >= 500
	text := strings.Join(slices.DeleteFunc([]string{e.Code, said(message)}, func(s string) bool { return s == "" }), ": ")
	if text == "" {
		text = http.StatusText(a.status)
	}
	e.Err = &whileDoing{doing, fmt.Errorf("status %d: %s", a.status, text)}
	return e
}

// maxRetryAfter bounds how long a hub may put us off.
const maxRetryAfter = time.Hour

// retryAfter reads a Retry-After header: seconds, or a date (RFC 9110 §10.2.3). What it cannot read is 0.
func retryAfter(s string, now time.Time) time.Duration {
	if n, err := strconv.ParseUint(s, 10, 32); err == nil {
		return min(time.Duration(n)*time.Second, maxRetryAfter)
	}
	if t, err := http.ParseTime(s); err == nil {
		return min(max(t.Sub(now), 0), maxRetryAfter)
	}
	return 0
}

// decode parses one JSON value and nothing behind it.
func decode(b []byte, v any, strict bool) error {
	d := json.NewDecoder(bytes.NewReader(b))
	if strict {
		d.DisallowUnknownFields()
	}
	if err := d.Decode(v); err != nil {
		return errors.New("body is not the JSON that it should be")
	}
	if _, err := d.Token(); err != io.EOF {
		return errors.New("something stands behind the JSON")
	}
	return nil
}

// percent encodes an ID as one segment of a path.
func percent(id string) string {
	const hexDigits = "0123456789ABCDEF"
	var b strings.Builder
	for i := range len(id) {
		switch c := id[i]; {
		case c >= '0' && c <= '9', c|0x20 >= 'a' && c|0x20 <= 'z', strings.IndexByte("-._~", c) >= 0:
			b.WriteByte(c)
		default:
			b.Write([]byte{'%', hexDigits[c>>4], hexDigits[c&15]})
		}
	}
	return b.String()
}
