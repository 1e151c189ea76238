package ledger

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
	"modernc.org/sqlite" // also registers the driver
	sqlite3 "modernc.org/sqlite/lib"

	"github.com/touchmark/touchmark/pkg/dps"
)

// tx is one commit being built: the leaves and hashes that it adds.
type tx struct {
	*sql.Tx
	l        *Ledger
	at       time.Time
	first    int64
	count    int64
	leaves   []byte
	hashes   []byte
	edge     edge
	buf      []byte
	anchored bool // this step moves the counter
}

// add appends a leaf and returns its index.
func (t *tx) add(f leaf) (int64, error) {
	f.at = t.at
	if len(f.serial) > maxText || len(f.registrationID) > maxText || len(f.data) > maxData {
		return 0, fmt.Errorf("ledger entry for serial %.40q is too long", f.serial)
	}
	t.buf = f.append(t.buf[:0])
	t.hashes = t.edge.add(tlog.RecordHash(t.buf), t.hashes)
	t.leaves = appendBytes(t.leaves, t.buf)
	t.count++
	return t.first + t.count - 1, nil
}

// update runs f in one transaction and closes it with the log row and a fresh checkpoint. The transaction is the only
// thing that makes a step durable: SQLite's write-ahead log is flushed at COMMIT, before update returns. When it fails
// nothing of the step is there, and the same call may be made again.
func (l *Ledger) update(ctx context.Context, f func(*tx) error) error {
	if l.broken != nil {
		return l.broken
	}
	at, err := l.now()
	if err != nil {
		return err
	}
	stx, err := l.db.BeginTx(ctx, nil)
	if err != nil {
		return full(err)
	}
	t := &tx{Tx: stx, l: l, at: at, first: l.size, edge: l.edge, leaves: l.leaves[:0], hashes: l.hashes[:0]}
	defer func() { l.leaves, l.hashes = t.leaves, t.hashes }()
	nextUnit := l.nextUnit
	if err = f(t); err == nil {
		err = t.close(ctx)
	}
	if err != nil {
		l.nextUnit = nextUnit
		return errors.Join(full(err), rollback(stx))
	}
	if err := stx.Commit(); err != nil {
		// Whether it took effect is not known here; the next Open reads the truth from disk.
		l.broken = fmt.Errorf("%w after a failed commit: %w", ErrBroken, full(err))
		return l.broken
	}
	l.size, l.lastTime, l.edge = t.first+t.count, at, t.edge
	if t.anchored {
		// The counter moves once the step is durable, and before the caller goes on to what cannot be undone. A crash in between
		// leaves the ledger one ahead of its counter, which checkAnchor makes good.
		if l.anchor, err = l.increment(ctx, l.anchor); err != nil {
			l.broken = fmt.Errorf("%w: the ledger's counter could not be moved: %w", ErrAnchor, err)
		}
	}
	return l.broken
}

func rollback(stx *sql.Tx) error {
	if err := stx.Rollback(); err != nil && !errors.Is(err, sql.ErrTxDone) {
		return err
	}
	return nil
}

func (t *tx) close(ctx context.Context) error {
	if t.count == 0 {
		return nil
	}
	size := t.first + t.count
	if _, err := t.ExecContext(ctx, `INSERT INTO log (first, first_hash, count, leaves, hashes) VALUES ($1, $2, $3, $4, $5)`,
		t.first, tlog.StoredHashIndex(0, t.first), t.count, t.leaves, t.hashes); err != nil {
		return err
	}
	if _, err := t.ExecContext(ctx, `INSERT INTO meta (name, value) VALUES ('units', $1) ON CONFLICT (name) DO UPDATE SET value = excluded.value`,
		t.l.nextUnit); err != nil {
		return err
	}
	signed, err := note.Sign(&note.Note{Text: checkpointText(t.l.cfg.Origin, size, t.edge.root())}, t.l.signer)
	if err != nil {
		return fmt.Errorf("signing the checkpoint with the station key: %w", err)
	}
	_, err = t.ExecContext(ctx, `INSERT INTO checkpoint (one, size, note) VALUES (1, $1, $2)
		ON CONFLICT (one) DO UPDATE SET size = excluded.size, note = excluded.note`, size, string(signed))
	return err
}

