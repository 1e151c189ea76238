package limit

import (
	"context"
	"fmt"
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
)

// Whoever emptied his bucket keeps it, whatever else comes; the table does not grow; and once there is time to refill, new
// keys have buckets of their own.
func TestTable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size = 100
		tab := newTable(size, 1, 20)
		empty := func(key uint64, want int) {
			t.Helper()
			n := 0
			for tab.get(key, time.Now()).take(time.Now(), 1) == passes {
				n++
			}
			if n != want {
				t.Errorf("key %d passed %d times, want %d", key, n, want)
			}
		}
		empty(1, 20)
		for key := uint64(2); key < 10_000; key++ { // one request each
			tab.get(key, time.Now()).take(time.Now(), 1)
			if len(tab.byKey) > size || tab.order.Len() != len(tab.byKey) {
				t.Fatalf("%d keys", len(tab.byKey))
			}
		}
		empty(1, 0)
		if tab.get(77_777, time.Now()) != tab.rest || tab.rest.take(time.Now(), 1) == passes {
			t.Error("with no room, new keys do not share")
		}
		time.Sleep(time.Second) // those of one request are full again
		for key := uint64(20_000); key < 30_000; key++ {
			if b := tab.get(key, time.Now()); b == tab.rest {
				t.Fatalf("no room for key %d", key)
			}
		}
		empty(1, 1) // what a second refilled
		empty(30_000, 20)
	})
}

// A table has those who called of late, however many there are room for; who has not got his own back stays, and so do the
// refusals and what the log was told.
func TestTidy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tab := newTable(1_000_000, 1, 20)
		get := func(key uint64) *bucket { return tab.get(key, time.Now()) }
		for range 20 {
			get(1).take(time.Now(), 1)
		}
		get(2).refusal = &refusal{judged: time.Now()}
		get(3).told = told{at: time.Now(), last: &dps.Error{}}
		key := uint64(3)
		pass := func(seconds int) { // 100 a second
			for range 100 * seconds {
				key++
				get(key).take(time.Now(), 1)
				time.Sleep(10 * time.Millisecond)
			}
		}
		kept := func() (n int) {
			for key := range uint64(4) {
				if tab.peek(key) != nil {
					n++
				}
			}
			return n
		}
		pass(10)
		if n := len(tab.byKey); n > 300 || kept() != 3 {
			t.Errorf("%d keys of 1,000 that came in ten seconds, %d of 3 that must stay", n, kept())
		}
		pass(40) // the first has refilled
		if tab.peek(1) != nil || kept() != 2 {
			t.Errorf("%d of 2 stay", kept())
		}
		pass(40) // the minute is over
		if kept() != 0 {
			t.Errorf("%d stay for ever", kept())
		}
		for range 5_000 { // all at once
			key++
			get(key).take(time.Now(), 1)
		}
		most := len(tab.byKey)
		time.Sleep(2 * time.Second)
		pass(60)
		if n := len(tab.byKey); most < 5_000 || n > 300 {
			t.Errorf("%d keys after a rush of %d", n, most)
		}
	})
}

// Many names from as many addresses and scopes take no more memory than the tables have room for.
func TestMemory(t *testing.T) {
	l := New(Config{Registrar: nobody{}, Scopes: func(s string) bool { return s == "scope" }})
	measure := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := measure()
	const n = 200_000
	for i := range n {
		scope := "scope"
		if i%2 == 0 {
			scope = fmt.Sprintf("s%d", i)
		}
		req := &registration.Request{IDScope: scope, RegistrationID: fmt.Sprintf("dev-%d", i), Remote: fmt.Sprintf("[2001:db8:%x:%x::1]:1", i>>16, i&0xffff)}
		_, _ = l.Register(t.Context(), req)
		_, _ = l.Lookup(t.Context(), req)
	}
	after := measure()
	keys := len(l.addresses.byKey)
	for name, s := range l.scopes {
		if n := len(s.devices.byKey); n > l.cfg.Keys || n < l.cfg.Keys/2 {
			t.Errorf("%d devices in scope %q", n, name)
		}
		keys += len(s.devices.byKey)
	}
	if len(l.scopes) != 2 || len(l.addresses.byKey) > l.cfg.Keys {
		t.Errorf("%d scopes, %d addresses", len(l.scopes), len(l.addresses.byKey))
	}
	each := float64(after-before) / float64(keys)
	t.Logf("%d keys take %.0f octets each", keys, each)
	if each > 1024 {
		t.Errorf("a key takes %.0f octets", each)
	}
	runtime.KeepAlive(l)
}

// Addresses count as a household has them.
func TestBlock(t *testing.T) {
	for remote, want := range map[string]string{
		"192.0.2.1:443": "192.0.2.1/32", "[::ffff:192.0.2.1]:9": "192.0.2.1/32", "192.0.2.1": "192.0.2.1/32",
		"[2001:db8:1:2:3:4:5:6]:1": "2001:db8:1:2::/64", "[2001:db8:1:2:ffff::]:2": "2001:db8:1:2::/64", "2001:db8:1:2::": "2001:db8:1:2::/64",
		"[fe80::1%eth0]:1": "fe80::/64", "": "invalid Prefix", "@": "invalid Prefix", "example.net:1": "invalid Prefix",
	} {
		if got := block(remote).String(); got != want {
			t.Errorf("%s: %s, want %s", remote, got, want)
		}
	}
}

// nobody lets nobody in, with an answer of his own for each.
type nobody struct{ registration.Registrar }

func (nobody) Register(context.Context, *registration.Request) (*dps.OperationStatus, error) {
	return nil, dps.NewError(dps.CodeUnauthorized, "Unauthorized", nil)
}

func (nobody) Lookup(context.Context, *registration.Request) (*dps.RegistrationState, error) {
	return nil, dps.NewError(dps.CodeUnauthorized, "Unauthorized", nil)
}
