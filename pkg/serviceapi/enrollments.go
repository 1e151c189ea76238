package serviceapi

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/json"
	"strconv"
	"strings"

	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/query"
	"github.com/touchmark/touchmark/pkg/registration"
)

func (c *call) bulk() (any, error) {
	body, err := c.body()
	if err != nil {
		return nil, err
	}
	return c.svc.Bulk(c.ctx(), c.by, c.kind, body)
}

func (c *call) judge() (any, error) {
	body, err := c.body()
	if err != nil {
		return nil, err
	}
	return c.svc.Judge(c.ctx(), c.by, c.kind, body)
}

func (c *call) get() (any, error) {
	return c.svc.GetEnrollment(c.ctx(), c.kind, c.ids[0])
}

func (c *call) put() (any, error) {
	body, err := c.body()
	if err != nil {
		return nil, err
	}
	return c.svc.PutEnrollment(c.ctx(), c.by, c.kind, c.ids[0], body, c.r.Header.Get("If-Match"))
}

func (c *call) delete() (any, error) {
	return nil, c.svc.DeleteEnrollment(c.ctx(), c.by, c.kind, c.ids[0], c.r.Header.Get("If-Match"))
}

// mechanism shows keys, so reading enrollments is not enough for it.
func (c *call) mechanism() (any, error) {
	return c.svc.AttestationMechanism(c.ctx(), c.by, c.kind, c.ids[0])
}

func (c *call) query() (any, error) {
	item := "Enrollment"
	if c.kind == registration.Group {
		item = "EnrollmentGroup"
	}
	return c.list(item, true, func(p registration.Page) ([]any, string, error) {
		return c.svc.QueryEnrollments(c.ctx(), c.kind, p)
	})
}

func (c *call) registration() (any, error) {
	return c.svc.GetRegistration(c.ctx(), c.ids[0])
}

func (c *call) deleteRegistration() (any, error) {
	return nil, c.svc.DeleteRegistration(c.ctx(), c.by, c.ids[0], c.r.Header.Get("If-Match"))
}

func (c *call) queryRegistrations() (any, error) {
	return c.list("DeviceRegistration", true, func(p registration.Page) ([]any, string, error) {
		return c.svc.QueryRegistrations(c.ctx(), c.ids[0], p)
	})
}

// list answers a page of rows, of those that the body's query is for, where there is one. On the last page there is no
// continuation header at all: one client loops for ever on an empty one.
func (c *call) list(item string, queried bool, rows func(registration.Page) ([]any, string, error)) (any, error) {
	p := registration.Page{Limit: defaultPage}
	var text string
	if queried {
		var err error
		if text, err = c.queryText(); err != nil {
			return nil, err
		}
		if c.cfg.StrictQuery {
			if p.Match, err = matcher(item, text); err != nil {
				return nil, err
			}
		} else {
			text = ""
		}
	}
	h := c.r.Header
	if size := h.Get("X-Ms-Max-Item-Count"); size != "" {
		n, err := strconv.Atoi(size)
		if err != nil || n < 1 {
			return nil, dps.NewError(dps.CodeInvalidArgument, "x-ms-max-item-count must be a positive number", err)
		}
		p.Limit = min(n, maxPage)
	}
	of := strings.Join(append([]string{dps.Fold(c.sc.ID), item, text}, c.ids...), "\x00")
	if token := h.Get("X-Ms-Continuation"); token != "" {
		var ok bool
		if p.After, ok = openToken(of, token); !ok {
			return nil, dps.NewError(dps.CodeInvalidArgument, "x-ms-continuation is not one of this query's", nil)
		}
	}
	page, next, err := rows(p)
	if err != nil {
		return nil, err
	}
	c.w.Header().Set("X-Ms-Item-Type", item)
	if next != "" {
		c.w.Header().Set("X-Ms-Continuation", newToken(of, next))
	}
	return page, nil
}

// queryText reads a QuerySpecification; there may be none.
func (c *call) queryText() (string, error) {
	body, err := c.body()
	if err != nil || len(body) == 0 {
		return "", err
	}
	var spec struct {
		Query string `json:"query"`
	}
	if err := json.Unmarshal(body, &spec); err != nil {
		return "", dps.NewError(dps.CodeInvalidArgument, "The body is not a valid query", err)
	}
	return spec.Query, nil
}

// tables are the names that queries have for what is listed.
var tables = map[string]string{"Enrollment": "enrollments", "EnrollmentGroup": "enrollmentGroups", "DeviceRegistration": "deviceRegistrations"}

// matcher returns what a query says of a row; nil is all.
func matcher(item, text string) (func(any) (bool, error), error) {
	q, err := query.Parse(text)
	if err != nil {
		return nil, dps.NewError(dps.CodeInvalidArgument, "The query is not understood: "+err.Error(), err)
	}
	if q.From != "" && !strings.EqualFold(q.From, tables[item]) {
		return nil, dps.NewError(dps.CodeInvalidArgument, "The query is not from "+tables[item], nil)
	}
	if q.All() {
		return nil, nil
	}
	return func(row any) (bool, error) {
		b, err := json.Marshal(row)
		if err != nil {
			return false, err
		}
		return q.Match(b)
	}, nil
}

const (
	checkSize = 12
	// maxAfter bounds where a page begins: an orphan's ID, hub and device ID are the longest.
	maxAfter = 1 << 10
)

// newToken returns a continuation token: where the next page of a list begins, behind a check that it belongs to it. It guards
// against mistakes, and grants nothing.
func newToken(of, after string) string {
	sum := sha256.Sum256([]byte(of + "\x00" + after))
	return base64.RawURLEncoding.EncodeToString(append(sum[:checkSize], after...))
}

func openToken(of, token string) (after string, ok bool) {
	b, err := base64.RawURLEncoding.Strict().DecodeString(token)
	if err != nil || len(b) <= checkSize || len(b) > checkSize+maxAfter {
		return "", false
	}
	after = string(b[checkSize:])
	return after, subtle.ConstantTimeCompare([]byte(newToken(of, after)), []byte(token)) == 1
}
