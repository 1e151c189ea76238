package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/pkg/operator"
)

// managementOptions say which management API a command speaks to, and about which scope.
type managementOptions struct{ management, ca, scope string }

func (o *managementOptions) flags(c *cobra.Command, scope bool) {
	f := c.Flags()
	f.StringVar(&o.management, "management", "", "file that says where the management API is, with a token: management.connection, or Azure's as touchmark help operating has it (default: $TOUCHMARK_MANAGEMENT)")
	f.StringVar(&o.ca, "ca", "", "PEM file with the CA of the API's certificate (default: ca.pem beside --management, else the system's)")
	if scope {
		f.StringVar(&o.scope, "scope", "", "name of the scope (default: the one of --management, or the only one)")
	}
}

// onManagement opens the management API and has something done there.
func (a *app) onManagement(ctx context.Context, o *managementOptions, do func(context.Context, *operator.Management) error) error {
	path := o.management
	if path == "" {
		if path = a.getenv("TOUCHMARK_MANAGEMENT"); path == "" {
			return hint(usageError{errors.New("required flag --management is not set, nor is TOUCHMARK_MANAGEMENT")}, "touchmark serve writes management.connection into its data directory; for Azure write one (touchmark help operating)")
		}
	}
	b, err := readSmall(path)
	if err != nil {
		return usageError{fmt.Errorf("reading the management connection: %w", err)}
	}
	connection, err := operator.ParseManagement(string(b))
	clear(b)
	if err != nil {
		return usageError{fmt.Errorf("%s: %w", path, err)}
	}
	roots, err := rootsBeside(path, o.ca)
	if err != nil {
		return err
	}
	err = do(ctx, operator.NewManagement(operator.Config{Roots: roots, Waiting: a.waits()}, connection))
	var answer *operator.Error
	switch {
	case errors.As(err, &answer) && answer.Code == operator.CodeHubUnreachable:
		return hint(err, "look at the hub's name and key, and whether it is up; hub link --unchecked links it to touchmark all the same")
	case errors.Is(err, operator.ErrUnauthorized):
		return hint(refusedError{err}, "the token in %s may have run out, or is not for this", path)
	}
	return connectHint(err)
}

// scopeName returns the whole name of the scope that is meant.
func (o *managementOptions) scopeName(ctx context.Context, m *operator.Management) (string, error) {
	if o.scope != "" {
		return o.scope, nil
	}
	s, err := m.Scope(ctx, "")
	if err != nil {
		return "", hint(err, "name it with --scope")
	}
	return s.Name, nil
}

func newScope(a *app) *cobra.Command {
	return parent("scope", "Scopes of a service: each with its own enrollments, hubs, policies and certificates", newScopeList(a), newScopeShow(a), newScopePut(a, true), newScopePut(a, false), newScopeDelete(a), newScopeErase(a))
}

func newScopeList(a *app) *cobra.Command {
	o := &managementOptions{}
	c := &cobra.Command{
		Use: "list --management FILE", Short: "List the scopes", Args: cobra.NoArgs,
		Long:    "list shows the scopes of a resource group.",
		Example: "  touchmark scope list --management service/management.connection",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.onManagement(cmd.Context(), o, func(ctx context.Context, m *operator.Management) error {
				all, err := m.Scopes(ctx)
				if err != nil {
					return err
				}
				var rows [][]string
				for _, s := range all {
					if a.json {
						if err := a.printScope(s); err != nil {
							return err
						}
						continue
					}
					rows = append(rows, []string{s.Name, s.Props.IDScope, s.Location, s.Props.State, s.Props.AllocationPolicy, fmt.Sprint(len(s.Props.Hubs)), s.Props.ServiceOperationsHostName})
				}
				if a.json {
					return nil
				}
				return a.table([]string{"SCOPE", "ID SCOPE", "LOCATION", "STATE", "ALLOCATION", "HUBS", "HOST"}, rows)
			})
		},
	}
	o.flags(c, false)
	return c
}

