// Package serviceapi is the service API: enrollments, groups and registrations of every scope as Azure IoT Hub DPS has them, and
// touchmark's own calls for bundles, group keys, orders, policies and the audit record.
//
// An [API] answers what package httpd's door brings. The host that a caller names says which scope is meant, and a token is good
// for a host of that scope alone. Every route has its right in one table; what callers change is in the audit record. An API may
// be used by many goroutines. Bodies, pages and the work that a page is are bounded.
//
// The service API of Azure IoT Hub DPS is the specification (service API, sections 1 and 2).
package serviceapi

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"mime"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/touchmark/touchmark/pkg/access"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/exchange"
	"github.com/touchmark/touchmark/pkg/meter"
	"github.com/touchmark/touchmark/pkg/registration"
)

// Config is what an API needs.
type Config struct {
	// Scopes are those that it serves.
	Scopes *registration.Scopes
	// First is the ID of the scope that Hosts, localhost and IP addresses mean.
	First string
	Hosts []string
	// Domain is what service hosts stand below, by the names of their scopes; empty for none.
	Domain string
	// Bearer knows bearer tokens; nil refuses them.
	Bearer *access.Authenticator
	// Import takes a bundle; nil leaves it out.
	Import ImportFunc
	// Calls are more of touchmark's own, of the first scope: each by the name that follows touchmark/ in its path, for those who
	// may write enrollments.
	Calls map[string]Call
	// Recipient is whom secrets for a scope are sealed to; nil for nobody.
	Recipient func(scope string) (string, error)
	// StrictQuery has the text of queries count, and refuses what it does not understand. Without it every query returns all, as on
	// Azure.
	StrictQuery bool
	// Throttle refuses a call of a caller who may make it, because there were too many in the scope; nil is never.
	Throttle func(sc *registration.Scope) error
	// Meter counts every call, and tells of usage; nil for nothing. Attempts are what devices tried; nil where they are not kept.
	Meter    *meter.Meter
	Attempts *registration.Attempts
	Log      *slog.Logger
	Now      func() time.Time
	// BundleTimeout is how long a bundle may say nothing, and its answer may take; zero means 30 s.
	BundleTimeout time.Duration
}

// An ImportRequest is a bundle that a caller wants taken in.
type ImportRequest struct {
	Body io.Reader
	// Trust is the PEM of a station's public key that the caller vouches for, or nil.
	Trust []byte
	// Holder is the PEM of the public key of a station whose leases the caller vouches for, or nil.
	Holder []byte
	// RequireOrder refuses a bundle that was not made on an order.
	RequireOrder bool
	// Residency is where the keys of all devices must be shown to live; empty for anywhere.
	Residency string
	// DryRun counts and changes nothing.
	DryRun bool
	// By is the caller, for the audit record.
	By registration.Actor
}

// An ImportFunc verifies a bundle as it streams by and takes its entries into a scope.
type ImportFunc func(context.Context, *registration.Service, ImportRequest) (registration.ImportResult, error)

// A Call answers a request of an operator's by its method and body.
type Call func(ctx context.Context, method string, body []byte) (any, error)

const (
	maxBody     = 1 << 20
	maxBundle   = 8 << 30
	defaultPage = 100
	maxPage     = 1000
)

// API is the service API.
type API struct {
	cfg    Config
	routes []route
}

// New returns an API.
func New(cfg Config) *API {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.BundleTimeout == 0 {
		cfg.BundleTimeout = 30 * time.Second
	}
	a := &API{cfg: cfg, routes: slices.Clone(routes[:])}
	for name, f := range cfg.Calls {
		a.routes = append(a.routes, route{"", "touchmark/" + name, access.EnrollmentWrite, func(c *call) (any, error) { return c.extra(f) }})
	}
	return a
}

// Handlers returns the API by the first segments of its paths, as httpd mounts it.
func (a *API) Handlers() map[string]http.Handler {
	all := make(map[string]http.Handler)
	for _, r := range a.routes {
		first, _, _ := strings.Cut(r.pattern, "/")
		all[strings.ToLower(first)] = a
	}
	return all
}

// A route is one call of the API, and the right that it takes. "" is every method; "*" in a pattern is an ID.
type route struct {
	method, pattern string
	right           access.Right
	serve           func(*call) (any, error)
}

