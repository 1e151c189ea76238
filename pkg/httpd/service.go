package httpd

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"filippo.io/age"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/sealing"
	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/meter"
	"github.com/touchmark/touchmark/pkg/registration"
)

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
}

// An ImportFunc verifies a bundle as it streams by and takes its entries.
type ImportFunc func(context.Context, ImportRequest) (registration.ImportResult, error)

const (
	maxServiceBody = 1 << 20
	maxBundle      = 8 << 30
	defaultPage    = 100
	maxPage        = 1000
	maxID          = 128 // of registrations, groups and orders
)

// A right of a shared access policy (service API, section 2.3).
type right string

const (
	enrollmentRead  right = "EnrollmentRead"
	enrollmentWrite right = "EnrollmentWrite"
	statusRead      right = "RegistrationStatusRead"
	statusWrite     right = "RegistrationStatusWrite"
)

// service serves the service API (service API, section 1.3).
func (s *Server) service(w http.ResponseWriter, r *http.Request, seg []string) {
	v, err := s.route(w, r, seg)
	switch {
	case err != nil:
		s.fail(w, r, err)
	case v == nil:
		w.Header().Set("X-Ms-Request-Id", dps.NewUUID())
		w.WriteHeader(http.StatusNoContent)
	default:
		s.answer(w, http.StatusOK, v)
	}
}

func (s *Server) route(w http.ResponseWriter, r *http.Request, seg []string) (any, error) {
	version := r.URL.Query().Get("api-version")
	if err := dps.CheckAPIVersion(version); err != nil {
		return nil, dps.NewError(dps.CodeBadRequest, "api-version is missing or not known", err)
	}
	switch strings.ToLower(seg[0]) {
	case "enrollments":
		return s.enrollments(w, r, registration.Individual, "Enrollment", seg[1:])
	case "enrollmentgroups":
		return s.enrollments(w, r, registration.Group, "EnrollmentGroup", seg[1:])
	case "registrations":
		return s.registrations(w, r, seg[1:])
	}
	return s.own(w, r, seg[1:])
}

func (s *Server) notAllowed(w http.ResponseWriter, methods ...string) error {
	w.Header().Set("Allow", strings.Join(methods, ", "))
	return dps.NewError(dps.CodeMethodNotAllowed, "Method not allowed", nil)
}

func (s *Server) enrollments(w http.ResponseWriter, r *http.Request, kind registration.Kind, itemType string, seg []string) (any, error) {
	svc := s.cfg.Service
	switch {
	case len(seg) == 1 && r.Method == http.MethodPost && strings.EqualFold(seg[0], "query"):
		if err := s.authorize(r, enrollmentRead); err != nil {
			return nil, err
		}
		if _, err := s.body(w, r, maxServiceBody); err != nil { // any query text means everything, as on Azure
			return nil, err
		}
		after, limit, err := paging(r)
		if err != nil {
			return nil, err
		}
		page, next, err := svc.QueryEnrollments(r.Context(), kind, after, limit)
		if err != nil {
			return nil, err
		}
		pageHeaders(w, itemType, next)
		return page, nil
	case len(seg) == 1:
		switch r.Method {
		case http.MethodGet:
			if err := s.authorize(r, enrollmentRead); err != nil {
				return nil, err
			}
			return svc.GetEnrollment(r.Context(), kind, seg[0])
		case http.MethodPut:
			if err := s.authorize(r, enrollmentWrite); err != nil {
				return nil, err
			}
			body, err := s.body(w, r, maxServiceBody)
			if err != nil {
				return nil, err
			}
			v, err := svc.PutEnrollment(r.Context(), kind, seg[0], body, r.Header.Get("If-Match"))
			if err == nil {
				s.audit(r, "put", kind, seg[0])
			}
			return v, err
		case http.MethodDelete:
			if err := s.authorize(r, enrollmentWrite); err != nil {
				return nil, err
			}
			err := svc.DeleteEnrollment(r.Context(), kind, seg[0], r.Header.Get("If-Match"))
			if err == nil {
				s.audit(r, "delete", kind, seg[0])
			}
			return nil, err
		}
		return nil, s.notAllowed(w, http.MethodGet, http.MethodPut, http.MethodDelete)
	case len(seg) == 2 && strings.EqualFold(seg[1], "attestationmechanism"):
		if r.Method != http.MethodPost {
			return nil, s.notAllowed(w, http.MethodPost)
		}
		// It shows keys, so reading enrollments is not enough.
		if err := s.authorize(r, enrollmentWrite); err != nil {
			return nil, err
		}
		v, err := svc.AttestationMechanism(r.Context(), kind, seg[0])
		if err != nil {
			return nil, err
		}
		s.audit(r, "show keys", kind, seg[0])
		return v, nil
	}
	return nil, notFound()
}

