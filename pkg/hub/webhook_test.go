package hub_test

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/hub"
	"github.com/touchmark/touchmark/pkg/hub/hubtest"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

// startFunction starts a webhook, over TLS unless it is plain.
func startFunction(t *testing.T, plain bool, f http.HandlerFunc) (*httptest.Server, *x509.CertPool) {
	t.Helper()
	s := httptest.NewUnstartedServer(f)
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	t.Cleanup(s.Close)
	if plain {
		s.Start()
		return s, nil
	}
	s.StartTLS()
	roots := x509.NewCertPool()
	roots.AddCert(s.Certificate())
	return s, roots
}

func newWebhook(t *testing.T, cfg hub.WebhookConfig) *hub.Webhook {
	w := hub.NewWebhook(cfg)
	t.Cleanup(func() { w.Close() })
	return w
}

func TestWebhook(t *testing.T) {
	registrationtest.Goroutines(t)
	const body, answer = `{"linkedHubs":["a"]}`, `{"iotHubHostName":"a"}`
	secret := []byte("0123456789abcdef")
	s, roots := startFunction(t, false, func(w http.ResponseWriter, r *http.Request) {
		got, _ := io.ReadAll(r.Body)
		signed := hubtest.Signed(secret, r.Header.Get("Touchmark-Signature"), got)
		if r.Method != http.MethodPost || r.RequestURI != "/api/pick?code=hush%3D&x=1" || string(got) != body || r.Header.Get("Content-Type") != "application/json" ||
			signed != (r.Header.Get("Touchmark-Signature") != "") {
			w.WriteHeader(418)
		}
		fmt.Fprintf(w, "%s%v", answer, signed)
	})
	url := s.URL + "/api/pick?code=hush%3D&x=1"
	var told []string
	for _, key := range [][]byte{nil, secret} {
		w := newWebhook(t, hub.WebhookConfig{RootCAs: roots, Secret: key, Observe: func(host, operation, code string, _ time.Duration) { told = append(told, host+" "+operation+" "+code) }})
		got, status, err := w.Call(t.Context(), url, []byte(body))
		if want := fmt.Sprintf("%s%v", answer, key != nil); err != nil || status != 200 || string(got) != want {
			t.Errorf("%q, %d, %v", got, status, err)
		}
	}
	if fmt.Sprint(told) != "[127.0.0.1 allocate ok 127.0.0.1 allocate ok]" {
		t.Error(told)
	}
	if got := hub.MaskURL(url); got != s.URL+"/api/pick?****" {
		t.Error(got)
	}
	t.Run("a certificate that nobody knows", func(t *testing.T) {
		_, status, err := newWebhook(t, hub.WebhookConfig{}).Call(t.Context(), url, []byte(body))
		if err == nil || status != 0 || strings.Contains(err.Error(), "hush") {
			t.Errorf("%d, %v", status, err)
		}
	})
	t.Run("private addresses forbidden", func(t *testing.T) {
		w := newWebhook(t, hub.WebhookConfig{RootCAs: roots, PublicOnly: true, LoopbackHTTP: true})
		for _, host := range []string{"127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "10.0.0.1", "169.254.169.254", "[fd00::1]", "[fe80::1]", "100.64.0.1", "0.0.0.0", "2130706433"} {
			for _, scheme := range []string{"https", "http"} {
				_, status, err := w.Call(t.Context(), scheme+"://"+host+":1/?code=hush", nil)
				if err == nil || status != 0 || strings.Contains(err.Error(), "hush") || !strings.Contains(err.Error(), "address is not allowed") && host != "2130706433" {
					t.Errorf("%s://%s: %d, %v", scheme, host, status, err)
				}
			}
		}
	})
	t.Run("http", func(t *testing.T) {
		p, _ := startFunction(t, true, func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, answer) })
		if _, _, err := newWebhook(t, hub.WebhookConfig{}).Call(t.Context(), p.URL+"?code=hush", nil); err == nil || !strings.Contains(err.Error(), "want https") || strings.Contains(err.Error(), "hush") {
			t.Error(err)
		}
		w := newWebhook(t, hub.WebhookConfig{LoopbackHTTP: true})
		if got, _, err := w.Call(t.Context(), p.URL, nil); err != nil || string(got) != answer {
			t.Errorf("%s, %v", got, err)
		}
		if _, _, err := w.Call(t.Context(), "http://192.0.2.1/?code=hush", nil); err == nil || !strings.Contains(err.Error(), "no loopback address") || strings.Contains(err.Error(), "hush") {
			t.Error(err)
		}
	})
	t.Run("URLs", func(t *testing.T) {
		w := newWebhook(t, hub.WebhookConfig{})
		for _, bad := range []string{"", "hush", "ftp://a/hush", "https://u:hush@a/", "https:///", "https://a/#hush", "//a/hush", "https://a b/?hush", "https://[::1/?hush", "https://a:0/?hush"} {
			if err := w.CheckURL(bad); err == nil || strings.Contains(err.Error(), "?hush") || strings.Contains(err.Error(), "u:hush") {
				t.Errorf("%s: %v", bad, err)
			}
		}
		if err := w.CheckURL("https://example.net/api?code=x"); err != nil {
			t.Error(err)
		}
	})
}

