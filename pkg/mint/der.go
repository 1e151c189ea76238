package mint

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
)

// A P-256 key is the same DER around 32 and 65 octets every time. Encoding it by reflection, twice for each device, costs as
// much as making the key does.
var (
	// SubjectPublicKeyInfo (RFC 5480 §2) up to the point.
	p256SPKI = []byte("\x30\x59\x30\x13\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07\x03\x42\x00")
	// PrivateKeyInfo (RFC 5958 §2) around ECPrivateKey (RFC 5915 §3) up to the scalar, and from there to the point.
	p256PKCS8  = []byte("\x30\x81\x87\x02\x01\x00\x30\x13\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07\x04\x6d\x30\x6b\x02\x01\x01\x04\x20")
	p256Public = []byte("\xa1\x44\x03\x42\x00")
)

// marshalPKIX returns a public key's SubjectPublicKeyInfo, as x509.MarshalPKIXPublicKey does.
func marshalPKIX(pub crypto.PublicKey) ([]byte, error) {
	if k, ok := pub.(*ecdsa.PublicKey); ok && k.Curve == elliptic.P256() {
		point, err := k.Bytes()
		if err != nil {
			return nil, err
		}
		return append(p256SPKI[:len(p256SPKI):len(p256SPKI)], point...), nil
	}
	return x509.MarshalPKIXPublicKey(pub)
}

// marshalPKCS8 returns a private key's PKCS #8, as x509.MarshalPKCS8PrivateKey does.
func marshalPKCS8(key crypto.Signer) ([]byte, error) {
	if k, ok := key.(*ecdsa.PrivateKey); ok && k.Curve == elliptic.P256() {
		scalar, err := k.Bytes()
		if err != nil {
			return nil, err
		}
		defer clear(scalar)
		point, err := k.PublicKey.Bytes()
		if err != nil {
			return nil, err
		}
		der := make([]byte, 0, len(p256PKCS8)+len(scalar)+len(p256Public)+len(point))
		return append(append(append(append(der, p256PKCS8...), scalar...), p256Public...), point...), nil
	}
	return x509.MarshalPKCS8PrivateKey(key)
}