var routes = [...]route{
	{"POST", "enrollments", access.EnrollmentWrite, individual((*call).bulk)},
	{"POST", "enrollments/query", access.EnrollmentRead, individual((*call).query)},
	{"GET", "enrollments/*", access.EnrollmentRead, individual((*call).get)},
	{"PUT", "enrollments/*", access.EnrollmentWrite, individual((*call).put)},
	{"DELETE", "enrollments/*", access.EnrollmentWrite, individual((*call).delete)},
	{"POST", "enrollments/*/attestationmechanism", access.AttestationDetails, individual((*call).mechanism)},
	{"POST", "enrollmentGroups", access.EnrollmentWrite, group((*call).bulk)},
	{"POST", "enrollmentGroups/query", access.EnrollmentRead, group((*call).query)},
	{"GET", "enrollmentGroups/*", access.EnrollmentRead, group((*call).get)},
	{"PUT", "enrollmentGroups/*", access.EnrollmentWrite, group((*call).put)},
	{"DELETE", "enrollmentGroups/*", access.EnrollmentWrite, group((*call).delete)},
	{"POST", "enrollmentGroups/*/attestationmechanism", access.AttestationDetails, group((*call).mechanism)},
	{"GET", "registrations/*", access.RegistrationStatusRead, (*call).registration},
	{"DELETE", "registrations/*", access.RegistrationStatusWrite, (*call).deleteRegistration},
	{"POST", "registrations/*/query", access.RegistrationStatusRead, (*call).queryRegistrations},

	{"GET", "touchmark/info", access.EnrollmentRead, (*call).info},
	{"POST", "touchmark/judge/enrollments", access.EnrollmentWrite, individual((*call).judge)},
	{"POST", "touchmark/judge/enrollmentGroups", access.EnrollmentWrite, group((*call).judge)},
	{"POST", "touchmark/bundles", access.EnrollmentWrite, (*call).bundle},
	{"POST", "touchmark/groupKeys/*", access.EnrollmentWrite, (*call).groupKey},
	{"PUT", "touchmark/groups/*", access.EnrollmentWrite, (*call).closeGroup},
	{"GET", "touchmark/groups/*/devices", access.RegistrationStatusRead, (*call).groupDevices},
	{"GET", "touchmark/orders", access.RegistrationStatusRead, (*call).orders},
	{"GET", "touchmark/orders/*", access.RegistrationStatusRead, (*call).order},
	{"GET", "touchmark/orders/*/devices", access.RegistrationStatusRead, (*call).orderDevices},
	{"GET", "touchmark/orders/*/unseen", access.RegistrationStatusRead, (*call).orderUnseen},
	{"GET", "touchmark/orders/*/refusals", access.RegistrationStatusRead, (*call).orderRefusals},
	{"GET", "touchmark/registrations", access.RegistrationStatusRead, (*call).listRegistrations},
	{"GET", "touchmark/groups/*/registrations", access.RegistrationStatusRead, (*call).listRegistrations},
	{"GET", "touchmark/usage", access.RegistrationStatusRead, (*call).usage},
	{"GET", "touchmark/diagnose/*", access.RegistrationStatusRead, (*call).diagnose},
	{"POST", "touchmark/diagnose/*", access.RegistrationStatusRead, (*call).try},
	{"DELETE", "touchmark/diagnose/*", access.RegistrationStatusWrite, (*call).forgetAttempts},
	{"GET", "touchmark/attempts/*", access.RegistrationStatusRead, (*call).attempt},
	{"GET", "touchmark/outbox", access.RegistrationStatusRead, (*call).outbox},
	{"GET", "touchmark/orphans", access.RegistrationStatusRead, (*call).orphans},
	{"DELETE", "touchmark/orphans/*", access.RegistrationStatusWrite, (*call).forgetOrphan},
	{"GET", "touchmark/edges/*/children", access.RegistrationStatusRead, (*call).children},
	{"GET", "touchmark/audit", access.ServiceConfig, (*call).audit},
	{"GET", "touchmark/policies", access.ServiceConfig, (*call).policies},
	{"GET", "touchmark/policies/*", access.ServiceConfig, (*call).policy},
	{"PUT", "touchmark/policies/*", access.ServiceConfig, (*call).putPolicy},
	{"DELETE", "touchmark/policies/*", access.ServiceConfig, (*call).deletePolicy},
}

