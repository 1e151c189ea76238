// Package load has many simulated devices register at a deployment of one's own: it measures how long they wait, and checks
// every answer that they get.
//
// [Run] takes devices from [Attestation]s, and lets them come in by the protocols of a [Mix] to [Endpoint]s: at a rate,
// whatever the service makes of it, or so many at a time. A share of the callers is hostile; what each of them must be
// answered is known, too. All devices, with their keys, are made before the first one calls, and nothing grows afterwards.
//
// At a rate, a device's time counts from when it should have called and not from when there was room for it: a service
// that falls behind shows as latency and not as fewer callers.
package load

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/touchmark/touchmark/pkg/device"
	"github.com/touchmark/touchmark/pkg/dps"
)

// Config says who calls, where and how often.
type Config struct {
	// Endpoints says where each protocol of the mix is spoken.
	Endpoints map[string]*Endpoint
	Protocols Mix
	// RootCAs are what the service's certificate is checked against; nil means the system's.
	RootCAs *x509.CertPool
	// Attestations are how devices prove themselves, by weight.
	Attestations []Attestation
	// Prefix begins every registration ID. Devices are new to the service where nobody used it before.
	Prefix string
	// Devices is how many there are; once all of them came they come again.
	Devices int
	// Rate is how many call in a second, however many still wait. Where it is zero, Concurrency is how many are there at a
	// time, each followed by the next one.
	Rate        float64
	Concurrency int
	// Ramp is how long it takes to come to that; it is part of Duration, after which nobody new calls.
	Ramp, Duration time.Duration
	// Reconnect is the share of callers who were there before, and Hostile of those who mean harm, from 0 to 1.
	Reconnect, Hostile float64
	// Hubs are those that may be assigned; empty for any.
	Hubs []string
	// ResumeTLS has a device that comes again resume its TLS session, where the service lets it.
	ResumeTLS bool
	// Sources spreads callers over that many addresses of 127.0.0.0/8, and hostile ones over as many others; up to one means
	// that the system chooses. Only Linux has them.
	Sources int
	// Timeout is how long a device waits; zero means 30 s.
	Timeout time.Duration
	// MaxOutstanding bounds how many are there at a time; zero means 10,000. Who would be one more calls later, and the time
	// until then counts.
	MaxOutstanding int
	// WatchPID is a process of this machine to watch; zero for none.
	WatchPID int
	// Progress is told once a second how it goes; nil tells nobody.
	Progress func(Progress)

	shared map[string]*tls.Config // of devices without a certificate
}

// Progress is how a load goes.
type Progress struct {
	Elapsed             time.Duration
	Done, Errors, Wrong uint64
	Rate                float64 // in the last second
	Outstanding         int64
	P50, P99            time.Duration
	Hostile             uint64
}

func (c *Config) check() error {
	switch {
	case len(c.Attestations) == 0 || len(c.Protocols) == 0:
		return errors.New("nobody to call, or no protocol to call by")
	case c.Devices < 1 || c.Duration <= 0 || c.Ramp < 0 || c.Ramp > c.Duration:
		return errors.New("want some devices, some time, and no longer ramp than that")
	case c.Rate < 0 || math.IsNaN(c.Rate) || math.IsInf(c.Rate, 0) || c.Concurrency < 0 || (c.Rate == 0) == (c.Concurrency == 0):
		return errors.New("want a rate or a concurrency")
	case !(c.Reconnect >= 0 && c.Reconnect <= 1 && c.Hostile >= 0 && c.Hostile <= 1):
		return errors.New("shares are from 0 to 1")
	case c.Sources < 0 || c.Sources > 250:
		return errors.New("want up to 250 source addresses")
	}
	if c.WatchPID != 0 {
		if _, err := sample(c.WatchPID); err != nil {
			return fmt.Errorf("nothing to watch: %w", err)
		}
	}
	for _, p := range c.Protocols {
		if c.Endpoints[p.Name] == nil {
			return fmt.Errorf("no endpoint for %s", p.Name)
		}
	}
	if c.Timeout == 0 {
		c.Timeout = 30 * time.Second
	}
	if c.MaxOutstanding == 0 {
		c.MaxOutstanding = 10_000
	}
	return nil
}

// run is a load that is under way.
type run struct {
	cfg      *Config
	start    time.Time
	tribes   []*tribe
	attested Mix   // as tribes are
	mixes    []Mix // of protocols, by tribe
	ledger   *ledger

	places      chan struct{} // one per caller
	outstanding atomic.Int64
	lastOp      atomic.Pointer[string] // an operation of somebody's
	attack      atomic.Uint64          // counts through the hostile kinds
	source      atomic.Uint64
	wait        sync.WaitGroup
}

