package access_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/touchmark/touchmark/pkg/access"
)

var now = time.Date(2026, 6, 1, 12, 0, 0, 0, time.UTC)

// issuer is an identity provider on this machine, over TLS.
type issuer struct {
	*httptest.Server
	mu      sync.Mutex
	keys    []any // as JSON makes them
	fetches atomic.Int64
	broken  atomic.Bool
}

func newIssuer(t testing.TB) *issuer {
	t.Helper()
	i := &issuer{}
	mux := http.NewServeMux()
	mux.HandleFunc("/.well-known/openid-configuration", func(w http.ResponseWriter, _ *http.Request) {
		_ = json.NewEncoder(w).Encode(map[string]string{"issuer": i.URL, "jwks_uri": i.URL + "/keys"})
	})
	mux.HandleFunc("/keys", func(w http.ResponseWriter, _ *http.Request) {
		i.fetches.Add(1)
		if i.broken.Load() {
			http.Error(w, "no", http.StatusBadGateway)
			return
		}
		i.mu.Lock()
		defer i.mu.Unlock()
		_ = json.NewEncoder(w).Encode(map[string]any{"keys": i.keys})
	})
	i.Server = httptest.NewTLSServer(mux)
	t.Cleanup(i.Close)
	return i
}

func (i *issuer) publish(keys ...any) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.keys = keys
}

func (i *issuer) file(more string) string {
	ca := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: i.Certificate().Raw}))
	return fmt.Sprintf("issuer = %q\naudience = \"touchmark\"\nca = '''\n%s'''\n%s", i.URL, ca, more)
}

const roles = `
[[roles]]
claim = "roles"
value = "operator"
scope = "plant-a"
rights = "EnrollmentWrite, ServiceConfig"
[[roles]]
claim = "realm_access.roles"
value = "admin"
scope = "*"
rights = "ManagementWrite, ManagementKeys"
[[roles]]
claim = "scp"
value = "dps.read"
scope = "plant-b"
rights = "EnrollmentRead"
`

func (i *issuer) authenticator(t testing.TB, clock func() time.Time) *access.Authenticator {
	t.Helper()
	o, err := access.ParseOIDC([]byte(i.file(roles)))
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256([]byte("the management token"))
	return access.New(access.Config{Management: &sum, OIDC: o, Now: clock})
}

