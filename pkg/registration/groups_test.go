package registration_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"runtime"
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
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

type holder = attesttest.Holder

// byChain is what a door makes of a device with a certificate.
func byChain(chain ...*holder) *registration.Request {
	r := &registration.Request{IDScope: registrationtest.Scope, RegistrationID: chain[0].Certificate.Subject.CommonName, APIVersion: "2019-03-31"}
	for _, h := range chain {
		r.Proof.Certificates = append(r.Proof.Certificates, h.Certificate)
	}
	return r
}

// outcome is what a register call comes to: the group, the status where there is none, or the error's code.
func outcome(t testing.TB, s *registration.Service, req *registration.Request) string {
	t.Helper()
	op, err := s.Register(t.Context(), req)
	if err == nil {
		op, err = s.Status(t.Context(), req, op.OperationID)
	}
	if err != nil {
		return fmt.Sprint(int(dps.AsError(err).Code))
	}
	if g := op.RegistrationState.SymmetricKey; g != nil {
		return g.EnrollmentGroupID
	}
	return string(op.RegistrationState.Status)
}

func disabled(e dps.Enrollment) dps.Enrollment {
	e.ProvisioningStatus = dps.EnrollmentDisabled
	return e
}

func clients(primary, secondary *holder) dps.Enrollment {
	c := &dps.X509Certificates{Primary: &dps.X509Certificate{Certificate: primary.Base64()}}
	if secondary != nil {
		c.Secondary = &dps.X509Certificate{Certificate: secondary.Base64()}
	}
	return dps.Enrollment{Attestation: &dps.Attestation{Type: dps.AttestationX509, X509: &dps.X509Attestation{ClientCertificates: c}}}
}

