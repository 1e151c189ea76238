package main

import (
	"crypto"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/pkg/bundle"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/evidence"
	"github.com/touchmark/touchmark/pkg/order"
	"github.com/touchmark/touchmark/pkg/registration"
)

func newBundle(a *app) *cobra.Command {
	var trustShow, trustEntries string
	check := &bundleCheck{}
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
		Example: "  touchmark bundle verify monday.tmb --trust line-3/station.pem\n  touchmark bundle verify monday.tmb --trust line-3/station.pem --require-residency token\n" +
			"  touchmark bundle verify monday.tmb --trust line-3/station.pem --owner owner.pem",
		RunE: func(_ *cobra.Command, args []string) error { return a.runBundleVerify(args[0], check) },
	}
	trust(verify, &check.trust)
	residencyFlag(verify, &check.residency)
	verify.Flags().StringVar(&check.owner, "owner", "", "PEM file with the owner's public key: hold the bundle against the order that it was made on, which the owner must have signed")
	verify.Flags().StringVar(&check.holder, "holder", "", "PEM file with the public key of the station that holds the order, where the bundle was made on a lease")
	verify.Flags().StringVar(&check.makers, "makers", "", "folder with the certificates of TPM manufacturers: refuse devices with TPMs of others")
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
		{"Of a later revision", fmt.Sprint(m.Counts.Revised)},
		{"Retired", fmt.Sprint(m.Counts.Retired)},
		{"Sealed secrets", fmt.Sprint(m.Counts.Sealed)},
		{"With evidence", fmt.Sprint(m.Counts.Evidence)},
	}
	if m.Grant != nil {
		rows = append(rows, []string{"Made on order", m.Grant.ID})
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

// bundleCheck is what a bundle is held against.
type bundleCheck struct{ trust, residency, makers, owner, holder string }

func (a *app) runBundleVerify(path string, o *bundleCheck) error {
	cfg, err := openConfig(o.trust)
	if err != nil {
		return err
	}
	if cfg.RequireResidency, err = parseResidency(o.residency); err != nil {
		return err
	}
	if cfg.Makers, err = a.loadMakers(o.makers); err != nil {
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
	if o.owner != "" {
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			return err
		}
		if err := checkGrant(f, cfg, o); err != nil {
			return fmt.Errorf("verifying %s: %w", path, err)
		}
	}
	if a.json {
		return a.printJSON(sum)
	}
	rows := [][]string{
		{"Bundle", path, a.paint(a.out, "32", "verifies")},
		{"  ID", sum.ID},
		{"  ID scope", sum.IDScope},
		{"  entries", fmt.Sprint(sum.Entries)},
		{"  with evidence", fmt.Sprint(sum.Counts.Evidence)},
		{"  of a later revision", fmt.Sprint(sum.Counts.Revised)},
		{"  retired", fmt.Sprint(sum.Counts.Retired)},
	}
	if sum.Grant != "" {
		checked := "not checked: say --owner owner.pem"
		if o.owner != "" {
			checked = "the owner's, and it has these units"
		}
		rows = append(rows, []string{"  made on order", sum.Grant, checked})
	}
	return a.table(nil, rows)
}

// checkGrant holds a bundle against the order that it was made on: the owner's, for this station and ID scope, with all its
// serials and room for its units. What other bundles of the order hold, the service knows.
// The error is registration.ErrOrder.
func checkGrant(f io.Reader, cfg bundle.OpenConfig, o *bundleCheck) error {
	refuse := func(err error) error { return fmt.Errorf("%w: %w", registration.ErrOrder, err) }
	owner, err := readPublicKey(o.owner)
	if err != nil {
		return err
	}
	holders := cfg.Trusted
	if o.holder != "" {
		pub, err := readPublicKey(o.holder)
		if err != nil {
			return err
		}
		holders = append(slices.Clip(holders), pub)
	}
	r, err := bundle.Open(f, cfg)
	if err != nil {
		return err
	}
	defer r.Close()
	if r.Grant() == nil {
		return refuse(errors.New("it has none"))
	}
	g, err := order.Open(r.Grant(), []crypto.PublicKey{owner}, holders)
	if err != nil {
		return refuse(err)
	}
	if err := g.For(cfg.Trusted[0]); err != nil {
		return refuse(err)
	}
	if m := r.Manifest(); dps.Fold(g.Order.IDScope) != dps.Fold(m.IDScope) {
		return refuse(fmt.Errorf("%s: %w: it is for ID scope %s, the bundle for %s", g.ID(), order.ErrProduct, g.Order.IDScope, m.IDScope))
	}
	serials := make(map[string]bool)
	for e, err := range r.Entries() {
		if err != nil {
			return err
		}
		if e.Group != nil {
			continue
		}
		if err := g.Admits(e.Serial); err != nil {
			return refuse(err)
		}
		if e.Retired == nil {
			serials[e.Serial] = true
		}
	}
	if n := int64(len(serials)); n > g.Quantity() {
		return refuse(fmt.Errorf("%s has %d units, the bundle %d", g.ID(), g.Quantity(), n))
	}
	return nil
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
