//go:build cgo

package pkcs11

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/hsmtest"
)

func TestMain(m *testing.M) {
	hsmtest.CounterProcess(func(ctx context.Context, uri hsm.URI) (hsm.Store, error) {
		return Open(ctx, Config{URI: uri, PIN: pin(hsmtest.PIN, nil)})
	})
	os.Exit(m.Run())
}

func counters(t *testing.T, uri hsm.URI, s hsmtest.CounterSuite) {
	s.URI, s.Open = uri, func(t testing.TB) hsm.Store { return open(t, uri) }
	hsmtest.RunCounters(t, s)
}

func TestCounters(t *testing.T) {
	uri := hsmtest.SoftHSM(t, "line-3")
	mend := hsmtest.Mender(t)
	counters(t, uri, hsmtest.CounterSuite{Mend: func() { mend() }})
}

func TestCountersNSS(t *testing.T) {
	counters(t, hsmtest.NSS(t, "line-3"), hsmtest.CounterSuite{Unsupported: true}) // it keeps no data objects
}

func TestCountersTPM2(t *testing.T) {
	uri, _ := hsmtest.TPM2(t, "line-3")
	counters(t, uri, hsmtest.CounterSuite{Unsupported: true}) // each process sees its own objects
}

func TestCountersP11Kit(t *testing.T) {
	soft := hsmtest.SoftHSM(t, "line-3")
	mend := hsmtest.Mender(t)
	uri, _ := hsmtest.P11Kit(t, soft)
	counters(t, uri, hsmtest.CounterSuite{Mend: func() { mend() }})
}

func TestCountersOutOfProcess(t *testing.T) {
	uri := hsmtest.SoftHSM(t, "line-3")
	mend := hsmtest.Mender(t)
	counters(t, outside(t, uri), hsmtest.CounterSuite{Mend: func() { mend() }, Rounds: 20})
}

