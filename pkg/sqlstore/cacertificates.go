package sqlstore

import (
	"database/sql"
	"encoding/json"

	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
)

// caStatements are those of the certificates of scopes.
type caStatements struct {
	caCertificate, caCertificates, putCACertificate, deleteCACertificate *sql.Stmt
	byReference, putReference, deleteReferences                          *sql.Stmt
}

func (st *caStatements) all() []statement {
	return []statement{
		{&st.caCertificate, `SELECT body FROM ca_certificates WHERE scope = $1 AND name = $2`},
		{&st.caCertificates, `SELECT body FROM ca_certificates WHERE scope = $1 ORDER BY name`},
		{&st.putCACertificate, `INSERT INTO ca_certificates (scope, name, body) VALUES ($1, $2, $3) ON CONFLICT (scope, name) DO UPDATE SET body = excluded.body`},
		{&st.deleteCACertificate, `DELETE FROM ca_certificates WHERE scope = $1 AND name = $2`},
		{&st.byReference, `SELECT id FROM ca_references WHERE scope = $1 AND name = $2 ORDER BY id`},
		{&st.putReference, `INSERT INTO ca_references (scope, name, id) VALUES ($1, $2, $3)`},
		{&st.deleteReferences, `DELETE FROM ca_references WHERE scope = $1 AND id = $2`},
	}
}

func scanCACertificate(row scanner) (*registration.CACertificate, error) {
	var body []byte
	c := &registration.CACertificate{}
	if err := row.Scan(&body); err != nil {
		return nil, absent(err)
	}
	return c, json.Unmarshal(body, c)
}

func (t *tx) CACertificate(scope, name string) (*registration.CACertificate, error) {
	return scanCACertificate(t.row(t.st.caCertificate, scope, name))
}

func (t *tx) CACertificates(scope string) ([]*registration.CACertificate, error) {
	return each(t, scanCACertificate, t.st.caCertificates, scope)
}

func (t *tx) PutCACertificate(scope string, c *registration.CACertificate) error {
	body, err := json.Marshal(c)
	if err != nil {
		return err
	}
	if _, err := t.exec(t.st.putCACertificate, scope, dps.Fold(c.Name), body); err != nil {
		return err
	}
	_, err = t.exec(t.st.bumpRevision, scope)
	return err
}

func (t *tx) DeleteCACertificate(scope, name string) error {
	n, err := t.exec(t.st.deleteCACertificate, scope, name)
	if err != nil {
		return err
	}
	if n == 0 {
		return registration.ErrNotFound
	}
	_, err = t.exec(t.st.bumpRevision, scope)
	return err
}

func (t *tx) GroupsByReference(scope, name string) (all []*registration.Record, err error) {
	ids, err := each(t, scanText, t.st.byReference, scope, name)
	for _, id := range ids {
		r, err := t.Record(scope, registration.Group, id)
		if err != nil {
			return nil, err
		}
		all = append(all, r)
	}
	return all, err
}

// putReferences keeps which certificates a group refers to.
func (t *tx) putReferences(scope, id string, names []string) error {
	if _, err := t.exec(t.st.deleteReferences, scope, id); err != nil {
		return err
	}
	for _, name := range names {
		if _, err := t.exec(t.st.putReference, scope, name, id); err != nil {
			return err
		}
	}
	return nil
}
