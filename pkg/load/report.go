package load

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/touchmark/touchmark/pkg/device"
	"github.com/touchmark/touchmark/pkg/dps"
)

// A Report is what became of a load. Times are in milliseconds.
type Report struct {
	Start   time.Time `json:"start"`
	Seconds float64   `json:"seconds"` // in which devices called
	// Total is all devices; Lines is them by protocol and attestation.
	Total Line   `json:"total"`
	Lines []Line `json:"lines"`
	// Phases is what devices waited for, by protocol.
	Phases []Phase `json:"phases"`
	// Hostile is those who meant harm.
	Hostile []Hostile `json:"hostile,omitempty"`
	// Wrong counts answers that must not be, to devices and to others. Wrongs tells of some of them, each once.
	Wrong  uint64   `json:"wrongAnswers"`
	Wrongs []string `json:"wrongAnswerTexts,omitempty"`
	// ErrorShare is the share of devices that got no answer, or were asked to come later.
	ErrorShare float64 `json:"errorShare"`
	Client     Client  `json:"client"`
	Watch      *Watch  `json:"watch,omitempty"`
}

// A Line is devices of one kind.
type Line struct {
	Protocol    string `json:"protocol,omitempty"`
	Attestation string `json:"attestation,omitempty"`
	Count       uint64 `json:"count"`
	Assigned    uint64 `json:"assigned"`
	// Rate is how many were assigned in a second.
	Rate float64 `json:"rate"`
	// Latency is that of devices that were assigned, and of those that gave up waiting.
	Latency Latency `json:"latency"`
	// Errors is devices that got no answer, or were asked to come later; Wrongs is those, and no others, that got one that must
	// not be, by kind; Wrong is all of them.
	Errors map[string]uint64 `json:"errors,omitempty"`
	Wrongs map[string]uint64 `json:"wrongKinds,omitempty"`
	Wrong  uint64            `json:"wrongAnswers"`
	In     int64             `json:"bytesIn"`
	Out    int64             `json:"bytesOut"`

	Histogram *Histogram `json:"-"`
}

// Latency is a histogram in brief, in milliseconds.
type Latency struct {
	P50  float64 `json:"p50"`
	P90  float64 `json:"p90"`
	P99  float64 `json:"p99"`
	P999 float64 `json:"p99.9"`
	Max  float64 `json:"max"`
}

func (h *Histogram) brief() Latency {
	ms := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
	return Latency{ms(h.Quantile(0.5)), ms(h.Quantile(0.9)), ms(h.Quantile(0.99)), ms(h.Quantile(0.999)), ms(h.Max())}
}

// A Phase is one thing that devices waited for; see [device.Step].
type Phase struct {
	Protocol string  `json:"protocol"`
	Name     string  `json:"phase"`
	Count    uint64  `json:"count"`
	Latency  Latency `json:"latency"`
}

// Hostile is what became of one kind of hostile callers.
type Hostile struct {
	Kind string `json:"kind"`
	// Count is how many came to an end: answered as they must be, wrongly, or not at all.
	Count  uint64            `json:"count"`
	Wrong  uint64            `json:"wrongAnswers"`
	Errors map[string]uint64 `json:"errors,omitempty"`
}

// Client is how busy the measuring itself was. Where it had no processor left, the latencies are its own.
type Client struct {
	// CPUs is how many processors it kept busy, and Share of all that the machine has.
	CPUs  float64 `json:"cpus"`
	Share float64 `json:"share"`
	Cores int     `json:"cores"`
	// Late is how late callers were sent off.
	Late Latency `json:"late"`
	// Full counts callers who waited because too many were there already, or because no device was free.
	Full uint64 `json:"full"`
}

const (
	maxWrongs = 20
	maxKinds  = 50 // of errors: codes come from the service
)

// ledger counts while the load lasts.
type ledger struct {
	lines  map[[2]string]*line              // by protocol and attestation
	phases map[string]map[string]*Histogram // by protocol and name
	harms  []*hostile
	late   Histogram
	full   atomic.Uint64
	unsent atomic.Uint64 // were due, and found no place to the end

	mu     sync.Mutex
	wrongs []*wrongText
}

