//go:build espressif

// With the tag espressif these run Espressif's own programs beside ours (scripts/espressif-nvs brings them, where their repository
// can be reached). TestGolden has images that they made, and always runs.

package nvs

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/base64"
	"encoding/csv"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/touchmark/touchmark/hsm/hsmtest"
)

// espressif is a running testdata/espressif.py.
type espressif struct {
	t   *testing.T
	in  *json.Encoder
	out *bufio.Reader
}

type question struct {
	Do    string  `json:"do"`
	Size  int     `json:"size,omitempty"`
	Key   string  `json:"key,omitempty"`
	CSV   string  `json:"csv,omitempty"`
	Dir   string  `json:"dir,omitempty"`
	Rows  [][]any `json:"rows"`
	Image []byte  `json:"image,omitempty"`
}

type answer struct {
	Error      string      `json:"error"`
	Image      []byte      `json:"image"`
	Values     [][4]string `json:"values"`
	Complaints []string    `json:"complaints"`
}

func startEspressif(t *testing.T) *espressif {
	dir := os.Getenv("TOUCHMARK_ESP_NVS")
	if dir == "" {
		hsmtest.Require(t, "Espressif's generator (TOUCHMARK_ESP_NVS=$(scripts/espressif-nvs))")
	}
	cmd := exec.CommandContext(t.Context(), "/usr/bin/python3", "testdata/espressif.py", dir) // with Debian's python3-cryptography
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	e := &espressif{t, json.NewEncoder(in), bufio.NewReader(out)}
	t.Cleanup(func() {
		_ = in.Close()
		_, _ = io.Copy(io.Discard, out)
		if err := cmd.Wait(); err != nil && t.Context().Err() == nil {
			t.Error(err)
		}
	})
	return e
}

func (e *espressif) ask(q question, keys *Keys) answer {
	e.t.Helper()
	if keys != nil {
		q.Key = hex.EncodeToString(keys.octets[:])
	}
	if err := e.in.Encode(q); err != nil {
		e.t.Fatal(err)
	}
	line, err := e.out.ReadBytes('\n')
	if err != nil {
		e.t.Fatal(err)
	}
	var a answer
	if err := json.Unmarshal(line, &a); err != nil {
		e.t.Fatal(err)
	}
	return a
}

// same holds what the generator answered against what Build did.
func (e *espressif) same(a answer, image []byte, err error, about any) {
	e.t.Helper()
	if full := strings.HasPrefix(a.Error, "InsufficientSizeError"); full != errors.Is(err, ErrFull) || (a.Error != "") != (err != nil) {
		e.t.Fatalf("the generator says %q, we say %v\n%v", a.Error, err, about)
	}
	if !bytes.Equal(a.Image, image) {
		at := 0
		for a.Image[at] == image[at] {
			at++
		}
		e.t.Fatalf("differs at 0x%x: 0x%02x, the generator has 0x%02x\n%v", at, image[at], a.Image[at], about)
	}
}

// random is seeded anew for each run; the seed is in the log of a failing one.
func random(t *testing.T) *rand.Rand {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

func randomOctets(r *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

// randomLength is mostly short, and often such that an entry or a page is just full.
func randomLength(r *rand.Rand, most int) int {
	n := r.IntN(80)
	switch r.IntN(6) {
	case 0:
		n = r.IntN(most + 1)
	case 1:
		n = 32*r.IntN(most/32+1) + r.IntN(3) - 1
	}
	return max(0, min(n, most))
}

func randomName(r *rand.Rand) string {
	const letters = "abcdefghijklmnopqrstuvwxyz0123456789_.-# ,\""
	b := make([]byte, 1+r.IntN(maxName))
	for i := range b {
		b[i] = letters[r.IntN(len(letters))]
	}
	return "k" + string(b[1:]) // a line does not begin with #
}

func randomText(r *rand.Rand) string {
	letters := []rune("abc XYZ,\"\n;=0\r'äß€😀")
	var b strings.Builder
	for n := randomLength(r, 3967); b.Len() < n-3; {
		b.WriteRune(letters[r.IntN(len(letters))])
	}
	return b.String()
}

func randomValue(r *rand.Rand) any {
	n := r.Uint64() >> r.IntN(64)
	switch r.IntN(14) {
	case 0:
		return uint8(n)
	case 1:
		return int8(n)
	case 2:
		return uint16(n)
	case 3:
		return int16(n)
	case 4:
		return uint32(n)
	case 5:
		return int32(n)
	case 6:
		return n
	case 7:
		return -int64(n)
	case 8, 9, 10:
		return randomText(r)
	default:
		return randomOctets(r, randomLength(r, 9000))
	}
}

// randomEntries has namespaces that are come back to when they may be.
func randomEntries(r *rand.Rand, back bool) []Entry {
	var entries []Entry
	var names []string
	known := map[[2]string]bool{}
	for range r.IntN(40) {
		if len(names) == 0 || r.IntN(6) == 0 {
			if name := randomName(r); !known[[2]string{name}] {
				known[[2]string{name}] = true
				names = append(names, name)
			}
			if r.IntN(4) == 0 {
				entries = append(entries, Entry{Namespace: names[len(names)-1]})
				continue
			}
		}
		e := Entry{names[len(names)-1], randomName(r), randomValue(r)}
		if back {
			e.Namespace = names[r.IntN(len(names))]
		}
		if id := [2]string{e.Namespace, e.Key}; !known[id] {
			known[id] = true
			entries = append(entries, e)
		}
	}
	return entries
}

// sorted leaves out declarations of namespaces, which need not be read back as they were written.
func sorted(entries []Entry) []Entry {
	valued := slices.DeleteFunc(slices.Clone(entries), func(e Entry) bool { return e.Value == nil })
	slices.SortFunc(valued, func(a, b Entry) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Key, b.Key))
	})
	return valued
}

