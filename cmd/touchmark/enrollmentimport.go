package main

import (
	"bytes"
	"context"
	"crypto"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"filippo.io/age"
	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/pkg/bundle"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/operator"
)

// rowsOptions say how enrollments from a file go to a service.
type rowsOptions struct {
	update, skip, stop bool
	certificates       string
	hubs               []string
	parallel           int
	kind               operator.Kind // of the rows that are wanted; empty for both
}

func (o *rowsOptions) flags(c *cobra.Command) {
	f := c.Flags()
	f.BoolVar(&o.update, "update", false, "put rows in the place of enrollments that differ from them")
	f.BoolVar(&o.skip, "skip-existing", false, "leave alone what is there, without comparing it")
	f.BoolVar(&o.stop, "stop-on-error", false, "end with the first row that cannot be taken, and the ten that it goes with")
	f.StringArrayVar(&o.hubs, "rename-hub", nil, "FROM=TO: the hub is called otherwise at this service; again for more")
	f.IntVar(&o.parallel, "parallel", 4, "calls under way at once, while the service does not ask for fewer")
	c.MarkFlagsMutuallyExclusive("update", "skip-existing")
}

func (o *rowsOptions) rename() (map[string]string, error) {
	m := make(map[string]string)
	for _, h := range o.hubs {
		from, to, _ := strings.Cut(h, "=")
		if err := errors.Join(checkHost(from), checkHost(to)); err != nil {
			return nil, usageError{fmt.Errorf("--rename-hub %s: %w", h, err)}
		}
		m[dps.Fold(from)] = to
	}
	return m, nil
}

// mode names what an import does with what exists, for its journal.
func (o *rowsOptions) mode() string {
	return fmt.Sprintf("kind=%s update=%t skip=%t hubs=%s", o.kind, o.update, o.skip, strings.Join(o.hubs, ","))
}

func newEnrollmentImport(a *app, k operator.Kind) *cobra.Command {
	o := &struct {
		serviceOptions
		rowsOptions
		dryRun bool
	}{}
	name := string(k)
	c := &cobra.Command{
		Use: "import FILE --service FILE", Short: "Take them from a file: CSV or JSON", Args: cobra.ExactArgs(1),
		Long: `import sends every row of a file to the service: a CSV file with a header, or JSON objects of the service API, one after the other or
in an array; - is standard input. Columns, in any order:

  ` + columnsText(k) + `

A certificate is a file below the folder of the CSV file (--certificates names another), or base64 itself. iotHubs are separated by spaces;
tags and desired are JSON objects; reprovision is migrate, reset or never. Keys that are left out the service makes.

Rows that the service knows with the same content are unchanged. One that differs is a conflict and stays as it is, unless --update says
otherwise. When an import is cut off, the same command goes on: FILE.journal remembers how far it came, and without it rows are compared
again. The service's limits are kept to.

--dry-run shows what would happen, member by member. touchmark's service is asked whether it would take each row by itself: a
hub that is not linked, a certificate of another enrollment, a device below itself. It does not foresee what rows of the file are to one
another, such as one certificate in two of them, nor a quota that they use up. Azure's services are not asked, nor is one whose policy may not
write enrollments: rows are compared with what is there, and may be refused still; the summary counts them as not judged.`,
		Example: "  touchmark " + name + " import " + name + "s.csv --service azure.connection --dry-run\n  touchmark " + name + " import " + name + "s.jsonl --service service/owner.connection --update",
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.onService(cmd.Context(), &o.serviceOptions, func(ctx context.Context, svc *service) error {
				return a.importRows(ctx, svc, args[0], k, &o.rowsOptions, o.dryRun)
			})
		},
	}
	o.serviceOptions.flags(c)
	o.rowsOptions.flags(c)
	c.Flags().StringVar(&o.certificates, "certificates", "", "folder of the certificates that a CSV file names (default: that of the file)")
	c.Flags().BoolVar(&o.dryRun, "dry-run", false, "show what would happen, and change nothing")
	_ = c.MarkFlagDirname("certificates")
	return c
}

func columnsText(k operator.Kind) string {
	var lines []string
	line := ""
	for _, c := range operator.Columns(k) {
		if len(line)+len(c) > 100 {
			lines, line = append(lines, line), ""
		}
		line += c + " "
	}
	return strings.Join(append(lines, line), "\n  ")
}