// What a webhook may answer, or not.
func TestWebhookFaults(t *testing.T) {
	registrationtest.Goroutines(t)
	var calls atomic.Int64
	elsewhere, _ := startFunction(t, true, func(http.ResponseWriter, *http.Request) { calls.Add(1) })
	for _, c := range []struct {
		name   string
		status int
		f      http.HandlerFunc
	}{
		{"400", 400, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(400) }},
		{"401", 401, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(401) }},
		{"500", 500, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500) }},
		{"redirects", 307, func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, elsewhere.URL, http.StatusTemporaryRedirect)
		}},
		{"65 KiB", 200, func(w http.ResponseWriter, _ *http.Request) { w.Write(make([]byte, 65<<10)) }},
		{"cut", 200, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "100")
			w.Write([]byte("{}"))
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		}},
		{"hangs", 0, func(_ http.ResponseWriter, r *http.Request) {
			io.Copy(io.Discard, r.Body)
			<-r.Context().Done()
			panic(http.ErrAbortHandler)
		}},
		{"hangs up", 0, func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }},
		{"a header of 1 MB", 0, func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("X", strings.Repeat("a", 1<<20)) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			s, roots := startFunction(t, false, c.f)
			cfg := hub.WebhookConfig{RootCAs: roots}
			if c.name == "hangs" {
				cfg.Timeout = 200 * time.Millisecond
			}
			got, status, err := newWebhook(t, cfg).Call(t.Context(), s.URL+"/?code=hush", []byte("{}"))
			if status != c.status || got != nil || (err == nil) != (status/100 > 2) {
				t.Errorf("%.20q, %d, %v", got, status, err)
			}
			if err != nil && (strings.Contains(err.Error(), "hush") || !strings.Contains(err.Error(), s.URL+"/?****")) {
				t.Error(err)
			}
			if c.name == "hangs" && !errors.Is(err, context.DeadlineExceeded) {
				t.Error(err)
			}
		})
	}
	if calls.Load() > 0 {
		t.Error("a redirect was followed")
	}
	t.Run("retries", func(t *testing.T) {
		n, statuses := 0, []int{503, 502, 200}
		s, roots := startFunction(t, false, func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(statuses[n])
			n++
		})
		for _, want := range []int{503, 502, 200} { // without
			if _, status, _ := newWebhook(t, hub.WebhookConfig{RootCAs: roots}).Call(t.Context(), s.URL, nil); status != want {
				t.Errorf("%d, want %d", status, want)
			}
		}
		n = 0
		if _, status, err := newWebhook(t, hub.WebhookConfig{RootCAs: roots, Retries: 2}).Call(t.Context(), s.URL, nil); status != 200 || err != nil || n != 3 {
			t.Errorf("%d, %v after %d calls", status, err, n)
		}
		n, statuses = 0, []int{400, 200}
		if _, status, err := newWebhook(t, hub.WebhookConfig{RootCAs: roots, Retries: 2}).Call(t.Context(), s.URL, nil); status != 400 || err != nil || n != 1 {
			t.Errorf("%d, %v after %d calls", status, err, n)
		}
	})
	t.Run("circuit", func(t *testing.T) {
		status := http.StatusServiceUnavailable
		var n int
		s, roots := startFunction(t, false, func(w http.ResponseWriter, _ *http.Request) {
			n++
			w.WriteHeader(status)
		})
		fine, _ := startFunction(t, true, func(http.ResponseWriter, *http.Request) {})
		c := newClock()
		w := newWebhook(t, hub.WebhookConfig{RootCAs: roots, Now: c.Now, LoopbackHTTP: true})
		for range 5 {
			w.Call(t.Context(), s.URL+"/?code=hush", nil)
		}
		if _, got, err := w.Call(t.Context(), s.URL+"/?code=hush", nil); !errors.Is(err, hub.ErrCircuitOpen) || got != 0 || n != 5 || !strings.Contains(err.Error(), "status 50") || strings.Contains(err.Error(), "hush") {
			t.Errorf("%v after %d calls", err, n)
		}
		for i := range 2000 { // others, which are remembered in part
			if _, _, err := w.Call(t.Context(), fmt.Sprintf("%s/?%d", fine.URL, i), nil); err != nil {
				t.Fatal(err)
			}
		}
		if _, _, err := w.Call(t.Context(), s.URL+"/?code=hush", nil); !errors.Is(err, hub.ErrCircuitOpen) {
			t.Errorf("2000 others made it forgotten: %v", err)
		}
		c.Forward(time.Second)
		status = 200
		for range 2 {
			if _, got, err := w.Call(t.Context(), s.URL+"/?code=hush", nil); err != nil || got != 200 {
				t.Errorf("%d, %v", got, err)
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		for range 10 { // devices that go away say nothing of the webhook
			if _, _, err := w.Call(ctx, s.URL+"/?code=hush", nil); !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		}
	})
}
