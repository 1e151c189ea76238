package station

import (
	"context"
	"errors"
	"maps"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/touchmark/touchmark/pkg/label"
	"github.com/touchmark/touchmark/pkg/ledger"
)

// A Desk is a shift in front of a station, as a person goes through it: what to ask for, and what an answer means. Its methods may
// be called by many goroutines; none of them waits for work to be done.
type Desk struct {
	s         *Station
	operators *Operators // nil: any badge
	golden    func(context.Context) error
	ctx       context.Context
	stop      context.CancelFunc
	changed   chan struct{}
	work      sync.WaitGroup

	tick sync.Mutex // guards over, and what goes into changed
	over bool

	mu       sync.Mutex
	phase    Phase
	ask      Ask
	function Function
	subject  string
	reason   string
	head     int       // whose unit is to be given up
	person   *Operator // who gave a badge and still owes a PIN
	operator *Operator
	approved *Operator // the lead who allows the function
	checks   []Check
	notice   Code
	fields   map[string]string
	help     bool
	lock     lockout
	ending   bool
	leave    context.CancelFunc // of the ended shift's counts
	closed   error              // from closing the line
}

// linger is how long the counts of a shift that has ended stay, unless somebody leaves them.
const linger = 10 * time.Second

// NewDesk puts a desk in front of a station. The context ends what the desk starts. Operators may be nil, and so may golden, which
// holds the line against its golden sample.
func NewDesk(ctx context.Context, s *Station, operators *Operators, golden func(context.Context) error) *Desk {
	ctx, stop := context.WithCancel(ctx)
	d := &Desk{s: s, operators: operators, golden: golden, ctx: ctx, stop: stop, changed: make(chan struct{}, 1), phase: PhaseBadge, ask: AskBadge}
	s.notify = d.touch
	return d
}

func (d *Desk) touch() {
	d.tick.Lock()
	defer d.tick.Unlock()
	if d.over {
		return
	}
	select {
	case d.changed <- struct{}{}:
	default:
	}
}

// Changed ticks after there is something new to show; several changes may be one tick. It is closed when the shift has ended, all
// units have their verdicts, and somebody has seen the counts or ten seconds have passed.
func (d *Desk) Changed() <-chan struct{} { return d.changed }

// View returns what there is to show.
func (d *Desk) View() View {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := d.s
	v := View{Now: s.setup.Now(), Station: s.setup.Name, Product: s.setup.Product, Order: s.setup.Order, DryRun: s.setup.DryRun, Phase: d.phase,
		Ask: d.ask, Function: d.function, Subject: d.subject, Checks: slices.Clone(d.checks), Heads: s.Heads(), Counts: s.Counts(),
		Notice: d.notice, Fields: maps.Clone(d.fields), Help: d.help}
	if d.operator != nil {
		v.Operator = d.operator.Name
	}
	if d.ending && d.phase == PhaseWork && d.function == "" {
		v.Function = End
	}
	if d.phase == PhaseWork && d.function == "" {
		if asking := s.asking(); len(asking) > 0 {
			v.Function, v.Ask, v.AskHead = "", AskLabel, asking[0].Number
		}
	}
	if d.ask == AskReason {
		v.Reasons = reasonsOf(d.function)
	}
	s.mu.Lock()
	v.Last = slices.Clone(s.last)
	v.LampFields = maps.Clone(s.lamps)
	s.mu.Unlock()
	v.Lamps = slices.Sorted(maps.Keys(v.LampFields))
	return v
}

func reasonsOf(f Function) []string {
	if f == Rework {
		return ReworkReasons
	}
	return ScrapReasons
}

// say shows a notice until the next input.
func (d *Desk) say(code Code, fields map[string]string) { d.notice, d.fields = code, fields }

