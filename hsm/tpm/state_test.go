package tpm_test

import (
	"bytes"
	"crypto"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/hsmtest"
	"github.com/touchmark/touchmark/hsm/tpm"
)

// An NV index is defined, written, locked and read back; tpm2-tools read the same, and cannot write it any more.
func TestNV(t *testing.T) {
	s := hsmtest.SWTPM(t)
	store := open(t, s.URI())
	const index = 0x01800001
	data := bytes.Repeat([]byte("touchmark "), 180) // more than one piece
	if _, err := store.ReadNV(t.Context(), index); !is(err, hsm.ErrNotFound) {
		t.Errorf("no index: %v", err)
	}
	if err := store.DefineNV(t.Context(), index, len(data)); err != nil {
		t.Fatal(err)
	}
	if err := store.DefineNV(t.Context(), index, len(data)); !is(err, hsm.ErrExists) || !strings.Contains(err.Error(), "TPM_RC_NV_DEFINED") {
		t.Errorf("second index: %v", err)
	}
	if _, err := store.ReadNV(t.Context(), index); !is(err, tpm2.TPMRCNVUninitialized) {
		t.Errorf("nothing written: %v", err)
	}
	if err := store.WriteNV(t.Context(), index, append(data, 'x')); !is(err, hsm.ErrFull) {
		t.Errorf("too much: %v", err)
	}
	if err := store.WriteNV(t.Context(), index, data); err != nil {
		t.Fatal(err)
	}
	tool(t, s, nil, "tpm2_nvread", "-o", "read", fmt.Sprintf("0x%x", index))
	if b, err := os.ReadFile(filepath.Join(s.Dir, "read")); err != nil || !bytes.Equal(b, data) {
		t.Errorf("tpm2_nvread reads %d octets, %v", len(b), err)
	}
	if err := store.LockNV(t.Context(), index); err != nil {
		t.Fatal(err)
	}
	s.Kill()
	s.Start() // the lock lasts
	if err := store.WriteNV(t.Context(), index, []byte("other")); !is(err, tpm2.TPMRCNVLocked) {
		t.Errorf("written although it is locked: %v", err)
	}
	if err := store.LockNV(t.Context(), index); err != nil {
		t.Errorf("locked twice: %v", err)
	}
	if b, err := store.ReadNV(t.Context(), index); err != nil || !bytes.Equal(b, data) {
		t.Errorf("reads back %d octets, %v", len(b), err)
	}
	all, err := store.ListNV(t.Context())
	want := tpm.NVIndex{Index: index, Size: len(data), Written: true, WriteLocked: true, Lockable: true, OwnerWrite: true, AnyRead: true}
	if err != nil || !slices.Equal(all, []tpm.NVIndex{want}) {
		t.Errorf("%+v, %v", all, err)
	}
	if err := store.DeleteNV(t.Context(), index); err != nil {
		t.Fatal(err)
	}
	if err := store.DeleteNV(t.Context(), index); !is(err, hsm.ErrNotFound) {
		t.Errorf("deleted twice: %v", err)
	}
	for _, bad := range []uint32{0x01c00002, 0x01400000, 0x81000001} {
		if err := store.DefineNV(t.Context(), bad, 1); err == nil {
			t.Errorf("index %x is not the owner's", bad)
		}
	}
	n := 0
	for err == nil && n < 100 {
		if err = store.DefineNV(t.Context(), index+uint32(n), 2048); err == nil {
			n++
		}
	}
	if !is(err, hsm.ErrFull) || !strings.Contains(err.Error(), "TPM_RC_NV_SPACE") {
		t.Errorf("after %d indices of 2 kB: %v", n, err)
	}
	clean(t, s)
}

