package main

import (
	"archive/tar"
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/dps"
)

// A backup is made while devices register and operators write. What was acknowledged before it began is in it, and nothing is
// in it by half; the service that it is restored to is the same one.
func TestBackupUnderLoad(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	r, err := launch(t, dir, "svc", nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	scope := r.ready["idScope"].(string)
	groupKey := bytes.Repeat([]byte("g"), 64)
	text := base64.StdEncoding.EncodeToString(groupKey)
	group := map[string]any{"enrollmentGroupId": "line", "attestation": map[string]any{"type": "symmetricKey", "symmetricKey": map[string]any{"primaryKey": text, "secondaryKey": text}}}
	if err := r.service.callJSON(ctx, http.MethodPut, "/enrollmentGroups/line", group, nil); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(dir, "svc", trustDir), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "svc", trustDir, "station.pem"), []byte("a station's public key"), 0o644); err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var acknowledged []string
	enough, stop := make(chan struct{}), make(chan struct{})
	var eg errgroup.Group
	for w := range 4 {
		eg.Go(func() error {
			for i := 0; ; i++ {
				id := fmt.Sprintf("dev-%d-%05d", w, i)
				mac := hmac.New(sha256.New, groupKey)
				mac.Write([]byte(id))
				status, answer, err := r.device(http.MethodPut, id+"/register", attesttest.Token(mac.Sum(nil), scope, id, time.Now().Add(time.Hour)), map[string]string{"registrationId": id})
				if err != nil || status != http.StatusAccepted {
					return fmt.Errorf("%s: %d %v %w", id, status, answer, err)
				}
				mu.Lock()
				if acknowledged = append(acknowledged, id); len(acknowledged) == 200 {
					close(enough)
				}
				mu.Unlock()
				select {
				case <-stop:
					return nil
				default:
				}
			}
		})
	}
	<-enough
	var before []string
	for i := range 3 {
		mu.Lock()
		before = slices.Clone(acknowledged)
		mu.Unlock()
		if code, text := attempt(t, dir, "backup", "--data", "svc", "--out", fmt.Sprintf("b%d", i)); code != 0 || !strings.Contains(text, "key file") {
			t.Fatalf("backup: %d, %s", code, text)
		}
	}
	close(stop)
	if err := eg.Wait(); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(filepath.Join(dir, "b2")); err != nil || st.Mode() != 0o600 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
	b, err := os.ReadFile(filepath.Join(dir, "b2"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{dataKeyFile, caKeyFile, identityFile} {
		secret, err := os.ReadFile(filepath.Join(dir, "svc", name))
		if err != nil || bytes.Contains(b, bytes.TrimSpace(secret)) {
			t.Errorf("%s is in the backup, or %v", name, err)
		}
	}

	if code, text := attempt(t, dir, "restore", "b2", "--data", "restored"); code != 0 {
		t.Fatalf("restore: %d, %s", code, text)
	}
	if code, text := attempt(t, dir, "restore", "b2", "--data", "restored"); code != exitUsage || !strings.Contains(text, "not empty") {
		t.Errorf("restored again: %d, %s", code, text)
	}
	if code, text := attempt(t, dir, "serve", "--data", "restored", "--https", "127.0.0.1:0"); code == 0 || !strings.Contains(text, "wrapped under another key") {
		t.Errorf("without the key: %d, %s", code, text)
	}
	key, err := os.ReadFile(filepath.Join(dir, "svc", dataKeyFile))
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "restored", dataKeyFile), key, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	again, err := launch(t, dir, "restored", nil)
	if err != nil {
		t.Fatal(err)
	}
	if again.ready["idScope"] != scope || again.ready["recipient"] != r.ready["recipient"] {
		t.Errorf("another service: %v", again.ready)
	}
	for _, name := range []string{caFile, caKeyFile, identityFile, filepath.Join(trustDir, "station.pem")} {
		was, e1 := os.ReadFile(filepath.Join(dir, "svc", name))
		is, e2 := os.ReadFile(filepath.Join(dir, "restored", name))
		if !bytes.Equal(was, is) || errors.Join(e1, e2) != nil {
			t.Errorf("%s is another one, %v", name, errors.Join(e1, e2))
		}
	}
	for _, id := range before {
		if err := again.service.call(ctx, http.MethodGet, "/registrations/"+id, nil, nil, nil, nil); err != nil {
			t.Errorf("%s was acknowledged before the backup: %v", id, err)
		}
	}
	var all []dps.RegistrationState
	header := http.Header{"X-Ms-Max-Item-Count": {"1000"}}
	if err := again.service.call(ctx, http.MethodPost, "/registrations/line/query", nil, header, nil, &all); err != nil {
		t.Fatal(err)
	}
	if len(all) < min(1000, len(before)) {
		t.Errorf("%d registrations in the group, %d were acknowledged", len(all), len(before))
	}
	for _, st := range all {
		if st.Status != dps.Assigned || st.AssignedHub == "" || st.DeviceID != st.RegistrationID {
			t.Errorf("half of a registration: %+v", st)
		}
	}
}

