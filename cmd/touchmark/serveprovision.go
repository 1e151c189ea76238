package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/pkg/allocation"
	"github.com/touchmark/touchmark/pkg/hub"
	"github.com/touchmark/touchmark/pkg/registration"
)

// provisionOptions are about choosing hubs and telling them.
type provisionOptions struct {
	latencyTable string
	giveUp       time.Duration
}

func (o *provisionOptions) flags(c *cobra.Command) {
	f := c.Flags()
	f.StringVar(&o.latencyTable, "latency-table", "", "file, TOML or CSV, that says how far hubs' locations are from devices' networks, for the allocation policy geoLatency")
	f.DurationVar(&o.giveUp, "hub-give-up", registration.DefaultGiveUp, "how long a device waits for a hub that does not answer before its registration fails")
	_ = c.MarkFlagFilename("latency-table", "toml", "csv")
}

// provisioning has services tell hubs. The pool of hubs is to be closed behind everything that uses it.
func (o *provisionOptions) provisioning(cfg *registration.Config) (*hub.Pool, error) {
	if o.giveUp < time.Second {
		return nil, usageError{fmt.Errorf("--hub-give-up %v: want a second at least", o.giveUp)}
	}
	if o.latencyTable != "" {
		b, err := os.ReadFile(o.latencyTable)
		if err == nil {
			cfg.Latency, err = allocation.Parse(o.latencyTable, b)
		}
		if err != nil {
			return nil, usageError{fmt.Errorf("reading the latency table: %w", err)}
		}
	}
	pool := hub.NewPool(hub.PoolConfig{})
	cfg.Webhook, cfg.GiveUp = hub.NewWebhook(hub.WebhookConfig{LoopbackHTTP: cfg.HTTPWebhooks}), o.giveUp
	return pool, nil
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
