package mint_test

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/pkg/ledger"
	"github.com/touchmark/touchmark/pkg/mint"
	"github.com/touchmark/touchmark/pkg/stamp"
	"github.com/touchmark/touchmark/pkg/stamp/fat"
	"github.com/touchmark/touchmark/pkg/stamp/ihex"
	"github.com/touchmark/touchmark/pkg/stamp/nvs"
	"github.com/touchmark/touchmark/pkg/stamp/raw"
	"github.com/touchmark/touchmark/pkg/stamp/ubootenv"
	"github.com/touchmark/touchmark/templates"
)

// images is a profile with an image of every format.
const images = `
registration-id = "{serial|lower}"
attestation = "x509"
enrollment = "group"
group = "devices"

[[stamp.image]]
name = "nvs.bin"
format = "nvs"
size = "24KiB"
encrypted = "random"
[[stamp.image.entry]]
namespace = "dps"
key = "id_scope"
value = "{id-scope}"
[[stamp.image.entry]]
namespace = "dps"
key = "batch"
type = "u16"
value = "{batch}"
[[stamp.image.entry]]
namespace = "dps"
key = "offset"
type = "i32"
value = "-{batch}"
[[stamp.image.entry]]
namespace = "tls"
key = "key"
type = "blob"
file = "device-key.pem"
as = "der"

[[stamp.image]]
name = "public.nvs"
format = "nvs"
size = "12288"
encrypted = "nvs.bin.keys"
[[stamp.image.entry]]
namespace = "tls"
key = "leaf"
type = "blob"
file = "device-chain.pem"
as = "leaf-der"

[[stamp.image]]
name = "env.bin"
format = "uboot-env"
size = "8KiB"
redundant = true
big-endian = true
[[stamp.image.entry]]
key = "reg_id"
value = "{registration-id}"
[[stamp.image.entry]]
key = "hello"
value = "{serial} of {id-scope} at {global-endpoint}: {attestation}, {color|lower}"

[[stamp.image]]
name = "raw.bin"
format = "raw"
size = "4KiB"
page = "64"
[[stamp.image.entry]]
key = "private-key"
file = "device-key.pem"
as = "der"
[[stamp.image.entry]]
key = "certificate-chain"
file = "device-chain.pem"
as = "der"
[[stamp.image.entry]]
key = "0x8000"
value = "{color}"

[[stamp.image]]
name = "disk.img"
format = "fat"
size = "1MiB"
label = "IDENTITY"
[[stamp.image.entry]]
key = "provisioning.json"
file = "provisioning.json"
[[stamp.image.entry]]
key = "certs/device.pem"
file = "device-chain.pem"
[[stamp.image.entry]]
key = "env"
file = "env.bin"

[[stamp.image]]
name = "nvs.hex"
format = "ihex"
of = "nvs.bin"
address = 0x9000
`

const imagesList = "serial,color,batch\nSN1,Rot,7\nSN2,Grün,65535\n"

// stampFile reads a file of a stamp, which must have that mode.
func (l *line) stampFile(t *testing.T, id, name string, mode fs.FileMode) []byte {
	t.Helper()
	path := filepath.Join(l.out(), id, name)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != mode {
		t.Errorf("%s: mode %v, %v", path, st.Mode(), err)
	}
	return b
}

func derOf(t *testing.T, b []byte) (all [][]byte) {
	t.Helper()
	for block, rest := pem.Decode(b); block != nil; block, rest = pem.Decode(rest) {
		all = append(all, block.Bytes)
	}
	return all
}

