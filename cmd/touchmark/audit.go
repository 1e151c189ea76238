package main

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"time"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/pkg/operator"
	"github.com/touchmark/touchmark/pkg/registration"
)

func newAudit(a *app) *cobra.Command {
	o := &auditOptions{}
	c := &cobra.Command{
		Use: "list --service FILE", Short: "List who changed what", Args: cobra.NoArgs,
		Long: `list shows the audit record of a service, oldest first: every change of enrollments, groups, registrations, policies and of the
service itself, every import, and every time that keys were shown; who did it, from where, and the hash of the content before and
after. Nothing takes an entry away. Attempts that were denied are in the service's log and not here. Only touchmark has it; it takes
the right ServiceConfig.`,
		Example: "  touchmark audit list --service service/owner.connection --since 24h\n  touchmark audit list --service service/owner.connection --since 2026-01-31T00:00:00Z --json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.onService(cmd.Context(), &o.serviceOptions, func(ctx context.Context, svc *service) error { return a.runAuditList(ctx, svc, o) })
		},
	}
	o.flags(c)
	c.Flags().StringVar(&o.since, "since", "", "show what came after a time, or within a while until now: 2026-01-31T00:00:00Z, 24h")
	c.Flags().IntVar(&o.limit, "limit", 10_000, "show so many entries at most")
	return parent("audit", "The record of who changed what at a service", c)
}

type auditOptions struct {
	serviceOptions
	since string
	limit int
}

func (a *app) runAuditList(ctx context.Context, svc *service, o *auditOptions) error {
	path := "/touchmark/audit"
	if o.since != "" {
		at, err := time.Parse(time.RFC3339, o.since)
		if err != nil {
			while, err := time.ParseDuration(o.since)
			if err != nil || while < 0 {
				return usageError{fmt.Errorf("--since %q: want a time, such as 2026-01-31T00:00:00Z, or a while, such as 24h", o.since)}
			}
			at = time.Now().Add(-while)
		}
		path += "?since=" + url.QueryEscape(at.UTC().Format(time.RFC3339Nano))
	}
	if o.limit < 1 {
		return usageError{fmt.Errorf("--limit %d: want at least 1", o.limit)}
	}
	entries, err := operator.List[registration.Audit](ctx, svc.Client, path, o.limit+1)
	if errors.Is(err, operator.ErrNotFound) {
		return hint(err, "only a touchmark service has an audit record; Azure's is in its activity log")
	}
	if err != nil {
		return err
	}
	more := len(entries) > o.limit
	if more {
		entries = entries[:o.limit]
	}
	var rows [][]string
	for _, e := range entries {
		if a.json {
			if err := a.printJSON(e); err != nil {
				return err
			}
			continue
		}
		rows = append(rows, []string{e.At.Format("2006-01-02 15:04:05"), e.Actor, e.Remote, e.Action, e.Object, short(e.Before), short(e.After)})
	}
	if !a.json {
		err = a.table([]string{"TIME (UTC)", "WHO", "FROM", "DID", "TO", "BEFORE", "AFTER"}, rows)
	}
	if more {
		a.note("there is more: go on with --since %s", entries[len(entries)-1].At.Format(time.RFC3339Nano))
	}
	return err
}

// short is the beginning of a hash, or a dash for none.
func short(hash string) string {
	if hash == "" {
		return "-"
	}
	return hash[:min(len(hash), 12)]
}
