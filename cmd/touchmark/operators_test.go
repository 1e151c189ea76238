package main

import (
	"bytes"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/operator"
	"github.com/touchmark/touchmark/pkg/operator/azuretest"
)

// line3 mints a few devices of every kind, whose bundles are for the service in svc and, as their keys are sealed to one recipient
// alone, symmetric ones for another service too.
func line3(t *testing.T, dir, scope, recipient, other string) []string {
	t.Helper()
	touchmark(t, dir, "init", "line", "--id-scope", scope)
	var bundles []string
	for _, p := range []struct{ profile, prefix, recipient string }{
		{"x509-group", "XG", ""}, {"x509-individual", "XI", ""}, {"symmetric-individual", "SI", recipient}, {"symmetric-individual", "SJ", other},
	} {
		list := filepath.Join(dir, p.prefix+".csv")
		if err := os.WriteFile(list, serialList(p.prefix, 23), 0o644); err != nil {
			t.Fatal(err)
		}
		args := []string{"mint", "--line", "line", "--profile", p.profile, "--serials", list, "--out", "stamps", "--bundle", p.prefix + ".tmb"}
		if p.recipient != "" {
			args = append(args, "--recipient", p.recipient)
		}
		touchmark(t, dir, args...)
		bundles = append(bundles, p.prefix+".tmb")
	}
	return bundles
}

// enrollments returns what a service holds of a kind, without what it made, as JSON by ID.
func enrollments(t *testing.T, connection string, k operator.Kind) map[string]*operator.Document {
	t.Helper()
	svc, err := (&app{}).openService(connection, "")
	if err != nil {
		t.Fatal(err)
	}
	all := make(map[string]*operator.Document)
	for d, err := range svc.All(t.Context(), k) {
		if err != nil {
			t.Fatal(err)
		}
		e, err := d.Enrollment()
		if err != nil {
			t.Fatal(err)
		}
		if e.Attestation.Type == dps.AttestationSymmetricKey {
			if e.Attestation, err = svc.Mechanism(t.Context(), k, d.ID); err != nil {
				t.Fatal(err)
			}
			if err := d.Set("attestation", e.Attestation); err != nil {
				t.Fatal(err)
			}
		}
		d.Portable()
		all[d.ID] = d
	}
	return all
}

// Issue 6, done when 3: a bundle exported by the line imports into our service and into one that behaves like Azure's, ten to a call
// and throttled, with the same enrollments as a result.
func TestBundleIntoBothServices(t *testing.T) {
	t.Setenv("TOUCHMARK_PASSPHRASE", "words for a test")
	dir := t.TempDir()
	stub := azuretest.Start(t, azuretest.Config{Limit: 5, Window: 300 * time.Millisecond, RetryAfter: 1})
	azure := stub.Files(t, filepath.Join(dir, "azure"))
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "operator.key"), []byte(id.String()+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	ready, _ := startService(t, dir, "127.0.0.1:0", "off", "off", "--hub", "hub-a.example.net")
	bundles := line3(t, dir, ready["idScope"].(string), ready["recipient"].(string), id.Recipient().String())
	ours := filepath.Join(dir, "svc", "owner.connection")

	if code, text := attempt(t, dir, "import", bundles[0], "--service", azure); code != 2 || !strings.Contains(text, "--trust") {
		t.Errorf("without --trust: exit code %d\n%s", code, text)
	}
	if code, text := attempt(t, dir, "import", bundles[3], "--service", azure, "--trust", "line/station.pem"); code != 2 || !strings.Contains(text, "--identity") {
		t.Errorf("sealed keys without an identity: exit code %d\n%s", code, text)
	}
	for _, b := range bundles[:2] {
		touchmark(t, dir, "import", b, "--service", ours, "--trust", "line/station.pem")
		touchmark(t, dir, "import", b, "--service", azure, "--trust", "line/station.pem")
	}
	touchmark(t, dir, "import", bundles[3], "--service", azure, "--trust", "line/station.pem", "--identity", "operator.key")
	out := touchmark(t, dir, "import", bundles[3], "--service", azure, "--trust", "line/station.pem", "--identity", "operator.key", "--json")
	if !strings.Contains(out, `"new":0,"unchanged":23`) {
		t.Errorf("the second time: %s", out)
	}
	calls, throttled := stub.Calls()
	if throttled == 0 || calls["POST enrollments"] == 0 || calls["PUT enrollments"] > 0 {
		t.Errorf("the service saw %v, and throttled %d", calls, throttled)
	}
	// The keys go over to our service as an export.
	touchmark(t, dir, "enrollment", "export", "--service", azure, "--with-keys", "--out", "keys.jsonl")
	keep := filter(t, filepath.Join(dir, "keys.jsonl"), "symmetricKey")
	if st, err := os.Stat(filepath.Join(dir, "keys.jsonl")); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
	if err := os.WriteFile(filepath.Join(dir, "keep.jsonl"), keep, 0o600); err != nil {
		t.Fatal(err)
	}
	touchmark(t, dir, "enrollment", "import", "keep.jsonl", "--service", ours)
	for _, k := range []operator.Kind{operator.Individual, operator.Group} {
		a, b := enrollments(t, azure, k), enrollments(t, ours, k)
		if len(a) != len(b) || k == operator.Individual && len(a) != 46 || k == operator.Group && len(a) != 1 {
			t.Errorf("%d of kind %s there, %d here", len(a), k, len(b))
		}
		for id, d := range a {
			if b[id] == nil {
				t.Errorf("%s is not here", d)
				continue
			}
			var keys *dps.SymmetricKeyAttestation
			if e, err := d.Enrollment(); err != nil {
				t.Fatal(err)
			} else {
				keys = e.Attestation.SymmetricKey
			}
			changes, err := operator.Compare(d, b[id], keys)
			if err != nil || len(changes) > 0 {
				t.Errorf("%s: %v %v", d, changes, err)
			}
		}
	}
}

