package station

import (
	"context"
	"crypto/hmac"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/pkg/fixture"
	"github.com/touchmark/touchmark/pkg/ledger"
	"github.com/touchmark/touchmark/pkg/mint"
	"github.com/touchmark/touchmark/pkg/order"
	"github.com/touchmark/touchmark/pkg/stamp"
	"github.com/touchmark/touchmark/pkg/yield"
)

// A failure is why a unit did not pass.
// making is one unit on its way.
type making struct {
	s      *Station
	h      *headState
	serial string
	fields map[string]string
	row    mint.Row
	unit   *mint.Unit
	gen    int // of the Work that unit belongs to
	steps  []yield.Step
}

// Make makes the unit of a serial on a head, 0 for the first that is free, and returns once its verdict is final. The fields add
// to those of the configuration, the head and the probe. It blocks for as long as that takes; heads work side by side.
func (s *Station) Make(ctx context.Context, number int, serial string, given map[string]string) Verdict {
	return s.make(ctx, number, serial, given, func() {})
}

// make calls started once it has a head, or none.
func (s *Station) make(ctx context.Context, number int, serial string, given map[string]string, started func()) Verdict {
	serial = strings.TrimSpace(serial)
	h, refused := s.freeHead(number, serial)
	started()
	if refused != nil {
		return s.decide(nil, *refused, nil)
	}
	s.notify()
	m := &making{s: s, h: h, serial: serial, fields: map[string]string{}}
	maps.Copy(m.fields, s.cfg.Fields)
	maps.Copy(m.fields, s.cfg.heads[h.Number-1].fields)
	maps.Copy(m.fields, given)
	m.fields["serial"], m.fields["head"], m.fields["product"], m.fields["order"] = serial, strconv.Itoa(h.Number), s.setup.Product, s.setup.Order
	s.mu.Lock()
	v := Verdict{Serial: serial, Attempt: s.tries[serial] + 1}
	s.mu.Unlock()
	err := m.walk(ctx)
	v.Pass = err == nil
	if m.unit != nil {
		v.RegistrationID, v.Revision = m.unit.RegistrationID(), int(m.unit.Revision())
	}
	switch {
	case err != nil && ctx.Err() != nil:
		v.Detail = "stopped: " + err.Error()
	case err != nil:
		v = m.failed(ctx, v, err)
	}
	if m.unit != nil {
		// Once the device has its key the station does not keep it; before, the next try needs it.
		if ferr := m.unit.Forget(v.Pass && s.transit()); ferr != nil && v.Pass {
			v.Detail = "the stamp could not be taken away: " + ferr.Error()
		}
	}
	return s.decide(h, v, m.steps)
}

// failed completes the verdict of a unit that did not pass, and writes it down.
func (m *making) failed(ctx context.Context, v Verdict, err error) Verdict {
	s := m.s
	s.mu.Lock()
	v.Step = m.h.Step
	s.mu.Unlock()
	v.Code, v.Detail = codeOf(v.Step, err), err.Error()
	v.Fields = s.explain(ctx, v.Code, m.serial, err)
	// Written down although the shift is being stopped; but a line that is away is not waited for then.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	_ = s.with(ctx, nil, func(w *Work, _ int) error {
		if refusable(v.Code) {
			w.Refuse(ctx, m.serial, err)
		}
		if m.unit == nil || s.setup.DryRun || !countable(v.Code) {
			return nil
		}
		note, _ := json.Marshal(map[string]any{"code": v.Code, "step": v.Step, "head": m.h.Number, "operator": s.operatorName()})
		_, err := w.Ledger.AddNote(ctx, ledger.Note{Unit: m.unit.ID(), Kind: failNote, Data: note})
		return err
	})
	return v
}

