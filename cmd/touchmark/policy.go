package main

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/pkg/operator"
)

// rights are those of shared access policies (service API, section 2.3).
var rights = []string{"ServiceConfig", "EnrollmentRead", "EnrollmentWrite", "DeviceConnect", "RegistrationStatusRead", "RegistrationStatusWrite"}

func newPolicy(a *app) *cobra.Command {
	return parent("policy", "Shared access policies of a scope: keys that may call the service API", newPolicyList(a), newPolicyShow(a), newPolicyPut(a, true), newPolicyPut(a, false), newPolicyDelete(a), newPolicyRollKey(a))
}

func newPolicyList(a *app) *cobra.Command {
	o := &managementOptions{}
	c := &cobra.Command{
		Use: "list --management FILE", Short: "List the policies", Args: cobra.NoArgs,
		Long:    "list shows the policies of a scope and their rights, without keys.",
		Example: "  touchmark policy list --management service/management.connection",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.onManagement(cmd.Context(), o, func(ctx context.Context, m *operator.Management) error {
				scope, err := o.scopeName(ctx, m)
				if err != nil {
					return err
				}
				policies, err := m.Policies(ctx, scope)
				if err != nil {
					return err
				}
				return a.printPolicies(policies)
			})
		},
	}
	o.flags(c, true)
	return c
}

// printPolicies prints policies without their keys.
func (a *app) printPolicies(policies []operator.Policy) error {
	var rows [][]string
	for _, p := range policies {
		if a.json {
			if err := a.printJSON(operator.Policy{Name: p.Name, Rights: p.Rights}); err != nil {
				return err
			}
			continue
		}
		rows = append(rows, []string{p.Name, p.Rights})
	}
	if a.json {
		return nil
	}
	return a.table([]string{"POLICY", "RIGHTS"}, rows)
}

func policyAt(policies []operator.Policy, name string) (int, error) {
	at := slices.IndexFunc(policies, func(p operator.Policy) bool { return p.Name == name })
	if at < 0 {
		return 0, fmt.Errorf("policy %s: %w", name, operator.ErrNotFound)
	}
	return at, nil
}

func newPolicyShow(a *app) *cobra.Command {
	o := &managementOptions{}
	var keys bool
	c := &cobra.Command{
		Use: "show NAME --management FILE", Short: "Show a policy", Args: cobra.ExactArgs(1),
		Long:    "show prints a policy. Its keys, and a connection string with the primary one, come with --show-keys alone.",
		Example: "  touchmark policy show provisioningserviceowner --management service/management.connection",
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.onManagement(cmd.Context(), o, func(ctx context.Context, m *operator.Management) error {
				scope, err := o.scopeName(ctx, m)
				if err != nil {
					return err
				}
				policies, err := m.Policies(ctx, scope)
				if err != nil {
					return err
				}
				at, err := policyAt(policies, args[0])
				if err != nil {
					return err
				}
				s, err := m.Scope(ctx, scope)
				if err != nil {
					return err
				}
				p := policies[at]
				if !keys {
					return a.printPolicies([]operator.Policy{p})
				}
				connection, err := connectionString(s, &p)
				if a.json {
					return a.printJSON(struct {
						operator.Policy
						Connection string `json:"connectionString,omitempty"`
					}{p, connection})
				}
				if err != nil {
					connection = "none: " + noHost
				}
				return a.table(nil, [][]string{{"Policy", p.Name}, {"  rights", p.Rights}, {"  primary key", p.Primary}, {"  secondary key", p.Secondary},
					{"  connection string", connection}})
			})
		},
	}
	o.flags(c, true)
	c.Flags().BoolVar(&keys, "show-keys", false, "print the keys")
	return c
}

// editPolicies changes the policies of the scope that is meant, and prints the one of that name.
func (a *app) editPolicies(ctx context.Context, o *managementOptions, name string, change func([]operator.Policy) ([]operator.Policy, error)) error {
	return a.onManagement(ctx, o, func(ctx context.Context, m *operator.Management) error {
		scope, err := o.scopeName(ctx, m)
		if err != nil {
			return err
		}
		var now []operator.Policy
		err = m.EditPolicies(ctx, scope, func(p []operator.Policy) ([]operator.Policy, error) {
			now, err = change(p)
			return now, err
		})
		if err != nil {
			return err
		}
		at, err := policyAt(now, name)
		if err != nil {
			return a.printDone("deleted", "policy", name)
		}
		return a.printPolicies(now[at : at+1])
	})
}

