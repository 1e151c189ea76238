// Package limit keeps those who ask too much of a registration service from hurting the others: a [Limiter] is a
// [registration.Registrar] in front of another one.
//
// Every request is counted by its caller's address (IPv6 by /64), by its device and by its ID scope, and its body by its
// scope. Who exceeds a rate is slowed down first: the answer is "assigning" with a hint of 5 seconds, which every SDK obeys,
// and no work is done. A register request is answered so with a ticket ([registration.NewTicket]) and begins when the device
// asks what became of it. Only who goes on regardless, or cannot be put off, is told 429 (device API, sections 6.5 and 17.3).
//
// What is let through is worked on in a bounded number of places. Scopes that wait for one get it in turn, and the more a
// scope holds the more must be free for it: a flood in one scope, or one whose work takes for ever, leaves places for another.
//
// A device is counted by registration ID and address: anybody can say a registration ID, so what one address does must not
// keep a device at another one out. Over all addresses only those requests of a device are counted that proved themselves.
//
// All state is bounded and in memory, each replica has its own, and losing it harms nobody. A Limiter may be used by many
// goroutines. It tells the time by package time.
package limit

import (
	"container/list"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"hash/maphash"
	"log/slog"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
)

// Config is what a limiter allows. Rates are per second; zero means the default, a negative value no limit.
type Config struct {
	// Registrar does the work.
	Registrar registration.Registrar
	// Scopes reports, at once, whether an ID scope, folded, is one of the service's. All others count as one; nil means that
	// all do.
	Scopes func(folded string) bool
	// PerDevice is requests of one device; default 1, and 20 at once.
	PerDevice float64
	// PerAddress is requests from one address, behind which there may be a factory; default 500, and 5,000 at once.
	PerAddress float64
	// PerScope is requests in one scope; default 2,000, and 10,000 at once.
	PerScope float64
	// BytesPerScope is octets of register bodies in one scope; default 4 MiB, and 16 MiB at once.
	BytesPerScope float64
	// Places is how many requests are worked on at a time; default 8 per core, at least 32. One scope alone gets three
	// quarters of them.
	Places int
	// Queue is how many requests of one scope may wait for a place, and Wait how long; default 1,024 and one second.
	Queue int
	Wait  time.Duration
	// Keys is how many addresses, and how many devices in each scope, are told apart; default 32,768, at some 300 octets.
	Keys int
	// Off lets everything through. What replicas with limits put off is taken up.
	Off bool
	// Throttled is told of every request that was put off or refused, by which limit; nil is nobody.
	Throttled func(limit string)
	Log       *slog.Logger
}

// How many seconds' worth of a rate may come at once; and by what factor who is being slowed down may exceed the rate
// before it is 429. It leaves room for every device to ask again after each hint.
const (
	deviceBurst  = 20
	addressBurst = 10
	scopeBurst   = 5
	bytesBurst   = 4
	excess       = 5
)

// hint is what who is put off is asked to wait, in seconds: the longest that every SDK takes (device API, section 6.3).
const hint = "5"

// What is remembered of proofs that were refused: who brings the very same again is told the same after refusalsJudged
// judgements within refusalWindow, for refusalHold until it is judged again; and 429 after refusalsMany.
const (
	refusalsJudged = 3
	refusalsMany   = 20
	refusalHold    = 30 * time.Second
	refusalWindow  = time.Minute
)

// tellEvery is how often one key is told to the log, tellRate how many lines a second all keys together get.
const (
	tellEvery = time.Minute
	tellRate  = 1
	tellBurst = 30
)

// Limiter is a registration.Registrar with limits.
type Limiter struct {
	cfg   Config
	seed  maphash.Seed
	lines *rate.Limiter // to the log

	mu        sync.Mutex // guards what follows and everything in it
	addresses *table
	scopes    map[string]*scope
	places    places
	untold    int // lines that the log was spared since the last
}

var _ registration.Registrar = (*Limiter)(nil)

