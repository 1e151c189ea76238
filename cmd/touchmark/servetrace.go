package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"strings"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	sdk "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"

	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/meter"
	"github.com/touchmark/touchmark/pkg/registration"
)

// tracing puts spans around what the service is asked, and around what it asks hubs. Nil is off: what it would wrap stays as it is.
type tracing struct {
	provider *sdk.TracerProvider
	tracer   trace.Tracer
}

// newTracing returns nil where neither the flag nor the environment names a collector. Of the environment the exporter reads all that
// OpenTelemetry defines for OTLP over HTTP: headers, certificates, timeouts.
func newTracing(ctx context.Context, endpoint string, ratio float64, log *slog.Logger) (*tracing, error) {
	var options []otlptracehttp.Option
	if endpoint != "" {
		u, err := url.Parse(endpoint)
		if err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http" || u.User != nil {
			return nil, usageError{errors.New("--otlp-endpoint wants https://HOST[:PORT][/PATH], without a name or a password")} // what was given may hold one
		}
		if strings.Trim(u.Path, "/") == "" {
			u.Path = "/v1/traces"
		}
		options = append(options, otlptracehttp.WithEndpointURL(u.String()))
	} else if os.Getenv("OTEL_EXPORTER_OTLP_ENDPOINT") == "" && os.Getenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") == "" {
		return nil, nil
	}
	exporter, err := otlptracehttp.New(ctx, options...)
	if err != nil {
		return nil, fmt.Errorf("preparing to send traces: %w", err)
	}
	// The one setting of the library that has no other place than the process.
	otel.SetErrorHandler(otel.ErrorHandlerFunc(func(err error) { log.Warn("traces are not sent", "cause", err) }))
	about, err := resource.New(ctx, resource.WithFromEnv(), resource.WithAttributes(attribute.String("service.name", "touchmark"), attribute.String("service.version", versionText())))
	if err != nil {
		return nil, fmt.Errorf("preparing to send traces: %w", err)
	}
	p := sdk.NewTracerProvider(sdk.WithBatcher(exporter), sdk.WithResource(about), sdk.WithSampler(sdk.ParentBased(sdk.TraceIDRatioBased(ratio))))
	return &tracing{p, p.Tracer("github.com/touchmark/touchmark")}, nil
}

// close sends what is left.
func (t *tracing) close(ctx context.Context) error {
	if t == nil {
		return nil
	}
	return t.provider.Shutdown(ctx)
}

func end(span trace.Span, err error) {
	if err != nil {
		span.SetAttributes(attribute.Int("dps.code", int(dps.AsError(err).Code)))
		span.SetStatus(codes.Error, dps.AsError(err).Message) // the cause is the log's
	}
	span.End()
}

func (t *tracing) registrar(next registration.Registrar) registration.Registrar {
	if t == nil {
		return next
	}
	return &tracedRegistrar{next, t}
}

type tracedRegistrar struct {
	next registration.Registrar
	t    *tracing
}

// traced answers a device in a span. What a device says never continues somebody's trace.
func traced[T any](t *tracing, ctx context.Context, operation string, req *registration.Request, do func(context.Context) (T, error)) (T, error) {
	ctx, span := t.tracer.Start(ctx, "device."+operation, trace.WithSpanKind(trace.SpanKindServer), trace.WithNewRoot())
	if span.IsRecording() {
		span.SetAttributes(attribute.String("dps.id_scope", req.IDScope), attribute.String("dps.registration_id", req.RegistrationID),
			attribute.String("dps.api_version", req.APIVersion), attribute.String("network.protocol.name", req.Protocol))
	}
	answer, err := do(ctx)
	end(span, err)
	return answer, err
}

// Register implements [registration.Registrar].
func (r *tracedRegistrar) Register(ctx context.Context, req *registration.Request) (*dps.OperationStatus, error) {
	return traced(r.t, ctx, "register", req, func(ctx context.Context) (*dps.OperationStatus, error) { return r.next.Register(ctx, req) })
}

// Status implements [registration.Registrar].
func (r *tracedRegistrar) Status(ctx context.Context, req *registration.Request, operationID string) (*dps.OperationStatus, error) {
	return traced(r.t, ctx, "status", req, func(ctx context.Context) (*dps.OperationStatus, error) { return r.next.Status(ctx, req, operationID) })
}

// Lookup implements [registration.Registrar].
func (r *tracedRegistrar) Lookup(ctx context.Context, req *registration.Request) (*dps.RegistrationState, error) {
	return traced(r.t, ctx, "lookup", req, func(ctx context.Context) (*dps.RegistrationState, error) { return r.next.Lookup(ctx, req) })
}

// Challenge implements [registration.Registrar].
func (r *tracedRegistrar) Challenge(ctx context.Context, req *registration.Request) ([]byte, error) {
	return traced(r.t, ctx, "challenge", req, func(ctx context.Context) ([]byte, error) { return r.next.Challenge(ctx, req) })
}

// service puts operators' calls into spans, which continue the traces that the callers say they are in.
func (t *tracing) service(next http.Handler) http.Handler {
	if t == nil {
		return next
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		operation := "other"
		if c := meter.Classify(r); c != nil {
			operation = c.Operation
		}
		ctx := propagation.TraceContext{}.Extract(r.Context(), propagation.HeaderCarrier(r.Header))
		ctx, span := t.tracer.Start(ctx, "service."+operation, trace.WithSpanKind(trace.SpanKindServer))
		defer span.End()
		seen := &tracedAnswer{ResponseWriter: w, span: span}
		next.ServeHTTP(seen, r.WithContext(ctx))
	})
}

type tracedAnswer struct {
	http.ResponseWriter
	span trace.Span
}

// WriteHeader implements [http.ResponseWriter].
func (a *tracedAnswer) WriteHeader(status int) {
	a.span.SetAttributes(attribute.Int("http.response.status_code", status))
	if status >= 500 {
		a.span.SetStatus(codes.Error, "")
	}
	a.ResponseWriter.WriteHeader(status)
}

// Unwrap is for [http.ResponseController].
func (a *tracedAnswer) Unwrap() http.ResponseWriter { return a.ResponseWriter }

// hub puts calls of a hub into spans of what they are made for.
func (t *tracing) hub(name string, next registration.Hub) registration.Hub {
	if t == nil {
		return next
	}
	return &tracedHub{next, name, t}
}

type tracedHub struct {
	registration.Hub
	name string
	t    *tracing
}

func (h *tracedHub) span(ctx context.Context, operation string, do func(context.Context) error) error {
	ctx, span := h.t.tracer.Start(ctx, "hub."+operation, trace.WithSpanKind(trace.SpanKindClient), trace.WithAttributes(attribute.String("server.address", h.name)))
	err := do(ctx)
	if err != nil {
		span.SetStatus(codes.Error, "")
	}
	span.End()
	return err
}

// Admit implements [registration.Hub].
func (h *tracedHub) Admit(ctx context.Context, d *registration.HubDevice) (created bool, err error) {
	err = h.span(ctx, "admit", func(ctx context.Context) (err error) { created, err = h.Hub.Admit(ctx, d); return err })
	return created, err
}

// Remove implements [registration.Hub].
func (h *tracedHub) Remove(ctx context.Context, id string) error {
	return h.span(ctx, "remove", func(ctx context.Context) error { return h.Hub.Remove(ctx, id) })
}

// MergeTwin implements [registration.Hub].
func (h *tracedHub) MergeTwin(ctx context.Context, id string, t *registration.HubTwin) error {
	return h.span(ctx, "mergeTwin", func(ctx context.Context) error { return h.Hub.MergeTwin(ctx, id, t) })
}
