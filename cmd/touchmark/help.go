package main

import (
	"cmp"
	"fmt"
	"regexp"
	"strings"
	"unicode/utf8"

	"github.com/spf13/cobra"
)

// helpWidth is how wide help is printed.
const helpWidth = 100

// printHelp prints what cobra's own template does, but folds it.
func printHelp(c *cobra.Command, _ []string) {
	fmt.Fprintf(c.OutOrStdout(), "%s\n\n", fold(strings.TrimSpace(cmp.Or(c.Long, c.Short)), helpWidth))
	if c.Runnable() || c.HasSubCommands() {
		fmt.Fprint(c.OutOrStdout(), c.UsageString())
	}
}

// usageTemplate is cobra's, but that flags are wrapped.
func usageTemplate(root *cobra.Command) string {
	return strings.NewReplacer(".LocalFlags.FlagUsages", ".LocalFlags.FlagUsagesWrapped 100", ".InheritedFlags.FlagUsages", ".InheritedFlags.FlagUsagesWrapped 100").
		Replace(root.UsageTemplate())
}

var (
	numbered = regexp.MustCompile(`^ *[0-9]+\. `)
	columns  = regexp.MustCompile(`^ *\S.* {2,}`) // all but the last column
)

// fold fills the paragraphs of a text that are wider than width anew. A line in columns is filled in its last one. Lines that
// are indented by four and more are commands or examples, and stay.
func fold(text string, width int) string {
	lines, out := strings.Split(text, "\n"), []string(nil)
	for i := 0; i < len(lines); {
		first := lines[i]
		indent := len(first) - len(strings.TrimLeft(first, " "))
		at, code := indent, indent >= 4 && indent < 12
		if m := numbered.FindString(first); m != "" {
			at, code = len(m), false
		} else if m := columns.FindString(first); m != "" {
			at, code = len(m), utf8.RuneCountInString(m) > width*7/10 || first[len(m)] == '#' // a comment stays on its line
		}
		wide, words := utf8.RuneCountInString(first) > width, strings.Fields(first[at:])
		from := i
		for i++; i < len(lines) && !code; i++ {
			next := lines[i]
			more := strings.Fields(next)
			// A line that had room for the next one's first word was ended on purpose.
			if len(more) == 0 || len(next)-len(strings.TrimLeft(next, " ")) != utf8.RuneCountInString(first[:at]) || numbered.MatchString(next) ||
				columns.MatchString(next) || utf8.RuneCountInString(lines[i-1])+1+utf8.RuneCountInString(more[0]) <= width+10 {
				break
			}
			words = append(words, more...)
			wide = wide || utf8.RuneCountInString(next) > width
		}
		if code || !wide {
			out = append(out, lines[from:i]...)
			continue
		}
		line, empty := first[:at], true
		for _, w := range words {
			if !empty && utf8.RuneCountInString(line)+1+utf8.RuneCountInString(w) > width {
				out = append(out, line)
				line, empty = strings.Repeat(" ", utf8.RuneCountInString(first[:at])), true
			}
			if !empty {
				line += " "
			}
			line, empty = line+w, false
		}
		out = append(out, line)
	}
	return strings.Join(out, "\n")
}
