package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/touchmark/touchmark/hsm/hsmtest"
	"github.com/touchmark/touchmark/hsm/keyfile"
)

// The scripts run the program itself, in a process of its own each time. Passphrases are stretched less, to save hours.
func TestMain(m *testing.M) {
	testscript.Main(tests{m}, map[string]func(){
		"touchmark": func() {
			keyfile.TestWorkFactor(10)
			os.Exit(run(context.Background(), os.Args[1:], stdio{in: os.Stdin, out: os.Stdout, err: os.Stderr, env: os.LookupEnv}))
		},
		"factory": factoryMain,
	})
}

// tests removes what the tests share when they are through.
type tests struct{ m *testing.M }

func (t tests) Run() int {
	defer func() {
		if buildPath != "" {
			_ = os.RemoveAll(filepath.Dir(buildPath))
		}
	}()
	return t.m.Run()
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 filepath.Join("..", "..", "testdata", "script"),
		RequireExplicitExec: true,
		UpdateScripts:       os.Getenv("TOUCHMARK_UPDATE") != "",
		Setup: func(e *testscript.Env) error {
			e.Setenv("TOUCHMARK_PASSPHRASE", "words for a test")
			e.Setenv("HOME", e.WorkDir)
			if dir := os.Getenv("TOUCHMARK_ESP_NVS"); dir != "" {
				e.Setenv("TOUCHMARK_ESP_NVS", dir)
				script, err := filepath.Abs(filepath.Join("..", "..", "pkg", "stamp", "nvs", "testdata", "espressif.py"))
				if err != nil {
					return err
				}
				e.Setenv("ESPRESSIF", script)
			}
			e.Values["swtpm"] = make(map[string]*exec.Cmd)
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"softhsm": softhsmCmd, "serve": serveCmd, "emulator": emulatorCmd, "serials": serialsCmd, "flip": flipCmd, "swtpm": swtpmCmd, "exits": exitsCmd, "stdout2file": saveCmd, "azure": azureCmd(t),
		},
		Condition: func(cond string) (bool, error) {
			switch cond {
			case "root":
				return os.Geteuid() == 0, nil
			case "espressif": // its generator is here
				st, err := os.Stat(os.Getenv("TOUCHMARK_ESP_NVS"))
				return err == nil && st.IsDir(), nil
			}
			return false, fmt.Errorf("unknown condition %q", cond)
		},
	})
}

// softhsm LABEL: makes a token and puts its key URI into $URI, its PIN into the file pin.
func softhsmCmd(ts *testscript.TestScript, neg bool, args []string) {
	module := softhsmModule(ts)
	dir := ts.MkAbs("softhsm")
	ts.Check(os.MkdirAll(filepath.Join(dir, "tokens"), 0o700))
	conf := filepath.Join(dir, "softhsm2.conf")
	ts.Check(os.WriteFile(conf, []byte("directories.tokendir = "+filepath.Join(dir, "tokens")+"\nobjectstore.backend = file\nlog.level = ERROR\n"), 0o600))
	ts.Setenv("SOFTHSM2_CONF", conf)
	for _, label := range args {
		cmd := exec.Command("softhsm2-util", "--init-token", "--free", "--label", label, "--pin", hsmtest.PIN, "--so-pin", "12345678")
		cmd.Env = append(os.Environ(), "SOFTHSM2_CONF="+conf)
		if out, err := cmd.CombinedOutput(); err != nil {
			ts.Fatalf("softhsm2-util: %v\n%s", err, out)
		}
	}
	pin := ts.MkAbs("pin")
	ts.Check(os.WriteFile(pin, []byte(hsmtest.PIN+"\n"), 0o600))
	ts.Setenv("MODULE", module)
	ts.Setenv("URI", "pkcs11:token="+args[0]+"?module-path="+module+"&pin-source=file:"+pin)
}

// swtpm start NAME, swtpm kill NAME: starts a software TPM that was manufactured in the directory NAME, and puts its key URI, with
// the key blobs in NAME/keys, into $NAME; starts the one that was killed there; or kills it as pulling its plug would.
func swtpmCmd(ts *testscript.TestScript, neg bool, args []string) {
	dir := ts.MkAbs(args[1])
	running := ts.Value("swtpm").(map[string]*exec.Cmd)
	if args[0] == "kill" {
		cmd := running[args[1]]
		if cmd == nil {
			ts.Fatalf("no swtpm in %s", dir)
		}
		ts.Check(cmd.Process.Kill())
		_ = cmd.Wait()
		delete(running, args[1])
		return
	}
	for _, program := range []string{"swtpm", "swtpm_setup"} {
		if _, err := exec.LookPath(program); err != nil {
			ts.Fatalf("missing: %s (apt-get install swtpm swtpm-tools)", program)
		}
	}
	state, socket := filepath.Join(dir, "state"), filepath.Join(dir, "sock")
	if !exists(state) {
		ts.Check(os.MkdirAll(state, 0o700))
		ts.Check(hsmtest.Manufacture(dir, state))
	}
	for _, path := range []string{socket, socket + ".ctrl"} {
		_ = os.Remove(path)
	}
	cmd := exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+state, "--server", "type=unixio,path="+socket,
		"--ctrl", "type=unixio,path="+socket+".ctrl", "--flags", "not-need-init,startup-clear", "--seccomp", "action=none")
	ts.Check(cmd.Start())
	running[args[1]] = cmd
	ts.Defer(func() {
		if running[args[1]] == cmd {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	})
	for begin := time.Now(); !exists(socket); time.Sleep(5 * time.Millisecond) {
		if time.Since(begin) > 20*time.Second {
			ts.Fatalf("swtpm did not start")
		}
	}
	ts.Setenv(strings.ToUpper(args[1]), "tpm:?device=unix:"+socket+"&keys="+filepath.Join(dir, "keys"))
	ts.Setenv("TPM2TOOLS_TCTI", "swtpm:path="+socket)
}

