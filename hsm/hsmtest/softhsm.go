package hsmtest

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/touchmark/touchmark/hsm"
)

// PIN is the user PIN of the tokens that SoftHSM makes.
const PIN = "4711"

// Require ends the test without a neighbour that it needs: skipped, or failed when TOUCHMARK_TEST_REQUIRE is set.
func Require(t testing.TB, what string) {
	t.Helper()
	if os.Getenv("TOUCHMARK_TEST_REQUIRE") != "" {
		t.Fatalf("missing: %s", what)
	}
	t.Skipf("missing: %s", what)
}

// SoftHSMModule returns the path of SoftHSM's library.
func SoftHSMModule(t testing.TB) string {
	t.Helper()
	found, _ := filepath.Glob("/usr/lib/*/softhsm/libsofthsm2.so")
	for _, path := range append([]string{"/usr/lib/softhsm/libsofthsm2.so", "/usr/local/lib/softhsm/libsofthsm2.so"}, found...) {
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	Require(t, "SoftHSM (apt-get install softhsm2)")
	return ""
}

// memoryDir is a test's own directory, in memory where there is such a place: SoftHSM flushes a handful of files for every
// key, which a disk may take 60 ms for.
func memoryDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "hsm-test-*")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// SoftHSM makes tokens of these labels in the test's own directory and returns the key URI of the first. SoftHSM reads
// where its tokens are when its library is initialized, so a test closes its stores before the next one begins.
func SoftHSM(t testing.TB, labels ...string) hsm.URI {
	t.Helper()
	return SoftHSMIn(t, memoryDir(t), labels...)
}

// SoftHSMIn makes tokens in a directory of the caller's.
func SoftHSMIn(t testing.TB, dir string, labels ...string) hsm.URI {
	t.Helper()
	module := SoftHSMModule(t)
	conf := filepath.Join(dir, "softhsm2.conf")
	tokens := filepath.Join(dir, "tokens")
	if err := os.Mkdir(tokens, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(conf, []byte("directories.tokendir = "+tokens+"\nobjectstore.backend = file\nlog.level = ERROR\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SOFTHSM2_CONF", conf)
	for _, label := range labels {
		out, err := exec.Command("softhsm2-util", "--init-token", "--free", "--label", label, "--pin", PIN, "--so-pin", "12345678").CombinedOutput()
		if err != nil {
			t.Fatalf("softhsm2-util: %v\n%s", err, out)
		}
	}
	pin := filepath.Join(dir, "pin")
	if err := os.WriteFile(pin, []byte(PIN+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return hsm.URI{Scheme: hsm.SchemePKCS11, Token: labels[0], ModulePath: module, PINSource: "file:" + pin}
}

// Mender remembers what SoftHSM wrote down about its tokens (label, PIN, not their keys) and returns a function that puts
// it back where a kill cut it off, and reports whether it had to. SoftHSM truncates and rewrites that file at each login, so
// a process that is killed in that instant leaves no token behind; a token of silicon does no such thing.
func Mender(t testing.TB) (mend func() bool) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(filepath.Dir(os.Getenv("SOFTHSM2_CONF")), "tokens", "*", "token.object"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no token of SoftHSM: %v", err)
	}
	whole := make(map[string][]byte, len(files))
	for _, f := range files {
		if whole[f], err = os.ReadFile(f); err != nil {
			t.Fatal(err)
		}
	}
	return func() (mended bool) {
		for f, b := range whole {
			if st, err := os.Stat(f); err != nil || st.Size() >= int64(len(b)) {
				continue
			}
			if err := os.WriteFile(f, b, 0o600); err != nil {
				t.Fatal(err)
			}
			mended = true
		}
		return mended
	}
}
