package registration

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/touchmark/touchmark/pkg/dps"
)

// Quotas are how much a scope may have, and how often it may be asked. Zero is no limit.
type Quotas struct {
	Enrollments     int64 // individual ones
	X509Groups      int64
	SymmetricGroups int64
	Registrations   int64
	Certificates    int64 // CA certificates that were uploaded
	Hubs            int

	ServiceCalls int // operations of the service API in a minute
	Registers    int // device registrations in a minute
	Polls        int // requests of one device for the status of an operation, in ten seconds
}

// QuotasOf returns the limits of a profile, and whether there is one of that name. "azure" are those of DPS (service API,
// section 4.11); "none" and "" have none.
func QuotasOf(profile string) (Quotas, bool) {
	switch profile {
	case "", "none":
		return Quotas{}, true
	case "azure":
		return Quotas{Enrollments: 1_000_000, X509Groups: 100, SymmetricGroups: 100, Registrations: 1_000_000, Certificates: 25, Hubs: 50,
			ServiceCalls: 1000, Registers: 1000, Polls: 5}, true
	}
	return Quotas{}, false
}

// Limits returns the quotas of a scope's profile.
func (s *Settings) Limits() Quotas {
	q, _ := QuotasOf(s.Quotas) // CheckScope lets no other name in
	return q
}

// Counted names what is counted, for quotas and for metrics.
type Counted string

// What is counted.
const (
	CountEnrollments     Counted = "enrollments"
	CountX509Groups      Counted = "X.509 groups"
	CountSymmetricGroups Counted = "symmetric-key groups"
	CountRegistrations   Counted = "registrations"
	CountTasks           Counted = "tasks" // that hubs have yet to be told
)

// Exceeds returns the refusal of what would be more than a quota, or nil. n is how many there are already.
func Exceeds(what Counted, n, quota int64) error {
	if quota <= 0 || n < quota {
		return nil
	}
	return dps.NewError(dps.CodeQuota, fmt.Sprintf("The quota of %d %s is used up", quota, what), nil)
}

// A quotaStore holds what its service writes against the quotas of the scope, in the transaction of the write. Scopes without
// quotas have the store's own transactions.
//
// There is no counter in the store: each creation would write one, and replicas would wait for one another at it. Rows are
// counted, and the count is good for a hundred times as long as counting took, with what is created here added. So a small count
// is exact, counting a million takes a hundredth of the time at most, and replicas together may exceed a quota by what they
// create in some seconds.
type quotaStore struct {
	Store
	s      *Service
	mu     sync.Mutex
	counts map[Counted]*count
}

type count struct {
	n     int64
	until time.Time
}

// countFor bounds for how long a count is good.
const countFor = 10 * time.Second

// Update implements [Store].
func (q *quotaStore) Update(ctx context.Context, f func(Tx) error) error {
	return q.Store.Update(ctx, func(tx Tx) error { return f(&quotaTx{Tx: tx, q: q}) })
}

type quotaTx struct {
	Tx
	q    *quotaStore
	read bool
	has  Quotas
}

// PutRecord implements [Tx].
func (t *quotaTx) PutRecord(scope string, r *Record) error {
	if err := t.readQuotas(scope); err != nil {
		return err
	}
	what, quota := CountEnrollments, t.has.Enrollments
	switch {
	case r.Kind == Group && r.Symmetric:
		what, quota = CountSymmetricGroups, t.has.SymmetricGroups
	case r.Kind == Group:
		what, quota = CountX509Groups, t.has.X509Groups
	}
	if quota > 0 {
		before, err := found(t.Record(scope, r.Kind, dps.Fold(r.ID)))
		if err == nil && before == nil {
			err = t.room(scope, what, quota, 1)
		}
		if err != nil {
			return err
		}
	}
	return t.Tx.PutRecord(scope, r)
}

// PutFresh implements [Tx].
func (t *quotaTx) PutFresh(scope string, records []*Record, devices []*Device) error {
	if err := t.readQuotas(scope); err != nil {
		return err
	}
	if quota := t.has.Enrollments; quota > 0 {
		if err := t.room(scope, CountEnrollments, quota, int64(len(records))); err != nil {
			return err
		}
	}
	return t.Tx.PutFresh(scope, records, devices)
}

// readQuotas reads the scope's quotas, once, and refuses to write to one that is being deleted.
func (t *quotaTx) readQuotas(scope string) error {
	if !t.read { // from the store: an operator who has just changed it must find it changed
		sc, err := found(t.Scope(scope))
		if err != nil {
			return err
		}
		if sc != nil && sc.Deleting {
			return because("scope", "the scope is being deleted, or erased")
		}
		if t.read = true; sc != nil {
			t.has = sc.Limits()
		} else {
			t.has = t.q.s.cfg.Settings.Limits()
		}
	}
	return nil
}

// PutAudit implements [Tx]. Whatever an operator changes comes by here: what is under way when the scope is deleted writes nothing
// any more, for nobody could erase it.
func (t *quotaTx) PutAudit(scope string, a *Audit) error {
	if err := t.readQuotas(scope); err != nil {
		return err
	}
	return t.Tx.PutAudit(scope, a)
}

// PutChallenge implements [Tx].
func (t *quotaTx) PutChallenge(scope string, c *PendingChallenge, now time.Time) error {
	if err := t.readQuotas(scope); err != nil {
		return err
	}
	return t.Tx.PutChallenge(scope, c, now)
}

// PutIssued implements [Tx].
func (t *quotaTx) PutIssued(scope string, c *Issued) error {
	if err := t.readQuotas(scope); err != nil {
		return err
	}
	return t.Tx.PutIssued(scope, c)
}

// PutGrant implements [Tx].
func (t *quotaTx) PutGrant(scope string, g *Grant) error {
	if err := t.readQuotas(scope); err != nil {
		return err
	}
	return t.Tx.PutGrant(scope, g)
}

// PutRegistration implements [Tx].
func (t *quotaTx) PutRegistration(scope string, r *Registration) error {
	if set := t.q.s.settings.Load(); set != nil && r.Version == 0 {
		if quota := set.Limits().Registrations; quota > 0 {
			if err := t.room(scope, CountRegistrations, quota, 1); err != nil {
				return err
			}
		}
	}
	return t.Tx.PutRegistration(scope, r)
}

// room holds some more against a quota.
func (t *quotaTx) room(scope string, what Counted, quota, more int64) error {
	t.q.mu.Lock()
	defer t.q.mu.Unlock()
	c := t.q.counts[what]
	if begun := time.Now(); c == nil || !begun.Before(c.until) {
		n, err := t.Count(scope, what, quota)
		if err != nil {
			return err
		}
		took := time.Since(begun)
		c = &count{n: n, until: begun.Add(took + min(100*took, countFor))}
		t.q.counts[what] = c
	}
	err := Exceeds(what, c.n+more-1, quota)
	if err == nil {
		c.n += more // where the transaction comes to nothing the next count puts it right
	}
	return err
}
