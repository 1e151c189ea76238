package bundle

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/evidence"
)

// An Entry is one thing that the service should know: an individual enrollment, an enrollment group, a device that comes in
// by a group, or the end of an identity. Exactly one of Individual, Group, Device and Retired is set.
//
// Enrollments stand in the wire form of the service API, without the members that the service itself makes (etag,
// timestamps, registrationState). On disk an individual symmetric-key enrollment has its attestation type only: the
// keys travel sealed, and Open puts them back when it is given the identity that they were sealed to.
type Entry struct {
	// Serial is the device's serial; empty for groups.
	Serial string `json:"serial,omitempty"`
	// Revision tells the identities apart that a unit has one after the other: 0, and one more with each rework. Of a retired
	// one it is that of the identity that ended. Groups have none.
	Revision   int64                     `json:"revision,omitempty"`
	Individual *dps.IndividualEnrollment `json:"individual,omitempty"`
	Group      *dps.EnrollmentGroup      `json:"group,omitempty"`
	// Closed says that Group admits only devices that a bundle named.
	Closed  bool           `json:"closed,omitempty"`
	Device  *GroupDevice   `json:"device,omitempty"`
	Retired *RetiredDevice `json:"retired,omitempty"`
	// Evidence says where the device's private key lives, where that is a place that it stays in.
	Evidence *evidence.Evidence `json:"evidence,omitempty"`
}

// Resides says what keeps e from being a device whose key is shown to live in such a place. Groups have no key of their own,
// and what ended no use for one: they reside anywhere. The error is evidence.ErrResidency.
func (e *Entry) Resides(want evidence.Residency) error {
	switch {
	case e.Group != nil, e.Retired != nil:
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
	case e.Retired != nil:
		return e.Retired.RegistrationID
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

// A State is how an identity ended.
type State string

// The states, in the order in which one may follow another.
const (
	Voided   State = "voided"   // given up before it left the factory
	Reworked State = "reworked" // the unit has a new identity, or will have
	Scrapped State = "scrapped" // the unit is no more
	Returned State = "returned" // the owner was shown that it is no more: its order may make another
)

// States lists them in that order.
var States = []State{Voided, Reworked, Scrapped, Returned}

// A RetiredDevice is an identity that ended.
type RetiredDevice struct {
	RegistrationID string `json:"registrationId"`
	// Group is the group that admitted the device; empty for an individual enrollment.
	Group string `json:"group,omitempty"`
	// KeyHash names the key that ended with it: the lower-case hex SHA-256 of a public key (SubjectPublicKeyInfo), or of what
	// names a symmetric one. Empty where it had none yet, or where the key stays with the device.
	KeyHash string    `json:"keyHash,omitempty"`
	State   State     `json:"state"`
	Reason  string    `json:"reason"`
	At      time.Time `json:"at"`
	// Permit is the owner's signed permit (package order) that a returned unit was given back on.
	Permit string `json:"permit,omitempty"`
}

// maxPermit bounds a permit, in octets.
const maxPermit = 64 << 10

func (r *RetiredDevice) check() error {
	if err := dps.CheckRegistrationID(r.RegistrationID); err != nil {
		return err
	}
	if r.Group != "" {
		if err := dps.CheckGroupID(r.Group); err != nil {
			return err
		}
	}
	if len(r.Permit) > maxPermit || r.Permit != "" && r.State != Returned {
		return fmt.Errorf("retired device %q: a permit of at most %d octets goes with returned ones", r.RegistrationID, maxPermit)
	}
	if !slices.Contains(States, r.State) || len(r.Reason) > maxReason || r.At.IsZero() {
		return fmt.Errorf("retired device %q: want one of %v, a reason of at most %d octets, and when", r.RegistrationID, States, maxReason)
	}
	return checkKeyHash(r.RegistrationID, r.KeyHash)
}

func checkKeyHash(id, hash string) error {
	if b, err := hex.DecodeString(hash); hash != "" && (err != nil || len(b) != sha256.Size || hex.EncodeToString(b) != hash) {
		return fmt.Errorf("device %q: its key hash is no SHA-256 in lower-case hex", id)
	}
	return nil
}

// maxRevision bounds revisions: JSON's numbers are exact so far.
const maxRevision = 1 << 53

// Check says what keeps e from being an entry.
func (e *Entry) Check() error {
	switch {
	case e.Revision < 0 || e.Revision > maxRevision || len(e.Serial) > maxName:
		return fmt.Errorf("entry %q: revision %d, or a serial of more than %d octets", e.name(), e.Revision, maxName)
	case e.Group == nil && e.Closed, e.Group != nil && e.Revision != 0:
		return fmt.Errorf("entry %q: only groups are closed, and they have no revisions", e.name())
	case e.Retired != nil && e.Individual == nil && e.Group == nil && e.Device == nil:
		if e.Evidence != nil {
			return fmt.Errorf("entry %q: what ended has no evidence", e.name())
		}
		return e.Retired.check()
	case e.Retired != nil:
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
		if err := dps.CheckGroupID(e.Device.Group); err != nil {
			return err
		}
		return checkKeyHash(e.Device.RegistrationID, e.Device.KeyHash)
	}
	return errors.New("entry must hold exactly one of individual, group, device and retired")
}
