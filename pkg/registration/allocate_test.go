package registration_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/touchmark/touchmark/pkg/allocation"
	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

// Which hubs the policies choose: DPS-S 88 to 90, 99.
func TestPolicies(t *testing.T) {
	s := newSite(t, registration.HubRecord)
	table := must(allocation.Parse("t.csv", []byte("network,location,milliseconds\n10.0.0.0/8,eu,5\n10.0.0.0/8,us,90\n192.168.0.0/16,us,3\n")))
	scopes := s.start(func(cfg *registration.Config) { cfg.Latency = table })
	group := func(p dps.AllocationPolicy, hubs ...string) {
		e := registrationtest.Symmetric(s.GroupKey, nil)
		e.AllocationPolicy, e.IoTHubs = p, hubs
		s.Put(t, registration.Group, "keys", e)
	}
	ask := func(id, from string) *dps.RegistrationState {
		t.Helper()
		req := request(s.Derived(id))
		req.Remote = from
		op := must(scopes.Register(t.Context(), req))
		return must(scopes.Status(t.Context(), req, op.OperationID)).RegistrationState
	}
	failed := func(what string) {
		t.Helper()
		if st := ask("dev-1", ""); st.Status != dps.Failed || st.ErrorCode != int(dps.CodeNoHub) || st.ETag == "" || st.LastUpdatedDateTimeUTC == nil {
			t.Errorf("%s: %+v", what, st)
		}
	}
	failed("no hub is linked")
	s.edit(func(sc *registration.Scope) { sc.Hubs = []registration.LinkedHub{{Name: "only.example"}} })
	group(dps.AllocationStatic)
	if st := ask("dev-1", ""); st.AssignedHub != "only.example" {
		t.Errorf("static without a name: %+v", st)
	}
	s.edit(func(sc *registration.Scope) {
		sc.Hubs = []registration.LinkedHub{{Name: "eu.example", Location: "eu"}, {Name: "us.example", Location: "us", Weight: 3}, {Name: "kept.example", Location: "eu", Reserved: true}}
	})
	failed("static, of two hubs")
	group(dps.AllocationStatic, "gone.example")
	failed("static, the hub is not linked")
	group(dps.AllocationStatic, "KEPT.example")
	if st := ask("dev-1", ""); st.AssignedHub != "kept.example" {
		t.Errorf("a reserved hub that is named: %+v", st)
	}
	group("")
	const n = 2000
	count := map[string]int{}
	for i := range n {
		count[ask(fmt.Sprintf("dev-%d", i), "10.1.1.1:80").AssignedHub]++
	}
	if eu := count["eu.example"]; eu < n/4*8/10 || eu > n/4*12/10 || count["kept.example"] > 0 {
		t.Errorf("hubs weighted 1 and 3: %v", count)
	}
	s.edit(func(sc *registration.Scope) { sc.AllocationPolicy = dps.AllocationGeoLatency })
	for from, want := range map[string]string{"10.1.1.1:80": "eu.example", "10.1.1.1": "eu.example", "[::ffff:192.168.1.1]:80": "us.example", "pipe": ""} {
		for i := range 20 {
			if st := ask(fmt.Sprintf("dev-%d", i), from); want != "" && st.AssignedHub != want || st.Status != dps.Assigned {
				t.Errorf("from %s: %+v", from, st)
			}
		}
	}
	group(dps.AllocationHashed, "us.example")
	if st := ask("dev-1", "10.1.1.1:80"); st.AssignedHub != "us.example" {
		t.Errorf("an enrollment's policy goes before its scope's: %+v", st)
	}
}

// A webhook of the test's own: what it was asked, and what it answers.
type webhook struct {
	url, body, answer string
	status            int
	err               error
	asked             int
}

func (w *webhook) Call(_ context.Context, url string, body []byte) ([]byte, int, error) {
	w.url, w.body = url, string(body)
	w.asked++
	return []byte(w.answer), w.status, w.err
}

