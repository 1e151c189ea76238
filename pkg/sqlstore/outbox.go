package sqlstore

import (
	"database/sql"
	"encoding/json"
	"fmt"
	"time"

	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
)

// outboxStatements are those of what hubs have yet to be told.
type outboxStatements struct {
	task, tasks, dueTasks, insertTask, updateTask, deleteTask *sql.Stmt
	putOrphan, deleteOrphan, orphans                          *sql.Stmt
	putKin, deleteKin, kin, children, putEdge, edge           *sql.Stmt
}

func (st *outboxStatements) all() []statement {
	const taskColumns = `SELECT scope, id, version, due, owner, hub, body FROM outbox `
	return []statement{
		{&st.task, taskColumns + `WHERE scope = $1 AND id = $2`},
		{&st.tasks, taskColumns + `WHERE scope = $1 AND id > $2 ORDER BY id LIMIT $3`},
		{&st.dueTasks, `SELECT scope, id, version, due, owner, hub FROM (SELECT scope, id, version, due, owner, hub,
			ROW_NUMBER() OVER (PARTITION BY scope, hub ORDER BY due) AS place FROM outbox WHERE due <= $1) AS waiting WHERE place <= $2 ORDER BY due LIMIT $3`},
		{&st.insertTask, `INSERT INTO outbox (scope, id, version, due, owner, hub, body) VALUES ($1, $2, 1, $3, $4, $5, $6) ON CONFLICT (scope, id) DO NOTHING`},
		{&st.updateTask, `UPDATE outbox SET version = version + 1, due = $3, owner = $4, hub = $5, body = $6 WHERE scope = $1 AND id = $2 AND version = $7`},
		{&st.deleteTask, `DELETE FROM outbox WHERE scope = $1 AND id = $2 AND version = $3`},
		{&st.putOrphan, `INSERT INTO orphans (scope, id, hub, device_id, body) VALUES ($1, $2, $3, $4, $5)
			ON CONFLICT (scope, id, hub, device_id) DO UPDATE SET body = excluded.body`},
		{&st.deleteOrphan, `DELETE FROM orphans WHERE scope = $1 AND id = $2 AND hub = $3 AND device_id = $4`},
		{&st.orphans, `SELECT body FROM orphans WHERE scope = $1 AND (id, hub, device_id) > ($2, $3, $4) ORDER BY id, hub, device_id LIMIT $5`},
		{&st.putKin, `INSERT INTO kin (scope, id, parent, body) VALUES ($1, $2, $3, $4)
			ON CONFLICT (scope, id) DO UPDATE SET parent = excluded.parent, body = excluded.body`},
		{&st.deleteKin, `DELETE FROM kin WHERE scope = $1 AND id = $2`},
		{&st.kin, `SELECT id, parent, body FROM kin WHERE scope = $1 AND id = $2`},
		{&st.children, `SELECT id, parent, body FROM kin WHERE scope = $1 AND parent = $2 AND id > $3 ORDER BY id LIMIT $4`},
		{&st.putEdge, `INSERT INTO edges (scope, name, id) VALUES ($1, $2, $3) ON CONFLICT (scope, name) DO UPDATE SET id = excluded.id`},
		{&st.edge, `SELECT id FROM edges WHERE scope = $1 AND name = $2`},
	}
}

func (t *tx) scanTask(row scanner) (*registration.Task, error) {
	k := &registration.Task{}
	var due int64
	var sealed []byte
	if err := row.Scan(&k.Scope, &k.ID, &k.Version, &due, &k.Owner, &k.Hub, &sealed); err != nil {
		return nil, absent(err)
	}
	k.Due = time.UnixMilli(due)
	body, err := t.unseal(sealed, k.Scope, "task", k.ID)
	if err != nil {
		return nil, err
	}
	defer clear(body)
	if json.Unmarshal(body, k) != nil {
		return nil, fmt.Errorf("task of %q in the store cannot be read", k.ID) // its text stays out of the error
	}
	return k, nil
}

func (t *tx) Task(scope, id string) (*registration.Task, error) {
	return t.scanTask(t.row(t.st.task, scope, id))
}

func (t *tx) Tasks(scope, after string, limit int) ([]*registration.Task, error) {
	return each(t, t.scanTask, t.st.tasks, scope, after, limit)
}

