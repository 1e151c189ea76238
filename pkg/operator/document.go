package operator

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"slices"

	"github.com/touchmark/touchmark/pkg/dps"
)

// A Kind is one of the two kinds of enrollment.
type Kind string

// The kinds.
const (
	Individual Kind = "enrollment"
	Group      Kind = "group"
)

func (k Kind) path() string { return k.pick("/enrollments", "/enrollmentGroups") }
func (k Kind) list() string { return k.pick("enrollments", "enrollmentGroups") }

// Member names the member that holds the ID of an enrollment of that kind.
func (k Kind) Member() string { return k.pick("registrationId", "enrollmentGroupId") }

// Name is what the kind is called in sentences.
func (k Kind) Name() string { return k.pick("enrollment", "enrollment group") }

func (k Kind) pick(individual, group string) string {
	if k == Group {
		return group
	}
	return individual
}

// A Document is one enrollment as the wire has it. What this package does not know of it is kept. Its text form is its name alone:
// its JSON may hold keys.
type Document struct {
	Kind    Kind
	ID      string
	members map[string]json.RawMessage
}

// New members are put behind these, which stand in the order of the wire's own answers.
var order = []string{"registrationId", "enrollmentGroupId", "deviceId", "attestation", "capabilities", "iotHubHostName", "initialTwin", "optionalDeviceInformation",
	"provisioningStatus", "reprovisionPolicy", "allocationPolicy", "iotHubs", "customAllocationDefinition"}

// readOnly are the members that a service makes (service API, section 8).
var readOnly = []string{"etag", "createdDateTimeUtc", "lastUpdatedDateTimeUtc", "registrationState"}

// ParseDocument reads an enrollment: of the kind whose ID it has. Its members have to be of the wire's types; what package dps does
// not know may be anything.
func ParseDocument(b []byte) (*Document, error) {
	d := &Document{}
	if err := json.Unmarshal(b, &d.members); err != nil {
		return nil, fmt.Errorf("no enrollment: %w", err)
	}
	_, individual := d.members["registrationId"]
	_, group := d.members["enrollmentGroupId"]
	switch {
	case individual && !group:
		d.Kind = Individual
	case group && !individual:
		d.Kind = Group
	default:
		return nil, fmt.Errorf("no enrollment: want registrationId or enrollmentGroupId")
	}
	if err := json.Unmarshal(d.members[d.Kind.Member()], &d.ID); err != nil {
		return nil, fmt.Errorf("no enrollment: %s: %w", d.Kind.Member(), err)
	}
	if _, err := d.typed(); err != nil {
		return nil, fmt.Errorf("%s: %w", d, err)
	}
	return d, nil
}

// NewDocument makes one of a *dps.IndividualEnrollment or a *dps.EnrollmentGroup.
func NewDocument(v any) (*Document, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	return ParseDocument(b)
}

// UnmarshalJSON is [ParseDocument].
func (d *Document) UnmarshalJSON(b []byte) error {
	p, err := ParseDocument(b)
	if err == nil {
		*d = *p
	}
	return err
}

// MarshalJSON renders all members, those that are known first.
func (d *Document) MarshalJSON() ([]byte, error) {
	names := make([]string, 0, len(d.members))
	for name := range d.members {
		names = append(names, name)
	}
	rank := func(name string) int {
		if i := slices.Index(order, name); i >= 0 {
			return i
		}
		return len(order)
	}
	slices.SortFunc(names, func(a, b string) int { return cmp.Or(cmp.Compare(rank(a), rank(b)), cmp.Compare(a, b)) })
	out := []byte{'{'}
	for i, name := range names {
		if i > 0 {
			out = append(out, ',')
		}
		key, err := json.Marshal(name)
		if err != nil {
			return nil, err
		}
		out = append(append(append(out, key...), ':'), d.members[name]...)
	}
	return append(out, '}'), nil
}

// String names the document.
func (d *Document) String() string { return d.Kind.Name() + " " + d.ID }

