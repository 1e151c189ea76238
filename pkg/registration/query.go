package registration

import (
	"context"
	"errors"

	"github.com/touchmark/touchmark/pkg/dps"
)

// A Page says which part of a list is wanted.
type Page struct {
	After string // folded ID that the page begins behind; empty for the beginning
	Limit int
	// Match says which rows are wanted, by what they are as JSON; nil for all.
	Match func(row any) (bool, error)
}

// Bounds of the work that one page is. A page that meets one is shorter than its limit, or empty, and has a next one.
const (
	maxScan    = 10_000
	maxOctets  = 8 << 20 // of documents
	readAtOnce = 200
)

// What is listed is a record on its way to a page.
type listed struct {
	id     string // folded
	value  any
	octets int
}

// page gathers rows, which read returns in the order of their IDs, and where the next page begins: "" at the end. Records that
// come and go between pages do not upset it.
func page(p Page, read func(after string, limit int) ([]listed, error)) (rows []any, next string, err error) {
	rows, after, octets, scanned := []any{}, p.After, 0, 0
	for {
		n := min(readAtOnce, p.Limit-len(rows)+1)
		if p.Match != nil {
			n = readAtOnce
		}
		batch, err := read(after, n)
		if err != nil {
			return nil, "", err
		}
		for _, r := range batch {
			if len(rows) == p.Limit || octets >= maxOctets || scanned == maxScan {
				return rows, after, nil
			}
			scanned++
			after = r.id
			ok := p.Match == nil
			if !ok {
				if ok, err = p.Match(r.value); err != nil {
					return nil, "", err
				}
			}
			if ok {
				rows = append(rows, r.value)
			}
			octets += r.octets
		}
		if len(batch) < n {
			return rows, "", nil
		}
	}
}

// QueryEnrollments returns a page of enrollments or groups, without secrets and certificates, and where the next one begins: ""
// at the end.
func (s *Service) QueryEnrollments(ctx context.Context, kind Kind, p Page) (rows []any, next string, err error) {
	err = s.cfg.Store.View(ctx, func(tx Tx) (err error) {
		rows, next, err = page(p, func(after string, limit int) ([]listed, error) {
			records, err := tx.Records(s.scope, kind, after, limit)
			if err != nil {
				return nil, err
			}
			batch := make([]listed, len(records))
			for i, r := range records {
				d, err := open(r)
				if err != nil {
					return nil, err
				}
				hide(d)
				batch[i] = listed{dps.Fold(r.ID), d.value(), len(r.Document)}
			}
			return batch, nil
		})
		return err
	})
	return rows, next, err
}

// QueryRegistrations returns a page of the registrations that came in by a group, and where the next one begins.
func (s *Service) QueryRegistrations(ctx context.Context, group string, p Page) (rows []any, next string, err error) {
	err = s.cfg.Store.View(ctx, func(tx Tx) error {
		if _, err := tx.Record(s.scope, Group, dps.Fold(group)); errors.Is(err, ErrNotFound) {
			return missing(Group)
		} else if err != nil {
			return err
		}
		rows, next, err = s.registrations(tx, group, p, func(r *Registration) any { return serviceView(r) })
		return err
	})
	return rows, next, err
}

// A Registered is a registration in the list that Azure does not have.
type Registered struct {
	*dps.RegistrationState
	// EnrollmentGroupID is the folded ID of the group that the device came in by; empty for an individual enrollment.
	EnrollmentGroupID string `json:"enrollmentGroupId,omitempty"`
}

// ListRegistrations returns a page of the registrations of the scope, or of those that came in by a group, which need not be there any
// more, and where the next page begins. Where there is neither such a group nor a registration by it, that is refused.
func (s *Service) ListRegistrations(ctx context.Context, group string, p Page) (rows []any, next string, err error) {
	err = s.cfg.Store.View(ctx, func(tx Tx) error {
		rows, next, err = s.registrations(tx, group, p, func(r *Registration) any { return Registered{serviceView(r), r.Group} })
		if err != nil || group == "" || len(rows) > 0 || p.After != "" {
			return err
		}
		if _, err = tx.Record(s.scope, Group, dps.Fold(group)); errors.Is(err, ErrNotFound) {
			err = missing(Group)
		}
		return err
	})
	return rows, next, err
}

func (s *Service) registrations(tx Tx, group string, p Page, show func(*Registration) any) (rows []any, next string, err error) {
	return page(p, func(after string, limit int) ([]listed, error) {
		regs, err := tx.Registrations(s.scope, dps.Fold(group), after, limit)
		batch := make([]listed, len(regs))
		for i, r := range regs {
			batch[i] = listed{r.ID, show(r), len(r.State.Payload)}
		}
		return batch, err
	})
}

// QueryAudit returns a page of the audit record, oldest first, and where the next one begins.
func (s *Service) QueryAudit(ctx context.Context, p Page) (rows []any, next string, err error) {
	err = s.cfg.Store.View(ctx, func(tx Tx) (err error) {
		rows, next, err = page(p, func(after string, limit int) ([]listed, error) {
			entries, err := tx.Audits(s.scope, after, limit)
			batch := make([]listed, len(entries))
			for i, a := range entries {
				batch[i] = listed{a.ID, a, 0}
			}
			return batch, err
		})
		return err
	})
	return rows, next, err
}
