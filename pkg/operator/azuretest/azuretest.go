// Package azuretest runs a registration service of its own for tests of clients: one that does on the wire what Azure's does, as far
// as service API, section 1, knows, and shares no code with touchmark's. Where Azure is awkward, so is this: ten to a bulk call,
// calls beyond a limit are throttled, certificates and keys are never shown again, a bulk update of what exists is refused as if
// it were a create, a query returns everything whatever it asks for, and a replaced enrollment without keys gets new ones.
//
// Start one, give its Connection to a client, and look at what it holds with Enrollments. Registrations are put there by the test,
// since no device can call.
package azuretest

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// Config says in what the service differs from one that takes all that comes.
type Config struct {
	// Limit is how many calls it takes in a Window before it throttles; 0 is no limit. RetryAfter is what it then asks for, in whole
	// seconds.
	Limit      int
	Window     time.Duration
	RetryAfter int
	// Lose reports whether the answer of a call gets lost once it was done.
	Lose func(*http.Request) bool
	// NoBulk has it refuse bulk calls, as services do that have none.
	NoBulk bool
}

// A Server is such a service.
type Server struct {
	// Connection is the connection string of a policy that may do everything. CA is the PEM that its certificate is checked against.
	Connection string
	CA         []byte
	cfg        Config
	host       string
	key        []byte
	mu         sync.Mutex
	records    map[string]map[string]*record // by kind and folded ID
	regs       map[string]*registration
	calls      map[string]int
	throttled  int
	window     time.Time
	inWindow   int
	management
}

type object = map[string]any

type record struct {
	doc  object            // as GET shows it
	keys map[string]string // by slot
	der  map[string][]byte // certificates, by slot
}

type registration struct {
	group string
	doc   object
}

const (
	individual = "enrollments"
	group      = "enrollmentGroups"
)

// Start runs a service until the test ends.
func Start(t testing.TB, cfg Config) *Server {
	t.Helper()
	s := &Server{cfg: cfg, key: make([]byte, 64), calls: make(map[string]int), regs: make(map[string]*registration),
		records: map[string]map[string]*record{individual: {}, group: {}}}
	_, _ = rand.Read(s.key)
	srv := httptest.NewTLSServer(s)
	t.Cleanup(srv.Close)
	u, err := url.Parse(srv.URL)
	if err != nil {
		t.Fatal(err)
	}
	s.host = u.Host
	s.Connection = "HostName=" + u.Host + ";SharedAccessKeyName=provisioningserviceowner;SharedAccessKey=" + base64.StdEncoding.EncodeToString(s.key)
	s.CA = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})
	return s
}

// Files writes the connection string and the CA into a directory, and returns the path of the former.
func (s *Server) Files(t testing.TB, dir string) string {
	t.Helper()
	path := filepath.Join(dir, "azure.connection")
	if err := errors.Join(os.MkdirAll(dir, 0o700), os.WriteFile(path, []byte(s.Connection+"\n"), 0o600), os.WriteFile(filepath.Join(dir, "ca.pem"), s.CA, 0o644)); err != nil {
		t.Fatal(err)
	}
	return path
}

// Calls returns how many calls of each kind were taken, by method and first segment, and how many were throttled.
func (s *Server) Calls() (calls map[string]int, throttled int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.calls), s.throttled
}

// Register puts a registration there as if a device had come in by a group, or by an enrollment with "".
func (s *Server) Register(groupID, id, status string, more map[string]any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	doc := object{"registrationId": id, "createdDateTimeUtc": stamp(), "status": status, "lastUpdatedDateTimeUtc": stamp(), "etag": newTag()}
	maps.Copy(doc, more)
	s.regs[strings.ToLower(id)] = &registration{strings.ToLower(groupID), doc}
}

// Keys returns the symmetric keys of an enrollment, as it holds them.
func (s *Server) Keys(groupID, id string) (primary, secondary string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.records[individual][strings.ToLower(id)]
	if groupID != "" {
		r = s.records[group][strings.ToLower(groupID)]
	}
	if r == nil {
		return "", ""
	}
	return r.keys["primary"], r.keys["secondary"]
}

