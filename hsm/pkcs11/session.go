//go:build cgo

package pkcs11

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/touchmark/touchmark/hsm"
)

// mayLogin decides by the token's flags whether a PIN may be tried.
func mayLogin(flags uint) error {
	switch {
	case flags&pkcs11.CKF_USER_PIN_LOCKED != 0:
		return fmt.Errorf("%w: the token says that its user PIN is locked", hsm.ErrPINLocked)
	case flags&pkcs11.CKF_USER_PIN_FINAL_TRY != 0:
		return fmt.Errorf("%w: the token says that one more wrong PIN would lock it, so none is tried", hsm.ErrPINLocked)
	case flags&pkcs11.CKF_USER_PIN_INITIALIZED == 0:
		return fmt.Errorf("%w: the token has no user PIN yet", hsm.ErrPINIncorrect)
	}
	return nil
}

// connect opens the keeper session and logs in. Called inside the module, with the mutex held or before anyone else has the
// store.
func (s *Store) connect(slot uint) error {
	h, err := s.mod.ctx.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		return fmt.Errorf("opening a session: %w", err)
	}
	if s.pin != nil {
		if err := s.login(h); err != nil {
			_ = s.mod.ctx.CloseSession(h)
			return err
		}
	}
	s.slot, s.keeper, s.idle, s.epoch = slot, h, nil, s.mod.epoch
	return nil
}

func (s *Store) login(h pkcs11.SessionHandle) error {
	err := s.mod.ctx.Login(h, pkcs11.CKU_USER, string(s.pin))
	if err == nil || is(err, pkcs11.CKR_USER_ALREADY_LOGGED_IN) {
		return nil
	}
	return loginError(err)
}

func loginError(err error) error {
	switch {
	case is(err, pkcs11.CKR_PIN_INCORRECT, pkcs11.CKR_PIN_INVALID, pkcs11.CKR_PIN_LEN_RANGE):
		return fmt.Errorf("%w: %w", hsm.ErrPINIncorrect, err)
	case is(err, pkcs11.CKR_PIN_LOCKED):
		return fmt.Errorf("%w: %w", hsm.ErrPINLocked, err)
	}
	return fmt.Errorf("logging in: %w", err)
}

// dropSessions closes every session that is not in use. Called with the mutex held.
func (s *Store) dropSessions() {
	s.mod.enter()
	defer s.mod.leave()
	if s.epoch == s.mod.epoch { // else they ended with the module, and their numbers may be somebody else's now
		for _, h := range s.idle {
			_ = s.mod.ctx.CloseSession(h)
		}
		if s.keeper != 0 {
			_ = s.mod.ctx.CloseSession(s.keeper)
		}
	}
	s.idle, s.keeper = nil, 0
}

// uncertainError says that an operation may or may not have taken effect, and that the token is there again.
type uncertainError struct{ error }

// with borrows a session for one operation. When the token turns out to be lost it is found again, and when it is out of
// memory it is made to forget what it holds for us, by logging in anew. An operation that is safe to repeat runs again then;
// for others the error is an uncertainError.
func (s *Store) with(ctx context.Context, repeat bool, f func(pkcs11.SessionHandle) error) error {
	for try := 1; ; try++ {
		gen, err := s.borrow(ctx, f)
		if is(err, pkcs11.CKR_OPERATION_ACTIVE) && try < operationTries {
			continue // the session was left in the middle of something, and is closed; nothing was done
		}
		gone := lost(err)
		if err == nil || !gone && (!exhausted(err) || s.pin == nil) {
			return explained(err)
		}
		if gone && try == operationTries {
			return explained(fmt.Errorf("%w: %w", hsm.ErrLost, err))
		}
		if try == operationTries {
			return explained(err)
		}
		// A module that cannot even log in again is as good as lost: tpm2-pkcs11 answers so when its TPM is gone. It also takes
		// a key that it could not load once for one that is in use, until it is initialized anew.
		if gone || try > 1 && s.mod.loads || s.relogin(ctx, gen, err) != nil {
			if rerr := s.reconnect(ctx, gen, err); rerr != nil {
				return explained(rerr)
			}
		}
		if !repeat {
			if gone {
				err = fmt.Errorf("%w: %w", hsm.ErrLost, err)
			}
			return uncertainError{explained(err)}
		}
	}
}

