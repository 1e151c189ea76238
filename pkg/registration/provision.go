package registration

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/dps"
)

// Times of telling hubs.
const (
	// firstTry is for how long a register call works at its task itself, so that the first poll finds the device assigned.
	firstTry = 5 * time.Second
	// leaseTime is for how long a task is one worker's, by its own clock. No call to a hub is begun that could outlive it: a call may last
	// for callTime, and ends writeTime before the lease does. By so much may a replica's clock be ahead; when it is more, two may work at a
	// task, and what a hub does late of what the first one asked is not known to the second.
	leaseTime = 30 * time.Second
	callTime  = 10 * time.Second
	// writeTime bounds a transaction that says how far a task has come, whatever ended the work.
	writeTime = 5 * time.Second
	// cleanupTime is how long a former hub is asked to forget a device; then the device is an orphan there.
	cleanupTime = 7 * 24 * time.Hour
	// firstPause and maxPause are between two attempts for a device that waits, maxCleanupPause between those to clean up.
	firstPause      = 500 * time.Millisecond
	maxPause        = 20 * time.Second
	maxCleanupPause = time.Hour
	// askAgain is how soon a device that registers again makes the service look whether its hub still knows it: it may be back
	// because the hub does not. Who comes later costs its hub no call, unless there is something to tell.
	askAgain = 15 * time.Minute
)

// toldOnce is for Registration.Told when a hub knows the device, and it is open what it knows of it.
const toldOnce = "once"

// DefaultGiveUp is for how long a device waits for its hub before its registration fails.
const DefaultGiveUp = 2 * time.Minute

// A Provisioning is a task that came a step further, for those who count.
type Provisioning struct {
	Scope, RegistrationID, Hub string
	// Outcome is "assigned", "failed", "linked" or "cleaned" at an end, "retry" when the task waits, "orphaned" when a hub keeps a device.
	Outcome string
	Err     error         // why it failed or waits
	Took    time.Duration // since the decision
	// OperationID is that of the device's operation which waited, and Substatus how the device comes to the hub.
	OperationID string
	Substatus   dps.Substatus
}

func (s *Service) observe(t *Task, hub, outcome string, err error) {
	if s.cfg.OnProvision != nil {
		p := Provisioning{Scope: s.scope, RegistrationID: t.ID, Hub: hub, Outcome: outcome, Err: err, Took: s.cfg.Now().Sub(t.Begun)}
		if g := t.Goal; g != nil {
			p.OperationID = g.Operation
			if g.Final != nil {
				p.Substatus = g.Final.Substatus
			}
		}
		s.cfg.OnProvision(p)
	}
	level := s.cfg.Log.Info
	if outcome == "orphaned" || outcome == "failed" {
		level = s.cfg.Log.Warn
	}
	reason := ""
	if err != nil {
		reason = err.Error()
	}
	level("provisioning", "registrationId", t.ID, "outcome", outcome, "hub", hub, "attempts", t.Attempts, "reason", reason)
}

// errUnlinked says that a hub is not linked any more.
var errUnlinked = errors.New("the hub is not linked")

// isTold reports whether hubs of a kind are told about devices.
func (k HubKind) isTold() bool { return k != HubRecord && k != "" }

// hub returns a linked hub; nil is one that is told nothing.
func (s *Service) hub(set *Settings, name string) (Hub, error) {
	h := set.Hub(name)
	switch {
	case h == nil:
		return nil, &HubError{Hub: name, Err: errUnlinked}
	case !h.Kind.isTold():
		return nil, nil
	case s.cfg.OpenHub == nil:
		return nil, &HubError{Hub: name, Err: fmt.Errorf("this service cannot tell hubs of kind %q", h.Kind)}
	}
	hub, err := s.cfg.OpenHub(s.cfg.Scope, *h)
	if err != nil {
		err = &HubError{Hub: name, Err: err}
	}
	return hub, err
}

