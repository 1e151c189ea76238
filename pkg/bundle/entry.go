package bundle

import (
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"

	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/evidence"
)

// An Entry is one thing that the service should know: an individual enrollment, an enrollment group, or a device that
// comes in by a group. Exactly one of Individual, Group and Device is set.
//
// Enrollments stand in the wire form of the service API, without the members that the service itself makes (etag,
// timestamps, registrationState). On disk an individual symmetric-key enrollment has its attestation type only: the
// keys travel sealed, and Open puts them back when it is given the identity that they were sealed to.
type Entry struct {
	// Serial is the device's serial; empty for groups.
	Serial     string                    `json:"serial,omitempty"`
	Individual *dps.IndividualEnrollment `json:"individual,omitempty"`
	Group      *dps.EnrollmentGroup      `json:"group,omitempty"`
	Device     *GroupDevice              `json:"device,omitempty"`
	// Evidence says where the device's private key lives, where that is a place that it stays in.
	Evidence *evidence.Evidence `json:"evidence,omitempty"`
}

// Resides says what keeps e from being a device whose key is shown to live in such a place. Groups have no key of their own
// and reside anywhere. The error is evidence.ErrResidency.
func (e *Entry) Resides(want evidence.Residency) error {
	switch {
	case e.Group != nil:
		return nil
	case e.Device != nil:
		return e.Evidence.Check(want, e.Device.RegistrationID, e.Device.KeyHash)
	case e.Individual == nil || e.Individual.Attestation == nil:
		return evidence.ErrResidency
	}
	if t := e.Individual.Attestation.TPM; t != nil {
		ek, err := base64.StdEncoding.DecodeString(t.EndorsementKey)
		if err != nil {
			return fmt.Errorf("%w: its endorsement key is not base64", evidence.ErrResidency)
		}
		return e.Evidence.CheckEndorsement(want, e.Individual.RegistrationID, ek)
	}
	x := e.Individual.Attestation.X509
	if x == nil || x.ClientCertificates == nil || x.ClientCertificates.Primary == nil || x.ClientCertificates.Secondary != nil {
		return fmt.Errorf("%w: it attests by %s", evidence.ErrResidency, e.Individual.Attestation.Type)
	}
	der, err := base64.StdEncoding.DecodeString(x.ClientCertificates.Primary.Certificate)
	if err != nil {
		return fmt.Errorf("%w: its certificate is not base64", evidence.ErrResidency)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return fmt.Errorf("%w: its certificate: %w", evidence.ErrResidency, err)
	}
	hash, err := evidence.KeyHash(cert.PublicKey)
	if err != nil {
		return fmt.Errorf("%w: %w", evidence.ErrResidency, err)
	}
	return e.Evidence.Check(want, e.Individual.RegistrationID, hash)
}

// name names an entry in messages.
func (e *Entry) name() string {
	switch {
	case e.Individual != nil:
		return e.Individual.RegistrationID
	case e.Device != nil:
		return e.Device.RegistrationID
	case e.Group != nil:
		return "group " + e.Group.EnrollmentGroupID
	}
	return "entry"
}

// A GroupDevice names a device that an enrollment group admits. It grants nothing by itself.
type GroupDevice struct {
	RegistrationID string `json:"registrationId"`
	Group          string `json:"group"`
	// KeyHash is the lower-case hex SHA-256 of the device's public key (SubjectPublicKeyInfo), where it has one.
	KeyHash string `json:"keyHash,omitempty"`
}

// Check says what keeps e from being an entry.
func (e *Entry) Check() error {
	switch {
	case e.Individual != nil && e.Group == nil && e.Device == nil:
		if err := dps.CheckRegistrationID(e.Individual.RegistrationID); err != nil {
			return err
		}
		if err := e.Individual.Attestation.Check(); err != nil {
			return fmt.Errorf("enrollment %q: %w", e.Individual.RegistrationID, err)
		}
		return nil
	case e.Group != nil && e.Individual == nil && e.Device == nil:
		if err := dps.CheckGroupID(e.Group.EnrollmentGroupID); err != nil {
			return fmt.Errorf("enrollment group: %w", err)
		}
		if err := e.Group.Attestation.Check(); err != nil {
			return fmt.Errorf("enrollment group %q: %w", e.Group.EnrollmentGroupID, err)
		}
		if e.Evidence != nil {
			return fmt.Errorf("enrollment group %q: a group has no key to give evidence of", e.Group.EnrollmentGroupID)
		}
		return nil
	case e.Device != nil && e.Individual == nil && e.Group == nil:
		if err := dps.CheckRegistrationID(e.Device.RegistrationID); err != nil {
			return err
		}
		return dps.CheckGroupID(e.Device.Group)
	}
	return errors.New("entry must hold exactly one of individual, group and device")
}
