package ca_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/ca"
	"github.com/touchmark/touchmark/templates"
)

var now = time.Date(2026, 5, 4, 12, 30, 15, 0, time.UTC)

func signer(t testing.TB, kind string) crypto.Signer {
	t.Helper()
	var k crypto.Signer
	var err error
	switch kind {
	case "EC-P256":
		k, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case "EC-P384":
		k, err = ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	case "RSA-2048":
		k, err = rsa.GenerateKey(rand.Reader, 2048)
	case "Ed25519":
		_, k, err = ed25519.GenerateKey(rand.Reader)
	}
	if err != nil {
		t.Fatal(err)
	}
	return k
}

type authority struct {
	root, issuing *x509.Certificate
	key           crypto.Signer
}

func newAuthority(t testing.TB, kind string) authority {
	t.Helper()
	rootKey := signer(t, kind)
	a := authority{key: signer(t, kind)}
	var err error
	a.root, err = ca.NewRoot(ca.AuthorityConfig{Subject: pkix.Name{CommonName: "Root"}, Signer: rootKey, Now: now.Add(-time.Hour), Validity: 30 * 365 * 24 * time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	a.issuing, err = ca.NewIssuing(ca.AuthorityConfig{Subject: pkix.Name{CommonName: "Issuing"}, Signer: a.key, Now: now.Add(-time.Hour), Validity: 40 * 365 * 24 * time.Hour}, a.root, rootKey)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func (a authority) issuer(t testing.TB, at time.Time) *ca.Issuer {
	t.Helper()
	i, err := ca.NewIssuer(ca.Config{Signer: a.key, Certificate: a.issuing, Chain: []*x509.Certificate{a.root}, Now: func() time.Time { return at }})
	if err != nil {
		t.Fatal(err)
	}
	return i
}

func profile(t testing.TB, name string) ca.Profile {
	t.Helper()
	text, err := templates.Certificate(name, nil)
	if err != nil {
		t.Fatal(err)
	}
	return ca.Profile{Template: text, Validity: 3650 * 24 * time.Hour, Backdate: 10 * time.Minute}
}

// Every kind of CA signs leaves of every kind, and what the fast path assembles is octet for octet what
// x509.CreateCertificate makes of the same template.
func TestIssue(t *testing.T) {
	kinds := []string{"EC-P256", "EC-P384", "RSA-2048", "Ed25519"}
	for _, caKind := range kinds {
		a := newAuthority(t, caKind)
		for _, name := range []string{"device", "device-san"} {
			p, err := a.issuer(t, now).Prepare(profile(t, name))
			if err != nil {
				t.Fatal(err)
			}
			for n, leafKind := range kinds {
				id := fmt.Sprintf("Pump_%d.x:y-%s", n, strings.ToLower(leafKind)) // "_" is not in PrintableString
				pub := signer(t, leafKind).Public()
				plan, err := p.Plan(ca.Unit{RegistrationID: id})
				if err != nil {
					t.Fatal(err)
				}
				der, err := p.Issue(plan, pub)
				if err != nil {
					t.Fatal(err)
				}
				if size, err := p.Size(plan.Unit, pub); err != nil || size < len(der) || size > len(der)+24 {
					t.Errorf("%s, %s: a leaf of %d octets, foreseen at most %d, %v", caKind, leafKind, len(der), size, err)
				}
				again, err := ca.DecodePlan(plan.Encode())
				if err != nil {
					t.Fatal(err)
				}
				again.Unit = plan.Unit
				der2, err := p.Issue(again, pub)
				if err != nil {
					t.Fatal(err)
				}
				c, c2 := parse(t, der), parse(t, der2)
				if !bytes.Equal(c.RawTBSCertificate, c2.RawTBSCertificate) {
					t.Errorf("%s/%s: a plan that was written down makes another certificate", caKind, leafKind)
				}
				check(t, a, c, id, name)
				reference := *c // parsed fields are a template again
				reference.ExtraExtensions, reference.SignatureAlgorithm = nil, 0
				want, err := x509.CreateCertificate(rand.Reader, &reference, a.issuing, pub, a.key)
				if err != nil {
					t.Fatal(err)
				}
				if got := parse(t, want); !bytes.Equal(got.RawTBSCertificate, c.RawTBSCertificate) {
					t.Errorf("%s/%s/%s: the standard library makes\n% x\nof what was assembled as\n% x", caKind, leafKind, name, got.RawTBSCertificate, c.RawTBSCertificate)
				}
			}
		}
	}
}

func parse(t testing.TB, der []byte) *x509.Certificate {
	t.Helper()
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func check(t *testing.T, a authority, c *x509.Certificate, id, name string) {
	t.Helper()
	roots, inter := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(a.root)
	inter.AddCert(a.issuing)
	if _, err := c.Verify(x509.VerifyOptions{Roots: roots, Intermediates: inter, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
		t.Errorf("%s: %v", id, err)
	}
	if c.Subject.CommonName != id || len(c.SerialNumber.Bytes()) != 20 || c.NotBefore != now.Add(-10*time.Minute) || c.NotAfter != now.Add(3650*24*time.Hour) {
		t.Errorf("%s: %v %x %v %v", id, c.Subject, c.SerialNumber, c.NotBefore, c.NotAfter)
	}
	if len(c.SubjectKeyId) != 20 || !bytes.Equal(c.AuthorityKeyId, a.issuing.SubjectKeyId) || c.KeyUsage != x509.KeyUsageDigitalSignature || c.IsCA {
		t.Errorf("%s: %x %x %v", id, c.SubjectKeyId, c.AuthorityKeyId, c.KeyUsage)
	}
	if san := len(c.URIs) == 1 && c.URIs[0].String() == "urn:device:"+id; san != (name == "device-san") {
		t.Errorf("%s: URIs %v", id, c.URIs)
	}
}

func TestSerialNumbersDiffer(t *testing.T) {
	p, err := newAuthority(t, "EC-P256").issuer(t, now).Prepare(profile(t, "device"))
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for range 1000 {
		plan, err := p.Plan(ca.Unit{RegistrationID: "a"})
		if err != nil {
			t.Fatal(err)
		}
		n := new(big.Int).SetBytes(plan.SerialNumber)
		if seen[n.String()] || n.Sign() <= 0 || len(plan.SerialNumber) != 20 || plan.SerialNumber[0]&0x80 != 0 {
			t.Fatalf("serial number %x", plan.SerialNumber)
		}
		seen[n.String()] = true
	}
}

// What must not be signed is not, and the error says why.
func TestRefusals(t *testing.T) {
	a := newAuthority(t, "EC-P256")
	good := profile(t, "device")
	for name, c := range map[string]struct {
		edit func(*ca.Profile)
		at   time.Time
		want string
		is   error
	}{
		"clock before the CA": {at: a.issuing.NotBefore.Add(-time.Minute), want: "clock", is: ca.ErrClock},
		"CA ended":            {at: a.issuing.NotAfter.Add(time.Hour), want: "ended"},
		"outlives the CA":     {edit: func(p *ca.Profile) { p.Validity = 31 * 365 * 24 * time.Hour }, want: "outlive"},
		"common name":         {edit: func(p *ca.Profile) { p.Template = `{"subject":{"commonName":"fixed"},"extKeyUsage":["clientAuth"]}` }, want: "common name"},
		"no client":           {edit: func(p *ca.Profile) { p.Template = strings.Replace(p.Template, "clientAuth", "serverAuth", 1) }, want: "clientAuth"},
		"a CA":                {edit: func(p *ca.Profile) { p.Template = strings.Replace(p.Template, "digitalSignature", "certSign", 1) }, want: "must not be a CA"},
		"template, not JSON":  {edit: func(p *ca.Profile) { p.Template = "hello" }, want: "template"},
		"template, no such":   {edit: func(p *ca.Profile) { p.Template = "{{ nothing }}" }, want: "template"},
		"template, endless":   {edit: func(p *ca.Profile) { p.Template = `{{ fail "no" }}` }, want: "template"},
		"unhandled extension": {edit: func(p *ca.Profile) {
			p.Template = `{"subject":{{toJson .RegistrationID}},"extensions":[{"id":"1.2.3","critical":true,"value":"BQA="}]}`
		}, want: "critical"},
	} {
		p := good
		if c.edit != nil {
			c.edit(&p)
		}
		at := now
		if !c.at.IsZero() {
			at = c.at
		}
		_, err := a.issuer(t, at).Prepare(p)
		if err == nil || !strings.Contains(err.Error(), c.want) || c.is != nil && !errors.Is(err, c.is) {
			t.Errorf("%s: %v", name, err)
		}
	}
	p, err := a.issuer(t, now).Prepare(good)
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"", "a b", "x.", strings.Repeat("x", 65), "ä"} {
		if _, err := p.Plan(ca.Unit{RegistrationID: id}); err == nil {
			t.Errorf("planned a leaf for %q", id)
		}
	}
	if _, err := ca.NewIssuer(ca.Config{Signer: signer(t, "EC-P256"), Certificate: a.issuing}); err == nil {
		t.Error("an issuer with somebody else's key")
	}
	other := newAuthority(t, "EC-P256")
	if _, err := ca.NewIssuer(ca.Config{Signer: a.key, Certificate: a.issuing, Chain: []*x509.Certificate{other.root}}); err == nil {
		t.Error("an issuer under somebody else's root")
	}
}

// A signer that lies is found out on the first leaf.
func TestLyingSigner(t *testing.T) {
	a := newAuthority(t, "EC-P256")
	liar := &liar{Signer: a.key, with: signer(t, "EC-P256")}
	i, err := ca.NewIssuer(ca.Config{Signer: liar, Certificate: a.issuing, Now: func() time.Time { return now }})
	if err != nil {
		t.Fatal(err)
	}
	p, err := i.Prepare(profile(t, "device"))
	if err != nil {
		t.Fatal(err)
	}
	plan, err := p.Plan(ca.Unit{RegistrationID: "a"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Issue(plan, signer(t, "EC-P256").Public()); err == nil {
		t.Error("a certificate that does not verify was given out")
	}
}

type liar struct {
	crypto.Signer
	with crypto.Signer
}

func (l *liar) Sign(r io.Reader, d []byte, o crypto.SignerOpts) ([]byte, error) {
	return l.with.Sign(r, d, o)
}

func FuzzParseChain(f *testing.F) {
	a := newAuthority(f, "EC-P256")
	f.Add(ca.EncodeChain(a.issuing, a.root))
	f.Add([]byte("-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		certs, err := ca.ParseChain(b)
		if err == nil && (len(certs) == 0 || len(certs) > 10) {
			t.Fatalf("%d certificates", len(certs))
		}
	})
}

func FuzzDecodePlan(f *testing.F) {
	f.Add(ca.Plan{SerialNumber: make([]byte, 20), NotBefore: now, NotAfter: now}.Encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		if p, err := ca.DecodePlan(b); err == nil && !bytes.Equal(p.Encode(), b) {
			t.Fatalf("% x", b)
		}
	})
}

// A leaf on the fast path against key generation's neighbour, the standard library's CreateCertificate.
func BenchmarkIssue(b *testing.B) {
	a := newAuthority(b, "EC-P256")
	p, err := a.issuer(b, now).Prepare(profile(b, "device"))
	if err != nil {
		b.Fatal(err)
	}
	pub := signer(b, "EC-P256").Public()
	b.Run("ours", func(b *testing.B) {
		for b.Loop() {
			plan, _ := p.Plan(ca.Unit{RegistrationID: "pump-0001"})
			if _, err := p.Issue(plan, pub); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("bare", func(b *testing.B) {
		t := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "pump-0001"}, NotBefore: now, NotAfter: now.Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
		for b.Loop() {
			if _, err := x509.CreateCertificate(rand.Reader, t, a.issuing, pub, a.key); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// A leaf is made of its own serial and columns, whatever a template does with them: what two samples have in common is not
// what all devices have.
func TestTemplatesSeeEachUnit(t *testing.T) {
	a := newAuthority(t, "EC-P256")
	for text, want := range map[string]string{
		`{"subject": {"commonName": {{ toJson .RegistrationID }}, "organizationalUnit": {{ substr 0 6 .Serial | toJson }}}, "extKeyUsage": ["clientAuth"]}`:                                                   "ABCDEF",
		`{"subject": {"commonName": {{ toJson .RegistrationID }}, "organizationalUnit": "{{ if eq .Columns.model "pro" }}PRO{{ else }}BASIC{{ end }}"}, "extKeyUsage": ["clientAuth"]}`:                       "PRO",
		`{"subject": {"commonName": {{ toJson .RegistrationID }}, "organizationalUnit": {{ substr 0 3 .RegistrationID | upper | toJson }}}, "extKeyUsage": ["clientAuth"]}`:                                   "DEV",
		`{{ $m := .Columns.model }}{"subject": {"commonName": {{ toJson .RegistrationID }}, "organizationalUnit": "{{ with $m }}{{ len . }}{{ end }}"}, "extKeyUsage": ["clientAuth"]}`:                       "3",
		`{"subject": {"commonName": {{ toJson .RegistrationID }}, "organizationalUnit": "fixed"}, "extKeyUsage": ["clientAuth"]}`:                                                                             "fixed",
		`{"subject": {"commonName": {{ toJson .RegistrationID }}, "organizationalUnit": "{{ range $i := until (len .Serial) }}x{{ end }}"}, "keyUsage": ["digitalSignature"], "extKeyUsage": ["clientAuth"]}`: "xxxxxxxxxx",
	} {
		p := profile(t, "device")
		p.Template, p.Columns = text, []string{"serial", "model"}
		prepared, err := a.issuer(t, now).Prepare(p)
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		pub := signer(t, "EC-P256").Public()
		plan, err := prepared.Plan(ca.Unit{RegistrationID: "dev-1", Serial: "ABCDEF0001", Columns: map[string]string{"serial": "ABCDEF0001", "model": "pro"}})
		if err != nil {
			t.Fatal(err)
		}
		der, err := prepared.Issue(plan, pub)
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		if len(c.Subject.OrganizationalUnit) != 1 || c.Subject.OrganizationalUnit[0] != want {
			t.Errorf("%s: %s, want %s", text, c.Subject, want)
		}
	}
}
