//go:build cgo

package main

import (
	"context"
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

// rate runs f n times on all cores, each with a session of its own.
func (b *bareToken) rate(n int, f func(sign func([]byte))) float64 {
	var done atomic.Int64
	var wg sync.WaitGroup
	start := time.Now()
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			h := must(b.ctx.OpenSession(b.slot, bare11.CKF_SERIAL_SESSION))
			for done.Add(1) <= int64(n) {
				f(func(data []byte) {
					check(b.ctx.SignInit(h, b.mech, b.key))
					must(b.ctx.Sign(h, data))
				})
			}
			check(b.ctx.CloseSession(h))
		})
	}
	wg.Wait()
	return float64(n) / time.Since(start).Seconds()
}