func sign(t testing.TB, alg jose.SignatureAlgorithm, key any, id string, claims map[string]any) string {
	t.Helper()
	s, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: jose.JSONWebKey{Key: key, KeyID: id}}, (&jose.SignerOptions{}).WithType("JWT"))
	if err != nil {
		t.Fatal(err)
	}
	text, err := jwt.Signed(s).Claims(claims).Serialize()
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func request(token string) *http.Request {
	r := httptest.NewRequest("GET", "/", nil)
	if token != "" {
		r.Header.Set("Authorization", token)
	}
	return r
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func TestOIDC(t *testing.T) {
	i := newIssuer(t)
	key, foreign := newKey(t), newKey(t)
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	strong, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	secret := []byte(strings.Repeat("k", 64))
	i.publish(
		jose.JSONWebKey{Key: key.Public(), KeyID: "ec", Use: "sig", Algorithm: "ES256"},
		jose.JSONWebKey{Key: strong.Public(), KeyID: "rsa", Use: "sig"},
		jose.JSONWebKey{Key: weak.Public(), KeyID: "weak", Use: "sig"},
		jose.JSONWebKey{Key: key.Public(), KeyID: "for encryption", Use: "enc"},
		jose.JSONWebKey{Key: secret, KeyID: "secret", Use: "sig"},
		map[string]any{"kty": "of another kind", "kid": "other"},
	)
	a := i.authenticator(t, func() time.Time { return now })
	claims := func(edit ...func(map[string]any)) map[string]any {
		c := map[string]any{"iss": i.URL, "aud": []string{"other", "touchmark"}, "sub": "alice", "exp": now.Add(time.Hour).Unix(), "nbf": now.Add(-time.Hour).Unix(), "roles": []string{"x", "operator"}}
		for _, e := range edit {
			e(c)
		}
		return c
	}
	set := func(name string, v any) func(map[string]any) {
		return func(c map[string]any) {
			if c[name] = v; v == nil {
				delete(c, name)
			}
		}
	}
	good := sign(t, jose.ES256, key, "ec", claims())
	part := strings.Split(good, ".")
	unsigned := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none"}`)) + "." + part[1] + "."

	for name, x := range map[string]struct {
		token string
		want  string // what it may in plant-a; "-" for a refusal
	}{
		"good":               {good, "EnrollmentRead"},
		"RSA":                {sign(t, jose.RS256, strong, "rsa", claims()), "EnrollmentRead"},
		"PSS":                {sign(t, jose.PS256, strong, "rsa", claims()), "EnrollmentRead"},
		"one audience":       {sign(t, jose.ES256, key, "ec", claims(set("aud", "touchmark"))), "EnrollmentRead"},
		"just expired":       {sign(t, jose.ES256, key, "ec", claims(set("exp", now.Add(-30*time.Second).Unix()))), "EnrollmentRead"},
		"one role as text":   {sign(t, jose.ES256, key, "ec", claims(set("roles", "operator"))), "EnrollmentRead"},
		"no role":            {sign(t, jose.ES256, key, "ec", claims(set("roles", nil))), ""},
		"part of a role":     {sign(t, jose.ES256, key, "ec", claims(set("roles", "operators"))), ""},
		"role of a number":   {sign(t, jose.ES256, key, "ec", claims(set("roles", 5))), ""},
		"a management role":  {sign(t, jose.ES256, key, "ec", claims(set("roles", nil), set("realm_access", map[string]any{"roles": []string{"admin"}}))), "ManagementRead"},
		"of another scope":   {sign(t, jose.ES256, key, "ec", claims(set("roles", nil), set("scp", "openid dps.read"))), ""},
		"expired":            {sign(t, jose.ES256, key, "ec", claims(set("exp", now.Add(-2*time.Minute).Unix()))), "-"},
		"not yet":            {sign(t, jose.ES256, key, "ec", claims(set("nbf", now.Add(2*time.Minute).Unix()))), "-"},
		"of the future":      {sign(t, jose.ES256, key, "ec", claims(set("iat", now.Add(time.Hour).Unix()))), "-"},
		"no expiry":          {sign(t, jose.ES256, key, "ec", claims(set("exp", nil))), "-"},
		"no subject":         {sign(t, jose.ES256, key, "ec", claims(set("sub", nil))), "-"},
		"another issuer":     {sign(t, jose.ES256, key, "ec", claims(set("iss", i.URL+"/"))), "-"},
		"no issuer":          {sign(t, jose.ES256, key, "ec", claims(set("iss", nil))), "-"},
		"another audience":   {sign(t, jose.ES256, key, "ec", claims(set("aud", "touchmark2"))), "-"},
		"no audience":        {sign(t, jose.ES256, key, "ec", claims(set("aud", nil))), "-"},
		"another key":        {sign(t, jose.ES256, foreign, "ec", claims()), "-"},
		"unknown key":        {sign(t, jose.ES256, key, "nobody's", claims()), "-"},
		"no key":             {sign(t, jose.ES256, key, "", claims()), "-"},
		"key for encryption": {sign(t, jose.ES256, key, "for encryption", claims()), "-"},
		"weak key":           {sign(t, jose.RS256, weak, "weak", claims()), "-"},
		"a secret":           {sign(t, jose.HS256, secret, "secret", claims()), "-"},
		"public as a secret": {sign(t, jose.HS256, []byte("as long as a key must be, to be one of those"), "ec", claims()), "-"},
		"none":               {unsigned, "-"},
		"changed":            {part[0] + "." + base64.RawURLEncoding.EncodeToString([]byte(`{"sub":"mallory"}`)) + "." + part[2], "-"},
		"cut":                {part[0] + "." + part[1], "-"},
		"no token":           {"x", "-"},
		"huge":               {strings.Repeat("x", 20<<10), "-"},
	} {
		p, err := a.Authenticate(request("Bearer " + x.token))
		if err != nil {
			if x.want != "-" {
				t.Errorf("%s: %v", name, err)
			}
			if len(x.token) > 20 && strings.Contains(err.Error(), x.token[:20]) {
				t.Errorf("%s: the error shows the token", name)
			}
			continue
		}
		for _, r := range []access.Right{access.EnrollmentRead, access.ManagementRead} {
			if p.Name != "oidc alice" || p.May("plant-a", r) != (x.want == r.String()) {
				t.Errorf("%s: %q, %s: %t", name, p.Name, r, p.May("plant-a", r))
			}
		}
		if x.want == "-" {
			t.Errorf("%s is %+v", name, p)
		}
	}
	for _, none := range []string{"", "SharedAccessSignature sr=x&sig=y&se=1", "Bearer", "Bearer  ", "Basic x"} {
		if _, err := a.Authenticate(request(none)); !errors.Is(err, access.ErrNoBearer) {
			t.Errorf("%q: %v", none, err)
		}
	}
	twice := request("Bearer " + good)
	twice.Header.Add("Authorization", "Bearer "+good)
	if _, err := a.Authenticate(twice); err == nil {
		t.Error("two tokens are one too many")
	}
	if p, err := a.Authenticate(request("bearer the management token")); err != nil || !p.May("", access.Everything) {
		t.Errorf("%+v, %v", p, err)
	}
	if _, err := access.New(access.Config{}).Authenticate(request("Bearer " + good)); err == nil || errors.Is(err, access.ErrNoBearer) {
		t.Errorf("without an identity provider: %v", err)
	}
}

// Keys roll; names that nobody has cause few fetches; a provider that is away is waited for with the keys that are known.
func TestKeys(t *testing.T) {
	i := newIssuer(t)
	first, second := newKey(t), newKey(t)
	var offset atomic.Int64
	clock := func() time.Time { return now.Add(time.Duration(offset.Load())) }
	a := i.authenticator(t, clock)
	token := func(k *ecdsa.PrivateKey, id string) string {
		return "Bearer " + sign(t, jose.ES256, k, id, map[string]any{"iss": i.URL, "aud": "touchmark", "sub": "alice", "exp": now.Add(100 * time.Hour).Unix()})
	}
	ask := func(token string) error {
		_, err := a.Authenticate(request(token))
		return err
	}
	i.broken.Store(true)
	for range 3 {
		if err := ask(token(first, "1")); !errors.Is(err, access.ErrUnavailable) {
			t.Errorf("without keys: %v", err)
		}
	}
	if n := i.fetches.Load(); n != 1 {
		t.Errorf("%d fetches", n)
	}
	i.broken.Store(false)
	i.publish(jose.JSONWebKey{Key: first.Public(), KeyID: "1"})
	offset.Add(int64(11 * time.Second))
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if err := ask(token(first, "1")); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := i.fetches.Load(); n != 2 {
		t.Errorf("%d fetches", n)
	}
	if err := ask(token(first, "")); err != nil {
		t.Errorf("the only key needs no name: %v", err)
	}
	for n := range 50 {
		if err := ask(token(second, fmt.Sprint("made up ", n))); err == nil || errors.Is(err, access.ErrUnavailable) {
			t.Errorf("a key that nobody has: %v", err)
		}
	}
	if n := i.fetches.Load(); n != 2 {
		t.Errorf("%d fetches for names that nobody has", n)
	}
	i.publish(jose.JSONWebKey{Key: second.Public(), KeyID: "2"})
	offset.Add(int64(11 * time.Second))
	if err := ask(token(second, "2")); err != nil {
		t.Errorf("a new key: %v", err)
	}
	if err := ask(token(first, "1")); err == nil {
		t.Error("a key that was withdrawn")
	}
	i.broken.Store(true)
	offset.Add(int64(2 * time.Hour))
	if err := ask(token(second, "2")); err != nil {
		t.Errorf("while the provider is away: %v", err)
	}
	offset.Add(int64(25 * time.Hour))
	if err := ask(token(second, "2")); !errors.Is(err, access.ErrUnavailable) {
		t.Errorf("when it has been away for long: %v", err)
	}
}

// What a provider answers is bounded, and must be what was asked for.
func TestHostileProvider(t *testing.T) {
	for name, answer := range map[string]string{
		"another issuer": `{"issuer":"https://other.example","jwks_uri":"https://127.0.0.1:1/keys"}`,
		"keys in clear":  `{"issuer":"%s","jwks_uri":"http://keys.example/keys"}`,
		"no JSON":        `<html>`,
		"endless":        `"` + strings.Repeat("x", 2<<20) + `"`,
		"no keys":        `{"issuer":"%s","jwks_uri":"%[1]s/none","keys":[]}`,
		"too many keys":  `{"issuer":"%s","jwks_uri":"%[1]s/none","keys":[` + strings.Repeat("{},", 101) + `{}]}`,
	} {
		var s *httptest.Server
		s = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			_, _ = w.Write([]byte(strings.NewReplacer("%s", s.URL, "%[1]s", s.URL).Replace(answer)))
		}))
		defer s.Close()
		o, err := access.ParseOIDC(fmt.Appendf(nil, "issuer = %q\naudience = \"a\"\n%s", s.URL, roles))
		if err != nil {
			t.Fatal(err)
		}
		_, err = access.New(access.Config{OIDC: o}).Authenticate(request("Bearer " + sign(t, jose.ES256, newKey(t), "1", map[string]any{"sub": "x"})))
		if !errors.Is(err, access.ErrUnavailable) {
			t.Errorf("%s: %v", name, err)
		}
	}
	from := httptest.NewServer(http.RedirectHandler("http://127.0.0.1:1/", http.StatusFound))
	defer from.Close()
	o, err := access.ParseOIDC(fmt.Appendf(nil, "issuer = %q\naudience = \"a\"\n%s", from.URL, roles))
	if err != nil {
		t.Fatal(err)
	}
	_, err = access.New(access.Config{OIDC: o}).Authenticate(request("Bearer " + sign(t, jose.ES256, newKey(t), "1", map[string]any{"sub": "x"})))
	if !errors.Is(err, access.ErrUnavailable) || !strings.Contains(err.Error(), "redirects") {
		t.Errorf("a redirect: %v", err)
	}
}

