// Package yield counts what a station makes: units, first-pass yield, rate, failures by code, and how long each step takes.
//
// A [Tally] is told of every verdict ([Tally.Try]) and of units that are reworked or scrapped; a [Report] is what it knows at one
// instant, which can be written as metrics (OpenMetrics 1.0, or the text format 0.0.4 that Prometheus' node_exporter reads from
// files), as CSV and as a page. A unit costs the same however many there were before: nothing is kept per unit. A Tally may be
// used by many goroutines; a Report is the receiver's own.
//
// Step times are kept in a histogram whose buckets grow by a tenth, from a millisecond to a day: quantiles are within 4.8 % of
// the exact ones, in some 1.5 KiB per step. What is shorter counts as a millisecond, what is longer as a day. There is room for
// 64 steps and 256 codes; further ones, and names that are none, are counted together as "other".
package yield

import (
	"cmp"
	"math"
	"slices"
	"strings"
	"sync"
	"time"
)

// A Standing is how a unit stands, by the last verdict that the tally was told.
type Standing int

// The standings.
const (
	Untried Standing = iota
	Passed
	Failed
)

// A Try is one verdict on a unit.
type Try struct {
	// Was is how the unit stood before.
	Was  Standing
	Pass bool
	// Code says why not: letters, digits and "-".
	Code string
	// Steps are those that were taken.
	Steps []Step
}

// A Step is how long a step took. Its name is of letters, digits and "-".
type Step struct {
	Name     string
	Duration time.Duration
}

// Config says what a tally is about.
type Config struct {
	// Station, Order and Product name what is counted, in reports.
	Station, Order, Product string
	// Now is for tests; nil means the real clock.
	Now func() time.Time
}

const (
	maxSteps = 64
	maxCodes = 256
	other    = "other"
	window   = 60 // minutes of the rate
)

// A Tally counts from when it was made: for a shift, make a new one.
type Tally struct {
	cfg   Config
	start time.Time

	mu       sync.Mutex
	counts   Report // its numbers
	codes    map[string]int64
	steps    map[string]*histogram
	order    []string          // of the steps, as they came first
	passedIn [window]perMinute // by the minute, modulo window
}

type perMinute struct{ minute, passed int64 }

// New starts a tally.
func New(cfg Config) *Tally {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Tally{cfg: cfg, start: cfg.Now(), counts: Report{Left: -1}, codes: make(map[string]int64), steps: make(map[string]*histogram)}
}

// Try counts a verdict.
func (t *Tally) Try(v Try) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if v.Was == Untried {
		t.counts.FirstTries++
	}
	t.leave(v.Was)
	if v.Pass {
		t.counts.Passes++
		t.counts.Passed++
		if v.Was == Untried {
			t.counts.FirstPasses++
		}
		minute := t.cfg.Now().Unix() / 60
		if p := &t.passedIn[((minute%window)+window)%window]; p.minute == minute {
			p.passed++
		} else {
			*p = perMinute{minute, 1}
		}
	} else {
		t.counts.Fails++
		t.counts.Failed++
		t.codes[nameIn(t.codes, v.Code, maxCodes)]++
	}
	for _, s := range v.Steps {
		name := nameIn(t.steps, s.Name, maxSteps)
		h := t.steps[name]
		if h == nil {
			h = &histogram{}
			t.steps[name] = h
			t.order = append(t.order, name)
		}
		h.add(s.Duration)
	}
}

// Rework counts a unit that is worked on again. How it stands changes with its next verdict.
func (t *Tally) Rework() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.counts.Reworked++
}

// Scrap counts a unit that is given up, and how it stood before.
func (t *Tally) Scrap(was Standing) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.leave(was)
	t.counts.Scrapped++
}

// leave takes a unit out of where it was counted. What was counted by another tally cannot be taken out of this one.
func (t *Tally) leave(was Standing) {
	switch was {
	case Passed:
		t.counts.Passed = max(0, t.counts.Passed-1)
	case Failed:
		t.counts.Failed = max(0, t.counts.Failed-1)
	}
}

// SetLeft says how many units the order still allows; -1 means that no order limits them.
func (t *Tally) SetLeft(n int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.counts.Left = max(n, -1)
}

