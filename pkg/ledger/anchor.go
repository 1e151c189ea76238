package ledger

import (
	"context"
	"database/sql"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/tlog"
)

// A Counter stands outside the ledger's file, in a token or a TPM, where a copy of the file does not have it. hsm.Counter is one.
type Counter interface {
	// Value returns where the counter stands.
	Value(ctx context.Context) (uint64, error)
	// Increment moves the counter from a value to the next one, which it returns, and fails when it stood elsewhere.
	Increment(ctx context.Context, from uint64) (uint64, error)
}

// A markedCounter keeps with its value the root that the ledger had then (hsm.MarkedCounter). A counter without marks tells a ledger
// that stayed behind from one that went on, and not two that each took a step while only one of them moved the counter: that one
// more step of a copy is then found where bundles meet, or by a witness.
type markedCounter interface {
	Counter
	IncrementMarked(ctx context.Context, from uint64, mark string) (uint64, error)
	Mark(ctx context.Context) (string, error)
}

// mark says how long the log is and what its root is.
func mark(size int64, root tlog.Hash) string {
	return strconv.FormatInt(size, 10) + " " + base64.StdEncoding.EncodeToString(root[:])
}

// increment moves the counter on from where the ledger takes it to be.
func (l *Ledger) increment(ctx context.Context, from uint64) (uint64, error) {
	if m, ok := l.cfg.Anchor.(markedCounter); ok {
		return m.IncrementMarked(ctx, from, mark(l.size, l.edge.root()))
	}
	return l.cfg.Anchor.Increment(ctx, from)
}

// checkMark holds the ledger against the mark of its counter: the log must have had that root when it was that long.
func (l *Ledger) checkMark(ctx context.Context) error {
	m, ok := l.cfg.Anchor.(markedCounter)
	if !ok {
		return nil
	}
	have, err := m.Mark(ctx)
	if err != nil || have == "" {
		return err // no mark: the counter was made, and not moved for a step yet
	}
	text, _, _ := strings.Cut(have, " ")
	size, err := strconv.ParseInt(text, 10, 64)
	if err != nil || size < 1 {
		return fmt.Errorf("%w: its mark is %.60q", ErrAnchor, have)
	}
	if size <= l.size {
		root, err := tlog.TreeHash(size, hashReader{ctx, l.db})
		if err != nil {
			return err
		}
		if mark(size, root) == have {
			return nil
		}
	}
	return fmt.Errorf("%w: the counter was last moved for another ledger of this line: one of the two is a copy", ErrRolledBack)
}

// Errors of anchors.
var (
	// ErrRolledBack says that the ledger is older than its counter, or than a checkpoint or another copy of it: it was restored
	// from a backup or cut off, and what was made since is not in it.
	ErrRolledBack = errors.New("ledger was rolled back")
	// ErrAnchor says that the counter could not be asked or moved, or is another ledger's.
	ErrAnchor = errors.New("the ledger's anchor")
)

// Anchor ties a ledger to a counter, once, for good. The counter must be new: one that another ledger moves would refuse both.
// Close and open the ledger with Config.Anchor afterwards.
func (l *Ledger) Anchor(ctx context.Context, c Counter) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, err := l.anchorValue(ctx); !errors.Is(err, sql.ErrNoRows) {
		return errors.Join(fmt.Errorf("%w: the ledger has one already", ErrAnchor), err)
	}
	at, err := c.Value(ctx)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrAnchor, err)
	}
	return l.update(ctx, func(t *tx) error { return t.setAnchor(ctx, at) })
}

func (l *Ledger) anchorValue(ctx context.Context) (uint64, error) {
	var text string
	if err := l.db.QueryRowContext(ctx, `SELECT CAST(value AS TEXT) FROM meta WHERE name = 'anchor'`).Scan(&text); err != nil {
		return 0, err
	}
	return strconv.ParseUint(text, 10, 64)
}

// Anchored reports whether the ledger has a counter.
func (l *Ledger) Anchored(ctx context.Context) (bool, error) {
	_, err := l.anchorValue(ctx)
	if errors.Is(err, sql.ErrNoRows) {
		return false, nil
	}
	return err == nil, err
}

// checkAnchor holds the ledger against its counter when it is opened.
func (l *Ledger) checkAnchor(ctx context.Context) error {
	mine, err := l.anchorValue(ctx)
	switch {
	case errors.Is(err, sql.ErrNoRows) && l.cfg.Anchor == nil:
		return nil
	case errors.Is(err, sql.ErrNoRows):
		return fmt.Errorf("%w: the ledger was never tied to the counter that its line names", ErrAnchor)
	case err != nil:
		return err
	case l.cfg.Anchor == nil:
		return fmt.Errorf("%w: the ledger is tied to a counter, and its line names none", ErrAnchor)
	}
	at, err := l.cfg.Anchor.Value(ctx)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrAnchor, err)
	}
	if at == mine || at == mine-1 {
		if err := l.checkMark(ctx); err != nil {
			return err
		}
	}
	if at == mine-1 {
		// The last step was committed and the process died before the counter moved: nothing was made on it yet.
		if at, err = l.increment(ctx, at); err != nil {
			return fmt.Errorf("%w: %w", ErrAnchor, err)
		}
	}
	switch {
	case at > mine:
		return fmt.Errorf("%w: it ends at step %d, the counter says %d: it is a copy, or was restored from a backup", ErrRolledBack, mine, at)
	case at < mine:
		return fmt.Errorf("%w: the ledger is at step %d, the counter at %d: it is another ledger's", ErrAnchor, mine, at)
	}
	l.anchor = at
	return nil
}

// move has the step that is being built move the counter.
func (t *tx) move(ctx context.Context) error {
	if t.l.cfg.Anchor == nil || t.anchored {
		return nil
	}
	t.anchored = true
	return t.setAnchor(ctx, t.l.anchor+1)
}

func (t *tx) setAnchor(ctx context.Context, value uint64) error {
	if _, err := t.add(leaf{state: anchored, data: binary.AppendUvarint(nil, value)}); err != nil {
		return err
	}
	_, err := t.ExecContext(ctx, `INSERT INTO meta (name, value) VALUES ('anchor', $1) ON CONFLICT (name) DO UPDATE SET value = excluded.value`,
		strconv.FormatUint(value, 10))
	return err
}
