package operator

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/url"

	"github.com/touchmark/touchmark/pkg/dps"
)

// An Attempt is one try of a device to register, as touchmark remembers it.
type Attempt struct {
	At         dps.Time `json:"at"`
	Operation  string   `json:"operation"`
	Result     string   `json:"result"`
	Code       dps.Code `json:"code"`
	TrackingID string   `json:"trackingId"`
	Reason     string   `json:"reason"` // why it was refused, as it stands in the service's log
	Protocol   string   `json:"protocol"`
	Remote     string   `json:"remote"`
	Group      string   `json:"group"`
	Proof      string   `json:"proof"` // what it proved itself with, primary or secondary
}

// Refused reports whether the device was told no.
func (a *Attempt) Refused() bool { return a.Code >= 400_000 }

// A Diagnosis is what a service knows about a device, and what that means.
type Diagnosis struct {
	RegistrationID string                 `json:"registrationId"`
	Enrollment     *Document              `json:"enrollment,omitempty"`
	Group          *Document              `json:"group,omitempty"` // that was asked about, or that the last attempt came in by
	Registration   *dps.RegistrationState `json:"registration,omitempty"`
	Attempts       []Attempt              `json:"attempts,omitempty"`
	// Told says that the service keeps a log of attempts. Without one, what is explained is what can be seen from outside.
	Told     bool      `json:"told"`
	Findings []Finding `json:"findings"`
	// Disabled names groups that refuse whoever belongs to them, and Kinds counts groups by how they attest.
	Disabled []string                    `json:"disabledGroups,omitempty"`
	Kinds    map[dps.AttestationType]int `json:"groups,omitempty"`
	// Explanation is what the service itself makes of it.
	Explanation []string `json:"explanation,omitempty"`
}

// Diagnosis gets what a touchmark service tells about a device. The error is ErrUnsupported where it tells nothing.
func (c *Client) Diagnosis(ctx context.Context, id string) (*Diagnosis, error) {
	var told struct {
		Enrollment   json.RawMessage        `json:"enrollment"`
		Registration *dps.RegistrationState `json:"registration"`
		Attempts     []Attempt              `json:"attempts"`
		Explanation  []string               `json:"explanation"`
	}
	if _, err := c.do(ctx, request{method: http.MethodGet, path: "/touchmark/diagnose/" + url.PathEscape(id), again: true}, &told); err != nil {
		return nil, unsupported(err)
	}
	d := &Diagnosis{RegistrationID: id, Registration: told.Registration, Attempts: told.Attempts, Explanation: told.Explanation, Told: true}
	if e, err := ParseDocument(told.Enrollment); err == nil { // else there is none
		d.Enrollment = e
	}
	return d, nil
}

// Diagnose finds out why a device is refused, or is not where it should be: from the service's log of attempts, if it is touchmark's,
// and from what every service shows. The group is the one that the device is meant to come in by; empty if nobody knows.
func (c *Client) Diagnose(ctx context.Context, id, group string) (*Diagnosis, error) {
	d, err := c.Diagnosis(ctx, id)
	if errors.Is(err, ErrUnsupported) {
		d, err = &Diagnosis{RegistrationID: id}, nil
	}
	if err != nil {
		return nil, err
	}
	absent := func(err error) error {
		if errors.Is(err, ErrNotFound) {
			return nil
		}
		return err
	}
	if d.Enrollment == nil {
		if d.Enrollment, err = c.Get(ctx, Individual, id); absent(err) != nil {
			return nil, err
		}
	}
	if d.Registration == nil {
		st, err := c.Registration(ctx, id)
		if absent(err) != nil {
			return nil, err
		}
		if err == nil {
			d.Registration = st
		}
	}
	if d.Enrollment == nil {
		if err := c.groupsOf(ctx, d, group); err != nil {
			return nil, err
		}
	}
	d.Findings = Explain(d, group)
	return d, nil
}

// groupsOf looks at the groups that a device without an enrollment can come in by.
func (c *Client) groupsOf(ctx context.Context, d *Diagnosis, group string) error {
	if group == "" && len(d.Attempts) > 0 {
		group = d.Attempts[len(d.Attempts)-1].Group
	}
	d.Kinds = make(map[dps.AttestationType]int)
	for g, err := range c.All(ctx, Group) {
		if err != nil {
			return err
		}
		e, err := g.Enrollment()
		if err != nil || e.Attestation == nil {
			continue
		}
		d.Kinds[e.Attestation.Type]++
		if e.ProvisioningStatus == dps.EnrollmentDisabled {
			d.Disabled = append(d.Disabled, g.ID)
		}
		if group != "" && dps.Fold(g.ID) == dps.Fold(group) {
			d.Group = g
		}
	}
	return nil
}
