package mint

import (
	"context"
	"errors"
	"slices"

	"github.com/touchmark/touchmark/pkg/bundle"
	"github.com/touchmark/touchmark/pkg/ledger"
	"github.com/touchmark/touchmark/pkg/stamp"
)

// Export calls sink with an entry for each unit of the profile that was made on the grant of the configuration (or on none) and
// stands in one of the states, in the order in which they were begun, and before them with one for each identity that ended. It
// makes nothing, and returns the units' IDs for [Exported], once the bundle with them is durable.
func Export(ctx context.Context, cfg Config, states []ledger.State, sink func(*bundle.Entry) error) ([]int64, error) {
	r := &run{Config: cfg, stamped: ledger.Stamped}
	var err error
	if r.base, err = cfg.Profile.enrollmentBase(); err != nil {
		return nil, err
	}
	if cfg.Profile.Enrollment == "group" && cfg.Issuer != nil {
		if err := sink(r.groupEntry()); err != nil {
			return nil, err
		}
	}
	grant := ""
	if cfg.Grant != nil {
		grant = cfg.Grant.ID()
	}
	jobs, err := cfg.Ledger.Jobs(ctx)
	if err != nil {
		return nil, err
	}
	mine := make(map[int64]bool)
	for _, j := range jobs {
		mine[j.ID] = j.Profile == cfg.Profile.Name && j.Grant == grant
	}
	// All endings, each time: a bundle that got lost does no harm, and one that comes twice changes nothing. They come first, so that
	// what replaces an identity finds it ended.
	for u, err := range cfg.Ledger.Retired(ctx, "") {
		if err != nil {
			return nil, err
		}
		if !mine[u.Job] || u.Was == ledger.Begun {
			continue // nothing was signed that somebody could use
		}
		e, err := r.ending(ctx, &u)
		if err != nil {
			return nil, err
		}
		if err := sink(e); err != nil {
			return nil, err
		}
	}
	var ids []int64
	for _, j := range jobs {
		if !mine[j.ID] {
			continue
		}
		made, err := r.exportJob(ctx, j, states, sink)
		ids = append(ids, made...)
		if err != nil {
			return ids, err
		}
	}
	slices.Sort(ids)
	return ids, nil
}

func (r *run) exportJob(ctx context.Context, j ledger.Job, states []ledger.State, sink func(*bundle.Entry) error) (ids []int64, err error) {
	if r.Profile.HasSecrets() && j.Out != "" {
		// A key of a device's own is in its stamp until a bundle has it.
		if r.out, err = stamp.OpenFiles(j.Out, "export"); err != nil {
			return nil, err
		}
		defer func() { err, r.out = errors.Join(err, r.out.Close()), nil }()
	}
	var page []ledger.Unit
	flush := func() error {
		err := r.emitPage(ctx, page, sink)
		for i := range page {
			ids = append(ids, page[i].ID)
		}
		page = page[:0]
		return err
	}
	for u, err := range r.Ledger.Units(ctx, j.ID) {
		if err != nil {
			return ids, err
		}
		if !slices.Contains(states, u.State) {
			continue
		}
		if page = append(page, u); len(page) == stampGroup {
			if err := flush(); err != nil {
				return ids, err
			}
		}
	}
	return ids, flush()
}

func (r *run) emitPage(ctx context.Context, page []ledger.Unit, sink func(*bundle.Entry) error) error {
	units := make([]unit, len(page))
	existing := make(map[string]ledger.Unit, len(page))
	for i, have := range page {
		units[i].row = &Row{Serial: have.Serial, RegistrationID: have.RegistrationID}
		existing[have.Serial] = have
	}
	if err := r.recover(ctx, units, existing); err != nil {
		return err
	}
	for i := range units {
		e, err := r.entry(&units[i])
		if err != nil {
			return err
		}
		if err := sink(e); err != nil {
			return err
		}
		units[i].wipe()
	}
	return nil
}
