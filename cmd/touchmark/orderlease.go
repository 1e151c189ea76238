package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/pkg/ledger"
	"github.com/touchmark/touchmark/pkg/mint"
	"github.com/touchmark/touchmark/pkg/order"
)

type orderLeaseOptions struct {
	line, order, station, name, from, to, until, out string
	quantity                                         int64
}

func newOrderLease(a *app) *cobra.Command {
	o := &orderLeaseOptions{}
	c := &cobra.Command{
		Use: "lease ORDER --line DIR --station PEM --quantity N --out FILE", Short: "Cut a lease from an order for another station", Args: cobra.ExactArgs(1),
		Long: `lease cuts a part of an order off for another station: a number of units, and the next serials of the order's range or list.
It counts against the order from then on. The station gives back what it did not use with touchmark order return.`,
		Example: "  touchmark order lease PO-1234 --line line-3 --station line-4/station.pem --quantity 500 --out PO-1234-a.lease",
		RunE: func(cmd *cobra.Command, args []string) error {
			o.order = args[0]
			return a.onFloor(cmd.Context(), o.line, func(f *floor) error { return f.lease(cmd.Context(), o) })
		},
	}
	f := c.Flags()
	lineFlag(c, &o.line)
	f.StringVar(&o.station, "station", "", "PEM file with the public key of the station that gets it (required)")
	f.Int64Var(&o.quantity, "quantity", 0, "how many units (required)")
	f.StringVar(&o.name, "name", "", "what the lease is called after the order's ID (default: made up)")
	f.StringVar(&o.from, "serial-from", "", "first serial, where it should not be the next free one")
	f.StringVar(&o.to, "serial-to", "", "last serial, with --serial-from")
	f.StringVar(&o.until, "until", "", "day or time (UTC) at which it ends (default: the order's)")
	f.StringVar(&o.out, "out", "", "file to write (required)")
	for _, name := range []string{"station", "quantity", "out"} {
		_ = c.MarkFlagRequired(name)
	}
	return c
}

func (f *floor) lease(ctx context.Context, o *orderLeaseOptions) (err error) {
	g, have, err := f.takeGrant(ctx, o.order)
	if err != nil {
		return err
	}
	defer func() {
		if refusalKind(err) != "" {
			f.refuse(ctx, g, "", err)
		}
	}()
	if g.Lease != nil {
		return usageError{fmt.Errorf("%s is a lease itself: only an order is cut", g.ID())}
	}
	if exists(o.out) {
		return hint(fmt.Errorf("%s exists already", o.out), "a lease is written once; name another file")
	}
	l := &order.Lease{Version: 1, Order: string(g.Document), Quantity: o.quantity}
	if l.NotBefore, l.NotAfter = g.Order.NotBefore, g.Order.NotAfter; o.until != "" {
		if l.NotAfter, err = parseDay(o.until, true); err != nil {
			return usageError{fmt.Errorf("--until: %w", err)}
		}
	}
	if l.Station, err = stationID(o.station); err != nil {
		return err
	}
	if o.name != "" {
		// Cut before, and lost on its way: the same again.
		all, err := f.ledger.Leases(ctx, g.Order.ID)
		if err != nil {
			return err
		}
		for _, have := range all {
			if d, err := order.Describe(have.Document); err == nil && have.ID == g.Order.ID+"/"+o.name && d.Lease.Station == l.Station && d.Lease.Quantity == o.quantity {
				if err := writeFile(o.out, append(have.Document, '\n'), 0o644, false); err != nil {
					return err
				}
				return f.a.printGrant(d, true)
			}
		}
	} else {
		var random [4]byte
		_, _ = rand.Read(random[:])
		o.name = hex.EncodeToString(random[:])
	}
	l.ID = g.Order.ID + "/" + o.name
	leased, err := f.leasedSerials(ctx, g.Order.ID)
	if err != nil {
		return err
	}
	taken := func(serial string) (bool, error) {
		for i := range leased {
			if leased[i].Has(serial) {
				return true, nil
			}
		}
		return f.known(ctx, serial)
	}
	if o.from != "" || o.to != "" {
		l.Serials = order.Serials{Pattern: g.Order.Serials.Pattern, From: o.from, To: o.to}
		for serial := range l.Serials.All {
			if t, err := taken(serial); err != nil || t {
				return errors.Join(fmt.Errorf("%w: serial %s is made or leased already", order.ErrSerial, serial), err)
			}
			if err := g.Admits(serial); err != nil {
				return err
			}
		}
	} else if l.Serials, err = g.Order.Serials.Cut(o.quantity, taken); err != nil {
		return fmt.Errorf("%s: %w", g.ID(), err)
	}
	if o.quantity > have.Left() {
		return &ledger.GrantError{Grant: have, Want: o.quantity, Err: ledger.ErrSpent}
	}
	owners, err := f.owners()
	if err != nil {
		return err
	}
	document, err := l.Sign(f.station, owners)
	if err != nil {
		return err
	}
	// Booked first, handed out after: a lease that got lost in between is returned by hand, one that was never booked would be
	// work beyond the order.
	if err := f.ledger.CutLease(ctx, ledger.Lease{ID: l.ID, Grant: g.Order.ID, Document: document, Quantity: l.Quantity}); err != nil {
		return err
	}
	if err := writeFile(o.out, append(document, '\n'), 0o644, false); err != nil {
		return hint(err, "the lease is booked: touchmark order lease %s --name %s with the same station and quantity writes it again", g.Order.ID, o.name)
	}
	return f.a.printGrant(&order.Grant{Order: g.Order, Lease: l}, true)
}

