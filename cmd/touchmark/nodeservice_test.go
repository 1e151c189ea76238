package main

import (
	"bytes"
	"encoding/json"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/touchmark/touchmark/hsm/hsmtest"
)

// Azure's service SDK for Node, unmodified: enrollments and groups, their keys, bulk, queries by pages, registrations; and its
// names for what is refused. DPS-S 5, 44, 46, 53.
func TestNodeService(t *testing.T) {
	if _, err := exec.LookPath("node"); err != nil {
		hsmtest.Require(t, "Node.js (apt-get install nodejs npm)")
	}
	node, err := filepath.Abs(filepath.Join("..", "..", "testdata", "node"))
	if err != nil {
		t.Fatal(err)
	}
	if !exists(filepath.Join(node, "node_modules", "azure-iot-provisioning-service")) {
		hsmtest.Require(t, "Azure's service SDK for Node (npm ci --ignore-scripts in testdata/node)")
	}
	t.Setenv("TOUCHMARK_PASSPHRASE", "words for a test")
	dir := t.TempDir()
	ready, _ := startService(t, dir, "127.0.0.1:0", "127.0.0.1:0", "127.0.0.1:0")
	mintAll(t, dir)
	https := ready["https"].(string)
	if code, text := attempt(t, dir, "register", "--stamp", "stamps/symmetric-group000001", "--ca", "svc/ca.pem", "--endpoint", https); code != 0 {
		t.Fatal(text)
	}
	_, port, err := net.SplitHostPort(https)
	if err != nil {
		t.Fatal(err)
	}
	c := exec.Command("node", "service.js", filepath.Join(dir, "svc", "owner.connection"), port, "symmetric-group000001", "symmetric-devices")
	c.Dir = node
	c.Env = append(os.Environ(), "NODE_EXTRA_CA_CERTS="+filepath.Join(dir, "svc", "ca.pem"))
	var stderr bytes.Buffer
	c.Stderr = &stderr
	out, err := c.Output()
	var got map[string]any
	if jerr := json.Unmarshal(out, &got); jerr != nil || err != nil {
		t.Fatalf("%v, %v: %s\n%s", err, jerr, out, stderr.String())
	}
	want := map[string]any{}
	if err := json.Unmarshal([]byte(`{"keys":64,"exists":"DeviceAlreadyExistsError","twin":{"tags":{"site":"A7","version":1},"properties":{"desired":{"interval":30}}},"state":"unassigned","hidden":true,
		"sameKeys":true,"changed":true,"keptKeys":true,"stale":"InvalidEtagError","staleDelete":"InvalidEtagError","gone":"Error","invalid":"ArgumentError",
		"groupExists":"DeviceAlreadyExistsError","groupKeys":true,"group":"node-group",
		"bulk":{"ok":false,"errors":[["bulk-000",409201]]},"bulkUpdate":"disabled","bulkDelete":{"errors":[],"isSuccessful":true},
		"registration":{"status":"assigned","assignedHub":"hub-a.example.net"},"ofGroup":1,"forgotten":"Error"}`), &want); err != nil {
		t.Fatal(err)
	}
	for name, v := range want {
		if !reflect.DeepEqual(got[name], v) {
			t.Errorf("%s: %v, not %v", name, got[name], v)
		}
	}
	pages, _ := got["pages"].(map[string]any)
	if n, _ := pages["ids"].(float64); !reflect.DeepEqual(pages["full"], []any{50.0, 50.0, 50.0}) || n < 150 || n > 199 || len(pages["sizes"].([]any)) != 4 {
		t.Errorf("pages: %v", pages)
	}
	if n, _ := got["groups"].(float64); n < 2 {
		t.Errorf("%v groups", got["groups"])
	}
}
