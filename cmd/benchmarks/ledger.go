package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"database/sql"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/touchmark/touchmark/pkg/ledger"
)

// ledgerGroup is how many units one commit takes a step further.
const ledgerGroup = 512

func ledgerConfig(dir string, key *ecdsa.PrivateKey) ledger.Config {
	return ledger.Config{Path: filepath.Join(dir, "ledger.db"), Origin: "bench", Signer: key}
}

// fillLedger begins n units, mints them with data as large as a certificate, verifies and exports them, in groups.
func fillLedger(cfg ledger.Config, n, group int) {
	ctx := context.Background()
	check(ledger.Create(ctx, cfg))
	led := must(ledger.Open(ctx, cfg))
	job, _, err := led.BeginJob(ctx, ledger.Job{Digest: make([]byte, 32), Profile: "bench"})
	check(err)
	events, next := make([]ledger.Event, group), make([]ledger.Event, group)
	plan, certs := make([]byte, 60), make([]byte, 900*group)
	must(rand.Read(plan))
	must(rand.Read(certs))
	for done := 0; done < n; done += len(events) {
		events, next = events[:min(group, n-done)], next[:min(group, n-done)]
		for i := range events {
			serial := fmt.Sprintf("SN%08d", done+i)
			key := sha256.Sum256([]byte(serial))
			events[i] = ledger.Event{State: ledger.Begun, Job: job.ID, Serial: serial, RegistrationID: "pump-" + serial, KeyHash: key[:], Data: plan}
		}
		check(led.Commit(ctx, events))
		for i, e := range events {
			next[i] = ledger.Event{State: ledger.Minted, Unit: e.Unit, Serial: e.Serial, RegistrationID: e.RegistrationID, Data: certs[900*i : 900*i+900]}
		}
		check(led.Commit(ctx, next))
		for _, s := range []ledger.State{ledger.Verified, ledger.Exported} {
			for i, e := range events {
				next[i] = ledger.Event{State: s, Unit: e.Unit}
			}
			check(led.Commit(ctx, next))
		}
	}
	check(led.Close())
}

// readGroups reads the entries of a ledger, one group a commit, each entry with its length before it.
func readGroups(path string) (groups [][]byte) {
	db := must(sql.Open("sqlite", "file:"+path+"?mode=ro"))
	defer db.Close()
	rows := must(db.Query(`SELECT leaves FROM log ORDER BY first`))
	for rows.Next() {
		var b []byte
		check(rows.Scan(&b))
		groups = append(groups, b)
	}
	check(rows.Err())
	return groups
}

func eachRecord(group []byte, f func([]byte)) {
	for len(group) > 0 {
		n, k := binary.Uvarint(group)
		f(group[k : k+int(n)])
		group = group[k+int(n):]
	}
}

// hashStore is a tlog's hashes in memory.
type hashStore []tlog.Hash

func (s *hashStore) ReadHashes(indexes []int64) ([]tlog.Hash, error) {
	out := make([]tlog.Hash, len(indexes))
	for i, x := range indexes {
		out[i] = (*s)[x]
	}
	return out, nil
}

func (s *hashStore) add(n int64, record []byte) {
	*s = append(*s, must(tlog.StoredHashesForRecordHash(n, tlog.RecordHash(record), s))...)
}

// ledger-append: units that go through their states, in groups, or one by one as at a station; against a bare tlog over the same
// entries: hashed, appended to a plain file, flushed once a group.
func (b *bench) ledgerAppend(name, in string, group int) {
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	n := 10000 * b.scale
	if group == 1 {
		n = 200 * b.scale
	}
	ours := func() (ledger.Config, float64) {
		cfg := ledgerConfig(must(os.MkdirTemp(in, "*")), key)
		start := time.Now()
		fillLedger(cfg, n, group)
		return cfg, float64(n) / time.Since(start).Seconds()
	}
	cfg, _ := ours()
	groups := readGroups(cfg.Path)
	b.compare(name, "units/s", func() float64 { _, r := ours(); return r }, func() float64 {
		f := must(os.Create(filepath.Join(must(os.MkdirTemp(in, "*")), "bare.log")))
		defer f.Close()
		start := time.Now()
		var hashes hashStore
		records := int64(0)
		for _, g := range groups {
			before := len(hashes)
			eachRecord(g, func(r []byte) { hashes.add(records, r); records++ })
			out := bytes.Clone(g)
			for _, h := range hashes[before:] {
				out = append(out, h[:]...)
			}
			must(f.Write(out))
			check(f.Sync())
		}
		must(tlog.TreeHash(records, &hashes))
		return float64(n) / time.Since(start).Seconds()
	})
}

