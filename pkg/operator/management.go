package operator

import (
	"bytes"
	"cmp"
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/touchmark/touchmark/pkg/dps"
)

// CodeHubUnreachable is what a hub is refused with that cannot be linked: the status is that of a caller without rights.
const CodeHubUnreachable dps.Code = 401001

// ManagementVersion is the version of the management API that a Management speaks (service API, section 3).
const ManagementVersion = "2022-02-05"

// A ManagementConnection says where a management API is, which part of it is meant, and proves a right to it. Its text forms do not show
// the token.
type ManagementConnection struct {
	Host                        string // with a port where it is not 443
	Subscription, ResourceGroup string
	// Scope is the provisioning service that is meant where none is named; empty for none.
	Scope string
	token string
}

var segmentPattern = regexp.MustCompile(`^[A-Za-z0-9._()-]{1,90}$`)

// ParseManagement reads Endpoint=https://…;Token=…;Subscription=…;ResourceGroup=…, and Scope=… if it is there, or a JSON object of the same
// names, in any order and letter case. Its errors do not show the text.
func ParseManagement(text string) (ManagementConnection, error) {
	var c ManagementConnection
	if len(text) > maxConnection {
		return c, fmt.Errorf("no management connection: %d octets", len(text))
	}
	parts := make(map[string]string)
	text = strings.TrimSpace(text)
	if strings.HasPrefix(text, "{") {
		var m map[string]string
		if json.Unmarshal([]byte(text), &m) != nil {
			return c, errors.New("no management connection: not a JSON object of texts")
		}
		for name, value := range m {
			parts[strings.ToLower(name)] = value
		}
	} else {
		for part := range strings.SplitSeq(text, ";") {
			name, value, _ := strings.Cut(part, "=")
			parts[strings.ToLower(strings.TrimSpace(name))] = strings.TrimSpace(value)
		}
	}
	u, err := url.Parse(parts["endpoint"])
	if err != nil || u.Scheme != "https" || u.Host == "" || strings.Trim(u.Path, "/") != "" || u.User != nil || u.RawQuery != "" {
		return c, errors.New("no management connection: want Endpoint=https://HOST;Token=…;Subscription=…;ResourceGroup=…")
	}
	c = ManagementConnection{Host: u.Host, Subscription: parts["subscription"], ResourceGroup: parts["resourcegroup"], Scope: parts["scope"], token: parts["token"]}
	for name, v := range map[string]string{"Subscription": c.Subscription, "ResourceGroup": c.ResourceGroup} {
		if !segmentPattern.MatchString(v) {
			return ManagementConnection{}, fmt.Errorf("no management connection: %s is missing, or none", name)
		}
	}
	if c.token == "" || strings.ContainsFunc(c.token, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return ManagementConnection{}, errors.New("no management connection: Token is missing, or none")
	}
	return c, nil
}

// String leaves the token out.
func (c ManagementConnection) String() string {
	return c.Host + "/subscriptions/" + c.Subscription + "/resourceGroups/" + c.ResourceGroup
}

// GoString leaves the token out.
func (c ManagementConnection) GoString() string { return c.String() }

// A Management makes the calls of the management API: of provisioning services, which touchmark calls scopes, with their linked hubs,
// policies and certificates. It serves many goroutines.
type Management struct {
	*caller
	connection ManagementConnection
	root       string
}

// NewManagement returns a client. The connection of the config is not looked at.
func NewManagement(cfg Config, connection ManagementConnection) *Management {
	cfg.Connection = Connection{Host: connection.Host}
	return &Management{
		caller: newCaller(cfg, ManagementVersion, func() string { return "Bearer " + connection.token }), connection: connection,
		root: "/subscriptions/" + url.PathEscape(connection.Subscription) + "/resourceGroups/" + url.PathEscape(connection.ResourceGroup) + "/providers/Microsoft.Devices/provisioningServices",
	}
}

// A Scope is a provisioning service, as the management API has it. What this package does not know of it is kept.
type Scope struct {
	raw   map[string]json.RawMessage
	props map[string]json.RawMessage
	ScopeView
	// Unchecked asks touchmark to link hubs that it does not reach; Azure does not know it.
	Unchecked bool
}

