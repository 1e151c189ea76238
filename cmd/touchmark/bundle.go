package main

import (
	"crypto"
	"fmt"
	"slices"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/pkg/bundle"
	"github.com/touchmark/touchmark/pkg/evidence"
)

func newBundle(a *app) *cobra.Command {
	var trustShow, trustVerify, trustEntries, residency, makers string
	trust := func(c *cobra.Command, dst *string) {
		c.Flags().StringVar(dst, "trust", "", "PEM file with the public key of the station that signed")
	}
	show := &cobra.Command{
		Use: "show FILE", Short: "Show what a bundle says of itself", Args: cobra.ExactArgs(1),
		Long:    "show prints a bundle's manifest and who signed it. Without --trust nothing of it is verified, and it says so.",
		Example: "  touchmark bundle show monday.tmb\n  touchmark bundle show monday.tmb --trust line-3/station.pem",
		RunE:    func(_ *cobra.Command, args []string) error { return a.runBundleShow(args[0], trustShow) },
	}
	trust(show, &trustShow)
	verify := &cobra.Command{
		Use: "verify FILE --trust PEM", Short: "Verify a bundle to its last byte", Args: cobra.ExactArgs(1),
		Example: "  touchmark bundle verify monday.tmb --trust line-3/station.pem\n  touchmark bundle verify monday.tmb --trust line-3/station.pem --require-residency token",
		RunE: func(_ *cobra.Command, args []string) error {
			return a.runBundleVerify(args[0], trustVerify, residency, makers)
		},
	}
	trust(verify, &trustVerify)
	residencyFlag(verify, &residency)
	verify.Flags().StringVar(&makers, "makers", "", "folder with the certificates of TPM manufacturers: refuse devices with TPMs of others")
	_ = verify.MarkFlagDirname("makers")
	entries := &cobra.Command{
		Use: "entries FILE --trust PEM", Short: "Print the entries of a bundle, as JSON, one per line", Args: cobra.ExactArgs(1),
		Long:    "entries prints each entry once the part of the bundle that holds it is verified. Sealed secrets stay sealed.",
		Example: "  touchmark bundle entries monday.tmb --trust line-3/station.pem",
		RunE:    func(_ *cobra.Command, args []string) error { return a.runBundleEntries(args[0], trustEntries) },
	}
	trust(entries, &trustEntries)
	return parent("bundle", "Look into bundles, and verify them", show, verify, entries, newBundleExport(a))
}

// residencyFlag adds --require-residency to a command.
func residencyFlag(c *cobra.Command, dst *string) {
	c.Flags().StringVar(dst, "require-residency", "", fmt.Sprintf("refuse devices whose key is not shown to live there: one of %v", evidence.Residencies))
	_ = c.RegisterFlagCompletionFunc("require-residency", cobra.FixedCompletions([]string{string(evidence.Token), string(evidence.TPM)}, cobra.ShellCompDirectiveNoFileComp))
}

func parseResidency(s string) (evidence.Residency, error) {
	if s == "" {
		return "", nil
	}
	r, err := evidence.ParseResidency(s)
	if err != nil {
		return "", usageError{fmt.Errorf("--require-residency: %w", err)}
	}
	return r, nil
}

func openConfig(trust string) (bundle.OpenConfig, error) {
	if trust == "" {
		return bundle.OpenConfig{}, usageError{fmt.Errorf("whom to trust? name the station's public key with --trust")}
	}
	pub, err := readPublicKey(trust)
	if err != nil {
		return bundle.OpenConfig{}, err
	}
	return bundle.OpenConfig{Trusted: []crypto.PublicKey{pub}}, nil
}

func (a *app) runBundleShow(path, trust string) error {
	f, err := openFile(path)
	if err != nil {
		return err
	}
	defer f.Close()
	verified := "not verified: say --trust station.pem"
	if trust != "" {
		cfg, err := openConfig(trust)
		if err != nil {
			return err
		}
		if _, err := bundle.Verify(f, cfg); err != nil {
			return fmt.Errorf("verifying %s: %w", path, err)
		}
		if _, err := f.Seek(0, 0); err != nil {
			return err
		}
		verified = "verified"
	}
	m, keyID, err := bundle.Describe(f)
	if err != nil {
		return fmt.Errorf("reading %s: %w", path, err)
	}
	if a.json {
		return a.printJSON(map[string]any{"manifest": m, "keyId": keyID, "verified": trust != ""})
	}
	rows := [][]string{
		{"Bundle", m.ID},
		{"Signature", verified},
		{"  by key", keyID},
		{"Created", m.Created},
		{"ID scope", m.IDScope},
		{"Individual enrollments", fmt.Sprint(m.Counts.Individual)},
		{"Enrollment groups", fmt.Sprint(m.Counts.Group)},
		{"Group devices", fmt.Sprint(m.Counts.Device)},
		{"Sealed secrets", fmt.Sprint(m.Counts.Sealed)},
		{"With evidence", fmt.Sprint(m.Counts.Evidence)},
	}
	var keys []string
	for k := range m.Info {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	for _, k := range keys {
		rows = append(rows, []string{"  " + k, m.Info[k]})
	}
	return a.table(nil, rows)
}

func (a *app) runBundleVerify(path, trust, residency, makers string) error {
	cfg, err := openConfig(trust)
	if err != nil {
		return err
	}
	if cfg.RequireResidency, err = parseResidency(residency); err != nil {
		return err
	}
	if cfg.Makers, err = a.loadMakers(makers); err != nil {
		return err
	}
	f, err := openFile(path)
	if err != nil {
		return err
	}
	defer f.Close()
	sum, err := bundle.Verify(f, cfg)
	if err != nil {
		return fmt.Errorf("verifying %s: %w", path, err)
	}
	if a.json {
		return a.printJSON(sum)
	}
	return a.table(nil, [][]string{
		{"Bundle", path, a.paint(a.out, "32", "verifies")},
		{"  ID", sum.ID},
		{"  ID scope", sum.IDScope},
		{"  entries", fmt.Sprint(sum.Entries)},
		{"  with evidence", fmt.Sprint(sum.Counts.Evidence)},
	})
}

func (a *app) runBundleEntries(path, trust string) error {
	cfg, err := openConfig(trust)
	if err != nil {
		return err
	}
	f, err := openFile(path)
	if err != nil {
		return err
	}
	defer f.Close()
	r, err := bundle.Open(f, cfg)
	if err != nil {
		return fmt.Errorf("opening %s: %w", path, err)
	}
	defer r.Close()
	for e, err := range r.Entries() {
		if err != nil {
			return fmt.Errorf("reading %s: %w", path, err)
		}
		if err := a.printJSON(e); err != nil {
			return err
		}
	}
	return nil
}
