package registrationtest

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/url"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/bundle"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
)

// A Device is what connects to a door: its names as it writes them, and its proof.
type Device struct {
	Scope, ID, APIVersion string
	Token                 string
	Certificate           *tls.Certificate
}

// ByKey is a device with a token signed by a key, good for an hour.
func (f *Fixture) ByKey(id string, key []byte) Device {
	return Device{Scope: Scope, ID: id, APIVersion: apiVersion, Token: attesttest.Token(key, Scope, id, f.Now().Add(time.Hour))}
}

// Derived is a device of the symmetric-key group.
func (f *Fixture) Derived(id string) Device {
	return f.ByKey(id, attest.DeriveKey(f.GroupKey, id))
}

// ByCertificate is a device with a certificate.
func ByCertificate(id string, c *tls.Certificate) Device {
	return Device{Scope: Scope, ID: id, APIVersion: apiVersion, Certificate: c}
}

// An Answer is what a door answered a device.
type Answer struct {
	Status int    // as in HTTP; 401 where the door refused the connection itself, and then there is no body
	Hint   string // retry-after, empty where there was none
	Body   []byte
}

// A Conn is a device's connection to a door. A Conn that was refused answers 401 to everything.
type Conn interface {
	Register(t testing.TB, body string) Answer
	Status(t testing.TB, operation, body string) Answer
}

var (
	dateForm      = regexp.MustCompile(`^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{7}Z$`)
	operationForm = regexp.MustCompile(`^[A-Za-z0-9.-]{1,55}$`)
	hubForm       = regexp.MustCompile(`^[A-Za-z0-9.-]+$`) // no scheme, no port
	codeForm      = regexp.MustCompile(`"errorCode":\d{6}[,}]`)
)

// document decodes an answer and checks what holds for every one: DPS-D 1 to 5, 7 to 9, 12 to 15, 17, 31, 56.
func document(t testing.TB, a Answer) map[string]any {
	t.Helper()
	var doc map[string]any
	if err := json.Unmarshal(a.Body, &doc); err != nil {
		t.Fatalf("answer %d %q: %v", a.Status, a.Body, err)
	}
	if bytes.Contains(a.Body, []byte("null")) || bytes.ContainsFunc(a.Body, func(r rune) bool { return r > '~' || r < ' ' }) || bytes.Contains(a.Body, []byte(`\u002`)) {
		t.Errorf("answer %s has a null, something beyond ASCII or a needless escape", a.Body)
	}
	state, hasState := doc["registrationState"].(map[string]any)
	for _, o := range []map[string]any{doc, state} {
		if o["errorCode"] != nil && !codeForm.Match(a.Body) {
			t.Errorf("%s has an error code that is no integer", a.Body)
		}
		if o["message"] != nil && o["errorMessage"] != nil || o["code"] != nil && o["errorCode"] != nil {
			t.Errorf("%s has both names of a member", a.Body)
		}
		for name, v := range o {
			if strings.HasSuffix(name, "Utc") && !dateForm.MatchString(v.(string)) {
				t.Errorf("%s is %v", name, v)
			}
		}
	}
	if a.Status >= 300 {
		code, _ := doc["errorCode"].(float64)
		tracking, _ := doc["trackingId"].(string)
		message, _ := doc["message"].(string)
		if int(code)/1000 != a.Status || tracking == "" || message == "" || doc["timestampUtc"] == nil {
			t.Errorf("error %d has the document %s", a.Status, a.Body)
		}
		if (a.Hint != "") != (a.Status == 429 || a.Status >= 500) {
			t.Errorf("error %d comes with the hint %q", a.Status, a.Hint)
		}
		return doc
	}
	if op, _ := doc["operationId"].(string); !operationForm.MatchString(op) {
		t.Errorf("operation %q", op)
	}
	switch doc["status"] {
	case "assigning":
		if a.Hint != "3" || a.Status != 202 {
			t.Errorf("an assigning answer is %d with the hint %q", a.Status, a.Hint)
		}
		if id, _ := state["registrationId"].(string); hasState && (id == "" || state["status"] != "assigning" || state["deviceId"] != nil || state["assignedHub"] != nil) {
			t.Errorf("assigning: %s", a.Body)
		}
	case "assigned", "failed", "disabled":
		if a.Hint != "" || a.Status != 200 || state["status"] != doc["status"] || state["createdDateTimeUtc"] == nil || state["lastUpdatedDateTimeUtc"] == nil {
			t.Errorf("answer %d with the hint %q: %s", a.Status, a.Hint, a.Body)
		}
		at, _ := state["assignedHub"].(string)
		id, _ := state["deviceId"].(string)
		text, _ := state["errorMessage"].(string)
		if ok := doc["status"] == "assigned"; ok != hubForm.MatchString(at) || ok != (id != "") || (doc["status"] == "failed") != (state["errorCode"] != nil && text != "") {
			t.Errorf("%s: %s", doc["status"], a.Body)
		}
	default:
		t.Errorf("status %v", doc["status"])
	}
	return doc
}