// A ScopeView is what this package knows of a scope.
type ScopeView struct {
	Name     string            `json:"name"`
	Location string            `json:"location"`
	ETag     string            `json:"etag"`
	Tags     map[string]string `json:"tags"`
	Props    struct {
		State                      string `json:"state"`
		ProvisioningState          string `json:"provisioningState"`
		Hubs                       []Hub  `json:"iotHubs"`
		AllocationPolicy           string `json:"allocationPolicy"`
		ServiceOperationsHostName  string `json:"serviceOperationsHostName"`
		DeviceProvisioningHostName string `json:"deviceProvisioningHostName"`
		IDScope                    string `json:"idScope"`
		PublicNetworkAccess        string `json:"publicNetworkAccess"`
		// IPRules are tried in order; the first that matches decides.
		IPRules []IPRule `json:"ipFilterRules"`
		// Touchmark is what touchmark has beside Azure's settings; nil from services that do not have it.
		Touchmark *ScopeOwn `json:"touchmark"`
	} `json:"properties"`
}

// A ScopeOwn holds settings that only touchmark's scopes have; nil leaves one as it is.
type ScopeOwn struct {
	StrictRoots *bool   `json:"strictRoots,omitempty"`
	Quotas      *string `json:"quotas,omitempty"` // "azure" or "none"
}

// An IPRule lets callers in, or keeps them out.
type IPRule struct {
	Name   string `json:"filterName"`
	Action string `json:"action"`           // Accept or Reject
	Mask   string `json:"ipMask"`           // CIDR
	Target string `json:"target,omitempty"` // all, serviceApi or deviceApi; empty is all
}

// ParseIPRule reads NAME=accept|reject MASK, with device, service or all behind it, or nothing for all. The mask is the service's to judge.
func ParseIPRule(text string) (IPRule, error) {
	at := strings.LastIndexByte(text, '=')
	words := strings.Fields(strings.ToLower(text[at+1:]))
	r := IPRule{Name: strings.TrimSpace(text[:max(at, 0)])}
	if len(words) == 2 {
		words = append(words, "all")
	}
	if r.Name != "" && len(words) == 3 {
		r.Action = map[string]string{"accept": "Accept", "reject": "Reject"}[words[0]]
		r.Mask = words[1]
		r.Target = map[string]string{"all": "all", "service": "serviceApi", "serviceapi": "serviceApi", "device": "deviceApi", "deviceapi": "deviceApi"}[words[2]]
	}
	if r.Action == "" || r.Target == "" {
		return IPRule{}, fmt.Errorf("IP rule %.200q: want NAME=accept|reject MASK [device|service|all]", text)
	}
	return r, nil
}

// String is what [ParseIPRule] reads, without the name.
func (r IPRule) String() string {
	return strings.ToLower(r.Action) + " " + r.Mask + " " + cmp.Or(map[string]string{"serviceApi": "service", "deviceApi": "device"}[r.Target], r.Target, "all")
}

// A Hub is a linked hub. Its connection string has **** in the place of the key, as the service answers it; put back so, the key stays.
type Hub struct {
	Name             string `json:"name,omitempty"`
	ConnectionString string `json:"connectionString,omitempty"`
	Location         string `json:"location,omitempty"`
	// Kind is touchmark's: azure, builtin, mosquitto, webhook or record; empty is azure, or what the hub has been.
	Kind   string `json:"kind,omitempty"`
	Apply  *bool  `json:"applyAllocationPolicy,omitempty"`
	Weight *int   `json:"allocationWeight,omitempty"`
}

// NewScope makes one that is not at the service yet.
func NewScope(name, location string) *Scope {
	s := &Scope{raw: make(map[string]json.RawMessage), props: make(map[string]json.RawMessage)}
	s.Name, s.Location = name, location
	_ = s.put(s.raw, "location", location)
	_ = s.put(s.raw, "sku", map[string]any{"name": "S1", "capacity": 1})
	return s
}

