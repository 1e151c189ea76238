package main

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/touchmark/touchmark/hsm/hsmtest"
	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/sqlstore"
)

// A managed is a running service with its management connection.
type managedService struct {
	t      *testing.T
	dir    string
	parts  map[string]string // of management.connection
	client *http.Client
}

func manage(t *testing.T, dir string) *managedService {
	t.Helper()
	file := filepath.Join(dir, "svc", "management.connection")
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%s may be read by others: %v, %v", file, info.Mode(), err)
	}
	m := &managedService{t: t, dir: dir, parts: make(map[string]string)}
	for part := range strings.SplitSeq(strings.TrimSpace(string(text)), ";") {
		name, value, _ := strings.Cut(part, "=")
		m.parts[name] = value
	}
	roots := x509.NewCertPool()
	ca, err := os.ReadFile(filepath.Join(dir, "svc", "ca.pem"))
	if err != nil || !roots.AppendCertsFromPEM(ca) {
		t.Fatal(err)
	}
	m.client = &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}}
	t.Cleanup(m.client.CloseIdleConnections)
	return m
}

// call makes a request with an Authorization of its own, or the management token for "".
func (m *managedService) call(method, path, authorization, body string) (int, map[string]any) {
	m.t.Helper()
	r, err := http.NewRequest(method, m.parts["Endpoint"]+path, strings.NewReader(body))
	if err != nil {
		m.t.Fatal(err)
	}
	if authorization == "" {
		authorization = "Bearer " + m.parts["Token"]
	}
	r.Header.Set("Authorization", authorization)
	res, err := m.client.Do(r)
	if err != nil {
		m.t.Fatal(err)
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		m.t.Fatal(err)
	}
	var out map[string]any
	_ = json.Unmarshal(text, &out)
	return res.StatusCode, out
}

// scopes is where the scopes are.
func (m *managedService) scopes() string {
	return "/subscriptions/" + m.parts["Subscription"] + "/resourceGroups/" + m.parts["ResourceGroup"] + "/providers/Microsoft.Devices/provisioningServices/"
}

// deviceKey is what devices that come in have.
var deviceKey = []byte("0123456789abcdef")

// comeIn enrolls a device in a scope of dps.example.net, with more members, has it register, and returns what becomes of it.
func (m *managedService) comeIn(name, scope, id, more string) map[string]any {
	m.t.Helper()
	_, keys := m.call("POST", m.scopes()+name+"/listkeys?api-version=2022-02-05", "", "")
	policy, err := base64.StdEncoding.DecodeString(keys["value"].([]any)[0].(map[string]any)["primaryKey"].(string))
	if err != nil {
		m.t.Fatal(err)
	}
	host, key := name+".dps.example.net", base64.StdEncoding.EncodeToString(deviceKey)
	r, err := http.NewRequest("PUT", m.parts["Endpoint"]+"/enrollments/"+id+"?api-version=2021-10-01", strings.NewReader(
		`{"registrationId":"`+id+`","attestation":{"type":"symmetricKey","symmetricKey":{"primaryKey":"`+key+`","secondaryKey":"`+key+`"}}`+more+`}`))
	if err != nil {
		m.t.Fatal(err)
	}
	r.Host = host
	r.Header.Set("Authorization", attesttest.ServiceToken(policy, host, "provisioningserviceowner", time.Now().Add(time.Hour)))
	res, err := m.client.Do(r)
	if err != nil || res.StatusCode != 200 {
		m.t.Fatal(res, err)
	}
	res.Body.Close()
	token := attesttest.Token(deviceKey, scope, id, time.Now().Add(time.Hour))
	_, a := m.call("PUT", "/"+scope+"/registrations/"+id+"/register?api-version=2021-06-01", token, `{"registrationId":"`+id+`"}`)
	for end := time.Now().Add(time.Minute); a["status"] == "assigning" && time.Now().Before(end); {
		_, a = m.call("GET", fmt.Sprintf("/%s/registrations/%s/operations/%v?api-version=2021-06-01", scope, id, a["operationId"]), token, "")
	}
	return a
}

