package hubtest

import (
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/registration"
)

// A Fault is what a server does instead of answering as it should. The zero Fault is none.
type Fault struct {
	// After has it do what was asked before it fails.
	After bool
	// Status and Header are answered, with Body.
	Status int
	Header http.Header
	Body   string
	// Hang answers nothing until the caller goes away. Drip answers an octet at a time, for ever. Cut closes the connection in
	// the middle of the body.
	Hang, Drip, Cut bool
	// Lie answers of another device.
	Lie bool
	// Wait, if not nil, is closed before the server goes on.
	Wait <-chan struct{}
}

// A server is what stubs have in common: TLS, and faults.
type server struct {
	*httptest.Server
	mu    sync.Mutex
	fault func(r *http.Request) Fault // under mu
	calls []string                    // under mu: method and path
}

// Fail has the server ask f, before each answer, what to do; nil ends that.
func (s *server) Fail(f func(r *http.Request) Fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fault = f
}

// Calls returns method and path of each call since it was last asked.
func (s *server) Calls() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	calls := s.calls
	s.calls = nil
	return calls
}

// start serves what handle does.
func (s *server) start(t testing.TB, handle http.HandlerFunc) {
	s.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		var f Fault
		s.calls = append(s.calls, r.Method+" "+r.URL.EscapedPath())
		if s.fault != nil {
			f = s.fault(r)
		}
		s.mu.Unlock()
		if f.Wait != nil {
			<-f.Wait
		}
		answer := httptest.NewRecorder()
		if f.After || f.Status == 0 && !f.Hang && !f.Drip {
			handle(answer, r)
		} else {
			io.Copy(io.Discard, r.Body) // else the server does not notice that the caller goes away
		}
		maps.Copy(w.Header(), f.Header)
		switch {
		case f.Hang:
			<-r.Context().Done()
			panic(http.ErrAbortHandler) // a caller that is going away may still read what is written now
		case f.Drip:
			w.WriteHeader(http.StatusOK)
			tick := time.NewTicker(5 * time.Millisecond)
			defer tick.Stop()
			for r.Context().Err() == nil {
				io.WriteString(w, " ")
				w.(http.Flusher).Flush()
				<-tick.C
			}
			panic(http.ErrAbortHandler)
		case f.Cut:
			w.Header().Set("Content-Length", strconv.Itoa(answer.Body.Len()+20))
			w.WriteHeader(http.StatusOK)
			w.Write(answer.Body.Bytes())
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		case f.Lie:
			w.WriteHeader(answer.Code)
			io.WriteString(w, strings.ReplaceAll(answer.Body.String(), `"deviceId":"`, `"deviceId":"x`))
		case f.Status != 0:
			w.WriteHeader(f.Status)
			io.WriteString(w, f.Body)
		default:
			maps.Copy(w.Header(), answer.Header())
			w.WriteHeader(answer.Code)
			w.Write(answer.Body.Bytes())
		}
	}))
	s.Config.ErrorLog = log.New(io.Discard, "", 0) // clients that hang up on us are what this is about
	s.StartTLS()
	t.Cleanup(s.Server.Close)
}

// CA is what connection strings have as CA=.
func (s *server) CA() string {
	return base64.StdEncoding.EncodeToString(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}))
}

// A Stub is a server that behaves as Azure IoT Hub's registry and twin REST (service API, section 5).
type Stub struct {
	server
	key     []byte
	devices map[string]map[string]any // under mu, as is what is in it
	twins   map[string]map[string]any // under mu
	tokens  map[string]bool           // under mu
	serial  int                       // under mu
	// Check, if not nil, judges a token's time as well.
	Check func(attest.Token) error
}

// StartStub starts one, without devices.
func StartStub(t testing.TB) *Stub {
	s := &Stub{key: []byte("0123456789abcdef0123456789abcdef"), devices: map[string]map[string]any{}, twins: map[string]map[string]any{}, tokens: map[string]bool{}}
	s.start(t, s.serve)
	return s
}

// Linked is the stub as a linked hub.
func (s *Stub) Linked(name string) registration.LinkedHub {
	u, _ := url.Parse(s.URL)
	return registration.LinkedHub{Name: name, Kind: registration.HubAzure, ConnectionString: fmt.Sprintf("HostName=%s;Port=%s;SharedAccessKeyName=dps;SharedAccessKey=%s;CA=%s",
		u.Hostname(), u.Port(), base64.StdEncoding.EncodeToString(s.key), s.CA())}
}

// Devices returns the IDs of those that it has.
func (s *Stub) Devices() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Sorted(maps.Keys(s.devices))
}

// Identity returns a device's identity, or nil.
func (s *Stub) Identity(id string) map[string]any {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.devices[id])
}

// Change has an operator change an identity behind our back.
func (s *Stub) Change(id string, change func(identity map[string]any)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.change(id, change)
}

// ChangeInside is Change for a fault's function, which runs before the call is answered.
func (s *Stub) ChangeInside(id string, change func(identity map[string]any)) { s.change(id, change) }

func (s *Stub) change(id string, change func(map[string]any)) {
	if d := s.devices[id]; d != nil {
		change(d)
		s.serial++
		d["etag"] = fmt.Sprint("etag", s.serial)
	}
}

// Drop has an operator delete a device; it is called inside of a fault's function.
func (s *Stub) Drop(id string) {
	delete(s.devices, id)
	delete(s.twins, id)
}

// Tokens returns how many different tokens it was shown.
func (s *Stub) Tokens() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.tokens)
}

