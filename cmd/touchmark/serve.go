package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"
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

// check finds what is wrong with the flags as far as that can be said without doing anything.
func (o *serveOptions) check() error {
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
	return o.checkHub()
}

func (a *app) runServe(ctx context.Context, o *serveOptions) (err error) {
	if err := o.check(); err != nil {
		return err
	}
	s := &serving{a: a, o: o, d: &serviceData{}, log: o.meter.logger(a), told: make(chan struct{})}
	defer func() { err = errors.Join(err, s.close()) }()
	for _, step := range []func(context.Context) error{s.openStore, s.openWork, s.openScopes, s.openFront} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return s.serve(ctx)
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
