package main

import (
	"context"
	"errors"
	"fmt"
	"iter"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/pkg/operator"
)

// What hubs have yet to be told, and what they keep although they should not. These are calls of the service API, which other commands
// about hubs are not.

// printOwn prints a list that touchmark's service has, and no other.
func printOwn[T any](a *app, header []string, all iter.Seq2[T, error], row func(T) []string) error {
	t := &longTable{a: a, header: header}
	for v, err := range all {
		if errors.Is(err, operator.ErrUnsupported) {
			return hint(err, "only touchmark's service keeps this list")
		}
		if err == nil && a.json {
			err = a.printJSON(v)
		} else if err == nil {
			err = t.add(row(v))
		}
		if err != nil {
			return err
		}
	}
	return t.flush()
}

func newHubOutbox(a *app) *cobra.Command {
	o := &serviceOptions{}
	c := &cobra.Command{
		Use: "outbox --service FILE", Short: "List what hubs have yet to be told", Args: cobra.NoArgs,
		Long: `outbox lists the devices that hubs have yet to be told about: those that are assigning, since their hub has not answered; those that
are linking, to be put below their parent; and those for cleanup, which have gone on and whose former hubs have yet to forget them. It
says how often each was tried, when the next attempt is, and how the last one failed. All of it is tried again by itself, so an
empty list is the rule.`,
		Example: "  touchmark hub outbox --service service/owner.connection\n  touchmark hub outbox --service service/owner.connection --json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.onService(cmd.Context(), o, func(ctx context.Context, svc *service) error {
				return printOwn(a, []string{"REGISTRATION", "STATE", "TO HUB", "FROM", "ATTEMPTS", "SINCE", "NEXT", "LAST ERROR"}, svc.Outbox(ctx), func(t *operator.Task) []string {
					return []string{t.RegistrationID, t.State, t.Hub, t.Left(), fmt.Sprint(t.Attempts), shortTime(&t.Begun), shortTime(&t.Due), t.LastError}
				})
			})
		},
	}
	o.flags(c)
	return c
}

func newHubOrphans(a *app) *cobra.Command {
	o := &serviceOptions{}
	list := &cobra.Command{
		Use: "list --service FILE", Short: "List devices that hubs keep", Args: cobra.NoArgs,
		Long: `list shows the devices that a hub could not be asked to forget: it was unlinked, or did not answer for a week. Such a device may still
connect there. Remove it at the hub, then take it off the list with forget.`,
		Example: "  touchmark hub orphans list --service service/owner.connection",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.onService(cmd.Context(), o, func(ctx context.Context, svc *service) error {
				return printOwn(a, []string{"REGISTRATION", "HUB", "DEVICE", "SINCE", "REASON"}, svc.Orphans(ctx), func(t *operator.Orphan) []string {
					return []string{t.RegistrationID, t.Hub, t.DeviceID, shortTime(&t.Since), t.Reason}
				})
			})
		},
	}
	var yes bool
	forget := &cobra.Command{
		Use: "forget REGISTRATION-ID HOST [DEVICE-ID] --service FILE", Short: "Take one off the list", Args: cobra.RangeArgs(2, 3),
		Long: `forget takes a device off the list of orphans: somebody has looked after it. Nothing changes at the hub. The device ID is to be given
where it is not the registration ID.`,
		Example: "  touchmark hub orphans forget pump-0001 hub-a.example.net --service service/owner.connection --yes",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkID(operator.Individual, args[0]); err != nil {
				return err
			}
			device := args[len(args)-1]
			if len(args) == 2 {
				device = args[0]
			}
			if err := a.confirm(cmd.Context(), yes, "forgetting that hub "+args[1]+" keeps device "+device, args[0]); err != nil {
				return err
			}
			return a.onService(cmd.Context(), o, func(ctx context.Context, svc *service) error {
				err := svc.ForgetOrphan(ctx, args[0], args[1], device)
				if errors.Is(err, operator.ErrNotFound) {
					return hint(err, "touchmark hub orphans list shows those that there are, each with its hub and device ID as they are spelt there")
				}
				if err != nil {
					return err
				}
				return a.printDone("forgotten", "orphan", args[0])
			})
		},
	}
	forget.Flags().BoolVar(&yes, "yes", false, "do not ask")
	o.flags(list)
	o.flags(forget)
	return parent("orphans", "Devices that hubs could not be asked to forget", list, forget)
}

func newHubChildren(a *app) *cobra.Command {
	o := &serviceOptions{}
	c := &cobra.Command{
		Use: "children PARENT --service FILE", Short: "List the devices below an edge device", Args: cobra.ExactArgs(1),
		Long: `children lists the devices whose enrollments name an edge device as their parent, by its registration ID or its device ID, and says of
those that their hub does not have below it yet why: they are assigned all the same, and linked when the parent arrives.`,
		Example: "  touchmark hub children gateway-7 --service service/owner.connection",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkID(operator.Individual, args[0]); err != nil {
				return err
			}
			return a.onService(cmd.Context(), o, func(ctx context.Context, svc *service) error {
				return printOwn(a, []string{"REGISTRATION", "HUB", "LINKED", "PENDING"}, svc.Children(ctx, args[0]), func(t *operator.Child) []string {
					return []string{t.RegistrationID, t.Hub, yesNo(t.Linked), t.Pending}
				})
			})
		},
	}
	o.flags(c)
	return c
}
