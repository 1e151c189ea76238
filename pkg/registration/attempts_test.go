package registration_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

// attempted is a service whose attempts are kept.
func attempted(t testing.TB, f *registrationtest.Fixture, log *slog.Logger) (*registration.Service, *registration.Attempts) {
	t.Helper()
	a := registration.NewAttempts(registration.AttemptsConfig{Store: f.Store, Now: f.Now})
	return registration.New(registration.Config{Store: f.Store, Scope: registrationtest.Scope, Settings: registration.Settings{Hubs: registration.Records("hub-a.example")},
		Attempt: a.Add, Log: log, Now: f.Now}), a
}

func from(d registrationtest.Device, remote string) *registration.Request {
	r := request(d)
	r.Remote, r.Protocol, r.ClientVersion = remote, "mqtt", "sdk/1.0"
	return r
}

// An operator who asks and hangs up does not have the attempts of another scope lost that were to be written.
func TestAttemptsHangUp(t *testing.T) {
	f := registrationtest.NewFixture(t)
	s, log := attempted(t, f, nil)
	if _, err := s.Register(t.Context(), from(f.ByKey("own-key", f.OwnKey), "192.0.2.1:1002")); err != nil {
		t.Fatal(err)
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	_, _ = log.Of(gone, "another", "own-key")
	if all, err := log.Of(t.Context(), registrationtest.Scope, "own-key"); err != nil || len(all) != 1 {
		t.Errorf("%d attempts, %v", len(all), err)
	}
}

// What a device tried is there, newest first: what it came to, why, and with what; by the tracking ID that the device was told too.
// Another replica sees it.
func TestAttempts(t *testing.T) {
	f := registrationtest.NewFixture(t)
	s, log := attempted(t, f, nil)
	refused := func(req *registration.Request) *dps.Error {
		t.Helper()
		_, err := s.Register(t.Context(), req)
		e := new(dps.Error)
		if !errors.As(err, &e) {
			t.Fatalf("%s: %v", req.RegistrationID, err)
		}
		f.Advance(time.Minute)
		return e
	}
	first := refused(from(f.ByKey("own-key", []byte("another key of some length")), "192.0.2.1:1000"))
	again := refused(from(f.ByKey("OWN-KEY", []byte("another key of some length")), "192.0.2.1:1001"))
	if _, err := s.Register(t.Context(), from(f.ByKey("own-key", f.OwnKey), "192.0.2.1:1002")); err != nil {
		t.Fatal(err)
	}
	f.Advance(time.Minute)
	cert := attesttest.Leaf(t, nil, "own-key")
	req := from(f.ByKey("own-key", nil), "[2001:db8::1]:5")
	req.Proof = attest.Proof{Certificates: []*x509.Certificate{cert.Certificate}}
	kind := refused(req)

	if err := log.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	_, other := attempted(t, f, nil)
	all, err := other.Of(t.Context(), registrationtest.Scope, "Own-Key")
	if err != nil || len(all) != 3 {
		t.Fatalf("%d attempts, %v", len(all), err)
	}
	if a := all[0]; a.Result != "refused" || a.Rule != "kind" || a.TrackingID != kind.TrackingID || a.Code != 401002 || a.Proof != "x509" || a.Certificate.Subject != "CN=own-key" ||
		len(a.Certificate.Thumbprint) != 64 || a.Remote != "[2001:db8::1]:5" || a.Protocol != "mqtt" || a.ClientVersion != "sdk/1.0" || !strings.Contains(a.Reason, "does not attest by certificate") {
		t.Errorf("%+v", a)
	}
	if a := all[1]; a.Result != "assigned" || a.Hub != "hub-a.example" || a.Substatus != "initialAssignment" || a.OperationID == "" || a.TrackingID != "" || a.Class != registration.AttemptProven {
		t.Errorf("%+v", a)
	}
	if a := all[2]; a.Times != 2 || a.Rule != "signature" || a.TrackingID != again.TrackingID || a.At.Sub(a.First) != time.Minute || a.Proof != "symmetricKey" || a.Class != registration.AttemptKnown {
		t.Errorf("%+v", a)
	}
	if a, err := other.ByTracking(t.Context(), registrationtest.Scope, strings.ToUpper(again.TrackingID)); err != nil || a.Times != 2 {
		t.Errorf("by tracking ID: %+v, %v", a, err)
	}
	for scope, id := range map[string]string{registrationtest.Scope: first.TrackingID, "0neother": again.TrackingID} {
		if a, err := other.ByTracking(t.Context(), scope, id); !errors.Is(err, registration.ErrNotFound) {
			t.Errorf("%s in %s: %+v, %v", id, scope, a, err)
		}
	}
	if err := other.Erase(t.Context(), registrationtest.Scope, "own-key", registration.Actor{Name: "an operator"}); err != nil {
		t.Fatal(err)
	}
	if all, err = log.Of(t.Context(), registrationtest.Scope, "own-key"); err != nil || len(all) != 0 {
		t.Errorf("erased: %v, %v", all, err)
	}
	err = f.Store.View(t.Context(), func(tx registration.Tx) error {
		entries, err := tx.Audits(strings.ToLower(registrationtest.Scope), "", 10)
		entries = slices.DeleteFunc(entries, func(a *registration.Audit) bool { return a.Action != "erase" })
		if err == nil && (len(entries) != 1 || entries[0].Action != "erase" || entries[0].Object != "attempts/own-key" || entries[0].Actor != "an operator") {
			t.Errorf("audit: %+v", entries)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// Whatever rule a device is refused by, its operator is told what to do about it.
func TestRules(t *testing.T) {
	for _, rule := range registrationtest.Rules(t, ".") {
		if registration.AdviceOn(rule) == "" {
			t.Errorf("there is no advice on rule %q", rule)
		}
	}
}

// A device that is refused for ever does not push out its last success, and a stranger who knows its ID does not push out what it
// did itself.
func TestAttemptsOfOneDevice(t *testing.T) {
	f := registrationtest.NewFixture(t)
	_, log := attempted(t, f, nil)
	scope := strings.ToLower(registrationtest.Scope)
	add := func(remote, result, reason string) {
		f.Advance(time.Minute)
		log.Add(scope, &registration.Attempt{RegistrationID: "own-key", At: f.Now(), Operation: "register", Result: result, Reason: reason, Remote: remote, Proof: "none"})
	}
	add("192.0.2.1:1", "assigned", "")
	for i := range 3 {
		add("192.0.2.1:1", "refused", fmt.Sprint("mine ", i))
	}
	for i := range 200 {
		add("203.0.113.9:"+fmt.Sprint(1000+i), "refused", fmt.Sprint("a stranger's ", i))
		if i%20 == 0 {
			if err := log.Flush(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	}
	all, err := log.Of(t.Context(), scope, "own-key")
	var reasons []string
	for _, a := range all {
		reasons = append(reasons, a.Result+" "+a.Reason)
	}
	want := []string{"refused a stranger's 199", "refused a stranger's 198", "refused a stranger's 197", "refused a stranger's 196", "refused a stranger's 195",
		"refused mine 2", "refused mine 1", "refused mine 0", "assigned "}
	if err != nil || !slices.Equal(reasons, want) {
		t.Errorf("%q, %v", reasons, err)
	}
	// The same over and over is one entry an hour.
	for range 150 {
		add("192.0.2.1:7", "refused", "the same")
		if err := log.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if all, err = log.Of(t.Context(), scope, "own-key"); err != nil || all[0].Times != 30 || all[1].Times != 60 || all[2].Times != 60 || all[3].Reason == "the same" {
		t.Errorf("%+v, %v", all, err)
	}
}

// How many are kept of a device is the operator's to say: the last success is among them, and one address has half of them.
func TestAttemptsPerDevice(t *testing.T) {
	for most, want := range map[int]int{1: 1, 2: 2, 25: 14, 0: 6} { // the success, and of the refusals half, rounded up, as far as there is room
		f := registrationtest.NewFixture(t)
		log := registration.NewAttempts(registration.AttemptsConfig{Store: f.Store, Now: f.Now, PerDevice: most})
		scope := strings.ToLower(registrationtest.Scope)
		for i := range 60 {
			f.Advance(time.Minute)
			a := &registration.Attempt{RegistrationID: "own-key", At: f.Now(), Operation: "register", Result: "refused", Reason: fmt.Sprint(i), Remote: "192.0.2.1:1", Proof: "none"}
			if i == 0 {
				a.Result = "assigned"
			}
			log.Add(scope, a)
		}
		if all, err := log.Of(t.Context(), scope, "own-key"); err != nil || len(all) != want || all[len(all)-1].Result != "assigned" {
			t.Errorf("%d are to be kept: %d are, %v", most, len(all), err)
		}
	}
}

// What becomes of a registration at its hub completes its entry, whenever it comes; what ends none is none.
func TestAttemptsAtHubs(t *testing.T) {
	f := registrationtest.NewFixture(t)
	_, log := attempted(t, f, nil)
	scope := strings.ToLower(registrationtest.Scope)
	for i, outcome := range []string{"assigned", "failed"} {
		op := dps.NewUUID()
		log.Add(scope, &registration.Attempt{RegistrationID: "own-key", At: f.Now(), Operation: "register", Result: "assigning", Remote: "192.0.2.1:1", Proof: "symmetricKey", OperationID: op})
		if i == 0 { // in another flush
			if err := log.Flush(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		f.Advance(time.Second)
		for _, step := range []string{"retry", outcome} {
			p := registration.Provisioning{Scope: scope, RegistrationID: "own-key", Hub: "hub-a.example", Outcome: step, OperationID: op, Substatus: dps.InitialAssignment}
			if step == "failed" {
				p.Err = errors.New("the hub is full")
			}
			if a := p.Attempt(f.Now()); a != nil {
				log.Add(scope, a)
			}
		}
	}
	all, err := log.Of(t.Context(), scope, "own-key")
	if err != nil || len(all) != 2 {
		t.Fatalf("%+v, %v", all, err)
	}
	if a := all[1]; a.Result != "assigned" || a.Hub != "hub-a.example" || a.Substatus != string(dps.InitialAssignment) || a.Operation != "register" || a.Remote != "192.0.2.1:1" || a.Code != 0 {
		t.Errorf("%+v", a)
	}
	if a := all[0]; a.Result != "failed" || a.Code != dps.CodeHubRefused || a.Reason != "the hub is full" || a.Proof != "symmetricKey" {
		t.Errorf("%+v", a)
	}
}

// A flood of IDs that nobody enrolled costs a bounded number of rows, and memory stays flat; what else is on record stays.
func TestAttemptsFlood(t *testing.T) {
	f := registrationtest.NewFixture(t)
	lost := 0
	log := registration.NewAttempts(registration.AttemptsConfig{Store: f.Store, Now: f.Now, Keep: 2000, Lost: func(n int) { lost += n }})
	scope := strings.ToLower(registrationtest.Scope)
	one := func(id, remote, result string) *registration.Attempt {
		return &registration.Attempt{RegistrationID: id, At: f.Now(), Operation: "register", Result: result, Code: 401002, TrackingID: dps.NewUUID(), Reason: "no enrollment", Remote: remote,
			Proof: "symmetricKey"}
	}
	log.Add(scope, one("own-key", "192.0.2.1:1", "refused"))
	log.Add(scope, one("own-cert", "192.0.2.1:1", "assigned"))
	if err := log.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	heap := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	n := 0
	flood := func(rounds int) {
		for range rounds {
			f.Advance(time.Second)
			for range 3000 {
				n++
				log.Add(scope, one(fmt.Sprintf("made-up-%d", n), fmt.Sprintf("10.%d.%d.9:1", n%20, n%3), "refused"))
			}
			if err := log.Flush(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	}
	flood(3)
	before := heap()
	flood(12)
	if after := heap(); after > before+4<<20 {
		t.Errorf("%d octets in use, %d before", after, before)
	}
	if lost == 0 {
		t.Error("the whole flood was kept")
	}
	err := f.Store.View(t.Context(), func(tx registration.Tx) error {
		rows := 0
		for i := 1; i <= n; i++ {
			all, err := tx.Attempts(scope, fmt.Sprintf("made-up-%d", i))
			if err != nil {
				return err
			}
			if rows += len(all); len(all) > 0 && all[0].Class != registration.AttemptStranger {
				t.Fatalf("%+v", all[0])
			}
		}
		if rows == 0 || rows > 200+3*4096 { // the ring's tenth, and what comes until it is trimmed
			t.Errorf("%d rows of strangers", rows)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"own-key", "own-cert"} {
		if all, err := log.Of(t.Context(), scope, id); err != nil || len(all) != 1 {
			t.Errorf("%s: %v, %v", id, all, err)
		}
	}
}

// What is too old is forgotten; and an address can be kept as its network.
func TestAttemptsRetention(t *testing.T) {
	f := registrationtest.NewFixture(t)
	scope := strings.ToLower(registrationtest.Scope)
	_, _, err := registration.EditScope(t.Context(), f.Store, registrationtest.Scope, registration.Actor{}, "put", f.Now(), func(*registration.Scope) (*registration.Scope, error) {
		return &registration.Scope{ID: registrationtest.Scope, Name: "plant-a"}, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	log := registration.NewAttempts(registration.AttemptsConfig{Store: f.Store, Now: f.Now, Retention: 48 * time.Hour, Mask: true})
	for range 3 {
		log.Add(scope, &registration.Attempt{RegistrationID: "own-key", At: f.Now(), Operation: "register", Result: "assigned", OperationID: dps.NewUUID(), Remote: "192.0.2.77:1"})
		f.Advance(24*time.Hour + time.Minute)
	}
	all, err := log.Of(t.Context(), scope, "own-key")
	if err != nil || len(all) != 3 || all[0].Remote != "192.0.2.0" {
		t.Fatalf("%v, %v", all, err)
	}
	if err := log.Expire(t.Context()); err != nil {
		t.Fatal(err)
	}
	if all, err := log.Of(t.Context(), scope, "own-key"); err != nil || len(all) != 1 {
		t.Errorf("%v, %v", all, err)
	}
}

// The whole story of a device in sentences, and a decision on certificates without effect. No key of any enrollment is in it.
func TestDiagnose(t *testing.T) {
	f := registrationtest.NewFixture(t)
	var lines bytes.Buffer
	s, log := attempted(t, f, slog.New(slog.NewTextHandler(&lines, nil)))
	says := func(id string, chain []*x509.Certificate, want ...string) *registration.Diagnosis {
		t.Helper()
		d, err := s.Diagnose(t.Context(), id, log, chain)
		if err != nil {
			t.Fatal(err)
		}
		text := strings.Join(d.Explanation, "\n")
		for _, w := range want {
			if !strings.Contains(text, w) {
				t.Errorf("%s: no %q in\n%s", id, w, text)
			}
		}
		b, err := json.Marshal(d)
		if err != nil || bytes.Contains(b, []byte("null,\"attempts\":null")) {
			t.Errorf("%s, %v", b, err)
		}
		for _, secret := range []string{"Z2dnZ2dn", "a2tra2tr"} { // of the group's key, of the device's
			if bytes.Contains(b, []byte(secret)) {
				t.Errorf("%s is in %s", secret, b)
			}
		}
		return d
	}
	d := says("nobody-knows-it", nil, "no individual enrollment", "never registered", "No attempt", "ID scope, its endpoint")
	if d.Enrollment != nil || d.Registration != nil || len(d.Attempts) != 0 {
		t.Errorf("%+v", d)
	}
	if _, err := s.Register(t.Context(), from(f.ByKey("own-key", []byte("wrong wrong wrong")), "192.0.2.1:1")); err == nil {
		t.Fatal("let in")
	}
	d = says("own-key", nil, "individual enrollment, which is enabled and attests by symmetricKey", "refused with 401002", "signature does not verify", "primary or secondary key")
	if d.Enrollment.Kind != registration.Individual || d.Enrollment.Status != "enabled" || d.Attempts[0].Rule != "signature" {
		t.Errorf("%+v", d)
	}
	if _, err := s.Register(t.Context(), from(f.Derived("by-group"), "192.0.2.1:1")); err != nil {
		t.Fatal(err)
	}
	d = says("by-group", nil, `group "keys"`, "hub-a.example", `ended "assigned"`)
	if d.Registration.AssignedHub != "hub-a.example" || d.Enrollment.Kind != registration.Group || d.Attempts[0].Group != "keys" {
		t.Errorf("%+v", d)
	}
	// Certificates on trial.
	good := attesttest.Leaf(t, f.Mid, "on-trial")
	chain := []*x509.Certificate{good.Certificate, f.Mid.Certificate}
	if d := says("on-trial", chain, `would be let in now, by group "line"`); d.Trial.Result != "admitted" {
		t.Errorf("%+v", d.Trial)
	}
	if d := says("on-trial", chain[:1], "would be refused", "intermediate certificates"); d.Trial.Rule != "chain" {
		t.Errorf("%+v", d.Trial)
	}
	if d := says("another-name", chain, "would be refused", "common name"); d.Trial.Rule != "common-name" {
		t.Errorf("%+v", d.Trial)
	}
	if d := says("own-key", []*x509.Certificate{attesttest.Leaf(t, nil, "own-key").Certificate}, "attests in another way"); d.Trial.Rule != "kind" {
		t.Errorf("%+v", d.Trial)
	}
	f.Advance(100 * 365 * 24 * time.Hour)
	if d := says("on-trial", chain, "Look at the clock"); d.Trial.Rule != "validity" {
		t.Errorf("%+v", d.Trial)
	}
	// A trial left nothing behind.
	if d := says("on-trial", nil, "never registered", "No attempt"); d.Registration != nil {
		t.Errorf("%+v", d)
	}
	if _, err := s.Diagnose(t.Context(), "no such ID!", log, nil); dps.AsError(err).Code != dps.CodeInvalidArgument {
		t.Errorf("%v", err)
	}
}

// Service API, section 4.11: the profile azure holds what a scope has to the numbers of DPS, and none does not. Deleting makes room.
func TestQuotas(t *testing.T) {
	f := registrationtest.NewFixture(t) // it has one group of each kind
	profile := func(name string) {
		t.Helper()
		_, _, err := registration.EditScope(t.Context(), f.Store, registrationtest.Scope, registration.Actor{}, "put", f.Now(), func(sc *registration.Scope) (*registration.Scope, error) {
			if sc == nil {
				sc = &registration.Scope{ID: registrationtest.Scope, Name: "plant-a", Settings: registration.Settings{Hubs: registration.Records("hub-a.example")}}
			}
			sc.Quotas = name
			return sc, nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	profile("azure")
	put := func(i int) error {
		id := fmt.Sprintf("group-%d", i)
		b, _ := json.Marshal(dps.EnrollmentGroup{EnrollmentGroupID: id, Enrollment: registrationtest.Symmetric(bytes.Repeat([]byte{byte(i)}, 32), nil)})
		_, err := f.Service.PutEnrollment(t.Context(), registration.Actor{}, registration.Group, id, b, "")
		return err
	}
	for i := range 99 {
		if err := put(i); err != nil {
			t.Fatalf("group %d: %v", i+2, err)
		}
	}
	if e := dps.AsError(put(99)); e.Code != dps.CodeQuota || e.Code.Status() != 403 || !strings.Contains(e.Message, "100 symmetric-key groups") {
		t.Errorf("the 101st group: %v", e)
	}
	f.Put(t, registration.Group, "keys", registrationtest.Symmetric(f.GroupKey, nil)) // what is there may still be changed
	f.Put(t, registration.Individual, "one-more", registrationtest.Symmetric(f.GroupKey, nil))
	f.Put(t, registration.Group, "ca-2", registrationtest.Signers(attesttest.CA(t, nil, "second root"), nil)) // of another kind
	if err := f.Service.DeleteEnrollment(t.Context(), registration.Actor{}, registration.Group, "group-7", ""); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); ; {
		if err := put(99); err == nil {
			break
		} else if time.Now().After(deadline) { // the count may stand for a hundred times as long as it took
			t.Fatalf("deleting one made no room: %v", err)
		}
	}
	profile("none")
	if err := put(100); err != nil {
		t.Error(err)
	}
	for name, hubs := range map[string]int{"azure": 51, "none": 1001, "plenty": 1} {
		sc := &registration.Scope{ID: "0neX", Name: "plant-x"}
		sc.Quotas = name
		for i := range hubs {
			sc.Hubs = append(sc.Hubs, registration.LinkedHub{Name: fmt.Sprintf("hub-%d.example", i)})
		}
		if err := registration.CheckScope(sc); err == nil {
			t.Errorf("%s with %d hubs is taken", name, hubs)
		}
	}
}
