package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/pkg/operator"
)

func newUsage(a *app) *cobra.Command {
	o := &serviceOptions{}
	c := &cobra.Command{
		Use: "usage --service FILE", Short: "Show what was used of a service", Args: cobra.NoArgs,
		Long:    "usage shows how often each operation was called, and how much of it Azure would bill. Only touchmark tells.",
		Example: "  touchmark usage --service service/owner.connection",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.onService(cmd.Context(), o, func(ctx context.Context, svc *service) error {
				usage, err := svc.Usage(ctx)
				if errors.Is(err, operator.ErrUnsupported) {
					return hint(err, "Azure shows usage in its portal, under metrics")
				}
				if err != nil {
					return err
				}
				if a.json {
					return a.printJSON(usage)
				}
				var v any
				dec := json.NewDecoder(bytes.NewReader(usage))
				dec.UseNumber()
				if err := dec.Decode(&v); err != nil {
					return err
				}
				return a.table([]string{"USED", "COUNT"}, leaves("", v, nil))
			})
		},
	}
	o.flags(c)
	return c
}

// leaves lists every value of a document with its path: the report may tell more than this program knows.
func leaves(path string, v any, rows [][]string) [][]string {
	switch v := v.(type) {
	case map[string]any:
		for _, k := range slices.Sorted(maps.Keys(v)) {
			at := k
			if path != "" {
				at = path + "." + k
			}
			rows = leaves(at, v[k], rows)
		}
	case []any:
		for i, e := range v {
			rows = leaves(fmt.Sprintf("%s[%d]", path, i), e, rows)
		}
	default:
		rows = append(rows, []string{path, fmt.Sprint(v)})
	}
	return rows
}
