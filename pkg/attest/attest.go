// Package attest judges what a device presents as proof of who it is: an X.509 certificate chain or a symmetric-key token. A TPM's
// proof is such a token, too: [Activation] makes the key for it, wrapped so that only the TPM can open it.
//
// It is pure: it reads no clock, no store and no network; callers pass in what it needs.
package attest

import "crypto/x509"

// A Proof is what a device presented this time. All of it is untrusted until judged, except that the TLS handshake has
// shown possession of the first certificate's private key.
type Proof struct {
	// Certificates as the TLS client sent them, leaf first; the rest may come in any order. Empty without a client
	// certificate.
	Certificates []*x509.Certificate
	// Token is the whole SAS token, or empty. Where both are present the token decides.
	Token string
	// TPM is set for a TPM that asks for a challenge; nil otherwise.
	TPM *TPMKeys
}

// TPMKeys are a TPM's public keys as the device sent them: whole TPM2B_PUBLIC structures (device API, section 9.1).
type TPMKeys struct {
	EK  []byte // endorsement key
	SRK []byte // storage root key
}
