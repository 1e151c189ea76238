package station

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/touchmark/touchmark/pkg/ledger"
)

// A Request is what a machine asks of a station: one JSON object a line.
type Request struct {
	// ID comes back with every answer to the request.
	ID string `json:"id"`
	// Op is "make" (which waits for a head where none is free), "wait" (what follows is held until the units asked for before have their
	// verdicts, but for scan and cancel),
	// "scan" (a label, for the head that asks for it), "rework", "scrap", "cancel" (a head that waits for its printer or its label gives
	// up), "reprint", "status" or "end".
	Op     string `json:"op"`
	Serial string `json:"serial"`
	// Head is the head's number; 0 takes the first that is free.
	Head int `json:"head"`
	// Fields are columns of the unit.
	Fields map[string]string `json:"fields"`
	// Text is what was scanned.
	Text   string `json:"text"`
	Reason string `json:"reason"`
}

// An Answer is what a station says: one JSON object a line. A "make" has one with each step, and one with its verdict.
type Answer struct {
	ID      string    `json:"id,omitempty"`
	Event   string    `json:"event"` // "step", "verdict", "done", "status", "error"
	Head    int       `json:"head,omitempty"`
	Serial  string    `json:"serial,omitempty"`
	Step    Step      `json:"step,omitempty"`
	Index   int       `json:"index,omitempty"`
	Of      int       `json:"of,omitempty"`
	State   HeadState `json:"state,omitempty"`
	Waiting Code      `json:"waiting,omitempty"`
	Verdict *Verdict  `json:"verdict,omitempty"`
	Copies  int64     `json:"copies,omitempty"`
	Heads   []Head    `json:"heads,omitempty"`
	Counts  *Counts   `json:"counts,omitempty"`
	Code    Code      `json:"code,omitempty"`
	Error   string    `json:"error,omitempty"`
}

const (
	maxRequest = 64 << 10
	maxQueue   = 1000 // units that wait for a head
)

// Serve answers requests until the input ends or an "end" comes; units in work then come to their verdicts first. When the context
// is over they are stopped where they are, to be taken up later.
// The shift must have begun. Several may serve one station at once; each is told of its own requests, and of the steps of all heads.
func (s *Station) Serve(ctx context.Context, in io.Reader, out io.Writer) error {
	c := &conversation{s: s, answers: make(chan Answer, 256), shown: make([]Head, len(s.heads))}
	var writer sync.WaitGroup
	writer.Add(1)
	go func() {
		defer writer.Done()
		enc := json.NewEncoder(out)
		for a := range c.answers {
			_ = enc.Encode(a) // who does not listen any more is told nothing; the unit goes on
		}
	}()
	defer writer.Wait()
	defer close(c.answers)
	defer s.watch(c.steps)()
	defer c.work.Wait()
	c.queue, c.freed = make(chan Request, maxQueue), make(chan struct{}, 1)
	defer close(c.queue)
	go c.dispatch(ctx)
	lines := bufio.NewScanner(in)
	lines.Buffer(make([]byte, 4096), maxRequest)
	read := make(chan []byte)
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		defer close(read)
		for lines.Scan() {
			select {
			case read <- append([]byte(nil), lines.Bytes()...):
			case <-stop:
				return
			}
		}
	}()
	var held [][]byte          // behind a "wait" or an "end"
	var waited <-chan struct{} // closed when what it waits for is done; nil when nothing does
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-waited:
			if c.ending {
				return nil
			}
			for waited = nil; waited == nil && len(held) > 0; held = held[1:] {
				waited = c.take(ctx, held[0])
			}
		case line, ok := <-read:
			switch {
			case !ok && waited == nil:
				return lines.Err()
			case !ok:
				read = nil // what is held is done first
				held = append(held, []byte(`{"op":"end"}`))
			case len(line) == 0:
			case waited != nil && !c.urgent(line) && len(held) < maxQueue:
				held = append(held, line)
			default:
				if w := c.take(ctx, line); w != nil {
					waited = w
				}
			}
		}
	}
}

// urgent reports whether a request is for what others wait for: it is not held behind them.
func (c *conversation) urgent(line []byte) bool {
	var r Request
	return json.Unmarshal(line, &r) == nil && (r.Op == "scan" || r.Op == "cancel")
}

// idle returns a channel that is closed once all units that were asked for have their verdicts, and then says so.
func (c *conversation) idle(a func() Answer) <-chan struct{} {
	done := make(chan struct{})
	go func() {
		c.work.Wait()
		c.say(a())
		close(done)
	}()
	return done
}

// watch has f called whenever a head changed, until the returned function is called.
func (s *Station) watch(f func([]Head)) func() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.watchers == nil {
		s.watchers = make(map[int]func([]Head))
	}
	s.nextWatcher++
	n := s.nextWatcher
	s.watchers[n] = f
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.watchers, n)
	}
}

