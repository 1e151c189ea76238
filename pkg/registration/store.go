package registration

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/bundle"
	"github.com/touchmark/touchmark/pkg/dps"
)

// Errors of a Store that the service branches on.
var (
	// ErrNotFound says that a record is not there.
	ErrNotFound = errors.New("not found")
	// ErrConflict says that a registration was written by somebody else meanwhile, or that a certificate or an
	// endorsement key belongs to another enrollment.
	ErrConflict = errors.New("conflict")
	// ErrSameCA is an ErrConflict: a CA of a group has the name and the key of another group's, in another certificate.
	// Nothing could tell the devices of the two apart.
	ErrSameCA = fmt.Errorf("%w of CAs", ErrConflict)
	// ErrTooMany says that there is more than was asked for.
	ErrTooMany = errors.New("too many")
)

// An OwnerError is ErrConflict, or ErrSameCA, and says whose the certificate, the endorsement key or the CA is.
type OwnerError struct {
	Kind Kind
	ID   string // folded
	Err  error  // ErrConflict or ErrSameCA
}

// Error implements error.
func (e *OwnerError) Error() string { return e.Err.Error() + " with " + e.owner() }

// Unwrap returns Err.
func (e *OwnerError) Unwrap() error { return e.Err }

func (e *OwnerError) owner() string {
	if e.Kind == Group {
		return "enrollment group " + e.ID
	}
	return "enrollment " + e.ID
}

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
	// Revision returns a number that rises with every write to the scope itself and to its enrollment groups. It never comes back
	// to an old value, not even when the scope is deleted.
	Revision(scope string) (int64, error)

	// Scope returns a scope, and ScopeByName the one of a name in any case, or ErrNotFound. PutScope writes one whose Version is
	// the one that was read (0: there was none), and raises it. ErrConflict: somebody else wrote it meanwhile, or another has its
	// name. Scopes returns up to limit scopes whose ID is greater than after, in order.
	Scope(id string) (*Scope, error)
	ScopeByName(name string) (*Scope, error)
	PutScope(sc *Scope) error
	Scopes(after string, limit int) ([]*Scope, error)
	// EraseScope removes up to limit rows of everything that is kept of a scope, and reports whether that was all. The scope's own
	// row stays without a name, deleted for good, so that its ID is never anybody else's.
	EraseScope(id string, limit int) (done bool, err error)
	// EmptyScope does the same, and leaves the scope's own row as it is, with its policies, its secrets and its usage. Its last step
	// raises the revision, and has ChangedGroups tell that all groups were deleted.
	EmptyScope(id string, limit int) (done bool, err error)

	// PutAudit appends to the audit record of a scope. Audits returns up to limit entries whose ID is greater than after, in order.
	// Of a scope that was erased nothing is written any more: PutAudit is ErrNotFound, which ends the transaction of the change.
	PutAudit(scope string, a *Audit) error
	Audits(scope, after string, limit int) ([]*Audit, error)

	// Record returns an enrollment or a group, or ErrNotFound.
	Record(scope string, kind Kind, id string) (*Record, error)
	// PutRecord writes a record over the one of that kind and ID, if there is one. ErrConflict: one of its certificates, or
	// its endorsement key, belongs to another record. ErrSameCA: a group's CA that it did not have before is another group's, by name and key.
	// Both are an OwnerError.
	PutRecord(scope string, r *Record) error
	// CheckRecord says what PutRecord would say, and writes nothing.
	CheckRecord(scope string, r *Record) error
	// PutFresh writes individual enrollments and what is known of their devices, many at once: PutRecord and PutDevice for each,
	// with nothing of them there before. ErrConflict: something is there, a registration of such an ID or a certificate that was
	// issued for such a key among it; the transaction is to be given up then, for a part may have been written.
	PutFresh(scope string, records []*Record, devices []*Device) error
	// DeleteRecord removes a record, or says ErrNotFound.
	DeleteRecord(scope string, kind Kind, id string) error
	// Records returns up to limit records whose ID is greater than after, in the order of IDs.
	Records(scope string, kind Kind, after string, limit int) ([]*Record, error)
	// SymmetricGroups returns every group that attests by symmetric key.
	SymmetricGroups(scope string) ([]*Record, error)
	// GroupsByCA returns the groups that have a signing certificate with that subject (SHA-256 of its DER), and of those the
	// ones with that key identifier; a nil one does not count. ErrTooMany: they are more than limit.
	GroupsByCA(scope string, subject [32]byte, keyID []byte, limit int) ([]*Record, error)
	// ChangedGroups returns the groups that were written after a revision, and the folded IDs of those that were deleted; "" among
	// these says that all were that had been there.
	ChangedGroups(scope string, after int64) (written []*Record, deleted []string, err error)
	// CertificateOwner returns whose certificate it is, by the SHA-256 of its DER, or ErrNotFound. The ID is folded.
	CertificateOwner(scope string, fingerprint [32]byte) (kind Kind, id string, err error)

	// Registration returns a device's registration, or ErrNotFound.
	Registration(scope, id string) (*Registration, error)
	// PutRegistration writes a registration whose Version is the one that was read (0: there was none), and raises it.
	// ErrConflict: somebody else wrote it meanwhile.
	PutRegistration(scope string, r *Registration) error
	// DeleteRegistration removes a registration and what the device is below ([Kin]), or says ErrNotFound.
	DeleteRegistration(scope, id string) error
	// Registrations returns up to limit registrations that came in by a group, IDs greater than after, in order: of all of the scope
	// where the group is "". The group need not be there any more.
	Registrations(scope, group, after string, limit int) ([]*Registration, error)

	// Challenge returns what a device's TPM was last challenged with, expired or not, or ErrNotFound. PutChallenge writes it over
	// the one before, and removes a few of the scope that have expired by now.
	Challenge(scope, id string) (*PendingChallenge, error)
	PutChallenge(scope string, c *PendingChallenge, now time.Time) error

	// Device returns what bundles said of a registration ID, or ErrNotFound; PutDevice writes it. ErrConflict: another device
	// of an order has its serial.
	Device(scope, id string) (*Device, error)
	PutDevice(scope string, d *Device) error
	// DeviceBySerial returns the device of an order that has the serial now, or ErrNotFound.
	DeviceBySerial(scope, serial string) (*Device, error)
	// Devices returns up to limit devices of an order whose ID is greater than after, in order: all, or the living ones that
	// have not registered.
	Devices(scope, order string, unseen bool, after string, limit int) ([]*Device, error)

	// Ending returns the end of an identity, or ErrNotFound; PutEnding writes one. Its ID, revision and key name it.
	Ending(scope, id string, revision int64, keyHash string) (*Ending, error)
	PutEnding(scope string, e *Ending) error
	// HasEndings reports whether there is an ending at all, KeyEnded whether there is one with that key.
	HasEndings(scope string) (bool, error)
	KeyEnded(scope, keyHash string) (bool, error)

	// Grant returns an order or a lease, or ErrNotFound; GrantDocument its document; PutGrant writes a new one; AddToGrant adds
	// to its tally.
	Grant(scope, id string) (*Grant, error)
	GrantDocument(scope, id string) ([]byte, error)
	PutGrant(scope string, g *Grant) error
	AddToGrant(scope, id string, add Tally) error
	// Orders returns up to limit orders whose ID is greater than after, in order; Leases those of an order.
	Orders(scope, after string, limit int) ([]*Grant, error)
	Leases(scope, order, after string, limit int) ([]*Grant, error)
	// PutRefusal keeps a refusal, unless the order has one of that ID, and reports whether it did. DeleteRefusal forgets it if it
	// is that station's, and reports whether it was. Refusals returns up to limit whose ID is greater than after, in order.
	PutRefusal(scope string, r *Refusal) (bool, error)
	DeleteRefusal(scope, order, id, station string) (bool, error)
	Refusals(scope, order, after string, limit int) ([]*Refusal, error)

	// Planned returns the newest certificate that was planned and not issued, for a registration ID and the hash of a key, or
	// ErrNotFound. PutIssued writes one, over the one of its serial number. KeyTaken reports whether a key is known of another
	// registration ID: a bundle named it for a living device, or a certificate was planned for it; KeyIssued the latter alone.
	Planned(scope, id, keyHash string) (*Issued, error)
	PutIssued(scope string, c *Issued) error
	KeyTaken(scope, keyHash, id string) (bool, error)
	KeyIssued(scope, keyHash, id string) (bool, error)

	// Policy returns a shared access policy of the service API, or ErrNotFound; PutPolicy writes one.
	// Policies returns all, by name; DeletePolicy removes one, or says ErrNotFound.
	Policy(scope, name string) (*Policy, error)
	PutPolicy(scope string, p *Policy) error
	Policies(scope string) ([]*Policy, error)
	DeletePolicy(scope, name string) error

	// CACertificate returns a certificate of the scope by its folded name, or ErrNotFound; CACertificates all, by name.
	// PutCACertificate writes one and DeleteCACertificate removes it, or says ErrNotFound; both raise the revision.
	CACertificate(scope, name string) (*CACertificate, error)
	CACertificates(scope string) ([]*CACertificate, error)
	PutCACertificate(scope string, c *CACertificate) error
	DeleteCACertificate(scope, name string) error
	// GroupsByReference returns the groups that refer to a certificate of the scope by that folded name.
	GroupsByReference(scope, name string) ([]*Record, error)

	// Secret returns what all replicas of the service share under a name, or ErrNotFound; PutSecret writes it. The store encrypts
	// it.
	Secret(scope, name string) ([]byte, error)
	PutSecret(scope, name string, value []byte) error

	// Count returns how many there are of something, and limit where they are more.
	Count(scope string, what Counted, limit int64) (int64, error)
	// AddUsage adds to what was counted before. Usage returns what was counted from the first day to the last, in order.
	AddUsage(scope string, u Usage) error
	Usage(scope, from, to string) ([]Usage, error)

	// Attempts returns what is kept of a device's attempts, newest first, and AttemptByTracking the newest with that tracking ID,
	// or ErrNotFound. PutAttempt writes a new one, DeleteAttempt forgets one, if it is there. The device is a folded ID.
	Attempts(scope, device string) ([]*Attempt, error)
	AttemptByTracking(scope, trackingID string) (*Attempt, error)
	PutAttempt(scope, device string, a *Attempt) error
	DeleteAttempt(scope, device, id string) error
	// TrimAttempts forgets up to limit of the oldest attempts of a class: all but the newest keep, and those whose ID is not
	// greater than before. It returns how many it forgot.
	TrimAttempts(scope string, class AttemptClass, keep int, before string, limit int) (int64, error)

	Outbox
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
	// Fresh says that this transaction found no individual enrollment of that ID: PutRecord need not look for what it takes the
	// place of.
	Fresh bool
	// Closed marks groups that admit only devices that a bundle named.
	Closed bool
	// Content is the SHA-256 of what an import brought, to know it again; nil for what the API wrote.
	Content []byte
	// Certificates index what the document holds; not filled in when a record is read.
	Certificates []Certificate
	// CAReferences are the folded names of the scope's certificates that a group refers to; not filled in when it is read.
	CAReferences []string
}

