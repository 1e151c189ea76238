package devhub

import (
	"context"
	"encoding/base64"
	"errors"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/dps"
)

// Limits of requests.
const (
	maxRequest = 1 << 20
	maxBulk    = 100
	maxList    = 1000
	maxPage    = 100
)

// forResource reports whether a token's resource is this hub or a path of it, aligned with its segments: exactly that path, or
// any part from its beginning. The host may have a port, and is not told apart by case.
func (h *Hub) forResource(t *attest.Token, path string, exactly bool) bool {
	host, rest, _ := strings.Cut(t.Resource, "/")
	if at := strings.LastIndexByte(host, ':'); at > 0 {
		if _, err := strconv.ParseUint(host[at+1:], 10, 16); err == nil {
			host = host[:at]
		}
	}
	if !strings.EqualFold(host, h.cfg.Name) && !slices.ContainsFunc(h.cfg.Hosts, func(name string) bool { return strings.EqualFold(strings.Trim(host, "[]"), name) }) {
		return false
	}
	rest = strings.TrimSuffix("/"+rest, "/")
	if exactly {
		return rest == path
	}
	return strings.HasPrefix(path+"/", rest+"/")
}

// signedBy reports whether a key of the policy that the token names signed it.
func (h *Hub) signedBy(t *attest.Token) bool {
	for _, secondary := range []bool{false, true} {
		if key, ok := h.Key(t.Policy, secondary); ok && t.SignedBy(key) {
			return true
		}
	}
	return false
}

// authorize wants a policy's token with one of some rights. Which check failed is not told (service API, section 2.2).
func (h *Hub) authorize(r *http.Request, path string, one Right) error {
	t, err := attest.ParseToken(r.Header.Get("Authorization"))
	if err != nil || t.Expired(h.now()) || policies[t.Policy]&one == 0 || !h.forResource(&t, path, false) || !h.signedBy(&t) {
		return unauthorized()
	}
	return nil
}

func answer(w http.ResponseWriter, status int, b []byte) {
	header := w.Header()
	header.Set("Content-Type", "application/json; charset=utf-8")
	header.Set("Content-Length", strconv.Itoa(len(b)))
	header.Set("X-Ms-Request-Id", dps.NewUUID())
	w.WriteHeader(status)
	_, _ = w.Write(b) // the caller may be gone
}

// ServeHTTP serves the registry's REST under /devices, /twins and /statistics (service API, sections 5.2 and 5.3), and two calls
// of our own: POST /devices/{id}/messages/devicebound sends the body to a device, GET /devices/{id}/messages/events shows what came of it.
func (h *Hub) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	v, err := h.route(w, r)
	code := http.StatusOK
	var partly *bulkResult
	if errors.As(err, &partly) { // it is the answer, too
		v, err, code = partly, nil, http.StatusBadRequest
	}
	var b []byte
	if err == nil && v != nil {
		b, err = dps.Marshal(v)
	}
	switch {
	case err != nil:
		f := asFailure(err)
		if f.number == internalError {
			h.cfg.Log.Error("hub's registry", "path", r.URL.Path, "cause", err)
		}
		f.write(w, h.now())
	case v == nil:
		w.Header().Set("X-Ms-Request-Id", dps.NewUUID())
		w.WriteHeader(http.StatusNoContent)
	default:
		answer(w, code, b)
	}
}

