package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/charmbracelet/x/vt"
	"github.com/creack/pty"

	"github.com/touchmark/touchmark/hsm/hsmtest"
	"github.com/touchmark/touchmark/pkg/filelock"
)

var updateShift = flag.Bool("update-shift", false, "rewrite the golden screens of the shift")

// console is a technician's terminal: an emulator on a real pty, with the program at its other end.
type console struct {
	t       *testing.T
	cmd     *exec.Cmd
	pty     *os.File
	emu     *vt.Emulator
	mu      sync.Mutex
	updates chan struct{}
	ended   chan struct{} // closed when the program has ended
	err     error         // how
	readers sync.WaitGroup
}

// open starts the program on a terminal of 80 columns and 24 rows.
func open(t *testing.T, dir string, env []string, args ...string) *console {
	t.Helper()
	c := &console{t: t, cmd: exec.Command(program(t), args...), emu: vt.NewEmulator(80, 24), updates: make(chan struct{}, 1), ended: make(chan struct{})}
	c.cmd.Dir = dir
	c.cmd.Env = append(os.Environ(), append([]string{"TERM=xterm-256color", "LANG=C.UTF-8", "LC_ALL="}, env...)...)
	var err error
	if c.pty, err = pty.StartWithSize(c.cmd, &pty.Winsize{Rows: 24, Cols: 80}); err != nil {
		t.Fatal(err)
	}
	c.readers.Go(func() {
		b := make([]byte, 4096)
		for {
			n, err := c.pty.Read(b)
			c.mu.Lock()
			_, _ = c.emu.Write(b[:n])
			c.mu.Unlock()
			c.tick()
			if err != nil {
				return
			}
		}
	})
	c.readers.Go(func() { _, _ = io.Copy(c.pty, c.emu) })
	go func() {
		c.err = c.cmd.Wait()
		close(c.ended)
		c.tick()
	}()
	t.Cleanup(c.kill)
	return c
}

func (c *console) tick() {
	select {
	case c.updates <- struct{}{}:
	default:
	}
}

// kill is a power cut.
func (c *console) kill() {
	_ = c.cmd.Process.Kill()
	<-c.ended
	_ = c.pty.Close()
	_ = c.emu.InputPipe().(io.Closer).Close()
	c.readers.Wait()
}

// screen is what stands on the terminal.
func (c *console) screen() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var b strings.Builder
	for y := range c.emu.Height() {
		var line strings.Builder
		for x := 0; x < c.emu.Width(); {
			cell := c.emu.CellAt(x, y)
			if cell == nil || cell.Width == 0 {
				line.WriteByte(' ')
				x++
				continue
			}
			line.WriteString(cell.Content)
			x += cell.Width
		}
		b.WriteString(strings.TrimRight(line.String(), " ") + "\n")
	}
	return b.String()
}

// until waits for the screen to be so.
func (c *console) until(what string, so func(screen string) bool) {
	c.t.Helper()
	deadline := time.NewTimer(30 * time.Second)
	defer deadline.Stop()
	for !so(c.screen()) {
		select {
		case <-c.updates:
		case <-deadline.C:
			c.t.Fatalf("never %s; on the screen:\n%s", what, c.screen())
		}
	}
}

func (c *console) shows(want ...string) {
	c.t.Helper()
	for _, w := range want {
		c.until("showed "+w, func(s string) bool { return strings.Contains(s, w) })
	}
}

// scan types as a scanner does.
func (c *console) scan(lines ...string) {
	c.t.Helper()
	for _, l := range lines {
		c.press(l + "\r")
	}
}

func (c *console) press(keys string) {
	c.t.Helper()
	if _, err := c.pty.WriteString(keys); err != nil {
		c.t.Fatalf("typing: %v; on the screen:\n%s", err, c.screen())
	}
}

// ends waits for the program to end with an exit code.
func (c *console) ends(code int) {
	c.t.Helper()
	select {
	case <-c.ended:
		if got := c.cmd.ProcessState.ExitCode(); got != code {
			c.t.Fatalf("exit code %d, want %d; on the screen:\n%s", got, code, c.screen())
		}
	case <-time.After(30 * time.Second):
		c.t.Fatalf("it did not end; on the screen:\n%s", c.screen())
	}
}

