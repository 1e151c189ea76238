package templates_test

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/touchmark/touchmark/hsm/hsmtest"
	"github.com/touchmark/touchmark/templates"
)

const (
	chainPEM = "-----BEGIN CERTIFICATE-----\nTUlJQw+/==\n-----END CERTIFICATE-----\n-----BEGIN CERTIFICATE-----\nTUlJRA==\n-----END CERTIFICATE-----\n"
	keyPEM   = "-----BEGIN PRIVATE KEY-----\nbm90IGEga2V5IGF0IGFsbCwganVzdCB3b3JkcyBpbiBiYXNlNjQgb2Ygc29tZSBs\nZW5ndGg=\n-----END PRIVATE KEY-----\n"
)

// devices are of every kind; the last ones have values that would be more than values where quoting fails.
var devices = map[string]templates.Device{
	"x509": {IDScope: "0ne1", GlobalEndpoint: "h.example", RegistrationID: "pump-1", Serial: "SN1", Attestation: "x509",
		CertificateChainFile: "device-chain.pem", CertificateChain: chainPEM, PrivateKeyFile: "device-key.pem", PrivateKey: keyPEM},
	"token": {IDScope: "0ne1", GlobalEndpoint: "h.example", RegistrationID: "pump-1", Serial: "SN1", Attestation: "x509",
		CertificateChainFile: "device-chain.pem", CertificateChain: chainPEM, KeyURI: "pkcs11:token=a%20b;object=c?module-path=/usr/lib/p.so&pin-source=file:/pin"},
	"symmetric": {IDScope: "0ne1", GlobalEndpoint: "h.example", RegistrationID: "pump-1", Serial: "SN1", Attestation: "symmetricKey", SymmetricKey: "a2V5+/=="},
	"tpm":       {IDScope: "0ne1", GlobalEndpoint: "h.example", RegistrationID: "pump-1", Serial: "SN1", Attestation: "tpm"},
	"hostile": {IDScope: "'\"; $(touch evil) `touch evil` \\", GlobalEndpoint: "a\nEVIL=1\n#", RegistrationID: "ä\u2028\t??/\\\n\"x", Serial: "*/ #error\n%s\x7f123",
		Attestation: "symmetricKey", SymmetricKey: "\"'\\x"},
	"hostile token": {IDScope: "", GlobalEndpoint: "${HOME}", RegistrationID: "</script>&", Serial: " ", Attestation: "x509",
		CertificateChainFile: "a b", CertificateChain: "\"\\\n\n??=", KeyURI: "pkcs11:'\"\n$X"},
}

func render(t testing.TB, name string, d templates.Device) []byte {
	t.Helper()
	f, err := templates.Parse(name, nil)
	if err != nil {
		t.Fatal(err)
	}
	out, err := f.Render(nil, d)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// tool runs a program in a directory that holds a file.
func tool(t *testing.T, pkg, file string, content []byte, name string, args ...string) []byte {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		hsmtest.Require(t, name+" (apt-get install "+pkg+")")
	}
	cmd := exec.Command(path, args...)
	cmd.Dir = t.TempDir()
	if err := os.WriteFile(filepath.Join(cmd.Dir, file), content, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, content)
	}
	entries, err := os.ReadDir(cmd.Dir)
	if err != nil || len(entries) > 2 { // the file, and what was compiled from it
		t.Errorf("the file had an effect: %v, %v\n%s", entries, err, content)
	}
	return out
}

func put(m map[string]string, name, value string) {
	if value != "" {
		m[name] = value
	}
}