// Certificates returns the certificates of a group, as it holds them.
func (s *Server) Certificates(groupID string) (primary, secondary []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.records[group][strings.ToLower(groupID)]
	if r == nil {
		return nil, nil
	}
	return r.der["primary"], r.der["secondary"]
}

// Len returns how many enrollments of both kinds it holds.
func (s *Server) Len() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.records[individual]) + len(s.records[group])
}

// fault is a refusal (section 1.11).
type fault struct {
	code    int
	message string
}

func (f *fault) Error() string { return f.message }

func refuse(code int, format string, args ...any) *fault {
	return &fault{code, fmt.Sprintf(format, args...)}
}

// ServeHTTP answers one call.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 4<<20))
	if err != nil {
		return
	}
	s.mu.Lock()
	status, answer := s.answer(w.Header(), r, body)
	s.mu.Unlock()
	if s.cfg.Lose != nil && s.cfg.Lose(r) {
		panic(http.ErrAbortHandler)
	}
	h := w.Header()
	h.Set("Strict-Transport-Security", "max-age=31536000; includeSubDomains")
	h.Set("X-Ms-Request-Id", uuid())
	if answer == nil {
		w.WriteHeader(status)
		return
	}
	h.Set("Content-Type", "application/json; charset=utf-8")
	w.WriteHeader(status)
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	_ = enc.Encode(answer)
}

func (s *Server) answer(h http.Header, r *http.Request, body []byte) (int, any) {
	v, err := s.route(h, r, body)
	var f *fault
	if errors.As(err, &f) {
		return f.code / 1000, object{"errorCode": f.code, "trackingId": uuid(), "message": f.message, "timestampUtc": stamp()}
	}
	if v == nil {
		return http.StatusNoContent, nil
	}
	return http.StatusOK, v
}

func (s *Server) route(h http.Header, r *http.Request, body []byte) (any, error) {
	if s.cfg.Limit > 0 {
		if now := time.Now(); now.Sub(s.window) > s.cfg.Window {
			s.window, s.inWindow = now, 0
		}
		if s.inWindow++; s.inWindow > s.cfg.Limit {
			s.throttled++
			h.Set("Retry-After", strconv.Itoa(s.cfg.RetryAfter))
			return nil, refuse(429001, "Operations are being throttled for this tenant.")
		}
	}
	version := r.URL.Query().Get("api-version")
	if strings.HasPrefix(strings.ToLower(r.URL.Path), "/subscriptions/") {
		return s.arm(h, r, body)
	}
	if !regexp.MustCompile(`^20\d\d-\d\d-\d\d(-preview)?$`).MatchString(version) {
		return nil, refuse(400004, "api-version is missing or invalid")
	}
	if !s.authorized(r.Header.Get("Authorization")) {
		return nil, refuse(401002, "Unauthorized")
	}
	seg := strings.Split(strings.Trim(r.URL.Path, "/"), "/")
	s.calls[r.Method+" "+strings.ToLower(seg[0])+map[bool]string{true: "/" + strings.ToLower(seg[len(seg)-1])}[r.Method == http.MethodPost && len(seg) > 1]]++
	switch strings.ToLower(seg[0]) {
	case "enrollments":
		return s.enrollments(h, r, body, individual, seg[1:])
	case "enrollmentgroups":
		return s.enrollments(h, r, body, group, seg[1:])
	case "registrations":
		return s.registrations(h, r, seg[1:])
	}
	return nil, refuse(404000, "Not found")
}

// authorized checks a token (section 2.2).
func (s *Server) authorized(header string) bool {
	text, ok := strings.CutPrefix(header, "SharedAccessSignature ")
	raw := make(map[string]string)
	for f := range strings.SplitSeq(text, "&") {
		k, v, _ := strings.Cut(f, "=")
		raw[k] = v
	}
	sig, err := url.QueryUnescape(raw["sig"])
	given, err2 := base64.StdEncoding.DecodeString(sig)
	expiry, err3 := strconv.ParseInt(raw["se"], 10, 64)
	resource, err4 := url.QueryUnescape(raw["sr"])
	if !ok || errors.Join(err, err2, err3, err4) != nil || raw["skn"] != "provisioningserviceowner" || time.Now().Unix() > expiry+300 {
		return false
	}
	host, _, _ := strings.Cut(s.host, ":")
	if !strings.EqualFold(resource, host) {
		return false
	}
	mac := hmac.New(sha256.New, s.key)
	mac.Write([]byte(raw["sr"] + "\n" + raw["se"]))
	return hmac.Equal(given, mac.Sum(nil))
}

