package registration_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/bundle"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

// What was under way when its scope was deleted writes nothing any more: an import that goes on at another replica would leave in the
// store what nobody could ever erase.
func TestWritesAfterErasure(t *testing.T) {
	s := newSite(t, registration.HubRecord, "a.example")
	by := registration.Actor{Name: "test"}
	res, err := s.Service.Import(t.Context(), func(yield func(bundle.Entry, error) bool) {
		for i := range 5000 {
			if i == 3500 { // of which 3000 are written, or are being
				if err := registrationtest.DeleteScope(t.Context(), s.Store, registrationtest.Scope, by, s.Now()); err != nil {
					t.Error(err)
				}
			}
			e := dps.IndividualEnrollment{RegistrationID: fmt.Sprintf("dev-%04d", i), Enrollment: registrationtest.Symmetric([]byte(fmt.Sprintf("a key for device %04d", i)), nil)}
			if !yield(bundle.Entry{Serial: fmt.Sprintf("S-%04d", i), Individual: &e}, nil) {
				return
			}
		}
	}, registration.ImportConfig{By: by})
	if err == nil {
		t.Errorf("imported: %+v", res)
	}
	e := dps.IndividualEnrollment{RegistrationID: "late", Enrollment: registrationtest.Symmetric([]byte("a key of some length"), nil)}
	body, err := dps.Encode(&e)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Service.PutEnrollment(t.Context(), by, registration.Individual, "late", body, ""); err == nil {
		t.Error("an enrollment was made")
	}
	if _, err := s.Service.EditPolicy(t.Context(), by, "late", func(p *registration.Policy) error { p.Rights = "ServiceConfig"; return nil }); err == nil {
		t.Error("a policy was made")
	}
	err = s.Store.Update(t.Context(), func(tx registration.Tx) error {
		all, err := tx.Records(dps.Fold(registrationtest.Scope), registration.Individual, "", 10000)
		if len(all) > 0 {
			t.Errorf("%d enrollments are left", len(all))
		}
		done, err2 := tx.EraseScope(dps.Fold(registrationtest.Scope), 1)
		if !done {
			t.Error("something is left to erase")
		}
		return errors.Join(err, err2)
	})
	if err != nil {
		t.Error(err)
	}
}

