package ledger

import (
	"bytes"
	"context"
	"crypto"
	"encoding/base64"
	"errors"
	"fmt"
	"math/bits"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/tlog"
)

// Errors of what does not go together.
var (
	// ErrForked says that a ledger went two ways: there are two different entries at one place, both under signed checkpoints.
	ErrForked = errors.New("ledger is forked")
	// ErrOrigin says that a checkpoint or a file is another ledger's.
	ErrOrigin = errors.New("it is another ledger's")
)

// A Consistency shows that a newer checkpoint extends an older one: nothing was taken from the ledger, and nothing in it changed.
type Consistency struct {
	Old        int64          // size of the older checkpoint
	Proof      tlog.TreeProof // RFC 6962, 2.1.2
	Checkpoint []byte         // the newer one, signed
}

// Consistency proves that the ledger extends a checkpoint that it, or so it is said, had before: one from a witness, or from a
// bundle. The error is ErrRolledBack when the ledger is shorter, ErrForked when it began otherwise, ErrOrigin when the checkpoint
// is another ledger's, and ErrDamaged when the ledger does not fit its own checkpoint.
func (l *Ledger) Consistency(ctx context.Context, old Checkpoint) (*Consistency, error) {
	root, err := old.root()
	if err != nil {
		return nil, err
	}
	c := &Consistency{Old: old.Size}
	return c, l.snapshot(ctx, func(s *snapshot) error {
		if err := s.extends(old, root); err != nil {
			return err
		}
		c.Checkpoint = s.note
		c.Proof, err = tlog.ProveTree(s.Size, old.Size, s)
		return err
	})
}

// extends holds the ledger against an older checkpoint.
func (s *snapshot) extends(old Checkpoint, root tlog.Hash) error {
	if err := comparable(old, s.Checkpoint); err != nil {
		return err
	}
	err := s.holds(old.Size, root)
	if errors.Is(err, errOtherRoot) {
		return fmt.Errorf("%w: its first %d entries are not those of the checkpoint of %d entries", ErrForked, old.Size, old.Size)
	}
	return err
}

// comparable says why a checkpoint cannot be extended by another, as far as origins and sizes tell.
func comparable(old, newer Checkpoint) error {
	if old.Origin != newer.Origin {
		return fmt.Errorf("checkpoint of %q held against %q: %w", old.Origin, newer.Origin, ErrOrigin)
	}
	if old.Size > newer.Size {
		return fmt.Errorf("%w: it has %d entries, and had %d", ErrRolledBack, newer.Size, old.Size)
	}
	return nil
}

// CheckConsistency checks that a ledger extends an older checkpoint, with the station's public key alone, and returns the newer
// checkpoint. The errors are those of [Ledger.Consistency], and ErrStation.
func CheckConsistency(old Checkpoint, c *Consistency, station crypto.PublicKey) (Checkpoint, error) {
	newer, err := OpenCheckpoint(c.Checkpoint, station)
	if err != nil {
		return newer, err
	}
	if err := comparable(old, newer); err != nil {
		return newer, err
	}
	was, err := old.root()
	if err != nil {
		return newer, err
	}
	is, err := newer.root()
	if err != nil {
		return newer, err
	}
	switch {
	case old.Size == newer.Size && was != is:
		return newer, fmt.Errorf("%w: there are two checkpoints of %d entries with different roots", ErrForked, old.Size)
	case old.Size == newer.Size:
		return newer, nil
	case c.Old != old.Size:
		return newer, fmt.Errorf("%w: it starts at %d entries, the older checkpoint has %d", ErrProof, c.Old, old.Size)
	case tlog.CheckTree(c.Proof, newer.Size, is, old.Size, was) != nil:
		return newer, fmt.Errorf("%w: the checkpoint of %d entries is not shown to extend that of %d", ErrForked, newer.Size, old.Size)
	}
	return newer, nil
}

// Encode returns the consistency as a file holds it, in the form in which C2SP tlog-witness has a log send it to its witnesses:
// "old" and the older size, a line for each hash of the proof in base64, an empty line, the newer checkpoint.
func (c *Consistency) Encode() []byte {
	b := fmt.Appendf(nil, "old %d\n", c.Old)
	for _, h := range c.Proof {
		b = fmt.Appendf(b, "%s\n", h)
	}
	return append(append(b, '\n'), c.Checkpoint...)
}

