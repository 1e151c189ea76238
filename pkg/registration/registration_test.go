package registration_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"iter"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/bundle"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

func request(d registrationtest.Device) *registration.Request {
	r := &registration.Request{IDScope: d.Scope, RegistrationID: d.ID, APIVersion: d.APIVersion, Proof: attest.Proof{Token: d.Token}}
	return r
}

// register has a device register with a service and returns what became of it.
func register(t testing.TB, s *registration.Service, d registrationtest.Device) *dps.RegistrationState {
	t.Helper()
	op, err := s.Register(t.Context(), request(d))
	if err != nil {
		t.Fatalf("%s: %v", d.ID, err)
	}
	st, err := s.Status(t.Context(), request(d), op.OperationID)
	if err != nil {
		t.Fatalf("%s: %v", d.ID, err)
	}
	return st.RegistrationState
}

// Hubs get their share, a device keeps its hub, and when a hub comes only those move that it takes.
func TestAllocation(t *testing.T) {
	hubs := []string{"a.example", "b.example", "c.example"}
	f := registrationtest.NewFixture(t, hubs...)
	count, at := map[string]int{}, map[string]string{}
	const n = 600
	for i := range n {
		d := f.Derived(fmt.Sprintf("dev-%d", i))
		st := register(t, f.Service, d)
		count[st.AssignedHub]++
		at[d.ID] = st.AssignedHub
	}
	for _, h := range hubs {
		if count[h] < n/3*3/4 || count[h] > n/3*5/4 {
			t.Errorf("%s has %d of %d devices", h, count[h], n)
		}
	}
	grown := f.Replica(append(hubs, "d.example")...)
	moved := 0
	for id, was := range at {
		st := register(t, grown, f.Derived(id))
		switch {
		case st.AssignedHub == "d.example" && st.Substatus == dps.DeviceDataMigrated:
			moved++
		case st.AssignedHub != was || st.Substatus != dps.ReprovisionedToInitialAssignment:
			t.Fatalf("%s moved from %s to %s: %s", id, was, st.AssignedHub, st.Substatus)
		}
	}
	if moved < n/4*3/4 || moved > n/4*5/4 {
		t.Errorf("%d of %d devices moved to the new hub", moved, n)
	}
}

// Device API, section 6.6: what a reprovision policy and a hub list do.
// DPS-S 94.
func TestReprovisioning(t *testing.T) {
	f := registrationtest.NewFixture(t, "a.example", "b.example")
	on := func(hub string, p *dps.ReprovisionPolicy) {
		e := registrationtest.Symmetric(f.OwnKey, nil)
		e.AllocationPolicy, e.IoTHubs, e.ReprovisionPolicy = dps.AllocationStatic, []string{hub}, p
		f.Put(t, registration.Individual, "own-key", e)
	}
	step := func(what, hub string, want dps.Substatus) {
		t.Helper()
		if st := register(t, f.Service, f.ByKey("own-key", f.OwnKey)); st.AssignedHub != hub || st.Substatus != want {
			t.Errorf("%s: %s, %s", what, st.AssignedHub, st.Substatus)
		}
	}
	on("a.example", nil)
	step("first", "a.example", dps.InitialAssignment)
	on("B.example", nil)
	step("migrated", "b.example", dps.DeviceDataMigrated)
	on("a.example", &dps.ReprovisionPolicy{UpdateHubAssignment: true})
	step("reset", "a.example", dps.DeviceDataReset)
	on("b.example", &dps.ReprovisionPolicy{})
	step("never", "a.example", dps.ReprovisionedToInitialAssignment)
	on("b.example", nil)
	d := f.ByKey("own-key", f.OwnKey)
	d.APIVersion = "2018-04-01"
	if st := register(t, f.Service, d); st.AssignedHub != "a.example" {
		t.Errorf("an old device moved to %s", st.AssignedHub)
	}
	on("c.example", nil)
	if st := register(t, f.Service, f.ByKey("own-key", f.OwnKey)); st.Status != dps.Failed || st.ErrorCode != int(dps.CodeNoHub) {
		t.Errorf("a hub that is not linked: %+v", st)
	}
	e := registrationtest.Symmetric(f.OwnKey, nil)
	in := dps.IndividualEnrollment{RegistrationID: "own-key", DeviceID: "Pump-7", Enrollment: e}
	f.PutDocument(t, registration.Individual, "own-key", in)
	if st := register(t, f.Service, f.ByKey("own-key", f.OwnKey)); st.DeviceID != "Pump-7" || st.Substatus != dps.InitialAssignment {
		t.Errorf("another device ID: %+v", st)
	}
}

