package registration_test

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

// An enrollment that is taken can be shown, and shows no secret; whatever else comes is an error of the caller's.
func FuzzPutEnrollment(f *testing.F) {
	fix := registrationtest.NewFixture(f, "hub-a.example.net")
	for _, s := range []string{
		`{"registrationId":"x","attestation":{"type":"symmetricKey","symmetricKey":{"primaryKey":"c2VjcmV0c2VjcmV0c2VjcmV0","secondaryKey":null}},"provisioningStatus":"Disabled"}`,
		`{"registrationId":"x","attestation":{"type":"x509","x509":{"clientCertificates":{"primary":{"certificate":"` + fix.Mid.Base64() + `"}}}}}`,
		`{"registrationId":"X","attestation":{"type":"symmetricKey"},"initialTwin":{"tags":{"a":1},"properties":{"desired":{"b":[null]}}},"reprovisionPolicy":{"updateHubAssignment":true},"allocationPolicy":"hashed","iotHubs":["a"],"capabilities":{"iotEdge":true}}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		_, err := fix.Service.PutEnrollment(t.Context(), registration.Individual, "x", body, "")
		if err != nil {
			var e *dps.Error
			if !errors.As(err, &e) || e.Code.Status() != 400 {
				t.Fatalf("%q: %v", body, err)
			}
			return
		}
		defer func() {
			if err := fix.Service.DeleteEnrollment(t.Context(), registration.Individual, "x", ""); err != nil {
				t.Fatal(err)
			}
		}()
		v, err := fix.Service.GetEnrollment(t.Context(), registration.Individual, "x")
		if err != nil {
			t.Fatalf("%q: %v", body, err)
		}
		b, err := dps.Marshal(v)
		if err != nil || !json.Valid(b) || strings.Contains(string(b), `Key":"`) || strings.Contains(string(b), `"certificate":"`) {
			t.Fatalf("%q shows as %s, %v", body, b, err)
		}
	})
}

// A register body is accepted or refused; it never becomes the service's own fault.
func FuzzRegister(f *testing.F) {
	fix := registrationtest.NewFixture(f, "hub-a.example.net")
	d := fix.Derived("dev-1")
	f.Add([]byte(`{"registrationId":"dev-1","payload":{"a":[1,null]},"tpm":{"endorsementKey":"AA\/="}}`), "2019-03-31")
	f.Add([]byte(`{"csr":"MIIB"}`), "2025-07-01-preview")
	f.Fuzz(func(t *testing.T, body []byte, version string) {
		req := &registration.Request{IDScope: d.Scope, RegistrationID: d.ID, APIVersion: version, Proof: attest.Proof{Token: d.Token}, Body: body}
		if _, err := fix.Service.Register(t.Context(), req); err != nil && dps.AsError(err).Code.Status() >= 500 {
			t.Fatalf("%q under %q: %v", body, version, err)
		}
	})
}
