package hook_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/touchmark/touchmark/hsm/hsmtest"
	"github.com/touchmark/touchmark/pkg/filelock"
	"github.com/touchmark/touchmark/pkg/fixture"
	"github.com/touchmark/touchmark/pkg/hook"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv("HOOK_TEST_SPOOL"); dir != "" {
		child(dir)
	}
	os.Exit(m.Run())
}

// deliverer answers each attempt as a test says, and remembers what was asked and when.
type deliverer struct {
	mu      sync.Mutex
	asked   []string
	at      []time.Time
	answers func(attempt int, e hook.Event) error // from 1
}

func (d *deliverer) Deliver(_ context.Context, e hook.Event, body []byte) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.asked, d.at = append(d.asked, e.ID), append(d.at, time.Now())
	if again, err := hook.ParseEvent(body); err != nil || again.ID != e.ID {
		return fmt.Errorf("the body is %q: %w", body, err)
	}
	if d.answers == nil {
		return nil
	}
	return d.answers(len(d.asked), e)
}

func (d *deliverer) ids() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.asked)
}

func open(t *testing.T, cfg hook.Config) *hook.Spool {
	t.Helper()
	s, err := hook.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func enqueue(t *testing.T, s *hook.Spool, ids ...string) {
	t.Helper()
	for _, id := range ids {
		if err := s.Enqueue(hook.Event{ID: id, Kind: "pass", Fields: map[string]string{"serial": "SN-" + id}}); err != nil {
			t.Fatal(err)
		}
	}
}

// inBubble runs a spool in a bubble of time until everything there is waiting for nothing but events.
func inBubble(t *testing.T, s *hook.Spool, f func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { _ = s.Run(ctx) })
	f()
	cancel()
	wg.Wait()
}

// A destination that is away gets everything once it is back, in order, and is asked less and less often until then.
func TestBackoff(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		away := errors.New("no route to host")
		d := &deliverer{answers: func(n int, _ hook.Event) error {
			if n <= 12 {
				return away
			}
			return nil
		}}
		s := open(t, hook.Config{Dir: dir, Destinations: []hook.Destination{{Name: "mes", To: d}}, Rand: func() float64 { return 0.5 }})
		enqueue(t, s, "a", "b", "c")
		inBubble(t, s, func() {
			time.Sleep(4 * time.Second)
			if st := s.Status()[0]; st.Depth != 3 || st.Failures != 3 || st.LastError != away.Error() || st.Age < 3*time.Second || st.Age > 5*time.Second || st.Full {
				t.Errorf("while it is away: %+v", st)
			}
			time.Sleep(time.Hour)
		})
		if want := append(slices.Repeat([]string{"a"}, 13), "b", "c"); !slices.Equal(d.asked, want) {
			t.Fatalf("was asked %v", d.asked)
		}
		for i, want := range []float64{1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300} {
			if got := d.at[i+1].Sub(d.at[i]).Seconds(); got != want*0.75 {
				t.Errorf("after failure %d it waits %v s, want %v", i+1, got, want*0.75)
			}
		}
		if st := s.Status()[0]; st.Depth != 0 || st.Delivered != 3 || st.Failures != 0 || st.LastError != "" || st.Age != 0 {
			t.Errorf("afterwards: %+v", st)
		}
	})
	if left, _ := filepath.Glob(dir + "/mes/*.json"); len(left) > 0 {
		t.Errorf("left in the spool: %v", left)
	}
}

// A destination says when it wants to be asked again; another is not held up by it.
func TestLater(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		busy := &deliverer{answers: func(n int, _ hook.Event) error {
			if n == 1 {
				return fmt.Errorf("mes: %w", &hook.LaterError{After: 17 * time.Minute, Err: errors.New("429")})
			}
			return nil
		}}
		free := &deliverer{}
		s := open(t, hook.Config{Dir: dir, Destinations: []hook.Destination{{Name: "busy", To: busy}, {Name: "free", To: free}, {Name: "fails", Kinds: []string{"fail"}, To: free}}})
		enqueue(t, s, "a", "b")
		inBubble(t, s, func() {
			time.Sleep(16 * time.Minute)
			if len(busy.ids()) != 1 || !slices.Equal(free.ids(), []string{"a", "b"}) {
				t.Errorf("after 16 minutes: %v, %v", busy.asked, free.asked)
			}
			time.Sleep(2 * time.Minute)
		})
		if !slices.Equal(busy.asked, []string{"a", "a", "b"}) {
			t.Errorf("was asked %v", busy.asked)
		}
	})
}

