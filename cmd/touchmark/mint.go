package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"filippo.io/age"
	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/sealing"
	"github.com/touchmark/touchmark/hsm/tpm"
	"github.com/touchmark/touchmark/pkg/bundle"
	"github.com/touchmark/touchmark/pkg/evidence"
	"github.com/touchmark/touchmark/pkg/ledger"
	"github.com/touchmark/touchmark/pkg/mint"
)

type mintOptions struct {
	line, profile, serials, out, bundle, recipient, order, operator string
	jobs                                                            int
}

func newMint(a *app) *cobra.Command {
	o := &mintOptions{}
	c := &cobra.Command{
		Use:   "mint --line DIR --profile NAME --serials FILE",
		Short: "Make one identity per serial, stamp it, and put the news in a bundle",
		Long: `mint reads a list of serials (CSV with a header, column "serial") and makes one identity for each: a key and certificate,
or a derived key. It stamps them into a directory per device, reads each back, and writes a signed bundle for the service.

Run it again after a crash, a full disk or a pulled token: the same profile and list are the same job, which goes on
where it stopped. A serial never gets two identities.`,
		Example: `  touchmark mint --line line-3 --profile x509-group --serials serials.csv --out stamps --bundle monday.tmb
  generate-serials | touchmark mint --line line-3 --profile symmetric-group --serials - --bundle monday.tmb --json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.runMint(cmd.Context(), o) },
	}
	f := c.Flags()
	lineFlag(c, &o.line)
	f.StringVar(&o.profile, "profile", "", "what to make: a profile of the line (required)")
	f.StringVar(&o.serials, "serials", "", "the list of serials, a CSV file, or - for standard input (required)")
	f.StringVar(&o.out, "out", "", "directory that stamps go to, a directory per device")
	f.StringVar(&o.bundle, "bundle", "", "bundle to write")
	f.StringVar(&o.recipient, "recipient", "", "age recipient that secrets in the bundle are sealed to (the service prints its own)")
	f.StringVar(&o.order, "order", "", "the production order that is worked on: its file, or its ID once it was taken")
	f.StringVar(&o.operator, "operator", "", "who works; for the ledger")
	_ = c.MarkFlagFilename("order")
	f.IntVar(&o.jobs, "jobs", 0, "groups of devices to work on at once (default: one more than processors)")
	_ = c.MarkFlagRequired("profile")
	_ = c.MarkFlagRequired("serials")
	_ = c.MarkFlagFilename("serials", "csv")
	_ = c.MarkFlagDirname("out")
	_ = c.RegisterFlagCompletionFunc("profile", func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		l, err := a.loadLine(o.line)
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return l.profileNames(), cobra.ShellCompDirectiveNoFileComp
	})
	return c
}

// mintResult is what mint prints.
type mintResult struct {
	Profile string          `json:"profile"`
	Devices int             `json:"devices"`
	Minted  int             `json:"minted"`
	Before  int             `json:"before"`
	Voided  int             `json:"voided"`
	Absent  int             `json:"absent"` // units minted before whose stamps are not in Out any more
	Resumed bool            `json:"resumed"`
	Out     string          `json:"out,omitempty"`
	Bundle  *bundle.Summary `json:"bundle,omitempty"`
	Path    string          `json:"bundleFile,omitempty"`
	Seconds float64         `json:"seconds"`
}

func (a *app) runMint(ctx context.Context, o *mintOptions) (err error) {
	start := time.Now()
	if o.jobs < 0 {
		return usageError{fmt.Errorf("--jobs %d: want 1 or more", o.jobs)}
	}
	l, err := a.loadLine(o.line)
	if err != nil {
		return err
	}
	p, hash, err := l.profile(o.profile)
	if err != nil {
		return err
	}
	list, err := a.readSerials(o.serials, p)
	if err != nil {
		return err
	}
	recipients, err := parseRecipients(o.recipient)
	if err != nil {
		return err
	}
	if p.HasSecrets() && o.bundle != "" && recipients == nil {
		return hint(usageError{fmt.Errorf("the bundle of profile %s carries device keys: name whom they are for with --recipient", p.Name)},
			"touchmark serve prints the service's own, and keeps it in recipient.txt of its data directory")
	}
	if o.out != "" {
		if o.out, err = filepath.Abs(o.out); err != nil {
			return err
		}
	}
	if o.bundle != "" {
		if o.bundle, err = filepath.Abs(o.bundle); err != nil {
			return err
		}
	}
	f, err := a.openFloor(ctx, l)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	led := f.ledger
	g, err := f.grant(ctx, o.order)
	if err != nil {
		return err
	}
	if g != nil {
		defer func() {
			if refusalKind(err) != "" {
				f.refuse(ctx, g, "", err)
			}
		}()
	}
	if err := l.covers(g, p, hash); err != nil {
		return err
	}
	if err := f.notLeased(ctx, g, list); err != nil {
		return err
	}
	cfg, err := f.mintConfig(ctx, p, list)
	if err != nil {
		return err
	}
	cfg.Grant, cfg.Operator, cfg.Out, cfg.Jobs = g, o.operator, o.out, o.jobs
	progress := a.newProgress("minting", len(list.Rows))
	cfg.Progress = progress.step
	defer progress.clear()
	run, err := mint.Begin(ctx, cfg)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, run.Close()) }()
	res := mintResult{Profile: p.Name, Devices: len(list.Rows), Out: o.out}
	sink := func(*bundle.Entry) error { return nil }
	var w *bundle.Writer
	if o.bundle != "" {
		// The bundle's content follows from the job alone, so it is written anew by whichever run finishes the job. Another
		// job's bundle is somebody's only one.
		job := hex.EncodeToString(run.Job().Digest)
		if err := ownBundle(o.bundle, job); err != nil {
			return err
		}
		if w, err = bundle.NewWriter(bundle.WriterConfig{
			Path: o.bundle, Overwrite: true, IDScope: l.IDScope, Created: run.Job().Started, Signer: f.station, Recipients: recipients,
			Info: map[string]string{"line": l.Name, "profile": p.Name, "job": job},
		}); err != nil {
			return err
		}
		defer w.Abort()
		if g != nil {
			w.SetGrant(g.Document)
		}
		sink = w.Add
	}
	summary, err := run.Mint(ctx, sink)
	res.Minted, res.Before, res.Voided, res.Absent = summary.Minted, summary.Before, summary.Voided, summary.Absent
	res.Resumed = summary.Resumed && summary.Before > 0
	progress.clear()
	if err != nil {
		for range led.Units(context.WithoutCancel(ctx), run.Job().ID) {
			// Something of this job is in the ledger.
			return partialError{err, fmt.Sprintf("%d of %d devices are done", summary.Before+summary.Minted, len(list.Rows))}
		}
		var dup *ledger.DuplicateError
		if errors.As(err, &dup) {
			return hint(err, "touchmark ledger show --line %s --serial %s tells more", l.dir, dup.Unit.Serial)
		}
		return err
	}
	if w != nil {
		sum, err := a.finishBundle(ctx, w, led)
		if err != nil {
			return partialError{error: err}
		}
		res.Bundle, res.Path = &sum, o.bundle
		if err := mint.Exported(ctx, led, summary.Units, sum.ID); err != nil {
			return partialError{error: err}
		}
	}
	res.Seconds = time.Since(start).Seconds()
	if a.json {
		return a.printJSON(res)
	}
	return a.printMint(&res)
}

// parseRecipients reads whom secrets are sealed to; nobody where it is empty.
func parseRecipients(text string) ([]age.Recipient, error) {
	if text == "" {
		return nil, nil
	}
	r, err := sealing.ParseRecipient(strings.TrimSpace(text))
	if err != nil {
		return nil, usageError{fmt.Errorf("--recipient: %w", err)}
	}
	return []age.Recipient{r}, nil
}

// attestTPM has a TPM prove that a key lives in it.
func attestTPM(ctx context.Context, store hsm.Store, kind tpm.EKType, key, registrationID string) (*evidence.Evidence, error) {
	t, ek, err := endorsementKey(ctx, store, kind)
	if err != nil {
		return nil, err
	}
	proof, err := t.Attest(ctx, ek, key, registrationID)
	if err != nil {
		return nil, err
	}
	return evidence.OfTPM(proof)
}

// endorsementKey returns the endorsement key of the TPM that a store is: of that kind, or RSA where the TPM has no other.
func endorsementKey(ctx context.Context, store hsm.Store, kind tpm.EKType) (*tpm.Store, *tpm.EK, error) {
	t, ok := store.(*tpm.Store)
	if !ok {
		return nil, nil, fmt.Errorf("%s is no TPM: %w", store.URI(), hsm.ErrUnsupported)
	}
	ek, err := t.EK(ctx, kind)
	if errors.Is(err, hsm.ErrUnsupported) && kind != tpm.EKRSA {
		ek, err = t.EK(ctx, tpm.EKRSA)
	}
	return t, ek, err
}

func endorsementOf(ctx context.Context, store hsm.Store, kind tpm.EKType) (ek, srk []byte, err error) {
	t, key, err := endorsementKey(ctx, store, kind)
	if err != nil {
		return nil, nil, err
	}
	srk, _, err = t.SRK()
	return key.Public, srk, err
}

// ownBundle refuses to write over anything but an earlier bundle of the job.
func ownBundle(path, job string) error {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if m, _, err := bundle.Describe(f); err == nil && m.Info["job"] == job {
		return nil
	}
	return hint(fmt.Errorf("%s exists already, and is no bundle of this list and profile", path), "name another file with --bundle, or move that one away")
}

func (a *app) finishBundle(ctx context.Context, w *bundle.Writer, led *ledger.Ledger) (bundle.Summary, error) {
	checkpoint, err := led.Checkpoint(ctx)
	if err != nil {
		return bundle.Summary{}, err
	}
	w.SetCheckpoint(checkpoint)
	return w.Close()
}

func (a *app) printMint(res *mintResult) error {
	rows := [][]string{
		{"Profile", res.Profile},
		{"Devices", fmt.Sprint(res.Devices)},
		{"  minted now", fmt.Sprint(res.Minted)},
	}
	if res.Before > 0 {
		rows = append(rows, []string{"  minted before", fmt.Sprint(res.Before)})
	}
	if res.Voided > 0 {
		rows = append(rows, []string{"  voided", fmt.Sprintf("%d (keys lost in a crash; their serials have new ones)", res.Voided)})
	}
	if res.Absent > 0 {
		rows = append(rows, []string{"  stamps not here", fmt.Sprintf("%d (moved away since they were minted; a key is never made twice)", res.Absent)})
	}
	if res.Out != "" {
		rows = append(rows, []string{"Stamps", res.Out})
	}
	if res.Path != "" {
		rows = append(rows, []string{"Bundle", res.Path})
	}
	rows = append(rows, []string{"Time", fmt.Sprintf("%.1f s", res.Seconds)})
	return a.table(nil, rows)
}

func (a *app) readSerials(path string, p *mint.Profile) (*mint.List, error) {
	var in io.Reader = a.in
	name := "standard input"
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return nil, usageError{fmt.Errorf("reading the serials: %w", err)}
		}
		defer f.Close()
		in, name = f, path
	}
	list, err := mint.ReadList(name, in, p)
	if err != nil {
		return nil, usageError{err}
	}
	return list, nil
}
