package registration

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/touchmark/touchmark/pkg/ca"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/evidence"
)

// An Issuer signs operational certificates: those that devices show to their hubs. ca.Operational is one. Many goroutines may
// use it.
//
// Of a device's request counts its public key alone. The certificate has the device ID as its common name, which is what a
// hub compares (service API, section 6), and all else from the issuer's profile.
type Issuer interface {
	// Takes says why a key gets no certificate.
	Takes(pub crypto.PublicKey) error
	// Plan fixes a certificate's serial number and validity. It fails when the issuer is not valid, or the name does not fit.
	Plan(u ca.Unit) (ca.Plan, error)
	// Issue signs a plan and returns DER. The same plan and key make the same certificate again, but for the signature.
	Issue(p ca.Plan, pub crypto.PublicKey) ([]byte, error)
	// Chain is what goes behind the certificate, in DER, the root last.
	Chain() [][]byte
}

// An Issued is an operational certificate. It is written down before it is signed, so a crash in between leaves a record of
// what may have been signed, and the device's next request has that same plan signed again: one serial number, one key, one
// name. The certificate leaves the process only with its thumbprint, in one transaction with the registration.
type Issued struct {
	SerialNumber string    `json:"serialNumber"` // hex
	ID           string    `json:"-"`            // folded registration ID
	Name         string    `json:"name"`         // its common name: the device ID
	Issuer       string    `json:"issuer"`       // as enrollments name it
	KeyHash      string    `json:"keyHash"`      // hex SHA-256 of its public key
	NotAfter     time.Time `json:"notAfter"`
	Planned      time.Time `json:"planned"`
	// Plan is the encoded ca.Plan.
	Plan []byte `json:"-"`
	// Thumbprint is the hex SHA-256 of the certificate, empty until it is issued.
	Thumbprint string `json:"thumbprint"`
}

func (c *Issued) by(want *issuance) bool {
	return c != nil && c.Issuer == want.name && c.KeyHash == want.keyHash
}

// planTime is for how long a plan that was not signed, or not delivered, is the next one's.
const planTime = time.Hour

// issuance is a certificate that a device is to have.
type issuance struct {
	issuer  Issuer
	name    string // of the issuer
	pub     crypto.PublicKey
	keyHash string
	pem     bool // the answer is of 2021-11-01-preview
}

func asksCertificate(body *dps.RegisterRequest) bool {
	return body.CSR != "" || body.ClientCertificateCSR != ""
}

// csrHash names a certificate signing request and how it is to be answered; nil is none.
func csrHash(body *dps.RegisterRequest) []byte {
	if !asksCertificate(body) {
		return nil
	}
	sum := sha256.Sum256([]byte(body.CSR + "\x00" + body.ClientCertificateCSR))
	return sum[:]
}

// issuance reads the request of a device that proved itself. Nil means that no certificate is to be issued: because none was
// asked for, or because there is no issuer.
func (s *Service) issuance(req *Request, body *dps.RegisterRequest, v *verdict) (*issuance, error) {
	policy := v.enrollment.ClientCertificateIssuancePolicy
	if v.disabled || !asksCertificate(body) || policy == nil || s.cfg.Issuers[policy.CertificateAuthorityName] == nil {
		return nil, nil
	}
	want := &issuance{issuer: s.cfg.Issuers[policy.CertificateAuthorityName], name: policy.CertificateAuthorityName}
	text := body.CSR + body.ClientCertificateCSR // every api-version has one of the two
	want.pem = body.CSR == ""
	der, err := base64.StdEncoding.Strict().DecodeString(text)
	if err != nil || strings.ContainsAny(text, "\r\n") { // which the decoder passes over
		return nil, badCSR(errors.New("it is not base64"))
	}
	r, err := ca.ParseRequest(der)
	if err != nil {
		return nil, badCSR(err)
	}
	if dps.Fold(r.CommonName) != dps.Fold(req.RegistrationID) {
		return nil, badCSR(fmt.Errorf("it is for %.100q", r.CommonName))
	}
	if err := want.issuer.Takes(r.PublicKey); err != nil {
		return nil, badCSR(err)
	}
	want.pub = r.PublicKey
	want.keyHash, err = evidence.KeyHash(r.PublicKey)
	return want, err
}

