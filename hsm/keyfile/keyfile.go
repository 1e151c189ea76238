// Package keyfile keeps keys in a directory of encrypted files, for lines without a token.
//
// The directory holds master.age, a random master key encrypted to a passphrase (age, scrypt), and one NAME.key per key:
// a JSON document with the public half in the clear and the private half under AES-256-GCM with the master key; the rest
// of the document is authenticated with it. A passphrase is stretched once, when the store is opened.
//
// A key-file store cannot vouch for what a token can: whoever has the passphrase can copy its keys, so no key is Local or
// NeverExtractable here. For the same reason there are no counters: they could be copied together with what is anchored in them.
//
// Files are written whole, flushed, and linked into place without replacing anything, so two processes that make one name
// at once get one key and one hsm.ErrExists. A Store may be used by many goroutines.
package keyfile

import (
	"bytes"
	"context"
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"filippo.io/age"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/internal/durable"
)

const (
	masterFile = "master.age"
	suffix     = ".key"
	version    = 1
	maxFile    = 64 << 10
	// maxWorkFactor bounds what a hostile master.age may ask of scrypt: 2^20 is about a gigabyte.
	maxWorkFactor = 20
)

// Create makes an empty store in a directory that is not there yet, or is empty. The work factor of scrypt is 2^18,
// unless TestWorkFactor lowers it.
func Create(dir string, passphrase hsm.Secret) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("making the key directory: %w", err)
	}
	recipient, err := age.NewScryptRecipient(string(passphrase))
	if err != nil {
		return fmt.Errorf("passphrase: %w", err)
	}
	if workFactor != 0 {
		recipient.SetWorkFactor(workFactor)
	}
	master := make(hsm.Secret, 32)
	defer master.Wipe()
	if _, err := rand.Read(master); err != nil {
		return err
	}
	var buf bytes.Buffer
	w, err := age.Encrypt(&buf, recipient)
	if err != nil {
		return err
	}
	if _, err := w.Write(master); err != nil {
		return err
	}
	if err := w.Close(); err != nil {
		return err
	}
	if err := durable.WriteNew(dir, masterFile, buf.Bytes()); err != nil {
		return fmt.Errorf("creating key files in %s: %w", dir, err)
	}
	return nil
}

var workFactor int

// TestWorkFactor lowers the work factor of stores that are created after it, for tests, which make many.
func TestWorkFactor(logN int) { workFactor = logN }

// Config says where a store is and how to open it.
type Config struct {
	Dir string
	// Passphrase is asked for once, by Open.
	Passphrase func(context.Context) (hsm.Secret, error)
}

// Store is a directory of encrypted key files.
type Store struct {
	dir  string
	aead cipher.AEAD

	mu     sync.Mutex
	closed bool
}

// Open opens a store. A wrong passphrase is hsm.ErrPINIncorrect.
func Open(ctx context.Context, cfg Config) (*Store, error) {
	sealed, err := durable.Read(filepath.Join(cfg.Dir, masterFile), maxFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("key files in %s: %w", cfg.Dir, hsm.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("opening key files in %s: %w", cfg.Dir, err)
	}
	pass, err := cfg.Passphrase(ctx)
	if err != nil {
		return nil, err
	}
	defer pass.Wipe()
	identity, err := age.NewScryptIdentity(string(pass))
	if err != nil {
		return nil, fmt.Errorf("opening key files in %s: %w", cfg.Dir, hsm.ErrPINIncorrect)
	}
	identity.SetMaxWorkFactor(maxWorkFactor)
	r, err := age.Decrypt(bytes.NewReader(sealed), identity)
	var wrong *age.NoIdentityMatchError
	if errors.As(err, &wrong) {
		return nil, fmt.Errorf("opening key files in %s: %w", cfg.Dir, hsm.ErrPINIncorrect)
	}
	if err != nil {
		return nil, fmt.Errorf("opening key files in %s: %w", cfg.Dir, err)
	}
	master := make(hsm.Secret, 33)
	defer master.Wipe()
	if n, err := io.ReadFull(r, master); n != 32 || !errors.Is(err, io.ErrUnexpectedEOF) {
		return nil, fmt.Errorf("opening key files in %s: %s is damaged", cfg.Dir, masterFile)
	}
	block, err := aes.NewCipher(master[:32])
	if err != nil {
		return nil, err
	}
	// Each key is one seal under the master key: nowhere near 2^32 of them.
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		return nil, err
	}
	return &Store{dir: cfg.Dir, aead: aead}, nil
}

// URI returns the store's key URI.
func (s *Store) URI() string { return hsm.URI{Scheme: hsm.SchemeFile, Path: s.dir}.String() }

// Close forgets the master key.
func (s *Store) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	return nil
}

func (s *Store) check(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return errors.New("key store is closed")
	}
	return ctx.Err()
}

