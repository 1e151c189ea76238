package hsmtest

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/touchmark/touchmark/hsm"
)

// A TPM is a software TPM (swtpm) of a test's own.
type TPM struct {
	// Dir is the test's directory, in memory where there is such a place; State is where the TPM's state is.
	Dir, State string
	// Socket is the Unix socket that takes bare TPM commands.
	Socket string
	// Args are added to swtpm's own when it is started.
	Args []string

	t    testing.TB
	cmd  *exec.Cmd
	done chan struct{}
}

// SWTPM starts a software TPM, which is stopped when the test ends.
func SWTPM(t testing.TB) *TPM {
	t.Helper()
	if _, err := exec.LookPath("swtpm"); err != nil {
		Require(t, "swtpm (apt-get install swtpm)")
	}
	dir := memoryDir(t)
	s := &TPM{Dir: dir, State: filepath.Join(dir, "state"), Socket: filepath.Join(dir, "tpm.sock"), t: t}
	if err := os.Mkdir(s.State, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Kill)
	s.Start()
	return s
}

// SWTPMWithEK starts a software TPM that was manufactured: it has an RSA EK at 0x81010001, and a certificate of it that leads to
// the makers' root in the folder Makers.
func SWTPMWithEK(t testing.TB) *TPM {
	t.Helper()
	s := SWTPM(t)
	s.Kill()
	if err := Manufacture(s.Dir, s.State); err != nil {
		t.Fatal(err)
	}
	s.Start()
	return s
}

// Makers is the folder with the root certificate of a TPM that SWTPMWithEK made.
func (s *TPM) Makers() string { return filepath.Join(s.Dir, "makers") }

// Manufacture gives the state of a software TPM an EK and certificates of a CA that it makes, whose certificates are in the
// folder makers of dir afterwards.
func Manufacture(dir, state string) error {
	makers := filepath.Join(dir, "makers")
	for path, text := range map[string]string{
		"localca.conf":    "statedir = " + makers + "\nsigningkey = " + makers + "/signkey.key\nissuercert = " + makers + "/issuer.pem\ncertserial = " + makers + "/serial\n",
		"localca.options": "--platform-manufacturer Test\n--platform-version 1\n--platform-model Test\n",
		"setup.conf":      "create_certs_tool = swtpm_localca\ncreate_certs_tool_config = " + dir + "/localca.conf\ncreate_certs_tool_options = " + dir + "/localca.options\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, path), []byte(text), 0o600); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(makers, 0o700); err != nil {
		return err
	}
	args := []string{"--tpm2", "--tpmstate", state, "--config", filepath.Join(dir, "setup.conf"), "--create-ek-cert", "--overwrite"}
	if os.Geteuid() == 0 {
		args = append(args, "--runas", "root")
	}
	if out, err := exec.Command("swtpm_setup", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("swtpm_setup: %w\n%s", err, out)
	}
	// The root's own key lies beside its certificate; as root certificates go, it is no maker's.
	return os.Remove(filepath.Join(makers, "swtpm-localca-rootca-privkey.pem"))
}

// URI names the TPM, with a directory for key blobs in the test's own.
func (s *TPM) URI() hsm.URI {
	return hsm.URI{Scheme: hsm.SchemeTPM, Device: "unix:" + s.Socket, Keys: filepath.Join(s.Dir, "keys")}
}

// TCTI names the TPM to the tools of tpm2-tools and to OpenSSL's provider, in TPM2TOOLS_TCTI and TPM2OPENSSL_TCTI.
func (s *TPM) TCTI() string { return "swtpm:path=" + s.Socket }

// Start starts the TPM that was killed, with the state that it had.
func (s *TPM) Start() {
	s.t.Helper()
	_ = os.Remove(s.Socket)
	_ = os.Remove(s.Socket + ".ctrl")
	s.cmd = exec.Command("swtpm", append([]string{
		"socket", "--tpm2", "--tpmstate", "dir=" + s.State, "--server", "type=unixio,path=" + s.Socket,
		"--ctrl", "type=unixio,path=" + s.Socket + ".ctrl", // for the tools of others
		"--flags", "not-need-init,startup-clear", "--seccomp", "action=none",
	}, s.Args...)...)
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.done = make(chan struct{})
	go func(cmd *exec.Cmd, done chan struct{}) {
		_ = cmd.Wait()
		close(done)
	}(s.cmd, s.done)
	s.await("unix", s.Socket)
}

func (s *TPM) await(network, address string) {
	s.t.Helper()
	for begin := time.Now(); time.Since(begin) < 20*time.Second; time.Sleep(5 * time.Millisecond) {
		if c, err := net.Dial(network, address); err == nil {
			_ = c.Close()
			return
		}
		select {
		case <-s.done:
			s.t.Fatal("swtpm ended")
		default:
		}
	}
	s.t.Fatal("swtpm did not start in time")
}

// Kill ends the TPM as pulling its plug would.
func (s *TPM) Kill() {
	if s.cmd == nil {
		return
	}
	_ = s.cmd.Process.Kill()
	<-s.done
	s.cmd = nil
}

// SWTPMTCP starts a software TPM that takes bare commands on a TCP port, and returns the port with it.
func SWTPMTCP(t testing.TB) (*TPM, int) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := l.Addr().(*net.TCPAddr).Port
	_ = l.Close()
	s := SWTPM(t)
	s.Kill()
	s.cmd = exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+s.State, "--server",
		"type=tcp,bindaddr=127.0.0.1,port="+strconv.Itoa(port), "--flags", "not-need-init", "--seccomp", "action=none")
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	s.done = make(chan struct{})
	go func(cmd *exec.Cmd, done chan struct{}) {
		_ = cmd.Wait()
		close(done)
	}(s.cmd, s.done)
	s.await("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
	return s, port
}