// The service of the first start can be managed by what it writes down: it is listed, changed, kept from being deleted, and its IP
// rules hold for devices at once and after the next start, whose hubs stay linked. DPS-S 80.
func TestManagement(t *testing.T) {
	dir := t.TempDir()
	cmd, ready, _ := startServe(t, dir, "--https", "127.0.0.1:0", "--mqtt", "off", "--amqp", "off", "--name", "plant")
	m := manage(t, dir)
	if ready["managementConnectionFile"] != filepath.Join(dir, "svc", "management.connection") {
		t.Errorf("ready: %v", ready)
	}
	path := m.scopes() + "plant?api-version=2022-02-05"
	status, service := m.call("GET", path, "", "")
	p, _ := service["properties"].(map[string]any)
	if status != 200 || p["idScope"] != "0ne00112233" || "https://"+fmt.Sprint(p["serviceOperationsHostName"]) != m.parts["Endpoint"] || len(p["iotHubs"].([]any)) != 1 {
		t.Fatalf("%d %v", status, service)
	}
	if status, _ := m.call("DELETE", path, "", ""); status != 409 {
		t.Errorf("the service that the process stands on: %d", status)
	}
	// Without a domain another scope's service API is nowhere, and nobody is told that it is somewhere.
	flags := []string{"--management", filepath.Join("svc", "management.connection")}
	if code, text := attempt(t, dir, append(flags, "scope", "create", "plant-b")...); code != 0 || !strings.Contains(text, "service host    none: ") || !strings.Contains(text, "--domain") {
		t.Errorf("%d: %s", code, text)
	}
	for _, args := range [][]string{{"scope", "show", "plant-b", "--connection-string"}, {"policy", "show", "provisioningserviceowner", "--scope", "plant-b", "--show-keys"}} {
		code, text := attempt(t, dir, append(flags, args...)...)
		if !strings.Contains(text, "--domain") || strings.Contains(text, "HostName=") || (code == 0) != (args[0] == "policy") {
			t.Errorf("%v: %d %s", args, code, text)
		}
	}
	if code, text := attempt(t, dir, append(flags, "scope", "delete", "plant-b", "--yes")...); code != 0 {
		t.Errorf("%d: %s", code, text)
	}

	owner, err := os.ReadFile(filepath.Join(dir, "svc", "owner.connection"))
	if err != nil {
		t.Fatal(err)
	}
	_, text, _ := strings.Cut(strings.TrimSpace(string(owner)), "SharedAccessKey=")
	key, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		t.Fatal(err)
	}
	device := []byte("0123456789abcdef")
	enrollment := `{"registrationId":"dev-1","attestation":{"type":"symmetricKey","symmetricKey":{"primaryKey":"` + base64.StdEncoding.EncodeToString(device) + `","secondaryKey":"` + base64.StdEncoding.EncodeToString(device) + `"}}}`
	operate := func(method, body string) (int, map[string]any) {
		t.Helper()
		return m.call(method, "/enrollments/dev-1?api-version=2021-10-01", attesttest.ServiceToken(key, "localhost", "provisioningserviceowner", time.Now().Add(time.Hour)), body)
	}
	if status, a := operate("PUT", enrollment); status != 200 {
		t.Fatalf("%d %v", status, a)
	}
	register := func() int {
		t.Helper()
		status, _ := m.call("PUT", "/0ne00112233/registrations/dev-1/register?api-version=2021-06-01", attesttest.Token(device, "0ne00112233", "dev-1", time.Now().Add(time.Hour)), `{"registrationId":"dev-1"}`)
		return status
	}
	change := func(edit func(map[string]any)) {
		t.Helper()
		_, service := m.call("GET", path, "", "")
		edit(service["properties"].(map[string]any))
		body, err := json.Marshal(service)
		if err != nil {
			t.Fatal(err)
		}
		if status, a := m.call("PUT", path, "", string(body)); status != 200 {
			t.Fatalf("%d %v", status, a)
		}
	}
	if got := register(); got != 202 {
		t.Errorf("without rules: %d", got)
	}
	change(func(p map[string]any) {
		p["ipFilterRules"] = []map[string]string{{"filterName": "none of this machine", "action": "Reject", "ipMask": "127.0.0.0/8", "target": "deviceApi"}}
	})
	if got := register(); got != 401 {
		t.Errorf("kept out: %d", got)
	}
	if code, text := attempt(t, dir, "diagnose", "dev-1", "--service", filepath.Join("svc", "owner.connection")); code != 0 || !strings.HasPrefix(text, "An IP rule keeps out the address") {
		t.Errorf("%d: %s", code, text)
	}
	if status, a := operate("GET", ""); status != 200 {
		t.Errorf("an operator, by a rule for devices: %d %v", status, a)
	}
	change(func(p map[string]any) { p["ipFilterRules"].([]any)[0].(map[string]any)["target"] = "serviceApi" })
	if status, a := operate("GET", ""); status != 401 || a["message"] != "Unauthorized" {
		t.Errorf("an operator who is kept out: %d %v", status, a)
	}
	if got := register(); got != 202 {
		t.Errorf("a device, by a rule for operators: %d", got)
	}
	change(func(p map[string]any) { p["ipFilterRules"].([]any)[0].(map[string]any)["target"] = "all" })
	stopServe(t, cmd)
	startServe(t, dir, "--https", "127.0.0.1:0", "--mqtt", "off", "--amqp", "off")
	m = manage(t, dir)
	if got := register(); got != 401 {
		t.Errorf("kept out, after the next start: %d", got)
	}
	change(func(p map[string]any) { p["publicNetworkAccess"] = "Disabled" })
	if got := register(); got != 202 {
		t.Errorf("closed to the public, from this machine: %d", got)
	}
	if _, service := m.call("GET", path, "", ""); len(service["properties"].(map[string]any)["iotHubs"].([]any)) != 1 {
		t.Errorf("its hubs: %v", service)
	}
	// What a start names must be networks.
	if code, said := attempt(t, dir, "serve", "--data", "other", "--private-network", "10.0.0.1/8"); code != exitUsage || !strings.Contains(said, "--private-network") {
		t.Errorf("%d %s", code, said)
	}
}