// Commit takes every event or none, durably, and fills in the IDs of new units. A serial, registration ID or key that is
// taken is a *DuplicateError; a unit that is not in the state before the one asked for is an error too.
func (l *Ledger) Commit(ctx context.Context, events []Event) error {
	if len(events) == 0 {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(events) >= maxRun && l.insertMost == nil && l.broken == nil {
		// Before the transaction, which has the one connection.
		var err error
		if l.insertMost, err = l.db.PrepareContext(ctx, insertSQL(maxRun)); err != nil {
			return err
		}
	}
	var made []int
	err := l.update(ctx, func(t *tx) error {
		made = made[:0]
		for i := 0; i < len(events); {
			n := run(events[i:])
			var err error
			switch {
			case events[i].Unit == 0:
				err = t.insert(ctx, events[i:i+n])
				for k := i; k < i+n; k++ {
					made = append(made, k)
				}
			case events[i].State.ends():
				err = t.end(ctx, events[i])
			default:
				err = t.advance(ctx, events[i:i+n])
			}
			if err != nil {
				return err
			}
			i += n
		}
		return nil
	})
	if err != nil {
		for _, k := range made {
			events[k].Unit = 0
		}
		return l.explain(ctx, err, events)
	}
	return nil
}

// maxRun bounds how many rows one INSERT carries: ten values each, below SQLite's limit on parameters.
const maxRun = 200

// run returns how many events at the head of the slice make one statement: new units, or units with rising IDs that enter
// the same state, all with data or all without.
func run(events []Event) int {
	e := &events[0]
	if e.State.ends() {
		return 1
	}
	n := 1
	for n < len(events) {
		f := &events[n]
		if f.State != e.State || (f.Unit == 0) != (e.Unit == 0) || e.Unit == 0 && n == maxRun ||
			e.Unit != 0 && (f.Unit != e.Unit+int64(n) || (f.Data == nil) != (e.Data == nil) || (f.KeyHash == nil) != (e.KeyHash == nil) || (f.EKHash == nil) != (e.EKHash == nil)) {
			break
		}
		n++
	}
	return n
}

// OR FAIL spares SQLite a journal per statement: a broken unique index ends the whole transaction anyway.
const insertColumns = `INSERT OR FAIL INTO units (id, serial, registration_id, key_hash, spelling, state, job, at, leaf, revision) VALUES `

// insertRows caches the text of INSERT statements by number of rows.
var insertRows sync.Map

func insertSQL(n int) string {
	if s, ok := insertRows.Load(n); ok {
		return s.(string)
	}
	var b strings.Builder
	b.WriteString(insertColumns)
	for i := range n {
		if i > 0 {
			b.WriteByte(',')
		}
		b.WriteString("(?,?,?,?,?,?,?,?,?,?)")
	}
	insertRows.Store(n, b.String())
	return b.String()
}

func (t *tx) insert(ctx context.Context, events []Event) error {
	places, err := t.spend(ctx, events)
	if err != nil {
		return err
	}
	if err := t.revise(ctx, events); err != nil {
		return err
	}
	args := make([]any, 0, 10*len(events))
	for i := range events {
		e := &events[i]
		if e.State != Begun && e.State != Minted {
			return fmt.Errorf("a new unit cannot be %s", e.State)
		}
		if e.Serial == "" || e.RegistrationID == "" {
			return errors.New("a new unit needs a serial and a registration ID")
		}
		if e.State == Minted && len(e.KeyHash) != 32 {
			return errors.New("a minted unit needs a key")
		}
		e.Unit = t.l.nextUnit
		t.l.nextUnit++
		idx, err := t.add(leaf{state: e.State, job: e.Job, unit: e.Unit, count: places[i], revision: e.Revision, serial: e.Serial,
			registrationID: e.RegistrationID, keyHash: e.KeyHash, ekHash: e.EKHash, data: e.Data})
		if err != nil {
			return err
		}
		var hash, spelling any
		if e.KeyHash != nil {
			hash = e.KeyHash
		}
		folded := dps.Fold(e.RegistrationID)
		if folded != e.RegistrationID {
			spelling = e.RegistrationID
		}
		args = append(args, e.Unit, e.Serial, folded, hash, spelling, int64(e.State), e.Job, t.at.UnixMilli(), idx, e.Revision)
	}
	if err := t.neverRetired(ctx, events); err != nil {
		return err
	}
	if len(events) == maxRun {
		_, err = t.StmtContext(ctx, t.l.insertMost).ExecContext(ctx, args...)
	} else {
		_, err = t.ExecContext(ctx, insertSQL(len(events)), args...)
	}
	if err != nil {
		return err
	}
	return t.endorse(ctx, events)
}

// endorse writes down whose endorsement keys the events name.
func (t *tx) endorse(ctx context.Context, events []Event) error {
	for i := range events {
		if events[i].EKHash == nil {
			continue
		}
		if _, err := t.ExecContext(ctx, `INSERT INTO endorsements (ek_hash, unit) VALUES ($1, $2)`, events[i].EKHash, events[i].Unit); err != nil {
			return err
		}
	}
	return nil
}

// before lists the states that a unit may enter a state from.
var before = map[State]string{
	Minted:   oneOf(Begun),
	Stamped:  oneOf(Minted),
	Verified: oneOf(Minted, Stamped),
	Sealed:   oneOf(Verified),
	Exported: oneOf(Minted, Verified, Sealed, Exported), // Minted: where nothing is stamped. Again: in another bundle
}

// oneOf lists states as SQL has them.
func oneOf(states ...State) string {
	var b []byte
	for i, s := range states {
		if i > 0 {
			b = append(b, ',')
		}
		b = strconv.AppendUint(b, uint64(s), 10)
	}
	return string(b)
}

// advance moves units with consecutive IDs to one state. With data each has a leaf of its own; without, one leaf speaks
// for the whole run.
func (t *tx) advance(ctx context.Context, events []Event) error {
	e, n := &events[0], int64(len(events))
	from, ok := before[e.State]
	if !ok {
		return fmt.Errorf("a unit cannot be moved to %s", e.State)
	}
	ranged := e.Data == nil && e.KeyHash == nil && e.EKHash == nil || e.State == Exported
	first := int64(-1)
	if ranged {
		if _, err := t.add(leaf{state: e.State, unit: e.Unit, count: n, data: e.Data}); err != nil {
			return err
		}
	} else {
		for i := range events {
			f := &events[i]
			idx, err := t.add(leaf{state: f.State, unit: f.Unit, count: 1, serial: f.Serial,
				registrationID: f.RegistrationID, keyHash: f.KeyHash, ekHash: f.EKHash, data: f.Data})
			if err != nil {
				return err
			}
			if i == 0 {
				first = idx
			}
		}
	}
	set, args := `state = $1`, []any{int64(e.State), e.Unit, e.Unit + n - 1}
	if first >= 0 {
		set += `, leaf = $4 + id - $2`
		args = append(args, first)
	}
	where := `id BETWEEN $2 AND $3 AND state IN (` + from + `)`
	res, err := t.ExecContext(ctx, `UPDATE units SET `+set+` WHERE `+where, args...)
	if err != nil {
		return err
	}
	if moved, err := res.RowsAffected(); err != nil || moved != n {
		return errors.Join(fmt.Errorf("%d of %d units were not ready to be %s", n-moved, n, e.State), err)
	}
	if !ranged && e.KeyHash != nil {
		if err := t.neverRetired(ctx, events); err != nil {
			return err
		}
		for i := range events {
			if _, err := t.ExecContext(ctx, `UPDATE units SET key_hash = $1 WHERE id = $2 AND key_hash IS NOT $1`, events[i].KeyHash, events[i].Unit); err != nil {
				return err
			}
		}
	}
	if !ranged {
		return t.endorse(ctx, events)
	}
	return nil
}

// explain turns a broken unique index into a DuplicateError that names the unit which has the value.
func (l *Ledger) explain(ctx context.Context, err error, events []Event) error {
	var se *sqlite.Error
	if !errors.As(err, &se) || se.Code()&0xff != sqlite3.SQLITE_CONSTRAINT {
		return err
	}
	for i := range events {
		e := &events[i]
		if dup := l.duplicate(ctx, e.Unit, e.Serial, e.RegistrationID, e.KeyHash, e.EKHash); dup != nil {
			return dup
		}
	}
	seen := make(map[string]string, 2*len(events))
	for i := range events {
		e := &events[i]
		for what, hash := range map[string][]byte{"key": e.KeyHash, "endorsement key": e.EKHash} {
			if hash == nil {
				continue
			}
			if other, twice := seen[what+string(hash)]; twice {
				return fmt.Errorf("serials %s and %s have one %s: is one device in two places?", other, e.Serial, what)
			}
			seen[what+string(hash)] = e.Serial
		}
	}
	return fmt.Errorf("the same serial or registration ID appears twice in one step: %w", err)
}

// Taken returns a DuplicateError when a living unit has the serial or the registration ID, and else nil. Commit asks again:
// this is for a better word before work starts.
func (l *Ledger) Taken(ctx context.Context, serial, registrationID string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if dup := l.duplicate(ctx, 0, serial, registrationID, nil, nil); dup != nil {
		return dup
	}
	return nil
}

func (l *Ledger) duplicate(ctx context.Context, unit int64, serial, rid string, hash, ek []byte) *DuplicateError {
	for _, c := range []struct {
		field, where string
		arg          any
		value        string
		skip         bool
	}{
		{"serial", `serial = $1`, serial, serial, serial == ""},
		{"registration ID", `registration_id = $1`, dps.Fold(rid), rid, rid == ""},
		{"key", `key_hash = $1`, hash, fmt.Sprintf("%x", hash), hash == nil},
		{"endorsement key", `id = (SELECT unit FROM endorsements WHERE ek_hash = $1)`, ek, fmt.Sprintf("%x", ek), ek == nil},
	} {
		if c.skip {
			continue
		}
		u, err := l.unitWhere(ctx, c.where, c.arg)
		if errors.Is(err, sql.ErrNoRows) && c.field == "endorsement key" {
			// A scrapped unit's TPM is nobody's again.
			for r, rerr := range l.Endings(ctx) {
				var whose int64
				if rerr != nil || r.State != Scrapped {
					continue
				}
				if l.db.QueryRowContext(ctx, `SELECT unit FROM endorsements WHERE ek_hash = $1`, c.arg).Scan(&whose) == nil && whose == r.ID {
					u, err = r.Unit, nil
				}
			}
		}
		if err != nil || u.ID == unit {
			continue
		}
		j, _ := l.jobWhere(ctx, `id = $1`, u.Job)
		return &DuplicateError{Field: c.field, Value: c.value, Unit: u, Job: j}
	}
	return nil
}