// A shell, Python's reader of shell words and Node's own reader of such files find the values that went in, and nothing else.
func TestEnv(t *testing.T) {
	for kind, d := range devices {
		node := map[string]string{"PROVISIONING_HOST": d.GlobalEndpoint, "PROVISIONING_IDSCOPE": d.IDScope, "PROVISIONING_REGISTRATION_ID": d.RegistrationID}
		put(node, "CERTIFICATE_FILE", d.CertificateChainFile)
		put(node, "KEY_FILE", d.PrivateKeyFile)
		put(node, "KEY_URI", d.KeyURI)
		put(node, "PROVISIONING_SYMMETRIC_KEY", d.SymmetricKey)
		python := map[string]string{"PROVISIONING_HOST": d.GlobalEndpoint, "PROVISIONING_IDSCOPE": d.IDScope}
		if d.Attestation == "x509" {
			python["DPS_X509_REGISTRATION_ID"] = d.RegistrationID
		} else {
			python["PROVISIONING_REGISTRATION_ID"] = d.RegistrationID
		}
		put(python, "X509_CERT_FILE", d.CertificateChainFile)
		put(python, "X509_KEY_FILE", d.PrivateKeyFile)
		put(python, "X509_KEY_URI", d.KeyURI)
		put(python, "PROVISIONING_SYMMETRIC_KEY", d.SymmetricKey)
		for name, want := range map[string]map[string]string{"node.env": node, "python.env": python} {
			out := render(t, name, d)
			shell := tool(t, "dash", "file", out, "env", "-i", "sh", "-c", `set -a; . ./file; exec env -0`)
			got := make(map[string]string)
			for line := range strings.SplitSeq(strings.TrimSuffix(string(shell), "\x00"), "\x00") {
				if k, v, _ := strings.Cut(line, "="); k != "PWD" && k != "OLDPWD" && k != "_" && k != "SHLVL" {
					got[k] = v
				}
			}
			if !reflect.DeepEqual(got, want) {
				t.Errorf("%s, %s: sh reads %q\nwant %q\n%s", kind, name, got, want, out)
			}
			const shlex = `import json, shlex
lexer = shlex.shlex(open("file", encoding="utf-8", newline=""), posix=True)
lexer.whitespace_split = True
print(json.dumps(dict(word.split("=", 1) for word in lexer)))`
			got = nil
			if err := json.Unmarshal(tool(t, "python3", "file", out, "python3", "-c", shlex), &got); err != nil || !reflect.DeepEqual(got, want) {
				t.Errorf("%s, %s: shlex reads %q, %v\nwant %q\n%s", kind, name, got, err, want, out)
			}
		}
		if strings.Contains(kind, "hostile") {
			continue // Node has no way to write a quote inside quotes
		}
		const parseEnv = `console.log(JSON.stringify(require("util").parseEnv(require("fs").readFileSync("file", "utf8"))))`
		var got map[string]string
		if err := json.Unmarshal(tool(t, "nodejs", "file", render(t, "node.env", d), "node", "-e", parseEnv), &got); err != nil || !reflect.DeepEqual(got, node) {
			t.Errorf("%s: node reads %q, %v\nwant %q", kind, got, err, node)
		}
	}
}

func TestNodeJSON(t *testing.T) {
	for kind, d := range devices {
		want := map[string]string{"provisioningHost": d.GlobalEndpoint, "idScope": d.IDScope, "registrationId": d.RegistrationID, "attestation": d.Attestation}
		put(want, "certificateFile", d.CertificateChainFile)
		put(want, "keyFile", d.PrivateKeyFile)
		put(want, "keyUri", d.KeyURI)
		put(want, "symmetricKey", d.SymmetricKey)
		out := render(t, "node.json", d)
		var got map[string]string
		if err := json.Unmarshal(out, &got); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %q, %v\n%s", kind, got, err, out)
		}
		got = nil
		again := tool(t, "nodejs", "node.json", out, "node", "-e", `console.log(JSON.stringify(require("./node.json")))`)
		if err := json.Unmarshal(again, &got); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: node reads %q, %v", kind, got, err)
		}
	}
}

