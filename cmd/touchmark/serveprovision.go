package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/pkg/allocation"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/hub"
	"github.com/touchmark/touchmark/pkg/registration"
)

// provisionOptions are about choosing hubs and telling them.
type provisionOptions struct {
	latencyTable      string
	giveUp            time.Duration
	tenantsPublicOnly bool
}

func (o *provisionOptions) flags(c *cobra.Command) {
	f := c.Flags()
	f.StringVar(&o.latencyTable, "latency-table", "", "file, TOML or CSV, that says how far hubs' locations are from devices' networks, for the allocation policy geoLatency")
	f.DurationVar(&o.giveUp, "hub-give-up", registration.DefaultGiveUp, "how long a device waits for a hub that does not answer before its registration fails")
	f.BoolVar(&o.tenantsPublicOnly, "tenants-public-only", false, "let scopes other than the first have hubs and webhooks at public addresses only, for tenants who link hubs themselves")
	_ = c.MarkFlagFilename("latency-table", "toml", "csv")
}

// publicOnly reports whether a scope's hubs and webhooks must be at public addresses.
func (o *provisionOptions) publicOnly(first, scope string) bool {
	return o.tenantsPublicOnly && dps.Fold(scope) != dps.Fold(first)
}

// provisioning has services tell hubs, and returns what calls the webhooks of other scopes than the first. The pool of hubs is to be
// closed behind everything that uses it.
func (o *provisionOptions) provisioning(cfg *registration.Config, first string) (*hub.Pool, registration.Webhook, error) {
	if o.giveUp < time.Second {
		return nil, nil, usageError{fmt.Errorf("--hub-give-up %v: want a second at least", o.giveUp)}
	}
	if o.latencyTable != "" {
		b, err := os.ReadFile(o.latencyTable)
		if err == nil {
			cfg.Latency, err = allocation.Parse(o.latencyTable, b)
		}
		if err != nil {
			return nil, nil, usageError{fmt.Errorf("reading the latency table: %w", err)}
		}
	}
	pool := hub.NewPool(hub.PoolConfig{PublicOnly: func(scope string) bool { return o.publicOnly(first, scope) }})
	cfg.Webhook, cfg.GiveUp = hub.NewWebhook(hub.WebhookConfig{LoopbackHTTP: cfg.HTTPWebhooks}), o.giveUp
	return pool, hub.NewWebhook(hub.WebhookConfig{LoopbackHTTP: cfg.HTTPWebhooks, PublicOnly: o.tenantsPublicOnly}), nil
}

// startProvisioning works at what hubs have yet to be told until stop is called, which waits for what is under way. Doors go before
// it does: a registration that they answer may leave something to tell.
func startProvisioning(scopes *registration.Scopes) (stop func() error) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		scopes.Provision(ctx)
	}()
	return func() error {
		cancel()
		<-done
		return nil
	}
}