// Custom allocation: DPS-S 91 to 93, 95.
func TestCustomAllocation(t *testing.T) {
	s := newSite(t, registration.HubAzure, "a.example", "b.example")
	w := &webhook{status: 200}
	scopes := s.start(func(cfg *registration.Config) { cfg.Webhook = w })
	s.Service = s.service(scopes) // which takes such enrollments
	custom := func(e *dps.Enrollment) {
		e.AllocationPolicy = dps.AllocationCustom
		e.CustomAllocationDefinition = &dps.CustomAllocationDefinition{WebhookURL: "https://f.example/api/allocate?code=topsecret&x=1", APIVersion: "2019-03-31"}
	}
	own := func(edit func(*dps.IndividualEnrollment)) {
		s.own(func(e *dps.IndividualEnrollment) { custom(&e.Enrollment); edit(e) })
	}
	own(func(*dps.IndividualEnrollment) {})
	d := s.device()
	ask := func(d registrationtest.Device) *dps.RegistrationState {
		t.Helper()
		req := request(d)
		req.Body = []byte(`{"registrationId":"` + d.ID + `","payload":{"model":"x1"}}`)
		op := must(scopes.Register(t.Context(), req))
		return must(scopes.Status(t.Context(), req, op.OperationID)).RegistrationState
	}
	type body struct {
		IndividualEnrollment, EnrollmentGroup map[string]any
		DeviceRuntimeContext                  map[string]any
		LinkedHubs                            []string
	}
	asked := func() (b body) {
		t.Helper()
		if err := json.Unmarshal([]byte(w.body), &b); err != nil {
			t.Fatal(err)
		}
		for _, secret := range []string{"topsecret", "primaryKey", "secondaryKey", `"certificate":`} {
			if strings.Contains(w.body, secret) {
				t.Errorf("the webhook is shown %s: %s", secret, w.body)
			}
		}
		if w.url != "https://f.example/api/allocate?code=topsecret&x=1" {
			t.Errorf("called %s", w.url)
		}
		if (b.IndividualEnrollment == nil) == (b.EnrollmentGroup == nil) {
			t.Errorf("it is shown both, or neither: %s", w.body)
		}
		return b
	}
	w.answer = `{"iotHubHostName":"B.example","initialTwin":{"tags":{"from":"webhook"},"properties":{"desired":{"interval":5}}},"payload":{"hello":"device"},"more":1}`
	if st := ask(d); st.Status != dps.Assigned || st.AssignedHub != "b.example" || string(st.Payload) != `{"hello":"device"}` {
		t.Errorf("%+v", st)
	}
	b := asked()
	if c := b.DeviceRuntimeContext; c["registrationId"] != "own-key" || c["symmetricKey"] == nil || c["x509"] != nil || c["currentIotHubHostName"] != nil || fmt.Sprint(c["payload"]) != "map[model:x1]" {
		t.Errorf("runtime context %v", c)
	}
	if def := b.IndividualEnrollment["customAllocationDefinition"].(map[string]any); def["webhookUrl"] != "https://f.example/api/allocate?****" || !strings.HasPrefix(b.IndividualEnrollment["etag"].(string), `"`) {
		t.Errorf("%v", b.IndividualEnrollment)
	}
	if !slices.Equal(b.LinkedHubs, []string{"a.example", "b.example"}) {
		t.Errorf("%v", b.LinkedHubs)
	}
	if k := s.p.device("b.example", "own-key"); fmt.Sprint(k.tags, k.desired) != "map[from:webhook] map[interval:5]" {
		t.Errorf("%v %v", k.tags, k.desired)
	}
	if st := must(s.service(scopes).GetRegistration(t.Context(), "own-key")); string(st.Payload) != `{"hello":"device"}` {
		t.Errorf("%+v", st)
	}
	// Under never it is asked, and may say no more than it did.
	own(func(e *dps.IndividualEnrollment) { e.ReprovisionPolicy = &dps.ReprovisionPolicy{} })
	w.answer, w.asked = `{"iotHubHostName":"b.example","payload":null}`, 0
	if st := ask(d); st.AssignedHub != "b.example" || st.Payload != nil || w.asked != 1 {
		t.Errorf("never: %+v, asked %d times", st, w.asked)
	}
	if b := asked(); !slices.Equal(b.LinkedHubs, []string{"b.example"}) || b.DeviceRuntimeContext["currentIotHubHostName"] != "b.example" || b.DeviceRuntimeContext["currentDeviceId"] != "own-key" {
		t.Errorf("never: %s", w.body)
	}
	own(func(*dps.IndividualEnrollment) {})
	for _, x := range []struct {
		answer string
		status int
		err    error
		want   int
	}{
		{`{}`, 400, nil, 400}, {`{"iotHubHostName":"a.example"}`, 503, nil, 503}, {"", 0, errors.New("no answer"), 408}, {"nope", 200, nil, 400}, {`{"iotHubHostName":"c.example"}`, 200, nil, 400},
		{`{"initialTwin":null}`, 200, nil, 400}, {`{"iotHubHostName":"a.example","payload":[1]}`, 200, nil, 400}, {`{"iotHubHostName":"a.example","initialTwin":{"tags":3}}`, 200, nil, 400},
		{`{"iotHubHostName":"a.example","payload":{"x":"` + strings.Repeat("y", 20000) + `"}}`, 200, nil, 400},
	} {
		w.answer, w.status, w.err = x.answer, x.status, x.err
		want := fmt.Sprintf("Custom allocation failed with status code: %d", x.want)
		if st := ask(d); st.Status != dps.Failed || st.ErrorCode != 400207 || st.ErrorMessage != want {
			t.Errorf("%d %.60s: %+v", x.status, x.answer, st)
		}
	}
	if err := s.whole("own-key"); err != nil {
		t.Error(err)
	}
	// Of a group, by key and by certificate.
	w.answer, w.status, w.err = `{"iotHubHostName":"a.example"}`, 200, nil
	for name, e := range map[string]dps.Enrollment{"keys": registrationtest.Symmetric(s.GroupKey, nil), "line": registrationtest.Signers(s.Root, nil)} {
		custom(&e)
		s.Put(t, registration.Group, name, e)
	}
	if st := ask(s.Derived("dev-1")); st.AssignedHub != "a.example" || asked().EnrollmentGroup["enrollmentGroupId"] != "keys" {
		t.Errorf("%+v", st)
	}
	leaf := newLeaf(t, s.Root, "press-7")
	req := &registration.Request{IDScope: registrationtest.Scope, RegistrationID: "press-7", APIVersion: "2019-03-31", Proof: attest.Proof{Certificates: leaf}}
	must(scopes.Register(t.Context(), req))
	if c := asked().DeviceRuntimeContext; c["x509"] == nil || c["symmetricKey"] != nil || !strings.Contains(w.body, "CN=press-7") {
		t.Errorf("%v", c)
	}
	for _, bad := range []*dps.CustomAllocationDefinition{nil, {WebhookURL: "https://f.example"}, {WebhookURL: "/f", APIVersion: "1"}, {WebhookURL: "ftp://f.example", APIVersion: "1"}} {
		e := registrationtest.Symmetric(s.OwnKey, nil)
		e.AllocationPolicy, e.CustomAllocationDefinition = dps.AllocationCustom, bad
		doc := must(json.Marshal(dps.IndividualEnrollment{RegistrationID: "x", Enrollment: e}))
		if _, err := s.Service.PutEnrollment(t.Context(), registration.Actor{}, registration.Individual, "x", doc, ""); dps.AsError(err).Code != dps.CodeInvalidArgument {
			t.Errorf("%+v: %v", bad, err)
		}
	}
}