// fail answers with an error: one of the shapes that Azure's have, in turn.
func (s *Stub) fail(w http.ResponseWriter, status, number int, name string) {
	s.serial++
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	var body any
	switch s.serial % 3 {
	case 0:
		w.Header().Set("iothub-errorcode", name)
		body = map[string]string{"Message": "ErrorCode:" + name + ";it is so", "ExceptionMessage": "Tracking ID:0123-G:1"}
	case 1:
		inner, _ := json.Marshal(map[string]any{"errorCode": number, "trackingId": "0123", "message": "it is so", "timestampUtc": "2026-01-01T00:00:00Z"})
		body = map[string]string{"Message": string(inner), "ExceptionMessage": ""}
	default:
		w.Header().Set("iothub-errorcode", name)
		body = map[string]any{"errorCode": number, "message": "it is so"}
	}
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(body)
}

func (s *Stub) serve(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	token, err := attest.ParseToken(r.Header.Get("Authorization"))
	if err == nil && s.Check != nil {
		err = s.Check(token)
	}
	if host, _, _ := strings.Cut(r.Host, ":"); err != nil || !token.SignedBy(s.key) || token.Resource != host || token.Policy != "dps" {
		s.fail(w, 401, 401002, "IotHubUnauthorizedAccess")
		return
	}
	s.tokens[r.Header.Get("Authorization")] = true
	if r.URL.Query().Get("api-version") != "2021-04-12" {
		s.fail(w, 400, 400004, "ArgumentInvalid")
		return
	}
	collection, encoded, _ := strings.Cut(strings.TrimPrefix(r.URL.EscapedPath(), "/"), "/")
	id, err := url.PathUnescape(encoded)
	if err != nil || strings.Contains(encoded, "/") {
		http.NotFound(w, r)
		return
	}
	have := s.devices[id]
	ifMatch := r.Header.Get("If-Match")
	in := map[string]any{}
	if r.Method == http.MethodPut || r.Method == http.MethodPatch {
		d := json.NewDecoder(r.Body)
		d.UseNumber()
		if d.Decode(&in) != nil {
			s.fail(w, 400, 400004, "ArgumentInvalid")
			return
		}
	}
	out := func(v any) {
		w.Header().Set("Content-Type", "application/json; charset=utf-8")
		json.NewEncoder(w).Encode(v)
	}
	switch {
	case collection == "statistics" && id == "devices" && r.Method == http.MethodGet:
		out(map[string]int{"totalDeviceCount": len(s.devices), "enabledDeviceCount": len(s.devices), "disabledDeviceCount": 0})
	case collection == "devices" && r.Method == http.MethodPut:
		switch {
		case in["deviceId"] != id:
			s.fail(w, 400, 400004, "ArgumentInvalid")
			return
		case ifMatch == "" && have != nil:
			s.fail(w, 409, 409001, "DeviceAlreadyExists")
			return
		case ifMatch != "" && have == nil:
			s.fail(w, 404, 404001, "DeviceNotFound")
			return
		case ifMatch != "" && ifMatch != "*" && ifMatch != fmt.Sprintf("%q", have["etag"]):
			s.fail(w, 412, 412001, "PreconditionFailed")
			return
		}
		s.serial++
		in["etag"], in["generationId"] = fmt.Sprint("etag", s.serial), fmt.Sprint(s.serial)
		if have != nil {
			in["generationId"] = have["generationId"]
		} else {
			s.twins[id] = map[string]any{"tags": map[string]any{}, "properties": map[string]any{"desired": map[string]any{}}}
		}
		edge := in["capabilities"].(map[string]any)["iotEdge"] == true
		if scope, _ := in["deviceScope"].(string); edge {
			if was, _ := have["deviceScope"].(string); scope != "" && (scope != was || !strings.HasPrefix(scope, "ms-azure-iot-edge://"+id+"-")) {
				s.fail(w, 400, 400004, "ArgumentInvalid") // the scope of an edge device is hub-made
				return
			}
			in["deviceScope"] = fmt.Sprintf("ms-azure-iot-edge://%s-%s", id, in["generationId"])
		} else if scope != "" {
			in["parentScopes"] = []any{scope}
		}
		s.devices[id] = in
		out(in)
	case have == nil && (collection == "devices" || collection == "twins"):
		s.fail(w, 404, 404001, "DeviceNotFound")
	case collection == "devices" && r.Method == http.MethodGet:
		out(have)
	case collection == "devices" && r.Method == http.MethodDelete && ifMatch == "*":
		s.Drop(id)
		w.WriteHeader(http.StatusNoContent)
	case collection == "twins" && r.Method == http.MethodPatch && ifMatch == "*":
		merge(s.twins[id], in)
		fallthrough
	case collection == "twins" && r.Method == http.MethodGet:
		tw := s.twins[id]
		desired := maps.Clone(tw["properties"].(map[string]any)["desired"].(map[string]any))
		desired["$version"], desired["$metadata"] = 3, map[string]any{"$lastUpdated": "2026-01-01T00:00:00Z"}
		out(map[string]any{"deviceId": id, "etag": "AAA=", "version": 3, "status": "enabled", "tags": tw["tags"],
			"properties": map[string]any{"desired": desired, "reported": map[string]any{"$version": 1}}})
	default:
		http.NotFound(w, r)
	}
}

func merge(into, patch map[string]any) {
	for k, v := range patch {
		switch old, ok := into[k].(map[string]any); {
		case v == nil:
			delete(into, k)
		case strings.HasPrefix(k, "$"):
		default:
			p, is := v.(map[string]any)
			if is && !ok {
				old, ok = map[string]any{}, true
			}
			if is && ok {
				merge(old, p)
				v = old
			}
			into[k] = v
		}
	}
}
