package tpm_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/json"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/hsmtest"
	"github.com/touchmark/touchmark/hsm/tpm"
	"github.com/touchmark/touchmark/hsm/tpm/residency"
)

func ek(t testing.TB, s *tpm.Store, kind tpm.EKType) *tpm.EK {
	t.Helper()
	e, err := s.EK(t.Context(), kind)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// The EK of a TPM without one is what tpm2_createek makes, and the registration ID is the SDKs'.
func TestEKTemplates(t *testing.T) {
	s := hsmtest.SWTPM(t)
	store := open(t, s.URI())
	for kind, alg := range map[tpm.EKType]string{tpm.EKRSA: "rsa", tpm.EKECC: "ecc"} {
		mine := ek(t, store, kind)
		if err := os.WriteFile(filepath.Join(s.Dir, "mine"), mine.Public, 0o600); err != nil {
			t.Fatal(err)
		}
		tool(t, s, nil, "tpm2_createek", "-Q", "-G", alg, "-c", alg+".ctx", "-u", alg+".pub")
		tool(t, s, nil, "tpm2_flushcontext", "-t")
		theirs, err := os.ReadFile(filepath.Join(s.Dir, alg+".pub"))
		if err != nil || !bytes.Equal(mine.Public, theirs) {
			t.Errorf("%s: tpm2_createek makes another EK: %x, %x, %v", kind, mine.Public, theirs, err)
		}
		if len(mine.Certificates) != 0 || mine.Handle != 0 {
			t.Errorf("%s: %+v", kind, mine)
		}
		id := strings.TrimSpace(tool(t, s, nil, "sh", "-c", "openssl dgst -sha256 -binary mine | base32 | tr -d '=' | tr A-Z a-z"))
		if mine.RegistrationID() != id || len(id) != 52 {
			t.Errorf("%s: registration ID %s, want %s", kind, mine.RegistrationID(), id)
		}
	}
	// Provisioned by firmware at the usual handle, it is that one.
	tool(t, s, nil, "tpm2_evictcontrol", "-Q", "-C", "o", "-c", "rsa.ctx", "0x81010001")
	tool(t, s, nil, "tpm2_flushcontext", "-t")
	if again := ek(t, store, tpm.EKRSA); again.Handle != 0x81010001 {
		t.Errorf("handle %x", again.Handle)
	}
	if err := store.Close(); err != nil {
		t.Fatal(err)
	}
	clean(t, s)
}

func TestEKCertificate(t *testing.T) {
	s := hsmtest.SWTPMWithEK(t)
	store := open(t, s.URI())
	e := ek(t, store, tpm.EKRSA)
	if len(e.Certificates) != 1 || e.Handle != 0x81010001 {
		t.Fatalf("%d certificates, handle %x", len(e.Certificates), e.Handle)
	}
	makers, err := residency.LoadMakers(os.DirFS(s.Makers()))
	if err != nil {
		t.Fatal(err)
	}
	c, err := makers.Judge(e.Public, e.Certificates, time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	if c.Manufacturer != "id:00001014" || c.Model != "swtpm" || !strings.Contains(c.Root, "rootca") {
		t.Errorf("%+v", c)
	}
	// certtool reads the certificate that we read.
	text := tool(t, s, e.Certificates[0], "certtool", "--certificate-info", "--inder")
	if !strings.Contains(text, "CN=swtpm-localca") {
		t.Error(text)
	}
	other := ek(t, open(t, hsmtest.SWTPM(t).URI()), tpm.EKRSA)
	if _, err := makers.Judge(other.Public, e.Certificates, time.Time{}); err == nil || !strings.Contains(err.Error(), "another endorsement key") {
		t.Errorf("the certificate of another TPM: %v", err)
	}
	if _, err := makers.Judge(e.Public, e.Certificates, time.Now().AddDate(-1, 0, 0)); err == nil {
		t.Error("a certificate that is not valid yet passes")
	}
	stranger, err := residency.LoadMakers(os.DirFS(hsmtest.SWTPMWithEK(t).Makers()))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stranger.Judge(e.Public, e.Certificates, time.Time{}); err == nil {
		t.Error("a certificate of another maker passes")
	}
	if _, err := residency.LoadMakers(fstest.MapFS{"readme.txt": {Data: []byte("x")}}); err == nil {
		t.Error("a folder without roots passes")
	}
	bad := bytes.Clone(e.Certificates[0])
	bad[len(bad)-1] ^= 1
	if _, err := makers.Judge(e.Public, [][]byte{bad}, time.Time{}); err == nil {
		t.Error("a changed certificate passes")
	}
}

// maker is a CA for EK certificates that are made to measure.
type maker struct {
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

func newMaker(t *testing.T) *maker {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "Maker"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &maker{key, cert}
}

func (m *maker) roots(t *testing.T) *residency.Makers {
	t.Helper()
	r, err := residency.LoadMakers(fstest.MapFS{"root.der": {Data: m.cert.Raw}, "notes": {Data: []byte("x")}})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func (m *maker) issue(t *testing.T, pub crypto.PublicKey, change func(*x509.Certificate)) []byte {
	t.Helper()
	name, err := asn1.Marshal(pkix.RDNSequence{{{Type: asn1.ObjectIdentifier{2, 23, 133, 2, 1}, Value: "id:54455354"}}})
	if err != nil {
		t.Fatal(err)
	}
	san, err := asn1.Marshal([]asn1.RawValue{{Class: asn1.ClassContextSpecific, Tag: 4, IsCompound: true, Bytes: name}})
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageKeyAgreement, UnknownExtKeyUsage: []asn1.ObjectIdentifier{{2, 23, 133, 8, 1}},
		ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Critical: true, Value: san}},
	}
	if change != nil {
		change(tmpl)
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, m.cert, pub, m.key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// The EK certificate of the ECC template, in an NV index that is larger than it; and certificates that are none.
func TestECCEKCertificate(t *testing.T) {
	s := hsmtest.SWTPM(t)
	store := open(t, s.URI())
	m := newMaker(t)
	e := ek(t, store, tpm.EKECC)
	public, err := residency.ParsePublic(e.Public)
	if err != nil {
		t.Fatal(err)
	}
	pub, err := residency.PublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	der := m.issue(t, pub, nil)
	if err := os.WriteFile(filepath.Join(s.Dir, "cert"), append(bytes.Clone(der), bytes.Repeat([]byte{0xff}, 1100)...), 0o600); err != nil {
		t.Fatal(err)
	}
	tool(t, s, nil, "tpm2_nvdefine", "-Q", "-C", "p", "-s", "1500", "-a", "ppwrite|ppread|authread|ownerread|platformcreate|no_da", "0x01c0000a")
	tool(t, s, nil, "tpm2_nvwrite", "-Q", "-C", "p", "-i", "cert", "0x01c0000a")
	e = ek(t, store, tpm.EKECC)
	if len(e.Certificates) != 1 || !bytes.Equal(e.Certificates[0], der) {
		t.Fatalf("%d certificates", len(e.Certificates))
	}
	if c, err := m.roots(t).Judge(e.Public, e.Certificates, time.Time{}); err != nil || c.Manufacturer != "id:54455354" {
		t.Errorf("%+v, %v", c, err)
	}
	for name, change := range map[string]func(*x509.Certificate){
		"a CA's": func(c *x509.Certificate) { c.IsCA = true },
		"for servers": func(c *x509.Certificate) {
			c.UnknownExtKeyUsage, c.ExtKeyUsage = nil, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		},
		"that signs":       func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageDigitalSignature },
		"with a host name": func(c *x509.Certificate) { c.ExtraExtensions, c.DNSNames = nil, []string{"host.example"} },
		"with another critical extension": func(c *x509.Certificate) {
			c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: asn1.ObjectIdentifier{1, 2, 3, 4}, Critical: true, Value: []byte{5, 0}})
		},
		"past its time": func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) },
	} {
		if _, err := m.roots(t).Judge(e.Public, [][]byte{m.issue(t, pub, change)}, time.Time{}); err == nil {
			t.Errorf("a certificate %s passes", name)
		}
	}
}