// What of a screen differs from run to run: the clock, times in seconds, the rate.
var passing = []struct {
	at *regexp.Regexp
	to string
}{
	{regexp.MustCompile(`\d\d:\d\d:\d\d`), "hh:mm:ss"},
	{regexp.MustCompile(`\b\d\d:\d\d SN\d\d\d\d`), "hh:mm SNnnnn"}, // two heads end when they end
	{regexp.MustCompile(`process \d+\. (.*\.) +│`), "process n. ${1} │"},
	{regexp.MustCompile(`opening ledger \S+`), "opening ledger n"},
	{regexp.MustCompile(` +\d+ s\b`), " n s"},
	{regexp.MustCompile(`(PASS|E-\d\d\d)( +)\d+`), "${1}${2}n"},
	{regexp.MustCompile(`Per hour +\d+ +`), "Per hour n "},
}

// golden holds the screen against the one that is kept, but for what differs from run to run.
func (c *console) golden(name string, differs ...string) {
	c.t.Helper()
	mask := func(s string) string {
		for _, d := range differs {
			s = regexp.MustCompile(d).ReplaceAllString(s, "${1}n")
		}
		for _, p := range passing {
			s = p.at.ReplaceAllString(s, p.to)
		}
		return s
	}
	path := filepath.Join("testdata", "shift", name+".txt")
	if *updateShift {
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(mask(c.screen())), 0o644)); err != nil {
			c.t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		c.t.Fatal(err)
	}
	c.until("looked like "+name+":\n"+string(want), func(s string) bool { return mask(s) == string(want) })
}

// labelPrinter is a printer on the network: it answers for its state, and keeps the code of each label.
type labelPrinter struct {
	t     *testing.T
	addr  string
	mu    sync.Mutex
	paper bool
	ln    net.Listener
	codes map[string]string // by serial
	count map[string]int
}

func newLabelPrinter(t *testing.T) *labelPrinter {
	p := &labelPrinter{t: t, addr: "127.0.0.1:0", paper: true, codes: map[string]string{}, count: map[string]int{}}
	p.on()
	p.addr = p.ln.Addr().String()
	t.Cleanup(p.off)
	return p
}

func (p *labelPrinter) on() {
	p.t.Helper()
	ln, err := net.Listen("tcp", p.addr)
	if err != nil {
		p.t.Fatal(err)
	}
	p.mu.Lock()
	p.ln = ln
	p.mu.Unlock()
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go p.serve(c)
		}
	}()
}

func (p *labelPrinter) off() {
	p.mu.Lock()
	defer p.mu.Unlock()
	_ = p.ln.Close()
}

func (p *labelPrinter) load(paper bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.paper = paper
}

var (
	zplCode   = regexp.MustCompile(`\^BQ[^\^]*\^FH_\^FDMA,([^\^]*)\^FS`)
	zplEscape = regexp.MustCompile(`_[0-9A-F]{2}`)
)

func (p *labelPrinter) serve(c net.Conn) {
	defer c.Close()
	lines := bufio.NewScanner(c)
	for lines.Scan() {
		p.mu.Lock()
		switch m := zplCode.FindStringSubmatch(lines.Text()); {
		case m != nil:
			code := zplEscape.ReplaceAllStringFunc(m[1], func(s string) string {
				n, _ := strconv.ParseUint(s[1:], 16, 8)
				return string(rune(n))
			})
			serial := strings.Split(code, ".")[1]
			p.codes[serial] = code
			p.count[serial]++
		case lines.Text() == "~HS":
			paper := "0"
			if !p.paper {
				paper = "1"
			}
			fmt.Fprintf(c, "\x02030,%s,0,1245,000,0,0,0,000,0,0,0\x03\r\n\x02000,0,0,0,0,2,4,0,00000000,1,000\x03\r\n\x021234,0\x03\r\n", paper)
		}
		p.mu.Unlock()
	}
}

// code is what the last label of a serial says.
func (p *labelPrinter) code(serial string) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.codes[serial]
}

func (p *labelPrinter) printed(serial string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.count[serial]
}

// office is the factory's system: it keeps each event once, by its ID, and answers badly now and then.
type office struct {
	mu     sync.Mutex
	calls  int
	events map[string]string // kind and serial, by ID
}

