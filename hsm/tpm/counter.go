package tpm

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/touchmark/touchmark/hsm"
)

// A counter is an NV index of type TPM_NT_COUNTER (TPM 2.0 Part 2, 13.2; Part 3, 31.8) at one of counterIndices, which the owner
// increments and deletes and anybody reads. The TPM alone writes to it, and each increment is in its memory when it answers.
// Part 3, 31.8.1 has a counter that is made anew begin above every counter that ever was in that TPM.
//
// A claim is an ordinary index at claimOffset above its counter's. Defining an index is the one thing of a TPM's that only one of
// two can do: the other is answered TPM_RC_NV_DEFINED.
//
// Neither index has a policy that allows anything. Their authPolicy is 32 octets that are settled when the index is defined and
// are part of its name ever after: a counter's holds its name, filled up with zeros; a claim's says which process made it, so that
// one that was cut off before it wrote its claim can still be told to have ended. An index is deleted in a session, whose
// HMAC covers its name (Part 1, 19.4): what came to be there since it was looked at is not deleted.
const (
	counterIndex   = 0x01b70000 // and the 63 behind it
	counterIndices = 64
	claimOffset    = 0x100
	policySize     = 32
)

type counter struct {
	s     *Store
	name  string
	index tpm2.TPMHandle

	mu    sync.Mutex
	claim []byte // the policy of the claim that this counter holds; nil for none
}

var (
	_ hsm.CounterStore = (*Store)(nil)
	_ hsm.Counter      = (*counter)(nil)
)

// counterName returns the name of the counter that an index is.
func (n *nv) counterName() (string, bool) {
	a := n.public.Attributes
	name := strings.TrimRight(string(n.public.AuthPolicy.Buffer), "\x00")
	return name, n.public.NameAlg == tpm2.TPMAlgSHA256 && a.NT == tpm2.TPMNTCounter && len(n.public.AuthPolicy.Buffer) == policySize && hsm.ValidCounterName(name) &&
		!a.PolicyRead && !a.PolicyWrite && !a.PolicyDelete && !a.AuthWrite && !a.PPWrite && a.OwnerWrite && a.AuthRead && !a.Orderly && n.public.DataSize == 8
}

// counters returns the counters that there are, and the first index that is free; 0 for none.
func (b *bus) counters() (found []*nv, free tpm2.TPMHandle, err error) {
	handles, err := b.handles(counterIndex)
	if err != nil {
		return nil, 0, err
	}
	for i := range tpm2.TPMHandle(counterIndices) {
		h := counterIndex + i
		if !slices.Contains(handles, h) {
			free = cmp.Or(free, h)
			continue
		}
		n, err := b.readNVPublic(h)
		if errors.Is(err, hsm.ErrNotFound) {
			continue // deleted since
		}
		if err != nil {
			return nil, 0, err
		}
		if _, ok := n.counterName(); ok {
			found = append(found, n)
		}
	}
	return found, free, nil
}

// named returns those of that name.
func named(all []*nv, name string) []*nv {
	return slices.DeleteFunc(slices.Clone(all), func(n *nv) bool { got, _ := n.counterName(); return got != name })
}

