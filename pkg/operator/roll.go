package operator

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
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

// What a device came in with last, by where that is now.
const (
	SlotPrimary   = "primary"
	SlotSecondary = "secondary"
	SlotBoth      = "both"    // one key in both slots, or one CA with two certificates
	SlotFormer    = "former"  // in neither slot any more: what is done to the slots changes nothing for the device
	SlotUnknown   = "unknown" // the service does not tell, or the device registered when it kept nothing of it
)

// A Use is which of a group's two keys or CAs a device came in with last, as far as the service tells.
type Use struct {
	RegistrationID string    `json:"registrationId"`
	Slot           string    `json:"slot"`
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

// Errors of a roll-over of a CA that is given otherwise than the group has its own.
var (
	// ErrCAByName says that the group names CA certificates of the service: [Client.RollCAName] rolls it over.
	ErrCAByName = errors.New("it names its CAs among the service's certificates")
	// ErrCAByCertificate says that the group has its CA certificates itself: [Client.RollCA] rolls it over.
	ErrCAByCertificate = errors.New("it has its CA's certificate itself")
)

// RollCA looks how far the roll-over of a group's CA certificate to a new one is. The error is ErrNotFound, ErrCAByName, or one of a
// group that has no CA.
func (c *Client) RollCA(ctx context.Context, group string, cert *dps.X509Certificate) (*Roll, error) {
	parsed, err := ParseCertificate(cert.Certificate)
	if err != nil {
		return nil, fmt.Errorf("the new certificate: %w", err)
	}
	if !parsed.IsCA {
		return nil, errors.New("the new certificate is not a CA's")
	}
	d, x, err := c.groupX509(ctx, group)
	if err != nil {
		return nil, err
	}
	if x.SigningCertificates == nil {
		return nil, fmt.Errorf("%s: %w", d, ErrCAByName)
	}
	sum := sha256.Sum256(parsed.Raw)
	same := func(c *dps.X509Certificate) bool {
		if c == nil || c.Info == nil {
			return false
		}
		return strings.EqualFold(c.Info.SHA256Thumbprint, fmt.Sprintf("%x", sum))
	}
	certs := x.SigningCertificates
	r := &Roll{Group: d.ID, c: c, group: d, State: stateOf(same(certs.Primary), same(certs.Secondary))}
	r.next = func(d *Document, both bool) error {
		certs := *certs
		if certs.Secondary = cert; both {
			certs.Primary = cert
		}
		return d.Set("attestation", dps.Attestation{Type: dps.AttestationX509, X509: &dps.X509Attestation{SigningCertificates: &certs}})
	}
	return r, nil
}

// RollCAName looks how far the roll-over of a group to another CA certificate is, where both are certificates of the service that the
// group names. The error is ErrNotFound, ErrCAByCertificate, or one of a group that has no CA.
func (c *Client) RollCAName(ctx context.Context, group, name string) (*Roll, error) {
	d, x, err := c.groupX509(ctx, group)
	if err != nil {
		return nil, err
	}
	if x.CAReferences == nil {
		return nil, fmt.Errorf("%s: %w", d, ErrCAByCertificate)
	}
	same := func(s string) bool { return dps.Fold(s) == dps.Fold(name) }
	r := &Roll{Group: d.ID, c: c, group: d, State: stateOf(same(x.CAReferences.Primary), same(x.CAReferences.Secondary))}
	r.next = func(d *Document, both bool) error {
		refs := &dps.CAReferences{Primary: x.CAReferences.Primary, Secondary: name}
		if both {
			refs.Primary = name
		}
		return d.Set("attestation", dps.Attestation{Type: dps.AttestationX509, X509: &dps.X509Attestation{CAReferences: refs}})
	}
	return r, nil
}

// groupX509 gets a group that attests by the certificates of CAs.
func (c *Client) groupX509(ctx context.Context, group string) (*Document, *dps.X509Attestation, error) {
	d, err := c.Get(ctx, Group, group)
	if err != nil {
		return nil, nil, err
	}
	e, err := d.Enrollment()
	if err != nil {
		return nil, nil, err
	}
	if e.Attestation == nil || e.Attestation.X509 == nil || e.Attestation.X509.SigningCertificates == nil && e.Attestation.X509.CAReferences == nil {
		return nil, nil, fmt.Errorf("%s does not attest by a CA: it has none to roll over", d)
	}
	return d, e.Attestation.X509, nil
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

// Slot names the slot that the next step empties: whom only that admits is shut out then. A fresh roll-over takes the secondary, and one
// that waits the primary.
func (r *Roll) Slot() string {
	if r.State == RollFresh {
		return SlotSecondary
	}
	return SlotPrimary
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

// Uses hands on every device that came in by the group, with what let it in when it last registered. It says too whether the service
// tells that of its devices: only touchmark does, of others it is unknown.
func (r *Roll) Uses(ctx context.Context, emit func(Use) error) (told bool, err error) {
	_, err = r.c.Info(ctx) // other services may answer a path that they do not know with anything
	if err == nil {
		for d, err := range r.c.groupDevices(ctx, r.Group) {
			if err != nil {
				return true, err
			}
			u := Use{RegistrationID: d.RegistrationID, Slot: SlotUnknown, LastSeen: d.LastUpdated, Status: string(d.Status)}
			if d.Admitted != nil && slices.Contains([]string{SlotPrimary, SlotSecondary, SlotBoth, SlotFormer}, d.Admitted.Slot) {
				u.Slot = d.Admitted.Slot
			}
			if err := emit(u); err != nil {
				return true, err
			}
		}
		return true, nil
	}
	if !errors.Is(err, ErrUnsupported) {
		return false, err
	}
	for st, err := range r.c.Registrations(ctx, r.Group) {
		if err != nil {
			return false, err
		}
		if err := emit(Use{RegistrationID: st.RegistrationID, Slot: SlotUnknown, LastSeen: st.LastUpdatedDateTimeUTC, Status: string(st.Status)}); err != nil {
			return false, err
		}
	}
	return false, nil
}
