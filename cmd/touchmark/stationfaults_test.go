package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/hsmtest"
	"github.com/touchmark/touchmark/hsm/pkcs11"
	"github.com/touchmark/touchmark/pkg/ledger"
	"github.com/touchmark/touchmark/pkg/station"
)

// A rig is a line with a station of two heads, a fixture of shell scripts, directories for devices, and a record of what the
// station said. The scripts break things when a file in faults asks for it, each once.
type rig struct {
	t       *testing.T
	dir     string
	profile string
	uri     hsm.URI // of the line's token
	office  string  // of the owner's
	mend    func() bool
	made    int             // serials that were asked for
	passed  map[string]bool // serials that the station said PASS of
	retired map[string]bool // serials that were scrapped
	revoked int             // identities that were scrapped or reworked
	staged  string          // where the station stages stamps, once that was seen
}

const rigStation = `profile = "%s"
heads = 2
tries = 100
disk-free = 1
warn-left = 1

[probe]
command = ["bin/probe"]
timeout = "20s"
expect = { product = "{product}" }

[[flash]]
command = ["bin/flash", "{dir}", "device/{registration-id}"]
timeout = "20s"

[[readback]]
command = ["bin/readback", "device/{registration-id}/device-chain.pem"]
compare = "device-chain.pem"
timeout = "20s"
`

const rigChallenge = `
[challenge]
command = ["bin/sign", "device/{registration-id}"]
timeout = "20s"
`

const rigLabel = `
[label]
template = "unit-50x25"
printer = "command:bin/print {name}"
`

// rigScripts are the fixture. A step that is hit before its work has not done it; the device may be written in part.
var rigScripts = map[string]string{
	"probe":    "hit probe.before\necho product=pump\nhit probe.after\n",
	"flash":    "hit flash.before\nmkdir -p \"$2\"\nfor f in \"$1\"/*; do cp \"$f\" \"$2/.new\" && mv \"$2/.new\" \"$2/${f##*/}\" || exit 1; hit flash.half; done\nhit flash.after\n",
	"readback": "hit readback.before\ncat \"$1\" || exit 1\nhit readback.after\n",
	"sign":     "hit sign.before\nopenssl dgst -sha256 -sign \"$1/device-key.pem\" | base64 -w0\nhit sign.after\n",
	"print":    "hit print.before\ncat > labels/$1\necho >> labels/$1.times\nhit print.after\n",
}

// rigHit is what a step does when it is to break something: kill the station, fill the disk, hang, fail, or whatever stands in the
// file.
const rigHit = `#!/bin/sh
first=$1 second=$2
hit() { if mv "faults/$1" "faults/.$1.$$" 2>/dev/null; then . "./faults/.$1.$$"; fi; }
`

// newRig makes a line with keys in a token of its own, an order, and a fixture.
func newRig(t *testing.T, profile string, initArgs ...string) *rig {
	t.Helper()
	return newRigIn(t, t.TempDir(), profile, initArgs...)
}

