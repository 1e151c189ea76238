package serviceapi

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"

	"filippo.io/age"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/sealing"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/exchange"
	"github.com/touchmark/touchmark/pkg/registration"
)

// What stands below touchmark/ is touchmark's own: Azure has none of it.

func (c *call) info() (any, error) {
	owners, required, err := c.svc.Owners()
	recipient := ""
	if err == nil && c.cfg.Recipient != nil {
		recipient, err = c.cfg.Recipient(c.svc.Scope())
	}
	return map[string]any{"idScope": c.svc.Scope(), "name": c.sc.Name, "recipient": recipient, "owners": owners, "requireOrders": required}, err
}

// extra answers one of Config.Calls.
func (c *call) extra(f Call) (any, error) {
	if dps.Fold(c.sc.ID) != dps.Fold(c.cfg.First) {
		return nil, exchange.NotFound()
	}
	body, err := exchange.Body(c.w, c.r, maxBody)
	if err != nil {
		return nil, err
	}
	c.cfg.Log.Info("called", "operation", c.r.Method+" "+c.r.URL.Path, "actor", c.by.Name, "remote", c.by.Remote)
	return f(c.ctx(), c.r.Method, body)
}

func (c *call) bundle() (any, error) {
	if c.cfg.Import == nil {
		return nil, exchange.NotFound()
	}
	in := ImportRequest{Residency: c.r.Header.Get("Touchmark-Residency"), By: c.by}
	for name, key := range map[string]*[]byte{"Touchmark-Trust": &in.Trust, "Touchmark-Holder": &in.Holder} {
		if text := c.r.Header.Get(name); text != "" {
			var err error
			if *key, err = base64.StdEncoding.DecodeString(text); err != nil {
				return nil, dps.NewError(dps.CodeBadRequest, name+" is not base64", err)
			}
		}
	}
	for name, flag := range map[string]*bool{"dryRun": &in.DryRun, "requireOrder": &in.RequireOrder} {
		if text := c.r.URL.Query().Get(name); text != "" {
			var err error
			if *flag, err = strconv.ParseBool(text); err != nil {
				return nil, dps.NewError(dps.CodeBadRequest, name+" must be true or false", err)
			}
		}
	}
	rc := http.NewResponseController(c.w)
	_ = rc.SetWriteDeadline(time.Time{}) // what is imported may take its time; its answer has some again
	in.Body = &patientReader{http.MaxBytesReader(c.w, c.r.Body, maxBundle), rc, c.cfg.BundleTimeout}
	res, err := c.cfg.Import(c.ctx(), c.svc, in)
	_ = rc.SetWriteDeadline(time.Now().Add(c.cfg.BundleTimeout))
	if err != nil {
		return nil, err
	}
	return res, nil
}

// patientReader reads what may be long, as long as it keeps coming.
type patientReader struct {
	io.Reader
	rc   *http.ResponseController
	each time.Duration
}

func (p *patientReader) Read(b []byte) (int, error) {
	_ = p.rc.SetReadDeadline(time.Now().Add(p.each))
	return p.Reader.Read(b)
}

// groupKey seals a group's key to a recipient: the one form in which it leaves for a factory.
func (c *call) groupKey() (any, error) {
	body, err := c.body()
	if err != nil {
		return nil, err
	}
	var in struct {
		Recipient string `json:"recipient"`
	}
	if err := json.Unmarshal(body, &in); err != nil {
		return nil, dps.NewError(dps.CodeBadRequest, "The body is not valid JSON", err)
	}
	to, err := sealing.ParseRecipient(in.Recipient)
	if err != nil {
		return nil, dps.NewError(dps.CodeInvalidArgument, "The recipient is not an age recipient", err)
	}
	key, created, err := c.svc.GroupKey(c.ctx(), c.by, c.ids[0])
	if err != nil {
		return nil, err
	}
	secret := hsm.Secret(key)
	defer secret.Wipe()
	plain, err := json.Marshal(map[string]string{"group": c.ids[0], "primaryKey": base64.StdEncoding.EncodeToString(key)})
	if err != nil {
		return nil, err
	}
	defer clear(plain)
	var sealed bytes.Buffer
	enc, err := age.Encrypt(&sealed, to)
	if err != nil {
		return nil, fmt.Errorf("sealing the group key: %w", err)
	}
	if _, err := enc.Write(plain); err != nil {
		return nil, fmt.Errorf("sealing the group key: %w", err)
	}
	if err := enc.Close(); err != nil {
		return nil, fmt.Errorf("sealing the group key: %w", err)
	}
	return map[string]any{"sealed": sealed.Bytes(), "created": created}, nil
}

// closeGroup closes a group, or opens it.
func (c *call) closeGroup() (any, error) {
	body, err := c.body()
	if err != nil {
		return nil, err
	}
	var in struct {
		Closed *bool `json:"closed"`
	}
	if err := json.Unmarshal(body, &in); err != nil || in.Closed == nil {
		return nil, dps.NewError(dps.CodeBadRequest, `The body must be {"closed":true} or {"closed":false}`, err)
	}
	changed, err := c.svc.CloseGroup(c.ctx(), c.by, c.ids[0], *in.Closed)
	if err != nil {
		return nil, err
	}
	return map[string]any{"group": c.ids[0], "closed": *in.Closed, "changed": changed}, nil
}