// refusable reports whether a code is about what the order does not allow.
// explain returns what the sentence of a code shows. The serial is empty where the error is not about a unit.
// step shows that the next step begins, and measures the last one.
func (m *making) step(step Step) {
	now := m.s.setup.Now()
	m.s.setHead(m.h, func(h *Head) {
		if h.Step != "" {
			m.steps = append(m.steps, yield.Step{Name: string(h.Step), Duration: now.Sub(h.Stepped)})
		}
		h.State, h.Step, h.Stepped, h.Waiting = HeadWorking, step, now, ""
		h.Index, h.Of = slices.Index(m.s.steps, step)+1, len(m.s.steps)
	})
}

// walk takes the unit through its steps. What cannot be undone comes last.
func (m *making) walk(ctx context.Context) error {
	s := m.s
	if err := m.interlocks(ctx); err != nil {
		return err
	}
	if s.cfg.probe != nil {
		m.step(StepProbe)
		if err := m.probe(ctx); err != nil {
			return err
		}
	}
	m.step(StepMint)
	if err := m.mint(ctx); err != nil {
		return err
	}
	if s.setup.DryRun {
		return m.renderLabel(nil)
	}
	written := m.unit.State() >= ledger.Verified
	if !written {
		if err := m.write(ctx); err != nil {
			return err
		}
	}
	// A unit that was verified before proves itself again: another board may be on the head now.
	if err := m.prove(ctx); err != nil {
		return err
	}
	if !written {
		if err := m.onUnit(ctx, m.unitVerified); err != nil {
			return err
		}
	}
	if s.setup.Label != nil {
		if err := m.label(ctx); err != nil {
			return err
		}
	}
	m.step(StepSeal)
	err := m.onUnit(ctx, func(u *mint.Unit) error { return u.Sealed(ctx) })
	var dup *ledger.DuplicateError
	if errors.As(err, &dup) && dup.Unit.ID == m.unit.ID() {
		err = nil // the line went away after the seal was durable
	}
	m.step("")
	return err
}

func (m *making) unitVerified(u *mint.Unit) error { return u.Verified(context.Background()) }

// interlocks looks at what must be right before anything is done.
func (m *making) interlocks(ctx context.Context) error {
	s := m.s
	if err := mint.CheckSerial(m.serial); err != nil { // before it is asked for, or written down, anywhere
		return fail(CodeNotSerial, nil, err)
	}
	s.mu.Lock()
	tries := s.tries[m.serial]
	s.mu.Unlock()
	if tries >= s.cfg.Tries {
		return fail(CodeTries, map[string]string{"tries": strconv.Itoa(tries)}, nil)
	}
	if err := s.checkDisk(); err != nil {
		return err
	}
	return s.with(ctx, m.h, func(w *Work, _ int) error {
		if err := w.Ledger.CheckClock(); err != nil {
			return err
		}
		have, err := w.Ledger.Find(ctx, m.serial)
		if err == nil && have.State < ledger.Sealed {
			// A unit that is taken up. What it failed before counts, whoever restarted the station.
			fails, err := w.Ledger.Notes(ctx, have.ID, failNote)
			if err == nil && len(fails) >= s.cfg.Tries {
				err = fail(CodeTries, map[string]string{"tries": strconv.Itoa(len(fails))}, nil)
			}
			return err
		}
		if !errors.Is(err, ledger.ErrNotFound) {
			return err // nil: a unit that is made, which mint tells about
		}
		if err := w.Run.Admits(m.serial); err != nil {
			return err
		}
		for i := range w.Leased {
			if w.Leased[i].Has(m.serial) {
				return fmt.Errorf("%w: %s is leased to another station", order.ErrSerial, m.serial)
			}
		}
		if w.Grant == "" {
			return nil
		}
		places, err := w.Ledger.Places(ctx, w.Grant, m.serial)
		if err == nil {
			_, err = w.Ledger.CheckGrant(ctx, w.Grant, places)
		}
		return err
	})
}

