package meter

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"net/http"
	"net/url"

	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
)

// A ReportRequest asks for what is known of a scope or of one of its devices.
type ReportRequest struct {
	Service *registration.Service
	Method  string
	ID      string // that follows in the path; empty for none
	Query   url.Values
	Body    []byte
	Actor   registration.Actor
}

const maxChain = 16 // certificates that are handed in

// UsageReport answers GET touchmark/usage?from=&to=.
func (m *Meter) UsageReport(ctx context.Context, r *ReportRequest) (any, error) {
	if r.Method != http.MethodGet || r.ID != "" {
		return nil, notAllowed()
	}
	return m.Report(ctx, r.Service.Scope(), r.Query.Get("from"), r.Query.Get("to"))
}

// Diagnose answers touchmark/diagnose/{registrationId}: GET says what is known of a device, POST with a chain of PEM certificates
// also what would become of them, and DELETE forgets the device's attempts.
func Diagnose(log *registration.Attempts) func(ctx context.Context, r *ReportRequest) (any, error) {
	return func(ctx context.Context, r *ReportRequest) (any, error) {
		var chain []*x509.Certificate
		switch r.Method {
		case http.MethodGet:
		case http.MethodPost:
			var err error
			if chain, err = parseChain(r.Body); err != nil {
				return nil, err
			}
		case http.MethodDelete:
			if err := dps.CheckRegistrationID(r.ID); err != nil {
				return nil, dps.NewError(dps.CodeInvalidArgument, "Invalid registration ID", err)
			}
			return nil, log.Erase(ctx, r.Service.Scope(), r.ID, r.Actor)
		default:
			return nil, notAllowed()
		}
		return r.Service.Diagnose(ctx, r.ID, log, chain)
	}
}

// AttemptByTracking answers GET touchmark/attempts/{trackingId}.
func AttemptByTracking(log *registration.Attempts) func(ctx context.Context, r *ReportRequest) (any, error) {
	return func(ctx context.Context, r *ReportRequest) (any, error) {
		if r.Method != http.MethodGet {
			return nil, notAllowed()
		}
		if len(r.ID) > 64 {
			return nil, dps.NewError(dps.CodeInvalidArgument, "That is no tracking ID", nil)
		}
		a, err := log.ByTracking(ctx, r.Service.Scope(), r.ID)
		if errors.Is(err, registration.ErrNotFound) {
			return nil, dps.NewError(dps.CodeNotFound, "No attempt with this tracking ID is on record: it was another service's, it is too old, or there were too many", nil)
		}
		return a, err
	}
}

func notAllowed() error {
	return dps.NewError(dps.CodeMethodNotAllowed, "Method not allowed", nil)
}

func parseChain(body []byte) (chain []*x509.Certificate, err error) {
	bad := func(cause error) error {
		return dps.NewError(dps.CodeInvalidArgument, "The body must be certificates in PEM, the device's first, and nothing else", cause)
	}
	for rest := bytes.TrimSpace(body); len(rest) > 0; rest = bytes.TrimSpace(rest) {
		if !bytes.HasPrefix(rest, []byte("-----BEGIN CERTIFICATE-----")) {
			return nil, bad(nil)
		}
		var block *pem.Block
		block, rest = pem.Decode(rest)
		if block == nil || block.Type != "CERTIFICATE" || len(block.Headers) > 0 {
			return nil, bad(nil)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, bad(err)
		}
		if chain = append(chain, c); len(chain) > maxChain {
			return nil, bad(nil)
		}
	}
	if len(chain) == 0 {
		return nil, bad(nil)
	}
	return chain, nil
}
