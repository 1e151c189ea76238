package sqlstore

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/pkg/dps"
)

// ErrWrongKey says that the store's data keys are wrapped under another key than the one at hand.
var ErrWrongKey = errors.New("the store's data key is wrapped under another key")

// A WrappingKey is what the store's data keys are wrapped under. It is not in the store, and without it nothing secret in the
// store can be read: [KeyFile] is one in a file, [TokenKey] one that never leaves its token or TPM.
//
// From the wrapping key comes a key for each data key, which the data key is encrypted with (AES-256-GCM): HMAC-SHA256 of a
// random text under the wrapping key; or, where the wrapping key is an AES key that does nothing but wrap, under a key that was
// made in the token for this, and that it keeps wrapped (AES-KWP).
type WrappingKey struct {
	name string
	// derive returns the key for a data key, and the hint that it can be had by again; without a hint it makes one.
	derive func(ctx context.Context, hint []byte) (again, key []byte, err error)
}

// Name returns what the wrapping key is called in errors: its URI, or a fingerprint of a file's.
func (w *WrappingKey) Name() string { return w.name }

const (
	dataKeySize = 32
	wrapLabel   = "touchmark store, data key wrapping 1\x00"
)

// KeyFile returns the wrapping key that a file holds: 32 octets.
func KeyFile(key []byte) (*WrappingKey, error) {
	if len(key) != dataKeySize {
		return nil, errors.New("the store's data key must have 32 octets")
	}
	mac := func(_ context.Context, data []byte) ([]byte, error) {
		h := hmac.New(sha256.New, key)
		h.Write(data)
		return h.Sum(nil), nil
	}
	id, err := mac(context.Background(), []byte("touchmark store, key fingerprint"))
	if err != nil {
		return nil, err
	}
	return &WrappingKey{name: "key file " + hex.EncodeToString(id[:4]), derive: bySalt(mac)}, nil
}

// TokenKey returns a wrapping key of a store of keys, which stays open for as long as the wrapping key is used: one of usage MAC
// in any of them, or of usage Wrap in a PKCS#11 token.
func TokenKey(store hsm.Store, key hsm.Key) (*WrappingKey, error) {
	w := &WrappingKey{name: key.URI()}
	if key.Usage() == hsm.MAC {
		k, err := hsm.MACKeyOf(key)
		if err != nil {
			return nil, err
		}
		w.derive = bySalt(func(ctx context.Context, data []byte) ([]byte, error) { return k.MAC(ctx, nil, data) })
		return w, nil
	}
	wrapper, ok := store.(hsm.Wrapper)
	unwrapper, ok2 := store.(hsm.Unwrapper)
	if key.Usage() != hsm.Wrap || !ok || !ok2 {
		return nil, fmt.Errorf("key %q is for %s (%s): data keys are wrapped by one for %s or %s: %w", key.Name(), key.Usage(), key.Algorithm(), hsm.MAC, hsm.Wrap, hsm.ErrUnsupported)
	}
	w.derive = func(ctx context.Context, hint []byte) (_, _ []byte, err error) {
		spec := hsm.Spec{Name: "touchmark-data-key-" + dps.NewUUID(), Algorithm: hsm.HMACSHA256, Ephemeral: true, Extractable: true}
		var seed hsm.Key
		if hint == nil {
			if seed, err = store.Generate(ctx, spec); err != nil {
				return nil, nil, err
			}
			wrapped, err := wrapper.WrapKey(ctx, key, seed)
			if err != nil {
				return nil, nil, err
			}
			if hint, err = json.Marshal(wrapped); err != nil {
				return nil, nil, err
			}
		} else {
			var wrapped hsm.WrappedKey
			if err := json.Unmarshal(hint, &wrapped); err != nil {
				return nil, nil, err
			}
			if seed, err = unwrapper.UnwrapKey(ctx, key, spec, wrapped); err != nil {
				return nil, nil, err
			}
		}
		if c, ok := seed.(interface{ Close() error }); ok {
			defer c.Close()
		}
		mac, err := hsm.MACKeyOf(seed)
		if err != nil {
			return nil, nil, err
		}
		out, err := mac.MAC(ctx, nil, []byte(wrapLabel))
		return hint, out, err
	}
	return w, nil
}

func bySalt(mac func(context.Context, []byte) ([]byte, error)) func(context.Context, []byte) ([]byte, []byte, error) {
	return func(ctx context.Context, hint []byte) ([]byte, []byte, error) {
		if hint == nil {
			hint = make([]byte, 32)
			_, _ = rand.Read(hint) // crypto/rand.Read never fails
		}
		key, err := mac(ctx, append([]byte(wrapLabel), hint...))
		return hint, key, err
	}
}

func newAEAD(key []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCMWithRandomNonce(block)
}

// wrap wraps a data key: two octets with the length of the hint, the hint, and the encrypted key.
func (w *WrappingKey) wrap(ctx context.Context, key []byte) ([]byte, error) {
	hint, kek, err := w.derive(ctx, nil)
	if err != nil {
		return nil, fmt.Errorf("wrapping a data key with %s: %w", w.name, err)
	}
	defer clear(kek)
	aead, err := newAEAD(kek)
	if err != nil {
		return nil, err
	}
	out := append(binary.BigEndian.AppendUint16(nil, uint16(len(hint))), hint...)
	return aead.Seal(out, nil, key, out), nil
}

// unwrap is wrap's inverse.
func (w *WrappingKey) unwrap(ctx context.Context, wrapped []byte) ([]byte, error) {
	if len(wrapped) < 2 || len(wrapped) < 2+int(binary.BigEndian.Uint16(wrapped)) {
		return nil, errors.New("a data key in the store is cut off")
	}
	n := 2 + int(binary.BigEndian.Uint16(wrapped))
	_, kek, err := w.derive(ctx, wrapped[2:n])
	if err != nil {
		return nil, fmt.Errorf("unwrapping a data key with %s: %w", w.name, err)
	}
	defer clear(kek)
	aead, err := newAEAD(kek)
	if err != nil {
		return nil, err
	}
	key, err := aead.Open(nil, nil, wrapped[n:], wrapped[:n])
	if err != nil || len(key) != dataKeySize {
		return nil, ErrWrongKey
	}
	return key, nil
}
