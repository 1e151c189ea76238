package main

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"os"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/signed"
	"github.com/touchmark/touchmark/hsm/tpm"
	"github.com/touchmark/touchmark/pkg/ca"
	"github.com/touchmark/touchmark/pkg/evidence"
	"github.com/touchmark/touchmark/pkg/ledger"
	"github.com/touchmark/touchmark/pkg/mint"
	"github.com/touchmark/touchmark/pkg/order"
)

// A floor is a line at work: its keys, its ledger locked and held against its counter.
type floor struct {
	*line
	a       *app
	store   hsm.Store
	station hsm.SigningKey
	counter hsm.Counter // nil without one
	ledger  *ledger.Ledger
	closers []func() error
}

// openFloor opens a line for work. The caller closes it.
func (a *app) openFloor(ctx context.Context, l *line) (*floor, error) {
	f, err := a.openKeys(ctx, l)
	if err != nil {
		return nil, err
	}
	if err := f.openLedger(ctx); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// openKeys opens a line's store, and takes its ledger's counter, for a floor whose ledger is opened next.
func (a *app) openKeys(ctx context.Context, l *line) (_ *floor, err error) {
	f := &floor{line: l, a: a}
	defer func() {
		if err != nil {
			l.noteAnchor(err)
			err = errors.Join(err, f.Close())
		}
	}()
	if f.store, err = a.openLineStore(ctx, l); err != nil {
		return nil, err
	}
	f.closers = append(f.closers, f.store.Close)
	if f.station, err = openSigner(ctx, f.store, l.Keys.Station); err != nil {
		return nil, err
	}
	if l.Orders.Counter != "" {
		f.counter, err = f.openCounter(ctx)
	}
	return f, err
}

// openLedger opens the line's ledger, or opens it again.
func (f *floor) openLedger(ctx context.Context) (err error) {
	if err := f.closeLedger(); err != nil {
		return err
	}
	cfg := ledger.Config{Path: f.path(ledgerFile), Origin: f.origin(), Signer: f.station}
	if f.counter != nil {
		cfg.Anchor = f.counter // and not a nil that is no nil interface
	}
	if f.ledger, err = ledger.Open(ctx, cfg); err != nil {
		f.noteAnchor(err)
		return err
	}
	if err := f.absorbRefusals(ctx); err != nil {
		return err
	}
	if err := f.finishEndings(ctx); err != nil {
		f.a.note("warning: %v", err) // it keeps nobody from work, and is tried again the next time
	}
	return nil
}

func (f *floor) closeLedger() error {
	if f.ledger == nil {
		return nil
	}
	err := f.ledger.Close()
	f.ledger = nil
	return err
}

// noteAnchor writes down that a ledger was refused for what its counter says.
func (l *line) noteAnchor(err error) {
	if errors.Is(err, hsm.ErrLost) {
		return // it said nothing
	}
	if !errors.Is(err, hsm.ErrLost) && (errors.Is(err, ledger.ErrAnchor) || errors.Is(err, ledger.ErrRolledBack) || errors.Is(err, hsm.ErrClaimed)) {
		l.keepRefusal(newRefusal(nil, "", err))
	}
}

// Close gives everything back, the last first.
func (f *floor) Close() error {
	errs := []error{f.closeLedger()}
	for i := len(f.closers) - 1; i >= 0; i-- {
		errs = append(errs, f.closers[i]())
	}
	f.closers = nil
	return errors.Join(errs...)
}

// counterStore returns the store that the line's counter is in.
func (f *floor) counterStore(ctx context.Context) (hsm.CounterStore, error) {
	store := f.store
	if f.Orders.CounterStore != "" {
		var err error
		if store, err = f.a.openStore(ctx, f.Orders.CounterStore, f.dir); err != nil {
			return nil, fmt.Errorf("opening the counter's store: %w", err)
		}
		f.closers = append(f.closers, store.Close)
	}
	counters, ok := store.(hsm.CounterStore)
	if !ok {
		return nil, hint(usageError{fmt.Errorf("%s keeps no counters, so nothing there can tell a ledger from its copy: %w", store.URI(), hsm.ErrUnsupported)},
			"keep the line's keys in a PKCS#11 token, or name a TPM in orders.counter-store of %s", f.path(lineFile))
	}
	return counters, nil
}

// openCounter opens the line's counter and takes it for this process.
func (f *floor) openCounter(ctx context.Context) (hsm.Counter, error) {
	store, err := f.counterStore(ctx)
	if err != nil {
		return nil, err
	}
	c, err := store.OpenCounter(ctx, f.Orders.Counter)
	if err != nil {
		return nil, hint(fmt.Errorf("the ledger's counter %q: %w", f.Orders.Counter, err), "touchmark ledger anchor --line %s makes it, once", f.dir)
	}
	release, err := c.Claim(ctx, f.Name)
	var held *hsm.ClaimedError
	if errors.As(err, &held) && switchedOff(held.Claim, f.Name) {
		if err := c.TakeOver(ctx, held.Claim); err != nil {
			return nil, fmt.Errorf("the ledger's counter: %w", err)
		}
		release, err = c.Claim(ctx, f.Name)
	}
	if err != nil {
		return nil, fmt.Errorf("the ledger's counter: %w", err)
	}
	f.closers = append(f.closers, release)
	return c, nil
}

// switchedOff reports whether a claim is of this line and of this machine before it was started: then its process is gone with the
// power. Should it be of another machine with this one's name, the counter itself still tells the two ledgers apart.
func switchedOff(c hsm.Claim, owner string) bool {
	here, err := hsm.NewClaim(owner)
	return err == nil && c.Owner == owner && c.Host == here.Host && c.Boot != "" && here.Boot != "" && c.Boot != here.Boot
}

// owners reads whose orders count.
func (l *line) owners() ([]crypto.PublicKey, error) { return readPublicKeys(l.dir, l.Orders.Owners) }

func readPublicKeys(base string, files []string) ([]crypto.PublicKey, error) {
	var keys []crypto.PublicKey
	for _, name := range files {
		pub, err := readPublicKey(under(base, name))
		if err != nil {
			return nil, err
		}
		keys = append(keys, pub)
	}
	return keys, nil
}

// openGrant verifies an order or a lease for this line.
func (l *line) openGrant(b []byte, station crypto.PublicKey) (*order.Grant, error) {
	owners, err := l.owners()
	if err != nil {
		return nil, err
	}
	if len(owners) == 0 {
		return nil, hint(usageError{errors.New("the line does not know whose orders count")}, "name the owner's public key in orders.owners of %s", l.path(lineFile))
	}
	holders, err := readPublicKeys(l.dir, l.Orders.Holders)
	if err != nil {
		return nil, err
	}
	g, err := order.Open(b, owners, append(holders, station))
	if err != nil {
		return nil, err
	}
	return g, g.For(station)
}

// takeGrant brings an order or a lease into the ledger, from a file, or finds one that is there by its ID.
func (f *floor) takeGrant(ctx context.Context, name string) (*order.Grant, ledger.Grant, error) {
	var none ledger.Grant
	document, err := readDocument(name)
	if errors.Is(err, os.ErrNotExist) {
		have, gerr := f.ledger.Grant(ctx, name)
		if gerr != nil {
			return nil, none, usageError{fmt.Errorf("order %q is no file, and is not in the ledger", name)}
		}
		document, err = have.Document, nil
	}
	if err != nil {
		return nil, none, err
	}
	g, err := f.openGrant(document, f.station.Public())
	if err != nil {
		f.refuse(ctx, nil, "", err)
		return nil, none, fmt.Errorf("%s: %w", name, err)
	}
	if want := g.Order.Counter; want != "" && g.Lease == nil && (f.counter == nil || f.Orders.Counter != want) {
		err := fmt.Errorf("%s: %w: %q, the line has %q", g.ID(), order.ErrCounter, want, f.Orders.Counter)
		f.refuse(ctx, g, "", err)
		return nil, none, hint(err, "the ledger that was tied to it is the one to work with")
	}
	from, until := g.Window()
	have, err := f.ledger.TakeGrant(ctx, ledger.Grant{ID: g.ID(), Document: g.Document, Quantity: g.Quantity(), Opens: from, Ends: until})
	if err != nil {
		f.refuse(ctx, g, "", err)
	}
	return g, have, err
}

// readDocument reads a signed document.
func readDocument(path string) ([]byte, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if st.Size() > order.MaxDocument {
		return nil, fmt.Errorf("%s is larger than %d octets", path, order.MaxDocument)
	}
	return os.ReadFile(path)
}

// grant returns the order that work is for: the one that is named, or, where the line needs one and names none, an error.
func (f *floor) grant(ctx context.Context, name string) (*order.Grant, error) {
	if name == "" {
		if f.Orders.Required {
			err := fmt.Errorf("line %s makes nothing without a production order", f.Name)
			f.refuse(ctx, nil, "", err)
			return nil, hint(usageError{err}, "name the order with --order: its file, or its ID once it was taken (touchmark order list --line %s)", f.dir)
		}
		return nil, nil
	}
	g, _, err := f.takeGrant(ctx, name)
	return g, err
}

// covers says what keeps the line from making a profile's devices on a grant.
func (l *line) covers(g *order.Grant, p *mint.Profile, hash string) error {
	if g == nil {
		return nil
	}
	m := order.Making{Profile: p.Name, ProfileSHA256: hash, IDScope: l.IDScope, Endpoint: l.GlobalEndpoint}
	if p.Attestation == mint.AttestationX509 {
		chain, err := readCertificates(l.path(issuingFile))
		if err != nil {
			return err
		}
		if m.Issuer, err = signed.KeyID(chain[0].PublicKey); err != nil {
			return err
		}
	}
	return g.Covers(m)
}

// mintConfig puts together what making a profile's devices needs.
func (f *floor) mintConfig(ctx context.Context, p *mint.Profile, list *mint.List) (mint.Config, error) {
	a := f.a
	cfg := mint.Config{
		Ledger: f.ledger, Profile: p, List: list, Store: f.store, IDScope: f.IDScope, GlobalEndpoint: f.GlobalEndpoint,
		OpenStore: func(ctx context.Context, uri string) (hsm.Store, error) { return a.openStore(ctx, uri, f.dir) },
	}
	var err error
	if p.Key.Makers != "" {
		if cfg.Makers, err = a.loadMakers(under(f.dir, p.Key.Makers)); err != nil {
			return cfg, err
		}
	}
	kind := tpm.EKECC // quick to make
	if p.Attestation == mint.AttestationTPM {
		kind = tpm.EKRSA // what the service and device SDKs speak of
	}
	cfg.Attest = func(ctx context.Context, store hsm.Store, key, registrationID string) (*evidence.Evidence, error) {
		return attestTPM(ctx, store, kind, key, registrationID)
	}
	cfg.Endorsement = func(ctx context.Context, store hsm.Store) (ek, srk []byte, err error) {
		if t, ok := store.(*tpm.Store); ok && p.Attestation == mint.AttestationTPM {
			// Where device SDKs look for them, made there if need be: an SDK that finds none makes another key, by a template of its own,
			// than the one that was enrolled.
			return t.Identity().Keys(ctx)
		}
		return endorsementOf(ctx, store, kind)
	}
	if p.Attestation == mint.AttestationX509 {
		var issuer *ca.Issuer
		if issuer, err = f.issuer(ctx, f.store); err != nil {
			return cfg, err
		}
		if cfg.Issuer, err = f.prepare(issuer, p, list.Columns); err != nil {
			return cfg, err
		}
	} else if p.Enrollment == "group" {
		k, err := f.store.Open(ctx, p.Key.GroupKey)
		if errors.Is(err, hsm.ErrNotFound) {
			return cfg, hint(fmt.Errorf("group key %q is not in the line's store: %w", p.Key.GroupKey, err),
				"touchmark group key makes one in the service, touchmark key import brings it here")
		}
		if err != nil {
			return cfg, err
		}
		if cfg.GroupKey, err = hsm.MACKeyOf(k); err != nil {
			return cfg, err
		}
	}
	cfg.Templates, err = f.stampTemplates(p)
	return cfg, err
}