// Device API, sections 7.3 and 7.4, with the store behind them; what makes a good chain is in package attest's tests. DPS-D
// 41, 42, 45, 46.
func TestCertificates(t *testing.T) {
	f := registrationtest.NewFixture(t, "a.example")
	late := func(c *x509.Certificate) { c.NotAfter = attesttest.Now.Add(-time.Second) }
	one, two, gone := attesttest.Leaf(t, nil, "rolled"), attesttest.Leaf(t, nil, "rolled"), attesttest.Leaf(t, nil, "rolled", late)
	f.Put(t, registration.Individual, "rolled", clients(one, two))
	f.Put(t, registration.Individual, "other", disabled(clients(attesttest.Leaf(t, f.Root, "named"), nil)))
	named := attesttest.Leaf(t, f.Root, "named")
	f.Put(t, registration.Individual, "another", disabled(clients(named, nil)))
	f.Put(t, registration.Individual, "off", disabled(clients(attesttest.Leaf(t, nil, "off"), nil)))

	oldCA, newCA := attesttest.CA(t, nil, "rolling", late), attesttest.CA(t, nil, "rolling")
	f.Put(t, registration.Group, "rolling", registrationtest.Signers(oldCA, newCA))
	renewed := attesttest.CA(t, nil, "renewed", late)
	f.Put(t, registration.Group, "renewed", registrationtest.Signers(renewed, attesttest.Cross(t, nil, renewed)))

	low := attesttest.CA(t, f.Mid, "low")
	off := attesttest.CA(t, f.Root, "off")
	f.Put(t, registration.Group, "off", disabled(registrationtest.Signers(off, nil)))
	elsewhere := attesttest.CA(t, nil, "elsewhere")
	f.Put(t, registration.Group, "elsewhere", registrationtest.Signers(elsewhere, nil))
	stored := registration.New(registration.Config{Store: f.Store, Scope: registrationtest.Scope, Settings: registration.Settings{Hubs: registration.Records("a.example")}, Now: f.Now,
		Intermediates: []*x509.Certificate{f.Mid.Certificate, low.Certificate, f.Own.Certificate}})

	for name, x := range map[string]struct {
		service *registration.Service
		chain   []*holder
		want    string
	}{
		"primary leaf":                            {f.Service, []*holder{one}, "assigned"},
		"secondary leaf":                          {f.Service, []*holder{two}, "assigned"},
		"neither":                                 {f.Service, []*holder{gone}, "401002"},
		"of a group, and named by an enrollment":  {f.Service, []*holder{attesttest.Leaf(t, f.Root, "rolled")}, "401002"},
		"the new CA, the old one has expired":     {f.Service, []*holder{attesttest.Leaf(t, newCA, "dev-1")}, "assigned"},
		"the old CA":                              {f.Service, []*holder{attesttest.Leaf(t, oldCA, "dev-1")}, "401002"},
		"a renewed CA":                            {f.Service, []*holder{attesttest.Leaf(t, renewed, "dev-1")}, "assigned"},
		"intermediates stored":                    {stored, []*holder{attesttest.Leaf(t, low, "dev-2")}, "assigned"},
		"intermediates not stored":                {f.Service, []*holder{attesttest.Leaf(t, low, "dev-2")}, "401002"},
		"stored, and of no group":                 {stored, []*holder{attesttest.Leaf(t, attesttest.CA(t, nil, "low"), "dev-2")}, "401002"},
		"blocked by its name":                     {f.Service, []*holder{attesttest.Leaf(t, f.Root, "off")}, "disabled"},
		"blocked, and of no group":                {f.Service, []*holder{attesttest.Leaf(t, attesttest.CA(t, nil, "x"), "off")}, "401002"},
		"named in a disabled enrollment":          {f.Service, []*holder{named}, "401002"},
		"another certificate of that name":        {f.Service, []*holder{attesttest.Leaf(t, f.Root, "named")}, "assigned"},
		"disabled below enabled":                  {f.Service, []*holder{attesttest.Leaf(t, off, "dev-3"), off}, "401002"},
		"disabled, the key certified elsewhere":   {f.Service, []*holder{attesttest.Leaf(t, off, "dev-3"), attesttest.Cross(t, elsewhere, off)}, "401002"},
		"beside it, another key of the CA's name": {f.Service, []*holder{attesttest.Leaf(t, attesttest.CA(t, elsewhere, "off"), "dev-3")}, "401002"},
	} {
		if got := outcome(t, x.service, byChain(x.chain...)); got != x.want {
			t.Errorf("%s: %s", name, got)
		}
	}
	between := attesttest.CA(t, elsewhere, "off")
	if got := outcome(t, f.Service, byChain(attesttest.Leaf(t, between, "dev-3"), between)); got != "assigned" {
		t.Errorf("another key of the disabled CA's name, with its intermediate: %s", got)
	}
	// The operator disables the enrollment that names a certificate while its device is being judged.
	mine := attesttest.Leaf(t, f.Root, "mine")
	f.Put(t, registration.Individual, "names-mine", clients(mine, nil))
	s := registration.New(registration.Config{Store: &hook{f.Store, func() { f.Put(t, registration.Individual, "names-mine", disabled(clients(mine, nil))) }},
		Scope: registrationtest.Scope, Settings: registration.Settings{Hubs: registration.Records("a.example")}, Now: f.Now})
	if got := outcome(t, s, byChain(mine)); got != "401002" {
		t.Errorf("disabled meanwhile: %s", got)
	}
}

