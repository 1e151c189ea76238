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
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"io"
	"math/big"
	"sync/atomic"

	"github.com/miekg/pkcs11"

	"github.com/touchmark/touchmark/hsm"
)

// Numbers that PKCS#11 3.0 added and the binding does not name.
const (
	ckkECEdwards           = 0x40
	ckmECEdwardsKeyPairGen = 0x1055
	ckmEdDSA               = 0x1057
)

var (
	oidP256    = []byte{0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07}
	oidP384    = []byte{0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x22}
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

// use runs an operation on the key's object. Handles do not outlive a lost token, so the object is searched for again
// when the connection is a newer one.
func (b *base) use(ctx context.Context, f func(pkcs11.SessionHandle, pkcs11.ObjectHandle) error) error {
	return b.store.with(ctx, true, func(h pkcs11.SessionHandle) error {
		o := b.object.Load()
		if gen := b.store.generation.Load(); o.generation != gen {
			if b.ephemeral {
				return fmt.Errorf("key %q lived in a session that is gone: %w", b.name, hsm.ErrLost)
			}
			template := []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_CLASS, b.class), pkcs11.NewAttribute(pkcs11.CKA_LABEL, b.name), pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true)}
			if len(b.id) > 0 {
				template = append(template, pkcs11.NewAttribute(pkcs11.CKA_ID, b.id))
			}
			found, err := b.store.find(h, template...)
			if err != nil {
				return err
			}
			if len(found) != 1 {
				return fmt.Errorf("key %q after the token came back: %w", b.name, hsm.ErrNotFound)
			}
			o = &object{gen, found[0]}
			b.object.Store(o)
		}
		return f(h, o.handle)
	})
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
			got, err := b.store.mod.ctx.GetAttributeValue(h, o, []*pkcs11.Attribute{pkcs11.NewAttribute(x.typ, nil)})
			if err != nil {
				return fmt.Errorf("attributes of key %q: %w", b.name, err)
			}
			*x.dst = len(got[0].Value) == 1 && got[0].Value[0] == 1
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
	mechECDSA = []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_ECDSA, nil)}
	mechEdDSA = []*pkcs11.Mechanism{pkcs11.NewMechanism(ckmEdDSA, nil)}
	mechRSA   = []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS, nil)}
	mechHMAC  = []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_SHA256_HMAC, nil)}
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
			mech = []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS_PSS, pkcs11.NewPSSParams(ids[0], ids[1], uint(salt)))}
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
	err := k.use(context.Background(), func(h pkcs11.SessionHandle, o pkcs11.ObjectHandle) error {
		ctx := k.store.mod.ctx
		params := pkcs11.NewECDH1DeriveParams(pkcs11.CKD_NULL, nil, peer.Bytes())
		derived, err := ctx.DeriveKey(h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_ECDH1_DERIVE, params)}, o, []*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_GENERIC_SECRET),
			pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false), pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, false), pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, true),
			pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, 32),
		})
		if err != nil {
			return err
		}
		got, err := ctx.GetAttributeValue(h, derived, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_VALUE, nil)})
		if err == nil {
			secret = got[0].Value
		}
		return errors.Join(err, ctx.DestroyObject(h, derived))
	})
	if err != nil {
		return nil, fmt.Errorf("agreeing with key %q: %w", k.name, err)
	}
	return secret, nil
}

func curveOID(alg hsm.Algorithm) []byte {
	switch alg {
	case hsm.ECP256:
		return oidP256
	case hsm.ECP384:
		return oidP384
	case hsm.Ed25519:
		return oidEd25519
	}
	return nil
}

var rsaBits = map[hsm.Algorithm]int{hsm.RSA2048: 2048, hsm.RSA3072: 3072, hsm.RSA4096: 4096}

// privateTemplate is what makes a private or secret key stay.
func privateTemplate(spec hsm.Spec, id []byte) []*pkcs11.Attribute {
	return []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, !spec.Ephemeral),
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
		pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true),
		pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, spec.Extractable),
		pkcs11.NewAttribute(pkcs11.CKA_SIGN, spec.Usage != hsm.Agree),
		pkcs11.NewAttribute(pkcs11.CKA_DERIVE, spec.Usage == hsm.Agree),
		pkcs11.NewAttribute(pkcs11.CKA_LABEL, spec.Name),
		pkcs11.NewAttribute(pkcs11.CKA_ID, id),
	}
}

