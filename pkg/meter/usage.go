package meter

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"maps"
	"slices"
	"time"

	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
)

type usageKey struct{ scope, day, api, operation, result string }

const (
	flushEvery  = 10 * time.Second
	flushAtOnce = 1000 // rows in a transaction
	// countEvery is how many times as long as counting all objects took there is until they are counted again, and at least
	// countAtLeast.
	countEvery   = 100
	countAtLeast = 15 * time.Second
	maxObjects   = 1 << 40
	maxReport    = 400 // days
)

func (m *Meter) use(scope, api, operation, result string) {
	k := usageKey{scope, registration.DayOf(m.cfg.Now()), api, operation, result}
	m.mu.Lock()
	m.usage[k]++
	m.mu.Unlock()
}

// Run keeps usage and counts objects until the context ends, and then keeps what is left. Usage is kept every ten seconds, by
// addition, so that any number of replicas count together; one that is killed loses what it counted since.
func (m *Meter) Run(ctx context.Context) error {
	tick := time.NewTicker(flushEvery)
	defer tick.Stop()
	var next time.Time
	for {
		if begun := time.Now(); !begun.Before(next) {
			if err := m.Count(ctx); err != nil && ctx.Err() == nil {
				m.cfg.Log.Error("counting what scopes have", "cause", err)
			}
			next = time.Now().Add(max(countEvery*time.Since(begun), countAtLeast))
		}
		select {
		case <-tick.C:
			if err := m.Flush(ctx); err != nil && ctx.Err() == nil {
				m.cfg.Log.Error("keeping usage", "cause", err)
			}
		case <-ctx.Done():
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
			defer cancel()
			return m.Flush(last)
		}
	}
}

// Flush keeps the usage that was counted since. What cannot be kept is counted on.
func (m *Meter) Flush(ctx context.Context) error {
	m.mu.Lock()
	usage := m.usage
	m.usage = make(map[usageKey]int64)
	m.mu.Unlock()
	var errs []error
	keys := slices.SortedFunc(maps.Keys(usage), func(a, b usageKey) int { // in one order at every replica: none waits for another in a circle
		return cmp.Or(cmp.Compare(a.scope, b.scope), cmp.Compare(a.day, b.day), cmp.Compare(a.api, b.api), cmp.Compare(a.operation, b.operation), cmp.Compare(a.result, b.result))
	})
	for chunk := range slices.Chunk(keys, flushAtOnce) {
		err := m.cfg.Store.Update(ctx, func(tx registration.Tx) error {
			scope, gone := "", false
			for _, k := range chunk {
				if k.scope != scope {
					var err error
					if gone, err = registration.Deleted(tx, k.scope); err != nil {
						return err
					}
					scope = k.scope
				}
				if gone {
					continue
				}
				if err := tx.AddUsage(k.scope, registration.Usage{Day: k.day, API: k.api, Operation: k.operation, Result: k.result, Calls: usage[k]}); err != nil {
					return err
				}
			}
			return nil
		})
		if err == nil {
			continue
		}
		errs = append(errs, err)
		m.mu.Lock()
		for _, k := range chunk {
			m.usage[k] += usage[k]
		}
		m.mu.Unlock()
	}
	return errors.Join(errs...)
}

