// Package meter counts what a service does: for its operator's monitoring as metrics, and for the books as usage.
//
// A [Meter] stands at several places and gets the same facts once from each: around the [registration.Registrar] that answers
// devices ([Meter.Registrar]), around the HTTP handler that answers operators ([Meter.Handler]), around the store, at the
// service's report of each attempt ([Meter.Attempt]), and where hubs and webhooks are called. [Meter.Metrics] serves what it has
// counted in the text formats of Prometheus and OpenMetrics; [Meter.Report] adds usage up, which [Meter.Run] keeps in the store.
//
// Metrics have the names of those of Azure IoT Hub DPS in their help (service API, section 6.1). Labels are bounded: no
// registration ID is ever one, and of names that operators choose the first hundred are told apart. [Redact] keeps what could be
// secret out of a log. A Meter may be used by many goroutines.
package meter

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
)

// Config is what a meter needs.
type Config struct {
	// Store keeps usage.
	Store registration.Store
	// Known reports, at once, whether a folded ID scope is one of the service's; what others ask for is no scope's usage. Nil is
	// all.
	Known func(folded string) bool
	Log   *slog.Logger
	Now   func() time.Time
	Sources
}

// Sources are asked when metrics are. They answer at once, from memory. Nil ones are left out.
type Sources struct {
	// Certificates are those whose end is watched beside those of scopes: of TLS servers, of issuers.
	Certificates func() []Certificate
	// Doors are the connections of each door.
	Doors func() map[string]Door
}

// A Certificate is watched under a name.
type Certificate struct {
	Name     string
	NotAfter time.Time
}

// Door is what a door has let in.
type Door struct {
	Connections                  int   // open now
	Handshakes, FailedHandshakes int64 // since the start
}

// maxNames is how many scopes, and how many hubs, are told apart in labels; the rest is "other".
const maxNames = 100

// A Meter counts.
type Meter struct {
	cfg      Config
	registry *prometheus.Registry

	attestations, registrations, assignments, requests, service, throttled, hub, webhook, storeErrors *prometheus.CounterVec
	requestTime, serviceTime, hubTime, storeTime                                                      *prometheus.HistogramVec
	webhookTime                                                                                       prometheus.Histogram
	lost                                                                                              prometheus.Counter
	objects, hubUp                                                                                    *prometheus.GaugeVec
	outbox                                                                                            prometheus.Gauge

	scopes, hubs, versions, certificates names

	mu    sync.Mutex // guards what follows
	usage map[usageKey]int64
	ends  []Certificate   // of scopes, as they were last counted
	ups   map[string]bool // the labels of hubUp
}

