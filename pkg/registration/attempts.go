package registration

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/touchmark/touchmark/pkg/dps"
)

// An Attempt is what a device tried, and what came of it. It has no secret.
type Attempt struct {
	ID    string       `json:"-"` // rises with time
	Class AttemptClass `json:"-"`
	// RegistrationID is as the device says it; untrusted, as all that follows but result, code and reason.
	RegistrationID string    `json:"registrationId"`
	At             time.Time `json:"at"` // the last time
	// First is when the same happened for the first time, and Times how often; zero for once.
	First time.Time `json:"first,omitzero"`
	Times int64     `json:"times,omitempty"`
	// Operation is "register", "status", "lookup" or "challenge", or "provision" for what became of it at its hub.
	Operation string `json:"operation"`
	// Result is "assigned", "assigning", "failed" or "disabled", "challenged" for a TPM that has yet to prove itself, "refused", or
	// "error" where the fault is the service's.
	Result     string   `json:"result"`
	Code       dps.Code `json:"code,omitempty"`
	TrackingID string   `json:"trackingId,omitempty"`
	// Reason says why, for operators only; Rule names it for programs, where there is a name.
	Reason   string `json:"reason,omitempty"`
	Rule     string `json:"rule,omitempty"`
	Protocol string `json:"protocol"`
	Remote   string `json:"remote,omitempty"`
	Group    string `json:"group,omitempty"`
	// Proof is what kind of proof it brought: "x509", "symmetricKey", "tpm" or "none".
	Proof string `json:"proof"`
	// Slot is which of two keys, CAs or certificates let it in, "primary" or "secondary" as they stood then.
	Slot string `json:"slot,omitempty"`
	// Certificate is the one that it brought, or tried to; nil for none.
	Certificate   *Presented `json:"certificate,omitempty"`
	APIVersion    string     `json:"apiVersion,omitempty"`
	ClientVersion string     `json:"clientVersion,omitempty"`
	OperationID   string     `json:"operationId,omitempty"`
	Hub           string     `json:"hub,omitempty"`
	Substatus     string     `json:"substatus,omitempty"`
}

// Presented is a device's certificate.
type Presented struct {
	Subject    string    `json:"subject,omitempty"`
	Issuer     string    `json:"issuer,omitempty"`
	Thumbprint string    `json:"thumbprint,omitempty"` // hex SHA-256 of the leaf
	NotAfter   time.Time `json:"notAfter,omitzero"`
	Chain      int       `json:"chain,omitempty"` // certificates that came, the leaf among them
}

// AttemptClass parts what is kept of a scope, so that one class cannot push out another.
type AttemptClass int

// The classes.
const (
	AttemptProven   AttemptClass = iota // by a device that proved itself
	AttemptKnown                        // refused, in the name of a device that the service knows
	AttemptStranger                     // refused, in a name that nothing is known of
)

// attempt describes a request.
func attempt(req *Request, what string, at time.Time) *Attempt {
	a := &Attempt{RegistrationID: clip(req.RegistrationID), At: at, Operation: what, Protocol: req.Protocol, Remote: clip(req.Remote),
		APIVersion: clip(req.APIVersion), ClientVersion: clip(req.ClientVersion), Proof: "none"}
	switch {
	case req.Proof.TPM != nil:
		a.Proof = "tpm"
	case req.Proof.Token != "":
		a.Proof = "symmetricKey"
	case len(req.Proof.Certificates) > 0:
		leaf := req.Proof.Certificates[0]
		sum := sha256.Sum256(leaf.Raw)
		a.Proof = "x509"
		a.Certificate = &Presented{Subject: clip(leaf.Subject.String()), Issuer: clip(leaf.Issuer.String()), Thumbprint: hex.EncodeToString(sum[:]),
			NotAfter: leaf.NotAfter.UTC(), Chain: len(req.Proof.Certificates)}
	}
	return a
}

