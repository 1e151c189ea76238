//go:build cgo

package pkcs11

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/miekg/pkcs11"

	"github.com/touchmark/touchmark/hsm"
)

// modulePath returns the library that a caller named, or the environment did.
func modulePath(path string) (string, error) {
	if path == "" {
		path = os.Getenv("TOUCHMARK_PKCS11_MODULE")
	}
	if path == "" {
		return "", fmt.Errorf("%w: name its library with module-path in the key URI, or in TOUCHMARK_PKCS11_MODULE", hsm.ErrNoModule)
	}
	return path, nil
}

// Inspect asks a module for itself and its tokens. Nobody logs in. Errors are those of Open for modules.
func Inspect(_ context.Context, path string) (_ *Module, err error) {
	if path, err = modulePath(path); err != nil {
		return nil, err
	}
	m, err := loadModule(path)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, m.release()) }()
	return m.describe()
}

func (m *module) describe() (*Module, error) {
	info, err := m.ctx.GetInfo()
	if err != nil {
		return nil, fmt.Errorf("asking module %s for itself: %w", m.path, err)
	}
	out := &Module{Path: m.path, Manufacturer: trim(info.ManufacturerID), Description: trim(info.LibraryDescription),
		Version: version(info.LibraryVersion), Cryptoki: version(info.CryptokiVersion), Tokens: []Token{}}
	slots, err := m.ctx.GetSlotList(true)
	if err != nil {
		return nil, fmt.Errorf("listing the slots of module %s: %w", m.path, err)
	}
	for _, s := range slots {
		info, err := m.ctx.GetTokenInfo(s)
		if err != nil {
			continue // pulled meanwhile
		}
		out.Tokens = append(out.Tokens, tokenOf(s, info))
	}
	return out, nil
}

func version(v pkcs11.Version) string { return fmt.Sprintf("%d.%d", v.Major, v.Minor) }

func tokenOf(slot uint, info pkcs11.TokenInfo) Token {
	t := Token{Slot: slot, Label: trim(info.Label), Manufacturer: trim(info.ManufacturerID), Model: trim(info.Model), Serial: trim(info.SerialNumber),
		Hardware: version(info.HardwareVersion), Firmware: version(info.FirmwareVersion),
		Initialized: info.Flags&pkcs11.CKF_TOKEN_INITIALIZED != 0, Login: info.Flags&pkcs11.CKF_LOGIN_REQUIRED != 0, ReadOnly: info.Flags&pkcs11.CKF_WRITE_PROTECTED != 0}
	t.UserPIN = pinState(info.Flags, pkcs11.CKF_USER_PIN_LOCKED, pkcs11.CKF_USER_PIN_FINAL_TRY, pkcs11.CKF_USER_PIN_COUNT_LOW, pkcs11.CKF_USER_PIN_TO_BE_CHANGED)
	if info.Flags&pkcs11.CKF_USER_PIN_INITIALIZED == 0 {
		t.UserPIN = PINUnset
	}
	t.SOPIN = pinState(info.Flags, pkcs11.CKF_SO_PIN_LOCKED, pkcs11.CKF_SO_PIN_FINAL_TRY, pkcs11.CKF_SO_PIN_COUNT_LOW, pkcs11.CKF_SO_PIN_TO_BE_CHANGED)
	if !t.Initialized {
		t.SOPIN = PINUnset
	}
	t.Sessions, t.MaxSessions, t.FreeMemory = known(info.RwSessionCount), known(info.MaxRwSessionCount), known(info.FreePrivateMemory)
	return t
}

func pinState(flags, locked, final, low, change uint) PINState {
	switch {
	case flags&locked != 0:
		return PINLocked
	case flags&final != 0:
		return PINFinalTry
	case flags&low != 0:
		return PINCountLow
	case flags&change != 0:
		return PINToChange
	}
	return PINReady
}

// known returns nil for CK_UNAVAILABLE_INFORMATION.
func known(n uint) *uint {
	if n == pkcs11.CK_UNAVAILABLE_INFORMATION {
		return nil
	}
	return &n
}

