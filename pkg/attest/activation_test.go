package attest_test

import (
	"bytes"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-tpm-tools/client"
	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/hsmtest"
	"github.com/touchmark/touchmark/hsm/tpm"
	"github.com/touchmark/touchmark/hsm/tpm/residency"
	"github.com/touchmark/touchmark/pkg/attest"
)

func openTPM(t *testing.T) *tpm.Store {
	t.Helper()
	s, err := tpm.Open(t.Context(), tpm.Config{URI: hsmtest.SWTPM(t).URI()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// The parts of a blob and their sizes, as the device API's section 9.3 has them: DPS-D 49, 53.
func TestActivationLayout(t *testing.T) {
	keys := attest.TPMKeys{EK: public(newKey(t), tpm2.RSAEKTemplate), SRK: public(newKey(t), tpm2.RSASRKTemplate)}
	if len(keys.EK) != 316 || len(keys.SRK) != 284 || !strings.HasPrefix(base64.StdEncoding.EncodeToString(keys.EK), "AToAAQALAAMAsgAg") ||
		!strings.HasPrefix(base64.StdEncoding.EncodeToString(keys.SRK), "ARoAAQALAAMEcgAA") {
		t.Fatalf("go-tpm's templates are not those of the device SDKs: %x %x", keys.EK[:20], keys.SRK[:20])
	}
	blob, err := attest.Activation(&keys, bytes.Repeat([]byte{1}, 32))
	if err != nil {
		t.Fatal(err)
	}
	var sizes []int
	for rest := blob; len(rest) > 0; rest = rest[2+binary.BigEndian.Uint16(rest):] {
		sizes = append(sizes, int(binary.BigEndian.Uint16(rest)))
	}
	if n := len(blob) - 798; !slices.Equal(sizes, []int{52, 256, 142, 256, 80, n}) || n < 16 || n > 64 {
		t.Errorf("parts of %v octets", sizes)
	}
	if policy := sha256.Sum256(append(make([]byte, 32), 0, 0, 1, 0x6c, 0, 0, 1, 0x4b)); !bytes.Equal(blob[716:758], append([]byte{0, 8, 0, 11, 0, 4, 4, 64, 0, 32}, policy[:]...)) {
		t.Errorf("the identity key's public area is %x", blob[716:796])
	}
	again, err := attest.Activation(&keys, bytes.Repeat([]byte{1}, 32))
	if err != nil {
		t.Fatal(err)
	}
	for i, at := range []int{4, 56, 316, 458, 764, 798} { // every part is another one
		if bytes.Equal(blob[at:at+16], again[at:at+16]) {
			t.Errorf("part %d is the same again", i)
		}
	}
	for _, n := range []int{0, 15, 65} {
		if _, err := attest.Activation(&keys, make([]byte, n)); err == nil {
			t.Errorf("a key of %d octets", n)
		}
	}
}

// A TPM takes a blob in, and its HMAC is that of the key: DPS-D 50. No other TPM does, and no octet of it can be changed.
func TestActivationInTPM(t *testing.T) {
	s, other := openTPM(t), openTPM(t)
	id := s.Identity()
	if _, err := id.MAC(t.Context(), nil, []byte("x")); !errors.Is(err, hsm.ErrNotFound) {
		t.Errorf("before an activation: %v", err)
	}
	var keys attest.TPMKeys
	var err error
	if keys.EK, keys.SRK, err = id.Keys(t.Context()); err != nil {
		t.Fatal(err)
	}
	if ek, err := s.EK(t.Context(), tpm.EKRSA); err != nil || ek.Handle != 0x81010001 || !bytes.Equal(ek.Public, keys.EK) {
		t.Errorf("the endorsement key is not where it belongs: %v", err)
	}
	if ek, srk, err := id.Keys(t.Context()); err != nil || !bytes.Equal(ek, keys.EK) || !bytes.Equal(srk, keys.SRK) {
		t.Errorf("the keys are others the second time: %v", err)
	}
	var last []byte
	for _, n := range []int{16, 64, 32} {
		secret := make([]byte, n)
		_, _ = rand.Read(secret)
		blob, err := attest.Activation(&keys, secret)
		if err != nil {
			t.Fatal(err)
		}
		if err := id.Activate(t.Context(), blob); err != nil {
			t.Fatalf("key of %d octets: %v", n, err)
		}
		for _, size := range []int{1, 100, 5000} { // the last is a sequence
			text := bytes.Repeat([]byte("x"), size)
			want := hmac.New(sha256.New, secret)
			want.Write(text)
			if got, err := id.MAC(t.Context(), nil, text); err != nil || !bytes.Equal(got, want.Sum(nil)) {
				t.Errorf("HMAC of %d octets with a key of %d: %x, %v", size, n, got, err)
			}
		}
		last = blob
	}
	if err := other.Identity().Activate(t.Context(), last); !errors.Is(err, tpm.ErrActivation) {
		t.Errorf("another TPM: %v", err)
	}
	for _, at := range []int{0, 3, 30, 40, 54, 100, 312, 320, 400, 456, 500, 714, 718, 730, 790} {
		changed := bytes.Clone(last)
		changed[at] ^= 1
		if err := id.Activate(t.Context(), changed); !errors.Is(err, tpm.ErrActivation) {
			t.Errorf("octet %d changed: %v", at, err)
		}
	}
	for _, b := range [][]byte{nil, last[:len(last)-1], last[:797], append(bytes.Clone(last), 0), make([]byte, 5000)} {
		if err := id.Activate(t.Context(), b); !errors.Is(err, tpm.ErrActivation) {
			t.Errorf("%d octets: %v", len(b), err)
		}
	}
	srk := keys
	if _, srk.SRK, err = other.Identity().Keys(t.Context()); err != nil {
		t.Fatal(err)
	}
	mixed, err := attest.Activation(&srk, make([]byte, 32))
	if err != nil {
		t.Fatal(err)
	}
	if err := id.Activate(t.Context(), mixed); !errors.Is(err, tpm.ErrActivation) {
		t.Errorf("for another TPM's storage root key: %v", err)
	}
}

// Keys that Google's go-tpm-tools made, from templates of its own, are those that we would have made; and so a blob for them is
// taken in. Then an endorsement key of the high range, with SHA-384 and AES-256.
func TestActivationOfOthersKeys(t *testing.T) {
	s := hsmtest.SWTPM(t)
	conn, err := net.Dial("unix", s.Socket)
	if err != nil {
		t.Fatal(err)
	}
	var theirs attest.TPMKeys
	for public, make := range map[*[]byte]func(io.ReadWriter) (*client.Key, error){&theirs.EK: client.EndorsementKeyRSA, &theirs.SRK: client.StorageRootKeyRSA} {
		k, err := make(conn)
		if err != nil {
			t.Fatal(err)
		}
		area, err := k.PublicArea().Encode()
		if err != nil {
			t.Fatal(err)
		}
		*public = append(binary.BigEndian.AppendUint16(nil, uint16(len(area))), area...)
	}
	if err := conn.Close(); err != nil {
		t.Fatal(err)
	}
	store, err := tpm.Open(t.Context(), tpm.Config{URI: s.URI()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = store.Close() })
	if ek, srk, err := store.Identity().Keys(t.Context()); err != nil || !bytes.Equal(ek, theirs.EK) || !bytes.Equal(srk, theirs.SRK) {
		t.Errorf("the keys at the persistent handles are others: %v", err)
	}
	fresh := openTPM(t)
	if _, err := fresh.Generate(t.Context(), hsm.Spec{Name: "0x81000100", Algorithm: hsm.ECP256}); err != nil {
		t.Fatal(err)
	}
	if ek, srk, err := fresh.Identity().Keys(t.Context()); err != nil {
		t.Error(err)
	} else if blob, err := attest.Activation(&attest.TPMKeys{EK: ek, SRK: srk}, make([]byte, 32)); err != nil {
		t.Error(err)
	} else if err := fresh.Identity().Activate(t.Context(), blob); !errors.Is(err, hsm.ErrExists) {
		t.Errorf("over somebody's key: %v", err)
	}
	for _, fresh := range []*tpm.Store{store, fresh} { // the other makes the same from our templates
		ek, srk, err := fresh.Identity().Keys(t.Context())
		if err != nil || !bytes.Equal(ek[:58], theirs.EK[:58]) || !bytes.Equal(srk[:26], theirs.SRK[:26]) {
			t.Errorf("%x %x, go-tpm-tools has %x %x: %v", ek[:58], srk[:26], theirs.EK[:58], theirs.SRK[:26], err)
		}
	}
	takes(t, store, &theirs)
	if err := store.Close(); err != nil {
		t.Fatal(err)
	}

	high := tpm2.RSAEKTemplate
	high.NameAlg = tpm2.TPMAlgSHA384
	high.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgRSA, &tpm2.TPMSRSAParms{KeyBits: 2048, Symmetric: tpm2.TPMTSymDefObject{
		Algorithm: tpm2.TPMAlgAES, KeyBits: tpm2.NewTPMUSymKeyBits(tpm2.TPMAlgAES, tpm2.TPMKeyBits(256)), Mode: tpm2.NewTPMUSymMode(tpm2.TPMAlgAES, tpm2.TPMAlgCFB)}})
	policy, err := tpm2.NewPolicyCalculator(tpm2.TPMAlgSHA384)
	if err == nil {
		err = (tpm2.PolicySecret{AuthHandle: tpm2.TPMRHEndorsement}).Update(policy)
	}
	if err != nil {
		t.Fatal(err)
	}
	high.AuthPolicy.Buffer = policy.Hash().Digest
	second := hsmtest.SWTPM(t)
	conn, err = net.Dial("unix", second.Socket)
	if err != nil {
		t.Fatal(err)
	}
	direct := transport.FromReadWriter(conn)
	made, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHEndorsement, InPublic: tpm2.New2B(high)}.Execute(direct)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := (tpm2.EvictControl{Auth: tpm2.TPMRHOwner, ObjectHandle: &tpm2.NamedHandle{Handle: made.ObjectHandle, Name: made.Name}, PersistentHandle: 0x81010001}).Execute(direct); err != nil {
		t.Fatal(err)
	}
	if _, err := (tpm2.FlushContext{FlushHandle: made.ObjectHandle}).Execute(direct); err != nil {
		t.Fatal(err)
	}
	if err := conn.Close(); err != nil {
		t.Fatal(err)
	}
	store, err = tpm.Open(t.Context(), tpm.Config{URI: second.URI()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = store.Close() })
	ek, srk, err := store.Identity().Keys(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	takes(t, store, &attest.TPMKeys{EK: ek, SRK: srk})
}

// takes has a TPM take a key in.
func takes(t *testing.T, s *tpm.Store, keys *attest.TPMKeys) {
	t.Helper()
	secret := bytes.Repeat([]byte{9}, 32)
	blob, err := attest.Activation(keys, secret)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Identity().Activate(t.Context(), blob); err != nil {
		t.Fatal(err)
	}
	want := hmac.New(sha256.New, secret)
	want.Write([]byte("text"))
	if got, err := s.Identity().MAC(t.Context(), nil, []byte("text")); err != nil || !bytes.Equal(got, want.Sum(nil)) {
		t.Errorf("HMAC %x, %v", got, err)
	}
}

func newKey(t testing.TB) *rsa.PrivateKey {
	t.Helper()
	k, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// public is the TPM2B_PUBLIC of a key by a template.
func public(k *rsa.PrivateKey, template tpm2.TPMTPublic) []byte {
	template.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{Buffer: k.N.Bytes()})
	return residency.MarshalPublic(template)
}

// Keys that are none to wrap a secret for.
func TestActivationRefuses(t *testing.T) {
	k := newKey(t)
	good := attest.TPMKeys{EK: public(k, tpm2.RSAEKTemplate), SRK: public(k, tpm2.RSASRKTemplate)}
	change := func(b []byte, at int, to ...byte) []byte {
		b = bytes.Clone(b)
		copy(b[at:], to)
		return b
	}
	ecc := tpm2.ECCEKTemplate
	exportable := tpm2.RSASRKTemplate
	exportable.ObjectAttributes.FixedTPM = false
	// In the EK: 2 type, 4 name algorithm, 6 attributes, 10 policy, 44 symmetric, 46 bits, 48 mode, 50 scheme, 52 key bits, 54 exponent,
	// 58 size of the modulus, 60 modulus.
	for why, keys := range map[string]attest.TPMKeys{
		"nothing":              {SRK: good.SRK},
		"no SRK":               {EK: good.EK},
		"an octet behind":      {EK: append(bytes.Clone(good.EK), 0), SRK: good.SRK},
		"an octet less":        {EK: good.EK[:315], SRK: good.SRK},
		"without its size":     {EK: good.EK[2:], SRK: good.SRK},
		"DER":                  {EK: []byte("\x30\x82\x01\x0a\x02\x82\x01\x01"), SRK: good.SRK},
		"an octet behind SRK":  {EK: good.EK, SRK: append(bytes.Clone(good.SRK), 0)},
		"ECC":                  {EK: residency.MarshalPublic(ecc), SRK: good.SRK},
		"SHA-1":                {EK: change(good.EK, 4, 0, 4), SRK: good.SRK},
		"a signing key":        {EK: change(good.EK, 6, 0, 5, 0, 0xb2), SRK: good.SRK},
		"not restricted":       {EK: change(good.EK, 6, 0, 2, 0, 0xb2), SRK: good.SRK},
		"an SRK that may go":   {EK: good.EK, SRK: public(k, exportable)},
		"a signing SRK":        {EK: good.EK, SRK: change(good.SRK, 6, 0, 5, 4, 0x72)},
		"Camellia":             {EK: change(good.EK, 44, 0, 0x26), SRK: good.SRK},
		"AES of 17 bits":       {EK: change(good.EK, 46, 0, 17), SRK: good.SRK},
		"AES-CBC":              {EK: change(good.EK, 48, 0, 0x42), SRK: good.SRK},
		"a scheme":             {EK: change(good.EK, 50, 0, 0x17), SRK: good.SRK},
		"another size":         {EK: change(good.EK, 52, 4, 0), SRK: good.SRK},
		"exponent 1":           {EK: change(good.EK, 54, 0, 0, 0, 1), SRK: good.SRK},
		"an even exponent":     {EK: change(good.EK, 54, 0, 1, 0, 0), SRK: good.SRK},
		"an enormous exponent": {EK: change(good.EK, 54, 0xff, 0xff, 0xff, 0xff), SRK: good.SRK},
		"a small modulus":      {EK: change(good.EK, 60, 0), SRK: good.SRK},
		"an even modulus":      {EK: change(good.EK, 315, k.N.Bytes()[255]&^1), SRK: good.SRK},
	} {
		if blob, err := attest.Activation(&keys, make([]byte, 32)); !errors.Is(err, attest.ErrTPMKey) || blob != nil {
			t.Errorf("%s: %v", why, err)
		}
	}
	if _, err := attest.Activation(&good, make([]byte, 32)); err != nil {
		t.Error(err)
	}
	hash, err := attest.EKHash(good.EK)
	area, perr := residency.ParsePublic(good.EK)
	if err != nil || perr != nil {
		t.Fatal(err, perr)
	}
	if want, err := residency.KeyHash(area); err != nil || hash != want {
		t.Errorf("EKHash is %s, a bundle says %s, %v", hash, want, err)
	}
	if again, err := attest.EKHash(change(good.EK, 54, 0, 1, 0, 1)); err != nil || again != hash {
		t.Errorf("the same key in another area: %s, %v", again, err)
	}
}

// What is taken is what go-tpm reads from it.
func FuzzActivation(f *testing.F) {
	k := newKey(f)
	high := tpm2.RSAEKTemplate
	high.NameAlg = tpm2.TPMAlgSHA384
	srk := public(k, tpm2.RSASRKTemplate)
	for _, seed := range [][]byte{public(k, tpm2.RSAEKTemplate), srk, public(k, high), {0, 0}, residency.MarshalPublic(tpm2.ECCEKTemplate)} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		hash, err := attest.EKHash(b)
		if err != nil {
			if !errors.Is(err, attest.ErrTPMKey) || hash != "" {
				t.Errorf("%s, %v", hash, err)
			}
			return
		}
		p, err := tpm2.Unmarshal[tpm2.TPMTPublic](b[2:])
		if err != nil {
			t.Fatalf("go-tpm refuses it: %v", err)
		}
		if want, err := residency.KeyHash(p); err != nil || hash != want {
			t.Errorf("%s, go-tpm says %s, %v", hash, want, err)
		}
		if _, err := attest.Activation(&attest.TPMKeys{EK: b, SRK: srk}, make([]byte, 32)); err != nil {
			t.Error(err)
		}
	})
}