// hubDevice is the device as its hub is to have it (service API, sections 4.3 and 4.4).
func hubDevice(req *Request, v *verdict, after *Registration, cert *Issued) (*HubDevice, error) {
	d := &HubDevice{ID: after.State.DeviceID, RegistrationID: req.RegistrationID, Group: v.group}
	d.IoTEdge = v.enrollment.Capabilities != nil && v.enrollment.Capabilities.IoTEdge
	slots := func(keys ...[]byte) *dps.SymmetricKeyAttestation {
		return &dps.SymmetricKeyAttestation{PrimaryKey: base64.StdEncoding.EncodeToString(keys[0]), SecondaryKey: base64.StdEncoding.EncodeToString(keys[len(keys)-1])}
	}
	issued := ""
	if after.Issued != nil && after.Operations[0].Started.Before(after.Issued.NotAfter) {
		issued = strings.ToUpper(after.Issued.Thumbprint)
	}
	switch {
	case v.x509:
		sum := sha256.Sum256(req.Proof.Certificates[0].Raw)
		if certs := v.enrollment.Attestation.X509; issued == "" && v.group == "" { // both slots, so that the device may roll over without us
			for _, c := range []*dps.X509Certificate{certs.ClientCertificates.Primary, certs.ClientCertificates.Secondary} {
				if c != nil && c.Info != nil {
					d.Thumbprints = append(d.Thumbprints, strings.ToUpper(c.Info.SHA256Thumbprint))
				}
			}
		}
		if len(d.Thumbprints) == 0 {
			d.Thumbprints = []string{strings.ToUpper(hex.EncodeToString(sum[:]))}
		}
		if issued != "" {
			d.Thumbprints = append(d.Thumbprints, issued)
		}
	case cert != nil: // it is to show its hub the certificate that it asked for
		d.Thumbprints = []string{issued}
	case v.tpm != nil:
		d.Keys = slots(after.DeviceKey)
	case v.group == "":
		d.Keys = slots(v.keys...)
	default:
		d.Keys = slots(v.groupKeys[0].Derive(req.RegistrationID), v.groupKeys[len(v.groupKeys)-1].Derive(req.RegistrationID))
		// Some tools fold the ID before they derive the key (device API, section 8.3): the device has the key that it signed with.
		if folded := dps.Fold(req.RegistrationID); folded != req.RegistrationID {
			if token, err := attest.ParseToken(req.Proof.Token); err == nil && slices.ContainsFunc(v.groupKeys, func(k attest.GroupKey) bool { return token.SignedBy(k.Derive(folded)) }) {
				d.Keys = slots(v.groupKeys[0].Derive(folded), v.groupKeys[len(v.groupKeys)-1].Derive(folded))
			}
		}
	}
	if d.Keys == nil && len(d.Thumbprints) == 0 {
		return nil, fmt.Errorf("registration %q: there is nothing that a hub could know the device by", after.ID)
	}
	return d, nil
}

// toldHash names what a hub is told. Keys are part of it, and do not follow from it: they have 128 bits at least.
func toldHash(hub, parent string, d *HubDevice) string {
	b, _ := json.Marshal(d) // plain text and numbers
	sum := sha256.Sum256(append([]byte(dps.Fold(hub)+"\x00"+dps.Fold(parent)+"\x00"), b...))
	return hex.EncodeToString(sum[:])
}

// twin is what a device gets that is new to its hub (service API, section 4.8); nil for nothing.
func (v *verdict) twin() *HubTwin {
	in := v.enrollment.InitialTwin
	if v.chosen != nil && v.chosen.twin != nil {
		in = v.chosen.twin
	}
	if in == nil {
		return nil
	}
	t := &HubTwin{Tags: in.Tags}
	if in.Properties != nil {
		t.Desired = in.Properties.Desired
	}
	return t
}

