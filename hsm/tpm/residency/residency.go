// Package residency proves, and checks with no TPM at hand, that a key lives in the TPM that an endorsement key (EK) stands
// for.
//
// Three keys take part. The EK is the TPM's own and decrypts only; its certificate, where there is one, is its manufacturer's
// word. The attestation key (AK) signs nothing but what the TPM itself states. The device key is what it is all about.
//
//  1. The challenger, a station or a service, makes a [Challenge]: a random secret that the TPM gives away only if it holds
//     both this EK and this AK (TPM2_ActivateCredential; TPM 2.0 Part 1, 24).
//  2. The TPM answers with the secret, and with the AK's signed statement that it holds the device key (TPM2_Certify). The
//     statement carries a hash over the registration ID, the three keys' names and the secret: see [Binding].
//  3. The challenger checks the answer and has [Evidence], which it signs ([Sign]).
//  4. Anybody checks that with [Verify], at any time.
//
// # Who vouches for what
//
// The TPM, through the AK's signature, vouches for this: the device key with exactly this public area (made in the TPM,
// unable to leave) is loaded beside the AK, for this registration ID. The signature can be checked for ever.
//
// The manufacturer, through the EK certificate, vouches for the EK being that of a genuine TPM.
//
// That EK and AK are in one TPM is seen only by whoever made the challenge: the secret tells, and a transcript shown
// afterwards could be written by anybody who knows it. So for this link a reader of Evidence trusts the challenger, who signs
// it. A station that lies can pass off a key of its own as one in the TPM; it cannot do so for a key that another honest
// station proved. A service that would rather not trust stations makes a challenge of its own when the device calls, and
// checks the answer with [Challenge.Verify], which trusts nobody.
//
// # Replay
//
// Evidence for one registration ID, key, EK or AK is worth nothing for another: all are in the signed hash. Evidence for the
// same ones may be shown twice; it says that the key was in that TPM, not that the device is there now, which is what the
// device key proves when it signs a handshake. That no two devices have one EK is for the reader of many documents to check:
// by [Verdict.EKKey]. A certificate vouches for the key of an EK, not for the public area around it: whoever writes the
// evidence could change a bit there and have another name, and another registration ID, for the same TPM.
package residency

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"encoding/base32"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"strings"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/touchmark/touchmark/hsm/signed"
)

// ErrNotProven says that a proof does not hold. What it wraps says why.
var ErrNotProven = errors.New("residency is not proven")

func refuse(format string, args ...any) error {
	return fmt.Errorf("%w: %w", ErrNotProven, fmt.Errorf(format, args...))
}

const (
	version = 1
	// PayloadType is that of the DSSE envelope that evidence travels in.
	PayloadType = "application/vnd.touchmark.tpm-residency+json"
	maxEnvelope = 64 << 10
	maxPublic   = 2048 // TPM2B_PUBLIC: one with RSA 4096 has 540 octets
	maxID       = 128
	secretSize  = 32
)

// ParsePublic reads a whole TPM2B_PUBLIC: size and public area, nothing behind it, in the one form that it has.
func ParsePublic(b []byte) (*tpm2.TPMTPublic, error) {
	if len(b) < 2 || len(b) > maxPublic || int(b[0])<<8|int(b[1]) != len(b)-2 {
		return nil, errors.New("the public area is not a whole TPM2B_PUBLIC")
	}
	public, err := tpm2.Unmarshal[tpm2.TPMTPublic](b[2:])
	if err != nil {
		return nil, fmt.Errorf("the public area: %w", err)
	}
	if !bytes.Equal(marshal(*public), b[2:]) {
		return nil, errors.New("the public area is not in its one form")
	}
	return public, nil
}

// marshal returns the octets of a structure, or nil for one that has no such form.
func marshal(v tpm2.Marshallable) (b []byte) {
	// A structure with an unknown algorithm unmarshals and does not marshal: go-tpm panics (v0.9.8).
	defer func() {
		if recover() != nil {
			b = nil
		}
	}()
	return tpm2.Marshal(v)
}

