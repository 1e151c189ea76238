package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"slices"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/emulate"
	"github.com/touchmark/touchmark/pkg/httpd"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/serviceapi"
)

type serveOptions struct {
	data, name      string
	hubs, hostnames []string
	idScope         string
	owners          []string
	intermediates   []string
	requireOrders   bool
	exchanges       string
	doorOptions
	front  frontOptions
	limits limitOptions
	issue  issueOptions
	admit  admitOptions
	accessOptions
	hubOptions
	store storeOptions
	provisionOptions
	meter meterOptions
	emulatorOptions
}

func newServe(a *app) *cobra.Command {
	o := &serveOptions{}
	c := &cobra.Command{
		Use:   "serve {--data DIR | --ephemeral}",
		Short: "Run the registration service that devices meet at their first power-on",
		Long: `serve answers devices over HTTPS, MQTT and AMQP as Azure IoT Hub DPS does, so that Azure's device SDKs register against it
unchanged, and operators over the service API.

The first start makes what is missing in the data directory: an ID scope, a TLS certificate from a small CA of its own
(ca.pem, which devices must trust), the owner's connection string (owner.connection), and a key that secrets in bundles
are sealed to (recipient.txt). Public keys of stations in its trust folder are trusted for every import, and production
orders count that owners signed whose public keys are in its owners folder: --owner puts one there. Where a group has a root
and devices send no intermediate certificates, those in the intermediates folder complete the way: --intermediate puts them
there.

With --ephemeral it is an emulator for the tests of a device's firmware: nothing is on disk, groups that any device can
register in are there already, and faults happen on demand. touchmark help emulator is its page.`,
		Example: `  touchmark serve --data service --hub hub-a.example.net --hub hub-b.example.net
  touchmark serve --data service --https 127.0.0.1:8443 --mqtt off --amqp off --hub hub-a.example.net --json
  touchmark serve --ephemeral --seed ci --https 127.0.0.1:0 --mqtt 127.0.0.1:0 --fault 'rid=sensor-*,code=429,count=2' --json`,
		Args: func(cmd *cobra.Command, args []string) error {
			if cmd.Flags().Changed("trust-forwarded-client-cert") && len(args) == 1 { // a flag with a default takes no next word
				return fmt.Errorf("--trust-forwarded-client-cert %s: write --trust-forwarded-client-cert=%s", args[0], args[0])
			}
			return cobra.NoArgs(cmd, args)
		},
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.httpsAsked = cmd.Flags().Changed("https")
			o.meter.quotasAsked = cmd.Flags().Changed("quotas")
			if err := o.checkEmulator(cmd); err != nil {
				return err
			}
			return a.runServe(cmd.Context(), o)
		},
	}
	f := c.Flags()
	f.StringVar(&o.data, "data", "", "directory that the service keeps everything in")
	o.doorOptions.flags(c)
	f.StringArrayVar(&o.hubs, "hub", nil, "host name of a hub that devices may be assigned to, or builtin for a small one in this process (touchmark help builtin-hub); again for more")
	f.StringArrayVar(&o.hostnames, "hostname", nil, "name that the service is reached by, for its certificate and tokens; again for more (default: localhost)")
	f.StringVar(&o.name, "name", "", "name of the first provisioning service among those that this one serves (default: touchmark-ID_SCOPE)")
	f.StringVar(&o.idScope, "id-scope", "", "ID scope that a first start takes, instead of a random one")
	f.StringArrayVar(&o.owners, "owner", nil, "PEM file with the public key of an owner whose production orders count, from now on; again for more")
	f.BoolVar(&o.requireOrders, "require-orders", false, "refuse every bundle that was not made on a production order of an owner's")
	f.StringVar(&o.exchanges, "exchanges", "", "file that every exchange with a device is appended to as a line of JSON, without secrets; - is standard output")
	intermediateFlag(c, &o.intermediates)
	o.front.flags(c)
	o.limits.flags(c)
	o.issue.flags(c)
	o.admit.flags(c)
	o.accessOptions.flags(c)
	o.hubOptions.flags(c)
	o.store.flags(c)
	o.provisionOptions.flags(c)
	o.meter.flags(c)
	o.bind(c)
	_ = c.MarkFlagDirname("data")
	return c
}

