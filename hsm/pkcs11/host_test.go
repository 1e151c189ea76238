//go:build cgo

package pkcs11

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/hsmtest"
)

// needBridge ends the test without p11-kit.
func needBridge(t testing.TB) {
	t.Helper()
	if _, err := exec.LookPath("p11-kit"); err != nil {
		hsmtest.Require(t, "p11-kit (apt-get install p11-kit p11-kit-modules)")
	}
}

// outside returns the URI of the same token, its module in a process of its own.
func outside(t testing.TB, uri hsm.URI) hsm.URI {
	t.Helper()
	needBridge(t)
	uri.ModulePath = outOfProcess + uri.ModulePath
	return uri
}

func openOutside(t testing.TB, uri hsm.URI, bound time.Duration) *Store {
	t.Helper()
	s, err := Open(t.Context(), Config{URI: outside(t, uri), PIN: pin(hsmtest.PIN, nil), CallTimeout: bound, Patience: 20 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func (h *host) pid() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.child.pid
}

// orphans counts objects on the token that belong to no key: public halves without a private one, names that stand twice.
func orphans(t *testing.T, s *Store, want int) {
	t.Helper()
	keys, err := s.List(t.Context(), "device:")
	if err != nil {
		t.Fatal(err)
	}
	names := make(map[string]bool)
	for _, k := range keys {
		if names[k.Name()] {
			t.Errorf("two keys are called %s", k.Name())
		}
		names[k.Name()] = true
	}
	if len(names) != want {
		t.Errorf("%d keys, want %d", len(names), want)
	}
	s.mod.enter()
	defer s.mod.leave()
	publics, err := s.indexPublics(s.keeper)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, p := range publics {
		n += len(p)
	}
	if n != want {
		t.Errorf("%d public key objects, want %d", n, want)
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// While five hundred keys are made, the process that the module is in is killed again and again.
func TestKilledInABatch(t *testing.T) {
	uri := hsmtest.SoftHSM(t, "line-3")
	mend := hsmtest.Mender(t)
	s := openOutside(t, uri, time.Minute)
	const count = 500
	before := openFiles(t)
	var next, made, kills atomic.Int64
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for {
				i := next.Add(1)
				if i > count {
					return
				}
				// What the station does: a unit that the token was lost under waits, and is taken up again.
				for {
					k, err := s.Generate(t.Context(), hsm.Spec{Name: fmt.Sprintf("device:%03d", i), Algorithm: hsm.ECP256})
					if errors.Is(err, hsm.ErrLost) {
						continue
					}
					if err != nil {
						t.Errorf("key %d: %v", i, err)
						break
					}
					digest := sha256.Sum256([]byte{byte(i)})
					if _, err := k.(hsm.SigningKey).Sign(rand.Reader, digest[:], crypto.SHA256); err != nil && !errors.Is(err, hsm.ErrLost) {
						t.Errorf("signing with key %d: %v", i, err)
					}
					break
				}
				if m := made.Add(1); m%60 == 0 {
					kills.Add(1)
					_ = syscall.Kill(s.mod.host.pid(), syscall.SIGKILL)
					mend() // should it have been in SoftHSM's login
				}
			}
		})
	}
	wg.Wait()
	if kills.Load() < 5 {
		t.Fatalf("only %d kills", kills.Load())
	}
	if after := openFiles(t); after > before+4 { // the connection of the present process, and what the runtime may want
		t.Errorf("%d open files became %d over %d kills", before, after, kills.Load())
	}
	orphans(t, s, count)
}

// When the process dies with many callers waiting for it, every one of them hears of it: p11-kit 0.24 tells one.
func TestKilledWithManyInside(t *testing.T) {
	s := openOutside(t, hsmtest.SoftHSM(t, "line-3"), time.Minute)
	k, err := s.Generate(t.Context(), hsm.Spec{Name: "signer", Algorithm: hsm.ECP256})
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	for range 40 {
		var wg sync.WaitGroup
		for range 16 {
			wg.Go(func() { hsmtest.Check(t, k.(hsm.SigningKey)) })
		}
		_ = syscall.Kill(s.mod.host.pid(), syscall.SIGKILL)
		wg.Wait()
	}
	if took := time.Since(began); took > 15*time.Second {
		t.Errorf("it took %s: somebody waited in vain", took)
	}
}

// Keys that are brought in have two halves that are made one after the other.
func TestKilledInABatchOfImports(t *testing.T) {
	uri := hsmtest.SoftHSM(t, "line-3")
	mend := hsmtest.Mender(t)
	s := openOutside(t, uri, time.Minute)
	priv, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(priv)
	if err != nil {
		t.Fatal(err)
	}
	const count = 200
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-done:
				return
			case <-time.After(25 * time.Millisecond): // at any instant of an import
				_ = syscall.Kill(s.mod.host.pid(), syscall.SIGKILL)
				mend()
			}
		}
	})
	for i := range count {
		for {
			_, err := s.Import(t.Context(), hsm.Spec{Name: fmt.Sprintf("device:%03d", i), Algorithm: hsm.ECP256}, der)
			if errors.Is(err, hsm.ErrLost) {
				continue
			}
			if err != nil {
				t.Errorf("key %d: %v", i, err)
			}
			break
		}
	}
	close(done)
	wg.Wait()
	orphans(t, s, count)
	for i := range count {
		if err := s.Delete(t.Context(), fmt.Sprintf("device:%03d", i)); err != nil {
			t.Error(err)
		}
	}
	orphans(t, s, 0)
}

