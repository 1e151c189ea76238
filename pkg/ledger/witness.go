package ledger

import (
	"bytes"
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/mod/sumdb/note"

	"github.com/touchmark/touchmark/pkg/filelock"
)

// ErrUnseen says that a witness has not seen a ledger before, or not the checkpoint that it is asked to go on from.
var ErrUnseen = errors.New("the witness has not seen it")

// A Witness vouches that a ledger only ever grew: it cosigns checkpoints (C2SP tlog-cosignature, Ed25519) and never two that
// contradict each other. It should be in other hands than the station.
type Witness struct {
	// Name of the witness in its signature lines; by custom a URL without its scheme. No spaces, no "+".
	Name string
	// Key is an Ed25519 key that signs nothing else.
	Key crypto.Signer
	// State is the file in which the witness keeps what it saw last of each ledger. Who can put back an older one can have the
	// witness contradict itself.
	State string
	// Now tells the time; nil means time.Now.
	Now func() time.Time
}

// seen is what a witness saw last of a ledger.
type seen struct {
	Size int64  `json:"size"`
	Root string `json:"root"`
}

// Cosign adds the witness's line to a checkpoint (see [ParseConsistency] for what else it comes with), once the station's signature
// and the proof that it extends the last one of this ledger that the witness saw were checked, and that is written down, durably.
// The first checkpoint of a ledger is taken as it is, and only when first is set. The error is ErrRolledBack or ErrForked for one
// that contradicts what was seen, ErrUnseen when first or the proof does not fit it, ErrStation for the signature of another key.
func (w *Witness) Cosign(b []byte, station crypto.PublicKey, first bool) (_ []byte, err error) {
	c, err := ParseConsistency(b)
	if err != nil {
		return nil, err
	}
	n, err := openNote(c.Checkpoint, station)
	if err != nil {
		return nil, err
	}
	newer, _, err := parseCheckpoint(n.Text)
	if err != nil {
		return nil, err
	}
	pub, ok := w.Key.Public().(ed25519.PublicKey)
	if !ok {
		return nil, fmt.Errorf("witness %s: its key is a %T, want Ed25519", w.Name, w.Key.Public())
	}
	lock, err := filelock.Lock(w.State + ".lock")
	if err != nil {
		return nil, fmt.Errorf("opening the witness's state: %w", err)
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	state, err := loadState(w.State)
	if err != nil {
		return nil, err
	}
	last, known := state[newer.Origin]
	switch {
	case !known && !first:
		return nil, fmt.Errorf("ledger %q: %w at all", newer.Origin, ErrUnseen)
	case known && first:
		return nil, fmt.Errorf("ledger %q is not new to the witness, which saw %d entries of it", newer.Origin, last.Size)
	case known && last.Size < newer.Size && c.Old != last.Size:
		return nil, fmt.Errorf("ledger %q: %w from there: it saw %d entries last, and wants a proof from there to %d", newer.Origin, ErrUnseen, last.Size, newer.Size)
	case known:
		if _, err := CheckConsistency(Checkpoint{Origin: newer.Origin, Size: last.Size, Root: last.Root}, c, station); err != nil {
			return nil, err
		}
	}
	now := w.Now
	if now == nil {
		now = time.Now
	}
	signed, err := note.Sign(n, newCosigner(w.Name, pub, w.Key, now().Unix()))
	if err != nil {
		return nil, fmt.Errorf("cosigning: %w", err)
	}
	if len(signed) > maxNote {
		return nil, fmt.Errorf("checkpoint would be longer than %d octets", maxNote)
	}
	// Written before the line is handed out: a witness that forgot what it signed could be led another way.
	state[newer.Origin] = seen{newer.Size, newer.Root}
	return signed, saveState(w.State, state)
}

// maxState bounds a witness's state file: some thousands of ledgers.
const maxState = 1 << 20

func loadState(path string) (map[string]seen, error) {
	st, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return map[string]seen{}, nil
	}
	if err != nil {
		return nil, err
	}
	if st.Size() > maxState {
		return nil, fmt.Errorf("%s is larger than %d octets", path, maxState)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var state map[string]seen
	if err := json.Unmarshal(b, &state); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if again, err := encodeState(state); err != nil || state == nil || !bytes.Equal(again, b) {
		return nil, fmt.Errorf("%s is not as a witness writes it", path)
	}
	return state, nil
}

func encodeState(state map[string]seen) ([]byte, error) {
	b, err := json.MarshalIndent(state, "", "  ")
	return append(b, '\n'), err
}

// saveState writes the state beside its place and puts it there whole.
func saveState(path string, state map[string]seen) (err error) {
	b, err := encodeState(state)
	if err != nil {
		return err
	}
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*")
	if err != nil {
		return fmt.Errorf("writing the witness's state: %w", err)
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name())
			err = fmt.Errorf("writing the witness's state: %w", err)
		}
	}()
	_, err = f.Write(b)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// A WitnessKey is the public half of a witness.