// MarshalPublic returns the whole TPM2B_PUBLIC of a public area, which is what protocols and documents carry.
func MarshalPublic(p tpm2.TPMTPublic) []byte { return tpm2.Marshal(tpm2.New2B(p)) }

// PublicKey returns the key of a public area. Untrusted: a point that is not on its curve, or a modulus of another size than
// the area says, is refused.
func PublicKey(p *tpm2.TPMTPublic) (crypto.PublicKey, error) {
	pub, err := tpm2.Pub(*p)
	if err != nil {
		return nil, err
	}
	switch pub := pub.(type) {
	case *ecdsa.PublicKey:
		if _, err := pub.ECDH(); err != nil {
			return nil, errors.New("the public point is not on its curve")
		}
	case *rsa.PublicKey:
		d, err := p.Parameters.RSADetail()
		if err != nil || pub.N.BitLen() != int(d.KeyBits) || pub.N.BitLen() < 2048 || pub.N.Bit(0) == 0 || pub.E < 3 || pub.E&1 == 0 {
			return nil, errors.New("the RSA key is not what the public area says")
		}
	}
	return pub, nil
}

// KeyHash returns the SHA-256 of a public area's key as a SubjectPublicKeyInfo, in hexadecimal.
func KeyHash(p *tpm2.TPMTPublic) (string, error) {
	pub, err := PublicKey(p)
	if err != nil {
		return "", err
	}
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:]), nil
}

// Name returns the name of a public area: its name algorithm, and the hash of it (TPM 2.0 Part 1, 16).
func Name(p *tpm2.TPMTPublic) ([]byte, error) {
	if p.NameAlg != tpm2.TPMAlgSHA256 && p.NameAlg != tpm2.TPMAlgSHA384 && p.NameAlg != tpm2.TPMAlgSHA512 {
		return nil, fmt.Errorf("name algorithm %v is not taken", p.NameAlg)
	}
	n, err := tpm2.ObjectName(p)
	if err != nil {
		return nil, err
	}
	return n.Buffer, nil
}

// RegistrationID returns the registration ID that device SDKs derive from an EK: SHA-256 of its whole TPM2B_PUBLIC in base32,
// lower case, without padding.
func RegistrationID(ek []byte) string {
	sum := sha256.Sum256(ek)
	return strings.ToLower(base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(sum[:]))
}

// subject is what is proven: the keys that take part, parsed and judged by their public areas.
type subject struct {
	id                      string
	ek, ak, key             *tpm2.TPMTPublic
	ekName, akName, keyName []byte
	akPublic, keyPublic     crypto.PublicKey
}

func newSubject(registrationID string, ek, ak, key []byte) (_ *subject, err error) {
	s := &subject{id: registrationID}
	if registrationID == "" || len(registrationID) > maxID {
		return nil, refuse("a registration ID has 1 to %d characters", maxID)
	}
	for _, x := range []struct {
		what   string
		bytes  []byte
		public **tpm2.TPMTPublic
		name   *[]byte
	}{{"endorsement key", ek, &s.ek, &s.ekName}, {"attestation key", ak, &s.ak, &s.akName}, {"device key", key, &s.key, &s.keyName}} {
		if *x.public, err = ParsePublic(x.bytes); err != nil {
			return nil, refuse("the %s: %w", x.what, err)
		}
		if *x.name, err = Name(*x.public); err != nil {
			return nil, refuse("the %s: %w", x.what, err)
		}
	}
	if err := checkEK(s.ek); err != nil {
		return nil, refuse("the endorsement key: %w", err)
	}
	if err := checkAK(s.ak); err != nil {
		return nil, refuse("the attestation key: %w", err)
	}
	if s.akPublic, err = PublicKey(s.ak); err != nil {
		return nil, refuse("the attestation key: %w", err)
	}
	a := s.key.ObjectAttributes
	switch {
	case !a.FixedTPM || !a.FixedParent:
		return nil, refuse("the device key may leave its TPM (it is not fixedTPM and fixedParent)")
	case !a.SensitiveDataOrigin:
		return nil, refuse("the device key was not made by the TPM (it is not sensitiveDataOrigin)")
	case a.Restricted:
		return nil, refuse("the device key is restricted")
	}
	if s.key.Type != tpm2.TPMAlgKeyedHash {
		if s.keyPublic, err = PublicKey(s.key); err != nil {
			return nil, refuse("the device key: %w", err)
		}
	}
	return s, nil
}