func badCSR(cause error) *dps.Error {
	return dps.NewError(dps.CodeBadRequest, "The certificate signing request is not valid", cause)
}

// keyFree says why a key gets no certificate: it belonged to an identity that ended, or it is another device's.
func (s *Service) keyFree(tx Tx, id, keyHash string) error {
	ended, err := tx.KeyEnded(s.scope, keyHash)
	if err != nil {
		return err
	}
	if ended {
		return badCSR(errors.New("its key belonged to an identity that ended"))
	}
	taken, err := tx.KeyTaken(s.scope, keyHash, id)
	if err != nil {
		return err
	}
	if taken {
		return badCSR(errors.New("its key is another device's"))
	}
	return nil
}

// certify has a certificate signed for a device that is about to be assigned, and puts the chain into its operation. An issuer
// that can plan none makes the registration fail. ErrConflict: the registration was written meanwhile.
func (s *Service) certify(ctx context.Context, r *Registration, want *issuance) (*Issued, error) {
	op := &r.Operations[0]
	unit := ca.Unit{RegistrationID: r.State.DeviceID}
	fresh, err := want.issuer.Plan(unit)
	if err != nil {
		s.cfg.Log.Error("no certificate can be issued", "registrationId", r.ID, "issuer", want.name, "reason", err.Error())
		st := &r.State
		st.Status, st.AssignedHub, st.DeviceID, st.Substatus = dps.Failed, "", "", ""
		st.ErrorCode, st.ErrorMessage = int(dps.CodeBadRequest), "The certificate could not be issued"
		op.State = *st
		return nil, nil
	}
	var cert *Issued
	err = s.cfg.Store.Update(ctx, func(tx Tx) error {
		// Who was overtaken plans nothing: what the other one got may be the answer.
		now, err := found(tx.Registration(s.scope, r.ID))
		if err != nil {
			return err
		}
		if now == nil && r.Version != 0 || now != nil && now.Version != r.Version {
			return ErrConflict
		}
		if err := s.keyFree(tx, r.ID, want.keyHash); err != nil {
			return err
		}
		cert, err = tx.Planned(s.scope, r.ID, want.keyHash)
		if err == nil && cert.by(want) && cert.Name == unit.RegistrationID && op.Started.Sub(cert.Planned) < planTime {
			return nil
		}
		if err != nil && !errors.Is(err, ErrNotFound) {
			return err
		}
		cert = &Issued{SerialNumber: hex.EncodeToString(fresh.SerialNumber), ID: r.ID, Name: unit.RegistrationID, Issuer: want.name, KeyHash: want.keyHash,
			NotAfter: fresh.NotAfter, Planned: op.Started, Plan: fresh.Encode()}
		return tx.PutIssued(s.scope, cert)
	})
	if err != nil {
		return nil, err
	}
	plan, err := ca.DecodePlan(cert.Plan)
	if err != nil {
		return nil, fmt.Errorf("certificate %s in the store: %w", cert.SerialNumber, err)
	}
	plan.Unit = unit
	leaf, err := s.sign(ctx, want, plan)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(leaf)
	cert.Thumbprint = hex.EncodeToString(sum[:])
	chain := append([][]byte{leaf}, want.issuer.Chain()...)
	if want.pem {
		var b bytes.Buffer
		for _, der := range chain {
			_ = pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: der}) // a Buffer takes all
		}
		op.State.IssuedClientCertificate = b.String()
	} else {
		op.State.IssuedCertificateChain = chain
	}
	r.Issued = cert
	return cert, nil
}

