package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
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

type orderLeaseOptions struct {
	line, order, station, name, from, to, until, out string
	quantity                                         int64
}

func newOrderLease(a *app) *cobra.Command {
	o := &orderLeaseOptions{}
	c := &cobra.Command{
		Use: "lease ORDER --line DIR --station PEM --quantity N --out FILE", Short: "Cut a lease from an order for another station", Args: cobra.ExactArgs(1),
		Long: `lease cuts a part of an order off for another station: a number of units, and the next serials of the order's range or list.
It counts against the order from then on. The station gives back what it did not use with touchmark order return.`,
		Example: "  touchmark order lease PO-1234 --line line-3 --station line-4/station.pem --quantity 500 --out PO-1234-a.lease",
		RunE: func(cmd *cobra.Command, args []string) error {
			o.order = args[0]
			return a.onFloor(cmd.Context(), o.line, func(f *floor) error { return f.lease(cmd.Context(), o) })
		},
	}
	f := c.Flags()
	lineFlag(c, &o.line)
	f.StringVar(&o.station, "station", "", "PEM file with the public key of the station that gets it (required)")
	f.Int64Var(&o.quantity, "quantity", 0, "how many units (required)")
	f.StringVar(&o.name, "name", "", "what the lease is called after the order's ID (default: made up)")
	f.StringVar(&o.from, "serial-from", "", "first serial, where it should not be the next free one")
	f.StringVar(&o.to, "serial-to", "", "last serial, with --serial-from")
	f.StringVar(&o.until, "until", "", "day or time (UTC) at which it ends (default: the order's)")
	f.StringVar(&o.out, "out", "", "file to write (required)")
	for _, name := range []string{"station", "quantity", "out"} {
		_ = c.MarkFlagRequired(name)
	}
	return c
}

func (f *floor) lease(ctx context.Context, o *orderLeaseOptions) (err error) {
	g, have, err := f.takeGrant(ctx, o.order)
	if err != nil {
		return err
	}
	defer func() {
		if refusalKind(err) != "" {
			f.refuse(ctx, g, "", err)
		}
	}()
	if g.Lease != nil {
		return usageError{fmt.Errorf("%s is a lease itself: only an order is cut", g.ID())}
	}
	if exists(o.out) {
		return hint(fmt.Errorf("%s exists already", o.out), "a lease is written once; name another file")
	}
	l := &order.Lease{Version: 1, Order: string(g.Document), Quantity: o.quantity}
	if l.NotBefore, l.NotAfter = g.Order.NotBefore, g.Order.NotAfter; o.until != "" {
		if l.NotAfter, err = parseDay(o.until, true); err != nil {
			return usageError{fmt.Errorf("--until: %w", err)}
		}
	}
	if l.Station, err = stationID(o.station); err != nil {
		return err
	}
	if o.name != "" {
		// Cut before, and lost on its way: the same again.
		all, err := f.ledger.Leases(ctx, g.Order.ID)
		if err != nil {
			return err
		}
		for _, have := range all {
			if d, err := order.Describe(have.Document); err == nil && have.ID == g.Order.ID+"/"+o.name && d.Lease.Station == l.Station && d.Lease.Quantity == o.quantity {
				if err := writeFile(o.out, append(have.Document, '\n'), 0o644, false); err != nil {
					return err
				}
				return f.a.printGrant(d, true)
			}
		}
	} else {
		var random [4]byte
		_, _ = rand.Read(random[:])
		o.name = hex.EncodeToString(random[:])
	}
	l.ID = g.Order.ID + "/" + o.name
	leased, err := f.leasedSerials(ctx, g.Order.ID)
	if err != nil {
		return err
	}
	taken := func(serial string) (bool, error) {
		for i := range leased {
			if leased[i].Has(serial) {
				return true, nil
			}
		}
		return f.known(ctx, serial)
	}
	if o.from != "" || o.to != "" {
		l.Serials = order.Serials{Pattern: g.Order.Serials.Pattern, From: o.from, To: o.to}
		for serial := range l.Serials.All {
			if t, err := taken(serial); err != nil || t {
				return errors.Join(fmt.Errorf("%w: serial %s is made or leased already", order.ErrSerial, serial), err)
			}
			if err := g.Admits(serial); err != nil {
				return err
			}
		}
	} else if l.Serials, err = g.Order.Serials.Cut(o.quantity, taken); err != nil {
		return fmt.Errorf("%s: %w", g.ID(), err)
	}
	if o.quantity > have.Left() {
		return &ledger.GrantError{Grant: have, Want: o.quantity, Err: ledger.ErrSpent}
	}
	owners, err := f.owners()
	if err != nil {
		return err
	}
	document, err := l.Sign(f.station, owners)
	if err != nil {
		return err
	}
	// Booked first, handed out after: a lease that got lost in between is returned by hand, one that was never booked would be
	// work beyond the order.
	if err := f.ledger.CutLease(ctx, ledger.Lease{ID: l.ID, Grant: g.Order.ID, Document: document, Quantity: l.Quantity}); err != nil {
		return err
	}
	if err := writeFile(o.out, append(document, '\n'), 0o644, false); err != nil {
		return hint(err, "the lease is booked: touchmark order lease %s --name %s with the same station and quantity writes it again", g.Order.ID, o.name)
	}
	return f.a.printGrant(&order.Grant{Order: g.Order, Lease: l}, true)
}

