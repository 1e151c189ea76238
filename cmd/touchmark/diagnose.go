package main

import (
	"cmp"
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/pkg/operator"
)

func newDiagnose(a *app) *cobra.Command {
	o := &serviceOptions{}
	var group, file string
	c := &cobra.Command{
		Use: "diagnose REGISTRATION-ID --service FILE", Short: "Find out why a device is refused", Args: cobra.ExactArgs(1),
		Long: `diagnose says in plain words why a device was refused, or what became of it, and what to do next. touchmark remembers what devices tried
and why it said no; of another service what it shows is looked at: the enrollment, the groups, the registration.

It ends with 0 whatever it finds.`,
		Example: "  touchmark diagnose pump-0001 --service service/owner.connection\n  touchmark diagnose pump-0001 --group pumps --service azure.connection",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkID(operator.Individual, args[0]); err != nil {
				return err
			}
			var chain []byte
			if file != "" {
				var err error
				if chain, err = readSmall(file); err != nil {
					return usageError{fmt.Errorf("reading the device's certificates: %w", err)}
				}
				if _, err := operator.Certificate(chain); err != nil {
					return usageError{fmt.Errorf("--chain %s: %w", file, err)}
				}
			}
			return a.onService(cmd.Context(), o, func(ctx context.Context, svc *service) error {
				d, err := svc.Diagnose(ctx, args[0], group, chain)
				if err != nil {
					return err
				}
				if a.json {
					return a.printJSON(d)
				}
				return a.printDiagnosis(d)
			})
		},
	}
	o.flags(c)
	c.Flags().StringVar(&file, "chain", "", "PEM file with the certificates that the device sends, its own first: would touchmark let it in with these?")
	c.Flags().StringVar(&group, "group", "", "group that the device should come in by")
	return c
}

// maxAttempts is how many attempts are shown: the newest.
const maxAttempts = 20

func (a *app) printDiagnosis(d *operator.Diagnosis) error {
	for _, f := range d.Findings {
		likely := ""
		if !f.Sure {
			likely = "Perhaps: "
		}
		if _, err := fmt.Fprintf(a.out, "%s%s\n  → %s\n", likely, printable(f.Words), printable(f.Next)); err != nil {
			return err
		}
	}
	for _, line := range d.Explanation {
		fmt.Fprintln(a.out, "The service says: "+printable(line))
	}
	fmt.Fprintln(a.out)
	rows := [][]string{{"Device", d.RegistrationID}}
	own := "none"
	if d.Enrollment != nil {
		if e, err := d.Enrollment.Enrollment(); err == nil && e.Attestation != nil {
			own = string(e.Attestation.Type) + ", " + statusOf(e)
		}
	}
	rows = append(rows, []string{"  enrollment", own})
	if d.Group != nil {
		if e, err := d.Group.Enrollment(); err == nil && e.Attestation != nil {
			rows = append(rows, []string{"  group", d.Group.ID + ": " + string(e.Attestation.Type) + ", " + statusOf(e)})
		}
	}
	state := "none"
	if d.Registration != nil {
		state = registrationText(d.Registration)
	}
	rows = append(rows, []string{"  registration", state})
	if by := d.Admitted; by != nil {
		slot := by.Slot
		if slot == operator.SlotFormer {
			slot += ", was " + by.Was
		}
		rows = append(rows, []string{"  let in by", by.Kind + ", " + slot})
	}
	if t := d.Task; t != nil {
		rows = append(rows, []string{"  " + t.State, strings.Join([]string{"hub " + cmp.Or(t.Hub, t.Left()), fmt.Sprint(t.Attempts, " attempts"), "next " + shortTime(&t.Due), t.LastError}, ", ")})
	}
	if p := d.Parent; p != nil {
		rows = append(rows, []string{"  parent", p.Parent + ": " + cmp.Or(p.Pending, "linked")})
	}
	if err := a.table(nil, rows); err != nil {
		return err
	}
	if !d.Told {
		a.note("this service tells nothing of what devices tried: what stands here is what can be seen from outside")
		return nil
	}
	if len(d.Attempts) == 0 {
		return nil
	}
	rows = nil
	for _, t := range d.Attempts[:min(len(d.Attempts), maxAttempts)] {
		code := ""
		if t.Code != 0 {
			code = fmt.Sprint(int(t.Code))
		}
		rows = append(rows, []string{shortTime(&t.At), t.Protocol, t.Operation, t.Result, code, t.Remote, t.TrackingID, strings.TrimPrefix(t.Reason, code+" Unauthorized: ")})
	}
	fmt.Fprintln(a.out)
	return a.table([]string{"AT", "BY", "OPERATION", "RESULT", "CODE", "FROM", "TRACKING ID", "REASON"}, rows)
}
