// Package arm is the management API: Azure Resource Manager's calls for provisioning services and their certificates, as Azure's
// management clients and command line make them.
//
// A [Server] is an http.Handler for the paths below subscriptions and providers. A provisioning service is a
// [registration.Scope]; its subscription and resource group are names that are kept with it, whatever they are. Callers are an
// [access.Authenticator]'s, and may what their management rights in the service of that name say. What is changed is changed when
// the answer goes out, so creating and updating are no long operations here; deleting may be one, and so may erasing, which
// Azure has not: it goes on in the background and is taken up again by [Server.Resume]. Private endpoint connections are kept,
// and do nothing. A Server may be used by many goroutines.
//
// Bodies are bounded, and what this service has not is refused, where leaving it out would let the caller think that it has. The
// contract is that of api-version 2022-02-05; every other date is taken too (service API, section 3).
package arm

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/touchmark/touchmark/pkg/access"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
)

// Config is what a server needs.
type Config struct {
	Scopes *registration.Scopes
	Access *access.Authenticator
	// First is an ID scope that is not deleted here, since the process itself stands on it; empty for none. Its audit record says
	// who deleted others.
	First string
	// ServiceHost says where the service API of a provisioning service is; nil is as in Azure. DeviceHost is where devices call;
	// empty is as in Azure.
	ServiceHost func(sc *registration.Scope) string
	DeviceHost  string
	Hubs        Hubs
	// DeleteWait is for how long a deletion may take until it is answered as one that goes on; 0 is 2 s, less than that no time.
	DeleteWait time.Duration
	Log        *slog.Logger
	Now        func() time.Time
}

// Hubs read the connection strings of linked hubs.
type Hubs struct {
	// Parse checks one and returns the hub's host name. Its error shows no secret.
	Parse func(kind registration.HubKind, text string) (host string, err error)
	// Mask returns one as it may be shown.
	Mask func(text string) string
	// Restore puts the secrets of the stored one into one that was shown masked.
	Restore func(text, stored string) (string, error)
	// Check asks a hub that an ID scope is to have whether it is there and takes what the connection string says; nil links hubs unasked.
	Check func(ctx context.Context, scope string, h registration.LinkedHub) error
}

const (
	maxBody  = 1 << 20
	maxPath  = 2 << 10
	pageSize = 100
	// eraseAgain is how long a deletion waits that did not succeed.
	eraseAgain = 5 * time.Second
)

// Server answers management calls.
type Server struct {
	cfg   Config
	store registration.Store
	ctx   context.Context // ends what goes on in the background

	mu      sync.Mutex
	erasing map[string]chan struct{} // by folded ID scope; closed at the end
	erasers sync.WaitGroup
}

// New returns a server. The context ends what it does in the background, which [Server.Wait] waits for.
func New(ctx context.Context, cfg Config) *Server {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.ServiceHost == nil {
		cfg.ServiceHost = func(sc *registration.Scope) string { return sc.Name + ".azure-devices-provisioning.net" }
	}
	cfg.DeviceHost = cmp.Or(cfg.DeviceHost, dps.DefaultGlobalEndpoint)
	cfg.DeleteWait = cmp.Or(cfg.DeleteWait, 2*time.Second)
	return &Server{cfg: cfg, store: cfg.Scopes.Store(), ctx: ctx, erasing: make(map[string]chan struct{})}
}

// A fault is an error with a name of Resource Manager's, as callers see it.
type fault struct {
	status        int
	code, message string
	cause         error // for the log
}

func (f *fault) Error() string {
	if f.cause != nil {
		return fmt.Sprintf("%s: %s: %v", f.code, f.message, f.cause)
	}
	return f.code + ": " + f.message
}

func bad(format string, args ...any) error {
	return dps.NewError(dps.CodeInvalidArgument, fmt.Sprintf(format, args...), nil)
}

func conflict(format string, args ...any) error {
	return &fault{http.StatusConflict, "Conflict", fmt.Sprintf(format, args...), nil}
}

func nothing(what string) error {
	return &fault{http.StatusNotFound, "ResourceNotFound", what + " was not found.", nil}
}

var errPath = &fault{http.StatusNotFound, "InvalidResourceType", "There is nothing at this path.", nil}

// A call is one request.
type call struct {
	*Server
	w    http.ResponseWriter
	r    *http.Request
	seg  []string // decoded segments of the path that are still to be looked at
	who  *access.Principal
	by   registration.Actor
	sub  string
	rg   string
	vers string
}

// An answer is what goes out when nothing went wrong. A nil body is none.
type answer struct {
	status int
	body   any
}

func ok(body any) *answer { return &answer{http.StatusOK, body} }

// ServeHTTP answers a request.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c := &call{Server: s, w: w, r: r, by: registration.Actor{Remote: r.RemoteAddr, RequestID: dps.NewUUID()}}
	h := w.Header()
	h.Set("X-Ms-Request-Id", c.by.RequestID)
	correlation := r.Header.Get("X-Ms-Correlation-Request-Id")
	if !word(correlation, 1, 64, "-") {
		correlation = c.by.RequestID
	}
	h.Set("X-Ms-Correlation-Request-Id", correlation)
	h.Set("Cache-Control", "no-store")
	h.Set("Strict-Transport-Security", "max-age=31536000; includeSubDomains")
	a, err := c.route()
	if err != nil {
		c.fail(err)
		return
	}
	c.write(a.status, a.body)
}

