package registration

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/dps"
)

const (
	// challengeTime is for how long a TPM can prove itself with what it was challenged with. The tokens of TPM clients are good for an
	// hour, and clocks differ (device API, section 8.1).
	challengeTime = time.Hour + 2*attest.Skew
	// sameTime is for how long whoever asks for a TPM with that endorsement key is challenged with the same key, and previousTime for
	// how long the one before counts after that: requests are repeated by the network, and by strangers who have read the public key
	// and cannot open a challenge. Neither must spoil the registration of the TPM that can.
	sameTime     = 10 * time.Minute
	previousTime = 5 * time.Minute
	// deviceKeySize is the size of the keys that TPMs are handed, in octets (device API, section 9.4).
	deviceKeySize = 32
)

// Challenge implements [Registrar].
func (s *Service) Challenge(ctx context.Context, req *Request) ([]byte, error) {
	err := s.checkRequest(req)
	if err == nil && req.Proof.TPM == nil {
		err = because("tpm-key", "there is no TPM to challenge")
	}
	var blob []byte
	switch {
	case err == nil:
		blob, err = s.challenge(ctx, req, req.Proof.TPM)
	case req.Proof.TPM != nil && dps.AsError(err).Code == dps.CodeUnauthorized: // another scope
		blob, _ = attest.Activation(req.Proof.TPM, make([]byte, deviceKeySize))
	}
	if err != nil {
		err = s.logged(req, "challenge", err)
		if blob == nil || dps.AsError(err).Code != dps.CodeUnauthorized {
			return nil, err
		}
		// It is refused when it registers, with a code: a refusal here is one that Azure's SDK for Node never gets over. The key in
		// the blob is kept nowhere and admits nobody.
		return blob, nil
	}
	s.wasChallenged(req, nil)
	return blob, nil
}

// challenged answers a device that was refused, and whose request has a TPM's keys, with a challenge. What is no refusal stays
// as it is, and so does one whose TPM is not enrolled.
func (s *Service) challenged(ctx context.Context, req *Request, tpm *dps.TPMAttestation, err error) error {
	e := new(dps.Error)
	if tpm == nil || !errors.As(err, &e) || e.Code != dps.CodeUnauthorized {
		return err
	}
	keys := tpmKeys(tpm)
	if keys == nil {
		return s.logged(req, "challenge", because("tpm-key", "the TPM's keys are not base64"))
	}
	blob, cause := s.challenge(ctx, req, keys)
	if cause != nil {
		return s.logged(req, "challenge", cause)
	}
	s.wasChallenged(req, e)
	return &Challenge{Blob: blob, Refusal: e}
}

// tpmKeys decodes the keys of a request; nil when they are not base64.
func tpmKeys(tpm *dps.TPMAttestation) *attest.TPMKeys {
	ek, err := base64.StdEncoding.DecodeString(tpm.EndorsementKey)
	srk, err2 := base64.StdEncoding.DecodeString(tpm.StorageRootKey)
	if err != nil || err2 != nil {
		return nil
	}
	return &attest.TPMKeys{EK: ek, SRK: srk}
}

// challenge makes a fresh key for a TPM that is enrolled, keeps it, and wraps it for the TPM (device API, section 9.2). Whoever is
// not enrolled with this endorsement key waits as long for the refusal, but for the write, which is not made on the word of
// strangers: how long it took does not tell whether there is an enrollment for another TPM. The blob comes beside such a refusal.
func (s *Service) challenge(ctx context.Context, req *Request, keys *attest.TPMKeys) ([]byte, error) {
	hash, err := attest.EKHash(keys.EK)
	if err != nil {
		return nil, refuse(err)
	}
	fresh := make([]byte, deviceKeySize)
	_, _ = rand.Read(fresh) // crypto/rand.Read never fails
	defer clear(fresh)
	id := dps.Fold(req.RegistrationID)
	var c *PendingChallenge
	var root []byte // the storage root key of the enrollment, if it names one
	refused := s.cfg.Store.View(ctx, func(tx Tx) error {
		c, root = nil, nil
		if err := s.filter(tx, req); err != nil {
			return err
		}
		r, err := found(tx.Record(s.scope, Individual, id))
		if err != nil {
			return err
		}
		if r == nil {
			return because("no-enrollment", "no enrollment has this registration ID")
		}
		d, err := open(r)
		if err != nil {
			return err
		}
		e := d.individual
		enrolled, err := endorsement(e)
		if err != nil {
			return err
		}
		if enrolled != "" {
			root, _ = base64.StdEncoding.DecodeString(e.Attestation.TPM.StorageRootKey) // checked when it was enrolled
		}
		if enrolled != hash {
			return because("endorsement-key", "the enrollment is not for this endorsement key")
		}
		if e.ProvisioningStatus == dps.EnrollmentDisabled {
			return nil // which it is told when it has proved itself
		}
		ended, err := tx.KeyEnded(s.scope, hash)
		if err == nil && ended {
			return because("ended", "its endorsement key belonged to an identity that ended")
		}
		if err == nil {
			c, err = s.pending(tx, id, hash)
		}
		return err
	})
	if refused != nil && dps.AsError(refused).Code != dps.CodeUnauthorized {
		return nil, refused
	}
	key := fresh
	if c != nil {
		key = c.Key
	}
	blob, err := attest.Activation(keys, key)
	if errors.Is(err, attest.ErrTPMKey) {
		return nil, refuse(err)
	}
	if err != nil {
		return nil, err
	}
	enrolled := func(c *PendingChallenge) bool { return bytes.Equal(keys.SRK, root) && !bytes.Equal(c.Keys.SRK, root) }
	if refused == nil && (c == nil || enrolled(c)) {
		err := s.cfg.Store.Update(ctx, func(tx Tx) (err error) {
			now := s.cfg.Now()
			before, err := s.pending(tx, id, hash)
			if err != nil {
				return err
			}
			if before != nil { // the same key, for the storage root key that was named first, unless this is the enrolled one
				if c = before; !enrolled(c) {
					return nil
				}
				c.Keys = *keys
				return tx.PutChallenge(s.scope, c, now)
			}
			c = &PendingChallenge{ID: id, EKHash: hash, Begun: now, Expires: now.Add(challengeTime), Wrapped: Wrapped{*keys, fresh}}
			if before, err = found(tx.Challenge(s.scope, id)); err != nil {
				return err
			}
			if before != nil && before.EKHash == hash && now.Before(before.Expires) {
				c.Previous = &before.Wrapped
			}
			return tx.PutChallenge(s.scope, c, now)
		})
		if err != nil {
			return nil, err
		}
	}
	if c != nil && !bytes.Equal(c.Key, key) { // another request was first
		if blob, err = attest.Activation(keys, c.Key); err != nil {
			return nil, err
		}
	}
	return blob, refused
}

