package registrationtest

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/hsmtest"
	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/bundle"
	"github.com/touchmark/touchmark/pkg/ca"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/templates"
)

// The api-versions that take a certificate signing request, each in its way.
const (
	versionCSR    = "2025-07-01-preview"
	versionOldCSR = "2021-11-01-preview"
)

// An Authority is a root and an issuing CA for operational certificates.
type Authority struct {
	Root, Issuing *x509.Certificate
	Key           crypto.Signer
}

// NewAuthority makes a root that is good for a year from now, and an issuing CA that is good for a while.
func (f *Fixture) NewAuthority(t testing.TB, validity time.Duration) *Authority {
	t.Helper()
	keys := [2]crypto.Signer{ECKey(t, elliptic.P256()), ECKey(t, elliptic.P256())}
	root, err := ca.NewRoot(ca.AuthorityConfig{Subject: pkix.Name{CommonName: "Operations Root"}, Signer: keys[0], Now: f.Now().Add(-2 * time.Hour), Validity: 365 * 24 * time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	issuing, err := ca.NewIssuing(ca.AuthorityConfig{Subject: pkix.Name{CommonName: "Operations CA"}, Signer: keys[1], Now: f.Now().Add(-time.Hour), Validity: validity + time.Hour}, root, keys[0])
	if err != nil {
		t.Fatal(err)
	}
	return &Authority{Root: root, Issuing: issuing, Key: keys[1]}
}

// Issuer returns an issuer of certificates for 90 days, for keys of those kinds.
func (f *Fixture) Issuer(t testing.TB, a *Authority, keys ...hsm.Algorithm) *ca.Operational {
	t.Helper()
	i, err := ca.NewIssuer(ca.Config{Signer: a.Key, Certificate: a.Issuing, Chain: []*x509.Certificate{a.Root}, Now: f.Now})
	if err != nil {
		t.Fatal(err)
	}
	text, err := templates.Certificate("device", nil)
	if err != nil {
		t.Fatal(err)
	}
	o, err := ca.NewOperational(i, ca.Profile{Template: text, Validity: 90 * 24 * time.Hour, Backdate: time.Hour}, keys)
	if err != nil {
		t.Fatal(err)
	}
	return o
}

// Issues starts the service anew with issuers, and has the groups name one of them: "keys", and the devices below "line".
func (f *Fixture) Issues(t testing.TB, issuers map[string]registration.Issuer, name string, edit ...func(*registration.Config)) {
	t.Helper()
	for _, r := range f.Replicas() {
		cfg := registration.Config{Store: r.Store, Scope: Scope, Settings: registration.Settings{Hubs: registration.Records(hub)}, Now: f.Now, Issuers: issuers}
		for _, e := range edit {
			e(&cfg)
		}
		r.Service = registration.New(cfg)
	}
	for id, e := range map[string]dps.Enrollment{"keys": Symmetric(f.GroupKey, nil), "line": Signers(f.Root, nil)} {
		if name != "" {
			e.ClientCertificateIssuancePolicy = &dps.ClientCertificateIssuancePolicy{CertificateAuthorityName: name}
		}
		f.Put(t, registration.Group, id, e)
	}
}

// ECKey makes a key.
func ECKey(t testing.TB, c elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(c, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// CSR makes a certificate signing request, as DER.
func CSR(t testing.TB, key crypto.Signer, cn string, edit ...func(*x509.CertificateRequest)) []byte {
	t.Helper()
	r := &x509.CertificateRequest{Subject: pkix.Name{CommonName: cn}}
	for _, e := range edit {
		e(r)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, r, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// CSRBody is a register body with a request.
func CSRBody(id string, der []byte) string {
	return fmt.Sprintf(`{"registrationId":%q,"csr":%q}`, id, base64.StdEncoding.EncodeToString(der))
}

func (d Device) version(v string) Device {
	d.APIVersion = v
	return d
}

// chainOf reads the chain of an answer.
func chainOf(t testing.TB, state map[string]any) (chain []*x509.Certificate) {
	t.Helper()
	if text, ok := state["issuedClientCertificate"].(string); ok {
		certs, err := ca.ParseChain([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		return certs
	}
	list, _ := state["issuedCertificateChain"].([]any)
	for _, x := range list {
		der, err := base64.StdEncoding.DecodeString(x.(string))
		if err != nil {
			t.Fatal(err)
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		chain = append(chain, c)
	}
	return chain
}

// issued checks a chain: for that device and key, for TLS clients and nothing more, and OpenSSL takes it.
func (f *Fixture) issued(t testing.TB, a *Authority, state map[string]any, pub crypto.PublicKey) *x509.Certificate {
	t.Helper()
	chain := chainOf(t, state)
	if state["status"] != "assigned" || len(chain) != 3 || !chain[1].Equal(a.Issuing) || !chain[2].Equal(a.Root) {
		t.Fatalf("%d certificates in %v", len(chain), state)
	}
	leaf := chain[0]
	if !pub.(interface{ Equal(crypto.PublicKey) bool }).Equal(leaf.PublicKey) {
		t.Error("the certificate is for another key")
	}
	sans := len(leaf.DNSNames) + len(leaf.IPAddresses) + len(leaf.URIs) + len(leaf.EmailAddresses)
	if leaf.Subject.String() != "CN="+state["deviceId"].(string) || leaf.IsCA || leaf.KeyUsage != x509.KeyUsageDigitalSignature || sans != 0 ||
		!slices.Equal(leaf.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}) || len(leaf.UnknownExtKeyUsage) != 0 {
		t.Errorf("leaf of %s: CA %v, usage %b %v, %d other names", leaf.Subject, leaf.IsCA, leaf.KeyUsage, leaf.ExtKeyUsage, sans)
	}
	if _, err := exec.LookPath("openssl"); err != nil {
		hsmtest.Require(t, "openssl")
	}
	dir := t.TempDir()
	for i, name := range []string{"leaf", "intermediate", "root"} {
		if err := os.WriteFile(filepath.Join(dir, name+".pem"), ca.EncodeChain(chain[i]), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c := exec.Command("openssl", "verify", "-x509_strict", "-purpose", "sslclient", "-attime", fmt.Sprint(f.Now().Unix()), "-CAfile", "root.pem", "-untrusted", "intermediate.pem", "leaf.pem")
	c.Dir = dir
	if out, err := c.CombinedOutput(); err != nil {
		t.Errorf("openssl verify: %v\n%s", err, out)
	}
	return leaf
}

// record returns what the store has of a device.
func (f *Fixture) record(t testing.TB, id string) (r *registration.Registration) {
	t.Helper()
	err := f.Store.View(t.Context(), func(tx registration.Tx) (err error) {
		r, err = tx.Registration(strings.ToLower(Scope), id)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// issuance is the part of the suite about certificates with the assignment (device API, section 15.2; DPS-D 24).
func issuance(t *testing.T, fresh Fresh, serve Serve) {
	begin := func(t *testing.T, edit ...func(*registration.Config)) (*Fixture, *Authority, func(testing.TB, Device) Conn) {
		f := fresh(t)
		a := f.NewAuthority(t, 300*24*time.Hour)
		f.Issues(t, map[string]registration.Issuer{"ops": f.Issuer(t, a)}, "ops", edit...)
		return f, a, serve(t, f)
	}
	t.Run("issuance", func(t *testing.T) {
		f, a, dial := begin(t)
		key := ECKey(t, elliptic.P256())
		der := CSR(t, key, "DEV-1")
		c := dial(t, f.Derived("dev-1").version(versionCSR))
		op, state := register(t, c, CSRBody("dev-1", der))
		leaf := f.issued(t, a, state, key.Public())
		if want := f.Now().Add(90 * 24 * time.Hour); !leaf.NotAfter.Equal(want) || !leaf.NotBefore.Equal(f.Now().Add(-time.Hour)) {
			t.Errorf("valid from %v to %v", leaf.NotBefore, leaf.NotAfter)
		}
		if r := f.record(t, "dev-1").Issued; r == nil || r.SerialNumber != fmt.Sprintf("%x", leaf.SerialNumber) || r.Issuer != "ops" || r.Thumbprint != fmt.Sprintf("%x", sha256.Sum256(leaf.Raw)) || !r.NotAfter.Equal(leaf.NotAfter) {
			t.Errorf("the registration says %+v", r)
		}
		// Repeated, in whatever way: the same operation, the same octets.
		first := c.Status(t, op, "")
		if again := c.Status(t, op, ""); !bytes.Equal(again.Body, first.Body) {
			t.Errorf("told twice:\n%s\n%s", first.Body, again.Body)
		}
		f.Advance(10 * time.Second)
		if o, _ := register(t, dial(t, f.Derived("dev-1").version(versionCSR)), CSRBody("dev-1", der)); o != op {
			t.Error("the same request again is another operation")
		}
		// Who does not ask does not get it, and who may look does not see it.
		plain, state := register(t, c, `{"registrationId":"dev-1"}`)
		if state["status"] != "assigned" || chainOf(t, state) != nil || plain == op {
			t.Errorf("without a request: %v", state)
		}
		if again := c.Status(t, op, ""); !bytes.Equal(again.Body, first.Body) {
			t.Error("the first operation has another answer now")
		}
		d := f.Derived("dev-1")
		look, err := f.Service.Lookup(t.Context(), &registration.Request{IDScope: Scope, RegistrationID: "dev-1", APIVersion: versionCSR, Proof: attest.Proof{Token: d.Token}})
		if err != nil {
			t.Fatal(err)
		}
		shown, err := f.Service.GetRegistration(t.Context(), "dev-1")
		if err != nil {
			t.Fatal(err)
		}
		for _, v := range []any{look, shown} {
			if b, err := json.Marshal(v); err != nil || bytes.Contains(b, []byte("issued")) {
				t.Errorf("%s, %v", b, err)
			}
		}
		if f.record(t, "dev-1").Issued == nil {
			t.Error("the certificate is forgotten")
		}
		// Renewed: another certificate, for the same key or another.
		f.Advance(2 * time.Minute)
		_, state = register(t, dial(t, f.Derived("dev-1").version(versionCSR)), CSRBody("dev-1", der))
		if next := f.issued(t, a, state, key.Public()); next.SerialNumber.Cmp(leaf.SerialNumber) == 0 || !next.NotAfter.After(leaf.NotAfter) {
			t.Errorf("renewed: %v until %v", next.SerialNumber, next.NotAfter)
		}
		for _, key := range []crypto.Signer{ECKey(t, elliptic.P384()), rsaKey(t, 2048), edKey(t)} {
			_, state = register(t, c, CSRBody("dev-1", CSR(t, key, "dev-1")))
			f.issued(t, a, state, key.Public())
		}
		// In the words of the older preview; by a device with a certificate, whose key may be the same.
		other := attesttest.Leaf(t, f.Mid, "dev-2")
		body := strings.Replace(CSRBody("dev-2", CSR(t, other.Key, "dev-2")), `"csr"`, `"clientCertificateCsr"`, 1)
		_, state = register(t, dial(t, ByCertificate("dev-2", other.TLS(f.Mid)).version(versionOldCSR)), body)
		f.issued(t, a, state, other.Key.Public())
		if state["issuedCertificateChain"] != nil {
			t.Errorf("both words: %v", state)
		}
		// An enrollment that names no issuer.
		_, state = register(t, dial(t, f.ByKey("own-key", f.OwnKey).version(versionCSR)), CSRBody("own-key", CSR(t, key, "own-key")))
		if state["status"] != "failed" || state["errorCode"] != 400000.0 || chainOf(t, state) != nil || state["assignedHub"] != nil {
			t.Errorf("no issuer: %v", state)
		}
	})
	t.Run("what a request asks for", func(t *testing.T) {
		f, a, dial := begin(t)
		uri, err := url.Parse("https://example.net/")
		if err != nil {
			t.Fatal(err)
		}
		ext := func(id asn1.ObjectIdentifier, v any) pkix.Extension {
			return pkix.Extension{Id: id, Critical: true, Value: mustMarshal(t, v)}
		}
		for i, edit := range []func(*x509.CertificateRequest){
			func(r *x509.CertificateRequest) {
				r.ExtraExtensions = []pkix.Extension{ext(asn1.ObjectIdentifier{2, 5, 29, 19}, struct{ CA bool }{true})}
			},
			func(r *x509.CertificateRequest) {
				r.ExtraExtensions = []pkix.Extension{ext(asn1.ObjectIdentifier{2, 5, 29, 37}, []asn1.ObjectIdentifier{{1, 3, 6, 1, 5, 5, 7, 3, 1}})}
			},
			func(r *x509.CertificateRequest) {
				r.DNSNames, r.EmailAddresses, r.URIs = []string{"hub-a.example.net"}, []string{"a@b"}, []*url.URL{uri}
			},
			func(r *x509.CertificateRequest) {
				r.Subject.Organization, r.Subject.SerialNumber = []string{"Somebody"}, "1"
			},
		} {
			key := ECKey(t, elliptic.P256())
			id := fmt.Sprint("dev-", i)
			_, state := register(t, dial(t, f.Derived(id).version(versionCSR)), CSRBody(id, CSR(t, key, id, edit)))
			f.issued(t, a, state, key.Public())
		}
		key := ECKey(t, elliptic.P256())
		_, state := register(t, dial(t, f.Derived("dev-9").version(versionCSR)), CSRBody("dev-9", challenged(t, key, "dev-9")))
		f.issued(t, a, state, key.Public())
	})
	t.Run("hostile requests", func(t *testing.T) {
		f, _, dial := begin(t)
		f.Import(t, bundle.Entry{Serial: "SN1", Device: &bundle.GroupDevice{RegistrationID: "other", Group: "line", KeyHash: keyHash(t, f.Mid)}})
		lost := attesttest.Leaf(t, f.Root, "lost-1")
		f.Import(t, bundle.Entry{Serial: "SN2", Retired: &bundle.RetiredDevice{RegistrationID: "lost-1", Group: "line", State: bundle.Scrapped, At: f.Now(), KeyHash: keyHash(t, lost)}})
		taken := ECKey(t, elliptic.P256())
		if _, state := register(t, dial(t, f.Derived("dev-2").version(versionCSR)), CSRBody("dev-2", CSR(t, taken, "dev-2"))); state["status"] != "assigned" {
			t.Fatal(state)
		}
		d := f.Derived("dev-1").version(versionCSR)
		for why, body := range hostileRequests(t, map[string]*ecdsa.PrivateKey{"a key that ended": lost.Key, "another device's key": taken, "a key of a bundle's": f.Mid.Key}) {
			a := dial(t, d).Register(t, body)
			want := 400
			if len(body) > registration.MaxBody {
				want = 413
			}
			refusedWith(t, a, want, why)
			if bytes.Contains(a.Body, []byte("asn1")) || bytes.Contains(a.Body, []byte("ended")) {
				t.Errorf("%s: the answer tells why: %s", why, a.Body)
			}
		}
		good := base64.StdEncoding.EncodeToString(CSR(t, ECKey(t, elliptic.P256()), "dev-1"))
		for _, v := range []string{"2019-03-31", "2021-06-01", versionOldCSR} {
			if doc := document(t, dial(t, f.Derived("dev-1").version(v)).Register(t, `{"csr":"`+good+`"}`)); doc["errorCode"] != 400012.0 {
				t.Errorf("csr under %s: %v", v, doc)
			}
		}
		for _, v := range []string{"2019-03-31", versionCSR} {
			if doc := document(t, dial(t, f.Derived("dev-1").version(v)).Register(t, `{"clientCertificateCsr":"`+good+`"}`)); doc["errorCode"] != 400012.0 {
				t.Errorf("clientCertificateCsr under %s: %v", v, doc)
			}
		}
		refusedWith(t, dial(t, f.ByKey("dev-1", f.OwnKey).version(versionCSR)).Register(t, `{"csr":"`+good+`"}`), 401, "a request, and no proof")
		if _, err := f.Service.GetRegistration(t.Context(), "dev-1"); err == nil {
			t.Error("a refused request left a registration")
		}
	})
	t.Run("at once", func(t *testing.T) {
		f, a, dial := begin(t, func(c *registration.Config) { c.AtOnce = []string{"nobody/1", "*"} })
		key := ECKey(t, elliptic.P256())
		c := dial(t, f.Derived("dev-1").version(versionCSR))
		one := c.Register(t, CSRBody("dev-1", CSR(t, key, "dev-1")))
		doc := document(t, one)
		state, _ := doc["registrationState"].(map[string]any)
		if one.Status != 200 || state == nil {
			t.Fatalf("%d %s", one.Status, one.Body)
		}
		f.issued(t, a, state, key.Public())
		if again := c.Status(t, doc["operationId"].(string), ""); !bytes.Equal(again.Body, one.Body) {
			t.Errorf("register and status differ:\n%s\n%s", one.Body, again.Body)
		}
	})
}

// hostileRequests are register bodies of dev-1 that get nothing, by what is wrong with them.
func hostileRequests(t testing.TB, keys map[string]*ecdsa.PrivateKey) map[string]string {
	good := CSR(t, ECKey(t, elliptic.P256()), "dev-1")
	for len(good)%3 != 1 { // so that base64 ends in four bits that say nothing, and ==
		good = CSR(t, ECKey(t, elliptic.P256()), "dev-1")
	}
	text := base64.StdEncoding.EncodeToString(good)
	raw := func(csr string) string {
		b, err := json.Marshal(map[string]string{"registrationId": "dev-1", "csr": csr})
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	der := func(b []byte) string { return CSRBody("dev-1", b) }
	by := func(k crypto.Signer, edit ...func(*x509.CertificateRequest)) string {
		return der(CSR(t, k, "dev-1", edit...))
	}
	named := func(cn string) string { return der(CSR(t, ECKey(t, elliptic.P256()), cn)) }
	flip := func(at int) string {
		b := bytes.Clone(good)
		b[(at+len(b))%len(b)] ^= 1
		return der(b)
	}
	cert := attesttest.Leaf(t, nil, "dev-1")
	n := rsaKey(t, 2048).N
	off, err := x509.MarshalPKIXPublicKey(ECKey(t, elliptic.P256()).Public())
	if err != nil {
		t.Fatal(err)
	}
	off[len(off)-1] ^= 1
	all := map[string]string{
		"not base64": raw("~~~~"), "base64 of nothing": raw("===="), "base64 for URLs": raw(strings.NewReplacer("+", "-", "/", "_").Replace(text) + "-_"),
		"a line break": raw(text[:64] + "\r\n" + text[64:]), "a space in front": raw(" " + text), "idle bits": raw(text[:len(text)-3] + string(text[len(text)-3]+1) + "=="), "no padding": raw(strings.TrimRight(text, "=") + "A"),
		"PEM":                 raw(string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: good}))),
		"PEM in base64":       der(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: good})),
		"a certificate":       der(cert.Certificate.Raw),
		"trailing garbage":    der(append(bytes.Clone(good), 0)),
		"two requests":        der(append(bytes.Clone(good), good...)),
		"cut off":             der(good[:len(good)-1]),
		"its head":            der(good[:4]),
		"indefinite length":   der(append([]byte{0x30, 0x80}, append(bytes.Clone(good[4:]), 0, 0)...)),
		"an outsized length":  der([]byte{0x30, 0x84, 0x7f, 0xff, 0xff, 0xff}),
		"deep nesting":        der(bytes.Repeat([]byte{0x30, 0x82, 0x20, 0x00}, 2000)),
		"48 kB":               raw(strings.Repeat("A", 48<<10)),
		"64 kB":               raw(strings.Repeat("A", 64<<10)),
		"20 kB, properly":     der(CSR(t, ECKey(t, elliptic.P256()), "dev-1", func(r *x509.CertificateRequest) { r.Subject.Organization = []string{strings.Repeat("x", 20<<10)} })),
		"a damaged signature": flip(-1), "a damaged name": flip(bytes.Index(good, []byte("dev-1"))), "a damaged key": flip(bytes.Index(good, []byte{0x03, 0x42, 0x00, 0x04}) + 20),
		"another's name": named("dev-2"), "no name": named(""), "a longer name": named("dev-1.x"), "a space behind the name": named("dev-1 "),
		"a NUL in the name": named("dev-1\x00"), "a Kelvin sign": named("dev-1\u212a"), "two names": der(CSR(t, ECKey(t, elliptic.P256()), "dev-1", func(r *x509.CertificateRequest) {
			r.Subject.ExtraNames = []pkix.AttributeTypeAndValue{{Type: asn1.ObjectIdentifier{2, 5, 4, 3}, Value: "dev-2"}, {Type: asn1.ObjectIdentifier{2, 5, 4, 3}, Value: "dev-1"}}
		})),
		"the name as an alternative": der(CSR(t, ECKey(t, elliptic.P256()), "", func(r *x509.CertificateRequest) { r.DNSNames = []string{"dev-1"} })),
		"P-224":                      by(ECKey(t, elliptic.P224())), "P-521": by(ECKey(t, elliptic.P521())),
		"RSA of 2056 bits": by(rsaKey(t, 2056)), "RSA of 1024 bits": der(forged(t, rsaPublic(t, new(big.Int).Rsh(n, 1024), big.NewInt(65537)))),
		"RSA with SHA-1":        by(rsaKey(t, 2048), func(r *x509.CertificateRequest) { r.SignatureAlgorithm = x509.SHA1WithRSA }),
		"ECDSA with SHA-1":      by(ECKey(t, elliptic.P256()), func(r *x509.CertificateRequest) { r.SignatureAlgorithm = x509.ECDSAWithSHA1 }),
		"a huge RSA exponent":   der(forged(t, rsaPublic(t, n, new(big.Int).SetBit(big.NewInt(1), 40, 1)))),
		"an even RSA exponent":  der(forged(t, rsaPublic(t, n, big.NewInt(65538)))),
		"RSA exponent 3":        der(forged(t, rsaPublic(t, n, big.NewInt(3)))),
		"RSA exponent 0":        der(forged(t, rsaPublic(t, n, big.NewInt(0)))),
		"RSA exponent -1":       der(forged(t, rsaPublic(t, n, big.NewInt(-1)))),
		"a huge RSA modulus":    der(forged(t, rsaPublic(t, new(big.Int).SetBit(big.NewInt(1), 65535, 1), big.NewInt(65537)))),
		"an even RSA modulus":   der(forged(t, rsaPublic(t, new(big.Int).Lsh(big.NewInt(1), 2047), big.NewInt(65537)))),
		"a small RSA factor":    der(forged(t, rsaPublic(t, new(big.Int).Mul(new(big.Int).Rsh(n, 10), big.NewInt(751)), big.NewInt(65537)))),
		"a DSA key":             der(forged(t, publicKey(t, asn1.ObjectIdentifier{1, 2, 840, 10040, 4, 1}, struct{ P, Q, G *big.Int }{n, big.NewInt(3), big.NewInt(2)}, big.NewInt(2)))),
		"a point off the curve": der(forged(t, off)),
		"a key of no kind":      der(forged(t, publicKey(t, asn1.ObjectIdentifier{1, 2, 3}, asn1.NullRawValue, 1))),
	}
	for why, k := range keys {
		all[why] = by(k)
	}
	return all
}

// request puts a request together (RFC 2986, section 4) as the standard library would not.
func request(t testing.TB, cn string, spki, attributes []byte, sign func([]byte) []byte) []byte {
	t.Helper()
	tbs := mustMarshal(t, struct {
		Version    int
		Subject    pkix.RDNSequence
		Key        asn1.RawValue
		Attributes asn1.RawValue
	}{0, pkix.Name{CommonName: cn}.ToRDNSequence(), asn1.RawValue{FullBytes: spki}, asn1.RawValue{Class: asn1.ClassContextSpecific, IsCompound: true, Bytes: attributes}})
	sig := sign(tbs)
	return mustMarshal(t, struct {
		TBS       asn1.RawValue
		Algorithm pkix.AlgorithmIdentifier
		Signature asn1.BitString
	}{asn1.RawValue{FullBytes: tbs}, pkix.AlgorithmIdentifier{Algorithm: asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 2}}, asn1.BitString{Bytes: sig, BitLength: len(sig) * 8}})
}

// forged is a request of dev-1 with any public key, and a signature that is none.
func forged(t testing.TB, spki []byte) []byte {
	t.Helper()
	return request(t, "dev-1", spki, nil, func([]byte) []byte { return bytes.Repeat([]byte{1}, 256) })
}

// challenged is a request with a challengePassword (RFC 2985, section 5.4.1).
func challenged(t testing.TB, key *ecdsa.PrivateKey, cn string) []byte {
	t.Helper()
	pub, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	attribute := mustMarshal(t, struct {
		ID     asn1.ObjectIdentifier
		Values []string `asn1:"set"`
	}{asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 7}, []string{"let me in"}})
	return request(t, cn, pub, attribute, func(tbs []byte) []byte {
		digest := sha256.Sum256(tbs)
		sig, err := ecdsa.SignASN1(rand.Reader, key, digest[:])
		if err != nil {
			t.Fatal(err)
		}
		return sig
	})
}

func mustMarshal(t testing.TB, v any) []byte {
	t.Helper()
	b, err := asn1.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// publicKey is a SubjectPublicKeyInfo of any content.
func publicKey(t testing.TB, kind asn1.ObjectIdentifier, parameters, key any) []byte {
	t.Helper()
	b := mustMarshal(t, key)
	return mustMarshal(t, struct {
		Algorithm struct {
			ID         asn1.ObjectIdentifier
			Parameters asn1.RawValue
		}
		Key asn1.BitString
	}{struct {
		ID         asn1.ObjectIdentifier
		Parameters asn1.RawValue
	}{kind, asn1.RawValue{FullBytes: mustMarshal(t, parameters)}}, asn1.BitString{Bytes: b, BitLength: len(b) * 8}})
}

func rsaPublic(t testing.TB, n, e *big.Int) []byte {
	t.Helper()
	return publicKey(t, asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 1}, asn1.NullRawValue, struct{ N, E *big.Int }{n, e})
}

func rsaKey(t testing.TB, bits int) *rsa.PrivateKey {
	t.Helper()
	k, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func edKey(t testing.TB) crypto.Signer {
	t.Helper()
	_, k, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// issuedCertificates is the part of the store's contract about certificates that are planned and issued.
func issuedCertificates(t *testing.T, s registration.Store) {
	at := time.Date(2026, 6, 1, 0, 0, 0, 123456789, time.UTC)
	cert := func(serial, id, key string, planned time.Duration) *registration.Issued {
		return &registration.Issued{SerialNumber: serial, ID: id, Name: strings.ToUpper(id), Issuer: "ops", KeyHash: key, NotAfter: at.Add(time.Hour), Planned: at.Add(planned), Plan: []byte(serial)}
	}
	planned := func(scope, id, key string) (c *registration.Issued, err error) {
		return c, errors.Join(s.View(t.Context(), func(tx registration.Tx) error {
			c, err = tx.Planned(scope, id, key)
			return nil
		}), err)
	}
	taken := func(scope, key, id string) (is bool) {
		if err := s.View(t.Context(), func(tx registration.Tx) (err error) {
			is, err = tx.KeyTaken(scope, key, id)
			return err
		}); err != nil {
			t.Fatal(err)
		}
		return is
	}
	if c, err := planned("a", "dev-1", "k1"); !errors.Is(err, registration.ErrNotFound) {
		t.Errorf("%+v, %v", c, err)
	}
	old, next := cert("01", "dev-1", "k1", 0), cert("02", "dev-1", "k1", time.Minute)
	update(t, s, func(tx registration.Tx) error {
		return errors.Join(tx.PutIssued("a", next), tx.PutIssued("a", old), tx.PutIssued("a", cert("03", "dev-2", "k2", 0)), tx.PutDevice("a", &registration.Device{ID: "dev-3", KeyHash: "k3"}),
			tx.PutDevice("a", &registration.Device{ID: "dev-4", KeyHash: "k4", Revision: 1, Ended: 2}), tx.PutDevice("a", &registration.Device{ID: "dev-5"}))
	})
	if c, err := planned("a", "dev-1", "k1"); err != nil || c.SerialNumber != "02" || !bytes.Equal(c.Plan, next.Plan) || c.ID != "dev-1" || c.KeyHash != "k1" || c.Name != "DEV-1" || c.Issuer != "ops" || !c.NotAfter.Equal(next.NotAfter) || !c.Planned.Equal(next.Planned) {
		t.Errorf("the newest: %+v, %v", c, err)
	}
	next.Thumbprint = "ab"
	update(t, s, func(tx registration.Tx) error { return tx.PutIssued("a", next) })
	if c, err := planned("a", "dev-1", "k1"); err != nil || c.SerialNumber != "01" {
		t.Errorf("after one is issued: %+v, %v", c, err)
	}
	for _, x := range [][3]string{{"b", "dev-1", "k1"}, {"a", "dev-2", "k1"}, {"a", "dev-1", "k2"}} {
		if c, err := planned(x[0], x[1], x[2]); !errors.Is(err, registration.ErrNotFound) {
			t.Errorf("%v: %+v, %v", x, c, err)
		}
	}
	for _, x := range []struct {
		scope, key, id string
		want           bool
	}{{"a", "k1", "dev-1", false}, {"a", "k1", "dev-2", true}, {"b", "k1", "dev-2", false}, {"a", "k3", "dev-1", true}, {"a", "k3", "dev-3", false}, {"a", "k4", "dev-1", false}, {"a", "", "dev-1", false}, {"a", "k9", "dev-1", false}} {
		if taken(x.scope, x.key, x.id) != x.want {
			t.Errorf("%v", x)
		}
	}
}
