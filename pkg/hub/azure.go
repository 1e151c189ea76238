package hub

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
)

const (
	hubAPIVersion = "2021-04-12"
	// maxAzure bounds an answer: a twin has 8 KB of tags and 32 KB each of desired and reported properties, with metadata for each
	// member.
	maxAzure = 512 << 10
	// tokenLife is how long a token is good for; one is made anew when a sixth of it is left.
	tokenLife = time.Hour
	// attempts to change a device that somebody else changes too.
	attempts = 4
)

// azure speaks IoT Hub's registry and twin REST (service API, section 5).
type azure struct {
	rest
	conn *Connection
	base string // https://host:port

	mu    sync.Mutex
	token string    // under mu
	renew time.Time // under mu
}

func newAzure(cfg Config, conn *Connection) *azure {
	host := conn.Host
	if conn.Port != 443 {
		host = net.JoinHostPort(host, strconv.Itoa(conn.Port))
	} else if strings.Contains(host, ":") {
		host = "[" + host + "]"
	}
	return &azure{rest: newREST(cfg, conn, maxAzure), conn: conn, base: "https://" + host}
}

// authorization returns a token, as section 2.2 has it, for the whole hub.
func (h *azure) authorization() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := h.now()
	if left := h.renew.Sub(now); h.token == "" || left <= 0 || left > tokenLife { // the last of a clock that was set back
		se := strconv.FormatInt(now.Add(tokenLife).Unix(), 10)
		sr := url.QueryEscape(h.conn.Host)
		mac := hmac.New(sha256.New, h.conn.secret)
		mac.Write([]byte(sr + "\n" + se))
		h.token = "SharedAccessSignature sr=" + sr + "&sig=" + url.QueryEscape(base64.StdEncoding.EncodeToString(mac.Sum(nil))) +
			"&se=" + se + "&skn=" + url.QueryEscape(h.conn.User)
		h.renew = now.Add(tokenLife * 5 / 6)
	}
	return h.token
}

// do makes one call. An answer of 2xx to a body is decoded into out.
func (h *azure) do(ctx context.Context, doing, method, path, ifMatch string, in, out any) error {
	var body []byte
	if in != nil {
		var err error
		if body, err = dps.Marshal(in); err != nil {
			return newError(h.name, codeArgument, false, fmt.Errorf("%s: %w", doing, err))
		}
	}
	header := http.Header{"Authorization": {h.authorization()}, "Accept": {"application/json"}, "Request-Id": {dps.NewUUID()}}
	if ifMatch != "" {
		header["If-Match"] = []string{ifMatch}
	}
	a, err := h.call(ctx, doing, method, h.base+path+"?api-version="+hubAPIVersion, header, body)
	if err != nil {
		return err
	}
	if a.status/100 != 2 {
		if a.status == http.StatusUnauthorized { // our clock may have been wrong
			h.mu.Lock()
			h.token = ""
			h.mu.Unlock()
		}
		name, message := parseError(a.header.Get("iothub-errorcode"), a.body)
		e := h.refused(doing, a, name, message)
		if a.status == http.StatusNotFound && name == codeNotFound { // and not a proxy that knows no such path
			e.Err = fmt.Errorf("%s: %w", doing, registration.ErrNotFound)
		}
		return e
	}
	if out == nil {
		return nil
	}
	if err := decode(a.body, out, false); err != nil {
		return h.invalid(doing, a.status, err)
	}
	return nil
}

// errorNames are those of numbers that we branch on or show.
var errorNames = map[string]string{
	"401002": "IotHubUnauthorizedAccess", "401003": "IotHubUnauthorized", "403002": "IotHubQuotaExceeded", "404001": codeNotFound,
	"409001": "DeviceAlreadyExists", "412001": "PreconditionFailed", "412002": "DeviceMessageLockLost", "413002": "TooManyDevices",
	"429001": "ThrottlingException", "429002": "ThrottlingBacklogLimitExceeded", "429003": "ThrottlingBacklogTimeout",
	"500001": "ServerError", "503001": "ServiceUnavailable",
}

// parseError reads the body of an error in each of its shapes (service API, section 5.5): Message as text that begins with
// ErrorCode:…, Message as a string of JSON with errorCode, or these without Message. The header names it too; where both do and
// differ the name is empty, since one of them is not the hub's. Everything here is untrusted.
func parseError(header string, body []byte) (name, message string) {
	type detail struct {
		ErrorCode json.RawMessage `json:"errorCode"`
		Message   string          `json:"message"` // of the outer object "Message", which encoding/json takes for the same
	}
	var outer, inner detail
	if json.Unmarshal(body, &outer) != nil {
		return header, ""
	}
	message = outer.Message
	number := outer.ErrorCode
	if json.Unmarshal([]byte(message), &inner) == nil && inner.ErrorCode != nil {
		number, message = inner.ErrorCode, inner.Message
	}
	if number != nil {
		name = strings.Trim(string(number), `"`)
		if known, ok := errorNames[name]; ok {
			name = known
		}
	} else if rest, ok := strings.CutPrefix(message, "ErrorCode:"); ok {
		name, message, _ = strings.Cut(rest, ";")
	}
	switch {
	case name == "":
		name = header
	case header != "" && header != name && name[0] > '9': // a number that we do not know is no contradiction
		name = ""
	case header != "":
		name = header
	}
	return name, message
}

