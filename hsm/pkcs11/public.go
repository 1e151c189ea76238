//go:build cgo

package pkcs11

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"encoding/asn1"
	"encoding/binary"
	"errors"
	"fmt"
	"math/big"

	"github.com/miekg/pkcs11"

	"github.com/touchmark/touchmark/hsm"
)

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

// flag reads a CK_BBOOL.
func (s *Store) flag(h pkcs11.SessionHandle, o pkcs11.ObjectHandle, typ uint) (bool, error) {
	v, err := s.attribute(h, o, typ)
	return len(v) == 1 && v[0] != 0, err
}

// number reads a CK_ULONG.
func (s *Store) number(h pkcs11.SessionHandle, o pkcs11.ObjectHandle, typ uint) (uint, error) {
	v, err := s.attribute(h, o, typ)
	if err != nil {
		return 0, err
	}
	if len(v) != 8 && len(v) != 4 {
		return 0, fmt.Errorf("the token answers a number of %d octets", len(v))
	}
	if len(v) == 4 {
		return uint(binary.NativeEndian.Uint32(v)), nil
	}
	return uint(binary.NativeEndian.Uint64(v)), nil
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
		s.mod.beat()
	}
	return index, nil
}

// openObject makes a Key of a private or secret key object. The index may be nil: then its public half is searched for.
func (s *Store) openObject(h pkcs11.SessionHandle, name string, class uint, o pkcs11.ObjectHandle, index publicIndex) (hsm.Key, error) {
	id, err := s.attribute(h, o, pkcs11.CKA_ID)
	if err != nil && !is(err, pkcs11.CKR_ATTRIBUTE_TYPE_INVALID) {
		return nil, err
	}
	spec := hsm.Spec{Name: name}
	signs, err := s.flag(h, o, pkcs11.CKA_SIGN)
	if err != nil {
		return nil, err
	}
	if class == pkcs11.CKO_SECRET_KEY {
		keyType, err := s.number(h, o, pkcs11.CKA_KEY_TYPE)
		if err != nil {
			return nil, err
		}
		wraps, err := s.flag(h, o, pkcs11.CKA_WRAP)
		if err != nil {
			return nil, err
		}
		switch {
		case signs && (keyType == pkcs11.CKK_GENERIC_SECRET || keyType == pkcs11.CKK_SHA256_HMAC):
			spec.Algorithm, spec.Usage = hsm.HMACSHA256, hsm.MAC
		case wraps && keyType == pkcs11.CKK_AES:
			size, err := s.number(h, o, pkcs11.CKA_VALUE_LEN)
			if err != nil {
				return nil, err
			}
			if size != 32 && size != 0 { // SoftHSM 2.6 says 0 of a key that was unwrapped
				return nil, fmt.Errorf("an AES key of %d octets: %w", size, hsm.ErrUnsupported)
			}
			spec.Algorithm, spec.Usage = hsm.AES256, hsm.Wrap
		default:
			return nil, fmt.Errorf("a secret key that neither authenticates nor wraps: %w", hsm.ErrUnsupported)
		}
		return s.keyFrom(spec, id, o, nil)
	}
	spec.Usage = hsm.Sign
	if !signs {
		spec.Usage = hsm.Agree
	}
	public, err := s.publicHalf(h, name, id, o, index)
	if err != nil {
		return nil, err
	}
	spec.Algorithm = algorithmOf(public)
	return s.keyFrom(spec, id, o, public)
}

