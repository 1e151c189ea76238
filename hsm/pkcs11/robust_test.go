//go:build cgo

package pkcs11

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/hsmtest"
)

// With a session table that others have filled, operations wait for one another instead of failing.
func TestSessionTableFull(t *testing.T) {
	uri, _ := hsmtest.TPM2(t, "line-3") // it has 1,024
	s := open(t, uri)
	k, err := s.Generate(t.Context(), hsm.Spec{Name: "signer", Algorithm: hsm.ECP256})
	if err != nil {
		t.Fatal(err)
	}
	key := k.(hsm.SigningKey)
	var taken []pkcs11.SessionHandle
	fill := func() {
		t.Helper()
		for {
			h, err := s.mod.ctx.OpenSession(s.slot, pkcs11.CKF_SERIAL_SESSION)
			if is(err, pkcs11.CKR_SESSION_COUNT) {
				return
			}
			if err != nil || len(taken) > 5000 {
				t.Fatalf("after %d sessions: %v", len(taken), err)
			}
			taken = append(taken, h)
		}
	}
	fill()
	many := func() {
		t.Helper()
		var wg sync.WaitGroup
		for range 24 {
			wg.Go(func() { hsmtest.Check(t, key) })
		}
		wg.Wait()
	}
	many()
	if s.shrunk == 0 {
		t.Error("the pool did not shrink: the table was not full")
	}
	// Not even one session but the one that holds the login.
	s.mu.Lock()
	for _, h := range s.idle {
		_ = s.mod.ctx.CloseSession(h)
	}
	s.idle = nil
	s.mu.Unlock()
	fill()
	many()
	// Others end: after the next loss the pool is whole again.
	for _, h := range taken {
		_ = s.mod.ctx.CloseSession(h)
	}
	if err := s.mod.ctx.CloseAllSessions(s.slot); err != nil {
		t.Fatal(err)
	}
	many()
	if s.shrunk != 0 {
		t.Errorf("%d sessions are still withheld", s.shrunk)
	}
}

// A session that was left in the middle of something is closed, and the operation done in another.
func TestBusySession(t *testing.T) {
	s := open(t, hsmtest.SoftHSM(t, "line-3"))
	k, err := s.Generate(t.Context(), hsm.Spec{Name: "signer", Algorithm: hsm.ECP256})
	if err != nil {
		t.Fatal(err)
	}
	generation := s.generation.Load()
	for range 3 {
		if len(s.idle) != 1 {
			t.Fatalf("%d idle sessions", len(s.idle))
		}
		busy := s.idle[0]
		if err := s.mod.ctx.FindObjectsInit(busy, nil); err != nil {
			t.Fatal(err)
		}
		hsmtest.Check(t, k.(hsm.SigningKey))
		if len(s.idle) != 1 || s.idle[0] == busy {
			t.Error("the busy session is kept")
		}
	}
	if s.generation.Load() != generation {
		t.Error("the token was taken for lost")
	}
}

// A session that was ended behind our back, and whose number another one has got, has not what was begun in it.
func TestSessionOfAnother(t *testing.T) {
	s := open(t, hsmtest.SoftHSM(t, "line-3"))
	k, err := s.Generate(t.Context(), hsm.Spec{Name: "signer", Algorithm: hsm.ECP256})
	if err != nil {
		t.Fatal(err)
	}
	key, tries := k.(*signingKey), 0
	err = key.use(t.Context(), func(h pkcs11.SessionHandle, o pkcs11.ObjectHandle) error {
		if tries++; tries > 1 { // as the key does it
			return s.mod.ctx.SignInit(h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_ECDSA, nil)}, o)
		}
		_, err := s.mod.ctx.Sign(h, make([]byte, 32))
		return err
	})
	if err != nil || tries != 2 {
		t.Errorf("after %d tries: %v", tries, err)
	}
	hsmtest.Check(t, key)
}

// More keys than a TPM has room for, one after the other and all at once.
func TestMoreKeysThanTheTPMHolds(t *testing.T) {
	uri, _ := hsmtest.TPM2(t, "line-3")
	s := open(t, uri)
	var keys []hsm.SigningKey
	for i := range 8 {
		k, err := s.Generate(t.Context(), hsm.Spec{Name: fmt.Sprintf("device:%d", i), Algorithm: hsm.ECP256})
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, k.(hsm.SigningKey))
	}
	for range 2 {
		for _, k := range keys {
			hsmtest.Check(t, k)
		}
	}
	for i := range keys {
		if err := s.Delete(t.Context(), keys[i].Name()); err != nil {
			t.Error(err)
		}
	}
}