// noted writes an attempt into the log, and hands it to whoever keeps and counts attempts.
func (s *Service) noted(req *Request, level slog.Level, message string, a *Attempt) {
	result, status := "Success", 200
	switch {
	case a.Code.Status() >= 500:
		result, status = "Failure", a.Code.Status()
	case a.Code != 0:
		result, status = "ClientError", a.Code.Status()
	}
	attrs := []slog.Attr{slog.String("category", "DeviceOperations"), slog.String("operation", a.Operation), slog.String("idScope", cmp.Or(s.cfg.Scope, clip(req.IDScope))),
		slog.String("registrationId", a.RegistrationID), slog.String("result", result), slog.Int("httpStatus", status), slog.String("status", a.Result)}
	for _, f := range [][2]string{{"substatus", a.Substatus}, {"hub", a.Hub}, {"group", a.Group}, {"trackingId", a.TrackingID}, {"rule", a.Rule}, {"reason", a.Reason},
		{"operationId", a.OperationID}} {
		if f[1] != "" {
			attrs = append(attrs, slog.String(f[0], f[1]))
		}
	}
	if a.Code != 0 {
		attrs = append(attrs, slog.Int("code", int(a.Code)))
	}
	if !req.Began.IsZero() {
		attrs = append(attrs, slog.Float64("durationMs", float64(time.Since(req.Began).Microseconds())/1000))
	}
	attrs = append(attrs, slog.String("proof", a.Proof), slog.String("apiVersion", a.APIVersion), slog.String("protocol", a.Protocol), slog.String("remote", a.Remote))
	s.cfg.Log.LogAttrs(context.Background(), level, message, attrs...)
	if s.cfg.Attempt != nil {
		s.cfg.Attempt(s.scope, a)
	}
}

// logged writes a refusal down with its reason and returns what the device may see.
func (s *Service) logged(req *Request, what string, err error) error {
	e := dps.AsError(err)
	a := attempt(req, what, s.now())
	level := slog.LevelInfo
	a.Result, a.Code, a.TrackingID, a.Reason, a.Rule = "refused", e.Code, e.TrackingID, clipTo(e.Error(), 512), ruleOf(e)
	if e.Code.Status() >= 500 {
		level, a.Result = slog.LevelError, "error"
	}
	s.noted(req, level, "refused", a)
	return e
}

// succeeded writes down what became of a registration.
func (s *Service) succeeded(req *Request, v *verdict, after *Registration) {
	a := attempt(req, "register", s.now())
	st := &after.State
	a.Result, a.Substatus, a.Hub, a.Group, a.OperationID = string(st.Status), string(st.Substatus), st.AssignedHub, v.group, after.Operations[0].ID
	if a.Code = dps.Code(st.ErrorCode); a.Code != 0 {
		a.Reason = st.ErrorMessage
	}
	if why := v.reason(); why != "" { // of the policy, or of the webhook, that chose
		a.Reason = clipTo(why, 512)
	}
	if v.tpm != nil {
		a.Proof = "tpm"
	}
	if v.admitted != nil {
		a.Slot = v.admitted.Slot
	}
	s.noted(req, slog.LevelInfo, "registration", a)
}

// Attempt is a step of telling hubs as an entry of the log of attempts; nil for one that is no end.
func (p *Provisioning) Attempt(at time.Time) *Attempt {
	a := &Attempt{RegistrationID: p.RegistrationID, At: at, Operation: "provision", Result: p.Outcome, Hub: p.Hub, Substatus: string(p.Substatus), Proof: "none",
		OperationID: p.OperationID}
	switch p.Outcome {
	case "assigned":
	case "failed":
		a.Code = dps.CodeHubRefused
	default:
		return nil
	}
	if p.Err != nil {
		a.Reason = clipTo(p.Err.Error(), 512)
	}
	return a
}

// wasChallenged writes down that a TPM was challenged, and why it had to be, where it was refused.
func (s *Service) wasChallenged(req *Request, refusal *dps.Error) {
	a := attempt(req, "challenge", s.now())
	a.Proof, a.Result = "tpm", "challenged"
	if refusal != nil {
		a.TrackingID, a.Reason = refusal.TrackingID, clipTo(refusal.Error(), 512)
	}
	s.noted(req, slog.LevelInfo, "TPM challenged", a)
}

