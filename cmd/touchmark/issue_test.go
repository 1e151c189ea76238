package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/touchmark/touchmark/hsm/hsmtest"
	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/door"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/httpd"
	"github.com/touchmark/touchmark/pkg/mqttd"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/sqlstore"
)

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// A minted device gets its operational certificate with its hub, over both doors, from a CA whose key is in a token; and
// renews it: with a new key each time, with a key file, with a key in a token. DPS-D 24.
func TestIssuance(t *testing.T) {
	if _, err := exec.LookPath("openssl"); err != nil {
		hsmtest.Require(t, "openssl")
	}
	t.Setenv("TOUCHMARK_PASSPHRASE", "words for a test")
	dir := t.TempDir()
	ops := hsmtest.SoftHSM(t, "ops", "device")
	touchmark(t, dir, "init", "line", "--id-scope", "0ne00112233")
	touchmark(t, dir, "init", "ops", "--id-scope", "0ne00112233", "--key-uri", ops.String())
	own := ops
	own.Token, own.Object = "device", "operational"
	ops.Object = "issuing-ca"
	write(t, filepath.Join(dir, "ops.toml"), `name = "ops"`+"\n"+`chain = "ops/issuing.pem"`+"\n"+`key = "`+ops.String()+`"`+"\n"+`days = 30`+"\n"+`keys = ["EC-P256"]`)
	ready, log := startService(t, dir, "127.0.0.1:0", "127.0.0.1:0", "off", "--issuer", "ops.toml")
	write(t, filepath.Join(dir, "x.csv"), "serial\nA1\nA2\n")
	touchmark(t, dir, "mint", "--line", "line", "--profile", "x509-group", "--serials", "x.csv", "--out", "stamps", "--bundle", "x.tmb")
	touchmark(t, dir, "import", "x.tmb", "--service", "svc/owner.connection", "--trust", "line/station.pem")

	stamp := filepath.Join("stamps", "a1")
	register := func(door, key string) (int, string) {
		return attempt(t, dir, "register", "--stamp", stamp, "--protocol", door, "--endpoint", ready[door].(string), "--ca", "svc/ca.pem", "--csr-key", key)
	}
	if code, text := register("https", "new"); code != 4 || !strings.Contains(text, "names no issuer: touchmark help issuers") {
		t.Errorf("the group names no issuer: exit code %d\n%s", code, text)
	}
	svc, err := (&app{}).openService(filepath.Join(dir, "svc", "owner.connection"), "")
	if err != nil {
		t.Fatal(err)
	}
	const path = "/enrollmentGroups/x509-devices"
	put := func(issuer string) error {
		var g dps.EnrollmentGroup
		if err := svc.call(t.Context(), http.MethodGet, path, nil, nil, nil, &g); err != nil {
			t.Fatal(err)
		}
		g.ClientCertificateIssuancePolicy = &dps.ClientCertificateIssuancePolicy{CertificateAuthorityName: issuer}
		b, err := json.Marshal(g)
		if err != nil {
			t.Fatal(err)
		}
		return svc.call(t.Context(), http.MethodPut, path, nil, http.Header{"Content-Type": {"application/json"}, "If-Match": {"*"}}, bytes.NewReader(b), nil)
	}
	if err := put("nobody"); err == nil || !strings.Contains(err.Error(), `no certificate authority "nobody"`) {
		t.Errorf("an issuer that there is not: %v", err)
	}
	if err := put("ops"); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, stamp, "operational.pem")
	shell := func(command string) string {
		c := exec.Command("sh", "-ec", command)
		c.Dir = dir
		out, err := c.CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v\n%s", command, err, out)
		}
		return string(out)
	}
	touchmark(t, dir, "key", "new", "--store", "file:keys", "--create", "--name", "spare")
	last := ""
	for _, x := range []struct{ door, key string }{{"https", "new"}, {"mqtt", "new"}, {"mqtt", "file:keys?object=operational"}, {"https", "file:keys?object=operational"}, {"https", own.String()}} {
		if code, text := register(x.door, x.key); code != 0 || !strings.Contains(text, "assigned") {
			t.Fatalf("%s, %s: exit code %d\n%s", x.door, x.key, code, text)
		}
		if st, err := os.Stat(file); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%v, %v", st, err)
		}
		shell("openssl verify -x509_strict -purpose sslclient -CAfile ops/root.pem -untrusted stamps/a1/operational.pem stamps/a1/operational.pem")
		names := shell("openssl x509 -in stamps/a1/operational.pem -noout -subject -issuer -serial -ext extendedKeyUsage")
		if !strings.Contains(names, "CN = a1\n") || !strings.Contains(names, "ops Issuing CA") || !strings.Contains(names, "Client Authentication") || names == last {
			t.Errorf("%s", names)
		}
		last = names
		public := shell("openssl x509 -in stamps/a1/operational.pem -noout -pubkey")
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if x.key != "new" {
			if bytes.Contains(b, []byte("PRIVATE")) {
				t.Errorf("%s: a key that is elsewhere is in the file", x.key)
			}
			if key := touchmark(t, dir, "key", "export-public", "--store", strings.Replace(strings.Replace(x.key, "?object=operational", "", 1), ";object=operational", "", 1), "--name", "operational"); key != public {
				t.Errorf("%s: certified is\n%sand the key\n%s", x.key, public, key)
			}
		} else if shell("openssl pkey -in stamps/a1/operational.pem -pubout") != public {
			t.Error("the key is not the certificate's")
		}
		if b, err := os.ReadFile(filepath.Join(dir, stamp, "assignment.json")); err != nil || bytes.Contains(b, []byte("issued")) {
			t.Errorf("%s, %v", b, err)
		}
	}
	// The other device's register with the first one's key is refused, and what the first one has stays.
	before, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	stamp = filepath.Join("stamps", "a2")
	if code, text := register("https", "file:keys?object=operational"); code != 4 || !strings.Contains(text, "400000") || exists(filepath.Join(dir, stamp, "operational.pem")) {
		t.Errorf("another device's key: exit code %d\n%s", code, text)
	}
	if after, err := os.ReadFile(file); err != nil || !bytes.Equal(before, after) {
		t.Error("the first device's file was touched")
	}
	if n := strings.Count(log.String(), "certificate issued"); n != 5 {
		t.Errorf("the log tells of %d certificates\n%s", n, log.String())
	}
}

