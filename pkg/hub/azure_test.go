package hub_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/hub"
	"github.com/touchmark/touchmark/pkg/hub/hubtest"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

type method struct {
	name string
	call func(ctx context.Context, h registration.Hub, keys *dps.SymmetricKeyAttestation) error
}

// The methods of a hub. Admit is of a device that is there, and has another key then; create of one that is not.
var methods = []method{
	{"check", func(ctx context.Context, h registration.Hub, _ *dps.SymmetricKeyAttestation) error {
		return h.Check(ctx)
	}},
	{"device", func(ctx context.Context, h registration.Hub, _ *dps.SymmetricKeyAttestation) error {
		_, err := h.Device(ctx, "there")
		return err
	}},
	{"create", func(ctx context.Context, h registration.Hub, keys *dps.SymmetricKeyAttestation) error {
		_, err := h.Admit(ctx, &registration.HubDevice{ID: "new", Keys: keys})
		return err
	}},
	{"admit", func(ctx context.Context, h registration.Hub, keys *dps.SymmetricKeyAttestation) error {
		_, err := h.Admit(ctx, &registration.HubDevice{ID: "there", Keys: keys})
		return err
	}},
	{"remove", func(ctx context.Context, h registration.Hub, _ *dps.SymmetricKeyAttestation) error {
		return h.Remove(ctx, "there")
	}},
	{"twin", func(ctx context.Context, h registration.Hub, _ *dps.SymmetricKeyAttestation) error {
		_, err := h.Twin(ctx, "there")
		return err
	}},
	{"mergeTwin", func(ctx context.Context, h registration.Hub, _ *dps.SymmetricKeyAttestation) error {
		return h.MergeTwin(ctx, "there", &registration.HubTwin{Tags: json.RawMessage(`{"site":"A7"}`)})
	}},
}

func always(f hubtest.Fault) func(*http.Request) hubtest.Fault {
	return func(*http.Request) hubtest.Fault { return f }
}

