//go:build cgo

package pkcs11

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/touchmark/touchmark/hsm"
)

// Config says which token to open and how.
type Config struct {
	// URI names the module and the token. Without a module-path, TOUCHMARK_PKCS11_MODULE names the module.
	URI hsm.URI
	// PIN is asked for the user PIN, once, and not at all when the token needs no login.
	PIN func(context.Context) (hsm.Secret, error)
	// Sessions bounds how many operations run at once; 0 means what the token allows, at most 16.
	Sessions int
	// Log hears of tokens that were lost and came back; nil means nobody does.
	Log *slog.Logger
	// Patience is how long an operation looks for a token that was lost before it answers hsm.ErrLost; 0 means 5 seconds: a
	// module that was restarted is back by then, and a person with a USB token in hand is asked to try again.
	Patience time.Duration
	// CallTimeout is for a module in a process of its own (module-path=p11-kit:…): one that is silent for longer is killed and
	// started again. 0 means TOUCHMARK_PKCS11_TIMEOUT, or 60 seconds. Stores that share a module share the first one's.
	CallTimeout time.Duration
}

const (
	defaultSessions = 16
	defaultPatience = 5 * time.Second
	recoveryPause   = 200 * time.Millisecond
)

// Store is a PKCS#11 token, logged in.
type Store struct {
	uri hsm.URI
	log *slog.Logger
	mod *module

	patience time.Duration
	slots    chan struct{} // room for operations: as many as there may be sessions

	mu      sync.Mutex
	closed  bool
	pin     hsm.Secret // the one that was accepted; nil where none is needed
	refused error      // login is not tried again after this
	slot    uint
	keeper  pkcs11.SessionHandle   // holds the login
	idle    []pkcs11.SessionHandle // of the present generation
	epoch   int64                  // of the module, that the sessions belong to
	shrunk  int                    // slots that are kept taken because the token's session table is full
	thrown  []object               // of throw-away keys that nobody has any more
	labels  map[string]bool        // names that are taken
	doubts  map[string][]byte      // names whose key may have been made, with the ID that it has then
	mechs   mechanisms             // what the token offers; does not change
	levels  sync.Map               // the template that works, an int by kind of key

	generation atomic.Int64 // counts how often the token was found anew; handles belong to one
}

// Open loads the module, finds the token and logs in. Errors: hsm.ErrNotFound for a module or token that is not there,
// hsm.ErrPINIncorrect, hsm.ErrPINLocked.
func Open(ctx context.Context, cfg Config) (*Store, error) {
	path, err := modulePath(cfg.URI.ModulePath)
	if err != nil {
		return nil, err
	}
	bound, err := callTimeout(cfg)
	if err != nil {
		return nil, err
	}
	s := &Store{uri: cfg.URI, log: cfg.Log, patience: cfg.Patience}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if s.patience <= 0 {
		s.patience = defaultPatience
	}
	if s.mod, err = loadModule(path, cfg.URI.InitArgs, bound, s.log); err != nil {
		return nil, err
	}
	if err := s.start(ctx, cfg); err != nil {
		return nil, errors.Join(fmt.Errorf("opening token %s: %w", describe(cfg.URI), explained(err)), s.Close())
	}
	return s, nil
}

func callTimeout(cfg Config) (time.Duration, error) {
	text := os.Getenv("TOUCHMARK_PKCS11_TIMEOUT")
	if cfg.CallTimeout > 0 || text == "" {
		return cfg.CallTimeout, nil
	}
	d, err := time.ParseDuration(text)
	if err != nil || d <= 0 {
		return 0, fmt.Errorf("TOUCHMARK_PKCS11_TIMEOUT is %q: want a duration such as 30s", text)
	}
	return d, nil
}

func (s *Store) start(ctx context.Context, cfg Config) error {
	s.mod.enter()
	slot, token, err := s.mod.findSlot(s.uri)
	s.mod.leave()
	if err != nil {
		return err
	}
	if token.Flags&pkcs11.CKF_LOGIN_REQUIRED != 0 {
		if err := mayLogin(token.Flags); err != nil {
			return err
		}
		if cfg.PIN == nil {
			return fmt.Errorf("%w its PIN", hsm.ErrNoPIN)
		}
		if s.pin, err = cfg.PIN(ctx); err != nil {
			return err
		}
	}
	sessions := cfg.Sessions
	if sessions <= 0 {
		sessions = defaultSessions
	}
	// 0 means that the token does not say, and all ones that it does not mind (CK_TOKEN_INFO). One session is the keeper,
	// which does the work too when it is the only one.
	if most := token.MaxRwSessionCount; most > 0 && most != pkcs11.CK_UNAVAILABLE_INFORMATION {
		sessions = min(sessions, max(1, int(min(most-1, 1<<16))))
	}
	s.slots = make(chan struct{}, sessions)
	s.mod.enter()
	defer s.mod.leave()
	if err := s.connect(slot); err != nil {
		return err
	}
	if s.mechs, err = s.mod.mechanisms(slot); err != nil {
		return err
	}
	return s.loadLabels()
}

