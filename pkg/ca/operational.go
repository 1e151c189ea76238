package ca

import (
	"crypto"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/touchmark/touchmark/hsm"
)

// An Operational issues operational certificates: leaves for keys that devices bring. Many goroutines may use it.
//
// A leaf ends with its profile's validity, or with the first certificate above it that ends. One whose CA has ended, or has not
// begun, plans no more, and works again when it is told another time.
type Operational struct {
	issuer  *Issuer
	profile Profile
	keys    []hsm.Algorithm
	chain   [][]byte

	mu       sync.Mutex
	prepared *Prepared // nil until the issuer was valid
}

// NewOperational returns an issuer of certificates by a profile, for keys of those kinds; nil means all of [RequestKeys]. The
// issuer's chain must end in a root. Whether the issuer is valid shows when a certificate is planned; [Operational.Ready] asks.
func NewOperational(i *Issuer, p Profile, keys []hsm.Algorithm) (*Operational, error) {
	if p.Validity <= 0 {
		return nil, fmt.Errorf("certificates that are valid for %v", p.Validity)
	}
	o := &Operational{issuer: i, profile: p, keys: keys}
	if o.keys == nil {
		o.keys = RequestKeys()
	}
	for _, k := range o.keys {
		if !slices.Contains(RequestKeys(), k) {
			return nil, fmt.Errorf("keys of kind %q: want some of %v", k, RequestKeys())
		}
	}
	last := i.cfg.Certificate
	o.profile.Until = last.NotAfter
	o.chain = append(o.chain, last.Raw)
	for _, c := range i.cfg.Chain {
		last, o.profile.Until = c, earlier(o.profile.Until, c.NotAfter)
		o.chain = append(o.chain, c.Raw)
	}
	if err := last.CheckSignatureFrom(last); err != nil {
		return nil, fmt.Errorf("the chain ends in %q, which is no root: %w", last.Subject, err)
	}
	if _, err := o.prepare(); err != nil && !errors.Is(err, ErrEnded) && !errors.Is(err, ErrClock) {
		return nil, err
	}
	return o, nil
}

func (o *Operational) prepare() (*Prepared, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.prepared == nil {
		var err error
		if o.prepared, err = o.issuer.Prepare(o.profile); err != nil {
			return nil, err
		}
	}
	return o.prepared, nil
}

// Ready says why no certificate could be planned now: [ErrEnded], or [ErrClock].
func (o *Operational) Ready() error {
	p, err := o.prepare()
	if err != nil {
		return err
	}
	return p.checkValidity(o.issuer.cfg.Now())
}

// Takes says why a key gets no certificate: it is of another kind.
func (o *Operational) Takes(pub crypto.PublicKey) error {
	alg, err := AlgorithmOf(pub)
	if err == nil && !slices.Contains(o.keys, alg) {
		err = fmt.Errorf("a key of kind %s gets no certificate here", alg)
	}
	return err
}

// Plan fixes the certificate of a unit, as [Prepared.Plan] does.
func (o *Operational) Plan(u Unit) (Plan, error) {
	p, err := o.prepare()
	if err != nil {
		return Plan{}, err
	}
	return p.Plan(u)
}

// Issue signs a plan for a key, and returns DER.
func (o *Operational) Issue(plan Plan, pub crypto.PublicKey) ([]byte, error) {
	p, err := o.prepare()
	if err != nil {
		return nil, err
	}
	return p.Issue(plan, pub)
}

// Chain returns what goes behind a leaf, in DER: the issuer's certificate, and so on up to the root.
func (o *Operational) Chain() [][]byte { return o.chain }
