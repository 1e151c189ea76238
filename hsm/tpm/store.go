package tpm

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/internal/durable"
)

// Config says which TPM to open and how.
type Config struct {
	// URI names the TPM and the directory of key blobs; without a directory there are persistent handles only.
	URI hsm.URI
	// Dir is that directory as this process finds it; empty means URI.Keys as written. It is made when the first key is.
	Dir string
	// Device is the TPM's address as this process finds it; empty means URI.Device as written, or [DefaultDevice].
	Device string
	// PIN is asked for the authorization value of keys that have one, once. It has 1 to 32 octets, none of them zero.
	PIN func(context.Context) (hsm.Secret, error)
	// Protect gives the keys that are made this PIN as their authorization value, and takes the keys at persistent handles
	// to have it. Blobs say themselves whether they have one.
	Protect bool
	// Owner, Endorsement and Lockout are the authorization values of the hierarchies; empty is what an unowned TPM has.
	// The store keeps them until it is closed, and then wipes them.
	Owner, Endorsement, Lockout hsm.Secret
	// Wait is how long a TPM that went away is waited for; 0 means 6 seconds.
	Wait time.Duration
	// Log hears of TPMs that were lost and came back; nil means nobody does.
	Log *slog.Logger
}

const suffix = ".pem"

// persistentSRK is where the TCG's provisioning guidance has the SRK (TCG TPM v2.0 Provisioning Guidance, 7.8).
const persistentSRK = tpm2.TPMHandle(0x81000001)

// Store is a TPM.
type Store struct {
	cfg Config
	dir string
	dev *device

	parent   *parent // of the keys that are made
	noParent error   // why there is none

	mu      sync.Mutex
	closed  bool
	pin     hsm.Secret
	refused error // the PIN is not tried again after this
	parents map[tpm2.TPMHandle]*parent
}

// parent is a storage key that key blobs are encrypted by.
type parent struct {
	object
	handle tpm2.TPMHandle // as blobs name it
	public tpm2.TPMTPublic
}

// Open connects to the TPM and reads its storage root key. Errors: hsm.ErrLost when nothing answers there. A TPM that refuses
// to make the storage root key, because it has an owner whose authorization was not given, opens all the same: its state, its
// NV and its keys at persistent handles can be had, and what needs the SRK answers with that refusal.
func Open(ctx context.Context, cfg Config) (_ *Store, err error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Wait == 0 {
		cfg.Wait = defaultWait
	}
	s := &Store{cfg: cfg, dir: cmp.Or(cfg.Dir, cfg.URI.Keys), parents: make(map[tpm2.TPMHandle]*parent)}
	address := cmp.Or(cfg.Device, addressOf(cfg.URI))
	s.dev = attach(address, cfg.Log)
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("opening TPM %s: %w", address, err), s.Close())
		}
	}()
	s.parent, err = s.parentAt(ctx, persistentSRK)
	if errors.Is(err, errNoParent) {
		s.parent, err = s.parentAt(ctx, tpm2.TPMRHOwner)
	}
	if answer := new(Error); errors.As(err, &answer) {
		s.noParent, err = err, nil
	}
	if err != nil {
		return nil, err
	}
	return s, nil
}

// URI returns the store's key URI, without secrets.
func (s *Store) URI() string { return s.cfg.URI.WithObject("").String() }

// Close gives the TPM back and forgets the authorization values.
func (s *Store) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	s.mu.Unlock()
	// Between operations, so that none goes on with a secret that was wiped.
	s.dev.turn <- struct{}{}
	s.pin.Wipe()
	s.cfg.Owner.Wipe()
	s.cfg.Endorsement.Wipe()
	s.cfg.Lockout.Wipe()
	<-s.dev.turn
	return s.dev.detach()
}

var errClosed = errors.New("TPM is closed")

