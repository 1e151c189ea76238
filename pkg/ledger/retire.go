package ledger

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"math"
	"time"
)

// ErrScrapped says that a serial belongs to a unit that was scrapped.
var ErrScrapped = errors.New("the unit was scrapped")

// An Ending is why a unit ended: what an [Event] that voids, scraps, reworks or returns one carries as its data.
type Ending struct {
	Reason   string `json:"reason"`
	Operator string `json:"operator,omitempty"`
	Note     string `json:"note,omitempty"`
	// Certificate is the serial number, in hex, of the certificate that is revoked by the ending; empty where there is none.
	Certificate string `json:"certificate,omitempty"`
	// Proof is the SHA-256, in hex, of the signed document that permits a return.
	Proof string `json:"proof,omitempty"`
}

// Encode returns the ending as an event carries it.
func (e Ending) Encode() []byte {
	b, _ := json.Marshal(e) // strings always marshal
	return b
}

// A RetiredUnit is a unit that ended.
type RetiredUnit struct {
	Unit                // State is what ended it, Data the log's entry of its identity
	Was       State     `json:"was"` // the state that it had
	Ended     time.Time `json:"ended"`
	EndedLeaf int64     `json:"endedEntry"`
	Ending    Ending    `json:"ending"`
}

// neverRetired refuses keys that a unit which ended had. There are few of those, mostly none.
func (t *tx) neverRetired(ctx context.Context, events []Event) error {
	var any int
	if err := t.QueryRowContext(ctx, `SELECT EXISTS (SELECT 1 FROM retired)`).Scan(&any); err != nil || any == 0 {
		return err
	}
	for i := range events {
		if events[i].KeyHash == nil {
			continue
		}
		var state int64
		err := t.QueryRowContext(ctx, `SELECT state FROM retired WHERE key_hash = $1`, events[i].KeyHash).Scan(&state)
		if err == nil {
			return fmt.Errorf("serial %s: its key belonged to a unit that was %s and must not be used again", events[i].Serial, State(state))
		}
		if !errors.Is(err, sql.ErrNoRows) {
			return err
		}
	}
	return nil
}

// revise gives new units their revisions, and refuses the serials of scrapped ones.
func (t *tx) revise(ctx context.Context, events []Event) error {
	var any int
	if err := t.QueryRowContext(ctx, `SELECT EXISTS (SELECT 1 FROM retired)`).Scan(&any); err != nil {
		return err
	}
	for i := range events {
		events[i].Revision = 0
		if any == 0 {
			continue
		}
		var state, revision int64
		err := t.QueryRowContext(ctx, `SELECT state, revision FROM retired WHERE serial = $1 ORDER BY id DESC LIMIT 1`, events[i].Serial).Scan(&state, &revision)
		switch {
		case errors.Is(err, sql.ErrNoRows):
		case err != nil:
			return err
		case State(state) == Scrapped:
			return fmt.Errorf("serial %s: %w", events[i].Serial, ErrScrapped)
		case State(state) == Voided:
			events[i].Revision = revision // nobody outside ever heard of it
		default:
			events[i].Revision = revision + 1
		}
	}
	return nil
}

