//go:build cgo

package pkcs11

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/subtle"
	"crypto/x509"
	"encoding/asn1"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/big"
	"runtime"
	"slices"
	"sync/atomic"

	"github.com/miekg/pkcs11"

	"github.com/touchmark/touchmark/hsm"
)

var (
	oidP256    = []byte{0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07}
	oidP384    = []byte{0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x22}
	oidP521    = []byte{0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x23}
	oidEd25519 = []byte{0x06, 0x03, 0x2b, 0x65, 0x70}
)

// ed25519Name is the other spelling of the curve that tokens use (PKCS#11 3.0 §2.3.5).
var ed25519Name = append([]byte{0x13, 12}, "edwards25519"...)

// base is what every key on a token has.
type base struct {
	store     *Store
	name      string
	algorithm hsm.Algorithm
	usage     hsm.Usage
	class     uint
	id        []byte
	ephemeral bool
	cleanup   runtime.Cleanup
	closed    atomic.Bool
	object    atomic.Pointer[object]
}

// object is a handle and the generation of the token's connection that it belongs to.
type object struct {
	generation int64
	handle     pkcs11.ObjectHandle
}

func (b *base) Name() string             { return b.name }
func (b *base) Algorithm() hsm.Algorithm { return b.algorithm }
func (b *base) Usage() hsm.Usage         { return b.usage }
func (b *base) URI() string              { return b.store.uri.WithObject(b.name).String() }

// use runs an operation on the key's object.
func (b *base) use(ctx context.Context, f func(pkcs11.SessionHandle, pkcs11.ObjectHandle) error) error {
	return b.store.with(ctx, true, func(h pkcs11.SessionHandle) error {
		o, err := b.handle(h)
		if err != nil {
			return err
		}
		return f(h, o)
	})
}

// handle returns the key's object. Handles do not outlive a lost token, so it is searched for again when the connection is a
// newer one.
func (b *base) handle(h pkcs11.SessionHandle) (pkcs11.ObjectHandle, error) {
	o := b.object.Load()
	gen := b.store.generation.Load()
	if o.generation == gen {
		return o.handle, nil
	}
	if b.ephemeral {
		return 0, fmt.Errorf("key %q lived in a session that is gone: %w", b.name, hsm.ErrLost)
	}
	template := []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_CLASS, b.class), pkcs11.NewAttribute(pkcs11.CKA_LABEL, b.name), pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true)}
	if len(b.id) > 0 {
		template = append(template, pkcs11.NewAttribute(pkcs11.CKA_ID, b.id))
	}
	found, err := b.store.find(h, template...)
	if err != nil {
		return 0, err
	}
	if len(found) != 1 {
		return 0, fmt.Errorf("key %q after the token came back: %w", b.name, hsm.ErrNotFound)
	}
	b.object.Store(&object{gen, found[0]})
	return found[0], nil
}

// Attributes reads the key's attributes back from the token.
func (b *base) Attributes(ctx context.Context) (hsm.Attributes, error) {
	var a hsm.Attributes
	err := b.use(ctx, func(h pkcs11.SessionHandle, o pkcs11.ObjectHandle) error {
		a = hsm.Attributes{Hardware: true}
		for _, x := range []struct {
			typ uint
			dst *bool
		}{
			{pkcs11.CKA_SENSITIVE, &a.Sensitive}, {pkcs11.CKA_EXTRACTABLE, &a.Extractable}, {pkcs11.CKA_LOCAL, &a.Local},
			{pkcs11.CKA_ALWAYS_SENSITIVE, &a.AlwaysSensitive}, {pkcs11.CKA_NEVER_EXTRACTABLE, &a.NeverExtractable},
		} {
			on, err := b.store.flag(h, o, x.typ)
			if err != nil && !is(err, pkcs11.CKR_ATTRIBUTE_TYPE_INVALID) {
				return fmt.Errorf("attributes of key %q: %w", b.name, err)
			}
			// What a token does not know it does not vouch for; of what may leave it, the worse is taken.
			*x.dst = on || err != nil && x.typ == pkcs11.CKA_EXTRACTABLE
		}
		return nil
	})
	return a, err
}

