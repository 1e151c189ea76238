//go:build cgo

package pkcs11

import (
	"context"
	"crypto"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"errors"
	"fmt"

	"github.com/miekg/pkcs11"

	"github.com/touchmark/touchmark/hsm"
)

// wrapping returns the token's mechanism for AES key wrap with padding and the wrapping key's base.
func (s *Store) wrapping(operation string, key hsm.Key) (*base, uint, error) {
	w, err := s.way(operation, hsm.AES256)
	if err != nil {
		return nil, 0, err
	}
	k, ok := key.(*wrapKey)
	if !ok {
		return nil, 0, fmt.Errorf("key %q is for %s (%s), not for %s: %w", key.Name(), key.Usage(), key.Algorithm(), hsm.Wrap, hsm.ErrUnsupported)
	}
	if k.store != s {
		return nil, 0, fmt.Errorf("key %q is of another store: %w", key.Name(), hsm.ErrUnsupported)
	}
	return &k.base, w.mechs[0], nil
}

// baseOf returns what a key of this package has in common with the others.
func baseOf(key hsm.Key) *base {
	switch k := key.(type) {
	case *signingKey:
		return &k.base
	case *macKey:
		return &k.base
	case *agreementKey:
		return &k.base
	case *wrapKey:
		return &k.base
	}
	return nil
}

// WrapKey implements [hsm.Wrapper] with CKM_AES_KEY_WRAP_KWP, or CKM_AES_KEY_WRAP_PAD (PKCS#11 3.0 §2.11, 2.40 §2.14).
func (s *Store) WrapKey(ctx context.Context, wrapping, key hsm.Key) (hsm.WrappedKey, error) {
	out := hsm.WrappedKey{Format: hsm.WrappedFormat, Name: key.Name(), Algorithm: key.Algorithm(), Usage: key.Usage()}
	fail := func(err error) (hsm.WrappedKey, error) {
		return hsm.WrappedKey{}, fmt.Errorf("wrapping key %q: %w", key.Name(), err)
	}
	with, mech, err := s.wrapping("wrap", wrapping)
	if err != nil {
		return fail(err)
	}
	b := baseOf(key)
	if b == nil || b.store != s {
		return fail(fmt.Errorf("it is of another store: %w", hsm.ErrUnsupported))
	}
	attr, err := key.Attributes(ctx)
	if err != nil {
		return fail(err)
	}
	if !attr.Extractable {
		return fail(fmt.Errorf("it was made to stay in its token: %w", hsm.ErrUnsupported))
	}
	if pub := publicOf(key); pub != nil {
		if out.Public, err = x509.MarshalPKIXPublicKey(pub); err != nil {
			return fail(err)
		}
	}
	err = with.use(ctx, func(h pkcs11.SessionHandle, wo pkcs11.ObjectHandle) error {
		o, err := b.handle(h)
		if err == nil {
			out.Wrapped, err = s.mod.wrapKey(h, mech, wo, o)
		}
		if is(err, pkcs11.CKR_KEY_NOT_WRAPPABLE, pkcs11.CKR_KEY_UNEXTRACTABLE, pkcs11.CKR_KEY_SIZE_RANGE, pkcs11.CKR_MECHANISM_INVALID) {
			return fmt.Errorf("%w: %w", hsm.ErrUnsupported, err)
		}
		return err
	})
	if err != nil {
		return fail(err)
	}
	return out, nil
}

// publicOf returns the public half of a key pair, or nil.
func publicOf(key hsm.Key) crypto.PublicKey {
	switch k := key.(type) {
	case *signingKey:
		return k.pub
	case *agreementKey:
		return k.pub
	}
	return nil
}

// maxWrapped bounds a wrapped key: RSA-4096 has some 2,400 octets.
const maxWrapped = 8 << 10