// A Certificate indexes one certificate of a record, or the endorsement key of its TPM.
type Certificate struct {
	Fingerprint [32]byte // SHA-256 of its DER; of an endorsement key, Key
	Subject     [32]byte // SHA-256 of its subject's DER; zeros for an endorsement key
	Key         string   // hex SHA-256 of its public key (SubjectPublicKeyInfo); kept of groups' alone
	KeyIDs      [][]byte // of a group's: what certificates below it may call its key, see attest.KeyIDs
}

// A Registration is what became of a device.
type Registration struct {
	ID      string                `json:"id"` // folded
	State   dps.RegistrationState `json:"state"`
	Group   string                `json:"group,omitempty"` // folded ID of the group that it came in by
	Version int64                 `json:"-"`
	// Admitted is what let the device in when it last registered; nil for a TPM, and where that was not kept yet.
	Admitted *Admission `json:"admitted,omitempty"`
	// Issued is the operational certificate that the device had last; nil for none.
	Issued *Issued `json:"issued,omitempty"`
	// Hub and DeviceID are those of the last assignment, whatever became of the registration since.
	Hub      string `json:"hub,omitempty"`
	DeviceID string `json:"deviceId,omitempty"`
	// Told is the hex SHA-256 of what that hub was told of the device, or another word where that is not certain; empty where it is told
	// nothing.
	Told string `json:"told,omitempty"`
	// Outbox says that there is a [Task] of the device's, or was a moment ago.
	Outbox bool `json:"outbox,omitempty"`
	// DeviceKey is the key that the device's TPM was handed with its assignment, for its hub; nil for others. The store encrypts it.
	DeviceKey []byte `json:"-"`
	// Operations are the last few, newest first. They live in the registration, so there is nothing to clean up.
	Operations []Operation `json:"operations"`
}

