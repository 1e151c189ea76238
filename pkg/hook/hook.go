// Package hook tells the factory's system what became of a unit, without ever holding the line.
//
// An [Event] is handed to [Spool.Enqueue], which returns once it is durable in a file for every [Destination] that wants it.
// [Spool.Run] delivers what waits, each destination by itself and in order: to a [Webhook] or a [Program]. What cannot be
// delivered is tried again, later each time; what a destination refuses for good, or what waited too long, is kept aside in a
// folder "dead". After a crash at any instant every event whose Enqueue returned is delivered at least once; it may be delivered
// twice, and has an ID by which a receiver knows.
//
// The directory has a folder per destination, with a file per event. A Spool holds its lock, so that one process at a time
// delivers. Its methods may be called by many goroutines. What waits is bounded in number, age and size: a full spool says
// [ErrFull], and [Spool.Status] shows how far behind a destination is.
package hook

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	mathrand "math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/touchmark/touchmark/internal/durable"
	"github.com/touchmark/touchmark/pkg/filelock"
)

// Errors that callers branch on.
var (
	// ErrFull says that an event was not taken because too many wait, or the disk is full.
	ErrFull = errors.New("spool is full")
	// ErrRefused says that a destination will never take an event.
	ErrRefused = errors.New("refused for good")
)

// A LaterError says that a destination does not want to be asked again before a time.
type LaterError struct {
	After time.Duration
	Err   error
}

// Error says why.
func (e *LaterError) Error() string { return e.Err.Error() }

// Unwrap returns why.
func (e *LaterError) Unwrap() error { return e.Err }

// An Event is what happened, as it is told: the file in the spool and the body of a webhook are its JSON.
type Event struct {
	// ID names the event for good: 1 to 64 letters, digits and "-". Enqueue makes one where it is empty.
	ID string `json:"id"`
	// Kind is "pass", "fail" or another word of lower-case letters, digits and "-".
	Kind string `json:"kind"`
	// Time is when it happened; Enqueue takes the present where it is zero.
	Time time.Time `json:"time"`
	// Fields say more: serial, registration-id, code… Names are of lower-case letters, digits and "-". Nothing in them may be
	// secret.
	Fields map[string]string `json:"fields"`
}

const (
	lower     = "abcdefghijklmnopqrstuvwxyz0123456789-"
	maxEvent  = 64 << 10 // as JSON
	maxFields = 64
	maxName   = 64
)

func isWord(s, alphabet string) bool {
	return s != "" && len(s) <= maxName && strings.Trim(s, alphabet) == ""
}

// encode returns the one way an event is written, and brings the event into the form that it is read back in.
func (e *Event) encode() ([]byte, error) {
	e.Time = e.Time.Round(0).UTC()
	if e.Fields == nil {
		e.Fields = map[string]string{}
	}
	if !isWord(e.ID, lower+strings.ToUpper(lower)) {
		return nil, fmt.Errorf("ID %.80q: want 1 to %d letters, digits and -", e.ID, maxName)
	}
	if !isWord(e.Kind, lower) {
		return nil, fmt.Errorf("kind %.80q: want 1 to %d lower-case letters, digits and -", e.Kind, maxName)
	}
	if len(e.Fields) > maxFields {
		return nil, fmt.Errorf("it has %d fields, at most %d are told", len(e.Fields), maxFields)
	}
	for k, v := range e.Fields {
		if !isWord(k, lower) || !utf8.ValidString(v) {
			return nil, fmt.Errorf("field %.80q: want a name of lower-case letters, digits and -, and a value in UTF-8", k)
		}
	}
	b, err := json.Marshal(e)
	if err == nil && len(b) > maxEvent {
		err = fmt.Errorf("it has %d octets, at most %d are told", len(b), maxEvent)
	}
	return b, err
}

// ParseEvent reads an event as a Spool writes it, and in no other form.
func ParseEvent(b []byte) (Event, error) {
	var e Event
	if len(b) > maxEvent {
		return e, fmt.Errorf("event is larger than %d octets", maxEvent)
	}
	if err := json.Unmarshal(b, &e); err != nil {
		return Event{}, errors.New("event is not JSON as it should be")
	}
	again, err := e.encode()
	if err != nil {
		return Event{}, fmt.Errorf("event: %w", err)
	}
	if !bytes.Equal(b, again) {
		return Event{}, errors.New("event is not written as touchmark writes it")
	}
	return e, nil
}