// Each way to fail, at each method: the class of error that there must be.
func TestAzureFaults(t *testing.T) {
	registrationtest.Goroutines(t)
	elsewhere := hubtest.StartStub(t)
	coded := func(status, number int, name string) hubtest.Fault {
		return hubtest.Fault{Status: status, Header: http.Header{"Iothub-Errorcode": {name}}, Body: fmt.Sprintf(`{"Message":"ErrorCode:%s;Tracking","ExceptionMessage":"x%d"}`, name, number)}
	}
	for _, c := range []struct {
		name      string
		fault     hubtest.Fault
		status    int
		code      string
		temporary bool
		fine      []string // methods that must not fail
	}{
		{"hangs", hubtest.Fault{Hang: true}, 0, "Timeout", true, nil},
		{"hangs after it was done", hubtest.Fault{Hang: true, After: true}, 0, "Timeout", true, nil},
		{"drips", hubtest.Fault{Drip: true}, 0, "Timeout", true, nil},
		{"throttles", hubtest.Fault{Status: 429, Header: http.Header{"Retry-After": {"7"}, "Iothub-Errorcode": {"ThrottlingBacklogTimeout"}}}, 429, "ThrottlingBacklogTimeout", true, nil},
		{"500", coded(500, 500001, "ServerError"), 500, "ServerError", true, nil},
		{"500 after it was done", hubtest.Fault{Status: 500, After: true}, 500, "", true, nil},
		{"503", hubtest.Fault{Status: 503, Body: `{"errorCode":503001,"message":"later"}`}, 503, "ServiceUnavailable", true, nil},
		{"408", hubtest.Fault{Status: 408}, 408, "", true, nil},
		{"401", coded(401, 401002, "IotHubUnauthorizedAccess"), 401, "IotHubUnauthorizedAccess", false, nil},
		{"403, quota", coded(403, 403002, "IotHubQuotaExceeded"), 403, "IotHubQuotaExceeded", false, nil},
		{"413, full", hubtest.Fault{Status: 413, Body: `{"Message":"{\"errorCode\":413002,\"message\":\"full\"}"}`}, 413, "TooManyDevices", false, nil},
		{"400", hubtest.Fault{Status: 400, Body: `{"Message":"ErrorCode:ArgumentInvalid;no"}`}, 400, "ArgumentInvalid", false, nil},
		{"404 of a proxy", hubtest.Fault{Status: 404, Body: "<html>not found</html>"}, 404, "", false, nil},
		{"404 with contradicting codes", hubtest.Fault{Status: 404, Header: http.Header{"Iothub-Errorcode": {"DeviceNotFound"}}, Body: `{"Message":"ErrorCode:ModuleNotFound;x"}`}, 404, "", false, nil},
		{"redirects", hubtest.Fault{Status: 307, Header: http.Header{"Location": {elsewhere.URL}}}, 307, "", false, nil},
		{"cuts the connection", hubtest.Fault{Cut: true}, 0, "Unreachable", true, nil},
		{"says what is no JSON", hubtest.Fault{Status: 200, Body: "<html>welcome</html>"}, 200, "InvalidAnswer", false, []string{"remove", "mergeTwin"}},
		{"says nothing", hubtest.Fault{Status: 200}, 200, "InvalidAnswer", false, []string{"remove", "mergeTwin"}},
		{"says less", hubtest.Fault{Status: 200, Body: `{}`}, 200, "InvalidAnswer", false, []string{"remove", "mergeTwin"}},
		{"says more", hubtest.Fault{Status: 200, Body: `{"deviceId":"there","totalDeviceCount":0}{}`}, 200, "InvalidAnswer", false, []string{"remove", "mergeTwin"}},
		{"says 10 MB", hubtest.Fault{Status: 200, Body: `{"deviceId":"there","tags":"` + strings.Repeat("a", 10<<20) + `"}`}, 200, "InvalidAnswer", false, nil},
		{"says 10 MB of error", hubtest.Fault{Status: 500, Body: strings.Repeat("a", 10<<20)}, 500, "", true, nil},
		{"lies", hubtest.Fault{Lie: true}, 200, "InvalidAnswer", false, []string{"check", "remove", "mergeTwin"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := hubtest.StartStub(t)
			cfg := hub.Config{Hub: s.Linked("hub-a"), Timeout: 10 * time.Second}
			if c.code == "Timeout" {
				cfg.Timeout = 200 * time.Millisecond
			}
			h := open(t, cfg)
			for _, m := range methods {
				keys := hubtest.Keys()
				s.Fail(nil)
				patient := open(t, hub.Config{Hub: s.Linked("hub-a")})
				admit(t, patient, &registration.HubDevice{ID: "there", Keys: keys})
				s.Fail(always(c.fault))
				err := m.call(t.Context(), h, hubtest.Keys())
				e, ok := errors.AsType[*registration.HubError](err)
				switch {
				case slices.Contains(c.fine, m.name):
					if err != nil {
						t.Errorf("%s: %v", m.name, err)
					}
				case !ok:
					t.Errorf("%s: %v", m.name, err)
				case e.Status != c.status || e.Code != c.code || e.Temporary != c.temporary || e.Hub != "hub-a" || errors.Is(err, registration.ErrNotFound):
					t.Errorf("%s: %+v", m.name, e)
				case c.code == "Timeout" && !strings.HasSuffix(err.Error(), ": no answer in time"):
					t.Errorf("%s: %v", m.name, err)
				case c.fault.Status == 429 && e.RetryAfter != 7*time.Second:
					t.Errorf("%s: retry after %v", m.name, e.RetryAfter)
				}
			}
		})
	}
	if calls := elsewhere.Calls(); len(calls) > 0 {
		t.Errorf("a redirect was followed: %v", calls)
	}
}