// Tenants who link hubs and name webhooks do not have the service call this machine, where it was started so: neither to ask a hub
// whether it is there, nor to tell it of a device, nor to have a webhook choose. The first scope's operators may.
func TestTenantsPublicOnly(t *testing.T) {
	var calls atomic.Int64
	inside := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		calls.Add(1)
		http.Error(w, "the machine's own", http.StatusForbidden)
	}))
	defer inside.Close()
	key := base64.StdEncoding.EncodeToString([]byte("0123456789abcdef"))
	for _, flag := range []bool{false, true} {
		dir := t.TempDir()
		args := []string{"--https", "127.0.0.1:0", "--mqtt", "off", "--amqp", "off", "--name", "plant-a", "--domain", "dps.example.net", "--allow-http-webhooks"}
		if flag {
			args = append(args, "--tenants-public-only")
		}
		startServe(t, dir, args...)
		m := manage(t, dir)
		base := m.scopes()
		reached := func(what string, want bool) {
			t.Helper()
			if n := calls.Swap(0); n > 0 != want {
				t.Errorf("%t: %s: %d calls", flag, what, n)
			}
		}
		body := `{"location":"global","sku":{"name":"S1"},"properties":{"iotHubs":[{"name":"127.0.0.1","kind":"webhook","location":"x","connectionString":"URL=` + inside.URL + `/;Secret=` + key + `;Plain=true"}]}}`
		if status, a := m.call("PUT", base+"plant-a?api-version=2022-02-05", "", body); status != 401 {
			t.Errorf("%d %v", status, a)
		}
		reached("the first scope's hub", true)
		if status, a := m.call("PUT", base+"plant-b?api-version=2022-02-05", "", body); status != 401 {
			t.Errorf("%d %v", status, a)
		}
		reached("a tenant's hub", !flag)
		status, made := m.call("PUT", base+"plant-b?api-version=2022-02-05&skipHubCheck=true", "", body)
		if status != 201 {
			t.Fatalf("%d %v", status, made)
		}
		scope := made["properties"].(map[string]any)["idScope"].(string)
		for id, more := range map[string]string{"told": "", "asked": `,"allocationPolicy":"custom","customAllocationDefinition":{"webhookUrl":"` + inside.URL + `/","apiVersion":"2021-10-01"}`} {
			a := m.comeIn("plant-b", scope, id, more)
			if a["status"] != "failed" {
				t.Errorf("%t: %s: %v", flag, id, a)
			}
			reached(id, !flag)
		}
	}
}

