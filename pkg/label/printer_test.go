package label_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/touchmark/touchmark/hsm/hsmtest"
	"github.com/touchmark/touchmark/pkg/label"
)

// Answers to ~HS, captured from printers: a ZD421 that is ready, and others; and the first one's with the flags of faults set.
const (
	statusReady  = "\x02030,0,0,1245,000,0,0,0,000,0,0,0\x03\r\n\x02000,0,0,0,0,2,4,0,00000000,1,000\x03\r\n\x021234,0\x03\r\n"
	statusLP2824 = "\x02030,0,0,0251,000,0,0,0,000,0,0,0\x03\r\n\x02000,0,0,0,0,2,3,0,00000000,1,000\x03\r\n\x021234,0\x03\r\n"
	statusBatch  = "\x02150,0,0,1219,000,0,0,0,000,0,0,0\x03\r\n\x02000,0,0,0,0,2,0,0,01335508,1,000\x03\r\n\x028888,0\x03\r\n"
	statusPaused = "\x02030,0,1,0212,015,0,0,0,000,0,0,0\x03\r\n\x02001,0,0,0,1,2,4,0,00000000,1,000\x03\r\n\x020000,0\x03\r\n"
	statusRibbon = "\x02030,1,1,1225,000,0,0,0,000,0,0,0\x03\r\n\x02001,0,0,1,1,2,6,0,00000100,1,000\x03\r\n\x021234,0\x03\r\n"
	statusAll    = "\x02030,1,1,1245,003,1,0,0,000,1,1,1\x03\r\n\x02000,1,1,1,3,2,0,5,00000000,1,000\x03\r\n\x021234,1\x03\r\n"
)

func printer(t *testing.T, target string) *label.Printer {
	t.Helper()
	p, err := label.ParsePrinter(target)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func zplJob(t *testing.T) label.Job {
	t.Helper()
	job, err := parse(t, "unit", builtIn(t)["unit-50x25"]).Render(label.ZPL, pump())
	if err != nil {
		t.Fatal(err)
	}
	return job
}

// A port is a printer's end of a connection, with what the test does there.
type port struct {
	net.Conn
	t *testing.T
}

// expect reads what must come.
func (p port) expect(want string) {
	got := make([]byte, len(want))
	if n, err := io.ReadFull(p, got); err != nil || string(got) != want {
		p.t.Errorf("the printer got %q, %v; want %q", got[:n], err, want)
	}
}

func (p port) answer(s string) {
	if _, err := io.WriteString(p, s); err != nil {
		p.t.Errorf("the printer answering: %v", err)
	}
}

// cut ends the connection with a reset.
func (p port) cut() { _ = p.Conn.(*net.TCPConn).SetLinger(0) }

// listen is a printer on a network port, for one connection: a second one, which would be a second print, fails the test. It
// closes the connection when behave returns.
func listen(t *testing.T, behave func(port)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		c, err := l.Accept()
		if err != nil {
			return
		}
		behave(port{c, t})
		_ = c.Close()
		if _, err := l.Accept(); err == nil {
			t.Error("the label was sent again")
		}
	}()
	t.Cleanup(func() { _ = l.Close(); <-done })
	return "tcp:" + l.Addr().String()
}

