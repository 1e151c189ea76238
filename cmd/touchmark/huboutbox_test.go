package main

import (
	"encoding/base64"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/hub/hubtest"
)

// Every state between the service and a hub is visible by commands: a device that waits for a hub that is busy, one that waits for its
// parent, and one that a hub keeps although it was unlinked.
func TestHubOutbox(t *testing.T) {
	dir := t.TempDir()
	startServe(t, dir, "--https", "127.0.0.1:0", "--mqtt", "off", "--amqp", "off")
	m := manage(t, dir)
	stub := hubtest.StartStub(t)
	if err := os.WriteFile(filepath.Join(dir, "hub.connection"), []byte(stub.Linked("127.0.0.1").ConnectionString), 0o600); err != nil {
		t.Fatal(err)
	}
	owner := []string{"--service", filepath.Join("svc", "owner.connection")}
	managed := []string{"--management", filepath.Join("svc", "management.connection")}
	touchmark(t, dir, append(managed, "hub", "link", "--connection-string-file", "hub.connection")...)

	plain := openTestService(t, dir)
	device := []byte("0123456789abcdef")
	key := base64.StdEncoding.EncodeToString(device)
	enroll := func(id, more string) {
		t.Helper()
		body := strings.NewReader(`{"registrationId":"` + id + `","attestation":{"type":"symmetricKey","symmetricKey":{"primaryKey":"` + key + `","secondaryKey":"` + key + `"}},"allocationPolicy":"static",` + more + `}`)
		if err := plain.call(t.Context(), "PUT", "/enrollments/"+id, nil, http.Header{"If-Match": {"*"}}, body, nil); err == nil {
			return
		}
		_, _ = body.Seek(0, 0)
		if err := plain.call(t.Context(), "PUT", "/enrollments/"+id, nil, nil, body, nil); err != nil {
			t.Fatal(err)
		}
	}
	register := func(id string) {
		t.Helper()
		status, answer := m.call("PUT", "/0ne00112233/registrations/"+id+"/register?api-version=2021-06-01", attesttest.Token(device, "0ne00112233", id, time.Now().Add(time.Hour)), `{"registrationId":"`+id+`"}`)
		if status != 202 {
			t.Fatalf("%s: %d %v", id, status, answer)
		}
	}
	say := func(want []string, args ...string) {
		t.Helper()
		out := touchmark(t, dir, append(args, owner...)...)
		for _, w := range want {
			if !strings.Contains(out, w) {
				t.Errorf("%s: %q is missing in\n%s", strings.Join(args, " "), w, out)
			}
		}
	}

	enroll("waits", `"iotHubs":["127.0.0.1"]`)
	enroll("child", `"iotHubs":["127.0.0.1"],"parent":"Gate"`)
	stub.Fail(func(*http.Request) hubtest.Fault { return hubtest.Fault{Status: 503} })
	register("waits")
	say([]string{"LAST ERROR\nwaits ", " assigning  127.0.0.1 ", "status 503"}, "hub", "outbox")
	say([]string{`{"registrationId":"waits","state":"assigning","hub":"127.0.0.1",`, `"lastError":"hub 127.0.0.1: `}, "hub", "outbox", "--json")
	say([]string{"Its registration waits for hub 127.0.0.1, which has yet to be told about it: ", "the last failed with: hub 127.0.0.1: ", "status 503"}, "diagnose", "waits")

	stub.Fail(nil)
	register("child")
	for deadline := time.Now().Add(time.Minute); ; { // the breaker may hold it up
		var st dps.RegistrationState
		if err := plain.call(t.Context(), "GET", "/registrations/child", nil, nil, nil, &st); err == nil && st.Status == dps.Assigned {
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("%+v, %v", st, err)
		}
	}
	say([]string{"child ", " no ", "its parent has not registered"}, "hub", "children", "gate")
	say([]string{"It is registered: device child at hub 127.0.0.1", "It is not below its parent gate yet: its parent has not registered.", "touchmark hub children gate"}, "diagnose", "child")

	touchmark(t, dir, append(managed, "hub", "unlink", "127.0.0.1", "--yes")...)
	enroll("child", `"iotHubs":["hub-a.example.net"]`)
	register("child")
	say([]string{"child ", " 127.0.0.1 ", "the hub is not linked"}, "hub", "orphans", "list")
	say([]string{"Hub 127.0.0.1 still has it as device child", "touchmark hub orphans forget"}, "diagnose", "child")
	if code, text := attempt(t, dir, append(owner, "hub", "orphans", "forget", "child", "127.0.0.1", "other", "--yes")...); code != 1 || !strings.Contains(text, "hub orphans list") {
		t.Errorf("%d: %s", code, text)
	}
	say([]string{"Orphan child is forgotten."}, "hub", "orphans", "forget", "child", "127.0.0.1", "--yes")
	if out := touchmark(t, dir, append(owner, "hub", "orphans", "list", "--json")...); out != "" {
		t.Errorf("still there: %s", out)
	}
}
