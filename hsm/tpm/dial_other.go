//go:build !linux

package tpm

import (
	"fmt"

	"github.com/google/go-tpm/tpm2/transport"

	"github.com/touchmark/touchmark/hsm"
)

func openDevice(path string) (transport.TPMCloser, error) {
	return nil, fmt.Errorf("device nodes of TPMs are Linux's: %w", hsm.ErrUnsupported)
}
