package hub

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/touchmark/touchmark/pkg/registration"
)

// PoolConfig says how a Pool works.
type PoolConfig struct {
	// Base is how hubs are opened; its Hub does not count.
	Base Config
	// PublicOnly says for which scopes Base.PublicOnly holds, if not for all; nil is for no more.
	PublicOnly func(scope string) bool
	// MaxHubs that are open at once; 0 is 256. The one that was longest without a call goes.
	MaxHubs int
	// Concurrency is how many calls one hub is asked at a time; 0 is 32. Four times as many may wait; more are turned away.
	Concurrency int
	// Observe is told of each call: the hub's name, the method in lower camel case, "ok", an HTTP status or a word for what
	// happened without one (Timeout, Unreachable, Canceled, CircuitOpen, Busy, …), and how long it took. May be nil.
	Observe func(hub, operation, code string, d time.Duration)
}

// A Pool keeps hubs open, one for each scope, name and connection string. A hub that does not answer is not asked for a while,
// and calls of it fail at once, Temporary and with RetryAfter; and so are those that would have to wait in too long a line.
type Pool struct {
	cfg  PoolConfig
	busy sync.WaitGroup // calls under way

	mu      sync.Mutex
	open    map[poolKey]*entry // under mu
	closed  bool               // under mu
	counter uint64             // under mu: counts calls, so as to know who was last
}

type poolKey struct{ scope, name string }

type entry struct {
	linked  registration.LinkedHub
	hub     registration.Hub
	breaker breaker
	slots   chan struct{}
	waiting atomic.Int64

	calls   int    // under Pool.mu
	last    uint64 // under Pool.mu
	retired bool   // under Pool.mu: not in the map any more, to be closed after its last call
}

// NewPool returns a pool without hubs.
func NewPool(cfg PoolConfig) *Pool {
	cfg.Base.defaults()
	if cfg.MaxHubs <= 0 {
		cfg.MaxHubs = 256
	}
	if cfg.Concurrency <= 0 {
		cfg.Concurrency = 32
	}
	return &Pool{cfg: cfg, open: map[poolKey]*entry{}}
}

// Hub returns a hub of a scope, which needs no closing and is good for as long as the pool is. It is opened when it is first
// called. Who has it with another connection string later closes the connections of the former one. The error is that of a connection
// string.
func (p *Pool) Hub(scope string, h registration.LinkedHub) (registration.Hub, error) {
	if _, err := ParseConnection(h.Kind, h.ConnectionString); err != nil {
		return nil, fmt.Errorf("linked hub %s: %w", h.Name, err)
	}
	return &pooled{p, poolKey{scope, strings.ToLower(h.Name)}, h}, nil
}

// Close waits for the calls that are under way and closes all hubs. Later calls fail.
func (p *Pool) Close() error {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	p.busy.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	var errs []error
	for key, e := range p.open {
		delete(p.open, key)
		errs = append(errs, e.close())
	}
	return errors.Join(errs...)
}

func (e *entry) close() error {
	if c, ok := e.hub.(io.Closer); ok {
		return c.Close()
	}
	return nil
}

// acquire returns the entry of a hub, opened; release is owed.
func (p *Pool) acquire(key poolKey, h registration.LinkedHub) (*entry, error) {
	var idle []*entry
	defer func() {
		for _, e := range idle {
			e.close()
		}
	}()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, newError(h.Name, "Closed", true, errors.New("the service is stopping"))
	}
	e := p.open[key]
	if e != nil && (e.linked.Kind != h.Kind || e.linked.ConnectionString != h.ConnectionString) {
		idle = p.retire(key, idle)
		e = nil
	}
	if e == nil {
		if len(p.open) >= p.cfg.MaxHubs {
			var oldest *poolKey
			for k, o := range p.open {
				if o.calls == 0 && (oldest == nil || o.last < p.open[*oldest].last) {
					oldest = &k
				}
			}
			if oldest == nil {
				return nil, busy(h.Name)
			}
			idle = p.retire(*oldest, idle)
		}
		cfg := p.cfg.Base
		cfg.Hub = h
		cfg.PublicOnly = cfg.PublicOnly || p.cfg.PublicOnly != nil && p.cfg.PublicOnly(key.scope)
		opened, err := Open(cfg)
		if err != nil {
			return nil, newError(h.Name, codeArgument, false, err)
		}
		e = &entry{linked: h, hub: opened, slots: make(chan struct{}, p.cfg.Concurrency)}
		p.open[key] = e
	}
	p.counter++
	e.calls, e.last = e.calls+1, p.counter
	p.busy.Add(1)
	return e, nil
}

