// Package evidence says where a device's private key lives, in a form that travels with a bundle and that an operator can
// judge with nothing at hand but the station's public key.
//
// Evidence of kind [Token] is what the token itself answered when it was asked about the key it had just made: that it was
// made there, was always sensitive and never extractable, and which token and module it was. A PKCS#11 token signs none of
// this, so it is worth what the station's word is worth, and a bundle or a [Statement] carries the station's signature over
// it.
//
// Evidence of kind [TPM] is a TPM's own signed statement about the key, with what ties it to the TPM's endorsement key: see
// hsm/tpm/residency, which says who vouches for what.
package evidence

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/signed"
	"github.com/touchmark/touchmark/hsm/tpm/residency"
)

// A Residency is a kind of place that a key can live in for good.
type Residency string

// The residencies that can be asked for.
const (
	Token Residency = "token" // a PKCS#11 token
	TPM   Residency = "tpm"   // the device's TPM
)

// Residencies lists them as help texts show them.
var Residencies = []Residency{Token, TPM}

// ParseResidency returns the residency of that exact name.
func ParseResidency(s string) (Residency, error) {
	for _, r := range Residencies {
		if string(r) == s {
			return r, nil
		}
	}
	return "", fmt.Errorf("residency %q: want one of %v", s, Residencies)
}

// ErrResidency says that nothing shows a key to live where it should.
var ErrResidency = errors.New("no proof of where the key lives")

// Evidence is about one key.
type Evidence struct {
	Kind Residency `json:"kind"`
	// KeyHash is the lower-case hex SHA-256 of the key's SubjectPublicKeyInfo.
	KeyHash string `json:"keyHash"`
	// Attributes and Store are what a token said of the key and of itself.
	Attributes *hsm.Attributes `json:"attributes,omitempty"`
	Store      *hsm.Identity   `json:"store,omitempty"`
	// TPM is what a TPM proved.
	TPM *residency.Evidence `json:"tpm,omitempty"`
	// Maker is what the certificate of the TPM's endorsement key said, where the station held it against its makers.
	Maker *residency.EKCertificate `json:"maker,omitempty"`
}

// KeyHash returns how evidence names a public key.
func KeyHash(pub crypto.PublicKey) (string, error) {
	spki, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return "", fmt.Errorf("public key: %w", err)
	}
	sum := sha256.Sum256(spki)
	return hex.EncodeToString(sum[:]), nil
}

// OfToken asks a token about a key that signs. The identity is the token's, which a caller with many keys asks for once.
func OfToken(ctx context.Context, k hsm.SigningKey, id hsm.Identity) (*Evidence, error) {
	hash, err := KeyHash(k.Public())
	if err != nil {
		return nil, err
	}
	attr, err := k.Attributes(ctx)
	if err != nil {
		return nil, fmt.Errorf("reading the attributes of key %q back: %w", k.Name(), err)
	}
	return &Evidence{Kind: Token, KeyHash: hash, Attributes: &attr, Store: &id}, nil
}

// OfTPM is evidence of what a TPM proved of a key.
func OfTPM(proof *residency.Evidence) (*Evidence, error) {
	v, err := proof.Verify(residency.Policy{RegistrationID: proof.RegistrationID})
	if err != nil {
		return nil, err
	}
	hash, err := KeyHash(v.Key)
	if err != nil {
		return nil, err
	}
	return &Evidence{Kind: TPM, KeyHash: hash, TPM: proof}, nil
}

