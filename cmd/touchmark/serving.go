package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/touchmark/touchmark/pkg/access"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/emulate"
	"github.com/touchmark/touchmark/pkg/httpd"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/serviceapi"
)

// serving is a service as it is opened: the store first, the doors last. What is opened is closed in the reverse order, so that
// everything finds what it stands on until it has ended.
type serving struct {
	a   *app
	o   *serveOptions
	d   *serviceData
	log *slog.Logger
	// told is closed when standard output has said where the service is: nothing else may come before that.
	told    chan struct{}
	closers []func() error

	store  registration.Store
	owner  *registration.Policy
	faults *emulate.Faults

	hub     *runningHub // nil: there is no built-in one
	watched *watched
	// own is what the start gives the first scope alone: another tenant's devices have nothing to do with these owners and issuers.
	own    registration.Config
	shared registration.Config // by all scopes
	// tenants calls the webhooks of all scopes but the first.
	tenants registration.Webhook

	bearer *access.Authenticator
	scopes *registration.Scopes
	first  *registration.Service

	front     *front
	emulated  *emulator
	exchanges *emulate.Exchanges
	open      map[string]net.Listener
}

func (s *serving) closing(f func() error) { s.closers = append(s.closers, f) }

func (s *serving) close() (err error) {
	for _, f := range slices.Backward(s.closers) {
		err = errors.Join(err, f())
	}
	return err
}

// openStore opens the data directory, or memory, and the store.
func (s *serving) openStore(ctx context.Context) (err error) {
	if s.o.ephemeral {
		err = s.o.inMemory(s.d)
	} else {
		lock, failed := s.d.open(s.o.data)
		if err = failed; err == nil {
			s.closing(lock.Close)
		}
	}
	if err != nil {
		return err
	}
	if s.faults, err = s.o.faultList(s.d.seed); err != nil {
		return err
	}
	store, closeStore, err := s.o.store.open(ctx, s.a, s.d, s.log)
	if err != nil {
		return err
	}
	s.store = store
	s.closing(closeStore)
	if err := s.d.load(s.o); err != nil {
		return err
	}
	s.owner, err = s.d.owner(ctx, store)
	return err
}

// openWork opens what registrations need beside the store: owners, issuers, hubs, and who watches.
func (s *serving) openWork(ctx context.Context) (err error) {
	o, d := s.o, s.d
	if s.own.Owners, err = d.owners(o.owners); err != nil {
		return err
	}
	if s.own.RequireOrders = o.requireOrders; o.requireOrders && len(s.own.Owners) == 0 {
		return hint(usageError{errors.New("--require-orders without an owner would refuse every bundle")}, "name the owner's public key with --owner owner.pem")
	}
	if s.own.Intermediates, err = d.intermediates(o.intermediates); err != nil {
		return err
	}
	hub, closeHub, err := s.a.openHub(ctx, o, d, s.told, s.log)
	if err != nil {
		return err
	}
	s.hub = hub
	s.closing(closeHub)
	linked, err := o.linkHubs(ctx, s.store, d)
	if err != nil {
		return err
	}
	if linked == 0 {
		s.a.note("no hub is linked: devices will register and fail with 400208, no hub could be chosen; name one with --hub")
	}
	if s.watched, err = o.meter.watch(ctx, s.store, s.log); err != nil {
		return err
	}
	s.closing(s.watched.close)
	closeIssuers, err := s.a.openIssuers(ctx, &o.issue, &s.own)
	s.closing(closeIssuers)
	if err != nil {
		return err
	}
	s.shared = registration.Config{Store: s.watched.store, Log: s.log, AtOnce: s.own.AtOnce, Attempt: s.watched.attempt, PrivateNetworks: o.admit.private}
	o.enrollable(&s.shared)
	hubs, tenants, err := o.provisioning(s.a, &s.shared, d.scope)
	if err != nil {
		return err
	}
	s.closing(hubs.Close)
	s.shared.OpenHub = s.hub.openedBy(d.scope, hubs.Hub)
	s.watched.provisioning(&s.shared)
	s.tenants = s.watched.meter.WatchWebhook(tenants)
	return nil
}

