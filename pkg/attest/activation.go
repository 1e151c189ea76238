package attest

import (
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"math/big"

	"github.com/google/go-tpm/tpm2"
	"golang.org/x/crypto/cryptobyte"
)

// ErrTPMKey says that what a device sent is no key that its TPM can take a secret by.
var ErrTPMKey = errors.New("TPM key is not acceptable")

const (
	// maxTPMKey bounds a TPM2B_PUBLIC, in octets: one of RSA 4096 has 572 at most.
	maxTPMKey = 1024
	// tpmNameSHA256 is TPM_ALG_SHA256, as names and areas begin with it.
	tpmNameSHA256 = "\x00\x0b"
)

// A tpmKey is an RSA storage key of a TPM: one that the TPM decrypts with for itself only.
type tpmKey struct {
	public     *rsa.PublicKey
	attributes uint32
	name       []byte      // the name algorithm, and the hash of the public area
	hash       crypto.Hash // the name algorithm
	aes        int         // bits of the symmetric key
}

// TPMA_OBJECT (TPM 2.0 Part 2, 8.3).
const (
	fixedTPM    = 1 << 1
	fixedParent = 1 << 4
	restricted  = 1 << 16
	decrypt     = 1 << 17
	sign        = 1 << 18
)

// parseTPMKey reads a whole TPM2B_PUBLIC (TPM 2.0 Part 2, 12.2.5), untrusted: size and public area, nothing behind it. It is
// read by hand since go-tpm needs ten times as long, which is more than all the cryptography of a challenge.
func parseTPMKey(b []byte, attributes uint32) (*tpmKey, error) {
	refuse := func(why string) (*tpmKey, error) { return nil, fmt.Errorf("%w: %s", ErrTPMKey, why) }
	s := cryptobyte.String(b)
	var area, policy, modulus cryptobyte.String
	var kind, name, symmetric, symmetricBits, mode, scheme, bits uint16
	var exponent uint32
	if len(b) > maxTPMKey || !s.ReadUint16LengthPrefixed(&area) || !s.Empty() {
		return refuse("it is not a whole TPM2B_PUBLIC")
	}
	k := &tpmKey{}
	whole := area
	if !area.ReadUint16(&kind) || !area.ReadUint16(&name) || !area.ReadUint32(&k.attributes) || !area.ReadUint16LengthPrefixed(&policy) {
		return refuse("its public area is cut off")
	}
	if tpm2.TPMAlgID(kind) != tpm2.TPMAlgRSA {
		return refuse("it is not RSA")
	}
	if k.attributes&(restricted|decrypt|sign|attributes) != restricted|decrypt|attributes {
		return refuse("its attributes are not those of a storage key")
	}
	switch tpm2.TPMAlgID(name) {
	case tpm2.TPMAlgSHA256:
		k.hash = crypto.SHA256
	case tpm2.TPMAlgSHA384:
		k.hash = crypto.SHA384
	default:
		return refuse("its name algorithm is neither SHA-256 nor SHA-384")
	}
	if !area.ReadUint16(&symmetric) || tpm2.TPMAlgID(symmetric) != tpm2.TPMAlgAES || !area.ReadUint16(&symmetricBits) || symmetricBits != 128 && symmetricBits != 256 ||
		!area.ReadUint16(&mode) || tpm2.TPMAlgID(mode) != tpm2.TPMAlgCFB {
		return refuse("its symmetric algorithm is not AES-128 or AES-256 in CFB mode")
	}
	if !area.ReadUint16(&scheme) || tpm2.TPMAlgID(scheme) != tpm2.TPMAlgNull {
		return refuse("a storage key has no scheme")
	}
	if !area.ReadUint16(&bits) || !area.ReadUint32(&exponent) || !area.ReadUint16LengthPrefixed(&modulus) || !area.Empty() || len(policy) > 64 {
		return refuse("its public area is not that of an RSA key")
	}
	k.aes = int(symmetricBits)
	if exponent == 0 {
		exponent = 65537
	}
	k.public = &rsa.PublicKey{N: new(big.Int).SetBytes(modulus), E: int(exponent)}
	if bits != 2048 && bits != 3072 && bits != 4096 || len(modulus) != int(bits)/8 || k.public.N.BitLen() != int(bits) || k.public.N.Bit(0) == 0 ||
		exponent < 3 || exponent&1 == 0 || exponent > math.MaxInt32 {
		return refuse("its modulus or exponent is not that of a TPM's RSA key")
	}
	h := k.hash.New()
	h.Write(whole)
	k.name = h.Sum(binary.BigEndian.AppendUint16(nil, name))
	return k, nil
}

// EKHash names a TPM by its endorsement key, a whole TPM2B_PUBLIC: the hex SHA-256 of the RSA key alone, as a
// SubjectPublicKeyInfo. The rest of the public area could be written otherwise. The error is ErrTPMKey.
func EKHash(ek []byte) (string, error) {
	k, err := parseTPMKey(ek, 0)
	if err != nil {
		return "", fmt.Errorf("endorsement key: %w", err)
	}
	der, err := x509.MarshalPKIXPublicKey(k.public)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:]), nil
}

// keyURI fills the blob's last field. No device does anything with it, but some decrypt it, and not every TPM decrypts nothing.
const keyURI = "touchmark:registration-key"