func (a *app) printScope(s *operator.Scope) error {
	if a.json {
		doc, err := s.Document()
		if err != nil {
			return err
		}
		return a.printJSON(doc)
	}
	network := s.Props.PublicNetworkAccess
	if len(s.Props.IPRules) > 0 {
		network += map[bool]string{true: ": IP rules do not count", false: ", for those whom the IP rules let in"}[network == "Disabled"]
	}
	var quotas, strict string
	if t := s.Props.Touchmark; t != nil && t.Quotas != nil && t.StrictRoots != nil {
		quotas, strict = *t.Quotas, yesNo(*t.StrictRoots)
	}
	rows := [][]string{{"Scope", s.Name}}
	for _, r := range [][2]string{{"ID scope", s.Props.IDScope}, {"location", s.Location}, {"state", s.Props.State}, {"allocation", s.Props.AllocationPolicy},
		{"service host", cmp.Or(s.Props.ServiceOperationsHostName, "none: "+noHost)}, {"devices' host", s.Props.DeviceProvisioningHostName}, {"quotas", quotas}, {"strict roots", strict}, {"public network", network}, {"etag", s.ETag}} {
		if r[1] != "" {
			rows = append(rows, []string{"  " + r[0], r[1]})
		}
	}
	for _, r := range s.Props.IPRules {
		rows = append(rows, []string{"  IP rule " + r.Name, r.String()})
	}
	for _, h := range s.Props.Hubs {
		rows = append(rows, []string{"  hub", h.Name})
	}
	for _, k := range slices.Sorted(maps.Keys(s.Tags)) {
		rows = append(rows, []string{"  tag " + k, s.Tags[k]})
	}
	return a.table(nil, rows)
}

// connectionString is what a policy's holders call the service API of a scope with.
func connectionString(s *operator.Scope, p *operator.Policy) (string, error) {
	if s.Props.ServiceOperationsHostName == "" {
		return "", hint(fmt.Errorf("scope %s has no host for its service API", s.Name), noHost)
	}
	return "HostName=" + s.Props.ServiceOperationsHostName + ";SharedAccessKeyName=" + p.Name + ";SharedAccessKey=" + p.Primary, nil
}

const noHost = "it has one once touchmark serve runs with --domain (touchmark help scopes)"

func newScopeShow(a *app) *cobra.Command {
	o := &managementOptions{}
	var connection bool
	c := &cobra.Command{
		Use: "show [NAME] --management FILE", Short: "Show a scope", Args: cobra.MaximumNArgs(1),
		Long:    "show prints a scope, without keys. With --connection-string it prints a connection string of the service API, and nothing else.",
		Example: "  touchmark scope show plant-a --management service/management.connection\n  touchmark scope show plant-a --connection-string --management service/management.connection > plant-a.connection",
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.onManagement(cmd.Context(), o, func(ctx context.Context, m *operator.Management) error {
				s, err := m.Scope(ctx, strings.Join(args, ""))
				if err != nil {
					return err
				}
				if !connection {
					return a.printScope(s)
				}
				policies, err := m.Policies(ctx, s.Name)
				if err != nil {
					return err
				}
				for _, p := range policies {
					if p.Has("EnrollmentWrite") {
						text, err := connectionString(s, &p)
						switch {
						case err != nil:
							return err
						case a.json:
							return a.printJSON(map[string]string{"connectionString": text})
						}
						_, err = fmt.Fprintln(a.out, text)
						return err
					}
				}
				return fmt.Errorf("scope %s has no policy with EnrollmentWrite", s.Name)
			})
		},
	}
	o.flags(c, false)
	c.Flags().BoolVar(&connection, "connection-string", false, "print a connection string of a policy that may write enrollments")
	return c
}

// scopeSettings are the settings of a scope that more than a text makes.
type scopeSettings struct {
	quotas                   string
	strict                   bool
	rules, removed           []string
	before                   string
	quotasAsked, strictAsked bool
}

func (o *scopeSettings) flags(c *cobra.Command, create bool) {
	f := c.Flags()
	f.StringVar(&o.quotas, "quotas", "", "azure: DPS's limits; none: no limits (touchmark's scopes only)")
	f.BoolVar(&o.strict, "strict-roots", false, "let intermediates of groups count only where their chain goes on to a verified certificate of the scope, as in Azure (touchmark's scopes only)")
	f.StringArrayVar(&o.rules, "ip-rule", nil, "NAME=accept|reject MASK [device|service|all]: a rule, in the place of the one of that name, or behind all others; again for more")
	if !create {
		f.StringVar(&o.before, "ip-rule-before", "", "put the rules of --ip-rule before the rule of this name")
		f.StringArrayVar(&o.removed, "remove-ip-rule", nil, "take the rule of this name away; again for more")
	}
	_ = c.RegisterFlagCompletionFunc("quotas", cobra.FixedCompletions([]string{"azure", "none"}, cobra.ShellCompDirectiveNoFileComp))
}

