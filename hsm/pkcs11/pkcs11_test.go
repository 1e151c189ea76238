//go:build cgo

package pkcs11

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"io"
	"math/big"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/hsmtest"
)

func pin(p string, asked *int) func(context.Context) (hsm.Secret, error) {
	return func(context.Context) (hsm.Secret, error) {
		if asked != nil {
			*asked++
		}
		return hsm.Secret(p), nil
	}
}

func open(t testing.TB, uri hsm.URI) *Store {
	t.Helper()
	s, err := Open(t.Context(), Config{URI: uri, PIN: pin(hsmtest.PIN, nil)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// The four modules, and what each cannot do: hsmtest sees to it that it says so.

func TestContract(t *testing.T) {
	uri := hsmtest.SoftHSM(t, "line-3")
	hsmtest.Run(t, hsmtest.Suite{
		Hardware: true, Open: func(t *testing.T) hsm.Store { return open(t, uri) },
		CannotWrap: []hsm.Algorithm{hsm.Ed25519}, // CKR_KEY_NOT_WRAPPABLE
	})
}

func TestContractNSS(t *testing.T) {
	uri := hsmtest.NSS(t, "line-3")
	hsmtest.Run(t, hsmtest.Suite{
		Hardware: true, Open: func(t *testing.T) hsm.Store { return open(t, uri) },
		Cannot: []hsm.Algorithm{hsm.Ed25519},
		// Its database does not keep CKA_LOCAL.
		Vouches: func(_ hsm.Algorithm, a *hsm.Attributes) { a.Local = false },
	})
}

func TestContractTPM2(t *testing.T) {
	uri, _ := hsmtest.TPM2(t, "line-3")
	hsmtest.Run(t, hsmtest.Suite{
		Hardware: true, Open: func(t *testing.T) hsm.Store { return open(t, uri) },
		// It makes no secret keys that authenticate or wrap, and takes in no keys that were made elsewhere.
		// It writes the length of a P-521 point, 133, into one octet of DER, cannot read that itself, and so cannot sign.
		Cannot:       []hsm.Algorithm{hsm.ECP521, hsm.RSA4096, hsm.Ed25519, hsm.HMACSHA256, hsm.AES256},
		CannotImport: hsm.Algorithms,
		NoAgreement:  true, NoEphemeral: true, NoWrap: true,
	})
}

// bridged is what p11-kit 0.24 does not carry: mechanisms with parameters that it does not know, and those of PKCS#11 3.0.
func bridged(t *testing.T, uri hsm.URI) {
	hsmtest.Run(t, hsmtest.Suite{
		Hardware: true, Open: func(t *testing.T) hsm.Store { return open(t, uri) },
		Cannot:      []hsm.Algorithm{hsm.Ed25519, hsm.AES256},
		NoAgreement: true, NoWrap: true,
	})
}

func TestContractP11Kit(t *testing.T) {
	uri, _ := hsmtest.P11Kit(t, hsmtest.SoftHSM(t, "line-3"))
	bridged(t, uri)
}

func TestContractOutOfProcess(t *testing.T) {
	uri := hsmtest.SoftHSM(t, "line-3")
	uri.ModulePath = "p11-kit:" + uri.ModulePath
	bridged(t, uri)
}

func TestToken(t *testing.T) {
	uri := hsmtest.SoftHSM(t, "line-3", "twin", "twin")
	if _, err := Open(t.Context(), Config{URI: hsm.URI{Scheme: hsm.SchemePKCS11, Token: "twin", ModulePath: uri.ModulePath}}); err == nil || !strings.Contains(err.Error(), "2 tokens match") {
		t.Errorf("two tokens of one label: %v", err)
	}
	other := uri
	other.Token = "nobody"
	if _, err := Open(t.Context(), Config{URI: other, PIN: pin("x", nil)}); !errors.Is(err, hsm.ErrNotFound) || !strings.Contains(err.Error(), `"line-3"`) {
		t.Errorf("no such token: %v", err)
	}
	other.ModulePath = "/nowhere/lib.so"
	if _, err := Open(t.Context(), Config{URI: other}); !errors.Is(err, hsm.ErrNotFound) {
		t.Errorf("no such module: %v", err)
	}
	// By serial as well.
	s := open(t, uri)
	info, err := s.mod.ctx.GetTokenInfo(s.slot)
	if err != nil {
		t.Fatal(err)
	}
	open(t, hsm.URI{Scheme: hsm.SchemePKCS11, Serial: trim(info.SerialNumber), ModulePath: uri.ModulePath})
}

func TestWrongPINIsTriedOnce(t *testing.T) {
	uri := hsmtest.SoftHSM(t, "line-3")
	asked := 0
	_, err := Open(t.Context(), Config{URI: uri, PIN: pin("0000", &asked)})
	if !errors.Is(err, hsm.ErrPINIncorrect) || asked != 1 {
		t.Errorf("asked %d times: %v", asked, err)
	}
	if err != nil && strings.Contains(err.Error(), "0000") {
		t.Errorf("the PIN is in the error: %v", err)
	}
	var vendor pkcs11.Error
	if !errors.As(err, &vendor) || vendor != pkcs11.CKR_PIN_INCORRECT {
		t.Errorf("the vendor's answer is lost: %v", err)
	}
	// The flags decide before any PIN is sent.
	for flags, want := range map[uint]error{
		pkcs11.CKF_USER_PIN_INITIALIZED:                                 nil,
		pkcs11.CKF_USER_PIN_INITIALIZED | pkcs11.CKF_USER_PIN_COUNT_LOW: nil,
		pkcs11.CKF_USER_PIN_INITIALIZED | pkcs11.CKF_USER_PIN_FINAL_TRY: hsm.ErrPINLocked,
		pkcs11.CKF_USER_PIN_INITIALIZED | pkcs11.CKF_USER_PIN_LOCKED:    hsm.ErrPINLocked,
		0: hsm.ErrPINIncorrect,
	} {
		if err := mayLogin(flags); !errors.Is(err, want) {
			t.Errorf("flags %x: %v, want %v", flags, err, want)
		}
	}
}

// A lost session, a lost login, a restarted module: the next operation finds the token again, and objects too.
func TestRecovery(t *testing.T) {
	uri := hsmtest.SoftHSM(t, "line-3")
	s := open(t, uri)
	key, err := s.Generate(t.Context(), hsm.Spec{Name: "signer", Algorithm: hsm.ECP256})
	if err != nil {
		t.Fatal(err)
	}
	throwAway, err := s.Generate(t.Context(), hsm.Spec{Name: "throw-away", Algorithm: hsm.ECP256, Ephemeral: true})
	if err != nil {
		t.Fatal(err)
	}
	signing, _ := hsm.SigningKeyOf(key)
	for name, harm := range map[string]func() error{
		"sessions closed": func() error { return s.mod.ctx.CloseAllSessions(s.slot) },
		"logged out":      func() error { return s.mod.ctx.Logout(s.keeper) },
		"module restarted": func() error {
			return errors.Join(s.mod.ctx.Finalize(), s.mod.ctx.Initialize())
		},
		"module ended": func() error { return s.mod.ctx.Finalize() },
	} {
		t.Run(name, func(t *testing.T) {
			if err := harm(); err != nil {
				t.Fatal(err)
			}
			hsmtest.Check(t, signing)
			if err := harm(); err != nil {
				t.Fatal(err)
			}
			made, err := s.Generate(t.Context(), hsm.Spec{Name: "after:" + strings.ReplaceAll(name, " ", "-"), Algorithm: hsm.ECP256})
			if err != nil {
				t.Fatalf("Generate: %v", err)
			}
			again, _ := hsm.SigningKeyOf(made)
			hsmtest.Check(t, again)
		})
	}
	if k, _ := hsm.SigningKeyOf(throwAway); k != nil {
		digest := sha256.Sum256(nil)
		if _, err := k.Sign(rand.Reader, digest[:], crypto.SHA256); !errors.Is(err, hsm.ErrLost) {
			t.Errorf("a session key of a lost session: %v", err)
		}
	}
	names := map[string]int{}
	keys, err := s.List(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range keys {
		names[k.Name()]++
	}
	for name, n := range names {
		if n != 1 {
			t.Errorf("%d keys are called %s", n, name)
		}
	}
}

// A PIN that was changed while the token was away is tried once, and then no more.
func TestChangedPIN(t *testing.T) {
	uri := hsmtest.SoftHSM(t, "line-3")
	s := open(t, uri)
	key, err := s.Generate(t.Context(), hsm.Spec{Name: "signer", Algorithm: hsm.ECP256})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.mod.ctx.SetPIN(s.keeper, hsmtest.PIN, "8888"); err != nil {
		t.Fatal(err)
	}
	if err := s.mod.ctx.CloseAllSessions(s.slot); err != nil {
		t.Fatal(err)
	}
	signing, _ := hsm.SigningKeyOf(key)
	digest := sha256.Sum256(nil)
	for range 3 {
		if _, err := signing.Sign(rand.Reader, digest[:], crypto.SHA256); !errors.Is(err, hsm.ErrPINIncorrect) {
			t.Errorf("after the PIN was changed: %v", err)
		}
	}
	if s.refused == nil {
		t.Error("the refusal is not remembered: the PIN would be tried again")
	}
}

// A token's signature comes out as DER that the standard library reads back to the same numbers, or not at all.
func FuzzECDSASignature(f *testing.F) {
	f.Add(make([]byte, 64))
	f.Add([]byte{0x80, 1, 0, 2})
	f.Fuzz(func(t *testing.T, sig []byte) {
		der, err := ecdsaASN1(sig)
		if err != nil {
			return
		}
		var v struct{ R, S *big.Int }
		rest, err := asn1.Unmarshal(der, &v)
		half := len(sig) / 2
		if err != nil || len(rest) != 0 || v.R.Cmp(new(big.Int).SetBytes(sig[:half])) != 0 || v.S.Cmp(new(big.Int).SetBytes(sig[half:])) != 0 {
			t.Fatalf("% x became % x: %v", sig, der, err)
		}
	})
}

// A token's public key comes out as a point of its curve, or not at all.
func FuzzPoint(f *testing.F) {
	f.Add(oidP256, append([]byte{4}, make([]byte, 64)...))
	f.Add(oidP521, []byte{2, 1})
	f.Add(oidEd25519, append([]byte{4, 32}, make([]byte, 32)...))
	f.Add(ed25519Name, make([]byte, 32))
	f.Fuzz(func(t *testing.T, params, point []byte) {
		pub, err := parsePoint(params, point)
		if err != nil {
			return
		}
		der, err := x509.MarshalPKIXPublicKey(pub)
		if err != nil {
			t.Fatalf("% x % x: %v", params, point, err)
		}
		if _, err := x509.ParsePKIXPublicKey(der); err != nil {
			t.Fatalf("% x % x: %v", params, point, err)
		}
	})
}

// The cost over a bare C_Sign on the same token.
func BenchmarkSign(b *testing.B) {
	uri := hsmtest.SoftHSM(b, "bench")
	s := open(b, uri)
	key, err := s.Generate(b.Context(), hsm.Spec{Name: "k", Algorithm: hsm.ECP256})
	if err != nil {
		b.Fatal(err)
	}
	k := key.(*signingKey)
	digest := sha256.Sum256(nil)
	b.Run("ours", func(b *testing.B) {
		for b.Loop() {
			if _, err := k.Sign(nil, digest[:], crypto.SHA256); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("bare", func(b *testing.B) {
		h, err := s.mod.ctx.OpenSession(s.slot, pkcs11.CKF_SERIAL_SESSION)
		if err != nil {
			b.Fatal(err)
		}
		o := k.object.Load().handle
		for b.Loop() {
			if err := s.mod.ctx.SignInit(h, mechECDSA, o); err != nil {
				b.Fatal(err)
			}
			if _, err := s.mod.ctx.Sign(h, digest[:]); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// Throw-away keys leave nothing behind: objects of sessions would pile up for as long as a station works.
func TestThrowAway(t *testing.T) {
	s := open(t, hsmtest.SoftHSM(t, "line-3"))
	const keys = 500
	for i := range keys {
		k, err := s.Generate(t.Context(), hsm.Spec{Name: "throw-away", Algorithm: hsm.ECP256, Ephemeral: true})
		if err != nil {
			t.Fatal(err)
		}
		if i%2 == 0 {
			if err := errors.Join(k.(io.Closer).Close(), k.(io.Closer).Close()); err != nil {
				t.Fatal(err)
			}
		}
	}
	kept, err := s.Generate(t.Context(), hsm.Spec{Name: "kept", Algorithm: hsm.ECP256, Ephemeral: true})
	if err != nil {
		t.Fatal(err)
	}
	left := keys
	for try := 0; try < 100 && left > keys/10; try++ {
		runtime.GC()
		time.Sleep(10 * time.Millisecond)
		err := s.with(t.Context(), true, func(h pkcs11.SessionHandle) error {
			found, err := s.find(h, pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false))
			left = len(found)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if left > keys/10 {
		t.Errorf("%d objects of %d throw-away keys are left", left, keys)
	}
	hsmtest.Check(t, kept.(hsm.SigningKey)) // one that somebody still has is not touched
}