func newPolicyPut(a *app, create bool) *cobra.Command {
	o := &managementOptions{}
	var given []string
	verb, short, long := "update", "Change a policy's rights", "update gives a policy other rights. Its keys stay."
	if create {
		verb, short, long = "create", "Make a policy", "create makes a policy with two new keys."
	}
	c := &cobra.Command{
		Use: verb + " NAME --rights RIGHT,… --management FILE", Short: short, Args: cobra.ExactArgs(1),
		Long:    long + " Rights are " + strings.Join(rights, ", ") + ".",
		Example: "  touchmark policy " + verb + " line-3 --rights EnrollmentWrite --management service/management.connection",
		RunE: func(cmd *cobra.Command, args []string) error {
			for i, r := range given {
				at := slices.IndexFunc(rights, func(k string) bool { return strings.EqualFold(k, strings.TrimSpace(r)) })
				if at < 0 {
					return usageError{fmt.Errorf("--rights %s: want of %s", r, strings.Join(rights, ", "))}
				}
				given[i] = rights[at]
			}
			return a.editPolicies(cmd.Context(), o, args[0], func(p []operator.Policy) ([]operator.Policy, error) {
				at, err := policyAt(p, args[0])
				switch {
				case create && err == nil:
					return nil, hint(fmt.Errorf("policy %s exists already", args[0]), "touchmark policy update changes its rights")
				case create:
					return append(p, operator.Policy{Name: args[0], Rights: strings.Join(given, ", ")}), nil
				case err != nil:
					return nil, err
				}
				p[at].Rights = strings.Join(given, ", ")
				return p, nil
			})
		},
	}
	o.flags(c, true)
	c.Flags().StringSliceVar(&given, "rights", nil, "what the policy may do, with commas or again (required)")
	_ = c.MarkFlagRequired("rights")
	_ = c.RegisterFlagCompletionFunc("rights", cobra.FixedCompletions(rights, cobra.ShellCompDirectiveNoFileComp))
	return c
}

func newPolicyDelete(a *app) *cobra.Command {
	o := &managementOptions{}
	var yes bool
	c := &cobra.Command{
		Use: "delete NAME --management FILE", Short: "Delete a policy", Args: cobra.ExactArgs(1),
		Long:    "delete takes a policy away: whoever calls with its keys is refused from then on.",
		Example: "  touchmark policy delete line-3 --management service/management.connection --yes",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := a.confirm(cmd.Context(), yes, "deleting policy "+args[0], args[0]); err != nil {
				return err
			}
			return a.editPolicies(cmd.Context(), o, args[0], func(p []operator.Policy) ([]operator.Policy, error) {
				at, err := policyAt(p, args[0])
				if err != nil {
					return nil, err
				}
				return slices.Delete(p, at, at+1), nil
			})
		},
	}
	o.flags(c, true)
	c.Flags().BoolVar(&yes, "yes", false, "do not ask")
	return c
}

func newPolicyRollKey(a *app) *cobra.Command {
	o := &managementOptions{}
	var slot string
	var yes bool
	c := &cobra.Command{
		Use: "roll-key NAME --key primary|secondary --management FILE", Short: "Put a new key in the place of one of a policy's two", Args: cobra.ExactArgs(1),
		Long: `roll-key makes a new key in one slot of a policy: whoever calls with the old one is refused from then on, and callers with the other
key are not. So move all callers to the secondary key, roll the primary, move them back, and roll the secondary. touchmark policy show
--show-keys prints the keys, touchmark scope show --connection-string the connection string.`,
		Example: "  touchmark policy roll-key provisioningserviceowner --key secondary --management service/management.connection --yes",
		RunE: func(cmd *cobra.Command, args []string) error {
			if slot != "primary" && slot != "secondary" {
				return usageError{fmt.Errorf("--key %s: want primary or secondary", slot)}
			}
			if err := a.confirm(cmd.Context(), yes, "rolling the "+slot+" key of policy "+args[0], args[0]); err != nil {
				return err
			}
			b := make([]byte, 32)
			_, _ = rand.Read(b) // crypto/rand.Read never fails
			return a.editPolicies(cmd.Context(), o, args[0], func(p []operator.Policy) ([]operator.Policy, error) {
				at, err := policyAt(p, args[0])
				if err != nil {
					return nil, err
				}
				key := &p[at].Primary
				if slot == "secondary" {
					key = &p[at].Secondary
				}
				*key = base64.StdEncoding.EncodeToString(b)
				return p, nil
			})
		},
	}
	o.flags(c, true)
	c.Flags().StringVar(&slot, "key", "", "primary or secondary (required)")
	c.Flags().BoolVar(&yes, "yes", false, "do not ask")
	_ = c.MarkFlagRequired("key")
	_ = c.RegisterFlagCompletionFunc("key", cobra.FixedCompletions([]string{"primary", "secondary"}, cobra.ShellCompDirectiveNoFileComp))
	return c
}
