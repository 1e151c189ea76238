package mint

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/pkg/ca"
	"github.com/touchmark/touchmark/pkg/ledger"
)

// discardStrays removes staged directories that no unit has a use for: the run died between staging a key and beginning its unit,
// and nothing was signed for it; or while it took a finished unit's stamp away.
func (r *run) discardStrays(ctx context.Context) error {
	if r.out == nil {
		return nil
	}
	staged, err := r.out.Staged()
	if err != nil || len(staged) == 0 {
		return err
	}
	needed := make(map[string]bool)
	for _, u := range r.existing {
		needed[u.RegistrationID] = true
	}
	for _, name := range staged {
		if r.Shift != "" {
			have, err := r.Ledger.FindDevice(ctx, name)
			if err != nil && !errors.Is(err, ledger.ErrNotFound) {
				return err
			}
			needed[name] = err == nil && have.State < ledger.Stamped
		}
		if !needed[name] {
			if err := r.out.Discard(name); err != nil {
				return err
			}
		}
	}
	return nil
}

var errNoKey = errors.New("key is gone")

// recover finds out how far an earlier run brought each unit, and what of it can still be proven.
func (r *run) recover(ctx context.Context, units []unit, existing map[string]ledger.Unit) error {
	var known []*ledger.Unit
	var at []*unit
	for i := range units {
		if have, ok := existing[units[i].row.Serial]; ok {
			known, at = append(known, &have), append(at, &units[i])
		}
	}
	if err := r.Ledger.Fill(ctx, known...); err != nil {
		return err
	}
	var void []ledger.Event
	for i, have := range known {
		u := at[i]
		if r.Profile.pattern == nil {
			u.row.RegistrationID = have.RegistrationID // it came from the TPM
		}
		if have.RegistrationID != u.row.RegistrationID {
			return fmt.Errorf("serial %s was begun as %s, and would be %s now: the profile's registration-id was changed in the middle of a job",
				have.Serial, have.RegistrationID, u.row.RegistrationID)
		}
		err := r.prove(ctx, u, have)
		if errors.Is(err, errNoKey) && have.State != ledger.Begun {
			// Its certificate was signed, or its key written down, and its stamp was in place or about to be: whoever took it away
			// may have put it into a device.
			return fmt.Errorf("serial %s: %w: it was %s, and its stamp is not in %s any more: put it back and run the same command again",
				have.Serial, ErrUnproven, have.State, r.out.Dir(u.row.RegistrationID))
		}
		if errors.Is(err, errNoKey) {
			void = append(void, ledger.Event{State: ledger.Voided, Unit: have.ID,
				Data: ledger.Ending{Reason: "key-lost", Note: "its key was lost before it reached the device"}.Encode()})
			if r.out != nil {
				if err := r.out.Discard(u.row.RegistrationID); err != nil {
					return err
				}
			}
			*u = unit{row: u.row}
			continue
		}
		if err != nil {
			return fmt.Errorf("serial %s: %w", have.Serial, err)
		}
	}
	if len(void) == 0 {
		return nil
	}
	r.voids.Add(int64(len(void)))
	return r.Ledger.Commit(ctx, void)
}

// prove loads what the unit's state promises, or says errNoKey.
func (r *run) prove(ctx context.Context, u *unit, have *ledger.Unit) error {
	u.found, u.id, u.state, u.revision, u.keyHash, u.ekHash = true, have.ID, have.State, have.Revision, have.KeyHash, have.EKHash
	u.published = r.out != nil && r.out.Published(u.row.RegistrationID)
	done := u.state >= ledger.Verified || u.state == ledger.Minted && r.stampless
	if done && r.out != nil && !u.published {
		r.absent.Add(1)
	}
	if r.Profile.Attestation == AttestationX509 {
		if u.state == ledger.Begun {
			var err error
			if u.plan, err = ca.DecodePlan(have.Data); err != nil {
				return err
			}
			u.plan.Unit = r.unitOf(u.row)
		} else {
			var err error
			if u.cert, u.evidence, err = splitCertificate(have.Data); err != nil {
				return err
			}
		}
		switch {
		case done:
			return nil
		case r.Profile.Key.In == keyInMemory:
			return r.keyOnDisk(u)
		case r.Profile.Key.In == keyInCSR && u.state == ledger.Begun:
			return r.sameCSR(ctx, u)
		case r.Profile.Key.In == keyInCSR, u.state == ledger.Begun:
			return nil // the certificate is in the ledger; or tokenKey looks for the key by its name
		}
		hash := u.keyHash
		if r.Profile.Key.In == keyInTPM {
			if _, err := r.onDisk(u, keyFile); err != nil {
				return err // errNoKey: the blob is what the key is
			}
		}
		err := r.withKeys(ctx, u, func(store hsm.Store) error {
			k, err := r.keyInToken(ctx, store, r.keyName(u))
			if err != nil {
				return fmt.Errorf("%w: its certificate was signed: %w", ErrUnproven, err)
			}
			return r.setTokenKey(u, k)
		})
		if err != nil {
			return err
		}
		if !bytes.Equal(hash, u.keyHash) {
			return fmt.Errorf("%w: the token holds another key under its name", ErrUnproven)
		}
		return nil
	}
	if r.Profile.Attestation == AttestationTPM {
		return u.decodeTPM(have.Data)
	}
	if r.Profile.Key.In == keyDerived {
		return nil
	}
	return r.secretOnDisk(u, done)
}

// keyOnDisk loads a private key from the staged or published stamp, if it is the unit's.
func (r *run) keyOnDisk(u *unit) error {
	b, err := r.onDisk(u, keyFile)
	if err != nil {
		return err
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return errNoKey
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	clear(block.Bytes)
	signer, ok := key.(crypto.Signer)
	if err != nil || !ok {
		return errNoKey
	}
	hash := u.keyHash
	u.signer = signer
	if err := u.setKey(); err != nil {
		return err
	}
	if !bytes.Equal(hash, u.keyHash) {
		return r.foreign(u)
	}
	return nil
}

// secretOnDisk loads a symmetric key from the staged or published stamp, if it is the unit's.
func (r *run) secretOnDisk(u *unit, done bool) error {
	b, err := r.onDisk(u, stampFile)
	if err != nil {
		if done && errors.Is(err, errNoKey) {
			return fmt.Errorf("%w: its stamp %s is gone, and its key with it", ErrUnproven, r.out.Dir(u.row.RegistrationID))
		}
		return err
	}
	var doc provisioning
	err = json.Unmarshal(b, &doc)
	clear(b)
	if err != nil {
		return r.foreign(u)
	}
	if u.symmetric, err = base64.StdEncoding.DecodeString(doc.SymmetricKey); err != nil || !bytes.Equal(symmetricKeyHash(u.symmetric), u.keyHash) {
		return r.foreign(u)
	}
	return nil
}

func (r *run) onDisk(u *unit, name string) ([]byte, error) {
	read := r.out.StagedFile
	if u.published {
		read = r.out.PublishedFile
	}
	b, err := read(u.row.RegistrationID, name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errNoKey
	}
	return b, err
}

// foreign decides about a stamp that holds another key than the unit's: a staged one is half-written and void, a published
// one is somebody's work and needs a person.
func (r *run) foreign(u *unit) error {
	if u.published {
		return fmt.Errorf("%w: %s holds another key", ErrUnproven, r.out.Dir(u.row.RegistrationID))
	}
	return errNoKey
}
