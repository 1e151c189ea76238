package main

import (
	"context"
	"crypto"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/hsm/signed"
	"github.com/touchmark/touchmark/pkg/bundle"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/evidence"
	"github.com/touchmark/touchmark/pkg/operator"
	"github.com/touchmark/touchmark/pkg/registration"
)

type importOptions struct {
	serviceOptions
	rowsOptions
	bundle, trust, identity string
	holder, residency       string
	dryRun, requireOrder    bool
}

func newImport(a *app) *cobra.Command {
	o := &importOptions{}
	c := &cobra.Command{
		Use:   "import BUNDLE --service FILE",
		Short: "Hand a bundle to the registration service",
		Long: `import verifies a bundle against the station's public key and hands it to the service, which verifies it again and takes
what is new. Entries that the service knows with the same content are unchanged; entries that it knows with another
content are conflicts: they are counted and named, and nothing is overwritten. Importing twice changes nothing.

A reworked unit's newer revision takes the place of the older one, and what was retired never registers again, in whatever
order bundles are imported. A bundle that was made on a production order is held against it: what the order does not have,
and what goes beyond its quantity, is refused and named.

A service that is not touchmark's knows no bundles: the bundle is verified here and its enrollments go over one by one, as touchmark
enrollment import does it. --update, --skip-existing, --stop-on-error, --parallel, --rename-hub and --identity are for that. Instead of a bundle it takes a
file that touchmark export wrote, for any service.`,
		Example: `  touchmark import monday.tmb --service service/owner.connection --trust line-3/station.pem --dry-run
  touchmark import monday.tmb --service service/owner.connection --trust line-3/station.pem
  touchmark import monday.tmb --service azure.connection --trust line-3/station.pem --identity operator.key`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.bundle = args[0]
			return a.runImport(cmd.Context(), o)
		},
	}
	f := c.Flags()
	o.serviceOptions.flags(c)
	f.StringVar(&o.trust, "trust", "", "PEM file with the public key of the station that signed (default: what the service trusts)")
	residencyFlag(c, &o.residency)
	f.StringVar(&o.holder, "holder", "", "PEM file with the public key of the station that holds the order, for a bundle of a lease (default: what the service trusts)")
	f.BoolVar(&o.requireOrder, "require-order", false, "refuse the bundle unless it was made on a production order of an owner's")
	f.StringVar(&o.identity, "identity", "", "file with the age identity that keys are sealed to, for a service that takes no bundles")
	o.rowsOptions.flags(c)
	f.BoolVar(&o.dryRun, "dry-run", false, "count what would happen, and change nothing")
	return c
}

func (a *app) runImport(ctx context.Context, o *importOptions) error {
	svc, err := a.openService(o.service, o.ca)
	if err != nil {
		return err
	}
	f, err := openFile(o.bundle)
	if err != nil {
		return err
	}
	defer f.Close()
	rows, err := isRows(f)
	if err != nil {
		return err
	}
	if rows {
		return importError(a.importRows(ctx, svc, o.bundle, "", &o.rowsOptions, o.dryRun))
	}
	info, err := svc.Info(ctx)
	if errors.Is(err, operator.ErrUnsupported) {
		return importError(a.unpackBundle(ctx, svc, o))
	}
	if err != nil {
		return importError(err)
	}
	if o.update || o.skip || o.stop || o.identity != "" || len(o.hubs) > 0 {
		return usageError{errors.New("--update, --skip-existing, --stop-on-error, --rename-hub and --identity are for services that take no bundles: this one does")}
	}
	header := http.Header{"Content-Type": {"application/x-tar"}}
	residency, err := parseResidency(o.residency)
	if err != nil {
		return err
	}
	if residency != "" {
		header.Set("Touchmark-Residency", string(residency))
	}
	if o.trust != "" {
		pub, err := readPublicKey(o.trust)
		if err != nil {
			return err
		}
		sum, err := bundle.Verify(f, bundle.OpenConfig{Trusted: []crypto.PublicKey{pub}, RequireResidency: residency})
		if err != nil {
			return fmt.Errorf("verifying %s: %w", o.bundle, err)
		}
		if dps.Fold(sum.IDScope) != dps.Fold(info.IDScope) {
			return hint(fmt.Errorf("%s is for ID scope %s, the service is %s: its devices would never find it", o.bundle, sum.IDScope, info.IDScope),
				"the line's ID scope is set when it is made: touchmark init --id-scope %s", info.IDScope)
		}
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			return err
		}
		if err := setKey(header, "Touchmark-Trust", pub); err != nil {
			return err
		}
	}
	if o.holder != "" {
		pub, err := readPublicKey(o.holder)
		if err != nil {
			return err
		}
		if err := setKey(header, "Touchmark-Holder", pub); err != nil {
			return err
		}
	}
	st, err := f.Stat()
	if err != nil {
		return err
	}
	progress := a.newProgress("sending KiB", int(st.Size()>>10))
	var res registration.ImportResult
	err = svc.call(ctx, http.MethodPost, "/touchmark/bundles", url.Values{"dryRun": {strconv.FormatBool(o.dryRun)}, "requireOrder": {strconv.FormatBool(o.requireOrder)}}, header,
		&countingReader{r: f, step: func(n int64) { progress.step(int(n >> 10)) }}, &res)
	progress.clear()
	if err != nil {
		return importError(err)
	}
	if err := a.printImport(o, &res); err != nil {
		return err
	}
	if res.Refused > 0 {
		return hint(partialError{error: fmt.Errorf("%d entries are refused: the bundle's order does not allow them", res.Refused)},
			"touchmark reconcile shows what the order was for and what came; bundles that tell of returned units may have to be imported first")
	}
	if res.Conflicting > 0 {
		return hint(partialError{error: fmt.Errorf("%d entries conflict with what the service knows and were left out", res.Conflicting)},
			"delete the old enrollment first where the bundle is right")
	}
	return nil
}