func (o *office) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var e struct {
		ID, Kind string
		Fields   map[string]string
	}
	b, err := io.ReadAll(r.Body)
	if err == nil {
		err = json.Unmarshal(b, &e)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.calls++; o.calls%40 == 7 || err != nil {
		http.Error(w, "not now", http.StatusServiceUnavailable) // it has it all the same
	}
	if id := r.Header.Get("Idempotency-Key"); id != "" {
		o.events[id] = e.Kind + " " + e.Fields["serial"]
	}
}

// of returns the serials that events of a kind told of.
func (o *office) of(kind string) (serials []string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, e := range o.events {
		if serial, ok := strings.CutPrefix(e, kind+" "); ok {
			serials = append(serials, serial)
		}
	}
	slices.Sort(serials)
	return serials
}

// A technician works a shift.
type technician struct {
	*console
	dir     string
	env     []string
	printer *labelPrinter
	mes     *office
	seen    []string          // rows of the last units
	session map[string]bool   // passed since the program was started
	unseen  []string          // sealed when the power went, and not shown
	passed  map[string]int    // PASS on the screen, by serial
	fails   map[string]int    // codes on the screen
	wrong   map[string]string // what to scan instead of a label, once
}

// begin starts the program, and a shift.
func (s *technician) begin() {
	s.t.Helper()
	s.console = open(s.t, s.dir, s.env, "station", "--line", "line", "--order", "PO-1.order")
	s.seen, s.session = nil, map[string]bool{}
	s.shows("Scan your badge > _")
	s.scan("BADGE-MAI")
	s.shows("Enter your PIN > _")
	s.scan("2468")
	s.shows("Scan the serial number > _")
}

var row = regexp.MustCompile(`\d\d:\d\d (\S+) +(PASS|E-\d\d\d) +\d+$`)

// verdicts takes what is new on the screen's list of last units, the oldest first.
func (s *technician) verdicts(screen string) (fresh [][2]string) {
	var rows []string
	for line := range strings.Lines(screen) {
		if m := row.FindStringSubmatch(strings.TrimRight(line, "\n")); m != nil {
			rows = append(rows, m[1]+" "+m[2])
		}
	}
	n := max(0, len(rows)-len(s.seen))
	for !slices.Equal(rows[n:], s.seen[:len(rows)-n]) {
		n++
	}
	if n > 2 {
		return nil // half drawn: no more than two are at work
	}
	s.seen = rows
	for _, r := range slices.Backward(rows[:n]) {
		serial, result, _ := strings.Cut(r, " ")
		if result == "PASS" {
			s.passed[serial]++
			s.session[serial] = true
		} else {
			s.fails[result]++
		}
		fresh = append(fresh, [2]string{serial, result})
	}
	return fresh
}

var asks = regexp.MustCompile(`Scan the label of head (\d) > _`)

// make brings units through, on two heads, with those that are on heads already, and holds each against the verdict it must have:
// PASS unless it is named.
func (s *technician) make(serials []string, want map[string]string, begun ...string) {
	s.t.Helper()
	working := map[string]bool{}
	for _, serial := range begun {
		working[serial] = true
	}
	labelled := map[string]bool{}
	done := 0
	s.until(fmt.Sprintf("was through with %v", serials), func(screen string) bool {
		for _, v := range s.verdicts(screen) {
			if !working[v[0]] {
				s.t.Fatalf("a verdict on %s, which is not at work; on the screen:\n%s", v[0], screen)
			}
			expected := "PASS"
			if w, ok := want[v[0]]; ok {
				expected = w
			}
			if v[1] == "E-102" && expected == "PASS|E-102" {
				if s.passed[v[0]] == 0 {
					s.unseen = append(s.unseen, v[0])
				}
			} else if !slices.Contains(strings.Split(expected, "|"), v[1]) {
				s.t.Fatalf("%s is %s, want %s; on the screen:\n%s", v[0], v[1], expected, screen)
			}
			delete(working, v[0])
			delete(labelled, v[0])
			done++
		}
		if m := asks.FindStringSubmatch(screen); m != nil {
			if serial := s.onHead(screen, m[1]); working[serial] && !labelled[serial] && s.printer.code(serial) != "" {
				labelled[serial] = true
				code := s.printer.code(serial)
				if w, ok := s.wrong[serial]; ok {
					code = w
					delete(s.wrong, serial)
				}
				s.scan(code)
			}
		} else if len(working) < 2 && len(serials) > 0 && strings.Contains(screen, "Scan the serial number > _") {
			s.scan(serials[0])
			working[serials[0]] = true
			serials = serials[1:]
		}
		return done > 0 && len(working) == 0 && len(serials) == 0
	})
}

