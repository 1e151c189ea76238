package stamp_test

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/touchmark/touchmark/hsm/hsmtest"
	"github.com/touchmark/touchmark/pkg/stamp"
	"github.com/touchmark/touchmark/pkg/stamp/raw"
)

func newStorage(t *testing.T, size int) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "storage")
	if err := os.WriteFile(path, bytes.Repeat([]byte{0xa5}, size), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// loop makes a block device of a file, which may be mounted.
func loop(t *testing.T, path string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		hsmtest.Require(t, "the right to make a loop device (root)")
	}
	out, err := exec.Command("losetup", "--find", "--show", path).CombinedOutput()
	if err != nil {
		hsmtest.Require(t, "loop devices: "+strings.TrimSpace(string(out)))
	}
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if err := exec.Command("losetup", "--detach", dev).Run(); err != nil {
			t.Errorf("detaching %s: %v", dev, err)
		}
	})
	return dev
}

func TestToDevice(t *testing.T) {
	for _, size := range []int{1, 512, 4096, 4097, 100_000} {
		path := newStorage(t, 200_000)
		data := bytes.Repeat([]byte("image"), size)[:size]
		for range 2 { // the second time over itself
			if err := stamp.ToDevice(path, 5000, data); err != nil {
				t.Fatal(err)
			}
			b, err := os.ReadFile(path)
			if err != nil || len(b) != 200_000 || !bytes.Equal(b[5000:5000+size], data) {
				t.Fatalf("%d octets: %v", size, err)
			}
			if rest := append(b[:5000:5000], b[5000+size:]...); len(bytes.Trim(rest, "\xa5")) > 0 {
				t.Errorf("%d octets: something beside them changed", size)
			}
		}
	}
}

// A block device is written like a file, but not one that is mounted.
func TestBlockDevice(t *testing.T) {
	dev := loop(t, newStorage(t, 2<<20))
	data := bytes.Repeat([]byte("image"), 1000)
	if err := stamp.ToDevice(dev, 1<<20, data); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(dev)
	if err != nil || !bytes.Equal(b[1<<20:1<<20+len(data)], data) {
		t.Errorf("written: %v", err)
	}
	if err := stamp.ToDevice(dev, 2<<20-4095, make([]byte, 4096)); !errors.Is(err, stamp.ErrFull) {
		t.Errorf("beyond its end: %v", err)
	}
	if out, err := exec.Command("mkfs.ext4", "-q", dev).CombinedOutput(); err != nil {
		hsmtest.Require(t, "mkfs.ext4 (apt-get install e2fsprogs): "+string(out))
	}
	dir := t.TempDir()
	if err := syscall.Mount(dev, dir, "ext4", syscall.MS_RDONLY, ""); err != nil {
		hsmtest.Require(t, "the right to mount a disk: "+err.Error())
	}
	err = stamp.ToDevice(dev, 0, data)
	if err := syscall.Unmount(dir, 0); err != nil {
		t.Error(err)
	}
	if !errors.Is(err, stamp.ErrBusy) {
		t.Errorf("mounted: %v", err)
	}
}

// A write that fails in the middle leaves nothing that begins like an image, and can be repeated.
func TestDeviceCutOff(t *testing.T) {
	if os.Geteuid() != 0 {
		hsmtest.Require(t, "the right to mount a small file system (root)")
	}
	small := t.TempDir()
	if err := syscall.Mount("tmpfs", small, "tmpfs", 0, "size=64k"); err != nil {
		hsmtest.Require(t, "the right to mount a small file system: "+err.Error())
	}
	t.Cleanup(func() { _ = syscall.Unmount(small, syscall.MNT_DETACH) })
	path, hog := filepath.Join(small, "storage"), filepath.Join(small, "hog")
	if err := os.WriteFile(path, []byte("the image from before"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, 32<<10); err != nil { // with a hole
		t.Fatal(err)
	}
	if err := os.WriteFile(hog, make([]byte, 48<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	data := bytes.Repeat([]byte("image"), 6000)
	if err := stamp.ToDevice(path, 0, data); !errors.Is(err, stamp.ErrFull) {
		t.Errorf("with no room: %v", err)
	}
	if b, err := os.ReadFile(path); err != nil || len(bytes.Trim(b[:4096], "\xff")) > 0 {
		t.Errorf("it begins with %q, %v", b[:32], err)
	}
	if err := os.Remove(hog); err != nil {
		t.Fatal(err)
	}
	if err := stamp.ToDevice(path, 0, data); err != nil {
		t.Errorf("with room: %v", err)
	}
}

func TestDeviceRefused(t *testing.T) {
	path := newStorage(t, 100)
	dir := filepath.Dir(path)
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		path string
		want error
	}{"not there": {path + "x", fs.ErrNotExist}, "too small": {path, stamp.ErrFull}, "pipe": {fifo, nil}, "directory": {dir, nil}, "forgets": {"/dev/null", nil}} {
		if err := stamp.ToDevice(c.path, 0, make([]byte, 101)); err == nil || c.want != nil && !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	f, err := stamp.OpenDevice(path, 100)
	if err != nil {
		t.Fatal(err)
	}
	if err := stamp.ToDevice(path, 0, make([]byte, 100)); !errors.Is(err, stamp.ErrBusy) {
		t.Errorf("while another has it: %v", err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// Whatever the two slots held, nothing of it is left: not the newer one, not the older, not one that was cut off.
func TestToSlots(t *testing.T) {
	slots := raw.Slots{Offset: 64, Size: 512, Page: 64}
	old := []raw.Record{{Type: raw.FirstUser, Value: []byte("the secret of the one before")}}
	records := []raw.Record{{Type: raw.Serial, Value: []byte("SN1")}, {Type: raw.FirstUser, Value: []byte("new")}}
	for name, before := range map[string][][]raw.Record{"erased": nil, "one": {old}, "two": {old, old}, "over itself": {old, records}, "again": {records, records}} {
		path := newStorage(t, 2000)
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt(bytes.Repeat([]byte{0xff}, 1024), 64); err != nil {
			t.Fatal(err)
		}
		for _, b := range before {
			if _, err := raw.Write(f, slots, b); err != nil {
				t.Fatal(err)
			}
		}
		if name == "one" { // its magic was never written
			if _, err := f.WriteAt(make([]byte, 4), 64); err != nil {
				t.Fatal(err)
			}
		}
		if err := stamp.ToSlots(path, slots, records); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if _, back, err := raw.Read(f, slots); err != nil || len(back) != 2 || string(back[1].Value) != "new" {
			t.Errorf("%s: %v, %v", name, back, err)
		}
		b, err := os.ReadFile(path)
		if err != nil || bytes.Contains(b, []byte("secret")) || len(bytes.Trim(b[:64], "\xa5")) > 0 || len(bytes.Trim(b[64+1024:], "\xa5")) > 0 {
			t.Errorf("%s: %q, %v", name, b, err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
