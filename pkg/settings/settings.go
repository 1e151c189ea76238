// Package settings reads the TOML files that people write: strictly, and with all of a file's faults at once, each with its
// line.
package settings

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// An Error lists the faults of a file in the order of their lines.
type Error struct{ Faults []string }

// Error returns the faults, one per line.
func (e *Error) Error() string { return strings.Join(e.Faults, "\n") }

// Faults collects what is wrong with a file.
type Faults struct {
	file   string
	lines  map[string]int  // where each setting first stands
	wrong  map[string]bool // settings that have a fault already
	broken bool            // the file could not be read to its end, so what is missing may not be
	list   []fault
}

type fault struct {
	line int
	text string
}

// Decode reads a file into v. The name stands before each fault, as in "profile pumps, line 4: …". The caller adds what it
// finds wrong with the values, and asks Err.
func Decode(name string, b []byte, v any) *Faults {
	f := &Faults{file: name, lines: keyLines(b), wrong: make(map[string]bool)}
	var syntax map[string]any
	if err := toml.Unmarshal(b, &syntax); err != nil {
		f.broken = true
		f.decode(err)
		return f
	}
	rest := bytes.Split(bytes.Clone(b), []byte("\n"))
	for range maxTypes {
		err := toml.NewDecoder(bytes.NewReader(bytes.Join(rest, []byte("\n")))).DisallowUnknownFields().Decode(v)
		if err == nil {
			return f
		}
		var unknown *toml.StrictMissingError
		if errors.As(err, &unknown) {
			for _, e := range unknown.Errors {
				line, _ := e.Position()
				key := strings.Join(e.Key(), ".")
				f.wrong[key] = true
				f.at(line, "%s is not a setting here", key)
			}
			return f
		}
		// A value of another type hides what follows it: take the setting out and read again, if it is one line.
		line := f.decode(err)
		if line == 0 || toml.Unmarshal(blank(rest, line), &syntax) != nil {
			f.broken = true
			return f
		}
	}
	f.broken = true
	return f
}

// maxTypes is how many values of a wrong type are named: each takes another look at the whole file.
const maxTypes = 20

// blank empties a line, and returns the whole.
func blank(lines [][]byte, line int) []byte {
	lines[line-1] = nil
	return bytes.Join(lines, []byte("\n"))
}

var wrongType = regexp.MustCompile(`^cannot decode TOML ([a-z ]+) into .* of type (.*)$`)

// decode adds what the decoder found, and returns the line of the setting when that stands on one line.
func (f *Faults) decode(err error) int {
	var bad *toml.DecodeError
	if !errors.As(err, &bad) {
		f.at(0, "%v", err)
		return 0
	}
	line, _ := bad.Position()
	text := strings.TrimPrefix(bad.Error(), "toml: ")
	key := strings.Join(bad.Key(), ".")
	if m := wrongType.FindStringSubmatch(text); m != nil {
		text = fmt.Sprintf("%s is %s: want %s", key, article(m[1]), typeName(m[2]))
	}
	f.wrong[key] = true
	f.at(line, "%s", text)
	if key == "" || f.lines[key] != line {
		return 0
	}
	return line
}

func article(kind string) string {
	if strings.ContainsRune("aeiou", rune(kind[0])) {
		return "an " + kind
	}
	return "a " + kind
}

// typeName says in TOML's words what a Go type takes.
func typeName(t string) string {
	switch t = strings.TrimLeft(t, "*"); {
	case t == "string":
		return "a string"
	case t == "bool":
		return "true or false"
	case strings.HasPrefix(t, "int"), strings.HasPrefix(t, "uint"):
		return "a whole number"
	case strings.HasPrefix(t, "float"):
		return "a number"
	case strings.HasPrefix(t, "[]struct"):
		return "tables, as in [[name]]"
	case strings.HasPrefix(t, "[]"):
		return "an array"
	case strings.HasPrefix(t, "struct"), strings.HasPrefix(t, "map"):
		return "a table"
	}
	return "another value"
}

func (f *Faults) at(line int, format string, args ...any) {
	f.list = append(f.list, fault{line, fmt.Sprintf(format, args...)})
}

// Key reports a fault at the line where a setting stands, or at its table, or behind the others. A setting that has a fault
// already gets no second one.
func (f *Faults) Key(key, format string, args ...any) {
	if f.broken || f.wrong[key] {
		return
	}
	line, ok := f.lines[key]
	for !ok && strings.Contains(key, ".") {
		key = key[:strings.LastIndexByte(key, '.')]
		line, ok = f.lines[key]
	}
	f.at(line, format, args...)
}

// Err returns nil for a file without faults, else an *Error.
func (f *Faults) Err() error {
	if len(f.list) == 0 {
		return nil
	}
	last := 1 << 30
	slices.SortStableFunc(f.list, func(a, b fault) int { return cmp.Compare(cmp.Or(a.line, last), cmp.Or(b.line, last)) })
	e := &Error{}
	for _, x := range f.list {
		if x.line > 0 {
			e.Faults = append(e.Faults, fmt.Sprintf("%s, line %d: %s", f.file, x.line, x.text))
		} else {
			e.Faults = append(e.Faults, fmt.Sprintf("%s: %s", f.file, x.text))
		}
	}
	return e
}

// keyLines maps each setting's dotted name to the line where it first stands.
func keyLines(b []byte) map[string]int {
	lines := make(map[string]int)
	p := unstable.Parser{}
	p.Reset(b)
	var table []string
	for p.NextExpression() {
		e := p.Expression()
		var parts []string
		line := 0
		for it := e.Key(); it.Next(); {
			n := it.Node()
			if line == 0 {
				line = p.Shape(n.Raw).Start.Line
			}
			parts = append(parts, string(n.Data))
		}
		switch e.Kind {
		case unstable.Table, unstable.ArrayTable:
			table = parts
		case unstable.KeyValue:
			parts = append(slices.Clone(table), parts...)
		}
		name := strings.Join(parts, ".")
		if _, ok := lines[name]; !ok {
			lines[name] = line
		}
	}
	return lines
}
