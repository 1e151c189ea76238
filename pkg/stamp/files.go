// Package stamp puts an identity into device storage and reads it back.
//
// A stamp target is a kind of device storage. [Files] is the one that every other builds on: a directory per device,
// which an image builder, a mounted file system or a fixture takes from there. A stamp is there whole or not at all.
//
// Work goes in groups, because a flush to disk costs the same for one device as for hundreds:
//
//	Stage      write files into a hidden place; nothing is promised yet
//	Sync       one flush of the file system makes everything staged durable
//	Publish    one rename per device puts its directory in place
//	Sync       and makes the renames durable
//	ReadBack   compares what is in place with what was meant
//
// A crash before Publish leaves staged directories that a later run finds ([Files.StagedFile]) or throws away
// ([Files.Discard]); after it, whole ones. The methods may be called by many goroutines for different devices.
package stamp

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

// Errors that callers branch on.
var (
	// ErrExists says that a stamp which was not staged here is in the way.
	ErrExists = errors.New("stamp exists already")
	// ErrFull says that the storage has no room left. What was published before is whole.
	ErrFull = errors.New("no space left on the device storage")
	// ErrMismatch says that what was read back is not what was written.
	ErrMismatch = errors.New("stamp reads back differently")
)

// A File is one file of a stamp.
type File struct {
	// Name is the file's name in the device's directory: no separators.
	Name string
	// Data is all of it.
	Data []byte
	// Secret files have mode 0600, others 0644.
	Secret bool
}

func (f *File) mode() uint32 {
	if f.Secret {
		return 0o600
	}
	return 0o644
}

// maxFile bounds what is read back.
const maxFile = 1 << 20

// Files is a stamp target: a directory per device under one root.
type Files struct {
	root    string
	hidden  string // the staging directory's name
	rootDir *os.File
	stage   *os.File
	syncer  syncer
}

// OpenFiles opens, or makes, the directory that stamps go to. The job names the staging place, so that a run finds what
// its own predecessor left and nobody else's: lower-case letters and digits.
func OpenFiles(root, job string) (*Files, error) {
	if err := os.MkdirAll(root, 0o755); err != nil {
		return nil, fmt.Errorf("making the stamp directory: %w", err)
	}
	// "~" is in no registration ID, so no device's directory can have this name.
	f := &Files{root: root, hidden: ".staged~" + job}
	if err := os.Mkdir(filepath.Join(root, f.hidden), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("making the staging directory: %w", full(err))
	}
	var err error
	if f.rootDir, err = os.Open(root); err != nil {
		return nil, err
	}
	if f.stage, err = os.Open(filepath.Join(root, f.hidden)); err != nil {
		return nil, errors.Join(err, f.rootDir.Close())
	}
	f.syncer.dir = f.rootDir
	return f, nil
}

// Close removes the staging directory when it is empty and closes the target.
func (f *Files) Close() error {
	err := f.stage.Close()
	// Not empty means that a stamp is still staged: it stays for the next run.
	if rmErr := os.Remove(filepath.Join(f.root, f.hidden)); rmErr != nil && !errors.Is(rmErr, unix.ENOTEMPTY) && !errors.Is(rmErr, fs.ErrNotExist) {
		err = errors.Join(err, rmErr)
	}
	return errors.Join(err, f.rootDir.Close())
}

// StagedDir returns the path of a device's staged directory.
func (f *Files) StagedDir(device string) string { return filepath.Join(f.root, f.hidden, device) }

// Dir returns the path of a device's directory.
func (f *Files) Dir(device string) string { return filepath.Join(f.root, device) }

// Free returns how many octets are free on the file system that a path is on, and how many more files it can hold; 0
// where it does not count them.
func Free(path string) (octets, files uint64, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return 0, 0, fmt.Errorf("asking %s for its free space: %w", path, err)
	}
	return uint64(st.Bavail) * uint64(st.Bsize), st.Ffree, nil
}