// Files of --issuer that are wrong, and an issuer that has ended, which is no reason not to serve.
func TestIssuerFiles(t *testing.T) {
	t.Setenv("TOUCHMARK_PASSPHRASE", "words for a test")
	dir := t.TempDir()
	touchmark(t, dir, "init", "line", "--id-scope", "0ne00112233")
	good := `name = "ops"` + "\n" + `chain = "line/issuing.pem"` + "\n" + `key = "file:line/keys?object=issuing-ca"` + "\n"
	for name, x := range map[string][2]string{
		"no name":          {strings.Replace(good, `name = "ops"`, "", 1), "name: "},
		"no chain":         {strings.Replace(good, `chain = "line/issuing.pem"`, "", 1), "chain is missing"},
		"a store":          {strings.Replace(good, "?object=issuing-ca", "", 1), "want one, as file:DIR?object=NAME"},
		"another key":      {strings.Replace(good, "object=issuing-ca", "object=station", 1), "is not the one of CA"},
		"no such key":      {strings.Replace(good, "object=issuing-ca", "object=none", 1), "none"},
		"no days":          {good + "days = 0", "want 1 to 3650"},
		"unknown key kind": {good + `keys = ["EC-P521"]`, "EC-P521"},
		"no key kinds":     {good + `keys = []`, "the list is empty"},
		"unknown setting":  {good + `san = "x"`, "san"},
		"a leaf":           {strings.Replace(good, "line/issuing.pem", "line/root.pem", 1), "is not the one of CA"},
	} {
		write(t, filepath.Join(dir, "i.toml"), x[0])
		if code, text := attempt(t, dir, "serve", "--data", "svc", "--https", "127.0.0.1:0", "--mqtt", "off", "--issuer", "i.toml"); code == 0 || !strings.Contains(text, x[1]) {
			t.Errorf("%s: exit code %d\n%s", name, code, text)
		}
	}
	for _, p := range []string{"", "*", "**"} {
		if code, text := attempt(t, dir, "serve", "--data", "svc", "--https", "127.0.0.1:0", "--mqtt", "off", "--assigned-at-once", p); code != 2 {
			t.Errorf("%q: exit code %d\n%s", p, code, text)
		}
	}
}

// counted counts what devices ask for.
type counted struct {
	registration.Registrar
	statuses atomic.Int32
	client   atomic.Value
}

func (c *counted) Register(ctx context.Context, r *registration.Request) (*dps.OperationStatus, error) {
	c.client.Store(r.ClientVersion)
	return c.Registrar.Register(ctx, r)
}

func (c *counted) Status(ctx context.Context, r *registration.Request, op string) (*dps.OperationStatus, error) {
	c.statuses.Add(1)
	return c.Registrar.Status(ctx, r, op)
}

