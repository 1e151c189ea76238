package access

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/pelletier/go-toml/v2"
)

// OIDC is an identity provider whose tokens count, and what its claims are worth. It is the --oidc file.
type OIDC struct {
	// Issuer is the provider, exactly as its tokens name it: an https URL, or http to this machine itself.
	Issuer string `toml:"issuer"`
	// Audience is what its tokens must be for.
	Audience string `toml:"audience"`
	// Keys is where its public keys are (JWKS); empty: where its discovery document says.
	Keys string `toml:"keys"`
	// CA is PEM of roots that its TLS certificate is checked against; empty: the system's.
	CA string `toml:"ca"`
	// Roles are what claims are worth. A token may have several; one that has none may nothing.
	Roles []Role `toml:"roles"`
}

// A Role gives rights to who has a value in a claim.
type Role struct {
	// Claim is the claim's name; a dot descends into an object where there is no claim of the whole name.
	Claim string `toml:"claim"`
	// Value is what the claim is, or has among its items, or among its words where they stand in one string.
	Value string `toml:"value"`
	// Scope is the name of a provisioning service, or "*" for every one.
	Scope string `toml:"scope"`
	// Rights are some of the rights of shared access policies, AttestationDetails, ManagementRead, ManagementWrite and
	// ManagementKeys.
	Rights string `toml:"rights"`

	rights Right
}

const maxRoles = 1000

// ParseOIDC reads the --oidc file. Unknown members are refused.
func ParseOIDC(text []byte) (*OIDC, error) {
	o := &OIDC{}
	if err := toml.NewDecoder(strings.NewReader(string(text))).DisallowUnknownFields().Decode(o); err != nil {
		var strict *toml.StrictMissingError
		if errors.As(err, &strict) && len(strict.Errors) > 0 {
			return nil, fmt.Errorf("there is no %s", strings.Join(strict.Errors[0].Key(), "."))
		}
		return nil, err
	}
	if err := checkURL("issuer", o.Issuer); err != nil {
		return nil, err
	}
	if o.Keys != "" {
		if err := checkURL("keys", o.Keys); err != nil {
			return nil, err
		}
	}
	if o.Audience == "" {
		return nil, errors.New("audience is missing")
	}
	if o.CA != "" && !x509.NewCertPool().AppendCertsFromPEM([]byte(o.CA)) {
		return nil, errors.New("ca holds no certificate in PEM")
	}
	if len(o.Roles) == 0 || len(o.Roles) > maxRoles {
		return nil, fmt.Errorf("%d roles, want 1 to %d", len(o.Roles), maxRoles)
	}
	for i := range o.Roles {
		r := &o.Roles[i]
		if r.Claim == "" || r.Value == "" || r.Scope == "" {
			return nil, fmt.Errorf("role %d: want claim, value, scope and rights", i+1)
		}
		var err error
		if r.rights, err = ParseRights(r.Rights, Everything); err != nil {
			return nil, fmt.Errorf("role %d: %w", i+1, err)
		}
	}
	return o, nil
}

// checkURL takes https URLs, and http ones of the loopback interface.
func checkURL(what, text string) error {
	u, err := url.Parse(text)
	if err != nil || u.Host == "" || u.User != nil || u.RawQuery != "" && what == "issuer" || u.Fragment != "" {
		return fmt.Errorf("%s %q is not an https URL", what, text)
	}
	ip := net.ParseIP(u.Hostname())
	if u.Scheme != "https" && !(u.Scheme == "http" && (ip != nil && ip.IsLoopback() || u.Hostname() == "localhost")) {
		return fmt.Errorf("%s %q is not an https URL", what, text)
	}
	return nil
}

// algorithms are those that a token may be signed with. A symmetric one, or none, is never among them.
var algorithms = []jose.SignatureAlgorithm{jose.RS256, jose.RS384, jose.RS512, jose.PS256, jose.PS384, jose.PS512, jose.ES256, jose.ES384, jose.ES512, jose.EdDSA}

// Skew is how far the provider's clock may be from ours.
const Skew = time.Minute