// importRows sends the rows of a file to a service; of either kind, with k empty.
func (a *app) importRows(ctx context.Context, svc *service, path string, k operator.Kind, o *rowsOptions, dryRun bool) error {
	o.kind = k
	cfg := operator.RowsConfig{Kind: k}
	var err error
	if cfg.Hubs, err = o.rename(); err != nil {
		return err
	}
	dir := o.certificates
	if dir == "" && path != "-" {
		dir = filepath.Dir(path)
	}
	if dir != "" {
		root, err := os.OpenRoot(dir)
		if err != nil {
			return usageError{err}
		}
		defer root.Close()
		cfg.Files = root.FS()
	}
	open := func() (operator.Source, func() error, error) {
		if path == "-" {
			return operator.NewRows(a.in, cfg), func() error { return nil }, nil
		}
		f, err := openFile(path)
		if err != nil {
			return nil, nil, err
		}
		return operator.NewRows(f, cfg), f.Close, nil
	}
	return a.importFrom(ctx, svc, path, open, o, dryRun)
}

// importFrom sends rows to a service, and tells what becomes of them.
func (a *app) importFrom(ctx context.Context, svc *service, path string, open func() (operator.Source, func() error, error), o *rowsOptions, dryRun bool) (err error) {
	cfg := operator.ImportConfig{DryRun: dryRun, Update: o.update, SkipExisting: o.skip, StopOnError: o.stop, Parallel: o.parallel}
	if path != "-" && !dryRun {
		if cfg.Journal, err = operator.OpenJournal(path+".journal", svc.Host(), o.mode()); err != nil {
			return err
		}
		if n := cfg.Journal.Counts.Rows; n > 0 {
			a.note("an earlier import of %s came to row %d: going on there", path, n)
		}
	}
	progress := a.newProgress("", 0)
	rows := 0
	if cfg.Journal != nil {
		rows = cfg.Journal.Counts.Rows
	}
	cfg.Report = func(v operator.Verdict) error {
		rows++
		progress.say(func() string {
			text := fmt.Sprintf("importing: %d rows", rows)
			if rate := svc.Limiter().Rate(); rate > 0 {
				text += fmt.Sprintf(", the service allows about %.1f calls/s", rate)
			}
			return text
		})
		if a.json {
			return a.printJSON(v)
		}
		if !dryRun && !v.Bad() && v.Outcome != operator.OutcomeUpdated && v.Reason == "" || v.Outcome == operator.OutcomeLeftOut && !dryRun {
			return nil
		}
		progress.clear()
		return a.printRowVerdict(&v, dryRun)
	}
	var counts operator.Counts
	for range 2 {
		src, done, err2 := open()
		if err2 != nil {
			return err2
		}
		counts, err = svc.Import(ctx, src, cfg)
		err = errors.Join(err, done())
		if !errors.Is(err, operator.ErrOtherFile) {
			break
		}
		a.note("%s has changed since: beginning again; what is there already is compared", path)
		if err := cfg.Journal.Remove(); err != nil {
			return err
		}
		if cfg.Journal, err = operator.OpenJournal(path+".journal", svc.Host(), o.mode()); err != nil {
			return err
		}
		rows = 0
	}
	progress.clear()
	if cfg.Journal != nil {
		if err == nil && !(o.stop && counts.Bad() > 0) {
			err = cfg.Journal.Remove()
		} else {
			err = errors.Join(err, cfg.Journal.Flush())
		}
	}
	if perr := a.printCounts(path, &counts, dryRun); perr != nil {
		return perr
	}
	done := counts.New + counts.Updated + counts.Unchanged + counts.Skipped + counts.LeftOut
	switch {
	case err != nil && counts.Rows > 0:
		return partialError{error: importError(err), done: fmt.Sprintf("%d rows are done; the same command goes on from there", counts.Rows)}
	case err != nil:
		return err
	case counts.Bad() > 0:
		err = partialError{error: fmt.Errorf("%d of %d rows are not at the service as they should be", counts.Bad(), counts.Bad()+done)}
		if counts.Conflicting > 0 && !o.update {
			return hint(err, "of rows that conflict --update puts the file's in the place of what is there; mend the others, and run the same command again")
		}
		return hint(err, "mend these rows and run the same command again: the others are unchanged then")
	}
	return nil
}