func publicTemplate(spec hsm.Spec, id []byte) []*pkcs11.Attribute {
	return []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, !spec.Ephemeral),
		pkcs11.NewAttribute(pkcs11.CKA_VERIFY, spec.Usage != hsm.Agree),
		pkcs11.NewAttribute(pkcs11.CKA_LABEL, spec.Name),
		pkcs11.NewAttribute(pkcs11.CKA_ID, id),
	}
}

func (s *Store) generate(h pkcs11.SessionHandle, spec hsm.Spec, id []byte) (priv, pub pkcs11.ObjectHandle, err error) {
	if spec.Algorithm == hsm.HMACSHA256 {
		template := append(privateTemplate(spec, id),
			pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_GENERIC_SECRET),
			pkcs11.NewAttribute(pkcs11.CKA_VERIFY, true), pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, 32))
		priv, err = s.mod.ctx.GenerateKey(h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_GENERIC_SECRET_KEY_GEN, nil)}, template)
		return priv, 0, err
	}
	public := publicTemplate(spec, id)
	var mech uint
	if bits, ok := rsaBits[spec.Algorithm]; ok {
		mech = pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN
		public = append(public, pkcs11.NewAttribute(pkcs11.CKA_MODULUS_BITS, bits), pkcs11.NewAttribute(pkcs11.CKA_PUBLIC_EXPONENT, []byte{1, 0, 1}))
	} else {
		mech = pkcs11.CKM_EC_KEY_PAIR_GEN
		if spec.Algorithm == hsm.Ed25519 {
			mech = ckmECEdwardsKeyPairGen
		}
		public = append(public, pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, curveOID(spec.Algorithm)))
	}
	pub, priv, err = s.mod.ctx.GenerateKeyPair(h, []*pkcs11.Mechanism{pkcs11.NewMechanism(mech, nil)}, public, privateTemplate(spec, id))
	return priv, pub, err
}

func (s *Store) importKey(h pkcs11.SessionHandle, spec hsm.Spec, id []byte, secret hsm.Secret) (priv, pub pkcs11.ObjectHandle, err error) {
	if spec.Algorithm == hsm.HMACSHA256 {
		if len(secret) < 16 || len(secret) > 64 {
			return 0, 0, fmt.Errorf("an HMAC key has 16 to 64 octets, not %d", len(secret))
		}
		priv, err = s.mod.ctx.CreateObject(h, append(privateTemplate(spec, id),
			pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_GENERIC_SECRET),
			pkcs11.NewAttribute(pkcs11.CKA_VERIFY, true), pkcs11.NewAttribute(pkcs11.CKA_VALUE, []byte(secret))))
		return priv, 0, err
	}
	parsed, err := x509.ParsePKCS8PrivateKey(secret)
	if err != nil {
		return 0, 0, errors.New("the private key is not PKCS #8")
	}
	private := append(privateTemplate(spec, id), pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY))
	public := append(publicTemplate(spec, id), pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY))
	switch k := parsed.(type) {
	case *ecdsa.PrivateKey:
		oid := curveOID(spec.Algorithm)
		if oid == nil || algorithmOfCurve(k.Curve) != spec.Algorithm {
			return 0, 0, fmt.Errorf("the private key is not of algorithm %s", spec.Algorithm)
		}
		scalar, err := k.Bytes()
		if err != nil {
			return 0, 0, err
		}
		defer clear(scalar)
		uncompressed, err := k.PublicKey.Bytes()
		if err != nil {
			return 0, 0, err
		}
		point, err := asn1.Marshal(uncompressed)
		if err != nil {
			return 0, 0, err
		}
		private = append(private, pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_EC), pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, oid), pkcs11.NewAttribute(pkcs11.CKA_VALUE, scalar))
		public = append(public, pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_EC), pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, oid), pkcs11.NewAttribute(pkcs11.CKA_EC_POINT, point))
	case *rsa.PrivateKey:
		if rsaBits[spec.Algorithm] != k.N.BitLen() || len(k.Primes) != 2 {
			return 0, 0, fmt.Errorf("the private key is not of algorithm %s", spec.Algorithm)
		}
		e := big.NewInt(int64(k.E)).Bytes()
		private = append(private, pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_RSA),
			pkcs11.NewAttribute(pkcs11.CKA_MODULUS, k.N.Bytes()), pkcs11.NewAttribute(pkcs11.CKA_PUBLIC_EXPONENT, e), pkcs11.NewAttribute(pkcs11.CKA_PRIVATE_EXPONENT, k.D.Bytes()),
			pkcs11.NewAttribute(pkcs11.CKA_PRIME_1, k.Primes[0].Bytes()), pkcs11.NewAttribute(pkcs11.CKA_PRIME_2, k.Primes[1].Bytes()),
			pkcs11.NewAttribute(pkcs11.CKA_EXPONENT_1, k.Precomputed.Dp.Bytes()), pkcs11.NewAttribute(pkcs11.CKA_EXPONENT_2, k.Precomputed.Dq.Bytes()),
			pkcs11.NewAttribute(pkcs11.CKA_COEFFICIENT, k.Precomputed.Qinv.Bytes()))
		public = append(public, pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_RSA), pkcs11.NewAttribute(pkcs11.CKA_MODULUS, k.N.Bytes()), pkcs11.NewAttribute(pkcs11.CKA_PUBLIC_EXPONENT, e))
	default:
		return 0, 0, fmt.Errorf("importing %s keys: %w", spec.Algorithm, hsm.ErrUnsupported)
	}
	// The public half first: without its private half nothing is found by name, so a crash between leaves no key.
	if pub, err = s.mod.ctx.CreateObject(h, public); err != nil {
		return 0, 0, err
	}
	if priv, err = s.mod.ctx.CreateObject(h, private); err != nil {
		return 0, 0, errors.Join(err, s.mod.ctx.DestroyObject(h, pub))
	}
	return priv, pub, nil
}

