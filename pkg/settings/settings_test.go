package settings_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/touchmark/touchmark/pkg/settings"
)

type product struct {
	Name  string   `toml:"name"`
	Days  int      `toml:"days"`
	Lines []string `toml:"lines"`
	Edge  bool     `toml:"edge"`
	Key   struct {
		Made string `toml:"made"`
	} `toml:"key"`
	File []struct {
		Name string `toml:"name"`
	} `toml:"file"`
}

func TestAllFaultsAtOnce(t *testing.T) {
	for name, c := range map[string]struct {
		text string
		want []string
	}{
		"good":            {"name = \"a\"\n[key]\nmade = \"x\"\n[[file]]\nname = \"f\"", nil},
		"unknown":         {"name = \"a\"\ncolour = 1\n[key]\nmode = 2", []string{"f, line 2: colour is not a setting here", "f, line 4: key.mode is not a setting here"}},
		"types":           {"name = 5\ndays = \"x\"\nlines = 3\nedge = \"y\"\n[key]\nmade = 1", []string{"f, line 1: name is an integer: want a string", "f, line 2: days is a string: want a whole number", "f, line 3: lines is an integer: want an array", "f, line 4: edge is a string: want true or false", "f, line 6: key.made is an integer: want a string"}},
		"type, unknown":   {"days = 1.5\ncolour = 1", []string{"f, line 1: days is a float: want a whole number", "f, line 2: colour is not a setting here", "f: name is missing"}},
		"type, many rows": {"lines = [\n 1,\n]\ncolour = 1", []string{"f, line 2: lines is an integer: want a string"}},
		"array type":      {"lines = [1,\n2]\ncolour = 1", []string{"f, line 1: lines is an integer: want a string"}},
		"table":           {"key = 1", []string{"f, line 1: key is an integer: want a table", "f: name is missing"}},
		"tables":          {"file = 1", []string{"f, line 1: file is an integer: want tables, as in [[name]]", "f: name is missing"}},
		"syntax":          {"name = 5\ndays = \n", []string{"f, line 2: "}},
		"twice":           {"name = \"a\"\nname = \"b\"", []string{"f, line 2: "}},
		"second table":    {"name = \"a\"\n[[file]]\nname = \"x\"\n[[file]]\nname = 1\nsize = 2\n[[file]]\nname = 3", []string{"f, line 5: file.name is an integer: want a string", "f, line 6: file.size is not a setting here", "f, line 8: file.name is an integer: want a string"}},
		"missing":         {"days = 1", []string{"f: name is missing"}},
	} {
		t.Run(name, func(t *testing.T) {
			var p product
			f := settings.Decode("f", []byte(c.text), &p)
			if p.Name == "" {
				f.Key("name", "name is missing")
			}
			err := f.Err()
			var e *settings.Error
			if c.want == nil {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			if !errors.As(err, &e) || len(e.Faults) != len(c.want) {
				t.Fatalf("got %q, want %q", err, c.want)
			}
			for i, w := range c.want {
				if !strings.HasPrefix(e.Faults[i], w) {
					t.Errorf("fault %d is %q, want %q", i, e.Faults[i], w)
				}
			}
		})
	}
}

// Arrays of tables, in each other, by index; and what stands nowhere is at the table that lacks it.
func TestIndexes(t *testing.T) {
	var v struct {
		Stamp struct {
			Image []struct {
				Name  string `toml:"name"`
				Entry []struct {
					Key  string `toml:"key"`
					Size int    `toml:"size"`
				} `toml:"entry"`
			} `toml:"image"`
			Inline []struct {
				Key string `toml:"key"`
			} `toml:"inline"`
		} `toml:"stamp"`
	}
	f := settings.Decode("f", []byte(`[stamp]
inline = [{key = "a"}, {key = "b"}]
[[stamp.image]]
name = "a"
[[stamp.image.entry]]
key = "1"
[[stamp.image]]
name = "b"
[[stamp.image.entry]]
key = "2"
[[stamp.image.entry]]
key = "3"
size = "x"
`), &v)
	for _, key := range []string{"stamp.image[0].name", "stamp.image[0].size", "stamp.image[1].name", "stamp.image[1].entry[0].key", "stamp.image[1].entry[1].key", "stamp.image[1].entry[1].as",
		"stamp.image[1].entry[1].size", "stamp.image.name", "stamp.inline[1].key", "stamp.image[0].entry[0].key"} {
		f.Key(key, "%s", key)
	}
	want := `f, line 2: stamp.inline[1].key
f, line 3: stamp.image[0].size
f, line 4: stamp.image[0].name
f, line 4: stamp.image.name
f, line 6: stamp.image[0].entry[0].key
f, line 8: stamp.image[1].name
f, line 10: stamp.image[1].entry[0].key
f, line 11: stamp.image[1].entry[1].as
f, line 12: stamp.image[1].entry[1].key
f, line 13: stamp.image.entry.size is a string: want a whole number`
	if err := f.Err(); err == nil || err.Error() != want {
		t.Errorf("got\n%v\nwant\n%s", err, want)
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte("name = 5\ndays = \"x\"\nlines = [1,\n2]\n[key]\nmade = 1\n[[file]]\nname = 3"))
	f.Add([]byte("[key]\nmade = \"x\"\nmade = 2"))
	f.Fuzz(func(t *testing.T, b []byte) {
		var p product
		faults := settings.Decode("f", b, &p)
		faults.Key("name", "name is missing")
		if faults.Err() == nil {
			t.Error("a fault was lost")
		}
	})
}
