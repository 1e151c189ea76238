package hook_test

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/hook"
)

const secret = "a secret of the factory"

// A mes is the factory's system: it checks every request as its documentation has it, and remembers the IDs that it took.
type mes struct {
	cfg    hook.WebhookConfig
	answer func(n int) int // status of the n-th request, from 1; nil is always 200
	header http.Header     // of answers

	t       *testing.T
	mu      sync.Mutex
	n       int
	arrived []string
	news    chan string
}

func newMES(t *testing.T, answer func(n int) int) *mes {
	t.Helper()
	m := &mes{t: t, answer: answer, news: make(chan string, 1<<16), header: http.Header{}}
	server := httptest.NewTLSServer(m)
	t.Cleanup(server.Close)
	dir := t.TempDir()
	m.cfg = hook.WebhookConfig{URL: server.URL + "/touchmark?line=3", SecretFile: filepath.Join(dir, "secret"), CAFile: filepath.Join(dir, "ca.pem")}
	for name, text := range map[string][]byte{
		m.cfg.SecretFile: []byte(secret + "\n"), m.cfg.CAFile: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}),
	} {
		if err := os.WriteFile(name, text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return m
}

func (m *mes) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	m.mu.Lock()
	defer m.mu.Unlock()
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return // its sender was killed
	}
	m.n++
	signature := r.Header.Get("Touchmark-Signature")
	stamp, sum, ok := strings.Cut(strings.TrimPrefix(signature, "t="), ",v1=")
	now := time.Now
	if m.cfg.Now != nil {
		now = m.cfg.Now
	}
	if seconds, err := strconv.ParseInt(stamp, 10, 64); err != nil || now().Sub(time.Unix(seconds, 0)).Abs() > time.Hour {
		ok = false
	}
	mac := hmac.New(sha256.New, []byte(secret))
	fmt.Fprintf(mac, "%s.%s", stamp, body)
	e, err := hook.ParseEvent(body)
	if !ok || sum != hex.EncodeToString(mac.Sum(nil)) || err != nil || r.Header.Get("Idempotency-Key") != e.ID || r.Method != "POST" ||
		r.Header.Get("Content-Type") != "application/json" || r.URL.RequestURI() != "/touchmark?line=3" {
		m.t.Errorf("request %s %s %v %q: %v", r.Method, r.URL, r.Header, body, err)
		w.WriteHeader(400)
		return
	}
	code := 200
	if m.answer != nil {
		code = m.answer(m.n)
	}
	for k := range m.header {
		w.Header().Set(k, m.header.Get(k))
	}
	w.WriteHeader(code)
	if code < 300 {
		m.arrived = append(m.arrived, e.ID)
		m.news <- e.ID
	}
}

// until waits for an event and returns all that arrived.
func (m *mes) until(ctx context.Context, t *testing.T, id string) []string {
	t.Helper()
	for {
		select {
		case got := <-m.news:
			if got == id {
				m.mu.Lock()
				defer m.mu.Unlock()
				return m.arrived
			}
		case <-ctx.Done():
			t.Fatal("event " + id + " does not arrive")
		}
	}
}

func event(t *testing.T) (hook.Event, []byte) {
	t.Helper()
	body := `{"id":"id-1","kind":"pass","time":"2026-03-01T08:00:00Z","fields":{"serial":"SN1"}}`
	e, err := hook.ParseEvent([]byte(body))
	if err != nil {
		t.Fatal(err)
	}
	return e, []byte(body)
}

func TestAnswers(t *testing.T) {
	now := time.Date(2026, 3, 1, 8, 0, 0, 0, time.UTC)
	e, body := event(t)
	for _, tc := range []struct {
		code    int
		after   string
		refused bool
		later   time.Duration
	}{
		{200, "", false, 0}, {201, "", false, 0}, {204, "5", false, 0},
		{400, "", true, 0}, {401, "60", true, 0}, {404, "", true, 0}, {409, "", true, 0}, {410, "", true, 0}, {422, "", true, 0},
		{408, "", false, 0}, {425, "", false, 0}, {429, "", false, 0}, {500, "", false, 0}, {503, "", false, 0}, {599, "", false, 0},
		{301, "5", false, 0}, {302, "", false, 0}, {307, "", false, 0}, {308, "", false, 0},
		{429, "120", false, 2 * time.Minute}, {503, "0", false, 0}, {503, "-5", false, 0}, {503, "soon", false, 0}, {503, "1e3", false, 0},
		{503, "999999999999999999999", false, 24 * time.Hour}, {503, "4000000000", false, 24 * time.Hour},
		{503, "Sun, 01 Mar 2026 08:05:00 GMT", false, 5 * time.Minute}, {503, "Sun, 01 Mar 2026 07:00:00 GMT", false, 0}, {503, "Mon, 01 Mar 2032 08:05:00 GMT", false, 24 * time.Hour},
	} {
		m := newMES(t, func(int) int { return tc.code })
		m.header.Set("Location", m.cfg.URL+"&elsewhere")
		if tc.after != "" {
			m.header.Set("Retry-After", tc.after)
		}
		m.cfg.Now = func() time.Time { return now }
		w, err := hook.NewWebhook(m.cfg)
		if err != nil {
			t.Fatal(err)
		}
		err = w.Deliver(t.Context(), e, body)
		var later *hook.LaterError
		switch {
		case tc.code < 300:
			if err != nil || len(m.arrived) != 1 {
				t.Errorf("%d: %v", tc.code, err)
			}
		case err == nil || errors.Is(err, hook.ErrRefused) != tc.refused || errors.As(err, &later) != (tc.later > 0) || later != nil && later.After != tc.later:
			t.Errorf("%d, Retry-After %q: %v, %+v", tc.code, tc.after, err, later)
		case m.n != 1 || !strings.Contains(err.Error(), strconv.Itoa(tc.code)) || strings.Contains(err.Error(), "line=3"):
			t.Errorf("%d: %d requests, %v", tc.code, m.n, err)
		}
	}
}

