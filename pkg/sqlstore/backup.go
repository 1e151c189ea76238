package sqlstore

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"strings"
)

// ErrDamaged says that a store, or a copy of one, is not what was written.
var ErrDamaged = errors.New("damaged")

// Copy writes a copy of a SQLite store, or of another file of SQLite's, to a new file, as the store was at one moment, and flushes
// it. The store may be in use, by this process or another one: nobody waits, but what is written meanwhile stays in the write-ahead
// log until the copy is done. In the copy secrets are sealed as they are in the store, and the data key is wrapped.
func Copy(ctx context.Context, path, to string) (err error) {
	if _, err := os.Stat(path); err != nil {
		return err
	}
	if f, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600); err != nil { // SQLite takes an empty file, and its mode
		return err
	} else if err := f.Close(); err != nil {
		return err
	}
	db, err := sql.Open("sqlite", sqliteName(path))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	if _, err := db.ExecContext(ctx, `VACUUM INTO $1`, to); err != nil {
		return fmt.Errorf("copying store %s: %w", path, full(err))
	}
	f, err := os.OpenFile(to, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// Check has SQLite look through every page and index of a store that nobody uses, and returns what its data keys are wrapped
// under.
func Check(ctx context.Context, path string) (wrapping []string, err error) {
	if err := Intact(ctx, path); err != nil {
		return nil, err
	}
	if wrapping, err = ask(ctx, path, `SELECT DISTINCT wrapping FROM data_keys ORDER BY wrapping`); err != nil {
		return nil, fmt.Errorf("store %s is %w, or none: %w", path, ErrDamaged, err)
	}
	return wrapping, nil
}

// Intact is the first half of [Check], which any file of SQLite's passes that is whole.
func Intact(ctx context.Context, path string) error {
	if _, err := os.Stat(path); err != nil {
		return err
	}
	found, err := ask(ctx, path, `PRAGMA integrity_check(10)`)
	if err != nil || len(found) != 1 || found[0] != "ok" {
		return fmt.Errorf("store %s is %w: %w", path, ErrDamaged, errors.Join(err, errors.New(strings.Join(found, "; "))))
	}
	return nil
}

// ask returns the texts that a query of a file answers.
func ask(ctx context.Context, path, query string) (all []string, err error) {
	db, err := sql.Open("sqlite", sqliteName(path)+"&mode=ro")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	rows, err := db.QueryContext(ctx, query)
	if err != nil {
		return nil, err
	}
	for rows.Next() {
		var s string
		if err := rows.Scan(&s); err != nil {
			return nil, errors.Join(err, rows.Close())
		}
		all = append(all, s)
	}
	return all, rows.Err()
}

func sqliteName(path string) string {
	return "file:" + strings.NewReplacer("%", "%25", "?", "%3f", "#", "%23").Replace(path) + "?_pragma=busy_timeout(10000)"
}