// A scope that was erased goes on with its settings and nothing else: devices that its groups let in are strangers at every replica,
// also at those that know the groups by heart, and what is enrolled afterwards counts.
func TestErasedScope(t *testing.T) {
	f := registrationtest.NewFixture(t)
	by := registration.Actor{Name: "an operator", Remote: "192.0.2.1"}
	if _, _, err := registration.EditScope(t.Context(), f.Store, registrationtest.Scope, by, "put", f.Now(), func(*registration.Scope) (*registration.Scope, error) {
		return &registration.Scope{ID: registrationtest.Scope, Name: "plant", Settings: registration.Settings{Hubs: registration.Records("hub-a.example")}}, nil
	}); err != nil {
		t.Fatal(err)
	}
	f.Policy(t, "owner", "EnrollmentWrite", f.OwnKey, f.GroupKey)
	leaf := attesttest.Leaf(t, f.Root, "dev-3")
	a, attempts := attempted(t, f, nil)
	b, _ := attempted(t, f, nil)
	devices := []*registration.Request{request(f.ByKey("own-key", f.OwnKey)), request(f.Derived("dev-1")), byChain(leaf)}
	say := func(s *registration.Service) (all string) {
		for _, d := range devices {
			all += outcome(t, s, d) + " "
		}
		f.Advance(time.Minute)
		return all
	}
	for _, s := range []*registration.Service{a, b} {
		if got := say(s); got != "assigned keys assigned " {
			t.Fatal(got)
		}
	}
	if err := attempts.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	say(a) // what is not written yet must not be written later
	if err := registrationtest.EraseScope(t.Context(), f.Store, registrationtest.Scope, by, f.Now()); err != nil {
		t.Fatal(err)
	}
	if err := attempts.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	scope := dps.Fold(registrationtest.Scope)
	if err := f.Store.View(t.Context(), func(tx registration.Tx) error {
		sc, err := tx.Scope(scope)
		if err != nil || sc.Deleting || sc.Erasing != nil || !sc.Erased.Equal(f.Now()) || sc.Hub("hub-a.example") == nil {
			t.Errorf("the scope: %+v, %v", sc, err)
		}
		if p, err := tx.Policies(scope); err != nil || len(p) != 1 {
			t.Errorf("its policies: %v, %v", p, err)
		}
		if all, err := tx.Audits(scope, "", 10); err != nil || len(all) != 1 || all[0].Action != "erase" || all[0].Object != "scope/plant" || all[0].Actor != by.Name || all[0].Remote != by.Remote {
			t.Errorf("audit: %+v, %v", all, err)
		}
		for _, id := range []string{"own-key", "dev-1", "dev-3"} {
			if all, err := tx.Attempts(scope, id); err != nil || len(all) != 0 {
				t.Errorf("attempts of %s: %+v, %v", id, all, err)
			}
		}
		regs, err := tx.Registrations(scope, "", "", 10)
		if len(regs) > 0 {
			t.Errorf("%d registrations", len(regs))
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	f.Advance(time.Minute)
	for _, s := range []*registration.Service{a, b} {
		if got := say(s); got != "401002 401002 401002 " {
			t.Errorf("erased: %s", got)
		}
	}
	// A group of the same ID with another key is another group; and what is erased twice is empty twice.
	f.Put(t, registration.Group, "keys", registrationtest.Symmetric([]byte("another key of some length"), nil))
	for _, s := range []*registration.Service{a, b} {
		if got := say(s); got != "401002 401002 401002 " {
			t.Errorf("with another key: %s", got)
		}
	}
	f.Put(t, registration.Group, "again", registrationtest.Symmetric(f.GroupKey, nil))
	for _, s := range []*registration.Service{a, b} {
		if got := say(s); got != "401002 again 401002 " {
			t.Errorf("enrolled anew: %s", got)
		}
	}
	if err := registrationtest.EraseScope(t.Context(), f.Store, registrationtest.Scope, by, f.Now()); err != nil {
		t.Fatal(err)
	}
	for _, s := range []*registration.Service{b, a} {
		if got := say(s); got != "401002 401002 401002 " {
			t.Errorf("erased again: %s", got)
		}
	}
}

// An import that is under way when its scope is erased does not go on with its second half.
func TestImportAcrossErasure(t *testing.T) {
	s := newSite(t, registration.HubRecord, "a.example")
	by := registration.Actor{Name: "test"}
	scope := dps.Fold(registrationtest.Scope)
	_, err := s.Service.Import(t.Context(), func(yield func(bundle.Entry, error) bool) {
		for i := range 5000 {
			if i == 3500 { // of which 3000 are written: it is not the erasure's being under way that ends the import
				for err := registration.ErrNotFound; errors.Is(err, registration.ErrNotFound); {
					err = s.Store.View(t.Context(), func(tx registration.Tx) error {
						_, err := tx.Record(scope, registration.Individual, "dev-2999")
						return err
					})
				}
				s.Advance(time.Second)
				if err := registrationtest.EraseScope(t.Context(), s.Store, registrationtest.Scope, by, s.Now()); err != nil {
					t.Error(err)
				}
			}
			e := dps.IndividualEnrollment{RegistrationID: fmt.Sprintf("dev-%04d", i), Enrollment: registrationtest.Symmetric([]byte(fmt.Sprintf("a key for device %04d", i)), nil)}
			if !yield(bundle.Entry{Serial: fmt.Sprintf("S-%04d", i), Individual: &e}, nil) {
				return
			}
		}
	}, registration.ImportConfig{By: by})
	if err == nil {
		t.Error("the import went on")
	}
	if err := s.Store.View(t.Context(), func(tx registration.Tx) error {
		all, err := tx.Records(scope, registration.Individual, "", 10000)
		if len(all) > 0 {
			t.Errorf("%d enrollments are left", len(all))
		}
		return err
	}); err != nil {
		t.Error(err)
	}
}

// An erasure that a process did not end lets nobody in, and goes on; one that is overtaken by a deletion is a deletion.
func TestErasureOfScopeCutOff(t *testing.T) {
	s := newSite(t, registration.HubRecord, "a.example")
	store := &scrubbed{Store: s.Store, err: errors.New("the process dies")}
	by := registration.Actor{Name: "test"}
	scope := func() (sc *registration.Scope) {
		t.Helper()
		if err := s.Store.View(t.Context(), func(tx registration.Tx) (err error) { sc, err = tx.Scope(dps.Fold(registrationtest.Scope)); return err }); err != nil {
			t.Fatal(err)
		}
		return sc
	}
	for range 2 {
		if err := registrationtest.EraseScope(t.Context(), store, registrationtest.Scope, by, s.Now()); !errors.Is(err, store.err) {
			t.Fatal(err)
		}
		if sc := scope(); !sc.Deleting || sc.Erasing == nil || sc.Hub("a.example") == nil {
			t.Fatalf("%+v", sc)
		}
		if got := outcome(t, s.Service, request(s.ByKey("own-key", s.OwnKey))); got != "401002" {
			t.Errorf("a device meanwhile: %s", got)
		}
	}
	store.err = nil
	if gone, err := registration.EndErasure(t.Context(), store, registrationtest.Scope, s.Now()); gone || err != nil || scope().Deleting || scope().Hub("a.example") == nil {
		t.Errorf("%t, %v, %+v", gone, err, scope())
	}
	store.err = errors.New("the process dies")
	_ = registrationtest.EraseScope(t.Context(), store, registrationtest.Scope, by, s.Now())
	store.err = nil
	if err := registrationtest.DeleteScope(t.Context(), store, registrationtest.Scope, by, s.Now()); err != nil || !scope().Deleting || scope().Erasing != nil || scope().Hub("a.example") != nil {
		t.Errorf("%v, %+v", err, scope())
	}
	if err := registrationtest.EraseScope(t.Context(), store, registrationtest.Scope, by, s.Now()); err != nil || !scope().Deleting {
		t.Errorf("what is deleted does not come back: %v, %+v", err, scope())
	}
}

// A process that dies before what was erased has left the files knows at its next start that it is to go on.
func TestErasureCutOff(t *testing.T) {
	s := newSite(t, registration.HubRecord, "a.example")
	store := &scrubbed{Store: s.Store, err: errors.New("the process dies")}
	del := func() error {
		return registrationtest.DeleteScope(t.Context(), store, registrationtest.Scope, registration.Actor{Name: "test"}, s.Now())
	}
	left := func() (all []*registration.Scope) {
		if err := s.Store.View(t.Context(), func(tx registration.Tx) (err error) { all, err = tx.Scopes("", 10); return err }); err != nil {
			t.Fatal(err)
		}
		return all
	}
	if err := del(); !errors.Is(err, store.err) {
		t.Fatal(err)
	}
	if all := left(); len(all) != 1 || !all[0].Deleting {
		t.Errorf("nobody knows that the scope %+v is to be scrubbed", all)
	}
	if store.err = nil; del() != nil || len(left()) != 0 || store.n != 2 {
		t.Errorf("%d scrubs, %d scopes are left", store.n, len(left()))
	}
}

type scrubbed struct {
	registration.Store
	err error
	n   int
}

func (s *scrubbed) Scrub(context.Context) error {
	s.n++
	return s.err
}
