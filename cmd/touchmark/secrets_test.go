package main

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

var allProfiles = []string{"x509-group", "x509-individual", "symmetric-group", "symmetric-individual", "esp32-nvs", "eeprom"}

// startService runs a service in dir/svc until the test ends, and returns what it said when it was ready and what it logs.
func startService(t *testing.T, dir, https, mqtt, amqp string, more ...string) (ready map[string]any, log *syncBuffer) {
	t.Helper()
	_, ready, log = startServe(t, dir, append([]string{"--https", https, "--mqtt", mqtt, "--amqp", amqp}, more...)...)
	return ready, log
}

// mintAll makes a line in dir/line, mints two devices of every profile to dir/stamps, and imports their bundles into the
// service in dir/svc. It returns all that was printed.
func mintAll(t *testing.T, dir string) string {
	t.Helper()
	var said strings.Builder
	do := func(args ...string) {
		code, text := attempt(t, dir, args...)
		if said.WriteString(text); code != 0 {
			t.Fatalf("touchmark %s: exit code %d\n%s", strings.Join(args, " "), code, text)
		}
	}
	do("init", "line", "--id-scope", "0ne00112233")
	do("group", "key", "symmetric-devices", "--service", "svc/owner.connection", "--recipient", recipient(t, dir), "--out", "g.sealed")
	do("key", "import", "--line", "line", "--name", "group-key", "--in", "g.sealed")
	service, err := os.ReadFile(filepath.Join(dir, "svc", "recipient.txt"))
	if err != nil {
		t.Fatal(err)
	}
	for _, profile := range allProfiles {
		if err := os.WriteFile(filepath.Join(dir, profile+".csv"), serialList(profile, 2), 0o644); err != nil {
			t.Fatal(err)
		}
		do("mint", "--line", "line", "--profile", profile, "--serials", profile+".csv", "--out", "stamps", "--bundle", profile+".tmb", "--recipient", strings.TrimSpace(string(service)))
		do("import", profile+".tmb", "--service", "svc/owner.connection", "--trust", "line/station.pem")
	}
	for _, args := range [][]string{{"ledger", "show", "--line", "line"}, {"ledger", "show", "--line", "line", "--json"}, {"key", "list", "--line", "line", "--json"},
		{"bundle", "entries", "symmetric-individual.tmb", "--trust", "line/station.pem"}, {"bundle", "show", "symmetric-individual.tmb", "--json"}} {
		do(args...)
	}
	return said.String()
}

// Invariant 5: after the whole journey, secrets are where they belong and nowhere else: not in what was printed or logged,
// not in the ledger, a bundle, the service's database or a temporary file, in no spelling; and where they are, only their
// owner may read them.
func TestSecretsStayPut(t *testing.T) {
	const passphrase = "nobody may read these words"
	dir, tmp := t.TempDir(), t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "passphrase"), []byte(passphrase+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("TOUCHMARK_PASSPHRASE_FILE", filepath.Join(dir, "passphrase"))
	program(t) // built elsewhere
	t.Setenv("TMPDIR", tmp)
	ready, log := startService(t, dir, "127.0.0.1:0", "127.0.0.1:0", "127.0.0.1:0")
	said := mintAll(t, dir)
	stamps, err := filepath.Glob(filepath.Join(dir, "stamps", "*"))
	if err != nil || len(stamps) != 2*len(allProfiles) {
		t.Fatalf("%d stamps, %v", len(stamps), err)
	}
	for i, stamp := range stamps {
		protocol := []string{"https", "mqtt"}[i%2]
		code, text := attempt(t, dir, "register", "--stamp", stamp, "--protocol", protocol, "--endpoint", ready[protocol].(string), "--ca", "svc/ca.pem")
		if code != 0 {
			t.Errorf("%s: exit code %d\n%s", stamp, code, text)
		}
		// And what is said of one that is refused.
		_, more := attempt(t, dir, "register", "--stamp", stamp, "--endpoint", ready["mqtt"].(string), "--ca", "svc/ca.pem")
		said += text + more
	}

	// The secrets, each with where it belongs.
	type secret struct {
		what, home string // or an image beside it
		spellings  [][]byte
	}
	var secrets []secret
	add := func(what, home string, raw []byte) {
		if len(raw) < 16 {
			t.Fatalf("%s: %q is no secret", what, raw)
		}
		std := base64.StdEncoding.EncodeToString(raw)
		secrets = append(secrets, secret{what, home, [][]byte{raw, []byte(std), []byte(base64.URLEncoding.EncodeToString(raw))}})
	}
	add("the passphrase", filepath.Join(dir, "passphrase"), []byte(passphrase))
	for _, stamp := range stamps {
		home := filepath.Join(stamp, "provisioning.json")
		b, err := os.ReadFile(home)
		if err != nil {
			t.Fatal(err)
		}
		var doc struct{ SymmetricKey []byte }
		if err := json.Unmarshal(b, &doc); err != nil {
			t.Fatal(err)
		}
		if doc.SymmetricKey == nil {
			home = filepath.Join(stamp, "device-key.pem")
			text, err := os.ReadFile(home)
			if err != nil {
				t.Fatal(err)
			}
			block, _ := pem.Decode(text)
			doc.SymmetricKey = block.Bytes[36:68] // the scalar, in PKCS #8 of a P-256 key
		}
		add("a device's key", home, doc.SymmetricKey)
	}
	connection, err := os.ReadFile(filepath.Join(dir, "svc", "owner.connection"))
	if err != nil {
		t.Fatal(err)
	}
	_, text, _ := strings.Cut(strings.TrimSpace(string(connection)), "SharedAccessKey=")
	owner, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		t.Fatal(err)
	}
	add("the owner's key", filepath.Join(dir, "svc", "owner.connection"), owner)

	belongs := func(s secret, where string) bool {
		return where == s.home || filepath.Dir(where) == filepath.Dir(s.home) && filepath.Ext(where) == ".bin"
	}
	search := func(where string, b []byte) {
		for _, s := range secrets {
			if !belongs(s, where) && slices.ContainsFunc(s.spellings, func(x []byte) bool { return bytes.Contains(b, x) }) {
				t.Errorf("%s is in %s", s.what, where)
			}
		}
	}
	search("what was printed", []byte(said))
	search("the service's log", []byte(log.String()))
	files := 0
	for _, root := range []string{dir, tmp} {
		err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
			if err != nil || e.IsDir() {
				return err
			}
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			files++
			search(path, b)
			info, err := e.Info()
			if err != nil {
				return err
			}
			if slices.ContainsFunc(secrets, func(s secret) bool { return belongs(s, path) }) && info.Mode().Perm() != 0o600 {
				t.Errorf("%s has mode %v", path, info.Mode())
			}
			if root == tmp {
				t.Errorf("%s was left behind", path)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if files < 40 {
		t.Errorf("only %d files were searched", files)
	}
}
