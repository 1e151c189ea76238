package evidence_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"testing"
	"time"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/signed"
	"github.com/touchmark/touchmark/pkg/evidence"
)

func good() *evidence.Evidence {
	return &evidence.Evidence{Kind: evidence.Token, KeyHash: "ab",
		Attributes: &hsm.Attributes{Sensitive: true, Local: true, AlwaysSensitive: true, NeverExtractable: true, Hardware: true},
		Store:      &hsm.Identity{Label: "line-3", Serial: "77"}}
}

// Invariant 6: what a token does not vouch for is no evidence.
func TestCheck(t *testing.T) {
	if err := good().Check(evidence.Token, "pump-1", "ab"); err != nil {
		t.Fatal(err)
	}
	for name, spoil := range map[string]func(*evidence.Evidence){
		"another key":          func(e *evidence.Evidence) { e.KeyHash = "ac" },
		"imported":             func(e *evidence.Evidence) { e.Attributes.Local = false },
		"extractable":          func(e *evidence.Evidence) { e.Attributes.Extractable = true },
		"was extractable":      func(e *evidence.Evidence) { e.Attributes.NeverExtractable = false },
		"was not sensitive":    func(e *evidence.Evidence) { e.Attributes.AlwaysSensitive = false },
		"not sensitive":        func(e *evidence.Evidence) { e.Attributes.Sensitive = false },
		"key files":            func(e *evidence.Evidence) { e.Attributes.Hardware = false },
		"no attributes":        func(e *evidence.Evidence) { e.Attributes = nil },
		"no token":             func(e *evidence.Evidence) { e.Store = nil },
		"nameless token":       func(e *evidence.Evidence) { *e.Store = hsm.Identity{} },
		"kind that is empty":   func(e *evidence.Evidence) { e.Kind = "" },
		"kind that is a TPM":   func(e *evidence.Evidence) { e.Kind = evidence.TPM },
		"kind that is foreign": func(e *evidence.Evidence) { e.Kind = "enclave" },
	} {
		e := good()
		spoil(e)
		if err := e.Check(evidence.Token, "pump-1", "ab"); !errors.Is(err, evidence.ErrResidency) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := good().Check(evidence.TPM, "pump-1", "ab"); !errors.Is(err, evidence.ErrResidency) {
		t.Errorf("a token for a TPM: %v", err)
	}
	if err := good().Check(evidence.Token, "pump-1", ""); !errors.Is(err, evidence.ErrResidency) {
		t.Errorf("no key: %v", err)
	}
	var none *evidence.Evidence
	if err := none.Check(evidence.Token, "pump-1", "ab"); !errors.Is(err, evidence.ErrResidency) {
		t.Errorf("none: %v", err)
	}
}

func TestStatement(t *testing.T) {
	ec, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	other, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	_, ed, _ := ed25519.GenerateKey(rand.Reader)
	r, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	for _, station := range []crypto.Signer{ec, ed, r} {
		s := evidence.Statement{Made: time.Now().UTC(), Name: "k", Algorithm: "EC-P256", PublicKey: "PEM", Evidence: good()}
		b, err := s.Sign(station)
		if err != nil {
			t.Fatal(err)
		}
		got, id, err := evidence.Open(append(b, '\n'), []crypto.PublicKey{other.Public(), station.Public()})
		if want, _ := signed.KeyID(station.Public()); err != nil || id != want || got.Name != "k" || got.Evidence.Check(evidence.Token, "pump-1", "ab") != nil {
			t.Errorf("%T: %+v, %s, %v", station, got, id, err)
		}
		if _, _, err := evidence.Open(b, []crypto.PublicKey{other.Public()}); !errors.Is(err, signed.ErrUntrusted) {
			t.Errorf("%T, not trusted: %v", station, err)
		}
		// No octet can change.
		for i := range b {
			c := bytes.Clone(b)
			c[i] ^= 1
			if _, _, err := evidence.Open(c, []crypto.PublicKey{station.Public()}); err == nil {
				t.Fatalf("%T: octet %d changed unnoticed", station, i)
			}
		}
	}
}

func FuzzOpen(f *testing.F) {
	key, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	b, err := (&evidence.Statement{Name: "k", Evidence: good()}).Sign(key)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, in []byte) {
		if s, _, err := evidence.Open(in, []crypto.PublicKey{key.Public()}); err == nil && s.Name != "k" {
			t.Errorf("opened %q", in)
		}
	})
}
