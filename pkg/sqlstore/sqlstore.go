// Package sqlstore keeps what the registration service remembers in SQL.
//
// [Open] gives a store on SQLite: one file, written by one process, or memory that is gone when the store is closed; or one on
// a database that speaks PostgreSQL's protocol, which any number of stores share. The SQL is the same, and stays inside what
// PostgreSQL, CockroachDB and YugabyteDB have in common.
//
// SQLite flushes once per commit, and a flush costs more than everything else in a transaction. So one goroutine writes, and
// takes every update that waits into one transaction: the callers of a busy moment share a flush. An update that fails
// before it wrote is left out; one that fails after it wrote is rolled back with the rest, which then run again without it.
// Readers have connections of their own and do not wait for the writer.
//
// On PostgreSQL several goroutines write, each in transactions of its own, which are SERIALIZABLE: what would come out otherwise
// than one after the other is run again, as is what a lost connection cut off. A transaction whose COMMIT was not answered is
// looked for before anything is repeated, so that every update happens once.
//
// Symmetric keys, policies' keys, secrets, settings of scopes and what TPMs are challenged with are sealed with AES-256-GCM under
// a data key; scope, kind and ID are authenticated with them, so that a ciphertext serves in its own row only. Data keys are in
// the store, wrapped under a [WrappingKey] that is not. What is sealed names its data key, so that the data key can be changed
// while the service runs ([Store.Rotate]).
package sqlstore

import (
	"bytes"
	"cmp"
	"context"
	"crypto/cipher"
	"database/sql"
	"database/sql/driver"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/pressly/goose/v3"
	"modernc.org/sqlite" // also registers the driver
	sqlite3 "modernc.org/sqlite/lib"

	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
)

//go:embed migrations/*.sql
var migrations embed.FS

// ErrFull says that the disk has no room left. What was acknowledged is safe.
var ErrFull = errors.New("disk is full")

// Config says where a store is.
type Config struct {
	// Path of the SQLite file; it is made when it is not there. Empty is a store of its own in memory, which touches no file.
	Path string
	// DSN is the address of a PostgreSQL database, postgres://…, and takes Path's place. The environment (PGPASSFILE, PGPASSWORD
	// and their like) fills in what it leaves out, as libpq has it. It may hold a password, and is never shown.
	DSN string
	// Connections bounds those to the database (8 if zero), half of which write; StatementTimeout is how long it may take over a
	// statement (30 s if zero). They are for a DSN alone, as is Patience.
	Connections      int
	StatementTimeout time.Duration
	// Patience is for how long a transaction is tried again that the database did not take (20 s if zero).
	Patience time.Duration
	// DataKey is the key, 32 octets, that the store's data keys are wrapped under where Wrapping is nil. A store from before
	// there were data keys has its secrets under this one, and needs it once more to be opened.
	DataKey  []byte
	Wrapping *WrappingKey
	// Log is told of what fails in the background; nil for nobody.
	Log *slog.Logger
}

const (
	readers  = 4
	maxBatch = 512
)

// Store implements [registration.Store].
type Store struct {
	write *sql.DB
	read  *sql.DB
	side  *sql.DB // one connection for what cannot wait for the others
	keys  dataKeys
	log   *slog.Logger
	w     *statements
	r     *statements
	path  string // of the SQLite file; empty for none

	// guard has readers and the writer take turns where the store is in memory: there is no write-ahead log there that lets
	// them work beside each other. On a file it is nil.
	guard *sync.RWMutex

	pg                     bool
	serializable, snapshot *sql.TxOptions // of Update and View; nil is the engine's own way
	writers, batch         int            // how many goroutines write, and how many updates at once
	patience               time.Duration

	updates chan *update
	stop    chan struct{}
	// Data keys are to be changed, or there is something to seal anew.
	rotations, resealing chan struct{}
	once                 sync.Once
	turn                 sync.Mutex     // held by the one transaction that runs again after a conflict
	writing              sync.WaitGroup // the writers
	others               sync.WaitGroup // goroutines that may wait for a writer
}

var _ registration.Store = (*Store)(nil)

type update struct {
	ctx  context.Context
	f    func(registration.Tx) error
	err  error // what f said the last time that it ran
	done chan error
	// alone has it share no transaction: what it writes is for others to see when it is committed.
	alone bool
}

