package main

import (
	"context"
	"encoding/csv"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/operator"
)

func newRegistration(a *app) *cobra.Command {
	o := &serviceOptions{}
	format := ""
	list := &cobra.Command{
		Use: "list [GROUP] --service FILE", Short: "List the devices that came in, all or by a group", Args: cobra.MaximumNArgs(1),
		Long: `list shows what became of every device that registered, or of those that came in by an enrollment group, also one that was deleted
since. Azure has no list of all: there each group is asked for its devices, and then a call is made for every individual enrollment,
some 1,000 a minute; devices of groups that were deleted cannot be had there.`,
		Example: "  touchmark registration list --service service/owner.connection\n  touchmark registration list pumps --format csv --service service/owner.connection > pumps.csv",
		RunE: func(cmd *cobra.Command, args []string) error {
			group := strings.Join(args, "")
			if len(args) > 0 {
				if err := checkID(operator.Group, group); err != nil {
					return err
				}
			}
			w, err := a.newRows(format, []string{"registrationId", "enrollmentGroupId", "status", "substatus", "assignedHub", "deviceId", "createdDateTimeUtc", "lastUpdatedDateTimeUtc", "errorCode", "errorMessage"})
			if err != nil {
				return err
			}
			return a.onService(cmd.Context(), o, func(ctx context.Context, svc *service) error {
				t := &longTable{a: a, header: []string{"REGISTRATION", "GROUP", "STATUS", "HUB", "DEVICE", "UPDATED", "ERROR"}}
				for r, err := range svc.AllRegistrations(ctx, group) {
					if err != nil {
						return err
					}
					st := &r.RegistrationState
					switch {
					case a.json:
						err = a.printJSON(r)
					case w != nil:
						code := ""
						if st.ErrorCode != 0 {
							code = fmt.Sprint(st.ErrorCode)
						}
						err = w.Write([]string{st.RegistrationID, r.EnrollmentGroupID, string(st.Status), string(st.Substatus), st.AssignedHub, st.DeviceID,
							wireTime(st.CreatedDateTimeUTC), wireTime(st.LastUpdatedDateTimeUTC), code, st.ErrorMessage})
					default:
						err = t.add([]string{st.RegistrationID, r.EnrollmentGroupID, statusText(st), st.AssignedHub, st.DeviceID, shortTime(st.LastUpdatedDateTimeUTC), errorText(st)})
					}
					if err != nil {
						return err
					}
				}
				if w != nil {
					w.Flush()
					return w.Error()
				}
				return t.flush()
			})
		},
	}
	formatFlag(list, &format)
	show := &cobra.Command{
		Use: "show REGISTRATION-ID --service FILE", Short: "Show what became of a device", Args: cobra.ExactArgs(1),
		Long:    "show prints a device's registration record. touchmark diagnose tells why a device has none.",
		Example: "  touchmark registration show pump-0001 --service service/owner.connection",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkID(operator.Individual, args[0]); err != nil {
				return err
			}
			return a.onService(cmd.Context(), o, func(ctx context.Context, svc *service) error {
				st, err := svc.Registration(ctx, args[0])
				if errors.Is(err, operator.ErrNotFound) {
					return hint(err, "touchmark diagnose %s tells why", args[0])
				}
				if err != nil {
					return err
				}
				if a.json {
					return a.printJSON(st)
				}
				rows := [][]string{{"Registration", st.RegistrationID}}
				for _, r := range [][2]string{{"status", statusText(st)}, {"hub", st.AssignedHub}, {"device ID", st.DeviceID}, {"error", errorText(st)},
					{"created", shortTime(st.CreatedDateTimeUTC)}, {"updated", shortTime(st.LastUpdatedDateTimeUTC)}, {"payload", compact(st.Payload)}, {"etag", st.ETag}} {
					if r[1] != "" {
						rows = append(rows, []string{"  " + r[0], r[1]})
					}
				}
				return a.table(nil, rows)
			})
		},
	}
	var yes bool
	var tag string
	remove := &cobra.Command{
		Use: "delete REGISTRATION-ID --service FILE", Short: "Forget what became of a device", Args: cobra.ExactArgs(1),
		Long: `delete takes a device's registration record away. Its enrollment stays, and so does the device in its hub: at its next
registration the device is new to the service. What it tried stays too: touchmark registration forget.`,
		Example: "  touchmark registration delete pump-0001 --service service/owner.connection --yes",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkID(operator.Individual, args[0]); err != nil {
				return err
			}
			if err := a.confirm(cmd.Context(), yes, "deleting registration "+args[0], args[0]); err != nil {
				return err
			}
			return a.onService(cmd.Context(), o, func(ctx context.Context, svc *service) error {
				if err := svc.DeleteRegistration(ctx, args[0], tag); err != nil {
					return err
				}
				return a.printDone("deleted", "registration", args[0])
			})
		},
	}
	var forgetYes bool
	forget := &cobra.Command{
		Use: "forget REGISTRATION-ID --service FILE", Short: "Erase what a device tried: its attempts, with addresses and certificates", Args: cobra.ExactArgs(1),
		Long: `forget erases what the service keeps of a device's attempts to register: when, over what, from which address, with which certificate,
and what came of it. That is what touchmark diagnose tells from; it outlives the enrollment and the registration. Nothing else changes:
the device stays enrolled and registered, and its next attempt is kept again, as is one of the last two seconds at another replica. That
they were erased is in the audit record. Only touchmark keeps attempts. To erase all of a device: touchmark help operating.`,
		Example: "  touchmark registration forget pump-0001 --service service/owner.connection --yes",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkID(operator.Individual, args[0]); err != nil {
				return err
			}
			if err := a.confirm(cmd.Context(), forgetYes, "forgetting what "+args[0]+" tried", args[0]); err != nil {
				return err
			}
			return a.onService(cmd.Context(), o, func(ctx context.Context, svc *service) error {
				err := svc.ForgetAttempts(ctx, args[0])
				if errors.Is(err, operator.ErrUnsupported) {
					return hint(err, "attempts are kept by a touchmark service alone, and not with --attempts-retention 0")
				}
				if err != nil {
					return err
				}
				return a.printDone("forgotten", "what was tried by", args[0])
			})
		},
	}
	forget.Flags().BoolVar(&forgetYes, "yes", false, "do not ask")
	remove.Flags().BoolVar(&yes, "yes", false, "do not ask")
	remove.Flags().StringVar(&tag, "etag", "", "delete this version alone")
	for _, c := range []*cobra.Command{list, show, remove, forget} {
		o.flags(c)
	}
	return parent("registration", "What became of devices", list, show, remove, forget)
}