func (s *Service) now() time.Time {
	if s.cfg.Now == nil { // of a service that is none of a scope's
		return time.Now()
	}
	return s.cfg.Now()
}

func clipTo(s string, most int) string {
	if len(s) > most {
		return s[:most]
	}
	return s
}

// AttemptsConfig is what a log of attempts keeps.
type AttemptsConfig struct {
	Store Store
	// Retention is for how long attempts are kept; zero means 30 days.
	Retention time.Duration
	// Keep is how many attempts of a class one scope has at most; zero means 100,000. Of strangers a tenth is kept.
	Keep int
	// PerDevice is how many attempts of one device are kept; zero means 10.
	PerDevice int
	// Mask keeps the network of a caller's address alone: /24 of IPv4, /48 of IPv6.
	Mask bool
	// Lost is told how many attempts were not kept, because there were too many; may be nil.
	Lost func(n int)
	Log  *slog.Logger
	Now  func() time.Time
}

// Attempts is the log of what devices tried: for operators who ask why a device was refused, and as the history of registrations.
//
// Attempts are kept in memory first and written every few seconds, many in one transaction, so that a flood of refusals costs
// the store no more than a trickle: a crash loses those seconds, and other replicas see them that much later. The same attempt
// of one device from one address within an hour is one entry that counts.
//
// Of a device the last few are kept, its last success among them. At most half of these are refusals from one address: who
// only knows a registration ID does not push out what the device itself did from elsewhere. A scope keeps classes of attempts
// apart, each with its own bound. Refusals from one address count against a rate; what is above it is answered and logged, but
// not kept here. An Attempts may be used by many goroutines.
type Attempts struct {
	cfg AttemptsConfig

	mu        sync.Mutex // guards what follows
	pending   map[string]map[attemptKey]*Attempt
	held      int
	addresses map[pressure]*rate.Limiter
	older     map[pressure]*rate.Limiter
	lost      int
	written   map[string]int // rows of each scope since it was trimmed

	flushing sync.Mutex
}

const (
	perDevice     = 10 // by default
	sameAttempt   = time.Hour
	flushEvery    = 2 * time.Second
	flushAtOnce   = 256                 // devices in one transaction
	maxHeld       = 16384               // attempts in memory, of all scopes
	maxHeldScope  = 4096                // of one scope
	attemptRate   = rate.Limit(1)       // refusals of one address in one scope that are kept, each second,
	attemptBurst  = 300                 // and at once
	maxPressing   = 8192                // addresses that are told apart, twice
	trimEvery     = 1000                // rows
	trimAtOnce    = 2000                // rows in one transaction
	keepAttempts  = 100_000             // by default
	keepTime      = 30 * 24 * time.Hour // by default
	housekeepTime = time.Hour
)

// attemptKey is what makes two attempts the same.
type attemptKey struct {
	device, operation, result, rule, reason, address, proof string
	code                                                    dps.Code
	own                                                     string // operation ID: no two registrations are the same
}

func (a *Attempt) key() attemptKey {
	k := attemptKey{device: dps.Fold(a.RegistrationID), operation: a.Operation, result: a.Result, rule: a.Rule, reason: a.Reason, address: addressBlock(a.Remote),
		code: a.Code, own: a.OperationID, proof: a.Proof}
	if a.Certificate != nil {
		k.proof += a.Certificate.Thumbprint
	}
	return k
}

// pressure is who fills a scope's log.
type pressure struct{ scope, address string }

// NewAttempts returns a log. Run writes it.
func NewAttempts(cfg AttemptsConfig) *Attempts {
	cfg.Retention, cfg.Keep, cfg.PerDevice = cmp.Or(cfg.Retention, keepTime), cmp.Or(cfg.Keep, keepAttempts), cmp.Or(cfg.PerDevice, perDevice)
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Attempts{cfg: cfg, pending: make(map[string]map[attemptKey]*Attempt), addresses: make(map[pressure]*rate.Limiter), written: make(map[string]int)}
}