func TestNetworkPrinter(t *testing.T) {
	job := zplJob(t)
	const ask = "~HS\r\n"
	for name, c := range map[string]struct {
		behave func(port)
		want   []error
		text   string
	}{
		"ready": {func(p port) {
			p.expect(ask)
			p.answer(statusReady)
			p.expect(string(job.Data) + ask)
			p.answer(statusReady)
		}, nil, ""},
		"another printer": {func(p port) {
			p.expect(ask)
			p.answer(statusLP2824)
			p.expect(string(job.Data) + ask)
			p.answer(statusBatch)
		}, nil, ""},
		"answers in drops": {func(p port) {
			p.expect(ask)
			drops(p, statusReady)
			p.expect(string(job.Data) + ask)
			drops(p, statusReady)
		}, nil, ""},
		"paused":        {func(p port) { p.expect(ask); p.answer(statusPaused); p.expect("") }, []error{label.ErrPaper}, "paused: press PAUSE"},
		"out of labels": {func(p port) { p.expect(ask); p.answer(strings.Replace(statusReady, "030,0", "030,1", 1)) }, []error{label.ErrPaper}, "out of labels"},
		"head open": {func(p port) {
			p.expect(ask)
			p.answer(strings.Replace(statusReady, "000,0,0,0,0,2", "000,0,1,0,0,2", 1))
		}, []error{label.ErrPaper}, "the head is open"},
		"out of ribbon": {func(p port) { p.expect(ask); p.answer(statusRibbon) }, []error{label.ErrPaper}, "out of ribbon"},
		"everything":    {func(p port) { p.expect(ask); p.answer(statusAll) }, []error{label.ErrPaper}, "the head is open: close it; it is out of labels"},
		"buffer full": {func(p port) {
			p.expect(ask)
			p.answer(strings.Replace(statusReady, "000,0,0,0,000", "000,1,0,0,000", 1))
		}, []error{label.ErrPrinter}, "buffer is full"},
		"too hot": {func(p port) {
			p.expect(ask)
			p.answer(strings.Replace(statusReady, "000,0,0,0\x03", "000,0,0,1\x03", 1))
		}, []error{label.ErrPrinter}, "too hot"},
		"no printer":        {func(p port) { p.expect(ask); p.answer("HTTP/1.1 400 Bad Request\r\n\r\n" + strings.Repeat("x", 300)) }, []error{label.ErrPrinter}, "not what a ZPL printer says"},
		"too many fields":   {func(p port) { p.expect(ask); p.answer(strings.Replace(statusReady, "030,", "030,0,", 1)) }, []error{label.ErrPrinter}, "not what a ZPL printer says"},
		"hangs up":          {func(p port) {}, []error{label.ErrPrinter}, "status"},
		"cut in its status": {func(p port) { p.expect(ask); p.answer(statusReady[:40]) }, []error{label.ErrPrinter}, "reading its status"},
		"head opened while printing": {func(p port) {
			p.expect(ask)
			p.answer(statusReady)
			p.expect(string(job.Data) + ask)
			p.answer(strings.Replace(statusReady, "000,0,0,0,0,2", "000,0,1,0,0,2", 1))
		}, []error{label.ErrPaper, label.ErrUncertain}, "the head is open"},
		"cut in the label":     {func(p port) { p.expect(ask); p.answer(statusReady); p.expect(string(job.Data[:100])); p.cut() }, []error{label.ErrPrinter, label.ErrUncertain}, ""},
		"gone after the label": {func(p port) { p.expect(ask); p.answer(statusReady); p.expect(string(job.Data)) }, []error{label.ErrPrinter, label.ErrUncertain}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			check(t, printer(t, listen(t, c.behave)).Print(t.Context(), job), c.want, c.text)
		})
	}
}

func drops(p port, s string) {
	for i := range s {
		p.answer(s[i : i+1])
	}
}

// check holds an error against the sentinels that it must have, and no others.
func check(t *testing.T, err error, want []error, text string) {
	t.Helper()
	has := 0
	for _, sentinel := range []error{label.ErrPrinter, label.ErrPaper, label.ErrUncertain, context.Canceled} {
		if errors.Is(err, sentinel) {
			has++
		}
	}
	for _, w := range want {
		if !errors.Is(err, w) {
			t.Errorf("%v is not %q", err, w)
		}
	}
	if has != len(want) || (err == nil) != (want == nil) || err != nil && !strings.Contains(err.Error(), text) {
		t.Errorf("got %v, want %v with %q", err, want, text)
	}
}

// A printer that does not answer is given up when patience ends, or the context.
func TestSilentPrinter(t *testing.T) {
	job := zplJob(t)
	for name, answers := range map[string]int{"before the label": 0, "behind it": 1} {
		want := []error{label.ErrPrinter, label.ErrUncertain}[:1+answers]
		behave := func(asked func()) func(port) {
			return func(p port) {
				p.expect("~HS\r\n")
				if answers == 1 {
					p.answer(statusReady)
					p.expect(string(job.Data) + "~HS\r\n")
				}
				asked()
				_, _ = io.Copy(io.Discard, p) // until the other side has given up
			}
		}
		t.Run(name+", patience", func(t *testing.T) {
			p := printer(t, listen(t, behave(func() {})))
			p.Patience = 200 * time.Millisecond
			check(t, p.Print(t.Context(), job), want, "does not answer when asked")
		})
		t.Run(name+", context", func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			check(t, printer(t, listen(t, behave(cancel))).Print(ctx, job), append([]error{context.Canceled}, want[1:]...), "")
		})
	}
}

func TestRefused(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	target := "tcp:" + l.Addr().String()
	_ = l.Close()
	check(t, printer(t, target).Print(t.Context(), zplJob(t)), []error{label.ErrPrinter}, "refused")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := printer(t, target).Print(ctx, zplJob(t)); !errors.Is(err, context.Canceled) || errors.Is(err, label.ErrUncertain) {
		t.Errorf("with the context's end: %v", err)
	}
}