type signingKey struct {
	base
	pub crypto.PublicKey
}

func (k *signingKey) Public() crypto.PublicKey { return k.pub }

// hashOIDs are the DigestInfo prefixes of PKCS #1 (RFC 8017 §9.2, note 1).
var digestPrefix = map[crypto.Hash][]byte{
	crypto.SHA256: {0x30, 0x31, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01, 0x05, 0x00, 0x04, 0x20},
	crypto.SHA384: {0x30, 0x41, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x02, 0x05, 0x00, 0x04, 0x30},
	crypto.SHA512: {0x30, 0x51, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x03, 0x05, 0x00, 0x04, 0x40},
}

var pssHash = map[crypto.Hash][2]uint{
	crypto.SHA256: {pkcs11.CKM_SHA256, pkcs11.CKG_MGF1_SHA256},
	crypto.SHA384: {pkcs11.CKM_SHA384, pkcs11.CKG_MGF1_SHA384},
	crypto.SHA512: {pkcs11.CKM_SHA512, pkcs11.CKG_MGF1_SHA512},
}

var (
	mechECDSA  = []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_ECDSA, nil)}
	mechEdDSA  = []*pkcs11.Mechanism{pkcs11.NewMechanism(ckmEdDSA, nil)}
	mechRawRSA = []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_RSA_X_509, nil)}
	mechRSA    = []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS, nil)}
	mechHMAC   = []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_SHA256_HMAC, nil)}
)

