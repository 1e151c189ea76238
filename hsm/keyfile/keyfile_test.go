package keyfile_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/hsmtest"
	"github.com/touchmark/touchmark/hsm/keyfile"
)

func TestMain(m *testing.M) {
	keyfile.TestWorkFactor(10)
	os.Exit(m.Run())
}

func pass(s string) func(context.Context) (hsm.Secret, error) {
	return func(context.Context) (hsm.Secret, error) { return hsm.Secret(s), nil }
}

func create(t testing.TB) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "keys")
	if err := keyfile.Create(dir, hsm.Secret("words")); err != nil {
		t.Fatal(err)
	}
	return dir
}

func open(t testing.TB, dir string) *keyfile.Store {
	t.Helper()
	s, err := keyfile.Open(t.Context(), keyfile.Config{Dir: dir, Passphrase: pass("words")})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestContract(t *testing.T) {
	dir := create(t)
	hsmtest.Run(t, hsmtest.Suite{Cannot: []hsm.Algorithm{hsm.AES256}, Open: func(t *testing.T) hsm.Store { return open(t, dir) }})
}

func TestPassphrase(t *testing.T) {
	dir := create(t)
	if _, err := keyfile.Open(t.Context(), keyfile.Config{Dir: dir, Passphrase: pass("other words")}); !errors.Is(err, hsm.ErrPINIncorrect) {
		t.Errorf("wrong passphrase: %v", err)
	}
	if err := keyfile.Create(dir, hsm.Secret("again")); err == nil {
		t.Error("created a store over another")
	}
	open(t, dir) // and the first one is as it was
	if _, err := keyfile.Open(t.Context(), keyfile.Config{Dir: t.TempDir(), Passphrase: pass("words")}); !errors.Is(err, hsm.ErrNotFound) {
		t.Errorf("no store there: %v", err)
	}
}

// Every octet of a key file is checked, no secret is in it, and a file does not serve under another name.
func TestKeyFiles(t *testing.T) {
	dir := create(t)
	s := open(t, dir)
	secret := hsm.Secret("0123456789abcdef0123456789abcdef")
	if _, err := s.Import(t.Context(), hsm.Spec{Name: "group:key", Algorithm: hsm.HMACSHA256}, secret); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var path string
	for _, e := range entries {
		info, _ := e.Info()
		if info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v", e.Name(), info.Mode())
		}
		if strings.HasSuffix(e.Name(), ".key") {
			path = filepath.Join(dir, e.Name())
		}
	}
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(whole, secret) {
		t.Error("the key stands in the file")
	}
	for i := range whole {
		if i == len(whole)-1 {
			break // the closing line feed
		}
		bad := bytes.Clone(whole)
		bad[i] ^= 1
		if err := os.WriteFile(path, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		if k, err := s.Open(t.Context(), "group:key"); err == nil {
			t.Fatalf("octet %d changed (%q) and the key %s opens", i, whole[i], k.Name())
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "other.key"), whole, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Open(t.Context(), "other"); err == nil {
		t.Error("a copied key file serves under another name")
	}
}

// A key file is bytes from a disk: what opens is a key of that name that works, whatever was changed in it.
func FuzzOpen(f *testing.F) {
	dir := create(f)
	s := open(f, dir)
	if _, err := s.Generate(f.Context(), hsm.Spec{Name: "k", Algorithm: hsm.ECP256}); err != nil {
		f.Fatal(err)
	}
	path := filepath.Join(dir, "k.key")
	good, err := os.ReadFile(path)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(bytes.ToUpper(good))
	f.Add([]byte(`{"version":1,"name":"k","sealed":"AAAA"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		k, err := s.Open(t.Context(), "k")
		if err != nil {
			return
		}
		if _, err := hsm.SigningKeyOf(k); err != nil || k.Name() != "k" || k.Algorithm() != hsm.ECP256 {
			t.Fatalf("%q opens as %q, %s", b, k.Name(), k.Algorithm())
		}
	})
}