// An answer that was lost, and the same call again: what is there then is what was asked for, once.
func TestAzureLostAnswer(t *testing.T) {
	registrationtest.Goroutines(t)
	for name, f := range map[string]hubtest.Fault{"500": {Status: 500, After: true}, "cut": {Cut: true, After: true}, "hang": {Hang: true, After: true}, "not done": {Status: 503}} {
		for _, m := range methods[2:] {
			for nth := range 3 { // the call of the method that fails
				t.Run(fmt.Sprintf("%s/%s/%d", name, m.name, nth+1), func(t *testing.T) {
					s := hubtest.StartStub(t)
					patient := open(t, hub.Config{Hub: s.Linked("hub-a")})
					admit(t, patient, &registration.HubDevice{ID: "there", Keys: hubtest.Keys()})
					cfg := hub.Config{Hub: s.Linked("hub-a")}
					if f.Hang {
						cfg.Timeout = 200 * time.Millisecond
					}
					n := 0
					s.Fail(func(*http.Request) hubtest.Fault {
						if n++; n == nth+1 {
							return f
						}
						return hubtest.Fault{}
					})
					keys := hubtest.Keys()
					if err := m.call(t.Context(), open(t, cfg), keys); err != nil {
						temporary(t, err)
					}
					s.Fail(nil)
					if err := m.call(t.Context(), patient, keys); err != nil {
						t.Fatal(err)
					}
					want := map[string][]string{"create": {"new", "there"}, "remove": nil}
					ids, ok := want[m.name]
					if !ok {
						ids = []string{"there"}
					}
					if got := s.Devices(); !slices.Equal(got, ids) {
						t.Errorf("devices %v, want %v", got, ids)
					}
					if id := map[string]string{"create": "new", "admit": "there"}[m.name]; id != "" {
						if got := fmt.Sprint(s.Identity(id)["authentication"]); !strings.Contains(got, keys.PrimaryKey) || !strings.Contains(got, keys.SecondaryKey) {
							t.Errorf("%s has other keys", id)
						}
					}
					if m.name == "mergeTwin" {
						if tw, err := patient.Twin(t.Context(), "there"); err != nil || string(tw.Tags) != `{"site":"A7"}` {
							t.Errorf("%s, %v", tw.Tags, err)
						}
					}
				})
			}
		}
	}
}

// Others who change the device at the same time.
func TestAzureRaces(t *testing.T) {
	start := func(t *testing.T) (*hubtest.Stub, registration.Hub) {
		s := hubtest.StartStub(t)
		h := open(t, hub.Config{Hub: s.Linked("hub-a")})
		admit(t, h, &registration.HubDevice{ID: "d", Keys: hubtest.Keys()})
		s.Change("d", func(i map[string]any) { i["status"], i["statusReason"] = "disabled", "stolen" })
		return s, h
	}
	updates := func(r *http.Request) bool { return r.Method == http.MethodPut && r.Header.Get("If-Match") != "" }
	t.Run("changed once in between", func(t *testing.T) {
		s, h := start(t)
		once := true
		s.Fail(func(r *http.Request) hubtest.Fault {
			if updates(r) && once {
				once = false
				s.ChangeInside("d", func(i map[string]any) { i["statusReason"] = "found again" })
			}
			return hubtest.Fault{}
		})
		admit(t, h, &registration.HubDevice{ID: "d", Keys: hubtest.Keys()})
		if got := s.Identity("d"); once || got["statusReason"] != "found again" || got["status"] != "disabled" {
			t.Errorf("%v", got)
		}
	})
	t.Run("changed each time", func(t *testing.T) {
		s, h := start(t)
		s.Fail(func(r *http.Request) hubtest.Fault {
			if updates(r) {
				s.ChangeInside("d", func(map[string]any) {})
			}
			return hubtest.Fault{}
		})
		_, err := h.Admit(t.Context(), &registration.HubDevice{ID: "d", Keys: hubtest.Keys()})
		if e := temporary(t, err); e.Code != "Conflict" {
			t.Error(e)
		}
	})
	t.Run("deleted in between", func(t *testing.T) {
		for _, method := range []string{http.MethodGet, http.MethodPut} {
			s, h := start(t)
			s.Fail(func(r *http.Request) hubtest.Fault {
				if method == http.MethodGet && r.Method == method || method == http.MethodPut && updates(r) {
					s.Drop("d")
				}
				return hubtest.Fault{}
			})
			if created, err := h.Admit(t.Context(), &registration.HubDevice{ID: "d", Keys: hubtest.Keys()}); !created || err != nil {
				t.Errorf("%s: %v, %v", method, created, err)
			}
		}
	})
	t.Run("nothing differs, nothing is written", func(t *testing.T) {
		s, h := start(t)
		d := &registration.HubDevice{ID: "d", Thumbprints: []string{hubtest.Thumbprint()}}
		admit(t, h, d)
		tag := s.Identity("d")["etag"]
		s.Change("d", func(i map[string]any) { // as a hub that spells hex in lower case
			p := i["authentication"].(map[string]any)["x509Thumbprint"].(map[string]any)
			p["primaryThumbprint"] = strings.ToLower(p["primaryThumbprint"].(string))
		})
		s.Calls()
		admit(t, h, d)
		if calls := s.Calls(); !slices.Equal(calls, []string{"PUT /devices/d", "GET /devices/d"}) || tag == nil {
			t.Errorf("%v", calls)
		}
	})
}

