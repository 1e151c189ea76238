package fat_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/touchmark/touchmark/hsm/hsmtest"
	"github.com/touchmark/touchmark/pkg/stamp/fat"
)

func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*7 + i>>8)
	}
	return b
}

// What a stamp is made of, and names that are hard: hidden, without a short form, alike in their first characters, of just one
// entry of a long name, the longest.
var stampFiles = []fat.File{
	{Name: "device-key.pem", Data: pattern(241)},
	{Name: "device-chain.pem", Data: pattern(2500)},
	{Name: "provisioning.json", Data: []byte("{}\n")},
	{Name: "CONFIG.TXT", Data: pattern(512)},
	{Name: ".env", Data: []byte("A=1\n")},
	{Name: "config.toml", Data: pattern(4096)},
	{Name: "config.tomb", Data: pattern(4097)},
	{Name: "empty", Data: nil},
	{Name: "thirteen.char", Data: pattern(1)},
	{Name: "certs/root ca+1.pem", Data: pattern(9000)},
	{Name: "certs/deep/er/x", Data: pattern(3)},
	{Name: strings.Repeat("n", 251) + ".txt", Data: pattern(7)},
}

func parse(t *testing.T, image []byte) *fat.Contents {
	t.Helper()
	c, err := fat.Parse(image)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func same(t *testing.T, got, want []fat.File) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("%d files, want %d", len(got), len(want))
	}
	for i := range want {
		if got[i].Name != want[i].Name || !bytes.Equal(got[i].Data, want[i].Data) {
			t.Errorf("file %d is %q with %d octets, want %q with %d", i, got[i].Name, len(got[i].Data), want[i].Name, len(want[i].Data))
		}
	}
}

func tool(t *testing.T, name, pkg string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil && !strings.Contains(name, "/") {
		path, err = exec.LookPath("/usr/sbin/" + name)
	}
	if err != nil {
		hsmtest.Require(t, name+" (apt-get install "+pkg+")")
	}
	return path
}

func run(t *testing.T, name string, args ...string) []byte {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return out
}

// volumes are the sizes around every border: the smallest of a type, the largest cluster count before clusters grow, and what
// is usual.
var volumes = []struct {
	volume fat.Volume
	want   fat.Type
}{
	{fat.Volume{Size: 64 << 10}, fat.FAT12},
	{fat.Volume{Size: 1474560, Label: "TOUCHMARK", ID: 0x1234abcd}, fat.FAT12},
	{fat.Volume{Size: 4 << 20}, fat.FAT12},
	{fat.Volume{Size: 8 << 20, Label: "A LABEL-1_2"}, fat.FAT12},
	{fat.Volume{Size: 32 << 20, Type: fat.FAT12}, fat.FAT12},
	{fat.Volume{Size: 1 << 20, SectorSize: 4096}, fat.FAT12},
	{fat.Volume{Size: 8<<20 + 512}, fat.FAT16},
	{fat.Volume{Size: 2130432, Type: fat.FAT16}, fat.FAT16},
	{fat.Volume{Size: 16 << 20, Label: "STAMP"}, fat.FAT16},
	{fat.Volume{Size: 33 << 20}, fat.FAT16},
	{fat.Volume{Size: 64 << 20, SectorSize: 2048}, fat.FAT16},
	{fat.Volume{Size: 34 << 20, Type: fat.FAT32, Label: "STAMP", ID: 7}, fat.FAT32},
	{fat.Volume{Size: 64 << 20, Type: fat.FAT32, Time: time.Date(2031, 5, 6, 7, 8, 10, 0, time.UTC)}, fat.FAT32},
	{fat.Volume{Size: 300 << 20, Type: fat.FAT32, SectorSize: 4096}, fat.FAT32},
}

