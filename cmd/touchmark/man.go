package main

import (
	"fmt"
	"os"

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
			if a.json {
				return a.printJSON(map[string]string{"directory": args[0]})
			}
			fmt.Fprintf(a.out, "Manual pages are in %s\n", args[0])
			return nil
		},
	}
}
