package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/touchmark/touchmark/pkg/limit"
	"github.com/touchmark/touchmark/pkg/meter"
	"github.com/touchmark/touchmark/pkg/registration"
)

// meterOptions are the flags of serve about what it tells of itself, and about quotas.
type meterOptions struct {
	metrics, format, level string
	mask                   bool
	otlp                   string
	otlpRatio              float64
	retention              time.Duration
	perDevice              int
	quotas                 string
	quotasAsked            bool
}

func (o *meterOptions) flags(c *cobra.Command) {
	f := c.Flags()
	f.StringVar(&o.metrics, "metrics", "off", "address for /metrics, /healthz and /readyz in plain HTTP, such as 127.0.0.1:9464, or off; for your own network alone")
	f.StringVar(&o.format, "log", "text", "form of the log: text or json")
	f.StringVar(&o.level, "log-level", "info", "debug (every answer to a device too), info, warn or error")
	f.BoolVar(&o.mask, "log-mask-addresses", false, "write the network of a caller's address alone, into the log and into the log of attempts: /24 of IPv4, /48 of IPv6")
	f.StringVar(&o.otlp, "otlp-endpoint", "", "URL of an OpenTelemetry collector that traces are sent to by OTLP over HTTP; so does OTEL_EXPORTER_OTLP_ENDPOINT")
	f.Float64Var(&o.otlpRatio, "otlp-ratio", 1, "part of the traces that is sent, 0 to 1; operators' calls that are in a trace already go by it")
	f.DurationVar(&o.retention, "attempts-retention", 30*24*time.Hour, "for how long devices' attempts to register are kept for touchmark diagnose; 0 keeps none")
	f.IntVar(&o.perDevice, "attempts-per-device", 10, "how many attempts are kept of one device, its last success among them: 1 to 1000")
	f.StringVar(&o.quotas, "quotas", "none", "profile of quotas of the first scope, and of new ones: none, or azure to rehearse those of DPS (touchmark help limits)")
	_ = c.RegisterFlagCompletionFunc("log", cobra.FixedCompletions([]string{"text", "json"}, cobra.ShellCompDirectiveNoFileComp))
	_ = c.RegisterFlagCompletionFunc("log-level", cobra.FixedCompletions([]string{"debug", "info", "warn", "error"}, cobra.ShellCompDirectiveNoFileComp))
	_ = c.RegisterFlagCompletionFunc("quotas", cobra.FixedCompletions([]string{"none", "azure"}, cobra.ShellCompDirectiveNoFileComp))
}

func (o *meterOptions) check() error {
	var level slog.Level
	switch {
	case o.format != "text" && o.format != "json":
		return usageError{fmt.Errorf("--log %s: want text or json", o.format)}
	case level.UnmarshalText([]byte(o.level)) != nil:
		return usageError{fmt.Errorf("--log-level %s: want debug, info, warn or error", o.level)}
	case !(o.otlpRatio >= 0 && o.otlpRatio <= 1):
		return usageError{fmt.Errorf("--otlp-ratio %v: want 0 to 1", o.otlpRatio)}
	case o.perDevice < 1 || o.perDevice > 1000:
		return usageError{fmt.Errorf("--attempts-per-device %d: want 1 to 1000", o.perDevice)}
	case o.retention < 0:
		return usageError{fmt.Errorf("--attempts-retention %v: want a time, or 0 for none", o.retention)}
	}
	if _, ok := registration.QuotasOf(o.quotas); !ok || o.quotas == "" {
		return usageError{fmt.Errorf("--quotas %s: want none or azure", o.quotas)}
	}
	return nil
}

// logger returns the log of a service. Nothing that goes into it is meant to be secret; what looks so is taken out.
func (o *meterOptions) logger(a *app) *slog.Logger {
	var level slog.Level
	_ = level.UnmarshalText([]byte(o.level)) // checked
	if a.quiet {
		level = max(level, slog.LevelWarn)
	}
	options := &slog.HandlerOptions{Level: level, ReplaceAttr: meter.Redact(o.mask)}
	if o.format == "json" {
		return slog.New(slog.NewJSONHandler(a.err, options))
	}
	return slog.New(slog.NewTextHandler(a.err, options))
}

// watched is a service that is measured.
type watched struct {
	o        *meterOptions
	meter    *meter.Meter
	attempts *registration.Attempts // nil where none are kept
	traces   *tracing
	store    registration.Store
	log      *slog.Logger
	ctx      context.Context // of what follows: it outlasts the doors, whose last answers count too
	stop     context.CancelFunc
	work     errgroup.Group
}

