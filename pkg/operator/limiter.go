package operator

import (
	"context"
	"math/rand/v2"
	"sync"
	"time"
)

// A Limiter spaces the calls of everybody who shares it. It knows no quota: it lets calls go as they come until a service says that
// they are too many, then keeps everybody back for as long as the service asks, goes on at half the rate that was too much, and
// grows by a tenth each second. The zero value is ready; it serves many goroutines.
type Limiter struct {
	mu     sync.Mutex
	rate   float64   // calls per second; 0 before the first throttling
	next   time.Time // no call before
	began  time.Time // of what count counts
	count  int
	grown  time.Time // when rate grew last
	slowed time.Time // until when one throttling is answered to
}

const (
	minRate = 0.2 // calls per second
	maxWait = 10 * time.Minute
)

// Wait returns when the next call may go, or the context's error.
func (l *Limiter) Wait(ctx context.Context) error {
	l.mu.Lock()
	now := time.Now()
	if l.began.IsZero() {
		l.began = now
	}
	at := l.next
	if at.Before(now) {
		at = now
	}
	if l.rate > 0 {
		if dt := now.Sub(l.grown); dt > 0 {
			l.rate *= 1 + 0.1*min(dt.Seconds(), 10)
			l.grown = now
		}
		l.next = at.Add(time.Duration(float64(time.Second) / l.rate))
	}
	l.count++
	l.mu.Unlock()
	return sleep(ctx, at.Sub(now))
}

// Throttled says that a service asked to be left alone for so long. Many answers of one throttling slow down once.
func (l *Limiter) Throttled(after time.Duration) {
	after = min(after, maxWait)
	after += time.Duration(rand.Int64N(int64(after)/10 + int64(100*time.Millisecond))) // so that not all who wait come back as one
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	if until := now.Add(after); until.After(l.next) {
		l.next = until
	}
	if l.rate > 0 && now.Before(l.slowed) {
		return
	}
	observed := float64(l.count) / max(now.Sub(l.began).Seconds(), 0.1)
	if l.rate == 0 || observed < l.rate {
		l.rate = observed
	}
	l.rate = max(l.rate/2, minRate)
	l.slowed, l.grown = now.Add(max(after, time.Second)), now.Add(after)
	l.began, l.count = l.grown, 0
}

// Rate returns how many calls a second go at most; 0 for as many as come.
func (l *Limiter) Rate() float64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.rate
}

func sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return ctx.Err()
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