// write sends JSON with its length.
func (c *call) write(status int, body any) {
	if body == nil && status == http.StatusNoContent {
		c.w.WriteHeader(status)
		return
	}
	b, err := dps.Marshal(body)
	if err != nil {
		c.cfg.Log.Error("encoding an answer", "cause", err)
		status, b = http.StatusInternalServerError, []byte(`{"error":{"code":"InternalServerError","message":"Internal error"}}`)
	}
	c.w.Header().Set("Content-Type", "application/json; charset=utf-8")
	c.w.Header().Set("Content-Length", strconv.Itoa(len(b)))
	c.w.WriteHeader(status)
	_, _ = c.w.Write(b) // the caller may be gone
}

// fail sends an error as clients of both kinds read it: members at the top, and an object (service API, section 3.5).
func (c *call) fail(err error) {
	var f *fault
	var code any
	if errors.As(err, &f) {
		code = f.code
	} else {
		e := dps.AsError(err)
		f = &fault{e.Code.Status(), strconv.Itoa(int(e.Code)), e.Message, e.Cause}
		code = int(e.Code)
	}
	level := slog.LevelInfo
	if f.status >= 500 {
		level = slog.LevelError
		c.w.Header().Set("Retry-After", strconv.Itoa(dps.RetryAfter))
	}
	c.cfg.Log.Log(c.r.Context(), level, "management call refused", "method", c.r.Method, "path", c.r.URL.Path, "status", f.status, "code", f.code,
		"reason", err, "requestId", c.by.RequestID, "actor", c.by.Name, "remote", c.by.Remote)
	c.w.Header().Set("X-Ms-Error-Code", f.code)
	c.write(f.status, map[string]any{"code": code, "httpStatusCode": strings.ReplaceAll(http.StatusText(f.status), " ", ""), "message": f.message,
		"details": "Request ID " + c.by.RequestID, "error": map[string]string{"code": f.code, "message": f.message}})
}

// word reports whether text is a name of that many characters: letters, digits, and some more.
func word(text string, least, most int, more string) bool {
	return len(text) >= least && len(text) <= most && !strings.ContainsFunc(text, func(r rune) bool {
		return !('a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || strings.ContainsRune(more, r))
	})
}

// next takes the next segment of the path; empty at its end.
func (c *call) next() (s string) {
	if len(c.seg) > 0 {
		s, c.seg = c.seg[0], c.seg[1:]
	}
	return s
}

// words takes segments that must be these, in any case.
func (c *call) words(want ...string) bool {
	for _, w := range want {
		if !strings.EqualFold(c.next(), w) {
			return false
		}
	}
	return true
}

// method says which methods there are, and refuses every other.
func (c *call) method(allowed ...string) error {
	if slices.Contains(allowed, c.r.Method) {
		return nil
	}
	c.w.Header().Set("Allow", strings.Join(allowed, ", "))
	return dps.NewError(dps.CodeMethodNotAllowed, "Method not allowed", nil)
}

// may refuses a caller without a right in the provisioning service of that name, whether there is one or not. The name "" is for
// what is no service's.
func (c *call) may(name string, right access.Right) error {
	if c.who.May(name, right) {
		return nil
	}
	return &fault{http.StatusForbidden, "AuthorizationFailed", "The caller may not do this.", fmt.Errorf("%s lacks %s in %q", c.who.Name, right, name)}
}

func (c *call) route() (*answer, error) {
	// Who the caller is comes first: strangers do not learn what there is.
	var err error
	if c.who, err = c.cfg.Access.Authenticate(c.r); errors.Is(err, access.ErrUnavailable) {
		return nil, &fault{http.StatusServiceUnavailable, "ServiceUnavailable", "Try again later", err}
	} else if err != nil {
		return nil, &fault{http.StatusUnauthorized, "AuthenticationFailed", "Authentication failed.", err}
	}
	c.by.Name = c.who.Name
	path := c.r.URL.EscapedPath()
	if len(path) > maxPath {
		return nil, dps.NewError(dps.CodeBadRequest, "The path is too long", nil)
	}
	for seg := range strings.SplitSeq(strings.Trim(path, "/"), "/") {
		decoded, err := url.PathUnescape(seg)
		if err != nil || decoded == "" {
			return nil, dps.NewError(dps.CodeBadRequest, "The path is not properly encoded", err)
		}
		c.seg = append(c.seg, decoded)
	}
	if c.vers = c.r.URL.Query().Get("api-version"); c.vers == "" {
		return nil, &fault{http.StatusBadRequest, "MissingApiVersionParameter", "The api-version query parameter (?api-version=) is required for all requests.", nil}
	} else if err := dps.CheckAPIVersion(c.vers); err != nil {
		return nil, &fault{http.StatusBadRequest, "InvalidApiVersionParameter", "The api-version is not one that is known.", err}
	}
	switch strings.ToLower(c.next()) {
	case "providers":
		if !c.words("Microsoft.Devices", "operations") || len(c.seg) > 0 {
			return nil, errPath
		}
		return c.operations()
	case "subscriptions":
		if c.sub = c.next(); !word(c.sub, 1, 64, "-") {
			return nil, bad("Subscription %.80q: want 1 to 64 letters, digits and hyphens", c.sub)
		}
	default:
		return nil, errPath
	}
	if len(c.seg) > 0 && strings.EqualFold(c.seg[0], "resourceGroups") {
		c.next()
		if c.rg = c.next(); !word(c.rg, 1, 90, "-_.()") || strings.HasSuffix(c.rg, ".") {
			return nil, bad("Resource group %.100q: want 1 to 90 letters, digits and -_.(), and no dot at the end", c.rg)
		}
	}
	if !c.words("providers", "Microsoft.Devices") {
		return nil, errPath
	}
	what := strings.ToLower(c.next())
	switch {
	case what == "provisioningservices" && len(c.seg) == 0:
		return c.list()
	case what == "provisioningservices" && c.rg != "":
		return c.service()
	case what == "checkprovisioningservicenameavailability" && c.rg == "" && len(c.seg) == 0:
		return c.checkName()
	case what == "locations" && c.rg == "" && len(c.seg) == 3 && strings.EqualFold(c.seg[1], "provisioningServiceOperationResults"):
		return c.operationResult(c.seg[2])
	}
	return nil, errPath
}

// body reads the request's body, which must be one JSON value.
func (c *call) body(into any) error {
	b, err := io.ReadAll(http.MaxBytesReader(c.w, c.r.Body, maxBody))
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		return dps.NewError(dps.CodeTooLarge, "Request body is too large", nil)
	case err != nil:
		return dps.NewError(dps.CodeBadRequest, "Request body cannot be read", err)
	}
	if err := json.Unmarshal(b, into); err != nil {
		return &fault{http.StatusBadRequest, "InvalidRequestContent", "The request body is not valid JSON of this resource.", shapeOf(err)}
	}
	return nil
}

