package label

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Errors that callers branch on. Each error of [Printer.Print] is ErrPrinter or ErrPaper, or the context's.
var (
	// ErrPrinter says that the printer was not reached, or would not take the label.
	ErrPrinter = errors.New("the printer does not take labels")
	// ErrPaper says that someone has to go to the printer: labels or ribbon are out, its head is open, or it is paused.
	ErrPaper = errors.New("the printer needs a hand")
	// ErrUncertain goes with one of the others, or with the context's: the label was on its way, and may be printed now or
	// later. Look before it is printed again.
	ErrUncertain = errors.New("the label may have been printed all the same")
)

// A Job is one label, rendered.
type Job struct {
	Serial string // the unit's, for names of files and in commands
	Copy   int    // of a reprint, from 1
	Format Format
	Data   []byte
}

// name returns the job's name: its serial, with what is no letter, digit, '-' or '_' as % and two hexadecimal digits, and ".R1"
// for the first reprint. It is a plain file name, and no option of a command.
func (j *Job) name() string {
	var b strings.Builder
	for i := range len(j.Serial) {
		if c := j.Serial[i]; plain(c) || c >= 'a' && c <= 'z' || c == '_' || c == '-' && i > 0 {
			b.WriteByte(c)
		} else {
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	if j.Copy > 0 {
		fmt.Fprintf(&b, ".R%d", j.Copy)
	}
	return b.String()
}

// A Printer is where labels go. It prints one at a time, and may be used by many goroutines. A print is never repeated: when it
// is not known what became of a label, the error is [ErrUncertain].
type Printer struct {
	// Patience bounds each print, 15 seconds unless set. Set it before the first print.
	Patience time.Duration

	target string
	kind   string
	place  string // a path, or host:port
	argv   []string
	status bool // ask for it, where the job is ZPL
	baud   uint32
	turn   chan struct{}
}

var bauds = map[string]uint32{"9600": unix.B9600, "19200": unix.B19200, "38400": unix.B38400, "57600": unix.B57600, "115200": unix.B115200}

// ParsePrinter reads a printer's target:
//
//	file:PATH                     a file, which must not be there: whoever took the last label has removed it
//	dir:PATH                      a file for each label in a directory, named for serial and copy: "SN-1.zpl", "SN-1.R1.zpl"
//	tcp:HOST:PORT                 a printer's raw port, mostly 9100
//	serial:DEVICE?baud=9600       a serial port with 8 data bits and no parity, at 9600 (default), 19200, 38400, 57600 or 115200
//	command:PROGRAM ARGUMENT ...  a program that reads the label from its standard input, run without a shell, as in
//	                              "command:lp -d zebra"; spaces part the words, and {name} is what the file would be called
//
// Files are there whole or not at all. A printer behind tcp or serial that gets ZPL is asked for its status before the label and
// after it; with ?status=none, for those that do not answer, it is not.
func ParsePrinter(target string) (*Printer, error) {
	p := &Printer{target: target, status: true, baud: unix.B9600, turn: make(chan struct{}, 1)}
	var ok bool
	p.kind, p.place, ok = strings.Cut(target, ":")
	if !ok || p.place == "" {
		return nil, fmt.Errorf("printer %q: want file:PATH, dir:PATH, tcp:HOST:PORT, serial:DEVICE or command:PROGRAM", target)
	}
	var options string
	if p.kind == "tcp" || p.kind == "serial" {
		p.place, options, _ = strings.Cut(p.place, "?")
	}
	query, err := url.ParseQuery(options)
	if err != nil {
		return nil, fmt.Errorf("printer %q: %w", target, err)
	}
	for key, values := range query {
		baud, known := bauds[values[0]]
		switch {
		case len(values) > 1:
			return nil, fmt.Errorf("printer %q: %s is there twice", target, key)
		case key == "status" && values[0] == "none":
			p.status = false
		case key == "baud" && p.kind == "serial" && known:
			p.baud = baud
		default:
			return nil, fmt.Errorf("printer %q: %s=%s is not an option of it", target, key, values[0])
		}
	}
	switch p.kind {
	case "file", "dir", "serial":
	case "tcp":
		host, port, err := net.SplitHostPort(p.place)
		if n, numErr := strconv.ParseUint(port, 10, 16); err != nil || host == "" || numErr != nil || n == 0 {
			return nil, fmt.Errorf("printer %q: want a host and a port, as in tcp:label-1.example:9100", target)
		}
	case "command":
		p.argv = strings.Fields(p.place)
		if len(p.argv) == 0 || strings.Contains(p.argv[0], "{name}") {
			return nil, fmt.Errorf("printer %q: names no program", target)
		}
	default:
		return nil, fmt.Errorf("printer %q: %s is no kind of printer: file, dir, tcp, serial or command", target, p.kind)
	}
	return p, nil
}

// String returns the target.
func (p *Printer) String() string { return p.target }

// Print prints one label. It returns when the printer has it, as far as the target can tell: a file is flushed, a command has
// ended well, a printer that is asked for its status answered again behind the label and has nothing to complain about, any
// other one closed the connection. The context ends it early.
func (p *Printer) Print(ctx context.Context, job Job) error {
	select {
	case p.turn <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("printing the label of %s on %s: %w", job.Serial, p.target, ctx.Err())
	}
	defer func() { <-p.turn }()
	limited, cancel := context.WithTimeout(ctx, cmp.Or(p.Patience, 15*time.Second))
	defer cancel()
	var err error
	switch p.kind {
	case "file":
		err = writeWhole(p.place, job.Data)
	case "dir":
		err = writeWhole(filepath.Join(p.place, job.name()+"."+string(job.Format)), job.Data)
	case "command":
		err = p.run(limited, &job)
	default:
		err = p.talk(limited, &job)
	}
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		err = fmt.Errorf("%w: %w", ctx.Err(), err)
	case !errors.Is(err, ErrPaper):
		err = fmt.Errorf("%w: %w", ErrPrinter, err)
	}
	return fmt.Errorf("printing the label of %s on %s: %w", job.Serial, p.target, err)
}

// writeWhole puts a file in place that must not be there.
func writeWhole(path string, data []byte) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), ".label-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name())
		}
	}()
	_, err = f.Write(data)
	// Whoever prints it may be another user.
	if err := errors.Join(err, f.Chmod(0o644), f.Sync(), f.Close()); err != nil {
		return err
	}
	switch err := unix.Renameat2(unix.AT_FDCWD, f.Name(), unix.AT_FDCWD, path, unix.RENAME_NOREPLACE); err {
	case nil:
	case unix.EEXIST:
		return fmt.Errorf("%s is there already, and nobody has printed it", path)
	default:
		return &os.PathError{Op: "rename", Path: path, Err: err}
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// run hands the label to a program.
func (p *Printer) run(ctx context.Context, job *Job) error {
	argv := slices.Clone(p.argv)
	for i := range argv {
		argv[i] = strings.ReplaceAll(argv[i], "{name}", job.name()+"."+string(job.Format))
	}
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.WaitDelay = time.Second // for what its own children hold open
	cmd.Stdin = bytes.NewReader(job.Data)
	complaint := &bounded{room: 2 << 10}
	cmd.Stderr = complaint
	if err := cmd.Start(); err != nil {
		return err
	}
	err := cmd.Wait()
	if err != nil && ctx.Err() != nil {
		return fmt.Errorf("%w: it was stopped: %w", ErrUncertain, ctx.Err())
	}
	if err != nil {
		return fmt.Errorf("%w: %q", err, strings.TrimSpace(complaint.String()))
	}
	return nil
}

// bounded keeps what there is room for, and takes the rest without keeping it.
type bounded struct {
	bytes.Buffer
	room int
}

func (b *bounded) Write(p []byte) (int, error) {
	_, _ = b.Buffer.Write(p[:max(0, min(len(p), b.room-b.Len()))])
	return len(p), nil
}

// A connection is a printer's port, network or serial.
type connection interface {
	io.ReadWriteCloser
	SetDeadline(time.Time) error
}

func (p *Printer) connect(ctx context.Context) (connection, error) {
	if p.kind == "serial" {
		return openSerial(p.place, p.baud)
	}
	var d net.Dialer
	return d.DialContext(ctx, "tcp", p.place)
}

// talk sends the label over a connection.
func (p *Printer) talk(ctx context.Context, job *Job) (err error) {
	c, err := p.connect(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	// A deadline in the past ends what waits.
	defer context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })()
	ask := p.status && job.Format == ZPL
	if ask {
		if err := hostStatus(c); err != nil {
			return err // nothing was sent
		}
	}
	if _, err = c.Write(job.Data); err != nil {
		return fmt.Errorf("%w: %w", ErrUncertain, err)
	}
	if ask {
		err = hostStatus(c)
	} else if tcp, ok := c.(*net.TCPConn); ok {
		// Closing at once could throw away what the printer has not read. It closes when it has it all.
		if err = tcp.CloseWrite(); err == nil {
			_, err = io.Copy(io.Discard, io.LimitReader(tcp, 64<<10))
		}
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUncertain, err)
	}
	return nil
}

// openSerial opens a serial port for one program, raw, with 8 data bits, no parity and one stop bit. XON and XOFF pace it, which is
// what printers do unless told otherwise.
func openSerial(path string, baud uint32) (*os.File, error) {
	// Not blocking, so that deadlines work.
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NOCTTY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	raw := unix.Termios{Iflag: unix.IXON | unix.IXOFF | unix.IGNPAR, Cflag: unix.CS8 | unix.CREAD | unix.CLOCAL | baud,
		Ispeed: baud, Ospeed: baud}
	raw.Cc[unix.VMIN] = 1
	raw.Cc[unix.VSTART], raw.Cc[unix.VSTOP] = 0x11, 0x13
	conn, err := f.SyscallConn()
	if err == nil {
		var set error
		err = conn.Control(func(fd uintptr) {
			set = errors.Join(unix.IoctlSetInt(int(fd), unix.TIOCEXCL, 0), unix.IoctlSetTermios(int(fd), unix.TCSETS, &raw),
				unix.IoctlSetInt(int(fd), unix.TCFLSH, unix.TCIFLUSH)) // what was said to others
		})
		err = errors.Join(err, set)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("setting up serial port %s: %w", path, err), f.Close())
	}
	return f, nil
}