// tell makes a decision one that waits for hubs, where they have to be told: it changes after, and returns the task as it is to be
// written, which may have nothing left. mine says that it is the caller's.
func (s *Service) tell(tx Tx, req *Request, v *verdict, before, after *Registration, cert *Issued) (t *Task, mine bool, err error) {
	st := &after.State
	if before != nil {
		after.Told, after.Outbox = before.Told, before.Outbox
	}
	assigned := st.Status == dps.Assigned
	linked := v.settings.Hub(st.AssignedHub)
	told := assigned && (linked == nil && after.Told != "" || linked != nil && linked.Kind.isTold())
	if !told && !after.Outbox && (!assigned || after.Told == "") {
		return nil, false, nil // no hub knows of it
	}
	// Where the device is, as far as a hub was told.
	var from *Place
	if was, id := before.assignment(); was != "" && after.Told != "" {
		from = &Place{Hub: was, DeviceID: id}
	}
	now := s.cfg.Now()
	if assigned && told {
		g := &Goal{Place: Place{Hub: st.AssignedHub, DeviceID: st.DeviceID}, Operation: after.Operations[0].ID, Twin: v.twin(), Parent: dps.Fold(v.enrollment.Parent)}
		if g.Device, err = hubDevice(req, v, after, cert); err != nil {
			return nil, false, err
		}
		g.Told = toldHash(g.Hub, g.Parent, g.Device)
		g.Stay = from != nil && from.is(g.Place)
		g.AnyEdge = v.enrollment.Capabilities == nil
		g.Migrate = st.Substatus == dps.DeviceDataMigrated
		if g.Stay && after.Told == g.Told && before.State.Status == dps.Assigned && (linked == nil || now.Sub(before.Operations[0].Started) >= askAgain) {
			return nil, false, nil // the hub knows all of it
		}
		t = &Task{Goal: g}
	} else if assigned {
		t = &Task{Goal: &Goal{Place: Place{Hub: st.AssignedHub, DeviceID: st.DeviceID}, Operation: after.Operations[0].ID}}
	}
	cur, err := found(tx.Task(s.scope, after.ID))
	if err != nil || cur == nil && t == nil {
		after.Outbox = false
		return nil, false, err
	}
	if cur == nil {
		cur = &Task{ID: after.ID, Begun: now}
	}
	after.Outbox = true
	if t == nil { // refused or failed: what was begun ends, and former hubs are still to forget the device
		g := cur.Goal
		if g == nil {
			return nil, false, nil
		}
		if g.Stay {
			after.Told = toldOnce
		}
		cur.aim(nil, nil)
		for i := range after.Operations {
			if op := &after.Operations[i]; op.State.Status == dps.Assigning {
				op.State = after.Operations[0].State
			}
		}
	} else {
		joins := cur.Goal != nil && !cur.Goal.Done && cur.Goal.is(t.Goal.Place)
		if !joins {
			cur.Begun, cur.Attempts, cur.LastError = now, 0, ""
		}
		cur.aim(t.Goal, from)
		op := &after.Operations[0]
		final := op.State
		cur.Goal.Final = &final
		op.State = dps.RegistrationState{RegistrationID: st.RegistrationID, Status: dps.Assigning, CreatedDateTimeUTC: st.CreatedDateTimeUTC,
			LastUpdatedDateTimeUTC: st.LastUpdatedDateTimeUTC, ETag: st.ETag}
		*st = op.State
		if told {
			err = s.putKin(tx, cur)
		} else {
			err = tx.DeleteKin(s.scope, after.ID)
		}
		if err != nil {
			return nil, false, err
		}
		if joins && cur.Attempts > 0 && now.Before(cur.Due) { // it was tried a moment ago
			return cur, false, nil
		}
	}
	if mine = cur.Owner == "" || !now.Before(cur.Due); mine {
		cur.Owner, cur.Due = dps.NewUUID(), now.Add(leaseTime)
	}
	return cur, mine, nil
}

// putDecision writes a decision, and the task that follows from it if there is one. It returns the task if the caller is to work at it.
func (s *Service) putDecision(tx Tx, req *Request, v *verdict, before, after *Registration, cert *Issued) (*Task, error) {
	t, mine, err := s.tell(tx, req, v, before, after, cert)
	if err != nil {
		return nil, err
	}
	after.keepAssignment(before)
	if err := tx.PutRegistration(s.scope, after); err != nil || t == nil {
		return nil, err
	}
	if t.Hub = t.waitsFor(); t.Goal == nil && len(t.Away) == 0 {
		return nil, tx.DeleteTask(s.scope, t)
	}
	if err := tx.PutTask(s.scope, t); err != nil || !mine {
		return nil, err
	}
	return t, nil
}

// workFirst works at a task, if there is one, for a register call that waits for it, and returns the call's operation as it is then,
// as far as that counts.
func (s *Service) workFirst(ctx context.Context, req *Request, op *Operation, t *Task) *Operation {
	if t == nil {
		return op
	}
	ctx, cancel := context.WithTimeout(ctx, firstTry)
	defer cancel()
	s.workOn(ctx, t)
	if s.atOnce(req) {
		_ = s.cfg.Store.View(ctx, func(tx Tx) error { // else the device asks
			r, err := tx.Registration(s.scope, dps.Fold(req.RegistrationID))
			if now := r.operation(op.ID); err == nil && now != nil {
				op = now
			}
			return err
		})
	}
	return op
}