// nameIn returns the name under which something is counted.
func nameIn[V any](known map[string]V, name string, most int) string {
	if _, ok := known[name]; ok {
		return name
	}
	good := name != "" && len(name) <= 32 && strings.Trim(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-") == ""
	if !good || len(known) >= most-1 {
		return other
	}
	return name
}

// A Report is what a tally knew at one instant.
type Report struct {
	Station, Order, Product string
	// Start is when the tally was made, At when the report was.
	Start, At time.Time

	// Passed and Failed are units, by their last verdict; Scrapped are those given up, and are in neither.
	Passed, Failed, Scrapped int64
	// Reworked is how often a unit was worked on again.
	Reworked int64
	// Passes and Fails are verdicts: a unit that was tried twice has two.
	Passes, Fails int64
	// FirstPasses is how many units passed at once, of FirstTries.
	FirstPasses, FirstTries int64
	// PerHour is the rate of verdicts PASS over the last hour, or since the start while that is shorter, but at least a minute.
	PerHour float64
	// Left is how many units the order still allows; -1 where none limits them.
	Left int64
	// Codes are the reasons of failures, the most frequent first.
	Codes []Code
	// Steps are in the order in which they first came.
	Steps []StepTimes
}

// A Code is how often something was the reason of a failure.
type Code struct {
	Code  string
	Count int64
}

// StepTimes are the times of a step.
type StepTimes struct {
	Name     string
	Count    int64
	Total    time.Duration
	P50, P95 time.Duration
}

// FirstPassYield returns the share of units that passed at once, from 0 to 1; NaN before the first.
func (r *Report) FirstPassYield() float64 { return float64(r.FirstPasses) / float64(r.FirstTries) }

// Report returns what the tally knows now.
func (t *Tally) Report() *Report {
	t.mu.Lock()
	defer t.mu.Unlock()
	r := t.counts
	r.Station, r.Order, r.Product, r.Start, r.At = t.cfg.Station, t.cfg.Order, t.cfg.Product, t.start, t.cfg.Now()
	minute := r.At.Unix() / 60
	passed := int64(0)
	for _, p := range t.passedIn {
		if p.minute > minute-window && p.minute <= minute {
			passed += p.passed
		}
	}
	since := r.At.Sub(time.Unix((minute-window+1)*60, 0)) // what the minutes span
	r.PerHour = float64(passed) / max(time.Minute, min(since, r.At.Sub(r.Start))).Hours()
	for code, n := range t.codes {
		r.Codes = append(r.Codes, Code{code, n})
	}
	slices.SortFunc(r.Codes, func(a, b Code) int { return cmp.Or(cmp.Compare(b.Count, a.Count), cmp.Compare(a.Code, b.Code)) })
	for _, name := range t.order {
		h := t.steps[name]
		r.Steps = append(r.Steps, StepTimes{name, h.count, h.total, h.quantile(0.5), h.quantile(0.95)})
	}
	return &r
}

// A histogram counts durations. Bucket 0 is up to shortest; each further one ends a tenth above the last.
type histogram struct {
	count   int64
	total   time.Duration
	buckets [buckets]int64
}

const (
	shortest = time.Millisecond
	longest  = 24 * time.Hour
	growth   = 1.1
	buckets  = 193 // 1.1^192 ms is more than a day
)

func (h *histogram) add(d time.Duration) {
	d = min(max(d, 0), longest)
	h.count++
	if h.total > math.MaxInt64-d {
		h.total = math.MaxInt64 - d
	}
	h.total += d
	h.buckets[max(0, int(math.Ceil(math.Log(float64(d)/float64(shortest))/math.Log(growth))))]++
}

// quantile returns the value that a share of all is at or below (nearest rank), as that in the middle of its bucket.
func (h *histogram) quantile(q float64) time.Duration {
	rank := int64(math.Ceil(q * float64(h.count)))
	for i, n := range h.buckets {
		if rank -= n; rank <= 0 && n > 0 {
			if i == 0 {
				return shortest
			}
			// Between both ends of the bucket, so that the error is the same share of either: 2/(1+growth) of the upper.
			return min(longest, time.Duration(float64(shortest)*math.Pow(growth, float64(i))*2/(1+growth)))
		}
	}
	return 0
}