// apply changes what the flags name. Settings that are touchmark's alone are asked of no service that shows none.
func (o *scopeSettings) apply(c *cobra.Command, s *operator.Scope, create bool) error {
	o.quotasAsked, o.strictAsked = c.Flags().Changed("quotas"), c.Flags().Changed("strict-roots")
	if o.quotasAsked && o.quotas != "azure" && o.quotas != "none" {
		return usageError{fmt.Errorf("--quotas %s: want azure or none", o.quotas)}
	}
	if o.before != "" && len(o.rules) == 0 {
		return usageError{errors.New("--ip-rule-before says where --ip-rule goes, which is missing")}
	}
	var rules []operator.IPRule
	for _, text := range o.rules {
		r, err := operator.ParseIPRule(text)
		if err != nil {
			return usageError{fmt.Errorf("--ip-rule: %w", err)}
		}
		rules = append(rules, r)
	}
	if len(rules)+len(o.removed) > 0 {
		if err := s.SetIPRules(rules, o.before, o.removed); err != nil {
			return hint(err, "touchmark scope show %s lists them", s.Name)
		}
	}
	if !o.quotasAsked && !o.strictAsked {
		return nil
	}
	if !create {
		if err := o.taken(s); err != nil {
			return err
		}
	}
	own := operator.ScopeOwn{}
	if o.quotasAsked {
		own.Quotas = &o.quotas
	}
	if o.strictAsked {
		own.StrictRoots = &o.strict
	}
	return s.SetProperty("touchmark", own)
}

// taken says whether the service has the settings that were asked for.
func (o *scopeSettings) taken(s *operator.Scope) error {
	if s.Props.Touchmark != nil || !o.quotasAsked && !o.strictAsked {
		return nil
	}
	return hint(fmt.Errorf("scope %s is at a service that does not take --quotas or --strict-roots", s.Name), "they are touchmark's own: Azure has its quotas, and is strict about roots, always")
}

func newScopePut(a *app, create bool) *cobra.Command {
	o := &managementOptions{}
	settings := &scopeSettings{}
	var location, allocation, access string
	var tags map[string]string
	verb, short, long := "update", "Change a scope", "update changes what flags name. Linked hubs, policies and certificates stay."
	example := `  touchmark scope update plant-a --quotas azure --management service/management.connection
  touchmark scope update plant-a --ip-rule 'plant=accept 10.8.0.0/16 device' --ip-rule 'nobody=reject 0.0.0.0/0' --ip-rule 'nobody 6=reject ::/0' --management service/management.connection
  touchmark scope update plant-a --ip-rule 'office=accept 192.0.2.0/24 service' --ip-rule-before nobody --management service/management.connection`
	if create {
		verb, short, long = "create", "Make a scope", "create makes a scope with an ID scope of its own, and waits until it is there."
		example = "  touchmark scope create plant-a --allocation-policy hashed --management service/management.connection"
	}
	long += `

IP rules are tried in their order: the first that matches decides, and who matches none is let in. touchmark help management says more.`
	c := &cobra.Command{
		Use: verb + " NAME --management FILE", Short: short, Long: long, Args: cobra.ExactArgs(1),
		Example: example,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.onManagement(cmd.Context(), o, func(ctx context.Context, m *operator.Management) error {
				change := func(s *operator.Scope) error {
					var errs []error
					for flag, p := range map[string]struct{ name, value string }{"allocation-policy": {"allocationPolicy", allocation}, "public-network-access": {"publicNetworkAccess", access}} {
						if cmd.Flags().Changed(flag) {
							errs = append(errs, s.SetProperty(p.name, p.value))
						}
					}
					if cmd.Flags().Changed("tag") {
						all := make(map[string]string)
						maps.Copy(all, s.Tags)
						for k, v := range tags {
							if all[k] = v; v == "" {
								delete(all, k)
							}
						}
						errs = append(errs, s.SetTags(all))
					}
					return errors.Join(append(errs, settings.apply(cmd, s, create))...)
				}
				var s *operator.Scope
				var err error
				if create {
					if _, err := m.Scope(ctx, args[0]); !errors.Is(err, operator.ErrNotFound) {
						if err == nil {
							err = hint(fmt.Errorf("scope %s exists already", args[0]), "touchmark scope update changes it")
						}
						return err
					}
					s = operator.NewScope(args[0], location)
					if err := change(s); err != nil {
						return err
					}
					s, err = m.PutScope(ctx, s)
				} else {
					s, err = m.EditScope(ctx, args[0], change)
				}
				if err != nil {
					return err
				}
				return errors.Join(a.printScope(s), settings.taken(s))
			})
		},
	}
	o.flags(c, false)
	settings.flags(c, create)
	f := c.Flags()
	if create {
		f.StringVar(&location, "location", "local", "where it is: a region")
	}
	f.StringVar(&allocation, "allocation-policy", "", "Hashed, GeoLatency or Static")
	f.StringVar(&access, "public-network-access", "", "Enabled or Disabled")
	f.StringToStringVar(&tags, "tag", nil, "NAME=VALUE; an empty value takes it away; again for more")
	_ = c.RegisterFlagCompletionFunc("allocation-policy", cobra.FixedCompletions([]string{"Hashed", "GeoLatency", "Static"}, cobra.ShellCompDirectiveNoFileComp))
	_ = c.RegisterFlagCompletionFunc("public-network-access", cobra.FixedCompletions([]string{"Enabled", "Disabled"}, cobra.ShellCompDirectiveNoFileComp))
	return c
}