// workOn works at a task that is the caller's until it is done or has to wait, and writes down which. When it cannot even do that
// the task is anybody's after its lease.
func (s *Service) workOn(ctx context.Context, t *Task) {
	owner := t.Owner
	for {
		err := s.advance(ctx, t)
		if err != nil && !errors.Is(err, ErrConflict) {
			err = s.putOff(t, err)
		}
		if err == nil && (t.Owner != owner || t.Version == 0) {
			return
		}
		if err != nil && !errors.Is(err, ErrConflict) {
			s.cfg.Log.Error("provisioning is not written down", "registrationId", t.ID, "reason", err.Error())
			return
		}
		if err != nil { // a newer decision was made, or the lease went to another
			id := t.ID
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), writeTime)
			verr := s.cfg.Store.View(ctx, func(tx Tx) (err error) { t, err = found(tx.Task(s.scope, id)); return err })
			cancel()
			if verr != nil || t == nil || t.Owner != owner {
				return
			}
		}
	}
}

// write writes what edit, if any, makes of a task, or removes it when nothing is left of it. edit may run more than once, and works on
// a copy, which the task becomes. A worker that is told to stop still writes down how far it has come.
func (s *Service) write(t *Task, edit func(Tx, *Task) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), writeTime)
	defer cancel()
	var w Task
	err := s.cfg.Store.Update(ctx, func(tx Tx) error {
		w = *t
		w.Away = slices.Clone(t.Away)
		if t.Goal != nil {
			g := *t.Goal
			w.Goal = &g
		}
		if edit != nil {
			if err := edit(tx, &w); err != nil {
				return err
			}
		}
		if w.Goal == nil && len(w.Away) == 0 {
			if err := tx.DeleteTask(s.scope, &w); err != nil {
				return err
			}
			w.Version = 0
			return nil
		}
		w.Hub = w.waitsFor()
		return tx.PutTask(s.scope, &w)
	})
	if err == nil {
		*t = w
	}
	return err
}

func (t *Task) waitsFor() string {
	switch {
	case t.Goal != nil && !t.Goal.Done:
		return t.Goal.Hub
	case len(t.Away) > 0:
		return t.Away[0].Hub
	}
	return ""
}

// keep has the task stay the caller's for another call to a hub.
func (s *Service) keep(t *Task) error {
	now := s.cfg.Now()
	if t.Due.Sub(now) > callTime+writeTime {
		return nil
	}
	t.Due = now.Add(leaseTime)
	return s.write(t, nil)
}

// call makes one call to a hub.
func call[T any](ctx context.Context, s *Service, t *Task, f func(context.Context) (T, error)) (v T, err error) {
	if err := s.keep(t); err != nil {
		return v, err
	}
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	if v, err = f(ctx); err != nil && ctx.Err() != nil && !isTemporary(err) && !errors.Is(err, ErrNotFound) {
		err = &HubError{Hub: t.waitsFor(), Code: "Timeout", Temporary: true, Err: err}
	}
	return v, err
}

