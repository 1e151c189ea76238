package tpm

import (
	"fmt"
	"sync"

	"github.com/google/go-tpm/tpm2"

	"github.com/touchmark/touchmark/hsm"
)

// srkTemplate is the ECC P-256 storage primary that TSS2 key files name by the owner hierarchy: the TCG's SRK template with
// an empty unique field, as OpenSSL's provider makes it.
func srkTemplate() tpm2.TPMTPublic {
	t := tpm2.ECCSRKTemplate
	t.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{})
	return t
}

// isStorageKey reports whether a key can be the parent of ours: restricted, decrypting, with AES for its children, made by the
// TPM and bound to it, and used without a policy.
func isStorageKey(p *tpm2.TPMTPublic) bool {
	a := p.ObjectAttributes
	if !a.Restricted || !a.Decrypt || a.SignEncrypt || !a.FixedTPM || !a.FixedParent || !a.SensitiveDataOrigin || !a.UserWithAuth || p.NameAlg != tpm2.TPMAlgSHA256 {
		return false
	}
	switch p.Type {
	case tpm2.TPMAlgRSA:
		d, err := p.Parameters.RSADetail()
		return err == nil && d.Symmetric.Algorithm == tpm2.TPMAlgAES && d.KeyBits >= 2048
	case tpm2.TPMAlgECC:
		d, err := p.Parameters.ECCDetail()
		return err == nil && d.Symmetric.Algorithm == tpm2.TPMAlgAES
	}
	return false
}

// template says how a key of that spec is made.
func template(spec hsm.Spec) (tpm2.TPMTPublic, error) {
	t := tpm2.TPMTPublic{
		NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{
			FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true, NoDA: true,
			SignEncrypt: spec.Usage != hsm.Agree, Decrypt: spec.Usage == hsm.Agree,
		},
	}
	ecc := func(curve tpm2.TPMECCCurve) {
		t.Type = tpm2.TPMAlgECC
		t.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{CurveID: curve})
	}
	switch spec.Algorithm {
	case hsm.ECP256:
		ecc(tpm2.TPMECCNistP256)
	case hsm.ECP384:
		ecc(tpm2.TPMECCNistP384)
	case hsm.RSA2048, hsm.RSA3072, hsm.RSA4096:
		bits := map[hsm.Algorithm]tpm2.TPMKeyBits{hsm.RSA2048: 2048, hsm.RSA3072: 3072, hsm.RSA4096: 4096}[spec.Algorithm]
		t.Type = tpm2.TPMAlgRSA
		t.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgRSA, &tpm2.TPMSRSAParms{KeyBits: bits})
	case hsm.HMACSHA256:
		t.Type = tpm2.TPMAlgKeyedHash
		t.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgKeyedHash, &tpm2.TPMSKeyedHashParms{Scheme: tpm2.TPMTKeyedHashScheme{
			Scheme:  tpm2.TPMAlgHMAC,
			Details: tpm2.NewTPMUSchemeKeyedHash(tpm2.TPMAlgHMAC, &tpm2.TPMSSchemeHMAC{HashAlg: tpm2.TPMAlgSHA256}),
		}})
	default:
		return t, fmt.Errorf("algorithm %s: TPM 2.0 does not have it: %w", spec.Algorithm, hsm.ErrUnsupported)
	}
	return t, nil
}

// templates remembers the octets of templates, by algorithm and usage.
var templates sync.Map

// templateOctets returns the TPMT_PUBLIC of template.
func templateOctets(spec hsm.Spec) ([]byte, error) {
	key := [2]string{string(spec.Algorithm), string(spec.Usage)}
	if b, ok := templates.Load(key); ok {
		return b.([]byte), nil
	}
	t, err := template(spec)
	if err != nil {
		return nil, err
	}
	b := tpm2.Marshal(t)
	templates.Store(key, b)
	return b, nil
}

func rsaAlgorithm(bits int) hsm.Algorithm {
	switch bits {
	case 2048:
		return hsm.RSA2048
	case 3072:
		return hsm.RSA3072
	case 4096:
		return hsm.RSA4096
	}
	return ""
}

// algorithmOf says what a key is, or that hsm's contract has no use for it.
func algorithmOf(p *tpm2.TPMTPublic) (hsm.Algorithm, hsm.Usage, error) {
	a := p.ObjectAttributes
	unsupported := func(what string) (hsm.Algorithm, hsm.Usage, error) {
		return "", "", fmt.Errorf("%s: %w", what, hsm.ErrUnsupported)
	}
	switch {
	case a.Restricted:
		return unsupported("a restricted key, for the TPM's own use")
	case !a.UserWithAuth:
		return unsupported("a key that is used by policy only")
	case !a.SignEncrypt && !a.Decrypt:
		return unsupported("a key without a use")
	}
	switch p.Type {
	case tpm2.TPMAlgECC:
		d, err := p.Parameters.ECCDetail()
		if err != nil {
			return "", "", err
		}
		alg := map[tpm2.TPMECCCurve]hsm.Algorithm{tpm2.TPMECCNistP256: hsm.ECP256, tpm2.TPMECCNistP384: hsm.ECP384}[d.CurveID]
		switch {
		case alg == "":
			return unsupported(fmt.Sprintf("curve %v", d.CurveID))
		case a.SignEncrypt:
			return alg, hsm.Sign, nil
		case alg == hsm.ECP256:
			return alg, hsm.Agree, nil
		}
		return unsupported("ECDH on a curve other than P-256")
	case tpm2.TPMAlgRSA:
		d, err := p.Parameters.RSADetail()
		if err != nil {
			return "", "", err
		}
		if alg := rsaAlgorithm(int(d.KeyBits)); alg != "" && a.SignEncrypt && (d.Exponent == 0 || d.Exponent == 65537) {
			return alg, hsm.Sign, nil
		}
		return unsupported("an RSA key that does not sign, or of that size")
	case tpm2.TPMAlgKeyedHash:
		d, err := p.Parameters.KeyedHashDetail()
		if err != nil {
			return "", "", err
		}
		if d.Scheme.Scheme == tpm2.TPMAlgHMAC && a.SignEncrypt {
			if h, err := d.Scheme.Details.HMAC(); err == nil && h.HashAlg == tpm2.TPMAlgSHA256 {
				return hsm.HMACSHA256, hsm.MAC, nil
			}
		}
		return unsupported("a keyed hash other than HMAC-SHA256")
	}
	return unsupported(fmt.Sprintf("a key of type %v", p.Type))
}
