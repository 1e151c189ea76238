package sqlstore

import (
	"context"

	"github.com/pressly/goose/v3"
)

// DownAndUp takes every migration back, and makes it again.
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