// publicKey reads a public key from an object that has its attributes.
func (s *Store) publicKey(h pkcs11.SessionHandle, o pkcs11.ObjectHandle) (crypto.PublicKey, error) {
	keyType, err := s.number(h, o, pkcs11.CKA_KEY_TYPE)
	if err != nil {
		return nil, err
	}
	if keyType == pkcs11.CKK_RSA {
		n, err := s.attribute(h, o, pkcs11.CKA_MODULUS)
		if err != nil {
			return nil, err
		}
		e, err := s.attribute(h, o, pkcs11.CKA_PUBLIC_EXPONENT)
		if err != nil {
			return nil, err
		}
		pub := &rsa.PublicKey{N: new(big.Int).SetBytes(n), E: int(new(big.Int).SetBytes(e).Int64())}
		if algorithmOf(pub) == "" {
			return nil, fmt.Errorf("RSA with %d bits: %w", pub.N.BitLen(), hsm.ErrUnsupported)
		}
		return pub, nil
	}
	return s.pointKey(h, o)
}

// pointKey reads the public key of an object that is on a curve, in one call.
func (s *Store) pointKey(h pkcs11.SessionHandle, o pkcs11.ObjectHandle) (crypto.PublicKey, error) {
	got, err := s.mod.ctx.GetAttributeValue(h, o, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, nil), pkcs11.NewAttribute(pkcs11.CKA_EC_POINT, nil)})
	if is(err, pkcs11.CKR_ATTRIBUTE_TYPE_INVALID, pkcs11.CKR_ATTRIBUTE_VALUE_INVALID) {
		err = fmt.Errorf("%w: %w", hsm.ErrUnsupported, err)
	}
	if err != nil {
		return nil, err
	}
	return parsePoint(got[0].Value, got[1].Value)
}

// parsePoint reads CKA_EC_PARAMS and CKA_EC_POINT.
func parsePoint(params, point []byte) (crypto.PublicKey, error) {
	// An OCTET STRING by the standard; some tokens give the bare point. One in 256 bare points looks like an OCTET STRING too:
	// both begin with 4.
	bare := point
	if rest, err := asn1.Unmarshal(bare, &point); err != nil || len(rest) > 0 {
		point = bare
	}
	if bytes.Equal(params, oidEd25519) || bytes.Equal(params, ed25519Name) {
		if len(bare) == ed25519.PublicKeySize {
			point = bare
		}
		if len(point) != ed25519.PublicKeySize {
			return nil, fmt.Errorf("Ed25519 public key of %d octets", len(point))
		}
		return ed25519.PublicKey(point), nil
	}
	for alg, curve := range map[hsm.Algorithm]elliptic.Curve{hsm.ECP256: elliptic.P256(), hsm.ECP384: elliptic.P384(), hsm.ECP521: elliptic.P521()} {
		if !bytes.Equal(params, curveOID(alg)) {
			continue
		}
		pub, err := curvePoint(curve, point)
		if err != nil {
			pub, err = curvePoint(curve, bare)
		}
		if err != nil {
			return nil, fmt.Errorf("the token's public key of algorithm %s: %w", alg, err)
		}
		return pub, nil
	}
	return nil, fmt.Errorf("curve %x: %w", params, hsm.ErrUnsupported)
}

// curvePoint reads a point in the forms that tokens give it in: uncompressed, compressed, and uncompressed with coordinates
// that lost their leading zeros.
func curvePoint(curve elliptic.Curve, point []byte) (*ecdsa.PublicKey, error) {
	size := (curve.Params().BitSize + 7) / 8
	if len(point) > 0 && (point[0] == 2 || point[0] == 3) {
		x, y := elliptic.UnmarshalCompressed(curve, point)
		if x == nil {
			return nil, errors.New("the public key's point is not on its curve")
		}
		return ecdsa.ParseUncompressedPublicKey(curve, uncompressed(size, x.Bytes(), y.Bytes()))
	}
	if len(point) > 0 && point[0] == 4 && len(point) < 1+2*size {
		// Where the first ends is not said; only one place gives a point on the curve.
		xy := point[1:]
		for i := max(0, len(xy)-size); i <= min(size, len(xy)); i++ {
			if pub, err := ecdsa.ParseUncompressedPublicKey(curve, uncompressed(size, xy[:i], xy[i:])); err == nil {
				return pub, nil
			}
		}
	}
	return ecdsa.ParseUncompressedPublicKey(curve, point)
}