// openScopes has the services of all scopes, and what is done for them in the background.
func (s *serving) openScopes(ctx context.Context) (err error) {
	if s.bearer, err = s.d.bearer(&s.o.accessOptions); err != nil {
		return err
	}
	s.scopes = registration.NewScopes(registration.ScopesConfig{Config: s.shared, Own: func(sc *registration.Scope, cfg *registration.Config) error {
		if dps.Fold(sc.ID) == dps.Fold(s.d.scope) {
			cfg.Owners, cfg.RequireOrders, cfg.Intermediates, cfg.Issuers = s.own.Owners, s.own.RequireOrders, s.own.Intermediates, s.own.Issuers
		} else {
			cfg.Webhook = s.tenants
		}
		return nil
	}})
	s.closing(startProvisioning(s.scopes))
	if s.first, err = s.scopes.Service(ctx, s.d.scope); err != nil {
		return fmt.Errorf("opening ID scope %s: %w", s.d.scope, err)
	}
	return nil
}

// openFront opens what stands before the services: certificates, the emulator, the record of exchanges, the listeners.
func (s *serving) openFront(ctx context.Context) (err error) {
	if s.front, err = s.d.front(ctx, s.o, s.store, s.log); err != nil {
		return err
	}
	s.emulated = &emulator{o: s.o, d: s.d, svc: s.first, issuers: slices.Collect(maps.Keys(s.own.Issuers))}
	if s.o.ephemeral {
		if err := s.emulated.enroll(ctx); err != nil {
			return err
		}
	}
	exchanges, closeExchanges, err := s.a.openExchanges(s.o.exchanges, s.told, s.log)
	if err != nil {
		return err
	}
	s.exchanges = exchanges
	s.closing(closeExchanges)
	s.open, err = s.a.listenAll(s.o)
	return err
}

// serve says where the service is, and answers until the context ends.
func (s *serving) serve(ctx context.Context) error {
	eg, ctx := errgroup.WithContext(ctx)
	eg.Go(func() error { return s.front.watch(ctx) })
	limited, profiles := s.watched.wrap(s.scopes, &s.o.limits)
	var registrar registration.Registrar = limited
	if s.o.ephemeral || s.exchanges != nil {
		registrar = emulate.New(emulate.Config{Registrar: limited, Faults: s.faults, Exchanges: s.exchanges, Stop: ctx.Done()})
	}
	ready := map[string]any{"ready": true, "idScope": s.d.scope, "caFile": s.d.caFile(s.o), "recipient": s.d.recipient}
	for name, l := range s.open {
		ready[name] = reachable(l, s.o.hostnames[0])
	}
	address, _ := ready["https"].(string)
	s.d.described(ready)
	api := serviceapi.Config{
		Scopes: s.scopes, First: s.d.scope, Hosts: s.o.hostnames, Domain: s.o.domain, Bearer: s.bearer, StrictQuery: s.o.strictQuery,
		Calls: make(map[string]serviceapi.Call), Import: s.d.importBundle, Recipient: s.d.recipientOf, Log: s.log,
		Meter: s.watched.meter, Attempts: s.watched.attempts,
		Throttle: func(sc *registration.Scope) error { return profiles.Service(sc.ID, sc.Limits()) },
	}
	var err error
	switch {
	case s.o.ephemeral:
		api.Calls["faults"] = faultCalls(s.faults)
		err = s.emulated.describe(ready, s.owner, address)
	case address != "":
		err = s.d.writeConnection(s.owner, address)
		ready["connectionStringFile"] = s.d.path(connectionFile)
	}
	if err != nil {
		return err
	}
	readiness := s.watched.readiness(ctx.Done())
	s.watched.meter.Watch(s.scopes.Known, s.watched.sources(s.front, s.own.Issuers))
	if l := s.open["metrics"]; l != nil {
		s.watched.serve(l, readiness)
	}
	management, err := s.o.management(ctx, s.d, s.scopes, s.bearer, ready, s.log)
	if err != nil {
		return err
	}
	handlers := serviceapi.New(api).Handlers()
	counted := s.watched.meter.Handler(func(*http.Request) string { return "" }, management) // it is billed to no scope
	handlers["subscriptions"], handlers["providers"] = counted, counted
	https := httpd.Config{Log: s.log, Handlers: s.watched.handlers(handlers, readiness)}
	if s.hub != nil {
		if err := s.hub.describe(ready, &https, address); err != nil {
			return err
		}
	}
	s.o.serveDoors(ctx, eg, s.open, s.front, registrar, limited.Overloaded, s.hub.door(), https)
	if s.o.ephemeral {
		s.emulated.tell(s.a)
	}
	if s.a.json {
		err = s.a.printJSON(ready)
	} else {
		s.a.printReady(ready)
	}
	if err != nil {
		return err
	}
	close(s.told)
	err = eg.Wait()
	management.Wait()
	if ctx.Err() != nil && (err == nil || errors.Is(err, context.Canceled)) {
		s.a.note("stopped; everybody who was there has been answered")
		return nil
	}
	return err
}
