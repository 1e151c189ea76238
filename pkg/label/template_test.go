package label_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/label"
	"github.com/touchmark/touchmark/templates"
)

// builtIn returns the label templates that come with the program.
func builtIn(t testing.TB) map[string]string {
	t.Helper()
	all := make(map[string]string)
	for _, name := range []string{"unit-50x25", "tiny-30x10", "traveller-100x50"} {
		text, err := templates.Label(name, nil)
		if err != nil {
			t.Fatal(err)
		}
		all[name] = text
	}
	return all
}

func parse(t testing.TB, name, text string) *label.Template {
	t.Helper()
	tmpl, err := label.Parse(name, strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	return tmpl
}

// pump is one unit, with all that a label can show.
func pump() label.Label {
	return label.Label{Serial: "SN-2026-000123", RegistrationID: "pump-sn-2026-000123", Product: "Pumpe Größe É 4711", Revision: "Rev. C2",
		Fingerprint: fingerprint, Copy: 1, Date: time.Date(2026, 10, 3, 23, 0, 0, 0, time.FixedZone("", 7200)), Columns: map[string]string{"mac": "02:00:00:00:00:01"}}
}

func TestParse(t *testing.T) {
	const head = "width = 50\nheight = 25\ndpi = 203\n"
	element := func(s string) string { return head + "[[element]]\n" + s }
	const text = "kind = \"text\"\nx = 1\ny = 1\nsize = 3\ntext = \"a\"\n"
	for name, c := range map[string]struct {
		text string
		want []string // what each fault has in it; none for a good template
	}{
		"smallest":           {element(text), nil},
		"touching":           {element(text) + "[[element]]\nkind = \"qr\"\nx = 1\ny = 4\nsize = 21\ntext = \"{scan}\"", nil},
		"line through box":   {element("kind = \"box\"\nx = 0\ny = 0\nwidth = 50\nheight = 25\nthickness = 1\n[[element]]\nkind = \"line\"\nx = 0\ny = 12\nwidth = 50\nheight = 0.2\n[[element]]\nkind = \"text\"\nx = 2\ny = 2\nwidth = 9\nsize = 3\ntext = \"a\""), nil},
		"sheet":              {head + "[sheet]\nwidth = 210\nheight = 297\ncolumns = 4\nrows = 11\nleft = 5\ntop = 10.9\n[[element]]\n" + text, nil},
		"all at once":        {"width = 4\nheight = nan\ndpi = 200\norientation = 45\ncolour = 1\n", []string{"width", "height", "dpi", "orientation", "line 5: colour is not a setting", "0 elements"}},
		"type":               {element("kind = 1"), []string{"kind is an integer: want a string"}},
		"size is text":       {element("kind = \"text\"\nsize = \"big\""), []string{"size is a string: want a number"}},
		"unknown kind":       {element("kind = \"aztec\"\nx = 1\ny = 1"), []string{`element 1 (aztec): want kind =`}},
		"no text":            {element("kind = \"qr\"\nx = 1\ny = 1\nsize = 9"), []string{"text is missing"}},
		"no size":            {element("kind = \"qr\"\nx = 1\ny = 1\ntext = \"a\""), []string{"size is missing"}},
		"too small":          {element("kind = \"text\"\nx = 1\ny = 1\nsize = 1\ntext = \"a\""), []string{"letters need"}},
		"size nan":           {element("kind = \"qr\"\nx = 1\ny = 1\nsize = nan\ntext = \"a\""), []string{"size is missing"}},
		"x inf":              {element("kind = \"qr\"\nx = -inf\ny = 1\nsize = 9\ntext = \"a\""), []string{"leaves the label"}},
		"x nan":              {element("kind = \"qr\"\nx = nan\ny = 1\nsize = 9\ntext = \"a\""), []string{"leaves the label"}},
		"setting of another": {element(text + "thickness = 1"), []string{"thickness is not one of its settings"}},
		"line with text":     {element("kind = \"line\"\nx = 1\ny = 1\nwidth = 1\nheight = 1\ntext = \"a\""), []string{"text is not one of its settings"}},
		"width below 0":      {element(text + "width = -1"), []string{"leaves the label"}},
		"beyond":             {element("kind = \"qr\"\nx = 42\ny = 1\nsize = 9\ntext = \"a\""), []string{"leaves the label"}},
		"thick box":          {element("kind = \"box\"\nx = 1\ny = 1\nwidth = 9\nheight = 3\nthickness = 2"), []string{"thicker than the box"}},
		"open brace":         {element(text + "[[element]]\nkind = \"text\"\nx = 1\ny = 5\nsize = 3\ntext = \"{a\""), []string{"element 2 (text): text: {"}},
		"close brace":        {element("kind = \"text\"\nx = 1\ny = 1\nsize = 3\ntext = \"a}\""), []string{"} without {"}},
		"control":            {element("kind = \"text\"\nx = 1\ny = 1\nsize = 3\ntext = \"a\\u0007\""), []string{"do not print"}},
		"text on a code":     {element(text) + "[[element]]\nkind = \"qr\"\nx = 1\ny = 3.5\nsize = 20\ntext = \"{scan}\"", []string{"element 2 (qr) lies on element 1 (text)"}},
		"border in a code":   {element("kind = \"box\"\nx = 1\ny = 1\nwidth = 30\nheight = 20\nthickness = 1\n[[element]]\nkind = \"qr\"\nx = 1\ny = 3\nsize = 10\ntext = \"{scan}\""), []string{"element 2 (qr) lies on element 1 (box)"}},
		"sheet too full":     {head + "[sheet]\nwidth = 210\nheight = 297\ncolumns = 5\nrows = 11\n[[element]]\n" + text, []string{"do not lie on a page"}},
		"sheet of nothing":   {head + "[sheet]\nwidth = 210\nheight = 297\n[[element]]\n" + text, []string{"columns and rows"}},
		"sheet nan":          {head + "[sheet]\nwidth = 210\nheight = 297\ncolumns = 1\nrows = 1\ngap-x = nan\n[[element]]\n" + text, []string{"do not lie on a page"}},
		"too many":           {head + strings.Repeat("[[element]]\n"+text, 65), []string{"65 elements"}},
		"too large":          {head + strings.Repeat("#\n", 40<<10), []string{"larger than"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := label.Parse(name, strings.NewReader(c.text))
			if c.want == nil {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			if err == nil {
				t.Fatal("it parses")
			}
			faults := strings.Split(err.Error(), "\n")
			if len(faults) != len(c.want) {
				t.Fatalf("got %q, want %q", faults, c.want)
			}
			for _, w := range c.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("got %q, want %q", faults, w)
				}
			}
		})
	}
}