// A C compiler, strict, finds the values that went in.
func TestDeviceHeader(t *testing.T) {
	const program = `
#include <stdio.h>
#define SHOW(name) fwrite(#name "=" name, 1, sizeof #name "=" name, stdout)
int main(void)
{
	SHOW(TOUCHMARK_ID_SCOPE);
	SHOW(TOUCHMARK_GLOBAL_ENDPOINT);
	SHOW(TOUCHMARK_REGISTRATION_ID);
	SHOW(TOUCHMARK_SERIAL);
	SHOW(TOUCHMARK_ATTESTATION);
#ifdef TOUCHMARK_CERTIFICATE_CHAIN
	SHOW(TOUCHMARK_CERTIFICATE_CHAIN);
#endif
#ifdef TOUCHMARK_PRIVATE_KEY
	SHOW(TOUCHMARK_PRIVATE_KEY);
#endif
#ifdef TOUCHMARK_KEY_URI
	SHOW(TOUCHMARK_KEY_URI);
#endif
#ifdef TOUCHMARK_SYMMETRIC_KEY
	SHOW(TOUCHMARK_SYMMETRIC_KEY);
#endif
	return 0;
}
`
	// A chain as long as they are.
	long := devices["x509"]
	long.CertificateChain = strings.Repeat(chainPEM, 40)
	all := map[string]templates.Device{"long": long}
	for kind, d := range devices {
		all[kind] = d
	}
	for kind, d := range all {
		want := map[string]string{"ID_SCOPE": d.IDScope, "GLOBAL_ENDPOINT": d.GlobalEndpoint, "REGISTRATION_ID": d.RegistrationID, "SERIAL": d.Serial, "ATTESTATION": d.Attestation}
		put(want, "CERTIFICATE_CHAIN", d.CertificateChain)
		put(want, "PRIVATE_KEY", d.PrivateKey)
		put(want, "KEY_URI", d.KeyURI)
		put(want, "SYMMETRIC_KEY", d.SymmetricKey)
		out := append(render(t, "device.h", d), program...)
		// -std=c99 reads trigraphs, as gcc's own dialect does not.
		shown := tool(t, "gcc", "device.c", out, "sh", "-c", "gcc -std=c99 -Wall -Wextra -Werror -pedantic -Wno-overlength-strings -o device device.c && exec ./device")
		got := make(map[string]string)
		for line := range strings.SplitSeq(strings.TrimSuffix(string(shown), "\x00"), "\x00") {
			k, v, _ := strings.Cut(line, "=")
			got[strings.TrimPrefix(k, "TOUCHMARK_")] = v
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%s: the program prints %q\nwant %q", kind, got, want)
		}
	}
}

// zephyr reads the lines as Zephyr's shell does: words between spaces, commands by the grammar of subsys/settings' and
// tls_credentials' shells, and no line longer than the shell's buffer.
func zephyr(text []byte) (settings, credentials map[string]string, err error) {
	settings, credentials = make(map[string]string), make(map[string]string)
	write := regexp.MustCompile(`^settings write ([a-z_/]+) ((?:[0-9a-f]{2})+)$`)
	buf := regexp.MustCompile(`^cred buf ([A-Za-z0-9+/=]+)$`)
	add := regexp.MustCompile(`^cred add ([0-9]+ (?:SERV|PK)) DEFAULT bint$`)
	var buffer strings.Builder
	for line := range strings.Lines(string(text)) {
		if line = strings.TrimSuffix(line, "\n"); len(line) >= 512 || strings.HasPrefix(line, "cred") && len(line) >= 256 {
			return nil, nil, errors.New("a line longer than the buffer")
		}
		if m := write.FindStringSubmatch(line); m != nil {
			value, _ := hex.DecodeString(m[2]) // pairs of digits
			if settings[m[1]] != "" || value[len(value)-1] != 0 || bytes.IndexByte(value, 0) != len(value)-1 {
				return nil, nil, errors.New("a setting that is no C string, or there twice")
			}
			settings[m[1]] = string(value[:len(value)-1])
		} else if line == "cred buf clear" {
			buffer.Reset()
		} else if m := buf.FindStringSubmatch(line); m != nil {
			buffer.WriteString(m[1])
		} else if m := add.FindStringSubmatch(line); m != nil && credentials[m[1]] == "" {
			value, err := base64.StdEncoding.Strict().DecodeString(buffer.String())
			if err != nil {
				return nil, nil, err
			}
			credentials[m[1]] = string(value)
			buffer.Reset()
		} else {
			return nil, nil, errors.New("not a command: " + line)
		}
	}
	return settings, credentials, nil
}

func TestZephyr(t *testing.T) {
	for kind, d := range devices {
		want := map[string]string{"touchmark/id_scope": d.IDScope, "touchmark/global_endpoint": d.GlobalEndpoint, "touchmark/registration_id": d.RegistrationID, "touchmark/serial": d.Serial}
		put(want, "touchmark/key_uri", d.KeyURI)
		put(want, "touchmark/symmetric_key", d.SymmetricKey)
		wantCredentials := make(map[string]string)
		put(wantCredentials, "11 SERV", d.CertificateChain)
		put(wantCredentials, "11 PK", d.PrivateKey)
		out := render(t, "zephyr-settings.txt", d)
		settings, credentials, err := zephyr(out)
		if err != nil || !reflect.DeepEqual(settings, want) || !reflect.DeepEqual(credentials, wantCredentials) {
			t.Errorf("%s: %q, %q, %v\n%s", kind, settings, credentials, err, out)
		}
	}
}

