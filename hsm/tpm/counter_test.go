package tpm_test

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/hsmtest"
	"github.com/touchmark/touchmark/hsm/tpm"
)

func TestMain(m *testing.M) {
	hsmtest.CounterProcess(func(ctx context.Context, uri hsm.URI) (hsm.Store, error) {
		return tpm.Open(ctx, tpm.Config{URI: uri})
	})
	os.Exit(m.Run())
}

func TestCounters(t *testing.T) {
	s := hsmtest.SWTPM(t)
	hsmtest.RunCounters(t, hsmtest.CounterSuite{
		URI: s.URI(), Rounds: 12, // each has a TPM without a resource manager for a moment
		Open: func(t testing.TB) hsm.Store { return open(t, s.URI()) },
		Mend: func() { // what killed processes leave in such a TPM, which has room for three
			tool(t, s, nil, "tpm2_flushcontext", "--transient-object")
			tool(t, s, nil, "tpm2_flushcontext", "--loaded-session")
		},
	})
	clean(t, s)
}

func newCounter(t testing.TB, s *tpm.Store, name string) hsm.Counter {
	t.Helper()
	c, err := s.CreateCounter(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func value(t testing.TB, c hsm.Counter) uint64 {
	t.Helper()
	v, err := c.Value(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// Where the first counter is, and the claim on it.
const (
	firstCounter = "0x01b70000"
	firstClaim   = "0x01b70100"
	asOwner      = "ownerwrite|ownerread|authread|no_da"
)

// define defines an index with tpm2-tools.
func define(t *testing.T, s *hsmtest.TPM, index string, size int, attributes string, policy []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(s.Dir, "policy"), policy, 0o600); err != nil {
		t.Fatal(err)
	}
	tool(t, s, nil, "tpm2_nvdefine", index, "-C", "o", "-s", fmt.Sprint(size), "-a", attributes, "-L", "policy")
}

// What others' tools see of a counter and do to it.
func TestCounterTools(t *testing.T) {
	s := hsmtest.SWTPM(t)
	store := open(t, s.URI())
	c := newCounter(t, store, "order-1234")
	v := value(t, c)
	read := func() uint64 {
		t.Helper()
		return binary.BigEndian.Uint64([]byte(tool(t, s, nil, "tpm2_nvread", firstCounter)))
	}
	if got := read(); got != v {
		t.Errorf("tpm2_nvread says %d, Value %d", got, v)
	}
	tool(t, s, nil, "tpm2_nvincrement", firstCounter, "-C", "o")
	var counter *hsm.CounterError
	if _, err := c.Increment(t.Context(), v); !errors.As(err, &counter) || counter.Found != v+1 {
		t.Errorf("after somebody else's increment: %v", err)
	}
	// One that was defined and not incremented yet, and others' that are none of ours.
	define(t, s, "0x01b70001", 8, asOwner+"|nt=counter", append([]byte("cut-off"), make([]byte, 25)...))
	define(t, s, "0x01b70002", 8, asOwner+"|nt=counter", make([]byte, 32))
	define(t, s, "0x01b70003", 8, asOwner, append([]byte("ordinary"), make([]byte, 24)...))
	define(t, s, "0x01b70004", 8, asOwner+"|authwrite|nt=counter", append([]byte("anybody"), make([]byte, 25)...))
	if names, err := store.Counters(t.Context()); fmt.Sprint(names) != "[cut-off order-1234]" || err != nil {
		t.Errorf("listed %v, %v", names, err)
	}
	cut, err := store.OpenCounter(t.Context(), "cut-off")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := cut.Increment(t.Context(), value(t, cut)); err != nil {
		t.Error(err)
	}
	newCounter(t, store, "next")
	if _, err := store.ReadNV(t.Context(), 0x01b70005); err != nil {
		t.Errorf("the next one is not at the first index that is free: %v", err)
	}
	// Two of one name.
	define(t, s, "0x01b70006", 8, asOwner+"|nt=counter", append([]byte("next"), make([]byte, 28)...))
	if _, err := store.OpenCounter(t.Context(), "next"); err == nil {
		t.Error("opened one of two counters of a name")
	}
	// Something else in its place.
	tool(t, s, nil, "tpm2_nvundefine", firstCounter, "-C", "o")
	define(t, s, firstCounter, 8, asOwner+"|nt=counter", append([]byte("another"), make([]byte, 25)...))
	if _, err := c.Increment(t.Context(), v+1); !errors.Is(err, hsm.ErrNotFound) {
		t.Errorf("of another counter at its index: %v", err)
	}
	clean(t, s)
}

// A counter that is made anew begins above what was, in a TPM that was cleared too.
func TestCounterNeverGoesBack(t *testing.T) {
	s := hsmtest.SWTPM(t)
	store := open(t, s.URI())
	highest := uint64(0)
	for i, forget := range []func(){
		func() {
			if err := store.DeleteCounter(t.Context(), "c"); err != nil {
				t.Fatal(err)
			}
		},
		func() { tool(t, s, nil, "tpm2_nvundefine", firstCounter, "-C", "o") },
		func() { tool(t, s, nil, "tpm2_clear", "-c", "p") },
	} {
		c := newCounter(t, store, "c")
		for range 10 {
			v, err := c.Increment(t.Context(), value(t, c))
			if err != nil || v <= highest {
				t.Fatalf("after %d, in life %d: %d, %v", highest, i, v, err)
			}
			highest = v
		}
		forget()
		if err := store.Close(); err != nil {
			t.Fatal(err)
		}
		store = open(t, s.URI())
	}
	if v := value(t, newCounter(t, store, "c")); v <= highest {
		t.Errorf("after %d: %d", highest, v)
	}
}

// policyOf is what the index of a claim says in its authPolicy.
func policyOf(c hsm.Claim) []byte {
	machine := sha256.Sum256([]byte(c.Host + "\x00" + c.Boot + "\x00" + c.Space))
	p := binary.BigEndian.AppendUint32(machine[:8:8], uint32(c.PID))
	p = binary.BigEndian.AppendUint64(p, c.Started)
	id, _ := hex.DecodeString(c.ID)
	return append(p, id[:12]...)
}

func TestCounterTakeOver(t *testing.T) {
	s := hsmtest.SWTPM(t)
	store := open(t, s.URI())
	c := newCounter(t, store, "c")
	claim := hsmtest.Elsewhere(t)
	text, err := json.Marshal(claim)
	if err != nil {
		t.Fatal(err)
	}
	define(t, s, firstClaim, len(text), asOwner, policyOf(claim))
	tool(t, s, text, "tpm2_nvwrite", firstClaim, "-C", "o", "-i", "-")
	hsmtest.TakeOver(t, c, claim)
	hsmtest.TakenOver(t, c, func(hsm.Claim) { tool(t, s, nil, "tpm2_nvundefine", firstClaim, "-C", "o") })

	// Cut off before the claim was written: known by its policy.
	define(t, s, firstClaim, 200, asOwner, policyOf(claim))
	if _, err := c.Claim(t.Context(), "mine"); !errors.Is(err, hsm.ErrClaimed) {
		t.Errorf("claimed what may be held elsewhere: %v", err)
	}
	holder, err := c.Holder(t.Context())
	if err != nil || holder.PID != claim.PID || holder.Ended() || holder.Running() {
		t.Errorf("held by %s, %v", holder, err)
	}
	if err := c.TakeOver(t.Context(), holder); err != nil {
		t.Fatal(err)
	}
	ended := exec.Command("true")
	if err := ended.Run(); err != nil {
		t.Fatal(err)
	}
	here, err := hsm.NewClaim("here")
	if err != nil {
		t.Fatal(err)
	}
	here.PID = ended.Process.Pid
	define(t, s, firstClaim, 200, asOwner, policyOf(here))
	if err := store.DeleteCounter(t.Context(), "c"); err != nil {
		t.Errorf("held by a process that has ended: %v", err)
	}

	// What lies about who made it, and what is no claim.
	for what, text := range map[string]string{"another's": string(text), "garbage": "garbage"} {
		c := newCounter(t, store, "c")
		mine, err := hsm.NewClaim("mine")
		if err != nil {
			t.Fatal(err)
		}
		define(t, s, firstClaim, len(text), asOwner, policyOf(mine))
		tool(t, s, []byte(text), "tpm2_nvwrite", firstClaim, "-C", "o", "-i", "-")
		if holder, err := c.Holder(t.Context()); err != nil || holder.PID != os.Getpid() || holder.Owner != "unknown" || !holder.Running() {
			t.Errorf("%s: held by %s, %v", what, holder, err)
		}
		tool(t, s, nil, "tpm2_nvundefine", firstClaim, "-C", "o")
		// Not one of ours at all.
		tool(t, s, nil, "tpm2_nvdefine", firstClaim, "-C", "o", "-s", "8")
		if _, err := c.Claim(t.Context(), "mine"); err == nil || errors.Is(err, hsm.ErrClaimed) {
			t.Errorf("an index of others in the claim's place: %v", err)
		}
		tool(t, s, nil, "tpm2_nvundefine", firstClaim, "-C", "o")
		if err := store.DeleteCounter(t.Context(), "c"); err != nil {
			t.Error(err)
		}
	}
	clean(t, s)
}

// With an owner's authorization value, in sessions.
func TestCounterOwned(t *testing.T) {
	s := hsmtest.SWTPM(t)
	tool(t, s, nil, "tpm2_changeauth", "-c", "o", "0wner")
	store, err := tpm.Open(t.Context(), tpm.Config{URI: s.URI(), Owner: hsm.Secret("0wner")})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	c := newCounter(t, store, "c")
	release, err := c.Claim(t.Context(), "line-3")
	if err != nil {
		t.Fatal(err)
	}
	v := value(t, c)
	if _, err := c.Increment(t.Context(), v); err != nil {
		t.Error(err)
	}
	stranger, err := tpm.Open(t.Context(), tpm.Config{URI: s.URI(), Owner: hsm.Secret("guess")})
	if err != nil {
		t.Fatal(err)
	}
	defer stranger.Close()
	theirs, err := stranger.OpenCounter(t.Context(), "c")
	if err != nil {
		t.Fatal(err)
	}
	if got := value(t, theirs); got != v+1 {
		t.Errorf("a stranger reads %d, not %d", got, v+1)
	}
	if err := release(); err != nil {
		t.Error(err)
	}
	if _, err := theirs.Increment(t.Context(), v+1); !errors.Is(err, hsm.ErrPINIncorrect) {
		t.Errorf("a stranger increments: %v", err)
	}
	if err := store.DeleteCounter(t.Context(), "c"); err != nil {
		t.Error(err)
	}
}

// The TPM loses its power again and again while it counts.
func TestCounterPowerLost(t *testing.T) {
	s := hsmtest.SWTPM(t)
	store := open(t, s.URI())
	c := newCounter(t, store, "c")
	last := value(t, c)
	for range 20 {
		cut := make(chan struct{})
		done := make(chan struct{})
		go func() {
			defer close(done)
			<-cut
			s.Kill()
			s.Start()
		}()
		unknown := false
		for i := 0; ; i++ {
			if i == 5 {
				close(cut)
			}
			v, err := c.Increment(t.Context(), last)
			if errors.Is(err, hsm.ErrLost) {
				unknown = true
				break
			}
			if err != nil || v != last+1 {
				t.Fatalf("from %d: %d, %v", last, v, err)
			}
			last = v
			select {
			case <-done:
			default:
				continue
			}
			break
		}
		<-done
		v := value(t, c)
		if v < last || v > last+1 || v != last && !unknown {
			t.Fatalf("%d was acknowledged, and it stands at %d", last, v)
		}
		last = v
	}
}

// An increment against the bare command, on a TPM of the same kind.
func BenchmarkIncrement(b *testing.B) {
	s := hsmtest.SWTPM(b)
	c := newCounter(b, open(b, s.URI()), "c")
	v := value(b, c)
	for b.Loop() {
		var err error
		if v, err = c.Increment(b.Context(), v); err != nil {
			b.Fatal(err)
		}
	}
}
