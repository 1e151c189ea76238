package limit

import (
	"container/list"
	"time"

	"golang.org/x/time/rate"
)

// A verdict is what a rate says of a request.
type verdict int

const (
	passes verdict = iota
	slows          // beyond the rate
	stops          // far beyond it
)

// A bucket is how much of a rate a key has left.
type bucket struct {
	key  uint64
	rate rate.Limit
	pace *rate.Limiter
	over *rate.Limiter // for what pace denies; nil while it is full

	refusal *refusal
	told    told
}

// newBucket returns a full bucket that holds some seconds' worth of a rate.
func newBucket(perSecond, seconds float64) *bucket {
	// A device needs a few requests to register at all.
	return &bucket{rate: rate.Limit(perSecond), pace: rate.NewLimiter(rate.Limit(perSecond), int(min(max(4, perSecond*seconds), 1<<40)))}
}

func (b *bucket) take(now time.Time, n int) verdict {
	if b.pace.AllowN(now, n) {
		return passes
	}
	if b.over == nil {
		b.over = rate.NewLimiter(b.rate*excess, b.pace.Burst()*excess)
	}
	if b.over.AllowN(now, n) {
		return slows
	}
	return stops
}

// spent reports whether take would stop a request; a nil bucket is a full one.
func (b *bucket) spent(now time.Time) bool {
	return b != nil && b.over != nil && b.pace.TokensAt(now) < 1 && b.over.TokensAt(now) < 1
}

// full reports whether the bucket is as good as a new one.
func (b *bucket) full(now time.Time) bool {
	return b.pace.TokensAt(now) >= float64(b.pace.Burst()) && (b.over == nil || b.over.TokensAt(now) >= float64(b.over.Burst()))
}

// spare reports whether the bucket is as good as a new one, and what it remembers of refusals and of the log is over.
func (b *bucket) spare(now time.Time) bool {
	return (b.refusal == nil || now.Sub(b.refusal.judged) >= refusalWindow) && (b.told.last == nil || now.Sub(b.told.at) >= tellEvery) && b.full(now)
}

// A table has the buckets of a bounded number of keys: of those who called of late, and not of all who ever did.
//
// Only a bucket that has filled up again makes room for another: whoever empties his own cannot get a new one by coming
// under many names. When nothing can go, new keys share one bucket. To bring that about, a flood must keep every place of
// the table busy, which takes that many requests within the time that one request takes to refill.
type table struct {
	max                int
	perSecond, seconds float64
	byKey              map[uint64]*list.Element
	order              list.List // of *bucket, the last used one in front
	rest               *bucket   // of those for whom there is no room
}

func newTable(max int, perSecond, seconds float64) *table {
	return &table{max: max, perSecond: perSecond, seconds: seconds, byKey: make(map[uint64]*list.Element), rest: newBucket(perSecond, seconds)}
}

// looks is how many of those used longest ago are looked at for one that can go when there is no room, and tidies how many
// whenever a key is new: more than one, so that the table shrinks behind a busy hour.
const (
	looks  = 8
	tidies = 2
)

// get returns the bucket of a key.
func (t *table) get(key uint64, now time.Time) *bucket {
	if e := t.byKey[key]; e != nil {
		t.order.MoveToFront(e)
		return e.Value.(*bucket)
	}
	for range min(tidies, len(t.byKey)) {
		t.drop((*bucket).spare, now)
	}
	for i := 0; len(t.byKey) >= t.max; i++ {
		if i == looks {
			return t.rest
		}
		t.drop((*bucket).full, now)
	}
	b := newBucket(t.perSecond, t.seconds)
	b.key = key
	t.byKey[key] = t.order.PushFront(b)
	return b
}

// drop drops the bucket used longest ago if it can go; else the next one is looked at next time.
func (t *table) drop(can func(*bucket, time.Time) bool, now time.Time) {
	e := t.order.Back()
	if b := e.Value.(*bucket); can(b, now) {
		t.order.Remove(e)
		delete(t.byKey, b.key)
	} else {
		t.order.MoveToFront(e)
	}
}

// peek returns the bucket of a key that has one, and makes none.
func (t *table) peek(key uint64) *bucket {
	if e := t.byKey[key]; e != nil {
		return e.Value.(*bucket)
	}
	return nil
}