// New returns a limiter.
func New(cfg Config) *Limiter {
	for _, d := range []struct {
		v    *float64
		zero float64
	}{{&cfg.PerDevice, 1}, {&cfg.PerAddress, 500}, {&cfg.PerScope, 2000}, {&cfg.BytesPerScope, 4 << 20}} {
		switch {
		case *d.v == 0:
			*d.v = d.zero
		case *d.v < 0:
			*d.v = float64(rate.Inf)
		}
	}
	for _, d := range []struct {
		v    *int
		zero int
	}{{&cfg.Places, max(32, 8*runtime.GOMAXPROCS(0))}, {&cfg.Queue, 1024}, {&cfg.Keys, 32768}} {
		if *d.v == 0 {
			*d.v = d.zero
		}
	}
	if cfg.Wait == 0 {
		cfg.Wait = time.Second
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Limiter{
		cfg: cfg, seed: maphash.MakeSeed(), lines: rate.NewLimiter(tellRate, tellBurst), scopes: make(map[string]*scope), places: places{free: cfg.Places},
		addresses: newTable(cfg.Keys, cfg.PerAddress, addressBurst),
	}
}

// scope is what is known of an ID scope.
type scope struct {
	requests, bytes *bucket
	devices         *table // its own: a flood of names in one scope takes no room from another's
	busy            told

	held    int           // places
	waiting list.List     // of waiter
	turn    *list.Element // in the queue, while something waits
}

// errDeferred says that a request is to be answered "assigning".
var errDeferred = errors.New("put off")

// Register implements [registration.Registrar].
func (l *Limiter) Register(ctx context.Context, req *registration.Request) (*dps.OperationStatus, error) {
	st, err := do(l, ctx, &call{req: req, verb: "register", deferrable: func() bool { return registration.Deferrable(req) }}, func() (*dps.OperationStatus, error) {
		return l.cfg.Registrar.Register(ctx, req)
	})
	if err == errDeferred {
		return &dps.OperationStatus{OperationID: registration.NewTicket(req.IDScope, req.RegistrationID), Status: dps.Assigning, RetryAfter: hint}, nil
	}
	return st, err
}

// Status implements [registration.Registrar]. For a ticket it registers.
//
// A status request counts like any other, also one for an operation that is done: answering it takes a judgement and a read,
// and is what a flood of them would be for. A device that is put off loses nothing but the five seconds.
func (l *Limiter) Status(ctx context.Context, req *registration.Request, operationID string) (*dps.OperationStatus, error) {
	ticket := registration.IsTicket(req.IDScope, req.RegistrationID, operationID)
	// What no device was ever told is not put off, since it would be echoed.
	deferrable := func() bool { return operationForm(operationID) && dps.CheckRegistrationID(req.RegistrationID) == nil }
	st, err := do(l, ctx, &call{req: req, verb: "status", operation: operationID, deferrable: deferrable}, func() (*dps.OperationStatus, error) {
		if ticket {
			begin := *req
			begin.Operation, begin.Body = operationID, nil
			if _, err := l.cfg.Registrar.Register(ctx, &begin); err != nil {
				return nil, err
			}
		}
		return l.cfg.Registrar.Status(ctx, req, operationID)
	})
	if err == errDeferred {
		return &dps.OperationStatus{OperationID: operationID, Status: dps.Assigning, RetryAfter: hint,
			RegistrationState: &dps.RegistrationState{RegistrationID: req.RegistrationID, Status: dps.Assigning}}, nil
	}
	return st, err
}

// operationForm reports whether s can be an operation ID (DPS-D 17).
func operationForm(s string) bool {
	return s != "" && len(s) <= 55 && strings.IndexFunc(s, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '.' || r == '-')
	}) < 0
}

// Lookup implements [registration.Registrar].
func (l *Limiter) Lookup(ctx context.Context, req *registration.Request) (*dps.RegistrationState, error) {
	return do(l, ctx, &call{req: req, verb: "lookup"}, func() (*dps.RegistrationState, error) { return l.cfg.Registrar.Lookup(ctx, req) })
}

// Challenge implements [registration.Registrar].
func (l *Limiter) Challenge(ctx context.Context, req *registration.Request) ([]byte, error) {
	return do(l, ctx, &call{req: req, verb: "challenge"}, func() ([]byte, error) { return l.cfg.Registrar.Challenge(ctx, req) })
}

// Overloaded reports whether a device would be refused with 429 now. A door that can turn a device away before it has asked
// for anything does that instead: MQTT's CONNACK 3.
func (l *Limiter) Overloaded(req *registration.Request) bool {
	if l.cfg.Off {
		return false
	}
	c := &call{req: req}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.place(c)
	now := time.Now()
	return l.addresses.peek(c.address).spent(now) || c.scope.devices.peek(c.device).spent(now) || c.scope.requests.spent(now)
}

