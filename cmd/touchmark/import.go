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
	"github.com/touchmark/touchmark/pkg/registration"
)

type importOptions struct {
	bundle, service, trust, ca string
	residency                  string
	dryRun                     bool
}

func newImport(a *app) *cobra.Command {
	o := &importOptions{}
	c := &cobra.Command{
		Use:   "import BUNDLE --service FILE",
		Short: "Hand a bundle to the registration service",
		Long: `import verifies a bundle against the station's public key and hands it to the service, which verifies it again and takes
what is new. Entries that the service knows with the same content are unchanged; entries that it knows with another
content are conflicts: they are counted and named, and nothing is overwritten. Importing twice changes nothing.`,
		Example: `  touchmark import monday.tmb --service service/owner.connection --trust line-3/station.pem --dry-run
  touchmark import monday.tmb --service service/owner.connection --trust line-3/station.pem`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.bundle = args[0]
			return a.runImport(cmd.Context(), o)
		},
	}
	f := c.Flags()
	f.StringVar(&o.service, "service", "", "file with the service's connection string (required)")
	f.StringVar(&o.trust, "trust", "", "PEM file with the public key of the station that signed (default: what the service trusts)")
	f.StringVar(&o.ca, "ca", "", "PEM file with the CA of the service's certificate (default: ca.pem beside --service, else the system's)")
	residencyFlag(c, &o.residency)
	f.BoolVar(&o.dryRun, "dry-run", false, "count what would happen, and change nothing")
	_ = c.MarkFlagRequired("service")
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
	var info struct {
		IDScope string `json:"idScope"`
	}
	if err := svc.call(ctx, http.MethodGet, "/touchmark/info", nil, nil, nil, &info); err != nil {
		return importError(err)
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
		key, err := publicPEM(pub)
		if err != nil {
			return err
		}
		header.Set("Touchmark-Trust", base64.StdEncoding.EncodeToString(key))
	}
	st, err := f.Stat()
	if err != nil {
		return err
	}
	progress := a.newProgress("sending KiB", int(st.Size()>>10))
	var res registration.ImportResult
	err = svc.call(ctx, http.MethodPost, "/touchmark/bundles", url.Values{"dryRun": {strconv.FormatBool(o.dryRun)}}, header,
		&countingReader{r: f, step: func(n int64) { progress.step(int(n >> 10)) }}, &res)
	progress.clear()
	if err != nil {
		return importError(err)
	}
	if err := a.printImport(o, &res); err != nil {
		return err
	}
	if res.Conflicting > 0 {
		return hint(partialError{error: fmt.Errorf("%d entries conflict with what the service knows and were left out", res.Conflicting)},
			"delete the old enrollment first where the bundle is right")
	}
	return nil
}

// importError gives the service's refusals the exit code that the same fault has here.
func importError(err error) error {
	var se *serviceError
	if !errors.As(err, &se) {
		return err
	}
	switch {
	case se.code.Status() == http.StatusUnauthorized:
		return hint(refusedError{err}, "the connection string is not this service's, or not any more: take the one in owner.connection of its data directory")
	case se.code == dps.CodeBundleUntrusted:
		return fmt.Errorf("%w: %w", signed.ErrUntrusted, err)
	case se.code == dps.CodeBundleResidency:
		return fmt.Errorf("%w: %w", evidence.ErrResidency, err)
	case se.code == dps.CodeBundleCorrupt:
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
	if err := a.table(nil, [][]string{
		{verb, o.bundle},
		{"  new", fmt.Sprint(res.New)},
		{"  unchanged", fmt.Sprint(res.Unchanged)},
		{"  conflicting", fmt.Sprint(res.Conflicting)},
	}); err != nil || len(res.Conflicts) == 0 {
		return err
	}
	var rows [][]string
	for _, c := range res.Conflicts {
		rows = append(rows, []string{c.ID, c.Reason})
	}
	fmt.Fprintln(a.out)
	return a.table([]string{"CONFLICT", "REASON"}, rows)
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
