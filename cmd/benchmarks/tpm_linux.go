package main

import (
	"context"
	"crypto"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/tpm"
)

// newTPM starts a software TPM and returns its socket.
func newTPM() (socket string, stop func()) {
	dir := tempDir()
	socket = filepath.Join(dir, "sock")
	check(os.Mkdir(filepath.Join(dir, "state"), 0o700))
	cmd := exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+filepath.Join(dir, "state"), "--server", "type=unixio,path="+socket, "--flags", "not-need-init,startup-clear")
	check(cmd.Start())
	for range 200 {
		if _, err := os.Stat(socket); err == nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	return socket, func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
}

func openTPM(socket, keys string) *tpm.Store {
	return must(tpm.Open(context.Background(), tpm.Config{URI: hsm.URI{Scheme: hsm.SchemeTPM, Device: "unix:" + socket, Keys: keys}, Dir: keys}))
}

// A bareTPM is go-tpm's own calls on a TPM of the same kind, with everything loaded before and no care.
type bareTPM struct {
	t   transport.TPM
	srk tpm2.NamedHandle
}

var bareKey = tpm2.TPMTPublic{
	Type: tpm2.TPMAlgECC, NameAlg: tpm2.TPMAlgSHA256,
	ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true, NoDA: true, SignEncrypt: true},
	Parameters:       tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{CurveID: tpm2.TPMECCNistP256}),
}

func newBareTPM(socket string) *bareTPM {
	t := must(linuxudstpm.Open(socket))
	rsp := must(tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHOwner, InPublic: tpm2.New2B(tpm2.ECCSRKTemplate)}.Execute(t))
	return &bareTPM{t, tpm2.NamedHandle{Handle: rsp.ObjectHandle, Name: rsp.Name}}
}

func (b *bareTPM) create() *tpm2.CreateResponse {
	return must(tpm2.Create{ParentHandle: b.srk, InPublic: tpm2.New2B(bareKey)}.Execute(b.t))
}

// each returns how often a second f runs, n times in turn: a TPM does one thing at a time.
func each(n int, f func()) float64 {
	start := time.Now()
	for range n {
		f()
	}
	return float64(n) / time.Since(start).Seconds()
}

// tpmCreate: a key made under the storage root key, its blob written and flushed, against TPM2_Create.
func (b *bench) tpmCreate() {
	ours, stop := newTPM()
	defer stop()
	theirs, stopBare := newTPM()
	defer stopBare()
	store := openTPM(ours, tempDir())
	defer store.Close()
	bare := newBareTPM(theirs)
	i := 0
	n := 100 * b.scale
	b.compare("tpm-create", "keys/s", func() float64 {
		return each(n, func() {
			i++
			must(store.Generate(context.Background(), hsm.Spec{Name: fmt.Sprintf("k%d", i), Algorithm: hsm.ECP256}))
		})
	}, func() float64 { return each(n, func() { bare.create() }) })
}

// tpmSign: the key's Sign against TPM2_Sign.
func (b *bench) tpmSign() {
	ours, stop := newTPM()
	defer stop()
	theirs, stopBare := newTPM()
	defer stopBare()
	store := openTPM(ours, tempDir())
	defer store.Close()
	key := must(hsm.SigningKeyOf(must(store.Generate(context.Background(), hsm.Spec{Name: "k", Algorithm: hsm.ECP256}))))
	bare := newBareTPM(theirs)
	made := bare.create()
	loaded := must(tpm2.Load{ParentHandle: bare.srk, InPrivate: made.OutPrivate, InPublic: made.OutPublic}.Execute(bare.t))
	digest := make([]byte, 32)
	n := 300 * b.scale
	b.compare("tpm-sign", "signatures/s", func() float64 {
		return each(n, func() { must(key.Sign(nil, digest, crypto.SHA256)) })
	}, func() float64 {
		return each(n, func() {
			must(tpm2.Sign{
				KeyHandle: tpm2.AuthHandle{Handle: loaded.ObjectHandle, Name: loaded.Name, Auth: tpm2.PasswordAuth(nil)}, Digest: tpm2.TPM2BDigest{Buffer: digest},
				InScheme:   tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgECDSA, Details: tpm2.NewTPMUSigScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSchemeHash{HashAlg: tpm2.TPMAlgSHA256})},
				Validation: tpm2.TPMTTKHashCheck{Tag: tpm2.TPMSTHashCheck, Hierarchy: tpm2.TPMRHNull},
			}.Execute(bare.t))
		})
	})
}
