package registrationtest

import (
	"errors"
	"fmt"
	"reflect"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
)

// counts are how many there are of what quotas are on.
func counts(t *testing.T, s registration.Store) {
	update(t, s, func(tx registration.Tx) error {
		for i := range 5 {
			if err := tx.PutRecord("scope", &registration.Record{Kind: registration.Individual, ID: fmt.Sprintf("dev-%d", i), Document: []byte(`{}`)}); err != nil {
				return err
			}
			if err := tx.PutRegistration("scope", &registration.Registration{ID: fmt.Sprintf("dev-%d", i)}); err != nil {
				return err
			}
		}
		return errors.Join(tx.PutRecord("scope", group("k1")), tx.PutRecord("scope", group("k2")), tx.PutRecord("other", group("k3")),
			tx.PutRecord("scope", &registration.Record{Kind: registration.Group, ID: "ca", Document: []byte(`{}`)}), tx.DeleteRegistration("scope", "dev-0"))
	})
	view(t, s, func(tx registration.Tx) error {
		for what, want := range map[registration.Counted]int64{registration.CountEnrollments: 5, registration.CountRegistrations: 4, registration.CountSymmetricGroups: 2, registration.CountX509Groups: 1} {
			if n, err := tx.Count("scope", what, 100); err != nil || n != want {
				t.Errorf("%s: %d, want %d, %v", what, n, want, err)
			}
			if n, err := tx.Count("scope", what, 2); err != nil || n != min(want, 2) {
				t.Errorf("%s, at most 2: %d, %v", what, n, err)
			}
		}
		if _, err := tx.Count("scope", "sheep", 2); err == nil {
			t.Error("sheep were counted")
		}
		return nil
	})
}

// usage is added to, day by day.
func usage(t *testing.T, s registration.Store) {
	add := func(scope, day, operation string, calls int64) {
		t.Helper()
		update(t, s, func(tx registration.Tx) error {
			return tx.AddUsage(scope, registration.Usage{Day: day, API: registration.UsageDevice, Operation: operation, Result: "success", Calls: calls})
		})
	}
	add("scope", "2026-11-20", "register", 3)
	add("scope", "2026-11-21", "status", 1)
	add("scope", "2026-11-21", "register", 4)
	add("scope", "2026-11-21", "register", 5)
	add("other", "2026-11-21", "register", 100)
	add("scope", "2026-11-22", "register", 1)
	view(t, s, func(tx registration.Tx) error {
		got, err := tx.Usage("scope", "2026-11-20", "2026-11-21")
		line := func(day, operation string, calls int64) registration.Usage {
			return registration.Usage{Day: day, API: registration.UsageDevice, Operation: operation, Result: "success", Calls: calls}
		}
		if want := []registration.Usage{line("2026-11-20", "register", 3), line("2026-11-21", "register", 9), line("2026-11-21", "status", 1)}; err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%v, %v", got, err)
		}
		return nil
	})
}

// attempts are found by device and by tracking ID, and the oldest go first.
func attempts(t *testing.T, s registration.Store) {
	at := attesttest.Now
	var ids []string
	put := func(scope, device string, class registration.AttemptClass, tracking string) {
		t.Helper()
		at = at.Add(time.Second)
		a := &registration.Attempt{ID: dps.NewOrderedID(at), Class: class, RegistrationID: device, At: at, Operation: "register", Result: "refused", TrackingID: tracking,
			Proof: "x509", Certificate: &registration.Presented{Subject: "CN=" + device}}
		ids = append(ids, a.ID)
		update(t, s, func(tx registration.Tx) error { return tx.PutAttempt(scope, device, a) })
	}
	for i := range 6 {
		put("scope", fmt.Sprintf("dev-%d", i%2), registration.AttemptKnown, fmt.Sprintf("track-%d", i))
	}
	put("scope", "dev-0", registration.AttemptStranger, "")
	put("other", "dev-0", registration.AttemptKnown, "track-1")
	left := func(device string, want ...int) {
		t.Helper()
		view(t, s, func(tx registration.Tx) error {
			all, err := tx.Attempts("scope", device)
			if err != nil || len(all) != len(want) {
				t.Errorf("%s: %d attempts, want %d, %v", device, len(all), len(want), err)
				return nil
			}
			for i, a := range all {
				if a.ID != ids[want[i]] || a.RegistrationID != device || a.Certificate.Subject != "CN="+device {
					t.Errorf("%s, %d: %+v", device, i, a)
				}
			}
			return nil
		})
	}
	left("dev-0", 6, 4, 2, 0)
	left("dev-1", 5, 3, 1)
	view(t, s, func(tx registration.Tx) error {
		if a, err := tx.AttemptByTracking("scope", "track-3"); err != nil || a.ID != ids[3] || a.Class != registration.AttemptKnown {
			t.Errorf("%+v, %v", a, err)
		}
		for _, none := range []string{"track-9", ""} {
			if _, err := tx.AttemptByTracking("scope", none); !errors.Is(err, registration.ErrNotFound) {
				t.Errorf("tracking ID %q: %v", none, err)
			}
		}
		return nil
	})
	trim := func(class registration.AttemptClass, keep int, before string, limit int, want int64) {
		t.Helper()
		update(t, s, func(tx registration.Tx) error {
			if n, err := tx.TrimAttempts("scope", class, keep, before, limit); err != nil || n != want {
				t.Errorf("trimmed %d, want %d, %v", n, want, err)
			}
			return nil
		})
	}
	trim(registration.AttemptKnown, 6, "", 10, 0)
	trim(registration.AttemptKnown, 4, "", 10, 2) // 0 and 1
	trim(registration.AttemptKnown, 2, "", 1, 1)  // 2
	left("dev-0", 6, 4)
	left("dev-1", 5, 3)
	trim(registration.AttemptKnown, 10, ids[4], 10, 2) // 3 and 4
	left("dev-0", 6)
	update(t, s, func(tx registration.Tx) error {
		return errors.Join(tx.DeleteAttempt("scope", "dev-1", ids[5]), tx.DeleteAttempt("scope", "dev-1", ids[5]))
	})
	left("dev-1")
	// All of it goes with its scope.
	update(t, s, func(tx registration.Tx) error {
		for done := false; !done; {
			var err error
			if done, err = tx.EraseScope("scope", 100); err != nil {
				return err
			}
		}
		return nil
	})
	left("dev-0")
	view(t, s, func(tx registration.Tx) error {
		if all, err := tx.Attempts("other", "dev-0"); err != nil || len(all) != 1 {
			t.Errorf("another scope's: %v, %v", all, err)
		}
		return nil
	})
}
