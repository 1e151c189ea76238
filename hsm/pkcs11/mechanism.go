//go:build cgo

package pkcs11

import (
	"context"
	"fmt"
	"strings"

	"github.com/miekg/pkcs11"

	"github.com/touchmark/touchmark/hsm"
)

// Numbers that PKCS#11 3.0 added, and NSS's name for an EC key's point in its private half, which the binding does not name.
const (
	ckkECEdwards           = 0x40
	ckmEdwardsKeyPairGen   = 0x1055
	ckmEdDSA               = 0x1057
	ckmAESKeyWrapKWP       = 0x210B
	ckmSHA256KeyGen        = 0x4005
	ckaNSSDB               = 0xd5a0db00
	ckaPublicKeyInfo       = 0x129
	smallestPlausibleRSA   = 1024
	largestImplausibleBits = 111
)

var mechanismNames = map[uint]string{
	pkcs11.CKM_EC_KEY_PAIR_GEN: "CKM_EC_KEY_PAIR_GEN", pkcs11.CKM_ECDSA: "CKM_ECDSA", pkcs11.CKM_ECDH1_DERIVE: "CKM_ECDH1_DERIVE",
	ckmEdwardsKeyPairGen: "CKM_EC_EDWARDS_KEY_PAIR_GEN", ckmEdDSA: "CKM_EDDSA",
	pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN: "CKM_RSA_PKCS_KEY_PAIR_GEN", pkcs11.CKM_RSA_PKCS: "CKM_RSA_PKCS", pkcs11.CKM_RSA_PKCS_PSS: "CKM_RSA_PKCS_PSS", pkcs11.CKM_RSA_X_509: "CKM_RSA_X_509",
	pkcs11.CKM_GENERIC_SECRET_KEY_GEN: "CKM_GENERIC_SECRET_KEY_GEN", ckmSHA256KeyGen: "CKM_SHA256_KEY_GEN", pkcs11.CKM_NC_SHA256_HMAC_KEY_GEN: "CKM_NC_SHA256_HMAC_KEY_GEN", pkcs11.CKM_SHA256_HMAC: "CKM_SHA256_HMAC",
	pkcs11.CKM_AES_KEY_GEN: "CKM_AES_KEY_GEN", ckmAESKeyWrapKWP: "CKM_AES_KEY_WRAP_KWP", pkcs11.CKM_AES_KEY_WRAP_PAD: "CKM_AES_KEY_WRAP_PAD",
}

// mechanisms is what a token offers.
type mechanisms map[uint]pkcs11.MechanismInfo

// mechanisms reads what the token in a slot offers. The caller has entered the module.
func (m *module) mechanisms(slot uint) (mechanisms, error) {
	list, err := m.ctx.GetMechanismList(slot)
	if err != nil {
		return nil, fmt.Errorf("listing mechanisms: %w", err)
	}
	all := make(mechanisms, len(list))
	for _, offered := range list {
		if mechanismNames[offered.Mechanism] == "" {
			continue
		}
		// A module may list what it says nothing about; then it has no limits that we know.
		all[offered.Mechanism], _ = m.ctx.GetMechanismInfo(slot, []*pkcs11.Mechanism{offered})
		m.beat()
	}
	return all, nil
}

// has reports whether a mechanism is offered for keys of so many bits; 0 means any.
func (m mechanisms) has(mech, bits uint) bool {
	info, ok := m[mech]
	if !ok {
		return false
	}
	most := info.MaxKeySize
	if mech == pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN && most < smallestPlausibleRSA || most <= largestImplausibleBits {
		return true // octets, or nothing, where the standard has bits
	}
	return bits <= most
}

var (
	curveBits = map[hsm.Algorithm]uint{hsm.ECP256: 256, hsm.ECP384: 384, hsm.ECP521: 521}
	rsaBits   = map[hsm.Algorithm]int{hsm.RSA2048: 2048, hsm.RSA3072: 3072, hsm.RSA4096: 4096}
)

// A way is one set of mechanisms that does an operation.
type way struct {
	mechs    []uint
	bits     uint // of the first mechanism's key, or 0
	keyType  uint // for secret keys
	fallback string
}

