package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/operator"
)

type enrollmentExportOptions struct {
	serviceOptions
	out, format, certificates string
	keys, portable, force     bool
}

func (o *enrollmentExportOptions) flags(c *cobra.Command) {
	o.serviceOptions.flags(c)
	f := c.Flags()
	f.StringVar(&o.out, "out", "-", "file to write; - is standard output")
	f.BoolVar(&o.keys, "with-keys", false, "ask the service for the symmetric keys too: a call for each enrollment that has some")
	f.StringVar(&o.certificates, "certificates", "", "folder with certificates, PEM or DER, to fill in where the service shows thumbprints")
	f.BoolVar(&o.portable, "portable", false, "leave out what would not be the same enrollment elsewhere")
	f.BoolVar(&o.force, "force", false, "overwrite the file")
	_ = c.MarkFlagDirname("certificates")
}

const exportText = `Each line of the file is an enrollment as the service API has it, without what services make (etag, times, registration state): touchmark
enrollment import and Azure's bulk call take them back. What services do not show is missing, and every such enrollment is named:
keys without --with-keys; certificates, unless --certificates has them, since services show their thumbprints alone.

A file with keys is for its owner alone (mode 0600).`

func newEnrollmentExport(a *app, k operator.Kind) *cobra.Command {
	o := &enrollmentExportOptions{}
	name := string(k)
	c := &cobra.Command{
		Use: "export --service FILE --out FILE", Short: "Write them to a file: JSON lines or CSV", Args: cobra.NoArgs,
		Long:    exportText,
		Example: "  touchmark " + name + " export --service azure.connection --with-keys --out " + name + "s.jsonl\n  touchmark " + name + " export --service azure.connection --format csv --out " + name + "s.csv",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.onService(cmd.Context(), &o.serviceOptions, func(ctx context.Context, svc *service) error { return a.runExport(ctx, svc, o, k) })
		},
	}
	o.flags(c)
	c.Flags().StringVar(&o.format, "format", "jsonl", "jsonl or csv")
	_ = c.RegisterFlagCompletionFunc("format", cobra.FixedCompletions([]string{"jsonl", "csv"}, cobra.ShellCompDirectiveNoFileComp))
	return c
}

func newExport(a *app) *cobra.Command {
	o := &enrollmentExportOptions{format: "jsonl"}
	var all bool
	c := &cobra.Command{
		Use: "export --all --service FILE --out FILE", Short: "Write all enrollments and groups of a service to a file", Args: cobra.NoArgs,
		Long:    "export writes the groups of a service, then its enrollments.\n\n" + exportText + "\ntouchmark import takes the whole to another service.",
		Example: "  touchmark export --all --service azure.connection --with-keys --out all.jsonl\n  touchmark import all.jsonl --service service/owner.connection --dry-run",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.onService(cmd.Context(), &o.serviceOptions, func(ctx context.Context, svc *service) error {
				return a.runExport(ctx, svc, o, operator.Group, operator.Individual)
			})
		},
	}
	o.flags(c)
	c.Flags().BoolVar(&all, "all", false, "enrollments and groups (required)")
	_ = c.MarkFlagRequired("all")
	return c
}

func (a *app) runExport(ctx context.Context, svc *service, o *enrollmentExportOptions, kinds ...operator.Kind) (err error) {
	if o.format != "jsonl" && o.format != "csv" {
		return usageError{fmt.Errorf("--format %s: want jsonl or csv", o.format)}
	}
	cfg := operator.ExportConfig{Keys: o.keys}
	if cfg.Certificates, err = certificatesIn(o.certificates); err != nil {
		return err
	}
	out := io.Writer(a.out)
	if o.out == "-" {
		if o.keys && isTerminal(a.out) {
			return hint(usageError{errors.New("keys do not go to a terminal")}, "name a file with --out")
		}
	} else {
		f, finish, err2 := createFile(o.out, o.force)
		if err2 != nil {
			return err2
		}
		out = f
		defer func() { err = finish(err) }()
	}
	buf := bufio.NewWriter(out)
	w := operator.NewJSONWriter(buf)
	if o.format == "csv" {
		w = operator.NewCSVWriter(buf, kinds[0])
	}
	n, missing, left := 0, make(map[string]int), 0
	progress := a.newProgress("", 0)
	for _, k := range kinds {
		err := svc.Export(ctx, k, cfg, func(x *operator.Exported) error {
			if o.portable && len(x.Missing) > 0 {
				left++
			} else {
				n++
				if err := w.Write(x); err != nil {
					return err
				}
			}
			for _, m := range x.Missing {
				if missing[m]++; missing[m] <= maxMissing {
					progress.clear()
					a.note("%s lacks %s", printable(x.Document.String()), printable(m))
				}
			}
			progress.say(func() string { return fmt.Sprintf("exporting: %d", n+left) })
			return nil
		})
		if err != nil {
			return err
		}
	}
	progress.clear()
	if err := errors.Join(w.Flush(), buf.Flush()); err != nil {
		return err
	}
	for _, m := range slices.Sorted(maps.Keys(missing)) {
		a.note("%d in all lack %s", missing[m], printable(m))
	}
	a.note("exported %d", n)
	if left > 0 {
		return hint(partialError{error: fmt.Errorf("%d enrollments were left out: they would not be the same elsewhere", left)},
			"what they lack stands above: --with-keys and --certificates bring the keys and certificates; make the others at the other service, or export without --portable")
	}
	return nil
}

// maxMissing is how many enrollments are named of each kind of thing that they lack.
const maxMissing = 20

// certificatesIn returns the certificates in the files of a folder, by thumbprint. Files that hold none are passed over.
func certificatesIn(dir string) (map[string]*dps.X509Certificate, error) {
	if dir == "" {
		return nil, nil
	}
	found := make(map[string]*dps.X509Certificate)
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		b, err := readSmall(path)
		if err != nil {
			return nil // too large for a certificate
		}
		c, err := operator.Certificate(b)
		if err != nil {
			return nil
		}
		print, err := operator.Thumbprint(c)
		found[print] = c
		return err
	})
	if err != nil {
		return nil, usageError{fmt.Errorf("--certificates: %w", err)}
	}
	return found, nil
}

// createFile opens a file that is put in place when it is finished without an error, for its owner alone.
func createFile(path string, force bool) (*os.File, func(error) error, error) {
	if !force && exists(path) {
		return nil, nil, hint(usageError{fmt.Errorf("%s exists already", path)}, "say --force to overwrite it")
	}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*") // 0600
	if err != nil {
		return nil, nil, fmt.Errorf("writing %s: %w", path, err)
	}
	return f, func(err error) error {
		if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
			err = os.Rename(f.Name(), path)
		}
		if err != nil {
			_ = os.Remove(f.Name())
			return err
		}
		return syncDir(filepath.Dir(path))
	}, nil
}
