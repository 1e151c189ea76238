package access

import (
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"
)

// Errors of [Authenticator.Authenticate] that callers branch on; every other is a token that proves nothing.
var (
	// ErrNoBearer says that the request has no bearer token.
	ErrNoBearer = errors.New("no bearer token")
	// ErrUnavailable says that the identity provider's keys are not to be had now.
	ErrUnavailable = errors.New("the identity provider's keys are not available")
)

// maxToken bounds a bearer token, in octets.
const maxToken = 12 << 10

// Config is what an Authenticator needs.
type Config struct {
	// Management is the SHA-256 of the token that may everything; nil for none.
	Management *[sha256.Size]byte
	// OIDC is the identity provider whose tokens count; nil for none.
	OIDC *OIDC
	// Client fetches its keys; nil for one of the system's roots, or of the provider's CA where it names one.
	Client *http.Client
	Now    func() time.Time
}

// An Authenticator makes principals of bearer tokens.
type Authenticator struct {
	cfg  Config
	keys *keySet
}

// New returns an authenticator.
func New(cfg Config) *Authenticator {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	a := &Authenticator{cfg: cfg}
	if cfg.OIDC != nil {
		a.keys = newKeySet(cfg.OIDC, cfg.Client, cfg.Now)
	}
	return a
}

// Authenticate returns whose bearer token a request has. The caller learns no more than that it was refused; the error is for the
// log, and shows no token. It may wait for the identity provider, for a bounded time.
func (a *Authenticator) Authenticate(r *http.Request) (*Principal, error) {
	headers := r.Header.Values("Authorization")
	if len(headers) != 1 {
		return nil, ErrNoBearer
	}
	scheme, token, _ := strings.Cut(headers[0], " ")
	if token = strings.TrimSpace(token); !strings.EqualFold(scheme, "Bearer") || token == "" {
		return nil, ErrNoBearer
	}
	if len(token) > maxToken {
		return nil, fmt.Errorf("a bearer token of more than %d octets", maxToken)
	}
	if m := a.cfg.Management; m != nil {
		if sum := sha256.Sum256([]byte(token)); subtle.ConstantTimeCompare(sum[:], m[:]) == 1 {
			return &Principal{Name: "management token", Grants: []Grant{{"*", Everything}}}, nil
		}
	}
	if a.keys == nil {
		return nil, errors.New("a bearer token that is not the management token, and no identity provider is known")
	}
	return a.verify(r.Context(), token)
}