func (a *Attempt) proven() bool {
	return a.Result != "refused" && a.Result != "error" && a.Result != "challenged"
}

// Add takes an attempt of a folded ID scope. It does not wait for the store.
func (l *Attempts) Add(scope string, a *Attempt) {
	if scope == "" || dps.CheckRegistrationID(a.RegistrationID) != nil { // a name that no device can have
		return
	}
	c := *a
	if l.cfg.Mask {
		c.Remote = MaskAddress(c.Remote)
	}
	k := c.key()
	l.mu.Lock()
	defer l.mu.Unlock()
	same := l.pending[scope][k]
	if same != nil {
		same.again(&c)
		return
	}
	if !c.proven() && !l.pressing(pressure{scope, k.address}) || l.held >= maxHeld || len(l.pending[scope]) >= maxHeldScope {
		l.lost++
		return
	}
	if l.pending[scope] == nil {
		l.pending[scope] = make(map[attemptKey]*Attempt)
	}
	l.pending[scope][k] = &c
	l.held++
}

// again takes note of a later attempt that was the same.
func (a *Attempt) again(later *Attempt) {
	if a.Times == 0 {
		a.First, a.Times = a.At, 1
	}
	a.At, a.TrackingID, a.Times = later.At, later.TrackingID, a.Times+max(later.Times, 1)
	a.Protocol, a.Remote, a.ClientVersion = later.Protocol, later.Remote, later.ClientVersion
}

func (l *Attempts) pressing(p pressure) bool {
	r := l.addresses[p]
	if r == nil {
		if len(l.addresses) >= maxPressing {
			l.addresses, l.older = make(map[pressure]*rate.Limiter), l.addresses
		}
		if r = l.older[p]; r == nil {
			r = rate.NewLimiter(attemptRate, attemptBurst)
		}
		l.addresses[p] = r
	}
	return r.AllowN(l.cfg.Now(), 1)
}

// addressBlock is what counts as one address: an IPv4 address, or the /64 of an IPv6 address.
func addressBlock(remote string) string { return maskAddress(remote, 32, 64) }

// MaskAddress returns the network of a caller's address: /24 of IPv4, /48 of IPv6; what is no address is nothing.
func MaskAddress(remote string) string { return maskAddress(remote, 24, 48) }

func maskAddress(remote string, four, six int) string {
	ip, err := netip.ParseAddr(remote)
	if p, err2 := netip.ParseAddrPort(remote); err2 == nil {
		ip, err = p.Addr(), nil
	}
	if err != nil {
		return ""
	}
	ip = ip.Unmap().WithZone("")
	bits := six
	if ip.Is4() {
		bits = four
	}
	prefix, _ := ip.Prefix(bits) // never fails
	return prefix.Addr().String()
}

// Run writes attempts until the context ends, and then those that are left.
func (l *Attempts) Run(ctx context.Context) error {
	tick := time.NewTicker(flushEvery)
	defer tick.Stop()
	var kept time.Time
	for {
		if now := l.cfg.Now(); now.Sub(kept) >= housekeepTime {
			kept = now
			if err := l.Expire(ctx); err != nil && ctx.Err() == nil {
				l.cfg.Log.Error("forgetting old attempts", "cause", err)
			}
		}
		select {
		case <-tick.C:
			if err := l.Flush(ctx); err != nil && ctx.Err() == nil {
				l.cfg.Log.Error("writing the log of attempts", "cause", err)
			}
		case <-ctx.Done():
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
			defer cancel()
			return l.Flush(last)
		}
	}
}