// A server that is not the factory's, hangs, or is away gets nothing, and is tried again.
func TestServersThatAreNotThere(t *testing.T) {
	e, body := event(t)
	m := newMES(t, nil)
	cfg := m.cfg
	over := make(chan struct{})
	hung := httptest.NewUnstartedServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-over }))
	hung.Start() // its own machine's, so plain
	defer hung.Close()
	defer close(over)
	for name, change := range map[string]func(){
		"certificate of the system's CAs": func() { cfg.CAFile = "" },
		"another name":                    func() { cfg.URL = strings.Replace(cfg.URL, "127.0.0.1", "localhost", 1) },
		"away":                            func() { cfg.URL = "https://127.0.0.1:1/touchmark?line=3" },
		"hangs":                           func() { cfg.URL, cfg.Timeout = hung.URL+"/?line=3", 50*time.Millisecond },
	} {
		cfg = m.cfg
		change()
		w, err := hook.NewWebhook(cfg)
		if err != nil {
			t.Fatal(err)
		}
		err = w.Deliver(t.Context(), e, body)
		if err == nil || errors.Is(err, hook.ErrRefused) || strings.Contains(err.Error(), "line=3") || strings.Contains(err.Error(), secret) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if m.n != 0 {
		t.Errorf("%d requests came", m.n)
	}
}

func TestWebhookConfig(t *testing.T) {
	m := newMES(t, nil)
	dir := t.TempDir()
	file := func(name, text string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for name, change := range map[string]func(*hook.WebhookConfig){
		"no URL":             func(c *hook.WebhookConfig) { c.URL = "" },
		"no host":            func(c *hook.WebhookConfig) { c.URL = "https:///x" },
		"not a URL":          func(c *hook.WebhookConfig) { c.URL = "https://%zz" },
		"plain":              func(c *hook.WebhookConfig) { c.URL = "http://mes.example.com/" },
		"plain, looks local": func(c *hook.WebhookConfig) { c.URL = "http://localhost.example.com/" },
		"a file":             func(c *hook.WebhookConfig) { c.URL = "file:///etc/passwd" },
		"a password":         func(c *hook.WebhookConfig) { c.URL = "https://user:hunter2@mes.example.com/" },
		"no secret":          func(c *hook.WebhookConfig) { c.SecretFile = "" },
		"secret missing":     func(c *hook.WebhookConfig) { c.SecretFile = filepath.Join(dir, "none") },
		"secret short":       func(c *hook.WebhookConfig) { c.SecretFile = file("short", "123456789012345\n", 0o600) },
		"secret long":        func(c *hook.WebhookConfig) { c.SecretFile = file("long", strings.Repeat("x", 5000), 0o600) },
		"secret for all":     func(c *hook.WebhookConfig) { c.SecretFile = file("open", secret, 0o644) },
		"CA missing":         func(c *hook.WebhookConfig) { c.CAFile = filepath.Join(dir, "none") },
		"CA empty":           func(c *hook.WebhookConfig) { c.CAFile = file("ca", "hello", 0o600) },
	} {
		cfg := m.cfg
		change(&cfg)
		if _, err := hook.NewWebhook(cfg); err == nil || strings.Contains(err.Error(), "hunter2") || strings.Contains(err.Error(), "1234567890") {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, url := range []string{"http://127.0.0.1:8080/x", "http://[::1]/", "http://localhost/"} {
		cfg := m.cfg
		cfg.URL = url
		if _, err := hook.NewWebhook(cfg); err != nil {
			t.Errorf("%s: %v", url, err)
		}
	}
}
