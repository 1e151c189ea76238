package main

import (
	"context"
	"encoding/base64"
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
	webhookRetries    int
	webhookSecret     string // file
	webhookCA         string
}

// maxWebhookRetries leaves one registration's calls below what has a webhook called no more for a while.
const maxWebhookRetries = 3

func (o *provisionOptions) flags(c *cobra.Command) {
	f := c.Flags()
	f.StringVar(&o.latencyTable, "latency-table", "", "file, TOML or CSV, that says how far hubs' locations are from devices' networks, for the allocation policy geoLatency")
	f.DurationVar(&o.giveUp, "hub-give-up", registration.DefaultGiveUp, "how long a device waits for a hub that does not answer before its registration fails")
	f.BoolVar(&o.tenantsPublicOnly, "tenants-public-only", false, "let scopes other than the first have hubs and webhooks at public addresses only, for tenants who link hubs themselves")
	f.IntVar(&o.webhookRetries, "webhook-retries", 0, fmt.Sprintf("how often an allocation webhook is called again that gives no answer, or 5xx, within the ten seconds of its first call: up to %d", maxWebhookRetries))
	f.StringVar(&o.webhookSecret, "webhook-secret-file", "", "file with the secret that calls of the first scope's allocation webhooks are signed with, base64 of 16 to 64 octets; - is standard input")
	f.StringVar(&o.webhookCA, "webhook-ca", "", "PEM file with the CAs that certificates of the first scope's allocation webhooks are judged by, instead of the system's")
	_ = c.MarkFlagFilename("latency-table", "toml", "csv")
}

// publicOnly reports whether a scope's hubs and webhooks must be at public addresses.
func (o *provisionOptions) publicOnly(first, scope string) bool {
	return o.tenantsPublicOnly && dps.Fold(scope) != dps.Fold(first)
}

// provisioning has services tell hubs, and returns what calls the webhooks of other scopes than the first. The pool of hubs is to be
// closed behind everything that uses it.
func (o *provisionOptions) provisioning(a *app, cfg *registration.Config, first string) (*hub.Pool, registration.Webhook, error) {
	if o.giveUp < time.Second {
		return nil, nil, usageError{fmt.Errorf("--hub-give-up %v: want a second at least", o.giveUp)}
	}
	if o.webhookRetries < 0 || o.webhookRetries > maxWebhookRetries {
		return nil, nil, usageError{fmt.Errorf("--webhook-retries %d: want 0 to %d", o.webhookRetries, maxWebhookRetries)}
	}
	// A secret would sign whatever a tenant has its devices say, for a host of the tenant's choosing, and a private CA speaks for
	// the operator's hosts alone: both are for the first scope.
	tenants := hub.WebhookConfig{LoopbackHTTP: cfg.HTTPWebhooks, Retries: o.webhookRetries, PublicOnly: o.tenantsPublicOnly}
	own := hub.WebhookConfig{LoopbackHTTP: cfg.HTTPWebhooks, Retries: o.webhookRetries}
	if o.webhookSecret != "" {
		key, err := a.readKeyFile("--webhook-secret-file", o.webhookSecret)
		if err == nil {
			own.Secret, err = base64.StdEncoding.DecodeString(key)
		}
		if err != nil {
			return nil, nil, err
		}
	}
	var err error
	if own.RootCAs, err = loadRoots(o.webhookCA); err != nil {
		return nil, nil, fmt.Errorf("--webhook-ca: %w", err)
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
	cfg.Webhook, cfg.GiveUp = hub.NewWebhook(own), o.giveUp
	return pool, hub.NewWebhook(tenants), nil
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