// register has a device register and ask once, and returns the operation and its registrationState.
func register(t testing.TB, c Conn, body string) (operation string, state map[string]any) {
	t.Helper()
	a := c.Register(t, body)
	doc := document(t, a)
	if a.Status != 202 || doc["registrationState"] != nil { // DPS-D 6
		t.Fatalf("register: %d %s", a.Status, a.Body)
	}
	operation = doc["operationId"].(string)
	a = c.Status(t, operation, "")
	doc = document(t, a)
	state, _ = doc["registrationState"].(map[string]any)
	if a.Status != 200 || state == nil || doc["operationId"] != operation {
		t.Fatalf("status: %d %s", a.Status, a.Body)
	}
	return operation, state
}

func assigned(t testing.TB, c Conn, id string) map[string]any {
	t.Helper()
	_, state := register(t, c, `{"registrationId":"`+id+`"}`)
	if state["status"] != "assigned" || state["assignedHub"] != hub || state["deviceId"] != id || state["registrationId"] != id || state["etag"] == nil { // DPS-D 8
		t.Fatalf("%s: %v", id, state)
	}
	return state
}

func refused(t testing.TB, c Conn, why string) {
	t.Helper()
	refusedWith(t, c.Register(t, ""), 401, why)
}

func refusedWith(t testing.TB, a Answer, status int, why string) {
	t.Helper()
	if a.Status != status {
		t.Errorf("%s: answer %d %s", why, a.Status, a.Body)
		return
	}
	if a.Body == nil && status == 401 {
		return
	}
	// Device API, section 6.4: who is refused learns nothing more.
	if doc := document(t, a); status == 401 && (doc["errorCode"] != 401002.0 || doc["message"] != "Unauthorized") {
		t.Errorf("%s: %s", why, a.Body)
	}
}

// slow is a service that has no room for a while: it answers that it is still assigning, or refuses, until it is ready. Then its
// assignments have a payload.
type slow struct {
	registration.Registrar
	*pace
}

// pace is how slow a service is, at all of its replicas.
type pace struct {
	body   atomic.Value // of the last registration
	refuse atomic.Int64
	ready  atomic.Bool
}

func (s *pace) refusal() error {
	if code := dps.Code(s.refuse.Load()); code != 0 {
		return dps.NewError(code, "Not now", nil)
	}
	return nil
}

func (s slow) Register(ctx context.Context, req *registration.Request) (*dps.OperationStatus, error) {
	s.body.Store(string(req.Body))
	if err := s.refusal(); err != nil {
		return nil, err
	}
	return s.Registrar.Register(ctx, req)
}

func (s slow) Status(ctx context.Context, req *registration.Request, operation string) (*dps.OperationStatus, error) {
	if err := s.refusal(); err != nil {
		return nil, err
	}
	st, err := s.Registrar.Status(ctx, req, operation)
	if err != nil {
		return nil, err
	}
	if !s.ready.Load() {
		return &dps.OperationStatus{OperationID: operation, Status: dps.Assigning, RegistrationState: &dps.RegistrationState{RegistrationID: req.RegistrationID, Status: dps.Assigning}}, nil
	}
	state := *st.RegistrationState
	state.Payload = json.RawMessage(`{"n":"ä","h":"<a&b>"}`)
	return &dps.OperationStatus{OperationID: operation, Status: st.Status, RegistrationState: &state}, nil
}

// A Fresh is [NewFixture], or what starts a fixture of several replicas.
type Fresh = func(t testing.TB, hubs ...string) *Fixture

// A Serve starts a door on a fixture's service and clock, and returns how devices connect to it.
type Serve = func(*testing.T, *Fixture) func(testing.TB, Device) Conn

// spray starts a door at each replica. Devices connect to all of them, and each request of a device goes to another one than its last.
func spray(serve Serve) Serve {
	return func(t *testing.T, f *Fixture) func(testing.TB, Device) Conn {
		var dials []func(testing.TB, Device) Conn
		for _, r := range f.Replicas() {
			dials = append(dials, serve(t, r))
		}
		if len(dials) == 1 {
			return dials[0]
		}
		turn := new(atomic.Int64)
		return func(t testing.TB, d Device) Conn {
			c := &sprayed{turn: turn, last: -1}
			for _, dial := range dials {
				c.conns = append(c.conns, dial(t, d))
			}
			return c
		}
	}
}

