package main

import (
	"bytes"
	"encoding/json"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/touchmark/touchmark/hsm/hsmtest"
)

// aPeer is a client that somebody else wrote, run as a program: it registers a stamped device and prints an [nodeResult].
func aPeer(t *testing.T, script, module string, args ...string) (r nodeResult) {
	t.Helper()
	const python = "/usr/bin/python3" // Debian's, whose packages the modules are
	if exec.Command(python, "-c", "import "+module).Run() != nil {
		hsmtest.Require(t, "Python's "+module)
	}
	c := exec.Command(python, append([]string{filepath.Join("..", "..", "testdata", script)}, args...)...)
	c.Env = append(os.Environ(), "PYTHONDONTWRITEBYTECODE=1")
	var stderr bytes.Buffer
	c.Stderr = &stderr
	out, err := c.Output()
	if jerr := json.Unmarshal(out, &r); jerr != nil {
		t.Fatalf("%v, %v: %s\n%s", err, jerr, out, stderr.String())
	}
	return r
}

// wrongKey copies a stamp and spoils its symmetric key.
func wrongKey(t *testing.T, stamp string) string {
	t.Helper()
	wrong := t.TempDir()
	if err := os.CopyFS(wrong, os.DirFS(stamp)); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(wrong, "provisioning.json")
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, bytes.Replace(b, []byte(`"symmetricKey":"`), []byte(`"symmetricKey":"AAAA`), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	return wrong
}

// Paho, a plain MQTT client, registers devices of every attestation that a password or a certificate can carry.
// DPS-D 39, 41.
func TestPaho(t *testing.T) {
	t.Setenv("TOUCHMARK_PASSPHRASE", "words for a test")
	dir := t.TempDir()
	ready, _ := startService(t, dir, "127.0.0.1:0", "127.0.0.1:0", "127.0.0.1:0")
	mintAll(t, dir)
	for protocol, door := range map[string]string{"mqtt": "mqtt", "mqtt-ws": "https"} {
		host, port, err := net.SplitHostPort(ready[door].(string))
		if err != nil {
			t.Fatal(err)
		}
		for _, profile := range []string{"x509-group", "x509-individual", "symmetric-group", "symmetric-individual"} {
			t.Run(protocol+"/"+profile, func(t *testing.T) {
				t.Parallel()
				id := profile + "000000"
				r := aPeer(t, "paho/register.py", "paho.mqtt.client", filepath.Join(dir, "stamps", id), protocol, host, port, filepath.Join(dir, "svc", "ca.pem"))
				if !r.OK || r.AssignedHub != "hub-a.example.net" || r.DeviceID != id {
					t.Errorf("%+v", r)
				}
			})
		}
	}
}
