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
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/bundle"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
)

const scaleChild = "scale-child"

// A fleet is a file of certificates of individual devices, each of its own key: what a certificate is made of is changed in one
// that was signed, for the signature of an individual's certificate is nobody's to look at.
type fleet struct {
	dir string
	n   int
}

func scaleID(i int) string { return fmt.Sprintf("dev-%08d", i) }

func newFleet(dir string, n int) *fleet {
	a := newAuthority()
	name := scaleID(0)
	model := a.issue(name, x509.ExtKeyUsageClientAuth).Certificate[0]
	leaf := must(x509.ParseCertificate(model))
	point := must(leaf.PublicKey.(*ecdsa.PublicKey).Bytes())
	atName, atPoint := bytes.LastIndex(model, []byte(name)), bytes.Index(model, point)
	f := bufio.NewWriterSize(must(os.Create(filepath.Join(dir, "fleet"))), 1<<20)
	const block = 10_000
	for from := 0; from < n; from += block {
		all := make([][]byte, min(block, n-from))
		var next atomic.Int64
		rate(len(all), func() {
			i := int(next.Add(1)) - 1
			der := bytes.Clone(model)
			copy(der[atName:], scaleID(from+i))
			copy(der[atPoint:], must(must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)).PublicKey.Bytes()))
			all[i] = der
		})
		for _, der := range all {
			must(f.Write(binary.BigEndian.AppendUint16(nil, uint16(len(der)))))
			must(f.Write(der))
		}
	}
	check(f.Flush())
	return &fleet{dir, n}
}

// certificates yields those from a number on.
func (f *fleet) certificates(from, n int) iter.Seq2[int, []byte] {
	return func(yield func(int, []byte) bool) {
		file := must(os.Open(filepath.Join(f.dir, "fleet")))
		defer file.Close()
		r := bufio.NewReaderSize(file, 1<<20)
		for i := range from + n {
			var size [2]byte
			must(io.ReadFull(r, size[:]))
			der := make([]byte, binary.BigEndian.Uint16(size[:]))
			must(io.ReadFull(r, der))
			if i >= from && !yield(i, der) {
				return
			}
		}
	}
}

func scaleEnrollment(i int, der []byte) *dps.IndividualEnrollment {
	return &dps.IndividualEnrollment{RegistrationID: scaleID(i), Enrollment: dps.Enrollment{Attestation: &dps.Attestation{Type: dps.AttestationX509,
		X509: &dps.X509Attestation{ClientCertificates: &dps.X509Certificates{Primary: &dps.X509Certificate{Certificate: base64.StdEncoding.EncodeToString(der)}}}}}}
}

// entries yields the fleet as a bundle does.
func (f *fleet) entries(from, n int) iter.Seq2[bundle.Entry, error] {
	return func(yield func(bundle.Entry, error) bool) {
		for i, der := range f.certificates(from, n) {
			if !yield(bundle.Entry{Serial: "SN" + scaleID(i), Individual: scaleEnrollment(i, der)}, nil) {
				return
			}
		}
	}
}

// importFrom imports a part of the fleet into the service in a directory.
func (f *fleet) importFrom(svc *registration.Service, from, n int) {
	res := must(svc.Import(context.Background(), f.entries(from, n), registration.ImportConfig{Station: "station"}))
	if res.New != n {
		check(fmt.Errorf("%+v", res))
	}
}

func runScaleChild(dir, n string) error {
	f := &fleet{dir, must(strconv.Atoi(n))}
	store, svc := newService(dir)
	start := time.Now()
	f.importFrom(svc, 0, f.n)
	check(store.Close())
	return json.NewEncoder(os.Stdout).Encode(map[string]float64{"seconds": time.Since(start).Seconds(), "mib": peakMiB()})
}

// bare inserts the rows of the fleet into SQLite, with the service's tables and indexes, row by row and by prepared statements in
// transactions of the same size, and nothing else; the JSON and the hashes are made in between.
func (f *fleet) bare() float64 {
	dir := must(os.MkdirTemp(f.dir, "bare-*"))
	store, svc := newService(dir)
	f.importFrom(svc, 0, 1)
	check(store.Close())
	db := must(sql.Open("sqlite", "file:"+filepath.Join(dir, "service.db")+"?_pragma=journal_mode(WAL)&_pragma=synchronous(FULL)&_txlock=immediate"))
	defer db.Close()
	db.SetMaxOpenConns(1)
	var document []byte
	check(db.QueryRow(`SELECT document FROM records WHERE kind = 'individual'`).Scan(&document))
	record := must(db.Prepare(`INSERT INTO records (scope, kind, id, name, document, keys, "symmetric", content, closed, revision) VALUES ($1, 'individual', $2, $2, $3, NULL, 0, $4, 0, 0)`))
	certificate := must(db.Prepare(`INSERT INTO certificates (scope, fingerprint, subject, kind, id) VALUES ($1, $2, $3, 'individual', $4)`))
	device := must(db.Prepare(`INSERT INTO devices (scope, id, group_id, serial, key_hash, revision, ended, state, station, order_id, grant_id, moved, seen, disabled)
		VALUES ($1, $2, '', $3, $4, 0, 0, '', 'station', '', '', 0, 0, 0)`))
	start := time.Now()
	var tx *sql.Tx
	for i, der := range f.certificates(1, f.n-1) {
		if tx == nil {
			tx = must(db.Begin())
		}
		id, sum := scaleID(i), sha256.Sum256(der)
		subject := sha256.Sum256([]byte(id))
		must(tx.Stmt(record).Exec(benchScope, id, document, sum[:]))
		must(tx.Stmt(certificate).Exec(benchScope, sum[:], subject[:], id))
		must(tx.Stmt(device).Exec(benchScope, id, "SN"+id, hex.EncodeToString(subject[:])))
		if i%500 == 0 || i == f.n-1 {
			check(tx.Commit())
			tx = nil
		}
	}
	return float64(f.n) / time.Since(start).Seconds()
}

