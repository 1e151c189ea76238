package screen

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/charmbracelet/x/term"
	"github.com/charmbracelet/x/vt"
	"github.com/creack/pty"

	"github.com/touchmark/touchmark/pkg/station"
	"github.com/touchmark/touchmark/pkg/station/texts"
)

// script is a floor that does what a test says.
type script struct {
	mu        sync.Mutex
	view      station.View
	changed   chan struct{}
	said      []string // lines, and functions in angle brackets
	onInput   func(v *station.View, line string)
	onCommand func(v *station.View, f station.Function)
}

func newScript(v station.View) *script { return &script{view: v, changed: make(chan struct{}, 1)} }

func (s *script) View() station.View {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.view
}

func (s *script) Changed() <-chan struct{} { return s.changed }

func (s *script) Input(line string) {
	s.set(func(v *station.View) {
		s.said = append(s.said, line)
		if s.onInput != nil {
			s.onInput(v, line)
		}
	})
}

func (s *script) Function(f station.Function) {
	s.set(func(v *station.View) {
		s.said = append(s.said, "<"+string(f)+">")
		if s.onCommand != nil {
			s.onCommand(v, f)
		}
	})
}

func (s *script) set(f func(*station.View)) {
	s.mu.Lock()
	f(&s.view)
	s.mu.Unlock()
	select {
	case s.changed <- struct{}{}:
	default:
	}
}

func (s *script) heard() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.said)
}

// screenTerminal is a terminal emulator on a real pty, with a screen running on the other end.
type screenTerminal struct {
	t       *testing.T
	master  *os.File
	slave   *os.File
	emu     *vt.SafeEmulator
	updates chan struct{}
	mu      sync.Mutex
	raw     bytes.Buffer
	bells   int
	titles  []string
	done    chan error
	stop    context.CancelCauseFunc
}

// start runs the screen on a terminal of w columns and h rows.
func start(t *testing.T, c Config, w, h int) *screenTerminal {
	t.Helper()
	master, slave, err := pty.Open()
	if err != nil {
		t.Fatal(err)
	}
	if err := pty.Setsize(master, &pty.Winsize{Rows: uint16(h), Cols: uint16(w)}); err != nil {
		t.Fatal(err)
	}
	s := &screenTerminal{t: t, master: master, slave: slave, emu: vt.NewSafeEmulator(max(w, 80), max(h, 24)), updates: make(chan struct{}, 1), done: make(chan error, 1)}
	s.emu.SetCallbacks(vt.Callbacks{ // called by Write below, which holds mu
		Bell:  func() { s.bells++ },
		Title: func(title string) { s.titles = append(s.titles, title) },
	})
	var wg sync.WaitGroup
	wg.Go(func() {
		b := make([]byte, 4096)
		for {
			n, err := master.Read(b)
			s.mu.Lock()
			s.raw.Write(b[:n])
			s.emu.Write(b[:n])
			s.mu.Unlock()
			select {
			case s.updates <- struct{}{}:
			default:
			}
			if err != nil {
				return
			}
		}
	})
	wg.Go(func() { io.Copy(master, s.emu) }) // what a terminal answers to questions
	ctx, stop := context.WithCancelCause(t.Context())
	s.stop = stop
	c.In, c.Out = slave, slave
	if c.Texts == nil {
		c.Texts = text(t, "en")
	}
	go func() {
		s.done <- Run(ctx, c)
		close(s.done)
	}()
	t.Cleanup(func() {
		stop(nil)
		<-s.done
		slave.Close()
		master.Close()
		s.emu.InputPipe().(io.Closer).Close() // the emulator's own Close races with its Read
		wg.Wait()
	})
	return s
}

// read is what is on the terminal.
func (s *screenTerminal) read() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var b strings.Builder
	for y := range s.emu.Height() {
		var line strings.Builder
		for x := 0; x < s.emu.Width(); {
			c := s.emu.CellAt(x, y)
			if c == nil || c.Width == 0 {
				line.WriteByte(' ')
				x++
				continue
			}
			line.WriteString(c.Content)
			x += c.Width
		}
		b.WriteString(strings.TrimRight(line.String(), " ") + "\n")
	}
	return b.String()
}

