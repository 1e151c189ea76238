package serviceapi_test

import (
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"strings"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/dps"
	operators "github.com/touchmark/touchmark/pkg/operator"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

// calls is the operators' own client, in front of the doors: its clock is this machine's, and theirs stands.
func (d *service) calls(t testing.TB, o *operator) *operators.Client {
	t.Helper()
	front := httptest.NewTLSServer(&httputil.ReverseProxy{Transport: o.c.Transport, Rewrite: func(r *httputil.ProxyRequest) {
		r.Out.URL.Scheme, r.Out.URL.Host, r.Out.Host = "https", o.host, o.host
	}})
	t.Cleanup(front.Close)
	cn, err := operators.ParseConnection("HostName=" + front.Listener.Addr().String() + ";SharedAccessSignature=" + o.token)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(front.Certificate())
	return operators.New(operators.Config{Connection: cn, Roots: roots})
}

// admits registers a device, which must be let in.
func (d *service) admits(t testing.TB, dev registrationtest.Device) {
	t.Helper()
	if s := d.register(t, dev); !strings.Contains(s, `"assigned"`) {
		t.Fatalf("%s: %s", dev.ID, s)
	}
}

// uses says of every device of a roll-over's group what it came in with.
func uses(t testing.TB, r *operators.Roll) string {
	t.Helper()
	slots := make(map[string]string)
	if told, err := r.Uses(t.Context(), func(u operators.Use) error { slots[u.RegistrationID] = u.Slot; return nil }); err != nil || !told {
		t.Fatalf("told %t, %v", told, err)
	}
	return strings.Trim(fmt.Sprint(slots), "map[]")
}

// Who rolls a group's key or CA over sees which devices still use the old one: whatever the CAs are called, whatever is between CA and
// device, and however long ago the device came.
func TestRolls(t *testing.T) {
	d, o := newOperator(t)
	c, ctx := d.calls(t, o), t.Context()
	next := func(r *operators.Roll, state operators.RollState) {
		t.Helper()
		if err := r.Next(ctx); err != nil || r.State != state {
			t.Fatalf("%s, %v", r.State, err)
		}
	}
	is := func(r *operators.Roll, want string) {
		t.Helper()
		if got := uses(t, r); got != want {
			t.Errorf("%s %s: %s\nwant %s", r.Group, r.State, got, want)
		}
	}

	newKey := []byte(strings.Repeat("n", 64))
	derived := func(key []byte, id string) registrationtest.Device { return d.ByKey(id, attest.DeriveKey(key, id)) }
	d.admits(t, d.Derived("Old"))
	d.admits(t, d.Derived("moves"))
	d.admits(t, derived([]byte(strings.Repeat("s", 32)), "second"))
	roll, err := c.RollKey(ctx, "keys", base64.StdEncoding.EncodeToString(newKey))
	if err != nil || roll.Slot() != operators.SlotSecondary {
		t.Fatal(roll, err)
	}
	is(roll, "Old:primary moves:primary second:secondary")
	next(roll, operators.RollWaiting)
	d.admits(t, derived(newKey, "moves"))
	d.admits(t, derived(newKey, "new"))
	is(roll, "Old:primary moves:secondary new:secondary second:former")
	d.admits(t, d.Derived("moves")) // back again: what came last counts
	is(roll, "Old:primary moves:primary new:secondary second:former")
	d.admits(t, derived(newKey, "moves"))
	d.admits(t, derived(newKey, "Old"))
	is(roll, "Old:secondary moves:secondary new:secondary second:former")
	if err := roll.Next(ctx); !errors.Is(err, operators.ErrChanged) {
		t.Errorf("a step from what was looked at before the last one: %v", err)
	}
	if roll, err = c.RollKey(ctx, "KEYS", base64.StdEncoding.EncodeToString(newKey)); err != nil {
		t.Fatal(err)
	}
	next(roll, operators.RollDone)
	is(roll, "Old:both moves:both new:both second:former")
	diag, err := c.Diagnosis(ctx, "second", nil)
	if err != nil || *diag.Admitted != (operators.Admitted{Kind: "key", Slot: "former", Was: "secondary"}) || !strings.Contains(strings.Join(diag.Explanation, " "), "let in last by a key that was secondary then") {
		t.Errorf("%+v, %v", diag, err)
	}

	// Two CAs of one name, and a device below an intermediate.
	byCA := func(ca *attesttest.Holder, id string, chain ...*attesttest.Holder) {
		t.Helper()
		d.admits(t, registrationtest.ByCertificate(id, attesttest.Leaf(t, ca, id).TLS(chain...)))
	}
	first, second := attesttest.CA(t, nil, "plant"), attesttest.CA(t, nil, "plant")
	below, belowNew := attesttest.CA(t, first, "line 1"), attesttest.CA(t, second, "line 1")
	d.Put(t, registration.Group, "cas", registrationtest.Signers(first, nil))
	if roll, err = c.RollCA(ctx, "cas", &dps.X509Certificate{Certificate: second.Base64()}); err != nil {
		t.Fatal(err)
	}
	byCA(first, "by-first")
	next(roll, operators.RollWaiting)
	byCA(second, "by-second")
	byCA(below, "below-first", below)
	byCA(belowNew, "below-second", belowNew)
	is(roll, "below-first:primary below-second:secondary by-first:primary by-second:secondary")
	if roll, err = c.RollCA(ctx, "cas", &dps.X509Certificate{Certificate: second.Base64()}); err != nil {
		t.Fatal(err)
	}
	next(roll, operators.RollDone)
	is(roll, "below-first:former below-second:both by-first:former by-second:both")

	// A renewed CA is the same one: nobody has to be moved.
	ca := attesttest.CA(t, nil, "renewed")
	d.Put(t, registration.Group, "renewed", registrationtest.Signers(ca, nil))
	byCA(ca, "by-renewed")
	if roll, err = c.RollCA(ctx, "renewed", &dps.X509Certificate{Certificate: attesttest.Cross(t, nil, ca).Base64()}); err != nil {
		t.Fatal(err)
	}
	is(roll, "by-renewed:both") // the service puts the only CA into both slots, as Azure does
	next(roll, operators.RollWaiting)
	is(roll, "by-renewed:both")
	later := attesttest.Cross(t, nil, ca, func(c *x509.Certificate) { c.NotBefore = attesttest.Now.Add(30 * time.Minute) })
	d.Put(t, registration.Group, "renewed", registrationtest.Signers(ca, later))
	is(roll, "by-renewed:primary") // nobody comes in by the new certificate yet

	// CAs that the group has by their names at the service.
	svc := registration.New(registration.Config{Store: d.Store, Scope: registrationtest.Scope, Now: d.Now})
	one, two, yes := attesttest.CA(t, nil, "one"), attesttest.CA(t, nil, "two"), true
	for name, ca := range map[string]*attesttest.Holder{"One": one, "Two": two} {
		if _, err := svc.PutCACertificate(ctx, start, name, ca.Base64(), &yes, ""); err != nil {
			t.Fatal(err)
		}
	}
	d.Put(t, registration.Group, "named", dps.Enrollment{Attestation: &dps.Attestation{Type: dps.AttestationX509, X509: &dps.X509Attestation{CAReferences: &dps.CAReferences{Primary: "One"}}}})
	byCA(one, "by-one")
	if _, err := c.RollCA(ctx, "named", &dps.X509Certificate{Certificate: second.Base64()}); !errors.Is(err, operators.ErrCAByName) {
		t.Error(err)
	}
	if _, err := c.RollCAName(ctx, "cas", "two"); !errors.Is(err, operators.ErrCAByCertificate) {
		t.Error(err)
	}
	for _, want := range []struct {
		state operators.RollState
		uses  string
	}{{operators.RollFresh, "by-one:primary"}, {operators.RollWaiting, "by-one:primary by-two:secondary"}, {operators.RollDone, "by-one:former by-two:both"}} {
		if roll, err = c.RollCAName(ctx, "named", "two"); err != nil || roll.State != want.state {
			t.Fatal(roll, err)
		}
		if want.state == operators.RollWaiting {
			byCA(two, "by-two")
		}
		is(roll, want.uses)
		if err := roll.Next(ctx); err != nil {
			t.Fatal(err)
		}
	}

	// A renewed CA that nobody has verified yet does not take the place of the old one.
	no := false
	if _, err := svc.PutCACertificate(ctx, start, "renewed", attesttest.Cross(t, nil, two).Base64(), &no, ""); err != nil {
		t.Fatal(err)
	}
	if roll, err = c.RollCAName(ctx, "named", "renewed"); err != nil {
		t.Fatal(err)
	}
	next(roll, operators.RollWaiting)
	is(roll, "by-one:former by-two:primary")
	if _, err := svc.PutCACertificate(ctx, start, "renewed", attesttest.Cross(t, nil, two).Base64(), &yes, "*"); err != nil {
		t.Fatal(err)
	}
	is(roll, "by-one:former by-two:both")

	// Enrollments of devices' own have slots as well.
	d.admits(t, d.ByKey("own-key", d.OtherKey))
	if diag, err = c.Diagnosis(ctx, "own-key", nil); err != nil || *diag.Admitted != (operators.Admitted{Kind: "key", Slot: "secondary", Was: "secondary"}) {
		t.Errorf("%+v, %v", diag, err)
	}
	d.admits(t, registrationtest.ByCertificate("own-cert", d.Own.TLS()))
	if diag, err = c.Diagnosis(ctx, "own-cert", nil); err != nil || *diag.Admitted != (operators.Admitted{Kind: "certificate", Slot: "both", Was: "primary"}) {
		t.Errorf("%+v, %v", diag, err)
	}

	// Pages, and what is in them: no fingerprint of a key.
	var all []string
	for token := ""; ; {
		res, b := o.call(t, http.MethodGet, "/touchmark/groups/keys/devices", "", "X-Ms-Max-Item-Count: 3", "X-Ms-Continuation: "+token)
		var page []map[string]any
		if err := json.Unmarshal(b, &page); err != nil || res.StatusCode != http.StatusOK || len(page) > 3 {
			t.Fatalf("%d %s", res.StatusCode, b)
		}
		for _, dev := range page {
			all = append(all, dev["registrationId"].(string))
			if by := dev["admitted"].(map[string]any); len(by) != 3 || len(dev) != 4 {
				t.Errorf("%v", dev)
			}
		}
		if token = res.Header.Get("X-Ms-Continuation"); token == "" {
			break
		}
	}
	if fmt.Sprint(all) != "[moves new Old second]" {
		t.Error(all)
	}
	o.want(t, http.StatusNotFound, dps.CodeNoGroup, http.MethodGet, "/touchmark/groups/nobody/devices", "")
}

// What let a device in is kept with its registration, and not with its attempts, which are forgotten after a month. Of a registration
// that is older than that it is unknown until the device comes again.
func TestRollOfLongAgo(t *testing.T) {
	d, o := newOperator(t)
	c, ctx, ahead := d.calls(t, o), t.Context(), time.Duration(0)
	log := registration.NewAttempts(registration.AttemptsConfig{Store: d.Store, Now: func() time.Time { return d.Now().Add(ahead) }})
	svc := registration.New(registration.Config{Store: d.Store, Scope: registrationtest.Scope, Now: d.Now, Attempt: log.Add})
	for _, id := range []string{"early", "older"} {
		dev := d.Derived(id)
		if _, err := svc.Register(ctx, &registration.Request{IDScope: dev.Scope, RegistrationID: id, APIVersion: dev.APIVersion, Proof: attest.Proof{Token: dev.Token}}); err != nil {
			t.Fatal(err)
		}
	}
	attempts := func() []*registration.Attempt {
		all, err := log.Of(ctx, registrationtest.Scope, "early")
		if err != nil {
			t.Fatal(err)
		}
		return all
	}
	if all := attempts(); len(all) != 1 || all[0].Slot != "primary" {
		t.Errorf("%+v", all)
	}
	ahead = 400 * 24 * time.Hour
	if err := log.Expire(ctx); err != nil {
		t.Fatal(err)
	}
	if all := attempts(); len(all) != 0 {
		t.Fatalf("%d attempts are kept for more than a year", len(all))
	}
	if err := d.Store.Update(context.Background(), func(tx registration.Tx) error {
		r, err := tx.Registration(dps.Fold(registrationtest.Scope), "older")
		if err != nil {
			return err
		}
		r.Admitted = nil
		return tx.PutRegistration(dps.Fold(registrationtest.Scope), r)
	}); err != nil {
		t.Fatal(err)
	}
	roll, err := c.RollKey(ctx, "keys", base64.StdEncoding.EncodeToString([]byte(strings.Repeat("n", 64))))
	if err != nil {
		t.Fatal(err)
	}
	if got := uses(t, roll); got != "early:primary older:unknown" {
		t.Error(got)
	}
	d.admits(t, d.Derived("older"))
	if got := uses(t, roll); got != "early:primary older:primary" {
		t.Error(got)
	}
}