// check parses the images of a unit and holds them against the other files of its stamp.
func (l *line) checkImages(t *testing.T, id, serial, color string, batch uint16) *nvs.Keys {
	t.Helper()
	chainPEM, keyPEM := l.stampFile(t, id, "device-chain.pem", 0o644), l.stampFile(t, id, "device-key.pem", 0o600)
	if _, err := tls.X509KeyPair(chainPEM, keyPEM); err != nil {
		t.Errorf("%s: %v", id, err)
	}
	chain, key := derOf(t, chainPEM), derOf(t, keyPEM)[0]
	keys, err := nvs.ParseKeys(l.stampFile(t, id, "nvs.bin.keys", 0o600))
	if err != nil {
		t.Fatal(err)
	}
	image := l.stampFile(t, id, "nvs.bin", 0o600)
	entries, err := nvs.Parse(image, keys)
	want := []nvs.Entry{{Namespace: "dps", Key: "id_scope", Value: "0ne1"}, {Namespace: "dps", Key: "batch", Value: batch}, {Namespace: "dps", Key: "offset", Value: -int32(batch)}, {Namespace: "tls", Key: "key", Value: key}}
	if err != nil || !sameEntries(entries, want) {
		t.Errorf("%s: nvs.bin has %v, %v", id, entries, err)
	}
	if _, err := nvs.Parse(image, nil); err == nil {
		t.Errorf("%s: nvs.bin is not encrypted", id)
	}
	entries, err = nvs.Parse(l.stampFile(t, id, "public.nvs", 0o644), keys)
	if err != nil || !sameEntries(entries, []nvs.Entry{{Namespace: "tls", Key: "leaf", Value: chain[0]}}) {
		t.Errorf("%s: public.nvs has %v, %v", id, entries, err)
	}
	env := l.stampFile(t, id, "env.bin", 0o644)
	vars, flag, err := ubootenv.Layout{Size: 8 << 10, Redundant: true, BigEndian: true}.Parse(env)
	hello := fmt.Sprintf("%s of 0ne1 at h.example: x509, %s", serial, strings.ToLower(color))
	if err != nil || flag != 1 || !slices.Equal(vars, []ubootenv.Var{{Name: "reg_id", Value: id}, {Name: "hello", Value: hello}}) {
		t.Errorf("%s: env.bin has %v, %d, %v", id, vars, flag, err)
	}
	_, records, err := raw.Read(bytes.NewReader(l.stampFile(t, id, "raw.bin", 0o600)), raw.Slots{Size: 2 << 10, Page: 64})
	if err != nil || len(records) != 3 || !bytes.Equal(records[0].Value, bytes.Join(chain, nil)) || !bytes.Equal(records[1].Value, key) || string(records[2].Value) != color {
		t.Errorf("%s: raw.bin has %v, %v", id, records, err)
	}
	disk, err := fat.Parse(l.stampFile(t, id, "disk.img", 0o644))
	if err != nil || disk.Label != "IDENTITY" || disk.ID == 0 || len(disk.Files) != 3 {
		t.Fatalf("%s: disk.img has %+v, %v", id, disk, err)
	}
	for _, f := range disk.Files {
		if beside := map[string]string{"provisioning.json": "provisioning.json", "certs/device.pem": "device-chain.pem", "env": "env.bin"}[f.Name]; !bytes.Equal(f.Data, l.stampFile(t, id, beside, 0o644)) {
			t.Errorf("%s: %s in disk.img is another", id, f.Name)
		}
	}
	segments, err := ihex.Parse(l.stampFile(t, id, "nvs.hex", 0o600))
	if err != nil || len(segments) != 1 || segments[0].Address != 0x9000 || !bytes.Equal(segments[0].Data, image) {
		t.Errorf("%s: nvs.hex: %v", id, err)
	}
	return keys
}

func sameEntries(a, b []nvs.Entry) bool {
	return slices.EqualFunc(a, b, func(x, y nvs.Entry) bool {
		return x.Namespace == y.Namespace && x.Key == y.Key && fmt.Sprintf("%T %v", x.Value, x.Value) == fmt.Sprintf("%T %v", y.Value, y.Value)
	})
}

func TestImages(t *testing.T) {
	l := newLine(t)
	if _, err := l.mint(t, images, imagesList, l.store); err != nil {
		t.Fatal(err)
	}
	first, second := l.checkImages(t, "sn1", "SN1", "Rot", 7), l.checkImages(t, "sn2", "SN2", "Grün", 65535)
	if bytes.Equal(first.Image(), second.Image()) {
		t.Error("two devices have the same keys")
	}
	if sum, err := l.mint(t, images, imagesList, l.store); err != nil || sum.Before != 2 {
		t.Errorf("again: %+v, %v", sum, err)
	}
}

