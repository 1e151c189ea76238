package main

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/touchmark/touchmark/hsm/hsmtest"
	"github.com/touchmark/touchmark/pkg/attest/attesttest"
)

// hubCall calls the built-in hub's registry with its connection string.
func hubCall(t *testing.T, connection, caPEM, method, path, body string) (int, map[string]any) {
	t.Helper()
	parts := make(map[string]string)
	for pair := range strings.SplitSeq(strings.TrimSpace(connection), ";") {
		name, value, _ := strings.Cut(pair, "=")
		parts[name] = value
	}
	key, err := base64.StdEncoding.DecodeString(parts["SharedAccessKey"])
	if err != nil {
		t.Fatal(err)
	}
	r, err := http.NewRequestWithContext(t.Context(), method, "https://"+parts["HostName"]+path+"?api-version=2021-04-12", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Authorization", attesttest.ServiceToken(key, parts["HostName"], parts["SharedAccessKeyName"], time.Now().Add(time.Hour)))
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(caPEM))
	tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}
	defer tr.CloseIdleConnections()
	res, err := (&http.Client{Transport: tr}).Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	var doc map[string]any
	if len(b) > 0 && json.Unmarshal(b, &doc) != nil {
		t.Fatalf("%s %s: %d %s", method, path, res.StatusCode, b)
	}
	return res.StatusCode, doc
}

// runNode runs a script of testdata/node.
func runNode(t *testing.T, e *anEmulator, dir string, args ...string) []byte {
	t.Helper()
	c := exec.CommandContext(t.Context(), "node", args...)
	c.Dir = filepath.Join("..", "..", "testdata", "node")
	c.Env = append(os.Environ(), "NODE_EXTRA_CA_CERTS="+filepath.Join(dir, "ca.pem"), "HUB_CONNECTION="+e.word("hubConnectionString"))
	var stderr bytes.Buffer
	c.Stderr = &stderr
	out, err := c.Output()
	if err != nil {
		t.Fatalf("%v: %s\n%s", err, out, stderr.String())
	}
	return out
}

func port(t *testing.T, address string) string {
	t.Helper()
	return address[strings.LastIndexByte(address, ':')+1:]
}

func requireHubSDK(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("node"); err != nil {
		hsmtest.Require(t, "Node.js (apt-get install nodejs npm)")
	}
	if !exists(filepath.Join("..", "..", "testdata", "node", "node_modules", "azure-iothub")) {
		hsmtest.Require(t, "Azure's SDKs for Node (npm ci --ignore-scripts in testdata/node)")
	}
}

// Azure's service SDK for Node manages the built-in hub, and its device SDK talks to it over MQTT and WebSockets, with keys and with
// certificates; both are unmodified.
func TestNodeHub(t *testing.T) {
	t.Parallel()
	requireHubSDK(t)
	dir := t.TempDir()
	device := attesttest.Leaf(t, nil, "dev")
	key, err := keyPEM(device.Key)
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{"device.pem": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: device.Certificate.Raw}), "device.key": key} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	e := startEmulator(t, dir, "--hub", "builtin", "--ca-out", "ca.pem")
	out := runNode(t, e, dir, "hub.js", port(t, e.word("https")), port(t, e.word("mqtt")), port(t, e.word("amqp")), dir)
	if want := `["identities","bulk","parents","twins","amqp","mqtt","mqtt-ws","mqtt-sha1","mqtt-ws-sha256"]`; strings.TrimSpace(string(out)) != want {
		t.Errorf("%s", out)
	}
}

