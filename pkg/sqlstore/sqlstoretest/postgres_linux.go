// Package sqlstoretest starts databases for tests of what stands on package sqlstore.
package sqlstoretest

import (
	"context"
	"database/sql"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	_ "github.com/jackc/pgx/v5/stdlib" // the driver

	"github.com/touchmark/touchmark/hsm/hsmtest"
)

// A Server is a running PostgreSQL, or what TOUCHMARK_TEST_POSTGRES names: the address of a database whose user may make others.
type Server struct {
	// Socket is the path of the socket that it listens on; empty where it was running before.
	Socket  string
	address url.URL
	prefix  string
	next    atomic.Int64
}

// Start starts Debian's PostgreSQL, as an ordinary user and on a socket alone, until the test ends. Without one it skips the
// test, as [hsmtest.Require] does.
func Start(t testing.TB) *Server {
	t.Helper()
	s := &Server{prefix: fmt.Sprintf("touchmark_test_%d_", os.Getpid())}
	if dsn := os.Getenv("TOUCHMARK_TEST_POSTGRES"); dsn != "" {
		u, err := url.Parse(dsn)
		if err != nil {
			t.Fatal("TOUCHMARK_TEST_POSTGRES is no URL")
		}
		s.address = *u
		return s
	}
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/initdb")
	if len(found) == 0 {
		hsmtest.Require(t, "PostgreSQL (apt-get install postgresql-15)")
	}
	bin := filepath.Dir(found[len(found)-1])
	dir, err := os.MkdirTemp("", "pg") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	var as *syscall.Credential
	if os.Getuid() == 0 { // which PostgreSQL refuses to run as
		nobody, err := user.Lookup("nobody")
		if err != nil {
			t.Fatal(err)
		}
		uid, _ := strconv.ParseUint(nobody.Uid, 10, 32)
		gid, _ := strconv.ParseUint(nobody.Gid, 10, 32)
		as = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
		if err := os.Chown(dir, int(uid), int(gid)); err != nil {
			t.Fatal(err)
		}
	}
	run := func(program string, args ...string) error {
		cmd := exec.Command(filepath.Join(bin, program), args...)
		cmd.Dir, cmd.SysProcAttr = dir, &syscall.SysProcAttr{Credential: as}
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w\n%s", program, err, out)
		}
		return nil
	}
	data := filepath.Join(dir, "data")
	if err := run("initdb", "-D", data, "-A", "trust", "-U", "touchmark", "-E", "UTF8", "--no-sync", "--no-locale"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = run("pg_ctl", "-D", data, "-m", "immediate", "stop") })
	if err := run("pg_ctl", "-D", data, "-w", "-l", filepath.Join(dir, "log"), "-o", "-c listen_addresses='' -c max_connections=200 -c fsync=off -k "+dir, "start"); err != nil {
		t.Fatal(err)
	}
	s.Socket = filepath.Join(dir, ".s.PGSQL.5432")
	s.address = url.URL{Scheme: "postgres", User: url.User("touchmark"), Path: "/postgres", RawQuery: url.Values{"host": {dir}}.Encode()}
	return s
}

// Database makes an empty database, which goes when the test ends, and returns its address.
func (s *Server) Database(t testing.TB) string {
	t.Helper()
	db, err := sql.Open("pgx", s.address.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	name := s.prefix + strconv.FormatInt(s.next.Add(1), 10)
	if _, err := db.ExecContext(t.Context(), "CREATE DATABASE "+name); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if s.Socket == "" {
			_, _ = db.ExecContext(context.Background(), "DROP DATABASE "+name)
		}
	})
	u := s.address
	u.Path = "/" + name
	return u.String()
}

// At returns an address with other hosts in it, written host:port.
func At(t testing.TB, dsn, address string) string {
	t.Helper()
	u, err := url.Parse(dsn)
	if err != nil {
		t.Fatal(err)
	}
	host, port, _ := strings.Cut(address, ":")
	q := u.Query()
	q.Set("host", host)
	q.Set("port", port)
	q.Set("sslmode", "disable")
	u.RawQuery = q.Encode()
	return u.String()
}