// Sign implements [crypto.Signer] inside the token. Digests are made outside: raw CKM_ECDSA and CKM_RSA_PKCS are what
// every token has.
func (k *signingKey) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	hash := opts.HashFunc()
	mech, input := mechECDSA, digest
	switch k.pub.(type) {
	case ed25519.PublicKey:
		if hash != 0 {
			return nil, fmt.Errorf("signing with key %q: Ed25519 takes the message itself, not a %s digest", k.name, hash)
		}
		mech = mechEdDSA
	case *rsa.PublicKey:
		if pss, ok := opts.(*rsa.PSSOptions); ok {
			ids, ok := pssHash[hash]
			if !ok {
				return nil, fmt.Errorf("signing with key %q: PSS with %s: %w", k.name, hash, hsm.ErrUnsupported)
			}
			salt := pss.SaltLength
			switch salt {
			case rsa.PSSSaltLengthEqualsHash, rsa.PSSSaltLengthAuto:
				salt = hash.Size()
			}
			if len(digest) != hash.Size() || salt < 0 {
				return nil, fmt.Errorf("signing with key %q: a digest of %d octets and a salt of %d do not go with %s", k.name, len(digest), salt, hash)
			}
			switch {
			case k.store.mechs.has(pkcs11.CKM_RSA_PKCS_PSS, 0):
				mech = []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS_PSS, pkcs11.NewPSSParams(ids[0], ids[1], uint(salt)))}
			case k.store.mechs.has(pkcs11.CKM_RSA_X_509, 0):
				var err error
				if input, err = encodePSS(hash, digest, salt, k.pub.(*rsa.PublicKey).N.BitLen()); err != nil {
					return nil, fmt.Errorf("signing with key %q: %w", k.name, err)
				}
				mech = mechRawRSA
			default:
				return nil, fmt.Errorf("signing with key %q: the token offers neither CKM_RSA_PKCS_PSS nor CKM_RSA_X_509: %w", k.name, hsm.ErrUnsupported)
			}
		} else {
			prefix, ok := digestPrefix[hash]
			if !ok {
				return nil, fmt.Errorf("signing with key %q: %s: %w", k.name, hash, hsm.ErrUnsupported)
			}
			mech, input = mechRSA, append(bytes.Clone(prefix), digest...)
		}
	}
	if hash != 0 && len(digest) != hash.Size() {
		return nil, fmt.Errorf("signing with key %q: a digest of %s has %d octets, not %d", k.name, hash, hash.Size(), len(digest))
	}
	if pub, ok := k.pub.(*ecdsa.PublicKey); ok {
		// FIPS 186-5 §6.4.1: the leftmost bits that fit the order; tokens refuse longer input.
		if size := (pub.Curve.Params().BitSize + 7) / 8; len(input) > size {
			input = input[:size]
		}
	}
	var sig []byte
	err := k.use(context.Background(), func(h pkcs11.SessionHandle, o pkcs11.ObjectHandle) (err error) {
		if err = k.store.mod.ctx.SignInit(h, mech, o); err == nil {
			sig, err = k.store.mod.ctx.Sign(h, input)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("signing with key %q: %w", k.name, err)
	}
	if _, ok := k.pub.(*ecdsa.PublicKey); ok {
		return ecdsaASN1(sig)
	}
	return sig, nil
}

// ecdsaASN1 turns r‖s, as PKCS#11 has it, into Ecdsa-Sig-Value (RFC 3279 §2.2.3).
func ecdsaASN1(sig []byte) ([]byte, error) {
	if len(sig) == 0 || len(sig)%2 != 0 || len(sig) > 132 {
		return nil, fmt.Errorf("the token's ECDSA signature has %d octets", len(sig))
	}
	half := len(sig) / 2
	body := appendInteger(appendInteger(make([]byte, 0, len(sig)+10), sig[:half]), sig[half:])
	if len(body) < 0x80 {
		return append([]byte{0x30, byte(len(body))}, body...), nil
	}
	return append([]byte{0x30, 0x81, byte(len(body))}, body...), nil
}

func appendInteger(b, n []byte) []byte {
	for len(n) > 1 && n[0] == 0 {
		n = n[1:]
	}
	pad := 0
	if n[0]&0x80 != 0 {
		pad = 1
	}
	b = append(b, 0x02, byte(len(n)+pad))
	if pad == 1 {
		b = append(b, 0)
	}
	return append(b, n...)
}

// encodePSS is EMSA-PSS-ENCODE (RFC 8017 §9.1.1) with MGF1 of the same hash, for tokens with raw RSA only.
func encodePSS(hash crypto.Hash, digest []byte, saltLength, modulusBits int) ([]byte, error) {
	bits := modulusBits - 1
	em := make([]byte, (modulusBits+7)/8)
	h := hash.New()
	if len(em) < h.Size()+saltLength+2 {
		return nil, errors.New("the salt is too long for the key")
	}
	db, tag := em[:len(em)-h.Size()-1], em[len(em)-h.Size()-1:len(em)-1]
	salt := db[len(db)-saltLength:]
	if _, err := rand.Read(salt); err != nil {
		return nil, err
	}
	h.Write(make([]byte, 8))
	h.Write(digest)
	h.Write(salt)
	h.Sum(tag[:0])
	db[len(db)-saltLength-1] = 1
	for i, counter := 0, uint32(0); i < len(db); counter++ {
		h.Reset()
		h.Write(tag)
		h.Write(binary.BigEndian.AppendUint32(nil, counter))
		i += subtle.XORBytes(db[i:], db[i:], h.Sum(nil))
	}
	db[0] &= 0xff >> (8*len(em) - bits)
	em[len(em)-1] = 0xbc
	return em, nil
}

type macKey struct{ base }

// MAC implements [hsm.MACKey] inside the token.
func (k *macKey) MAC(ctx context.Context, dst, data []byte) ([]byte, error) {
	err := k.use(ctx, func(h pkcs11.SessionHandle, o pkcs11.ObjectHandle) error {
		if err := k.store.mod.ctx.SignInit(h, mechHMAC, o); err != nil {
			return err
		}
		mac, err := k.store.mod.ctx.Sign(h, data)
		if err == nil {
			dst = append(dst, mac...)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("HMAC with key %q: %w", k.name, err)
	}
	return dst, nil
}

type agreementKey struct {
	base
	pub *ecdh.PublicKey
}

func (k *agreementKey) Curve() ecdh.Curve          { return ecdh.P256() }
func (k *agreementKey) PublicKey() *ecdh.PublicKey { return k.pub }

// ECDH implements [ecdh.KeyExchanger]: the token derives the shared secret as a session object, which is read and
// destroyed. The private key stays where it is.
func (k *agreementKey) ECDH(peer *ecdh.PublicKey) ([]byte, error) {
	var secret []byte
	err := k.use(context.Background(), func(h pkcs11.SessionHandle, o pkcs11.ObjectHandle) (err error) {
		secret, err = k.store.derive(h, o, peer)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("agreeing with key %q: %w", k.name, err)
	}
	return secret, nil
}

func (s *Store) derive(h pkcs11.SessionHandle, o pkcs11.ObjectHandle, peer *ecdh.PublicKey) ([]byte, error) {
	params := pkcs11.NewECDH1DeriveParams(pkcs11.CKD_NULL, nil, peer.Bytes())
	derived, err := s.mod.ctx.DeriveKey(h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_ECDH1_DERIVE, params)}, o, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_GENERIC_SECRET),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false), pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, false), pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, true),
		pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, 32),
	})
	if err != nil {
		return nil, err
	}
	secret, err := s.attribute(h, derived, pkcs11.CKA_VALUE)
	return secret, errors.Join(err, s.mod.ctx.DestroyObject(h, derived))
}

