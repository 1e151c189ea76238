package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/pkg/bundle"
	"github.com/touchmark/touchmark/pkg/ledger"
	"github.com/touchmark/touchmark/pkg/mint"
)

type exportOptions struct {
	line, profile, order, out, recipient string
	all                                  bool
}

func newBundleExport(a *app) *cobra.Command {
	o := &exportOptions{}
	c := &cobra.Command{
		Use: "export --line DIR --profile NAME --out FILE", Short: "Write the bundle of what a station finished", Args: cobra.NoArgs,
		Long: `export writes a bundle with the units of a profile, and of an order where the line works by orders, that are finished and in no
bundle yet, and with all that were reworked, scrapped, voided or returned. mint writes its own; this is for stations, at the end
of a shift or a day.

--all takes what was exported before as well, for an operator who lost a bundle. A bundle is imported again without harm.`,
		Example: "  touchmark bundle export --line line-3 --profile x509-group --order PO-1234 --out monday.tmb",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.onFloor(cmd.Context(), o.line, func(f *floor) error { return f.export(cmd.Context(), o) })
		},
	}
	lineFlag(c, &o.line)
	f := c.Flags()
	f.StringVar(&o.profile, "profile", "", "the profile that the units were made with (required)")
	f.StringVar(&o.order, "order", "", "the order, or lease, that they were made on: its ID")
	f.StringVar(&o.out, "out", "", "bundle to write (required)")
	f.StringVar(&o.recipient, "recipient", "", "age recipient that secrets in the bundle are sealed to (the service prints its own)")
	f.BoolVar(&o.all, "all", false, "also what other bundles have")
	_ = c.MarkFlagRequired("profile")
	_ = c.MarkFlagRequired("out")
	return c
}

func (f *floor) export(ctx context.Context, o *exportOptions) error {
	p, hash, err := f.profile(o.profile)
	if err != nil {
		return err
	}
	if o.order == "" && f.Orders.Required {
		return usageError{fmt.Errorf("line %s works by production orders: say which one with --order", f.Name)}
	}
	g, err := f.grant(ctx, o.order)
	if err != nil {
		return err
	}
	if err := f.covers(g, p, hash); err != nil {
		return err
	}
	recipients, err := parseRecipients(o.recipient)
	if err != nil {
		return err
	}
	if p.HasSecrets() && recipients == nil {
		return usageError{fmt.Errorf("the bundle of profile %s carries device keys: name whom they are for with --recipient", p.Name)}
	}
	cfg, err := f.mintConfig(ctx, p, mint.ShiftList(p))
	if err != nil {
		return err
	}
	cfg.Grant = g
	info := map[string]string{"line": f.Name, "profile": p.Name}
	w, err := bundle.NewWriter(bundle.WriterConfig{Path: o.out, IDScope: f.IDScope, Created: time.Now(), Signer: f.station, Recipients: recipients, Info: info})
	if err != nil {
		return err
	}
	defer w.Abort()
	if g != nil {
		w.SetGrant(g.Document)
	}
	states := []ledger.State{ledger.Sealed}
	if o.all {
		states = append(states, ledger.Exported)
	}
	ids, err := mint.Export(ctx, cfg, states, w.Add)
	if err != nil {
		return err
	}
	// The bundle is durable before the ledger says that its units left. A crash in between has the next bundle hold them again,
	// which import takes for what it is.
	sum, err := f.a.finishBundle(ctx, w, f.ledger)
	if err != nil {
		return err
	}
	if err := mint.Exported(ctx, f.ledger, ids, sum.ID); err != nil {
		return partialError{error: err}
	}
	if f.a.json {
		return f.a.printJSON(map[string]any{"bundle": sum, "units": len(ids), "bundleFile": o.out})
	}
	return f.a.table(nil, [][]string{{"Bundle", o.out}, {"  units", fmt.Sprint(len(ids))}, {"  endings", fmt.Sprint(sum.Counts.Retired)}, {"  ID", sum.ID}})
}