func TestColumns(t *testing.T) {
	for name, text := range builtIn(t) {
		if columns := parse(t, name, text).Columns(); columns != nil {
			t.Errorf("%s, which is for any list, wants %q", name, columns)
		}
	}
	const text = "width = 50\nheight = 25\ndpi = 203\n[[element]]\nkind = \"text\"\nx = 1\ny = 1\nsize = 3\ntext = \"{serial} {mac} {copy} {mac} {lot no}\""
	tmpl := parse(t, "columns", text)
	if got := tmpl.Columns(); !slices.Equal(got, []string{"mac", "lot no"}) {
		t.Errorf("columns %q", got)
	}
	if _, err := tmpl.Render(label.ZPL, pump()); err == nil || !strings.Contains(err.Error(), `no column "lot no"`) {
		t.Errorf("a missing column: %v", err)
	}
}

// A template that parses puts everything on the label, or says why not; it is as quick to refuse.
func FuzzParse(f *testing.F) {
	for _, text := range builtIn(f) {
		f.Add(text)
	}
	const head = "width=50\nheight=25\ndpi=203\n[[element]]\nx=1\ny=1\n"
	for _, element := range []string{
		"kind='text'\nsize=2\ntext='{mac}a{'", "kind='qr'\nsize=9\ntext='{}'", "kind='qr'\nsize=9\ntext='_^~'", "kind='datamatrix'\nsize=9\ntext='_1'", "kind='code128'\nwidth=9\nheight=9\ntext='>'",
		"kind='line'\nwidth=9\nheight=nan", "kind='box'\nwidth=9\nheight=1e9\nthickness=-inf\n[sheet]\ncolumns=2",
	} {
		f.Add(head + element)
	}
	f.Fuzz(func(t *testing.T, text string) {
		tmpl, err := label.Parse("fuzz", strings.NewReader(text))
		if err != nil {
			return
		}
		l := pump()
		for _, c := range tmpl.Columns() {
			l.Columns[c] = "x"
		}
		job, err := tmpl.Render(label.ZPL, l)
		if err == nil {
			readZPL(t, string(job.Data))
		}
	})
}
