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
	lines  map[string]int   // where each setting stands: with indexes, as in "file[1].name", or the first without
	names  map[place]string // what a setting is called with indexes
	wrong  map[string]bool  // settings that have a fault already
	broken bool             // the file could not be read to its end, so what is missing may not be
	list   []fault
}

type fault struct {
	line int
	text string
}

// A place is where a setting stands, and what it is called without indexes.
type place struct {
	line int
	key  string
}

// Decode reads a file into v. The name stands before each fault, as in "profile pumps, line 4: …". The caller adds what it
// finds wrong with the values, and asks Err.
func Decode(name string, b []byte, v any) *Faults {
	f := &Faults{file: name, lines: make(map[string]int), names: make(map[place]string), wrong: make(map[string]bool)}
	f.keyLines(b)
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
				f.wrong[f.name(line, key)] = true
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
	name := f.name(line, key)
	f.wrong[name] = true
	f.at(line, "%s", text)
	if key == "" || f.lines[name] != line {
		return 0
	}
	return line
}

// name returns what a setting on a line is called with indexes.
func (f *Faults) name(line int, key string) string {
	if name, ok := f.names[place{line, key}]; ok {
		return name
	}
	return key
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

// Key reports a fault at the line where a setting stands, or at its table, or behind the others. In arrays of tables a setting
// is called by indexes from 0, as in "file[1].name"; without them it is the first of its name. A setting that has a fault already
// gets no second one.
func (f *Faults) Key(key, format string, args ...any) {
	if f.broken || f.wrong[key] {
		return
	}
	line, ok := f.lines[key]
	for !ok && strings.ContainsAny(key, ".[") {
		key = key[:strings.LastIndexAny(key, ".[")] // the table, or the whole array
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

// keyLines finds out where each setting stands.
func (f *Faults) keyLines(b []byte) {
	p := unstable.Parser{}
	p.Reset(b)
	tables := make(map[string]int) // how many tables an array has so far
	var table, indexed string
	for p.NextExpression() {
		e := p.Expression()
		key, name := table, indexed
		if e.Kind != unstable.KeyValue {
			key, name = "", ""
		}
		line := 0
		for it := e.Key(); it.Next(); {
			n := it.Node()
			if line == 0 {
				line = p.Shape(n.Raw).Start.Line
			} else if count := tables[name]; count > 0 {
				name = fmt.Sprintf("%s[%d]", name, count-1)
			}
			if key != "" {
				key, name = key+".", name+"."
			}
			key, name = key+string(n.Data), name+string(n.Data)
		}
		switch e.Kind {
		case unstable.ArrayTable:
			tables[name]++
			fallthrough
		case unstable.Table:
			if count := tables[name]; count > 0 {
				name = fmt.Sprintf("%s[%d]", name, count-1)
			}
			table, indexed = key, name
		}
		for _, k := range []string{key, name} {
			if _, ok := f.lines[k]; !ok {
				f.lines[k] = line
			}
		}
		f.names[place{line, key}] = name
	}
}
