package main

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ed25519"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/pkg/ledger"
)

// ledgerProof says what to prove, or to hold against what.
type ledgerProof struct {
	line, out, trust        string
	checkpoint, since, with string
	key, name, state        string
	witnesses               []string
	force, first            bool
}

// ledgerProofs are the commands that prove something about a ledger, or check it.
func (a *app) ledgerProofs() []*cobra.Command {
	prove, check, compare, export, checkpoint, cosign := &ledgerProof{}, &ledgerProof{}, &ledgerProof{}, &ledgerProof{}, &ledgerProof{}, &ledgerProof{}
	out := func(c *cobra.Command, o *ledgerProof, what string) {
		c.Flags().StringVar(&o.out, "out", "-", "file for "+what+", or - for standard output")
		c.Flags().BoolVar(&o.force, "force", false, "overwrite the file")
	}
	trust := func(c *cobra.Command, o *ledgerProof, usage string) {
		c.Flags().StringVar(&o.trust, "trust", "", "PEM file with the station's public key"+usage)
	}
	proveCmd := &cobra.Command{
		Use: "prove SERIAL --line DIR", Short: "Prove what a ledger says of a serial, to somebody who does not have the ledger", Args: cobra.ExactArgs(1),
		Long: `prove writes a file that shows every entry of the ledger about a serial: when its identity was begun, minted, verified and
exported, its certificate, and how it ended. Whoever has the station's public key checks it with touchmark ledger check.

A proof shows what is in the ledger. It cannot show what is not: entries may be left out of it, such as the one that a
unit was scrapped by, and later ones are not in it.`,
		Example: "  touchmark ledger prove SN0001 --line line-3 --out sn0001.proof\n  touchmark ledger check sn0001.proof --trust line-3/station.pem",
		RunE:    func(cmd *cobra.Command, args []string) error { return a.runLedgerProve(cmd.Context(), args[0], prove) },
	}
	lineFlag(proveCmd, &prove.line)
	out(proveCmd, prove, "the proof")
	proveCmd.Flags().StringVar(&prove.checkpoint, "checkpoint", "", "prove it under this checkpoint, such as one that witnesses cosigned (default: the newest)")
	checkCmd := &cobra.Command{
		Use: "check FILE --trust PEM", Short: "Check a proof or a checkpoint with the station's public key alone", Args: cobra.ExactArgs(1),
		Long: `check takes what touchmark ledger prove, checkpoint or cosign wrote. It needs no ledger and no line. With --since it also
checks that the ledger extends an older checkpoint, for which the newer one must have been written with --since, too. With
--witness it wants the checkpoint to be cosigned by that witness.`,
		Example: `  touchmark ledger check sn0001.proof --trust line-3/station.pem
  touchmark ledger check tuesday.checkpoint --trust line-3/station.pem --since monday.checkpoint --witness office.example.com/w1=office.pem`,
		RunE: func(_ *cobra.Command, args []string) error { return a.runLedgerCheck(args[0], check) },
	}
	trust(checkCmd, check, " (required)")
	_ = checkCmd.MarkFlagRequired("trust")
	checkCmd.Flags().StringVar(&check.since, "since", "", "an older checkpoint that this one must extend")
	checkCmd.Flags().StringArrayVar(&check.witnesses, "witness", nil, "NAME=PEM: a witness that must have cosigned, and its public key; may be repeated")
	compareCmd := &cobra.Command{
		Use: "compare --line DIR (--with OTHER | --checkpoint FILE)", Short: "Tell whether a ledger lost or changed what another copy, or an older checkpoint, has", Args: cobra.NoArgs,
		Long: `compare holds a line's ledger against another copy of it, or against a checkpoint that somebody kept: a witness, or whoever
took it out of a bundle (tar -xf monday.tmb checkpoint.txt), or the one in a proof. It says whether they are the same, whether the
line's extends the other, whether it was rolled back, or at which entry they part. It looks at hashes only, in no time;
touchmark ledger verify tells whether the entries are theirs.`,
		Example: "  touchmark ledger compare --line line-3 --with /mnt/backup/line-3\n  touchmark ledger compare --line line-3 --checkpoint monday.checkpoint",
		RunE:    func(cmd *cobra.Command, _ []string) error { return a.runLedgerCompare(cmd.Context(), compare) },
	}
	lineFlag(compareCmd, &compare.line)
	trust(compareCmd, compare, " (default: the line's station.pem)")
	compareCmd.Flags().StringVar(&compare.with, "with", "", "the other copy: a line's directory, or the file itself")
	compareCmd.Flags().StringVar(&compare.checkpoint, "checkpoint", "", "file with a checkpoint or a proof")
	compareCmd.MarkFlagsMutuallyExclusive("with", "checkpoint")
	compareCmd.MarkFlagsOneRequired("with", "checkpoint")
	exportCmd := &cobra.Command{
		Use: "export --line DIR", Short: "Print every entry of a ledger, decoded, as JSON, one per line", Args: cobra.NoArgs,
		Long: `export prints the ledger for audit. Every entry has "entry" (its index), "kind", "at" and "hash" (RFC 6962, base64); further
members by kind, left out where they are empty:

  begun, minted, stamped, verified, sealed, exported, voided, scrapped, reworked, returned
                unit, count (of units with the IDs from there on), job, serial, registrationId, revision, keyHash,
                endorsementKeyHash, certificate (DER, base64), bundle, ending (reason, operator, note, certificate, proof)
  job           job, profile, operator, out, grant, digest
  grant         grant, quantity, opens, ends, digest (of its document)
  lease         lease, grant, quantity, digest
  lease-return  lease, grant, used, digest
  grant-close   grant
  anchor        counter
  note          note (its kind), unit
  any           data (base64): what an entry holds beyond that

Numbers and names are as they were written: it does not verify the ledger first. touchmark ledger verify does.`,
		Example: "  touchmark ledger export --line line-3 > line-3.jsonl",
		RunE:    func(cmd *cobra.Command, _ []string) error { return a.runLedgerExport(cmd.Context(), export) },
	}
	lineFlag(exportCmd, &export.line)
	checkpointCmd := &cobra.Command{
		Use: "checkpoint --line DIR", Short: "Print a ledger's signed checkpoint, for somebody else to keep", Args: cobra.NoArgs,
		Long: `checkpoint prints how long the ledger is and its root hash, signed by the station (C2SP tlog-checkpoint). Whoever keeps it can
tell later whether anything before it changed. With --since the proof that it extends an older one stands before it, in the form
that witnesses take (C2SP tlog-witness).`,
		Example: "  touchmark ledger checkpoint --line line-3 --out monday.checkpoint\n  touchmark ledger checkpoint --line line-3 --since monday.checkpoint --out tuesday.checkpoint",
		RunE:    func(cmd *cobra.Command, _ []string) error { return a.runLedgerCheckpoint(cmd.Context(), checkpoint) },
	}
	lineFlag(checkpointCmd, &checkpoint.line)
	out(checkpointCmd, checkpoint, "the checkpoint")
	checkpointCmd.Flags().StringVar(&checkpoint.since, "since", "", "an older checkpoint to prove it from, such as the last one that a witness cosigned")
	cosignCmd := &cobra.Command{
		Use: "cosign CHECKPOINT --trust PEM --name NAME --key URI --state FILE", Short: "Vouch, as a witness, that a ledger only grew", Args: cobra.ExactArgs(1),
		Long: `cosign adds a witness's line to a checkpoint (C2SP tlog-cosignature), after checking the station's signature and that the
checkpoint extends the last one that this witness saw, which it keeps in the state file. It refuses one that goes back or another way.
A witness is somebody other than the station: the office, the customer. Its key is an Ed25519 key that signs nothing else.`,
		Example: `  touchmark key new --line office --name witness --algorithm Ed25519
  touchmark ledger cosign monday.checkpoint --trust line-3/station.pem --name office.example.com/w1 --key 'file:office/keys?object=witness' --state witness.json --first`,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.runLedgerCosign(cmd.Context(), args[0], cosign)
		},
	}
	trust(cosignCmd, cosign, " (required)")
	cosignCmd.Flags().StringVar(&cosign.name, "name", "", "the witness's name, by custom a URL without its scheme (required)")
	cosignCmd.Flags().StringVar(&cosign.key, "key", "", "key URI of the witness's key (required)")
	cosignCmd.Flags().StringVar(&cosign.state, "state", "", "file with what the witness saw last of each ledger (required)")
	cosignCmd.Flags().BoolVar(&cosign.first, "first", false, "this is the first checkpoint of its ledger that this witness sees")
	out(cosignCmd, cosign, "the cosigned checkpoint")
	for _, name := range []string{"trust", "name", "key", "state"} {
		_ = cosignCmd.MarkFlagRequired(name)
	}
	return []*cobra.Command{proveCmd, checkCmd, compareCmd, exportCmd, checkpointCmd, cosignCmd}
}

