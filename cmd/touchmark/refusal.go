package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"time"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/signed"
	"github.com/touchmark/touchmark/pkg/filelock"
	"github.com/touchmark/touchmark/pkg/ledger"
	"github.com/touchmark/touchmark/pkg/order"
)

// Attempts to make what an order does not allow are written down: in the ledger where it is open, else in a file beside it that
// the ledger takes in when it opens next. The report of an order names them.

const (
	refusalsFile = "refused.jsonl"
	refusalNote  = "refused"
	maxRefusals  = 1000 // of them wait beside a ledger that does not open
)

// A refusal is a note of its kind.
type refusal struct {
	order.Refusal
	Grant string `json:"grant,omitempty"`
}

// refusalKind names what an attempt was refused for; empty for errors that are none.
func refusalKind(err error) string {
	var dup *ledger.DuplicateError
	for _, k := range []struct {
		is   error
		kind string
	}{
		{ledger.ErrSpent, "spent"}, {ledger.ErrExpired, "expired"}, {ledger.ErrNotOpen, "early"}, {ledger.ErrClosed, "closed"},
		{ledger.ErrOtherGrant, "replayed"}, {ledger.ErrRolledBack, "rolled-back"}, {ledger.ErrScrapped, "scrapped"}, {ledger.ErrClock, "clock"},
		{hsm.ErrClaimed, "copied"}, {hsm.ErrCounter, "copied"}, {ledger.ErrAnchor, "anchor"}, {filelock.ErrLocked, "second"},
		{order.ErrStation, "station"}, {order.ErrProduct, "product"}, {order.ErrCounter, "counter"}, {order.ErrSerial, "serial"}, {order.ErrInvalid, "invalid"},
		{signed.ErrUntrusted, "untrusted"}, {signed.ErrCorrupt, "edited"},
	} {
		if errors.Is(err, k.is) {
			return k.kind
		}
	}
	if errors.As(err, &dup) {
		return "duplicate"
	}
	return ""
}

// refuse writes an attempt down. That it fails takes nothing from the refusal itself.
func (f *floor) refuse(ctx context.Context, g *order.Grant, serial string, err error) {
	r := newRefusal(g, serial, err)
	b, _ := json.Marshal(r) // strings always marshal
	if _, nerr := f.ledger.AddNote(context.WithoutCancel(ctx), ledger.Note{Kind: refusalNote, Data: b}); nerr != nil {
		f.keepRefusal(r)
	}
}

func newRefusal(g *order.Grant, serial string, err error) refusal {
	r := refusal{Refusal: order.Refusal{At: time.Now().UTC().Truncate(time.Second), Kind: refusalKind(err), Serial: clip(serial, 128), Why: clip(err.Error(), 400)}}
	if r.Kind == "" {
		r.Kind = "no-order"
	}
	if g != nil {
		r.Grant = g.ID()
	}
	return r
}

func clip(s string, n int) string {
	if len(s) > n {
		return s[:n]
	}
	return s
}

// keepRefusal writes an attempt down beside a ledger that does not open, flushed.
func (l *line) keepRefusal(r refusal) {
	f, err := os.OpenFile(l.path(refusalsFile), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return
	}
	b, _ := json.Marshal(r)
	if st, err := f.Stat(); err != nil || st.Size() > maxRefusals*1024 {
		b = nil // enough of them wait already
	}
	_, _ = f.Write(append(b, '\n'))
	_ = f.Sync()
	_ = f.Close()
}

// absorbRefusals brings what was written beside the ledger into it. A line that is there twice after a crash in between is twice
// in the report, which is better than not at all.
func (f *floor) absorbRefusals(ctx context.Context) error {
	b, err := os.Open(f.path(refusalsFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer b.Close()
	s := bufio.NewScanner(io.LimitReader(b, maxRefusals*1024)) // what somebody else added behind that is not read
	for n := 0; s.Scan() && n < maxRefusals; n++ {
		var r refusal
		if json.Unmarshal(s.Bytes(), &r) != nil {
			continue // a line that was cut off
		}
		note, _ := json.Marshal(r)
		if _, err := f.ledger.AddNote(ctx, ledger.Note{Kind: refusalNote, Data: note}); err != nil {
			return err
		}
	}
	return os.Remove(f.path(refusalsFile))
}

// refusals returns what was refused on a grant, and what was refused before it was known which one was meant.
func (f *floor) refusals(ctx context.Context, grant string) ([]order.Refusal, error) {
	notes, err := f.ledger.Notes(ctx, 0, refusalNote)
	if err != nil {
		return nil, err
	}
	var all []order.Refusal
	for _, n := range notes {
		var r refusal
		if err := json.Unmarshal(n.Data, &r); err != nil {
			return nil, err
		}
		if r.Grant == grant || r.Grant == "" {
			all = append(all, r.Refusal)
		}
	}
	return all, nil
}