// A key that may have been made when its caller gave up is the one that the next caller gets.
func TestDoubt(t *testing.T) {
	s := openOutside(t, hsmtest.SoftHSM(t, "line-3"), time.Minute)
	spec := hsm.Spec{Name: "device:1", Algorithm: hsm.ECP256}
	ctx, cancel := context.WithCancel(t.Context())
	_, err := s.create(ctx, spec, func(h pkcs11.SessionHandle, spec hsm.Spec, id []byte) (priv, pub pkcs11.ObjectHandle, err error) {
		if _, _, err := s.generate(h, spec, id); err != nil {
			t.Error(err)
		}
		cancel()
		return 0, 0, pkcs11.Error(pkcs11.CKR_DEVICE_ERROR) // the answer is lost
	})
	if !errors.Is(err, hsm.ErrLost) {
		t.Fatalf("the answer was lost: %v", err)
	}
	other := spec
	other.Algorithm = hsm.ECP384
	if _, err := s.Generate(t.Context(), other); !errors.Is(err, hsm.ErrExists) {
		t.Errorf("a key of another kind: %v", err)
	}
	if _, err := s.Generate(t.Context(), spec); !errors.Is(err, hsm.ErrExists) {
		t.Errorf("after that: %v", err) // its kind was looked at, and it is somebody's key
	}
	if err := s.Delete(t.Context(), spec.Name); err != nil {
		t.Fatal(err)
	}
	// Again, and the caller who lost it comes back.
	ctx, cancel = context.WithCancel(t.Context())
	_, err = s.create(ctx, spec, func(h pkcs11.SessionHandle, spec hsm.Spec, id []byte) (priv, pub pkcs11.ObjectHandle, err error) {
		_, _, _ = s.generate(h, spec, id)
		cancel()
		return 0, 0, pkcs11.Error(pkcs11.CKR_DEVICE_ERROR)
	})
	if !errors.Is(err, hsm.ErrLost) {
		t.Fatalf("the answer was lost: %v", err)
	}
	k, err := s.Generate(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	hsmtest.Check(t, k.(hsm.SigningKey))
	if _, err := s.Generate(t.Context(), spec); !errors.Is(err, hsm.ErrExists) {
		t.Errorf("once it is known: %v", err)
	}
	orphans(t, s, 1)
}

func TestCallTimeout(t *testing.T) {
	t.Setenv("TOUCHMARK_PKCS11_TIMEOUT", "soon")
	if _, err := callTimeout(Config{}); err == nil || !strings.Contains(err.Error(), "TOUCHMARK_PKCS11_TIMEOUT") {
		t.Errorf("%v", err)
	}
	t.Setenv("TOUCHMARK_PKCS11_TIMEOUT", "7s")
	if d, err := callTimeout(Config{}); d != 7*time.Second || err != nil {
		t.Errorf("%s, %v", d, err)
	}
	if d, err := callTimeout(Config{CallTimeout: time.Second}); d != time.Second || err != nil {
		t.Errorf("%s, %v", d, err)
	}
}

// The same with p11-kit's own server, which is killed and started again by somebody else.
func TestServerKilledInABatch(t *testing.T) {
	uri, bridge := hsmtest.P11Kit(t, hsmtest.SoftHSM(t, "line-3"))
	s, err := Open(t.Context(), Config{URI: uri, PIN: pin(hsmtest.PIN, nil), Patience: 20 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	const count = 500
	started := make(chan struct{})
	for i := range count {
		switch {
		case i%100 == 95:
			<-started
		case i%100 == 50:
			bridge.Kill()
			bridge.Start()
		case i%100 == 90:
			bridge.Kill()
			go func() { bridge.Start(); started <- struct{}{} }() // while the next key is asked for
		}
		if _, err := s.Generate(t.Context(), hsm.Spec{Name: fmt.Sprintf("device:%03d", i), Algorithm: hsm.ECP256}); err != nil {
			t.Fatalf("key %d: %v", i, err)
		}
	}
	orphans(t, s, count)
}

// A module that hangs is killed by the watchdog, and the operation that it hung in is done by the next one.
func TestHangingModule(t *testing.T) {
	var log bytes.Buffer
	uri := outside(t, hsmtest.SoftHSM(t, "line-3"))
	s, err := Open(t.Context(), Config{URI: uri, PIN: pin(hsmtest.PIN, nil), CallTimeout: 300 * time.Millisecond, Log: slog.New(slog.NewTextHandler(&log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	k, err := s.Generate(t.Context(), hsm.Spec{Name: "signer", Algorithm: hsm.ECP256})
	if err != nil {
		t.Fatal(err)
	}
	signing := k.(hsm.SigningKey)
	for range 3 {
		before := s.mod.host.pid()
		if err := syscall.Kill(before, syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		hsmtest.Check(t, signing)
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("it took %s", took)
		}
		if s.mod.host.pid() == before {
			t.Error("the process that hung is still there")
		}
		if err := syscall.Kill(before, 0); !errors.Is(err, syscall.ESRCH) {
			t.Errorf("the process that hung: %v", err)
		}
	}
	// Many callers, all of whom are inside when it hangs.
	if err := syscall.Kill(s.mod.host.pid(), syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 24 {
		wg.Go(func() { hsmtest.Check(t, signing) })
	}
	wg.Wait()
	// Making a key in a process that is stopped makes one.
	if err := syscall.Kill(s.mod.host.pid(), syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Generate(t.Context(), hsm.Spec{Name: "device:1", Algorithm: hsm.ECP256}); err != nil {
		t.Error(err)
	}
	if keys, err := s.List(t.Context(), ""); err != nil || len(keys) != 2 {
		t.Errorf("%d keys, %v", len(keys), err)
	}
	// Nor does closing hang.
	if err := syscall.Kill(s.mod.host.pid(), syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if !strings.Contains(log.String(), "hangs") {
		t.Errorf("the log does not tell: %s", log.String())
	}
}

// A slow key is no hang: the calls that wait behind it are not counted against the module.
func TestWatchdogIsPatient(t *testing.T) {
	s := openOutside(t, hsmtest.SoftHSM(t, "line-3"), 2*time.Second)
	before := s.mod.host.pid()
	var wg sync.WaitGroup
	for i := range 24 {
		wg.Go(func() {
			if _, err := s.Generate(t.Context(), hsm.Spec{Name: fmt.Sprintf("rsa-%d", i), Algorithm: hsm.RSA2048}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if s.mod.host.pid() != before {
		t.Error("the process was killed at work")
	}
}

// Several modules at once, each in a process of its own, on the one client module.
func TestTwoHosts(t *testing.T) {
	soft := hsmtest.SoftHSM(t, "line-3")
	nss := hsmtest.NSS(t, "line-4")
	a, b := openOutside(t, soft, 0), openOutside(t, nss, 0)
	direct := open(t, soft) // and one in this process
	for name, s := range map[string]*Store{"SoftHSM": a, "NSS": b} {
		if _, err := s.Generate(t.Context(), hsm.Spec{Name: name, Algorithm: hsm.ECP256}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if a.mod.host.pid() == b.mod.host.pid() {
		t.Error("they share a process")
	}
	if err := syscall.Kill(a.mod.host.pid(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	for name, s := range map[string]*Store{"SoftHSM": a, "NSS": b} {
		k, err := s.Open(t.Context(), name)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		hsmtest.Check(t, k.(hsm.SigningKey))
		if keys, err := s.List(t.Context(), ""); err != nil || len(keys) != 1 || keys[0].Name() != name {
			t.Errorf("%s holds %v, %v", name, keys, err)
		}
	}
	if _, err := direct.List(t.Context(), ""); err != nil {
		t.Error(err)
	}
}

// Two stores on one module: when its process is killed both come back, and neither gets the other's sessions.
func TestStoresShareAHost(t *testing.T) {
	uri := hsmtest.SoftHSM(t, "line-3")
	a, b := openOutside(t, uri, 0), openOutside(t, uri, 0)
	if a.mod != b.mod {
		t.Fatal("they do not share a module")
	}
	var keys []hsm.SigningKey
	for i, s := range []*Store{a, b} {
		k, err := s.Generate(t.Context(), hsm.Spec{Name: strconv.Itoa(i), Algorithm: hsm.ECP256})
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, k.(hsm.SigningKey))
	}
	for range 5 {
		if err := syscall.Kill(a.mod.host.pid(), syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		for i := range 16 {
			wg.Go(func() { hsmtest.Check(t, keys[i%2]) })
		}
		wg.Wait()
	}
}

// A PIN that was changed while the process was away is tried once.
func TestChangedPINOutside(t *testing.T) {
	uri := hsmtest.SoftHSM(t, "line-3")
	s := openOutside(t, uri, 0)
	k, err := s.Generate(t.Context(), hsm.Spec{Name: "signer", Algorithm: hsm.ECP256})
	if err != nil {
		t.Fatal(err)
	}
	direct := open(t, uri)
	if err := direct.mod.ctx.SetPIN(direct.keeper, hsmtest.PIN, "8888"); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(s.mod.host.pid(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256(nil)
	for range 3 {
		if _, err := k.(hsm.SigningKey).Sign(rand.Reader, digest[:], crypto.SHA256); !errors.Is(err, hsm.ErrPINIncorrect) {
			t.Errorf("after the PIN was changed: %v", err)
		}
	}
	if s.refused == nil {
		t.Error("the refusal is not remembered: the PIN would be tried again")
	}
}

// What cannot be started says why.
func TestHostErrors(t *testing.T) {
	needBridge(t)
	text := filepath.Join(t.TempDir(), "module.so")
	if err := os.WriteFile(text, []byte("not a library"), 0o600); err != nil {
		t.Fatal(err)
	}
	try := func(module string) error {
		_, err := Open(t.Context(), Config{URI: hsm.URI{Scheme: hsm.SchemePKCS11, Token: "x", ModulePath: outOfProcess + module}, PIN: pin("x", nil), Patience: time.Millisecond})
		return err
	}
	if err := try(text); err == nil || !strings.Contains(err.Error(), text) {
		t.Errorf("no library: %v", err)
	}
	if err := try("/nowhere/lib.so"); !errors.Is(err, hsm.ErrNotFound) {
		t.Errorf("nowhere: %v", err)
	}
	module := hsmtest.SoftHSMModule(t)
	t.Setenv("PATH", t.TempDir())
	if err := try(module); !errors.Is(err, hsm.ErrNotFound) || !strings.Contains(err.Error(), "apt-get install p11-kit") {
		t.Errorf("without p11-kit: %v", err)
	}
}

// The process ends with us, also when we are killed, and leaves nothing behind.
func TestHostEndsWithUs(t *testing.T) {
	if os.Getenv("TOUCHMARK_TEST_HOST") != "" {
		u, err := hsm.ParseURI(os.Getenv("TOUCHMARK_TEST_HOST"))
		if err != nil {
			t.Fatal(err)
		}
		s, err := Open(context.Background(), Config{URI: u, PIN: pin(hsmtest.PIN, nil)})
		if err != nil {
			t.Fatal(err)
		}
		fmt.Printf("pid %d\n", s.mod.host.pid())
		select {}
	}
	uri := outside(t, hsmtest.SoftHSM(t, "line-3"))
	tmp := t.TempDir()
	cmd := exec.Command(os.Args[0], "-test.run=^TestHostEndsWithUs$", "-test.v")
	cmd.Env = append(os.Environ(), "TOUCHMARK_TEST_HOST="+uri.String(), "TMPDIR="+tmp, "TOUCHMARK_PIN=not-for-modules")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := 0
	buf := make([]byte, 4096)
	for text := ""; pid == 0; {
		n, err := out.Read(buf)
		if err != nil {
			t.Fatalf("%v: %s", err, text)
		}
		text += string(buf[:n])
		if _, after, ok := strings.Cut(text, "pid "); ok && strings.Contains(after, "\n") {
			pid, _ = strconv.Atoi(strings.TrimSpace(strings.SplitN(after, "\n", 2)[0]))
		}
	}
	env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
	if err != nil || len(env) == 0 || bytes.Contains(env, []byte("TOUCHMARK_")) {
		t.Errorf("the module's environment: %v %d", err, len(env))
	}
	if _, err := os.Stat(tmp); err != nil {
		t.Fatal(err)
	}
	// Stopped, it cannot see the end of its connection; the kernel's signal reaches it all the same.
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		state, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil || strings.Contains(string(state), ") Z ") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the module's process outlives us: %s", state)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(tmp, "touchmark-p11-*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}
