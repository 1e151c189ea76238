package arm_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore/to"
	dpsarm "github.com/Azure/azure-sdk-for-go/sdk/resourcemanager/deviceprovisioningservices/armdeviceprovisioningservices"

	"github.com/touchmark/touchmark/pkg/arm"
	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
)

var registrationActor = registration.Actor{Name: "test"}

// fill gives a service so many registrations and enrollments, whose IDs begin with prefix.
func (b *bench) fill(name, prefix string, n int) {
	b.t.Helper()
	scope := dps.Fold(b.scope(name).ID)
	for from := 0; from < n; from += 500 {
		if err := b.store.Update(context.Background(), func(tx registration.Tx) error {
			for i := from; i < min(from+500, n); i++ {
				id := fmt.Sprintf("%s-%06d", prefix, i)
				r := &registration.Registration{ID: id, State: dps.RegistrationState{RegistrationID: id, DeviceID: id, AssignedHub: "hub"}}
				if err := tx.PutRegistration(scope, r); err != nil {
					return err
				}
				if err := tx.PutRecord(scope, &registration.Record{Kind: registration.Individual, ID: id, Document: fmt.Appendf(nil, `{"registrationId":%q}`, id)}); err != nil {
					return err
				}
				if err := tx.PutDevice(scope, &registration.Device{ID: id, Serial: id}); err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			b.t.Fatal(err)
		}
	}
}

// A deletion that takes its time is answered at once, and told of while it runs; nobody is let in meanwhile. DPS-S 72.
func TestLongDeletion(t *testing.T) {
	b := newBench(t, func(c *arm.Config) { c.DeleteWait = -1 })
	b.put("plant", description())
	b.fill("plant", "pump", 5000)
	sc := b.scope("plant")
	svc, err := b.scopes.Service(t.Context(), sc.ID)
	if err != nil {
		t.Fatal(err)
	}
	// Begun, and nobody at it yet.
	if err := registration.CloseScope(t.Context(), b.store, sc.ID, registrationActor, "", time.Now()); err != nil {
		t.Fatal(err)
	}
	if _, err := svc.Register(t.Context(), &registration.Request{IDScope: sc.ID, RegistrationID: "pump-000001", APIVersion: "2019-03-31",
		Proof: attest.Proof{Token: attesttest.Token([]byte("k"), sc.ID, "pump-000001", time.Now().Add(time.Hour))}}); dps.AsError(err).Code != dps.CodeUnauthorized {
		t.Errorf("a device while it goes: %v", err)
	}
	for _, method := range []string{"PUT", "PATCH"} {
		if r := b.call(method, base+"/plant", `{"location":"West Europe","sku":{"name":"S1"},"properties":{}}`); r.status != 409 {
			t.Errorf("%s while it goes: %d %s", method, r.status, r.text)
		}
	}
	r := b.call("DELETE", base+"/plant", "")
	operation := r.header.Get("Azure-Asyncoperation")
	if r.status != 202 || r.text != "null" || !strings.HasPrefix(operation, b.http.URL+base+"/plant/operationResults/delete-"+sc.ID+"?") || !strings.HasPrefix(r.header.Get("Location"), b.http.URL+"/subscriptions/"+sub+"/providers/Microsoft.Devices/locations/") {
		t.Fatalf("%d %v %s", r.status, r.header, r.text)
	}
	seen := map[string]bool{}
	for !seen["Succeeded"] {
		r := b.call("GET", strings.TrimPrefix(operation, b.http.URL), "")
		seen[fmt.Sprint(r.body["status"])] = true
		location := b.call("GET", strings.TrimPrefix(strings.Replace(operation, "&asyncinfo=", "", 1), b.http.URL), "")
		if location.status != 202 && location.status != 204 {
			t.Fatalf("%d %s", location.status, location.text)
		}
	}
	if delete(seen, "Running"); len(seen) != 1 { // which TestDeletionGoesOn sees for certain
		t.Errorf("its states: %v", seen)
	}
	if r := b.call("GET", base+"/plant", ""); r.status != 404 {
		t.Errorf("afterwards: %d", r.status)
	}
	if r := b.call("DELETE", base+"/plant", ""); r.status != 404 {
		t.Errorf("again: %d", r.status)
	}
}

// Azure's poller follows a deletion that goes on, and a deletion that a process did not end goes on in the next.
func TestDeletionResumes(t *testing.T) {
	b := newBench(t, func(c *arm.Config) { c.DeleteWait = -1 })
	for _, name := range []string{"cut", "polled"} {
		b.put(name, description())
		b.fill(name, name, 1000)
	}
	cut := b.scope("cut")
	if err := registration.CloseScope(t.Context(), b.store, cut.ID, registrationActor, "", time.Now()); err != nil {
		t.Fatal(err)
	}
	if got := b.get("cut"); *got.Properties.State != "Deleting" {
		t.Errorf("closed: %s", *got.Properties.State)
	}
	p, err := b.services().BeginDelete(t.Context(), "polled", group, nil)
	if err == nil {
		_, err = p.PollUntilDone(t.Context(), poll)
	}
	if err != nil {
		t.Fatal(err)
	}
	b.stop()
	b.start()
	b.wait()
	if r := b.call("GET", base+"/cut", ""); r.status != 404 {
		t.Errorf("after the next start: %d", r.status)
	}
}

// A deletion whose replica is gone goes on at the one that is asked about it.
func TestDeletionGoesOn(t *testing.T) {
	b := newBench(t)
	b.put("cut", description())
	b.fill("cut", "cut", 1000)
	id := b.scope("cut").ID
	if err := registration.CloseScope(t.Context(), b.store, id, registrationActor, "", time.Now()); err != nil {
		t.Fatal(err)
	}
	result := base + "/cut/operationResults/delete-" + id + "?api-version=2022-02-05&asyncinfo"
	if r := b.call("GET", result, ""); r.status != 200 || !strings.Contains(r.text, "Running") {
		t.Fatalf("%d %s", r.status, r.text)
	}
	b.wait()
	if r := b.call("GET", base+"/cut", ""); r.status != 404 {
		t.Errorf("once it was asked for: %d", r.status)
	}
}

// The service that the process stands on stays.
func TestFirst(t *testing.T) {
	var first string
	b := newBench(t)
	b.put("plant", description())
	first = b.scope("plant").ID
	b.stop()
	b.start(func(c *arm.Config) { c.First = strings.ToLower(first) })
	if r := b.call("DELETE", base+"/plant", ""); r.status != 409 || b.scope("plant").Deleting {
		t.Errorf("%d %s", r.status, r.text)
	}
	// What is kept of another goes with it, and so does its audit record: the first one's says who did that.
	b.put("other", description())
	if r := b.call("DELETE", base+"/other", ""); r.status != 204 {
		t.Errorf("%d %s", r.status, r.text)
	}
	var entries []*registration.Audit
	if err := b.store.View(t.Context(), func(tx registration.Tx) (err error) {
		entries, err = tx.Audits(dps.Fold(first), "", 100)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if last := entries[len(entries)-1]; last.Action != "delete" || last.Object != "scope/other" || last.Actor == "" || last.Before == "" {
		t.Errorf("the last entry: %+v", last)
	}
}

// Of a service that was deleted its devices' IDs are in no file of the store any more, among others' that stay.
func TestErasure(t *testing.T) {
	b := newBench(t)
	b.put("gone", description())
	b.put("kept", description())
	for i := range 6 { // in turns, so that pages hold rows of both
		b.fill("gone", fmt.Sprintf("secretpump%d", i), 300)
		b.fill("kept", fmt.Sprintf("otherpump%d", i), 300)
	}
	// Some go and change before.
	scope := dps.Fold(b.scope("gone").ID)
	if err := b.store.Update(t.Context(), func(tx registration.Tx) error {
		for i := range 300 {
			if err := tx.DeleteRegistration(scope, fmt.Sprintf("secretpump0-%06d", i)); err != nil {
				return err
			}
			r, err := tx.Registration(scope, fmt.Sprintf("secretpump1-%06d", i))
			if err != nil {
				return err
			}
			r.State.AssignedHub = strings.Repeat("secretpump-hub", i%80)
			if err := tx.PutRegistration(scope, r); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if r := b.call("DELETE", base+"/gone", ""); r.status != 204 {
		t.Fatal(r.text)
	}
	for _, suffix := range []string{"", "-wal", "-shm"} {
		text, err := os.ReadFile(b.path + suffix)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: %d octets, %d of what is gone, %d of what is kept", suffix, len(text), bytes.Count(text, []byte("secretpump")), bytes.Count(text, []byte("otherpump")))
		if i := bytes.Index(text, []byte("secretpump")); i >= 0 {
			t.Errorf("service.db%s still has %q at %d", suffix, text[max(0, i-40):min(len(text), i+80)], i)
		}
	}
	if err := b.store.View(t.Context(), func(tx registration.Tx) error {
		for i := range 300 {
			if _, err := tx.Registration(dps.Fold(b.scope("kept").ID), fmt.Sprintf("otherpump5-%06d", i)); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

// Of the service that the process stands on everything can be erased that is its devices': no file of the store has it any more. It
// stays, with its hubs and its keys, and says who did that. An erasure goes on in the next process, or where it is asked about.
func TestEraseFirst(t *testing.T) {
	b := newBench(t, func(c *arm.Config) { c.DeleteWait = -1 })
	d := description()
	d.Properties.IotHubs = []*dpsarm.IotHubDefinitionDescription{{ConnectionString: to.Ptr(hubA), Location: to.Ptr("westeurope")}}
	b.put("first", d)
	b.put("kept", description())
	first := b.scope("first")
	isFirst := func(c *arm.Config) { c.First = first.ID }
	later := func(c *arm.Config) { isFirst(c); c.DeleteWait = -1 }
	b.stop()
	b.start(isFirst)
	ca := attesttest.CA(t, nil, "secretpump CA", now)
	if r := b.call("PUT", base+"/first/certificates/secretpump-ca", `{"certificate":"`+ca.Base64()+`"}`); r.status != 200 && r.status != 201 {
		t.Fatal(r.text)
	}
	for i := range 3 {
		b.fill("first", fmt.Sprintf("secretpump%d", i), 300)
		b.fill("kept", fmt.Sprintf("otherpump%d", i), 300)
	}
	keys := b.call("POST", base+"/first/listkeys", "").text
	if r := b.call("DELETE", base+"/first", ""); r.status != 409 || !strings.Contains(r.text, "scope erase") {
		t.Errorf("%d %s", r.status, r.text)
	}
	if r := b.call("GET", base+"/first/erase", ""); r.status != 405 {
		t.Errorf("%d %s", r.status, r.text)
	}
	if r := b.call("GET", base+"/first/operationResults/erase-"+first.ID, ""); r.status != 404 {
		t.Errorf("an erasure that nobody began: %d %s", r.status, r.text)
	}
	if r := b.call("POST", base+"/first/erase", ""); r.status != 204 {
		t.Fatal(r.text)
	}
	if b.dsn == "" {
		for _, suffix := range []string{"", "-wal", "-shm"} {
			text, err := os.ReadFile(b.path + suffix)
			if err != nil {
				t.Fatal(err)
			}
			if i := bytes.Index(text, []byte("secretpump")); i >= 0 || suffix == "" && !bytes.Contains(text, []byte("otherpump")) {
				t.Errorf("service.db%s has %q at %d", suffix, text[max(0, i-40):min(len(text), i+80)], i)
			}
		}
	}
	if got := b.get("first"); *got.Properties.State != "Active" || len(got.Properties.IotHubs) != 1 || *got.Properties.IDScope != first.ID {
		t.Errorf("%+v", got.Properties)
	}
	if got := b.actions(b.scope("first")); len(got) != 1 || !strings.HasSuffix(got[0], ": erase scope/first") || strings.HasPrefix(got[0], ":") {
		t.Errorf("audit: %q", got)
	}
	if now := b.call("POST", base+"/first/listkeys", "").text; now != keys {
		t.Errorf("its keys: %s, not %s", now, keys)
	}

	// Cut off, and taken up by the next process.
	b.fill("first", "pump", 1000)
	if err := registration.BeginErasure(t.Context(), b.store, first.ID, registrationActor, time.Now()); err != nil {
		t.Fatal(err)
	}
	if got := b.get("first"); *got.Properties.State != "Transitioning" {
		t.Errorf("its state: %s", *got.Properties.State)
	}
	if r := b.call("PATCH", base+"/first", `{"tags":{}}`); r.status != 409 || !strings.Contains(r.text, "erased") {
		t.Errorf("changed meanwhile: %d %s", r.status, r.text)
	}
	b.stop()
	b.start(later)
	b.wait()
	if sc := b.scope("first"); sc.Deleting || len(sc.Hubs) != 1 {
		t.Errorf("after the next start: %+v", sc)
	}
	if got := b.actions(b.scope("first")); len(got) != 1 || got[0] != "test: erase scope/first" {
		t.Errorf("audit: %q", got)
	}
	// Longer than a call: where to ask is in the answer.
	b.fill("first", "pump", 5000)
	r := b.call("POST", base+"/first/erase", "")
	operation := strings.TrimPrefix(r.header.Get("Azure-Asyncoperation"), b.http.URL)
	if r.status != 202 || !strings.HasPrefix(operation, base+"/first/operationResults/erase-"+first.ID+"?") {
		t.Fatalf("%d %v %s", r.status, r.header, r.text)
	}
	if again := b.call("POST", base+"/first/erase", ""); again.status != 202 && again.status != 204 {
		t.Errorf("asked twice: %d %s", again.status, again.text)
	}
	for state := ""; state != "Succeeded"; {
		r := b.call("GET", operation, "")
		if state = fmt.Sprint(r.body["status"]); r.status != 200 {
			t.Fatalf("%d %s", r.status, r.text)
		}
	}
	if err := b.store.View(t.Context(), func(tx registration.Tx) error {
		all, err := tx.Registrations(dps.Fold(first.ID), "", "", 10)
		if len(all) > 0 {
			t.Errorf("%d registrations are left", len(all))
		}
		others, err2 := tx.Registrations(dps.Fold(b.scope("kept").ID), "", "", 1000)
		if len(others) != 900 {
			t.Errorf("%d of another scope's are left", len(others))
		}
		return errors.Join(err, err2)
	}); err != nil {
		t.Error(err)
	}
}

// Bodies of services, whatever they are, are answered and leave a service that can be read.
func FuzzService(f *testing.F) {
	b := newBench(f)
	if r := b.call("PUT", base+"/plant", `{"location":"x","sku":{"name":"S1"},"properties":{}}`); r.status != 201 {
		f.Fatal(r.text)
	}
	for _, p := range []string{
		`{}`, `{"iotHubs":[{"connectionString":"` + hubA + `","location":"x"}]}`, `{"iotHubs":[{"connectionString":"HostName=hub-a.azure-devices.net;SharedAccessKey=****"}]}`,
		`{"iotHubs":[{"name":"a.example","kind":"record"}]}`, `{"ipFilterRules":[{"filterName":"a","action":"Reject","ipMask":"10.0.0.0/8","target":"deviceApi"}]}`,
		`{"authorizationPolicies":[{"keyName":"a","rights":"EnrollmentRead"}]}`, `{"authorizationPolicies":null}`, `{"allocationPolicy":"STATIC","publicNetworkAccess":"disabled"}`,
		`{"touchmark":{"quotas":"azure","strictRoots":true}}`, `[]`, `"`, `{"iotHubs":{}}`, `{"privateEndpointConnections":[{}]}`,
	} {
		f.Add(`{"location":"x","sku":{"name":"S1"},"properties":` + p + `}`)
	}
	f.Fuzz(func(t *testing.T, body string) {
		r := b.call("PUT", base+"/plant", body)
		if r.status != 200 && (r.status < 400 || r.status > 413) || r.body == nil {
			t.Fatalf("%d %s", r.status, r.text)
		}
		if r.status != 200 {
			return
		}
		shown := b.call("GET", base+"/plant", "")
		if shown.status != 200 || strings.Contains(shown.text, "MDEyMzQ1") || strings.Contains(shown.text, "primaryKey") {
			t.Fatalf("%s", shown.text)
		}
		// What was shown can be written back, and changes nothing but the etag.
		before := b.scope("plant")
		if again := b.call("PUT", base+"/plant", shown.text); again.status != 200 {
			t.Fatalf("%s comes back: %s", shown.text, again.text)
		}
		after := b.scope("plant")
		after.ETag, after.Version = before.ETag, before.Version
		one, _ := json.Marshal(before)
		two, _ := json.Marshal(after)
		if !bytes.Equal(one, two) {
			t.Errorf("%s became %s", one, two)
		}
	})
}
