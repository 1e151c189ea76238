package registrationtest

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
)

// outbox is what hubs have yet to be told: one of two workers gets a task, a lease that ends makes it anybody's, and no version is
// written over.
func outbox(t *testing.T, s registration.Store) {
	now := attesttest.Now
	task := func(id string, due time.Time) *registration.Task {
		return &registration.Task{ID: id, Due: due, Begun: now, Hub: "hub.example", Away: []registration.Place{{Hub: "old.example", DeviceID: id, New: true}}, Goal: &registration.Goal{
			Place: registration.Place{Hub: "hub.example", DeviceID: id}, Operation: "5.op", Told: "hash", Twin: &registration.HubTwin{Tags: []byte(`{"a":1}`)},
			Device: &registration.HubDevice{ID: id, Keys: &dps.SymmetricKeyAttestation{PrimaryKey: "secret one", SecondaryKey: "secret two"}}}}
	}
	update(t, s, func(tx registration.Tx) error {
		return errors.Join(tx.PutTask("scope", task("b", now.Add(time.Millisecond))), tx.PutTask("scope", task("a", now.Add(time.Second))), tx.PutTask("other", task("a", now)))
	})
	err := s.Update(t.Context(), func(tx registration.Tx) error { return tx.PutTask("scope", task("a", now)) })
	if !errors.Is(err, registration.ErrConflict) {
		t.Errorf("a second first one: %v", err)
	}
	view(t, s, func(tx registration.Tx) error {
		got, err := tx.Task("scope", "a")
		if err != nil || got.ID != "a" || got.Scope != "scope" || got.Version != 1 || !got.Due.Equal(now.Add(time.Second)) || got.Hub != "hub.example" || got.Goal.Device.Keys.SecondaryKey != "secret two" ||
			string(got.Goal.Twin.Tags) != `{"a":1}` || !got.Away[0].New || !got.Begun.Equal(now) {
			t.Errorf("%+v, %v", got, err)
		}
		if _, err := tx.Task("scope", "c"); !errors.Is(err, registration.ErrNotFound) {
			t.Errorf("none: %v", err)
		}
		due, err := tx.DueTasks(now.Add(time.Second), 10, 10)
		if err != nil || len(due) != 3 || due[0].Scope != "other" || due[1].ID != "b" || due[2].ID != "a" || due[1].Goal != nil {
			t.Errorf("due: %v, %v", due, err)
		}
		if due, err := tx.DueTasks(now, 10, 10); err != nil || len(due) != 1 {
			t.Errorf("due now: %v, %v", due, err)
		}
		if due, err := tx.DueTasks(now.Add(time.Hour), 10, 1); err != nil || len(due) != 1 {
			t.Errorf("one of them: %v, %v", due, err)
		}
		if due, err := tx.DueTasks(now.Add(time.Hour), 1, 10); err != nil || len(due) != 2 || due[0].Scope != "other" || due[1].ID != "b" {
			t.Errorf("one for each hub: %v, %v", due, err)
		}
		page, err := tx.Tasks("scope", "a", 10)
		if err != nil || len(page) != 1 || page[0].ID != "b" || page[0].Goal == nil {
			t.Errorf("%v, %v", page, err)
		}
		return nil
	})
	var got atomic.Int64
	claim := func(owner string, at time.Time) {
		err := s.Update(t.Context(), func(tx registration.Tx) error {
			k, err := tx.Task("scope", "a")
			if err != nil || at.Before(k.Due) {
				return errors.Join(err, registration.ErrConflict)
			}
			k.Owner, k.Due = owner, at.Add(time.Minute)
			return tx.PutTask("scope", k)
		})
		if err == nil {
			got.Add(1)
		} else if !errors.Is(err, registration.ErrConflict) {
			t.Error(err)
		}
	}
	for _, at := range []time.Time{now.Add(time.Second), now.Add(2 * time.Minute)} {
		got.Store(0)
		var wg sync.WaitGroup
		for i := range 8 {
			wg.Go(func() { claim(fmt.Sprint("worker ", i), at) })
		}
		if wg.Wait(); got.Load() != 1 {
			t.Errorf("%d workers have the task at %v", got.Load(), at)
		}
	}
	stale := task("a", now)
	stale.Version = 1
	for what, f := range map[string]func(registration.Tx) error{
		"written": func(tx registration.Tx) error { return tx.PutTask("scope", stale) }, "deleted": func(tx registration.Tx) error { return tx.DeleteTask("scope", stale) },
		// What came before it in the transaction is undone with it.
		"written behind another": func(tx registration.Tx) error {
			if err := tx.PutEdge("scope", "undone", "x"); err != nil {
				return err
			}
			return tx.PutTask("scope", stale)
		},
		"a registration behind another": func(tx registration.Tx) error {
			if err := tx.PutEdge("scope", "undone", "x"); err != nil {
				return err
			}
			return tx.PutRegistration("scope", &registration.Registration{ID: "nobody", Version: 7})
		},
	} {
		if err := s.Update(t.Context(), f); !errors.Is(err, registration.ErrConflict) {
			t.Errorf("%s over another version: %v", what, err)
		}
	}
	update(t, s, func(tx registration.Tx) error {
		if _, err := tx.Edge("scope", "undone"); !errors.Is(err, registration.ErrNotFound) {
			t.Errorf("half a transaction is there: %v", err)
		}
		k, err := tx.Task("scope", "a")
		if err != nil || k.Version != 3 {
			return fmt.Errorf("%+v, %w", k, err)
		}
		return tx.DeleteTask("scope", k)
	})

	places := []registration.Orphan{{ID: "a", Hub: "A.example", DeviceID: "D"}, {ID: "a", Hub: "a.example", DeviceID: "d"}, {ID: "a", Hub: "b.example", DeviceID: "D"}, {ID: "b", Hub: "a.example", DeviceID: "D"}}
	update(t, s, func(tx registration.Tx) (err error) {
		for i := range places {
			err = errors.Join(err, tx.PutOrphan("scope", &places[i]), tx.PutOrphan("scope", &places[i]))
		}
		return errors.Join(err, tx.PutOrphan("other", &places[0]))
	})
	update(t, s, func(tx registration.Tx) error {
		var all []*registration.Orphan
		for after := (registration.Orphan{}); ; after = *all[len(all)-1] {
			page, err := tx.Orphans("scope", after, 1)
			if err != nil || len(page) == 0 {
				if len(all) != 4 || all[0].Hub != "A.example" || all[3].ID != "b" {
					t.Errorf("orphans %v, %v", all, err)
				}
				break
			}
			all = append(all, page...)
		}
		if err := tx.DeleteOrphan("scope", &registration.Orphan{ID: "a", Hub: "a.EXAMPLE", DeviceID: "D"}); err != nil {
			t.Error(err)
		}
		if err := tx.DeleteOrphan("scope", &places[0]); !errors.Is(err, registration.ErrNotFound) {
			t.Errorf("deleted again: %v", err)
		}
		return nil
	})

	update(t, s, func(tx registration.Tx) (err error) {
		for _, id := range []string{"c1", "c2", "c3"} {
			err = errors.Join(err, tx.PutKin("scope", &registration.Kin{ID: id, Parent: "gate", Place: registration.Place{Hub: "h", DeviceID: id}, Device: &registration.HubDevice{ID: id}}))
		}
		return errors.Join(err, tx.PutKin("scope", &registration.Kin{ID: "c2", Parent: "other", Linked: "edge"}), tx.PutEdge("scope", "gate", "g1"), tx.PutEdge("scope", "gate", "g2"))
	})
	update(t, s, func(tx registration.Tx) error {
		if all, err := tx.Children("scope", "gate", "", 10); err != nil || len(all) != 2 || all[1].ID != "c3" || all[1].Device.ID != "c3" {
			t.Errorf("children %v, %v", all, err)
		}
		if all, err := tx.Children("scope", "gate", "c1", 1); err != nil || len(all) != 1 || all[0].ID != "c3" {
			t.Errorf("children after c1: %v, %v", all, err)
		}
		if k, err := tx.Kin("scope", "c2"); err != nil || k.Parent != "other" || k.Linked != "edge" {
			t.Errorf("%+v, %v", k, err)
		}
		if id, err := tx.Edge("scope", "gate"); err != nil || id != "g2" {
			t.Errorf("%s, %v", id, err)
		}
		if err := tx.DeleteKin("scope", "c2"); err != nil {
			return err
		}
		_, err := tx.Kin("scope", "c2")
		if !errors.Is(err, registration.ErrNotFound) {
			t.Errorf("deleted: %v", err)
		}
		return nil
	})
	for done := false; !done; {
		update(t, s, func(tx registration.Tx) (err error) { done, err = tx.EraseScope("scope", 2); return err })
	}
	view(t, s, func(tx registration.Tx) error {
		due, err := tx.DueTasks(now.Add(time.Hour), 10, 10)
		if err != nil || len(due) != 1 || due[0].Scope != "other" {
			t.Errorf("after the scope was erased: %v, %v", due, err)
		}
		orphans, err1 := tx.Orphans("scope", registration.Orphan{}, 10)
		children, err2 := tx.Children("scope", "gate", "", 10)
		if len(orphans)+len(children) > 0 {
			t.Errorf("%v, %v", orphans, children)
		}
		return errors.Join(err1, err2)
	})
}
