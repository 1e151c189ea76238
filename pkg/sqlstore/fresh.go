package sqlstore

import (
	"database/sql"
	"errors"
	"fmt"
	"strings"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
)

// freshRows is how many rows a statement inserts. A statement costs as much as some rows do, so more would not be seen.
const freshRows = 50

// freshStatements insert rows that are not there yet: many at once, and one for what is left over.
type freshStatements struct {
	records, certificates, devices, registered, issued [2]*sql.Stmt
}

func (st *freshStatements) all() (all []statement) {
	for i, n := range []int{freshRows, 1} {
		all = append(all,
			statement{&st.records[i], `INSERT INTO records (scope, kind, id, name, document, keys, "symmetric", content, closed) VALUES ` + values(n, "$1, 'individual', ?, ?, ?, ?, 0, ?, 0")},
			statement{&st.certificates[i], `INSERT INTO certificates (scope, fingerprint, subject, kind, id) VALUES ` + values(n, "$1, ?, ?, 'individual', ?")},
			statement{&st.devices[i], `INSERT INTO devices (scope, id, group_id, serial, key_hash, revision, ended, state, station, order_id, grant_id) VALUES ` + values(n, "$1, ?, '', ?, ?, ?, 0, '', ?, ?, ?")},
			statement{&st.registered[i], `SELECT EXISTS (SELECT 1 FROM registrations WHERE scope = $1 AND id IN ` + values(1, strings.Repeat(", ?", n)[2:]) + `)`},
			statement{&st.issued[i], `SELECT EXISTS (SELECT 1 FROM issued WHERE scope = $1 AND key_hash IN ` + values(1, strings.Repeat(", ?", n)[2:]) + `)`})
	}
	return all
}

// values returns n rows of placeholders: ? is the next one behind $1.
func values(n int, row string) string {
	var b strings.Builder
	next := 2
	for i := range n {
		if i > 0 {
			b.WriteString(", ")
		}
		b.WriteByte('(')
		for _, r := range row {
			if r == '?' {
				fmt.Fprintf(&b, "$%d", next)
				next++
			} else {
				b.WriteRune(r)
			}
		}
		b.WriteByte(')')
	}
	return b.String()
}

// taken reports whether a row, or its like in a unique index, is there already.
func taken(err error) bool {
	var se *sqlite.Error
	return errors.As(err, &se) && (se.Code() == sqlite3.SQLITE_CONSTRAINT_UNIQUE || se.Code() == sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY) || duplicate(err)
}

// inRows calls f for every block of so many arguments as one of the statements takes.
func inRows[T any](st [2]*sql.Stmt, scope string, all []T, row func(T) []any, f func(*sql.Stmt, []any) error) error {
	for len(all) > 0 {
		stmt, n := st[1], 1
		if len(all) >= freshRows {
			stmt, n = st[0], freshRows
		}
		args := []any{scope}
		for _, x := range all[:n] {
			args = append(args, row(x)...)
		}
		if err := f(stmt, args); err != nil {
			return err
		}
		all = all[n:]
	}
	return nil
}

func (t *tx) PutFresh(scope string, records []*registration.Record, devices []*registration.Device) error {
	insert := func(st *sql.Stmt, args []any) error {
		_, err := t.exec(st, args...)
		if taken(err) {
			return registration.ErrConflict
		}
		return err
	}
	none := func(st *sql.Stmt, args []any) error {
		var any bool
		if err := t.row(st, args...).Scan(&any); err != nil {
			return err
		}
		if any {
			return registration.ErrConflict
		}
		return nil
	}
	type certificate struct {
		*registration.Certificate
		id string
	}
	var certs []certificate
	for _, r := range records {
		for i := range r.Certificates {
			certs = append(certs, certificate{&r.Certificates[i], dps.Fold(r.ID)})
		}
	}
	var keys []string
	for _, d := range devices {
		if d.KeyHash != "" {
			keys = append(keys, d.KeyHash)
		}
	}
	st := &t.st.freshStatements
	if err := inRows(st.issued, scope, keys, func(k string) []any { return []any{k} }, none); err != nil {
		return err
	}
	if err := inRows(st.registered, scope, devices, func(d *registration.Device) []any { return []any{d.ID} }, none); err != nil {
		return err
	}
	if err := inRows(st.records, scope, records, func(r *registration.Record) []any {
		var keys any
		if r.Keys != nil {
			keys = t.seal(r.Keys, scope, string(r.Kind), dps.Fold(r.ID))
		}
		return []any{dps.Fold(r.ID), r.ID, t.document(scope, r), keys, r.Content}
	}, insert); err != nil {
		return err
	}
	if err := inRows(st.certificates, scope, certs, func(c certificate) []any { return []any{c.Fingerprint[:], c.Subject[:], c.id} }, insert); err != nil {
		return err
	}
	return inRows(st.devices, scope, devices, func(d *registration.Device) []any {
		return []any{d.ID, d.Serial, d.KeyHash, d.Revision, d.Station, d.Order(), d.Grant}
	}, insert)
}