// A wrongText is what was wrong, with whom first, and how often.
type wrongText struct {
	text, who string
	n         int
}

type line struct {
	traffic  traffic
	latency  Histogram
	count    atomic.Uint64
	assigned atomic.Uint64
	wrong    atomic.Uint64
	failed   atomic.Uint64 // sum of errors
	errors   kinds
	wrongs   kinds
}

type hostile struct {
	harm
	count, wrong atomic.Uint64
	errors       kinds
}

// kinds counts by name.
type kinds struct {
	mu sync.Mutex
	n  map[string]uint64
}

func (k *kinds) add(kind string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.n == nil {
		k.n = make(map[string]uint64)
	}
	if _, known := k.n[kind]; !known && len(k.n) >= maxKinds {
		kind = "other"
	}
	k.n[kind]++
}

func (k *kinds) all() map[string]uint64 {
	k.mu.Lock()
	defer k.mu.Unlock()
	return maps.Clone(k.n)
}

// traffic counts octets beneath TLS.
type traffic struct{ in, out atomic.Int64 }

type counted struct {
	net.Conn
	t *traffic
}

func (c *counted) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.t.in.Add(int64(n))
	return n, err
}

func (c *counted) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.t.out.Add(int64(n))
	return n, err
}

// phaseNames are the names of a [device.Step].
var phaseNames = [...]string{"connect", "handshake", "websocket", "open", "challenge", "register", "status"}

func newLedger(cfg *Config) *ledger {
	l := &ledger{lines: make(map[[2]string]*line), phases: make(map[string]map[string]*Histogram)}
	for _, p := range cfg.Protocols {
		for _, a := range cfg.Attestations {
			l.lines[[2]string{p.Name, a.Name}] = &line{}
		}
		l.phases[p.Name] = make(map[string]*Histogram)
		for _, name := range phaseNames {
			l.phases[p.Name][name] = &Histogram{}
		}
	}
	for _, h := range harms() {
		l.harms = append(l.harms, &hostile{harm: h})
	}
	return l
}

func (l *ledger) line(protocol, attestation string) *line {
	return l.lines[[2]string{protocol, attestation}]
}

// registered counts a device that came to an end.
func (l *ledger) registered(line *line, protocol string, x *expectation, took time.Duration, err error) {
	line.count.Add(1)
	wrong, kind, bad := x.wrong, "", false
	switch {
	case err != nil:
		kind, bad = kindOf(err)
		if kind == "timeout" {
			line.latency.Add(took)
		}
		var refused *device.RefusedError
		switch {
		case bad && errors.As(err, &refused):
			wrong = append(wrong, fmt.Sprintf("%s %s", kind, refused.Message)) // tracking IDs are all different
		case bad:
			wrong = append(wrong, err.Error())
		}
	case x.status != dps.Assigned:
		kind = "became " + string(x.status)
	default:
		line.latency.Add(took)
		line.assigned.Add(1)
	}
	switch {
	case bad || len(wrong) > 0:
		if kind == "" || !bad && err != nil {
			kind = "what an answer said"
		}
		line.wrong.Add(1)
		line.wrongs.add(kind)
		l.tell(x.id, "over "+protocol+": "+strings.Join(wrong, "; "))
	case kind != "":
		line.failed.Add(1)
		line.errors.add(kind)
	}
}

// harmed counts a hostile caller that came to an end.
func (l *ledger) harmed(h *hostile, protocol, wrong string, err error) {
	h.count.Add(1)
	if err != nil {
		kind, _ := kindOf(err)
		h.errors.add(kind)
	}
	if wrong != "" {
		h.wrong.Add(1)
		l.tell("", fmt.Sprintf("%s over %s: %s", h.kind, protocol, wrong))
	}
}

