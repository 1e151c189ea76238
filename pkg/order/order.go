// Package order is the signed paper between the office and the factory: what may be made, how many, by whom, until when.
//
// An [Order] is the owner's: signed with the owner's key, for one holder, a station named by its public key. The holder works on
// it, or cuts [Lease]s from it for other stations that the order names; a lease carries the order inside, so whoever reads it
// checks both signatures. Either is a [Grant], which is what a station works on. A [Return] says what a station made of a
// lease, a [Report] what became of an order, a [Permit] is the owner's word that scrapped units are shown to be destroyed.
//
// All of them are DSSE envelopes (package signed) around canonical JSON (RFC 8785), read strictly: one content has one form, and a
// changed octet is found. How many units were made is not kept here but in the ledger (package ledger), which cannot be overdrawn.
//
// Everything is a value; functions may be called by many goroutines.
package order

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/gowebpki/jcs"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/signed"
	"github.com/touchmark/touchmark/pkg/dps"
)

// The types that payloads are signed as.
const (
	orderType  = "application/vnd.touchmark.order+json"
	leaseType  = "application/vnd.touchmark.lease+json"
	returnType = "application/vnd.touchmark.lease-return+json"
	reportType = "application/vnd.touchmark.close-report+json"
	permitType = "application/vnd.touchmark.permit+json"
)

// Limits.
const (
	// MaxDocument bounds a signed document, in octets: a list of a million serials fits.
	MaxDocument = 64 << 20
	maxQuantity = 1 << 40
	maxStations = 1000
	maxText     = 200
	version     = 1
)

// Errors that callers branch on.
var (
	// ErrInvalid says that a document does not make sense, whoever signed it.
	ErrInvalid = errors.New("order is not valid")
	// ErrStation says that a grant is for other stations.
	ErrStation = errors.New("the order is for other stations")
	// ErrProduct says that a grant is for another product, profile, ID scope, endpoint or issuing CA.
	ErrProduct = errors.New("the order is for something else")
	// ErrCounter says that a grant wants a ledger with a counter, and this one has another or none.
	ErrCounter = errors.New("the order wants a ledger with its counter")
	// ErrSerial says that a grant does not have a serial.
	ErrSerial = errors.New("the order does not have this serial")
)

// An Order is the owner's leave to make units of one product.
type Order struct {
	Version int `json:"version"`
	// ID names the order: letters, digits and -._
	ID string `json:"id"`
	// Product is what is made, for people and for the probe of a board.
	Product string `json:"product"`
	// Profile is the name of the line's profile, and ProfileSHA256 the hex SHA-256 of its file: what devices get is what the owner saw.
	Profile       string `json:"profile"`
	ProfileSHA256 string `json:"profileSha256"`
	// Quantity is how many units may be made.
	Quantity int64   `json:"quantity"`
	Serials  Serials `json:"serials"`
	// IDScope and GlobalEndpoint are what devices are stamped with.
	IDScope        string `json:"idScope"`
	GlobalEndpoint string `json:"globalEndpoint"`
	// Issuer is the hex SHA-256 of the issuing CA's public key (SubjectPublicKeyInfo); empty where no certificates are made.
	Issuer string `json:"issuer,omitempty"`
	// Holder is the station that has the order, by the hex SHA-256 of its public key (SubjectPublicKeyInfo); Stations are those that may work on leases.
	Holder   string   `json:"holder"`
	Stations []string `json:"stations,omitempty"`
	// Counter is the name of the counter that the holder's ledger must be tied to; empty asks for none. With it a ledger that was made
	// anew, or freed of its counter, does not serve.
	Counter string `json:"counter,omitempty"`
	// NotBefore and NotAfter bound when units may be begun.
	NotBefore time.Time `json:"notBefore"`
	NotAfter  time.Time `json:"notAfter"`
}

// A Lease is a part of an order that another station works on.
type Lease struct {
	Version int `json:"version"`
	// ID names the lease: the order's ID, "/" and a word.
	ID string `json:"id"`
	// Order is the order's own envelope, as text: its octets are what was signed.
	Order string `json:"order"`
	// Station is the one that may work on it.
	Station   string    `json:"station"`
	Quantity  int64     `json:"quantity"`
	Serials   Serials   `json:"serials"`
	NotBefore time.Time `json:"notBefore"`
	NotAfter  time.Time `json:"notAfter"`
}

// A Return is what a station made of a lease; it makes no more of it.
type Return struct {
	Version int       `json:"version"`
	Lease   string    `json:"lease"`
	Station string    `json:"station"`
	At      time.Time `json:"at"`
	// Used is how many units count against the lease, Serials whose they are.
	Used    int64    `json:"used"`
	Serials []string `json:"serials"`
	// Report is the station's own report of the lease.
	Report *Report `json:"report,omitempty"`
}

