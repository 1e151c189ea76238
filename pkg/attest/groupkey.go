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
	var block [sha256.BlockSize]byte
	for _, s := range []struct {
		state *[]byte
		pad   byte
	}{{&g.inner, 0x36}, {&g.outer, 0x5c}} {
		h := sha256.New()
		h.Write(pad(&block, key, s.pad))
		*s.state, _ = h.(encoding.BinaryMarshaler).MarshalBinary() // sha256's never fails
	}
	return g
}

// Derive returns the key that a device has in the group, from its registration ID as the device writes it.
func (k GroupKey) Derive(registrationID string) []byte {
	r := Trial{h: sha256.New()}
	r.resume(k.inner, []byte(registrationID))
	r.resume(k.outer, r.sum[:])
	return r.sum[:]
}

func pad(block *[sha256.BlockSize]byte, key []byte, with byte) []byte {
	n := copy(block[:], key)
	clear(block[n:])
	for i := range block {
		block[i] ^= with
	}
	return block[:]
}

// A Trial tries group keys on one device's token. It is for one goroutine at a time.
type Trial struct {
	token *Token
	ids   [][]byte
	h     hash.Hash
	sum   [sha256.Size]byte
	key   [sha256.Size]byte // the device's in the group
	block [sha256.BlockSize]byte
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
		r.resume(k.inner, id)
		r.resume(k.outer, r.sum[:])
		r.key = r.sum
		r.h.Reset()
		r.h.Write(pad(&r.block, r.key[:], 0x36))
		r.h.Write(r.token.signed)
		r.h.Sum(r.sum[:0])
		r.h.Reset()
		r.h.Write(pad(&r.block, r.key[:], 0x5c))
		r.h.Write(r.sum[:])
		if r.h.Sum(r.sum[:0]); hmac.Equal(r.sum[:], r.token.sig) {
			return true
		}
	}
	return false
}

// resume hashes a text behind a prepared state.
func (r *Trial) resume(state, text []byte) {
	_ = r.h.(encoding.BinaryUnmarshaler).UnmarshalBinary(state) // its own MarshalBinary's
	r.h.Write(text)
	r.h.Sum(r.sum[:0])
}
