// Package hsm is the contract for keys that may never leave where they were made.
//
// A [Store] holds named keys: a directory of encrypted key files (hsm/keyfile), a PKCS#11 token (hsm/pkcs11) or a TPM 2.0
// (hsm/tpm). A [Key] is one of them. A key that signs is a [SigningKey], which is a [crypto.Signer]; a key that
// authenticates messages is a [MACKey]; a key that agrees on secrets, such as the one that a sealed file is opened with, is
// an [AgreementKey]. Which one a key is follows from its [Algorithm] and [Usage] and never changes.
//
// A caller names a store by its key URI ([ParseURI]), opens it through the backend's Open, and from then on speaks
// this contract only. hsm/hsmtest is the suite that every backend passes.
//
// Stores and keys may be used by many goroutines at once.
package hsm

import (
	"context"
	"crypto"
	"crypto/ecdh"
	"errors"
	"fmt"
	"io"
	"slices"
)

// Errors that callers branch on. Backends wrap them, and keep the vendor's answer beside them.
var (
	// ErrNotFound says that a key, a token or a module is not there.
	ErrNotFound = errors.New("not found")
	// ErrExists says that a key of that name is there already. Names are unique in a store; nothing is overwritten.
	ErrExists = errors.New("exists already")
	// ErrUnsupported says that this store, or this build, cannot do what was asked.
	ErrUnsupported = errors.New("not supported")
	// ErrPINIncorrect says that the PIN or passphrase was refused. It is never tried twice.
	ErrPINIncorrect = errors.New("PIN or passphrase incorrect")
	// ErrNoPIN says that a PIN or passphrase is needed and that there is nowhere to learn it from.
	ErrNoPIN = errors.New("no way to learn")
	// ErrNoModule says that no PKCS#11 module was named.
	ErrNoModule = errors.New("no PKCS#11 module")
	// ErrPINLocked says that the PIN is locked, or that one more wrong try would lock it and none was made.
	ErrPINLocked = errors.New("PIN locked or on its last try")
	// ErrFull says that the store has no room for another key.
	ErrFull = errors.New("no room left")
	// ErrLost says that the token or its module went away and did not come back in time. The operation may be
	// tried again later.
	ErrLost = errors.New("token lost")
)

// An Algorithm names what a key is: its type and size. The names are the ones used in flags, profiles and JSON.
type Algorithm string

// The algorithms. The zero value is none of them.
const (
	ECP256     Algorithm = "EC-P256"
	ECP384     Algorithm = "EC-P384"
	ECP521     Algorithm = "EC-P521"
	RSA2048    Algorithm = "RSA-2048"
	RSA3072    Algorithm = "RSA-3072"
	RSA4096    Algorithm = "RSA-4096"
	Ed25519    Algorithm = "Ed25519"
	HMACSHA256 Algorithm = "HMAC-SHA256"
	AES256     Algorithm = "AES-256"
)

// Algorithms lists every algorithm in the order in which help texts show them.
var Algorithms = []Algorithm{ECP256, ECP384, ECP521, RSA2048, RSA3072, RSA4096, Ed25519, HMACSHA256, AES256}

// KeyPairs lists the algorithms of key pairs, which are those that certificates are for.
func KeyPairs() []Algorithm {
	return slices.DeleteFunc(slices.Clone(Algorithms), func(a Algorithm) bool { return a == HMACSHA256 || a == AES256 })
}

// ParseAlgorithm returns the algorithm of that exact name.
func ParseAlgorithm(s string) (Algorithm, error) {
	for _, a := range Algorithms {
		if string(a) == s {
			return a, nil
		}
	}
	return "", fmt.Errorf("unknown key algorithm %q (one of %v)", s, Algorithms)
}

// A Usage is the one thing that a key does. One key, one usage.
type Usage string

// The usages. The zero value means the natural one: Sign for key pairs, MAC for HMAC keys, Wrap for AES keys.
const (
	Sign  Usage = "sign"
	MAC   Usage = "mac"
	Agree Usage = "agree"
	Wrap  Usage = "wrap"
)