// fill puts n individual enrollments into a store that is closed, with rows like those of one that is there, by SQL alone: what
// they cost to import is measured elsewhere. IDs, fingerprints and keys are spread, as serial numbers are.
func fill(dir string, n int) {
	db := must(sql.Open("sqlite", "file:"+filepath.Join(dir, "service.db")+"?_pragma=journal_mode(WAL)&_pragma=synchronous(OFF)&_pragma=cache_size(-400000)&_txlock=immediate"))
	defer db.Close()
	db.SetMaxOpenConns(1)
	const block = 250_000
	for from := 0; from < n; from += block {
		tx := must(db.Begin())
		must(tx.Exec(`CREATE TEMP TABLE made AS WITH RECURSIVE n(i) AS (SELECT $1 UNION ALL SELECT i + 1 FROM n WHERE i < $2)
			SELECT printf('dev-%09x', (i * 2654435761) % 68719476736) AS id, randomblob(32) AS print FROM n`, from, min(n, from+block)-1))
		must(tx.Exec(`INSERT INTO records (scope, kind, id, name, document, "symmetric", content) SELECT $1, 'individual', m.id, m.id, r.document, 0, m.print
			FROM made AS m, (SELECT document FROM records WHERE kind = 'individual' LIMIT 1) AS r ORDER BY m.id`, benchScope))
		must(tx.Exec(`INSERT INTO certificates (scope, fingerprint, subject, kind, id) SELECT $1, print, print, 'individual', id FROM made ORDER BY print`, benchScope))
		must(tx.Exec(`INSERT INTO devices (scope, id, group_id, serial, key_hash, station) SELECT $1, id, '', id, lower(hex(print)), 'station' FROM made ORDER BY id`, benchScope))
		must(tx.Exec(`DROP TABLE made`))
		check(tx.Commit())
	}
}

// query-pages, register-at-scale, startup: a store with a million individual enrollments, or as many as --at-scale says. The last
// pages of a query against the first ones; devices that register against the same beside ten thousand enrollments; the time that
// it takes to open against two seconds.
func (b *bench) atScale(total int) {
	n := 50 * b.scale
	f := newFleet(tempDir(), 2*n)
	place := temp
	if total > 1_000_000 { // too much for memory; then both are on the disk
		place = disk
	}
	build := func(crowdSize, from int) (*crowd, []*registration.Request, string) {
		dir := must(os.MkdirTemp(place, "*"))
		store, svc := newService(dir)
		f.importFrom(svc, from, n)
		check(store.Close())
		fill(dir, crowdSize)
		var requests []*registration.Request
		for i, der := range f.certificates(from, n) {
			requests = append(requests, crowdRequest(scaleID(i), attest.Proof{Certificates: []*x509.Certificate{must(x509.ParseCertificate(der))}}))
		}
		start := time.Now()
		store, svc = newService(dir)
		if ms := float64(time.Since(start).Microseconds()) / 1000; crowdSize == total {
			b.report(result{"startup", ms, 2000, ms / 2000, "ms"})
		}
		return &crowd{store, svc}, requests, dir
	}
	few, them, _ := build(10_000, 0)
	many, us, dir := build(total, n)
	defer func() { check(errors.Join(few.store.Close(), many.store.Close())) }()
	check(exec.Command("sync").Run()) // what was filled in, so that nobody pays for it below
	b.beside("register-at-scale", 3, many, few, us, them)

	db := must(sql.Open("sqlite", "file:"+filepath.Join(dir, "service.db")))
	defer db.Close()
	const pages, size = 20, 1000
	var last string
	check(db.QueryRow(`SELECT id FROM records WHERE scope = $1 AND kind = 'individual' ORDER BY id DESC LIMIT 1 OFFSET $2`, benchScope, pages*size).Scan(&last))
	read := func(after string) float64 {
		start := time.Now()
		for range pages {
			page, next, err := many.svc.QueryEnrollments(context.Background(), registration.Individual, registration.Page{After: after, Limit: size})
			if after = next; err != nil || len(page) != size {
				check(fmt.Errorf("a page of %d: %w", len(page), err))
			}
		}
		return pages / time.Since(start).Seconds()
	}
	b.compare("query-pages", "pages/s", func() float64 { return read(last) }, func() float64 { return read("") })
}

// import-scale: individual X.509 enrollments, a million of them, by the import's way into a fresh store; against bare inserts of the
// same rows. Its memory is that of a process of its own, against what it may have.
func (b *bench) importScale() {
	f := newFleet(tempDir(), 100_000*b.scale)
	var mib float64
	rounds := b.rounds
	b.rounds = 1 // a minute or two each
	defer func() { b.rounds = rounds }()
	b.compare("import-scale", "rows/s", func() float64 {
		cmd := exec.Command(must(os.Executable()), scaleChild, f.dir, strconv.Itoa(f.n))
		cmd.Stderr = os.Stderr
		var r struct{ Seconds, MiB float64 }
		check(json.Unmarshal(must(cmd.Output()), &r))
		mib = r.MiB
		return float64(f.n) / r.Seconds
	}, f.bare)
	b.report(result{"import-scale-memory", mib, 256, mib / 256, "MiB peak"})
}