// Open opens a store and brings its tables up to date.
func Open(ctx context.Context, cfg Config) (*Store, error) {
	s := &Store{updates: make(chan *update, maxBatch), stop: make(chan struct{}), rotations: make(chan struct{}, 1), resealing: make(chan struct{}, 1),
		patience: cmp.Or(cfg.Patience, defaultPatience), log: cfg.Log, keys: dataKeys{wrapping: cfg.Wrapping, aead: make(map[int64]cipher.AEAD)}}
	var err error
	if s.keys.wrapping == nil {
		if s.keys.wrapping, err = KeyFile(cfg.DataKey); err != nil {
			return nil, err
		}
	}
	fail := func(err error) (*Store, error) {
		return nil, errors.Join(fmt.Errorf("opening store %s: %w", cmp.Or(cfg.Path, "in the database"), full(err)), s.closeDatabases())
	}
	if s.pg = cfg.DSN != ""; s.pg {
		err = s.openPostgres(ctx, &cfg)
	} else {
		err = s.openSQLite(ctx, cfg.Path)
	}
	if err != nil {
		return fail(err)
	}
	if s.w, err = prepare(ctx, s.write); err != nil {
		return fail(err)
	}
	if s.r, err = prepare(ctx, s.read); err != nil {
		return fail(err)
	}
	for range s.writers {
		s.writing.Add(1)
		go s.writer()
	}
	if s.pg {
		s.others.Add(1)
		go s.forgetTokens()
	}
	if err := s.openKeys(ctx, cfg.DataKey); err != nil {
		return nil, errors.Join(fmt.Errorf("opening store %s: %w", cmp.Or(cfg.Path, "in the database"), err), s.Close())
	}
	s.others.Add(1)
	go s.resealer()
	return s, nil
}

// makeFile makes an empty file for SQLite, where there is none: it takes its mode for those beside it too. A directory that was
// there before may let everybody in.
func makeFile(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if errors.Is(err, fs.ErrExist) { // it is not opened: closing it would end SQLite's locks of this process
		return nil
	}
	if err != nil {
		return err
	}
	return f.Close()
}

// openSQLite opens a file, or memory.
func (s *Store) openSQLite(ctx context.Context, path string) (err error) {
	s.writers, s.batch, s.snapshot = 1, maxBatch, &sql.TxOptions{ReadOnly: true}
	// Every reader keeps 2,000 KiB of pages, SQLite's default. That memory is outside of Go's heap, and a page of 4 KiB takes 8
	// there. The inner pages of the indexes fit, and the system caches the rest. The writer keeps 16 MB, and has the write-ahead
	// log grow as far before it is copied back: an import puts keys and fingerprints all over the indexes, and each page
	// is read, and copied, less often. That saves a third of an import's system calls.
	s.path = path
	name := sqliteName(path)
	if path == "" {
		// SQLite's memdb: connections share what has the same name and begins with a slash, as long as one of them is open.
		name = "file:/" + dps.NewUUID() + "?vfs=memdb&_pragma=temp_store(MEMORY)"
		s.guard = new(sync.RWMutex)
	} else if err := makeFile(path); err != nil {
		return err
	}
	if s.write, err = sql.Open("sqlite", name+"&_pragma=journal_mode(WAL)&_pragma=synchronous(FULL)&_pragma=cache_size(-16000)&_pragma=wal_autocheckpoint(4000)&_pragma=secure_delete(1)&_txlock=immediate"); err != nil {
		return err
	}
	s.write.SetMaxOpenConns(1)
	provider, err := s.provider(goose.DialectSQLite3)
	if err != nil {
		return err
	}
	if _, err := provider.Up(ctx); err != nil {
		return err
	}
	if s.read, err = sql.Open("sqlite", name+"&_pragma=query_only(1)"); err != nil {
		return err
	}
	s.read.SetMaxOpenConns(readers)
	s.read.SetMaxIdleConns(readers)
	if s.side, err = sql.Open("sqlite", name+"&_pragma=query_only(1)"); err != nil {
		return err
	}
	s.side.SetMaxOpenConns(1)
	s.side.SetMaxIdleConns(0) // hardly ever needed
	return nil
}

// Close waits for the updates under way and closes the store.
func (s *Store) Close() error {
	s.once.Do(func() { close(s.stop) })
	s.others.Wait()
	s.writing.Wait()
	return s.closeDatabases()
}

func (s *Store) closeDatabases() error {
	var errs []error
	for _, db := range []*sql.DB{s.side, s.read, s.write} {
		if db != nil {
			errs = append(errs, db.Close())
		}
	}
	return errors.Join(errs...)
}

