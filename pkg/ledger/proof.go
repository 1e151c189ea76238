package ledger

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"database/sql"
	"encoding/asn1"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"golang.org/x/mod/sumdb/tlog"
)

// A Proof shows what a ledger says of one serial to somebody who has the station's public key and nothing else. It is one JSON
// object on one line, with just these members in this order:
//
//	format      "touchmark/ledger-proof/1"
//	serial      the serial that it is about
//	checkpoint  the ledger's signed checkpoint (C2SP tlog-checkpoint), with the lines of its witnesses
//	entries     the entries about the serial's units, by rising index, each with
//	  index     its index in the log
//	  entry     its octets, base64
//	  path      the hashes of its inclusion proof (RFC 6962, 2.1.1), base64, the leaf's sibling first
//
// What it cannot show is that there is nothing else: who hands on a proof may leave out entries, such as the one that a unit was
// scrapped by, and what came after the checkpoint is not in it. Only the ledger, verified whole, tells that.
type Proof struct {
	Format     string       `json:"format"`
	Serial     string       `json:"serial"`
	Checkpoint string       `json:"checkpoint"`
	Entries    []ProofEntry `json:"entries"`
}

// A ProofEntry is one entry of the log, with its way up to the root.
type ProofEntry struct {
	Index int64            `json:"index"`
	Entry []byte           `json:"entry"`
	Path  tlog.RecordProof `json:"path"`
}

const (
	proofFormat = "touchmark/ledger-proof/1"
	// Limits of a proof. A unit has some ten entries.
	maxProof        = 4 << 20
	maxProofEntries = 1000
)

// ErrProof says that a proof does not prove what it says.
var ErrProof = errors.New("proof does not hold")

// A Statement is what a proof proves: that these entries stand in the ledger under this checkpoint. It does not prove that there
// are no others; see [Proof].
type Statement struct {
	Checkpoint Checkpoint   `json:"checkpoint"`
	Serial     string       `json:"serial"`
	Units      []StatedUnit `json:"units"` // that had the serial, oldest first
	// Note is the signed checkpoint, for [VerifyCosignatures].
	Note string `json:"-"`
}

// A StatedUnit is what the entries say of one unit.
type StatedUnit struct {
	ID             int64  `json:"unit"`
	RegistrationID string `json:"registrationId"`
	Revision       int64  `json:"revision"`
	State          State  `json:"state"` // after the last entry
	KeyHash        string `json:"keyHash,omitempty"`
	EKHash         string `json:"endorsementKeyHash,omitempty"`
	Steps          []Step `json:"steps"`
	// Certificate is the unit's certificate (DER), if an entry has one.
	Certificate []byte `json:"certificate,omitempty"`
	// Ending is why the unit ended, if it did.
	Ending *Ending `json:"ending,omitempty"`
}

// A Step is a state that a unit entered.
type Step struct {
	State State     `json:"state"`
	At    time.Time `json:"at"`
	Entry int64     `json:"entry"` // index in the log
	// Bundle is the ID of the bundle that an export went into.
	Bundle string `json:"bundle,omitempty"`
}

// Encode returns the proof as a file holds it.
func (p *Proof) Encode() ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	err := enc.Encode(p)
	return b.Bytes(), err
}

// Prove makes the proof of everything that the ledger says of a serial: of the living unit that has it and of those which ended.
// It reads the log from where the first of them began; a writing Ledger waits with its commits until it is through. The error is
// ErrNotFound where no unit ever had the serial.
func (l *Ledger) Prove(ctx context.Context, serial string) (*Proof, error) {
	return l.prove(ctx, serial, nil)
}

// ProveAt is Prove under a checkpoint that the ledger had before, such as one that witnesses cosigned.
func (l *Ledger) ProveAt(ctx context.Context, serial string, signed []byte) (*Proof, error) {
	return l.prove(ctx, serial, signed)
}

