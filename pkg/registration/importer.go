package registration

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/touchmark/touchmark/pkg/bundle"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/order"
)

// An ImportResult counts what an import did, or would do.
type ImportResult struct {
	New         int `json:"new"`
	Unchanged   int `json:"unchanged"`
	Conflicting int `json:"conflicting"`
	// Replaced counts identities that a newer revision took the place of.
	Replaced int `json:"replaced,omitempty"`
	// Retired counts identities that ended.
	Retired int `json:"retired,omitempty"`
	// Stale counts entries of revisions that a newer one took the place of already, or that had ended: they let nobody in.
	Stale int `json:"stale,omitempty"`
	// Refused counts entries that the bundle's order does not allow.
	Refused int `json:"refused,omitempty"`
	// Conflicts, StaleEntries and Refusals name the first of them.
	Conflicts    []ImportConflict `json:"conflicts,omitempty"`
	StaleEntries []ImportConflict `json:"staleEntries,omitempty"`
	Refusals     []ImportConflict `json:"refusals,omitempty"`
}

func (r *ImportResult) add(o *ImportResult) {
	r.New += o.New
	r.Unchanged += o.Unchanged
	r.Conflicting += o.Conflicting
	r.Replaced += o.Replaced
	r.Retired += o.Retired
	r.Stale += o.Stale
	r.Refused += o.Refused
	for _, l := range []struct{ to, from *[]ImportConflict }{{&r.Conflicts, &o.Conflicts}, {&r.StaleEntries, &o.StaleEntries}, {&r.Refusals, &o.Refusals}} {
		*l.to = append(*l.to, (*l.from)[:min(len(*l.from), maxConflicts-len(*l.to))]...)
	}
}

// An ImportConflict is an entry that was left out.
type ImportConflict struct {
	ID     string `json:"id"`
	Reason string `json:"reason"`
}

const (
	maxConflicts = 100
	chunkSize    = 1000
	// maxRefusals bounds the refusals that are kept of an order: whoever sends millions is told, and not remembered.
	maxRefusals = 10_000
)