func (a *app) runServe(ctx context.Context, o *serveOptions) (err error) {
	if o.https == "off" && o.mqtt == "off" && o.amqp == "off" {
		return usageError{errors.New("all doors are off")}
	}
	if err := errors.Join(o.front.check(), o.limits.check(), o.accessOptions.check(), o.admit.check(), o.meter.check()); err != nil {
		return err
	}
	for _, h := range append(o.hubs, o.hostnames...) {
		if err := checkHost(h); err != nil {
			return usageError{err}
		}
	}
	if len(o.hostnames) == 0 {
		o.hostnames = []string{"localhost"}
	}
	if err := o.checkHub(); err != nil {
		return err
	}
	d := &serviceData{}
	if o.ephemeral {
		err = o.inMemory(d)
	} else {
		var lock *os.File
		if lock, err = d.open(o.data); err == nil {
			defer lock.Close()
		}
	}
	if err != nil {
		return err
	}
	faults, err := o.faultList(d.seed)
	if err != nil {
		return err
	}
	log := o.meter.logger(a)
	store, closeStore, err := o.store.open(ctx, a, d, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeStore()) }()
	if err := d.load(o); err != nil {
		return err
	}
	owner, err := d.owner(ctx, store)
	if err != nil {
		return err
	}
	owners, err := d.owners(o.owners)
	if err != nil {
		return err
	}
	if o.requireOrders && len(owners) == 0 {
		return hint(usageError{errors.New("--require-orders without an owner would refuse every bundle")}, "name the owner's public key with --owner owner.pem")
	}
	intermediates, err := d.intermediates(o.intermediates)
	if err != nil {
		return err
	}
	told := make(chan struct{})
	hub, closeHub, err := a.openHub(ctx, o, d, told, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeHub()) }()
	if linked, err := o.linkHubs(ctx, store, d); err != nil {
		return err
	} else if linked == 0 {
		a.note("no hub is linked: devices will register and fail with 400208, no hub could be chosen; name one with --hub")
	}
	watched, err := o.meter.watch(ctx, store, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, watched.close()) }()
	// What the start names is the first scope's: another tenant's devices have nothing to do with these owners and issuers.
	own := registration.Config{Owners: owners, RequireOrders: o.requireOrders, Intermediates: intermediates}
	closeIssuers, err := a.openIssuers(ctx, &o.issue, &own)
	defer func() { err = errors.Join(err, closeIssuers()) }()
	if err != nil {
		return err
	}
	shared := registration.Config{Store: watched.store, Log: log, AtOnce: own.AtOnce, Attempt: watched.attempt, PrivateNetworks: o.admit.private}
	o.enrollable(&shared)
	bearer, err := d.bearer(&o.accessOptions)
	if err != nil {
		return err
	}
	hubs, tenantHooks, err := o.provisioning(&shared, d.scope)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, hubs.Close()) }()
	shared.OpenHub = hub.openedBy(dps.Fold(d.scope), hubs.Hub)
	watched.provisioning(&shared)
	tenantHooks = watched.meter.WatchWebhook(tenantHooks)
	scopes := registration.NewScopes(registration.ScopesConfig{
		Config: shared,
		Own: func(sc *registration.Scope, cfg *registration.Config) error {
			if dps.Fold(sc.ID) == dps.Fold(d.scope) {
				cfg.Owners, cfg.RequireOrders, cfg.Intermediates, cfg.Issuers = own.Owners, own.RequireOrders, own.Intermediates, own.Issuers
			} else {
				cfg.Webhook = tenantHooks
			}
			return nil
		}})
	defer startProvisioning(scopes)()
	svc, err := scopes.Service(ctx, d.scope)
	if err != nil {
		return fmt.Errorf("opening ID scope %s: %w", d.scope, err)
	}
	front, err := d.front(ctx, o, store, log)
	if err != nil {
		return err
	}
	emulated := &emulator{o: o, d: d, svc: svc, issuers: slices.Collect(maps.Keys(own.Issuers))}
	if o.ephemeral {
		if err := emulated.enroll(ctx); err != nil {
			return err
		}
	}
	exchanges, closeExchanges, err := a.openExchanges(o.exchanges, told, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeExchanges()) }()

	open, err := a.listenAll(o)
	if err != nil {
		return err
	}
	eg, ctx := errgroup.WithContext(ctx)
	eg.Go(func() error { return front.watch(ctx) })
	limited, profiles := watched.wrap(scopes, &o.limits)
	var registrar registration.Registrar = limited
	if o.ephemeral || exchanges != nil {
		registrar = emulate.New(emulate.Config{Registrar: limited, Faults: faults, Exchanges: exchanges, Stop: ctx.Done()})
	}
	ready := map[string]any{"ready": true, "idScope": d.scope, "caFile": d.caFile(o), "recipient": d.recipient}
	for name, l := range open {
		ready[name] = reachable(l, o.hostnames[0])
	}
	d.described(ready)
	api := serviceapi.Config{
		Scopes: scopes, First: d.scope, Hosts: o.hostnames, Domain: o.domain, Bearer: bearer, StrictQuery: o.strictQuery,
		Calls: make(map[string]serviceapi.Call), Import: d.importBundle, Recipient: d.recipientOf, Log: log,
		Meter: watched.meter, Attempts: watched.attempts,
		Throttle: func(sc *registration.Scope) error { return profiles.Service(sc.ID, sc.Limits()) },
	}
	address, _ := ready["https"].(string)
	switch {
	case o.ephemeral:
		api.Calls["faults"] = faultCalls(faults)
		err = emulated.describe(ready, owner, address)
	case address != "":
		err = d.writeConnection(owner, address)
		ready["connectionStringFile"] = d.path(connectionFile)
	}
	if err != nil {
		return err
	}
	readiness := watched.readiness(ctx.Done())
	watched.meter.Watch(scopes.Known, watched.sources(front, own.Issuers))
	if l := open["metrics"]; l != nil {
		watched.serve(l, readiness)
	}
	management, err := o.management(ctx, d, scopes, bearer, ready, log)
	if err != nil {
		return err
	}
	handlers := serviceapi.New(api).Handlers()
	counted := watched.meter.Handler(func(*http.Request) string { return "" }, management) // it is billed to no scope
	handlers["subscriptions"], handlers["providers"] = counted, counted
	https := httpd.Config{Log: log, Handlers: watched.handlers(handlers, readiness)}
	if hub != nil {
		if err := hub.describe(ready, &https, address); err != nil {
			return err
		}
	}
	o.serveDoors(ctx, eg, open, front, registrar, limited.Overloaded, hub.door(), https)
	if o.ephemeral {
		emulated.tell(a)
	}
	if a.json {
		if err := a.printJSON(ready); err != nil {
			return err
		}
	} else {
		a.printReady(ready)
	}
	close(told)
	err = eg.Wait()
	management.Wait()
	if ctx.Err() != nil && (err == nil || errors.Is(err, context.Canceled)) {
		a.note("stopped; everybody who was there has been answered")
		return nil
	}
	return err
}

// printReady leaves out what is secret.
func (a *app) printReady(ready map[string]any) {
	rows := [][]string{{"Registration service", "ready"}, {"  ID scope", fmt.Sprint(ready["idScope"])}}
	for _, r := range [][2]string{{"https", "HTTPS"}, {"mqtt", "MQTT"}, {"amqp", "AMQP"}, {"caFile", "CA for devices"}, {"connectionStringFile", "owner's connection"}, {"managementConnectionFile", "management"}, {"hub", "built-in hub"}, {"hubConnectionStringFile", "hub's connection"}, {"recipient", "recipient"}} {
		if v, ok := ready[r[0]]; ok && v != "" {
			rows = append(rows, []string{"  " + r[1], fmt.Sprint(v)})
		}
	}
	_ = a.table(nil, rows)
	if pem, ok := ready["ca"].(string); ok && ready["caFile"] == "" {
		fmt.Fprint(a.out, pem)
	}
}
