package main

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/touchmark/touchmark/hsm/hsmtest"
	"github.com/touchmark/touchmark/pkg/station"
)

// A disk is what a machine whose power may go has of a directory: what its programs see, and what is on the platter. It goes by what
// POSIX promises and no more: fsync brings a file's content, or a directory's names; syncfs brings all.
type disk struct {
	at   string
	root *diskNode
}

type diskNode struct {
	data, safeData   []byte
	names, safeNames map[string]*diskNode // of a directory
	mode             fs.FileMode
	pending          []diskWrite // since the last flush
}

type diskWrite struct {
	at   int64 // -1 at the end, -2 truncates to len
	data []byte
	len  int64
}

func (n *diskNode) write(w diskWrite) {
	n.data = w.apply(n.data)
	n.pending = append(n.pending, w)
}

func (w diskWrite) apply(b []byte) []byte {
	switch w.at {
	case -2:
		return append(slices.Clone(b[:min(w.len, int64(len(b)))]), make([]byte, max(0, w.len-int64(len(b))))...)
	case -1:
		return append(slices.Clip(b), w.data...)
	}
	b = append(slices.Clone(b), make([]byte, max(0, w.at+int64(len(w.data))-int64(len(b))))...)
	copy(b[w.at:], w.data)
	return b
}

// loadDisk takes a directory as it is for flushed.
func loadDisk(t *testing.T, at string) *disk {
	t.Helper()
	var load func(path string) *diskNode
	load = func(path string) *diskNode {
		st, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		n := &diskNode{mode: st.Mode().Perm()}
		if !st.IsDir() {
			if n.data, err = os.ReadFile(path); err != nil {
				t.Fatal(err)
			}
			n.safeData = n.data
			return n
		}
		entries, err := os.ReadDir(path)
		if err != nil {
			t.Fatal(err)
		}
		n.names = map[string]*diskNode{}
		for _, e := range entries {
			if !strings.HasSuffix(e.Name(), "-shm") { // memory, by another name
				n.names[e.Name()] = load(filepath.Join(path, e.Name()))
			}
		}
		n.safeNames = maps.Clone(n.names)
		return n
	}
	return &disk{at, load(at)}
}

// find returns the node of an absolute path, and the directory that it is or would be in; nil outside the disk.
func (d *disk) find(path string) (parent, n *diskNode, name string) {
	rel, err := filepath.Rel(d.at, path)
	if err != nil || strings.HasPrefix(rel, "..") {
		return nil, nil, ""
	}
	n = d.root
	for _, word := range strings.Split(rel, "/") {
		if word == "." {
			continue
		}
		if n == nil || n.names == nil {
			return nil, nil, ""
		}
		parent, name, n = n, word, n.names[word]
	}
	return parent, n, name
}

// A flush is what one call of fsync or syncfs covers: what was there when it was called.
type diskFlush struct {
	n       *diskNode
	data    []byte
	names   map[string]*diskNode
	pending int
}

func (n *diskNode) flush(all bool, out []diskFlush) []diskFlush {
	out = append(out, diskFlush{n, n.data, maps.Clone(n.names), len(n.pending)})
	if all {
		for _, c := range n.names {
			out = c.flush(true, out)
		}
	}
	return out
}

func (f *diskFlush) done() {
	f.n.safeData, f.n.safeNames = f.data, f.names
	f.n.pending = slices.Clone(f.n.pending[min(f.pending, len(f.n.pending)):])
}