// full marks the answer to a full disk.
func full(err error) error {
	var se *sqlite.Error
	if errors.As(err, &se) && se.Code()&0xff == sqlite3.SQLITE_FULL || sqlState(err) == "53100" {
		return fmt.Errorf("%w: %w", ErrFull, err)
	}
	return err
}

// View implements [registration.Store].
func (s *Store) View(ctx context.Context, f func(registration.Tx) error) error {
	if s.guard != nil {
		s.guard.RLock()
		defer s.guard.RUnlock()
	}
	for begun, attempt := time.Now(), 0; ; attempt++ {
		err, trouble := s.view(ctx, f)
		switch {
		case !s.again(trouble, attempt):
			return err
		case ctx.Err() != nil:
			return ctx.Err()
		case time.Since(begun) > s.patience || !s.pause(ctx, attempt):
			return unavailable(trouble)
		}
	}
}

// again reports whether a transaction that failed with an error, which may be nil, is to be run again.
func (s *Store) again(err error, attempt int) bool {
	return err != nil && (s.pg && again(err) || errors.Is(err, errStale) && attempt < staleAttempts)
}

// view runs f once. Trouble is what the database said, whatever f made of it.
func (s *Store) view(ctx context.Context, f func(registration.Tx) error) (err, trouble error) {
	t, err := s.read.BeginTx(ctx, s.snapshot)
	if err != nil {
		return fmt.Errorf("reading the store: %w", err), err
	}
	x := &tx{ctx: ctx, tx: t, s: s, st: s.r}
	err = f(x)
	if rb := ignoreDone(t.Rollback()); err != nil || !s.pg {
		err = errors.Join(err, rb)
	} // what was read is good, whatever becomes of the connection
	return err, x.failed
}

func ignoreDone(err error) error {
	if errors.Is(err, sql.ErrTxDone) {
		return nil
	}
	return err
}

var errClosed = errors.New("store is closed")

// Update implements [registration.Store].
func (s *Store) Update(ctx context.Context, f func(registration.Tx) error) error {
	return s.update(&update{ctx: ctx, f: f, done: make(chan error, 1)})
}

func (s *Store) update(u *update) error {
	select {
	case s.updates <- u:
	case <-s.stop:
		return errClosed
	case <-u.ctx.Done():
		return u.ctx.Err()
	}
	// Once it is taken the answer is waited for: whether it was committed must not be left open.
	select {
	case err := <-u.done:
		return err
	case <-s.stop:
		s.writing.Wait() // the writer answers what it had taken before it ends
		select {
		case err := <-u.done:
			return err
		default:
			return errClosed
		}
	}
}

// writer commits what waits, batch by batch.
func (s *Store) writer() {
	defer s.writing.Done()
	var batch []*update
	for {
		select {
		case u := <-s.updates:
			batch = append(batch[:0], u)
		case <-s.stop:
			return
		}
	more:
		for len(batch) < s.batch && !batch[0].alone {
			select {
			case u := <-s.updates:
				if u.alone {
					s.commit(batch)
					batch = batch[:0]
				}
				batch = append(batch, u)
			default:
				break more
			}
		}
		s.commit(batch)
	}
}

// commit runs a batch in one transaction and answers every caller. COMMIT returns when what was written is on disk, and
// only then is anyone told: what was acknowledged survives the process and the power. Those that failed without writing are told
// then too, for what they had read counts only if it was committed with the rest.
func (s *Store) commit(batch []*update) {
	begun, late := time.Now(), false
	for attempt := 0; len(batch) > 0; attempt++ {
		// Those whom others were in the way of take turns: they would be in each other's way again.
		if late {
			s.turn.Lock()
		}
		failed, err := s.try(batch)
		if late {
			s.turn.Unlock()
		}
		late = conflict(err)
		switch {
		case failed != nil: // it wrote and then failed: the transaction was rolled back, the others run again
			failed.done <- err
			batch = slices.DeleteFunc(slices.Clone(batch), func(u *update) bool { return u == failed })
			continue
		case s.again(err, attempt):
			if time.Since(begun) < s.patience && s.pause(context.Background(), attempt) {
				continue
			}
			err = unavailable(err)
		}
		for _, u := range batch {
			if err != nil {
				u.err = fmt.Errorf("writing the store: %w", full(err))
			}
			u.done <- u.err
		}
		return
	}
}

