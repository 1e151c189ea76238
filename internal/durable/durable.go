// Package durable reads and writes small files that are there whole or not at all: keys, assignments, news that waits.
package durable

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// ErrTooLarge says that a file is larger than it may be.
var ErrTooLarge = errors.New("file is too large")

// Read reads a file of at most that many octets. The error is ErrTooLarge for a larger one.
func Read(path string, most int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, most+1))
	if err == nil && int64(len(b)) > most {
		err = fmt.Errorf("%w: %s has more than %d octets", ErrTooLarge, path, most)
	}
	return b, err
}

// WriteNew writes a file of mode 0600 that must not be there yet. It is flushed before it gets its name, the name is given by
// a link, which never replaces, and the directory is flushed: after a crash the file is there whole or not at all. The error
// is fs.ErrExist when the name is taken.
func WriteNew(dir, name string, data []byte) (err error) {
	return write(filepath.Join(dir, name), data, 0o600, os.Link)
}

// Replace writes a file, over what has its name if need be. It is flushed before it is renamed, and the directory is flushed:
// after a crash the old content is there whole, or the new. Files beside it whose names begin with [Unfinished] are what a crash
// left.
func Replace(path string, data []byte, mode fs.FileMode) error {
	return write(path, data, mode, os.Rename)
}

// Unfinished is how the names of files begin that are being written.
const Unfinished = ".new-"

func write(path string, data []byte, mode fs.FileMode, name func(from, to string) error) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), Unfinished+"*") // mode 0600
	if err != nil {
		return err
	}
	defer func() {
		if rmErr := os.Remove(f.Name()); !errors.Is(rmErr, fs.ErrNotExist) {
			err = errors.Join(err, rmErr)
		}
	}()
	_, werr := f.Write(data)
	if err := errors.Join(werr, f.Chmod(mode), f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := name(f.Name(), path); err != nil {
		return err
	}
	return SyncDir(filepath.Dir(path))
}

// SyncDir flushes a directory: names in it that were given, or taken away, stay so.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