// Count counts the objects of all scopes, and forgets whether hubs are up that none of them has any more.
func (m *Meter) Count(ctx context.Context) error {
	totals := make(map[[2]string]float64)
	var ends []Certificate
	linked := make(map[string]bool)
	for after := ""; ; {
		var page []*registration.Scope
		err := m.cfg.Store.View(ctx, func(tx registration.Tx) (err error) {
			page, err = tx.Scopes(after, 100)
			return err
		})
		if err != nil {
			return err
		}
		if len(page) == 0 {
			break
		}
		for _, sc := range page {
			after = dps.Fold(sc.ID)
			name := m.scopes.of(after)
			totals[[2]string{name, "hub"}] += float64(len(sc.Hubs))
			for i := range sc.Hubs {
				if hub := sc.Hubs[i].Name; m.hubs.has(hub) {
					linked[hub] = true
				} else {
					linked["other"] = true
				}
			}
			var cas []*registration.CACertificate
			err := m.cfg.Store.View(ctx, func(tx registration.Tx) (err error) {
				cas, err = tx.CACertificates(after)
				return err
			})
			if err != nil {
				return err
			}
			totals[[2]string{name, "certificate"}] += float64(len(cas))
			for _, c := range cas {
				if cert, err := x509.ParseCertificate(c.DER); err == nil {
					ends = append(ends, Certificate{m.certificates.of("ca " + after + "/" + c.Name), cert.NotAfter})
				}
			}
			for kind, whats := range map[string][]registration.Counted{
				"enrollment": {registration.CountEnrollments}, "group": {registration.CountX509Groups, registration.CountSymmetricGroups}, "registration": {registration.CountRegistrations}, "task": {registration.CountTasks},
			} {
				for _, what := range whats {
					var n int64
					err := m.cfg.Store.View(ctx, func(tx registration.Tx) (err error) {
						n, err = tx.Count(after, what, maxObjects)
						return err
					})
					if err != nil {
						return err
					}
					totals[[2]string{name, kind}] += float64(n)
				}
			}
		}
	}
	m.objects.Reset()
	waiting := 0.0
	for k, n := range totals {
		if k[1] == "task" {
			waiting += n
			continue
		}
		m.objects.WithLabelValues(k[0], k[1]).Set(n)
	}
	m.outbox.Set(waiting)
	m.unlinked(linked)
	m.mu.Lock()
	m.ends = ends
	m.mu.Unlock()
	return nil
}

// A Report is what was used in a scope.
type Report struct {
	IDScope string `json:"idScope"`
	From    string `json:"from"` // days, both of them counted
	To      string `json:"to"`
	// Calls are all, Billable those that Azure bills.
	Calls    int64 `json:"calls"`
	Billable int64 `json:"billable"`
	Days     []Day `json:"days"`
}

// A Day is what was used on one.
type Day struct {
	Date     string `json:"date"`
	Calls    int64  `json:"calls"`
	Billable int64  `json:"billable"`
	Usage    []Item `json:"usage"`
}

// An Item is one line of a report.
type Item struct {
	registration.Usage
	Billable bool `json:"billable"`
}

// Report adds up the usage of a scope; what other replicas counted in the last ten seconds is missing. Days are "2026-11-21" in
// UTC: an empty from is the first of the month of to, and an empty to is today.
func (m *Meter) Report(ctx context.Context, scope, from, to string) (*Report, error) {
	to = cmp.Or(to, registration.DayOf(m.cfg.Now()))
	last, err := time.Parse(time.DateOnly, to)
	if err != nil {
		return nil, dps.NewError(dps.CodeInvalidArgument, "to must be a day, such as 2026-11-21", err)
	}
	from = cmp.Or(from, registration.DayOf(last.AddDate(0, 0, 1-last.Day())))
	first, err := time.Parse(time.DateOnly, from)
	if err != nil {
		return nil, dps.NewError(dps.CodeInvalidArgument, "from must be a day, such as 2026-11-01", err)
	}
	if days := last.Sub(first) / (24 * time.Hour); days < 0 || days > maxReport {
		return nil, dps.NewError(dps.CodeInvalidArgument, "from must be before to, and at most 400 days", nil)
	}
	if err := m.Flush(ctx); err != nil {
		return nil, err
	}
	r := &Report{IDScope: scope, From: from, To: to, Days: []Day{}}
	var all []registration.Usage
	err = m.cfg.Store.View(ctx, func(tx registration.Tx) (err error) {
		all, err = tx.Usage(dps.Fold(scope), from, to)
		return err
	})
	if err != nil {
		return nil, err
	}
	for _, u := range all {
		if n := len(r.Days); n == 0 || r.Days[n-1].Date != u.Day {
			r.Days = append(r.Days, Day{Date: u.Day})
		}
		d := &r.Days[len(r.Days)-1]
		d.Usage = append(d.Usage, Item{u, u.Billable()})
		d.Calls += u.Calls
		r.Calls += u.Calls
		if u.Billable() {
			d.Billable += u.Calls
			r.Billable += u.Calls
		}
	}
	return r, nil
}
