// Command benchmarks compares touchmark with the bare limit of what it does, measured in the same run on the same cores:
// one JSON object per line, {"name", "ours", "limit", "ratio", "unit"}. scripts/bench runs it.
package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"database/sql"
	"encoding/json"
	"flag"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"runtime/pprof"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/keyfile"
	"github.com/touchmark/touchmark/pkg/bundle"
	"github.com/touchmark/touchmark/pkg/ca"
	"github.com/touchmark/touchmark/pkg/ledger"
	"github.com/touchmark/touchmark/pkg/mint"
	"github.com/touchmark/touchmark/templates"
)

func main() {
	if len(os.Args) == 3 && os.Args[1] == importChild {
		debug.SetGCPercent(200)
		check(runImportChild(os.Args[2]))
		return
	}
	debug.SetGCPercent(200) // as the command does
	if len(os.Args) == 6 && os.Args[1] == idleChild {
		check(runIdleChild(os.Args[2], os.Args[3], os.Args[4], os.Args[5]))
		return
	}
	if len(os.Args) == 4 && os.Args[1] == ledgerChild {
		check(runLedgerChild(os.Args[2], os.Args[3]))
		return
	}
	if len(os.Args) == 4 && os.Args[1] == scaleChild {
		check(runScaleChild(os.Args[2], os.Args[3]))
		return
	}
	asJSON := flag.Bool("json", false, "print JSON only")
	short := flag.Bool("short", false, "a tenth of the work")
	only := flag.String("only", "", "run the benchmarks whose name has this in it")
	crowdSize := flag.Int("at-scale", 1_000_000, "enrollments in the store of the benchmarks that say so; 5,000,000 takes some minutes")
	profile := flag.String("profile", "", "write a CPU profile to this file")
	flag.Parse()
	b := &bench{json: *asJSON, rounds: 3, scale: 10}
	memory := "/dev/shm"
	if _, err := os.Stat(memory); err != nil {
		memory = ""
	}
	temp, disk = must(os.MkdirTemp(memory, "touchmark-bench-*")), must(os.MkdirTemp("", "touchmark-bench-*"))
	defer removeTemp()
	if *profile != "" {
		f := must(os.Create(*profile))
		check(pprof.StartCPUProfile(f))
		defer pprof.StopCPUProfile()
	}
	if *short {
		b.rounds, b.scale = 1, 1
	}
	for _, x := range []struct {
		name string
		run  func()
	}{
		{"mint-x509", func() { b.mintX509("mint-x509", temp) }}, {"mint-x509-disk", func() { b.mintX509("mint-x509-disk", disk) }},
		{"mint-x509-token", b.mintX509Token}, {"mint-nvs", func() { b.mintNVS("mint-nvs", "# encrypted") }}, {"mint-nvs-encrypted", func() { b.mintNVS("mint-nvs-encrypted", "encrypted") }},
		{"derive", func() { b.derive("derive", temp) }}, {"derive-disk", func() { b.derive("derive-disk", disk) }}, {"derive-token", b.deriveToken},
		{"token-sign", b.tokenSign}, {"token-hmac", b.tokenHMAC}, {"token-keygen", b.tokenKeygen}, {"token-crowded", b.tokenCrowded},
		{"tpm-create", b.tpmCreate}, {"tpm-sign", b.tpmSign}, {"tpm-challenge", b.tpmChallenge},
		{"register-https", func() { b.register("https", false) }}, {"register-mqtt", func() { b.register("mqtt", false) }}, {"register-amqp", func() { b.register("amqp", false) }},
		{"register-https-key", func() { b.register("https", true) }}, {"register-mqtt-key", func() { b.register("mqtt", true) }},
		{"idle-mqtt", func() { b.idle("mqtt", 34) }}, {"idle-amqp", func() { b.idle("amqp", 40) }}, {"import", b.importBundle}, {"import-scale", b.importScale}, {"import-bulk", b.importBulk},
		{"startup register-at-scale query-pages", func() { b.atScale(*crowdSize * b.scale / 10) }},
		{"limit-overhead limit-refusal", b.limitOverhead}, {"limit-fairness", b.limitFairness},
		{"refusal-https", func() { b.refusal("https") }}, {"refusal-mqtt", func() { b.refusal("mqtt") }},
		{"lookup-x509", b.lookupX509}, {"lookup-key", b.lookupKey}, {"allocation", b.allocation}, {"hub-backlog", b.hubBacklog},
		{"ledger-append", func() { b.ledgerAppend("ledger-append", temp, ledgerGroup) }}, {"ledger-append-disk", func() { b.ledgerAppend("ledger-append-disk", disk, ledgerGroup) }},
		{"ledger-append-one-disk", func() { b.ledgerAppend("ledger-append-one-disk", disk, 1) }},
		{"ledger-verify", b.ledgerVerify}, {"ledger-verify-million ledger-resume-million station-resume-million", b.ledgerMillion},
		{"station-unit", b.stationUnit}, {"nvs-images", b.nvsImages},
	} {
		if strings.Contains(x.name, *only) {
			x.run()
		}
	}
}

