// Package signed puts what a station says into DSSE envelopes and takes it out again.
//
// ECDSA and RSA keys (PKCS #1 v1.5) sign the SHA-256 of DSSE's pre-authentication encoding, Ed25519 keys sign the encoding
// itself. Keys are named by the hex SHA-256 of their SubjectPublicKeyInfo.
package signed

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/secure-systems-lab/go-securesystemslib/dsse"
)

// Errors that callers branch on.
var (
	// ErrUntrusted says that nobody whom the reader trusts signed.
	ErrUntrusted = errors.New("not signed by a trusted station")
	// ErrCorrupt says that an envelope is not what was signed, or not in the form that Sign writes.
	ErrCorrupt = errors.New("the signed envelope is damaged")
)

const maxSignatures = 16

// KeyID returns how a station's key is named in signatures.
func KeyID(pub crypto.PublicKey) (string, error) {
	spki, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return "", fmt.Errorf("station key: %w", err)
	}
	sum := sha256.Sum256(spki)
	return hex.EncodeToString(sum[:]), nil
}

// key signs and verifies for the DSSE library.
type key struct {
	pub  crypto.PublicKey
	priv crypto.Signer
}

func (k key) KeyID() (string, error)   { return KeyID(k.pub) }
func (k key) Public() crypto.PublicKey { return k.pub }

func (k key) Sign(_ context.Context, data []byte) ([]byte, error) {
	if _, ok := k.pub.(ed25519.PublicKey); ok {
		return k.priv.Sign(rand.Reader, data, crypto.Hash(0))
	}
	sum := sha256.Sum256(data)
	return k.priv.Sign(rand.Reader, sum[:], crypto.SHA256)
}

var errSignature = errors.New("signature does not verify")

func (k key) Verify(_ context.Context, data, sig []byte) error {
	sum := sha256.Sum256(data)
	ok := false
	switch pub := k.pub.(type) {
	case ed25519.PublicKey:
		ok = ed25519.Verify(pub, data, sig)
	case *ecdsa.PublicKey:
		ok = ecdsa.VerifyASN1(pub, sum[:], sig)
	case *rsa.PublicKey:
		ok = rsa.VerifyPKCS1v15(pub, crypto.SHA256, sum[:], sig) == nil
	}
	if !ok {
		return errSignature
	}
	return nil
}

var _ dsse.SignerVerifier = key{}

// Sign returns an envelope over the payload, as JSON.
func Sign(station crypto.Signer, payloadType string, payload []byte) ([]byte, error) {
	signer, err := dsse.NewEnvelopeSigner(key{station.Public(), station})
	if err != nil {
		return nil, err
	}
	envelope, err := signer.SignPayload(context.Background(), payloadType, payload)
	if err != nil {
		return nil, fmt.Errorf("signing with the station key: %w", err)
	}
	return json.Marshal(envelope)
}

// An Envelope is a signed payload that was parsed and not verified.
type Envelope struct {
	dsse    dsse.Envelope
	payload []byte
}

// Parse reads an envelope, strictly: one form alone is taken. The caller bounds its size. The error is ErrCorrupt.
func Parse(b []byte) (*Envelope, error) {
	var e Envelope
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&e.dsse); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	if n := len(e.dsse.Signatures); n == 0 || n > maxSignatures {
		return nil, fmt.Errorf("%w: it has %d signatures", ErrCorrupt, n)
	}
	if again, err := json.Marshal(e.dsse); err != nil || !bytes.Equal(again, b) {
		return nil, fmt.Errorf("%w: it is not in the form that is written", ErrCorrupt)
	}
	// The library takes two alphabets, and bits at the end that mean nothing.
	strict := base64.StdEncoding.Strict()
	var err error
	if e.payload, err = strict.DecodeString(e.dsse.Payload); err != nil {
		return nil, fmt.Errorf("%w: payload: %w", ErrCorrupt, err)
	}
	for _, s := range e.dsse.Signatures {
		if _, err := strict.DecodeString(s.Sig); err != nil {
			return nil, fmt.Errorf("%w: signature: %w", ErrCorrupt, err)
		}
	}
	return &e, nil
}

// KeyID returns the name of the key that is said to have signed first. Nothing of it is verified.
func (e *Envelope) KeyID() string { return e.dsse.Signatures[0].KeyID }

// PayloadType returns what the payload is said to be. Nothing of it is verified before [Envelope.Verify].
func (e *Envelope) PayloadType() string { return e.dsse.PayloadType }

// Unverified returns the payload. Nothing of it is verified.
func (e *Envelope) Unverified() []byte { return e.payload }

// Verify returns the payload once a trusted key has signed it as that type, and the key's name. The error is ErrUntrusted
// when none of the keys is among the signers, else ErrCorrupt.
func (e *Envelope) Verify(payloadType string, trusted []crypto.PublicKey) (payload []byte, keyID string, err error) {
	if e.dsse.PayloadType != payloadType {
		return nil, "", fmt.Errorf("%w: it holds a %.100q, not a %s", ErrCorrupt, e.dsse.PayloadType, payloadType)
	}
	if len(trusted) == 0 {
		return nil, "", ErrUntrusted
	}
	verifiers := make([]dsse.Verifier, len(trusted))
	known := false
	for i, pub := range trusted {
		k := key{pub: pub}
		verifiers[i] = k
		id, err := k.KeyID()
		if err != nil {
			return nil, "", err
		}
		for _, s := range e.dsse.Signatures {
			known = known || s.KeyID == id
		}
	}
	ev, err := dsse.NewEnvelopeVerifier(verifiers...)
	if err != nil {
		return nil, "", err
	}
	accepted, err := ev.Verify(context.Background(), &e.dsse)
	switch {
	case err == nil && len(accepted) > 0 && accepted[0].Sig.KeyID == accepted[0].KeyID:
		return e.payload, accepted[0].KeyID, nil
	case known:
		return nil, "", fmt.Errorf("%w: the station's signature does not verify", ErrCorrupt)
	}
	return nil, "", fmt.Errorf("%w (the key %.64q signed)", ErrUntrusted, e.KeyID())
}