// onHead returns the serial on a head, as the screen's titles tell it.
func (s *technician) onHead(screen, head string) string {
	if m := regexp.MustCompile(`(?m)(?:^| )` + head + ` (SN\d+) ─`).FindStringSubmatch(screen); m != nil {
		return m[1]
	}
	return ""
}

func serialsFrom(first, last int) (serials []string) {
	for i := first; i <= last; i++ {
		serials = append(serials, fmt.Sprintf("SN%04d", i))
	}
	return serials
}

// number reads a count from the screen.
func (c *console) number(word string) int {
	c.t.Helper()
	n := -1
	at := regexp.MustCompile(word + ` +(\d+)`)
	c.until("had a number of "+word, func(s string) bool {
		if m := at.FindStringSubmatch(s); m != nil {
			n, _ = strconv.Atoi(m[1])
		}
		return n >= 0
	})
	return n
}

// The devices: a directory each. A file in faults, named for the serial, says what goes wrong once.
var shiftTools = map[string]string{
	"probe": `#!/bin/sh
product=pump-3
if [ "$(cat faults/$1 2>/dev/null)" = product ]; then rm faults/$1; product=pump-4; fi
echo "product=$product"
`,
	"flash": `#!/bin/sh
fault=$(cat faults/$1 2>/dev/null)
mkdir -p "devices/$1"
case $fault in
hang) rm faults/$1; exec sleep 30;;
half) rm faults/$1; cp "$2/device-key.pem" "devices/$1"; echo 'no response from the chip' >&2; exit 1;;
esac
cp "$2"/* "devices/$1"
if [ "$fault" = lie ]; then rm faults/$1; echo x >> "devices/$1/provisioning.json"; fi
`,
	"sign": `#!/bin/sh
if [ "$(cat faults/$1 2>/dev/null)" = sign ]; then rm faults/$1; echo another | openssl dgst -sha256 -sign "devices/$1/device-key.pem" | base64 -w0; exit; fi
exec openssl dgst -sha256 -sign "devices/$1/device-key.pem" | base64 -w0
`,
}

const shiftConfig = `
profile = "x509-group"
heads = 2
operators = "operators.toml"
leads-only = ["rework", "scrap", "reprint"]
disk-free = 1

[probe]
command = ["bin/probe", "{serial}"]
expect = { product = "{product}" }

[[flash]]
command = ["bin/flash", "{serial}", "{dir}"]
timeout = "1500ms"

[[readback]]
command = ["cat", "devices/{serial}/provisioning.json"]
compare = "provisioning.json"

[challenge]
command = ["bin/sign", "{serial}"]

[label]
template = "unit-50x25"
printer = "tcp:%s"
scan-back = true

[[hooks.webhook]]
name = "mes"
url = "%s"
secret-file = "mes.secret"
`