// A wrapKey encrypts other keys; see [Store.WrapKey].
type wrapKey struct{ base }

func curveOID(alg hsm.Algorithm) []byte {
	switch alg {
	case hsm.ECP256:
		return oidP256
	case hsm.ECP384:
		return oidP384
	case hsm.ECP521:
		return oidP521
	case hsm.Ed25519:
		return oidEd25519
	}
	return nil
}

// Tokens differ in which attributes they take when a key is made, so there are templates from full to lean. A token is
// tried with the full one first, and remembered.
const (
	fullTemplate  = iota // everything said, as the standard has it
	terseTemplate        // without what is off anyway
	leanTemplate         // without what the token sets by itself: it is read back then
	templates            // how many there are
)

// refusesTemplate reports whether a token did not like a template, rather than what was asked for.
func refusesTemplate(err error) bool {
	return is(err, pkcs11.CKR_ATTRIBUTE_TYPE_INVALID, pkcs11.CKR_ATTRIBUTE_VALUE_INVALID, pkcs11.CKR_ATTRIBUTE_READ_ONLY,
		pkcs11.CKR_TEMPLATE_INCONSISTENT, pkcs11.CKR_TEMPLATE_INCOMPLETE)
}

// privateTemplate is what makes a private or secret key stay.
func privateTemplate(level int, spec hsm.Spec, id []byte) []*pkcs11.Attribute {
	t := []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, !spec.Ephemeral),
		pkcs11.NewAttribute(pkcs11.CKA_LABEL, spec.Name),
		pkcs11.NewAttribute(pkcs11.CKA_ID, id),
	}
	if level < leanTemplate {
		t = append(t, pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true), pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true))
	}
	if level < leanTemplate || spec.Extractable {
		t = append(t, pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, spec.Extractable))
	}
	t = usages(t, level, usageFlag{pkcs11.CKA_SIGN, spec.Usage == hsm.Sign || spec.Usage == hsm.MAC}, usageFlag{pkcs11.CKA_DERIVE, spec.Usage == hsm.Agree})
	if spec.Usage == hsm.Wrap {
		t = usages(t, level, usageFlag{pkcs11.CKA_WRAP, true}, usageFlag{pkcs11.CKA_UNWRAP, true}, usageFlag{pkcs11.CKA_ENCRYPT, false}, usageFlag{pkcs11.CKA_DECRYPT, false})
	}
	return t
}

func publicTemplate(level int, spec hsm.Spec, id []byte) []*pkcs11.Attribute {
	return usages([]*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, !spec.Ephemeral),
		pkcs11.NewAttribute(pkcs11.CKA_LABEL, spec.Name),
		pkcs11.NewAttribute(pkcs11.CKA_ID, id),
	}, level, usageFlag{pkcs11.CKA_VERIFY, spec.Usage == hsm.Sign})
}

type usageFlag struct {
	typ uint
	on  bool
}