// duplicationPolicy is the policy PolicyCommandCode(TPM2_CC_Duplicate) of the identity key.
var duplicationPolicy = [32]byte{
	0xbe, 0xf5, 0x6b, 0x8c, 0x1c, 0xc8, 0x4e, 0x11, 0xed, 0xd7, 0x17, 0x52, 0x8d, 0x2c, 0xd9, 0x93,
	0x56, 0xbd, 0x2b, 0xbf, 0x8f, 0x01, 0x52, 0x09, 0xc3, 0xf8, 0x4a, 0xee, 0xab, 0xa8, 0xe8, 0xa2,
}

// Activation makes an activation blob (device API, sections 9.3 and 9.4): a symmetric key of 16 to 64 octets that the TPM which
// holds both keys, and no other, takes in as an HMAC-SHA256 key. No two blobs are the same. The error is ErrTPMKey for keys
// that cannot take it: both are RSA storage keys, and the storage root key does not leave its TPM.
func Activation(keys *TPMKeys, secret []byte) ([]byte, error) {
	if len(secret) < 16 || len(secret) > 64 {
		return nil, fmt.Errorf("a TPM takes a key of 16 to 64 octets, not %d", len(secret))
	}
	ek, err := parseTPMKey(keys.EK, 0)
	if err != nil {
		return nil, fmt.Errorf("endorsement key: %w", err)
	}
	srk, err := parseTPMKey(keys.SRK, fixedTPM|fixedParent)
	if err != nil {
		return nil, fmt.Errorf("storage root key: %w", err)
	}
	random := make([]byte, 16+sha256.Size)
	_, _ = rand.Read(random) // crypto/rand.Read never fails
	defer clear(random)
	inner, seed := random[:16], random[16:]

	// The identity key: KEYEDHASH, SHA-256; sign, noDA and userWithAuth; HMAC with SHA-256.
	unique := sha256.New()
	unique.Write(seed)
	unique.Write(secret)
	public := sized([]byte("\x00\x08"+tpmNameSHA256+"\x00\x04\x04\x40"), duplicationPolicy[:])
	public = sized(append(public, "\x00\x05"+tpmNameSHA256...), unique.Sum(nil))
	digest := sha256.Sum256(public)
	name := append([]byte(tpmNameSHA256), digest[:]...)
	sensitive := sized(sized(sized([]byte("\x00\x08"), nil), seed), secret)
	defer clear(sensitive)

	// The inner wrapper (TPM 2.0 Part 1, 23.3.2.3).
	body := sized(make([]byte, 0, 256), sensitive)
	integrity := sha256.New()
	integrity.Write(body)
	integrity.Write(name)
	private := append(sized(make([]byte, 0, 256), integrity.Sum(nil)), body...)
	clear(body)
	encrypt(inner, private, private)

	blob := make([]byte, 0, 1024)
	for _, w := range []struct {
		key         *tpmKey
		label       string
		name, plain []byte
	}{{ek, "IDENTITY\x00", srk.name, sized(nil, inner)}, {srk, "DUPLICATE\x00", name, private}} {
		if blob, err = w.key.wrap(blob, w.label, w.name, w.plain); err != nil {
			return nil, err
		}
	}
	uri := []byte(keyURI)
	encrypt(inner, uri, uri)
	return sized(sized(blob, public), uri), nil
}

// sized appends a TPM2B: the size in two octets, and b.
func sized(dst, b []byte) []byte {
	return append(binary.BigEndian.AppendUint16(dst, uint16(len(b))), b...)
}

// encrypt is AES-CFB with an IV of zeros.
func encrypt(key, dst, src []byte) {
	block, err := aes.NewCipher(key)
	if err != nil {
		panic(err) // keys come with 128 or 256 bits
	}
	//lint:ignore SA1019 what TPMs encrypt with; an HMAC goes with it
	cipher.NewCFBEncrypter(block, make([]byte, aes.BlockSize)).XORKeyStream(dst, src)
}

// wrap appends what only the TPM with this key opens, for the object of that name, and the seed to open it with: TPM2B_ID_OBJECT
// or TPM2B_PRIVATE, and TPM2B_ENCRYPTED_SECRET. A credential and a duplicate differ in their labels (TPM 2.0 Part 1, 23.3.2.4 and 24).
func (k *tpmKey) wrap(dst []byte, label string, name, plain []byte) ([]byte, error) {
	seed := make([]byte, k.hash.Size())
	_, _ = rand.Read(seed)
	defer clear(seed)
	secret, err := rsa.EncryptOAEP(k.hash.New(), rand.Reader, k.public, seed, []byte(label))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrTPMKey, err)
	}
	encrypt(k.kdfa(seed, "STORAGE\x00", name, k.aes), plain, plain)
	mac := hmac.New(k.hash.New, k.kdfa(seed, "INTEGRITY\x00", nil, 8*k.hash.Size()))
	mac.Write(plain)
	mac.Write(name)
	dst = binary.BigEndian.AppendUint16(dst, uint16(2+k.hash.Size()+len(plain)))
	dst = append(sized(dst, mac.Sum(nil)), plain...)
	return sized(dst, secret), nil
}

// kdfa is KDFa (TPM 2.0 Part 1, 11.4.10.2) of no more than one hash. go-tpm's takes twice as long.
func (k *tpmKey) kdfa(seed []byte, label string, context []byte, bits int) []byte {
	text := append([]byte{0, 0, 0, 1}, label...)
	text = binary.BigEndian.AppendUint32(append(text, context...), uint32(bits))
	h := hmac.New(k.hash.New, seed)
	h.Write(text)
	return h.Sum(nil)[:bits/8]
}