func TestParseOIDC(t *testing.T) {
	good := "issuer = \"https://id.example\"\naudience = \"a\"\n" + roles
	if o, err := access.ParseOIDC([]byte(good)); err != nil || len(o.Roles) != 3 {
		t.Errorf("%+v, %v", o, err)
	}
	for name, text := range map[string]string{
		"nothing":        "",
		"no roles":       "issuer = \"https://id.example\"\naudience = \"a\"\n",
		"no audience":    "issuer = \"https://id.example\"\n" + roles,
		"in clear":       strings.Replace(good, "https://id", "http://id", 1),
		"with a query":   strings.Replace(good, "id.example", "id.example?x=y", 1),
		"a password":     strings.Replace(good, "id.example", "u:p@id.example", 1),
		"unknown member": good + "\n[more]\nx = 1\n",
		"unknown right":  strings.Replace(good, "EnrollmentRead", "Enrollment", 1),
		"empty value":    strings.Replace(good, `"operator"`, `""`, 1),
		"no scope":       strings.Replace(good, `scope = "plant-a"`, "", 1),
		"keys in clear":  "keys = \"http://id.example/keys\"\n" + good,
		"a CA of none":   "ca = \"x\"\n" + good,
	} {
		if o, err := access.ParseOIDC([]byte(text)); err == nil {
			t.Errorf("%s: %+v", name, o)
		}
	}
}

