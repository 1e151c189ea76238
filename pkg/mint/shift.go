package mint

import (
	"context"
	"crypto"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/ledger"
)

// ErrElsewhere says that a unit was begun in another way than the shift makes units: with another profile, on another grant, or
// with its stamps going elsewhere.
var ErrElsewhere = errors.New("was begun in another way")

// A Unit is one device at a station, minted and stamped. It is in one goroutine's hands.
type Unit struct {
	r *run
	u *unit
}

// Row makes a row of the shift's list: columns come from fields by name, and "serial" is the serial.
func (r *Run) Row(serial string, fields map[string]string) (Row, error) {
	p, columns := r.r.Profile, r.r.List.Columns
	if err := CheckSerial(serial); err != nil {
		return Row{}, err
	}
	row := Row{Serial: serial, Fields: make([]string, len(columns))}
	for i, c := range columns {
		if c == "serial" {
			row.Fields[i] = serial
			continue
		}
		v, ok := fields[c]
		if !ok {
			return row, fmt.Errorf("serial %s: nothing says what its %s is, which profile %s needs", serial, c, p.Name)
		}
		row.Fields[i] = v
	}
	if p.pattern == nil {
		return row, nil // it comes from the TPM
	}
	row.RegistrationID = p.pattern.Expand(r.r.List.values(row.Fields))
	if err := dps.CheckRegistrationID(row.RegistrationID); err != nil {
		return row, fmt.Errorf("serial %s: %w", serial, err)
	}
	if p.Attestation == AttestationX509 && len(row.RegistrationID) > dps.MaxCommonName {
		return row, fmt.Errorf("serial %s: registration ID %s is longer than the %d characters of a certificate's common name", serial, row.RegistrationID, dps.MaxCommonName)
	}
	return row, nil
}

// ShiftList is the list of a shift at a station: the columns that a profile needs, and no rows.
func ShiftList(p *Profile) *List { return &List{Columns: p.columns()} }

// Unit makes one identity and stamps it, or goes on with the one that an earlier run began. A unit that is finished is a
// *ledger.DuplicateError.
func (r *Run) Unit(ctx context.Context, row Row) (*Unit, error) {
	existing := make(map[string]ledger.Unit, 1)
	have, err := r.r.Ledger.Find(ctx, row.Serial)
	switch {
	case err == nil:
		job, err := r.r.Ledger.Job(ctx, have.Job)
		if err != nil {
			return nil, err
		}
		if have.State >= ledger.Sealed {
			return nil, &ledger.DuplicateError{Field: "serial", Value: row.Serial, Unit: have, Job: job}
		}
		if mine := r.Job(); job.Profile != mine.Profile || job.Out != mine.Out || job.Grant != mine.Grant {
			return nil, fmt.Errorf("serial %s %w on %s: profile %s, order %q, stamps in %s", row.Serial, ErrElsewhere, have.At.Format("2006-01-02 15:04"),
				job.Profile, job.Grant, job.Out)
		}
		existing[row.Serial] = have
	case !errors.Is(err, ledger.ErrNotFound):
		return nil, err
	default:
		if err := r.sweep(ctx, &row); err != nil {
			return nil, err
		}
		if g := r.r.Grant; g != nil {
			if err := g.Admits(row.Serial); err != nil {
				return nil, err
			}
		}
	}
	units := []unit{{row: &row}}
	if len(existing) > 0 {
		if err := r.r.recover(ctx, units, existing); err != nil {
			return nil, err
		}
	}
	u := &Unit{r.r, &units[0]}
	if units[0].state >= ledger.Verified {
		return u, nil
	}
	if err := r.r.work(ctx, units); err != nil {
		return nil, err
	}
	if d := &units[0]; r.r.GroupKey != nil && d.symmetric == nil {
		// Taken up behind the step that derives it: what must not be shown has to be known.
		if d.symmetric, err = r.r.GroupKey.MAC(ctx, make([]byte, 0, sha256.Size), []byte(row.RegistrationID)); err != nil {
			return nil, err
		}
	}
	return u, nil
}

// ErrUnfinished says that a unit has not passed.
var ErrUnfinished = errors.New("is not finished")

