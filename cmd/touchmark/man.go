package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

func newMan(a *app) *cobra.Command {
	return &cobra.Command{
		Use: "man DIR", Short: "Write the manual pages", Args: cobra.ExactArgs(1),
		Example: "  touchmark man /usr/local/share/man/man1",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := os.MkdirAll(args[0], 0o755); err != nil {
				return err
			}
			if err := doc.GenManTree(cmd.Root(), &doc.GenManHeader{Title: "TOUCHMARK", Section: "1", Source: "touchmark"}, args[0]); err != nil {
				return err
			}
			for _, topic := range cmd.Root().Commands() {
				if !topic.IsAdditionalHelpTopicCommand() { // which the tree has
					continue
				}
				if err := os.WriteFile(filepath.Join(args[0], "touchmark-"+topic.Name()+".1"), topicPage(topic), 0o644); err != nil { //nolint:gosec // for everybody
					return err
				}
			}
			if a.json {
				return a.printJSON(map[string]string{"directory": args[0]})
			}
			fmt.Fprintf(a.out, "Manual pages are in %s\n", args[0])
			return nil
		},
	}
}

// topicPage is the manual page of a help topic, whose text stays as it was laid out: it has tables, and lines to be copied.
func topicPage(topic *cobra.Command) []byte {
	text := strings.NewReplacer(`\`, `\e`, "-", `\-`, "\n.", "\n\\&.", "\n'", "\n\\&'").Replace("\n" + strings.TrimSpace(topic.Long))
	return fmt.Appendf(nil, ".TH \"TOUCHMARK\" \"1\" \"\" \"touchmark\"\n.SH NAME\ntouchmark\\-%s \\- %s\n.SH DESCRIPTION\n.nf%s\n.fi\n.SH SEE ALSO\n\\fBtouchmark(1)\\fP\n",
		topic.Name(), topic.Short, text)
}
