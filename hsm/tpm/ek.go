package tpm

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/tpm/residency"
)

// Where the TCG has what belongs to endorsement keys (EK Credential Profile 2.5, 2.2.1.4; Registry of Reserved TPM 2.0 Handles).
const (
	nvRSACertificate = tpm2.TPMHandle(0x01c00002)
	nvRSATemplate    = tpm2.TPMHandle(0x01c00004)
	nvECCCertificate = tpm2.TPMHandle(0x01c0000a)
	nvECCTemplate    = tpm2.TPMHandle(0x01c0000c)
	// Certificates of the chain, where the manufacturer puts them into the TPM ("on die").
	nvChainFirst = tpm2.TPMHandle(0x01c00100)
	nvChainLast  = tpm2.TPMHandle(0x01c001ff)
)

// persistentEKs are where firmware and device SDKs leave an EK.
var persistentEKs = []tpm2.TPMHandle{0x81010001, 0x81010002}

// EKType is a kind of endorsement key.
type EKType string

// The kinds of endorsement keys. DPS takes RSA.
const (
	EKRSA EKType = "RSA-2048"
	EKECC EKType = "EC-P256"
)

// An EK is an endorsement key: the one key that stands for a TPM.
type EK struct {
	Type EKType
	// Public is the whole TPM2B_PUBLIC.
	Public []byte
	// Handle is the persistent handle that it was found at; 0 when it was made from its template.
	Handle uint32
	// Certificates are the EK's certificate, as it lies in NV less what is behind it, and those of its chain that the TPM
	// holds, in DER; none where the manufacturer left none. Untrusted: see residency.Makers.
	Certificates [][]byte

	object *object
	public tpm2.TPMTPublic
}

// RegistrationID returns the registration ID that device SDKs derive from the EK.
func (e *EK) RegistrationID() string { return residency.RegistrationID(e.Public) }

// EK returns an endorsement key: the persistent one that is there already, or else the one that the TCG's default template
// makes, or the template that the manufacturer left in NV (EK Credential Profile 2.5, B.3.3 and B.3.4). The error is
// hsm.ErrUnsupported when the TPM does not have the kind.
func (s *Store) EK(ctx context.Context, kind EKType) (*EK, error) {
	e := &EK{Type: kind}
	template, certificate, nvTemplate := tpm2.RSAEKTemplate, nvRSACertificate, nvRSATemplate
	switch kind {
	case EKRSA:
	case EKECC:
		template, certificate, nvTemplate = tpm2.ECCEKTemplate, nvECCCertificate, nvECCTemplate
	default:
		return nil, fmt.Errorf("endorsement key of type %q: want %s or %s", kind, EKRSA, EKECC)
	}
	err := s.do(ctx, "reading the endorsement key", func(b *bus) error {
		e.object, e.Handle, e.Certificates = nil, 0, nil
		for _, h := range persistentEKs {
			rsp, err := b.readPublic(h)
			if errors.Is(err, tpm2.TPMRCHandle) {
				continue
			}
			if err != nil {
				return err
			}
			public, err := rsp.OutPublic.Contents()
			if err != nil {
				return err
			}
			if public.Type == template.Type && public.ObjectAttributes.Restricted && public.ObjectAttributes.Decrypt && public.ObjectAttributes.FixedTPM {
				e.object, e.public, e.Handle = &object{persistent: h, name: rsp.Name}, *public, uint32(h)
				break
			}
		}
		if e.object == nil {
			if text, err := s.readNV(b, nvTemplate); err == nil {
				t, err := tpm2.Unmarshal[tpm2.TPMTPublic](text)
				if err != nil {
					return fmt.Errorf("the template at 0x%08x: %w", uint32(nvTemplate), err)
				}
				template = *t
			} else if !errors.Is(err, hsm.ErrNotFound) && !errors.Is(err, tpm2.TPMRCNVUninitialized) {
				return err
			}
			o := &object{keep: true}
			o.load = func(b *bus) (tpm2.TPMHandle, error) {
				return s.makePrimary(b, o, tpm2.TPMRHEndorsement, template, &e.public)
			}
			if _, err := b.use(o); err != nil {
				return err
			}
			b.unpin(o)
			e.object = o
		}
		e.Public = residency.MarshalPublic(e.public)
		text, err := s.readNV(b, certificate)
		if errors.Is(err, hsm.ErrNotFound) || errors.Is(err, tpm2.TPMRCNVUninitialized) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("its certificate: %w", err)
		}
		der, err := residency.TrimCertificate(text)
		if err != nil {
			return fmt.Errorf("its certificate at 0x%08x: %w", uint32(certificate), err)
		}
		e.Certificates = [][]byte{der}
		return s.readChain(b, e)
	})
	if refusesParameters(err) {
		err = fmt.Errorf("%w: %w", hsm.ErrUnsupported, err)
	}
	if err != nil {
		return nil, err
	}
	return e, nil
}

// readChain reads the intermediate certificates that some TPMs hold: one after another, over as many indices as they need.
func (s *Store) readChain(b *bus, e *EK) error {
	handles, err := b.handles(nvChainFirst)
	if err != nil {
		return err
	}
	var all []byte
	for _, h := range handles {
		if h > nvChainLast || len(all) > 64<<10 {
			break
		}
		part, err := s.readNV(b, h)
		if err != nil {
			return fmt.Errorf("its chain at 0x%08x: %w", uint32(h), err)
		}
		all = append(all, part...)
	}
	for len(all) > 0 && len(e.Certificates) < 8 {
		der, err := residency.TrimCertificate(all)
		if err != nil {
			break // zeros, or another vendor's idea of what belongs there
		}
		e.Certificates = append(e.Certificates, bytes.Clone(der))
		all = all[len(der):]
	}
	return nil
}

// makePrimary makes a primary key of a hierarchy, and sees to it that it is the same one each time.
func (s *Store) makePrimary(b *bus, o *object, hierarchy tpm2.TPMHandle, template tpm2.TPMTPublic, public *tpm2.TPMTPublic) (tpm2.TPMHandle, error) {
	auth, err := s.hierarchy(b, hierarchy)
	if err != nil {
		return 0, err
	}
	rsp, err := tpm2.CreatePrimary{PrimaryHandle: auth, InPublic: tpm2.New2B(template)}.Execute(b)
	if err != nil {
		return 0, err
	}
	p, err := rsp.OutPublic.Contents()
	if err != nil {
		return 0, errors.Join(err, b.flush(rsp.ObjectHandle))
	}
	if len(o.name.Buffer) == 0 {
		o.name, *public = rsp.Name, *p
	} else if !sameName(o.name, rsp.Name) {
		return 0, errors.Join(errors.New("the primary key is another than before: the TPM was cleared, or is another TPM"), b.flush(rsp.ObjectHandle))
	}
	return rsp.ObjectHandle, nil
}

// SRK returns the whole TPM2B_PUBLIC of the storage root key that keys are made under, and its persistent handle, or 0 when it
// is the owner's primary. The error says why there is none.
func (s *Store) SRK() (public []byte, handle uint32, err error) {
	if s.noParent != nil {
		return nil, 0, s.noParent
	}
	return residency.MarshalPublic(s.parent.public), uint32(s.parent.persistent), nil
}
