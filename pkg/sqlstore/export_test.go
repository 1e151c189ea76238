package sqlstore

import (
	"context"
	"database/sql"
	"errors"
	"slices"
	"time"

	"github.com/pressly/goose/v3"

	"github.com/touchmark/touchmark/pkg/registration"
)

// Legacy seals everything in a closed store's file as it was before there were data keys, and removes those.
func Legacy(ctx context.Context, path string, key []byte) error {
	s, err := Open(ctx, Config{Path: path, DataKey: key})
	if err != nil {
		return err
	}
	old, err := newAEAD(key)
	if err != nil {
		return errors.Join(err, s.Close())
	}
	err = s.Update(ctx, func(x registration.Tx) error {
		t := x.(*tx)
		for i, c := range sealedColumns {
			rows, err := t.sealedRows(i, make([]string, 1+len(c.key)), 1000)
			if err != nil {
				return err
			}
			for _, r := range rows {
				if r.value == nil {
					continue
				}
				plain, err := t.unseal(r.value, c.labels(r.key)...)
				if err != nil {
					return err
				}
				args := []any{old.Seal(nil, nil, plain, bind(c.labels(r.key)))}
				for _, k := range r.key {
					args = append(args, k)
				}
				if _, err := t.exec(t.st.putSealed[i], args...); err != nil {
					return err
				}
			}
		}
		_, err := t.exec(t.st.dropKeys, 1<<40)
		return err
	})
	return errors.Join(err, s.Close())
}

// Down takes a closed store's file back to an older version of the tables.
func Down(ctx context.Context, path string, key []byte, version int64) (err error) {
	if err := Legacy(ctx, path, key); err != nil {
		return err
	}
	db, err := sql.Open("sqlite", path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	p, err := (&Store{write: db}).provider(goose.DialectSQLite3)
	if err == nil {
		_, err = p.DownTo(ctx, version)
	}
	return err
}

// DownAndUp takes every migration back on PostgreSQL, and makes it again.
func (s *Store) DownAndUp(ctx context.Context) error {
	p, err := s.provider(goose.DialectPostgres)
	if err == nil {
		_, err = p.DownTo(ctx, 0)
	}
	if err == nil {
		_, err = p.Up(ctx)
	}
	return err
}

// Settle finds out whether a transaction was committed, which with commit it is. Both of the first two answers are what is so: that to
// the first one may be lost.
func (s *Store) Settle(ctx context.Context, commit bool) (answers [2]bool, err error) {
	token := newToken()
	if commit {
		if _, err := s.write.ExecContext(ctx, putToken, token, time.Now().Unix()&^1); err != nil {
			return answers, err
		}
	}
	for i := range answers {
		if answers[i], err = s.settle(ctx, token); err != nil {
			return answers, err
		}
	}
	return answers, nil
}

// Sealed reports whether a column is sealed anew when the data key is changed.
func Sealed(table, column string) bool {
	return slices.ContainsFunc(sealedColumns[:], func(c sealedColumn) bool { return c.table == table && c.column == column })
}
