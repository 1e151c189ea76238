package device

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/touchmark/touchmark/internal/durable"
	"github.com/touchmark/touchmark/pkg/dps"
)

// OperationalFile is where a device keeps its operational certificate beside its stamp, as PEM: the key, unless it is
// elsewhere, then the certificate and what is above it. It is one file so that no key stands beside another one's certificate,
// whenever the power fails.
const OperationalFile = "operational.pem"

// ErrChain says that the certificates that came with an assignment are not for the device's key.
var ErrChain = errors.New("operational certificate")

// versionCSR is the first api-version with csr (device API, section 15.2).
const versionCSR = "2025-07-01-preview"

func (c *Config) apiVersion() string {
	if c.CSR != nil {
		return versionCSR
	}
	return apiVersion
}

// NewCSR makes a certificate signing request for a device's operational key, as DER.
func NewCSR(registrationID string, key crypto.Signer) ([]byte, error) {
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: registrationID}}, key)
	if err != nil {
		return nil, fmt.Errorf("certificate signing request of %s: %w", registrationID, err)
	}
	return der, nil
}

// CheckChain returns the certificates of an assignment, leaf first, when they are good at that time for that key and for the
// device that was assigned. Every other error is an [ErrChain].
func CheckChain(state *dps.RegistrationState, pub crypto.PublicKey, now time.Time) ([]*x509.Certificate, error) {
	var chain []*x509.Certificate
	for i, der := range state.IssuedCertificateChain {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("%w: certificate %d: %w", ErrChain, i+1, err)
		}
		chain = append(chain, c)
	}
	if len(chain) == 0 {
		return nil, fmt.Errorf("%w: the service sent none", ErrChain)
	}
	leaf := chain[0]
	key, ok := pub.(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !key.Equal(leaf.PublicKey) {
		return nil, fmt.Errorf("%w: it is for another key", ErrChain)
	}
	if leaf.Subject.CommonName != state.DeviceID {
		return nil, fmt.Errorf("%w: it is for %.100q, and the device is %s", ErrChain, leaf.Subject.CommonName, state.DeviceID)
	}
	for i, c := range chain {
		if now.Before(c.NotBefore) || now.After(c.NotAfter) {
			return nil, fmt.Errorf("%w: %q is valid from %s to %s", ErrChain, c.Subject, c.NotBefore.Format(time.RFC3339), c.NotAfter.Format(time.RFC3339))
		}
		if err := c.CheckSignatureFrom(chain[min(i+1, len(chain)-1)]); err != nil {
			return nil, fmt.Errorf("%w: %q: %w", ErrChain, c.Subject, err)
		}
	}
	return chain, nil
}

// SaveOperational keeps a chain in [OperationalFile], mode 0600: written whole, flushed, renamed over what was there. The key goes
// with it unless it is nil.
func SaveOperational(dir string, chain []*x509.Certificate, key crypto.Signer) error {
	var b bytes.Buffer
	if key != nil {
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return fmt.Errorf("operational key: %w", err)
		}
		defer clear(der)
		_ = pem.Encode(&b, &pem.Block{Type: "PRIVATE KEY", Bytes: der}) // a Buffer takes all
	}
	for _, c := range chain {
		_ = pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
	}
	defer func() { clear(b.Bytes()) }()
	if err := durable.Replace(filepath.Join(dir, OperationalFile), b.Bytes(), 0o600); err != nil {
		return fmt.Errorf("keeping the operational certificate: %w", err)
	}
	return nil
}
