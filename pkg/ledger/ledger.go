// Package ledger is the station's journal: what was begun, what exists, what left the factory, each step durable before
// the next outside effect, and none of it changeable unnoticed.
//
// A [Ledger] is two things that move together in one transaction: a table of units, whose unique indexes hold the
// invariants (a serial has one living identity, a registration ID one unit, a key one device for ever), and an append-only
// Merkle log (RFC 6962 hashing, golang.org/x/mod/sumdb/tlog) of every step. Each commit closes with a checkpoint signed by
// the station key. [Ledger.Verify] replays the log against the table and the checkpoint, so a changed octet in either is
// found.
//
// The states of a unit promise:
//
//	begun     serial, registration ID and key are decided, and what will be signed is written down
//	minted    the identity exists; its certificate, if it has one, is in the log
//	stamped   the device's storage was written
//	verified  and read back; the identity is good
//	sealed    the unit is finished: PASS was or may be shown
//	exported  a bundle that holds it is durable on disk
//
// and what ends one, each with its reason, and with its key never to be used again:
//
//	voided    the identity was given up before it left; the serial is free
//	scrapped  the unit was destroyed; the serial is not free
//	reworked  the unit was rebuilt; the serial is free for the next revision
//	returned  a scrapped unit is shown to be destroyed; its order may make another
//
// Units are made on [Grant]s, where the line works by production orders: the count of a grant moves in the transaction that
// begins a unit, so it cannot be overdrawn, and a window of time is held against the journal's own. A [Counter] outside the
// file, in a token or a TPM, tells a ledger that was copied or restored from the one that went on.
//
// To others a ledger is shown by signed checkpoints and by proofs under them, for which the station's public key is enough:
// [Ledger.Prove] that something is in it, [Ledger.Consistency] that it only grew. A [Witness] in other hands cosigns checkpoints and
// so keeps a station from telling two stories. What went wrong has a name: [ErrDamaged], [ErrRolledBack], [ErrForked].
//
// Callers pass slices of [Event]; one call of [Ledger.Commit] is one transaction with one flush to disk, so a caller with
// many units commits them in groups. Secrets never enter a ledger.
//
// One process at a time may write a ledger, which a lock on the file beside it sees to; any number may read it meanwhile.
// A Ledger may be used by many goroutines; commits queue.
package ledger

import (
	"context"
	"crypto"
	"database/sql"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"modernc.org/sqlite" // also registers the driver
	sqlite3 "modernc.org/sqlite/lib"

	"github.com/touchmark/touchmark/pkg/filelock"
)

// Errors that callers branch on.
var (
	// ErrClock says that the clock stands before the ledger's last entry.
	ErrClock = errors.New("clock is behind the ledger")
	// ErrDamaged says that the ledger does not verify.
	ErrDamaged = errors.New("ledger is damaged")
	// ErrBroken says that it is not known whether a step took effect: opened again, the ledger tells.
	ErrBroken = errors.New("ledger must be opened again")
	// ErrFull says that the disk under the ledger has no room left. What was committed before is safe.
	ErrFull = errors.New("disk is full")
)

// A DuplicateError says that a serial, a registration ID or a key is taken, and by which unit.
type DuplicateError struct {
	Field string // "serial", "registration ID", "key" or "endorsement key"
	Value string
	Unit  Unit // the one that has it
	Job   Job  // the job that made it
}

// Error tells where and when the value was first made.
func (e *DuplicateError) Error() string {
	whose := e.Unit.State.String()
	if e.Field != "serial" {
		whose = "serial " + e.Unit.Serial + ", " + whose
	}
	by := ""
	if e.Job.Operator != "" {
		by = " by " + e.Job.Operator
	}
	return fmt.Sprintf("%s %s was first made on %s%s with profile %s (%s)", e.Field, e.Value, e.Unit.At.UTC().Format(time.RFC3339), by, e.Job.Profile, whose)
}

// Config says where a ledger is and who signs it.
type Config struct {
	// Path of the database file. The lock file stands beside it.
	Path string
	// Origin names the log in its checkpoints, for instance "touchmark/line-3". No spaces, no "+", at most 200 characters.
	Origin string
	// Signer is the station key.
	Signer crypto.Signer
	// Anchor is the counter that the ledger moves with each step that begins units, once the step is durable and before anything is
	// made on it. A ledger that was anchored opens with its
	// counter only; one that was not is anchored by [Anchor] alone.
	Anchor Counter
	// Now tells the time; nil means time.Now.
	Now func() time.Time
}