// verify returns whose token it is: signed by the provider, for us, now.
func (a *Authenticator) verify(ctx context.Context, text string) (*Principal, error) {
	token, err := jwt.ParseSigned(text, algorithms)
	if err != nil {
		return nil, errors.New("the bearer token is not a JWT with an algorithm that is allowed") // go-jose's error may quote it
	}
	if len(token.Headers) != 1 {
		return nil, errors.New("the bearer token has more than one signature")
	}
	key, err := a.keys.find(ctx, token.Headers[0].KeyID)
	if err != nil {
		return nil, err
	}
	if key.Algorithm != "" && key.Algorithm != token.Headers[0].Algorithm {
		return nil, errors.New("the bearer token's algorithm is not that of its key")
	}
	var claims jwt.Claims
	all := make(map[string]any)
	if err := token.Claims(key.Key, &claims, &all); err != nil {
		return nil, errors.New("the bearer token's signature is wrong, or its claims are no JSON")
	}
	if claims.Expiry == nil || claims.Subject == "" {
		return nil, errors.New("the bearer token has no exp, or no sub")
	}
	if err := claims.ValidateWithLeeway(jwt.Expected{Issuer: a.cfg.OIDC.Issuer, AnyAudience: jwt.Audience{a.cfg.OIDC.Audience}, Time: a.cfg.Now()}, Skew); err != nil {
		return nil, fmt.Errorf("bearer token of %.100q: %w", claims.Subject, err)
	}
	p := &Principal{Name: "oidc " + clip(claims.Subject)}
	for _, r := range a.cfg.OIDC.Roles {
		if has(all, r.Claim, r.Value) {
			p.Grants = append(p.Grants, Grant{r.Scope, r.rights})
		}
	}
	return p, nil
}

// clip bounds a name for the audit record, and keeps it on one line.
func clip(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return '?'
		}
		return r
	}, s)
	return s[:min(len(s), 256)]
}

// has reports whether a claim is, or holds, a value.
func has(claims map[string]any, name, value string) bool {
	v, ok := claims[name]
	for !ok {
		head, rest, dotted := strings.Cut(name, ".")
		inner, object := claims[head].(map[string]any)
		if !dotted || !object {
			return false
		}
		claims, name = inner, rest
		v, ok = claims[name]
	}
	switch v := v.(type) {
	case string:
		return v == value || slices.Contains(strings.Fields(v), value)
	case []any:
		return slices.Contains(v, any(value))
	}
	return false
}

// Bounds of what is fetched.
const (
	maxFetched  = 1 << 20
	maxKeys     = 100
	fetchTime   = 10 * time.Second
	fetchPause  = 10 * time.Second // between two fetches, whatever tokens name
	keyLifetime = time.Hour        // after which keys are fetched again
	keyDeadline = 24 * time.Hour   // after which keys that could not be fetched again count no more
)

// A keySet has the provider's public keys.
type keySet struct {
	oidc   *OIDC
	client *http.Client
	now    func() time.Time

	mu      sync.Mutex
	keys    []jose.JSONWebKey
	fetched time.Time     // when they came
	tried   time.Time     // when the last fetch ended
	failed  error         // how it did
	under   chan struct{} // closed when the one under way ends; nil for none
}

func newKeySet(o *OIDC, client *http.Client, now func() time.Time) *keySet {
	if client == nil {
		t := &http.Transport{Proxy: http.ProxyFromEnvironment, TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12}}
		if o.CA != "" {
			t.TLSClientConfig.RootCAs = x509.NewCertPool()
			t.TLSClientConfig.RootCAs.AppendCertsFromPEM([]byte(o.CA))
		}
		client = &http.Client{Transport: t}
	}
	c := *client
	c.Timeout = fetchTime
	c.CheckRedirect = func(r *http.Request, _ []*http.Request) error { return errors.New("the identity provider redirects") }
	return &keySet{oidc: o, client: &c, now: now}
}