// At a station units come one by one, and the same unit again after a crash; the golden sample is the same every time.
func TestShiftImages(t *testing.T) {
	l := newLine(t)
	var golden []map[string]string
	var keys [][]byte
	for n := range 2 {
		err := l.run(t, images, "", l.store, fmt.Sprint("shift-", n), func(r *mint.Run) error {
			sums, err := r.Golden(t.Context(), nil)
			if err != nil {
				return err
			}
			golden = append(golden, sums)
			row, err := r.Row("SN1", map[string]string{"color": "Rot", "batch": "7"})
			if err != nil {
				return err
			}
			u, err := r.Unit(t.Context(), row)
			if err != nil {
				return err
			}
			if u.Found() != (n == 1) || u.State() != ledger.Stamped {
				t.Errorf("shift %d: found %v, %v", n, u.Found(), u.State())
			}
			keys = append(keys, l.checkImages(t, "sn1", "SN1", "Rot", 7).Image())
			if row, err = r.Row("SN2", map[string]string{"color": "Rot", "batch": "many"}); err != nil {
				return err
			}
			if _, err := r.Unit(t.Context(), row); err == nil || !strings.Contains(err.Error(), "serial SN2: image nvs.bin: entry \"batch\"") {
				t.Errorf("a value that is no number: %v", err)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if !maps.Equal(golden[0], golden[1]) || golden[0]["nvs.bin"] == "" || golden[0]["nvs.hex"] == "" {
		t.Errorf("golden samples: %v, %v", golden[0], golden[1])
	}
	if !bytes.Equal(keys[0], keys[1]) || l.units(t) != 1 {
		t.Errorf("%d units, keys %v", l.units(t), bytes.Equal(keys[0], keys[1]))
	}
}

func TestSymmetricImages(t *testing.T) {
	l := newLine(t)
	profile := templates.Profiles()["symmetric-individual"] + `
[[stamp.image]]
name = "nvs.bin"
format = "nvs"
size = "12KiB"
[[stamp.image.entry]]
namespace = "dps"
key = "text"
symmetric = "base64"
[[stamp.image.entry]]
namespace = "dps"
key = "octets"
type = "blob"
symmetric = "raw"
`
	if _, err := l.mint(t, profile, "serial\nSN1\n", l.store); err != nil {
		t.Fatal(err)
	}
	entries, err := nvs.Parse(l.stampFile(t, "sn1", "nvs.bin", 0o600), nil)
	if err != nil || len(entries) != 2 {
		t.Fatal(entries, err)
	}
	text := entries[0].Value.(string)
	if doc := string(l.stampFile(t, "sn1", "provisioning.json", 0o600)); !strings.Contains(doc, `"`+text+`"`) || len(entries[1].Value.([]byte)) != 32 {
		t.Error("the keys differ")
	}
}

// A run died with its stamp in place and not written down, or staged in any state that a crash can leave. The next run ends with
// images that fit together; keys that were whole on disk are kept.
func TestImagesAfterCrash(t *testing.T) {
	const list = "serial,color,batch\nSN1,Rot,7\n"
	names := []string{"device-chain.pem", "provisioning.json", "nvs.bin.keys", "nvs.bin", "public.nvs", "env.bin", "raw.bin", "disk.img", "nvs.hex"}
	broken := map[string]func(path string) error{
		"whole":   func(string) error { return nil },
		"missing": os.Remove,
		"empty":   func(path string) error { return os.Truncate(path, 0) },
		"cut off": func(path string) error { return os.Truncate(path, 100) },
	}
	for _, place := range []string{"staged", "published"} {
		for how, damage := range broken {
			for _, name := range names {
				if how == "whole" && name != "nvs.bin.keys" {
					continue // the same for each
				}
				t.Run(place+"/"+how+"/"+name, func(t *testing.T) {
					l := newLine(t)
					dir := filepath.Join(l.out(), "sn1")
					l.now = func() time.Time {
						if _, err := os.Stat(dir); err == nil {
							return time.Now().Add(-time.Hour)
						}
						return time.Now()
					}
					if _, err := l.mint(t, images, list, l.store); !errors.Is(err, ledger.ErrClock) {
						t.Fatalf("the run that dies: %v", err)
					}
					l.now = time.Now
					before := l.stampFile(t, "sn1", "nvs.bin.keys", 0o600)
					if place == "staged" {
						staged, err := filepath.Glob(filepath.Join(l.out(), ".staged~*"))
						if err != nil || len(staged) > 1 {
							t.Fatal(staged, err)
						}
						if len(staged) == 0 { // it was empty
							staged = []string{filepath.Join(l.out(), ".staged~"+l.jobID(t))}
							if err := os.Mkdir(staged[0], 0o700); err != nil {
								t.Fatal(err)
							}
						}
						if err := os.Rename(dir, filepath.Join(staged[0], "sn1")); err != nil {
							t.Fatal(err)
						}
						dir = filepath.Join(staged[0], "sn1")
					}
					if err := damage(filepath.Join(dir, name)); err != nil {
						t.Fatal(err)
					}
					_, err := l.mint(t, images, list, l.store)
					if place == "published" && how != "whole" {
						// Somebody was at it: a crash leaves no such thing.
						if name == "nvs.bin.keys" && !errors.Is(err, mint.ErrUnproven) || err == nil {
							t.Fatalf("not noticed: %v", err)
						}
						return
					}
					if err != nil {
						t.Fatal(err)
					}
					keys := l.checkImages(t, "sn1", "SN1", "Rot", 7)
					if kept := bytes.Equal(keys.Image(), before); kept == (name == "nvs.bin.keys" && how != "whole") {
						t.Errorf("keys kept: %v", kept)
					}
				})
			}
		}
	}
}

// jobID returns the name of the line's only job, as its staging place has it.
func (l *line) jobID(t *testing.T) string {
	t.Helper()
	led, err := ledger.Open(t.Context(), l.ledgerConfig())
	if err != nil {
		t.Fatal(err)
	}
	defer led.Close()
	jobs, err := led.Jobs(t.Context())
	if err != nil || len(jobs) != 1 {
		t.Fatal(jobs, err)
	}
	return fmt.Sprintf("%x", jobs[0].Digest[:6])
}

// units returns how many units were begun.
func (l *line) units(t *testing.T) (n int) {
	t.Helper()
	led, err := ledger.Open(t.Context(), l.ledgerConfig())
	if err != nil {
		t.Fatal(err)
	}
	defer led.Close()
	for _, err := range led.Units(t.Context(), 0) {
		if err != nil {
			t.Fatal(err)
		}
		n++
	}
	return n
}

const deviceProfile = `
registration-id = "{serial|lower}"
attestation = "x509"
enrollment = "group"
group = "devices"
[[stamp.image]]
name = "raw.bin"
format = "raw"
size = "4KiB"
page = "64"
device = "DIR/{disk}.img"
offset = "4KiB"
[[stamp.image.entry]]
key = "private-key"
file = "device-key.pem"
as = "der"
[[stamp.image]]
name = "env.bin"
format = "uboot-env"
size = "8KiB"
device = "DIR/{disk}.img"
offset = "1MiB"
[[stamp.image.entry]]
key = "reg_id"
value = "{registration-id}"
`

// Images are written to their devices in place, nothing beside them changes, and what a device held before is gone.
func TestDevices(t *testing.T) {
	l := newLine(t)
	dir := t.TempDir()
	profile := strings.ReplaceAll(deviceProfile, "DIR", dir)
	disk := filepath.Join(dir, "a.img")
	filler := bytes.Repeat([]byte("touch"), 1<<18)
	write := func(b []byte) {
		if err := os.WriteFile(disk, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	check := func(id string) {
		t.Helper()
		b, err := os.ReadFile(disk)
		if err != nil || len(b) != len(filler) {
			t.Fatal(len(b), err)
		}
		_, records, err := raw.Read(bytes.NewReader(b), raw.Slots{Offset: 4 << 10, Size: 2 << 10, Page: 64})
		if key := derOf(t, l.stampFile(t, id, "device-key.pem", 0o600))[0]; err != nil || len(records) != 1 || !bytes.Equal(records[0].Value, key) {
			t.Errorf("%s: raw: %v, %v", id, records, err)
		}
		if env := l.stampFile(t, id, "env.bin", 0o644); !bytes.Equal(b[1<<20:1<<20+8<<10], env) {
			t.Errorf("%s: the environment is another", id)
		}
		for _, part := range [][2]int{{0, 4 << 10}, {8 << 10, 1 << 20}, {1<<20 + 8<<10, len(b)}} {
			if !bytes.Equal(b[part[0]:part[1]], filler[part[0]:part[1]]) {
				t.Errorf("%s: octets %d to %d changed", id, part[0], part[1])
			}
		}
	}
	write(filler)
	if _, err := l.mint(t, profile, "serial,disk\nSN1,a\n", l.store); err != nil {
		t.Fatal(err)
	}
	check("sn1")
	old := derOf(t, l.stampFile(t, "sn1", "device-key.pem", 0o600))[0]
	// The same storage gets another identity, and the run dies once it is written.
	l.now = func() time.Time {
		if b, err := os.ReadFile(disk); err == nil && bytes.Contains(b, []byte("reg_id=sn2")) {
			return time.Now().Add(-time.Hour)
		}
		return time.Now()
	}
	if _, err := l.mint(t, profile, "serial,disk\nSN2,a\n", l.store); !errors.Is(err, ledger.ErrClock) {
		t.Fatal(err)
	}
	l.now = time.Now
	// A write that was cut off: of the newer slot, and of the environment.
	b, err := os.ReadFile(disk)
	if err != nil {
		t.Fatal(err)
	}
	copy(b[4<<10:], make([]byte, 100))
	copy(b[1<<20:], make([]byte, 5<<10))
	write(b)
	if sum, err := l.mint(t, profile, "serial,disk\nSN2,a\n", l.store); err != nil || sum.Before != 1 {
		t.Fatal(sum, err)
	}
	check("sn2")
	if b, err := os.ReadFile(disk); err != nil || bytes.Contains(b, old[36:68]) {
		t.Errorf("the key of the identity before is still there, %v", err)
	}
}

// What cannot be written to is refused before anything is made.
func TestDevicesRefused(t *testing.T) {
	dir := t.TempDir()
	profile := strings.ReplaceAll(deviceProfile, "DIR", dir)
	if err := os.WriteFile(filepath.Join(dir, "small.img"), make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "a.img"), make([]byte, 2<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "dir.img"), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		list string
		want error
		text string
	}{
		"climbs":         {"SN1,../a\n", nil, `{disk} in the device's path is "../a"`},
		"dots":           {"SN1,..\n", nil, `want part of a name`},
		"deeper":         {"SN1,b/a\n", nil, `want part of a name`},
		"empty":          {"SN1,\n", nil, `want part of a name`},
		"control":        {"SN1,a\x01\n", nil, "control characters"},
		"NUL":            {"SN1,a\x00\n", nil, "control characters"},
		"two to one":     {"SN1,a\nSN2,a\n", nil, "line 3: serial SN2: image raw.bin would be written to " + dir + "/a.img, which is that of serial SN1 on line 2"},
		"not there":      {"SN1,b\n", fs.ErrNotExist, "b.img"},
		"a directory":    {"SN1,dir\n", nil, "is no device, and no file"},
		"too small":      {"SN1,small\n", stamp.ErrFull, "the stamp goes up to 1056768"},
		"the second one": {"SN1,a\nSN2,b\n", fs.ErrNotExist, "b.img"},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLine(t)
			_, err := l.mint(t, profile, "serial,disk\n"+c.list, l.store)
			if err == nil || !strings.Contains(err.Error(), c.text) || c.want != nil && !errors.Is(err, c.want) {
				t.Errorf("got %v, want %q", err, c.text)
			}
			if n := l.units(t); n > 0 {
				t.Errorf("%d units were begun", n)
			}
		})
	}
}

// An image that is too small for one unit's content is refused before anything is signed, and one that is just large enough for
// all that the content can become is not.
func TestImageSizes(t *testing.T) {
	for _, alg := range hsm.KeyPairs() {
		if testing.Short() && strings.HasPrefix(string(alg), "RSA") {
			continue
		}
		t.Run(string(alg), func(t *testing.T) {
			with := func(slot int) string {
				return strings.Replace(templates.Profiles()["eeprom"], "size = \"4KiB\"               # both slots\npage = \"32\"                 # what the EEPROM writes at once", fmt.Sprintf("size = \"%d\"", 2*slot), 1) +
					fmt.Sprintf("[key]\nalgorithm = %q\n", alg)
			}
			l := newLine(t)
			if _, err := l.mint(t, with(8<<10), "serial\nSN1\n", l.store); err != nil {
				t.Fatal(err)
			}
			_, records, err := raw.Read(bytes.NewReader(l.stampFile(t, "sn1", "eeprom.bin", 0o600)), raw.Slots{Size: 8 << 10})
			if err != nil {
				t.Fatal(err)
			}
			b, err := raw.Encode(1, records)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := x509.ParsePKCS8PrivateKey(records[5].Value); err != nil {
				t.Error(err)
			}
			l = newLine(t)
			if _, err := l.mint(t, with(len(b)-20), "serial\nSN1\n", l.store); !errors.Is(err, raw.ErrFull) && (err == nil || !strings.Contains(err.Error(), raw.ErrFull.Error())) {
				t.Errorf("too small: %v", err)
			}
			if n := l.units(t); n > 0 {
				t.Errorf("%d units were begun", n)
			}
			if _, err := l.mint(t, with(len(b)+40), "serial\nSN1\n", l.store); err != nil {
				t.Errorf("large enough: %v", err)
			}
		})
	}
}

// Values of a list that cannot be what an image wants are faults of the list, all named before anything is begun.
func TestImageValues(t *testing.T) {
	l := newLine(t)
	_, err := l.mint(t, images, "serial,color,batch\nSN1,Rot,7\nSN2,Rot,65536\nSN3,,1\nSN4,a\tb,1\nSN5,\xff,1\nSN6,Rot,0x10\n", l.store)
	var faults *mint.ListError
	if !errors.As(err, &faults) {
		t.Fatal(err)
	}
	want := []string{`line 3: serial SN2: image nvs.bin: entry "batch": not a decimal number that fits into u16`,
		`line 4: serial SN3: image raw.bin: entry "0x8000": the value is empty`,
		`line 5: serial SN4: image env.bin: entry "hello": column color: want UTF-8 without control characters`,
		`line 6: serial SN5: image env.bin: entry "hello": column color: want UTF-8 without control characters`,
		`line 7: serial SN6: image nvs.bin: entry "batch": not a decimal number that fits into u16`}
	if !slices.Equal(faults.Faults, want) {
		t.Errorf("got\n%v", err)
	}
	if n := l.units(t); n > 0 {
		t.Errorf("%d units were begun", n)
	}
}

// What is wrong with images is named, all at once, each by its line.
func TestImageFaults(t *testing.T) {
	const head = "registration-id = \"{serial}\"\nattestation = \"x509\"\nenrollment = \"individual\"\n"
	const entry = "[[stamp.image.entry]]\nkey = \"a\"\nvalue = \"b\"\n"
	for name, c := range map[string]struct{ text, want string }{
		"format":    {"[[stamp.image]]\nname = \"a\"\nformat = \"jffs2\"\n", `line 6: image "a": format is "jffs2": want one of nvs, nvs-keys, uboot-env, fat, raw, ihex`},
		"no format": {"[[stamp.image]]\nname = \"a\"\n", `line 4: image "a": format is "": want`},
		"name":      {"[[stamp.image]]\nname = \"../a\"\nformat = \"nvs-keys\"\n", `line 5: image "../a": the name "../a"`},
		"taken":     {"[[stamp.image]]\nname = \"device-key.pem\"\nformat = \"nvs-keys\"\n", `line 5: image "device-key.pem": the name "device-key.pem" is taken`},
		"all at once": {"[[stamp.image]]\nname = \"a\"\nformat = \"uboot-env\"\nsize = \"10\"\n" + entry + "[[stamp.image]]\nname = \"b\"\nformat = \"fat\"\nsize = \"1MiB\"\nlabel = \"x\"\nof = \"a\"\n" + entry + entry,
			`line 7: image "a": environment of 10 octets: want 16 to 1048576|line 14: image "b": label "x"|line 16: image "b": of does not go with format = "fat"`},
		"unit":        {"[[stamp.image]]\nname = \"a\"\nformat = \"nvs\"\nsize = \"24KB\"\n" + entry, `line 7: image "a": size is "24KB": want octets`},
		"huge":        {"[[stamp.image]]\nname = \"a\"\nformat = \"fat\"\nsize = \"17592186044416MiB\"\n" + entry, `line 7: image "a": size is`},
		"no entries":  {"[[stamp.image]]\nname = \"a\"\nformat = \"nvs\"\nsize = \"24KiB\"\n", `line 4: image "a": format = "nvs" needs entry`},
		"no size":     {"[[stamp.image]]\nname = \"a\"\nformat = \"fat\"\n" + entry, `line 4: image "a": format = "fat" needs size`},
		"nvs page":    {"[[stamp.image]]\nname = \"a\"\nformat = \"nvs\"\nsize = \"5000\"\n" + strings.Replace(entry, "key", "namespace = \"n\"\nkey", 1), `line 7: image "a": building an NVS partition: a size of 5000 octets`},
		"namespace":   {"[[stamp.image]]\nname = \"a\"\nformat = \"nvs\"\nsize = \"24KiB\"\n" + entry, `line 8: image "a": each entry of nvs needs a namespace`},
		"not nvs":     {"[[stamp.image]]\nname = \"a\"\nformat = \"uboot-env\"\nsize = \"1KiB\"\n" + entry + "type = \"u8\"\n", `line 9: image "a": namespace and type go with format = "nvs"`},
		"long key":    {"[[stamp.image]]\nname = \"a\"\nformat = \"nvs\"\nsize = \"24KiB\"\n[[stamp.image.entry]]\nnamespace = \"n\"\nkey = \"sixteen_letters_\"\nvalue = \"b\"\n", `line 10: image "a": building an NVS partition of 24576 octets: key "sixteen_letters_" in namespace "n": the key has 16`},
		"twice":       {"[[stamp.image]]\nname = \"a\"\nformat = \"uboot-env\"\nsize = \"1KiB\"\n" + entry + entry, `line 12: image "a": variable a is there twice`},
		"variable":    {"[[stamp.image]]\nname = \"a\"\nformat = \"uboot-env\"\nsize = \"1KiB\"\n" + strings.Replace(entry, `"a"`, `"a=b"`, 1), `line 9: image "a": variable "a=b"`},
		"number":      {"[[stamp.image]]\nname = \"a\"\nformat = \"nvs\"\nsize = \"24KiB\"\n[[stamp.image.entry]]\nnamespace = \"n\"\nkey = \"k\"\ntype = \"u8\"\nvalue = \"256\"\n", `line 10: image "a": entry "k": not a decimal number that fits into u8`},
		"float":       {"[[stamp.image]]\nname = \"a\"\nformat = \"nvs\"\nsize = \"24KiB\"\n[[stamp.image.entry]]\nnamespace = \"n\"\nkey = \"k\"\ntype = \"float\"\nvalue = \"256\"\n", `line 11: image "a": type is "float"`},
		"octets":      {"[[stamp.image]]\nname = \"a\"\nformat = \"nvs\"\nsize = \"24KiB\"\n[[stamp.image.entry]]\nnamespace = \"n\"\nkey = \"k\"\nfile = \"device-key.pem\"\nas = \"der\"\n", `line 8: image "a": octets go with type = "blob"`},
		"DER in text": {"[[stamp.image]]\nname = \"a\"\nformat = \"uboot-env\"\nsize = \"1KiB\"\n[[stamp.image.entry]]\nkey = \"k\"\nfile = \"device-key.pem\"\nas = \"der\"\n", `line 9: image "a": variable k has a NUL in its value`},
		"raw type":    {"[[stamp.image]]\nname = \"a\"\nformat = \"raw\"\nsize = \"1KiB\"\n" + entry, `line 9: image "a": key is "a": want one of certificate-chain, `},
		"raw number":  {"[[stamp.image]]\nname = \"a\"\nformat = \"raw\"\nsize = \"1KiB\"\n" + strings.Replace(entry, `"a"`, `"0xFFFF"`, 1), `line 9: image "a": key is "0xFFFF"`},
		"raw value":   {"[[stamp.image]]\nname = \"a\"\nformat = \"raw\"\nsize = \"1KiB\"\n" + strings.Replace(entry, `"a"`, `"private-key"`, 1), `line 9: image "a": record of type 7, 1 octets: the value is not of that type`},
		"raw page":    {"[[stamp.image]]\nname = \"a\"\nformat = \"raw\"\nsize = \"96\"\npage = \"32\"\n" + strings.Replace(entry, `"a"`, `"serial"`, 1), `line 7: image "a": two slots of pages of 32 octets in 96`},
		"source":      {"[[stamp.image]]\nname = \"a\"\nformat = \"uboot-env\"\nsize = \"1KiB\"\n[[stamp.image.entry]]\nkey = \"k\"\n", `line 9: image "a": entry "k": want one of value, file and symmetric`},
		"two sources": {"[[stamp.image]]\nname = \"a\"\nformat = \"uboot-env\"\nsize = \"1KiB\"\n" + entry + "file = \"device-chain.pem\"\n", `line 9: image "a": entry "a": want one of`},
		"file":        {"[[stamp.image]]\nname = \"a\"\nformat = \"uboot-env\"\nsize = \"1KiB\"\n[[stamp.image.entry]]\nkey = \"k\"\nfile = \"nowhere\"\n", `line 10: image "a": file is "nowhere", which is no file of this stamp, or comes later: there are device-chain.pem, device-key.pem, provisioning.json`},
		"itself":      {"[[stamp.image]]\nname = \"a\"\nformat = \"fat\"\nsize = \"1MiB\"\n[[stamp.image.entry]]\nkey = \"k\"\nfile = \"a\"\n", `line 10: image "a": file is "a", which`},
		"as":          {"[[stamp.image]]\nname = \"a\"\nformat = \"fat\"\nsize = \"1MiB\"\n[[stamp.image.entry]]\nkey = \"k\"\nfile = \"provisioning.json\"\nas = \"der\"\n", `line 11: image "a": as goes with file`},
		"as what":     {"[[stamp.image]]\nname = \"a\"\nformat = \"fat\"\nsize = \"1MiB\"\n[[stamp.image.entry]]\nkey = \"k\"\nfile = \"device-key.pem\"\nas = \"leaf-der\"\n", `line 11: image "a": as = "leaf-der" goes with`},
		"symmetric":   {"[[stamp.image]]\nname = \"a\"\nformat = \"fat\"\nsize = \"1MiB\"\n[[stamp.image.entry]]\nkey = \"k\"\nsymmetric = \"raw\"\n", `line 10: image "a": symmetric goes with attestation`},
		"braces":      {"[[stamp.image]]\nname = \"a\"\nformat = \"fat\"\nsize = \"1MiB\"\n" + strings.Replace(entry, `"b"`, `"{b"`, 1), `line 10: image "a": value: { without`},
		"no key URI":  {"[[stamp.image]]\nname = \"a\"\nformat = \"fat\"\nsize = \"1MiB\"\n" + strings.Replace(entry, `"b"`, `"{key-uri}"`, 1), `line 10: image "a": {key-uri}: devices of this profile have none`},
		"keys":        {"[[stamp.image]]\nname = \"a\"\nformat = \"nvs\"\nsize = \"24KiB\"\nencrypted = \"b\"\n" + strings.Replace(entry, "key", "namespace = \"n\"\nkey", 1), `line 8: image "a": encrypted is "b": want "random", or`},
		"keys-name":   {"[[stamp.image]]\nname = \"a\"\nformat = \"nvs\"\nsize = \"24KiB\"\nkeys-name = \"b\"\n" + strings.Replace(entry, "key", "namespace = \"n\"\nkey", 1), `line 8: image "a": keys-name goes with encrypted`},
		"of":          {"[[stamp.image]]\nname = \"a\"\nformat = \"ihex\"\nof = \"b\"\n", `line 7: image "a": of is "b": want an image that stands before`},
		"address":     {"[[stamp.image]]\nname = \"b\"\nformat = \"nvs-keys\"\n[[stamp.image]]\nname = \"a\"\nformat = \"ihex\"\nof = \"b\"\naddress = 0xffffff00\n", `line 11: image "a": 4096 octets at 0xffffff00 reach beyond`},
		"device":      {"[[stamp.image]]\nname = \"b\"\nformat = \"nvs-keys\"\ndevice = \"dev/mmcblk0\"\n", `line 7: image "b": device is "dev/mmcblk0": want a path from the root`},
		"offset":      {"[[stamp.image]]\nname = \"b\"\nformat = \"nvs-keys\"\noffset = \"1KiB\"\n", `line 7: image "b": offset goes with device`},
		"overlap":     {"[[stamp.image]]\nname = \"a\"\nformat = \"nvs-keys\"\ndevice = \"/dev/x\"\n[[stamp.image]]\nname = \"b\"\nformat = \"nvs-keys\"\ndevice = \"/dev/x\"\noffset = \"4095\"\n", `line 11: image "b": it would be written over a`},
		"too small":   {"[[stamp.image]]\nname = \"a\"\nformat = \"raw\"\nsize = \"256\"\n[[stamp.image.entry]]\nkey = \"private-key\"\nfile = \"device-key.pem\"\nas = \"der\"\n", `line 7: image "a": 155 octets in a slot of 128: the stamp does not fit`},
		"unknown":     {"[[stamp.image]]\nname = \"a\"\nformat = \"raw\"\ncolour = 1\n", `line 4: image "a": format = "raw" needs size|line 4: image "a": format = "raw" needs entry|line 7: stamp.image.colour is not a setting here`},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := mint.LoadProfile("p", strings.NewReader(head+c.text))
			if err == nil {
				t.Fatal("it loads")
			}
			lines := strings.Split(err.Error(), "\n")
			want := strings.Split(c.want, "|")
			for i, w := range want {
				if i >= len(lines) || !strings.HasPrefix(lines[i], "profile p, "+w) {
					t.Fatalf("got\n%v\nwant\n%s", err, strings.Join(want, "\n"))
				}
			}
			if len(lines) != len(want) {
				t.Errorf("got\n%v", err)
			}
		})
	}
}
