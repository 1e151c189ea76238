package main

import (
	"context"
	"fmt"
	"io/fs"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/pkg/label"
	"github.com/touchmark/touchmark/pkg/ledger"
	"github.com/touchmark/touchmark/pkg/mint"
	"github.com/touchmark/touchmark/pkg/station"
	"github.com/touchmark/touchmark/templates"
)

type labelOptions struct {
	line, template, serial, product, order, out string
	force                                       bool
}

func newLabel(a *app) *cobra.Command {
	p, s := &labelOptions{}, &labelOptions{}
	preview := &cobra.Command{
		Use: "preview TEMPLATE --out FILE", Short: "Render a label of no unit, to look at", Args: cobra.ExactArgs(1),
		Long: `preview renders a template with made-up values: PNG, PDF or ZPL by the file's ending. Templates are unit-50x25, tiny-30x10,
traveller-100x50, and those in the line's templates folder.`,
		Example: "  touchmark label preview unit-50x25 --out label.png",
		RunE: func(_ *cobra.Command, args []string) error {
			p.template = args[0]
			return a.runLabelPreview(p)
		},
	}
	lineFlag(preview, &p.line)
	preview.Flags().StringVar(&p.serial, "serial", "SAMPLE-0001", "serial to show")
	preview.Flags().StringVar(&p.product, "product", "sample", "product to show")
	preview.Flags().StringVar(&p.out, "out", "", "file to write: .png, .pdf or .zpl (required)")
	preview.Flags().BoolVar(&p.force, "force", false, "overwrite the file")
	_ = preview.MarkFlagRequired("out")
	sheet := &cobra.Command{
		Use: "sheet --line DIR --template NAME --out FILE", Short: "Render the labels of finished units as a PDF sheet", Args: cobra.NoArgs,
		Long: `sheet renders the labels of an order's units that have passed, or of all where no order is named. Each counts in the ledger as
printed, or as printed again, before the file is there.`,
		Example: "  touchmark label sheet --line line-3 --order PO-1234 --template unit-50x25 --out labels.pdf",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.onFloor(cmd.Context(), s.line, func(f *floor) error { return f.labelSheet(cmd.Context(), s) })
		},
	}
	lineFlag(sheet, &s.line)
	sheet.Flags().StringVar(&s.template, "template", "", "the label's template (required)")
	sheet.Flags().StringVar(&s.order, "order", "", "units of that order or lease only: its ID")
	sheet.Flags().StringVar(&s.product, "product", "", "product to show")
	sheet.Flags().StringVar(&s.out, "out", "", "PDF to write (required)")
	_ = sheet.MarkFlagRequired("template")
	_ = sheet.MarkFlagRequired("out")
	return parent("label", "Render labels", preview, sheet)
}

// loadLabel finds a label template: a line's own, or a built-in one.
func loadLabel(name string, own fs.FS) (*label.Template, error) {
	text, err := templates.Label(name, own)
	if err != nil {
		return nil, usageError{err}
	}
	return label.Parse(name, strings.NewReader(text))
}

func (a *app) runLabelPreview(o *labelOptions) error {
	var own fs.FS
	if o.line != "" {
		l, err := a.loadLine(o.line)
		if err != nil {
			return err
		}
		own = l.templateFS()
	}
	t, err := loadLabel(o.template, own)
	if err != nil {
		return err
	}
	format := label.Format(strings.TrimPrefix(filepath.Ext(o.out), "."))
	if format != label.PNG && format != label.PDF && format != label.ZPL {
		return usageError{fmt.Errorf("--out %s: want an ending .png, .pdf or .zpl", o.out)}
	}
	columns := make(map[string]string)
	for _, c := range t.Columns() {
		columns[c] = "column " + c
	}
	job, err := t.Render(format, label.Label{Serial: o.serial, RegistrationID: strings.ToLower(o.serial), Product: o.product, Revision: "0",
		Fingerprint: "0123456789ABCDEF", Date: time.Now(), Columns: columns})
	if err != nil {
		return usageError{err}
	}
	return writeFile(o.out, job.Data, 0o644, o.force)
}

func (f *floor) labelSheet(ctx context.Context, o *labelOptions) error {
	t, err := loadLabel(o.template, f.templateFS())
	if err != nil {
		return err
	}
	if exists(o.out) {
		return fmt.Errorf("%s exists already", o.out)
	}
	jobs, err := f.ledger.Jobs(ctx)
	if err != nil {
		return err
	}
	mine := make(map[int64]bool)
	for _, j := range jobs {
		mine[j.ID] = o.order == "" || j.Grant == o.order
	}
	var labels []label.Label
	for u, err := range f.ledger.Units(ctx, 0) {
		if err != nil {
			return err
		}
		if !mine[u.Job] || u.State < ledger.Sealed {
			continue
		}
		l := label.Label{Serial: u.Serial, RegistrationID: u.RegistrationID, Product: o.product, Revision: strconv.FormatInt(u.Revision, 10),
			Date: u.At}
		if err := f.ledger.Fill(ctx, &u); err != nil {
			return err
		}
		if pub, err := mint.PublicKey(u); err == nil {
			if l.Fingerprint, err = label.Fingerprint(pub); err != nil {
				return err
			}
		}
		printed, err := f.ledger.Notes(ctx, u.ID, station.LabelNote)
		if err != nil {
			return err
		}
		kind := station.LabelNote
		if len(printed) > 0 {
			kind = station.ReprintNote
		}
		n, err := f.ledger.AddNote(ctx, ledger.Note{Unit: u.ID, Kind: kind, Data: []byte("sheet")})
		if err != nil {
			return err
		}
		if kind == station.ReprintNote {
			l.Copy = int(n)
		}
		labels = append(labels, l)
	}
	if labels == nil {
		return fmt.Errorf("no unit of the line has passed: there is nothing to print")
	}
	pdf, err := t.PDF(labels...)
	if err != nil {
		return err
	}
	if err := writeFile(o.out, pdf, 0o644, false); err != nil {
		return err
	}
	f.a.note("%d labels in %s", len(labels), o.out)
	return nil
}