func newRigIn(t *testing.T, dir, profile string, initArgs ...string) *rig {
	t.Helper()
	uri := hsmtest.SoftHSM(t, "line-3", "office")
	r := &rig{t: t, dir: dir, profile: profile, mend: hsmtest.Mender(t), passed: map[string]bool{}, retired: map[string]bool{}}
	office := uri
	office.Token = "office"
	r.uri, r.office = uri, office.String()
	touchmark(t, r.dir, "key", "new", "--store", office.String(), "--name", "owner", "--algorithm", "EC-P256")
	touchmark(t, r.dir, "key", "export-public", "--store", office.String(), "--name", "owner", "--out", "owner.pem")
	touchmark(t, r.dir, append([]string{"init", "line", "--id-scope", "0ne00112233", "--key-uri", uri.String(), "--owner", "owner.pem"}, initArgs...)...)
	r.write("line/profiles/token.toml", tokenProfile)
	config := fmt.Sprintf(rigStation, profile)
	if profile == "x509-group" {
		config += rigChallenge // in the token's case the device has no key here
	}
	r.write("line/station.toml", config+rigLabel)
	for name, body := range rigScripts {
		r.write("bin/"+name, rigHit+body)
		if err := os.Chmod(r.path("bin/"+name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, d := range []string{"faults", "device", "labels"} {
		if err := os.Mkdir(r.path(d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	r.order("PO-1", 100000, "--serial-pattern", "SN######")
	touchmark(t, r.dir, "order", "take", "PO-1.order", "--line", "line")
	return r
}

// order signs an order for the line, with more flags of order new than it needs.
func (r *rig) order(id string, quantity int, flags ...string) {
	r.t.Helper()
	args := []string{"order", "new", id, "--product", "pump", "--quantity", strconv.Itoa(quantity), "--profile", "line/profiles/" + r.profile + ".toml",
		"--id-scope", "0ne00112233", "--issuer", "line/issuing.pem", "--holder", "line/station.pem", "--until", "2099-12-31", "--out", id + ".toml"}
	touchmark(r.t, r.dir, append(args, flags...)...)
	r.sign(id+".toml", id+".order")
}

func (r *rig) sign(draft, out string) {
	r.t.Helper()
	touchmark(r.t, r.dir, "order", "sign", draft, "--store", r.office, "--key", "owner", "--out", out)
}

func (r *rig) path(name string) string { return filepath.Join(r.dir, name) }

func (r *rig) write(name, text string) {
	r.t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(r.path(name)), 0o755), os.WriteFile(r.path(name), []byte(text), 0o644)); err != nil {
		r.t.Fatal(err)
	}
}

// next returns serials that were never asked for.
func (r *rig) next(n int) []string {
	var serials []string
	for range n {
		serials = append(serials, fmt.Sprintf("SN%06d", r.made))
		r.made++
	}
	return serials
}

// A shift is what one run of the station came to.
type shift struct {
	killed   bool
	code     int
	verdicts map[string]*station.Verdict
	stderr   string
	took     time.Duration
}

// patience is how long a run of the station may take before it counts as hanging.
const rigPatience = 90 * time.Second

// run starts the station, perhaps under another program, has it make the serials, and waits for its end. With after it is killed
// then, wherever it is.
func (r *rig) run(serials []string, after time.Duration, under ...string) *shift {
	r.t.Helper()
	if r.mend() {
		r.t.Log("a kill hit SoftHSM's own login: its token file was put back")
	}
	var in bytes.Buffer
	for _, s := range serials {
		fmt.Fprintf(&in, "{\"op\":\"make\",\"serial\":%q}\n", s)
	}
	fmt.Fprintln(&in, `{"op":"end"}`)
	return r.talk(&in, after, append(under, r.station("line", "PO-1")...)...)
}

// station is the command that starts the station of a line for a machine.
func (r *rig) station(line, order string) []string {
	return []string{program(r.t), "station", "--line", line, "--order", order, "--json", "--operator", "mai"}
}

func (r *rig) talk(in *bytes.Buffer, after time.Duration, args ...string) *shift {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), rigPatience)
	defer cancel()
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Dir, cmd.Stdin = r.dir, in
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		r.t.Fatal(err)
	}
	begin := time.Now()
	if err := cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	if after > 0 {
		defer time.AfterFunc(after, func() { _ = cmd.Process.Kill() }).Stop()
	}
	s := &shift{verdicts: map[string]*station.Verdict{}}
	for lines := bufio.NewScanner(out); lines.Scan(); {
		var a station.Answer
		if err := json.Unmarshal(lines.Bytes(), &a); err != nil {
			break // cut off
		}
		if a.Verdict != nil {
			s.verdicts[a.Verdict.Serial] = a.Verdict
			if a.Verdict.Pass {
				r.passed[a.Verdict.Serial] = true
			}
		}
	}
	err = cmd.Wait()
	s.took, s.stderr, s.code = time.Since(begin), stderr.String(), cmd.ProcessState.ExitCode()
	if ctx.Err() != nil {
		r.t.Fatalf("the station hangs: %v\n%s", args, stderr.String())
	}
	var exit *exec.ExitError
	s.killed = errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL
	return s
}

// finish makes every serial pass that has not, and checks that nothing is in its way.
func (r *rig) finish(serials []string) {
	r.t.Helper()
	s := r.run(serials, 0)
	if s.code != 0 || s.killed {
		r.t.Fatalf("exit code %d\n%s", s.code, s.stderr)
	}
	for _, serial := range serials {
		v := s.verdicts[serial]
		if v == nil || !v.Pass && v.Code != station.CodeMade {
			r.t.Errorf("%s: %+v", serial, v)
		}
	}
}

// A made unit, as the ledger shows it.
type madeUnit struct{ Serial, RegistrationID, KeyHash, State string }

func (r *rig) units() []madeUnit {
	r.t.Helper()
	var all []madeUnit
	for line := range strings.Lines(touchmark(r.t, r.dir, "ledger", "show", "--line", "line", "--json")) {
		var u madeUnit
		if err := json.Unmarshal([]byte(line), &u); err != nil {
			r.t.Fatal(err)
		}
		all = append(all, u)
	}
	return all
}

// balance holds everything against everything once every serial was finished: the ledger, what the station said, the devices, the
// station's disk, the token, the order, the labels, and the bundle.
func (r *rig) balance() {
	r.t.Helper()
	t := r.t
	touchmark(t, r.dir, "ledger", "verify", "--line", "line")
	units, keys := r.units(), map[string]string{}
	living := map[string]madeUnit{}
	for _, u := range units {
		if old, twice := living[u.Serial]; twice {
			t.Errorf("%s has two identities: %+v, %+v", u.Serial, old, u)
		}
		if other := keys[u.KeyHash]; other != "" {
			t.Errorf("%s and %s have one key", other, u.Serial)
		}
		if u.State != "sealed" && u.State != "exported" {
			t.Errorf("%s is %s", u.Serial, u.State)
		}
		living[u.Serial], keys[u.KeyHash] = u, u.Serial
		r.checkDevice(u)
	}
	for serial := range r.passed {
		if _, ok := living[serial]; !ok && !r.retired[serial] {
			t.Errorf("%s passed, and is not in the ledger", serial)
		}
	}
	if len(living) != r.made-len(r.retired) {
		t.Errorf("%d units of %d serials", len(living), r.made)
	}
	r.noStrays(living)
	r.checkOrder(len(living) + len(r.retired))
	if r.profile == "token" {
		listed := map[string]bool{}
		for line := range strings.Lines(touchmark(t, r.dir, "key", "list", "--line", "line", "--json")) {
			var k struct{ Name string }
			if err := json.Unmarshal([]byte(line), &k); err != nil {
				t.Fatal(err)
			}
			if kind, id, ok := strings.Cut(k.Name, ":"); ok && strings.HasPrefix(kind, "device") {
				if listed[id] {
					t.Errorf("%s has two keys in the token", id)
				}
				listed[id] = true
			}
		}
		for _, u := range living {
			if !listed[u.RegistrationID] {
				t.Errorf("%s has no key in the token", u.Serial)
			}
		}
		if len(listed) != len(living) {
			t.Errorf("%d keys in the token of %d units", len(listed), len(living))
		}
	}
	if r.revoked > 0 {
		b, err := os.ReadFile(r.path("line/crl.pem"))
		if err != nil {
			t.Fatal(err)
		}
		block, _ := pem.Decode(b)
		if crl, err := x509.ParseRevocationList(block.Bytes); err != nil || len(crl.RevokedCertificateEntries) != r.revoked {
			t.Errorf("%d certificates are revoked, and %d should be: %v", len(crl.RevokedCertificateEntries), r.revoked, err)
		}
	}
	r.checkBundle(living)
}

// checkDevice holds what is in a device against the ledger.
func (r *rig) checkDevice(u madeUnit) {
	r.t.Helper()
	dir := r.path("device/" + u.RegistrationID)
	chain, err := os.ReadFile(filepath.Join(dir, "device-chain.pem"))
	if err != nil {
		r.t.Errorf("%s is %s: %v", u.Serial, u.State, err)
		return
	}
	var leaf *x509.Certificate
	if r.profile == "x509-group" {
		key, _ := os.ReadFile(filepath.Join(dir, "device-key.pem"))
		pair, err := tls.X509KeyPair(chain, key)
		if err != nil {
			r.t.Errorf("the device of %s: %v", u.Serial, err)
			return
		}
		leaf = pair.Leaf
	} else if certs, err := readCertificates(filepath.Join(dir, "device-chain.pem")); err != nil {
		r.t.Error(err)
		return
	} else {
		leaf = certs[0]
	}
	if sum := sha256.Sum256(leaf.RawSubjectPublicKeyInfo); fmt.Sprintf("%x", sum) != u.KeyHash || leaf.Subject.CommonName != u.RegistrationID {
		r.t.Errorf("the device of %s holds the certificate of %s, with another key than the ledger's", u.Serial, leaf.Subject.CommonName)
	}
	if _, err := os.Stat(r.path("labels/" + u.Serial + ".zpl")); err != nil {
		r.t.Errorf("%s has no label: %v", u.Serial, err)
	}
}

// noStrays looks for keys and stamps that no device has a use for. All units have passed, so there are none at the station.
func (r *rig) noStrays(living map[string]madeUnit) {
	r.t.Helper()
	err := filepath.WalkDir(r.path("line/units"), func(path string, d fs.DirEntry, err error) error {
		if err == nil && path != r.path("line/units") {
			r.t.Errorf("left at the station: %s", path)
		}
		return err
	})
	if err != nil {
		r.t.Error(err)
	}
	devices, err := os.ReadDir(r.path("device"))
	if err != nil || len(devices) != len(living)+len(r.retired) {
		r.t.Errorf("%d devices of %d units: %v", len(devices), len(living), err)
	}
}

func (r *rig) checkOrder(spent int) {
	r.t.Helper()
	var g struct{ Quantity, Spent, Leased int }
	if err := json.Unmarshal([]byte(touchmark(r.t, r.dir, "order", "list", "--line", "line", "--json")), &g); err != nil || g.Spent != spent || g.Leased != 0 {
		r.t.Errorf("the order says %+v, %d were made: %v", g, spent, err)
	}
}

// checkBundle exports what was made, and holds the bundle against it.
func (r *rig) checkBundle(living map[string]madeUnit) {
	r.t.Helper()
	_ = os.Remove(r.path("all.tmb"))
	touchmark(r.t, r.dir, "bundle", "export", "--line", "line", "--profile", r.profile, "--order", "PO-1", "--all", "--out", "all.tmb")
	touchmark(r.t, r.dir, "bundle", "verify", "all.tmb", "--trust", "line/station.pem")
	seen := map[string]bool{}
	for line := range strings.Lines(touchmark(r.t, r.dir, "bundle", "entries", "all.tmb", "--trust", "line/station.pem")) {
		var e struct {
			Serial string
			Device *struct{ KeyHash string }
		}
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			r.t.Fatal(err)
		}
		if e.Device == nil {
			continue
		}
		if seen[e.Serial] || living[e.Serial].KeyHash != e.Device.KeyHash {
			r.t.Errorf("the bundle has %s twice, or with another key", e.Serial)
		}
		seen[e.Serial] = true
	}
	if len(seen) != len(living) {
		r.t.Errorf("%d of %d units are in the bundle", len(seen), len(living))
	}
}