// Flush writes what is in memory. What cannot be written is lost: it must not pile up.
func (l *Attempts) Flush(ctx context.Context) error {
	l.flushing.Lock()
	defer l.flushing.Unlock()
	l.mu.Lock()
	pending, lost := l.pending, l.lost
	l.pending, l.held, l.lost = make(map[string]map[attemptKey]*Attempt), 0, 0
	l.mu.Unlock()
	var errs []error
	for scope, all := range pending {
		byDevice := make(map[string][]*Attempt)
		for k, a := range all {
			byDevice[k.device] = append(byDevice[k.device], a)
		}
		devices := slices.Sorted(maps.Keys(byDevice)) // in one order at every replica
		for chunk := range slices.Chunk(devices, flushAtOnce) {
			err := l.cfg.Store.Update(ctx, func(tx Tx) error {
				sc, err := found(tx.Scope(scope))
				if err != nil || sc != nil && sc.Deleting {
					return err
				}
				for _, d := range chunk {
					fresh := byDevice[d]
					if sc != nil { // what was tried before it was erased is erased
						fresh = slices.DeleteFunc(slices.Clone(fresh), func(a *Attempt) bool { return !a.At.After(sc.Erased) })
					}
					if err := keep(tx, scope, d, fresh, l.cfg.PerDevice); err != nil {
						return err
					}
				}
				return nil
			})
			if err != nil {
				errs = append(errs, err)
				for _, d := range chunk {
					lost += len(byDevice[d])
				}
			}
		}
		if l.written[scope] += len(all); l.written[scope] >= trimEvery {
			delete(l.written, scope)
			errs = append(errs, l.trim(ctx, scope))
		}
	}
	if lost > 0 && l.cfg.Lost != nil {
		l.cfg.Lost(lost)
	}
	return errors.Join(errs...)
}

// keep writes what a device tried, and forgets what is more than the most that is kept of it. It leaves fresh as they are.
func keep(tx Tx, scope, device string, fresh []*Attempt, most int) error {
	kept, err := tx.Attempts(scope, device)
	if err != nil {
		return err
	}
	known, asked := false, false
	fresh = slices.SortedFunc(slices.Values(fresh), func(a, b *Attempt) int { return a.At.Compare(b.At) })
	forget := make(map[string]bool)
	put := make(map[string]*Attempt)
	for _, f := range fresh {
		a := *f
		if !a.proven() {
			if !asked {
				if known, err = knownDevice(tx, scope, device); err != nil {
					return err
				}
				asked = true
			}
			if a.Class = AttemptStranger; known {
				a.Class = AttemptKnown
			}
		}
		a.ID = dps.NewOrderedID(a.At)
		if i := slices.IndexFunc(kept, func(k *Attempt) bool { return k.key() == a.key() && a.At.Sub(cmp.Or(k.First, k.At)) < sameAttempt }); i >= 0 {
			merged := *kept[i]
			merged.again(&a)
			merged.ID, merged.Class, forget[merged.ID] = a.ID, a.Class, true
			a = merged
			kept = slices.Delete(kept, i, i+1)
		}
		// What became of a registration at its hub completes its entry.
		if i := slices.IndexFunc(kept, func(k *Attempt) bool {
			return a.Operation == "provision" && k.Result == "assigning" && k.OperationID == a.OperationID
		}); i >= 0 {
			whole := *kept[i]
			whole.Result, whole.Hub, whole.Substatus, whole.Code, whole.Reason = a.Result, a.Hub, a.Substatus, a.Code, a.Reason
			forget[whole.ID] = true
			delete(put, whole.ID)
			whole.ID = a.ID
			a = whole
			kept = slices.Delete(kept, i, i+1)
		}
		put[a.ID] = &a
		kept = slices.Insert(kept, 0, &a)
	}
	for _, a := range tooMuch(kept, most) {
		if put[a.ID] == nil {
			forget[a.ID] = true
		}
		delete(put, a.ID)
	}
	for id := range forget {
		if err := tx.DeleteAttempt(scope, device, id); err != nil {
			return err
		}
	}
	for _, a := range put {
		if err := tx.PutAttempt(scope, device, a); err != nil {
			return err
		}
	}
	return nil
}

// knownDevice reports whether the service knows a device otherwise than by what is asked in its name.
func knownDevice(tx Tx, scope, id string) (bool, error) {
	if r, err := found(tx.Record(scope, Individual, id)); r != nil || err != nil {
		return true, err
	}
	if r, err := found(tx.Registration(scope, id)); r != nil || err != nil {
		return true, err
	}
	d, err := found(tx.Device(scope, id))
	return d != nil, err
}