// formatFlag has a command print what it lists as a table for eyes or as CSV; --json is every command's.
func formatFlag(c *cobra.Command, format *string) {
	c.Flags().StringVar(format, "format", "table", "table or csv")
	_ = c.RegisterFlagCompletionFunc("format", cobra.FixedCompletions([]string{"table", "csv"}, cobra.ShellCompDirectiveNoFileComp))
}

// newRows returns a writer of CSV that has its header, or nil where the format is another.
func (a *app) newRows(format string, header []string) (*csv.Writer, error) {
	switch {
	case format == "table":
		return nil, nil
	case format != "csv":
		return nil, usageError{fmt.Errorf("--format %s: want table or csv", format)}
	case a.json:
		return nil, usageError{errors.New("--format csv and --json are two formats: want one")}
	}
	w := csv.NewWriter(a.out)
	return w, w.Write(header)
}

// wireTime is a time as answers have it; empty for none.
func wireTime(t *dps.Time) string {
	if t == nil {
		return ""
	}
	return t.UTC().Format(time.RFC3339Nano)
}

func statusText(st *dps.RegistrationState) string {
	if st.Substatus != "" {
		return string(st.Status) + " (" + string(st.Substatus) + ")"
	}
	return string(st.Status)
}

func errorText(st *dps.RegistrationState) string {
	if st.ErrorCode == 0 && st.ErrorMessage == "" {
		return ""
	}
	return fmt.Sprintf("%d %s", st.ErrorCode, st.ErrorMessage)
}

func registrationText(st *dps.RegistrationState) string {
	text := statusText(st)
	if st.AssignedHub != "" {
		text += ", " + st.DeviceID + " at " + st.AssignedHub
	}
	if e := errorText(st); e != "" {
		text += ", " + e
	}
	return text
}