// A Permit is the owner's word that scrapped units are shown to be destroyed, so that their order may make others.
type Permit struct {
	Version int    `json:"version"`
	Order   string `json:"order"`
	// Units are those that were seen destroyed, by serial and revision: a permit is good for that identity and for no later one.
	Units  []PermitUnit `json:"units"`
	At     time.Time    `json:"at"`
	Reason string       `json:"reason"`
}

// A PermitUnit is one of them.
type PermitUnit struct {
	Serial   string `json:"serial"`
	Revision int64  `json:"revision"`
}

// Covers reports whether the permit is for a unit of an order.
func (p *Permit) Covers(order, serial string, revision int64) bool {
	return p.Order == order && slices.Contains(p.Units, PermitUnit{serial, revision})
}

func invalid(format string, args ...any) error {
	return fmt.Errorf("%w: %w", ErrInvalid, fmt.Errorf(format, args...))
}

// Check says what keeps o from being an order.
func (o *Order) Check() error {
	switch {
	case o.Version != version:
		return invalid("version %d is not known", o.Version)
	case !hsm.ValidName(o.ID) || len(o.ID) > 60:
		return invalid("order ID %.60q: want 1 to 60 letters, digits and -._", o.ID)
	case o.Product == "" || len(o.Product) > maxText:
		return invalid("order %s names no product", o.ID)
	case !hsm.ValidName(o.Profile) || !isHash(o.ProfileSHA256):
		return invalid("order %s: profile %.60q with hash %.70q", o.ID, o.Profile, o.ProfileSHA256)
	case o.Issuer != "" && !isHash(o.Issuer), !isHash(o.Holder), len(o.Stations) > maxStations:
		return invalid("order %s: issuer, holder and stations are named by the SHA-256 of their public keys, in hex", o.ID)
	case o.Counter != "" && !hsm.ValidCounterName(o.Counter):
		return invalid("order %s: counter %.40q", o.ID, o.Counter)
	case o.GlobalEndpoint == "" || len(o.GlobalEndpoint) > maxText:
		return invalid("order %s names no global endpoint", o.ID)
	}
	if err := dps.CheckIDScope(o.IDScope); err != nil {
		return invalid("order %s: %w", o.ID, err)
	}
	for i, s := range o.Stations {
		if !isHash(s) || s == o.Holder || slices.Contains(o.Stations[:i], s) {
			return invalid("order %s: station %.70q is no hash, or named twice", o.ID, s)
		}
	}
	return check("order "+o.ID, o.Quantity, &o.Serials, o.NotBefore, o.NotAfter)
}

func check(what string, quantity int64, s *Serials, from, until time.Time) error {
	if quantity < 1 || quantity > maxQuantity {
		return invalid("%s: quantity %d: want 1 to %d", what, quantity, int64(maxQuantity))
	}
	if !until.After(from) || from.Nanosecond() != 0 || until.Nanosecond() != 0 || from.Year() < 2000 || until.Year() > 9999 {
		return invalid("%s: it is valid from %v to %v: want whole seconds, the one before the other", what, from, until)
	}
	if err := s.check(); err != nil {
		return invalid("%s: %w", what, err)
	}
	if n, counted := s.Count(); counted && n < quantity {
		return invalid("%s: %d units, and %d serials for them", what, quantity, n)
	}
	return nil
}

// check says what keeps l from being a lease of an order.
func (l *Lease) check(o *Order) error {
	prefix := o.ID + "/"
	if l.Version != version || len(l.ID) <= len(prefix) || l.ID[:len(prefix)] != prefix || !hsm.ValidName(l.ID[len(prefix):]) || len(l.ID) > 124 {
		return invalid("lease %.130q of order %s", l.ID, o.ID)
	}
	if l.Quantity > o.Quantity || l.NotBefore.Before(o.NotBefore) || l.NotAfter.After(o.NotAfter) {
		return invalid("lease %s goes beyond its order", l.ID)
	}
	if !slices.Contains(o.Stations, l.Station) {
		return invalid("lease %s is for a station that its order does not name", l.ID)
	}
	return check("lease "+l.ID, l.Quantity, &l.Serials, l.NotBefore, l.NotAfter)
}

func isHash(s string) bool {
	b, err := hex.DecodeString(s)
	return err == nil && len(b) == sha256.Size && hex.EncodeToString(b) == s
}

