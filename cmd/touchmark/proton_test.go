package main

import (
	"net"
	"path/filepath"
	"strings"
	"testing"
)

// Qpid Proton, a plain AMQP client, registers devices of every attestation that SASL PLAIN, SASL EXTERNAL or a bare
// connection can carry, and reads why it is refused. DPS-D 78, 80, 87.
func TestProton(t *testing.T) {
	t.Setenv("TOUCHMARK_PASSPHRASE", "words for a test")
	dir := t.TempDir()
	ready, _ := startService(t, dir, "127.0.0.1:0", "127.0.0.1:0", "127.0.0.1:0")
	mintAll(t, dir)
	host, port, err := net.SplitHostPort(ready["amqp"].(string))
	if err != nil {
		t.Fatal(err)
	}
	stamp := func(id string) string { return filepath.Join(dir, "stamps", id) }
	register := func(t *testing.T, stamp, how string) nodeResult {
		t.Helper()
		return aPeer(t, "proton/register.py", "proton", stamp, how, host, port, filepath.Join(dir, "svc", "ca.pem"))
	}
	for profile, hows := range map[string][]string{"x509-group": {"bare", "external"}, "x509-individual": {"bare", "external"}, "symmetric-group": {"plain"}, "symmetric-individual": {"plain"}} {
		for _, how := range hows {
			t.Run(how+"/"+profile, func(t *testing.T) {
				t.Parallel()
				id := profile + "000000"
				if r := register(t, stamp(id), how); !r.OK || r.AssignedHub != "hub-a.example.net" || r.DeviceID != id {
					t.Errorf("%+v", r)
				}
			})
		}
	}
	wrong := wrongKey(t, stamp("symmetric-group000001"))
	for how, stamp := range map[string]string{"plain": wrong, "anonymous": stamp("symmetric-group000000")} {
		t.Run(how+"/refused", func(t *testing.T) {
			t.Parallel()
			if r := register(t, stamp, how); r.OK || r.Name != "amqp:unauthorized-access" || !strings.Contains(string(r.Result), "401002") {
				t.Errorf("%+v", r)
			}
		})
	}
}
