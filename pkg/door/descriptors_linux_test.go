package door_test

import (
	"log/slog"
	"syscall"
	"testing"

	"github.com/touchmark/touchmark/pkg/door"
)

// When the process has no file descriptor left the door says so, waits, and goes on when there is one.
func TestNoDescriptors(t *testing.T) {
	var said lines
	r := open(t, door.Config{Log: slog.New(slog.NewTextHandler(&said, nil))}, nil)
	served := r.over(r.raw(t, ""))
	say(t, served, "in")
	var before syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &before); err != nil {
		t.Fatal(err)
	}
	few := before
	few.Cur = 200
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &few); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = syscall.Setrlimit(syscall.RLIMIT_NOFILE, &before) }()
	var held []int
	for {
		fd, err := syscall.Open("/dev/null", syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
		if err != nil {
			break
		}
		held = append(held, fd)
	}
	_ = syscall.Close(held[0]) // the client's
	c := r.over(r.raw(t, ""))
	said.await(t, "accepting")
	say(t, served, "still served")
	for _, fd := range held[1:] {
		_ = syscall.Close(fd)
	}
	say(t, c, "in at last")
}
