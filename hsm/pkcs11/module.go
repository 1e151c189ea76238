//go:build cgo

package pkcs11

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"

	"github.com/miekg/pkcs11"

	"github.com/touchmark/touchmark/hsm"
)

// A module is a loaded library. PKCS#11 initializes it once per process, so stores of one module share it.
type module struct {
	path string
	ctx  *pkcs11.Ctx

	mu   sync.Mutex // serializes initialization
	refs int
}

var (
	modulesMu sync.Mutex
	modules   = make(map[string]*module)
)

// loadModule loads and initializes a library, or shares the one that is loaded already.
func loadModule(path string) (*module, error) {
	modulesMu.Lock()
	defer modulesMu.Unlock()
	if m := modules[path]; m != nil {
		m.refs++
		return m, nil
	}
	if _, err := os.Stat(path); err != nil {
		return nil, fmt.Errorf("PKCS#11 module %s: %w: %w", path, hsm.ErrNotFound, err)
	}
	ctx := pkcs11.New(path)
	if ctx == nil {
		return nil, fmt.Errorf("PKCS#11 module %s: it is no PKCS#11 library that this machine can load", path)
	}
	m := &module{path: path, ctx: ctx, refs: 1}
	if err := m.initialize(); err != nil {
		ctx.Destroy()
		return nil, fmt.Errorf("PKCS#11 module %s: %w", path, err)
	}
	modules[path] = m
	return m, nil
}

func (m *module) initialize() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	// Somebody else in this process may have initialized it: it is theirs to finalize then, and works for us too.
	if err := m.ctx.Initialize(); err != nil && !errors.Is(err, pkcs11.Error(pkcs11.CKR_CRYPTOKI_ALREADY_INITIALIZED)) {
		return fmt.Errorf("initializing: %w", err)
	}
	return nil
}

// release gives a reference back; the last one finalizes the module.
func (m *module) release() error {
	modulesMu.Lock()
	defer modulesMu.Unlock()
	if m.refs--; m.refs > 0 {
		return nil
	}
	delete(modules, m.path)
	err := m.ctx.Finalize()
	if errors.Is(err, pkcs11.Error(pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED)) {
		err = nil
	}
	m.ctx.Destroy()
	return err
}

// findSlot returns the slot of the one token that matches the URI.
func (m *module) findSlot(u hsm.URI) (uint, pkcs11.TokenInfo, error) {
	var none pkcs11.TokenInfo
	slots, err := m.ctx.GetSlotList(true)
	if err != nil {
		return 0, none, fmt.Errorf("listing slots: %w", err)
	}
	var slot uint
	var token pkcs11.TokenInfo
	var matches, labels []string
	for _, s := range slots {
		info, err := m.ctx.GetTokenInfo(s)
		if err != nil || info.Flags&pkcs11.CKF_TOKEN_INITIALIZED == 0 {
			continue // pulled meanwhile, or blank
		}
		labels = append(labels, fmt.Sprintf("%q (serial %s)", trim(info.Label), trim(info.SerialNumber)))
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
		return 0, none, fmt.Errorf("no token matches %s (%s): %w", describe(u), there, hsm.ErrNotFound)
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
