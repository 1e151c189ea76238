package ledger

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"time"
)

// A Grant is leave to make units: a production order, or a lease cut from one. What it says stands in its document, which the
// ledger keeps and does not read; what the ledger enforces stands in the fields.
type Grant struct {
	ID       string `json:"id"`
	Document []byte `json:"-"` // the signed order or lease
	Quantity int64  `json:"quantity"`
	Spent    int64  `json:"spent"`  // units made on it here, those given back taken off
	Leased   int64  `json:"leased"` // what leases cut from it may make, or made
	// Opens and Ends bound when units may be begun on it: from the one, before the other.
	Opens  time.Time `json:"opens"`
	Ends   time.Time `json:"ends"`
	Closed bool      `json:"closed"`
}

// Left returns how many units may still be made on the grant here.
func (g *Grant) Left() int64 { return g.Quantity - g.Spent - g.Leased }

// A Lease is a part of a grant that another station has.
type Lease struct {
	ID       string `json:"id"`
	Grant    string `json:"grant"`
	Document []byte `json:"-"`
	Quantity int64  `json:"quantity"`
	// Used is how many units its station made on it; -1 while it has not been returned.
	Used    int64  `json:"used"`
	Receipt []byte `json:"-"` // the signed return
}

// A GrantError says why no unit may be begun on a grant.
type GrantError struct {
	Grant Grant
	Want  int64 // how many were asked for
	Err   error // one of the errors below
}

// Why a grant does not serve.
var (
	ErrSpent      = errors.New("is spent")
	ErrNotOpen    = errors.New("is not valid yet")
	ErrExpired    = errors.New("has expired")
	ErrClosed     = errors.New("is closed")
	ErrNoGrant    = errors.New("is not in this ledger")
	ErrOtherGrant = errors.New("is in this ledger with another content")
)

// Error says what is wrong with the grant.
func (e *GrantError) Error() string {
	s := fmt.Sprintf("%s %v", e.Grant.ID, e.Err)
	switch {
	case errors.Is(e.Err, ErrSpent):
		s += fmt.Sprintf(": %d of %d are made, %d are leased, %d more were asked for", e.Grant.Spent, e.Grant.Quantity, e.Grant.Leased, e.Want)
	case errors.Is(e.Err, ErrNotOpen):
		s += ": from " + e.Grant.Opens.UTC().Format(time.RFC3339)
	case errors.Is(e.Err, ErrExpired):
		s += ": it ended on " + e.Grant.Ends.UTC().Format(time.RFC3339)
	}
	return s
}

// Unwrap returns why.
func (e *GrantError) Unwrap() error { return e.Err }

// data is what the log keeps of a grant.
func (g *Grant) data() []byte {
	b := binary.AppendVarint(nil, g.Quantity)
	b = binary.AppendVarint(b, g.Opens.UnixMilli())
	b = binary.AppendVarint(b, g.Ends.UnixMilli())
	sum := sha256.Sum256(g.Document)
	return append(b, sum[:]...)
}

// TakeGrant records a grant, or finds the one of its ID, which must be the same.
func (l *Ledger) TakeGrant(ctx context.Context, g Grant) (Grant, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if g.ID == "" || len(g.ID) > maxText || len(g.Document) == 0 || g.Quantity < 1 || !g.Ends.After(g.Opens) {
		return g, fmt.Errorf("grant %.60q: want an ID, a document, a quantity and a window of time", g.ID)
	}
	have, err := l.Grant(ctx, g.ID)
	if err == nil {
		if string(have.Document) != string(g.Document) {
			return have, &GrantError{Grant: have, Err: ErrOtherGrant}
		}
		return have, nil
	}
	if !errors.Is(err, ErrNoGrant) {
		return g, err
	}
	g.Spent, g.Leased, g.Closed = 0, 0, false
	return g, l.update(ctx, func(t *tx) error {
		idx, err := t.add(leaf{state: grantTaken, serial: g.ID, data: g.data()})
		if err != nil {
			return err
		}
		if _, err := t.ExecContext(ctx, `INSERT INTO documents (grant_id, document) VALUES ($1, $2)`, g.ID, g.Document); err != nil {
			return err
		}
		_, err = t.ExecContext(ctx, `INSERT INTO grants (id, quantity, spent, leased, opens, ends, closed, leaf) VALUES ($1, $2, 0, 0, $3, $4, 0, $5)`,
			g.ID, g.Quantity, g.Opens.UnixMilli(), g.Ends.UnixMilli(), idx)
		return err
	})
}