// Finished returns the unit of a serial that has passed.
func (r *Run) Finished(ctx context.Context, serial string) (*Unit, error) {
	have, err := r.r.Ledger.Find(ctx, serial)
	if err != nil {
		return nil, err
	}
	if have.State < ledger.Sealed {
		return nil, fmt.Errorf("serial %s %w: it is %s", serial, ErrUnfinished, have.State)
	}
	u := &unit{row: &Row{Serial: have.Serial, RegistrationID: have.RegistrationID}, found: true, id: have.ID, state: have.State, revision: have.Revision, keyHash: have.KeyHash}
	if r.r.Profile.Attestation == AttestationX509 {
		if u.cert, _, err = splitCertificate(have.Data); err != nil {
			return nil, err
		}
	}
	return &Unit{r.r, u}, nil
}

// Admits says what keeps a serial from being made on the run's order.
func (r *Run) Admits(serial string) error {
	if r.r.Grant == nil {
		return nil
	}
	return r.r.Grant.Admits(serial)
}

// sweep takes away what an ended unit of the serial left in the stamp directory: its identity is revoked, and a run that was to
// do this may have died. What was never in the ledger is not touched.
func (r *Run) sweep(ctx context.Context, row *Row) error {
	if r.r.out == nil || row.RegistrationID == "" {
		return nil
	}
	if err := r.r.Ledger.Taken(ctx, "", row.RegistrationID); err != nil {
		return err
	}
	if !r.r.out.Published(row.RegistrationID) {
		return r.r.out.Discard(row.RegistrationID) // a key that was staged and not begun
	}
	for old, err := range r.r.Ledger.Retired(ctx, row.Serial) {
		if err != nil {
			return err
		}
		if dps.Fold(old.RegistrationID) == dps.Fold(row.RegistrationID) {
			return r.r.out.Remove(row.RegistrationID)
		}
	}
	return nil
}

// Serial returns the device's serial.
func (u *Unit) Serial() string { return u.u.row.Serial }

// RegistrationID returns the device's registration ID.
func (u *Unit) RegistrationID() string { return u.u.row.RegistrationID }

// Revision returns which identity of the serial this is, from 0.
func (u *Unit) Revision() int64 { return u.u.revision }

// State returns how far the unit has come.
func (u *Unit) State() ledger.State { return u.u.state }

// Found reports whether an earlier run began the unit.
func (u *Unit) Found() bool { return u.u.found }

// ID returns the unit's ID in the ledger.
func (u *Unit) ID() int64 { return u.u.id }

// KeyHash returns the hash that names the device's key.
func (u *Unit) KeyHash() []byte { return slices.Clone(u.u.keyHash) }

// Dir returns the directory of the unit's stamp; empty where there is none.
func (u *Unit) Dir() string {
	if u.r.out == nil {
		return ""
	}
	return u.r.out.Dir(u.u.row.RegistrationID)
}

// Public returns the device's public key, where it has a certificate.
func (u *Unit) Public() (crypto.PublicKey, error) {
	return publicKey(u.u.cert)
}

// PublicKey returns the public key of a unit in the ledger, its data filled in; the error is hsm.ErrUnsupported for one without a
// certificate.
func PublicKey(u ledger.Unit) (crypto.PublicKey, error) {
	der, _, err := splitCertificate(u.Data)
	if err != nil {
		der = nil
	}
	return publicKey(der)
}

func publicKey(der []byte) (crypto.PublicKey, error) {
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("a device without a certificate: %w", hsm.ErrUnsupported)
	}
	return cert.PublicKey, nil
}

// MAC returns the HMAC-SHA256 of a message under the device's symmetric key, where it has one that the station can reach.
func (u *Unit) MAC(ctx context.Context, msg []byte) ([]byte, error) {
	key := u.u.symmetric
	if u.r.GroupKey != nil && key == nil {
		var err error
		if key, err = u.r.GroupKey.MAC(ctx, make([]byte, 0, sha256.Size), []byte(u.u.row.RegistrationID)); err != nil {
			return nil, err
		}
		defer clear(key)
	}
	if key == nil {
		return nil, fmt.Errorf("attestation %s: %w", u.r.Profile.Attestation, hsm.ErrUnsupported)
	}
	mac := hmac.New(sha256.New, key)
	mac.Write(msg)
	return mac.Sum(nil), nil
}

