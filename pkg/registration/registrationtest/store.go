// Package registrationtest is the contract of registration.Store as a test suite. Every store runs it.
package registrationtest

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/bundle"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
)

// Run runs the suite on a store that open returns; each call gives an empty one.
func Run(t *testing.T, open func(t *testing.T) registration.Store) {
	for name, f := range map[string]func(*testing.T, registration.Store){
		"records": records, "certificates": certificates, "registrations": registrations, "scopes": scopes, "tenants": tenants, "updates": updates, "devices": devices, "orders": orders, "endings": endings, "authorities": authorities, "changes": changes, "issued": issuedCertificates, "challenges": challenges, "fresh": fresh, "outbox": outbox, "caCertificates": caCertificates, "counts": counts, "usage": usage, "attempts": attempts,
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
		rev, err = tx.Revision("scope")
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
		if now, err := tx.Revision("scope"); err != nil || now == rev {
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
		got, err := tx.GroupsByCA("scope", cert.Subject, nil, 1)
		if err != nil || len(got) != 1 || got[0].ID != "ca" {
			t.Errorf("%v, %v", got, err)
		}
		if got, err := tx.GroupsByCA("scope", cert.Fingerprint, nil, 1); err != nil || len(got) != 0 {
			t.Errorf("another subject: %v, %v", got, err)
		}
		return nil
	})
	other := &registration.Record{Kind: registration.Individual, ID: "dev", Document: []byte(`{}`), Certificates: g.Certificates}
	if err := s.Update(t.Context(), func(tx registration.Tx) error { return tx.PutRecord("scope", other) }); !errors.Is(err, registration.ErrConflict) || !owned(err, registration.Group, "ca") {
		t.Errorf("one certificate in two enrollments: %v", err)
	}
	free := registration.Certificate{Fingerprint: sha256.Sum256([]byte("free")), Subject: cert.Subject}
	fresh := &registration.Record{Kind: registration.Individual, ID: "fresh", Document: []byte(`{}`), Fresh: true, Certificates: []registration.Certificate{free, cert}}
	if err := s.Update(t.Context(), func(tx registration.Tx) error {
		if err := tx.PutRecord("scope", fresh); !errors.Is(err, registration.ErrConflict) || !owned(err, registration.Group, "ca") {
			t.Errorf("one certificate in two enrollments, the second a fresh one: %v", err)
		}
		fresh.Certificates = fresh.Certificates[:1]
		return tx.PutRecord("scope", fresh) // of the first try nothing is left
	}); err != nil {
		t.Error(err)
	}
	update(t, s, func(tx registration.Tx) error { return tx.DeleteRecord("scope", registration.Group, "ca") })
	update(t, s, func(tx registration.Tx) error { return tx.PutRecord("scope", other) })
}

// owned reports whether a conflict says whose it is.
func owned(err error, kind registration.Kind, id string) bool {
	e, ok := errors.AsType[*registration.OwnerError](err)
	return ok && e.Kind == kind && e.ID == id
}