// known reports whether the ledger has heard of a serial.
func (f *floor) known(ctx context.Context, serial string) (bool, error) {
	_, err := f.ledger.Find(ctx, serial)
	if err == nil {
		return true, nil
	}
	if !errors.Is(err, ledger.ErrNotFound) {
		return false, err
	}
	for _, err := range f.ledger.Retired(ctx, serial) {
		return err == nil, err
	}
	return false, nil
}

// leasedSerials returns the serials that leases of an order have or had, as far as those name any.
func (f *floor) leasedSerials(ctx context.Context, id string) ([]order.Serials, error) {
	leases, err := f.ledger.Leases(ctx, id)
	if err != nil {
		return nil, err
	}
	var all []order.Serials
	for _, l := range leases {
		g, err := order.Describe(l.Document)
		if err != nil {
			return nil, err
		}
		_, counted := g.Lease.Serials.Count()
		switch {
		case l.Used >= 0: // it is back: what it made is made, the rest is free again
			r, err := order.DescribeReturn(l.Receipt)
			if err != nil {
				return nil, err
			}
			if len(r.Serials) > 0 {
				all = append(all, order.Serials{List: r.Serials})
			}
		case counted:
			all = append(all, g.Lease.Serials)
		}
	}
	for i := range all {
		all[i].Index()
	}
	return all, nil
}

// notLeased refuses serials of an order that other stations have on leases.
func (f *floor) notLeased(ctx context.Context, g *order.Grant, list *mint.List) error {
	if g == nil || g.Lease != nil {
		return nil
	}
	leased, err := f.leasedSerials(ctx, g.ID())
	if err != nil {
		return err
	}
	for i := range list.Rows {
		for k := range leased {
			if leased[k].Has(list.Rows[i].Serial) {
				return fmt.Errorf("%s: %w: %s is leased to another station", g.ID(), order.ErrSerial, list.Rows[i].Serial)
			}
		}
	}
	return nil
}

func newOrderReturn(a *app) *cobra.Command {
	var dir, out string
	c := &cobra.Command{
		Use: "return LEASE --line DIR --out FILE", Short: "Give back what is left of a lease", Args: cobra.ExactArgs(1),
		Long: `return ends a lease at the station that had it, and writes a signed return for the holder of the order, who takes it in with
touchmark order receive. Finish the units that were begun first: no more can be begun, and those count as used.`,
		Example: "  touchmark order return PO-1234/a --line line-4 --out a.return",
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.onFloor(cmd.Context(), dir, func(f *floor) error { return f.giveBack(cmd.Context(), args[0], out) })
		},
	}
	lineFlag(c, &dir)
	c.Flags().StringVar(&out, "out", "", "file to write (required)")
	_ = c.MarkFlagRequired("out")
	return c
}