// until waits for what the terminal shows, or has done, to be so.
func (s *screenTerminal) until(what string, so func() bool) {
	s.t.Helper()
	deadline := time.NewTimer(30 * time.Second)
	defer deadline.Stop()
	again := time.NewTicker(50 * time.Millisecond) // what is not drawn
	defer again.Stop()
	for !so() {
		select {
		case <-s.updates:
		case <-again.C:
		case <-deadline.C:
			s.t.Fatalf("never %s; on the screen:\n%s", what, s.read())
		}
	}
}

func (s *screenTerminal) shows(want ...string) {
	s.t.Helper()
	for _, w := range want {
		s.until("showed "+w, func() bool { return strings.Contains(s.read(), w) })
	}
}

// sent is every byte that reached the terminal.
func (s *screenTerminal) sent() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.raw.String()
}

func (s *screenTerminal) rang() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.bells
}

func (s *screenTerminal) types(what string) {
	s.t.Helper()
	if _, err := s.master.WriteString(what); err != nil {
		s.t.Fatal(err)
	}
}

func (s *screenTerminal) ends(want error) {
	s.t.Helper()
	select {
	case err := <-s.done:
		if !errors.Is(err, want) || want == nil && err != nil {
			s.t.Fatalf("ended with %v, want %v", err, want)
		}
	case <-time.After(30 * time.Second):
		s.t.Fatal("did not end")
	}
}

var terms = []string{"xterm-256color", "tmux-256color", "linux", "vt100", "dumb"}

// TestRunShift works a shift with a scanner: badge, PIN, units that pass and fail, a function, the end.
func TestRunShift(t *testing.T) {
	for _, termType := range terms {
		t.Run(termType, func(t *testing.T) {
			t.Parallel()
			v := scenes()["badge"]
			f := newScript(v)
			f.onInput = func(v *station.View, line string) {
				switch {
				case line == "BADGE-7":
					v.Ask = station.AskPIN
				case v.Ask == station.AskPIN:
					*v = scenes()["idle"]
				case line == "TM26-000401":
					*v = scenes()["working"]
				case line == "TM!help":
					v.Help = true
				case line == "TM26-000311":
					n := scenes()["notice"]
					v.Notice, v.Fields = n.Notice, n.Fields
				}
			}
			f.onCommand = func(v *station.View, fn station.Function) {
				switch fn {
				case station.Rework:
					v.Function = station.Rework
				case station.Cancel:
					v.Function, v.Help = "", false
				}
			}
			s := start(t, Config{Station: f, Term: termType, Color: true}, 80, 24)
			s.shows("Scan your badge > _")
			s.types("\tBADGE-7\t\r\n")
			s.shows("Enter your PIN > _")
			s.types("24")
			s.shows("Enter your PIN > **_")
			s.types("68\r")
			s.shows("Scan the serial number > _", "Mai Nguyễn", "First pass 97.6%")
			s.types("TM26-0004")
			s.shows("Scan the serial number > TM26-0004_")
			s.types("01\n")
			s.shows("4/7 Flash", "21 s")

			// A verdict rings once, however often it is seen.
			verdict := func(h station.Head) {
				f.set(func(v *station.View) {
					h.Number = 1
					v.Heads = []station.Head{h}
					v.Last = append([]station.Verdict{*h.Verdict}, v.Last[:9]...)
				})
			}
			verdict(good)
			s.shows("████████      ██████      ████████    ████████", "TM26-000404 PASS")
			s.until("rang once", func() bool { return s.rang() == 1 })
			verdict(bad)
			s.shows("██████████    ██████    ██████████  ██", "The board could not be flashed.", "Reseat the board and scan it again.", "TM26-000405 E-411")
			s.until("rang for FAIL", func() bool { return s.rang() == 4 })

			s.types("TM26-000311\r")
			s.shows("E-102  TM26-000311 is made already")
			s.types("\x1bOQ") // F2
			s.shows("Rework: Scan the serial number")
			s.types("\x1b") // Esc
			s.until("left rework", func() bool { return !strings.Contains(s.read(), "Rework: ") })
			s.types("TM!help\r")
			s.shows("TM!reprint  Print the label")
			s.types("\x03")
			want := []string{"BADGE-7", "2468", "TM26-000401", "TM26-000311", "<rework>", "<cancel>", "TM!help", "<end>"}
			s.until("heard everything", func() bool { return slices.Equal(f.heard(), want) })
			if n := s.rang(); n != 4 {
				t.Errorf("rang %d times", n)
			}
			close(f.changed)
			s.ends(nil)
			if strings.Contains(s.sent(), "2468") {
				t.Error("the PIN reached the terminal")
			}
		})
	}
}

