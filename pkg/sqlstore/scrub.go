package sqlstore

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/touchmark/touchmark/pkg/registration"
)

// maxScrub is the size of a file, in octets, that is written anew when a scope was erased: writers wait meanwhile, a second or two.
const maxScrub = 256 << 20

var _ registration.Scrubber = (*Store)(nil)

// Scrub implements [registration.Scrubber] for a store in a file. SQLite overwrites what is deleted (secure_delete), and the
// write-ahead log, which has it too, is emptied here. What SQLite does not overwrite are copies that it left behind when it moved
// rows from page to page: those go when the file is written anew, which is done here for one of up to 256 MiB. A larger one keeps such
// fragments until somebody does it (VACUUM, while the service stands still). In memory, and in a database of others, there is nothing
// to do.
func (s *Store) Scrub(ctx context.Context) error {
	if s.path == "" {
		return nil
	}
	file, err := os.Stat(s.path)
	if err != nil {
		return fmt.Errorf("scrubbing the store: %w", err)
	}
	if file.Size() <= maxScrub {
		if _, err := s.write.ExecContext(ctx, `VACUUM`); err != nil {
			return fmt.Errorf("scrubbing the store: %w", full(err))
		}
	}
	var busy, frames, done int
	if err := s.write.QueryRowContext(ctx, `PRAGMA wal_checkpoint(TRUNCATE)`).Scan(&busy, &frames, &done); err != nil {
		return fmt.Errorf("scrubbing the store: %w", full(err))
	}
	if busy != 0 {
		return errors.New("scrubbing the store: somebody reads it all the time")
	}
	return nil
}
