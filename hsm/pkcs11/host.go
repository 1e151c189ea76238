//go:build cgo

package pkcs11

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/touchmark/touchmark/hsm"
)

// A host is the process that a vendor's module is loaded in: p11-kit's "remote" program, which serves one module over one
// connection. This process speaks to it through p11-kit's client module. What crashes or hangs there is killed and started
// again; it takes nothing here along.
//
// The process is made for a connection and ends with it, also when we are killed: its standard input is the connection,
// and the kernel kills it when its parent dies (prctl PR_SET_PDEATHSIG).
type host struct {
	vendor  string // the module's path
	program string // p11-kit
	dir     string // holds the socket while the client connects, mode 0700
	bound   time.Duration
	log     *slog.Logger
	stop    chan struct{}
	done    chan struct{}

	// For the watchdog: how many callers are inside, and when something last came back, in Unix nanoseconds.
	inside   atomic.Int64
	progress atomic.Int64

	mu    sync.Mutex
	child *child // the present one; nil before the first
}

// child is a started process.
type child struct {
	pid    int
	stderr tail
	ended  chan struct{} // closed once it was waited for
	state  string        // how it ended; set before ended is closed
}

// defaultBound is how long a module in a process of its own may be silent while it is asked something. Making an RSA key
// in a smart card takes half a minute.
const defaultBound = 60 * time.Second

// clientMu guards P11_KIT_SERVER_ADDRESS: the client module reads it when C_GetFunctionList is called, and gives each caller
// a connection of its own (p11-kit 0.23.3 and later), so several hosts work side by side on one loaded client module.
var clientMu sync.Mutex

const serverAddress = "P11_KIT_SERVER_ADDRESS"

func newHost(vendor string, bound time.Duration, log *slog.Logger) (*host, *pkcs11.Ctx, error) {
	vendor, err := filepath.Abs(vendor)
	if err != nil {
		return nil, nil, err
	}
	program, err := exec.LookPath("p11-kit")
	if err != nil {
		return nil, nil, fmt.Errorf("the program p11-kit is missing (Debian: apt-get install p11-kit): %w", hsm.ErrNotFound)
	}
	client := firstFile("/usr/lib/*/pkcs11/p11-kit-client.so", "/usr/lib64/pkcs11/p11-kit-client.so", "/usr/lib/pkcs11/p11-kit-client.so", "/usr/local/lib/pkcs11/p11-kit-client.so")
	if client == "" {
		return nil, nil, fmt.Errorf("p11-kit's client module p11-kit-client.so is missing (Debian: apt-get install p11-kit-modules): %w", hsm.ErrNotFound)
	}
	if bound <= 0 {
		bound = defaultBound
	}
	dir, err := os.MkdirTemp(socketDir(), "touchmark-p11-")
	if err != nil {
		return nil, nil, err
	}
	h := &host{vendor: vendor, program: program, dir: dir, bound: bound, log: log, stop: make(chan struct{}), done: make(chan struct{})}
	defer os.Remove(dir) // it is made anew for each connection
	ctx, err := loadClient(client, "unix:path="+h.socket())
	if err != nil {
		return nil, nil, err
	}
	go h.watch()
	return h, ctx, nil
}

// socketDir is where the socket's directory goes. A socket's path may have 107 octets, which TMPDIR alone may exceed.
func socketDir() string {
	if d := os.TempDir(); len(d) < 64 {
		return d
	}
	return "/tmp"
}

func (h *host) socket() string { return filepath.Join(h.dir, "s") }

func loadClient(client, address string) (*pkcs11.Ctx, error) {
	clientMu.Lock()
	defer clientMu.Unlock()
	before, had := os.LookupEnv(serverAddress)
	if err := os.Setenv(serverAddress, address); err != nil {
		return nil, err
	}
	defer func() {
		if had {
			_ = os.Setenv(serverAddress, before)
		} else {
			_ = os.Unsetenv(serverAddress)
		}
	}()
	return loadLibrary(client)
}

// connect runs initialize, which connects the client module to a socket, and starts the process at its other end. The
// socket is there for that moment only.
func (h *host) connect(initialize func() error) error {
	h.kill()
	if err := os.Mkdir(h.dir, 0o700); err != nil {
		return err
	}
	defer os.RemoveAll(h.dir)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: h.socket(), Net: "unix"})
	if err != nil {
		return err
	}
	started := make(chan error, 1)
	go func() { started <- h.accept(l) }()
	h.enter()
	err = initialize()
	h.leave()
	_ = l.Close()
	if serr := <-started; serr != nil {
		return errors.Join(serr, err)
	}
	if err != nil {
		return fmt.Errorf("%w%s", err, h.lastWords())
	}
	return nil
}

