package sqlstore

import (
	"context"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"

	"github.com/pressly/goose/v3"

	"github.com/touchmark/touchmark/pkg/registration"
)

// lookups is migration 00005. It is Go for its last step: what is in certificates cannot be read in SQL.
var lookups = goose.NewGoMigration(5, &goose.GoFunc{RunTx: func(ctx context.Context, tx *sql.Tx) error {
	for _, q := range lookupsUp() {
		if _, err := tx.ExecContext(ctx, q); err != nil {
			return err
		}
	}
	put, err := tx.PrepareContext(ctx, putAuthority)
	if err != nil {
		return err
	}
	defer put.Close()
	for scope, id := "", ""; ; {
		more, err := indexGroups(ctx, tx, put, &scope, &id)
		if err != nil || !more {
			return err
		}
	}
}}, &goose.GoFunc{RunTx: func(ctx context.Context, tx *sql.Tx) error {
	for _, q := range lookupsDown() {
		if _, err := tx.ExecContext(ctx, q); err != nil {
			return err
		}
	}
	return nil
}})

func lookupsUp() []string {
	return []string{
		// The scope's groups_revision that wrote a group last; 0 for what is no group.
		`ALTER TABLE records ADD COLUMN revision BIGINT NOT NULL DEFAULT 0`,
		`CREATE INDEX records_revision ON records (scope, revision) WHERE kind = 'group'`,
		`CREATE TABLE deleted_groups (scope TEXT NOT NULL, id TEXT NOT NULL, revision BIGINT NOT NULL, PRIMARY KEY (scope, id))`,
		`CREATE INDEX deleted_groups_revision ON deleted_groups (scope, revision)`,
		// The CAs of groups, by what certificates below them say of their issuer. A row each for every name of its key, one of
		// which is the SHA-256 of the public key.
		`CREATE TABLE authorities (scope TEXT NOT NULL, subject BYTEA NOT NULL, key_id BYTEA NOT NULL, id TEXT NOT NULL, PRIMARY KEY (scope, subject, key_id, id))`,
		`CREATE INDEX authorities_owner ON authorities (scope, id)`,
	}
}

func lookupsDown() []string {
	return []string{`DROP TABLE authorities`, `DROP TABLE deleted_groups`, `DROP INDEX records_revision`, `ALTER TABLE records DROP COLUMN revision`}
}

const putAuthority = `INSERT INTO authorities (scope, subject, key_id, id) VALUES ($1, $2, $3, $4) ON CONFLICT (scope, subject, key_id, id) DO NOTHING`

// indexGroups indexes the CAs of some groups behind one, and moves on behind them.
func indexGroups(ctx context.Context, tx *sql.Tx, put *sql.Stmt, scope, id *string) (more bool, err error) {
	rows, err := tx.QueryContext(ctx, `SELECT scope, id, document FROM records WHERE kind = 'group' AND (scope > $1 OR scope = $1 AND id > $2) ORDER BY scope, id LIMIT 500`, *scope, *id)
	if err != nil {
		return false, err
	}
	defer rows.Close()
	type group struct {
		scope, id string
		document  []byte
	}
	var groups []group
	for rows.Next() {
		var g group
		if err := rows.Scan(&g.scope, &g.id, &g.document); err != nil {
			return false, err
		}
		groups = append(groups, g)
	}
	if err := errors.Join(rows.Err(), rows.Close()); err != nil {
		return false, err
	}
	for _, g := range groups {
		*scope, *id = g.scope, g.id
		certs, err := registration.IndexGroup(g.document)
		if err != nil {
			return false, fmt.Errorf("group %q: %w", g.id, err)
		}
		for _, c := range certs {
			ids, err := authority(&c)
			if err != nil {
				return false, err
			}
			for _, k := range ids {
				if _, err := put.ExecContext(ctx, g.scope, c.Subject[:], k, g.id); err != nil {
					return false, err
				}
			}
		}
	}
	return len(groups) > 0, nil
}

// authority returns the names that a CA's key is indexed by; the first is the hash of the key itself.
func authority(c *registration.Certificate) ([][]byte, error) {
	key, err := hex.DecodeString(c.Key)
	return append([][]byte{key}, c.KeyIDs...), err
}

// putAuthorities indexes the CAs of a group, which checkAuthorities found to be its own.
func (t *tx) putAuthorities(scope, id string, certs []registration.Certificate) error {
	if _, err := t.exec(t.st.deleteAuthorities, scope, id); err != nil {
		return err
	}
	for _, c := range certs {
		ids, err := authority(&c)
		if err != nil {
			return err
		}
		for _, k := range ids {
			if _, err := t.exec(t.st.putAuthority, scope, c.Subject[:], k, id); err != nil {
				return err
			}
		}
	}
	return nil
}

// checkAuthorities says ErrSameCA when a CA that a group did not have before is another group's. What two groups share from
// the time before there was such a check they keep, so that one of them can be disabled.
func (t *tx) checkAuthorities(scope, id string, certs []registration.Certificate) error {
	for _, c := range certs {
		ids, err := authority(&c)
		if err != nil {
			return err
		}
		var all, own int64
		var other string
		if err := t.row(t.st.authorityOwners, scope, c.Subject[:], ids[0], id).Scan(&all, &own, &other); err != nil {
			return err
		}
		if all > 0 && own == 0 {
			return &registration.OwnerError{Kind: registration.Group, ID: other, Err: registration.ErrSameCA}
		}
	}
	return nil
}

func scanText(row scanner) (s string, err error) {
	err = row.Scan(&s)
	return s, err
}

func (t *tx) GroupsByCA(scope string, subject [32]byte, keyID []byte, limit int) (all []*registration.Record, err error) {
	if keyID != nil {
		if all, err = t.list(scope, t.st.byAuthority, scope, subject[:], keyID, limit+1); len(all) > limit {
			return nil, registration.ErrTooMany
		}
		return all, err
	}
	ids, err := each(t, scanText, t.st.bySubject, scope, subject[:], limit+1)
	if err != nil {
		return nil, err
	}
	if len(ids) > limit {
		return nil, registration.ErrTooMany
	}
	for _, id := range ids {
		r, err := t.Record(scope, registration.Group, id)
		if err != nil {
			return nil, err
		}
		all = append(all, r)
	}
	return all, nil
}

func (t *tx) ChangedGroups(scope string, after int64) (written []*registration.Record, deleted []string, err error) {
	if written, err = t.list(scope, t.st.changedGroups, scope, after); err != nil {
		return nil, nil, err
	}
	deleted, err = each(t, scanText, t.st.deletedGroups, scope, after)
	return written, deleted, err
}

func (t *tx) CertificateOwner(scope string, fingerprint [32]byte) (kind registration.Kind, id string, err error) {
	err = absent(t.row(t.st.certificateOwner, scope, fingerprint[:]).Scan(&kind, &id))
	return kind, id, err
}