// filter returns the lines that hold a text.
func filter(t *testing.T, path, text string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var out []byte
	for line := range bytes.Lines(b) {
		if bytes.Contains(line, []byte(text)) {
			out = append(out, line...)
		}
	}
	return out
}

// azure DIR: starts a service that behaves like Azure's, throttled, and writes its connections into the directory.
func azureCmd(t *testing.T) func(*testscript.TestScript, bool, []string) {
	return func(ts *testscript.TestScript, _ bool, args []string) {
		s := azuretest.Start(t, azuretest.Config{Limit: 100, Window: time.Second, RetryAfter: 1})
		s.Files(t, ts.MkAbs(args[0]))
		s.Management(t, ts.MkAbs(args[0]))
	}
}

// An import that is killed in the middle is finished by the same command: nothing is there twice and nothing is missing.
func TestImportKilled(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	const rows = 6000
	var want atomic.Int64
	reached := make(chan struct{}, 1)
	var stub *azuretest.Server
	stub = azuretest.Start(t, azuretest.Config{Lose: func(*http.Request) bool {
		if int64(stub.Len()) >= want.Load() {
			select {
			case reached <- struct{}{}:
			default:
			}
		}
		return false
	}})
	azure := stub.Files(t, filepath.Join(dir, "azure"))
	var text bytes.Buffer
	for i := range rows {
		fmt.Fprintf(&text, `{"registrationId":"dev-%d","attestation":{"type":"symmetricKey"},"initialTwin":{"tags":{"n":%d}}}`+"\n", i, i)
	}
	if err := os.WriteFile(filepath.Join(dir, "all.jsonl"), text.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	args := []string{"enrollment", "import", "all.jsonl", "--service", azure, "--json"}
	journal := filepath.Join(dir, "all.jsonl.journal")
	kills := 0
	for n := rows / 4; n < rows; n += rows / 4 {
		want.Store(int64(n))
		cmd := exec.Command(program(t), args...)
		cmd.Dir = dir
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		select {
		case <-reached:
		case <-time.After(time.Minute):
			t.Errorf("%d rows of %d are there after a minute", stub.Len(), n)
		}
		_ = cmd.Process.Kill()
		if err := cmd.Wait(); err != nil {
			kills++
		}
	}
	if kills == 0 || stub.Len() == 0 {
		t.Fatalf("killed %d times, %d rows are there", kills, stub.Len())
	}
	out := touchmark(t, dir, args...)
	if stub.Len() != rows || exists(journal) || !strings.Contains(out, fmt.Sprintf(`"rows":%d,`, rows)) || strings.Contains(out, `"outcome":"conflict"`) {
		t.Errorf("%d rows of %d are there, journal %t\n%.300s", stub.Len(), rows, exists(journal), out[max(0, len(out)-300):])
	}
}

// Issue 6: Azure does not tell which devices still use a group's old key. Nobody is shut out unless somebody says --yes, and it says why.
func TestRollAtAzure(t *testing.T) {
	dir := t.TempDir()
	stub := azuretest.Start(t, azuretest.Config{})
	azure := stub.Files(t, filepath.Join(dir, "azure"))
	touchmark(t, dir, "group", "create", "pumps", "--attestation-type", "symmetricKey", "--service", azure)
	stub.Register("pumps", "pump-1", "assigned", nil)
	roll := []string{"group", "roll-key", "pumps", "--new-key", "new.key", "--service", azure}
	touchmark(t, dir, roll...)
	before, _ := stub.Keys("pumps", "pumps")
	code, text := attempt(t, dir, roll...)
	if now, _ := stub.Keys("pumps", "pumps"); code != 3 || now != before || !strings.Contains(text, "does not tell which devices") || !strings.Contains(text, "with --yes") || !strings.Contains(text, "unknown") {
		t.Errorf("exit code %d\n%s", code, text)
	}
	touchmark(t, dir, append(roll, "--yes")...)
	if p, s := stub.Keys("pumps", "pumps"); p == before || p != s {
		t.Error("the old key is still there")
	}
}