func (a *app) printRowVerdict(v *operator.Verdict, dryRun bool) error {
	text := string(v.Outcome)
	if dryRun && v.Outcome == operator.OutcomeUpdated {
		text = "would change"
	}
	color := map[operator.Outcome]string{operator.OutcomeNew: "32", operator.OutcomeUpdated: "33"}[v.Outcome]
	if v.Bad() {
		color = "31"
	}
	if color != "" {
		text = a.paint(a.out, color, text)
	}
	where := fmt.Sprintf("line %d", v.Line)
	if v.ID != "" {
		where += ", " + strings.TrimSpace(string(v.Kind)+" "+v.ID)
	}
	if _, err := fmt.Fprintf(a.out, "%s: %s", printable(where), text); err != nil {
		return err
	}
	if v.Reason != "" {
		fmt.Fprintf(a.out, ": %s", printable(v.Reason))
	}
	if v.TrackingID != "" {
		fmt.Fprintf(a.out, " (tracking ID %s)", printable(v.TrackingID))
	}
	_, err := fmt.Fprintln(a.out)
	for _, c := range v.Changes {
		_, err = fmt.Fprintln(a.out, "    "+printable(c.String()))
	}
	return err
}

func (a *app) printCounts(path string, c *operator.Counts, dryRun bool) error {
	if a.json {
		return a.printJSON(struct {
			*operator.Counts
			DryRun bool `json:"dryRun"`
		}{c, dryRun})
	}
	verb := "Imported"
	if dryRun {
		verb = "Would import"
	}
	rows := [][]string{{verb, path}}
	for _, n := range []struct {
		name  string
		count int
		shown bool
	}{{"new", c.New, true}, {"unchanged", c.Unchanged, true}, {"changed", c.Updated, c.Updated > 0}, {"conflicting", c.Conflicting, true}, {"skipped", c.Skipped, c.Skipped > 0},
		{"not valid", c.Invalid, c.Invalid > 0}, {"refused", c.Failed, c.Failed > 0}, {"left out", c.LeftOut, c.LeftOut > 0},
		{"not judged by the service", c.Unjudged, c.Unjudged > 0}} {
		if n.shown {
			rows = append(rows, []string{"  " + n.name, fmt.Sprint(n.count)})
		}
	}
	return a.table(nil, rows)
}

// isRows reports whether a file begins as JSON does, which no bundle does.
func isRows(f *os.File) (bool, error) {
	b := make([]byte, 512)
	n, err := io.ReadFull(f, b)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return false, err
	}
	_, err = f.Seek(0, io.SeekStart)
	text := bytes.TrimLeft(bytes.TrimPrefix(b[:n], []byte("\ufeff")), " \t\r\n")
	return len(text) > 0 && (text[0] == '{' || text[0] == '['), err
}

// unpackBundle sends the enrollments of a bundle to a service that takes no bundles, one after the other. The bundle is verified to its
// last octet before the first goes.
func (a *app) unpackBundle(ctx context.Context, svc *service, o *importOptions) error {
	if o.trust == "" {
		return hint(usageError{fmt.Errorf("the service at %s takes no bundles: %s has to be verified here", svc.Host(), o.bundle)}, "name the public key of the station that signed it with --trust station.pem")
	}
	residency, err := parseResidency(o.residency)
	if err != nil {
		return err
	}
	pub, err := readPublicKey(o.trust)
	if err != nil {
		return err
	}
	if o.requireOrder || o.holder != "" {
		return hint(usageError{errors.New("--require-order and --holder are for a service that takes bundles")}, "touchmark bundle verify --owner holds a bundle against its order")
	}
	if _, err := o.rename(); err != nil {
		return err
	}
	cfg := bundle.OpenConfig{Trusted: []crypto.PublicKey{pub}, RequireResidency: residency}
	if o.identity != "" {
		b, err := readSmall(o.identity)
		if err != nil {
			return usageError{fmt.Errorf("--identity: %w", err)}
		}
		cfg.Identities, err = age.ParseIdentities(strings.NewReader(string(b)))
		clear(b)
		if err != nil {
			return usageError{fmt.Errorf("--identity %s holds no age identity", o.identity)}
		}
	}
	f, err := openFile(o.bundle)
	if err != nil {
		return err
	}
	defer f.Close()
	sum, err := bundle.Verify(f, cfg)
	if err != nil {
		return fmt.Errorf("verifying %s: %w", o.bundle, err)
	}
	if sum.Counts.Sealed > 0 && o.identity == "" {
		return hint(usageError{fmt.Errorf("%d keys in %s are sealed", sum.Counts.Sealed, o.bundle)}, "name the file with the age identity that they were sealed to with --identity")
	}
	a.note("%s is for devices of ID scope %s: they find this service only if it has that one", o.bundle, sum.IDScope)
	open := func() (operator.Source, func() error, error) {
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			return nil, nil, err
		}
		r, err := bundle.Open(f, cfg)
		if err != nil {
			return nil, nil, err
		}
		return operator.NewBundleRows(r), func() error { r.Close(); return nil }, nil
	}
	return a.importFrom(ctx, svc, o.bundle, open, &o.rowsOptions, o.dryRun)
}
