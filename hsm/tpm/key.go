package tpm

import (
	"context"
	"crypto"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/rsa"
	"encoding/asn1"
	"errors"
	"fmt"
	"io"
	"math/big"

	"github.com/google/go-tpm/tpm2"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/tpm/residency"
)

// base is what every key of a TPM has.
type base struct {
	store  *Store
	name   string
	alg    hsm.Algorithm
	usage  hsm.Usage
	public tpm2.TPMTPublic
	object object
	auth   bool // has an authorization value
}

// tpmKeyLike is a key of this package.
type tpmKeyLike interface {
	hsm.Key
	common() *base
}

func (k *base) common() *base            { return k }
func (k *base) Name() string             { return k.name }
func (k *base) Algorithm() hsm.Algorithm { return k.alg }
func (k *base) Usage() hsm.Usage         { return k.usage }
func (k *base) URI() string              { return k.store.cfg.URI.WithObject(k.name).String() }

// kind makes the key what its public area says it is.
func (k *base) kind() (_ tpmKeyLike, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("key %q: %w", k.name, err)
		}
	}()
	if k.alg, k.usage, err = algorithmOf(&k.public); err != nil {
		return nil, err
	}
	if k.usage == hsm.MAC {
		return &macKey{k}, nil
	}
	pub, err := residency.PublicKey(&k.public)
	if err != nil {
		return nil, err
	}
	if k.usage == hsm.Sign {
		return &signingKey{k, pub}, nil
	}
	agree, err := pub.(*ecdsa.PublicKey).ECDH()
	if err != nil {
		return nil, err
	}
	return &agreementKey{k, agree}, nil
}

// Attributes loads the key and reads its public area back from the TPM. A key is local and was never extractable when the TPM
// made it (sensitiveDataOrigin) and it can never leave (fixedTPM); one that could be duplicated at all needs a policy for it.
func (k *base) Attributes(ctx context.Context) (hsm.Attributes, error) {
	var attr hsm.Attributes
	err := k.do(ctx, "reading the attributes of key", func(b *bus) error {
		h, err := b.use(&k.object)
		if err != nil {
			return err
		}
		rsp, err := tpm2.ReadPublic{ObjectHandle: h}.Execute(b)
		if err != nil {
			return err
		}
		if !sameName(rsp.Name, k.object.name) {
			return fmt.Errorf("another key is there than was opened: %w", hsm.ErrNotFound)
		}
		p, err := rsp.OutPublic.Contents()
		if err != nil {
			return err
		}
		a := p.ObjectAttributes
		here := a.FixedTPM && a.SensitiveDataOrigin
		attr = hsm.Attributes{
			Sensitive: true, Hardware: true, Local: here, AlwaysSensitive: here, NeverExtractable: here,
			Extractable: !a.FixedTPM && len(p.AuthPolicy.Buffer) > 0,
		}
		return nil
	})
	return attr, err
}

func (k *base) do(ctx context.Context, op string, f func(*bus) error) error {
	return k.store.do(ctx, fmt.Sprintf("%s %q", op, k.name), f)
}

// with loads the key and runs f with what authorizes its use. What is secret in f's response is encrypted by the session that
// extra gives.
func (k *base) with(ctx context.Context, op string, dir direction, f func(b *bus, key tpm2.AuthHandle, extra []tpm2.Session) error) error {
	var auth hsm.Secret
	if k.auth {
		var err error
		if auth, err = k.store.authValue(ctx); err != nil {
			return err
		}
	}
	return k.store.remember(k.do(ctx, op, func(b *bus) error {
		key := tpm2.AuthHandle{Name: k.object.name, Auth: tpm2.PasswordAuth(nil)}
		var extra []tpm2.Session
		if dir != plain || len(auth) > 0 {
			session, err := b.session(k.store, auth, dir)
			if err != nil {
				return err
			}
			if len(auth) > 0 {
				key.Auth = session
			} else {
				extra = append(extra, session)
			}
		}
		var err error
		if key.Handle, err = b.use(&k.object); err != nil {
			return err
		}
		return f(b, key, extra)
	}))
}

type signingKey struct {
	*base
	pub crypto.PublicKey
}

func (k *signingKey) Public() crypto.PublicKey { return k.pub }