func (h *Hub) route(w http.ResponseWriter, r *http.Request) (any, error) {
	segments := strings.Split(strings.Trim(r.URL.EscapedPath(), "/"), "/")
	for i, s := range segments {
		var err error
		if segments[i], err = url.PathUnescape(s); err != nil {
			return nil, badArgument("the path is not properly encoded")
		}
	}
	if dps.CheckAPIVersion(r.URL.Query().Get("api-version")) != nil {
		return nil, badVersion()
	}
	name := strings.ToLower(segments[0])
	path := "/" + name
	if len(segments) > 1 {
		path += "/" + segments[1]
	}
	allow := func(one Right) error { return h.authorize(r, path, one) }
	call := func(i int) string { // the words of a path are of any case; IDs are not
		if i >= len(segments) {
			return ""
		}
		return strings.ToLower(segments[i])
	}
	what := name
	if len(segments) > 2 {
		what += "/" + call(2)
	}
	if len(segments) > 3 {
		what += "/" + call(3)
	}
	switch n := len(segments); {
	case n == 1 && what == "devices":
		return h.restDevices(w, r, allow)
	case n == 2 && what == "devices" && call(1) == "query" && r.Method == http.MethodPost:
		return h.restQuery(w, r, allow)
	case n == 2 && what == "devices":
		return h.restDevice(w, r, segments[1], allow)
	case n == 4 && what == "devices/messages/devicebound":
		return h.restSend(w, r, segments[1], allow)
	case n == 4 && what == "devices/messages/events":
		return h.restEvents(w, r, segments[1], allow)
	case n == 2 && what == "twins":
		return h.restTwin(w, r, segments[1], allow)
	case n == 3 && what == "twins/methods":
		return h.restMethod(w, r, segments[1], allow)
	case n == 2 && what == "statistics":
		return h.restStatistics(w, r, call(1), allow)
	}
	return nil, &failure{name: "ResourceNotFound", number: 404000, message: "There is nothing at this path"}
}

func notAllowed(w http.ResponseWriter, methods ...string) error {
	w.Header().Set("Allow", strings.Join(methods, ", "))
	return &failure{name: "MethodNotAllowed", number: 405001, message: "Method not allowed"}
}

// body reads a request's body.
func body(w http.ResponseWriter, r *http.Request, most int64) ([]byte, error) {
	b, err := io.ReadAll(http.MaxBytesReader(w, r.Body, most))
	var large *http.MaxBytesError
	if errors.As(err, &large) {
		return nil, tooLarge(int(most))
	}
	if err != nil {
		return nil, badArgument("the body cannot be read")
	}
	return b, nil
}

func jsonBody(w http.ResponseWriter, r *http.Request) (object, error) {
	b, err := body(w, r, maxRequest)
	if err != nil {
		return nil, err
	}
	o, err := parseObject(b)
	if err != nil {
		return nil, badJSON(err)
	}
	return o, nil
}

func (h *Hub) restDevices(w http.ResponseWriter, r *http.Request, allow func(Right) error) (any, error) {
	switch r.Method {
	case http.MethodGet:
		if err := allow(RegistryRead); err != nil {
			return nil, err
		}
		top := maxList
		if text := r.URL.Query().Get("top"); text != "" {
			var err error
			if top, err = strconv.Atoi(text); err != nil || top < 1 || top > maxList {
				return nil, badArgument("top is not a number from 1 to %d", maxList)
			}
		}
		h.mu.Lock()
		defer h.mu.Unlock()
		list := []object{}
		for _, id := range sorted(h.devices) {
			if len(list) == top {
				break
			}
			list = append(list, h.devices[id].identity())
		}
		return list, nil
	case http.MethodPost:
		if err := allow(RegistryWrite); err != nil {
			return nil, err
		}
		b, err := body(w, r, maxRequest)
		if err != nil {
			return nil, err
		}
		return h.bulk(b)
	}
	return nil, notAllowed(w, http.MethodGet, http.MethodPost)
}

