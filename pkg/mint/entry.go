package mint

import (
	"context"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"time"

	"github.com/touchmark/touchmark/pkg/bundle"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/evidence"
	"github.com/touchmark/touchmark/pkg/ledger"
)

// groupEntry tells the service of the issuing CA that vouches for the devices.
func (r *run) groupEntry() *bundle.Entry {
	e := r.base
	e.Attestation = &dps.Attestation{Type: dps.AttestationX509, X509: &dps.X509Attestation{
		SigningCertificates: &dps.X509Certificates{Primary: &dps.X509Certificate{
			Certificate: base64.StdEncoding.EncodeToString(r.Issuer.Certificate().Raw),
		}},
	}}
	return &bundle.Entry{Closed: r.Profile.Closed, Group: &dps.EnrollmentGroup{EnrollmentGroupID: r.Profile.Group, Enrollment: e}}
}

func (r *run) entry(u *unit) (*bundle.Entry, error) {
	var proof *evidence.Evidence
	if len(u.evidence) > 0 {
		if err := json.Unmarshal(u.evidence, &proof); err != nil {
			return nil, fmt.Errorf("serial %s: the evidence in the ledger: %w", u.row.Serial, err)
		}
	}
	if r.Profile.Enrollment == "group" {
		d := &bundle.GroupDevice{RegistrationID: u.row.RegistrationID, Group: r.Profile.Group}
		if r.Profile.Attestation == AttestationX509 {
			d.KeyHash = hex.EncodeToString(u.keyHash)
		}
		return &bundle.Entry{Serial: u.row.Serial, Revision: u.revision, Device: d, Evidence: proof}, nil
	}
	e := r.base
	if r.Profile.Attestation == AttestationX509 {
		e.Attestation = &dps.Attestation{Type: dps.AttestationX509, X509: &dps.X509Attestation{
			ClientCertificates: &dps.X509Certificates{Primary: &dps.X509Certificate{Certificate: base64.StdEncoding.EncodeToString(u.cert)}},
		}}
	} else if r.Profile.Attestation == AttestationTPM {
		e.Attestation = &dps.Attestation{Type: dps.AttestationTPM, TPM: &dps.TPMAttestation{
			EndorsementKey: base64.StdEncoding.EncodeToString(proof.TPM.EK), StorageRootKey: base64.StdEncoding.EncodeToString(u.srk),
		}}
	} else {
		e.Attestation = &dps.Attestation{Type: dps.AttestationSymmetricKey, SymmetricKey: &dps.SymmetricKeyAttestation{
			PrimaryKey: base64.StdEncoding.EncodeToString(u.symmetric),
		}}
	}
	in := &dps.IndividualEnrollment{RegistrationID: u.row.RegistrationID, Enrollment: e}
	if r.Profile.DeviceInformation != nil {
		in.OptionalDeviceInformation, _ = json.Marshal(r.Profile.DeviceInformation) // maps from TOML always marshal
	}
	return &bundle.Entry{Serial: u.row.Serial, Revision: u.revision, Individual: in, Evidence: proof}, nil
}

// PermitNote is the kind of the ledger's notes that keep the permit on which a unit was returned.
const PermitNote = "permit"

// ending tells the service of an identity that ended.
func (r *run) ending(ctx context.Context, u *ledger.RetiredUnit) (*bundle.Entry, error) {
	permit := ""
	if u.State == ledger.Returned {
		notes, err := r.Ledger.Notes(ctx, u.ID, PermitNote)
		if err != nil {
			return nil, err
		}
		if len(notes) > 0 {
			permit = string(notes[len(notes)-1].Data)
		}
	}
	return &bundle.Entry{Serial: u.Serial, Revision: u.Revision, Retired: &bundle.RetiredDevice{
		RegistrationID: u.RegistrationID, Group: r.Profile.Group, KeyHash: hex.EncodeToString(u.KeyHash), State: bundle.State(u.State.String()),
		Reason: u.Ending.Reason, At: u.Ended.UTC().Truncate(time.Second), Permit: permit,
	}}, nil
}