func encodingOf(v any) string {
	switch v.(type) {
	case string:
		return "string"
	case []byte:
		return "hex2bin"
	}
	return strings.NewReplacer("uint", "u", "int", "i").Replace(fmt.Sprintf("%T", v))
}

func textOf(v any) string {
	if b, ok := v.([]byte); ok {
		return hex.EncodeToString(b)
	}
	return fmt.Sprint(v)
}

var update = flag.Bool("update", false, "write the golden images anew, with Espressif's generator")

func TestGoldenAgain(t *testing.T) {
	e := startEspressif(t)
	dir, err := filepath.Abs("testdata")
	if err != nil {
		t.Fatal(err)
	}
	again := func(name string, a answer) {
		if *update && a.Error == "" {
			if err := os.WriteFile(filepath.Join(dir, name), a.Image, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if a.Error != "" || !bytes.Equal(a.Image, read(t, name)) {
			t.Errorf("%s is not what the generator writes. %s", name, a.Error)
		}
	}
	again("keys.bin", e.ask(question{Do: "keys", Key: hex.EncodeToString(read(t, "hmac.bin"))}, nil))
	for _, name := range golden {
		size := MinSize
		if name == "multipage" {
			size = 7 * pageSize
		}
		for suffix, keys := range map[string]*Keys{"": nil, "-encrypted": goldenKeys(t)} {
			again(name+suffix+".bin", e.ask(question{Do: "csv", CSV: string(read(t, name+".csv")), Dir: dir, Size: size}, keys))
		}
	}
}

func TestBuildLikeEspressif(t *testing.T) {
	e, r, full := startEspressif(t), random(t), 0
	for i := range 2000 {
		entries := randomEntries(r, true)
		q := question{Do: "rows", Size: MinSize + pageSize*r.IntN(12), Rows: [][]any{}}
		spaces := map[string]int{}
		for _, x := range entries {
			if spaces[x.Namespace] == 0 {
				spaces[x.Namespace] = len(spaces) + 1
				q.Rows = append(q.Rows, []any{x.Namespace, "namespace", "", "", nil})
			}
			if x.Value != nil {
				q.Rows = append(q.Rows, []any{x.Key, "data", encodingOf(x.Value), textOf(x.Value), spaces[x.Namespace]})
			}
		}
		var keys *Keys
		if i%2 == 1 {
			keys, _ = NewKeys(randomOctets(r, KeySize))
		}
		image, err := Build(nil, q.Size, entries, keys)
		e.same(e.ask(q, keys), image, err, q)
		if err != nil {
			full++
			continue
		}
		back, err := Parse(image, keys)
		if err != nil {
			t.Fatal(err)
		}
		if len(spaces) > 1 { // others may be declared in another order, and then fill the pages otherwise
			if !reflect.DeepEqual(sorted(back), sorted(entries)) {
				t.Fatalf("read back are other entries\n%v", q)
			}
		} else if again := build(t, q.Size, back, keys); !bytes.Equal(again, image) {
			t.Fatalf("read back and built again it differs\n%v", q)
		}
	}
	t.Logf("%d did not fit", full)
	if full == 0 || full > 1500 {
		t.Errorf("%d of 2000 inputs did not fit: too few of the others", full)
	}
}

func TestFromCSVLikeEspressif(t *testing.T) {
	e, r := startEspressif(t), random(t)
	dir := t.TempDir()
	for i := range 400 {
		var text strings.Builder
		rows := csv.NewWriter(&text)
		rows.UseCRLF = r.IntN(2) == 0
		text.WriteString("# a comment\nkey,type,encoding,value\n")
		namespace := ""
		for n, x := range randomEntries(r, false) {
			if x.Namespace != namespace {
				namespace = x.Namespace
				_ = rows.Write([]string{namespace, "namespace", "", ""})
			}
			if x.Value == nil {
				continue
			}
			row := []string{x.Key, "data", encodingOf(x.Value), textOf(x.Value)}
			data := []byte(row[3])
			switch v := x.Value.(type) {
			case []byte:
				data = v
				switch r.IntN(4) {
				case 0:
					row[2], row[3] = "base64", base64.StdEncoding.EncodeToString(v)
				case 1:
					row[3] = " " + strings.ToUpper(row[3]) + "\n"
				case 2:
					row[2], row[3] = "binary", strings.Repeat("text", len(v)/8)
				}
			case string:
				row[3] = strings.ReplaceAll(v, "\r", "") // which is where files differ
			}
			if r.IntN(3) == 0 {
				name := fmt.Sprintf("f%d", n)
				if encodingOf(x.Value) == "hex2bin" && r.IntN(2) == 0 {
					row[2] = "binary"
				} else if row[2] != "string" {
					data = []byte(row[3])
				}
				if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
					t.Fatal(err)
				}
				row[1], row[3] = "file", name
			}
			_ = rows.Write(row)
			rows.Flush()
			if r.IntN(8) == 0 {
				text.WriteString("# \"not a value\n\n")
			}
		}
		rows.Flush()
		if r.IntN(5) == 0 {
			text.WriteString("wifi,namespace,,\nsta.pswd,data,string,words of it\nap.authmode,data,u8," + fmt.Sprint(r.IntN(3)) + "\nap.passwd,data,string,\"other, words\"\nap.ssid,data,string,ä\nsta.ssid,data,string,x\n")
		}
		var keys *Keys
		if i%8 == 0 {
			keys, _ = NewKeys(randomOctets(r, KeySize))
		}
		q := question{Do: "csv", CSV: text.String(), Dir: dir, Size: MinSize + pageSize*r.IntN(20)}
		entries, err := FromCSV(strings.NewReader(q.CSV), os.DirFS(dir))
		if err != nil {
			t.Fatalf("%v\n%s", err, q.CSV)
		}
		image, err := Build(nil, q.Size, entries, keys)
		e.same(e.ask(q, keys), image, err, q.CSV)
	}
}

// What ESP-IDF's parser finds is what was put in, and its checks find nothing wrong, not even with strings that the
// generator does not write.
func TestReadByEspressif(t *testing.T) {
	e, r := startEspressif(t), random(t)
	types := map[string]string{"string": "string", "[]uint8": "blob"}
	for range 300 {
		entries := append(randomEntries(r, true), Entry{"whole", "page", strings.Repeat("x", 3966+r.IntN(34))})
		filled := map[string]bool{}
		for i := len(entries) - 1; i >= 0; i-- { // the checks complain about namespaces without values
			if entries[i].Value == nil && !filled[entries[i].Namespace] {
				entries[i].Key, entries[i].Value = "filled", uint8(1)
			}
			filled[entries[i].Namespace] = true
		}
		size := MinSize // just as large as it must be
		image, err := Build(nil, size, entries, nil)
		for ; errors.Is(err, ErrFull); image, err = Build(nil, size, entries, nil) {
			size += pageSize
		}
		a := e.ask(question{Do: "parse", Image: image}, nil)
		var want, complaints [][4]string
		for _, x := range entries {
			if x.Value == nil {
				continue
			}
			typ, text := types[fmt.Sprintf("%T", x.Value)], textOf(x.Value)
			if s, ok := x.Value.(string); ok {
				text = hex.EncodeToString([]byte(s + "\x00"))
			} else if typ == "" {
				typ = fmt.Sprintf("%T_t", x.Value)
			}
			want = append(want, [4]string{x.Namespace, x.Key, typ, text})
		}
		for _, c := range a.Complaints {
			complaints = append(complaints, [4]string{c})
		}
		if a.Error != "" || len(complaints) > 0 || fmt.Sprint(a.Values) != fmt.Sprint(want) {
			t.Fatalf("%s: ESP-IDF reads %q, want %q; it says %q", a.Error, a.Values, want, a.Complaints)
		}
	}
	// Decrypted by Espressif's tool, an image is the one that was not encrypted.
	entries := randomEntries(r, true)
	a := e.ask(question{Do: "decrypt", Image: build(t, 1<<20, entries, testKeys(t))}, testKeys(t))
	if !bytes.Equal(a.Image, build(t, 1<<20, entries, nil)) {
		t.Errorf("decrypted by Espressif's tool it differs. %s", a.Error)
	}
}

func TestKeysLikeEspressif(t *testing.T) {
	a := startEspressif(t).ask(question{Do: "keys"}, nil)
	keys, err := ParseKeys(a.Image)
	if err != nil || !bytes.Equal(keys.Image(), a.Image) {
		t.Errorf("a key partition of the generator's: %s %v", a.Error, err)
	}
}