// New returns a meter.
func New(cfg Config) *Meter {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	m := &Meter{cfg: cfg, registry: prometheus.NewRegistry(), usage: make(map[usageKey]int64), scopes: names{most: maxNames}, hubs: names{most: maxNames}, versions: names{most: 20}, certificates: names{most: maxNames}}
	counter := func(dst **prometheus.CounterVec, name, help string, labels ...string) {
		*dst = prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: "touchmark", Subsystem: "dps", Name: name, Help: help}, labels)
		m.registry.MustRegister(*dst)
	}
	histogram := func(dst **prometheus.HistogramVec, name, help string, labels ...string) {
		*dst = prometheus.NewHistogramVec(prometheus.HistogramOpts{Namespace: "touchmark", Subsystem: "dps", Name: name, Help: help, Buckets: buckets}, labels)
		m.registry.MustRegister(*dst)
	}
	counter(&m.attestations, "attestation_attempts_total", "Attempts of devices to prove themselves when they register (Azure: AttestationAttempts).", "scope", "status", "protocol", "kind")
	counter(&m.registrations, "registration_attempts_total", "Registrations, by what became of them (Azure: RegistrationAttempts).", "scope", "hub", "status")
	counter(&m.assignments, "device_assignments_total", "Devices that were assigned to a hub (Azure: DeviceAssignments).", "scope", "hub", "substatus")
	counter(&m.requests, "device_requests_total", "Requests of devices that were worked on, by operation and status.", "operation", "code")
	histogram(&m.requestTime, "device_request_duration_seconds", "Time that requests of devices took behind the door and the limits.", "operation")
	counter(&m.service, "service_requests_total", "Operations of the service API, and of the management API.", "operation", "code", "api_version")
	histogram(&m.serviceTime, "service_request_duration_seconds", "Time that operations of the service API took.", "operation")
	counter(&m.throttled, "throttled_total", "Requests that were put off or refused because there were too many.", "api", "limit")
	counter(&m.hub, "hub_requests_total", "Calls of linked hubs.", "hub", "operation", "code")
	histogram(&m.hubTime, "hub_request_duration_seconds", "Time that linked hubs took to answer.", "hub", "operation")
	counter(&m.webhook, "webhook_requests_total", "Calls of allocation webhooks.", "code")
	counter(&m.storeErrors, "store_errors_total", "Transactions that failed by the store's own fault.", "kind")
	histogram(&m.storeTime, "store_duration_seconds", "Time of transactions, with waiting for their turn.", "kind")
	m.webhookTime = prometheus.NewHistogram(prometheus.HistogramOpts{Namespace: "touchmark", Subsystem: "dps", Name: "webhook_request_duration_seconds",
		Help: "Time that allocation webhooks took to answer.", Buckets: buckets})
	m.lost = prometheus.NewCounter(prometheus.CounterOpts{Namespace: "touchmark", Subsystem: "dps", Name: "attempts_lost_total",
		Help: "Attempts of devices that are in no log of attempts, because there were too many."})
	m.objects = prometheus.NewGaugeVec(prometheus.GaugeOpts{Namespace: "touchmark", Subsystem: "dps", Name: "objects", Help: "What scopes have, as it was last counted."}, []string{"scope", "type"})
	m.outbox = prometheus.NewGauge(prometheus.GaugeOpts{Namespace: "touchmark", Subsystem: "dps", Name: "outbox_depth", Help: "Devices that hubs have yet to be told about, as it was last counted."})
	m.hubUp = prometheus.NewGaugeVec(prometheus.GaugeOpts{Namespace: "touchmark", Subsystem: "dps", Name: "hub_up", Help: "Whether a linked hub answered when it was last called."}, []string{"hub"})
	// Of the memory statistics a gauge and a counter have one name in OpenMetrics, which its parsers refuse; the runtime's own have not.
	runtime := collectors.NewGoCollector(collectors.WithGoCollectorMemStatsMetricsDisabled(),
		collectors.WithGoCollectorRuntimeMetrics(collectors.MetricsMemory, collectors.MetricsGC, collectors.MetricsScheduler))
	m.registry.MustRegister(m.webhookTime, m.lost, m.objects, m.hubUp, m.outbox, sources{m}, runtime, collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// buckets reach from a read in memory to a hub that hangs.
var buckets = []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30}

// Watch names what is asked when metrics are, and whose scopes are known, before anything is served.
func (m *Meter) Watch(known func(folded string) bool, s Sources) {
	m.cfg.Known, m.cfg.Sources = known, s
}

// Metrics serves what was counted: as OpenMetrics to who asks for it, else as Prometheus' text.
func (m *Meter) Metrics() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{EnableOpenMetrics: true, MaxRequestsInFlight: 4, Timeout: 10 * time.Second})
}

// names bounds the values of a label that others choose.
type names struct {
	most  int
	mu    sync.RWMutex
	known map[string]struct{}
}

func (n *names) has(name string) bool {
	n.mu.RLock()
	defer n.mu.RUnlock()
	_, ok := n.known[name]
	return ok
}

