package main

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"

	"github.com/google/go-tpm/tpm2"

	"github.com/touchmark/touchmark/hsm/tpm/residency"
	"github.com/touchmark/touchmark/pkg/attest"
)

// tpm-challenge: activation blobs from the keys as devices send them, on all cores; against their bare cryptography on keys that were
// parsed before: two RSA-OAEP encryptions, six HMACs (of each wrapper, two for its keys and one over what is in it), the four
// encryptions with AES-CFB, and the hashes of a name, of a public key and of a private one.
func (b *bench) tpmChallenge() {
	key := func(template tpm2.TPMTPublic) (*rsa.PublicKey, []byte) {
		k := must(rsa.GenerateKey(rand.Reader, 2048))
		template.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{Buffer: k.N.Bytes()})
		return &k.PublicKey, residency.MarshalPublic(template)
	}
	ek, ekPublic := key(tpm2.RSAEKTemplate)
	srk, srkPublic := key(tpm2.RSASRKTemplate)
	n := 400 * b.scale
	fine := &bench{json: b.json, rounds: 15 * b.rounds} // short turns: what else the machine does meets both alike
	fine.compare("tpm-challenge", "challenges/s", func() float64 {
		keys := &attest.TPMKeys{EK: ekPublic, SRK: srkPublic}
		return rate(n, func() {
			secret := make([]byte, 32)
			must(rand.Read(secret))
			must(attest.Activation(keys, secret))
		})
	}, func() float64 {
		return rate(n, func() {
			random := make([]byte, 32+16+32+32+32)
			must(rand.Read(random))
			seeds := random[80:]
			private := make([]byte, 108)
			for i, k := range []struct {
				key   *rsa.PublicKey
				label string
				plain []byte
			}{{ek, "IDENTITY\x00", random[:18]}, {srk, "DUPLICATE\x00", private}} {
				seed := seeds[32*i : 32*i+32]
				must(rsa.EncryptOAEP(sha256.New(), rand.Reader, k.key, seed, []byte(k.label)))
				encrypt(mac(seed, private[:60])[:16], k.plain)
				mac(mac(seed, private[:20]), k.plain, private[:34])
			}
			encrypt(random[32:48], private)
			encrypt(random[32:48], private[:26])
			for _, size := range []int{282, 78, 106, 64} {
				sha256.Sum256(srkPublic[:size])
			}
		})
	})
}

func mac(key []byte, parts ...[]byte) []byte {
	h := hmac.New(sha256.New, key)
	for _, p := range parts {
		h.Write(p)
	}
	return h.Sum(nil)
}

func encrypt(key, b []byte) {
	//lint:ignore SA1019 what TPMs encrypt with
	cipher.NewCFBEncrypter(must(aes.NewCipher(key)), make([]byte, aes.BlockSize)).XORKeyStream(b, b)
}
