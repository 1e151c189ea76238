package operator

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"net/http"
	"slices"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"github.com/touchmark/touchmark/pkg/dps"
)

// An Outcome is what became of a row.
type Outcome string

// The outcomes. A dry run has the same, as what would be.
const (
	OutcomeNew         Outcome = "new"
	OutcomeUnchanged   Outcome = "unchanged" // the service has it, with the same content
	OutcomeUpdated     Outcome = "updated"   // it had other content, which the row took the place of
	OutcomeConflicting Outcome = "conflict"  // it has other content, which stays
	OutcomeSkipped     Outcome = "skipped"   // it has one of that ID; nobody looked whether it is the same
	OutcomeInvalid     Outcome = "invalid"   // the row is no enrollment
	OutcomeFailed      Outcome = "failed"    // the service refused it
	OutcomeLeftOut     Outcome = "left out"  // it says nothing that the service API has a word for
)

// A Verdict is what became of one row, and why.
type Verdict struct {
	Line       int      `json:"line,omitempty"`
	Kind       Kind     `json:"kind,omitempty"`
	ID         string   `json:"id,omitempty"`
	Outcome    Outcome  `json:"outcome"`
	Changes    []Change `json:"changes,omitempty"` // where it was updated or is a conflict
	Reason     string   `json:"reason,omitempty"`
	Code       dps.Code `json:"code,omitempty"`
	TrackingID string   `json:"trackingId,omitempty"`
	// Unjudged is set in a dry run whose service does not say whether it would take the row.
	Unjudged bool `json:"unjudged,omitempty"`
}

// Bad reports whether the row is not at the service as it should be.
func (v *Verdict) Bad() bool {
	return v.Outcome == OutcomeConflicting || v.Outcome == OutcomeInvalid || v.Outcome == OutcomeFailed
}

// Counts counts rows by what became of them.
type Counts struct {
	Rows        int `json:"rows"`
	New         int `json:"new"`
	Unchanged   int `json:"unchanged"`
	Updated     int `json:"updated"`
	Conflicting int `json:"conflicting"`
	Skipped     int `json:"skipped"`
	Invalid     int `json:"invalid"`
	Failed      int `json:"failed"`
	LeftOut     int `json:"leftOut"`
	Unjudged    int `json:"unjudged,omitempty"` // of a dry run: those of New and Updated that the service did not judge
}

// Bad returns how many rows are not at the service as they should be.
func (c *Counts) Bad() int { return c.Conflicting + c.Invalid + c.Failed }

func (c *Counts) add(o Outcome) {
	c.Rows++
	*map[Outcome]*int{OutcomeNew: &c.New, OutcomeUnchanged: &c.Unchanged, OutcomeUpdated: &c.Updated, OutcomeConflicting: &c.Conflicting,
		OutcomeSkipped: &c.Skipped, OutcomeInvalid: &c.Invalid, OutcomeFailed: &c.Failed, OutcomeLeftOut: &c.LeftOut}[o]++
}

// A Source yields rows, and tells by a hash which it has yielded.
type Source interface {
	All() iter.Seq2[Row, error]
	Digest() []byte
}

// ImportConfig says what to do with rows.
type ImportConfig struct {
	// DryRun compares and changes nothing.
	DryRun bool
	// Update puts rows in the place of what differs from them. SkipExisting leaves alone what is there without looking at it. With
	// neither, what differs is a conflict.
	Update, SkipExisting bool
	// StopOnError ends with the first row that is Bad, and the bulk call that it went with.
	StopOnError bool
	// Parallel is how many calls are under way at once; 0 means 4.
	Parallel int
	// Journal remembers how far an import came; nil remembers nothing.
	Journal *Journal
	// Report is told every verdict, in the order of the rows, by one goroutine.
	Report func(Verdict) error
}