// A printer that is not asked for its status gets the label and nothing else, and has it when it closes.
func TestPlainPort(t *testing.T) {
	job := zplJob(t)
	picture, err := parse(t, "unit", builtIn(t)["unit-50x25"]).Render(label.PNG, pump())
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		option string
		job    label.Job
	}{{"?status=none", job}, {"", picture}} {
		target := listen(t, func(p port) {
			got, err := io.ReadAll(p)
			if err != nil || !bytes.Equal(got, c.job.Data) {
				t.Errorf("the printer got %q, %v", got, err)
			}
		})
		check(t, printer(t, target+c.option).Print(t.Context(), c.job), nil, "")
	}
	large := picture
	large.Data = bytes.Repeat([]byte("x"), 32<<20) // more than fits between the two
	target := listen(t, func(p port) { p.expect("xxxx"); p.cut() })
	check(t, printer(t, target).Print(t.Context(), large), []error{label.ErrPrinter, label.ErrUncertain}, "")
	target = listen(t, func(p port) { _, _ = io.Copy(io.Discard, io.LimitReader(p, int64(len(picture.Data)))); p.cut() })
	check(t, printer(t, target).Print(t.Context(), picture), []error{label.ErrPrinter, label.ErrUncertain}, "")
}

// The other end of a pseudo-terminal is a printer on a serial port: octets pass as they are, whatever terminals make of them.
func TestSerialPort(t *testing.T) {
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer master.Close()
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	path := fmt.Sprintf("/dev/pts/%d", n)
	// Held open, so that the master reads on between prints, and closed last.
	hold, err := os.OpenFile(path, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer hold.Close()
	job := zplJob(t)
	job.Data = append(job.Data, "\x03\x04\x0a\x0d\x1a\x00\xff\n"...) // what a terminal would act on
	want := "~HS\r\n" + string(job.Data) + "~HS\r\n"
	got := make(chan string)
	go func() {
		var all []byte
		b := make([]byte, 1)
		for asked := 0; len(all) < len(want); {
			if _, err := master.Read(b); err != nil {
				break
			}
			all = append(all, b[0])
			if n := bytes.Count(all, []byte("~HS\r\n")); n > asked {
				asked = n
				_, _ = master.WriteString(statusReady)
			}
		}
		got <- string(all)
	}()
	check(t, printer(t, "serial:"+path+"?baud=115200").Print(t.Context(), job), nil, "")
	if all := <-got; all != want {
		t.Errorf("the printer got %q", all)
	}
	if termios, err := unix.IoctlGetTermios(int(hold.Fd()), unix.TCGETS); err != nil || termios.Cflag&unix.CBAUD != unix.B115200 || termios.Cflag&unix.CSIZE != unix.CS8 {
		t.Errorf("the port is set to %+v, %v", termios, err)
	}
	p := printer(t, "serial:"+path)
	p.Patience = 200 * time.Millisecond
	check(t, p.Print(t.Context(), zplJob(t)), []error{label.ErrPrinter}, "does not answer")
	check(t, printer(t, "serial:/dev/ttyNone").Print(t.Context(), zplJob(t)), []error{label.ErrPrinter}, "no such file")
	check(t, printer(t, "serial:/dev/null").Print(t.Context(), zplJob(t)), []error{label.ErrPrinter}, "setting up serial port")
}

func names(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, e := range entries {
		all = append(all, e.Name())
	}
	return all
}

func TestFiles(t *testing.T) {
	dir := t.TempDir()
	p := printer(t, "dir:"+dir)
	job := zplJob(t)
	check(t, p.Print(t.Context(), job), nil, "")
	if b, err := os.ReadFile(filepath.Join(dir, "SN-2026-000123.R1.zpl")); err != nil || !bytes.Equal(b, job.Data) {
		t.Errorf("%q, %v", b, err)
	}
	again := job
	again.Data = []byte("another")
	check(t, p.Print(t.Context(), again), []error{label.ErrPrinter}, "is there already")
	if b, err := os.ReadFile(filepath.Join(dir, "SN-2026-000123.R1.zpl")); err != nil || !bytes.Equal(b, job.Data) {
		t.Errorf("a label that nobody has printed was lost: %q, %v", b, err)
	}
	again.Copy = 2
	check(t, p.Print(t.Context(), again), nil, "")
	seen := make(map[string]bool)
	for _, serial := range hostile {
		job.Serial = serial
		check(t, p.Print(t.Context(), job), nil, "")
		seen[serial] = true
	}
	all := names(t, dir)
	if len(all) != 2+len(seen) || len(names(t, filepath.Dir(dir))) != 1 {
		t.Errorf("the directory has %q", all)
	}
	for _, name := range all {
		if strings.HasPrefix(name, ".") || strings.HasPrefix(name, "-") || strings.ContainsAny(name, "/*?$ ;|<>") {
			t.Errorf("a label is called %q", name)
		}
	}
	one := printer(t, "file:"+filepath.Join(dir, "last.zpl"))
	check(t, one.Print(t.Context(), job), nil, "")
	check(t, one.Print(t.Context(), job), []error{label.ErrPrinter}, "is there already")
	check(t, printer(t, "dir:"+filepath.Join(dir, "none")).Print(t.Context(), job), []error{label.ErrPrinter}, "no such file")
}

// A full disk leaves no piece of a label, and no hidden file.
func TestFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		hsmtest.Require(t, "the right to mount a small file system (root)")
	}
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=16k"); err != nil {
		hsmtest.Require(t, "the right to mount a small file system: "+err.Error())
	}
	defer func() { _ = syscall.Unmount(dir, syscall.MNT_DETACH) }()
	job := zplJob(t)
	job.Data = bytes.Repeat([]byte("x"), 64<<10)
	check(t, printer(t, "dir:"+dir).Print(t.Context(), job), []error{label.ErrPrinter}, "no space left")
	if all := names(t, dir); all != nil {
		t.Errorf("left behind: %q", all)
	}
}