// temp holds what the benchmarks write: in memory, because the limits have no disk in them and disks differ. disk is on one,
// for the two benchmarks that say so. Both are removed at the end and not between rounds: some file systems are slow to make
// files for minutes after many were removed.
var temp, disk string

func removeTemp() {
	_ = os.RemoveAll(temp)
	_ = os.RemoveAll(disk)
}

func tempDir() string { return must(os.MkdirTemp(temp, "*")) }

type bench struct {
	json   bool
	rounds int
	scale  int
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "benchmarks:", err)
		removeTemp()
		os.Exit(1)
	}
}

func must[T any](v T, err error) T {
	check(err)
	return v
}

type result struct {
	Name  string  `json:"name"`
	Ours  float64 `json:"ours"`
	Limit float64 `json:"limit"`
	Ratio float64 `json:"ratio"`
	Unit  string  `json:"unit"`
}

// compare runs the two in turn and reports the medians; the ratio is the median of the rounds' ratios, so that it holds
// when the machine's speed drifts.
func (b *bench) compare(name, unit string, ours, limit func() float64) {
	var o, l, q []float64
	for range b.rounds {
		x, y := limit(), ours()
		o, l, q = append(o, y), append(l, x), append(q, y/x)
	}
	b.report(result{name, median(o), median(l), median(q), unit})
}

func (b *bench) report(r result) {
	if b.json {
		check(json.NewEncoder(os.Stdout).Encode(r))
		return
	}
	fmt.Printf("%-18s %10.0f %-12s limit %10.0f   ratio %.2f\n", r.Name, r.Ours, r.Unit, r.Limit, r.Ratio)
}

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}

// rate runs f n times on all cores and returns runs per second.
func rate(n int, f func()) float64 {
	var done atomic.Int64
	var wg sync.WaitGroup
	start := time.Now()
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for done.Add(1) <= int64(n) {
				f()
			}
		})
	}
	wg.Wait()
	return float64(n) / time.Since(start).Seconds()
}

// factory is a line in a temporary directory.
type factory struct {
	dir     string
	store   hsm.Store
	station hsm.SigningKey
	caKey   hsm.SigningKey
	issuing *x509.Certificate
	root    *x509.Certificate
}

func newFactory(store hsm.Store, in string) *factory {
	ctx := context.Background()
	f := &factory{dir: must(os.MkdirTemp(in, "*")), store: store}
	key := func(name string) hsm.SigningKey {
		return must(hsm.SigningKeyOf(must(store.Generate(ctx, hsm.Spec{Name: name, Algorithm: hsm.ECP256}))))
	}
	rootKey := key("root")
	f.caKey, f.station = key("issuing"), key("station")
	year := 365 * 24 * time.Hour
	f.root = must(ca.NewRoot(ca.AuthorityConfig{Subject: pkix.Name{CommonName: "Root"}, Signer: rootKey, Now: time.Now(), Validity: 30 * year}))
	f.issuing = must(ca.NewIssuing(ca.AuthorityConfig{Subject: pkix.Name{CommonName: "Issuing"}, Signer: f.caKey, Now: time.Now(), Validity: 20 * year}, f.root, rootKey))
	return f
}