// Import sends rows to the service: as creates, ten to a call, and what exists is compared. It keeps the order of rows of one ID, and
// no more than a few calls' worth of rows. Enrollments that exist and are the same are Unchanged, so that an import that was cut
// off is finished by importing again; a journal spares the comparing.
//
// The error is one that keeps everything from going on; what it says nothing about is done. Counts are of what was reported.
func (c *Client) Import(ctx context.Context, rows Source, cfg ImportConfig) (Counts, error) {
	im := &importer{c: c, cfg: cfg}
	if im.cfg.Parallel <= 0 {
		im.cfg.Parallel = 4
	}
	if cfg.StopOnError {
		im.cfg.Parallel = 1
	}
	if cfg.Journal != nil {
		im.counts = cfg.Journal.Counts
	}
	err := ordered(ctx, im.cfg.Parallel, im.batches(rows), im.send, im.report)
	if errors.Is(err, errStopped) {
		err = nil
	}
	return im.counts, err
}

type importer struct {
	c      *Client
	cfg    ImportConfig
	counts Counts
	single atomic.Bool // the service has no bulk call
	silent atomic.Bool // it does not judge
}

// A batch is what goes with one bulk call: documents of one kind and different IDs, and rows between them that need none.
type batch struct {
	rows     []Row
	verdicts []Verdict
	docs     int
	digest   []byte        // of all rows up to its last
	done     chan struct{} // closed when it was sent
}

// maxBatch bounds the rows that go with a bulk call without being part of it.
const maxBatch = 1000

// batches cuts rows up. A row waits while another of its ID is under way.
func (im *importer) batches(rows Source) iter.Seq2[*batch, error] {
	return func(yield func(*batch, error) bool) {
		under := make(map[string]*batch)
		b := &batch{done: make(chan struct{})}
		flush := func() bool {
			if len(b.rows) == 0 {
				return true
			}
			full := b
			b = &batch{done: make(chan struct{})}
			return yield(full, nil)
		}
		skip := 0
		if im.cfg.Journal != nil {
			skip = im.cfg.Journal.Counts.Rows
		}
		var kind Kind
		for row, err := range rows.All() {
			if err != nil {
				_ = flush() && yield(nil, err)
				return
			}
			if skip > 0 {
				if skip--; skip == 0 && !im.cfg.Journal.matches(rows.Digest()) {
					yield(nil, ErrOtherFile)
					return
				}
				continue
			}
			if d := row.Document; d != nil {
				id := string(d.Kind) + " " + dps.Fold(d.ID)
				before := under[id]
				if b.docs == MaxBulk || d.Kind != kind || before == b {
					if !flush() {
						return
					}
				}
				if before != nil {
					<-before.done // a batch that was yielded is always sent, or the yield says no more
				}
				kind = d.Kind
				b.docs++
				under[id] = b
				if len(under) > 100*MaxBulk {
					for id, b := range under {
						select {
						case <-b.done:
							delete(under, id)
						default:
						}
					}
				}
			}
			b.rows = append(b.rows, row)
			if im.cfg.Journal != nil {
				b.digest = rows.Digest()
			}
			if len(b.rows) >= maxBatch && !flush() {
				return
			}
		}
		if skip > 0 {
			yield(nil, ErrOtherFile)
			return
		}
		flush()
	}
}

