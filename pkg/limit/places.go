package limit

import (
	"container/list"
	"context"
	"time"
)

// places is what is worked on at a time, shared between scopes. No scope waits that may take one.
type places struct {
	free  int
	queue list.List // of *scope that have something waiting, the next one in front
}

// share is how many places a scope may hold for each that is free: one alone gets three quarters of them, two get three
// sevenths each, and who has none takes any.
const share = 3

func (p *places) open(s *scope) bool { return s.held < share*p.free }

// A waiter is closed when it has a place.
type waiter chan struct{}

// enter takes a place for a scope. It fails when too many of the scope wait already, or none came in time.
func (l *Limiter) enter(ctx context.Context, s *scope) bool {
	l.mu.Lock()
	if s.turn == nil && l.places.open(s) {
		l.places.free--
		s.held++
		l.mu.Unlock()
		return true
	}
	if s.waiting.Len() >= l.cfg.Queue {
		l.mu.Unlock()
		return false
	}
	w := make(waiter)
	e := s.waiting.PushBack(w)
	if s.turn == nil {
		s.turn = l.places.queue.PushBack(s)
	}
	l.mu.Unlock()

	timer := time.NewTimer(l.cfg.Wait)
	defer timer.Stop()
	select {
	case <-w:
		return true
	case <-timer.C:
	case <-ctx.Done():
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case <-w: // in the meantime
		return true
	default:
	}
	l.unqueue(s, e)
	return false
}

// unqueue ends a waiting, and the scope's turns with its last.
func (l *Limiter) unqueue(s *scope, e *list.Element) {
	s.waiting.Remove(e)
	if s.waiting.Len() == 0 {
		l.places.queue.Remove(s.turn)
		s.turn = nil
	}
}

// leave gives a place back, and hands out what can be. It passes by scopes that hold too much, and those hold a place each.
func (l *Limiter) leave(s *scope) {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := &l.places
	p.free++
	s.held--
	for e := p.queue.Front(); e != nil && p.free > 0; {
		s := e.Value.(*scope)
		next := e.Next()
		if p.open(s) {
			p.free--
			s.held++
			p.queue.MoveToBack(e)
			first := s.waiting.Front()
			close(first.Value.(waiter))
			l.unqueue(s, first)
		}
		e = next
	}
}