// TestShift is a shift of two hundred units at the real terminal, with what goes wrong on a line. In the end the screen, the ledger,
// the bundle, the order's report and the factory's system must say the same to the unit.
func TestShift(t *testing.T) {
	if testing.Short() {
		hsmtest.Require(t, "a run without -short")
	}
	for _, needed := range []string{"openssl", "p11-kit"} {
		if _, err := exec.LookPath(needed); err != nil {
			hsmtest.Require(t, needed+" (apt-get install openssl p11-kit p11-kit-modules)")
		}
	}
	uri := hsmtest.SoftHSM(t, "line-3", "office")
	mend := hsmtest.Mender(t)
	uri.ModulePath = "p11-kit:" + uri.ModulePath // the token is pulled by killing this process
	ownerStore := uri
	ownerStore.Token = "office"
	// The devices and the line are in memory where there is such a place: this is not about disks.
	dir, err := os.MkdirTemp(filepath.Dir(os.Getenv("SOFTHSM2_CONF")), "shift-*")
	if err != nil {
		t.Fatal(err)
	}
	put := func(name, text string, mode os.FileMode) {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), mode)); err != nil {
			t.Fatal(err)
		}
	}
	for name, text := range shiftTools {
		put("bin/"+name, text, 0o755)
	}
	fault := func(serial, what string) { put("faults/"+serial, what, 0o644) }
	printer := newLabelPrinter(t)
	mes := &office{events: map[string]string{}}
	webhook := httptest.NewServer(mes)
	t.Cleanup(webhook.Close)

	touchmark(t, dir, "key", "new", "--store", ownerStore.String(), "--name", "owner", "--algorithm", "EC-P256")
	put("owner.pem", touchmark(t, dir, "key", "export-public", "--store", ownerStore.String(), "--name", "owner"), 0o644)
	touchmark(t, dir, "init", "line", "--id-scope", "0ne00112233", "--key-uri", uri.String(), "--owner", "owner.pem", "--counter", "line-3")
	put("line/station.toml", fmt.Sprintf(shiftConfig, printer.addr, webhook.URL), 0o644)
	put("line/mes.secret", "a secret of sixteen octets or more", 0o600)
	operator := func(input string, args ...string) {
		t.Helper()
		cmd := exec.Command(program(t), append([]string{"operator", "add", "--file", "line/operators.toml", "--pin"}, args...)...)
		cmd.Dir, cmd.Stdin = dir, strings.NewReader(input)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("operator add: %v\n%s", err, out)
		}
	}
	operator("BADGE-MAI\n2468\n", "Mai Tran")
	operator("BADGE-JO\n1357\n", "Jo Lead", "--lead")
	touchmark(t, dir, "order", "new", "PO-1", "--product", "pump-3", "--quantity", "200", "--profile", "line/profiles/x509-group.toml", "--serial-pattern", "SN####",
		"--id-scope", "0ne00112233", "--issuer", "line/issuing.pem", "--holder", "line/station.pem", "--until", "2099-12-31", "--out", "PO-1.toml")
	touchmark(t, dir, "order", "sign", "PO-1.toml", "--store", ownerStore.String(), "--key", "owner", "--out", "PO-1.order")

	s := &technician{dir: dir, printer: printer, passed: map[string]int{}, fails: map[string]int{}, wrong: map[string]string{}, mes: mes, session: map[string]bool{}}

	// Another program has the ledger; then the shift begins. A wrong badge, a wrong PIN.
	lock, err := filelock.Lock(filepath.Join(dir, "line", ledgerFile+".lock"))
	if err != nil {
		t.Fatal(err)
	}
	s.console = open(t, dir, nil, "station", "--line", "line", "--order", "PO-1.order")
	s.shows("Scan your badge > _")
	s.golden("badge")
	s.scan("BADGE-NOBODY")
	s.shows("E-309")
	s.scan("BADGE-MAI")
	s.shows("Enter your PIN > _")
	s.scan("0000")
	s.shows("E-310")
	s.scan("2468")
	s.shows("E-308", fmt.Sprintf("process %d.", os.Getpid()))
	s.golden("checks")
	if err := lock.Close(); err != nil {
		t.Fatal(err)
	}
	s.scan("")
	s.shows("Scan the serial number > _")

	// The first unit, slowly: scanned twice with the other head free, and again when it is through.
	s.scan("SN0001")
	s.shows("Scan the label of head 1 > _")
	s.golden("label")
	s.scan("TM!help", "TM!help")
	fault("SN0002", "hang")
	s.scan("SN0002")
	s.shows("3/8 Flash")
	s.golden("working")
	s.scan("SN0002")
	s.shows("E-103  SN0002 is on head 2 already.")
	s.make(nil, map[string]string{"SN0002": "E-412"}, "SN0001", "SN0002")
	s.golden("fail")
	s.make([]string{"SN0001"}, map[string]string{"SN0001": "E-102"})
	s.make([]string{"SN0002"}, nil)
	s.make([]string{"SN0003"}, nil)
	s.golden("pass")

	// What goes wrong with a board, and how it goes on.
	s.scan("XX0001")
	faults := map[string][2]string{"SN0010": {"product", "E-106"}, "SN0011": {"half", "E-411"}, "SN0012": {"lie", "E-421"}, "SN0013": {"sign", "E-431"}}
	want := map[string]string{"XX0001": "E-105"}
	for serial, f := range faults {
		fault(serial, f[0])
		want[serial] = f[1]
	}
	s.make(nil, want, "XX0001")
	s.wrong["SN0014"], want["SN0014"] = printer.code("SN0001"), "E-503"
	s.make(serialsFrom(4, 40), want)
	s.make(serialsFrom(10, 14), nil)
	if n := printer.printed("SN0014"); n != 1 {
		t.Errorf("%d labels of SN0014, whose first was not scanned", n)
	}

	// The printer: switched off, then back; without paper, and a unit that is given up.
	printer.off()
	s.scan("SN0041")
	s.shows("Waiting", "E-305", "The printer does not answer.")
	printer.on()
	s.make(nil, nil, "SN0041")
	printer.load(false)
	s.scan("SN0042", "SN0043")
	s.shows("Waiting", "1,2 E-502")
	s.golden("waiting")
	s.press("\x1b")
	s.shows("Give up SN00")
	s.scan("")
	s.until("gave one up", func(screen string) bool { return len(s.verdicts(screen)) == 1 && s.fails["E-502"] == 1 })
	printer.load(true)
	given := "SN0042"
	if strings.Contains(s.seen[0], "SN0043") {
		given = "SN0043"
	}
	s.make([]string{given}, nil, map[string]string{"SN0042": "SN0043", "SN0043": "SN0042"}[given])

	// Power cuts: in a flash with a label asked for; and at any instant.
	fault("SN0044", "hang")
	s.scan("SN0044")
	s.shows("3/8 Flash")
	s.scan("SN0045")
	s.shows("Scan the label of head 2 > _")
	s.kill()
	mend()
	s.begin()
	s.make([]string{"SN0044", "SN0045"}, nil)
	if n := printer.printed("SN0045"); n != 1 {
		t.Errorf("%d labels of SN0045: it was printed before the power went", n)
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	for i := range 4 {
		pair := serialsFrom(46+2*i, 47+2*i)
		victim := s.console
		cut := time.AfterFunc(time.Duration(random.Int64N(int64(250*time.Millisecond))), func() { _ = victim.cmd.Process.Kill() })
		s.scan(pair...)
		s.attempt(pair)
		cut.Stop()
		s.kill()
		mend()
		s.begin()
		again := map[string]string{}
		for _, serial := range pair {
			again[serial] = "PASS|E-102" // sealed, and the power went before anybody saw it
		}
		s.make(pair, again)
	}

	// Somebody presses Ctrl-C until it stops, in the middle of a unit.
	fault("SN0057", "hang")
	s.scan("SN0057")
	s.shows("3/8 Flash")
	s.press("\x03")
	s.shows("End the shift?")
	again := time.NewTicker(100 * time.Millisecond)
	defer again.Stop()
	for stopped := false; !stopped; {
		select {
		case <-again.C:
			_, _ = s.pty.WriteString("\x03") // it may have ended already
		case <-s.ended:
			stopped = true
		}
	}
	s.ends(exitInterrupted)
	s.begin()

	// The token is pulled in the middle of the work, and put back.
	tokens := filepath.Join(filepath.Dir(os.Getenv("SOFTHSM2_CONF")), "tokens")
	if err := os.Rename(tokens, tokens+".away"); err != nil {
		t.Fatal(err)
	}
	for _, pid := range children(s.cmd.Process.Pid, "libsofthsm2") {
		if p, err := os.FindProcess(pid); err == nil {
			_ = p.Kill()
		}
	}
	s.scan("SN0054", "SN0055")
	s.shows("1,2 E-303")
	if err := os.Rename(tokens+".away", tokens); err != nil {
		t.Fatal(err)
	}
	mend()
	s.make(nil, nil, "SN0054", "SN0055")

	// A lead's functions: rework, scrap, reprint. Mai may not.
	s.press("\x1bOQ")
	s.shows("E-312", "Rework: Scan your badge > _")
	s.scan("BADGE-MAI")
	s.shows("Rework: Enter your PIN > _")
	s.scan("2468")
	s.shows("Rework: Scan your badge > _")
	s.press("\x1b")
	s.shows(" Scan the serial number > _")
	lead := func(key, name, serial string, answers ...string) {
		t.Helper()
		s.press(key)
		s.shows(name + ": Scan your badge > _")
		s.scan("BADGE-JO")
		s.shows(name + ": Enter your PIN > _")
		s.scan("1357")
		s.shows(name + ": Scan the serial number > _")
		s.scan(serial)
		for i := 0; i < len(answers); i += 2 {
			s.shows(answers[i])
			s.scan(answers[i+1])
		}
		s.shows("\n Scan the serial number > _")
	}
	lead("\x1bOQ", "Rework", "SN0001", "1 Board replaced", "1", "Rework SN0001? Enter: yes", "")
	s.shows("Reworked                   1")
	lead("\x1bOR", "Scrap", "SN0054", "3 Burnt out", "3", "Scrap SN0054? Enter: yes", "")
	s.shows("Scrapped                   1")
	fault("SN0056", "half")
	s.make([]string{"SN0056"}, map[string]string{"SN0056": "E-411"})
	lead("\x1bOR", "Scrap", "SN0056", "1 Damaged", "1", "Scrap SN0056? Enter: yes", "")
	s.shows("Scrapped                   2")
	lead("\x1bOS", "Reprint", "SN0002")
	s.shows("Reprinted                  1")
	if n := printer.printed("SN0002"); n != 2 {
		t.Errorf("%d labels of SN0002", n)
	}
	s.make([]string{"SN0001", "SN0054", "SN0056"}, map[string]string{"SN0054": "E-107", "SN0056": "E-107"})

	// The rest of the order, and one unit too many.
	s.make(serialsFrom(57, 200), nil)
	if left := s.number("Left"); left != 0 {
		t.Errorf("%d left", left)
	}
	s.make([]string{"SN0201"}, map[string]string{"SN0201": "E-203"})

	// End of shift: a serial is no answer, and a unit in work is waited for.
	lead("\x1bOQ", "Rework", "SN0003", "2 Secure element replaced", "2", "Rework SN0003? Enter: yes", "")
	s.scan("SN0003")
	s.shows("Scan the label of head")
	s.press("\x1b[21~")
	s.shows("End the shift? Enter: yes, Esc: no > _")
	s.scan("SN0004")
	s.scan("")
	s.make(nil, nil, "SN0003")
	s.shows("The shift has ended", "Press Enter to leave > _")
	passed := 0
	for serial := range s.session {
		if serial != "SN0054" {
			passed++
		}
	}
	if n := s.number("Passed"); n != passed {
		t.Errorf("the screen says %d passed, and showed %d", n, passed)
	}
	if n := s.number("Failed"); n != 0 {
		t.Errorf("the screen says %d failed", n)
	}
	s.golden("ended", `(Passed +)\d+`, `(First pass +)[0-9.]+%`)
	s.scan("")
	s.ends(exitDone)

	// An order that somebody edited does not begin a shift.
	signed, err := os.ReadFile(filepath.Join(dir, "PO-1.order"))
	if err != nil {
		t.Fatal(err)
	}
	if signed[200]++; !strings.ContainsRune("BCDEFGHIJKLMNOPQRSTUVWXYZbcdefghijklmnopqrstuvwxyz123456789", rune(signed[200])) {
		signed[200] = 'A' // base64 still
	}
	put("edited.order", string(signed), 0o644)
	if code, text := attempt(t, dir, "station", "--line", "line", "--order", "edited.order", "--json", "--operator", "mai"); code != exitUnverified {
		t.Errorf("an edited order: exit code %d\n%s", code, text)
	}
	s.reconcile()
}

