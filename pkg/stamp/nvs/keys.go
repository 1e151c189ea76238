package nvs

import (
	"bytes"
	"crypto/aes"
	"errors"
	"fmt"
	"io"

	"golang.org/x/crypto/xts"
)

// KeySize is the length of the keys of an encrypted partition, in octets: XTS-AES-256's key for data, then that for tweaks.
const KeySize = 64

// Keys encrypt a partition's entries, each of which is an XTS data unit numbered by its place in the partition, in octets.
// They print as "[redacted]". They may be used by many goroutines.
type Keys struct {
	octets [KeySize]byte
	cipher *xts.Cipher
}

// NewKeys takes KeySize octets, which are copied. Two halves that are the same are refused: XTS is not secure with them.
func NewKeys(octets []byte) (*Keys, error) {
	if len(octets) != KeySize {
		return nil, fmt.Errorf("NVS keys of %d octets, want %d", len(octets), KeySize)
	}
	if bytes.Equal(octets[:KeySize/2], octets[KeySize/2:]) {
		return nil, errors.New("NVS keys with two halves that are the same")
	}
	cipher, err := xts.NewCipher(aes.NewCipher, octets)
	if err != nil {
		return nil, fmt.Errorf("NVS keys: %w", err)
	}
	return &Keys{[KeySize]byte(octets), cipher}, nil
}

// Format implements [fmt.Formatter] for every verb: the keys are left out.
func (Keys) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "[redacted]") }

// Image returns the key partition: 4096 octets with the keys and their checksum at its beginning. It is secret.
func (k *Keys) Image() []byte {
	image := []byte(blank)
	copy(image, k.octets[:])
	le.PutUint32(image[KeySize:], checksum(image[:KeySize]))
	return image
}

// ParseKeys reads a key partition. The error is [ErrInvalid] for anything but 4096 octets as Image returns them.
func ParseKeys(image []byte) (*Keys, error) {
	if len(image) != pageSize || le.Uint32(image[KeySize:]) != checksum(image[:KeySize]) || !isBlank(image[KeySize+4:]) {
		return nil, fmt.Errorf("reading an NVS key partition: %w", ErrInvalid)
	}
	k, err := NewKeys(image[:KeySize])
	if err != nil {
		return nil, fmt.Errorf("reading an NVS key partition: %w: %w", ErrInvalid, err)
	}
	return k, nil
}

func (k *Keys) encrypt(entry []byte, at int) { k.cipher.Encrypt(entry, entry, uint64(at)) }
func (k *Keys) decrypt(entry []byte, at int) { k.cipher.Decrypt(entry, entry, uint64(at)) }
