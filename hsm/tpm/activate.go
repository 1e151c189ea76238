package tpm

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/tpm/residency"
)

// Where device SDKs of Azure's Device Provisioning Service have the endorsement key and the key that the service hands out (DPS
// device API, section 9.1). The SRK is at persistentSRK.
const (
	persistentEK       = tpm2.TPMHandle(0x81010001)
	persistentIdentity = tpm2.TPMHandle(0x81000100)
)

// maxActivation bounds an activation blob, in octets: with RSA 4096 one has some 1,400.
const maxActivation = 4096

// ErrActivation says that an activation blob is not in its form, or not for this TPM.
var ErrActivation = errors.New("activation blob is not good")

// An Identity is the HMAC key that a device registration service hands to a TPM, at persistent handle 0x81000100, and what it is
// handed out for: the RSA endorsement key at 0x81010001 and the RSA storage root key at 0x81000001. The device API, section 9, is
// Azure's. It has no authorization value. Its methods may be called by many goroutines.
type Identity struct{ s *Store }

// Identity returns the identity key of a TPM, which need not have one yet.
func (s *Store) Identity() *Identity { return &Identity{s} }

// Keys returns the endorsement key and the storage root key as whole TPM2B_PUBLIC structures. One that is missing is made by its
// template and made persistent, which the owner authorizes. The error is hsm.ErrUnsupported where a key of another kind is there.
func (i *Identity) Keys(ctx context.Context) (ek, srk []byte, err error) {
	e, r, err := i.keys(ctx)
	if err != nil {
		return nil, nil, err
	}
	return e.Public, r.Public, nil
}

func (i *Identity) keys(ctx context.Context) (ek, srk *EK, err error) {
	if ek, err = i.primary(ctx, "endorsement key", tpm2.TPMRHEndorsement, persistentEK, tpm2.RSAEKTemplate); err != nil {
		return nil, nil, err
	}
	srk, err = i.primary(ctx, "storage root key", tpm2.TPMRHOwner, persistentSRK, tpm2.RSASRKTemplate)
	return ek, srk, err
}