// advance brings a task to its end. Its error says what it has to wait for, or is ErrConflict when the task was changed meanwhile.
func (s *Service) advance(ctx context.Context, t *Task) error {
	var set *Settings
	var reg *Registration
	err := s.cfg.Store.View(ctx, func(tx Tx) error {
		revision, err := tx.Revision(s.scope)
		if err != nil {
			return err
		}
		if set, err = s.settingsAt(tx, revision); err != nil {
			return err
		}
		reg, err = found(tx.Registration(s.scope, t.ID))
		return err
	})
	if err != nil {
		return err
	}
	if g := t.Goal; g != nil && !g.waited(reg) { // the registration was deleted
		if err := s.write(t, func(_ Tx, w *Task) error { w.drop(); return nil }); err != nil || t.Version == 0 {
			return err
		}
	}
	if g := t.Goal; g != nil && !g.Done {
		left, err := s.admit(ctx, set, t)
		if err != nil {
			return err
		}
		if len(t.Away) > 0 {
			if err := s.write(t, func(tx Tx, w *Task) error { return s.reached(tx, w, left) }); err != nil {
				return err
			}
		}
	}
	if g := t.Goal; g != nil && g.Relink {
		hub, err := s.hub(set, g.Hub)
		if err == nil && hub != nil && g.Device != nil {
			err = s.introduce(ctx, hub, t, false)
		}
		if err != nil {
			return err
		}
		g.Relink = false
	}
	left, waits := s.removeAway(ctx, set, t)
	if errors.Is(waits, ErrConflict) {
		return waits
	}
	old := s.cfg.Now().Sub(t.Begun)
	if waits != nil && (t.Goal == nil && old < cleanupTime || t.Goal != nil && !t.Goal.Stay && isTemporary(waits) && old < s.giveUp()/4) {
		if len(left) > 0 {
			if err := s.write(t, func(tx Tx, w *Task) error { return s.leave(tx, w, left, errUnlinked) }); err != nil {
				return err
			}
		}
		return waits
	}
	if old >= cleanupTime {
		left = t.Away
	}
	return s.finish(t, left, waits)
}

// waited reports whether the registration, which may be nil, still waits for a goal.
func (g *Goal) waited(reg *Registration) bool {
	if g.Operation == "" {
		return reg != nil && Place{Hub: reg.Hub, DeviceID: reg.DeviceID}.is(g.Place)
	}
	op := reg.operation(g.Operation)
	return op != nil && op.State.Status == dps.Assigning
}

func (s *Service) giveUp() time.Duration { return cmp.Or(s.cfg.GiveUp, DefaultGiveUp) }

// admit has the goal's hub know the device, with its twin. left is where the device stays although it goes: with a twin that could not be
// read.
func (s *Service) admit(ctx context.Context, set *Settings, t *Task) (left []Place, err error) {
	g := t.Goal
	hub, err := s.hub(set, g.Hub)
	if err != nil || hub == nil || g.Device == nil {
		return nil, err
	}
	if !g.New {
		have, err := call(ctx, s, t, func(ctx context.Context) (*HubDevice, error) { return hub.Device(ctx, g.DeviceID) })
		ours := errors.Is(err, ErrNotFound)
		if err == nil {
			if g.AnyEdge {
				g.Device.IoTEdge = have.IoTEdge
			}
			if !g.Stay { // a former task may have been cut off from the hub half-way
				ours, err = s.unfinished(ctx, t.ID, g.Place)
			}
		}
		if ours { // from here on it is ours to finish, or to take away again
			err = s.write(t, func(_ Tx, w *Task) error { w.Goal.New = true; return nil })
			g = t.Goal
		}
		if err != nil {
			return nil, err
		}
	}
	disabled, moved := false, (*HubTwin)(nil)
	if g.From != nil {
		have, twin, err := s.data(ctx, set, t)
		switch {
		case err == nil:
			if disabled = have.Disabled; g.Migrate {
				moved = twin
				g.Device.IoTEdge = g.Device.IoTEdge || g.AnyEdge && have.IoTEdge
			}
		case errors.Is(err, ErrNotFound): // there is nothing to move
		case errors.Is(err, ErrConflict), isTemporary(err) && s.cfg.Now().Sub(t.Begun) < s.giveUp()/4:
			return nil, err
		case g.Migrate: // on without its data, which stay where they are
			left, t.LastError = []Place{*g.From}, err.Error()
		}
	}
	if err := s.introduce(ctx, hub, t, disabled); err != nil {
		return nil, err
	}
	if moved == nil && g.New {
		moved = g.Twin
	}
	if moved != nil {
		_, err = call(ctx, s, t, func(ctx context.Context) (any, error) { return nil, hub.MergeTwin(ctx, g.DeviceID, moved) })
	}
	return left, err
}

// data reads what the device has at the hub that it comes from.
func (s *Service) data(ctx context.Context, set *Settings, t *Task) (have *HubDevice, twin *HubTwin, err error) {
	from := t.Goal.From
	hub, err := s.hub(set, from.Hub)
	if err != nil {
		return nil, nil, err
	}
	if hub == nil {
		return nil, nil, ErrNotFound
	}
	have, err = call(ctx, s, t, func(ctx context.Context) (*HubDevice, error) { return hub.Device(ctx, from.DeviceID) })
	if err == nil && t.Goal.Migrate {
		twin, err = call(ctx, s, t, func(ctx context.Context) (*HubTwin, error) { return hub.Twin(ctx, from.DeviceID) })
	}
	return have, twin, err
}

