package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/signed"
	"github.com/touchmark/touchmark/pkg/ledger"
	"github.com/touchmark/touchmark/pkg/mint"
	"github.com/touchmark/touchmark/pkg/order"
	"github.com/touchmark/touchmark/pkg/settings"
)

func newOrder(a *app) *cobra.Command {
	return parent("order", "Sign production orders, work on them, and prove what became of them",
		newOrderNew(a), newOrderSign(a), newOrderShow(a), newOrderVerify(a), newOrderTake(a), newOrderList(a),
		newOrderLease(a), newOrderReturn(a), newOrderReceive(a), newOrderClose(a), newOrderPermit(a))
}

// draftHead begins the file that an owner reviews before it is signed.
const draftHead = `# A production order, not signed yet. Read it, then: touchmark order sign %s --store URI --key NAME --out %s
# Times are UTC. holder and stations are the SHA-256 of the stations' public keys.
`

type draft struct {
	ID             string `toml:"id"`
	Product        string `toml:"product"`
	Quantity       int64  `toml:"quantity"`
	Profile        string `toml:"profile"`
	ProfileSHA256  string `toml:"profile-sha256"`
	IDScope        string `toml:"id-scope"`
	GlobalEndpoint string `toml:"global-endpoint"`
	Issuer         string `toml:"issuer"`
	Serials        struct {
		Pattern string   `toml:"pattern,omitempty"`
		From    string   `toml:"from,omitempty"`
		To      string   `toml:"to,omitempty"`
		List    []string `toml:"list,omitempty"`
	} `toml:"serials"`
	Holder    string    `toml:"holder"`
	Stations  []string  `toml:"stations"`
	Counter   string    `toml:"counter,omitempty"`
	NotBefore time.Time `toml:"not-before"`
	NotAfter  time.Time `toml:"not-after"`
}

func (d *draft) order() *order.Order {
	return &order.Order{
		Version: 1, ID: d.ID, Product: d.Product, Quantity: d.Quantity, Profile: d.Profile, ProfileSHA256: d.ProfileSHA256, IDScope: d.IDScope,
		GlobalEndpoint: d.GlobalEndpoint, Issuer: d.Issuer, Holder: d.Holder, Stations: d.Stations, Counter: d.Counter, NotBefore: d.NotBefore.UTC(), NotAfter: d.NotAfter.UTC(),
		Serials: order.Serials{Pattern: d.Serials.Pattern, From: d.Serials.From, To: d.Serials.To, List: d.Serials.List},
	}
}

type orderNewOptions struct {
	id, product, profile, scope, endpoint, issuer, holder string
	counter                                               string
	pattern, from, to, serials                            string
	since, until                                          string
	stations                                              []string
	quantity                                              int64
	out                                                   string
}

func newOrderNew(a *app) *cobra.Command {
	o := &orderNewOptions{}
	c := &cobra.Command{
		Use: "new ID --out FILE …", Short: "Write the draft of an order, to be read and signed", Args: cobra.ExactArgs(1),
		Long: `new writes a draft in TOML: what is made, how many, with which serials, by which station, until when. Read it, mend it in
an editor if need be, and have it signed with the owner's key by touchmark order sign.

The holder is the station that gets the order; --station names others that may work on leases which the holder cuts. Stations
are named by their station.pem, the issuing CA by its issuing.pem, the profile by its file: what the line makes then is what
you saw.`,
		Example: `  touchmark order new PO-1234 --product 'pump 3' --quantity 5000 --profile line-3/profiles/x509-group.toml \
      --serial-from SN00001 --serial-to SN05000 --id-scope 0ne00112233 --issuer line-3/issuing.pem \
      --holder line-3/station.pem --until 2026-12-31 --out PO-1234.toml`,
		RunE: func(_ *cobra.Command, args []string) error { o.id = args[0]; return a.runOrderNew(o) },
	}
	f := c.Flags()
	f.StringVar(&o.product, "product", "", "what is made (required)")
	f.Int64Var(&o.quantity, "quantity", 0, "how many units (required)")
	f.StringVar(&o.profile, "profile", "", "file of the line's profile (required)")
	f.StringVar(&o.pattern, "serial-pattern", "", `picture of a serial: # is a digit, @ an upper-case letter`)
	f.StringVar(&o.from, "serial-from", "", "first serial of a range")
	f.StringVar(&o.to, "serial-to", "", "last serial of a range")
	f.StringVar(&o.serials, "serials", "", "file that lists the serials, one per line")
	f.StringVar(&o.scope, "id-scope", "", "ID scope that devices are stamped with (required)")
	f.StringVar(&o.endpoint, "global-endpoint", "global.azure-devices-provisioning.net", "host that devices find their registration service at")
	f.StringVar(&o.issuer, "issuer", "", "PEM file with the issuing CA, for X.509 profiles")
	f.StringVar(&o.holder, "holder", "", "PEM file with the public key of the station that gets the order (required)")
	f.StringArrayVar(&o.stations, "station", nil, "PEM file with the public key of a station that may work on leases; may be repeated")
	f.StringVar(&o.counter, "counter", "", "counter that the holder's ledger must be tied to (its line says which): then no other ledger serves, not even a new one")
	f.StringVar(&o.since, "from", "", "day or time (UTC) from when units may be begun (default: now)")
	f.StringVar(&o.until, "until", "", "day or time (UTC) until when units may be begun; a day counts to its end (required)")
	f.StringVar(&o.out, "out", "", "file to write (required)")
	for _, name := range []string{"product", "quantity", "profile", "id-scope", "holder", "until", "out"} {
		_ = c.MarkFlagRequired(name)
	}
	return c
}