// Azure's management client for Node, unmodified, manages a service from its creation to its end, with a CA that is verified by
// proof of possession.
func TestNodeManagement(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("node"); err != nil {
		hsmtest.Require(t, "Node.js (apt-get install nodejs npm)")
	}
	node, err := filepath.Abs(filepath.Join("..", "..", "testdata", "node"))
	if err != nil {
		t.Fatal(err)
	}
	if !exists(filepath.Join(node, "node_modules", "@azure", "arm-deviceprovisioningservices")) {
		hsmtest.Require(t, "Azure's management client for Node (npm ci --ignore-scripts in testdata/node)")
	}
	dir := t.TempDir()
	startServe(t, dir, "--https", "127.0.0.1:0", "--mqtt", "off", "--amqp", "off", "--no-hub-check")
	m := manage(t, dir)
	now := func(c *x509.Certificate) {
		c.NotBefore, c.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(24*time.Hour)
	}
	ca := attesttest.CA(t, nil, "Plant CA", now)
	asPEM := func(h *attesttest.Holder) []byte {
		return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: h.Certificate.Raw})
	}
	write(t, filepath.Join(dir, "plant-ca.pem"), string(asPEM(ca)))
	c := exec.Command("node", "manage.js", m.parts["Endpoint"], m.parts["Subscription"], "plants", "plant-n", filepath.Join(dir, "plant-ca.pem"))
	c.Dir, c.Stderr = node, os.Stderr
	c.Env = append(os.Environ(), "NODE_EXTRA_CA_CERTS="+filepath.Join(dir, "svc", "ca.pem"))
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Process.Kill(); _ = c.Wait() }()
	fmt.Fprintln(in, m.parts["Token"])
	lines := bufio.NewScanner(out)
	lines.Buffer(nil, 1<<20)
	var code struct{ Code string }
	if !lines.Scan() || json.Unmarshal(lines.Bytes(), &code) != nil || len(code.Code) != 48 {
		t.Fatalf("the verification code: %s, %v", lines.Text(), lines.Err())
	}
	fmt.Fprintf(in, "{\"certificate\":%q}\n", base64.StdEncoding.EncodeToString(asPEM(attesttest.Leaf(t, ca, code.Code, now))))
	var got map[string]any
	if !lines.Scan() || json.Unmarshal(lines.Bytes(), &got) != nil {
		t.Fatalf("what came of it: %s, %v", lines.Text(), lines.Err())
	}
	made, _ := got["made"].(map[string]any)
	if scope, _ := made["idScope"].(string); len(scope) != 11 || !strings.HasPrefix(scope, "0ne") {
		t.Errorf("ID scope %v", made["idScope"])
	}
	delete(made, "idScope")
	const masked = "HostName=hub-z.example.net;SharedAccessKeyName=dps;SharedAccessKey=****"
	want := map[string]any{
		"free": true, "made": map[string]any{"state": "Active", "hub": masked}, "taken": "AlreadyExists", "put": map[string]any{"allocationPolicy": "GeoLatency", "hub": masked},
		"tags": map[string]any{"a": "b"}, "listed": []any{"plant-n"}, "keys": []any{"provisioningserviceowner"}, "owner": "ServiceConfig, EnrollmentWrite, DeviceConnect",
		"skus": []any{"S1"}, "operations": 15.0, "links": []any{"iotDps"}, "endpoints": []any{"pe"}, "certificate": map[string]any{"subject": "Plant CA", "isVerified": false, "created": true},
		"wrong": "412 412001", "verified": true, "certificates": []any{"ca"}, "gone": "404 404203", "deleted": "404 ResourceNotFound", "stranger": "401 AuthenticationFailed",
	}
	for name, w := range want {
		if !reflect.DeepEqual(got[name], w) {
			t.Errorf("%s: %v, not %v", name, got[name], w)
		}
	}
	if len(got["everywhere"].([]any)) != 2 {
		t.Errorf("in the subscription: %v", got["everywhere"])
	}
}

