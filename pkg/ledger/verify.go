package ledger

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"database/sql"
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/touchmark/touchmark/pkg/dps"
)

// A Report is what Verify found in a ledger that verifies.
type Report struct {
	Checkpoint Checkpoint `json:"checkpoint"`
	Entries    int64      `json:"entries"`
	Units      int64      `json:"units"`
	Voided     int64      `json:"voided"`
	Scrapped   int64      `json:"scrapped"`
	Reworked   int64      `json:"reworked"`
	Returned   int64      `json:"returned"`
	Jobs       int64      `json:"jobs"`
	Grants     int64      `json:"grants"`
	Leases     int64      `json:"leases"`
	Notes      int64      `json:"notes"`
}

// Verify reads the whole ledger: every entry is hashed again up to the root that the station signed, and the tables must say
// just what the entries say. The error wraps ErrDamaged. It takes two cores, and 64 octets of
// memory a unit.
func (l *Ledger) Verify(ctx context.Context, station crypto.PublicKey) (Report, error) {
	v := verifier{l: l, grants: make(map[string]*grantSum), jobs: make(map[int64]string), leases: make(map[string]int64), places: make(map[string]string), replacing: make(map[int64]bool), ends: make(map[int64]ended)}
	_, _ = rand.Read(v.key[:]) // never fails
	// One snapshot, so that a station at work does not look like damage.
	stx, err := l.db.BeginTx(ctx, &sql.TxOptions{ReadOnly: true})
	if err != nil {
		return v.report, err
	}
	defer func() { _ = stx.Rollback() }()
	v.stx = stx
	// The file's own structure is looked at meanwhile, on another core.
	inner, cancel := context.WithCancel(ctx)
	defer cancel()
	structure := make(chan error, 1)
	go func() { structure <- checkStructure(inner, l.cfg.Path) }()
	err = v.verify(ctx, station)
	if err != nil {
		cancel()
	}
	if serr := <-structure; err == nil {
		err = serr
	}
	if err == nil { // what every reader begins with
		err = l.snapshotIn(ctx, stx, func(*snapshot) error { return nil })
	}
	if err != nil {
		if errors.Is(err, ErrStation) || ctx.Err() != nil {
			return v.report, err // nothing says that the ledger is damaged
		}
		return v.report, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return v.report, nil
}

// A verifier replays the log, and holds the tables against what comes out.
type verifier struct {
	l      *Ledger
	stx    *sql.Tx
	report Report

	begun     int64            // units that ever were
	units     [][]replayed     // by unit ID - 1, in pages: a slice that grows would be there twice
	ends      map[int64]ended  // of units that ended
	jobs      map[int64]string // grant by job
	grants    map[string]*grantSum
	places    map[string]string // grant by serial, of reworked units whose next revision has their place
	replacing map[int64]bool    // units that have such a place
	leases    map[string]int64  // by ID: how many units were used, -1 while it is out
	key       [32]byte          // random: see pair
	eks       uint64            // over the endorsement keys and whose they are: see pair
	notes     uint64
	anchor    uint64
}

// replayed is what the log says of a unit. Names and keys are kept by their hashes.
type replayed struct {
	name, key [16]byte
	at        int64 // milliseconds: when it was begun
	leaf      int64
	job       int32
	revision  int32
	state     State
}

const unitPage = 1 << 12

// unit returns what is known of a unit that has begun.
func (v *verifier) unit(id int64) *replayed { return &v.units[(id-1)/unitPage][(id-1)%unitPage] }

// begin makes room for the next unit.
func (v *verifier) begin(u replayed) {
	if v.begun%unitPage == 0 {
		v.units = append(v.units, make([]replayed, unitPage))
	}
	v.begun++
	*v.unit(v.begun) = u
}

type ended struct {
	leaf int64
	was  State
}

type grantSum struct {
	data                    string
	spent, leased, quantity int64
	closed                  bool
}

func (v *verifier) verify(ctx context.Context, station crypto.PublicKey) error {
	tree, err := v.replay(ctx)
	if err != nil {
		return err
	}
	v.report.Entries = tree.size
	for _, check := range []func(context.Context) error{v.checkUnits, v.checkRetired, v.checkPairs, v.checkGrants, v.checkMeta} {
		if err := check(ctx); err != nil {
			return err
		}
	}
	return v.checkRoot(ctx, tree, station)
}

// replay hashes and applies every entry of the log.
func (v *verifier) replay(ctx context.Context) (_ *edge, err error) {
	rows, err := v.stx.QueryContext(ctx, `SELECT first, count, leaves, hashes FROM log ORDER BY first`)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	tree := new(edge)
	var first, count int64
	var leaves, hashes sql.RawBytes
	var stored []byte
	for rows.Next() {
		if err := rows.Scan(&first, &count, &leaves, &hashes); err != nil {
			return nil, fmt.Errorf("entries from %d: %w", tree.size, err)
		}
		if first != tree.size {
			return nil, fmt.Errorf("entries %d to %d are missing", tree.size, first-1)
		}
		stored = stored[:0]
		err := eachLeaf(leaves, func(b []byte) error {
			f, err := parseLeaf(b)
			if err == nil {
				err = v.apply(ctx, tree.size, &f)
			}
			stored = tree.add(tlog.RecordHash(b), stored)
			return err
		})
		if err != nil {
			return nil, fmt.Errorf("entry %d: %w", tree.size-1, err)
		}
		if tree.size-first != count || !bytes.Equal(stored, hashes) {
			return nil, fmt.Errorf("entries %d to %d do not have the hashes that were recorded", first, first+count-1)
		}
	}
	return tree, rows.Err()
}

// checkStructure has SQLite look at every page of the file and hold its indexes against its tables, and holds what is declared in
// it against what is declared here: uniqueness is of no use once an index is gone, and a trigger could do anything.
func checkStructure(ctx context.Context, path string) (err error) {
	db, err := open(path, true, 16)
	if err != nil {
		return err
	}
	fresh, err := sql.Open("sqlite", ":memory:")
	if err != nil {
		return errors.Join(err, db.Close())
	}
	fresh.SetMaxOpenConns(1) // each connection would have a database of its own
	defer func() { err = errors.Join(err, db.Close(), fresh.Close()) }()
	if _, err := fresh.ExecContext(ctx, schema); err != nil {
		return err
	}
	var have, want string
	for _, d := range []struct {
		db  *sql.DB
		dst *string
	}{{db, &have}, {fresh, &want}} {
		if err := d.db.QueryRowContext(ctx, `SELECT group_concat(quote(type) || quote(name) || quote(tbl_name) || quote(sql)) FROM (SELECT * FROM sqlite_schema ORDER BY type, name)`).
			Scan(d.dst); err != nil {
			return fmt.Errorf("database: %w", err)
		}
	}
	if have != want {
		return errors.New("database: its tables, indexes or triggers are not those of a ledger")
	}
	var integrity string
	if err := db.QueryRowContext(ctx, `PRAGMA integrity_check(1)`).Scan(&integrity); err != nil || integrity != "ok" {
		return fmt.Errorf("database: %s %w", integrity, errOrNil(err))
	}
	return nil
}

// checkRoot holds the log's root against the one that the station signed.
func (v *verifier) checkRoot(ctx context.Context, tree *edge, station crypto.PublicKey) error {
	if tree.size == 0 {
		return nil
	}
	var signed string
	if err := v.stx.QueryRowContext(ctx, `SELECT note FROM checkpoint`).Scan(&signed); err != nil {
		return fmt.Errorf("checkpoint: %w", err)
	}
	c, err := OpenCheckpoint([]byte(signed), station)
	if err != nil {
		return err
	}
	if text := tree.root().String(); c.Size != tree.size || c.Root != text || c.Origin != v.l.cfg.Origin {
		return fmt.Errorf("the signed checkpoint (%s, %d entries, root %s) is not that of the log (%s, %d entries, root %s)",
			c.Origin, c.Size, c.Root, v.l.cfg.Origin, tree.size, text)
	}
	v.report.Checkpoint = c
	return nil
}

// apply takes in one entry of the log.
func (v *verifier) apply(ctx context.Context, idx int64, f *leaf) error {
	switch {
	case f.state == jobBegun:
		return v.applyJob(ctx, f)
	case f.state == grantTaken:
		if v.grants[f.serial] != nil {
			return fmt.Errorf("grant %s is taken twice", f.serial)
		}
		quantity, n := binary.Varint(f.data)
		if n <= 0 {
			return errLeaf
		}
		v.grants[f.serial] = &grantSum{data: string(f.data), quantity: quantity}
	case f.state == leaseCut:
		quantity, n := binary.Varint(f.data)
		g := v.grants[f.registrationID]
		if _, twice := v.leases[f.serial]; n != len(f.data) || g == nil || twice {
			return fmt.Errorf("lease %s is cut from nothing", f.serial)
		}
		g.leased += quantity
		v.leases[f.serial] = -1
		return v.checkLease(ctx, f, quantity)
	case f.state == leaseReturned:
		used, n := binary.Varint(f.data)
		g := v.grants[f.registrationID]
		if have, ok := v.leases[f.serial]; n != len(f.data) || g == nil || !ok || have != -1 {
			return fmt.Errorf("lease %s returns that was not out", f.serial)
		}
		v.leases[f.serial] = used
		return v.checkReturn(ctx, f, g, used)
	case f.state == grantClosed:
		g := v.grants[f.serial]
		if g == nil {
			return fmt.Errorf("grant %s is closed and was never taken", f.serial)
		}
		g.closed = true
	case f.state == anchored:
		value, n := binary.Uvarint(f.data)
		if n != len(f.data) || v.anchor != 0 && value != v.anchor+1 {
			return fmt.Errorf("the counter goes from %d to %d", v.anchor, value)
		}
		v.anchor = value
	case f.state == noted:
		v.report.Notes++
		v.notes += v.pair(uint64(idx), noteSum(f.unit, f.registrationID, f.at.UnixMilli(), f.data))
	case f.state.ends():
		return v.applyEnd(idx, f)
	case f.job != 0 && f.serial != "": // a new unit: the IDs have no holes
		if f.unit != v.begun+1 {
			return fmt.Errorf("unit %d begins after unit %d", f.unit, v.begun)
		}
		u := replayed{name: nameSum(f.serial, f.registrationID), at: f.at.UnixMilli(), leaf: idx, job: int32(f.job), revision: int32(f.revision), state: f.state}
		grant, known := v.jobs[f.job]
		if !known || f.count > 1 || f.count == 0 && grant == "" {
			return fmt.Errorf("unit %d is of job %d, which never began", f.unit, f.job)
		}
		if grant != "" {
			g := v.grants[grant]
			if g == nil {
				return fmt.Errorf("unit %d is made on grant %s, which is not there", f.unit, grant)
			}
			if f.count == 0 { // it has the place of a reworked one
				if place, ok := v.places[f.serial]; !ok || place != grant {
					return fmt.Errorf("unit %d takes a place on grant %s that its serial does not have", f.unit, grant)
				}
				delete(v.places, f.serial)
				v.replacing[f.unit] = true
			} else if g.spent++; g.spent+g.leased > g.quantity {
				return fmt.Errorf("grant %s of %d is overdrawn by unit %d", grant, g.quantity, f.unit)
			}
		}
		v.begin(u)
		v.setKeys(v.unit(f.unit), f)
	default:
		if f.unit < 1 || f.count < 1 || f.unit+f.count-1 > v.begun {
			return fmt.Errorf("units %d to %d never began", f.unit, f.unit+f.count-1)
		}
		for id := f.unit; id < f.unit+f.count; id++ {
			u := v.unit(id)
			if !u.state.Living() {
				return fmt.Errorf("unit %d went on after it was %s", id, u.state)
			}
			u.state = f.state
		}
		if f.serial != "" && f.state != Exported {
			u := v.unit(f.unit)
			if u.name != nameSum(f.serial, f.registrationID) {
				return fmt.Errorf("unit %d changes its name", f.unit)
			}
			u.leaf = idx
			v.setKeys(u, f)
		}
	}
	return nil
}

func (v *verifier) setKeys(u *replayed, f *leaf) {
	if f.keyHash != nil {
		u.key = sum16(f.keyHash)
	}
	if f.ekHash != nil {
		v.eks += v.pair(uint64(f.unit), sum16(f.ekHash))
	}
}

func (v *verifier) applyJob(ctx context.Context, f *leaf) error {
	v.report.Jobs++
	v.jobs[f.job] = f.registrationID
	var j Job
	err := v.stx.QueryRowContext(ctx, `SELECT profile, operator, out FROM jobs WHERE id = $1 AND digest = $2 AND grant_id = $3 AND started = $4`,
		f.job, f.keyHash, f.registrationID, f.at.UnixMilli()).Scan(&j.Profile, &j.Operator, &j.Out)
	if err != nil || clip(j.Profile) != f.serial || !bytes.Equal(j.data(), f.data) {
		return fmt.Errorf("job %d is not as it was recorded", f.job)
	}
	return nil
}

func (v *verifier) applyEnd(idx int64, f *leaf) error {
	if f.unit < 1 || f.unit > v.begun {
		return fmt.Errorf("unit %d ended and never began", f.unit)
	}
	u := v.unit(f.unit)
	if u.name != nameSum(f.serial, f.registrationID) || u.revision != int32(f.revision) {
		return fmt.Errorf("unit %d ends under another name", f.unit)
	}
	grant := v.grants[v.jobs[int64(u.job)]]
	if f.state == Returned {
		if u.state != Scrapped {
			return fmt.Errorf("unit %d is returned and was not scrapped", f.unit)
		}
		v.ends[f.unit] = ended{leaf: idx, was: v.ends[f.unit].was}
	} else {
		if !u.state.Living() {
			return fmt.Errorf("unit %d ends twice", f.unit)
		}
		v.ends[f.unit] = ended{leaf: idx, was: u.state}
		if f.ekHash != nil {
			v.eks -= v.pair(uint64(f.unit), sum16(f.ekHash))
		}
		u.key = [16]byte{}
		if f.keyHash != nil {
			u.key = sum16(f.keyHash)
		}
	}
	if grant != nil {
		switch fresh := f.state == Voided && u.state == Begun; {
		case f.state == Reworked, fresh && v.replacing[f.unit]:
			v.places[f.serial] = v.jobs[int64(u.job)]
		case f.state == Returned, fresh:
			grant.spent--
		case f.state == Voided, f.state == Scrapped:
			delete(v.places, f.serial)
		}
	}
	u.state = f.state
	return nil
}

func (v *verifier) checkLease(ctx context.Context, f *leaf, quantity int64) error {
	var document []byte
	var have int64
	err := v.stx.QueryRowContext(ctx, `SELECT document, quantity FROM leases WHERE id = $1 AND grant_id = $2`, f.serial, f.registrationID).Scan(&document, &have)
	if sum := sha256.Sum256(document); err != nil || have != quantity || !bytes.Equal(sum[:], f.keyHash) {
		return fmt.Errorf("lease %s is not as it was recorded", f.serial)
	}
	v.report.Leases++
	return nil
}

func (v *verifier) checkReturn(ctx context.Context, f *leaf, g *grantSum, used int64) error {
	var receipt []byte
	var quantity int64
	err := v.stx.QueryRowContext(ctx, `SELECT receipt, quantity FROM leases WHERE id = $1 AND used = $2`, f.serial, used).Scan(&receipt, &quantity)
	if sum := sha256.Sum256(receipt); err != nil || !bytes.Equal(sum[:], f.keyHash) {
		return fmt.Errorf("the return of lease %s is not as it was recorded", f.serial)
	}
	g.leased -= quantity - used
	return nil
}

// checkUnits holds every row of the living against the replay.
func (v *verifier) checkUnits(ctx context.Context) (err error) {
	q, err := v.stx.QueryContext(ctx, `SELECT id, serial, registration_id, key_hash, spelling, state, job, at, leaf, revision FROM units ORDER BY id`)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, q.Close()) }()
	var id int64
	var r rowScan
	for q.Next() {
		if err := q.Scan(append([]any{&id}, r.columns()...)...); err != nil {
			return err
		}
		if err := v.checkRow(id, &r); err != nil {
			return err
		}
		if !State(r.state).Living() {
			return fmt.Errorf("unit %d is %s among the living", id, State(r.state))
		}
		v.report.Units++
	}
	if want := v.begun - int64(len(v.ends)); v.report.Units != want {
		return fmt.Errorf("the table has %d units, the log %d", v.report.Units, want)
	}
	return q.Err()
}

