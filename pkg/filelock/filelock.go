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

// Lock takes the lock that stands at a path, made if need be; closing the file gives it back. The lock is the kernel's and
// goes with the process, however that ends. The error is ErrLocked, with the other's process number, while another holds it.
func Lock(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := flock(f); err != nil {
		holder := make([]byte, 32)
		n, _ := f.ReadAt(holder, 0)
		return nil, errors.Join(fmt.Errorf("%w (process %s, by %s)", ErrLocked, strings.TrimSpace(string(holder[:n])), filepath.Base(path)), f.Close())
	}
	// The process number is only for the message above.
	_ = f.Truncate(0)
	_, _ = f.WriteAt([]byte(fmt.Sprintf("%d\n", os.Getpid())), 0)
	return f, nil
}
