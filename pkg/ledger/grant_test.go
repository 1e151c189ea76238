package ledger_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/ledger"
)

// counter is a counter of somebody else's, outside of every file.
type counter struct {
	mu sync.Mutex
	at uint64
}

var errMoved = errors.New("the counter stands elsewhere")

func (c *counter) Value(context.Context) (uint64, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.at, nil
}

func (c *counter) Increment(_ context.Context, from uint64) (uint64, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.at++
	if c.at != from+1 {
		return c.at, errMoved
	}
	return c.at, nil
}

func take(t *testing.T, line *line, led *ledger.Ledger, quantity int64) ledger.Grant {
	t.Helper()
	g, err := led.TakeGrant(t.Context(), ledger.Grant{ID: "PO-1", Document: []byte("signed"), Quantity: quantity,
		Opens: line.now, Ends: line.now.Add(24 * time.Hour)})
	if err != nil {
		t.Fatal(err)
	}
	return g
}

func end(t *testing.T, led *ledger.Ledger, state ledger.State, unit int64) {
	t.Helper()
	err := led.Commit(t.Context(), []ledger.Event{{State: state, Unit: unit, Data: ledger.Ending{Reason: "damaged", Operator: "mai"}.Encode()}})
	if err != nil {
		t.Fatal(err)
	}
}

