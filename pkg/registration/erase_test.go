package registration_test

import (
	"context"
	"errors"
	"fmt"
	"testing"

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
				if err := registration.DeleteScope(t.Context(), s.Store, registrationtest.Scope, by, s.Now()); err != nil {
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

// A process that dies before what was erased has left the files knows at its next start that it is to go on.
func TestErasureCutOff(t *testing.T) {
	s := newSite(t, registration.HubRecord, "a.example")
	store := &scrubbed{Store: s.Store, err: errors.New("the process dies")}
	del := func() error {
		return registration.DeleteScope(t.Context(), store, registrationtest.Scope, registration.Actor{Name: "test"}, s.Now())
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
