package main

import (
	"bytes"
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// The README's journey works as pasted, in ten lines, and once more, and so do the operator's day and the way to the built-in hub
// in its folder. Only the ports are other ones, since somebody may have those.
func TestReadme(t *testing.T) {
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(root, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	script := commands(t, b, "## The journey")
	if n := strings.Count(script, "\n"); n != 10 {
		t.Fatalf("the journey has %d lines", n)
	}
	again := script[strings.Index(script, "./touchmark mint"):]
	script += again + commands(t, b, "## Operators") + "kill %1\nwait %1 || true\n" + commands(t, b, "## From power-on")
	for _, port := range []string{"127.0.0.1:8443", "127.0.0.1:8883", "127.0.0.1:5671", "127.0.0.1:9443", "127.0.0.1:9883"} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		script = strings.ReplaceAll(script, port, l.Addr().String())
		_ = l.Close()
	}
	home := t.TempDir()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash", "-c", "set -e\ntrap 'kill $(jobs -p)' EXIT\n"+script)
	cmd.Dir, cmd.Env, cmd.WaitDelay = root, goHome(t, home), 5*time.Second
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, stamp := range []string{"pump-001", "pump-002"} {
		a, err := os.ReadFile(filepath.Join(home, "touchmark-demo/stamps", stamp, "assignment.json"))
		if err != nil || !bytes.Contains(a, []byte("hub-a.example.net")) {
			t.Errorf("%s: %s, %v\n%s", stamp, a, err, out)
		}
	}
}

// commands returns the first commands under a heading.
func commands(t *testing.T, readme []byte, heading string) string {
	t.Helper()
	_, rest, ok := strings.Cut(string(readme), heading)
	_, rest, _ = strings.Cut(rest, "```sh\n")
	script, _, ends := strings.Cut(rest, "```")
	if !ok || !ends {
		t.Fatalf("the README has no commands under %s", heading)
	}
	return script
}

// goHome is the environment with another home, where Go still finds what hangs on it.
func goHome(t *testing.T, home string) []string {
	t.Helper()
	env := append(os.Environ(), "HOME="+home)
	for _, name := range []string{"GOPATH", "GOMODCACHE", "GOCACHE"} {
		v, err := exec.Command("go", "env", name).Output()
		if err != nil {
			t.Fatal(err)
		}
		env = append(env, name+"="+string(bytes.TrimSpace(v)))
	}
	return env
}

// The README's factory floor works as pasted.
func TestReadmeFloor(t *testing.T) {
	b, err := os.ReadFile(filepath.Join("..", "..", "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	script := commands(t, b, "## The factory floor")
	dir := t.TempDir()
	if err := os.Symlink(program(t), filepath.Join(dir, "touchmark")); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "bash", "-c", "set -e\n"+script)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"))
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{`"code":"E-105"`, "exported  5", "refused   1", "verifies"} {
		if !bytes.Contains(out, []byte(want)) {
			t.Errorf("%q is not in\n%s", want, out)
		}
	}
}

// The README's emulator works as pasted.
func TestReadmeEmulator(t *testing.T) {
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(root, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	script := commands(t, b, "## The emulator")
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash", "-c", "set -e\ntrap 'kill %1' EXIT\n"+script)
	cmd.Dir, cmd.WaitDelay = root, 5*time.Second
	cmd.Env = goHome(t, t.TempDir())
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{"hub.example.invalid", "retry-after=1,count=2  3        2\n2\n"} {
		if !bytes.Contains(out, []byte(want)) {
			t.Errorf("%q is not in\n%s", want, out)
		}
	}
}
