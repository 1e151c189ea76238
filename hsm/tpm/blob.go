package tpm

import (
	"bytes"
	"crypto/sha256"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"
	"golang.org/x/crypto/cryptobyte"
	casn1 "golang.org/x/crypto/cryptobyte/asn1"

	"github.com/touchmark/touchmark/hsm/tpm/residency"
)

// The PEM type and ASN.1 structure of key blobs, as the OpenSSL engines and providers for TPM 2.0 share them:
// https://www.hansenpartnership.com/draft-bottomley-tpm2-keys.html.
const (
	blobPEMType = "TSS2 PRIVATE KEY"
	maxBlob     = 16 << 10
)

var oidLoadableKey = asn1.ObjectIdentifier{2, 23, 133, 10, 1, 3}

// emptyAuthTag is that of emptyAuth [0] EXPLICIT BOOLEAN OPTIONAL.
var emptyAuthTag = casn1.Tag(0).Constructed().ContextSpecific()

// tpmKey is TPMKey. Policies and keys to be imported are not taken.
type tpmKey struct {
	Type      asn1.ObjectIdentifier
	EmptyAuth bool
	Parent    int64
	Public    []byte // TPM2B_PUBLIC
	Private   []byte // TPM2B_PRIVATE
}

// A Blob is a key as it lies in a file: of use to the TPM that made it, and to nobody else.
type Blob struct {
	// EmptyAuth: the key needs no authorization value.
	EmptyAuth bool
	// Parent is the persistent handle of the key's parent, or 0x40000001 for the ECC primary of the owner hierarchy.
	Parent tpm2.TPMHandle
	// Public is the key's public area. Untrusted: the TPM checks it against the private part when it loads both.
	Public tpm2.TPMTPublic
	// Private is the encrypted part, less its size field.
	Private []byte

	// area is Public as octets, once they are known: go-tpm marshals by reflection, which costs a TPM in software as much as
	// making a key.
	area []byte
}

// public returns the public area as commands want it.
func (b *Blob) public() tpm2.TPM2BPublic {
	if b.area == nil {
		b.area = tpm2.Marshal(b.Public)
	}
	return tpm2.BytesAs2B[tpm2.TPMTPublic](b.area)
}

// name returns the key's name (Part 1, 16).
func (b *Blob) name() (tpm2.TPM2BName, error) {
	if b.Public.NameAlg != tpm2.TPMAlgSHA256 {
		n, err := tpm2.ObjectName(&b.Public)
		if err != nil {
			return tpm2.TPM2BName{}, err
		}
		return *n, nil
	}
	p := b.public()
	sum := sha256.Sum256(p.Bytes())
	return tpm2.TPM2BName{Buffer: append([]byte{byte(tpm2.TPMAlgSHA256 >> 8), byte(tpm2.TPMAlgSHA256 & 0xff)}, sum[:]...)}, nil
}

// Marshal returns the blob as a PEM file.
func (b *Blob) Marshal() ([]byte, error) {
	var w cryptobyte.Builder
	w.AddASN1(casn1.SEQUENCE, func(w *cryptobyte.Builder) {
		w.AddASN1ObjectIdentifier(oidLoadableKey)
		// Written also when it is false: tpm2-openssl 1.1 takes its absence for true.
		w.AddASN1(emptyAuthTag, func(w *cryptobyte.Builder) { w.AddASN1Boolean(b.EmptyAuth) })
		w.AddASN1Int64(int64(b.Parent))
		w.AddASN1OctetString(tpm2.Marshal(b.public()))
		w.AddASN1OctetString(tpm2.Marshal(tpm2.TPM2BPrivate{Buffer: b.Private}))
	})
	der, err := w.Bytes()
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: blobPEMType, Bytes: der}), nil
}

// readTPMKey reads a TPMKey. OpenSSL's provider (tpm2-openssl 1.1) writes the boolean as 01, which DER does not have.
func readTPMKey(der []byte) (k tpmKey, ok bool) {
	input, seq := cryptobyte.String(der), cryptobyte.String(nil)
	if !input.ReadASN1(&seq, casn1.SEQUENCE) || !input.Empty() || !seq.ReadASN1ObjectIdentifier(&k.Type) {
		return k, false
	}
	var wrapped, boolean cryptobyte.String
	var present bool
	if !seq.ReadOptionalASN1(&wrapped, &present, emptyAuthTag) {
		return k, false
	}
	if present {
		if !wrapped.ReadASN1(&boolean, casn1.BOOLEAN) || !wrapped.Empty() || len(boolean) != 1 {
			return k, false
		}
		k.EmptyAuth = boolean[0] != 0
	}
	ok = seq.ReadASN1Integer(&k.Parent) && seq.ReadASN1Bytes(&k.Public, casn1.OCTET_STRING) && seq.ReadASN1Bytes(&k.Private, casn1.OCTET_STRING) && seq.Empty()
	return k, ok
}

// ParseBlob reads a key blob. It is strict: one PEM block, DER, no trailing octets, a parent that this package knows to make.
func ParseBlob(text []byte) (*Blob, error) {
	if len(text) > maxBlob {
		return nil, fmt.Errorf("a key blob has at most %d octets", maxBlob)
	}
	block, rest := pem.Decode(text)
	if block == nil || block.Type != blobPEMType || len(block.Headers) > 0 {
		return nil, fmt.Errorf("it is no PEM of type %s", blobPEMType)
	}
	if len(bytes.TrimSpace(rest)) > 0 {
		return nil, errors.New("something stands behind the PEM block")
	}
	k, ok := readTPMKey(block.Bytes)
	if !ok {
		return nil, errors.New("it is not a TPMKey as we know it (keys with policies are not taken)")
	}
	if !k.Type.Equal(oidLoadableKey) {
		return nil, fmt.Errorf("it is of type %s, not a loadable key (%s)", k.Type, oidLoadableKey)
	}
	if k.Parent != int64(tpm2.TPMRHOwner) && k.Parent>>24 != 0x81 {
		return nil, fmt.Errorf("its parent 0x%x is neither a persistent handle nor the owner hierarchy", k.Parent)
	}
	public, err := residency.ParsePublic(k.Public)
	if err != nil {
		return nil, err
	}
	if len(k.Private) < 4 || int(k.Private[0])<<8|int(k.Private[1]) != len(k.Private)-2 {
		return nil, errors.New("its private part is not a TPM2B_PRIVATE")
	}
	return &Blob{EmptyAuth: k.EmptyAuth, Parent: tpm2.TPMHandle(k.Parent), Public: *public, Private: k.Private[2:], area: k.Public[2:]}, nil
}