// crash puts into the directory what is there when the power comes back: what was flushed, and with chance some of the rest.
func (d *disk) crash(t *testing.T, chance func() bool) {
	t.Helper()
	if err := os.RemoveAll(d.at); err != nil {
		t.Fatal(err)
	}
	// A rename is whole or not at all, on every file system that keeps a journal: where a node is, is one question.
	coins := map[*diskNode]bool{}
	moved := func(n *diskNode) bool {
		if _, asked := coins[n]; !asked {
			coins[n] = chance()
		}
		return coins[n]
	}
	var put func(n *diskNode, path string)
	put = func(n *diskNode, path string) {
		if n.names == nil {
			data := n.safeData
			for _, w := range n.pending {
				if chance() {
					data = w.apply(data)
				}
			}
			if err := os.WriteFile(path, data, n.mode|0o600); err != nil {
				t.Fatal(err)
			}
			return
		}
		if err := os.Mkdir(path, n.mode|0o700); err != nil {
			t.Fatal(err)
		}
		names := maps.Clone(n.safeNames)
		if names == nil {
			names = map[string]*diskNode{}
		}
		for name, c := range n.safeNames {
			if n.names[name] == nil && moved(c) {
				delete(names, name)
			}
		}
		for name, c := range n.names {
			if names[name] != c && moved(c) {
				names[name] = c
			}
		}
		for name, c := range names {
			put(c, filepath.Join(path, name))
		}
	}
	put(d.root, d.at)
}

// A traced call is one line of strace's, or the two ends of one.
type tracedCall struct {
	name    string
	args    []string
	ret     int64
	retPath string
	flushes []diskFlush
}

var (
	traceLine  = regexp.MustCompile(`^(\d+) +(\w+)\((.*)\) += (-?\d+)(?:<([^>]*)>)?`)
	traceBegin = regexp.MustCompile(`^(\d+) +(\w+)\((.*) <unfinished \.\.\.>$`)
	traceEnd   = regexp.MustCompile(`^(\d+) +<\.\.\. (\w+) resumed>(.*)$`)
	fdWithPath = regexp.MustCompile(`^(?:-?\d+|AT_FDCWD)<([^>]*)>`)
	traceCalls = "write,writev,pwrite64,pwritev,ftruncate,truncate,fallocate,open,creat,fsync,fdatasync,syncfs,openat,renameat2,renameat,rename,mkdirat,mkdir,unlinkat,unlink,rmdir,linkat,link,copy_file_range"
)

// A step is one end of a call, in the order of the trace.
type traceStep struct {
	call *tracedCall
	done bool
}

func parseTrace(t *testing.T, text string) []traceStep {
	t.Helper()
	unhex := func(s string) string {
		b, err := hex.DecodeString(strings.ReplaceAll(s, `\x`, ""))
		if err != nil {
			t.Fatalf("%.80q: %v", s, err)
		}
		return string(b)
	}
	var steps []traceStep
	open := map[string]*tracedCall{}
	begun := map[string]string{}
	parse := func(line string) *tracedCall {
		m := traceLine.FindStringSubmatch(line)
		if m == nil {
			return nil
		}
		c := &tracedCall{name: m[2]}
		c.ret, _ = strconv.ParseInt(m[4], 10, 64)
		if c.ret >= 0 && m[5] != "" {
			c.retPath = unhex(m[5])
		}
		for _, a := range strings.Split(m[3], ", ") {
			if p := fdWithPath.FindStringSubmatch(a); p != nil {
				a = unhex(p[1])
			} else if strings.HasPrefix(a, `"`) {
				a = unhex(strings.Trim(a, `"`))
			}
			c.args = append(c.args, a)
		}
		return c
	}
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		if m := traceBegin.FindStringSubmatch(line); m != nil {
			begun[m[1]] = strings.TrimSuffix(line, " <unfinished ...>")
			c := &tracedCall{name: m[2]}
			if p := fdWithPath.FindStringSubmatch(m[3]); p != nil {
				c.args = []string{unhex(p[1])}
			}
			open[m[1]] = c
			steps = append(steps, traceStep{c, false})
			continue
		}
		if m := traceEnd.FindStringSubmatch(line); m != nil && open[m[1]] != nil {
			if whole := parse(begun[m[1]] + m[3]); whole != nil {
				whole.flushes = nil
				*open[m[1]] = tracedCall{name: whole.name, args: whole.args, ret: whole.ret, retPath: whole.retPath}
				steps = append(steps, traceStep{open[m[1]], true})
			}
			delete(open, m[1])
			continue
		}
		if c := parse(line); c != nil {
			steps = append(steps, traceStep{c, false}, traceStep{c, true})
		}
	}
	return steps
}