func (f *floor) giveBack(ctx context.Context, id, out string) error {
	g, _, err := f.takeGrant(ctx, id)
	if err != nil {
		return err
	}
	id = g.ID() // it may have been named by its file
	if g.Lease == nil {
		return hint(usageError{fmt.Errorf("%s is an order, no lease", id)}, "touchmark order close reports on an order")
	}
	report, used, err := f.report(ctx, g)
	if err != nil {
		return err
	}
	if _, err := report.Sign(f.station); err != nil {
		return err // before anything is closed
	}
	if err := f.ledger.CloseGrant(ctx, id); err != nil {
		return err
	}
	report.Closed = true
	r := &order.Return{Version: 1, Lease: id, Station: report.Station, At: report.At, Used: int64(len(used)), Serials: used, Report: report}
	b, err := r.Sign(f.station)
	if err != nil {
		return err
	}
	if err := writeFile(out, append(b, '\n'), 0o644, true); err != nil {
		return err
	}
	if f.a.json {
		return f.a.printJSON(r)
	}
	f.a.note("%s: %d of %d units were made; the holder takes %s in with touchmark order receive", id, r.Used, g.Quantity(), out)
	return nil
}

func newOrderReceive(a *app) *cobra.Command {
	var dir, station string
	c := &cobra.Command{
		Use: "receive FILE --line DIR --station PEM", Short: "Take in the return of a lease", Args: cobra.ExactArgs(1),
		Example: "  touchmark order receive a.return --line line-3 --station line-4/station.pem",
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.onFloor(cmd.Context(), dir, func(f *floor) error {
				b, err := readDocument(args[0])
				if err != nil {
					return usageError{err}
				}
				pub, err := readPublicKey(station)
				if err != nil {
					return err
				}
				r, err := order.OpenReturn(b, pub)
				if err != nil {
					return fmt.Errorf("%s: %w", args[0], err)
				}
				if err := f.checkReturn(cmd.Context(), r); err != nil {
					return err
				}
				if err := f.ledger.ReturnLease(cmd.Context(), r.Lease, r.Used, b); err != nil {
					return err
				}
				name, _, _ := strings.Cut(r.Lease, "/")
				g, err := f.ledger.Grant(cmd.Context(), name)
				if err != nil {
					return err
				}
				return a.printGrants([]ledger.Grant{g})
			})
		},
	}
	lineFlag(c, &dir)
	c.Flags().StringVar(&station, "station", "", "PEM file with the public key of the station that had the lease (required)")
	_ = c.MarkFlagRequired("station")
	return c
}

// checkReturn holds a return against the lease that was cut: it is that station's, and of serials that it had.
func (f *floor) checkReturn(ctx context.Context, r *order.Return) error {
	name, _, _ := strings.Cut(r.Lease, "/")
	leases, err := f.ledger.Leases(ctx, name)
	if err != nil {
		return err
	}
	for _, l := range leases {
		if l.ID != r.Lease {
			continue
		}
		g, err := order.Describe(l.Document)
		if err != nil {
			return err
		}
		if g.Lease.Station != r.Station {
			return fmt.Errorf("%w: lease %s is of station %s, the return of %s", order.ErrStation, r.Lease, g.Lease.Station, r.Station)
		}
		for _, s := range r.Serials {
			if !g.Lease.Serials.Has(s) {
				return fmt.Errorf("lease %s: %w: the return names %s", r.Lease, order.ErrSerial, s)
			}
		}
		return nil
	}
	return fmt.Errorf("lease %s %w", r.Lease, ledger.ErrNoGrant)
}

func newOrderClose(a *app) *cobra.Command {
	var dir, out string
	var keep bool
	c := &cobra.Command{
		Use: "close ORDER --line DIR --out FILE", Short: "End an order, and prove what became of it", Args: cobra.ExactArgs(1),
		Long: `close ends an order at the station that holds it and writes a signed report: how many units were ordered, minted, stamped,
verified, sealed and exported, how many were voided, scrapped, reworked and returned, every unit that is missing by its
serial, and every attempt to make what the order does not allow. The exit code is 3 when the numbers do not agree.`,
		Example: "  touchmark order close PO-1234 --line line-3 --out PO-1234.report\n  touchmark order close PO-1234 --line line-3 --out so-far.report --keep-open",
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.onFloor(cmd.Context(), dir, func(f *floor) error { return f.closeOrder(cmd.Context(), args[0], out, keep) })
		},
	}
	lineFlag(c, &dir)
	c.Flags().StringVar(&out, "out", "", "file to write (required)")
	c.Flags().BoolVar(&keep, "keep-open", false, "report, and let the work go on")
	_ = c.MarkFlagRequired("out")
	return c
}