// maxDrift is how far the clock may step back (a time service correcting it) before work stops. Entries never go back:
// inside the drift they repeat the last time.
const maxDrift = 2 * time.Second

// A Ledger is an open journal.
type Ledger struct {
	cfg    Config
	db     *sql.DB
	lock   *os.File
	signer *noteKey

	mu             sync.Mutex // serializes commits; guards the fields below
	size           int64      // leaves in the log
	lastTime       time.Time
	nextUnit       int64
	edge           edge
	grants         map[int64]string // by job, as far as asked for
	anchor         uint64           // where the counter stands; only with an anchor
	leaves, hashes []byte           // room that commits use in turn: growing it anew each time took a tenth of minting
	// insertMost inserts maxRun units. That is a long statement: parsing it each time took another. Nil until it is needed.
	insertMost *sql.Stmt
	broken     error // set when memory and disk may disagree: reopen
}

// A Unit is one identity.
type Unit struct {
	ID             int64     `json:"unit"`
	Serial         string    `json:"serial"`
	RegistrationID string    `json:"registrationId"`
	Revision       int64     `json:"revision,omitempty"`
	KeyHash        []byte    `json:"-"`
	State          State     `json:"state"`
	Job            int64     `json:"job"`
	At             time.Time `json:"at"`
	// Leaf is the index of the log entry that holds Data, the last one that had some.
	Leaf int64 `json:"entry"`
	// Data is that entry's data: a certificate plan while begun, the certificate once minted.
	Data []byte `json:"-"`
	// EKHash is that entry's endorsement key, if it has one.
	EKHash []byte `json:"-"`
}

// A Job is one list of serials minted with one profile, or one shift at a station.
type Job struct {
	ID       int64     `json:"job"`
	Digest   []byte    `json:"-"` // SHA-256 over what makes the job this job
	Profile  string    `json:"profile"`
	Out      string    `json:"out,omitempty"`      // where stamps go
	Grant    string    `json:"grant,omitempty"`    // the grant that its units are made on
	Operator string    `json:"operator,omitempty"` // who works
	Started  time.Time `json:"started"`
}

// formatVersion is the version of the file's tables and of the log's entries.
const formatVersion = "2"

const schema = `
CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB NOT NULL);
CREATE TABLE jobs (
	id INTEGER PRIMARY KEY, digest BLOB NOT NULL UNIQUE, profile TEXT NOT NULL, out TEXT NOT NULL,
	grant_id TEXT NOT NULL, operator TEXT NOT NULL, started INTEGER NOT NULL);
CREATE TABLE units (
	id INTEGER PRIMARY KEY,
	serial TEXT NOT NULL UNIQUE,
	registration_id TEXT NOT NULL UNIQUE, -- folded
	key_hash BLOB UNIQUE,
	spelling TEXT,                        -- the registration ID as given, where folding changed it
	state INTEGER NOT NULL,
	job INTEGER NOT NULL,
	at INTEGER NOT NULL,
	leaf INTEGER NOT NULL,
	revision INTEGER NOT NULL);
CREATE TABLE endorsements (ek_hash BLOB PRIMARY KEY, unit INTEGER NOT NULL UNIQUE) WITHOUT ROWID;
CREATE TABLE retired (                        -- units that ended
	id INTEGER PRIMARY KEY,
	serial TEXT NOT NULL,
	registration_id TEXT NOT NULL,
	key_hash BLOB UNIQUE,
	spelling TEXT,
	state INTEGER NOT NULL,               -- what ended it
	job INTEGER NOT NULL,
	at INTEGER NOT NULL,
	leaf INTEGER NOT NULL,
	revision INTEGER NOT NULL,
	was INTEGER NOT NULL,                 -- the state that it had
	ending INTEGER NOT NULL);             -- the leaf that tells why
CREATE INDEX retired_serial ON retired (serial);
CREATE TABLE documents (grant_id TEXT PRIMARY KEY, document BLOB NOT NULL); -- apart: they may be large, and each unit counts on its grant
CREATE TABLE grants (
	id TEXT PRIMARY KEY, quantity INTEGER NOT NULL, spent INTEGER NOT NULL, leased INTEGER NOT NULL,
	opens INTEGER NOT NULL, ends INTEGER NOT NULL, closed INTEGER NOT NULL, leaf INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE leases (
	id TEXT PRIMARY KEY, grant_id TEXT NOT NULL, document BLOB NOT NULL, quantity INTEGER NOT NULL,
	used INTEGER NOT NULL,                -- -1 while it is out
	receipt BLOB NOT NULL, leaf INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE notes (leaf INTEGER PRIMARY KEY, unit INTEGER NOT NULL, kind TEXT NOT NULL, at INTEGER NOT NULL, data BLOB NOT NULL);
CREATE INDEX notes_unit ON notes (unit, kind);
CREATE TABLE log (
	first INTEGER PRIMARY KEY,       -- index of the row's first leaf
	first_hash INTEGER NOT NULL UNIQUE, -- tlog stored-hash index of the row's first hash
	count INTEGER NOT NULL,
	leaves BLOB NOT NULL,            -- each with its length before it
	hashes BLOB NOT NULL);
CREATE TABLE checkpoint (one INTEGER PRIMARY KEY CHECK (one = 1), size INTEGER NOT NULL, note TEXT NOT NULL);
`

