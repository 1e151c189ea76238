package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/touchmark/touchmark/hsm/hsmtest"
)

// Azure's service SDK for Node, unmodified: enrollments and groups, their keys, bulk, queries by pages, registrations; and its
// names for what is refused. DPS-S 5, 44, 46, 53.
func TestNodeService(t *testing.T) {
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
	var got map[string]any
	if err := json.Unmarshal(nodeService(t, dir, "service.js", port, "symmetric-group000001", "symmetric-devices"), &got); err != nil {
		t.Fatal(err)
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

// nodeService runs a script with Azure's service SDK against the service in dir/svc, and returns what it prints.
func nodeService(t *testing.T, dir, script string, args ...string) []byte {
	t.Helper()
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
	c := exec.Command("node", append([]string{script, filepath.Join(dir, "svc", "owner.connection")}, args...)...)
	c.Dir = node
	c.Env = append(os.Environ(), "NODE_EXTRA_CA_CERTS="+filepath.Join(dir, "svc", "ca.pem"))
	var stderr bytes.Buffer
	c.Stderr = &stderr
	out, err := c.Output()
	if err != nil {
		t.Fatalf("%v: %s\n%s", err, out, stderr.String())
	}
	return out
}

// What the line minted and the service exports, with keys and certificates, makes the same enrollments at another service when Azure's
// SDK writes it there. DPS-S 102.
func TestNodeReplay(t *testing.T) {
	t.Setenv("TOUCHMARK_PASSPHRASE", "words for a test")
	from, to := t.TempDir(), t.TempDir()
	startService(t, from, "127.0.0.1:0", "127.0.0.1:0", "127.0.0.1:0")
	mintAll(t, from)
	ready, _ := startService(t, to, "127.0.0.1:0", "127.0.0.1:0", "127.0.0.1:0")
	export := func(dir string) []byte {
		t.Helper()
		file := filepath.Join(dir, "all.jsonl")
		if code, text := attempt(t, dir, "export", "--all", "--portable", "--with-keys", "--certificates", from, "--service", "svc/owner.connection", "--out", file); code != 0 {
			t.Fatal(text)
		}
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	exported := export(from)
	_, port, err := net.SplitHostPort(ready["https"].(string))
	if err != nil {
		t.Fatal(err)
	}
	lines := bytes.Count(exported, []byte("\n"))
	if out := strings.TrimSpace(string(nodeService(t, to, "replay.js", port, filepath.Join(from, "all.jsonl")))); lines != 6 || out != fmt.Sprint(lines) { // two groups, and four with enrollments of their own
		t.Errorf("%s of %d", out, lines)
	}
	if again := export(to); !bytes.Equal(exported, again) {
		t.Errorf("exported:\n%s\nand behind the client:\n%s", exported, again)
	}
}
