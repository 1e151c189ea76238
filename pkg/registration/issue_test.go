package registration_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/bundle"
	"github.com/touchmark/touchmark/pkg/ca"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/evidence"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

const csrVersion = "2025-07-01-preview"

// watched is an issuer that tells of what it is asked to sign.
type watched struct {
	*ca.Operational
	mu      sync.Mutex
	signing func(ca.Plan) error // before it signs
	signed  func(ca.Plan) error // after
	serials []string
}

func (w *watched) Issue(p ca.Plan, pub crypto.PublicKey) ([]byte, error) {
	w.mu.Lock()
	w.serials = append(w.serials, fmt.Sprintf("%x", p.SerialNumber))
	w.mu.Unlock()
	if w.signing != nil {
		if err := w.signing(p); err != nil {
			return nil, err
		}
	}
	der, err := w.Operational.Issue(p, pub)
	if err == nil && w.signed != nil {
		err = w.signed(p)
	}
	return der, err
}

func newIssuance(t testing.TB, keys ...hsm.Algorithm) (*registrationtest.Fixture, *watched) {
	f := registrationtest.NewFixture(t)
	w := &watched{Operational: f.Issuer(t, f.NewAuthority(t, 100*24*time.Hour), keys...)}
	f.Issues(t, map[string]registration.Issuer{"ops": w}, "ops")
	return f, w
}

func csrRequest(f *registrationtest.Fixture, id string, csr []byte) *registration.Request {
	d := f.Derived(id)
	r := &registration.Request{IDScope: d.Scope, RegistrationID: id, APIVersion: csrVersion, Proof: attest.Proof{Token: d.Token}, Protocol: "https"}
	if csr != nil {
		r.Body = []byte(registrationtest.CSRBody(id, csr))
	}
	return r
}

// ask registers and asks once.
func ask(t testing.TB, f *registrationtest.Fixture, r *registration.Request) (string, *dps.RegistrationState, error) {
	t.Helper()
	st, err := f.Service.Register(t.Context(), r)
	if err != nil {
		return "", nil, err
	}
	if st, err = f.Service.Status(t.Context(), r, st.OperationID); err != nil {
		t.Fatal(err)
	}
	return st.OperationID, st.RegistrationState, nil
}

func serialOf(t testing.TB, st *dps.RegistrationState) string {
	t.Helper()
	if len(st.IssuedCertificateChain) == 0 {
		t.Fatalf("no chain: %+v", st)
	}
	c, err := x509.ParseCertificate(st.IssuedCertificateChain[0])
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%x", c.SerialNumber)
}

func mustHash(t testing.TB, k crypto.Signer) string {
	t.Helper()
	hash, err := evidence.KeyHash(k.Public())
	if err != nil {
		t.Fatal(err)
	}
	return hash
}

func code(err error) dps.Code {
	var e *dps.Error
	if errors.As(err, &e) {
		return e.Code
	}
	return 0
}

