package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/hsm"
)

// counterRow is a counter as counter list and counter show have it.
type counterRow struct {
	Name  string `json:"name"`
	Value uint64 `json:"value"`
	// Holder is who holds it, if somebody does; Process is what this machine knows of that process: "running", "ended" or "unknown".
	Holder  *hsm.Claim `json:"holder,omitempty"`
	Process string     `json:"process,omitempty"`
}

func describeCounter(ctx context.Context, c hsm.Counter) (counterRow, error) {
	v, err := c.Value(ctx)
	if err != nil {
		return counterRow{}, err
	}
	r := counterRow{Name: c.Name(), Value: v}
	claim, err := c.Holder(ctx)
	if errors.Is(err, hsm.ErrNotFound) {
		return r, nil
	}
	if err != nil {
		return r, err
	}
	r.Holder, r.Process = &claim, "unknown"
	switch {
	case claim.Running():
		r.Process = "running"
	case claim.Ended():
		r.Process = "ended"
	}
	return r, nil
}

func (r counterRow) holder() string {
	if r.Holder == nil {
		return "nobody"
	}
	return fmt.Sprintf("%s, process %s", r.Holder, map[string]string{"unknown": "perhaps running", "running": "running", "ended": "ended"}[r.Process])
}

func newCounter(a *app) *cobra.Command {
	// command makes a command that works on the counters of a store, and on one of them if it is named.
	command := func(use, short string, run func(context.Context, hsm.CounterStore, *keyOptions) error) (*cobra.Command, *keyOptions) {
		o := &keyOptions{}
		c := &cobra.Command{Use: use, Short: short, Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
			return a.withCounters(cmd.Context(), o, func(s hsm.CounterStore) error { return run(cmd.Context(), s, o) })
		}}
		storeFlags(c, o)
		return c, o
	}
	name := func(c *cobra.Command, o *keyOptions) {
		c.Flags().StringVar(&o.name, "name", "", "the counter's name (required)")
		_ = c.MarkFlagRequired("name")
	}
	list, _ := command("list", "List the counters of a token or TPM, and who holds them", a.runCounterList)
	list.Example = "  touchmark token counter list --line line-3"
	show, o := command("show --name NAME", "Show where a counter stands and who holds it", a.runCounterShow)
	show.Example = "  touchmark token counter show --line line-3 --name order-1234"
	name(show, o)
	create, o := command("create --name NAME", "Make a counter", a.runCounterCreate)
	create.Example = "  touchmark token counter create --line line-3 --name order-1234"
	name(create, o)
	del, o := command("delete --name NAME", "Destroy a counter; what is anchored in it is never accepted again", a.runCounterDelete)
	del.Example = "  touchmark token counter delete --line line-3 --name order-1234 --yes"
	name(del, o)
	del.Flags().BoolVar(&o.yes, "yes", false, "do not ask")
	takeover, o := command("takeover --name NAME", "Free a counter whose holder is gone for good", a.runCounterTakeOver)
	takeover.Long = `takeover frees a counter that a process holds which cannot be asked any more: its machine lost its power, or is no more. Of a
process that has ended on this machine since it was started nobody has to say so. A process that turns out to live on is refused
from then on, and what it does with its copy of the ledger counts no more.`
	takeover.Example = "  touchmark token counter takeover --line line-3 --name order-1234 --yes"
	name(takeover, o)
	takeover.Flags().BoolVar(&o.yes, "yes", false, "do not ask")
	return parent("counter", "Counters in a token or TPM, which a copied or older ledger does not have", list, show, create, del, takeover)
}

func (a *app) withCounters(ctx context.Context, o *keyOptions, f func(hsm.CounterStore) error) error {
	return a.withStore(ctx, o, func(store hsm.Store, _ *line) error {
		s, ok := store.(hsm.CounterStore)
		if !ok {
			return hint(usageError{fmt.Errorf("%s holds no counters: %w", store.URI(), hsm.ErrUnsupported)}, "PKCS#11 tokens and TPMs do; key files can be copied together with a ledger")
		}
		return f(s)
	})
}

// withCounter opens the counter that the options name.
func withCounter(ctx context.Context, s hsm.CounterStore, o *keyOptions, f func(hsm.Counter, counterRow) error) error {
	c, err := s.OpenCounter(ctx, o.name)
	if err != nil {
		return err
	}
	r, err := describeCounter(ctx, c)
	if err != nil {
		return err
	}
	return f(c, r)
}

func (a *app) runCounterList(ctx context.Context, s hsm.CounterStore, _ *keyOptions) error {
	names, err := s.Counters(ctx)
	if err != nil {
		return err
	}
	var rows [][]string
	for _, name := range names {
		err := withCounter(ctx, s, &keyOptions{name: name}, func(_ hsm.Counter, r counterRow) error {
			if a.json {
				return a.printJSON(r)
			}
			rows = append(rows, []string{r.Name, fmt.Sprint(r.Value), r.holder()})
			return nil
		})
		if err != nil {
			return err
		}
	}
	if a.json {
		return nil
	}
	return a.table([]string{"NAME", "VALUE", "HELD BY"}, rows)
}

func (a *app) runCounterShow(ctx context.Context, s hsm.CounterStore, o *keyOptions) error {
	return withCounter(ctx, s, o, func(_ hsm.Counter, r counterRow) error {
		if a.json {
			return a.printJSON(r)
		}
		return a.table(nil, [][]string{{"Counter", r.Name}, {"Value", fmt.Sprint(r.Value)}, {"Held by", r.holder()}})
	})
}

func (a *app) runCounterCreate(ctx context.Context, s hsm.CounterStore, o *keyOptions) error {
	if err := hsm.CheckCounterName(o.name); err != nil {
		return usageError{err}
	}
	c, err := s.CreateCounter(ctx, o.name)
	if err != nil {
		return err
	}
	v, err := c.Value(ctx)
	if err != nil {
		return err
	}
	if a.json {
		return a.printJSON(counterRow{Name: c.Name(), Value: v})
	}
	_, err = fmt.Fprintf(a.out, "Counter %s stands at %d\n", c.Name(), v)
	return err
}

func (a *app) runCounterDelete(ctx context.Context, s hsm.CounterStore, o *keyOptions) error {
	if err := a.confirm(ctx, o.yes, "deleting counter "+o.name, o.name); err != nil {
		return err
	}
	if err := s.DeleteCounter(ctx, o.name); err != nil {
		return err
	}
	return a.done("deleted", o.name, "Deleted counter %s\n", o.name)
}

func (a *app) runCounterTakeOver(ctx context.Context, s hsm.CounterStore, o *keyOptions) error {
	return withCounter(ctx, s, o, func(c hsm.Counter, r counterRow) error {
		if r.Holder == nil {
			return a.done("free", o.name, "Nobody holds counter %s\n", o.name)
		}
		if err := a.confirm(ctx, o.yes, "taking counter "+o.name+" from "+r.holder(), o.name); err != nil {
			return err
		}
		if err := c.TakeOver(ctx, *r.Holder); err != nil {
			return err
		}
		return a.done("free", o.name, "Counter %s is free: it was held by %s\n", o.name, r.holder())
	})
}