func (f *factory) close() {
	check(f.store.Close())
}

func newKeyFiles() hsm.Store {
	keyfile.TestWorkFactor(10)
	dir := filepath.Join(tempDir(), "keys")
	check(keyfile.Create(dir, hsm.Secret("words")))
	return must(keyfile.Open(context.Background(), keyfile.Config{Dir: dir, Passphrase: func(context.Context) (hsm.Secret, error) { return hsm.Secret("words"), nil }}))
}

// mintRun mints n devices as the command does, in a fresh ledger, and returns devices per second.
func (f *factory) mintRun(profile string, n int, stamps bool) float64 {
	return f.mintProfile(profile, templates.Profiles()[profile], n, stamps)
}

func (f *factory) mintProfile(profile, text string, n int, stamps bool) float64 {
	ctx := context.Background()
	dir := must(os.MkdirTemp(f.dir, "run-*"))
	p := must(mint.LoadProfile(profile, strings.NewReader(text)))
	var csv strings.Builder
	csv.WriteString("serial\n")
	for i := range n {
		fmt.Fprintf(&csv, "SN%08d\n", i)
	}
	list := must(mint.ReadList("bench", strings.NewReader(csv.String()), p))
	lc := ledger.Config{Path: filepath.Join(dir, "ledger.db"), Origin: "bench", Signer: f.station}
	check(ledger.Create(ctx, lc))
	led := must(ledger.Open(ctx, lc))
	defer led.Close()
	cfg := mint.Config{Ledger: led, Profile: p, List: list, Store: f.store, IDScope: "0ne00112233", GlobalEndpoint: "global.azure-devices-provisioning.net"}
	if stamps {
		cfg.Out = filepath.Join(dir, "stamps")
	}
	if p.Attestation == mint.AttestationX509 {
		issuer := must(ca.NewIssuer(ca.Config{Signer: f.caKey, Certificate: f.issuing, Chain: []*x509.Certificate{f.root}}))
		cfg.Issuer = must(issuer.Prepare(p.CertificateProfile(must(templates.Certificate("device", nil)), list.Columns)))
	} else {
		cfg.GroupKey = must(hsm.MACKeyOf(must(f.store.Open(ctx, "group-key"))))
	}
	start := time.Now()
	w := must(bundle.NewWriter(bundle.WriterConfig{Path: filepath.Join(dir, "b.tmb"), IDScope: cfg.IDScope, Created: time.Now(), Signer: f.station}))
	run := must(mint.Begin(ctx, cfg))
	sum := must(run.Mint(ctx, w.Add))
	w.SetCheckpoint(must(led.Checkpoint(ctx)))
	bs := must(w.Close())
	check(mint.Exported(ctx, led, sum.Units, bs.ID))
	seconds := time.Since(start).Seconds()
	check(run.Close())
	if sum.Minted != n {
		check(fmt.Errorf("minted %d of %d", sum.Minted, n))
	}
	return float64(n) / seconds
}

// mint-x509: P-256 keys in memory, a software CA, stamped, written down, bundled; against making a key and a certificate in a
// loop on all cores.
func (b *bench) mintX509(name, in string) {
	f := newFactory(newKeyFiles(), in)
	defer f.close()
	n := 2000 * b.scale
	caKey := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	t := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "CA"}, NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	parent := must(x509.ParseCertificate(must(x509.CreateCertificate(rand.Reader, t, t, caKey.Public(), caKey))))
	b.compare(name, "devices/s", func() float64 { return f.mintRun("x509-group", n, true) }, func() float64 {
		return rate(n, func() {
			key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
			leaf := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "SN00000001"}, NotBefore: t.NotBefore, NotAfter: t.NotAfter,
				KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
			must(x509.CreateCertificate(rand.Reader, leaf, parent, key.Public(), caKey))
		})
	})
}

