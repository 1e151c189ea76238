package hsmtest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/touchmark/touchmark/hsm"
)

// CounterSuite says how to open the store whose counters are under test.
type CounterSuite struct {
	// Open opens the store; each call opens the same one again.
	Open func(t testing.TB) hsm.Store
	// URI is the store's for other processes, which the package's TestMain makes with [CounterProcess].
	URI hsm.URI
	// Unsupported: the store cannot keep counters and says so.
	Unsupported bool
	// Mend, if not nil, is called when a process was killed, before anybody uses the store again.
	Mend func()
	// Rounds is how many races there are; 0 means 50. Kills are 50.
	Rounds int
}

const processEnv = "HSMTEST_COUNTER"

// CounterProcess turns a test's process into one that does what the suite asks of another process, if it was started for that. A
// package that runs the suite calls it first in its TestMain.
func CounterProcess(open func(context.Context, hsm.URI) (hsm.Store, error)) {
	raw := os.Getenv(processEnv)
	if raw == "" {
		return
	}
	if err := serveCounter(open, raw); err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// serveCounter answers each line with one, until there are no more.
func serveCounter(open func(context.Context, hsm.URI) (hsm.Store, error), raw string) error {
	ctx := context.Background()
	uri, err := hsm.ParseURI(raw)
	if err != nil {
		return err
	}
	store, err := open(ctx, uri)
	if err != nil {
		return err
	}
	counters := store.(hsm.CounterStore)
	fmt.Println("ready", 0)
	var c hsm.Counter
	var release func() error
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		verb, arg, _ := strings.Cut(lines.Text(), " ")
		var v uint64
		var err error
		switch verb {
		case "open":
			c, err = counters.OpenCounter(ctx, arg)
		case "create":
			c, err = counters.CreateCounter(ctx, arg)
		case "value":
			v, err = c.Value(ctx)
		case "increment":
			from, _ := strconv.ParseUint(arg, 10, 64)
			v, err = c.Increment(ctx, from)
		case "claim":
			release, err = c.Claim(ctx, arg)
		case "release":
			err = release()
		case "noise": // what a station does beside counting
			if data, ok := store.(hsm.DataStore); ok {
				name := "noise:" + strconv.Itoa(os.Getpid())
				err = errors.Join(data.PutData(ctx, hsm.Data{Name: name, Application: "hsmtest", Value: []byte("noise")}), data.DeleteData(ctx, name))
			}
		case "hold": // again and again, until it is killed
			for {
				if release, err = c.Claim(ctx, arg); err == nil {
					fmt.Println("ok", 0)
					err = release()
				}
				if err != nil {
					break
				}
			}
		case "count": // until it is killed
			for v, err = c.Value(ctx); err == nil; v, err = c.Increment(ctx, v) {
				fmt.Println("ok", v)
			}
		}
		var counter *hsm.CounterError
		var claimed *hsm.ClaimedError
		switch {
		case err == nil:
			fmt.Println("ok", v)
		case errors.As(err, &counter):
			fmt.Println("counter", counter.Found)
		case errors.As(err, &claimed):
			fmt.Println("claimed", claimed.Claim.PID)
		case errors.Is(err, hsm.ErrExists):
			fmt.Println("exists", 0)
		default:
			fmt.Println("error", err)
		}
	}
	return store.Close()
}

// process is another process at work on the store.
type process struct {
	t     testing.TB
	cmd   *exec.Cmd
	in    io.WriteCloser
	out   *bufio.Reader
	ended bool
}

func (s CounterSuite) process(t testing.TB) *process {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p := &process{t: t, cmd: exec.Command(exe)}
	p.cmd.Env = append(os.Environ(), processEnv+"="+s.URI.String())
	p.cmd.Stderr = os.Stderr
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.out = bufio.NewReader(out)
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.kill)
	if word, _ := p.hear(); word != "ready" {
		t.Fatalf("another process: %s", word)
	}
	return p
}

func (p *process) say(format string, args ...any) {
	p.t.Helper()
	if _, err := fmt.Fprintf(p.in, format+"\n", args...); err != nil {
		p.t.Fatal(err)
	}
}