// do runs an operation on the TPM. The error says what was being done and what the TPM's answer means.
func (s *Store) do(ctx context.Context, op string, f func(*bus) error) error {
	if s.isClosed() {
		return errClosed
	}
	return explain(op, s.dev.do(ctx, s.cfg.Wait, func(b *bus) error {
		if s.isClosed() {
			return errClosed
		}
		return f(b)
	}))
}

func (s *Store) isClosed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closed
}

var errNoParent = errors.New("no storage key there")

// parentAt returns the storage key that blobs name by this handle. Its name is settled when it is first seen.
func (s *Store) parentAt(ctx context.Context, h tpm2.TPMHandle) (*parent, error) {
	s.mu.Lock()
	p := s.parents[h]
	s.mu.Unlock()
	if p != nil {
		return p, nil
	}
	p = &parent{handle: h}
	err := s.do(ctx, fmt.Sprintf("reading the storage root key at 0x%08x", uint32(h)), func(b *bus) error {
		if h != tpm2.TPMRHOwner {
			rsp, err := b.readPublic(h)
			if errors.Is(err, tpm2.TPMRCHandle) {
				return errNoParent
			}
			if err != nil {
				return err
			}
			public, err := rsp.OutPublic.Contents()
			if err != nil {
				return err
			}
			if !isStorageKey(public) {
				return errNoParent
			}
			p.public, p.name, p.persistent = *public, rsp.Name, h
			return nil
		}
		p.keep = true
		p.load = func(b *bus) (tpm2.TPMHandle, error) {
			return s.makePrimary(b, &p.object, tpm2.TPMRHOwner, srkTemplate(), &p.public)
		}
		_, err := b.use(&p.object)
		return err
	})
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if again := s.parents[h]; again != nil {
		return again, nil
	}
	s.parents[h] = p
	return p, nil
}

// hierarchy authorizes for a hierarchy: with its authorization value in a salted session, if it has one.
func (s *Store) hierarchy(b *bus, h tpm2.TPMHandle) (tpm2.AuthHandle, error) {
	var auth hsm.Secret
	switch h {
	case tpm2.TPMRHOwner:
		auth = s.cfg.Owner
	case tpm2.TPMRHEndorsement:
		auth = s.cfg.Endorsement
	case tpm2.TPMRHLockout:
		auth = s.cfg.Lockout
	}
	if len(auth) == 0 {
		return tpm2.AuthHandle{Handle: h, Auth: tpm2.PasswordAuth(nil)}, nil
	}
	return s.authorize(b, h, auth)
}

// authorize authorizes in a salted session, be the authorization value empty or not: its HMAC covers the command with the names of
// what it works on.
func (s *Store) authorize(b *bus, h tpm2.TPMHandle, auth hsm.Secret) (tpm2.AuthHandle, error) {
	salt, public, err := b.salt(s)
	if err != nil {
		return tpm2.AuthHandle{}, err
	}
	return tpm2.AuthHandle{Handle: h, Auth: tpm2.HMAC(tpm2.TPMAlgSHA256, nonceSize, tpm2.Auth(auth), tpm2.Salted(salt, public))}, nil
}

const nonceSize = 16

// salt returns a loaded key to salt a session with: the SRK where it is there without asking, and otherwise a primary of the
// null hierarchy, which needs no authorization.
func (b *bus) salt(s *Store) (tpm2.TPMHandle, tpm2.TPMTPublic, error) {
	if s.parent != nil {
		if i := slices.Index(b.d.loaded, &s.parent.object); s.parent.persistent != 0 || i >= 0 {
			h, err := b.use(&s.parent.object)
			return h, s.parent.public, err
		}
	}
	if b.null == nil {
		var public tpm2.TPMTPublic
		o := &object{load: func(b *bus) (tpm2.TPMHandle, error) {
			rsp, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHNull, InPublic: tpm2.New2B(srkTemplate())}.Execute(b)
			if err != nil {
				return 0, err
			}
			p, err := rsp.OutPublic.Contents()
			if err != nil {
				return 0, errors.Join(err, b.flush(rsp.ObjectHandle))
			}
			public = *p
			ours.add(rsp.Name.Buffer)
			return rsp.ObjectHandle, nil
		}}
		if _, err := b.use(o); err != nil {
			return 0, public, err
		}
		b.null, b.nullPublic = o, public
	}
	h, err := b.use(b.null)
	b.unpin(b.null) // a session is begun before the next thing is loaded
	return h, b.nullPublic, err
}

