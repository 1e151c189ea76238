// Package hsmtest is the contract of package hsm as a test suite. Every backend runs it; a new one begins by calling it.
package hsmtest

import (
	"bytes"
	"crypto"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"slices"
	"sync"
	"testing"

	"github.com/touchmark/touchmark/hsm"
)

// Suite says how to open the store under test.
type Suite struct {
	// Open opens the store; each call opens the same one again.
	Open func(t *testing.T) hsm.Store
	// Cannot lists algorithms that this backend does not have.
	Cannot []hsm.Algorithm
	// Hardware is what the store must say about its keys: a token vouches for what was made in it.
	Hardware bool
}

// Run runs the suite. The store must be empty, and is empty again afterwards.
func Run(t *testing.T, s Suite) {
	for _, alg := range hsm.Algorithms {
		t.Run(string(alg), func(t *testing.T) {
			if slices.Contains(s.Cannot, alg) {
				store := s.Open(t)
				if _, err := store.Generate(t.Context(), hsm.Spec{Name: "cannot", Algorithm: alg}); !errors.Is(err, hsm.ErrUnsupported) {
					t.Errorf("declared as unsupported, answers %v", err)
				}
				return
			}
			s.lifetime(t, alg)
		})
	}
	t.Run("names", s.names)
	t.Run("import", s.imports)
	t.Run("agreement", s.agreement)
	t.Run("ephemeral", s.ephemeral)
	t.Run("concurrent", s.concurrent)
	t.Run("closed", s.closed)
}

// must takes the two results of a call and, given t, returns the first.
func must[T any](v T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// Check verifies a signature that key makes.
func Check(t *testing.T, key hsm.SigningKey) {
	t.Helper()
	message := []byte("the message")
	digest := sha256.Sum256(message)
	switch pub := key.Public().(type) {
	case *ecdsa.PublicKey:
		sig := must(sign(key, digest[:], crypto.SHA256))(t)
		if !ecdsa.VerifyASN1(pub, digest[:], sig) {
			t.Error("ECDSA signature does not verify")
		}
		if ecdsa.VerifyASN1(pub, make([]byte, 32), sig) {
			t.Error("ECDSA signature verifies for another digest")
		}
	case *rsa.PublicKey:
		if err := rsa.VerifyPKCS1v15(pub, crypto.SHA256, digest[:], must(sign(key, digest[:], crypto.SHA256))(t)); err != nil {
			t.Errorf("PKCS #1: %v", err)
		}
		opts := &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: crypto.SHA256}
		if err := rsa.VerifyPSS(pub, crypto.SHA256, digest[:], must(sign(key, digest[:], opts))(t), opts); err != nil {
			t.Errorf("PSS: %v", err)
		}
	case ed25519.PublicKey:
		if !ed25519.Verify(pub, message, must(sign(key, message, crypto.Hash(0)))(t)) {
			t.Error("Ed25519 signature does not verify")
		}
	default:
		t.Errorf("public key is a %T", pub)
	}
	if _, err := key.Sign(rand.Reader, digest[:7], crypto.SHA256); err == nil {
		if _, ed := key.Public().(ed25519.PublicKey); !ed {
			t.Error("signed a digest of the wrong length")
		}
	}
}

func sign(key hsm.SigningKey, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	return key.Sign(rand.Reader, digest, opts)
}

