package load

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	"time"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/device"
)

// An Attestation makes devices that prove themselves in one way.
type Attestation struct {
	Name   string
	Weight int
	// Group is the enrollment group that the service must name in its answers; empty where it names none, or nobody knows it.
	Group string
	// Protocols are those that it can come by; empty for all.
	Protocols []string
	// Max bounds how many devices there are, where each is dear; zero for no bound of its own.
	Max int
	// Rest is how long each of them leaves between two registrations, so that few do not come more often than a service lets one
	// device: callers are of the other attestations then, where there are some. Zero for no rest.
	Rest time.Duration
	// Device makes a device that the service must take: its stamp, and what it proves itself with. It runs in many goroutines at
	// once.
	Device func(id string) (device.Config, error)
	// Forge makes one that it must refuse.
	Forge func(id string) (device.Config, error)
}

// Symmetric makes the devices of a symmetric-key group.
func Symmetric(idScope, group string, weight int, groupKey []byte) Attestation {
	with := func(id string, key []byte) device.Config {
		return device.Config{Stamp: device.Stamp{IDScope: idScope, RegistrationID: id, Symmetric: true, SymmetricKey: key}}
	}
	return Attestation{Name: "symmetric", Weight: weight, Group: group,
		Device: func(id string) (device.Config, error) { return with(id, attest.DeriveKey(groupKey, id)), nil },
		Forge: func(id string) (device.Config, error) {
			key := make([]byte, 32)
			_, err := rand.Read(key)
			return with(id, key), err
		},
	}
}

// X509 makes the devices below a CA: its certificate first, then what goes behind it.
func X509(idScope string, weight int, chain []*x509.Certificate, key crypto.Signer) Attestation {
	below := func(id string, chain []*x509.Certificate, key crypto.Signer) (device.Config, error) {
		der, leafKey, err := newLeaf(id, chain[0], key)
		s := device.Stamp{IDScope: idScope, RegistrationID: id, Certificates: [][]byte{der}, PrivateKey: leafKey}
		for _, c := range chain {
			s.Certificates = append(s.Certificates, c.Raw)
		}
		return device.Config{Stamp: s}, err
	}
	return Attestation{Name: "x509", Weight: weight,
		Device: func(id string) (device.Config, error) { return below(id, chain, key) },
		Forge: func(id string) (device.Config, error) {
			// Somebody else's CA of the same name.
			twin := *chain[0]
			twinKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			if err != nil {
				return device.Config{}, err
			}
			twin.SignatureAlgorithm, twin.PublicKey, twin.SubjectKeyId, twin.AuthorityKeyId = 0, twinKey.Public(), nil, nil
			der, err := x509.CreateCertificate(rand.Reader, &twin, &twin, twinKey.Public(), twinKey)
			if err != nil {
				return device.Config{}, err
			}
			c, err := x509.ParseCertificate(der)
			if err != nil {
				return device.Config{}, err
			}
			return below(id, []*x509.Certificate{c}, twinKey)
		},
	}
}

// newLeaf makes a key and a device's certificate for it, good for a month.
func newLeaf(id string, issuer *x509.Certificate, issuerKey crypto.Signer) ([]byte, *ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	serial := make([]byte, 16)
	if _, err := rand.Read(serial); err != nil {
		return nil, nil, err
	}
	now := time.Now()
	t := &x509.Certificate{SerialNumber: new(big.Int).SetBytes(serial), Subject: pkix.Name{CommonName: id}, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(30 * 24 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, t, issuer, key.Public(), issuerKey)
	if err != nil {
		return nil, nil, fmt.Errorf("certifying %s: %w", id, err)
	}
	return der, key, nil
}
