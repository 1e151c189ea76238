package sqlstore

import (
	"context"
	"crypto/rand"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"io/fs"
	mathrand "math/rand/v2"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/pressly/goose/v3"

	"github.com/touchmark/touchmark/pkg/dps"
)

// ErrUnavailable says that the database could not be reached in time, or did not say whether it had committed, or kept refusing
// for the sake of others. Whoever asks again later is answered; a door says 503 by itself.
var ErrUnavailable = errors.New("the database is not available")

const (
	// Few connections do more than many: PostgreSQL finds conflicts by pages of an index, so devices whose IDs are neighbours
	// get into each other's way when they come at once. With 3 replicas on one server, 2 and 4 writers each did 1.2 times what 8
	// did, with IDs in order; batches of 8 did 1.3 times what single updates did, and no less than batches of 32.
	defaultConnections      = 8
	defaultStatementTimeout = 30 * time.Second
	defaultPatience         = 20 * time.Second // shorter than a device waits for its answer
	// attemptTime bounds one attempt.
	attemptTime = time.Minute
	// pgBatch is how many waiting updates share a transaction. The more there are, the more run again when another was first.
	pgBatch = 8
	// tokenTime is for how long the mark of a commit is kept, many times longer than anybody asks for it.
	tokenTime = 10 * time.Minute
	// claimTime is after how long a claim of one who does not renew it is anybody's.
	claimTime = 30 * time.Second
)

// Settings of PostgreSQL that CockroachDB and YugabyteDB have too.
func (cfg *Config) postgres(timeout time.Duration) (*pgx.ConnConfig, error) {
	if !strings.HasPrefix(cfg.DSN, "postgres://") && !strings.HasPrefix(cfg.DSN, "postgresql://") {
		return nil, errors.New("a database's address begins with postgres://") // it is not shown: it may hold a password
	}
	c, err := pgx.ParseConfig(cfg.DSN)
	if err != nil {
		return nil, errors.New("the database's address cannot be read: want postgres://user@host/database?sslmode=verify-full")
	}
	for k, v := range map[string]string{
		"application_name":                    "touchmark",
		"statement_timeout":                   strconv.FormatInt(timeout.Milliseconds(), 10),
		"idle_in_transaction_session_timeout": strconv.FormatInt(attemptTime.Milliseconds(), 10), // a replica that hangs lets go of its locks
	} {
		if _, ok := c.RuntimeParams[k]; !ok {
			c.RuntimeParams[k] = v
		}
	}
	if c.ConnectTimeout == 0 {
		c.ConnectTimeout = 5 * time.Second
	}
	return c, nil
}

// openPostgres connects and brings the tables up to date.
func (s *Store) openPostgres(ctx context.Context, cfg *Config) error {
	if cfg.Connections == 0 {
		cfg.Connections = defaultConnections
	}
	if cfg.Connections < 2 {
		return errors.New("a store needs 2 connections to its database at least")
	}
	if cfg.StatementTimeout == 0 {
		cfg.StatementTimeout = defaultStatementTimeout
	}
	c, err := cfg.postgres(cfg.StatementTimeout)
	if err != nil {
		return err
	}
	// Half of the connections write, so that readers find one when writers wait for each other.
	pool := func(n int) *sql.DB {
		db := stdlib.OpenDB(*c)
		db.SetMaxOpenConns(n)
		db.SetMaxIdleConns(n)
		db.SetConnMaxLifetime(30*time.Minute + mathrand.N(5*time.Minute)) // finds servers that came back
		return db
	}
	s.writers, s.batch = cfg.Connections/2, pgBatch
	s.write, s.read, s.side = pool(s.writers), pool(cfg.Connections-s.writers), pool(1)
	s.serializable = &sql.TxOptions{Isolation: sql.LevelSerializable}
	// A snapshot, which no writer waits for or fails on.
	s.snapshot = &sql.TxOptions{Isolation: sql.LevelRepeatableRead, ReadOnly: true}
	return s.migratePostgres(ctx)
}

// migratePostgres brings the tables up to date, one replica at a time. No lock of the database's does that on all engines, so a
// row is claimed, for a time that its holder extends while it works.
func (s *Store) migratePostgres(ctx context.Context) error {
	p, err := s.provider(goose.DialectPostgres)
	if err != nil {
		return err
	}
	holder := dps.NewUUID()
	const (
		table = `CREATE TABLE IF NOT EXISTS claims (name TEXT NOT NULL PRIMARY KEY, holder TEXT NOT NULL, until BIGINT NOT NULL)`
		take  = `INSERT INTO claims (name, holder, until) VALUES ('migrations', $1, CAST(EXTRACT(EPOCH FROM now()) AS BIGINT) + $2)
			ON CONFLICT (name) DO UPDATE SET holder = excluded.holder, until = excluded.until
			WHERE claims.holder = excluded.holder OR claims.until < CAST(EXTRACT(EPOCH FROM now()) AS BIGINT)`
	)
	for begun, attempt := time.Now(), 0; ; attempt++ {
		var n int64
		_, err := s.write.ExecContext(ctx, table)
		if err == nil {
			var res sql.Result
			if res, err = s.write.ExecContext(ctx, take, holder, int64(claimTime/time.Second)); err == nil {
				n, err = res.RowsAffected()
			}
		}
		if err == nil && n == 1 {
			break
		}
		// Two that make the table at once: the other one's counts, which PostgreSQL calls a duplicate of something of its own.
		if err != nil && !again(err) && !duplicate(err) {
			return err
		}
		if err != nil && time.Since(begun) > s.patience {
			return unavailable(err)
		}
		if err != nil && attempt == 3 && s.log != nil { // replicas that begin at once meet sooner
			s.log.Warn("the database is not ready: trying on", "patience", s.patience, "cause", err)
		}
		if !s.pause(ctx, attempt) {
			return ctx.Err()
		}
	}
	renewed, stop := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(renewed)
		tick := time.NewTicker(claimTime / 3)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
				_, _ = s.side.ExecContext(ctx, take, holder, int64(claimTime/time.Second))
			}
		}
	}()
	_, err = p.Up(ctx)
	close(stop)
	<-renewed
	_, gone := s.write.ExecContext(context.WithoutCancel(ctx), `DELETE FROM claims WHERE name = 'migrations' AND holder = $1`, holder)
	return errors.Join(err, gone)
}

