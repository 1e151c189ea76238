package tpm_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/hsmtest"
	"github.com/touchmark/touchmark/hsm/tpm"
)

// tool runs a program of others against the TPM, with standard input if there is some.
func tool(t testing.TB, s *hsmtest.TPM, stdin []byte, name string, args ...string) string {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		hsmtest.Require(t, name)
	}
	cmd := exec.Command(name, args...)
	cmd.Dir = s.Dir
	cmd.Env = append(os.Environ(), "TPM2TOOLS_TCTI="+s.TCTI(), "TPM2OPENSSL_TCTI="+s.TCTI())
	cmd.Stdin = bytes.NewReader(stdin)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s %v: %v\n%s%s", name, args, err, out.String(), errs.String())
	}
	return out.String()
}

// provider skips a test where OpenSSL has no provider for TPMs. The provider wants a TPM when it is loaded.
func provider(t *testing.T, s *hsmtest.TPM) {
	t.Helper()
	cmd := exec.Command("openssl", "list", "-providers", "-provider", "tpm2")
	cmd.Env = append(os.Environ(), "TPM2OPENSSL_TCTI="+s.TCTI())
	if out, err := cmd.CombinedOutput(); err != nil {
		hsmtest.Require(t, "OpenSSL's tpm2 provider (apt-get install tpm2-openssl): "+string(out))
	}
}

