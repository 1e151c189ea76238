package main

import (
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/hsmtest"
	"github.com/touchmark/touchmark/hsm/sealing"
	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/stamp/nvs"
	"github.com/touchmark/touchmark/templates"
)

var (
	buildOnce sync.Once
	buildPath string
	buildErr  error
)

// program builds touchmark, once, as users have it: without the race detector and with PINs that take their time.
func program(t *testing.T) string {
	t.Helper()
	buildOnce.Do(func() {
		dir, err := os.MkdirTemp("", "touchmark-test")
		if err != nil {
			buildErr = err
			return
		}
		buildPath = filepath.Join(dir, "touchmark")
		out, err := exec.Command("go", "build", "-o", buildPath, ".").CombinedOutput()
		if err != nil {
			buildErr = fmt.Errorf("%w\n%s", err, out)
		}
	})
	if buildErr != nil {
		t.Fatal(buildErr)
	}
	return buildPath
}

// touchmark runs the program in a directory and returns its standard output.
func touchmark(t *testing.T, dir string, args ...string) string {
	t.Helper()
	cmd := exec.Command(program(t), args...)
	cmd.Dir = dir
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("touchmark %s: %v\n%s", strings.Join(args, " "), err, stderr.String())
	}
	return string(out)
}

const tokenProfile = `
registration-id = "{serial|lower}"
attestation = "x509"
enrollment = "group"
group = "token-devices"
[key]
in = "token"
`

// newTokenLine makes a line whose keys are in a fresh SoftHSM token.
func newTokenLine(t *testing.T) (dir string) {
	t.Helper()
	return newLine(t, hsmtest.SoftHSM(t, "line-3"))
}

