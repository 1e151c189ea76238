package registration

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/evidence"
)

// A CACertificate is a CA certificate that operators keep in a scope under a name (service API, section 3.6). Enrollment groups
// refer to it by that name, and it admits devices while it is verified.
type CACertificate struct {
	Name string `json:"name"` // as it was given; names differ in more than case
	DER  []byte `json:"der"`
	// Verified says that somebody showed to have its key, or that whoever put it there vouches for it.
	Verified bool `json:"verified,omitempty"`
	// Code is what the common name of a certificate must be that shows so; empty before one was asked for and after it was used.
	Code    string    `json:"code,omitempty"`
	ETag    string    `json:"etag"`
	Created time.Time `json:"created"`
	Updated time.Time `json:"updated"`
}

const (
	maxCACertificateName = 256
	// maxCACertificates is what a scope may have, and maxCACertificatesAzure under quotas "azure" (service API, section 4.11).
	maxCACertificates      = 1000
	maxCACertificatesAzure = 25
)

// caNotFound is for the log, in Azure's words.
const caNotFound = "CA certificate not found"

// CheckCertificateName says what keeps name from being a certificate's of a scope: 1 to 256 letters, digits, and - . _
func CheckCertificateName(name string) error {
	plain := func(r rune) bool {
		return 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || strings.ContainsRune("-._", r)
	}
	if name == "" || len(name) > maxCACertificateName || strings.Trim(name, ".") == "" || strings.ContainsFunc(name, func(r rune) bool { return !plain(r) }) {
		return fmt.Errorf("certificate name %.100q: want 1 to %d letters, digits, hyphens, dots and underscores", name, maxCACertificateName)
	}
	return nil
}

func noCertificate(name string) *dps.Error {
	return dps.NewError(dps.CodeNoCertificate, fmt.Sprintf("Certificate %s not found.", name), nil)
}

// CACertificates returns the certificates of the scope, by name.
func (s *Service) CACertificates(ctx context.Context) (all []*CACertificate, err error) {
	err = s.cfg.Store.View(ctx, func(tx Tx) error {
		all, err = tx.CACertificates(s.scope)
		return err
	})
	return all, err
}

// CACertificate returns a certificate of the scope.
func (s *Service) CACertificate(ctx context.Context, name string) (c *CACertificate, err error) {
	err = s.cfg.Store.View(ctx, func(tx Tx) error {
		c, err = tx.CACertificate(s.scope, dps.Fold(name))
		return err
	})
	if errors.Is(err, ErrNotFound) {
		err = noCertificate(name)
	}
	return c, err
}

// PutCACertificate puts a certificate into the scope, or replaces the one of that name: text is PEM, or base64 of PEM or DER.
// Without ifMatch it only creates; with a tag, or "*", it only replaces. Other content than before is not verified, unless
// verified says so; nil leaves what was verified as it was.
func (s *Service) PutCACertificate(ctx context.Context, by Actor, name, text string, verified *bool, ifMatch string) (*CACertificate, error) {
	if err := CheckCertificateName(name); err != nil {
		return nil, invalid("%v", err)
	}
	cert, err := parseCertificate(text)
	if err != nil {
		return nil, invalid("%v", err)
	}
	if cert.BasicConstraintsValid && !cert.IsCA {
		return nil, invalid("The certificate is no CA's")
	}
	if now := s.cfg.Now(); now.After(cert.NotAfter) {
		return nil, invalid("The certificate expired at %s", cert.NotAfter.UTC().Format(time.RFC3339))
	}
	if _, err := evidence.KeyHash(cert.PublicKey); err != nil {
		return nil, invalid("The certificate's public key is of a kind that is not known")
	}
	return s.editCACertificate(ctx, by, "put", name, ifMatch, func(tx Tx, c *CACertificate) error {
		if c.ETag == "" {
			if err := s.roomForCA(tx); err != nil {
				return err
			}
			c.Name = name
		}
		if !bytes.Equal(c.DER, cert.Raw) {
			c.DER, c.Verified, c.Code = cert.Raw, false, ""
		}
		if verified != nil {
			c.Verified = *verified
		}
		return nil
	})
}

