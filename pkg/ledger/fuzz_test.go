package ledger

import (
	"bytes"
	"testing"
	"time"
)

// What parses has exactly one form, so an entry cannot be changed without changing its hash.
func FuzzParseLeaf(f *testing.F) {
	whole := leaf{state: Minted, at: time.UnixMilli(1767225600000), job: 1, unit: 7, count: 1, serial: "SN1",
		registrationID: "pump-1", keyHash: bytes.Repeat([]byte{7}, 32), data: []byte("certificate")}
	f.Add(whole.append(nil))
	f.Add((&leaf{state: Sealed, unit: 1, count: 100}).append(nil))
	f.Add([]byte{1, 2, 0x80, 0x00})
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := parseLeaf(b)
		if err != nil {
			return
		}
		if got := l.append(nil); !bytes.Equal(got, b) {
			t.Fatalf("% x reads as % x", b, got)
		}
	})
}
