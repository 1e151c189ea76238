package registrationtest

import (
	"context"
	"log/slog"
	"runtime"
	"strings"
	"testing"
	"time"
)

// Goroutines wants as many of them when the test has ended, its door and its service with it, as there are now. It is called
// before they are started.
func Goroutines(t testing.TB) {
	t.Helper()
	before := runtime.NumGoroutine()
	t.Cleanup(func() {
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for range 1000 {
			if runtime.NumGoroutine() <= before {
				return
			}
			<-tick.C
		}
		stacks := make([]byte, 1<<20)
		t.Errorf("%d goroutines, %d before:\n%s", runtime.NumGoroutine(), before, stacks[:runtime.Stack(stacks, true)])
	})
}

// Log is a log that fails the test when it is told of a panic: doors survive one, and tests must not.
func Log(t testing.TB) *slog.Logger { return slog.New(panics{t}) }

type panics struct{ t testing.TB }

func (panics) Enabled(context.Context, slog.Level) bool { return true }

func (p panics) Handle(_ context.Context, r slog.Record) error {
	if strings.Contains(r.Message, "panic") {
		r.Attrs(func(a slog.Attr) bool {
			p.t.Errorf("%s: %s", r.Message, a)
			return true
		})
	}
	return nil
}

func (p panics) WithAttrs([]slog.Attr) slog.Handler { return p }
func (p panics) WithGroup(string) slog.Handler      { return p }