// Stage writes files into the device's staged directory. What stands there already is not kept: see Replace.
func (f *Files) Stage(device string, files ...File) error {
	dir := int(f.stage.Fd())
	if err := unix.Mkdirat(dir, device, 0o700); err != nil && err != unix.EEXIST {
		return f.fail("making the staged directory", device, err)
	}
	for i := range files {
		if err := writeAt(dir, device+"/"+files[i].Name, &files[i], false); err != nil {
			return f.fail("writing "+files[i].Name, device, err)
		}
	}
	return nil
}

func writeAt(dir int, name string, file *File, flush bool) (err error) {
	fd, err := unix.Openat(dir, name, unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC|unix.O_CLOEXEC|unix.O_NOFOLLOW, file.mode())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unix.Close(fd)) }()
	for b := file.Data; len(b) > 0; {
		n, err := unix.Write(fd, b)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		b = b[n:]
	}
	if flush {
		return unix.Fsync(fd)
	}
	return nil
}

// Replace makes the staged directory of a device hold these files and nothing else, whatever a run before left there. What
// is as it should be is not touched, the rest is written beside its name, flushed, and renamed over it: a file may hold the
// only copy of a key, and is whole at every instant.
func (f *Files) Replace(device string, files ...File) error {
	if err := f.Stage(device); err != nil {
		return err
	}
	dir := int(f.stage.Fd())
	keep := make(map[string]bool, len(files))
	for i := range files {
		name := device + "/" + files[i].Name
		keep[files[i].Name] = true
		mode, same, err := compareAt(dir, name, &files[i], make([]byte, len(files[i].Data)+1))
		if err == nil && same && (!files[i].Secret || mode == files[i].mode()) {
			continue
		}
		beside := name + "~" // in no file's name
		if err = writeAt(dir, beside, &files[i], true); err == nil {
			err = unix.Renameat(dir, beside, dir, name)
		}
		if err != nil {
			return f.fail("writing "+files[i].Name, device, err)
		}
	}
	path := filepath.Join(f.root, f.hidden, device)
	entries, err := os.ReadDir(path)
	if err != nil {
		return f.fail("reading the staged directory", device, err)
	}
	for _, e := range entries {
		if !keep[e.Name()] {
			if err := os.RemoveAll(filepath.Join(path, e.Name())); err != nil {
				return f.fail("clearing the staged directory", device, err)
			}
		}
	}
	return nil
}

// StagedFile reads a file of a staged directory; the error is fs.ErrNotExist when there is none.
func (f *Files) StagedFile(device, name string) ([]byte, error) {
	return readAt(int(f.stage.Fd()), device+"/"+name)
}

// PublishedFile reads a file of a device's directory; the error is fs.ErrNotExist when there is none.
func (f *Files) PublishedFile(device, name string) ([]byte, error) {
	return readAt(int(f.rootDir.Fd()), device+"/"+name)
}

// readAt reads a regular file.
func readAt(dir int, name string) (_ []byte, err error) {
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: err}
	}
	f := os.NewFile(uintptr(fd), name)
	defer func() { err = errors.Join(err, f.Close()) }()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() || info.Size() > maxFile {
		return nil, errors.Join(fmt.Errorf("%s is not a regular file of at most %d octets", name, maxFile), err)
	}
	return io.ReadAll(io.LimitReader(f, maxFile))
}

// Staged names the devices with a staged directory.
func (f *Files) Staged() ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(f.root, f.hidden))
	if err != nil {
		return nil, err
	}
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = e.Name()
	}
	return names, nil
}

// Discard removes a staged directory. A device that has none is no error.
func (f *Files) Discard(device string) error {
	return os.RemoveAll(filepath.Join(f.root, f.hidden, device))
}

// Remove takes a device's directory away: renamed out of sight first, so that it is never there in part. One that is not there is
// no error.
func (f *Files) Remove(device string) error {
	if err := f.Discard(device); err != nil {
		return err
	}
	err := renameNoReplace(int(f.rootDir.Fd()), device, int(f.stage.Fd()), device)
	if err == unix.ENOENT {
		return nil
	}
	if err != nil {
		return f.fail("taking away", device, err)
	}
	return f.Discard(device)
}