func idMember(kind string) string {
	if kind == group {
		return "enrollmentGroupId"
	}
	return "registrationId"
}

func (s *Server) missing(kind string) *fault {
	if kind == group {
		return refuse(404202, "EnrollmentGroup not found.")
	}
	return refuse(404201, "Enrollment not found.")
}

func (s *Server) enrollments(h http.Header, r *http.Request, body []byte, kind string, seg []string) (any, error) {
	switch {
	case len(seg) == 0 && r.Method == http.MethodPost:
		return s.bulk(kind, body)
	case len(seg) == 1 && seg[0] == "query" && r.Method == http.MethodPost:
		if err := s.query(body); err != nil {
			return nil, err
		}
		item := map[string]string{individual: "Enrollment", group: "EnrollmentGroup"}[kind]
		return page(h, r, item, slices.Sorted(maps.Keys(s.records[kind])), func(id string) any { return s.records[kind][id].doc })
	case len(seg) == 2 && strings.EqualFold(seg[1], "attestationmechanism") && r.Method == http.MethodPost:
		rec := s.records[kind][strings.ToLower(seg[0])]
		if rec == nil {
			return nil, s.missing(kind)
		}
		a := maps.Clone(rec.doc["attestation"].(object))
		if rec.keys != nil {
			a["symmetricKey"] = object{"primaryKey": rec.keys["primary"], "secondaryKey": rec.keys["secondary"]}
		}
		return a, nil
	case len(seg) != 1:
		return nil, refuse(405000, "Method not allowed")
	}
	id := strings.ToLower(seg[0])
	rec := s.records[kind][id]
	switch r.Method {
	case http.MethodGet:
		if rec == nil {
			return nil, s.missing(kind)
		}
		if kind == group {
			return rec.doc, nil
		}
		doc := maps.Clone(rec.doc)
		doc["registrationState"] = object{"registrationId": doc["registrationId"], "status": "unassigned"}
		if reg := s.regs[id]; reg != nil {
			doc["registrationState"] = reg.doc
		}
		return doc, nil
	case http.MethodPut:
		in, err := decode(body)
		if err != nil {
			return nil, err
		}
		return s.put(kind, seg[0], in, r.Header.Get("If-Match"))
	case http.MethodDelete:
		return nil, s.remove(kind, id, r.Header.Get("If-Match"))
	}
	return nil, refuse(405000, "Method not allowed")
}

func (s *Server) remove(kind, id, tag string) error {
	rec := s.records[kind][id]
	if rec == nil {
		return s.missing(kind)
	}
	if tag != "" && !tagged(rec, tag) {
		return refuse(412001, "Precondition failed.")
	}
	delete(s.records[kind], id)
	if kind == individual {
		delete(s.regs, id)
	}
	return nil
}

func tagged(rec *record, tag string) bool {
	return tag == "*" || strings.Trim(tag, `"`) == strings.Trim(rec.doc["etag"].(string), `"`)
}

func decode(body []byte) (object, error) {
	var in object
	dec := json.NewDecoder(strings.NewReader(string(body)))
	dec.UseNumber()
	if err := dec.Decode(&in); err != nil || in == nil {
		return nil, refuse(400004, "The body is not valid JSON.")
	}
	return in, nil
}

var idPattern = regexp.MustCompile(`^[A-Za-z0-9._:-]{0,127}[A-Za-z0-9-]$`)

