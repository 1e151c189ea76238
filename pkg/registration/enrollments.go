package registration

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/evidence"
)

// An enrollment as the API moves it: one of the two documents, with what they share pulled out.
type document struct {
	kind       Kind
	individual *dps.IndividualEnrollment
	group      *dps.EnrollmentGroup
}

func newDocument(kind Kind) *document {
	if kind == Individual {
		return &document{kind: kind, individual: &dps.IndividualEnrollment{}}
	}
	return &document{kind: kind, group: &dps.EnrollmentGroup{}}
}

func (d *document) value() any {
	if d.kind == Individual {
		return d.individual
	}
	return d.group
}

func (d *document) id() *string {
	if d.kind == Individual {
		return &d.individual.RegistrationID
	}
	return &d.group.EnrollmentGroupID
}

func (d *document) base() *dps.Enrollment {
	if d.kind == Individual {
		return &d.individual.Enrollment
	}
	return &d.group.Enrollment
}

func (d *document) x509() *dps.X509Certificates {
	a := d.base().Attestation
	if a == nil || a.X509 == nil {
		return nil
	}
	if d.kind == Individual {
		return a.X509.ClientCertificates
	}
	return a.X509.SigningCertificates
}

func open(r *Record) (*document, error) {
	d := newDocument(r.Kind)
	if err := json.Unmarshal(r.Document, d.value()); err != nil {
		return nil, fmt.Errorf("%s %q in the store: %w", r.Kind, r.ID, err)
	}
	return d, nil
}

func missing(kind Kind) *dps.Error {
	if kind == Individual {
		return dps.NewError(dps.CodeNoEnrollment, "Enrollment not found.", nil)
	}
	return dps.NewError(dps.CodeNoGroup, "EnrollmentGroup not found.", nil)
}

func taken(kind Kind) *dps.Error {
	if kind == Individual {
		return dps.NewError(dps.CodeEnrollmentExists, "Enrollment already exists.", nil)
	}
	return dps.NewError(dps.CodeGroupExists, "EnrollmentGroup already exists.", nil)
}

func invalid(format string, args ...any) *dps.Error {
	return dps.NewError(dps.CodeInvalidArgument, fmt.Sprintf(format, args...), nil)
}

// sameTag compares entity tags after stripping one layer of quotes from both sides: clients send all spellings.
func sameTag(a, b string) bool { return strings.Trim(a, `"`) == strings.Trim(b, `"`) }