// hear returns the next answer, which is an error's text or a word and a number.
func (p *process) hear() (word string, n uint64) {
	p.t.Helper()
	line, err := p.out.ReadString('\n')
	if err != nil {
		p.t.Fatalf("the other process: %v", err)
	}
	word, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
	if n, err = strconv.ParseUint(rest, 10, 64); err != nil {
		return line, 0
	}
	return word, n
}

// ask wants an ok.
func (p *process) ask(format string, args ...any) uint64 {
	p.t.Helper()
	p.say(format, args...)
	word, n := p.hear()
	if word != "ok" {
		p.t.Fatalf("%s: %s %d", fmt.Sprintf(format, args...), word, n)
	}
	return n
}

func (p *process) kill() {
	if !p.ended {
		_ = p.cmd.Process.Kill()
		_ = p.cmd.Wait()
		p.ended = true
	}
}

// RunCounters runs the suite of counters.
func RunCounters(t *testing.T, s CounterSuite) {
	if s.Rounds == 0 {
		s.Rounds = 50
	}
	if s.Unsupported {
		store := s.Open(t).(hsm.CounterStore)
		if _, err := store.CreateCounter(t.Context(), "cannot"); !errors.Is(err, hsm.ErrUnsupported) {
			t.Errorf("counters are declared as unsupported, answers %v", err)
		}
		return
	}
	t.Run("lifetime", s.lifetime)
	t.Run("marks", s.marks)
	t.Run("goroutines", s.goroutines)
	t.Run("processes", s.processes)
	t.Run("creators", s.creators)
	t.Run("killed", s.killed)
	t.Run("claim", s.claim)
	t.Run("claimants", s.claimants)
	t.Run("killed claimants", s.killedClaimants)
}

func (s CounterSuite) create(t *testing.T, name string) (hsm.CounterStore, hsm.Counter) {
	t.Helper()
	store := s.Open(t).(hsm.CounterStore)
	c := must(store.CreateCounter(t.Context(), name))(t)
	t.Cleanup(func() { _ = store.DeleteCounter(context.WithoutCancel(t.Context()), name) })
	return store, c
}

// marks has a value keep what was meant by it, for whoever opens the counter next, through claims and until it is moved again.
func (s CounterSuite) marks(t *testing.T) {
	_, c := s.create(t, "marked")
	m, ok := c.(hsm.MarkedCounter)
	if !ok {
		return // a number and no more: see hsm.MarkedCounter
	}
	mark := func(want string) {
		t.Helper()
		again := must(s.Open(t).(hsm.CounterStore).OpenCounter(t.Context(), "marked"))(t).(hsm.MarkedCounter)
		for _, c := range []hsm.MarkedCounter{m, again} {
			if got, err := c.Mark(t.Context()); err != nil || got != want {
				t.Errorf("mark %q, %v, want %q", got, err, want)
			}
		}
	}
	mark("")
	at := must(m.Value(t.Context()))(t)
	at = must(m.IncrementMarked(t.Context(), at, "7 root"))(t)
	mark("7 root")
	release := must(m.Claim(t.Context(), "suite"))(t)
	mark("7 root")
	if _, err := m.IncrementMarked(t.Context(), at-1, "8 another"); !errors.Is(err, hsm.ErrCounter) {
		t.Errorf("from a value that it does not stand at: %v", err)
	}
	for _, bad := range []string{strings.Repeat("x", hsm.MaxMark+1), "line\nfeed", "é"} {
		if _, err := m.IncrementMarked(t.Context(), at, bad); err == nil {
			t.Errorf("mark %q was taken", bad)
		}
	}
	mark("7 root")
	at = must(m.IncrementMarked(t.Context(), at, "9 root"))(t)
	if err := release(); err != nil {
		t.Error(err)
	}
	mark("9 root")
	must(m.Increment(t.Context(), at))(t)
	mark("")
}

