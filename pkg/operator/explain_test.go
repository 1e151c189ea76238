package operator_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"crypto/x509"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/operator"
	"github.com/touchmark/touchmark/pkg/operator/azuretest"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

// What packages attest and registration give as a reason is explained, each in words of its own.
func TestExplainReasons(t *testing.T) {
	words, own := make(map[string]string), doc(t, `{"registrationId":"a","attestation":{"type":"symmetricKey"}}`)
	for reason, cause := range map[string]string{
		attest.ErrExpired.Error(): "token-expired", attest.ErrResource.Error(): "token-resource", attest.ErrMalformed.Error(): "token-malformed", attest.ErrSignature.Error(): "signature",
		attest.ErrCommonName.Error(): "common-name", attest.ErrValidity.Error() + ": CN=x": "validity", attest.ErrChain.Error(): "chain", attest.ErrNoCertificate.Error(): "no-certificate",
		attest.ErrAmbiguous.Error(): "ambiguous-ca", attest.ErrTPMKey.Error(): "tpm-key", "unknown ID scope": "unknown-scope", `group "g" is disabled`: "disabled",
		"the certificate is not the enrolled one": "other-certificate", "the enrollment does not attest by certificate": "not-certificate", "the enrollment does not attest by symmetric key": "not-symmetric",
		"no enrollment has this registration ID and no group's key derives the one it was signed with": "no-derived-key", "its key belonged to an identity that ended": "ended",
		`group "g" is closed and no bundle named the device for it`: "not-named", `group "g" is closed and the key is not the one of the device's revision 2`: "other-revision",
		`group "g": CA certificate not found: certificate "root" is not verified`: "ca-unverified", `group "g": CA certificate not found`: "ca-missing",
		`the caller's address is not let in: IP rule "no"`: "address", "the caller's address is not let in: public network access is disabled": "network-off",
		"something that nobody has heard of": "unauthorized",
	} {
		d := &operator.Diagnosis{RegistrationID: "a", Told: true, Kinds: map[dps.AttestationType]int{dps.AttestationX509: 1}, Attempts: []operator.Attempt{{Code: dps.CodeUnauthorized, Reason: "refused: " + reason}}}
		found := operator.Explain(d, "")
		if len(found) == 0 || found[0].Cause != cause || found[0].Words == "" || found[0].Next == "" {
			t.Errorf("%s: %+v", reason, found)
			continue
		}
		if other, taken := words[found[0].Words]; taken && other != cause {
			t.Errorf("%s and %s have the same words", cause, other)
		}
		words[found[0].Words] = cause
	}
	for _, rule := range registrationtest.Rules(t, "../registration") {
		found := operator.Explain(&operator.Diagnosis{Told: true, Enrollment: own, Attempts: []operator.Attempt{{Code: dps.CodeUnauthorized, Rule: rule}}}, "")
		if len(found) == 0 || !found[0].Sure || found[0].Cause == "unauthorized" || found[0].Next == "" {
			t.Errorf("rule %s: %+v", rule, found)
		}
	}
	for code, cause := range map[dps.Code]string{dps.CodeNoHub: "no-hub", dps.CodeHubRefused: "hub-refused", 400207: "webhook", dps.CodeBadCSR: "bad-csr", dps.CodeThrottled: "throttled"} {
		st := &dps.RegistrationState{Status: dps.Failed, ErrorCode: int(code), ErrorMessage: "x"}
		if found := operator.Explain(&operator.Diagnosis{Registration: st}, ""); len(found) != 1 || found[0].Cause != cause || !found[0].Sure {
			t.Errorf("%d: %+v", code, found)
		}
	}
	// What nobody has words for is told as it was written down.
	d := &operator.Diagnosis{Told: true, Enrollment: own, Attempts: []operator.Attempt{{Code: dps.CodeUnauthorized, Reason: "401002 Unauthorized: the moon is full"}}}
	if found := operator.Explain(d, ""); !found[0].Sure || !strings.HasSuffix(found[0].Words, "What the service wrote down: the moon is full.") {
		t.Errorf("%+v", found)
	}
	// An enrollment that was deleted since counts more than what it refused.
	for _, a := range []operator.Attempt{{Code: dps.CodeUnauthorized, Rule: "signature"}, {Result: "assigned", Operation: "register"}, {Result: "disabled"}} {
		d = &operator.Diagnosis{Told: true, Attempts: []operator.Attempt{a}, Kinds: map[dps.AttestationType]int{dps.AttestationX509: 1}}
		if found := operator.Explain(d, ""); found[0].Cause != "no-enrollment" || !found[0].Sure {
			t.Errorf("%+v: %+v", a, found)
		}
		d.Enrollment = own
		if found := operator.Explain(d, ""); found[0].Cause == "no-enrollment" {
			t.Errorf("%+v, enrolled: %+v", a, found)
		}
	}
	d = &operator.Diagnosis{Told: true, Attempts: []operator.Attempt{{Code: dps.CodeUnauthorized, Rule: "common-name"}}, Kinds: map[dps.AttestationType]int{}}
	if found := operator.Explain(d, ""); found[0].Cause != "nothing-enrolled" {
		t.Errorf("%+v", found)
	}
	// What hubs have yet to be told of it, and what they keep.
	d = &operator.Diagnosis{Enrollment: own, Registration: &dps.RegistrationState{Status: dps.Assigned}, Task: &operator.Task{State: "cleanup", Away: []operator.Place{{Hub: "old.example"}}, Attempts: 3, Begun: now(), LastError: "no answer in time"},
		Parent: &operator.Child{Parent: "gate", Linked: true}, Orphans: []operator.Orphan{{Hub: "older.example", DeviceID: "A"}}}
	if found := operator.Explain(d, ""); len(found) != 3 || found[1].Cause != "cleanup" || found[2].Cause != "orphan" ||
		found[1].Words != "It has gone on, and hub old.example has yet to forget it: 3 attempts since 2026-01-01 00:00:00 UTC, the last failed with: no answer in time." {
		t.Errorf("%+v", found)
	}
	// What was before the device got in is over.
	d = &operator.Diagnosis{Registration: &dps.RegistrationState{Status: dps.Assigned}, Attempts: []operator.Attempt{{Result: "assigned", At: now()}, {Code: dps.CodeUnauthorized, Reason: attest.ErrChain.Error()}}}
	if found := operator.Explain(d, ""); len(found) != 1 || found[0].Cause != "assigned" {
		t.Errorf("%+v", found)
	}
}