// Check says what keeps the evidence from showing that the key of that hash, the device's of that registration ID, lives in
// such a place for good. The error is ErrResidency.
func (e *Evidence) Check(want Residency, registrationID, keyHash string) error {
	fail := func(format string, args ...any) error {
		return fmt.Errorf("%w: %s", ErrResidency, fmt.Sprintf(format, args...))
	}
	switch {
	case e == nil:
		return fail("there is no evidence")
	case e.Kind != want:
		return fail("it is evidence of kind %.20q, and %s was asked for", e.Kind, want)
	case keyHash == "" || e.KeyHash != keyHash:
		return fail("it is about another key")
	}
	switch e.Kind {
	case Token:
		a := e.Attributes
		if a == nil || e.Store == nil {
			return fail("it does not say what the token answered")
		}
		if !a.Hardware || !a.Local || !a.Sensitive || !a.AlwaysSensitive || a.Extractable || !a.NeverExtractable {
			return fail("the token says of the key: made there %t, always sensitive %t, never extractable %t", a.Local, a.AlwaysSensitive, a.NeverExtractable)
		}
		if e.Store.Serial == "" && e.Store.Label == "" {
			return fail("it does not say which token")
		}
		return nil
	case TPM:
		if e.TPM == nil {
			return fail("it does not hold what the TPM said")
		}
		v, err := e.TPM.Verify(residency.Policy{RegistrationID: registrationID})
		if err != nil {
			return fmt.Errorf("%w: %w", ErrResidency, err)
		}
		if hash, err := KeyHash(v.Key); err != nil || hash != keyHash {
			return fail("the TPM's statement is about another key")
		}
		return nil
	}
	return fail("kind %.20q is not known to this version of touchmark", e.Kind)
}

// CheckEndorsement says what keeps the evidence from showing that a TPM holds the endorsement key, a whole TPM2B_PUBLIC, for
// the device of that registration ID. The error is ErrResidency.
func (e *Evidence) CheckEndorsement(want Residency, registrationID string, ek []byte) error {
	if e == nil || e.Kind != TPM || want != TPM || e.TPM == nil {
		return fmt.Errorf("%w: there is no evidence of a TPM, or %s was asked for", ErrResidency, want)
	}
	v, err := e.TPM.Verify(residency.Policy{RegistrationID: registrationID})
	if err != nil {
		return fmt.Errorf("%w: %w", ErrResidency, err)
	}
	if !bytes.Equal(v.EK, ek) {
		return fmt.Errorf("%w: it is about another endorsement key", ErrResidency)
	}
	return nil
}

// Genuine holds the certificate of the TPM's endorsement key against the makers that are trusted, and returns what it says.
// The error is ErrResidency.
func (e *Evidence) Genuine(makers *residency.Makers) (*residency.EKCertificate, error) {
	if e == nil || e.TPM == nil {
		return nil, fmt.Errorf("%w: no TPM gave evidence", ErrResidency)
	}
	v, err := e.TPM.Verify(residency.Policy{RegistrationID: e.TPM.RegistrationID, Makers: makers})
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrResidency, err)
	}
	return v.Certificate, nil
}

// A Statement is evidence about one key under a station's signature, for use without a bundle.
type Statement struct {
	Version   int       `json:"version"`
	Made      time.Time `json:"made"`
	Name      string    `json:"name"` // of the key
	Algorithm string    `json:"algorithm"`
	PublicKey string    `json:"publicKey"` // PEM
	Evidence  *Evidence `json:"evidence"`
}

const (
	statementType    = "application/vnd.touchmark.evidence+json"
	statementVersion = 1
	maxStatement     = 64 << 10
)

// Sign returns the statement in an envelope of the station's, as JSON.
func (s *Statement) Sign(station crypto.Signer) ([]byte, error) {
	s.Version = statementVersion
	b, err := json.Marshal(s)
	if err != nil {
		return nil, err
	}
	return signed.Sign(station, statementType, b)
}

// Open returns a statement that a trusted station signed, and the name of the station's key. Errors: signed.ErrUntrusted,
// signed.ErrCorrupt.
func Open(b []byte, trusted []crypto.PublicKey) (*Statement, string, error) {
	if len(b) > maxStatement {
		return nil, "", fmt.Errorf("%w: it is longer than %d octets", signed.ErrCorrupt, maxStatement)
	}
	envelope, err := signed.Parse(bytes.TrimSuffix(b, []byte("\n")))
	if err != nil {
		return nil, "", err
	}
	payload, keyID, err := envelope.Verify(statementType, trusted)
	if err != nil {
		return nil, "", err
	}
	var s Statement
	dec := json.NewDecoder(bytes.NewReader(payload))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&s); err != nil || s.Version != statementVersion {
		return nil, "", fmt.Errorf("evidence of version %d is not known to this version of touchmark: %w", s.Version, errors.Join(err, hsm.ErrUnsupported))
	}
	return &s, keyID, nil
}
