package load

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// A Sample is what a process took at a moment.
type Sample struct {
	Seconds float64 `json:"seconds"` // since the load began
	RSS     int64   `json:"rssBytes"`
	Files   int     `json:"openFiles"`
	Threads int     `json:"threads"`
	CPU     float64 `json:"cpuSeconds"` // since the process began
}

// Watch is what a process took while the load lasted. Only Linux tells.
type Watch struct {
	PID int `json:"pid"`
	// First and Last are averages over the first and the last minute, or half of the time where that is shorter.
	First Sample `json:"firstMinute"`
	Last  Sample `json:"lastMinute"`
	// Growth is how much more memory it had in the last minute than in the first, as a share.
	Growth float64 `json:"rssGrowth"`
	// CPU is how many processors it kept busy.
	CPU float64 `json:"cpus"`
	// Series has at most some 1,000 samples: the longer the load, the farther apart.
	Series []Sample `json:"series"`
	// Err is why nothing more is known from some moment on.
	Err string `json:"error,omitempty"`

	each, skip int      // ticks between samples of the series, and until its next one
	begin, end []Sample // of the first minute, and of the last
}

const (
	maxSeries   = 1000
	clockTicks  = 100 // per second, in /proc on every architecture that Go runs on
	minuteTicks = 60
)

// sample reads /proc/PID.
func sample(pid int) (s Sample, err error) {
	dir := filepath.Join("/proc", strconv.Itoa(pid))
	b, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err != nil {
		return s, err
	}
	// proc_pid_stat(5): the name, in parentheses, may hold anything; fields are counted behind it, from the third.
	fields := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	if len(fields) < 22 {
		return s, fmt.Errorf("%s/stat is not understood", dir)
	}
	var faults []error
	number := func(i int) int64 {
		n, err := strconv.ParseInt(fields[i-3], 10, 64)
		faults = append(faults, err)
		return n
	}
	s.CPU = float64(number(14)+number(15)) / clockTicks
	s.Threads = int(number(20))
	s.RSS = number(24) * int64(os.Getpagesize())
	files, err := os.ReadDir(filepath.Join(dir, "fd"))
	s.Files = len(files)
	return s, errors.Join(append(faults, err)...)
}

// run samples once a second until the context ends.
func (w *Watch) run(ctx context.Context, start time.Time) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		s, err := sample(w.PID)
		if err != nil {
			w.Err = err.Error()
			break
		}
		s.Seconds = time.Since(start).Seconds()
		w.add(s)
		select {
		case <-tick.C:
			continue
		case <-ctx.Done():
		}
		break
	}
	w.finish()
}

func (w *Watch) add(s Sample) {
	if len(w.begin) < minuteTicks {
		w.begin = append(w.begin, s)
	}
	if w.end = append(w.end, s); len(w.end) > minuteTicks {
		w.end = w.end[1:]
	}
	if w.skip > 0 {
		w.skip--
		return
	}
	if w.each == 0 {
		w.each = 1
	}
	w.Series = append(w.Series, s)
	w.skip = w.each - 1
	if len(w.Series) == maxSeries {
		for i := range maxSeries / 2 {
			w.Series[i] = w.Series[2*i]
		}
		w.Series = w.Series[:maxSeries/2]
		w.each *= 2
	}
}

func (w *Watch) finish() {
	n := len(w.end)
	if n == 0 {
		return
	}
	first, last := w.begin, w.end
	if n < minuteTicks { // the whole of it: the two halves
		first, last = w.begin[:(n+1)/2], w.end[n/2:]
	}
	w.First, w.Last = average(first), average(last)
	if w.First.RSS > 0 {
		w.Growth = float64(w.Last.RSS)/float64(w.First.RSS) - 1
	}
	if a, b := w.begin[0], w.end[n-1]; b.Seconds > a.Seconds {
		w.CPU = (b.CPU - a.CPU) / (b.Seconds - a.Seconds)
	}
}

func average(all []Sample) (a Sample) {
	for _, s := range all {
		a.Seconds += s.Seconds
		a.RSS += s.RSS
		a.Files += s.Files
		a.Threads += s.Threads
		a.CPU += s.CPU
	}
	n := len(all)
	return Sample{a.Seconds / float64(n), a.RSS / int64(n), a.Files / n, a.Threads / n, a.CPU / float64(n)}
}