func (f *floor) known(ctx context.Context, serial string) (bool, error) {
	_, err := f.ledger.Find(ctx, serial)
	if err == nil {
		return true, nil
	}
	if !errors.Is(err, ledger.ErrNotFound) {
		return false, err
	}
	for _, err := range f.ledger.Retired(ctx, serial) {
		return err == nil, err
	}
	return false, nil
}

func (f *floor) leasedSerials(ctx context.Context, id string) ([]order.Serials, error) {
	leases, err := f.ledger.Leases(ctx, id)
	if err != nil {
		return nil, err
	}
	var all []order.Serials
	for _, l := range leases {
		g, err := order.Describe(l.Document)
		if err != nil {
			return nil, err
		}
		_, counted := g.Lease.Serials.Count()
		switch {
		case l.Used >= 0: // it is back: what it made is made, the rest is free again
			r, err := order.DescribeReturn(l.Receipt)
			if err != nil {
				return nil, err
			}
			if len(r.Serials) > 0 {
				all = append(all, order.Serials{List: r.Serials})
			}
		case counted:
			all = append(all, g.Lease.Serials)
		}
	}
	for i := range all {
		all[i].Index()
	}
	return all, nil
}

func (f *floor) notLeased(ctx context.Context, g *order.Grant, list *mint.List) error {
	if g == nil || g.Lease != nil {
		return nil
	}
	leased, err := f.leasedSerials(ctx, g.ID())
	if err != nil {
		return err
	}
	for i := range list.Rows {
		for k := range leased {
			if leased[k].Has(list.Rows[i].Serial) {
				return fmt.Errorf("%s: %w: %s is leased to another station", g.ID(), order.ErrSerial, list.Rows[i].Serial)
			}
		}
	}
	return nil
}