// borrow waits for room and runs an operation. Where the token has fewer sessions than it said, or others hold them, it
// makes do with those that are there.
func (s *Store) borrow(ctx context.Context, f func(pkcs11.SessionHandle) error) (generation int64, err error) {
	for deadline := time.Now().Add(s.patience); ; {
		select {
		case s.slots <- struct{}{}:
		default:
			select {
			case s.slots <- struct{}{}:
			case <-ctx.Done():
				return 0, ctx.Err()
			}
		}
		generation, err = s.once(f)
		if !errors.Is(err, errNoSession) {
			<-s.slots
			return generation, err
		}
		if s.shrink() {
			continue // the slot stays taken; the next one to be free has a session already
		}
		<-s.slots
		if time.Now().After(deadline) {
			return generation, fmt.Errorf("%w: %w", hsm.ErrLost, err)
		}
		select {
		case <-time.After(recoveryPause):
		case <-ctx.Done():
			return generation, ctx.Err()
		}
	}
}

// shrink takes a slot out of the pool for good, unless it is the last one. The caller holds that slot.
func (s *Store) shrink() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.shrunk >= cap(s.slots)-1 {
		return false
	}
	s.shrunk++
	s.log.Info("the token gives no more sessions", "token", s.URI(), "sessions", cap(s.slots)-s.shrunk)
	return true
}

func (s *Store) once(f func(pkcs11.SessionHandle) error) (generation int64, err error) {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return 0, errClosed
	}
	gen, slot, epoch, keeper := s.generation.Load(), s.slot, s.epoch, s.keeper
	last := s.shrunk > 0 && s.shrunk == cap(s.slots)-1 || cap(s.slots) == 1
	var h pkcs11.SessionHandle
	if n := len(s.idle); n > 0 {
		h, s.idle = s.idle[n-1], s.idle[:n-1]
	}
	if n := min(len(s.thrown), throwAtOnce); n > 0 {
		f = s.destroying(slices.Clone(s.thrown[:n]), gen, f)
		s.thrown = append(s.thrown[:0], s.thrown[n:]...)
	}
	s.mu.Unlock()

	if h, err = s.inside(slot, epoch, keeper, h, last, f); h == 0 || h == keeper {
		return gen, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed && gen == s.generation.Load() {
		s.idle = append(s.idle, h)
		return gen, err
	}
	s.mod.enter()
	defer s.mod.leave()
	if epoch == s.mod.epoch {
		_ = s.mod.ctx.CloseSession(h)
	}
	return gen, err
}

// throwAtOnce bounds how many dead objects one operation cleans up after.
const throwAtOnce = 64

// throwAway is told of a throw-away key that nobody has any more. The next operation destroys its object.
func (s *Store) throwAway(o object) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		s.thrown = append(s.thrown, o)
	}
}

// destroying returns f with dead objects destroyed before it. Those of an earlier connection went with it.
func (s *Store) destroying(dead []object, generation int64, f func(pkcs11.SessionHandle) error) func(pkcs11.SessionHandle) error {
	return func(h pkcs11.SessionHandle) error {
		for _, o := range dead {
			if o.generation == generation {
				_ = s.mod.ctx.DestroyObject(h, o.handle) // what cannot be destroyed ends with its session
			}
		}
		return f(h)
	}
}

// inside runs an operation in a session, a new one for h == 0, and returns the session when it is good for another.
func (s *Store) inside(slot uint, epoch int64, keeper, h pkcs11.SessionHandle, last bool, f func(pkcs11.SessionHandle) error) (pkcs11.SessionHandle, error) {
	s.mod.enter()
	defer s.mod.leave()
	if epoch != s.mod.epoch {
		return 0, pkcs11.Error(pkcs11.CKR_SESSION_HANDLE_INVALID) // the module was restarted
	}
	if h == 0 {
		var err error
		h, err = s.mod.ctx.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
		switch {
		case errors.Is(err, pkcs11.Error(pkcs11.CKR_SESSION_COUNT)) && last && keeper != 0:
			h = keeper // nobody else is at work
		case errors.Is(err, pkcs11.Error(pkcs11.CKR_SESSION_COUNT)):
			return 0, fmt.Errorf("opening a session: %w: %w", errNoSession, err)
		case err != nil:
			return 0, fmt.Errorf("opening a session: %w", err)
		}
	}
	err := f(h)
	if err != nil && (lost(err) || is(err, pkcs11.CKR_OPERATION_ACTIVE)) {
		if h != keeper {
			_ = s.mod.ctx.CloseSession(h) // it may be gone already
		}
		return 0, err
	}
	return h, err
}

