package registration

import (
	"encoding/json"
	"fmt"

	"github.com/touchmark/touchmark/pkg/dps"
)

// An enrollment as the API moves it: one of the two documents, with what they share pulled out.
type document struct {
	kind       Kind
	individual *dps.IndividualEnrollment
	group      *dps.EnrollmentGroup
}

func newDocument(kind Kind) *document {
	if kind == Individual {
		return &document{kind: kind, individual: &dps.IndividualEnrollment{}}
	}
	return &document{kind: kind, group: &dps.EnrollmentGroup{}}
}

func (d *document) value() any {
	if d.kind == Individual {
		return d.individual
	}
	return d.group
}

func (d *document) id() *string {
	if d.kind == Individual {
		return &d.individual.RegistrationID
	}
	return &d.group.EnrollmentGroupID
}

func (d *document) base() *dps.Enrollment {
	if d.kind == Individual {
		return &d.individual.Enrollment
	}
	return &d.group.Enrollment
}

func (d *document) x509() *dps.X509Certificates {
	a := d.base().Attestation
	if a == nil || a.X509 == nil {
		return nil
	}
	if d.kind == Individual {
		return a.X509.ClientCertificates
	}
	return a.X509.SigningCertificates
}

// open reads the document of a record.
func open(r *Record) (*document, error) {
	d, err := decode(r.Kind, r.Document)
	if err != nil {
		return nil, fmt.Errorf("%s %q in the store: %w", r.Kind, r.ID, err)
	}
	return d, nil
}

// decode reads what encode wrote.
func decode(kind Kind, text []byte) (*document, error) {
	d := newDocument(kind)
	if err := json.Unmarshal(text, d.value()); err != nil {
		return nil, err
	}
	if certs := d.x509(); certs != nil && certs.Primary != nil && certs.Secondary != nil && *certs.Secondary == (dps.X509Certificate{}) {
		second := *certs.Primary
		certs.Secondary = &second
	}
	return d, nil
}

// encode writes the document as the store keeps it. A certificate that stands in both slots, as most do, is written once: the second
// slot is an empty object then, which no client can put there. With it twice, hardly an enrollment would share a page of the store with
// another, and a fleet would take twice the memory to be served from.
func (d *document) encode() ([]byte, error) {
	if certs := d.x509(); certs != nil && certs.Primary.Same(certs.Secondary) {
		second := certs.Secondary
		certs.Secondary = &dps.X509Certificate{}
		defer func() { certs.Secondary = second }()
	}
	return dps.Encode(d.value())
}
