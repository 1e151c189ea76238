package mint

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/tpm/residency"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/evidence"
	"github.com/touchmark/touchmark/pkg/ledger"
)

// mintedTPM is what the ledger keeps of a unit that attests by its TPM.
type mintedTPM struct {
	SRK      []byte             `json:"srk"`
	Evidence *evidence.Evidence `json:"evidence"`
}

// makeTPM writes down whose TPM each unit has. Nothing is made that lasts: the endorsement key is the TPM's own. What shows
// that the TPM holds it, and is no list of numbers, is a throw-away key that the TPM certifies under the endorsement key.
func (r *run) makeTPM(ctx context.Context, units []unit) error {
	fresh := only(units, 0)
	for _, u := range fresh {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := r.identifyTPM(ctx, u); err != nil {
			return fmt.Errorf("serial %s: %w", u.row.Serial, err)
		}
	}
	if err := r.inTheWay(ctx, fresh); err != nil {
		return err
	}
	var failed error
	err := r.commit(ctx, fresh, ledger.Minted, func(u *unit, e *ledger.Event) {
		var doc mintedTPM
		if failed = json.Unmarshal(u.evidence, &doc.Evidence); failed == nil {
			doc.SRK = u.srk
			e.Data, failed = json.Marshal(doc)
		}
		e.RegistrationID, e.KeyHash, e.EKHash = u.row.RegistrationID, u.keyHash, u.ekHash
	})
	return errors.Join(err, failed)
}

func (r *run) identifyTPM(ctx context.Context, u *unit) (err error) {
	// The throw-away key's blob is in memory where there is such a place, and useless to anybody but this TPM.
	dir, err := os.MkdirTemp("", "touchmark-tpm-*")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	uri, err := hsm.ParseURI(expand(r.Profile.store, r.List.Columns, u.row.Fields))
	if err != nil {
		return err
	}
	uri.Keys = dir
	store, err := r.openPatiently(ctx, uri.String())
	if err != nil {
		return fmt.Errorf("opening the device's TPM: %w", err)
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	ek, srk, err := r.Endorsement(ctx, store)
	if err != nil {
		return err
	}
	if r.Profile.pattern == nil {
		u.row.RegistrationID = residency.RegistrationID(ek)
	}
	if err := dps.CheckRegistrationID(u.row.RegistrationID); err != nil {
		return err
	}
	const proof = "proof"
	if _, err := store.Generate(ctx, hsm.Spec{Name: proof, Algorithm: hsm.ECP256}); err != nil {
		return err
	}
	e, err := r.Attest(ctx, store, proof, u.row.RegistrationID)
	if err != nil {
		return err
	}
	if !bytes.Equal(e.TPM.EK, ek) {
		return errors.New("another TPM answered than a moment ago")
	}
	if u.ekHash, err = ekHash(ek); err != nil {
		return err
	}
	u.srk, u.keyHash = srk, u.ekHash
	return r.keepEvidence(u, e)
}

// decodeTPM reads what makeTPM wrote.
func (u *unit) decodeTPM(data []byte) error {
	var doc mintedTPM
	if err := json.Unmarshal(data, &doc); err != nil || doc.Evidence == nil {
		return fmt.Errorf("the TPM in the ledger: %w", errors.Join(err, ErrUnproven))
	}
	u.srk = doc.SRK
	var err error
	u.evidence, err = json.Marshal(doc.Evidence)
	return err
}
