package hook

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/internal/durable"
)

// WebhookConfig says where a webhook is.
type WebhookConfig struct {
	// URL is an https URL; http is for this machine only (a loopback address, or localhost). It carries no user and password.
	URL string
	// SecretFile holds the secret that requests are signed with: 16 to 4,096 octets, the line feed at its end aside. The file
	// must not be readable by everybody.
	SecretFile string
	// CAFile holds the certificates, PEM, that the server's is verified with; empty means the system's.
	CAFile string
	// Timeout is how long a request may take in all: ten seconds if 0.
	Timeout time.Duration
	// Now is for tests; nil means the real clock.
	Now func() time.Time
}

// A Webhook posts events to a URL:
//
//	POST … HTTP/1.1
//	Content-Type: application/json
//	Idempotency-Key: <the event's ID>
//	Touchmark-Signature: t=<seconds since 1970>,v1=<hexadecimal HMAC-SHA256 of t + "." + body>
//
// An answer 2xx means that it has arrived; 4xx other than 408, 425 and 429 that it is refused for good; everything else that it
// is to be sent again, after Retry-After (RFC 9110 §10.2.3) if that is there. Redirects are not followed. A Webhook may be used
// by many goroutines.
type Webhook struct {
	url    *url.URL
	secret hsm.Secret
	client http.Client
	now    func() time.Time
}

const (
	minSecret     = 16
	maxSecret     = 4096
	maxCAFile     = 1 << 20
	maxRetryAfter = 24 * time.Hour
)

// NewWebhook reads the webhook's files and checks its URL. It makes no connection.
func NewWebhook(cfg WebhookConfig) (*Webhook, error) {
	u, err := url.Parse(cfg.URL)
	if err != nil || u.Host == "" || u.User != nil || u.Fragment != "" {
		return nil, errors.New("webhook: want an https URL without user and password") // it may hold some
	}
	if ip := net.ParseIP(u.Hostname()); u.Scheme != "https" && (u.Scheme != "http" || u.Hostname() != "localhost" && (ip == nil || !ip.IsLoopback())) {
		return nil, fmt.Errorf("webhook at %s: want https, since the way there is not this machine's own", u.Host)
	}
	w := &Webhook{url: u, now: cfg.Now}
	if w.now == nil {
		w.now = time.Now
	}
	info, err := os.Stat(cfg.SecretFile)
	if err != nil {
		return nil, fmt.Errorf("webhook at %s: secret: %w", u.Host, err)
	}
	if info.Mode().Perm()&0o007 != 0 {
		return nil, fmt.Errorf("webhook at %s: secret %s has mode %v: everybody could read it", u.Host, cfg.SecretFile, info.Mode().Perm())
	}
	secret, err := durable.Read(cfg.SecretFile, maxSecret+2)
	if err != nil {
		return nil, fmt.Errorf("webhook at %s: secret: %w", u.Host, err)
	}
	if w.secret = bytes.TrimRight(secret, "\r\n"); len(w.secret) < minSecret || len(w.secret) > maxSecret {
		return nil, fmt.Errorf("webhook at %s: secret %s: want %d to %d octets", u.Host, cfg.SecretFile, minSecret, maxSecret)
	}
	trust := &tls.Config{MinVersion: tls.VersionTLS12}
	if cfg.CAFile != "" {
		pem, err := durable.Read(cfg.CAFile, maxCAFile)
		if err != nil {
			return nil, fmt.Errorf("webhook at %s: %w", u.Host, err)
		}
		if trust.RootCAs = x509.NewCertPool(); !trust.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("webhook at %s: %s holds no certificate", u.Host, cfg.CAFile)
		}
	}
	w.client = http.Client{
		Timeout:       cfg.Timeout,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: &http.Transport{Proxy: http.ProxyFromEnvironment, TLSClientConfig: trust, ForceAttemptHTTP2: true,
			MaxResponseHeaderBytes: 64 << 10, IdleConnTimeout: time.Minute, MaxIdleConns: 1},
	}
	if w.client.Timeout <= 0 {
		w.client.Timeout = 10 * time.Second
	}
	return w, nil
}

// Deliver posts an event.
func (w *Webhook) Deliver(ctx context.Context, e Event, body []byte) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, w.url.String(), bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("webhook at %s: %w", w.url.Host, err)
	}
	t := strconv.FormatInt(w.now().Unix(), 10)
	mac := hmac.New(sha256.New, w.secret)
	mac.Write([]byte(t + "."))
	mac.Write(body)
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("User-Agent", "touchmark")
	req.Header.Set("Idempotency-Key", e.ID)
	req.Header.Set("Touchmark-Signature", "t="+t+",v1="+hex.EncodeToString(mac.Sum(nil)))
	res, err := w.client.Do(req)
	if err != nil {
		var whole *url.Error
		if errors.As(err, &whole) {
			err = whole.Err // without the URL: its query may hold a token
		}
		return fmt.Errorf("webhook at %s: %w", w.url.Host, err)
	}
	defer res.Body.Close()
	_, _ = io.Copy(io.Discard, io.LimitReader(res.Body, 64<<10)) // so that the connection can be used again
	code := res.StatusCode
	if code >= 200 && code < 300 {
		return nil
	}
	err = fmt.Errorf("webhook at %s answers %d", w.url.Host, code)
	switch {
	case code >= 300 && code < 400:
		return fmt.Errorf("%w: redirects are not followed", err)
	case code >= 400 && code < 500 && code != http.StatusRequestTimeout && code != http.StatusTooEarly && code != http.StatusTooManyRequests:
		return fmt.Errorf("%w: %w", err, ErrRefused)
	}
	if after := retryAfter(res.Header.Get("Retry-After"), w.now()); after > 0 {
		return &LaterError{after, err}
	}
	return err
}

// retryAfter reads a Retry-After header, seconds or a date, up to a day; 0 if there is none.
func retryAfter(s string, now time.Time) time.Duration {
	if s != "" && strings.Trim(s, "0123456789") == "" {
		n, err := strconv.ParseUint(s, 10, 32)
		if err != nil {
			return maxRetryAfter // a number beyond all bounds
		}
		return min(time.Duration(n)*time.Second, maxRetryAfter)
	}
	at, err := http.ParseTime(s)
	if err != nil {
		return 0
	}
	return min(max(at.Sub(now), 0), maxRetryAfter)
}
