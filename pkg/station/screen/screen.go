// Package screen is the technician's full-screen terminal: what a station is doing, large enough to be read from two metres, in the
// technician's language.
//
// [Run] shows the views of a [Floor] and hands it what is scanned and typed, line by line. It needs 80 columns and 24 rows, uses more,
// and on less says so and still shows verdicts and codes. It works without colour, with ASCII only, and over a serial line to a
// vt100; nothing is meant by colour alone. A scanner is a keyboard that ends with Enter (CR, LF or CR LF; tabs and other control
// characters around a code are dropped), and Enter is the only key that is ever needed. PASS rings the bell once, FAIL three times.
// Whatever comes from outside is made harmless before the terminal sees it, and input has no way to the terminal's own controls.
//
// One Run owns its terminal; it returns when the floor has ended, and leaves the terminal as it found it.
package screen

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strings"
	"time"

	tea "charm.land/bubbletea/v2"
	"github.com/charmbracelet/colorprofile"
	"github.com/charmbracelet/x/term"
	"github.com/muesli/cancelreader"

	"github.com/touchmark/touchmark/pkg/station"
	"github.com/touchmark/touchmark/pkg/station/texts"
)

// ErrInterrupted is what Run returns after Ctrl-C was pressed twice.
var ErrInterrupted = errors.New("interrupted")

// A Floor is the station behind the screen. Its methods are called from one goroutine, and none of them may wait: they hand over and
// return.
type Floor interface {
	// View is what to show now. It is also called once a second, for the timers.
	View() station.View
	// Changed ticks after the view has changed; several changes may be one tick. It is closed when there is nothing more to show.
	// It is always the same channel.
	Changed() <-chan struct{}
	// Input takes a line that was scanned or typed, without its end: untrusted, at most 1024 characters, valid UTF-8, without control
	// characters apart from U+001C to U+001F. A line that was longer is cut there, which is longer than any serial.
	Input(line string)
	// Function takes a function key.
	Function(f station.Function)
}

// Config says what to show, and on which terminal.
type Config struct {
	Station Floor
	Texts   *texts.Text
	In      io.Reader // what is scanned and typed; put into raw mode while it is a terminal
	Out     io.Writer
	Term    string // the terminal's type, as in TERM
	Color   bool   // whether to use colours: the caller knows NO_COLOR
	// ASCII is for terminals that do not take UTF-8: no block characters, letters without their accents. What cannot be spelt so
	// (Chinese) is shown in English.
	ASCII bool
}

// maxLine is how many characters of a line are kept.
const maxLine = 1024

// escapeTime is how long an unfinished escape sequence may pause. At 9600 baud its bytes come a millisecond apart.
const escapeTime = 50 * time.Millisecond

// Run shows the station until its channel closes, and returns nil then. It returns [ErrInterrupted] after a second Ctrl-C (the first
// is station.End), the context's cause when that ends, and io.ErrUnexpectedEOF when nothing more can be scanned.
func Run(ctx context.Context, c Config) (err error) {
	if c.ASCII && c.Texts.Lang() == "zh" {
		if c.Texts, err = texts.Load("en"); err != nil {
			return err
		}
	}
	in, err := cancelreader.NewReader(c.In)
	if err != nil {
		return fmt.Errorf("opening the scanner: %w", err)
	}
	defer in.Close()
	if f, ok := c.In.(term.File); ok && term.IsTerminal(f.Fd()) {
		old, failed := term.MakeRaw(f.Fd())
		if failed != nil {
			return fmt.Errorf("taking over the terminal: %w", failed)
		}
		defer func() { err = errors.Join(err, term.Restore(f.Fd(), old)) }()
	}

	running, stop := context.WithCancel(ctx)
	defer stop()
	simple := simpleTerm(c.Term)
	profile, fps := colorprofile.ANSI, 30
	if simple {
		fps = 10
	}
	if c.Term == "" || c.Term == "dumb" {
		profile = colorprofile.NoTTY
	} else if !c.Color || strings.HasPrefix(c.Term, "vt") {
		profile = colorprofile.ASCII
	}
	m := &model{Config: c, simple: simple, done: running.Done(), frame: time.Second / time.Duration(fps), now: time.Now, w: minWidth, h: minHeight}
	// The library gets no input: its decoder takes window sizes and pastes from whoever types them. See decoder.
	p := tea.NewProgram(m, tea.WithContext(ctx), tea.WithInput(nil), tea.WithOutput(output(c.Out, simple)), tea.WithoutSignalHandler(),
		tea.WithFPS(fps), tea.WithColorProfile(profile), tea.WithWindowSize(minWidth, minHeight), tea.WithEnvironment([]string{"TERM=" + c.Term}),
		tea.WithFilter(func(_ tea.Model, msg tea.Msg) tea.Msg {
			if size, ok := msg.(tea.WindowSizeMsg); ok {
				return knownSize(size.Width, size.Height)
			}
			return msg
		}))
	read := make(chan struct{})
	go func() {
		defer close(read)
		readKeys(running, in, func(msg tea.Msg) { p.Send(msg) })
	}()
	_, err = p.Run()
	stop()
	if in.Cancel() {
		<-read // what cannot be cancelled ends with its reader
	}
	switch {
	case m.err != nil:
		return m.err
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case err != nil:
		return fmt.Errorf("drawing the screen: %w", err)
	}
	return nil
}