func (a *app) runOrderNew(o *orderNewOptions) error {
	d := draft{ID: o.id, Product: o.product, Quantity: o.quantity, IDScope: o.scope, GlobalEndpoint: o.endpoint, Counter: o.counter, Stations: []string{}}
	text, err := readSmall(o.profile)
	if err != nil {
		return usageError{fmt.Errorf("reading the profile: %w", err)}
	}
	base := o.profile[strings.LastIndexByte(o.profile, '/')+1:]
	d.Profile, d.ProfileSHA256 = strings.TrimSuffix(base, ".toml"), profileHash(text)
	p, err := mint.LoadProfile(d.Profile, strings.NewReader(string(text)))
	if err != nil {
		return err
	}
	if p.Attestation == mint.AttestationX509 && o.issuer == "" {
		return usageError{fmt.Errorf("profile %s makes certificates: name the issuing CA with --issuer", d.Profile)}
	}
	for _, k := range []struct {
		file string
		to   *string
	}{{o.issuer, &d.Issuer}, {o.holder, &d.Holder}} {
		if k.file == "" {
			continue
		}
		if *k.to, err = stationID(k.file); err != nil {
			return err
		}
	}
	for _, file := range o.stations {
		id, err := stationID(file)
		if err != nil {
			return err
		}
		d.Stations = append(d.Stations, id)
	}
	d.Serials.Pattern, d.Serials.From, d.Serials.To = o.pattern, o.from, o.to
	if o.serials != "" {
		b, err := readDocument(o.serials)
		if err != nil {
			return usageError{fmt.Errorf("reading the serials: %w", err)}
		}
		d.Serials.List = strings.Fields(string(b))
	}
	if d.NotBefore, err = parseDay(o.since, false); err != nil {
		return usageError{fmt.Errorf("--from: %w", err)}
	}
	if d.NotAfter, err = parseDay(o.until, true); err != nil {
		return usageError{fmt.Errorf("--until: %w", err)}
	}
	if err := d.order().Check(); err != nil {
		return usageError{err}
	}
	body, err := toml.Marshal(d)
	if err != nil {
		return err
	}
	signedName := strings.TrimSuffix(o.out, ".toml") + ".order"
	if err := writeFile(o.out, append(fmt.Appendf(nil, draftHead, o.out, signedName), body...), 0o644, false); err != nil {
		return err
	}
	if a.json {
		return a.printJSON(map[string]any{"draft": o.out, "order": d.order()})
	}
	a.note("wrote %s: read it, and sign it with touchmark order sign", o.out)
	return nil
}

// stationID names a public key, in a PEM file, as orders name stations and CAs.
func stationID(path string) (string, error) {
	pub, err := readPublicKey(path)
	if err != nil {
		return "", err
	}
	return signed.KeyID(pub)
}

// completeOrder offers the orders and leases of the line for a flag.
func (a *app) completeOrder(c *cobra.Command, line *string) {
	_ = c.RegisterFlagCompletionFunc("order", func(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
		l, err := a.loadLine(*line)
		if err != nil {
			return nil, cobra.ShellCompDirectiveDefault // a file, then
		}
		led, err := ledger.View(cmd.Context(), l.path(ledgerFile))
		if err != nil {
			return nil, cobra.ShellCompDirectiveDefault
		}
		defer led.Close()
		all, err := led.Grants(cmd.Context())
		var ids []string
		for _, g := range all {
			if err == nil && !g.Closed {
				ids = append(ids, g.ID)
			}
		}
		return ids, cobra.ShellCompDirectiveDefault
	})
}

