package main

import (
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/touchmark/touchmark/pkg/hub/hubtest"
)

// The flags for allocation webhooks do what help allocation says: a webhook with a CA of its own, which fails once, is called again and
// finds every call signed. Another scope's webhook is called again too, and has neither the operator's secret nor its CA.
func TestWebhookFlags(t *testing.T) {
	secret := []byte("0123456789abcdef0123456789abcdef")
	var mu sync.Mutex
	var heard []string // under mu
	answer := func(name string, fail int) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			mu.Lock()
			defer mu.Unlock()
			body, _ := io.ReadAll(r.Body)
			header := r.Header.Get("Touchmark-Signature")
			heard = append(heard, fmt.Sprintf("%s: signed %t", name, header != ""))
			if header != "" && !hubtest.Signed(secret, header, body) {
				t.Errorf("%s: signature %q of %s", name, header, body)
			}
			if fail--; fail >= 0 {
				w.WriteHeader(http.StatusServiceUnavailable)
				return
			}
			io.WriteString(w, `{"iotHubHostName":"hub-a.example.net"}`)
		}
	}
	expect := func(what string, want ...string) {
		t.Helper()
		mu.Lock()
		defer mu.Unlock()
		if got := strings.Join(heard, ", "); got != strings.Join(want, ", ") {
			t.Errorf("%s: %s, not %v", what, got, want)
		}
		heard = nil
	}
	tls := func(f http.HandlerFunc) *httptest.Server {
		s := httptest.NewUnstartedServer(f)
		s.Config.ErrorLog = log.New(io.Discard, "", 0)
		s.StartTLS()
		t.Cleanup(s.Close)
		return s
	}
	own := tls(answer("own", 1))
	tenants := httptest.NewServer(answer("tenant's", 1))
	defer tenants.Close()
	tenantsTLS := tls(answer("tenant's with TLS", 0))

	dir := t.TempDir()
	write(t, filepath.Join(dir, "webhook.key"), base64.StdEncoding.EncodeToString(secret)+"\n")
	write(t, filepath.Join(dir, "webhook-ca.pem"), string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: own.Certificate().Raw})))
	serve := []string{"--https", "127.0.0.1:0", "--mqtt", "off", "--amqp", "off", "--name", "plant-a", "--domain", "dps.example.net", "--allow-http-webhooks"}
	flagged := append(serve, "--webhook-retries", "1", "--webhook-secret-file", "webhook.key", "--webhook-ca", "webhook-ca.pem")
	cmd, _, _ := startServe(t, dir, flagged...)
	m := manage(t, dir)
	status, made := m.call("PUT", m.scopes()+"plant-b?api-version=2022-02-05", "", `{"location":"global","sku":{"name":"S1"},"properties":{"iotHubs":[{"name":"hub-a.example.net","kind":"record","location":"x"}]}}`)
	if status != 201 {
		t.Fatalf("%d %v", status, made)
	}
	other := made["properties"].(map[string]any)["idScope"].(string)

	register := func(name, scope, id, url string) map[string]any {
		t.Helper()
		return m.comeIn(name, scope, id, `,"allocationPolicy":"custom","customAllocationDefinition":{"webhookUrl":"`+url+`","apiVersion":"2021-10-01"}`)
	}
	if a := register("plant-a", "0ne00112233", "mine", own.URL); a["status"] != "assigned" {
		t.Error(a)
	}
	expect("the first scope's", "own: signed true", "own: signed true")
	if a := register("plant-b", other, "theirs", tenants.URL); a["status"] != "assigned" {
		t.Error(a)
	}
	expect("another scope's", "tenant's: signed false", "tenant's: signed false")
	if a := register("plant-b", other, "theirs-tls", tenantsTLS.URL); a["status"] != "failed" { // httptest's certificates are all one
		t.Error(a)
	}
	expect("another scope's, with the operator's CA")

	// Without the flags there is one call, without a signature, and no such CA.
	stopServe(t, cmd)
	startServe(t, dir, serve...)
	m = manage(t, dir)
	plain := httptest.NewServer(answer("plain", 1))
	defer plain.Close()
	if a := register("plant-a", "0ne00112233", "plain", plain.URL); a["status"] != "failed" {
		t.Error(a)
	}
	expect("without flags", "plain: signed false")
	if a := register("plant-a", "0ne00112233", "mine-again", own.URL); a["status"] != "failed" {
		t.Error(a)
	}
	expect("without the CA")
}
