package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/pkg/access"
	"github.com/touchmark/touchmark/pkg/registration"
)

// accessOptions are how operators reach scopes, and what they may say.
type accessOptions struct {
	domain, oidc                            string
	strictQuery, unlinkedHubs, httpWebhooks bool
}

func (o *accessOptions) flags(c *cobra.Command) {
	f := c.Flags()
	f.StringVar(&o.domain, "domain", "", "domain below which each provisioning service has its host, NAME.DOMAIN; without it all calls are for the first one")
	f.StringVar(&o.oidc, "oidc", "", "TOML file with an identity provider whose bearer tokens count, and what its roles are worth: touchmark help access")
	f.BoolVar(&o.strictQuery, "strict-query", false, "honour WHERE in queries of the service API, and refuse what is not understood; Azure returns everything whatever the text")
	f.BoolVar(&o.unlinkedHubs, "allow-unlinked-hubs", false, "let enrollments name hubs that are not linked, or not yet")
	f.BoolVar(&o.httpWebhooks, "allow-http-webhooks", false, "let enrollments name webhooks of this machine without TLS")
}

func (o *accessOptions) check() error {
	if o.domain == "" {
		return nil
	}
	if err := checkHost(o.domain); err != nil {
		return usageError{fmt.Errorf("--domain: %w", err)}
	}
	return nil
}

// tlsNames are those that the service's own certificate is for.
func (o *serveOptions) tlsNames() []string {
	if o.domain == "" {
		return o.hostnames
	}
	return append(o.hostnames[:len(o.hostnames):len(o.hostnames)], "*."+o.domain)
}

// enrollable is what enrollments may name.
func (o *accessOptions) enrollable(cfg *registration.Config) {
	cfg.UnlinkedHubs, cfg.HTTPWebhooks = o.unlinkedHubs, o.httpWebhooks
}

const managementTokenFile = "management.token"

// bearer knows the management token, which is made at the first start, and the tokens of the identity provider.
func (d *serviceData) bearer(o *accessOptions) (*access.Authenticator, error) {
	token, err := d.ensure(managementTokenFile, 0o600, func() ([]byte, error) {
		return append([]byte(base64.RawURLEncoding.EncodeToString(d.seed.Bytes("management token", 32))), '\n'), nil
	})
	if err != nil {
		return nil, fmt.Errorf("management token: %w", err)
	}
	token = bytes.TrimSpace(token)
	if len(token) < 32 {
		return nil, fmt.Errorf("%s holds no token: want 32 characters or more; without the file a start makes one", d.path(managementTokenFile))
	}
	d.managementToken = string(token)
	sum := sha256.Sum256(token)
	cfg := access.Config{Management: &sum}
	if o.oidc != "" {
		text, err := readSmall(o.oidc)
		if err != nil {
			return nil, usageError{fmt.Errorf("--oidc: %w", err)}
		}
		if cfg.OIDC, err = access.ParseOIDC(text); err != nil {
			return nil, usageError{fmt.Errorf("--oidc %s: %w", o.oidc, err)}
		}
	}
	return access.New(cfg), nil
}

// described adds to what a start tells where the management token is, or, where nothing is kept, the token.
func (d *serviceData) described(ready map[string]any) {
	if d.dir == "" {
		ready["managementToken"] = d.managementToken
	} else {
		ready["managementTokenFile"] = d.path(managementTokenFile)
	}
}
