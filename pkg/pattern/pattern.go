// Package pattern reads text with fields in braces, such as "pump-{serial}", and fills it.
//
// A field is named between { and }; "{serial|lower}" folds its value to lower case. There is no way to write a brace itself.
// A [Pattern] is read-only once parsed and may be used by many goroutines.
package pattern

import (
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
)

// A Pattern is parsed text. Nil is the empty text.
type Pattern []segment

// A segment is literal text, or a field.
type segment struct {
	text, field string
	lower       bool
}

// Parse parses text with fields in braces. It does not know which fields there are: see [Pattern.Fields].
func Parse(s string) (Pattern, error) {
	var out Pattern
	for s != "" {
		text, rest, brace := strings.Cut(s, "{")
		if strings.Contains(text, "}") {
			return nil, errors.New("} without {")
		}
		if text != "" {
			out = append(out, segment{text: text})
		}
		if !brace {
			break
		}
		field, after, closed := strings.Cut(rest, "}")
		if !closed || field == "" || strings.Contains(field, "{") {
			return nil, errors.New("{ without a name and }")
		}
		field, lower := strings.CutSuffix(field, "|lower")
		if field == "" || strings.Contains(field, "|") {
			return nil, fmt.Errorf("{%s}: the only change of a field is |lower, after its name", field)
		}
		out = append(out, segment{field: field, lower: lower})
		s = after
	}
	return out, nil
}

// Fields returns the names of the fields, each once, in their order.
func (p Pattern) Fields() []string {
	var names []string
	for _, g := range p {
		if g.field != "" && !slices.Contains(names, g.field) {
			names = append(names, g.field)
		}
	}
	return names
}

// Fixed reports whether the pattern is the same text whatever the values: it has no field.
func (p Pattern) Fixed() bool { return len(p.Fields()) == 0 }

// Expand fills the pattern. It asks for the value of every field at every place it stands.
func (p Pattern) Expand(value func(field string) string) string {
	var b strings.Builder
	for _, g := range p {
		text := g.text
		if g.field != "" {
			text = value(g.field)
		}
		if g.lower {
			text = strings.ToLower(text)
		}
		b.WriteString(text)
	}
	return b.String()
}

// ExpandURI fills the pattern of a URI. A value stays one value there, whatever characters it has: it cannot add attributes,
// and name a module to load for instance.
func (p Pattern) ExpandURI(value func(field string) string) string {
	return p.Expand(func(field string) string { return strings.ReplaceAll(url.QueryEscape(value(field)), "+", "%20") })
}

// ExpandWord fills the pattern of one word of a command line. A word that begins with a field and would begin with "-" is
// refused: the program would take what came from outside for an option.
func (p Pattern) ExpandWord(value func(field string) string) (string, error) {
	word := p.Expand(value)
	if len(p) > 0 && p[0].field != "" && strings.HasPrefix(word, "-") {
		return "", fmt.Errorf("{%s} makes the word %q, which the program would take for an option", p[0].field, word)
	}
	return word, nil
}