// Groups with one CA name are told apart by key, and two with one name and key are not taken.
func TestSameNames(t *testing.T) {
	f := registrationtest.NewFixture(t, "a.example")
	var cas []*holder
	for i := range 40 {
		cas = append(cas, attesttest.CA(t, nil, "the CA"))
		e := registrationtest.Signers(cas[i], nil)
		if i%2 == 1 {
			e = disabled(e)
		}
		f.Put(t, registration.Group, fmt.Sprint("g-", i), e)
	}
	for i, ca := range cas {
		want := []string{"assigned", "401002"}[i%2]
		if got := outcome(t, f.Service, byChain(attesttest.Leaf(t, ca, "dev-1"))); got != want {
			t.Errorf("group %d: %s", i, got)
		}
		if page, _, err := f.Service.QueryRegistrations(t.Context(), fmt.Sprint("g-", i), registration.Page{Limit: 10}); err != nil || i%2 == 0 && len(page) != 1 {
			t.Errorf("group %d has %d devices, %v", i, len(page), err)
		}
	}
	if got := outcome(t, f.Service, byChain(attesttest.Leaf(t, attesttest.CA(t, nil, "the CA"), "dev-1"))); got != "401002" {
		t.Errorf("a forty-first CA of the name: %s", got)
	}
	put := func(id string, e dps.Enrollment) error {
		b, err := json.Marshal(dps.EnrollmentGroup{EnrollmentGroupID: id, Enrollment: e})
		if err != nil {
			t.Fatal(err)
		}
		_, err = f.Service.PutEnrollment(t.Context(), registration.Actor{}, registration.Group, id, b, "")
		return err
	}
	for name, e := range map[string]dps.Enrollment{
		"renewed":           registrationtest.Signers(attesttest.Cross(t, nil, cas[0]), nil),
		"certified by Root": registrationtest.Signers(attesttest.Cross(t, f.Root, cas[0]), nil),
		"as a second one":   registrationtest.Signers(attesttest.CA(t, nil, "x"), attesttest.Cross(t, nil, cas[1])),
	} {
		if err := put("new", e); dps.AsError(err).Code != dps.CodeInvalidArgument || !strings.Contains(err.Error(), "name and the key of one of enrollment group g-") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := put("new", registrationtest.Signers(cas[0], nil)); dps.AsError(err).Code != dps.CodeInvalidArgument || !strings.Contains(err.Error(), "belongs to enrollment group g-0") {
		t.Errorf("the certificate itself: %v", err)
	}
	res, err := f.Service.Import(t.Context(), entries(bundle.Entry{Group: &dps.EnrollmentGroup{EnrollmentGroupID: "new",
		Enrollment: registrationtest.Signers(attesttest.Cross(t, nil, cas[0]), nil)}}), registration.ImportConfig{})
	if err != nil || res.Conflicting != 1 || !strings.Contains(res.Conflicts[0].Reason, "name and the key") {
		t.Errorf("import: %+v, %v", res, err)
	}
	ca := attesttest.CA(t, nil, "new CA")
	for name, e := range map[string]dps.Enrollment{"both in one": registrationtest.Signers(ca, attesttest.Cross(t, nil, ca)),
		"the key by another name": registrationtest.Signers(&holder{Certificate: attesttest.Again(t, nil, ca, "another name").Certificate, Key: ca.Key}, nil)} {
		if err := put(strings.ReplaceAll(name, " ", "-"), e); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// What one Service knows of groups is what a new one reads, whatever was done to them in whatever order.
func TestGroupCache(t *testing.T) {
	f := registrationtest.NewFixture(t, "a.example")
	rng := rand.New(rand.NewPCG(5, 5))
	const n = 24 // so that there are more keys than are tried at once
	var cas [n]*holder
	var leaves [n]*holder
	for i := range n {
		cas[i] = attesttest.CA(t, nil, fmt.Sprint("CA ", i%4)) // several of a name
		signer := *cas[i].Certificate
		if i%3 == 0 {
			signer.SubjectKeyId = nil // so its leaf does not say whose key signed it
		}
		leaves[i] = attesttest.Leaf(t, &holder{Certificate: &signer, Key: cas[i].Key}, fmt.Sprint("leaf-", i))
	}
	key := func(i int) []byte { return bytes.Repeat([]byte{byte(i + 1)}, 32) }
	put := func(id string, e dps.Enrollment) {
		if rng.IntN(3) == 0 {
			e = disabled(e)
		}
		f.Put(t, registration.Group, id, e)
	}
	for i := range n {
		put(fmt.Sprint("k-", i), registrationtest.Symmetric(key(i), nil))
	}
	other := f.Replica("a.example")
	for round := range 60 {
		i := rng.IntN(n)
		id := fmt.Sprint([]string{"x-", "k-"}[round%2], i)
		_, err := f.Service.GetEnrollment(t.Context(), registration.Group, id)
		switch {
		case err == nil && rng.IntN(2) == 0:
			if err := f.Service.DeleteEnrollment(t.Context(), registration.Actor{}, registration.Group, id, ""); err != nil {
				t.Fatal(err)
			}
		case round%2 == 0:
			put(id, registrationtest.Signers(cas[i], nil))
		default:
			put(id, registrationtest.Symmetric(key(i), nil))
		}
		fresh := f.Replica("a.example")
		for _, j := range []int{i, rng.IntN(n)} {
			d := f.ByKey(fmt.Sprint("dev-", j), attest.DeriveKey(key(j), fmt.Sprint("dev-", j)))
			for _, req := range []*registration.Request{byChain(leaves[j]), request(d)} {
				want := outcome(t, fresh, req)
				for _, s := range []*registration.Service{f.Service, other} {
					if got := outcome(t, s, req); got != want {
						t.Fatalf("round %d, %s: %s, and a new service says %s", round, req.RegistrationID, got, want)
					}
				}
			}
		}
	}
}

// A counted store counts what is read.
type counted struct {
	registration.Store
	views, groups atomic.Int64
}

func (w *counted) View(ctx context.Context, f func(registration.Tx) error) error {
	w.views.Add(1)
	return w.Store.View(ctx, func(tx registration.Tx) error { return f(countedTx{tx, w}) })
}

type countedTx struct {
	registration.Tx
	w *counted
}

func (t countedTx) GroupsByCA(scope string, subject [32]byte, keyID []byte, limit int) ([]*registration.Record, error) {
	t.w.groups.Add(1)
	return t.Tx.GroupsByCA(scope, subject, keyID, limit)
}

func (t countedTx) SymmetricGroups(scope string) ([]*registration.Record, error) {
	t.w.groups.Add(1)
	return t.Tx.SymmetricGroups(scope)
}

// watch returns a service on a fixture's store, and what tells how many views and reads of groups a call took.
func watch(f *registrationtest.Fixture) (*registration.Service, func(func()) (views, groups int64)) {
	w := &counted{Store: f.Store}
	s := registration.New(registration.Config{Store: w, Scope: registrationtest.Scope, Settings: registration.Settings{Hubs: registration.Records("a.example")}, Now: f.Now})
	return s, func(f func()) (int64, int64) {
		w.views.Store(0)
		w.groups.Store(0)
		f()
		return w.views.Load(), w.groups.Load()
	}
}

// Devices make up issuers by the thousand: those that are known stay known, and those that are not take no room.
func TestStrangers(t *testing.T) {
	f := registrationtest.NewFixture(t, "a.example")
	s, reads := watch(f)
	good := byChain(attesttest.Leaf(t, f.Mid, "dev-1"), f.Mid)
	if got := outcome(t, s, good); got != "assigned" {
		t.Fatal(got)
	}
	if _, n := reads(func() { outcome(t, s, good) }); n != 0 {
		t.Errorf("%d reads for a device that was seen before", n)
	}
	made := attesttest.CA(t, nil, "made up")
	template := attesttest.Leaf(t, made, "evil").Certificate
	for i := range registration.MaxStrangers/3 + 100 { // three strangers each
		c := *template
		c.RawIssuer = fmt.Appendf(nil, "issuer %d", i)
		if _, err := s.Register(t.Context(), byChain(&holder{Certificate: &c})); dps.AsError(err).Code != dps.CodeUnauthorized {
			t.Fatal(err)
		}
		c.RawIssuer, c.AuthorityKeyId = f.Root.Certificate.RawSubject, fmt.Append(nil, i) // a name that is known, and a key that is not
		if _, err := s.Register(t.Context(), byChain(&holder{Certificate: &c})); dps.AsError(err).Code != dps.CodeUnauthorized {
			t.Fatal(err)
		}
	}
	if s.Strangers() != registration.MaxStrangers {
		t.Errorf("%d strangers are kept", s.Strangers())
	}
	// Of the good chain's two issuers one is a group's; the other may have had to go.
	if _, n := reads(func() { outcome(t, s, byChain(attesttest.Leaf(t, f.Root, "dev-2"))) }); n != 0 {
		t.Errorf("%d reads for a group's CA", n)
	}
	// One group is written: the others stay known.
	f.Put(t, registration.Group, "elsewhere", registrationtest.Signers(attesttest.CA(t, nil, "elsewhere"), nil))
	if _, n := reads(func() { outcome(t, s, byChain(attesttest.Leaf(t, f.Root, "dev-3"))) }); n != 0 {
		t.Errorf("%d reads after another group was written", n)
	}
}

func keysOf(t testing.TB, f *registrationtest.Fixture, n int) [][]byte {
	t.Helper()
	var keys [][]byte
	for i := range n {
		keys = append(keys, bytes.Repeat([]byte{byte(i), byte(i >> 8)}, 16))
		f.Put(t, registration.Group, fmt.Sprintf("k-%03d", i), registrationtest.Symmetric(keys[i], nil))
	}
	return keys
}

// Among many groups by key a device's is looked for once: then its registration names it, or a bundle did, or it is known
// that there is none. DPS-D 39.
func TestSearch(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(8)) // so that several cores search
	f := registrationtest.NewFixture(t, "a.example")
	keys := keysOf(t, f, 300)
	s, reads := watch(f)
	device := func(id string, key []byte) *registration.Request {
		f.Advance(time.Second) // so that each token is another one
		return request(f.ByKey(id, attest.DeriveKey(key, id)))
	}
	registers := func(what string, req *registration.Request, want string, wantViews int64) {
		t.Helper()
		var err error
		views, _ := reads(func() { _, err = s.Register(t.Context(), req) })
		got := "401002"
		if err != nil {
			got = fmt.Sprint(int(dps.AsError(err).Code))
		} else if r := registrationOf(t, f, req.RegistrationID); r != nil {
			got = r.Group
		}
		if got != want || views != wantViews {
			t.Errorf("%s: %s, in %d views", what, got, views)
		}
	}
	registers("for the first time", device("dev-1", keys[299]), "k-299", 2) // a view, the search, and a view
	registers("again", device("dev-1", keys[299]), "k-299", 0)              // it is remembered
	registers("in capitals", device("DEV-1", keys[299]), "k-299", 0)
	registers("signed in small letters", func() *registration.Request {
		r := device("DEV-1", keys[299])
		r.Proof.Token = attesttest.Token(attest.DeriveKey(keys[299], "dev-1"), registrationtest.Scope, "DEV-1", f.Now().Add(time.Hour))
		return r
	}(), "k-299", 0)
	s, reads = watch(f)
	registers("another service, for the first time", device("dev-0", keys[299]), "k-299", 2)
	registers("again, at another service", device("dev-1", keys[299]), "k-299", 1) // it is in the store
	registers("by another group", device("dev-1", keys[7]), "k-007", 2)
	registers("by the first", device("dev-2", keys[0]), "k-000", 2)
	registers("by a secondary key", device("dev-3", bytes.Repeat([]byte("s"), 32)), "k-000", 2) // which all of them have: the first counts
	shared := bytes.Repeat([]byte("t"), 32)
	for _, i := range []int{100, 255} { // of two cores' shares
		f.Put(t, registration.Group, fmt.Sprint("k-", i), registrationtest.Symmetric(keys[i], shared))
	}
	for i := range 50 {
		registers("by a key of two groups", device(fmt.Sprint("dev-3-", i), shared), "k-100", 2)
	}
	f.Import(t, bundle.Entry{Serial: "S9", Device: &bundle.GroupDevice{RegistrationID: "Dev-9", Group: "K-150"}})
	registers("named by a bundle", device("dev-9", keys[150]), "k-150", 1)

	wrong := device("dev-4", []byte("wrong"))
	registers("a wrong key", wrong, "401002", 2)
	registers("the same token again", wrong, "401002", 1)
	registers("the same key, another token", device("dev-4", []byte("wrong")), "401002", 2)
	f.Put(t, registration.Group, "new", registrationtest.Symmetric([]byte("wrong and much too long to be a key"), nil))
	registers("after a group was written", wrong, "401002", 2)
	registers("and again", wrong, "401002", 1)
	f.Put(t, registration.Group, "late", registrationtest.Symmetric(bytes.Repeat([]byte("w"), 32), nil))
	late := device("dev-5", bytes.Repeat([]byte("w"), 32))
	registers("a group that is new", late, "late", 2)
	f.Put(t, registration.Group, "late", disabled(registrationtest.Symmetric(bytes.Repeat([]byte("w"), 32), nil)))
	registers("which is disabled", late, "401002", 1)
	if err := f.Service.DeleteEnrollment(t.Context(), registration.Actor{}, registration.Group, "late", ""); err != nil {
		t.Fatal(err)
	}
	registers("and deleted", late, "401002", 2)
	if _, n := reads(func() { outcome(t, s, device("dev-6", keys[42])) }); n != 0 {
		t.Errorf("the groups were read %d times", n)
	}
	// Operations and lookups find the group as a registration does.
	req := device("dev-7", keys[77])
	op, err := s.Register(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Replica("a.example").Status(t.Context(), device("dev-7", keys[77]), op.OperationID); err != nil {
		t.Error(err)
	}
	if _, err := s.Lookup(t.Context(), device("dev-7", keys[78])); err != nil {
		t.Error(err) // the key of another group is as good
	}
	if _, err := s.Lookup(t.Context(), device("dev-7", []byte("wrong"))); dps.AsError(err).Code != dps.CodeUnauthorized {
		t.Error(err)
	}
}

func registrationOf(t testing.TB, f *registrationtest.Fixture, id string) (r *registration.Registration) {
	t.Helper()
	if err := f.Store.View(t.Context(), func(tx registration.Tx) (err error) {
		r, err = tx.Registration(dps.Fold(registrationtest.Scope), dps.Fold(id))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return r
}

// Wrong tokens cannot multiply the work: so many are looked for at once, those beyond are told to come again and not that
// they are refused, and whoever needs no search goes by.
func TestSearchesAreBounded(t *testing.T) {
	f := registrationtest.NewFixture(t, "a.example")
	keys := keysOf(t, f, registration.TryAtOnce+1)
	s := f.Service
	if got := outcome(t, s, request(f.ByKey("known", attest.DeriveKey(keys[3], "known")))); got != "k-003" {
		t.Fatal(got)
	}
	release, err := s.HoldSearches(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_, most := s.Searches()
	var wg sync.WaitGroup
	for i := range most {
		id := fmt.Sprint("dev-", i)
		k, want := []byte("wrong"), "401002"
		if i%2 == 0 {
			k, want = keys[1], "k-001"
		}
		wg.Go(func() {
			if got := outcome(t, s, request(f.ByKey(id, attest.DeriveKey(k, id)))); got != want {
				t.Errorf("%s: %s", id, got)
			}
		})
	}
	for now := 0; now < most; now, _ = s.Searches() {
		runtime.Gosched()
	}
	for _, k := range [][]byte{keys[1], []byte("wrong")} {
		_, err := s.Register(t.Context(), request(f.ByKey("late", attest.DeriveKey(k, "late"))))
		if e := dps.AsError(err); e.Code != dps.CodeServiceOverloaded || e.Message != "Try again later" {
			t.Errorf("one too many: %v", err)
		}
	}
	for name, req := range map[string]*registration.Request{"a known device": request(f.ByKey("known", attest.DeriveKey(keys[3], "known"))),
		"an individual enrollment": request(f.ByKey("own-key", f.OwnKey)), "a certificate": byChain(attesttest.Leaf(t, f.Root, "dev-x"))} {
		if got := outcome(t, s, req); got != "k-003" && got != "assigned" {
			t.Errorf("%s, meanwhile: %s", name, got)
		}
	}
	release()
	wg.Wait()
	if now, _ := s.Searches(); now != 0 {
		t.Errorf("%d searches are left", now)
	}
	if got := outcome(t, s, request(f.ByKey("late", attest.DeriveKey(keys[1], "late")))); got != "k-001" {
		t.Errorf("come again: %s", got)
	}
}

// Groups by key come and go while devices are looked for among them.
func TestSearchWhileGroupsChange(t *testing.T) {
	f := registrationtest.NewFixture(t, "a.example")
	keys := keysOf(t, f, 40)
	stop := make(chan struct{})
	var writer, devices sync.WaitGroup
	writer.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			f.Put(t, registration.Group, fmt.Sprint("busy-", i%3), registrationtest.Symmetric([]byte(fmt.Sprintf("%032d", i)), nil))
		}
	})
	for i := range 8 {
		devices.Go(func() {
			for j := range 10 {
				id := fmt.Sprintf("dev-%d-%d", i, j)
				want := fmt.Sprintf("k-%03d", (i*10+j)%40)
				// It may be told to come again, and nothing else.
				if got := outcome(t, f.Service, request(f.ByKey(id, attest.DeriveKey(keys[(i*10+j)%40], id)))); got != want && got != "503000" {
					t.Errorf("%s: %s", id, got)
				}
			}
		})
	}
	devices.Wait()
	close(stop)
	writer.Wait()
}
