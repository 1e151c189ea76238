package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/pkg/station"
)

func newOperator(a *app) *cobra.Command {
	var file, name string
	var lead, pin bool
	add := &cobra.Command{
		Use: "add NAME --file FILE", Short: "Add an operator, or give one a new badge", Args: cobra.ExactArgs(1),
		Long: `add asks for the operator's badge to be scanned, and for a PIN with --pin, and keeps hashes of both. Where there is no terminal
both are lines on standard input.`,
		Example: "  touchmark operator add 'Mai Tran' --file line-3/operators.toml --pin\n  touchmark operator add 'Jo Lead' --file line-3/operators.toml --lead",
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.editOperators(file, func(o *station.Operators) error {
				badge, number, err := a.askBadge(cmd.Context(), pin)
				if err != nil {
					return err
				}
				return o.Add(args[0], badge, number, lead)
			})
		},
	}
	add.Flags().BoolVar(&lead, "lead", false, "a lead, who may do what others may not")
	add.Flags().BoolVar(&pin, "pin", false, "ask for a PIN, which the station then asks for as well")
	list := &cobra.Command{
		Use: "list --file FILE", Short: "List the operators", Args: cobra.NoArgs, Example: "  touchmark operator list --file line-3/operators.toml",
		RunE: func(*cobra.Command, []string) error {
			return a.readOperators(file, func(o *station.Operators) error {
				var rows [][]string
				for _, p := range o.Operator {
					if a.json {
						if err := a.printJSON(map[string]any{"name": p.Name, "lead": p.Lead, "pin": p.PIN != ""}); err != nil {
							return err
						}
						continue
					}
					rows = append(rows, []string{p.Name, yesNo(p.Lead), yesNo(p.PIN != "")})
				}
				if a.json {
					return nil
				}
				return a.table([]string{"NAME", "LEAD", "PIN"}, rows)
			})
		},
	}
	remove := &cobra.Command{
		Use: "remove NAME --file FILE", Short: "Remove an operator", Args: cobra.ExactArgs(1), Example: "  touchmark operator remove 'Mai Tran' --file line-3/operators.toml",
		RunE: func(_ *cobra.Command, args []string) error {
			name = args[0]
			return a.editOperators(file, func(o *station.Operators) error {
				i := slices.IndexFunc(o.Operator, func(p station.Operator) bool { return p.Name == name })
				if i < 0 {
					return fmt.Errorf("operator %q is not in %s", name, file)
				}
				o.Operator = slices.Delete(o.Operator, i, i+1)
				return nil
			})
		},
	}
	for _, c := range []*cobra.Command{add, list, remove} {
		c.Flags().StringVar(&file, "file", "", "the operators' file, which operators of station.toml names (required)")
		_ = c.MarkFlagRequired("file")
	}
	return parent("operator", "Say who works at a station", add, list, remove)
}

func (a *app) readOperators(file string, f func(*station.Operators) error) error {
	o := &station.Operators{}
	r, err := os.Open(file)
	if err == nil {
		o, err = station.ReadOperators(file, r)
		_ = r.Close()
	} else if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	if err != nil {
		return err
	}
	return f(o)
}

func (a *app) editOperators(file string, f func(*station.Operators) error) error {
	return a.readOperators(file, func(o *station.Operators) error {
		if err := f(o); err != nil {
			return err
		}
		b, err := o.Encode()
		if err != nil {
			return err
		}
		return writeFile(file, append([]byte("# Who works here. Badges and PINs are hashes: touchmark operator add\n"), b...), 0o600, true)
	})
}

// askBadge asks for a badge and a PIN.
func (a *app) askBadge(ctx context.Context, pin bool) (badge, number string, err error) {
	if isTerminal(a.in) && !a.noInput {
		b, err := a.askSecret(ctx, "badge (scan it)")
		if err != nil || !pin {
			return string(b), "", err
		}
		n, err := a.askNew(ctx, "PIN")
		return string(b), string(n), err
	}
	lines := bufio.NewScanner(a.in)
	var got []string
	for len(got) < 2 && lines.Scan() {
		got = append(got, strings.TrimSpace(lines.Text()))
	}
	if err := lines.Err(); err != nil {
		return "", "", err
	}
	want := 1
	if pin {
		want = 2
	}
	if len(got) < want || got[want-1] == "" {
		return "", "", usageError{errors.New("standard input has no badge, or no PIN")}
	}
	if pin {
		number = got[1]
	}
	return got[0], number, nil
}
