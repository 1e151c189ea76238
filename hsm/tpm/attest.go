package tpm

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/touchmark/touchmark/hsm/tpm/residency"
)

// akTemplate is the attestation key: a restricted ECDSA P-256 primary of the endorsement hierarchy. The TPM makes the same one
// each time, so there is nothing to keep; the unique field keeps it apart from other programs' keys.
func akTemplate() tpm2.TPMTPublic {
	label := sha256.Sum256([]byte("touchmark attestation key"))
	return tpm2.TPMTPublic{
		Type: tpm2.TPMAlgECC, NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{
			FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true, NoDA: true, Restricted: true, SignEncrypt: true,
		},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
			Scheme: tpm2.TPMTECCScheme{
				Scheme:  tpm2.TPMAlgECDSA,
				Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256}),
			},
			CurveID: tpm2.TPMECCNistP256,
		}),
		Unique: tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{X: tpm2.TPM2BECCParameter{Buffer: label[:]}}),
	}
}

// An AK is the TPM's attestation key: it signs nothing but what the TPM states.
type AK struct {
	// Public is the whole TPM2B_PUBLIC.
	Public []byte

	object *object
	public tpm2.TPMTPublic
}

// AK returns the attestation key of the TPM.
func (s *Store) AK(ctx context.Context) (*AK, error) {
	a := &AK{object: &object{keep: true}}
	a.object.load = func(b *bus) (tpm2.TPMHandle, error) {
		return s.makePrimary(b, a.object, tpm2.TPMRHEndorsement, akTemplate(), &a.public)
	}
	err := s.do(ctx, "making the attestation key", func(b *bus) error {
		_, err := b.use(a.object)
		return err
	})
	if err != nil {
		return nil, err
	}
	a.Public = residency.MarshalPublic(a.public)
	return a, nil
}

// Answer answers a challenge about the key of that name: the TPM unwraps the secret (TPM2_ActivateCredential, Part 3, 12.5),
// and the AK signs that the key is in the TPM (TPM2_Certify, Part 3, 18.2).
func (s *Store) Answer(ctx context.Context, ek *EK, ak *AK, key, registrationID string, c residency.Credential) (residency.Answer, error) {
	var a residency.Answer
	opened, err := s.Open(ctx, key)
	if err != nil {
		return a, err
	}
	k := opened.(tpmKeyLike).common()
	ekName, err := residency.Name(&ek.public)
	if err != nil {
		return a, err
	}
	if a.Secret, err = s.activate(ctx, ek, ak, c); err != nil {
		return a, err
	}
	a.Key = residency.MarshalPublic(k.public)
	binding := residency.Binding(registrationID, ekName, ak.object.name.Buffer, k.object.name.Buffer, a.Secret)
	err = k.with(ctx, "certifying key", plain, func(b *bus, auth tpm2.AuthHandle, _ []tpm2.Session) error {
		h, err := b.use(ak.object)
		if err != nil {
			return err
		}
		rsp, err := tpm2.Certify{
			ObjectHandle:   auth,
			SignHandle:     tpm2.AuthHandle{Handle: h, Name: ak.object.name, Auth: tpm2.PasswordAuth(nil)},
			QualifyingData: tpm2.TPM2BData{Buffer: binding},
		}.Execute(b)
		if err != nil {
			return err
		}
		a.Attest, a.Signature = rsp.CertifyInfo.Bytes(), tpm2.Marshal(rsp.Signature)
		return nil
	})
	return a, err
}

// activate unwraps a credential. The secret comes out encrypted.
func (s *Store) activate(ctx context.Context, ek *EK, ak *AK, c residency.Credential) (secret []byte, err error) {
	if len(c.Blob) > 256 || len(c.EncryptedSeed) > 512 {
		return nil, errors.New("the challenge is too long")
	}
	err = s.do(ctx, "activating a credential", func(b *bus) (err error) {
		session, err := b.session(s, nil, out)
		if err != nil {
			return err
		}
		akHandle, err := b.use(ak.object)
		if err != nil {
			return err
		}
		// What authorizes for the EK comes before it is loaded: salting that needs a slot of its own.
		auth, done, err := s.useEK(b, ek)
		if err != nil {
			return err
		}
		defer func() {
			if err != nil && !lost(err) {
				err = errors.Join(err, done())
			}
		}()
		h, err := b.use(ek.object)
		if err != nil {
			return err
		}
		rsp, err := tpm2.ActivateCredential{
			ActivateHandle: tpm2.AuthHandle{Handle: akHandle, Name: ak.object.name, Auth: tpm2.PasswordAuth(nil)},
			KeyHandle:      tpm2.AuthHandle{Handle: h, Name: ek.object.name, Auth: auth},
			CredentialBlob: tpm2.TPM2BIDObject{Buffer: c.Blob},
			Secret:         tpm2.TPM2BEncryptedSecret{Buffer: c.EncryptedSeed},
		}.Execute(b, session)
		if err != nil {
			return err
		}
		secret = rsp.CertInfo.Buffer
		return done()
	})
	if err != nil && (errors.Is(err, tpm2.TPMRCIntegrity) || errors.Is(err, tpm2.TPMRCValue) || errors.Is(err, tpm2.TPMRCSize) || errors.Is(err, tpm2.TPMRCInsufficient)) {
		return nil, fmt.Errorf("%w: the challenge is not for this TPM's keys, or was changed: %w", residency.ErrNotProven, err)
	}
	return secret, err
}

// useEK authorizes for the EK, by the policy that the TCG's templates have, or without one where firmware made it so.
func (s *Store) useEK(b *bus, ek *EK) (_ tpm2.Session, done func() error, err error) {
	none := func() error { return nil }
	if len(ek.public.AuthPolicy.Buffer) == 0 && ek.public.ObjectAttributes.UserWithAuth {
		return tpm2.PasswordAuth(nil), none, nil
	}
	// PolicySecret(endorsement) is PolicyA of the profile. An EK with PolicyB answers with TPM_RC_POLICY_FAIL.
	session, _, err := tpm2.PolicySession(b, ek.public.NameAlg, nonceSize)
	if err != nil {
		return nil, none, err
	}
	auth, err := s.hierarchy(b, tpm2.TPMRHEndorsement)
	if err == nil {
		_, err = tpm2.PolicySecret{AuthHandle: auth, PolicySession: session.Handle(), NonceTPM: session.NonceTPM()}.Execute(b)
	}
	if err != nil {
		if !lost(err) {
			err = errors.Join(err, b.flush(session.Handle()))
		}
		return nil, none, err
	}
	return session, func() error { return b.flush(session.Handle()) }, nil
}

// Attest proves to the caller that the key of that name lives in this TPM, and returns the evidence, for the caller to sign
// (residency.Sign). The certificates of the EK become part of it. Where caller and TPM are not to trust what is between
// them, use [Store.AK], residency.NewChallenge, [Store.Answer] and Challenge.Verify in turn.
func (s *Store) Attest(ctx context.Context, ek *EK, key, registrationID string) (*residency.Evidence, error) {
	ak, err := s.AK(ctx)
	if err != nil {
		return nil, err
	}
	challenge, err := residency.NewChallenge(ek.Public, ak.Public)
	if err != nil {
		return nil, err
	}
	answer, err := s.Answer(ctx, ek, ak, key, registrationID, challenge.Credential)
	if err != nil {
		return nil, err
	}
	return challenge.Verify(registrationID, answer, slices.Clone(ek.Certificates), time.Now())
}
