package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"strings"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/pkg/access"
	"github.com/touchmark/touchmark/pkg/arm"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/hub"
	"github.com/touchmark/touchmark/pkg/registration"
)

const (
	managementFile = "management.connection"
	// Where the first scope stands among resources, until somebody says otherwise: Azure has no subscription of that ID.
	firstSubscription  = "00000000-0000-0000-0000-000000000000"
	firstResourceGroup = "touchmark"
	firstLocation      = "global"
)

// admitOptions say who may come in where the public may not, and how hubs are linked.
type admitOptions struct {
	privateNetworks []string
	noHubCheck      bool

	private []netip.Prefix // of privateNetworks
}

func (o *admitOptions) flags(c *cobra.Command) {
	f := c.Flags()
	f.StringArrayVar(&o.privateNetworks, "private-network", nil, "address or CIDR of callers that a scope lets in whose public network access is disabled, beside loopback; again for more")
	f.BoolVar(&o.noHubCheck, "no-hub-check", false, "link hubs through the management API without asking them whether they are there")
}

func (o *admitOptions) check() (err error) {
	o.private, err = networks("--private-network", o.privateNetworks)
	return err
}

// locate gives a scope its place among resources, where it has none.
func locate(sc *registration.Scope) {
	sc.Subscription = cmp.Or(sc.Subscription, firstSubscription)
	sc.ResourceGroup = cmp.Or(sc.ResourceGroup, firstResourceGroup)
	sc.Location = cmp.Or(sc.Location, firstLocation)
}

// management returns the management API, and writes where it is into the data directory; address is empty where there is no HTTPS
// door.
func (o *serveOptions) management(ctx context.Context, d *serviceData, scopes *registration.Scopes, bearer *access.Authenticator, ready map[string]any, log *slog.Logger) (*arm.Server, error) {
	address, _ := ready["https"].(string)
	address = strings.TrimSuffix(address, ":443")
	cfg := arm.Config{
		Scopes: scopes, Access: bearer, First: d.scope, DeviceHost: address, Log: log,
		ServiceHost: func(sc *registration.Scope) string {
			if dps.Fold(sc.ID) == dps.Fold(d.scope) {
				return address
			}
			return o.hostOf(sc, address)
		},
		Hubs: arm.Hubs{Mask: hub.Mask, Restore: hub.Restore, Parse: func(kind registration.HubKind, text string) (string, error) {
			c, err := hub.ParseConnection(kind, text)
			if err != nil {
				return "", err
			}
			return c.Host, nil
		}},
	}
	if !o.admit.noHubCheck {
		cfg.Hubs.Check = func(ctx context.Context, scope string, h registration.LinkedHub) error {
			return checkHub(ctx, h, o.publicOnly(d.scope, scope))
		}
	}
	server := arm.New(ctx, cfg)
	err := server.Resume(ctx)
	if err != nil {
		return nil, fmt.Errorf("taking up deletions: %w", err)
	}
	var first *registration.Scope
	if err = scopes.Store().View(ctx, func(tx registration.Tx) (err error) {
		first, err = tx.Scope(dps.Fold(d.scope))
		return err
	}); err != nil {
		return nil, err
	}
	text := fmt.Sprintf("Endpoint=https://%s;Token=%s;Subscription=%s;ResourceGroup=%s", address, d.managementToken, first.Subscription, first.ResourceGroup)
	switch {
	case address == "":
	case d.dir != "":
		ready["managementConnectionFile"] = d.path(managementFile)
		return server, writeFile(d.path(managementFile), []byte(text+"\n"), 0o600, true)
	case o.connectionOut == "":
		ready["managementConnection"] = text
	}
	return server, nil
}

// hostOf is where the service API of a scope is that is not the first: below the domain, on the port of the HTTPS door. Without a
// domain it is nowhere.
func (o *serveOptions) hostOf(sc *registration.Scope, address string) string {
	if o.domain == "" {
		return ""
	}
	_, port, ok := strings.Cut(address, ":")
	host := strings.ToLower(sc.Name) + "." + o.domain
	if ok {
		host += ":" + port
	}
	return host
}

// checkHub asks a hub whether it is there.
func checkHub(ctx context.Context, linked registration.LinkedHub, publicOnly bool) error {
	h, err := hub.Open(hub.Config{Hub: linked, PublicOnly: publicOnly})
	if err != nil {
		return err
	}
	err = h.Check(ctx)
	if c, ok := h.(io.Closer); ok {
		err = errors.Join(err, c.Close())
	}
	return err
}
