package registration_test

import (
	"bytes"
	"crypto/x509"
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/bundle"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

// A certificate that is in both slots is in the store once, and in both slots for everybody who looks: operators, hubs and devices.
func TestSlots(t *testing.T) {
	s := newSite(t, registration.HubAzure, "a.example")
	scopes := s.start()
	a, b := attesttest.Leaf(t, nil, "pump-1"), attesttest.Leaf(t, nil, "pump-1")
	scope := strings.ToLower(registrationtest.Scope)
	slots := func(primary, secondary *attesttest.Holder) dps.IndividualEnrollment {
		certs := &dps.X509Certificates{Primary: &dps.X509Certificate{Certificate: primary.Base64()}}
		if secondary != nil {
			certs.Secondary = &dps.X509Certificate{Certificate: secondary.Base64()}
		}
		return dps.IndividualEnrollment{RegistrationID: "pump-1", Enrollment: dps.Enrollment{Attestation: &dps.Attestation{Type: dps.AttestationX509, X509: &dps.X509Attestation{ClientCertificates: certs}}}}
	}
	shown := func() (thumbs []string, e dps.IndividualEnrollment) {
		t.Helper()
		doc, err := s.Service.GetEnrollment(t.Context(), registration.Individual, "pump-1")
		if err != nil {
			t.Fatal(err)
		}
		text, _ := json.Marshal(doc)
		if err := json.Unmarshal(text, &e); err != nil {
			t.Fatal(err)
		}
		for _, c := range []*dps.X509Certificate{e.Attestation.X509.ClientCertificates.Primary, e.Attestation.X509.ClientCertificates.Secondary} {
			thumbs = append(thumbs, strings.ToUpper(c.Info.SHA256Thumbprint))
		}
		return thumbs, e
	}
	hold := func(what string, copies int, first, second *attesttest.Holder) {
		t.Helper()
		var kept []byte
		if err := s.Store.View(t.Context(), func(tx registration.Tx) error {
			r, err := tx.Record(scope, registration.Individual, "pump-1")
			if err == nil {
				kept = r.Document
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
		if n := bytes.Count(kept, []byte(`"certificate":`)); n != copies || !bytes.Contains(kept, []byte(first.Base64())) || !bytes.Contains(kept, []byte(second.Base64())) {
			t.Errorf("%s: the store has %d certificates: %s", what, n, kept)
		}
		want := []string{thumb(first.Certificate), thumb(second.Certificate)}
		if got, _ := shown(); !slices.Equal(got, want) {
			t.Errorf("%s: shown as %v, want %v", what, got, want)
		}
		for _, h := range []*attesttest.Holder{first, second} {
			must(scopes.Register(t.Context(), &registration.Request{IDScope: registrationtest.Scope, RegistrationID: "pump-1", APIVersion: "2019-03-31", Proof: attest.Proof{Certificates: []*x509.Certificate{h.Certificate}}}))
			if d := s.p.device("a.example", "pump-1"); d == nil || !slices.Equal(d.Thumbprints, want) {
				t.Errorf("%s: the hub knows %+v, want %v", what, d, want)
			}
		}
	}
	put := func(e dps.IndividualEnrollment) { s.PutDocument(t, registration.Individual, "pump-1", e) }
	put(slots(a, nil))
	hold("one slot", 1, a, a)
	put(slots(a, b))
	hold("two", 2, a, b)
	put(slots(b, b))
	hold("the same twice", 1, b, b)
	_, e := shown() // as operators send back what they were shown: without certificates
	e.Attestation.X509.ClientCertificates.Primary = &dps.X509Certificate{Certificate: a.Base64()}
	put(e)
	hold("the first one rolled, the second described", 2, a, b)
	_, e = shown()
	put(e)
	hold("both described", 2, a, b)

	e = slots(a, nil)
	e.Attestation.X509.ClientCertificates.Secondary = &dps.X509Certificate{}
	text, _ := json.Marshal(e)
	if _, err := s.Service.PutEnrollment(t.Context(), registration.Actor{}, registration.Individual, "pump-1", text, "*"); dps.AsError(err).Code != dps.CodeInvalidArgument {
		t.Errorf("an empty slot of a client's: %v", err)
	}
	if err := s.Service.DeleteEnrollment(t.Context(), registration.Actor{}, registration.Individual, "pump-1", ""); err != nil {
		t.Fatal(err)
	}
	e = slots(a, nil)
	s.Import(t, bundle.Entry{Serial: "SN1", Individual: &e})
	hold("imported", 1, a, a)
}