func generate(t testing.TB, s hsm.Store, spec hsm.Spec) hsm.Key {
	t.Helper()
	k, err := s.Generate(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func signer(t testing.TB, s hsm.Store, spec hsm.Spec) hsm.SigningKey {
	t.Helper()
	k, err := hsm.SigningKeyOf(generate(t, s, spec))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// OpenSSL's provider opens our blobs and signs with them, whether the SRK is the owner's primary or at its persistent handle.
func TestOpenSSL(t *testing.T) {
	message := []byte("the message")
	digest := sha256.Sum256(message)
	for name, prepare := range map[string]func(t *testing.T, s *hsmtest.TPM){
		"primary": func(*testing.T, *hsmtest.TPM) {},
		"persistent ECC SRK": func(t *testing.T, s *hsmtest.TPM) {
			tool(t, s, nil, "tpm2_createprimary", "-Q", "-C", "o", "-G", "ecc", "-c", "srk.ctx")
			tool(t, s, nil, "tpm2_evictcontrol", "-Q", "-C", "o", "-c", "srk.ctx", "0x81000001")
			tool(t, s, nil, "tpm2_flushcontext", "-t")
		},
		"persistent RSA SRK": func(t *testing.T, s *hsmtest.TPM) {
			tool(t, s, nil, "tpm2_createprimary", "-Q", "-C", "o", "-G", "rsa2048", "-c", "srk.ctx")
			tool(t, s, nil, "tpm2_evictcontrol", "-Q", "-C", "o", "-c", "srk.ctx", "0x81000001")
			tool(t, s, nil, "tpm2_flushcontext", "-t")
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := hsmtest.SWTPM(t)
			provider(t, s)
			prepare(t, s)
			store := open(t, s.URI())
			for _, alg := range []hsm.Algorithm{hsm.ECP256, hsm.ECP384, hsm.RSA2048} {
				key := signer(t, store, hsm.Spec{Name: "ossl-" + string(alg), Algorithm: alg})
				file := filepath.Join(s.Dir, "keys", key.Name()+".pem")
				sig := tool(t, s, message, "openssl", "dgst", "-provider", "tpm2", "-provider", "default", "-propquery", "?provider=tpm2", "-sha256", "-sign", file)
				switch pub := key.Public().(type) {
				case *ecdsa.PublicKey:
					if !ecdsa.VerifyASN1(pub, digest[:], []byte(sig)) {
						t.Errorf("%s: OpenSSL's signature with our blob does not verify", alg)
					}
				case *rsa.PublicKey:
					if err := rsa.VerifyPKCS1v15(pub, crypto.SHA256, digest[:], []byte(sig)); err != nil {
						t.Errorf("%s: %v", alg, err)
					}
				}
				// And the public half that OpenSSL reads is ours.
				text := tool(t, s, nil, "openssl", "pkey", "-provider", "tpm2", "-provider", "default", "-in", file, "-pubout")
				block, _ := pem.Decode([]byte(text))
				if block == nil {
					t.Fatal(text)
				}
				pub, err := x509.ParsePKIXPublicKey(block.Bytes)
				if err != nil || !key.Public().(interface{ Equal(crypto.PublicKey) bool }).Equal(pub) {
					t.Errorf("%s: OpenSSL reads another public key, %v", alg, err)
				}
			}
		})
	}
}

// And the other way round: a key that OpenSSL made is opened by its file.
func TestOpenSSLKey(t *testing.T) {
	s := hsmtest.SWTPM(t)
	provider(t, s)
	store := open(t, s.URI())
	if err := os.Mkdir(filepath.Join(s.Dir, "keys"), 0o700); err != nil {
		t.Fatal(err)
	}
	tool(t, s, nil, "openssl", "genpkey", "-provider", "tpm2", "-algorithm", "EC", "-pkeyopt", "group:P-256", "-out", "keys/theirs.pem")
	k, err := store.Open(t.Context(), "theirs")
	if err != nil {
		t.Fatal(err)
	}
	key, err := hsm.SigningKeyOf(k)
	if err != nil {
		t.Fatal(err)
	}
	hsmtest.Check(t, key)
	if err := store.Close(); err != nil {
		t.Fatal(err)
	}
	// Ours with an authorization value takes it from OpenSSL too.
	protected, err := tpm.Open(t.Context(), tpm.Config{URI: s.URI(), PIN: secret("auth"), Protect: true})
	if err != nil {
		t.Fatal(err)
	}
	defer protected.Close()
	ours := signer(t, protected, hsm.Spec{Name: "ours", Algorithm: hsm.ECP256})
	if err := os.WriteFile(filepath.Join(s.Dir, "auth"), []byte("auth\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	sig := tool(t, s, []byte("m"), "openssl", "dgst", "-provider", "tpm2", "-provider", "default", "-propquery", "?provider=tpm2", "-sha256", "-sign", "keys/ours.pem", "-passin", "file:auth")
	digest := sha256.Sum256([]byte("m"))
	if !ecdsa.VerifyASN1(ours.Public().(*ecdsa.PublicKey), digest[:], []byte(sig)) {
		t.Error("OpenSSL's signature with a protected blob does not verify")
	}
}

// A key at a persistent handle is there for tpm2-tools, and a key of theirs is there for us.
func TestPersistentHandles(t *testing.T) {
	s := hsmtest.SWTPM(t)
	uri := s.URI()
	uri.Keys = ""
	store := open(t, uri)
	key := signer(t, store, hsm.Spec{Name: "0x81000100", Algorithm: hsm.ECP256})
	hsmtest.Check(t, key)
	if u, err := hsm.ParseURI(key.URI()); err != nil || u.Object != "0x81000100" || !strings.HasPrefix(key.URI(), "tpm:handle=0x81000100?") {
		t.Errorf("URI %s, %v", key.URI(), err)
	}
	tool(t, s, nil, "tpm2_readpublic", "-Q", "-c", "0x81000100", "-f", "pem", "-o", "pub.pem")
	text, err := os.ReadFile(filepath.Join(s.Dir, "pub.pem"))
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(text)
	if pub, err := x509.ParsePKIXPublicKey(block.Bytes); err != nil || !key.Public().(*ecdsa.PublicKey).Equal(pub) {
		t.Errorf("tpm2_readpublic reads another key: %v", err)
	}
	if _, err := store.Generate(t.Context(), hsm.Spec{Name: "0x81000100", Algorithm: hsm.ECP256}); !is(err, hsm.ErrExists) {
		t.Errorf("second key at the handle: %v", err)
	}
	if _, err := store.Generate(t.Context(), hsm.Spec{Name: "named", Algorithm: hsm.ECP256}); !is(err, hsm.ErrUnsupported) {
		t.Errorf("a name without a directory: %v", err)
	}
	tool(t, s, nil, "tpm2_createprimary", "-Q", "-C", "o", "-G", "rsa2048", "-c", "p.ctx")
	tool(t, s, nil, "tpm2_create", "-Q", "-C", "p.ctx", "-G", "rsa2048", "-u", "k.pub", "-r", "k.priv", "-c", "k.ctx")
	for file, handle := range map[string]string{"k.ctx": "0x81000101", "p.ctx": "0x81000102"} {
		tool(t, s, nil, "tpm2_flushcontext", "-t")
		tool(t, s, nil, "tpm2_evictcontrol", "-Q", "-C", "o", "-c", file, handle)
	}
	tool(t, s, nil, "tpm2_flushcontext", "-t")
	keys, err := store.List(t.Context(), "0x")
	if err != nil || len(keys) != 2 {
		t.Fatalf("%d keys listed, want ours and theirs and not the storage key: %v", len(keys), err)
	}
	theirs, err := hsm.SigningKeyOf(keys[1])
	if err != nil {
		t.Fatal(err)
	}
	hsmtest.Check(t, theirs)
	// Another key in its place, while we do not look, is not taken for it.
	tool(t, s, nil, "tpm2_evictcontrol", "-Q", "-C", "o", "-c", "0x81000100")
	tool(t, s, nil, "tpm2_evictcontrol", "-Q", "-C", "o", "-c", "k.ctx", "0x81000100")
	tool(t, s, nil, "tpm2_flushcontext", "-t")
	if _, err := key.Sign(rand.Reader, make([]byte, 32), crypto.SHA256); !is(err, hsm.ErrNotFound) {
		t.Errorf("another key in its place: %v", err)
	}
	if err := store.Delete(t.Context(), "0x81000100"); err != nil {
		t.Fatal(err)
	}
	if err := store.Delete(t.Context(), "0x81000100"); !is(err, hsm.ErrNotFound) {
		t.Errorf("second Delete: %v", err)
	}
	if got := tool(t, s, nil, "tpm2_getcap", "handles-persistent"); strings.Contains(got, "0x81000100") {
		t.Error("the deleted key is still there")
	}
	if _, err := key.Sign(rand.Reader, make([]byte, 32), crypto.SHA256); !is(err, hsm.ErrNotFound) {
		t.Errorf("a deleted key: %v", err)
	}
}

// What tpm2_print says of the public area in our blob is what it is.
func TestPrint(t *testing.T) {
	s := hsmtest.SWTPM(t)
	store := open(t, s.URI())
	generate(t, store, hsm.Spec{Name: "k", Algorithm: hsm.ECP384})
	text, err := os.ReadFile(filepath.Join(s.Dir, "keys", "k.pem"))
	if err != nil {
		t.Fatal(err)
	}
	blob, err := tpm.ParseBlob(text)
	if err != nil {
		t.Fatal(err)
	}
	public := tpm2.Marshal(tpm2.New2B(blob.Public))
	if err := os.WriteFile(filepath.Join(s.Dir, "k.pub"), public, 0o600); err != nil {
		t.Fatal(err)
	}
	out := tool(t, s, nil, "tpm2_print", "-t", "TPM2B_PUBLIC", "k.pub")
	point, err := blob.Public.Unique.ECC()
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"fixedtpm|fixedparent|sensitivedataorigin|userwithauth|noda|sign", "NIST p384", hex.EncodeToString(point.X.Buffer)} {
		if !strings.Contains(out, want) {
			t.Errorf("tpm2_print does not say %q:\n%s", want, out)
		}
	}
}
