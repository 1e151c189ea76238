package ledger

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// A checkpoint is a signed note (C2SP signed-note) whose text is C2SP tlog-checkpoint: the log's origin, its size, and
// its root hash. Station keys sign SHA-256 digests, in ASN.1 form for ECDSA, and Ed25519 the text itself.

// checkpointText renders the three lines of a checkpoint.
func checkpointText(origin string, size int64, root tlog.Hash) string {
	return origin + "\n" + strconv.FormatInt(size, 10) + "\n" + base64.StdEncoding.EncodeToString(root[:]) + "\n"
}

// ErrStation says that a checkpoint is signed by another key than the one it was held against.
var ErrStation = errors.New("the checkpoint is not signed by this station key")

// A Checkpoint is what a signed checkpoint says.
type Checkpoint struct {
	Origin string `json:"origin"`
	Size   int64  `json:"size"`
	Root   string `json:"root"` // base64
}

// maxNote bounds a signed checkpoint, its witnesses' lines included.
const maxNote = 1 << 14

// OpenCheckpoint verifies a signed checkpoint against a station's public key and returns what it says. Lines of other signers, such
// as witnesses, are let be.
func OpenCheckpoint(signed []byte, pub crypto.PublicKey) (Checkpoint, error) {
	n, err := openNote(signed, pub)
	if err != nil {
		return Checkpoint{}, err
	}
	c, _, err := parseCheckpoint(n.Text)
	return c, err
}

func openNote(signed []byte, pub crypto.PublicKey) (*note.Note, error) {
	if len(signed) > maxNote {
		return nil, fmt.Errorf("checkpoint is longer than %d octets", maxNote)
	}
	origin, _, _ := strings.Cut(string(signed), "\n")
	v, err := newVerifier(origin, pub)
	if err != nil {
		return nil, err
	}
	n, err := note.Open(signed, note.VerifierList(v))
	var other *note.UnverifiedNoteError
	if errors.As(err, &other) {
		return nil, ErrStation
	}
	if err != nil {
		return nil, fmt.Errorf("checkpoint: %w", err)
	}
	// note.Open takes signatures in any base64 there is of them, and lines more than once.
	for _, s := range slices.Concat(n.Sigs, n.UnverifiedSigs) {
		if _, err := base64.StdEncoding.Strict().DecodeString(s.Base64); err != nil {
			return nil, errors.New("checkpoint has a signature that is not in the one form of base64")
		}
	}
	if again, err := note.Sign(n); err != nil || len(again) != len(signed) {
		return nil, errors.New("checkpoint has a line twice")
	}
	return n, nil
}

// unverified returns what a checkpoint says, whoever signed it.
func unverified(signed []byte) (Checkpoint, tlog.Hash, error) {
	_, err := note.Open(signed, nil)
	var n *note.UnverifiedNoteError
	if !errors.As(err, &n) {
		return Checkpoint{}, tlog.Hash{}, fmt.Errorf("checkpoint: %w", err)
	}
	return parseCheckpoint(n.Note.Text)
}

func parseCheckpoint(text string) (Checkpoint, tlog.Hash, error) {
	lines := strings.Split(text, "\n")
	if len(lines) != 4 || lines[3] != "" {
		return Checkpoint{}, tlog.Hash{}, errors.New("checkpoint has not three lines")
	}
	size, err := strconv.ParseInt(lines[1], 10, 64)
	if err != nil || size < 1 || strconv.FormatInt(size, 10) != lines[1] {
		return Checkpoint{}, tlog.Hash{}, errors.New("checkpoint's size is not a number")
	}
	c := Checkpoint{Origin: lines[0], Size: size, Root: lines[2]}
	root, err := c.root()
	return c, root, err
}

func (c *Checkpoint) root() (h tlog.Hash, err error) {
	b, err := base64.StdEncoding.Strict().DecodeString(c.Root)
	if err != nil || len(b) != tlog.HashSize {
		return h, errors.New("checkpoint's root is not a hash")
	}
	copy(h[:], b)
	return h, nil
}

type noteKey struct {
	name string
	hash uint32
	pub  crypto.PublicKey
	priv crypto.Signer // nil in a verifier
}

func newVerifier(name string, pub crypto.PublicKey) (*noteKey, error) {
	k := &noteKey{name: name, pub: pub}
	var sum [32]byte
	if ed, ok := pub.(ed25519.PublicKey); ok {
		sum = sha256.Sum256(append([]byte(name+"\n\x01"), ed...)) // C2SP signed-note, type 0x01
	} else {
		spki, err := x509.MarshalPKIXPublicKey(pub)
		if err != nil {
			return nil, fmt.Errorf("station key: %w", err)
		}
		sum = sha256.Sum256(spki) // C2SP signed-note, type 0x02
	}
	k.hash = binary.BigEndian.Uint32(sum[:4])
	return k, nil
}

func newSigner(name string, priv crypto.Signer) (*noteKey, error) {
	k, err := newVerifier(name, priv.Public())
	if err == nil {
		k.priv = priv
	}
	return k, err
}

func (k *noteKey) Name() string    { return k.name }
func (k *noteKey) KeyHash() uint32 { return k.hash }

func (k *noteKey) Sign(msg []byte) ([]byte, error) {
	if _, ok := k.pub.(ed25519.PublicKey); ok {
		return k.priv.Sign(rand.Reader, msg, crypto.Hash(0))
	}
	sum := sha256.Sum256(msg)
	return k.priv.Sign(rand.Reader, sum[:], crypto.SHA256)
}

func (k *noteKey) Verify(msg, sig []byte) bool {
	sum := sha256.Sum256(msg)
	switch pub := k.pub.(type) {
	case ed25519.PublicKey:
		return ed25519.Verify(pub, msg, sig)
	case *ecdsa.PublicKey:
		return ecdsa.VerifyASN1(pub, sum[:], sig)
	case *rsa.PublicKey:
		return rsa.VerifyPKCS1v15(pub, crypto.SHA256, sum[:], sig) == nil
	}
	return false
}