// Whatever form a key is shown in, the file is known for it; and a file that only asks whether there is one is not.
func TestShowsSecret(t *testing.T) {
	for name, want := range map[string][2]bool{ // for a private key, and a symmetric one
		"iot-identity-service.toml": {false, true}, "node.env": {false, true}, "node.json": {false, true}, "python.env": {false, true},
		"device.h": {true, true}, "zephyr-settings.txt": {true, true},
	} {
		f, err := templates.Parse(name, nil)
		if err != nil {
			t.Fatal(err)
		}
		for i, kind := range []string{"x509", "symmetric"} {
			if shows, err := f.ShowsSecret(render(t, name, devices[kind]), devices[kind]); err != nil || shows != want[i] {
				t.Errorf("%s, %s: %v, %v", name, kind, shows, err)
			}
		}
		for _, kind := range []string{"token", "tpm"} {
			if shows, err := f.ShowsSecret(render(t, name, devices[kind]), devices[kind]); err != nil || shows {
				t.Errorf("%s, %s: %v, %v", name, kind, shows, err)
			}
		}
	}
}

// The values of every format stay values; see FuzzRender for TOML.
func FuzzFormats(f *testing.F) {
	files := make(map[string]*templates.File)
	for _, name := range []string{"node.env", "node.json", "device.h", "zephyr-settings.txt"} {
		file, err := templates.Parse(name, nil)
		if err != nil {
			f.Fatal(err)
		}
		files[name] = file
	}
	f.Add("pump-1", "a2V5")
	f.Add("'\"\\??/\n$(x)", "\x00\u2028'")
	f.Fuzz(func(t *testing.T, id, key string) {
		if !utf8.ValidString(id) || !utf8.ValidString(key) || key == "" {
			return
		}
		d := templates.Device{IDScope: "0ne1", GlobalEndpoint: "h", RegistrationID: id, Serial: "s", Attestation: "symmetricKey", SymmetricKey: key}
		out := make(map[string]string)
		for name, file := range files {
			b, err := file.Render(nil, d)
			if err != nil && !strings.ContainsRune(id+key, 0) {
				t.Fatalf("%s: %v", name, err)
			}
			out[name] = string(b)
		}
		var doc map[string]string
		if err := json.Unmarshal([]byte(out["node.json"]), &doc); err != nil || doc["registrationId"] != id || doc["symmetricKey"] != key || len(doc) != 5 {
			t.Fatalf("%q, %q: %v\n%s", id, key, err, out["node.json"])
		}
		if !strings.ContainsRune(id+key, 0) {
			settings, _, err := zephyr([]byte(out["zephyr-settings.txt"]))
			if len(id) < 100 && len(key) < 100 && (err != nil || settings["touchmark/registration_id"] != id || settings["touchmark/symmetric_key"] != key) {
				t.Fatalf("%q, %q: %v\n%s", id, key, err, out["zephyr-settings.txt"])
			}
			if left, err := unquoteEnv(out["node.env"], "PROVISIONING_REGISTRATION_ID="); err != nil || left != id {
				t.Fatalf("%q reads as %q, %v\n%s", id, left, err, out["node.env"])
			}
		}
		if strings.ContainsFunc(out["device.h"], func(r rune) bool { return r != '\n' && r != '\t' && (r < ' ' || r > '~') }) || strings.Contains(out["device.h"], "??") {
			t.Fatalf("%q, %q:\n%s", id, key, out["device.h"])
		}
	})
}

// unquoteEnv reads the value behind a name as a shell does that knows bare words and single quotes.
func unquoteEnv(text, name string) (string, error) {
	_, rest, ok := strings.Cut(text, "\n"+name)
	if !ok {
		return "", errors.New("no such name")
	}
	var value strings.Builder
	for {
		switch {
		case strings.HasPrefix(rest, "\n"):
			return value.String(), nil
		case strings.HasPrefix(rest, `\'`):
			value.WriteByte('\'')
			rest = rest[2:]
		case strings.HasPrefix(rest, "'"):
			quoted, after, closed := strings.Cut(rest[1:], "'")
			if !closed {
				return "", errors.New("a quote that does not end")
			}
			value.WriteString(quoted)
			rest = after
		case rest == "" || strings.ContainsAny(rest[:1], "\"$`\\ \t;&|<>()#*?[]~"):
			return "", errors.New("a character that means something")
		default:
			value.WriteByte(rest[0])
			rest = rest[1:]
		}
	}
}