func (t *tx) DueTasks(now time.Time, perHub, limit int) ([]*registration.Task, error) {
	return each(t, func(row scanner) (*registration.Task, error) {
		k := &registration.Task{}
		var due int64
		err := row.Scan(&k.Scope, &k.ID, &k.Version, &due, &k.Owner, &k.Hub)
		k.Due = time.UnixMilli(due)
		return k, err
	}, t.st.dueTasks, now.UnixMilli(), perHub, limit)
}

func (t *tx) PutTask(scope string, k *registration.Task) error {
	body, err := json.Marshal(k)
	if err != nil {
		return err
	}
	defer clear(body)
	sealed := t.seal(body, scope, "task", k.ID)
	if k.Version == 0 {
		err = t.ifChanged(t.st.insertTask, scope, k.ID, k.Due.UnixMilli(), k.Owner, k.Hub, sealed)
	} else {
		err = t.ifChanged(t.st.updateTask, scope, k.ID, k.Due.UnixMilli(), k.Owner, k.Hub, sealed, k.Version)
	}
	if err == nil {
		k.Version++
	}
	return err
}

func (t *tx) DeleteTask(scope string, k *registration.Task) error {
	return t.ifChanged(t.st.deleteTask, scope, k.ID, k.Version)
}

// ifChanged runs a statement that changes one row of one version; ErrConflict when it changed none.
func (t *tx) ifChanged(st *sql.Stmt, args ...any) error {
	dirty := t.dirty
	n, err := t.exec(st, args...)
	if err == nil && n == 0 {
		t.dirty, err = dirty, registration.ErrConflict
	}
	return err
}

func (t *tx) PutOrphan(scope string, o *registration.Orphan) error {
	body, err := json.Marshal(o)
	if err == nil {
		_, err = t.exec(t.st.putOrphan, scope, o.ID, dps.Fold(o.Hub), o.DeviceID, body)
	}
	return err
}

func (t *tx) DeleteOrphan(scope string, o *registration.Orphan) error {
	n, err := t.exec(t.st.deleteOrphan, scope, o.ID, dps.Fold(o.Hub), o.DeviceID)
	if err == nil && n == 0 {
		err = registration.ErrNotFound
	}
	return err
}

func (t *tx) Orphans(scope string, after registration.Orphan, limit int) ([]*registration.Orphan, error) {
	return each(t, func(row scanner) (*registration.Orphan, error) {
		var body []byte
		o := &registration.Orphan{}
		if err := row.Scan(&body); err != nil {
			return nil, err
		}
		return o, json.Unmarshal(body, o)
	}, t.st.orphans, scope, after.ID, dps.Fold(after.Hub), after.DeviceID, limit)
}

func (t *tx) PutKin(scope string, k *registration.Kin) error {
	body, err := json.Marshal(k)
	if err != nil {
		return err
	}
	defer clear(body)
	_, err = t.exec(t.st.putKin, scope, k.ID, k.Parent, t.seal(body, scope, "kin", k.ID))
	return err
}

func (t *tx) DeleteKin(scope, id string) error {
	_, err := t.exec(t.st.deleteKin, scope, id)
	return err
}

func (t *tx) scanKin(scope string, row scanner) (*registration.Kin, error) {
	k := &registration.Kin{}
	var sealed []byte
	if err := row.Scan(&k.ID, &k.Parent, &sealed); err != nil {
		return nil, absent(err)
	}
	body, err := t.unseal(sealed, scope, "kin", k.ID)
	if err != nil {
		return nil, err
	}
	defer clear(body)
	if json.Unmarshal(body, k) != nil {
		return nil, fmt.Errorf("kin of %q in the store cannot be read", k.ID)
	}
	return k, nil
}

func (t *tx) Kin(scope, id string) (*registration.Kin, error) {
	return t.scanKin(scope, t.row(t.st.kin, scope, id))
}

func (t *tx) Children(scope, parent, after string, limit int) ([]*registration.Kin, error) {
	return each(t, func(row scanner) (*registration.Kin, error) { return t.scanKin(scope, row) }, t.st.children, scope, parent, after, limit)
}

func (t *tx) PutEdge(scope, name, id string) error {
	_, err := t.exec(t.st.putEdge, scope, name, id)
	return err
}

func (t *tx) Edge(scope, name string) (id string, err error) {
	err = absent(t.row(t.st.edge, scope, name).Scan(&id))
	return id, err
}
