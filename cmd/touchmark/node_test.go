package main

import (
	"bytes"
	"encoding/json"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/touchmark/touchmark/hsm/hsmtest"
)

// nodeResult is what testdata/node/register.js prints.
type nodeResult struct {
	OK                            bool
	Status, AssignedHub, DeviceID string
	Name, Message                 string
	Result                        json.RawMessage
}

// Azure's device SDK for Node, unmodified, registers devices from stamps that this program wrote: both attestations,
// individual and group, over HTTPS on 443, MQTT, AMQP, and both in WebSockets beside HTTPS. And it is refused, cleanly, with a wrong key and with a foreign
// certificate. DPS-D 96.
func TestNodeSDK(t *testing.T) {
	if _, err := exec.LookPath("node"); err != nil {
		hsmtest.Require(t, "Node.js (apt-get install nodejs npm)")
	}
	node, err := filepath.Abs(filepath.Join("..", "..", "testdata", "node"))
	if err != nil {
		t.Fatal(err)
	}
	if !exists(filepath.Join(node, "node_modules", "azure-iot-provisioning-device")) {
		hsmtest.Require(t, "Azure's SDK for Node (npm ci --ignore-scripts in testdata/node)")
	}
	l, err := net.Listen("tcp", "127.0.0.1:443")
	if err != nil {
		hsmtest.Require(t, "the right to listen on port 443, which the SDK fixes: "+err.Error())
	}
	_ = l.Close()

	t.Setenv("TOUCHMARK_PASSPHRASE", "words for a test")
	dir := t.TempDir()
	startService(t, dir, "127.0.0.1:443", "127.0.0.1:8883", "127.0.0.1:5671")
	mintAll(t, dir)
	// A line that the service has never heard of makes devices of the same names.
	touchmark(t, dir, "init", "foreign", "--id-scope", "0ne00112233")
	touchmark(t, dir, "mint", "--line", "foreign", "--profile", "x509-group", "--serials", "x509-group.csv", "--out", "foreign-stamps")
	wrong := wrongKey(t, filepath.Join(dir, "stamps", "symmetric-group000001"))

	register := func(t *testing.T, stamp, protocol string) nodeResult {
		t.Helper()
		c := exec.Command("node", "register.js", stamp, protocol, "localhost")
		c.Dir = node
		c.Env = append(os.Environ(), "NODE_EXTRA_CA_CERTS="+filepath.Join(dir, "svc", "ca.pem"))
		var stderr bytes.Buffer
		c.Stderr = &stderr
		out, err := c.Output()
		var r nodeResult
		if jerr := json.Unmarshal(out, &r); jerr != nil {
			t.Fatalf("%v, %v: %s\n%s", err, jerr, out, stderr.String())
		}
		return r
	}
	for _, protocol := range []string{"https", "mqtt", "mqtt-ws", "amqp", "amqp-ws"} {
		for _, profile := range []string{"x509-group", "x509-individual", "symmetric-group", "symmetric-individual"} {
			t.Run(protocol+"/"+profile, func(t *testing.T) {
				t.Parallel()
				id := profile + "000000"
				if protocol != "https" {
					id = profile + "000001"
				}
				r := register(t, filepath.Join(dir, "stamps", id), protocol)
				if !r.OK || r.AssignedHub != "hub-a.example.net" || r.DeviceID != id {
					t.Errorf("%+v", r)
				}
			})
		}
		for name, stamp := range map[string]string{"wrong key": wrong, "foreign certificate": filepath.Join(dir, "foreign-stamps", "x509-group000000")} {
			t.Run(protocol+"/"+name, func(t *testing.T) {
				t.Parallel()
				r := register(t, stamp, protocol)
				if r.OK || !strings.Contains(r.Name+r.Message+string(r.Result), "nauthorized") {
					t.Errorf("%+v", r)
				}
			})
		}
	}
}
