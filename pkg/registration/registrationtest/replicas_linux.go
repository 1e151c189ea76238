package registrationtest

import (
	"bytes"
	"testing"

	"github.com/touchmark/touchmark/pkg/sqlstore"
	"github.com/touchmark/touchmark/pkg/sqlstore/sqlstoretest"
)

// Replicas starts fixtures at three replicas, each on a store of its own, on one new database. Enrollments are written at the first.
//
// One answers as another does, but for this, which is by design (help topics store, limits and monitoring): a device may hear for ten
// seconds of an operation whose registration was deleted at another replica, a new scope may be unknown for a second, rates are each
// replica's own, and attempts and usage of the last seconds are missing at the others.
func Replicas(server *sqlstoretest.Server) Fresh {
	return func(t testing.TB, hubs ...string) *Fixture {
		t.Helper()
		dsn := server.Database(t)
		open := func() *sqlstore.Store {
			s, err := sqlstore.Open(t.Context(), sqlstore.Config{DSN: dsn, DataKey: bytes.Repeat([]byte{7}, 32)})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = s.Close() })
			return s
		}
		f := NewFixtureOn(t, open(), hubs...)
		for range 2 {
			other := *f
			other.Store, other.others = open(), nil
			other.Service = other.Replica(hubs...)
			f.others = append(f.others, &other)
		}
		return f
	}
}