func (c *Config) check() error {
	if c.Origin == "" || len(c.Origin) > 200 || strings.ContainsAny(c.Origin, " +\n") {
		return fmt.Errorf("ledger origin %q: want 1 to 200 characters without spaces or +", c.Origin)
	}
	if c.Signer == nil {
		return errors.New("ledger needs a station key")
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return nil
}

func open(path string, readOnly bool, cacheMiB int) (*sql.DB, error) {
	// synchronous=FULL with a write-ahead log: one flush per commit, and what was committed survives power loss. Key hashes
	// fall anywhere in their index: room for it in memory, and a log that is folded back every 32 MiB, spare most rereading and
	// rewriting of its pages.
	dsn := "file:" + (&pathEscaper).Replace(path) + "?_pragma=busy_timeout(10000)&_pragma=synchronous(FULL)&_pragma=cache_size(" + strconv.Itoa(-1024*cacheMiB) + ")"
	if readOnly {
		dsn += "&mode=ro"
	} else {
		dsn += "&_pragma=journal_mode(WAL)&_pragma=wal_autocheckpoint(8192)&_txlock=immediate"
	}
	db, err := sql.Open("sqlite", dsn)
	if err != nil {
		return nil, err
	}
	db.SetMaxOpenConns(1)
	return db, nil
}

var pathEscaper = *strings.NewReplacer("%", "%25", "?", "%3f", "#", "%23")

// Create makes an empty ledger. The file must not be there yet.
func Create(ctx context.Context, cfg Config) (err error) {
	if err := cfg.check(); err != nil {
		return err
	}
	f, err := os.OpenFile(cfg.Path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("creating ledger: %w", err)
	}
	if err := f.Close(); err != nil {
		return err
	}
	db, err := open(cfg.Path, false, 64)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	if _, err := db.ExecContext(ctx, schema); err != nil {
		return fmt.Errorf("creating ledger %s: %w", cfg.Path, err)
	}
	_, err = db.ExecContext(ctx, `INSERT INTO meta VALUES ('version', $1), ('origin', $2)`, formatVersion, cfg.Origin)
	return err
}

// Open opens a ledger for writing and holds its lock until Close. The error is filelock.ErrLocked while another process has it.
func Open(ctx context.Context, cfg Config) (*Ledger, error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	if _, err := os.Stat(cfg.Path); err != nil {
		return nil, fmt.Errorf("opening ledger: %w", err)
	}
	lock, err := filelock.Lock(cfg.Path + ".lock")
	if err != nil {
		return nil, fmt.Errorf("opening ledger %s: %w", cfg.Path, err)
	}
	l := &Ledger{cfg: cfg, lock: lock, grants: make(map[int64]string)}
	if l.db, err = open(cfg.Path, false, 64); err == nil {
		err = l.load(ctx)
	}
	if err == nil {
		l.signer, err = newSigner(cfg.Origin, cfg.Signer)
	}
	if err == nil {
		err = l.checkAnchor(ctx)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("opening ledger %s: %w", cfg.Path, denied(full(err))), l.Close())
	}
	return l, nil
}

// View opens a ledger for reading beside whoever writes it.
func View(ctx context.Context, path string) (*Ledger, error) {
	if _, err := os.Stat(path); err != nil {
		return nil, fmt.Errorf("opening ledger: %w", err)
	}
	db, err := open(path, true, 8)
	if err != nil {
		return nil, err
	}
	l := &Ledger{cfg: Config{Path: path, Now: time.Now}, db: db, broken: errors.New("ledger is open for reading only")}
	if l.cfg.Origin, err = l.origin(ctx); err == nil {
		err = l.loadLast(ctx)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("opening ledger %s: %w", path, denied(err)), db.Close())
	}
	return l, nil
}