// Messages of the model.
type (
	keysMsg    []key
	inputEnded struct{ err error }
	changedMsg bool // whether there will be more
	secondMsg  struct{}
)

// readKeys sends what is typed until there is no more.
func readKeys(ctx context.Context, in io.Reader, send func(tea.Msg)) {
	type chunk struct {
		b   []byte
		err error
	}
	chunks, ended := make(chan chunk), make(chan struct{})
	defer func() { <-ended }()
	go func() {
		defer close(ended)
		for {
			b := make([]byte, 4096)
			n, err := in.Read(b)
			select {
			case chunks <- chunk{b[:n], err}:
			case <-ctx.Done():
				return
			}
			if err != nil {
				return
			}
		}
	}()
	var d decoder
	for {
		var pause <-chan time.Time
		if d.pending() {
			pause = time.After(escapeTime)
		}
		select {
		case <-ctx.Done():
			return
		case <-pause:
			if k := d.flush(); len(k) > 0 {
				send(keysMsg(k))
			}
		case c := <-chunks:
			if k := d.decode(c.b); len(k) > 0 {
				send(keysMsg(k))
			}
			if c.err != nil {
				send(inputEnded{c.err})
				return
			}
		}
	}
}

// model is bubbletea's: its methods run on one goroutine.
type model struct {
	Config
	simple bool
	done   <-chan struct{}
	frame  time.Duration
	now    func() time.Time

	view        station.View
	w, h        int
	line        []rune
	hide        bool      // a badge was scanned, and the PIN may come before the engine has asked for it
	interrupted time.Time // the first Ctrl-C
	newest      station.Verdict
	err         error
}

func (m *model) Init() tea.Cmd {
	m.view = m.Station.View()
	if len(m.view.Last) > 0 {
		m.newest = m.view.Last[0]
	}
	return tea.Batch(m.wait(), m.second())
}

// wait waits for the next change, not before a frame has passed: a floor may change faster than anyone can see.
func (m *model) wait() tea.Cmd {
	return func() tea.Msg {
		select {
		case <-time.After(m.frame):
		case <-m.done:
			return nil
		}
		select {
		case _, more := <-m.Station.Changed():
			return changedMsg(more)
		case <-m.done:
			return nil
		}
	}
}

func (m *model) second() tea.Cmd {
	return tea.Tick(time.Second, func(time.Time) tea.Msg { return secondMsg{} })
}

func (m *model) Update(msg tea.Msg) (tea.Model, tea.Cmd) {
	switch msg := msg.(type) {
	case tea.WindowSizeMsg:
		m.w, m.h = msg.Width, msg.Height
	case secondMsg:
		return m, tea.Batch(m.refresh(), m.resized(), m.second())
	case changedMsg:
		m.hide = false
		if !msg {
			return m, tea.Quit
		}
		return m, tea.Batch(m.refresh(), m.wait())
	case inputEnded:
		if m.err = fmt.Errorf("reading what is scanned: %w", msg.err); errors.Is(msg.err, io.EOF) {
			m.err = fmt.Errorf("reading what is scanned: %w", io.ErrUnexpectedEOF)
		}
		return m, tea.Quit
	case keysMsg:
		for _, k := range msg {
			if !m.key(k) {
				return m, tea.Quit
			}
		}
		return m, m.refresh()
	}
	return m, nil
}

// resized looks whether the terminal has another size: the signal that says so may come before anyone listens.
func (m *model) resized() tea.Cmd {
	f, ok := m.Out.(term.File)
	if !ok {
		return nil
	}
	w, h, err := term.GetSize(f.Fd())
	if msg := knownSize(w, h); err == nil && (msg.Width != m.w || msg.Height != m.h) {
		return func() tea.Msg { return msg }
	}
	return nil
}

// knownSize is the size of a terminal: a serial line has none, unless someone sets it.
func knownSize(w, h int) tea.WindowSizeMsg {
	if w <= 0 || h <= 0 {
		w, h = minWidth, minHeight
	}
	return tea.WindowSizeMsg{Width: w, Height: h}
}

