package ca

import (
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"time"
)

// Bounds of a chain in PEM.
const (
	maxChain     = 10
	maxChainSize = 256 << 10
)

// EncodeChain returns certificates as PEM, in that order.
func EncodeChain(certs ...*x509.Certificate) []byte {
	var b []byte
	for _, c := range certs {
		b = append(b, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return b
}

// ParseChain reads 1 to 10 certificates from PEM. Blocks of another type are an error.
func ParseChain(b []byte) ([]*x509.Certificate, error) {
	if len(b) > maxChainSize {
		return nil, fmt.Errorf("certificates of more than %d octets", maxChainSize)
	}
	var certs []*x509.Certificate
	for {
		var block *pem.Block
		if block, b = pem.Decode(b); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("PEM block %q, want CERTIFICATE", block.Type)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", len(certs)+1, err)
		}
		if certs = append(certs, c); len(certs) > maxChain {
			return nil, fmt.Errorf("more than %d certificates", maxChain)
		}
	}
	if len(certs) == 0 {
		return nil, errors.New("no certificate in PEM")
	}
	return certs, nil
}

// Info describes a certificate to a person.
type Info struct {
	Subject      string    `json:"subject"`
	Issuer       string    `json:"issuer"`
	SerialNumber string    `json:"serialNumber"` // hex
	NotBefore    time.Time `json:"notBefore"`
	NotAfter     time.Time `json:"notAfter"`
	SHA1         string    `json:"sha1"`   // upper-case hex
	SHA256       string    `json:"sha256"` // upper-case hex
}

// Describe returns what a person wants to know of a certificate.
func Describe(c *x509.Certificate) Info {
	return Info{
		Subject: c.Subject.String(), Issuer: c.Issuer.String(), SerialNumber: fmt.Sprintf("%X", c.SerialNumber.Bytes()),
		NotBefore: c.NotBefore.UTC(), NotAfter: c.NotAfter.UTC(),
		SHA1: fmt.Sprintf("%X", sha1.Sum(c.Raw)), SHA256: fmt.Sprintf("%X", sha256.Sum256(c.Raw)),
	}
}
