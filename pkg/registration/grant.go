package registration

import (
	"context"
	"crypto"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"

	"github.com/touchmark/touchmark/hsm/signed"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/order"
)

// ErrOrder says that a bundle's production order does not allow it, or that it has none and needs one. Nothing of it is taken.
var ErrOrder = errors.New("the bundle's production order")

// ImportConfig says where entries come from, and what they are held against.
type ImportConfig struct {
	// Station names the key that signed the bundle (signed.KeyID).
	Station string
	// Grant is the order or lease that stands in the bundle, as it came; nil if there is none.
	Grant []byte
	// Holders are the public keys of stations whose leases count.
	Holders []crypto.PublicKey
	// RequireOrder refuses a bundle without a grant; the service may do so for all.
	RequireOrder bool
	// DryRun counts and changes nothing.
	DryRun bool
	// By is who imports, for the audit record.
	By Actor
}

// openGrant verifies the grant of a bundle: an owner's order, or a lease that its holder cut from one, for the station that
// signed and for this ID scope. It is nil where there is none and none is needed. The error is ErrOrder.
func (s *Service) openGrant(cfg *ImportConfig) (*order.Grant, error) {
	refuse := func(err error) error { return fmt.Errorf("%w: %w", ErrOrder, err) }
	if cfg.Grant == nil {
		if cfg.RequireOrder || s.cfg.RequireOrders {
			return nil, refuse(errors.New("it has none, and none but ordered devices are taken"))
		}
		return nil, nil
	}
	if len(s.cfg.Owners) == 0 {
		return nil, refuse(errors.New("this service knows no owner who could have signed it"))
	}
	g, err := order.Open(cfg.Grant, s.cfg.Owners, cfg.Holders)
	switch {
	case err != nil:
		return nil, refuse(err)
	case g.Station() != cfg.Station:
		return nil, refuse(fmt.Errorf("%s: %w: it names %s, and %s signed the bundle", g.ID(), order.ErrStation, g.Station(), cfg.Station))
	case dps.Fold(g.Order.IDScope) != s.scope:
		return nil, refuse(fmt.Errorf("%s: %w: it is for ID scope %s, this is %s", g.ID(), order.ErrProduct, g.Order.IDScope, s.cfg.Scope))
	}
	return g, nil
}

// rows returns a grant as the store keeps it: the order's row, and the lease's where it is one.
func rows(g *order.Grant) ([]*Grant, error) {
	document := g.Document
	if g.Lease != nil {
		document = []byte(g.Lease.Order)
	}
	o, err := row(g.Order.ID, g.Order.ID, g.Order.Holder, g.Order.Quantity, document)
	if err != nil || g.Lease == nil {
		return []*Grant{o}, err
	}
	l, err := row(g.Lease.ID, g.Order.ID, g.Lease.Station, g.Lease.Quantity, g.Document)
	return []*Grant{o, l}, err
}

func row(id, order, station string, quantity int64, document []byte) (*Grant, error) {
	// The envelope was verified. What counts is what was signed: an order that was signed again is the same.
	e, err := signed.Parse(document)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(e.Unverified())
	return &Grant{ID: id, Order: order, Station: station, Quantity: quantity, Digest: hex.EncodeToString(sum[:]), Document: document}, nil
}