// introduce tells the goal's hub who the device is, below its parent if that is there.
func (s *Service) introduce(ctx context.Context, hub Hub, t *Task, disabled bool) error {
	g := t.Goal
	d := *g.Device
	d.Disabled = disabled
	if g.Parent != "" {
		var err error
		if d.Parent, g.Pending, err = s.parentScope(ctx, hub, t); err != nil {
			return err
		}
		g.Device.Parent = d.Parent
	}
	_, err := call(ctx, s, t, func(ctx context.Context) (bool, error) { return hub.Admit(ctx, &d) })
	return err
}

// removeAway has former hubs forget the device. Those that are not linked any more are left with it.
func (s *Service) removeAway(ctx context.Context, set *Settings, t *Task) (left []Place, waits error) {
	for _, p := range slices.Clone(t.Away) {
		hub, err := s.hub(set, p.Hub)
		if err == nil && hub != nil {
			_, err = call(ctx, s, t, func(ctx context.Context) (any, error) { return nil, hub.Remove(ctx, p.DeviceID) })
		}
		switch {
		case err == nil:
			t.Away = slices.DeleteFunc(slices.Clone(t.Away), p.is)
		case errors.Is(err, ErrConflict):
			return nil, err
		case errors.Is(err, errUnlinked):
			left = append(left, p)
		default:
			waits = err
		}
	}
	return left, waits
}

// leave makes places of a task orphans.
func (s *Service) leave(tx Tx, w *Task, left []Place, why error) error {
	for _, p := range left {
		w.Away = slices.DeleteFunc(w.Away, p.is)
		if err := tx.PutOrphan(s.scope, &Orphan{ID: w.ID, Hub: p.Hub, DeviceID: p.DeviceID, Since: s.cfg.Now(), Reason: why.Error(), New: p.New}); err != nil {
			return err
		}
	}
	return nil
}

// waiting returns the registration that still waits for a task's goal, or ErrConflict.
func (s *Service) waiting(tx Tx, w *Task) (*Registration, error) {
	reg, err := found(tx.Registration(s.scope, w.ID))
	if err == nil && !w.Goal.waited(reg) {
		err = ErrConflict
	}
	return reg, err
}

// reached says in the registration that the device is where it is to be: from now on it may be taken from where it was.
func (s *Service) reached(tx Tx, w *Task, left []Place) error {
	g := w.Goal
	reg, err := s.waiting(tx, w)
	if err != nil {
		return err
	}
	reg.Hub, reg.DeviceID, reg.Told = g.Hub, g.DeviceID, g.Told
	if err := tx.PutRegistration(s.scope, reg); err != nil {
		return err
	}
	g.Done = true
	if err := s.leave(tx, w, left, errors.New(w.LastError)); err != nil {
		return err
	}
	return s.adopted(tx, w.ID, g.Place)
}

// finish ends a task, but for former hubs that have yet to forget the device.
func (s *Service) finish(t *Task, left []Place, waits error) error {
	g, was := t.Goal, *t
	var reg *Registration
	now := s.cfg.Now()
	err := s.write(t, func(tx Tx, w *Task) (err error) {
		if g == nil {
			reg, err = found(tx.Registration(s.scope, t.ID))
		} else {
			reg, err = s.waiting(tx, w)
		}
		if err != nil {
			return err
		}
		away := len(w.Away) > len(left)
		if reg != nil && (g != nil && g.Operation != "" || reg.Outbox != away) {
			if g != nil && g.Operation != "" {
				reg.Hub, reg.DeviceID, reg.Told = g.Hub, g.DeviceID, g.Told
				reg.end(g.Final, now)
			}
			reg.Outbox = away
			if err := tx.PutRegistration(s.scope, reg); err != nil {
				return err
			}
		}
		if g != nil {
			if err := errors.Join(s.adopted(tx, w.ID, g.Place), s.related(tx, w)); err != nil {
				return err
			}
		}
		w.Goal, w.Owner, w.Due = nil, "", now.Add(firstPause)
		return s.leave(tx, w, left, cmp.Or(waits, errUnlinked))
	})
	if err != nil {
		return err
	}
	for _, p := range left {
		s.observe(&was, p.Hub, "orphaned", waits)
	}
	switch {
	case g == nil:
		s.observe(&was, "", "cleaned", waits)
	case g.Operation == "":
		s.observe(&was, g.Hub, "linked", nil)
	default:
		if reg.Issued == nil {
			s.recent.put(reg.ID, &recentRegistration{reg.Group, reg.Operations[0]})
		}
		s.observe(&was, g.Hub, "assigned", waits)
	}
	return nil
}