// bound wants a key that was made in a TPM and stays there.
func bound(p *tpm2.TPMTPublic) error {
	if a := p.ObjectAttributes; !a.FixedTPM || !a.FixedParent || !a.SensitiveDataOrigin {
		return errors.New("it is not fixedTPM, fixedParent and sensitiveDataOrigin")
	}
	return nil
}

// checkEK wants a storage key of the kind that EKs are (TCG EK Credential Profile 2.5, B.3).
func checkEK(p *tpm2.TPMTPublic) error {
	if err := bound(p); err != nil {
		return err
	}
	if a := p.ObjectAttributes; !a.Restricted || !a.Decrypt || a.SignEncrypt {
		return errors.New("it is not a restricted decryption key")
	}
	_, err := PublicKey(p)
	return err
}

// checkAK wants a key that signs only what its TPM states: restricted, and unable to decrypt.
func checkAK(p *tpm2.TPMTPublic) error {
	if err := bound(p); err != nil {
		return err
	}
	if a := p.ObjectAttributes; !a.Restricted || !a.SignEncrypt || a.Decrypt {
		return errors.New("it is not a restricted signing key")
	}
	if p.NameAlg != tpm2.TPMAlgSHA256 {
		return errors.New("its name algorithm is not SHA-256")
	}
	return nil
}

// A Credential is a challenge as it goes to the TPM: the parameters of TPM2_ActivateCredential.
type Credential struct {
	// Blob is the TPM2B_ID_OBJECT, less its size field.
	Blob []byte `json:"blob"`
	// EncryptedSeed is the TPM2B_ENCRYPTED_SECRET, less its size field: for the EK.
	EncryptedSeed []byte `json:"encryptedSeed"`
}

// A Challenge is what its maker keeps until the answer comes.
type Challenge struct {
	// Credential goes to the TPM.
	Credential Credential
	// EK and AK are the whole TPM2B_PUBLIC structures that it is for.
	EK, AK []byte

	seed, secret []byte
}

// kept is an encapsulation key that remembers the seed that it made, or gives back one that it was given.
type kept struct {
	tpm2.LabeledEncapsulationKey
	seed, encrypted []byte
}

func (k *kept) Encapsulate(random io.Reader, label string) (seed, encrypted []byte, err error) {
	if k.seed == nil {
		k.seed, k.encrypted, err = k.LabeledEncapsulationKey.Encapsulate(random, label)
	}
	return k.seed, k.encrypted, err
}

// NewChallenge makes a challenge for the TPM that holds both keys. Untrusted: both public areas are judged first.
func NewChallenge(ek, ak []byte) (*Challenge, error) {
	e, err := ParsePublic(ek)
	if err == nil {
		err = checkEK(e)
	}
	if err != nil {
		return nil, refuse("the endorsement key: %w", err)
	}
	a, err := ParsePublic(ak)
	if err == nil {
		err = checkAK(a)
	}
	if err != nil {
		return nil, refuse("the attestation key: %w", err)
	}
	name, err := Name(a)
	if err != nil {
		return nil, refuse("the attestation key: %w", err)
	}
	wrap, err := tpm2.ImportEncapsulationKey(e)
	if err != nil {
		return nil, refuse("the endorsement key: %w", err)
	}
	c := &Challenge{EK: ek, AK: ak, secret: make([]byte, secretSize)}
	if _, err := rand.Read(c.secret); err != nil {
		return nil, err
	}
	k := &kept{LabeledEncapsulationKey: wrap}
	if c.Credential.Blob, c.Credential.EncryptedSeed, err = tpm2.CreateCredential(rand.Reader, k, name, c.secret); err != nil {
		return nil, fmt.Errorf("making a credential: %w", err)
	}
	c.seed = k.seed
	return c, nil
}