type conversation struct {
	s       *Station
	work    sync.WaitGroup
	answers chan Answer
	queue   chan Request
	ending  bool
	freed   chan struct{}
	shown   []Head // guarded by the station's mutex
}

// dispatch starts the units that were asked for, in order, each as soon as a head is free.
func (c *conversation) dispatch(ctx context.Context) {
	for r := range c.queue {
		for r.Head == 0 && !c.s.hasFreeHead() && ctx.Err() == nil {
			select {
			case <-c.freed:
			case <-ctx.Done():
			}
		}
		if ctx.Err() != nil {
			c.work.Done() // nobody began it
			continue
		}
		started := make(chan struct{})
		go func() {
			defer c.work.Done()
			v := c.s.make(ctx, r.Head, r.Serial, r.Fields, func() { close(started) })
			if v.Stopped() {
				c.say(Answer{ID: r.ID, Event: "error", Head: v.Head, Serial: v.Serial, Error: v.Detail})
			} else {
				c.say(Answer{ID: r.ID, Event: "verdict", Head: v.Head, Serial: v.Serial, Verdict: &v})
			}
			select {
			case c.freed <- struct{}{}:
			default:
			}
		}()
		<-started
	}
}

func (c *conversation) say(a Answer) { c.answers <- a }

// steps tells what heads do, as far as that is new. It is called with the station's mutex held, and drops steps rather than wait for
// somebody who does not read.
func (c *conversation) steps(heads []Head) {
	for i, h := range heads {
		was := c.shown[i]
		c.shown[i] = h
		if h.Step == "" || h.State == HeadPassed || h.State == HeadFailed || h.Step == was.Step && h.State == was.State && h.Serial == was.Serial {
			continue
		}
		select {
		case c.answers <- Answer{Event: "step", Head: h.Number, Serial: h.Serial, Step: h.Step, Index: h.Index, Of: h.Of, State: h.State, Waiting: h.Waiting}:
		default:
		}
	}
}

// take does what a request asks for. It returns a channel where what comes next is to wait for it to be closed.
func (c *conversation) take(ctx context.Context, line []byte) (waited <-chan struct{}) {
	var r Request
	if err := json.Unmarshal(line, &r); err != nil {
		c.say(Answer{Event: "error", Error: "no request: " + err.Error()})
		return nil
	}
	refuse := func(err error) {
		c.say(Answer{ID: r.ID, Event: "error", Serial: r.Serial, Code: codeOf(StepLabel, err), Error: err.Error()})
	}
	switch r.Op {
	case "make":
		c.work.Add(1)
		select {
		case c.queue <- r:
		default:
			c.work.Done()
			refuse(fmt.Errorf("%d units wait already", maxQueue))
		}
	case "wait":
		return c.idle(func() Answer { return Answer{ID: r.ID, Event: "done"} })
	case "scan":
		if !c.s.Scan(r.Text) {
			refuse(errors.New("no head asks for a label"))
			return nil
		}
		c.say(Answer{ID: r.ID, Event: "done"})
	case "cancel":
		if !c.s.Cancel(r.Head) {
			refuse(errors.New("the head waits for nothing"))
			return nil
		}
		c.say(Answer{ID: r.ID, Event: "done", Head: r.Head})
	case "rework", "scrap":
		state, reasons := ledger.Reworked, ReworkReasons
		if r.Op == "scrap" {
			state, reasons = ledger.Scrapped, ScrapReasons
		}
		if err := knownReason(r.Reason, reasons); err != nil {
			refuse(err)
			return nil
		}
		if err := c.s.Retire(ctx, r.Serial, state, r.Reason, c.s.operatorName()); err != nil {
			refuse(err)
			return nil
		}
		c.say(Answer{ID: r.ID, Event: "done", Serial: r.Serial})
	case "reprint":
		n, err := c.s.Reprint(ctx, r.Serial)
		if err != nil {
			refuse(err)
			return nil
		}
		c.say(Answer{ID: r.ID, Event: "done", Serial: r.Serial, Copies: n})
	case "status":
		counts := c.s.Counts()
		c.say(Answer{ID: r.ID, Event: "status", Heads: c.s.Heads(), Counts: &counts})
	case "end":
		c.ending = true
		return c.idle(func() Answer {
			counts := c.s.Counts()
			return Answer{ID: r.ID, Event: "done", Counts: &counts}
		})
	default:
		refuse(fmt.Errorf("op %q is not known", r.Op))
	}
	return nil
}

func knownReason(reason string, reasons []string) error {
	for _, r := range reasons {
		if r == reason {
			return nil
		}
	}
	return fmt.Errorf("reason %q: want one of %q", reason, reasons)
}
