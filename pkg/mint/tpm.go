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
	"github.com/touchmark/touchmark/pkg/ledger"
)

// mintedTPM is what the ledger keeps of a unit that attests by its TPM.
type mintedTPM struct {
	SRK      []byte          `json:"srk"`
	Evidence json.RawMessage `json:"evidence"`
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
	data := make(map[*unit][]byte, len(fresh))
	for _, u := range fresh {
		var err error
		if data[u], err = json.Marshal(mintedTPM{SRK: u.srk, Evidence: u.evidence}); err != nil {
			return err
		}
	}
	return r.commit(ctx, fresh, ledger.Minted, func(u *unit, e *ledger.Event) {
		e.KeyHash, e.EKHash, e.Data = u.keyHash, u.ekHash, data[u]
	})
}

func (r *run) identifyTPM(ctx context.Context, u *unit) (err error) {
	// The throw-away key's blob is in memory where there is such a place, and useless to anybody but this TPM.
	dir, err := os.MkdirTemp("", "touchmark-tpm-*")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	uri, err := hsm.ParseURI(r.Profile.store.ExpandURI(r.List.values(u.row.Fields)))
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
	if err := json.Unmarshal(data, &doc); err != nil || len(doc.Evidence) == 0 {
		return fmt.Errorf("the TPM in the ledger: %w", errors.Join(err, ErrUnproven))
	}
	u.srk, u.evidence = doc.SRK, doc.Evidence
	return nil
}
