package registration

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/evidence"
)

// refuse is the one answer to everyone who is not let in.
func refuse(cause error) *dps.Error { return dps.NewError(dps.CodeUnauthorized, "Unauthorized", cause) }

// verdict is which enrollment admits a device.
type verdict struct {
	enrollment *dps.Enrollment
	deviceID   string // of the enrollment, if it names one
	group      string // ID as given, empty for an individual enrollment
	disabled   bool
	x509       bool
	closed     bool // the group admits only devices that a bundle named

	// What it stands on: the individual enrollment of the device as it was, nil where there was none; and the revision of the
	// scope and its groups.
	document []byte
	revision int64
	settings *Settings       // of the scope, at that revision
	device   *Device         // what bundles said of it, nil for nothing
	key      string          // hex SHA-256 of the public key that it proved itself with, empty without
	leaf     [32]byte        // SHA-256 of the certificate, for a group by certificate
	admitted *Admission      // by what, nil for a TPM
	tpm      *attest.TPMKeys // of the TPM that it proved itself with, nil without

	// Where the device goes.
	keys      [][]byte          // of an individual enrollment by symmetric key
	groupKeys []attest.GroupKey // of a group by symmetric key
	chosen    *choice           // by a webhook
	parentHub string            // where its parent is, empty where it has none, or none yet
	refused   error             // why it goes nowhere
}

func (v *verdict) reason() string {
	if v.refused == nil {
		return ""
	}
	return v.refused.Error()
}

// fingerprint names what a device proves itself with. Where there is a token it decides.
func fingerprint(req *Request) []byte {
	h := sha256.New()
	switch {
	case req.Proof.Token != "":
		h.Write([]byte("token\x00" + req.Proof.Token))
	case len(req.Proof.Certificates) > 0:
		h.Write([]byte("certificate\x00"))
		h.Write(req.Proof.Certificates[0].Raw)
	default:
		return nil
	}
	return h.Sum(nil)
}

// judge finds the enrollment that decides about a device and holds its proof against it (device API, sections 7.3 and 8.2;
// service API, section 4.2): an individual enrollment decides alone, whatever its kind; else a group does.
func (s *Service) judge(tx Tx, req *Request) (*verdict, error) {
	token, err := s.credentials(req)
	if err != nil {
		return nil, err
	}
	r, err := tx.Record(s.scope, Individual, dps.Fold(req.RegistrationID))
	switch {
	case err == nil:
		v, err := s.judgeIndividual(tx, r, req, token)
		if err == nil {
			return v, s.known(tx, req, v)
		}
		if v == nil {
			return nil, err
		}
		// A disabled enrollment blocks its device whatever the device proves itself with, so the proof may be one for a
		// group. Whoever can prove nothing does not learn that there is an enrollment.
		g, err := s.judgeGroup(tx, req, token)
		if err != nil {
			return nil, err
		}
		v.device, v.key = g.device, g.key
		return v, nil
	case !errors.Is(err, ErrNotFound):
		return nil, err
	}
	return s.judgeGroup(tx, req, token)
}

// judgeGroup finds the group that admits a device.
func (s *Service) judgeGroup(tx Tx, req *Request, token *attest.Token) (*verdict, error) {
	v, err := s.groupOf(tx, req, token)
	if err != nil {
		return nil, err
	}
	return v, s.known(tx, req, v)
}

// groupOf finds the group that a proof is good for.
func (s *Service) groupOf(tx groupReader, req *Request, token *attest.Token) (*verdict, error) {
	if token != nil {
		return s.judgeByKey(tx, req, token)
	}
	return s.judgeByChain(tx, req)
}

// known holds a device that proved itself against what bundles said of it. A key that ended lets nobody in. A group's device
// that ended is disabled, as an individual enrollment of it would be; and a closed group admits only whom a bundle named, by
// the key of the newest revision.
func (s *Service) known(tx Tx, req *Request, v *verdict) (err error) {
	if v.device, err = found(tx.Device(s.scope, dps.Fold(req.RegistrationID))); err != nil {
		return err
	}
	if v.x509 {
		if v.key, err = evidence.KeyHash(req.Proof.Certificates[0].PublicKey); err != nil {
			return because("public-key", "%v", err)
		}
	}
	if v.group != "" && v.x509 {
		if err := s.blocked(tx, v); err != nil {
			return err
		}
	}
	d := v.device
	if v.group != "" && d != nil && !d.Lives() {
		v.disabled = true
	}
	if v.disabled {
		return nil
	}
	if v.key != "" {
		ended, err := tx.KeyEnded(s.scope, v.key)
		if err != nil {
			return err
		}
		if ended {
			return because("ended", "its key belonged to an identity that ended")
		}
	}
	switch {
	case !v.closed:
		return nil
	case d == nil || d.Group != dps.Fold(v.group):
		return because("closed", "group %q is closed and no bundle named the device for it", v.group)
	case v.x509 && d.KeyHash != v.key:
		return because("closed", "group %q is closed and the key is not the one of the device's revision %d", v.group, d.Revision)
	}
	return nil
}

