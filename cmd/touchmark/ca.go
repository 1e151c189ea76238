package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/pkg/ca"
)

func newCA(a *app) *cobra.Command {
	var showLine, exportLine, which, out string
	var force bool
	show := &cobra.Command{
		Use: "show --line DIR", Short: "Show a line's CA certificates", Args: cobra.NoArgs,
		Example: "  touchmark ca show --line line-3",
		RunE:    func(*cobra.Command, []string) error { return a.runCAShow(showLine) },
	}
	lineFlag(show, &showLine)
	export := &cobra.Command{
		Use: "export --line DIR", Short: "Print a CA certificate, as PEM", Args: cobra.NoArgs,
		Example: "  touchmark ca export --line line-3 --which issuing > issuing.pem",
		RunE:    func(*cobra.Command, []string) error { return a.runCAExport(exportLine, which, out, force) },
	}
	lineFlag(export, &exportLine)
	export.Flags().StringVar(&which, "which", "issuing", "root, issuing, or chain (issuing, then root)")
	export.Flags().StringVar(&out, "out", "-", "file to write, or - for standard output")
	export.Flags().BoolVar(&force, "force", false, "overwrite the file")
	_ = export.RegisterFlagCompletionFunc("which", cobra.FixedCompletions([]string{"root", "issuing", "chain"}, cobra.ShellCompDirectiveNoFileComp))
	var crlLine string
	crl := &cobra.Command{
		Use: "crl --line DIR", Short: "Write the list of revoked certificates anew", Args: cobra.NoArgs,
		Long: `crl writes crl.pem of the line: the certificates of units that were reworked, scrapped, voided or returned. Each of these writes it
as well; it says that it is current for 90 days.`,
		Example: "  touchmark ca crl --line line-3",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.onFloor(cmd.Context(), crlLine, func(f *floor) error { return f.writeCRL(cmd.Context()) })
		},
	}
	lineFlag(crl, &crlLine)
	return parent("ca", "The line's certificate authorities", show, export, crl)
}

func (a *app) runCAShow(dir string) error {
	l, err := a.loadLine(dir)
	if err != nil {
		return err
	}
	chain, err := readCertificates(l.path(issuingFile))
	if err != nil {
		return err
	}
	var rows [][]string
	for i, cert := range chain {
		name := "issuing"
		if i == len(chain)-1 && i > 0 {
			name = "root"
		}
		info := ca.Describe(cert)
		if a.json {
			if err := a.printJSON(struct {
				Which string `json:"which"`
				ca.Info
			}{name, info}); err != nil {
				return err
			}
			continue
		}
		rows = append(rows, []string{name, info.Subject, info.NotBefore.Format("2006-01-02"), info.NotAfter.Format("2006-01-02"), info.SHA256[:16]})
	}
	if a.json {
		return nil
	}
	return a.table([]string{"CA", "SUBJECT", "FROM", "UNTIL", "SHA-256"}, rows)
}

func (a *app) runCAExport(dir, which, out string, force bool) error {
	l, err := a.loadLine(dir)
	if err != nil {
		return err
	}
	chain, err := readCertificates(l.path(issuingFile))
	if err != nil {
		return err
	}
	switch which {
	case "chain":
	case "issuing":
		chain = chain[:1]
	case "root":
		if chain, err = readCertificates(l.path(rootFile)); err != nil {
			return err
		}
	default:
		return usageError{fmt.Errorf("--which %s: want root, issuing or chain", which)}
	}
	b := ca.EncodeChain(chain...)
	if out == "-" {
		if a.json {
			return a.printJSON(map[string]string{"which": which, "pem": string(b)})
		}
		_, err := a.out.Write(b)
		return err
	}
	if err := writeFile(out, b, os.FileMode(0o644), force); err != nil {
		return err
	}
	if a.json {
		return a.printJSON(map[string]string{"which": which, "out": out})
	}
	return nil
}