// try runs a batch. When an update failed after it had written, it is returned with its error, and nothing was committed. Else
// the error, or none, holds for all of the batch, and what each of them said is in it.
func (s *Store) try(batch []*update) (failed *update, err error) {
	if s.guard != nil {
		s.guard.Lock()
		defer s.guard.Unlock()
	}
	ctx := context.Background() // a caller who goes away must not take the others' transaction along
	if s.pg {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, attemptTime)
		defer cancel()
	}
	t, err := s.write.BeginTx(ctx, s.serializable)
	if err != nil {
		return nil, err
	}
	dirty, counted := false, int64(-1)
	defer func() {
		if failed == nil && err == nil && counted >= 0 {
			s.keys.committed(counted)
		}
	}()
	for _, u := range batch {
		x := &tx{ctx: ctx, tx: t, s: s, st: s.w, writable: true}
		if u.err = u.ctx.Err(); u.err == nil {
			u.err = u.f(x)
		}
		if s.pg && x.failed != nil {
			if s.again(x.failed, 0) { // whatever f made of it
				_ = t.Rollback()
				return nil, x.failed
			}
			x.dirty = true // PostgreSQL goes on with no transaction in which a statement failed
			u.err = cmp.Or(u.err, x.failed)
		}
		if u.err != nil && x.dirty {
			return u, errors.Join(full(u.err), ignoreDone(t.Rollback()))
		}
		dirty = dirty || x.dirty
		if x.counts {
			counted = x.sealerID
		}
	}
	if !dirty && !s.pg {
		_ = t.Rollback()
		return nil, nil
	}
	var token []byte
	if dirty && s.pg {
		token = newToken()
		if _, err := t.ExecContext(ctx, putToken, token, time.Now().Unix()&^1); err != nil {
			_ = t.Rollback()
			return nil, err
		}
	}
	if err = t.Commit(); err == nil || token == nil || !unknown(err) {
		return nil, err
	}
	committed, cause := s.settle(ctx, token)
	switch {
	case cause != nil:
		return nil, unavailable(cause)
	case committed:
		return nil, nil
	}
	return nil, errUncommitted
}

// errUncommitted says that a transaction is known not to have been committed, and may run again.
var errUncommitted = fmt.Errorf("the connection went before the commit: %w", driver.ErrBadConn)

// tx implements [registration.Tx].
type tx struct {
	ctx      context.Context
	tx       *sql.Tx
	s        *Store
	st       *statements
	writable bool
	dirty    bool  // something was written
	failed   error // the first statement that did, whatever became of its error
	broken   error // what has the next statement fail

	sealer   cipher.AEAD // the newest data key, once it was asked for
	sealerID int64
	counts   bool // it counted a block of the key's seals
}

// said remembers what the database says that is no answer.
func (t *tx) said(err error) error {
	if err != nil && t.failed == nil && !errors.Is(err, sql.ErrNoRows) {
		t.failed = err
	}
	return err
}

// A row is what a statement found, or sql.ErrNoRows.
type row struct {
	row *sql.Row
	t   *tx
}

func (r row) Scan(dst ...any) error { return r.t.said(r.row.Scan(dst...)) }

func (t *tx) row(st *sql.Stmt, args ...any) row {
	return row{t.tx.StmtContext(t.ctx, st).QueryRowContext(t.ctx, args...), t}
}

func (t *tx) exec(st *sql.Stmt, args ...any) (int64, error) {
	if !t.writable {
		return 0, errors.New("a View cannot write")
	}
	if t.broken != nil {
		return 0, t.said(t.broken)
	}
	t.dirty = true
	res, err := t.tx.StmtContext(t.ctx, st).ExecContext(t.ctx, args...)
	if t.said(err) != nil {
		return 0, err
	}
	return res.RowsAffected()
}

func absent(err error) error {
	if errors.Is(err, sql.ErrNoRows) {
		return registration.ErrNotFound
	}
	return err
}

func (t *tx) Revision(scope string) (int64, error) {
	var rev int64
	err := t.row(t.st.revision, scope).Scan(&rev)
	if errors.Is(err, sql.ErrNoRows) {
		return 0, nil
	}
	return rev, err
}

func (t *tx) scanRecord(scope string, row scanner) (*registration.Record, error) {
	r := &registration.Record{}
	var keys []byte
	var symmetric, closed int64
	var id string
	if err := row.Scan(&r.Kind, &r.ID, &r.Document, &keys, &symmetric, &r.Content, &id, &closed); err != nil {
		return nil, absent(err)
	}
	r.Symmetric, r.Closed = symmetric != 0, closed != 0
	var err error
	if keys != nil {
		if r.Keys, err = t.unseal(keys, scope, string(r.Kind), id); err != nil {
			return nil, err
		}
	}
	if keyOf(r.Document) != 0 {
		r.Document, err = t.unseal(r.Document, scope, string(r.Kind), id, "document")
	}
	return r, err
}

