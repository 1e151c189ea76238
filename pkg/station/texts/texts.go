// Package texts holds what a station says, in the technician's language.
//
// A [Text] is one language whole: for every [station.Code] a sentence and one next action, and a word for every key that a screen
// draws ("step.flash", "ask.badge"). [Load] finds it by language or locale. English is the master; the other files follow it key by
// key and brace by brace, which the tests hold them to. Texts are plain: what is filled into them comes from outside, and whoever
// draws it makes it fit for a terminal or a page. A Text is read-only and safe for many goroutines.
package texts

import (
	"embed"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"github.com/touchmark/touchmark/pkg/station"
)

//go:embed *.toml
var files embed.FS

// ErrLanguage is the answer to a language that there is no text in.
var ErrLanguage = errors.New("no text in this language")

// Languages lists the languages that [Load] knows.
func Languages() []string { return []string{"en", "de", "es", "vi", "zh"} }

// A Text is what a station says in one language.
type Text struct {
	lang  string
	codes map[station.Code][2]string // sentence, action
	words map[string]string
}

// Load returns the text in lang, a language ("vi") or a locale ("de_DE.UTF-8", "zh-CN"). The locales "", "C" and "POSIX" are English.
// For any other it returns [ErrLanguage].
func Load(lang string) (*Text, error) {
	l := strings.ToLower(lang)
	if i := strings.IndexAny(l, "_-.@"); i >= 0 {
		l = l[:i]
	}
	if l == "" || l == "c" || l == "posix" {
		l = "en"
	}
	if !slices.Contains(Languages(), l) {
		return nil, fmt.Errorf("%w: %q; there are %s", ErrLanguage, lang, strings.Join(Languages(), ", "))
	}
	b, err := files.ReadFile(l + ".toml")
	if err != nil {
		return nil, err
	}
	var f struct {
		Codes map[string][2]string `toml:"codes"`
		Words map[string]string    `toml:"words"`
	}
	if err := toml.NewDecoder(strings.NewReader(string(b))).DisallowUnknownFields().Decode(&f); err != nil {
		return nil, fmt.Errorf("reading %s.toml: %w", l, err)
	}
	t := &Text{lang: l, codes: make(map[station.Code][2]string, len(f.Codes)), words: f.Words}
	for c, s := range f.Codes {
		t.codes[station.Code(c)] = s
	}
	return t, nil
}

// Lang is the language: "en", "de", "es", "vi" or "zh".
func (t *Text) Lang() string { return t.lang }

// Sentence says what is wrong, with fields filled in: "The board does not answer." A field that is not there is shown as "?", and a
// code that the catalogue does not have is its own sentence.
func (t *Text) Sentence(code station.Code, fields map[string]string) string {
	s, ok := t.codes[code]
	if !ok {
		return string(code)
	}
	return fill(s[0], fields)
}

// Action says the one thing to do next: "Reseat the board and scan it again." It is empty for a code that the catalogue does not have.
func (t *Text) Action(code station.Code) string { return t.codes[code][1] }

// Word returns the word for key, or key itself where the catalogue has none: a check may have a name of its own.
func (t *Text) Word(key string) string {
	if w, ok := t.words[key]; ok {
		return w
	}
	return key
}

// Phrase is [Text.Word] with fields filled in, as in [Text.Sentence].
func (t *Text) Phrase(key string, fields map[string]string) string {
	return fill(t.Word(key), fields)
}

// Words returns every key that there is a word for, in their order.
func (t *Text) Words() []string { return slices.Sorted(maps.Keys(t.words)) }

var braces = regexp.MustCompile(`\{[a-z]+\}`)

// fill looks at the text only, never at what it filled in: a serial may well hold braces.
func fill(s string, fields map[string]string) string {
	return braces.ReplaceAllStringFunc(s, func(b string) string {
		if v := fields[b[1:len(b)-1]]; v != "" {
			return v
		}
		return "?"
	})
}