const grantColumns = `SELECT id, quantity, spent, leased, opens, ends, closed FROM grants `

// scanGrant reads a grant without its document.
func scanGrant(row interface{ Scan(...any) error }) (Grant, error) {
	var g Grant
	var opens, ends int64
	err := row.Scan(&g.ID, &g.Quantity, &g.Spent, &g.Leased, &opens, &ends, &g.Closed)
	g.Opens, g.Ends = time.UnixMilli(opens).UTC(), time.UnixMilli(ends).UTC()
	return g, err
}

// Grant returns a grant; the error is ErrNoGrant where there is none of that ID.
func (l *Ledger) Grant(ctx context.Context, id string) (Grant, error) {
	g, err := l.GrantCounts(ctx, id)
	if err == nil {
		err = l.db.QueryRowContext(ctx, `SELECT document FROM documents WHERE grant_id = $1`, id).Scan(&g.Document)
	}
	return g, err
}

// GrantCounts is Grant without the document, which may be large.
func (l *Ledger) GrantCounts(ctx context.Context, id string) (Grant, error) {
	g, err := scanGrant(l.db.QueryRowContext(ctx, grantColumns+`WHERE id = $1`, id))
	if errors.Is(err, sql.ErrNoRows) {
		return g, &GrantError{Grant: Grant{ID: id}, Err: ErrNoGrant}
	}
	return g, err
}

// Grants returns every grant, by its ID, without the documents.
func (l *Ledger) Grants(ctx context.Context) ([]Grant, error) {
	rows, err := l.db.QueryContext(ctx, grantColumns+`ORDER BY id`)
	if err != nil {
		return nil, err
	}
	var all []Grant
	for rows.Next() {
		g, err := scanGrant(rows)
		if err != nil {
			return nil, errors.Join(err, rows.Close())
		}
		all = append(all, g)
	}
	return all, rows.Err()
}

// CheckGrant says what keeps n units from being begun on a grant now, and returns it without its document. Commit asks again.
func (l *Ledger) CheckGrant(ctx context.Context, id string, n int64) (Grant, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	g, err := l.GrantCounts(ctx, id)
	if err != nil {
		return g, err
	}
	at, err := l.now()
	if err != nil {
		return g, err
	}
	return g, g.allow(at, n)
}

func (g *Grant) allow(at time.Time, n int64) error {
	var why error
	switch {
	case g.Closed:
		why = ErrClosed
	case at.Before(g.Opens):
		why = ErrNotOpen
	case !at.Before(g.Ends):
		why = ErrExpired
	case n > g.Left():
		why = ErrSpent
	default:
		return nil
	}
	return &GrantError{Grant: *g, Want: n, Err: why}
}

// spend books new units on the grants of their jobs, and has the step move the ledger's counter: nothing is signed, and no
// storage written, for a unit that its grant and the counter do not know of. It returns how many places each takes: one, or none
// where it has that of a reworked unit of its serial.
func (t *tx) spend(ctx context.Context, events []Event) ([]int64, error) {
	if err := t.move(ctx); err != nil {
		return nil, err
	}
	var any int
	if err := t.QueryRowContext(ctx, `SELECT EXISTS (SELECT 1 FROM retired)`).Scan(&any); err != nil {
		return nil, err
	}
	places := make([]int64, len(events))
	for i := 0; i < len(events); {
		id, err := t.grantOf(ctx, events[i].Job)
		if err != nil {
			return nil, err
		}
		first, booked := i, int64(0)
		for ; i < len(events) && events[i].Job == events[first].Job; i++ {
			if id == "" || any == 0 || !t.replaces(ctx, events[i].Serial, events[i].Job, math.MaxInt64) {
				places[i] = 1
				booked++
			}
		}
		if id != "" {
			if err := t.book(ctx, id, booked); err != nil {
				return nil, err
			}
		}
	}
	return places, nil
}

func (t *tx) book(ctx context.Context, id string, n int64) error {
	g, err := scanGrant(t.QueryRowContext(ctx, grantColumns+`WHERE id = $1`, id))
	if errors.Is(err, sql.ErrNoRows) {
		return &GrantError{Grant: Grant{ID: id}, Err: ErrNoGrant}
	}
	if err != nil {
		return err
	}
	if err := g.allow(t.at, n); err != nil {
		return err
	}
	_, err = t.ExecContext(ctx, `UPDATE grants SET spent = spent + $1 WHERE id = $2`, n, id)
	return err
}

