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
	return parent("ledger", "Look into a line's journal, verify it, and prove what is in it", append(a.ledgerProofs(), showCmd, verifyCmd)...)
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

// exists reports whether there is anything at a path.
func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}
