package registration

import (
	"context"
	"errors"
	"time"

	"github.com/touchmark/touchmark/pkg/dps"
)

// Errors of a Store that the service branches on.
var (
	// ErrNotFound says that a record is not there.
	ErrNotFound = errors.New("not found")
	// ErrConflict says that a registration was written by somebody else meanwhile, or that a certificate belongs to
	// another enrollment.
	ErrConflict = errors.New("conflict")
)

// A Store remembers scopes, enrollments and registrations. Every record belongs to an ID scope; scopes and IDs are folded
// (dps.Fold) before they get here.
//
// View and Update run f in one transaction. The store may run f of an Update more than once, and together with others',
// so f keeps its hands off everything but its transaction and its results, which it sets anew each time. When Update has
// returned nil, what f wrote survives a crash.
type Store interface {
	View(ctx context.Context, f func(Tx) error) error
	Update(ctx context.Context, f func(Tx) error) error
}

// A Tx reads and, in an Update, writes. What it returns belongs to the caller.
type Tx interface {
	// GroupsRevision returns a number that changes with every write to the scope's enrollment groups.
	GroupsRevision(scope string) (int64, error)

	// Record returns an enrollment or a group, or ErrNotFound.
	Record(scope string, kind Kind, id string) (*Record, error)
	// PutRecord writes a record over the one of that kind and ID, if there is one. ErrConflict: one of its certificates
	// belongs to another record.
	PutRecord(scope string, r *Record) error
	// DeleteRecord removes a record, or says ErrNotFound.
	DeleteRecord(scope string, kind Kind, id string) error
	// Records returns up to limit records whose ID is greater than after, in the order of IDs.
	Records(scope string, kind Kind, after string, limit int) ([]*Record, error)
	// SymmetricGroups returns every group that attests by symmetric key.
	SymmetricGroups(scope string) ([]*Record, error)
	// GroupsBySubject returns the groups that have a signing certificate with that subject (SHA-256 of its DER).
	GroupsBySubject(scope string, subject [32]byte) ([]*Record, error)

	// Registration returns a device's registration, or ErrNotFound.
	Registration(scope, id string) (*Registration, error)
	// PutRegistration writes a registration whose Version is the one that was read (0: there was none), and raises it.
	// ErrConflict: somebody else wrote it meanwhile.
	PutRegistration(scope string, r *Registration) error
	// DeleteRegistration removes a registration, or says ErrNotFound.
	DeleteRegistration(scope, id string) error
	// Registrations returns up to limit registrations that came in by a group, IDs greater than after, in order.
	Registrations(scope, group, after string, limit int) ([]*Registration, error)

	// Device returns a device that a bundle named for a group, or ErrNotFound; PutDevice writes one.
	Device(scope, id string) (*Device, error)
	PutDevice(scope string, d *Device) error

	// Policy returns a shared access policy of the service API, or ErrNotFound; PutPolicy writes one.
	Policy(scope, name string) (*Policy, error)
	PutPolicy(scope string, p *Policy) error
}

// Kind tells enrollments from groups.
type Kind string

// The kinds.
const (
	Individual Kind = "individual"
	Group      Kind = "group"
)

// A Record is an individual enrollment or an enrollment group as it is kept.
type Record struct {
	Kind Kind
	ID   string // as it was given
	// Document is the wire form as JSON, with certificates and without symmetric keys.
	Document []byte
	// Keys is the JSON of a dps.SymmetricKeyAttestation, or nil. The store encrypts it.
	Keys []byte
	// Symmetric marks groups that attest by symmetric key.
	Symmetric bool
	// Content is the SHA-256 of what an import brought, to know it again; nil for what the API wrote.
	Content []byte
	// Certificates index what the document holds; not filled in when a record is read.
	Certificates []Certificate
}

// A Certificate indexes one certificate of a record.
type Certificate struct {
	Fingerprint [32]byte // SHA-256 of its DER
	Subject     [32]byte // SHA-256 of its subject's DER
}

// A Registration is what became of a device.
type Registration struct {
	ID      string                `json:"id"` // folded
	State   dps.RegistrationState `json:"state"`
	Group   string                `json:"group,omitempty"` // folded ID of the group that it came in by
	Version int64                 `json:"-"`
	// Operations are the last few, newest first. They live in the registration, so there is nothing to clean up.
	Operations []Operation `json:"operations"`
}

// An Operation is one act of registering.
type Operation struct {
	ID      string    `json:"id"`
	Started time.Time `json:"started"`
	// Proof is the SHA-256 of what the device proved itself with: the leaf or the token.
	Proof []byte `json:"proof"`
	// State is what the device is told, however often it asks.
	State dps.RegistrationState `json:"state"`
}

// A Device was named in a bundle for a group.
type Device struct {
	ID      string // folded
	Group   string // folded
	Serial  string
	KeyHash string
}

// A Policy is a shared access policy. The store encrypts its keys.
type Policy struct {
	Name      string
	Rights    string // "ServiceConfig, DeviceConnect, EnrollmentWrite"
	Primary   []byte
	Secondary []byte
}
