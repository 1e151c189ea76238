package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Commands and help topics all have a manual page; a topic's shows its lines as they are.
func TestMan(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "man1")
	if code, text := attempt(t, t.TempDir(), "man", dir); code != 0 {
		t.Fatal(text)
	}
	root := newRoot(&app{})
	for _, c := range root.Commands() {
		if c.Hidden || c.Name() == "help" || c.Name() == "completion" {
			continue
		}
		page, err := os.ReadFile(filepath.Join(dir, "touchmark-"+c.Name()+".1"))
		if err != nil {
			t.Error(err)
			continue
		}
		if !c.IsAdditionalHelpTopicCommand() {
			continue
		}
		var shown []string
		for line := range strings.SplitSeq(string(page), "\n") {
			switch {
			case !strings.HasPrefix(line, ".") && !strings.HasPrefix(line, "'"):
				shown = append(shown, strings.NewReplacer(`\&`, "", `\e`, `\`, `\-`, "-").Replace(line))
			case !strings.HasPrefix(line, ".TH ") && !strings.HasPrefix(line, ".SH ") && line != ".nf" && line != ".fi":
				t.Errorf("%s: %q would be taken for a request", c.Name(), line)
			}
		}
		if !strings.Contains(strings.Join(shown, "\n"), strings.TrimSpace(c.Long)) {
			t.Errorf("%s: the page does not show the topic's text", c.Name())
		}
	}
}
