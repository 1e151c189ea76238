package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/pkg/ca"
	"github.com/touchmark/touchmark/pkg/ledger"
	"github.com/touchmark/touchmark/pkg/mint"
	"github.com/touchmark/touchmark/pkg/order"
	"github.com/touchmark/touchmark/pkg/station"
)

func newUnit(a *app) *cobra.Command {
	return parent("unit", "Look at units, and rework, scrap, void or return them",
		newUnitShow(a),
		newUnitEnd(a, ledger.Reworked, "rework", "Give up a unit's identity because its board was rebuilt",
			`rework ends the identity of a unit whose board, secure element or storage was replaced: its certificate is revoked, its key is never
used again, and the next bundle says so to the service. The serial is free for the next revision, which mint or the station
makes on the same order.`, station.ReworkReasons),
		newUnitEnd(a, ledger.Scrapped, "scrap", "Write down that a unit was destroyed",
			`scrap ends a unit that is destroyed: its certificate is revoked, and its serial is not made again. It still counts against its
order; touchmark unit return gives it back once the owner permits it.`, station.ScrapReasons),
		newUnitEnd(a, ledger.Voided, "void", "Give up an identity that never left the factory",
			`void ends an identity that no bundle held: its certificate is revoked, and its serial is free. It still counts against its order when
anything was signed for it.`, []string{"mistake", "lost", "other"}),
		newUnitReturn(a))
}

type unitEndOptions struct {
	line, reason, operator, note string
	yes                          bool
}

func newUnitEnd(a *app, state ledger.State, verb, short, long string, reasons []string) *cobra.Command {
	o := &unitEndOptions{}
	c := &cobra.Command{
		Use: verb + " SERIAL --line DIR --reason WORD", Short: short, Args: cobra.ExactArgs(1),
		Long:    long + "\n\nReasons: " + strings.Join(reasons, ", ") + ".",
		Example: fmt.Sprintf("  touchmark unit %s SN00007 --line line-3 --reason %s --operator mai --yes", verb, reasons[0]),
		RunE: func(cmd *cobra.Command, args []string) error {
			if !slices.Contains(reasons, o.reason) {
				return usageError{fmt.Errorf("--reason %q: want one of %s", o.reason, strings.Join(reasons, ", "))}
			}
			if err := a.confirm(cmd.Context(), o.yes, "to "+verb+" "+args[0], args[0]); err != nil {
				return err
			}
			return a.onFloor(cmd.Context(), o.line, func(f *floor) error {
				u, why, err := f.retire(cmd.Context(), args[0], state, ledger.Ending{Reason: o.reason, Operator: o.operator, Note: o.note})
				if err != nil {
					return err
				}
				if a.json {
					return a.printJSON(map[string]any{"serial": u.Serial, "registrationId": u.RegistrationID, "revision": u.Revision, "state": state, "was": u.State, "ending": why})
				}
				a.note("%s, revision %d, is %s; it was %s", u.Serial, u.Revision, state, u.State)
				return nil
			})
		},
	}
	lineFlag(c, &o.line)
	f := c.Flags()
	f.StringVar(&o.reason, "reason", "", "why: "+strings.Join(reasons, ", ")+" (required)")
	f.StringVar(&o.operator, "operator", "", "who says so; for the ledger")
	f.StringVar(&o.note, "note", "", "anything else worth knowing; for the ledger")
	f.BoolVar(&o.yes, "yes", false, "do not ask")
	_ = c.MarkFlagRequired("reason")
	_ = c.RegisterFlagCompletionFunc("reason", cobra.FixedCompletions(reasons, cobra.ShellCompDirectiveNoFileComp))
	return c
}

// retire ends a unit, and takes away what is left of it at the station: its stamp, its key in the token. The ledger's entry is the
// revocation and is durable first; the list of revoked certificates is written from it, and what a run that dies in between leaves
// is done when the ledger is opened next.
func (f *floor) retire(ctx context.Context, serial string, state ledger.State, why ledger.Ending) (ledger.Unit, ledger.Ending, error) {
	u, why, err := mint.Retire(ctx, f.ledger, serial, state, why)
	if err != nil {
		return u, why, err
	}
	if err := f.takeAway(ctx, u); err != nil {
		return u, why, fmt.Errorf("the unit is %s; %w", state, err)
	}
	return u, why, nil
}

// goneNote is the kind of the note that nothing of a unit which ended is left.
const goneNote = "gone"