func (n *names) of(name string) string {
	if name == "" {
		return "none"
	}
	if n.has(name) {
		return name
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if _, ok := n.known[name]; !ok {
		if len(n.known) >= n.most {
			return "other"
		}
		if n.known == nil {
			n.known = make(map[string]struct{})
		}
		n.known[name] = struct{}{}
	}
	return name
}

// Attempt counts what a device tried; for the hook of that name in [registration.Config].
func (m *Meter) Attempt(scope string, a *registration.Attempt) {
	scope = m.scopes.of(scope)
	if a.Operation == "provision" || a.Operation == "register" && a.Result != "assigning" { // what is being provisioned has another end
		hub := m.hubs.of(a.Hub)
		m.registrations.WithLabelValues(scope, hub, a.Result).Inc()
		if a.Result == "assigned" {
			m.assignments.WithLabelValues(scope, hub, a.Substatus).Inc()
		}
	}
	if a.Operation != "register" {
		return
	}
	status := "success"
	switch a.Code.Status() {
	case 401:
		status = "unauthorized"
	case 400, 403, 404, 413:
		status = "invalid"
	case 429:
		status = "throttled"
	case 500, 503:
		status = "error"
	}
	switch a.Result {
	case "disabled":
		status = "disabled"
	case "assigned", "assigning", "failed": // whatever became of it, the device proved itself
		status = "success"
	}
	m.attestations.WithLabelValues(scope, status, a.Protocol, a.Proof).Inc()
}

// Lost counts attempts that are in no log; for the hook of that name in [registration.AttemptsConfig].
func (m *Meter) Lost(n int) { m.lost.Add(float64(n)) }

// Throttled counts a request that was put off or refused: api is "device" or "service".
func (m *Meter) Throttled(api, limit string) { m.throttled.WithLabelValues(api, limit).Inc() }

// Hub counts a call of a hub. The operation is one of a few verbs, the code an HTTP status, or a word where there was none.
func (m *Meter) Hub(hub, operation, code string, d time.Duration) {
	hub = m.hubs.of(hub)
	m.hub.WithLabelValues(hub, operation, code).Inc()
	m.hubTime.WithLabelValues(hub, operation).Observe(d.Seconds())
}

// Webhook counts a call of an allocation webhook.
func (m *Meter) Webhook(code string, d time.Duration) {
	m.webhook.WithLabelValues(code).Inc()
	m.webhookTime.Observe(d.Seconds())
}

// sources collects what is asked for when metrics are.
type sources struct{ m *Meter }

func gauge(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("touchmark_dps_"+name, help, labels, nil)
}

// Describe implements [prometheus.Collector]: nothing is promised.
func (s sources) Describe(chan<- *prometheus.Desc) {}

// Collect implements [prometheus.Collector].
func (s sources) Collect(out chan<- prometheus.Metric) {
	send := func(d *prometheus.Desc, t prometheus.ValueType, v float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(d, t, v, labels...)
	}
	src := s.m.cfg.Sources
	s.m.mu.Lock()
	all := slices.Clone(s.m.ends)
	s.m.mu.Unlock()
	if src.Certificates != nil {
		all = append(all, src.Certificates()...)
	}
	ends := make(map[string]float64) // of one name the first end counts
	for _, c := range all {
		if end := float64(c.NotAfter.Unix()); ends[c.Name] == 0 || end < ends[c.Name] {
			ends[c.Name] = end
		}
	}
	for name, end := range ends {
		send(gauge("certificate_expiry_timestamp_seconds", "When a certificate ends.", "name"), prometheus.GaugeValue, end, name)
	}
	if src.Doors != nil {
		for name, d := range src.Doors() {
			send(gauge("door_connections", "Open connections.", "door"), prometheus.GaugeValue, float64(d.Connections), name)
			shook := gauge("door_handshakes_total", "TLS handshakes.", "door", "result")
			send(shook, prometheus.CounterValue, float64(d.Handshakes), name, "success")
			send(shook, prometheus.CounterValue, float64(d.FailedHandshakes), name, "failed")
		}
	}
}

// Store returns a store whose transactions are timed.
func (m *Meter) Store(next registration.Store) registration.Store { return &timedStore{next, m} }

type timedStore struct {
	next registration.Store
	m    *Meter
}

func (s *timedStore) View(ctx context.Context, f func(registration.Tx) error) error {
	return s.timed("view", func(f func(registration.Tx) error) error { return s.next.View(ctx, f) }, f)
}

// Scrub implements [registration.Scrubber] where the store does.
func (s *timedStore) Scrub(ctx context.Context) error {
	if x, ok := s.next.(registration.Scrubber); ok {
		return x.Scrub(ctx)
	}
	return nil
}

func (s *timedStore) Update(ctx context.Context, f func(registration.Tx) error) error {
	return s.timed("update", func(f func(registration.Tx) error) error { return s.next.Update(ctx, f) }, f)
}

// timed tells the store's own faults from what f refuses.
func (s *timedStore) timed(kind string, run func(func(registration.Tx) error) error, f func(registration.Tx) error) error {
	begun := time.Now()
	var own error
	err := run(func(tx registration.Tx) error { own = f(tx); return own })
	s.m.storeTime.WithLabelValues(kind).Observe(time.Since(begun).Seconds())
	var e *dps.Error
	if err != nil && own == nil || own != nil && !errors.As(own, &e) && !errors.Is(own, registration.ErrConflict) && !errors.Is(own, registration.ErrNotFound) &&
		!errors.Is(own, context.Canceled) {
		s.m.storeErrors.WithLabelValues(kind).Inc()
	}
	return err
}

// Registrar returns a registrar that counts what next is asked.
func (m *Meter) Registrar(next registration.Registrar) registration.Registrar {
	return &registrar{next, m}
}

type registrar struct {
	next registration.Registrar
	m    *Meter
}

func count[T any](r *registrar, operation string, req *registration.Request, call func(*registration.Request) (T, error)) (T, error) {
	c := *req
	c.Began = time.Now()
	answer, err := call(&c)
	d := time.Since(c.Began)
	code, result := 200, "success"
	if err != nil {
		code = dps.AsError(err).Code.Status()
		result = resultOf(code)
	}
	m := r.m
	m.requests.WithLabelValues(operation, strconv.Itoa(code)).Inc()
	m.requestTime.WithLabelValues(operation).Observe(d.Seconds())
	if scope := dps.Fold(req.IDScope); m.cfg.Known == nil || m.cfg.Known(scope) {
		m.use(scope, registration.UsageDevice, operation, result)
	}
	if err == nil { // refusals, and what became of a registration, are the service's to tell
		m.cfg.Log.Debug("answered", "category", "DeviceOperations", "operation", operation, "idScope", req.IDScope, "registrationId", req.RegistrationID, "result", "Success",
			"httpStatus", code, "durationMs", milliseconds(d), "apiVersion", req.APIVersion, "protocol", req.Protocol, "remote", req.Remote)
	}
	return answer, err
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// resultOf is how usage tells statuses apart.
func resultOf(status int) string {
	switch {
	case status == http.StatusTooManyRequests:
		return "throttled"
	case status >= 500:
		return "error"
	case status >= 400:
		return "refused"
	}
	return "success"
}

// Register implements [registration.Registrar].
func (r *registrar) Register(ctx context.Context, req *registration.Request) (*dps.OperationStatus, error) {
	return count(r, "register", req, func(req *registration.Request) (*dps.OperationStatus, error) { return r.next.Register(ctx, req) })
}

// Status implements [registration.Registrar].
func (r *registrar) Status(ctx context.Context, req *registration.Request, operationID string) (*dps.OperationStatus, error) {
	return count(r, "status", req, func(req *registration.Request) (*dps.OperationStatus, error) {
		return r.next.Status(ctx, req, operationID)
	})
}

// Lookup implements [registration.Registrar].
func (r *registrar) Lookup(ctx context.Context, req *registration.Request) (*dps.RegistrationState, error) {
	return count(r, "lookup", req, func(req *registration.Request) (*dps.RegistrationState, error) { return r.next.Lookup(ctx, req) })
}

// Challenge implements [registration.Registrar].
func (r *registrar) Challenge(ctx context.Context, req *registration.Request) ([]byte, error) {
	return count(r, "challenge", req, func(req *registration.Request) ([]byte, error) { return r.next.Challenge(ctx, req) })
}
