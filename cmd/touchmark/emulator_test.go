package main

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/touchmark/touchmark/hsm/hsmtest"
)

// anEmulator is one that runs.
type anEmulator struct {
	cmd   *exec.Cmd
	ready map[string]any
	log   *syncBuffer
	pipe  io.Closer
	out   *bufio.Reader // reads it
}

// startEmulator runs serve --ephemeral in dir until the test ends, when it must stop cleanly unless it was killed.
func startEmulator(t *testing.T, dir string, args ...string) *anEmulator {
	t.Helper()
	e := &anEmulator{log: &syncBuffer{}}
	e.cmd = exec.Command(program(t), append([]string{"serve", "--ephemeral", "--https", "127.0.0.1:0", "--mqtt", "127.0.0.1:0", "--json"}, args...)...)
	e.cmd.Dir, e.cmd.Stderr = dir, e.log
	e.cmd.Env = append(os.Environ(), "HOME="+dir, "TMPDIR="+dir)
	out, err := e.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := e.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if e.cmd.ProcessState == nil {
			_ = e.cmd.Process.Signal(os.Interrupt)
			if err := e.cmd.Wait(); err != nil {
				t.Errorf("serve: %v", err)
			}
		}
		if t.Failed() {
			t.Log(e.log.String())
		}
	})
	e.pipe, e.out = out, bufio.NewReader(out)
	line, err := e.out.ReadString('\n')
	if err == nil {
		err = json.Unmarshal([]byte(line), &e.ready)
	}
	if err != nil || e.ready["ready"] != true || e.ready["ephemeral"] != true {
		t.Fatalf("serve did not start: %v\n%s", err, e.log.String())
	}
	return e
}

func (e *anEmulator) word(name string) string {
	s, _ := e.ready[name].(string)
	return s
}