func (s *Scope) put(m map[string]json.RawMessage, name string, v any) error {
	b, err := json.Marshal(v)
	if err == nil {
		m[name] = b
	}
	return err
}

// UnmarshalJSON reads a resource.
func (s *Scope) UnmarshalJSON(b []byte) error {
	*s = Scope{}
	if err := errors.Join(json.Unmarshal(b, &s.raw), json.Unmarshal(b, &s.ScopeView)); err != nil {
		return err
	}
	if p := s.raw["properties"]; p != nil {
		if err := json.Unmarshal(p, &s.props); err != nil {
			return err
		}
	}
	if s.props == nil {
		s.props = make(map[string]json.RawMessage)
	}
	for i := range s.Props.Hubs {
		h := &s.Props.Hubs[i]
		h.ConnectionString = maskKey(h.ConnectionString) // whatever a service answers
	}
	return nil
}

// MarshalJSON renders the resource as it came and was changed.
func (s *Scope) MarshalJSON() ([]byte, error) {
	p, err := json.Marshal(s.props)
	if err != nil {
		return nil, err
	}
	s.raw["properties"] = p
	return json.Marshal(s.raw)
}

var keyPattern = regexp.MustCompile(`(?i)(SharedAccessKey=)[^;]*`)

func maskKey(s string) string { return keyPattern.ReplaceAllString(s, "${1}****") }

// SetProperty changes a member of the properties.
func (s *Scope) SetProperty(name string, v any) error { return s.put(s.props, name, v) }

// SetTags replaces the tags.
func (s *Scope) SetTags(tags map[string]string) error { return s.put(s.raw, "tags", tags) }

// SetHub links a hub, or changes the one of that name; members that are not set stay. The key of other hubs stays what it is.
func (s *Scope) SetHub(h Hub) error {
	hubs, at, err := s.hubs(h.Name)
	if err != nil {
		return err
	}
	b, err := json.Marshal(h)
	if err != nil {
		return err
	}
	if at < 0 {
		hubs, at = append(hubs, make(map[string]json.RawMessage)), len(hubs)
	}
	if err := json.Unmarshal(b, &hubs[at]); err != nil { // into the map that is there: other members stay
		return err
	}
	var c string
	if _ = json.Unmarshal(hubs[at]["connectionString"], &c); HubName(c) != "" { // what is no text names nothing
		delete(hubs[at], "name") // a service makes it of the connection string
	}
	return s.SetProperty("iotHubs", hubs)
}

// DropHub unlinks a hub. The error is ErrNotFound.
func (s *Scope) DropHub(name string) error {
	hubs, at, err := s.hubs(name)
	if err != nil {
		return err
	}
	if at < 0 {
		return fmt.Errorf("hub %s is not linked: %w", name, ErrNotFound)
	}
	return s.SetProperty("iotHubs", slices.Delete(hubs, at, at+1))
}

// SetIPRules puts rules before the rule of a name, or with "" in the place of those of their names, and new ones behind all others;
// first it takes some away. The error is ErrNotFound.
func (s *Scope) SetIPRules(set []IPRule, before string, remove []string) error {
	rules := slices.Clone(s.Props.IPRules)
	find := func(name string) int {
		return slices.IndexFunc(rules, func(r IPRule) bool { return strings.EqualFold(r.Name, name) })
	}
	for _, name := range remove {
		at := find(name)
		if at < 0 {
			return fmt.Errorf("IP rule %.200q: %w", name, ErrNotFound)
		}
		rules = slices.Delete(rules, at, at+1)
	}
	for _, r := range set {
		at := find(r.Name)
		if at >= 0 && before == "" {
			rules[at] = r
			continue
		}
		if at >= 0 {
			rules = slices.Delete(rules, at, at+1)
		}
		at = len(rules)
		if before != "" {
			if at = find(before); at < 0 {
				return fmt.Errorf("IP rule %.200q: %w", before, ErrNotFound)
			}
		}
		rules = slices.Insert(rules, at, r)
	}
	s.Props.IPRules = rules
	return s.SetProperty("ipFilterRules", rules)
}

