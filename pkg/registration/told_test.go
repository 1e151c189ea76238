package registration_test

import (
	"bytes"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

func thumb(c *x509.Certificate) string { return fmt.Sprintf("%X", sha256.Sum256(c.Raw)) }

// What hubs are told of devices of every kind, and when: DPS-S 97 and 98.
func TestTold(t *testing.T) {
	s := newSite(t, registration.HubAzure, "a.example")
	scopes := s.start()
	keys := func(id string) string {
		d := s.p.device("a.example", id)
		if d == nil || d.Keys == nil || d.Thumbprints != nil {
			t.Fatalf("%s is known as %+v", id, d)
		}
		return d.Keys.PrimaryKey + " " + d.Keys.SecondaryKey
	}
	derived := func(key []byte, id string) string {
		return base64.StdEncoding.EncodeToString(attest.DeriveKey(key, id))
	}
	second := bytes.Repeat([]byte("s"), 32)
	s.assign(scopes, s.Derived("Dev-1"))
	if got, want := keys("Dev-1"), derived(s.GroupKey, "Dev-1")+" "+derived(second, "Dev-1"); got != want {
		t.Errorf("keys derived of a group: %s, want %s", got, want)
	}
	// A tool that folds the ID first.
	s.assign(scopes, s.ByKey("Dev-2", attest.DeriveKey(s.GroupKey, "dev-2")))
	if got, want := keys("Dev-2"), derived(s.GroupKey, "dev-2")+" "+derived(second, "dev-2"); got != want {
		t.Errorf("keys of a folded ID: %s, want %s", got, want)
	}
	// Certificates.
	leaf := attesttest.Leaf(t, s.Root, "press-7")
	req := &registration.Request{IDScope: registrationtest.Scope, RegistrationID: "press-7", APIVersion: "2019-03-31", Proof: attest.Proof{Certificates: []*x509.Certificate{leaf.Certificate}}}
	must(scopes.Register(t.Context(), req))
	if d := s.p.device("a.example", "press-7"); d.Keys != nil || !slices.Equal(d.Thumbprints, []string{thumb(leaf.Certificate)}) {
		t.Errorf("by certificate: %+v", d)
	}
	rolled := attesttest.Leaf(t, s.Root, "press-7")
	req.Proof.Certificates[0] = rolled.Certificate
	must(scopes.Register(t.Context(), req))
	if d := s.p.device("a.example", "press-7"); !slices.Equal(d.Thumbprints, []string{thumb(rolled.Certificate)}) {
		t.Errorf("with another certificate: %+v", d)
	}
	both := dps.X509Certificates{Primary: &dps.X509Certificate{Certificate: s.Own.Base64()}, Secondary: &dps.X509Certificate{Certificate: attesttest.Leaf(t, nil, "own-cert").Base64()}}
	s.Put(t, registration.Individual, "own-cert", dps.Enrollment{Attestation: &dps.Attestation{Type: dps.AttestationX509, X509: &dps.X509Attestation{ClientCertificates: &both}}})
	must(scopes.Register(t.Context(), &registration.Request{IDScope: registrationtest.Scope, RegistrationID: "own-cert", APIVersion: "2019-03-31", Proof: attest.Proof{Certificates: []*x509.Certificate{s.Own.Certificate}}}))
	if d := s.p.device("a.example", "own-cert"); len(d.Thumbprints) != 2 || d.Thumbprints[0] != thumb(s.Own.Certificate) || d.Thumbprints[1] == d.Thumbprints[0] {
		t.Errorf("by an enrolled certificate: %+v", d)
	}
	calls := func(what string, want bool, f func()) {
		t.Helper()
		s.p.steps = nil
		f()
		if got := slices.ContainsFunc(s.p.steps, func(x string) bool { return x != "store" }); got != want {
			t.Errorf("%s: hubs were called: %t (%v)", what, got, s.p.steps)
		}
	}
	s.Advance(time.Hour)
	calls("again an hour later", false, func() { s.assign(scopes, s.Derived("Dev-1")) })
	calls("again at once", true, func() { s.assign(scopes, s.Derived("Dev-1")) })
	s.p.device("a.example", "Dev-1").tags["kept"] = true
	s.Advance(time.Hour)
	next := bytes.Repeat([]byte("n"), 64)
	s.Put(t, registration.Group, "keys", registrationtest.Symmetric(next, s.GroupKey))
	calls("the group's key is rolled", true, func() { s.assign(scopes, s.Derived("Dev-1")) })
	if got, want := keys("Dev-1"), derived(next, "Dev-1")+" "+derived(s.GroupKey, "Dev-1"); got != want || s.p.device("a.example", "Dev-1").tags["kept"] != true {
		t.Errorf("after the key was rolled: %s, want %s", got, want)
	}
	s.Advance(time.Hour)
	g := registrationtest.Symmetric(next, s.GroupKey)
	g.Capabilities = &dps.Capabilities{IoTEdge: true}
	s.Put(t, registration.Group, "keys", g)
	calls("it becomes an edge device", true, func() { s.assign(scopes, s.Derived("Dev-1")) })
	if !s.p.device("a.example", "Dev-1").IoTEdge {
		t.Error("it is no edge device")
	}
	// It comes back by an individual enrollment: another key, the same device.
	s.Put(t, registration.Individual, "dev-2", registrationtest.Symmetric(s.OwnKey, s.OtherKey))
	s.p.device("a.example", "Dev-2").tags["kept"] = true
	if st := s.assign(scopes, s.ByKey("dev-2", s.OwnKey)); st.DeviceID != "Dev-2" || !strings.HasPrefix(keys("Dev-2"), base64.StdEncoding.EncodeToString(s.OwnKey)) || s.p.device("a.example", "Dev-2").tags["kept"] != true {
		t.Errorf("by another enrollment: %+v", st)
	}
	// Under the policy never it stays, with its new key.
	s.Advance(time.Hour)
	s.link(registration.HubAzure, "a.example", "b.example")
	s.own(static("a.example"))
	s.assign(scopes, s.device())
	s.own(func(e *dps.IndividualEnrollment) {
		static("b.example")(e)
		e.ReprovisionPolicy = &dps.ReprovisionPolicy{}
		e.Attestation.SymmetricKey.SecondaryKey = base64.StdEncoding.EncodeToString(next)
	})
	if st := s.assign(scopes, s.device()); st.AssignedHub != "a.example" || !strings.HasSuffix(keys("own-key"), " "+base64.StdEncoding.EncodeToString(next)) {
		t.Errorf("never: %+v", st)
	}
	for _, id := range []string{"Dev-1", "Dev-2", "press-7", "own-key"} {
		if err := s.whole(id); err != nil {
			t.Errorf("%s: %v", id, err)
		}
	}
}

// What hubs are told of devices whose keys the service makes: a TPM's, and the operational certificates of an issuer's.
func TestToldMade(t *testing.T) {
	s := newSite(t, registration.HubAzure, "a.example")
	a := s.NewAuthority(t, 100*24*time.Hour)
	scopes := s.start(func(c *registration.Config) { c.Issuers = map[string]registration.Issuer{"ops": s.Issuer(t, a)} })
	s.Service = s.service(scopes)
	d := newTPMDevice(t, s.Fixture, "tpm-1", nil)
	s.Put(t, registration.Individual, d.id, d.enrollment(""))
	for range 2 { // each time with a key of its own
		st := d.state(s.Service, d.request(d.prove(s.Service), false))
		if st.Status != dps.Assigned || st.TPM == nil {
			t.Fatalf("%+v", st)
		}
		if err := d.Activate(t.Context(), st.TPM.AuthenticationKey); err != nil {
			t.Fatal(err)
		}
		k := s.p.device("a.example", "tpm-1")
		key, err := base64.StdEncoding.DecodeString(k.Keys.PrimaryKey)
		if err != nil || !d.has(key) || k.Keys.SecondaryKey != k.Keys.PrimaryKey {
			t.Errorf("the hub has another key than the TPM: %v", err)
		}
	}
	for name, e := range map[string]dps.Enrollment{"keys": registrationtest.Symmetric(s.GroupKey, nil), "line": registrationtest.Signers(s.Root, nil)} {
		e.ClientCertificateIssuancePolicy = &dps.ClientCertificateIssuancePolicy{CertificateAuthorityName: "ops"}
		s.Put(t, registration.Group, name, e)
	}
	leaf := newLeaf(t, s.Root, "press-7")
	for _, proof := range []struct {
		id string
		attest.Proof
	}{{"dev-1", attest.Proof{Token: s.Derived("dev-1").Token}}, {"press-7", attest.Proof{Certificates: leaf}}} {
		req := &registration.Request{IDScope: registrationtest.Scope, RegistrationID: proof.id, APIVersion: "2025-07-01-preview", Proof: proof.Proof,
			Body: []byte(registrationtest.CSRBody(proof.id, registrationtest.CSR(t, registrationtest.ECKey(t, elliptic.P256()), proof.id)))}
		op := must(scopes.Register(t.Context(), req))
		st := must(scopes.Status(t.Context(), req, op.OperationID)).RegistrationState
		if st.Status != dps.Assigned || len(st.IssuedCertificateChain) == 0 {
			t.Fatalf("%s: %+v", proof.id, st)
		}
		want := []string{fmt.Sprintf("%X", sha256.Sum256(st.IssuedCertificateChain[0]))}
		if proof.Certificates != nil {
			want = append([]string{fmt.Sprintf("%X", sha256.Sum256(leaf[0].Raw))}, want...)
		}
		if k := s.p.device("a.example", proof.id); !slices.Equal(k.Thumbprints, want) || k.Keys != nil {
			t.Errorf("%s is known by %v, want %v", proof.id, k.Thumbprints, want)
		}
		if st := must(s.Service.GetRegistration(t.Context(), proof.id)); st.IssuedCertificateChain != nil {
			t.Error("the record shows a chain")
		}
	}
}