var hashes = map[crypto.Hash]tpm2.TPMIAlgHash{
	crypto.SHA1: tpm2.TPMAlgSHA1, crypto.SHA256: tpm2.TPMAlgSHA256, crypto.SHA384: tpm2.TPMAlgSHA384, crypto.SHA512: tpm2.TPMAlgSHA512,
}

// Sign implements [crypto.Signer]. The TPM has its own randomness, and chooses the salt of PSS: options that ask for a length
// that it does not give are hsm.ErrUnsupported.
func (k *signingKey) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	hash := opts.HashFunc()
	alg, ok := hashes[hash]
	if !ok {
		return nil, fmt.Errorf("signing with key %q: hash %v: %w", k.name, hash, hsm.ErrUnsupported)
	}
	if len(digest) != hash.Size() {
		return nil, fmt.Errorf("signing with key %q: a digest of %s has %d octets, not %d", k.name, hash, hash.Size(), len(digest))
	}
	pss, isPSS := opts.(*rsa.PSSOptions)
	var scheme tpm2.TPMTSigScheme
	pub, isRSA := k.pub.(*rsa.PublicKey)
	switch {
	case !isRSA:
		scheme = tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgECDSA, Details: tpm2.NewTPMUSigScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSchemeHash{HashAlg: alg})}
	case isPSS:
		scheme = tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgRSAPSS, Details: tpm2.NewTPMUSigScheme(tpm2.TPMAlgRSAPSS, &tpm2.TPMSSchemeHash{HashAlg: alg})}
	default:
		scheme = tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgRSASSA, Details: tpm2.NewTPMUSigScheme(tpm2.TPMAlgRSASSA, &tpm2.TPMSSchemeHash{HashAlg: alg})}
	}
	var sig []byte
	err := k.with(context.Background(), "signing with key", plain, func(b *bus, key tpm2.AuthHandle, _ []tpm2.Session) error {
		rsp, err := tpm2.Sign{
			KeyHandle: key, Digest: tpm2.TPM2BDigest{Buffer: digest}, InScheme: scheme,
			// No ticket: the key is not restricted (Part 3, 20.2).
			Validation: tpm2.TPMTTKHashCheck{Tag: tpm2.TPMSTHashCheck, Hierarchy: tpm2.TPMRHNull},
		}.Execute(b)
		if err != nil {
			return err
		}
		sig, err = signature(&rsp.Signature)
		return err
	})
	if err != nil {
		if refusesParameters(err) {
			err = fmt.Errorf("%w: %w", hsm.ErrUnsupported, err)
		}
		return nil, err
	}
	if isPSS && pss.SaltLength != rsa.PSSSaltLengthAuto {
		if err := rsa.VerifyPSS(pub, hash, digest, sig, pss); err != nil {
			return nil, fmt.Errorf("signing with key %q: this TPM makes PSS signatures with a salt of another length: %w", k.name, hsm.ErrUnsupported)
		}
	}
	return sig, nil
}

// signature returns a TPM's signature in the form of crypto.Signer.
func signature(s *tpm2.TPMTSignature) ([]byte, error) {
	switch s.SigAlg {
	case tpm2.TPMAlgECDSA:
		rs, err := s.Signature.ECDSA()
		if err != nil {
			return nil, err
		}
		return asn1.Marshal(struct{ R, S *big.Int }{new(big.Int).SetBytes(rs.SignatureR.Buffer), new(big.Int).SetBytes(rs.SignatureS.Buffer)})
	case tpm2.TPMAlgRSASSA:
		r, err := s.Signature.RSASSA()
		if err != nil {
			return nil, err
		}
		return r.Sig.Buffer, nil
	case tpm2.TPMAlgRSAPSS:
		r, err := s.Signature.RSAPSS()
		if err != nil {
			return nil, err
		}
		return r.Sig.Buffer, nil
	}
	return nil, fmt.Errorf("signature of scheme %v: %w", s.SigAlg, hsm.ErrUnsupported)
}

type macKey struct{ *base }