// hubs returns the linked hubs with all their members, and where the one of that name is: -1 for nowhere.
func (s *Scope) hubs(name string) (hubs []map[string]json.RawMessage, at int, err error) {
	if p := s.props["iotHubs"]; p != nil {
		if err := json.Unmarshal(p, &hubs); err != nil {
			return nil, 0, err
		}
	}
	return hubs, slices.IndexFunc(hubs, func(h map[string]json.RawMessage) bool {
		var n, c string
		_, _ = json.Unmarshal(h["name"], &n), json.Unmarshal(h["connectionString"], &c) // what is no text names nothing
		return dps.Fold(cmp.Or(n, HubName(c))) == dps.Fold(name)
	}), nil
}

// HubName returns the host name in a hub's connection string; "" where there is none.
func HubName(connection string) string {
	for part := range strings.SplitSeq(strings.TrimSpace(connection), ";") {
		if name, value, _ := strings.Cut(part, "="); strings.EqualFold(name, "HostName") {
			return value
		}
	}
	return ""
}

func (m *Management) path(scope string, more ...string) string {
	p := m.root + "/" + url.PathEscape(scope)
	for _, s := range more {
		p += "/" + url.PathEscape(s)
	}
	return p
}

// Scopes returns all scopes of the resource group.
func (m *Management) Scopes(ctx context.Context) ([]*Scope, error) {
	var all []*Scope
	path, query := m.root, url.Values{}
	for range 1000 {
		var page struct {
			Value    []*Scope `json:"value"`
			NextLink string   `json:"nextLink"`
		}
		if _, err := m.do(ctx, request{method: http.MethodGet, path: path, query: query, again: true}, &page); err != nil {
			return nil, err
		}
		if all = append(all, page.Value...); page.NextLink == "" {
			return all, nil
		}
		u, err := m.own(page.NextLink)
		if err != nil {
			return nil, err
		}
		path, query = u.EscapedPath(), u.Query()
	}
	return nil, errors.New("the list of scopes does not end")
}

// own makes sure that a link leads back to where the token is for.
func (m *Management) own(link string) (*url.URL, error) {
	u, err := url.Parse(link)
	if err != nil || u.Scheme != "https" || !strings.EqualFold(u.Host, m.host) {
		return nil, fmt.Errorf("the management API at %s sends its caller elsewhere", m.host)
	}
	return u, nil
}

// Scope returns one. Without a name it is the connection's, or the only one that there is. The error is ErrNotFound.
func (m *Management) Scope(ctx context.Context, name string) (*Scope, error) {
	if name = cmp.Or(name, m.connection.Scope); name == "" {
		all, err := m.Scopes(ctx)
		if err != nil {
			return nil, err
		}
		if len(all) != 1 {
			return nil, fmt.Errorf("there are %d scopes: which one?", len(all))
		}
		return all[0], nil
	}
	s := &Scope{}
	_, err := m.do(ctx, request{method: http.MethodGet, path: m.path(name), again: true}, s)
	return s, err
}

// PutScope makes a scope, or puts it in the place of the one that is there, and waits until that is done.
func (m *Management) PutScope(ctx context.Context, s *Scope) (*Scope, error) {
	b, err := json.Marshal(s)
	if err != nil {
		return nil, err
	}
	query := url.Values{}
	if s.Unchecked {
		query.Set("skipHubCheck", "true")
	}
	out := &Scope{}
	a, err := m.do(ctx, request{method: http.MethodPut, path: m.path(s.Name), query: query, body: b, again: true}, out)
	if err != nil {
		return nil, err
	}
	if err := m.wait(ctx, a.header); err != nil {
		return nil, err
	}
	for range 600 {
		if out, err = m.Scope(ctx, s.Name); err != nil {
			return nil, err
		}
		switch out.Props.ProvisioningState {
		case "", "Succeeded":
			return out, nil
		case "Failed", "Canceled":
			return nil, fmt.Errorf("scope %s: %s", s.Name, out.Props.ProvisioningState)
		}
		if err := sleep(ctx, 2*time.Second); err != nil {
			return nil, err
		}
	}
	return nil, fmt.Errorf("scope %s is still %s", s.Name, out.Props.ProvisioningState)
}

