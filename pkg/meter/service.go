package meter

import (
	"context"
	"log/slog"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
)

// A Call is one operation of an operator's.
type Call struct {
	// API is registration's UsageService, UsageManagement or UsageOwn, Operation one of a bounded number of names.
	API, Operation string
	// Object is what it was about: "enrollment", "group", "registration" or other, and ObjectID which; untrusted.
	Object, ObjectID string
	APIVersion       string
	Status           int
	Duration         time.Duration
	Scope            string // folded
	// For the log: the answer's code and ID, who asked, and from where.
	Code, RequestID, Principal, Remote string
}

// Service counts an operation, and writes its record into the log. Who was not let in is not counted as usage: it costs the
// scope nothing.
func (m *Meter) Service(c *Call) {
	version := "other" // anybody can make one up
	if c.Status < 400 {
		version = m.versions.of(c.APIVersion)
	} else if m.versions.has(c.APIVersion) {
		version = c.APIVersion
	}
	m.service.WithLabelValues(c.Operation, strconv.Itoa(c.Status), version).Inc()
	m.serviceTime.WithLabelValues(c.Operation).Observe(c.Duration.Seconds())
	if c.Status != http.StatusUnauthorized && c.Scope != "" && (m.cfg.Known == nil || m.cfg.Known(dps.Fold(c.Scope))) {
		m.use(dps.Fold(c.Scope), c.API, c.Operation, resultOf(c.Status))
	}
	level, result := slog.LevelInfo, "Success"
	switch {
	case c.Status >= 500:
		level, result = slog.LevelError, "Failure"
	case c.Status >= 400:
		result = "ClientError"
	}
	attrs := []slog.Attr{slog.String("category", "ServiceOperations"), slog.String("operation", c.Operation), slog.String("idScope", c.Scope), slog.String("result", result),
		slog.Int("httpStatus", c.Status)}
	for _, f := range [][2]string{{"code", c.Code}, {"trackingId", c.RequestID}, {"principal", c.Principal}, {"objectType", c.Object}, {"objectId", clip(c.ObjectID)}} {
		if f[1] != "" {
			attrs = append(attrs, slog.String(f[0], f[1]))
		}
	}
	attrs = append(attrs, slog.Float64("durationMs", milliseconds(c.Duration)), slog.String("apiVersion", clip(c.APIVersion)), slog.String("protocol", "https"), slog.String("remote", c.Remote))
	m.cfg.Log.LogAttrs(context.Background(), level, "service operation", attrs...)
}

func clip(s string) string {
	if len(s) > dps.MaxRegistrationID {
		return s[:dps.MaxRegistrationID]
	}
	return s
}

// Handler returns a handler that counts the operations of operators' APIs among what next is asked, and lets the rest be.
// scope says which folded ID scope a request is for; empty for none.
func (m *Meter) Handler(scope func(*http.Request) string, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c := Classify(r)
		if c == nil {
			next.ServeHTTP(w, r)
			return
		}
		begun := time.Now()
		seen := &answer{ResponseWriter: w, status: http.StatusOK}
		next.ServeHTTP(seen, r)
		h := w.Header()
		c.Status, c.Duration, c.Scope, c.Remote = seen.status, time.Since(begun), scope(r), r.RemoteAddr
		c.Code, c.RequestID, c.APIVersion = h.Get("X-Ms-Error-Code"), h.Get("X-Ms-Request-Id"), r.URL.Query().Get("api-version")
		if token, err := attest.ParseToken(r.Header.Get("Authorization")); err == nil && c.Status != http.StatusUnauthorized {
			c.Principal = "policy " + clip(token.Policy)
		}
		m.Service(c)
	})
}

// answer sees the status of an answer.
type answer struct {
	http.ResponseWriter
	status int
}

// WriteHeader implements [http.ResponseWriter].
func (a *answer) WriteHeader(status int) {
	a.status = status
	a.ResponseWriter.WriteHeader(status)
}

// Unwrap is for [http.ResponseController].
func (a *answer) Unwrap() http.ResponseWriter { return a.ResponseWriter }

// Classify names what a request asks for, by its method and path; nil for what is not an operator's.
func Classify(r *http.Request) *Call {
	seg := strings.Split(strings.Trim(r.URL.Path, "/"), "/")
	c := &Call{API: registration.UsageService}
	if len(seg) > 1 {
		c.ObjectID = seg[1]
	}
	verb := map[string]string{http.MethodGet: "get", http.MethodPut: "put", http.MethodPatch: "patch", http.MethodDelete: "delete", http.MethodPost: "post"}[r.Method]
	if verb == "" {
		verb = "other"
	}
	last := strings.ToLower(seg[len(seg)-1])
	switch strings.ToLower(seg[0]) {
	case "enrollments":
		c.Object = "enrollment"
	case "enrollmentgroups":
		c.Object = "group"
	case "registrations":
		c.Object = "registration"
	case "touchmark":
		c.API, c.Object = registration.UsageOwn, "touchmark"
		if len(seg) > 1 && own[strings.ToLower(seg[1])] {
			c.Object = strings.ToLower(seg[1])
		}
		if c.ObjectID = ""; len(seg) > 2 {
			c.ObjectID = seg[2]
		}
		c.Operation = c.Object + "." + verb
		return c
	case "subscriptions", "providers":
		c.API, c.Object, c.ObjectID = registration.UsageManagement, "management", ""
		for i := 0; i+1 < len(seg); i++ {
			if l := strings.ToLower(seg[i]); managed[l] {
				c.Object, c.ObjectID = l, seg[i+1]
			}
		}
		c.Operation = c.Object + "." + verb
		return c
	default:
		return nil
	}
	switch {
	case r.Method == http.MethodPost && len(seg) == 1:
		verb = "bulk"
	case r.Method == http.MethodPost && last == "query":
		verb = "query"
	case r.Method == http.MethodPost && last == "attestationmechanism":
		verb = "keys"
	}
	c.Operation = c.Object + "." + verb
	return c
}

// own are touchmark's calls, managed the resources of the management API, that have operations by their own names.
var (
	own = map[string]bool{"info": true, "bundles": true, "groupkeys": true, "groups": true, "orders": true, "faults": true, "audit": true, "policies": true, "usage": true, "diagnose": true,
		"attempts": true, "registrations": true, "outbox": true, "orphans": true, "edges": true, "judge": true}
	managed = map[string]bool{"provisioningservices": true, "certificates": true, "operationresults": true, "keys": true, "skus": true, "privateendpointconnections": true, "privatelinkresources": true}
)