// What we build, dosfstools finds no fault with, and mtools reads.
func TestDosfstoolsAndMtools(t *testing.T) {
	fsck, mdir, mcopy := tool(t, "fsck.fat", "dosfstools"), tool(t, "mdir", "mtools"), tool(t, "mcopy", "mtools")
	for _, c := range volumes {
		v := c.volume
		t.Run(fmt.Sprintf("%v-%d-%d", c.want, v.Size, v.SectorSize), func(t *testing.T) {
			image, err := v.Build(stampFiles)
			if err != nil {
				t.Fatal(err)
			}
			got := parse(t, image)
			if got.Type != c.want || got.Label != v.Label || got.ID != v.ID {
				t.Errorf("reads as %v %q %08x", got.Type, got.Label, got.ID)
			}
			// Folders come where their first file stood, files in order.
			same(t, got.Files, stampFiles)
			again, err := v.Build(stampFiles)
			if err != nil || !bytes.Equal(again, image) {
				t.Errorf("built twice, differs: %v", err)
			}
			path := filepath.Join(t.TempDir(), "image")
			if err := os.WriteFile(path, image, 0o600); err != nil {
				t.Fatal(err)
			}
			out := string(run(t, fsck, "-n", "-v", path))
			for _, complaint := range []string{"Reclaimed", "should be", "differ", "Bad", "Leaving"} {
				if strings.Contains(out, complaint) {
					t.Errorf("fsck.fat:\n%s", out)
				}
			}
			if !strings.Contains(out, fmt.Sprintf("FATs, %d bit entries", int(c.want))) {
				t.Errorf("fsck.fat does not say FAT%d:\n%s", c.want, out)
			}
			listing := string(run(t, mdir, "-i", path, "-a", "-/", "::"))
			for _, want := range append([]string{v.Label}, "device-key.pem", "root ca+1.pem", ".env") {
				if !strings.Contains(listing, want) {
					t.Errorf("mdir does not show %q:\n%s", want, listing)
				}
			}
			if day := map[bool]string{true: "1980-01-01", false: "2031-05-06"}[v.Time.IsZero()]; !strings.Contains(listing, day) {
				t.Errorf("mdir shows another time:\n%s", listing)
			}
			for _, f := range stampFiles {
				if b := run(t, mcopy, "-i", path, "::"+f.Name, "-"); !bytes.Equal(b, f.Data) {
					t.Errorf("mcopy reads %d other octets from %s", len(b), f.Name)
				}
			}
		})
	}
}

// What the usual formatters write, and change, we read.
func TestReadsOthers(t *testing.T) {
	mkfs, mcopy, mmd, mdel := tool(t, "mkfs.fat", "dosfstools"), tool(t, "mcopy", "mtools"), tool(t, "mmd", "mtools"), tool(t, "mdel", "mtools")
	for _, c := range []struct{ kib, bits string }{{"1440", "12"}, {"16384", "16"}, {"40960", "32"}} {
		dir := t.TempDir()
		path := filepath.Join(dir, "image")
		run(t, mkfs, "-C", "-F", c.bits, "-n", "OTHERS", "-i", "cafe0001", path, c.kib)
		run(t, mmd, "-i", path, "::certs", "::certs/deep", "::certs/deep/er")
		for _, f := range append([]fat.File{{Name: "removed-later.txt", Data: pattern(5000)}}, stampFiles...) {
			file := filepath.Join(dir, "file")
			if err := os.WriteFile(file, f.Data, 0o600); err != nil {
				t.Fatal(err)
			}
			run(t, mcopy, "-i", path, file, "::"+f.Name)
		}
		run(t, mdel, "-i", path, "::removed-later.txt")
		image, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		got := parse(t, image)
		if got.Label != "OTHERS" || got.ID != 0xcafe0001 || fmt.Sprintf("FAT%s", c.bits) != got.Type.String() {
			t.Errorf("%v %q %08x", got.Type, got.Label, got.ID)
		}
		byName := make(map[string][]byte)
		for _, f := range got.Files {
			byName[f.Name] = f.Data
		}
		for _, f := range stampFiles {
			if b, ok := byName[f.Name]; !ok || !bytes.Equal(b, f.Data) {
				t.Errorf("FAT%s: %s: %v, %d octets", c.bits, f.Name, ok, len(b))
			}
		}
		if len(byName) != len(stampFiles) {
			t.Errorf("FAT%s: %d files", c.bits, len(byName))
		}
	}
}