// The built-in hub goes into a backup with its service, which is at work meanwhile: its devices have their keys and twins again, and its
// operators their connection string. What is secret is in the file by no name.
func TestBackupHub(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	args := []string{"--https", "127.0.0.1:0", "--mqtt", "off", "--amqp", "off", "--hub", "builtin"}
	var keys, devices []string
	for round := range 2 {
		cmd, ready, _ := startServe(t, dir, args...)
		connection, e1 := os.ReadFile(fmt.Sprint(ready["hubConnectionStringFile"]))
		ca, e2 := os.ReadFile(filepath.Join(dir, "svc", caFile))
		if err := errors.Join(e1, e2); err != nil {
			t.Fatal(err)
		}
		call := func(method, path, body string) map[string]any {
			status, doc := hubCall(t, string(connection), string(ca), method, path, body)
			if status != 200 {
				t.Fatalf("%s: %d %v", path, status, doc)
			}
			return doc
		}
		if round == 0 {
			call("PUT", "/devices/kept", `{"deviceId":"kept"}`)
			call("PATCH", "/twins/kept", `{"tags":{"site":"A7"}}`)
		}
		_, key, _ := strings.Cut(strings.TrimSpace(string(connection)), "SharedAccessKey=")
		device := call("GET", "/devices/kept", "")["authentication"].(map[string]any)["symmetricKey"].(map[string]any)
		keys, devices = append(keys, key), append(devices, fmt.Sprint(device, call("GET", "/twins/kept", "")["tags"]))
		if round == 1 {
			break
		}
		if code, text := attempt(t, dir, "backup", "--data", "svc", "--out", "b"); code != 0 || !strings.Contains(text, "the built-in hub") {
			t.Fatalf("backup: %d, %s", code, text)
		}
		b, err := os.ReadFile(filepath.Join(dir, "b"))
		if err != nil {
			t.Fatal(err)
		}
		secret, err := os.ReadFile(filepath.Join(dir, "svc", hubKeyFile))
		if err != nil || bytes.Contains(b, bytes.TrimSpace(secret)) || bytes.Contains(b, []byte(key)) || bytes.Contains(b, []byte(fmt.Sprint(device["primaryKey"]))) {
			t.Errorf("a key is in the backup, or %v", err)
		}
		stopServe(t, cmd)
		if err := os.Rename(filepath.Join(dir, "svc"), filepath.Join(dir, "lost")); err != nil {
			t.Fatal(err)
		}
		if code, text := attempt(t, dir, "restore", "b", "--data", "svc"); code != 0 {
			t.Fatalf("restore: %d, %s", code, text)
		}
		if st, err := os.Stat(filepath.Join(dir, "svc", hubFile)); err != nil || st.Mode() != 0o600 {
			t.Errorf("%v, %v", st, err)
		}
		dataKey, err := os.ReadFile(filepath.Join(dir, "lost", dataKeyFile))
		if err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(dir, "svc", dataKeyFile), string(dataKey))
	}
	if keys[0] != keys[1] || devices[0] != devices[1] {
		t.Errorf("connection strings alike: %t; devices %s", keys[0] == keys[1], devices)
	}
}