// judgeIndividual holds a proof against an individual enrollment. When it fails and the enrollment is disabled, the verdict
// comes beside the error.
func (s *Service) judgeIndividual(tx Tx, r *Record, req *Request, token *attest.Token) (*verdict, error) {
	d, err := open(r)
	if err != nil {
		return nil, err
	}
	e := d.individual
	revision, err := tx.Revision(s.scope)
	if err != nil {
		return nil, err
	}
	v := &verdict{revision: revision, enrollment: &e.Enrollment, deviceID: e.DeviceID, disabled: e.ProvisioningStatus == dps.EnrollmentDisabled, x509: token == nil, document: r.Document}
	if r.Keys != nil {
		if v.keys, err = keysOf(r); err != nil {
			return nil, err
		}
	}
	if token != nil && e.Attestation.Type == dps.AttestationTPM {
		err = s.proveTPM(tx, v, e, req, token)
	} else {
		v.admitted, err = proveIndividual(e, v.keys, req, token)
	}
	if err != nil && !v.disabled {
		return nil, err
	}
	return v, err
}

// proveIndividual holds a token against an enrollment's keys, or a certificate against its certificates, and says which it was.
func proveIndividual(e *dps.IndividualEnrollment, keys [][]byte, req *Request, token *attest.Token) (*Admission, error) {
	if token != nil {
		if e.Attestation.Type != dps.AttestationSymmetricKey {
			return nil, because("kind", "the enrollment does not attest by symmetric key")
		}
		for i, k := range keys {
			if token.SignedBy(k) {
				return keyAdmission(attest.NewGroupKey(k), e.RegistrationID, i), nil
			}
		}
		return nil, refuse(attest.ErrSignature)
	}
	if e.Attestation.Type != dps.AttestationX509 || e.Attestation.X509.ClientCertificates == nil {
		return nil, because("kind", "the enrollment does not attest by certificate")
	}
	for i, c := range []*dps.X509Certificate{e.Attestation.X509.ClientCertificates.Primary, e.Attestation.X509.ClientCertificates.Secondary} {
		if c == nil {
			continue
		}
		if der, err := base64.StdEncoding.DecodeString(c.Certificate); err == nil && bytes.Equal(der, req.Proof.Certificates[0].Raw) {
			return certificateAdmission(der, i), nil
		}
	}
	return nil, because("certificate", "the certificate is not the enrolled one")
}

// stillHolds returns ErrConflict when what a verdict stands on has changed since: an operator who was told that a device is
// disabled or deleted must not see it assigned afterwards.
func (s *Service) stillHolds(tx Tx, id string, v *verdict) error {
	r, err := tx.Record(s.scope, Individual, id)
	switch {
	case errors.Is(err, ErrNotFound):
		r = nil
	case err != nil:
		return err
	}
	if (r == nil) != (v.document == nil) || r != nil && !bytes.Equal(r.Document, v.document) {
		return ErrConflict
	}
	d, err := found(tx.Device(s.scope, id))
	if err != nil {
		return err
	}
	if (d == nil) != (v.device == nil) || d != nil && *d != *v.device {
		return ErrConflict
	}
	if v.key != "" && !v.disabled {
		if ended, err := tx.KeyEnded(s.scope, v.key); err != nil || ended {
			return errors.Join(err, ErrConflict)
		}
	}
	revision, err := tx.Revision(s.scope)
	if err == nil && revision != v.revision {
		err = ErrConflict
	}
	if err == nil && v.x509 && v.group != "" {
		err = s.blocked(tx, v)
	}
	return err
}

// keysOf returns the symmetric keys of a record, primary first.
func keysOf(r *Record) ([][]byte, error) {
	var k dps.SymmetricKeyAttestation
	if err := json.Unmarshal(r.Keys, &k); err != nil {
		return nil, fmt.Errorf("keys of %q in the store cannot be read", r.ID) // their text stays out of the error
	}
	var keys [][]byte
	for _, text := range []string{k.PrimaryKey, k.SecondaryKey} {
		if b, err := base64.StdEncoding.DecodeString(text); err == nil && len(b) > 0 {
			keys = append(keys, b)
		}
	}
	return keys, nil
}

