package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"golang.org/x/term"
)

// The terminal's rules:
//
//   - stdout carries the result and only the result; stderr is for the person: progress, notes, errors, hints;
//   - questions are asked on a terminal only, and never with --no-input;
//   - colour needs a terminal and neither NO_COLOR nor TERM=dumb; nothing is said by colour alone;
//   - a live line of progress needs a terminal; elsewhere a plain line comes now and then, and a closing one always.

// stdio is the program's world: its streams and its environment.
type stdio struct {
	in  io.Reader
	out io.Writer
	err io.Writer
	env func(string) (string, bool)
}

func (s *stdio) getenv(name string) string {
	v, _ := s.env(name)
	return v
}

func isTerminal(stream any) bool {
	f, ok := stream.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// colored reports whether escape sequences for colour may go to the stream.
func (a *app) colored(stream any) bool {
	switch a.color {
	case "always":
		return true
	case "never":
		return false
	}
	return isTerminal(stream) && a.getenv("NO_COLOR") == "" && a.getenv("TERM") != "dumb"
}

func (a *app) paint(stream any, code, text string) string {
	if !a.colored(stream) {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

var painted = regexp.MustCompile(`^\x1b\[\d+m(.*)\x1b\[0m$`)

// printable leaves out of text what could play with a terminal: serials, file names and what services answer come from
// outside.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || unicode.Is(unicode.Cf, r) {
			return -1
		}
		return r
	}, s)
}

// printJSON prints one JSON object on a line.
func (a *app) printJSON(v any) error {
	enc := json.NewEncoder(a.out)
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}

// note tells the person something on stderr.
func (a *app) note(format string, args ...any) {
	if !a.quiet {
		fmt.Fprintf(a.err, "touchmark: "+format+"\n", args...)
	}
}

// table prints rows under a header, aligned.
func (a *app) table(header []string, rows [][]string) error {
	w := tabwriter.NewWriter(a.out, 0, 4, 2, ' ', 0)
	if header != nil {
		fmt.Fprintln(w, strings.Join(header, "\t"))
	}
	for _, r := range rows {
		cells := make([]string, len(r))
		for i, c := range r {
			if m := painted.FindStringSubmatchIndex(c); m != nil {
				cells[i] = c[:m[2]] + printable(c[m[2]:m[3]]) + c[m[3]:]
			} else {
				cells[i] = printable(c)
			}
		}
		fmt.Fprintln(w, strings.Join(cells, "\t"))
	}
	return w.Flush()
}

// askSecret reads a PIN or passphrase from the terminal without showing it.
func (a *app) askSecret(ctx context.Context, what string) ([]byte, error) {
	if a.noInput {
		return nil, usageError{fmt.Errorf("--no-input forbids to ask for the %s", what)}
	}
	f, ok := a.in.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return nil, usageError{fmt.Errorf("no terminal to ask for the %s on", what)}
	}
	state, err := term.GetState(int(f.Fd()))
	if err != nil {
		return nil, err
	}
	fmt.Fprintf(a.err, "%s: ", what)
	defer fmt.Fprintln(a.err)
	return interruptible(ctx, func() ([]byte, error) { return term.ReadPassword(int(f.Fd())) }, func() { _ = term.Restore(int(f.Fd()), state) })
}

// askNew reads a PIN or passphrase that is being chosen: twice, so that a slip of the finger locks nobody out.
func (a *app) askNew(ctx context.Context, what string) ([]byte, error) {
	secret, err := a.askSecret(ctx, "new "+what)
	if err != nil {
		return nil, err
	}
	again, err := a.askSecret(ctx, "same again")
	defer clear(again)
	if err == nil && !bytes.Equal(secret, again) {
		err = refusedError{errors.New("the two differ")}
	}
	if err != nil {
		clear(secret)
		return nil, err
	}
	return secret, nil
}

// interruptible waits for a person's answer, and no longer than the context. What reads on behind it ends with the program.
func interruptible[T any](ctx context.Context, read func() (T, error), restore func()) (T, error) {
	type answer struct {
		v   T
		err error
	}
	done := make(chan answer, 1)
	go func() {
		v, err := read()
		done <- answer{v, err}
	}()
	select {
	case x := <-done:
		return x.v, x.err
	case <-ctx.Done():
		restore()
		var none T
		return none, ctx.Err()
	}
}

// confirm makes sure of something that destroys: --yes, or the name typed back.
func (a *app) confirm(ctx context.Context, yes bool, what, name string) error {
	if yes {
		return nil
	}
	if a.noInput || !isTerminal(a.in) {
		return usageError{fmt.Errorf("%s cannot be undone: say --yes", what)}
	}
	fmt.Fprintf(a.err, "%s cannot be undone. Type %s to go on: ", what, name)
	line, err := interruptible(ctx, func() (string, error) { return bufio.NewReader(a.in).ReadString('\n') }, func() {})
	if ctx.Err() != nil {
		return err
	}
	if err != nil || strings.TrimSpace(line) != name {
		return refusedError{fmt.Errorf("%s: not confirmed", what)}
	}
	return nil
}

// progress shows how far long work is: one live line on a terminal, a plain line every few seconds elsewhere.
type progress struct {
	a     *app
	doing string
	total int
	start time.Time
	last  time.Time
	live  bool
	shown bool
}

func (a *app) newProgress(doing string, total int) *progress {
	return &progress{a: a, doing: doing, total: total, start: time.Now(), last: time.Now(), live: isTerminal(a.err) && a.getenv("TERM") != "dumb"}
}

func (p *progress) step(done int) {
	p.say(func() string {
		return fmt.Sprintf("%s %d of %d, %.0f/s", p.doing, done, p.total, float64(done)/time.Since(p.start).Seconds())
	})
}

// say shows how far it is in other words, if it is time to.
func (p *progress) say(words func() string) {
	every := 5 * time.Second
	if p.live {
		every = 100 * time.Millisecond
	}
	now := time.Now()
	if p.a.quiet || now.Sub(p.last) < every {
		return
	}
	p.last = now
	text := words()
	if p.live {
		fmt.Fprintf(p.a.err, "\r\x1b[K%s", text)
		p.shown = true
	} else {
		fmt.Fprintf(p.a.err, "touchmark: %s\n", text)
	}
}

// clear takes the live line away, so that what follows starts on a clean one.
func (p *progress) clear() {
	if p.shown {
		fmt.Fprint(p.a.err, "\r\x1b[K")
		p.shown = false
	}
}