// The TPM goes away under tpm2-pkcs11 and comes back.
func TestTPMKilledInABatch(t *testing.T) {
	uri, tpm := hsmtest.TPM2(t, "line-3")
	s, err := Open(t.Context(), Config{URI: uri, PIN: pin(hsmtest.PIN, nil), Patience: 20 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for i := range 40 {
		if i%10 == 5 {
			tpm.Kill()
			tpm.Start()
		}
		k, err := s.Generate(t.Context(), hsm.Spec{Name: fmt.Sprintf("device:%03d", i), Algorithm: hsm.ECP256})
		if err != nil {
			t.Fatalf("key %d: %v", i, err)
		}
		hsmtest.Check(t, k.(hsm.SigningKey))
	}
	orphans(t, s, 40)
}

// A module whose path names something else.
func TestNoModule(t *testing.T) {
	dir := t.TempDir()
	text := filepath.Join(dir, "text.so")
	if err := os.WriteFile(text, bytes.Repeat([]byte("text\n"), 1000), 0o700); err != nil {
		t.Fatal(err)
	}
	libc := firstFile("/lib/*/libz.so.1", "/lib/*/libm.so.6", "/lib64/libm.so.6", "/usr/lib/*/libm.so.6")
	for path, want := range map[string]string{text: "invalid ELF header", dir: "cannot read file data", libc: "without C_GetFunctionList"} {
		_, err := Open(t.Context(), Config{URI: hsm.URI{Scheme: hsm.SchemePKCS11, Token: "x", ModulePath: path}})
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", path, err)
		}
	}
	// NSS wants parameters.
	uri := hsmtest.NSS(t, "line-3")
	uri.InitArgs = ""
	if _, err := Open(t.Context(), Config{URI: uri, PIN: pin(hsmtest.PIN, nil)}); err == nil {
		t.Error("NSS opens without its parameters")
	} else if _, try, ok := Explain(err); !ok || !strings.Contains(try, "x-init-reserved") {
		t.Errorf("NSS without its parameters: %v (%s)", err, try)
	}
}

// An answer of the token is shown by its name, with what it means here and what to try.
func TestExplain(t *testing.T) {
	uri := hsmtest.SoftHSM(t, "line-3")
	_, err := Open(t.Context(), Config{URI: uri, PIN: pin("wrong", nil)})
	meaning, try, ok := Explain(err)
	if !ok || !strings.Contains(err.Error(), "CKR_PIN_INCORRECT") || !strings.Contains(err.Error(), meaning) || !strings.Contains(try, "lock") {
		t.Errorf("%v: %q, %q", err, meaning, try)
	}
	if _, _, ok := Explain(errors.New("something")); ok {
		t.Error("explained what no token said")
	}
	if err := explained(explained(pkcs11.Error(pkcs11.CKR_PIN_LOCKED))); strings.Count(err.Error(), "locked") != 1 {
		t.Errorf("explained twice: %v", err)
	}
	for code, m := range meanings {
		if m.meaning == "" || m.try == "" || strings.HasPrefix(pkcs11.Error(code).Error(), "pkcs11: 0x0:") {
			t.Errorf("%s: %q, %q", pkcs11.Error(code), m.meaning, m.try)
		}
	}
}

// Names that are not there, with those that are near.
func TestNearNames(t *testing.T) {
	uri := hsmtest.SoftHSM(t, "line-3", "other")
	wrong := uri
	wrong.Token = "line3"
	if _, err := Open(t.Context(), Config{URI: wrong, PIN: pin("x", nil)}); err == nil || !strings.Contains(err.Error(), `did you mean "line-3"?`) {
		t.Errorf("token: %v", err)
	}
	s := open(t, uri)
	for _, n := range []string{"station", "issuing", "root"} {
		if _, err := s.Generate(t.Context(), hsm.Spec{Name: n, Algorithm: hsm.ECP256}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Open(t.Context(), "Staton"); !errors.Is(err, hsm.ErrNotFound) || !strings.Contains(err.Error(), `did you mean "station"?`) {
		t.Errorf("key: %v", err)
	}
	if _, err := s.Open(t.Context(), "quite-another"); !errors.Is(err, hsm.ErrNotFound) || strings.Contains(err.Error(), "did you mean") {
		t.Errorf("key: %v", err)
	}
}

// Keys that others made: two of one name, of a kind that is not used here, without their public half.
func TestForeignKeys(t *testing.T) {
	uri := hsmtest.SoftHSM(t, "line-3")
	s := open(t, uri)
	raw := func(label string, id byte, mech uint, private ...*pkcs11.Attribute) (pub, priv pkcs11.ObjectHandle) {
		t.Helper()
		public := []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_LABEL, label), pkcs11.NewAttribute(pkcs11.CKA_ID, []byte{id})}
		if mech == pkcs11.CKM_EC_KEY_PAIR_GEN {
			public = append(public, pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, oidP256))
		} else {
			public = append(public, pkcs11.NewAttribute(pkcs11.CKA_MODULUS_BITS, 2048), pkcs11.NewAttribute(pkcs11.CKA_PUBLIC_EXPONENT, []byte{1, 0, 1}))
		}
		private = append(private, pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_LABEL, label), pkcs11.NewAttribute(pkcs11.CKA_ID, []byte{id}), pkcs11.NewAttribute(pkcs11.CKA_SIGN, true))
		pub, priv, err := s.mod.ctx.GenerateKeyPair(s.keeper, []*pkcs11.Mechanism{pkcs11.NewMechanism(mech, nil)}, public, private)
		if err != nil {
			t.Fatal(err)
		}
		return pub, priv
	}
	raw("twin", 1, pkcs11.CKM_EC_KEY_PAIR_GEN)
	raw("twin", 2, pkcs11.CKM_EC_KEY_PAIR_GEN)
	rsaPub, _ := raw("rsa", 3, pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN)
	lostPub, _ := raw("lost", 4, pkcs11.CKM_EC_KEY_PAIR_GEN)
	certPub, _ := raw("cert", 5, pkcs11.CKM_EC_KEY_PAIR_GEN)
	public, err := s.publicKey(s.keeper, certPub)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.mod.ctx.GenerateKey(s.keeper, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_DES3_KEY_GEN, nil)}, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_LABEL, "des")}); err != nil {
		t.Fatal(err)
	}
	// A certificate for the key whose public half goes.
	ca, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "cert"}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, public, ca)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.mod.ctx.CreateObject(s.keeper, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_CERTIFICATE), pkcs11.NewAttribute(pkcs11.CKA_CERTIFICATE_TYPE, pkcs11.CKC_X_509), pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
		pkcs11.NewAttribute(pkcs11.CKA_ID, []byte{5}), pkcs11.NewAttribute(pkcs11.CKA_SUBJECT, []byte("x")), pkcs11.NewAttribute(pkcs11.CKA_VALUE, der)}); err != nil {
		t.Fatal(err)
	}
	if err := s.destroy(s.keeper, rsaPub, lostPub, certPub); err != nil {
		t.Fatal(err)
	}

	s = open(t, uri) // as another process would
	if _, err := s.Open(t.Context(), "twin"); err == nil || !strings.Contains(err.Error(), "2 keys on the token have that name") {
		t.Errorf("two keys of one name: %v", err)
	}
	if _, err := s.Generate(t.Context(), hsm.Spec{Name: "twin", Algorithm: hsm.ECP256}); !errors.Is(err, hsm.ErrExists) {
		t.Errorf("a third: %v", err)
	}
	if _, err := s.Open(t.Context(), "des"); !errors.Is(err, hsm.ErrUnsupported) {
		t.Errorf("a DES key: %v", err)
	}
	for _, name := range []string{"rsa", "cert"} {
		k, err := s.Open(t.Context(), name)
		if err != nil {
			t.Errorf("%s, without its public key object: %v", name, err)
			continue
		}
		hsmtest.Check(t, k.(hsm.SigningKey))
	}
	if _, err := s.Open(t.Context(), "lost"); !errors.Is(err, hsm.ErrUnsupported) || !strings.Contains(err.Error(), "no public key") {
		t.Errorf("without a public half anywhere: %v", err)
	}
	k, err := s.Open(t.Context(), "rsa")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := hsm.MACKeyOf(k); !errors.Is(err, hsm.ErrUnsupported) {
		t.Errorf("an RSA key as an HMAC key: %v", err)
	}
}

