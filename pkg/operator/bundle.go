package operator

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"hash"
	"iter"

	"github.com/touchmark/touchmark/pkg/bundle"
	"github.com/touchmark/touchmark/pkg/dps"
)

// BundleRows makes rows of a bundle's verified entries, for services that do not take bundles. Its enrollments go over as they are.
// Devices that come in by a group need nothing of their own, and are left out; so is what ended, which no call of the service API
// tells a service.
type BundleRows struct {
	r    *bundle.Reader
	hash hash.Hash
}

// NewBundleRows returns the rows of a bundle. Whoever opened it closes it.
func NewBundleRows(r *bundle.Reader) *BundleRows { return &BundleRows{r, sha256.New()} }

// Digest is described at [Source].
func (b *BundleRows) Digest() []byte { return b.hash.Sum(nil) }

// All is described at [Source]. Rows are numbered by entries.
func (b *BundleRows) All() iter.Seq2[Row, error] {
	return func(yield func(Row, error) bool) {
		n := 0
		for e, err := range b.r.Entries() {
			n++
			if err != nil {
				yield(Row{Line: n}, err)
				return
			}
			row := Row{Line: n}
			switch {
			case e.Individual != nil:
				row.Document, row.Err = NewDocument(e.Individual)
				if a := e.Individual.Attestation; a.Type == dps.AttestationSymmetricKey && a.SymmetricKey == nil {
					row.Err = fmt.Errorf("enrollment %s: %w", e.Individual.RegistrationID, bundle.ErrSealed)
				}
			case e.Group != nil:
				if row.Document, row.Err = NewDocument(e.Group); e.Closed {
					row.Note = "the group is closed: the service will admit every device that its CA or key vouches for, named in a bundle or not"
				}
			case e.Device != nil:
				row.ID, row.Note = e.Device.RegistrationID, "group "+e.Device.Group+" admits it"
			case e.Retired != nil:
				row.ID, row.Note = e.Retired.RegistrationID, "its identity ended ("+string(e.Retired.State)+"): see that no enrollment admits it"
			}
			if row.Err != nil {
				row.Document = nil
			}
			text, _ := json.Marshal(e) // it came from JSON
			b.hash.Write(text)
			if !yield(row, nil) {
				return
			}
		}
	}
}
