package ledger

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"iter"
	"time"

	"golang.org/x/mod/sumdb/tlog"
)

// An Entry is one entry of the log, decoded. The names of its members in JSON do not change; those that do not belong to its kind
// are left out.
type Entry struct {
	Index int64     `json:"entry"`
	Kind  State     `json:"kind"` // a unit's state, or "job", "grant", "lease", "lease-return", "grant-close", "anchor", "note"
	At    time.Time `json:"at"`
	Hash  tlog.Hash `json:"hash"` // RFC 6962 leaf hash, base64

	// Of units: the first that the entry is about, and how many with the IDs after it.
	Unit           int64  `json:"unit,omitempty"`
	Count          int64  `json:"count,omitempty"`
	Job            int64  `json:"job,omitempty"` // of an entry that begins a unit, and of the job itself
	Serial         string `json:"serial,omitempty"`
	RegistrationID string `json:"registrationId,omitempty"`
	Revision       int64  `json:"revision,omitempty"`
	KeyHash        string `json:"keyHash,omitempty"`
	EKHash         string `json:"endorsementKeyHash,omitempty"`
	Certificate    []byte `json:"certificate,omitempty"` // DER
	Bundle         string `json:"bundle,omitempty"`
	// Ending is why a unit ended.
	Ending *Ending `json:"ending,omitempty"`

	// Of jobs, grants and leases.
	Profile  string     `json:"profile,omitempty"`
	Operator string     `json:"operator,omitempty"`
	Out      string     `json:"out,omitempty"`
	Digest   string     `json:"digest,omitempty"` // of what makes the job; SHA-256 of the document of a grant, a lease or its return
	Grant    string     `json:"grant,omitempty"`
	Lease    string     `json:"lease,omitempty"`
	Quantity int64      `json:"quantity,omitempty"`
	Used     *int64     `json:"used,omitempty"` // of a lease that is returned
	Opens    *time.Time `json:"opens,omitempty"`
	Ends     *time.Time `json:"ends,omitempty"`

	// Counter is where an anchor's counter stands after the step.
	Counter uint64 `json:"counter,omitempty"`
	// Note is a note's kind.
	Note string `json:"note,omitempty"`
	// Data is what the entry holds beyond the members above.
	Data []byte `json:"data,omitempty"`
}

// Entries yields every entry of the log under its newest checkpoint, in order. It holds one connection while it runs: a writing
// Ledger waits with its commits until it is through. An error ends it; it wraps ErrDamaged for an entry that does not parse.
func (l *Ledger) Entries(ctx context.Context) iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) {
		errStop := errors.New("")
		err := l.snapshot(ctx, func(s *snapshot) error {
			return s.entries(0, func(i int64, b []byte, f *leaf) error {
				if !yield(decodeEntry(i, b, f), nil) {
					return errStop
				}
				return nil
			})
		})
		if err != nil && !errors.Is(err, errStop) {
			yield(Entry{}, err)
		}
	}
}

func decodeEntry(i int64, b []byte, f *leaf) Entry {
	e := Entry{Index: i, Kind: f.state, At: f.at, Hash: tlog.RecordHash(b), Job: f.job, Unit: f.unit}
	rest := f.data
	number := func() int64 {
		v, n := binary.Varint(rest)
		rest = rest[max(n, 0):]
		return v
	}
	clock := func() *time.Time {
		t := time.UnixMilli(number()).UTC()
		return &t
	}
	switch f.state {
	case jobBegun:
		e.Profile, e.Grant, e.Digest = f.serial, f.registrationID, hex.EncodeToString(f.keyHash)
		if n, k := binary.Uvarint(rest); k > 0 && n <= uint64(len(rest)-k) {
			e.Operator, e.Out, rest = string(rest[k:k+int(n)]), string(rest[k+int(n):]), nil
		}
	case grantTaken:
		e.Grant, e.Quantity, e.Opens, e.Ends = f.serial, number(), clock(), clock()
		e.Digest, rest = hex.EncodeToString(rest), nil
	case leaseCut:
		e.Lease, e.Grant, e.Digest, e.Quantity = f.serial, f.registrationID, hex.EncodeToString(f.keyHash), number()
	case leaseReturned:
		used := number()
		e.Lease, e.Grant, e.Digest, e.Used = f.serial, f.registrationID, hex.EncodeToString(f.keyHash), &used
	case grantClosed:
		e.Grant = f.serial
	case anchored:
		v, n := binary.Uvarint(rest)
		e.Counter, rest = v, rest[max(n, 0):]
	case noted:
		e.Note = f.registrationID
	default:
		e.Count, e.Serial, e.RegistrationID, e.Revision = f.count, f.serial, f.registrationID, f.revision
		e.KeyHash, e.EKHash = hex.EncodeToString(f.keyHash), hex.EncodeToString(f.ekHash)
		switch {
		case f.state == Minted:
			e.Certificate = certificateIn(rest)
			rest = rest[len(e.Certificate):]
		case f.state == Exported:
			e.Bundle, rest = string(rest), nil
		case f.state.ends() && len(rest) > 0:
			e.Ending = new(Ending)
			if json.Unmarshal(rest, e.Ending) == nil {
				rest = nil
			} else {
				e.Ending = nil
			}
		}
	}
	e.Data = append([]byte(nil), rest...)
	return e
}
