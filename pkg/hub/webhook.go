package hub

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"sync"
	"time"
)

// maxAllocation bounds a webhook's answer, in octets.
const maxAllocation = 64 << 10

// maxBreakers bounds the URLs whose failures a Webhook remembers.
const maxBreakers = 1024

// WebhookConfig says how a Webhook calls.
type WebhookConfig struct {
	// ConnectTimeout bounds the making of a connection, Timeout all of a call with its retries; 0 is 5 and 10 seconds. Azure's
	// are not documented (service API, section 4.7).
	ConnectTimeout, Timeout time.Duration
	// Retries after no answer, or 5xx; 0 is none, since the device registers again.
	Retries int
	// Secret, if not empty, signs what is sent, in [SignatureHeader].
	Secret []byte
	// LoopbackHTTP allows http, to loopback addresses.
	LoopbackHTTP bool
	// PublicOnly refuses private, loopback and link-local addresses, judged as they are dialled: for services whose tenants
	// name webhooks themselves. Unlike Azure's, a webhook may else stand in a private network.
	PublicOnly bool
	// RootCAs that webhooks' certificates are judged by; nil is the system's.
	RootCAs *x509.CertPool
	// Now is the clock; nil is the real one.
	Now func() time.Time
	// Observe is told of each call, as a Pool's is: with the webhook's host, and "allocate". May be nil.
	Observe func(host, operation, code string, d time.Duration)
}

// A Webhook makes the calls of custom allocation: it posts, and judges no answer. A URL that does not answer, time after time, is not
// called for a while.
type Webhook struct {
	cfg           WebhookConfig
	secure, plain *http.Client

	mu       sync.Mutex
	breakers map[string]*breaker // under mu, by URL
}

// NewWebhook returns a Webhook.
func NewWebhook(cfg WebhookConfig) *Webhook {
	base := Config{ConnectTimeout: cfg.ConnectTimeout, Timeout: cfg.Timeout, Now: cfg.Now}
	base.defaults()
	cfg.ConnectTimeout, cfg.Timeout, cfg.Now = base.ConnectTimeout, base.Timeout, base.Now
	const connections = 32 // to a host
	return &Webhook{
		cfg:      cfg,
		secure:   newClient(addresses{publicOnly: cfg.PublicOnly}, cfg.ConnectTimeout, connections, cfg.RootCAs),
		plain:    newClient(addresses{loopbackOnly: true, publicOnly: cfg.PublicOnly}, cfg.ConnectTimeout, connections, nil),
		breakers: map[string]*breaker{},
	}
}

// Close closes connections that wait for the next call.
func (w *Webhook) Close() error {
	w.secure.CloseIdleConnections()
	w.plain.CloseIdleConnections()
	return nil
}

// CheckURL reports what is wrong with a webhook's URL, without calling it.
func (w *Webhook) CheckURL(url string) error {
	if _, err := parseURL(url, w.cfg.LoopbackHTTP); err != nil {
		return fmt.Errorf("webhook %s: %w", MaskURL(url), err)
	}
	return nil
}

// MaskURL returns a webhook's URL as it may be shown: with ?**** for its query, where function keys live.
func MaskURL(url string) string { return maskURL(url) }

// Call posts a body of JSON and returns what was answered with which status, whatever that is: the body is that of a 2xx, of at most
// 64 KiB. An error means that there was no whole answer; it is ErrCircuitOpen where nothing was sent. The query of the URL goes on
// the wire and into no error.
func (w *Webhook) Call(ctx context.Context, url string, body []byte) (answer []byte, status int, err error) {
	u, err := parseURL(url, w.cfg.LoopbackHTTP)
	if err != nil {
		return nil, 0, fmt.Errorf("webhook %s: %w", MaskURL(url), err)
	}
	client := w.secure
	if u.Scheme == "http" {
		client = w.plain
	}
	start := time.Now()
	ctx, cancel := context.WithTimeout(ctx, w.cfg.Timeout)
	defer cancel()
	b := w.breaker(url)
	for try := 0; ; try++ {
		wait, probe := b.enter(w.cfg.Now())
		if wait > 0 {
			if try == 0 {
				err = b.reason()
			}
			break
		}
		answer, status, err = w.post(ctx, client, url, body)
		v := answered
		switch {
		case errors.Is(err, context.Canceled):
			v = unknown
		case err != nil || status >= 500:
			v = unanswered
		}
		failed := err
		if err == nil {
			failed = fmt.Errorf("status %d", status)
		}
		b.leave(w.cfg.Now(), v, probe, failed)
		if v != unanswered || try >= w.cfg.Retries || ctx.Err() != nil {
			break
		}
	}
	if w.cfg.Observe != nil {
		w.cfg.Observe(u.Hostname(), "allocate", webhookOutcome(status, err), time.Since(start))
	}
	if err != nil {
		return nil, status, fmt.Errorf("webhook %s: %w", MaskURL(url), err)
	}
	return answer, status, nil
}

// webhookOutcome is a word for metrics.
func webhookOutcome(status int, err error) string {
	switch {
	case errors.Is(err, ErrCircuitOpen):
		return codeOpen
	case err != nil:
		return noAnswer("", "", err).Code
	case status/100 == 2:
		return "ok"
	}
	return strconv.Itoa(status)
}

func (w *Webhook) post(ctx context.Context, client *http.Client, url string, body []byte) ([]byte, int, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(body))
	if err != nil {
		return nil, 0, errors.New("its URL is none")
	}
	r.Header = http.Header{"Content-Type": {"application/json"}, "Accept": {"application/json"}, "User-Agent": {"touchmark"}}
	if len(w.cfg.Secret) > 0 {
		r.Header.Set(SignatureHeader, sign(w.cfg.Secret, body, w.cfg.Now()))
	}
	a, err := exchange(client, r, maxAllocation)
	if a.status/100 != 2 {
		if a.status != 0 {
			err = nil // the status is the answer
		}
		return nil, a.status, err
	}
	return a.body, a.status, err
}

// breaker returns that of a URL. When too many are kept, those go that are closed, or else any.
func (w *Webhook) breaker(url string) *breaker {
	w.mu.Lock()
	defer w.mu.Unlock()
	b := w.breakers[url]
	if b == nil {
		for _, closedOnly := range []bool{true, false} {
			for u, old := range w.breakers {
				if len(w.breakers) < maxBreakers {
					break
				}
				if !closedOnly || old.open(w.cfg.Now()) == 0 {
					delete(w.breakers, u)
				}
			}
		}
		b = new(breaker)
		w.breakers[url] = b
	}
	return b
}