// withLedger opens the ledger of a line for reading, with the key that its checkpoints are signed with.
func (a *app) withLedger(ctx context.Context, dir, trust string, f func(*ledger.Ledger, crypto.PublicKey) error) (err error) {
	l, err := a.loadLine(dir)
	if err != nil {
		return err
	}
	if trust == "" {
		trust = l.path(stationFile)
	}
	station, err := readPublicKey(trust)
	if err != nil {
		return err
	}
	led, err := ledger.View(ctx, l.path(ledgerFile))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, led.Close()) }()
	return f(led, station)
}

// readProof reads a proof or a checkpoint.
func readProof(path string) ([]byte, error) {
	const most = 4 << 20
	st, err := os.Stat(path)
	if err == nil && st.Size() > most {
		err = fmt.Errorf("%s is larger than %d octets", path, most)
	}
	var b []byte
	if err == nil {
		b, err = os.ReadFile(path)
	}
	if err != nil {
		return nil, usageError{err}
	}
	return b, nil
}

// readCheckpoint reads a checkpoint of a station out of a checkpoint's file or a proof.
func readCheckpoint(path string, station crypto.PublicKey) (c ledger.Checkpoint, signed []byte, err error) {
	b, err := readProof(path)
	if err != nil {
		return c, nil, err
	}
	if bytes.HasPrefix(b, []byte("{")) {
		var st ledger.Statement
		st, err = ledger.VerifyProof(b, station)
		c = st.Checkpoint
	} else {
		var cons *ledger.Consistency
		if cons, err = ledger.ParseConsistency(b); err == nil {
			signed = cons.Checkpoint
			c, err = ledger.OpenCheckpoint(signed, station)
		}
	}
	if err != nil {
		err = unverified(path, err)
	}
	return c, signed, err
}