// What is refused for good, is not an event, or waited too long is kept aside, and does not hold up the rest.
func TestDead(t *testing.T) {
	dir := t.TempDir()
	d := &deliverer{answers: func(_ int, e hook.Event) error {
		if strings.HasPrefix(e.ID, "bad") {
			return fmt.Errorf("400: %w", hook.ErrRefused)
		}
		return nil
	}}
	cfg := hook.Config{Dir: dir, Destinations: []hook.Destination{{Name: "mes", To: d}}, MaxAge: time.Hour, MaxDead: 3}
	synctest.Test(t, func(t *testing.T) {
		s, err := hook.Open(cfg)
		if err != nil {
			t.Fatal(err)
		}
		enqueue(t, s, "old")
		time.Sleep(61 * time.Minute)
		enqueue(t, s, "bad-1", "good", "broken", "long", "gone", "last")
		files, err := filepath.Glob(dir + "/mes/*.json")
		if err != nil || len(files) != 7 {
			t.Fatal(files, err)
		}
		for i, text := range map[int]string{3: "{", 4: strings.Repeat("x", 1<<20)} {
			if err := os.WriteFile(files[i], []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.Remove(files[5]); err != nil {
			t.Fatal(err)
		}
		inBubble(t, s, synctest.Wait)
		st := s.Status()[0]
		if !slices.Equal(d.asked, []string{"bad-1", "good", "last"}) || st.Refused != 3 || st.Expired != 1 || st.Dead != 3 || st.Depth != 0 || st.Delivered != 2 {
			t.Errorf("asked %v, %+v", d.asked, st)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	})
	// The three newest are there, also for the next process.
	dead, _ := filepath.Glob(dir + "/mes/dead/*.json")
	s := open(t, cfg)
	if st := s.Status()[0]; len(dead) != 3 || st.Dead != 3 {
		t.Errorf("%v, %+v", dead, st)
	}
	if e, err := os.ReadFile(dead[0]); err != nil || !strings.Contains(string(e), "SN-bad-1") {
		t.Errorf("%s, %v", e, err)
	}
}

func TestFull(t *testing.T) {
	dir := t.TempDir()
	d := &deliverer{}
	s := open(t, hook.Config{Dir: dir, MaxDepth: 3, Destinations: []hook.Destination{{Name: "mes", To: d}, {Name: "fails", To: d, Kinds: []string{"fail"}}}})
	enqueue(t, s, "a", "b", "c")
	err := s.Enqueue(hook.Event{Kind: "fail"})
	if !errors.Is(err, hook.ErrFull) || !strings.Contains(err.Error(), "telling mes") {
		t.Errorf("the fourth: %v", err)
	}
	st := s.Status()
	if !st[0].Full || st[0].Depth != 3 || st[1].Full || st[1].Depth != 1 {
		t.Errorf("%+v", st)
	}
	// Twice at a time would deliver twice.
	if _, err := hook.Open(hook.Config{Dir: dir}); !errors.Is(err, filelock.ErrLocked) {
		t.Errorf("a second process: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		s := open(t, hook.Config{Dir: dir, MaxDepth: 3, Destinations: []hook.Destination{{Name: "mes", To: d}}})
		inBubble(t, s, synctest.Wait)
		if !slices.Equal(d.asked, []string{"a", "b", "c"}) {
			t.Errorf("the next process delivers %v", d.asked)
		}
		enqueue(t, s, "d")
	})
}

// A disk without room refuses news, says so, and takes it again later. The disk is a small file system in memory.
func TestDiskFull(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		hsmtest.Require(t, "the right to mount a small file system: "+err.Error())
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	s, err := hook.Open(hook.Config{Dir: dir, Destinations: []hook.Destination{{Name: "mes", To: &deliverer{}}}})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	e, taken := hook.Event{Kind: "pass", Fields: map[string]string{"detail": strings.Repeat("x", 8000)}}, 0
	for err = nil; err == nil && taken < 100; taken++ {
		err = s.Enqueue(e)
	}
	if st := s.Status()[0]; !errors.Is(err, hook.ErrFull) || !st.Full || st.Depth != taken-1 {
		t.Fatalf("%+v, %v", st, err)
	}
	files, _ := filepath.Glob(dir + "/mes/*")
	if len(files) != taken { // the taken ones, and the folder "dead"
		t.Errorf("%d were taken, and there are %q", taken-1, files)
	}
	if err := os.Remove(files[0]); err != nil {
		t.Fatal(err)
	}
	if err := s.Enqueue(e); err != nil || s.Status()[0].Full {
		t.Errorf("with room again: %v", err)
	}
}

func TestEvents(t *testing.T) {
	s := open(t, hook.Config{Dir: t.TempDir(), Destinations: []hook.Destination{{Name: "mes", To: &deliverer{}}}})
	many := map[string]string{}
	for i := range 65 {
		many["f"+strconv.Itoa(i)] = ""
	}
	for _, e := range []hook.Event{
		{}, {Kind: "Pass"}, {Kind: "a b"}, {Kind: "pass", ID: "a/b"}, {Kind: "pass", ID: strings.Repeat("a", 65)}, {Kind: "pass", ID: "a\r\nHost: evil"},
		{Kind: "pass", Fields: map[string]string{"A": ""}}, {Kind: "pass", Fields: map[string]string{"": ""}}, {Kind: "pass", Fields: map[string]string{"a": "\xff"}},
		{Kind: "pass", Fields: many}, {Kind: "pass", Fields: map[string]string{"a": strings.Repeat("x", 1<<17)}}, {Kind: "pass", Time: time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC)},
	} {
		if err := s.Enqueue(e); err == nil || errors.Is(err, hook.ErrFull) {
			t.Errorf("%.80v: %v", e, err)
		}
	}
	if st := s.Status()[0]; st.Depth != 0 {
		t.Errorf("%+v", st)
	}
	for _, names := range [][]string{{"A"}, {""}, {"a/b"}, {".."}, {"a", "a"}, {"lock"}} {
		cfg := hook.Config{Dir: t.TempDir()}
		for _, n := range names {
			cfg.Destinations = append(cfg.Destinations, hook.Destination{Name: n, To: &deliverer{}})
		}
		if s, err := hook.Open(cfg); err == nil {
			t.Errorf("took destinations %q", names)
			_ = s.Close()
		} else if l, lockErr := filelock.Lock(filepath.Join(cfg.Dir, "lock")); lockErr != nil {
			t.Errorf("%q: the lock is kept: %v", names, lockErr)
		} else {
			_ = l.Close()
		}
	}
}

// What a crash left half written is not an event, and a file that is not ours is left alone.
func TestStrangers(t *testing.T) {
	dir := t.TempDir()
	mes := filepath.Join(dir, "mes")
	if err := os.MkdirAll(mes, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{".new-123", "README", "1-2.json", "99999999999999999999-0000000000000.json", "18446744073709551615-0000000000000.json", "0000000000000007-00000000000-1.json"} {
		if err := os.WriteFile(filepath.Join(mes, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("/etc/passwd", filepath.Join(mes, "0000000000000001-0000000000000.json")); err != nil {
		t.Fatal(err)
	}
	s := open(t, hook.Config{Dir: dir, Destinations: []hook.Destination{{Name: "mes", To: &deliverer{}}}})
	enqueue(t, s, "a")
	if st := s.Status()[0]; st.Depth != 1 {
		t.Errorf("%+v", st)
	}
	if _, err := os.Lstat(filepath.Join(mes, ".new-123")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what was half written: %v", err)
	}
	if all, _ := os.ReadDir(mes); len(all) != 8 { // five strangers, the link, "dead" and the event
		t.Errorf("%v", all)
	}
}

func FuzzEvent(f *testing.F) {
	for _, s := range []string{
		`{"id":"a1","kind":"pass","time":"2026-03-01T08:00:00Z","fields":{"serial":"SN1"}}`, `{"id":"a","kind":"fail","time":"2026-03-01T08:00:00.5Z","fields":{}}`,
		`{"id":"a","kind":"fail","time":"2026-03-01T08:00:00+01:00","fields":null}`, `{"id":"a","id":"b","kind":"x","time":"0001-01-01T00:00:00Z","fields":{"a":"\u003c"}}`, `{}`, "",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := hook.ParseEvent(b)
		if err != nil {
			return
		}
		again, err := json.Marshal(e)
		if err != nil || string(again) != string(b) || e.ID == "" || strings.ContainsAny(e.ID, "\r\n") || len(e.Fields) > 64 {
			t.Errorf("%q became %q: %v", b, again, err)
		}
		if e.Fields == nil || e.Time.Location() != time.UTC {
			t.Errorf("%q: more than one form is read", b)
		}
	})
}

func TestProgram(t *testing.T) {
	out := filepath.Join(t.TempDir(), "out")
	run := func(known []string, fields map[string]string, words ...string) error {
		t.Helper()
		c, err := fixture.Parse(words, fixture.Names{Known: append(hook.ProgramFields(), known...)})
		if err != nil {
			t.Fatal(err)
		}
		e := hook.Event{ID: "id-1", Kind: "fail", Time: time.Date(2026, 3, 1, 8, 0, 0, 0, time.UTC), Fields: fields}
		before := maps.Clone(fields)
		err = (&hook.Program{Command: c}).Deliver(t.Context(), e, []byte("{}"))
		if !maps.Equal(before, fields) {
			t.Errorf("the caller's fields became %v", fields)
		}
		return err
	}
	fields := map[string]string{"serial": "SN1", "code": "E-411", "out": out}
	if err := run([]string{"serial", "code", "out"}, fields, "sh", "-c", `(echo "$@"; cat) >$0`, "{out}", "{event-id}", "{kind}", "{time}", "{serial}", "{code}"); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(out); string(got) != "id-1 fail 2026-03-01T08:00:00Z SN1 E-411\n{}" {
		t.Errorf("%q, %v", got, err)
	}
	for words, refused := range map[string]bool{"sh -c {exit}": true, "false": false, "no-such-program": false, "echo {missing}": true, "echo {option}": true} {
		code := map[string]string{"exit": "exit 65", "option": "-n"}
		if err := run([]string{"exit", "missing", "option"}, code, strings.Fields(words)...); err == nil || errors.Is(err, hook.ErrRefused) != refused {
			t.Errorf("%s: %v", words, err)
		}
	}
}

// child is a station that tells of units as fast as it can, until it is killed. It says which were taken.
func child(dir string) {
	fail := func(err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	w, err := hook.NewWebhook(hook.WebhookConfig{URL: os.Getenv("HOOK_TEST_URL"), SecretFile: os.Getenv("HOOK_TEST_SECRET"), CAFile: os.Getenv("HOOK_TEST_CA")})
	fail(err)
	s, err := hook.Open(hook.Config{Dir: dir, Destinations: []hook.Destination{{Name: "mes", To: w}}, Backoff: func(int) time.Duration { return time.Millisecond }})
	fail(err)
	go func() { fail(s.Run(context.Background())) }()
	for n := 0; ; n++ {
		id := os.Getenv("HOOK_TEST_ROUND") + "-" + strconv.Itoa(n)
		fail(s.Enqueue(hook.Event{ID: id, Kind: "pass", Fields: map[string]string{"serial": id}}))
		_, err := fmt.Println(id) // not buffered
		fail(err)
	}
}

// Whatever a station was told is taken, it tells: killed at any instant, many times over, with a system that is busy now and then.
func TestKilled(t *testing.T) {
	mes := newMES(t, func(n int) int {
		if n%5 == 3 {
			return 503
		}
		return 200
	})
	dir := t.TempDir()
	var taken []string
	for round := range 8 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "HOOK_TEST_SPOOL="+dir, "HOOK_TEST_URL="+mes.cfg.URL, "HOOK_TEST_SECRET="+mes.cfg.SecretFile, "HOOK_TEST_CA="+mes.cfg.CAFile,
			"HOOK_TEST_ROUND="+strconv.Itoa(round))
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		for n := 0; lines.Scan(); n++ {
			taken = append(taken, lines.Text())
			if n == 20+13*round {
				if err := cmd.Process.Kill(); err != nil {
					t.Fatal(err)
				}
			}
		}
		_ = cmd.Wait()
		if lines.Err() != nil || !strings.Contains(cmd.ProcessState.String(), "killed") {
			t.Fatalf("%v, %v", cmd.ProcessState, lines.Err())
		}
	}
	w, err := hook.NewWebhook(mes.cfg)
	if err != nil {
		t.Fatal(err)
	}
	s := open(t, hook.Config{Dir: dir, Destinations: []hook.Destination{{Name: "mes", To: w}}, Backoff: func(int) time.Duration { return time.Millisecond }})
	t.Logf("%d events were taken in 8 lives, %d wait for the last", len(taken), s.Status()[0].Depth)
	enqueue(t, s, "end")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var wg sync.WaitGroup
	wg.Go(func() { _ = s.Run(ctx) })
	arrived := mes.until(ctx, t, "end")
	cancel()
	wg.Wait()
	first := map[string]int{}
	for i, id := range arrived {
		if _, again := first[id]; !again {
			first[id] = i
		}
	}
	last := -1
	for _, id := range taken {
		at, ok := first[id]
		if !ok {
			t.Errorf("%s was taken and never told", id)
		} else if at < last {
			t.Errorf("%s was told before an older one", id)
		}
		last = max(last, at)
	}
	if st := s.Status()[0]; st.Dead != 0 || st.Refused != 0 {
		t.Errorf("%+v", st)
	}
}
