package sqlstore

import (
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/touchmark/touchmark/hsm/hsmtest"
)

// PostgreSQL takes every migration, both ways, and understands every statement.
func TestPostgreSQL(t *testing.T) {
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
	run := func(input, program string, args ...string) error {
		cmd := exec.Command(filepath.Join(bin, program), args...)
		cmd.Dir, cmd.Stdin, cmd.SysProcAttr = dir, strings.NewReader(input), &syscall.SysProcAttr{Credential: as}
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w\n%s", program, err, out)
		}
		return nil
	}
	data := filepath.Join(dir, "data")
	if err := run("", "initdb", "-D", data, "-A", "trust", "-U", "touchmark", "-E", "UTF8", "--no-sync", "--no-locale"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = run("", "pg_ctl", "-D", data, "-m", "immediate", "stop") })
	if err := run("", "pg_ctl", "-D", data, "-w", "-l", filepath.Join(dir, "log"), "-o", "-c listen_addresses='' -c fsync=off -k "+dir, "start"); err != nil {
		t.Fatal(err)
	}
	query := func(text string) error {
		return run(text, "psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-h", dir, "-U", "touchmark", "-d", "postgres")
	}

	names, err := fs.Glob(migrations, "migrations/*.sql")
	if err != nil {
		t.Fatal(err)
	}
	const goMigration = "migrations/00005"
	names = append(names, goMigration)
	slices.Sort(names)
	var downs []string
	for _, name := range names {
		up, down := strings.Join(lookupsUp(), ";\n")+";", strings.Join(lookupsDown(), ";\n")+";"
		if name != goMigration {
			text, err := migrations.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			up, down, _ = strings.Cut(string(text), "-- +goose Down")
		}
		if err := query(up); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		downs = append(downs, down)
	}
	for _, s := range new(statements).all() {
		if err := query("PREPARE s AS " + s.text + ";"); err != nil {
			t.Errorf("%s: %v", s.text, err)
		}
	}
	for i, down := range slices.Backward(downs) {
		if err := query(down); err != nil {
			t.Fatalf("%s, down: %v", names[i], err)
		}
	}
}