func FuzzAuthenticate(f *testing.F) {
	i := newIssuer(f)
	key := newKey(f)
	i.publish(jose.JSONWebKey{Key: key.Public(), KeyID: "1"})
	a := i.authenticator(f, func() time.Time { return now })
	good := sign(f, jose.ES256, key, "1", map[string]any{"iss": i.URL, "aud": "touchmark", "sub": "alice", "exp": now.Add(time.Hour).Unix()})
	f.Add("Bearer " + good)
	f.Add("Bearer " + strings.Replace(good, ".", "..", 1))
	f.Add("Bearer " + base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none"}`)) + ".e30.")
	f.Add("bearer  x")
	f.Fuzz(func(t *testing.T, text string) {
		r := request("")
		r.Header["Authorization"] = []string{text}
		_, err := a.Authenticate(r)
		if _, token, _ := strings.Cut(text, " "); err == nil && strings.TrimSpace(token) != good {
			h, p, s, _ := split(token)
			gh, gp, gs, _ := split(good)
			if h != gh || p != gp || s != gs { // base64 has several spellings of its last octet
				t.Fatalf("%q is somebody", text)
			}
		}
	})
}

// split decodes the three parts of a token.
func split(token string) (header, payload, signature string, err error) {
	parts := strings.SplitN(strings.TrimSpace(token), ".", 3)
	var out [3]string
	for i, p := range parts {
		b, err := base64.RawURLEncoding.DecodeString(p)
		if err != nil {
			return "", "", "", err
		}
		out[i] = string(b)
	}
	return out[0], out[1], out[2], nil
}
