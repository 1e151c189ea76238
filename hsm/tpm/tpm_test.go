package tpm_test

import (
	"context"
	"testing"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/hsmtest"
	"github.com/touchmark/touchmark/hsm/tpm"
)

func open(t testing.TB, uri hsm.URI) *tpm.Store {
	t.Helper()
	s, err := tpm.Open(t.Context(), tpm.Config{URI: uri})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func secret(s string) func(context.Context) (hsm.Secret, error) {
	return func(context.Context) (hsm.Secret, error) { return hsm.Secret(s), nil }
}

// swtpm refuses RSA 4096 and, as Debian builds libtpms, takes RSA 3072.
var cannot = []hsm.Algorithm{hsm.RSA4096, hsm.Ed25519}

func TestContract(t *testing.T) {
	s := hsmtest.SWTPM(t)
	hsmtest.Run(t, hsmtest.Suite{
		Open:   func(t *testing.T) hsm.Store { return open(t, s.URI()) },
		Cannot: cannot, Hardware: true,
	})
}