// GoString names the document.
func (d *Document) GoString() string { return d.String() }

// Individual returns the typed form of an individual enrollment. What package dps does not know is not in it.
func (d *Document) Individual() (*dps.IndividualEnrollment, error) {
	v, err := d.typed()
	if err != nil || d.Kind != Individual {
		return nil, cmp.Or(err, fmt.Errorf("%s is no individual enrollment", d))
	}
	return v.(*dps.IndividualEnrollment), nil
}

// Group returns the typed form of an enrollment group.
func (d *Document) Group() (*dps.EnrollmentGroup, error) {
	v, err := d.typed()
	if err != nil || d.Kind != Group {
		return nil, cmp.Or(err, fmt.Errorf("%s is no enrollment group", d))
	}
	return v.(*dps.EnrollmentGroup), nil
}

// Enrollment returns what both kinds share.
func (d *Document) Enrollment() (*dps.Enrollment, error) {
	v, err := d.typed()
	if err != nil {
		return nil, err
	}
	if e, ok := v.(*dps.IndividualEnrollment); ok {
		return &e.Enrollment, nil
	}
	return &v.(*dps.EnrollmentGroup).Enrollment, nil
}

func (d *Document) typed() (v any, err error) {
	v = &dps.EnrollmentGroup{}
	if d.Kind == Individual {
		v = &dps.IndividualEnrollment{}
	}
	b, err := d.MarshalJSON()
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return nil, fmt.Errorf("it is not of the wire's form: %w", err)
	}
	return v, nil
}

// Check says what keeps d from being taken by any service (service API, section 8): its ID and its attestation. Certificates and
// the rules between members are the service's.
func (d *Document) Check() error {
	check := dps.CheckRegistrationID
	if d.Kind == Group {
		check = dps.CheckGroupID
	}
	if err := check(d.ID); err != nil {
		return err
	}
	e, err := d.Enrollment()
	if err != nil {
		return err
	}
	if err := e.Attestation.Check(); err != nil {
		return err
	}
	return checkKeys(e.Attestation.SymmetricKey)
}

// describes reports whether d describes a certificate that it does not have, as what services answer does: only an enrollment that
// is there already can take it.
func (d *Document) describes() bool {
	e, err := d.Enrollment()
	if err != nil || e.Attestation.X509 == nil {
		return false
	}
	for _, certs := range []*dps.X509Certificates{e.Attestation.X509.ClientCertificates, e.Attestation.X509.SigningCertificates} {
		if certs != nil && slices.ContainsFunc([]*dps.X509Certificate{certs.Primary, certs.Secondary}, func(c *dps.X509Certificate) bool { return c != nil && c.Certificate == "" }) {
			return true
		}
	}
	return false
}

// Has reports whether d has a member that is not null.
func (d *Document) Has(member string) bool {
	v, ok := d.members[member]
	return ok && !bytes.Equal(bytes.TrimSpace(v), []byte("null"))
}

// Get decodes a member; it leaves v alone where there is none.
func (d *Document) Get(member string, v any) error {
	if raw, ok := d.members[member]; ok {
		return json.Unmarshal(raw, v)
	}
	return nil
}

// Set puts a member there, or in the place of the one that is.
func (d *Document) Set(member string, v any) error {
	b, err := json.Marshal(v)
	if err == nil {
		d.members[member] = b
	}
	return err
}

// Drop takes members away.
func (d *Document) Drop(members ...string) {
	for _, m := range members {
		delete(d.members, m)
	}
}

// Portable drops what a service makes.
func (d *Document) Portable() { d.Drop(readOnly...) }

// ETag returns the version of the document, or "".
func (d *Document) ETag() (tag string) {
	_ = d.Get("etag", &tag)
	return tag
}

// clone shares the members' texts, which nobody changes in place.
func (d *Document) clone() *Document {
	c := &Document{Kind: d.Kind, ID: d.ID, members: make(map[string]json.RawMessage, len(d.members))}
	for k, v := range d.members {
		c.members[k] = v
	}
	return c
}