// A Deliverer takes events somewhere. Deliver returns nil once the event has arrived. An ErrRefused sets the event aside; any
// other error has it called again with the same event, not before a *[LaterError] says. The body is the event's JSON.
type Deliverer interface {
	Deliver(ctx context.Context, e Event, body []byte) error
}

// A Destination is somewhere that events go.
type Destination struct {
	// Name of its folder in the spool: lower-case letters, digits and "-".
	Name string
	// Kinds of events that it is told; none means all.
	Kinds []string
	// To is who delivers.
	To Deliverer
}

// Config says how a Spool works.
type Config struct {
	// Dir is the spool's directory; it is made if need be.
	Dir          string
	Destinations []Destination
	// MaxDepth is how many events may wait for a destination: 100,000 if 0.
	MaxDepth int
	// MaxAge is how long an event may wait before it is set aside, by the clock: 14 days if 0. What is set aside is not lost, so
	// that a clock that was wrong does no lasting harm.
	MaxAge time.Duration
	// MaxDead is how many events are kept aside for a destination, the newest: 10,000 if 0.
	MaxDead int
	// Backoff is how long to wait after so many failures in a row, from 1; nil doubles from a second to five minutes. Half of
	// it is left to chance.
	Backoff func(failures int) time.Duration
	// Now and Rand, a number from 0 to below 1, are for tests; nil means the real ones.
	Now  func() time.Time
	Rand func() float64
	// Log is told of failures; nil means nobody.
	Log *slog.Logger
}

// A Spool keeps events until they are delivered.
type Spool struct {
	cfg    Config
	lock   *os.File
	queues []*queue
}

// A queue is what waits for a destination.
type queue struct {
	Destination
	cfg  *Config
	dir  string
	wake chan struct{} // holds a value when something was added

	adding sync.Mutex // held while a file is written: files are in the order of their numbers
	next   uint64     // number of the next file; under adding

	mu      sync.Mutex
	waiting []item // oldest first
	dead    []item
	noRoom  bool   // the disk was full when an event last came
	counts  Status // its totals, Failures and LastError
}

// An item is a file of the spool. Its name has all that a queue needs to know, so that opening one reads no file.
type item struct {
	number uint64
	millis int64 // when it was added, since 1970
}

func (i item) name() string { return fmt.Sprintf("%016d-%013d.json", i.number, i.millis) }

func parseName(name string) (i item, ok bool) {
	_, err := fmt.Sscanf(name, "%d-%d.json", &i.number, &i.millis)
	return i, err == nil && i.name() == name && len(name) == len(item{}.name())
}

const deadDir = "dead"

// Open opens a spool, with what waited when it was last in use. The error is filelock.ErrLocked while another process has it.
func Open(cfg Config) (_ *Spool, err error) {
	cfg.MaxDepth = cmp.Or(cfg.MaxDepth, 100_000)
	cfg.MaxAge = cmp.Or(cfg.MaxAge, 14*24*time.Hour)
	cfg.MaxDead = cmp.Or(cfg.MaxDead, 10_000)
	if cfg.Backoff == nil {
		cfg.Backoff = func(failures int) time.Duration {
			return min(time.Second<<min(failures-1, 10), 5*time.Minute)
		}
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Rand == nil {
		cfg.Rand = mathrand.Float64
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	s := &Spool{cfg: cfg}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("opening the spool: %w", err)
	}
	if s.lock, err = filelock.Lock(filepath.Join(cfg.Dir, "lock")); err != nil {
		return nil, fmt.Errorf("opening the spool: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("opening the spool: %w", err), s.lock.Close())
		}
	}()
	for _, d := range cfg.Destinations {
		if !isWord(d.Name, lower) || slices.ContainsFunc(s.queues, func(q *queue) bool { return q.Name == d.Name }) {
			return nil, fmt.Errorf("destination %q: want names of lower-case letters, digits and -, each once", d.Name)
		}
		q := &queue{Destination: d, cfg: &s.cfg, dir: filepath.Join(cfg.Dir, d.Name), wake: make(chan struct{}, 1)}
		if err := os.MkdirAll(filepath.Join(q.dir, deadDir), 0o700); err != nil {
			return nil, err
		}
		for dir, items := range map[string]*[]item{q.dir: &q.waiting, filepath.Join(q.dir, deadDir): &q.dead} {
			if *items, err = list(dir); err != nil {
				return nil, err
			}
			if n := len(*items); n > 0 {
				q.next = max(q.next, (*items)[n-1].number+1)
			}
		}
		if err := durable.SyncDir(q.dir); err != nil {
			return nil, err
		}
		s.queues = append(s.queues, q)
	}
	entries, err := os.ReadDir(cfg.Dir)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if e.IsDir() && !slices.ContainsFunc(s.queues, func(q *queue) bool { return q.Name == e.Name() }) {
			cfg.Log.Warn("events may wait for a destination that is no longer there", "destination", e.Name(), "directory", cfg.Dir)
		}
	}
	return s, errors.Join(durable.SyncDir(cfg.Dir), durable.SyncDir(filepath.Dir(filepath.Clean(cfg.Dir))))
}

