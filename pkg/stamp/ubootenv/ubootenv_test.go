package ubootenv_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/touchmark/touchmark/hsm/hsmtest"
	"github.com/touchmark/touchmark/pkg/stamp/ubootenv"
)

var identity = []ubootenv.Var{
	{Name: "dps_id_scope", Value: "0ne00112233"},
	{Name: "dps_global_endpoint", Value: "global.azure-devices-provisioning.net"},
	{Name: "dps_registration_id", Value: "pump-1"},
	{Name: "dps_key_uri", Value: "pkcs11:token=device;object=pump%201?pin-source=file:/etc/pin"},
	{Name: "bootcmd", Value: "run a; run b=c"},
}

func tool(t *testing.T, name, pkg string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		hsmtest.Require(t, name+" (apt-get install "+pkg+")")
	}
	return path
}

func build(t *testing.T, l ubootenv.Layout, flag byte, vars ...ubootenv.Var) []byte {
	t.Helper()
	b, err := l.Build(vars, flag)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// An image is what U-Boot's own tool makes of the same variables, octet by octet.
func TestMkenvimage(t *testing.T) {
	mkenvimage := tool(t, "mkenvimage", "u-boot-tools")
	var text strings.Builder
	for _, v := range identity {
		fmt.Fprintf(&text, "%s=%s\n", v.Name, v.Value)
	}
	for _, l := range []ubootenv.Layout{{Size: 512}, {Size: 0x2000}, {Size: 0x4000, Redundant: true}, {Size: 0x1000, BigEndian: true}, {Size: 0x20000, Redundant: true, BigEndian: true}} {
		args, flag := []string{"-s", fmt.Sprint(l.Size), "-o", "-"}, byte(0)
		if l.Redundant {
			args, flag = append(args, "-r"), 1
		}
		if l.BigEndian {
			args = append(args, "-b")
		}
		cmd := exec.Command(mkenvimage, append(args, "-")...)
		cmd.Stdin, cmd.Stderr = strings.NewReader(text.String()), os.Stderr
		want, err := cmd.Output()
		if err != nil {
			t.Fatal(err)
		}
		if got := build(t, l, flag, identity...); !bytes.Equal(got, want) {
			t.Errorf("%+v: differs from mkenvimage's", l)
		}
		if vars, f, err := l.Parse(want); err != nil || f != flag || !slices.Equal(vars, identity) {
			t.Errorf("%+v: mkenvimage's reads as %v, %d, %v", l, vars, f, err)
		}
	}
}

// fwPrintenv reads images as Linux on the device does.
func fwPrintenv(t *testing.T, images ...[]byte) []string {
	t.Helper()
	dir := t.TempDir()
	var config strings.Builder
	for i, b := range images {
		path := filepath.Join(dir, fmt.Sprint(i))
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&config, "%s 0x0 0x%x\n", path, len(b))
	}
	path := filepath.Join(dir, "fw_env.config")
	if err := os.WriteFile(path, []byte(config.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(tool(t, "fw_printenv", "libubootenv-tool"), "-c", path).Output()
	if err != nil {
		t.Fatalf("fw_printenv: %v", err)
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	slices.Sort(lines)
	return lines
}

func TestFwPrintenv(t *testing.T) {
	var want []string
	for _, v := range identity {
		want = append(want, v.Name+"="+v.Value)
	}
	slices.Sort(want)
	if got := fwPrintenv(t, build(t, ubootenv.Layout{Size: 0x2000}, 0, identity...)); !slices.Equal(got, want) {
		t.Errorf("single: %q", got)
	}
	// Of a redundant pair both must read the same one, whatever the flags are.
	l := ubootenv.Layout{Size: 0x1000, Redundant: true}
	a, b := ubootenv.Var{Name: "copy", Value: "a"}, ubootenv.Var{Name: "copy", Value: "b"}
	for _, flags := range [][2]byte{{1, 2}, {2, 1}, {0, 255}, {255, 0}, {254, 255}, {255, 254}, {7, 7}, {0, 0}, {128, 1}} {
		first, second := build(t, l, flags[0], a), build(t, l, flags[1], b)
		vars, index, flag, err := l.ParsePair(first, second)
		if err != nil || flag != flags[index] {
			t.Fatalf("%v: %v", flags, err)
		}
		if got := fwPrintenv(t, first, second); got[0] != "copy="+vars[0].Value || vars[0].Value != []string{"a", "b"}[index] {
			t.Errorf("flags %v: fw_printenv reads %q, we copy %d", flags, got, index)
		}
	}
	// One of them was cut off while it was written.
	first, second := build(t, l, 1, a), build(t, l, 2, b)
	second[100] ^= 1
	if got := fwPrintenv(t, first, second); got[0] != "copy=a" {
		t.Errorf("cut off: fw_printenv reads %q", got)
	}
	if vars, index, _, err := l.ParsePair(first, second); err != nil || index != 0 || vars[0] != a {
		t.Errorf("cut off: %v, %d, %v", vars, index, err)
	}
	if vars, index, _, err := l.ParsePair(second, first); err != nil || index != 1 || vars[0] != a {
		t.Errorf("cut off, other way round: %v, %d, %v", vars, index, err)
	}
	for _, n := range []int{0, 4, 5, l.Size - 1} {
		if _, _, _, err := l.ParsePair(first[:n], first); err == nil {
			t.Errorf("a first image of %d octets", n)
		}
		if _, _, _, err := l.ParsePair(first, first[:n]); err == nil {
			t.Errorf("a second image of %d octets", n)
		}
	}
	if _, _, _, err := l.ParsePair(second, second); !errors.Is(err, ubootenv.ErrCRC) {
		t.Errorf("both cut off: %v", err)
	}
}

func TestRefused(t *testing.T) {
	l := ubootenv.Layout{Size: 64}
	for name, vars := range map[string][]ubootenv.Var{
		"no name":    {{Value: "x"}},
		"comment":    {{Name: "#a", Value: "x"}},
		"equals":     {{Name: "a=b", Value: "x"}},
		"space":      {{Name: "a b", Value: "x"}},
		"not ASCII":  {{Name: "ä", Value: "x"}},
		"no value":   {{Name: "a"}},
		"NUL":        {{Name: "a", Value: "x\x00b=y"}},
		"twice":      {{Name: "a", Value: "x"}, {Name: "a", Value: "y"}},
		"too long":   {{Name: "a", Value: strings.Repeat("x", 57)}},
		"far longer": {{Name: "a", Value: strings.Repeat("x", 5700)}},
	} {
		if b, err := l.Build(vars, 0); err == nil || errors.Is(err, ubootenv.ErrFull) != strings.Contains(name, "long") {
			t.Errorf("%s: %x, %v", name, b, err)
		}
	}
	// 4 of CRC, "a=", 56, and two NULs fill it to the last octet.
	if vars, _, err := l.Parse(build(t, l, 0, ubootenv.Var{Name: "a", Value: strings.Repeat("x", 56)})); err != nil || len(vars[0].Value) != 56 {
		t.Errorf("full: %v, %v", vars, err)
	}
	if _, err := l.Build(nil, 1); err == nil {
		t.Error("a flag in a single environment")
	}
	if _, _, _, err := l.ParsePair(make([]byte, 64), make([]byte, 64)); err == nil {
		t.Error("a pair in a single environment")
	}
	for _, size := range []int{-1, 0, 15, 1<<20 + 1} {
		if _, err := (ubootenv.Layout{Size: size}).Build(nil, 0); err == nil {
			t.Errorf("size %d", size)
		}
	}
	whole := build(t, l, 0, identity[2])
	for i := range whole {
		for bit := range 8 {
			broken := slices.Clone(whole)
			broken[i] ^= 1 << bit
			if _, _, err := l.Parse(broken); !errors.Is(err, ubootenv.ErrCRC) {
				t.Errorf("bit %d of octet %d turned over: %v", bit, i, err)
			}
		}
	}
	if _, _, err := l.Parse(whole[:63]); err == nil {
		t.Error("a cut image parses")
	}
}

// What parses is built again to the same octets, as far as the data go.
func FuzzParse(f *testing.F) {
	for _, l := range []ubootenv.Layout{{Size: 512}, {Size: 512, Redundant: true}, {Size: 256, BigEndian: true}} {
		b, err := l.Build(identity[:3], 0)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, l.Redundant, l.BigEndian)
	}
	f.Fuzz(func(t *testing.T, b []byte, redundant, big bool) {
		l := ubootenv.Layout{Size: len(b), Redundant: redundant, BigEndian: big}
		if len(b) < 16 {
			return
		}
		b = slices.Clone(b)
		ubootenv.FixCRC(l, b) // the fuzzer cannot guess it
		vars, flag, err := l.Parse(b)
		if err != nil {
			return
		}
		again, err := l.Build(vars, flag)
		if err != nil {
			t.Fatalf("%q parses and does not build: %v", b, err)
		}
		n := 4
		for _, v := range vars {
			n += len(v.Name) + len(v.Value) + 2
		}
		if redundant {
			n++
		}
		if !bytes.Equal(again[4:n+1], b[4:n+1]) {
			t.Fatalf("%q builds as %q", b, again)
		}
	})
}
