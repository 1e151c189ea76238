//go:build azurepython

package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Azure's device SDK for Python, unmodified, registers on what it speaks, with and without a payload, and names the 401 when
// it is refused. It comes by scripts/azure-python. DPS-D 97.
func TestPythonSDK(t *testing.T) {
	sdk := os.Getenv("TOUCHMARK_AZURE_PYTHON")
	if sdk == "" {
		t.Fatal("TOUCHMARK_AZURE_PYTHON names no directory: scripts/azure-python prints one")
	}
	t.Setenv("PYTHONPATH", sdk)
	t.Setenv("TOUCHMARK_PASSPHRASE", "words for a test")
	dir := t.TempDir()
	startService(t, dir, "127.0.0.1:443", "127.0.0.1:8883", "127.0.0.1:0")
	mintAll(t, dir)
	register := func(t *testing.T, stamp, protocol string, payload ...string) nodeResult {
		return aPeer(t, "python/register.py", "azure.iot.device", append([]string{stamp, protocol, "localhost", filepath.Join(dir, "svc", "ca.pem")}, payload...)...)
	}
	for _, protocol := range []string{"mqtt", "mqtt-ws"} {
		for i, profile := range []string{"x509-group", "x509-individual", "symmetric-group", "symmetric-individual"} {
			t.Run(protocol+"/"+profile, func(t *testing.T) {
				t.Parallel()
				id := profile + "000000"
				r := register(t, filepath.Join(dir, "stamps", id), protocol, []string{`{"model":"pump","ä":1}`}[:i%2]...)
				if !r.OK || r.AssignedHub != "hub-a.example.net" || r.DeviceID != id {
					t.Errorf("%+v", r)
				}
			})
		}
		t.Run(protocol+"/wrong key", func(t *testing.T) {
			t.Parallel()
			if r := register(t, wrongKey(t, filepath.Join(dir, "stamps", "symmetric-group000001")), protocol); r.OK || !strings.Contains(r.Message, "401") {
				t.Errorf("%+v", r)
			}
		})
	}
}