// accept starts the process for the one connection that comes.
func (h *host) accept(l *net.UnixListener) error {
	conn, err := l.AcceptUnix()
	if err != nil {
		return fmt.Errorf("p11-kit's client module did not connect: %w", err)
	}
	f, err := conn.File()
	_ = conn.Close()
	if err != nil {
		return err
	}
	// Our copy goes: the client must see the end of the connection when the process ends.
	defer f.Close()
	return h.start(f)
}

func (h *host) start(conn *os.File) error {
	c := &child{ended: make(chan struct{})}
	cmd := exec.Command(h.program, "remote", h.vendor)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = conn, conn, &c.stderr
	cmd.Env = withoutSecrets(os.Environ())
	cmd.WaitDelay = time.Second
	// A group of its own: a terminal's ^C is for us, who still have to log out.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	err := make(chan error)
	go func() {
		// The kernel takes the thread that made the child for its parent, so that thread lives as long (Go issue 27505).
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		if e := cmd.Start(); e != nil {
			err <- fmt.Errorf("starting p11-kit remote: %w", e)
			return
		}
		c.pid = cmd.Process.Pid
		err <- nil
		_ = cmd.Wait()
		c.state = cmd.ProcessState.String()
		close(c.ended)
	}()
	if err := <-err; err != nil {
		return err
	}
	h.mu.Lock()
	h.child = c
	h.mu.Unlock()
	return nil
}

// withoutSecrets returns the environment that the vendor's module may see.
func withoutSecrets(env []string) []string {
	var out []string
	for _, v := range env {
		if !strings.HasPrefix(v, "TOUCHMARK_") {
			out = append(out, v)
		}
	}
	return out
}

// kill ends the process and waits until it is gone.
func (h *host) kill() {
	h.mu.Lock()
	c := h.child
	h.mu.Unlock()
	if c == nil {
		return
	}
	select {
	case <-c.ended:
		return
	default:
	}
	_ = syscall.Kill(-c.pid, syscall.SIGKILL) // its group: a vendor's module may start processes too
	<-c.ended
}

func (h *host) enter() {
	if h.inside.Add(1) == 1 {
		h.beat()
	}
}

func (h *host) leave() {
	h.beat()
	h.inside.Add(-1)
}

func (h *host) beat() { h.progress.Store(time.Now().UnixNano()) }

// watch is the watchdog. Once the process is dead its callers get an error from the client module.
func (h *host) watch() {
	defer close(h.done)
	tick := time.NewTicker(max(h.bound/8, 5*time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-h.stop:
			return
		case <-tick.C:
			if silent := time.Since(time.Unix(0, h.progress.Load())); h.inside.Load() > 0 && silent > h.bound {
				h.log.Warn("PKCS#11 module hangs; its process is killed", "module", h.vendor, "silent", silent)
				h.kill()
				h.beat()
			}
		}
	}
}

// ended reports whether the process is gone. Its connection ends a moment before it was waited for.
func (h *host) ended() bool {
	h.mu.Lock()
	c := h.child
	h.mu.Unlock()
	if c == nil {
		return false
	}
	select {
	case <-c.ended:
		return true
	case <-time.After(50 * time.Millisecond):
		return false
	}
}

// lastWords returns what is known of a process that ended, to add to an error.
func (h *host) lastWords() string {
	if !h.ended() {
		return ""
	}
	h.mu.Lock()
	c := h.child
	h.mu.Unlock()
	if words := c.stderr.String(); words != "" {
		return fmt.Sprintf(" (its process ended: %s: %s)", c.state, words)
	}
	return fmt.Sprintf(" (its process ended: %s)", c.state)
}

// close ends the process for good.
func (h *host) close() {
	close(h.stop)
	<-h.done
	h.kill()
}

// tail keeps the end of what a process said.
type tail struct {
	mu sync.Mutex
	b  []byte
}

const maxTail = 512

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.b = append(t.b, p...)
	if len(t.b) > maxTail {
		t.b = t.b[len(t.b)-maxTail:]
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.Join(strings.Fields(strings.ToValidUTF8(string(t.b), "")), " ")
}