// The service goes away at each step, before and after it took effect. Started anew, it signs for the device's next request, of
// the same key, what it had planned: no serial number is forgotten, and none is another's.
func TestIssuanceSurvives(t *testing.T) {
	broken := errors.New("the power failed")
	for name, arm := range map[string]func(*watched){
		"before it signs":    func(w *watched) { w.signing = func(ca.Plan) error { return broken } },
		"after it signed":    func(w *watched) { w.signed = func(ca.Plan) error { return broken } },
		"in a panic":         func(w *watched) { w.signed = func(ca.Plan) error { panic(broken) } },
		"twice after it did": func(w *watched) { w.signed = func(ca.Plan) error { return broken } },
	} {
		t.Run(name, func(t *testing.T) {
			f, w := newIssuance(t)
			key := registrationtest.ECKey(t, elliptic.P256())
			arm(w)
			tries := 1 + strings.Count(name, "twice")
			for range tries {
				func() {
					defer func() { _ = recover() }()
					if _, _, err := ask(t, f, csrRequest(f, "dev-1", registrationtest.CSR(t, key, "dev-1"))); code(err) != dps.CodeServiceOverloaded || !errors.Is(err, broken) {
						t.Errorf("%v", err)
					}
				}()
				f.Advance(10 * time.Minute)
			}
			if _, err := f.Service.GetRegistration(t.Context(), "dev-1"); code(err) != dps.CodeNoGroup {
				t.Errorf("a registration without its certificate: %v", err)
			}
			// What may have been signed is in the store.
			err := f.Store.View(t.Context(), func(tx registration.Tx) error {
				c, err := tx.Planned(strings.ToLower(registrationtest.Scope), "dev-1", mustHash(t, key))
				if err == nil && (c.SerialNumber != w.serials[0] || c.Thumbprint != "" || c.Issuer != "ops" || c.Name != "dev-1") {
					t.Errorf("%+v", c)
				}
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
			w.signing, w.signed = nil, nil
			f.Issues(t, map[string]registration.Issuer{"ops": w}, "ops") // a service that remembers nothing
			_, st, err := ask(t, f, csrRequest(f, "dev-1", registrationtest.CSR(t, key, "dev-1")))
			if err != nil || st.Status != dps.Assigned {
				t.Fatal(st, err)
			}
			for _, s := range append(w.serials, serialOf(t, st)) {
				if s != w.serials[0] {
					t.Errorf("serial numbers %v were signed, and %s is out", w.serials, serialOf(t, st))
				}
			}
			// Used up: the next one is another. So is one for another key, and one that nobody came for in time.
			f.Advance(2 * time.Minute)
			if _, st, err = ask(t, f, csrRequest(f, "dev-1", registrationtest.CSR(t, key, "dev-1"))); err != nil || serialOf(t, st) == w.serials[0] {
				t.Errorf("a plan is signed twice: %v", err)
			}
		})
	}
}

// One request, sent by all at once to two replicas: one serial number, one chain.
func TestIssuanceConcurrent(t *testing.T) {
	f, w := newIssuance(t)
	a := f.Service
	f.Issues(t, map[string]registration.Issuer{"ops": w}, "ops")
	b := f.Service
	r := csrRequest(f, "dev-1", registrationtest.CSR(t, registrationtest.ECKey(t, elliptic.P256()), "dev-1"))
	var wg sync.WaitGroup
	operations := make([]string, 16)
	for i := range operations {
		svc := [2]*registration.Service{a, b}[i%2]
		wg.Go(func() {
			st, err := svc.Register(t.Context(), r)
			if err != nil {
				t.Error(err)
				return
			}
			operations[i] = st.OperationID
		})
	}
	wg.Wait()
	for _, op := range operations {
		if op != operations[0] {
			t.Fatalf("operations %v", operations)
		}
	}
	for _, s := range w.serials {
		if s != w.serials[0] {
			t.Errorf("serial numbers %v", w.serials)
		}
	}
}

// What comes between a request and its certificate.
func TestIssuanceOvertaken(t *testing.T) {
	f, w := newIssuance(t)
	key := registrationtest.ECKey(t, elliptic.P256())
	csr := registrationtest.CSR(t, key, "dev-1")
	// Its key ends while it is signed.
	w.signing = func(ca.Plan) error {
		f.Import(t, bundle.Entry{Serial: "SN9", Retired: &bundle.RetiredDevice{RegistrationID: "elsewhere", Group: "line", State: bundle.Scrapped, At: f.Now(), KeyHash: mustHash(t, key)}})
		return nil
	}
	if _, _, err := ask(t, f, csrRequest(f, "dev-1", csr)); code(err) != dps.CodeBadRequest {
		t.Errorf("a key that ended meanwhile: %v", err)
	}
	// An operator disables the device.
	w.signing = func(ca.Plan) error {
		e := registrationtest.Symmetric(attest.DeriveKey(f.GroupKey, "dev-2"), nil)
		e.ProvisioningStatus = dps.EnrollmentDisabled
		f.Put(t, registration.Individual, "dev-2", e)
		w.signing = nil
		return nil
	}
	if _, st, err := ask(t, f, csrRequest(f, "dev-2", registrationtest.CSR(t, registrationtest.ECKey(t, elliptic.P256()), "dev-2"))); err != nil || st.Status != dps.Disabled || st.IssuedCertificateChain != nil {
		t.Errorf("disabled meanwhile: %+v, %v", st, err)
	}
	signed := len(w.serials)
	// Disabled before: nothing is looked at.
	if _, st, err := ask(t, f, csrRequest(f, "dev-2", []byte("nonsense"))); err != nil || st.Status != dps.Disabled || len(w.serials) != signed {
		t.Errorf("disabled: %+v, %v", st, err)
	}
}

func TestIssuanceRepeats(t *testing.T) {
	f, w := newIssuance(t)
	key := registrationtest.ECKey(t, elliptic.P256())
	first, second := registrationtest.CSR(t, key, "dev-1"), registrationtest.CSR(t, key, "dev-1")
	one, st, err := ask(t, f, csrRequest(f, "dev-1", first))
	if err != nil {
		t.Fatal(err)
	}
	serial := serialOf(t, st)
	for name, x := range map[string]struct {
		csr    []byte
		repeat bool
		same   bool
	}{"again": {first, false, true}, "marked by the transport": {first, true, true}} {
		r := csrRequest(f, "dev-1", x.csr)
		r.Repeat = x.repeat
		if op, st, err := ask(t, f, r); err != nil || (op == one) != x.same || serialOf(t, st) != serial {
			t.Errorf("%s: %v", name, err)
		}
	}
	// A repeat mark does not turn another request into the one before.
	r := csrRequest(f, "dev-1", second)
	r.Repeat = true
	if op, st, err := ask(t, f, r); err != nil || op == one || serialOf(t, st) == serial {
		t.Errorf("another request, marked: %v", err)
	}
	r = csrRequest(f, "dev-1", nil)
	r.Repeat = true
	if op, st, err := ask(t, f, r); err != nil || op == one || st.IssuedCertificateChain != nil {
		t.Errorf("no request, marked: %+v, %v", st, err)
	}
	if len(w.serials) != 2 {
		t.Errorf("%d certificates were signed", len(w.serials))
	}
}

// An issuer that ends shortens its certificates, then signs none and makes registrations fail that ask for one. Others go on.
func TestIssuerEnds(t *testing.T) {
	f, w := newIssuance(t)
	want := f.Now().Add(100 * 24 * time.Hour)
	f.Advance(50 * 24 * time.Hour)
	_, st, err := ask(t, f, csrRequest(f, "dev-1", registrationtest.CSR(t, registrationtest.ECKey(t, elliptic.P256()), "dev-1")))
	if err != nil {
		t.Fatal(err)
	}
	if c, err := x509.ParseCertificate(st.IssuedCertificateChain[0]); err != nil || !c.NotAfter.Equal(want) {
		t.Errorf("valid until %v, the issuer until %v", c.NotAfter, want)
	}
	f.Advance(51 * 24 * time.Hour)
	signed := len(w.serials)
	_, st, err = ask(t, f, csrRequest(f, "dev-2", registrationtest.CSR(t, registrationtest.ECKey(t, elliptic.P256()), "dev-2")))
	if err != nil || st.Status != dps.Failed || st.ErrorCode != int(dps.CodeBadRequest) || st.ErrorMessage == "" || st.AssignedHub != "" || st.DeviceID != "" || len(w.serials) != signed {
		t.Errorf("%+v, %v", st, err)
	}
	if _, st, err = ask(t, f, csrRequest(f, "dev-2", nil)); err != nil || st.Status != dps.Assigned {
		t.Errorf("%+v, %v", st, err)
	}
}

func TestIssuerOfEnrollment(t *testing.T) {
	f, w := newIssuance(t, hsm.ECP384)
	csr := func(id string, c elliptic.Curve) []byte {
		return registrationtest.CSR(t, registrationtest.ECKey(t, c), id)
	}
	if _, _, err := ask(t, f, csrRequest(f, "dev-1", csr("dev-1", elliptic.P256()))); code(err) != dps.CodeBadRequest {
		t.Errorf("a key that the issuer does not take: %v", err)
	}
	// The certificate is for the hub, so it has the device's name there, as the hub writes it.
	for device, want := range map[string]dps.Status{"Pump#7": dps.Failed, strings.Repeat("x", 65): dps.Failed, "Pump-7": dps.Assigned} {
		f.PutDocument(t, registration.Individual, "own-key", dps.IndividualEnrollment{RegistrationID: "own-key", DeviceID: device, Enrollment: func() dps.Enrollment {
			e := registrationtest.Symmetric(f.OwnKey, f.OtherKey)
			e.ClientCertificateIssuancePolicy = &dps.ClientCertificateIssuancePolicy{CertificateAuthorityName: "ops"}
			return e
		}()})
		d := f.ByKey("own-key", f.OwnKey)
		_, st, err := ask(t, f, &registration.Request{IDScope: d.Scope, RegistrationID: "own-key", APIVersion: csrVersion, Proof: attest.Proof{Token: d.Token},
			Body: []byte(registrationtest.CSRBody("own-key", csr("own-key", elliptic.P384())))})
		if err != nil || st.Status != want {
			t.Fatalf("%s: %+v, %v", device, st, err)
		}
		if want == dps.Assigned {
			if c, err := x509.ParseCertificate(st.IssuedCertificateChain[0]); err != nil || c.Subject.CommonName != device {
				t.Errorf("%s: %v, %v", device, c.Subject, err)
			}
		}
	}
	// The issuer is gone from the service, and the enrollment still names it; one that names it anew is refused.
	f.Service = f.Replica("hub-a.example.net")
	if _, st, err := ask(t, f, csrRequest(f, "dev-1", csr("dev-1", elliptic.P384()))); err != nil || st.Status != dps.Failed || st.ErrorCode != int(dps.CodeBadRequest) {
		t.Errorf("%+v, %v", st, err)
	}
	for kind, doc := range map[registration.Kind]string{
		registration.Individual: `{"registrationId":"new","attestation":{"type":"symmetricKey"},"clientCertificateIssuancePolicy":{"certificateAuthorityName":"ops"}}`,
		registration.Group:      `{"enrollmentGroupId":"new","attestation":{"type":"symmetricKey"},"clientCertificateIssuancePolicy":{}}`,
	} {
		if _, err := f.Service.PutEnrollment(t.Context(), registration.Actor{}, kind, "new", []byte(doc), ""); code(err) != dps.CodeInvalidArgument || !strings.Contains(err.Error(), "certificate authority") {
			t.Errorf("%s: %v", kind, err)
		}
	}
	// No hub: nothing is signed for who gets none.
	signed := len(w.serials)
	f.Issues(t, map[string]registration.Issuer{"ops": w}, "ops", func(c *registration.Config) { c.Settings.Hubs = nil })
	if _, st, err := ask(t, f, csrRequest(f, "dev-3", csr("dev-3", elliptic.P384()))); err != nil || st.ErrorCode != int(dps.CodeNoHub) || len(w.serials) != signed {
		t.Errorf("%+v, %v", st, err)
	}
}

func TestAtOnce(t *testing.T) {
	f := registrationtest.NewFixture(t)
	for _, x := range []struct {
		pattern, client string
		want            bool
	}{
		{"azure-iot-provisioning-device/*", "azure-iot-provisioning-device/1.9.1", true}, {"azure-iot-provisioning-device/*", "azure-iot-provisioning-device/", true},
		{"azure-iot-provisioning-device/*", "azure-iot-provisioning-device", false}, {"azure-iot-provisioning-device/*", "x azure-iot-provisioning-device/1", false},
		{"azure-iot-provisioning-device/*", "", false}, {"", "", true}, {"", "x", false}, {"a", "a", true}, {"a", "ab", false}, {"a*", "ab/c (d)", true},
		{"*;x86_64*", "py/2 (python 3.11;Linux;x86_64)", true}, {"*a*b", "cabab", true}, {"*a*b", "ba", false}, {"a*a", "a", false}, {"a*a", "aa", true}, {"*", "", true}, {"**", "x", true}, {"[a]?", "a1", false},
	} {
		f.Issues(t, nil, "", func(c *registration.Config) { c.AtOnce = []string{"nobody", x.pattern} })
		r := csrRequest(f, "dev-1", nil)
		r.ClientVersion = x.client
		st, err := f.Service.Register(t.Context(), r)
		if err != nil || (st.RegistrationState != nil) != x.want || (st.Status == dps.Assigned) != x.want {
			t.Errorf("%q, %q: %+v, %v", x.pattern, x.client, st, err)
		}
	}
}

// Whatever comes as a request, the device gets a certificate for a key that signed its name, or 400.
func FuzzCSR(f *testing.F) {
	fix, _ := newIssuance(f)
	good := registrationtest.CSR(f, registrationtest.ECKey(f, elliptic.P256()), "dev-1")
	f.Add(base64.StdEncoding.EncodeToString(good))
	f.Add(base64.StdEncoding.EncodeToString(append(bytes.Clone(good), 0)))
	f.Add("MIIB")
	f.Fuzz(func(t *testing.T, text string) {
		if text == "" || strings.ContainsFunc(text, func(r rune) bool { return r < ' ' || r > '~' || r == '"' || r == '\\' }) {
			return
		}
		r := csrRequest(fix, "dev-1", nil)
		r.Body = []byte(`{"csr":"` + text + `"}`)
		_, st, err := ask(t, fix, r)
		if err != nil {
			if c := code(err); c.Status() != 400 && c.Status() != 413 {
				t.Fatalf("%q: %v", text, err)
			}
			return
		}
		der, err := base64.StdEncoding.Strict().DecodeString(text)
		if err != nil {
			t.Fatalf("%q is signed", text)
		}
		csr, err := x509.ParseCertificateRequest(der)
		if err != nil || csr.CheckSignature() != nil || dps.Fold(csr.Subject.CommonName) != "dev-1" {
			t.Fatalf("%q is signed: %v", text, err)
		}
		if c, err := x509.ParseCertificate(st.IssuedCertificateChain[0]); err != nil || !bytes.Equal(c.RawSubjectPublicKeyInfo, csr.RawSubjectPublicKeyInfo) || c.Subject.CommonName != "dev-1" || c.IsCA {
			t.Fatalf("%q: %v, %v", text, c, err)
		}
	})
}

// A token that hangs holds its callers no longer than registerTime, and when it is back the same plan is signed.
func TestIssuerHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, w := newIssuance(t)
		hold := make(chan struct{})
		w.signing = func(ca.Plan) error { <-hold; return nil }
		keys := make([]crypto.Signer, runtime.GOMAXPROCS(0)+2)
		var wg sync.WaitGroup
		for i := range keys {
			keys[i] = registrationtest.ECKey(t, elliptic.P256())
			id := fmt.Sprint("dev-", i)
			r := csrRequest(f, id, registrationtest.CSR(t, keys[i], id))
			wg.Go(func() {
				if _, err := f.Service.Register(t.Context(), r); code(err) != dps.CodeServiceOverloaded || !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("%s: %v", id, err)
				}
			})
		}
		wg.Wait()
		if w.mu.Lock(); len(w.serials) != len(keys)-2 {
			t.Errorf("an issuer that hangs was asked for %d certificates", len(w.serials))
		}
		w.mu.Unlock()
		close(hold)
		synctest.Wait()
		hung := slices.Clone(w.serials)
		for i, k := range keys {
			id := fmt.Sprint("dev-", i)
			_, st, err := ask(t, f, csrRequest(f, id, registrationtest.CSR(t, k, id)))
			if err != nil {
				t.Fatal(err)
			}
			hung = slices.DeleteFunc(hung, func(s string) bool { return s == serialOf(t, st) })
		}
		if len(hung) > 0 {
			t.Errorf("plans %v were signed, and others after them", hung)
		}
	})
}

