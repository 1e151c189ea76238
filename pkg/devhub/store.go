package devhub

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"

	_ "modernc.org/sqlite" // registers the driver
)

// store is the file that devices last in. A commit returns when it is on disk: what was acknowledged survives the process and
// the power. Devices' keys are encrypted with AES-256-GCM, with the device's name authenticated beside them, so that a
// ciphertext serves in its own row only.
type store struct {
	db   *sql.DB
	aead cipher.AEAD
}

// storeTime bounds one change of the file.
const storeTime = 30 * time.Second

func openStore(ctx context.Context, path string, dataKey []byte) (*store, error) {
	block, err := aes.NewCipher(dataKey)
	if err != nil || len(dataKey) != 32 {
		return nil, errors.New("the data key must have 32 octets")
	}
	s := &store{}
	if s.aead, err = cipher.NewGCMWithRandomNonce(block); err != nil {
		return nil, err
	}
	// SQLite takes an empty file, and its mode for those beside it.
	if f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600); err == nil {
		if err := f.Close(); err != nil {
			return nil, err
		}
	} else if !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	name := "file:" + strings.NewReplacer("%", "%25", "?", "%3f", "#", "%23").Replace(path)
	s.db, err = sql.Open("sqlite", name+"?_pragma=busy_timeout(10000)&_pragma=journal_mode(WAL)&_pragma=synchronous(FULL)&_txlock=immediate")
	if err != nil {
		return nil, err
	}
	s.db.SetMaxOpenConns(1)
	if _, err := s.db.ExecContext(ctx, `CREATE TABLE IF NOT EXISTS devices (id TEXT PRIMARY KEY, document BLOB NOT NULL, keys BLOB) STRICT`); err != nil {
		return nil, errors.Join(err, s.db.Close())
	}
	return s, nil
}

func (s *store) close() error { return s.db.Close() }

func label(id string) []byte { return []byte("hub\x00device\x00" + id) }

// load reads all devices.
func (s *store) load(ctx context.Context) ([]*record, error) {
	rows, err := s.db.QueryContext(ctx, `SELECT id, document, keys FROM devices`)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var all []*record
	for rows.Next() {
		var id string
		var document, keys []byte
		if err := rows.Scan(&id, &document, &keys); err != nil {
			return nil, err
		}
		r := &record{}
		if err := json.Unmarshal(document, r); err != nil || r.ID != id {
			return nil, fmt.Errorf("device %s is damaged: %w", id, err)
		}
		if keys != nil {
			plain, err := s.aead.Open(nil, nil, keys, label(id))
			if err == nil {
				err = json.Unmarshal(plain, &r.Keys)
			}
			if err != nil {
				return nil, fmt.Errorf("keys of device %s do not open: another data key, or damage", id)
			}
		}
		all = append(all, r)
	}
	return all, rows.Err()
}

// write keeps devices and forgets one, all or nothing.
func (s *store) write(put []*record, remove string) error {
	ctx, cancel := context.WithTimeout(context.Background(), storeTime) // a caller who leaves must not leave a change half known
	defer cancel()
	tx, err := s.db.BeginTx(ctx, nil)
	if err != nil {
		return fmt.Errorf("writing the hub's file: %w", err)
	}
	for _, r := range put {
		if err = s.put(ctx, tx, r); err != nil {
			break
		}
	}
	if err == nil && remove != "" {
		_, err = tx.ExecContext(ctx, `DELETE FROM devices WHERE id = ?`, remove)
	}
	if err == nil {
		err = tx.Commit()
	}
	if err != nil {
		return fmt.Errorf("writing the hub's file: %w", errors.Join(err, ignoreDone(tx.Rollback())))
	}
	return nil
}

func ignoreDone(err error) error {
	if errors.Is(err, sql.ErrTxDone) {
		return nil
	}
	return err
}

func (s *store) put(ctx context.Context, tx *sql.Tx, r *record) error {
	document, err := json.Marshal(r)
	if err != nil {
		return err
	}
	var keys []byte
	if r.Keys != [2]string{} {
		plain, err := json.Marshal(r.Keys)
		if err != nil {
			return err
		}
		keys = s.aead.Seal(nil, nil, plain, label(r.ID))
	}
	_, err = tx.ExecContext(ctx, `INSERT INTO devices (id, document, keys) VALUES (?, ?, ?) ON CONFLICT (id) DO UPDATE SET document = excluded.document, keys = excluded.keys`,
		r.ID, document, keys)
	return err
}

// UnmarshalJSON reads an object as parse does, with numbers as they were written.
func (o *object) UnmarshalJSON(b []byte) error {
	v, err := parseObject(b)
	*o = v
	return err
}
