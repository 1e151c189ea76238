package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/hub"
	"github.com/touchmark/touchmark/pkg/operator"
	"github.com/touchmark/touchmark/pkg/registration"
)

func newHub(a *app) *cobra.Command {
	o := &managementOptions{}
	list := &cobra.Command{
		Use: "list --management FILE", Short: "List the linked hubs of a scope", Args: cobra.NoArgs,
		Long:    "list shows the hubs that a scope assigns devices to.",
		Example: "  touchmark hub list --management service/management.connection",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.onScope(cmd.Context(), o, func(_ context.Context, _ *operator.Management, s *operator.Scope) error {
				return a.printHubs(s.Props.Hubs)
			})
		},
	}
	show := &cobra.Command{
		Use: "show HOST --management FILE", Short: "Show a linked hub", Args: cobra.ExactArgs(1),
		Long:    "show prints how a hub is linked, without the key.",
		Example: "  touchmark hub show hub-a.example.net --management service/management.connection",
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.onScope(cmd.Context(), o, func(_ context.Context, _ *operator.Management, s *operator.Scope) error {
				h, err := linked(s, args[0])
				if err != nil {
					return err
				}
				if a.json {
					return a.printJSON(h)
				}
				return a.table(nil, [][]string{{"Hub", h.Name}, {"  kind", cmp.Or(h.Kind, "azure")}, {"  location", h.Location}, {"  takes part in allocation", yesNo(h.Apply == nil || *h.Apply)}, {"  weight", weight(h)}, {"  connection", h.ConnectionString}})
			})
		},
	}
	var yes bool
	unlink := &cobra.Command{
		Use: "unlink HOST --management FILE", Short: "Unlink a hub", Args: cobra.ExactArgs(1),
		Long:    "unlink has a scope assign no more devices to a hub. Those that it has stay there until they register again.",
		Example: "  touchmark hub unlink hub-a.example.net --management service/management.connection --yes",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := a.confirm(cmd.Context(), yes, "unlinking hub "+args[0], args[0]); err != nil {
				return err
			}
			return a.onScope(cmd.Context(), o, func(ctx context.Context, m *operator.Management, s *operator.Scope) error {
				if _, err := m.EditScope(ctx, s.Name, func(s *operator.Scope) error { return s.DropHub(args[0]) }); err != nil {
					return err
				}
				return a.printDone("unlinked", "hub", args[0])
			})
		},
	}
	unlink.Flags().BoolVar(&yes, "yes", false, "do not ask")
	for _, c := range []*cobra.Command{list, show, unlink} {
		o.flags(c, true)
	}
	return parent("hub", "The hubs that a scope assigns devices to", list, show, newHubPut(a, true), newHubPut(a, false), unlink)
}

// onScope is onManagement with the scope that is meant.
func (a *app) onScope(ctx context.Context, o *managementOptions, do func(context.Context, *operator.Management, *operator.Scope) error) error {
	return a.onManagement(ctx, o, func(ctx context.Context, m *operator.Management) error {
		s, err := m.Scope(ctx, o.scope)
		if err != nil {
			return hint(err, "--scope names the scope")
		}
		return do(ctx, m, s)
	})
}

func linked(s *operator.Scope, host string) (*operator.Hub, error) {
	for i := range s.Props.Hubs {
		if dps.Fold(s.Props.Hubs[i].Name) == dps.Fold(host) {
			return &s.Props.Hubs[i], nil
		}
	}
	return nil, fmt.Errorf("hub %s is not linked to scope %s: %w", host, s.Name, operator.ErrNotFound)
}

func weight(h *operator.Hub) string {
	if h.Weight == nil {
		return "1"
	}
	return fmt.Sprint(*h.Weight)
}

func (a *app) printHubs(hubs []operator.Hub) error {
	var rows [][]string
	for i := range hubs {
		h := &hubs[i]
		if a.json {
			if err := a.printJSON(h); err != nil {
				return err
			}
			continue
		}
		rows = append(rows, []string{h.Name, cmp.Or(h.Kind, "azure"), h.Location, yesNo(h.Apply == nil || *h.Apply), weight(h)})
	}
	if a.json {
		return nil
	}
	return a.table([]string{"HUB", "KIND", "LOCATION", "ALLOCATES", "WEIGHT"}, rows)
}

