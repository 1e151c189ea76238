package emulate_test

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"encoding/hex"
	"testing"

	"github.com/touchmark/touchmark/pkg/emulate"
)

func TestSeed(t *testing.T) {
	one, err := emulate.NewSeed("one")
	if err != nil {
		t.Fatal(err)
	}
	two, _ := emulate.NewSeed("two")
	// These are pinned: devices have what comes of a seed burnt in.
	if got := hex.EncodeToString(one.Bytes("ID scope", 4)); got != "eefcf040" {
		t.Error(got)
	}
	if got := hex.EncodeToString(two.Bytes("ID scope", 4)); got != "ecb37561" {
		t.Error(got)
	}
	if bytes.Equal(one.Bytes("a", 32), one.Bytes("b", 32)) || bytes.Equal(emulate.Seed(nil).Bytes("a", 32), emulate.Seed(nil).Bytes("a", 32)) {
		t.Error("two secrets are the same")
	}
	id, err := one.Identity("recipient")
	if err != nil || id.Recipient().String() != "age178ujztlpx7qtlghjd28rqdmr5a47d50vj7j28xe4903ujz80u3ksyfllzy" {
		t.Errorf("%v, %v", id.Recipient(), err)
	}
	key, err := one.Key("CA")
	if err != nil {
		t.Fatal(err)
	}
	again, _ := one.Key("CA")
	other, _ := one.Key("other")
	if !key.Equal(again) || key.Equal(other) {
		t.Error("keys")
	}
	sum := sha256.Sum256([]byte("text"))
	sign := func(s emulate.Seed) []byte {
		b, err := s.Signer(key).Sign(nil, sum[:], crypto.SHA256)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	if !bytes.Equal(sign(one), sign(one)) {
		t.Error("a seed's signatures differ")
	}
	if k, err := emulate.Seed(nil).Key("CA"); err != nil || k.Equal(key) {
		t.Error(err)
	}
}
