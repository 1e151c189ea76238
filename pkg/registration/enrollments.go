package registration

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/url"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/evidence"
)

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

// sameTag compares entity tags after stripping quotes from both sides: clients send all spellings.
func sameTag(a, b string) bool { return strings.Trim(a, `"`) == strings.Trim(b, `"`) }

// anyTag reports whether a condition is "*", quoted or not.
func anyTag(ifMatch string) bool { return sameTag(ifMatch, "*") }

// A readOnly member is what the service made: clients send it back in any state, and it is not looked at.
type readOnly struct{}

// UnmarshalJSON takes everything.
func (*readOnly) UnmarshalJSON([]byte) error { return nil }

// readOnlyMembers take the place of the document's: encoding/json leaves a member out that two structs beside each other have.
type readOnlyMembers struct {
	RegistrationState      readOnly `json:"registrationState"`
	CreatedDateTimeUTC     readOnly `json:"createdDateTimeUtc"`
	LastUpdatedDateTimeUTC readOnly `json:"lastUpdatedDateTimeUtc"`
	ETag                   readOnly `json:"etag"`
}

// A sent enrollment is a document as a client wrote it.
type sent struct {
	*document
	// remake marks the symmetric keys, primary and secondary, that are to be made anew: those that are there, and null or empty.
	// One that is not there stays what it was.
	remake [2]bool
	judged bool // put is to say whether it would write it, and no more
}

func parseSent(kind Kind, body []byte) (*sent, error) {
	bad := func(err error) error {
		return dps.NewError(dps.CodeInvalidArgument, "The body is not a valid enrollment", err)
	}
	if !utf8.Valid(body) {
		return nil, bad(errors.New("it is not UTF-8"))
	}
	s := &sent{document: newDocument(kind)}
	var into any
	if kind == Individual {
		into = &struct {
			*dps.IndividualEnrollment
			readOnlyMembers
		}{IndividualEnrollment: s.individual}
	} else {
		into = &struct {
			*dps.EnrollmentGroup
			readOnlyMembers
		}{EnrollmentGroup: s.group}
	}
	if err := json.Unmarshal(body, into); err != nil {
		return nil, bad(err)
	}
	var raw struct {
		Attestation struct {
			SymmetricKey struct{ PrimaryKey, SecondaryKey json.RawMessage }
		}
	}
	if err := json.Unmarshal(body, &raw); err != nil {
		return nil, bad(err)
	}
	for i, k := range []json.RawMessage{raw.Attestation.SymmetricKey.PrimaryKey, raw.Attestation.SymmetricKey.SecondaryKey} {
		s.remake[i] = string(k) == "null" || string(k) == `""`
	}
	free := make(map[string]*json.RawMessage)
	if kind == Individual {
		free["optionalDeviceInformation"] = &s.individual.OptionalDeviceInformation
	}
	if t := s.base().InitialTwin; t != nil {
		free["initialTwin.tags"] = &t.Tags
		if t.Properties != nil {
			free["initialTwin.properties.desired"] = &t.Properties.Desired
		}
	}
	for name, v := range free {
		switch {
		case string(*v) == "null":
			*v = nil
		case len(*v) > 0 && (*v)[0] != '{':
			return nil, invalid("%s must be an object", name)
		}
	}
	return s, nil
}

// PutEnrollment creates or replaces an individual enrollment or a group from its wire form. Without ifMatch it only
// creates; with "*" it only replaces; with a tag it replaces that version (service API, section 1.6). The answer is what was
// written, and shows symmetric keys, made ones included.
func (s *Service) PutEnrollment(ctx context.Context, by Actor, kind Kind, id string, body []byte, ifMatch string) (any, error) {
	in, err := parseSent(kind, body)
	if err != nil {
		return nil, err
	}
	if *in.id() == "" {
		return nil, invalid("The body has no ID")
	}
	if dps.Fold(*in.id()) != dps.Fold(id) {
		return nil, invalid("The ID of the body is not that of the path")
	}
	return s.put(ctx, by, in, ifMatch)
}

