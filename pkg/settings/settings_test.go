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