func newScopeDelete(a *app) *cobra.Command {
	o := &managementOptions{}
	var yes bool
	c := &cobra.Command{
		Use: "delete NAME --management FILE", Short: "Delete a scope with all that is in it", Args: cobra.ExactArgs(1),
		Long: "delete takes a scope away with its enrollments, registrations, policies and certificates. Its devices find no service any more.\n" +
			"The first one, which the service itself stands on, is not deleted: touchmark scope erase empties it.",
		Example: "  touchmark scope delete plant-a --management service/management.connection --yes",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := a.confirm(cmd.Context(), yes, "deleting scope "+args[0]+" with all its enrollments", args[0]); err != nil {
				return err
			}
			return a.onManagement(cmd.Context(), o, func(ctx context.Context, m *operator.Management) error {
				err := m.DeleteScope(ctx, args[0])
				var answer *operator.Error
				if errors.As(err, &answer) && answer.Status == http.StatusConflict {
					return hint(err, "touchmark scope erase %s deletes what is in it, and keeps the scope", args[0])
				}
				if err != nil {
					return err
				}
				return a.printDone("deleted", "scope", args[0])
			})
		},
	}
	o.flags(c, false)
	c.Flags().BoolVar(&yes, "yes", false, "do not ask")
	return c
}

func newScopeErase(a *app) *cobra.Command {
	o := &managementOptions{}
	var yes bool
	c := &cobra.Command{
		Use: "erase NAME --management FILE", Short: "Delete all that is in a scope, and keep the scope", Args: cobra.ExactArgs(1),
		Long: `erase deletes what a touchmark service keeps of a scope's devices: enrollments, groups, registrations, attempts, what bundles said,
orders, certificates, what hubs have yet to be told, and the audit record, which begins anew with who did this. The scope stays, with
its name and ID scope, hubs, policies, rules, tags, and counts of usage. Nobody is let in until it is done; it goes on when the service
is started again. Hubs are not told: devices stay what they are there. It cannot be undone. touchmark help management says how far it
reaches into files and backups.`,
		Example: "  touchmark scope erase plant-a --management service/management.connection --yes",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := a.confirm(cmd.Context(), yes, "erasing all enrollments, registrations and records of scope "+args[0], args[0]); err != nil {
				return err
			}
			return a.onManagement(cmd.Context(), o, func(ctx context.Context, m *operator.Management) error {
				err := m.EraseScope(ctx, args[0])
				if errors.Is(err, operator.ErrUnsupported) {
					return hint(err, "only touchmark erases a scope and keeps it: delete it (touchmark scope delete), and make another")
				}
				if err != nil {
					return err
				}
				return a.printDone("erased", "scope", args[0])
			})
		},
	}
	o.flags(c, false)
	c.Flags().BoolVar(&yes, "yes", false, "do not ask")
	return c
}