// direction says which first parameter of a command a session encrypts.
type direction int

const (
	plain direction = iota
	in
	out
)

// session returns a session salted to the SRK, with this authorization value. One is kept open: beginning a session costs the
// TPM a key agreement.
func (b *bus) session(s *Store, auth hsm.Secret, dir direction) (tpm2.Session, error) {
	key := sessionKey{s, len(auth) > 0, dir}
	if open := b.d.open; open != nil && open.key == key {
		return open.Session, nil
	}
	if s.noParent != nil {
		return nil, s.noParent
	}
	if err := b.closeSession(); err != nil {
		return nil, err
	}
	h, err := b.use(&s.parent.object)
	if err != nil {
		return nil, err
	}
	opts := []tpm2.AuthOption{tpm2.Auth(bytes.Clone(auth)), tpm2.Salted(h, s.parent.public)}
	switch dir {
	case in:
		opts = append(opts, tpm2.AESEncryption(128, tpm2.EncryptIn))
	case out:
		opts = append(opts, tpm2.AESEncryption(128, tpm2.EncryptOut))
	}
	session, _, err := tpm2.HMACSession(b, tpm2.TPMAlgSHA256, nonceSize, opts...)
	if err != nil {
		return nil, fmt.Errorf("beginning a session: %w", err)
	}
	b.unpin(&s.parent.object)
	b.d.open = &openSession{session, key}
	return session, nil
}

type sessionKey struct {
	store *Store
	auth  bool
	dir   direction
}

type openSession struct {
	tpm2.Session
	key sessionKey
}

func (b *bus) closeSession() error {
	open := b.d.open
	if open == nil {
		return nil
	}
	b.d.open = nil
	if err := b.flush(open.Handle()); lost(err) {
		return err
	}
	return nil // one that the TPM has closed already is closed
}

// authValue returns the authorization value of keys, which is asked for once.
func (s *Store) authValue(ctx context.Context) (hsm.Secret, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.refused != nil {
		return nil, s.refused
	}
	if s.pin != nil {
		return s.pin, nil
	}
	if s.cfg.PIN == nil {
		return nil, fmt.Errorf("%w the authorization value of the TPM's key: name a file with pin-source in the key URI", hsm.ErrNoPIN)
	}
	pin, err := s.cfg.PIN(ctx)
	if err != nil {
		return nil, err
	}
	// The TPM takes as many octets as SHA-256 has, and leaves out zeros at the end (Part 1, 19.6.5).
	if len(pin) == 0 || len(pin) > 32 || bytes.IndexByte(pin, 0) >= 0 {
		pin.Wipe()
		return nil, errors.New("an authorization value of a TPM has 1 to 32 octets, none of them zero")
	}
	s.pin = pin
	return pin, nil
}

// newAuth returns the authorization value of a key that is being made; nil when it has none.
func (s *Store) newAuth(ctx context.Context) (hsm.Secret, error) {
	if !s.cfg.Protect {
		return nil, nil
	}
	return s.authValue(ctx)
}

// remember keeps a refusal of the PIN, so that it is never tried twice.
func (s *Store) remember(err error) error {
	if errors.Is(err, hsm.ErrPINIncorrect) {
		s.mu.Lock()
		s.refused = err
		s.mu.Unlock()
	}
	return err
}

