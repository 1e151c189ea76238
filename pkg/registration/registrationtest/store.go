// Package registrationtest is the contract of registration.Store as a test suite. Every store runs it.
package registrationtest

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"sync"
	"testing"

	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
)

// Run runs the suite on a store that open returns; each call gives an empty one.
func Run(t *testing.T, open func(t *testing.T) registration.Store) {
	for name, f := range map[string]func(*testing.T, registration.Store){
		"records": records, "certificates": certificates, "registrations": registrations, "scopes": scopes, "updates": updates, "devices": devices,
	} {
		t.Run(name, func(t *testing.T) { f(t, open(t)) })
	}
}

func update(t testing.TB, s registration.Store, f func(registration.Tx) error) {
	t.Helper()
	if err := s.Update(t.Context(), f); err != nil {
		t.Fatal(err)
	}
}

func view(t testing.TB, s registration.Store, f func(registration.Tx) error) {
	t.Helper()
	if err := s.View(t.Context(), f); err != nil {
		t.Fatal(err)
	}
}

func group(id string) *registration.Record {
	return &registration.Record{Kind: registration.Group, ID: id, Document: []byte(`{}`), Keys: []byte("secret of " + id), Symmetric: true}
}

func records(t *testing.T, s registration.Store) {
	var rev int64
	update(t, s, func(tx registration.Tx) error {
		for i := range 5 {
			r := &registration.Record{Kind: registration.Individual, ID: fmt.Sprintf("Dev-%d", i), Document: fmt.Appendf(nil, `{"n":%d}`, i), Content: []byte{byte(i)}}
			if err := tx.PutRecord("scope", r); err != nil {
				return err
			}
		}
		return tx.PutRecord("scope", group("G"))
	})
	view(t, s, func(tx registration.Tx) (err error) {
		rev, err = tx.GroupsRevision("scope")
		return err
	})
	view(t, s, func(tx registration.Tx) error {
		r, err := tx.Record("scope", registration.Individual, "dev-3")
		if err != nil || r.ID != "Dev-3" || string(r.Document) != `{"n":3}` || r.Content[0] != 3 || r.Keys != nil {
			t.Errorf("%+v, %v", r, err)
		}
		if _, err := tx.Record("scope", registration.Group, "dev-3"); !errors.Is(err, registration.ErrNotFound) {
			t.Errorf("of the other kind: %v", err)
		}
		page, err := tx.Records("scope", registration.Individual, "dev-1", 2)
		if err != nil || len(page) != 2 || page[0].ID != "Dev-2" || page[1].ID != "Dev-3" {
			t.Errorf("page %v, %v", page, err)
		}
		gs, err := tx.SymmetricGroups("scope")
		if err != nil || len(gs) != 1 || string(gs[0].Keys) != "secret of G" {
			t.Errorf("groups %v, %v", gs, err)
		}
		if err := tx.PutRecord("scope", group("H")); err == nil {
			t.Error("a View wrote")
		}
		return nil
	})
	update(t, s, func(tx registration.Tx) error { return tx.DeleteRecord("scope", registration.Group, "g") })
	view(t, s, func(tx registration.Tx) error {
		if now, err := tx.GroupsRevision("scope"); err != nil || now == rev {
			t.Errorf("the groups' revision did not change: %d, %v", now, err)
		}
		return nil
	})
	err := s.Update(t.Context(), func(tx registration.Tx) error { return tx.DeleteRecord("scope", registration.Group, "g") })
	if !errors.Is(err, registration.ErrNotFound) {
		t.Errorf("second delete: %v", err)
	}
}

func certificates(t *testing.T, s registration.Store) {
	cert := registration.Certificate{Fingerprint: sha256.Sum256([]byte("f")), Subject: sha256.Sum256([]byte("s"))}
	g := group("ca")
	g.Certificates = []registration.Certificate{cert}
	update(t, s, func(tx registration.Tx) error { return tx.PutRecord("scope", g) })
	update(t, s, func(tx registration.Tx) error { return tx.PutRecord("scope", g) }) // its own certificate is no conflict
	view(t, s, func(tx registration.Tx) error {
		got, err := tx.GroupsBySubject("scope", cert.Subject)
		if err != nil || len(got) != 1 || got[0].ID != "ca" {
			t.Errorf("%v, %v", got, err)
		}
		if got, err := tx.GroupsBySubject("scope", cert.Fingerprint); err != nil || len(got) != 0 {
			t.Errorf("another subject: %v, %v", got, err)
		}
		return nil
	})
	other := &registration.Record{Kind: registration.Individual, ID: "dev", Document: []byte(`{}`), Certificates: g.Certificates}
	if err := s.Update(t.Context(), func(tx registration.Tx) error { return tx.PutRecord("scope", other) }); !errors.Is(err, registration.ErrConflict) {
		t.Errorf("one certificate in two enrollments: %v", err)
	}
	update(t, s, func(tx registration.Tx) error { return tx.DeleteRecord("scope", registration.Group, "ca") })
	update(t, s, func(tx registration.Tx) error { return tx.PutRecord("scope", other) })
}

