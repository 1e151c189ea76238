package mint

import (
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"strings"
	"testing"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/pkg/ca"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/templates"
)

func FuzzReadList(f *testing.F) {
	p, err := LoadProfile("p", strings.NewReader(templates.Profiles()["x509-group"]))
	if err != nil {
		f.Fatal(err)
	}
	f.Add("serial\nSN1\nSN2\n")
	f.Add("\xef\xbb\xbfserial,color\r\n\"SN,1\",\"a\"\"b\"\r\n")
	f.Add("serial,serial\n,\n\"")
	f.Fuzz(func(t *testing.T, text string) {
		l, err := ReadList("list", strings.NewReader(text), p)
		if err != nil {
			if len(err.Error()) > 64<<10 {
				t.Fatalf("an error of %d octets", len(err.Error()))
			}
			return
		}
		serials, ids := map[string]bool{}, map[string]bool{}
		for _, r := range l.Rows {
			id := dps.Fold(r.RegistrationID)
			if serials[r.Serial] || ids[id] || CheckSerial(r.Serial) != nil || dps.CheckRegistrationID(r.RegistrationID) != nil || len(r.Fields) != len(l.Columns) {
				t.Fatalf("%q has the row %+v", text, r)
			}
			serials[r.Serial], ids[id] = true, true
		}
		if len(l.Rows) == 0 {
			t.Fatalf("%q is an empty list", text)
		}
	})
}

func FuzzLoadProfile(f *testing.F) {
	for _, text := range templates.Profiles() {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		p, err := LoadProfile("p", strings.NewReader(text))
		if err != nil {
			if err.Error() == "" {
				t.Fatal("an error without words")
			}
			return
		}
		if _, err := p.enrollmentBase(); err != nil {
			t.Fatalf("%q passes, and %v", text, err)
		}
		_, _ = ReadList("list", strings.NewReader("serial\nSN1\n"), p)
	})
}

func FuzzParseCSR(f *testing.F) {
	key, err := generate(hsm.ECP256, rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: "pump-1"}}, key)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(der)
	f.Add(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
	f.Add([]byte("-----BEGIN CERTIFICATE REQUEST-----\n-----END CERTIFICATE REQUEST-----\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		csr, err := parseCSR(b)
		if err != nil {
			return
		}
		if err := csr.CheckSignature(); err != nil {
			t.Fatal(err)
		}
		if _, err := ca.AlgorithmOf(csr.PublicKey); err == nil {
			if _, err := publicKeyHash(csr.PublicKey); err != nil {
				t.Fatal(err)
			}
		}
	})
}