// lost reports whether an error means that the session, the login or the token is gone, rather than that the operation
// was wrong.
func lost(err error) bool {
	var e pkcs11.Error
	if !errors.As(err, &e) {
		return false
	}
	switch uint(e) {
	case pkcs11.CKR_SESSION_HANDLE_INVALID, pkcs11.CKR_SESSION_CLOSED, pkcs11.CKR_USER_NOT_LOGGED_IN, pkcs11.CKR_DEVICE_REMOVED,
		pkcs11.CKR_TOKEN_NOT_PRESENT, pkcs11.CKR_DEVICE_ERROR, pkcs11.CKR_OBJECT_HANDLE_INVALID, pkcs11.CKR_KEY_HANDLE_INVALID,
		pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED, pkcs11.CKR_SLOT_ID_INVALID, pkcs11.CKR_TOKEN_NOT_RECOGNIZED,
		pkcs11.CKR_OPERATION_NOT_INITIALIZED: // the session ended, and its number is that of another one by now
		return true
	}
	return false
}

// reconnect finds the token again, unless somebody else did since generation gen.
func (s *Store) reconnect(ctx context.Context, gen int64, cause error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return errClosed
	}
	if gen != s.generation.Load() {
		return nil
	}
	if s.refused != nil {
		return s.refused
	}
	s.log.Warn("token lost", "token", s.URI(), "cause", cause)
	s.dropSessions()
	for range s.shrunk {
		<-s.slots // a table that was full may not be now
	}
	s.shrunk = 0
	var err error
	for try, deadline := 0, time.Now().Add(s.patience); ; try++ {
		if try > 0 {
			if time.Now().After(deadline) {
				return fmt.Errorf("%w: %w (looked for it %d times in %s: %w)", hsm.ErrLost, cause, try, s.patience, err)
			}
			select {
			case <-time.After(min(recoveryPause<<min(try-1, 5), time.Second)):
			case <-ctx.Done():
				return fmt.Errorf("%w: %w: %w", hsm.ErrLost, cause, ctx.Err())
			}
		}
		if err = s.findAgain(ctx, try, cause, deadline); err == nil {
			s.generation.Add(1)
			s.log.Info("token found again", "token", s.URI())
			return nil
		}
		if errors.Is(err, hsm.ErrPINIncorrect) || errors.Is(err, hsm.ErrPINLocked) {
			s.refused = err // the PIN was changed while we were away; it is not tried twice
			return err
		}
	}
}

// findAgain looks for the token once and logs in. The first time the module itself is left alone, unless it is what was lost.
func (s *Store) findAgain(ctx context.Context, try int, cause error, deadline time.Time) error {
	if try > 0 || !lost(cause) || s.mod.dead() || is(cause, pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED) {
		if err := s.mod.restart(ctx, s.epoch, time.Until(deadline)); err != nil {
			return err
		}
	}
	s.mod.enter()
	defer s.mod.leave()
	s.epoch = s.mod.epoch
	slot, token, err := s.mod.findSlot(s.uri)
	if err != nil {
		return err
	}
	if s.pin != nil {
		if err := mayLogin(token.Flags); err != nil {
			return err
		}
	}
	return s.connect(slot)
}

// relogin logs out and in again, unless somebody did since generation gen. Object handles do not outlive it (PKCS#11 2.40
// §5.6, C_Logout).
func (s *Store) relogin(ctx context.Context, gen int64, cause error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closed:
		return errClosed
	case s.refused != nil:
		return s.refused
	case gen != s.generation.Load():
		return nil
	}
	s.log.Info("logging in anew, so that the token lets go of what it holds", "token", s.URI(), "cause", cause)
	err := s.mod.alone(ctx, s.patience, func() error {
		if s.epoch != s.mod.epoch {
			return pkcs11.Error(pkcs11.CKR_SESSION_HANDLE_INVALID)
		}
		token, err := s.mod.ctx.GetTokenInfo(s.slot)
		if err != nil {
			return err
		}
		if err := mayLogin(token.Flags); err != nil {
			return err
		}
		_ = s.mod.ctx.Logout(s.keeper)
		return s.login(s.keeper)
	})
	if errors.Is(err, hsm.ErrPINIncorrect) || errors.Is(err, hsm.ErrPINLocked) {
		s.refused = err
	}
	if err == nil {
		s.generation.Add(1)
	}
	return err
}
