// Package filelock keeps two processes from working on the same files.
package filelock

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
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

// ownTries is how often a lock that this process itself held last is tried again, at ten milliseconds.
const ownTries = 50

// Lock takes the lock that stands at a path, made if need be; closing the file gives it back. The lock is the kernel's and
// goes with the process, however that ends. The error is a *LockedError while another holds it.
func Lock(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	for try := 0; flock(f) != nil; try++ {
		holder := make([]byte, 32)
		n, _ := f.ReadAt(holder, 0)
		process := strings.TrimSpace(string(holder[:n]))
		// A program that this process is just starting has a copy of the old lock until it runs: a moment, and the lock is free.
		if process != strconv.Itoa(os.Getpid()) || try == ownTries {
			return nil, errors.Join(&LockedError{process, filepath.Base(path)}, f.Close())
		}
		time.Sleep(10 * time.Millisecond)
	}
	// The process number is only for the message above.
	_ = f.Truncate(0)
	_, _ = f.WriteAt([]byte(fmt.Sprintf("%d\n", os.Getpid())), 0)
	return f, nil
}