// An operator's certificateAuthority, reason and what else he wrote stay where they are not ours.
func TestAzureIdentity(t *testing.T) {
	s := hubtest.StartStub(t)
	h := open(t, hub.Config{Hub: s.Linked("hub-a")})
	print := hubtest.Thumbprint()
	admit(t, h, &registration.HubDevice{ID: "d", Thumbprints: []string{print}})
	got, _ := json.Marshal(s.Identity("d")["authentication"])
	if want := fmt.Sprintf(`{"type":"selfSigned","x509Thumbprint":{"primaryThumbprint":"%[1]s","secondaryThumbprint":"%[1]s"}}`, print); string(got) != want {
		t.Errorf("%s, want %s", got, want)
	}
	keys := hubtest.Keys()
	admit(t, h, &registration.HubDevice{ID: "d", Keys: keys})
	got, _ = json.Marshal(s.Identity("d")["authentication"])
	if want := fmt.Sprintf(`{"symmetricKey":{"primaryKey":%q,"secondaryKey":%q},"type":"sas"}`, keys.PrimaryKey, keys.SecondaryKey); string(got) != want {
		t.Errorf("another identity than %s", want[:20])
	}
	s.Change("d", func(i map[string]any) { i["authentication"] = map[string]any{"type": "certificateAuthority"} })
	if d, err := h.Device(t.Context(), "d"); err != nil || len(d.Thumbprints) > 0 {
		t.Errorf("%+v, %v", d, err)
	}
	if i := s.Identity("d"); i["status"] != "enabled" {
		t.Errorf("%v", i["status"])
	}
}

