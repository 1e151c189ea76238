package mint

import (
	"bytes"
	"crypto/rand"
	"crypto/x509"
	"testing"

	"github.com/touchmark/touchmark/hsm"
)

// What is spliced together is what the standard library would have written, octet for octet.
func TestMarshal(t *testing.T) {
	for _, alg := range []hsm.Algorithm{hsm.ECP256, hsm.ECP384, hsm.ECP521, hsm.Ed25519, hsm.RSA2048} {
		for range 16 {
			key, err := generate(alg, rand.Reader)
			if err != nil {
				t.Fatal(err)
			}
			got, err := marshalPKCS8(key)
			if err != nil {
				t.Fatal(err)
			}
			if want, _ := x509.MarshalPKCS8PrivateKey(key); !bytes.Equal(got, want) {
				t.Fatalf("%s: PKCS #8 is %x, want %x", alg, got, want)
			}
			if got, err = marshalPKIX(key.Public()); err != nil {
				t.Fatal(err)
			}
			if want, _ := x509.MarshalPKIXPublicKey(key.Public()); !bytes.Equal(got, want) {
				t.Fatalf("%s: SubjectPublicKeyInfo is %x, want %x", alg, got, want)
			}
			if alg == hsm.RSA2048 {
				break
			}
		}
	}
}