// faultCount is how many faults are injected in all: a few in every run, a thousand and more for
// TOUCHMARK_FAULTS=1000 go test -run 'TestStationSurvives' -timeout 60m ./cmd/touchmark.
func faultCount(t *testing.T) int {
	t.Helper()
	text := os.Getenv("TOUCHMARK_FAULTS")
	if text == "" {
		return 60
	}
	n, err := strconv.Atoi(text)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// strace is what injects into the station's calls on its own files, those of the ledger and of the stamps. The fixture's programs go
// untouched.
func (r *rig) strace(exprs ...string) []string {
	words := []string{"strace", "-f", "-qq", "-o", "/dev/null"}
	if found, _ := filepath.Glob(r.path("line/units/.staged~*")); len(found) > 0 {
		r.staged = found[0]
	}
	for _, path := range []string{r.staged, r.path("line/units"), r.path("line/ledger.db"), r.path("line/ledger.db-wal")} {
		if path != "" {
			words = append(words, "-P", path)
		}
	}
	for _, e := range exprs {
		words = append(words, "-e", e)
	}
	return words
}

// end scraps or reworks a unit that passed, under a program that may kill the station, until it is done. It returns how often that did.
func (r *rig) end(serial string, scrap bool, under func() []string) (kills int) {
	r.t.Helper()
	request := fmt.Sprintf(`{"op":"rework","serial":%q,"reason":"board"}`, serial)
	if scrap {
		request = fmt.Sprintf(`{"op":"scrap","serial":%q,"reason":"damaged"}`, serial)
		r.retired[serial] = true
	}
	delete(r.passed, serial)
	r.revoked++
	for s := (&shift{killed: true}); s.killed; {
		_ = r.mend()
		if s = r.talk(bytes.NewBufferString(request+"\n"), 0, append(under(), r.station("line", "PO-1")...)...); s.killed {
			kills++
		} else if s.code != 0 {
			r.t.Fatalf("%s: exit code %d\n%s", request, s.code, s.stderr)
		}
	}
	return kills
}

func needStrace(t *testing.T) {
	t.Helper()
	if exec.Command("strace", "-qq", "-o", "/dev/null", "true").Run() != nil {
		hsmtest.Require(t, "strace, and the right to trace (apt-get install strace)")
	}
}

// The station is killed at the boundary of every step that the fixture sees, before and after its work, with the device half
// written, at system calls which write, flush or rename something, and at random instants. Each time it is started again, the
// serials are scanned again, and in the end everything agrees with everything.
func TestStationSurvivesKill(t *testing.T) {
	if testing.Short() {
		hsmtest.Require(t, "a run without -short")
	}
	needStrace(t)
	all := faultCount(t)
	for _, profile := range []string{"x509-group", "token"} {
		t.Run(profile, func(t *testing.T) {
			r := newRig(t, profile)
			faults := map[string]int{}
			seed := uint64(time.Now().UnixNano())
			random := rand.New(rand.NewPCG(seed, 0))
			t.Logf("seed %d", seed)
			// Some serials come again after each kill, until they have passed; new ones join them.
			var open []string
			step := func(kind string, after time.Duration, under ...string) *shift {
				open = append(open, r.next(max(2, 4-len(open)))...)
				s := r.run(open, after, under...)
				if s.killed {
					faults[kind]++
				} else if s.code != 0 {
					t.Fatalf("%s: exit code %d\n%s", kind, s.code, s.stderr)
				}
				for serial, v := range s.verdicts {
					if !v.Pass && v.Code != station.CodeMade {
						t.Fatalf("after %v: %s: %+v", faults, serial, v)
					}
				}
				open = slices.DeleteFunc(open, func(serial string) bool { return s.verdicts[serial] != nil })
				return s
			}
			whole := step("none", 0).took
			hits := []string{"probe.before", "probe.after", "flash.before", "flash.half", "flash.after", "readback.before", "readback.after", "print.before", "print.after"}
			if profile == "x509-group" {
				hits = append(hits, "sign.before", "sign.after")
			}
			calls := []struct {
				names string
				most  int
			}{{"pwrite64", 40}, {"fsync,fdatasync", 8}, {"syncfs", 3}, {"renameat2,renameat,rename", 3}, {"mkdirat,mkdir", 2}, {"unlinkat,unlink", 3}}
			for n := 0; total(faults) < all/2; n++ {
				switch call := calls[n/4%len(calls)]; n % 4 {
				case 0:
					hit := hits[n/4%len(hits)]
					r.write("faults/"+hit, "kill -9 $PPID; exit 1\n")
					if s := step(hit, 0); !s.killed {
						t.Errorf("%s did not kill", hit)
					}
				case 1:
					// strace counts the calls of each thread by itself.
					step(call.names, 0, r.strace("trace="+call.names, fmt.Sprintf("inject=%s:signal=KILL:when=%d", call.names, 1+random.IntN(call.most)))...)
				case 2:
					if s := step("instant", time.Duration(random.Int64N(int64(whole)))); !s.killed {
						whole = (whole + s.took) / 2
					}
				default:
					for _, serial := range slices.Sorted(maps.Keys(r.passed))[:1] {
						faults["ending"] += r.end(serial, n/4%2 == 0, func() []string {
							return []string{"strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=" + call.names, "-e", fmt.Sprintf("inject=%s:signal=KILL:when=%d", call.names, 1+random.IntN(2*call.most))}
						})
						if !r.retired[serial] {
							open = append(open, serial)
						}
					}
				}
			}
			r.finish(open)
			r.balance()
			t.Logf("%d kills over %d units: %v", total(faults), r.made, faults)
		})
	}
}

func total(faults map[string]int) (n int) {
	for _, v := range faults {
		n += v
	}
	return n
}

// A disk that fills up after any step, with little or nothing left, and any write that fails for want of room, costs a verdict that
// says so, and nothing else. With room the unit goes on.
func TestStationDiskFull(t *testing.T) {
	needStrace(t)
	r := newRigIn(t, smallDisk(t, "12m"), "x509-group")
	// Devices and printers have room of their own.
	for _, d := range []string{"device", "labels"} {
		if err := errors.Join(os.Remove(r.path(d)), os.Symlink(t.TempDir(), r.path(d))); err != nil {
			t.Fatal(err)
		}
	}
	full, refused := 0, 0
	tell := func(what string, s *shift) {
		t.Helper()
		if s.code == exitFailed && (strings.Contains(s.stderr, "disk is full") || strings.Contains(s.stderr, "no space left")) {
			refused++
			return // at the start already
		}
		if s.code != 0 {
			t.Errorf("%s: exit code %d\n%s", what, s.code, s.stderr)
		}
		for serial, v := range s.verdicts {
			if v.Code == station.CodeDisk {
				full++
			} else if !v.Pass && v.Code != station.CodeMade {
				t.Errorf("%s: %s: %+v", what, serial, v)
			}
		}
	}
	kib := []int{0, 4, 8, 16, 24, 40, 64}
	if faultCount(t) < 100 {
		kib = []int{0, 8, 40}
	}
	for _, at := range []string{"probe.after", "flash.after", "readback.after", "sign.after", "print.after"} {
		for _, left := range kib {
			open := r.next(2)
			r.write("faults/"+at, fmt.Sprintf("free=$(df -k --output=avail . | tail -1); head -c $(((free - %d) * 1024)) /dev/zero 2>/dev/null > hog || :\n", left))
			tell(fmt.Sprintf("%d KiB after %s", left, at), r.run(open, 0))
			if err := os.Remove(r.path("hog")); err != nil {
				t.Fatal(err)
			}
			r.finish(open)
		}
	}
	t.Logf("%d units and %d starts met a full disk", full, refused)
	if full == 0 {
		t.Error("no unit met a full disk")
	}
	// Each write by itself.
	most := max(12, min(40, faultCount(t)/4))
	for _, call := range []string{"pwrite64", "mkdirat", "renameat2"} {
		for when := 1; when <= most && (call == "pwrite64" || when <= 4); when++ {
			open := r.next(2)
			tell(fmt.Sprintf("%s %d", call, when), r.run(open, 0, r.strace("trace="+call, fmt.Sprintf("inject=%s:error=ENOSPC:when=%d", call, when))...))
			r.finish(open)
		}
	}
	t.Logf("%d units and %d starts met a full disk", full, refused)
	r.balance()
}

// What else breaks at a station, each with the real thing broken: the next try of the unit, or the next start, goes on. Covered
// elsewhere: a kill at any instant, above; a power cut, in TestPowerCut; a full disk, in TestStationDiskFull, TestDiskFull and
// TestLedgerDiskFull; a module that dies while a list is minted, in TestModuleDies; a full token, in TestTokenFull; serials that two
// stations have, in order.txtar (leases) and in TestTwoAtOnce (one directory); orders that are edited, expired, replayed, or for another
// product, and a ledger that was copied or restored, in TestOverProduction; printers, one by one, in pkg/label.
func TestStationFaults(t *testing.T) {
	r := newRig(t, "x509-group")
	config, err := os.ReadFile(r.path("line/station.toml"))
	if err != nil {
		t.Fatal(err)
	}
	r.write("line/station.toml", strings.ReplaceAll(string(config), `"20s"`, `"2s"`)) // hanging takes its time
	for _, x := range []struct {
		name, at, does string
		code           station.Code // empty: it passes all the same
	}{
		{"a board that does not answer", "probe.before", "exit 1", station.CodeProbe},
		{"a probe that hangs", "probe.before", "exec sleep 1000", station.CodeProbeTimeout},
		{"a flash command that hangs", "flash.before", "exec sleep 1000", station.CodeFlashTimeout},
		{"one that hangs and will not be told", "flash.half", "trap '' TERM; while :; do sleep 1; done", station.CodeFlashTimeout},
		{"one that fails", "flash.before", "exit 3", station.CodeFlash},
		{"one that fails after half", "flash.half", "exit 3", station.CodeFlash},
		{"one that stops after half and says nothing", "flash.half", "rm \"$second/device-chain.pem\"; exit 0", station.CodeReadBackFailed},
		{"one that lies", "flash.after", "echo x >> \"$second/device-chain.pem\"", station.CodeReadBack},
		{"the cable pulled before the device is read", "readback.before", "exit 7", station.CodeReadBackFailed},
		{"the cable pulled while it is read", "readback.before", "head -c 100 \"$first\"; exit 0", station.CodeReadBack},
		{"a device that was not read but remembered", "readback.before", "cat device/sn000000/device-chain.pem; exit 0", station.CodeReadBack},
		{"a device that does not sign", "sign.before", "exit 1", station.CodeNoChallenge},
		{"a device that signs with another's key", "sign.before", "openssl dgst -sha256 -sign device/sn000000/device-key.pem | base64 -w0; exit 0", station.CodeChallenge},
		{"a printer that refuses, once", "print.before", "exit 1", ""},
	} {
		serials := r.next(2)
		if x.name == "a board that does not answer" {
			r.finish(serials) // the one that others are taken for
			serials = r.next(2)
		}
		r.write("faults/"+x.at, x.does+"\n")
		s := r.run(serials, 0)
		if s.code != 0 {
			t.Fatalf("%s: exit code %d\n%s", x.name, s.code, s.stderr)
		}
		// Whichever head came first is hit; the other's unit passes.
		var codes []string
		for _, serial := range serials {
			if v := s.verdicts[serial]; v.Pass != (v.Code == "") || strings.Contains(v.Detail, "PRIVATE") {
				t.Errorf("%s: %+v", x.name, v)
			}
			codes = append(codes, string(s.verdicts[serial].Code))
		}
		if slices.Sort(codes); !slices.Equal(codes, []string{"", string(x.code)}) {
			t.Errorf("%s: %q", x.name, codes)
		}
		r.finish(serials)
	}
	r.balance()

	// A serial that is on a head already.
	serial := r.next(1)[0]
	request := fmt.Sprintf("{\"op\":\"make\",\"serial\":%q}\n", serial)
	s := r.talk(bytes.NewBufferString(request+request), 0, r.station("line", "PO-1")...)
	if s.code != 0 || !r.passed[serial] {
		t.Errorf("twice at once: exit code %d, %+v", s.code, s.verdicts[serial])
	}

	// The last of an order is begun, and the station dies: it is finished although the order is spent.
	r.order("PO-9", 1)
	r.write("faults/flash.half", "kill -9 $PPID; exit 1\n")
	last := bytes.NewBufferString(`{"op":"make","serial":"LAST"}` + "\n")
	if s := r.talk(bytes.NewBuffer(last.Bytes()), 0, r.station("line", "PO-9.order")...); !s.killed {
		t.Errorf("exit code %d", s.code)
	}
	if s := r.talk(bytes.NewBuffer(last.Bytes()), 0, r.station("line", "PO-9")...); s.code != 0 || !r.passed["LAST"] {
		t.Errorf("the last of an order: exit code %d, %+v\n%s", s.code, s.verdicts["LAST"], s.stderr)
	}

	// The clock is set back a year, as the ledger sees it: its last entry was made in a year's time.
	if err := os.CopyFS(r.path("future"), os.DirFS(r.path("line"))); err != nil {
		t.Fatal(err)
	}
	r.ahead("future", 365*24*time.Hour)
	before := touchmark(t, r.dir, "ledger", "show", "--line", "future", "--json")
	s = r.talk(bytes.NewBufferString(request), 0, r.station("future", "PO-1")...)
	if s.code != exitFailed || !strings.Contains(s.stderr, "clock is behind the ledger") {
		t.Errorf("a year back: exit code %d\n%s", s.code, s.stderr)
	}
	if now := touchmark(t, r.dir, "ledger", "show", "--line", "future", "--json"); now != before {
		t.Errorf("a year back: %s, was %s", now, before)
	}
}

// ahead makes an entry in a line's ledger as its station would after that time.
func (r *rig) ahead(line string, by time.Duration) {
	r.t.Helper()
	ctx := r.t.Context()
	store, err := pkcs11.Open(ctx, pkcs11.Config{URI: r.uri, PIN: func(context.Context) (hsm.Secret, error) { return hsm.Secret(hsmtest.PIN), nil }})
	if err != nil {
		r.t.Fatal(err)
	}
	defer store.Close()
	key, err := openSigner(ctx, store, "station")
	if err != nil {
		r.t.Fatal(err)
	}
	led, err := ledger.Open(ctx, ledger.Config{Path: r.path(line + "/ledger.db"), Origin: "touchmark/line", Signer: key, Now: func() time.Time { return time.Now().Add(by) }})
	if err != nil {
		r.t.Fatal(err)
	}
	_, err = led.AddNote(ctx, ledger.Note{Kind: "test"})
	if err := errors.Join(err, led.Close()); err != nil {
		r.t.Fatal(err)
	}
}

// A talk is a station that is running, for tests that look at it meanwhile.
type talk struct {
	r     *rig
	cmd   *exec.Cmd
	in    io.WriteCloser
	lines *bufio.Scanner
	err   bytes.Buffer
}

func (r *rig) start(line string) *talk {
	r.t.Helper()
	_ = r.mend()
	args := r.station(line, "PO-1")
	k := &talk{r: r, cmd: exec.Command(args[0], args[1:]...)}
	k.cmd.Dir, k.cmd.Stderr = r.dir, &k.err
	out, err := k.cmd.StdoutPipe()
	if err == nil {
		k.in, err = k.cmd.StdinPipe()
	}
	if err == nil {
		err = k.cmd.Start()
	}
	if err != nil {
		r.t.Fatal(err)
	}
	k.lines = bufio.NewScanner(out)
	stop := time.AfterFunc(rigPatience, func() { _ = k.cmd.Process.Signal(syscall.SIGQUIT) })
	r.t.Cleanup(func() { stop.Stop(); _ = k.cmd.Process.Kill() })
	return k
}

func (k *talk) say(format string, args ...any) { fmt.Fprintf(k.in, format+"\n", args...) }

// until reads answers up to one that is wanted.
func (k *talk) until(want func(station.Answer) bool) station.Answer {
	k.r.t.Helper()
	for k.lines.Scan() {
		var a station.Answer
		if err := json.Unmarshal(k.lines.Bytes(), &a); err != nil {
			k.r.t.Fatal(err)
		}
		if a.Verdict != nil && a.Verdict.Pass {
			k.r.passed[a.Serial] = true
		}
		if want(a) {
			return a
		}
	}
	k.r.t.Fatalf("the station ended: %v\n%s", k.cmd.Wait(), k.err.String())
	return station.Answer{}
}

// wait waits for the end, and returns the exit code.
func (k *talk) wait() int {
	for k.lines.Scan() {
	}
	_ = k.cmd.Wait()
	return k.cmd.ProcessState.ExitCode()
}

func ready(a station.Answer) bool { return a.Event == "status" }

// Two processes on one ledger: the second refuses and names the first, as long as that lives.
func TestTwoStations(t *testing.T) {
	for name, flags := range map[string][]string{"lock": nil, "counter": {"--counter", "line-3"}} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, "x509-group", flags...)
			first := r.start("line")
			first.say(`{"op":"status"}`)
			first.until(ready)
			pid := strconv.Itoa(first.cmd.Process.Pid)
			for _, line := range []string{"line", "copy"} {
				if line == "copy" {
					if name == "lock" {
						continue // nothing tells a copy without a counter
					}
					if err := os.CopyFS(r.path("copy"), os.DirFS(r.path("line"))); err != nil {
						t.Fatal(err)
					}
				}
				second := r.talk(bytes.NewBufferString(`{"op":"make","serial":"SN000000"}`+"\n"), 0, r.station(line, "PO-1")...)
				if second.code == 0 || len(second.verdicts) > 0 || !strings.Contains(second.stderr, pid) {
					t.Errorf("%s: the second does not name process %s: exit code %d\n%s", line, pid, second.code, second.stderr)
				}
			}
			serials := r.next(2)
			first.say(`{"op":"make","serial":%q}`, serials[0])
			if v := first.until(func(a station.Answer) bool { return a.Verdict != nil }); !v.Verdict.Pass {
				t.Errorf("the first goes on: %+v", v.Verdict)
			}
			if err := first.cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			first.wait()
			r.finish(serials)
			r.balance()
		})
	}
}