// Two replicas on one store: what one changes, the other acts upon with the next request; and a device that asks both at
// once has one registration.
func TestReplicas(t *testing.T) {
	f := registrationtest.NewFixture(t, "a.example")
	one, two := f.Service, f.Replica("a.example")
	d := f.Derived("dev-1")
	register(t, one, d)
	register(t, two, d)
	off := registrationtest.Symmetric(f.GroupKey, nil)
	off.ProvisioningStatus = dps.EnrollmentDisabled
	f.Put(t, registration.Group, "keys", off)
	for _, s := range []*registration.Service{two, one} {
		if _, err := s.Register(t.Context(), request(d)); dps.AsError(err).Code != dps.CodeUnauthorized {
			t.Errorf("after its group was disabled: %v", err)
		}
	}
	f.Put(t, registration.Group, "keys", registrationtest.Symmetric(f.GroupKey, nil))
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			if st := register(t, []*registration.Service{one, two}[i%2], f.Derived("dev-2")); st.Status != dps.Assigned {
				t.Errorf("%+v", st)
			}
		})
	}
	wg.Wait()
	if page, _, err := one.QueryRegistrations(t.Context(), "keys", registration.Page{Limit: 10}); err != nil || len(page) != 2 {
		t.Errorf("%d registrations, %v", len(page), err)
	}
}

// A hook is a store that does something before an update.
type hook struct {
	registration.Store
	before func()
}

func (h *hook) Update(ctx context.Context, f func(registration.Tx) error) error {
	if b := h.before; b != nil {
		h.before = nil
		b()
	}
	return h.Store.Update(ctx, f)
}

// An operator who was told that a device is disabled, or deleted, does not see it assigned afterwards: not when the device
// was judged just before, and not when its transport repeats a request of long ago.
func TestOperatorWins(t *testing.T) {
	off := func(e dps.Enrollment) dps.Enrollment {
		e.ProvisioningStatus = dps.EnrollmentDisabled
		return e
	}
	for name, act := range map[string]func(*testing.T, *registrationtest.Fixture){
		"individual disabled": func(t *testing.T, f *registrationtest.Fixture) {
			f.Put(t, registration.Individual, "own-key", off(registrationtest.Symmetric(f.OwnKey, nil)))
		},
		"individual deleted": func(t *testing.T, f *registrationtest.Fixture) {
			if err := f.Service.DeleteEnrollment(t.Context(), registration.Actor{}, registration.Individual, "own-key", ""); err != nil {
				t.Error(err)
			}
		},
		"group disabled": func(t *testing.T, f *registrationtest.Fixture) {
			f.Put(t, registration.Group, "keys", off(registrationtest.Symmetric(f.GroupKey, nil)))
		},
		"device of a group ended": func(t *testing.T, f *registrationtest.Fixture) {
			f.Import(t, bundle.Entry{Serial: "S", Retired: &bundle.RetiredDevice{RegistrationID: "Dev-1", Group: "keys", State: bundle.Scrapped, At: f.Now()}})
		},
		"device of a closed group": func(t *testing.T, f *registrationtest.Fixture) {
			if _, err := f.Service.CloseGroup(t.Context(), registration.Actor{}, "keys", true); err != nil {
				t.Error(err)
			}
		},
		"individual ended": func(t *testing.T, f *registrationtest.Fixture) {
			e := gone(1, 0, bundle.Scrapped)
			e.Retired.RegistrationID, e.Retired.Group = "brought", ""
			f.Import(t, e)
		},
		"device of a group blocked": func(t *testing.T, f *registrationtest.Fixture) {
			f.Put(t, registration.Individual, "dev-1", off(registrationtest.Symmetric(f.OwnKey, nil)))
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := registrationtest.NewFixture(t, "a.example")
			d := f.Derived("dev-1")
			f.Import(t, bundle.Entry{Serial: "SN0001", Individual: &dps.IndividualEnrollment{RegistrationID: "brought", Enrollment: key('1')}})
			if strings.HasPrefix(name, "individual") {
				d = f.ByKey("own-key", f.OwnKey)
			}
			if name == "individual ended" {
				d = f.ByKey("brought", bytes.Repeat([]byte{'1'}, 32))
			}
			s := registration.New(registration.Config{Store: &hook{f.Store, func() { act(t, f) }}, Scope: registrationtest.Scope, Settings: registration.Settings{Hubs: registration.Records("a.example")}, Now: f.Now})
			op, err := s.Register(t.Context(), request(d))
			if err != nil {
				if dps.AsError(err).Code != dps.CodeUnauthorized {
					t.Error(err)
				}
				return
			}
			if st, err := s.Status(t.Context(), request(d), op.OperationID); err != nil || st.Status != dps.Disabled {
				t.Errorf("%+v, %v", st, err)
			}
		})
	}
	f := registrationtest.NewFixture(t, "a.example")
	d := f.ByKey("own-key", f.OwnKey)
	register(t, f.Service, d)
	f.Put(t, registration.Individual, "own-key", off(registrationtest.Symmetric(f.OwnKey, nil)))
	again := request(d)
	again.Repeat = true
	op, err := f.Service.Register(t.Context(), again)
	if err != nil {
		t.Fatal(err)
	}
	if st, err := f.Service.Status(t.Context(), request(d), op.OperationID); err != nil || st.Status != dps.Disabled {
		t.Errorf("repeated: %+v, %v", st, err)
	}
}