// rowScan takes the columns that both tables of units have. Raw bytes are good until the next row.
type rowScan struct {
	serial, rid, key, spelling     sql.RawBytes
	state, job, at, leaf, revision int64
}

func (r *rowScan) columns() []any {
	return []any{&r.serial, &r.rid, &r.key, &r.spelling, &r.state, &r.job, &r.at, &r.leaf, &r.revision}
}

func (v *verifier) checkRow(id int64, r *rowScan) error {
	if id < 1 || id > v.begun {
		return fmt.Errorf("unit %d is not in the log", id)
	}
	rid := string(r.rid)
	if r.spelling != nil {
		rid = string(r.spelling)
	}
	got := replayed{name: nameSum(string(r.serial), rid), at: r.at, leaf: r.leaf, job: int32(r.job), revision: int32(r.revision), state: State(r.state)}
	if r.key != nil {
		got.key = sum16(r.key)
	}
	if got != *v.unit(id) || dps.Fold(rid) != string(r.rid) {
		return fmt.Errorf("unit %d (serial %s) is not in the table as the log has it", id, r.serial)
	}
	return nil
}

// checkRetired holds every row of those that ended against the replay.
func (v *verifier) checkRetired(ctx context.Context) (err error) {
	q, err := v.stx.QueryContext(ctx, `SELECT id, serial, registration_id, key_hash, spelling, state, job, at, leaf, revision, was, ending FROM retired ORDER BY id`)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, q.Close()) }()
	var id, was, ending, rows int64
	var r rowScan
	for q.Next() {
		if err := q.Scan(append(append([]any{&id}, r.columns()...), &was, &ending)...); err != nil {
			return err
		}
		if err := v.checkRow(id, &r); err != nil {
			return err
		}
		if e, ok := v.ends[id]; !ok || e.leaf != ending || int64(e.was) != was {
			return fmt.Errorf("unit %d did not end as the table says", id)
		}
		rows++
		switch State(r.state) {
		case Voided:
			v.report.Voided++
		case Scrapped:
			v.report.Scrapped++
		case Reworked:
			v.report.Reworked++
		case Returned:
			v.report.Returned++
		}
	}
	if rows != int64(len(v.ends)) {
		return fmt.Errorf("the table has %d units that ended, the log %d", rows, len(v.ends))
	}
	return q.Err()
}