// A sprayed Conn is one to every replica, made at once. Whoever asks next, on whichever Conn, meets the next replica; a device that
// asks twice meets two, also while others ask.
type sprayed struct {
	conns []Conn
	turn  *atomic.Int64 // of all that are connected to these replicas
	last  int
}

func (c *sprayed) next() Conn {
	n := int(c.turn.Add(1)) % len(c.conns)
	if n == c.last {
		n = (n + 1) % len(c.conns)
	}
	c.last = n
	return c.conns[n]
}

func (c *sprayed) Register(t testing.TB, body string) Answer { return c.next().Register(t, body) }

func (c *sprayed) Status(t testing.TB, operation, body string) Answer {
	return c.next().Status(t, operation, body)
}

// Doors is the contract of a door as a test suite: what a device reads is the same whatever way it came, and whichever replica it met.
func Doors(t *testing.T, fresh Fresh, serve Serve) {
	serve = spray(serve)
	start := func(t *testing.T, hubs ...string) (*Fixture, func(testing.TB, Device) Conn) {
		f := fresh(t, hubs...)
		return f, serve(t, f)
	}
	t.Run("keys", func(t *testing.T) { // DPS-D 11, 16, 19, 27, 39; DPS-S 86: either of the group's keys
		f, dial := start(t, hub)
		for _, key := range [][]byte{f.OwnKey, f.OtherKey} {
			if s := assigned(t, dial(t, f.ByKey("own-key", key)), "own-key"); s["symmetricKey"] != nil || s["x509"] != nil {
				t.Errorf("individual: %v", s)
			}
		}
		assigned(t, dial(t, f.ByKey("dev-5", attest.DeriveKey(bytes.Repeat([]byte("s"), 32), "dev-5"))), "dev-5")
		c := dial(t, f.Derived("dev-1"))
		first := assigned(t, c, "dev-1")
		if g, _ := first["symmetricKey"].(map[string]any); g["enrollmentGroupId"] != "keys" || first["substatus"] != "initialAssignment" {
			t.Errorf("group: %v", first)
		}
		f.Advance(time.Second)
		again := assigned(t, c, "dev-1")
		if again["substatus"] != "reprovisionedToInitialAssignment" || again["createdDateTimeUtc"] != first["createdDateTimeUtc"] ||
			again["lastUpdatedDateTimeUtc"] == first["lastUpdatedDateTimeUtc"] || again["etag"] == first["etag"] {
			t.Errorf("again: %v", again)
		}
		op, _ := register(t, c, `{"registrationId":"dev-1","payload":null}`)
		told := c.Status(t, op, "")
		f.Advance(time.Minute)
		for _, c := range []Conn{c, dial(t, f.Derived("dev-1"))} {
			if a := c.Status(t, op, "{}"); !bytes.Equal(a.Body, told.Body) {
				t.Errorf("the same operation, told again:\n%s\n%s", told.Body, a.Body)
			}
		}
		// By the group's other key, and under another name in the hub.
		assigned(t, dial(t, f.ByKey("dev-2", attest.DeriveKey(bytes.Repeat([]byte("s"), 32), "dev-2"))), "dev-2")
		f.PutDocument(t, registration.Individual, "own-key", dps.IndividualEnrollment{RegistrationID: "own-key", DeviceID: "Pump-7", Enrollment: Symmetric(f.OwnKey, f.OtherKey)})
		if _, s := register(t, dial(t, f.ByKey("own-key", f.OwnKey)), ""); s["deviceId"] != "Pump-7" || s["assignedHub"] != hub {
			t.Errorf("a device ID of its own: %v", s)
		}
	})
	t.Run("addresses", func(t *testing.T) { // DPS-S 80
		f, dial := start(t, hub)
		only := func(mask string) {
			t.Helper()
			if _, _, err := registration.EditScope(t.Context(), f.Store, Scope, registration.Actor{Name: "test"}, "put", f.Now(), func(sc *registration.Scope) (*registration.Scope, error) {
				if sc == nil {
					sc = &registration.Scope{ID: Scope, Name: "addresses", Settings: registration.Settings{Hubs: registration.Records(hub)}}
				}
				sc.IPFilter = []registration.IPRule{{Name: "own", Accept: true, Mask: mask, Target: registration.DeviceAPI}, {Name: "others", Mask: "0.0.0.0/0", Target: registration.AllAPIs}}
				return sc, nil
			}); err != nil {
				t.Fatal(err)
			}
		}
		only("127.0.0.0/8")
		assigned(t, dial(t, f.Derived("dev-1")), "dev-1")
		c := dial(t, f.Derived("dev-1"))
		only("192.0.2.0/24")
		refused(t, c, "on a connection from before the rule")
		refused(t, dial(t, f.ByKey("own-key", f.OwnKey)), "an address that is kept out")
	})
	t.Run("tokens", func(t *testing.T) { // DPS-D 32 to 35, 40: as every SDK writes them, and as hands do
		f, dial := start(t, hub)
		key := attest.DeriveKey(f.GroupKey, "Dev-1")
		sign := func(over string, se int64) string {
			h := hmac.New(sha256.New, key)
			fmt.Fprintf(h, "%s\n%d", over, se)
			return base64.StdEncoding.EncodeToString(h.Sum(nil))
		}
		device := func(token string) Device {
			return Device{Scope: Scope, ID: "Dev-1", APIVersion: apiVersion, Token: "SharedAccessSignature " + token}
		}
		raw := Scope + "/registrations/Dev-1"
		upper := url.QueryEscape(raw)
		lower := strings.ReplaceAll(upper, "%2F", "%2f")
		plus := f.Now().Add(time.Hour).Unix() // till when a signature has a plus, a slash and padding
		for sig := ""; !strings.Contains(sig, "+") || !strings.Contains(sig, "/"); sig = sign(upper, plus) {
			plus++
		}
		bare := sign(upper, plus)
		for why, token := range map[string]string{
			"raw":               "sr=" + raw + "&sig=" + url.QueryEscape(sign(raw, plus)) + "&skn=registration&se=" + fmt.Sprint(plus),
			"encoded":           "sr=" + upper + "&sig=" + url.QueryEscape(bare) + "&se=" + fmt.Sprint(plus),
			"encoded by C":      "sr=" + lower + "&sig=" + url.QueryEscape(sign(lower, plus)) + "&se=" + fmt.Sprint(plus) + "&skn=",
			"lower case":        "sr=" + strings.ToLower(upper) + "&sig=" + url.QueryEscape(sign(strings.ToLower(upper), plus)) + "&se=" + fmt.Sprint(plus) + "&skn=registration",
			"in another order":  "skn=somebody&se=" + fmt.Sprint(plus) + "&sig=" + url.QueryEscape(bare) + "&sr=" + upper,
			"escapes of C":      "sr=" + upper + "&sig=" + strings.NewReplacer("+", "%2b", "/", "%2f", "=", "%3d").Replace(bare) + "&se=" + fmt.Sprint(plus),
			"by hand, bare":     "sr=" + upper + "&sig=" + bare + "&se=" + fmt.Sprint(plus),
			"by hand, a plus":   "sr=" + upper + "&sig=" + strings.NewReplacer("/", "%2F", "=", "%3D").Replace(bare) + "&se=" + fmt.Sprint(plus),
			"capitals in scope": "sr=" + strings.ToUpper(raw) + "&sig=" + url.QueryEscape(sign(strings.ToUpper(raw), plus)) + "&se=" + fmt.Sprint(plus),
		} {
			if a := dial(t, device(token)).Register(t, ""); a.Status != 202 {
				t.Errorf("%s: %d %s", why, a.Status, a.Body)
			}
		}
		for why, token := range map[string]string{
			"signed decoded, written encoded": "sr=" + upper + "&sig=" + url.QueryEscape(sign(raw, plus)) + "&se=" + fmt.Sprint(plus),
			"signed encoded, written decoded": "sr=" + raw + "&sig=" + url.QueryEscape(bare) + "&se=" + fmt.Sprint(plus),
			"a plus become a space":           "sr=" + upper + "&sig=" + strings.ReplaceAll(bare, "+", "%20") + "&se=" + fmt.Sprint(plus),
		} {
			refused(t, dial(t, device(token)), why)
		}
	})
	t.Run("later", func(t *testing.T) { // DPS-D 3, 4, 7, 19, 28, 31, 56, 60, 102
		f := fresh(t, hub)
		pace := &pace{}
		for _, r := range f.Replicas() {
			r.front = slow{r.Service, pace}
		}
		c := serve(t, f)(t, f.Derived("dev-1"))
		// What the device sends is what is judged, octet by octet.
		for _, body := range []string{`{"registrationId":"dev-1","payload":"{\"a\":\"\u00e4\"}"}`, `{"registrationId":"dev-1","payload":{"n":"ä","b":[1.50,null]}}` + "\n"} {
			if a := c.Register(t, body); a.Status != 202 || pace.body.Load() != body {
				t.Errorf("%d, %s arrives as %s", a.Status, body, pace.body.Load())
			}
		}
		a := c.Register(t, "")
		op := document(t, a)["operationId"].(string)
		for i := range 12 { // for longer than half a minute, at the client's pace
			a = c.Status(t, op, "")
			doc := document(t, a)
			if state, _ := doc["registrationState"].(map[string]any); a.Status != 202 || doc["operationId"] != op || state["registrationId"] != "dev-1" {
				t.Fatalf("poll %d: %d %s", i, a.Status, a.Body)
			}
		}
		for _, code := range []dps.Code{dps.CodeThrottled, dps.CodeInternal, dps.CodeServiceOverloaded} {
			pace.refuse.Store(int64(code))
			refusedWith(t, c.Status(t, op, ""), code.Status(), "while it waits")
			refusedWith(t, c.Register(t, ""), code.Status(), "registering")
		}
		pace.refuse.Store(0)
		pace.ready.Store(true)
		a = c.Status(t, op, "")
		if document(t, a); a.Status != 200 || !bytes.Contains(a.Body, []byte(`"payload":{"n":"\u00e4","h":"<a&b>"}`)) {
			t.Errorf("%d %s", a.Status, a.Body)
		}
		if again := c.Status(t, op, ""); !bytes.Equal(again.Body, a.Body) {
			t.Errorf("told again: %s, %s", a.Body, again.Body)
		}
	})
	t.Run("certificates", func(t *testing.T) { // DPS-D 10, 41, 42, 43
		f, dial := start(t, hub)
		dev := attesttest.Leaf(t, f.Mid, "dev-2")
		for name, d := range map[string]Device{
			"individual":          ByCertificate("own-cert", f.Own.TLS()),
			"group":               ByCertificate("dev-2", dev.TLS(f.Mid)),
			"group, reversed":     ByCertificate("dev-2", dev.TLS(f.Root, f.Mid)),
			"group, leaf of root": ByCertificate("dev-3", attesttest.Leaf(t, f.Root, "dev-3").TLS()),
		} {
			s := assigned(t, dial(t, d), d.ID)
			if x, ok := s["x509"].(map[string]any); !ok || len(x) != 0 || s["symmetricKey"] != nil {
				t.Errorf("%s: %v", name, s)
			}
		}
		refused(t, dial(t, ByCertificate("dev-2", dev.TLS())), "leaf without its intermediate")
		f.Put(t, registration.Group, "line-3", Signers(f.Mid, nil))
		assigned(t, dial(t, ByCertificate("dev-2", dev.TLS())), "dev-2")
	})
	t.Run("foreign certificates", func(t *testing.T) { // DPS-D 44, 46, DPS-S 85
		f, dial := start(t, hub)
		late := func(c *x509.Certificate) { c.NotAfter = attesttest.Now.Add(-time.Minute) }
		twin := attesttest.CA(t, nil, "factory root")
		for why, d := range map[string]Device{
			"no proof at all":          {Scope: Scope, ID: "dev-1", APIVersion: apiVersion},
			"another's name":           ByCertificate("dev-9", attesttest.Leaf(t, f.Root, "dev-2").TLS()),
			"expired leaf":             ByCertificate("dev-2", attesttest.Leaf(t, f.Root, "dev-2", late).TLS()),
			"expired intermediate":     ByCertificate("dev-2", attesttest.Leaf(t, attesttest.CA(t, f.Root, "old", late), "dev-2").TLS()),
			"a CA of the same name":    ByCertificate("dev-2", attesttest.Leaf(t, twin, "dev-2").TLS(twin)),
			"another leaf, enrolled":   ByCertificate("own-cert", attesttest.Leaf(t, nil, "own-cert").TLS()),
			"of a group, but enrolled": ByCertificate("own-cert", attesttest.Leaf(t, f.Root, "own-cert").TLS()),
			"certificate for a key":    ByCertificate("own-key", attesttest.Leaf(t, f.Root, "own-key").TLS()),
			"key for a certificate":    f.Derived("own-cert"),
		} {
			refused(t, dial(t, d), why)
		}
	})
	t.Run("foreign keys", func(t *testing.T) { // DPS-D 36, 37, DPS-S 86
		f, dial := start(t, hub)
		good := attest.DeriveKey(f.GroupKey, "dev-1")
		token := func(scope, id string, in time.Duration) Device {
			return Device{Scope: Scope, ID: "dev-1", APIVersion: apiVersion, Token: attesttest.Token(good, scope, id, f.Now().Add(in))}
		}
		for why, d := range map[string]Device{
			"another key":       f.ByKey("dev-1", f.OwnKey),
			"the group's key":   f.ByKey("dev-1", f.GroupKey),
			"another device's":  f.ByKey("dev-1", attest.DeriveKey(f.GroupKey, "dev-2")),
			"for another scope": token("0ne00000000", "dev-1", time.Hour),
			"for another ID":    token(Scope, "dev-2", time.Hour),
			"expired":           token(Scope, "dev-1", -time.Hour),
			"no token":          {Scope: Scope, ID: "dev-1", APIVersion: apiVersion, Token: "SharedAccessSignature sr=x"},
			"another scope":     {Scope: "0ne00000000", ID: "dev-1", APIVersion: apiVersion, Token: attesttest.Token(good, "0ne00000000", "dev-1", f.Now().Add(time.Hour))},
		} {
			refused(t, dial(t, d), why)
		}
		for _, in := range []time.Duration{-time.Minute, 24 * time.Hour} {
			assigned(t, dial(t, token(Scope, "dev-1", in)), "dev-1")
		}
	})
	t.Run("disabled", func(t *testing.T) { // DPS-D 13, 29, 45, DPS-S 82, 83
		f, dial := start(t, hub)
		off := func(kind registration.Kind, id string, e dps.Enrollment) {
			e.ProvisioningStatus = dps.EnrollmentDisabled
			f.Put(t, kind, id, e)
		}
		off(registration.Individual, "own-key", Symmetric(f.OwnKey, f.OtherKey))
		off(registration.Individual, "dev-2", Symmetric(f.OwnKey, nil))
		off(registration.Group, "line-3", Signers(f.Mid, nil))
		in2, in3 := attesttest.Leaf(t, f.Root, "dev-2"), attesttest.Leaf(t, f.Mid, "dev-3")
		for _, d := range []Device{f.ByKey("own-key", f.OwnKey), ByCertificate("dev-2", in2.TLS())} {
			if _, s := register(t, dial(t, d), ""); s["status"] != "disabled" || s["deviceId"] != nil || s["assignedHub"] != nil {
				t.Errorf("%s: %v", d.ID, s)
			}
		}
		refused(t, dial(t, f.ByKey("own-key", f.GroupKey)), "wrong key for a disabled enrollment")
		refused(t, dial(t, ByCertificate("dev-3", in3.TLS(f.Mid))), "disabled group below an enabled one")
		if err := f.Service.DeleteEnrollment(t.Context(), registration.Actor{Name: "test"}, registration.Individual, "dev-2", ""); err != nil {
			t.Fatal(err)
		}
		assigned(t, dial(t, ByCertificate("dev-2", in2.TLS())), "dev-2") // its group lets it in again
	})
	t.Run("closed groups", func(t *testing.T) {
		f, dial := start(t, hub)
		leaf := func(cn string) *attesttest.Holder { return attesttest.Leaf(t, f.Root, cn) }
		named, old, board, lost := leaf("named"), leaf("pump-1"), leaf("pump-1"), leaf("lost-1")
		device := func(id, group string, revision int64, h *attesttest.Holder) bundle.Entry {
			e := bundle.Entry{Serial: strings.ToUpper(id), Revision: revision, Device: &bundle.GroupDevice{RegistrationID: id, Group: group}}
			if h != nil {
				e.Device.KeyHash = keyHash(t, h)
			}
			return e
		}
		gone := func(id, group string, revision int64, state bundle.State, h *attesttest.Holder) bundle.Entry {
			e := bundle.Entry{Serial: strings.ToUpper(id), Revision: revision, Retired: &bundle.RetiredDevice{RegistrationID: id, Group: group, State: state, At: f.Now()}}
			if h != nil {
				e.Retired.KeyHash = keyHash(t, h)
			}
			return e
		}
		f.Import(t, device("Named", "line", 0, named), device("pump-1", "line", 0, old), device("lost-1", "line", 0, lost), device("key-1", "keys", 0, nil), device("elsewhere", "keys", 0, nil))
		for _, id := range []string{"line", "keys"} {
			if changed, err := f.Service.CloseGroup(t.Context(), registration.Actor{}, id, true); err != nil || !changed {
				t.Fatal(changed, err)
			}
		}
		assigned(t, dial(t, ByCertificate("named", named.TLS())), "named")
		assigned(t, dial(t, ByCertificate("pump-1", old.TLS())), "pump-1")
		assigned(t, dial(t, f.Derived("key-1")), "key-1")
		for _, d := range []Device{ByCertificate("NAMED", named.TLS()), f.Derived("KEY-1")} { // one device, however it writes its name
			if _, s := register(t, dial(t, d), ""); s["status"] != "assigned" || s["registrationId"] != d.ID || s["deviceId"] != strings.ToLower(d.ID) {
				t.Errorf("%s: %v", d.ID, s)
			}
		}
		// The unit is reworked: its new board comes in, and its old one stays out. So does what was scrapped.
		f.Import(t, gone("Pump-1", "line", 0, bundle.Reworked, old), device("Pump-1", "line", 1, board), gone("lost-1", "line", 0, bundle.Scrapped, lost), gone("key-1", "keys", 0, bundle.Scrapped, nil))
		assigned(t, dial(t, ByCertificate("pump-1", board.TLS())), "pump-1")
		over := leaf("over-1") // made, and never in a bundle
		attack := func(group string) {
			for why, d := range map[string]Device{
				group + ": the old board":                        ByCertificate("pump-1", old.TLS()),
				group + ": the old board, in capitals":           ByCertificate("PUMP-1", old.TLS()),
				group + ": the old board's key, by another name": ByCertificate("over-2", attesttest.Again(t, f.Root, old, "over-2").TLS()),
				group + ": the old board's key, certified again": ByCertificate("pump-1", attesttest.Again(t, f.Root, old, "pump-1").TLS()),
				group + ": the scrapped key, as the named one":   ByCertificate("named", attesttest.Again(t, f.Root, lost, "named").TLS()),
			} {
				refused(t, dial(t, d), why)
			}
			for _, d := range []Device{ByCertificate("lost-1", lost.TLS()), ByCertificate("LOST-1", lost.TLS()), ByCertificate("lost-1", leaf("lost-1").TLS()), f.Derived("key-1"), f.Derived("Key-1")} {
				if _, s := register(t, dial(t, d), ""); s["status"] != "disabled" || s["assignedHub"] != nil {
					t.Errorf("%s: ended, %s: %v", group, d.ID, s)
				}
			}
		}
		attack("closed")
		for why, d := range map[string]Device{
			"never imported":                 ByCertificate("over-1", over.TLS()),
			"never imported, in capitals":    ByCertificate("OVER-1", over.TLS()),
			"never imported, by key":         f.Derived("key-2"),
			"another key of a named device":  ByCertificate("named", leaf("named").TLS()),
			"another key, in capitals":       ByCertificate("Named", leaf("Named").TLS()),
			"named for another group":        ByCertificate("elsewhere", leaf("elsewhere").TLS()),
			"a name with a dot behind it":    ByCertificate("over-1", leaf("named.x").TLS()),
			"an enrolled one's group member": ByCertificate("own-key", leaf("own-key").TLS()),
		} {
			refused(t, dial(t, d), why)
		}
		for _, id := range []string{"line", "keys"} {
			if changed, err := f.Service.CloseGroup(t.Context(), registration.Actor{}, id, false); err != nil || !changed {
				t.Fatal(changed, err)
			}
		}
		assigned(t, dial(t, ByCertificate("over-1", over.TLS())), "over-1")
		assigned(t, dial(t, f.Derived("key-2")), "key-2")
		attack("open")
		// An individual enrollment with a key that ended, made by hand.
		twin := attesttest.Again(t, nil, lost, "twin")
		f.Put(t, registration.Individual, "twin", dps.Enrollment{Attestation: &dps.Attestation{Type: dps.AttestationX509,
			X509: &dps.X509Attestation{ClientCertificates: &dps.X509Certificates{Primary: &dps.X509Certificate{Certificate: twin.Base64()}}}}})
		refused(t, dial(t, ByCertificate("twin", twin.TLS())), "a key that ended, enrolled by hand")
	})
	t.Run("no hub", func(t *testing.T) { // DPS-D 12, 30
		f, dial := start(t)
		_, s := register(t, dial(t, f.Derived("dev-1")), "")
		if text, _ := s["errorMessage"].(string); s["status"] != "failed" || s["errorCode"] != 400208.0 || text == "" || s["assignedHub"] != nil {
			t.Errorf("%v", s)
		}
	})
	t.Run("bodies", func(t *testing.T) { // DPS-D 18 to 22, 24, 25
		f, dial := start(t, hub)
		d := f.Derived("dev-1")
		for _, body := range []string{"", "{}", `{"registrationId" : "DEV-1"}` + "\n", `{"registrationId":"dev-1","payload":null,"what":{"is":["this"]}}`, `{"payload":"{\"a\":1}"}`} {
			if _, s := register(t, dial(t, d), body); s["status"] != "assigned" {
				t.Errorf("%s: %v", body, s)
			}
		}
		for _, body := range []string{"{", "[]", `"x"`, `{"registrationId":1}`, `{"registrationId":"dev-2"}`, "\xff\xfe", `{"registrationId":"dev-1"} {}`} {
			refusedWith(t, dial(t, d).Register(t, body), 400, body)
		}
		a := dial(t, d).Register(t, `{"registrationId":"dev-1","csr":"MIIB"}`)
		if doc := document(t, a); a.Status != 400 || doc["errorCode"] != 400012.0 {
			t.Errorf("CSR under an old version: %s", a.Body)
		}
		csr := d
		csr.APIVersion = "2025-07-01-preview"
		if _, s := register(t, dial(t, csr), `{"registrationId":"dev-1","csr":"MIIB"}`); s["status"] != "failed" {
			t.Errorf("CSR, and nobody to sign it: %v", s)
		}
		refusedWith(t, dial(t, d).Register(t, `{"payload":"`+strings.Repeat("x", registration.MaxBody)+`"}`), 413, "64 KiB and more")
		op, _ := register(t, dial(t, d), "")
		for _, body := range []string{" ", "{}", `{"registrationId":"dev-1"}`, "{not JSON"} {
			if a := dial(t, d).Status(t, op, body); a.Status != 200 {
				t.Errorf("status with the body %q: %d %s", body, a.Status, a.Body)
			}
		}
	})
	t.Run("versions", func(t *testing.T) { // DPS-D 23, 40
		f, dial := start(t, hub)
		for _, v := range []string{"2018-11-01", "2019-03-31", "2021-06-01", "2021-10-01", "2025-07-01-preview"} {
			d := f.Derived("dev-1")
			d.APIVersion = v
			assigned(t, dial(t, d), "dev-1")
		}
		d := f.Derived("dev-1")
		d.Scope, d.ID = strings.ToLower(Scope), "DEV-1"
		// The record is one, the device ID stays what it was, and the answer has the spelling of the request.
		if _, s := register(t, dial(t, d), ""); s["status"] != "assigned" || s["deviceId"] != "dev-1" || s["registrationId"] != "DEV-1" {
			t.Errorf("in another case: %v", s)
		}
	})
	t.Run("operations", func(t *testing.T) { // DPS-D 26, 38
		f, dial := start(t, hub)
		d1, d2 := f.Derived("dev-1"), f.Derived("dev-2")
		op, _ := register(t, dial(t, d1), "")
		refusedWith(t, dial(t, d2).Status(t, op, ""), 404, "another device's operation")
		refusedWith(t, dial(t, d1).Status(t, "5.0000000000000000.00000000-0000-0000-0000-000000000000", ""), 404, "unknown operation")
		forged := f.ByKey("dev-1", f.OwnKey)
		refusedWith(t, dial(t, forged).Status(t, op, ""), 401, "another proof")
		c := dial(t, d1)
		f.Advance(90 * time.Minute)
		if a := c.Status(t, op, ""); a.Status != 200 {
			t.Errorf("with the token that began it, expired since: %d %s", a.Status, a.Body)
		}
		f.Advance(time.Hour)
		refusedWith(t, c.Status(t, op, ""), 401, "with a token that expired long ago") // invariant 8
	})
	issuance(t, fresh, serve)
	t.Run("many at once", func(t *testing.T) { // DPS-D 28; invariant 3 under load
		f, dial := start(t, hub)
		var wg sync.WaitGroup
		for i := range 64 {
			id := fmt.Sprintf("dev-%d", i/2) // each comes twice
			wg.Go(func() {
				if _, s := register(t, dial(t, f.Derived(id)), ""); s["status"] != "assigned" {
					t.Errorf("%s: %v", id, s)
				}
			})
		}
		wg.Wait()
		page, _, err := f.Service.QueryRegistrations(t.Context(), "keys", registration.Page{Limit: 100})
		if err != nil {
			t.Fatal(err)
		}
		if len(page) != 32 {
			t.Errorf("%d registrations of 32 devices", len(page))
		}
	})
}
