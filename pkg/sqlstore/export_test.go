package sqlstore

import (
	"context"
	"database/sql"
	"errors"

	"github.com/pressly/goose/v3"
)

// Down takes a closed store's file back to an older version of the tables.
func Down(ctx context.Context, path string, version int64) (err error) {
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