// shapeOf keeps values, which may be secret, out of an error of JSON.
func shapeOf(err error) error {
	var wrong *json.UnmarshalTypeError
	if errors.As(err, &wrong) {
		return fmt.Errorf("member %s is no %s", wrong.Field, wrong.Type)
	}
	var syntax *json.SyntaxError
	if errors.As(err, &syntax) {
		return fmt.Errorf("not JSON at octet %d", syntax.Offset)
	}
	return errors.New("a member has a value that is not known")
}

// operations lists what the provider can do (service API, section 3.2).
func (c *call) operations() (*answer, error) {
	if err := c.method(http.MethodGet); err != nil {
		return nil, err
	}
	type display struct {
		Provider  string `json:"provider"`
		Resource  string `json:"resource"`
		Operation string `json:"operation"`
	}
	type operation struct {
		Name    string  `json:"name"`
		Display display `json:"display"`
	}
	all := []operation{}
	for _, o := range [][3]string{
		{"provisioningServices/read", "Provisioning services", "Get"}, {"provisioningServices/write", "Provisioning services", "Create or update"},
		{"provisioningServices/delete", "Provisioning services", "Delete"}, {"provisioningServices/listkeys/action", "Provisioning services", "List keys"},
		{"provisioningServices/keys/listkeys/action", "Provisioning services", "List keys by name"}, {"provisioningServices/skus/read", "SKUs", "List"},
		{"provisioningServices/certificates/read", "Certificates", "Get"}, {"provisioningServices/certificates/write", "Certificates", "Create or update"},
		{"provisioningServices/certificates/delete", "Certificates", "Delete"},
		{"provisioningServices/certificates/generateVerificationCode/action", "Certificates", "Generate verification code"},
		{"provisioningServices/certificates/verify/action", "Certificates", "Verify"},
		{"provisioningServices/privateEndpointConnections/read", "Private endpoint connections", "Get"},
		{"provisioningServices/privateEndpointConnections/write", "Private endpoint connections", "Create or update"},
		{"provisioningServices/privateEndpointConnections/delete", "Private endpoint connections", "Delete"},
		{"checkProvisioningServiceNameAvailability/action", "Provisioning services", "Check name availability"},
	} {
		all = append(all, operation{"Microsoft.Devices/" + o[0], display{"Microsoft Devices", o[1], o[2]}})
	}
	return ok(list{all, nil}), nil
}

// A list is a page of something.
type list struct {
	Value    any     `json:"value"`
	NextLink *string `json:"nextLink"`
}

// link returns an absolute URL of this API, which pollers and pagers ask for.
func (c *call) link(path string, query url.Values) string {
	query.Set("api-version", c.vers)
	return (&url.URL{Scheme: "https", Host: c.r.Host, Path: path, RawQuery: query.Encode()}).String()
}
