package residency_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"errors"
	"os"
	"testing"
	"testing/fstest"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/touchmark/touchmark/hsm/tpm/residency"
)

// captured is the proof of a key in a software TPM (libtpms 0.9.2), and its makers' certificates. hsm/tpm's TestResidency makes
// it, with TOUCHMARK_UPDATE.
func captured(t testing.TB) (*residency.Evidence, []byte) {
	t.Helper()
	text, err := os.ReadFile("testdata/evidence.json")
	if err != nil {
		t.Fatal(err)
	}
	var e residency.Evidence
	if err := json.Unmarshal(text, &e); err != nil {
		t.Fatal(err)
	}
	makers, err := os.ReadFile("testdata/makers.pem")
	if err != nil {
		t.Fatal(err)
	}
	return &e, makers
}

func station(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// A proof verifies without a TPM, later and elsewhere.
func TestCaptured(t *testing.T) {
	e, pem := captured(t)
	makers, err := residency.LoadMakers(fstest.MapFS{"makers.pem": {Data: pem}})
	if err != nil {
		t.Fatal(err)
	}
	key := station(t)
	envelope, err := residency.Sign(e, key)
	if err != nil {
		t.Fatal(err)
	}
	policy := residency.Policy{Challengers: []crypto.PublicKey{station(t).Public(), key.Public()}, RegistrationID: e.RegistrationID, Makers: makers, Now: e.Made}
	v, err := residency.Verify(envelope, policy)
	if err != nil || v.Certificate.Model != "swtpm" || v.Key == nil || !v.Made.Equal(e.Made) {
		t.Errorf("%+v, %v", v, err)
	}
	policy.Now = e.Made.AddDate(-10, 0, 0)
	if _, err := residency.Verify(envelope, policy); !errors.Is(err, residency.ErrNotProven) {
		t.Errorf("ten years before: %v", err)
	}
}

// Evidence is bytes from outside: it verifies only as it was made, even when a station signs it.
func FuzzVerify(f *testing.F) {
	good, pem := captured(f)
	makers, err := residency.LoadMakers(fstest.MapFS{"makers.pem": {Data: pem}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good.EK, good.AK, good.Credential.Blob, good.Seed, good.Answer.Secret, good.Answer.Key, good.Answer.Attest, good.Answer.Signature, good.EKCertificates[0])
	key := station(f)
	policy := residency.Policy{Challengers: []crypto.PublicKey{key.Public()}, RegistrationID: good.RegistrationID, Makers: makers, Now: good.Made}
	f.Fuzz(func(t *testing.T, ek, ak, blob, seed, secret, device, attest, signature, cert []byte) {
		e := *good
		e.EK, e.AK, e.Seed, e.EKCertificates = ek, ak, seed, [][]byte{cert}
		e.Credential.Blob = blob
		e.Answer = residency.Answer{Secret: secret, Key: device, Attest: attest, Signature: signature}
		envelope, err := residency.Sign(&e, key)
		if err != nil {
			t.Fatal(err)
		}
		v, err := residency.Verify(envelope, policy)
		if err != nil {
			if !errors.Is(err, residency.ErrNotProven) || v != nil {
				t.Fatal(err)
			}
			return
		}
		if !bytes.Equal(device, good.Answer.Key) || !bytes.Equal(ek, good.EK) || !bytes.Equal(ak, good.AK) || !bytes.Equal(attest, good.Answer.Attest) || !bytes.Equal(secret, good.Answer.Secret) {
			t.Fatal("something else is proven")
		}
	})
}

func FuzzEnvelope(f *testing.F) {
	e, _ := captured(f)
	key := station(f)
	good, err := residency.Sign(e, key)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{"payloadType":"application/vnd.touchmark.tpm-residency+json","payload":"e30=","signatures":[{"keyid":"","sig":"AA=="}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		v, err := residency.Verify(b, residency.Policy{Challengers: []crypto.PublicKey{key.Public()}, RegistrationID: e.RegistrationID})
		if err == nil && v.KeyName == "" || err != nil && v != nil {
			t.Fatalf("%+v, %v", v, err)
		}
	})
}

func FuzzEKCertificate(f *testing.F) {
	e, pem := captured(f)
	f.Add(e.EK, e.EKCertificates[0])
	f.Add(e.EK, append(bytes.Clone(e.EKCertificates[0]), 0, 0))
	makers, err := residency.LoadMakers(fstest.MapFS{"makers.pem": {Data: pem}})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, ek, cert []byte) {
		trimmed, err := residency.TrimCertificate(cert)
		if err != nil {
			return
		}
		if !bytes.HasPrefix(cert, trimmed) {
			t.Fatal("what is trimmed is not the beginning")
		}
		if _, err := makers.Judge(ek, [][]byte{trimmed}, time.Time{}); err == nil && (keyHash(t, ek) != keyHash(t, e.EK) || !bytes.Equal(trimmed, e.EKCertificates[0])) {
			t.Fatal("another certificate passes")
		}
	})
}

func keyHash(t *testing.T, ek []byte) string {
	t.Helper()
	p, err := residency.ParsePublic(ek)
	if err != nil {
		t.Fatal(err)
	}
	h, err := residency.KeyHash(p)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func FuzzMakers(f *testing.F) {
	_, pem := captured(f)
	f.Add("x.pem", pem)
	f.Add("x.der", []byte{0x30, 0})
	f.Fuzz(func(t *testing.T, name string, b []byte) {
		_, _ = residency.LoadMakers(fstest.MapFS{name: {Data: b}})
	})
}

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

// The registration ID is SHA-256 in base32, lower case, as the device SDKs have it (device API, section 3). DPS-D 55.
func TestRegistrationID(t *testing.T) {
	for ek, want := range map[string]string{"abc": "xj4bnp4pahh6uqkbidpf3lrceoyagyndsylxvhfucd7wd4qacwwq", "test-ek": "npyd75bywi5m7g7ofqbkgimi52aiumhtpz4yffzxycr2fdozafka"} {
		if got := residency.RegistrationID([]byte(ek)); got != want {
			t.Errorf("%s: %s", ek, got)
		}
	}
}
