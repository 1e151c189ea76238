package main

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/load"
)

// What touchmark load is tried with, against what touchmark serve has: a door more is a line more.
var (
	loadProtocols = []string{"https", "mqtt", "mqtt-ws", "amqp", "amqp-ws"}
	loadProofs    = []string{"symmetric", "x509", "tpm"}
)

// endpointFlags says where the doors of a service are.
func endpointFlags(ready map[string]any) []string {
	var flags []string
	for _, door := range []string{"https", "mqtt", "amqp"} {
		if at, ok := ready[door].(string); ok {
			flags = append(flags, "--"+door, at)
		}
	}
	return flags
}

// loadOwn are the flags of a load on a service in dir/svc with groups of its own.
func loadOwn(ready map[string]any, more ...string) []string {
	return slices.Concat([]string{"load", "--connection", "svc/owner.connection", "--json", "--quiet", "--hub", "hub-a.example.net",
		"--protocols", strings.Join(loadProtocols, ","), "--attestations", strings.Join(loadProofs, ",")}, endpointFlags(ready), more)
}

// runLoad runs a load and returns its report.
func runLoad(t *testing.T, dir string, args ...string) (code int, rep load.Report, stderr string) {
	t.Helper()
	cmd := exec.Command(program(t), args...)
	cmd.Dir = dir
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, _ := cmd.Output()
	if line, _, _ := bytes.Cut(out, []byte("\n")); bytes.Contains(line, []byte(`"total"`)) {
		if err := json.Unmarshal(line, &rep); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	return cmd.ProcessState.ExitCode(), rep, errs.String()
}

// groupsLeft are the groups that loads left at a service in dir/svc.
func groupsLeft(t *testing.T, dir string) (left []string) {
	t.Helper()
	svc, err := (&app{}).openService(filepath.Join(dir, "svc", "owner.connection"), "")
	if err != nil {
		t.Fatal(err)
	}
	var page []dps.EnrollmentGroup
	if err := svc.call(t.Context(), http.MethodPost, "/enrollmentGroups/query", nil, nil, nil, &page); err != nil {
		t.Fatal(err)
	}
	for _, g := range page {
		if strings.HasPrefix(g.EnrollmentGroupID, "touchmark-load-") {
			left = append(left, g.EnrollmentGroupID)
		}
	}
	return left
}

// Issue 5: every door with every proof, hostile callers of every kind among them, no wrong answer, and nothing left behind. The
// slowest of the hostile kinds are hung up on after ten seconds.
func TestLoad(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	ready, _ := startService(t, dir, "127.0.0.1:0", "127.0.0.1:0", "127.0.0.1:0")
	code, rep, stderr := runLoad(t, dir, loadOwn(ready, "--rate", "40", "--ramp", "1s", "--duration", "14s", "--hostile", "40%", "--devices", "100", "--max-errors", "0",
		"--histogram", "latency.csv", "--watch-pid", strconv.Itoa(os.Getpid()))...)
	if code != exitDone || rep.Wrong > 0 || rep.ErrorShare > 0 || rep.Total.Assigned < 100 || rep.Watch == nil || rep.Watch.Last.RSS == 0 {
		t.Fatalf("exit code %d: %+v\n%s", code, rep, stderr)
	}
	for _, protocol := range loadProtocols {
		for _, proof := range loadProofs {
			if proof == "tpm" && strings.HasPrefix(protocol, "mqtt") {
				continue // no SDK has that
			}
			if !slices.ContainsFunc(rep.Lines, func(l load.Line) bool { return l.Protocol == protocol && l.Attestation == proof && l.Assigned > 0 }) {
				t.Errorf("nobody came by %s with %s", protocol, proof)
			}
		}
	}
	if len(rep.Hostile) != 10 {
		t.Errorf("hostile callers: %+v", rep.Hostile)
	}
	csv, err := os.ReadFile(filepath.Join(dir, "latency.csv"))
	var counted uint64
	for line := range strings.Lines(string(csv)) {
		n, _ := strconv.ParseUint(strings.TrimSpace(line[strings.LastIndexByte(line, ',')+1:]), 10, 64)
		counted += n
	}
	if err != nil || counted != rep.Total.Assigned {
		t.Errorf("%d devices in the histogram, %d were assigned, %v", counted, rep.Total.Assigned, err)
	}
	if left := groupsLeft(t, dir); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	// The table says the same; a file that is there stays.
	code, text := attempt(t, dir, append(loadOwn(ready, "--concurrency", "2", "--duration", "500ms", "--json=false"), "--histogram", "other.csv")...)
	if code != exitDone || !strings.Contains(text, "P99.9") || !strings.Contains(text, "This client") {
		t.Errorf("exit code %d\n%s", code, text)
	}
	if code, text := attempt(t, dir, loadOwn(ready, "--concurrency", "2", "--histogram", "latency.csv")...); code != exitUsage || !strings.Contains(text, "--force") {
		t.Errorf("exit code %d\n%s", code, text)
	}
}

// With a group's key, or its CA's, a load needs no more. A key that the group has not is found out: every device is refused.
func TestLoadCredentials(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("TOUCHMARK_PASSPHRASE", "words for a test")
	ready, _ := startService(t, dir, "127.0.0.1:0", "127.0.0.1:0", "127.0.0.1:0")
	touchmark(t, dir, "init", "line", "--id-scope", "0ne00112233")
	svc, err := (&app{}).openService(filepath.Join(dir, "svc", "owner.connection"), "")
	if err != nil {
		t.Fatal(err)
	}
	key := base64.StdEncoding.EncodeToString(bytes.Repeat([]byte("g"), 64))
	root, err := os.ReadFile(filepath.Join(dir, "line", "root.pem"))
	if err != nil {
		t.Fatal(err)
	}
	for id, a := range map[string]*dps.Attestation{
		"keys": {Type: dps.AttestationSymmetricKey, SymmetricKey: &dps.SymmetricKeyAttestation{PrimaryKey: key, SecondaryKey: key}},
		"line": {Type: dps.AttestationX509, X509: &dps.X509Attestation{SigningCertificates: &dps.X509Certificates{Primary: &dps.X509Certificate{Certificate: string(root)}}}},
	} {
		if err := svc.callJSON(t.Context(), http.MethodPut, "/enrollmentGroups/"+id, dps.EnrollmentGroup{EnrollmentGroupID: id, Enrollment: dps.Enrollment{Attestation: a}}, nil); err != nil {
			t.Fatal(err)
		}
	}
	wrong := base64.StdEncoding.EncodeToString(bytes.Repeat([]byte("w"), 64))
	for name, text := range map[string]string{"good.key": key + "\n", "wrong.key": wrong, "no.key": "c2hvcnQ="} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	base := append([]string{"load", "--id-scope", "0ne00112233", "--ca", "svc/ca.pem", "--json", "--concurrency", "2", "--duration", "1s"}, endpointFlags(ready)...)
	x509 := []string{"--ca-cert", "line/issuing.pem", "--ca-key", "file:" + filepath.Join(dir, "line", "keys") + "?object=issuing-ca"}
	for _, c := range []struct {
		flags []string
		code  int
		said  string
	}{
		{slices.Concat([]string{"--group-key-file", "good.key", "--group", "keys"}, x509), exitDone, "stay at the service"},
		{[]string{"--group-key-file", "wrong.key"}, exitFailed, "every device was refused with 401002"},
		{[]string{"--group-key-file", "wrong.key", "--id-scope", "0neFFFFFFFF"}, exitFailed, "is --id-scope the service's"},
		{[]string{"--group-key-file", "good.key", "--group", "others"}, exitFailed, "were wrong"},
		{[]string{"--group-key-file", "no.key"}, exitUsage, "not a key"},
		{[]string{"--group-key-file", "good.key", "--attestations", "x509"}, exitUsage, "--attestations"},
		{[]string{"--ca-cert", "line/issuing.pem", "--ca-key", "file:" + filepath.Join(dir, "line", "keys") + "?object=station"}, exitFailed, ""},
	} {
		code, rep, stderr := runLoad(t, dir, append(slices.Clone(base), c.flags...)...)
		if code != c.code || !strings.Contains(stderr, c.said) || (code == exitDone) != (rep.Total.Assigned > 0 && rep.Wrong == 0) {
			t.Errorf("%v: exit code %d, want %d: %+v\n%s", c.flags, code, c.code, rep.Total, stderr)
		}
		if c.said == "were wrong" || strings.Contains(c.said, "scope") { // a device counts once, and equal lines are one
			if rep.Total.Wrong == 0 || rep.ErrorShare > 0 || len(rep.Wrongs) > 2*len(rep.Lines) || !strings.Contains(strings.Join(rep.Wrongs, "\n"), " times: ") {
				t.Errorf("%v: %+v, %q", c.flags, rep.Total, rep.Wrongs)
			}
		}
		for _, secret := range []string{key[:20], wrong[:20], "words for a test"} {
			if strings.Contains(stderr, secret) {
				t.Errorf("%v shows a key: %s", c.flags, stderr)
			}
		}
	}
}

// A load that cannot be, or must not be, calls nobody.
func TestLoadRefused(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	ready, _ := startService(t, dir, "127.0.0.1:0", "127.0.0.1:0", "127.0.0.1:0")
	other := t.TempDir()
	startService(t, other, "127.0.0.1:0", "127.0.0.1:0", "off")
	elsewhere := filepath.Join(dir, "elsewhere.connection")
	if err := os.WriteFile(elsewhere, []byte("HostName=192.0.2.1;SharedAccessKeyName=p;SharedAccessKey=AAAA"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "group.key"), []byte(base64.StdEncoding.EncodeToString(make([]byte, 32))), 0o600); err != nil {
		t.Fatal(err)
	}
	own := func(more ...string) []string { return loadOwn(ready, append([]string{"--duration", "1s"}, more...)...) }
	byKey := func(more ...string) []string {
		return append([]string{"load", "--group-key-file", "group.key", "--id-scope", "0ne00112233", "--rate", "1", "--duration", "1s"}, more...)
	}
	for name, c := range map[string]struct {
		args []string
		code int
		said string
	}{
		"elsewhere":             {byKey("--https", "192.0.2.1:443", "--protocols", "https"), exitUsage, "--i-own-this-server"},
		"mqtt elsewhere":        {byKey("--https", "localhost:1", "--mqtt", "192.0.2.1:8883"), exitUsage, "--i-own-this-server"},
		"every address":         {byKey("--https", "0.0.0.0:443"), exitUsage, "--i-own-this-server"},
		"connection elsewhere":  {[]string{"load", "--connection", elsewhere, "--rate", "1"}, exitUsage, "--i-own-this-server"},
		"another service's CA":  {own("--rate", "1", "--ca", filepath.Join(other, "svc", "ca.pem")), exitFailed, "--ca"},
		"wrong CA, by key":      {byKey("--https", ready["https"].(string), "--protocols", "https", "--ca", filepath.Join(other, "svc", "ca.pem")), exitFailed, "--ca"},
		"nothing listens":       {byKey("--https", "127.0.0.1:1", "--protocols", "https"), exitFailed, "nothing listens"},
		"no way to the service": {byKey(), exitUsage, "--https"},
		"no proof":              {[]string{"load", "--rate", "1"}, exitUsage, "at least one"},
		"no rate":               {own(), exitUsage, "at least one"},
		"two rates":             {own("--rate", "1", "--concurrency", "1"), exitUsage, "none of the others"},
		"a share of 2":          {own("--rate", "1", "--hostile", "200%"), exitUsage, "share"},
		"an unknown protocol":   {append(own("--rate", "1"), "--protocols", "coap"), exitUsage, "coap"},
		"an unknown proof":      {append(own("--rate", "1"), "--attestations", "faith"), exitUsage, "faith"},
		"another scope":         {own("--rate", "1", "--id-scope", "0neOTHER"), exitUsage, "0ne00112233"},
		"no such process":       {own("--rate", "1", "--watch-pid", "2147483646"), exitFailed, "watch"},
	} {
		if code, text := attempt(t, dir, c.args...); code != c.code || !strings.Contains(text, c.said) {
			t.Errorf("%s: exit code %d, want %d\n%s", name, code, c.code, text)
		}
	}
	if left := groupsLeft(t, dir); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// startLoad starts a load and returns when it first says how it goes.
func startLoad(t *testing.T, dir string, args ...string) (cmd *exec.Cmd, out *bytes.Buffer, errs *watchedBuffer) {
	t.Helper()
	cmd, out, errs = exec.Command(program(t), args...), &bytes.Buffer{}, &watchedBuffer{text: "devices, ", seen: make(chan struct{})}
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, out, errs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	select {
	case <-errs.seen:
	case <-time.After(time.Minute):
		t.Fatalf("the load does not begin\n%s", errs.String())
	}
	return cmd, out, errs
}

// watchedBuffer says when a text is in it.
type watchedBuffer struct {
	syncBuffer
	text string
	seen chan struct{}
	once sync.Once
}

func (w *watchedBuffer) Write(b []byte) (int, error) {
	n, err := w.syncBuffer.Write(b)
	if strings.Contains(w.String(), w.text) {
		w.once.Do(func() { close(w.seen) })
	}
	return n, err
}

// Ctrl-C: the report of what was, nothing left behind, and the exit code of interruption.
func TestLoadInterrupted(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	ready, _ := startService(t, dir, "127.0.0.1:0", "127.0.0.1:0", "127.0.0.1:0")
	cmd, out, errs := startLoad(t, dir, append(loadOwn(ready, "--rate", "30", "--duration", "1h", "--hostile", "30%"), "--quiet=false")...)
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	var rep load.Report
	line, _, _ := bytes.Cut(out.Bytes(), []byte("\n"))
	if err := json.Unmarshal(line, &rep); err != nil || cmd.ProcessState.ExitCode() != exitInterrupted || rep.Total.Assigned == 0 || rep.Wrong > 0 || rep.ErrorShare > 0 {
		t.Errorf("exit code %d, %v: %s\n%s", cmd.ProcessState.ExitCode(), err, out, errs.String())
	}
	if left := groupsLeft(t, dir); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// The service is killed in the middle: the load goes on to its end, counts by kind what became of its devices, calls none of
// it a wrong answer, and says what it had to leave.
func TestLoadServiceKilled(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	serve := exec.Command(program(t), "serve", "--data", "svc", "--https", "127.0.0.1:0", "--mqtt", "127.0.0.1:0", "--amqp", "127.0.0.1:0", "--hub", "hub-a.example.net", "--json", "--quiet")
	serve.Dir = dir
	said, err := serve.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := serve.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = serve.Process.Kill() })
	var ready map[string]any
	if err := json.NewDecoder(said).Decode(&ready); err != nil {
		t.Fatal(err)
	}
	cmd, out, errs := startLoad(t, dir, append(loadOwn(ready, "--rate", "50", "--duration", "12s", "--hostile", "20%"), "--quiet=false")...)
	if err := serve.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = serve.Wait()
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	select {
	case <-done:
	case <-time.After(2 * time.Minute):
		t.Fatalf("the load hangs\n%s", errs.String())
	}
	var rep load.Report
	line, _, _ := bytes.Cut(out.Bytes(), []byte("\n"))
	if err := json.Unmarshal(line, &rep); err != nil || cmd.ProcessState.ExitCode() != exitFailed {
		t.Fatalf("exit code %d, %v: %s\n%s", cmd.ProcessState.ExitCode(), err, out, errs.String())
	}
	var counted uint64
	for _, n := range rep.Total.Errors {
		counted += n
	}
	if rep.Wrong > 0 || rep.Total.Assigned == 0 || rep.Total.Errors["connection refused"] == 0 || rep.Total.Errors["other"] > 0 || counted != rep.Total.Count-rep.Total.Assigned {
		t.Errorf("%+v, wrong: %q", rep.Total, rep.Wrongs)
	}
	if !strings.Contains(errs.String(), "left at the service: touchmark-load-") || !strings.Contains(errs.String(), "left without an answer") {
		t.Errorf("%s", errs.String())
	}
}

// A load without a rate is wrong usage that names the flag. Against the limits that a service has by default TPMs, of which there
// are few, do not come too often, hostile callers who are put off are no wrong answers, and who meets the limits is told of them.
func TestLoadLimits(t *testing.T) {
	dir := t.TempDir()
	ready, _ := startService(t, dir, "127.0.0.1:0", "127.0.0.1:0", "127.0.0.1:0")
	for _, flags := range [][]string{{"--rate", "0"}, {"--rate", "-1"}, {"--rate", "NaN"}, {"--concurrency", "0"}} {
		if code, _, stderr := runLoad(t, dir, loadOwn(ready, flags...)...); code != exitUsage || !strings.Contains(stderr, flags[0]) {
			t.Errorf("%v: exit code %d\n%s", flags, code, stderr)
		}
	}
	own := slices.DeleteFunc(loadOwn(ready), func(s string) bool { return s == "--quiet" })
	code, rep, stderr := runLoad(t, dir, append(slices.Clone(own), "--rate", "90", "--duration", "12s", "--max-errors", "0")...)
	if code != exitDone || rep.Total.Assigned < 500 || !strings.Contains(stderr, "making 2 groups") || !strings.Contains(stderr, "making 55 TPMs") || strings.Contains(stderr, "hint") {
		t.Errorf("exit code %d: %+v\n%s", code, rep.Total, stderr)
	}
	dir = t.TempDir()
	ready, _ = startService(t, dir, "127.0.0.1:0", "127.0.0.1:0", "127.0.0.1:0", "--rate-per-address", "5")
	code, rep, stderr = runLoad(t, dir, loadOwn(ready, "--attestations", "symmetric", "--protocols", "https", "--rate", "300", "--duration", "2s", "--timeout", "5s")...)
	if code != exitFailed || rep.Wrong > 0 || rep.ErrorShare == 0 || !strings.Contains(stderr, "help limits") {
		t.Errorf("exit code %d: %+v\n%s", code, rep.Total, stderr)
	}
}