// Azure's SDK for Node says who it is over HTTPS and MQTT, and takes its assignment in the answer to register: it asks for
// nothing more. Without --assigned-at-once it waits, and asks.
func TestNodeAtOnce(t *testing.T) {
	if _, err := exec.LookPath("node"); err != nil {
		hsmtest.Require(t, "Node.js (apt-get install nodejs npm)")
	}
	node := filepath.Join("..", "..", "testdata", "node")
	if !exists(filepath.Join(node, "node_modules", "azure-iot-provisioning-device")) {
		hsmtest.Require(t, "Azure's SDK for Node (npm ci --ignore-scripts in testdata/node)")
	}
	const host = "127.0.0.2" // whose port 443 nobody else has
	dir := t.TempDir()
	d := &serviceData{dir: dir}
	o := &serveOptions{idScope: "0ne00112233", hostnames: []string{host}}
	if err := d.load(o); err != nil {
		t.Fatal(err)
	}
	certificate, err := d.certificate(o)
	if err != nil {
		t.Fatal(err)
	}
	store, err := sqlstore.Open(t.Context(), sqlstore.Config{Path: filepath.Join(dir, storeFile), DataKey: make([]byte, 32)})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	group := bytes.Repeat([]byte("g"), 64)
	id := "node-1"
	for _, x := range []struct {
		name     string
		atOnce   []string
		statuses int32
	}{{"asked", nil, 1}, {"at once", []string{"azure-iot-provisioning-device/*"}, 0}} {
		svc := registration.New(registration.Config{Store: store, Scope: d.scope, Settings: registration.Settings{Hubs: registration.Records("hub-a.example.net")}, AtOnce: x.atOnce})
		if x.atOnce == nil {
			doc, err := json.Marshal(dps.EnrollmentGroup{EnrollmentGroupID: "keys", Enrollment: dps.Enrollment{Attestation: &dps.Attestation{Type: dps.AttestationSymmetricKey,
				SymmetricKey: &dps.SymmetricKeyAttestation{PrimaryKey: base64.StdEncoding.EncodeToString(group)}}}})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := svc.PutEnrollment(t.Context(), registration.Actor{}, registration.Group, "keys", doc, ""); err != nil {
				t.Fatal(err)
			}
			write(t, filepath.Join(dir, "provisioning.json"), `{"idScope":"0ne00112233","registrationId":"`+id+`","attestation":"symmetricKey","symmetricKey":"`+
				base64.StdEncoding.EncodeToString(attest.DeriveKey(group, id))+`"}`)
		}
		for _, protocol := range []string{"https", "mqtt"} {
			t.Run(x.name+"/"+protocol, func(t *testing.T) {
				l, err := net.Listen("tcp", map[string]string{"https": host + ":443", "mqtt": host + ":0"}[protocol])
				if err != nil {
					hsmtest.Require(t, "the right to listen on port 443, which the SDK fixes: "+err.Error())
				}
				c := &counted{Registrar: svc}
				ctx, stop := context.WithCancel(t.Context())
				var eg errgroup.Group
				eg.Go(func() error {
					if protocol == "https" {
						return httpd.New(httpd.Config{Registrar: c, Door: door.New(door.Config{TLS: door.TLSConfig(certificate, "http/1.1")})}).Serve(ctx, l)
					}
					return door.New(door.Config{TLS: door.TLSConfig(certificate)}).Serve(ctx, l, mqttd.New(mqttd.Config{Registrar: c}).Handle)
				})
				address := host // the SDK knows the port
				if protocol == "mqtt" {
					address = l.Addr().String()
				}
				cmd := exec.Command("node", "register.js", dir, protocol, address)
				cmd.Dir, cmd.Env = node, append(os.Environ(), "NODE_EXTRA_CA_CERTS="+d.path(caFile))
				start := time.Now()
				out, err := cmd.Output()
				t.Logf("%s: %.2f s, %d status requests by %v", t.Name(), time.Since(start).Seconds(), c.statuses.Load(), c.client.Load())
				var r nodeResult
				if jerr := json.Unmarshal(out, &r); err != nil || jerr != nil || r.Status != "assigned" || r.DeviceID != id {
					t.Errorf("%s, %v, %v", out, err, jerr)
				}
				if n := c.statuses.Load(); n != x.statuses {
					t.Errorf("%d status requests, want %d", n, x.statuses)
				}
				if client, _ := c.client.Load().(string); !strings.HasPrefix(client, "azure-iot-provisioning-device/") {
					t.Errorf("the client says to be %q", client)
				}
				stop()
				if err := eg.Wait(); err != nil {
					t.Error(err)
				}
			})
		}
	}
}