// MAC implements [hsm.MACKey]. What is longer than the TPM's input buffer goes in as a sequence (Part 3, 17.2, 17.5 and 17.6). The
// result may be a device's key, and comes out encrypted.
func (k *macKey) MAC(ctx context.Context, dst, data []byte) ([]byte, error) {
	err := k.with(ctx, "computing an HMAC with key", out, func(b *bus, key tpm2.AuthHandle, extra []tpm2.Session) error {
		if len(data) <= b.d.inputBuffer {
			rsp, err := tpm2.Hmac{Handle: key, Buffer: tpm2.TPM2BMaxBuffer{Buffer: data}, HashAlg: tpm2.TPMAlgSHA256}.Execute(b, extra...)
			if err != nil {
				return err
			}
			dst = append(dst, rsp.OutHMAC.Buffer...)
			return nil
		}
		session := key.Auth
		if len(extra) > 0 {
			session = extra[0]
		}
		return b.transient(func() (tpm2.TPMHandle, error) {
			start := key
			if k.auth { // the response holds nothing to encrypt
				auth, err := k.store.authValue(ctx)
				if err != nil {
					return 0, err
				}
				if start.Auth, err = b.session(k.store, auth, plain); err != nil {
					return 0, err
				}
			}
			rsp, err := tpm2.HmacStart{Handle: start, HashAlg: tpm2.TPMAlgSHA256}.Execute(b)
			if err != nil {
				return 0, err
			}
			return rsp.SequenceHandle, nil
		}, func(h tpm2.TPMHandle) error {
			sequence := tpm2.AuthHandle{Handle: h, Auth: tpm2.PasswordAuth(nil)}
			rest := data
			for len(rest) > b.d.inputBuffer {
				if _, err := (tpm2.SequenceUpdate{SequenceHandle: sequence, Buffer: tpm2.TPM2BMaxBuffer{Buffer: rest[:b.d.inputBuffer]}}).Execute(b); err != nil {
					return err
				}
				rest = rest[b.d.inputBuffer:]
			}
			if k.auth { // its authorization value is not the sequence's
				var err error
				if session, err = b.session(k.store, nil, out); err != nil {
					return err
				}
			}
			rsp, err := tpm2.SequenceComplete{SequenceHandle: sequence, Buffer: tpm2.TPM2BMaxBuffer{Buffer: rest}, Hierarchy: tpm2.TPMRHNull}.Execute(b, session)
			if err != nil {
				return err
			}
			dst = append(dst, rsp.Result.Buffer...)
			return nil
		})
	})
	if err != nil {
		return nil, err
	}
	return dst, nil
}

type agreementKey struct {
	*base
	pub *ecdh.PublicKey
}

// PublicKey implements [ecdh.KeyExchanger].
func (k *agreementKey) PublicKey() *ecdh.PublicKey { return k.pub }

// Curve implements [ecdh.KeyExchanger].
func (k *agreementKey) Curve() ecdh.Curve { return k.pub.Curve() }

// ECDH implements [ecdh.KeyExchanger] (TPM2_ECDH_ZGen: Part 3, 14.5). The shared secret comes out encrypted.
func (k *agreementKey) ECDH(peer *ecdh.PublicKey) ([]byte, error) {
	if peer.Curve() != k.pub.Curve() {
		return nil, fmt.Errorf("agreeing with key %q: the other key is on another curve", k.name)
	}
	point := peer.Bytes()
	n := len(point) / 2
	z := make([]byte, n)
	err := k.with(context.Background(), "agreeing with key", out, func(b *bus, key tpm2.AuthHandle, extra []tpm2.Session) error {
		rsp, err := tpm2.ECDHZGen{KeyHandle: key, InPoint: tpm2.New2B(tpm2.TPMSECCPoint{
			X: tpm2.TPM2BECCParameter{Buffer: point[1 : 1+n]}, Y: tpm2.TPM2BECCParameter{Buffer: point[1+n:]},
		})}.Execute(b, extra...)
		if err != nil {
			return err
		}
		p, err := rsp.OutPoint.Contents()
		if err != nil {
			return err
		}
		if len(p.X.Buffer) > n {
			return errors.New("the TPM's shared secret is too long")
		}
		copy(z[n-len(p.X.Buffer):], p.X.Buffer) // a TPM may leave out leading zeros
		return nil
	})
	if err != nil {
		return nil, err
	}
	return z, nil
}

var (
	_ hsm.Store        = (*Store)(nil)
	_ hsm.Lister       = (*Store)(nil)
	_ hsm.SigningKey   = (*signingKey)(nil)
	_ hsm.MACKey       = (*macKey)(nil)
	_ hsm.AgreementKey = (*agreementKey)(nil)
)
