//go:build cgo

package pkcs11

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/touchmark/touchmark/hsm"
)

// A counter is a chain of states, each a private data object of its own (CKO_DATA, application "touchmark", label
// "counter:NAME"), and the state with the highest step counts. An object is never changed: tokens need not let CKA_VALUE be
// changed, and one that is cut off while it writes would leave neither the old number nor the new one. To go on,
//
//	1. list the states;
//	2. create the next one, with a nonce that is ours;
//	3. destroy the one that it follows, and what is older: whoever is told to have destroyed the former has moved the counter;
//	4. list again: nobody else's state may stand beside ours or above it.
//
// PKCS#11 has no compare-and-set. Two things stand in for it, each of which is enough:
//
//   - An object is destroyed once: of two who try, one is told that it is not there.
//   - A search shows what was created before it began. Each creates before it searches, so of two at least one sees the other.
//
// SoftHSM has the first and not the second: whenever it writes an object it forgets to look at what other processes wrote
// before (2.6.1 and later, Generation::commit), and goes on with an old view until another process writes again. What it
// cannot hide is that an object that it knows was destroyed. A view that shows that no state is left, or that ours was not the one to
// destroy the last, is old, and the module is restarted to have a new one; keys in memory (hsm.Spec.Ephemeral) end with that.
// tpm2-pkcs11 has neither and is refused: a TPM's own counters are better (package hsm/tpm).
//
// Cut off at any point, this leaves at least one state, and the highest is that of the last move that somebody was told of or
// the next. Somebody who is late withdraws its own state, unless it has destroyed another: then it may be the last there is.
// What remains is this: somebody is killed between 2 and 3 while another moves the counter too, and what is left of the
// former is all that a third sees in an old view of SoftHSM's. Who works with counters claims them first.
//
// None of it holds against somebody with the PIN who creates and destroys objects by hand. Without the PIN nobody can: only
// private objects count.

const (
	counterLabel       = "counter:"
	counterApplication = "touchmark"
	// maxState bounds a state, in octets; maxStates how many of one counter there may be. More than two are left-overs.
	maxState  = 2048
	maxStates = 64
	// maxNumber bounds steps and values.
	maxNumber = 1 << 62
	// unsettledTries is how often somebody who meets another at the same step tries again.
	unsettledTries = 10
)

// counterState is the value of a state object.
type counterState struct {
	Counter string     `json:"counter"`
	Step    uint64     `json:"step"`
	Value   uint64     `json:"value"`
	Nonce   string     `json:"nonce"`
	Mark    string     `json:"mark,omitempty"`
	Claim   *hsm.Claim `json:"claim,omitempty"`
}

// parseState parses the value of a state object of that counter, of which it takes one form only.
func parseState(name string, b []byte) (counterState, error) {
	var st counterState
	if len(b) > maxState {
		return st, fmt.Errorf("a state of %d octets: want at most %d", len(b), maxState)
	}
	if err := json.Unmarshal(b, &st); err != nil {
		return st, fmt.Errorf("a state that does not parse: %w", err)
	}
	again, err := json.Marshal(st)
	nonce, nerr := hex.DecodeString(st.Nonce)
	switch {
	case err != nil || !bytes.Equal(again, b):
		return st, errors.New("a state that is not in its one form")
	case st.Counter != name:
		return st, fmt.Errorf("a state of counter %q", st.Counter)
	case nerr != nil || len(nonce) != 16 || hex.EncodeToString(nonce) != st.Nonce:
		return st, errors.New("a state whose nonce is not 32 lower-case hexadecimal digits")
	case !validMark(st.Mark):
		return st, errors.New("a state whose mark is too long, or not printable")
	case st.Step > maxNumber || st.Value > maxNumber:
		return st, errors.New("a state at the end of its numbers")
	}
	if st.Claim != nil {
		if err := st.Claim.Check(); err != nil {
			return st, err
		}
	}
	return st, nil
}

func validMark(s string) bool {
	return len(s) <= hsm.MaxMark && !strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r > '~' })
}

// held is a state on the token.
type held struct {
	counterState
	handle pkcs11.ObjectHandle
}