// Run makes the devices, lets them call, and reports. When the context ends nobody new calls, whoever is there leaves, and the
// report is of those who were answered before; the error is the context's then. Other errors are of the configuration or of
// the first connection, which is made to each endpoint before any device calls.
func Run(ctx context.Context, cfg Config) (*Report, error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	var err error
	if cfg.shared, err = tlsConfigs(&cfg, device.Config{}); err != nil {
		return nil, err
	}
	r := &run{cfg: &cfg, ledger: newLedger(&cfg), places: make(chan struct{}, cfg.MaxOutstanding)}
	for _, a := range cfg.Attestations {
		r.attested = append(r.attested, Weight{a.Name, a.Weight})
		mix := slices.DeleteFunc(slices.Clone(cfg.Protocols), func(w Weight) bool { return len(a.Protocols) > 0 && !slices.Contains(a.Protocols, w.Name) })
		if len(mix) == 0 {
			return nil, fmt.Errorf("%s needs one of the protocols %v", a.Name, a.Protocols)
		}
		r.mixes = append(r.mixes, mix)
	}
	for _, p := range cfg.Protocols {
		if err := r.reach(ctx, p.Name); err != nil {
			return nil, fmt.Errorf("reaching %s at %s: %w", p.Name, cfg.Endpoints[p.Name], err)
		}
	}
	if r.tribes, err = populate(ctx, &cfg); err != nil {
		return nil, err
	}
	return r.run(ctx)
}

// reach connects once.
func (r *run) reach(ctx context.Context, protocol string) error {
	c, err := device.Dial(ctx, r.config(protocol, &member{tls: r.cfg.shared}, nil, false))
	if err != nil {
		return err
	}
	return c.Close()
}

func (r *run) run(ctx context.Context) (*Report, error) {
	runtime.GC() // of the making of devices
	r.start = time.Now()
	own, _ := sample(os.Getpid())
	arrivals, stop := context.WithTimeout(ctx, r.cfg.Duration)
	defer stop()
	var watch *Watch
	watching, unwatch := context.WithCancel(context.WithoutCancel(ctx))
	var beside sync.WaitGroup
	if r.cfg.WatchPID != 0 {
		watch = &Watch{PID: r.cfg.WatchPID}
		beside.Go(func() { watch.run(watching, r.start) })
	}
	if r.cfg.Progress != nil {
		beside.Go(func() { r.progress(watching) })
	}
	if r.cfg.Rate > 0 {
		r.open(ctx, arrivals)
	} else {
		r.closed(ctx, arrivals)
	}
	took := time.Since(r.start)
	r.wait.Wait()
	unwatch()
	beside.Wait()
	rep := r.ledger.report(r, took, watch)
	if end, err := sample(os.Getpid()); err == nil {
		rep.Client.CPUs = (end.CPU - own.CPU) / time.Since(r.start).Seconds()
		rep.Client.Share = rep.Client.CPUs / float64(runtime.NumCPU())
	}
	return rep, ctx.Err()
}

// due returns when the n-th caller, from 0, is due after the start: the rate grows evenly over the ramp, and stays.
func due(n uint64, rate float64, ramp time.Duration) time.Duration {
	inRamp := rate * ramp.Seconds() / 2
	if f := float64(n); f >= inRamp {
		return ramp + time.Duration((f-inRamp)/rate*float64(time.Second))
	}
	return time.Duration(math.Sqrt(2*float64(n)*ramp.Seconds()/rate) * float64(time.Second))
}

// open lets callers come at their rate.
func (r *run) open(ctx, arrivals context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	var free time.Time // when there was room again
	for n := uint64(0); ; n++ {
		intended := r.start.Add(due(n, r.cfg.Rate, r.cfg.Ramp))
		if intended.Sub(r.start) >= r.cfg.Duration {
			return
		}
		if wait := time.Until(intended); wait > 0 {
			timer.Reset(wait)
			select {
			case <-timer.C:
			case <-arrivals.Done():
				return
			}
		}
		ready := intended
		if free.After(ready) {
			ready = free
		}
		r.ledger.late.Add(time.Since(ready)) // our own doing
		select {
		case r.places <- struct{}{}:
		default:
			r.ledger.full.Add(1)
			select {
			case r.places <- struct{}{}:
				free = time.Now()
			case <-arrivals.Done():
				for ; ctx.Err() == nil && due(n, r.cfg.Rate, r.cfg.Ramp) < r.cfg.Duration; n++ {
					r.ledger.unsent.Add(1)
				}
				return
			}
		}
		r.wait.Go(func() {
			r.call(ctx, arrivals, intended)
			<-r.places
		})
	}
}