// tooMuch returns which of a device's attempts, newest first, are not kept.
func tooMuch(all []*Attempt, most int) (drop []*Attempt) {
	last := slices.IndexFunc(all, (*Attempt).proven)
	room := most
	if last >= 0 {
		room--
	}
	from := make(map[string]int)
	for i, a := range all {
		if i == last {
			continue
		}
		address := addressBlock(a.Remote)
		if room == 0 || !a.proven() && from[address] == (most+1)/2 {
			drop = append(drop, a)
			continue
		}
		if room--; !a.proven() {
			from[address]++
		}
	}
	return drop
}

// trim forgets what is too much of a scope, and what is too old.
func (l *Attempts) trim(ctx context.Context, scope string) error {
	before := dps.NewOrderedID(l.cfg.Now().Add(-l.cfg.Retention))
	for class, most := range []int{AttemptProven: l.cfg.Keep, AttemptKnown: l.cfg.Keep, AttemptStranger: l.cfg.Keep / 10} {
		for n := int64(trimAtOnce); n == trimAtOnce; {
			err := l.cfg.Store.Update(ctx, func(tx Tx) (err error) {
				n, err = tx.TrimAttempts(scope, AttemptClass(class), most, before, trimAtOnce)
				return err
			})
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// Expire forgets what is too old, or too much, in every scope. Run does it every hour.
func (l *Attempts) Expire(ctx context.Context) error {
	for after, page := "", []*Scope(nil); ; after = dps.Fold(page[len(page)-1].ID) {
		err := l.cfg.Store.View(ctx, func(tx Tx) (err error) {
			page, err = tx.Scopes(after, 100)
			return err
		})
		if err != nil || len(page) == 0 {
			return err
		}
		for _, sc := range page {
			if err := l.trim(ctx, dps.Fold(sc.ID)); err != nil {
				return err
			}
		}
	}
}

// fresh writes what is in memory for somebody who is about to read. Who asks and hangs up must not cost all scopes what is written
// then.
func (l *Attempts) fresh(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	return l.Flush(ctx)
}

// Of returns what is kept of a device's attempts, newest first; those of the last seconds at other replicas are missing.
func (l *Attempts) Of(ctx context.Context, scope, registrationID string) (all []*Attempt, err error) {
	if err := l.fresh(ctx); err != nil {
		return nil, err
	}
	err = l.cfg.Store.View(ctx, func(tx Tx) error {
		all, err = tx.Attempts(dps.Fold(scope), dps.Fold(registrationID))
		return err
	})
	return all, err
}

// ByTracking returns the attempt whose answer had a tracking ID, or ErrNotFound. Of attempts that were the same it knows the
// last one's.
func (l *Attempts) ByTracking(ctx context.Context, scope, trackingID string) (a *Attempt, err error) {
	if err := l.fresh(ctx); err != nil {
		return nil, err
	}
	err = l.cfg.Store.View(ctx, func(tx Tx) error {
		a, err = tx.AttemptByTracking(dps.Fold(scope), dps.Fold(trackingID))
		return err
	})
	return a, err
}

// Erase forgets a device's attempts, and puts that into the audit record.
func (l *Attempts) Erase(ctx context.Context, scope, registrationID string, by Actor) error {
	if err := l.fresh(ctx); err != nil {
		return err
	}
	scope, device := dps.Fold(scope), dps.Fold(registrationID)
	return l.cfg.Store.Update(ctx, func(tx Tx) error {
		all, err := tx.Attempts(scope, device)
		if err != nil || len(all) == 0 {
			return err
		}
		for _, a := range all {
			if err := tx.DeleteAttempt(scope, device, a.ID); err != nil {
				return err
			}
		}
		return tx.PutAudit(scope, NewAudit(by, "erase", "attempts/"+registrationID, nil, nil, l.cfg.Now()))
	})
}