// end gives every operation that waits, and the registration, their end.
func (r *Registration) end(final *dps.RegistrationState, now time.Time) {
	st := *final
	st.LastUpdatedDateTimeUTC, st.ETag = &dps.Time{Time: now}, newETag()
	for i := range r.Operations {
		if r.Operations[i].State.Status == dps.Assigning {
			r.Operations[i].State = st
		}
	}
	st.IssuedCertificateChain, st.IssuedClientCertificate = nil, ""
	r.State = st
}

// putOff has a task wait, or gives its goal up.
func (s *Service) putOff(t *Task, cause error) error {
	now := s.cfg.Now()
	t.Attempts++
	t.LastError = fmt.Sprintf("%.300s", cause.Error())
	var h *HubError
	isHub := errors.As(cause, &h)
	if g := t.Goal; g != nil && !g.Done && (isHub && !h.Temporary && !errors.Is(cause, ErrNotFound) || now.Sub(t.Begun) >= s.giveUp()) {
		return s.fail(t, cause)
	}
	most := maxPause
	if t.Goal == nil {
		most = maxCleanupPause
	}
	pause := min(firstPause<<min(t.Attempts-1, 16), most)
	pause += rand.N(pause/2 + 1) // so that those who met the same trouble do not all come back at once
	if isHub {
		pause = max(pause, min(h.RetryAfter, maxCleanupPause))
	}
	err := s.write(t, func(_ Tx, w *Task) error {
		w.Owner, w.Due = "", now.Add(pause)
		return nil
	})
	if err == nil {
		s.observe(t, t.waitsFor(), "retry", cause)
	}
	return err
}

// fail gives a goal up: the registration has failed, and what was made for it goes away.
func (s *Service) fail(t *Task, cause error) error {
	g, was := t.Goal, *t
	now := s.cfg.Now()
	err := s.write(t, func(tx Tx, w *Task) error {
		reg, err := s.waiting(tx, w)
		if err != nil {
			return err
		}
		w.drop()
		if g.Operation == "" {
			return s.unlinked(tx, w.ID, cause)
		}
		if reg.Outbox = len(w.Away) > 0; g.Stay {
			reg.Told = toldOnce
		}
		st := reg.State
		st.Status, st.ErrorCode, st.ErrorMessage = dps.Failed, int(dps.CodeHubRefused), hubMessage(g.Hub, cause)
		st.X509, st.SymmetricKey = g.Final.X509, g.Final.SymmetricKey
		reg.end(&st, now)
		return tx.PutRegistration(s.scope, reg)
	})
	if err == nil {
		s.observe(&was, g.Hub, "failed", cause)
	}
	return err
}

// hubMessage is what a device is told of a hub's error: what the hub said, as Azure does, and of a hub that said nothing no more than
// that.
func hubMessage(hub string, err error) string {
	var h *HubError
	switch {
	case !errors.As(err, &h):
		return fmt.Sprintf("IoT hub %s could not be told about the device", hub)
	case errors.Is(err, errUnlinked):
		return fmt.Sprintf("IoT hub %s is not linked", hub)
	}
	for errors.As(h.Err, &h) { // what the hub did before it was left alone says more than that it is
	}
	if h.Status == 0 {
		return fmt.Sprintf("IoT hub %s did not answer: %s", hub, cmp.Or(h.Code, "Unreachable"))
	}
	return fmt.Sprintf("%.500s", fmt.Sprintf("IoT hub %s: %d %s", hub, h.Status, strings.TrimSpace(fmt.Sprintf("%s %v", h.Code, h.Err))))
}