// list returns the files of a folder, oldest first, and removes what a crash left half written.
func list(dir string) ([]item, error) {
	entries, err := os.ReadDir(dir) // sorted
	if err != nil {
		return nil, err
	}
	var items []item
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), durable.Unfinished) {
			if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
				return nil, err
			}
		} else if i, ok := parseName(e.Name()); ok && e.Type().IsRegular() {
			items = append(items, i)
		}
	}
	slices.SortFunc(items, func(a, b item) int { return cmp.Compare(a.number, b.number) })
	return items, nil
}

// Close gives the lock back. Run must have returned.
func (s *Spool) Close() error { return filelock.Unlock(s.lock) }

// Enqueue takes an event for every destination that is told its kind. When it returns nil the event is durable. An error names
// the destinations that will not be told; with ErrFull there is no room, and the others are told all the same. Enqueuing the
// event again, under the same ID, is safe.
func (s *Spool) Enqueue(e Event) error {
	if e.ID == "" {
		var id [16]byte
		_, _ = rand.Read(id[:]) // never fails
		e.ID = hex.EncodeToString(id[:])
	}
	if e.Time.IsZero() {
		e.Time = s.cfg.Now()
	}
	b, err := e.encode()
	if err != nil {
		return fmt.Errorf("telling of event %s: %w", e.Kind, err)
	}
	for _, q := range s.queues {
		if len(q.Kinds) > 0 && !slices.Contains(q.Kinds, e.Kind) {
			continue
		}
		if addErr := q.add(b); addErr != nil {
			err = errors.Join(err, fmt.Errorf("telling %s of event %s: %w", q.Name, e.ID, addErr))
		}
	}
	return err
}

func (q *queue) add(b []byte) error {
	q.adding.Lock()
	defer q.adding.Unlock()
	q.mu.Lock()
	depth := len(q.waiting)
	q.mu.Unlock()
	if depth >= q.cfg.MaxDepth {
		return fmt.Errorf("%w: %d events wait", ErrFull, depth)
	}
	i := item{q.next, max(q.cfg.Now().UnixMilli(), 0)}
	q.next++ // also after an error: the name may be taken
	path := filepath.Join(q.dir, i.name())
	if err := durable.Replace(path, b, 0o600); err != nil {
		_ = os.Remove(path) // it may have got its name
		if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
			err = fmt.Errorf("%w: %w", ErrFull, err)
		}
		q.mu.Lock()
		q.noRoom = errors.Is(err, ErrFull)
		q.mu.Unlock()
		return err
	}
	q.mu.Lock()
	q.noRoom = false
	q.waiting = append(q.waiting, i)
	q.mu.Unlock()
	select {
	case q.wake <- struct{}{}:
	default:
	}
	return nil
}

// Status is how a destination stands. Totals count since the spool was opened.
type Status struct {
	Destination string
	// Depth is how many events wait, and Age how long the oldest has.
	Depth int
	Age   time.Duration
	// Full says that there is no room for the next event: as many wait as may, or the disk was full when the last one came.
	Full bool
	// Dead is how many events are kept aside.
	Dead int
	// Failures counts those in a row since an event was last delivered, and LastError says what the last one was.
	Failures  int
	LastError string

	Delivered, Refused, Expired uint64
}

