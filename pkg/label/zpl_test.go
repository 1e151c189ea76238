package label_test

import (
	"encoding/hex"
	"flag"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/touchmark/touchmark/pkg/label"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func TestGoldenZPL(t *testing.T) {
	all := builtIn(t)
	all["rotated"] = everyCode + "orientation = 270\n" + codes
	for name, text := range all {
		job, err := parse(t, name, text).Render(label.ZPL, pump())
		if err != nil {
			t.Fatal(err)
		}
		readZPL(t, string(job.Data))
		path := filepath.Join("testdata", name+".zpl")
		if *update {
			if err := os.WriteFile(path, job.Data, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if want, err := os.ReadFile(path); err != nil || string(want) != string(job.Data) {
			t.Errorf("%s (%v) is now\n%s", path, err, job.Data)
		}
	}
}

// everyCode and codes are a label with each kind of element.
const (
	everyCode = "width = 90\nheight = 60\ndpi = 300\n"
	codes     = `
[[element]]
kind = "qr"
x = 0
y = 0
size = 40
text = "{scan}"
[[element]]
kind = "datamatrix"
x = 45
y = 0
size = 30
text = "{serial}"
[[element]]
kind = "code128"
x = 0
y = 41
width = 90
height = 10
text = "{serial}"
[[element]]
kind = "text"
x = 0
y = 52
size = 4
text = "{product}"
[[element]]
kind = "line"
x = 0
y = 57
width = 90
height = 0.3
`
)

// hostile are serials that try to be more than field data to a printer, a code, a file or a scanner.
var hostile = []string{"^XZ~JA", "_5E", "_5EXZ", "^FS^XZ^XA^FDevil", "~HS", "~!@#$%&*()_+", ">;00>8", ">:A>51234>6B", "_1_d065__", `\&`, "a,b;c", "%41.%2E",
	"../../etc/x", "-dzebra", "123456", "A1234567B12345", "lower-CASE", "tm1", "'\"`$(x)|&;<>?*[]{}!#"}

// No serial and no text breaks out: the printer reads the same commands as for a harmless label, and fields with just what was meant.
func FuzzZPLFieldsStayFields(f *testing.F) {
	tmpl := parse(f, "all", everyCode+codes)
	for _, serial := range hostile {
		for _, product := range []string{"x", "^XZ^XA^FDevil^FS", "_5EXZ", "~JA", `a\&b`, "Größe É, ¥"} {
			f.Add(serial, product)
		}
	}
	plain, err := tmpl.Render(label.ZPL, pump())
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, serial, product string) {
		l := pump()
		l.Serial, l.Product = serial, product
		job, err := tmpl.Render(label.ZPL, l)
		if err != nil || product == "" { // which has no field
			if slices.Contains(hostile, serial) && product == "x" {
				t.Fatal(err)
			}
			return
		}
		names, _ := readZPL(t, string(plain.Data))
		got, fields := readZPL(t, string(job.Data))
		if !slices.Equal(got, names) {
			t.Errorf("%q, %q: the printer reads %q", serial, product, got)
		}
		want := map[string]string{"BQ": label.Scan{Serial: serial, Fingerprint: fingerprint}.String(), "BX": serial, "BC": serial, "A0": product}
		if !maps.Equal(fields, want) {
			t.Errorf("%q, %q: the fields are %q", serial, product, fields)
		}
	})
}

// readZPL reads a format as the ZPL II Programming Guide says that a printer does, and returns its commands and the last field of
// each kind, decoded.
func readZPL(t *testing.T, format string) (names []string, fields map[string]string) {
	t.Helper()
	fields = make(map[string]string)
	hexed, kind := false, ""
	for format = strings.TrimSuffix(format, "\n"); format != ""; {
		if format[0] != '^' || len(format) < 3 {
			t.Fatalf("no command at %.20q", format)
		}
		name := format[1:3]
		format = format[3:]
		end := strings.IndexAny(format, "^~")
		if end < 0 {
			end = len(format)
		}
		parameters := strings.TrimSuffix(format[:end], "\n")
		format = format[end:]
		names = append(names, name)
		switch name {
		case "A0", "BQ", "BX", "BC":
			kind = name
			if name == "BX" && !strings.HasSuffix(parameters, ",_") {
				t.Fatalf("the escape character is not set: %s", parameters)
			}
		case "FH":
			hexed = parameters == "_"
		case "FD":
			if strings.ContainsFunc(parameters, func(r rune) bool { return r < ' ' || r > '~' }) || !hexed {
				t.Fatalf("field data %q", parameters)
			}
			fields[kind] = fieldData(t, kind, parameters)
		case "FS":
			hexed, kind = false, ""
		case "FO", "FT", "GB", "PW", "LL", "BY":
			for _, n := range strings.Split(parameters, ",") {
				if v, err := strconv.Atoi(n); err != nil || v < 0 {
					t.Fatalf("^%s%s", name, parameters)
				}
			}
		}
	}
	if len(names) < 2 || names[0] != "XA" || slices.Index(names, "XZ") != len(names)-1 || slices.Contains(names[1:], "XA") {
		t.Fatalf("not one format: %q", names)
	}
	return names, fields
}

func fieldData(t *testing.T, kind, data string) string {
	t.Helper()
	var b strings.Builder
	for data != "" { // ^FH
		if data[0] != '_' {
			b.WriteByte(data[0])
			data = data[1:]
			continue
		}
		octet, err := hex.DecodeString(data[1:3])
		if err != nil {
			t.Fatal(err)
		}
		b.Write(octet)
		data = data[3:]
	}
	data = b.String()
	var out strings.Builder
	switch kind {
	case "BQ": // error correction, automatic
		rest, ok := strings.CutPrefix(data, "MA,")
		if !ok {
			t.Fatalf("^BQ %q", data)
		}
		return rest
	case "BX": // escapes of ECC 200
		if strings.Contains(strings.ReplaceAll(data, "__", ""), "_") {
			t.Fatalf("^BX %q has an escape", data)
		}
		return strings.ReplaceAll(data, "__", "_")
	case "BC": // invocation codes, Table 6
		subset := map[string]byte{">:": 'B', ">;": 'C'}[data[:2]]
		for data = data[2:]; data != ""; data = data[2:] {
			switch change := data[:min(2, len(data))]; {
			case change == ">5" && subset == 'B':
				subset = 'C'
			case change == ">6" && subset == 'C':
				subset = 'B'
			case subset == 'B' && data[0] == '>':
				c, ok := map[string]byte{">0": '>', "><": '^', ">=": '~'}[change]
				if !ok {
					t.Fatalf("^BC %q", data)
				}
				out.WriteByte(c)
			case subset == 'C':
				if _, err := strconv.ParseUint(change, 10, 8); err != nil || len(change) != 2 {
					t.Fatalf("^BC %q in subset C", data)
				}
				out.WriteString(change)
			case subset == 'B' && data[0] != '^' && data[0] != '~':
				out.WriteByte(data[0])
				data = " " + data // one character, where the others have two
			default:
				t.Fatalf("^BC %q", data)
			}
		}
		return out.String()
	}
	return data
}