// EditScope gets a scope, changes it and puts it back, with the version that it was.
func (m *Management) EditScope(ctx context.Context, name string, change func(*Scope) error) (*Scope, error) {
	s, err := m.Scope(ctx, name)
	if err != nil {
		return nil, err
	}
	if err := change(s); err != nil {
		return nil, err
	}
	return m.PutScope(ctx, s)
}

// DeleteScope deletes a scope with all that is in it, and waits until that is done.
func (m *Management) DeleteScope(ctx context.Context, name string) error {
	a, err := m.do(ctx, request{method: http.MethodDelete, path: m.path(name), again: true}, nil)
	if err != nil {
		if a.lost && errors.Is(err, ErrNotFound) {
			return nil
		}
		return err
	}
	return m.wait(ctx, a.header)
}

// EraseScope deletes all that a touchmark service keeps of a scope's devices, which then goes on without, and waits until that is done.
// The error is ErrUnsupported where the service is another's.
func (m *Management) EraseScope(ctx context.Context, name string) error {
	a, err := m.do(ctx, request{method: http.MethodPost, path: m.path(name, "erase"), again: true}, nil)
	if err == nil {
		return m.wait(ctx, a.header)
	}
	if err = unsupported(err); errors.Is(err, ErrUnsupported) {
		if _, none := m.Scope(ctx, name); none != nil {
			return none
		}
	}
	return err
}

// wait polls a long-running operation to its end (service API, section 3.4).
func (m *Management) wait(ctx context.Context, h http.Header) error {
	link := h.Get("Azure-AsyncOperation")
	if link == "" {
		return nil
	}
	u, err := m.own(link)
	if err != nil {
		return err
	}
	for range 600 {
		var st struct {
			Status string `json:"status"`
			Error  struct{ Code, Message string }
		}
		a, err := m.do(ctx, request{method: http.MethodGet, path: u.EscapedPath(), query: u.Query(), again: true}, &st)
		if err != nil {
			return err
		}
		switch strings.ToLower(st.Status) {
		case "succeeded":
			return nil
		case "failed", "canceled":
			return &Error{Host: m.host, Status: http.StatusInternalServerError, Name: clip(st.Error.Code), Message: clip(cmp.Or(st.Error.Message, "the operation "+st.Status))}
		}
		after, asked := retryAfter(a.header)
		if !asked {
			after = 2 * time.Second
		}
		if err := sleep(ctx, after); err != nil {
			return err
		}
	}
	return errors.New("the operation does not end")
}

// A Policy is a shared access policy. Its text form does not show the keys.
type Policy struct {
	Name      string `json:"keyName"`
	Primary   string `json:"primaryKey,omitempty"`
	Secondary string `json:"secondaryKey,omitempty"`
	Rights    string `json:"rights"`
}

// String leaves the keys out.
func (p Policy) String() string { return p.Name + ": " + p.Rights }

// GoString leaves the keys out.
func (p Policy) GoString() string { return p.String() }

// Has reports whether the policy has a right.
func (p *Policy) Has(right string) bool {
	return slices.Contains(strings.FieldsFunc(p.Rights, func(r rune) bool { return r == ',' || r == ' ' }), right)
}

// Policies returns the policies of a scope with their keys: a call that services write down.
func (m *Management) Policies(ctx context.Context, scope string) ([]Policy, error) {
	var list struct {
		Value []Policy `json:"value"`
	}
	_, err := m.do(ctx, request{method: http.MethodPost, path: m.path(scope, "listkeys"), again: true}, &list)
	return list.Value, err
}

// EditPolicies changes the list of policies. Those without keys get new ones.
func (m *Management) EditPolicies(ctx context.Context, scope string, change func([]Policy) ([]Policy, error)) error {
	policies, err := m.Policies(ctx, scope)
	if err != nil {
		return err
	}
	if policies, err = change(policies); err != nil {
		return err
	}
	_, err = m.EditScope(ctx, scope, func(s *Scope) error { return s.SetProperty("authorizationPolicies", policies) })
	return err
}