// Jobs of a CI system run beside each other: two emulators of one seed are the same but for their ports. One that is killed
// leaves nothing: no file in its directory, its home or where temporary files go, and none was open.
func TestEmulators(t *testing.T) {
	bare := t.TempDir()
	one, two, other := startEmulator(t, bare, "--seed", "ci"), startEmulator(t, t.TempDir(), "--seed", "ci"), startEmulator(t, t.TempDir())
	for _, name := range []string{"idScope", "ca", "recipient"} {
		if one.word(name) == "" || one.word(name) != two.word(name) || one.word(name) == other.word(name) {
			t.Errorf("%s: %q, %q and, without a seed, %q", name, one.word(name), two.word(name), other.word(name))
		}
	}
	for _, name := range []string{"symmetricGroup", "x509Group"} {
		a, _ := json.Marshal(one.ready[name])
		b, _ := json.Marshal(two.ready[name])
		c, _ := json.Marshal(other.ready[name])
		if !bytes.Equal(a, b) || bytes.Equal(a, c) || len(a) < 50 {
			t.Errorf("%s: %s, %s, %s", name, a, b, c)
		}
	}
	_, keyOne, _ := strings.Cut(one.word("connectionString"), ";")
	if _, keyTwo, _ := strings.Cut(two.word("connectionString"), ";"); keyOne != keyTwo || !strings.Contains(keyOne, "SharedAccessKey=") {
		t.Error("connection strings")
	}
	if one.word("https") == two.word("https") || one.word("mqtt") == two.word("mqtt") {
		t.Error("ports")
	}
	if block, _ := pem.Decode([]byte(one.word("ca"))); block == nil || block.Type != "CERTIFICATE" {
		t.Errorf("CA %q", one.word("ca"))
	}

	// A device of one is a device of the other.
	dir := t.TempDir()
	three := startEmulator(t, dir, "--seed", "ci", "--stamp", "sensor-1", "--stamp-x509", "sensor-2", "--ca-out", "ca.pem", "--connection-out", "c")
	if three.word("connectionString") != "" {
		t.Error("the connection string is in a file, and printed")
	}
	for _, e := range []*anEmulator{one, two, three} {
		for stamp, protocol := range map[string]string{"sensor-1": "mqtt", "sensor-2": "https"} {
			if code, text := attempt(t, dir, "register", "--stamp", stamp, "--protocol", protocol, "--endpoint", e.word(protocol), "--ca", "ca.pem"); code != 0 {
				t.Errorf("%s: exit code %d\n%s", stamp, code, text)
			}
		}
	}

	proc := "/proc/" + strconv.Itoa(one.cmd.Process.Pid)
	open, err := os.ReadDir(proc + "/fd")
	if err != nil || len(open) < 5 {
		t.Fatalf("%v, %v", open, err)
	}
	for _, f := range open {
		name, _ := os.Readlink(proc + "/fd/" + f.Name())
		info, err := os.ReadFile(proc + "/fdinfo/" + f.Name())
		st, serr := os.Stat(proc + "/fd/" + f.Name())
		if err != nil || serr != nil || !st.Mode().IsRegular() || !strings.HasPrefix(name, "/") {
			continue
		}
		if m := regexp.MustCompile(`flags:\s+\d*[12]\n`).Find(info); m != nil {
			t.Errorf("%s is open for writing", name)
		}
	}
	if err := one.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = one.cmd.Wait()
	if err := filepath.WalkDir(bare, func(path string, _ fs.DirEntry, err error) error {
		if path != bare {
			t.Errorf("%s is left, %v", path, err)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
}

// The table for a person has the CA, and no secret.
func TestEmulatorTable(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), program(t), "serve", "--ephemeral", "--https", "127.0.0.1:0", "--mqtt", "off")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var text strings.Builder
	for s := bufio.NewScanner(out); s.Scan() && s.Text() != "-----END CERTIFICATE-----"; {
		text.WriteString(s.Text() + "\n")
	}
	_ = cmd.Process.Signal(os.Interrupt)
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	if s := text.String(); !strings.Contains(s, "BEGIN CERTIFICATE") || !strings.Contains(s, "HTTPS") || strings.Contains(s, "Key") {
		t.Error(s)
	}
}

// Every fault as a device meets it, through each door; and what was said is written down, without secrets.
func TestEmulatorFaults(t *testing.T) {
	dir := t.TempDir()
	e := startEmulator(t, dir, "--seed", "ci", "--stamp", "sensor-1", "--ca-out", "ca.pem", "--connection-out", "c", "--exchanges", "x.jsonl")
	for _, protocol := range []string{"https", "mqtt"} {
		for _, x := range []struct {
			faults  []string
			code    int
			says    string
			applied string // of the first fault
		}{
			{[]string{"rid=SENSOR-*,code=429,count=1,retry-after=1", "rid=pump-*,code=500"}, 0, "assigned", "1"},
			{[]string{"code=503,nth=2,retry-after=1"}, 0, "assigned", "1"},
			{[]string{"code=401"}, exitRefused, "401002 Unauthorized", "1"},
			{[]string{"code=400004,op=status"}, exitRefused, "400004", "1"},
			{[]string{"lost,count=1"}, exitRefused, "404000 Operation not found", "1"},
			{[]string{"drop,count=1"}, 0, "assigned", "1"},
			{[]string{"drop=after,op=register,count=1"}, 0, "assigned", "1"},
			{[]string{"retry-after=banana"}, 0, "assigned", "1"},
			{[]string{"retry-after=none"}, 0, "assigned", "1"},
			{[]string{"assigning=2,retry-after=1"}, 0, "assigned", "2"},
			{[]string{"disabled"}, exitRefused, "disabled", "1"},
			{[]string{"failed=400208"}, exitRefused, "failed: 400208", "1"},
			{[]string{"hub=other.example.net"}, 0, "other.example.net", "1"},
			{[]string{"delay=150ms,op=register"}, 0, "assigned", "1"},
			{[]string{"protocol=amqp,code=500"}, 0, "assigned", "0"},
		} {
			touchmark(t, dir, append([]string{"fault", "set", "--service", "c"}, x.faults...)...)
			code, text := attempt(t, dir, "register", "--stamp", "sensor-1", "--protocol", protocol, "--endpoint", e.word(protocol), "--ca", "ca.pem")
			if code != x.code || !strings.Contains(text, x.says) {
				t.Errorf("%s, %v: exit code %d\n%s", protocol, x.faults, code, text)
			}
			list := touchmark(t, dir, "fault", "list", "--service", "c", "--json")
			want := `,"applied":` + x.applied + "}"
			if x.applied == "2" {
				want = `"matched":1,"applied":1}` // operations are what is counted
			}
			if first, _, _ := strings.Cut(list, "\n"); !strings.HasSuffix(first, want) {
				t.Errorf("%s, %v: %s", protocol, x.faults, list)
			}
		}
	}
	_ = e.cmd.Process.Signal(os.Interrupt)
	if err := e.cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(dir, "x.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"protocol":"mqtt"`, `"protocol":"https"`, `"retryAfter":"banana"`, `"hungUp":true`, `"faults":["code=401"]`, `"resource":"` + e.word("idScope") + `/registrations/sensor-1"`} {
		if !bytes.Contains(b, []byte(want)) {
			t.Errorf("%s is not among the exchanges", want)
		}
	}
	if n := bytes.Count(b, []byte("\n")); n < 60 {
		t.Errorf("%d exchanges", n)
	}
	var secrets []string
	var stamp struct{ SymmetricKey string }
	for file, v := range map[string]any{"sensor-1/provisioning.json": &stamp, "c": nil} {
		s, err := os.ReadFile(filepath.Join(dir, file))
		if err != nil {
			t.Fatal(err)
		}
		if v == nil {
			_, key, _ := strings.Cut(strings.TrimSpace(string(s)), "SharedAccessKey=")
			secrets = append(secrets, key)
		} else if err := json.Unmarshal(s, v); err != nil {
			t.Fatal(err)
		}
	}
	group, _ := e.ready["symmetricGroup"].(map[string]any)
	key, _ := group["primaryKey"].(string)
	for _, s := range append(secrets, stamp.SymmetricKey, key, "sig=") {
		raw, _ := base64.StdEncoding.DecodeString(s)
		if s == "" || bytes.Contains(b, []byte(s)) || strings.Contains(e.log.String(), s) || len(raw) > 0 && bytes.Contains(b, raw) {
			t.Errorf("secret %q is among the exchanges, or in the log", s)
		}
	}
}

// Whoever reads the exchanges may go away: the service stays.
func TestExchangesToNobody(t *testing.T) {
	dir := t.TempDir()
	e := startEmulator(t, dir, "--stamp", "sensor-1", "--ca-out", "ca.pem", "--exchanges", "-")
	register := func() {
		t.Helper()
		if code, text := attempt(t, dir, "register", "--stamp", "sensor-1", "--endpoint", e.word("https"), "--ca", "ca.pem"); code != 0 {
			t.Errorf("exit code %d\n%s", code, text)
		}
	}
	register()
	if line, err := e.out.ReadString('\n'); err != nil || !strings.Contains(line, `"operation":"register"`) {
		t.Errorf("%s, %v", line, err)
	}
	if err := e.pipe.Close(); err != nil {
		t.Fatal(err)
	}
	register()
	register()
	for begin := time.Now(); !strings.Contains(e.log.String(), "exchanges are being lost"); time.Sleep(time.Millisecond) {
		if time.Since(begin) > 10*time.Second {
			t.Fatal("not told")
		}
	}
	register()
	if n := strings.Count(e.log.String(), "exchanges are being lost"); n != 1 {
		t.Errorf("told %d times", n)
	}
}

// Azure's SDK for Node meets a fault as its users would: an answer that a throttled service gives, an operation that was
// forgotten, a device that is disabled.
func TestNodeSDKMeetsFaults(t *testing.T) {
	node, err := filepath.Abs(filepath.Join("..", "..", "testdata", "node"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := exec.LookPath("node"); err != nil || !exists(filepath.Join(node, "node_modules", "azure-iot-provisioning-device")) {
		hsmtest.Require(t, "Azure's SDK for Node (npm ci --ignore-scripts in testdata/node)")
	}
	dir := t.TempDir()
	e := startEmulator(t, dir, "--seed", "ci", "--stamp", "sensor-1", "--ca-out", "ca.pem", "--connection-out", "c")
	for _, x := range []struct {
		faults []string
		ok     bool
		says   string
	}{
		{[]string{"nth=1,delay=100ms"}, true, `"assignedHub":"hub.example.invalid"`},
		{[]string{"assigning=1,retry-after=1"}, true, `"status":"assigned"`},
		{[]string{"disabled"}, false, "disabled"},
		{[]string{"lost"}, false, "404"},
		{[]string{"code=401"}, false, "nauthorized"},
	} {
		touchmark(t, dir, append([]string{"fault", "set", "--service", "c"}, x.faults...)...)
		c := exec.CommandContext(t.Context(), "node", "register.js", filepath.Join(dir, "sensor-1"), "mqtt", e.word("mqtt"))
		c.Dir, c.Env = node, append(os.Environ(), "NODE_EXTRA_CA_CERTS="+filepath.Join(dir, "ca.pem"))
		out, _ := c.CombinedOutput() // its exit code is in what it prints
		if bytes.Contains(out, []byte(`"ok":true`)) != x.ok || !bytes.Contains(out, []byte(x.says)) {
			t.Errorf("%v: %s", x.faults, out)
		}
	}
	if list := touchmark(t, dir, "fault", "list", "--service", "c", "--json"); !strings.Contains(list, `"applied":1`) {
		t.Error(list)
	}
}

// A door that is not named takes a free port, too, when another one is named so: jobs run side by side. The other way round the
// usual ports stay, for SDKs that have them built in.
func TestEmulatorFreePorts(t *testing.T) {
	for _, door := range []string{"https", "mqtt", "amqp"} {
		o := &serveOptions{}
		c := newServe(&app{})
		_ = c.Flags().Set("ephemeral", "true")
		_ = c.Flags().Set(door, "127.0.0.1:0")
		o.https, o.mqtt, o.amqp, o.ephemeral = ":443", ":8883", ":5671", true
		for name, at := range map[string]*string{"https": &o.https, "mqtt": &o.mqtt, "amqp": &o.amqp} {
			if name == door {
				*at = "127.0.0.1:0"
			}
		}
		if err := o.checkEmulator(c); err != nil || o.https != emulatorFree || o.mqtt != emulatorFree || o.amqp != emulatorFree {
			t.Errorf("--%s: %v, %+v", door, err, o.doorOptions)
		}
	}
	o := &serveOptions{}
	o.ephemeral = true
	if err := o.checkEmulator(newServe(&app{})); err != nil || o.https != emulatorHTTPS || o.mqtt != emulatorMQTT || o.amqp != emulatorAMQP {
		t.Errorf("%v, %+v", err, o.doorOptions)
	}
}

// What a person reads when a device is not assigned: what there is to say, and what to do.
func TestRegisterSays(t *testing.T) {
	dir := t.TempDir()
	e := startEmulator(t, dir, "--seed", "ci", "--stamp", "s1", "--stamp", "s2", "--stamp", "s3", "--ca-out", "ca.pem", "--fault", "rid=s1,disabled", "--fault", "rid=s2,lost")
	for name, c := range map[string]struct {
		stamp, protocol, port string
		code                  int
		said, unsaid          string
	}{
		"disabled":       {"s1", "https", "https", exitRefused, "the registration is disabled\n", "Assigned hub"},
		"lost":           {"s2", "https", "https", exitRefused, "the service forgot the operation: register again", "bundle"},
		"other protocol": {"s3", "mqtt", "https", exitFailed, "is that the port of mqtt?", ""},
		"and back":       {"s3", "https", "mqtt", exitFailed, "is that the port of https?", ""},
		"amqp":           {"s3", "amqp", "https", exitFailed, "is that the port of amqp?", ""},
	} {
		code, text := attempt(t, dir, "register", "--stamp", c.stamp, "--protocol", c.protocol, "--endpoint", e.word(c.port), "--ca", "ca.pem")
		if code != c.code || !strings.Contains(text, c.said) || c.unsaid != "" && strings.Contains(text, c.unsaid) {
			t.Errorf("%s: exit code %d\n%s", name, code, text)
		}
	}
	code, text := attempt(t, dir, "register", "--stamp", "s3", "--endpoint", e.word("https"), "--ca", "ca.pem", "--csr-key", "new")
	if code != exitRefused || !strings.Contains(text, "names no issuer: touchmark help issuers") {
		t.Errorf("exit code %d\n%s", code, text)
	}
	for want, args := range map[string][]string{
		"want one, as file:DIR?object=NAME":      {"register", "--stamp", "s3", "--csr-key", "file:keys"},
		"=envoy":                                 {"serve", "--data", "svc", "--trusted-proxy", "127.0.0.9", "--trust-forwarded-client-cert", "envoy"},
		"--rate-per-scope -1":                    {"serve", "--data", "svc", "--rate-per-scope", "-1"},
		`error: there is no page "nonsense"`:     {"help", "nonsense"},
		`error: there is no page "key nonsense"`: {"help", "key", "nonsense"},
	} {
		if code, text := attempt(t, dir, args...); code != exitUsage || !strings.Contains(text, want) {
			t.Errorf("%v: exit code %d\n%s", args, code, text)
		}
	}
	for _, page := range [][]string{{"help", "limits"}, {"help", "proxies"}, {"help", "key", "new"}, {"help"}} {
		if code, text := attempt(t, dir, page...); code != 0 || len(text) < 300 {
			t.Errorf("%v: exit code %d\n%s", page, code, text)
		}
	}
}

// The example of help issuers works as pasted.
func TestIssuersExample(t *testing.T) {
	_, script, _ := strings.Cut(issuersTopic.Long, "An example, from nothing.")
	_, script, _ = strings.Cut(script, "\n\n")
	script, _, ok := strings.Cut(script, "\n\n")
	if _, err := exec.LookPath("openssl"); err != nil || !ok {
		hsmtest.Require(t, "openssl")
	}
	dir := t.TempDir()
	if err := os.Symlink(program(t), filepath.Join(dir, "touchmark")); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "bash", "-ec", "trap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n"+script)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"))
	out, err := cmd.CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("subject=CN = sensor-1")) || !bytes.Contains(out, []byte("notAfter")) {
		t.Errorf("%v\n%s", err, out)
	}
}