func now() (t dps.Time) {
	_ = json.Unmarshal([]byte(`"2026-01-01T00:00:00Z"`), &t)
	return t
}

// Against a service that tells nothing, what can be seen is explained.
func TestDiagnoseFromOutside(t *testing.T) {
	s := azuretest.Start(t, azuretest.Config{})
	c, ctx := client(t, s), t.Context()
	first := func(id, group, cause string, sure bool) {
		t.Helper()
		d, err := c.Diagnose(ctx, id, group, nil)
		if err != nil || d.Told || len(d.Findings) == 0 || d.Findings[0].Cause != cause || d.Findings[0].Sure != sure {
			t.Errorf("%s by %q: %+v, %v", id, group, d, err)
		}
	}
	first("a", "", "nothing-enrolled", true)
	ca, _ := authority(t, "CA")
	for _, d := range []*operator.Document{groupOf(t, "pumps", ca, nil), doc(t, `{"enrollmentGroupId":"old","attestation":{"type":"symmetricKey"},"provisioningStatus":"disabled"}`),
		doc(t, `{"registrationId":"off","attestation":{"type":"symmetricKey"},"provisioningStatus":"disabled"}`), doc(t, `{"registrationId":"new","attestation":{"type":"symmetricKey"}}`),
		doc(t, `{"registrationId":"failed","attestation":{"type":"symmetricKey"}}`)} {
		if _, err := c.Create(ctx, d); err != nil {
			t.Fatal(err)
		}
	}
	s.Register("", "failed", "failed", map[string]any{"errorCode": 400207, "errorMessage": "Custom allocation failed with status code: 500"})
	s.Register("pumps", "in", "assigned", map[string]any{"assignedHub": "hub-a", "deviceId": "in"})
	first("a", "", "group-disabled", false)
	first("a", "pumps", "by-group", false)
	first("a", "OLD", "disabled", true)
	first("a", "nowhere", "no-group", true)
	first("OFF", "", "disabled", true)
	first("new", "", "not-seen", false)
	first("failed", "", "webhook", true)
	first("in", "", "assigned", true)
}