// find returns the key that a token names, or the only one for a token that names none. Keys are fetched when there are none
// that are fresh, and for an unknown name, but not more often than every fetchPause: anybody can make names up.
func (s *keySet) find(ctx context.Context, id string) (*jose.JSONWebKey, error) {
	for range 3 {
		s.mu.Lock()
		now := s.now()
		if now.Sub(s.fetched) > keyDeadline {
			s.keys = nil
		}
		key := s.named(id)
		fresh := key != nil && now.Sub(s.fetched) < keyLifetime
		paused := s.under == nil && now.Sub(s.tried) < fetchPause
		switch under := s.under; {
		case fresh, key != nil && under != nil, key != nil && paused:
			s.mu.Unlock()
			return key, nil
		case paused:
			none, failed := len(s.keys) == 0, s.failed
			s.mu.Unlock()
			if none {
				return nil, fmt.Errorf("%w: %w", ErrUnavailable, failed)
			}
			return nil, fmt.Errorf("the bearer token names key %.100q, which the identity provider has not", id)
		case under != nil:
			s.mu.Unlock()
			select {
			case <-under:
			case <-ctx.Done():
				return nil, fmt.Errorf("%w: %w", ErrUnavailable, ctx.Err())
			}
		default:
			s.under = make(chan struct{})
			s.mu.Unlock()
			s.fetch(context.WithoutCancel(ctx)) // others wait for it too
		}
	}
	return nil, fmt.Errorf("%w: they keep being fetched", ErrUnavailable)
}

// named finds a key; the lock is held.
func (s *keySet) named(id string) *jose.JSONWebKey {
	if id == "" && len(s.keys) == 1 {
		return &s.keys[0]
	}
	for i := range s.keys {
		if id != "" && s.keys[i].KeyID == id {
			return &s.keys[i]
		}
	}
	return nil
}

func (s *keySet) fetch(ctx context.Context) {
	keys, err := s.load(ctx)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failed, s.tried = err, s.now()
	if err == nil {
		s.keys, s.fetched = keys, s.tried
	}
	close(s.under)
	s.under = nil
}

func (s *keySet) load(ctx context.Context) ([]jose.JSONWebKey, error) {
	at := s.oidc.Keys
	if at == "" {
		var d struct {
			Issuer  string `json:"issuer"`
			JWKSURI string `json:"jwks_uri"`
		}
		if err := s.get(ctx, strings.TrimSuffix(s.oidc.Issuer, "/")+"/.well-known/openid-configuration", &d); err != nil {
			return nil, err
		}
		if d.Issuer != s.oidc.Issuer { // OpenID Connect Discovery 1.0, section 4.3
			return nil, fmt.Errorf("the discovery document of %s is of issuer %.200q", s.oidc.Issuer, d.Issuer)
		}
		if err := checkURL("jwks_uri", d.JWKSURI); err != nil {
			return nil, err
		}
		at = d.JWKSURI
	}
	var set struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if err := s.get(ctx, at, &set); err != nil {
		return nil, err
	}
	if len(set.Keys) > maxKeys {
		return nil, fmt.Errorf("%s has %d keys, at most %d count", at, len(set.Keys), maxKeys)
	}
	var keys []jose.JSONWebKey
	for _, raw := range set.Keys {
		var k jose.JSONWebKey
		if k.UnmarshalJSON(raw) == nil && usable(&k) { // keys of other kinds, and for other uses, may be among them
			keys = append(keys, k)
		}
	}
	if len(keys) == 0 {
		return nil, fmt.Errorf("%s has no public key that signs", at)
	}
	return keys, nil
}

func usable(k *jose.JSONWebKey) bool {
	if k.Use != "" && k.Use != "sig" || !k.Valid() {
		return false
	}
	switch pub := k.Key.(type) {
	case *rsa.PublicKey:
		return pub.N.BitLen() >= 2048 && pub.N.BitLen() <= 8192
	case *ecdsa.PublicKey, ed25519.PublicKey:
		return true
	}
	return false
}

func (s *keySet) get(ctx context.Context, at string, v any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, at, nil)
	if err != nil {
		return err
	}
	req.Header.Set("Accept", "application/json")
	res, err := s.client.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("%s answered %s", at, res.Status)
	}
	b, err := io.ReadAll(io.LimitReader(res.Body, maxFetched+1))
	if err != nil {
		return fmt.Errorf("reading %s: %w", at, err)
	}
	if len(b) > maxFetched {
		return fmt.Errorf("%s has more than %d octets", at, maxFetched)
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("%s: %w", at, err)
	}
	return nil
}