// assignment returns hub and device ID of the last assignment; there may be no registration.
func (r *Registration) assignment() (hub, deviceID string) {
	switch {
	case r == nil:
		return "", ""
	case r.Hub == "": // written before there was one
		return r.State.AssignedHub, r.State.DeviceID
	}
	return r.Hub, r.DeviceID
}

// copy returns a registration whose operations can be changed.
func (r *Registration) copy() *Registration {
	c := *r
	c.Operations = slices.Clone(r.Operations)
	return &c
}

// keepAssignment keeps the assignment that this is, or else the one before: a device that was disabled for a while, or whose
// registration failed, is still the hub's.
func (r *Registration) keepAssignment(before *Registration) {
	if r.Hub, r.DeviceID = before.assignment(); r.State.Status == dps.Assigned {
		r.Hub, r.DeviceID = r.State.AssignedHub, r.State.DeviceID
	}
}

// An Operation is one act of registering.
type Operation struct {
	ID      string    `json:"id"`
	Started time.Time `json:"started"`
	// Proof is the SHA-256 of what the device proved itself with: the leaf or the token.
	Proof []byte `json:"proof"`
	// CSR is the SHA-256 of the certificate signing request that came with it, nil for none.
	CSR []byte `json:"csr,omitempty"`
	// State is what the device is told, however often it asks.
	State dps.RegistrationState `json:"state"`
}

