package stamp

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"

	"github.com/touchmark/touchmark/hsm"
)

// An NV is a TPM's non-volatile memory (TPM 2.0 Part 1, 37): numbered indices, each of a size, that can be locked against
// writing.
type NV interface {
	DefineNV(ctx context.Context, index uint32, size int) error
	WriteNV(ctx context.Context, index uint32, data []byte) error
	LockNV(ctx context.Context, index uint32) error
	ReadNV(ctx context.Context, index uint32) ([]byte, error)
}

// maxNV bounds a document in NV, in octets: every TPM writes that many in one command, so a document is there whole or not
// at all.
const maxNV = 512

// ToNV puts a document into an NV index of a TPM, which is made as large as the document, locked against writing until it is
// deleted, and read back. The layout is the document itself, from the first octet to the last. An index that an earlier try
// left with the same document in it, or with nothing, is finished; one that holds something else is ErrExists, and nothing is
// overwritten.
func ToNV(ctx context.Context, tpm NV, index uint32, document []byte) error {
	if len(document) == 0 || len(document) > maxNV {
		return fmt.Errorf("stamping into NV index 0x%08x: the document has %d octets, want 1 to %d", index, len(document), maxNV)
	}
	err := tpm.DefineNV(ctx, index, len(document))
	switch {
	case errors.Is(err, hsm.ErrExists):
		back, err := tpm.ReadNV(ctx, index)
		if err != nil && !errors.Is(err, tpm2.TPMRCNVUninitialized) { // which is one that nothing was written to yet
			return err
		}
		if len(back) > 0 && !bytes.Equal(back, document) {
			return fmt.Errorf("stamping into NV index 0x%08x: %w: it holds something else", index, ErrExists)
		}
		if bytes.Equal(back, document) {
			return tpm.LockNV(ctx, index)
		}
	case err != nil:
		return err
	}
	if err := tpm.WriteNV(ctx, index, document); err != nil {
		return err
	}
	if err := tpm.LockNV(ctx, index); err != nil {
		return err
	}
	back, err := tpm.ReadNV(ctx, index)
	if err != nil {
		return err
	}
	if !bytes.Equal(back, document) {
		return fmt.Errorf("stamping into NV index 0x%08x: %w", index, ErrMismatch)
	}
	return nil
}