func newHubPut(a *app, link bool) *cobra.Command {
	o := &managementOptions{}
	var file, location, kind string
	var apply, unchecked bool
	var weight int
	use, short := "update HOST --management FILE", "Change how a hub is linked"
	long := "update changes what flags name: the key, after the hub's was rolled; the weight; whether it takes part in allocation. The keys of\nother hubs stay."
	if link {
		use, short = "link {--connection-string-file FILE | --kind {record | builtin} HOST} --management FILE", "Link a hub"
		long = "link has a scope assign devices to a hub. The file holds the hub's connection string; of an IoT hub that of a policy that may write its\nregistry: HostName=…;SharedAccessKeyName=…;SharedAccessKey=… Those of other kinds are in touchmark help hubs. A hub of kind record, which\nis told nothing, and the one of serve --hub builtin have a name alone."
	}
	c := &cobra.Command{
		Use: use, Short: short, Long: long, Args: func(_ *cobra.Command, args []string) error {
			if named := !link || kind == "record" || kind == "builtin"; len(args) != map[bool]int{true: 1}[named] || named && link && file != "" {
				return usageError{errors.New("want the hub's connection string in a file; for those that have none, and to change one, its host name")}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			h := operator.Hub{Location: location, Kind: kind}
			if file != "" {
				b, err := a.readInput(file, 8<<10)
				if err != nil {
					return usageError{fmt.Errorf("reading the hub's connection string: %w", err)}
				}
				h.ConnectionString = strings.TrimSpace(string(b))
				clear(b)
				if h.Name = operator.HubName(h.ConnectionString); kind != "" {
					c, err := hub.ParseConnection(registration.HubKind(kind), h.ConnectionString)
					if err != nil {
						return usageError{fmt.Errorf("%s: %w", file, err)}
					}
					h.Name = c.Host
				}
				if checkHost(h.Name) != nil {
					return usageError{fmt.Errorf("%s holds no connection string of a hub", file)}
				}
			}
			if len(args) > 0 {
				if h.Name != "" && dps.Fold(h.Name) != dps.Fold(args[0]) {
					return usageError{fmt.Errorf("%s is for hub %s, not %s", file, h.Name, args[0])}
				}
				h.Name = args[0]
			}
			if cmd.Flags().Changed("apply-allocation-policy") {
				h.Apply = &apply
			}
			if cmd.Flags().Changed("allocation-weight") {
				if weight < 1 || weight > 1000 {
					return usageError{errors.New("--allocation-weight: want 1 to 1000")}
				}
				h.Weight = &weight
			}
			return a.onScope(cmd.Context(), o, func(ctx context.Context, m *operator.Management, s *operator.Scope) error {
				s, err := m.EditScope(ctx, s.Name, func(s *operator.Scope) error {
					switch _, err := linked(s, h.Name); {
					case link && err == nil:
						return hint(fmt.Errorf("hub %s is linked already", h.Name), "touchmark hub update changes it")
					case !link && err != nil:
						return err
					}
					s.Unchecked = unchecked
					return s.SetHub(h)
				})
				if err != nil {
					return err
				}
				is, err := linked(s, h.Name)
				if err != nil {
					return err
				}
				return a.printHubs([]operator.Hub{*is})
			})
		},
	}
	o.flags(c, true)
	f := c.Flags()
	f.StringVar(&file, "connection-string-file", "", "file with the hub's connection string; - is standard input")
	f.StringVar(&location, "location", map[bool]string{true: "local"}[link], "region of the hub")
	if link {
		f.StringVar(&kind, "kind", "", "azure, mosquitto, webhook, record or builtin (touchmark only; default: azure)")
		_ = c.RegisterFlagCompletionFunc("kind", cobra.FixedCompletions([]string{"azure", "mosquitto", "webhook", "record", "builtin"}, cobra.ShellCompDirectiveNoFileComp))
	}
	f.BoolVar(&unchecked, "unchecked", false, "link it although it cannot be reached now (touchmark only)")
	f.BoolVar(&apply, "apply-allocation-policy", true, "take part in allocation; without, devices come only where an enrollment names the hub")
	f.IntVar(&weight, "allocation-weight", 1, "share of the devices where allocation is hashed: 1 to 1000")
	c.Example = "  touchmark hub update hub-a.example.net --allocation-weight 3 --management service/management.connection"
	if link {
		c.Example = `  touchmark hub link --connection-string-file hub-a.connection --location westeurope --management service/management.connection
  touchmark hub link --connection-string-file broker.connection --kind mosquitto --management service/management.connection
  touchmark hub link records.example.net --kind record --management service/management.connection`
	}
	return c
}