// Sign returns the order, signed with the owner's key.
func (o *Order) Sign(owner crypto.Signer) ([]byte, error) {
	if err := o.Check(); err != nil {
		return nil, err
	}
	return seal(owner, orderType, o)
}

// Sign returns the lease, signed with the holder's key. The order in it must be the holder's.
func (l *Lease) Sign(holder crypto.Signer, owners []crypto.PublicKey) ([]byte, error) {
	o, _, err := OpenOrder([]byte(l.Order), owners)
	if err != nil {
		return nil, err
	}
	id, err := signed.KeyID(holder.Public())
	if err != nil {
		return nil, err
	}
	if id != o.Holder {
		return nil, fmt.Errorf("lease %s: %w: only its holder cuts leases from order %s", l.ID, ErrStation, o.ID)
	}
	if err := l.check(o); err != nil {
		return nil, err
	}
	return seal(holder, leaseType, l)
}

// Sign returns the return, signed with the station's key.
func (r *Return) Sign(station crypto.Signer) ([]byte, error) { return seal(station, returnType, r) }

// Sign returns the permit, signed with the owner's key.
func (p *Permit) Sign(owner crypto.Signer) ([]byte, error) { return seal(owner, permitType, p) }

func seal(by crypto.Signer, payloadType string, v any) ([]byte, error) {
	raw, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	payload, err := jcs.Transform(raw)
	if err != nil {
		return nil, err
	}
	if len(payload) > MaxDocument/2 {
		return nil, fmt.Errorf("a document of %d octets would not be read", len(payload))
	}
	return signed.Sign(by, payloadType, payload)
}

// open verifies an envelope and reads its payload, in the one form that seal writes.
func open(b []byte, payloadType string, trusted []crypto.PublicKey, v any) (keyID string, err error) {
	if len(b) > MaxDocument {
		return "", fmt.Errorf("%w: %d octets", signed.ErrCorrupt, len(b))
	}
	e, err := signed.Parse(bytes.TrimSuffix(b, []byte("\n")))
	if err != nil {
		return "", err
	}
	payload, keyID, err := e.Verify(payloadType, trusted)
	if err != nil {
		return "", err
	}
	return keyID, decode(payload, v)
}

func decode(payload []byte, v any) error {
	dec := json.NewDecoder(bytes.NewReader(payload))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return invalid("%w", err)
	}
	raw, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if again, err := jcs.Transform(raw); err != nil || !bytes.Equal(again, payload) {
		return invalid("it is not in the form that is signed")
	}
	return nil
}

// OpenOrder verifies an order against the owners' keys. The errors are those of package signed, and ErrInvalid.
func OpenOrder(b []byte, owners []crypto.PublicKey) (*Order, string, error) {
	o := &Order{}
	keyID, err := open(b, orderType, owners, o)
	if err != nil {
		return nil, "", err
	}
	return o, keyID, o.Check()
}

// OpenReturn verifies the return of a lease against the key of the station that had it.
func OpenReturn(b []byte, station crypto.PublicKey) (*Return, error) {
	r := &Return{}
	id, err := open(b, returnType, []crypto.PublicKey{station}, r)
	switch {
	case err != nil:
		return nil, err
	case r.Version != version || r.Station != id || r.Used < 0 || int64(len(r.Serials)) != r.Used:
		return nil, invalid("the return of lease %.130q", r.Lease)
	}
	return r, nil
}

// DescribeReturn returns what the return of a lease says. Nothing of it is verified.
func DescribeReturn(b []byte) (*Return, error) {
	e, err := signed.Parse(bytes.TrimSuffix(b, []byte("\n")))
	if err != nil {
		return nil, err
	}
	r := &Return{}
	return r, decode(e.Unverified(), r)
}

// OpenPermit verifies a permit against the owners' keys.
func OpenPermit(b []byte, owners []crypto.PublicKey) (*Permit, error) {
	p := &Permit{}
	if _, err := open(b, permitType, owners, p); err != nil {
		return nil, err
	}
	if p.Version != version || p.Order == "" || len(p.Units) == 0 {
		return nil, invalid("a permit without order or units")
	}
	return p, nil
}

// Describe returns what an order or a lease says of itself. Nothing of it is verified.
func Describe(b []byte) (*Grant, error) { return grant(b, nil, false) }

// A Grant is what a station works on: an order, or a lease with its order inside.
type Grant struct {
	Order Order
	// Lease is nil where the order itself is worked on.
	Lease *Lease
	// Document is the envelope.
	Document []byte
}