// PutEnrollment creates or replaces an individual enrollment or a group from its wire form. Without ifMatch it only
// creates; with "*" it only replaces; with a tag it replaces that version (service API, section 1.6). The answer shows
// symmetric keys, made ones included.
func (s *Service) PutEnrollment(ctx context.Context, kind Kind, id string, body []byte, ifMatch string) (any, error) {
	d := newDocument(kind)
	if err := json.Unmarshal(body, d.value()); err != nil {
		return nil, dps.NewError(dps.CodeInvalidArgument, "The body is not a valid enrollment", err)
	}
	if *d.id() == "" {
		return nil, invalid("The body has no ID")
	}
	if dps.Fold(*d.id()) != dps.Fold(id) {
		return nil, invalid("The ID of the body is not that of the path")
	}
	if err := s.check(d); err != nil {
		return nil, err
	}
	now := dps.Time{Time: s.cfg.Now()}
	var keys *dps.SymmetricKeyAttestation
	err := s.cfg.Store.Update(ctx, func(tx Tx) error {
		d := *d // f may run again: work on a copy of what it changes
		base := *d.base()
		attestation := *base.Attestation
		base.Attestation = &attestation
		base.CreatedDateTimeUTC, base.LastUpdatedDateTimeUTC, base.ETag = &now, &now, newETag()
		old, err := tx.Record(s.scope, kind, dps.Fold(id))
		var before *document
		switch {
		case err == nil && ifMatch == "":
			return taken(kind)
		case errors.Is(err, ErrNotFound) && ifMatch != "":
			return missing(kind)
		case err != nil && !errors.Is(err, ErrNotFound):
			return err
		case err == nil:
			if before, err = open(old); err != nil {
				return err
			}
			if ifMatch != "*" && !sameTag(ifMatch, before.base().ETag) {
				return dps.NewError(dps.CodeETagMismatch, "The enrollment was changed meanwhile", nil)
			}
			if before.base().Attestation.Type != attestation.Type {
				return invalid("The attestation type of an enrollment cannot be changed")
			}
			base.CreatedDateTimeUTC = before.base().CreatedDateTimeUTC
		}
		r := &Record{Kind: kind, ID: *d.id(), Closed: old != nil && old.Closed}
		keys = nil
		switch attestation.Type {
		case dps.AttestationSymmetricKey:
			if keys, err = completeKeys(attestation.SymmetricKey, old); err != nil {
				return err
			}
			if r.Keys, err = json.Marshal(keys); err != nil {
				return err
			}
			attestation.SymmetricKey, r.Symmetric = nil, kind == Group
		case dps.AttestationX509:
			if attestation.X509.CAReferences != nil {
				if err := s.resolve(tx, r, &attestation, before); err != nil {
					return err
				}
				break
			}
			var was *dps.X509Certificates
			if before != nil {
				was = before.x509()
			}
			certs, index, err := completeCertificates(kind, d.x509(), was)
			if err != nil {
				return err
			}
			r.Certificates = index
			if kind == Individual {
				attestation.X509 = &dps.X509Attestation{ClientCertificates: certs}
			} else {
				attestation.X509 = &dps.X509Attestation{SigningCertificates: certs}
			}
		case dps.AttestationTPM:
			if r.Certificates, err = completeTPM(attestation.TPM); err != nil {
				return err
			}
		}
		if kind == Individual {
			in := *d.individual
			in.Enrollment, in.RegistrationState = base, nil
			d.individual = &in
		} else {
			g := *d.group
			g.Enrollment = base
			d.group = &g
		}
		if r.Document, err = json.Marshal(d.value()); err != nil {
			return err
		}
		err = tx.PutRecord(s.scope, r)
		if errors.Is(err, ErrConflict) {
			return invalid("%s", whose(err))
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	answer, err := s.show(ctx, kind, id, false)
	if err != nil {
		return nil, err
	}
	answer.base().Attestation.SymmetricKey = keys
	return answer.value(), nil
}

// whose says in which way a certificate is another enrollment's.
func whose(conflict error) string {
	if errors.Is(conflict, ErrSameCA) {
		return "A CA of this group has the name and the key of another group's: put both certificates into one group, as primary and secondary"
	}
	return "A certificate, or the endorsement key, of this enrollment belongs to another enrollment"
}

// check says what keeps a document from being taken.
func (s *Service) check(d *document) error {
	if err := dps.CheckRegistrationID(*d.id()); err != nil {
		return invalid("%v", err)
	}
	e := d.base()
	if err := e.Attestation.Check(); err != nil {
		return invalid("%v", err)
	}
	switch a := e.Attestation; {
	case a.Type == dps.AttestationTPM && d.kind == Group:
		return invalid("A TPM is one device's: TPM attestation takes an individual enrollment")
	case a.X509 != nil && a.X509.CAReferences != nil && d.kind == Group:
		if err := checkReferences(a.X509.CAReferences); err != nil {
			return err
		}
	case a.X509 != nil && d.x509() == nil:
		return invalid("An individual enrollment takes clientCertificates, a group signingCertificates")
	}
	if p := e.ClientCertificateIssuancePolicy; p != nil && s.cfg.Issuers[p.CertificateAuthorityName] == nil {
		return invalid("There is no certificate authority %.100q in this service", p.CertificateAuthorityName)
	}
	switch {
	case e.AllocationPolicy == dps.AllocationCustom:
		return invalid("Custom allocation is not supported")
	case len(e.IoTHubs) > 0 && e.AllocationPolicy == "":
		return invalid("Enrollment allocationPolicy must be specified when iotHubs are specified.")
	case e.AllocationPolicy == dps.AllocationStatic && len(e.IoTHubs) > 1:
		return invalid("Static allocation takes one hub")
	}
	return s.apart(d)
}

// completeKeys fills in symmetric keys: absent ones stay what they were, or are made.
func completeKeys(in *dps.SymmetricKeyAttestation, old *Record) (*dps.SymmetricKeyAttestation, error) {
	var k, was dps.SymmetricKeyAttestation
	if in != nil {
		k = *in
	}
	if old != nil && old.Keys != nil {
		if err := json.Unmarshal(old.Keys, &was); err != nil {
			return nil, fmt.Errorf("keys of %q in the store cannot be read", old.ID)
		}
	}
	for _, slot := range []struct{ key, was *string }{{&k.PrimaryKey, &was.PrimaryKey}, {&k.SecondaryKey, &was.SecondaryKey}} {
		if *slot.key == "" {
			*slot.key = *slot.was
		}
		if *slot.key == "" {
			b := make([]byte, 64)
			if _, err := rand.Read(b); err != nil {
				return nil, err
			}
			*slot.key = base64.StdEncoding.EncodeToString(b)
		}
		if b, err := base64.StdEncoding.DecodeString(*slot.key); err != nil || len(b) < 16 || len(b) > 64 {
			return nil, invalid("A symmetric key must be base64 of 16 to 64 octets")
		}
	}
	return &k, nil
}

// completeCertificates parses certificates, keeps those that come back as a description only, and indexes them all.
func completeCertificates(kind Kind, in, was *dps.X509Certificates) (*dps.X509Certificates, []Certificate, error) {
	out := &dps.X509Certificates{}
	var index []Certificate
	slot := func(c, stored *dps.X509Certificate) (*dps.X509Certificate, error) {
		if c == nil {
			return nil, nil
		}
		text := c.Certificate
		if text == "" {
			if c.Info == nil || stored == nil || stored.Info == nil || !strings.EqualFold(c.Info.SHA256Thumbprint, stored.Info.SHA256Thumbprint) {
				return nil, invalid("A certificate is missing, and its description is not that of the enrolled one")
			}
			text = stored.Certificate
		}
		cert, err := parseCertificate(text)
		if err != nil {
			return nil, invalid("%v", err)
		}
		entry := Certificate{Fingerprint: sha256.Sum256(cert.Raw), Subject: sha256.Sum256(cert.RawSubject)}
		if entry.Key, err = evidence.KeyHash(cert.PublicKey); err != nil {
			return nil, invalid("The certificate's public key is of a kind that is not known")
		}
		if kind == Group {
			entry.KeyIDs = attest.KeyIDs(cert)
		}
		if len(index) == 0 || index[0].Fingerprint != entry.Fingerprint {
			index = append(index, entry)
		}
		return &dps.X509Certificate{Certificate: base64.StdEncoding.EncodeToString(cert.Raw), Info: describe(cert)}, nil
	}
	var first, second *dps.X509Certificate
	if was != nil {
		first, second = was.Primary, was.Secondary
	}
	var err error
	if out.Primary, err = slot(in.Primary, first); err != nil {
		return nil, nil, err
	}
	if out.Secondary, err = slot(in.Secondary, second); err != nil {
		return nil, nil, err
	}
	if out.Primary == nil && out.Secondary == nil {
		return nil, nil, invalid("An x509 attestation needs a certificate")
	}
	if out.Secondary == nil && in.Primary != nil && in.Primary.Certificate != "" {
		out.Secondary = out.Primary // as the service shows it
	}
	return out, index, nil
}

// IndexGroup returns what indexes the certificates of a group's document, for stores that were written before they had such
// an index; nothing for a group without certificates.
func IndexGroup(document []byte) ([]Certificate, error) {
	d := newDocument(Group)
	if err := json.Unmarshal(document, d.value()); err != nil || d.x509() == nil {
		return nil, err
	}
	_, index, err := completeCertificates(Group, d.x509(), nil)
	return index, err
}

// GetEnrollment returns an individual enrollment or a group, without secrets and certificates. An individual enrollment
// comes with its device's registration.
func (s *Service) GetEnrollment(ctx context.Context, kind Kind, id string) (any, error) {
	d, err := s.show(ctx, kind, id, true)
	if err != nil {
		return nil, err
	}
	return d.value(), nil
}

func (s *Service) show(ctx context.Context, kind Kind, id string, withState bool) (*document, error) {
	var d *document
	err := s.cfg.Store.View(ctx, func(tx Tx) error {
		r, err := tx.Record(s.scope, kind, dps.Fold(id))
		if errors.Is(err, ErrNotFound) {
			return missing(kind)
		}
		if err != nil {
			return err
		}
		if d, err = open(r); err != nil {
			return err
		}
		hide(d)
		if kind != Individual || !withState {
			return nil
		}
		reg, err := tx.Registration(s.scope, dps.Fold(id))
		switch {
		case errors.Is(err, ErrNotFound):
			d.individual.RegistrationState = &dps.RegistrationState{RegistrationID: d.individual.RegistrationID, Status: dps.Unassigned}
		case err != nil:
			return err
		default:
			d.individual.RegistrationState = serviceView(reg)
		}
		return nil
	})
	return d, err
}

// hide takes out what answers do not show.
func hide(d *document) {
	if len(d.references()) > 0 {
		d.base().Attestation.X509.SigningCertificates = nil // what they stand for
	}
	if certs := d.x509(); certs != nil {
		for _, c := range []*dps.X509Certificate{certs.Primary, certs.Secondary} {
			if c != nil {
				c.Certificate = ""
			}
		}
	}
}

// serviceView is a registration as the service API shows it.
func serviceView(r *Registration) *dps.RegistrationState {
	st := r.State
	st.X509, st.SymmetricKey, st.TPM = nil, nil, nil
	return &st
}

// AttestationMechanism returns how an enrollment attests, with symmetric keys.
func (s *Service) AttestationMechanism(ctx context.Context, kind Kind, id string) (*dps.Attestation, error) {
	var a *dps.Attestation
	err := s.cfg.Store.View(ctx, func(tx Tx) error {
		r, err := tx.Record(s.scope, kind, dps.Fold(id))
		if errors.Is(err, ErrNotFound) {
			return missing(kind)
		}
		if err != nil {
			return err
		}
		d, err := open(r)
		if err != nil {
			return err
		}
		hide(d)
		a = d.base().Attestation
		if r.Keys != nil {
			a.SymmetricKey = &dps.SymmetricKeyAttestation{}
			if json.Unmarshal(r.Keys, a.SymmetricKey) != nil {
				return fmt.Errorf("keys of %q in the store cannot be read", r.ID)
			}
		}
		return nil
	})
	return a, err
}

// DeleteEnrollment removes an enrollment or a group. An individual enrollment takes its registration with it; a group's
// devices keep theirs.
func (s *Service) DeleteEnrollment(ctx context.Context, kind Kind, id, ifMatch string) error {
	if kind == Individual {
		defer s.recent.forget(dps.Fold(id)) // its registration goes with it
	}
	return s.cfg.Store.Update(ctx, func(tx Tx) error {
		r, err := tx.Record(s.scope, kind, dps.Fold(id))
		if errors.Is(err, ErrNotFound) {
			return missing(kind)
		}
		if err != nil {
			return err
		}
		if ifMatch != "" && ifMatch != "*" {
			d, err := open(r)
			if err != nil {
				return err
			}
			if !sameTag(ifMatch, d.base().ETag) {
				return dps.NewError(dps.CodeETagMismatch, "The enrollment was changed meanwhile", nil)
			}
		}
		if kind == Individual {
			if err := tx.DeleteRegistration(s.scope, dps.Fold(id)); err != nil && !errors.Is(err, ErrNotFound) {
				return err
			}
		}
		return tx.DeleteRecord(s.scope, kind, dps.Fold(id))
	})
}

// QueryEnrollments returns a page of enrollments or groups in the order of their IDs, and where the next one begins: "" at
// the end. Records that come and go between pages do not upset it.
func (s *Service) QueryEnrollments(ctx context.Context, kind Kind, after string, limit int) (page []any, next string, err error) {
	err = s.cfg.Store.View(ctx, func(tx Tx) error {
		page, next = []any{}, ""
		records, err := tx.Records(s.scope, kind, after, limit+1)
		if err != nil {
			return err
		}
		for i, r := range records {
			if i == limit {
				next = dps.Fold(records[i-1].ID)
				break
			}
			d, err := open(r)
			if err != nil {
				return err
			}
			hide(d)
			page = append(page, d.value())
		}
		return nil
	})
	return page, next, err
}

// GetRegistration returns what became of a device.
func (s *Service) GetRegistration(ctx context.Context, id string) (*dps.RegistrationState, error) {
	var st *dps.RegistrationState
	err := s.cfg.Store.View(ctx, func(tx Tx) error {
		r, err := tx.Registration(s.scope, dps.Fold(id))
		if errors.Is(err, ErrNotFound) {
			return dps.NewError(dps.CodeNoGroup, "Registration not found.", nil)
		}
		if err == nil {
			st = serviceView(r)
		}
		return err
	})
	return st, err
}

// DeleteRegistration forgets what became of a device: its next registration starts from scratch.
func (s *Service) DeleteRegistration(ctx context.Context, id, ifMatch string) error {
	defer s.recent.forget(dps.Fold(id))
	return s.cfg.Store.Update(ctx, func(tx Tx) error {
		r, err := tx.Registration(s.scope, dps.Fold(id))
		if errors.Is(err, ErrNotFound) {
			return dps.NewError(dps.CodeNoGroup, "Registration not found.", nil)
		}
		if err != nil {
			return err
		}
		if ifMatch != "" && ifMatch != "*" && !sameTag(ifMatch, r.State.ETag) {
			return dps.NewError(dps.CodeETagMismatch, "The registration was changed meanwhile", nil)
		}
		return tx.DeleteRegistration(s.scope, dps.Fold(id))
	})
}

// QueryRegistrations returns a page of the registrations that came in by a group.
func (s *Service) QueryRegistrations(ctx context.Context, group, after string, limit int) (page []*dps.RegistrationState, next string, err error) {
	err = s.cfg.Store.View(ctx, func(tx Tx) error {
		page, next = []*dps.RegistrationState{}, ""
		if _, err := tx.Record(s.scope, Group, dps.Fold(group)); errors.Is(err, ErrNotFound) {
			return missing(Group)
		} else if err != nil {
			return err
		}
		regs, err := tx.Registrations(s.scope, dps.Fold(group), after, limit+1)
		if err != nil {
			return err
		}
		for i, r := range regs {
			if i == limit {
				next = regs[i-1].ID
				break
			}
			page = append(page, serviceView(r))
		}
		return nil
	})
	return page, next, err
}

// GroupKey returns the primary key of a symmetric-key group, which it makes if there is none of that name. The caller seals
// it and wipes it.
func (s *Service) GroupKey(ctx context.Context, group string) (key []byte, created bool, err error) {
	if err := dps.CheckGroupID(group); err != nil {
		return nil, false, invalid("%v", err)
	}
	for range 2 {
		a, err := s.AttestationMechanism(ctx, Group, group)
		if err == nil {
			if a.Type != dps.AttestationSymmetricKey {
				return nil, false, invalid("The group does not attest by symmetric key")
			}
			key, err = base64.StdEncoding.DecodeString(a.SymmetricKey.PrimaryKey)
			return key, created, err
		}
		if dps.AsError(err).Code != dps.CodeNoGroup {
			return nil, false, err
		}
		body, err := json.Marshal(dps.EnrollmentGroup{EnrollmentGroupID: group, Enrollment: dps.Enrollment{
			Attestation: &dps.Attestation{Type: dps.AttestationSymmetricKey}, ProvisioningStatus: dps.EnrollmentEnabled}})
		if err != nil {
			return nil, false, err
		}
		_, err = s.PutEnrollment(ctx, Group, group, body, "")
		if err != nil && dps.AsError(err).Code != dps.CodeGroupExists { // somebody else made it meanwhile
			return nil, false, err
		}
		created = err == nil
	}
	return nil, false, errors.New("group came and went")
}

// Policy returns a shared access policy.
func (s *Service) Policy(ctx context.Context, name string) (p *Policy, err error) {
	err = s.cfg.Store.View(ctx, func(tx Tx) error {
		p, err = tx.Policy(s.scope, name)
		return err
	})
	return p, err
}

// putAgain writes a record that was read, whose document is d.
func putAgain(tx Tx, scope string, r *Record, d *document) (err error) {
	r.CAReferences = d.references()
	if certs := d.x509(); certs != nil {
		if _, r.Certificates, err = completeCertificates(r.Kind, certs, nil); err != nil {
			return err
		}
	} else if a := d.base().Attestation; a.Type == dps.AttestationTPM {
		if r.Certificates, err = completeTPM(a.TPM); err != nil {
			return err
		}
	}
	return tx.PutRecord(scope, r)
}

// CloseGroup makes a group admit only devices that a bundle named, or opens it again, and reports whether that is new.
func (s *Service) CloseGroup(ctx context.Context, id string, closed bool) (changed bool, err error) {
	err = s.cfg.Store.Update(ctx, func(tx Tx) error {
		r, err := tx.Record(s.scope, Group, dps.Fold(id))
		if errors.Is(err, ErrNotFound) {
			return missing(Group)
		}
		if err != nil {
			return err
		}
		if changed = r.Closed != closed; !changed {
			return nil
		}
		d, err := open(r)
		if err != nil {
			return err
		}
		r.Closed = closed
		return putAgain(tx, s.scope, r, d)
	})
	return changed, err
}