func (t *tx) grantOf(ctx context.Context, job int64) (string, error) {
	if id, ok := t.l.grants[job]; ok {
		return id, nil
	}
	var id string
	err := t.QueryRowContext(ctx, `SELECT grant_id FROM jobs WHERE id = $1`, job).Scan(&id)
	if errors.Is(err, sql.ErrNoRows) {
		return "", fmt.Errorf("job %d is not in the ledger", job)
	}
	if err == nil {
		t.l.grants[job] = id
	}
	return id, err
}

// refund gives one unit back to the grant of its job.
func (t *tx) refund(ctx context.Context, job int64) error {
	id, err := t.grantOf(ctx, job)
	if err != nil || id == "" {
		return err
	}
	_, err = t.ExecContext(ctx, `UPDATE grants SET spent = spent - 1 WHERE id = $1`, id)
	return err
}

// CutLease books a lease on its grant, as far as that has units left. The same lease again changes nothing.
func (l *Ledger) CutLease(ctx context.Context, lease Lease) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if lease.ID == "" || len(lease.ID) > maxText || len(lease.Document) == 0 || lease.Quantity < 1 {
		return fmt.Errorf("lease %.60q: want an ID, a document and a quantity", lease.ID)
	}
	return l.update(ctx, func(t *tx) error {
		var document []byte
		err := t.QueryRowContext(ctx, `SELECT document FROM leases WHERE id = $1`, lease.ID).Scan(&document)
		if err == nil && string(document) == string(lease.Document) {
			return nil
		}
		if err == nil {
			return fmt.Errorf("lease %s: %w", lease.ID, ErrOtherGrant)
		}
		if !errors.Is(err, sql.ErrNoRows) {
			return err
		}
		if err := t.book(ctx, lease.Grant, lease.Quantity); err != nil {
			return err
		}
		if _, err := t.ExecContext(ctx, `UPDATE grants SET spent = spent - $1, leased = leased + $1 WHERE id = $2`, lease.Quantity, lease.Grant); err != nil {
			return err
		}
		sum := sha256.Sum256(lease.Document)
		idx, err := t.add(leaf{state: leaseCut, serial: lease.ID, registrationID: lease.Grant, keyHash: sum[:], data: binary.AppendVarint(nil, lease.Quantity)})
		if err != nil {
			return err
		}
		if err := t.move(ctx); err != nil { // a copied ledger cuts no leases
			return err
		}
		_, err = t.ExecContext(ctx, `INSERT INTO leases (id, grant_id, document, quantity, used, receipt, leaf) VALUES ($1, $2, $3, $4, -1, x'', $5)`,
			lease.ID, lease.Grant, lease.Document, lease.Quantity, idx)
		return err
	})
}

// ReturnLease gives what a lease did not use back to its grant. A lease is returned once; the same return again changes
// nothing.
func (l *Ledger) ReturnLease(ctx context.Context, id string, used int64, receipt []byte) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.update(ctx, func(t *tx) error {
		var grant string
		var quantity, was int64
		var have []byte
		err := t.QueryRowContext(ctx, `SELECT grant_id, quantity, used, receipt FROM leases WHERE id = $1`, id).Scan(&grant, &quantity, &was, &have)
		if errors.Is(err, sql.ErrNoRows) {
			return fmt.Errorf("lease %s %w", id, ErrNoGrant)
		}
		if err != nil {
			return err
		}
		if was >= 0 {
			if was == used && string(have) == string(receipt) {
				return nil
			}
			return fmt.Errorf("lease %s was returned already, with %d units made", id, was)
		}
		if used < 0 || used > quantity {
			return fmt.Errorf("lease %s: %d of %d units are said to be made", id, used, quantity)
		}
		sum := sha256.Sum256(receipt)
		if _, err := t.add(leaf{state: leaseReturned, serial: id, registrationID: grant, keyHash: sum[:], data: binary.AppendVarint(nil, used)}); err != nil {
			return err
		}
		if _, err := t.ExecContext(ctx, `UPDATE leases SET used = $1, receipt = $2 WHERE id = $3`, used, receipt, id); err != nil {
			return err
		}
		_, err = t.ExecContext(ctx, `UPDATE grants SET leased = leased - $1 WHERE id = $2`, quantity-used, grant)
		return err
	})
}

