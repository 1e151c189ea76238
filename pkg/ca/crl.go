package ca

import (
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"math/big"
	"time"
)

// The reasons of RFC 5280 §5.3.1 that certificates of devices are revoked for.
const (
	Unspecified = 0
	Superseded  = 4 // the device has a new certificate
	Ceased      = 5 // the device is no more
)

// A Revoked is a certificate that counts no more.
type Revoked struct {
	SerialNumber string // hex
	At           time.Time
	Reason       int
}

// crlValidity is how long a list says that it is current; the next ending makes a new one, and touchmark ca crl does.
const crlValidity = 90 * 24 * time.Hour

// CRL returns the issuer's list of revoked certificates (RFC 5280 §5) in PEM. The number must grow with each list that says more.
func (i *Issuer) CRL(revoked []Revoked, number int64, now time.Time) ([]byte, error) {
	list := &x509.RevocationList{Number: big.NewInt(number), ThisUpdate: now, NextUpdate: now.Add(crlValidity)}
	for _, r := range revoked {
		n, ok := new(big.Int).SetString(r.SerialNumber, 16)
		if !ok {
			return nil, fmt.Errorf("revoked certificate %.50q: its serial number is not hex", r.SerialNumber)
		}
		list.RevokedCertificateEntries = append(list.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: n, RevocationTime: r.At.Truncate(time.Second), ReasonCode: r.Reason})
	}
	der, err := x509.CreateRevocationList(i.cfg.Rand, list, i.cfg.Certificate, i.cfg.Signer)
	if err != nil {
		return nil, fmt.Errorf("signing the list of revoked certificates: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der}), nil
}