func (s *Service) judgeByKey(tx groupReader, req *Request, token *attest.Token) (*verdict, error) {
	groups, revision, err := s.keyedGroups(tx)
	if err != nil {
		return nil, err
	}
	g, slot, err := s.keyedGroup(tx, req, token, groups)
	if err != nil {
		return nil, err
	}
	if g == nil {
		return nil, because("no-enrollment", "no enrollment has this registration ID and no group's key derives the one it was signed with")
	}
	if g.disabled {
		return nil, because("group-disabled", "group %q is disabled", g.id)
	}
	return &verdict{enrollment: &g.enrollment, group: g.id, closed: g.closed, revision: revision, groupKeys: g.keys, admitted: keyAdmission(g.keys[slot], g.id, slot)}, nil
}

// keyedGroup returns the group whose key signed a token, and which key, nil for none. The token names no group: the one that the device
// registered by before, or that a bundle named for it, is tried first. For the rest the error is a *search.
func (s *Service) keyedGroup(tx groupReader, req *Request, token *attest.Token, groups *keyedGroups) (g *cachedGroup, slot int, err error) {
	trial := token.Trial(req.RegistrationID)
	if len(groups.all) <= tryAtOnce {
		for _, g := range groups.all {
			if slot := g.signed(trial); slot >= 0 {
				return g, slot, nil
			}
		}
		return nil, 0, nil
	}
	if was := req.searched; was != nil {
		if was.group == nil && was.revision == groups.revision {
			return nil, 0, nil
		}
		if was.group != nil {
			g = groups.group(was.group.folded)
			if slot := g.signed(trial); slot >= 0 {
				return g, slot, nil
			}
		}
	}
	id := dps.Fold(req.RegistrationID)
	for _, named := range []func() (string, error){
		func() (string, error) {
			r, err := found(tx.Registration(s.scope, id))
			if r == nil {
				return "", err
			}
			return r.Group, nil
		},
		func() (string, error) {
			d, err := found(tx.Device(s.scope, id))
			if d == nil {
				return "", err
			}
			return d.Group, nil
		},
	} {
		name, err := named()
		if err != nil {
			return nil, 0, err
		}
		g = groups.group(name)
		if slot := g.signed(trial); slot >= 0 {
			return g, slot, nil
		}
	}
	want := &search{groups: groups, token: token, id: req.RegistrationID, wrong: wrongToken(req)}
	if s.searcher.wrong.has(groups.revision, want.wrong) {
		return nil, 0, nil
	}
	return nil, 0, want
}

func (s *Service) judgeByChain(tx groupReader, req *Request) (*verdict, error) {
	if name := s.operational(req.Proof.Certificates); name != "" {
		return nil, because("operational", "its certificate is an operational one of issuer %q", name)
	}
	revision, err := s.groupsAt(tx)
	if err != nil {
		return nil, err
	}
	g, err := attest.FindGroup(req.Proof.Certificates, s.intermediates, func(child *x509.Certificate, byName bool) ([]groupAnchor, error) {
		return s.anchors(tx, revision, child, byName)
	}, s.cfg.Now())
	if errors.Is(err, attest.ErrChain) || errors.Is(err, attest.ErrNoCertificate) {
		return nil, refuse(err)
	}
	if err != nil {
		return nil, err
	}
	if g.disabled {
		return nil, because("group-disabled", "group %q is disabled", g.id)
	}
	if g.missing {
		return nil, s.uncounted(tx, fmt.Sprintf("group %q: %s", g.id, caNotFound), errors.New("it is not there any more"), func(c *x509.Certificate) bool { return slices.ContainsFunc(g.unverified, c.Equal) })
	}
	if err := s.rooted(tx, revision, req.Proof.Certificates, g.cachedGroup); err != nil {
		return nil, err
	}
	return &verdict{enrollment: &g.enrollment, group: g.id, closed: g.closed, x509: true, revision: revision, leaf: sha256.Sum256(req.Proof.Certificates[0].Raw), admitted: g.by}, nil
}

// blocked refuses a certificate that a disabled enrollment of another registration ID names, whatever group admits it
// (device API, section 7.4).
func (s *Service) blocked(tx Tx, v *verdict) error {
	kind, id, err := tx.CertificateOwner(s.scope, v.leaf)
	if errors.Is(err, ErrNotFound) || err == nil && kind != Individual {
		return nil
	}
	if err != nil {
		return err
	}
	r, err := tx.Record(s.scope, Individual, id)
	if err != nil {
		return err
	}
	d, err := open(r)
	if err == nil && d.individual.ProvisioningStatus == dps.EnrollmentDisabled {
		err = because("blocked", "its certificate is that of the disabled enrollment %q", r.ID)
	}
	return err
}
