package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
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
				return a.table(nil, [][]string{{"Hub", h.Name}, {"  kind", kindOf(h)}, {"  location", h.Location}, {"  takes part in allocation", yesNo(h.Apply == nil || *h.Apply)}, {"  weight", weight(h)}, {"  connection", h.ConnectionString}})
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
	return parent("hub", "The hubs that a scope assigns devices to", list, show, newHubPut(a, true), newHubPut(a, false), unlink,
		newHubOutbox(a), newHubOrphans(a), newHubChildren(a))
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

// kindOf is what a hub is. Azure's services know one kind, and touchmark's do not say it of that.
func kindOf(h *operator.Hub) string { return cmp.Or(h.Kind, string(registration.HubAzure)) }

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
		rows = append(rows, []string{h.Name, kindOf(h), h.Location, yesNo(h.Apply == nil || *h.Apply), weight(h)})
	}
	if a.json {
		return nil
	}
	return a.table([]string{"HUB", "KIND", "LOCATION", "ALLOCATES", "WEIGHT"}, rows)
}

func hubArgs(link bool) cobra.PositionalArgs {
	if link {
		return cobra.MaximumNArgs(1)
	}
	return cobra.ExactArgs(1)
}

// hubHost returns the host name in a hub's connection string. One of another kind than azure is checked whole: only touchmark has
// it. Errors do not show the text.
func hubHost(kind, text string) (string, error) {
	if kind != "" && kind != string(registration.HubAzure) {
		c, err := hub.ParseConnection(registration.HubKind(kind), text)
		if err != nil {
			return "", err
		}
		return c.Host, nil
	}
	host := operator.HubName(text)
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	if checkHost(host) != nil {
		return "", errors.New("it holds no connection string of an IoT hub")
	}
	return host, nil
}

func newHubPut(a *app, link bool) *cobra.Command {
	o := &managementOptions{}
	var file, location, kind string
	var apply, unchecked bool
	var weight int
	use, short := "update HOST --management FILE", "Change how a hub is linked"
	long := "update changes what flags name: the key, after the hub's was rolled; the weight; whether it takes part in allocation. The keys of\nother hubs stay."
	if link {
		use, short = "link [HOST] {--connection-string-file FILE | --kind record} --management FILE", "Link a hub"
		long = `link has a scope assign devices to a hub. The file holds the hub's connection string, of a policy that may write its
registry: HostName=…;SharedAccessKeyName=…;SharedAccessKey=…

touchmark has other kinds of hub, too, each with a connection string of its own: touchmark help hubs. A hub of kind record
has none: HOST alone is its name. A webhook is called what the host in its URL is called.`
	}
	c := &cobra.Command{
		Use: use, Short: short, Long: long, Args: hubArgs(link),
		RunE: func(cmd *cobra.Command, args []string) error {
			h := operator.Hub{Location: location, Kind: kind}
			switch record := kind == string(registration.HubRecord); {
			case record && file != "":
				return usageError{errors.New("a hub of kind record has no connection string: leave --connection-string-file out")}
			case link && record && len(args) == 0:
				return usageError{errors.New("a hub of kind record has no connection string: name its host")}
			case link && !record && file == "":
				return hint(usageError{errors.New("required flag --connection-string-file is not set")}, "only --kind record goes without: its hubs are named and not told")
			}
			if file != "" {
				b, err := a.readInput(file, 8<<10)
				if err != nil {
					return usageError{fmt.Errorf("reading the hub's connection string: %w", err)}
				}
				h.ConnectionString = strings.TrimSpace(string(b))
				clear(b)
				if h.Name, err = hubHost(kind, h.ConnectionString); err != nil {
					return hint(usageError{fmt.Errorf("%s: %w", file, err)}, "touchmark help hubs has the connection strings of each --kind")
				}
			}
			if len(args) == 1 {
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
	f.StringVar(&kind, "kind", "", "azure, builtin, mosquitto, webhook or record (touchmark only; default: azure, or what the hub is)")
	_ = c.RegisterFlagCompletionFunc("kind", cobra.FixedCompletions([]string{"azure", "builtin", "mosquitto", "webhook", "record"}, cobra.ShellCompDirectiveNoFileComp))
	f.StringVar(&location, "location", map[bool]string{true: "local"}[link], "region of the hub")
	f.BoolVar(&unchecked, "unchecked", false, "link it although it cannot be reached now (touchmark only)")
	f.BoolVar(&apply, "apply-allocation-policy", true, "take part in allocation; without, devices come only where an enrollment names the hub")
	f.IntVar(&weight, "allocation-weight", 1, "share of the devices where allocation is hashed: 1 to 1000")
	c.Example = "  touchmark hub update hub-a.example.net --allocation-weight 3 --management service/management.connection"
	if link {
		c.Example = "  touchmark hub link --connection-string-file hub-a.connection --location westeurope --management service/management.connection\n" +
			"  touchmark hub link --kind webhook --connection-string-file back.connection --management service/management.connection\n" +
			"  touchmark hub link hub-b.example.net --kind record --management service/management.connection"
	}
	return c
}