func (l *Ledger) prove(ctx context.Context, serial string, signed []byte) (p *Proof, err error) {
	err = l.snapshot(ctx, func(s *snapshot) error {
		if signed != nil {
			if err := s.reopen(signed); err != nil {
				return err
			}
		}
		from, err := s.began(serial)
		if err != nil {
			return err
		}
		p = &Proof{Format: proofFormat, Serial: serial, Checkpoint: string(s.note)}
		told := story{serial: serial}
		err = s.entries(from, func(i int64, b []byte, f *leaf) error {
			if !told.concerns(f) {
				return nil
			}
			if len(p.Entries) == maxProofEntries {
				return fmt.Errorf("there are more than %d entries about it", maxProofEntries)
			}
			p.Entries = append(p.Entries, ProofEntry{Index: i, Entry: bytes.Clone(b)})
			if err := told.add(i, f); err != nil {
				return fmt.Errorf("%w: entry %d: %w", ErrDamaged, i, err)
			}
			return nil
		})
		if err != nil {
			return err
		}
		if len(p.Entries) == 0 {
			return ErrNotFound
		}
		for i := range p.Entries {
			e := &p.Entries[i]
			if e.Path, err = tlog.ProveRecord(s.Size, e.Index, s); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("proving serial %q: %w", serial, err)
	}
	// Nothing is handed out that does not hold; whose signature it is, its reader sees.
	if _, err := p.statement(); err != nil {
		return nil, fmt.Errorf("proving serial %q: %w: %w", serial, ErrDamaged, err)
	}
	return p, nil
}

// reopen takes the snapshot back to an older checkpoint of the ledger.
func (s *snapshot) reopen(signed []byte) error {
	c, root, err := unverified(signed)
	if err != nil {
		return err
	}
	if err := s.extends(c, root); err != nil {
		return err
	}
	s.note, s.Checkpoint, s.root = signed, c, root
	return nil
}

// began returns an index at or before the first entry about a serial.
func (s *snapshot) began(serial string) (int64, error) {
	var at int64
	err := s.tx.QueryRowContext(s.ctx, `SELECT min(at) FROM (SELECT at FROM units WHERE serial = $1 UNION ALL SELECT at FROM retired WHERE serial = $1) HAVING count(*) > 0`, serial).Scan(&at)
	if errors.Is(err, sql.ErrNoRows) {
		return 0, ErrNotFound
	}
	if err != nil {
		return 0, denied(err)
	}
	// All entries of a row were made at one time, and no row is older than the one before: search for the first that is as young.
	lo, hi := int64(0), s.Size
	for lo < hi {
		var first, count int64
		var head []byte
		if err := s.tx.QueryRowContext(s.ctx, `SELECT first, count, substr(leaves, 1, 32) FROM log WHERE first <= $1 ORDER BY first DESC LIMIT 1`, (lo+hi)/2).Scan(&first, &count, &head); err != nil {
			return 0, denied(err)
		}
		made, err := rowTime(head)
		if err != nil || first < lo || count < 1 {
			return 0, fmt.Errorf("%w: entries from %d", ErrDamaged, first)
		}
		if made < at {
			lo = first + count
		} else {
			hi = first
		}
	}
	return lo, nil
}

// VerifyProof checks a proof with nothing but the station's public key and returns what it proves. A proof has one form: one octet
// more or less and it is refused. The error is ErrStation for the proof of another station, else ErrProof.
func VerifyProof(b []byte, station crypto.PublicKey) (Statement, error) {
	if len(b) > maxProof {
		return Statement{}, fmt.Errorf("%w: it is longer than %d octets", ErrProof, maxProof)
	}
	var p Proof
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&p); err != nil {
		return Statement{}, fmt.Errorf("%w: %w", ErrProof, err)
	}
	if again, err := p.Encode(); err != nil || !bytes.Equal(again, b) {
		return Statement{}, fmt.Errorf("%w: it is not in the one form that a proof has", ErrProof)
	}
	_, err := OpenCheckpoint([]byte(p.Checkpoint), station)
	if errors.Is(err, ErrStation) {
		return Statement{}, err
	}
	var st Statement
	if err == nil {
		st, err = p.statement()
	}
	if err != nil {
		return Statement{}, fmt.Errorf("%w: %w", ErrProof, err)
	}
	return st, nil
}

// statement checks everything about a proof but whose checkpoint it is.
func (p *Proof) statement() (st Statement, err error) {
	if p.Format != proofFormat {
		return st, fmt.Errorf("its format is %.40q, not %q", p.Format, proofFormat)
	}
	if len(p.Entries) == 0 || len(p.Entries) > maxProofEntries {
		return st, fmt.Errorf("it has %d entries: want 1 to %d", len(p.Entries), maxProofEntries)
	}
	c, root, err := unverified([]byte(p.Checkpoint))
	if err != nil {
		return st, err
	}
	told, last := story{serial: p.Serial}, int64(-1)
	for i := range p.Entries {
		e := &p.Entries[i]
		if e.Index <= last || e.Path == nil {
			return st, fmt.Errorf("entry %d is out of order, or has no path", e.Index)
		}
		last = e.Index
		if err := tlog.CheckRecord(e.Path, c.Size, root, e.Index, tlog.RecordHash(e.Entry)); err != nil {
			return st, fmt.Errorf("entry %d is not under its checkpoint", e.Index)
		}
		f, err := parseLeaf(e.Entry)
		if err != nil {
			return st, fmt.Errorf("entry %d: %w", e.Index, err)
		}
		if !told.concerns(&f) {
			return st, fmt.Errorf("entry %d is not about serial %q", e.Index, p.Serial)
		}
		if err := told.add(e.Index, &f); err != nil {
			return st, fmt.Errorf("entry %d: %w", e.Index, err)
		}
	}
	return Statement{Checkpoint: c, Serial: p.Serial, Units: told.units, Note: p.Checkpoint}, nil
}

// A story is what entries say of the units of one serial.
type story struct {
	serial string
	units  []StatedUnit
	last   time.Time
}

// concerns reports whether an entry is about the serial: it begins a unit under it, or is about one that began.
func (s *story) concerns(f *leaf) bool {
	if (f.state == Begun || f.state == Minted) && f.job != 0 {
		return f.serial == s.serial
	}
	return (f.state.Living() || f.state.ends()) && s.unit(f) != nil
}

// unit returns the youngest unit that an entry is about, or nil.
func (s *story) unit(f *leaf) *StatedUnit {
	for i := len(s.units) - 1; i >= 0; i-- {
		if u := &s.units[i]; f.unit <= u.ID && u.ID-f.unit < f.count {
			return u
		}
	}
	return nil
}

// add takes in an entry that concerns the serial.
func (s *story) add(index int64, f *leaf) error {
	if f.at.Before(s.last) {
		return errors.New("it is older than the one before")
	}
	s.last = f.at
	u := s.unit(f)
	switch {
	case f.job != 0 && u == nil && f.count <= 1: // 0: it has the place of a reworked unit
		if n := len(s.units); n > 0 && s.units[n-1].State.Living() {
			return errors.New("the serial has a living unit")
		}
		s.units = append(s.units, StatedUnit{ID: f.unit, RegistrationID: f.registrationID, Revision: f.revision})
		u = &s.units[len(s.units)-1]
	case f.job != 0:
		return errors.New("its unit begins twice")
	case f.serial != "" && (f.serial != s.serial || f.registrationID != u.RegistrationID || f.count != 1):
		return errors.New("its unit has another name")
	case !u.State.Living() && (u.State != Scrapped || f.state != Returned), u.State.Living() && f.state == Returned:
		return fmt.Errorf("its unit is %s after it was %s", f.state, u.State)
	}
	step := Step{State: f.state, At: f.at, Entry: index}
	switch {
	case f.state.ends():
		u.Ending = new(Ending)
		if len(f.data) > 0 && json.Unmarshal(f.data, u.Ending) != nil {
			*u.Ending = Ending{Reason: strings.ToValidUTF8(string(f.data), "?")}
		}
	case f.state == Exported:
		step.Bundle = strings.ToValidUTF8(string(f.data), "?")
	default:
		if f.keyHash != nil {
			u.KeyHash = hex.EncodeToString(f.keyHash)
		}
		if f.ekHash != nil {
			u.EKHash = hex.EncodeToString(f.ekHash)
		}
		if f.state == Minted {
			u.Certificate = certificateIn(f.data)
		}
	}
	u.State, u.Steps = f.state, append(u.Steps, step)
	return nil
}

// certificateIn returns the certificate at the head of what the log keeps of a minted unit, or nil where there is none.
func certificateIn(data []byte) []byte {
	var der asn1.RawValue
	if _, err := asn1.Unmarshal(data, &der); err != nil {
		return nil
	}
	if _, err := x509.ParseCertificate(der.FullBytes); err != nil {
		return nil
	}
	return bytes.Clone(der.FullBytes)
}