// document is a key file.
type document struct {
	Version     int           `json:"version"`
	Name        string        `json:"name"`
	Algorithm   hsm.Algorithm `json:"algorithm"`
	Usage       hsm.Usage     `json:"usage"`
	Extractable bool          `json:"extractable,omitempty"`
	// Public is the SubjectPublicKeyInfo of key pairs.
	Public []byte `json:"public,omitempty"`
	// Sealed is nonce, ciphertext and tag of the PKCS #8 document, or of the HMAC key.
	Sealed []byte `json:"sealed"`
}

// authenticated returns everything of the document but the sealed part, in one form.
func (d document) authenticated() []byte {
	d.Sealed = nil
	b, _ := json.Marshal(d) // a struct of strings and octets always marshals
	return b
}

// Generate implements [hsm.Store].
func (s *Store) Generate(ctx context.Context, spec hsm.Spec) (hsm.Key, error) {
	spec, err := spec.Resolved()
	if err != nil {
		return nil, err
	}
	if err := s.check(ctx); err != nil {
		return nil, err
	}
	if !spec.Ephemeral && s.taken(spec.Name) {
		return nil, fmt.Errorf("key %q: %w", spec.Name, hsm.ErrExists)
	}
	var secret hsm.Secret
	if spec.Algorithm == hsm.HMACSHA256 {
		secret = make(hsm.Secret, 32)
		if _, err := rand.Read(secret); err != nil {
			return nil, err
		}
	} else {
		priv, err := generate(spec.Algorithm)
		if err != nil {
			return nil, err
		}
		if secret, err = x509.MarshalPKCS8PrivateKey(priv); err != nil {
			return nil, err
		}
	}
	defer secret.Wipe()
	return s.Import(ctx, spec, secret)
}

func generate(alg hsm.Algorithm) (crypto.Signer, error) {
	switch alg {
	case hsm.ECP256:
		return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case hsm.ECP384:
		return ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	case hsm.ECP521:
		return ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	case hsm.RSA2048:
		return rsa.GenerateKey(rand.Reader, 2048)
	case hsm.RSA3072:
		return rsa.GenerateKey(rand.Reader, 3072)
	case hsm.RSA4096:
		return rsa.GenerateKey(rand.Reader, 4096)
	case hsm.Ed25519:
		_, priv, err := ed25519.GenerateKey(rand.Reader)
		return priv, err
	}
	return nil, fmt.Errorf("algorithm %s: %w", alg, hsm.ErrUnsupported)
}

// Import implements [hsm.Store].
func (s *Store) Import(ctx context.Context, spec hsm.Spec, secret hsm.Secret) (hsm.Key, error) {
	spec, err := spec.Resolved()
	if err != nil {
		return nil, err
	}
	if err := s.check(ctx); err != nil {
		return nil, err
	}
	doc := document{Version: version, Name: spec.Name, Algorithm: spec.Algorithm, Usage: spec.Usage, Extractable: spec.Extractable}
	k, err := s.key(doc, secret)
	if err != nil {
		return nil, fmt.Errorf("importing key %q: %w", spec.Name, err)
	}
	if spec.Ephemeral {
		return k, nil
	}
	if pub := publicOf(k); pub != nil {
		if doc.Public, err = x509.MarshalPKIXPublicKey(pub); err != nil {
			return nil, err
		}
	}
	doc.Sealed = s.aead.Seal(nil, nil, secret, doc.authenticated())
	b, err := json.Marshal(doc)
	if err != nil {
		return nil, err
	}
	err = durable.WriteNew(s.dir, fileName(spec.Name), append(b, '\n'))
	if errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("key %q: %w", spec.Name, hsm.ErrExists)
	}
	if err != nil {
		return nil, fmt.Errorf("writing key %q: %w", spec.Name, err)
	}
	return k, nil
}

func publicOf(k hsm.Key) crypto.PublicKey {
	switch k := k.(type) {
	case *signingKey:
		return k.Public()
	case *agreementKey:
		return k.PublicKey()
	}
	return nil
}

func fileName(name string) string { return url.PathEscape(name) + suffix }

func (s *Store) taken(name string) bool {
	_, err := os.Lstat(filepath.Join(s.dir, fileName(name)))
	return err == nil
}

// Open implements [hsm.Store].
func (s *Store) Open(ctx context.Context, name string) (hsm.Key, error) {
	if err := s.check(ctx); err != nil {
		return nil, err
	}
	if !hsm.ValidName(name) {
		return nil, fmt.Errorf("key %q: %w", name, hsm.ErrNotFound)
	}
	b, err := durable.Read(filepath.Join(s.dir, fileName(name)), maxFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("key %q: %w", name, hsm.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	var doc document
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&doc); err != nil || doc.Version != version || doc.Name != name {
		return nil, fmt.Errorf("key file %s is damaged or of another version", fileName(name))
	}
	plain, err := s.aead.Open(nil, nil, doc.Sealed, doc.authenticated())
	if err != nil {
		return nil, fmt.Errorf("key file %s is damaged, or of another store", fileName(name))
	}
	secret := hsm.Secret(plain)
	defer secret.Wipe()
	return s.key(doc, secret)
}

// Delete implements [hsm.Store].
func (s *Store) Delete(ctx context.Context, name string) error {
	if err := s.check(ctx); err != nil {
		return err
	}
	err := fs.ErrNotExist
	if hsm.ValidName(name) {
		err = os.Remove(filepath.Join(s.dir, fileName(name)))
	}
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("key %q: %w", name, hsm.ErrNotFound)
	}
	return errors.Join(err, durable.SyncDir(s.dir))
}

