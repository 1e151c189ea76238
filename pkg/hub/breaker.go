package hub

import (
	"errors"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/touchmark/touchmark/pkg/registration"
)

const (
	// tripAfter so many failures in a row nothing is asked for a while, and then one call, which tells whether that is over.
	tripAfter = 5
	minPause  = time.Second
	maxPause  = time.Minute
)

// ErrCircuitOpen says that nothing was sent: what was sent before got no answer, time after time. An error that is it says what
// the last of those calls came to.
var ErrCircuitOpen = errors.New("not called: it failed too often just now")

// openError is ErrCircuitOpen with the error of the last call that was made.
type openError struct{ last error }

func (e *openError) Error() string {
	text := e.last.Error()
	if h, ok := errors.AsType[*registration.HubError](e.last); ok {
		text = h.Err.Error() // whoever wraps this names the hub
	}
	return text + ", time after time: it is not called for a while"
}

// Is makes it ErrCircuitOpen.
func (e *openError) Is(target error) bool { return target == ErrCircuitOpen }

// Unwrap returns what the last call came to.
func (e *openError) Unwrap() error { return e.last }

// A breaker spares callers the wait for somebody who does not answer. The zero breaker is closed, and calls go through.
type breaker struct {
	mu       sync.Mutex
	failures int           // in a row; up to tripAfter
	pause    time.Duration // of the last opening
	until    time.Time     // when the next call may go through, of one that is open
	probing  bool          // that call is under way
	last     error         // of the last call without an answer, without what it was about
}

// A verdict is what a call says of whom it called.
type verdict int

const (
	answered   verdict = iota // whatever the answer
	unanswered                // or cannot do its work
	unknown                   // the caller went away
)

// open returns for how long no call may be made; 0 if one may.
func (b *breaker) open(now time.Time) time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.wait(now)
}

func (b *breaker) wait(now time.Time) time.Duration {
	switch {
	case b.failures < tripAfter:
		return 0
	case b.probing:
		return max(b.until.Sub(now), minPause)
	}
	return max(b.until.Sub(now), 0)
}

// enter is open, and takes the place of the call that tells: leave is owed for each call that may be made.
func (b *breaker) enter(now time.Time) (wait time.Duration, probe bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if wait = b.wait(now); wait > 0 {
		return wait, false
	}
	probe = b.failures >= tripAfter
	b.probing = b.probing || probe
	return 0, probe
}

// reason is the error of a call that may not be made.
func (b *breaker) reason() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.last == nil {
		return ErrCircuitOpen
	}
	return &openError{b.last}
}

func (b *breaker) leave(now time.Time, v verdict, probe bool, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if v == unanswered {
		b.last = bare(err)
	}
	if probe {
		b.probing = false
	}
	switch {
	case v == answered:
		b.failures, b.pause = 0, 0
	case v == unanswered && (probe || b.failures < tripAfter): // and not one that was under way when others opened it
		if b.failures = min(b.failures+1, tripAfter); b.failures == tripAfter {
			b.pause = min(max(2*b.pause, minPause), maxPause)
			b.until = now.Add(b.pause)
		}
	}
}

// bare is an error of a hub without what was being done: others are told of it, whose business another's device is not.
func bare(err error) error {
	e, ok := errors.AsType[*registration.HubError](err)
	w, ok2 := errors.AsType[*whileDoing](err)
	if !ok || !ok2 {
		return err
	}
	c := *e
	c.Err = w.err
	return &c
}

// judge returns what an error of a hub says of the hub.
func judge(err error) verdict {
	e, ok := errors.AsType[*registration.HubError](err)
	switch {
	case !ok || !e.Temporary, e.Status == http.StatusTooManyRequests, e.Code == codeConflict:
		return answered
	case e.Code == codeCanceled:
		return unknown
	}
	return unanswered
}

// outcome is a word for metrics: of few, whatever hubs answer.
func outcome(err error) string {
	e, ok := errors.AsType[*registration.HubError](err)
	switch {
	case err == nil:
		return "ok"
	case !ok:
		return "Error"
	case e.Status != 0:
		return strconv.Itoa(e.Status)
	}
	return e.Code
}