type counter struct {
	s    *Store
	name string

	mu    sync.Mutex
	claim string // the ID of the claim that this counter holds; empty for none
}

var (
	_ hsm.CounterStore  = (*Store)(nil)
	_ hsm.MarkedCounter = (*counter)(nil)
)

var (
	// errStale says that the module does not show what other processes did. It counts as a lost module, which is restarted.
	errStale = fmt.Errorf("the module has an old view of the token: %w", pkcs11.Error(pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED))
	// errLate says that somebody else moved the counter.
	errLate = errors.New("somebody else moved it at the same time")
	// errBeside says that the counter was moved and that somebody else's state stands beside or above ours.
	errBeside = fmt.Errorf("%w, and did", errLate)
	// errNotKept says that the token does not show what it was given.
	errNotKept = errors.New("the token does not show the object that it made")
	// errUnknown says that a state was destroyed, and not by whom.
	errUnknown = fmt.Errorf("%w while it was moved: it may have moved", hsm.ErrLost)
)

// counters says hsm.ErrUnsupported for a module that shows each process a token of its own.
func (s *Store) counters() error {
	if s.mod.loads {
		return fmt.Errorf("tpm2-pkcs11 does not show one process what another did; the TPM's own counters do: %w", hsm.ErrUnsupported)
	}
	return nil
}

// CreateCounter implements [hsm.CounterStore]. The first value is 0.
func (s *Store) CreateCounter(ctx context.Context, name string) (hsm.Counter, error) {
	err := s.createCounter(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("creating counter %q: %w", name, err)
	}
	return &counter{s: s, name: name}, nil
}

func (s *Store) createCounter(ctx context.Context, name string) error {
	if err := errors.Join(hsm.CheckCounterName(name), s.counters()); err != nil {
		return err
	}
	first, err := newState(name)
	if err != nil {
		return err
	}
	// The first state follows none, so there is nothing to destroy once: who creates one needs a view that is new.
	made, renewed := false, false
	err = s.counting(ctx, func(h pkcs11.SessionHandle) error {
		found, err := s.counterObjects(h, name)
		if err != nil {
			return err
		}
		if len(found) > 0 && !made {
			all, err := s.states(h, name)
			if made = err == nil && slices.ContainsFunc(all, func(o held) bool { return o.Nonce == first.Nonce }); !made {
				return hsm.ErrExists
			}
		}
		if !made {
			if _, err := s.putState(h, first); err != nil {
				return notCounted(err)
			}
			made = true
		}
		if !renewed {
			renewed = true
			return errStale
		}
		all, err := s.states(h, name)
		if err != nil {
			return err
		}
		if len(all) == 1 && all[0].Nonce == first.Nonce {
			return nil
		}
		for _, o := range all {
			if o.Nonce == first.Nonce {
				_ = s.mod.ctx.DestroyObject(h, o.handle)
			}
		}
		return hsm.ErrExists
	})
	return err
}

// notCounted says why a token takes no private data object.
func notCounted(err error) error {
	if is(err, refusals...) {
		return fmt.Errorf("the token keeps no private data objects: %w: %w", hsm.ErrUnsupported, err)
	}
	return notMade(err)
}

func newState(name string) (counterState, error) {
	nonce := make([]byte, 16)
	_, err := rand.Read(nonce)
	return counterState{Counter: name, Nonce: hex.EncodeToString(nonce)}, err
}

// putState creates a state object. SoftHSM refuses what it takes otherwise when another thread searches at that moment.
func (s *Store) putState(h pkcs11.SessionHandle, st counterState) (pkcs11.ObjectHandle, error) {
	value, err := json.Marshal(st)
	if err != nil {
		return 0, err
	}
	for try := 1; ; try++ {
		o, err := s.mod.ctx.CreateObject(h, []*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_DATA), pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
			pkcs11.NewAttribute(pkcs11.CKA_LABEL, counterLabel+st.Counter), pkcs11.NewAttribute(pkcs11.CKA_APPLICATION, counterApplication), pkcs11.NewAttribute(pkcs11.CKA_VALUE, value),
		})
		if !is(err, refusals...) || try == unsettledTries {
			return o, err
		}
	}
}

