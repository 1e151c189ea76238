package station

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/pkg/hook"
	"github.com/touchmark/touchmark/pkg/label"
	"github.com/touchmark/touchmark/pkg/ledger"
	"github.com/touchmark/touchmark/pkg/mint"
	"github.com/touchmark/touchmark/pkg/order"
	"github.com/touchmark/touchmark/pkg/yield"
)

// Work is what a station makes units with: a line opened for work, and a shift begun on it. It is opened anew when the token or
// the ledger went away under it.
type Work struct {
	Run    *mint.Run
	Ledger *ledger.Ledger
	// Grant is the order or lease that is worked on; empty without one.
	Grant string
	// Leased are serials of the order that other stations have on leases.
	Leased []order.Serials
	// Retire ends a unit; see mint.Retire.
	Retire func(ctx context.Context, serial string, state ledger.State, why ledger.Ending) error
	// Refuse writes down an attempt to make what the order does not allow.
	Refuse func(ctx context.Context, serial string, why error)
	Close  func() error
}

// Setup is what a station needs besides its configuration.
type Setup struct {
	// Name of the station, Product and Order for the screen.
	Name, Product, Order string
	// Operator works where no badge is asked for.
	Operator string
	// Open opens the line for a shift of an operator. It is called again, with the same shift, when the line has to be opened anew.
	Open func(ctx context.Context, shift, operator string) (*Work, error)
	// Out is the directory that stamps go to.
	Out string
	// Label is the template of the label; nil where none is printed.
	Label *label.Template
	// Register tries an identity against a service, from the directory of its stamp; nil where the configuration does not ask for it.
	Register func(ctx context.Context, dir string) error
	// Spool is told of verdicts; nil tells nobody.
	Spool *hook.Spool
	// DryRun does everything that can be undone: no identity is made, nothing is flashed, printed or sealed.
	DryRun bool
	// Retry is how long to wait before what is away is asked for again; two seconds by default.
	Retry time.Duration
	// Now tells the time; nil means time.Now.
	Now func() time.Time
}

// A Station makes units. Its methods may be called by many goroutines.
type Station struct {
	cfg    *Config
	setup  Setup
	steps  []Step
	tally  *yield.Tally
	notify func()

	workMu sync.RWMutex // held for reading while the line is worked with, for writing while it is opened
	work   *Work
	gen    int // counts openings
	shift  string

	mu       sync.Mutex
	operator string
	heads    []*headState
	inWork   map[string]int // head by serial
	tries    map[string]int // failures by serial, in this shift
	standing map[string]yield.Standing
	last     []Verdict
	reprints int64
	lamps    map[Code]map[string]string

	watchers    map[int]func([]Head)
	nextWatcher int
}

type headState struct {
	Head
	scans chan string // what was scanned while it asks for its label
}

// New makes a station. A shift is begun by [Station.Begin].
func New(cfg *Config, setup Setup) *Station {
	if setup.Now == nil {
		setup.Now = time.Now
	}
	if setup.Retry == 0 {
		setup.Retry = 2 * time.Second
	}
	s := &Station{cfg: cfg, setup: setup, steps: cfg.Steps(), operator: setup.Operator, notify: func() {},
		inWork: make(map[string]int), tries: make(map[string]int), standing: make(map[string]yield.Standing), lamps: make(map[Code]map[string]string)}
	for i := range cfg.heads {
		s.heads = append(s.heads, &headState{Head: Head{Number: i + 1, State: HeadIdle}, scans: make(chan string, 1)})
	}
	s.tally = yield.New(yield.Config{Now: setup.Now, Station: setup.Name, Order: setup.Order, Product: setup.Product})
	return s
}

// Tally returns what counts the shift.
func (s *Station) Tally() *yield.Tally { return s.tally }

// Begin opens the line for a shift of an operator.
func (s *Station) Begin(ctx context.Context, operator string) error {
	s.mu.Lock()
	s.operator = operator
	s.mu.Unlock()
	s.workMu.Lock()
	defer s.workMu.Unlock()
	if s.work != nil {
		return nil
	}
	if s.shift == "" {
		s.shift = fmt.Sprintf("%s %s", s.setup.Name, s.setup.Now().UTC().Format(time.RFC3339Nano))
	}
	return s.open(ctx)
}

// open is called with workMu held for writing.
func (s *Station) open(ctx context.Context) error {
	w, err := s.setup.Open(ctx, s.shift, s.operatorName())
	if err != nil {
		return err
	}
	if s.transit() && !s.setup.DryRun {
		if err := w.Run.Tidy(ctx); err != nil {
			return errors.Join(err, w.Close())
		}
	}
	s.work, s.gen = w, s.gen+1
	s.countLeft(ctx, w)
	return nil
}

// transit reports whether stamps are at the station only until their devices have them.
func (s *Station) transit() bool { return s.cfg.flash != nil && !s.cfg.KeepStamps }