// parseDay reads a day or a time. A day begins at midnight, or ends at the next one; nothing is now.
func parseDay(s string, end bool) (time.Time, error) {
	if s == "" {
		return time.Now().UTC().Truncate(time.Second), nil
	}
	if t, err := time.Parse(time.RFC3339, s); err == nil {
		return t.UTC().Truncate(time.Second), nil
	}
	t, err := time.Parse(time.DateOnly, s)
	if err != nil {
		return t, fmt.Errorf("%q: want a day such as 2026-12-31, or a time such as 2026-12-31T18:00:00Z", s)
	}
	if end {
		t = t.AddDate(0, 0, 1)
	}
	return t, nil
}

// signWith calls f with a key of a store.
func (a *app) signWith(ctx context.Context, uri, name string, f func(hsm.SigningKey) error) (err error) {
	store, err := a.openStore(ctx, uri, "")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	key, err := openSigner(ctx, store, name)
	if err != nil {
		return err
	}
	return f(key)
}

func newOrderSign(a *app) *cobra.Command {
	var uri, key, out string
	c := &cobra.Command{
		Use: "sign DRAFT --store URI --key NAME --out FILE", Short: "Sign an order with the owner's key", Args: cobra.ExactArgs(1),
		Long: "sign turns a draft into an order that a line takes. The key should be in a token that the factory never sees.",
		Example: `  touchmark order sign PO-1234.toml --store 'pkcs11:token=office?module-path=/usr/lib/softhsm/libsofthsm2.so' \
      --key owner --out PO-1234.order`,
		RunE: func(cmd *cobra.Command, args []string) error {
			b, err := readDocument(args[0])
			if err != nil {
				return usageError{err}
			}
			var d draft
			if err := settings.Decode(args[0], b, &d).Err(); err != nil {
				return err
			}
			o := d.order()
			return a.signWith(cmd.Context(), uri, key, func(k hsm.SigningKey) error {
				b, err := o.Sign(k)
				if errors.Is(err, order.ErrInvalid) {
					return usageError{err}
				}
				if err != nil {
					return err
				}
				if err := writeFile(out, append(b, '\n'), 0o644, false); err != nil {
					return err
				}
				if a.json {
					return a.printJSON(map[string]any{"order": o, "file": out})
				}
				a.note("signed %s: %d units of %s", o.ID, o.Quantity, o.Product)
				return nil
			})
		},
	}
	signFlags(c, &uri, &key, &out)
	return c
}

func signFlags(c *cobra.Command, uri, key, out *string) {
	f := c.Flags()
	f.StringVar(uri, "store", "", "where the key is: file:DIR or pkcs11:… (required)")
	f.StringVar(key, "key", "", "the key's name (required)")
	f.StringVar(out, "out", "", "file to write (required)")
	for _, name := range []string{"store", "key", "out"} {
		_ = c.MarkFlagRequired(name)
	}
}

// orderView is how an order or a lease is shown.
type orderView struct {
	*order.Order
	Lease    *order.Lease `json:"lease,omitempty"`
	Verified bool         `json:"verified"`
}

func (a *app) printGrant(g *order.Grant, verified bool) error {
	if a.json {
		return a.printJSON(orderView{&g.Order, g.Lease, verified})
	}
	state := "not verified: say touchmark order verify FILE --owner owner.pem"
	if verified {
		state = a.paint(a.out, "32", "verifies")
	}
	from, until := g.Window()
	serials := g.Order.Serials
	rows := [][]string{{"Order", g.Order.ID, state}}
	if g.Lease != nil {
		rows, serials = append(rows, []string{"Lease", g.Lease.ID}), g.Lease.Serials
	}
	rows = append(rows, [][]string{
		{"  product", g.Order.Product}, {"  quantity", fmt.Sprint(g.Quantity())}, {"  serials", describeSerials(&serials)},
		{"  profile", g.Order.Profile, g.Order.ProfileSHA256[:min(16, len(g.Order.ProfileSHA256))]},
		{"  ID scope", g.Order.IDScope}, {"  endpoint", g.Order.GlobalEndpoint},
		{"  from", from.Format(time.RFC3339)}, {"  until", until.Format(time.RFC3339)}, {"  station", g.Station()},
	}...)
	for _, s := range g.Order.Stations {
		if g.Lease == nil {
			rows = append(rows, []string{"  may lease", s})
		}
	}
	return a.table(nil, rows)
}

func describeSerials(s *order.Serials) string {
	var parts []string
	if s.Pattern != "" {
		parts = append(parts, "like "+s.Pattern)
	}
	if s.From != "" {
		parts = append(parts, s.From+" to "+s.To)
	}
	if s.List != nil {
		parts = append(parts, fmt.Sprintf("a list of %d", len(s.List)))
	}
	if parts == nil {
		return "any"
	}
	return strings.Join(parts, ", ")
}

