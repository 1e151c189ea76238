package ledger

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// What parses has exactly one form, so an entry cannot be changed without changing its hash.
func FuzzParseLeaf(f *testing.F) {
	whole := leaf{state: Minted, at: time.UnixMilli(1767225600000), job: 1, unit: 7, count: 1, serial: "SN1",
		registrationID: "pump-1", keyHash: bytes.Repeat([]byte{7}, 32), data: []byte("certificate")}
	f.Add(whole.append(nil))
	f.Add((&leaf{state: Exported, unit: 1, count: 100}).append(nil))
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

// A checkpoint opens when the station signed just this text, and never otherwise.
func FuzzOpenCheckpoint(f *testing.F) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	signer, err := newSigner("touchmark/line", key)
	if err != nil {
		f.Fatal(err)
	}
	text := checkpointText("touchmark/line", 7, tlog.Hash{1, 2, 3})
	good, err := note.Sign(&note.Note{Text: text}, signer)
	if err != nil {
		f.Fatal(err)
	}
	if _, err := OpenCheckpoint(good, key.Public()); err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(text))
	f.Fuzz(func(t *testing.T, b []byte) {
		if c, err := OpenCheckpoint(b, key.Public()); err == nil && (c.Size != 7 || !bytes.HasPrefix(b, []byte(text))) {
			t.Fatalf("%q opens as %+v", b, c)
		}
	})
}