// List implements [hsm.Lister].
func (s *Store) List(ctx context.Context, prefix string) ([]hsm.Key, error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if base, ok := strings.CutSuffix(e.Name(), suffix); ok {
			if name, err := url.PathUnescape(base); err == nil && hsm.ValidName(name) && strings.HasPrefix(name, prefix) {
				names = append(names, name)
			}
		}
	}
	slices.Sort(names)
	keys := make([]hsm.Key, 0, len(names))
	for _, name := range names {
		k, err := s.Open(ctx, name)
		if errors.Is(err, hsm.ErrNotFound) {
			continue // deleted meanwhile
		}
		if err != nil {
			return nil, err
		}
		keys = append(keys, k)
	}
	return keys, nil
}

// base is what every key of this store has.
type base struct {
	store *Store
	doc   document
}

func (b *base) Name() string             { return b.doc.Name }
func (b *base) Algorithm() hsm.Algorithm { return b.doc.Algorithm }
func (b *base) Usage() hsm.Usage         { return b.doc.Usage }
func (b *base) URI() string {
	return hsm.URI{Scheme: hsm.SchemeFile, Path: b.store.dir, Object: b.doc.Name}.String()
}

// Attributes says the little that files can vouch for.
func (b *base) Attributes(ctx context.Context) (hsm.Attributes, error) {
	return hsm.Attributes{Sensitive: true, Extractable: b.doc.Extractable}, b.store.check(ctx)
}

type signingKey struct {
	base
	crypto.Signer
}

func (k *signingKey) Sign(random io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if random == nil {
		random = rand.Reader
	}
	if h := opts.HashFunc(); h != 0 && len(digest) != h.Size() {
		return nil, fmt.Errorf("a digest of %s has %d octets, not %d", h, h.Size(), len(digest))
	}
	return k.Signer.Sign(random, digest, opts)
}

type agreementKey struct {
	base
	*ecdh.PrivateKey
}

// macKey pools keyed hashes: setting the key is half the work of a short message.
type macKey struct {
	base
	pool sync.Pool
}

func (k *macKey) MAC(_ context.Context, dst, data []byte) ([]byte, error) {
	h := k.pool.Get().(hash.Hash)
	h.Reset()
	h.Write(data)
	dst = h.Sum(dst)
	k.pool.Put(h)
	return dst, nil
}

// key makes a key of a document and its secret part, which it checks against each other.
func (s *Store) key(doc document, secret hsm.Secret) (hsm.Key, error) {
	b := base{store: s, doc: doc}
	if doc.Algorithm == hsm.HMACSHA256 {
		if len(secret) < 16 || len(secret) > 64 {
			return nil, fmt.Errorf("an HMAC key has 16 to 64 octets, not %d", len(secret))
		}
		own := bytes.Clone(secret)
		return &macKey{base: b, pool: sync.Pool{New: func() any { return hmac.New(sha256.New, own) }}}, nil
	}
	if doc.Algorithm == hsm.AES256 {
		return nil, fmt.Errorf("wrapping keys are for tokens: %w", hsm.ErrUnsupported)
	}
	priv, err := x509.ParsePKCS8PrivateKey(secret)
	if err != nil {
		return nil, errors.New("the private key is not PKCS #8")
	}
	if got := algorithmOf(priv); got != doc.Algorithm {
		return nil, fmt.Errorf("the private key is of algorithm %q, not %s", got, doc.Algorithm)
	}
	if doc.Usage == hsm.Agree {
		agree, err := priv.(*ecdsa.PrivateKey).ECDH()
		if err != nil {
			return nil, err
		}
		return &agreementKey{base: b, PrivateKey: agree}, nil
	}
	return &signingKey{base: b, Signer: priv.(crypto.Signer)}, nil
}

func algorithmOf(priv any) hsm.Algorithm {
	switch k := priv.(type) {
	case *ecdsa.PrivateKey:
		switch k.Curve {
		case elliptic.P256():
			return hsm.ECP256
		case elliptic.P384():
			return hsm.ECP384
		case elliptic.P521():
			return hsm.ECP521
		}
	case *rsa.PrivateKey:
		switch k.N.BitLen() {
		case 2048:
			return hsm.RSA2048
		case 3072:
			return hsm.RSA3072
		case 4096:
			return hsm.RSA4096
		}
	case ed25519.PrivateKey:
		return hsm.Ed25519
	}
	return ""
}
