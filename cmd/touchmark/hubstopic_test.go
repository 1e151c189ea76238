package main

import (
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/touchmark/touchmark/hsm/hsmtest"
	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/hub"
	"github.com/touchmark/touchmark/pkg/hub/hubtest"
	"github.com/touchmark/touchmark/pkg/registration"
)

// The steps of help hubs make a broker that the service can tell of devices, and that takes these and no others.
func TestHubsExample(t *testing.T) {
	t.Parallel()
	_, page, _ := strings.Cut(hubsTopic.Long, "conf.d/touchmark.conf:\n\n")
	conf, page, _ := strings.Cut(page, "\n\n")
	_, page, _ = strings.Cut(page, "\n\n")
	script, page, _ := strings.Cut(page, "\n\n")
	_, pub, ok := strings.Cut(page, "A device of it:\n")
	pub, _, _ = strings.Cut(pub, "\n")
	for _, program := range []string{"/usr/sbin/mosquitto", "/usr/bin/mosquitto_pub"} {
		if _, err := os.Stat(program); err != nil || !ok {
			hsmtest.Require(t, program)
		}
	}
	dir := t.TempDir()
	today := func(c *x509.Certificate) {
		c.NotBefore, c.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	}
	root := attesttest.CA(t, nil, "Root", today)
	server := attesttest.Leaf(t, root, "localhost", today)
	der, err := x509.MarshalPKCS8PrivateKey(server.Key)
	if err != nil {
		t.Fatal(err)
	}
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.Certificate.Raw})
	for name, b := range map[string][]byte{"ca.pem": ca, "server.pem": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate.Raw}),
		"server.key": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), "admin.password": []byte("admin-s-own")} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "conf.d"), 0o700); err != nil {
		t.Fatal(err)
	}
	var ports []string
	for range 2 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		_, port, _ := net.SplitHostPort(l.Addr().String())
		ports = append(ports, port)
		l.Close()
	}
	plugins, _ := filepath.Glob("/usr/lib/*/mosquitto_dynamic_security.so")
	if len(plugins) == 0 {
		hsmtest.Require(t, "mosquitto_dynamic_security.so")
	}
	// What a person types at a prompt comes by a pipe, and the broker is the test's own.
	here := strings.NewReplacer("/etc/mosquitto", dir, "8883", ports[0], "8884", ports[1], "/usr/lib/x86_64-linux-gnu/mosquitto_dynamic_security.so", plugins[0],
		"per_listener_settings", "user root\npid_file "+dir+"/pid\nper_listener_settings",
		"mosquitto_ctrl dynsec init", `printf 'admin-s-own\nadmin-s-own\n' | mosquitto_ctrl dynsec init`,
		"chown mosquitto:", "chmod 600", "systemctl restart mosquitto", "/usr/sbin/mosquitto -c conf.d/touchmark.conf -d; until (: </dev/tcp/localhost/"+ports[0]+") 2>/dev/null; do :; done",
		"ctl createClient", `printf 'of-the-service\nof-the-service\n' | ctl createClient`)
	if err := os.WriteFile(filepath.Join(dir, "conf.d/touchmark.conf"), []byte(here.Replace(strings.ReplaceAll(conf, "    ", ""))), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "bash", "-ec", here.Replace(script)+"\nctl getClient service/dps")
	cmd.Dir = dir
	t.Cleanup(func() {
		pid, err := os.ReadFile(filepath.Join(dir, "pid"))
		if err == nil {
			exec.Command("kill", strings.TrimSpace(string(pid))).Run()
		}
	})
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "provisioning") {
		t.Fatalf("%v: %s", err, out)
	}
	h, err := hub.Open(hub.Config{Hub: registration.LinkedHub{Name: "localhost", Kind: registration.HubMosquitto,
		ConnectionString: fmt.Sprintf("HostName=localhost;Port=%s;Username=service/dps;Password=of-the-service;CA=%s", ports[0], base64.StdEncoding.EncodeToString(ca))}})
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Check(t.Context()); err != nil {
		t.Fatal(err)
	}
	keys := hubtest.Keys()
	publish := func() error {
		cmd := exec.CommandContext(t.Context(), "bash", "-ec", strings.NewReplacer("BROKER", "localhost", "8883", ports[0], "ID", "pump-1", "KEY", keys.PrimaryKey).Replace(pub))
		cmd.Dir = dir
		return cmd.Run()
	}
	if publish() == nil {
		t.Error("a device that nobody knows may publish")
	}
	if _, err := h.Admit(t.Context(), &registration.HubDevice{ID: "pump-1", Keys: keys}); err != nil {
		t.Fatal(err)
	}
	if err := publish(); err != nil {
		t.Errorf("%s: %v", pub, err)
	}
}