func softhsmModule(ts *testscript.TestScript) string {
	found, _ := filepath.Glob("/usr/lib/*/softhsm/libsofthsm2.so")
	for _, path := range append([]string{"/usr/lib/softhsm/libsofthsm2.so"}, found...) {
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	ts.Fatalf("missing: SoftHSM (apt-get install softhsm2)")
	return ""
}

// serve [FLAG ...]: starts the service in the directory svc and puts its addresses into $HTTPS, $MQTT and $AMQP. It is stopped,
// and must stop cleanly, when the script ends.
func serveCmd(ts *testscript.TestScript, neg bool, args []string) {
	serveForScript(ts, append([]string{"--data", ts.MkAbs("svc")}, args...))
}

// emulator [FLAG ...]: does the same with one that keeps nothing.
func emulatorCmd(ts *testscript.TestScript, neg bool, args []string) {
	serveForScript(ts, append([]string{"--ephemeral"}, args...))
}

func serveForScript(ts *testscript.TestScript, args []string) {
	args = append([]string{"serve", "--https", "127.0.0.1:0", "--mqtt", "127.0.0.1:0", "--amqp", "127.0.0.1:0", "--json"}, args...)
	program, err := lookPath("touchmark", ts.Getenv("PATH"))
	ts.Check(err)
	cmd := exec.Command(program, args...)
	cmd.Dir, cmd.Env = ts.Getenv("WORK"), []string{"PATH=" + ts.Getenv("PATH"), "HOME=" + ts.Getenv("HOME")}
	var log syncBuffer
	cmd.Stderr = &log
	out, err := cmd.StdoutPipe()
	ts.Check(err)
	ts.Check(cmd.Start())
	ts.Defer(func() {
		_ = cmd.Process.Signal(os.Interrupt)
		if err := cmd.Wait(); err != nil {
			ts.Logf("serve: %v\n%s", err, log.String())
		}
	})
	buf := make([]byte, 4096)
	n, err := out.Read(buf)
	if err != nil {
		ts.Fatalf("serve did not start: %v\n%s", err, log.String())
	}
	go func() { _, _ = io.Copy(io.Discard, out) }()
	for name, key := range map[string]string{"HTTPS": "https", "MQTT": "mqtt", "AMQP": "amqp", "SCOPE": "idScope", "RECIPIENT": "recipient"} {
		if m := regexp.MustCompile(`"` + key + `":"([^"]*)"`).FindSubmatch(buf[:n]); m != nil {
			ts.Setenv(name, string(m[1]))
		}
	}
}

func lookPath(name, path string) (string, error) {
	for _, dir := range filepath.SplitList(path) {
		if p := filepath.Join(dir, name); exists(p) {
			return p, nil
		}
	}
	return "", fmt.Errorf("%s is not in %s", name, path)
}

// syncBuffer is a buffer that a process's output goes to while the test may read it.
type syncBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// serials FILE PREFIX COUNT: writes a serial list.
func serialsCmd(ts *testscript.TestScript, neg bool, args []string) {
	var n int
	_, err := fmt.Sscan(args[2], &n)
	ts.Check(err)
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), serialList(args[1], n), 0o644))
}

func serialList(prefix string, n int) []byte {
	b := []byte("serial\n")
	for i := range n {
		b = fmt.Appendf(b, "%s%06d\n", prefix, i)
	}
	return b
}

// flip FILE OFFSET, flip FILE TEXT: changes one octet, at the offset or where the text stands last.
func flipCmd(ts *testscript.TestScript, neg bool, args []string) {
	b, err := os.ReadFile(ts.MkAbs(args[0]))
	ts.Check(err)
	var at int
	if _, err := fmt.Sscan(args[1], &at); err != nil {
		if at = strings.LastIndex(string(b), args[1]); at < 0 {
			ts.Fatalf("%s holds no %q", args[0], args[1])
		}
	}
	b[at] ^= 1
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), b, 0o644))
}

// exits CODE COMMAND ...: runs touchmark and wants exactly that exit code. Its output is for stdout and stderr as usual.
func exitsCmd(ts *testscript.TestScript, neg bool, args []string) {
	err := ts.Exec(args[1], args[2:]...)
	code := "0"
	if err != nil {
		code = strings.TrimPrefix(err.Error(), "exit status ")
	}
	if code != args[0] {
		ts.Fatalf("exit code %s, want %s\n%s", code, args[0], ts.ReadFile("stderr"))
	}
}

// stdout2file FILE: keeps what the last command printed.
func saveCmd(ts *testscript.TestScript, neg bool, args []string) {
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), []byte(strings.TrimSpace(ts.ReadFile("stdout"))+"\n"), 0o644))
}
