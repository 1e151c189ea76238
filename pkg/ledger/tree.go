package ledger

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math/bits"

	"golang.org/x/mod/sumdb/tlog"
)

// edge is the right edge of a Merkle tree, which is all that it takes to go on with it. What it yields is what
// tlog.StoredHashes and tlog.TreeHash would, without looking anything up.
type edge struct {
	size int64
	at   [63]tlog.Hash // of the complete subtree of 1<<i leaves, where bit i of size is set
}

// add takes a leaf's hash and appends the hashes that are complete with it to out, in the order of tlog.StoredHashIndex.
func (e *edge) add(h tlog.Hash, out []byte) []byte {
	out = append(out, h[:]...)
	i := 0
	for ; e.size>>i&1 == 1; i++ {
		h = tlog.NodeHash(e.at[i], h)
		out = append(out, h[:]...)
	}
	e.at[i] = h
	e.size++
	return out
}

// root returns the hash of the whole tree.
func (e *edge) root() tlog.Hash {
	if e.size == 0 {
		h, _ := tlog.TreeHash(0, nil) // an empty tree needs no reader
		return h
	}
	i := bits.TrailingZeros64(uint64(e.size))
	h := e.at[i]
	for i++; e.size>>i > 0; i++ {
		if e.size>>i&1 == 1 {
			h = tlog.NodeHash(e.at[i], h)
		}
	}
	return h
}

// hashReader reads stored hashes: a tlog.HashReader.
type hashReader struct {
	ctx context.Context // of the one call that the reader is made for
	q   interface {
		QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
	}
}

func (r hashReader) ReadHashes(indexes []int64) ([]tlog.Hash, error) {
	out := make([]tlog.Hash, len(indexes))
	for i, idx := range indexes {
		var b []byte
		err := r.q.QueryRowContext(r.ctx, `SELECT substr(hashes, 32 * ($1 - first_hash) + 1, 32) FROM log WHERE first_hash <= $1 ORDER BY first_hash DESC LIMIT 1`, idx).Scan(&b)
		if err == nil && len(b) != tlog.HashSize {
			err = errors.New("it is missing")
		}
		if err != nil {
			return nil, fmt.Errorf("%w: hash %d: %v", ErrDamaged, idx, err)
		}
		copy(out[i][:], b)
	}
	return out, nil
}

// at returns the hash of the n-th complete subtree of 1<<level entries.
func (r hashReader) at(level int, n int64) (tlog.Hash, error) {
	hs, err := r.ReadHashes([]int64{tlog.StoredHashIndex(level, n)})
	if err != nil {
		return tlog.Hash{}, err
	}
	return hs[0], nil
}

// A snapshot is a ledger as it stands under its checkpoint, whatever its station goes on to do.
type snapshot struct {
	hashReader
	tx   *sql.Tx
	note []byte // not verified here: who reads what comes of it has the station's key
	Checkpoint
	root tlog.Hash
}

// snapshot calls f with the ledger as it is now, its stored hashes held against its checkpoint. While the log is empty it has none.
func (l *Ledger) snapshot(ctx context.Context, f func(*snapshot) error) error {
	tx, err := l.db.BeginTx(ctx, &sql.TxOptions{ReadOnly: true})
	if err != nil {
		return denied(err)
	}
	defer func() { _ = tx.Rollback() }()
	return l.snapshotIn(ctx, tx, f)
}

func (l *Ledger) snapshotIn(ctx context.Context, tx *sql.Tx, f func(*snapshot) error) (err error) {
	s := &snapshot{hashReader: hashReader{ctx, tx}, tx: tx}
	s.note, err = readCheckpoint(ctx, tx)
	if errors.Is(err, ErrNotFound) {
		var some bool
		if err := tx.QueryRowContext(ctx, `SELECT EXISTS (SELECT 1 FROM log)`).Scan(&some); err != nil || some {
			return fmt.Errorf("%w: its entries have no checkpoint %w", ErrDamaged, errOrNil(err))
		}
		s.Checkpoint = Checkpoint{Origin: l.cfg.Origin}
		return f(s)
	}
	if err != nil {
		return err
	}
	if s.Checkpoint, s.root, err = unverified(s.note); err != nil {
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if err := s.holds(s.Size, s.root); err != nil {
		return fmt.Errorf("%w: its entries and its checkpoint of %d entries: %w", ErrDamaged, s.Size, err)
	}
	return f(s)
}

var errOtherRoot = errors.New("they have different roots")

// holds says whether the log's first entries have a root.
func (s *snapshot) holds(size int64, root tlog.Hash) error {
	got, err := tlog.TreeHash(size, s)
	if err == nil && got != root {
		err = errOtherRoot
	}
	return err
}

// entries calls visit with every entry under the checkpoint, from the row of the log on that holds an index. What it is called with is
// good until it returns.
func (s *snapshot) entries(from int64, visit func(index int64, entry []byte, f *leaf) error) (err error) {
	rows, err := s.tx.QueryContext(s.ctx, `SELECT first, leaves FROM log WHERE first >= coalesce((SELECT max(first) FROM log WHERE first <= $1), 0) AND first < $2 ORDER BY first`, from, s.Size)
	if err != nil {
		return denied(err)
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	var leaves sql.RawBytes
	for rows.Next() {
		var i int64
		if err := rows.Scan(&i, &leaves); err != nil {
			return denied(err)
		}
		err := eachLeaf(leaves, func(b []byte) error {
			f, err := parseLeaf(b)
			if err == nil && i < s.Size {
				err = visit(i, b, &f)
			}
			i++
			return err
		})
		if errors.Is(err, errLeaf) {
			return fmt.Errorf("%w: entries to %d: %w", ErrDamaged, i-1, err)
		}
		if err != nil {
			return err
		}
	}
	return denied(rows.Err())
}
