//go:build !cgo

package pkcs11

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/touchmark/touchmark/hsm"
)

// Config says which token to open and how.
type Config struct {
	URI         hsm.URI
	PIN         func(context.Context) (hsm.Secret, error)
	Sessions    int
	Log         *slog.Logger
	Patience    time.Duration
	CallTimeout time.Duration
}

// Store is a PKCS#11 token. This build has none.
type Store struct{ hsm.Store }

// Open answers hsm.ErrUnsupported: PKCS#11 modules are C libraries, which a build without cgo cannot load.
func Open(context.Context, Config) (*Store, error) {
	return nil, errNoCgo
}

var errNoCgo = fmt.Errorf("this build of touchmark cannot load PKCS#11 modules; the one built with cgo can: %w", hsm.ErrUnsupported)

// Inspect answers hsm.ErrUnsupported.
func Inspect(context.Context, hsm.URI) (*Module, error) { return nil, errNoCgo }

// Examine answers hsm.ErrUnsupported.
func Examine(context.Context, hsm.URI) (*Module, *Token, []Capability, error) {
	return nil, nil, nil, errNoCgo
}

// Init answers hsm.ErrUnsupported.
func Init(context.Context, InitConfig) (Token, error) { return Token{}, errNoCgo }

// Token answers hsm.ErrUnsupported.
func (s *Store) Token(context.Context) (Token, error) { return Token{}, errNoCgo }

// Objects answers hsm.ErrUnsupported.
func (s *Store) Objects(context.Context) (Objects, error) { return Objects{}, errNoCgo }

// Capabilities answers hsm.ErrUnsupported.
func (*Store) Capabilities(context.Context) ([]Capability, error) { return nil, errNoCgo }

// Explain answers false: without modules there is no token whose answer it could be.
func Explain(error) (meaning, try string, ok bool) { return "", "", false }