// send finds out what becomes of each row of a batch, and has it become that.
func (im *importer) send(ctx context.Context, b *batch) (*batch, error) {
	defer close(b.done)
	b.verdicts = make([]Verdict, len(b.rows))
	var docs []*Document
	var at []int
	for i, row := range b.rows {
		v := &b.verdicts[i]
		v.Line = row.Line
		switch {
		case row.Err != nil:
			v.ID, v.Outcome, v.Reason = row.ID, OutcomeInvalid, row.Err.Error()
		case row.Document == nil:
			v.ID, v.Outcome, v.Reason = row.ID, OutcomeLeftOut, row.Note
		default:
			v.Kind, v.ID, v.Reason = row.Document.Kind, row.Document.ID, row.Note
			docs, at = append(docs, row.Document), append(at, i)
		}
	}
	one := func(i int, do func(*Document, *Verdict) error) error {
		return im.settle(&b.verdicts[at[i]], do(docs[i], &b.verdicts[at[i]]))
	}
	switch {
	case len(docs) == 0:
		return b, nil
	case im.cfg.DryRun:
		var ask []*Document
		var of []*Verdict
		for i := range docs {
			if err := one(i, func(d *Document, v *Verdict) error {
				sent, err := im.foresee(ctx, d, v)
				if sent != nil {
					ask, of = append(ask, sent), append(of, v)
				}
				return err
			}); err != nil {
				return b, err
			}
		}
		return b, im.judge(ctx, ask, of)
	}
	var refused map[string]BulkError
	var lost bool
	err := error(nil)
	single := im.single.Load()
	if !single {
		refused, lost, err = im.c.Bulk(ctx, BulkCreate, docs)
		var e *Error
		if errors.As(err, &e) && slices.Contains([]int{http.StatusBadRequest, http.StatusNotFound, http.StatusMethodNotAllowed, http.StatusRequestEntityTooLarge, http.StatusNotImplemented}, e.Status) {
			single, err = true, nil // which of them it is, a call for each tells
			im.single.CompareAndSwap(false, e.Status == http.StatusNotFound || e.Status == http.StatusMethodNotAllowed || e.Status == http.StatusNotImplemented)
		}
	}
	if err != nil {
		return b, err
	}
	for i, d := range docs {
		err := one(i, func(d *Document, v *Verdict) error {
			if single {
				_, err := im.c.Create(ctx, d)
				if errors.Is(err, ErrExists) {
					return im.existing(ctx, d, v, false)
				}
				v.Outcome = OutcomeNew
				return err
			}
			e, is := refused[dps.Fold(d.ID)]
			switch {
			case !is:
				v.Outcome = OutcomeNew
				return nil
			case e.Code.Status() == http.StatusConflict:
				return im.existing(ctx, d, v, lost)
			}
			return &Error{Host: im.c.host, Status: e.Code.Status(), Code: e.Code, Message: clip(e.Status)}
		})
		if err != nil {
			return b, fmt.Errorf("%s: %w", d, err)
		}
	}
	return b, nil
}

// settle makes a service's refusal of one row that row's verdict. What is left concerns all rows.
func (im *importer) settle(v *Verdict, err error) error {
	var e *Error
	if !errors.As(err, &e) || errors.Is(err, ErrUnauthorized) || errors.Is(err, ErrThrottled) || e.Status == http.StatusServiceUnavailable {
		return err
	}
	v.Outcome, v.Reason, v.Code, v.TrackingID = OutcomeFailed, e.text(), e.Code, e.TrackingID
	return nil
}

// text returns the message, where there is one.
func (e *Error) text() string {
	if e.Message != "" {
		return e.Message
	}
	return e.Error()
}

// existing decides about a row whose ID is taken.
func (im *importer) existing(ctx context.Context, d *Document, v *Verdict, lost bool) error {
	for range 5 {
		if im.cfg.SkipExisting && !lost {
			v.Outcome = OutcomeSkipped
			return nil
		}
		changes, have, err := im.c.Differs(ctx, d)
		switch {
		case err != nil:
			return err
		case len(changes) == 0 && lost:
			v.Outcome = OutcomeNew
			return nil
		case len(changes) == 0:
			v.Outcome = OutcomeUnchanged
			return nil
		}
		v.Changes = changes
		if !im.cfg.Update {
			v.Outcome = OutcomeConflicting
			return nil
		}
		_, err = im.c.Replace(ctx, d, have.ETag())
		if !errors.Is(err, ErrChanged) {
			v.Outcome = OutcomeUpdated
			return err
		}
	}
	return fmt.Errorf("%s keeps changing: %w", d, ErrChanged)
}