func algorithmOfCurve(c elliptic.Curve) hsm.Algorithm {
	switch c {
	case elliptic.P256():
		return hsm.ECP256
	case elliptic.P384():
		return hsm.ECP384
	}
	return ""
}

// keyFrom makes a Key of fresh handles.
func (s *Store) keyFrom(h pkcs11.SessionHandle, spec hsm.Spec, id []byte, priv, pub pkcs11.ObjectHandle) (hsm.Key, error) {
	if spec.Algorithm == hsm.HMACSHA256 {
		k := &macKey{}
		s.fill(&k.base, spec, pkcs11.CKO_SECRET_KEY, id, priv)
		return k, nil
	}
	public, alg, err := s.publicKey(h, pub)
	if err != nil {
		return nil, err
	}
	if alg != spec.Algorithm {
		return nil, fmt.Errorf("the token made a key of algorithm %s, not %s", alg, spec.Algorithm)
	}
	if spec.Usage == hsm.Agree {
		agree, err := public.(*ecdsa.PublicKey).ECDH()
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
	b.object.Store(&object{s.generation.Load(), handle})
}

// openKey finds a key by name.
func (s *Store) openKey(h pkcs11.SessionHandle, name string) (hsm.Key, error) {
	for _, class := range []uint{pkcs11.CKO_PRIVATE_KEY, pkcs11.CKO_SECRET_KEY} {
		found, err := s.find(h, pkcs11.NewAttribute(pkcs11.CKA_CLASS, class), pkcs11.NewAttribute(pkcs11.CKA_LABEL, name), pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true))
		if err != nil {
			return nil, err
		}
		switch len(found) {
		case 0:
			continue
		case 1:
			return s.openObject(h, name, class, found[0], nil)
		}
		return nil, fmt.Errorf("%d keys on the token have that name: rename or delete all but one", len(found))
	}
	return nil, hsm.ErrNotFound
}

func (s *Store) attribute(h pkcs11.SessionHandle, o pkcs11.ObjectHandle, typ uint) ([]byte, error) {
	got, err := s.mod.ctx.GetAttributeValue(h, o, []*pkcs11.Attribute{pkcs11.NewAttribute(typ, nil)})
	if err != nil {
		return nil, err
	}
	return got[0].Value, nil
}

// publicIndex finds public key objects by name and ID.
type publicIndex map[string][]pkcs11.ObjectHandle

func indexKey(label, id []byte) string { return string(label) + "\x00" + string(id) }

// indexPublics reads every public key object's name and ID, for those who would search for each otherwise.
func (s *Store) indexPublics(h pkcs11.SessionHandle) (publicIndex, error) {
	handles, err := s.find(h, pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY), pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true))
	if err != nil {
		return nil, err
	}
	index := make(publicIndex, len(handles))
	for _, o := range handles {
		got, err := s.mod.ctx.GetAttributeValue(h, o, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_LABEL, nil), pkcs11.NewAttribute(pkcs11.CKA_ID, nil)})
		if err != nil {
			return nil, err
		}
		k := indexKey(got[0].Value, got[1].Value)
		index[k] = append(index[k], o)
	}
	return index, nil
}