// A call is one request on its way through.
type call struct {
	req             *registration.Request
	verb, operation string
	deferrable      func() bool // nil for never

	scope                   *scope
	address, device, proven uint64 // keys
	proof                   [sha256.Size]byte
	hashed                  bool
}

// do runs work in a place of the request's scope, or returns errDeferred, where the request can be put off, or a 429.
func do[T any](l *Limiter, ctx context.Context, c *call, work func() (T, error)) (answer T, err error) {
	if l.cfg.Off {
		return work()
	}
	if err := l.admit(ctx, c); err != nil {
		return answer, err
	}
	defer l.leave(c.scope)
	answer, err = work()
	l.learn(c, err)
	return answer, err
}

// deviceKey is a device at an address or, from wherever it comes, one that proved itself.
type deviceKey struct {
	id      string
	address netip.Prefix
	proven  bool
}

// place finds the scope and the keys of a call. Keys are hashes with a seed of our own: nobody can aim at another's, and no
// text of a request is kept.
func (l *Limiter) place(c *call) {
	name := dps.Fold(c.req.IDScope)
	if l.cfg.Scopes == nil || !l.cfg.Scopes(name) {
		name = ""
	}
	if c.scope = l.scopes[name]; c.scope == nil {
		c.scope = &scope{requests: newBucket(l.cfg.PerScope, scopeBurst), bytes: newBucket(max(l.cfg.BytesPerScope, registration.MaxBody), bytesBurst),
			devices: newTable(l.cfg.Keys, l.cfg.PerDevice, deviceBurst)}
		l.scopes[strings.Clone(name)] = c.scope
	}
	k := deviceKey{address: block(c.req.Remote)}
	if dps.CheckRegistrationID(c.req.RegistrationID) == nil { // those that are none count as one
		k.id = dps.Fold(c.req.RegistrationID)
	}
	c.address, c.device = maphash.Comparable(l.seed, k.address), maphash.Comparable(l.seed, k)
	k.address, k.proven = netip.Prefix{}, true
	c.proven = maphash.Comparable(l.seed, k)
}

// block returns what counts as one address: an IPv4 address, or the /64 of an IPv6 address. Those that cannot be read count
// as one.
func block(remote string) netip.Prefix {
	a, err := netip.ParseAddrPort(remote)
	ip := a.Addr()
	if err != nil {
		if ip, err = netip.ParseAddr(remote); err != nil {
			return netip.Prefix{}
		}
	}
	ip = ip.Unmap().WithZone("")
	p, _ := ip.Prefix(min(ip.BitLen(), 64)) // never fails
	return p
}

// admit lets a call pass into a place, or says how it is answered instead.
func (l *Limiter) admit(ctx context.Context, c *call) error {
	now := time.Now()
	l.mu.Lock()
	l.place(c)
	if b := c.scope.devices.peek(c.device); b != nil && b.refusal != nil {
		l.mu.Unlock()
		c.hash() // takes a while, and only for who was refused before
		l.mu.Lock()
		if err, done := l.remember(b, c, now); done {
			l.mu.Unlock()
			return err
		}
	}
	t, why, v := l.charge(c, now)
	l.mu.Unlock()
	if v == passes {
		if l.enter(ctx, c.scope) {
			return nil
		}
		t, why, v = &c.scope.busy, "places", slows
	}
	deferred := v == slows && c.deferrable != nil && c.deferrable()
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.putOff(t, why, c, deferred, now)
}

// charge counts a call. Address and device come first: what they are denied is not taken from their scope.
func (l *Limiter) charge(c *call, now time.Time) (*told, string, verdict) {
	a := l.addresses.get(c.address, now)
	if v := a.take(now, 1); v != passes {
		return &a.told, "address", v
	}
	d := c.scope.devices.get(c.device, now)
	if v := d.take(now, 1); v != passes {
		return &d.told, "device", v
	}
	if p := c.scope.devices.peek(c.proven); p != nil && p.pace.TokensAt(now) < 1 {
		return &p.told, "device", slows // never more: strangers meet it too
	}
	if v := c.scope.requests.take(now, 1); v != passes {
		return &c.scope.requests.told, "scope", v
	}
	if v := c.scope.bytes.take(now, len(c.req.Body)); v != passes {
		return &c.scope.bytes.told, "bytes", v
	}
	return nil, "", passes
}