// The token goes away while units are made: once for a moment, with the process that has its module loaded, and the station goes on by
// itself; then for good, and it is stopped. Nothing of a unit is lost.
func TestStationTokenGone(t *testing.T) {
	if _, err := exec.LookPath("p11-kit"); err != nil {
		hsmtest.Require(t, "p11-kit (apt-get install p11-kit p11-kit-modules)")
	}
	for _, profile := range []string{"x509-group", "token"} {
		t.Run(profile, func(t *testing.T) {
			r := newRig(t, profile)
			edited, err := os.ReadFile(r.path("line/touchmark.toml"))
			if err != nil {
				t.Fatal(err)
			}
			r.write("line/touchmark.toml", strings.Replace(string(edited), "module-path=", "module-path=p11-kit:", 1))
			pull := func(k *talk) {
				t.Helper()
				pids := children(k.cmd.Process.Pid, "libsofthsm2")
				if len(pids) == 0 {
					t.Error("the module is in no process of its own")
				}
				for _, pid := range pids {
					_ = syscall.Kill(pid, syscall.SIGKILL)
				}
			}
			k := r.start("line")
			k.say(`{"op":"status"}`)
			k.until(ready)
			serials := r.next(4)
			for _, serial := range serials[:2] {
				k.say(`{"op":"make","serial":%q}`, serial)
				k.until(func(a station.Answer) bool { return a.Step == station.StepProbe })
				pull(k)
				_ = r.mend()
				if a := k.until(func(a station.Answer) bool { return a.Verdict != nil }); !a.Verdict.Pass {
					t.Errorf("%+v", a.Verdict)
				}
			}
			tokens := filepath.Join(filepath.Dir(os.Getenv("SOFTHSM2_CONF")), "tokens")
			if err := os.Rename(tokens, tokens+".away"); err != nil {
				t.Fatal(err)
			}
			pull(k)
			k.say(`{"op":"make","serial":%q}`, serials[2])
			k.until(func(a station.Answer) bool { return a.Waiting == station.CodeToken })
			if err := k.cmd.Process.Signal(os.Interrupt); err != nil {
				t.Fatal(err)
			}
			if code := k.wait(); code != exitInterrupted {
				t.Errorf("exit code %d\n%s", code, k.err.String())
			}
			s := r.run(serials[2:], 0)
			if s.code == 0 || len(s.verdicts) > 0 {
				t.Errorf("without a token: exit code %d, %v\n%s", s.code, s.verdicts, s.stderr)
			}
			if err := os.Rename(tokens+".away", tokens); err != nil {
				t.Fatal(err)
			}
			r.finish(serials)
			r.balance()
		})
	}
}