func usages(t []*pkcs11.Attribute, level int, flags ...usageFlag) []*pkcs11.Attribute {
	for _, f := range flags {
		if f.on || level == fullTemplate {
			t = append(t, pkcs11.NewAttribute(f.typ, f.on))
		}
	}
	return t
}

// byTemplate runs make with one template after the other until the token takes one. Keys made with the lean one must turn
// out to be what was asked for.
func (s *Store) byTemplate(h pkcs11.SessionHandle, spec hsm.Spec, make func(level int) (priv, pub pkcs11.ObjectHandle, err error)) (priv, pub pkcs11.ObjectHandle, err error) {
	kind := string(spec.Algorithm) + string(spec.Usage)
	first, _ := s.levels.Load(kind)
	level, _ := first.(int)
	for ; level < templates; level++ {
		priv, pub, err = make(level)
		s.mod.beat() // what comes next waits behind other keys that are being made
		if err != nil {
			if refusesTemplate(err) {
				continue
			}
			return 0, 0, err
		}
		if level == leanTemplate {
			if err := s.stays(h, priv, spec); err != nil {
				return 0, 0, errors.Join(err, s.destroy(h, pub, priv))
			}
		}
		s.levels.Store(kind, level)
		return priv, pub, nil
	}
	return 0, 0, fmt.Errorf("%w: %w", hsm.ErrUnsupported, err)
}

// stays checks that a key that was not told to stay does.
func (s *Store) stays(h pkcs11.SessionHandle, o pkcs11.ObjectHandle, spec hsm.Spec) error {
	sensitive, err := s.flag(h, o, pkcs11.CKA_SENSITIVE)
	if err != nil {
		return err
	}
	extractable, err := s.flag(h, o, pkcs11.CKA_EXTRACTABLE)
	if err != nil {
		return err
	}
	if !sensitive || extractable != spec.Extractable {
		return fmt.Errorf("the token makes keys with CKA_SENSITIVE %t and CKA_EXTRACTABLE %t only: %w", sensitive, extractable, hsm.ErrUnsupported)
	}
	return nil
}

func (s *Store) destroy(h pkcs11.SessionHandle, objects ...pkcs11.ObjectHandle) (err error) {
	for _, o := range objects {
		if o != 0 {
			err = errors.Join(err, s.mod.ctx.DestroyObject(h, o))
		}
	}
	return err
}

func (s *Store) generate(h pkcs11.SessionHandle, spec hsm.Spec, id []byte) (priv, pub pkcs11.ObjectHandle, err error) {
	w, err := s.way("make", spec.Algorithm)
	if err != nil {
		return 0, 0, err
	}
	if _, err := s.way(use(spec.Algorithm, spec.Usage), spec.Algorithm); err != nil {
		return 0, 0, err // a key that cannot be used is no key
	}
	mech := []*pkcs11.Mechanism{pkcs11.NewMechanism(w.mechs[0], nil)}
	return s.byTemplate(h, spec, func(level int) (priv, pub pkcs11.ObjectHandle, err error) {
		private := privateTemplate(level, spec, id)
		if secretKey(spec.Algorithm) {
			private = append(private, pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, w.keyType))
			if spec.Usage == hsm.MAC {
				private = append(private, pkcs11.NewAttribute(pkcs11.CKA_VERIFY, true))
			}
			if w.mechs[0] == pkcs11.CKM_GENERIC_SECRET_KEY_GEN || spec.Algorithm == hsm.AES256 {
				private = append(private, pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, 32))
			}
			priv, err = s.mod.ctx.GenerateKey(h, mech, private)
			return priv, 0, err
		}
		public := publicTemplate(level, spec, id)
		if bits, ok := rsaBits[spec.Algorithm]; ok {
			public = append(public, pkcs11.NewAttribute(pkcs11.CKA_MODULUS_BITS, bits), pkcs11.NewAttribute(pkcs11.CKA_PUBLIC_EXPONENT, []byte{1, 0, 1}))
		} else {
			public = append(public, pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, curveOID(spec.Algorithm)))
		}
		pub, priv, err = s.mod.ctx.GenerateKeyPair(h, mech, public, private)
		return priv, pub, err
	})
}