func newLine(t *testing.T, uri hsm.URI) (dir string) {
	t.Helper()
	dir = t.TempDir()
	touchmark(t, dir, "init", "line", "--id-scope", "0ne00112233", "--key-uri", uri.String())
	encrypted := strings.Replace(templates.Profiles()["esp32-nvs"], `# encrypted = "random"`, `encrypted = "random"`, 1)
	for name, text := range map[string]string{"token": tokenProfile, "encrypted": encrypted} {
		if err := os.WriteFile(filepath.Join(dir, "line", "profiles", name+".toml"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// Invariants 1 to 3: mint is killed at fifty random instants of its work. Resumed, it ends with one registration ID and one
// key for each serial, a ledger that verifies, whole stamps, and no key in the token that no device has. A list that is done
// is followed by another, so that every kill hits work.
func TestMintSurvivesKill(t *testing.T) {
	if testing.Short() {
		hsmtest.Require(t, "a run without -short")
	}
	for _, x := range []struct {
		profile     string
		size, kills int
	}{{"x509-group", 1000, 50}, {"token", 250, 50}, {"encrypted", 300, 25}, {"symmetric-individual", 1000, 25}, {"symmetric-group", 1000, 25}} {
		t.Run(x.profile, func(t *testing.T) {
			dir := newTokenLine(t)
			importGroupKey(t, dir)
			mend := hsmtest.Mender(t)
			lists := 0
			args := []string{"mint", "--line", "line", "--profile", x.profile, "--out", "stamps", "--jobs", "1", "--json"}
			if x.profile == "symmetric-individual" {
				args = append(args, "--recipient", recipient(t, dir))
			}
			next := func() []string {
				lists++
				name := fmt.Sprintf("list-%d.csv", lists)
				if err := os.WriteFile(filepath.Join(dir, name), serialList(fmt.Sprintf("SN%d-", lists), x.size), 0o644); err != nil {
					t.Fatal(err)
				}
				return append(slices.Clip(args), "--serials", name, "--bundle", name+".tmb")
			}
			// The instants fall anywhere in the time that a run takes which nobody kills.
			start := time.Now()
			touchmark(t, dir, next()...)
			whole := time.Since(start)
			seed := uint64(time.Now().UnixNano())
			t.Logf("seed %d, %v for %d serials", seed, whole, x.size)
			random := rand.New(rand.NewPCG(seed, 0))
			for killed, run := 0, next(); killed < x.kills; {
				cmd := exec.Command(program(t), run...)
				cmd.Dir = dir
				var stderr bytes.Buffer
				cmd.Stderr = &stderr
				start := time.Now()
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				timer := time.AfterFunc(time.Duration(random.Int64N(int64(whole))), func() { _ = cmd.Process.Kill() })
				err := cmd.Wait()
				timer.Stop()
				var exit *exec.ExitError
				switch {
				case err == nil:
					whole = min(whole, time.Since(start))
					run = next()
				case errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL:
					killed++
					if mend() {
						t.Logf("kill %d hit SoftHSM's own login: its token file was put back", killed)
					}
				default:
					t.Fatalf("after kill %d: %v\n%s", killed, err, stderr.String())
				}
			}
			// The last list may be unfinished; the others are done and stay so.
			for n := range lists {
				name := fmt.Sprintf("list-%d.csv", n+1)
				var res mintResult
				if err := json.Unmarshal([]byte(touchmark(t, dir, append(slices.Clip(args), "--serials", name, "--bundle", name+".tmb")...)), &res); err != nil {
					t.Fatal(err)
				}
				if res.Devices != x.size || res.Before+res.Minted != x.size || res.Minted > 0 && n < lists-1 {
					t.Errorf("list %d of %d: %+v", n+1, lists, res)
				}
				touchmark(t, dir, "bundle", "verify", name+".tmb", "--trust", "line/station.pem")
			}
			t.Logf("%d kills over %d lists", x.kills, lists)
			touchmark(t, dir, "ledger", "verify", "--line", "line")
			serials := lists * x.size
			ids, keys := map[string]bool{}, map[string]bool{}
			for line := range strings.Lines(touchmark(t, dir, "ledger", "show", "--line", "line", "--json")) {
				var u struct{ RegistrationID, KeyHash, State string }
				if err := json.Unmarshal([]byte(line), &u); err != nil {
					t.Fatal(err)
				}
				if u.State != "exported" {
					t.Errorf("%s is %s", u.RegistrationID, u.State)
				}
				ids[u.RegistrationID], keys[u.KeyHash] = true, true
			}
			if len(ids) != serials || len(keys) != serials {
				t.Errorf("%d registration IDs, %d keys of %d serials", len(ids), len(keys), serials)
			}
			check := checkStamps
			if strings.HasPrefix(x.profile, "symmetric") {
				check = checkSymmetricStamps
			}
			if n := check(t, filepath.Join(dir, "stamps"), x.profile, keys); n != serials {
				t.Errorf("%d stamps of %d serials", n, serials)
			}
			inToken := strings.Count(touchmark(t, dir, "key", "list", "--line", "line", "--json"), `"name":"device:`)
			if x.profile == "token" && inToken != serials || x.profile != "token" && inToken != 0 {
				t.Errorf("%d device keys in the token", inToken)
			}
		})
	}
}

// recipient returns the line's.
func recipient(t *testing.T, dir string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, "line", "recipient.txt"))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

// importGroupKey brings a group's key into the line's token, sealed as a service seals it.
func importGroupKey(t *testing.T, dir string) {
	t.Helper()
	to, err := sealing.ParseRecipient(recipient(t, dir))
	if err != nil {
		t.Fatal(err)
	}
	var sealed bytes.Buffer
	w, err := age.Encrypt(&sealed, to)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(w, `{"group":"symmetric-devices","primaryKey":"%s"}`, base64.StdEncoding.EncodeToString(bytes.Repeat([]byte("g"), 64)))
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "group.sealed"), sealed.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	touchmark(t, dir, "key", "import", "--line", "line", "--name", "group-key", "--in", "group.sealed")
}

// checkSymmetricStamps holds each stamp's key against those of the ledger, and those of a group against the group's. It
// returns how many stamps there are.
func checkSymmetricStamps(t *testing.T, stamps, profile string, keys map[string]bool) int {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(stamps, "*", "provisioning.json"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range found {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		var doc struct {
			RegistrationID string
			SymmetricKey   []byte
		}
		if err := json.Unmarshal(b, &doc); err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256(append([]byte("touchmark symmetric key\x00"), doc.SymmetricKey...))
		if !keys[fmt.Sprintf("%x", sum)] || filepath.Base(filepath.Dir(path)) != doc.RegistrationID {
			t.Errorf("%s holds a key that the ledger does not know", path)
		}
		if want := attest.DeriveKey(bytes.Repeat([]byte("g"), 64), doc.RegistrationID); profile == "symmetric-group" && !bytes.Equal(want, doc.SymmetricKey) {
			t.Errorf("%s does not hold the derived key", path)
		}
	}
	return len(found)
}

// checkStamps holds each stamp against the keys of the ledger, and returns how many stamps there are.
func checkStamps(t *testing.T, stamps, profile string, keys map[string]bool) int {
	t.Helper()
	entries, err := os.ReadDir(stamps)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		dir := filepath.Join(stamps, e.Name())
		chain, err := os.ReadFile(filepath.Join(dir, "device-chain.pem"))
		if err != nil {
			t.Error(err)
			continue
		}
		var leaf *x509.Certificate
		if profile != "token" {
			key, err := os.ReadFile(filepath.Join(dir, "device-key.pem"))
			if err != nil {
				t.Fatal(err)
			}
			pair, err := tls.X509KeyPair(chain, key)
			if err != nil {
				t.Errorf("%s: %v", dir, err)
				continue
			}
			leaf = pair.Leaf
			if profile == "encrypted" {
				checkNVS(t, dir, chain, key)
			}
		} else if certs, err := readCertificates(filepath.Join(dir, "device-chain.pem")); err != nil {
			t.Error(err)
			continue
		} else {
			leaf = certs[0]
		}
		sum := sha256.Sum256(leaf.RawSubjectPublicKeyInfo)
		if leaf.Subject.CommonName != e.Name() || !keys[fmt.Sprintf("%x", sum)] {
			t.Errorf("%s holds the certificate of %s, whose key the ledger does not know", dir, leaf.Subject.CommonName)
		}
	}
	return len(entries)
}

// checkNVS holds a unit's image against the files beside it.
func checkNVS(t *testing.T, dir string, chain, key []byte) {
	t.Helper()
	image, err := os.ReadFile(filepath.Join(dir, "nvs.bin"))
	if err != nil {
		t.Fatal(err)
	}
	partition, err := os.ReadFile(filepath.Join(dir, "nvs.bin.keys"))
	if err != nil {
		t.Fatal(err)
	}
	keys, err := nvs.ParseKeys(partition)
	if err != nil {
		t.Fatalf("%s: %v", dir, err)
	}
	entries, err := nvs.Parse(image, keys)
	if err != nil || len(entries) != 5 || entries[3].Value != string(chain) || entries[4].Value != string(key) {
		t.Errorf("%s: the image has %v, %v", dir, entries, err)
	}
}

// smallDisk mounts a file system of that size.
func smallDisk(t *testing.T, size string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		hsmtest.Require(t, "the right to mount a small file system (root)")
	}
	small := filepath.Join(t.TempDir(), "small")
	if err := os.Mkdir(small, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", small, "tmpfs", 0, "size="+size); err != nil {
		hsmtest.Require(t, "the right to mount a small file system: "+err.Error())
	}
	t.Cleanup(func() { _ = syscall.Unmount(small, syscall.MNT_DETACH) })
	return small
}

// hogWhen takes all room of a small disk once there are twenty files of a pattern. The channel is closed when it is through.
func hogWhen(small, pattern string) <-chan struct{} {
	stop := make(chan struct{})
	go func() {
		defer close(stop)
		for {
			if staged, _ := filepath.Glob(pattern); len(staged) > 20 {
				break
			}
			time.Sleep(time.Millisecond)
		}
		hog, err := os.Create(filepath.Join(small, "hog"))
		if err != nil {
			return
		}
		defer hog.Close()
		for size := 64 << 10; size > 0; size /= 2 {
			for {
				if _, err := hog.Write(make([]byte, size)); err != nil {
					break
				}
			}
		}
	}()
	return stop
}

// attempt runs the program and returns its exit code and all that it printed.
func attempt(t *testing.T, dir string, args ...string) (int, string) {
	t.Helper()
	cmd := exec.Command(program(t), args...)
	cmd.Dir = dir
	text, _ := cmd.CombinedOutput()
	return cmd.ProcessState.ExitCode(), string(text)
}

// Invariant 4: a disk that fills up in the middle loses nothing, and with room the same command finishes.
func TestDiskFull(t *testing.T) {
	small := smallDisk(t, "3m")
	dir := newTokenLine(t)
	if err := os.WriteFile(filepath.Join(dir, "serials.csv"), serialList("SN", 400), 0o644); err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(small, "stamps")
	args := []string{"mint", "--line", "line", "--profile", "x509-group", "--serials", "serials.csv", "--out", out, "--bundle", "b.tmb"}
	mint := func() (int, string) { return attempt(t, dir, args...) }
	// 400 stamps do not fit: refused before anything is made.
	if code, text := mint(); code != 1 || !strings.Contains(text, "not enough free space") {
		t.Errorf("exit code %d\n%s", code, text)
	}
	// With room by the look of it, which somebody else then takes: stopped in the middle.
	remount := func(size string) {
		if err := syscall.Mount("tmpfs", small, "tmpfs", syscall.MS_REMOUNT, "size="+size); err != nil {
			t.Fatal(err)
		}
	}
	remount("12m")
	stop := hogWhen(small, filepath.Join(out, "*", "*"))
	code, text := mint()
	<-stop
	if code != exitPartial && code != exitFailed || !strings.Contains(text, "no space left") {
		t.Errorf("exit code %d\n%s", code, text)
	}
	touchmark(t, dir, "ledger", "verify", "--line", "line")
	if err := os.Remove(filepath.Join(small, "hog")); err != nil {
		t.Fatal(err)
	}
	if code, text := mint(); code != 0 {
		t.Fatalf("with room again: exit code %d\n%s", code, text)
	}
	touchmark(t, dir, "ledger", "verify", "--line", "line")
	if stamps, _ := filepath.Glob(filepath.Join(out, "sn*", "device-key.pem")); len(stamps) != 400 {
		t.Errorf("%d stamps", len(stamps))
	}
}

// The same where the ledger's disk is the one that fills up.
func TestLedgerDiskFull(t *testing.T) {
	small := smallDisk(t, "4m")
	uri := hsmtest.SoftHSM(t, "line-3")
	dir := t.TempDir()
	line := filepath.Join(small, "line")
	touchmark(t, dir, "init", line, "--id-scope", "0ne00112233", "--key-uri", uri.String())
	mint := func(list string, n int) (int, string) {
		if err := os.WriteFile(filepath.Join(dir, list), serialList("SN", n), 0o644); err != nil {
			t.Fatal(err)
		}
		return attempt(t, dir, "mint", "--line", line, "--profile", "x509-group", "--serials", list, "--out", "stamps", "--bundle", "b.tmb")
	}
	if code, text := mint("many.csv", 2000); code != 1 || !strings.Contains(text, "in the ledger") {
		t.Errorf("exit code %d\n%s", code, text)
	}
	stop := hogWhen(small, filepath.Join(dir, "stamps", "*", "*"))
	code, text := mint("some.csv", 1000)
	<-stop
	if code != exitPartial && code != exitFailed || !strings.Contains(text, "disk is full") {
		t.Errorf("exit code %d\n%s", code, text)
	}
	if err := os.Remove(filepath.Join(small, "hog")); err != nil {
		t.Fatal(err)
	}
	if code, text := mint("some.csv", 1000); code != 0 {
		t.Fatalf("with room again: exit code %d\n%s", code, text)
	}
	touchmark(t, dir, "ledger", "verify", "--line", line)
	if stamps, _ := filepath.Glob(filepath.Join(dir, "stamps", "sn*", "device-key.pem")); len(stamps) != 1000 {
		t.Errorf("%d stamps", len(stamps))
	}
}

// A token that has no room for another key stops work with a clear error; with room, the same command finishes, and the
// token holds one key for each device.
func TestTokenFull(t *testing.T) {
	small := smallDisk(t, "600k")
	dir := newLine(t, hsmtest.SoftHSMIn(t, small, "line-3"))
	if err := os.WriteFile(filepath.Join(dir, "serials.csv"), serialList("SN", 300), 0o644); err != nil {
		t.Fatal(err)
	}
	args := []string{"mint", "--line", "line", "--profile", "token", "--serials", "serials.csv", "--out", "stamps", "--bundle", "b.tmb"}
	code, text := attempt(t, dir, args...)
	if code != exitPartial || !strings.Contains(text, "it may be full") {
		t.Errorf("exit code %d\n%s", code, text)
	}
	touchmark(t, dir, "ledger", "verify", "--line", "line")
	if err := syscall.Mount("tmpfs", small, "tmpfs", syscall.MS_REMOUNT, "size=60m"); err != nil {
		t.Fatal(err)
	}
	if code, text := attempt(t, dir, args...); code != 0 {
		t.Fatalf("with room again: exit code %d\n%s", code, text)
	}
	touchmark(t, dir, "ledger", "verify", "--line", "line")
	if n := strings.Count(touchmark(t, dir, "key", "list", "--line", "line", "--json"), `"name":"device:`); n != 300 {
		t.Errorf("%d device keys in the token", n)
	}
}

// Invariant 1: two of everything at once. Of two mints on one line, one works and the other says who has the ledger; of two
// mints on two lines with one output directory, neither writes over the other's stamps.
func TestTwoAtOnce(t *testing.T) {
	uri := hsmtest.SoftHSM(t, "line-3")
	dir := newLine(t, uri)
	if err := os.WriteFile(filepath.Join(dir, "serials.csv"), serialList("SN", 2000), 0o644); err != nil {
		t.Fatal(err)
	}
	args := []string{"mint", "--line", "line", "--profile", "x509-group", "--serials", "serials.csv", "--out", "stamps", "--bundle", "b.tmb"}
	var codes [4]int
	var texts [4]string
	var wg sync.WaitGroup
	for i := range codes {
		wg.Go(func() { codes[i], texts[i] = attempt(t, dir, args...) })
	}
	wg.Wait()
	done := 0
	for i, code := range codes {
		switch {
		case code == 0:
			done++
		case code != exitFailed || !strings.Contains(texts[i], "in use by another process"):
			t.Errorf("exit code %d\n%s", code, texts[i])
		}
	}
	if done == 0 {
		t.Errorf("nobody got the ledger: %q", texts)
	}
	touchmark(t, dir, "ledger", "verify", "--line", "line")
	if n := strings.Count(touchmark(t, dir, "ledger", "show", "--line", "line", "--json"), `"state":"exported"`); n != 2000 {
		t.Errorf("%d units", n)
	}
	touchmark(t, dir, "init", "other", "--id-scope", "0ne00112233", "--key-uri", uri.String(), "--key-prefix", "other-")
	args[2] = "other"
	if code, text := attempt(t, dir, args...); code == 0 || !strings.Contains(text, "exists already") {
		t.Errorf("over another line's stamps: exit code %d\n%s", code, text)
	}
}
