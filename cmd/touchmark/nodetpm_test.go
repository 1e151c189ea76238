package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/touchmark/touchmark/hsm/hsmtest"
	"github.com/touchmark/touchmark/hsm/tpm"
)

// Azure's TPM security client for Node, unmodified, on software TPMs: minted, imported and registered under the ID that it derives
// itself; refused while nobody enrolled its endorsement key; and with the hub's key in its TPM in the end. DPS-D 50, 52, 55, 96.
func TestNodeTPM(t *testing.T) {
	if _, err := exec.LookPath("node"); err != nil {
		hsmtest.Require(t, "Node.js (apt-get install nodejs npm)")
	}
	node, err := filepath.Abs(filepath.Join("..", "..", "testdata", "node"))
	if err != nil {
		t.Fatal(err)
	}
	if !exists(filepath.Join(node, "node_modules", "azure-iot-security-tpm")) {
		hsmtest.Require(t, "Azure's SDK for Node (npm ci --ignore-scripts in testdata/node)")
	}
	l, err := net.Listen("tcp", "127.0.0.1:443")
	if err != nil {
		hsmtest.Require(t, "the right to listen on port 443, which the SDK fixes: "+err.Error())
	}
	_ = l.Close()

	protocols := []string{"https", "amqp", "amqp-ws"}
	dir, tpms := newTPMLine(t, len(protocols)+1)
	if err := os.WriteFile(filepath.Join(dir, "line", "profiles", "attest.toml"), []byte(attestationProfile), 0o644); err != nil {
		t.Fatal(err)
	}
	startService(t, dir, "127.0.0.1:443", "127.0.0.1:0", "127.0.0.1:5671")
	register := func(t *testing.T, s *hsmtest.TPM, protocol string) (r struct {
		nodeResult
		Signature []byte
	}) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		c := exec.CommandContext(ctx, "node", "registertpm.js", "0ne00112233", protocol, "localhost", strconv.Itoa(s.Simulator(t)))
		c.Dir = node
		c.Env = append(os.Environ(), "NODE_EXTRA_CA_CERTS="+filepath.Join(dir, "svc", "ca.pem"))
		var stderr bytes.Buffer
		c.Stderr = &stderr
		out, err := c.Output()
		if jerr := json.Unmarshal(out, &r); jerr != nil {
			t.Fatalf("%v, %v: %s\n%s", err, jerr, out, stderr.String())
		}
		return r
	}
	if r := register(t, tpms[0], "https"); r.OK || !strings.Contains(r.Message, "authentication blob") { // a refusal has none
		t.Errorf("before it is enrolled: %+v", r)
	}
	for i, protocol := range protocols[1:] { // AMQP has a code for it
		if r := register(t, tpms[1+i], protocol); r.OK || !strings.Contains(r.Message+string(r.Result)+r.Name, "nauthorized") {
			t.Errorf("%s, before it is enrolled: %+v", protocol, r)
		}
	}
	touchmark(t, dir, "mint", "--line", "line", "--profile", "attest", "--serials", "serials.csv", "--out", "stamps", "--bundle", "b.tmb")
	touchmark(t, dir, "import", "b.tmb", "--service", "svc/owner.connection", "--trust", "line/station.pem")
	open := func(s *hsmtest.TPM) *tpm.Store {
		store, err := tpm.Open(t.Context(), tpm.Config{URI: s.URI()})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = store.Close() })
		return store
	}
	for i, protocol := range protocols {
		t.Run(protocol, func(t *testing.T) {
			var last []byte
			for range 2 { // at its first power-on, and at a later one
				r := register(t, tpms[i], protocol)
				store := open(tpms[i])
				ek, err := store.EK(t.Context(), tpm.EKRSA)
				if err != nil {
					t.Fatal(err)
				}
				if !r.OK || r.AssignedHub != "hub-a.example.net" || r.DeviceID != ek.RegistrationID() {
					t.Fatalf("%+v", r)
				}
				mac, err := store.Identity().MAC(t.Context(), nil, []byte("hello, hub"))
				if err != nil || !bytes.Equal(mac, r.Signature) || bytes.Equal(mac, last) {
					t.Errorf("the SDK signs %s, the TPM's key %s, %v", base64.StdEncoding.EncodeToString(r.Signature), base64.StdEncoding.EncodeToString(mac), err)
				}
				last = mac
			}
		})
	}

	// And ours does the same on another TPM, from its stamp.
	s := tpms[len(protocols)]
	ek, err := open(s).EK(t.Context(), tpm.EKRSA)
	if err != nil {
		t.Fatal(err)
	}
	stamp := filepath.Join("stamps", ek.RegistrationID())
	args := []string{"register", "--stamp", stamp, "--endpoint", "localhost:443", "--ca", "svc/ca.pem", "--json", "--tpm"}
	if out := touchmark(t, dir, append(args, "tpm:?device=unix:"+s.Socket)...); !strings.Contains(out, `"assigned"`) {
		t.Errorf("touchmark register: %s", out)
	}
	if _, err := open(s).Identity().MAC(t.Context(), nil, []byte("x")); err != nil {
		t.Error(err)
	}
	if code, text := attempt(t, dir, append(args, "tpm:?device=unix:"+tpms[0].Socket)...); code == 0 || !strings.Contains(text, "refused") {
		t.Errorf("with another device's TPM: exit code %d\n%s", code, text)
	}
}
