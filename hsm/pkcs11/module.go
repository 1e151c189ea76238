//go:build cgo

package pkcs11

/*
#cgo LDFLAGS: -ldl
#include <dlfcn.h>
#include <stdlib.h>

// tm_probe says why a file is no PKCS#11 module, or NULL when it may be one.
static const char *tm_probe(const char *path) {
	void *h = dlopen(path, RTLD_LAZY);
	if (h == NULL)
		return dlerror();
	if (dlsym(h, "C_GetFunctionList") == NULL) {
		dlclose(h);
		return "it is a library without C_GetFunctionList";
	}
	dlclose(h);
	return NULL;
}

// tm_wrap calls C_WrapKey once, with the buffer that it is given, where the binding asks for the length first. It is the
// function list's 61st function (PKCS#11 2.40 §A, pkcs11f.h).
typedef struct { unsigned char version[2]; void *functions[68]; } tm_list;
typedef struct { unsigned long mechanism; void *parameter; unsigned long length; } tm_mechanism;
typedef unsigned long (*tm_get_list)(tm_list **);
typedef unsigned long (*tm_wrap_key)(unsigned long, tm_mechanism *, unsigned long, unsigned long, unsigned char *, unsigned long *);

static unsigned long tm_wrap(const char *path, unsigned long session, unsigned long mechanism, unsigned long wrapping, unsigned long key, unsigned char *out, unsigned long *length) {
	unsigned long rv = 0x54; // CKR_FUNCTION_NOT_SUPPORTED
	void *h = dlopen(path, RTLD_LAZY);
	if (h == NULL)
		return rv;
	tm_get_list get = (tm_get_list)dlsym(h, "C_GetFunctionList");
	tm_list *list = NULL;
	if (get != NULL && get(&list) == 0 && list != NULL) {
		tm_mechanism m = {mechanism, NULL, 0};
		rv = ((tm_wrap_key)list->functions[60])(session, &m, wrapping, key, out, length);
	}
	dlclose(h);
	return rv;
}
*/
import "C"

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
	"unsafe"

	"github.com/miekg/pkcs11"

	"github.com/touchmark/touchmark/hsm"
)

// outOfProcess stands before a module's path when it is to be loaded in a process of its own.
const outOfProcess = "p11-kit:"

// A module is a loaded library. PKCS#11 initializes it once per process, so stores of one module share it.
type module struct {
	name string // as the key URI has it, with the arguments: what stores share it by
	ctx  *pkcs11.Ctx
	args unsafe.Pointer // C string for C_Initialize, or nil; in C's memory until release
	host *host          // the process that the vendor's module is in; nil when that is this one
	refs int            // guarded by modulesMu
	path string         // the library that ctx is
	// loads says that the module loads keys into a TPM's few slots to use them, and forgets to unload one that is deleted
	// (tpm2-pkcs11 1.9).
	loads bool
	// nss says that the module is NSS's, which wants to be told the public half of a key pair that it unwraps.
	nss bool

	// calls is held shared by whoever is inside the module, and exclusively to restart it: C_Finalize is undefined while
	// other threads are in a call (PKCS#11 2.40 §5.4).
	calls sync.RWMutex
	// Guarded by calls: how often the module was restarted, since session and object handles do not outlive that, and whether
	// the last time failed.
	epoch  int64
	broken bool

	// turn is for p11-kit's client module, which serves one caller after the other anyway: when its connection ends, 0.24 tells
	// one of those that wait, and the others wait for ever. So only one is inside. Nil for other modules.
	turn *sync.Mutex

	counting sync.Mutex // held by whoever works on a counter
}

var (
	modulesMu sync.Mutex
	modules   = make(map[string]*module)
)