// tell keeps what was wrong, once for all that it was wrong with.
func (l *ledger) tell(who, text string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if i := slices.IndexFunc(l.wrongs, func(w *wrongText) bool { return w.text == text }); i >= 0 {
		l.wrongs[i].n++
	} else if len(l.wrongs) < maxWrongs {
		l.wrongs = append(l.wrongs, &wrongText{text, who, 1})
	}
}

func (l *ledger) told() (all []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, w := range l.wrongs {
		text := w.text
		if w.who != "" {
			text = w.who + " " + text
		}
		if w.n > 1 {
			text = fmt.Sprintf("%d times: %s", w.n, text)
		}
		all = append(all, text)
	}
	return all
}

func (l *ledger) progress() (p Progress) {
	var all Histogram
	for _, s := range l.lines {
		p.Done += s.count.Load()
		p.Errors += s.failed.Load()
		p.Wrong += s.wrong.Load()
		all.Merge(&s.latency)
	}
	for _, h := range l.harms {
		p.Hostile += h.count.Load()
		p.Wrong += h.wrong.Load()
	}
	p.P50, p.P99 = all.Quantile(0.5), all.Quantile(0.99)
	return p
}

func (l *ledger) report(r *run, took time.Duration, watch *Watch) *Report {
	rep := &Report{Start: r.start.UTC(), Seconds: took.Seconds(), Watch: watch, Wrongs: l.told(),
		Client: Client{Cores: runtime.NumCPU(), Late: l.late.brief(), Full: l.full.Load()}}
	total := Line{Histogram: &Histogram{}, Errors: make(map[string]uint64), Wrongs: make(map[string]uint64)}
	var failed uint64
	for _, p := range r.cfg.Protocols {
		for _, a := range r.cfg.Attestations {
			s := l.line(p.Name, a.Name)
			if s.count.Load() == 0 {
				continue
			}
			row := Line{Protocol: p.Name, Attestation: a.Name, Count: s.count.Load(), Assigned: s.assigned.Load(), Errors: s.errors.all(), Wrongs: s.wrongs.all(), Wrong: s.wrong.Load(),
				In: s.traffic.in.Load(), Out: s.traffic.out.Load(), Latency: s.latency.brief(), Histogram: &s.latency}
			row.Rate = float64(row.Assigned) / rep.Seconds
			rep.Lines = append(rep.Lines, row)
			total.Count += row.Count
			total.Assigned += row.Assigned
			total.Wrong += row.Wrong
			total.In += row.In
			total.Out += row.Out
			total.Histogram.Merge(&s.latency)
			for kind, n := range row.Errors {
				total.Errors[kind] += n
			}
			for kind, n := range row.Wrongs {
				total.Wrongs[kind] += n
			}
			failed += s.failed.Load()
		}
		for _, name := range phaseNames {
			if h := l.phases[p.Name][name]; h.Count() > 0 {
				rep.Phases = append(rep.Phases, Phase{p.Name, name, h.Count(), h.brief()})
			}
		}
	}
	if n := l.unsent.Load(); n > 0 {
		total.Count += n
		total.Errors["never sent off"] = n
		failed += n
	}
	total.Rate, total.Latency = float64(total.Assigned)/rep.Seconds, total.Histogram.brief()
	rep.Total, rep.Wrong = total, total.Wrong
	if total.Count > 0 {
		rep.ErrorShare = float64(failed) / float64(total.Count)
	}
	for _, h := range l.harms {
		if n := h.count.Load(); n > 0 {
			rep.Hostile = append(rep.Hostile, Hostile{Kind: h.kind, Count: n, Wrong: h.wrong.Load(), Errors: h.errors.all()})
			rep.Wrong += h.wrong.Load()
		}
	}
	return rep
}

// ErrorKinds returns the kinds of a line's errors, the most frequent first.
func (l *Line) ErrorKinds() []string {
	return slices.SortedFunc(maps.Keys(l.Errors), func(a, b string) int {
		if d := int64(l.Errors[b]) - int64(l.Errors[a]); d != 0 {
			return int(d)
		}
		return strings.Compare(a, b)
	})
}