// end moves a living unit among the retired ones, or a scrapped one on to returned. What it gives back to its grant: a unit
// that was voided before anything was signed for it, and a returned one. A reworked one gives nothing back: its serial keeps its
// place on the grant, and the next revision takes that ([tx.spend]).
func (t *tx) end(ctx context.Context, e Event) error {
	if e.State == Returned {
		return t.giveBack(ctx, e)
	}
	last := Exported
	if e.State == Voided {
		last = Sealed // what left the factory is scrapped or reworked
	}
	var u Unit
	var folded string
	var spelling sql.NullString
	var at, state int64
	err := t.QueryRowContext(ctx, `DELETE FROM units WHERE id = $1 AND state <= $2
		RETURNING serial, registration_id, spelling, key_hash, state, job, at, leaf, revision`, e.Unit, int64(last)).
		Scan(&u.Serial, &folded, &spelling, &u.KeyHash, &state, &u.Job, &at, &u.Leaf, &u.Revision)
	if errors.Is(err, sql.ErrNoRows) {
		return fmt.Errorf("unit %d is not there or has left the factory: it cannot be %s", e.Unit, e.State)
	}
	if err != nil {
		return err
	}
	u.RegistrationID = folded
	if spelling.Valid {
		u.RegistrationID = spelling.String
	}
	var ek []byte
	if e.State != Scrapped {
		// The device still has its TPM, and begins anew with it. A scrapped one's never comes back.
		err := t.QueryRowContext(ctx, `DELETE FROM endorsements WHERE unit = $1 RETURNING ek_hash`, e.Unit).Scan(&ek)
		if err != nil && !errors.Is(err, sql.ErrNoRows) {
			return err
		}
	}
	if string(ek) == string(u.KeyHash) {
		u.KeyHash = nil // the key is the TPM's own, and stays with the device
	}
	idx, err := t.add(leaf{state: e.State, unit: e.Unit, count: 1, revision: u.Revision, serial: u.Serial, registrationID: u.RegistrationID,
		keyHash: u.KeyHash, ekHash: ek, data: e.Data})
	if err != nil {
		return err
	}
	var hash any
	if u.KeyHash != nil {
		hash = u.KeyHash
	}
	if _, err := t.ExecContext(ctx, `INSERT INTO retired (id, serial, registration_id, key_hash, spelling, state, job, at, leaf, revision, was, ending)
		VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)`,
		e.Unit, u.Serial, folded, hash, spelling, int64(e.State), u.Job, at, u.Leaf, u.Revision, state, idx); err != nil {
		return err
	}
	if e.State == Voided && State(state) == Begun && !t.replaces(ctx, u.Serial, u.Job, e.Unit) {
		return t.refund(ctx, u.Job)
	}
	return nil
}

// replaces reports whether a unit has the place of a reworked one of its serial: made on the same grant, that one's last.
func (t *tx) replaces(ctx context.Context, serial string, job, before int64) bool {
	grant, err := t.grantOf(ctx, job)
	if err != nil {
		return false
	}
	return replaces(t.QueryRowContext(ctx, lastEnding, serial, before, int64(Voided), int64(Begun)), grant)
}

// lastEnding finds what became of the last unit of a serial, before a unit, that anything was signed for, and its grant.
const lastEnding = `SELECT state, (SELECT grant_id FROM jobs WHERE id = job) FROM retired
	WHERE serial = $1 AND id < $2 AND NOT (state = $3 AND was = $4) ORDER BY id DESC LIMIT 1`

func replaces(last *sql.Row, grant string) bool {
	var state int64
	var was string
	err := last.Scan(&state, &was)
	return err == nil && State(state) == Reworked && was == grant
}

// Places returns how many places on a grant new units of these serials take: one each, but none for the next revision of a unit that
// was reworked there.
func (l *Ledger) Places(ctx context.Context, grant string, serials ...string) (n int64, err error) {
	var any int
	if err := l.db.QueryRowContext(ctx, `SELECT EXISTS (SELECT 1 FROM retired)`).Scan(&any); err != nil || any == 0 {
		return int64(len(serials)), err
	}
	for _, serial := range serials {
		if !replaces(l.db.QueryRowContext(ctx, lastEnding, serial, int64(math.MaxInt64), int64(Voided), int64(Begun)), grant) {
			n++
		}
	}
	return n, nil
}

