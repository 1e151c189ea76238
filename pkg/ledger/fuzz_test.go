package ledger

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"math"
	mathrand "math/rand/v2"
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
	f.Add([]byte{leafVersion, 2, 0x80, 0x00, 0, 0, 0, 0, 0, 0, 0, 0, 0}) // a time in a longer form than it needs
	f.Add([]byte{leafVersion, 2, 0, 0x81, 0x00, 0, 0, 0, 0, 0, 0, 0, 0})
	f.Add([]byte{leafVersion, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x80, 0})
	f.Add((&leaf{state: noted, at: time.UnixMilli(math.MinInt64)}).append(nil))
	f.Add((&leaf{state: noted, at: time.UnixMilli(math.MaxInt64), revision: 1 << 53}).append(nil))
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

// The edge makes the hashes that tlog makes, at every size.
func TestEdge(t *testing.T) {
	var e edge
	var stored []tlog.Hash
	read := tlog.HashReaderFunc(func(indexes []int64) ([]tlog.Hash, error) {
		out := make([]tlog.Hash, len(indexes))
		for i, x := range indexes {
			out[i] = stored[x]
		}
		return out, nil
	})
	for n := range int64(300) {
		want, err := tlog.TreeHash(n, read)
		if err != nil {
			t.Fatal(err)
		}
		if e.root() != want {
			t.Fatalf("the root of %d entries is %v, want %v", n, e.root(), want)
		}
		h := tlog.Hash{byte(n), byte(mathrand.Int())}
		hs, err := tlog.StoredHashesForRecordHash(n, h, read)
		if err != nil {
			t.Fatal(err)
		}
		var flat []byte
		for _, h := range hs {
			flat = append(flat, h[:]...)
		}
		if got := e.add(h, nil); !bytes.Equal(got, flat) {
			t.Fatalf("entry %d stores %x, want %x", n, got, flat)
		}
		stored = append(stored, hs...)
	}
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