// A device that hangs up and comes again finds its registration, and not its own hanging up.
func TestHangUp(t *testing.T) {
	f := registrationtest.NewFixture(t, "a.example")
	waiting, goOn := make(chan struct{}), make(chan struct{})
	s := registration.New(registration.Config{Store: &hook{f.Store, func() { close(waiting); <-goOn }}, Scope: registrationtest.Scope, Settings: registration.Settings{Hubs: registration.Records("a.example")}, Now: f.Now})
	d := f.Derived("dev-1")
	ctx, hangUp := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { _, _ = s.Register(ctx, request(d)) })
	<-waiting
	hangUp()
	wg.Go(func() {
		if _, err := s.Register(t.Context(), request(d)); err != nil {
			t.Errorf("the second call: %v", err)
		}
	})
	time.Sleep(50 * time.Millisecond) // it joins the first
	close(goOn)
	wg.Wait()
}

func entries(e ...bundle.Entry) iter.Seq2[bundle.Entry, error] {
	return func(yield func(bundle.Entry, error) bool) {
		for _, x := range e {
			if !yield(x, nil) {
				return
			}
		}
	}
}

func key(b byte) dps.Enrollment {
	return dps.Enrollment{Attestation: &dps.Attestation{Type: dps.AttestationSymmetricKey,
		SymmetricKey: &dps.SymmetricKeyAttestation{PrimaryKey: base64.StdEncoding.EncodeToString([]byte(strings.Repeat(string(b), 32)))}}}
}

func TestImport(t *testing.T) {
	f := registrationtest.NewFixture(t, "a.example")
	ind := func(id string, e dps.Enrollment) bundle.Entry {
		return bundle.Entry{Serial: id, Individual: &dps.IndividualEnrollment{RegistrationID: id, Enrollment: e}}
	}
	grp := func(id string, e dps.Enrollment) bundle.Entry {
		return bundle.Entry{Group: &dps.EnrollmentGroup{EnrollmentGroupID: id, Enrollment: e}}
	}
	dev := func(id, group, serial string) bundle.Entry {
		return bundle.Entry{Serial: serial, Device: &bundle.GroupDevice{RegistrationID: id, Group: group}}
	}
	ca := attesttest.CA(t, nil, "another line")
	all := func() iter.Seq2[bundle.Entry, error] {
		var e []bundle.Entry
		e = append(e, grp("line-9", registrationtest.Signers(ca, nil)))
		for i := range 1200 { // several transactions
			e = append(e, dev(fmt.Sprintf("g-%d", i), "line-9", fmt.Sprintf("S%d", i)))
		}
		return entries(append(e, ind("k-1", key('1')), ind("k-2", key('2')))...)
	}
	want := func(what string, seq iter.Seq2[bundle.Entry, error], dry bool, fresh, same, conflicting int) registration.ImportResult {
		t.Helper()
		res, err := f.Service.Import(t.Context(), seq, registration.ImportConfig{DryRun: dry})
		if err != nil || res.New != fresh || res.Unchanged != same || res.Conflicting != conflicting {
			t.Fatalf("%s: %+v, %v", what, res, err)
		}
		return res
	}
	want("dry", all(), true, 1203, 0, 0)
	want("first", all(), false, 1203, 0, 0)
	want("again", all(), false, 0, 1203, 0)
	for why, e := range map[string]bundle.Entry{
		"another key":               ind("K-1", key('3')),
		"was made by an operator":   ind("own-key", key('1')),
		"another group":             dev("g-1", "line", "S1"),
		"another serial":            dev("G-1", "line-9", "S2"),
		"an individual's name":      dev("k-1", "line-9", "S1"),
		"a device's name":           ind("g-1", key('1')),
		"no such group":             dev("new", "nowhere", "S"),
		"another CA":                grp("line-9", registrationtest.Signers(f.Mid, nil)),
		"another group's CA":        grp("line-10", registrationtest.Signers(ca, nil)),
		"a key that was not opened": ind("k-3", dps.Enrollment{Attestation: &dps.Attestation{Type: dps.AttestationSymmetricKey}}),
		"a TPM without a key":       ind("k-4", dps.Enrollment{Attestation: &dps.Attestation{Type: dps.AttestationTPM, TPM: &dps.TPMAttestation{EndorsementKey: "AA=="}}}),
	} {
		res := want(why, entries(e), false, 0, 0, 1)
		if len(res.Conflicts) != 1 || res.Conflicts[0].Reason == "" || strings.Contains(fmt.Sprint(res), "MTEx") {
			t.Errorf("%s: %+v", why, res.Conflicts)
		}
	}
	want("all is as it was", all(), false, 0, 1203, 0)
	register(t, f.Service, f.ByKey("k-1", []byte(strings.Repeat("1", 32))))

	// A bundle that turns out bad in the middle is an error; what went in before stays, and the next import goes on.
	bad := errors.New("cut off")
	cut := func(yield func(bundle.Entry, error) bool) {
		if yield(ind("k-5", key('5')), nil) {
			yield(bundle.Entry{}, bad)
		}
	}
	if _, err := f.Service.Import(t.Context(), cut, registration.ImportConfig{}); !errors.Is(err, bad) {
		t.Errorf("cut off: %v", err)
	}
	want("taken up", entries(ind("k-5", key('5'))), false, 1, 0, 0)
}