// refresh takes a new view, and rings for the verdicts that are new in it. What the last shift left behind is not.
func (m *model) refresh() tea.Cmd {
	was := m.view
	m.view = m.Station.View()
	if was.Ask == station.AskPIN && m.view.Ask != was.Ask {
		m.line = nil // half a PIN is not shown as something else
	}
	bells := 0
	for _, v := range m.view.Last {
		if was.Phase != station.PhaseWork || v.At.Equal(m.newest.At) && v.Serial == m.newest.Serial && v.Head == m.newest.Head {
			break
		}
		if v.Pass {
			bells++
		} else {
			bells += 3
		}
	}
	if len(m.view.Last) > 0 {
		m.newest = m.view.Last[0]
	}
	var ring []tea.Cmd
	for range bells {
		ring = append(ring, tea.Raw("\a"), func() tea.Msg {
			select { // apart, or a terminal makes one of them
			case <-time.After(300 * time.Millisecond):
			case <-m.done:
			}
			return nil
		})
	}
	return tea.Sequence(ring...)
}

// key takes one key; it says whether to go on.
func (m *model) key(k key) bool {
	if k.kind != keyInterrupt {
		m.interrupted = time.Time{} // somebody went on working
	}
	switch k.kind {
	case keyRune:
		if len(m.line) < maxLine {
			m.line = append(m.line, k.r)
		}
	case keyEnter:
		line := string(m.line)
		m.line, m.hide = nil, m.hide || m.view.Ask == station.AskBadge
		m.Station.Input(line)
	case keyBack:
		m.line = m.line[:max(0, len(m.line)-1)]
	case keyClear:
		m.line = nil
	case keyFunction:
		m.line = nil
		m.Station.Function(k.function)
	case keyInterrupt:
		now := m.now()
		switch since := now.Sub(m.interrupted); {
		case m.interrupted.IsZero():
			m.interrupted = now
			m.Station.Function(station.End)
		case since > 500*time.Millisecond: // sooner is a barcode, or a key held down
			m.err = ErrInterrupted
			return false
		}
	}
	return true
}

func (m *model) View() tea.View {
	d := &drawing{View: m.view, text: m.Texts, ascii: m.ASCII, w: m.w, h: m.h, input: string(m.line), dots: m.hide || m.view.Ask == station.AskPIN}
	lines := d.lines()
	if m.simple {
		for i, l := range lines {
			if s, ok := strings.CutSuffix(l, " "); ok {
				lines[i] = s + hardSpace
			}
		}
	}
	v := tea.NewView(strings.Join(lines, "\n"))
	v.AltScreen, v.DisableBracketedPasteMode = true, true
	return v
}

// hardSpace ends lines on simple terminals until they are written. The library (ultraviolet of 2026-08-11) shifts what is behind a
// change with insert mode, which a vt100 does not have, wherever a line ends in spaces.
const hardSpace = "\u00a0"

// simpleTerm says whether a terminal is a plain one, perhaps behind a slow line: no second screen to go back from.
func simpleTerm(t string) bool {
	for _, p := range []string{"vt", "linux", "ansi", "dumb", "cons", "unknown"} {
		if strings.HasPrefix(t, p) {
			return true
		}
	}
	return t == ""
}

// output keeps from the terminal what the library sends to modern ones only: keyboard protocols, questions about modes. What is not
// understood is printed by some. On simple terminals the screen is cleared where others change to their second one.
func output(w io.Writer, simple bool) io.Writer {
	o := plainOutput{w, simple}
	if f, ok := w.(term.File); ok {
		return struct {
			plainOutput
			terminal
		}{o, f}
	}
	return o
}

// terminal is term.File but for Write.
type terminal interface {
	io.Reader
	io.Closer
	Fd() uintptr
}

type plainOutput struct {
	w      io.Writer
	simple bool
}

var (
	modern       = regexp.MustCompile(`\x1b\[[<=>][0-9;]*[a-z]|\x1b\[\?[0-9;]*(?:\$p|u)`)
	secondScreen = regexp.MustCompile(`\x1b\[\?1049[hl]`)
)

// Write relies on the library writing whole sequences.
func (o plainOutput) Write(p []byte) (int, error) {
	b := modern.ReplaceAll(p, nil)
	if o.simple {
		b = bytes.ReplaceAll(secondScreen.ReplaceAll(b, []byte("\x1b[2J\x1b[H")), []byte(hardSpace), []byte(" "))
	}
	// Without input of its own the library takes a new line to return the carriage, which it does not in raw mode.
	b = bytes.ReplaceAll(bytes.ReplaceAll(b, []byte("\r\n"), []byte("\n")), []byte("\n"), []byte("\r\n"))
	if _, err := o.w.Write(b); err != nil {
		return 0, err
	}
	return len(p), nil
}