// primary returns the key at a persistent handle, which it puts there if need be.
func (i *Identity) primary(ctx context.Context, what string, hierarchy, at tpm2.TPMHandle, template tpm2.TPMTPublic) (*EK, error) {
	k := &EK{Type: EKRSA, Handle: uint32(at)}
	err := i.s.do(ctx, "reading the "+what, func(b *bus) error {
		rsp, err := b.readPublic(at)
		if errors.Is(err, tpm2.TPMRCHandle) {
			made := &object{}
			err = b.transient(func() (tpm2.TPMHandle, error) {
				return i.s.makePrimary(b, made, hierarchy, template, &k.public)
			}, func(h tpm2.TPMHandle) error { return i.s.control(b, h, made.name, at) })
			if err != nil {
				return fmt.Errorf("making it persistent at %s: %w", hsm.TPMHandleName(uint32(at)), err)
			}
			rsp, err = b.readPublic(at)
		}
		if err != nil {
			return err
		}
		public, err := rsp.OutPublic.Contents()
		if err != nil {
			return err
		}
		if a := public.ObjectAttributes; public.Type != tpm2.TPMAlgRSA || !a.Restricted || !a.Decrypt || a.SignEncrypt {
			return fmt.Errorf("the key at %s is no RSA storage key: %w", hsm.TPMHandleName(uint32(at)), hsm.ErrUnsupported)
		}
		k.public, k.object, k.Public = *public, &object{persistent: at, name: rsp.Name}, residency.MarshalPublic(*public)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return k, nil
}

// control has the owner make a loaded object persistent, or evict the persistent object that h is (Part 3, 28.5).
func (s *Store) control(b *bus, h tpm2.TPMHandle, name tpm2.TPM2BName, at tpm2.TPMHandle) error {
	owner, err := s.hierarchy(b, tpm2.TPMRHOwner)
	if err != nil {
		return err
	}
	_, err = tpm2.EvictControl{Auth: owner, ObjectHandle: &tpm2.NamedHandle{Handle: h, Name: name}, PersistentHandle: at}.Execute(b)
	return err
}

// Activate takes in the key of an activation blob, untrusted, in place of the one before (DPS device API, section 9.5). The error is
// ErrActivation for a blob that is malformed, was changed, or is for another TPM, and hsm.ErrExists where another kind of key is at the
// handle.
func (i *Identity) Activate(ctx context.Context, blob []byte) error {
	parts, err := splitActivation(blob)
	if err != nil {
		return err
	}
	public, err := tpm2.Unmarshal[tpm2.TPMTPublic](parts[4])
	if err != nil {
		return fmt.Errorf("%w: the key's public area: %w", ErrActivation, err)
	}
	if alg, _, err := algorithmOf(public); err != nil || alg != hsm.HMACSHA256 {
		return fmt.Errorf("%w: what it hands out is no HMAC-SHA256 key", ErrActivation)
	}
	ek, srk, err := i.keys(ctx)
	if err != nil {
		return err
	}
	inner, err := i.s.activate(ctx, ek, &AK{object: srk.object}, residency.Credential{Blob: parts[0], EncryptedSeed: parts[1]})
	if err != nil {
		return refusesActivation(err)
	}
	defer clear(inner)
	return refusesActivation(i.s.do(ctx, "taking in the identity key", func(b *bus) error {
		session, err := b.session(i.s, nil, in)
		if err != nil {
			return err
		}
		h, err := b.use(srk.object)
		if err != nil {
			return err
		}
		parent := tpm2.AuthHandle{Handle: h, Name: srk.object.name, Auth: tpm2.PasswordAuth(nil)}
		var name tpm2.TPM2BName
		return b.transient(func() (tpm2.TPMHandle, error) {
			imported, err := tpm2.Import{
				ParentHandle: parent, EncryptionKey: tpm2.TPM2BData{Buffer: inner}, ObjectPublic: tpm2.BytesAs2B[tpm2.TPMTPublic](parts[4]),
				Duplicate: tpm2.TPM2BPrivate{Buffer: parts[2]}, InSymSeed: tpm2.TPM2BEncryptedSecret{Buffer: parts[3]},
				Symmetric: tpm2.TPMTSymDef{
					Algorithm: tpm2.TPMAlgAES,
					KeyBits:   tpm2.NewTPMUSymKeyBits(tpm2.TPMAlgAES, tpm2.TPMKeyBits(128)),
					Mode:      tpm2.NewTPMUSymMode(tpm2.TPMAlgAES, tpm2.TPMAlgCFB),
				},
			}.Execute(b, session)
			if err != nil {
				return 0, err
			}
			loaded, err := tpm2.Load{ParentHandle: parent, InPrivate: imported.OutPrivate, InPublic: tpm2.BytesAs2B[tpm2.TPMTPublic](parts[4])}.Execute(b)
			if err != nil {
				return 0, err
			}
			name = loaded.Name
			return loaded.ObjectHandle, nil
		}, func(h tpm2.TPMHandle) error {
			if err := i.evict(b); err != nil {
				return fmt.Errorf("evicting the key from before: %w", err)
			}
			return i.s.control(b, h, name, persistentIdentity)
		})
	}))
}

// evict makes room at the handle of the identity key. Somebody's key of another kind stays.
func (i *Identity) evict(b *bus) error {
	old, err := b.readPublic(persistentIdentity)
	if errors.Is(err, tpm2.TPMRCHandle) {
		return nil
	}
	if err != nil {
		return err
	}
	public, err := old.OutPublic.Contents()
	if err != nil {
		return err
	}
	if public.Type != tpm2.TPMAlgKeyedHash {
		return fmt.Errorf("handle %s: %w", hsm.TPMHandleName(uint32(persistentIdentity)), hsm.ErrExists)
	}
	return i.s.control(b, persistentIdentity, old.Name, persistentIdentity)
}

// refusesActivation marks the TPM's answers to a blob that it cannot open. TPM_RC_FAILURE is libtpms' to a seed that does not decrypt.
func refusesActivation(err error) error {
	if errors.Is(err, residency.ErrNotProven) || errors.Is(err, tpm2.TPMRCIntegrity) || errors.Is(err, tpm2.TPMRCFailure) || refusesParameters(err) {
		err = fmt.Errorf("%w: %w", ErrActivation, err)
	}
	return err
}

// splitActivation takes an activation blob apart: credential, its seed, duplicate, its seed, public area and URI, each without its
// size.
func splitActivation(blob []byte) (parts [6][]byte, err error) {
	if len(blob) > maxActivation {
		return parts, fmt.Errorf("%w: it has more than %d octets", ErrActivation, maxActivation)
	}
	for i := range parts {
		if len(blob) < 2 || len(blob)-2 < int(binary.BigEndian.Uint16(blob)) {
			return parts, fmt.Errorf("%w: it is cut off", ErrActivation)
		}
		n := 2 + int(binary.BigEndian.Uint16(blob))
		parts[i], blob = blob[2:n], blob[n:]
	}
	if len(blob) > 0 {
		return parts, fmt.Errorf("%w: it has %d octets too many", ErrActivation, len(blob))
	}
	return parts, nil
}

// MAC computes HMAC-SHA256 of data with the identity key, in one command or a sequence, and appends it to dst. The error is
// hsm.ErrNotFound before a first activation.
func (i *Identity) MAC(ctx context.Context, dst, data []byte) ([]byte, error) {
	k, err := i.s.openHandle(ctx, persistentIdentity)
	if err != nil {
		return nil, err
	}
	k.(tpmKeyLike).common().auth = false
	mac, err := hsm.MACKeyOf(k)
	if err != nil {
		return nil, err
	}
	return mac.MAC(ctx, dst, data)
}