func (o *meterOptions) watch(ctx context.Context, store registration.Store, log *slog.Logger) (*watched, error) {
	w := &watched{o: o, log: log, meter: meter.New(meter.Config{Store: store, Log: log})}
	w.store = w.meter.Store(store)
	if o.retention > 0 {
		w.attempts = registration.NewAttempts(registration.AttemptsConfig{Store: store, Retention: o.retention, PerDevice: o.perDevice, Mask: o.mask, Lost: w.meter.Lost, Log: log})
	}
	var err error
	if w.traces, err = newTracing(ctx, o.otlp, o.otlpRatio, log); err != nil {
		return nil, err
	}
	w.ctx, w.stop = context.WithCancel(context.WithoutCancel(ctx))
	w.work.Go(func() error { return w.meter.Run(w.ctx) })
	if w.attempts != nil {
		w.work.Go(func() error { return w.attempts.Run(w.ctx) })
	}
	return w, nil
}

// close keeps what was counted last. It comes before the store's.
func (w *watched) close() error {
	w.stop()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := w.traces.close(ctx); err != nil {
		w.log.Warn("traces are not sent", "cause", err)
	}
	return w.work.Wait()
}

// attempt is told of every attempt of a device.
func (w *watched) attempt(scope string, a *registration.Attempt) {
	w.meter.Attempt(scope, a)
	if w.attempts != nil {
		w.attempts.Add(scope, a)
	}
}

// wrap puts everything that watches and limits around the services of all scopes.
func (w *watched) wrap(scopes *registration.Scopes, limits *limitOptions) (*limit.Limiter, *limit.Profiles) {
	profiles := limit.NewProfiles(limit.ProfilesConfig{Registrar: w.meter.Registrar(w.traces.registrar(scopes)), Quotas: scopes.Quotas, Throttled: w.meter.Throttled})
	return limits.wrap(profiles, scopes.Known, func(what string) { w.meter.Throttled("device", what) }, w.log), profiles
}

// sources are what metrics ask the rest of the service for.
func (w *watched) sources(front *front, issuers map[string]registration.Issuer) meter.Sources {
	return meter.Sources{
		Certificates: func() (all []meter.Certificate) {
			if c, err := front.certificate(&tls.ClientHelloInfo{SupportedVersions: []uint16{tls.VersionTLS13}}); err == nil && len(c.Certificate) > 0 {
				for i, name := range []string{"tls", "tls issuer"} {
					if i < len(c.Certificate) {
						all = ending(all, name, c.Certificate[i])
					}
				}
			}
			for name, i := range issuers {
				if chain := i.Chain(); len(chain) > 0 {
					all = ending(all, "issuer "+name, chain[0])
				}
			}
			return all
		},
		Doors: front.counts,
	}
}

func ending(all []meter.Certificate, name string, der []byte) []meter.Certificate {
	if c, err := x509.ParseCertificate(der); err == nil {
		all = append(all, meter.Certificate{Name: name, NotAfter: c.NotAfter})
	}
	return all
}

// handlers are those of the HTTPS door, in spans, and health for who balances load.
func (w *watched) handlers(api map[string]http.Handler, ready *meter.Readiness) map[string]http.Handler {
	for first, h := range api {
		api[first] = w.traces.service(h)
	}
	api["healthz"], api["readyz"] = meter.Alive(), ready.Handler(false)
	return api
}

// readiness is ready while the store answers; that it is open says that its tables are up to date.
func (w *watched) readiness(stopping <-chan struct{}) *meter.Readiness {
	return &meter.Readiness{Stopping: stopping, Parts: map[string]func(context.Context) error{
		"store": func(ctx context.Context) error {
			return w.store.View(ctx, func(tx registration.Tx) error { _, err := tx.Scopes("", 1); return err })
		},
	}}
}

// serve answers monitoring on its own listener until everything else has ended.
func (w *watched) serve(l net.Listener, ready *meter.Readiness) {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", w.meter.Metrics())
	mux.Handle("GET /healthz", meter.Alive())
	mux.Handle("GET /readyz", ready.Handler(true))
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10,
		ErrorLog: slog.NewLogLogger(w.log.Handler(), slog.LevelDebug)}
	w.work.Go(func() error {
		stop := context.AfterFunc(w.ctx, func() { _ = srv.Close() })
		defer stop()
		if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			w.log.Error("monitoring is not answered any more", "cause", err)
		}
		return nil
	})
}

// hub returns a hub whose calls are counted and traced.
func (w *watched) hub(name string, h registration.Hub) registration.Hub {
	return w.meter.WatchHub(name, w.traces.hub(name, h))
}

// provisioning watches what is told to hubs, and what webhooks are asked.
func (w *watched) provisioning(cfg *registration.Config) {
	open := cfg.OpenHub
	cfg.OpenHub = func(scope string, h registration.LinkedHub) (registration.Hub, error) {
		hub, err := open(scope, h)
		if hub == nil || err != nil {
			return nil, err
		}
		return w.hub(h.Name, hub), nil
	}
	cfg.Webhook = w.meter.WatchWebhook(cfg.Webhook)
	cfg.OnProvision = func(p registration.Provisioning) {
		if a := p.Attempt(time.Now()); a != nil {
			w.attempt(p.Scope, a)
		}
	}
}