// checkPairs holds endorsement keys and notes against the replay, as sums over all rows.
func (v *verifier) checkPairs(ctx context.Context) error {
	eks, err := v.sum(ctx, `SELECT unit, ek_hash FROM endorsements`, func(q *sql.Rows) (uint64, error) {
		var unit int64
		var hash sql.RawBytes
		err := q.Scan(&unit, &hash)
		return v.pair(uint64(unit), sum16(hash)), err
	})
	if err != nil {
		return err
	}
	if eks != v.eks {
		return errors.New("the table of endorsement keys is not that of the log")
	}
	notes, err := v.sum(ctx, `SELECT leaf, unit, kind, at, data FROM notes`, func(q *sql.Rows) (uint64, error) {
		var leaf, unit, at int64
		var kind string
		var data sql.RawBytes
		err := q.Scan(&leaf, &unit, &kind, &at, &data)
		return v.pair(uint64(leaf), noteSum(unit, kind, at, data)), err
	})
	if err != nil {
		return err
	}
	if notes != v.notes {
		return errors.New("the table of notes is not that of the log")
	}
	return nil
}

func (v *verifier) sum(ctx context.Context, query string, row func(*sql.Rows) (uint64, error)) (total uint64, err error) {
	q, err := v.stx.QueryContext(ctx, query)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, q.Close()) }()
	for q.Next() {
		n, err := row(q)
		if err != nil {
			return 0, err
		}
		total += n
	}
	return total, q.Err()
}

