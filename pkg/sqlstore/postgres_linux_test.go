package sqlstore_test

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/touchmark/touchmark/hsm/hsmtest"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
	"github.com/touchmark/touchmark/pkg/sqlstore"
	"github.com/touchmark/touchmark/pkg/sqlstore/sqlstoretest"
)

func openDSN(t testing.TB, dsn string) *sqlstore.Store {
	t.Helper()
	s, err := sqlstore.Open(t.Context(), sqlstore.Config{DSN: dsn, DataKey: key})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// PostgreSQL keeps the contract that SQLite does, takes every migration both ways, and what it does of its own (conflicts, lost
// connections, COMMITs that are not answered) nobody sees.
func TestPostgreSQL(t *testing.T) {
	server := sqlstoretest.Start(t)
	t.Run("contract", func(t *testing.T) {
		registrationtest.Run(t, func(t *testing.T) registration.Store { return openDSN(t, server.Database(t)) })
	})
	t.Run("migrations", func(t *testing.T) {
		if err := openDSN(t, server.Database(t)).DownAndUp(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("replicas start at once", func(t *testing.T) { startAtOnce(t, server.Database(t)) })
	t.Run("conflicts", func(t *testing.T) { conflicts(t, server.Database(t)) })
	t.Run("connections end", func(t *testing.T) { connectionsEnd(t, server.Database(t)) })
	t.Run("commit not answered", func(t *testing.T) { notAnswered(t, server) })
	t.Run("what became of a commit", func(t *testing.T) {
		s := openDSN(t, server.Database(t))
		for _, commit := range []bool{true, false} {
			if said, err := s.Settle(t.Context(), commit); err != nil || said != [2]bool{commit, commit} {
				t.Errorf("committed %t: %v, %v", commit, said, err)
			}
		}
	})
	t.Run("statements that fail", func(t *testing.T) { failingStatements(t, server.Database(t)) })
	t.Run("no database", func(t *testing.T) { noDatabase(t, server) })
}

func startAtOnce(t *testing.T, dsn string) {
	var eg errgroup.Group
	for range 6 {
		eg.Go(func() error {
			s, err := sqlstore.Open(t.Context(), sqlstore.Config{DSN: dsn, DataKey: key, Connections: 2})
			if err != nil {
				return err
			}
			return s.Close()
		})
	}
	if err := eg.Wait(); err != nil {
		t.Fatal(err)
	}
}

// add counts in a grant, which is no statement that could be repeated unseen: it is what f makes of what it read.
func add(s *sqlstore.Store, id string) error {
	return s.Update(context.Background(), func(tx registration.Tx) error {
		return tx.AddToGrant("scope", id, registration.Tally{Used: 1})
	})
}

func newGrant(t testing.TB, s *sqlstore.Store, id string) {
	t.Helper()
	if err := s.Update(t.Context(), func(tx registration.Tx) error {
		return tx.PutGrant("scope", &registration.Grant{ID: id, Order: id, Document: []byte("d")})
	}); err != nil {
		t.Fatal(err)
	}
}

func used(t testing.TB, s *sqlstore.Store, id string) (n int64) {
	t.Helper()
	if err := s.View(t.Context(), func(tx registration.Tx) error {
		g, err := tx.Grant("scope", id)
		if err == nil {
			n = g.Used
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return n
}

// Three replicas work on the same rows at once: no update is lost, none is done twice, and two that read what the other writes
// do not both come through (write skew).
func conflicts(t *testing.T, dsn string) {
	var stores []*sqlstore.Store
	for range 3 {
		stores = append(stores, openDSN(t, dsn))
	}
	newGrant(t, stores[0], "all")
	const callers, rounds = 8, 25
	var skewed atomic.Int64
	var eg errgroup.Group
	for i, s := range stores {
		for c := range callers {
			eg.Go(func() error {
				for r := range rounds {
					if err := add(s, "all"); err != nil {
						return err
					}
					// One of a pair at most: each looks whether the other one is there.
					id, other := fmt.Sprintf("%d-%d-%d", c, r, i%2), fmt.Sprintf("%d-%d-%d", c, r, 1-i%2)
					err := s.Update(t.Context(), func(tx registration.Tx) error {
						if _, err := tx.Device("scope", other); !errors.Is(err, registration.ErrNotFound) {
							return err
						}
						return tx.PutDevice("scope", &registration.Device{ID: id})
					})
					if err != nil {
						return err
					}
				}
				return nil
			})
		}
	}
	if err := eg.Wait(); err != nil {
		t.Fatal(err)
	}
	if n := used(t, stores[0], "all"); n != 3*callers*rounds {
		t.Errorf("%d of %d additions", n, 3*callers*rounds)
	}
	if err := stores[0].View(t.Context(), func(tx registration.Tx) error {
		for c := range callers {
			for r := range rounds {
				_, e0 := tx.Device("scope", fmt.Sprintf("%d-%d-0", c, r))
				_, e1 := tx.Device("scope", fmt.Sprintf("%d-%d-1", c, r))
				if (e0 == nil) == (e1 == nil) {
					skewed.Add(1)
				}
			}
		}
		return nil
	}); err != nil || skewed.Load() != 0 {
		t.Errorf("%d pairs have both or none; %v", skewed.Load(), err)
	}
}

// The server ends every connection again and again while updates and views go on: nobody sees it, and each update is done once.
func connectionsEnd(t *testing.T, dsn string) {
	s := openDSN(t, dsn)
	newGrant(t, s, "g")
	db, err := sql.Open("pgx", dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	const callers, rounds = 8, 60
	var done, killed atomic.Int64
	var eg errgroup.Group
	for range callers {
		eg.Go(func() error {
			for range rounds {
				if err := add(s, "g"); err != nil {
					return err
				}
				if done.Add(1)%20 == 0 {
					var n int64
					if err := db.QueryRowContext(t.Context(), `SELECT COUNT(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = 'touchmark' AND datname = current_database()`).Scan(&n); err != nil {
						return err
					}
					killed.Add(n)
				}
				if err := s.View(t.Context(), func(tx registration.Tx) error { _, err := tx.Grant("scope", "g"); return err }); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err := eg.Wait(); err != nil {
		t.Fatal(err)
	}
	if n := used(t, s, "g"); n != callers*rounds || killed.Load() == 0 {
		t.Errorf("%d of %d additions, %d connections ended", n, callers*rounds, killed.Load())
	}
}

// A cutter stands between a store and its server, and cuts the connection at every other COMMIT of a transaction that wrote:
// before the server has it, or behind, when it has answered and the store has not heard.
type cutter struct {
	commits, before, behind atomic.Int64
	on, away                atomic.Bool
}

func (c *cutter) serve(l net.Listener, socket string) {
	for {
		client, err := l.Accept()
		if err != nil {
			return
		}
		server, err := net.Dial("unix", socket)
		if err != nil || c.away.Load() {
			_ = client.Close()
			continue
		}
		var cut atomic.Bool // what comes back now does not arrive
		end := func() { _ = client.Close(); _ = server.Close() }
		go func() {
			defer end()
			buf := make([]byte, 64<<10)
			for {
				n, err := server.Read(buf)
				if err != nil {
					return
				}
				if cut.Load() {
					c.behind.Add(1)
					return
				}
				if _, err := client.Write(buf[:n]); err != nil {
					return
				}
			}
		}()
		go func() {
			defer end()
			buf := make([]byte, 64<<10)
			for {
				n, err := client.Read(buf)
				if err != nil || c.away.Load() {
					return
				}
				if c.on.Load() && bytes.Equal(buf[:n], []byte("Q\x00\x00\x00\x0bcommit\x00")) {
					switch c.commits.Add(1) % 4 {
					case 1:
						c.before.Add(1)
						return
					case 3:
						cut.Store(true)
					}
				}
				if _, err := server.Write(buf[:n]); err != nil {
					return
				}
			}
		}()
	}
}

// What the database did is done once, and what it did not do is done, though nobody said so: no enrollment "exists already" that
// its caller has just made.
func notAnswered(t *testing.T, server *sqlstoretest.Server) {
	if server.Socket == "" {
		hsmtest.Require(t, "a PostgreSQL server of the test's own: the one of TOUCHMARK_TEST_POSTGRES cannot be cut off")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c := &cutter{}
	go c.serve(l, server.Socket)
	s := openDSN(t, sqlstoretest.At(t, server.Database(t), l.Addr().String()))
	newGrant(t, s, "g")
	svc := registration.New(registration.Config{Store: s, Scope: "scope"})
	c.on.Store(true)
	const callers, rounds = 4, 20
	var eg errgroup.Group
	for w := range callers {
		eg.Go(func() error {
			for i := range rounds {
				if err := add(s, "g"); err != nil {
					return err
				}
				id := fmt.Sprintf("dev-%d-%d", w, i)
				body := fmt.Sprintf(`{"registrationId":%q,"attestation":{"type":"symmetricKey"}}`, id)
				if _, err := svc.PutEnrollment(t.Context(), registration.Actor{}, registration.Individual, id, []byte(body), ""); err != nil {
					return fmt.Errorf("creating %s: %w", id, err)
				}
				if i%2 == 0 {
					if err := svc.DeleteEnrollment(t.Context(), registration.Actor{}, registration.Individual, id, ""); err != nil {
						return fmt.Errorf("deleting %s: %w", id, err)
					}
				}
			}
			return nil
		})
	}
	if err := eg.Wait(); err != nil {
		t.Fatal(err)
	}
	c.on.Store(false)
	if n := used(t, s, "g"); n != callers*rounds {
		t.Errorf("%d of %d additions", n, callers*rounds)
	}
	if c.before.Load() < 10 || c.behind.Load() < 10 {
		t.Errorf("%d commits were cut off before and %d behind", c.before.Load(), c.behind.Load())
	}
}

// A statement that fails takes its own update along and no other one.
func failingStatements(t *testing.T, dsn string) {
	s := openDSN(t, dsn)
	var eg errgroup.Group
	for i := range 200 {
		eg.Go(func() error {
			err := s.Update(t.Context(), func(tx registration.Tx) error {
				if err := tx.PutDevice("scope", &registration.Device{ID: fmt.Sprint("dev-", i)}); err != nil {
					return err
				}
				if i%5 == 1 {
					_ = tx.PutRecord("scope", &registration.Record{Kind: registration.Individual, ID: "nul\x00", Document: []byte("{}")}) // which PostgreSQL's text cannot hold; f does not look
				}
				return nil
			})
			if (i%5 == 1) != (err != nil) {
				return fmt.Errorf("update %d: %w", i, err)
			}
			return nil
		})
	}
	if err := eg.Wait(); err != nil {
		t.Error(err)
	}
}

// A server that is not there is waited for, and then named as what it is, without the password. Doors say 503.
func noDatabase(t *testing.T, server *sqlstoretest.Server) {
	for _, bad := range []string{"sqlite:x?password=hunter2", "postgres://u:hunter2@%zz", "postgres://u:hunter2@127.0.0.1:1/db?sslmode=bogus", "postgres://u:hunter2@/nowhere?host=/nonexistent"} {
		_, err := sqlstore.Open(t.Context(), sqlstore.Config{DSN: bad, DataKey: key, Patience: time.Millisecond})
		if err == nil || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: %v", bad, err)
		}
	}
	if server.Socket == "" {
		return
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c := &cutter{}
	go c.serve(l, server.Socket)
	s, err := sqlstore.Open(t.Context(), sqlstore.Config{DSN: sqlstoretest.At(t, server.Database(t), l.Addr().String()), DataKey: key, Patience: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	newGrant(t, s, "g")
	c.away.Store(true)
	for what, err := range map[string]error{"update": add(s, "g"), "view": s.View(t.Context(), func(tx registration.Tx) error { _, err := tx.Grant("scope", "g"); return err })} {
		if e := dps.AsError(err); !errors.Is(err, sqlstore.ErrUnavailable) || e.Code != dps.CodeServiceOverloaded {
			t.Errorf("%s: %v", what, err)
		}
	}
	c.away.Store(false)
	if n := used(t, s, "g"); n != 0 {
		t.Errorf("%d additions of none", n)
	}
}