// roomForCA refuses one certificate more than a scope may have.
func (s *Service) roomForCA(tx Tx) error {
	all, err := tx.CACertificates(s.scope)
	if err != nil {
		return err
	}
	most := maxCACertificates
	sc, err := found(tx.Scope(s.scope))
	if err != nil {
		return err
	}
	if sc != nil && sc.Quotas == "azure" {
		most = maxCACertificatesAzure
	}
	if len(all) >= most {
		return invalid("The service has %d certificates, which is all that it may have", len(all))
	}
	return nil
}

// NewVerificationCode gives a certificate a fresh code to show the possession of its key by, in place of the one before.
func (s *Service) NewVerificationCode(ctx context.Context, by Actor, name, ifMatch string) (*CACertificate, error) {
	return s.changeCACertificate(ctx, by, "new verification code", name, ifMatch, func(_ Tx, c *CACertificate) error {
		b := make([]byte, 24)
		_, _ = rand.Read(b) // crypto/rand.Read never fails
		c.Code = fmt.Sprintf("%X", b)
		return nil
	})
}

// VerifyCACertificate verifies a certificate by another that its key signed just for this: its common name is the code, to the
// letter, and it is valid now. The code is used up by that, and stays where the proof is not good.
func (s *Service) VerifyCACertificate(ctx context.Context, by Actor, name, text, ifMatch string) (*CACertificate, error) {
	proof, err := parseCertificate(text)
	if err != nil {
		return nil, invalid("%v", err)
	}
	return s.changeCACertificate(ctx, by, "verify", name, ifMatch, func(_ Tx, c *CACertificate) error {
		ca, err := x509.ParseCertificate(c.DER)
		if err != nil {
			return fmt.Errorf("certificate %q in the store: %w", c.Name, err)
		}
		switch now := s.cfg.Now(); {
		case c.Code == "":
			return invalid("There is no verification code: generate one first")
		case proof.Subject.CommonName != c.Code:
			return invalid("The common name of the certificate is not the verification code")
		case now.Add(attest.Skew).Before(proof.NotBefore) || now.After(proof.NotAfter):
			return invalid("The certificate is not valid now")
		case !bytes.Equal(proof.RawIssuer, ca.RawSubject):
			return invalid("The certificate was not issued by the CA")
		}
		if err := ca.CheckSignature(proof.SignatureAlgorithm, proof.RawTBSCertificate, proof.Signature); err != nil {
			return dps.NewError(dps.CodeInvalidArgument, "The certificate was not signed by the CA", err)
		}
		c.Verified, c.Code = true, ""
		return nil
	})
}

// changeCACertificate is editCACertificate for what is there: ifMatch is needed.
func (s *Service) changeCACertificate(ctx context.Context, by Actor, action, name, ifMatch string, edit func(Tx, *CACertificate) error) (*CACertificate, error) {
	if ifMatch == "" {
		return nil, dps.NewError(dps.CodeETagMismatch, "If-Match is needed", nil)
	}
	return s.editCACertificate(ctx, by, action, name, ifMatch, edit)
}

// editCACertificate changes a certificate in one transaction, and what groups refer to by it. edit may run more than once.
func (s *Service) editCACertificate(ctx context.Context, by Actor, action, name, ifMatch string, edit func(Tx, *CACertificate) error) (c *CACertificate, err error) {
	err = s.cfg.Store.Update(ctx, func(tx Tx) error {
		was, err := s.matchingCA(tx, name, ifMatch)
		if err != nil {
			return err
		}
		now := s.cfg.Now().UTC()
		c = &CACertificate{Created: now}
		if was != nil {
			*c = *was
		}
		if err := edit(tx, c); err != nil {
			return err
		}
		c.ETag, c.Updated = newETag(), now
		if err := tx.PutCACertificate(s.scope, c); err != nil {
			return err
		}
		if err := s.reindex(tx, name); err != nil {
			return err
		}
		var before any
		if was != nil {
			before = was
		}
		return tx.PutAudit(s.scope, NewAudit(by, action, "certificate/"+c.Name, before, c, now))
	})
	return c, err
}

