package operator

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/touchmark/touchmark/pkg/dps"
)

// Config says which service a client speaks to, and how.
type Config struct {
	Connection Connection
	// Roots are the CAs that the service's certificate is checked against; nil means the system's.
	Roots *x509.CertPool
	// Limiter is shared with whoever uses up the same quota; nil makes one.
	Limiter *Limiter
	// Timeout is how long one attempt at a call may take; 0 means 100 s. Uploads have none.
	Timeout time.Duration
	// Patience is how long a call is tried again while the service asks to wait; 0 means 15 minutes.
	Patience time.Duration
	// Waiting is told when a call waits because the service asked for it, or could not be reached, and for how long; nil is nobody.
	Waiting func(host string, d time.Duration)
	// Dial opens connections; nil means as the system does, within 10 s.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// A Client makes the calls of the service API.
type Client struct {
	*caller
	connection Connection
}

// New returns a client. It calls nobody.
func New(cfg Config) *Client {
	c := &Client{connection: cfg.Connection}
	c.caller = newCaller(cfg, APIVersion, func() string { return c.connection.authorization(time.Now()) })
	return c
}

// caller makes calls of any API with JSON in and out: what the service API and the management API share.
type caller struct {
	base          string // https://host
	host          string
	version       string
	authorization func() string
	http          *http.Client
	limiter       *Limiter
	timeout       time.Duration
	patience      time.Duration
	waiting       func(string, time.Duration)
	reached       atomic.Bool // the service answered once
}

func newCaller(cfg Config, version string, authorization func() string) *caller {
	if cfg.Limiter == nil {
		cfg.Limiter = &Limiter{}
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = 100 * time.Second
	}
	if cfg.Patience == 0 {
		cfg.Patience = 15 * time.Minute
	}
	if cfg.Dial == nil {
		cfg.Dial = (&net.Dialer{Timeout: 10 * time.Second}).DialContext
	}
	return &caller{
		base: "https://" + cfg.Connection.Host, host: cfg.Connection.Host, version: version, authorization: authorization,
		limiter: cfg.Limiter, timeout: cfg.Timeout, patience: cfg.Patience, waiting: cfg.Waiting,
		http: &http.Client{
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
			Transport: &http.Transport{
				TLSClientConfig: &tls.Config{RootCAs: cfg.Roots, MinVersion: tls.VersionTLS12}, DialContext: cfg.Dial,
				MaxIdleConnsPerHost: 16, TLSHandshakeTimeout: 10 * time.Second,
				ResponseHeaderTimeout: 30 * time.Minute, // an upload is answered when it is durable
			},
		},
	}
}

// Host returns where the service is: a host, or host:port.
func (c *caller) Host() string { return c.host }

// Limiter returns what spaces the client's calls.
func (c *caller) Limiter() *Limiter { return c.limiter }

const (
	maxAnswer = 64 << 20 // a page of 500 enrollments, each as large as Azure lets them be
	maxText   = 500      // of an error, in runes
	maxTries  = 6        // of a call whose answer was lost
)

// A request is one call.
type request struct {
	method, path string
	query        url.Values
	header       http.Header
	body         []byte
	stream       io.Reader // in the place of body: it cannot be sent twice
	// again says that it does no harm if the service takes the call twice.
	again bool
}

// An answer is what a call came back with.
type answer struct {
	header http.Header
	status int
	// lost says that an earlier attempt may have been taken, its answer lost.
	lost bool
}

// Call makes one call of any kind and decodes its JSON answer into out, which may be nil. The body may be nil; it is read once, so
// a call that has one is not repeated, and one without it only if it is a GET. The error is an *Error where the service says no.
func (c *caller) Call(ctx context.Context, method, path string, query url.Values, header http.Header, body io.Reader, out any) error {
	_, err := c.do(ctx, request{method: method, path: path, query: query, header: header, stream: body, again: method == http.MethodGet}, out)
	return err
}

// CallJSON is Call with a JSON body, which is sent again where the service was too busy to take it.
func (c *caller) CallJSON(ctx context.Context, method, path string, in, out any) error {
	b, err := json.Marshal(in)
	if err == nil {
		_, err = c.do(ctx, request{method: method, path: path, body: b}, out)
	}
	return err
}

// do makes a call, again and again where that helps and harms nobody. The answer is there with an error too.
func (c *caller) do(ctx context.Context, r request, out any) (a answer, err error) {
	begun := time.Now()
	for try := 1; ; try++ {
		if err := c.limiter.Wait(ctx); err != nil {
			return a, err
		}
		var after time.Duration
		var asked bool // the service says when to come back
		var b []byte
		a.header, a.status, b, err = c.once(ctx, &r)
		if err == nil && a.status/100 != 2 {
			err = c.refusal(a.status, a.header, b)
			after, asked = retryAfter(a.header)
		}
		if err == nil {
			if out == nil || len(b) == 0 && a.status == http.StatusNoContent {
				return a, nil
			}
			if err := json.Unmarshal(b, out); err != nil {
				return a, fmt.Errorf("the answer of %s is not what was expected: %w", c.host, err)
			}
			return a, nil
		}
		if ctx.Err() != nil {
			return a, ctx.Err()
		}
		throttled := a.status == http.StatusTooManyRequests
		busy := throttled || a.status == http.StatusServiceUnavailable && asked
		gone := a.status == 0 && c.passing(err) || a.status == http.StatusRequestTimeout || a.status/100 == 5 && a.status != http.StatusNotImplemented
		if r.stream != nil || !busy && !(gone && r.again) || !throttled && try >= maxTries || time.Since(begun)+after > c.patience {
			return a, err
		}
		if !throttled {
			a.lost = true
		}
		if !asked {
			after = time.Second << min(try-1, 5)
		}
		if c.waiting != nil {
			c.waiting(c.host, after)
		}
		if busy {
			c.limiter.Throttled(after)
		} else if err := sleep(ctx, after/2+time.Duration(rand.Int64N(int64(after)))); err != nil {
			return a, err
		}
	}
}

// passing reports whether a connection's fault may pass by itself. Names and certificates that are wrong stay so; a port where
// nothing listens is a service that restarts only if it was there before.
func (c *caller) passing(err error) bool {
	var certificate *tls.CertificateVerificationError
	var record tls.RecordHeaderError
	var lookup *net.DNSError
	switch {
	case errors.As(err, &certificate), errors.As(err, &record), errors.Is(err, errTooLong):
		return false
	case errors.As(err, &lookup), errors.Is(err, syscall.ECONNREFUSED):
		return c.reached.Load()
	}
	return true
}

var errTooLong = errors.New("the answer is longer than any that was expected")

// once makes one attempt.
func (c *caller) once(ctx context.Context, r *request) (http.Header, int, []byte, error) {
	body := r.stream
	if body == nil {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, c.timeout)
		defer cancel()
		if r.body != nil {
			body = bytes.NewReader(r.body)
		}
	}
	query := url.Values{}
	for k, v := range r.query {
		query[k] = v
	}
	query.Set("api-version", c.version)
	and := "?"
	if strings.Contains(r.path, "?") { // of a list; in IDs it is escaped
		and = "&"
	}
	req, err := http.NewRequestWithContext(ctx, r.method, c.base+r.path+and+query.Encode(), body)
	if err != nil {
		return nil, 0, nil, err
	}
	for k, v := range r.header {
		req.Header[http.CanonicalHeaderKey(k)] = v
	}
	if r.body != nil {
		req.Header.Set("Content-Type", "application/json; charset=utf-8")
	}
	req.Header.Set("Authorization", c.authorization())
	req.Header.Set("User-Agent", "touchmark")
	res, err := c.http.Do(req)
	if err != nil {
		return nil, 0, nil, fmt.Errorf("calling the service at %s: %w", c.host, err)
	}
	defer res.Body.Close()
	c.reached.Store(true)
	b, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer+1))
	if err != nil {
		return nil, 0, nil, fmt.Errorf("reading the answer of %s: %w", c.host, err)
	}
	if len(b) > maxAnswer {
		return nil, 0, nil, fmt.Errorf("reading the answer of %s: %w", c.host, errTooLong)
	}
	return res.Header, res.StatusCode, b, nil
}