func (s *Station) operatorName() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.operator
}

// Close ends the shift. Units in work must have ended.
func (s *Station) Close() error {
	s.workMu.Lock()
	defer s.workMu.Unlock()
	if s.work == nil {
		return nil
	}
	err := s.work.Close()
	s.work = nil
	return err
}

// lost reports whether the line has to be opened anew: the unit is not at fault.
func lost(err error) bool {
	return errors.Is(err, hsm.ErrLost) || errors.Is(err, ledger.ErrBroken)
}

// with calls f with the line. When the line goes away it is opened anew, and f is called again: f finds out by the ledger what it did
// already. A head waits for that as long as it takes; without a head it is tried once. A ledger that breaks twice, or for want of
// room, is opened anew for whoever comes next.
func (s *Station) with(ctx context.Context, h *headState, f func(w *Work, gen int) error) error {
	for broke := false; ; broke = true {
		gen, err := s.try(f)
		if !lost(err) {
			return err
		}
		if rerr := s.reopen(ctx, h, gen, err); rerr != nil {
			return rerr
		}
		if errors.Is(err, ledger.ErrBroken) && (broke || errors.Is(err, ledger.ErrFull)) {
			return err
		}
	}
}

func (s *Station) try(f func(w *Work, gen int) error) (int, error) {
	s.workMu.RLock()
	defer s.workMu.RUnlock()
	if s.work == nil {
		return s.gen, fmt.Errorf("the line is not open: %w", hsm.ErrLost)
	}
	return s.gen, f(s.work, s.gen)
}

func (s *Station) reopen(ctx context.Context, h *headState, gen int, why error) error {
	if h != nil {
		s.setHead(h, func(v *Head) { v.State, v.Waiting = HeadWaiting, codeOf(StepMint, why) })
		defer s.setHead(h, func(v *Head) { v.State, v.Waiting = HeadWorking, "" })
	}
	for {
		err := func() error {
			s.workMu.Lock()
			defer s.workMu.Unlock()
			if s.gen != gen && s.work != nil {
				return nil // somebody else did
			}
			if s.work != nil {
				_ = s.work.Close() // it is gone already
				s.work = nil
			}
			return s.open(ctx)
		}()
		if err == nil {
			return nil
		}
		if h == nil || !lost(err) && !errors.Is(err, hsm.ErrNotFound) {
			return err
		}
		if err := s.retry(ctx, h, why); err != nil {
			return err
		}
	}
}

// retry waits before what is away is asked for again. It returns why when the unit was given up meanwhile.
func (s *Station) retry(ctx context.Context, h *headState, why error) error {
	select {
	case <-time.After(s.setup.Retry):
		return nil
	case <-h.scans:
		return why
	case <-ctx.Done():
		return errors.Join(ctx.Err(), why)
	}
}

func (s *Station) setHead(h *headState, edit func(*Head)) {
	s.mu.Lock()
	edit(&h.Head)
	heads := s.headsLocked()
	for _, f := range s.watchers {
		f(heads)
	}
	s.mu.Unlock()
	s.notify()
}

func (s *Station) setLamp(code Code, on bool, fields map[string]string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if on {
		s.lamps[code] = fields
	} else {
		delete(s.lamps, code)
	}
}

// countLeft finds out what the order has left.
func (s *Station) countLeft(ctx context.Context, w *Work) {
	if w.Grant == "" {
		return
	}
	g, err := w.Ledger.GrantCounts(ctx, w.Grant)
	if err != nil {
		return
	}
	left := g.Left()
	s.tally.SetLeft(left)
	s.setLamp(LampQuota, left < s.cfg.WarnLeft, map[string]string{"left": strconv.FormatInt(left, 10)})
	s.setLamp(LampExpiry, g.Ends.Sub(s.setup.Now()) < 24*time.Hour, map[string]string{"until": g.Ends.Format("2006-01-02 15:04")})
	if anchored, err := w.Ledger.Anchored(ctx); err == nil {
		s.setLamp(LampAnchor, !anchored, nil)
	}
}

// WithRun calls f with the shift that is open.
func (s *Station) WithRun(f func(*mint.Run) error) error {
	_, err := s.try(func(w *Work, _ int) error { return f(w.Run) })
	return err
}

