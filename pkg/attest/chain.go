package attest

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/touchmark/touchmark/pkg/dps"
)

// Bounds of what a device may present.
const (
	MaxCertificates = 10
	maxPath         = 8
)

// Errors of a chain. None of them goes to the device.
var (
	ErrNoCertificate = errors.New("no client certificate")
	ErrCommonName    = errors.New("the certificate's common name is not the registration ID")
	ErrValidity      = errors.New("a certificate is not valid now")
	ErrChain         = errors.New("no path to a known CA")
)

// CheckLeaf says what keeps a leaf from being this device's: its common name and its validity. It says nothing of who
// vouches for it.
func CheckLeaf(leaf *x509.Certificate, registrationID string, now time.Time) error {
	if dps.Fold(leaf.Subject.CommonName) != dps.Fold(registrationID) {
		return fmt.Errorf("%w: %q, not %q", ErrCommonName, leaf.Subject.CommonName, registrationID)
	}
	if err := checkTime(leaf, now); err != nil {
		return err
	}
	if !forClients(leaf) {
		return fmt.Errorf("%w: the leaf is not for client authentication", ErrChain)
	}
	if len(leaf.UnhandledCriticalExtensions) > 0 {
		return fmt.Errorf("%w: the leaf has a critical extension that is not understood", ErrChain)
	}
	return nil
}

// forClients reports whether a certificate that names purposes names client authentication, or any.
func forClients(c *x509.Certificate) bool {
	if len(c.ExtKeyUsage) == 0 && len(c.UnknownExtKeyUsage) == 0 {
		return true
	}
	return slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageClientAuth) || slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageAny)
}

func checkTime(c *x509.Certificate, now time.Time) error {
	if now.Before(c.NotBefore) || now.After(c.NotAfter) {
		return fmt.Errorf("%w: %q from %s to %s", ErrValidity, c.Subject, c.NotBefore.UTC().Format(time.RFC3339), c.NotAfter.UTC().Format(time.RFC3339))
	}
	return nil
}

// Lookup returns the enrolled CA certificates that could have signed child, by its issuer name and authority key
// identifier. It is asked once per step of a path.
type Lookup[Group any] func(child *x509.Certificate) ([]Anchor[Group], error)

// An Anchor is an enrolled CA certificate and what it stands for.
type Anchor[Group any] struct {
	Certificate *x509.Certificate
	Group       Group
}

// FindGroup walks from the leaf towards the root and returns the first group whose certificate is in the path: presented
// by the device, or, as an issuer, known to the service only. Signatures, validity, basic constraints, key usage and path
// length are checked on the way (RFC 5280 §6.1); presented certificates may come in any order. The error is ErrChain when
// the path ends without a group.
func FindGroup[Group any](presented []*x509.Certificate, lookup Lookup[Group], now time.Time) (Group, error) {
	var none Group
	if len(presented) == 0 {
		return none, ErrNoCertificate
	}
	if len(presented) > MaxCertificates {
		return none, fmt.Errorf("%w: %d certificates were presented", ErrChain, len(presented))
	}
	child := presented[0]
	used := make([]bool, len(presented))
	used[0] = true
	reason := error(nil)
	for depth := 0; depth < maxPath; depth++ {
		// An enrolled certificate that signed the child decides, before anything higher up.
		anchors, err := lookup(child)
		if err != nil {
			return none, err
		}
		for _, a := range anchors {
			if err := signs(a.Certificate, child, depth, now); err != nil {
				reason = err
				continue
			}
			return a.Group, nil
		}
		next := -1
		for i, c := range presented {
			if used[i] || !bytes.Equal(c.RawSubject, child.RawIssuer) {
				continue
			}
			if err := signs(c, child, depth, now); err != nil {
				reason = err
				continue
			}
			next = i
			break
		}
		if next < 0 {
			break
		}
		used[next] = true
		child = presented[next]
	}
	if reason != nil {
		return none, fmt.Errorf("%w: %w", ErrChain, reason)
	}
	return none, fmt.Errorf("%w: nobody known signed %q", ErrChain, child.Subject)
}

// signs says what keeps parent from being the valid issuer of child, with so many intermediates below it.
func signs(parent, child *x509.Certificate, below int, now time.Time) error {
	if !bytes.Equal(parent.RawSubject, child.RawIssuer) {
		return fmt.Errorf("%q did not issue %q", parent.Subject, child.Subject)
	}
	if !parent.BasicConstraintsValid || !parent.IsCA {
		return fmt.Errorf("%q is no CA", parent.Subject)
	}
	if parent.KeyUsage != 0 && parent.KeyUsage&x509.KeyUsageCertSign == 0 {
		return fmt.Errorf("%q may not sign certificates", parent.Subject)
	}
	if (parent.MaxPathLen > 0 || parent.MaxPathLenZero) && below > parent.MaxPathLen {
		return fmt.Errorf("%q may not have %d CAs below it", parent.Subject, below)
	}
	if len(parent.UnhandledCriticalExtensions) > 0 {
		return fmt.Errorf("%q has a critical extension that is not understood", parent.Subject)
	}
	if !forClients(parent) {
		return fmt.Errorf("%q may not vouch for clients", parent.Subject)
	}
	if err := checkTime(parent, now); err != nil {
		return err
	}
	if err := child.CheckSignatureFrom(parent); err != nil {
		return fmt.Errorf("%q did not sign %q: %w", parent.Subject, child.Subject, err)
	}
	return nil
}