// TestRunDraws: what a terminal then shows is what was drawn, in every language, wide characters and ASCII included.
func TestRunDraws(t *testing.T) {
	for _, lang := range texts.Languages() {
		for _, ascii := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/%v", lang, ascii), func(t *testing.T) {
				t.Parallel()
				all := scenes()
				f := newScript(all["badge"])
				x := text(t, lang)
				s := start(t, Config{Station: f, Texts: x, Term: "xterm", Color: true, ASCII: ascii}, 80, 24)
				if ascii && lang == "zh" {
					x = text(t, "en")
				}
				for _, name := range []string{"checks", "working", "pass", "fail", "heads-2", "heads-4", "heads-8-fail", "rework-reason", "lamps", "help", "ended"} {
					f.set(func(v *station.View) { *v = all[name] })
					want := plain((&drawing{View: all[name], text: x, w: 80, h: 24, ascii: ascii}).lines())
					s.until("drew "+name+":\n"+want, func() bool { return s.read() == want })
				}
			})
		}
	}
}

// TestRunResize: the screen follows its terminal, down to one that is too small, and back, although nobody is signalled: the pty is not
// this process's own terminal.
func TestRunResize(t *testing.T) {
	v := scenes()["heads-4"]
	f := newScript(v)
	s := start(t, Config{Station: f, Term: "xterm", Color: true}, 80, 24)
	for _, size := range [][2]int{{132, 43}, {60, 20}, {20, 6}, {80, 24}, {200, 60}, {80, 24}} {
		s.mu.Lock()
		s.emu.Resize(size[0], size[1])
		s.mu.Unlock()
		if err := pty.Setsize(s.master, &pty.Winsize{Cols: uint16(size[0]), Rows: uint16(size[1])}); err != nil {
			t.Fatal(err)
		}
		want := plain((&drawing{View: v, text: text(t, "en"), w: size[0], h: size[1]}).lines())
		s.until(fmt.Sprintf("drew %v:\n%s", size, want), func() bool { return s.read() == want })
	}
}

// TestRunSerial: a serial line knows no size.
func TestRunSerial(t *testing.T) {
	v := scenes()["fail"]
	s := start(t, Config{Station: newScript(v), Term: "vt100", Color: true}, 0, 0)
	want := plain((&drawing{View: v, text: text(t, "en"), w: 80, h: 24}).lines())
	s.until("drew 80x24", func() bool { return s.read() == want })
}

