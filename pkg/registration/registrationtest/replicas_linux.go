package registrationtest

import (
	"bytes"
	"sync/atomic"
	"testing"

	"github.com/touchmark/touchmark/pkg/sqlstore"
	"github.com/touchmark/touchmark/pkg/sqlstore/sqlstoretest"
)

// NewReplicas starts a service at three replicas, each on a store of its own, on one new database.
func NewReplicas(t testing.TB, server *sqlstoretest.Server, hubs ...string) *Fixture {
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

// DoorsOfReplicas runs the suite of [Doors] at the doors of three replicas on one PostgreSQL database: each request of a device goes
// to another one than its last. The enrollments are written at the first.
func DoorsOfReplicas(t *testing.T, server *sqlstoretest.Server, serve Serve) {
	fresh := func(t testing.TB, hubs ...string) *Fixture { return NewReplicas(t, server, hubs...) }
	doors(t, fresh, func(t *testing.T, f *Fixture) func(testing.TB, Device) Conn {
		var dials []func(testing.TB, Device) Conn
		for _, r := range f.Replicas() {
			dials = append(dials, serve(t, r))
		}
		turn := new(atomic.Int64)
		return func(t testing.TB, d Device) Conn {
			c := &sprayed{turn: turn, last: -1}
			for _, dial := range dials {
				c.conns = append(c.conns, dial(t, d))
			}
			return c
		}
	})
}

// A sprayed Conn is one to every replica, made at once. Whoever asks next, on whichever Conn, meets the next replica; a device that
// asks twice meets two, also while others ask.
type sprayed struct {
	conns []Conn
	turn  *atomic.Int64 // of all that are connected to these replicas
	last  int
}

func (c *sprayed) next() Conn {
	n := int(c.turn.Add(1)) % len(c.conns)
	if n == c.last {
		n = (n + 1) % len(c.conns)
	}
	c.last = n
	return c.conns[n]
}

func (c *sprayed) Register(t testing.TB, body string) Answer { return c.next().Register(t, body) }

func (c *sprayed) Status(t testing.TB, operation, body string) Answer {
	return c.next().Status(t, operation, body)
}
