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
	// Hardware is what the store must say about its keys: a token vouches for what was made in it.
	Hardware bool

	// What a backend cannot do is declared here, and the suite sees to it that it says hsm.ErrUnsupported, so that what is
	// not tested is not claimed either.

	// Cannot lists algorithms that it makes no keys of.
	Cannot []hsm.Algorithm
	// CannotImport lists algorithms whose keys cannot be brought in.
	CannotImport []hsm.Algorithm
	// NoAgreement, NoEphemeral: it has no keys of usage Agree, none that live in memory.
	NoAgreement, NoEphemeral bool
	// CannotWrap lists algorithms whose keys it does not wrap, though it wraps others.
	CannotWrap []hsm.Algorithm
	// NoWrap: it does not wrap or unwrap keys. A store that is no hsm.Wrapper need not say so.
	NoWrap bool
	// Vouches, if not nil, changes what the store says about the keys that it made, where it differs from Hardware.
	Vouches func(hsm.Algorithm, *hsm.Attributes)
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
	t.Run("wrap", s.wrap)
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
	if s.Vouches != nil {
		s.Vouches(alg, &want)
	}
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
	switch alg {
	case hsm.AES256: // what it does is in wrap
		if _, err := hsm.SigningKeyOf(again); again.Usage() != hsm.Wrap || !errors.Is(err, hsm.ErrUnsupported) {
			t.Errorf("an AES key is for %s, and signs: %v", again.Usage(), err)
		}
	case hsm.HMACSHA256:
		a, b := must(hsm.MACKeyOf(key))(t), must(hsm.MACKeyOf(again))(t)
		x := must(a.MAC(t.Context(), []byte("prefix"), []byte("data")))(t)
		y := must(b.MAC(t.Context(), nil, []byte("data")))(t)
		if len(y) != sha256.Size || !bytes.Equal(x, append([]byte("prefix"), y...)) {
			t.Error("the reopened key computes something else, or does not append")
		}
		if _, err := hsm.SigningKeyOf(key); !errors.Is(err, hsm.ErrUnsupported) {
			t.Errorf("an HMAC key signs: %v", err)
		}
	default:
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
	t.Run(string(hsm.HMACSHA256), s.importMAC)
	for alg, curve := range map[hsm.Algorithm]elliptic.Curve{hsm.ECP256: elliptic.P256(), hsm.ECP384: elliptic.P384(), hsm.ECP521: elliptic.P521()} {
		t.Run(string(alg), func(t *testing.T) {
			s.importPair(t, alg, must(ecdsa.GenerateKey(curve, rand.Reader))(t))
		})
	}
	t.Run(string(hsm.RSA2048), func(t *testing.T) { s.importPair(t, hsm.RSA2048, must(rsa.GenerateKey(rand.Reader, 2048))(t)) })
}

// cannotImport shows that a declared inability is one.
func (s Suite) cannotImport(t *testing.T, alg hsm.Algorithm, secret hsm.Secret) bool {
	if !slices.Contains(s.Cannot, alg) && !slices.Contains(s.CannotImport, alg) {
		return false
	}
	store := s.Open(t)
	if _, err := store.Import(t.Context(), hsm.Spec{Name: "cannot", Algorithm: alg}, secret); !errors.Is(err, hsm.ErrUnsupported) {
		t.Errorf("importing is declared as unsupported, answers %v", err)
	}
	if _, err := store.Open(t.Context(), "cannot"); !errors.Is(err, hsm.ErrNotFound) {
		t.Errorf("a key that could not be imported opens: %v", err)
	}
	return true
}

func (s Suite) importMAC(t *testing.T) {
	secret := hsm.Secret("0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef")
	if s.cannotImport(t, hsm.HMACSHA256, secret) {
		return
	}
	store := s.Open(t)
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
}

