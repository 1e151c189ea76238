//go:build linux

package tpm_test

import (
	"crypto"
	"fmt"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/hsmtest"
)

// Each benchmark has a bare twin on a TPM of the same kind: go-tpm's own calls, with everything loaded before and no care.

func BenchmarkSign(b *testing.B) {
	key := signer(b, open(b, hsmtest.SWTPM(b).URI()), hsm.Spec{Name: "k", Algorithm: hsm.ECP256})
	digest := make([]byte, 32)
	for b.Loop() {
		if _, err := key.Sign(nil, digest, crypto.SHA256); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkCreate(b *testing.B) {
	store := open(b, hsmtest.SWTPM(b).URI())
	i := 0
	for b.Loop() {
		generate(b, store, hsm.Spec{Name: fmt.Sprintf("k%d", i), Algorithm: hsm.ECP256})
		i++
	}
}

// BenchmarkCreateSign is the making of a device key with its first signature.
func BenchmarkCreateSign(b *testing.B) {
	store := open(b, hsmtest.SWTPM(b).URI())
	digest := make([]byte, 32)
	i := 0
	for b.Loop() {
		if _, err := signer(b, store, hsm.Spec{Name: fmt.Sprintf("k%d", i), Algorithm: hsm.ECP256}).Sign(nil, digest, crypto.SHA256); err != nil {
			b.Fatal(err)
		}
		i++
	}
}

// BenchmarkMAC derives device keys: their way out of the TPM is encrypted, which the bare loop does without.
func BenchmarkMAC(b *testing.B) {
	k := generate(b, open(b, hsmtest.SWTPM(b).URI()), hsm.Spec{Name: "k", Algorithm: hsm.HMACSHA256}).(hsm.MACKey)
	for b.Loop() {
		if _, err := k.MAC(b.Context(), nil, []byte("pump-0001")); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkAttest(b *testing.B) {
	p := prove(b, hsmtest.SWTPM(b), "EC-P256")
	for b.Loop() {
		if _, err := p.store.Attest(b.Context(), p.ek, "device:1", deviceID); err != nil {
			b.Fatal(err)
		}
	}
}

func bare(b *testing.B) (transport.TPM, tpm2.NamedHandle) {
	b.Helper()
	t, err := linuxudstpm.Open(hsmtest.SWTPM(b).Socket)
	if err != nil {
		b.Fatal(err)
	}
	rsp, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHOwner, InPublic: tpm2.New2B(tpm2.ECCSRKTemplate)}.Execute(t)
	if err != nil {
		b.Fatal(err)
	}
	return t, tpm2.NamedHandle{Handle: rsp.ObjectHandle, Name: rsp.Name}
}

func bareCreate(b *testing.B, t transport.TPM, srk tpm2.NamedHandle, p tpm2.TPMTPublic) *tpm2.CreateResponse {
	b.Helper()
	rsp, err := tpm2.Create{ParentHandle: srk, InPublic: tpm2.New2B(p)}.Execute(t)
	if err != nil {
		b.Fatal(err)
	}
	return rsp
}

func bareLoad(b *testing.B, t transport.TPM, srk tpm2.NamedHandle, p tpm2.TPMTPublic) tpm2.AuthHandle {
	b.Helper()
	made := bareCreate(b, t, srk, p)
	rsp, err := tpm2.Load{ParentHandle: srk, InPrivate: made.OutPrivate, InPublic: made.OutPublic}.Execute(t)
	if err != nil {
		b.Fatal(err)
	}
	return tpm2.AuthHandle{Handle: rsp.ObjectHandle, Name: rsp.Name, Auth: tpm2.PasswordAuth(nil)}
}

var (
	bareAttributes = tpm2.TPMAObject{FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true, NoDA: true, SignEncrypt: true}
	bareECC        = tpm2.TPMTPublic{
		Type: tpm2.TPMAlgECC, NameAlg: tpm2.TPMAlgSHA256, ObjectAttributes: bareAttributes,
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{CurveID: tpm2.TPMECCNistP256}),
	}
	bareHMAC = tpm2.TPMTPublic{
		Type: tpm2.TPMAlgKeyedHash, NameAlg: tpm2.TPMAlgSHA256, ObjectAttributes: bareAttributes,
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgKeyedHash, &tpm2.TPMSKeyedHashParms{Scheme: tpm2.TPMTKeyedHashScheme{
			Scheme: tpm2.TPMAlgHMAC, Details: tpm2.NewTPMUSchemeKeyedHash(tpm2.TPMAlgHMAC, &tpm2.TPMSSchemeHMAC{HashAlg: tpm2.TPMAlgSHA256}),
		}}),
	}
)

func bareSign(b *testing.B, t transport.TPM, key tpm2.AuthHandle) {
	b.Helper()
	_, err := tpm2.Sign{
		KeyHandle: key, Digest: tpm2.TPM2BDigest{Buffer: make([]byte, 32)},
		InScheme:   tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgECDSA, Details: tpm2.NewTPMUSigScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSchemeHash{HashAlg: tpm2.TPMAlgSHA256})},
		Validation: tpm2.TPMTTKHashCheck{Tag: tpm2.TPMSTHashCheck, Hierarchy: tpm2.TPMRHNull},
	}.Execute(t)
	if err != nil {
		b.Fatal(err)
	}
}

func BenchmarkBareSign(b *testing.B) {
	t, srk := bare(b)
	key := bareLoad(b, t, srk, bareECC)
	for b.Loop() {
		bareSign(b, t, key)
	}
}

func BenchmarkBareCreate(b *testing.B) {
	t, srk := bare(b)
	for b.Loop() {
		bareCreate(b, t, srk, bareECC)
	}
}

func BenchmarkBareCreateSign(b *testing.B) {
	t, srk := bare(b)
	for b.Loop() {
		key := bareLoad(b, t, srk, bareECC)
		bareSign(b, t, key)
		if _, err := (tpm2.FlushContext{FlushHandle: key.Handle}).Execute(t); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkBareMAC(b *testing.B) {
	t, srk := bare(b)
	key := bareLoad(b, t, srk, bareHMAC)
	for b.Loop() {
		if _, err := (tpm2.Hmac{Handle: key, Buffer: tpm2.TPM2BMaxBuffer{Buffer: []byte("pump-0001")}, HashAlg: tpm2.TPMAlgSHA256}).Execute(t); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkBareIncrement(b *testing.B) {
	t, _ := bare(b)
	public := tpm2.TPMSNVPublic{
		NVIndex: 0x01800001, NameAlg: tpm2.TPMAlgSHA256, DataSize: 8,
		Attributes: tpm2.TPMANV{OwnerWrite: true, OwnerRead: true, NoDA: true, NT: tpm2.TPMNTCounter},
	}
	owner := tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)}
	if _, err := (tpm2.NVDefineSpace{AuthHandle: owner, PublicInfo: tpm2.New2B(public)}).Execute(t); err != nil {
		b.Fatal(err)
	}
	for i := 0; b.Loop(); i++ {
		public.Attributes.Written = i > 0 // part of its name
		name, err := tpm2.NVName(&public)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := (tpm2.NVIncrement{AuthHandle: owner, NVIndex: tpm2.NamedHandle{Handle: public.NVIndex, Name: *name}}).Execute(t); err != nil {
			b.Fatal(err)
		}
	}
}