// pending returns the challenge of a TPM that is young enough to be made again, or nil.
func (s *Service) pending(tx Tx, id, hash string) (*PendingChallenge, error) {
	c, err := found(tx.Challenge(s.scope, id))
	if c == nil || err != nil || c.EKHash != hash || s.cfg.Now().Sub(c.Begun) >= sameTime {
		return nil, err
	}
	return c, nil
}

// endorsement returns the hash of the endorsement key that an enrollment is for; empty where it does not attest by TPM.
func endorsement(e *dps.IndividualEnrollment) (string, error) {
	if e.Attestation.Type != dps.AttestationTPM {
		return "", nil
	}
	ek, err := base64.StdEncoding.DecodeString(e.Attestation.TPM.EndorsementKey)
	var hash string
	if err == nil {
		hash, err = attest.EKHash(ek)
	}
	if err != nil {
		err = fmt.Errorf("enrollment %q in the store: %w", e.RegistrationID, err)
	}
	return hash, err
}

// proveTPM holds a token against what the device's TPM was challenged with, and sets the TPM of the verdict.
func (s *Service) proveTPM(tx Tx, v *verdict, e *dps.IndividualEnrollment, req *Request, token *attest.Token) error {
	hash, err := endorsement(e)
	if err != nil {
		return err
	}
	c, err := found(tx.Challenge(s.scope, dps.Fold(req.RegistrationID)))
	if err != nil {
		return err
	}
	switch now := s.cfg.Now(); {
	case c == nil || c.EKHash != hash:
		return because("challenge", "its TPM was not challenged")
	case !now.Before(c.Expires):
		return because("challenge", "the challenge of its TPM has expired")
	case token.SignedBy(c.Key):
		v.tpm = &c.Keys
	case c.Previous != nil && now.Sub(c.Begun) < previousTime && token.SignedBy(c.Previous.Key):
		v.tpm = &c.Previous.Keys
	default:
		return refuse(attest.ErrSignature)
	}
	v.key = hash
	// Strangers may have named other storage root keys for the same challenge: what the device says with its proof counts.
	if t := req.Proof.TPM; t != nil {
		if h, err := attest.EKHash(t.EK); err == nil && h == hash {
			v.tpm = t
		}
	}
	return nil
}

// handKey gives a device that attested by TPM its key for the hub: in the registration for us, and in the operation as a blob for
// the TPM. A device that repeats its request before it has seen the answer gets the same key.
func handKey(v *verdict, before, after *Registration) error {
	if v.tpm == nil || after.State.Status != dps.Assigned {
		return nil
	}
	op := &after.Operations[0]
	if before != nil && before.DeviceKey != nil && len(before.Operations) > 0 && bytes.Equal(before.Operations[0].Proof, op.Proof) && before.Operations[0].State.TPM != nil {
		after.DeviceKey, op.State.TPM = before.DeviceKey, before.Operations[0].State.TPM
	} else {
		after.DeviceKey = make([]byte, deviceKeySize)
		_, _ = rand.Read(after.DeviceKey)
		blob, err := attest.Activation(v.tpm, after.DeviceKey)
		if errors.Is(err, attest.ErrTPMKey) {
			return refuse(err)
		}
		if err != nil {
			return err
		}
		op.State.TPM = &dps.TPMState{AuthenticationKey: blob}
	}
	after.State.TPM = op.State.TPM
	return nil
}

// maxRootKey bounds the storage root key of an enrollment, in base64. Nothing is held against it: the TPM says which one it has.
const maxRootKey = 2048

// completeTPM checks the keys of a TPM enrollment, and indexes its endorsement key: an endorsement key never serves two devices.
func completeTPM(in *dps.TPMAttestation) ([]Certificate, error) {
	ek, err := base64.StdEncoding.DecodeString(in.EndorsementKey)
	if err != nil || len(ek) == 0 {
		return nil, invalid("endorsementKey must be base64 of a TPM2B_PUBLIC")
	}
	c := Certificate{}
	if c.Key, err = attest.EKHash(ek); err != nil {
		return nil, invalid("%v", err)
	}
	if _, err := base64.StdEncoding.DecodeString(in.StorageRootKey); err != nil || len(in.StorageRootKey) > maxRootKey {
		return nil, invalid("storageRootKey must be base64 of a TPM2B_PUBLIC")
	}
	_, err = hex.Decode(c.Fingerprint[:], []byte(c.Key))
	return []Certificate{c}, err
}
