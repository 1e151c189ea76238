package tpm

import (
	"bytes"
	"crypto/sha256"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"

	"github.com/touchmark/touchmark/hsm/tpm/residency"
)

// The PEM type and ASN.1 structure of key blobs, as the OpenSSL engines and providers for TPM 2.0 share them:
// https://www.hansenpartnership.com/draft-bottomley-tpm2-keys.html.
const (
	blobPEMType = "TSS2 PRIVATE KEY"
	maxBlob     = 16 << 10
)

var oidLoadableKey = asn1.ObjectIdentifier{2, 23, 133, 10, 1, 3}

// tpmKey is TPMKey. Policies and keys to be imported are not taken.
type tpmKey struct {
	Type      asn1.ObjectIdentifier
	EmptyAuth bool `asn1:"explicit,tag:0,optional"`
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
	der, err := asn1.Marshal(tpmKey{
		Type: oidLoadableKey, EmptyAuth: b.EmptyAuth, Parent: int64(b.Parent),
		Public:  tpm2.Marshal(b.public()),
		Private: tpm2.Marshal(tpm2.TPM2BPrivate{Buffer: b.Private}),
	})
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: blobPEMType, Bytes: der}), nil
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
	var k tpmKey
	if rest, err := asn1.Unmarshal(block.Bytes, &k); err != nil || len(rest) > 0 {
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