// unverified marks what is wrong with a proof or a checkpoint.
func unverified(path string, err error) error {
	if errors.Is(err, ledger.ErrStation) || errors.Is(err, ledger.ErrProof) || errors.Is(err, ledger.ErrForked) || errors.Is(err, ledger.ErrRolledBack) {
		return fmt.Errorf("checking %s: %w", path, err)
	}
	return fmt.Errorf("checking %s: %w: %w", path, ledger.ErrProof, err)
}

// printFile writes a file, or standard output.
func (a *app) printFile(o *ledgerProof, b []byte) error {
	if o.out != "-" {
		return writeFile(o.out, b, 0o644, o.force)
	}
	_, err := a.out.Write(b)
	return err
}

func (a *app) runLedgerProve(ctx context.Context, serial string, o *ledgerProof) error {
	return a.withLedger(ctx, o.line, "", func(led *ledger.Ledger, station crypto.PublicKey) error {
		var p *ledger.Proof
		var signed []byte
		var err error
		if o.checkpoint != "" {
			if _, signed, err = readCheckpoint(o.checkpoint, station); err == nil && signed == nil {
				err = usageError{fmt.Errorf("%s is a proof: want a checkpoint", o.checkpoint)}
			}
			if err != nil {
				return err
			}
			p, err = led.ProveAt(ctx, serial, signed)
		} else {
			p, err = led.Prove(ctx, serial)
		}
		if err != nil {
			return err
		}
		b, err := p.Encode()
		if err != nil {
			return err
		}
		if _, err := ledger.VerifyProof(b, station); err != nil {
			return err
		}
		return a.printFile(o, b)
	})
}