// What the token announces is what the suite finds it can do.
func TestCapabilities(t *testing.T) {
	can := func(s *Store) (made []hsm.Algorithm, others []string) {
		t.Helper()
		all, err := s.Capabilities(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range all {
			if len(c.Mechanisms) == 0 {
				t.Errorf("%s %s names no mechanism", c.Operation, c.Algorithm)
			}
			switch {
			case c.Operation == "make" && c.Can:
				made = append(made, c.Algorithm)
			case c.Operation == "agree" || c.Operation == "wrap" || c.Operation == "mac":
				others = append(others, fmt.Sprintf("%s %t", c.Operation, c.Can))
			}
			if c.Operation == "sign" && c.Algorithm == hsm.RSA2048 && c.Fallback != "" {
				others = append(others, c.Fallback)
			}
		}
		return made, others
	}
	made, others := can(open(t, hsmtest.SoftHSM(t, "line-3")))
	if !slices.Equal(made, hsm.Algorithms) || !slices.Equal(others, []string{"agree true", "mac true", "wrap true"}) {
		t.Errorf("SoftHSM: %v %v", made, others)
	}
	uri, _ := hsmtest.TPM2(t, "line-4")
	made, others = can(open(t, uri))
	if !slices.Equal(made, []hsm.Algorithm{hsm.ECP256, hsm.ECP384, hsm.ECP521, hsm.RSA2048, hsm.RSA3072, hsm.AES256}) ||
		!slices.Equal(others, []string{"agree false", "PSS is padded outside, for raw CKM_RSA_X_509", "mac true", "wrap false"}) {
		t.Errorf("tpm2-pkcs11: %v %v", made, others)
	}
}

// A token that refuses attributes is asked with fewer.
func TestTemplates(t *testing.T) {
	spec := hsm.Spec{Name: "k", Algorithm: hsm.ECP256, Usage: hsm.Sign}
	has := func(attrs []*pkcs11.Attribute, typ uint) bool {
		return slices.ContainsFunc(attrs, func(a *pkcs11.Attribute) bool { return a.Type == typ })
	}
	for level, want := range map[int][3]bool{fullTemplate: {true, true, true}, terseTemplate: {true, true, false}, leanTemplate: {true, false, false}} {
		attrs := privateTemplate(level, spec, []byte{1})
		if got := [3]bool{has(attrs, pkcs11.CKA_SIGN), has(attrs, pkcs11.CKA_SENSITIVE), has(attrs, pkcs11.CKA_DERIVE)}; got != want {
			t.Errorf("level %d: sign, sensitive, derive %v", level, got)
		}
	}
	s := open(t, hsmtest.SoftHSM(t, "line-3"))
	// A module that takes the lean template only; SoftHSM then makes the key, as it likes.
	s.mod.enter()
	defer s.mod.leave()
	tried := 0
	make := func(stays bool) func(int) (pkcs11.ObjectHandle, pkcs11.ObjectHandle, error) {
		return func(level int) (priv, pub pkcs11.ObjectHandle, err error) {
			if tried++; level < leanTemplate {
				return 0, 0, pkcs11.Error(pkcs11.CKR_ATTRIBUTE_READ_ONLY)
			}
			pub, priv, err = s.mod.ctx.GenerateKeyPair(s.keeper, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_EC_KEY_PAIR_GEN, nil)},
				append(publicTemplate(level, spec, []byte{1}), pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, oidP256)),
				append(privateTemplate(level, spec, []byte{1}), pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, stays)))
			return priv, pub, err
		}
	}
	if _, _, err := s.byTemplate(s.keeper, spec, make(false)); !errors.Is(err, hsm.ErrUnsupported) || tried != 3 {
		t.Errorf("a token whose keys can be read, after %d templates: %v", tried, err)
	}
	if left, err := s.find(s.keeper, pkcs11.NewAttribute(pkcs11.CKA_ID, []byte{1})); err != nil || len(left) != 0 {
		t.Errorf("%d objects left of it, %v", len(left), err)
	}
	tried = 0
	for range 2 {
		if _, _, err := s.byTemplate(s.keeper, spec, make(true)); err != nil {
			t.Error(err)
		}
	}
	if tried != 4 {
		t.Errorf("%d tries: the template that works is not remembered", tried)
	}
}