// Init makes a blank token ready for use: label, SO PIN, user PIN. A token of that label that has no user PIN yet, as a
// run before may have left one, gets its user PIN. Errors: hsm.ErrExists when a ready token has the label, hsm.ErrNotFound
// when there is no blank one, hsm.ErrPINIncorrect.
func Init(ctx context.Context, cfg InitConfig) (_ Token, err error) {
	var none Token
	if cfg.Label == "" || len(cfg.Label) > 32 {
		return none, fmt.Errorf("token label %q: want 1 to 32 octets", cfg.Label)
	}
	path, err := modulePath(cfg.ModulePath)
	if err != nil {
		return none, err
	}
	m, err := loadModule(path)
	if err != nil {
		return none, err
	}
	defer func() { err = errors.Join(err, m.release()) }()
	seen, err := m.describe()
	if err != nil {
		return none, err
	}
	var blank, half *Token
	for i := range seen.Tokens {
		t := &seen.Tokens[i]
		switch {
		case t.Initialized && t.Label == cfg.Label && t.UserPIN != PINUnset:
			return none, fmt.Errorf("token %q: %w (serial %s)", cfg.Label, hsm.ErrExists, t.Serial)
		case t.Initialized && t.Label == cfg.Label:
			half = t
		case !t.Initialized && (cfg.Serial == "" || t.Serial == cfg.Serial):
			blank = t
		}
	}
	if half == nil && blank == nil {
		return none, fmt.Errorf("a blank token: %w: all %d tokens of module %s are in use", hsm.ErrNotFound, len(seen.Tokens), path)
	}
	so, err := cfg.SOPIN(ctx)
	if err != nil {
		return none, err
	}
	defer so.Wipe()
	user, err := cfg.UserPIN(ctx)
	if err != nil {
		return none, err
	}
	defer user.Wipe()
	if half == nil {
		if err := m.ctx.InitToken(blank.Slot, string(so), cfg.Label); err != nil {
			return none, fmt.Errorf("initializing the token in slot %d: %w", blank.Slot, err)
		}
	}
	// The token may have another slot and serial by now, and is found by its new label.
	slot, _, err := m.findSlot(hsm.URI{Scheme: hsm.SchemePKCS11, Token: cfg.Label})
	if err != nil {
		return none, err
	}
	h, err := m.ctx.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		return none, fmt.Errorf("opening a session: %w", err)
	}
	defer func() { err = errors.Join(err, m.ctx.CloseSession(h)) }()
	if err := m.ctx.Login(h, pkcs11.CKU_SO, string(so)); err != nil {
		return none, fmt.Errorf("logging in as security officer: %w", loginError(err))
	}
	err = m.ctx.InitPIN(h, string(user))
	if err != nil {
		err = fmt.Errorf("setting the user PIN: %w", err)
	}
	if err = errors.Join(err, m.ctx.Logout(h)); err != nil {
		return none, err
	}
	info, err := m.ctx.GetTokenInfo(slot)
	if err != nil {
		return none, err
	}
	return tokenOf(slot, info), nil
}

// Token asks the token for itself.
func (s *Store) Token(ctx context.Context) (t Token, err error) {
	err = s.with(ctx, true, func(pkcs11.SessionHandle) error {
		s.mu.Lock()
		slot := s.slot
		s.mu.Unlock()
		info, err := s.mod.ctx.GetTokenInfo(slot)
		t = tokenOf(slot, info)
		return err
	})
	return t, err
}

// Objects counts what the token holds. Its cost grows with that.
func (s *Store) Objects(ctx context.Context) (n Objects, err error) {
	err = s.with(ctx, true, func(h pkcs11.SessionHandle) error {
		for class, dst := range map[uint]*int{pkcs11.CKO_PRIVATE_KEY: &n.PrivateKeys, pkcs11.CKO_PUBLIC_KEY: &n.PublicKeys, pkcs11.CKO_SECRET_KEY: &n.SecretKeys,
			pkcs11.CKO_CERTIFICATE: &n.Certificates, pkcs11.CKO_DATA: &n.Data} {
			found, err := s.find(h, pkcs11.NewAttribute(pkcs11.CKA_CLASS, class), pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true))
			if err != nil {
				return err
			}
			*dst = len(found)
		}
		return nil
	})
	return n, err
}

// Identity implements [hsm.Identifier].
func (s *Store) Identity(ctx context.Context) (hsm.Identity, error) {
	t, err := s.Token(ctx)
	if err != nil {
		return hsm.Identity{}, err
	}
	info, err := s.mod.ctx.GetInfo()
	if err != nil {
		return hsm.Identity{}, fmt.Errorf("asking module %s for itself: %w", s.mod.path, err)
	}
	return hsm.Identity{Label: t.Label, Serial: t.Serial, Manufacturer: t.Manufacturer, Model: t.Model, Firmware: t.Firmware,
		Module: trim(info.LibraryDescription), ModuleVersion: version(info.LibraryVersion), ModuleManufacturer: trim(info.ManufacturerID)}, nil
}