// play does to the disk what a step did.
func (d *disk) play(t *testing.T, s traceStep) {
	t.Helper()
	c := s.call
	if !s.done {
		switch c.name {
		case "fsync", "fdatasync":
			if _, n, _ := d.find(c.args[0]); n != nil {
				c.flushes = n.flush(false, nil)
			}
		case "syncfs":
			c.flushes = d.root.flush(true, nil)
		}
		return
	}
	if c.ret < 0 {
		return
	}
	join := func(dir, name string) string {
		if filepath.IsAbs(name) {
			return name
		}
		return filepath.Join(dir, name)
	}
	number := func(s string) int64 {
		n, err := strconv.ParseInt(s, 10, 64)
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		return n
	}
	remove := func(path string) {
		if parent, n, name := d.find(path); n != nil {
			delete(parent.names, name)
		}
	}
	move := func(from, to string) {
		parent, n, name := d.find(from)
		into, _, as := d.find(to)
		if n == nil || into == nil {
			return
		}
		delete(parent.names, name)
		into.names[as] = n
	}
	switch c.name {
	case "fsync", "fdatasync", "syncfs":
		for i := range c.flushes {
			c.flushes[i].done()
		}
	case "openat", "open":
		flags := c.args[len(c.args)-1]
		if i := slices.IndexFunc(c.args, func(a string) bool { return strings.HasPrefix(a, "O_") }); i >= 0 {
			flags = c.args[i]
		}
		parent, n, name := d.find(c.retPath)
		if parent == nil || strings.HasSuffix(name, "-shm") {
			return
		}
		if n == nil && strings.Contains(flags, "O_CREAT") {
			parent.names[name] = &diskNode{mode: 0o600}
		} else if n != nil && strings.Contains(flags, "O_TRUNC") {
			n.write(diskWrite{at: -2})
		}
	case "write", "pwrite64":
		if _, n, _ := d.find(c.args[0]); n != nil && n.names == nil {
			w := diskWrite{at: -1, data: []byte(c.args[1])[:c.ret]}
			if c.name == "pwrite64" {
				w.at = number(c.args[3])
			}
			n.write(w)
		}
	case "ftruncate":
		if _, n, _ := d.find(c.args[0]); n != nil {
			n.write(diskWrite{at: -2, len: number(c.args[1])})
		}
	case "mkdirat", "mkdir":
		path := c.args[0]
		if c.name == "mkdirat" {
			path = join(c.args[0], c.args[1])
		}
		if parent, _, name := d.find(path); parent != nil {
			parent.names[name] = &diskNode{names: map[string]*diskNode{}, mode: 0o700}
		}
	case "unlinkat":
		remove(join(c.args[0], c.args[1]))
	case "unlink", "rmdir":
		remove(c.args[0])
	case "rename":
		move(c.args[0], c.args[1])
	case "renameat", "renameat2":
		move(join(c.args[0], c.args[1]), join(c.args[2], c.args[3]))
	default:
		for _, a := range c.args {
			if _, n, _ := d.find(a); n != nil && filepath.IsAbs(a) {
				t.Fatalf("the model knows no %s of %s", c.name, a)
			}
		}
	}
}