// ways lists how an operation can be done, the best one first.
func ways(operation string, alg hsm.Algorithm) []way {
	one := func(mech uint) []way { return []way{{mechs: []uint{mech}}} }
	switch operation {
	case "make":
		switch {
		case curveBits[alg] != 0:
			return []way{{mechs: []uint{pkcs11.CKM_EC_KEY_PAIR_GEN}, bits: curveBits[alg]}}
		case rsaBits[alg] != 0:
			return []way{{mechs: []uint{pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN}, bits: uint(rsaBits[alg])}}
		case alg == hsm.Ed25519:
			return one(ckmEdwardsKeyPairGen)
		case alg == hsm.AES256:
			return []way{{mechs: []uint{pkcs11.CKM_AES_KEY_GEN}, keyType: pkcs11.CKK_AES}}
		}
		return []way{
			{mechs: []uint{pkcs11.CKM_GENERIC_SECRET_KEY_GEN}, keyType: pkcs11.CKK_GENERIC_SECRET},
			{mechs: []uint{ckmSHA256KeyGen}, keyType: pkcs11.CKK_SHA256_HMAC, fallback: "a key of type CKK_SHA256_HMAC"},
			// nShield does not let generic secrets be HMAC keys.
			{mechs: []uint{pkcs11.CKM_NC_SHA256_HMAC_KEY_GEN}, keyType: pkcs11.CKK_SHA256_HMAC, fallback: "a key of type CKK_SHA256_HMAC"},
		}
	case "sign":
		switch {
		case alg == hsm.Ed25519:
			return one(ckmEdDSA)
		case rsaBits[alg] != 0:
			return []way{
				{mechs: []uint{pkcs11.CKM_RSA_PKCS, pkcs11.CKM_RSA_PKCS_PSS}},
				{mechs: []uint{pkcs11.CKM_RSA_PKCS, pkcs11.CKM_RSA_X_509}, fallback: "PSS is padded outside, for raw CKM_RSA_X_509"},
				{mechs: []uint{pkcs11.CKM_RSA_PKCS}, fallback: "PKCS #1 v1.5 only, no PSS"},
			}
		}
		return one(pkcs11.CKM_ECDSA)
	case "mac":
		return one(pkcs11.CKM_SHA256_HMAC)
	case "agree":
		return one(pkcs11.CKM_ECDH1_DERIVE)
	case "wrap", "unwrap":
		return []way{
			{mechs: []uint{ckmAESKeyWrapKWP}},
			// PKCS#11 2.40 left open which padding this is; SoftHSM and others have RFC 5649.
			{mechs: []uint{pkcs11.CKM_AES_KEY_WRAP_PAD}, fallback: "CKM_AES_KEY_WRAP_PAD, taken for RFC 5649"},
		}
	}
	return nil // import: CreateObject has no mechanism
}

// way returns the best way that the token has for an operation, or hsm.ErrUnsupported with the names of what is missing.
func (m mechanisms) way(operation string, alg hsm.Algorithm) (way, error) {
	all := ways(operation, alg)
	for _, w := range all {
		if m.hasAll(w) {
			return w, nil
		}
	}
	if len(all) == 0 {
		return way{}, nil
	}
	names := strings.Join(all[0].names(), " and ")
	if w := all[0]; w.bits > 0 {
		if info, ok := m[w.mechs[0]]; ok {
			return way{}, fmt.Errorf("the token's %s goes up to %d bits, not %d: %w", names, info.MaxKeySize, w.bits, hsm.ErrUnsupported)
		}
	}
	return way{}, fmt.Errorf("the token offers no %s: %w", names, hsm.ErrUnsupported)
}

// way is the token's; where p11-kit is in between it may be p11-kit that is at fault.
func (s *Store) way(operation string, alg hsm.Algorithm) (way, error) {
	w, err := s.mechs.way(operation, alg)
	if err != nil && s.mod.host != nil {
		err = fmt.Errorf("p11-kit does not carry it, or %w", err)
	}
	return w, err
}

func (m mechanisms) hasAll(w way) bool {
	for i, mech := range w.mechs {
		bits := uint(0)
		if i == 0 {
			bits = w.bits
		}
		if !m.has(mech, bits) {
			return false
		}
	}
	return true
}

func (w way) names() []string {
	var names []string
	for _, m := range w.mechs {
		names = append(names, mechanismNames[m])
	}
	return names
}

// use returns the operation that keys of that algorithm and usage are for.
func use(alg hsm.Algorithm, usage hsm.Usage) string {
	if usage == hsm.Agree {
		return "agree"
	}
	switch alg {
	case hsm.HMACSHA256:
		return "mac"
	case hsm.AES256:
		return "wrap"
	}
	return "sign"
}

// Capabilities returns what the token announces to be able to do, operation by operation: the mechanisms that are needed
// against those that it offers (C_GetMechanismList, PKCS#11 2.40 §5.5), and how it is worked around. It asks the token for
// nothing else and makes no key.
func (s *Store) Capabilities(context.Context) ([]Capability, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, errClosed
	}
	return s.mechs.capabilities(), nil
}

func (m mechanisms) capabilities() []Capability {
	var all []Capability
	add := func(operation string, alg hsm.Algorithm) {
		c := Capability{Operation: operation, Algorithm: alg, Can: true}
		w, err := m.way(operation, alg)
		if err != nil {
			c.Can, w = false, ways(operation, alg)[0]
		}
		c.Mechanisms, c.Fallback = w.names(), w.fallback
		all = append(all, c)
	}
	for _, alg := range hsm.Algorithms {
		add("make", alg)
		if alg == hsm.AES256 {
			add("wrap", alg)
			add("unwrap", alg)
			continue
		}
		add(use(alg, ""), alg)
		if alg == hsm.ECP256 {
			add("agree", alg)
		}
	}
	return all
}