func newCounter(t testing.TB, s *Store, name string) *counter {
	t.Helper()
	c, err := s.CreateCounter(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	return c.(*counter)
}

// put puts a state on the token as somebody else would.
func put(t testing.TB, s *Store, name string, value []byte, private bool) {
	t.Helper()
	err := s.with(t.Context(), false, func(h pkcs11.SessionHandle) error {
		_, err := s.mod.ctx.CreateObject(h, []*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_DATA), pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, private),
			pkcs11.NewAttribute(pkcs11.CKA_LABEL, counterLabel+name), pkcs11.NewAttribute(pkcs11.CKA_APPLICATION, counterApplication), pkcs11.NewAttribute(pkcs11.CKA_VALUE, value)})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func state(t testing.TB, st counterState) []byte {
	t.Helper()
	b, err := json.Marshal(st)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

var nonce = strings.Repeat("ab", 16)

// What is no state is an error and never a number, and an object that takes no PIN to make does not count.
func TestCounterGarbage(t *testing.T) {
	s := open(t, hsmtest.SoftHSM(t, "line-3"))
	bad := *new(hsm.Claim)
	for what, value := range map[string][]byte{
		"empty":             {},
		"text":              []byte("garbage"),
		"zeros":             make([]byte, 8),
		"another counter":   state(t, counterState{Counter: "other", Step: 9, Value: 9, Nonce: nonce}),
		"a longer form":     append(state(t, counterState{Counter: "c", Step: 9, Value: 9, Nonce: nonce}), '\n'),
		"no nonce":          state(t, counterState{Counter: "c", Step: 9, Value: 9}),
		"the last number":   state(t, counterState{Counter: "c", Step: 9, Value: 1<<64 - 1, Nonce: nonce}),
		"the last step":     state(t, counterState{Counter: "c", Step: 1<<64 - 1, Value: 9, Nonce: nonce}),
		"a claim of no one": state(t, counterState{Counter: "c", Step: 9, Value: 9, Nonce: nonce, Claim: &bad}),
		"too long":          append(state(t, counterState{Counter: "c", Step: 9, Value: 9, Nonce: nonce}), bytes.Repeat([]byte(" "), maxState)...),
	} {
		t.Run(what, func(t *testing.T) {
			c := newCounter(t, s, "c")
			put(t, s, "c", value, true)
			if v, err := c.Value(t.Context()); err == nil || errors.Is(err, hsm.ErrNotFound) {
				t.Errorf("Value: %d, %v", v, err)
			}
			if v, err := c.Increment(t.Context(), 0); err == nil || errors.Is(err, hsm.ErrCounter) {
				t.Errorf("Increment: %d, %v", v, err)
			}
			if _, err := c.Claim(t.Context(), "me"); err == nil {
				t.Error("claimed")
			}
			if _, err := s.OpenCounter(t.Context(), "c"); err == nil {
				t.Error("opened")
			}
			if _, err := s.CreateCounter(t.Context(), "c"); !errors.Is(err, hsm.ErrExists) {
				t.Errorf("CreateCounter: %v", err)
			}
			if err := s.DeleteCounter(t.Context(), "c"); err != nil {
				t.Fatal(err)
			}
		})
	}
	c := newCounter(t, s, "c")
	put(t, s, "c", state(t, counterState{Counter: "c", Step: 9, Value: 9, Nonce: nonce}), false)
	put(t, s, "public", state(t, counterState{Counter: "public", Nonce: nonce}), false)
	if v, err := c.Increment(t.Context(), 0); v != 1 || err != nil {
		t.Errorf("beside a public object, Increment: %d, %v", v, err)
	}
	if names, err := s.Counters(t.Context()); !slices.Equal(names, []string{"c"}) || err != nil {
		t.Errorf("listed %v, %v", names, err)
	}
}

// A counter that somebody left in the middle of a move, at each point of it, goes on from where it may have been told to stand.
func TestCounterLeftOvers(t *testing.T) {
	s := open(t, hsmtest.SoftHSM(t, "line-3"))
	at := func(step, value uint64, n string) []byte {
		return state(t, counterState{Counter: "c", Step: step, Value: value, Nonce: strings.Repeat(n, 32)})
	}
	for what, states := range map[string][][]byte{
		"before it was destroyed":  {at(4, 7, "a"), at(5, 8, "b")},
		"two at once":              {at(5, 8, "a"), at(5, 8, "b")},
		"one counts, one claims":   {at(5, 7, "a"), at(5, 8, "b")},
		"left by two":              {at(3, 6, "a"), at(4, 7, "b"), at(5, 8, "c"), at(5, 7, "d")},
		"an old one was forgotten": {at(0, 0, "a"), at(5, 8, "b")},
	} {
		t.Run(what, func(t *testing.T) {
			for _, b := range states {
				put(t, s, "c", b, true)
			}
			c, err := s.OpenCounter(t.Context(), "c")
			if err != nil {
				t.Fatal(err)
			}
			if _, err := c.Increment(t.Context(), 7); !errors.Is(err, hsm.ErrCounter) {
				t.Errorf("from the value before: %v", err)
			}
			if v, err := c.Increment(t.Context(), 8); v != 9 || err != nil {
				t.Errorf("Increment: %d, %v", v, err)
			}
			err = s.with(t.Context(), true, func(h pkcs11.SessionHandle) error {
				found, err := s.counterObjects(h, "c")
				if len(found) != 1 {
					t.Errorf("%d states are left", len(found))
				}
				return err
			})
			if err := errors.Join(err, s.DeleteCounter(t.Context(), "c")); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestCounterTakeOver(t *testing.T) {
	s := open(t, hsmtest.SoftHSM(t, "line-3"))
	claim := hsmtest.Elsewhere(t)
	put(t, s, "c", state(t, counterState{Counter: "c", Step: 4, Value: 2, Nonce: nonce, Claim: &claim}), true)
	c, err := s.OpenCounter(t.Context(), "c")
	if err != nil {
		t.Fatal(err)
	}
	hsmtest.TakeOver(t, c, claim)
	hsmtest.TakenOver(t, c, func(hsm.Claim) {
		if err := c.(*counter).hold(t.Context(), nil, func([]held) error { return nil }); err != nil {
			t.Fatal(err)
		}
	})
}

// The token is lost between any two increments, and while it is claimed.
func TestCounterRecovery(t *testing.T) {
	s := open(t, hsmtest.SoftHSM(t, "line-3"))
	c := newCounter(t, s, "c")
	release, err := c.Claim(t.Context(), "line-3")
	if err != nil {
		t.Fatal(err)
	}
	for i, harm := range []func() error{
		func() error { return s.mod.ctx.CloseAllSessions(s.slot) },
		func() error { return s.mod.ctx.Logout(s.keeper) },
		func() error { return errors.Join(s.mod.ctx.Finalize(), s.mod.ctx.Initialize()) },
		func() error { return s.mod.ctx.Finalize() },
	} {
		if err := harm(); err != nil {
			t.Fatal(err)
		}
		if v, err := c.Increment(t.Context(), uint64(i)); v != uint64(i+1) || err != nil {
			t.Fatalf("Increment: %d, %v", v, err)
		}
	}
	if err := errors.Join(s.mod.ctx.Finalize(), release()); err != nil {
		t.Error(err)
	}
}

// A state parses to what is written as the same octets, or not at all.
func FuzzCounterState(f *testing.F) {
	claim, err := hsm.NewClaim("line-3")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(state(f, counterState{Counter: "c", Step: 4, Value: 2, Nonce: nonce}))
	f.Add(state(f, counterState{Counter: "c", Step: 4, Value: 2, Nonce: nonce, Claim: &claim}))
	f.Add([]byte(`{"counter":"c","step":4,"value":-2,"nonce":"` + nonce + `"}`))
	f.Add([]byte(`{"Counter":"c","step":4,"value":2,"nonce":"` + nonce + `"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if st, err := parseState("c", b); err == nil && !bytes.Equal(state(t, st), b) {
			t.Fatalf("%q became %q", b, state(t, st))
		}
	})
}

// An increment against the bare calls that it cannot do without: an object created, one destroyed.
func BenchmarkIncrement(b *testing.B) {
	s := open(b, hsmtest.SoftHSM(b, "bench"))
	c := newCounter(b, s, "c")
	b.Run("ours", func(b *testing.B) {
		v, err := c.Value(b.Context())
		for b.Loop() && err == nil {
			v, err = c.Increment(b.Context(), v)
		}
		if err != nil {
			b.Fatal(err)
		}
	})
	b.Run("bare", func(b *testing.B) {
		for b.Loop() {
			err := s.with(b.Context(), false, func(h pkcs11.SessionHandle) error {
				o, err := s.putState(h, counterState{Counter: "bare", Nonce: nonce})
				if err != nil {
					return err
				}
				return s.mod.ctx.DestroyObject(h, o)
			})
			if err != nil {
				b.Fatal(err)
			}
		}
	})
}
