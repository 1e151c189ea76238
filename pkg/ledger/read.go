package ledger

import (
	"bytes"
	"context"
	"crypto"
	"database/sql"
	"encoding/base64"
	"errors"
	"fmt"
	"iter"

	"golang.org/x/mod/sumdb/tlog"

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
	var first, count int64
	var offsets [][]byte
	for _, u := range units {
		if offsets == nil || u.Leaf < first || u.Leaf >= first+count {
			var leaves []byte
			err := l.db.QueryRowContext(ctx, `SELECT first, count, leaves FROM log WHERE first <= $1 ORDER BY first DESC LIMIT 1`, u.Leaf).Scan(&first, &count, &leaves)
			if err != nil {
				return fmt.Errorf("%w: entry %d: %v", ErrDamaged, u.Leaf, err)
			}
			offsets = offsets[:0]
			if err := eachLeaf(leaves, func(b []byte) error { offsets = append(offsets, b); return nil }); err != nil {
				return fmt.Errorf("%w: entries from %d: %v", ErrDamaged, first, err)
			}
		}
		if u.Leaf >= first+int64(len(offsets)) {
			return fmt.Errorf("%w: entry %d is missing", ErrDamaged, u.Leaf)
		}
		f, err := parseLeaf(offsets[u.Leaf-first])
		if err != nil {
			return fmt.Errorf("%w: entry %d: %v", ErrDamaged, u.Leaf, err)
		}
		if f.unit != u.ID || f.serial != u.Serial {
			return fmt.Errorf("%w: entry %d is not about serial %s", ErrDamaged, u.Leaf, u.Serial)
		}
		u.Data, u.EKHash = f.data, f.ekHash
	}
	return nil
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
func (l *Ledger) Checkpoint(ctx context.Context) ([]byte, error) {
	var signed string
	err := l.db.QueryRowContext(ctx, `SELECT note FROM checkpoint`).Scan(&signed)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, fmt.Errorf("checkpoint: %w", ErrNotFound)
	}
	return []byte(signed), err
}

// A Report is what Verify found in a ledger that verifies.
type Report struct {
	Checkpoint Checkpoint `json:"checkpoint"`
	Entries    int64      `json:"entries"`
	Units      int64      `json:"units"`
	Voided     int64      `json:"voided"`
	Jobs       int64      `json:"jobs"`
	// VoidedKeys is how many keys are never to be used again.
	VoidedKeys int64 `json:"voidedKeys"`
}