// A list is edited while its job is half done: nothing that was made is made again or forgotten, and both lists come to their ends.
func TestListEdited(t *testing.T) {
	dir := newTokenLine(t)
	lists := 0
	list := func(name string, serials ...string) []string {
		lists++
		if err := os.WriteFile(filepath.Join(dir, name), []byte("serial\n"+strings.Join(serials, "\n")+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		return []string{"mint", "--line", "line", "--profile", "x509-group", "--serials", name, "--out", "stamps", "--bundle", fmt.Sprintf("%d.tmb", lists), "--json"}
	}
	touchmark(t, dir, list("s.csv", "SN1", "SN2", "SN3")...)
	before := touchmark(t, dir, "ledger", "show", "--line", "line", "--json")
	for name, serials := range map[string][]string{"one more": {"SN1", "SN2", "SN3", "SN4"}, "another order": {"SN3", "SN1", "SN2"}, "one less": {"SN1", "SN2"}, "twice": {"SN4", "SN4"}} {
		code, text := attempt(t, dir, list("s.csv", serials...)...)
		if code == 0 || name != "twice" && !strings.Contains(text, "was first made on") {
			t.Errorf("%s: exit code %d\n%s", name, code, text)
		}
		if now := touchmark(t, dir, "ledger", "show", "--line", "line", "--json"); now != before {
			t.Errorf("%s: the ledger has %s, had %s", name, now, before)
		}
	}
	lists = 0
	touchmark(t, dir, list("s.csv", "SN1", "SN2", "SN3")...) // put back, it is the same job
	touchmark(t, dir, list("more.csv", "SN4")...)
	touchmark(t, dir, "ledger", "verify", "--line", "line")
}
