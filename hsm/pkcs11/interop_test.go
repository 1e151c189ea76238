//go:build cgo

package pkcs11

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/hsmtest"
)

// tool runs a program of others, with the PIN where that program looks for it, and returns what it printed.
func tool(t *testing.T, pkg, program string, args ...string) string {
	t.Helper()
	if _, err := exec.LookPath(program); err != nil {
		hsmtest.Require(t, program+" (apt-get install "+pkg+")")
	}
	cmd := exec.Command(program, args...)
	cmd.Env = append(os.Environ(), "GNUTLS_PIN="+hsmtest.PIN)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s: %v\n%s%s", strings.Join(cmd.Args, " "), err, out.String(), errs.String())
	}
	return out.String()
}

// What others' tools say about keys that were made here: they find them, read them, verify with them and use them.
func TestOthersTools(t *testing.T) {
	uri := hsmtest.SoftHSM(t, "line-3")
	s := open(t, uri)
	dir := t.TempDir()
	write := func(name string, data []byte) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	opensc := func(t *testing.T, args ...string) string {
		return tool(t, "opensc", "pkcs11-tool", append([]string{"--module", uri.ModulePath, "--token-label", "line-3", "--login", "--pin", "env:OPENSC_PIN"}, args...)...)
	}
	t.Setenv("OPENSC_PIN", hsmtest.PIN)
	message := []byte("what was made on the line")
	digest := sha256.Sum256(message)
	data, hashed := write("data", message), write("hashed", digest[:])

	for _, alg := range hsm.KeyPairs() {
		if alg == hsm.RSA3072 || alg == hsm.RSA4096 {
			continue // as RSA-2048, and slow
		}
		t.Run(string(alg), func(t *testing.T) {
			name := "k-" + string(alg)
			made, err := s.Generate(t.Context(), hsm.Spec{Name: name, Algorithm: alg})
			if err != nil {
				t.Fatal(err)
			}
			key := made.(hsm.SigningKey)
			spki, err := x509.MarshalPKIXPublicKey(key.Public())
			if err != nil {
				t.Fatal(err)
			}
			pub := write(name+".pem", pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: spki}))

			input, opts := digest[:], crypto.SignerOpts(crypto.SHA256)
			if alg == hsm.Ed25519 {
				input, opts = message, crypto.Hash(0)
			}
			sig, err := key.Sign(rand.Reader, input, opts)
			if err != nil {
				t.Fatal(err)
			}
			ours := write(name+".sig", sig)

			// OpenSSL verifies our signatures.
			if alg == hsm.Ed25519 {
				tool(t, "openssl", "openssl", "pkeyutl", "-verify", "-pubin", "-inkey", pub, "-rawin", "-in", data, "-sigfile", ours)
			} else {
				tool(t, "openssl", "openssl", "dgst", "-sha256", "-verify", pub, "-signature", ours, data)
			}
			if alg == hsm.RSA2048 {
				pss, err := key.Sign(rand.Reader, digest[:], &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: crypto.SHA256})
				if err != nil {
					t.Fatal(err)
				}
				tool(t, "openssl", "openssl", "dgst", "-sha256", "-verify", pub, "-signature", write(name+".pss", pss), "-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:32", data)
			}

			// OpenSC finds it, and what it says of it is so.
			list := opensc(t, "--list-objects", "--label", name)
			if !strings.Contains(list, "Private Key Object") || !strings.Contains(list, "Public Key Object") || !strings.Contains(list, "always sensitive, never extractable, local") {
				t.Errorf("pkcs11-tool says of it:\n%s", list)
			}
			if alg == hsm.Ed25519 {
				return // OpenSC 0.23 lists it and does not use it
			}
			id := fmt.Sprintf("%x", made.(*signingKey).id)
			if alg == hsm.ECP256 || alg == hsm.RSA2048 { // of the larger curves OpenSC 0.23 cannot read its own keys either
				read := filepath.Join(dir, name+".read")
				opensc(t, "--read-object", "--type", "pubkey", "--id", id, "--output-file", read)
				if der, err := os.ReadFile(read); err != nil || !bytes.Equal(der, spki) {
					t.Errorf("pkcs11-tool reads another public key: %v", err)
				}
			}
			// It signs with our key, and we verify; we sign, and it verifies.
			theirs := filepath.Join(dir, name+".theirs")
			if alg == hsm.RSA2048 {
				opensc(t, "--sign", "--mechanism", "SHA256-RSA-PKCS", "--id", id, "--input-file", data, "--output-file", theirs)
				if out := opensc(t, "--verify", "--mechanism", "SHA256-RSA-PKCS", "--id", id, "--input-file", data, "--signature-file", ours); !strings.Contains(out, "Signature is valid") {
					t.Errorf("pkcs11-tool says of our signature: %s", out)
				}
			} else {
				var rs struct{ R, S *big.Int }
				if _, err := asn1.Unmarshal(sig, &rs); err != nil {
					t.Fatal(err)
				}
				half := (key.Public().(*ecdsa.PublicKey).Curve.Params().BitSize + 7) / 8
				bare := make([]byte, 2*half)
				rs.R.FillBytes(bare[:half])
				rs.S.FillBytes(bare[half:])
				opensc(t, "--sign", "--mechanism", "ECDSA", "--signature-format", "openssl", "--id", id, "--input-file", hashed, "--output-file", theirs)
				if out := opensc(t, "--verify", "--mechanism", "ECDSA", "--id", id, "--input-file", hashed, "--signature-file", write(name+".rs", bare)); !strings.Contains(out, "Signature is valid") {
					t.Errorf("pkcs11-tool says of our signature: %s", out)
				}
			}
			got, err := os.ReadFile(theirs)
			if err != nil {
				t.Fatal(err)
			}
			if !verifies(key.Public(), digest[:], got) {
				t.Error("what pkcs11-tool signed with our key does not verify")
			}

			// GnuTLS reads it, and issues a certificate with it.
			url := "pkcs11:token=line-3;object=" + name + ";type=private"
			if out := tool(t, "gnutls-bin", "p11tool", "--provider", uri.ModulePath, "--login", "--batch", "--list-privkeys", "pkcs11:token=line-3"); !strings.Contains(out, "Label: "+name) || !strings.Contains(out, "CKA_NEVER_EXTRACTABLE") {
				t.Errorf("p11tool lists:\n%s", out)
			}
			cert := filepath.Join(dir, name+".crt")
			tool(t, "gnutls-bin", "certtool", "--provider", uri.ModulePath, "--generate-self-signed", "--load-privkey", url, "--load-pubkey", pub,
				"--template", write("template", []byte("cn = \"pump\"\nserial = 1\nexpiration_days = 10\nca\n")), "--outfile", cert)
			text, err := os.ReadFile(cert)
			if err != nil {
				t.Fatal(err)
			}
			block, _ := pem.Decode(text)
			if block == nil {
				t.Fatalf("certtool wrote no certificate: %s", text)
			}
			parsed, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				t.Fatal(err)
			}
			if err := parsed.CheckSignatureFrom(parsed); err != nil || !bytes.Equal(parsed.RawSubjectPublicKeyInfo, spki) {
				t.Errorf("the certificate that certtool issued with our key: %v", err)
			}
		})
	}

	t.Run("HMAC", func(t *testing.T) {
		made, err := s.Generate(t.Context(), hsm.Spec{Name: "group-key", Algorithm: hsm.HMACSHA256})
		if err != nil {
			t.Fatal(err)
		}
		theirs := filepath.Join(dir, "mac")
		opensc(t, "--sign", "--mechanism", "SHA256-HMAC", "--label", "group-key", "--input-file", data, "--output-file", theirs)
		want, err := made.(hsm.MACKey).MAC(t.Context(), nil, message)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(theirs); err != nil || !bytes.Equal(got, want) {
			t.Errorf("pkcs11-tool computes another HMAC: %v", err)
		}
	})

	// And the other way round: what others made is found and used here.
	t.Run("theirs", func(t *testing.T) {
		opensc(t, "--keypairgen", "--key-type", "EC:secp384r1", "--label", "theirs-ec", "--id", "aa01", "--sensitive")
		opensc(t, "--keypairgen", "--key-type", "rsa:2048", "--label", "theirs-rsa", "--id", "aa02", "--sensitive")
		for _, name := range []string{"theirs-ec", "theirs-rsa"} {
			k, err := s.Open(t.Context(), name)
			if err != nil {
				t.Fatal(err)
			}
			hsmtest.Check(t, k.(hsm.SigningKey))
			if _, err := s.Generate(t.Context(), hsm.Spec{Name: name, Algorithm: hsm.ECP256}); err == nil {
				t.Errorf("%s was doubled", name)
			}
			if err := s.Delete(t.Context(), name); err != nil {
				t.Error(err)
			}
		}
		if list := opensc(t, "--list-objects"); strings.Contains(list, "theirs-") {
			t.Errorf("left after Delete:\n%s", list)
		}
	})
}

func verifies(pub crypto.PublicKey, digest, sig []byte) bool {
	switch pub := pub.(type) {
	case *ecdsa.PublicKey:
		return ecdsa.VerifyASN1(pub, digest, sig)
	case *rsa.PublicKey:
		return rsa.VerifyPKCS1v15(pub, crypto.SHA256, digest, sig) == nil
	case ed25519.PublicKey:
		return ed25519.Verify(pub, digest, sig)
	}
	return false
}