// lifetime makes a counter, counts, and deletes it.
func (s CounterSuite) lifetime(t *testing.T) {
	store, c := s.create(t, "life:1")
	if _, err := store.CreateCounter(t.Context(), "life:1"); !errors.Is(err, hsm.ErrExists) {
		t.Errorf("second counter of that name: %v", err)
	}
	longest := strings.Repeat("n", 32)
	must(store.CreateCounter(t.Context(), longest))(t)
	if names := must(store.Counters(t.Context()))(t); !slices.Equal(names, []string{"life:1", longest}) {
		t.Errorf("listed %v", names)
	}
	for _, bad := range []string{"", "a/b", longest + "n", "nul\x00", "life:1\x00"} {
		if _, err := store.CreateCounter(t.Context(), bad); err == nil {
			t.Errorf("made a counter called %q", bad)
		}
		if _, err := store.OpenCounter(t.Context(), bad); !errors.Is(err, hsm.ErrNotFound) {
			t.Errorf("OpenCounter(%q): %v", bad, err)
		}
	}
	begin := must(c.Value(t.Context()))(t)
	for i := range uint64(5) {
		if v := must(c.Increment(t.Context(), begin+i))(t); v != begin+i+1 {
			t.Fatalf("from %d to %d", begin+i, v)
		}
	}
	for _, from := range []uint64{0, begin + 4, begin + 6, 1<<64 - 1} {
		if from == 0 && begin == 0 {
			from = 1
		}
		_, err := c.Increment(t.Context(), from)
		var counter *hsm.CounterError
		if !errors.Is(err, hsm.ErrCounter) || !errors.As(err, &counter) || counter.From != from || counter.Found != begin+5 {
			if from != 1<<64-1 || !errors.Is(err, hsm.ErrFull) {
				t.Errorf("from %d, where it stands at %d: %v", from, begin+5, err)
			}
		}
	}
	again := s.Open(t).(hsm.CounterStore)
	c2 := must(again.OpenCounter(t.Context(), "life:1"))(t)
	if c2.Name() != "life:1" || must(c2.Value(t.Context()))(t) != begin+5 {
		t.Errorf("reopened, %s stands elsewhere than at %d", c2.Name(), begin+5)
	}
	must(c2.Increment(t.Context(), begin+5))(t)
	if _, err := c.Increment(t.Context(), begin+5); !errors.Is(err, hsm.ErrCounter) {
		t.Errorf("from where another has moved it: %v", err)
	}
	for _, name := range []string{"life:1", longest} {
		if err := store.DeleteCounter(t.Context(), name); err != nil {
			t.Fatal(err)
		}
		if err := store.DeleteCounter(t.Context(), name); !errors.Is(err, hsm.ErrNotFound) {
			t.Errorf("second DeleteCounter: %v", err)
		}
		if _, err := store.OpenCounter(t.Context(), name); !errors.Is(err, hsm.ErrNotFound) {
			t.Errorf("OpenCounter after DeleteCounter: %v", err)
		}
	}
	if _, err := c.Value(t.Context()); !errors.Is(err, hsm.ErrNotFound) {
		t.Errorf("Value of a counter that was deleted: %v", err)
	}
	if _, err := c.Increment(t.Context(), begin+6); !errors.Is(err, hsm.ErrNotFound) {
		t.Errorf("Increment of a counter that was deleted: %v", err)
	}
	if names := must(store.Counters(t.Context()))(t); len(names) != 0 {
		t.Errorf("left: %v", names)
	}
}

// goroutines race from one value, on two handles each of two stores.
func (s CounterSuite) goroutines(t *testing.T) {
	_, c := s.create(t, "goroutines")
	all := []hsm.Counter{c, c}
	for range 2 {
		all = append(all, must(s.Open(t).(hsm.CounterStore).OpenCounter(t.Context(), "goroutines"))(t))
	}
	// Meanwhile somebody else in the process works with the store.
	ctx, stop := context.WithCancel(t.Context())
	var busy sync.WaitGroup
	defer busy.Wait()
	defer stop()
	lister := s.Open(t).(hsm.Lister)
	busy.Go(func() {
		for ctx.Err() == nil {
			if _, err := lister.List(ctx, ""); err != nil && ctx.Err() == nil {
				t.Errorf("listing keys: %v", err)
			}
		}
	})
	from := must(c.Value(t.Context()))(t)
	for range s.Rounds {
		var wg sync.WaitGroup
		var mu sync.Mutex
		won := 0
		for _, c := range all {
			wg.Go(func() {
				v, err := c.Increment(t.Context(), from)
				mu.Lock()
				defer mu.Unlock()
				if err == nil && v == from+1 {
					won++
				} else if !errors.Is(err, hsm.ErrCounter) {
					t.Errorf("racing from %d: %d, %v", from, v, err)
				}
			})
		}
		wg.Wait()
		v := must(c.Value(t.Context()))(t)
		if won > 1 || v < from+uint64(won) || v > from+uint64(len(all)) {
			t.Fatalf("from %d, %d of %d won and it stands at %d", from, won, len(all), v)
		}
		from = v
	}
}

