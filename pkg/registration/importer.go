package registration

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"iter"

	"golang.org/x/sync/errgroup"

	"github.com/touchmark/touchmark/pkg/bundle"
	"github.com/touchmark/touchmark/pkg/dps"
)

// An ImportResult counts what an import did, or would do.
type ImportResult struct {
	New         int `json:"new"`
	Unchanged   int `json:"unchanged"`
	Conflicting int `json:"conflicting"`
	// Conflicts names the first of them.
	Conflicts []ImportConflict `json:"conflicts,omitempty"`
}

// An ImportConflict is an entry that was left out.
type ImportConflict struct {
	ID     string `json:"id"`
	Reason string `json:"reason"`
}

const (
	maxConflicts = 100
	chunkSize    = 500
)

// Import takes the entries of a bundle. What the service knows with the same content is unchanged; what it knows with
// another content is a conflict and stays as it is. So an import can be repeated, and one that was cut off is taken up by
// repeating it.
//
// Entries go in by transactions of a few hundred, so that devices register meanwhile: a bundle of a million entries in one
// transaction would hold them up for the time that it takes.
//
// Reading and preparing runs ahead of writing by a transaction, in the order of the bundle.
func (s *Service) Import(ctx context.Context, entries iter.Seq2[bundle.Entry, error], dryRun bool) (ImportResult, error) {
	var total ImportResult
	eg, ctx := errgroup.WithContext(ctx)
	chunks := make(chan []prepared)
	eg.Go(func() error {
		defer close(chunks)
		send := func(chunk []prepared) error {
			select {
			case chunks <- chunk:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		var chunk []prepared
		for e, err := range entries {
			if err != nil {
				return err
			}
			p, err := s.prepare(&e)
			if err != nil {
				return err
			}
			if chunk = append(chunk, p); len(chunk) == chunkSize {
				if err := send(chunk); err != nil {
					return err
				}
				chunk = nil
			}
		}
		if len(chunk) == 0 {
			return nil
		}
		return send(chunk)
	})
	eg.Go(func() error {
		seen := make(map[string]bool) // groups of a dry run, which are not in the store for the devices behind them
		for chunk := range chunks {
			res, err := s.importChunk(ctx, chunk, dryRun, seen)
			if err != nil {
				return err
			}
			total.New += res.New
			total.Unchanged += res.Unchanged
			total.Conflicting += res.Conflicting
			total.Conflicts = append(total.Conflicts, res.Conflicts[:min(len(res.Conflicts), maxConflicts-len(total.Conflicts))]...)
		}
		return nil
	})
	err := eg.Wait()
	return total, err
}

// importChunk takes some entries in one transaction.
func (s *Service) importChunk(ctx context.Context, chunk []prepared, dryRun bool, seen map[string]bool) (res ImportResult, err error) {
	run := s.cfg.Store.Update
	if dryRun {
		run = s.cfg.Store.View
	}
	err = run(ctx, func(tx Tx) error {
		res = ImportResult{} // the transaction may be run again
		for i := range chunk {
			if err := s.importOne(tx, &chunk[i], dryRun, seen, &res); err != nil {
				return err
			}
		}
		return nil
	})
	return res, err
}

// prepared is an entry ready for the store.
type prepared struct {
	id      string
	problem string // why it cannot be taken
	record  *Record
	device  *Device
}

// prepare does everything that needs no transaction.
func (s *Service) prepare(e *bundle.Entry) (prepared, error) {
	if err := e.Check(); err != nil {
		return prepared{}, err
	}
	if e.Device != nil {
		return prepared{id: e.Device.RegistrationID, device: &Device{
			ID: dps.Fold(e.Device.RegistrationID), Group: dps.Fold(e.Device.Group), Serial: e.Serial, KeyHash: e.Device.KeyHash,
		}}, nil
	}
	d := &document{kind: Individual, individual: e.Individual}
	if e.Group != nil {
		d = &document{kind: Group, group: e.Group}
	}
	p := prepared{id: *d.id()}
	if err := s.check(d); err != nil {
		p.problem = dps.AsError(err).Message
		return p, nil
	}
	base := d.base()
	base.ETag, base.CreatedDateTimeUTC, base.LastUpdatedDateTimeUTC = "", nil, nil
	if d.individual != nil {
		d.individual.RegistrationState = nil
	}
	content, err := json.Marshal(d.value())
	if err != nil {
		return p, err
	}
	sum := sha256.Sum256(content)
	r := &Record{Kind: d.kind, ID: *d.id(), Content: sum[:]}
	switch base.Attestation.Type {
	case dps.AttestationSymmetricKey:
		keys := base.Attestation.SymmetricKey
		if keys == nil || keys.PrimaryKey == "" {
			p.problem = "its key is sealed and was not opened"
			return p, nil
		}
		full, err := completeKeys(keys, nil)
		if err != nil {
			p.problem = dps.AsError(err).Message
			return p, nil
		}
		if r.Keys, err = json.Marshal(full); err != nil {
			return p, err
		}
		base.Attestation.SymmetricKey, r.Symmetric = nil, d.kind == Group
	case dps.AttestationX509:
		certs, index, err := completeCertificates(d.x509(), nil)
		if err != nil {
			p.problem = dps.AsError(err).Message
			return p, nil
		}
		r.Certificates = index
		if d.kind == Individual {
			base.Attestation.X509.ClientCertificates = certs
		} else {
			base.Attestation.X509.SigningCertificates = certs
		}
	}
	now := dps.Time{Time: s.cfg.Now()}
	base.CreatedDateTimeUTC, base.LastUpdatedDateTimeUTC, base.ETag = &now, &now, newETag()
	if r.Document, err = json.Marshal(d.value()); err != nil {
		return p, err
	}
	p.record = r
	return p, nil
}

func (s *Service) importOne(tx Tx, p *prepared, dryRun bool, seen map[string]bool, res *ImportResult) error {
	conflict := func(reason string) error {
		res.Conflicting++
		if len(res.Conflicts) < maxConflicts {
			res.Conflicts = append(res.Conflicts, ImportConflict{ID: p.id, Reason: reason})
		}
		return nil
	}
	switch {
	case p.problem != "":
		return conflict(p.problem)
	case p.device != nil:
		return s.importDevice(tx, p.device, dryRun, seen, res, conflict)
	}
	old, err := tx.Record(s.scope, p.record.Kind, dps.Fold(p.record.ID))
	switch {
	case errors.Is(err, ErrNotFound):
	case err != nil:
		return err
	case bytes.Equal(old.Content, p.record.Content):
		res.Unchanged++
		return nil
	case old.Content == nil:
		return conflict(fmt.Sprintf("the service has an %s enrollment of this name that no bundle brought", p.record.Kind))
	default:
		return conflict(fmt.Sprintf("the service has an %s enrollment of this name with another content", p.record.Kind))
	}
	if p.record.Kind == Individual {
		if d, err := tx.Device(s.scope, dps.Fold(p.record.ID)); err == nil {
			return conflict(fmt.Sprintf("the service knows it as a device of group %s", d.Group))
		} else if !errors.Is(err, ErrNotFound) {
			return err
		}
	}
	if dryRun {
		if p.record.Kind == Group {
			seen[dps.Fold(p.record.ID)] = true
		}
		res.New++
		return nil
	}
	err = tx.PutRecord(s.scope, p.record)
	if errors.Is(err, ErrConflict) {
		return conflict("its certificate belongs to another enrollment")
	}
	if err == nil {
		res.New++
	}
	return err
}

func (s *Service) importDevice(tx Tx, d *Device, dryRun bool, seen map[string]bool, res *ImportResult, conflict func(string) error) error {
	old, err := tx.Device(s.scope, d.ID)
	switch {
	case err == nil && *old == *d:
		res.Unchanged++
		return nil
	case err == nil:
		return conflict(fmt.Sprintf("the service knows it as serial %s of group %s", old.Serial, old.Group))
	case !errors.Is(err, ErrNotFound):
		return err
	}
	if _, err := tx.Record(s.scope, Individual, d.ID); err == nil {
		return conflict("the service has an individual enrollment of this name")
	} else if !errors.Is(err, ErrNotFound) {
		return err
	}
	if _, err := tx.Record(s.scope, Group, d.Group); errors.Is(err, ErrNotFound) && !seen[d.Group] {
		return conflict(fmt.Sprintf("the service has no group %s", d.Group))
	} else if err != nil && !errors.Is(err, ErrNotFound) {
		return err
	}
	res.New++
	if dryRun {
		return nil
	}
	return tx.PutDevice(s.scope, d)
}
