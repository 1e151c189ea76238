package main

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"time"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/pkg/ledger"
)

type ledgerOptions struct {
	line, serial string
	trust        string
}

func newLedger(a *app) *cobra.Command {
	show, verify := &ledgerOptions{}, &ledgerOptions{}
	showCmd := &cobra.Command{
		Use: "show --line DIR", Short: "Show the units of a line, oldest first", Args: cobra.NoArgs,
		Long: "show lists every living unit with its state. It may run while the line is at work.",
		Example: `  touchmark ledger show --line line-3
  touchmark ledger show --line line-3 --serial SN0001 --json`,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.runLedgerShow(cmd.Context(), show) },
	}
	lineFlag(showCmd, &show.line)
	showCmd.Flags().StringVar(&show.serial, "serial", "", "show the unit of this serial only")
	verifyCmd := &cobra.Command{
		Use: "verify --line DIR", Short: "Prove that nothing in a ledger was changed", Args: cobra.NoArgs,
		Long: `verify hashes every entry of the ledger again, up to the root that the station key signed, and holds the table of units
against them. It ends with exit code 5 when anything does not fit.`,
		Example: `  touchmark ledger verify --line line-3`,
		RunE:    func(cmd *cobra.Command, _ []string) error { return a.runLedgerVerify(cmd.Context(), verify) },
	}
	lineFlag(verifyCmd, &verify.line)
	verifyCmd.Flags().StringVar(&verify.trust, "trust", "", "PEM file with the station's public key (default: the line's station.pem)")
	return parent("ledger", "Look into a line's journal, verify it, and prove what is in it", append(a.ledgerProofs(), showCmd, verifyCmd, newLedgerAnchor(a))...)
}

func (a *app) runLedgerShow(ctx context.Context, o *ledgerOptions) (err error) {
	l, err := a.loadLine(o.line)
	if err != nil {
		return err
	}
	led, err := ledger.View(ctx, l.path(ledgerFile))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, led.Close()) }()
	jobs, err := led.Jobs(ctx)
	if err != nil {
		return err
	}
	profile := make(map[int64]string)
	for _, j := range jobs {
		profile[j.ID] = j.Profile
	}
	type row struct {
		ledger.Unit
		KeyHash string `json:"keyHash,omitempty"`
		Profile string `json:"profile"`
	}
	var rows [][]string
	show := func(u ledger.Unit) error {
		r := row{u, fmt.Sprintf("%x", u.KeyHash), profile[u.Job]}
		if a.json {
			return a.printJSON(r)
		}
		rows = append(rows, []string{u.Serial, u.RegistrationID, u.State.String(), r.Profile, u.At.Format(time.RFC3339), r.KeyHash[:min(16, len(r.KeyHash))]})
		return nil
	}
	if o.serial != "" {
		u, err := led.Find(ctx, o.serial)
		if err != nil {
			return err
		}
		if err := show(u); err != nil {
			return err
		}
	} else {
		for u, err := range led.Units(ctx, 0) {
			if err != nil {
				return err
			}
			if err := show(u); err != nil {
				return err
			}
		}
	}
	if a.json {
		return nil
	}
	return a.table([]string{"SERIAL", "REGISTRATION ID", "STATE", "PROFILE", "SINCE", "KEY"}, rows)
}

func (a *app) runLedgerVerify(ctx context.Context, o *ledgerOptions) error {
	return a.withLedger(ctx, o.line, o.trust, func(led *ledger.Ledger, station crypto.PublicKey) error {
		// What stays is one block of memory without pointers, a line a unit, which costs nothing to look through for garbage.
		debug.SetGCPercent(30)
		report, err := led.Verify(ctx, station)
		if err != nil {
			return err
		}
		if a.json {
			return a.printJSON(report)
		}
		return a.table(nil, [][]string{
			{"Ledger", led.Path(), a.paint(a.out, "32", "verifies")},
			{"  entries", fmt.Sprint(report.Entries)},
			{"  units", fmt.Sprint(report.Units)},
			{"  voided", fmt.Sprint(report.Voided)},
			{"  scrapped", fmt.Sprint(report.Scrapped)},
			{"  reworked", fmt.Sprint(report.Reworked)},
			{"  root", report.Checkpoint.Root},
		})
	})
}

func newLedgerAnchor(a *app) *cobra.Command {
	var dir string
	c := &cobra.Command{
		Use: "anchor --line DIR", Short: "Tie a ledger to a counter in its token or TPM, once", Args: cobra.NoArgs,
		Long: `anchor makes the counter that orders.counter of touchmark.toml names, in the line's token (or in orders.counter-store, a token or a TPM),
and ties the ledger to it. From then on a ledger that was copied, or restored from a backup, is refused: the counter has gone
on without it. Key files keep no counters, so a line whose keys are in files can be copied with its ledger.`,
		Example: "  touchmark ledger anchor --line line-3",
		RunE: func(cmd *cobra.Command, _ []string) error {
			l, err := a.loadLine(dir)
			if err != nil {
				return err
			}
			if l.Orders.Counter == "" {
				return hint(usageError{errors.New("the line names no counter")}, "write counter = \"%s\" into the table [orders] of %s first", l.Name, l.path(lineFile))
			}
			return a.anchor(cmd.Context(), l)
		},
	}
	lineFlag(c, &dir)
	return c
}

// anchor makes the line's counter and ties its ledger to it.
func (a *app) anchor(ctx context.Context, l *line) (err error) {
	name := l.Orders.Counter
	plain := *l
	plain.Orders.Counter = ""
	f, err := a.openFloor(ctx, &plain)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if is, err := f.ledger.Anchored(ctx); err != nil || is {
		return errors.Join(err, fmt.Errorf("%w: the ledger has one already", ledger.ErrAnchor))
	}
	store, err := f.counterStore(ctx)
	if err != nil {
		return err
	}
	counter, err := store.CreateCounter(ctx, name)
	if errors.Is(err, hsm.ErrExists) {
		// It could be that of the ledger that this one was copied from.
		return hint(fmt.Errorf("making the counter %q: %w", name, err), "choose another name; touchmark token counter delete takes away one that no ledger is tied to")
	}
	if err != nil {
		return fmt.Errorf("making the counter %q: %w", name, err)
	}
	if err := f.ledger.Anchor(ctx, counter); err != nil {
		return err
	}
	a.note("the ledger of %s is tied to counter %q", l.Name, name)
	return nil
}

// exists reports whether there is anything at a path.
func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}
