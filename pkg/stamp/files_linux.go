package stamp

import (
	"os"

	"golang.org/x/sys/unix"
)

// syncfs flushes the file system that dir is on. Linux reports a write-back error once to every open description, so dir
// is opened before the first write.
func syncfs(dir *os.File) error { return unix.Syncfs(int(dir.Fd())) }

func renameNoReplace(fromDir int, from string, toDir int, to string) error {
	err := unix.Renameat2(fromDir, from, toDir, to, unix.RENAME_NOREPLACE)
	if err == unix.EINVAL || err == unix.ENOSYS {
		// File systems without the flag. A directory replaces only an empty one, and a stamp never is.
		return unix.Renameat(fromDir, from, toDir, to)
	}
	return err
}
