package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/operator"
)

func newRegistration(a *app) *cobra.Command {
	o := &serviceOptions{}
	list := &cobra.Command{
		Use: "list GROUP --service FILE", Short: "List the devices that came in by a group", Args: cobra.ExactArgs(1),
		Long:    "list shows what became of every device that registered through an enrollment group.",
		Example: "  touchmark registration list pumps --service service/owner.connection",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkID(operator.Group, args[0]); err != nil {
				return err
			}
			return a.onService(cmd.Context(), o, func(ctx context.Context, svc *service) error {
				t := &longTable{a: a, header: []string{"REGISTRATION", "STATUS", "HUB", "DEVICE", "UPDATED", "ERROR"}}
				for st, err := range svc.Registrations(ctx, args[0]) {
					if err != nil {
						return err
					}
					if a.json {
						err = a.printJSON(st)
					} else {
						err = t.add([]string{st.RegistrationID, statusText(st), st.AssignedHub, st.DeviceID, shortTime(st.LastUpdatedDateTimeUTC), errorText(st)})
					}
					if err != nil {
						return err
					}
				}
				return t.flush()
			})
		},
	}
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
registration the device is new to the service.`,
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
	remove.Flags().BoolVar(&yes, "yes", false, "do not ask")
	remove.Flags().StringVar(&tag, "etag", "", "delete this version alone")
	for _, c := range []*cobra.Command{list, show, remove} {
		o.flags(c)
	}
	return parent("registration", "What became of devices", list, show, remove)
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
