package sqlstore

import (
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/touchmark/touchmark/pkg/registration"
)

// meterStatements are those of what is counted, and of the log of attempts.
type meterStatements struct {
	addUsage, usage                                                                     *sql.Stmt
	attempts, attemptByTracking, putAttempt, deleteAttempt, oldestAttempt, trimAttempts *sql.Stmt
	counts                                                                              [len(countedTables)]*sql.Stmt
}

// countedTables say where what is counted is.
var countedTables = [...]struct {
	what registration.Counted
	rows string
}{
	{registration.CountEnrollments, `records WHERE scope = $1 AND kind = 'individual'`},
	{registration.CountX509Groups, `records WHERE scope = $1 AND kind = 'group' AND "symmetric" = 0`},
	{registration.CountSymmetricGroups, `records WHERE scope = $1 AND kind = 'group' AND "symmetric" = 1`},
	{registration.CountRegistrations, `registrations WHERE scope = $1`},
	{registration.CountTasks, `outbox WHERE scope = $1`},
}

const attemptColumns = `SELECT id, class, body FROM attempts `

func (st *meterStatements) all() []statement {
	all := []statement{
		{&st.addUsage, `INSERT INTO usage (scope, day, api, operation, result, calls) VALUES ($1, $2, $3, $4, $5, $6)
			ON CONFLICT (scope, day, api, operation, result) DO UPDATE SET calls = usage.calls + excluded.calls`},
		{&st.usage, `SELECT day, api, operation, result, calls FROM usage WHERE scope = $1 AND day >= $2 AND day <= $3 ORDER BY day, api, operation, result`},
		{&st.attempts, attemptColumns + `WHERE scope = $1 AND device = $2 ORDER BY id DESC`},
		{&st.attemptByTracking, attemptColumns + `WHERE scope = $1 AND tracking = $2 AND tracking <> '' ORDER BY id DESC LIMIT 1`},
		{&st.putAttempt, `INSERT INTO attempts (scope, device, id, class, tracking, body) VALUES ($1, $2, $3, $4, $5, $6)`},
		{&st.deleteAttempt, `DELETE FROM attempts WHERE scope = $1 AND device = $2 AND id = $3`},
		{&st.oldestAttempt, `SELECT id FROM attempts WHERE scope = $1 AND class = $2 ORDER BY id DESC LIMIT 1 OFFSET $3`},
		{&st.trimAttempts, `DELETE FROM attempts WHERE scope = $1 AND (device, id) IN
			(SELECT device, id FROM attempts WHERE scope = $1 AND class = $2 AND id <= $3 ORDER BY id LIMIT $4)`},
	}
	for i, c := range countedTables {
		all = append(all, statement{&st.counts[i], `SELECT COUNT(*) FROM (SELECT 1 FROM ` + c.rows + ` LIMIT $2) AS counted`})
	}
	return all
}

func (t *tx) Count(scope string, what registration.Counted, limit int64) (n int64, err error) {
	for i, c := range countedTables {
		if c.what == what {
			return n, t.row(t.st.counts[i], scope, limit).Scan(&n)
		}
	}
	return 0, fmt.Errorf("%q is not counted", what)
}

func (t *tx) AddUsage(scope string, u registration.Usage) error {
	_, err := t.exec(t.st.addUsage, scope, u.Day, u.API, u.Operation, u.Result, u.Calls)
	return err
}

func (t *tx) Usage(scope, from, to string) ([]registration.Usage, error) {
	return each(t, func(row scanner) (u registration.Usage, err error) {
		err = row.Scan(&u.Day, &u.API, &u.Operation, &u.Result, &u.Calls)
		return u, err
	}, t.st.usage, scope, from, to)
}

func scanAttempt(row scanner) (*registration.Attempt, error) {
	a := &registration.Attempt{}
	var id string
	var class int64
	var body []byte
	if err := row.Scan(&id, &class, &body); err != nil {
		return nil, absent(err)
	}
	err := json.Unmarshal(body, a)
	a.ID, a.Class = id, registration.AttemptClass(class)
	return a, err
}

func (t *tx) Attempts(scope, device string) ([]*registration.Attempt, error) {
	return each(t, scanAttempt, t.st.attempts, scope, device)
}

func (t *tx) AttemptByTracking(scope, trackingID string) (*registration.Attempt, error) {
	return scanAttempt(t.row(t.st.attemptByTracking, scope, trackingID))
}

func (t *tx) PutAttempt(scope, device string, a *registration.Attempt) error {
	body, err := json.Marshal(a)
	if err == nil {
		_, err = t.exec(t.st.putAttempt, scope, device, a.ID, int64(a.Class), a.TrackingID, body)
	}
	return err
}

func (t *tx) DeleteAttempt(scope, device, id string) error {
	_, err := t.exec(t.st.deleteAttempt, scope, device, id)
	return err
}

func (t *tx) TrimAttempts(scope string, class registration.AttemptClass, keep int, before string, limit int) (int64, error) {
	var oldest string
	if err := t.row(t.st.oldestAttempt, scope, int64(class), keep).Scan(&oldest); err != nil && !errors.Is(err, sql.ErrNoRows) {
		return 0, err
	}
	return t.exec(t.st.trimAttempts, scope, int64(class), max(oldest, before), limit)
}