// matchingCA returns the certificate of a name for whoever changes it, nil where it is to be made.
func (s *Service) matchingCA(tx Tx, name, ifMatch string) (*CACertificate, error) {
	c, err := found(tx.CACertificate(s.scope, dps.Fold(name)))
	switch {
	case err != nil:
		return nil, err
	case c == nil && ifMatch != "":
		return nil, noCertificate(name)
	case c != nil && ifMatch == "":
		return nil, dps.NewError(dps.CodeETagMismatch, "There is a certificate of that name: to change it, give its etag in If-Match", nil)
	case c != nil && ifMatch != "*" && !sameTag(ifMatch, c.ETag):
		return nil, dps.NewError(dps.CodeETagMismatch, "The certificate was changed meanwhile", nil)
	}
	return c, nil
}

// DeleteCACertificate removes a certificate. Groups that refer to it stay, and let nobody in.
func (s *Service) DeleteCACertificate(ctx context.Context, by Actor, name, ifMatch string) error {
	if ifMatch == "" {
		return dps.NewError(dps.CodeETagMismatch, "If-Match is needed", nil)
	}
	return s.cfg.Store.Update(ctx, func(tx Tx) error {
		was, err := s.matchingCA(tx, name, ifMatch)
		if err != nil {
			return err
		}
		if err := tx.DeleteCACertificate(s.scope, dps.Fold(name)); err != nil {
			return err
		}
		if err := s.reindex(tx, name); err != nil {
			return err
		}
		return tx.PutAudit(s.scope, NewAudit(by, "delete", "certificate/"+was.Name, was, nil, s.cfg.Now()))
	})
}

// A group that refers to certificates keeps beside the names, in its document and in the index of CAs, what they stand for: as
// signing certificates, that answers do not show, with a description only while they are verified. So finding a device's group
// is the same for all groups; and one whose certificate is not verified, or gone, still decides about the devices below it, and
// lets none in.

