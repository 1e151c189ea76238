package ledger

import (
	"context"
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

func (l *Ledger) storedHash(ctx context.Context, idx int64) (tlog.Hash, error) {
	var h tlog.Hash
	var first int64
	var hashes []byte
	err := l.db.QueryRowContext(ctx, `SELECT first_hash, hashes FROM log WHERE first_hash <= $1 ORDER BY first_hash DESC LIMIT 1`, idx).Scan(&first, &hashes)
	if err != nil {
		return h, fmt.Errorf("%w: hash %d: %v", ErrDamaged, idx, err)
	}
	off := (idx - first) * tlog.HashSize
	if off+tlog.HashSize > int64(len(hashes)) {
		return h, fmt.Errorf("%w: hash %d is missing", ErrDamaged, idx)
	}
	copy(h[:], hashes[off:])
	return h, nil
}