func (a *app) runLedgerCheck(path string, o *ledgerProof) error {
	station, err := readPublicKey(o.trust)
	if err != nil {
		return err
	}
	witnesses, err := parseWitnesses(o.witnesses)
	if err != nil {
		return err
	}
	b, err := readProof(path)
	if err != nil {
		return err
	}
	var r struct {
		Checkpoint   ledger.Checkpoint    `json:"checkpoint"`
		Cosignatures []ledger.Cosignature `json:"cosignatures,omitempty"`
		Statement    *ledger.Statement    `json:"statement,omitempty"`
		Since        *ledger.Checkpoint   `json:"since,omitempty"`
	}
	rows := [][]string{{"Checkpoint", path, a.paint(a.out, "32", "is signed by the station")}}
	var signed []byte
	if bytes.HasPrefix(b, []byte("{")) {
		st, err := ledger.VerifyProof(b, station)
		if err != nil {
			return unverified(path, err)
		}
		if o.since != "" {
			return usageError{fmt.Errorf("--since is for checkpoints: %s is a proof", path)}
		}
		r.Statement, r.Checkpoint = &st, st.Checkpoint
		signed = []byte(st.Note)
		rows = proofRows(st)
		rows[0] = []string{"Proof", path, a.paint(a.out, "32", "holds")}
	} else {
		c, err := ledger.ParseConsistency(b)
		if err == nil {
			signed = c.Checkpoint
			r.Checkpoint, err = ledger.OpenCheckpoint(signed, station)
		}
		if err != nil {
			return unverified(path, err)
		}
		if o.since != "" {
			old, _, err := readCheckpoint(o.since, station)
			if err != nil {
				return err
			}
			if _, err := ledger.CheckConsistency(old, c, station); err != nil {
				return hint(unverified(path, err), "touchmark ledger checkpoint --since %s writes one with the proof that it takes", o.since)
			}
			r.Since = &old
		}
	}
	if r.Cosignatures, err = checkWitnesses(signed, witnesses); err != nil {
		return unverified(path, err)
	}
	if a.json {
		return a.printJSON(r)
	}
	rows = append(rows, []string{"  ledger", r.Checkpoint.Origin}, []string{"  entries", fmt.Sprint(r.Checkpoint.Size)}, []string{"  root", r.Checkpoint.Root})
	if r.Since != nil {
		rows = append(rows, []string{"  extends", fmt.Sprintf("%s of %d entries", o.since, r.Since.Size)})
	}
	for _, c := range r.Cosignatures {
		rows = append(rows, []string{"  cosigned", c.At.Format(time.RFC3339), c.Witness})
	}
	if r.Statement != nil {
		rows = append(rows, []string{"  does not show", "that there are no other entries"})
	}
	return a.table(nil, rows)
}

func proofRows(st ledger.Statement) [][]string {
	rows := [][]string{nil, {"  serial", st.Serial}}
	for _, u := range st.Units {
		rows = append(rows, []string{"  registration ID", u.RegistrationID}, []string{"    revision", fmt.Sprint(u.Revision)})
		if u.KeyHash != "" {
			rows = append(rows, []string{"    key", u.KeyHash})
		}
		for _, s := range u.Steps {
			rows = append(rows, []string{"    " + s.State.String(), s.At.Format(time.RFC3339), s.Bundle})
		}
		if u.Ending != nil {
			rows = append(rows, []string{"    because", u.Ending.Reason})
		}
		if u.Certificate != nil {
			rows = append(rows, []string{"    certificate", fmt.Sprintf("%d octets (--json prints it)", len(u.Certificate))})
		}
	}
	return rows
}

// parseWitnesses reads the values of --witness.
func parseWitnesses(named []string) ([]ledger.WitnessKey, error) {
	var keys []ledger.WitnessKey
	for _, w := range named {
		name, path, ok := strings.Cut(w, "=")
		if !ok {
			return nil, usageError{fmt.Errorf("--witness %s: want NAME=PEM", w)}
		}
		pub, err := readPublicKey(path)
		if err != nil {
			return nil, err
		}
		key, ok := pub.(ed25519.PublicKey)
		if !ok {
			return nil, usageError{fmt.Errorf("--witness %s: the key is a %T, want Ed25519", w, pub)}
		}
		keys = append(keys, ledger.WitnessKey{Name: name, Key: key})
	}
	return keys, nil
}

// checkWitnesses wants a checkpoint to be cosigned by every one of the witnesses.
func checkWitnesses(signed []byte, keys []ledger.WitnessKey) ([]ledger.Cosignature, error) {
	got, err := ledger.VerifyCosignatures(signed, keys)
	if err != nil {
		return nil, err
	}
	for _, k := range keys {
		if !slices.ContainsFunc(got, func(c ledger.Cosignature) bool { return c.Witness == k.Name }) {
			return nil, fmt.Errorf("it is not cosigned by %s with that key", k.Name)
		}
	}
	return got, nil
}