// refusals are how tokens refuse private data objects.
var refusals = []uint{pkcs11.CKR_ATTRIBUTE_VALUE_INVALID, pkcs11.CKR_ATTRIBUTE_TYPE_INVALID, pkcs11.CKR_TEMPLATE_INCONSISTENT, pkcs11.CKR_ATTRIBUTE_READ_ONLY}

// counterObjects returns the state objects of a counter.
func (s *Store) counterObjects(h pkcs11.SessionHandle, name string) ([]pkcs11.ObjectHandle, error) {
	found, err := s.find(h, pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_DATA), pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true), pkcs11.NewAttribute(pkcs11.CKA_LABEL, counterLabel+name))
	if err == nil && len(found) > maxStates {
		err = fmt.Errorf("%d objects are called %s%s", len(found), counterLabel, name)
	}
	return found, err
}

// counting runs an operation on counters, again if the token was lost. SoftHSM shows the threads of one process objects that are
// half made, and half destroyed: one at a time.
func (s *Store) counting(ctx context.Context, f func(pkcs11.SessionHandle) error) error {
	return s.with(ctx, true, func(h pkcs11.SessionHandle) error {
		s.mod.counting.Lock()
		defer s.mod.counting.Unlock()
		return f(h)
	})
}

// states returns the states of a counter, highest step first. One that cannot be read as a state is an error: it may be the
// one that counts.
func (s *Store) states(h pkcs11.SessionHandle, name string) ([]held, error) {
	for try := 1; ; try++ {
		found, err := s.counterObjects(h, name)
		if err != nil {
			return nil, err
		}
		var all []held
		var unread error
		for _, o := range found {
			value, err := s.attribute(h, o, pkcs11.CKA_VALUE)
			if err != nil && !is(err, pkcs11.CKR_OBJECT_HANDLE_INVALID) {
				return nil, err
			}
			var st counterState
			if err == nil {
				st, err = parseState(name, value)
			}
			if err != nil {
				unread = fmt.Errorf("reading its object on the token: %w", err)
				continue
			}
			all = append(all, held{st, o})
		}
		// One that was destroyed since it was found is an error or, of SoftHSM, empty; and its successor was not there to be found.
		if unread != nil && try < unsettledTries {
			continue
		}
		slices.SortFunc(all, func(a, b held) int { return cmp.Or(cmp.Compare(b.Step, a.Step), cmp.Compare(a.Nonce, b.Nonce)) })
		return all, unread
	}
}

// value is the counter's: states of one step differ when somebody was cut off or is being refused, and what anybody may have
// been told counts.
func value(all []held) (v uint64) {
	for _, o := range all {
		v = max(v, o.Value)
	}
	return v
}

// top returns the states of the highest step.
func top(all []held) []held {
	n := 0
	for n < len(all) && all[n].Step == all[0].Step {
		n++
	}
	return all[:n]
}

// OpenCounter implements [hsm.CounterStore].
func (s *Store) OpenCounter(ctx context.Context, name string) (hsm.Counter, error) {
	err := s.counters()
	if err == nil && !hsm.ValidCounterName(name) {
		err = hsm.ErrNotFound
	}
	if err == nil {
		err = s.counting(ctx, func(h pkcs11.SessionHandle) error {
			all, err := s.states(h, name)
			if err == nil && len(all) == 0 {
				err = hsm.ErrNotFound
			}
			return err
		})
	}
	if err != nil {
		return nil, fmt.Errorf("opening counter %q: %w", name, err)
	}
	return &counter{s: s, name: name}, nil
}