// identity is a device in the hub's registry (section 5.2), as far as a PUT takes it.
type identity struct {
	DeviceID       string         `json:"deviceId"`
	ETag           string         `json:"etag,omitempty"`
	Status         string         `json:"status,omitempty"`
	StatusReason   string         `json:"statusReason,omitempty"`
	Authentication authentication `json:"authentication"`
	Capabilities   struct {
		IoTEdge bool `json:"iotEdge"`
	} `json:"capabilities"`
	DeviceScope  string   `json:"deviceScope,omitempty"`
	ParentScopes []string `json:"parentScopes,omitempty"`
}

type authentication struct {
	Type         string                       `json:"type"`
	SymmetricKey *dps.SymmetricKeyAttestation `json:"symmetricKey,omitempty"`
	Thumbprint   *struct {
		Primary   string `json:"primaryThumbprint"`
		Secondary string `json:"secondaryThumbprint"`
	} `json:"x509Thumbprint,omitempty"`
}

// String hides the keys.
func (authentication) String() string { return "[redacted]" }

func (a *authentication) thumbprints() (primary, secondary string) {
	if a.Thumbprint == nil {
		return "", ""
	}
	return strings.ToUpper(a.Thumbprint.Primary), strings.ToUpper(a.Thumbprint.Secondary)
}

func (a *authentication) equal(b *authentication) bool {
	if a.Type != b.Type {
		return false
	}
	if a.Type == "sas" {
		return a.SymmetricKey != nil && b.SymmetricKey != nil && *a.SymmetricKey == *b.SymmetricKey
	}
	p1, s1 := a.thumbprints()
	p2, s2 := b.thumbprints()
	return p1 == p2 && s1 == s2
}

// identityOf is a device as a hub is told to create it.
func identityOf(d *registration.HubDevice) *identity {
	i := &identity{DeviceID: d.ID, Status: "enabled"}
	if d.Disabled {
		i.Status = "disabled"
	}
	if d.Keys != nil {
		i.Authentication = authentication{Type: "sas", SymmetricKey: d.Keys}
	} else {
		i.Authentication.Type = "selfSigned"
		i.Authentication.Thumbprint = &struct {
			Primary   string `json:"primaryThumbprint"`
			Secondary string `json:"secondaryThumbprint"`
		}{d.Thumbprints[0], d.Thumbprints[len(d.Thumbprints)-1]} // both slots, always
	}
	i.Capabilities.IoTEdge = d.IoTEdge
	i.setParent(d.Parent)
	return i
}

// setParent puts the device below an edge device. A leaf has its parent's scope for its own; that of an edge device is hub-made.
func (i *identity) setParent(scope string) {
	if !i.Capabilities.IoTEdge {
		i.DeviceScope = scope
	}
	if i.ParentScopes = nil; scope != "" {
		i.ParentScopes = []string{scope}
	}
}

func (i *identity) parent() string {
	switch {
	case len(i.ParentScopes) > 0:
		return i.ParentScopes[0]
	case !i.Capabilities.IoTEdge:
		return i.DeviceScope
	}
	return ""
}

// Check asks for the registry's statistics.
func (h *azure) Check(ctx context.Context) error {
	var s struct {
		Total *int64 `json:"totalDeviceCount"`
	}
	const doing = "reading statistics"
	if err := h.do(ctx, doing, http.MethodGet, "/statistics/devices", "", nil, &s); err != nil {
		return err
	}
	if s.Total == nil {
		return h.invalid(doing, http.StatusOK, errors.New("no totalDeviceCount"))
	}
	return nil
}

func (h *azure) id(id string) error {
	if err := checkID(id); err != nil {
		return newError(h.name, codeArgument, false, err)
	}
	return nil
}

func (h *azure) get(ctx context.Context, id string) (*identity, error) {
	i := new(identity)
	doing := "reading device " + strconv.Quote(id)
	if err := h.do(ctx, doing, http.MethodGet, "/devices/"+percent(id), "", nil, i); err != nil {
		return nil, err
	}
	return i, h.same(doing, i, id)
}

// same refuses what is told of another device.
func (h *azure) same(doing string, i *identity, id string) error {
	if i.DeviceID != id {
		return h.invalid(doing, http.StatusOK, fmt.Errorf("it is of device %.128q", i.DeviceID))
	}
	return nil
}

func (h *azure) put(ctx context.Context, doing string, i *identity, ifMatch string) error {
	var got identity
	if err := h.do(ctx, doing, http.MethodPut, "/devices/"+percent(i.DeviceID), ifMatch, i, &got); err != nil {
		return err
	}
	return h.same(doing, &got, i.DeviceID)
}