// A CACertificate is a CA certificate that was uploaded to a scope.
type CACertificate struct {
	Name  string `json:"name"`
	ETag  string `json:"etag"`
	Props struct {
		Subject          string `json:"subject"`
		Expiry           string `json:"expiry"`
		Thumbprint       string `json:"thumbprint"`
		IsVerified       bool   `json:"isVerified"`
		Created          string `json:"created"`
		Updated          string `json:"updated"`
		VerificationCode string `json:"verificationCode,omitempty"`
	} `json:"properties"`
}

// Certificates returns the CA certificates of a scope.
func (m *Management) Certificates(ctx context.Context, scope string) ([]CACertificate, error) {
	var list struct {
		Value []CACertificate `json:"value"`
	}
	_, err := m.do(ctx, request{method: http.MethodGet, path: m.path(scope, "certificates"), again: true}, &list)
	return list.Value, err
}

// Certificate returns one. The error is ErrNotFound.
func (m *Management) Certificate(ctx context.Context, scope, name string) (*CACertificate, error) {
	c := &CACertificate{}
	_, err := m.do(ctx, request{method: http.MethodGet, path: m.path(scope, "certificates", name), again: true}, c)
	return c, err
}

// PutCertificate uploads a certificate. With verified the caller vouches for it: no proof is asked. The tag is that of the one that it
// takes the place of, or "".
func (m *Management) PutCertificate(ctx context.Context, scope, name string, cert *x509.Certificate, verified bool, tag string) (*CACertificate, error) {
	b, err := json.Marshal(map[string]any{"properties": map[string]any{"certificate": base64.StdEncoding.EncodeToString(cert.Raw), "isVerified": verified}})
	if err != nil {
		return nil, err
	}
	c := &CACertificate{}
	_, err = m.do(ctx, request{method: http.MethodPut, path: m.path(scope, "certificates", name), header: ifMatch(tag), body: b, again: true}, c)
	return c, err
}

// DeleteCertificate takes a certificate away.
func (m *Management) DeleteCertificate(ctx context.Context, scope, name, tag string) error {
	_, err := m.do(ctx, request{method: http.MethodDelete, path: m.path(scope, "certificates", name), header: ifMatch(tag), again: true}, nil)
	return err
}

// VerificationCode makes a new code: whoever holds the CA's key proves it with a certificate whose common name is the code.
func (m *Management) VerificationCode(ctx context.Context, scope, name, tag string) (*CACertificate, error) {
	c := &CACertificate{}
	_, err := m.do(ctx, request{method: http.MethodPost, path: m.path(scope, "certificates", name, "generateVerificationCode"), header: ifMatch(tag)}, c)
	return c, err
}

// VerifyCertificate hands in that proof.
func (m *Management) VerifyCertificate(ctx context.Context, scope, name string, proof *x509.Certificate, tag string) (*CACertificate, error) {
	b, err := json.Marshal(map[string]string{"certificate": base64.StdEncoding.EncodeToString(proof.Raw)})
	if err != nil {
		return nil, err
	}
	c := &CACertificate{}
	_, err = m.do(ctx, request{method: http.MethodPost, path: m.path(scope, "certificates", name, "verify"), header: ifMatch(tag), body: b}, c)
	return c, err
}

// Document returns what a service answered, with the keys of hubs masked.
func (s *Scope) Document() (json.RawMessage, error) {
	b, err := json.Marshal(s)
	if err != nil {
		return nil, err
	}
	var m map[string]any
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.UseNumber()
	if err := dec.Decode(&m); err != nil {
		return nil, err
	}
	if p, ok := m["properties"].(map[string]any); ok {
		delete(p, "authorizationPolicies") // they hold keys
		hubs, _ := p["iotHubs"].([]any)
		for _, h := range hubs {
			if h, ok := h.(map[string]any); ok {
				if c, ok := h["connectionString"].(string); ok {
					h["connectionString"] = maskKey(c)
				}
			}
		}
	}
	return json.Marshal(m)
}
