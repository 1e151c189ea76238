package registration

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/touchmark/touchmark/pkg/dps"
)

// Scopes answers for every scope in a store: it has a [Service] for each that is asked for, and brings devices to the one of
// their ID scope. It may be used by many goroutines.
type Scopes struct {
	cfg  ScopesConfig
	mu   sync.Mutex
	open map[string]*Service // by folded ID
	// strangers are folded IDs that were no scope's, with the time of asking: devices make them up, and the store is not asked
	// about each again and again.
	strangers map[string]time.Time
}

// ScopesConfig is what services of many scopes need.
type ScopesConfig struct {
	Config
	// Own completes what a scope's service has of its own, before it is made; nil for nothing.
	Own func(sc *Scope, cfg *Config) error
}

var _ Registrar = (*Scopes)(nil)

const (
	// maxOpenScopes is how many scopes' services are kept; a random one makes room, and is made again when it is asked for.
	maxOpenScopes = 10000
	// strangerTime is for how long an ID that is no scope's stays so: a new scope may be unknown to another replica for as long.
	strangerTime = time.Second
	maxStrange   = 4096
)

// NewScopes returns the services of all scopes of the config's store. Scope and Settings of the config are not looked at.
func NewScopes(cfg ScopesConfig) *Scopes {
	return &Scopes{cfg: cfg, open: make(map[string]*Service)}
}

// Store returns the store that all scopes are in.
func (s *Scopes) Store() Store { return s.cfg.Store }

// Service returns the service of an ID scope, or ErrNotFound. One that was deleted since it was first asked for is still
// returned, and lets nobody in.
func (s *Scopes) Service(ctx context.Context, id string) (*Service, error) {
	folded := dps.Fold(id)
	s.mu.Lock()
	svc := s.open[folded]
	since, strange := s.strangers[folded]
	s.mu.Unlock()
	if svc != nil {
		return svc, nil
	}
	if strange && time.Since(since) < strangerTime {
		return nil, ErrNotFound
	}
	svc, err := s.make(ctx, func(tx Tx) (*Scope, error) { return tx.Scope(folded) })
	if errors.Is(err, ErrNotFound) {
		s.mu.Lock()
		put(&s.strangers, maxStrange, folded, time.Now())
		s.mu.Unlock()
	}
	return svc, err
}

// Known reports whether there is a scope of that folded ID, as far as can be said without the store.
func (s *Scopes) Known(folded string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.open[folded] != nil
}

// Quotas returns those of the scope of a folded ID, as far as can be said without the store: none for a scope that nobody has
// asked for yet.
func (s *Scopes) Quotas(folded string) Quotas {
	s.mu.Lock()
	svc := s.open[folded]
	s.mu.Unlock()
	if svc != nil {
		if set := svc.settings.Load(); set != nil {
			return set.Limits()
		}
	}
	return Quotas{}
}

// ByName returns the service of that name, or ErrNotFound.
func (s *Scopes) ByName(ctx context.Context, name string) (*Service, error) {
	return s.make(ctx, func(tx Tx) (*Scope, error) { return tx.ScopeByName(name) })
}

func (s *Scopes) make(ctx context.Context, find func(Tx) (*Scope, error)) (*Service, error) {
	var sc *Scope
	if err := s.cfg.Store.View(ctx, func(tx Tx) (err error) { sc, err = find(tx); return err }); err != nil {
		return nil, err
	}
	if sc.Deleting && sc.Erasing == nil { // one that is being erased goes on, and lets nobody in until then
		return nil, ErrNotFound
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if svc := s.open[dps.Fold(sc.ID)]; svc != nil {
		return svc, nil
	}
	cfg := s.cfg.Config
	cfg.Scope, cfg.Settings = sc.ID, Settings{}
	if s.cfg.Own != nil {
		if err := s.cfg.Own(sc, &cfg); err != nil {
			return nil, err
		}
	}
	svc := New(cfg)
	put(&s.open, maxOpenScopes, dps.Fold(sc.ID), svc)
	return svc, nil
}

// Forget drops what is kept of a scope that was deleted.
func (s *Scopes) Forget(id string) {
	s.mu.Lock()
	delete(s.open, dps.Fold(id))
	s.mu.Unlock()
}

// of returns the service that a device asks for. Who names a scope that there is not learns no more than whoever is not
// enrolled.
func (s *Scopes) of(ctx context.Context, req *Request) (*Service, error) {
	if len(req.IDScope) > dps.MaxIDScope {
		return nil, s.unknown(req, &broken{"scope", "ID scope is too long"})
	}
	svc, err := s.Service(ctx, req.IDScope)
	if errors.Is(err, ErrNotFound) {
		return nil, s.unknown(req, &broken{"scope", "unknown ID scope"})
	}
	return svc, err
}

func (s *Scopes) unknown(req *Request, cause error) error {
	svc := Service{cfg: s.cfg.Config}
	return svc.logged(req, "register", refuse(cause))
}

// Register implements [Registrar].
func (s *Scopes) Register(ctx context.Context, req *Request) (*dps.OperationStatus, error) {
	svc, err := s.of(ctx, req)
	if err != nil {
		return nil, err
	}
	return svc.Register(ctx, req)
}

// Status implements [Registrar].
func (s *Scopes) Status(ctx context.Context, req *Request, operationID string) (*dps.OperationStatus, error) {
	svc, err := s.of(ctx, req)
	if err != nil {
		return nil, err
	}
	return svc.Status(ctx, req, operationID)
}

// Lookup implements [Registrar].
func (s *Scopes) Lookup(ctx context.Context, req *Request) (*dps.RegistrationState, error) {
	svc, err := s.of(ctx, req)
	if err != nil {
		return nil, err
	}
	return svc.Lookup(ctx, req)
}

// Challenge implements [Registrar].
func (s *Scopes) Challenge(ctx context.Context, req *Request) ([]byte, error) {
	svc, err := s.of(ctx, req)
	if err != nil {
		return nil, err
	}
	return svc.Challenge(ctx, req)
}