// attempt works on units for as long as the power lasts.
func (s *technician) attempt(serials []string) {
	scanned := map[string]bool{}
	for {
		screen := s.screen()
		s.verdicts(screen)
		if m := asks.FindStringSubmatch(screen); m != nil {
			if serial := s.onHead(screen, m[1]); slices.Contains(serials, serial) && !scanned[serial] && s.printer.code(serial) != "" {
				scanned[serial] = true
				_, _ = s.pty.WriteString(s.printer.code(serial) + "\r") // the power may be off already
			}
		}
		select {
		case <-s.updates:
		case <-s.ended:
			return
		}
	}
}

// reconcile holds what was on the screen against the ledger, the bundle, the report and the factory's system.
func (s *technician) reconcile() {
	t := s.t
	t.Helper()
	touchmark(t, s.dir, "ledger", "verify", "--line", "line")
	var sealed []string
	keys := map[string]bool{}
	for line := range strings.Lines(touchmark(t, s.dir, "ledger", "show", "--line", "line", "--json")) {
		var u struct{ Serial, KeyHash, State string }
		if err := json.Unmarshal([]byte(line), &u); err != nil || u.State != "sealed" {
			t.Errorf("%v: %s", err, line)
		}
		sealed = append(sealed, u.Serial)
		keys[u.KeyHash] = true
	}
	slices.Sort(sealed)
	const made = 198 // of 200, two of which were scrapped
	if len(sealed) != made || len(keys) != made {
		t.Errorf("%d units, %d keys in the ledger", len(sealed), len(keys))
	}
	// PASS on the screen is a seal in the ledger, and the other way round, but for what was sealed when the power went.
	var shown []string
	for serial := range s.passed {
		if serial != "SN0054" {
			shown = append(shown, serial)
		}
	}
	shown = append(shown, s.unseen...)
	slices.Sort(shown)
	if !slices.Equal(shown, sealed) {
		t.Errorf("on the screen %v\nin the ledger %v", shown, sealed)
	}

	touchmark(t, s.dir, "bundle", "export", "--line", "line", "--profile", "x509-group", "--order", "PO-1", "--out", "shift.tmb")
	touchmark(t, s.dir, "bundle", "verify", "shift.tmb", "--trust", "line/station.pem")
	var entries []string
	retired := 0
	for line := range strings.Lines(touchmark(t, s.dir, "bundle", "entries", "shift.tmb", "--trust", "line/station.pem")) {
		var e struct {
			Serial  string
			Retired json.RawMessage
		}
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		switch {
		case e.Retired != nil:
			retired++
		case e.Serial != "":
			entries = append(entries, e.Serial)
		}
	}
	slices.Sort(entries)
	if !slices.Equal(entries, sealed) || retired != 4 {
		t.Errorf("in the bundle %v and %d endings", entries, retired)
	}

	code, text := attempt(t, s.dir, "order", "close", "PO-1", "--line", "line", "--out", "PO-1.report", "--json")
	var r struct {
		Ordered, Sealed, Exported, Scrapped, Reworked, Voided, UnmadeCount int
		Refused                                                            []struct{ Kind, Serial string }
	}
	if err := json.NewDecoder(strings.NewReader(text)).Decode(&r); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	if code != exitPartial || r.Ordered != 200 || r.Sealed != made || r.Exported != made || r.Scrapped != 2 || r.Reworked != 2 || r.Voided != 0 || r.UnmadeCount != 0 {
		t.Errorf("exit code %d, report %s", code, text)
	}
	for _, want := range [][2]string{{"product", "SN0010"}, {"serial", "XX0001"}, {"spent", "SN0201"}, {"scrapped", "SN0054"}, {"edited", ""}} {
		if !slices.Contains(r.Refused, struct{ Kind, Serial string }{want[0], want[1]}) {
			t.Errorf("the report does not have %v: %v", want, r.Refused)
		}
	}

	// The factory's system: every PASS that was shown, those of reworked units twice; at least once, and each with one ID.
	pass := append(slices.Clone(sealed), "SN0001", "SN0003", "SN0054")
	slices.Sort(pass)
	told := s.mes.of("pass")
	for _, serial := range s.unseen {
		if !slices.Contains(told, serial) { // the power went before it could be told
			told = append(told, serial)
		}
	}
	slices.Sort(told)
	if !slices.Equal(told, pass) {
		t.Errorf("told of %v\nwant %v", told, pass)
	}
	if r, s := s.mes.of("rework"), s.mes.of("scrap"); !slices.Equal(r, []string{"SN0001", "SN0003"}) || !slices.Equal(s, []string{"SN0054", "SN0056"}) {
		t.Errorf("told of rework %v, scrap %v", r, s)
	}
}