// DeleteCounter implements [hsm.CounterStore].
func (s *Store) DeleteCounter(ctx context.Context, name string) error {
	err := s.counting(ctx, func(h pkcs11.SessionHandle) error {
		found, err := s.counterObjects(h, name)
		if err != nil {
			return err
		}
		if len(found) == 0 {
			return hsm.ErrNotFound
		}
		if all, err := s.states(h, name); err == nil { // what cannot be read holds nobody up
			if err := free(name, top(all), ""); err != nil {
				return err
			}
		}
		for _, o := range found {
			if err := s.mod.ctx.DestroyObject(h, o); err != nil && !is(err, pkcs11.CKR_OBJECT_HANDLE_INVALID) {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("deleting counter %q: %w", name, err)
	}
	return nil
}

// Counters implements [hsm.CounterStore].
func (s *Store) Counters(ctx context.Context) ([]string, error) {
	var names []string
	err := s.counting(ctx, func(h pkcs11.SessionHandle) error {
		names = nil
		found, err := s.find(h, pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_DATA), pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true))
		if err != nil {
			return err
		}
		for _, o := range found {
			label, err := s.attribute(h, o, pkcs11.CKA_LABEL)
			if is(err, pkcs11.CKR_OBJECT_HANDLE_INVALID) {
				continue
			}
			if err != nil {
				return err
			}
			if name, ok := strings.CutPrefix(string(label), counterLabel); ok && hsm.ValidCounterName(name) {
				names = append(names, name)
			}
		}
		return nil
	})
	slices.Sort(names)
	return slices.Compact(names), err
}

// free says hsm.ErrClaimed when one of the states holds the counter for somebody else than the claim of that ID.
func free(name string, states []held, mine string) error {
	for _, o := range states {
		if o.Claim != nil && o.Claim.ID != mine && !o.Claim.Ended() {
			return &hsm.ClaimedError{Name: name, Claim: *o.Claim}
		}
	}
	return nil
}

// Name implements [hsm.Counter].
func (c *counter) Name() string { return c.name }

// Value implements [hsm.Counter].
func (c *counter) Value(ctx context.Context) (uint64, error) {
	all, err := c.read(ctx)
	if err != nil {
		return 0, fmt.Errorf("reading counter %q: %w", c.name, err)
	}
	return value(all), nil
}

// read returns the states. There are some: a counter that shows none was deleted, or the module's view is old.
func (c *counter) read(ctx context.Context) (all []held, err error) {
	renewed := false
	err = c.s.counting(ctx, func(h pkcs11.SessionHandle) (err error) {
		if all, err = c.s.states(h, c.name); err != nil || len(all) > 0 {
			return err
		}
		if renewed {
			return hsm.ErrNotFound
		}
		renewed = true
		return errStale
	})
	return all, err
}

// Increment implements [hsm.Counter].
func (c *counter) Increment(ctx context.Context, from uint64) (uint64, error) {
	return c.IncrementMarked(ctx, from, "")
}

// Mark implements [hsm.MarkedCounter]. Where states of one step differ, none is anybody's.
func (c *counter) Mark(ctx context.Context) (string, error) {
	all, err := c.read(ctx)
	if err != nil {
		return "", fmt.Errorf("reading counter %q: %w", c.name, err)
	}
	mark := ""
	for i, o := range top(all) {
		if i > 0 && o.Mark != mark {
			return "", &hsm.CounterError{Name: c.name, From: o.Value, Found: value(all)}
		}
		mark = o.Mark
	}
	return mark, nil
}

// IncrementMarked implements [hsm.MarkedCounter].
func (c *counter) IncrementMarked(ctx context.Context, from uint64, mark string) (uint64, error) {
	if !validMark(mark) {
		return 0, fmt.Errorf("counter %q: a mark of %d octets", c.name, len(mark))
	}
	mine := c.mine()
	next, err := c.move(ctx, func(all []held, next *counterState) error {
		now := top(all)
		if err := free(c.name, now, mine); err != nil {
			return err
		}
		for _, o := range now {
			if o.Claim != nil && o.Claim.ID == mine {
				next.Claim = o.Claim
			}
		}
		if mine != "" && next.Claim == nil {
			return &hsm.ClaimedError{Name: c.name}
		}
		if next.Value != from {
			return &hsm.CounterError{Name: c.name, From: from, Found: next.Value}
		}
		next.Value, next.Mark = next.Value+1, mark
		return nil
	})
	if errors.Is(err, errLate) {
		found, verr := c.Value(ctx)
		if verr != nil {
			return 0, verr
		}
		return 0, &hsm.CounterError{Name: c.name, From: from, Found: found}
	}
	if err != nil {
		return 0, fmt.Errorf("incrementing counter %q: %w", c.name, err)
	}
	return next.Value, nil
}

func (c *counter) mine() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.claim
}