func (h *Hub) restDevice(w http.ResponseWriter, r *http.Request, id string, allow func(Right) error) (any, error) {
	ifMatch := r.Header.Get("If-Match")
	switch r.Method {
	case http.MethodGet:
		if err := allow(RegistryRead); err != nil {
			return nil, err
		}
	case http.MethodPut:
		if err := allow(RegistryWrite); err != nil {
			return nil, err
		}
		o, err := jsonBody(w, r)
		if err != nil {
			return nil, err
		}
		if named, err := member[string](o, "deviceId"); err != nil || named != id {
			return nil, badArgument("deviceId is not the one of the path")
		}
		if _, err := h.put(id, o, ifMatch); err != nil {
			return nil, err
		}
	case http.MethodDelete:
		if err := allow(RegistryWrite); err != nil {
			return nil, err
		}
		if ifMatch == "" {
			return nil, &failure{name: "PreconditionFailed", number: 412001, message: "Precondition failed: If-Match is missing"}
		}
		return nil, h.remove(id, ifMatch)
	default:
		return nil, notAllowed(w, http.MethodGet, http.MethodPut, http.MethodDelete)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	d := h.devices[id]
	if d == nil {
		return nil, notFound(id)
	}
	w.Header().Set("Etag", `"`+d.rec.Tag+`"`)
	return d.identity(), nil
}

func (h *Hub) restTwin(w http.ResponseWriter, r *http.Request, id string, allow func(Right) error) (any, error) {
	if r.Method != http.MethodGet && r.Method != http.MethodPatch && r.Method != http.MethodPut {
		return nil, notAllowed(w, http.MethodGet, http.MethodPatch, http.MethodPut)
	}
	if err := allow(ServiceConnect); err != nil {
		return nil, err
	}
	var doc object
	if r.Method == http.MethodGet {
		h.mu.Lock()
		defer h.mu.Unlock()
		d := h.devices[id]
		if d == nil {
			return nil, notFound(id)
		}
		doc = d.twinDocument()
	} else {
		o, err := jsonBody(w, r)
		if err != nil {
			return nil, err
		}
		p, err := parseTwinPatch(o)
		if err != nil {
			return nil, badArgument("%s", oneLine(err))
		}
		if doc, err = h.writeTwin(id, p, r.Method == http.MethodPut, r.Header.Get("If-Match")); err != nil {
			return nil, err
		}
	}
	w.Header().Set("Etag", `"`+doc["etag"].(string)+`"`)
	return doc, nil
}

func (h *Hub) restStatistics(w http.ResponseWriter, r *http.Request, of string, allow func(Right) error) (any, error) {
	if r.Method != http.MethodGet {
		return nil, notAllowed(w, http.MethodGet)
	}
	if err := allow(RegistryRead | ServiceConnect); err != nil {
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	disabled, connected := 0, 0
	for _, d := range h.devices {
		if d.rec.Disabled {
			disabled++
		}
		if d.session != nil {
			connected++
		}
	}
	switch of {
	case "devices":
		return object{"totalDeviceCount": len(h.devices), "enabledDeviceCount": len(h.devices) - disabled, "disabledDeviceCount": disabled}, nil
	case "service":
		return object{"connectedDeviceCount": connected}, nil
	}
	return nil, &failure{name: "ResourceNotFound", number: 404000, message: "There are no such statistics"}
}

func (h *Hub) restQuery(w http.ResponseWriter, r *http.Request, allow func(Right) error) (any, error) {
	if err := allow(ServiceConnect); err != nil {
		return nil, err
	}
	o, err := jsonBody(w, r)
	if err != nil {
		return nil, err
	}
	text, err := member[string](o, "query")
	if err != nil {
		return nil, badArgument("%v", err)
	}
	limit := maxPage
	if asked := r.Header.Get("X-Ms-Max-Item-Count"); asked != "" {
		if limit, err = strconv.Atoi(asked); err != nil || limit < 1 {
			return nil, badArgument("x-ms-max-item-count is not a number")
		}
		limit = min(limit, maxPage)
	}
	after, err := base64.RawURLEncoding.DecodeString(r.Header.Get("X-Ms-Continuation"))
	if err != nil {
		return nil, badArgument("x-ms-continuation is none of this hub's")
	}
	page, next, err := h.query(text, string(after), limit)
	if err != nil {
		return nil, err
	}
	w.Header().Set("X-Ms-Item-Type", "Twin")
	if next != "" { // no header at all at the end: the Node client asks for its presence
		w.Header().Set("X-Ms-Continuation", base64.RawURLEncoding.EncodeToString([]byte(next)))
	}
	return page, nil
}

func (h *Hub) restMethod(w http.ResponseWriter, r *http.Request, id string, allow func(Right) error) (any, error) {
	if r.Method != http.MethodPost {
		return nil, notAllowed(w, http.MethodPost)
	}
	if err := allow(ServiceConnect); err != nil {
		return nil, err
	}
	o, err := jsonBody(w, r)
	if err != nil {
		return nil, err
	}
	name, err1 := member[string](o, "methodName")
	response, err2 := whole(o, "responseTimeoutInSeconds", 5, 300, 30)
	connect, err3 := whole(o, "connectTimeoutInSeconds", 0, 300, 0)
	payload, err4 := dps.Marshal(o["payload"])
	if err := errors.Join(err1, err2, err3, err4); err != nil {
		return nil, badArgument("%s", oneLine(err))
	}
	wait := time.Duration(connect+response) * h.cfg.Second
	c := http.NewResponseController(w)
	// A recorder of a test has none; the server's own limits are made for answers that are there at once.
	_ = c.SetWriteDeadline(time.Now().Add(wait + 30*time.Second))
	_ = c.SetReadDeadline(time.Now().Add(wait + 30*time.Second))
	ctx, cancel := context.WithTimeout(r.Context(), wait+h.cfg.Second)
	defer cancel()
	status, result, err := h.Invoke(ctx, id, name, payload, time.Duration(connect)*h.cfg.Second, time.Duration(response)*h.cfg.Second)
	if err != nil {
		return nil, err
	}
	return object{"status": status, "payload": result}, nil
}

// headers of messages over HTTP, and the short names that the same have on MQTT.
var messageHeaders = map[string]string{"Iothub-Messageid": "mid", "Iothub-Correlationid": "cid", "Iothub-Userid": "uid", "Iothub-Contenttype": "ct", "Iothub-Contentencoding": "ce"}

// message reads one from a request: iothub-app-* are the application's properties.
func message(r *http.Request, id string, b []byte) *Message {
	m := &Message{DeviceID: id, System: map[string]string{}, Properties: map[string]string{}, Body: b}
	for name := range r.Header {
		if short := messageHeaders[name]; short != "" {
			m.System[short] = r.Header.Get(name)
		} else if app, is := strings.CutPrefix(name, "Iothub-App-"); is {
			m.Properties[strings.ToLower(app)] = r.Header.Get(name)
		}
	}
	return m
}

func (h *Hub) restSend(w http.ResponseWriter, r *http.Request, id string, allow func(Right) error) (any, error) {
	if r.Method != http.MethodPost {
		return nil, notAllowed(w, http.MethodPost)
	}
	if err := allow(ServiceConnect); err != nil {
		return nil, err
	}
	b, err := body(w, r, maxToDevice)
	if err != nil {
		return nil, err
	}
	m := message(r, id, b)
	if text := r.Header.Get("Iothub-Expiry"); text != "" {
		if m.Expiry, err = time.Parse(time.RFC3339, text); err != nil {
			return nil, badArgument("iothub-expiry is not a time")
		}
	}
	return nil, h.Send(m)
}

func (h *Hub) restEvents(w http.ResponseWriter, r *http.Request, id string, allow func(Right) error) (any, error) {
	switch r.Method {
	case http.MethodGet:
		if err := allow(ServiceConnect); err != nil {
			return nil, err
		}
		all, ok := h.Messages(id)
		if !ok {
			return nil, notFound(id)
		}
		return all, nil
	case http.MethodPost: // a device without MQTT
		if !h.deviceToken(r, id) {
			return nil, unauthorized()
		}
		b, err := body(w, r, maxDeviceTo)
		if err != nil {
			return nil, err
		}
		h.take(message(r, id, b))
		return nil, nil
	}
	return nil, notAllowed(w, http.MethodGet, http.MethodPost)
}

// deviceToken reports whether a request carries a token of the device's own.
func (h *Hub) deviceToken(r *http.Request, id string) bool {
	t, err := attest.ParseToken(r.Header.Get("Authorization"))
	if err != nil || t.Policy != "" || t.Expired(h.now()) || !h.forResource(&t, "/devices/"+id, true) {
		return false
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	d := h.devices[id]
	return d != nil && !d.rec.Disabled && d.rec.Kind == kindSAS && d.rec.signed(&t)
}

// bulkResult is what came of a bulk call (service API, section 5.2); one that went wrong in part is an error.
type bulkResult struct {
	IsSuccessful bool        `json:"isSuccessful"`
	Errors       []bulkError `json:"errors"`
	Warnings     []bulkError `json:"warnings"`
}

func (b *bulkResult) Error() string { return "bulk operation went wrong in part" }

type bulkError struct {
	DeviceID    string `json:"deviceId"`
	ErrorCode   int    `json:"errorCode"`
	ErrorStatus string `json:"errorStatus"`
}

func (h *Hub) bulk(b []byte) (*bulkResult, error) {
	v, err := parse(b)
	if err != nil {
		return nil, badJSON(err)
	}
	list, ok := v.([]any)
	if !ok || len(list) == 0 || len(list) > maxBulk {
		return nil, badArgument("want an array of 1 to %d devices", maxBulk)
	}
	seen := make(map[string]bool, len(list))
	items := make([]object, len(list))
	for i, v := range list {
		items[i], _ = v.(object)
		id, err := member[string](items[i], "id")
		if err == nil {
			err = checkDeviceID(id)
		}
		if err != nil || seen[id] {
			return nil, badArgument("device %d has no ID, or one that stands twice", i)
		}
		seen[id] = true
	}
	result := &bulkResult{IsSuccessful: true, Errors: []bulkError{}, Warnings: []bulkError{}}
	for _, o := range items {
		if err := h.one(o); err != nil {
			f := asFailure(err)
			if f.number == internalError {
				h.cfg.Log.Error("hub's registry", "deviceId", o["id"], "cause", err)
			}
			result.IsSuccessful = false
			result.Errors = append(result.Errors, bulkError{o["id"].(string), f.number, f.message})
		}
	}
	if !result.IsSuccessful {
		return nil, result
	}
	return result, nil
}

// one does one item of a bulk call.
func (h *Hub) one(o object) error {
	id := o["id"].(string)
	mode, err := member[string](o, "importMode")
	if err != nil {
		return badArgument("%v", err)
	}
	tag := func(names ...string) (string, error) {
		for _, name := range names {
			t, err := member[string](o, name)
			if err != nil || t != "" {
				return t, err
			}
		}
		return "", badArgument("the item has no etag")
	}
	p, err := parseTwinPatch(o)
	if err != nil {
		return badArgument("%s", oneLine(err))
	}
	ifMatch := "*"
	mode = strings.ToLower(mode)
	if strings.HasSuffix(mode, "ifmatchetag") {
		names := []string{"eTag", "etag"}
		if strings.HasPrefix(mode, "updatetwin") {
			names = []string{"twinETag", "twinEtag", "etag"}
		}
		if ifMatch, err = tag(names...); err != nil && mode != "createorupdateifmatchetag" {
			return err
		}
		mode = strings.TrimSuffix(mode, "ifmatchetag")
	}
	switch mode {
	case "delete":
		return h.remove(id, ifMatch)
	case "updatetwin":
		_, err := h.writeTwin(id, p, false, ifMatch)
		return err
	case "create", "":
		ifMatch = ""
	case "createorupdate":
		h.mu.Lock()
		if h.devices[id] == nil {
			ifMatch = ""
		}
		h.mu.Unlock()
	case "update":
	default:
		return badArgument("importMode %.40q is not known", mode)
	}
	if _, err := h.put(id, o, ifMatch); err != nil {
		return err
	}
	if p.tags == nil && p.desired == nil {
		return nil
	}
	_, err = h.writeTwin(id, p, false, "")
	return err
}