// Input takes a line: from a scanner, or typed.
func (d *Desk) Input(line string) {
	line = strings.Trim(line, " \t\r\n")
	if name, ok := strings.CutPrefix(line, "TM!"); ok {
		d.Function(Function(strings.ToLower(name)))
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	defer d.touch()
	d.notice, d.fields, d.help = "", nil, false
	switch d.ask {
	case AskBadge:
		d.badge(line)
	case AskPIN:
		d.pin(line)
	case AskRetry:
		d.startChecks()
	case AskSerial:
		d.serial(line)
	case AskReason:
		d.pickReason(line)
	case AskConfirm:
		if line == "" { // a scan is no answer
			d.confirm()
		}
	case AskClose:
		d.leave()
	case AskNothing:
		if d.phase == PhaseWork { // the last labels of a shift
			d.s.Scan(line)
		}
	}
}

// Function does what a function key says.
func (d *Desk) Function(f Function) {
	d.mu.Lock()
	defer d.mu.Unlock()
	defer d.touch()
	d.notice, d.fields = "", nil
	switch {
	case f == Help:
		d.help = !d.help
		return
	case d.ask == AskClose:
		d.leave()
		return
	case f == Yes:
		if d.ask == AskConfirm {
			d.confirm()
		}
		return
	case f == Cancel:
		d.help = false
		d.escape()
		return
	case f == End && !d.ending:
		if d.phase != PhaseWork {
			d.end()
			return
		}
		d.cancel()
		d.function, d.ask = End, AskConfirm
	case d.phase != PhaseWork || d.ending:
		return
	case f == Rework || f == Scrap || f == Reprint:
		d.function, d.subject, d.approved = f, "", nil
		d.ask = AskSerial
		if slices.Contains(d.s.cfg.LeadsOnly, string(f)) && !d.operator.Lead {
			d.ask = AskBadge
			d.say(CodeLead, nil)
		}
	}
	d.help = false
}

// escape leaves a function, or asks whether a unit that waits is to be given up: first of the first head, then of the next.
func (d *Desk) escape() {
	after := 0
	if d.function == Cancel {
		after = d.head
	}
	other := d.function != "" && d.function != Cancel
	d.cancel()
	if h, ok := d.s.stuck(after); ok && !other && d.phase == PhaseWork {
		d.function, d.ask, d.subject, d.head = Cancel, AskConfirm, h.Serial, h.Number
	}
}

func (d *Desk) cancel() {
	switch {
	case d.phase == PhaseWork:
		d.function, d.subject, d.reason, d.person, d.approved, d.ask = "", "", "", nil, nil, AskSerial
		if d.ending {
			d.ask = AskNothing
		}
	case d.phase == PhaseBadge:
		d.person, d.ask = nil, AskBadge
	}
}

func (d *Desk) badge(line string) {
	if line == "" {
		return
	}
	p := &Operator{Name: clip(line, 60), Lead: true}
	if d.operators != nil {
		var err error
		if p, err = d.operators.ByBadge(line); err != nil {
			d.say(CodeBadge, nil)
			return
		}
	}
	if p.PIN != "" {
		if d.lock.locked(d.s.setup.Now()) {
			d.say(CodePINLocked, nil)
			return
		}
		d.person, d.ask = p, AskPIN
		return
	}
	d.welcome(p)
}

func clip(s string, n int) string {
	if len(s) > n {
		return s[:n]
	}
	return s
}

func (d *Desk) pin(line string) {
	now := d.s.setup.Now()
	if d.person.CheckPIN(line) != nil {
		d.lock.miss(now)
		d.say(CodePIN, nil)
		if d.lock.locked(now) {
			d.person, d.ask = nil, AskBadge
			d.say(CodePINLocked, nil)
		}
		return
	}
	d.lock = lockout{}
	p := d.person
	d.person = nil
	d.welcome(p)
}

// welcome goes on with somebody whose badge and PIN are right: the operator of the shift, or a lead for a function.
func (d *Desk) welcome(p *Operator) {
	if d.function != "" {
		if !p.Lead {
			d.ask = AskBadge
			d.say(CodeLead, nil)
			return
		}
		d.approved, d.ask = p, AskSerial
		return
	}
	d.operator = p
	d.startChecks()
}

func (d *Desk) startChecks() {
	d.phase, d.ask = PhaseChecks, AskNothing
	d.checks = nil
	for _, name := range []string{"disk", "token", "ledger", "clock", "order", "fixture", "golden"} {
		if name == "golden" && d.golden == nil {
			continue
		}
		d.checks = append(d.checks, Check{Name: name, State: CheckWaiting})
	}
	operator := d.operator.Name
	d.work.Add(1)
	go func() {
		defer d.work.Done()
		d.runChecks(operator)
	}()
}

// runChecks looks at the station, and opens the line for the shift.
func (d *Desk) runChecks(operator string) {
	s, ctx := d.s, d.ctx
	good := true
	run := func(names []string, f func() error) {
		for _, n := range names {
			d.setCheck(n, CheckRunning, nil)
		}
		err := f()
		failed, state := "", CheckOK
		if err != nil {
			good, failed = false, checkOf(codeOf("", err), names)
		}
		for _, n := range names {
			if n == failed {
				d.setCheck(n, CheckFailed, err)
				state = CheckWaiting // nobody got there
				continue
			}
			d.setCheck(n, state, nil)
		}
	}
	run([]string{"disk"}, s.checkDisk)
	run([]string{"token", "ledger", "clock", "order"}, func() error { return s.Ready(ctx, operator) })
	run([]string{"fixture"}, s.checkFixture)
	if d.golden != nil && good {
		run([]string{"golden"}, func() error {
			if err := d.golden(ctx); err != nil {
				return fail(CodeGolden, nil, err)
			}
			return nil
		})
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	defer d.touch()
	switch {
	case d.ending:
	case good:
		d.phase, d.ask = PhaseWork, AskSerial
	default:
		d.ask = AskRetry
	}
}

// checkOf says which check of several a code is about; the first where it tells nothing.
func checkOf(c Code, names []string) string {
	about := map[Code]string{CodeToken: "token", CodeTokenPIN: "token", CodeClock: "clock", CodeAnchor: "ledger", CodeLedger: "ledger", CodeLocked: "ledger", CodeDisk: "disk"}[c]
	if strings.HasPrefix(string(c), "E-2") {
		about = "order"
	}
	if !slices.Contains(names, about) {
		if slices.Contains(names, "ledger") {
			return "ledger"
		}
		return names[0]
	}
	return about
}

func (d *Desk) setCheck(name string, state CheckState, err error) {
	var fields map[string]string
	if err != nil {
		fields = d.s.explain(d.ctx, codeOf("", err), "", err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for i := range d.checks {
		if d.checks[i].Name == name {
			d.checks[i].State = state
			if err != nil {
				d.checks[i].Code, d.checks[i].Detail, d.checks[i].Fields = codeOf("", err), err.Error(), fields
			}
		}
	}
	d.touch()
}

// Ready opens the line for a shift, and looks at its clock and its order.
func (s *Station) Ready(ctx context.Context, operator string) error {
	if err := s.Begin(ctx, operator); err != nil {
		return err
	}
	_, err := s.try(func(w *Work, _ int) error {
		if err := w.Ledger.CheckClock(); err != nil || w.Grant == "" {
			return err
		}
		// A spent order still has its units to finish, to rework and to print labels for.
		_, err := w.Ledger.CheckGrant(ctx, w.Grant, 0)
		if errors.Is(err, ledger.ErrExpired) { // what was begun in time is finished all the same
			units, uerr := w.Ledger.GrantUnits(ctx, w.Grant)
			if uerr == nil && units[ledger.Begun]+units[ledger.Minted]+units[ledger.Stamped]+units[ledger.Verified]+units[ledger.Reworked] > 0 {
				return nil
			}
		}
		if err != nil && !s.setup.DryRun {
			w.Refuse(ctx, "", err)
		}
		return err
	})
	return err
}

// checkFixture looks whether the programs of the fixture are there.
func (s *Station) checkFixture() error {
	for _, t := range append(slices.Clone(s.cfg.Flash), s.cfg.Probe.Tool, s.cfg.Challenge) {
		if len(t.Command) == 0 {
			continue
		}
		if _, err := exec.LookPath(t.Command[0]); err != nil {
			return fail(CodeFlash, nil, err)
		}
	}
	return nil
}

// serial takes a serial: of the next unit, or of the one that a function is for. A label that is asked for comes here as well.
func (d *Desk) serial(line string) {
	if line == "" {
		return
	}
	if d.function == "" && d.s.Scan(line) {
		return
	}
	serial := line
	if scan, err := label.ParseScan(line); err == nil {
		serial = scan.Serial // the unit's own label tells its serial as well
	}
	if d.function == "" {
		d.start(serial)
		return
	}
	d.subject = serial
	switch d.function {
	case Reprint:
		d.run(StepLabel, serial, func(ctx context.Context) error { _, err := d.s.Reprint(ctx, serial); return err })
		d.cancel()
	default:
		d.ask = AskReason
	}
}

// start begins a unit on a free head.
func (d *Desk) start(serial string) {
	if d.ending {
		return
	}
	d.work.Add(1)
	started := make(chan struct{}) // units take their heads in the order of their scans
	defer func() { <-started }()
	go func() {
		defer d.work.Done()
		v := d.s.make(d.ctx, 0, serial, nil, func() { close(started) })
		if v.Head == 0 || v.Code == CodeInWork { // it never got onto a head
			d.mu.Lock()
			d.say(v.Code, v.Fields)
			d.mu.Unlock()
		}
		d.touch()
	}()
}

func (d *Desk) pickReason(line string) {
	reasons := reasonsOf(d.function)
	n, err := strconv.Atoi(line)
	if i := slices.Index(reasons, strings.ToLower(line)); i >= 0 {
		n, err = i+1, nil
	}
	if err != nil || n < 1 || n > len(reasons) {
		return
	}
	d.reason, d.ask = reasons[n-1], AskConfirm
}

func (d *Desk) confirm() {
	switch d.function {
	case End:
		d.end()
		return
	case Cancel:
		d.s.Cancel(d.head)
		d.cancel()
		return
	}
	state := ledger.Reworked
	if d.function == Scrap {
		state = ledger.Scrapped
	}
	who := d.operator.Name
	if d.approved != nil {
		who += ", " + d.approved.Name
	}
	serial, reason := d.subject, d.reason
	d.run("", serial, func(ctx context.Context) error { return d.s.Retire(ctx, serial, state, reason, who) })
	d.cancel()
}

// run does something beside, and shows what went wrong.
func (d *Desk) run(step Step, serial string, f func(context.Context) error) {
	d.work.Add(1)
	go func() {
		defer d.work.Done()
		if err := f(d.ctx); err != nil {
			code := codeOf(step, err)
			fields := d.s.explain(d.ctx, code, serial, err)
			d.mu.Lock()
			d.say(code, fields)
			d.mu.Unlock()
		}
		d.touch()
	}()
}

// Finish ends the shift at once: units in work are stopped where they are, for the next shift to take up. It returns when none is
// in work any more, with what closing the line says.
func (d *Desk) Finish() error {
	d.stop()
	d.mu.Lock()
	d.end()
	d.mu.Unlock()
	for range d.changed { // until it is closed
	}
	return d.closed
}

// end takes no more units, and closes the shift once those in work have their verdicts: their labels are still asked for.
func (d *Desk) end() {
	if d.ending {
		return
	}
	d.cancel()
	d.ending, d.ask = true, AskNothing
	counts := d.phase == PhaseWork
	if !counts {
		d.phase = PhaseEnded
	}
	go func() {
		d.work.Wait()
		d.closed = d.s.Close()
		if counts {
			seen, leave := context.WithTimeout(d.ctx, linger)
			defer leave()
			d.mu.Lock()
			d.cancel()
			d.phase, d.ask, d.leave = PhaseEnded, AskClose, leave
			d.mu.Unlock()
			d.touch()
			<-seen.Done()
		}
		d.tick.Lock()
		defer d.tick.Unlock()
		d.over = true
		close(d.changed)
	}()
}