// UnwrapKey implements [hsm.Unwrapper] with the mechanisms of WrapKey. What is unwrapped is untrusted until a signature made
// with it, or for a key of usage Agree an agreement, fits the public half.
func (s *Store) UnwrapKey(ctx context.Context, wrapping hsm.Key, spec hsm.Spec, wrapped hsm.WrappedKey) (hsm.Key, error) {
	fail := func(err error) (hsm.Key, error) { return nil, fmt.Errorf("unwrapping key %q: %w", spec.Name, err) }
	with, mech, err := s.wrapping("unwrap", wrapping)
	if err != nil {
		return fail(err)
	}
	if wrapped.Format != hsm.WrappedFormat {
		return fail(fmt.Errorf("it is wrapped as %q, not %s: %w", wrapped.Format, hsm.WrappedFormat, hsm.ErrUnsupported))
	}
	if n := len(wrapped.Wrapped); n < 16 || n > maxWrapped || n%8 != 0 {
		return fail(fmt.Errorf("a wrapped key of %d octets is none", n))
	}
	if spec.Algorithm == "" {
		spec.Algorithm = wrapped.Algorithm
	}
	if spec.Usage == "" {
		spec.Usage = wrapped.Usage
	}
	if spec, err = spec.Resolved(); err != nil {
		return fail(err)
	}
	if spec.Algorithm != wrapped.Algorithm || spec.Usage != wrapped.Usage {
		return fail(fmt.Errorf("it is a key of algorithm %s for %s", wrapped.Algorithm, wrapped.Usage))
	}
	// RFC 5649 §3: eight octets, and the key padded to a multiple of eight. SoftHSM does not say how long an unwrapped key is.
	switch octets := len(wrapped.Wrapped) - 8; {
	case spec.Algorithm == hsm.AES256 && octets != 32, spec.Algorithm == hsm.HMACSHA256 && (octets < 16 || octets > 64):
		return fail(fmt.Errorf("a key of algorithm %s does not have %d octets", spec.Algorithm, octets))
	}
	var parts keyParts
	var public crypto.PublicKey
	if !secretKey(spec.Algorithm) {
		if public, err = x509.ParsePKIXPublicKey(wrapped.Public); err != nil {
			return fail(errors.New("its public half is not a public key"))
		}
		if parts, err = splitKey(spec.Algorithm, public); err != nil {
			return fail(err)
		}
	}
	return s.create(ctx, spec, func(h pkcs11.SessionHandle, spec hsm.Spec, id []byte) (pkcs11.ObjectHandle, pkcs11.ObjectHandle, error) {
		if _, err := s.way(use(spec.Algorithm, spec.Usage), spec.Algorithm); err != nil {
			return 0, 0, err
		}
		wo, err := with.handle(h)
		if err != nil {
			return 0, 0, err
		}
		return s.byTemplate(h, spec, func(level int) (priv, pub pkcs11.ObjectHandle, err error) {
			private := privateTemplate(level, spec, id)
			switch {
			case spec.Algorithm == hsm.HMACSHA256:
				private = append(private, pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_GENERIC_SECRET), pkcs11.NewAttribute(pkcs11.CKA_VERIFY, true))
			case spec.Algorithm == hsm.AES256:
				private = append(private, pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES))
			default:
				private = append(private, pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY), parts.public[0]) // its CKA_KEY_TYPE
				if ec, ok := public.(*ecdsa.PublicKey); ok && s.mod.nss {
					point, err := ec.Bytes()
					if err != nil {
						return 0, 0, err
					}
					private = append(private, pkcs11.NewAttribute(ckaNSSDB, point))
				}
			}
			// The public half first, as for imports.
			if public != nil {
				if pub, err = s.createPublic(h, level, spec, id, parts.public); err != nil {
					return 0, 0, err
				}
			}
			if priv, err = s.mod.ctx.UnwrapKey(h, []*pkcs11.Mechanism{pkcs11.NewMechanism(mech, nil)}, wo, wrapped.Wrapped, private); err == nil {
				err = s.fits(h, spec, priv, public)
			}
			if err != nil {
				return 0, 0, errors.Join(err, s.destroy(h, pub, priv))
			}
			return priv, pub, nil
		})
	})
}

// fits checks that a private key that came out of a wrapping goes with the public half that came beside it.
func (s *Store) fits(h pkcs11.SessionHandle, spec hsm.Spec, o pkcs11.ObjectHandle, public crypto.PublicKey) error {
	if secretKey(spec.Algorithm) {
		return nil
	}
	if spec.Usage == hsm.Agree {
		return s.agrees(h, o, public)
	}
	message := []byte("touchmark: does this private key go with this public key?")
	digest := sha256.Sum256(message)
	sign := func(mech []*pkcs11.Mechanism, input []byte) ([]byte, error) {
		if err := s.mod.ctx.SignInit(h, mech, o); err != nil {
			return nil, err
		}
		return s.mod.ctx.Sign(h, input)
	}
	good := false
	switch pub := public.(type) {
	case *ecdsa.PublicKey:
		sig, err := sign(mechECDSA, digest[:])
		if err != nil {
			return err
		}
		der, err := ecdsaASN1(sig)
		if err != nil {
			return err
		}
		good = ecdsa.VerifyASN1(pub, digest[:], der)
	case *rsa.PublicKey:
		sig, err := sign(mechRSA, append(append([]byte{}, digestPrefix[crypto.SHA256]...), digest[:]...))
		if err != nil {
			return err
		}
		good = rsa.VerifyPKCS1v15(pub, crypto.SHA256, digest[:], sig) == nil
	case ed25519.PublicKey:
		sig, err := sign(mechEdDSA, message)
		if err != nil {
			return err
		}
		good = ed25519.Verify(pub, message, sig)
	}
	if !good {
		return errors.New("the private half does not go with the public half")
	}
	return nil
}

// agrees checks the halves of a key of usage Agree.
func (s *Store) agrees(h pkcs11.SessionHandle, o pkcs11.ObjectHandle, public crypto.PublicKey) error {
	ec, ok := public.(*ecdsa.PublicKey)
	if !ok {
		return hsm.ErrUnsupported
	}
	pub, err := ec.ECDH()
	if err != nil {
		return err
	}
	peer, err := ecdh.P256().GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	want, err := peer.ECDH(pub)
	if err != nil {
		return err
	}
	got, err := s.derive(h, o, peer.PublicKey())
	if err == nil && subtle.ConstantTimeCompare(got, want) != 1 {
		err = errors.New("the private half does not go with the public half")
	}
	return err
}
