package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
)

// The set-up of help access, with an identity provider on this machine: its tokens, the management token and the owner's key are
// good where they should be, by the scope's own host, and nowhere else.
func TestIdentityProvider(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	var provider *httptest.Server
	provider = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/.well-known/openid-configuration" {
			_ = json.NewEncoder(w).Encode(map[string]string{"issuer": provider.URL, "jwks_uri": provider.URL + "/keys"})
			return
		}
		_ = json.NewEncoder(w).Encode(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "1", Algorithm: "ES256", Use: "sig"}}})
	}))
	defer provider.Close()
	dir := t.TempDir()
	_, rest, _ := strings.Cut(accessTopic.Long, "\n    issuer = ")
	file, _, found := strings.Cut("issuer = "+rest, "\n\n  Signatures")
	if !found {
		t.Fatal("the page has no file")
	}
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: provider.Certificate().Raw})
	file = strings.NewReplacer(`"https://login.example.net/realms/plant"`, fmt.Sprintf("%q", provider.URL), `# ca = """-----BEGIN …"""`, fmt.Sprintf("ca = %q #", ca)).Replace(file)
	if err := os.WriteFile(filepath.Join(dir, "provider.toml"), []byte(file), 0o600); err != nil {
		t.Fatal(err)
	}
	ready, _ := startService(t, dir, "127.0.0.1:0", "off", "off", "--oidc", "provider.toml", "--domain", "dps.example.net", "--name", "plant-a")
	roots, err := loadRoots(filepath.Join(dir, "svc", "ca.pem"))
	if err != nil {
		t.Fatal(err)
	}
	tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, ready["https"].(string))
	}}
	defer tr.CloseIdleConnections()
	client := &http.Client{Transport: tr, Timeout: time.Minute}
	ask := func(host, authorization string) int {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://"+host+"/touchmark/info?api-version=2021-10-01", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", authorization)
		res, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = res.Body.Close()
		return res.StatusCode
	}
	token := func(role, audience string) string {
		s, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: "1"}}, nil)
		if err != nil {
			t.Fatal(err)
		}
		text, err := jwt.Signed(s).Claims(map[string]any{"iss": provider.URL, "aud": audience, "sub": "alice", "exp": time.Now().Add(time.Hour).Unix(), "roles": []string{role}}).Serialize()
		if err != nil {
			t.Fatal(err)
		}
		return "Bearer " + text
	}
	management, err := os.ReadFile(filepath.Join(dir, "svc", managementTokenFile))
	if err != nil || ready["managementTokenFile"] != filepath.Join(dir, "svc", managementTokenFile) {
		t.Fatal(err, ready)
	}
	for name, x := range map[string]struct {
		host, authorization string
		want                int
	}{
		"operator":              {"plant-a.dps.example.net", token("dps-operator", "touchmark"), 200},
		"operator at localhost": {"localhost", token("dps-operator", "touchmark"), 200},
		"another role":          {"plant-a.dps.example.net", token("dps-reader", "touchmark"), 401},
		"another audience":      {"plant-a.dps.example.net", token("dps-operator", "other"), 401},
		"another scope":         {"plant-b.dps.example.net", token("dps-operator", "touchmark"), 401},
		"management":            {"plant-a.dps.example.net", "Bearer " + string(bytes.TrimSpace(management)), 200},
		"wrong management":      {"plant-a.dps.example.net", "Bearer x" + string(bytes.TrimSpace(management)), 401},
	} {
		if got := ask(x.host, x.authorization); got != x.want {
			t.Errorf("%s: %d", name, got)
		}
	}
}