// loadModule loads and initializes a library, or shares the one that is loaded already.
func loadModule(path, args string, bound time.Duration, log *slog.Logger) (*module, error) {
	modulesMu.Lock()
	defer modulesMu.Unlock()
	name := path + "\x00" + args
	if m := modules[name]; m != nil {
		m.refs++
		return m, nil
	}
	m := &module{name: name, refs: 1}
	vendor, remote := strings.CutPrefix(path, outOfProcess)
	if remote || strings.Contains(filepath.Base(path), "p11-kit-client") {
		m.turn = new(sync.Mutex)
	}
	if _, err := os.Stat(vendor); err != nil {
		return nil, fmt.Errorf("PKCS#11 module %s: %w: %w", vendor, hsm.ErrNotFound, err)
	}
	var err error
	if remote {
		if m.host, m.ctx, err = newHost(vendor, bound, log); err != nil {
			return nil, fmt.Errorf("PKCS#11 module %s in a process of its own: %w", vendor, err)
		}
	} else if m.ctx, err = loadLibrary(vendor); err != nil {
		return nil, fmt.Errorf("PKCS#11 module %s: %w", vendor, err)
	} else {
		m.path = vendor
	}
	if args != "" {
		m.args = unsafe.Pointer(C.CString(args))
	}
	if err := m.initialize(); err != nil {
		m.unload()
		return nil, fmt.Errorf("PKCS#11 module %s: %w", vendor, explained(err))
	}
	m.enter()
	info, err := m.ctx.GetInfo()
	m.leave()
	m.nss = err == nil && strings.HasPrefix(trim(info.ManufacturerID), "Mozilla")
	m.loads = err == nil && strings.HasPrefix(trim(info.ManufacturerID), "tpm2-software")
	modules[name] = m
	return m, nil
}

// loadLibrary loads a library into this process.
func loadLibrary(path string) (*pkcs11.Ctx, error) {
	p := C.CString(path)
	defer C.free(unsafe.Pointer(p))
	if why := C.tm_probe(p); why != nil {
		return nil, fmt.Errorf("it is no PKCS#11 module that this machine can load: %s", C.GoString(why))
	}
	ctx := pkcs11.New(path)
	if ctx == nil {
		return nil, errors.New("it is no PKCS#11 module that this machine can load")
	}
	return ctx, nil
}

// initialize calls C_Initialize. Nobody else may be inside the module.
func (m *module) initialize() error {
	options := []pkcs11.InitializeOption{pkcs11.InitializeWithReserved(m.args)}
	call := func() error { return m.ctx.Initialize(options...) }
	var err error
	if m.host != nil {
		err = m.host.connect(call)
	} else {
		err = call()
	}
	// Somebody else in this process may have initialized it: it is theirs to finalize then, and works for us too.
	if err != nil && !errors.Is(err, pkcs11.Error(pkcs11.CKR_CRYPTOKI_ALREADY_INITIALIZED)) {
		return fmt.Errorf("initializing: %w", err)
	}
	return nil
}

// enter goes before calls into the module, and leave behind them. Between the two the module is not restarted.
func (m *module) enter() {
	m.calls.RLock()
	if m.turn != nil {
		m.turn.Lock()
	}
	if m.host != nil {
		m.host.enter()
	}
}

func (m *module) leave() {
	if m.host != nil {
		m.host.leave()
	}
	if m.turn != nil {
		m.turn.Unlock()
	}
	m.calls.RUnlock()
}

// beat tells the watchdog that a call of many has come back.
func (m *module) beat() {
	if m.host != nil {
		m.host.beat()
	}
}

// alone runs f while nobody else is inside the module. It waits for whoever is, no longer than patience: a call that never
// returns from a library in this process cannot be helped.
func (m *module) alone(ctx context.Context, patience time.Duration, f func() error) error {
	for wait := time.Now(); !m.calls.TryLock(); {
		if time.Since(wait) > patience || ctx.Err() != nil {
			return errors.New("a call into the module does not come back")
		}
		time.Sleep(time.Millisecond)
	}
	defer m.calls.Unlock()
	if m.host != nil {
		m.host.enter()
		defer m.host.leave()
	}
	return f()
}

// restart finalizes and initializes the module, unless somebody did since epoch.
func (m *module) restart(ctx context.Context, epoch int64, patience time.Duration) error {
	return m.alone(ctx, patience, func() error {
		if m.epoch != epoch && !m.broken {
			return nil
		}
		m.epoch++
		if m.host != nil {
			m.host.kill() // whatever is asked of it now, it may be what hung
		}
		_ = m.ctx.Finalize()
		err := m.initialize()
		m.broken = err != nil
		return err
	})
}

// dead reports whether the module was in a process of its own that has ended.
func (m *module) dead() bool { return m.host != nil && m.host.ended() }