// Verify reads the whole ledger: every entry is hashed again up to the root that the station signed, and the table of
// units must say just what the entries say. The error wraps ErrDamaged. Memory grows by 24 octets a unit.
func (l *Ledger) Verify(ctx context.Context, station crypto.PublicKey) (Report, error) {
	var r Report
	damaged := func(format string, args ...any) (Report, error) {
		return r, fmt.Errorf("%w: %w", ErrDamaged, fmt.Errorf(format, args...))
	}
	// One snapshot, so that a station at work does not look like damage.
	stx, err := l.db.BeginTx(ctx, &sql.TxOptions{ReadOnly: true})
	if err != nil {
		return r, err
	}
	defer func() { _ = stx.Rollback() }()
	var integrity string
	if err := stx.QueryRowContext(ctx, `PRAGMA integrity_check(1)`).Scan(&integrity); err != nil || integrity != "ok" {
		return damaged("database: %s %w", integrity, errOrNil(err))
	}
	t := &tx{Tx: stx, l: &Ledger{frontier: map[int64]tlog.Hash{}}, newHashes: map[int64]tlog.Hash{}}
	var units replay
	for {
		var first, count int64
		var leaves, hashes []byte
		err := stx.QueryRowContext(ctx, `SELECT first, count, leaves, hashes FROM log WHERE first >= $1 ORDER BY first LIMIT 1`, t.first).
			Scan(&first, &count, &leaves, &hashes)
		if errors.Is(err, sql.ErrNoRows) {
			break
		}
		if err != nil {
			return damaged("entries from %d: %w", t.first, err)
		}
		if first != t.first {
			return damaged("entries %d to %d are missing", t.first, first-1)
		}
		t.leaves, t.hashes, t.count = nil, nil, 0
		err = eachLeaf(leaves, func(b []byte) error {
			f, err := parseLeaf(b)
			if err != nil {
				return err
			}
			idx, err := t.addRaw(b)
			if err != nil {
				return err
			}
			switch {
			case f.state == jobBegun:
				r.Jobs++
				var profile string
				err := stx.QueryRowContext(ctx, `SELECT profile FROM jobs WHERE id = $1 AND digest = $2 AND out = $3 AND started = $4`,
					f.job, f.keyHash, string(f.data), f.at.UnixMilli()).Scan(&profile)
				if err != nil || clip(profile) != f.serial {
					return fmt.Errorf("job %d is not as it was recorded", f.job)
				}
			case f.state == Voided:
				if f.keyHash != nil {
					var there int
					if err := stx.QueryRowContext(ctx, `SELECT count(*) FROM voided WHERE key_hash = $1`, f.keyHash).Scan(&there); err != nil || there != 1 {
						return fmt.Errorf("the key of voided unit %d is not among the voided ones", f.unit)
					}
					r.VoidedKeys++
				}
				fallthrough
			default:
				if err := units.apply(&f); err != nil {
					return err
				}
				if f.state != Voided && f.serial != "" && f.count == 1 {
					return checkUnit(ctx, stx, idx, f)
				}
			}
			return nil
		})
		if err != nil {
			return damaged("entry %d: %w", t.first+t.count, err)
		}
		if t.count != count || !bytes.Equal(t.hashes, hashes) {
			return damaged("entries %d to %d do not have the hashes that were recorded", first, first+count-1)
		}
		t.first += count
		t.l.size = t.first
		edge := map[int64]tlog.Hash{}
		for _, idx := range frontierIndexes(t.first) {
			if h, ok := t.newHashes[idx]; ok {
				edge[idx] = h
			} else {
				edge[idx] = t.l.frontier[idx]
			}
		}
		t.l.frontier, t.newHashes = edge, map[int64]tlog.Hash{}
	}
	r.Entries, r.Voided = t.first, units.voided
	if r.Units, err = units.compare(ctx, stx); err != nil {
		return damaged("%w", err)
	}
	var keys, next int64
	if err := stx.QueryRowContext(ctx, `SELECT count(*) FROM voided`).Scan(&keys); err != nil || keys != r.VoidedKeys {
		return damaged("the table has %d voided keys, the log %d %w", keys, r.VoidedKeys, errOrNil(err))
	}
	// Where a unit was ever voided, the highest ID is kept beside the table too.
	err = stx.QueryRowContext(ctx, `SELECT CAST(value AS INTEGER) FROM meta WHERE name = 'units'`).Scan(&next)
	if err == nil && next != int64(len(units.seen))+1 || err != nil && !errors.Is(err, sql.ErrNoRows) || errors.Is(err, sql.ErrNoRows) && len(units.seen) > 0 {
		return damaged("the next unit is %d in the table, the log has %d %w", next, len(units.seen), errOrNil(err))
	}
	var jobs int64
	if err := stx.QueryRowContext(ctx, `SELECT count(*) FROM jobs`).Scan(&jobs); err != nil || jobs != r.Jobs {
		return damaged("the table has %d jobs, the log %d %w", jobs, r.Jobs, errOrNil(err))
	}
	if r.Entries == 0 {
		return r, nil
	}
	var signed string
	if err := stx.QueryRowContext(ctx, `SELECT note FROM checkpoint`).Scan(&signed); err != nil {
		return damaged("checkpoint: %w", err)
	}
	r.Checkpoint, err = OpenCheckpoint([]byte(signed), station)
	if errors.Is(err, ErrStation) {
		return r, err // nothing says that the ledger is damaged
	}
	if err != nil {
		return damaged("%w", err)
	}
	root, err := tlog.TreeHash(t.first, t)
	if err != nil {
		return damaged("%w", err)
	}
	if r.Checkpoint.Size != t.first || r.Checkpoint.Root != base64.StdEncoding.EncodeToString(root[:]) {
		return damaged("the signed checkpoint (%d entries, root %s) is not that of the log (%d entries, root %s)",
			r.Checkpoint.Size, r.Checkpoint.Root, t.first, base64.StdEncoding.EncodeToString(root[:]))
	}
	return r, nil
}

// replay is what the log says became of each unit.
type replay struct {
	seen   []replayed // by unit ID - 1
	voided int64
}

type replayed struct {
	state State
	ek    bool // an endorsement key was written down
	job   int64
	at    int64 // milliseconds: when it was begun
}

