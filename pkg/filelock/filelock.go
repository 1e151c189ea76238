// Package filelock keeps two processes from working on the same files.
package filelock

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// ErrLocked says that another process holds the lock.
var ErrLocked = errors.New("in use by another process")

// A LockedError says who holds a lock. It is an ErrLocked.
type LockedError struct {
	Process string // its number
	By      string // the lock's file
}

// Error says who holds what.
func (e *LockedError) Error() string {
	return fmt.Sprintf("%v (process %s, by %s)", ErrLocked, e.Process, e.By)
}

// Unwrap returns ErrLocked.
func (e *LockedError) Unwrap() error { return ErrLocked }

// Lock takes the lock that stands at a path, made if need be; Unlock gives it back. The lock is the kernel's and
// goes with the process, however that ends. The error is a *LockedError while another holds it.
func Lock(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := flock(f); err != nil {
		holder := make([]byte, 32)
		n, _ := f.ReadAt(holder, 0)
		return nil, errors.Join(&LockedError{strings.TrimSpace(string(holder[:n])), filepath.Base(path)}, f.Close())
	}
	// The process number is only for the message above.
	_ = f.Truncate(0)
	_, _ = f.WriteAt([]byte(fmt.Sprintf("%d\n", os.Getpid())), 0)
	return f, nil
}

// Unlock gives a lock back, and closes its file. Closing alone would leave the lock to a program that is being started at this
// moment, until it runs.
func Unlock(f *os.File) error { return errors.Join(funlock(f), f.Close()) }