// Device reads the identity.
func (h *azure) Device(ctx context.Context, id string) (*registration.HubDevice, error) {
	if err := h.id(id); err != nil {
		return nil, err
	}
	i, err := h.get(ctx, id)
	if err != nil {
		return nil, err
	}
	d := &registration.HubDevice{ID: i.DeviceID, Disabled: i.Status == "disabled", IoTEdge: i.Capabilities.IoTEdge, Parent: i.parent()}
	if d.IoTEdge {
		d.Scope = i.DeviceScope
	}
	if p, s := i.Authentication.thumbprints(); p != "" || s != "" {
		d.Thumbprints = slices.DeleteFunc([]string{p, s}, func(t string) bool { return t == "" })
	}
	return d, nil
}

// Admit creates the identity, or brings the one that is there up to date: section 5.4.
func (h *azure) Admit(ctx context.Context, d *registration.HubDevice) (created bool, err error) {
	if err := checkDevice(h.name, d); err != nil {
		return false, err
	}
	want := identityOf(d)
	for range attempts {
		err := h.put(ctx, "creating device "+strconv.Quote(d.ID), want, "")
		if err == nil {
			return true, nil
		}
		if status(err) != http.StatusConflict {
			return false, err
		}
		have, err := h.get(ctx, d.ID)
		if isNotFound(err) {
			continue // gone again
		}
		if err != nil {
			return false, err
		}
		if have.Authentication.equal(&want.Authentication) && have.Capabilities == want.Capabilities && have.parent() == d.Parent {
			return false, nil
		}
		ifMatch := "*"
		if have.ETag != "" {
			ifMatch = strconv.Quote(have.ETag)
		}
		wasEdge := have.Capabilities.IoTEdge
		have.Authentication, have.Capabilities = want.Authentication, want.Capabilities
		if wasEdge != d.IoTEdge {
			have.DeviceScope = "" // of the other sort
		}
		have.setParent(d.Parent)
		err = h.put(ctx, "updating device "+strconv.Quote(d.ID), have, ifMatch)
		if status(err) == http.StatusPreconditionFailed || isNotFound(err) {
			continue // somebody was quicker
		}
		return false, err
	}
	return false, newError(h.name, codeConflict, true, fmt.Errorf("updating device %q: it was changed by somebody else %d times", d.ID, attempts))
}

// status returns the status that a hub answered, or 0.
func status(err error) int {
	if e, ok := errors.AsType[*registration.HubError](err); ok {
		return e.Status
	}
	return 0
}

// Remove deletes the identity, and with it the twin.
func (h *azure) Remove(ctx context.Context, id string) error {
	if err := h.id(id); err != nil {
		return err
	}
	err := h.do(ctx, "deleting device "+strconv.Quote(id), http.MethodDelete, "/devices/"+percent(id), "*", nil, nil)
	if isNotFound(err) {
		return nil
	}
	return err
}

type twin struct {
	DeviceID   string          `json:"deviceId,omitempty"`
	Tags       json.RawMessage `json:"tags,omitempty"`
	Properties struct {
		Desired json.RawMessage `json:"desired,omitempty"`
	} `json:"properties"`
}

// Twin reads the twin.
func (h *azure) Twin(ctx context.Context, id string) (*registration.HubTwin, error) {
	if err := h.id(id); err != nil {
		return nil, err
	}
	var t twin
	doing := "reading the twin of device " + strconv.Quote(id)
	if err := h.do(ctx, doing, http.MethodGet, "/twins/"+percent(id), "", nil, &t); err != nil {
		return nil, err
	}
	if err := h.same(doing, &identity{DeviceID: t.DeviceID}, id); err != nil {
		return nil, err
	}
	tags, err1 := stripped(t.Tags)
	desired, err2 := stripped(t.Properties.Desired)
	if err := errors.Join(err1, err2); err != nil {
		return nil, h.invalid(doing, http.StatusOK, err)
	}
	return &registration.HubTwin{Tags: tags, Desired: desired}, nil
}

// MergeTwin patches the twin.
func (h *azure) MergeTwin(ctx context.Context, id string, t *registration.HubTwin) error {
	if err := h.id(id); err != nil {
		return err
	}
	var patch twin
	var err1, err2 error
	patch.Tags, err1 = stripped(t.Tags)
	patch.Properties.Desired, err2 = stripped(t.Desired)
	doing := "changing the twin of device " + strconv.Quote(id)
	if err := errors.Join(err1, err2); err != nil {
		return newError(h.name, codeArgument, false, fmt.Errorf("%s: %w", doing, err))
	}
	if patch.Tags == nil && patch.Properties.Desired == nil {
		return nil
	}
	return h.do(ctx, doing, http.MethodPatch, "/twins/"+percent(id), "*", &patch, nil)
}

// stripped returns a JSON object without the members that are the hub's own, or nil when nothing is left of it.
func stripped(raw json.RawMessage) (json.RawMessage, error) {
	if len(raw) == 0 {
		return nil, nil
	}
	var members map[string]json.RawMessage
	if json.Unmarshal(raw, &members) != nil {
		return nil, errors.New("want tags and desired properties that are JSON objects")
	}
	n := len(members)
	delete(members, "$metadata")
	delete(members, "$version")
	switch len(members) {
	case 0:
		return nil, nil
	case n:
		return raw, nil
	}
	return json.Marshal(members)
}
