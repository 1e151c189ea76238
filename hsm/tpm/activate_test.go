package tpm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"
)

// A blob that is taken apart goes together again, and any other is ErrActivation.
func FuzzSplitActivation(f *testing.F) {
	for _, seed := range [][]byte{nil, make([]byte, 12), make([]byte, 13), []byte("\x00\x01a\x00\x00\x00\x00\x00\x00\x00\x02bc\x00\x01d"), bytes.Repeat([]byte{0xff}, 12)} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, blob []byte) {
		parts, err := splitActivation(blob)
		if err != nil {
			if !errors.Is(err, ErrActivation) {
				t.Error(err)
			}
			return
		}
		var back []byte
		for _, p := range parts {
			back = append(binary.BigEndian.AppendUint16(back, uint16(len(p))), p...)
		}
		if !bytes.Equal(back, blob) || len(blob) > maxActivation {
			t.Errorf("%x became %x", blob, back)
		}
	})
}