// references returns the folded names of the certificates that a group refers to.
func (d *document) references() (names []string) {
	if a := d.base().Attestation; a != nil && a.X509 != nil && a.X509.CAReferences != nil {
		for _, name := range []string{a.X509.CAReferences.Primary, a.X509.CAReferences.Secondary} {
			if name = dps.Fold(name); name != "" && !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
	}
	return names
}

func checkReferences(refs *dps.CAReferences) error {
	if refs.Primary == "" && refs.Secondary == "" {
		return invalid("caReferences needs the name of a certificate")
	}
	for _, name := range []string{refs.Primary, refs.Secondary} {
		if name == "" {
			continue
		}
		if err := CheckCertificateName(name); err != nil {
			return invalid("%v", err)
		}
	}
	return nil
}

// resolve puts what a group refers to into its attestation, which it replaces a part of, and the index of its record. before is
// the group as it was, or nil: what a certificate stood for that is not there any more stays.
func (s *Service) resolve(tx Tx, r *Record, a *dps.Attestation, before *document) error {
	now := &document{kind: Group, group: &dps.EnrollmentGroup{}}
	x := *a.X509
	x.SigningCertificates = &dps.X509Certificates{}
	now.group.Attestation = &dps.Attestation{Type: a.Type, X509: &x}
	for _, slot := range []struct {
		name string
		into **dps.X509Certificate
	}{{x.CAReferences.Primary, &x.SigningCertificates.Primary}, {x.CAReferences.Secondary, &x.SigningCertificates.Secondary}} {
		if slot.name == "" {
			continue
		}
		c, err := found(tx.CACertificate(s.scope, dps.Fold(slot.name)))
		if err != nil {
			return err
		}
		if c == nil {
			if *slot.into = before.stoodFor(slot.name); *slot.into == nil {
				return dps.NewError(dps.CodeInvalidArgument, "CA certificate not found.", nil)
			}
			continue
		}
		cert := &dps.X509Certificate{Certificate: base64.StdEncoding.EncodeToString(c.DER)}
		if c.Verified {
			parsed, err := x509.ParseCertificate(c.DER)
			if err != nil {
				return fmt.Errorf("certificate %q in the store: %w", c.Name, err)
			}
			cert.Info = describe(parsed)
		}
		*slot.into = cert
	}
	if err := s.apart(now); err != nil {
		return err
	}
	var err error
	if _, r.Certificates, err = completeCertificates(Group, x.SigningCertificates, nil); err != nil {
		return err
	}
	a.X509, r.CAReferences = &x, now.references()
	return nil
}

// stoodFor returns what a name stands for in a group, as what is not there any more; nil for a name that it does not refer to.
func (d *document) stoodFor(name string) *dps.X509Certificate {
	if d == nil || !slices.Contains(d.references(), dps.Fold(name)) {
		return nil
	}
	refs, certs := d.base().Attestation.X509.CAReferences, d.x509()
	c := certs.Secondary
	if strings.EqualFold(refs.Primary, name) {
		c = certs.Primary
	}
	if c == nil {
		return nil
	}
	return &dps.X509Certificate{Certificate: c.Certificate}
}

// reindex writes the groups again that refer to a certificate.
func (s *Service) reindex(tx Tx, name string) error {
	groups, err := tx.GroupsByReference(s.scope, dps.Fold(name))
	if err != nil {
		return err
	}
	for _, r := range groups {
		d, err := open(r)
		if err != nil {
			return err
		}
		if err := s.resolve(tx, r, d.base().Attestation, d); err != nil {
			return err
		}
		if r.Document, err = d.encode(); err != nil {
			return err
		}
		if err := tx.PutRecord(s.scope, r); errors.Is(err, ErrConflict) {
			return dps.NewError(dps.CodeInvalidArgument, fmt.Sprintf("Group %s refers to the certificate. %s", r.ID, whose(err)), err)
		} else if err != nil {
			return err
		}
	}
	return nil
}

// caPool returns the certificates of the scope that are verified, or those that are not.
func (s *Service) caPool(view groupReader, verified bool) (*x509.CertPool, error) {
	all, err := view.CACertificates(s.scope)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	for _, c := range all {
		if c.Verified != verified {
			continue
		}
		cert, err := x509.ParseCertificate(c.DER)
		if err != nil {
			return nil, fmt.Errorf("certificate %q in the store: %w", c.Name, err)
		}
		pool.AddCert(cert)
	}
	return pool, nil
}

// rooted refuses, under StrictRoots, a device whose chain does not go on from its group's CA to a verified certificate of the
// scope (service API, section 4.3).
func (s *Service) rooted(view groupReader, revision int64, presented []*x509.Certificate, g *cachedGroup) error {
	known, err := s.knownAt(view, revision)
	if err != nil || known.roots == nil {
		return err
	}
	now := s.cfg.Now()
	o := x509.VerifyOptions{Roots: known.roots, Intermediates: x509.NewCertPool(), CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}
	for _, c := range slices.Concat(g.cas, presented[1:], s.cfg.Intermediates) {
		o.Intermediates.AddCert(c)
	}
	if begins := presented[0].NotBefore; begins.After(now) { // within attest.Skew, as was checked
		o.CurrentTime = begins
	}
	ends := func() (roots []*x509.Certificate, err error) {
		chains, err := presented[0].Verify(o)
		for _, chain := range chains {
			if slices.ContainsFunc(chain, func(c *x509.Certificate) bool { return slices.ContainsFunc(g.cas, c.Equal) }) {
				roots = append(roots, chain[len(chain)-1])
			}
		}
		return roots, err
	}
	roots, why := ends()
	if len(roots) > 0 {
		return nil
	}
	if o.Roots, err = s.caPool(view, false); err != nil {
		return err
	}
	would, _ := ends()
	return s.uncounted(view, fmt.Sprintf("group %q: no way from its CA to a verified certificate of the scope: %s", g.id, caNotFound), why,
		func(c *x509.Certificate) bool { return slices.ContainsFunc(would, c.Equal) })
}

// uncounted refuses a device that no certificate of the scope vouches for: it says which one would that is there and not verified, or
// else why.
func (s *Service) uncounted(view groupReader, text string, why error, is func(*x509.Certificate) bool) error {
	all, err := view.CACertificates(s.scope)
	if err != nil {
		return err
	}
	for _, c := range all {
		if cert, err := x509.ParseCertificate(c.DER); err == nil && !c.Verified && is(cert) {
			return because("ca-unverified", "%s: certificate %q is not verified", text, c.Name)
		}
	}
	return because("ca-missing", "%s: %v", text, why)
}