func (f *floor) closeOrder(ctx context.Context, id, out string, keep bool) error {
	g, _, err := f.takeGrant(ctx, id)
	if err != nil {
		return err
	}
	r, _, err := f.report(ctx, g)
	if err != nil {
		return err
	}
	b, err := r.Sign(f.station) // a report that cannot be made closes nothing
	if err == nil && !keep {
		if err = f.ledger.CloseGrant(ctx, g.ID()); err == nil {
			if r, _, err = f.report(ctx, g); err == nil {
				b, err = r.Sign(f.station)
			}
		}
	}
	if err != nil {
		return err
	}
	if err := writeFile(out, append(b, '\n'), 0o644, true); err != nil {
		return err
	}
	if err := f.a.printReport(r); err != nil || keep || r.Balanced() {
		return err
	}
	return partialError{error: fmt.Errorf("%s: %d were ordered, %d left the factory here", r.Grant, r.Ordered, r.Exported)}
}

// report counts what became of a grant, and returns the serials that count against it.
func (f *floor) report(ctx context.Context, g *order.Grant) (*order.Report, []string, error) {
	have, err := f.ledger.Grant(ctx, g.ID())
	if err != nil {
		return nil, nil, err
	}
	station, err := signed.KeyID(f.station.Public())
	if err != nil {
		return nil, nil, err
	}
	r := &order.Report{Version: 1, Grant: g.ID(), Order: g.Order.ID, Station: station, At: time.Now().UTC().Truncate(time.Second), Closed: have.Closed, Ordered: g.Quantity()}
	jobs, err := f.ledger.Jobs(ctx)
	if err != nil {
		return nil, nil, err
	}
	mine := make(map[int64]bool)
	for _, j := range jobs {
		mine[j.ID] = j.Grant == g.ID()
	}
	used := []string{}
	seen := make(map[string]bool)
	for u, err := range f.ledger.Units(ctx, 0) {
		if err != nil {
			return nil, nil, err
		}
		if !mine[u.Job] {
			continue
		}
		seen[u.Serial] = true
		used = append(used, u.Serial)
		for state, n := range map[ledger.State]*int64{ledger.Minted: &r.Minted, ledger.Stamped: &r.Stamped, ledger.Verified: &r.Verified, ledger.Sealed: &r.Sealed, ledger.Exported: &r.Exported} {
			if u.State >= state {
				*n++
			}
		}
		if u.State != ledger.Exported {
			r.Missing = append(r.Missing, order.MissingUnit{Serial: u.Serial, Revision: u.Revision, State: u.State.String()})
		}
	}
	for u, err := range f.ledger.Retired(ctx, "") {
		if err != nil {
			return nil, nil, err
		}
		if !mine[u.Job] {
			continue
		}
		switch u.State {
		case ledger.Voided:
			r.Voided++
			if u.Was != ledger.Begun {
				used = append(used, u.Serial)
			}
		case ledger.Scrapped:
			r.Scrapped++
			used = append(used, u.Serial)
		case ledger.Reworked:
			r.Reworked++
		case ledger.Returned:
			r.Returned++
		}
		if !seen[u.Serial] && u.State != ledger.Returned { // returned: its order makes another in its place
			r.Missing = append(r.Missing, order.MissingUnit{Serial: u.Serial, Revision: u.Revision, State: u.State.String(), Reason: u.Ending.Reason})
		}
	}
	leases, err := f.ledger.Leases(ctx, g.ID())
	if err != nil {
		return nil, nil, err
	}
	leased := int64(0)
	var elsewhere []order.Serials
	for _, l := range leases {
		d, err := order.Describe(l.Document)
		if err != nil {
			return nil, nil, err
		}
		r.Leases = append(r.Leases, order.LeaseLine{Lease: l.ID, Station: d.Lease.Station, Quantity: l.Quantity, Used: l.Used})
		if l.Used < 0 {
			leased += l.Quantity
		} else {
			leased += l.Used
		}
		if _, counted := d.Lease.Serials.Count(); counted {
			d.Lease.Serials.Index()
			elsewhere = append(elsewhere, d.Lease.Serials)
		}
	}
	r.UnmadeCount = r.Ordered - have.Spent - leased
	r.Unmade = unmade(g, seen, elsewhere, r.UnmadeCount)
	if r.Refused, err = f.refusals(ctx, g.ID()); err != nil {
		return nil, nil, err
	}
	checkpoint, err := f.ledger.Checkpoint(ctx)
	r.Checkpoint = string(checkpoint)
	return r, used, err
}

