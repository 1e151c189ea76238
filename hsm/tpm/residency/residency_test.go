package residency_test

import (
	"bytes"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/touchmark/touchmark/hsm/tpm/residency"
)

func FuzzParsePublic(f *testing.F) {
	f.Add(residency.MarshalPublic(tpm2.ECCSRKTemplate))
	f.Add(residency.MarshalPublic(tpm2.RSAEKTemplate))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := residency.ParsePublic(b)
		if err != nil {
			return
		}
		if !bytes.Equal(residency.MarshalPublic(*p), b) {
			t.Fatalf("%x marshals as something else", b)
		}
		_, _ = residency.Name(p)
		_, _ = residency.PublicKey(p)
		_, _ = residency.NewChallenge(b, b)
	})
}

// The registration ID of spec device-api section 9 for a known EK: SHA-256 of the whole TPM2B_PUBLIC, base32, lower case.
func TestRegistrationID(t *testing.T) {
	if got := residency.RegistrationID([]byte("abc")); got != "xj4bnp4pahh6uqkbidpf3lrceoyagyndsylxvhfucd7wd4qacwwq" {
		t.Error(got)
	}
}
