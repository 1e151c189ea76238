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
	// maxWorkers is how many tasks a process works at, and maxPerHub how many that wait for one hub: a hub that hangs keeps no other
	// waiting.
	maxWorkers = 64
	maxPerHub  = 8
	dueAtOnce  = 512
)

// workers counts who works at what.
type workers struct {
	wg   sync.WaitGroup
	mu   sync.Mutex
	all  int            // under mu
	hubs map[string]int // under mu, by scope and folded name
}

// begin runs f if there is a place for another one at the hub.
func (w *workers) begin(t *Task, f func()) bool {
	key := t.Scope + "\x00" + strings.ToLower(t.Hub)
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.all >= maxWorkers || w.hubs[key] >= maxPerHub {
		return false
	}
	w.all++
	w.hubs[key]++
	w.wg.Go(func() {
		defer func() {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.all--
			if w.hubs[key]--; w.hubs[key] == 0 {
				delete(w.hubs, key)
			}
		}()
		f()
	})
	return true
}

// Provision works at what the hubs of all scopes have yet to be told, until the context ends, and returns when nothing is under
// way. Any number of processes may do so with one store.
func (s *Scopes) Provision(ctx context.Context) {
	w := &workers{hubs: make(map[string]int)}
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
	w := &workers{hubs: make(map[string]int)}
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
	var due []*Task
	if err := s.cfg.Store.View(ctx, func(tx Tx) (err error) { due, err = tx.DueTasks(now(), maxPerHub, dueAtOnce); return err }); err != nil {
		return 0, err
	}
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
