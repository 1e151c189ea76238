package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
)

// startActor is the start of the service, for the audit record.
var startActor = registration.Actor{Name: "the start of the service"}

// linkHubs brings the first scope into the store at the first start, has the hubs linked that this start names, and no others that
// an earlier start named. Hubs that operators linked stay as they are. It returns how many are linked.
func (o *serveOptions) linkHubs(ctx context.Context, store registration.Store, d *serviceData) (linked int, err error) {
	fromStart := registration.Records(o.hubs...)
	for i := range fromStart {
		if fromStart[i].FromStart = true; o.builtin && fromStart[i].Name == o.hostnames[0] {
			fromStart[i].Kind = registration.HubBuiltin
		}
	}
	edit := func(sc *registration.Scope) (*registration.Scope, error) {
		if sc == nil {
			sc = &registration.Scope{ID: d.scope, Name: cmp.Or(o.name, "touchmark-"+dps.Fold(d.scope))}
			sc.Quotas = o.meter.quotas
		}
		if o.meter.quotasAsked {
			sc.Quotas = o.meter.quotas
		}
		sc.Name = cmp.Or(o.name, sc.Name)
		locate(sc)
		sc.Hubs = slices.DeleteFunc(sc.Hubs, func(h registration.LinkedHub) bool { return h.FromStart })
		for _, h := range fromStart {
			if sc.Hub(h.Name) == nil {
				sc.Hubs = append(sc.Hubs, h)
			}
		}
		linked = len(sc.Hubs)
		return sc, nil
	}
	same := false
	err = store.View(ctx, func(tx registration.Tx) error {
		was, err := tx.Scope(dps.Fold(d.scope))
		if err != nil {
			return ignoreAbsent(err)
		}
		is := *was
		is.Hubs = slices.Clone(was.Hubs)
		_, err = edit(&is)
		same = slices.Equal(was.Hubs, is.Hubs) && was.Name == is.Name && was.Subscription == is.Subscription && was.ResourceGroup == is.ResourceGroup && was.Location == is.Location && was.Quotas == is.Quotas
		return err
	})
	if err == nil && !same {
		_, _, err = registration.EditScope(ctx, store, d.scope, startActor, "link", time.Now(), edit)
	}
	if err != nil {
		err = fmt.Errorf("linking hubs to ID scope %s: %w", d.scope, err)
	}
	return linked, err
}

func ignoreAbsent(err error) error {
	if errors.Is(err, registration.ErrNotFound) {
		return nil
	}
	return err
}
