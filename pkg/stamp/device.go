package stamp

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/touchmark/touchmark/pkg/stamp/raw"
)

// ErrBusy says that somebody else uses the device storage.
var ErrBusy = errors.New("device storage is in use")

// OpenDevice opens storage that is written in place: a block device, the node of an EEPROM or another character device, or an
// image file. It must be there, with at least need octets where it says how many it has. While it is open nobody else opens it
// so, and a block device that the system uses, because it is mounted for instance, is ErrBusy.
func OpenDevice(path string, need int64) (_ *os.File, err error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("opening the device storage: %w", err)
	}
	flags := os.O_RDWR
	switch info.Mode().Type() {
	case 0, fs.ModeDevice | fs.ModeCharDevice:
	case fs.ModeDevice:
		flags |= os.O_EXCL // open(2): without O_CREAT, a block device in use is EBUSY
	default:
		return nil, fmt.Errorf("%s is no device, and no file", path)
	}
	f, err := os.OpenFile(path, flags, 0)
	if errors.Is(err, unix.EBUSY) {
		return nil, fmt.Errorf("%w: %w", ErrBusy, err)
	}
	if err != nil {
		return nil, fmt.Errorf("opening the device storage: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close())
		}
	}()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, fmt.Errorf("%w: locking %s: %w", ErrBusy, path, err)
	}
	size := need
	switch {
	case info.Mode().IsRegular():
		size = info.Size()
	case flags&os.O_EXCL != 0:
		if size, err = f.Seek(0, io.SeekEnd); err != nil {
			return nil, fmt.Errorf("asking %s for its size: %w", path, err)
		}
	}
	if size < need {
		return nil, fmt.Errorf("%s has %d octets, and the stamp goes up to %d: %w", path, size, need, ErrFull)
	}
	return f, nil
}

// ToDevice writes data to storage in place, at an offset, and reads it back through a fresh open. The first page is blanked before
// the rest is written, and written last: a write that is cut off leaves nothing that begins like an image. It may be repeated.
func ToDevice(path string, offset int64, data []byte) error {
	head := min(len(data), 4096)
	return inPlace(path, offset, int64(len(data)), func(f *os.File) error {
		for _, part := range []struct {
			data []byte
			at   int
		}{{bytes.Repeat([]byte{0xff}, head), 0}, {data[head:], head}, {data[:head], 0}} {
			if _, err := f.WriteAt(part.data, offset+int64(part.at)); err != nil {
				return full(err)
			}
			// A device file without a cache says EINVAL: fsync(2).
			if err := f.Sync(); err != nil && !errors.Is(err, unix.EINVAL) {
				return full(err)
			}
		}
		return nil
	}, func(f *os.File) error {
		back := make([]byte, len(data))
		defer clear(back)
		if _, err := f.ReadAt(back, offset); err != nil {
			return err
		}
		if !bytes.Equal(back, data) {
			return ErrMismatch
		}
		return nil
	})
}

// ToSlots writes records to storage in place, over the older of its two copies, and reads them back through a fresh open; they
// come in the order of their types. Nothing of what was there before is left once it returns, and whenever it is cut off, the copy
// from before or this one is whole. It may be repeated.
func ToSlots(path string, slots raw.Slots, records []raw.Record) error {
	return inPlace(path, slots.Offset, 2*int64(slots.Size), func(f *os.File) error {
		before := make([]byte, 2*slots.Size)
		if _, err := f.ReadAt(before, slots.Offset); err != nil {
			return err
		}
		_, err := raw.Write(f, slots, records)
		if used := bytes.Trim(before, "\x00\xff"); err == nil && len(used) > 0 {
			_, err = raw.Write(f, slots, records) // another device's key may be in the other slot
		}
		return err
	}, func(f *os.File) error {
		_, back, err := raw.Read(f, slots)
		if err == nil && !slices.EqualFunc(back, records, func(a, b raw.Record) bool { return a.Type == b.Type && bytes.Equal(a.Value, b.Value) }) {
			err = ErrMismatch
		}
		return err
	})
}

// inPlace opens storage to write, and once more to read.
func inPlace(path string, offset, octets int64, write, read func(*os.File) error) error {
	for _, step := range []struct {
		doing string
		do    func(*os.File) error
	}{{"writing", write}, {"reading back", read}} {
		f, err := OpenDevice(path, offset+octets)
		if err != nil {
			return err
		}
		// What is read comes from the medium, where the system has a cache of it.
		_ = unix.Fadvise(int(f.Fd()), offset, octets, unix.FADV_DONTNEED)
		if err := errors.Join(step.do(f), f.Close()); err != nil {
			return fmt.Errorf("%s %s: %w", step.doing, path, err)
		}
	}
	return nil
}
