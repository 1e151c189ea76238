package load

import (
	"context"
	"crypto/tls"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"

	"github.com/touchmark/touchmark/pkg/device"
)

// A member is one simulated device. Whoever took it owns it until it is put back.
type member struct {
	device device.Config          // its stamp and its proof
	tls    map[string]*tls.Config // by endpoint

	registered bool   // and the answer came
	unsure     bool   // it may be, or not: an answer was lost
	hub        string // that it was assigned
}

// A tribe is the devices of one attestation. Those that have not registered are taken in turn; those that have wait in a
// queue, the longest first.
type tribe struct {
	attestation *Attestation
	members     []*member
	forged      []*member // never accepted
	honest      *member   // with a proof that is good, and never registered
	next        atomic.Int64
	pace        *rate.Limiter
	waiting     chan *member
}

// Forgeries is how many devices of each attestation are never let in.
const Forgeries = 4

// take takes a device: one that was there before with a given probability, or when no other is left. It waits while all are
// at work, and counts that.
func (t *tribe) take(ctx context.Context, again float64, waits *atomic.Uint64) (*member, error) {
	if rand.Float64() < again {
		select {
		case m := <-t.waiting:
			return m, nil
		default: // nobody was there before
		}
	}
	if n := t.next.Add(1) - 1; n < int64(len(t.members)) {
		return t.members[n], nil
	}
	if len(t.waiting) == 0 {
		waits.Add(1)
	}
	select {
	case m := <-t.waiting:
		return m, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (t *tribe) put(m *member) { t.waiting <- m }

// members is how many devices of an attestation there are.
func (c *Config) members(a *Attestation) int {
	total := 0
	for _, a := range c.Attestations {
		total += a.Weight
	}
	n := max(c.Devices*a.Weight/total, 1)
	if a.Max > 0 {
		n = min(n, a.Max)
	}
	return n
}

// Makes is how many devices of a name's attestation [Run] makes, those for hostile callers among them.
func (c *Config) Makes(name string) int {
	for i := range c.Attestations {
		if a := &c.Attestations[i]; a.Name == name {
			return c.members(a) + Forgeries + 1
		}
	}
	return 0
}

// populate makes all devices, beside each other.
func populate(ctx context.Context, cfg *Config) ([]*tribe, error) {
	var tribes []*tribe
	eg, ctx := errgroup.WithContext(ctx)
	eg.SetLimit(runtime.GOMAXPROCS(0))
	for i := range cfg.Attestations {
		a := &cfg.Attestations[i]
		n := cfg.members(a)
		t := &tribe{attestation: a, pace: rate.NewLimiter(rate.Inf, 1), members: make([]*member, n), forged: make([]*member, Forgeries), waiting: make(chan *member, n)}
		if a.Rest > 0 {
			t.pace = rate.NewLimiter(rate.Every(a.Rest/time.Duration(n)), n)
		}
		tribes = append(tribes, t)
		make := func(dst **member, id string, device func(string) (device.Config, error)) {
			eg.Go(func() error {
				if ctx.Err() != nil {
					return ctx.Err()
				}
				d, err := device(id)
				if err != nil {
					return err
				}
				*dst, err = newMember(cfg, d)
				return err
			})
		}
		for j := range t.members {
			make(&t.members[j], fmt.Sprintf("%s-%s-%06d", cfg.Prefix, a.Name, j), a.Device)
		}
		for j := range t.forged {
			make(&t.forged[j], fmt.Sprintf("%s-%s-forged-%02d", cfg.Prefix, a.Name, j), a.Forge)
		}
		make(&t.honest, fmt.Sprintf("%s-%s-honest", cfg.Prefix, a.Name), a.Device)
	}
	return tribes, eg.Wait()
}

// newMember prepares how a device does TLS with each server. Devices without a certificate share that, unless they keep
// sessions.
func newMember(cfg *Config, d device.Config) (*member, error) {
	m := &member{device: d, tls: cfg.shared}
	if len(d.Stamp.Certificates) == 0 && !cfg.ResumeTLS {
		return m, nil
	}
	var err error
	m.tls, err = tlsConfigs(cfg, d)
	return m, err
}

func tlsConfigs(cfg *Config, d device.Config) (map[string]*tls.Config, error) {
	all := make(map[string]*tls.Config, len(cfg.Endpoints))
	d.RootCAs = cfg.RootCAs
	for _, e := range cfg.Endpoints {
		if all[e.String()] != nil {
			continue
		}
		d.Endpoint = e.String()
		tc, err := d.NewTLS()
		if err != nil {
			return nil, err
		}
		if cfg.ResumeTLS {
			tc.ClientSessionCache = tls.NewLRUClientSessionCache(1)
		}
		all[e.String()] = tc
	}
	return all, nil
}