// processes race from one value, and write other things to the store, too.
func (s CounterSuite) processes(t *testing.T) {
	_, c := s.create(t, "processes")
	all := []*process{s.process(t), s.process(t)}
	for _, p := range all {
		p.ask("open processes")
	}
	from := must(c.Value(t.Context()))(t)
	total := 0
	for round := range 2 * s.Rounds {
		// Sometimes both at once, sometimes one after the other, from a value that the latter cannot know to be old. What else they
		// write may keep their view of the token as it was.
		won := 0
		var highest uint64
		one := func(p *process) {
			switch word, n := p.hear(); word {
			case "ok":
				won++
				highest = max(highest, n)
			case "counter":
			default:
				t.Fatalf("racing from %d: %s", from, word)
			}
		}
		if round%3 == 0 {
			for _, p := range all {
				p.ask("noise")
				p.say("increment %d", from)
				one(p)
			}
		} else {
			for i, p := range all {
				if round&(i+1) != 0 {
					p.ask("noise")
				}
			}
			for _, p := range all {
				p.say("increment %d", from)
			}
			for _, p := range all {
				one(p)
			}
		}
		if won > 1 {
			t.Fatalf("both moved the counter from %d", from)
		}
		for _, p := range all {
			if v := p.ask("value"); v < highest || v > from+2 {
				t.Fatalf("from %d to %d, and one of them reads %d", from, highest, v)
			}
		}
		v := must(c.Value(t.Context()))(t)
		if v < highest || v > from+2 {
			t.Fatalf("from %d to %d, and a third reads %d", from, highest, v)
		}
		from = v
		total += won
	}
	if total < s.Rounds/2 {
		t.Errorf("in %d rounds only %d increments succeeded", 2*s.Rounds, total)
	}
	t.Logf("%d of %d races were won by one", total, 2*s.Rounds)
}

// creators make one counter at once.
func (s CounterSuite) creators(t *testing.T) {
	store := s.Open(t).(hsm.CounterStore)
	all := []*process{s.process(t), s.process(t)}
	for range s.Rounds / 5 {
		for _, p := range all {
			p.say("create new")
		}
		made := 0
		for _, p := range all {
			switch word, _ := p.hear(); word {
			case "ok":
				made++
			case "exists":
			default:
				t.Fatalf("creating: %s", word)
			}
		}
		if made > 1 {
			t.Fatal("two counters of one name were made")
		}
		if err := store.DeleteCounter(t.Context(), "new"); made == 1 && err != nil || made == 0 && !errors.Is(err, hsm.ErrNotFound) {
			t.Fatalf("%d made, deleting it: %v", made, err)
		}
	}
}

const kills = 50

// killed kills a process while it counts.
func (s CounterSuite) killed(t *testing.T) {
	_, c := s.create(t, "killed")
	begin := must(c.Value(t.Context()))(t)
	between := 0
	for range kills {
		p := s.process(t)
		p.ask("open killed")
		p.say("count")
		var last uint64
		hear := func() (more bool) {
			line, err := p.out.ReadString('\n')
			if err != nil {
				return false
			}
			n, err := strconv.ParseUint(strings.TrimSpace(strings.TrimPrefix(line, "ok ")), 10, 64)
			if err != nil || last != 0 && n != last+1 {
				t.Fatalf("it acknowledged %q after %d", line, last)
			}
			last = n
			return true
		}
		for range 2 + rand.IntN(5) {
			hear()
		}
		anyTime()
		_ = p.cmd.Process.Kill()
		for hear() {
		}
		p.kill()
		if s.Mend != nil {
			s.Mend()
		}
		v := must(c.Value(t.Context()))(t)
		if v < last || v > last+1 {
			t.Fatalf("%d was acknowledged, and after the kill it stands at %d", last, v)
		}
		if v != last {
			between++
		}
	}
	v := must(c.Value(t.Context()))(t)
	must(c.Increment(t.Context(), v))(t)
	t.Logf("%d increments, %d of %d kills between the counter and its acknowledgement", v-begin, between, kills)
}