// judge asks the service whether it would take what a dry run would send.
func (im *importer) judge(ctx context.Context, docs []*Document, verdicts []*Verdict) error {
	if len(docs) == 0 {
		return nil
	}
	var refused map[string]BulkError
	err := ErrUnsupported
	if !im.silent.Load() {
		refused, err = im.c.Judge(ctx, docs)
	}
	silent := errors.Is(err, ErrUnsupported)
	if silent {
		im.silent.Store(true)
	} else if err != nil {
		return err
	}
	for i, v := range verdicts {
		if e, is := refused[dps.Fold(docs[i].ID)]; is {
			v.Outcome, v.Changes, v.Code, v.Reason = OutcomeFailed, nil, e.Code, clip(e.Status)
		}
		v.Unjudged = silent
	}
	return nil
}

// foresee says what would become of a row, and returns what would be sent for that; nil for nothing.
func (im *importer) foresee(ctx context.Context, d *Document, v *Verdict) (sent *Document, err error) {
	changes, have, err := im.c.Differs(ctx, d)
	switch {
	case errors.Is(err, ErrNotFound) && d.describes():
		v.Outcome, v.Reason = OutcomeFailed, "a certificate is described and not there: services show no certificates (touchmark import of the line's bundle has them)"
		return nil, nil
	case errors.Is(err, ErrNotFound):
		v.Outcome = OutcomeNew
		sent = d.clone()
		sent.Portable()
		return sent, nil
	case err != nil:
		return nil, err
	case len(changes) == 0:
		v.Outcome = OutcomeUnchanged
	case im.cfg.Update:
		v.Outcome = OutcomeUpdated
		sent = d.clone()
		sent.Portable()
		err = sent.Set("etag", have.ETag())
	case im.cfg.SkipExisting:
		v.Outcome = OutcomeSkipped
	default:
		v.Outcome = OutcomeConflicting
	}
	v.Changes = changes
	return sent, err
}

// report tells what became of a batch, and remembers it.
func (im *importer) report(b *batch) error {
	bad := false
	for i := range b.verdicts {
		v := &b.verdicts[i]
		im.counts.add(v.Outcome)
		if v.Unjudged {
			im.counts.Unjudged++
		}
		bad = bad || v.Bad()
		if im.cfg.Report != nil {
			if err := im.cfg.Report(*v); err != nil {
				return err
			}
		}
	}
	switch {
	case bad && im.cfg.StopOnError:
		return errStopped // not remembered: these rows are looked at again
	case im.cfg.Journal != nil && !im.cfg.DryRun:
		return im.cfg.Journal.save(im.counts, b.digest)
	}
	return nil
}

// ordered has work done on items, so many at a time, and hands on what comes out in the order of the items. The first error ends
// it; what was under way before is handed on first.
func ordered[In, Out any](ctx context.Context, parallel int, items iter.Seq2[In, error], work func(context.Context, In) (Out, error), emit func(Out) error) error {
	type future struct {
		out  Out
		err  error
		done chan struct{}
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	queue := make(chan *future, parallel)
	room := make(chan struct{}, parallel)
	var eg errgroup.Group
	eg.Go(func() error {
		defer close(queue)
		for item, err := range items {
			f := &future{err: err, done: make(chan struct{})}
			if err != nil {
				close(f.done)
			} else {
				select {
				case room <- struct{}{}:
				case <-ctx.Done():
					return nil
				}
				eg.Go(func() error {
					defer func() { <-room; close(f.done) }()
					f.out, f.err = work(ctx, item)
					return nil
				})
			}
			select {
			case queue <- f:
			case <-ctx.Done():
				return nil
			}
			if err != nil {
				return nil
			}
		}
		return nil
	})
	var first error
	for f := range queue {
		<-f.done
		if first != nil {
			continue
		}
		if f.err == nil {
			first = emit(f.out)
		} else {
			first = f.err
		}
		if first != nil {
			cancel()
		}
	}
	_ = eg.Wait() // its functions return nil
	if first == nil {
		first = ctx.Err()
	}
	return first
}