// document is a record's as it is kept: encrypted where it names a webhook, for the address of one has its key in it.
func (t *tx) document(scope string, r *registration.Record) []byte {
	if !bytes.Contains(r.Document, []byte(`"webhookUrl"`)) {
		return r.Document
	}
	return t.seal(r.Document, scope, string(r.Kind), dps.Fold(r.ID), "document")
}

func (t *tx) Record(scope string, kind registration.Kind, id string) (*registration.Record, error) {
	return t.scanRecord(scope, t.row(t.st.record, scope, string(kind), id))
}

func (t *tx) CheckRecord(scope string, r *registration.Record) error {
	id := dps.Fold(r.ID)
	for _, c := range r.Certificates {
		var kind, owner string
		err := t.row(t.st.certificateOwner, scope, c.Fingerprint[:]).Scan(&kind, &owner)
		if err == nil && (kind != string(r.Kind) || owner != id) {
			return &registration.OwnerError{Kind: registration.Kind(kind), ID: owner, Err: registration.ErrConflict}
		}
		if err != nil && !errors.Is(err, sql.ErrNoRows) {
			return err
		}
	}
	if r.Kind == registration.Group {
		return t.checkAuthorities(scope, id, r.Certificates)
	}
	return nil
}

func (t *tx) PutRecord(scope string, r *registration.Record) error {
	id := dps.Fold(r.ID)
	if !r.Fresh {
		if err := t.CheckRecord(scope, r); err != nil { // before anything is written, so that a conflict costs nobody a rollback
			return err
		}
		if _, err := t.exec(t.st.deleteCertificates, scope, string(r.Kind), id); err != nil {
			return err
		}
	}
	for _, c := range r.Certificates {
		n, err := t.exec(t.st.putCertificate, scope, c.Fingerprint[:], c.Subject[:], string(r.Kind), id)
		if err == nil && n == 0 { // another record's: none of this one's stays
			taken := &registration.OwnerError{Err: registration.ErrConflict}
			if err = t.row(t.st.certificateOwner, scope, c.Fingerprint[:]).Scan(&taken.Kind, &taken.ID); err == nil {
				_, err = t.exec(t.st.deleteCertificates, scope, string(r.Kind), id)
			}
			if err == nil {
				err = taken
			}
		}
		if err != nil {
			return err
		}
	}
	var keys any
	if r.Keys != nil {
		keys = t.seal(r.Keys, scope, string(r.Kind), id)
	}
	if r.Kind == registration.Group {
		if err := t.changeGroup(scope, id, t.st.dropDeletedGroup); err != nil {
			return err
		}
		if err := t.putAuthorities(scope, id, r.Certificates); err != nil {
			return err
		}
		if err := t.putReferences(scope, id, r.CAReferences); err != nil {
			return err
		}
	}
	_, err := t.exec(t.st.putRecord, scope, string(r.Kind), id, r.ID, t.document(scope, r), keys, bit(r.Symmetric), r.Content, bit(r.Closed))
	return err
}

// bit is a bool as every database has it.
func bit(b bool) int64 {
	if b {
		return 1
	}
	return 0
}

// changeGroup tells every service that a group has changed: the scope's groups have a new revision, which what is written of
// the group behind it takes.
func (t *tx) changeGroup(scope, id string, deleted *sql.Stmt) error {
	if _, err := t.exec(t.st.bumpRevision, scope); err != nil {
		return err
	}
	_, err := t.exec(deleted, scope, id)
	return err
}

func (t *tx) DeleteRecord(scope string, kind registration.Kind, id string) error {
	n, err := t.exec(t.st.deleteRecord, scope, string(kind), id)
	if err != nil {
		return err
	}
	if n == 0 {
		return registration.ErrNotFound
	}
	if _, err := t.exec(t.st.deleteCertificates, scope, string(kind), id); err != nil || kind != registration.Group {
		return err
	}
	if err := t.changeGroup(scope, id, t.st.putDeletedGroup); err != nil {
		return err
	}
	if err := t.putReferences(scope, id, nil); err != nil {
		return err
	}
	return t.putAuthorities(scope, id, nil)
}

