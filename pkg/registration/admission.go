package registration

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"time"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/dps"
)

// An Admission is what let a device in when it last registered: one of the two keys or CAs of its group, or one of the two keys or
// certificates of its own enrollment. It lasts as long as the registration.
type Admission struct {
	Kind AdmissionKind `json:"kind"`
	Slot string        `json:"slot"` // "primary" or "secondary", as it was then
	// Fingerprint tells it from others, since slots are written anew: 16 octets of a hash that gives nothing away. A key's is an HMAC
	// under that key, of the enrollment's name: it shows neither the key nor where else it is used. Whoever reads the store can hold
	// guesses against it, which keys of 128 random bits do not mind; a key that somebody made up out of words would, as it does with
	// every token that is seen. Operators are not shown it. A CA's is of its name and key, so that it stays when its certificate is
	// renewed; that of a device's certificate is of the whole.
	Fingerprint []byte `json:"fingerprint"`
}

// AdmissionKind says what a fingerprint is of.
type AdmissionKind string

// The kinds. A TPM has one key and no slots: there is no admission of it.
const (
	AdmittedByKey         AdmissionKind = "key"
	AdmittedByCA          AdmissionKind = "ca"
	AdmittedByCertificate AdmissionKind = "certificate"
)

var slotNames = [...]string{"primary", "secondary"}

func keyAdmission(key attest.GroupKey, enrollment string, slot int) *Admission {
	// What a group's key derives from a registration ID is that device's key, and what a device's key makes of a text with a line break
	// is a token's signature. This is neither: there is no slash in an ID.
	return &Admission{AdmittedByKey, slotNames[slot], key.Derive("touchmark/admission/" + dps.Fold(enrollment))[:16]}
}

func caAdmission(ca *x509.Certificate, slot int) *Admission {
	h := sha256.New()
	h.Write(ca.RawSubject) // DER says itself where it ends
	h.Write(ca.RawSubjectPublicKeyInfo)
	return &Admission{AdmittedByCA, slotNames[slot], h.Sum(nil)[:16]}
}

func certificateAdmission(der []byte, slot int) *Admission {
	sum := sha256.Sum256(der)
	return &Admission{AdmittedByCertificate, slotNames[slot], sum[:16]}
}

// admissions returns what a record admits devices by, the primary first. A CA that is not verified, or not valid yet, admits nobody:
// whoever takes away the same CA's other certificate shuts its devices out.
func admissions(r *Record, at time.Time) (all []*Admission, err error) {
	d, err := open(r)
	if err != nil {
		return nil, err
	}
	if r.Keys != nil {
		keys, err := keysOf(r)
		if err != nil {
			return nil, err
		}
		for i, k := range keys {
			all = append(all, keyAdmission(attest.NewGroupKey(k), r.ID, i))
		}
	}
	if certs := d.x509(); certs != nil {
		for i, c := range []*dps.X509Certificate{certs.Primary, certs.Secondary} {
			if c == nil || c.Info == nil && len(d.references()) > 0 {
				continue
			}
			der, err := base64.StdEncoding.DecodeString(c.Certificate)
			if err != nil {
				return nil, err
			}
			if r.Kind == Individual {
				all = append(all, certificateAdmission(der, i))
				continue
			}
			ca, err := x509.ParseCertificate(der)
			if err != nil {
				return nil, err
			}
			if !at.Add(attest.Skew).Before(ca.NotBefore) {
				all = append(all, caAdmission(ca, i))
			}
		}
	}
	return all, nil
}

// Admitted is an admission as operators see it.
type Admitted struct {
	Kind AdmissionKind `json:"kind"`
	// Slot is where it stands now: "primary", "secondary", "both", or "former" for what is in neither any more. Was is where it stood
	// when the device registered.
	Slot string `json:"slot"`
	Was  string `json:"was"`
}

// among finds an admission among those that there are now; nil is nobody knows.
func (a *Admission) among(now []*Admission) *Admitted {
	if a == nil {
		return nil
	}
	v := &Admitted{Kind: a.Kind, Slot: "former", Was: a.Slot}
	for _, n := range now {
		switch {
		case n.Kind != a.Kind || string(n.Fingerprint) != string(a.Fingerprint):
		case v.Slot == "former":
			v.Slot = n.Slot
		default:
			v.Slot = "both"
		}
	}
	return v
}

// admitted is what let a device in, by its group or its own enrollment as that is now.
func (s *Service) admitted(tx Tx, r *Registration) (*Admitted, error) {
	if r == nil || r.Admitted == nil {
		return nil, nil
	}
	kind, id := Individual, r.ID
	if r.Group != "" {
		kind, id = Group, r.Group
	}
	record, err := found(tx.Record(s.scope, kind, id))
	if err != nil {
		return nil, err
	}
	var now []*Admission
	if record != nil {
		if now, err = admissions(record, s.cfg.Now()); err != nil {
			return nil, err
		}
	}
	return r.Admitted.among(now), nil
}

// A GroupDevice is a device that came in by a group, and what let it in when it last registered.
type GroupDevice struct {
	RegistrationID string     `json:"registrationId"`
	Status         dps.Status `json:"status"`
	LastUpdated    *dps.Time  `json:"lastUpdatedDateTimeUtc,omitempty"`
	// Admitted is null of a device that registered when that was not kept yet.
	Admitted *Admitted `json:"admitted"`
}

// QueryGroupDevices returns a page of the devices that came in by a group, and where the next one begins.
func (s *Service) QueryGroupDevices(ctx context.Context, group string, p Page) (rows []any, next string, err error) {
	err = s.cfg.Store.View(ctx, func(tx Tx) error {
		r, err := tx.Record(s.scope, Group, dps.Fold(group))
		if errors.Is(err, ErrNotFound) {
			return missing(Group)
		}
		if err != nil {
			return err
		}
		now, err := admissions(r, s.cfg.Now())
		if err != nil {
			return err
		}
		rows, next, err = page(p, func(after string, limit int) ([]listed, error) {
			regs, err := tx.Registrations(s.scope, dps.Fold(group), after, limit)
			batch := make([]listed, len(regs))
			for i, r := range regs {
				batch[i] = listed{r.ID, &GroupDevice{r.State.RegistrationID, r.State.Status, r.State.LastUpdatedDateTimeUTC.Trim(), r.Admitted.among(now)}, 0}
			}
			return batch, err
		})
		return err
	})
	return rows, next, err
}

// text says it in a sentence.
func (a *Admitted) text() string {
	what := map[AdmissionKind]string{AdmittedByKey: "key", AdmittedByCA: "CA", AdmittedByCertificate: "certificate"}[a.Kind]
	switch a.Slot {
	case "former":
		return "It was let in last by a " + what + " that was " + a.Was + " then, and lets nobody in any more."
	case "both":
		return "It was let in last by the " + what + " that is primary and secondary."
	}
	return "It was let in last by the " + a.Slot + " " + what + "."
}