func (s *Store) provider(d goose.Dialect) (*goose.Provider, error) {
	dir, err := fs.Sub(migrations, "migrations")
	if err != nil {
		return nil, err
	}
	return goose.NewProvider(d, s.write, dir, goose.WithGoMigrations(lookups))
}

// sqlState returns PostgreSQL's code of an error, or nothing.
func sqlState(err error) string {
	var e *pgconn.PgError
	if errors.As(err, &e) {
		return e.Code
	}
	return ""
}

// duplicate reports whether a row, or a table, is there already.
func duplicate(err error) bool {
	code := sqlState(err)
	return code == "23505" || code == "42P07" || code == "42710" // a row, a table, a table's type
}

// again reports whether a transaction that failed with an error, before its commit, is to be run again: others were first, or
// the connection is gone.
func again(err error) bool {
	if code := sqlState(err); code != "" {
		return conflict(err) || gone(code)
	}
	return lost(err)
}

// conflict reports whether others were in the way: a serialization failure, or a deadlock.
func conflict(err error) bool {
	code := sqlState(err)
	return code == "40001" || code == "40P01"
}

// gone reports whether a code means that the server or the connection goes away, or that this server does not write any more.
func gone(code string) bool {
	return strings.HasPrefix(code, "08") || strings.HasPrefix(code, "57P") || code == "25006" || code == "53300"
}

// lost reports whether an error is one of the connection.
func lost(err error) bool {
	var n net.Error
	return errors.Is(err, driver.ErrBadConn) || errors.Is(err, sql.ErrConnDone) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.Is(err, net.ErrClosed) || errors.As(err, &n) || pgconn.SafeToRetry(err)
}

// unknown reports whether the answer to COMMIT leaves open whether it happened.
func unknown(err error) bool {
	code := sqlState(err)
	return code == "40003" || gone(code) || code == "" && !errors.Is(err, pgx.ErrTxCommitRollback)
}

func unavailable(err error) error {
	return dps.NewError(dps.CodeServiceOverloaded, "Try again later", fmt.Errorf("%w: %w", ErrUnavailable, err))
}

// pause waits before the next attempt, at random so that those who got into each other's way do not do so again. It reports
// false when there is to be none.
func (s *Store) pause(ctx context.Context, attempt int) bool {
	t := time.NewTimer(mathrand.N(time.Millisecond << min(attempt, 10)))
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	case <-s.stop:
		return false
	}
}

// A token marks a transaction that wrote, in a row of the transaction's own. What f of an Update does is its caller's to repeat
// or not: an enrollment that is created twice "exists already", a deletion finds nothing, an outbox gets two of one kind. So
// when the answer to COMMIT is lost, nothing is run again before it is known what became of it.
func newToken() []byte {
	token := make([]byte, 16)
	_, _ = rand.Read(token) // crypto/rand.Read never fails
	return token
}

// at is in seconds, and even for a transaction's own token; an odd one bars the transaction.
const (
	putToken = `INSERT INTO commits (token, at) VALUES ($1, $2)`
	barToken = putToken + ` ON CONFLICT (token) DO UPDATE SET at = commits.at RETURNING at`
)

// settle finds out whether the transaction with a token was committed. It tries to put the token itself: the database has that
// wait for a transaction that is still under way, shows the token of one that has committed, and else bars it from ever doing so.
// What settle puts differs from what the transaction does, for the answer to that may be lost as well.
func (s *Store) settle(ctx context.Context, token []byte) (committed bool, err error) {
	for begun, attempt := time.Now(), 0; ; attempt++ {
		var at int64
		err = s.write.QueryRowContext(ctx, barToken, token, time.Now().Unix()|1).Scan(&at)
		switch {
		case err == nil:
			return at&1 == 0, nil
		case time.Since(begun) > s.patience || !s.pause(ctx, attempt):
			return false, fmt.Errorf("whether it was committed is not known: %w", err)
		}
	}
}

// forgetTokens removes old tokens now and then, until the store is closed.
func (s *Store) forgetTokens() {
	defer s.others.Done()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	for {
		t := time.NewTimer(time.Minute + mathrand.N(time.Minute))
		select {
		case <-s.stop:
			t.Stop()
			return
		case <-t.C:
		}
		// Without a transaction of its own that others could get into the way of. What fails is removed the next time.
		for more := true; more; {
			res, err := s.side.ExecContext(ctx, `DELETE FROM commits WHERE token IN (SELECT token FROM commits WHERE at < $1 LIMIT 5000)`, time.Now().Add(-tokenTime).Unix())
			if more = err == nil; more {
				n, _ := res.RowsAffected()
				more = n == 5000
			}
		}
	}
}
