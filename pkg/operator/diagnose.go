package operator

import (
	"cmp"
	"context"
	"errors"
	"net/http"
	"net/url"
	"slices"

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
	Rule       string   `json:"rule"`   // a name for it
	Protocol   string   `json:"protocol"`
	Remote     string   `json:"remote"`
	Group      string   `json:"group"`
	Times      int64    `json:"times,omitempty"` // how often the same happened; 0 for once
	Proof      string   `json:"proof"`           // what it proved itself with, or tried to: x509, symmetricKey, tpm or none
	// Slot is which of two keys or certificates that was, where the service tells: primary or secondary.
	Slot        string     `json:"slot,omitempty"`
	Certificate *Presented `json:"certificate,omitempty"`
}

// Admitted is what let a device in when it last registered, as touchmark tells it.
type Admitted struct {
	Kind string `json:"kind"` // key, ca or certificate
	Slot string `json:"slot"` // where that stands now: primary, secondary, both, or former
	Was  string `json:"was"`  // where it stood then
}

// Presented is a certificate that a device showed.
type Presented struct {
	Subject string `json:"subject"`
	Issuer  string `json:"issuer"`
}

// A Trial is what would become of certificates that were handed in.
type Trial struct {
	Result string `json:"result"` // admitted, disabled or refused
	Group  string `json:"group,omitempty"`
	Rule   string `json:"rule,omitempty"`
	Reason string `json:"reason,omitempty"`
}

// Refused reports whether the device was told no.
func (a *Attempt) Refused() bool { return a.Code >= 400_000 || a.Result == "refused" }

// A Diagnosis is what a service knows about a device, and what that means.
type Diagnosis struct {
	RegistrationID string                 `json:"registrationId"`
	Enrollment     *Document              `json:"enrollment,omitempty"`
	Group          *Document              `json:"group,omitempty"` // that was asked about, or that the last attempt came in by
	Registration   *dps.RegistrationState `json:"registration,omitempty"`
	Admitted       *Admitted              `json:"admitted,omitempty"`
	Attempts       []Attempt              `json:"attempts,omitempty"` // the newest first
	Trial          *Trial                 `json:"trial,omitempty"`
	Task           *Task                  `json:"task,omitempty"`    // what hubs have yet to be told about it
	Parent         *Child                 `json:"parent,omitempty"`  // the edge device that it is to be below
	Orphans        []Orphan               `json:"orphans,omitempty"` // where it stays although it has gone on
	// Told says that the service keeps a log of attempts. Without one, what is explained is what can be seen from outside.
	Told     bool      `json:"told"`
	Findings []Finding `json:"findings"`
	// Disabled names groups that refuse whoever belongs to them, and Kinds counts groups by how they attest.
	Disabled []string                    `json:"disabledGroups,omitempty"`
	Kinds    map[dps.AttestationType]int `json:"groups,omitempty"`
	// Explanation is what the service itself makes of it.
	Explanation []string `json:"explanation,omitempty"`
	by          string   // the group that the service says it belongs to
}

// Diagnosis gets what a touchmark service tells about a device; with a chain of certificates in PEM, the device's first, also what would
// become of it. The error is ErrUnsupported where it tells nothing.
func (c *Client) Diagnosis(ctx context.Context, id string, chain []byte) (*Diagnosis, error) {
	var told struct {
		Enrollment   struct{ Kind, ID string }
		Registration *dps.RegistrationState
		Admitted     *Admitted
		Attempts     []Attempt
		Trial        *Trial
		Task         *Task
		Parent       *Child
		Orphans      []Orphan
		Explanation  []string
	}
	r := request{method: http.MethodGet, path: "/touchmark/diagnose/" + url.PathEscape(id), again: true}
	if chain != nil {
		r.method, r.body = http.MethodPost, chain
	}
	if _, err := c.do(ctx, r, &told); err != nil {
		return nil, unsupported(err)
	}
	d := &Diagnosis{RegistrationID: id, Registration: told.Registration, Admitted: told.Admitted, Attempts: told.Attempts, Trial: told.Trial, Explanation: told.Explanation, Told: true,
		Task: told.Task, Parent: told.Parent, Orphans: told.Orphans}
	if told.Enrollment.Kind == "group" {
		d.by = told.Enrollment.ID
	}
	slices.SortStableFunc(d.Attempts, func(a, b Attempt) int { return b.At.Compare(a.At.Time) })
	return d, nil
}

// Diagnose finds out why a device is refused, or is not where it should be: from the service's log of attempts, if it is touchmark's,
// and from what every service shows. The group is the one that the device is meant to come in by; empty if nobody knows. The chain is
// described at [Client.Diagnosis]; nil is none.
func (c *Client) Diagnose(ctx context.Context, id, group string, chain []byte) (*Diagnosis, error) {
	d, err := c.Diagnosis(ctx, id, chain)
	if errors.Is(err, ErrUnsupported) && chain == nil {
		d, err = &Diagnosis{RegistrationID: id}, nil
	}
	if err != nil {
		return nil, err
	}
	group = cmp.Or(group, d.by)
	absent := func(err error) error {
		if errors.Is(err, ErrNotFound) {
			return nil
		}
		return err
	}
	if d.Enrollment, err = c.Get(ctx, Individual, id); absent(err) != nil {
		return nil, err
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
		group = d.Attempts[0].Group
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