// A Spec says what key to make.
type Spec struct {
	// Name is the key's name in the store: 1 to 255 characters of ASCII letters, digits and "-._:".
	Name string
	// Algorithm is required.
	Algorithm Algorithm
	// Usage is Sign, MAC, Agree or Wrap; empty means the algorithm's natural one. Agree goes with ECP256 alone.
	Usage Usage
	// Extractable lets the private half be wrapped out of the store later. The default is that it never can.
	Extractable bool
	// Ephemeral keys live as long as the Key that Generate returned and are in no listing: session objects in a
	// token, memory in a key-file store. Their name need not be unique. Where such a Key is an io.Closer, Close gives its place
	// back at once; without it that happens some time after nobody has the Key any more.
	Ephemeral bool
}

// Resolved returns the spec with its defaults filled in, or an error that says what is wrong with it.
func (s Spec) Resolved() (Spec, error) {
	if !ValidName(s.Name) {
		return s, fmt.Errorf("key name %q: want 1 to 255 letters, digits or -._: characters", s.Name)
	}
	if _, err := ParseAlgorithm(string(s.Algorithm)); err != nil {
		return s, err
	}
	natural := Sign
	switch s.Algorithm {
	case HMACSHA256:
		natural = MAC
	case AES256:
		natural = Wrap
	}
	if s.Usage == "" {
		s.Usage = natural
	}
	if s.Usage != natural && (s.Usage != Agree || s.Algorithm != ECP256) {
		return s, fmt.Errorf("a key of algorithm %s cannot %s", s.Algorithm, s.Usage)
	}
	return s, nil
}

// ValidName reports whether a key may be called that.
func ValidName(name string) bool {
	if name == "" || len(name) > 255 || name[0] == '.' {
		return false
	}
	for i := 0; i < len(name); i++ {
		c := name[i]
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-', c == '.', c == '_', c == ':':
		default:
			return false
		}
	}
	return true
}

// Attributes are what the store itself says about a key, read back from it and not remembered from the request.
type Attributes struct {
	// Sensitive: the private half cannot be read in the clear.
	Sensitive bool `json:"sensitive"`
	// Extractable: the private half can be wrapped out.
	Extractable bool `json:"extractable"`
	// Local: made inside the store, never imported. A key-file store cannot vouch for it and says false.
	Local bool `json:"local"`
	// AlwaysSensitive and NeverExtractable hold for the key's whole life.
	AlwaysSensitive  bool `json:"alwaysSensitive"`
	NeverExtractable bool `json:"neverExtractable"`
	// Hardware: the store is a token, not files.
	Hardware bool `json:"hardware"`
}

// A Key is one key of a store.
type Key interface {
	// Name is the key's name in its store.
	Name() string
	// URI names the key for another process: it holds no PIN and no secret.
	URI() string
	// Algorithm and Usage say what the key is.
	Algorithm() Algorithm
	Usage() Usage
	// Attributes reads the key's attributes back from the store.
	Attributes(ctx context.Context) (Attributes, error)
}

// A SigningKey signs. Public never fails: the public half was read when the key was found. Sign takes the options of
// the standard library's keys: a digest with its hash for ECDSA and RSA (PKCS #1 v1.5, or [rsa.PSSOptions]), the message
// itself with crypto.Hash(0) for Ed25519. ECDSA signatures come in ASN.1 form.
type SigningKey interface {
	Key
	crypto.Signer
}

// A MACKey computes HMAC-SHA256.
type MACKey interface {
	Key
	// MAC appends the 32-octet HMAC-SHA256 of data to dst and returns the extended slice.
	MAC(ctx context.Context, dst, data []byte) ([]byte, error)
}

// An AgreementKey does ECDH on P-256.
type AgreementKey interface {
	Key
	ecdh.KeyExchanger
}