// put creates or replaces (section 1.6), and answers with what only this answer shows.
func (s *Server) put(kind, pathID string, in object, tag string) (any, error) {
	id, _ := in[idMember(kind)].(string)
	if !idPattern.MatchString(id) || !strings.EqualFold(id, pathID) {
		return nil, refuse(400004, "Invalid ID.")
	}
	old := s.records[kind][strings.ToLower(id)]
	switch {
	case old != nil && tag == "":
		if kind == group {
			return nil, refuse(409202, "EnrollmentGroup already exists.")
		}
		return nil, refuse(409201, "Enrollment already exists.")
	case old == nil && tag != "":
		return nil, s.missing(kind)
	case old != nil && !tagged(old, tag):
		return nil, refuse(412001, "Precondition failed.")
	}
	rec := &record{doc: make(object)}
	for k, v := range in {
		switch k {
		case "registrationState", "createdDateTimeUtc", "lastUpdatedDateTimeUtc", "etag", "attestation":
		case "parent": // none of Azure's, and ignored (section 1.2)
		case "provisioningStatus":
			rec.doc[k] = v // null too
		case "initialTwin", "optionalDeviceInformation":
			if v != nil {
				rec.doc[k] = v
			}
		default:
			if v = noNulls(v); v != nil {
				rec.doc[k] = v
			}
		}
	}
	if err := check(kind, rec.doc); err != nil {
		return nil, err
	}
	a, err := rec.attest(kind, in["attestation"], old)
	if err != nil {
		return nil, err
	}
	rec.doc["attestation"] = a
	if _, ok := rec.doc["provisioningStatus"]; !ok {
		rec.doc["provisioningStatus"] = "enabled"
	}
	now := stamp()
	rec.doc["createdDateTimeUtc"], rec.doc["lastUpdatedDateTimeUtc"], rec.doc["etag"] = now, now, newTag()
	if old != nil {
		rec.doc["createdDateTimeUtc"] = old.doc["createdDateTimeUtc"]
	}
	s.records[kind][strings.ToLower(id)] = rec
	shown := maps.Clone(rec.doc)
	if rec.keys != nil {
		a := maps.Clone(a)
		a["symmetricKey"] = object{"primaryKey": rec.keys["primary"], "secondaryKey": rec.keys["secondary"]}
		shown["attestation"] = a
	}
	return shown, nil
}

// noNulls drops null members at any depth.
func noNulls(v any) any {
	o, ok := v.(object)
	if !ok {
		return v
	}
	out := make(object)
	for k, v := range o {
		if v = noNulls(v); v != nil {
			out[k] = v
		}
	}
	return out
}

func canonical(doc object, member string, values ...string) error {
	v, ok := doc[member]
	if !ok || v == nil {
		return nil
	}
	text, _ := v.(string)
	for _, c := range values {
		if strings.EqualFold(text, c) {
			doc[member] = c
			return nil
		}
	}
	return refuse(400004, "Invalid value of %s.", member)
}

// check holds members against each other (section 1.6).
func check(kind string, doc object) error {
	if err := canonical(doc, "provisioningStatus", "enabled", "disabled"); err != nil {
		return err
	}
	if err := canonical(doc, "allocationPolicy", "hashed", "geoLatency", "static", "custom"); err != nil {
		return err
	}
	hubs, _ := doc["iotHubs"].([]any)
	policy, _ := doc["allocationPolicy"].(string)
	switch {
	case policy == "custom" && doc["customAllocationDefinition"] == nil:
		return refuse(400004, "A CustomAllocationDefinition is required when the allocation policy is set to 'Custom'")
	case len(hubs) > 0 && policy == "":
		return refuse(400004, "Enrollment allocationPolicy must be specified when iotHubs are specified.")
	case policy == "static" && len(hubs) > 1:
		return refuse(400004, "Static allocation takes one hub.")
	}
	if len(hubs) == 0 {
		delete(doc, "iotHubs")
	}
	return nil
}

// bulk takes one to ten enrollments (section 1.9).
func (s *Server) bulk(kind string, body []byte) (any, error) {
	in, err := decode(body)
	if err != nil {
		return nil, err
	}
	if s.cfg.NoBulk {
		return nil, refuse(404000, "Not found")
	}
	items, _ := in[kind].([]any)
	mode, _ := in["mode"].(string)
	mode = strings.ToLower(mode)
	if len(items) < 1 || len(items) > 10 || !slices.Contains([]string{"create", "update", "updateifmatchetag", "delete"}, mode) {
		return nil, refuse(400004, "A bulk operation takes 1 to 10 items and a mode.")
	}
	failed := []any{}
	for _, item := range items {
		o, _ := item.(object)
		id, _ := o[idMember(kind)].(string)
		tag, _ := o["etag"].(string)
		var err error
		switch mode {
		case "delete":
			err = s.remove(kind, strings.ToLower(id), tag)
		case "create":
			_, err = s.put(kind, id, o, "")
		case "update": // without a tag it is refused as if it were a create
			_, err = s.put(kind, id, o, tag)
		default:
			if tag == "" {
				err = refuse(412001, "Precondition failed.")
			} else {
				_, err = s.put(kind, id, o, tag)
			}
		}
		var f *fault
		if errors.As(err, &f) {
			failed = append(failed, object{idMember(kind): id, "errorCode": f.code, "errorStatus": f.message})
		}
	}
	return object{"errors": failed, "isSuccessful": len(failed) == 0}, nil
}