// authorities: groups are found by what certificates say of their issuer, and no two have one CA.
func authorities(t *testing.T, s registration.Store) {
	subject := sha256.Sum256([]byte("s"))
	ca := func(id string, keys ...string) *registration.Record {
		g := &registration.Record{Kind: registration.Group, ID: id, Document: []byte(`{}`)}
		for i, k := range keys {
			key := sha256.Sum256([]byte(k))
			g.Certificates = append(g.Certificates, registration.Certificate{Fingerprint: sha256.Sum256([]byte(id + fmt.Sprint(i))), Subject: subject,
				Key: hex.EncodeToString(key[:]), KeyIDs: [][]byte{[]byte("id of " + k), []byte("shared")}})
		}
		return g
	}
	update(t, s, func(tx registration.Tx) error {
		return errors.Join(tx.PutRecord("scope", ca("A", "1", "2")), tx.PutRecord("scope", ca("B", "3", "3")), tx.PutRecord("scope", ca("C", "4")))
	})
	want := func(what string, subject [32]byte, keyID []byte, limit int, wantErr error, want ...string) {
		t.Helper()
		view(t, s, func(tx registration.Tx) error {
			got, err := tx.GroupsByCA("scope", subject, keyID, limit)
			var ids []string
			for _, g := range got {
				ids = append(ids, g.ID)
			}
			if !errors.Is(err, wantErr) || !slices.Equal(ids, want) {
				t.Errorf("%s: %v, %v", what, ids, err)
			}
			return nil
		})
	}
	key1 := sha256.Sum256([]byte("1"))
	want("by identifier", subject, []byte("id of 2"), 1, nil, "A")
	want("by its key", subject, key1[:], 1, nil, "A")
	want("an identifier of two certificates", subject, []byte("id of 3"), 1, nil, "B")
	want("an identifier of all", subject, []byte("shared"), 3, nil, "A", "B", "C")
	want("of too many", subject, []byte("shared"), 2, registration.ErrTooMany)
	want("by name", subject, nil, 3, nil, "A", "B", "C")
	want("by a name of too many", subject, nil, 2, registration.ErrTooMany)
	want("another identifier", subject, []byte("id of"), 3, nil)
	want("an empty identifier", subject, []byte{}, 3, nil)
	want("another subject", key1, []byte("id of 1"), 3, nil)

	refused := func(what string, r *registration.Record) {
		t.Helper()
		err := s.Update(t.Context(), func(tx registration.Tx) error { return tx.PutRecord("scope", r) })
		if !errors.Is(err, registration.ErrSameCA) || !errors.Is(err, registration.ErrConflict) || !owned(err, registration.Group, "a") {
			t.Errorf("%s: %v", what, err)
		}
	}
	refused("another certificate of A's key", ca("D", "2"))
	refused("as a second one", ca("D", "5", "2"))
	refused("of C, which had none of it", ca("C", "4", "2"))
	if err := s.Update(t.Context(), func(tx registration.Tx) error {
		return tx.PutRecord("scope", &registration.Record{Kind: registration.Group, ID: "D", Document: []byte(`{}`), Certificates: ca("A", "1").Certificates})
	}); !errors.Is(err, registration.ErrConflict) || errors.Is(err, registration.ErrSameCA) {
		t.Errorf("the very certificate: %v", err)
	}
	other := ca("D", "2")
	other.Certificates[0].Subject = key1
	update(t, s, func(tx registration.Tx) error {
		return errors.Join(tx.PutRecord("scope", other), // the key by another name
			tx.PutRecord("other", ca("D", "2")), tx.PutRecord("scope", ca("A", "1")), tx.PutRecord("scope", ca("C", "4", "2")), tx.DeleteRecord("scope", registration.Group, "b"))
	})
	want("what A gave away", subject, []byte("id of 2"), 1, nil, "C")
	want("what was deleted", subject, []byte("id of 3"), 1, nil)
	individual := &registration.Record{Kind: registration.Individual, ID: "Dev", Document: []byte(`{}`), Certificates: []registration.Certificate{{Fingerprint: key1, Subject: subject, Key: hex.EncodeToString(key1[:])}}}
	update(t, s, func(tx registration.Tx) error { return tx.PutRecord("scope", individual) }) // a device may have a CA's key: it is enrolled by its certificate
	want("by name, individual enrollments apart", subject, nil, 2, nil, "A", "C")
	view(t, s, func(tx registration.Tx) error {
		if kind, id, err := tx.CertificateOwner("scope", key1); kind != registration.Individual || id != "dev" || err != nil {
			t.Errorf("whose: %s %s, %v", kind, id, err)
		}
		if kind, id, err := tx.CertificateOwner("scope", sha256.Sum256([]byte("C1"))); kind != registration.Group || id != "c" || err != nil {
			t.Errorf("whose: %s %s, %v", kind, id, err)
		}
		if _, _, err := tx.CertificateOwner("other", key1); !errors.Is(err, registration.ErrNotFound) {
			t.Errorf("nobody's: %v", err)
		}
		return nil
	})
}

