package ledger

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"
)

// A State is how far a unit has come. The numbers are part of the ledger's format.
type State uint8

// The states of a unit, in the order of its journey; see the package comment for what each promises.
const (
	Begun    State = 1 // the identity is decided: serial, registration ID, where its key is, what will be signed
	Minted   State = 2 // the identity exists: signed, or derived
	Stamped  State = 3 // the device's storage was written
	Verified State = 4 // and read back
	Sealed   State = 5 // the unit is finished: it passed, and its label is on it
	Exported State = 6 // the identity left the factory in a bundle
)

// What ends a living unit.
const (
	Voided   State = 16 // the identity was given up before it left; its serial is free again, its key never is
	Scrapped State = 17 // the unit was destroyed; its serial is not free
	Reworked State = 18 // the unit was rebuilt: its serial is free for the next revision
	Returned State = 19 // a scrapped unit was shown to be destroyed: its order may make another, and its serial is free
)

// The records of the log that are no states of units.
const (
	jobBegun      State = 32
	grantTaken    State = 33
	leaseCut      State = 34
	leaseReturned State = 35
	grantClosed   State = 36
	anchored      State = 37
	noted         State = 38
)

var stateNames = map[State]string{
	Begun: "begun", Minted: "minted", Stamped: "stamped", Verified: "verified", Sealed: "sealed", Exported: "exported",
	Voided: "voided", Scrapped: "scrapped", Reworked: "reworked", Returned: "returned",
	jobBegun: "job", grantTaken: "grant", leaseCut: "lease", leaseReturned: "lease-return", grantClosed: "grant-close", anchored: "anchor", noted: "note",
}

// Living reports whether a unit in that state is one of the living.
func (s State) Living() bool { return s >= Begun && s <= Exported }

func (s State) ends() bool { return s >= Voided && s <= Returned }

// String returns the state's name as it stands in tables and JSON.
func (s State) String() string {
	if n, ok := stateNames[s]; ok {
		return n
	}
	return fmt.Sprintf("state %d", uint8(s))
}

// MarshalText implements encoding.TextMarshaler.
func (s State) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// An Event moves one unit to a state. A slice of them is one durable step: all or none.
type Event struct {
	// State is what the unit enters.
	State State
	// Unit is the unit's ID in this ledger; 0 makes a new unit, and Commit fills in the ID that it got.
	Unit int64
	// Revision of a new unit; Commit fills it in: 0, or one more than that of the unit which had the serial before.
	Revision int64
	// Job is the job that the unit belongs to; for new units.
	Job int64
	// Serial and RegistrationID name a new unit; they are unique among the living.
	Serial         string
	RegistrationID string
	// KeyHash is the SHA-256 of the public key (SubjectPublicKeyInfo), or 32 octets that name a symmetric key without
	// telling it. Nil while there is none yet. Unique for all time, voided units included.
	KeyHash []byte
	// EKHash is the SHA-256 of the endorsement key (SubjectPublicKeyInfo) of a device with a TPM; nil for others. Unique among
	// the living.
	EKHash []byte
	// Data is what the step must remember: a certificate plan, a certificate, an ending, a bundle's ID. Never a secret.
	Data []byte
}

// Limits of a leaf. A leaf past them is refused when written and taken for damage when read.
const (
	maxText = 255
	maxData = 1 << 16
	maxLeaf = 1<<16 + 1024
)

const leafVersion = 2

// A leaf is the canonical form of one entry of the log. Units that take the same step in one commit and whose IDs follow
// one another share a leaf when the step has nothing of its own to remember: first unit and count.
type leaf struct {
	state          State
	at             time.Time // milliseconds
	job            int64
	unit           int64
	count          int64
	revision       int64
	serial         string
	registrationID string
	keyHash        []byte
	ekHash         []byte
	data           []byte
}

func (f *leaf) append(b []byte) []byte {
	b = append(b, leafVersion, byte(f.state))
	b = binary.AppendVarint(b, f.at.UnixMilli())
	b = binary.AppendUvarint(b, uint64(f.job))
	b = binary.AppendUvarint(b, uint64(f.unit))
	b = binary.AppendUvarint(b, uint64(f.count))
	b = binary.AppendUvarint(b, uint64(f.revision))
	b = appendBytes(b, f.serial)
	b = appendBytes(b, f.registrationID)
	b = appendBytes(b, f.keyHash)
	b = appendBytes(b, f.ekHash)
	return appendBytes(b, f.data)
}

func appendBytes[T string | []byte](b []byte, s T) []byte {
	b = binary.AppendUvarint(b, uint64(len(s)))
	return append(b, s...)
}

var errLeaf = errors.New("damaged entry")

// parseLeaf reads what append wrote and nothing else: unknown versions, trailing octets and non-minimal lengths are
// refused, so that one entry has one form.
func parseLeaf(b []byte) (leaf, error) {
	var f leaf
	if len(b) < 2 || len(b) > maxLeaf || b[0] != leafVersion {
		return f, errLeaf
	}
	f.state = State(b[1])
	if _, ok := stateNames[f.state]; !ok {
		return f, errLeaf
	}
	b = b[2:]
	// A last octet of nothing makes the same number longer.
	padded := func(n int) bool { return n > 1 && b[n-1] == 0 }
	ms, n := binary.Varint(b)
	if n <= 0 || padded(n) {
		return f, errLeaf
	}
	f.at, b = time.UnixMilli(ms).UTC(), b[n:]
	for _, dst := range []*int64{&f.job, &f.unit, &f.count, &f.revision} {
		v, n := binary.Uvarint(b)
		if n <= 0 || v > 1<<53 || padded(n) {
			return f, errLeaf
		}
		*dst, b = int64(v), b[n:]
	}
	next := func(limit uint64) ([]byte, bool) {
		v, n := binary.Uvarint(b)
		if n <= 0 || v > limit || v > uint64(len(b)-n) || padded(n) {
			return nil, false
		}
		s := b[n : n+int(v)]
		b = b[n+int(v):]
		return s, true
	}
	serial, ok1 := next(maxText)
	rid, ok2 := next(maxText)
	hash, ok3 := next(32)
	ek, ok4 := next(32)
	data, ok5 := next(maxData)
	if !ok1 || !ok2 || !ok3 || !ok4 || !ok5 || len(b) != 0 || len(hash) != 0 && len(hash) != 32 || len(ek) != 0 && len(ek) != 32 {
		return f, errLeaf
	}
	f.serial, f.registrationID = string(serial), string(rid)
	if len(hash) > 0 {
		f.keyHash = hash
	}
	if len(ek) > 0 {
		f.ekHash = ek
	}
	f.data = data
	return f, nil
}