func (p *replay) apply(f *leaf) error {
	if f.job != 0 && f.serial != "" { // a new unit: the IDs have no holes
		if f.unit != int64(len(p.seen))+1 {
			return fmt.Errorf("unit %d begins after unit %d", f.unit, len(p.seen))
		}
		p.seen = append(p.seen, replayed{f.state, f.ekHash != nil, f.job, f.at.UnixMilli()})
		return nil
	}
	if f.unit < 1 || f.count < 1 || f.unit+f.count-1 > int64(len(p.seen)) {
		return fmt.Errorf("units %d to %d never began", f.unit, f.unit+f.count-1)
	}
	for i := f.unit - 1; i < f.unit-1+f.count; i++ {
		if p.seen[i].state == Voided {
			return fmt.Errorf("unit %d went on after it was voided", i+1)
		}
		p.seen[i].state = f.state
		p.seen[i].ek = p.seen[i].ek || f.ekHash != nil
	}
	if f.state == Voided {
		p.voided += f.count
	}
	return nil
}

// compare holds every row of the table against the replay, and returns how many there are.
func (p *replay) compare(ctx context.Context, stx *sql.Tx) (rows int64, err error) {
	// EXISTS is one step in an index; units without a TPM, nearly all, find nothing.
	q, err := stx.QueryContext(ctx, `SELECT id, state, job, at, EXISTS (SELECT 1 FROM endorsements WHERE unit = id) FROM units ORDER BY id`)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, q.Close()) }()
	var eks int64
	for q.Next() {
		var id, state int64
		var r replayed
		if err := q.Scan(&id, &state, &r.job, &r.at, &r.ek); err != nil {
			return rows, err
		}
		r.state = State(state)
		if id < 1 || id > int64(len(p.seen)) || p.seen[id-1] != r {
			return rows, fmt.Errorf("unit %d is not in the table as the log has it", id)
		}
		rows++
		if r.ek {
			eks++
		}
	}
	var all int64
	if err := stx.QueryRowContext(ctx, `SELECT count(*) FROM endorsements`).Scan(&all); err != nil || all != eks {
		return rows, fmt.Errorf("the table has %d endorsement keys, the log %d %w", all, eks, errOrNil(err))
	}
	if want := int64(len(p.seen)) - p.voided; rows != want {
		return rows, fmt.Errorf("the table has %d units, the log %d", rows, want)
	}
	return rows, q.Err()
}

var errNothing = errors.New("")

func errOrNil(err error) error {
	if err == nil {
		return errNothing
	}
	return err
}

// addRaw hashes an entry as it stands.
func (t *tx) addRaw(b []byte) (int64, error) {
	idx := t.first + t.count
	hs, err := tlog.StoredHashesForRecordHash(idx, tlog.RecordHash(b), t)
	if err != nil {
		return 0, err
	}
	at := tlog.StoredHashIndex(0, idx)
	for i, h := range hs {
		t.newHashes[at+int64(i)] = h
		t.hashes = append(t.hashes, h[:]...)
	}
	t.count++
	return idx, nil
}

// checkUnit holds a unit's row against the entry that it points to. An entry that no row points to is older than the one
// that does, or its unit was voided; the counts settle that.
func checkUnit(ctx context.Context, stx *sql.Tx, idx int64, f leaf) error {
	u, err := scanUnit(stx.QueryRowContext(ctx, unitColumns+`id = $1`, f.unit))
	if errors.Is(err, sql.ErrNoRows) {
		return nil
	}
	if err != nil {
		return err
	}
	if u.Leaf < idx {
		return fmt.Errorf("unit %d points to entry %d, a later one is %d", f.unit, u.Leaf, idx)
	}
	var folded string
	if err := stx.QueryRowContext(ctx, `SELECT registration_id FROM units WHERE id = $1`, f.unit).Scan(&folded); err != nil {
		return err
	}
	if u.Serial != f.serial || u.RegistrationID != f.registrationID || folded != dps.Fold(f.registrationID) {
		return fmt.Errorf("unit %d is serial %s, registration ID %s (%s) in the table", f.unit, u.Serial, u.RegistrationID, folded)
	}
	if f.ekHash != nil {
		var unit int64
		if err := stx.QueryRowContext(ctx, `SELECT unit FROM endorsements WHERE ek_hash = $1`, f.ekHash).Scan(&unit); err != nil || unit != f.unit {
			return fmt.Errorf("the endorsement key of unit %d is not its own in the table", f.unit)
		}
	}
	if f.keyHash != nil && !bytes.Equal(u.KeyHash, f.keyHash) || u.State < f.state {
		return fmt.Errorf("unit %d has another key or an earlier state in the table", f.unit)
	}
	return nil
}