func newOrderShow(a *app) *cobra.Command {
	return &cobra.Command{
		Use: "show FILE", Short: "Show what an order or a lease says", Args: cobra.ExactArgs(1),
		Long: "show verifies nothing, and says so; touchmark order verify does.", Example: "  touchmark order show PO-1234.order",
		RunE: func(_ *cobra.Command, args []string) error {
			b, err := readDocument(args[0])
			if err != nil {
				return usageError{err}
			}
			g, err := order.Describe(b)
			if err != nil {
				return fmt.Errorf("reading %s: %w", args[0], err)
			}
			return a.printGrant(g, false)
		},
	}
}

func newOrderVerify(a *app) *cobra.Command {
	var owners, holders []string
	c := &cobra.Command{
		Use: "verify FILE --owner PEM", Short: "Verify an order, or a lease and the order in it", Args: cobra.ExactArgs(1),
		Example: "  touchmark order verify PO-1234.order --owner owner.pem\n  touchmark order verify PO-1234-a.lease --owner owner.pem --holder line-3/station.pem",
		RunE: func(_ *cobra.Command, args []string) error {
			b, err := readDocument(args[0])
			if err != nil {
				return usageError{err}
			}
			trusted, err := readPublicKeys("", owners)
			if err != nil {
				return err
			}
			held, err := readPublicKeys("", holders)
			if err != nil {
				return err
			}
			g, err := order.Open(b, trusted, held)
			if err != nil {
				return fmt.Errorf("verifying %s: %w", args[0], err)
			}
			return a.printGrant(g, true)
		},
	}
	c.Flags().StringArrayVar(&owners, "owner", nil, "PEM file with the owner's public key; may be repeated (required)")
	c.Flags().StringArrayVar(&holders, "holder", nil, "PEM file with the public key of the station that cut the lease")
	_ = c.MarkFlagRequired("owner")
	return c
}

// onFloor runs f with a line opened for work.
func (a *app) onFloor(ctx context.Context, dir string, f func(*floor) error) (err error) {
	l, err := a.loadLine(dir)
	if err != nil {
		return err
	}
	w, err := a.openFloor(ctx, l)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	return f(w)
}

func newOrderTake(a *app) *cobra.Command {
	var dir string
	c := &cobra.Command{
		Use: "take FILE --line DIR", Short: "Bring an order or a lease into a line", Args: cobra.ExactArgs(1),
		Long:    "take verifies an order, or a lease, and keeps it in the line's ledger. mint and station do so by themselves when they are given the file.",
		Example: "  touchmark order take PO-1234.order --line line-3",
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.onFloor(cmd.Context(), dir, func(f *floor) error {
				_, have, err := f.takeGrant(cmd.Context(), args[0])
				if err != nil {
					return err
				}
				return a.printGrants([]ledger.Grant{have})
			})
		},
	}
	lineFlag(c, &dir)
	return c
}

func newOrderList(a *app) *cobra.Command {
	var dir string
	c := &cobra.Command{
		Use: "list --line DIR", Short: "List the orders and leases of a line, and what is left of them", Args: cobra.NoArgs,
		Example: "  touchmark order list --line line-3 --json",
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			l, err := a.loadLine(dir)
			if err != nil {
				return err
			}
			led, err := ledger.View(cmd.Context(), l.path(ledgerFile))
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, led.Close()) }()
			all, err := led.Grants(cmd.Context())
			if err != nil {
				return err
			}
			return a.printGrants(all)
		},
	}
	lineFlag(c, &dir)
	return c
}

func (a *app) printGrants(all []ledger.Grant) error {
	var rows [][]string
	for _, g := range all {
		if a.json {
			if err := a.printJSON(struct {
				ledger.Grant
				Left int64 `json:"left"`
			}{g, g.Left()}); err != nil {
				return err
			}
			continue
		}
		state := "open"
		if g.Closed {
			state = "closed"
		}
		rows = append(rows, []string{g.ID, state, fmt.Sprint(g.Quantity), fmt.Sprint(g.Spent), fmt.Sprint(g.Leased), fmt.Sprint(g.Left()), g.Ends.Format(time.RFC3339)})
	}
	if a.json {
		return nil
	}
	return a.table([]string{"ORDER", "STATE", "QUANTITY", "MADE", "LEASED", "LEFT", "UNTIL"}, rows)
}

// known reports whether the ledger has heard of a serial.
// leasedSerials returns the serials that leases of an order have or had, as far as those name any.
// notLeased refuses serials of an order that other stations have on leases.
// checkReturn holds a return against the lease that was cut: it is that station's, and of serials that it had.
// report counts what became of a grant, and returns the serials that count against it.
// maxUnmade bounds how many serials that were never made a report names; more are counted.
// unmade names the serials of a range or a list that nobody made: as far as the order counted on them.