// Close closes the ledger and gives its lock back. Everything committed is on disk already.
func (l *Ledger) Close() error {
	var errs []error
	if l.insertMost != nil {
		errs = append(errs, l.insertMost.Close())
	}
	if l.db != nil {
		errs = append(errs, l.db.Close())
	}
	if l.lock != nil {
		errs = append(errs, filelock.Unlock(l.lock))
	}
	return errors.Join(errs...)
}

// Path returns the ledger's file.
func (l *Ledger) Path() string { return l.cfg.Path }

// load reads the right edge of the log and the last unit ID into memory.
func (l *Ledger) load(ctx context.Context) error {
	origin, err := l.origin(ctx)
	if err != nil {
		return err
	}
	if origin != l.cfg.Origin {
		return fmt.Errorf("%w: it belongs to %q, not to %q", ErrDamaged, origin, l.cfg.Origin)
	}
	if err := l.loadLast(ctx); err != nil {
		return err
	}
	if err := l.db.QueryRowContext(ctx, `SELECT coalesce(max(id), 0) + 1 FROM units`).Scan(&l.nextUnit); err != nil {
		return err
	}
	// A voided unit's row is gone, but its ID is never given out again: the highest one is also in meta.
	var top int64
	err = l.db.QueryRowContext(ctx, `SELECT CAST(value AS INTEGER) FROM meta WHERE name = 'units'`).Scan(&top)
	if err == nil {
		l.nextUnit = max(l.nextUnit, top)
	} else if !errors.Is(err, sql.ErrNoRows) {
		return err
	}
	l.edge.size = l.size
	for level := 0; l.size>>level > 0; level++ {
		if l.size>>level&1 == 1 {
			if l.edge.at[level], err = (hashReader{ctx, l.db}).at(level, l.size>>level-1); err != nil {
				return err
			}
		}
	}
	return nil
}

// origin reads whose ledger it is, once it is one that this package knows.
func (l *Ledger) origin(ctx context.Context) (origin string, err error) {
	var version string
	err = l.db.QueryRowContext(ctx, `SELECT CAST(v.value AS TEXT), CAST(o.value AS TEXT) FROM meta v, meta o WHERE v.name = 'version' AND o.name = 'origin'`).
		Scan(&version, &origin)
	if errors.Is(err, sql.ErrNoRows) {
		return "", fmt.Errorf("%w: it does not say whose it is", ErrDamaged)
	}
	if err == nil && version != formatVersion {
		err = fmt.Errorf("ledger format %q: this version of touchmark keeps format %s only", version, formatVersion)
	}
	return origin, err
}

// loadLast reads how long the log is and when its last entry was made.
func (l *Ledger) loadLast(ctx context.Context) error {
	var first, count int64
	var leaves []byte
	err := l.db.QueryRowContext(ctx, `SELECT first, count, leaves FROM log ORDER BY first DESC LIMIT 1`).Scan(&first, &count, &leaves)
	if errors.Is(err, sql.ErrNoRows) {
		return nil
	}
	var se *sqlite.Error
	if err != nil && (ctx.Err() != nil || errors.As(err, &se)) {
		return err
	}
	if err != nil {
		return fmt.Errorf("%w: last entries: %w", ErrDamaged, err) // columns that hold what they cannot
	}
	l.size = first + count
	err = eachLeaf(leaves, func(b []byte) error {
		f, err := parseLeaf(b)
		l.lastTime = f.at
		return err
	})
	if err != nil {
		return fmt.Errorf("%w: last entries: %v", ErrDamaged, err)
	}
	return nil
}

// rowTime returns when a row of the log was written, in milliseconds, from its first octets: all its entries have one time.
func rowTime(head []byte) (int64, error) {
	_, n := binary.Uvarint(head) // the first entry's length; its version and state follow, then its time
	if n <= 0 || len(head) < n+2 || head[n] != leafVersion {
		return 0, errLeaf
	}
	ms, k := binary.Varint(head[n+2:])
	if k <= 0 {
		return 0, errLeaf
	}
	return ms, nil
}

func eachLeaf(b []byte, f func([]byte) error) error {
	for len(b) > 0 {
		n, k := binary.Uvarint(b)
		if k <= 0 || n > maxLeaf || n > uint64(len(b)-k) {
			return errLeaf
		}
		if err := f(b[k : k+int(n)]); err != nil {
			return err
		}
		b = b[k+int(n):]
	}
	return nil
}