// Claim implements [hsm.Counter].
func (c *counter) Claim(ctx context.Context, owner string) (func() error, error) {
	claim, err := hsm.NewClaim(owner)
	if err != nil {
		return nil, fmt.Errorf("claiming counter %q: %w", c.name, err)
	}
	if err := c.hold(ctx, &claim, func(now []held) error { return free(c.name, now, claim.ID) }); err != nil {
		// It may be there all the same, and would keep everybody out for as long as this process lives.
		if rerr := c.release(ctx, claim.ID); !errors.Is(rerr, hsm.ErrClaimed) {
			err = errors.Join(err, rerr)
		}
		return nil, fmt.Errorf("claiming counter %q: %w", c.name, err)
	}
	c.mu.Lock()
	c.claim = claim.ID
	c.mu.Unlock()
	var mu sync.Mutex
	released := false
	return func() error {
		mu.Lock()
		defer mu.Unlock()
		if released {
			return nil
		}
		err := c.release(ctx, claim.ID)
		if err != nil && !errors.Is(err, hsm.ErrClaimed) {
			return fmt.Errorf("releasing counter %q: %w", c.name, err)
		}
		released = true
		c.mu.Lock()
		if c.claim == claim.ID {
			c.claim = ""
		}
		c.mu.Unlock()
		return err
	}, nil
}

// release ends the claim of that ID, or says hsm.ErrClaimed when it is not there.
func (c *counter) release(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), releaseTime)
	defer cancel()
	return c.hold(ctx, nil, func(now []held) error {
		if slices.ContainsFunc(now, func(o held) bool { return o.Claim != nil && o.Claim.ID == id }) {
			return free(c.name, now, id)
		}
		return cmp.Or(free(c.name, now, id), error(&hsm.ClaimedError{Name: c.name}))
	})
}

// releaseTime bounds how long a claim is being released.
const releaseTime = 30 * time.Second

// Holder implements [hsm.Counter].
func (c *counter) Holder(ctx context.Context) (hsm.Claim, error) {
	all, err := c.read(ctx)
	if err == nil {
		for _, o := range top(all) {
			if o.Claim != nil {
				return *o.Claim, nil
			}
		}
		err = fmt.Errorf("a claim: %w", hsm.ErrNotFound)
	}
	return hsm.Claim{}, fmt.Errorf("counter %q: %w", c.name, err)
}

// TakeOver implements [hsm.Counter].
func (c *counter) TakeOver(ctx context.Context, claim hsm.Claim) error {
	err := c.hold(ctx, nil, func(now []held) error {
		for _, o := range now {
			switch {
			case o.Claim == nil:
			case o.Claim.ID != claim.ID:
				if err := free(c.name, now, claim.ID); err != nil {
					return err
				}
			case o.Claim.Running():
				return &hsm.ClaimedError{Name: c.name, Claim: *o.Claim}
			default:
				return nil
			}
		}
		return fmt.Errorf("that claim: %w", hsm.ErrNotFound)
	})
	if err != nil {
		return fmt.Errorf("taking over counter %q: %w", c.name, err)
	}
	return nil
}

// hold moves the counter to a state with that claim, or none, and with its value as it was, when may says that it may. Others who
// do the same at the same time are met with pauses of random length.
func (c *counter) hold(ctx context.Context, claim *hsm.Claim, may func(now []held) error) error {
	for try := 1; ; try++ {
		unsettled := false
		_, err := c.move(ctx, func(all []held, next *counterState) error {
			next.Claim = claim
			now := top(all)
			unsettled = len(now) > 1
			return may(now)
		})
		if claim == nil && errors.Is(err, errBeside) {
			return nil
		}
		if try == unsettledTries || !errors.Is(err, errLate) && !errors.Is(err, errUnknown) && !(unsettled && errors.Is(err, hsm.ErrClaimed)) {
			return err
		}
		if err := pause(ctx, try); err != nil {
			return err
		}
	}
}