func newOrderReturn(a *app) *cobra.Command {
	var dir, out string
	c := &cobra.Command{
		Use: "return LEASE --line DIR --out FILE", Short: "Give back what is left of a lease", Args: cobra.ExactArgs(1),
		Long: `return ends a lease at the station that had it, and writes a signed return for the holder of the order, who takes it in with
touchmark order receive. Finish the units that were begun first: no more can be begun, and those count as used.`,
		Example: "  touchmark order return PO-1234/a --line line-4 --out a.return",
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.onFloor(cmd.Context(), dir, func(f *floor) error { return f.giveBack(cmd.Context(), args[0], out) })
		},
	}
	lineFlag(c, &dir)
	c.Flags().StringVar(&out, "out", "", "file to write (required)")
	_ = c.MarkFlagRequired("out")
	return c
}

func (f *floor) giveBack(ctx context.Context, id, out string) error {
	g, _, err := f.takeGrant(ctx, id)
	if err != nil {
		return err
	}
	id = g.ID() // it may have been named by its file
	if g.Lease == nil {
		return hint(usageError{fmt.Errorf("%s is an order, no lease", id)}, "touchmark order close reports on an order")
	}
	report, used, err := f.report(ctx, g)
	if err != nil {
		return err
	}
	if _, err := report.Sign(f.station); err != nil {
		return err // before anything is closed
	}
	if err := f.ledger.CloseGrant(ctx, id); err != nil {
		return err
	}
	report.Closed = true
	r := &order.Return{Version: 1, Lease: id, Station: report.Station, At: report.At, Used: int64(len(used)), Serials: used, Report: report}
	b, err := r.Sign(f.station)
	if err != nil {
		return err
	}
	if err := writeFile(out, append(b, '\n'), 0o644, true); err != nil {
		return err
	}
	if f.a.json {
		return f.a.printJSON(r)
	}
	f.a.note("%s: %d of %d units were made; the holder takes %s in with touchmark order receive", id, r.Used, g.Quantity(), out)
	return nil
}

func newOrderReceive(a *app) *cobra.Command {
	var dir, station string
	c := &cobra.Command{
		Use: "receive FILE --line DIR --station PEM", Short: "Take in the return of a lease", Args: cobra.ExactArgs(1),
		Example: "  touchmark order receive a.return --line line-3 --station line-4/station.pem",
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.onFloor(cmd.Context(), dir, func(f *floor) error {
				b, err := readDocument(args[0])
				if err != nil {
					return usageError{err}
				}
				pub, err := readPublicKey(station)
				if err != nil {
					return err
				}
				r, err := order.OpenReturn(b, pub)
				if err != nil {
					return fmt.Errorf("%s: %w", args[0], err)
				}
				if err := f.checkReturn(cmd.Context(), r); err != nil {
					return err
				}
				if err := f.ledger.ReturnLease(cmd.Context(), r.Lease, r.Used, b); err != nil {
					return err
				}
				name, _, _ := strings.Cut(r.Lease, "/")
				g, err := f.ledger.Grant(cmd.Context(), name)
				if err != nil {
					return err
				}
				return a.printGrants([]ledger.Grant{g})
			})
		},
	}
	lineFlag(c, &dir)
	c.Flags().StringVar(&station, "station", "", "PEM file with the public key of the station that had the lease (required)")
	_ = c.MarkFlagRequired("station")
	return c
}

func (f *floor) checkReturn(ctx context.Context, r *order.Return) error {
	name, _, _ := strings.Cut(r.Lease, "/")
	leases, err := f.ledger.Leases(ctx, name)
	if err != nil {
		return err
	}
	for _, l := range leases {
		if l.ID != r.Lease {
			continue
		}
		g, err := order.Describe(l.Document)
		if err != nil {
			return err
		}
		if g.Lease.Station != r.Station {
			return fmt.Errorf("%w: lease %s is of station %s, the return of %s", order.ErrStation, r.Lease, g.Lease.Station, r.Station)
		}
		for _, s := range r.Serials {
			if !g.Lease.Serials.Has(s) {
				return fmt.Errorf("lease %s: %w: the return names %s", r.Lease, order.ErrSerial, s)
			}
		}
		return nil
	}
	return fmt.Errorf("lease %s %w", r.Lease, ledger.ErrNoGrant)
}