func (v *verifier) checkGrants(ctx context.Context) error {
	q, err := v.stx.QueryContext(ctx, grantColumns)
	if err != nil {
		return err
	}
	for q.Next() {
		g, err := scanGrant(q)
		if err != nil {
			return errors.Join(err, q.Close())
		}
		if err := v.stx.QueryRowContext(ctx, `SELECT document FROM documents WHERE grant_id = $1`, g.ID).Scan(&g.Document); err != nil {
			return errors.Join(fmt.Errorf("the document of grant %s: %w", g.ID, err), q.Close())
		}
		want := v.grants[g.ID]
		if want == nil || string(g.data()) != want.data || g.Spent != want.spent || g.Leased != want.leased || g.Closed != want.closed {
			return errors.Join(fmt.Errorf("grant %s is not in the table as the log has it", g.ID), q.Close())
		}
		v.report.Grants++
	}
	if err := q.Err(); err != nil {
		return err
	}
	if v.report.Grants != int64(len(v.grants)) {
		return fmt.Errorf("the table has %d grants, the log %d", v.report.Grants, len(v.grants))
	}
	if err := v.count(ctx, "documents", v.report.Grants); err != nil {
		return err
	}
	for id, used := range v.leases {
		var have int64
		if err := v.stx.QueryRowContext(ctx, `SELECT used FROM leases WHERE id = $1`, id).Scan(&have); err != nil || have != used {
			return fmt.Errorf("lease %s is not in the table as the log has it", id)
		}
	}
	return v.count(ctx, "leases", int64(len(v.leases)))
}