func secretKey(alg hsm.Algorithm) bool { return alg == hsm.HMACSHA256 || alg == hsm.AES256 }

func (s *Store) importKey(h pkcs11.SessionHandle, spec hsm.Spec, id []byte, secret hsm.Secret) (priv, pub pkcs11.ObjectHandle, err error) {
	if _, err := s.way(use(spec.Algorithm, spec.Usage), spec.Algorithm); err != nil {
		return 0, 0, err
	}
	if secretKey(spec.Algorithm) {
		return s.importSecret(h, spec, id, secret)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(secret)
	if err != nil {
		return 0, 0, errors.New("the private key is not PKCS #8")
	}
	parts, err := splitKey(spec.Algorithm, parsed)
	if err != nil {
		return 0, 0, err
	}
	defer parts.wipe()
	return s.byTemplate(h, spec, func(level int) (priv, pub pkcs11.ObjectHandle, err error) {
		// The public half first: without its private half nothing is found by name, so a crash between leaves no key.
		if pub, err = s.createPublic(h, level, spec, id, parts.public); err != nil {
			return 0, 0, err
		}
		private := append(privateTemplate(level, spec, id), pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY))
		if priv, err = s.mod.ctx.CreateObject(h, slices.Concat(private, parts.private, parts.secret)); err != nil {
			return 0, 0, errors.Join(err, s.destroy(h, pub))
		}
		return priv, pub, nil
	})
}

func (s *Store) createPublic(h pkcs11.SessionHandle, level int, spec hsm.Spec, id []byte, parts []*pkcs11.Attribute) (pkcs11.ObjectHandle, error) {
	return s.mod.ctx.CreateObject(h, append(append(publicTemplate(level, spec, id), pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY)), parts...))
}

func (s *Store) importSecret(h pkcs11.SessionHandle, spec hsm.Spec, id []byte, secret hsm.Secret) (priv, pub pkcs11.ObjectHandle, err error) {
	types := []uint{pkcs11.CKK_AES}
	switch {
	case spec.Algorithm == hsm.AES256 && len(secret) != 32:
		return 0, 0, fmt.Errorf("a key of algorithm %s has 32 octets, not %d", spec.Algorithm, len(secret))
	case spec.Algorithm == hsm.HMACSHA256 && (len(secret) < 16 || len(secret) > 64):
		return 0, 0, fmt.Errorf("an HMAC key has 16 to 64 octets, not %d", len(secret))
	case spec.Algorithm == hsm.HMACSHA256:
		types = []uint{pkcs11.CKK_GENERIC_SECRET, pkcs11.CKK_SHA256_HMAC}
	}
	for _, keyType := range types {
		priv, pub, err = s.byTemplate(h, spec, func(level int) (pkcs11.ObjectHandle, pkcs11.ObjectHandle, error) {
			t := append(privateTemplate(level, spec, id), pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, keyType), pkcs11.NewAttribute(pkcs11.CKA_VALUE, []byte(secret)))
			if spec.Usage == hsm.MAC {
				t = append(t, pkcs11.NewAttribute(pkcs11.CKA_VERIFY, true))
			}
			o, err := s.mod.ctx.CreateObject(h, t)
			return o, 0, err
		})
		if err == nil || !errors.Is(err, hsm.ErrUnsupported) {
			break
		}
	}
	return priv, pub, err
}

// keyParts is a key pair as attributes: those of the public half, and those of the private half in two parts.
type keyParts struct{ public, private, secret []*pkcs11.Attribute }

func (p keyParts) wipe() {
	for _, a := range p.secret {
		clear(a.Value)
	}
}