// Azure has no list of all registrations: they are got by its groups, and one by one.
func TestAllRegistrations(t *testing.T) {
	s := azuretest.Start(t, azuretest.Config{})
	c, ctx := client(t, s), t.Context()
	ca, _ := authority(t, "CA")
	for _, d := range []*operator.Document{groupOf(t, "Pumps", ca, nil), doc(t, `{"enrollmentGroupId":"empty","attestation":{"type":"symmetricKey"}}`),
		doc(t, `{"registrationId":"alone","attestation":{"type":"symmetricKey"}}`), doc(t, `{"registrationId":"new","attestation":{"type":"symmetricKey"}}`)} {
		if _, err := c.Create(ctx, d); err != nil {
			t.Fatal(err)
		}
	}
	s.Register("", "alone", "assigned", nil)
	s.Register("pumps", "p-1", "assigned", nil)
	s.Register("pumps", "p-2", "failed", nil)
	for group, want := range map[string]string{"": "p-1<pumps p-2<pumps alone< ", "PUMPS": "p-1<pumps p-2<pumps ", "empty": "", "nowhere": "?"} {
		got := ""
		for r, err := range c.AllRegistrations(ctx, group) {
			if errors.Is(err, operator.ErrNotFound) {
				got += "?"
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			got += r.RegistrationID + "<" + r.EnrollmentGroupID + " "
		}
		if got != want {
			t.Errorf("of %q: %q, not %q", group, got, want)
		}
	}
	for r := range c.AllRegistrations(ctx, "") { // who has seen enough is asked no more
		if r.RegistrationID != "p-1" {
			t.Error(r)
		}
		break
	}
	if err := c.ForgetAttempts(ctx, "alone"); !errors.Is(err, operator.ErrUnsupported) {
		t.Errorf("forgetting at Azure: %v", err)
	}
}

// With touchmark's log of attempts the reason itself is known. Its shape is that of GET /touchmark/diagnose; members that nobody knows do
// no harm.
func TestDiagnoseTold(t *testing.T) {
	azure := azuretest.Start(t, azuretest.Config{})
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/touchmark/diagnose/pump-1":
			fmt.Fprint(w, `{"registrationId":"pump-1","enrollment":null,"registration":null,"future":{},"explanation":["it was too early"],"attempts":[
				{"at":"2026-01-02T00:00:00Z","operation":"register","result":"refused","code":401002,"trackingId":"t2","reason":"no path to a known CA","protocol":"mqtt","remote":"192.0.2.1","group":"","proof":"x509","certificate":{"subject":"CN=pump-1","issuer":"CN=x","chain":1},"rule":"chain","more":1},
				{"at":"2026-01-01T00:00:00Z","operation":"register","result":"refused","code":401002,"trackingId":"t1","reason":"token has expired","protocol":"http"}]}`)
		default:
			azure.ServeHTTP(w, r)
		}
	}))
	defer srv.Close()
	u, err := url.Parse(srv.URL)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(srv.Certificate())
	cn, err := operator.ParseConnection("HostName=" + u.Host + azure.Connection[strings.Index(azure.Connection, ";"):])
	if err != nil {
		t.Fatal(err)
	}
	c, ctx := operator.New(operator.Config{Connection: cn, Roots: roots}), t.Context()
	d, err := c.Diagnose(ctx, "pump-1", "", nil)
	if err != nil || !d.Told || len(d.Findings) < 3 || d.Findings[0].Cause != "nothing-enrolled" || d.Findings[1].Cause != "chain" || !d.Findings[1].Sure || d.Findings[2].Cause != "token-expired" || len(d.Explanation) != 1 {
		t.Errorf("%+v, %v", d, err)
	}
}
