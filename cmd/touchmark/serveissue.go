package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/pkg/ca"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/settings"
	"github.com/touchmark/touchmark/templates"
)

// issueOptions are the flags of serve about what register answers besides an operation.
type issueOptions struct {
	issuers []string
	atOnce  []string
}

func (o *issueOptions) flags(c *cobra.Command) {
	f := c.Flags()
	f.StringArrayVar(&o.issuers, "issuer", nil, "TOML file of a CA that signs operational certificates for devices that send a request; again for more (touchmark help issuers)")
	f.StringArrayVar(&o.atOnce, "assigned-at-once", nil, "client version, * for any text, that is told its assignment in the answer to register, as Azure's SDK for Node takes it ('azure-iot-provisioning-device/*'); again for more")
	_ = c.MarkFlagFilename("issuer", "toml")
}

// issuerConfig is the file of --issuer. Its comments are the manual.
type issuerConfig struct {
	// name is what enrollments call the CA, in clientCertificateIssuancePolicy.certificateAuthorityName.
	Name string `toml:"name"`
	// chain is a PEM file with the CA's certificate and what is above it, the root last. Paths count from this file's directory.
	Chain string `toml:"chain"`
	// key is the key URI of the CA's key: file:DIR?object=NAME, pkcs11:token=…;object=NAME?module-path=…&pin-source=…, or
	// tpm:object=NAME?keys=DIR.
	Key string `toml:"key"`
	// days is for how long certificates are valid, 1 to 3650; 90 when it is left out. None outlives its CA.
	Days int `toml:"days"`
	// keys are the kinds of keys that devices may bring: EC-P256, EC-P384, RSA-2048, RSA-3072, RSA-4096, Ed25519; all when it is
	// left out.
	Keys []hsm.Algorithm `toml:"keys"`
}

// openIssuers puts into a service's configuration what the flags say. What it returns closes the issuers' key stores, also when
// there is an error.
func (a *app) openIssuers(ctx context.Context, o *issueOptions, cfg *registration.Config) (closeAll func() error, err error) {
	var stores []hsm.Store
	closeAll = func() error {
		var errs []error
		for _, s := range stores {
			errs = append(errs, s.Close())
		}
		return errors.Join(errs...)
	}
	for _, p := range o.atOnce {
		if strings.Trim(p, "*") == "" {
			return closeAll, usageError{fmt.Errorf("--assigned-at-once %q is every client, and some give up on it: want the beginning of a client version", p)}
		}
	}
	cfg.AtOnce, cfg.Issuers = o.atOnce, make(map[string]registration.Issuer)
	for _, file := range o.issuers {
		c, err := loadIssuer(file)
		if err != nil {
			return closeAll, err
		}
		if cfg.Issuers[c.Name] != nil {
			return closeAll, usageError{fmt.Errorf("--issuer %s: there is another issuer of the name %q", file, c.Name)}
		}
		store, issuer, err := a.openIssuer(ctx, filepath.Dir(file), c)
		if store != nil {
			stores = append(stores, store)
		}
		if err != nil {
			return closeAll, fmt.Errorf("issuer %s: %w", file, err)
		}
		if err := issuer.Ready(); err != nil {
			a.note("warning: issuer %s signs nothing, and registrations that want a certificate of it fail: %v", c.Name, err)
		}
		cfg.Issuers[c.Name] = issuer
	}
	return closeAll, nil
}

func loadIssuer(file string) (*issuerConfig, error) {
	b, err := readSmall(file)
	if err != nil {
		return nil, usageError{fmt.Errorf("--issuer: %w", err)}
	}
	cfg := &issuerConfig{Days: 90}
	faults := settings.Decode("issuer "+file, b, cfg)
	if !hsm.ValidName(cfg.Name) {
		faults.Key("name", "name: %q: want letters, digits and -._", cfg.Name)
	}
	if cfg.Chain == "" {
		faults.Key("chain", "chain is missing")
	}
	if uri, err := hsm.ParseURI(cfg.Key); err != nil {
		faults.Key("key", "key: %v", err)
	} else if uri.Object == "" {
		faults.Key("key", "key: it names a store, and no key in it: %s", wantObject)
	}
	if cfg.Days < 1 || cfg.Days > 3650 {
		faults.Key("days", "days: %d: want 1 to 3650", cfg.Days)
	}
	if cfg.Keys != nil && len(cfg.Keys) == 0 {
		faults.Key("keys", "keys: the list is empty")
	}
	if err := faults.Err(); err != nil {
		return nil, usageError{err}
	}
	return cfg, nil
}

