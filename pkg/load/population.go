package load

import (
	"context"
	"crypto/tls"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"github.com/touchmark/touchmark/pkg/device"
)

// A member is one simulated device. Whoever took it owns it until it is put back.
type member struct {
	stamp device.Stamp
	tls   map[string]*tls.Config // by server name

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
	waiting     chan *member
}

const forgeries = 16

// take takes a device: one that was there before with a given probability, or when no other is left. It waits while all are
// at work.
func (t *tribe) take(ctx context.Context, again float64) (*member, error) {
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
	select {
	case m := <-t.waiting:
		return m, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (t *tribe) put(m *member) { t.waiting <- m }

// populate makes all devices, beside each other.
func populate(ctx context.Context, cfg *Config) ([]*tribe, error) {
	total := 0
	for _, a := range cfg.Attestations {
		total += a.Weight
	}
	var tribes []*tribe
	eg, ctx := errgroup.WithContext(ctx)
	eg.SetLimit(runtime.GOMAXPROCS(0))
	base := device.Config{RootCAs: cfg.RootCAs}
	for i := range cfg.Attestations {
		a := &cfg.Attestations[i]
		n := max(cfg.Devices*a.Weight/total, 1)
		t := &tribe{attestation: a, members: make([]*member, n), forged: make([]*member, forgeries), waiting: make(chan *member, n)}
		tribes = append(tribes, t)
		make := func(dst **member, id string, stamp func(string) (device.Stamp, error)) {
			eg.Go(func() error {
				if ctx.Err() != nil {
					return ctx.Err()
				}
				s, err := stamp(id)
				if err != nil {
					return err
				}
				*dst, err = newMember(cfg, base, s)
				return err
			})
		}
		for j := range t.members {
			make(&t.members[j], fmt.Sprintf("%s-%s-%06d", cfg.Prefix, a.Name, j), a.Stamp)
		}
		for j := range t.forged {
			make(&t.forged[j], fmt.Sprintf("%s-%s-forged-%02d", cfg.Prefix, a.Name, j), a.Forge)
		}
		make(&t.honest, fmt.Sprintf("%s-%s-honest", cfg.Prefix, a.Name), a.Stamp)
	}
	return tribes, eg.Wait()
}

// newMember prepares how a device does TLS with each server. Devices without a certificate share that, unless they keep
// sessions.
func newMember(cfg *Config, base device.Config, s device.Stamp) (*member, error) {
	m := &member{stamp: s, tls: cfg.shared}
	if len(s.Certificates) == 0 && !cfg.ResumeTLS {
		return m, nil
	}
	base.Stamp = s
	var err error
	m.tls, err = tlsConfigs(cfg, base)
	return m, err
}

func tlsConfigs(cfg *Config, base device.Config) (map[string]*tls.Config, error) {
	all := make(map[string]*tls.Config, len(cfg.Endpoints))
	for _, e := range cfg.Endpoints {
		if all[e.String()] != nil {
			continue
		}
		base.Endpoint = e.String()
		tc, err := base.NewTLS()
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