// put writes an enrollment that a client sent.
func (s *Service) put(ctx context.Context, by Actor, in *sent, ifMatch string) (any, error) {
	d, kind, id := in.document, in.kind, *in.id()
	if err := s.check(d); err != nil {
		return nil, err
	}
	if d.base().ProvisioningStatus == "" {
		d.base().ProvisioningStatus = dps.EnrollmentEnabled
	}
	now := dps.Time{Time: s.cfg.Now()}
	var keys *dps.SymmetricKeyAttestation
	var written *Record
	transaction, write := s.cfg.Store.Update, Tx.PutRecord
	if in.judged {
		transaction, write = s.cfg.Store.View, Tx.CheckRecord
	}
	err := transaction(ctx, func(tx Tx) error {
		d := *d // f may run again: work on a copy of what it changes
		base := *d.base()
		attestation := *base.Attestation
		base.Attestation = &attestation
		base.CreatedDateTimeUTC, base.LastUpdatedDateTimeUTC, base.ETag = &now, &now, newETag()
		if err := s.checkParent(tx, &d); err != nil {
			return err
		}
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
			if !anyTag(ifMatch) && !sameTag(ifMatch, before.base().ETag) {
				return dps.NewError(dps.CodeETagMismatch, "The enrollment was changed meanwhile", nil)
			}
			if before.base().Attestation.Type != attestation.Type {
				return invalid("The attestation type of an enrollment cannot be changed")
			}
			base.CreatedDateTimeUTC = before.base().CreatedDateTimeUTC
		}
		if err := s.refersToWhatIs(tx, &base); err != nil {
			return err
		}
		r := &Record{Kind: kind, ID: *d.id(), Closed: old != nil && old.Closed}
		keys = nil
		switch attestation.Type {
		case dps.AttestationSymmetricKey:
			if keys, err = completeKeys(attestation.SymmetricKey, old, in.remake); err != nil {
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
		if r.Document, err = d.encode(); err != nil {
			return err
		}
		action := "create"
		if old != nil {
			action = "update"
		}
		written = r
		if err = write(tx, s.scope, r); errors.Is(err, ErrConflict) {
			return invalid("%s", whose(err))
		} else if err != nil || in.judged {
			return err
		}
		return s.audit(tx, by, action, object(kind, r.ID), content(old), content(r))
	})
	if err != nil {
		return nil, err
	}
	answer, err := open(written)
	if err != nil {
		return nil, err
	}
	hide(answer)
	answer.base().Attestation.SymmetricKey = keys
	return answer.value(), nil
}

// object names an enrollment in the audit record.
func object(kind Kind, id string) string {
	if kind == Group {
		return "enrollmentGroup/" + id
	}
	return "enrollment/" + id
}

// content is what of a record the audit record's hashes are of; nil for none.
func content(r *Record) any {
	if r == nil {
		return nil
	}
	return struct {
		Document, Keys []byte
		Closed         bool
	}{r.Document, r.Keys, r.Closed}
}

// audit writes down a change in its transaction.
func (s *Service) audit(tx Tx, by Actor, action, object string, before, after any) error {
	return tx.PutAudit(s.scope, NewAudit(by, action, object, before, after, s.cfg.Now()))
}

// whose says in which way a certificate is another enrollment's, and which: who may write enrollments may read them all.
func whose(conflict error) string {
	owner := "another enrollment"
	if e, ok := errors.AsType[*OwnerError](conflict); ok {
		owner = e.owner()
	}
	if errors.Is(conflict, ErrSameCA) {
		return "A CA of this group has the name and the key of one of " + owner + ": put both certificates into one group, as primary and secondary"
	}
	return "A certificate, or the endorsement key, of this enrollment belongs to " + owner
}

// check says what keeps a document from being taken.
func (s *Service) check(d *document) error {
	if err := dps.CheckRegistrationID(*d.id()); err != nil {
		return invalid("%v", err)
	}
	if d.kind == Individual && d.individual.DeviceID != "" {
		if err := dps.CheckDeviceID(d.individual.DeviceID); err != nil {
			return invalid("%v", err)
		}
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
	case e.AllocationPolicy == dps.AllocationCustom && e.CustomAllocationDefinition == nil:
		return invalid("A CustomAllocationDefinition is required when the allocation policy is set to 'Custom'")
	case len(e.IoTHubs) > maxNamedHubs:
		return invalid("An enrollment names at most %d hubs", maxNamedHubs)
	case len(e.IoTHubs) > 0 && e.AllocationPolicy == "":
		return invalid("Enrollment allocationPolicy must be specified when iotHubs are specified.")
	case e.AllocationPolicy == dps.AllocationStatic && len(e.IoTHubs) > 1:
		return invalid("Static allocation takes one hub")
	}
	if c := e.CustomAllocationDefinition; c != nil {
		if err := s.checkWebhook(c); err != nil {
			return err
		}
	}
	return s.apart(d)
}

const (
	maxNamedHubs  = 100
	maxWebhookURL = 2048
)

// checkWebhook takes https URLs, and http ones of this machine where that is allowed. Its errors do not show the URL, which may
// hold a key.
func (s *Service) checkWebhook(c *dps.CustomAllocationDefinition) error {
	u, err := url.Parse(c.WebhookURL)
	if err != nil || u.Host == "" || u.User != nil || len(c.WebhookURL) > maxWebhookURL {
		return invalid("webhookUrl must be an absolute https URL")
	}
	ip := net.ParseIP(u.Hostname())
	if local := ip != nil && ip.IsLoopback() || strings.EqualFold(u.Hostname(), "localhost"); u.Scheme != "https" && !(u.Scheme == "http" && local && s.cfg.HTTPWebhooks) {
		return invalid("webhookUrl must be an absolute https URL")
	}
	if dps.CheckAPIVersion(c.APIVersion) != nil || c.APIVersion < "2018-09-01-preview" {
		return invalid("The webhook's apiVersion must be 2018-09-01-preview or later")
	}
	return nil
}

// refersToWhatIs refuses an enrollment that names hubs which the scope has not.
func (s *Service) refersToWhatIs(tx Tx, e *dps.Enrollment) error {
	hubs := e.IoTHubs
	if e.IoTHubHostName != "" {
		hubs = append(slices.Clip(hubs), e.IoTHubHostName)
	}
	if len(hubs) == 0 || s.cfg.UnlinkedHubs {
		return nil
	}
	set := &s.cfg.Settings
	if sc, err := found(tx.Scope(s.scope)); err != nil {
		return err
	} else if sc != nil {
		set = &sc.Settings
	}
	for _, h := range hubs {
		if err := set.allowed(h); err != nil {
			return err
		}
	}
	return nil
}

// completeKeys fills in symmetric keys: absent ones stay what they were, or are made; those to remake are made.
func completeKeys(in *dps.SymmetricKeyAttestation, old *Record, remake [2]bool) (*dps.SymmetricKeyAttestation, error) {
	var k, was dps.SymmetricKeyAttestation
	if in != nil {
		k = *in
	}
	if old != nil && old.Keys != nil {
		if err := json.Unmarshal(old.Keys, &was); err != nil {
			return nil, fmt.Errorf("keys of %q in the store cannot be read", old.ID)
		}
	}
	for i, slot := range []struct{ key, was *string }{{&k.PrimaryKey, &was.PrimaryKey}, {&k.SecondaryKey, &was.SecondaryKey}} {
		if *slot.key == "" && !remake[i] {
			*slot.key = *slot.was
		}
		if *slot.key == "" {
			*slot.key = base64.StdEncoding.EncodeToString(newKey())
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
	d, err := decode(Group, document)
	if err != nil || d.x509() == nil {
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

// hide makes a document what answers show.
func hide(d *document) {
	base := d.base()
	if len(d.references()) > 0 {
		base.Attestation.X509.SigningCertificates = nil // what they stand for
	}
	base.CreatedDateTimeUTC, base.LastUpdatedDateTimeUTC = base.CreatedDateTimeUTC.Trim(), base.LastUpdatedDateTimeUTC.Trim()
	if base.ProvisioningStatus == "" { // of a bundle
		base.ProvisioningStatus = dps.EnrollmentEnabled
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
	st.CreatedDateTimeUTC, st.LastUpdatedDateTimeUTC = st.CreatedDateTimeUTC.Trim(), st.LastUpdatedDateTimeUTC.Trim()
	return &st
}

// AttestationMechanism returns how an enrollment attests, with symmetric keys. That they were shown is in the audit record.
func (s *Service) AttestationMechanism(ctx context.Context, by Actor, kind Kind, id string) (*dps.Attestation, error) {
	return s.mechanism(ctx, by, "show keys", kind, id)
}

func (s *Service) mechanism(ctx context.Context, by Actor, action string, kind Kind, id string) (*dps.Attestation, error) {
	var a *dps.Attestation
	err := s.cfg.Store.Update(ctx, func(tx Tx) error {
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
		if r.Keys == nil {
			return nil
		}
		a.SymmetricKey = &dps.SymmetricKeyAttestation{}
		if json.Unmarshal(r.Keys, a.SymmetricKey) != nil {
			return fmt.Errorf("keys of %q in the store cannot be read", r.ID)
		}
		return s.audit(tx, by, action, object(kind, r.ID), content(r), content(r))
	})
	return a, err
}

// DeleteEnrollment removes an enrollment or a group. An individual enrollment takes its registration with it; a group's
// devices keep theirs.
func (s *Service) DeleteEnrollment(ctx context.Context, by Actor, kind Kind, id, ifMatch string) error {
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
		if ifMatch != "" && !anyTag(ifMatch) {
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
		if err := tx.DeleteRecord(s.scope, kind, dps.Fold(id)); err != nil {
			return err
		}
		return s.audit(tx, by, "delete", object(kind, r.ID), content(r), nil)
	})
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
func (s *Service) DeleteRegistration(ctx context.Context, by Actor, id, ifMatch string) error {
	defer s.recent.forget(dps.Fold(id))
	return s.cfg.Store.Update(ctx, func(tx Tx) error {
		r, err := tx.Registration(s.scope, dps.Fold(id))
		if errors.Is(err, ErrNotFound) {
			return dps.NewError(dps.CodeNoGroup, "Registration not found.", nil)
		}
		if err != nil {
			return err
		}
		if ifMatch != "" && !anyTag(ifMatch) && !sameTag(ifMatch, r.State.ETag) {
			return dps.NewError(dps.CodeETagMismatch, "The registration was changed meanwhile", nil)
		}
		if err := tx.DeleteRegistration(s.scope, dps.Fold(id)); err != nil {
			return err
		}
		return s.audit(tx, by, "delete", "registration/"+r.ID, r, nil)
	})
}

// GroupKey returns the primary key of a symmetric-key group, which it makes if there is none of that name. The caller seals
// it and wipes it.
func (s *Service) GroupKey(ctx context.Context, by Actor, group string) (key []byte, created bool, err error) {
	if err := dps.CheckGroupID(group); err != nil {
		return nil, false, invalid("%v", err)
	}
	for range 2 {
		a, err := s.mechanism(ctx, by, "seal key", Group, group)
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
		_, err = s.PutEnrollment(ctx, by, Group, group, body, "")
		if err != nil && dps.AsError(err).Code != dps.CodeGroupExists { // somebody else made it meanwhile
			return nil, false, err
		}
		created = err == nil
	}
	return nil, false, errors.New("group came and went")
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
func (s *Service) CloseGroup(ctx context.Context, by Actor, id string, closed bool) (changed bool, err error) {
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
		before, action := content(r), "open"
		if r.Closed = closed; closed {
			action = "close"
		}
		if err := putAgain(tx, s.scope, r, d); err != nil {
			return err
		}
		return s.audit(tx, by, action, object(Group, r.ID), before, content(r))
	})
	return changed, err
}