// A PendingChallenge is what a TPM was challenged with: its next requests need not say again which keys it has, and may meet
// another replica. The store encrypts it.
type PendingChallenge struct {
	ID      string    `json:"id"`     // folded
	EKHash  string    `json:"ekHash"` // attest.EKHash of the endorsement key
	Begun   time.Time `json:"begun"`
	Expires time.Time `json:"expires"`
	Wrapped
	// Previous is what the challenge before wrapped, nil for none.
	Previous *Wrapped `json:"previous,omitempty"`
}

// Wrapped is the key that one challenge wrapped, and whom for.
type Wrapped struct {
	Keys attest.TPMKeys `json:"keys"`
	Key  []byte         `json:"key"` // secret
}

// A Device is what bundles said of one registration ID.
type Device struct {
	ID     string // folded
	Group  string // folded; empty for an individual enrollment
	Serial string
	// KeyHash is the hex SHA-256 of the public key of its newest revision, where it has one.
	KeyHash string
	// Revision is the newest that a bundle named, -1 where it is only known that it ended.
	Revision int64
	// Ended says that all revisions below it have ended, and State how the newest of them did. So a device lives while its
	// Revision is not below Ended.
	Ended int64
	State bundle.State
	// Station is the key of the station that signed it, by its ID.
	Station string
	// Grant is the order or the lease that it came on; empty without.
	Grant string
	// Moved says that its serial has another registration ID by now.
	Moved bool
	// Seen says that the identity has registered. It is kept for devices of orders.
	Seen bool
	// Disabled says that the end of the identity disabled its enrollment, and not an operator.
	Disabled bool
}

// Lives reports whether the newest revision has not ended.
func (d *Device) Lives() bool { return d.Revision >= d.Ended }

// Order returns the ID of the order that the device came on.
func (d *Device) Order() string { return orderOf(d.Grant) }

// orderOf returns the order of a grant: a lease's ID begins with it.
func orderOf(grant string) string {
	order, _, _ := strings.Cut(grant, "/")
	return order
}

// An Ending is the end of an identity. Its key never registers again.
type Ending struct {
	ID       string // folded
	Revision int64
	KeyHash  string // hex; empty where there was no key, or it stays with the device
	State    bundle.State
	Reason   string
	At       time.Time
	Station  string
}

// A Grant is an order or a lease that bundles came on.
type Grant struct {
	ID       string `json:"id"`
	Order    string `json:"order"` // the same, or the order that a lease was cut from
	Station  string `json:"station"`
	Quantity int64  `json:"quantity"`
	// Digest is the hex SHA-256 of what was signed: a grant of one ID has one content.
	Digest   string `json:"digest"`
	Document []byte `json:"-"` // the envelope; not filled in when a grant is read
	Tally
}

// A Tally counts what became of a grant. That of an order holds those of its leases.
type Tally struct {
	Used     int64 `json:"used"`     // serials that count against its quantity
	Imported int64 `json:"imported"` // living identities
	Seen     int64 `json:"seen"`     // of those, how many have registered
	Refused  int64 `json:"refused"`  // entries that are named among the refusals
	Voided   int64 `json:"voided"`
	Reworked int64 `json:"reworked"`
	Scrapped int64 `json:"scrapped"`
	Returned int64 `json:"returned"`
}

func (t *Tally) add(o Tally) {
	t.Used += o.Used
	t.Imported += o.Imported
	t.Seen += o.Seen
	t.Refused += o.Refused
	t.Voided += o.Voided
	t.Reworked += o.Reworked
	t.Scrapped += o.Scrapped
	t.Returned += o.Returned
}

// A Refusal is an entry that an order did not allow.
type Refusal struct {
	Order   string    `json:"-"`
	ID      string    `json:"registrationId"` // folded
	Serial  string    `json:"serial"`
	Station string    `json:"station"`
	Reason  string    `json:"reason"`
	At      time.Time `json:"at"`
}

// A Policy is a shared access policy. The store encrypts its keys.
type Policy struct {
	Name      string
	Rights    string // "ServiceConfig, DeviceConnect, EnrollmentWrite"
	Primary   []byte
	Secondary []byte
}