func (s *Server) registrations(w http.ResponseWriter, r *http.Request, seg []string) (any, error) {
	svc := s.cfg.Service
	switch {
	case len(seg) == 2 && strings.EqualFold(seg[1], "query"):
		if r.Method != http.MethodPost {
			return nil, s.notAllowed(w, http.MethodPost)
		}
		if err := s.authorize(r, statusRead); err != nil {
			return nil, err
		}
		if _, err := s.body(w, r, maxServiceBody); err != nil {
			return nil, err
		}
		after, limit, err := paging(r)
		if err != nil {
			return nil, err
		}
		page, next, err := svc.QueryRegistrations(r.Context(), seg[0], after, limit)
		if err != nil {
			return nil, err
		}
		pageHeaders(w, "DeviceRegistration", next)
		return page, nil
	case len(seg) != 1:
		return nil, notFound()
	case r.Method == http.MethodGet:
		if err := s.authorize(r, statusRead); err != nil {
			return nil, err
		}
		return svc.GetRegistration(r.Context(), seg[0])
	case r.Method == http.MethodDelete:
		if err := s.authorize(r, statusWrite); err != nil {
			return nil, err
		}
		return nil, svc.DeleteRegistration(r.Context(), seg[0], r.Header.Get("If-Match"))
	}
	return nil, s.notAllowed(w, http.MethodGet, http.MethodDelete)
}

// own serves touchmark's own calls, which Azure has not.
func (s *Server) own(w http.ResponseWriter, r *http.Request, seg []string) (any, error) {
	switch {
	case len(seg) == 1 && seg[0] == "info" && r.Method == http.MethodGet:
		if err := s.authorize(r, enrollmentRead); err != nil {
			return nil, err
		}
		owners, required, err := s.cfg.Service.Owners()
		return map[string]any{"idScope": s.cfg.Service.Scope(), "recipient": s.cfg.Recipient, "owners": owners, "requireOrders": required}, err
	case len(seg) == 1 && seg[0] == "bundles" && r.Method == http.MethodPost && s.cfg.Import != nil:
		if err := s.authorize(r, enrollmentWrite); err != nil {
			return nil, err
		}
		in := ImportRequest{Residency: r.Header.Get("Touchmark-Residency")}
		for name, key := range map[string]*[]byte{"Touchmark-Trust": &in.Trust, "Touchmark-Holder": &in.Holder} {
			if text := r.Header.Get(name); text != "" {
				var err error
				if *key, err = base64.StdEncoding.DecodeString(text); err != nil {
					return nil, dps.NewError(dps.CodeBadRequest, name+" is not base64", err)
				}
			}
		}
		for name, flag := range map[string]*bool{"dryRun": &in.DryRun, "requireOrder": &in.RequireOrder} {
			if text := r.URL.Query().Get(name); text != "" {
				var err error
				if *flag, err = strconv.ParseBool(text); err != nil {
					return nil, dps.NewError(dps.CodeBadRequest, name+" must be true or false", err)
				}
			}
		}
		rc := http.NewResponseController(w)
		_ = rc.SetWriteDeadline(time.Time{}) // what is imported may take its time; its answer has some again
		in.Body = &patientReader{http.MaxBytesReader(w, r.Body, maxBundle), rc, s.cfg.RequestTimeout}
		res, err := s.cfg.Import(r.Context(), in)
		_ = rc.SetWriteDeadline(time.Now().Add(s.cfg.RequestTimeout))
		if err != nil {
			return nil, err
		}
		s.cfg.Log.Info("audit", "action", "import", "new", res.New, "unchanged", res.Unchanged, "conflicting", res.Conflicting,
			"replaced", res.Replaced, "retired", res.Retired, "stale", res.Stale, "refused", res.Refused, "dryRun", in.DryRun, "remote", r.RemoteAddr)
		return res, nil
	case len(seg) == 2 && seg[0] == "groupKeys" && r.Method == http.MethodPost:
		if err := s.authorize(r, enrollmentWrite); err != nil {
			return nil, err
		}
		return s.groupKey(w, r, seg[1])
	case len(seg) == 2 && seg[0] == "groups" && r.Method == http.MethodPut:
		if err := s.authorize(r, enrollmentWrite); err != nil {
			return nil, err
		}
		return s.group(w, r, seg[1])
	case (len(seg) == 1 || len(seg) == 2 || len(seg) == 3) && seg[0] == "orders" && r.Method == http.MethodGet:
		if err := s.authorize(r, statusRead); err != nil {
			return nil, err
		}
		return s.orders(w, r, seg[1:])
	case (len(seg) == 1 || len(seg) == 2) && s.cfg.Reports[seg[0]] != nil:
		need := statusRead
		if r.Method == http.MethodDelete {
			need = statusWrite
		}
		if err := s.authorize(r, need); err != nil {
			return nil, err
		}
		body, err := s.body(w, r, maxServiceBody)
		if err != nil {
			return nil, err
		}
		in := &meter.ReportRequest{Service: s.cfg.Service, Method: r.Method, Query: r.URL.Query(), Body: body, Actor: registration.Actor{Name: "service API", Remote: r.RemoteAddr}}
		if len(seg) == 2 {
			in.ID = seg[1]
		}
		return s.cfg.Reports[seg[0]](r.Context(), in)
	case len(seg) == 1 && s.cfg.Calls[seg[0]] != nil:
		if err := s.authorize(r, enrollmentWrite); err != nil {
			return nil, err
		}
		body, err := s.body(w, r, maxServiceBody)
		if err != nil {
			return nil, err
		}
		s.cfg.Log.Info("audit", "action", r.Method+" "+seg[0], "remote", r.RemoteAddr)
		return s.cfg.Calls[seg[0]](r.Context(), r.Method, body)
	}
	return nil, notFound()
}

