package stamp_test

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"github.com/touchmark/touchmark/pkg/stamp"
)

func files(content string) []stamp.File {
	return []stamp.File{{Name: "device-key.pem", Data: []byte("key " + content), Secret: true}, {Name: "provisioning.json", Data: []byte(content)}}
}

func open(t *testing.T, root string) *stamp.Files {
	t.Helper()
	f, err := stamp.OpenFiles(root, "0a1b")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

func write(t *testing.T, f *stamp.Files, device, content string) error {
	t.Helper()
	if err := f.Stage(device, files(content)...); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	return f.Publish(device)
}

func TestStamp(t *testing.T) {
	root := filepath.Join(t.TempDir(), "out")
	f := open(t, root)
	if err := write(t, f, "pump-1", "one"); err != nil {
		t.Fatal(err)
	}
	if err := f.ReadBack("pump-1", files("one")...); err != nil {
		t.Error(err)
	}
	for name, want := range map[string]fs.FileMode{"device-key.pem": 0o600, "provisioning.json": 0o644, ".": 0o700} {
		if st, err := os.Stat(filepath.Join(root, "pump-1", name)); err != nil || st.Mode().Perm() != want {
			t.Errorf("%s has mode %v, %v", name, st.Mode(), err)
		}
	}
	// Read-back finds another content, a secret that others may read, and a missing file.
	if err := f.ReadBack("pump-1", files("two")...); !errors.Is(err, stamp.ErrMismatch) {
		t.Errorf("other content: %v", err)
	}
	whole := files("one")
	for why, data := range map[string][]byte{"shorter": whole[0].Data[:len(whole[0].Data)-1], "longer": append(slices.Clone(whole[0].Data), 'x'), "empty": nil} {
		cut := files("one")
		cut[0].Data = data
		if err := f.ReadBack("pump-1", cut...); !errors.Is(err, stamp.ErrMismatch) {
			t.Errorf("meant %s: %v", why, err)
		}
	}
	if err := os.Chmod(filepath.Join(root, "pump-1", "device-key.pem"), 0o640); err != nil {
		t.Fatal(err)
	}
	if err := f.ReadBack("pump-1", files("one")...); !errors.Is(err, stamp.ErrMismatch) {
		t.Errorf("readable secret: %v", err)
	}
	if err := os.Remove(filepath.Join(root, "pump-1", "provisioning.json")); err != nil {
		t.Fatal(err)
	}
	if err := f.ReadBack("pump-1", files("one")[1]); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing file: %v", err)
	}
}

// Invariant 4: what is in place stays whole.
func TestNothingIsReplaced(t *testing.T) {
	root := t.TempDir()
	f := open(t, root)
	if err := write(t, f, "pump-1", "one"); err != nil {
		t.Fatal(err)
	}
	if err := write(t, f, "pump-1", "two"); !errors.Is(err, stamp.ErrExists) {
		t.Errorf("second stamp: %v", err)
	}
	if err := f.ReadBack("pump-1", files("one")...); err != nil {
		t.Error(err)
	}
	// A link in the staging place is not followed out of it.
	victim := filepath.Join(root, "victim")
	if err := os.WriteFile(victim, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := f.Stage("pump-2"); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(victim, filepath.Join(root, ".staged~0a1b", "pump-2", "device-key.pem")); err != nil {
		t.Fatal(err)
	}
	if err := f.Stage("pump-2", files("x")...); err == nil {
		t.Error("wrote through a link")
	}
	if b, err := os.ReadFile(victim); err != nil || string(b) != "precious" {
		t.Errorf("the link's target holds %q, %v", b, err)
	}
}

// A run that died leaves staged directories; the next one finds them by job and can finish or discard them.
func TestStagedSurvives(t *testing.T) {
	root := t.TempDir()
	f := open(t, root)
	if err := f.Stage("pump-1", files("one")[0]); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	f = open(t, root)
	if names, err := f.Staged(); err != nil || len(names) != 1 || names[0] != "pump-1" {
		t.Fatalf("staged: %v, %v", names, err)
	}
	if b, err := f.StagedFile("pump-1", "device-key.pem"); err != nil || string(b) != "key one" {
		t.Errorf("staged key: %q, %v", b, err)
	}
	if f.Published("pump-1") {
		t.Error("a staged stamp is in place")
	}
	if err := f.Discard("pump-1"); err != nil {
		t.Fatal(err)
	}
	if _, err := f.StagedFile("pump-1", "device-key.pem"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after Discard: %v", err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if entries, err := os.ReadDir(root); err != nil || len(entries) != 0 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

// A stamp that a run before staged is made whole without ever cutting off the only copy of its key: an earlier version
// truncated the file and lost the key to a kill before the write.
func TestReplace(t *testing.T) {
	root := filepath.Join(t.TempDir(), "out")
	f := open(t, root)
	if err := f.Stage("pump-1", files("one")...); err != nil {
		t.Fatal(err)
	}
	staged := filepath.Join(root, ".staged~0a1b", "pump-1")
	for _, name := range []string{"provisioning.json~", "old.toml"} {
		if err := os.WriteFile(filepath.Join(staged, name), []byte("half"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	inode := func(name string) (uint64, *os.File) {
		h, err := os.Open(filepath.Join(staged, name))
		if err != nil {
			t.Fatal(err)
		}
		st, err := h.Stat()
		if err != nil {
			t.Fatal(err)
		}
		return st.Sys().(*syscall.Stat_t).Ino, h
	}
	keyBefore, h := inode("device-key.pem")
	h.Close()
	_, document := inode("provisioning.json")
	defer document.Close()
	want := files("one")
	want[1].Data = []byte("another endpoint")
	if err := f.Replace("pump-1", want...); err != nil {
		t.Fatal(err)
	}
	if keyAfter, h := inode("device-key.pem"); keyAfter != keyBefore {
		t.Error("a key that was right was written again")
	} else {
		h.Close()
	}
	if b, err := io.ReadAll(document); err != nil || string(b) != "one" {
		t.Errorf("the file that was there before holds %q, %v: it was written over in place", b, err)
	}
	entries, err := os.ReadDir(staged)
	if err != nil || len(entries) != 2 {
		t.Errorf("%v, %v: want the two files and nothing else", entries, err)
	}
	if err := f.Publish("pump-1"); err != nil {
		t.Fatal(err)
	}
	if err := f.ReadBack("pump-1", want...); err != nil {
		t.Error(err)
	}
}
