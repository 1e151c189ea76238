package attest

import (
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"slices"
)

// MaxCandidates bounds how many CAs of one name are tried where key identifiers do not tell them apart.
const MaxCandidates = 16

// maxKeyID bounds key identifiers, in octets: what is longer names nothing.
const maxKeyID = 64

// KeyIDs returns the identifiers that certificates below a CA may name its key by: its own subject key identifier, which a
// CA need not have and which may change when it is renewed, and those that are computed from the key (RFC 5280 §4.2.1.2
// method 1; RFC 7093 §2 methods 1 and 4).
func KeyIDs(ca *x509.Certificate) [][]byte {
	var ids [][]byte
	if n := len(ca.SubjectKeyId); n > 0 && n <= maxKeyID {
		ids = append(ids, ca.SubjectKeyId)
	}
	var spki struct {
		Algorithm asn1.RawValue
		Key       asn1.BitString
	}
	if _, err := asn1.Unmarshal(ca.RawSubjectPublicKeyInfo, &spki); err == nil {
		one, seven := sha1.Sum(spki.Key.Bytes), sha256.Sum256(spki.Key.Bytes)
		ids = append(ids, one[:], seven[:20])
	}
	whole := sha256.Sum256(ca.RawSubjectPublicKeyInfo)
	ids = append(ids, whole[:])
	slices.SortFunc(ids, slices.Compare[[]byte])
	return slices.CompactFunc(ids, slices.Equal[[]byte])
}

// AuthorityKeyID returns what a certificate calls its issuer's key, nil for nothing that could be looked up.
func AuthorityKeyID(child *x509.Certificate) []byte {
	if len(child.AuthorityKeyId) > maxKeyID {
		return nil
	}
	return child.AuthorityKeyId
}

// A Pool has CA certificates that complete paths and begin none. It does not change, and nil is an empty one.
type Pool struct {
	byKey, byName map[string][]*x509.Certificate
}

// NewPool returns a pool of certificates.
func NewPool(certs []*x509.Certificate) *Pool {
	p := &Pool{make(map[string][]*x509.Certificate), make(map[string][]*x509.Certificate)}
	for _, c := range certs {
		name := string(c.RawSubject)
		p.byName[name] = append(p.byName[name], c)
		for _, id := range KeyIDs(c) {
			p.byKey[name+string(id)] = append(p.byKey[name+string(id)], c)
		}
	}
	return p
}

// issuers returns those that may have signed child, by key identifier where it names one.
func (p *Pool) issuers(child *x509.Certificate) []*x509.Certificate {
	if p == nil {
		return nil
	}
	found := p.byKey[string(child.RawIssuer)+string(AuthorityKeyID(child))]
	if len(found) == 0 {
		found = p.byName[string(child.RawIssuer)]
	}
	if len(found) > MaxCandidates {
		return nil
	}
	return found
}
