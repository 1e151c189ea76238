package tpm_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/hsmtest"
	"github.com/touchmark/touchmark/hsm/tpm"
)

func open(t testing.TB, uri hsm.URI) *tpm.Store {
	t.Helper()
	s, err := tpm.Open(t.Context(), tpm.Config{URI: uri})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func secret(s string) func(context.Context) (hsm.Secret, error) {
	return func(context.Context) (hsm.Secret, error) { return hsm.Secret(s), nil }
}

// swtpm refuses RSA 4096 and, as Debian builds libtpms, takes RSA 3072.
var cannot = []hsm.Algorithm{hsm.ECP521, hsm.AES256, hsm.RSA4096, hsm.Ed25519}

func TestContract(t *testing.T) {
	s := hsmtest.SWTPM(t)
	hsmtest.Run(t, hsmtest.Suite{
		Open:   func(t *testing.T) hsm.Store { return open(t, s.URI()) },
		Cannot: cannot, Hardware: true,
	})
}

func is(err, target error) bool { return errors.Is(err, target) }

// clean wants a TPM in which nothing of ours is left, as tpm2-tools see it.
func clean(t *testing.T, s *hsmtest.TPM) {
	t.Helper()
	for _, what := range []string{"handles-transient", "handles-loaded-session", "handles-saved-session"} {
		if got := strings.TrimSpace(tool(t, s, nil, "tpm2_getcap", what)); got != "" {
			t.Errorf("%s: %s", what, got)
		}
	}
}

// A thousand operations in a row on three slots without a resource manager, over more keys than there are slots, with failing
// ones in between, leave nothing behind.
func TestThousand(t *testing.T) {
	s := hsmtest.SWTPM(t)
	store := open(t, s.URI())
	var keys []hsm.SigningKey
	for i := range 5 {
		keys = append(keys, signer(t, store, hsm.Spec{Name: fmt.Sprintf("k%d", i), Algorithm: hsm.ECP256}))
	}
	mac, err := hsm.MACKeyOf(generate(t, store, hsm.Spec{Name: "mac", Algorithm: hsm.HMACSHA256}))
	if err != nil {
		t.Fatal(err)
	}
	agree, err := hsm.AgreementKeyOf(generate(t, store, hsm.Spec{Name: "agree", Algorithm: hsm.ECP256, Usage: hsm.Agree}))
	if err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256([]byte("x"))
	long := make([]byte, 5000)
	for i := range 1000 {
		var err error
		switch i % 10 {
		case 0:
			_, err = mac.MAC(t.Context(), nil, long)
		case 1:
			_, err = mac.MAC(t.Context(), nil, digest[:])
		case 2:
			_, err = agree.ECDH(agree.PublicKey())
		case 3:
			_, err = store.Generate(t.Context(), hsm.Spec{Name: "gone", Algorithm: hsm.ECP256, Ephemeral: true})
		case 4:
			if _, err = keys[i%5].Attributes(t.Context()); err == nil {
				if _, bad := store.Generate(t.Context(), hsm.Spec{Name: "no", Algorithm: hsm.RSA4096}); !is(bad, hsm.ErrUnsupported) {
					err = fmt.Errorf("RSA 4096: %w", bad)
				}
			}
		default:
			_, err = keys[i%5].Sign(rand.Reader, digest[:], crypto.SHA256)
		}
		if err != nil {
			t.Fatalf("operation %d: %v", i, err)
		}
	}
	clean(t, s) // the store is still open, and idle
	if _, err := keys[0].Sign(rand.Reader, digest[:], crypto.SHA256); err != nil {
		t.Errorf("after others had the TPM: %v", err)
	}
	if err := store.Close(); err != nil {
		t.Fatal(err)
	}
	clean(t, s)
}

// What is longer than the TPM's buffer is the same HMAC.
func TestLongMAC(t *testing.T) {
	s := hsmtest.SWTPM(t)
	for _, protect := range []bool{false, true} {
		store, err := tpm.Open(t.Context(), tpm.Config{URI: s.URI(), PIN: secret("auth"), Protect: protect})
		if err != nil {
			t.Fatal(err)
		}
		key := hsm.Secret("0123456789abcdef0123456789abcdef")
		k, err := store.Import(t.Context(), hsm.Spec{Name: fmt.Sprintf("mac-%v", protect), Algorithm: hsm.HMACSHA256}, key)
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range []int{0, 1, 1023, 1024, 1025, 2048, 2049, 70000} {
			data := bytes.Repeat([]byte{7}, n)
			h := hmac.New(sha256.New, key)
			h.Write(data)
			if got, err := k.(hsm.MACKey).MAC(t.Context(), nil, data); err != nil || !bytes.Equal(got, h.Sum(nil)) {
				t.Errorf("%d octets: %x, %v", n, got, err)
			}
		}
		if err := store.Close(); err != nil {
			t.Fatal(err)
		}
	}
	clean(t, s)
}

// RSA: PSS with the salt that was asked for, or a plain no; RSA and P-384 keys from elsewhere.
func TestRSA(t *testing.T) {
	s := hsmtest.SWTPM(t)
	store := open(t, s.URI())
	key := signer(t, store, hsm.Spec{Name: "rsa", Algorithm: hsm.RSA2048})
	for _, hash := range []crypto.Hash{crypto.SHA256, crypto.SHA384, crypto.SHA512} {
		digest := make([]byte, hash.Size())
		for _, salt := range []int{rsa.PSSSaltLengthEqualsHash, rsa.PSSSaltLengthAuto, hash.Size(), 17} {
			opts := &rsa.PSSOptions{SaltLength: salt, Hash: hash}
			sig, err := key.Sign(rand.Reader, digest, opts)
			if salt == 17 {
				if !is(err, hsm.ErrUnsupported) {
					t.Errorf("%s, salt %d: %v", hash, salt, err)
				}
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			if err := rsa.VerifyPSS(key.Public().(*rsa.PublicKey), hash, digest, sig, opts); err != nil {
				t.Errorf("%s, salt %d: %v", hash, salt, err)
			}
		}
	}
	if _, err := key.Sign(rand.Reader, make([]byte, 16), crypto.MD5); !is(err, hsm.ErrUnsupported) {
		t.Errorf("MD5: %v", err)
	}
	own, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for alg, priv := range map[hsm.Algorithm]crypto.Signer{hsm.RSA2048: own, hsm.ECP384: p384} {
		der, err := x509.MarshalPKCS8PrivateKey(priv)
		if err != nil {
			t.Fatal(err)
		}
		k, err := store.Import(t.Context(), hsm.Spec{Name: "from-elsewhere-" + string(alg), Algorithm: alg}, der)
		if err != nil {
			t.Fatal(err)
		}
		if !priv.Public().(interface{ Equal(crypto.PublicKey) bool }).Equal(k.(hsm.SigningKey).Public()) {
			t.Errorf("%s: another public half", alg)
		}
		hsmtest.Check(t, k.(hsm.SigningKey))
		if attr, err := k.Attributes(t.Context()); err != nil || attr.Local || attr.NeverExtractable || attr.Extractable || !attr.Hardware {
			t.Errorf("%s: %+v, %v", alg, attr, err)
		}
	}
}

// Keys with an authorization value: the right one works, a wrong one is tried once, none is asked for.
func TestAuthorization(t *testing.T) {
	s := hsmtest.SWTPM(t)
	mine, err := tpm.Open(t.Context(), tpm.Config{URI: s.URI(), PIN: secret("correct"), Protect: true})
	if err != nil {
		t.Fatal(err)
	}
	defer mine.Close()
	hsmtest.Check(t, signer(t, mine, hsm.Spec{Name: "k", Algorithm: hsm.ECP256}))
	hsmtest.Check(t, signer(t, mine, hsm.Spec{Name: "0x81000100", Algorithm: hsm.RSA2048}))
	agree, err := hsm.AgreementKeyOf(generate(t, mine, hsm.Spec{Name: "a", Algorithm: hsm.ECP256, Usage: hsm.Agree}))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := agree.ECDH(agree.PublicKey()); err != nil {
		t.Error(err)
	}
	asked := 0
	theirs, err := tpm.Open(t.Context(), tpm.Config{URI: s.URI(), PIN: func(context.Context) (hsm.Secret, error) {
		asked++
		return hsm.Secret("wr0ng-0ne"), nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer theirs.Close()
	k, err := theirs.Open(t.Context(), "k")
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		_, err := k.(hsm.SigningKey).Sign(rand.Reader, make([]byte, 32), crypto.SHA256)
		var answer *tpm.Error
		if !is(err, hsm.ErrPINIncorrect) || !errors.As(err, &answer) || !is(answer.Code, tpm2.TPMRCBadAuth) || strings.Contains(err.Error(), "wr0ng") {
			t.Errorf("wrong authorization value: %v", err)
		}
	}
	if asked != 1 {
		t.Errorf("asked %d times", asked)
	}
	for _, pin := range []string{"", "with\x00zero", strings.Repeat("x", 33)} {
		if st, err := tpm.Open(t.Context(), tpm.Config{URI: s.URI(), PIN: secret(pin), Protect: true}); err != nil {
			t.Error(err)
		} else {
			if _, err := st.Generate(t.Context(), hsm.Spec{Name: "bad", Algorithm: hsm.ECP256}); err == nil {
				t.Errorf("an authorization value of %d octets is taken", len(pin))
			}
			_ = st.Close()
		}
	}
	silent := open(t, s.URI())
	k, err = silent.Open(t.Context(), "k")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := k.(hsm.SigningKey).Sign(rand.Reader, make([]byte, 32), crypto.SHA256); !is(err, hsm.ErrNoPIN) {
		t.Errorf("no way to learn it: %v", err)
	}
	clean(t, s)
}

// An owned TPM: the owner's authorization makes the primary and the persistent key.
func TestOwned(t *testing.T) {
	s := hsmtest.SWTPM(t)
	tool(t, s, nil, "tpm2_changeauth", "-c", "owner", "0wner")
	bare := open(t, s.URI())
	if _, err := bare.Generate(t.Context(), hsm.Spec{Name: "k", Algorithm: hsm.ECP256}); !is(err, hsm.ErrPINIncorrect) || !strings.Contains(err.Error(), "TPM_RC_BAD_AUTH") {
		t.Errorf("no owner authorization: %v", err)
	}
	if st, err := bare.State(t.Context()); err != nil || !st.OwnerAuth {
		t.Errorf("the state of an owned TPM: %+v, %v", st, err)
	}
	_ = bare.Close()
	store, err := tpm.Open(t.Context(), tpm.Config{URI: s.URI(), Owner: hsm.Secret("0wner")})
	if err != nil {
		t.Fatal(err)
	}
	hsmtest.Check(t, signer(t, store, hsm.Spec{Name: "k", Algorithm: hsm.ECP256}))
	hsmtest.Check(t, signer(t, store, hsm.Spec{Name: "0x81000100", Algorithm: hsm.ECP256}))
	if err := store.Close(); err != nil {
		t.Fatal(err)
	}
	clean(t, s)
}

// The plug is pulled in the middle of work: the same store and the same keys go on once the TPM is back.
func TestRestart(t *testing.T) {
	s := hsmtest.SWTPM(t)
	store := open(t, s.URI())
	key := signer(t, store, hsm.Spec{Name: "k", Algorithm: hsm.ECP256})
	fixed := signer(t, store, hsm.Spec{Name: "0x81000100", Algorithm: hsm.ECP256})
	var wg sync.WaitGroup
	progress := make(chan struct{}, 1000)
	for i := range 4 {
		wg.Go(func() {
			digest := sha256.Sum256([]byte{byte(i)})
			for n := range 150 {
				k := key
				if n%2 == 1 {
					k = fixed
				}
				sig, err := k.Sign(rand.Reader, digest[:], crypto.SHA256)
				if err != nil || !ecdsa.VerifyASN1(k.Public().(*ecdsa.PublicKey), digest[:], sig) {
					t.Errorf("signature %d: %v", n, err)
				}
				progress <- struct{}{}
				if n%10 == 0 {
					if _, err := store.Generate(t.Context(), hsm.Spec{Name: fmt.Sprintf("k-%d-%d", i, n), Algorithm: hsm.ECP256}); err != nil {
						t.Errorf("key %d: %v", n, err)
					}
				}
			}
		})
	}
	for range 3 {
		for range 100 { // in the middle of it, wherever that is
			<-progress
		}
		s.Kill()
		s.Start()
	}
	wg.Wait()
	if keys, err := store.List(t.Context(), "k-"); err != nil || len(keys) != 60 {
		t.Errorf("%d keys, want 60, %v", len(keys), err)
	}
	s.Kill()
	gone, err := tpm.Open(t.Context(), tpm.Config{URI: s.URI(), Wait: time.Millisecond})
	if !is(err, hsm.ErrLost) || gone != nil {
		t.Errorf("opening a dead TPM: %v", err)
	}
	s.Start()
	hsmtest.Check(t, key)
	if err := store.Close(); err != nil {
		t.Fatal(err)
	}
	clean(t, s)
}

// A TPM that does not come back is lost, after the time that was given; the operation may be tried again later.
func TestLost(t *testing.T) {
	s := hsmtest.SWTPM(t)
	store, err := tpm.Open(t.Context(), tpm.Config{URI: s.URI(), Wait: 50 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	key := signer(t, store, hsm.Spec{Name: "k", Algorithm: hsm.ECP256})
	s.Kill()
	begin := time.Now()
	if _, err := key.Sign(rand.Reader, make([]byte, 32), crypto.SHA256); !is(err, hsm.ErrLost) {
		t.Errorf("a dead TPM: %v", err)
	}
	if d := time.Since(begin); d > 5*time.Second {
		t.Errorf("it took %v to give up", d)
	}
	s.Start()
	hsmtest.Check(t, key)
}

// A blob of another TPM, and one that was changed, are refused by the TPM.
func TestForeignBlob(t *testing.T) {
	a, b := hsmtest.SWTPM(t), hsmtest.SWTPM(t)
	generate(t, open(t, a.URI()), hsm.Spec{Name: "k", Algorithm: hsm.ECP256})
	uri := b.URI()
	uri.Keys = a.URI().Keys
	k, err := open(t, uri).Open(t.Context(), "k")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := k.(hsm.SigningKey).Sign(rand.Reader, make([]byte, 32), crypto.SHA256); !is(err, tpm2.TPMRCIntegrity) || !strings.Contains(err.Error(), "not of this TPM") {
		t.Errorf("a blob of another TPM: %v", err)
	}
	clean(t, b)
}

// Another program holds all the slots: the error says so, and nothing is flushed that is not ours.
func TestSlotsTaken(t *testing.T) {
	s := hsmtest.SWTPM(t)
	store := open(t, s.URI())
	key := signer(t, store, hsm.Spec{Name: "k", Algorithm: hsm.ECP256})
	for range 3 {
		tool(t, s, nil, "tpm2_createprimary", "-Q", "-C", "n", "-G", "rsa2048")
	}
	if _, err := key.Sign(rand.Reader, make([]byte, 32), crypto.SHA256); !is(err, hsm.ErrFull) || !strings.Contains(err.Error(), "TPM_RC_OBJECT_MEMORY") {
		t.Errorf("no slot: %v", err)
	}
	if got := strings.Count(tool(t, s, nil, "tpm2_getcap", "handles-transient"), "0x8"); got != 3 {
		t.Errorf("%d of the other program's 3 objects are left", got)
	}
	// A store that is opened now has no room for its storage root key, and can make some.
	late := open(t, s.URI())
	if _, err := late.Generate(t.Context(), hsm.Spec{Name: "late", Algorithm: hsm.ECP256}); !is(err, hsm.ErrFull) {
		t.Errorf("no slot: %v", err)
	}
	if n, err := late.Flush(t.Context()); n != 3 || err != nil {
		t.Errorf("%d flushed, %v", n, err)
	}
	clean(t, s)
	hsmtest.Check(t, key)
}