// changes: who knows the groups of one revision is told what makes them those of another.
func changes(t *testing.T, s registration.Store) {
	known := map[string]string{}
	var at int64
	follow := func() {
		t.Helper()
		view(t, s, func(tx registration.Tx) error {
			written, deleted, err := tx.ChangedGroups("scope", at)
			if err != nil {
				return err
			}
			for _, id := range deleted {
				delete(known, id)
			}
			for _, g := range written {
				known[strings.ToLower(g.ID)] = string(g.Keys)
			}
			if at, err = tx.Revision("scope"); err != nil {
				return err
			}
			all, err := tx.Records("scope", registration.Group, "", 100)
			if len(all) != len(known) {
				t.Errorf("%d groups, %d are known", len(all), len(known))
			}
			for _, g := range all {
				if k, ok := known[strings.ToLower(g.ID)]; !ok || k != string(g.Keys) {
					t.Errorf("of %s is known %q, %v", g.ID, k, ok)
				}
			}
			return err
		})
	}
	put := func(id, keys string) {
		g := group(id)
		g.Keys = []byte(keys)
		update(t, s, func(tx registration.Tx) error { return tx.PutRecord("scope", g) })
	}
	gone := func(id string) {
		update(t, s, func(tx registration.Tx) error { return tx.DeleteRecord("scope", registration.Group, id) })
	}
	for i, f := range []func(){
		func() { put("A", "1"); put("B", "1"); put("C", "1") },
		func() { put("b", "2") },
		func() { gone("a"); put("D", "1") },
		func() { put("A", "3"); gone("b") },
		func() { put("E", "1"); gone("e") },
		func() { gone("a"); put("a", "4"); gone("a") },
		func() {},
		func() { // all of one transaction
			update(t, s, func(tx registration.Tx) error {
				return errors.Join(tx.DeleteRecord("scope", registration.Group, "c"), tx.PutRecord("scope", group("C")), tx.PutRecord("scope", group("F")), tx.PutRecord("other", group("G")))
			})
		},
	} {
		f()
		if i != 4 { // and twice at once
			follow()
		}
	}
	view(t, s, func(tx registration.Tx) error {
		if w, d, err := tx.ChangedGroups("scope", at); len(w)+len(d) > 0 || err != nil {
			t.Errorf("nothing has changed: %v, %v, %v", w, d, err)
		}
		return nil
	})
}

