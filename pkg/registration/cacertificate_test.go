package registration_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

var operator = registration.Actor{Name: "test"}

func references(primary, secondary string) dps.Enrollment {
	return dps.Enrollment{Attestation: &dps.Attestation{Type: dps.AttestationX509, X509: &dps.X509Attestation{CAReferences: &dps.CAReferences{Primary: primary, Secondary: secondary}}}}
}

// putCA puts a certificate into the fixture's scope, or replaces it, and says whether it is verified.
func putCA(t testing.TB, s *registration.Service, name string, ca *holder, verified bool) {
	t.Helper()
	match := ""
	if _, err := s.CACertificate(t.Context(), name); err == nil {
		match = "*"
	}
	if _, err := s.PutCACertificate(t.Context(), operator, name, ca.Base64(), &verified, match); err != nil {
		t.Fatal(err)
	}
}

// A group that refers to certificates of the scope admits whom they vouch for while they are verified, and nobody else; every
// change of a certificate is seen with the next request, by every replica. DPS-S 84.
func TestReferences(t *testing.T) {
	f := registrationtest.NewFixture(t, "a.example")
	var log bytes.Buffer
	logged := registration.New(registration.Config{Store: f.Store, Scope: registrationtest.Scope, Settings: registration.Settings{Hubs: registration.Records("a.example")},
		Now: f.Now, Log: slog.New(slog.NewTextHandler(&log, nil))})
	one, two := attesttest.CA(t, nil, "one"), attesttest.CA(t, nil, "two")
	low := attesttest.CA(t, f.Root, "low") // below a group that would admit its devices
	putCA(t, f.Service, "One", one, false)
	putCA(t, f.Service, "low", low, true)
	f.Put(t, registration.Group, "by-name", references("ONE", ""))
	f.Put(t, registration.Group, "low", references("low", ""))
	device := byChain(attesttest.Leaf(t, one, "dev-1"))
	rule := func(what, want string) {
		t.Helper()
		if _, err := logged.Register(t.Context(), device); registration.RuleOf(err) != want {
			t.Errorf("%s: refused by rule %q, not %q", what, registration.RuleOf(err), want)
		}
	}
	check := func(what, want string) {
		t.Helper()
		for i, s := range []*registration.Service{f.Service, logged} {
			if got := outcome(t, s, device); got != want {
				t.Errorf("%s, replica %d: %s, not %s", what, i, got, want)
			}
		}
	}
	check("not verified", "401002")
	rule("not verified", "ca-unverified")
	if !strings.Contains(log.String(), "CA certificate not found: certificate \\\"One\\\" is not verified") {
		t.Errorf("the log does not say why: %s", log.String())
	}
	putCA(t, f.Service, "one", one, true)
	check("verified", "assigned")
	putCA(t, f.Service, "one", one, false)
	check("not any more", "401002")
	putCA(t, f.Service, "one", two, true)
	check("another certificate of that name", "401002")
	if got := outcome(t, f.Service, byChain(attesttest.Leaf(t, two, "dev-2"))); got != "assigned" {
		t.Errorf("below the other one: %s", got)
	}
	putCA(t, f.Service, "one", one, true)
	check("back again", "assigned")
	if err := f.Service.DeleteCACertificate(t.Context(), operator, "one", "*"); err != nil {
		t.Fatal(err)
	}
	rule("deleted", "ca-missing")
	check("deleted", "401002")
	// What the group refers to may be gone, and it is still read and written, shows no certificate, and can be disabled.
	got, err := f.Service.GetEnrollment(t.Context(), registration.Group, "by-name")
	if err != nil {
		t.Fatal(err)
	}
	if x := got.(*dps.EnrollmentGroup).Attestation.X509; x.SigningCertificates != nil || x.CAReferences.Primary != "ONE" {
		t.Errorf("it shows %+v", x)
	}
	f.Put(t, registration.Group, "by-name", references("one", ""))
	check("the group written again", "401002")
	if _, err := f.Service.CloseGroup(t.Context(), operator, "by-name", true); err != nil {
		t.Fatal(err)
	}
	putCA(t, f.Service, "one", one, true)
	check("there again, the group closed", "401002")
	if _, err := f.Service.CloseGroup(t.Context(), operator, "by-name", false); err != nil {
		t.Fatal(err)
	}
	check("opened", "assigned")
	putCA(t, f.Service, "one", one, false)
	check("closed and opened, it is still referred to", "401002")

	// An intermediate that is not verified keeps its devices from the group above, too.
	below := byChain(attesttest.Leaf(t, low, "dev-3"), low)
	if got := outcome(t, f.Service, below); got != "assigned" {
		t.Errorf("below low: %s", got)
	}
	putCA(t, f.Service, "low", low, false)
	if got := outcome(t, f.Service, below); got != "401002" {
		t.Errorf("below low, which is not verified: %s", got)
	}
	if err := f.Service.DeleteEnrollment(t.Context(), operator, registration.Group, "low", ""); err != nil {
		t.Fatal(err)
	}
	if got := outcome(t, f.Service, below); got != "assigned" {
		t.Errorf("without a group of its own: %s", got)
	}

	// Two names, one rolled while the other stays.
	putCA(t, f.Service, "one", one, true)
	putCA(t, f.Service, "two", two, true)
	f.Put(t, registration.Group, "by-name", references("one", "two"))
	check("primary", "assigned")
	putCA(t, f.Service, "one", one, false)
	check("primary not verified", "401002")
	if got := outcome(t, f.Service, byChain(attesttest.Leaf(t, two, "dev-2"))); got != "assigned" {
		t.Errorf("secondary: %s", got)
	}

	for name, x := range map[string]struct {
		kind registration.Kind
		in   dps.Enrollment
	}{
		"nothing there":           {registration.Group, references("nobody", "")},
		"one there, one not":      {registration.Group, references("one", "nobody")},
		"no name":                 {registration.Group, references("", "")},
		"a bad name":              {registration.Group, references("a/b", "")},
		"an individual":           {registration.Individual, references("one", "")},
		"another group's already": {registration.Group, references("two", "")},
	} {
		doc := `{"registrationId":"x","attestation":`
		if x.kind == registration.Group {
			doc = `{"enrollmentGroupId":"x","attestation":`
		}
		a, err := dps.Marshal(x.in.Attestation)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.Service.PutEnrollment(t.Context(), operator, x.kind, "x", []byte(doc+string(a)+"}"), ""); dps.AsError(err).Code != dps.CodeInvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
	// A certificate cannot become the one of another enrollment under a group's feet.
	match, yes := "*", true
	if _, err := f.Service.PutCACertificate(t.Context(), operator, "two", f.Root.Base64(), &yes, match); dps.AsError(err).Code != dps.CodeInvalidArgument {
		t.Errorf("the CA of another group: %v", err)
	}
	if got := outcome(t, f.Service, byChain(attesttest.Leaf(t, two, "dev-2"))); got != "assigned" {
		t.Errorf("after that: %s", got)
	}
}

// A device never gets in by a certificate whose verification was taken back before it asked, while others change it all the time.
func TestReferencesRace(t *testing.T) {
	f := registrationtest.NewFixture(t, "a.example")
	ca := attesttest.CA(t, nil, "ca")
	putCA(t, f.Service, "ca", ca, false)
	f.Put(t, registration.Group, "by-name", references("ca", ""))
	replica := f.Replica("a.example")
	for i := range 20 {
		var wg sync.WaitGroup
		for _, s := range []*registration.Service{f.Service, replica} {
			wg.Go(func() { outcome(t, s, byChain(attesttest.Leaf(t, ca, "racer"))) })
		}
		verified := i%2 == 0
		if _, err := f.Service.PutCACertificate(context.Background(), operator, "ca", ca.Base64(), &verified, "*"); err != nil {
			t.Error(err)
		}
		if got := outcome(t, replica, byChain(attesttest.Leaf(t, ca, "late"))); (got == "assigned") != verified {
			t.Errorf("verified %t: %s", verified, got)
		}
		wg.Wait()
	}
}

// Settings.StrictRoots: a group's CA counts where its chain goes on to a verified certificate of the scope. DPS-S 84.
func TestStrictRoots(t *testing.T) {
	f := registrationtest.NewFixture(t, "a.example")
	root, stranger := attesttest.CA(t, nil, "strict root"), attesttest.CA(t, nil, "stranger")
	mid := attesttest.CA(t, root, "strict mid")
	low := attesttest.CA(t, mid, "strict low")
	f.Put(t, registration.Group, "low", registrationtest.Signers(low, nil))
	f.Put(t, registration.Group, "stranger", registrationtest.Signers(stranger, nil))
	strict := func(on bool) {
		t.Helper()
		if _, _, err := registration.EditScope(t.Context(), f.Store, registrationtest.Scope, operator, "put", f.Now(), func(sc *registration.Scope) (*registration.Scope, error) {
			if sc == nil {
				sc = &registration.Scope{ID: registrationtest.Scope, Name: "strict", Settings: registration.Settings{Hubs: registration.Records("a.example")}}
			}
			sc.StrictRoots = on
			return sc, nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	stored := registration.New(registration.Config{Store: f.Store, Scope: registrationtest.Scope, Now: f.Now, Intermediates: []*x509.Certificate{mid.Certificate}})
	leaf := attesttest.Leaf(t, low, "dev-1")
	whole, short := byChain(leaf, low, mid, root), byChain(leaf, low)
	check := func(what string, s *registration.Service, req *registration.Request, want string) {
		t.Helper()
		if got := outcome(t, s, req); got != want {
			t.Errorf("%s: %s, not %s", what, got, want)
		}
	}
	by := func(what string, req *registration.Request, want string) {
		t.Helper()
		if _, err := f.Service.Register(t.Context(), req); registration.RuleOf(err) != want {
			t.Errorf("%s: refused by rule %q, not %q: %v", what, registration.RuleOf(err), want, err)
		}
	}
	strict(false)
	check("not strict", f.Service, short, "assigned")
	strict(true)
	check("no root", f.Service, whole, "401002")
	by("no root", whole, "ca-missing")
	putCA(t, f.Service, "root", root, false)
	check("a root that is not verified", f.Service, whole, "401002")
	by("a root that is not verified", whole, "ca-unverified")
	by("a gap below it", short, "ca-missing")
	putCA(t, f.Service, "root", root, true)
	check("the whole chain", f.Service, whole, "assigned")
	check("a gap", f.Service, short, "401002")
	check("the gap stored", stored, short, "assigned")
	check("another CA", f.Service, byChain(attesttest.Leaf(t, stranger, "dev-2")), "401002")
	check("another CA, beside the root", f.Service, byChain(attesttest.Leaf(t, stranger, "dev-2"), root, mid), "401002")
	putCA(t, f.Service, "root", root, false)
	check("the root taken back", f.Service, whole, "401002")
	putCA(t, f.Service, "mid", mid, true)
	check("a verified intermediate", f.Service, whole, "assigned")
	if err := f.Service.DeleteCACertificate(t.Context(), operator, "mid", "*"); err != nil {
		t.Fatal(err)
	}
	check("deleted", f.Service, whole, "401002")
	putCA(t, f.Service, "low", low, true)
	check("the group's own CA", f.Service, short, "assigned")
	soon := attesttest.Leaf(t, low, "dev-3", func(c *x509.Certificate) { c.NotBefore = attesttest.Now.Add(time.Minute) })
	check("valid in a moment", f.Service, byChain(soon, low), "assigned")
	strict(false)
	check("not strict again", f.Service, byChain(attesttest.Leaf(t, stranger, "dev-2")), "assigned")
}

// The same certificate serves several scopes, each with its own word on whether it is verified.
func TestCertificateOfTwoScopes(t *testing.T) {
	f := registrationtest.NewFixture(t, "a.example")
	other := registration.New(registration.Config{Store: f.Store, Scope: "0neOTHER", Settings: registration.Settings{Hubs: registration.Records("a.example")}, Now: f.Now})
	ca := attesttest.CA(t, nil, "ca")
	for _, s := range []*registration.Service{f.Service, other} {
		putCA(t, s, "ca", ca, s == other)
		doc := `{"enrollmentGroupId":"g","attestation":{"type":"x509","x509":{"caReferences":{"primary":"ca"}}}}`
		if _, err := s.PutEnrollment(t.Context(), operator, registration.Group, "g", []byte(doc), ""); err != nil {
			t.Fatal(err)
		}
	}
	req := byChain(attesttest.Leaf(t, ca, "dev-1"))
	if got := outcome(t, f.Service, req); got != "401002" {
		t.Errorf("not verified here: %s", got)
	}
	req.IDScope = other.Scope()
	if got := outcome(t, other, req); got != "assigned" {
		t.Errorf("verified there: %s", got)
	}
}