// each returns what scan makes of every row.
func each[T any](t *tx, scan func(scanner) (T, error), st *sql.Stmt, args ...any) ([]T, error) {
	rows, err := t.tx.StmtContext(t.ctx, st).QueryContext(t.ctx, args...)
	if t.said(err) != nil {
		return nil, err
	}
	var all []T
	for rows.Next() {
		x, err := scan(rows)
		if err != nil {
			return nil, errors.Join(err, rows.Close())
		}
		all = append(all, x)
	}
	return all, t.said(rows.Err())
}

type scanner interface{ Scan(...any) error }

func (t *tx) list(scope string, st *sql.Stmt, args ...any) ([]*registration.Record, error) {
	return each(t, func(row scanner) (*registration.Record, error) { return t.scanRecord(scope, row) }, st, args...)
}

func (t *tx) Records(scope string, kind registration.Kind, after string, limit int) ([]*registration.Record, error) {
	return t.list(scope, t.st.records, scope, string(kind), after, limit)
}

func (t *tx) SymmetricGroups(scope string) ([]*registration.Record, error) {
	return t.list(scope, t.st.symmetric, scope)
}

func (t *tx) scanRegistration(scope string, row scanner) (*registration.Registration, error) {
	r := &registration.Registration{}
	var body, key []byte
	err := row.Scan(&r.Version, &body, &key)
	if err != nil {
		return nil, absent(err)
	}
	if err = json.Unmarshal(body, r); err == nil && key != nil {
		r.DeviceKey, err = t.unseal(key, scope, "registration", r.ID)
	}
	return r, err
}

func (t *tx) Registration(scope, id string) (*registration.Registration, error) {
	return t.scanRegistration(scope, t.row(t.st.registration, scope, id))
}

func (t *tx) PutRegistration(scope string, r *registration.Registration) error {
	body, err := json.Marshal(r)
	if err != nil {
		return err
	}
	var key any
	if r.DeviceKey != nil {
		key = t.seal(r.DeviceKey, scope, "registration", r.ID)
	}
	if r.Version == 0 {
		return t.ifChanged(t.st.insertRegistration, scope, r.ID, r.Group, body, key)
	}
	return t.ifChanged(t.st.updateRegistration, scope, r.ID, r.Group, body, key, r.Version)
}

func (t *tx) DeleteRegistration(scope, id string) error {
	n, err := t.exec(t.st.deleteRegistration, scope, id)
	if err == nil && n == 0 {
		return registration.ErrNotFound
	}
	if err == nil {
		err = t.DeleteKin(scope, id)
	}
	return err
}

func (t *tx) Registrations(scope, group, after string, limit int) ([]*registration.Registration, error) {
	scan := func(row scanner) (*registration.Registration, error) { return t.scanRegistration(scope, row) }
	if group == "" {
		return each(t, scan, t.st.allRegistrations, scope, after, limit)
	}
	return each(t, scan, t.st.registrations, scope, group, after, limit)
}

func (t *tx) Policy(scope, name string) (*registration.Policy, error) {
	return t.scanPolicy(scope, t.row(t.st.policy, scope, name))
}

func (t *tx) scanPolicy(scope string, row scanner) (*registration.Policy, error) {
	p := &registration.Policy{}
	var first, second []byte
	if err := row.Scan(&p.Name, &p.Rights, &first, &second); err != nil {
		return nil, absent(err)
	}
	var err error
	if p.Primary, err = t.unseal(first, scope, "policy", p.Name, "primary"); err != nil {
		return nil, err
	}
	p.Secondary, err = t.unseal(second, scope, "policy", p.Name, "secondary")
	return p, err
}

func (t *tx) PutPolicy(scope string, p *registration.Policy) error {
	_, err := t.exec(t.st.putPolicy, scope, p.Name, p.Rights, t.seal(p.Primary, scope, "policy", p.Name, "primary"), t.seal(p.Secondary, scope, "policy", p.Name, "secondary"))
	return err
}

func (t *tx) Secret(scope, name string) ([]byte, error) {
	var sealed []byte
	if err := t.row(t.st.secret, scope, name).Scan(&sealed); err != nil {
		return nil, absent(err)
	}
	return t.unseal(sealed, scope, "secret", name)
}

func (t *tx) PutSecret(scope, name string, value []byte) error {
	_, err := t.exec(t.st.putSecret, scope, name, t.seal(value, scope, "secret", name))
	return err
}
