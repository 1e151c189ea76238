package serviceapi

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"net/http"
	"strings"
	"time"

	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/exchange"
	"github.com/touchmark/touchmark/pkg/meter"
	"github.com/touchmark/touchmark/pkg/registration"
)

// usage is what was used in the scope, by day.
func (c *call) usage() (any, error) {
	if c.cfg.Meter == nil {
		return nil, exchange.NotFound()
	}
	q := c.r.URL.Query()
	return c.cfg.Meter.Report(c.ctx(), c.svc.Scope(), q.Get("from"), q.Get("to"))
}

// listRegistrations lists the devices that came in, by whatever enrollment, or by the group of the path, which may be deleted.
func (c *call) listRegistrations() (any, error) {
	return c.list("DeviceRegistration", false, func(p registration.Page) ([]any, string, error) {
		return c.svc.ListRegistrations(c.ctx(), strings.Join(c.ids, ""), p)
	})
}

// diagnose says what is known of a device, and why it was refused.
func (c *call) diagnose() (any, error) {
	return c.svc.Diagnose(c.ctx(), c.ids[0], c.cfg.Attempts, nil)
}

// try says the same, and what would become of a chain of certificates.
func (c *call) try() (any, error) {
	body, err := exchange.Body(c.w, c.r, maxBody)
	if err != nil {
		return nil, err
	}
	chain, err := parseChain(body)
	if err != nil {
		return nil, err
	}
	return c.svc.Diagnose(c.ctx(), c.ids[0], c.cfg.Attempts, chain)
}

// forgetAttempts erases what is kept of a device's attempts.
func (c *call) forgetAttempts() (any, error) {
	if c.cfg.Attempts == nil {
		return nil, exchange.NotFound()
	}
	if err := dps.CheckRegistrationID(c.ids[0]); err != nil {
		return nil, dps.NewError(dps.CodeInvalidArgument, "Invalid registration ID", err)
	}
	return nil, c.cfg.Attempts.Erase(c.ctx(), c.svc.Scope(), c.ids[0], c.by)
}

// attempt finds the attempt whose answer had a tracking ID.
func (c *call) attempt() (any, error) {
	if c.cfg.Attempts == nil {
		return nil, exchange.NotFound()
	}
	if len(c.ids[0]) > 64 {
		return nil, dps.NewError(dps.CodeInvalidArgument, "That is no tracking ID", nil)
	}
	a, err := c.cfg.Attempts.ByTracking(c.ctx(), c.svc.Scope(), c.ids[0])
	if errors.Is(err, registration.ErrNotFound) {
		return nil, dps.NewError(dps.CodeNotFound, "No attempt with this tracking ID is on record: it was another service's, it is too old, or there were too many", nil)
	}
	return a, err
}

const maxChain = 16 // certificates that are handed in

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

// observe counts a call that was answered.
func (c *call) observe(begun time.Time, err error) {
	if c.cfg.Meter == nil {
		return
	}
	o := meter.Classify(c.r)
	if o == nil {
		return
	}
	if o.Status = http.StatusOK; err != nil {
		o.Status = dps.AsError(err).Code.Status()
	}
	h := c.w.Header()
	o.Duration, o.APIVersion, o.Principal, o.Remote = time.Since(begun), c.r.URL.Query().Get("api-version"), c.by.Name, c.r.RemoteAddr
	o.Code, o.RequestID = h.Get("X-Ms-Error-Code"), h.Get("X-Ms-Request-Id")
	if c.svc != nil {
		o.Scope = c.svc.Scope()
	}
	c.cfg.Meter.Service(o)
}