// refusal reads an error document: of the service API (section 1.11), or of the management API (section 3.5).
func (c *caller) refusal(status int, h http.Header, b []byte) *Error {
	e := &Error{Host: c.host, Status: status, Name: clip(h.Get("X-Ms-Error-Code"))}
	var doc struct {
		ErrorCode, Code  json.RawMessage
		Message, Details string
		TrackingID       string
		Error            struct{ Code, Message string }
	}
	if json.Unmarshal(b, &doc) != nil && len(b) > 0 && b[0] == '{' {
		doc.Message = "an error document that cannot be read"
	}
	for _, code := range []json.RawMessage{doc.ErrorCode, doc.Code} {
		if n, err := strconv.Atoi(string(bytes.Trim(code, `"`))); err == nil && n > 0 && e.Code == 0 {
			e.Code = dps.Code(n)
		}
	}
	if e.Name == "" && e.Code == 0 {
		e.Name = clip(doc.Error.Code)
	}
	if _, err := strconv.Atoi(e.Name); err == nil {
		e.Name = ""
	}
	for _, text := range []string{doc.Message, doc.Error.Message, doc.Details} {
		if e.Message == "" {
			e.Message = clip(text)
		}
	}
	e.TrackingID = clip(doc.TrackingID)
	return e
}

func clip(s string) string {
	if r := []rune(s); len(r) > maxText {
		return string(r[:maxText]) + "…"
	}
	return s
}

// retryAfter reads seconds, or a date (RFC 9110 §10.2.3).
func retryAfter(h http.Header) (time.Duration, bool) {
	text := h.Get("Retry-After")
	if n, err := strconv.ParseUint(text, 10, 31); err == nil {
		return min(time.Duration(n)*time.Second, maxWait), true
	}
	if at, err := http.ParseTime(text); err == nil {
		return min(max(time.Until(at), 0), maxWait), true
	}
	return 0, false
}

// pages yields the items of a list, page by page. Nothing tells a list that grows as it is read from one that goes round; a
// continuation that comes twice in a row ends it.
func pages[T any](ctx context.Context, c *caller, method, path string, size int, yield func(T, error) bool) {
	header := http.Header{"X-Ms-Max-Item-Count": {strconv.Itoa(size)}}
	for {
		r := request{method: method, path: path, header: header, again: true}
		if method == http.MethodPost {
			r.body = []byte(`{"query":"SELECT *"}`)
		}
		var page []T
		a, err := c.do(ctx, r, &page)
		if err != nil {
			var none T
			yield(none, err)
			return
		}
		for _, item := range page {
			if !yield(item, nil) {
				return
			}
		}
		next := a.header.Get("X-Ms-Continuation")
		if next == "" || next == header.Get("X-Ms-Continuation") {
			return
		}
		header = header.Clone()
		header.Set("X-Ms-Continuation", next)
	}
}

// List gets a list of touchmark's own: at most limit items of it.
func List[T any](ctx context.Context, c *Client, path string, limit int) (all []T, err error) {
	pages(ctx, c.caller, http.MethodGet, path, min(limit, 1000), func(item T, e error) bool {
		if err = e; err == nil {
			all = append(all, item)
		}
		return err == nil && len(all) < limit
	})
	return all, err
}
