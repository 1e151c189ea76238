package limit

import (
	"context"
	"errors"
	"hash/maphash"
	"strconv"
	"sync"
	"time"

	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
)

// Profiles holds scopes to the rates of their quota profiles ([registration.Quotas]): it refuses with 429 and a Retry-After, as
// Azure does, where a [Limiter] puts off. Minutes are counted from their beginning, so a rate is exact, and whoever is refused is
// told when the next one begins. Each replica counts by itself: n replicas let n times as much through. A Profiles may be used
// by many goroutines.
type Profiles struct {
	cfg  ProfilesConfig
	seed maphash.Seed

	mu       sync.Mutex
	scopes   map[profileKey]*window
	devices  map[uint64]int // polls of a device in the window
	pollsEnd time.Time
}

// ProfilesConfig is whom profiles stand in front of.
type ProfilesConfig struct {
	Registrar registration.Registrar
	// Quotas returns those of a folded ID scope, at once; all zero where there are none, or they are not known yet.
	Quotas func(folded string) registration.Quotas
	// Throttled is told of every refusal: api is "device" or "service", limit what was exceeded. Nil is nobody.
	Throttled func(api, limit string)
}

type profileKey struct{ scope, limit string }

type window struct {
	end time.Time
	n   int
}

const (
	pollWindow = 10 * time.Second
	// maxProfiled is how many windows are kept; those that are over make room.
	maxProfiled = 4096
	maxPollers  = 1 << 18
)

var _ registration.Registrar = (*Profiles)(nil)

// NewProfiles returns profiles.
func NewProfiles(cfg ProfilesConfig) *Profiles {
	return &Profiles{cfg: cfg, seed: maphash.MakeSeed(), scopes: make(map[profileKey]*window), devices: make(map[uint64]int)}
}

// count counts one more in a window of a scope, or refuses it.
func (p *Profiles) count(api, scope, limit string, most int, length time.Duration) error {
	if most <= 0 {
		return nil
	}
	now := time.Now()
	p.mu.Lock()
	k := profileKey{scope, limit}
	w := p.scopes[k]
	if w == nil {
		if len(p.scopes) >= maxProfiled {
			for k, w := range p.scopes {
				if !now.Before(w.end) {
					delete(p.scopes, k)
				}
			}
		}
		w = &window{}
		p.scopes[k] = w
	}
	if !now.Before(w.end) {
		w.n, w.end = 0, now.Truncate(length).Add(length)
	}
	w.n++
	n, left := w.n, w.end.Sub(now)
	p.mu.Unlock()
	if n <= most {
		return nil
	}
	return p.refuse(api, limit, left)
}

func (p *Profiles) refuse(api, limit string, left time.Duration) error {
	if p.cfg.Throttled != nil {
		p.cfg.Throttled(api, limit)
	}
	e := dps.NewError(dps.CodeThrottled, "Too many requests; try again later", errors.New("quota: "+limit))
	e.RetryAfter = strconv.Itoa(int((left + time.Second - 1) / time.Second))
	return e
}

// poll counts a request of a device for what became of an operation. All devices share one window of ten seconds, and are
// forgotten with it.
func (p *Profiles) poll(req *registration.Request, scope string, most int) error {
	if most <= 0 {
		return nil
	}
	key := maphash.Comparable(p.seed, [2]string{scope, dps.Fold(req.RegistrationID)})
	now := time.Now()
	p.mu.Lock()
	if !now.Before(p.pollsEnd) {
		clear(p.devices)
		p.pollsEnd = now.Truncate(pollWindow).Add(pollWindow)
	}
	if len(p.devices) < maxPollers || p.devices[key] > 0 {
		p.devices[key]++
	}
	n, left := p.devices[key], p.pollsEnd.Sub(now)
	p.mu.Unlock()
	if n <= most {
		return nil
	}
	return p.refuse("device", "polls", left)
}

// Service refuses an operation of the service API, or lets it through; quotas are those of the scope. It is for calls that are
// authorized: who is not must not use up what a scope has.
func (p *Profiles) Service(scope string, quotas registration.Quotas) error {
	return p.count("service", dps.Fold(scope), "operations", quotas.ServiceCalls, time.Minute)
}

// Register implements [registration.Registrar].
func (p *Profiles) Register(ctx context.Context, req *registration.Request) (*dps.OperationStatus, error) {
	scope := dps.Fold(req.IDScope)
	if err := p.count("device", scope, "registrations", p.cfg.Quotas(scope).Registers, time.Minute); err != nil {
		return nil, err
	}
	return p.cfg.Registrar.Register(ctx, req)
}

// Status implements [registration.Registrar].
func (p *Profiles) Status(ctx context.Context, req *registration.Request, operationID string) (*dps.OperationStatus, error) {
	scope := dps.Fold(req.IDScope)
	if err := p.poll(req, scope, p.cfg.Quotas(scope).Polls); err != nil {
		return nil, err
	}
	return p.cfg.Registrar.Status(ctx, req, operationID)
}

// Lookup implements [registration.Registrar].
func (p *Profiles) Lookup(ctx context.Context, req *registration.Request) (*dps.RegistrationState, error) {
	scope := dps.Fold(req.IDScope)
	if err := p.poll(req, scope, p.cfg.Quotas(scope).Polls); err != nil {
		return nil, err
	}
	return p.cfg.Registrar.Lookup(ctx, req)
}

// Challenge implements [registration.Registrar].
func (p *Profiles) Challenge(ctx context.Context, req *registration.Request) ([]byte, error) {
	return p.cfg.Registrar.Challenge(ctx, req)
}