// A twin that was read elsewhere may be written as it came.
func TestAzureTwinMetadata(t *testing.T) {
	s := hubtest.StartStub(t)
	h := open(t, hub.Config{Hub: s.Linked("hub-a")})
	admit(t, h, &registration.HubDevice{ID: "d", Keys: hubtest.Keys()})
	var sent string
	s.Fail(func(r *http.Request) hubtest.Fault {
		if r.Method == http.MethodPatch {
			b, _ := io.ReadAll(r.Body)
			sent = string(b)
			return hubtest.Fault{Status: 200}
		}
		return hubtest.Fault{}
	})
	const tags, desired = `{"n":1.0,"s":"é"}`, `{"big":4503599627370497,"$version":7,"$metadata":{"big":{"$lastUpdated":"x"}}}`
	if err := h.MergeTwin(t.Context(), "d", &registration.HubTwin{Tags: json.RawMessage(tags), Desired: json.RawMessage(desired)}); err != nil {
		t.Fatal(err)
	}
	if want := `{"tags":{"n":1.0,"s":"\u00e9"},"properties":{"desired":{"big":4503599627370497}}}`; sent != want {
		t.Errorf("%s, want %s", sent, want)
	}
	s.Calls()
	if err := h.MergeTwin(t.Context(), "d", &registration.HubTwin{Desired: json.RawMessage(`{"$version":7}`)}); err != nil || len(s.Calls()) > 0 {
		t.Errorf("nothing to write: %v", err)
	}
	if e := forGood(t, h.MergeTwin(t.Context(), "d", &registration.HubTwin{Tags: json.RawMessage(`[]`)})); e.Code != "ArgumentInvalid" {
		t.Error(e)
	}
}

// Tokens are good for an hour, made anew before that, and again when the hub does not take one.
func TestAzureTokens(t *testing.T) {
	s := hubtest.StartStub(t)
	now := time.Date(2026, 6, 1, 12, 0, 0, 0, time.UTC)
	s.Check = func(tok attest.Token) error {
		if !tok.Expiry.After(now) || tok.Expiry.Sub(now) > time.Hour {
			return errors.New("expired, or good for too long")
		}
		return nil
	}
	h := open(t, hub.Config{Hub: s.Linked("hub-a"), Now: func() time.Time { return now }})
	for range 3 {
		if err := h.Check(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if s.Tokens() != 1 {
		t.Errorf("%d tokens", s.Tokens())
	}
	for range 40 {
		now = now.Add(7 * time.Minute)
		if err := h.Check(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if n := s.Tokens(); n < 5 || n > 8 {
		t.Errorf("%d tokens in five hours", n)
	}
	now = now.Add(-24 * time.Hour) // a clock that was ahead is set right
	if err := h.Check(t.Context()); err != nil {
		t.Error(err)
	}
	s.Fail(always(hubtest.Fault{Status: 401}))
	before := s.Tokens()
	now = now.Add(time.Second)
	forGood(t, h.Check(t.Context()))
	s.Fail(nil)
	if err := h.Check(t.Context()); err != nil || s.Tokens() != before+1 {
		t.Errorf("after a 401: %v, %d tokens more", err, s.Tokens()-before)
	}
}

// A hub that quotes its caller does not get our secrets into a log.
func TestAzureSecrets(t *testing.T) {
	s := hubtest.StartStub(t)
	linked := s.Linked("hub-a")
	h := open(t, hub.Config{Hub: linked})
	keys := hubtest.Keys()
	var token string
	s.Fail(func(r *http.Request) hubtest.Fault {
		token = r.Header.Get("Authorization")
		body, _ := json.Marshal(map[string]string{"Message": "not with " + token + " for " + keys.PrimaryKey + "\x1b[31m\n" + strings.Repeat("lorem ipsum ", 100)})
		return hubtest.Fault{Status: 401, Body: string(body), Header: http.Header{"Iothub-Errorcode": {"A b" + token}}}
	})
	_, err := h.Admit(t.Context(), &registration.HubDevice{ID: "d", Keys: keys})
	sig, _, _ := strings.Cut(token[strings.Index(token, "sig=")+4:], "&")
	for _, text := range []string{err.Error(), fmt.Sprintf("%v", err), fmt.Sprintf("%#v", err)} {
		if strings.Contains(text, sig) || strings.Contains(text, keys.PrimaryKey) || strings.Contains(text, "\x1b") || len(err.Error()) > 500 {
			t.Errorf("%q", text)
		}
	}
	if !strings.Contains(err.Error(), "not with SharedAccessSignature sr=127.0.0.1") {
		t.Errorf("nothing is left of what it said: %v", err)
	}
}