// An Answer is what the TPM gives for a challenge.
type Answer struct {
	// Secret is what TPM2_ActivateCredential returned.
	Secret []byte `json:"secret"`
	// Key is the device key's whole TPM2B_PUBLIC.
	Key []byte `json:"key"`
	// Attest is the TPMS_ATTEST that TPM2_Certify returned, Signature the TPMT_SIGNATURE over it by the AK.
	Attest    []byte `json:"attest"`
	Signature []byte `json:"signature"`
}

// Binding returns the qualifying data of the certification: SHA-256 over a label, the registration ID, the names of the three
// keys and the secret, each behind its length (two octets, big endian).
func Binding(registrationID string, ekName, akName, keyName, secret []byte) []byte {
	h := sha256.New()
	for _, part := range [][]byte{[]byte("touchmark tpm residency v1"), []byte(registrationID), ekName, akName, keyName, secret} {
		h.Write(binary.BigEndian.AppendUint16(nil, uint16(len(part))))
		h.Write(part)
	}
	return h.Sum(nil)
}

// Evidence is a proof for readers who were not there: what was asked, and what was answered.
type Evidence struct {
	Version int `json:"version"`
	// RegistrationID is the device's.
	RegistrationID string `json:"registrationId"`
	// EK and AK are whole TPM2B_PUBLIC structures.
	EK []byte `json:"ek"`
	AK []byte `json:"ak"`
	// EKCertificates are the EK's certificate and those that lead to its root, in DER; none where the TPM has none.
	EKCertificates [][]byte `json:"ekCertificates,omitempty"`
	// Credential and Seed show that the challenge was for this AK and held this secret. That it was for this EK is the
	// challenger's word.
	Credential Credential `json:"credential"`
	Seed       []byte     `json:"seed"`
	Answer     Answer     `json:"answer"`
	// Made is when, by the challenger's clock.
	Made time.Time `json:"made"`
}

// Verify checks an answer for whoever made the challenge, and trusts nobody for it. The result is what [Sign] signs.
func (c *Challenge) Verify(registrationID string, answer Answer, ekCertificates [][]byte, now time.Time) (*Evidence, error) {
	if subtle.ConstantTimeCompare(c.secret, answer.Secret) != 1 {
		return nil, refuse("the TPM did not return the challenge's secret: it does not hold both keys")
	}
	e := &Evidence{
		Version: version, RegistrationID: registrationID, EK: c.EK, AK: c.AK, EKCertificates: ekCertificates,
		Credential: c.Credential, Seed: c.seed, Answer: answer, Made: now.UTC().Truncate(time.Second),
	}
	if _, err := e.check(); err != nil {
		return nil, err
	}
	return e, nil
}

// check checks all that the document itself can show.
func (e *Evidence) check() (*subject, error) {
	if e.Version != version {
		return nil, refuse("the evidence is of version %d, not %d", e.Version, version)
	}
	s, err := newSubject(e.RegistrationID, e.EK, e.AK, e.Answer.Key)
	if err != nil {
		return nil, err
	}
	if err := e.checkCredential(s); err != nil {
		return nil, refuse("the challenge: %w", err)
	}
	if err := s.checkAttest(e.Answer.Attest, Binding(s.id, s.ekName, s.akName, s.keyName, e.Answer.Secret)); err != nil {
		return nil, refuse("the TPM's statement: %w", err)
	}
	if err := verifySignature(s.akPublic, e.Answer.Attest, e.Answer.Signature); err != nil {
		return nil, refuse("the attestation key's signature: %w", err)
	}
	return s, nil
}

// checkCredential makes the credential again, of the seed and the secret. The seed under an RSA EK cannot be made again:
// OAEP is random.
func (e *Evidence) checkCredential(s *subject) error {
	if len(e.Answer.Secret) != secretSize || len(e.Seed) == 0 || len(e.Seed) > 64 || len(e.Credential.Blob) > 256 || len(e.Credential.EncryptedSeed) == 0 || len(e.Credential.EncryptedSeed) > 512 {
		return errors.New("a part of it has the wrong size")
	}
	wrap, err := tpm2.ImportEncapsulationKey(s.ek)
	if err != nil {
		return err
	}
	blob, _, err := tpm2.CreateCredential(rand.Reader, &kept{wrap, e.Seed, e.Credential.EncryptedSeed}, s.akName, e.Answer.Secret)
	if err != nil {
		return err
	}
	if !bytes.Equal(blob, e.Credential.Blob) {
		return errors.New("it was for another attestation key, or held another secret")
	}
	return nil
}