func (s Suite) importPair(t *testing.T, alg hsm.Algorithm, priv crypto.Signer) {
	der := hsm.Secret(must(x509.MarshalPKCS8PrivateKey(priv))(t))
	if s.cannotImport(t, alg, der) {
		return
	}
	store := s.Open(t)
	name := "pair:" + string(alg)
	pair := must(store.Import(t.Context(), hsm.Spec{Name: name, Algorithm: alg}, der))(t)
	t.Cleanup(func() { _ = store.Delete(t.Context(), name) })
	signing := must(hsm.SigningKeyOf(must(s.Open(t).Open(t.Context(), name))(t)))(t)
	if !priv.Public().(interface{ Equal(crypto.PublicKey) bool }).Equal(signing.Public()) {
		t.Error("the imported pair has another public half")
	}
	Check(t, signing)
	if attr := must(pair.Attributes(t.Context()))(t); attr.Local || attr.Extractable || attr.NeverExtractable || !attr.Sensitive {
		t.Errorf("attributes of an imported pair: %+v", attr)
	}
	wrong := hsm.ECP384
	if alg == wrong {
		wrong = hsm.ECP256
	}
	if _, err := store.Import(t.Context(), hsm.Spec{Name: "wrong", Algorithm: wrong}, der); err == nil {
		t.Errorf("imported a key of algorithm %s as %s", alg, wrong)
	}
}