// proof is a TPM with a device key that was proven to a station.
type proof struct {
	store    *tpm.Store
	ek       *tpm.EK
	key      hsm.SigningKey
	station  *ecdsa.PrivateKey
	evidence *residency.Evidence
}

const deviceID = "pump-0001"

func prove(t testing.TB, s *hsmtest.TPM, kind tpm.EKType) *proof {
	t.Helper()
	store := open(t, s.URI())
	p := &proof{store: store, ek: ek(t, store, kind), key: signer(t, store, hsm.Spec{Name: "device:1", Algorithm: hsm.ECP256})}
	var err error
	if p.station, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	if p.evidence, err = store.Attest(t.Context(), p.ek, "device:1", deviceID); err != nil {
		t.Fatal(err)
	}
	return p
}

func (p *proof) sign(t testing.TB, e *residency.Evidence) []byte {
	t.Helper()
	b, err := residency.Sign(e, p.station)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func (p *proof) policy() residency.Policy {
	return residency.Policy{Challengers: []crypto.PublicKey{p.station.Public()}, RegistrationID: deviceID, Key: p.key.Public()}
}

func TestResidency(t *testing.T) {
	s := hsmtest.SWTPMWithEK(t)
	p := prove(t, s, tpm.EKRSA)
	policy := p.policy()
	var err error
	if policy.Makers, err = residency.LoadMakers(os.DirFS(s.Makers())); err != nil {
		t.Fatal(err)
	}
	if os.Getenv("TOUCHMARK_UPDATE") != "" { // what the tests of package residency begin with
		root, err := os.ReadFile(filepath.Join(s.Makers(), "swtpm-localca-rootca-cert.pem"))
		if err != nil {
			t.Fatal(err)
		}
		issuer, err := os.ReadFile(filepath.Join(s.Makers(), "issuer.pem"))
		if err != nil {
			t.Fatal(err)
		}
		text, err := json.MarshalIndent(p.evidence, "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		for name, b := range map[string][]byte{"evidence.json": append(text, '\n'), "makers.pem": append(root, issuer...)} {
			if err := os.WriteFile(filepath.Join("residency", "testdata", name), b, 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	v, err := residency.Verify(p.sign(t, p.evidence), policy)
	if err != nil {
		t.Fatal(err)
	}
	if v.Certificate == nil || v.Certificate.Model != "swtpm" || !bytes.Equal(v.EK, p.ek.Public) || !p.key.Public().(*ecdsa.PublicKey).Equal(v.Key) || v.RegistrationID != deviceID {
		t.Errorf("%+v", v)
	}
	// tpm2_verifysignature agrees with us about the AK's signature.
	for name, b := range map[string][]byte{"attest": p.evidence.Answer.Attest, "signature": p.evidence.Answer.Signature, "ak.pub": p.evidence.AK} {
		if err := os.WriteFile(filepath.Join(s.Dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	tool(t, s, nil, "tpm2_loadexternal", "-Q", "-C", "n", "-u", "ak.pub", "-c", "ak.ctx")
	tool(t, s, nil, "tpm2_flushcontext", "-t")
	tool(t, s, nil, "tpm2_verifysignature", "-Q", "-c", "ak.ctx", "-g", "sha256", "-m", "attest", "-s", "signature")
	tool(t, s, nil, "tpm2_flushcontext", "-t")
	// Keys at handles, HMAC keys and RSA keys can be proven too.
	for _, spec := range []hsm.Spec{{Name: "0x81000100", Algorithm: hsm.ECP384}, {Name: "mac", Algorithm: hsm.HMACSHA256}, {Name: "rsa", Algorithm: hsm.RSA2048}} {
		generate(t, p.store, spec)
		e, err := p.store.Attest(t.Context(), p.ek, spec.Name, deviceID)
		if err != nil {
			t.Errorf("%s: %v", spec.Name, err)
			continue
		}
		q := p.policy()
		q.Key = nil
		if _, err := residency.Verify(p.sign(t, e), q); err != nil {
			t.Errorf("%s: %v", spec.Name, err)
		}
	}
	if err := p.store.Close(); err != nil {
		t.Fatal(err)
	}
	clean(t, s)
}

// An owned TPM, with an authorization value for everything, proves a key that has one.
func TestResidencyOwned(t *testing.T) {
	s := hsmtest.SWTPM(t)
	tool(t, s, nil, "tpm2_changeauth", "-c", "owner", "0wner")
	tool(t, s, nil, "tpm2_changeauth", "-c", "endorsement", "3ndorsement")
	store, err := tpm.Open(t.Context(), tpm.Config{URI: s.URI(), Owner: hsm.Secret("0wner"), Endorsement: hsm.Secret("3ndorsement"), PIN: secret("auth"), Protect: true})
	if err != nil {
		t.Fatal(err)
	}
	generate(t, store, hsm.Spec{Name: "k", Algorithm: hsm.ECP256})
	for _, kind := range []tpm.EKType{tpm.EKRSA, tpm.EKECC} {
		if _, err := store.Attest(t.Context(), ek(t, store, kind), "k", deviceID); err != nil {
			t.Errorf("%s: %v", kind, err)
		}
	}
	if err := store.Close(); err != nil {
		t.Fatal(err)
	}
	clean(t, s)
	bare, err := tpm.Open(t.Context(), tpm.Config{URI: s.URI(), Owner: hsm.Secret("0wner")})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := bare.EK(t.Context(), tpm.EKECC); !is(err, hsm.ErrPINIncorrect) {
		t.Errorf("no endorsement authorization: %v", err)
	}
	_ = bare.Close()
	clean(t, s)
}

// Attacks on a proof. The station is honest in none of those that it signs.
func TestResidencyAttacks(t *testing.T) {
	sa, sb := hsmtest.SWTPM(t), hsmtest.SWTPM(t)
	a, b := prove(t, sa, tpm.EKECC), prove(t, sb, tpm.EKECC)
	if _, err := residency.Verify(a.sign(t, a.evidence), a.policy()); err != nil {
		t.Fatal(err)
	}
	refused := func(name string, envelope []byte, p residency.Policy, want string) {
		t.Helper()
		v, err := residency.Verify(envelope, p)
		if !is(err, residency.ErrNotProven) || v != nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q in it", name, err, want)
		}
	}
	good := a.sign(t, a.evidence)

	// What the reader trusts and expects.
	p := a.policy()
	p.RegistrationID = "pump-0002"
	refused("for another registration ID", good, p, "pump-0002")
	p = a.policy()
	p.RegistrationID = ""
	refused("for none", good, p, "registration ID")
	p = a.policy()
	p.Key = b.key.Public()
	refused("for another key", good, p, "another key")
	refused("signed by another station", b.sign(t, a.evidence), a.policy(), "not signed by a trusted station")
	p = a.policy()
	p.Challengers = nil
	refused("no station trusted", good, p, "not signed by a trusted station")
	p = a.policy()
	p.Makers = newMaker(t).roots(t)
	refused("no certificate", good, p, "no certificate")

	// Documents that the station's key signs, with something else in them.
	changed := func(f func(e *residency.Evidence)) []byte {
		var e residency.Evidence
		text, err := json.Marshal(a.evidence)
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(text, &e); err != nil {
			t.Fatal(err)
		}
		f(&e)
		return a.sign(t, &e)
	}
	p = a.policy()
	p.RegistrationID = "pump-0002"
	refused("replayed for another registration ID", changed(func(e *residency.Evidence) { e.RegistrationID = "pump-0002" }), p, "another registration ID")
	p = a.policy()
	p.Key = nil
	refused("another TPM's EK", changed(func(e *residency.Evidence) { e.EK = b.evidence.EK }), p, "")
	refused("another TPM's AK", changed(func(e *residency.Evidence) { e.AK = b.evidence.AK }), p, "")
	refused("another TPM's key", changed(func(e *residency.Evidence) { e.Answer.Key = b.evidence.Answer.Key }), p, "another key")
	refused("another TPM's answer", changed(func(e *residency.Evidence) { e.Answer = b.evidence.Answer }), p, "")
	refused("another TPM's statement", changed(func(e *residency.Evidence) {
		e.Answer.Attest, e.Answer.Signature = b.evidence.Answer.Attest, b.evidence.Answer.Signature
	}), p, "")
	refused("another version", changed(func(e *residency.Evidence) { e.Version = 2 }), p, "version")

	// A key of the forger's own, certified by an AK of the forger's own: software all of it, and it looks the part.
	own, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	refused("an AK without the TPM's restriction", changed(func(e *residency.Evidence) {
		ak, err := residency.ParsePublic(e.AK)
		if err != nil {
			t.Fatal(err)
		}
		ak.ObjectAttributes.Restricted = false
		e.AK = residency.MarshalPublic(withKey(*ak, own))
	}), p, "not a restricted signing key")
	refused("a forged AK", changed(func(e *residency.Evidence) {
		ak, err := residency.ParsePublic(e.AK)
		if err != nil {
			t.Fatal(err)
		}
		e.AK = residency.MarshalPublic(withKey(*ak, own))
	}), p, "another attestation key")
	for name, change := range map[string]func(*tpm2.TPMAObject){
		"a key that may leave":          func(x *tpm2.TPMAObject) { x.FixedTPM = false },
		"a key under another parent":    func(x *tpm2.TPMAObject) { x.FixedParent = false },
		"a key that came from outside":  func(x *tpm2.TPMAObject) { x.SensitiveDataOrigin = false },
		"a key that the TPM restricted": func(x *tpm2.TPMAObject) { x.Restricted = true },
	} {
		refused(name, changed(func(e *residency.Evidence) {
			k, err := residency.ParsePublic(e.Answer.Key)
			if err != nil {
				t.Fatal(err)
			}
			change(&k.ObjectAttributes)
			e.Answer.Key = residency.MarshalPublic(*k)
		}), p, "device key")
	}

	// A key that was imported is not proven, though it is in the TPM.
	der, err := x509.MarshalPKCS8PrivateKey(own)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.store.Import(t.Context(), hsm.Spec{Name: "imported", Algorithm: hsm.ECP256}, der); err != nil {
		t.Fatal(err)
	}
	if _, err := a.store.Attest(t.Context(), a.ek, "imported", deviceID); !is(err, residency.ErrNotProven) {
		t.Errorf("an imported key is proven: %v", err)
	}
	if _, err := a.store.Import(t.Context(), hsm.Spec{Name: "imported-mac", Algorithm: hsm.HMACSHA256}, hsm.Secret("0123456789abcdef")); err != nil {
		t.Fatal(err)
	}
	if _, err := a.store.Attest(t.Context(), a.ek, "imported-mac", deviceID); !is(err, residency.ErrNotProven) {
		t.Errorf("an imported HMAC key is proven: %v", err)
	}

	// A challenge for one TPM is worth nothing in another, and one that was changed is worth nothing at all.
	akA, err := a.store.AK(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	akB, err := b.store.AK(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct{ ek, ak []byte }{"another EK": {a.ek.Public, akB.Public}, "another AK": {b.ek.Public, akA.Public}} {
		challenge, err := residency.NewChallenge(c.ek, c.ak)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := b.store.Answer(t.Context(), b.ek, akB, "device:1", deviceID, challenge.Credential); !is(err, residency.ErrNotProven) {
			t.Errorf("a challenge for %s is answered: %v", name, err)
		}
	}
	challenge, err := residency.NewChallenge(b.ek.Public, akB.Public)
	if err != nil {
		t.Fatal(err)
	}
	answer, err := b.store.Answer(t.Context(), b.ek, akB, "device:1", deviceID, challenge.Credential)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := challenge.Verify(deviceID, answer, nil, time.Now()); err != nil {
		t.Error(err)
	}
	if _, err := challenge.Verify("pump-0002", answer, nil, time.Now()); !is(err, residency.ErrNotProven) {
		t.Errorf("an answer for another registration ID: %v", err)
	}
	second, err := residency.NewChallenge(b.ek.Public, akB.Public)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := second.Verify(deviceID, answer, nil, time.Now()); !is(err, residency.ErrNotProven) {
		t.Errorf("an answer is taken twice: %v", err)
	}
	changedCredential := challenge.Credential
	changedCredential.Blob = bytes.Clone(changedCredential.Blob)
	changedCredential.Blob[40] ^= 1
	if _, err := b.store.Answer(t.Context(), b.ek, akB, "device:1", deviceID, changedCredential); !is(err, residency.ErrNotProven) {
		t.Errorf("a changed challenge: %v", err)
	}
	for _, s := range []*proof{a, b} {
		if err := s.store.Close(); err != nil {
			t.Fatal(err)
		}
	}
	clean(t, sa)
	clean(t, sb)
}

func withKey(p tpm2.TPMTPublic, k *ecdsa.PrivateKey) tpm2.TPMTPublic {
	b, _ := k.PublicKey.Bytes()
	p.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{X: tpm2.TPM2BECCParameter{Buffer: b[1:33]}, Y: tpm2.TPM2BECCParameter{Buffer: b[33:]}})
	return p
}

// Every octet of what the TPM gave counts, even when the station signs the change.
func TestResidencyOctets(t *testing.T) {
	p := prove(t, hsmtest.SWTPM(t), tpm.EKECC)
	for name, field := range map[string]func(*residency.Evidence) *[]byte{
		"ek": func(e *residency.Evidence) *[]byte { return &e.EK }, "ak": func(e *residency.Evidence) *[]byte { return &e.AK },
		"seed": func(e *residency.Evidence) *[]byte { return &e.Seed }, "blob": func(e *residency.Evidence) *[]byte { return &e.Credential.Blob },
		"secret": func(e *residency.Evidence) *[]byte { return &e.Answer.Secret }, "key": func(e *residency.Evidence) *[]byte { return &e.Answer.Key },
		"attest": func(e *residency.Evidence) *[]byte { return &e.Answer.Attest }, "signature": func(e *residency.Evidence) *[]byte { return &e.Answer.Signature },
	} {
		whole := *field(p.evidence)
		for i := range whole {
			e := *p.evidence
			bad := bytes.Clone(whole)
			bad[i] ^= 0x10
			*field(&e) = bad
			if _, err := residency.Verify(p.sign(t, &e), p.policy()); !is(err, residency.ErrNotProven) {
				t.Errorf("%s: octet %d of %d changed: %v", name, i, len(whole), err)
			}
		}
	}
	envelope := p.sign(t, p.evidence)
	for i := 0; i < len(envelope); i += 3 {
		bad := bytes.Clone(envelope)
		bad[i] ^= 1
		if v, err := residency.Verify(bad, p.policy()); err == nil && !bytes.Contains(bad, []byte(`"keyid"`)) {
			t.Errorf("octet %d of the envelope changed (%q): %+v", i, bad[max(0, i-8):min(len(bad), i+8)], v)
		}
	}
}