// Sync makes everything staged and published so far durable. Callers that come while a flush is under way share the
// next one.
func (f *Files) Sync() error { return full(f.syncer.sync()) }

// Publish moves a staged directory into place. The rename is atomic, and it never replaces: a directory in the way is
// ErrExists.
func (f *Files) Publish(device string) error {
	err := renameNoReplace(int(f.stage.Fd()), device, int(f.rootDir.Fd()), device)
	if err == unix.EEXIST || err == unix.ENOTEMPTY {
		return fmt.Errorf("stamping %s: %w: %s", device, ErrExists, f.Dir(device))
	}
	if err != nil {
		return f.fail("publishing", device, err)
	}
	return nil
}

// Published reports whether a device's directory is in place.
func (f *Files) Published(device string) bool {
	var st unix.Stat_t
	return unix.Fstatat(int(f.rootDir.Fd()), device, &st, unix.AT_SYMLINK_NOFOLLOW) == nil
}

var readBuffers = sync.Pool{New: func() any { b := make([]byte, 8<<10); return &b }}

// ReadBack compares a published directory with what was meant to be in it: content, and the mode of secret files.
func (f *Files) ReadBack(device string, files ...File) error {
	buf := readBuffers.Get().(*[]byte)
	defer readBuffers.Put(buf)
	for i := range files {
		if need := len(files[i].Data) + 1; len(*buf) < need {
			*buf = make([]byte, need)
		}
		mode, same, err := compareAt(int(f.rootDir.Fd()), device+"/"+files[i].Name, &files[i], *buf)
		if err != nil {
			return fmt.Errorf("reading back the stamp of %s: %w", device, err)
		}
		if !same {
			return fmt.Errorf("%s of %s: %w", files[i].Name, device, ErrMismatch)
		}
		if files[i].Secret && mode != 0o600 {
			return fmt.Errorf("%s of %s has mode %04o, not 0600: %w", files[i].Name, device, mode, ErrMismatch)
		}
	}
	clear(*buf) // it held a private key
	return nil
}

// compareAt reports whether a file holds just what was meant to be in it, and the permission bits of a secret one. It reads
// one octet more than that at most, into buf.
func compareAt(dir int, name string, want *File, buf []byte) (mode uint32, same bool, err error) {
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return 0, false, &fs.PathError{Op: "open", Path: name, Err: err}
	}
	defer func() { err = errors.Join(err, unix.Close(fd)) }()
	if want.Secret {
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			return 0, false, &fs.PathError{Op: "stat", Path: name, Err: err}
		}
		mode = st.Mode & 0o777
	}
	buf = buf[:len(want.Data)+1]
	got := 0
	for got < len(buf) {
		n, err := unix.Read(fd, buf[got:])
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return mode, false, &fs.PathError{Op: "read", Path: name, Err: err}
		}
		got += n
		if n == 0 || got == len(want.Data) {
			// A regular file whose end was asked for and not given has none beyond: read would have gone on to fill buf.
			break
		}
	}
	return mode, bytes.Equal(buf[:got], want.Data), nil
}

func (f *Files) fail(doing, device string, err error) error {
	return fmt.Errorf("stamping %s: %s: %w", device, doing, full(err))
}

func full(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("%w: %w", ErrFull, err)
	}
	return err
}

// A syncer flushes one file system for many callers: whoever asks while a flush runs waits for the one after it, because
// what it wrote may have come too late for the running one.
type syncer struct {
	dir     *os.File
	mu      sync.Mutex
	next    *flush
	running bool
}

type flush struct {
	done chan struct{}
	err  error
}

func (s *syncer) sync() error {
	s.mu.Lock()
	mine := s.next
	if mine == nil {
		mine = &flush{done: make(chan struct{})}
		s.next = mine
	}
	if s.running {
		s.mu.Unlock()
		<-mine.done
		return mine.err
	}
	s.running = true
	for s.next != nil {
		now := s.next
		s.next = nil
		s.mu.Unlock()
		now.err = syncfs(s.dir)
		close(now.done)
		s.mu.Lock()
	}
	s.running = false
	s.mu.Unlock()
	return mine.err
}