// ledger-verify: a ledger verified whole; against reading the same entries from a plain file and hashing them up to the root.
func (b *bench) ledgerVerify() {
	ctx := context.Background()
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	n := 10000 * b.scale
	cfg := ledgerConfig(tempDir(), key)
	fillLedger(cfg, n, ledgerGroup)
	bare := filepath.Join(filepath.Dir(cfg.Path), "bare.log")
	check(os.WriteFile(bare, bytes.Join(readGroups(cfg.Path), nil), 0o600))
	b.compare("ledger-verify", "units/s", func() float64 {
		start := time.Now()
		led := must(ledger.View(ctx, cfg.Path))
		must(led.Verify(ctx, key.Public()))
		check(led.Close())
		return float64(n) / time.Since(start).Seconds()
	}, func() float64 {
		start := time.Now()
		f := must(os.Open(bare))
		defer f.Close()
		r := bufio.NewReaderSize(f, 1<<20)
		var hashes hashStore
		record := make([]byte, 1<<16)
		records := int64(0)
		for {
			size, err := binary.ReadUvarint(r)
			if err == io.EOF {
				break
			}
			check(err)
			must(io.ReadFull(r, record[:size]))
			hashes.add(records, record[:size])
			records++
		}
		must(tlog.TreeHash(records, &hashes))
		return float64(n) / time.Since(start).Seconds()
	})
}

// ledgerChild is the argument that makes this program verify, or open, a ledger, and print what that took.
const ledgerChild = "ledger-child"

// ledger-verify-million, ledger-resume-million, station-resume-million: a ledger of a million units verified, opened for work, and
// worked on at a station to the first PASS, each in a process of
// its own. There is no bare limit to them: "limit" is what they may take.
func (b *bench) ledgerMillion() {
	dir := must(os.MkdirTemp(disk, "*"))
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	check(os.WriteFile(filepath.Join(dir, "station.der"), must(x509.MarshalECPrivateKey(key)), 0o600))
	n := 100000 * b.scale
	start := time.Now()
	fillLedger(ledgerConfig(dir, key), n, ledgerGroup)
	b.report(result{"ledger-fill", float64(n) / time.Since(start).Seconds(), 0, 0, "units/s"})
	child := func(what string) (r struct{ Seconds, MiB float64 }) {
		cmd := exec.Command(must(os.Executable()), ledgerChild, dir, what)
		cmd.Stderr = os.Stderr
		check(json.Unmarshal(must(cmd.Output()), &r))
		return r
	}
	scale := float64(b.scale) / 10
	r := child("resume")
	b.report(result{"ledger-resume-million", r.Seconds * 1000, 100, r.Seconds * 10, "ms"})
	b.report(result{"ledger-resume-million-memory", r.MiB, 200, r.MiB / 200, "MiB peak"})
	r = child("station")
	b.report(result{"station-resume-million", r.Seconds * 1000, 1000, r.Seconds, "ms"})
	b.report(result{"station-resume-million-memory", r.MiB, 200, r.MiB / 200, "MiB peak"})
	r = child("verify")
	b.report(result{"ledger-verify-million", r.Seconds, 20 * scale, r.Seconds / 20 / scale, "s"})
	b.report(result{"ledger-verify-million-memory", r.MiB, 200, r.MiB / 200, "MiB peak"})
}

func runLedgerChild(dir, what string) error {
	ctx := context.Background()
	key := must(x509.ParseECPrivateKey(must(os.ReadFile(filepath.Join(dir, "station.der")))))
	cfg := ledgerConfig(dir, key)
	start := time.Now()
	var station time.Duration
	if what == "station" {
		temp = dir
		station = resumeStation(cfg)
	} else if what == "verify" {
		debug.SetGCPercent(30) // as the command does
		led := must(ledger.View(ctx, cfg.Path))
		must(led.Verify(ctx, key.Public()))
	} else {
		led := must(ledger.Open(ctx, cfg))
		check(led.CheckClock())
		u := must(led.Find(ctx, "SN00012345"))
		check(led.Commit(ctx, []ledger.Event{{State: ledger.Exported, Unit: u.ID}}))
		check(led.Close())
	}
	seconds := time.Since(start).Seconds()
	if station > 0 {
		seconds = station.Seconds()
	}
	return json.NewEncoder(os.Stdout).Encode(map[string]float64{"seconds": seconds, "mib": peakMiB()})
}