// The power goes while a station works: what was not flushed is lost, all of it or a part. strace records what the station writes
// and flushes; up to many an instant this is played into a model of a disk, what the disk would hold is put back in place, and the
// real program is started on it. Every PASS that was out by then is in the ledger, and everything goes on to agree. The keys are in a
// token, which has a memory of its own; so have the devices.
func TestPowerCut(t *testing.T) {
	if testing.Short() {
		hsmtest.Require(t, "a run without -short")
	}
	needStrace(t)
	r := newRig(t, "x509-group")
	// Programs that copy in the kernel write nothing that strace shows.
	r.write("bin/flash", rigHit+"mkdir -p \"$2\"\nfor f in \"$1\"/*; do dd if=\"$f\" of=\"$2/${f##*/}\" 2>/dev/null || exit 1; done\n")
	r.finish(r.next(2))
	if err := os.CopyFS(r.path("before"), os.DirFS(r.path("line"))); err != nil {
		t.Fatal(err)
	}
	serials := r.next(6)
	if s := r.run(serials, 0, "strace", "-f", "-y", "-xx", "-qq", "-s", "4000000", "-o", r.path("trace"), "-e", "trace="+traceCalls, "-e", "signal=none"); s.code != 0 || s.killed {
		t.Fatalf("exit code %d\n%s", s.code, s.stderr)
	}
	if err := os.Rename(r.path("device"), r.path("devices")); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(r.path("trace"))
	if err != nil {
		t.Fatal(err)
	}
	steps := slices.DeleteFunc(parseTrace(t, string(text)), func(s traceStep) bool {
		return !slices.ContainsFunc(append(s.call.args, s.call.retPath), func(a string) bool {
			return strings.HasPrefix(a, r.path("line")) || strings.HasPrefix(a, "pipe:")
		})
	})
	// The model is right: played to the end, it has what is there.
	before := func() *disk {
		d := loadDisk(t, r.path("before"))
		d.at = r.path("line")
		return d
	}
	played := before()
	for _, s := range steps {
		played.play(t, s)
	}
	sameNode(t, r.path("line"), played.root, loadDisk(t, r.path("line")).root)
	if t.Failed() {
		t.FailNow()
	}
	seed := uint64(time.Now().UnixNano())
	random := rand.New(rand.NewPCG(seed, 0))
	t.Logf("seed %d, %d steps", seed, len(steps))
	cuts := faultCount(t) / 5
	for cut := range cuts {
		end := random.IntN(len(steps))
		d := before()
		r.passed = map[string]bool{}
		for _, s := range steps[:end] {
			d.play(t, s)
			acknowledged(s, r.passed)
		}
		// The devices are as they were at the end: what was flashed later than the cut is flashed again.
		if err := errors.Join(os.RemoveAll(r.path("device")), os.CopyFS(r.path("device"), os.DirFS(r.path("devices")))); err != nil {
			t.Fatal(err)
		}
		d.crash(t, func() bool { return cut%2 == 1 && random.IntN(2) == 0 })
		touchmark(t, r.dir, "ledger", "verify", "--line", "line")
		sealed := map[string]bool{}
		for _, u := range r.units() {
			sealed[u.Serial] = u.State == "sealed"
		}
		for serial := range r.passed {
			if !sealed[serial] {
				t.Errorf("cut at %d: %s passed, and is lost", end, serial)
			}
		}
		r.finish(serials)
		r.balance()
		if t.Failed() {
			t.Fatalf("cut %d, at step %d of %d", cut, end, len(steps))
		}
	}
	t.Logf("%d cuts", cuts)
}

// sameNode holds what the model has against what is there.
func sameNode(t *testing.T, path string, have, want *diskNode) {
	t.Helper()
	if !slices.Equal(have.data, want.data) {
		t.Errorf("%s: the model has %d octets, the disk %d, or others", path, len(have.data), len(want.data))
	}
	for name := range want.names {
		if have.names[name] == nil {
			t.Errorf("%s/%s is not in the model", path, name)
			continue
		}
		sameNode(t, path+"/"+name, have.names[name], want.names[name])
	}
	for name := range have.names {
		if want.names[name] == nil {
			t.Errorf("%s/%s is in the model only", path, name)
		}
	}
}

// acknowledged collects the serials whose PASS a step put out.
func acknowledged(s traceStep, passed map[string]bool) {
	if s.call.name != "write" || !s.done || !strings.HasPrefix(s.call.args[0], "pipe:") {
		return
	}
	for line := range strings.Lines(s.call.args[1]) {
		var a station.Answer
		if json.Unmarshal([]byte(line), &a) == nil && a.Verdict != nil && a.Verdict.Pass {
			passed[a.Verdict.Serial] = true
		}
	}
}
