package registration

import (
	"context"
	"errors"
	"strings"
	"sync"
	"time"

	"github.com/touchmark/touchmark/pkg/dps"
)

// Bounds of working at what hubs have yet to be told.
const (
	workPeriod = 500 * time.Millisecond
	lookPart   = 10 // of a core's time, at most a tenth goes into looking for them
	// maxWorkers is how many tasks a process works at, maxPerScope how many of one scope, and maxPerHub how many that wait for one
	// hub: a hub that hangs keeps no other waiting, nor do many of a tenant's another tenant's.
	maxWorkers  = 64
	maxPerScope = 32
	maxPerHub   = 8
	dueAtOnce   = 512
	// duePages is how many times as many are looked at, for those that wait for other hubs than the first ones do.
	duePages = 16
)

// workers counts who works at what, and keeps what is due and has no place yet: who is done makes place for the next.
type workers struct {
	wg    sync.WaitGroup
	mu    sync.Mutex
	begun int            // under mu
	all   int            // under mu
	busy  map[string]int // under mu, by scope, and by scope and hub
	line  []waiting      // under mu: as of the last look, those first that have waited longest
}

type waiting struct {
	scope, hub string // hub with the scope before it
	work       func()
}

// add has a task worked at, now or when there is a place.
func (w *workers) add(t *Task, work func()) {
	next := waiting{t.Scope, t.Scope + "\x00" + strings.ToLower(t.Hub), work}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.room(&next) {
		w.begin(&next)
	} else {
		w.line = append(w.line, next)
	}
}

func (w *workers) room(next *waiting) bool {
	return w.all < maxWorkers && w.busy[next.scope] < maxPerScope && w.busy[next.hub] < maxPerHub
}

func (w *workers) begin(next *waiting) {
	w.begun++
	w.all++
	w.busy[next.scope]++
	w.busy[next.hub]++
	w.wg.Go(func() {
		next.work()
		w.mu.Lock()
		defer w.mu.Unlock()
		w.all--
		for _, key := range []string{next.scope, next.hub} {
			if w.busy[key]--; w.busy[key] == 0 {
				delete(w.busy, key)
			}
		}
		for i := range w.line {
			if next := w.line[i]; w.room(&next) {
				copy(w.line[1:], w.line[:i]) // those before it stay before the others
				w.line = w.line[1:]
				w.begin(&next)
				return
			}
		}
	})
}

// forget forgets what has no place yet: the store has it.
func (w *workers) forget() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.line = nil
}

// count returns how many tasks were begun, and whether as many are worked at as can be.
func (w *workers) count() (begun int, full bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.begun, w.all >= maxWorkers
}

// Provision works at what the hubs of all scopes have yet to be told, until the context ends, and returns when nothing is under
// way. Any number of processes may do so with one store.
func (s *Scopes) Provision(ctx context.Context) {
	w := &workers{busy: make(map[string]int)}
	defer w.wg.Wait()
	defer w.forget()
	for {
		start := time.Now()
		if err := s.beginDue(ctx, w); err != nil && ctx.Err() == nil {
			s.cfg.Log.Error("reading what hubs have yet to be told", "reason", err.Error())
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(max(workPeriod, lookPart*time.Since(start))):
		}
	}
}

// ProvisionDue works once at each task that is due, and returns how many there were.
func (s *Scopes) ProvisionDue(ctx context.Context) (n int, err error) {
	w := &workers{busy: make(map[string]int)}
	for {
		err := s.beginDue(ctx, w)
		w.wg.Wait()
		before := n
		if n, _ = w.count(); err != nil || n == before {
			return n, err
		}
	}
}

func (s *Scopes) beginDue(ctx context.Context, w *workers) error {
	now := time.Now
	if s.cfg.Now != nil {
		now = s.cfg.Now
	}
	w.forget()
	var from time.Time
	for range duePages {
		var due []*Task
		if err := s.cfg.Store.View(ctx, func(tx Tx) (err error) { due, err = tx.DueTasks(from, now(), dueAtOnce); return err }); err != nil {
			return err
		}
		for _, t := range due {
			svc, err := s.Service(ctx, t.Scope)
			if errors.Is(err, ErrNotFound) {
				continue // a scope that is being deleted takes its tasks along
			}
			if err != nil {
				return err
			}
			w.add(t, func() { svc.work(ctx, t.ID) })
		}
		if _, full := w.count(); full || len(due) < dueAtOnce {
			return nil
		}
		from = due[len(due)-1].Due
	}
	return nil
}

// work takes a task that is due and works at it, unless another has taken it.
func (s *Service) work(ctx context.Context, id string) {
	var t *Task
	err := s.cfg.Store.Update(ctx, func(tx Tx) (err error) {
		now := s.cfg.Now()
		if t, err = found(tx.Task(s.scope, id)); t == nil || err != nil {
			return err
		}
		if now.Before(t.Due) {
			t = nil
			return nil
		}
		t.Owner, t.Due = dps.NewUUID(), now.Add(leaseTime)
		return tx.PutTask(s.scope, t)
	})
	if err != nil && !errors.Is(err, ErrConflict) && ctx.Err() == nil {
		s.cfg.Log.Error("taking up what a hub has yet to be told", "registrationId", id, "reason", err.Error())
	}
	if err == nil && t != nil {
		s.workOn(ctx, t)
	}
}
