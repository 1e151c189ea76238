package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/signed"
	"github.com/touchmark/touchmark/pkg/ledger"
	"github.com/touchmark/touchmark/pkg/order"
)

func newOrderClose(a *app) *cobra.Command {
	var dir, out string
	var keep bool
	c := &cobra.Command{
		Use: "close ORDER --line DIR --out FILE", Short: "End an order, and prove what became of it", Args: cobra.ExactArgs(1),
		Long: `close ends an order at the station that holds it and writes a signed report: how many units were ordered, minted, stamped,
verified, sealed and exported, how many were voided, scrapped, reworked and returned, every unit that is missing by its
serial, and every attempt to make what the order does not allow. The exit code is 3 when the numbers do not agree.`,
		Example: "  touchmark order close PO-1234 --line line-3 --out PO-1234.report\n  touchmark order close PO-1234 --line line-3 --out so-far.report --keep-open",
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.onFloor(cmd.Context(), dir, func(f *floor) error { return f.closeOrder(cmd.Context(), args[0], out, keep) })
		},
	}
	lineFlag(c, &dir)
	c.Flags().StringVar(&out, "out", "", "file to write (required)")
	c.Flags().BoolVar(&keep, "keep-open", false, "report, and let the work go on")
	_ = c.MarkFlagRequired("out")
	return c
}

func (f *floor) closeOrder(ctx context.Context, id, out string, keep bool) error {
	g, _, err := f.takeGrant(ctx, id)
	if err != nil {
		return err
	}
	r, _, err := f.report(ctx, g)
	if err != nil {
		return err
	}
	b, err := r.Sign(f.station) // a report that cannot be made closes nothing
	if err == nil && !keep {
		if err = f.ledger.CloseGrant(ctx, g.ID()); err == nil {
			if r, _, err = f.report(ctx, g); err == nil {
				b, err = r.Sign(f.station)
			}
		}
	}
	if err != nil {
		return err
	}
	if err := writeFile(out, append(b, '\n'), 0o644, true); err != nil {
		return err
	}
	if err := f.a.printReport(r); err != nil || keep || r.Balanced() {
		return err
	}
	return partialError{error: fmt.Errorf("%s: %d were ordered, %d left the factory here", r.Grant, r.Ordered, r.Exported)}
}

func (f *floor) report(ctx context.Context, g *order.Grant) (*order.Report, []string, error) {
	have, err := f.ledger.Grant(ctx, g.ID())
	if err != nil {
		return nil, nil, err
	}
	station, err := signed.KeyID(f.station.Public())
	if err != nil {
		return nil, nil, err
	}
	r := &order.Report{Version: 1, Grant: g.ID(), Order: g.Order.ID, Station: station, At: time.Now().UTC().Truncate(time.Second), Closed: have.Closed, Ordered: g.Quantity()}
	jobs, err := f.ledger.Jobs(ctx)
	if err != nil {
		return nil, nil, err
	}
	mine := make(map[int64]bool)
	for _, j := range jobs {
		mine[j.ID] = j.Grant == g.ID()
	}
	used := []string{}
	seen := make(map[string]bool)
	for u, err := range f.ledger.Units(ctx, 0) {
		if err != nil {
			return nil, nil, err
		}
		if !mine[u.Job] {
			continue
		}
		seen[u.Serial] = true
		used = append(used, u.Serial)
		for state, n := range map[ledger.State]*int64{ledger.Minted: &r.Minted, ledger.Stamped: &r.Stamped, ledger.Verified: &r.Verified, ledger.Sealed: &r.Sealed, ledger.Exported: &r.Exported} {
			if u.State >= state {
				*n++
			}
		}
		if u.State != ledger.Exported {
			r.Missing = append(r.Missing, order.MissingUnit{Serial: u.Serial, Revision: u.Revision, State: u.State.String()})
		}
	}
	for u, err := range f.ledger.Retired(ctx, "") {
		if err != nil {
			return nil, nil, err
		}
		if !mine[u.Job] {
			continue
		}
		switch u.State {
		case ledger.Voided:
			r.Voided++
			if u.Was != ledger.Begun {
				used = append(used, u.Serial)
			}
		case ledger.Scrapped:
			r.Scrapped++
			used = append(used, u.Serial)
		case ledger.Reworked:
			r.Reworked++
		case ledger.Returned:
			r.Returned++
		}
		if !seen[u.Serial] && u.State != ledger.Returned { // returned: its order makes another in its place
			r.Missing = append(r.Missing, order.MissingUnit{Serial: u.Serial, Revision: u.Revision, State: u.State.String(), Reason: u.Ending.Reason})
		}
	}
	leases, err := f.ledger.Leases(ctx, g.ID())
	if err != nil {
		return nil, nil, err
	}
	leased := int64(0)
	var elsewhere []order.Serials
	for _, l := range leases {
		d, err := order.Describe(l.Document)
		if err != nil {
			return nil, nil, err
		}
		r.Leases = append(r.Leases, order.LeaseLine{Lease: l.ID, Station: d.Lease.Station, Quantity: l.Quantity, Used: l.Used})
		if l.Used < 0 {
			leased += l.Quantity
		} else {
			leased += l.Used
		}
		if _, counted := d.Lease.Serials.Count(); counted {
			d.Lease.Serials.Index()
			elsewhere = append(elsewhere, d.Lease.Serials)
		}
	}
	r.UnmadeCount = r.Ordered - have.Spent - leased
	r.Unmade = unmade(g, seen, elsewhere, r.UnmadeCount)
	if r.Refused, err = f.refusals(ctx, g.ID()); err != nil {
		return nil, nil, err
	}
	checkpoint, err := f.ledger.Checkpoint(ctx)
	r.Checkpoint = string(checkpoint)
	return r, used, err
}

