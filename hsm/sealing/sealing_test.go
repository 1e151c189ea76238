package sealing_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"path/filepath"
	"strings"
	"testing"

	"filippo.io/age"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/hsmtest"
	"github.com/touchmark/touchmark/hsm/keyfile"
	"github.com/touchmark/touchmark/hsm/pkcs11"
	"github.com/touchmark/touchmark/hsm/sealing"
)

func pass(context.Context) (hsm.Secret, error) { return hsm.Secret(hsmtest.PIN), nil }

func files(t testing.TB) hsm.Store {
	t.Helper()
	keyfile.TestWorkFactor(10)
	dir := filepath.Join(t.TempDir(), "keys")
	if err := keyfile.Create(dir, hsm.Secret(hsmtest.PIN)); err != nil {
		t.Fatal(err)
	}
	s, err := keyfile.Open(context.Background(), keyfile.Config{Dir: dir, Passphrase: pass})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func agreement(t testing.TB, s hsm.Store, name string) hsm.AgreementKey {
	t.Helper()
	k, err := s.Generate(t.Context(), hsm.Spec{Name: name, Algorithm: hsm.ECP256, Usage: hsm.Agree})
	if err != nil {
		t.Fatal(err)
	}
	a, err := hsm.AgreementKeyOf(k)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func seal(t *testing.T, to string, text string) []byte {
	t.Helper()
	r, err := sealing.ParseRecipient(to)
	if err != nil {
		t.Fatal(err)
	}
	var buf bytes.Buffer
	w, err := age.Encrypt(&buf, r)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(w, text); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func open(sealed []byte, id age.Identity) (string, error) {
	r, err := age.Decrypt(bytes.NewReader(sealed), id)
	if err != nil {
		return "", err
	}
	b, err := io.ReadAll(r)
	return string(b), err
}

func TestSealing(t *testing.T) {
	token, err := pkcs11.Open(t.Context(), pkcs11.Config{URI: hsmtest.SoftHSM(t, "line-3"), PIN: pass})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = token.Close() })
	for name, store := range map[string]hsm.Store{"key files": files(t), "token": token} {
		t.Run(name, func(t *testing.T) {
			mine, other := agreement(t, store, "recipient"), agreement(t, store, "other")
			to, err := sealing.Recipient(mine)
			if err != nil {
				t.Fatal(err)
			}
			if !strings.HasPrefix(to, "age1tag1") {
				t.Errorf("recipient %s", to)
			}
			sealed := seal(t, to, "the group key")
			if text, err := open(sealed, sealing.Identity(mine)); err != nil || text != "the group key" {
				t.Errorf("%q, %v", text, err)
			}
			var none *age.NoIdentityMatchError
			if _, err := open(sealed, sealing.Identity(other)); !errors.As(err, &none) {
				t.Errorf("another key: %v", err)
			}
			for i := range sealed {
				bad := bytes.Clone(sealed)
				bad[i] ^= 1
				if text, err := open(bad, sealing.Identity(mine)); err == nil {
					t.Fatalf("octet %d changed and it opens: %q", i, text)
				}
			}
		})
	}
}

func TestParseRecipient(t *testing.T) {
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	if text, err := open(seal(t, id.Recipient().String(), "x"), id); err != nil || text != "x" {
		t.Errorf("an age key: %q, %v", text, err)
	}
	for _, bad := range []string{"", "age1", "AGE-SECRET-KEY-1", id.Recipient().String() + "\n" + id.Recipient().String(), strings.Repeat("a", 5000)} {
		if _, err := sealing.ParseRecipient(bad); err == nil {
			t.Errorf("%.30q parses", bad)
		}
	}
}