// Import takes the entries of a bundle. What the service knows with the same content is unchanged; what it knows with
// another content of the same revision is a conflict and stays as it is. A newer revision takes the place of an older one, and
// what ended does not come back, in whatever order bundles arrive. So an import can be repeated, and one that was cut off is
// taken up by repeating it.
//
// A bundle that was made on an order is held against it: only what the order has comes in, and over all its bundles no more
// than its quantity. The error is ErrOrder where the order does not speak for the bundle at all; single entries are refused.
//
// Entries go in by transactions of a few hundred, so that devices register meanwhile: a bundle of a million entries in one
// transaction would hold them up for the time that it takes.
//
// Reading and preparing runs ahead of writing by a transaction, in the order of the bundle.
func (s *Service) Import(ctx context.Context, entries iter.Seq2[bundle.Entry, error], cfg ImportConfig) (ImportResult, error) {
	var total ImportResult
	in := &intake{s: s, cfg: cfg, groups: make(map[string]bool), ahead: make(map[string]Tally)}
	var err error
	if in.grant, err = s.openGrant(&cfg); err != nil {
		return total, err
	}
	if in.grant != nil {
		if in.grants, err = s.bookGrant(ctx, in.grant, cfg.DryRun); err != nil {
			return total, err
		}
	}
	eg, ctx := errgroup.WithContext(ctx)
	chunks := make(chan []prepared, 1)
	eg.Go(func() error {
		defer close(chunks)
		send := func(chunk []prepared) error {
			select {
			case chunks <- chunk:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		var chunk []prepared
		for e, err := range entries {
			if err != nil {
				return err
			}
			p, err := in.prepare(&e)
			if err != nil {
				return err
			}
			if chunk = append(chunk, p); len(chunk) == chunkSize {
				if err := send(chunk); err != nil {
					return err
				}
				chunk = nil
			}
		}
		if len(chunk) == 0 {
			return nil
		}
		return send(chunk)
	})
	eg.Go(func() error {
		for chunk := range chunks {
			res, err := in.chunk(ctx, chunk)
			if err != nil {
				return err
			}
			total.add(&res)
		}
		return nil
	})
	err = eg.Wait()
	return total, err
}

// An intake is an import under way.
type intake struct {
	s      *Service
	cfg    ImportConfig
	grant  *order.Grant // nil without
	grants []*Grant     // the order, and behind it the lease where it is one; their tallies are not filled in
	// A dry run remembers what is not in the store for the entries behind: groups, and what would be added to the grants.
	groups map[string]bool
	ahead  map[string]Tally
	erased *time.Time // when the scope was last erased, as the first transaction saw it
}

// unbroken refuses to go on when the scope was erased since the import began: half of it would be there.
func (in *intake) unbroken(tx Tx) error {
	sc, err := found(tx.Scope(in.s.scope))
	if sc == nil {
		return err
	}
	if in.erased == nil {
		in.erased = &sc.Erased
	}
	if !sc.Erased.Equal(*in.erased) {
		return because("scope", "the scope was erased meanwhile")
	}
	return nil
}

// tallies reads what became of the grants so far.
func (in *intake) tallies(tx Tx) ([]Tally, error) {
	var all []Tally
	for _, g := range in.grants {
		t := in.ahead[g.ID]
		row, err := tx.Grant(in.s.scope, g.ID)
		switch {
		case err == nil:
			t.add(row.Tally)
		case !errors.Is(err, ErrNotFound) || !in.cfg.DryRun:
			return nil, err
		}
		all = append(all, t)
	}
	return all, nil
}

// chunk takes some entries in one transaction.
func (in *intake) chunk(ctx context.Context, entries []prepared) (ImportResult, error) {
	run := in.s.cfg.Store.Update
	if in.cfg.DryRun {
		run = in.s.cfg.Store.View
	}
	for fresh := freshOnes(entries); ; fresh = false {
		var c *chunk
		err := run(ctx, func(tx Tx) error {
			c = &chunk{intake: in, tx: tx, scope: in.s.scope} // the transaction may be run again
			err := in.unbroken(tx)
			if err != nil {
				return err
			}
			if c.tallies, err = in.tallies(tx); err != nil {
				return err
			}
			if c.endings, err = tx.HasEndings(c.scope); err != nil {
				return err
			}
			taken := false
			if fresh {
				if taken, err = c.takeFresh(entries); err != nil {
					return err
				}
			}
			for i := 0; !taken && i < len(entries); i++ {
				if err := c.take(&entries[i]); err != nil {
					return err
				}
			}
			if err := c.book(); err != nil || in.cfg.DryRun || c.res.New+c.res.Replaced+c.res.Retired+c.res.Refused == 0 {
				return err
			}
			what := fmt.Sprintf("bundle/%s: %d new, %d replaced, %d retired, %d refused", in.cfg.Station, c.res.New, c.res.Replaced, c.res.Retired, c.res.Refused)
			return in.s.audit(tx, in.cfg.By, "import", what, nil, c.res)
		})
		switch {
		case errors.Is(err, errNotFresh):
			continue
		case err != nil:
			return ImportResult{}, err
		}
		return c.res, nil
	}
}

// prepared is an entry ready for the store.
type prepared struct {
	id      string
	problem string  // why it cannot be taken
	denied  string  // why its order does not allow it
	record  *Record // an enrollment or a group
	device  *Device // what is known of its device; nil for a group
	ending  *Ending // set for the end of an identity alone
}

// prepare does everything that needs no transaction.
func (in *intake) prepare(e *bundle.Entry) (prepared, error) {
	if err := e.Check(); err != nil {
		return prepared{}, err
	}
	device := &Device{Serial: e.Serial, Revision: e.Revision, Station: in.cfg.Station}
	if in.grant != nil {
		device.Grant = in.grant.ID()
	}
	if d := e.Device; d != nil {
		device.ID, device.Group, device.KeyHash = dps.Fold(d.RegistrationID), dps.Fold(d.Group), d.KeyHash
		return prepared{id: d.RegistrationID, device: device}, nil
	}
	if r := e.Retired; r != nil {
		device.ID, device.Group, device.Revision = dps.Fold(r.RegistrationID), dps.Fold(r.Group), -1
		p := prepared{id: r.RegistrationID, device: device, ending: &Ending{
			ID: device.ID, Revision: e.Revision, KeyHash: r.KeyHash, State: r.State, Reason: r.Reason, At: r.At, Station: in.cfg.Station}}
		if r.State == bundle.Returned && in.grant != nil {
			// A station's word alone makes no room on an order.
			permit, err := order.OpenPermit([]byte(r.Permit), in.s.cfg.Owners)
			if err != nil || !permit.Covers(in.grant.Order.ID, e.Serial, e.Revision) {
				p.problem = "it is said to be returned, and no owner's permit for it is there"
			}
		}
		return p, nil
	}
	s := in.s
	d := &document{kind: Individual, individual: e.Individual}
	if e.Group != nil {
		d = &document{kind: Group, group: e.Group}
	}
	p := prepared{id: *d.id()}
	if e.Individual != nil {
		device.ID = dps.Fold(p.id)
		p.device = device
	}
	if err := s.check(d); err != nil {
		p.problem = dps.AsError(err).Message
		return p, nil
	}
	base := d.base()
	base.ETag, base.CreatedDateTimeUTC, base.LastUpdatedDateTimeUTC = "", nil, nil
	if d.individual != nil {
		d.individual.RegistrationState = nil
	}
	content, err := json.Marshal(d.value())
	if err != nil {
		return p, err
	}
	sum := sha256.Sum256(content)
	r := &Record{Kind: d.kind, ID: *d.id(), Content: sum[:], Closed: e.Closed || e.Group != nil && in.grant != nil}
	switch base.Attestation.Type {
	case dps.AttestationSymmetricKey:
		keys := base.Attestation.SymmetricKey
		if keys == nil || keys.PrimaryKey == "" {
			p.problem = "its key is sealed and was not opened"
			return p, nil
		}
		full, err := completeKeys(keys, nil, [2]bool{})
		if err != nil {
			p.problem = dps.AsError(err).Message
			return p, nil
		}
		if r.Keys, err = json.Marshal(full); err != nil {
			return p, err
		}
		base.Attestation.SymmetricKey, r.Symmetric = nil, d.kind == Group
	case dps.AttestationX509:
		if d.x509() == nil {
			p.problem = "a bundle's group has its CA certificates, and no references to those of a scope"
			return p, nil
		}
		certs, index, err := completeCertificates(d.kind, d.x509(), nil)
		if err != nil {
			p.problem = dps.AsError(err).Message
			return p, nil
		}
		r.Certificates = index
		if d.kind == Individual {
			base.Attestation.X509.ClientCertificates = certs
			device.KeyHash = index[0].Key
		} else {
			base.Attestation.X509.SigningCertificates = certs
			for _, c := range index {
				if in.grant != nil && c.Key != in.grant.Order.Issuer {
					p.denied = "its CA is not the one that the order names"
				}
			}
		}
	case dps.AttestationTPM:
		if r.Certificates, err = completeTPM(base.Attestation.TPM); err != nil {
			p.problem = dps.AsError(err).Message
			return p, nil
		}
		device.KeyHash = r.Certificates[0].Key
	}
	now := dps.Time{Time: s.cfg.Now()}
	base.CreatedDateTimeUTC, base.LastUpdatedDateTimeUTC, base.ETag = &now, &now, newETag()
	if r.Document, err = d.encode(); err != nil {
		return p, err
	}
	p.record = r
	return p, nil
}
