package label_test

import (
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/pem"
	"regexp"
	"strings"
	"testing"

	"github.com/touchmark/touchmark/pkg/label"
)

const fingerprint = "0123456789ABCDEF"

func TestScan(t *testing.T) {
	for text, want := range map[string]label.Scan{
		"TM1.SN1.0123456789ABCDEF":       {Serial: "SN1", Fingerprint: fingerprint},
		"TM1.SN1":                        {Serial: "SN1"},
		"TM1.%61%2F%25.0123456789ABCDEF": {Serial: "a/%", Fingerprint: fingerprint},
		"TM1.%7E%21":                     {Serial: "~!"},
		"SN1":                            {Serial: "SN1", Bare: true},
		"sn%41:^XZ":                      {Serial: "sn%41:^XZ", Bare: true},
		"TM1":                            {Serial: "TM1", Bare: true},
		"TM2.X":                          {Serial: "TM2.X", Bare: true},
		strings.Repeat("x", 128):         {Serial: strings.Repeat("x", 128), Bare: true},
	} {
		got, err := label.ParseScan(text)
		if err != nil || got != want || got.String() != text {
			t.Errorf("%q reads as %+v, %v", text, got, err)
		}
	}
	for _, text := range []string{
		"", " SN1", "SN1\r", "SN1\n", "S N", "Gerät", "SN\x7f", strings.Repeat("x", 129),
		"TM1.", "TM1..0123456789ABCDEF", "TM1.SN1.", "TM1.SN1.0123456789ABCDE", "TM1.SN1.0123456789abcdef", "TM1.SN1.0123456789ABCDEF0",
		"TM1.SN1.0123456789ABCDEF.", "TM1.SN-1", "TM1.sn1", "TM1.%41", "TM1.%2f", "TM1.%2", "TM1.%", "TM1.%zz", "TM1.%20", "TM1.%C3%A4", "TM1.%0A",
		"tm1.sn1", "Tm1.SN1", "TM1.SN1 ", "TM1.SN1.0123456789ABCDEF\n",
		"TM1." + strings.Repeat("%61", 129), "TM1." + strings.Repeat("X", 1<<20), // bounded before it is taken apart
	} {
		if s, err := label.ParseScan(text); err == nil || s != (label.Scan{}) {
			t.Errorf("%.40q reads as %+v", text, s)
		}
	}
	if _, err := label.ParseScan("tm1.sn1"); err == nil || !strings.Contains(err.Error(), "Caps Lock") {
		t.Errorf("a scan under Caps Lock: %v", err)
	}
}

func TestMatches(t *testing.T) {
	for _, c := range []struct {
		scan, serial, fingerprint string
		want                      bool
	}{
		{"TM1.SN1.0123456789ABCDEF", "SN1", fingerprint, true},
		{"TM1.SN1.0123456789ABCDEF", "SN2", fingerprint, false},
		{"TM1.SN1.0123456789ABCDEF", "sn1", fingerprint, false},
		{"TM1.SN1.0123456789ABCDEF", "SN1", "FEDCBA9876543210", false}, // minted again: the old label is not this unit's
		{"TM1.SN1.0123456789ABCDEF", "SN1", "", false},
		{"TM1.SN1", "SN1", "", true},
		{"TM1.SN1", "SN1", fingerprint, false},
		{"SN1", "SN1", fingerprint, true},
		{"SN1", "SN1", "", true},
		{"SN1", "SN2", "", false},
	} {
		s, err := label.ParseScan(c.scan)
		if err != nil {
			t.Fatal(err)
		}
		if s.Matches(c.serial, c.fingerprint) != c.want {
			t.Errorf("%s on %s with %q", c.scan, c.serial, c.fingerprint)
		}
	}
	if (label.Scan{}).Matches("", "") {
		t.Error("no scan matches no unit")
	}
}

// The digits are what openssl pkey -pubin -outform DER | sha256sum begins with.
func TestFingerprint(t *testing.T) {
	block, _ := pem.Decode([]byte(`-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEaxfR8uEsQkf4vOblY6RA8ncDfYEt
6zOg9KE5RdiYwpZP40Li/hp/m47n60p8D54WK84zV2sxXs7LtkBoN79R9Q==
-----END PUBLIC KEY-----
`)) // the base point of P-256: nobody's key
	pub, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	got, err := label.Fingerprint(pub.(*ecdsa.PublicKey))
	if err != nil || got != "5CD252FB0CE89324" {
		t.Errorf("%s, %v", got, err)
	}
	if _, err := label.Fingerprint("no key"); err == nil {
		t.Error("a string has a fingerprint")
	}
}

// What is read has one form, is made of keys that a scanner types safely unless it is bare, and says what was written.
func FuzzParseScan(f *testing.F) {
	for _, s := range []string{"TM1.SN1.0123456789ABCDEF", "TM1.%61%2F%25", "SN-1", "^XZ~JA", "tm1.x", "TM1.%zz.0", "TM1.%2", "TM1.\xff"} {
		f.Add(s)
	}
	safe := regexp.MustCompile(`^[A-Z0-9.%]+$`)
	f.Fuzz(func(t *testing.T, text string) {
		if s, err := label.ParseScan(text); err == nil {
			if s.String() != text || !s.Bare && !safe.MatchString(text) || !s.Matches(s.Serial, s.Fingerprint) {
				t.Fatalf("%q reads as %+v", text, s)
			}
		}
		// The same octets as a serial.
		s := label.Scan{Serial: text, Fingerprint: fingerprint}
		got, err := label.ParseScan(s.String())
		printable := text != "" && len(text) <= 128 && strings.IndexFunc(text, func(r rune) bool { return r <= ' ' || r > '~' }) < 0
		if printable != (err == nil) || err == nil && got != s {
			t.Fatalf("serial %q reads back as %+v, %v", text, got, err)
		}
	})
}