func verify(t *testing.T, line *line, led *ledger.Ledger) ledger.Report {
	t.Helper()
	r, err := led.Verify(t.Context(), line.key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// Invariant 2: nothing is made beyond a grant, however its units come and go.
func TestGrant(t *testing.T) {
	line := newLine(t)
	led := line.open(t)
	grant := take(t, line, led, 5)
	job, _, err := led.BeginJob(t.Context(), ledger.Job{Digest: hash("job"), Profile: "p", Grant: grant.ID})
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	unit := func() ledger.Event {
		n++
		s := fmt.Sprintf("SN%d", n)
		return ledger.Event{State: ledger.Begun, Job: job.ID, Serial: s, RegistrationID: s, KeyHash: hash(s)}
	}
	begin := func(n int) ([]ledger.Event, error) {
		events := make([]ledger.Event, n)
		for i := range events {
			events[i] = unit()
		}
		return events, led.Commit(t.Context(), events)
	}
	refused := func(k int, why error) {
		t.Helper()
		var ge *ledger.GrantError
		if _, err := begin(k); !errors.Is(err, why) || !errors.As(err, &ge) {
			t.Fatalf("%d more: %v, want %v", k, err, why)
		}
		n -= k
	}
	spent := func(want, leased int64) {
		t.Helper()
		if g, err := led.Grant(t.Context(), grant.ID); err != nil || g.Spent != want || g.Leased != leased {
			t.Fatalf("%d spent and %d leased, want %d and %d (%v)", g.Spent, g.Leased, want, leased, err)
		}
	}
	refused(6, ledger.ErrSpent)
	spent(0, 0)
	first, err := begin(4)
	if err != nil {
		t.Fatal(err)
	}
	refused(2, ledger.ErrSpent)
	spent(4, 0)
	end(t, led, ledger.Voided, first[0].Unit) // nothing was signed
	spent(3, 0)
	step(t, led, ledger.Minted, first[1:], "cert")
	end(t, led, ledger.Voided, first[1].Unit) // something was
	spent(3, 0)
	end(t, led, ledger.Scrapped, first[2].Unit)
	spent(3, 0)
	end(t, led, ledger.Returned, first[2].Unit)
	spent(2, 0)
	if err := led.Commit(t.Context(), []ledger.Event{{State: ledger.Returned, Unit: first[2].Unit}}); err == nil {
		t.Error("a unit was returned twice")
	}
	end(t, led, ledger.Reworked, first[3].Unit)
	spent(2, 0) // its next revision has its place
	for i, c := range []struct {
		serial   string
		revision int64
	}{{"SN1", 0}, {"SN3", 1}, {"SN4", 1}} {
		e := []ledger.Event{{State: ledger.Begun, Job: job.ID, Serial: c.serial, RegistrationID: c.serial, KeyHash: hash(fmt.Sprint("again", i))}}
		if err := led.Commit(t.Context(), e); err != nil || e[0].Revision != c.revision {
			t.Fatalf("%s: revision %d, %v", c.serial, e[0].Revision, err)
		}
		u, err := led.Find(t.Context(), c.serial)
		if err != nil || u.Revision != c.revision {
			t.Errorf("%s: %+v, %v", c.serial, u, err)
		}
	}
	spent(4, 0)
	lease := ledger.Lease{ID: "L", Grant: grant.ID, Document: []byte("lease"), Quantity: 2}
	if err := led.CutLease(t.Context(), lease); !errors.Is(err, ledger.ErrSpent) {
		t.Errorf("a lease of two out of one: %v", err)
	}
	lease.Quantity = 1
	for range 2 {
		if err := led.CutLease(t.Context(), lease); err != nil {
			t.Fatal(err)
		}
	}
	spent(4, 1)
	refused(1, ledger.ErrSpent)
	other := lease
	other.Document = []byte("another")
	if err := led.CutLease(t.Context(), other); !errors.Is(err, ledger.ErrOtherGrant) {
		t.Errorf("one lease ID, two contents: %v", err)
	}
	if err := led.ReturnLease(t.Context(), "L", 2, []byte("r")); err == nil {
		t.Error("a lease made more than it had")
	}
	for range 2 {
		if err := led.ReturnLease(t.Context(), "L", 0, []byte("receipt")); err != nil {
			t.Fatal(err)
		}
	}
	if err := led.ReturnLease(t.Context(), "L", 1, []byte("receipt")); err == nil {
		t.Error("a lease was returned twice, differently")
	}
	spent(4, 0)
	verify(t, line, led)

	// A scrapped serial is not made again.
	second, err := led.Find(t.Context(), "SN3")
	if err != nil {
		t.Fatal(err)
	}
	end(t, led, ledger.Scrapped, second.ID)
	u := []ledger.Event{{State: ledger.Begun, Job: job.ID, Serial: "SN3", RegistrationID: "SN3", KeyHash: hash("fresh")}}
	if err := led.Commit(t.Context(), u); !errors.Is(err, ledger.ErrScrapped) {
		t.Errorf("a scrapped serial: %v", err)
	}
	// Time, by the journal.
	start := line.now
	line.now = start.Add(24 * time.Hour)
	refused(1, ledger.ErrExpired)
	late, err := led.TakeGrant(t.Context(), ledger.Grant{ID: "PO-2", Document: []byte("late"), Quantity: 1, Opens: line.now.Add(time.Hour), Ends: line.now.Add(2 * time.Hour)})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := led.CheckGrant(t.Context(), late.ID, 1); !errors.Is(err, ledger.ErrNotOpen) {
		t.Errorf("early: %v", err)
	}
	line.now = line.now.Add(time.Hour)
	if _, err := led.CheckGrant(t.Context(), late.ID, 1); err != nil {
		t.Error(err)
	}
	if err := led.CloseGrant(t.Context(), late.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := led.CheckGrant(t.Context(), late.ID, 1); !errors.Is(err, ledger.ErrClosed) {
		t.Errorf("closed: %v", err)
	}
	if _, err := led.TakeGrant(t.Context(), ledger.Grant{ID: "PO-2", Document: []byte("replayed"), Quantity: 100, Opens: start, Ends: line.now.Add(time.Hour)}); !errors.Is(err, ledger.ErrOtherGrant) {
		t.Errorf("a grant with more in it under the same ID: %v", err)
	}
	var reasons []string
	for r, err := range led.Retired(t.Context(), "") {
		if err != nil {
			t.Fatal(err)
		}
		reasons = append(reasons, fmt.Sprint(r.Serial, " ", r.State, " ", r.Was, " ", r.Ending.Operator, " ", r.Ended.Equal(start)))
	}
	if got, want := fmt.Sprint(reasons), "[SN1 voided begun mai true SN2 voided minted mai true SN3 returned minted mai true SN4 reworked minted mai true SN3 scrapped begun mai true]"; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	r := verify(t, line, led)
	if r.Units != 2 || r.Voided != 2 || r.Scrapped != 1 || r.Reworked != 1 || r.Returned != 1 || r.Grants != 2 || r.Leases != 1 {
		t.Errorf("%+v", r)
	}
}

// Invariant 2, with a copied ledger: only one of two copies goes on, and one from a backup does not open.
func TestAnchor(t *testing.T) {
	line := newLine(t)
	led := line.open(t)
	c := &counter{at: 41}
	if err := led.Anchor(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	if err := led.Anchor(t.Context(), c); !errors.Is(err, ledger.ErrAnchor) {
		t.Errorf("anchored twice: %v", err)
	}
	if err := led.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := ledger.Open(t.Context(), line.cfg); !errors.Is(err, ledger.ErrAnchor) {
		t.Errorf("opened without its counter: %v", err)
	}
	line.cfg.Anchor = c
	led = line.open(t)
	job, events := begin(t, led, 3)
	if c.at != 42 {
		t.Errorf("the counter is %d after a step", c.at)
	}
	if err := led.Close(); err != nil {
		t.Fatal(err)
	}
	backup, err := os.ReadFile(line.cfg.Path)
	if err != nil {
		t.Fatal(err)
	}
	led = line.open(t)
	step(t, led, ledger.Minted, events, "cert") // makes nothing new, and does not move the counter
	next := []ledger.Event{{State: ledger.Begun, Job: job.ID, Serial: "next", RegistrationID: "next"}}
	if err := led.Commit(t.Context(), next); err != nil {
		t.Fatal(err)
	}
	verify(t, line, led)

	// A copy of yesterday's, beside the one that went on.
	copied := line.cfg
	copied.Path += ".copy"
	if err := os.WriteFile(copied.Path, backup, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ledger.Open(t.Context(), copied); !errors.Is(err, ledger.ErrRolledBack) {
		t.Errorf("a ledger from a backup: %v", err)
	}
	// Two copies of today's, both open before either goes on: one at most does.
	if err := led.Close(); err != nil {
		t.Fatal(err)
	}
	today, err := os.ReadFile(line.cfg.Path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(copied.Path, today, 0o600); err != nil {
		t.Fatal(err)
	}
	led = line.open(t)
	twin, err := ledger.Open(t.Context(), copied)
	if err != nil {
		t.Fatal(err)
	}
	defer twin.Close()
	went := 0
	for i, l := range []*ledger.Ledger{led, twin, led, twin} {
		s := fmt.Sprint("twin", i)
		if err := l.Commit(t.Context(), []ledger.Event{{State: ledger.Begun, Job: job.ID, Serial: s, RegistrationID: s}}); err == nil {
			went++
		} else if i > 0 && !errors.Is(err, ledger.ErrAnchor) {
			t.Errorf("twin: %v", err)
		}
	}
	if went != 1 {
		t.Errorf("%d steps were taken on two copies", went)
	}

	// Killed between the commit and the counter: the next start makes it good.
	behind := newLine(t)
	led = behind.open(t)
	c = &counter{at: 7}
	if err := led.Anchor(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	_ = led.Close()
	behind.cfg.Anchor = c
	led = behind.open(t)
	begin(t, led, 1)
	_ = led.Close()
	c.at--
	led = behind.open(t)
	if c.at != 8 {
		t.Errorf("the counter is %d", c.at)
	}
	_ = led.Close()
	c.at -= 3
	if _, err := ledger.Open(t.Context(), behind.cfg); !errors.Is(err, ledger.ErrAnchor) || errors.Is(err, ledger.ErrRolledBack) {
		t.Errorf("another ledger's counter: %v", err)
	}
}

func TestNotes(t *testing.T) {
	line := newLine(t)
	led := line.open(t)
	_, events := begin(t, led, 2)
	for i := range 3 {
		n, err := led.AddNote(t.Context(), ledger.Note{Unit: events[1].Unit, Kind: "reprint", Data: []byte{byte(i)}})
		if err != nil || n != int64(i)+1 {
			t.Fatal(n, err)
		}
	}
	if _, err := led.AddNote(t.Context(), ledger.Note{Kind: "shift"}); err != nil {
		t.Fatal(err)
	}
	notes, err := led.Notes(t.Context(), events[1].Unit, "")
	if err != nil || len(notes) != 3 || !bytes.Equal(notes[2].Data, []byte{2}) || !notes[0].At.Equal(line.now) {
		t.Errorf("%+v, %v", notes, err)
	}
	if r := verify(t, line, led); r.Notes != 4 {
		t.Errorf("%+v", r)
	}
}

// marked is a counter that keeps marks, and whose token may be pulled.
type marked struct {
	counter
	mark   string
	pulled bool
}

func (m *marked) Mark(context.Context) (string, error) { return m.mark, nil }

func (m *marked) IncrementMarked(ctx context.Context, from uint64, mark string) (uint64, error) {
	if m.pulled {
		return 0, errors.New("token pulled")
	}
	at, err := m.Increment(ctx, from)
	if err == nil {
		m.mark = mark
	}
	return at, err
}

// anchoredLine is a line whose ledger is tied to a counter, with a grant of ten.
func anchoredLine(t *testing.T, c ledger.Counter) (*line, ledger.Job) {
	t.Helper()
	l := newLine(t)
	led := l.open(t)
	if err := led.Anchor(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	_ = led.Close()
	l.cfg.Anchor = c
	led = l.open(t)
	g := take(t, l, led, 10)
	job, _, err := led.BeginJob(t.Context(), ledger.Job{Digest: hash("job"), Profile: "p", Grant: g.ID})
	if err != nil {
		t.Fatal(err)
	}
	_ = led.Close()
	return l, job
}

// copied returns the configuration of a copy of the line's ledger as it is now, closed.
func (l *line) copied(t *testing.T) ledger.Config {
	t.Helper()
	b, err := os.ReadFile(l.cfg.Path)
	if err != nil {
		t.Fatal(err)
	}
	twin := l.cfg
	twin.Path += ".copy"
	if err := os.WriteFile(twin.Path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return twin
}

// A grant that was closed, its return signed, is not opened again by a ledger from before.
func TestClosedStaysClosed(t *testing.T) {
	l, job := anchoredLine(t, &counter{at: 5})
	led := l.open(t)
	if err := led.Commit(t.Context(), made(job, 3)); err != nil {
		t.Fatal(err)
	}
	_ = led.Close()
	twin := l.copied(t)
	led = l.open(t)
	if err := led.CloseGrant(t.Context(), "PO-1"); err != nil {
		t.Fatal(err)
	}
	if _, err := ledger.Open(t.Context(), twin); !errors.Is(err, ledger.ErrRolledBack) {
		t.Errorf("a ledger from before the grant was closed: %v", err)
	}
}

// Two copies that each took a step, while the counter was moved for one of them only.
func TestForkAtTheCounter(t *testing.T) {
	c := &marked{counter: counter{at: 5}}
	l, job := anchoredLine(t, c)
	twin := l.copied(t)
	led := l.open(t)
	c.pulled = true
	if err := led.Commit(t.Context(), made(job, 10)); !errors.Is(err, ledger.ErrAnchor) {
		t.Fatalf("a step without its counter: %v", err)
	}
	_ = led.Close()
	c.pulled = false
	other, err := ledger.Open(t.Context(), twin)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	fresh := made(job, 10)
	for i := range fresh {
		fresh[i].KeyHash = hash(fmt.Sprint("other", i))
	}
	if err := other.Commit(t.Context(), fresh); err != nil {
		t.Fatal(err)
	}
	if _, err := ledger.Open(t.Context(), l.cfg); !errors.Is(err, ledger.ErrRolledBack) {
		t.Errorf("both of two copies go on: %v", err)
	}
	// Where nobody else went on, a step whose counter was not moved is made good.
	c = &marked{counter: counter{at: 5}}
	l, job = anchoredLine(t, c)
	led = l.open(t)
	c.pulled = true
	_ = led.Commit(t.Context(), made(job, 1))
	_ = led.Close()
	c.pulled = false
	led = l.open(t)
	if err := led.Commit(t.Context(), []ledger.Event{{State: ledger.Begun, Job: job.ID, Serial: "next", RegistrationID: "next"}}); err != nil {
		t.Error(err)
	}
}

// What another program wrote as the reason of an ending is told, and holds nothing up.
func TestForeignEnding(t *testing.T) {
	l := newLine(t)
	led := l.open(t)
	_, events := begin(t, led, 1)
	if err := led.Commit(t.Context(), []ledger.Event{{State: ledger.Voided, Unit: events[0].Unit, Data: []byte("lost")}}); err != nil {
		t.Fatal(err)
	}
	for u, err := range led.Retired(t.Context(), "") {
		if err != nil || u.Ending.Note != "lost" {
			t.Errorf("%+v, %v", u, err)
		}
	}
}