// The key of a group leaves once it exists, and is made once.
func TestGroupKey(t *testing.T) {
	f := registrationtest.NewFixture(t, "a.example")
	first, created, err := f.Service.GroupKey(t.Context(), registration.Actor{}, "fresh")
	if err != nil || !created || len(first) != 64 {
		t.Fatalf("%d octets, %v, %v", len(first), created, err)
	}
	again, created, err := f.Service.GroupKey(t.Context(), registration.Actor{}, "FRESH")
	if err != nil || created || string(again) != string(first) {
		t.Errorf("again: %v, %v", created, err)
	}
	register(t, f.Service, f.ByKey("dev-9", attest.DeriveKey(first, "dev-9")))
	if _, _, err := f.Service.GroupKey(t.Context(), registration.Actor{}, "line"); err == nil {
		t.Error("a group by certificate gave a key")
	}
}

// A device that was disabled for a while, or whose registration failed, is still its hub's, by the name that it has there.
func TestAssignmentOutlivesRefusals(t *testing.T) {
	f := registrationtest.NewFixture(t, "a.example")
	never := func(status dps.ProvisioningStatus) {
		e := registrationtest.Symmetric(f.OwnKey, nil)
		e.ReprovisionPolicy, e.ProvisioningStatus = &dps.ReprovisionPolicy{}, status
		f.Put(t, registration.Individual, "own-key", e)
	}
	register := func(s *registration.Service, id string) *dps.RegistrationState {
		t.Helper()
		d := f.ByKey(id, f.OwnKey)
		req := &registration.Request{IDScope: d.Scope, RegistrationID: id, APIVersion: d.APIVersion, Proof: attest.Proof{Token: d.Token}}
		op, err := s.Register(t.Context(), req)
		if err != nil {
			t.Fatal(err)
		}
		st, err := s.Status(t.Context(), req, op.OperationID)
		if err != nil {
			t.Fatal(err)
		}
		return st.RegistrationState
	}
	never(dps.EnrollmentEnabled)
	register(f.Service, "own-key")
	never(dps.EnrollmentDisabled)
	if st := register(f.Service, "own-key"); st.Status != dps.Disabled || st.AssignedHub != "" {
		t.Errorf("%+v", st)
	}
	never(dps.EnrollmentEnabled)
	st := register(f.Replica("b.example"), "OWN-KEY") // the hub is not linked any more: it may never leave it
	if st.Status != dps.Assigned || st.AssignedHub != "a.example" || st.DeviceID != "own-key" || st.Substatus != dps.ReprovisionedToInitialAssignment {
		t.Errorf("%+v", st)
	}
}

// One ticket is one operation, whatever tokens the device comes with.
func TestTicketAgain(t *testing.T) {
	f := registrationtest.NewFixture(t, "a.example")
	ticket := registration.NewTicket(registrationtest.Scope, "dev-1")
	var first string
	for range 4 {
		f.Advance(time.Second)
		d := f.Derived("dev-1")
		req := &registration.Request{IDScope: d.Scope, RegistrationID: d.ID, APIVersion: d.APIVersion, Operation: ticket, Proof: attest.Proof{Token: d.Token}}
		op, err := f.Service.Register(t.Context(), req)
		if err != nil || op.OperationID != ticket {
			t.Fatalf("%+v, %v", op, err)
		}
		st, err := f.Service.Status(t.Context(), req, ticket)
		if err != nil {
			t.Fatal(err)
		}
		if first == "" {
			first = st.RegistrationState.ETag
		}
		if st.RegistrationState.ETag != first || st.RegistrationState.Substatus != dps.InitialAssignment {
			t.Errorf("%+v", st.RegistrationState)
		}
	}
}