// wrapKey is C_WrapKey.
func (m *module) wrapKey(h pkcs11.SessionHandle, mech uint, wrapping, key pkcs11.ObjectHandle) ([]byte, error) {
	out, err := m.ctx.WrapKey(h, []*pkcs11.Mechanism{pkcs11.NewMechanism(mech, nil)}, wrapping, key)
	if !is(err, pkcs11.CKR_BUFFER_TOO_SMALL) || m.path == "" {
		return out, err
	}
	// NSS 3.87 announces fewer octets than it writes, and refuses a buffer of the size that it announced.
	path := C.CString(m.path)
	defer C.free(unsafe.Pointer(path))
	buffer := make([]byte, maxWrapped)
	length := C.ulong(len(buffer))
	if rv := C.tm_wrap(path, C.ulong(h), C.ulong(mech), C.ulong(wrapping), C.ulong(key), (*C.uchar)(unsafe.Pointer(&buffer[0])), &length); rv != pkcs11.CKR_OK {
		return nil, pkcs11.Error(rv)
	}
	return buffer[:min(int(length), len(buffer))], nil
}

// release gives a reference back; the last one finalizes the module.
func (m *module) release() error {
	modulesMu.Lock()
	defer modulesMu.Unlock()
	if m.refs--; m.refs > 0 {
		return nil
	}
	delete(modules, m.name)
	m.calls.Lock()
	defer m.calls.Unlock()
	if m.host != nil {
		m.host.enter() // so that the watchdog ends a hang here too
		defer m.host.leave()
	}
	err := m.ctx.Finalize()
	if m.host != nil || errors.Is(err, pkcs11.Error(pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED)) {
		err = nil // what is left of a module in another process ends with that process
	}
	m.unload()
	return err
}

func (m *module) unload() {
	if m.host != nil {
		m.host.close()
	}
	m.ctx.Destroy()
	C.free(m.args)
	m.args = nil
}

// findSlot returns the slot of the one token that matches the URI. The caller has entered the module.
func (m *module) findSlot(u hsm.URI) (uint, pkcs11.TokenInfo, error) {
	var none pkcs11.TokenInfo
	slots, err := m.ctx.GetSlotList(true)
	if err != nil {
		return 0, none, fmt.Errorf("listing slots: %w", err)
	}
	var slot uint
	var token pkcs11.TokenInfo
	var matches, labels, near []string
	for _, s := range slots {
		info, err := m.ctx.GetTokenInfo(s)
		if err != nil || info.Flags&pkcs11.CKF_TOKEN_INITIALIZED == 0 {
			continue // pulled meanwhile, or blank
		}
		labels = append(labels, fmt.Sprintf("%q (serial %s)", trim(info.Label), trim(info.SerialNumber)))
		near = append(near, trim(info.Label))
		if match(u.Token, info.Label) && match(u.Serial, info.SerialNumber) && match(u.Manufacturer, info.ManufacturerID) && match(u.Model, info.Model) {
			slot, token = s, info
			matches = append(matches, trim(info.SerialNumber))
		}
	}
	switch len(matches) {
	case 0:
		there := "there is no token"
		if len(labels) > 0 {
			there = "there are " + strings.Join(labels, ", ")
		}
		return 0, none, fmt.Errorf("no token matches %s (%s%s): %w", describe(u), there, didYouMean(u.Token, near), hsm.ErrNotFound)
	case 1:
		return slot, token, nil
	}
	return 0, none, fmt.Errorf("%d tokens match %s, with serials %s: name one with serial=… in the key URI", len(matches), describe(u), strings.Join(matches, ", "))
}

func describe(u hsm.URI) string {
	return strings.TrimPrefix(hsm.URI{Scheme: u.Scheme, Token: u.Token, Serial: u.Serial, Manufacturer: u.Manufacturer, Model: u.Model}.String(), "pkcs11:")
}

// match compares with a field that PKCS#11 pads with blanks; nothing asked matches everything.
func match(want, padded string) bool { return want == "" || want == trim(padded) }

func trim(padded string) string { return strings.TrimRight(padded, " \x00") }

// firstFile returns the first file that matches one of the patterns.
func firstFile(patterns ...string) string {
	for _, p := range patterns {
		if found, _ := filepath.Glob(p); len(found) > 0 {
			return found[0]
		}
	}
	return ""
}
