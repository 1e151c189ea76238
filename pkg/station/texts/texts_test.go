package texts

import (
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unicode"

	"github.com/charmbracelet/x/ansi"
	"golang.org/x/text/unicode/norm"

	"github.com/touchmark/touchmark/pkg/station"
)

func load(t *testing.T, lang string) *Text {
	t.Helper()
	x, err := Load(lang)
	if err != nil {
		t.Fatal(err)
	}
	return x
}

// fields are the braces in s, each once, in their order.
func fields(s string) []string {
	f := braces.FindAllString(s, -1)
	slices.Sort(f)
	return slices.Compact(f)
}

func TestLoad(t *testing.T) {
	for locale, want := range map[string]string{"": "en", "C": "en", "POSIX": "en", "C.UTF-8": "en", "en_US.UTF-8": "en", "de": "de",
		"de_DE.UTF-8": "de", "DE-at": "de", "es_MX": "es", "vi_VN": "vi", "zh_CN.UTF-8": "zh", "zh-Hans": "zh", "de_DE@euro": "de"} {
		if x, err := Load(locale); err != nil || x.Lang() != want {
			t.Errorf("%q: %v, %v; want %s", locale, x, err, want)
		}
	}
	for _, locale := range []string{"fr_FR.UTF-8", "../en", "en.toml/", "deu", "_"} {
		if x, err := Load(locale); err == nil && x.Lang() != "en" || err != nil && !errors.Is(err, ErrLanguage) {
			t.Errorf("%q: %v, %v", locale, x, err)
		}
	}
}

// TestFill: what is filled in stays what it is, and what is missing is seen to be missing.
func TestFill(t *testing.T) {
	x := load(t, "en")
	if got := x.Sentence(station.CodeNotSerial, map[string]string{"scan": "{order}"}); got != "{order} is not a serial number." {
		t.Error(got)
	}
	if got := x.Sentence(station.CodeNotSerial, nil); got != "? is not a serial number." {
		t.Error(got)
	}
	if got := x.Sentence("E-000", nil) + x.Action("E-000") + x.Word("check.oven"); got != "E-000check.oven" {
		t.Error(got)
	}
	if got := x.Phrase("ask.label", map[string]string{"head": "3"}); got != "Scan the label of head 3" {
		t.Error(got)
	}
}

// constants returns the values of station's string constants, by the name of their type, and its codes with the fields that the
// comment behind each promises.
func constants(t *testing.T) (byType map[string][]string, promised map[station.Code][]string) {
	byType, promised = map[string][]string{}, map[station.Code][]string{}
	for _, file := range []string{"../view.go", "../code.go"} {
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(f, func(n ast.Node) bool {
			v, ok := n.(*ast.ValueSpec)
			if !ok || len(v.Values) != 1 {
				return true
			}
			typ, ok1 := v.Type.(*ast.Ident)
			lit, ok2 := v.Values[0].(*ast.BasicLit)
			if !ok1 || !ok2 {
				return true
			}
			s, err := strconv.Unquote(lit.Value)
			if err != nil {
				t.Fatal(err)
			}
			byType[typ.Name] = append(byType[typ.Name], s)
			if typ.Name == "Code" {
				promised[station.Code(s)] = fields(v.Comment.Text())
			}
			return true
		})
	}
	return byType, promised
}

// TestCatalogue holds English against the program: every code with the fields that it may show and no more, every word there is a
// constant for.
func TestCatalogue(t *testing.T) {
	x := load(t, "en")
	byType, promised := constants(t)
	codes := station.Codes()
	if n := len(byType["Code"]); n != len(codes) || len(x.codes) != n {
		t.Errorf("%d constants, %d codes listed, %d in the catalogue", n, len(codes), len(x.codes))
	}
	for _, c := range codes {
		if x.codes[c][0] == "" || x.codes[c][1] == "" {
			t.Errorf("%s says nothing", c)
		}
		if got := fields(x.codes[c][0]); !slices.Equal(got, promised[c]) {
			t.Errorf("%s shows %v, and code.go says %v", c, got, promised[c])
		}
		if got := fields(x.codes[c][1]); len(got) > 0 {
			t.Errorf("%s: its action shows %v", c, got)
		}
	}
	want := []string{"head", "ask.wait", "ask.end", "ask.ending", "ask.cancel", "ask.rework", "ask.scrap", "ask.reprint",
		"check.clock", "check.disk", "check.token", "check.ledger", "check.order", "check.printer", "check.golden", "check.fixture"}
	for _, g := range []struct{ typ, prefix string }{{"Ask", "ask."}, {"Phase", "phase."}, {"HeadState", "head."}, {"Step", "step."},
		{"CheckState", "check."}, {"Function", "function."}, {"Function", "help."}} {
		for _, s := range byType[g.typ] {
			if s != "" {
				want = append(want, g.prefix+s)
			}
		}
		if len(byType[g.typ]) == 0 {
			t.Errorf("station has no %s", g.typ)
		}
	}
	for _, r := range append(slices.Clone(station.ReworkReasons), station.ScrapReasons...) {
		want = append(want, "reason."+r)
	}
	for _, k := range want {
		if x.words[k] == "" {
			t.Errorf("no word for %s", k)
		}
	}
}