// A Store holds named keys.
type Store interface {
	// URI names the store, without secrets.
	URI() string
	// Generate makes a key. Once it has returned the key survives a crash (unless it is ephemeral). The error is
	// ErrExists when the name is taken, ErrFull when there is no room.
	Generate(ctx context.Context, spec Spec) (Key, error)
	// Import puts a secret that was made elsewhere into the store: for HMACSHA256 the octets of the key (16 to 64), for
	// AES256 its 32 octets, for the others a PKCS #8 document. The caller wipes the secret afterwards. Errors as for Generate.
	Import(ctx context.Context, spec Spec, secret Secret) (Key, error)
	// Open finds a key by name. It may search, so it is for start-up and recovery: never once per device.
	Open(ctx context.Context, name string) (Key, error)
	// Delete destroys a key. The error is ErrNotFound when there is none of that name.
	Delete(ctx context.Context, name string) error
	// Close gives back what the store holds. Keys of a closed store answer with an error.
	Close() error
}

// A Lister can name the keys that it holds.
type Lister interface {
	// List returns the keys whose name begins with prefix, sorted by name.
	List(ctx context.Context, prefix string) ([]Key, error)
}

// WrappedFormat is how WrappedKey.Wrapped is encrypted: AES key wrap with padding (RFC 5649), of the PKCS #8 document of a key
// pair and of the octets of an HMAC key.
const WrappedFormat = "AES-KWP"

// A WrappedKey is a key on its way from one token to another, encrypted under a key that both have. It holds no secret in
// the clear. Its JSON form is what touchmark key wrap writes.
type WrappedKey struct {
	// Format is WrappedFormat.
	Format string `json:"format"`
	// Name, Algorithm and Usage are those of the key in the store that it came from.
	Name      string    `json:"name"`
	Algorithm Algorithm `json:"algorithm"`
	Usage     Usage     `json:"usage"`
	// Public is the SubjectPublicKeyInfo of a key pair: a token gives back a private key alone.
	Public []byte `json:"public,omitempty"`
	// Wrapped is the encrypted key.
	Wrapped []byte `json:"wrapped"`
}

// A Wrapper can let a key out, encrypted.
type Wrapper interface {
	// WrapKey encrypts a key of the store under another key of it, of usage Wrap. Only a key that was made Extractable can
	// be wrapped: for others the error is ErrUnsupported, as it is for a store without the mechanism.
	WrapKey(ctx context.Context, wrapping, key Key) (WrappedKey, error)
}

// An Unwrapper can take in a key that a Wrapper let out.
type Unwrapper interface {
	// UnwrapKey decrypts a key inside the store and keeps it under spec's name. Algorithm and Usage of the spec may be empty;
	// else they must be those of the wrapped key. The key is not extractable unless the spec says so, and never Local. A
	// key pair whose halves do not belong together is refused. Errors as for Generate.
	UnwrapKey(ctx context.Context, wrapping Key, spec Spec, wrapped WrappedKey) (Key, error)
}

// A Secret is key material in memory. It prints, logs and marshals as [redacted].
type Secret []byte

const redacted = "[redacted]"

// Format implements [fmt.Formatter] for every verb.
func (Secret) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// String returns "[redacted]".
func (Secret) String() string { return redacted }

// MarshalText returns "[redacted]".
func (Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// MarshalJSON returns "[redacted]" as a JSON string.
func (Secret) MarshalJSON() ([]byte, error) { return []byte(`"` + redacted + `"`), nil }

// Wipe overwrites the secret.
func (s Secret) Wipe() { clear(s) }

// SigningKeyOf returns the key as one that signs, or an error that names what it is instead.
func SigningKeyOf(k Key) (SigningKey, error) { return as[SigningKey](k, Sign) }

// MACKeyOf returns the key as one that computes HMACs, or an error that names what it is instead.
func MACKeyOf(k Key) (MACKey, error) { return as[MACKey](k, MAC) }

// AgreementKeyOf returns the key as one that agrees on secrets, or an error that names what it is instead.
func AgreementKeyOf(k Key) (AgreementKey, error) { return as[AgreementKey](k, Agree) }

func as[K Key](k Key, want Usage) (K, error) {
	kk, ok := k.(K)
	if !ok || k.Usage() != want {
		return kk, fmt.Errorf("key %q is for %s (%s), not for %s: %w", k.Name(), k.Usage(), k.Algorithm(), want, ErrUnsupported)
	}
	return kk, nil
}