// anyTime is over at any point of what another process does.
func anyTime() {
	for end := time.Now().Add(rand.N(3 * time.Millisecond)); time.Now().Before(end); {
	}
}

// claim holds a counter, and lets go of it in every way.
func (s CounterSuite) claim(t *testing.T) {
	store, c := s.create(t, "claimed")
	v := must(c.Value(t.Context()))(t)
	if _, err := c.Holder(t.Context()); !errors.Is(err, hsm.ErrNotFound) {
		t.Errorf("holder of a counter that nobody holds: %v", err)
	}
	for _, bad := range []string{"", "line\n3", strings.Repeat("x", 65)} {
		if _, err := c.Claim(t.Context(), bad); err == nil {
			t.Errorf("claimed for %q", bad)
		}
	}
	release := must(c.Claim(t.Context(), "line-3, station 7"))(t)
	other := must(s.Open(t).(hsm.CounterStore).OpenCounter(t.Context(), "claimed"))(t)
	holder := must(other.Holder(t.Context()))(t)
	if holder.Owner != "line-3, station 7" || holder.PID != os.Getpid() || !holder.Running() || holder.Ended() {
		t.Errorf("held by %s, running %t", holder, holder.Running())
	}
	refused := func(c hsm.Counter) {
		t.Helper()
		_, err := c.Claim(t.Context(), "other")
		var claimed *hsm.ClaimedError
		if !errors.Is(err, hsm.ErrClaimed) || !errors.As(err, &claimed) || claimed.Claim != holder {
			t.Errorf("a second claim: %v", err)
		}
	}
	refused(other)
	refused(c)
	if _, err := other.Increment(t.Context(), v); !errors.Is(err, hsm.ErrClaimed) {
		t.Errorf("incremented what another holds: %v", err)
	}
	if err := store.DeleteCounter(t.Context(), "claimed"); !errors.Is(err, hsm.ErrClaimed) {
		t.Errorf("deleted what is held: %v", err)
	}
	if err := other.TakeOver(t.Context(), holder); !errors.Is(err, hsm.ErrClaimed) {
		t.Errorf("took over from a process that runs: %v", err)
	}
	v = must(c.Increment(t.Context(), v))(t)
	p := s.process(t)
	p.ask("open claimed")
	for _, line := range []string{"claim p", fmt.Sprint("increment ", v)} {
		p.say("%s", line)
		if word, pid := p.hear(); word != "claimed" || pid != uint64(os.Getpid()) {
			t.Errorf("%s, in another process: %s", line, word)
		}
	}
	if err := errors.Join(release(), release()); err != nil {
		t.Fatal(err)
	}
	v = must(other.Increment(t.Context(), v))(t)

	// Another process holds it and is killed.
	p.ask("claim p")
	v = p.ask("increment %d", v)
	if _, err := c.Claim(t.Context(), "line-3"); !errors.Is(err, hsm.ErrClaimed) || !strings.Contains(err.Error(), fmt.Sprintf("process %d, since ", p.cmd.Process.Pid)) {
		t.Errorf("claimed by another process: %v", err)
	}
	p.kill()
	if s.Mend != nil {
		s.Mend()
	}
	if dead := must(other.Holder(t.Context()))(t); !dead.Ended() || dead.Running() {
		t.Errorf("%s has not ended", dead)
	}
	v = must(other.Increment(t.Context(), v))(t) // nobody is in the way
	release = must(c.Claim(t.Context(), "line-3"))(t)
	v = must(c.Increment(t.Context(), v))(t)
	if err := release(); err != nil {
		t.Error(err)
	}
	if must(c.Value(t.Context()))(t) != v {
		t.Error("claims have moved the counter")
	}
}