// match returns what stands where the pattern has "*". Words match in any case.
func (r *route) match(segments []string) (ids []string, ok bool) {
	rest := r.pattern
	for _, s := range segments {
		var word string
		word, rest, _ = strings.Cut(rest, "/")
		switch {
		case word == "*":
			ids = append(ids, s)
		case !strings.EqualFold(word, s):
			return nil, false
		}
	}
	return ids, rest == ""
}

// A call is one request on its way.
type call struct {
	*API
	w   http.ResponseWriter
	r   *http.Request
	svc *registration.Service
	sc  *registration.Scope
	by  registration.Actor
	ids []string

	kind registration.Kind // of the routes that come in two
}

func (c *call) ctx() context.Context { return c.r.Context() }

func individual(f func(*call) (any, error)) func(*call) (any, error) {
	return func(c *call) (any, error) { c.kind = registration.Individual; return f(c) }
}

func group(f func(*call) (any, error)) func(*call) (any, error) {
	return func(c *call) (any, error) { c.kind = registration.Group; return f(c) }
}

// ServeHTTP implements http.Handler.
func (a *API) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("X-Ms-Request-Id", dps.NewUUID())
	c, begun := &call{API: a, w: w, r: r}, time.Now()
	v, err := a.serve(c)
	defer func() { c.observe(begun, err) }()
	if err == nil && v == nil {
		w.WriteHeader(http.StatusNoContent)
		return
	}
	var b []byte
	if err == nil {
		b, err = dps.Encode(v)
	}
	if err != nil {
		exchange.Fail(w, r, a.cfg.Log, err)
		return
	}
	exchange.Write(w, http.StatusOK, b)
}

func (a *API) serve(c *call) (any, error) {
	segments, err := exchange.Segments(c.r)
	if err != nil {
		return nil, err
	}
	if err := checkVersion(c.r.URL.Query().Get("api-version"), a.cfg.Now()); err != nil {
		return nil, dps.NewError(dps.CodeBadRequest, "api-version is missing or not known", err)
	}
	rt, err := a.find(c, segments)
	if err != nil {
		return nil, err
	}
	if err := c.open(rt.right); err != nil {
		return nil, err
	}
	if c.cfg.Throttle != nil {
		if err := c.cfg.Throttle(c.sc); err != nil {
			return nil, err
		}
	}
	return rt.serve(c)
}

// checkVersion takes every date from that of the first version to today, or tomorrow, where it may be today already.
func checkVersion(v string, now time.Time) error {
	if err := dps.CheckAPIVersion(v); err != nil {
		return err
	}
	if date := v[:len(time.DateOnly)]; date < "2017-08-31" || date > now.AddDate(0, 0, 1).UTC().Format(time.DateOnly) {
		return errors.New("there is no api-version of that date")
	}
	return nil
}

// find returns the route of a request.
func (a *API) find(c *call, segments []string) (*route, error) {
	var methods []string
	for i := range a.routes {
		rt := &a.routes[i]
		ids, ok := rt.match(segments)
		if !ok {
			continue
		}
		if rt.method == c.r.Method || rt.method == "" {
			c.ids = ids
			return rt, nil
		}
		if !slices.Contains(methods, rt.method) {
			methods = append(methods, rt.method)
		}
	}
	if methods != nil {
		return nil, exchange.NotAllowed(c.w, methods...)
	}
	return nil, exchange.NotFound()
}

// body reads a JSON body; there may be none.
func (c *call) body() ([]byte, error) {
	b, err := exchange.Body(c.w, c.r, maxBody)
	if err != nil || len(b) == 0 {
		return nil, err
	}
	if text := c.r.Header.Get("Content-Type"); text != "" {
		kind, _, err := mime.ParseMediaType(text)
		if err != nil || kind != "application/json" && kind != "text/json" && !strings.HasSuffix(kind, "+json") {
			return nil, dps.NewError(dps.CodeUnsupportedMedia, "The body must be application/json", err)
		}
	}
	return b, nil
}
