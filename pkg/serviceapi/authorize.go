package serviceapi

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"

	"github.com/touchmark/touchmark/pkg/access"
	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
)

// open finds the scope that the caller means, and checks that it has a right there (service API, section 2). The caller learns
// nothing but 401; the reason is in the log.
func (c *call) open(need access.Right) error {
	p, err := c.principal()
	if err == nil && !p.May(c.sc.Name, need) {
		err = fmt.Errorf("%s lacks %s", p.Name, need)
	}
	if err == nil {
		c.by = registration.Actor{Name: p.Name, Remote: c.r.RemoteAddr, RequestID: c.w.Header().Get("X-Ms-Request-Id")}
		return nil
	}
	var e *dps.Error
	switch {
	case errors.As(err, &e): // of the store
	case errors.Is(err, access.ErrUnavailable):
		e = dps.NewError(dps.CodeServiceOverloaded, "Try again later", err)
	default:
		e = dps.NewError(dps.CodeUnauthorized, "Unauthorized", err)
	}
	c.cfg.Log.Info("refused", "operation", c.r.Method+" "+c.r.URL.Path, "trackingId", e.TrackingID, "reason", e.Error(), "remote", c.r.RemoteAddr)
	return e
}

// principal returns who calls, and fills in the scope.
func (c *call) principal() (*access.Principal, error) {
	hosts, err := c.scope()
	if err != nil {
		return nil, err
	}
	if err := c.svc.Admits(c.ctx(), c.r.RemoteAddr, registration.ServiceAPI); err != nil {
		return nil, err
	}
	if c.cfg.Bearer != nil {
		p, err := c.cfg.Bearer.Authenticate(c.r)
		if !errors.Is(err, access.ErrNoBearer) {
			return p, err
		}
	}
	return c.byPolicy(hosts)
}

// scope finds the scope that the request's host means, and returns that host in all its forms.
func (c *call) scope() (hosts []string, err error) {
	host := bare(c.r.Host)
	name, below := strings.CutSuffix(host, "."+strings.ToLower(c.cfg.Domain))
	byName := c.cfg.Domain != "" && below && !strings.Contains(name, ".")
	first := host == "localhost" || net.ParseIP(host) != nil || slices.ContainsFunc(c.cfg.Hosts, func(h string) bool { return strings.EqualFold(h, host) })
	switch {
	case first:
		c.svc, err = c.cfg.Scopes.Service(c.ctx(), c.cfg.First)
		hosts = append(slices.Clip(c.cfg.Hosts), "localhost", host)
	case byName && dps.CheckServiceName(name) == nil:
		c.svc, err = c.cfg.Scopes.ByName(c.ctx(), name)
		hosts = []string{host}
	default:
		err = registration.ErrNotFound
	}
	if err == nil {
		c.sc, err = c.svc.Current(c.ctx())
	}
	switch {
	case errors.Is(err, registration.ErrNotFound):
		return nil, fmt.Errorf("no scope is served at host %.260q", c.r.Host)
	case err != nil:
		return nil, dps.AsError(err)
	}
	if first && c.cfg.Domain != "" { // it has a name too
		hosts = append(hosts, strings.ToLower(c.sc.Name+"."+c.cfg.Domain))
	}
	return hosts, nil
}

// bare returns a host without port, brackets and a dot at its end, in lower case.
func bare(host string) string {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	return strings.ToLower(strings.TrimSuffix(strings.Trim(host, "[]"), "."))
}

// byPolicy checks a token that a shared access policy of the scope signed (service API, section 2.2).
func (c *call) byPolicy(hosts []string) (*access.Principal, error) {
	all := c.r.Header.Values("Authorization")
	if len(all) != 1 {
		return nil, fmt.Errorf("%d authorizations", len(all))
	}
	token, err := attest.ParseToken(all[0])
	if err != nil {
		return nil, err
	}
	if token.Expired(c.cfg.Now()) {
		return nil, attest.ErrExpired
	}
	if !covers(token.Resource, hosts, c.r) {
		return nil, attest.ErrResource
	}
	p, err := c.svc.Policy(c.ctx(), token.Policy)
	if errors.Is(err, registration.ErrNotFound) {
		return nil, errors.New("unknown policy")
	}
	if err != nil {
		return nil, dps.AsError(err)
	}
	if first, second := token.SignedBy(p.Primary), token.SignedBy(p.Secondary); !first && !second {
		return nil, attest.ErrSignature
	}
	rights, err := access.ParseRights(p.Rights, access.Policy)
	if err != nil {
		return nil, err
	}
	return &access.Principal{Name: "policy " + p.Name, Grants: []access.Grant{{Scope: c.sc.Name, Rights: rights}}}, nil
}

// covers reports whether a token's resource is one of the scope's hosts, or a path under it that holds the request's.
func covers(resource string, hosts []string, r *http.Request) bool {
	host, path, hasPath := strings.Cut(strings.TrimSuffix(strings.ToLower(resource), "/"), "/")
	host = bare(host)
	if !slices.ContainsFunc(hosts, func(h string) bool { return strings.EqualFold(h, host) }) {
		return false
	}
	mine := strings.ToLower(strings.Trim(r.URL.Path, "/"))
	return !hasPath || mine == path || strings.HasPrefix(mine, path+"/")
}