// takeAway does what follows from a unit's ending. It may be repeated.
func (f *floor) takeAway(ctx context.Context, u ledger.Unit) error {
	living, err := f.ledger.FindDevice(ctx, u.RegistrationID)
	if err != nil && !errors.Is(err, ledger.ErrNotFound) {
		return err
	}
	again := err == nil // made again meanwhile: the stamp is the new one's, and of a voided unit the key's name as well
	job, err := f.ledger.Job(ctx, u.Job)
	if err != nil {
		return err
	}
	if job.Out != "" && !again {
		if err := os.RemoveAll(filepath.Join(job.Out, u.RegistrationID)); err != nil {
			return fmt.Errorf("taking its stamp away: %w", err)
		}
	}
	if !again || living.Revision != u.Revision {
		if err := mint.DeleteTokenKey(ctx, f.store, u); err != nil && !errors.Is(err, hsm.ErrUnsupported) {
			return fmt.Errorf("deleting its key from the token: %w", err)
		}
	}
	if err := f.writeCRL(ctx); err != nil {
		return err
	}
	_, err = f.ledger.AddNote(ctx, ledger.Note{Unit: u.ID, Kind: goneNote})
	return err
}

// finishEndings takes away what runs that died left of units which ended.
func (f *floor) finishEndings(ctx context.Context) error {
	for u, err := range f.ledger.Unnoted(ctx, goneNote) {
		if err == nil {
			err = f.takeAway(ctx, u.Unit)
		}
		if err != nil {
			return fmt.Errorf("serial %s is %s; %w", u.Serial, u.State, err)
		}
	}
	return nil
}

func newUnitShow(a *app) *cobra.Command {
	var dir string
	c := &cobra.Command{
		Use: "show SERIAL --line DIR", Short: "Show what became of a unit, revision by revision", Args: cobra.ExactArgs(1),
		Example: "  touchmark unit show SN00007 --line line-3",
		RunE:    func(cmd *cobra.Command, args []string) error { return a.runUnitShow(cmd.Context(), dir, args[0]) },
	}
	lineFlag(c, &dir)
	return c
}

// unitLine is one revision of a unit, as it is shown.
type unitLine struct {
	ledger.Unit
	KeyHash  string         `json:"keyHash,omitempty"`
	Profile  string         `json:"profile"`
	Order    string         `json:"order,omitempty"`
	Operator string         `json:"operator,omitempty"`
	Ended    *time.Time     `json:"ended,omitempty"`
	Ending   *ledger.Ending `json:"ending,omitempty"`
	Reprints int            `json:"reprints,omitempty"`
}

func (a *app) runUnitShow(ctx context.Context, dir, serial string) (err error) {
	l, err := a.loadLine(dir)
	if err != nil {
		return err
	}
	led, err := ledger.View(ctx, l.path(ledgerFile))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, led.Close()) }()
	var all []unitLine
	add := func(u ledger.Unit, ended *time.Time, why *ledger.Ending) error {
		job, err := led.Job(ctx, u.Job)
		if err != nil {
			return err
		}
		notes, err := led.Notes(ctx, u.ID, station.ReprintNote)
		all = append(all, unitLine{Unit: u, KeyHash: hex.EncodeToString(u.KeyHash), Profile: job.Profile, Order: job.Grant, Operator: job.Operator, Ended: ended, Ending: why, Reprints: len(notes)})
		return err
	}
	for u, err := range led.Retired(ctx, serial) {
		if err != nil {
			return err
		}
		if err := add(u.Unit, &u.Ended, &u.Ending); err != nil {
			return err
		}
	}
	u, err := led.Find(ctx, serial)
	if err == nil {
		err = add(u, nil, nil)
	}
	if err != nil && (!errors.Is(err, ledger.ErrNotFound) || len(all) == 0) {
		return err
	}
	var rows [][]string
	for _, u := range all {
		if a.json {
			if err := a.printJSON(u); err != nil {
				return err
			}
			continue
		}
		why := ""
		if u.Ending != nil {
			why = u.Ended.Format(time.RFC3339) + " " + u.Ending.Reason
			if u.Ending.Operator != "" {
				why += " by " + u.Ending.Operator
			}
		}
		rows = append(rows, []string{fmt.Sprint(u.Revision), u.RegistrationID, u.State.String(), u.At.Format(time.RFC3339), orDash(u.Operator), orDash(u.Order), u.KeyHash[:min(16, len(u.KeyHash))], why})
	}
	if a.json {
		return nil
	}
	return a.table([]string{"REVISION", "REGISTRATION ID", "STATE", "BEGUN", "BY", "ORDER", "KEY", "ENDED"}, rows)
}