// bookGrant makes the rows of a grant, or holds them against those that are there.
func (s *Service) bookGrant(ctx context.Context, g *order.Grant, dryRun bool) ([]*Grant, error) {
	want, err := rows(g)
	if err != nil {
		return nil, err
	}
	run := s.cfg.Store.Update
	if dryRun {
		run = s.cfg.Store.View
	}
	return want, run(ctx, func(tx Tx) error {
		for _, w := range want {
			have, err := tx.Grant(s.scope, w.ID)
			switch {
			case errors.Is(err, ErrNotFound) && dryRun:
				err = nil
			case errors.Is(err, ErrNotFound):
				err = tx.PutGrant(s.scope, w)
			case err == nil && have.Digest != w.Digest:
				err = fmt.Errorf("%w: %s came before with another content: one of the two is not what its owner, or its holder, wanted", ErrOrder, w.ID)
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
}

// Owners returns the IDs of the owners' keys, and whether every bundle needs an order.
func (s *Service) Owners() (ids []string, required bool, err error) {
	ids = []string{}
	for _, k := range s.cfg.Owners {
		id, err := signed.KeyID(k)
		if err != nil {
			return nil, false, err
		}
		ids = append(ids, id)
	}
	return ids, s.cfg.RequireOrders, nil
}

func noOrder() *dps.Error { return dps.NewError(dps.CodeNotFound, "Order not found.", nil) }

// QueryOrders returns a page of the orders that bundles came on, in the order of their IDs, and where the next one begins: ""
// at the end.
func (s *Service) QueryOrders(ctx context.Context, after string, limit int) (page []*Grant, next string, err error) {
	return query(ctx, s, limit, func(tx Tx, n int) ([]*Grant, error) { return tx.Orders(s.scope, after, n) }, func(g *Grant) string { return g.ID })
}

// An OrderView is an order, or a lease, with what became of it.
type OrderView struct {
	*Grant
	// Document is the signed envelope, as text, unless it is very long.
	Document string `json:"document,omitempty"`
	// Leases are those of an order that bundles came on, at most a thousand.
	Leases []*Grant `json:"leases,omitempty"`
}

// maxLeases is as many as an order names stations.
const maxLeases = 1000

// Order returns an order, or a lease, by its ID.
func (s *Service) Order(ctx context.Context, id string) (*OrderView, error) {
	var v *OrderView
	err := s.cfg.Store.View(ctx, func(tx Tx) error {
		g, err := tx.Grant(s.scope, id)
		if errors.Is(err, ErrNotFound) {
			return noOrder()
		}
		if err != nil {
			return err
		}
		v = &OrderView{Grant: g}
		document, err := tx.GrantDocument(s.scope, id)
		if err != nil {
			return err
		}
		if len(document) <= maxShown {
			v.Document = string(document)
		}
		if g.ID == g.Order {
			v.Leases, err = tx.Leases(s.scope, id, "", maxLeases)
		}
		return err
	})
	return v, err
}

// maxShown bounds the documents that answers show: most orders have a range and are small.
const maxShown = 1 << 20

// An OrderedDevice is a device of an order.
type OrderedDevice struct {
	RegistrationID string `json:"registrationId"` // folded
	Serial         string `json:"serial"`
	Revision       int64  `json:"revision"`
	Grant          string `json:"grant"`
	State          string `json:"state"` // "imported", "seen", or how it ended
}

// QueryOrderDevices returns a page of the devices that came on an order, or of those alone that live and never registered.
func (s *Service) QueryOrderDevices(ctx context.Context, id string, unseen bool, after string, limit int) (page []*OrderedDevice, next string, err error) {
	devices, next, err := query(ctx, s, limit, func(tx Tx, n int) ([]*Device, error) {
		if _, err := tx.Grant(s.scope, id); errors.Is(err, ErrNotFound) {
			return nil, noOrder()
		} else if err != nil {
			return nil, err
		}
		return tx.Devices(s.scope, id, unseen, after, n)
	}, func(d *Device) string { return d.ID })
	page = []*OrderedDevice{}
	for _, d := range devices {
		o := &OrderedDevice{RegistrationID: d.ID, Serial: d.Serial, Revision: d.Revision, Grant: d.Grant, State: "imported"}
		switch {
		case !d.Lives():
			o.State, o.Revision = string(d.State), d.Ended-1
		case d.Seen:
			o.State = "seen"
		}
		page = append(page, o)
	}
	return page, next, err
}

// QueryRefusals returns a page of the entries that an order did not allow.
func (s *Service) QueryRefusals(ctx context.Context, id, after string, limit int) (page []*Refusal, next string, err error) {
	return query(ctx, s, limit, func(tx Tx, n int) ([]*Refusal, error) {
		if _, err := tx.Grant(s.scope, id); errors.Is(err, ErrNotFound) {
			return nil, noOrder()
		} else if err != nil {
			return nil, err
		}
		return tx.Refusals(s.scope, id, after, n)
	}, func(r *Refusal) string { return r.ID })
}

// query reads a page and one more, which tells whether there is a next one.
func query[T any](ctx context.Context, s *Service, limit int, read func(Tx, int) ([]T, error), id func(T) string) (page []T, next string, err error) {
	err = s.cfg.Store.View(ctx, func(tx Tx) error {
		next = ""
		got, err := read(tx, limit+1)
		if len(got) > limit {
			next, got = id(got[limit-1]), got[:limit]
		}
		page = append([]T{}, got...)
		return err
	})
	return page, next, err
}
