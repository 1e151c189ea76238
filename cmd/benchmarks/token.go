//go:build cgo

package main

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	bare11 "github.com/miekg/pkcs11"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/pkcs11"
)

const pin = "4711"

func module() string {
	found, _ := filepath.Glob("/usr/lib/*/softhsm/libsofthsm2.so")
	return append(found, "/usr/lib/softhsm/libsofthsm2.so")[0]
}

// newToken makes a SoftHSM token.
func newToken() hsm.Store {
	dir := tempDir()
	check(os.Mkdir(filepath.Join(dir, "tokens"), 0o700))
	conf := filepath.Join(dir, "softhsm2.conf")
	check(os.WriteFile(conf, []byte("directories.tokendir = "+filepath.Join(dir, "tokens")+"\nobjectstore.backend = file\nlog.level = ERROR\n"), 0o600))
	check(os.Setenv("SOFTHSM2_CONF", conf))
	check(exec.Command("softhsm2-util", "--init-token", "--free", "--label", "bench", "--pin", pin, "--so-pin", pin).Run())
	uri := hsm.URI{Scheme: hsm.SchemePKCS11, Token: "bench", ModulePath: module()}
	return must(pkcs11.Open(context.Background(), pkcs11.Config{URI: uri, PIN: func(context.Context) (hsm.Secret, error) { return hsm.Secret(pin), nil }}))
}

// bareToken is a key on the same token, used with nothing in between.
type bareToken struct {
	ctx  *bare11.Ctx
	slot uint
	key  bare11.ObjectHandle
	mech []*bare11.Mechanism
}

func newBareToken(label string) *bareToken {
	b := &bareToken{ctx: bare11.New(module()), mech: []*bare11.Mechanism{bare11.NewMechanism(bare11.CKM_ECDSA, nil)}}
	_ = b.ctx.Initialize() // the store of this process has done it
	for _, slot := range must(b.ctx.GetSlotList(true)) {
		if info, err := b.ctx.GetTokenInfo(slot); err == nil && info.Label == "bench" {
			b.slot = slot
		}
	}
	h := must(b.ctx.OpenSession(b.slot, bare11.CKF_SERIAL_SESSION))
	class := uint(bare11.CKO_PRIVATE_KEY)
	if label == "group-key" {
		class = bare11.CKO_SECRET_KEY
		b.mech = []*bare11.Mechanism{bare11.NewMechanism(bare11.CKM_SHA256_HMAC, nil)}
	}
	check(b.ctx.FindObjectsInit(h, []*bare11.Attribute{bare11.NewAttribute(bare11.CKA_CLASS, class), bare11.NewAttribute(bare11.CKA_LABEL, label)}))
	found, _, err := b.ctx.FindObjects(h, 1)
	check(err)
	check(b.ctx.FindObjectsFinal(h))
	b.key = found[0]
	return b
}

func (b *bareToken) close() {}

// tokenSign: the key's Sign against C_SignInit and C_Sign.
func (b *bench) tokenSign() {
	store := newToken()
	defer store.Close()
	key := must(hsm.SigningKeyOf(must(store.Generate(context.Background(), hsm.Spec{Name: "signer", Algorithm: hsm.ECP256}))))
	bare := newBareToken("signer")
	digest := sha256.Sum256([]byte("certificate"))
	n := 5000 * b.scale
	b.compare("token-sign", "signatures/s", func() float64 {
		return rate(n, func() { must(key.Sign(rand.Reader, digest[:], crypto.SHA256)) })
	}, func() float64 { return bare.rate(n, func(sign func([]byte)) { sign(digest[:]) }) })
}

// tokenHMAC: the key's MAC against the same.
func (b *bench) tokenHMAC() {
	store := newToken()
	defer store.Close()
	importGroupKey(store)
	key := must(hsm.MACKeyOf(must(store.Open(context.Background(), "group-key"))))
	bare := newBareToken("group-key")
	n := 20000 * b.scale
	b.compare("token-hmac", "HMACs/s", func() float64 {
		return rate(n, func() { must(key.MAC(context.Background(), nil, []byte("sn00000001"))) })
	}, func() float64 { return bare.rate(n, func(sign func([]byte)) { sign([]byte("sn00000001")) }) })
}