// A service that died in the middle of an erasure of its own scope starts, goes on with it, and is as it was but for the devices.
func TestErasureGoesOn(t *testing.T) {
	dir := t.TempDir()
	doors := []string{"--https", "127.0.0.1:0", "--mqtt", "off", "--amqp", "off"}
	cmd, ready, _ := startServe(t, dir, doors...)
	rows := "registrationId,attestation\n"
	for i := range 700 {
		rows += fmt.Sprintf("secretpump-%03d,symmetricKey\n", i)
	}
	if err := os.WriteFile(filepath.Join(dir, "pumps.csv"), []byte(rows), 0o600); err != nil {
		t.Fatal(err)
	}
	touchmark(t, dir, "enrollment", "import", "pumps.csv", "--service", "svc/owner.connection")
	stopServe(t, cmd)
	scope := ready["idScope"].(string)
	if err := (&app{stdio: stdio{err: io.Discard, env: os.LookupEnv}}).withServiceStore(t.Context(), filepath.Join(dir, "svc"), &storeOptions{}, func(s *sqlstore.Store) error {
		if err := registration.BeginErasure(t.Context(), s, scope, registration.Actor{Name: "who died"}, time.Now()); err != nil {
			return err
		}
		return s.Update(t.Context(), func(tx registration.Tx) error {
			done, err := tx.EmptyScope(dps.Fold(scope), 300)
			if done {
				t.Error("nothing was left to do")
			}
			return err
		})
	}); err != nil {
		t.Fatal(err)
	}
	_, _, _ = startServe(t, dir, doors...)
	name := "touchmark-" + dps.Fold(scope)
	for !strings.Contains(touchmark(t, dir, "scope", "show", name, "--management", "svc/management.connection", "--json"), `"state":"Active"`) {
	}
	if out := touchmark(t, dir, "enrollment", "list", "--service", "svc/owner.connection", "--json"); out != "" {
		t.Errorf("enrollments are left: %.200s", out)
	}
	if out := touchmark(t, dir, "audit", "list", "--service", "svc/owner.connection"); !strings.Contains(out, "who died") || strings.Contains(out, "secretpump") {
		t.Errorf("audit: %s", out)
	}
	touchmark(t, dir, "enrollment", "create", "pump-1", "--service", "svc/owner.connection")
	for _, suffix := range []string{"", "-wal"} {
		if b, err := os.ReadFile(filepath.Join(dir, "svc", "service.db"+suffix)); err != nil || bytes.Contains(b, []byte("secretpump")) {
			t.Errorf("service.db%s: %v, or the erased are in it", suffix, err)
		}
	}
}
