package hsmtest

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/touchmark/touchmark/hsm"
)

// findModule returns the first file that matches, or ends the test.
func findModule(t testing.TB, missing string, patterns ...string) string {
	t.Helper()
	for _, p := range patterns {
		if found, _ := filepath.Glob(p); len(found) > 0 {
			return found[0]
		}
	}
	Require(t, missing)
	return ""
}

func need(t testing.TB, program, pkg string) {
	t.Helper()
	if _, err := exec.LookPath(program); err != nil {
		Require(t, program+" (apt-get install "+pkg+")")
	}
}

func run(t testing.TB, program string, args ...string) {
	t.Helper()
	if out, err := exec.Command(program, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", program, err, out)
	}
}

// NSS makes a key database of NSS in the test's own directory and returns the key URI of its token.
func NSS(t testing.TB, label string) hsm.URI {
	t.Helper()
	module := findModule(t, "NSS (apt-get install libnss3)", "/usr/lib/*/libsoftokn3.so", "/usr/lib/*/nss/libsoftokn3.so", "/usr/lib64/libsoftokn3.so")
	need(t, "certutil", "libnss3-tools")
	// NSS stretches the password for every key that it reads; ten thousand rounds each make a slow test.
	t.Setenv("NSS_MAX_MP_PBE_ITERATION_COUNT", "100")
	dir := memoryDir(t)
	pin := filepath.Join(dir, "pin")
	if err := os.WriteFile(pin, []byte(PIN+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	run(t, "certutil", "-N", "-d", "sql:"+dir, "-f", pin)
	return hsm.URI{Scheme: hsm.SchemePKCS11, Token: label, ModulePath: module, PINSource: "file:" + pin,
		InitArgs: "configdir='sql:" + dir + "' certPrefix='' keyPrefix='' secmod='secmod.db' dbTokenDescription='" + label + "' flags="}
}

// TPM2 starts a software TPM with a tpm2-pkcs11 store, both in the test's own directory, and returns the key URI of its token.
func TPM2(t testing.TB, label string) (hsm.URI, *Service) {
	t.Helper()
	module := findModule(t, "tpm2-pkcs11 (apt-get install libtpm2-pkcs11-1)", "/usr/lib/*/pkcs11/libtpm2_pkcs11.so*", "/usr/lib/*/libtpm2_pkcs11.so*", "/usr/lib64/pkcs11/libtpm2_pkcs11.so")
	need(t, "swtpm", "swtpm")
	need(t, "pkcs11-tool", "opensc")
	need(t, "tpm2_flushcontext", "tpm2-tools")
	dir := memoryDir(t)
	state, store, socket := filepath.Join(dir, "state"), filepath.Join(dir, "store"), filepath.Join(dir, "s")
	for _, d := range []string{state, store} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	// The TCTI looks for the control socket beside the other, under this name.
	tpm := &Service{t: t, ready: socket + ".ctrl", args: []string{"swtpm", "socket", "--tpm2", "--tpmstate", "dir=" + state, "--server", "type=unixio,path=" + socket,
		"--ctrl", "type=unixio,path=" + socket + ".ctrl", "--flags", "not-need-init,startup-clear"}}
	tpm.Start()
	t.Setenv("TPM2_PKCS11_STORE", store)
	t.Setenv("TPM2_PKCS11_TCTI", "swtpm:path="+socket)
	t.Setenv("TPM2_PKCS11_LOG_LEVEL", "0")
	t.Setenv("TSS2_LOG", "all+NONE")
	run(t, "pkcs11-tool", "--module", module, "--init-token", "--slot", "1", "--label", label, "--so-pin", "12345678")
	run(t, "pkcs11-tool", "--module", module, "--init-pin", "--token-label", label, "--login", "--so-pin", "12345678", "--pin", PIN)
	// Without a resource manager what those two left loaded stays, in a TPM with room for three.
	t.Setenv("TPM2TOOLS_TCTI", "swtpm:path="+socket)
	run(t, "tpm2_flushcontext", "--transient-object")
	// A TPM that loses its power counts it as a wrong try; after three it would be locked (TPM 2.0 Part 1, 19.8).
	run(t, "tpm2_dictionarylockout", "--setup-parameters", "--max-tries=1000", "--recovery-time=1", "--lockout-recovery-time=1")
	pin := filepath.Join(dir, "pin")
	if err := os.WriteFile(pin, []byte(PIN+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return hsm.URI{Scheme: hsm.SchemePKCS11, Token: label, ModulePath: module, PINSource: "file:" + pin}, tpm
}

// Service is a program that runs until the test ends, unless it is killed.
type Service struct {
	t     testing.TB
	args  []string
	ready string // the file that says that it runs
	kill  func()
}

// Start starts the program, which must not run, and waits until it is ready.
func (s *Service) Start() {
	s.t.Helper()
	_ = os.Remove(s.ready)
	s.kill = start(s.t, s.ready, exec.Command(s.args[0], s.args[1:]...))
}

// Kill kills the program and the processes that it made.
func (s *Service) Kill() { s.kill() }

// start runs a program until the test ends and waits for the file that says it is ready. The function that it returns ends
// the program at once.
func start(t testing.TB, ready string, cmd *exec.Cmd) (kill func()) {
	t.Helper()
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { _ = cmd.Wait(); close(ended) }()
	kill = func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // and those that it started
		<-ended
	}
	t.Cleanup(kill)
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(2 * time.Millisecond) {
		_, err := os.Stat(ready)
		if err == nil {
			return kill
		}
		if !errors.Is(err, fs.ErrNotExist) || time.Now().After(deadline) {
			t.Fatalf("%s did not start: %v", cmd.Path, err)
		}
		select {
		case <-ended:
			t.Fatalf("%s ended: %s", cmd.Path, out.String())
		default:
		}
	}
}

// P11Kit starts p11-kit's server in front of the module that a key URI names, in the test's own directory, and returns the
// key URI of the same token behind p11-kit's client module.
func P11Kit(t testing.TB, uri hsm.URI) (hsm.URI, *Service) {
	t.Helper()
	client := findModule(t, "p11-kit's client module (apt-get install p11-kit-modules)", "/usr/lib/*/pkcs11/p11-kit-client.so", "/usr/lib64/pkcs11/p11-kit-client.so")
	need(t, "p11-kit", "p11-kit")
	socket := filepath.Join(memoryDir(t), "p11")
	t.Setenv("P11_KIT_SERVER_ADDRESS", "unix:path="+socket)
	server := &Service{t: t, ready: socket, args: []string{"p11-kit", "server", "--foreground", "--name", socket, "--provider", uri.ModulePath, "pkcs11:"}}
	server.Start()
	uri.ModulePath = client
	return uri, server
}