// What a device got of the service does not prove it to the service, also where a group above the issuer was there first.
func TestOperationalProof(t *testing.T) {
	f := registrationtest.NewFixture(t)
	a := f.NewAuthority(t, 100*24*time.Hour)
	other := attesttest.CA(t, &holder{Certificate: a.Issuing, Key: a.Key.(*ecdsa.PrivateKey)}, "below")
	f.Put(t, registration.Group, "company", registrationtest.Signers(&holder{Certificate: a.Root}, nil))
	f.Issues(t, map[string]registration.Issuer{"ops": f.Issuer(t, a)}, "ops")
	_, st, err := ask(t, f, csrRequest(f, "dev-1", registrationtest.CSR(t, registrationtest.ECKey(t, elliptic.P256()), "dev-1")))
	if err != nil {
		t.Fatal(err)
	}
	r := csrRequest(f, "dev-1", nil)
	r.Proof = attest.Proof{}
	for _, der := range st.IssuedCertificateChain {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		r.Proof.Certificates = append(r.Proof.Certificates, c)
	}
	if _, st, err := ask(t, f, r); code(err) != dps.CodeUnauthorized {
		t.Errorf("%+v, %v", st, err)
	}
	// It is the issuer that refuses it: without one, the group admits it.
	f.Service = f.Replica("hub-a.example.net")
	if _, st, err := ask(t, f, r); err != nil || st.Status != dps.Assigned {
		t.Errorf("without an issuer: %+v, %v", st, err)
	}
	f.Issues(t, map[string]registration.Issuer{"ops": f.Issuer(t, a)}, "ops")
	for name, c := range map[string]*x509.Certificate{"root": a.Root, "issuing": a.Issuing, "other": other.Certificate} {
		off := disabled(registrationtest.Signers(&holder{Certificate: c}, nil))
		for id, e := range map[string]dps.Enrollment{"on": registrationtest.Signers(&holder{Certificate: c}, nil), "off": off} {
			body, err := json.Marshal(dps.EnrollmentGroup{EnrollmentGroupID: name + id, Enrollment: e})
			if err != nil {
				t.Fatal(err)
			}
			_, err = f.Service.PutEnrollment(t.Context(), registration.Actor{}, registration.Group, name+id, body, "")
			if refused := name != "other" && id == "on"; refused != (code(err) == dps.CodeInvalidArgument && strings.Contains(err.Error(), `"ops" issues`)) {
				t.Errorf("%s, %s: %v", name, id, err)
			}
			_ = f.Service.DeleteEnrollment(t.Context(), registration.Actor{}, registration.Group, name+id, "")
		}
	}
	_ = f.Service.DeleteEnrollment(t.Context(), registration.Actor{}, registration.Group, "company", "")
	res, err := f.Service.Import(t.Context(), entries(bundle.Entry{Group: &dps.EnrollmentGroup{EnrollmentGroupID: "again", Enrollment: registrationtest.Signers(&holder{Certificate: a.Root}, nil)}}), registration.ImportConfig{})
	if err != nil || res.Conflicting != 1 {
		t.Errorf("by a bundle: %+v, %v", res, err)
	}
}

// A key has one device: what an operational certificate says counts as much as what a bundle does.
func TestImportOfIssuedKey(t *testing.T) {
	f, _ := newIssuance(t)
	k := registrationtest.ECKey(t, elliptic.P256())
	if _, st, err := ask(t, f, csrRequest(f, "dev-1", registrationtest.CSR(t, k, "dev-1"))); err != nil || len(st.IssuedCertificateChain) == 0 {
		t.Fatal(st, err)
	}
	for id, want := range map[string]registration.ImportResult{"dev-2": {Conflicting: 1}, "dev-1": {New: 1}} {
		e := bundle.Entry{Serial: "S-" + id, Device: &bundle.GroupDevice{RegistrationID: id, Group: "line", KeyHash: mustHash(t, k)}}
		res, err := f.Service.Import(t.Context(), entries(e), registration.ImportConfig{})
		if err != nil || res.Conflicting != want.Conflicting || res.New != want.New {
			t.Errorf("%s: %+v, %v", id, res, err)
		}
	}
}