// pause waits for a random time that grows with the number of tries.
func pause(ctx context.Context, try int) error {
	select {
	case <-time.After(mathrand.N(time.Duration(try) * 10 * time.Millisecond)):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// move goes from the present state to the next, which change makes of a copy of the present one; change says by an error when
// it is not to be. The error is errLate when somebody else moved the counter, and errUnknown when the token was lost while it was
// asked to destroy a state.
func (c *counter) move(ctx context.Context, change func(all []held, next *counterState) error) (counterState, error) {
	s := c.s
	next, err := newState(c.name)
	if err != nil {
		return next, err
	}
	// What was seen and done. It stays so when the token is lost in between, or the module restarted.
	var seen map[string]bool // the states that next follows
	destroyed, renewals, unsure := 0, 0, errUnknown
	stale := func(otherwise error) error {
		if renewals == 2 {
			return otherwise
		}
		renewals++
		return errStale
	}
	var step func(h pkcs11.SessionHandle) error
	step = func(h pkcs11.SessionHandle) error {
		all, err := s.states(h, c.name)
		if err != nil {
			return err
		}
		var own pkcs11.ObjectHandle
		all = slices.DeleteFunc(all, func(o held) bool {
			if o.Nonce == next.Nonce {
				own = o.handle
			}
			return o.Nonce == next.Nonce
		})
		if seen == nil {
			if len(all) == 0 {
				return stale(hsm.ErrNotFound)
			}
			next.Step, next.Value, next.Mark = all[0].Step+1, value(all), all[0].Mark
			if err := change(all, &next); err != nil {
				return err
			}
			if next.Step > maxNumber || next.Value > maxNumber {
				return fmt.Errorf("it is at its end: %w", hsm.ErrFull)
			}
			seen = make(map[string]bool)
			for _, o := range top(all) {
				seen[o.Nonce] = true
			}
		}
		follows := func(o held) bool { return o.Step == next.Step-1 }
		if slices.ContainsFunc(all, func(o held) bool { return o.Step >= next.Step || follows(o) && !seen[o.Nonce] }) {
			// Somebody was faster. What is ours goes, unless it may be all that is left of what we destroyed.
			if own != 0 && destroyed == 0 {
				if err := s.mod.ctx.DestroyObject(h, own); err != nil && !is(err, pkcs11.CKR_OBJECT_HANDLE_INVALID) {
					return err
				}
			}
			return errLate
		}
		if destroyed < len(seen) && !slices.ContainsFunc(all, follows) { // not by us, or the answer was lost
			return stale(unsure)
		}
		if own == 0 {
			if _, err = s.putState(h, next); err != nil {
				return notMade(err)
			}
			// Read back before what it follows is destroyed: SoftHSM, while another thread searches, may keep an object in part.
			made, err := s.states(h, c.name)
			if err != nil {
				return err
			}
			if !slices.ContainsFunc(made, func(o held) bool { return o.Nonce == next.Nonce }) {
				return stale(errNotKept)
			}
		}
		for _, o := range all {
			err := s.mod.ctx.DestroyObject(h, o.handle)
			if err == nil {
				if follows(o) {
					destroyed++
				}
				continue
			}
			if !is(err, pkcs11.CKR_OBJECT_HANDLE_INVALID, pkcs11.CKR_FUNCTION_FAILED) {
				return err
			}
			left, lerr := s.states(h, c.name)
			if lerr != nil {
				return lerr
			}
			switch there := slices.ContainsFunc(left, func(l held) bool { return l.Nonce == o.Nonce }); {
			case there:
				return err
			case follows(o):
				unsure = errLate
				return step(h) // to learn by whom, and whether ours may go
			}
			// A left-over, which others clear away, too.
		}
		if destroyed < len(seen) {
			return unsure
		}
		return nil
	}
	if err := s.counting(ctx, step); err != nil {
		return next, err
	}
	// Should two have been told that they destroyed the same object, at least one sees the other's state here. One that is
	// being withdrawn goes soon.
	for try := 1; ; try++ {
		all, err := c.read(ctx)
		if err != nil {
			return next, err
		}
		if now := top(all); len(now) == 1 && now[0].Nonce == next.Nonce {
			return next, nil
		} else if try == unsettledTries || now[0].Step > next.Step {
			return next, errBeside
		}
		if err := pause(ctx, try); err != nil {
			return next, err
		}
	}
}