// Write leaves the same file system on a device that held something else, and none when it is cut off.
func TestWrite(t *testing.T) {
	v := fat.Volume{Size: 40 << 20, Type: fat.FAT32, Label: "CARD"}
	path := filepath.Join(t.TempDir(), "card")
	if err := os.WriteFile(path, bytes.Repeat([]byte{0xa5}, int(v.Size)), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := v.Write(f, f.Sync, stampFiles); err != nil {
		t.Fatal(err)
	}
	got, err := fat.Read(f, v.Size)
	if err != nil {
		t.Fatal(err)
	}
	same(t, got.Files, stampFiles)
	run(t, tool(t, "fsck.fat", "dosfstools"), "-n", path)
	syncs := 0
	cut := errors.New("cut")
	if err := v.Write(f, func() error {
		if syncs++; syncs == 2 {
			return cut
		}
		return nil
	}, stampFiles[:1]); !errors.Is(err, cut) {
		t.Fatal(err)
	}
	if _, err := fat.Read(f, v.Size); !errors.Is(err, fat.ErrDamaged) {
		t.Errorf("cut off: %v", err)
	}
}

func TestRefused(t *testing.T) {
	ok := fat.Volume{Size: 64 << 10}
	for name, c := range map[string]struct {
		v     fat.Volume
		files []fat.File
		want  error
	}{
		"no size":             {fat.Volume{}, nil, fat.ErrSize},
		"part of a sector":    {fat.Volume{Size: 64<<10 + 1}, nil, fat.ErrSize},
		"tiny":                {fat.Volume{Size: 4096}, nil, fat.ErrSize},
		"FAT32 under 33 MiB":  {fat.Volume{Size: 32 << 20, Type: fat.FAT32}, nil, fat.ErrSize},
		"FAT16 under 2 MiB":   {fat.Volume{Size: 2 << 20, Type: fat.FAT16}, nil, fat.ErrSize},
		"FAT12 too large":     {fat.Volume{Size: 256 << 20, Type: fat.FAT12}, nil, fat.ErrSize},
		"FAT16 too large":     {fat.Volume{Size: 4 << 30, Type: fat.FAT16}, nil, fat.ErrSize},
		"FAT32, large sector": {fat.Volume{Size: 200 << 20, Type: fat.FAT32, SectorSize: 4096}, nil, fat.ErrSize},
		"in memory":           {fat.Volume{Size: 2 << 30}, nil, fat.ErrSize},
		"type":                {fat.Volume{Size: 1 << 20, Type: 13}, nil, nil},
		"sector":              {fat.Volume{Size: 1 << 20, SectorSize: 100}, nil, nil},
		"label":               {fat.Volume{Size: 1 << 20, Label: "small"}, nil, nil},
		"long label":          {fat.Volume{Size: 1 << 20, Label: "TWELVE LONG."}, nil, nil},
		"year":                {fat.Volume{Size: 1 << 20, Time: time.Unix(0, 0)}, nil, nil},
		"full":                {ok, []fat.File{{Name: "a", Data: make([]byte, 64<<10)}}, fat.ErrFull},
		"no name":             {ok, []fat.File{{}}, nil},
		"absolute":            {ok, []fat.File{{Name: "/a"}}, nil},
		"above":               {ok, []fat.File{{Name: "../a"}}, nil},
		"last dot":            {ok, []fat.File{{Name: "a."}}, nil},
		"colon":               {ok, []fat.File{{Name: "a:b"}}, nil},
		"not ASCII":           {ok, []fat.File{{Name: "ä"}}, nil},
		"too long":            {ok, []fat.File{{Name: strings.Repeat("a", 256)}}, nil},
		"too deep":            {ok, []fat.File{{Name: "a/a/a/a/a/a/a/a/a"}}, nil},
		"twice":               {ok, []fat.File{{Name: "a"}, {Name: "A"}}, nil},
		"a file as a folder":  {ok, []fat.File{{Name: "a"}, {Name: "a/b"}}, nil},
		"folder in two cases": {ok, []fat.File{{Name: "a/b"}, {Name: "A/c"}}, nil},
	} {
		if _, err := c.v.Build(c.files); err == nil || c.want != nil && !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	var many []fat.File
	for i := range 200 {
		many = append(many, fat.File{Name: fmt.Sprintf("a name of more than one entry %d", i)})
	}
	if _, err := ok.Build(many); !errors.Is(err, fat.ErrFull) {
		t.Errorf("a root that is full: %v", err)
	}
	// Every size of a type is either refused or right; the borders between cluster sizes are where others went wrong.
	for _, typ := range []fat.Type{fat.FAT12, fat.FAT16, fat.FAT32} {
		for size := int64(32 << 10); size < 70<<20; size += size/23 - size/23%512 + 512 {
			v := fat.Volume{Size: size, Type: typ}
			image, err := v.Build(stampFiles[:1])
			if errors.Is(err, fat.ErrSize) {
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			if c, err := fat.Parse(image); err != nil || c.Type != typ {
				t.Fatalf("%d octets as %v: %v", size, typ, err)
			}
		}
	}
}

// To the last cluster, and one octet more.
func TestFillsUp(t *testing.T) {
	v := fat.Volume{Size: 128 << 10}
	low, high := 0, 128<<10 // the largest file that fits lies between
	for low+1 < high {
		n := (low + high) / 2
		if _, err := v.Build([]fat.File{{Name: "a", Data: make([]byte, n)}}); err == nil {
			low = n
		} else if high = n; !errors.Is(err, fat.ErrFull) {
			t.Fatal(err)
		}
	}
	image, err := v.Build([]fat.File{{Name: "a", Data: pattern(low)}})
	if err != nil {
		t.Fatal(err)
	}
	if c := parse(t, image); !bytes.Equal(c.Files[0].Data, pattern(low)) {
		t.Error("a full volume reads back differently")
	}
	if low < 120<<10 {
		t.Errorf("only %d octets fit", low)
	}
}

// Each of these is a trap for a reader: a loop, a shared cluster, a size of 4 GiB, names that lie.
func TestDamaged(t *testing.T) {
	v := fat.Volume{Size: 64 << 10}
	image, err := v.Build([]fat.File{{Name: "first-file.txt", Data: pattern(1500)}, {Name: "folder/second", Data: pattern(600)}})
	if err != nil {
		t.Fatal(err)
	}
	le := binary.LittleEndian
	const fat1, root = 512, 512 * 3 // one sector of table each
	// Root: long entry of two parts and short; cluster 2. Folder: one long part and short.
	short := root + 64
	for name, change := range map[string]func(b []byte){
		"no signature":          func(b []byte) { b[510] = 0 },
		"sector of 0":           func(b []byte) { le.PutUint16(b[11:], 0) },
		"cluster of 0":          func(b []byte) { b[13] = 0 },
		"cluster of 3":          func(b []byte) { b[13] = 3 },
		"larger than it is":     func(b []byte) { le.PutUint16(b[19:], 129) },
		"4 GiB of sectors":      func(b []byte) { le.PutUint16(b[19:], 0); le.PutUint32(b[32:], 0xffffffff) },
		"no tables":             func(b []byte) { b[16] = 0 },
		"255 tables":            func(b []byte) { b[16] = 255 },
		"table too long":        func(b []byte) { le.PutUint16(b[22:], 100) },
		"root too long":         func(b []byte) { le.PutUint16(b[17:], 0xfff0) },
		"FAT32 in disguise":     func(b []byte) { le.PutUint16(b[22:], 0); le.PutUint32(b[36:], 1) },
		"tables differ":         func(b []byte) { b[fat1+20] ^= 1 },
		"loop":                  func(b []byte) { link(b, 4, 2) },
		"short chain":           func(b []byte) { link(b, 3, 0xfff) },
		"long chain":            func(b []byte) { link(b, 4, 60) },
		"free in the chain":     func(b []byte) { link(b, 3, 0) },
		"beyond the end":        func(b []byte) { link(b, 3, 0xfe0) },
		"size of 4 GiB":         func(b []byte) { le.PutUint32(b[short+28:], 0xffffffff) },
		"shared cluster":        func(b []byte) { le.PutUint16(b[root+128+26:], 2) },
		"cluster 1":             func(b []byte) { le.PutUint16(b[short+26:], 1) },
		"empty with a cluster":  func(b []byte) { le.PutUint32(b[short+28:], 0) },
		"long name's checksum":  func(b []byte) { b[root+13] ^= 1; b[root+32+13] ^= 1 },
		"long name's order":     func(b []byte) { b[root+32] = 2 },
		"long name cut off":     func(b []byte) { b[root+32] = 0xe5 },
		"long name of slashes":  func(b []byte) { b[root+32+1] = '/' },
		"long name's end":       func(b []byte) { b[root+28] = 'x' },
		"short name":            func(b []byte) { b[short] = 'a' },
		"folder with a size":    func(b []byte) { le.PutUint32(b[root+128+28:], 1) },
		"folder's own folder":   func(b []byte) { b[cluster(5)+26] = 9 },
		"folder's parent":       func(b []byte) { b[cluster(5)+32+26] = 9 },
		"folder without itself": func(b []byte) { b[cluster(5)] = 'X' },
		"label in a folder":     func(b []byte) { b[cluster(5)+64+11] = 0x08 },
		"label twice":           func(b []byte) { b[short+11], b[root+128+11] = 8, 8 },
	} {
		b := bytes.Clone(image)
		change(b)
		if c, err := fat.Parse(b); !errors.Is(err, fat.ErrDamaged) {
			t.Errorf("%s: %v, %v", name, c, err)
		}
	}
	for _, n := range []int{0, 1, 511, 512, 1000, 2000, 8000, len(image) - 512} {
		if _, err := fat.Parse(image[:n]); !errors.Is(err, fat.ErrDamaged) {
			t.Errorf("cut at %d: %v", n, err)
		}
	}
	same(t, parse(t, image).Files, []fat.File{{Name: "first-file.txt", Data: pattern(1500)}, {Name: "folder/second", Data: pattern(600)}})
}

// cluster returns where a cluster of the image in TestDamaged is.
func cluster(n int) int { return 512*3 + 128*32 + (n-2)*512 }

// link changes an entry in both tables of that image.
func link(b []byte, n, v int) {
	for _, table := range []int{512, 1024} {
		at := b[table+n+n/2:]
		if n%2 == 1 {
			at[0], at[1] = at[0]&0x0f|byte(v<<4), byte(v>>4)
		} else {
			at[0], at[1] = byte(v), at[1]&0xf0|byte(v>>8)
		}
	}
}

// What parses is built and parsed again to the same files. The fuzzer changes octets of a sound image, three of its own for
// each: where (of what is not a file's content) and what. Both tables change alike, or little would be found behind them.
func FuzzParse(f *testing.F) {
	var images [][]byte
	for _, v := range []fat.Volume{{Size: 32 << 10, Label: "FUZZ"}, {Size: 3 << 20, Type: fat.FAT16}, {Size: 34 << 20, Type: fat.FAT32}} {
		image, err := v.Build([]fat.File{{Name: "device-key.pem", Data: pattern(1500)}, {Name: "folder/SECOND.TXT", Data: pattern(600)}, {Name: "empty"}})
		if err != nil {
			f.Fatal(err)
		}
		images = append(images, image)
		f.Add(uint8(len(images)-1), []byte{})
	}
	f.Add(uint8(0), []byte{0, 2, 3, 0, 3, 4})
	f.Fuzz(func(t *testing.T, which uint8, edits []byte) {
		image := images[int(which)%len(images)]
		le := binary.LittleEndian
		first := int(le.Uint16(image[14:])) * 512
		size := int(le.Uint16(image[22:])) * 512
		if size == 0 {
			size = int(le.Uint16(image[36:])) * 512
		}
		root := first + 2*size
		undo := make(map[int]byte)
		set := func(at int, b byte) {
			if _, ok := undo[at]; !ok {
				undo[at] = image[at]
			}
			image[at] = b
		}
		for ; len(edits) >= 3; edits = edits[3:] {
			at := int(le.Uint16(edits))
			switch at >> 14 {
			case 0: // the boot sector
				set(at%512, edits[2])
			case 1: // the beginning of the tables
				set(first+at%64, edits[2])
				set(first+size+at%64, edits[2])
			default: // the root, the first clusters
				set(root+at%min(20<<10, len(image)-root), edits[2])
			}
		}
		c, err := fat.Parse(image)
		for at, b := range undo {
			image[at] = b
		}
		if err != nil {
			if !errors.Is(err, fat.ErrDamaged) {
				t.Fatal(err)
			}
			return
		}
		v := fat.Volume{Size: 4 << 20, Label: c.Label, ID: c.ID}
		again, err := v.Build(c.Files)
		if err != nil {
			t.Fatalf("%q does not build: %v", c.Files, err)
		}
		back, err := fat.Parse(again)
		if err != nil || back.Label != c.Label || len(back.Files) != len(c.Files) || !reflect.DeepEqual(names(back.Files), names(c.Files)) {
			t.Fatalf("%q reads back as %v, %v", c.Files, back, err)
		}
	})
}

func names(files []fat.File) map[string]string {
	m := make(map[string]string)
	for _, f := range files {
		m[f.Name] = string(f.Data)
	}
	return m
}