// qualifiedName is the qualified name of a primary key: it says under which hierarchy the key is (TPM 2.0 Part 1, 16).
func qualifiedName(hierarchy tpm2.TPMHandle, name []byte) []byte {
	h := sha256.New()
	h.Write(binary.BigEndian.AppendUint32(nil, uint32(hierarchy)))
	h.Write(name)
	return h.Sum(binary.BigEndian.AppendUint16(nil, uint16(tpm2.TPMAlgSHA256)))
}

// checkAttest reads the TPMS_ATTEST (TPM 2.0 Part 2, 10.12.12).
func (s *subject) checkAttest(b, binding []byte) error {
	if len(b) < 6 || len(b) > 1024 {
		return errors.New("it has the wrong size")
	}
	if binary.BigEndian.Uint32(b) != uint32(tpm2.TPMGeneratedValue) {
		return errors.New("no TPM made it (its magic is another)")
	}
	if t := tpm2.TPMST(binary.BigEndian.Uint16(b[4:])); t != tpm2.TPMSTAttestCertify {
		return fmt.Errorf("it is of type %v, not a certification", t)
	}
	attest, err := tpm2.Unmarshal[tpm2.TPMSAttest](b)
	if err != nil {
		return err
	}
	if !bytes.Equal(marshal(*attest), b) {
		return errors.New("it is not in its one form")
	}
	certify, err := attest.Attested.Certify()
	if err != nil {
		return err
	}
	switch {
	case !bytes.Equal(certify.Name.Buffer, s.keyName):
		return errors.New("it is about another key")
	case subtle.ConstantTimeCompare(attest.ExtraData.Buffer, binding) != 1:
		return errors.New("it was made for another registration ID, other keys or another challenge")
	case !bytes.Equal(attest.QualifiedSigner.Buffer, qualifiedName(tpm2.TPMRHEndorsement, s.akName)):
		return errors.New("the attestation key is not a primary key of the endorsement hierarchy")
	}
	return nil
}

// verifySignature checks a TPMT_SIGNATURE with SHA-256.
func verifySignature(pub crypto.PublicKey, message, signature []byte) error {
	if len(signature) < 6 || len(signature) > 1024 {
		return errors.New("it has the wrong size")
	}
	sig, err := tpm2.Unmarshal[tpm2.TPMTSignature](signature)
	if err != nil {
		return err
	}
	if !bytes.Equal(marshal(*sig), signature) {
		return errors.New("it is not in its one form")
	}
	digest := sha256.Sum256(message)
	switch pub := pub.(type) {
	case *ecdsa.PublicKey:
		rs, err := sig.Signature.ECDSA()
		if err != nil || sig.SigAlg != tpm2.TPMAlgECDSA || rs.Hash != tpm2.TPMAlgSHA256 {
			return errors.New("it is not ECDSA with SHA-256")
		}
		if ecdsa.Verify(pub, digest[:], new(big.Int).SetBytes(rs.SignatureR.Buffer), new(big.Int).SetBytes(rs.SignatureS.Buffer)) {
			return nil
		}
	case *rsa.PublicKey:
		r, err := sig.Signature.RSASSA()
		if err != nil || sig.SigAlg != tpm2.TPMAlgRSASSA || r.Hash != tpm2.TPMAlgSHA256 {
			return errors.New("it is not RSASSA with SHA-256")
		}
		if rsa.VerifyPKCS1v15(pub, crypto.SHA256, digest[:], r.Sig.Buffer) == nil {
			return nil
		}
	}
	return errors.New("it does not verify")
}

// Sign puts evidence into a DSSE envelope that the challenger signs, and so says: I made this challenge at random, sent it in
// no other form than the credential, and had this answer.
func Sign(e *Evidence, challenger crypto.Signer) ([]byte, error) {
	payload, err := json.Marshal(e)
	if err != nil {
		return nil, err
	}
	return signed.Sign(challenger, PayloadType, payload)
}