func registrations(t *testing.T, s registration.Store) {
	r := &registration.Registration{ID: "dev", Group: "g", State: dps.RegistrationState{RegistrationID: "Dev", Status: dps.Assigned},
		Admitted: &registration.Admission{Kind: registration.AdmittedByCA, Slot: "secondary", Fingerprint: []byte("0123456789abcdef")}}
	update(t, s, func(tx registration.Tx) error { return tx.PutRegistration("scope", r) })
	if err := s.Update(t.Context(), func(tx registration.Tx) error { return tx.PutRegistration("scope", r) }); !errors.Is(err, registration.ErrConflict) {
		t.Errorf("created twice: %v", err)
	}
	var got *registration.Registration
	view(t, s, func(tx registration.Tx) (err error) {
		got, err = tx.Registration("scope", "dev")
		return err
	})
	if got.Version != 1 || got.State.RegistrationID != "Dev" || !reflect.DeepEqual(got.Admitted, r.Admitted) {
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
	// All of a scope, by whatever they came in, and in pages; of no other scope.
	update(t, s, func(tx registration.Tx) error {
		return errors.Join(tx.PutRegistration("scope", &registration.Registration{ID: "alone"}), tx.PutRegistration("scopf", &registration.Registration{ID: "other"}))
	})
	view(t, s, func(tx registration.Tx) error {
		if page, err := tx.Registrations("scope", "", "", 1); err != nil || len(page) != 1 || page[0].ID != "alone" || page[0].Version != 1 {
			t.Errorf("the first of all: %v, %v", page, err)
		}
		if page, err := tx.Registrations("scope", "", "alone", 10); err != nil || len(page) != 1 || page[0].ID != "dev" {
			t.Errorf("the rest of all: %v, %v", page, err)
		}
		return nil
	})
	update(t, s, func(tx registration.Tx) error {
		return errors.Join(tx.DeleteRegistration("scope", "dev"), tx.DeleteRegistration("scope", "alone"), tx.DeleteRegistration("scopf", "other"))
	})
}

func challenges(t *testing.T, s registration.Store) {
	now := time.Unix(1_700_000_000, 0).UTC()
	put := func(scope, id string, expires time.Time) *registration.PendingChallenge {
		c := &registration.PendingChallenge{ID: id, EKHash: "ab", Begun: now, Expires: expires, Previous: &registration.Wrapped{Key: []byte("before " + id)},
			Wrapped: registration.Wrapped{Keys: attest.TPMKeys{EK: []byte("ek"), SRK: []byte("srk")}, Key: []byte("key " + id)}}
		update(t, s, func(tx registration.Tx) error { return tx.PutChallenge(scope, c, now) })
		return c
	}
	left := func(scope string, ids ...string) (n int) {
		view(t, s, func(tx registration.Tx) error {
			n = 0
			for _, id := range ids {
				if _, err := tx.Challenge(scope, id); err == nil {
					n++
				} else if !errors.Is(err, registration.ErrNotFound) {
					return err
				}
			}
			return nil
		})
		return n
	}
	put("scope", "dev", now.Add(time.Minute))
	want := put("scope", "dev", now.Add(time.Hour))
	view(t, s, func(tx registration.Tx) error {
		if got, err := tx.Challenge("scope", "dev"); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%+v, %v", got, err)
		}
		return nil
	})
	// What has expired goes as others come, in its own scope and a few at a time.
	old := []string{"old-0", "old-1", "old-2", "old-3", "old-4", "old-5", "old-6", "old-7"}
	for _, id := range old {
		put("other", id, now.Add(time.Hour))
		put("scope", id, now.Add(time.Minute))
	}
	now = now.Add(10 * time.Minute)
	before := len(old)
	for i := range 4 {
		put("scope", fmt.Sprintf("new-%d", i), now.Add(time.Hour))
		n := left("scope", old...)
		if n == before && n > 0 {
			t.Errorf("%d challenges that have expired stay", n)
		}
		before = n
	}
	if n, others := left("scope", append(old, "dev", "new-0", "new-3")...), left("other", old...); n != 3 || others != len(old) {
		t.Errorf("%d challenges are left, %d of another scope", n, others)
	}
	// A device's key is kept with its registration.
	r := &registration.Registration{ID: "dev", State: dps.RegistrationState{RegistrationID: "dev"}, DeviceKey: []byte("key of the hub")}
	update(t, s, func(tx registration.Tx) error { return tx.PutRegistration("scope", r) })
	for _, key := range []string{"key of the hub", "another", ""} {
		view(t, s, func(tx registration.Tx) (err error) {
			r, err = tx.Registration("scope", "dev")
			return err
		})
		if r.Version > 1 && string(r.DeviceKey) != key {
			t.Errorf("the key is %q, want %q", r.DeviceKey, key)
		}
		r.DeviceKey = map[string][]byte{"key of the hub": []byte("another")}[string(r.DeviceKey)]
		update(t, s, func(tx registration.Tx) error { return tx.PutRegistration("scope", r) })
	}
}