func registrations(t *testing.T, s registration.Store) {
	r := &registration.Registration{ID: "dev", Group: "g", State: dps.RegistrationState{RegistrationID: "Dev", Status: dps.Assigned}}
	update(t, s, func(tx registration.Tx) error { return tx.PutRegistration("scope", r) })
	if err := s.Update(t.Context(), func(tx registration.Tx) error { return tx.PutRegistration("scope", r) }); !errors.Is(err, registration.ErrConflict) {
		t.Errorf("created twice: %v", err)
	}
	var got *registration.Registration
	view(t, s, func(tx registration.Tx) (err error) {
		got, err = tx.Registration("scope", "dev")
		return err
	})
	if got.Version != 1 || got.State.RegistrationID != "Dev" {
		t.Errorf("%+v", got)
	}
	update(t, s, func(tx registration.Tx) error { return tx.PutRegistration("scope", got) })
	if err := s.Update(t.Context(), func(tx registration.Tx) error { return tx.PutRegistration("scope", got) }); !errors.Is(err, registration.ErrConflict) {
		t.Errorf("written from a stale version: %v", err)
	}
	view(t, s, func(tx registration.Tx) error {
		if page, err := tx.Registrations("scope", "g", "", 10); err != nil || len(page) != 1 || page[0].Version != 2 {
			t.Errorf("by group: %v, %v", page, err)
		}
		if page, err := tx.Registrations("scope", "g", "dev", 10); err != nil || len(page) != 0 {
			t.Errorf("behind the last: %v, %v", page, err)
		}
		return nil
	})
	update(t, s, func(tx registration.Tx) error { return tx.DeleteRegistration("scope", "dev") })
}

// scopes: nothing of one scope is visible, or usable, from another.
func scopes(t *testing.T, s registration.Store) {
	cert := registration.Certificate{Fingerprint: sha256.Sum256([]byte("f")), Subject: sha256.Sum256([]byte("s"))}
	g := group("g")
	g.Certificates = []registration.Certificate{cert}
	update(t, s, func(tx registration.Tx) error {
		return errors.Join(tx.PutRecord("one", g), tx.PutRegistration("one", &registration.Registration{ID: "dev", Group: "g"}),
			tx.PutDevice("one", &registration.Device{ID: "dev"}), tx.PutPolicy("one", &registration.Policy{Name: "owner", Primary: []byte("p"), Secondary: []byte("s")}))
	})
	view(t, s, func(tx registration.Tx) error {
		_, e1 := tx.Record("two", registration.Group, "g")
		_, e2 := tx.Registration("two", "dev")
		_, e3 := tx.Device("two", "dev")
		_, e4 := tx.Policy("two", "owner")
		for i, err := range []error{e1, e2, e3, e4} {
			if !errors.Is(err, registration.ErrNotFound) {
				t.Errorf("%d: %v", i, err)
			}
		}
		a, _ := tx.Records("two", registration.Group, "", 10)
		b, _ := tx.SymmetricGroups("two")
		c, _ := tx.GroupsBySubject("two", cert.Subject)
		d, _ := tx.Registrations("two", "g", "", 10)
		if len(a)+len(b)+len(c)+len(d) != 0 {
			t.Errorf("another scope sees %v %v %v %v", a, b, c, d)
		}
		if p, err := tx.Policy("one", "owner"); err != nil || string(p.Primary) != "p" || string(p.Secondary) != "s" {
			t.Errorf("policy %v, %v", p, err)
		}
		return nil
	})
	update(t, s, func(tx registration.Tx) error { return tx.PutRecord("two", g) }) // the same certificate, in another scope
}

// updates: many at once; those that fail leave nothing and take nobody along.
func updates(t *testing.T, s registration.Store) {
	boom := errors.New("boom")
	var wg sync.WaitGroup
	for i := range 200 {
		wg.Go(func() {
			err := s.Update(t.Context(), func(tx registration.Tx) error {
				if i%7 == 1 {
					return boom // before writing
				}
				if err := tx.PutDevice("scope", &registration.Device{ID: fmt.Sprint("dev-", i)}); err != nil {
					return err
				}
				if i%5 == 1 {
					return boom // after writing
				}
				return nil
			})
			if bad := i%7 == 1 || i%5 == 1; bad != errors.Is(err, boom) {
				t.Errorf("update %d: %v", i, err)
			}
		})
	}
	wg.Wait()
	view(t, s, func(tx registration.Tx) error {
		for i := range 200 {
			_, err := tx.Device("scope", fmt.Sprint("dev-", i))
			if bad := i%7 == 1 || i%5 == 1; bad != errors.Is(err, registration.ErrNotFound) {
				t.Errorf("device %d: %v", i, err)
			}
		}
		return nil
	})
}

func devices(t *testing.T, s registration.Store) {
	d := registration.Device{ID: "dev", Group: "g", Serial: "SN", KeyHash: "0a"}
	update(t, s, func(tx registration.Tx) error { return tx.PutDevice("scope", &d) })
	view(t, s, func(tx registration.Tx) error {
		if got, err := tx.Device("scope", "dev"); err != nil || *got != d {
			t.Errorf("%+v, %v", got, err)
		}
		return nil
	})
}