// What the TPM says of itself is what tpm2_getcap says; guessing locks it, the lockout authorization unlocks it.
func TestLockout(t *testing.T) {
	s := hsmtest.SWTPM(t)
	tool(t, s, nil, "tpm2_changeauth", "-c", "lockout", "l0ckout")
	if err := withLockout(t, s, "l0ckout", func(st *tpm.Store) error { return st.SetLockout(t.Context(), 3, time.Hour, 2*time.Hour) }); err != nil {
		t.Fatal(err)
	}
	store := open(t, s.URI())
	st, err := store.State(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if want := (tpm.Lockout{MaxFailures: 3, Recovery: 3600, LockoutRecovery: 7200}); st.Lockout != want || !st.LockoutAuth || st.OwnerAuth || !st.StorageEnabled || st.Slots != 3 {
		t.Errorf("%+v", st)
	}
	for _, want := range []hsm.Algorithm{hsm.ECP256, hsm.ECP384, hsm.RSA2048, hsm.HMACSHA256} {
		if !slices.Contains(st.Algorithms, want) {
			t.Errorf("no %s in %v", want, st.Algorithms)
		}
	}
	if !regexp.MustCompile(`^\d+\.\d+\.\d+\.\d+$`).MatchString(st.Firmware) || st.Manufacturer != "IBM" || st.Revision != "1.64" {
		t.Errorf("%+v", st)
	}
	text := tool(t, s, nil, "tpm2_getcap", "properties-variable")
	if !strings.Contains(text, "TPM2_PT_MAX_AUTH_FAIL: 0x3") || !strings.Contains(text, "TPM2_PT_LOCKOUT_INTERVAL: 0xE10") {
		t.Error(text)
	}
	// A key of another program that counts failures.
	tool(t, s, nil, "tpm2_createprimary", "-Q", "-C", "o", "-G", "ecc", "-c", "p.ctx")
	tool(t, s, nil, "tpm2_create", "-Q", "-C", "p.ctx", "-G", "ecc", "-p", "right", "-a", "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|sign", "-u", "k.pub", "-r", "k.priv")
	tool(t, s, nil, "tpm2_flushcontext", "-t")
	tool(t, s, nil, "tpm2_load", "-Q", "-C", "p.ctx", "-u", "k.pub", "-r", "k.priv", "-c", "k.ctx")
	tool(t, s, nil, "tpm2_flushcontext", "-t")
	tool(t, s, nil, "tpm2_evictcontrol", "-Q", "-C", "o", "-c", "k.ctx", "0x81000100")
	tool(t, s, nil, "tpm2_flushcontext", "-t")
	for i := range 4 {
		err := guess(t, s)
		if i < 3 && !is(err, hsm.ErrPINIncorrect) || i == 3 && (!is(err, hsm.ErrPINLocked) || !strings.Contains(err.Error(), "TPM_RC_LOCKOUT")) {
			t.Errorf("guess %d: %v", i, err)
		}
	}
	if st, err = store.State(t.Context()); err != nil || !st.Lockout.Locked || st.Lockout.Failures != 3 {
		t.Errorf("%+v, %v", st, err)
	}
	// Keys that we make do not mind.
	hsmtest.Check(t, signer(t, store, hsm.Spec{Name: "k", Algorithm: hsm.ECP256}))
	if err := withLockout(t, s, "l0ckout", func(st *tpm.Store) error { return st.ResetLockout(t.Context()) }); err != nil {
		t.Fatal(err)
	}
	if st, err = store.State(t.Context()); err != nil || st.Lockout.Locked || st.Lockout.Failures != 0 {
		t.Errorf("%+v, %v", st, err)
	}
	if err := withLockout(t, s, "wrong", func(st *tpm.Store) error { return st.Clear(t.Context()) }); !is(err, hsm.ErrPINIncorrect) {
		t.Errorf("cleared with a wrong authorization: %v", err)
	}
	clean(t, s)
}

func withLockout(t *testing.T, s *hsmtest.TPM, auth string, f func(*tpm.Store) error) error {
	t.Helper()
	store, err := tpm.Open(t.Context(), tpm.Config{URI: s.URI(), Lockout: hsm.Secret(auth)})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	return f(store)
}

// guess tries a wrong authorization value on the key at 0x81000100.
func guess(t *testing.T, s *hsmtest.TPM) error {
	t.Helper()
	store, err := tpm.Open(t.Context(), tpm.Config{URI: s.URI(), PIN: secret("wrong"), Protect: true})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	k, err := store.Open(t.Context(), "0x81000100")
	if err != nil {
		t.Fatal(err)
	}
	_, err = k.(hsm.SigningKey).Sign(nil, make([]byte, 32), sha)
	return err
}

// A cleared TPM: keys made before are gone, the EK is the same.
func TestClear(t *testing.T) {
	s := hsmtest.SWTPM(t)
	store := open(t, s.URI())
	key := signer(t, store, hsm.Spec{Name: "k", Algorithm: hsm.ECP256})
	before := ek(t, store, tpm.EKECC)
	if err := store.Clear(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := key.Sign(nil, make([]byte, 32), sha); err == nil || !strings.Contains(err.Error(), "cleared") {
		t.Errorf("a key of a cleared TPM: %v", err)
	}
	if err := store.Close(); err != nil {
		t.Fatal(err)
	}
	again := open(t, s.URI())
	if after := ek(t, again, tpm.EKECC); !bytes.Equal(before.Public, after.Public) {
		t.Error("the EK is another")
	}
	if k, err := again.Open(t.Context(), "k"); err != nil {
		t.Fatal(err)
	} else if _, err := k.(hsm.SigningKey).Sign(nil, make([]byte, 32), sha); !is(err, tpm2.TPMRCIntegrity) {
		t.Errorf("a blob from before: %v", err)
	}
	_ = again.Close()
	clean(t, s)
}

const sha = crypto.SHA256