// mint-nvs, mint-nvs-encrypted: x509 devices with an image of an ESP32's NVS partition each; against the same devices without.
func (b *bench) mintNVS(name, encrypted string) {
	f := newFactory(newKeyFiles(), temp)
	defer f.close()
	n := 2000 * b.scale
	text := strings.Replace(templates.Profiles()["esp32-nvs"], "# encrypted", encrypted, 1)
	b.compare(name, "devices/s", func() float64 { return f.mintProfile("esp32-nvs", text, n, true) }, func() float64 { return f.mintRun("x509-group", n, true) })
}

// mint-x509-token: the same with the CA in SoftHSM; against making a key and one C_Sign in a loop on all cores.
func (b *bench) mintX509Token() {
	f := newFactory(newToken(), temp)
	defer f.close()
	n := 2000 * b.scale
	bare := newBareToken("issuing")
	defer bare.close()
	b.compare("mint-x509-token", "devices/s", func() float64 { return f.mintRun("x509-group", n, true) }, func() float64 {
		digest := sha256.Sum256([]byte("certificate"))
		return bare.rate(n, func(sign func([]byte)) {
			must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
			sign(digest[:])
		})
	})
}

func importGroupKey(store hsm.Store) hsm.Secret {
	key := hsm.Secret(strings.Repeat("k", 64))
	must(store.Import(context.Background(), hsm.Spec{Name: "group-key", Algorithm: hsm.HMACSHA256}, key))
	return key
}

// derive: keys derived in memory, written down and bundled; against HMAC and one bulk insert into SQLite of a row of that
// size with those unique indexes.
func (b *bench) derive(name, in string) {
	f := newFactory(newKeyFiles(), in)
	defer f.close()
	key := importGroupKey(f.store)
	n := 20000 * b.scale
	b.compare(name, "devices/s", func() float64 { return f.mintRun("symmetric-group", n, false) }, func() float64 {
		dir := must(os.MkdirTemp(f.dir, "bare-*"))
		db := must(sql.Open("sqlite", "file:"+filepath.Join(dir, "bare.db")+"?_pragma=journal_mode(WAL)&_pragma=synchronous(FULL)"))
		defer db.Close()
		db.SetMaxOpenConns(1)
		must(db.Exec(`CREATE TABLE units (id INTEGER PRIMARY KEY, serial TEXT NOT NULL UNIQUE, registration_id TEXT NOT NULL UNIQUE, key_hash BLOB UNIQUE,
			spelling TEXT, state INTEGER NOT NULL, job INTEGER NOT NULL, at INTEGER NOT NULL, leaf INTEGER NOT NULL)`))
		start := time.Now()
		tx := must(db.Begin())
		insert := must(tx.Prepare(`INSERT INTO units (serial, registration_id, key_hash, state, job, at, leaf) VALUES ($1, $2, $3, 2, 1, 1, 1)`))
		for i := range n {
			serial := fmt.Sprintf("SN%08d", i)
			h := hmac.New(sha256.New, key)
			h.Write([]byte(serial))
			must(insert.Exec(serial, strings.ToLower(serial), h.Sum(nil)))
		}
		check(tx.Commit())
		return float64(n) / time.Since(start).Seconds()
	})
}

// derive-token: the same with the group key in SoftHSM; against C_Sign with CKM_SHA256_HMAC in a loop on all cores.
func (b *bench) deriveToken() {
	f := newFactory(newToken(), temp)
	defer f.close()
	importGroupKey(f.store)
	n := 10000 * b.scale
	bare := newBareToken("group-key")
	defer bare.close()
	b.compare("derive-token", "devices/s", func() float64 { return f.mintRun("symmetric-group", n, false) }, func() float64 {
		return bare.rate(n, func(sign func([]byte)) { sign([]byte("sn00000001")) })
	})
}