// maxPath bounds the hashes of a consistency proof (C2SP tlog-witness).
const maxPath = 63

// ParseConsistency reads what Encode wrote. A signed checkpoint alone reads as one that extends nothing.
func ParseConsistency(b []byte) (*Consistency, error) {
	if len(b) > maxNote+100*maxPath {
		return nil, errors.New("checkpoint is too long")
	}
	size, ok := bytes.CutPrefix(b, []byte("old "))
	if !ok {
		return &Consistency{Checkpoint: b}, nil
	}
	head, signed, ok := bytes.Cut(size, []byte("\n\n"))
	lines := strings.Split(string(head), "\n")
	old, err := strconv.ParseInt(lines[0], 10, 64)
	if !ok || err != nil || old < 0 || strconv.FormatInt(old, 10) != lines[0] || len(lines) > 1+maxPath {
		return nil, errors.New("consistency proof has no size, or no end")
	}
	c := &Consistency{Old: old, Checkpoint: signed}
	for _, line := range lines[1:] {
		b, err := base64.StdEncoding.Strict().DecodeString(line)
		if err != nil || len(b) != tlog.HashSize || strings.Contains(line, "\r") {
			return nil, errors.New("consistency proof holds what is no hash")
		}
		c.Proof = append(c.Proof, tlog.Hash(b))
	}
	return c, nil
}

// A Comparison says how two copies of a ledger stand to each other.
type Comparison struct {
	// Relation is "same", "ahead" when the first extends the second, "behind" when the second extends the first, or "forked".
	Relation string `json:"relation"`
	Size     int64  `json:"entries"`      // of the first
	Other    int64  `json:"otherEntries"` // of the second
	// Fork is the index of the first entry that differs; -1 where none does.
	Fork int64 `json:"fork"`
}

// How copies of a ledger stand to each other.
const (
	Same   = "same"
	Ahead  = "ahead"
	Behind = "behind"
	Forked = "forked"
)

// Err returns nil when the first ledger lost nothing that the second has, and else ErrRolledBack or ErrForked.
func (c Comparison) Err() error {
	switch c.Relation {
	case Behind:
		return fmt.Errorf("%w: it has %d entries, the other copy %d", ErrRolledBack, c.Size, c.Other)
	case Forked:
		return fmt.Errorf("%w: the copies have %d and %d entries and differ from entry %d on", ErrForked, c.Size, c.Other, c.Fork)
	}
	return nil
}

// Compare holds two copies of a ledger against each other by their stored hashes, in a time that grows with the logarithm of
// their sizes. That stored hashes are those of the entries, Verify tells. Each is held against its own checkpoint; whose
// signature that has, [OpenCheckpoint] tells. They must be opened apart, even where they are the same file.
func Compare(ctx context.Context, a, b *Ledger) (c Comparison, err error) {
	err = a.snapshot(ctx, func(a *snapshot) error {
		return b.snapshot(ctx, func(b *snapshot) error {
			if a.Origin != b.Origin {
				return fmt.Errorf("%q held against %q: %w", a.Origin, b.Origin, ErrOrigin)
			}
			c = Comparison{Relation: Same, Size: a.Size, Other: b.Size}
			if c.Fork, err = firstDifference(a, b); err != nil {
				return err
			}
			switch {
			case c.Fork >= 0:
				c.Relation = Forked
			case a.Size > b.Size:
				c.Relation = Ahead
			case a.Size < b.Size:
				c.Relation = Behind
			}
			return nil
		})
	})
	return c, err
}

// firstDifference returns the index of the first entry in which two ledgers differ as far as both go, or -1.
func firstDifference(a, b *snapshot) (int64, error) {
	differ := func(level int, n int64) (bool, error) {
		x, err := a.at(level, n)
		if err != nil {
			return false, err
		}
		y, err := b.at(level, n)
		return x != y, err
	}
	// The complete subtrees that make up what both have, from the left; then down the first that differs.
	for first, left := int64(0), min(a.Size, b.Size); left > 0; {
		level := bits.Len64(uint64(left)) - 1
		n := first >> level
		diff, err := differ(level, n)
		if err != nil {
			return 0, err
		}
		if !diff {
			first, left = first+1<<level, left-1<<level
			continue
		}
		for level > 0 {
			level, n = level-1, 2*n
			if diff, err = differ(level, n); err != nil {
				return 0, err
			}
			if !diff {
				n++
			}
		}
		return n, nil
	}
	return -1, nil
}
