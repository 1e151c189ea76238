package main

import (
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/spf13/cobra"
)

func TestFold(t *testing.T) {
	const text = `One two three four five six seven eight nine ten
eleven. Ended on purpose.
Not joined.

KEYS
  a     one two three four five six seven eight nine
        ten
  1. one two three four five six seven eight nine
     ten
    touchmark a command that is long and stays long
    key = "x"  # a comment is never broken off, or it were none
  b     short`
	const want = `One two three four five six
seven eight nine ten eleven.
Ended on purpose.
Not joined.

KEYS
  a     one two three four five
        six seven eight nine ten
  1. one two three four five six
     seven eight nine ten
    touchmark a command that is long and stays long
    key = "x"  # a comment is never broken off, or it were none
  b     short`
	if got := fold(text, 32); got != want {
		t.Errorf("folded:\n%s\nwant:\n%s", got, want)
	}
	if got := fold(want, 32); got != want {
		t.Errorf("folded again:\n%s", got)
	}
}

// What is prose on a page, and every flag, is within the width of help.
func TestHelpWidth(t *testing.T) {
	var walk func(*cobra.Command)
	walk = func(c *cobra.Command) {
		var out strings.Builder
		c.SetOut(&out)
		if err := c.Help(); err != nil {
			t.Fatal(err)
		}
		text, examples, _ := strings.Cut(out.String(), "\nUsage:\n")
		_, flags, _ := strings.Cut(examples, "\nFlags:\n")
		for line := range strings.SplitSeq(text, "\n") {
			if strings.HasPrefix(line, "    ") || columns.MatchString(line) {
				continue // commands, examples and tables
			}
			flags += "\n" + line
		}
		for line := range strings.SplitSeq(flags, "\n") {
			if n := utf8.RuneCountInString(line); n > helpWidth {
				t.Errorf("%s: %d columns: %s", c.CommandPath(), n, line)
			}
		}
		for _, sub := range c.Commands() {
			walk(sub)
		}
	}
	walk(newRoot(new(app)))
}