const maxUnmade = 100_000

func unmade(g *order.Grant, seen map[string]bool, elsewhere []order.Serials, n int64) []string {
	serials := &g.Order.Serials
	if g.Lease != nil {
		serials = &g.Lease.Serials
	}
	total, counted := serials.Count()
	if !counted || total != g.Quantity() || n <= 0 || n > maxUnmade {
		return nil // more serials than units: nobody can say which of them were meant
	}
	var out []string
	for serial := range serials.All {
		if seen[serial] {
			continue
		}
		away := false
		for i := range elsewhere {
			away = away || elsewhere[i].Has(serial)
		}
		if !away {
			out = append(out, serial)
		}
	}
	return out
}

func (a *app) printReport(r *order.Report) error {
	if a.json {
		return a.printJSON(r)
	}
	rows := [][]string{{"Order", r.Grant}, {"  ordered", fmt.Sprint(r.Ordered)}}
	for _, c := range []struct {
		name string
		n    int64
		show bool
	}{{"minted", r.Minted, true}, {"stamped", r.Stamped, true}, {"verified", r.Verified, true}, {"sealed", r.Sealed, true}, {"exported", r.Exported, true},
		{"voided", r.Voided, r.Voided > 0}, {"scrapped", r.Scrapped, r.Scrapped > 0}, {"reworked", r.Reworked, r.Reworked > 0},
		{"returned", r.Returned, r.Returned > 0}, {"not made", r.UnmadeCount, r.UnmadeCount > 0}, {"refused", int64(len(r.Refused)), len(r.Refused) > 0}} {
		if c.show {
			rows = append(rows, []string{"  " + c.name, fmt.Sprint(c.n)})
		}
	}
	for _, l := range r.Leases {
		state := fmt.Sprintf("%d of %d used", l.Used, l.Quantity)
		if l.Used < 0 {
			state = fmt.Sprintf("%d, not returned", l.Quantity)
		}
		rows = append(rows, []string{"  lease " + l.Lease, state})
	}
	if err := a.table(nil, rows); err != nil {
		return err
	}
	var gaps [][]string
	for _, m := range r.Missing {
		gaps = append(gaps, []string{m.Serial, m.State, m.Reason})
	}
	for _, s := range r.Unmade {
		gaps = append(gaps, []string{s, "not made", ""})
	}
	for _, x := range r.Refused {
		gaps = append(gaps, []string{orDash(x.Serial), "refused: " + x.Kind, x.Why})
	}
	if gaps == nil {
		return nil
	}
	fmt.Fprintln(a.out)
	return a.table([]string{"SERIAL", "STATE", "REASON"}, gaps)
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func newOrderPermit(a *app) *cobra.Command {
	var uri, key, out, reason string
	var revision int64
	c := &cobra.Command{
		Use: "permit ORDER SERIAL… --reason TEXT --store URI --key NAME --out FILE", Short: "Permit an order to replace scrapped units", Args: cobra.MinimumNArgs(2),
		Long: `permit is the owner's word that scrapped units were seen destroyed: with it touchmark unit return gives them back to their
order, which may then make others.`,
		Example: "  touchmark order permit PO-1234 SN00007 SN00019 --reason 'shredded, certificate 77' --store file:office --key owner --out permit",
		RunE: func(cmd *cobra.Command, args []string) error {
			p := &order.Permit{Version: 1, Order: args[0], At: time.Now().UTC().Truncate(time.Second), Reason: reason}
			for _, serial := range args[1:] {
				p.Units = append(p.Units, order.PermitUnit{Serial: serial, Revision: revision})
			}
			return a.signWith(cmd.Context(), uri, key, func(k hsm.SigningKey) error {
				b, err := p.Sign(k)
				if err != nil {
					return err
				}
				return writeFile(out, append(b, '\n'), 0o644, false)
			})
		},
	}
	signFlags(c, &uri, &key, &out)
	c.Flags().Int64Var(&revision, "revision", 0, "revision of the units that were destroyed (touchmark unit show)")
	c.Flags().StringVar(&reason, "reason", "", "how it is known that they are destroyed (required)")
	_ = c.MarkFlagRequired("reason")
	return c
}
