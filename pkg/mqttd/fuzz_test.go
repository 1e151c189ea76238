package mqttd

import (
	"strings"
	"testing"

	"github.com/touchmark/touchmark/pkg/dps"
)

func FuzzUsername(f *testing.F) {
	f.Add("0ne00000001/registrations/dev-1/api-version=2019-03-31&ClientVersion=azure-iot-provisioning-device%2F1.9.1")
	f.Add("0ne00000001/registrations/dev-1/?ClientVersion=a/b (c; d)&api-version=2025-07-01-preview")
	f.Fuzz(func(t *testing.T, s string) {
		scope, id, version, _, err := parseUsername(s)
		if err == nil && (dps.CheckAPIVersion(version) != nil || !strings.HasPrefix(s, scope+"/") || !strings.Contains(s, "/"+id+"/")) {
			t.Fatalf("%q: scope %q, ID %q, version %q", s, scope, id, version)
		}
	})
}

// Whatever a request's topic holds, the response's topic is one that every SDK's parser reads the same.
func FuzzQuery(f *testing.F) {
	f.Add("$rid=1&operationId=5.0000000000000000.00000000-0000-0000-0000-000000000000")
	f.Add("operationId=x&$rid=6f9619ff-8b86-d011-b42d-00cf4fc964ff&y")
	f.Fuzz(func(t *testing.T, s string) {
		rid, operation := parseQuery(s)
		if strings.Contains(rid, "&") || strings.Contains(operation, "&") {
			t.Fatalf("%q: $rid %q, operation %q", s, rid, operation)
		}
		reply := dps.NewReply(&dps.OperationStatus{OperationID: "o", Status: dps.Assigning}, nil)
		topic := responseTopic(rid, reply)
		if topic != "$dps/registrations/res/202/?$rid="+rid+"&retry-after=3" || len(reply.Body) < 2 {
			t.Fatalf("%q: %q %q", s, topic, reply.Body)
		}
	})
}