// splitKey makes attributes of a key pair, or of its public half alone.
func splitKey(alg hsm.Algorithm, key any) (keyParts, error) {
	var p keyParts
	switch k := key.(type) {
	case *ecdsa.PrivateKey:
		p, err := splitKey(alg, &k.PublicKey)
		if err != nil {
			return p, err
		}
		scalar, err := k.Bytes()
		if err != nil {
			return p, err
		}
		p.private = []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_EC), pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, curveOID(alg))}
		p.secret = []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_VALUE, scalar)}
		return p, nil
	case *ecdsa.PublicKey:
		if curveOID(alg) == nil || algorithmOfCurve(k.Curve) != alg {
			return p, fmt.Errorf("the key is not of algorithm %s", alg)
		}
		uncompressed, err := k.Bytes()
		if err != nil {
			return p, err
		}
		point, err := asn1.Marshal(uncompressed)
		p.public = []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_EC), pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, curveOID(alg)), pkcs11.NewAttribute(pkcs11.CKA_EC_POINT, point)}
		return p, err
	case *rsa.PrivateKey:
		p, err := splitKey(alg, &k.PublicKey)
		if err != nil {
			return p, err
		}
		if len(k.Primes) != 2 {
			return p, fmt.Errorf("an RSA key of %d primes: %w", len(k.Primes), hsm.ErrUnsupported)
		}
		p.private = p.public
		p.secret = []*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_PRIVATE_EXPONENT, k.D.Bytes()),
			pkcs11.NewAttribute(pkcs11.CKA_PRIME_1, k.Primes[0].Bytes()), pkcs11.NewAttribute(pkcs11.CKA_PRIME_2, k.Primes[1].Bytes()),
			pkcs11.NewAttribute(pkcs11.CKA_EXPONENT_1, k.Precomputed.Dp.Bytes()), pkcs11.NewAttribute(pkcs11.CKA_EXPONENT_2, k.Precomputed.Dq.Bytes()),
			pkcs11.NewAttribute(pkcs11.CKA_COEFFICIENT, k.Precomputed.Qinv.Bytes()),
		}
		return p, nil
	case *rsa.PublicKey:
		if rsaBits[alg] != k.N.BitLen() {
			return p, fmt.Errorf("the key is not of algorithm %s", alg)
		}
		p.public = []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_RSA), pkcs11.NewAttribute(pkcs11.CKA_MODULUS, k.N.Bytes()), pkcs11.NewAttribute(pkcs11.CKA_PUBLIC_EXPONENT, big.NewInt(int64(k.E)).Bytes())}
		return p, nil
	case ed25519.PublicKey:
		if alg != hsm.Ed25519 {
			return p, fmt.Errorf("the key is not of algorithm %s", alg)
		}
		point, err := asn1.Marshal([]byte(k))
		p.public = []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, ckkECEdwards), pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, oidEd25519), pkcs11.NewAttribute(pkcs11.CKA_EC_POINT, point)}
		return p, err
	}
	return p, fmt.Errorf("importing %s keys: %w", alg, hsm.ErrUnsupported)
}

func algorithmOfCurve(c elliptic.Curve) hsm.Algorithm {
	switch c {
	case elliptic.P256():
		return hsm.ECP256
	case elliptic.P384():
		return hsm.ECP384
	case elliptic.P521():
		return hsm.ECP521
	}
	return ""
}

// algorithmOf returns the algorithm of a public key, or "".
func algorithmOf(pub crypto.PublicKey) hsm.Algorithm {
	switch pub := pub.(type) {
	case *ecdsa.PublicKey:
		return algorithmOfCurve(pub.Curve)
	case *rsa.PublicKey:
		for alg, bits := range rsaBits {
			if pub.N.BitLen() == bits && pub.E > 2 {
				return alg
			}
		}
	case ed25519.PublicKey:
		return hsm.Ed25519
	}
	return ""
}