// retire takes an entry out of the map, with p.mu held, and adds it to idle if it can be closed.
func (p *Pool) retire(key poolKey, idle []*entry) []*entry {
	e := p.open[key]
	delete(p.open, key)
	if e.retired = true; e.calls == 0 {
		idle = append(idle, e)
	}
	return idle
}

func (p *Pool) release(e *entry) {
	defer p.busy.Done()
	p.mu.Lock()
	e.calls--
	last := e.retired && e.calls == 0
	p.mu.Unlock()
	if last {
		e.close()
	}
}

func busy(name string) *registration.HubError {
	e := newError(name, codeBusy, true, errors.New("too many calls wait for it"))
	e.RetryAfter = minPause
	return e
}

func isOpen(name string, wait time.Duration, why error) *registration.HubError {
	e := newError(name, codeOpen, true, why)
	e.RetryAfter = wait
	return e
}

// pooled is a hub of a pool.
type pooled struct {
	pool   *Pool
	key    poolKey
	linked registration.LinkedHub
}

// through makes one call of a hub of the pool.
func through[T any](ctx context.Context, h *pooled, operation string, call func(registration.Hub) (T, error)) (v T, err error) {
	start := time.Now()
	if observe := h.pool.cfg.Observe; observe != nil {
		defer func() { observe(h.linked.Name, operation, outcome(err), time.Since(start)) }()
	}
	e, err := h.pool.acquire(h.key, h.linked)
	if err != nil {
		return v, err
	}
	defer h.pool.release(e)
	leave, err := e.enter(ctx, h.pool.cfg.Base)
	if err != nil {
		return v, err
	}
	defer func() { leave(err) }()
	return call(e.hub)
}

// enter waits for a slot, for no longer than a call may take.
func (e *entry) enter(ctx context.Context, cfg Config) (leave func(error), err error) {
	if wait := e.breaker.open(cfg.Now()); wait > 0 {
		return nil, isOpen(e.linked.Name, wait, e.breaker.reason())
	}
	select {
	case e.slots <- struct{}{}:
	default:
		if e.waiting.Add(1) > 4*int64(cap(e.slots)) {
			e.waiting.Add(-1)
			return nil, busy(e.linked.Name)
		}
		ctx, cancel := context.WithTimeout(ctx, cfg.Timeout)
		defer cancel()
		select {
		case e.slots <- struct{}{}:
			e.waiting.Add(-1)
		case <-ctx.Done():
			e.waiting.Add(-1)
			return nil, noAnswer(e.linked.Name, "waiting for its turn", ctx.Err())
		}
	}
	wait, probe := e.breaker.enter(cfg.Now())
	if wait > 0 {
		<-e.slots
		return nil, isOpen(e.linked.Name, wait, e.breaker.reason())
	}
	return func(err error) {
		e.breaker.leave(cfg.Now(), judge(err), probe, err)
		<-e.slots
	}, nil
}

func nothing(err error) (struct{}, error) { return struct{}{}, err }

func (h *pooled) Check(ctx context.Context) error {
	_, err := through(ctx, h, "check", func(to registration.Hub) (struct{}, error) { return nothing(to.Check(ctx)) })
	return err
}

func (h *pooled) Device(ctx context.Context, id string) (*registration.HubDevice, error) {
	return through(ctx, h, "device", func(to registration.Hub) (*registration.HubDevice, error) { return to.Device(ctx, id) })
}

func (h *pooled) Admit(ctx context.Context, d *registration.HubDevice) (bool, error) {
	return through(ctx, h, "admit", func(to registration.Hub) (bool, error) { return to.Admit(ctx, d) })
}

func (h *pooled) Remove(ctx context.Context, id string) error {
	_, err := through(ctx, h, "remove", func(to registration.Hub) (struct{}, error) { return nothing(to.Remove(ctx, id)) })
	return err
}

func (h *pooled) Twin(ctx context.Context, id string) (*registration.HubTwin, error) {
	return through(ctx, h, "twin", func(to registration.Hub) (*registration.HubTwin, error) { return to.Twin(ctx, id) })
}

func (h *pooled) MergeTwin(ctx context.Context, id string, t *registration.HubTwin) error {
	_, err := through(ctx, h, "mergeTwin", func(to registration.Hub) (struct{}, error) { return nothing(to.MergeTwin(ctx, id, t)) })
	return err
}