// The whole way on one machine with Azure's SDKs: a device registers, the service tells the built-in hub and the device about each
// other, the device connects there with the credential that it registered with, sends, and is sent to.
func TestNodeZeroTouch(t *testing.T) {
	t.Parallel()
	requireHubSDK(t)
	dir := t.TempDir()
	e := startEmulator(t, dir, "--hub", "builtin", "--hub-messages", "messages.jsonl", "--ca-out", "ca.pem", "--stamp", "s/by-key", "--stamp-x509", "s/by-certificate")
	for _, id := range []string{"by-key", "by-certificate"} {
		for _, protocol := range []string{"mqtt", "mqtt-ws"} {
			out := runNode(t, e, dir, "zerotouch.js", filepath.Join(dir, "s", id), protocol, "localhost", port(t, e.word("https")), port(t, e.word("mqtt")))
			var r struct {
				OK                    bool
				AssignedHub, DeviceID string
				Desired               float64
			}
			if err := json.Unmarshal(out, &r); err != nil || !r.OK || r.AssignedHub != "localhost" || r.DeviceID != id || r.Desired == 0 {
				t.Errorf("%s over %s: %v %s", id, protocol, err, out)
			}
		}
		status, twin := hubCall(t, e.word("hubConnectionString"), e.word("ca"), "GET", "/twins/"+id, "")
		if properties, _ := twin["properties"].(map[string]any); status != 200 || !strings.Contains(fmt.Sprint(properties["reported"]), "zerotouch") {
			t.Errorf("%s: %d %v", id, status, twin)
		}
	}
	lines, err := os.ReadFile(filepath.Join(dir, "messages.jsonl"))
	if err != nil || bytes.Count(lines, []byte(`"body":{"temperature":21.5}`)) != 4 {
		t.Errorf("%v: %s", err, lines)
	}
}

// A hub with a data directory has its devices, twins and keys again after it was killed; the file shows no key, and its connection
// string is its owner's alone.
func TestHubLasts(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var connections, keys, hubs []string
	for round := range 2 {
		process, ready, _ := startServe(t, dir, "--https", "127.0.0.1:0", "--mqtt", "off", "--amqp", "off", "--hub", "builtin")
		file, _ := ready["hubConnectionStringFile"].(string)
		hubs = append(hubs, fmt.Sprint(ready["hub"]))
		info, err := os.Stat(file)
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Fatalf("%v, %v", info, err)
		}
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		_, key, _ := strings.Cut(string(b), ";")
		connections = append(connections, key)
		ca, err := os.ReadFile(filepath.Join(dir, "svc", "ca.pem"))
		if err != nil {
			t.Fatal(err)
		}
		if round == 0 {
			if status, doc := hubCall(t, string(b), string(ca), "PUT", "/devices/lasting", `{"deviceId":"lasting"}`); status != 200 {
				t.Fatalf("%d %v", status, doc)
			}
			if status, doc := hubCall(t, string(b), string(ca), "PATCH", "/twins/lasting", `{"tags":{"site":"A7"},"properties":{"desired":{"n":4503599627370496}}}`); status != 200 {
				t.Fatalf("%d %v", status, doc)
			}
		}
		status, doc := hubCall(t, string(b), string(ca), "GET", "/devices/lasting", "")
		keys = append(keys, fmt.Sprint(status, doc["etag"], doc["generationId"], doc["authentication"]))
		_, twin := hubCall(t, string(b), string(ca), "GET", "/twins/lasting", "")
		keys[round] += fmt.Sprint(twin["etag"], twin["tags"], twin["properties"])
		if round == 0 {
			authentication, _ := doc["authentication"].(map[string]any)
			secret, _ := authentication["symmetricKey"].(map[string]any)
			for _, name := range []string{"hub.db", "hub.db-wal"} {
				stored, err := os.ReadFile(filepath.Join(dir, "svc", name))
				if err != nil || secret["primaryKey"] == nil || bytes.Contains(stored, []byte(secret["primaryKey"].(string))) {
					t.Errorf("%s, %v: a device's key is in it, or there was none", name, err)
				}
			}
		}
		if err := process.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = process.Wait()
	}
	if connections[0] != connections[1] || keys[0] != keys[1] || hubs[0] != "localhost" {
		t.Errorf("after a kill: %t %s\n%s", connections[0] == connections[1], keys[0], keys[1])
	}
}