// group closes a group, or opens it.
func (s *Server) group(w http.ResponseWriter, r *http.Request, id string) (any, error) {
	body, err := s.body(w, r, maxServiceBody)
	if err != nil {
		return nil, err
	}
	var in struct {
		Closed *bool `json:"closed"`
	}
	if err := json.Unmarshal(body, &in); err != nil || in.Closed == nil {
		return nil, dps.NewError(dps.CodeBadRequest, `The body must be {"closed":true} or {"closed":false}`, err)
	}
	changed, err := s.cfg.Service.CloseGroup(r.Context(), id, *in.Closed)
	if err != nil {
		return nil, err
	}
	action := "open"
	if *in.Closed {
		action = "close"
	}
	s.audit(r, action, registration.Group, id)
	return map[string]any{"group": id, "closed": *in.Closed, "changed": changed}, nil
}

// orders answers what became of production orders: all of them, one with its leases, or a list of one.
func (s *Server) orders(w http.ResponseWriter, r *http.Request, seg []string) (any, error) {
	svc := s.cfg.Service
	if len(seg) == 1 {
		return svc.Order(r.Context(), seg[0])
	}
	after, limit, err := paging(r)
	if err != nil {
		return nil, err
	}
	var page any
	var next, item string
	switch {
	case len(seg) == 0:
		item = "Order"
		page, next, err = svc.QueryOrders(r.Context(), after, limit)
	case seg[1] == "devices", seg[1] == "unseen":
		item = "OrderedDevice"
		page, next, err = svc.QueryOrderDevices(r.Context(), seg[0], seg[1] == "unseen", after, limit)
	case seg[1] == "refusals":
		item = "Refusal"
		page, next, err = svc.QueryRefusals(r.Context(), seg[0], after, limit)
	default:
		return nil, notFound()
	}
	if err != nil {
		return nil, err
	}
	pageHeaders(w, item, next)
	return page, nil
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
func (s *Server) groupKey(w http.ResponseWriter, r *http.Request, group string) (any, error) {
	body, err := s.body(w, r, maxServiceBody)
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
	key, created, err := s.cfg.Service.GroupKey(r.Context(), group)
	if err != nil {
		return nil, err
	}
	secret := hsm.Secret(key)
	defer secret.Wipe()
	plain, err := json.Marshal(map[string]string{"group": group, "primaryKey": base64.StdEncoding.EncodeToString(key)})
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
	s.audit(r, "seal key", registration.Group, group)
	return map[string]any{"sealed": sealed.Bytes(), "created": created}, nil
}

func (s *Server) audit(r *http.Request, action string, kind registration.Kind, id string) {
	s.cfg.Log.Info("audit", "action", action, "kind", string(kind), "id", id, "remote", r.RemoteAddr)
}

func denied(cause error) *dps.Error { return dps.NewError(dps.CodeUnauthorized, "Unauthorized", cause) }

// authorize checks a service token against its policy (service API, section 2.2). The caller learns nothing but 401; the
// reason is in the log.
func (s *Server) authorize(r *http.Request, need right) error {
	err := s.allowed(r, need)
	if err == nil {
		if s.cfg.Throttle != nil {
			return s.cfg.Throttle(r.Context())
		}
		return nil
	}
	e := denied(err)
	s.cfg.Log.Info("refused", "operation", r.Method+" "+r.URL.Path, "trackingId", e.TrackingID, "reason", err, "remote", r.RemoteAddr)
	return e
}

func (s *Server) allowed(r *http.Request, need right) error {
	token, err := attest.ParseToken(r.Header.Get("Authorization"))
	if err != nil {
		return err
	}
	if token.Expired(s.cfg.Now()) {
		return attest.ErrExpired
	}
	if !s.audience(token.Resource, r) {
		return attest.ErrResource
	}
	p, err := s.cfg.Service.Policy(r.Context(), token.Policy)
	if errors.Is(err, registration.ErrNotFound) {
		return errors.New("unknown policy")
	}
	if err != nil {
		return err
	}
	if first, second := token.SignedBy(p.Primary), token.SignedBy(p.Secondary); !first && !second {
		return attest.ErrSignature
	}
	rights := strings.FieldsFunc(p.Rights, func(c rune) bool { return c == ',' || c == ' ' })
	// Whoever may write enrollments may do everything: that is what the owner's policy has, and everybody uses.
	if slices.Contains(rights, string(enrollmentWrite)) || slices.Contains(rights, string(need)) {
		return nil
	}
	return fmt.Errorf("policy %q lacks %s", p.Name, need)
}

// audience reports whether a token's resource is this service: one of its host names, or a path under it that holds the
// request's.
func (s *Server) audience(resource string, r *http.Request) bool {
	resource = strings.TrimSuffix(strings.ToLower(resource), "/")
	host, path, hasPath := strings.Cut(resource, "/")
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	if !slices.ContainsFunc(s.cfg.Hosts, func(h string) bool { return strings.EqualFold(h, host) }) {
		return false
	}
	if !hasPath {
		return true
	}
	mine := strings.ToLower(strings.Trim(r.URL.Path, "/"))
	return mine == path || strings.HasPrefix(mine, path+"/")
}

// paging reads the page size and where the page begins.
func paging(r *http.Request) (after string, limit int, err error) {
	limit = defaultPage
	if text := r.Header.Get("X-Ms-Max-Item-Count"); text != "" {
		if limit, err = strconv.Atoi(text); err != nil || limit < 1 {
			return "", 0, dps.NewError(dps.CodeInvalidArgument, "x-ms-max-item-count must be a positive number", err)
		}
		limit = min(limit, maxPage)
	}
	if token := r.Header.Get("X-Ms-Continuation"); token != "" {
		b, err := base64.StdEncoding.DecodeString(token)
		id, ok := strings.CutPrefix(string(b), "after:")
		if err != nil || !ok || id == "" || len(id) > maxID {
			return "", 0, dps.NewError(dps.CodeInvalidArgument, "x-ms-continuation is not one of ours", err)
		}
		after = id
	}
	return after, limit, nil
}

// pageHeaders says what a page holds and where the next one begins. On the last page there is no continuation header at
// all: one client loops for ever on an empty one.
func pageHeaders(w http.ResponseWriter, itemType, next string) {
	w.Header().Set("X-Ms-Item-Type", itemType)
	w.Header().Set("X-Content-Type-Options", "nosniff")
	if next != "" {
		w.Header().Set("X-Ms-Continuation", base64.StdEncoding.EncodeToString([]byte("after:"+next)))
	}
}