// now returns the journal's time: the clock, never before the last entry.
func (l *Ledger) now() (time.Time, error) {
	t := l.cfg.Now().UTC().Truncate(time.Millisecond)
	if behind := l.lastTime.Sub(t); behind > 0 {
		if behind > maxDrift {
			return t, fmt.Errorf("%w: it shows %s, the last entry was made at %s: set the clock", ErrClock,
				t.Format(time.RFC3339), l.lastTime.Format(time.RFC3339))
		}
		t = l.lastTime
	}
	return t, nil
}

// CheckClock returns ErrClock when the clock stands before the last entry. Callers ask before they start work; Commit asks
// again.
func (l *Ledger) CheckClock() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	_, err := l.now()
	return err
}

// full marks SQLite's answers to a full disk, and leaves the rest as they are.
func full(err error) error {
	var se *sqlite.Error
	if errors.As(err, &se) {
		switch se.Code() & 0xff {
		case sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR:
			// SHMSIZE: the index of the write-ahead log did not find room.
			if se.Code()&0xff == sqlite3.SQLITE_FULL || se.Code() == sqlite3.SQLITE_IOERR_SHMSIZE || strings.Contains(se.Error(), "no space") {
				return fmt.Errorf("%w: %w", ErrFull, err)
			}
		}
	}
	return err
}

// denied marks SQLite's answers to a file that may not be opened, or not written, or is none of its own. That there is one was
// looked at before.
func denied(err error) error {
	var se *sqlite.Error
	if !errors.As(err, &se) {
		return err
	}
	switch se.Code() & 0xff {
	case sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_READONLY:
		return fmt.Errorf("%w: %w", fs.ErrPermission, err)
	case sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR: // the last: a table or column that must be there is not
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return err
}

// BeginJob records a job, or finds the one of that digest. A job found again keeps what it was recorded with.
func (l *Ledger) BeginJob(ctx context.Context, j Job) (_ Job, resumed bool, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	found, err := l.jobWhere(ctx, `digest = $1`, j.Digest)
	if err == nil {
		return found, true, nil
	}
	if !errors.Is(err, sql.ErrNoRows) {
		return j, false, err
	}
	err = l.update(ctx, func(t *tx) error {
		j.Started = t.at
		if err := t.QueryRowContext(ctx, `INSERT INTO jobs (digest, profile, out, grant_id, operator, started) VALUES ($1, $2, $3, $4, $5, $6) RETURNING id`,
			j.Digest, j.Profile, j.Out, j.Grant, j.Operator, t.at.UnixMilli()).Scan(&j.ID); err != nil {
			return err
		}
		_, err := t.add(leaf{state: jobBegun, job: j.ID, serial: clip(j.Profile), registrationID: j.Grant, keyHash: j.Digest, data: j.data()})
		return err
	})
	return j, false, err
}

// data is what the log keeps of a job beside its profile, grant and digest.
func (j *Job) data() []byte { return append(appendBytes(nil, j.Operator), j.Out...) }

// Job returns a job by its ID.
func (l *Ledger) Job(ctx context.Context, id int64) (Job, error) {
	j, err := l.jobWhere(ctx, `id = $1`, id)
	if errors.Is(err, sql.ErrNoRows) {
		return j, fmt.Errorf("job %d: %w", id, ErrNotFound)
	}
	return j, err
}

func clip(s string) string {
	if len(s) > maxText {
		return s[:maxText]
	}
	return s
}

func (l *Ledger) jobWhere(ctx context.Context, where string, arg any) (Job, error) {
	var j Job
	var started int64
	err := l.db.QueryRowContext(ctx, `SELECT id, digest, profile, out, grant_id, operator, started FROM jobs WHERE `+where, arg).
		Scan(&j.ID, &j.Digest, &j.Profile, &j.Out, &j.Grant, &j.Operator, &started)
	j.Started = time.UnixMilli(started).UTC()
	return j, err
}

const unitColumns = `SELECT id, serial, coalesce(spelling, registration_id), key_hash, state, job, at, leaf, revision FROM units WHERE `

func scanUnit(row interface{ Scan(...any) error }) (Unit, error) {
	var u Unit
	var at, state int64
	err := row.Scan(&u.ID, &u.Serial, &u.RegistrationID, &u.KeyHash, &state, &u.Job, &at, &u.Leaf, &u.Revision)
	u.State, u.At = State(state), time.UnixMilli(at).UTC()
	return u, err
}

func (l *Ledger) unitWhere(ctx context.Context, where string, arg any) (Unit, error) {
	return scanUnit(l.db.QueryRowContext(ctx, unitColumns+where, arg))
}