// query takes any text, and does nothing with it (section 1.8).
func (s *Server) query(body []byte) error {
	var in struct{ Query *string }
	if json.Unmarshal(body, &in) != nil || in.Query == nil {
		return refuse(400004, "The body is not a query specification.")
	}
	return nil
}

// page answers with a part of a list, from behind the ID that the continuation names (section 1.4).
func page(h http.Header, r *http.Request, item string, ids []string, show func(string) any) (any, error) {
	size := 100
	if text := r.Header.Get("X-Ms-Max-Item-Count"); text != "" {
		n, err := strconv.Atoi(text)
		if err != nil || n < 1 {
			return nil, refuse(400004, "x-ms-max-item-count is invalid.")
		}
		size = min(n, 1000)
	}
	if token := r.Header.Get("X-Ms-Continuation"); token != "" {
		var after []string
		b, err := base64.StdEncoding.DecodeString(token)
		if err != nil || json.Unmarshal(b, &after) != nil || len(after) != 2 {
			return nil, refuse(400004, "x-ms-continuation is invalid.")
		}
		at, found := slices.BinarySearch(ids, after[1])
		if found {
			at++
		}
		ids = ids[at:]
	}
	h.Set("X-Ms-Item-Type", item)
	h.Set("X-Content-Type-Options", "nosniff")
	if len(ids) > size {
		ids = ids[:size]
		b, _ := json.Marshal([]string{uuid(), ids[size-1]})
		h.Set("X-Ms-Continuation", base64.StdEncoding.EncodeToString(b))
	}
	rows := []any{}
	for _, id := range ids {
		rows = append(rows, show(id))
	}
	return rows, nil
}

func (s *Server) registrations(h http.Header, r *http.Request, seg []string) (any, error) {
	switch {
	case len(seg) == 2 && seg[1] == "query" && r.Method == http.MethodPost:
		g := strings.ToLower(seg[0])
		if s.records[group][g] == nil {
			return nil, s.missing(group)
		}
		var ids []string
		for id, reg := range s.regs {
			if reg.group == g {
				ids = append(ids, id)
			}
		}
		slices.Sort(ids)
		return page(h, r, "DeviceRegistration", ids, func(id string) any { return s.regs[id].doc })
	case len(seg) != 1:
		return nil, refuse(404000, "Not found")
	}
	id := strings.ToLower(seg[0])
	reg := s.regs[id]
	if reg == nil {
		return nil, refuse(404202, "Registration not found.")
	}
	switch r.Method {
	case http.MethodGet:
		return reg.doc, nil
	case http.MethodDelete:
		if tag := r.Header.Get("If-Match"); tag != "" && !tagged(&record{doc: reg.doc}, tag) {
			return nil, refuse(412001, "Precondition failed.")
		}
		delete(s.regs, id)
		return nil, nil
	}
	return nil, refuse(405000, "Method not allowed")
}

// stamp is a time of the wire: trailing zeros of its fraction are trimmed (section 1.5).
func stamp() string { return time.Now().UTC().Format("2006-01-02T15:04:05.9999999Z") }

func newTag() string { return base64.StdEncoding.EncodeToString([]byte(`"` + uuid() + `"`)) }

func uuid() string {
	b := make([]byte, 16)
	_, _ = rand.Read(b)
	t := hex.EncodeToString(b)
	return t[:8] + "-" + t[8:12] + "-" + t[12:16] + "-" + t[16:20] + "-" + t[20:]
}
