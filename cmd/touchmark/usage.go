package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/pkg/operator"
)

func newUsage(a *app) *cobra.Command {
	o := &serviceOptions{}
	var from, to, format string
	c := &cobra.Command{
		Use: "usage --service FILE", Short: "Show what was used of a service", Args: cobra.NoArgs,
		Long:    "usage shows how often each operation was called in this month, or from one day to another, and what of it Azure would bill. Only\ntouchmark tells. With --json and\n--format csv it is by day.",
		Example: "  touchmark usage --service service/owner.connection\n  touchmark usage --from 2026-11-01 --to 2026-11-30 --service service/owner.connection --json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			w, err := a.newRows(format, []string{"date", "api", "operation", "result", "calls", "billable"})
			if err != nil {
				return err
			}
			return a.onService(cmd.Context(), o, func(ctx context.Context, svc *service) error {
				u, err := svc.Usage(ctx, from, to)
				if errors.Is(err, operator.ErrUnsupported) {
					return hint(err, "Azure shows usage in its portal, under metrics")
				}
				if err != nil {
					return err
				}
				if a.json {
					return a.printJSON(u)
				}
				if w != nil {
					for _, d := range u.Days {
						for _, i := range d.Usage {
							_ = w.Write([]string{d.Date, i.API, i.Operation, i.Result, strconv.FormatInt(i.Calls, 10), strconv.FormatBool(i.Billable)}) // its error comes below
						}
					}
					w.Flush()
					return w.Error()
				}
				return a.printUsage(u)
			})
		},
	}
	o.flags(c)
	formatFlag(c, &format)
	c.Flags().StringVar(&from, "from", "", "first day, as in 2026-11-01 (default: the first of the month)")
	c.Flags().StringVar(&to, "to", "", "last day (default: today)")
	return c
}

func (a *app) printUsage(u *operator.Usage) error {
	if err := a.table(nil, [][]string{{"Usage", u.IDScope}, {"  from", u.From}, {"  to", u.To}, {"  calls", fmt.Sprint(u.Calls)}, {"  Azure would bill", fmt.Sprint(u.Billable)}}); err != nil {
		return err
	}
	var items []operator.UsageItem
	at := make(map[operator.UsageItem]int)
	for _, d := range u.Days {
		for _, i := range d.Usage {
			n := i.Calls
			i.Calls = 0
			if _, ok := at[i]; !ok {
				at[i], items = len(items), append(items, i)
			}
			items[at[i]].Calls += n
		}
	}
	var rows [][]string
	for _, i := range items {
		rows = append(rows, []string{i.API, i.Operation, i.Result, fmt.Sprint(i.Calls), yesNo(i.Billable)})
	}
	if len(rows) == 0 {
		return nil
	}
	fmt.Fprintln(a.out)
	return a.table([]string{"API", "OPERATION", "RESULT", "CALLS", "BILLED"}, rows)
}