// Leases returns the leases that were cut from a grant.
func (l *Ledger) Leases(ctx context.Context, grant string) ([]Lease, error) {
	rows, err := l.db.QueryContext(ctx, `SELECT id, grant_id, document, quantity, used, receipt FROM leases WHERE grant_id = $1 ORDER BY id`, grant)
	if err != nil {
		return nil, err
	}
	var all []Lease
	for rows.Next() {
		var s Lease
		if err := rows.Scan(&s.ID, &s.Grant, &s.Document, &s.Quantity, &s.Used, &s.Receipt); err != nil {
			return nil, errors.Join(err, rows.Close())
		}
		all = append(all, s)
	}
	return all, rows.Err()
}

// CloseGrant ends a grant: nothing is begun on it any more. Closing again changes nothing.
func (l *Ledger) CloseGrant(ctx context.Context, id string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.update(ctx, func(t *tx) error {
		res, err := t.ExecContext(ctx, `UPDATE grants SET closed = 1 WHERE id = $1 AND closed = 0`, id)
		if err != nil {
			return err
		}
		if n, err := res.RowsAffected(); err != nil || n == 0 {
			if _, gerr := scanGrant(t.QueryRowContext(ctx, grantColumns+`WHERE id = $1`, id)); errors.Is(gerr, sql.ErrNoRows) {
				return &GrantError{Grant: Grant{ID: id}, Err: ErrNoGrant}
			}
			return err // closed already
		}
		if _, err := t.add(leaf{state: grantClosed, serial: id}); err != nil {
			return err
		}
		return t.move(ctx) // or a copy from before would go on
	})
}

// GrantUnits counts what became of the units of a grant: the living by state, and the retired.
func (l *Ledger) GrantUnits(ctx context.Context, id string) (map[State]int64, error) {
	counts := make(map[State]int64)
	for _, table := range []string{"units", "retired"} {
		rows, err := l.db.QueryContext(ctx, `SELECT state, count(*) FROM `+table+` WHERE job IN (SELECT id FROM jobs WHERE grant_id = $1) GROUP BY state`, id)
		if err != nil {
			return nil, err
		}
		for rows.Next() {
			var s, n int64
			if err := rows.Scan(&s, &n); err != nil {
				return nil, errors.Join(err, rows.Close())
			}
			counts[State(s)] += n
		}
		if err := rows.Err(); err != nil {
			return nil, err
		}
	}
	return counts, nil
}

// A Note is something that happened at the station beside the making of units: a shift began, a label was printed again.
type Note struct {
	Unit int64 // the unit that it is about, or 0
	Kind string
	At   time.Time
	Data []byte
}

// AddNote writes a note down and returns how many of its kind its unit has now.
func (l *Ledger) AddNote(ctx context.Context, n Note) (count int64, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if n.Kind == "" || len(n.Kind) > maxText {
		return 0, errors.New("a note needs a kind")
	}
	if n.Data == nil {
		n.Data = []byte{}
	}
	err = l.update(ctx, func(t *tx) error {
		idx, err := t.add(leaf{state: noted, unit: n.Unit, registrationID: n.Kind, data: n.Data})
		if err != nil {
			return err
		}
		if _, err := t.ExecContext(ctx, `INSERT INTO notes (leaf, unit, kind, at, data) VALUES ($1, $2, $3, $4, $5)`, idx, n.Unit, n.Kind, t.at.UnixMilli(), n.Data); err != nil {
			return err
		}
		return t.QueryRowContext(ctx, `SELECT count(*) FROM notes WHERE unit = $1 AND kind = $2`, n.Unit, n.Kind).Scan(&count)
	})
	return count, err
}

// Notes returns the notes of a unit, or of none with 0, oldest first; an empty kind means all.
func (l *Ledger) Notes(ctx context.Context, unit int64, kind string) ([]Note, error) {
	rows, err := l.db.QueryContext(ctx, `SELECT unit, kind, at, data FROM notes WHERE unit = $1 AND ($2 = '' OR kind = $2) ORDER BY leaf`, unit, kind)
	if err != nil {
		return nil, err
	}
	var all []Note
	for rows.Next() {
		var n Note
		var at int64
		if err := rows.Scan(&n.Unit, &n.Kind, &at, &n.Data); err != nil {
			return nil, errors.Join(err, rows.Close())
		}
		n.At = time.UnixMilli(at).UTC()
		all = append(all, n)
	}
	return all, rows.Err()
}