func (s Suite) agreement(t *testing.T) {
	store := s.Open(t)
	if s.NoAgreement {
		if _, err := store.Generate(t.Context(), hsm.Spec{Name: "cannot", Algorithm: hsm.ECP256, Usage: hsm.Agree}); !errors.Is(err, hsm.ErrUnsupported) {
			t.Errorf("agreement is declared as unsupported, answers %v", err)
		}
		return
	}
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
	if s.NoEphemeral {
		if _, err := store.Generate(t.Context(), hsm.Spec{Name: "cannot", Algorithm: hsm.ECP256, Ephemeral: true}); !errors.Is(err, hsm.ErrUnsupported) {
			t.Errorf("keys in memory are declared as unsupported, answers %v", err)
		}
		return
	}
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

// wrap moves keys from one name to another under an AES key.
func (s Suite) wrap(t *testing.T) {
	store := s.Open(t)
	wrapper, ok := store.(hsm.Wrapper)
	unwrapper, ok2 := store.(hsm.Unwrapper)
	if !ok || !ok2 {
		if !slices.Contains(s.Cannot, hsm.AES256) {
			t.Error("the store makes AES keys and wraps nothing")
		}
		return
	}
	made := func(t *testing.T, spec hsm.Spec) hsm.Key {
		t.Helper()
		k := must(store.Generate(t.Context(), spec))(t)
		t.Cleanup(func() { _ = store.Delete(t.Context(), spec.Name) })
		return k
	}
	if s.NoWrap {
		pair := made(t, hsm.Spec{Name: "pair", Algorithm: hsm.ECP256})
		if _, err := wrapper.WrapKey(t.Context(), pair, pair); !errors.Is(err, hsm.ErrUnsupported) {
			t.Errorf("wrapping is declared as unsupported, answers %v", err)
		}
		if _, err := unwrapper.UnwrapKey(t.Context(), pair, hsm.Spec{Name: "cannot"}, hsm.WrappedKey{Format: hsm.WrappedFormat, Algorithm: hsm.HMACSHA256, Usage: hsm.MAC, Wrapped: make([]byte, 40)}); !errors.Is(err, hsm.ErrUnsupported) {
			t.Errorf("unwrapping is declared as unsupported, answers %v", err)
		}
		return
	}
	wrapping, other := made(t, hsm.Spec{Name: "wrapping", Algorithm: hsm.AES256}), made(t, hsm.Spec{Name: "wrapping:other", Algorithm: hsm.AES256})
	stays := made(t, hsm.Spec{Name: "stays", Algorithm: hsm.ECP256})
	if _, err := wrapper.WrapKey(t.Context(), wrapping, stays); !errors.Is(err, hsm.ErrUnsupported) {
		t.Errorf("a key that was not made extractable: %v", err)
	}
	if _, err := wrapper.WrapKey(t.Context(), stays, wrapping); !errors.Is(err, hsm.ErrUnsupported) {
		t.Errorf("wrapping with a key pair: %v", err)
	}
	for _, alg := range []hsm.Algorithm{hsm.ECP256, hsm.ECP384, hsm.ECP521, hsm.RSA2048, hsm.Ed25519, hsm.HMACSHA256} {
		if slices.Contains(s.Cannot, alg) {
			continue
		}
		t.Run(string(alg), func(t *testing.T) {
			from, to := "from:"+string(alg), "to:"+string(alg)
			key := made(t, hsm.Spec{Name: from, Algorithm: alg, Extractable: true})
			if attr := must(key.Attributes(t.Context()))(t); !attr.Sensitive || !attr.Extractable || attr.NeverExtractable {
				t.Errorf("attributes of an extractable key: %+v", attr)
			}
			if slices.Contains(s.CannotWrap, alg) {
				if _, err := wrapper.WrapKey(t.Context(), wrapping, key); !errors.Is(err, hsm.ErrUnsupported) {
					t.Errorf("wrapping is declared as unsupported, answers %v", err)
				}
				return
			}
			wrapped := must(wrapper.WrapKey(t.Context(), wrapping, key))(t)
			t.Cleanup(func() { _ = store.Delete(t.Context(), to) })
			for name, bad := range map[string]func(w *hsm.WrappedKey) hsm.Key{
				"damaged":         func(w *hsm.WrappedKey) hsm.Key { w.Wrapped[9] ^= 1; return wrapping },
				"cut":             func(w *hsm.WrappedKey) hsm.Key { w.Wrapped = w.Wrapped[:len(w.Wrapped)-8]; return wrapping },
				"empty":           func(w *hsm.WrappedKey) hsm.Key { w.Wrapped = nil; return wrapping },
				"another format":  func(w *hsm.WrappedKey) hsm.Key { w.Format = "ROT-13"; return wrapping },
				"another key":     func(w *hsm.WrappedKey) hsm.Key { return other },
				"of another kind": func(w *hsm.WrappedKey) hsm.Key { w.Algorithm = hsm.RSA3072; return wrapping },
			} {
				w := wrapped
				w.Wrapped = bytes.Clone(wrapped.Wrapped)
				with := bad(&w)
				if _, err := unwrapper.UnwrapKey(t.Context(), with, hsm.Spec{Name: to}, w); err == nil {
					t.Errorf("%s: unwrapped", name)
				}
				if _, err := store.Open(t.Context(), to); !errors.Is(err, hsm.ErrNotFound) {
					t.Fatalf("%s left a key: %v", name, err)
				}
			}
			back := must(unwrapper.UnwrapKey(t.Context(), wrapping, hsm.Spec{Name: to}, wrapped))(t)
			if _, err := unwrapper.UnwrapKey(t.Context(), wrapping, hsm.Spec{Name: to}, wrapped); !errors.Is(err, hsm.ErrExists) {
				t.Errorf("unwrapped twice under one name: %v", err)
			}
			if attr := must(back.Attributes(t.Context()))(t); attr.Extractable || attr.Local || !attr.Sensitive || attr.NeverExtractable {
				t.Errorf("attributes of an unwrapped key: %+v", attr)
			}
			again := must(s.Open(t).Open(t.Context(), to))(t)
			if alg == hsm.HMACSHA256 {
				x := must(must(hsm.MACKeyOf(key))(t).MAC(t.Context(), nil, []byte("data")))(t)
				if y := must(must(hsm.MACKeyOf(again))(t).MAC(t.Context(), nil, []byte("data")))(t); !bytes.Equal(x, y) {
					t.Error("the unwrapped key computes another HMAC")
				}
				return
			}
			signing := must(hsm.SigningKeyOf(again))(t)
			if !must(hsm.SigningKeyOf(key))(t).Public().(interface{ Equal(crypto.PublicKey) bool }).Equal(signing.Public()) {
				t.Error("the unwrapped pair has another public half")
			}
			Check(t, signing)
			// A public half that is not this key's.
			forged := wrapped
			if forged.Public = must(publicOf(stays))(t); alg == hsm.ECP256 {
				if _, err := unwrapper.UnwrapKey(t.Context(), wrapping, hsm.Spec{Name: "forged"}, forged); err == nil {
					t.Error("a key was unwrapped with another's public half")
				}
				if _, err := store.Open(t.Context(), "forged"); !errors.Is(err, hsm.ErrNotFound) {
					t.Errorf("the forged pair was left: %v", err)
				}
			}
		})
	}
}

func publicOf(k hsm.Key) ([]byte, error) {
	s, err := hsm.SigningKeyOf(k)
	if err != nil {
		return nil, err
	}
	return x509.MarshalPKIXPublicKey(s.Public())
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