type WitnessKey struct {
	Name string
	Key  ed25519.PublicKey
}

// A Cosignature is a witness's word that, at that time, it had seen nothing newer of the ledger and nothing that contradicts the
// checkpoint.
type Cosignature struct {
	Witness string    `json:"witness"`
	At      time.Time `json:"at"`
}

// VerifyCosignatures returns the cosignatures that a checkpoint has of these witnesses. How many it takes is for the caller to say.
// A line under the name and key of one of them that does not verify is an error. The station's own signature is for
// [OpenCheckpoint].
func VerifyCosignatures(signed []byte, witnesses []WitnessKey) ([]Cosignature, error) {
	if len(signed) > maxNote {
		return nil, fmt.Errorf("checkpoint is longer than %d octets", maxNote)
	}
	keys := make([]note.Verifier, len(witnesses))
	for i, w := range witnesses {
		keys[i] = newCosigner(w.Name, w.Key, nil, 0)
	}
	n, err := note.Open(signed, note.VerifierList(keys...))
	var none *note.UnverifiedNoteError
	if errors.As(err, &none) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("checkpoint: %w", err)
	}
	var out []Cosignature
	for _, s := range n.Sigs {
		b, err := base64.StdEncoding.DecodeString(s.Base64)
		if err != nil {
			return nil, err
		}
		out = append(out, Cosignature{s.Name, time.Unix(int64(binary.BigEndian.Uint64(b[4:])), 0).UTC()})
	}
	return out, nil
}

// A cosigner signs and verifies as C2SP tlog-cosignature has it for Ed25519: eight octets of time before the signature.
type cosigner struct {
	name string
	hash uint32
	pub  ed25519.PublicKey
	priv crypto.Signer // nil in a verifier
	at   int64         // seconds
}

func newCosigner(name string, pub ed25519.PublicKey, priv crypto.Signer, at int64) *cosigner {
	sum := sha256.Sum256(append([]byte(name+"\n\x04"), pub...))
	return &cosigner{name, binary.BigEndian.Uint32(sum[:]), pub, priv, at}
}

func (c *cosigner) Name() string    { return c.name }
func (c *cosigner) KeyHash() uint32 { return c.hash }

func (c *cosigner) Sign(msg []byte) ([]byte, error) {
	sig, err := c.priv.Sign(rand.Reader, cosigned(c.at, msg), crypto.Hash(0))
	return append(binary.BigEndian.AppendUint64(nil, uint64(c.at)), sig...), err
}

func (c *cosigner) Verify(msg, sig []byte) bool {
	if len(sig) != 8+ed25519.SignatureSize {
		return false
	}
	at := int64(binary.BigEndian.Uint64(sig))
	return at >= 0 && ed25519.Verify(c.pub, cosigned(at, msg), sig[8:])
}

func cosigned(at int64, msg []byte) []byte {
	return append(fmt.Appendf(nil, "cosignature/v1\ntime %d\n", at), msg...)
}