// same lists what is spelt alike in English and another language, on purpose.
var same = map[string][]string{
	"de": {"label.station", "check.ok"},
	"es": {"check.ok"},
	"vi": {"check.ok"},
}

// TestLanguages holds every language against English.
func TestLanguages(t *testing.T) {
	en := load(t, "en")
	for _, lang := range Languages() {
		t.Run(lang, func(t *testing.T) {
			x := load(t, lang)
			if got, want := x.Words(), en.Words(); !slices.Equal(got, want) {
				t.Fatalf("words %v, want %v", got, want)
			}
			if got, want := slices.Sorted(maps.Keys(x.codes)), slices.Sorted(maps.Keys(en.codes)); !slices.Equal(got, want) {
				t.Fatalf("codes %v, want %v", got, want)
			}
			all := map[string][2]string{} // this language, English
			for _, k := range en.Words() {
				all[k] = [2]string{x.words[k], en.words[k]}
			}
			for c := range en.codes {
				all[string(c)+" sentence"] = [2]string{x.codes[c][0], en.codes[c][0]}
				all[string(c)+" action"] = [2]string{x.codes[c][1], en.codes[c][1]}
			}
			for k, v := range all {
				check(t, lang, k, v[0], v[1])
			}
		})
	}
}

func check(t *testing.T, lang, key, got, english string) {
	if got == "" || strings.TrimSpace(got) != got || norm.NFC.String(got) != got || strings.ContainsFunc(got, unicode.IsControl) {
		t.Errorf("%s: empty, padded, not composed or not plain: %q", key, got)
	}
	if f, want := fields(got), fields(english); !slices.Equal(f, want) {
		t.Errorf("%s: shows %v, want %v", key, f, want)
	}
	// A sentence ends like one, in its own script, and fits two lines of 76 columns whatever 16 characters are filled in.
	full := braces.ReplaceAllString(got, strings.Repeat("M", 16))
	if strings.HasPrefix(key, "E-") || strings.HasPrefix(key, "L-") {
		end := "."
		if lang == "zh" {
			end = "。"
		}
		if !strings.HasSuffix(got, end) {
			t.Errorf("%s: ends without %q: %q", key, end, got)
		}
		if n := len(strings.Split(ansi.Wrap(full, 76, ""), "\n")); n > 2 {
			t.Errorf("%s: %d lines: %q", key, n, full)
		}
	} else if w := ansi.StringWidth(full); w > 76 {
		t.Errorf("%s: %d columns: %q", key, w, full)
	}
	if lang == "en" {
		return
	}
	if got == english && !slices.Contains(same[lang], key) {
		t.Errorf("%s is English: %q", key, got)
	}
	// Words of English that only a forgotten translation has.
	if m := regexp.MustCompile(`(?i)\b(the|and|of|is|unit|board|scan|lead|again|head|ask|order)\b`).FindString(braces.ReplaceAllString(got, "")); m != "" {
		t.Errorf("%s has %q: %q", key, m, got)
	}
	if lang == "zh" && !strings.ContainsFunc(got, func(r rune) bool { return unicode.Is(unicode.Han, r) }) {
		t.Errorf("%s is not Chinese: %q", key, got)
	}
	if strings.ContainsAny(got, ",:?!;") && lang == "zh" {
		t.Errorf("%s: half-width punctuation: %q", key, got)
	}
	if lang == "es" && (strings.Contains(got, "?") != strings.Contains(got, "¿")) {
		t.Errorf("%s: a question opens with ¿: %q", key, got)
	}
}

// TestFiles: every file in the directory is a language that can be loaded.
func TestFiles(t *testing.T) {
	names, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, e := range names {
		if lang, ok := strings.CutSuffix(e.Name(), ".toml"); ok {
			load(t, lang)
			n++
		}
	}
	if n != len(Languages()) {
		t.Errorf("%d files, %d languages", n, len(Languages()))
	}
}