func setKey(header http.Header, name string, pub crypto.PublicKey) error {
	key, err := publicPEM(pub)
	if err == nil {
		header.Set(name, base64.StdEncoding.EncodeToString(key))
	}
	return err
}

// importError gives the service's refusals the exit code that the same fault has here.
func importError(err error) error {
	var se *operator.Error
	if !errors.As(err, &se) {
		return connectHint(err)
	}
	switch {
	case errors.Is(err, operator.ErrUnauthorized):
		return hint(refusedError{err}, "the connection string is not this service's, or not any more: take the one in owner.connection of its data directory")
	case se.Code == dps.CodeBundleUntrusted:
		return fmt.Errorf("%w: %w", signed.ErrUntrusted, err)
	case se.Code == dps.CodeBundleResidency:
		return fmt.Errorf("%w: %w", evidence.ErrResidency, err)
	case se.Code == dps.CodeBundleOrder:
		return fmt.Errorf("%w: %w", registration.ErrOrder, err)
	case se.Code == dps.CodeBundleCorrupt:
		return fmt.Errorf("%w: %w", bundle.ErrCorrupt, err)
	}
	return err
}

func (a *app) printImport(o *importOptions, res *registration.ImportResult) error {
	if a.json {
		return a.printJSON(struct {
			*registration.ImportResult
			DryRun bool `json:"dryRun"`
		}{res, o.dryRun})
	}
	verb := "Imported"
	if o.dryRun {
		verb = "Would import"
	}
	rows := [][]string{
		{verb, o.bundle},
		{"  new", fmt.Sprint(res.New)},
		{"  unchanged", fmt.Sprint(res.Unchanged)},
		{"  conflicting", fmt.Sprint(res.Conflicting)},
	}
	for _, c := range []struct {
		name string
		n    int
	}{{"replaced", res.Replaced}, {"retired", res.Retired}, {"stale", res.Stale}, {"refused", res.Refused}} {
		if c.n > 0 {
			rows = append(rows, []string{"  " + c.name, fmt.Sprint(c.n)})
		}
	}
	if err := a.table(nil, rows); err != nil {
		return err
	}
	for _, l := range []struct {
		title string
		names []registration.ImportConflict
	}{{"CONFLICT", res.Conflicts}, {"STALE", res.StaleEntries}, {"REFUSED", res.Refusals}} {
		if len(l.names) == 0 {
			continue
		}
		rows = nil
		for _, c := range l.names {
			rows = append(rows, []string{c.ID, c.Reason})
		}
		fmt.Fprintln(a.out)
		if err := a.table([]string{l.title, "REASON"}, rows); err != nil {
			return err
		}
	}
	return nil
}

// countingReader reports how much was read.
type countingReader struct {
	r    io.Reader
	n    int64
	step func(int64)
}

func (c *countingReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	c.step(c.n)
	return n, err
}
