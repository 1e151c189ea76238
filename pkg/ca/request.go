package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"sync"

	"github.com/touchmark/touchmark/hsm"
)

// MaxRequest bounds a certificate signing request, in octets of DER. One with a 4096-bit key has 1,600.
const MaxRequest = 16 << 10

// ErrRequest says that a certificate signing request is not one that anybody here would sign.
var ErrRequest = errors.New("certificate signing request")

// A Request is what counts of a certificate signing request: whose it says it is, and a key that whoever made it has. What
// else it asks for, in its subject, extensions and attributes, is not looked at.
type Request struct {
	CommonName string
	PublicKey  crypto.PublicKey
}

// ParseRequest reads the DER of a PKCS #10 request (RFC 2986) that holds one common name and a key of [RequestKeys], signed by
// that key with SHA-256 or better. Every error is an [ErrRequest].
func ParseRequest(der []byte) (Request, error) {
	var r Request
	if len(der) == 0 || len(der) > MaxRequest {
		return r, fmt.Errorf("%w: it has %d octets, want 1 to %d", ErrRequest, len(der), MaxRequest)
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return r, fmt.Errorf("%w: %w", ErrRequest, err)
	}
	names := 0
	for _, n := range csr.Subject.Names {
		if n.Type.Equal(oidCommonName) {
			names++
		}
	}
	if names != 1 {
		return r, fmt.Errorf("%w: its subject has %d common names, want one", ErrRequest, names)
	}
	// The key before the signature: an outsized one would cost time to verify with.
	if err := checkRequestKey(csr.PublicKey); err != nil {
		return r, fmt.Errorf("%w: %w", ErrRequest, err)
	}
	if !slices.Contains(requestSignatures, csr.SignatureAlgorithm) {
		return r, fmt.Errorf("%w: it is signed with %v", ErrRequest, csr.SignatureAlgorithm)
	}
	if err := csr.CheckSignature(); err != nil {
		return r, fmt.Errorf("%w: whoever made it does not have its key: %w", ErrRequest, err)
	}
	return Request{CommonName: csr.Subject.CommonName, PublicKey: csr.PublicKey}, nil
}

var (
	oidCommonName     = asn1.ObjectIdentifier{2, 5, 4, 3}
	requestSignatures = []x509.SignatureAlgorithm{x509.ECDSAWithSHA256, x509.ECDSAWithSHA384, x509.ECDSAWithSHA512, x509.SHA256WithRSA, x509.SHA384WithRSA,
		x509.SHA512WithRSA, x509.SHA256WithRSAPSS, x509.SHA384WithRSAPSS, x509.SHA512WithRSAPSS, x509.PureEd25519}
)

// RequestKeys returns the kinds of keys that a request may hold.
func RequestKeys() []hsm.Algorithm {
	return []hsm.Algorithm{hsm.ECP256, hsm.ECP384, hsm.RSA2048, hsm.RSA3072, hsm.RSA4096, hsm.Ed25519}
}

// checkRequestKey says why a key gets no certificate. Points of elliptic curves were looked at when they were parsed.
func checkRequestKey(pub crypto.PublicKey) error {
	alg, err := AlgorithmOf(pub)
	if err != nil {
		return err
	}
	if !slices.Contains(RequestKeys(), alg) {
		return fmt.Errorf("a key of kind %s gets no certificate", alg)
	}
	k, ok := pub.(*rsa.PublicKey)
	if !ok {
		return nil
	}
	// Below 65537 there are attacks on careless padding; above 2³¹ it only costs time (FIPS 186-5 §A.1.1, RFC 8017 §3.1).
	if k.E < 1<<16 || k.E > 1<<31-1 || k.E&1 == 0 {
		return fmt.Errorf("its RSA exponent is %d", k.E)
	}
	if new(big.Int).GCD(nil, nil, k.N, smallPrimes()).BitLen() > 1 || k.N.ProbablyPrime(0) {
		return errors.New("its RSA modulus is no product of two large primes")
	}
	return nil
}

// smallPrimes is the product of the primes below 752, which no sound modulus shares a factor with.
var smallPrimes = sync.OnceValue(func() *big.Int {
	p := big.NewInt(2)
	for n := int64(3); n < 752; n += 2 {
		if big.NewInt(n).ProbablyPrime(0) {
			p.Mul(p, big.NewInt(n))
		}
	}
	return p
})

// AlgorithmOf names what a public key is.
func AlgorithmOf(pub crypto.PublicKey) (hsm.Algorithm, error) {
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		switch k.Curve {
		case elliptic.P256():
			return hsm.ECP256, nil
		case elliptic.P384():
			return hsm.ECP384, nil
		case elliptic.P521():
			return hsm.ECP521, nil
		}
	case *rsa.PublicKey:
		switch k.N.BitLen() {
		case 2048:
			return hsm.RSA2048, nil
		case 3072:
			return hsm.RSA3072, nil
		case 4096:
			return hsm.RSA4096, nil
		}
	case ed25519.PublicKey:
		return hsm.Ed25519, nil
	}
	return "", fmt.Errorf("a key of its kind (%T) gets no certificate here", pub)
}