// URI returns the token's key URI, without a PIN.
func (s *Store) URI() string { return s.uri.WithObject("").String() }

// Close closes the store's sessions, which logs out when they are the last, and forgets the PIN.
func (s *Store) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	s.pin.Wipe()
	s.dropSessions()
	return s.mod.release()
}

var (
	errClosed = errors.New("token is closed")
	// errNoSession says that the token's session table is full.
	errNoSession = errors.New("no session to be had")
)

// operationTries is how often an operation is tried. What is lost or exhausted once may be so again, not for ever.
const operationTries = 4

func (e uncertainError) Unwrap() error { return e.error }

// exhausted reports whether an error may mean that the token has no memory left for what it holds open. A TPM holds three
// keys; tpm2-pkcs11 without a resource manager keeps each one that was used loaded until the logout, and then answers
// CKR_GENERAL_ERROR.
func exhausted(err error) bool {
	return is(err, pkcs11.CKR_GENERAL_ERROR, pkcs11.CKR_FUNCTION_FAILED, pkcs11.CKR_DEVICE_MEMORY, pkcs11.CKR_HOST_MEMORY)
}

// loadLabels reads the names of all keys, once.
func (s *Store) loadLabels() error {
	s.labels = make(map[string]bool)
	for _, class := range []uint{pkcs11.CKO_PRIVATE_KEY, pkcs11.CKO_SECRET_KEY} {
		handles, err := s.find(s.keeper, pkcs11.NewAttribute(pkcs11.CKA_CLASS, class), pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true))
		if err != nil {
			return err
		}
		for _, h := range handles {
			attrs, err := s.mod.ctx.GetAttributeValue(s.keeper, h, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_LABEL, nil)})
			if err != nil {
				continue // an object that does not show its label is nobody's key here
			}
			s.labels[string(attrs[0].Value)] = true
			s.mod.beat()
		}
	}
	return nil
}

// find returns every object that matches. It is for opening, recovery and listing only: its cost grows with the token.
func (s *Store) find(h pkcs11.SessionHandle, template ...*pkcs11.Attribute) (_ []pkcs11.ObjectHandle, err error) {
	if err := s.mod.ctx.FindObjectsInit(h, template); err != nil {
		return nil, fmt.Errorf("searching: %w", err)
	}
	defer func() { err = errors.Join(err, s.mod.ctx.FindObjectsFinal(h)) }()
	var all []pkcs11.ObjectHandle
	for {
		page, _, err := s.mod.ctx.FindObjects(h, 256)
		if err != nil {
			return nil, fmt.Errorf("searching: %w", err)
		}
		if len(page) == 0 {
			if len(all) == 0 && s.pin != nil {
				// Without a login private objects are invisible, and that is no error to PKCS#11.
				info, err := s.mod.ctx.GetSessionInfo(h)
				if err != nil {
					return nil, fmt.Errorf("searching: %w", err)
				}
				if info.State != pkcs11.CKS_RW_USER_FUNCTIONS && info.State != pkcs11.CKS_RO_USER_FUNCTIONS {
					return nil, fmt.Errorf("searching: %w", pkcs11.Error(pkcs11.CKR_USER_NOT_LOGGED_IN))
				}
			}
			return all, nil
		}
		all = append(all, page...)
		s.mod.beat()
	}
}

// reserve takes a name, or says hsm.ErrExists.
func (s *Store) reserve(name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return errClosed
	}
	if s.labels[name] {
		return fmt.Errorf("key %q: %w", name, hsm.ErrExists)
	}
	s.labels[name] = true
	return nil
}

func (s *Store) unreserve(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.labels, name)
}

// notMade says why a token would not make a key.
func notMade(err error) error {
	if is(err, pkcs11.CKR_DEVICE_MEMORY, pkcs11.CKR_HOST_MEMORY) {
		return fmt.Errorf("%w: %w", hsm.ErrFull, err)
	}
	if is(err, pkcs11.CKR_MECHANISM_INVALID, pkcs11.CKR_CURVE_NOT_SUPPORTED, pkcs11.CKR_KEY_SIZE_RANGE, pkcs11.CKR_FUNCTION_NOT_SUPPORTED) {
		return fmt.Errorf("%w: %w", hsm.ErrUnsupported, err)
	}
	return err
}

