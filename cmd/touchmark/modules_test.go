package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/hsmtest"
)

// A line whose keys are in NSS's database, or in a TPM by way of tpm2-pkcs11: from init to a bundle that verifies, with the
// device keys in the token, too.
func TestLineOnOtherModules(t *testing.T) {
	for name, token := range map[string]func(*testing.T) hsm.URI{
		"NSS":         func(t *testing.T) hsm.URI { return hsmtest.NSS(t, "line-4") },
		"tpm2-pkcs11": func(t *testing.T) hsm.URI { uri, _ := hsmtest.TPM2(t, "line-4"); return uri },
	} {
		t.Run(name, func(t *testing.T) {
			dir := newLine(t, token(t))
			if err := os.WriteFile(filepath.Join(dir, "serials.csv"), serialList("SN", 5), 0o644); err != nil {
				t.Fatal(err)
			}
			touchmark(t, dir, "mint", "--line", "line", "--profile", "token", "--serials", "serials.csv", "--out", "stamps", "--bundle", "b.tmb")
			touchmark(t, dir, "bundle", "verify", "b.tmb", "--trust", "line/station.pem")
			if keys := touchmark(t, dir, "key", "list", "--line", "line", "--json"); strings.Count(keys, `"name":"device:`) != 5 {
				t.Errorf("keys:\n%s", keys)
			}
		})
	}
}

// Keys move between tokens of different makers on the command line, and the same secret is behind both.
func TestKeyMovesBetweenModules(t *testing.T) {
	soft, nss := hsmtest.SoftHSM(t, "line-3"), hsmtest.NSS(t, "line-4")
	dir := t.TempDir()
	shared := hsm.Secret(strings.Repeat("k", 32))
	for _, uri := range []hsm.URI{soft, nss} {
		giveKey(t, uri, hsm.Spec{Name: "mover", Algorithm: hsm.AES256}, shared)
	}
	made := touchmark(t, dir, "key", "new", "--store", soft.String(), "--name", "issuing", "--algorithm", "EC-P384", "--extractable", "--json")
	touchmark(t, dir, "key", "wrap", "--store", soft.String(), "--name", "issuing", "--with", "mover", "--out", "issuing.wrapped")
	back := touchmark(t, dir, "key", "unwrap", "--store", nss.String(), "--in", "issuing.wrapped", "--with", "mover", "--json")
	var a, b keyRow
	if err := json.Unmarshal([]byte(made), &a); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal([]byte(back), &b); err != nil {
		t.Fatal(err)
	}
	if a.PublicKey == "" || a.PublicKey != b.PublicKey || b.Attributes.Extractable || !b.Attributes.Sensitive {
		t.Errorf("%+v became %+v", a, b)
	}
	if text, err := os.ReadFile(filepath.Join(dir, "issuing.wrapped")); err != nil || strings.Contains(string(text), "PRIVATE") {
		t.Errorf("the wrapped key: %v\n%s", err, text)
	}
}

// giveKey brings a secret into a token, as a key ceremony would.
func giveKey(t *testing.T, uri hsm.URI, spec hsm.Spec, secret hsm.Secret) {
	t.Helper()
	a := &app{stdio: stdio{env: os.LookupEnv}}
	store, err := a.openStore(t.Context(), uri.String(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	if _, err := store.Import(t.Context(), spec, secret); err != nil {
		t.Fatal(err)
	}
}