// begin checks what is asked before anything is made.
func (s *Store) begin(ctx context.Context, spec hsm.Spec) (_ hsm.Spec, auth hsm.Secret, err error) {
	if spec, err = spec.Resolved(); err != nil {
		return spec, nil, err
	}
	if err := ctx.Err(); err != nil {
		return spec, nil, err
	}
	_, handle := hsm.ParseTPMHandle(spec.Name)
	switch {
	case s.isClosed():
		return spec, nil, errClosed
	case s.noParent != nil:
		return spec, nil, s.noParent
	case spec.Extractable:
		return spec, nil, fmt.Errorf("key %q: a TPM's keys stay in it: %w", spec.Name, hsm.ErrUnsupported)
	case !spec.Ephemeral && !handle && s.dir == "":
		return spec, nil, fmt.Errorf("key %q: the key URI names no directory for key blobs (keys=DIR), so keys are called by persistent handles, 0x81000100 and the like: %w", spec.Name, hsm.ErrUnsupported)
	case !spec.Ephemeral && !handle && s.taken(spec.Name):
		return spec, nil, fmt.Errorf("key %q: %w", spec.Name, hsm.ErrExists)
	}
	auth, err = s.newAuth(ctx)
	return spec, auth, err
}

// Generate implements [hsm.Store]. The private half is made by the TPM.
func (s *Store) Generate(ctx context.Context, spec hsm.Spec) (hsm.Key, error) {
	spec, auth, err := s.begin(ctx, spec)
	if err != nil {
		return nil, err
	}
	area, err := templateOctets(spec)
	if err != nil {
		return nil, err
	}
	return s.create(ctx, spec, area, auth, nil)
}

// create has the TPM make a key, of data where that is an HMAC key from elsewhere.
func (s *Store) create(ctx context.Context, spec hsm.Spec, template []byte, auth, data hsm.Secret) (hsm.Key, error) {
	blob := &Blob{EmptyAuth: len(auth) == 0, Parent: s.parent.handle}
	err := s.do(ctx, fmt.Sprintf("making key %q", spec.Name), func(b *bus) error {
		var extra []tpm2.Session
		if len(auth) > 0 || len(data) > 0 {
			session, err := b.session(s, nil, in)
			if err != nil {
				return err
			}
			extra = append(extra, session)
		}
		h, err := b.use(&s.parent.object)
		if err != nil {
			return err
		}
		return b.roomFor(1, func() error { // the TPM makes it in a slot
			rsp, err := tpm2.Create{
				ParentHandle: tpm2.AuthHandle{Handle: h, Name: s.parent.name, Auth: tpm2.PasswordAuth(nil)},
				InSensitive: tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{
					UserAuth: tpm2.TPM2BAuth{Buffer: auth},
					Data:     tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{Buffer: data}),
				}},
				InPublic: tpm2.BytesAs2B[tpm2.TPMTPublic](template),
			}.Execute(b, extra...)
			if err != nil {
				return err
			}
			return blob.set(rsp.OutPublic, rsp.OutPrivate)
		})
	})
	if err != nil {
		if refusesParameters(err) {
			err = fmt.Errorf("%w: %w", hsm.ErrUnsupported, err)
		}
		return nil, err
	}
	return s.keep(ctx, spec, blob)
}

func (b *Blob) set(public tpm2.TPM2BPublic, private tpm2.TPM2BPrivate) error {
	p, err := public.Contents()
	if err != nil {
		return err
	}
	b.Public, b.Private, b.area = *p, private.Buffer, public.Bytes()
	return nil
}

// keep puts a key that was made where its name says: a file, a persistent handle, or memory.
func (s *Store) keep(ctx context.Context, spec hsm.Spec, blob *Blob) (hsm.Key, error) {
	k, err := s.blobKey(ctx, spec.Name, blob)
	if err != nil || spec.Ephemeral {
		return k, err
	}
	if h, ok := hsm.ParseTPMHandle(spec.Name); ok {
		if err := s.persist(ctx, k.common(), tpm2.TPMHandle(h)); err != nil {
			return nil, err
		}
		return s.Open(ctx, spec.Name)
	}
	text, err := blob.Marshal()
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return nil, fmt.Errorf("making the directory of key blobs: %w", err)
	}
	err = durable.WriteNew(s.dir, fileName(spec.Name), text)
	if errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("key %q: %w", spec.Name, hsm.ErrExists)
	}
	if err != nil {
		return nil, fmt.Errorf("writing key %q: %w", spec.Name, err)
	}
	return k, nil
}