// Generate implements [hsm.Store].
func (s *Store) Generate(ctx context.Context, spec hsm.Spec) (hsm.Key, error) {
	return s.create(ctx, spec, func(h pkcs11.SessionHandle, spec hsm.Spec, id []byte) (pkcs11.ObjectHandle, pkcs11.ObjectHandle, error) {
		return s.generate(h, spec, id)
	})
}

// Import implements [hsm.Store].
func (s *Store) Import(ctx context.Context, spec hsm.Spec, secret hsm.Secret) (hsm.Key, error) {
	return s.create(ctx, spec, func(h pkcs11.SessionHandle, spec hsm.Spec, id []byte) (pkcs11.ObjectHandle, pkcs11.ObjectHandle, error) {
		return s.importKey(h, spec, id, secret)
	})
}

// uselessError says that the token made a key that cannot be used.
type uselessError struct{ error }

func (e uselessError) Unwrap() error { return e.error }

// create makes a key under its name. Should the token be lost in the middle it is looked for by name before anything is
// made again, so a name never gets two keys.
func (s *Store) create(ctx context.Context, spec hsm.Spec, do func(pkcs11.SessionHandle, hsm.Spec, []byte) (priv, pub pkcs11.ObjectHandle, err error)) (hsm.Key, error) {
	spec, err := spec.Resolved()
	if err != nil {
		return nil, err
	}
	if !spec.Ephemeral {
		if err := s.reserve(spec.Name); err != nil {
			return nil, err
		}
		k, err := s.settle(ctx, spec)
		if err != nil || k != nil {
			return k, err
		}
	}
	id := make([]byte, 16)
	if _, err := rand.Read(id); err != nil {
		return nil, err
	}
	var k hsm.Key
	make := func(h pkcs11.SessionHandle) error {
		priv, pub, err := do(h, spec, id)
		if err != nil {
			return notMade(err)
		}
		var public crypto.PublicKey
		if pub != 0 {
			read := s.publicKey
			if curveOID(spec.Algorithm) != nil { // no need to ask what was made
				read = s.pointKey
			}
			public, err = read(h, pub)
			if spec.Ephemeral {
				_ = s.mod.ctx.DestroyObject(h, pub) // it is read, and would lie about until the session ends
			}
		}
		if err == nil {
			k, err = s.keyFrom(spec, id, priv, public)
		}
		if err != nil && !lost(err) {
			err = uselessError{fmt.Errorf("%w: %w", hsm.ErrUnsupported, err)}
		}
		return err
	}
	for range operationTries {
		err = s.with(ctx, false, make)
		var uncertain uncertainError
		var useless uselessError
		if errors.As(err, &useless) && !spec.Ephemeral {
			err = errors.Join(err, s.destroyByID(ctx, id))
			break
		}
		if !errors.As(err, &uncertain) || ctx.Err() != nil {
			break
		}
		if spec.Ephemeral {
			continue
		}
		var found hsm.Key
		var ferr error
		if found, ferr = s.Open(ctx, spec.Name); ferr == nil {
			k, err = found, nil
			break
		}
		// Half a key is none: what there is of it has this ID, and goes.
		if ferr = s.destroyByID(ctx, id); ferr != nil {
			err = ferr
			break
		}
	}
	if err != nil {
		if !spec.Ephemeral {
			var uncertain uncertainError
			if errors.Is(err, hsm.ErrLost) || errors.As(err, &uncertain) {
				s.doubt(spec.Name, id)
			}
			s.unreserve(spec.Name)
		}
		return nil, fmt.Errorf("making key %q: %w", spec.Name, err)
	}
	return k, nil
}

// doubt remembers that a key of that name and ID may have been made.
func (s *Store) doubt(name string, id []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.doubts == nil {
		s.doubts = make(map[string][]byte)
	}
	s.doubts[name] = id
}

// settle looks whether a key was made after all when that was last in doubt, and returns it if it is what is asked for now.
// Nil means that there is none, and nothing of one. The name is reserved; on an error it no longer is.
func (s *Store) settle(ctx context.Context, spec hsm.Spec) (_ hsm.Key, err error) {
	s.mu.Lock()
	id, doubted := s.doubts[spec.Name]
	s.mu.Unlock()
	if !doubted {
		return nil, nil
	}
	defer func() {
		if err != nil && !errors.Is(err, hsm.ErrExists) {
			s.unreserve(spec.Name)
		}
	}()
	k, err := s.Open(ctx, spec.Name)
	switch {
	case err == nil && bytes.Equal(baseOf(k).id, id) && k.Algorithm() == spec.Algorithm && k.Usage() == spec.Usage:
	case err == nil:
		err = fmt.Errorf("key %q: %w", spec.Name, hsm.ErrExists)
	case errors.Is(err, hsm.ErrLost):
		return nil, err
	default:
		if err = s.destroyByID(ctx, id); err != nil {
			return nil, err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.doubts, spec.Name)
	return k, err
}

func (s *Store) destroyByID(ctx context.Context, id []byte) error {
	if err := s.unload(ctx); err != nil && !lost(err) {
		return err
	}
	return s.with(ctx, true, func(h pkcs11.SessionHandle) error {
		objects, err := s.find(h, pkcs11.NewAttribute(pkcs11.CKA_ID, id), pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true))
		if err != nil {
			return err
		}
		return s.destroy(h, objects...)
	})
}

