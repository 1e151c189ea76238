package operator

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"

	"github.com/touchmark/touchmark/pkg/dps"
)

// A RollState is how far a group's key or CA is on its way from an old one to a new one.
type RollState string

// The states, in their order. Both slots of a group admit devices, so nobody is shut out before RollDone.
const (
	RollFresh   RollState = "fresh"   // the new one is not there
	RollWaiting RollState = "waiting" // the new one is the secondary: devices are moving
	RollDone    RollState = "done"    // the new one is primary and secondary
)

// A Use is which of a group's two keys or CAs a device came in with last, as far as the service tells.
type Use struct {
	RegistrationID string    `json:"registrationId"`
	Slot           string    `json:"slot"` // primary, secondary or unknown
	LastSeen       *dps.Time `json:"lastSeen,omitempty"`
	Status         string    `json:"status,omitempty"`
}

// A Roll is a roll-over of a group's key or CA, for somebody to look at and to take further.
type Roll struct {
	Group string    `json:"group"`
	State RollState `json:"state"`
	c     *Client
	group *Document
	next  func(d *Document, both bool) error
	// subjects are the names of the group's CAs as they are now, primary and secondary.
	subjects [2]string
}

// RollKey looks how far the roll-over of a group's symmetric key to a new one is. The key is base64. The error is ErrNotFound, or one
// of a group that has no keys.
func (c *Client) RollKey(ctx context.Context, group, key string) (*Roll, error) {
	want, err := base64.StdEncoding.DecodeString(key)
	if err != nil || len(want) < 16 || len(want) > 64 {
		return nil, errors.New("the new key is not base64 of 16 to 64 octets")
	}
	d, err := c.Get(ctx, Group, group)
	if err != nil {
		return nil, err
	}
	is, err := c.Mechanism(ctx, Group, group)
	if err != nil {
		return nil, err
	}
	if is.Type != dps.AttestationSymmetricKey || is.SymmetricKey == nil {
		return nil, fmt.Errorf("%s attests by %s: it has no key to roll over", d, is.Type)
	}
	same := func(s string) bool {
		b, err := base64.StdEncoding.DecodeString(s)
		return err == nil && hmac.Equal(b, want)
	}
	r := &Roll{Group: d.ID, c: c, group: d, State: stateOf(same(is.SymmetricKey.PrimaryKey), same(is.SymmetricKey.SecondaryKey))}
	r.next = func(d *Document, both bool) error {
		k := &dps.SymmetricKeyAttestation{PrimaryKey: is.SymmetricKey.PrimaryKey, SecondaryKey: key}
		if both {
			k.PrimaryKey = key
		}
		return d.Set("attestation", dps.Attestation{Type: dps.AttestationSymmetricKey, SymmetricKey: k})
	}
	return r, nil
}

// RollCA looks how far the roll-over of a group's CA certificate to a new one is.
func (c *Client) RollCA(ctx context.Context, group string, cert *dps.X509Certificate) (*Roll, error) {
	parsed, err := ParseCertificate(cert.Certificate)
	if err != nil {
		return nil, fmt.Errorf("the new certificate: %w", err)
	}
	if !parsed.IsCA {
		return nil, errors.New("the new certificate is not a CA's")
	}
	d, err := c.Get(ctx, Group, group)
	if err != nil {
		return nil, err
	}
	e, err := d.Enrollment()
	if err != nil {
		return nil, err
	}
	if e.Attestation == nil || e.Attestation.X509 == nil || e.Attestation.X509.SigningCertificates == nil {
		return nil, fmt.Errorf("%s does not attest by a signing certificate: it has none to roll over", d)
	}
	sum := sha256.Sum256(parsed.Raw)
	same := func(c *dps.X509Certificate) bool {
		if c == nil || c.Info == nil {
			return false
		}
		return strings.EqualFold(c.Info.SHA256Thumbprint, fmt.Sprintf("%x", sum))
	}
	certs := e.Attestation.X509.SigningCertificates
	r := &Roll{Group: d.ID, c: c, group: d, State: stateOf(same(certs.Primary), same(certs.Secondary))}
	for i, c := range []*dps.X509Certificate{certs.Primary, certs.Secondary} {
		if c != nil && c.Info != nil {
			r.subjects[i] = plainName(c.Info.SubjectName)
		}
	}
	r.next = func(d *Document, both bool) error {
		certs := *certs
		if certs.Secondary = cert; both {
			certs.Primary = cert
		}
		return d.Set("attestation", dps.Attestation{Type: dps.AttestationX509, X509: &dps.X509Attestation{SigningCertificates: &certs}})
	}
	return r, nil
}

func stateOf(primary, secondary bool) RollState {
	switch {
	case primary && secondary:
		return RollDone
	case secondary:
		return RollWaiting
	}
	return RollFresh
}

// Slot names the slot that the next step empties: who uses it is shut out then. A fresh roll-over takes the secondary, and one that
// waits the primary.
func (r *Roll) Slot() string {
	if r.State == RollFresh {
		return "secondary"
	}
	return "primary"
}

// Next takes the roll-over one step further, unless the group was changed since it was looked at: the error is ErrChanged.
func (r *Roll) Next(ctx context.Context) error {
	if r.State == RollDone {
		return nil
	}
	d := r.group.clone()
	if err := r.next(d, r.State == RollWaiting); err != nil {
		return err
	}
	_, err := r.c.Replace(ctx, d, r.group.ETag())
	if err != nil {
		return err
	}
	if r.State == RollFresh {
		r.State = RollWaiting
	} else {
		r.State = RollDone
	}
	return nil
}

// Uses hands on every device that came in by the group, with what it came in with last. Only touchmark tells that; of others it is
// unknown.
func (r *Roll) Uses(ctx context.Context, emit func(Use) error) error {
	tells := true
	for st, err := range r.c.Registrations(ctx, r.Group) {
		if err != nil {
			return err
		}
		u := Use{RegistrationID: st.RegistrationID, Slot: "unknown", LastSeen: st.LastUpdatedDateTimeUTC, Status: string(st.Status)}
		if tells {
			d, err := r.c.Diagnosis(ctx, st.RegistrationID, nil)
			switch {
			case errors.Is(err, ErrUnsupported):
				tells = false
			case err != nil:
				return err
			default:
				u.Slot = r.slotOf(d.Attempts)
			}
		}
		if err := emit(u); err != nil {
			return err
		}
	}
	return nil
}

// slotOf finds out what the last attempt that got in by the group was made with: the service says it, or the certificate's issuer has
// the name of one of the group's CAs and not of the other.
func (r *Roll) slotOf(attempts []Attempt) string {
	for i := range attempts { // the newest first
		a := &attempts[i]
		if a.Refused() || dps.Fold(a.Group) != dps.Fold(r.Group) {
			continue
		}
		if a.Slot == "primary" || a.Slot == "secondary" {
			return a.Slot
		}
		issuer := ""
		if a.Certificate != nil {
			issuer = plainName(a.Certificate.Issuer)
		}
		switch first, second := issuer == r.subjects[0], issuer == r.subjects[1]; {
		case issuer == "", first == second:
		case first:
			return "primary"
		default:
			return "secondary"
		}
		return "unknown"
	}
	return "unknown"
}

// plainName is a distinguished name in one spelling, whether its parts are separated with spaces or not.
func plainName(name string) string { return strings.ReplaceAll(name, ", ", ",") }
