package emulate

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"io"
	"strings"
	"time"

	"filippo.io/age"
)

// A Seed makes the same secrets in every run. Whoever knows the text that it came from, or guesses it, has them all: they are
// for tests. Nil makes other ones each time.
type Seed []byte

// NewSeed returns the seed of a text.
func NewSeed(text string) (Seed, error) {
	return hkdf.Extract(sha256.New, []byte(text), []byte("touchmark emulator, version 1"))
}

// Bytes returns up to 8160 secret octets for a purpose, by HKDF-SHA256 (RFC 5869).
func (s Seed) Bytes(label string, n int) []byte {
	if s != nil {
		if b, err := hkdf.Expand(sha256.New, s, label, n); err == nil {
			return b
		}
		panic("emulate: a seed is asked for too much") // a mistake in the program text
	}
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails
	return b
}

// Reader reads a few of the octets of a label.
func (s Seed) Reader(label string) io.Reader { return bytes.NewReader(s.Bytes(label, 256)) }

// Key returns an ECDSA key on P-256. That of a seed signs the same octets the same way each time (RFC 6979).
func (s Seed) Key(label string) (*ecdsa.PrivateKey, error) {
	if s == nil {
		return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	}
	for i := range 16 { // 32 octets that are no key of the curve have a chance of 2^-32
		if key, err := ecdsa.ParseRawPrivateKey(elliptic.P256(), s.Bytes(fmt.Sprintf("%s, key %d", label, i), 32)); err == nil {
			return key, nil
		}
	}
	return nil, fmt.Errorf("no key comes of the seed for %q", label)
}

// Signer returns how a key signs under this seed: as always, or without randomness.
func (s Seed) Signer(key crypto.Signer) crypto.Signer {
	if s == nil {
		return key
	}
	return repeatable{key}
}

// repeatable signs without randomness, where the key is an ECDSA key.
type repeatable struct{ crypto.Signer }

func (r repeatable) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	return r.Signer.Sign(nil, digest, opts)
}

// Validity returns when a CA's certificate begins and for how long it is good: under a seed it is the same in every run, and
// good for devices whose clock was never set.
func (s Seed) Validity() (begin time.Time, length time.Duration) {
	if s == nil {
		return time.Now().Add(-time.Hour), 20 * 365 * 24 * time.Hour
	}
	begin = time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)
	return begin, time.Date(2049, 12, 31, 23, 59, 59, 0, time.UTC).Sub(begin)
}

// Identity returns what secrets in bundles are sealed to.
func (s Seed) Identity(label string) (*age.X25519Identity, error) {
	return age.ParseX25519Identity(strings.ToUpper(bech32("age-secret-key-", s.Bytes(label, 32))))
}

const bech32Digits = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"

// bech32 writes octets as BIP 173 has it.
func bech32(prefix string, data []byte) string {
	sum := uint32(1)
	step := func(v byte) {
		top := sum >> 25
		sum = sum&0x1ffffff<<5 ^ uint32(v)
		for i, g := range [5]uint32{0x3b6a57b2, 0x26508e6d, 0x1ea119fa, 0x3d4233dd, 0x2a1462b3} {
			if top>>i&1 == 1 {
				sum ^= g
			}
		}
	}
	for _, c := range []byte(prefix) {
		step(c >> 5)
	}
	step(0)
	for _, c := range []byte(prefix) {
		step(c & 31)
	}
	out := []byte(prefix + "1")
	put := func(v byte) {
		step(v)
		out = append(out, bech32Digits[v])
	}
	var bits, have uint32
	for _, b := range data {
		bits, have = bits<<8|uint32(b), have+8
		for have >= 5 {
			have -= 5
			put(byte(bits >> have & 31))
		}
	}
	if have > 0 {
		put(byte(bits << (5 - have) & 31))
	}
	for range 6 {
		step(0)
	}
	sum ^= 1
	for i := range 6 {
		out = append(out, bech32Digits[sum>>(5*(5-i))&31])
	}
	return string(out)
}
