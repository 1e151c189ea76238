package serviceapi_test

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

// What hubs have yet to be told, the devices that they keep, and the families of edge devices are in operators' sight, page by page,
// without a key.
func TestProvisioning(t *testing.T) {
	d, o := newOperator(t)
	scope := strings.ToLower(registrationtest.Scope)
	secret := &registration.HubDevice{ID: "dev-1", Keys: &dps.SymmetricKeyAttestation{PrimaryKey: "topsecret"}}
	orphans := []registration.Orphan{{ID: "a", Hub: "Old.example", DeviceID: "A"}, {ID: "a", Hub: "older.example", DeviceID: "A"}, {ID: strings.Repeat("b", 128), Hub: strings.Repeat("old.", 60) + "example", DeviceID: strings.Repeat("b", 128)},
		{ID: strings.Repeat("c", 128), Hub: "old.example", DeviceID: "c"}}
	err := d.Store.Update(t.Context(), func(tx registration.Tx) (err error) {
		for i := range orphans {
			err = errors.Join(err, tx.PutOrphan(scope, &orphans[i]))
		}
		return errors.Join(err, tx.PutTask(scope, &registration.Task{ID: "dev-1", LastError: "busy", Goal: &registration.Goal{Place: registration.Place{Hub: "new.example"}, Operation: "5", Device: secret},
			Away: []registration.Place{{Hub: "old.example", DeviceID: "dev-1"}}}),
			tx.PutKin(scope, &registration.Kin{ID: "dev-1", Parent: "gate", Reason: "its parent has not registered", Device: secret}))
	})
	if err != nil {
		t.Fatal(err)
	}
	all := func(path, item string, rows any) {
		t.Helper()
		var docs []json.RawMessage
		for token := ""; ; {
			header := []string{"X-Ms-Max-Item-Count: 1"}
			if token != "" {
				header = append(header, "X-Ms-Continuation: "+token)
			}
			res, b := o.call(t, "GET", path, "", header...)
			var page []json.RawMessage
			if err := json.Unmarshal(b, &page); err != nil || res.StatusCode != 200 || res.Header.Get("X-Ms-Item-Type") != item || strings.Contains(string(b), "topsecret") {
				t.Fatalf("%s: %d %s, %v", path, res.StatusCode, b, err)
			}
			docs = append(docs, page...)
			if token = res.Header.Get("X-Ms-Continuation"); token == "" {
				break
			}
		}
		b, _ := json.Marshal(docs)
		if err := json.Unmarshal(b, rows); err != nil {
			t.Fatal(err)
		}
	}
	var tasks []registration.TaskReport
	if all("/touchmark/outbox", "Task", &tasks); len(tasks) != 1 || tasks[0].RegistrationID != "dev-1" || tasks[0].State != "assigning" || tasks[0].Hub != "new.example" || tasks[0].Away[0].Hub != "old.example" || tasks[0].LastError != "busy" {
		t.Errorf("%+v", tasks)
	}
	var kin []registration.KinReport
	if all("/touchmark/edges/Gate/children", "Child", &kin); len(kin) != 1 || kin[0].RegistrationID != "dev-1" || kin[0].Linked || kin[0].Pending == "" {
		t.Errorf("%+v", kin)
	}
	var left []registration.Orphan
	if all("/touchmark/orphans", "Orphan", &left); len(left) != 4 || left[0].Hub != "Old.example" || left[3].DeviceID != "c" {
		t.Errorf("%+v", left)
	}
	if res, b := o.call(t, "DELETE", "/touchmark/orphans/A?hub=OLD.example&deviceId=A", ""); res.StatusCode != 204 {
		t.Errorf("%d %s", res.StatusCode, b)
	}
	o.want(t, 404, dps.CodeNotFound, "DELETE", "/touchmark/orphans/a?hub=old.example&deviceId=A", "")
	if all("/touchmark/orphans", "Orphan", &left); len(left) != 3 {
		t.Errorf("%+v", left)
	}
	if _, b := o.call(t, "GET", "/touchmark/audit", "", "X-Ms-Max-Item-Count: 1000"); !strings.Contains(string(b), `"object":"orphan/OLD.example/A"`) {
		t.Errorf("%s", b)
	}
}