// lifetime makes a key, uses it, opens it again in a fresh store, and deletes it.
func (s Suite) lifetime(t *testing.T, alg hsm.Algorithm) {
	store := s.Open(t)
	name := "life:" + string(alg)
	key := must(store.Generate(t.Context(), hsm.Spec{Name: name, Algorithm: alg}))(t)
	t.Cleanup(func() { _ = store.Delete(t.Context(), name) })
	if key.Name() != name || key.Algorithm() != alg {
		t.Errorf("asked for %s %s, got %s %s", alg, name, key.Algorithm(), key.Name())
	}
	attr := must(key.Attributes(t.Context()))(t)
	want := hsm.Attributes{Sensitive: true, Local: s.Hardware, AlwaysSensitive: s.Hardware, NeverExtractable: s.Hardware, Hardware: s.Hardware}
	if attr != want {
		t.Errorf("attributes read back %+v, want %+v", attr, want)
	}
	u := must(hsm.ParseURI(key.URI()))(t)
	if u.Object != name {
		t.Errorf("URI %s does not name the key", key.URI())
	}
	if _, err := store.Generate(t.Context(), hsm.Spec{Name: name, Algorithm: alg}); !errors.Is(err, hsm.ErrExists) {
		t.Errorf("second key of that name: %v", err)
	}
	again := must(s.Open(t).Open(t.Context(), name))(t)
	if alg == hsm.HMACSHA256 {
		a, b := must(hsm.MACKeyOf(key))(t), must(hsm.MACKeyOf(again))(t)
		x := must(a.MAC(t.Context(), []byte("prefix"), []byte("data")))(t)
		y := must(b.MAC(t.Context(), nil, []byte("data")))(t)
		if len(y) != sha256.Size || !bytes.Equal(x, append([]byte("prefix"), y...)) {
			t.Error("the reopened key computes something else, or does not append")
		}
		if _, err := hsm.SigningKeyOf(key); !errors.Is(err, hsm.ErrUnsupported) {
			t.Errorf("an HMAC key signs: %v", err)
		}
	} else {
		a, b := must(hsm.SigningKeyOf(key))(t), must(hsm.SigningKeyOf(again))(t)
		Check(t, a)
		Check(t, b)
		if !a.Public().(interface{ Equal(crypto.PublicKey) bool }).Equal(b.Public()) {
			t.Error("the reopened key has another public half")
		}
	}
	if err := store.Delete(t.Context(), name); err != nil {
		t.Fatal(err)
	}
	if err := store.Delete(t.Context(), name); !errors.Is(err, hsm.ErrNotFound) {
		t.Errorf("second Delete: %v", err)
	}
	if _, err := store.Open(t.Context(), name); !errors.Is(err, hsm.ErrNotFound) {
		t.Errorf("Open after Delete: %v", err)
	}
	if key, err := store.Generate(t.Context(), hsm.Spec{Name: name, Algorithm: alg}); err != nil {
		t.Errorf("the name is not free after Delete: %v, %v", key, err)
	}
}

func (s Suite) names(t *testing.T) {
	store := s.Open(t)
	if _, err := store.Open(t.Context(), "nobody"); !errors.Is(err, hsm.ErrNotFound) {
		t.Errorf("Open: %v", err)
	}
	for _, bad := range []string{"", ".", "../up", "a/b", "sp ace", "nul\x00", string(make([]byte, 300))} {
		if _, err := store.Generate(t.Context(), hsm.Spec{Name: bad, Algorithm: hsm.ECP256}); err == nil {
			t.Errorf("made a key called %q", bad)
		}
		if _, err := store.Open(t.Context(), bad); !errors.Is(err, hsm.ErrNotFound) {
			t.Errorf("Open(%q): %v", bad, err)
		}
	}
	want := []string{"list:a", "list:b", "list:c"}
	for _, n := range []string{"list:c", "list:a", "other", "list:b"} {
		must(store.Generate(t.Context(), hsm.Spec{Name: n, Algorithm: hsm.ECP256}))(t)
		t.Cleanup(func() { _ = store.Delete(t.Context(), n) })
	}
	lister, ok := store.(hsm.Lister)
	if !ok {
		t.Fatal("the store does not list")
	}
	var got []string
	for _, k := range must(lister.List(t.Context(), "list:"))(t) {
		got = append(got, k.Name())
	}
	if !slices.Equal(got, want) {
		t.Errorf("listed %v, want %v", got, want)
	}
}

func (s Suite) imports(t *testing.T) {
	store := s.Open(t)
	secret := hsm.Secret("0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef")
	key := must(store.Import(t.Context(), hsm.Spec{Name: "imported", Algorithm: hsm.HMACSHA256}, secret))(t)
	t.Cleanup(func() { _ = store.Delete(t.Context(), "imported") })
	h := hmac.New(sha256.New, secret)
	h.Write([]byte("pump-0001"))
	if got := must(must(hsm.MACKeyOf(key))(t).MAC(t.Context(), nil, []byte("pump-0001")))(t); !bytes.Equal(got, h.Sum(nil)) {
		t.Error("the imported key computes another HMAC than crypto/hmac")
	}
	if attr := must(key.Attributes(t.Context()))(t); attr.Local || attr.Extractable || attr.NeverExtractable || !attr.Sensitive {
		t.Errorf("attributes of an imported key: %+v", attr)
	}
	if _, err := store.Import(t.Context(), hsm.Spec{Name: "imported", Algorithm: hsm.HMACSHA256}, secret); !errors.Is(err, hsm.ErrExists) {
		t.Errorf("second import: %v", err)
	}
	if _, err := store.Import(t.Context(), hsm.Spec{Name: "short", Algorithm: hsm.HMACSHA256}, secret[:15]); err == nil {
		t.Error("imported a key of 15 octets")
	}
	priv, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der := must(marshal(priv))(t)
	pair := must(store.Import(t.Context(), hsm.Spec{Name: "pair", Algorithm: hsm.ECP256}, der))(t)
	t.Cleanup(func() { _ = store.Delete(t.Context(), "pair") })
	signing := must(hsm.SigningKeyOf(pair))(t)
	if !priv.PublicKey.Equal(signing.Public()) {
		t.Error("the imported pair has another public half")
	}
	Check(t, signing)
	if _, err := store.Import(t.Context(), hsm.Spec{Name: "wrong", Algorithm: hsm.ECP384}, der); err == nil {
		t.Error("imported a P-256 key as P-384")
	}
}

