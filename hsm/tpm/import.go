package tpm

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"

	"github.com/touchmark/touchmark/hsm"
)

// Import implements [hsm.Store]. What comes from elsewhere is wrapped for the SRK, or goes in inside an encrypted session.
func (s *Store) Import(ctx context.Context, spec hsm.Spec, secret hsm.Secret) (hsm.Key, error) {
	spec, auth, err := s.begin(ctx, spec)
	if err != nil {
		return nil, err
	}
	public, err := template(spec)
	if err != nil {
		return nil, err
	}
	public.ObjectAttributes.SensitiveDataOrigin = false
	if spec.Algorithm == hsm.HMACSHA256 {
		if len(secret) < 16 || len(secret) > 64 {
			return nil, fmt.Errorf("importing key %q: an HMAC key has 16 to 64 octets, not %d", spec.Name, len(secret))
		}
		return s.create(ctx, spec, tpm2.Marshal(public), auth, secret)
	}
	// A TPM makes asymmetric keys itself; those from elsewhere come as if another TPM had duplicated them, without a policy that
	// would let them go on (Part 3, 13.3).
	public.ObjectAttributes.FixedTPM, public.ObjectAttributes.FixedParent = false, false
	sensitive, err := sensitiveOf(spec, &public, secret)
	if err != nil {
		return nil, fmt.Errorf("importing key %q: %w", spec.Name, err)
	}
	sensitive.AuthValue = tpm2.TPM2BAuth{Buffer: auth}
	name, err := tpm2.ObjectName(&public)
	if err != nil {
		return nil, err
	}
	wrapper, err := tpm2.ImportEncapsulationKey(&s.parent.public)
	if err != nil {
		return nil, err
	}
	open := hsm.Secret(tpm2.Marshal(*sensitive))
	defer open.Wipe()
	duplicate, seed, err := tpm2.CreateDuplicate(rand.Reader, wrapper, name.Buffer, open)
	if err != nil {
		return nil, err
	}
	blob := &Blob{EmptyAuth: len(auth) == 0, Parent: s.parent.handle, Public: public}
	err = s.do(ctx, fmt.Sprintf("importing key %q", spec.Name), func(b *bus) error {
		h, err := b.use(&s.parent.object)
		if err != nil {
			return err
		}
		return b.roomFor(1, func() error {
			rsp, err := tpm2.Import{
				ParentHandle: tpm2.AuthHandle{Handle: h, Name: s.parent.name, Auth: tpm2.PasswordAuth(nil)},
				ObjectPublic: tpm2.New2B(public),
				Duplicate:    tpm2.TPM2BPrivate{Buffer: duplicate},
				InSymSeed:    tpm2.TPM2BEncryptedSecret{Buffer: seed},
				Symmetric:    tpm2.TPMTSymDef{Algorithm: tpm2.TPMAlgNull},
			}.Execute(b)
			if err != nil {
				return err
			}
			blob.Private = rsp.OutPrivate.Buffer
			return nil
		})
	})
	if err != nil {
		if refusesParameters(err) {
			err = fmt.Errorf("%w: %w", hsm.ErrUnsupported, err)
		}
		return nil, err
	}
	return s.keep(ctx, spec, blob)
}

// sensitiveOf reads a PKCS #8 document as the sensitive area of a key (Part 2, 12.3.2), and puts the public half into public.
func sensitiveOf(spec hsm.Spec, public *tpm2.TPMTPublic, secret hsm.Secret) (*tpm2.TPMTSensitive, error) {
	priv, err := x509.ParsePKCS8PrivateKey(secret)
	if err != nil {
		return nil, errors.New("the private key is not PKCS #8")
	}
	switch k := priv.(type) {
	case *ecdsa.PrivateKey:
		curve := map[hsm.Algorithm]elliptic.Curve{hsm.ECP256: elliptic.P256(), hsm.ECP384: elliptic.P384()}[spec.Algorithm]
		if k.Curve != curve {
			break
		}
		d, err := k.Bytes()
		if err != nil {
			return nil, err
		}
		point, err := k.PublicKey.Bytes()
		if err != nil {
			return nil, err
		}
		n := len(point) / 2
		public.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
			X: tpm2.TPM2BECCParameter{Buffer: point[1 : 1+n]}, Y: tpm2.TPM2BECCParameter{Buffer: point[1+n:]},
		})
		return &tpm2.TPMTSensitive{
			SensitiveType: tpm2.TPMAlgECC,
			Sensitive:     tpm2.NewTPMUSensitiveComposite(tpm2.TPMAlgECC, &tpm2.TPM2BECCParameter{Buffer: d}),
		}, nil
	case *rsa.PrivateKey:
		if spec.Algorithm != rsaAlgorithm(k.N.BitLen()) || k.E != 65537 || len(k.Primes) != 2 {
			break
		}
		public.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{Buffer: k.N.Bytes()})
		return &tpm2.TPMTSensitive{
			SensitiveType: tpm2.TPMAlgRSA,
			Sensitive:     tpm2.NewTPMUSensitiveComposite(tpm2.TPMAlgRSA, &tpm2.TPM2BPrivateKeyRSA{Buffer: k.Primes[0].Bytes()}),
		}, nil
	}
	return nil, fmt.Errorf("the private key is not of algorithm %s", spec.Algorithm)
}
