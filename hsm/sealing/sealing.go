// Package sealing opens files that were sealed to a key which stays in its store.
//
// The format is age (age-encryption.org/v1) with its "p256tag" recipients, so anyone seals with the age tool or library to
// the recipient text that [Recipient] gives, and only the store's key opens. The key takes part through ECDH on P-256
// inside the token; everything after that is HPKE (RFC 9180) in memory.
package sealing

import (
	"bytes"
	"crypto/elliptic"
	"crypto/hpke"
	"encoding/base64"
	"errors"
	"fmt"
	"math/big"
	"strings"

	"filippo.io/age"
	"filippo.io/age/tag"

	"github.com/touchmark/touchmark/hsm"
)

// Recipient returns the age recipient ("age1tag1…") of an agreement key.
func Recipient(k hsm.AgreementKey) (string, error) {
	r, err := recipient(k)
	if err != nil {
		return "", err
	}
	return r.String(), nil
}

func recipient(k hsm.AgreementKey) (*tag.Recipient, error) {
	point := k.PublicKey().Bytes() // 0x04 ‖ X ‖ Y
	if len(point) != 65 {
		return nil, fmt.Errorf("key %q is not on P-256: %w", k.Name(), hsm.ErrUnsupported)
	}
	x, y := new(big.Int).SetBytes(point[1:33]), new(big.Int).SetBytes(point[33:])
	return tag.NewClassicRecipient(elliptic.MarshalCompressed(elliptic.P256(), x, y))
}

// ParseRecipient parses the text of a recipient: an age key ("age1…", "age1pq1…") or a key in a store ("age1tag1…").
func ParseRecipient(s string) (age.Recipient, error) {
	if len(s) > 4096 {
		return nil, errors.New("recipient is longer than 4096 characters")
	}
	if strings.HasPrefix(s, "age1tag") {
		r, err := tag.ParseRecipient(s)
		if err != nil {
			return nil, err // and not r, a nil pointer that is no nil interface
		}
		return r, nil
	}
	all, err := age.ParseRecipients(strings.NewReader(s))
	if err != nil {
		return nil, fmt.Errorf("%.20q… is no age recipient (age1…): %w", s, err)
	}
	if len(all) != 1 {
		return nil, errors.New("want one age recipient")
	}
	return all[0], nil
}

// Identity returns an age identity that opens files with the key.
func Identity(k hsm.AgreementKey) age.Identity { return identity{k} }

type identity struct{ key hsm.AgreementKey }

const stanzaType = "p256tag"

// Unwrap implements [age.Identity]. Stanzas for somebody else are age.ErrIncorrectIdentity.
func (id identity) Unwrap(stanzas []*age.Stanza) ([]byte, error) {
	r, err := recipient(id.key)
	if err != nil {
		return nil, err
	}
	for _, s := range stanzas {
		if s.Type != stanzaType || len(s.Args) != 2 {
			continue
		}
		mark, err1 := base64.RawStdEncoding.Strict().DecodeString(s.Args[0])
		enc, err2 := base64.RawStdEncoding.Strict().DecodeString(s.Args[1])
		if err1 != nil || err2 != nil || len(mark) != 4 {
			return nil, errors.New("malformed p256tag stanza")
		}
		want, err := r.Tag(enc)
		if err != nil || !bytes.Equal(mark, want) {
			continue // another key's
		}
		priv, err := hpke.NewDHKEMPrivateKey(id.key)
		if err != nil {
			return nil, err
		}
		open, err := hpke.NewRecipient(enc, priv, hpke.HKDFSHA256(), hpke.ChaCha20Poly1305(), []byte("age-encryption.org/p256tag"))
		if err != nil {
			return nil, fmt.Errorf("unsealing with key %q: %w", id.key.Name(), err)
		}
		fileKey, err := open.Open(nil, s.Body)
		if err != nil {
			return nil, fmt.Errorf("unsealing with key %q: the file is damaged", id.key.Name())
		}
		return fileKey, nil
	}
	return nil, age.ErrIncorrectIdentity
}
