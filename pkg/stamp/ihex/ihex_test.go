package ihex_test

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/touchmark/touchmark/hsm/hsmtest"
	"github.com/touchmark/touchmark/pkg/stamp/ihex"
)

func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*7 + i>>8)
	}
	return b
}

func build(t testing.TB, address uint32, data []byte, width int) []byte {
	t.Helper()
	text, err := ihex.Build(address, data, width)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func TestBuild(t *testing.T) {
	const want = ":020000040800F2\n" +
		":02FFFE0041427E\n" +
		":020000040801F1\n" +
		":02000000434477\n" +
		":00000001FF\n"
	if got := string(build(t, 0x0800fffe, []byte("ABCD"), 16)); got != want {
		t.Errorf("got\n%s", got)
	}
	for name, err := range map[string]error{
		"width":    second(ihex.Build(0, []byte{1}, 8)),
		"nothing":  second(ihex.Build(0, nil, 16)),
		"too high": second(ihex.Build(0xffffffff, []byte{1, 2}, 16)),
		"too much": second(ihex.Build(0, make([]byte, 16<<20+1), 16)),
	} {
		if err == nil {
			t.Errorf("%s builds", name)
		}
	}
}

func second(_ []byte, err error) error { return err }

// srec_cat turns our text into the bytes, and the bytes into a text that we read.
func TestSrecCat(t *testing.T) {
	srecCat, err := exec.LookPath("srec_cat")
	if err != nil {
		hsmtest.Require(t, "srec_cat (apt-get install srecord)")
	}
	for _, c := range []struct {
		address uint32
		size    int
	}{{0, 1}, {0, 16}, {5, 100}, {0xfff0, 32}, {0x0807fc00, 1024}, {0x9000, 0x21234}, {0xffffff00, 256}} {
		data := pattern(c.size)
		for _, width := range []int{16, 32} {
			dir := t.TempDir()
			path := func(name string) string { return filepath.Join(dir, name) }
			if err := os.WriteFile(path("in.hex"), build(t, c.address, data, width), 0o600); err != nil {
				t.Fatal(err)
			}
			run := func(args ...string) {
				t.Helper()
				if out, err := exec.Command(srecCat, args...).CombinedOutput(); err != nil {
					t.Fatalf("srec_cat %q: %v\n%s", args, err, out)
				}
			}
			run(path("in.hex"), "-intel", "-offset", fmt.Sprintf("-0x%x", c.address), "-o", path("out.bin"), "-binary")
			if got, err := os.ReadFile(path("out.bin")); err != nil || !bytes.Equal(got, data) {
				t.Errorf("%d octets at 0x%x, width %d: srec_cat reads %d others, %v", c.size, c.address, width, len(got), err)
			}
			run(path("out.bin"), "-binary", "-offset", fmt.Sprintf("0x%x", c.address), "-o", path("out.hex"), "-intel", fmt.Sprintf("-obs=%d", width))
			text, err := os.ReadFile(path("out.hex"))
			if err != nil {
				t.Fatal(err)
			}
			segments, err := ihex.Parse(text)
			if err != nil || len(segments) != 1 || segments[0].Address != c.address || !bytes.Equal(segments[0].Data, data) {
				t.Errorf("%d octets at 0x%x, width %d: srec_cat's text reads as %d segments, %v", c.size, c.address, width, len(segments), err)
			}
		}
	}
}

func TestParse(t *testing.T) {
	good := string(build(t, 0x10000, pattern(40), 16))
	segments, err := ihex.Parse([]byte(":0100000041BE\n:01000100FF00FF\n" + good))
	if err == nil {
		t.Errorf("a record that is longer than it says: %v", segments)
	}
	segments, err = ihex.Parse([]byte(":0100000041BE\n:0100010042BC\n:0100030043B9\n" + good))
	if err != nil || len(segments) != 3 || string(segments[0].Data) != "AB" || segments[1].Address != 3 || segments[2].Address != 0x10000 {
		t.Errorf("three segments: %v, %v", segments, err)
	}
	if _, err := ihex.Parse([]byte(strings.ReplaceAll(good, "\n", "\r\n"))); err != nil {
		t.Errorf("carriage returns: %v", err)
	}
	lines := strings.SplitAfter(good, "\n")
	for name, text := range map[string]string{
		"empty":              "",
		"no end":             strings.Join(lines[:len(lines)-2], ""),
		"two ends":           good + ":00000001FF\n",
		"text after the end": good + "x",
		"no last newline":    good[:len(good)-1],
		"mixed line ends":    strings.Replace(good, "\n", "\r\n", 1),
		"small letters":      strings.Replace(good, "FF\n", "ff\n", 1),
		"checksum":           ":0100000041BF\n:00000001FF\n",
		"backwards":          ":0100010041BD\n:0100000041BE\n:00000001FF\n",
		"overlap":            ":0200000041427B\n:0100010041BD\n:00000001FF\n",
		"twice":              ":0100000041BE\n:0100000041BE\n:00000001FF\n",
		"no data":            ":0000000000\n:00000001FF\n",
		"across 64 KiB":      ":02FFFF0041427D\n:00000001FF\n",
		"across 4 GiB":       ":02000004FFFFFC\n:02FFFF0041427D\n:00000001FF\n",
		"start address":      ":0400000508000000EF\n:00000001FF\n",
		"segment address":    ":020000021000EC\n:00000001FF\n",
		"empty line":         "\n" + good,
		"spaces":             " " + good,
		"no colon":           good[1:],
	} {
		if segments, err := ihex.Parse([]byte(text)); err == nil {
			t.Errorf("%s parses as %v", name, segments)
		}
	}
	for i := range good {
		if good[i] == '\n' {
			continue
		}
		broken := []byte(good)
		broken[i] ^= 1
		if _, err := ihex.Parse(broken); err == nil {
			t.Errorf("a bit of character %d turned over: parses", i)
		}
	}
}

// What parses is the same bytes at the same addresses when each segment is built and parsed again.
func FuzzParse(f *testing.F) {
	f.Add(build(f, 0xfff8, pattern(40), 16))
	f.Add([]byte(":0100000041BE\r\n:0100030043B9\r\n:00000001FF\r\n"))
	f.Add([]byte(":0400000508000000EF\n:00000001FF\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		segments, err := ihex.Parse(text)
		if err != nil {
			return
		}
		next := uint64(0)
		for i, s := range segments {
			if len(s.Data) == 0 || i > 0 && uint64(s.Address) <= next {
				t.Fatalf("%q has segments %v", text, segments)
			}
			next = uint64(s.Address) + uint64(len(s.Data))
			again, err := ihex.Parse(build(t, s.Address, s.Data, 32))
			if err != nil || len(again) != 1 || again[0].Address != s.Address || !bytes.Equal(again[0].Data, s.Data) {
				t.Fatalf("%q: %v, %v", text, again, err)
			}
		}
	})
}