// claimants claim one counter at once.
func (s CounterSuite) claimants(t *testing.T) {
	s.create(t, "claimants")
	all := []*process{s.process(t), s.process(t), s.process(t)}
	for _, p := range all {
		p.ask("open claimants")
	}
	wins := 0
	for round := range s.Rounds {
		for i, p := range all {
			if round&(1<<i) != 0 {
				p.ask("noise")
			}
		}
		for i, p := range all {
			p.say("claim p%d", i)
		}
		var holders []*process
		for _, p := range all {
			switch word, _ := p.hear(); word {
			case "ok":
				holders = append(holders, p)
			case "claimed":
			default:
				t.Fatalf("claiming: %s", word)
			}
		}
		if len(holders) > 1 {
			t.Fatalf("%d processes hold the counter", len(holders))
		}
		for _, p := range holders {
			p.ask("release")
			wins++
		}
	}
	if wins < s.Rounds/2 {
		t.Errorf("of %d rounds %d had a winner", s.Rounds, wins)
	}
	t.Logf("%d of %d rounds had a winner", wins, s.Rounds)
}

// killedClaimants kills processes while they claim and release a counter: nobody has to be asked afterwards.
func (s CounterSuite) killedClaimants(t *testing.T) {
	_, c := s.create(t, "orphan")
	v := must(c.Value(t.Context()))(t)
	for range s.Rounds / 3 {
		p := s.process(t)
		p.ask("open orphan")
		p.say("hold p")
		for range 1 + rand.IntN(3) {
			if word, _ := p.hear(); word != "ok" {
				t.Fatalf("claiming: %s", word)
			}
		}
		anyTime()
		p.kill()
		if s.Mend != nil {
			s.Mend()
		}
		release := must(c.Claim(t.Context(), "heir"))(t)
		v = must(c.Increment(t.Context(), v))(t)
		if err := release(); err != nil {
			t.Fatal(err)
		}
	}
}

// Elsewhere returns a claim as another machine makes it, or this one made it before it was started the last time.
func Elsewhere(t *testing.T) hsm.Claim {
	t.Helper()
	c := must(hsm.NewClaim("elsewhere"))(t)
	c.Boot = "00000000-0000-0000-0000-000000000000"
	return c
}

// TakeOver wants a counter to be held by that claim of Elsewhere's, and takes it over.
func TakeOver(t *testing.T, c hsm.Counter, claim hsm.Claim) {
	t.Helper()
	holder := must(c.Holder(t.Context()))(t)
	if holder != claim || holder.Ended() || holder.Running() {
		t.Fatalf("held by %s, want %s", holder, claim)
	}
	_, err := c.Claim(t.Context(), "mine")
	var claimed *hsm.ClaimedError
	if !errors.As(err, &claimed) || claimed.Claim != claim {
		t.Errorf("claimed what may be held elsewhere: %v", err)
	}
	v := must(c.Value(t.Context()))(t)
	if _, err := c.Increment(t.Context(), v); !errors.Is(err, hsm.ErrClaimed) {
		t.Errorf("incremented what may be held elsewhere: %v", err)
	}
	wrong := claim
	wrong.ID = strings.Repeat("0", len(claim.ID))
	if err := c.TakeOver(t.Context(), wrong); err == nil {
		t.Error("took over a claim that is not there")
	}
	if err := c.TakeOver(t.Context(), holder); err != nil {
		t.Fatal(err)
	}
	if err := c.TakeOver(t.Context(), holder); !errors.Is(err, hsm.ErrNotFound) {
		t.Errorf("second TakeOver: %v", err)
	}
	release := must(c.Claim(t.Context(), "mine"))(t)
	if v = must(c.Increment(t.Context(), v))(t); v != must(c.Value(t.Context()))(t) {
		t.Error("it stands elsewhere")
	}
	if err := release(); err != nil {
		t.Error(err)
	}
}

// TakenOver wants whoever is taken over to hear of it. end ends the claim of a process that runs, as TakeOver does for others.
func TakenOver(t *testing.T, c hsm.Counter, end func(hsm.Claim)) {
	t.Helper()
	v := must(c.Value(t.Context()))(t)
	release := must(c.Claim(t.Context(), "paused"))(t)
	end(must(c.Holder(t.Context()))(t))
	if _, err := c.Increment(t.Context(), v); !errors.Is(err, hsm.ErrClaimed) || !strings.Contains(err.Error(), "taken over") {
		t.Errorf("Increment of somebody who was taken over: %v", err)
	}
	if err := release(); !errors.Is(err, hsm.ErrClaimed) {
		t.Errorf("release of somebody who was taken over: %v", err)
	}
	must(c.Increment(t.Context(), v))(t) // as anybody
}
