// Package ca makes certificates: root and issuing CAs, and leaves by profile. It knows crypto.Signer and not where keys
// live.
//
// A leaf is made in two steps, so that nothing is signed that was not looked at first. [Issuer.Prepare] renders a profile's
// template (go.step.sm/crypto/x509util), holds it against the CA and lints what would come out with a throw-away key;
// [Prepared.Plan] fixes one leaf's serial number and validity; [Prepared.Issue] signs it, once. A plan that is written down
// before the signature makes the same certificate again after a crash.
//
// Most templates differ between leaves in the common name only. Prepare finds out, and Issue then puts the TBSCertificate
// together from the prepared parts instead of rendering and parsing each anew. The first certificate of every Prepared is
// verified against the CA before it is given out.
//
// Certificates follow RFC 5280: serial numbers of 20 octets from a random source, key identifiers by RFC 7093 §2 (1).
package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"io"
	"math/big"
	"time"
)

// ErrClock says that the clock cannot be right: it stands before the CA's certificate begins.
var ErrClock = errors.New("clock is before the CA's certificate begins")

// ErrEnded says that a CA, or one above it, is not valid any more.
var ErrEnded = errors.New("certificate authority has ended")

// AuthorityConfig says what CA to make.
type AuthorityConfig struct {
	Subject  pkix.Name
	Signer   crypto.Signer
	Now      time.Time
	Validity time.Duration
	// Rand is where the serial number comes from; nil means crypto/rand.
	Rand io.Reader
}

// NewRoot makes a self-signed root CA.
func NewRoot(cfg AuthorityConfig) (*x509.Certificate, error) {
	t, err := authority(cfg)
	if err != nil {
		return nil, err
	}
	return create(cfg.Rand, t, t, cfg.Signer.Public(), cfg.Signer)
}

// NewIssuing makes an issuing CA under a root. It signs leaves only (path length 0), and ends with its root.
func NewIssuing(cfg AuthorityConfig, root *x509.Certificate, rootKey crypto.Signer) (*x509.Certificate, error) {
	t, err := authority(cfg)
	if err != nil {
		return nil, err
	}
	t.MaxPathLen, t.MaxPathLenZero = 0, true
	t.AuthorityKeyId = root.SubjectKeyId
	if t.NotAfter.After(root.NotAfter) {
		t.NotAfter = root.NotAfter
	}
	if t.NotBefore.Before(root.NotBefore) {
		t.NotBefore = root.NotBefore
	}
	return create(cfg.Rand, t, root, cfg.Signer.Public(), rootKey)
}

func authority(cfg AuthorityConfig) (*x509.Certificate, error) {
	serial, err := newSerial(cfg.Rand)
	if err != nil {
		return nil, err
	}
	ski, err := keyID(cfg.Signer.Public())
	if err != nil {
		return nil, err
	}
	begin := cfg.Now.UTC().Truncate(time.Second)
	return &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes(serial), Subject: cfg.Subject, NotBefore: begin, NotAfter: begin.Add(cfg.Validity),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, BasicConstraintsValid: true, IsCA: true, MaxPathLen: -1, SubjectKeyId: ski,
	}, nil
}

func create(random io.Reader, t, parent *x509.Certificate, pub crypto.PublicKey, priv crypto.Signer) (*x509.Certificate, error) {
	if random == nil {
		random = rand.Reader
	}
	der, err := x509.CreateCertificate(random, t, parent, pub, priv)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// serialSize is the length of serial numbers, the most that RFC 5280 §4.1.2.2 allows.
const serialSize = 20

// newSerial returns a random serial number of exactly 20 octets whose first bit is clear, so that it is positive and its
// DER has 20 octets too.
func newSerial(random io.Reader) ([]byte, error) {
	if random == nil {
		random = rand.Reader
	}
	b := make([]byte, serialSize)
	if _, err := io.ReadFull(random, b); err != nil {
		return nil, fmt.Errorf("making a serial number: %w", err)
	}
	b[0] = b[0]&0x7f | 0x40
	return b, nil
}

// keyID returns the key identifier: the leftmost 160 bits of the SHA-256 of the subjectPublicKey (RFC 7093 §2 (1)).
func keyID(pub crypto.PublicKey) ([]byte, error) {
	spki, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return nil, fmt.Errorf("public key: %w", err)
	}
	return keyIDOf(spki)
}

func keyIDOf(spki []byte) ([]byte, error) {
	var parsed struct {
		Algorithm pkix.AlgorithmIdentifier
		PublicKey asn1.BitString
	}
	if _, err := asn1.Unmarshal(spki, &parsed); err != nil {
		return nil, err
	}
	sum := sha256.Sum256(parsed.PublicKey.Bytes)
	return sum[:20], nil
}

// throwAway makes a key of the same kind, for linting. RSA keys of every size sign with the same algorithm.
func throwAway(pub crypto.PublicKey) (crypto.Signer, error) {
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		return ecdsa.GenerateKey(k.Curve, rand.Reader)
	case *rsa.PublicKey:
		return rsa.GenerateKey(rand.Reader, 2048)
	case ed25519.PublicKey:
		_, priv, err := ed25519.GenerateKey(rand.Reader)
		return priv, err
	}
	return nil, fmt.Errorf("a CA key of type %T cannot sign certificates", pub)
}

// digestFor returns the hash that x509 signs with under a key, and 0 for Ed25519.
func digestFor(pub crypto.PublicKey) crypto.Hash {
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		switch k.Curve {
		case elliptic.P384():
			return crypto.SHA384
		case elliptic.P521():
			return crypto.SHA512
		}
		return crypto.SHA256
	case ed25519.PublicKey:
		return 0
	}
	return crypto.SHA256
}