// TestRunPlain: a plain terminal is sent nothing that a vt100 prints or has not; a modern one no keyboard protocol, question or mouse.
func TestRunPlain(t *testing.T) {
	for _, c := range []struct {
		term    string
		color   bool
		allowed string
	}{
		{"vt100", true, `\x1b\[(?:\?25[hl]|\?7[hl]|[0-9;]*[ABCDHJKmr])|\x1b[M78]`},
		{"dumb", true, `\x1b\[(?:\?25[hl]|\?7[hl]|[0-9;]*[ABCDHJKr])|\x1b[M78]`},
		{"linux", true, `\x1b\[(?:\?25[hl]|\?7[hl]|[0-9;]*[@ABCDGHJKLMPXdmr` + "`" + `])|\x1b[M78]`},
		{"xterm", false, `\x1b\[(?:\?25[hl]|\?7[hl]|\?1049[hl]|[0-9;]*[@ABCDGHIJKLMPSTXZbdmr])|\x1b[M78]`},
	} {
		t.Run(c.term, func(t *testing.T) {
			t.Parallel()
			f := newScript(scenes()["fail"])
			s := start(t, Config{Station: f, Term: c.term, Color: c.color, ASCII: true}, 80, 24)
			all := scenes()
			names := slices.Sorted(maps.Keys(all))
			for _, name := range append(names, "idle", "rework-serial", "idle", "working") {
				f.set(func(v *station.View) { *v = all[name] })
				want := plain((&drawing{View: all[name], text: text(t, "en"), w: 80, h: 24, ascii: true}).lines())
				s.until("drew "+name+":\n"+want, func() bool { return s.read() == want })
			}
			close(f.changed)
			s.ends(nil)
			raw := s.sent()
			if rest := regexp.MustCompile(c.allowed).ReplaceAllString(raw, ""); strings.ContainsFunc(rest, func(r rune) bool { return r > '~' || r < ' ' && !strings.ContainsRune("\r\n\b\t\a", r) }) {
				t.Errorf("not for this terminal: %q", regexp.MustCompile(`[\x1b\x80-\x{10ffff}].{0,10}`).FindAllString(rest, 10))
			}
			colour := regexp.MustCompile(`\x1b\[[0-9;]*\b(?:3[0-7]|9[0-7])[;m]`).MatchString(raw)
			if want := c.color && c.term == "linux"; colour != want {
				t.Errorf("colours: %v, want %v in %q", colour, want, raw)
			}
		})
	}
}

// TestRunHostile: what is scanned cannot change the terminal, make the screen deaf, or reach it in a view.
func TestRunHostile(t *testing.T) {
	f := newScript(scenes()["idle"])
	f.onInput = func(v *station.View, line string) {
		v.Notice, v.Fields = station.CodeNotSerial, map[string]string{"scan": line}
		v.Operator = "\x1b]0;owned\a" + line
	}
	s := start(t, Config{Station: f, Term: "xterm", Color: true}, 80, 24)
	s.shows("Scan the serial number > _")
	s.types("\x1b[200~A\x1b[8;9999;9999t\x1b[48;9999;9999;1;1t\x1b]0;owned\a\x1b[?2026;2$y\x1bP1+r524742\x1b\\\x9b2J\x00\r")
	s.types(strings.Repeat("X", 3*maxLine) + "\r")
	s.types("\x03\x03\x03\x03") // a barcode, not someone who wants to leave
	s.types("TM26-000311\r")
	s.shows("E-101  TM26-000311 is not a serial number.", "?]0;owned?TM26-000311")
	// What no key sends is text; what matters is that each line is one line.
	if got, want := f.heard(), []string{"A]0;ownedP1+r524742\\\ufffd2J", strings.Repeat("X", maxLine), "<end>", "TM26-000311"}; !slices.Equal(got, want) {
		t.Errorf("heard %q, want %q", got, want)
	}
	close(f.changed)
	s.ends(nil)
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.titles) > 0 || s.emu.Width() != 80 {
		t.Errorf("titles %q, %d columns", s.titles, s.emu.Width())
	}
}

