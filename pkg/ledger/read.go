package ledger

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"iter"
	"time"

	"github.com/touchmark/touchmark/pkg/dps"
)

// ErrNotFound says that no unit, or no checkpoint, is there.
var ErrNotFound = errors.New("not in the ledger")

// Find returns the living unit of a serial, with its data.
func (l *Ledger) Find(ctx context.Context, serial string) (Unit, error) {
	u, err := l.unitWhere(ctx, `serial = $1`, serial)
	if errors.Is(err, sql.ErrNoRows) {
		return u, fmt.Errorf("serial %q: %w", serial, ErrNotFound)
	}
	if err != nil {
		return u, err
	}
	return u, l.Fill(ctx, &u)
}

// FindDevice returns the living unit of a registration ID, without its data.
func (l *Ledger) FindDevice(ctx context.Context, registrationID string) (Unit, error) {
	u, err := l.unitWhere(ctx, `registration_id = $1`, dps.Fold(registrationID))
	if errors.Is(err, sql.ErrNoRows) {
		return u, fmt.Errorf("registration ID %q: %w", registrationID, ErrNotFound)
	}
	return u, err
}

// Units yields living units in the order in which they were begun, without their data; job 0 means all of them.
func (l *Ledger) Units(ctx context.Context, job int64) iter.Seq2[Unit, error] {
	return func(yield func(Unit, error) bool) {
		// In pages, so that the one connection is free between them and memory stays flat.
		const page = 1000
		for last := int64(0); ; {
			rows, err := l.db.QueryContext(ctx, unitColumns+`id > $1 AND ($2 = 0 OR job = $2) ORDER BY id LIMIT $3`, last, job, page)
			if err != nil {
				yield(Unit{}, err)
				return
			}
			var units []Unit
			for rows.Next() {
				u, err := scanUnit(rows)
				if err != nil {
					yield(Unit{}, errors.Join(err, rows.Close()))
					return
				}
				units = append(units, u)
			}
			if err := rows.Err(); err != nil {
				yield(Unit{}, err)
				return
			}
			for _, u := range units {
				if !yield(u, nil) {
					return
				}
				last = u.ID
			}
			if len(units) < page {
				return
			}
		}
	}
}

// Fill reads the data of units from the log. Neighbours share a read, so pass units in order.
func (l *Ledger) Fill(ctx context.Context, units ...*Unit) error {
	_, err := l.fill(ctx, units...)
	return err
}

// fill returns when the last unit's entry was made, too.
func (l *Ledger) fill(ctx context.Context, units ...*Unit) (at time.Time, err error) {
	var first, count int64
	var offsets [][]byte
	for _, u := range units {
		if offsets == nil || u.Leaf < first || u.Leaf >= first+count {
			var leaves []byte
			err := l.db.QueryRowContext(ctx, `SELECT first, count, leaves FROM log WHERE first <= $1 ORDER BY first DESC LIMIT 1`, u.Leaf).Scan(&first, &count, &leaves)
			if err != nil {
				return at, fmt.Errorf("%w: entry %d: %v", ErrDamaged, u.Leaf, err)
			}
			offsets = offsets[:0]
			if err := eachLeaf(leaves, func(b []byte) error { offsets = append(offsets, b); return nil }); err != nil {
				return at, fmt.Errorf("%w: entries from %d: %v", ErrDamaged, first, err)
			}
		}
		if u.Leaf >= first+int64(len(offsets)) {
			return at, fmt.Errorf("%w: entry %d is missing", ErrDamaged, u.Leaf)
		}
		f, err := parseLeaf(offsets[u.Leaf-first])
		if err != nil {
			return at, fmt.Errorf("%w: entry %d: %v", ErrDamaged, u.Leaf, err)
		}
		if f.unit != u.ID || f.serial != u.Serial {
			return at, fmt.Errorf("%w: entry %d is not about serial %s", ErrDamaged, u.Leaf, u.Serial)
		}
		u.Data, u.EKHash, at = f.data, f.ekHash, f.at
	}
	return at, nil
}

// Jobs returns every job, oldest first.
func (l *Ledger) Jobs(ctx context.Context) ([]Job, error) {
	rows, err := l.db.QueryContext(ctx, `SELECT id FROM jobs ORDER BY id`)
	if err != nil {
		return nil, err
	}
	var ids []int64
	for rows.Next() {
		var id int64
		if err := rows.Scan(&id); err != nil {
			return nil, errors.Join(err, rows.Close())
		}
		ids = append(ids, id)
	}
	if err := rows.Err(); err != nil {
		return nil, err
	}
	jobs := make([]Job, 0, len(ids))
	for _, id := range ids {
		j, err := l.jobWhere(ctx, `id = $1`, id)
		if err != nil {
			return nil, err
		}
		jobs = append(jobs, j)
	}
	return jobs, nil
}

// Counts returns how many living units stand in each state.
func (l *Ledger) Counts(ctx context.Context) (map[State]int64, error) {
	rows, err := l.db.QueryContext(ctx, `SELECT state, count(*) FROM units GROUP BY state`)
	if err != nil {
		return nil, err
	}
	counts := make(map[State]int64)
	for rows.Next() {
		var s, n int64
		if err := rows.Scan(&s, &n); err != nil {
			return nil, errors.Join(err, rows.Close())
		}
		counts[State(s)] = n
	}
	return counts, rows.Err()
}

// Checkpoint returns the newest signed checkpoint, or ErrNotFound while the log is empty.
func (l *Ledger) Checkpoint(ctx context.Context) ([]byte, error) { return readCheckpoint(ctx, l.db) }

func readCheckpoint(ctx context.Context, q interface {
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
}) ([]byte, error) {
	var signed string
	err := q.QueryRowContext(ctx, `SELECT note FROM checkpoint`).Scan(&signed)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, fmt.Errorf("checkpoint: %w", ErrNotFound)
	}
	return []byte(signed), denied(err)
}