func (a *app) openIssuer(ctx context.Context, dir string, cfg *issuerConfig) (hsm.Store, *ca.Operational, error) {
	chain, err := readCertificates(under(dir, cfg.Chain))
	if err != nil {
		return nil, nil, err
	}
	store, err := a.openStore(ctx, cfg.Key, dir)
	if err != nil {
		return nil, nil, err
	}
	uri, err := hsm.ParseURI(cfg.Key)
	if err != nil {
		return store, nil, err
	}
	key, err := openSigner(ctx, store, uri.Object)
	if err != nil {
		return store, nil, err
	}
	issuer, err := ca.NewIssuer(ca.Config{Signer: key, Certificate: chain[0], Chain: chain[1:]})
	if err != nil {
		return store, nil, err
	}
	text, err := templates.Certificate("device", nil)
	if err != nil {
		return store, nil, err
	}
	o, err := ca.NewOperational(issuer, ca.Profile{Template: text, Validity: time.Duration(cfg.Days) * 24 * time.Hour, Backdate: time.Hour}, cfg.Keys)
	return store, o, err
}

var issuersTopic = &cobra.Command{
	Use:   "issuers",
	Short: "Operational certificates with the assignment: who signs, who gets them",
	Long: `A device can send a certificate signing request when it registers (api-version 2021-11-01-preview, or 2025-07-01-preview and
later) and get its operational certificate with its hub. It is off until both of these say otherwise:

  An issuer: touchmark serve --issuer operations.toml, again for more.

    name = "operations"
    chain = "operations-chain.pem"    # the CA's certificate, what is above it, the root last; beside this file
    key = "pkcs11:token=ops;object=issuing?module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=file:/run/secrets/pin"
    days = 90                         # when left out; a certificate never outlives its chain
    keys = ["EC-P256", "Ed25519"]     # what devices may bring; all kinds when left out

  Without a token the key is in a store of key files: key = "file:ops/keys?object=issuing-ca" (touchmark help hsm). An issuer's CA is
  best one of its own, that signs nothing else.

  An enrollment that names it, individual or group, by the service API:

    "clientCertificateIssuancePolicy": {"certificateAuthorityName": "operations"}

The certificate says the device ID, as the hub compares it, the device's public key and clientAuth; of what else a request asks
for it has nothing, no alternative names either. The request must carry the registration ID as its only common name and be signed
by its key, which must not be one that ended or that is another device's. A device renews by registering again with a request.

An example, from nothing. touchmark init makes a CA as good as any; with exactly one --issuer the groups of an emulator name it.

    export TOUCHMARK_PASSPHRASE='only to try it'
    touchmark init ops --id-scope 0ne00112233
    printf '%s\n' 'name = "operations"' 'chain = "ops/issuing.pem"' 'key = "file:ops/keys?object=issuing-ca"' > operations.toml
    touchmark serve --ephemeral --issuer operations.toml --https 127.0.0.1:0 --stamp sensor-1 --ca-out ca.pem --json > ready.json &
    until grep -qs '"ready":true' ready.json; do kill -0 $! || exit 1; sleep 0.1; done
    https=$(sed 's/.*"https":"\([^"]*\)".*/\1/' ready.json)
    touchmark register --stamp sensor-1 --endpoint "$https" --ca ca.pem --csr-key new
    openssl x509 -in sensor-1/operational.pem -noout -subject -issuer -enddate; kill %1

  At a service with --data an enrollment is changed by any client of the service API, with the property above.

Every certificate is in the service's store before it is signed. When the issuer has ended, or cannot sign, registrations that ask
for a certificate fail, and the others go on.`,
}