func (t *tx) giveBack(ctx context.Context, e Event) error {
	// The leaf is known before it is added: it is the next one.
	var job, revision int64
	var serial, rid string
	err := t.QueryRowContext(ctx, `UPDATE retired SET state = $1, ending = $2 WHERE id = $3 AND state = $4
		RETURNING job, revision, serial, coalesce(spelling, registration_id)`,
		int64(Returned), t.first+t.count, e.Unit, int64(Scrapped)).Scan(&job, &revision, &serial, &rid)
	if errors.Is(err, sql.ErrNoRows) {
		return fmt.Errorf("unit %d is not a scrapped one: it cannot be returned", e.Unit)
	}
	if err != nil {
		return err
	}
	if _, err := t.add(leaf{state: Returned, unit: e.Unit, count: 1, revision: revision, serial: serial, registrationID: rid, data: e.Data}); err != nil {
		return err
	}
	return t.refund(ctx, job)
}

const retiredColumns = `SELECT id, serial, coalesce(spelling, registration_id), key_hash, state, job, at, leaf, revision, was, ending FROM retired WHERE `

// Retired yields the units that ended, in the order in which they were begun, with the reasons and with the data of their
// identities. An empty serial means all.
func (l *Ledger) Retired(ctx context.Context, serial string) iter.Seq2[RetiredUnit, error] {
	return l.retired(ctx, `($2 = '' OR serial = $2)`, serial, true)
}

// Unnoted is Retired for those that have no note of a kind: what is left to be done about an ending costs nothing once it is done.
func (l *Ledger) Unnoted(ctx context.Context, kind string) iter.Seq2[RetiredUnit, error] {
	return l.retired(ctx, `NOT EXISTS (SELECT 1 FROM notes WHERE unit = id AND kind = $2)`, kind, true)
}

// Endings is Retired for all, without the data of the identities, which costs the reading of an entry each.
func (l *Ledger) Endings(ctx context.Context) iter.Seq2[RetiredUnit, error] {
	return l.retired(ctx, `$2 = ''`, "", false)
}

// retired yields those that a condition on $2 names.
func (l *Ledger) retired(ctx context.Context, where, arg string, whole bool) iter.Seq2[RetiredUnit, error] {
	return func(yield func(RetiredUnit, error) bool) {
		const page = 500
		for last := int64(0); ; {
			rows, err := l.db.QueryContext(ctx, retiredColumns+`id > $1 AND `+where+` ORDER BY id LIMIT $3`, last, arg, page)
			if err != nil {
				yield(RetiredUnit{}, err)
				return
			}
			var units []RetiredUnit
			for rows.Next() {
				var u RetiredUnit
				var at, state, was int64
				if err := rows.Scan(&u.ID, &u.Serial, &u.RegistrationID, &u.KeyHash, &state, &u.Job, &at, &u.Leaf, &u.Revision, &was, &u.EndedLeaf); err != nil {
					yield(u, errors.Join(err, rows.Close()))
					return
				}
				u.State, u.Was, u.At = State(state), State(was), time.UnixMilli(at).UTC()
				units = append(units, u)
			}
			if err := rows.Err(); err != nil {
				yield(RetiredUnit{}, err)
				return
			}
			for i := range units {
				u := &units[i]
				if err := l.tell(ctx, u, whole); err != nil {
					yield(*u, err)
					return
				}
				if !yield(*u, nil) {
					return
				}
				last = u.ID
			}
			if len(units) < page {
				return
			}
		}
	}
}

// tell reads why a unit ended, and with whole the data of its identity.
func (l *Ledger) tell(ctx context.Context, u *RetiredUnit, whole bool) error {
	if whole {
		if err := l.Fill(ctx, &u.Unit); err != nil {
			return err
		}
	}
	ending := Unit{ID: u.ID, Serial: u.Serial, Leaf: u.EndedLeaf}
	at, err := l.fill(ctx, &ending)
	if err != nil {
		return err
	}
	u.Ended = at
	if len(ending.Data) > 0 && json.Unmarshal(ending.Data, &u.Ending) != nil {
		u.Ending = Ending{Reason: "other", Note: string(ending.Data)} // as somebody else's program wrote it
	}
	return nil
}
