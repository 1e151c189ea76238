package registration

import (
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/touchmark/touchmark/pkg/dps"
)

// maxCertificate bounds the text of a certificate.
const maxCertificate = 64 << 10

// parseCertificate reads what clients upload: PEM, base64 of DER with or without line breaks, or base64 of PEM.
func parseCertificate(text string) (*x509.Certificate, error) {
	if len(text) > maxCertificate {
		return nil, fmt.Errorf("certificate of more than %d octets", maxCertificate)
	}
	b := []byte(strings.TrimSpace(text))
	for range 2 {
		if block, rest := pem.Decode(b); block != nil {
			if block.Type != "CERTIFICATE" || len(strings.TrimSpace(string(rest))) > 0 {
				return nil, errors.New("want one PEM certificate and nothing else")
			}
			return x509.ParseCertificate(block.Bytes)
		}
		der, err := base64.StdEncoding.DecodeString(strings.NewReplacer("\r", "", "\n", "", " ", "").Replace(string(b)))
		if err != nil {
			return nil, errors.New("certificate is neither PEM nor base64")
		}
		if c, err := x509.ParseCertificate(der); err == nil {
			return c, nil
		}
		b = der
	}
	return nil, errors.New("certificate cannot be parsed")
}

// describe fills the wire's description of a certificate (service API, section 1.7).
func describe(c *x509.Certificate) *dps.X509CertificateInfo {
	return &dps.X509CertificateInfo{
		SubjectName: c.Subject.String(), IssuerName: c.Issuer.String(),
		SHA1Thumbprint: fmt.Sprintf("%X", sha1.Sum(c.Raw)), SHA256Thumbprint: fmt.Sprintf("%X", sha256.Sum256(c.Raw)),
		NotBeforeUTC: c.NotBefore.UTC().Format(time.RFC3339), NotAfterUTC: c.NotAfter.UTC().Format(time.RFC3339),
		SerialNumber: fmt.Sprintf("%X", c.SerialNumber.Bytes()), Version: c.Version,
	}
}
