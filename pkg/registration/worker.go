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
	// maxWorkers is how many tasks a process works at, maxPerScope how many of one scope, and maxPerHub how many that wait for one
	// hub: a hub that hangs keeps no other waiting, nor do many of a tenant's another tenant's.
	maxWorkers  = 64
	maxPerScope = 32
	maxPerHub   = 8
	dueAtOnce   = 512
	// duePages is how many times as many are looked at behind those that have no place yet.
	duePages = 16
)

// workers counts who works at what.
type workers struct {
	wg   sync.WaitGroup
	mu   sync.Mutex
	all  int            // under mu
	busy map[string]int // under mu, by scope, and by scope and folded hub
}

// begin runs f if there is a place for another one at the hub.
func (w *workers) begin(t *Task, f func()) bool {
	hub := t.Scope + "\x00" + strings.ToLower(t.Hub)
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.all >= maxWorkers || w.busy[t.Scope] >= maxPerScope || w.busy[hub] >= maxPerHub {
		return false
	}
	w.all++
	w.busy[t.Scope]++
	w.busy[hub]++
	w.wg.Go(func() {
		defer func() {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.all--
			for _, key := range []string{t.Scope, hub} {
				if w.busy[key]--; w.busy[key] == 0 {
					delete(w.busy, key)
				}
			}
		}()
		f()
	})
	return true
}

func (w *workers) full() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.all >= maxWorkers
}

// Provision works at what the hubs of all scopes have yet to be told, until the context ends, and returns when nothing is under
// way. Any number of processes may do so with one store.
func (s *Scopes) Provision(ctx context.Context) {
	w := &workers{busy: make(map[string]int)}
	defer w.wg.Wait()
	tick := time.NewTicker(workPeriod)
	defer tick.Stop()
	for {
		if _, err := s.beginDue(ctx, w); err != nil && ctx.Err() == nil {
			s.cfg.Log.Error("reading what hubs have yet to be told", "reason", err.Error())
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// ProvisionDue works once at each task that is due, and returns how many there were.
func (s *Scopes) ProvisionDue(ctx context.Context) (n int, err error) {
	w := &workers{busy: make(map[string]int)}
	defer w.wg.Wait()
	for {
		begun, err := s.beginDue(ctx, w)
		n += begun
		if w.wg.Wait(); err != nil || begun == 0 {
			return n, err
		}
	}
}

func (s *Scopes) beginDue(ctx context.Context, w *workers) (n int, err error) {
	now := time.Now
	if s.cfg.Now != nil {
		now = s.cfg.Now
	}
	var from time.Time
	for range duePages {
		var due []*Task
		if err := s.cfg.Store.View(ctx, func(tx Tx) (err error) { due, err = tx.DueTasks(from, now(), dueAtOnce); return err }); err != nil {
			return n, err
		}
		begun, err := s.beginAll(ctx, w, due)
		if n += begun; err != nil || begun == len(due) || len(due) < dueAtOnce || w.full() {
			return n, err
		}
		from = due[len(due)-1].Due
	}
	return n, nil
}

// beginAll begins those tasks that there is a place for, and returns how many.
func (s *Scopes) beginAll(ctx context.Context, w *workers, due []*Task) (n int, err error) {
	for _, t := range due {
		if ctx.Err() != nil {
			break
		}
		svc, err := s.Service(ctx, t.Scope)
		if errors.Is(err, ErrNotFound) {
			continue // a scope that is being deleted takes its tasks along
		}
		if err != nil {
			return n, err
		}
		if !w.begin(t, func() { svc.work(ctx, t.ID) }) {
			continue
		}
		n++
	}
	return n, nil
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
