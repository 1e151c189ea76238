package registrationtest

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/registration"
)

// tenants are scopes with their settings, what is kept of them, and their end.
func tenants(t *testing.T, s registration.Store) {
	by := registration.Actor{Name: "test", Remote: "192.0.2.1"}
	now := attesttest.Now
	edit := func(id, name string) error {
		now = now.Add(time.Millisecond)
		_, _, err := registration.EditScope(t.Context(), s, id, by, "put", now, func(sc *registration.Scope) (*registration.Scope, error) {
			if sc == nil {
				sc = &registration.Scope{ID: id}
			}
			sc.Name = name
			sc.Hubs = append(sc.Hubs, registration.LinkedHub{Name: fmt.Sprintf("hub-%d.example", len(sc.Hubs)), ConnectionString: "secret"})
			return sc, nil
		})
		return err
	}
	for _, c := range [][2]string{{"0neA", "Plant-A"}, {"0neA", "plant-a"}, {"0neB", "plant-b"}} {
		if err := edit(c[0], c[1]); err != nil {
			t.Fatal(err)
		}
	}
	if err := edit("0neC", "PLANT-B"); !errors.Is(err, registration.ErrConflict) {
		t.Errorf("a second service of that name: %v", err)
	}
	var before int64
	view(t, s, func(tx registration.Tx) error {
		sc, err := tx.ScopeByName("PLANT-A")
		if err != nil || sc.ID != "0neA" || sc.Version != 2 || len(sc.Hubs) != 2 || sc.Hubs[1].ConnectionString != "secret" {
			t.Errorf("by name: %+v, %v", sc, err)
		}
		if _, err := tx.Scope("0nec"); !errors.Is(err, registration.ErrNotFound) {
			t.Errorf("a scope that was refused: %v", err)
		}
		all, err := tx.Scopes("", 10)
		if err != nil || len(all) != 2 {
			t.Errorf("%v, %v", all, err)
		}
		if entries, err := tx.Audits("0nea", "", 10); err != nil || len(entries) != 2 || entries[0].After == "" || entries[0].Before != "" || entries[1].Before != entries[0].After {
			t.Errorf("audit: %+v, %v", entries, err)
		}
		before, err = tx.Revision("0nea")
		return err
	})
	update(t, s, func(tx registration.Tx) error { return tx.PutRecord("0nea", group("g")) })
	view(t, s, func(tx registration.Tx) error {
		if now, err := tx.Revision("0nea"); err != nil || now <= before {
			t.Errorf("revision %d after %d, %v", now, before, err)
		}
		return nil
	})
	if err := s.Update(t.Context(), func(tx registration.Tx) error {
		sc, err := tx.Scope("0nea")
		if err != nil {
			return err
		}
		sc.Version--
		return tx.PutScope(sc)
	}); !errors.Is(err, registration.ErrConflict) {
		t.Errorf("over another version: %v", err)
	}

	update(t, s, func(tx registration.Tx) error {
		for _, name := range []string{"b", "a"} {
			if err := tx.PutPolicy("0nea", &registration.Policy{Name: name, Rights: "EnrollmentRead", Primary: []byte("1"), Secondary: []byte("2")}); err != nil {
				return err
			}
		}
		return errors.Join(tx.PutPolicy("0neb", &registration.Policy{Name: "a", Primary: []byte("3"), Secondary: []byte("4")}), tx.DeletePolicy("0nea", "b"))
	})
	view(t, s, func(tx registration.Tx) error {
		if all, err := tx.Policies("0nea"); err != nil || len(all) != 1 || string(all[0].Primary) != "1" {
			t.Errorf("policies: %v, %v", all, err)
		}
		return nil
	})

	// Emptied, it has its row and its policies still; every group that was there counts as deleted, and none that comes after.
	update(t, s, func(tx registration.Tx) (err error) {
		if done, err := tx.EmptyScope("0nea", 1); done || err != nil {
			t.Errorf("more was there than one row: %v", err)
		}
		for done := false; !done && err == nil; {
			done, err = tx.EmptyScope("0nea", 1)
		}
		return err
	})
	update(t, s, func(tx registration.Tx) error { return tx.PutRecord("0nea", group("after")) })
	view(t, s, func(tx registration.Tx) error {
		if w, d, err := tx.ChangedGroups("0nea", before); err != nil || len(w) != 1 || w[0].ID != "after" || len(d) != 1 || d[0] != "" {
			t.Errorf("changed when all are gone: %v, %q, %v", w, d, err)
		}
		if sc, err := tx.Scope("0nea"); err != nil || len(sc.Hubs) != 2 {
			t.Errorf("emptied: %+v, %v", sc, err)
		}
		if all, err := tx.Policies("0nea"); err != nil || len(all) != 1 {
			t.Errorf("its policies: %v, %v", all, err)
		}
		if all, err := tx.Audits("0nea", "", 10); err != nil || len(all) != 0 {
			t.Errorf("its audit record: %v, %v", all, err)
		}
		return nil
	})
	if err := DeleteScope(t.Context(), s, "0neA", by, attesttest.Now); err != nil {
		t.Fatal(err)
	}
	if err := DeleteScope(t.Context(), s, "0neA", by, attesttest.Now); err != nil {
		t.Errorf("deleted again: %v", err)
	}
	view(t, s, func(tx registration.Tx) error {
		if _, err := tx.Record("0nea", registration.Group, "g"); !errors.Is(err, registration.ErrNotFound) {
			t.Errorf("a group of a deleted scope: %v", err)
		}
		if _, err := tx.ScopeByName("plant-a"); !errors.Is(err, registration.ErrNotFound) {
			t.Errorf("its name: %v", err)
		}
		if sc, err := tx.Scope("0nea"); err != nil || !sc.Deleting || len(sc.Hubs) > 0 {
			t.Errorf("its row: %+v, %v", sc, err)
		}
		if now, err := tx.Revision("0nea"); err != nil || now <= before {
			t.Errorf("revision %d after %d, %v", now, before, err)
		}
		if all, err := tx.Policies("0neb"); err != nil || len(all) != 1 {
			t.Errorf("another scope lost its policies: %v, %v", all, err)
		}
		return nil
	})
	// Whoever was let in before and writes now, such as an import that takes its time, leaves nothing behind.
	if err := s.Update(t.Context(), func(tx registration.Tx) error {
		return errors.Join(tx.PutRecord("0nea", group("late")), tx.PutAudit("0nea", registration.NewAudit(by, "create", "enrollmentGroup/late", nil, []byte("x"), now)))
	}); !errors.Is(err, registration.ErrNotFound) {
		t.Errorf("written of a deleted scope: %v", err)
	}
	view(t, s, func(tx registration.Tx) error {
		if _, err := tx.Record("0nea", registration.Group, "late"); !errors.Is(err, registration.ErrNotFound) {
			t.Errorf("a deleted scope has a group again: %v", err)
		}
		return nil
	})
	if err := edit("0neD", "plant-a"); err != nil {
		t.Errorf("the name is free again: %v", err)
	}
}

// DeleteScope deletes a scope, from the first step to the last.
func DeleteScope(ctx context.Context, store registration.Store, id string, by registration.Actor, now time.Time) error {
	err := registration.CloseScope(ctx, store, id, by, "", now)
	if err == nil {
		_, err = registration.EndErasure(ctx, store, id, now)
	}
	return err
}

// EraseScope erases a scope, from the first step to the last.
func EraseScope(ctx context.Context, store registration.Store, id string, by registration.Actor, now time.Time) error {
	err := registration.BeginErasure(ctx, store, id, by, now)
	if err == nil {
		_, err = registration.EndErasure(ctx, store, id, now)
	}
	return err
}