// Points in the forms that tokens give them in.
func TestPoints(t *testing.T) {
	for _, curve := range []elliptic.Curve{elliptic.P256(), elliptic.P384(), elliptic.P521()} {
		// Until the rare ones were there: coordinates that begin with zero, bare points that look like an OCTET STRING.
		for short, alike := 0, 0; short < 2 || alike < 2; {
			priv, err := ecdsa.GenerateKey(curve, rand.Reader)
			if err != nil {
				t.Fatal(err)
			}
			full, err := priv.PublicKey.Bytes()
			if err != nil {
				t.Fatal(err)
			}
			size := len(full) / 2
			x, y := full[1:1+size], full[1+size:]
			compressed := append([]byte{2 | y[size-1]&1}, x...)
			stripped := slices.Concat([]byte{4}, bytes.TrimLeft(x, "\x00"), bytes.TrimLeft(y, "\x00"))
			if len(stripped) < len(full) {
				short++
			}
			if size := byte(len(full) - 2); full[1] == size || curve == elliptic.P521() { // P-521's is too long to look so
				alike++
			}
			oid := curveOID(algorithmOfCurve(curve))
			wrapped, err := asn1.Marshal(full)
			if err != nil {
				t.Fatal(err)
			}
			for name, point := range map[string][]byte{"OCTET STRING": wrapped, "uncompressed": full, "compressed": compressed, "stripped": stripped} {
				pub, err := parsePoint(oid, point)
				if err != nil || !priv.PublicKey.Equal(pub) {
					t.Fatalf("%s %s %x: %v", curve.Params().Name, name, point, err)
				}
			}
			if _, err := parsePoint(oid, full[:len(full)-1]); err == nil && x[0] != 0 && y[size-1] != 0 {
				t.Fatal("a point that was cut parses")
			}
		}
	}
}