// Policy says what a reader of evidence trusts and expects.
type Policy struct {
	// Challengers are the keys of the stations and services whose word is taken for the challenge. At least one.
	Challengers []crypto.PublicKey
	// RegistrationID is the device's. Required.
	RegistrationID string
	// Key is the public key that is to live in the TPM, of a certificate for instance. Nil takes any; then look at
	// [Verdict.Key].
	Key crypto.PublicKey
	// Makers are the certificates of TPM manufacturers that the EK certificate must lead to. Nil asks for none, and then a
	// software TPM is as good as another.
	Makers *Makers
	// Now is when certificates are judged; zero means now.
	Now time.Time
}

// A Verdict says what was proven.
type Verdict struct {
	RegistrationID string `json:"registrationId"`
	// EK is the whole TPM2B_PUBLIC, EKName its name in hexadecimal. EKKey is the SHA-256 of its key as a
	// SubjectPublicKeyInfo, in hexadecimal: by it one TPM is told from another.
	EK     []byte `json:"ek"`
	EKName string `json:"ekName"`
	EKKey  string `json:"ekKeySha256"`
	// Key is the key that lives in the TPM; nil for an HMAC key, of which only KeyName tells.
	Key     crypto.PublicKey `json:"-"`
	KeyName string           `json:"keyName"`
	// Certificate is what the manufacturer vouches for; nil when no makers were given.
	Certificate *EKCertificate `json:"certificate,omitempty"`
	Made        time.Time      `json:"made"`
}

// Verify checks evidence in its envelope. The error is [ErrNotProven].
func Verify(envelope []byte, p Policy) (*Verdict, error) {
	e, err := openEnvelope(envelope, p.Challengers)
	if err != nil {
		return nil, err
	}
	return e.Verify(p)
}

// Verify checks evidence whose challenger the caller knows otherwise, by the signature of a bundle that it came in for
// instance. The policy's challengers are not looked at. The error is [ErrNotProven].
func (e *Evidence) Verify(p Policy) (*Verdict, error) {
	s, err := e.check()
	if err != nil {
		return nil, err
	}
	if p.RegistrationID == "" || e.RegistrationID != p.RegistrationID {
		return nil, refuse("it is for registration ID %q, not %q", e.RegistrationID, p.RegistrationID)
	}
	if p.Key != nil {
		key, ok := s.keyPublic.(interface{ Equal(crypto.PublicKey) bool })
		if !ok || !key.Equal(p.Key) {
			return nil, refuse("it is for another key")
		}
	}
	ekKey, err := KeyHash(s.ek)
	if err != nil {
		return nil, refuse("the endorsement key: %w", err)
	}
	v := &Verdict{RegistrationID: s.id, EK: e.EK, EKName: hex.EncodeToString(s.ekName), EKKey: ekKey, Key: s.keyPublic, KeyName: hex.EncodeToString(s.keyName), Made: e.Made}
	if p.Makers != nil {
		if len(e.EKCertificates) == 0 {
			return nil, refuse("there is no certificate of the endorsement key")
		}
		if v.Certificate, err = p.Makers.Judge(e.EK, e.EKCertificates, p.Now); err != nil {
			return nil, refuse("the endorsement key's certificate: %w", err)
		}
	}
	return v, nil
}

// openEnvelope checks the challenger's signature and reads the evidence.
func openEnvelope(raw []byte, trusted []crypto.PublicKey) (*Evidence, error) {
	if len(raw) > maxEnvelope {
		return nil, refuse("the envelope is larger than %d octets", maxEnvelope)
	}
	envelope, err := signed.Parse(bytes.TrimSuffix(raw, []byte("\n")))
	if err != nil {
		return nil, refuse("%w", err)
	}
	payload, _, err := envelope.Verify(PayloadType, trusted)
	if err != nil {
		return nil, refuse("%w", err)
	}
	var e Evidence
	if err := strict(payload, &e); err != nil {
		return nil, refuse("the evidence: %w", err)
	}
	return &e, nil
}

// strict decodes one JSON document, with known names only and nothing behind it.
func strict(b []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("something stands behind the JSON document")
	}
	return nil
}