// Open verifies an order or a lease against the owners' keys. A lease is signed by the holder of its order, whose public key
// comes with holders. The station that reads it asks [Grant.For] next.
func Open(b []byte, owners, holders []crypto.PublicKey) (*Grant, error) {
	return grant(b, &trust{owners, holders}, true)
}

type trust struct{ owners, holders []crypto.PublicKey }

func grant(b []byte, t *trust, verify bool) (*Grant, error) {
	if len(b) > MaxDocument {
		return nil, fmt.Errorf("%w: %d octets", signed.ErrCorrupt, len(b))
	}
	b = bytes.TrimSuffix(b, []byte("\n"))
	e, err := signed.Parse(b)
	if err != nil {
		return nil, err
	}
	g := &Grant{Document: b}
	if !verify {
		switch e.PayloadType() {
		case orderType:
			return g, decode(e.Unverified(), &g.Order)
		case leaseType:
			g.Lease = &Lease{}
			if err := decode(e.Unverified(), g.Lease); err != nil {
				return nil, err
			}
			inner, err := signed.Parse([]byte(g.Lease.Order))
			if err != nil {
				return nil, err
			}
			return g, decode(inner.Unverified(), &g.Order)
		}
		return nil, invalid("it holds a %.100q, no order and no lease", e.PayloadType())
	}
	if e.PayloadType() != leaseType {
		o, _, err := OpenOrder(b, t.owners)
		if err != nil {
			return nil, err
		}
		g.Order = *o
		return g, nil
	}
	g.Lease = &Lease{}
	signer, err := open(b, leaseType, t.holders, g.Lease)
	if err != nil {
		return nil, fmt.Errorf("the lease's signature: %w", err)
	}
	o, _, err := OpenOrder([]byte(g.Lease.Order), t.owners)
	if err != nil {
		return nil, fmt.Errorf("the order in the lease: %w", err)
	}
	if signer != o.Holder {
		return nil, fmt.Errorf("%w: lease %s is signed by another station than the holder of its order", ErrStation, g.Lease.ID)
	}
	g.Order = *o
	return g, g.Lease.check(o)
}

// ID names the grant: the order's ID, or the lease's.
func (g *Grant) ID() string {
	if g.Lease != nil {
		return g.Lease.ID
	}
	return g.Order.ID
}

// Quantity is how many units may be made on the grant.
func (g *Grant) Quantity() int64 {
	if g.Lease != nil {
		return g.Lease.Quantity
	}
	return g.Order.Quantity
}

// Window is when units may be begun on the grant.
func (g *Grant) Window() (from, until time.Time) {
	if g.Lease != nil {
		return g.Lease.NotBefore, g.Lease.NotAfter
	}
	return g.Order.NotBefore, g.Order.NotAfter
}

// Station names whose grant it is.
func (g *Grant) Station() string {
	if g.Lease != nil {
		return g.Lease.Station
	}
	return g.Order.Holder
}

// For says what keeps a station, by its public key, from working on the grant.
func (g *Grant) For(station crypto.PublicKey) error {
	id, err := signed.KeyID(station)
	if err != nil {
		return err
	}
	if id != g.Station() {
		return fmt.Errorf("%s: %w: it names %s, this one is %s", g.ID(), ErrStation, g.Station(), id)
	}
	return nil
}

// Making is what a line is about to make.
type Making struct {
	Profile       string
	ProfileSHA256 string
	IDScope       string
	Endpoint      string
	Issuer        string // hex SHA-256 of the issuing CA's public key; empty where no certificates are made
}

// Covers says what keeps a line from making that on the grant.
func (g *Grant) Covers(m Making) error {
	o := &g.Order
	for _, c := range [][3]string{
		{"profile", o.Profile, m.Profile}, {"profile's content", o.ProfileSHA256, m.ProfileSHA256}, {"ID scope", dps.Fold(o.IDScope), dps.Fold(m.IDScope)},
		{"global endpoint", o.GlobalEndpoint, m.Endpoint}, {"issuing CA", o.Issuer, m.Issuer},
	} {
		if c[1] != c[2] {
			return fmt.Errorf("%s: %w: it names %s %s, the line has %s", g.ID(), ErrProduct, c[0], orNone(c[1]), orNone(c[2]))
		}
	}
	return nil
}

func orNone(s string) string {
	if s == "" {
		return "none"
	}
	return s
}

// Admits says what keeps a serial from being made on the grant.
func (g *Grant) Admits(serial string) error {
	if !g.Order.Serials.Has(serial) || g.Lease != nil && !g.Lease.Serials.Has(serial) {
		return fmt.Errorf("%s: %w: %s", g.ID(), ErrSerial, serial)
	}
	return nil
}
