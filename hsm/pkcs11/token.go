//go:build cgo

package pkcs11

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
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

// load loads the module that a key URI names, or the environment does. The caller releases it.
func load(u hsm.URI) (*module, string, error) {
	path, err := modulePath(u.ModulePath)
	if err != nil {
		return nil, "", err
	}
	bound, err := callTimeout(Config{})
	if err != nil {
		return nil, "", err
	}
	m, err := loadModule(path, u.InitArgs, bound, slog.New(slog.DiscardHandler))
	return m, path, err
}

// Inspect asks the module that a key URI names for itself and its tokens. Nobody logs in. Errors are those of Open for
// modules.
func Inspect(_ context.Context, u hsm.URI) (_ *Module, err error) {
	m, path, err := load(u)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, m.release()) }()
	m.enter()
	defer m.leave()
	out, err := m.describe(path)
	return out, explained(err)
}

// Examine asks the module that a key URI names for the one token that it names, and for what that announces to be able to do.
// Nobody logs in. The module comes back with an error about the token, too.
func Examine(_ context.Context, u hsm.URI) (_ *Module, _ *Token, _ []Capability, err error) {
	m, path, err := load(u)
	if err != nil {
		return nil, nil, nil, err
	}
	defer func() { err = errors.Join(explained(err), m.release()) }()
	m.enter()
	defer m.leave()
	module, err := m.describe(path)
	if err != nil {
		return nil, nil, nil, err
	}
	slot, info, err := m.findSlot(u)
	if err != nil {
		return module, nil, nil, err
	}
	t := tokenOf(slot, info)
	mechs, err := m.mechanisms(slot)
	if err != nil {
		return module, &t, nil, err
	}
	return module, &t, mechs.capabilities(), nil
}

// describe asks the module for itself. The caller has entered it.
func (m *module) describe(path string) (*Module, error) {
	info, err := m.ctx.GetInfo()
	if err != nil {
		return nil, fmt.Errorf("asking module %s for itself: %w", path, err)
	}
	out := &Module{Path: path, Manufacturer: trim(info.ManufacturerID), Description: trim(info.LibraryDescription),
		Version: version(info.LibraryVersion), Cryptoki: version(info.CryptokiVersion), Tokens: []Token{}}
	slots, err := m.ctx.GetSlotList(true)
	if err != nil {
		return nil, fmt.Errorf("listing the slots of module %s: %w", path, err)
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
	label := cfg.URI.Token
	if label == "" || len(label) > 32 {
		return none, fmt.Errorf("token label %q: want 1 to 32 octets", label)
	}
	m, path, err := load(cfg.URI)
	if err != nil {
		return none, err
	}
	defer func() { err = errors.Join(explained(err), m.release()) }()
	m.enter()
	seen, err := m.describe(path)
	m.leave()
	if err != nil {
		return none, err
	}
	var blank, half *Token
	for i := range seen.Tokens {
		t := &seen.Tokens[i]
		switch {
		case t.Initialized && t.Label == label && t.UserPIN != PINUnset:
			return none, fmt.Errorf("token %q: %w (serial %s)", label, hsm.ErrExists, t.Serial)
		case t.Initialized && t.Label == label:
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
	m.enter()
	defer m.leave()
	if half == nil {
		if err := m.ctx.InitToken(blank.Slot, string(so), label); err != nil {
			return none, fmt.Errorf("initializing the token in slot %d: %w", blank.Slot, err)
		}
	}
	// The token may have another slot and serial by now, and is found by its new label.
	slot, _, err := m.findSlot(hsm.URI{Scheme: hsm.SchemePKCS11, Token: label})
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
	err = s.with(ctx, true, func(h pkcs11.SessionHandle) error {
		session, err := s.mod.ctx.GetSessionInfo(h)
		if err != nil {
			return err
		}
		info, err := s.mod.ctx.GetTokenInfo(session.SlotID)
		t = tokenOf(session.SlotID, info)
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
	var info pkcs11.Info
	err = s.with(ctx, true, func(pkcs11.SessionHandle) (err error) {
		info, err = s.mod.ctx.GetInfo()
		return err
	})
	if err != nil {
		return hsm.Identity{}, fmt.Errorf("asking the module for itself: %w", err)
	}
	return hsm.Identity{Label: t.Label, Serial: t.Serial, Manufacturer: t.Manufacturer, Model: t.Model, Firmware: t.Firmware,
		Module: trim(info.LibraryDescription), ModuleVersion: version(info.LibraryVersion), ModuleManufacturer: trim(info.ManufacturerID)}, nil
}
