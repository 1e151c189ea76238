package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/touchmark/touchmark/hsm/hsmtest"
)

// children returns the processes that a process started, by what stands in their command lines.
func children(pid int, word string) []int {
	var found []int
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		child, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		stat, _ := os.ReadFile(filepath.Join("/proc", e.Name(), "stat"))
		if at := bytes.LastIndexByte(stat, ')'); at > 0 {
			var state string
			var parent int
			if _, err := fmt.Sscan(string(stat[at+1:]), &state, &parent); err == nil && parent == pid && state != "Z" {
				if line, _ := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline")); strings.Contains(string(line), word) {
					found = append(found, child)
				}
			}
		}
	}
	return found
}

// The plug is pulled: the vendor's module is loaded in a process of its own, which is killed again and again while five
// hundred devices get their keys in the token. The one mint goes on, without a restart, and ends with five hundred units,
// five hundred keys, and none that no device has.
func TestModuleDies(t *testing.T) {
	if testing.Short() {
		hsmtest.Require(t, "a run without -short")
	}
	if _, err := exec.LookPath("p11-kit"); err != nil {
		hsmtest.Require(t, "p11-kit (apt-get install p11-kit p11-kit-modules)")
	}
	const units = 500
	uri := hsmtest.SoftHSM(t, "line-3")
	mend := hsmtest.Mender(t)
	uri.ModulePath = "p11-kit:" + uri.ModulePath
	dir := newLine(t, uri)
	if err := os.WriteFile(filepath.Join(dir, "serials.csv"), serialList("SN", units), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program(t), "mint", "--line", "line", "--profile", "token", "--serials", "serials.csv", "--out", "stamps", "--bundle", "b.tmb", "--json")
	cmd.Dir = dir
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	killed := 0
	var err error
	for running := true; running; {
		select {
		case err = <-ended:
			running = false
		case <-time.After(150 * time.Millisecond):
			if killed < 12 {
				for _, pid := range children(cmd.Process.Pid, "libsofthsm2") {
					if p, err := os.FindProcess(pid); err == nil && p.Kill() == nil {
						killed++
					}
				}
				time.Sleep(20 * time.Millisecond)
				if mend() {
					t.Logf("kill %d hit SoftHSM's own login: its token file was put back", killed)
				}
			}
		}
	}
	if err != nil {
		t.Fatalf("mint: %v\n%s", err, stderr.String())
	}
	t.Logf("%d kills", killed)
	if killed < 3 {
		t.Errorf("the module was killed %d times only", killed)
	}
	var res mintResult
	if err := json.Unmarshal(stdout.Bytes(), &res); err != nil || res.Minted != units {
		t.Errorf("%v: %s", err, stdout.String())
	}
	touchmark(t, dir, "ledger", "verify", "--line", "line")
	touchmark(t, dir, "bundle", "verify", "b.tmb", "--trust", "line/station.pem", "--require-residency", "token")
	keys := map[string]bool{}
	for line := range strings.Lines(touchmark(t, dir, "ledger", "show", "--line", "line", "--json")) {
		var u struct{ KeyHash, State string }
		if err := json.Unmarshal([]byte(line), &u); err != nil || u.State != "exported" {
			t.Errorf("%v: %s", err, line)
		}
		keys[u.KeyHash] = true
	}
	if n := checkStamps(t, filepath.Join(dir, "stamps"), "token", keys); n != units || len(keys) != units {
		t.Errorf("%d stamps, %d keys", n, len(keys))
	}
	listed := touchmark(t, dir, "key", "list", "--line", "line", "--json")
	if n := strings.Count(listed, `"name":"device:`); n != units {
		t.Errorf("%d device keys in the token", n)
		for i := range units {
			if name := fmt.Sprintf("device:sn%06d", i); !strings.Contains(listed, `"name":"`+name+`"`) {
				t.Errorf("key %s cannot be opened", name)
			}
		}
	}
}