// scopes: nothing of one scope is visible, or usable, from another.
func scopes(t *testing.T, s registration.Store) {
	cert := registration.Certificate{Fingerprint: sha256.Sum256([]byte("f")), Subject: sha256.Sum256([]byte("s"))}
	g := group("g")
	g.Certificates = []registration.Certificate{cert}
	update(t, s, func(tx registration.Tx) error {
		return errors.Join(tx.PutRecord("one", g), tx.PutRegistration("one", &registration.Registration{ID: "dev", Group: "g"}),
			tx.PutDevice("one", &registration.Device{ID: "dev"}), tx.PutPolicy("one", &registration.Policy{Name: "owner", Primary: []byte("p"), Secondary: []byte("s")}),
			tx.PutSecret("one", "tickets", []byte("old")), tx.PutSecret("one", "tickets", []byte("t")))
	})
	view(t, s, func(tx registration.Tx) error {
		_, e1 := tx.Record("two", registration.Group, "g")
		_, e2 := tx.Registration("two", "dev")
		_, e3 := tx.Device("two", "dev")
		_, e4 := tx.Policy("two", "owner")
		_, e5 := tx.Secret("two", "tickets")
		_, e6 := tx.Secret("one", "other")
		for i, err := range []error{e1, e2, e3, e4, e5, e6} {
			if !errors.Is(err, registration.ErrNotFound) {
				t.Errorf("%d: %v", i, err)
			}
		}
		a, _ := tx.Records("two", registration.Group, "", 10)
		b, _ := tx.SymmetricGroups("two")
		c, _ := tx.GroupsByCA("two", cert.Subject, nil, 10)
		d, _ := tx.Registrations("two", "g", "", 10)
		if len(a)+len(b)+len(c)+len(d) != 0 {
			t.Errorf("another scope sees %v %v %v %v", a, b, c, d)
		}
		if p, err := tx.Policy("one", "owner"); err != nil || string(p.Primary) != "p" || string(p.Secondary) != "s" {
			t.Errorf("policy %v, %v", p, err)
		}
		if b, err := tx.Secret("one", "tickets"); err != nil || string(b) != "t" {
			t.Errorf("secret %q, %v", b, err)
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

// fresh: what is written together is what PutRecord and PutDevice write, and nothing of it is when anything is there.
func fresh(t *testing.T, s registration.Store) {
	const n = 123
	devices := func(prefix string) (records []*registration.Record, devices []*registration.Device) {
		for i := range n {
			id := fmt.Sprintf("%s-%03d", prefix, i)
			c := registration.Certificate{Fingerprint: sha256.Sum256([]byte(id)), Subject: sha256.Sum256([]byte("s" + id))}
			records = append(records, &registration.Record{Kind: registration.Individual, ID: strings.ToUpper(id), Document: []byte(id), Keys: []byte("k" + id), Content: []byte{byte(i)}, Certificates: []registration.Certificate{c}})
			devices = append(devices, &registration.Device{ID: id, Serial: "SN" + id, KeyHash: "0a" + id, Revision: 3, Station: "st", Grant: "PO-1/a"})
		}
		return records, devices
	}
	put := func(prefix string, edit func([]*registration.Record, []*registration.Device)) error {
		r, d := devices(prefix)
		edit(r, d)
		return s.Update(t.Context(), func(tx registration.Tx) error { return tx.PutFresh("scope", r, d) })
	}
	nothing := func([]*registration.Record, []*registration.Device) {}
	if err := put("a", nothing); err != nil {
		t.Fatal(err)
	}
	update(t, s, func(tx registration.Tx) error {
		return errors.Join(tx.PutRegistration("scope", &registration.Registration{ID: "b-100"}),
			tx.PutIssued("scope", &registration.Issued{ID: "x", SerialNumber: "1", KeyHash: "0ac-007", Plan: []byte("p")}))
	})
	wantRecords, wantDevices := devices("a")
	view(t, s, func(tx registration.Tx) error {
		for i, want := range wantRecords {
			r, err := tx.Record("scope", registration.Individual, wantDevices[i].ID)
			if err != nil {
				return err
			}
			if r.ID != want.ID || string(r.Document) != string(want.Document) || string(r.Keys) != string(want.Keys) || string(r.Content) != string(want.Content) || r.Closed || r.Symmetric {
				t.Errorf("%+v", r)
			}
			if d, err := tx.DeviceBySerial("scope", wantDevices[i].Serial); err != nil || *d != *wantDevices[i] {
				t.Errorf("%+v, %v", d, err)
			}
			if kind, id, err := tx.CertificateOwner("scope", want.Certificates[0].Fingerprint); err != nil || kind != registration.Individual || id != wantDevices[i].ID {
				t.Errorf("certificate of %s %s, %v", kind, id, err)
			}
		}
		return nil
	})
	for what, err := range map[string]error{
		"the same": put("a", nothing),
		"an ID":    put("d", func(r []*registration.Record, d []*registration.Device) { r[n-1].ID, d[n-1].ID = "a-000", "a-000" }),
		"twice":    put("d", func(r []*registration.Record, d []*registration.Device) { r[9].ID, d[9].ID = r[8].ID, d[8].ID }),
		"a serial": put("d", func(_ []*registration.Record, d []*registration.Device) { d[60].Serial = "SNa-000" }),
		"a certificate": put("d", func(r []*registration.Record, _ []*registration.Device) {
			r[3].Certificates[0].Fingerprint = wantRecords[5].Certificates[0].Fingerprint
		}),
		"a registration": put("b", nothing), "an issued key": put("c", nothing),
	} {
		if !errors.Is(err, registration.ErrConflict) {
			t.Errorf("%s is there: %v", what, err)
		}
	}
	view(t, s, func(tx registration.Tx) error {
		if all, err := tx.Records("scope", registration.Individual, "", 1000); err != nil || len(all) != n {
			t.Errorf("%d records, %v", len(all), err)
		}
		return nil
	})
}

func devices(t *testing.T, s registration.Store) {
	d := registration.Device{ID: "dev", Group: "g", Serial: "SN", KeyHash: "0a", Revision: -1, Ended: 3, State: bundle.Scrapped, Station: "st", Moved: true, Seen: true, Disabled: true}
	update(t, s, func(tx registration.Tx) error { return tx.PutDevice("scope", &d) })
	view(t, s, func(tx registration.Tx) error {
		if got, err := tx.Device("scope", "dev"); err != nil || *got != d {
			t.Errorf("%+v, %v", got, err)
		}
		return nil
	})
}

func orders(t *testing.T, s registration.Store) {
	device := func(id, serial, grant string) *registration.Device {
		return &registration.Device{ID: id, Serial: serial, Grant: grant, Station: "st"}
	}
	update(t, s, func(tx registration.Tx) error {
		errs := []error{
			tx.PutGrant("scope", &registration.Grant{ID: "PO-1", Order: "PO-1", Station: "st", Quantity: 9, Digest: "d", Document: []byte("document")}),
			tx.PutGrant("scope", &registration.Grant{ID: "PO-1/a", Order: "PO-1", Station: "su", Quantity: 3, Digest: "e", Document: []byte("lease")}),
			tx.PutGrant("scope", &registration.Grant{ID: "PO-2", Order: "PO-2", Quantity: 1, Digest: "f", Document: []byte("other")}),
			tx.PutGrant("other", &registration.Grant{ID: "PO-1", Order: "PO-1", Quantity: 1, Digest: "g", Document: []byte("of another scope")}),
			tx.AddToGrant("scope", "PO-1", registration.Tally{Used: 1, Imported: 2, Seen: 3, Refused: 4, Voided: 5, Reworked: 6, Scrapped: 7, Returned: 8}),
			tx.AddToGrant("scope", "PO-1", registration.Tally{Used: 1, Refused: -4}),
		}
		for i := range 5 {
			d := device(fmt.Sprint("dev-", i), fmt.Sprint("S", i), "PO-1/a")
			d.Seen, d.Ended = i == 1, int64(i/3)
			errs = append(errs, tx.PutDevice("scope", d))
		}
		return errors.Join(append(errs, tx.PutDevice("scope", device("free", "S1", "")), tx.PutDevice("scope", device("dev-9", "S9", "PO-2")))...)
	})
	if err := s.Update(t.Context(), func(tx registration.Tx) error { return tx.AddToGrant("scope", "PO-3", registration.Tally{}) }); !errors.Is(err, registration.ErrNotFound) {
		t.Errorf("to a grant that is not there: %v", err)
	}
	if err := s.Update(t.Context(), func(tx registration.Tx) error { return tx.PutDevice("scope", device("copy", "S1", "PO-2")) }); !errors.Is(err, registration.ErrConflict) {
		t.Errorf("one serial in two orders: %v", err)
	}
	view(t, s, func(tx registration.Tx) error {
		g, err := tx.Grant("scope", "PO-1")
		if err != nil || g.Quantity != 9 || g.Digest != "d" || g.Station != "st" ||
			g.Tally != (registration.Tally{Used: 2, Imported: 2, Seen: 3, Voided: 5, Reworked: 6, Scrapped: 7, Returned: 8}) {
			t.Errorf("%+v, %v", g, err)
		}
		if b, err := tx.GrantDocument("scope", "PO-1"); err != nil || string(b) != "document" {
			t.Errorf("document %s, %v", b, err)
		}
		_, err = tx.Grant("scope", "PO-1/b")
		if _, err2 := tx.GrantDocument("scope", "PO-1/b"); !errors.Is(err, registration.ErrNotFound) || !errors.Is(err2, registration.ErrNotFound) {
			t.Errorf("no such lease: %v, %v", err, err2)
		}
		all, err := tx.Orders("scope", "", 10)
		if err != nil || len(all) != 2 || all[0].ID != "PO-1" || all[0].Used != 2 {
			t.Errorf("%v, %v", all, err)
		}
		if all, err = tx.Orders("scope", "PO-1", 10); err != nil || len(all) != 1 {
			t.Errorf("behind the first: %v, %v", all, err)
		}
		if all, err = tx.Leases("scope", "PO-1", "", 10); err != nil || len(all) != 1 || all[0].ID != "PO-1/a" {
			t.Errorf("leases: %v, %v", all, err)
		}
		if d, err := tx.DeviceBySerial("scope", "S1"); err != nil || d.ID != "dev-1" || d.Grant != "PO-1/a" || d.Order() != "PO-1" {
			t.Errorf("by serial: %v, %v", d, err)
		}
		for _, serial := range []string{"S7", ""} {
			if _, err := tx.DeviceBySerial("scope", serial); !errors.Is(err, registration.ErrNotFound) {
				t.Errorf("by serial %q: %v", serial, err)
			}
		}
		if d, err := tx.Devices("scope", "PO-1", false, "dev-0", 3); err != nil || len(d) != 3 || d[0].ID != "dev-1" {
			t.Errorf("devices: %v, %v", d, err)
		}
		if d, err := tx.Devices("scope", "PO-1", true, "", 10); err != nil || len(d) != 2 || d[1].ID != "dev-2" { // 1 was seen, 3 and 4 ended
			t.Errorf("unseen: %v, %v", d, err)
		}
		if d, err := tx.Devices("scope", "", true, "", 10); err != nil || len(d) != 0 {
			t.Errorf("of no order: %v, %v", d, err)
		}
		return nil
	})
	update(t, s, func(tx registration.Tx) error {
		moved := device("dev-0", "S0", "PO-1/a")
		moved.Moved = true
		return errors.Join(tx.PutDevice("scope", moved), tx.PutDevice("scope", device("heir", "S0", "PO-1/a")))
	})
	refusal := registration.Refusal{Order: "PO-1", ID: "dev-7", Serial: "S7", Station: "st", Reason: "spent", At: time.Unix(1767225600, 5).UTC()}
	update(t, s, func(tx registration.Tx) error {
		if kept, err := tx.PutRefusal("scope", &refusal); err != nil || !kept {
			t.Errorf("%v, %v", kept, err)
		}
		again := refusal
		again.Reason = "another"
		if kept, err := tx.PutRefusal("scope", &again); err != nil || kept {
			t.Errorf("again: %v, %v", kept, err)
		}
		if gone, err := tx.DeleteRefusal("scope", "PO-1", "dev-7", "su"); err != nil || gone {
			t.Errorf("another station's: %v, %v", gone, err)
		}
		return nil
	})
	view(t, s, func(tx registration.Tx) error {
		if got, err := tx.Refusals("scope", "PO-1", "", 10); err != nil || len(got) != 1 || *got[0] != refusal {
			t.Errorf("%+v, %v", got, err)
		}
		for _, key := range [][3]string{{"scope", "PO-2", ""}, {"other", "PO-1", ""}, {"scope", "PO-1", "dev-7"}} {
			if got, err := tx.Refusals(key[0], key[1], key[2], 10); err != nil || len(got) != 0 {
				t.Errorf("%v: %+v, %v", key, got, err)
			}
		}
		return nil
	})
	update(t, s, func(tx registration.Tx) error {
		if gone, err := tx.DeleteRefusal("scope", "PO-1", "dev-7", "st"); err != nil || !gone {
			t.Errorf("%v, %v", gone, err)
		}
		return nil
	})
}

func endings(t *testing.T, s registration.Store) {
	has := func(want bool) {
		t.Helper()
		view(t, s, func(tx registration.Tx) error {
			if any, err := tx.HasEndings("scope"); err != nil || any != want {
				t.Errorf("%v, %v", any, err)
			}
			return nil
		})
	}
	has(false)
	e := registration.Ending{ID: "dev", Revision: 2, KeyHash: "0a", State: bundle.Scrapped, Reason: "burnt", At: time.Unix(1767225600, 0).UTC(), Station: "st"}
	update(t, s, func(tx registration.Tx) error {
		return errors.Join(tx.PutEnding("scope", &e), tx.PutEnding("scope", &registration.Ending{ID: "keyless", State: bundle.Voided, At: e.At}))
	})
	e.State, e.Reason = bundle.Returned, "shown"
	update(t, s, func(tx registration.Tx) error { return tx.PutEnding("scope", &e) })
	has(true)
	view(t, s, func(tx registration.Tx) error {
		if got, err := tx.Ending("scope", "dev", 2, "0a"); err != nil || *got != e {
			t.Errorf("%+v, %v", got, err)
		}
		if _, err := tx.Ending("scope", "dev", 1, "0a"); !errors.Is(err, registration.ErrNotFound) {
			t.Errorf("another revision: %v", err)
		}
		for key, want := range map[[2]string]bool{{"scope", "0a"}: true, {"scope", "0b"}: false, {"scope", ""}: false, {"other", "0a"}: false} {
			if ended, err := tx.KeyEnded(key[0], key[1]); err != nil || ended != want {
				t.Errorf("key %v: %v, %v", key, ended, err)
			}
		}
		return nil
	})
	g := group("closed")
	g.Closed = true
	update(t, s, func(tx registration.Tx) error { return tx.PutRecord("scope", g) })
	view(t, s, func(tx registration.Tx) error {
		if got, err := tx.Record("scope", registration.Group, "closed"); err != nil || !got.Closed {
			t.Errorf("%+v, %v", got, err)
		}
		return nil
	})
}
