package sqlstore

import (
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
)

// scopeStatements are those of scopes themselves, and of what is kept of them for their operators.
type scopeStatements struct {
	scope, scopeByName, nameOwner, scopes, insertScope, updateScope, eraseScope *sql.Stmt
	putAudit, audits, policies, deletePolicy                                    *sql.Stmt
	erase                                                                       [len(scopeTables)]*sql.Stmt
}

// scopeTables are all tables but scopes, with what tells their rows apart within a scope. A new table has its line here.
var scopeTables = [...][2]string{
	{"records", "kind, id"}, {"certificates", "fingerprint"}, {"authorities", "subject, key_id, id"}, {"deleted_groups", "id"},
	{"registrations", "id"}, {"devices", "id"}, {"endings", "id, revision, key_hash"}, {"grants", "id"}, {"refusals", "order_id, id"},
	{"challenges", "id"}, {"issued", "serial_number"}, {"policies", "name"}, {"secrets", "name"}, {"audit", "id"},
	{"ca_certificates", "name"}, {"ca_references", "name, id"},
	{"outbox", "id"}, {"orphans", "id, hub, device_id"}, {"kin", "id"}, {"edges", "name"},
	{"usage", "day, api, operation, result"}, {"attempts", "device, id"},
}

const scopeColumns = `SELECT scope, document, version FROM scopes `

func (st *scopeStatements) all() []statement {
	all := []statement{
		{&st.scope, scopeColumns + `WHERE scope = $1 AND document IS NOT NULL`},
		{&st.scopeByName, scopeColumns + `WHERE name = $1 AND name <> ''`},
		{&st.nameOwner, `SELECT scope FROM scopes WHERE name = $1 AND name <> ''`},
		{&st.scopes, scopeColumns + `WHERE scope > $1 AND name <> '' ORDER BY scope LIMIT $2`},
		{&st.insertScope, `INSERT INTO scopes (scope, groups_revision, name, document, version) VALUES ($1, 1, $2, $3, 1)
			ON CONFLICT (scope) DO UPDATE SET groups_revision = scopes.groups_revision + 1, name = excluded.name, document = excluded.document, version = 1
			WHERE scopes.version = 0`},
		{&st.updateScope, `UPDATE scopes SET groups_revision = groups_revision + 1, name = $2, document = $3, version = version + 1 WHERE scope = $1 AND version = $4`},
		{&st.eraseScope, `UPDATE scopes SET groups_revision = groups_revision + 1, name = '' WHERE scope = $1`},
		// Every change of an operator's has its entry, so that nothing is written of a scope that was erased.
		{&st.putAudit, `INSERT INTO audit (scope, id, body) SELECT $1, $2, $3 WHERE NOT EXISTS (SELECT 1 FROM scopes WHERE scope = $1 AND name = '' AND document IS NOT NULL)`},
		{&st.audits, `SELECT body FROM audit WHERE scope = $1 AND id > $2 ORDER BY id LIMIT $3`},
		{&st.policies, `SELECT name, rights, primary_key, secondary_key FROM policies WHERE scope = $1 ORDER BY name`},
		{&st.deletePolicy, `DELETE FROM policies WHERE scope = $1 AND name = $2`},
	}
	for i, t := range scopeTables {
		all = append(all, statement{&st.erase[i], fmt.Sprintf(`DELETE FROM %s WHERE scope = $1 AND (%s) IN (SELECT %s FROM %s WHERE scope = $1 LIMIT $2)`, t[0], t[1], t[1], t[0])})
	}
	return all
}

func (t *tx) scanScope(row scanner) (*registration.Scope, error) {
	var id string
	var sealed []byte
	sc := &registration.Scope{}
	if err := row.Scan(&id, &sealed, &sc.Version); err != nil {
		return nil, absent(err)
	}
	b, err := t.unseal(sealed, id, "scope")
	if err != nil {
		return nil, err
	}
	if json.Unmarshal(b, sc) != nil { // the error could show what is secret
		return nil, fmt.Errorf("settings of scope %s in the store cannot be read", id)
	}
	return sc, nil
}

func (t *tx) Scope(id string) (*registration.Scope, error) {
	return t.scanScope(t.row(t.st.scope, id))
}

func (t *tx) ScopeByName(name string) (*registration.Scope, error) {
	return t.scanScope(t.row(t.st.scopeByName, dps.Fold(name)))
}

func (t *tx) Scopes(after string, limit int) ([]*registration.Scope, error) {
	return each(t, t.scanScope, t.st.scopes, after, limit)
}

func (t *tx) PutScope(sc *registration.Scope) error {
	id := dps.Fold(sc.ID)
	var owner string
	switch err := t.row(t.st.nameOwner, dps.Fold(sc.Name)).Scan(&owner); {
	case err == nil && owner != id:
		return registration.ErrConflict
	case err != nil && !errors.Is(err, sql.ErrNoRows):
		return err
	}
	plain, err := json.Marshal(sc)
	if err != nil {
		return err
	}
	var n int64
	sealed := t.seal(plain, id, "scope")
	if sc.Version == 0 {
		n, err = t.exec(t.st.insertScope, id, dps.Fold(sc.Name), sealed)
	} else {
		n, err = t.exec(t.st.updateScope, id, dps.Fold(sc.Name), sealed, sc.Version)
	}
	if err == nil && n == 0 {
		return registration.ErrConflict
	}
	return err
}

func (t *tx) EraseScope(id string, limit int) (bool, error) {
	for _, st := range t.st.erase {
		n, err := t.exec(st, id, limit)
		if err != nil || n > 0 {
			return false, err
		}
	}
	_, err := t.exec(t.st.eraseScope, id)
	return err == nil, err
}

// outlasts reports whether a scope keeps a table when it is emptied.
func outlasts(table string) bool {
	return table == "policies" || table == "secrets" || table == "usage"
}

func (t *tx) EmptyScope(id string, limit int) (bool, error) {
	for i, st := range t.st.erase {
		if outlasts(scopeTables[i][0]) {
			continue
		}
		if n, err := t.exec(st, id, limit); err != nil || n > 0 {
			return false, err
		}
	}
	_, err := t.exec(t.st.bumpRevision, id)
	if err == nil {
		_, err = t.exec(t.st.putDeletedGroup, id, "")
	}
	return err == nil, err
}

func (t *tx) PutAudit(scope string, a *registration.Audit) error {
	body, err := json.Marshal(a)
	if err != nil {
		return err
	}
	n, err := t.exec(t.st.putAudit, scope, a.ID, body)
	if err == nil && n == 0 {
		err = fmt.Errorf("scope %s was deleted: %w", scope, registration.ErrNotFound)
	}
	return err
}

func (t *tx) Audits(scope, after string, limit int) ([]*registration.Audit, error) {
	return each(t, func(row scanner) (*registration.Audit, error) {
		var body []byte
		a := &registration.Audit{}
		if err := row.Scan(&body); err != nil {
			return nil, err
		}
		return a, json.Unmarshal(body, a)
	}, t.st.audits, scope, after, limit)
}

func (t *tx) Policies(scope string) ([]*registration.Policy, error) {
	return each(t, func(row scanner) (*registration.Policy, error) { return t.scanPolicy(scope, row) }, t.st.policies, scope)
}

func (t *tx) DeletePolicy(scope, name string) error {
	n, err := t.exec(t.st.deletePolicy, scope, name)
	if err == nil && n == 0 {
		return registration.ErrNotFound
	}
	return err
}
