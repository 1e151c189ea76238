package attest

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding"
	"hash"

	"github.com/touchmark/touchmark/pkg/dps"
)

// A GroupKey is the key of a symmetric-key group, prepared so that trying it on a token costs little: the states of SHA-256
// after the first block of HMAC's inner and outer hash (RFC 2104). It does not change, and prints as nothing.
type GroupKey struct{ inner, outer []byte }

// String keeps the key out of logs.
func (GroupKey) String() string { return "[redacted]" }

// NewGroupKey prepares a key.
func NewGroupKey(key []byte) GroupKey {
	if len(key) > sha256.BlockSize {
		sum := sha256.Sum256(key)
		key = sum[:]
	}
	var g GroupKey
	for _, s := range []struct {
		state *[]byte
		pad   byte
	}{{&g.inner, 0x36}, {&g.outer, 0x5c}} {
		h := sha256.New()
		block := pad(key, s.pad)
		h.Write(block[:])
		*s.state, _ = h.(encoding.BinaryMarshaler).MarshalBinary() // sha256's never fails
	}
	return g
}

func pad(key []byte, with byte) (block [sha256.BlockSize]byte) {
	copy(block[:], key)
	for i := range block {
		block[i] ^= with
	}
	return block
}

// A Trial tries group keys on one device's token. It is for one goroutine at a time.
type Trial struct {
	token *Token
	ids   [][]byte
	h     hash.Hash
	sum   [sha256.Size]byte
}

// Trial begins one. The registration ID counts as the device writes it; folded as well, since some tools fold it first
// (device API, section 8.3).
func (t *Token) Trial(registrationID string) *Trial {
	r := &Trial{token: t, ids: [][]byte{[]byte(registrationID)}, h: sha256.New()}
	if folded := dps.Fold(registrationID); folded != registrationID {
		r.ids = append(r.ids, []byte(folded))
	}
	return r
}

// Signed reports whether the token was signed with the device's key in the group of that key. It takes the same time
// whatever the answer, but for which of two spellings of the ID fits.
func (r *Trial) Signed(k GroupKey) bool {
	for _, id := range r.ids {
		device := r.finish(k, id)
		inner, outer := pad(device[:], 0x36), pad(device[:], 0x5c)
		r.h.Reset()
		r.h.Write(inner[:])
		r.h.Write(r.token.signed)
		r.h.Sum(r.sum[:0])
		r.h.Reset()
		r.h.Write(outer[:])
		r.h.Write(r.sum[:])
		if r.h.Sum(r.sum[:0]); hmac.Equal(r.sum[:], r.token.sig) {
			return true
		}
	}
	return false
}

// finish returns HMAC-SHA256(group key, id), the device's key.
func (r *Trial) finish(k GroupKey, id []byte) [sha256.Size]byte {
	for _, s := range []struct{ state, text []byte }{{k.inner, id}, {k.outer, r.sum[:]}} {
		_ = r.h.(encoding.BinaryUnmarshaler).UnmarshalBinary(s.state) // its own MarshalBinary's
		r.h.Write(s.text)
		r.h.Sum(r.sum[:0])
	}
	return r.sum
}