func (s *Station) checkDisk() error {
	places := []string{s.setup.Out}
	s.workMu.RLock()
	if s.work != nil {
		places = append(places, filepath.Dir(s.work.Ledger.Path()))
	}
	s.workMu.RUnlock()
	for _, dir := range places {
		free, _, err := stamp.Free(dir)
		if err != nil {
			return fail(CodeDisk, map[string]string{"where": dir}, err)
		}
		if free < uint64(s.cfg.DiskFree)<<20 {
			return fail(CodeDisk, map[string]string{"where": dir}, fmt.Errorf("%d MiB are free in %s, %d are wanted", free>>20, dir, s.cfg.DiskFree))
		}
	}
	return nil
}

// probe asks the board what it is. What it answers are fields from then on, but for those that are set already.
func (m *making) probe(ctx context.Context) error {
	answer, _, err := m.command(m.s.cfg.probe).Probe(ctx, m.input(nil))
	if err != nil {
		return err
	}
	for key, want := range m.s.cfg.Probe.Expect {
		if want == "{product}" {
			want = m.s.setup.Product
		}
		if got := answer[key]; got != want {
			return fail(CodeProduct, map[string]string{"want": want, "found": orDash(got)}, fmt.Errorf("%w: the board's %s is %q, want %q", order.ErrProduct, key, got, want))
		}
	}
	for k, v := range answer {
		if _, set := m.fields[k]; !set {
			m.fields[k] = v
		}
	}
	return nil
}

// mint makes the unit's identity and its stamp, or finds what an earlier try left.
func (m *making) mint(ctx context.Context) error {
	return m.s.with(ctx, m.h, func(w *Work, gen int) (err error) {
		if m.row, err = w.Run.Row(m.serial, m.fields); err != nil {
			return fail(CodeNotSerial, nil, err)
		}
		if m.s.setup.DryRun {
			return w.Run.Admits(m.serial)
		}
		return m.again(ctx, w, gen)
	})
}

func (m *making) again(ctx context.Context, w *Work, gen int) error {
	u, err := w.Run.Unit(ctx, m.row)
	if err != nil {
		return err
	}
	m.unit, m.gen = u, gen
	m.s.countLeft(ctx, w)
	return nil
}

// onUnit calls f with the unit as the open line has it.
func (m *making) onUnit(ctx context.Context, f func(*mint.Unit) error) error {
	return m.s.with(ctx, m.h, func(w *Work, gen int) error {
		if gen != m.gen {
			if err := m.again(ctx, w, gen); err != nil {
				return err
			}
		}
		return f(m.unit)
	})
}

// command returns a command with the head's environment.
func (m *making) command(c *fixture.Command) *fixture.Command {
	env := m.s.cfg.heads[m.h.Number-1].env
	if len(env) == 0 {
		return c
	}
	mine := *c
	mine.Env = append(slices.Clone(c.Env), env...)
	return &mine
}

func (m *making) input(u *mint.Unit) fixture.Input {
	in := fixture.Input{Fields: m.fields}
	if u == nil {
		return in
	}
	in.Fields = maps.Clone(m.fields)
	in.Fields["registration-id"], in.Fields["dir"], in.Fields["revision"] = u.RegistrationID(), u.Dir(), strconv.FormatInt(u.Revision(), 10)
	for _, secret := range u.Secrets() {
		in.Secrets = append(in.Secrets, secret)
	}
	return in
}

// write flashes the device.
func (m *making) write(ctx context.Context) error {
	if m.s.cfg.flash == nil {
		return nil
	}
	m.step(StepFlash)
	for _, c := range m.s.cfg.flash {
		if _, err := m.command(c).Run(ctx, m.input(m.unit)); err != nil {
			return err
		}
	}
	return nil
}

// prove reads the device back, and has it prove that it has its key.
func (m *making) prove(ctx context.Context) error {
	s := m.s
	if s.cfg.back != nil {
		m.step(StepReadBack)
		for i, c := range s.cfg.back {
			want, err := os.ReadFile(filepath.Join(m.unit.Dir(), s.cfg.ReadBack[i].Compare))
			if err != nil {
				return fmt.Errorf("reading what was flashed: %w", err)
			}
			if _, err := m.command(c).ReadBack(ctx, m.input(m.unit), want); err != nil {
				return err
			}
		}
	}
	if s.cfg.prove != nil {
		m.step(StepChallenge)
		if _, err := m.command(s.cfg.prove).Prove(ctx, m.input(m.unit), m.unit.RegistrationID(), m.judge(ctx)); err != nil {
			return err
		}
	}
	if s.setup.Register != nil {
		m.step(StepRegister)
		if err := s.setup.Register(ctx, m.unit.Dir()); err != nil {
			return fail(CodeRegister, nil, err)
		}
	}
	return nil
}