// Extractable keys leave a token wrapped and work in another; others do not.
func TestWrapToAnotherToken(t *testing.T) {
	soft, nss := open(t, hsmtest.SoftHSM(t, "line-3")), open(t, hsmtest.NSS(t, "line-4"))
	secret := hsm.Secret(bytes.Repeat([]byte("w"), 32))
	wrapping := func(s *Store) hsm.Key {
		t.Helper()
		k, err := s.Import(t.Context(), hsm.Spec{Name: "wrapping", Algorithm: hsm.AES256}, secret)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	a, b := wrapping(soft), wrapping(nss)
	move := func(from, to *Store, with, there hsm.Key, name string, alg hsm.Algorithm) {
		t.Helper()
		k, err := from.Generate(t.Context(), hsm.Spec{Name: name, Algorithm: alg, Extractable: true})
		if err != nil {
			t.Fatal(err)
		}
		w, err := from.WrapKey(context.Background(), with, k)
		if err != nil {
			t.Fatal(err)
		}
		back, err := to.UnwrapKey(t.Context(), there, hsm.Spec{Name: name}, w)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if signing, ok := back.(hsm.SigningKey); ok {
			hsmtest.Check(t, signing)
			return
		}
		x, err := k.(hsm.MACKey).MAC(t.Context(), nil, []byte("data"))
		if err != nil {
			t.Fatal(err)
		}
		if y, err := back.(hsm.MACKey).MAC(t.Context(), nil, []byte("data")); err != nil || !bytes.Equal(x, y) {
			t.Errorf("%s computes another HMAC: %v", name, err)
		}
	}
	for _, alg := range []hsm.Algorithm{hsm.ECP256, hsm.RSA2048, hsm.HMACSHA256} {
		move(soft, nss, a, b, "to-nss:"+string(alg), alg)
		move(nss, soft, b, a, "to-softhsm:"+string(alg), alg)
	}
	if _, err := soft.WrapKey(t.Context(), b, a); !errors.Is(err, hsm.ErrUnsupported) {
		t.Errorf("with a key of another token: %v", err)
	}
}