// groupDevices lists the devices that came in by a group, and by which of its keys or CAs.
func (c *call) groupDevices() (any, error) {
	return c.list("GroupDevice", false, func(p registration.Page) ([]any, string, error) {
		return c.svc.QueryGroupDevices(c.ctx(), c.ids[0], p)
	})
}

func (c *call) order() (any, error) {
	return c.svc.Order(c.ctx(), c.ids[0])
}

// anyRows is a page of one type as a page of any.
func anyRows[T any](rows []T, next string, err error) ([]any, string, error) {
	all := make([]any, len(rows))
	for i, r := range rows {
		all[i] = r
	}
	return all, next, err
}

func (c *call) orders() (any, error) {
	return c.list("Order", false, func(p registration.Page) ([]any, string, error) {
		return anyRows(c.svc.QueryOrders(c.ctx(), p.After, p.Limit))
	})
}

func (c *call) orderDevices() (any, error) { return c.devicesOf("OrderedDevice", false) }
func (c *call) orderUnseen() (any, error)  { return c.devicesOf("UnseenDevice", true) }

func (c *call) devicesOf(item string, unseen bool) (any, error) {
	return c.list(item, false, func(p registration.Page) ([]any, string, error) {
		return anyRows(c.svc.QueryOrderDevices(c.ctx(), c.ids[0], unseen, p.After, p.Limit))
	})
}

func (c *call) orderRefusals() (any, error) {
	return c.list("Refusal", false, func(p registration.Page) ([]any, string, error) {
		return anyRows(c.svc.QueryRefusals(c.ctx(), c.ids[0], p.After, p.Limit))
	})
}

// audit lists the audit record, oldest first, from the time on that the query's "since" names.
func (c *call) audit() (any, error) {
	var from string
	if since := c.r.URL.Query().Get("since"); since != "" {
		at, err := time.Parse(time.RFC3339, since)
		if err != nil || at.Year() < 1970 || at.Year() > 9999 {
			return nil, dps.NewError(dps.CodeInvalidArgument, "since must be a time, such as 2026-01-31T12:00:00Z", err)
		}
		from = registration.AuditFrom(at)
	}
	return c.list("Audit", false, func(p registration.Page) ([]any, string, error) {
		p.After = max(p.After, from)
		return c.svc.QueryAudit(c.ctx(), p)
	})
}

// A policy as these calls move it; keys are base64.
type policy struct {
	Name         string `json:"name"`
	Rights       string `json:"rights"`
	PrimaryKey   []byte `json:"primaryKey,omitempty"`
	SecondaryKey []byte `json:"secondaryKey,omitempty"`
}

func (c *call) policies() (any, error) {
	all, err := c.svc.Policies(c.ctx())
	rows := []policy{}
	for _, p := range all {
		rows = append(rows, policy{Name: p.Name, Rights: p.Rights})
	}
	return rows, err
}

// policy shows keys, which is in the audit record.
func (c *call) policy() (any, error) {
	p, err := c.svc.ShowPolicy(c.ctx(), c.by, c.ids[0])
	if err != nil {
		return nil, err
	}
	return policy{p.Name, p.Rights, p.Primary, p.Secondary}, nil
}

// putPolicy makes or changes a policy. What is absent stays as it was; a key that is null or empty is made anew.
func (c *call) putPolicy() (any, error) {
	body, err := c.body()
	if err != nil {
		return nil, err
	}
	var in struct {
		Rights       *string         `json:"rights"`
		PrimaryKey   json.RawMessage `json:"primaryKey"`
		SecondaryKey json.RawMessage `json:"secondaryKey"`
	}
	if err := json.Unmarshal(body, &in); err != nil {
		return nil, dps.NewError(dps.CodeInvalidArgument, "The body is not a valid policy", err)
	}
	p, err := c.svc.EditPolicy(c.ctx(), c.by, c.ids[0], func(p *registration.Policy) error {
		if in.Rights != nil {
			p.Rights = *in.Rights
		}
		for _, k := range []struct {
			sent json.RawMessage
			key  *[]byte
		}{{in.PrimaryKey, &p.Primary}, {in.SecondaryKey, &p.Secondary}} {
			if k.sent == nil {
				continue
			}
			*k.key = nil
			if err := json.Unmarshal(k.sent, k.key); err != nil {
				return dps.NewError(dps.CodeInvalidArgument, "A key of a policy must be base64 of 16 to 64 octets", nil)
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return policy{p.Name, p.Rights, p.Primary, p.Secondary}, nil
}

func (c *call) deletePolicy() (any, error) {
	return nil, c.svc.DeletePolicy(c.ctx(), c.by, c.ids[0])
}