// closed keeps so many callers there.
func (r *run) closed(ctx, arrivals context.Context) {
	for i := range r.cfg.Concurrency {
		r.wait.Go(func() {
			if wait := r.cfg.Ramp * time.Duration(i) / time.Duration(r.cfg.Concurrency); wait > 0 {
				select {
				case <-time.After(wait):
				case <-arrivals.Done():
					return
				}
			}
			for arrivals.Err() == nil {
				r.call(ctx, arrivals, time.Now())
			}
		})
	}
	<-arrivals.Done()
}

// attest returns a tribe by its weight, and another one, where there is one, while its devices rest.
func (r *run) attest() int {
	i := r.attested.pick()
	if r.tribes[i].pace.Allow() || len(r.tribes) == 1 {
		return i
	}
	others := slices.Clone(r.attested)
	others[i].Weight = 0
	return others.pick()
}

// call is one caller. Where others wait for its end, one who means harm takes its time beside them.
func (r *run) call(ctx, arrivals context.Context, intended time.Time) {
	tribe := r.attest()
	mix := r.mixes[tribe]
	protocol := mix[mix.pick()].Name
	if rand.Float64() >= r.cfg.Hostile {
		r.outstanding.Add(1)
		r.register(ctx, r.tribes[tribe], protocol, intended)
		r.outstanding.Add(-1)
		return
	}
	if r.cfg.Rate == 0 {
		select {
		case r.places <- struct{}{}:
			r.wait.Go(func() {
				r.harm(arrivals, r.tribes[tribe], protocol)
				<-r.places
			})
		default:
		}
		return
	}
	r.harm(arrivals, r.tribes[tribe], protocol)
}

// config is how a device calls.
func (r *run) config(protocol string, m *member, traffic *traffic, hostile bool) device.Config {
	e := r.cfg.Endpoints[protocol]
	c := m.device
	c.Protocol, c.Endpoint, c.TLS, c.Tries = protocol, e.String(), m.tls[e.String()], 1
	c.Dial = func(ctx context.Context, _, _ string) (net.Conn, error) { return r.dial(ctx, e, traffic, hostile) }
	return c
}

func (r *run) dial(ctx context.Context, e *Endpoint, traffic *traffic, hostile bool) (net.Conn, error) {
	var local net.Addr
	if r.cfg.Sources > 1 {
		ip := net.IPv4(127, 0, 0, byte(1+r.source.Add(1)%uint64(r.cfg.Sources)))
		if hostile {
			ip[len(ip)-2] = 1
		}
		local = &net.TCPAddr{IP: ip}
	}
	c, err := e.Dial(ctx, local)
	if err != nil || traffic == nil {
		return c, err
	}
	return &counted{c, traffic}, nil
}

// register has a device register, and looks at every answer.
func (r *run) register(ctx context.Context, t *tribe, protocol string, intended time.Time) {
	m, err := t.take(ctx, r.cfg.Reconnect, &r.ledger.full)
	if err != nil {
		return
	}
	defer t.put(m)
	line := r.ledger.line(protocol, t.attestation.Name)
	phases := r.ledger.phases[protocol]
	x := &expectation{id: m.device.Stamp.RegistrationID, hubs: r.cfg.Hubs, group: t.attestation.Group, again: m.registered, unsure: m.unsure, hub: m.hub}
	cfg := r.config(protocol, m, &line.traffic, false)
	asked := false
	cfg.Observe = func(s device.Step) {
		asked = asked || s.Name == "register"
		if s.Err == nil {
			phases[s.Name].Add(s.Took)
		}
		if s.Answer != nil {
			x.answer(s.Answer)
		}
	}
	limited, cancel := context.WithTimeout(ctx, r.cfg.Timeout)
	state, err := device.Register(limited, cfg)
	cancel()
	took := time.Since(intended)
	if err != nil && ctx.Err() != nil { // we left
		return
	}
	if err == nil {
		x.end(state)
		if state.Status == dps.Assigned {
			m.registered, m.unsure, m.hub = true, false, state.AssignedHub
			r.lastOp.Store(&x.operation)
		}
	} else if asked && !m.registered {
		m.unsure = true
	}
	r.ledger.registered(line, protocol, x, took, err)
}

// progress tells once a second.
func (r *run) progress(ctx context.Context) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	var last uint64
	at := r.start
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		p := r.ledger.progress()
		p.Elapsed, p.Outstanding = time.Since(r.start), r.outstanding.Load()
		p.Rate = float64(p.Done-last) / time.Since(at).Seconds()
		last, at = p.Done, time.Now()
		r.cfg.Progress(p)
	}
}