// Open implements [hsm.Store].
func (s *Store) Open(ctx context.Context, name string) (hsm.Key, error) {
	if !hsm.ValidName(name) {
		return nil, fmt.Errorf("key %q: %w", name, hsm.ErrNotFound)
	}
	var k hsm.Key
	err := s.with(ctx, true, func(h pkcs11.SessionHandle) (err error) {
		k, err = s.openKey(h, name)
		return err
	})
	if errors.Is(err, hsm.ErrNotFound) {
		return nil, fmt.Errorf("key %q: %w%s", name, err, s.near(name))
	}
	if err != nil {
		return nil, fmt.Errorf("key %q: %w", name, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.labels[name] = true // somebody else may have made it meanwhile
	return k, nil
}

// near names the keys with names like that one.
func (s *Store) near(name string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return didYouMean(name, slices.Collect(maps.Keys(s.labels)))
}

// Delete implements [hsm.Store].
func (s *Store) Delete(ctx context.Context, name string) error {
	if !hsm.ValidName(name) {
		return fmt.Errorf("key %q: %w", name, hsm.ErrNotFound)
	}
	if err := s.unload(ctx); err != nil && !lost(err) {
		return fmt.Errorf("deleting key %q: %w", name, explained(err))
	}
	found := false // in this try or in one whose answer was lost
	err := s.with(ctx, true, func(h pkcs11.SessionHandle) error {
		// The private half goes last: as long as it is there the key can be found by name, and a Delete that was cut off
		// can be repeated.
		for _, class := range []uint{pkcs11.CKO_PUBLIC_KEY, pkcs11.CKO_PRIVATE_KEY, pkcs11.CKO_SECRET_KEY} {
			handles, err := s.find(h, pkcs11.NewAttribute(pkcs11.CKA_CLASS, class), pkcs11.NewAttribute(pkcs11.CKA_LABEL, name), pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true))
			if err != nil {
				return err
			}
			for _, o := range handles {
				found = true
				if err := s.mod.ctx.DestroyObject(h, o); err != nil {
					return err
				}
			}
		}
		if !found {
			return hsm.ErrNotFound
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("deleting key %q: %w", name, err)
	}
	s.unreserve(name)
	return nil
}

// unload goes before keys are destroyed. A module that keeps keys loaded lets go of them at a logout, and only then.
func (s *Store) unload(ctx context.Context) error {
	if !s.mod.loads {
		return nil
	}
	return s.relogin(ctx, s.generation.Load(), nil)
}

// List implements [hsm.Lister].
func (s *Store) List(ctx context.Context, prefix string) ([]hsm.Key, error) {
	var keys []hsm.Key
	err := s.with(ctx, true, func(h pkcs11.SessionHandle) error {
		keys = nil
		index, err := s.indexPublics(h)
		if err != nil {
			return err
		}
		for _, class := range []uint{pkcs11.CKO_PRIVATE_KEY, pkcs11.CKO_SECRET_KEY} {
			handles, err := s.find(h, pkcs11.NewAttribute(pkcs11.CKA_CLASS, class), pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true))
			if err != nil {
				return err
			}
			for _, o := range handles {
				attrs, err := s.mod.ctx.GetAttributeValue(h, o, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_LABEL, nil)})
				if err != nil {
					return err
				}
				name := string(attrs[0].Value)
				if !strings.HasPrefix(name, prefix) || !hsm.ValidName(name) {
					continue
				}
				k, err := s.openObject(h, name, class, o, index)
				if errors.Is(err, hsm.ErrUnsupported) {
					continue // a key of a kind that touchmark does not use
				}
				if err != nil {
					return fmt.Errorf("key %q: %w", name, err)
				}
				keys = append(keys, k)
				s.mod.beat()
			}
		}
		return nil
	})
	slices.SortFunc(keys, func(a, b hsm.Key) int { return strings.Compare(a.Name(), b.Name()) })
	return keys, err
}
