package load

import (
	"math"
	"math/bits"
	"sync/atomic"
	"time"
)

// A Histogram counts durations in buckets whose width grows with what they hold: each power of two of microseconds has 64, so
// that a percentile is at most 1.6 % above the truth. It has one size however much is counted, and goroutines may count
// at once. The zero value is empty.
type Histogram struct {
	counts [64 * octaves]atomic.Uint64
	max    atomic.Int64 // exact
}

// octaves reach to 2^38 µs, three days.
const octaves = 33

func bucketOf(d time.Duration) int {
	us := uint64(max(d, 0) / time.Microsecond)
	if us < 64 {
		return int(us)
	}
	shift := bits.Len64(us) - 7
	return min(64*shift+int(us>>shift), 64*octaves-1)
}

// bounds returns a bucket's range, the upper end excluded.
func bounds(i int) (from, to time.Duration) {
	if i < 64 {
		return time.Duration(i) * time.Microsecond, time.Duration(i+1) * time.Microsecond
	}
	shift := i/64 - 1
	low := time.Duration(64+i%64) << shift * time.Microsecond
	return low, low + time.Microsecond<<shift
}

// Add counts a duration.
func (h *Histogram) Add(d time.Duration) {
	h.counts[bucketOf(d)].Add(1)
	for old := h.max.Load(); int64(d) > old && !h.max.CompareAndSwap(old, int64(d)); old = h.max.Load() {
	}
}

// Merge counts in what another counted.
func (h *Histogram) Merge(o *Histogram) {
	for i := range o.counts {
		if n := o.counts[i].Load(); n > 0 {
			h.counts[i].Add(n)
		}
	}
	if m := o.max.Load(); m > h.max.Load() {
		h.max.Store(m)
	}
}

// Count returns how many durations were counted.
func (h *Histogram) Count() (n uint64) {
	for i := range h.counts {
		n += h.counts[i].Load()
	}
	return n
}

// Quantile returns what the share q of the durations, from 0 to 1, does not go beyond; 0 where none was counted.
func (h *Histogram) Quantile(q float64) time.Duration {
	total := h.Count()
	if total == 0 {
		return 0
	}
	want := uint64(math.Ceil(q * float64(total)))
	var seen uint64
	for i := range h.counts {
		if seen += h.counts[i].Load(); seen >= max(want, 1) {
			_, to := bounds(i)
			return min(to, h.Max())
		}
	}
	return h.Max()
}

// Max returns the longest duration, exactly.
func (h *Histogram) Max() time.Duration { return time.Duration(h.max.Load()) }

// Buckets yields the buckets that hold something, from the shortest duration.
func (h *Histogram) Buckets(yield func(from, to time.Duration, n uint64) bool) {
	for i := range h.counts {
		if n := h.counts[i].Load(); n > 0 {
			if from, to := bounds(i); !yield(from, to, n) {
				return
			}
		}
	}
}
