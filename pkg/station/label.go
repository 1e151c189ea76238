package station

import (
	"context"
	"errors"
	"slices"
	"strconv"
	"time"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/pkg/label"
	"github.com/touchmark/touchmark/pkg/ledger"
	"github.com/touchmark/touchmark/pkg/mint"
)

func (s *Station) labelOf(u *mint.Unit, serial string, columns map[string]string, copy int) (label.Label, error) {
	l := label.Label{Serial: serial, Product: s.setup.Product, Copy: copy, Date: s.setup.Now(), Columns: columns}
	if u == nil {
		return l, nil
	}
	l.RegistrationID, l.Revision = u.RegistrationID(), strconv.FormatInt(u.Revision(), 10)
	pub, err := u.Public()
	if errors.Is(err, hsm.ErrUnsupported) {
		return l, nil
	}
	if err != nil {
		return l, err
	}
	l.Fingerprint, err = label.Fingerprint(pub)
	return l, err
}

func (m *making) renderLabel(u *mint.Unit) error {
	if m.s.setup.Label == nil {
		return nil
	}
	l, err := m.s.labelOf(u, m.serial, m.fields, 0)
	if err != nil {
		return err
	}
	_, err = m.s.setup.Label.Render(label.Format(m.s.cfg.Label.Format), l)
	return err
}

func (m *making) label(ctx context.Context) error {
	s := m.s
	l, err := s.labelOf(m.unit, m.serial, m.fields, 0)
	if err != nil {
		return err
	}
	m.step(StepLabel)
	printed, err := m.printed(ctx)
	if err != nil {
		return err
	}
	if !printed {
		if err := m.print(ctx, l); err != nil {
			return err
		}
		if err := s.with(ctx, m.h, func(w *Work, _ int) error {
			_, err := w.Ledger.AddNote(ctx, ledger.Note{Unit: m.unit.ID(), Kind: LabelNote})
			return err
		}); err != nil {
			return err
		}
	}
	if !s.cfg.Label.ScanBack {
		return nil
	}
	m.step(StepScan)
	return m.scanBack(ctx, l)
}

func (m *making) printed(ctx context.Context) (was bool, err error) {
	err = m.s.with(ctx, m.h, func(w *Work, _ int) error {
		notes, err := w.Ledger.Notes(ctx, m.unit.ID(), LabelNote)
		was = len(notes) > 0
		return err
	})
	return was, err
}

func (m *making) print(ctx context.Context, l label.Label) error {
	s := m.s
	job, err := s.setup.Label.Render(label.Format(s.cfg.Label.Format), l)
	if err != nil {
		return fail(CodePrint, nil, err)
	}
	for {
		err := s.cfg.heads[m.h.Number-1].printer.Print(ctx, job)
		away := errors.Is(err, label.ErrPrinter) || errors.Is(err, label.ErrPaper)
		if errors.Is(err, label.ErrUncertain) && s.cfg.Label.ScanBack {
			return nil // the scan will tell
		}
		if err == nil || !away || errors.Is(err, label.ErrUncertain) {
			return err
		}
		// Not the unit's fault: somebody loads paper or switches the printer on, and it goes on by itself.
		s.setHead(m.h, func(h *Head) { h.State, h.Waiting = HeadWaiting, codeOf(StepLabel, err) })
		if err := s.retry(ctx, m.h, err); err != nil {
			return err
		}
		s.setHead(m.h, func(h *Head) { h.State, h.Waiting = HeadWorking, "" })
	}
}

func (m *making) scanBack(ctx context.Context, l label.Label) error {
	s := m.s
	select {
	case <-m.h.scans: // left from before
	default:
	}
	s.setHead(m.h, func(h *Head) { h.State = HeadAsking })
	timeout := time.NewTimer(time.Duration(s.cfg.Label.ScanSeconds) * time.Second)
	defer timeout.Stop()
	select {
	case text := <-m.h.scans:
		if text == "" {
			return fail(CodeNoScan, nil, nil)
		}
		scan, err := label.ParseScan(text)
		if err != nil || !scan.Matches(l.Serial, l.Fingerprint) {
			return fail(CodeOtherLabel, map[string]string{"scan": text}, err)
		}
		return nil
	case <-timeout.C:
		return fail(CodeNoScan, nil, nil)
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s *Station) asking() []*headState {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []*headState
	for _, h := range s.heads {
		if h.State == HeadAsking {
			out = append(out, h)
		}
	}
	slices.SortStableFunc(out, func(a, b *headState) int { return a.Stepped.Compare(b.Stepped) })
	return out
}

func (s *Station) Scan(text string) bool {
	heads := s.asking()
	if len(heads) == 0 {
		return false
	}
	scan, err := label.ParseScan(text)
	h := heads[0]
	matched := false
	for _, c := range heads {
		if err == nil && c.Serial == scan.Serial {
			h, matched = c, true
			break
		}
	}
	if !matched && err == nil && scan.Bare && (s.hasFreeHead() || s.working(scan.Serial)) {
		return false // the next unit, most likely, or the one on another head once more
	}
	select {
	case h.scans <- text:
	default:
	}
	return true
}

func (s *Station) Cancel(number int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, h := range s.heads {
		if h.Number == number && (h.State == HeadWaiting || h.State == HeadAsking) {
			select {
			case h.scans <- "":
			default:
			}
			return true
		}
	}
	return false
}

func (s *Station) Reprint(ctx context.Context, serial string) (copies int64, err error) {
	if s.setup.Label == nil {
		return 0, fail(CodePrint, nil, errors.New("the station prints no labels"))
	}
	var u *mint.Unit
	err = s.with(ctx, nil, func(w *Work, _ int) error {
		if u, err = w.Run.Finished(ctx, serial); err != nil || s.setup.DryRun {
			return err
		}
		copies, err = w.Ledger.AddNote(ctx, ledger.Note{Unit: u.ID(), Kind: ReprintNote, Data: []byte(s.operatorName())})
		return err
	})
	if errors.Is(err, ledger.ErrNotFound) {
		return 0, fail(CodeNotMade, map[string]string{"serial": serial}, err)
	}
	if errors.Is(err, mint.ErrUnfinished) {
		return 0, fail(CodeNotFinished, map[string]string{"serial": serial}, err)
	}
	if err != nil {
		return 0, err
	}
	l, err := s.labelOf(u, serial, s.cfg.Fields, int(copies))
	if err != nil {
		return 0, err
	}
	job, err := s.setup.Label.Render(label.Format(s.cfg.Label.Format), l)
	if err != nil || s.setup.DryRun {
		return copies, err
	}
	if err := s.cfg.heads[0].printer.Print(ctx, job); err != nil {
		return copies, err
	}
	s.mu.Lock()
	s.reprints++
	s.mu.Unlock()
	s.event("reprint", map[string]string{"serial": serial, "copy": strconv.FormatInt(copies, 10), "operator": s.operatorName()})
	return copies, nil
}
