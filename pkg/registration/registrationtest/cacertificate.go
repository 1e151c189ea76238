package registrationtest

import (
	"errors"
	"reflect"
	"testing"

	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/registration"
)

// caCertificates are the certificates of scopes, and which groups refer to them.
func caCertificates(t *testing.T, s registration.Store) {
	revision := func() (rev int64) {
		t.Helper()
		view(t, s, func(tx registration.Tx) (err error) {
			rev, err = tx.Revision("scope")
			return err
		})
		return rev
	}
	one := &registration.CACertificate{Name: "Plant", DER: []byte("der"), Code: "code", ETag: "1", Created: attesttest.Now, Updated: attesttest.Now}
	before := revision()
	update(t, s, func(tx registration.Tx) error {
		return errors.Join(tx.PutCACertificate("scope", one), tx.PutCACertificate("scope", &registration.CACertificate{Name: "a"}), tx.PutCACertificate("other", &registration.CACertificate{Name: "plant", ETag: "2"}))
	})
	if revision() <= before {
		t.Error("a certificate was put, and the revision is the same")
	}
	view(t, s, func(tx registration.Tx) error {
		if got, err := tx.CACertificate("scope", "plant"); err != nil || !reflect.DeepEqual(got, one) {
			t.Errorf("%+v, %v", got, err)
		}
		if got, err := tx.CACertificate("other", "plant"); err != nil || got.ETag != "2" {
			t.Errorf("of another scope: %+v, %v", got, err)
		}
		if _, err := tx.CACertificate("scope", "b"); !errors.Is(err, registration.ErrNotFound) {
			t.Errorf("one that is not there: %v", err)
		}
		if all, err := tx.CACertificates("scope"); err != nil || len(all) != 2 || all[0].Name != "a" || all[1].Name != "Plant" {
			t.Errorf("%v, %v", all, err)
		}
		return nil
	})
	refer := func(id string, names ...string) *registration.Record {
		r := group(id)
		r.CAReferences = names
		return r
	}
	referring := func(scope, name string) (ids []string) {
		t.Helper()
		view(t, s, func(tx registration.Tx) error {
			all, err := tx.GroupsByReference(scope, name)
			for _, r := range all {
				ids = append(ids, r.ID)
			}
			return err
		})
		return ids
	}
	update(t, s, func(tx registration.Tx) error {
		return errors.Join(tx.PutRecord("scope", refer("G1", "plant", "gone")), tx.PutRecord("scope", refer("g2", "plant")), tx.PutRecord("other", refer("g3", "plant")))
	})
	if got := referring("scope", "plant"); !reflect.DeepEqual(got, []string{"G1", "g2"}) {
		t.Errorf("who refers: %v", got)
	}
	update(t, s, func(tx registration.Tx) error { return tx.PutRecord("scope", refer("g1", "gone")) })
	update(t, s, func(tx registration.Tx) error { return tx.DeleteRecord("scope", registration.Group, "g2") })
	if got := append(referring("scope", "plant"), referring("scope", "gone")...); !reflect.DeepEqual(got, []string{"g1"}) {
		t.Errorf("who refers after changes: %v", got)
	}
	before = revision()
	update(t, s, func(tx registration.Tx) error { return tx.DeleteCACertificate("scope", "plant") })
	if revision() <= before {
		t.Error("a certificate was deleted, and the revision is the same")
	}
	if err := s.Update(t.Context(), func(tx registration.Tx) error { return tx.DeleteCACertificate("scope", "plant") }); !errors.Is(err, registration.ErrNotFound) {
		t.Errorf("deleted again: %v", err)
	}
	if err := DeleteScope(t.Context(), s, "other", registration.Actor{}, attesttest.Now); !errors.Is(err, registration.ErrNotFound) {
		t.Errorf("a scope without a row: %v", err)
	}
}