// tokenKeygen: throw-away key pairs against C_GenerateKeyPair with the same templates and reading the public point, which
// nobody can do without, and throwing them away.
func (b *bench) tokenKeygen() {
	store := newToken()
	defer store.Close()
	must(store.Generate(context.Background(), hsm.Spec{Name: "signer", Algorithm: hsm.ECP256}))
	bare := newBareToken("signer")
	n := 500 * b.scale
	b.compare("token-keygen", "key pairs/s", func() float64 {
		return rate(n, func() {
			check(must(store.Generate(context.Background(), hsm.Spec{Name: "throw-away", Algorithm: hsm.ECP256, Ephemeral: true})).(io.Closer).Close())
		})
	}, func() float64 {
		id := make([]byte, 16)
		public := []*bare11.Attribute{bare11.NewAttribute(bare11.CKA_TOKEN, false), bare11.NewAttribute(bare11.CKA_VERIFY, true), bare11.NewAttribute(bare11.CKA_LABEL, "throw-away"),
			bare11.NewAttribute(bare11.CKA_ID, id), bare11.NewAttribute(bare11.CKA_EC_PARAMS, []byte{0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07})}
		private := []*bare11.Attribute{bare11.NewAttribute(bare11.CKA_TOKEN, false), bare11.NewAttribute(bare11.CKA_PRIVATE, true), bare11.NewAttribute(bare11.CKA_SENSITIVE, true),
			bare11.NewAttribute(bare11.CKA_EXTRACTABLE, false), bare11.NewAttribute(bare11.CKA_SIGN, true), bare11.NewAttribute(bare11.CKA_LABEL, "throw-away"), bare11.NewAttribute(bare11.CKA_ID, id)}
		mech := []*bare11.Mechanism{bare11.NewMechanism(bare11.CKM_EC_KEY_PAIR_GEN, nil)}
		return bare.sessions(n, func(h bare11.SessionHandle) {
			pub, priv, err := bare.ctx.GenerateKeyPair(h, mech, public, private)
			check(err)
			must(bare.ctx.GetAttributeValue(h, pub, []*bare11.Attribute{bare11.NewAttribute(bare11.CKA_EC_POINT, nil)}))
			check(bare.ctx.DestroyObject(h, pub))
			check(bare.ctx.DestroyObject(h, priv))
		})
	})
}

// tokenCrowded: a device minted with its CA on a token of 10,000 objects, against the same on a token of 10.
func (b *bench) tokenCrowded() {
	n := 1000 * b.scale
	run := func(objects int) func() float64 {
		return func() float64 {
			store := newToken()
			f := newFactory(store, temp)
			defer f.close()
			for i := range objects / 2 { // a key pair is two
				must(store.Generate(context.Background(), hsm.Spec{Name: fmt.Sprintf("crowd-%d", i), Algorithm: hsm.ECP256}))
			}
			return f.mintRun("x509-group", n, true)
		}
	}
	b.compare("token-crowded", "devices/s", run(1000*b.scale), run(10))
}

// rate runs f n times on all cores, each with a session of its own.
func (b *bareToken) rate(n int, f func(sign func([]byte))) float64 {
	return b.sessions(n, func(h bare11.SessionHandle) {
		f(func(data []byte) {
			check(b.ctx.SignInit(h, b.mech, b.key))
			must(b.ctx.Sign(h, data))
		})
	})
}

// sessions runs f n times on all cores, each with a session of its own.
func (b *bareToken) sessions(n int, f func(bare11.SessionHandle)) float64 {
	var done atomic.Int64
	var wg sync.WaitGroup
	start := time.Now()
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			h := must(b.ctx.OpenSession(b.slot, bare11.CKF_SERIAL_SESSION))
			for done.Add(1) <= int64(n) {
				f(h)
			}
			check(b.ctx.CloseSession(h))
		})
	}
	wg.Wait()
	return float64(n) / time.Since(start).Seconds()
}