// judge returns what verifies the device's answer: its public key, or its symmetric one.
func (m *making) judge(ctx context.Context) func(msg, sig []byte) error {
	return func(msg, sig []byte) error {
		pub, err := m.unit.Public()
		if err == nil {
			return fixture.Verify(pub, msg, sig)
		}
		if !errors.Is(err, hsm.ErrUnsupported) {
			return err
		}
		want, err := m.unit.MAC(ctx, msg)
		if err != nil {
			return err
		}
		if !hmac.Equal(want, sig) {
			return fixture.ErrSignature
		}
		return nil
	}
}

// labelOf is what the label of a unit shows.
// label prints the unit's label, and has it scanned. A printer that is away is waited for; a label of which nobody knows whether it
// came out is not printed again by itself.
// The kinds of notes that a station keeps of a unit: a try that failed, its label printed, and printed again.
const (
	failNote    = "fail"
	LabelNote   = "label"
	ReprintNote = "reprint"
)

// printed reports whether the unit's label came out of the printer in an earlier try. One whose note a crash lost is printed
// again: two labels of one unit say the same.
// scanBack waits for the label to be scanned.
// Asking returns the heads that ask for a label, and their serials.
// Scan hands a scanned label to the head that asks for it. It reports whether one took it.
// Cancel has a head that waits for its printer or its label give its unit up. It reports whether the head waited.
// stuck returns the next head, by its number, that waits for something to come back or for its label.
func (s *Station) stuck(after int) (Head, bool) {
	for _, h := range s.Heads() {
		if h.Number > after && (h.State == HeadWaiting || h.State == HeadAsking) {
			return h, true
		}
	}
	return Head{}, false
}

func (s *Station) working(serial string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, busy := s.inWork[serial]
	return busy
}

func (s *Station) hasFreeHead() bool {
	for _, h := range s.Heads() {
		if h.State == HeadIdle || h.State == HeadPassed || h.State == HeadFailed {
			return true
		}
	}
	return false
}

// Reprint prints the label of a finished unit again. It is counted and written down first.
// Retire ends a unit: reworked or scrapped.
func (s *Station) Retire(ctx context.Context, serial string, state ledger.State, reason, operator string) error {
	s.mu.Lock()
	n, busy := s.inWork[serial]
	if !busy {
		s.inWork[serial] = 0 // nobody begins its next identity while this one is taken away
		defer func() {
			s.mu.Lock()
			delete(s.inWork, serial)
			s.mu.Unlock()
		}()
	}
	s.mu.Unlock()
	if busy {
		return fail(CodeInWork, map[string]string{"serial": serial, "head": strconv.Itoa(n)}, nil)
	}
	if s.setup.DryRun {
		return nil
	}
	err := s.with(ctx, nil, func(w *Work, _ int) error {
		err := w.Retire(ctx, serial, state, ledger.Ending{Reason: reason, Operator: operator})
		s.countLeft(ctx, w)
		return err
	})
	if errors.Is(err, ledger.ErrNotFound) {
		return fail(CodeNotMade, map[string]string{"serial": serial}, err)
	}
	if err != nil {
		return err
	}
	kind := string(Rework)
	s.mu.Lock()
	delete(s.tries, serial)
	if state == ledger.Scrapped {
		kind = string(Scrap)
		s.tally.Scrap(s.standing[serial])
		delete(s.standing, serial)
	} else {
		s.tally.Rework()
	}
	s.mu.Unlock()
	s.event(kind, map[string]string{"serial": serial, "reason": reason, "operator": operator})
	return nil
}

// codeOf names an error of a step.