// maxUnmade bounds how many serials that were never made a report names; more are counted.
const maxUnmade = 100_000

// unmade names the serials of a range or a list that nobody made: as far as the order counted on them.
func unmade(g *order.Grant, seen map[string]bool, elsewhere []order.Serials, n int64) []string {
	serials := &g.Order.Serials
	if g.Lease != nil {
		serials = &g.Lease.Serials
	}
	total, counted := serials.Count()
	if !counted || total != g.Quantity() || n <= 0 || n > maxUnmade {
		return nil // more serials than units: nobody can say which of them were meant
	}
	var out []string
	for serial := range serials.All {
		if seen[serial] {
			continue
		}
		away := false
		for i := range elsewhere {
			away = away || elsewhere[i].Has(serial)
		}
		if !away {
			out = append(out, serial)
		}
	}
	return out
}

func (a *app) printReport(r *order.Report) error {
	if a.json {
		return a.printJSON(r)
	}
	rows := [][]string{{"Order", r.Grant}, {"  ordered", fmt.Sprint(r.Ordered)}}
	for _, c := range []struct {
		name string
		n    int64
		show bool
	}{{"minted", r.Minted, true}, {"stamped", r.Stamped, true}, {"verified", r.Verified, true}, {"sealed", r.Sealed, true}, {"exported", r.Exported, true},
		{"voided", r.Voided, r.Voided > 0}, {"scrapped", r.Scrapped, r.Scrapped > 0}, {"reworked", r.Reworked, r.Reworked > 0},
		{"returned", r.Returned, r.Returned > 0}, {"not made", r.UnmadeCount, r.UnmadeCount > 0}, {"refused", int64(len(r.Refused)), len(r.Refused) > 0}} {
		if c.show {
			rows = append(rows, []string{"  " + c.name, fmt.Sprint(c.n)})
		}
	}
	for _, l := range r.Leases {
		state := fmt.Sprintf("%d of %d used", l.Used, l.Quantity)
		if l.Used < 0 {
			state = fmt.Sprintf("%d, not returned", l.Quantity)
		}
		rows = append(rows, []string{"  lease " + l.Lease, state})
	}
	if err := a.table(nil, rows); err != nil {
		return err
	}
	var gaps [][]string
	for _, m := range r.Missing {
		gaps = append(gaps, []string{m.Serial, m.State, m.Reason})
	}
	for _, s := range r.Unmade {
		gaps = append(gaps, []string{s, "not made", ""})
	}
	for _, x := range r.Refused {
		gaps = append(gaps, []string{orDash(x.Serial), "refused: " + x.Kind, x.Why})
	}
	if gaps == nil {
		return nil
	}
	fmt.Fprintln(a.out)
	return a.table([]string{"SERIAL", "STATE", "REASON"}, gaps)
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func newOrderPermit(a *app) *cobra.Command {
	var uri, key, out, reason string
	var revision int64
	c := &cobra.Command{
		Use: "permit ORDER SERIAL… --reason TEXT --store URI --key NAME --out FILE", Short: "Permit an order to replace scrapped units", Args: cobra.MinimumNArgs(2),
		Long: `permit is the owner's word that scrapped units were seen destroyed: with it touchmark unit return gives them back to their
order, which may then make others.`,
		Example: "  touchmark order permit PO-1234 SN00007 SN00019 --reason 'shredded, certificate 77' --store file:office --key owner --out permit",
		RunE: func(cmd *cobra.Command, args []string) error {
			p := &order.Permit{Version: 1, Order: args[0], At: time.Now().UTC().Truncate(time.Second), Reason: reason}
			for _, serial := range args[1:] {
				p.Units = append(p.Units, order.PermitUnit{Serial: serial, Revision: revision})
			}
			return a.signWith(cmd.Context(), uri, key, func(k hsm.SigningKey) error {
				b, err := p.Sign(k)
				if err != nil {
					return err
				}
				return writeFile(out, append(b, '\n'), 0o644, false)
			})
		},
	}
	signFlags(c, &uri, &key, &out)
	c.Flags().Int64Var(&revision, "revision", 0, "revision of the units that were destroyed (touchmark unit show)")
	c.Flags().StringVar(&reason, "reason", "", "how it is known that they are destroyed (required)")
	_ = c.MarkFlagRequired("reason")
	return c
}