// Status returns how every destination stands, in the order of the configuration.
func (s *Spool) Status() []Status {
	now, all := s.cfg.Now(), make([]Status, len(s.queues))
	for n, q := range s.queues {
		q.mu.Lock()
		all[n] = q.counts
		all[n].Destination, all[n].Depth, all[n].Dead, all[n].Full = q.Name, len(q.waiting), len(q.dead), q.noRoom || len(q.waiting) >= s.cfg.MaxDepth
		if len(q.waiting) > 0 {
			all[n].Age = max(0, now.Sub(time.UnixMilli(q.waiting[0].millis)))
		}
		q.mu.Unlock()
	}
	return all
}

// Run delivers what waits until the context ends, and returns nil once no delivery is under way. It is called once.
func (s *Spool) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	for _, q := range s.queues {
		wg.Go(func() { q.run(ctx) })
	}
	wg.Wait()
	return nil
}

func (q *queue) run(ctx context.Context) {
	for ctx.Err() == nil {
		q.mu.Lock()
		var first item
		some := len(q.waiting) > 0
		if some {
			first = q.waiting[0]
		}
		q.mu.Unlock()
		if !some {
			select {
			case <-q.wake:
			case <-ctx.Done():
			}
			continue
		}
		err := q.deliver(ctx, first)
		if ctx.Err() != nil {
			return // whatever became of it, it is tried again
		}
		if wait := q.settle(first, err); wait > 0 {
			timer := time.NewTimer(wait)
			select {
			case <-timer.C:
			case <-ctx.Done():
				timer.Stop()
			}
		}
	}
}

// errExpired sets an event aside that waited too long.
var errExpired = errors.New("waited too long")

func (q *queue) deliver(ctx context.Context, i item) error {
	if q.cfg.Now().Sub(time.UnixMilli(i.millis)) > q.cfg.MaxAge {
		return errExpired
	}
	b, err := durable.Read(filepath.Join(q.dir, i.name()), maxEvent)
	if errors.Is(err, durable.ErrTooLarge) {
		return fmt.Errorf("%w: %w", ErrRefused, err)
	} else if err != nil {
		return err
	}
	e, err := ParseEvent(b)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrRefused, err)
	}
	return q.To.Deliver(ctx, e, b)
}

// settle does what an attempt calls for, and returns how long to wait before the next.
func (q *queue) settle(i item, err error) time.Duration {
	path := filepath.Join(q.dir, i.name())
	refused, expired := errors.Is(err, ErrRefused), errors.Is(err, errExpired)
	var fileErr error
	switch {
	case err == nil:
		fileErr = os.Remove(path) // not flushed: a crash has it delivered again
	case errors.Is(err, fs.ErrNotExist) && !exists(path):
		// Somebody took it away.
	case refused || expired:
		fileErr = os.Rename(path, filepath.Join(q.dir, deadDir, i.name()))
	default:
		return q.failed(err)
	}
	if fileErr != nil && !errors.Is(fileErr, fs.ErrNotExist) {
		if err != nil {
			return q.failed(fileErr)
		}
		q.cfg.Log.Error("event is delivered and stays in the spool", "destination", q.Name, "error", fileErr)
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	q.waiting = q.waiting[1:]
	q.counts.Failures, q.counts.LastError = 0, ""
	if err == nil {
		q.counts.Delivered++
		return 0
	}
	q.cfg.Log.Error("event is not delivered", "destination", q.Name, "file", i.name(), "error", err)
	q.counts.LastError = err.Error()
	if refused {
		q.counts.Refused++
	} else if expired {
		q.counts.Expired++
	} else {
		return 0
	}
	for q.dead = append(q.dead, i); len(q.dead) > q.cfg.MaxDead; q.dead = q.dead[1:] {
		if err := os.Remove(filepath.Join(q.dir, deadDir, q.dead[0].name())); err != nil {
			q.cfg.Log.Error("removing an old event that was set aside", "destination", q.Name, "error", err)
		}
	}
	return 0
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return !errors.Is(err, fs.ErrNotExist)
}

func (q *queue) failed(err error) time.Duration {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.counts.Failures++
	q.counts.LastError = err.Error()
	wait := q.cfg.Backoff(q.counts.Failures)
	wait = wait/2 + time.Duration(q.cfg.Rand()*float64(wait/2))
	if later := (*LaterError)(nil); errors.As(err, &later) {
		wait = max(wait, later.After)
	}
	q.cfg.Log.Warn("event waits", "destination", q.Name, "failures", q.counts.Failures, "again", wait, "error", err)
	return max(wait, time.Millisecond) // never a busy loop
}