// A backup that anything has happened to is refused, whatever it was, and nothing is left of it.
func TestDamagedBackup(t *testing.T) {
	dir := t.TempDir()
	if r, err := launch(t, dir, "svc", nil); err != nil {
		t.Fatal(err)
	} else {
		stopServe(t, r.cmd)
	}
	if code, text := attempt(t, dir, "backup", "--data", "svc", "--out", "b"); code != 0 {
		t.Fatal(text)
	}
	if code, text := attempt(t, dir, "backup", "--data", "svc", "--out", "b"); code == 0 || !strings.Contains(text, "exists already") {
		t.Errorf("over another: %d, %s", code, text)
	}
	whole, err := os.ReadFile(filepath.Join(dir, "b"))
	if err != nil {
		t.Fatal(err)
	}
	flip := func(at int) []byte {
		b := slices.Clone(whole)
		b[at] ^= 1
		return b
	}
	extra := func(name string) []byte {
		var b bytes.Buffer
		b.Write(whole[:len(whole)-1024]) // without the end
		w := tar.NewWriter(&b)
		if err := errors.Join(w.WriteHeader(&tar.Header{Name: name, Mode: 0o600}), w.Close()); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	for what, b := range map[string][]byte{
		"empty": nil, "cut in the head": whole[:300], "cut in the store": whole[:len(whole)/2], "a flipped bit in the manifest": flip(600),
		"a flipped bit in the store": flip(len(whole) / 2), "one more file": extra("data.key"), "one above": extra("../x.pem"),
	} {
		if err := os.WriteFile(filepath.Join(dir, "bad"), b, 0o600); err != nil {
			t.Fatal(err)
		}
		if code, text := attempt(t, dir, "restore", "bad", "--data", "restored"); code != exitUnverified {
			t.Errorf("%s: %d, %s", what, code, text)
		}
		if left, _ := filepath.Glob(filepath.Join(dir, ".restore-*")); exists(filepath.Join(dir, "restored")) || len(left) > 0 {
			t.Errorf("%s: something was left", what)
		}
	}
}

func FuzzUnpack(f *testing.F) {
	pack := func(files ...backedFile) []byte {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		head, _ := json.Marshal(&manifest{Format: backupFormat, Files: files})
		_ = w.WriteHeader(&tar.Header{Name: manifestName, Size: int64(len(head))})
		_, _ = w.Write(head)
		for _, x := range files {
			_ = w.WriteHeader(&tar.Header{Name: x.Name, Size: 1})
			_, _ = w.Write([]byte("x"))
		}
		_ = w.Close()
		return b.Bytes()
	}
	const x = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
	store := backedFile{storeFile, 1, x}
	f.Add(pack(store))
	f.Add(pack(store, backedFile{"trust/a.pem", 1, x}, backedFile{"scopes/0ne1/trust/b.pem", 1, x}))
	f.Add(pack(store, backedFile{hubFile, 1, x}, backedFile{"trust/a.pem", 1, x}))
	f.Add(pack(store, backedFile{"trust/a.pem", 1, x}, backedFile{hubFile, 1, x}))
	f.Add(pack(store, backedFile{"../a.pem", 1, x}))
	f.Add(pack(store, backedFile{"trust/../../a.pem", 1, x}))
	f.Add(pack(store, backedFile{"/etc/a.pem", 1, x}, store))
	f.Fuzz(func(t *testing.T, b []byte) {
		dir := t.TempDir()
		inside := filepath.Join(dir, "inside")
		if err := os.Mkdir(inside, 0o700); err != nil {
			t.Fatal(err)
		}
		m, err := unpack(bytes.NewReader(b), inside)
		if (m == nil) == (err == nil) {
			t.Fatalf("%v and %v", m, err)
		}
		entries, _ := os.ReadDir(dir)
		if len(entries) != 1 {
			t.Errorf("it left the directory: %v", entries)
		}
		if err == nil && (m.Files[0].Name != storeFile || !exists(filepath.Join(inside, storeFile))) {
			t.Errorf("%+v without a store", m)
		}
	})
}