// CreateCounter implements [hsm.CounterStore]: an NV index of the first of 0x01b70000 to 0x01b7003f that is free.
func (s *Store) CreateCounter(ctx context.Context, name string) (hsm.Counter, error) {
	if err := hsm.CheckCounterName(name); err != nil {
		return nil, err
	}
	policy := make([]byte, policySize)
	copy(policy, name)
	var mine tpm2.TPMHandle
	err := s.do(ctx, fmt.Sprintf("creating counter %q", name), func(b *bus) error {
		for try := 1; ; try++ {
			all, free, err := b.counters()
			if err != nil {
				return err
			}
			if same := named(all, name); len(same) == 1 && same[0].Handle == mine {
				break // defined before the connection broke
			} else if len(same) > 0 {
				return hsm.ErrExists
			}
			if free == 0 {
				return fmt.Errorf("all %d indices for counters are taken: %w", counterIndices, hsm.ErrFull)
			}
			mine = free
			err = s.define(b, tpm2.TPMSNVPublic{
				NVIndex: mine, NameAlg: tpm2.TPMAlgSHA256, DataSize: 8, AuthPolicy: tpm2.TPM2BDigest{Buffer: policy},
				Attributes: tpm2.TPMANV{OwnerWrite: true, OwnerRead: true, AuthRead: true, NoDA: true, NT: tpm2.TPMNTCounter},
			})
			if err == nil {
				break
			}
			if !errors.Is(err, tpm2.TPMRCNVDefined) || try == 4 {
				return err
			}
			mine = 0
		}
		n, err := b.readNVPublic(mine)
		if err == nil {
			_, err = s.beginCounter(b, n)
		}
		if err != nil {
			return err
		}
		// Another may have made one of that name elsewhere meanwhile, where an index became free.
		all, _, err := b.counters()
		if err == nil && len(named(all, name)) > 1 {
			err = errors.Join(hsm.ErrExists, s.undefine(b, mine, policy))
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return &counter{s: s, name: name, index: mine}, nil
}

// errOther says that an index is not the one that it was.
var errOther = errors.New("the NV index is another one now")

// undefine deletes the index that has this policy (Part 3, 31.4).
func (s *Store) undefine(b *bus, h tpm2.TPMHandle, policy []byte) error {
	for try := 1; ; try++ {
		n, err := b.readNVPublic(h)
		if err != nil {
			return err
		}
		if !bytes.Equal(n.public.AuthPolicy.Buffer, policy) {
			return errOther
		}
		owner, err := s.authorize(b, tpm2.TPMRHOwner, s.cfg.Owner)
		if err != nil {
			return err
		}
		_, err = tpm2.NVUndefineSpace{AuthHandle: owner, NVIndex: n}.Execute(b)
		// A name that has changed makes the HMAC a wrong one. The owner's authorization is tried again only when that is so.
		if again, rerr := b.readNVPublic(h); try < 3 && err != nil && rerr == nil && !sameName(again.Name, n.Name) {
			continue
		}
		return err
	}
}

// beginCounter gives a counter that was defined and not incremented since its first value, and returns it as it is then.
func (s *Store) beginCounter(b *bus, n *nv) (*nv, error) {
	if n.public.Attributes.Written {
		return n, nil
	}
	if err := s.increment(b, n); err != nil {
		return nil, err
	}
	return b.readNVPublic(n.Handle)
}

func (s *Store) increment(b *bus, n *nv) error {
	owner, err := s.hierarchy(b, tpm2.TPMRHOwner)
	if err != nil {
		return err
	}
	_, err = tpm2.NVIncrement{AuthHandle: owner, NVIndex: n}.Execute(b)
	return err
}

// count reads a counter.
func (b *bus) count(n *nv) (uint64, error) {
	rsp, err := tpm2.NVRead{AuthHandle: tpm2.AuthHandle{Handle: n.Handle, Name: n.Name, Auth: tpm2.PasswordAuth(nil)}, NVIndex: n, Size: 8}.Execute(b)
	if err != nil {
		return 0, err
	}
	if len(rsp.Data.Buffer) != 8 {
		return 0, fmt.Errorf("the TPM gives a counter of %d octets", len(rsp.Data.Buffer))
	}
	return binary.BigEndian.Uint64(rsp.Data.Buffer), nil
}

// OpenCounter implements [hsm.CounterStore].
func (s *Store) OpenCounter(ctx context.Context, name string) (hsm.Counter, error) {
	c := &counter{s: s, name: name}
	err := s.do(ctx, fmt.Sprintf("opening counter %q", name), func(b *bus) error {
		all, _, err := b.counters()
		if err != nil {
			return err
		}
		switch same := named(all, name); len(same) {
		case 0:
			return hsm.ErrNotFound
		case 1:
			c.index = same[0].Handle
			_, err = s.beginCounter(b, same[0])
			return err
		default:
			return fmt.Errorf("%d NV indices, of 0x%08x and following, are counters of that name", len(same), uint32(same[0].Handle))
		}
	})
	if err != nil {
		return nil, err
	}
	return c, nil
}

// DeleteCounter implements [hsm.CounterStore].
func (s *Store) DeleteCounter(ctx context.Context, name string) error {
	return s.do(ctx, fmt.Sprintf("deleting counter %q", name), func(b *bus) error {
		all, _, err := b.counters()
		if err != nil {
			return err
		}
		same := named(all, name)
		if len(same) == 0 {
			return hsm.ErrNotFound
		}
		for _, n := range same {
			c := &counter{s: s, name: name, index: n.Handle}
			if err := c.clear(b); err != nil {
				return err
			}
			if err := s.undefine(b, n.Handle, n.public.AuthPolicy.Buffer); err != nil {
				return err
			}
		}
		return nil
	})
}

// Counters implements [hsm.CounterStore].
func (s *Store) Counters(ctx context.Context) ([]string, error) {
	var names []string
	err := s.do(ctx, "listing counters", func(b *bus) error {
		names = nil
		all, _, err := b.counters()
		for _, n := range all {
			name, _ := n.counterName()
			names = append(names, name)
		}
		return err
	})
	slices.Sort(names)
	return slices.Compact(names), err
}

// Name implements [hsm.Counter].
func (c *counter) Name() string { return c.name }

// public reads what the counter's index is, which must still be this counter.
func (c *counter) public(b *bus) (*nv, error) {
	n, err := b.readNVPublic(c.index)
	if err != nil {
		return nil, err
	}
	if name, ok := n.counterName(); !ok || name != c.name {
		return nil, fmt.Errorf("NV index 0x%08x is another one now: %w", uint32(c.index), hsm.ErrNotFound)
	}
	return c.s.beginCounter(b, n)
}

// Value implements [hsm.Counter].
func (c *counter) Value(ctx context.Context) (v uint64, err error) {
	err = c.s.do(ctx, fmt.Sprintf("reading counter %q", c.name), func(b *bus) error {
		n, err := c.public(b)
		if err == nil {
			v, err = b.count(n)
		}
		return err
	})
	return v, err
}

// Increment implements [hsm.Counter]: TPM2_NV_Increment between two readings. The TPM does one after the other, so of two that
// find the counter where they want it at most one reads the next number afterwards.
func (c *counter) Increment(ctx context.Context, from uint64) (uint64, error) {
	if from == math.MaxUint64 {
		return 0, fmt.Errorf("counter %q cannot go beyond %d: %w", c.name, from, hsm.ErrFull)
	}
	sent := false
	err := c.s.do(ctx, fmt.Sprintf("incrementing counter %q", c.name), func(b *bus) error {
		n, err := c.public(b)
		if err != nil {
			return err
		}
		if err := c.mayIncrement(b); err != nil {
			return err
		}
		v, err := b.count(n)
		if err != nil {
			return err
		}
		if sent && v == from+1 {
			return fmt.Errorf("%w while it was incremented: it stands at %d, and not necessarily by this", hsm.ErrLost, v)
		}
		if v != from {
			return &hsm.CounterError{Name: c.name, From: from, Found: v}
		}
		sent = true
		if err := c.s.increment(b, n); err != nil {
			return err
		}
		if v, err = b.count(n); err == nil && v != from+1 {
			err = &hsm.CounterError{Name: c.name, From: from, Found: v}
		}
		return err
	})
	if err != nil {
		return 0, err
	}
	return from + 1, nil
}

// mayIncrement says hsm.ErrClaimed when somebody else holds the counter. Between this and the increment somebody may claim it: who
// does finds the increment afterwards.
func (c *counter) mayIncrement(b *bus) error {
	mine := c.mine()
	n, err := b.readNVPublic(c.index + claimOffset)
	switch {
	case errors.Is(err, hsm.ErrNotFound) && mine == nil:
		return nil
	case errors.Is(err, hsm.ErrNotFound):
		return &hsm.ClaimedError{Name: c.name}
	case err != nil:
		return err
	case mine == nil && ended(n.public.AuthPolicy.Buffer), mine != nil && bytes.Equal(mine, n.public.AuthPolicy.Buffer):
		return nil
	}
	claim, err := c.s.readClaim(b, n)
	if err != nil {
		return err
	}
	return &hsm.ClaimedError{Name: c.name, Claim: claim}
}

func (c *counter) mine() []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.claim
}

// claimPolicy is which process made a claim, in the 32 octets of an index's policy: 8 of a hash of its machine, 4 of the PID,
// 8 of the time when the process started, and 12 of the claim's ID.
func claimPolicy(claim hsm.Claim) []byte {
	machine := machineOf(claim)
	p := append(make([]byte, 0, policySize), machine[:]...)
	p = binary.BigEndian.AppendUint32(p, uint32(claim.PID))
	p = binary.BigEndian.AppendUint64(p, claim.Started)
	id, _ := hex.DecodeString(claim.ID)
	return append(p, id[:12]...)
}

func machineOf(claim hsm.Claim) [8]byte {
	sum := sha256.Sum256([]byte(claim.Host + "\x00" + claim.Boot + "\x00" + claim.Space))
	return [8]byte(sum[:8])
}

// byPolicy returns what a claim's policy tells about it.
func byPolicy(policy []byte) hsm.Claim {
	here, err := hsm.NewClaim("unknown")
	if err != nil || len(policy) != policySize {
		return hsm.Claim{}
	}
	claim := hsm.Claim{
		ID: hex.EncodeToString(policy[20:]), Owner: "unknown", Host: "unknown",
		PID: int(binary.BigEndian.Uint32(policy[8:])), Started: binary.BigEndian.Uint64(policy[12:]), Since: time.Unix(0, 0).UTC(),
	}
	if machine := machineOf(here); bytes.Equal(machine[:], policy[:8]) {
		claim.Host, claim.Boot, claim.Space = here.Host, here.Boot, here.Space
	}
	return claim
}

// ended reports whether the process that made a claim was one of this machine and has ended.
func ended(policy []byte) bool { return byPolicy(policy).Ended() }

// readClaim reads a claim. One that was cut off before it was written is known by its policy alone.
func (s *Store) readClaim(b *bus, n *nv) (hsm.Claim, error) {
	if len(n.public.AuthPolicy.Buffer) != policySize {
		return hsm.Claim{}, fmt.Errorf("NV index 0x%08x is in a claim's place and is none", uint32(n.Handle))
	}
	if n.public.Attributes.Written {
		data, err := s.readNV(b, n.Handle)
		if err != nil {
			return hsm.Claim{}, err
		}
		if claim, err := hsm.ParseClaim(data); err == nil && bytes.Equal(claimPolicy(claim), n.public.AuthPolicy.Buffer) {
			return claim, nil
		}
	}
	return byPolicy(n.public.AuthPolicy.Buffer), nil
}

// clear deletes a claim whose process has ended, or says hsm.ErrClaimed for another.
func (c *counter) clear(b *bus) error {
	n, err := b.readNVPublic(c.index + claimOffset)
	if errors.Is(err, hsm.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if policy := n.public.AuthPolicy.Buffer; ended(policy) {
		err := c.s.undefine(b, n.Handle, policy)
		if errors.Is(err, hsm.ErrNotFound) || errors.Is(err, errOther) {
			return nil
		}
		return err
	}
	claim, err := c.s.readClaim(b, n)
	if err != nil {
		return err
	}
	return &hsm.ClaimedError{Name: c.name, Claim: claim}
}

// Claim implements [hsm.Counter].
func (c *counter) Claim(ctx context.Context, owner string) (func() error, error) {
	claim, err := hsm.NewClaim(owner)
	if err != nil {
		return nil, fmt.Errorf("claiming counter %q: %w", c.name, err)
	}
	data, err := json.Marshal(claim)
	if err != nil {
		return nil, err
	}
	policy, h := claimPolicy(claim), c.index+claimOffset
	public := tpm2.TPMSNVPublic{
		NVIndex: h, NameAlg: tpm2.TPMAlgSHA256, DataSize: uint16(len(data)), AuthPolicy: tpm2.TPM2BDigest{Buffer: policy},
		Attributes: tpm2.TPMANV{OwnerWrite: true, OwnerRead: true, AuthRead: true, NoDA: true, NT: tpm2.TPMNTOrdinary},
	}
	err = c.s.do(ctx, fmt.Sprintf("claiming counter %q", c.name), func(b *bus) error {
		if _, err := c.public(b); err != nil {
			return err
		}
		for try := 1; ; try++ {
			n, err := b.readNVPublic(h)
			if err == nil && bytes.Equal(n.public.AuthPolicy.Buffer, policy) {
				return nil // before the connection broke
			}
			if err == nil {
				err = c.clear(b)
			}
			if err != nil && !errors.Is(err, hsm.ErrNotFound) {
				return err
			}
			if err = c.s.define(b, public); !errors.Is(err, tpm2.TPMRCNVDefined) || try == 4 {
				return err
			}
		}
	})
	release := c.releaser(ctx, policy)
	if err == nil {
		err = c.s.WriteNV(ctx, uint32(h), data)
	}
	if err != nil {
		// It may be there all the same, and would keep everybody out for as long as this process lives.
		if rerr := release(); !errors.Is(rerr, hsm.ErrClaimed) {
			err = errors.Join(err, rerr)
		}
		return nil, err
	}
	c.mu.Lock()
	c.claim = policy
	c.mu.Unlock()
	return release, nil
}

// releaseTime bounds how long a claim is being released.
const releaseTime = 30 * time.Second

// releaser returns what gives a claim back.
func (c *counter) releaser(ctx context.Context, policy []byte) func() error {
	var mu sync.Mutex
	released := false
	return func() error {
		mu.Lock()
		defer mu.Unlock()
		if released {
			return nil
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), releaseTime)
		defer cancel()
		tried := false
		err := c.s.do(ctx, fmt.Sprintf("releasing counter %q", c.name), func(b *bus) error {
			err := c.s.undefine(b, c.index+claimOffset, policy)
			if errors.Is(err, hsm.ErrNotFound) && tried {
				return nil // before the connection broke
			}
			tried = true
			if errors.Is(err, hsm.ErrNotFound) || errors.Is(err, errOther) {
				return &hsm.ClaimedError{Name: c.name}
			}
			return err
		})
		if err != nil && !errors.Is(err, hsm.ErrClaimed) {
			return err
		}
		released = true
		c.mu.Lock()
		if bytes.Equal(c.claim, policy) {
			c.claim = nil
		}
		c.mu.Unlock()
		return err
	}
}

// Holder implements [hsm.Counter].
func (c *counter) Holder(ctx context.Context) (claim hsm.Claim, err error) {
	err = c.s.do(ctx, fmt.Sprintf("reading who holds counter %q", c.name), func(b *bus) error {
		if _, err := c.public(b); err != nil {
			return err
		}
		n, err := b.readNVPublic(c.index + claimOffset)
		if err == nil {
			claim, err = c.s.readClaim(b, n)
		}
		return err
	})
	return claim, err
}

// TakeOver implements [hsm.Counter].
func (c *counter) TakeOver(ctx context.Context, claim hsm.Claim) error {
	return c.s.do(ctx, fmt.Sprintf("taking over counter %q", c.name), func(b *bus) error {
		n, err := b.readNVPublic(c.index + claimOffset)
		if err != nil {
			return err
		}
		now, err := c.s.readClaim(b, n)
		switch {
		case err != nil:
			return err
		case now.ID != claim.ID:
			return fmt.Errorf("that claim: %w", hsm.ErrNotFound)
		case byPolicy(n.public.AuthPolicy.Buffer).Running():
			return &hsm.ClaimedError{Name: c.name, Claim: now}
		}
		if err := c.s.undefine(b, n.Handle, n.public.AuthPolicy.Buffer); errors.Is(err, errOther) {
			return fmt.Errorf("that claim: %w", hsm.ErrNotFound)
		} else if err != nil {
			return err
		}
		return nil
	})
}
