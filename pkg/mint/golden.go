package mint

import (
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"maps"
	"math/big"
	"time"
)

// GoldenSerial is the serial of the golden sample: no unit has it, and nothing is written down for it.
const GoldenSerial = "GOLDEN-0000"

// Golden renders the stamp that a reserved serial would get, with a key and a certificate that are the same on every line and good for
// nothing, and returns the SHA-256 of each of its files, in hex. As long as profile, templates and program make what an engineer
// accepted, they are the same. Fields are those that units have.
func (r *Run) Golden(ctx context.Context, fields map[string]string) (map[string]string, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	fields = maps.Clone(fields)
	if fields == nil {
		fields = make(map[string]string)
	}
	for _, c := range r.r.List.Columns {
		if _, ok := fields[c]; !ok {
			fields[c] = "0" // which may go where an image has a number
		}
	}
	row, err := r.Row(GoldenSerial, fields)
	if err != nil {
		return nil, err
	}
	if row.RegistrationID == "" {
		row.RegistrationID = "golden"
	}
	u := &unit{row: &row, symmetric: make([]byte, sha256.Size), keyURI: "golden:"}
	key, cert, err := goldenIdentity(row.RegistrationID)
	if err != nil {
		return nil, err
	}
	u.cert = cert
	switch p := r.r.Profile; {
	case p.Attestation == AttestationX509 && p.Key.In == keyInMemory:
		u.keyPEM = key
	case p.Attestation != AttestationX509 || p.Key.In != keyInTPM:
		key = nil
	}
	if u.files, err = r.r.renderFiles(u, key, standInKeys); err != nil {
		return nil, fmt.Errorf("golden sample: %w", err)
	}
	sums := make(map[string]string, len(u.files))
	for _, f := range u.files {
		sum := sha256.Sum256(f.Data)
		sums[f.Name] = hex.EncodeToString(sum[:])
	}
	return sums, nil
}

// goldenIdentity makes a key from nothing but zeros, and a certificate that it signs itself.
func goldenIdentity(name string) (keyPEM, cert []byte, err error) {
	key := ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize))
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, nil, err
	}
	t := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: time.Unix(0, 0), NotAfter: time.Unix(0, 0)}
	cert, err = x509.CreateCertificate(nil, t, t, key.Public(), key)
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), cert, err
}