func newUnitReturn(a *app) *cobra.Command {
	var dir, permit, operator string
	c := &cobra.Command{
		Use: "return SERIAL… --line DIR --permit FILE", Short: "Give scrapped units back to their order", Args: cobra.MinimumNArgs(1),
		Long:    "return gives units that were scrapped, and that the owner permits to be replaced (touchmark order permit), back to their order.",
		Example: "  touchmark unit return SN00007 SN00019 --line line-3 --permit permit",
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.onFloor(cmd.Context(), dir, func(f *floor) error { return f.giveUnitsBack(cmd.Context(), args, permit, operator) })
		},
	}
	lineFlag(c, &dir)
	c.Flags().StringVar(&permit, "permit", "", "the owner's permit (required)")
	c.Flags().StringVar(&operator, "operator", "", "who says so; for the ledger")
	_ = c.MarkFlagRequired("permit")
	return c
}

func (f *floor) giveUnitsBack(ctx context.Context, serials []string, permit, operator string) error {
	b, err := readDocument(permit)
	if err != nil {
		return usageError{err}
	}
	owners, err := f.owners()
	if err != nil {
		return err
	}
	p, err := order.OpenPermit(b, owners)
	if err != nil {
		return fmt.Errorf("%s: %w", permit, err)
	}
	sum := sha256.Sum256(b)
	why := ledger.Ending{Reason: clip(p.Reason, 200), Operator: operator, Proof: hex.EncodeToString(sum[:])}
	var events []ledger.Event
	for _, serial := range serials {
		var last ledger.RetiredUnit
		for u, err := range f.ledger.Retired(ctx, serial) {
			if err != nil {
				return err
			}
			last = u
		}
		job, err := f.ledger.Job(ctx, last.Job)
		if last.ID == 0 || err == nil && last.State != ledger.Scrapped {
			return fmt.Errorf("serial %s: %w among the scrapped", serial, ledger.ErrNotFound)
		}
		if err != nil {
			return err
		}
		if name, _, _ := strings.Cut(job.Grant, "/"); !p.Covers(name, serial, last.Revision) {
			return fmt.Errorf("%w: the permit is not for %s, revision %d, of order %s", order.ErrSerial, serial, last.Revision, orDash(name))
		}
		mine := why
		mine.Certificate = last.Ending.Certificate // it stays revoked
		events = append(events, ledger.Event{State: ledger.Returned, Unit: last.ID, Data: mine.Encode()})
	}
	// The permit first: the service asks for it, and one that nothing was returned on does no harm.
	for _, e := range events {
		if _, err := f.ledger.AddNote(ctx, ledger.Note{Unit: e.Unit, Kind: mint.PermitNote, Data: bytes.TrimSuffix(b, []byte("\n"))}); err != nil {
			return err
		}
	}
	if err := f.ledger.Commit(ctx, events); err != nil {
		return err
	}
	f.a.note("%d units are back with %s", len(events), p.Order)
	return nil
}

// revocationReason is what a list of revoked certificates says of each ending.
var revocationReason = map[ledger.State]int{ledger.Reworked: ca.Superseded, ledger.Scrapped: ca.Ceased, ledger.Returned: ca.Ceased}

// crlFile is the line's list of revoked certificates (RFC 5280 §5), in PEM.
const crlFile = "crl.pem"

// writeCRL writes the list of revoked certificates from the ledger.
func (f *floor) writeCRL(ctx context.Context) error {
	var revoked []ca.Revoked
	number := int64(0) // the ledger's entry of the last ending: it grows with each
	for u, err := range f.ledger.Endings(ctx) {
		if err != nil {
			return err
		}
		if u.Ending.Certificate != "" {
			revoked = append(revoked, ca.Revoked{SerialNumber: u.Ending.Certificate, At: u.Ended, Reason: revocationReason[u.State]})
			number = max(number, u.EndedLeaf)
		}
	}
	if len(revoked) == 0 {
		return nil
	}
	issuer, err := f.issuer(ctx, f.store)
	if err != nil {
		return err
	}
	crl, err := issuer.CRL(revoked, number, time.Now())
	if err != nil {
		return err
	}
	return writeFile(f.path(crlFile), crl, 0o644, true)
}