// openObject makes a Key of a private or secret key object. The index may be nil: then its public half is searched for.
func (s *Store) openObject(h pkcs11.SessionHandle, name string, class uint, o pkcs11.ObjectHandle, index publicIndex) (hsm.Key, error) {
	id, err := s.attribute(h, o, pkcs11.CKA_ID)
	if err != nil {
		return nil, err
	}
	spec := hsm.Spec{Name: name}
	if class == pkcs11.CKO_SECRET_KEY {
		if sign, err := s.attribute(h, o, pkcs11.CKA_SIGN); err != nil || len(sign) != 1 || sign[0] != 1 {
			return nil, fmt.Errorf("a secret key that does not sign: %w", errors.Join(hsm.ErrUnsupported, err))
		}
		spec.Algorithm, spec.Usage = hsm.HMACSHA256, hsm.MAC
		return s.keyFrom(h, spec, id, o, 0)
	}
	sign, err := s.attribute(h, o, pkcs11.CKA_SIGN)
	if err != nil {
		return nil, err
	}
	spec.Usage = hsm.Sign
	if len(sign) != 1 || sign[0] != 1 {
		spec.Usage = hsm.Agree
	}
	publics := index[indexKey([]byte(name), id)]
	if index == nil {
		publics, err = s.find(h, pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY), pkcs11.NewAttribute(pkcs11.CKA_ID, id), pkcs11.NewAttribute(pkcs11.CKA_LABEL, name))
		if err != nil {
			return nil, err
		}
	}
	if len(publics) != 1 {
		return nil, fmt.Errorf("%d public keys belong to it, want one: %w", len(publics), hsm.ErrUnsupported)
	}
	if _, spec.Algorithm, err = s.publicKey(h, publics[0]); err != nil {
		return nil, err
	}
	return s.keyFrom(h, spec, id, o, publics[0])
}

// publicKey reads a public key object.
func (s *Store) publicKey(h pkcs11.SessionHandle, o pkcs11.ObjectHandle) (crypto.PublicKey, hsm.Algorithm, error) {
	kt, err := s.attribute(h, o, pkcs11.CKA_KEY_TYPE)
	if err != nil {
		return nil, "", err
	}
	if bytes.Equal(kt, pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_RSA).Value) {
		n, err := s.attribute(h, o, pkcs11.CKA_MODULUS)
		if err != nil {
			return nil, "", err
		}
		e, err := s.attribute(h, o, pkcs11.CKA_PUBLIC_EXPONENT)
		if err != nil {
			return nil, "", err
		}
		pub := &rsa.PublicKey{N: new(big.Int).SetBytes(n), E: int(new(big.Int).SetBytes(e).Int64())}
		for alg, bits := range rsaBits {
			if pub.N.BitLen() == bits && pub.E > 2 {
				return pub, alg, nil
			}
		}
		return nil, "", fmt.Errorf("RSA with %d bits: %w", pub.N.BitLen(), hsm.ErrUnsupported)
	}
	params, err := s.attribute(h, o, pkcs11.CKA_EC_PARAMS)
	if err != nil {
		return nil, "", fmt.Errorf("%w: %w", hsm.ErrUnsupported, err)
	}
	point, err := s.attribute(h, o, pkcs11.CKA_EC_POINT)
	if err != nil {
		return nil, "", err
	}
	// An OCTET STRING by the standard; some tokens give the bare point.
	var raw []byte
	if rest, err := asn1.Unmarshal(point, &raw); err == nil && len(rest) == 0 {
		point = raw
	}
	if bytes.Equal(params, oidEd25519) || bytes.Equal(params, ed25519Name) {
		if len(point) != ed25519.PublicKeySize {
			return nil, "", fmt.Errorf("Ed25519 public key of %d octets", len(point))
		}
		return ed25519.PublicKey(point), hsm.Ed25519, nil
	}
	for alg, curve := range map[hsm.Algorithm]elliptic.Curve{hsm.ECP256: elliptic.P256(), hsm.ECP384: elliptic.P384()} {
		if bytes.Equal(params, curveOID(alg)) {
			pub, err := ecdsa.ParseUncompressedPublicKey(curve, point)
			return pub, alg, err
		}
	}
	return nil, "", fmt.Errorf("curve %x: %w", params, hsm.ErrUnsupported)
}
