package hsm_test

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/touchmark/touchmark/hsm"
)

// Whose claim it is, and whether that process runs: which is told on Linux only, as is this test.
func TestClaim(t *testing.T) {
	mine, err := hsm.NewClaim("line-3")
	if err != nil {
		t.Fatal(err)
	}
	if mine.PID != os.Getpid() || mine.Boot == "" || mine.Space == "" || mine.Started == 0 || time.Since(mine.Since) > time.Minute {
		t.Errorf("a claim of this process: %+v", mine)
	}
	// One that runs, one that waits for its parent, one that has ended.
	cmd := exec.Command("cat")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	child := mine
	child.PID = cmd.Process.Pid
	child.Started = startOf(t, child.PID)
	if !child.Running() || child.Ended() {
		t.Error("a process that runs does not")
	}
	reused := child
	reused.Started--
	if reused.Running() || !reused.Ended() {
		t.Error("a process of an earlier time runs, because its number does")
	}
	_ = in.Close()
	if _, err := out.Read(make([]byte, 1)); err == nil {
		t.Fatal("cat said something")
	}
	for state := ""; state != "Z"; {
		b, err := os.ReadFile("/proc/" + strconv.Itoa(child.PID) + "/stat")
		if err != nil {
			t.Fatal(err)
		}
		state = strings.Fields(string(b))[2]
	}
	if child.Running() || !child.Ended() {
		t.Error("a process that waits for its parent runs")
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	if child.Running() || !child.Ended() {
		t.Error("a process that has ended runs")
	}
	// Of a process elsewhere nothing is known, be its number that of one that has ended here or of one that runs.
	for what, change := range map[string]func(*hsm.Claim){
		"host": func(c *hsm.Claim) { c.Host += "x" }, "boot": func(c *hsm.Claim) { c.Boot += "x" }, "namespace": func(c *hsm.Claim) { c.Space += "x" },
		"no boot": func(c *hsm.Claim) { c.Boot = "" }, "no namespace": func(c *hsm.Claim) { c.Space = "" },
	} {
		for _, c := range []hsm.Claim{child, mine} {
			if change(&c); c.Running() || c.Ended() {
				t.Errorf("of another %s, and running %t, ended %t", what, c.Running(), c.Ended())
			}
		}
	}
}

func startOf(t *testing.T, pid int) (started uint64) {
	t.Helper()
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal([]byte(strings.Fields(string(b))[21]), &started); err != nil {
		t.Fatal(err)
	}
	return started
}

// A claim parses to what is written as the same octets, or not at all.
func FuzzClaim(f *testing.F) {
	mine, err := hsm.NewClaim("line-3")
	if err != nil {
		f.Fatal(err)
	}
	b, err := json.Marshal(mine)
	if err != nil {
		f.Fatal(err)
	}
	if back, err := hsm.ParseClaim(b); err != nil || back != mine {
		f.Fatalf("%s became %+v: %v", b, back, err)
	}
	f.Add(b)
	for old, to := range map[string]string{`"owner":"line-3"`: `"owner":""`, `"pid":`: `"pid":-`, `Z"`: `+01:00"`, `"id":"`: `"id":"A`, `{`: `{ `} {
		bad := []byte(strings.Replace(string(b), old, to, 1))
		if c, err := hsm.ParseClaim(bad); err == nil {
			f.Errorf("%s parses to %+v", bad, c)
		}
		f.Add(bad)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := hsm.ParseClaim(b)
		if err != nil {
			return
		}
		if again, err := json.Marshal(c); err != nil || !bytes.Equal(again, b) {
			t.Fatalf("%q became %q: %v", b, again, err)
		}
		if strings.ContainsAny(c.String(), "\n\x1b") {
			t.Fatalf("%q shows as %q", b, c)
		}
	})
}