// freeHead takes a head for a serial: the one of that number, or with 0 the one where the unit was last, as its board may still be
// there, or the first that is free. The reason why not is a code.
func (s *Station) freeHead(number int, serial string) (*headState, *Verdict) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n, busy := s.inWork[serial]; busy {
		return nil, &Verdict{Serial: serial, Head: n, Code: CodeInWork, Fields: map[string]string{"serial": serial, "head": strconv.Itoa(n)}}
	}
	free := func(h *headState) bool {
		return (h.State == HeadIdle || h.State == HeadPassed || h.State == HeadFailed) && (number == 0 || number == h.Number)
	}
	heads := slices.Clone(s.heads)
	slices.SortStableFunc(heads, func(a, b *headState) int {
		if (a.Serial == serial) == (b.Serial == serial) {
			return 0
		}
		if a.Serial == serial {
			return -1
		}
		return 1
	})
	for _, h := range heads {
		if free(h) {
			for _, old := range heads {
				if old.Serial == serial {
					old.Head = Head{Number: old.Number, State: HeadIdle} // what it shows is over
				}
			}
			s.inWork[serial] = h.Number
			select {
			case <-h.scans: // meant for the last unit
			default:
			}
			now := s.setup.Now()
			h.Head = Head{Number: h.Number, State: HeadWorking, Serial: serial, Started: now, Stepped: now, Of: len(s.steps)}
			return h, nil
		}
	}
	return nil, &Verdict{Serial: serial, Head: number, Code: CodeBusy}
}

// Heads returns the heads as they are now.
func (s *Station) Heads() []Head {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.headsLocked()
}

func (s *Station) headsLocked() []Head {
	out := make([]Head, len(s.heads))
	for i, h := range s.heads {
		out[i] = h.Head
	}
	return out
}

// Counts returns the numbers of the shift.
func (s *Station) Counts() Counts {
	r := s.tally.Report()
	s.mu.Lock()
	defer s.mu.Unlock()
	return Counts{Passed: r.Passed, Failed: r.Failed, Reworked: r.Reworked, Scrapped: r.Scrapped, Reprinted: s.reprints,
		FirstPass: r.FirstPasses, FirstTried: r.FirstTries, PerHour: r.PerHour, Left: r.Left}
}

// Busy reports whether a head is at work.
func (s *Station) Busy() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.inWork) > 0
}

// decide writes down a verdict: for the screen, the numbers, and whoever wants to be told. A unit that was stopped on its way has
// none, and what never came onto a head says nothing about a unit.
func (s *Station) decide(h *headState, v Verdict, steps []yield.Step) Verdict {
	now := s.setup.Now()
	v.At, v.DryRun = now.UTC().Truncate(time.Second), s.setup.DryRun
	if h == nil {
		return v
	}
	s.mu.Lock()
	operator := s.operator
	v.Head, v.Seconds = h.Number, now.Sub(h.Started).Round(10*time.Millisecond).Seconds()
	delete(s.inWork, v.Serial)
	if v.Stopped() {
		h.Head = Head{Number: h.Number, State: HeadIdle}
		s.mu.Unlock()
		return v
	}
	h.State, h.Waiting = HeadPassed, ""
	if !v.Pass {
		h.State = HeadFailed
	}
	shown := v
	h.Verdict = &shown
	if countable(v.Code) && !s.setup.DryRun {
		s.tally.Try(yield.Try{Was: s.standing[v.Serial], Pass: v.Pass, Code: string(v.Code), Steps: steps})
		s.standing[v.Serial] = yield.Failed
		s.tries[v.Serial]++
		if v.Pass {
			s.standing[v.Serial] = yield.Passed
			delete(s.tries, v.Serial)
		}
	}
	s.last = append([]Verdict{v}, s.last[:min(len(s.last), 9)]...)
	s.mu.Unlock()
	s.tell(v, operator)
	s.notify()
	return v
}

// countable reports whether a verdict says something about the making of a unit, and not only that it was scanned wrongly, or that
// somebody did not wait for the printer.
func countable(c Code) bool { return c == "" || c >= "E-4" && c != CodePaper || c == CodeProduct }

// EventFields are the fields of the events that a station tells of a verdict; which are empty depends on the verdict.
var EventFields = []string{"serial", "registration-id", "revision", "code", "step", "head", "seconds", "operator", "station", "order"}

func (s *Station) tell(v Verdict, operator string) {
	kind := "fail"
	if v.Pass {
		kind = "pass"
	}
	s.event(kind, map[string]string{
		"serial": v.Serial, "registration-id": v.RegistrationID, "code": string(v.Code), "step": string(v.Step), "head": strconv.Itoa(v.Head),
		"seconds": strconv.FormatFloat(v.Seconds, 'f', 2, 64), "operator": operator, "station": s.setup.Name, "order": s.setup.Order,
		"revision": strconv.Itoa(v.Revision),
	})
}

func (s *Station) event(kind string, fields map[string]string) {
	if s.setup.Spool == nil || s.setup.DryRun {
		return
	}
	err := s.setup.Spool.Enqueue(hook.Event{Kind: kind, Fields: fields})
	depth, dead := 0, 0
	for _, st := range s.setup.Spool.Status() {
		depth, dead = depth+st.Depth, dead+st.Dead
	}
	s.setLamp(LampHooks, err != nil || depth > 100 || dead > 0, map[string]string{"depth": strconv.Itoa(depth + dead)})
}