func (v *verifier) count(ctx context.Context, table string, want int64) error {
	var have int64
	if err := v.stx.QueryRowContext(ctx, `SELECT count(*) FROM `+table).Scan(&have); err != nil || have != want {
		return fmt.Errorf("the table has %d %s, the log %d %w", have, table, want, errOrNil(err))
	}
	return nil
}

// checkMeta holds what is kept beside the tables against the replay: how many units and jobs there ever were, and where the
// counter stands.
func (v *verifier) checkMeta(ctx context.Context) error {
	meta := func(name string) (value uint64, err error) {
		err = v.stx.QueryRowContext(ctx, `SELECT CAST(value AS INTEGER) FROM meta WHERE name = $1`, name).Scan(&value)
		if errors.Is(err, sql.ErrNoRows) {
			return 0, nil
		}
		return value, err
	}
	next, err := meta("units")
	if want := uint64(v.begun) + 1; err != nil || next != want && (next != 0 || v.report.Entries > 0) {
		return fmt.Errorf("the next unit is %d in the table, %d in the log %w", next, want, errOrNil(err))
	}
	anchor, err := meta("anchor")
	if err != nil || anchor != v.anchor {
		return fmt.Errorf("the counter is %d in the table, %d in the log %w", anchor, v.anchor, errOrNil(err))
	}
	return v.count(ctx, "jobs", v.report.Jobs)
}

var errNothing = errors.New("")

func errOrNil(err error) error {
	if err == nil {
		return errNothing
	}
	return err
}

func sum16(b []byte) (out [16]byte) {
	sum := sha256.Sum256(b)
	copy(out[:], sum[:])
	return out
}

func nameSum(serial, rid string) [16]byte {
	var room [2*maxText + 8]byte
	return sum16(appendBytes(appendBytes(room[:0], serial), rid))
}

func noteSum(unit int64, kind string, at int64, data []byte) [16]byte {
	return sum16(append(appendBytes(binary.AppendVarint(binary.AppendVarint(nil, unit), at), kind), data...))
}

// pair turns a row into a number; the sum of those of all rows is a fingerprint of a table that has no order. The key is new
// for each run, so nobody can choose rows that make up for others.
func (v *verifier) pair(id uint64, content [16]byte) uint64 {
	var b [56]byte
	copy(b[:], v.key[:])
	binary.BigEndian.PutUint64(b[32:], id)
	copy(b[40:], content[:])
	sum := sha256.Sum256(b[:])
	return binary.BigEndian.Uint64(sum[:])
}