func (a *app) runLedgerCompare(ctx context.Context, o *ledgerProof) error {
	return a.withLedger(ctx, o.line, o.trust, func(led *ledger.Ledger, station crypto.PublicKey) (err error) {
		signedBy := func(l *ledger.Ledger) error {
			signed, err := l.Checkpoint(ctx)
			if errors.Is(err, ledger.ErrNotFound) {
				return nil // an empty one, or Compare says what is wrong
			}
			if err == nil {
				_, err = ledger.OpenCheckpoint(signed, station)
			}
			if err != nil {
				return unverified(l.Path(), err)
			}
			return nil
		}
		if err := signedBy(led); err != nil {
			return err
		}
		var c ledger.Comparison
		other := o.checkpoint
		if other != "" {
			old, _, err := readCheckpoint(other, station)
			if err != nil {
				return err
			}
			cons, err := led.Consistency(ctx, old)
			if err != nil {
				return fmt.Errorf("comparing %s with %s: %w", led.Path(), other, err)
			}
			now, err := ledger.CheckConsistency(old, cons, station)
			if err != nil {
				return err
			}
			c = ledger.Comparison{Relation: ledger.Same, Size: now.Size, Other: old.Size, Fork: -1}
			if now.Size > old.Size {
				c.Relation = ledger.Ahead
			}
		} else {
			other = o.with
			if st, err := os.Stat(other); err == nil && st.IsDir() {
				other = filepath.Join(other, ledgerFile)
			}
			twin, err := ledger.View(ctx, other)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, twin.Close()) }()
			if err := signedBy(twin); err != nil {
				return err
			}
			if c, err = ledger.Compare(ctx, led, twin); err == nil {
				err = c.Err()
			}
			if err != nil {
				return fmt.Errorf("comparing %s with %s: %w", led.Path(), other, err)
			}
		}
		if a.json {
			return a.printJSON(c)
		}
		says := map[string]string{ledger.Same: "is the same as", ledger.Ahead: "extends"}[c.Relation]
		return a.table(nil, [][]string{{"Ledger", led.Path(), fmt.Sprintf("%d entries", c.Size)}, {"  " + a.paint(a.out, "32", says), other, fmt.Sprintf("%d entries", c.Other)}})
	})
}

func (a *app) runLedgerExport(ctx context.Context, o *ledgerProof) error {
	return a.withLedger(ctx, o.line, "", func(led *ledger.Ledger, _ crypto.PublicKey) error {
		for e, err := range led.Entries(ctx) {
			if err != nil {
				return err
			}
			if err := a.printJSON(e); err != nil {
				return err
			}
		}
		return nil
	})
}

func (a *app) runLedgerCheckpoint(ctx context.Context, o *ledgerProof) error {
	return a.withLedger(ctx, o.line, "", func(led *ledger.Ledger, station crypto.PublicKey) error {
		b, err := led.Checkpoint(ctx)
		if err == nil {
			_, err = ledger.OpenCheckpoint(b, station)
		}
		if err != nil {
			return err
		}
		if o.since != "" {
			old, _, err := readCheckpoint(o.since, station)
			if err != nil {
				return err
			}
			c, err := led.Consistency(ctx, old)
			if err != nil {
				return fmt.Errorf("proving that %s extends %s: %w", led.Path(), o.since, err)
			}
			b = c.Encode()
		}
		return a.printFile(o, b)
	})
}

func (a *app) runLedgerCosign(ctx context.Context, path string, o *ledgerProof) (err error) {
	station, err := readPublicKey(o.trust)
	if err != nil {
		return err
	}
	b, err := readProof(path)
	if err != nil {
		return err
	}
	wd, err := os.Getwd()
	if err != nil {
		return err
	}
	key, closeStore, err := a.openKeyURI(ctx, o.key, wd)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeStore()) }()
	signer, err := hsm.SigningKeyOf(key)
	if err != nil {
		return err
	}
	w := &ledger.Witness{Name: o.name, Key: signer, State: o.state}
	signed, err := w.Cosign(b, station, o.first)
	if err != nil {
		return fmt.Errorf("cosigning %s: %w", path, err)
	}
	return a.printFile(o, signed)
}