func marshal(priv *ecdsa.PrivateKey) (hsm.Secret, error) {
	b, err := x509.MarshalPKCS8PrivateKey(priv)
	return b, err
}

func (s Suite) agreement(t *testing.T) {
	store := s.Open(t)
	key := must(store.Generate(t.Context(), hsm.Spec{Name: "agree", Algorithm: hsm.ECP256, Usage: hsm.Agree}))(t)
	t.Cleanup(func() { _ = store.Delete(t.Context(), "agree") })
	agree := must(hsm.AgreementKeyOf(must(s.Open(t).Open(t.Context(), "agree"))(t)))(t)
	peer, err := ecdh.P256().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	mine := must(agree.ECDH(peer.PublicKey()))(t)
	theirs := must(peer.ECDH(agree.PublicKey()))(t)
	if len(mine) != 32 || !bytes.Equal(mine, theirs) {
		t.Error("the two sides agree on different secrets")
	}
	if _, err := hsm.SigningKeyOf(key); !errors.Is(err, hsm.ErrUnsupported) {
		t.Errorf("an agreement key signs: %v", err)
	}
}

func (s Suite) ephemeral(t *testing.T) {
	store := s.Open(t)
	for range 2 { // the name need not be free
		key := must(store.Generate(t.Context(), hsm.Spec{Name: "throw-away", Algorithm: hsm.ECP256, Ephemeral: true}))(t)
		Check(t, must(hsm.SigningKeyOf(key))(t))
	}
	if keys := must(store.(hsm.Lister).List(t.Context(), "throw-away"))(t); len(keys) != 0 {
		t.Errorf("a throw-away key is listed: %v", keys)
	}
	if _, err := store.Open(t.Context(), "throw-away"); !errors.Is(err, hsm.ErrNotFound) {
		t.Errorf("a throw-away key opens: %v", err)
	}
}

// concurrent uses one store from many goroutines: all may sign, and of those who make one name one wins.
func (s Suite) concurrent(t *testing.T) {
	store := s.Open(t)
	key := must(hsm.SigningKeyOf(must(store.Generate(t.Context(), hsm.Spec{Name: "shared", Algorithm: hsm.ECP256}))(t)))(t)
	t.Cleanup(func() { _ = store.Delete(t.Context(), "shared"); _ = store.Delete(t.Context(), "race") })
	var wg sync.WaitGroup
	var mu sync.Mutex
	made := 0
	for range 24 {
		wg.Go(func() {
			digest := sha256.Sum256([]byte("x"))
			sig, err := key.Sign(rand.Reader, digest[:], crypto.SHA256)
			if err != nil || !ecdsa.VerifyASN1(key.Public().(*ecdsa.PublicKey), digest[:], sig) {
				t.Errorf("concurrent signature: %v", err)
			}
			_, err = store.Generate(t.Context(), hsm.Spec{Name: "race", Algorithm: hsm.ECP256})
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				made++
			} else if !errors.Is(err, hsm.ErrExists) {
				t.Errorf("concurrent Generate: %v", err)
			}
		})
	}
	wg.Wait()
	if made != 1 {
		t.Errorf("%d keys of one name were made", made)
	}
}

func (s Suite) closed(t *testing.T) {
	store := s.Open(t)
	if err := store.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := store.Generate(t.Context(), hsm.Spec{Name: "late", Algorithm: hsm.ECP256}); err == nil {
		t.Error("made a key in a closed store")
	}
	if _, err := store.Open(t.Context(), "late"); err == nil || errors.Is(err, hsm.ErrNotFound) {
		t.Errorf("opened a key of a closed store: %v", err)
	}
}