// persist copies a key into the TPM's own memory (Part 3, 28.5).
func (s *Store) persist(ctx context.Context, k *base, at tpm2.TPMHandle) error {
	return s.do(ctx, fmt.Sprintf("making key %q persistent", k.name), func(b *bus) error {
		there, err := b.readPublic(at)
		if err == nil {
			if sameName(there.Name, k.object.name) {
				return nil // done before the connection broke
			}
			return fmt.Errorf("handle %s: %w", hsm.TPMHandleName(uint32(at)), hsm.ErrExists)
		}
		if !errors.Is(err, tpm2.TPMRCHandle) {
			return err
		}
		h, err := b.use(&k.object)
		if err != nil {
			return err
		}
		owner, err := s.hierarchy(b, tpm2.TPMRHOwner)
		if err != nil {
			return err
		}
		_, err = tpm2.EvictControl{Auth: owner, ObjectHandle: &tpm2.NamedHandle{Handle: h, Name: k.object.name}, PersistentHandle: at}.Execute(b)
		return err
	})
}

func fileName(name string) string { return url.PathEscape(name) + suffix }

func (s *Store) taken(name string) bool {
	_, err := os.Lstat(filepath.Join(s.dir, fileName(name)))
	return err == nil
}

// Open implements [hsm.Store]. The key is used for the first time when it first works: a blob of another TPM opens, and then
// answers with TPM_RC_INTEGRITY.
func (s *Store) Open(ctx context.Context, name string) (hsm.Key, error) {
	if s.isClosed() {
		return nil, errClosed
	}
	if h, ok := hsm.ParseTPMHandle(name); ok {
		return s.openHandle(ctx, tpm2.TPMHandle(h))
	}
	if !hsm.ValidName(name) || s.dir == "" {
		return nil, fmt.Errorf("key %q: %w", name, hsm.ErrNotFound)
	}
	text, err := durable.Read(filepath.Join(s.dir, fileName(name)), maxBlob)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("key %q: %w", name, hsm.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	blob, err := ParseBlob(text)
	if err != nil {
		return nil, fmt.Errorf("key blob %s: %w", fileName(name), err)
	}
	return s.blobKey(ctx, name, blob)
}

// blobKey makes a key of a blob.
func (s *Store) blobKey(ctx context.Context, name string, blob *Blob) (tpmKeyLike, error) {
	p, err := s.parentAt(ctx, blob.Parent)
	if errors.Is(err, errNoParent) {
		err = fmt.Errorf("its parent at %s is not in this TPM", hsm.TPMHandleName(uint32(blob.Parent)))
	}
	if err != nil {
		return nil, fmt.Errorf("key %q: %w", name, err)
	}
	k := &base{store: s, name: name, public: blob.Public, auth: !blob.EmptyAuth}
	want, err := blob.name()
	if err != nil {
		return nil, fmt.Errorf("key %q: %w", name, err)
	}
	k.object.name = want
	k.object.load = func(b *bus) (tpm2.TPMHandle, error) {
		h, err := b.use(&p.object)
		if err != nil {
			return 0, err
		}
		defer b.unpin(&p.object)
		rsp, err := tpm2.Load{
			ParentHandle: tpm2.AuthHandle{Handle: h, Name: p.name, Auth: tpm2.PasswordAuth(nil)},
			InPrivate:    tpm2.TPM2BPrivate{Buffer: blob.Private},
			InPublic:     blob.public(),
		}.Execute(b)
		if err != nil {
			return 0, err
		}
		if !sameName(rsp.Name, want) {
			return 0, errors.Join(errors.New("the TPM loaded another key than asked for"), b.flush(rsp.ObjectHandle))
		}
		return rsp.ObjectHandle, nil
	}
	return k.kind()
}

// openHandle opens the key at a persistent handle.
func (s *Store) openHandle(ctx context.Context, h tpm2.TPMHandle) (hsm.Key, error) {
	k := &base{store: s, name: hsm.TPMHandleName(uint32(h)), auth: s.cfg.Protect}
	err := s.do(ctx, fmt.Sprintf("reading the key at %s", k.name), func(b *bus) error {
		rsp, err := b.readPublic(h)
		if errors.Is(err, tpm2.TPMRCHandle) {
			return hsm.ErrNotFound
		}
		if err != nil {
			return err
		}
		public, err := rsp.OutPublic.Contents()
		if err != nil {
			return err
		}
		k.public, k.object.name, k.object.persistent = *public, rsp.Name, h
		return nil
	})
	if err != nil {
		return nil, err
	}
	return k.kind()
}

// Delete implements [hsm.Store]: a blob's file is removed, a persistent key is evicted from the TPM.
func (s *Store) Delete(ctx context.Context, name string) error {
	if h, ok := hsm.ParseTPMHandle(name); ok {
		return s.evict(ctx, tpm2.TPMHandle(h))
	}
	if s.isClosed() {
		return errClosed
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	err := fs.ErrNotExist
	if hsm.ValidName(name) && s.dir != "" {
		err = os.Remove(filepath.Join(s.dir, fileName(name)))
	}
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("key %q: %w", name, hsm.ErrNotFound)
	}
	return errors.Join(err, durable.SyncDir(s.dir))
}

func (s *Store) evict(ctx context.Context, h tpm2.TPMHandle) error {
	tried := false
	return s.do(ctx, fmt.Sprintf("deleting the key at %s", hsm.TPMHandleName(uint32(h))), func(b *bus) error {
		there, err := b.readPublic(h)
		if errors.Is(err, tpm2.TPMRCHandle) {
			if tried {
				return nil // before the connection broke
			}
			return hsm.ErrNotFound
		}
		if err != nil {
			return err
		}
		owner, err := s.hierarchy(b, tpm2.TPMRHOwner)
		if err != nil {
			return err
		}
		tried = true
		_, err = tpm2.EvictControl{Auth: owner, ObjectHandle: &tpm2.NamedHandle{Handle: h, Name: there.Name}, PersistentHandle: h}.Execute(b)
		return err
	})
}

// List implements [hsm.Lister]: the keys with blobs, and those at persistent handles that hsm's contract has a use for. The
// TPM's own, such as the SRK, are not among them.
func (s *Store) List(ctx context.Context, prefix string) ([]hsm.Key, error) {
	var names []string
	if s.dir != "" {
		entries, err := os.ReadDir(s.dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		for _, e := range entries {
			if base, ok := strings.CutSuffix(e.Name(), suffix); ok {
				if name, err := url.PathUnescape(base); err == nil && hsm.ValidName(name) && strings.HasPrefix(name, prefix) {
					names = append(names, name)
				}
			}
		}
	}
	var handles []tpm2.TPMHandle
	err := s.do(ctx, "listing persistent handles", func(b *bus) (err error) {
		handles, err = b.handles(0x81000000)
		return err
	})
	if err != nil {
		return nil, err
	}
	for _, h := range handles {
		if name := hsm.TPMHandleName(uint32(h)); strings.HasPrefix(name, prefix) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	keys := make([]hsm.Key, 0, len(names))
	for _, name := range names {
		k, err := s.Open(ctx, name)
		_, handle := hsm.ParseTPMHandle(name)
		if errors.Is(err, hsm.ErrNotFound) || handle && errors.Is(err, hsm.ErrUnsupported) {
			continue // deleted meanwhile, or none of ours
		}
		if err != nil {
			return nil, err
		}
		keys = append(keys, k)
	}
	return keys, nil
}