// keyFrom makes a Key of a fresh handle, and of the public half where there is one.
func (s *Store) keyFrom(spec hsm.Spec, id []byte, priv pkcs11.ObjectHandle, public crypto.PublicKey) (hsm.Key, error) {
	switch spec.Algorithm {
	case hsm.HMACSHA256:
		k := &macKey{}
		s.fill(&k.base, spec, pkcs11.CKO_SECRET_KEY, id, priv)
		return k, nil
	case hsm.AES256:
		k := &wrapKey{}
		s.fill(&k.base, spec, pkcs11.CKO_SECRET_KEY, id, priv)
		return k, nil
	}
	if alg := algorithmOf(public); alg != spec.Algorithm {
		return nil, fmt.Errorf("the token made a key of algorithm %q, not %s", alg, spec.Algorithm)
	}
	if spec.Usage == hsm.Agree {
		ec, ok := public.(*ecdsa.PublicKey)
		if !ok {
			return nil, fmt.Errorf("agreement with a key of algorithm %s: %w", spec.Algorithm, hsm.ErrUnsupported)
		}
		agree, err := ec.ECDH()
		if err != nil {
			return nil, err
		}
		k := &agreementKey{pub: agree}
		s.fill(&k.base, spec, pkcs11.CKO_PRIVATE_KEY, id, priv)
		return k, nil
	}
	k := &signingKey{pub: public}
	s.fill(&k.base, spec, pkcs11.CKO_PRIVATE_KEY, id, priv)
	return k, nil
}

func (s *Store) fill(b *base, spec hsm.Spec, class uint, id []byte, handle pkcs11.ObjectHandle) {
	b.store, b.name, b.algorithm, b.usage, b.class, b.id, b.ephemeral = s, spec.Name, spec.Algorithm, spec.Usage, class, id, spec.Ephemeral
	o := &object{s.generation.Load(), handle}
	b.object.Store(o)
	if spec.Ephemeral {
		// The key lives as long as this Key does; its object would live as long as the session, and fill the token.
		b.cleanup = runtime.AddCleanup(b, s.throwAway, *o)
	}
}

// Close destroys the object of a throw-away key, and does nothing for others. The key must not be used afterwards.
func (b *base) Close() error {
	if !b.ephemeral || b.closed.Swap(true) {
		return nil
	}
	b.cleanup.Stop()
	b.store.throwAway(*b.object.Load())
	return nil
}

// publicHalf finds the public half of a private key: the public key object of its name and ID, else what the private key
// object or a certificate of the same ID tells, for tokens that keep no public keys.
func (s *Store) publicHalf(h pkcs11.SessionHandle, name string, id []byte, priv pkcs11.ObjectHandle, index publicIndex) (crypto.PublicKey, error) {
	publics := index[indexKey([]byte(name), id)]
	if index == nil {
		var err error
		publics, err = s.find(h, pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY), pkcs11.NewAttribute(pkcs11.CKA_ID, id), pkcs11.NewAttribute(pkcs11.CKA_LABEL, name))
		if err != nil {
			return nil, err
		}
	}
	switch len(publics) {
	case 1:
		return s.publicKey(h, publics[0])
	case 0:
	default:
		return nil, fmt.Errorf("%d public keys belong to it, want one: %w", len(publics), hsm.ErrUnsupported)
	}
	// CKA_PUBLIC_KEY_INFO is new in PKCS#11 2.40 §4.9; an RSA private key has its modulus (§2.1.3); some have the point.
	if info, err := s.attribute(h, priv, ckaPublicKeyInfo); err == nil && len(info) > 0 {
		if pub, err := x509.ParsePKIXPublicKey(info); err == nil {
			return pub, nil
		}
	}
	if pub, err := s.publicKey(h, priv); err == nil {
		return pub, nil
	}
	if len(id) > 0 {
		certs, err := s.find(h, pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_CERTIFICATE), pkcs11.NewAttribute(pkcs11.CKA_ID, id))
		if err != nil {
			return nil, err
		}
		for _, c := range certs {
			der, err := s.attribute(h, c, pkcs11.CKA_VALUE)
			if err != nil {
				continue
			}
			if cert, err := x509.ParseCertificate(der); err == nil {
				return cert.PublicKey, nil
			}
		}
	}
	return nil, fmt.Errorf("no public key or certificate on the token belongs to it: %w", hsm.ErrUnsupported)
}

// uncompressed is SEC 1 §2.3.3.
func uncompressed(size int, x, y []byte) []byte {
	p := make([]byte, 1+2*size)
	p[0] = 4
	copy(p[1+size-len(x):], x)
	copy(p[1+2*size-len(y):], y)
	return p
}