// sign signs a plan, and leaves a token that hangs when the context ends: the plan is in the store, and the device's next
// request has it signed again. What an issuer was asked for holds its place until the issuer answers, so those that hang
// are few, and what they answer in the end reaches nobody.
func (s *Service) sign(ctx context.Context, want *issuance, plan ca.Plan) ([]byte, error) {
	later := func() error {
		return dps.NewError(dps.CodeServiceOverloaded, "Try again later", fmt.Errorf("issuer %q has not answered: %w", want.name, ctx.Err()))
	}
	places := s.issuing.of(s.cfg.Issuers)[want.name].places
	select {
	case places <- struct{}{}:
	case <-ctx.Done():
		return nil, later()
	}
	type answer struct {
		leaf     []byte
		err      error
		panicked any
	}
	done := make(chan answer, 1)
	go func() {
		a := answer{err: errors.New("the issuer gave up")}
		defer func() {
			a.panicked = recover()
			<-places
			done <- a
		}()
		a.leaf, a.err = want.issuer.Issue(plan, want.pub)
	}()
	select {
	case a := <-done:
		if a.panicked != nil {
			panic(a.panicked) // the door's to answer
		}
		if a.err != nil {
			return nil, dps.NewError(dps.CodeServiceOverloaded, "The certificate cannot be issued now", a.err)
		}
		return a.leaf, nil
	case <-ctx.Done():
		return nil, later()
	}
}

// issuing is what the service keeps of its issuers, by their names.
type issuing struct {
	once    sync.Once
	issuers map[string]*signing
}

type signing struct {
	places chan struct{} // one for each certificate that is being signed
	chain  []*x509.Certificate
}

func (i *issuing) of(issuers map[string]Issuer) map[string]*signing {
	i.once.Do(func() {
		i.issuers = make(map[string]*signing, len(issuers))
		for name, issuer := range issuers {
			g := &signing{places: make(chan struct{}, runtime.GOMAXPROCS(0))}
			for _, der := range issuer.Chain() {
				if c, err := x509.ParseCertificate(der); err == nil { // an issuer parsed them to be one
					g.chain = append(g.chain, c)
				}
			}
			i.issuers[name] = g
		}
	})
	return i.issuers
}

// operational returns the issuer that signed a device's certificate, empty for none. What a device got of the service must
// not prove it to the service, whose groups may be above the issuer: it would outlive the proof that it was issued for.
func (s *Service) operational(presented []*x509.Certificate) string {
	if len(s.cfg.Issuers) == 0 || len(presented) == 0 {
		return ""
	}
	leaf := presented[0]
	for name, g := range s.issuing.of(s.cfg.Issuers) {
		if len(g.chain) > 0 && bytes.Equal(g.chain[0].RawSubject, leaf.RawIssuer) &&
			g.chain[0].CheckSignature(leaf.SignatureAlgorithm, leaf.RawTBSCertificate, leaf.Signature) == nil {
			return name
		}
	}
	return ""
}

// apart keeps the CAs of issuers from being those of groups. A group that is disabled keeps their certificates out, as it may.
func (s *Service) apart(d *document) error {
	certs := d.x509()
	if d.kind != Group || certs == nil || d.group.ProvisioningStatus == dps.EnrollmentDisabled {
		return nil
	}
	for _, slot := range []*dps.X509Certificate{certs.Primary, certs.Secondary} {
		if slot == nil || slot.Certificate == "" {
			continue
		}
		c, err := parseCertificate(slot.Certificate)
		if err != nil {
			return invalid("%v", err)
		}
		for name, g := range s.issuing.of(s.cfg.Issuers) {
			if slices.ContainsFunc(g.chain, func(x *x509.Certificate) bool {
				return bytes.Equal(x.RawSubjectPublicKeyInfo, c.RawSubjectPublicKeyInfo)
			}) {
				return invalid("A CA of this group has the key of one that the certificate authority %.100q issues operational certificates below: those would admit devices. Enroll a CA that is not above them", name)
			}
		}
	}
	return nil
}

// putIssued keeps a certificate, if there is one, that its device is about to get. The key may have ended while it was signed.
func (s *Service) putIssued(tx Tx, cert *Issued) error {
	if cert == nil {
		return nil
	}
	if err := s.keyFree(tx, cert.ID, cert.KeyHash); err != nil {
		return err
	}
	return tx.PutIssued(s.scope, cert)
}
