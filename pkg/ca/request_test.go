package ca_test

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/pkg/ca"
	"github.com/touchmark/touchmark/templates"
)

func csr(t testing.TB, key crypto.Signer, cn string) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: cn}}, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func TestParseRequest(t *testing.T) {
	for _, kind := range []string{"EC-P256", "EC-P384", "RSA-2048", "Ed25519"} {
		key := signer(t, kind)
		r, err := ca.ParseRequest(csr(t, key, "Dev-1"))
		if err != nil || r.CommonName != "Dev-1" || !key.Public().(interface{ Equal(crypto.PublicKey) bool }).Equal(r.PublicKey) {
			t.Errorf("%s: %+v, %v", kind, r, err)
		}
	}
}

// Weak RSA keys are told by the key, before their signature is looked at.
func TestWeakKeys(t *testing.T) {
	key := signer(t, "RSA-2048").(*rsa.PrivateKey)
	der := csr(t, key, "dev-1")
	n := key.N
	odd := new(big.Int).Sub(n, new(big.Int).Mod(n, big.NewInt(2*751)))
	prime, err := rand.Prime(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	for why, x := range map[string]struct {
		from, to []byte
		reason   string
	}{
		"even modulus":      {n.Bytes(), new(big.Int).Sub(n, big.NewInt(1)).Bytes(), "modulus"},
		"a factor 751":      {n.Bytes(), odd.Add(odd, big.NewInt(751)).Bytes(), "modulus"},
		"a prime":           {n.Bytes(), prime.Bytes(), "modulus"},
		"exponent 65535":    {[]byte{2, 3, 1, 0, 1}, []byte{2, 3, 0, 0xff, 0xff}, "exponent is 65535"},
		"exponent 65538":    {[]byte{2, 3, 1, 0, 1}, []byte{2, 3, 1, 0, 2}, "exponent is 65538"},
		"another's modulus": {n.Bytes(), signer(t, "RSA-2048").(*rsa.PrivateKey).N.Bytes(), "does not have its key"},
	} {
		bad := bytes.Replace(der, x.from, x.to, 1)
		if _, err := ca.ParseRequest(bad); bytes.Equal(bad, der) || !errors.Is(err, ca.ErrRequest) || !strings.Contains(err.Error(), x.reason) {
			t.Errorf("%s: %v", why, err)
		}
	}
}

func FuzzParseRequest(f *testing.F) {
	for _, kind := range []string{"EC-P256", "EC-P384", "RSA-2048", "Ed25519"} {
		f.Add(csr(f, signer(f, kind), "dev-1"))
	}
	f.Fuzz(func(t *testing.T, der []byte) {
		r, err := ca.ParseRequest(der)
		if err != nil {
			if !errors.Is(err, ca.ErrRequest) {
				t.Fatal(err)
			}
			return
		}
		if _, err := ca.AlgorithmOf(r.PublicKey); err != nil || len(der) > ca.MaxRequest {
			t.Fatalf("%+v, %v", r, err)
		}
	})
}

// A leaf ends with the first certificate above it that ends; then there are no more.
func TestOperational(t *testing.T) {
	text, err := templates.Certificate("device", nil)
	if err != nil {
		t.Fatal(err)
	}
	const day = 24 * time.Hour
	profile := ca.Profile{Template: text, Validity: 90 * day, Backdate: time.Hour}
	for name, ends := range map[string][2]time.Duration{"the issuer": {365 * day, 100 * day}, "the root": {100 * day, 100 * day}} {
		rootKey, key := signer(t, "EC-P256"), signer(t, "EC-P256")
		root, err := ca.NewRoot(ca.AuthorityConfig{Subject: pkix.Name{CommonName: "Root"}, Signer: rootKey, Now: now, Validity: ends[0]})
		if err != nil {
			t.Fatal(err)
		}
		issuing, err := ca.NewIssuing(ca.AuthorityConfig{Subject: pkix.Name{CommonName: "Issuing"}, Signer: key, Now: now, Validity: ends[1]}, root, rootKey)
		if err != nil {
			t.Fatal(err)
		}
		at := now.Add(-day)
		i, err := ca.NewIssuer(ca.Config{Signer: key, Certificate: issuing, Chain: []*x509.Certificate{root}, Now: func() time.Time { return at }})
		if err != nil {
			t.Fatal(err)
		}
		o, err := ca.NewOperational(i, profile, nil)
		if err != nil {
			t.Fatal(err)
		}
		end := now.Truncate(time.Second).Add(100 * day)
		for _, x := range []struct {
			after, valid time.Duration // zero: until the end
			err          error
		}{{-day, 0, ca.ErrClock}, {0, 90 * day, nil}, {5 * day, 90 * day, nil}, {50 * day, 0, nil}, {100*day - time.Minute, 0, nil}, {100 * day, 0, ca.ErrEnded}, {101 * day, 0, ca.ErrEnded}, {day, 90 * day, nil}} {
			at = now.Add(x.after)
			plan, err := o.Plan(ca.Unit{RegistrationID: "dev-1"})
			if ready := o.Ready(); !errors.Is(err, x.err) || !errors.Is(ready, x.err) {
				t.Errorf("%s, after %v: %v, %v", name, x.after, err, ready)
			}
			if err != nil {
				continue
			}
			want := end
			if x.valid != 0 {
				want = at.Truncate(time.Second).Add(x.valid)
			}
			der, err := o.Issue(plan, signer(t, "Ed25519").Public())
			if err != nil {
				t.Fatal(err)
			}
			if leaf, err := x509.ParseCertificate(der); err != nil || !leaf.NotAfter.Equal(want) || leaf.CheckSignatureFrom(issuing) != nil {
				t.Errorf("%s, after %v: until %v, want %v", name, x.after, leaf.NotAfter, want)
			}
		}
		if chain := o.Chain(); len(chain) != 2 || !bytes.Equal(chain[0], issuing.Raw) || !bytes.Equal(chain[1], root.Raw) {
			t.Error("the chain is another one")
		}
	}
	a := newAuthority(t, "EC-P256")
	rootless, err := ca.NewIssuer(ca.Config{Signer: a.key, Certificate: a.issuing})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ca.NewOperational(rootless, profile, nil); err == nil {
		t.Error("a chain without a root")
	}
	if _, err := ca.NewOperational(a.issuer(t, now), profile, []hsm.Algorithm{hsm.ECP521}); err == nil {
		t.Error("keys that nobody takes")
	}
	o, err := ca.NewOperational(a.issuer(t, now), profile, []hsm.Algorithm{hsm.ECP256})
	if err != nil {
		t.Fatal(err)
	}
	if o.Takes(signer(t, "EC-P256").Public()) != nil || o.Takes(signer(t, "EC-P384").Public()) == nil {
		t.Error("the kinds of keys do not count")
	}
}