// A refusal is the last proof of a device at an address that was refused, and the answer.
type refusal struct {
	proof  [sha256.Size]byte
	answer *dps.Error
	n      int       // how often, in a row
	judged time.Time // last
}

// remember answers who brings again what was refused. Anything else is judged: a device whose key was mended must get in.
func (l *Limiter) remember(b *bucket, c *call, now time.Time) (err error, done bool) {
	r := b.refusal
	if r == nil || r.proof != c.proof || r.n < refusalsJudged || now.Sub(r.judged) >= refusalHold {
		return nil, false
	}
	if r.n++; r.n > refusalsMany {
		return l.putOff(&b.told, "refusals", c, false, now), true
	}
	return r.answer, true
}

// learn takes note of how a call ended.
func (l *Limiter) learn(c *call, err error) {
	var challenge *registration.Challenge
	var e *dps.Error
	refused := !errors.As(err, &challenge) && errors.As(err, &e) && e.Code.Status() == 401
	if refused {
		c.hash()
	}
	now := time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case refused:
		b := c.scope.devices.get(c.device, now)
		if r := b.refusal; r == nil || r.proof != c.proof || now.Sub(r.judged) >= refusalWindow {
			b.refusal = &refusal{proof: c.proof}
		}
		b.refusal.answer, b.refusal.judged = e, now
		b.refusal.n++
	case err == nil && c.verb != "challenge":
		c.scope.devices.get(c.proven, now).pace.AllowN(now, 1)
	}
}

// hash names everything that a 401 can depend on.
func (c *call) hash() {
	if c.hashed {
		return
	}
	c.hashed = true
	h := sha256.New()
	part := func(b []byte) {
		h.Write(binary.BigEndian.AppendUint32(nil, uint32(len(b))))
		h.Write(b)
	}
	for _, s := range []string{c.verb, c.operation, c.req.IDScope, c.req.RegistrationID, c.req.Proof.Token} {
		part([]byte(s))
	}
	if t := c.req.Proof.TPM; t != nil {
		part(t.EK)
		part(t.SRK)
	}
	for _, cert := range c.req.Proof.Certificates {
		part(cert.Raw)
	}
	if c.req.Proof.Token == "" && len(c.req.Proof.Certificates) == 0 {
		part(c.req.Body) // it may hold the keys of a TPM
	}
	h.Sum(c.proof[:0])
}

// told is what the log was told of a key.
type told struct {
	at                time.Time
	deferred, refused int // since then
	last              *dps.Error
}

// putOff returns how a call is answered that is not let in, and tells the log: at most once per key and interval, with what
// was left untold since the last time. All 429 of one interval have one tracking ID, that of the line.
func (l *Limiter) putOff(t *told, why string, c *call, deferred bool, now time.Time) error {
	if l.cfg.Throttled != nil {
		l.cfg.Throttled(why)
	}
	if deferred {
		t.deferred++
	} else {
		t.refused++
	}
	if t.last == nil || now.Sub(t.at) >= tellEvery {
		t.last = &dps.Error{Code: dps.CodeThrottled, TrackingID: dps.NewUUID(), Message: "Too many requests; try again later", RetryAfter: hint, Cause: errors.New("limit: " + why)}
		t.at = now
		if l.lines.AllowN(now, 1) {
			l.cfg.Log.Warn("limited", "limit", why, "deferred", t.deferred, "refused", t.refused, "operation", c.verb, "idScope", clip(c.req.IDScope),
				"registrationId", clip(c.req.RegistrationID), "remote", c.req.Remote, "trackingId", t.last.TrackingID, "untoldKeys", l.untold)
			l.untold, t.deferred, t.refused = 0, 0, 0
		} else {
			l.untold++
		}
	}
	if deferred {
		return errDeferred
	}
	e := *t.last
	e.Time = now
	return &e
}

// clip bounds what a stranger writes into the log.
func clip(s string) string {
	if len(s) > dps.MaxRegistrationID {
		return s[:dps.MaxRegistrationID]
	}
	return s
}