// Secrets returns what of the unit's stamp must not be shown: whoever logs the output of a program that saw the stamp leaves
// these out. They are good until Forget.
func (u *Unit) Secrets() [][]byte {
	var all [][]byte
	if u.u.keyPEM != nil {
		all = append(all, u.u.keyPEM)
		if block, _ := pem.Decode(u.u.keyPEM); block != nil {
			all = append(all, block.Bytes)
		}
	}
	for i := range u.u.files {
		if f := &u.u.files[i]; f.Secret && len(f.Data) <= maxShown {
			all = append(all, f.Data)
		}
	}
	if u.u.symmetric != nil {
		all = append(all, u.u.symmetric, []byte(base64.StdEncoding.EncodeToString(u.u.symmetric)))
	}
	return all
}

// maxShown bounds which files of a stamp a program could print whole: those of keys, not images.
const maxShown = 8 << 10

// Verified writes down that the device's storage was read back, and that it answered a challenge where it can.
func (u *Unit) Verified(ctx context.Context) error {
	if u.u.state >= ledger.Verified {
		return nil
	}
	return u.r.commit(ctx, []*unit{u.u}, ledger.Verified, nil)
}

// Sealed writes down that the unit is finished: PASS may be shown once this returns.
func (u *Unit) Sealed(ctx context.Context) error {
	if u.u.state >= ledger.Sealed {
		return nil
	}
	return u.r.commit(ctx, []*unit{u.u}, ledger.Sealed, nil)
}

// Forget takes the device's secrets out of memory, and with disk set its stamp off the station's disk too: once the device has
// it, it is nowhere else. A key of the device's own that its bundle carries stays until one does; see [Run.Tidy].
func (u *Unit) Forget(disk bool) error {
	u.u.wipe()
	if !disk || u.r.out == nil || u.r.Profile.HasSecrets() {
		return nil
	}
	return u.r.out.Remove(u.u.row.RegistrationID)
}

// Tidy takes away the stamps of units that are finished, where the shift that was to [Unit.Forget] them died, or a bundle has
// their keys now. What the ledger does not know is not touched.
func (r *Run) Tidy(ctx context.Context) error {
	if r.r.out == nil {
		return nil
	}
	done := ledger.Sealed
	if r.r.Profile.HasSecrets() {
		done = ledger.Exported
	}
	entries, err := os.ReadDir(r.r.Out)
	if err != nil {
		return err
	}
	for _, e := range entries {
		u, err := r.r.Ledger.FindDevice(ctx, e.Name())
		if errors.Is(err, ledger.ErrNotFound) {
			continue
		}
		if err != nil {
			return err
		}
		if u.RegistrationID == e.Name() && u.State >= done {
			if err := r.r.out.Remove(e.Name()); err != nil {
				return err
			}
		}
	}
	return nil
}

// Retire ends a living unit: voided, scrapped or reworked. The ending is completed with the certificate that it revokes, and comes
// back as it was written down.
func Retire(ctx context.Context, l *ledger.Ledger, serial string, state ledger.State, why ledger.Ending) (ledger.Unit, ledger.Ending, error) {
	u, err := l.Find(ctx, serial)
	if err != nil {
		return u, why, err
	}
	if u.State >= ledger.Minted {
		if der, _, err := splitCertificate(u.Data); err == nil {
			if cert, err := x509.ParseCertificate(der); err == nil {
				why.Certificate = cert.SerialNumber.Text(16)
			}
		}
	}
	return u, why, l.Commit(ctx, []ledger.Event{{State: state, Unit: u.ID, Data: why.Encode()}})
}

// DeleteTokenKey destroys the key of a unit that ended, where it is in the line's token. One that is not there is no error.
func DeleteTokenKey(ctx context.Context, store hsm.Store, u ledger.Unit) error {
	err := store.Delete(ctx, tokenKeyName(u.RegistrationID, u.Revision))
	if errors.Is(err, hsm.ErrNotFound) {
		return nil
	}
	return err
}
