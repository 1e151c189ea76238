package registration_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/bundle"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/order"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

// An enrollment that is taken can be shown, and shows no secret; whatever else comes is an error of the caller's.
func FuzzPutEnrollment(f *testing.F) {
	fix := registrationtest.NewFixture(f, "hub-a.example.net")
	ek := newTPMDevice(f, fix, "x", nil).tpm.EndorsementKey
	public := strings.NewReplacer(`"endorsementKey":"`, "", `"storageRootKey":"`, "")
	for _, s := range []string{
		`{"registrationId":"x","attestation":{"type":"tpm","tpm":{"endorsementKey":"` + ek + `"}}}`,
		`{"registrationId":"x","attestation":{"type":"symmetricKey","symmetricKey":{"primaryKey":"c2VjcmV0c2VjcmV0c2VjcmV0","secondaryKey":null}},"provisioningStatus":"Disabled"}`,
		`{"registrationId":"x","attestation":{"type":"x509","x509":{"clientCertificates":{"primary":{"certificate":"` + fix.Mid.Base64() + `"}}}}}`,
		`{"registrationId":"X","attestation":{"type":"symmetricKey"},"initialTwin":{"tags":{"a":1},"properties":{"desired":{"b":[null]}}},"reprovisionPolicy":{"updateHubAssignment":true},"allocationPolicy":"hashed","iotHubs":["a"],"capabilities":{"iotEdge":true}}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		_, err := fix.Service.PutEnrollment(t.Context(), registration.Actor{}, registration.Individual, "x", body, "")
		if err != nil {
			var e *dps.Error
			if !errors.As(err, &e) || e.Code.Status() != 400 {
				t.Fatalf("%q: %v", body, err)
			}
			return
		}
		defer func() {
			if err := fix.Service.DeleteEnrollment(t.Context(), registration.Actor{}, registration.Individual, "x", ""); err != nil {
				t.Fatal(err)
			}
		}()
		v, err := fix.Service.GetEnrollment(t.Context(), registration.Individual, "x")
		if err != nil {
			t.Fatalf("%q: %v", body, err)
		}
		b, err := dps.Marshal(v)
		if err != nil || !json.Valid(b) || strings.Contains(public.Replace(string(b)), `Key":"`) || strings.Contains(string(b), `"certificate":"`) {
			t.Fatalf("%q shows as %s, %v", body, b, err)
		}
	})
}

// Whatever entries a bundle holds, an order is never overdrawn, nothing that was taken changes when it comes again, and no
// entry is the service's own fault.
func FuzzImport(f *testing.F) {
	fac := newFactory(f)
	fac.order.Quantity = 3
	for _, e := range [][]bundle.Entry{
		{fac.group(), unit(1, 0), unit(2, 0), unit(3, 0), unit(4, 0)}, {unit(1, 0), gone(1, 0, bundle.Reworked), unit(1, 1), gone(1, 1, bundle.Returned), unit(2, 0)},
		{{Serial: "SN0001", Individual: &dps.IndividualEnrollment{RegistrationID: "x", Enrollment: key('1')}}, {Serial: "SN0001", Revision: 2, Retired: &bundle.RetiredDevice{RegistrationID: "x", State: bundle.Voided, At: fac.Now()}}},
	} {
		b, err := json.Marshal(e)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	n := 0
	f.Fuzz(func(t *testing.T, b []byte) {
		var e []bundle.Entry
		if json.Unmarshal(b, &e) != nil || len(e) > 20 {
			return
		}
		e = slices.DeleteFunc(e, func(e bundle.Entry) bool { return e.Check() != nil })
		n++
		o := fac.newOrder(fmt.Sprint("PO-", n), 3)
		// Each run has serials of its own in the one store.
		o.Serials = order.Serials{}
		for i := range e {
			e[i].Serial = fmt.Sprintf("%d-%s", n, e[i].Serial)
			suffix := fmt.Sprint("-", n)
			switch {
			case e[i].Device != nil:
				e[i].Device.RegistrationID += suffix
			case e[i].Individual != nil:
				e[i].Individual.RegistrationID += suffix
			case e[i].Retired != nil:
				e[i].Retired.RegistrationID += suffix
			}
		}
		e = slices.DeleteFunc(e, func(e bundle.Entry) bool { return e.Check() != nil })
		cfg := registration.ImportConfig{Station: fac.holder.id, Grant: sign(t, o, fac.owner)}
		copied := func() []bundle.Entry { // an import makes the entries its own
			b, _ := json.Marshal(e)
			var again []bundle.Entry
			_ = json.Unmarshal(b, &again)
			return again
		}
		var was registration.Tally
		for round := range 2 {
			if _, err := fac.service.Import(t.Context(), entries(copied()...), cfg); err != nil {
				t.Fatal(err)
			}
			now := fac.tally(t, o.ID)
			if now.Imported > 3 || now.Imported < 0 || now.Seen != 0 || min(now.Used, now.Refused, now.Voided, now.Reworked, now.Scrapped, now.Returned) < 0 || now.Imported > now.Used {
				t.Fatalf("%s: %+v", b, now)
			}
			if round == 0 {
				was = now
			} else if now.Imported < was.Imported && now.Returned == was.Returned {
				t.Fatalf("%s: %+v, again %+v", b, was, now)
			}
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