// TestRunEnds: every way to end gives the terminal back as it was.
func TestRunEnds(t *testing.T) {
	cause := errors.New("power is going")
	for name, c := range map[string]struct {
		end  func(s *screenTerminal, f *script)
		want error
	}{
		"closed":    {func(_ *screenTerminal, f *script) { close(f.changed) }, nil},
		"cancelled": {func(s *screenTerminal, _ *script) { s.stop(cause) }, cause},
		"interrupted": {func(s *screenTerminal, f *script) { // someone who holds Ctrl-C down
			s.until("ended", func() bool {
				s.types("\x03")
				return len(s.done) > 0
			})
			if got := f.heard(); !slices.Equal(got, []string{"<end>"}) {
				s.t.Errorf("heard %q", got)
			}
		}, ErrInterrupted},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newScript(scenes()["idle"])
			master, slave, err := pty.Open()
			if err != nil {
				t.Fatal(err)
			}
			before, err := term.GetState(slave.Fd())
			if err != nil {
				t.Fatal(err)
			}
			master.Close()
			slave.Close()
			s := start(t, Config{Station: f, Term: "xterm"}, 80, 24)
			s.shows("Scan the serial number")
			c.end(s, f)
			s.ends(c.want)
			after, err := term.GetState(s.slave.Fd())
			if err != nil {
				t.Fatal(err)
			}
			if *before != *after {
				t.Errorf("terminal modes %v, before %v", after, before)
			}
			s.until("left the second screen", func() bool { return !s.emu.IsAltScreen() })
		})
	}
}

// TestRunPipe: a scanner that is not the terminal, and goes away.
func TestRunPipe(t *testing.T) {
	in, scanner, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	f := newScript(scenes()["idle"])
	done := make(chan error, 1)
	go func() {
		done <- Run(t.Context(), Config{Station: f, Texts: text(t, "en"), In: in, Out: io.Discard, Term: "vt100"})
	}()
	fmt.Fprint(scanner, "TM26-000311\r\nTM26-000312\r\nhalf")
	scanner.Close()
	if err := <-done; !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("ended with %v", err)
	}
	if got := f.heard(); !slices.Equal(got, []string{"TM26-000311", "TM26-000312"}) {
		t.Errorf("heard %q", got)
	}
}

// TestPINStaysHidden: neither what is typed before the PIN is asked for, nor half a PIN after it no longer is, is shown.
func TestPINStaysHidden(t *testing.T) {
	f := newScript(scenes()["badge"])
	m := &model{Config: Config{Station: f, Texts: text(t, "en")}, w: 80, h: 24, now: time.Now, view: f.View()}
	press := func(s string) {
		var d decoder
		m.Update(keysMsg(d.decode([]byte(s))))
	}
	shown := func() string { return plain(strings.Split(m.View().Content, "\n")) }
	press("BADGE-7\r13") // the floor has not looked at the badge yet
	if !strings.Contains(shown(), "> **_") {
		t.Errorf("shown:\n%s", shown())
	}
	f.view.Ask = station.AskPIN
	m.Update(changedMsg(true))
	press("57")
	if !strings.Contains(shown(), "Enter your PIN > ****_") {
		t.Errorf("shown:\n%s", shown())
	}
	f.view.Ask = station.AskBadge
	m.Update(changedMsg(true))
	if !strings.Contains(shown(), "Scan your badge > _") {
		t.Errorf("shown:\n%s", shown())
	}
}

// TestInterrupt: Ctrl-C twice at once is a barcode.
func TestInterrupt(t *testing.T) {
	now := noon
	f := newScript(scenes()["idle"])
	m := &model{Config: Config{Station: f, Texts: text(t, "en")}, now: func() time.Time { return now }, view: f.View()}
	for i, step := range []struct {
		after time.Duration
		on    bool
	}{{0, true}, {0, true}, {400 * time.Millisecond, true}, {200 * time.Millisecond, false}} {
		now = now.Add(step.after)
		if on := m.key(key{kind: keyInterrupt}); on != step.on {
			t.Errorf("Ctrl-C number %d: goes on %v", i+1, on)
		}
	}
	if got := f.heard(); !slices.Equal(got, []string{"<end>"}) || !errors.Is(m.err, ErrInterrupted) {
		t.Errorf("heard %q, %v", got, m.err)
	}
}