func TestCommand(t *testing.T) {
	dir := t.TempDir()
	script := filepath.Join(dir, "lp")
	body := "#!/bin/sh\nout=" + dir + "/out\nprintf '%s\\n' \"$@\" >$out.argv\ncat >$out\ncase $1 in jam) echo 'lp: no such printer' >&2; exit 3;; hang) echo >$out.hangs; exec tail -f /dev/null;; esac\n"
	if err := os.WriteFile(script, []byte(body), 0o755); err != nil {
		t.Fatal(err)
	}
	read := func(name string) string {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Error(err)
		}
		return string(b)
	}
	job := zplJob(t)
	job.Serial = "-o$(reboot) `x`"
	check(t, printer(t, "command:"+script+"  -d zebra -t {name}").Print(t.Context(), job), nil, "")
	if got := read("out.argv"); got != "-d\nzebra\n-t\n%2Do%24%28reboot%29%20%60x%60.R1.zpl\n" {
		t.Errorf("the program was called with %q", got)
	}
	if read("out") != string(job.Data) {
		t.Error("the program read another label")
	}
	check(t, printer(t, "command:"+script+" jam").Print(t.Context(), job), []error{label.ErrPrinter}, "exit status 3: \"lp: no such printer\"")
	check(t, printer(t, "command:"+filepath.Join(dir, "none")).Print(t.Context(), job), []error{label.ErrPrinter}, "no such file")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	if err := unix.Mkfifo(filepath.Join(dir, "out.hangs"), 0o600); err != nil {
		t.Fatal(err)
	}
	go func() {
		// It opens once the program hangs.
		_, _ = os.ReadFile(filepath.Join(dir, "out.hangs"))
		cancel()
	}()
	check(t, printer(t, "command:"+script+" hang").Print(ctx, job), []error{context.Canceled, label.ErrUncertain}, "it was stopped")
}

// Labels go one after another, and whoever waits may give up.
func TestOneAtATime(t *testing.T) {
	job := zplJob(t)
	asked, free := make(chan struct{}), make(chan struct{})
	p := printer(t, listen(t, func(p port) {
		p.expect("~HS\r\n")
		close(asked)
		<-free
		p.answer(statusReady)
		p.expect(string(job.Data) + "~HS\r\n")
		p.answer(statusReady)
	}))
	first := make(chan error)
	go func() { first <- p.Print(t.Context(), job) }()
	<-asked
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	check(t, p.Print(ctx, job), []error{context.Canceled}, "") // a connection of its own would fail the test
	close(free)
	check(t, <-first, nil, "")
}

func TestParsePrinter(t *testing.T) {
	for _, target := range []string{"file:a", "dir:/var/spool/labels", "tcp:label-1.example:9100", "tcp:[::1]:9100?status=none", "serial:/dev/ttyUSB0",
		"serial:/dev/ttyUSB0?baud=19200&status=none", "command:lp -d zebra", "file:a?b"} {
		if got := printer(t, target).String(); got != target {
			t.Errorf("%s is %s", target, got)
		}
	}
	for _, target := range []string{"", "zebra", "file:", "usb:1", "tcp:host", "tcp:host:", "tcp::9100", "tcp:host:0", "tcp:host:99999", "tcp:host:http",
		"tcp:host:9100?baud=9600", "tcp:host:9100?status=maybe", "tcp:host:9100?status=none&status=none", "tcp:host:9100?%zz", "serial:/dev/x?baud=1", "serial:/dev/x?parity=even",
		"command: ", "command:{name} x", "http://host/"} {
		if p, err := label.ParsePrinter(target); err == nil {
			t.Errorf("%q is %v", target, p)
		}
	}
}
