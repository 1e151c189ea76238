package device

import (
	"bytes"
	"context"
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"

	"github.com/google/go-tpm/tpm2"
)

// A SoftTPM is a [TPM] of plain Go, for tests of load: its keys are in memory, and it protects nothing. It opens what a TPM opens,
// and refuses what one refuses. Its methods may be called by many goroutines.
type SoftTPM struct {
	ek, srk             *rsa.PrivateKey
	ekPublic, srkPublic []byte

	mu  sync.Mutex
	key []byte // the identity key; guarded by mu
}

// NewSoftTPM returns a TPM with these keys of 2048 bits. One that is nil is made, which takes a good part of a second: tests of load
// may give one storage root key to many TPMs.
func NewSoftTPM(ek, srk *rsa.PrivateKey) (*SoftTPM, error) {
	t := &SoftTPM{ek: ek, srk: srk}
	for _, k := range []struct {
		key      **rsa.PrivateKey
		template tpm2.TPMTPublic
		public   *[]byte
	}{{&t.ek, tpm2.RSAEKTemplate, &t.ekPublic}, {&t.srk, tpm2.RSASRKTemplate, &t.srkPublic}} {
		if *k.key == nil {
			var err error
			if *k.key, err = rsa.GenerateKey(rand.Reader, 2048); err != nil {
				return nil, err
			}
		}
		if (*k.key).N.BitLen() != 2048 || (*k.key).E != 65537 {
			return nil, errors.New("a TPM's keys are RSA 2048 with the exponent 65537")
		}
		k.template.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{Buffer: (*k.key).N.Bytes()})
		*k.public = tpm2.Marshal(tpm2.New2B(k.template))
	}
	return t, nil
}

// Keys implements [TPM].
func (t *SoftTPM) Keys(context.Context) (ek, srk []byte, err error) {
	return t.ekPublic, t.srkPublic, nil
}

// MAC implements [TPM].
func (t *SoftTPM) MAC(_ context.Context, dst, data []byte) ([]byte, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.key == nil {
		return nil, errors.New("no key was activated")
	}
	h := hmac.New(sha256.New, t.key)
	h.Write(data)
	return h.Sum(dst), nil
}

var errBlob = errors.New("activation blob is not good")

// Activate implements [TPM]. What is said of each step is what the TPM's specification, Part 1, 23.3 and 24, does with it.
func (t *SoftTPM) Activate(_ context.Context, blob []byte) error {
	var parts [6][]byte
	var err error
	for i := range parts {
		if parts[i], blob, err = take2B(blob); err != nil {
			return err
		}
	}
	if len(blob) > 0 {
		return fmt.Errorf("%w: %d octets too many", errBlob, len(blob))
	}
	object := parts[4]
	wrapped, err := unwrap(t.ek, "IDENTITY\x00", parts[1], parts[0], tpmName(t.srkPublic[2:]))
	if err != nil {
		return fmt.Errorf("credential: %w", err)
	}
	inner, rest, err := take2B(wrapped)
	if err != nil || len(rest) > 0 || len(inner) != 16 {
		return fmt.Errorf("%w: the inner key is no AES-128 key", errBlob)
	}
	private, err := unwrap(t.srk, "DUPLICATE\x00", parts[3], parts[2], tpmName(object))
	if err != nil {
		return fmt.Errorf("duplicate: %w", err)
	}
	if err := decryptCFB(inner, private); err != nil {
		return err
	}
	integrity, sized, err := take2B(private)
	want := sha256.Sum256(append(bytes.Clone(sized), tpmName(object)...))
	if err != nil || !bytes.Equal(integrity, want[:]) {
		return fmt.Errorf("%w: inner integrity", errBlob)
	}
	sensitive, rest, err := take2B(sized)
	if err != nil || len(rest) > 0 {
		return fmt.Errorf("%w: sensitive area", errBlob)
	}
	area, err := tpm2.Unmarshal[tpm2.TPMTSensitive](sensitive)
	if err != nil {
		return fmt.Errorf("%w: sensitive area: %w", errBlob, err)
	}
	bits, err := area.Sensitive.Bits()
	if err != nil {
		return fmt.Errorf("%w: sensitive area: %w", errBlob, err)
	}
	public, err := tpm2.Unmarshal[tpm2.TPMTPublic](object)
	if err != nil || public.Type != tpm2.TPMAlgKeyedHash || public.NameAlg != tpm2.TPMAlgSHA256 || !public.ObjectAttributes.SignEncrypt || public.ObjectAttributes.FixedTPM || public.ObjectAttributes.Restricted {
		return fmt.Errorf("%w: the public area is not that of an HMAC key", errBlob)
	}
	unique, err := public.Unique.KeyedHash()
	bound := sha256.Sum256(append(bytes.Clone(area.SeedValue.Buffer), bits.Buffer...))
	if err != nil || !bytes.Equal(unique.Buffer, bound[:]) {
		return fmt.Errorf("%w: public and sensitive area do not go together", errBlob)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.key = bits.Buffer
	return nil
}

// take2B takes a TPM2B off the front.
func take2B(b []byte) (value, rest []byte, err error) {
	if len(b) < 2 || len(b)-2 < int(binary.BigEndian.Uint16(b)) {
		return nil, nil, fmt.Errorf("%w: cut off", errBlob)
	}
	n := 2 + int(binary.BigEndian.Uint16(b))
	return b[2:n], b[n:], nil
}

// tpmName is the name of a public area with the name algorithm SHA-256.
func tpmName(public []byte) []byte {
	sum := sha256.Sum256(public)
	return append([]byte{0, 0x0b}, sum[:]...)
}

// unwrap undoes a wrapper: RSA-OAEP gives the seed, the seed gives the keys of HMAC and AES-CFB.
func unwrap(key *rsa.PrivateKey, label string, secret, wrapped, name []byte) ([]byte, error) {
	seed, err := key.Decrypt(nil, secret, &rsa.OAEPOptions{Hash: crypto.SHA256, Label: []byte(label)})
	if err != nil {
		return nil, fmt.Errorf("%w: its seed: %w", errBlob, err)
	}
	mac, body, err := take2B(wrapped)
	if err != nil {
		return nil, err
	}
	h := hmac.New(sha256.New, kdfa(seed, "INTEGRITY", nil, 256))
	h.Write(body)
	h.Write(name)
	if !hmac.Equal(h.Sum(nil), mac) {
		return nil, fmt.Errorf("%w: integrity", errBlob)
	}
	plain := bytes.Clone(body)
	return plain, decryptCFB(kdfa(seed, "STORAGE", name, 128), plain)
}

// kdfa is KDFa (Part 1, 11.4.10.2) of one block.
func kdfa(seed []byte, label string, context []byte, bits int) []byte {
	h := hmac.New(sha256.New, seed)
	h.Write([]byte{0, 0, 0, 1})
	h.Write([]byte(label + "\x00"))
	h.Write(context)
	h.Write(binary.BigEndian.AppendUint32(nil, uint32(bits)))
	return h.Sum(nil)[:bits/8]
}

// decryptCFB decrypts AES-CFB with an IV of zeros, in place.
func decryptCFB(key, b []byte) error {
	block, err := aes.NewCipher(key)
	if err != nil {
		return err
	}
	//lint:ignore SA1019 what TPMs encrypt with; an HMAC goes with it
	cipher.NewCFBDecrypter(block, make([]byte, aes.BlockSize)).XORKeyStream(b, b)
	return nil
}
