package ledger_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/filelock"
	"github.com/touchmark/touchmark/pkg/ledger"
)

type line struct {
	cfg ledger.Config
	now time.Time
	key *ecdsa.PrivateKey
}

func newLine(t testing.TB) *line {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	l := &line{key: key, now: time.Date(2026, 3, 1, 8, 0, 0, 0, time.UTC)}
	l.cfg = ledger.Config{
		Path: filepath.Join(t.TempDir(), "ledger.db"), Origin: "touchmark/line-3", Signer: key,
		Now: func() time.Time { return l.now },
	}
	if err := ledger.Create(t.Context(), l.cfg); err != nil {
		t.Fatal(err)
	}
	return l
}

func (l *line) open(t testing.TB) *ledger.Ledger {
	t.Helper()
	led, err := ledger.Open(t.Context(), l.cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = led.Close() })
	return led
}

func hash(s string) []byte { h := sha256.Sum256([]byte(s)); return h[:] }

func begin(t testing.TB, led *ledger.Ledger, n int) (ledger.Job, []ledger.Event) {
	t.Helper()
	job, _, err := led.BeginJob(t.Context(), ledger.Job{Digest: hash("job"), Profile: "x509-group", Out: "out"})
	if err != nil {
		t.Fatal(err)
	}
	events := made(job, n)
	if err := led.Commit(t.Context(), events); err != nil {
		t.Fatal(err)
	}
	return job, events
}

// made returns the events that begin n units.
func made(job ledger.Job, n int) []ledger.Event {
	events := make([]ledger.Event, n)
	for i := range events {
		events[i] = ledger.Event{State: ledger.Begun, Job: job.ID, Serial: fmt.Sprintf("SN%04d", i),
			RegistrationID: fmt.Sprintf("Pump-%04d", i), KeyHash: hash(fmt.Sprint("key", i)), Data: []byte("plan")}
	}
	return events
}

func step(t *testing.T, led *ledger.Ledger, state ledger.State, events []ledger.Event, data string) {
	t.Helper()
	next := make([]ledger.Event, len(events))
	for i, e := range events {
		next[i] = ledger.Event{State: state, Unit: e.Unit, Serial: e.Serial, RegistrationID: e.RegistrationID}
		if data != "" {
			next[i].Data = []byte(data + e.Serial)
		}
	}
	if err := led.Commit(t.Context(), next); err != nil {
		t.Fatal(err)
	}
}

func TestJourney(t *testing.T) {
	line := newLine(t)
	led := line.open(t)
	job, events := begin(t, led, 450) // more than one statement's worth
	step(t, led, ledger.Minted, events, "certificate of ")
	step(t, led, ledger.Verified, events, "")
	step(t, led, ledger.Sealed, events, "")
	step(t, led, ledger.Exported, events, "")

	// What was committed is there for a fresh process.
	if err := led.Close(); err != nil {
		t.Fatal(err)
	}
	led = line.open(t)
	n := 0
	for u, err := range led.Units(t.Context(), job.ID) {
		if err != nil {
			t.Fatal(err)
		}
		if err := led.Fill(t.Context(), &u); err != nil {
			t.Fatal(err)
		}
		if u.State != ledger.Exported || string(u.Data) != "certificate of "+u.Serial || u.RegistrationID != fmt.Sprintf("Pump-%04d", n) {
			t.Fatalf("unit %d is %+v with data %q", n, u, u.Data)
		}
		n++
	}
	if n != len(events) {
		t.Fatalf("%d units, want %d", n, len(events))
	}
	report, err := led.Verify(t.Context(), line.key.Public())
	if err != nil {
		t.Fatal(err)
	}
	if report.Units != 450 || report.Entries != 1+450+450+1+1+1 || report.Jobs != 1 {
		t.Errorf("report %+v", report)
	}
	signed, err := led.Checkpoint(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ledger.OpenCheckpoint(signed, line.key.Public()); err != nil {
		t.Error(err)
	}
	other, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if _, err := ledger.OpenCheckpoint(signed, other.Public()); err == nil {
		t.Error("a checkpoint opened under another station's key")
	}
	if j, resumed, err := led.BeginJob(t.Context(), ledger.Job{Digest: hash("job")}); err != nil || !resumed || j.Out != "out" {
		t.Errorf("the job was not found again: %+v, %v, %v", j, resumed, err)
	}
}

// Invariant 1: a serial never has two live identities; a key never serves two devices.
func TestOneIdentity(t *testing.T) {
	line := newLine(t)
	led := line.open(t)
	job, events := begin(t, led, 3)
	fresh := ledger.Event{State: ledger.Begun, Job: job.ID, Serial: "new", RegistrationID: "new", KeyHash: hash("new")}
	for name, c := range map[string]struct {
		edit  func(*ledger.Event)
		field string
	}{
		"serial":          {func(e *ledger.Event) { e.Serial = "SN0001" }, "serial"},
		"registration ID": {func(e *ledger.Event) { e.RegistrationID = "PUMP-0001" }, "registration ID"},
		"key":             {func(e *ledger.Event) { e.KeyHash = hash("key1") }, "key"},
	} {
		e := fresh
		c.edit(&e)
		batch := []ledger.Event{{State: ledger.Begun, Job: job.ID, Serial: "ok", RegistrationID: "ok", KeyHash: hash("ok")}, e}
		err := led.Commit(t.Context(), batch)
		var dup *ledger.DuplicateError
		if !errors.As(err, &dup) || dup.Field != c.field || dup.Unit.ID != events[1].Unit || dup.Job.Profile != "x509-group" {
			t.Errorf("%s: got %v", name, err)
		}
		if _, err := led.Find(t.Context(), "ok"); !errors.Is(err, ledger.ErrNotFound) {
			t.Errorf("%s: half of a refused step was kept: %v", name, err)
		}
	}
	// A voided unit frees its serial and its registration ID, and never its key.
	if err := led.Commit(t.Context(), []ledger.Event{{State: ledger.Voided, Unit: events[1].Unit, Data: []byte("lost")}}); err != nil {
		t.Fatal(err)
	}
	again := []ledger.Event{{State: ledger.Begun, Job: job.ID, Serial: "SN0001", RegistrationID: "Pump-0001", KeyHash: hash("key1")}}
	if err := led.Commit(t.Context(), again); err == nil || !strings.Contains(err.Error(), "voided") {
		t.Errorf("a voided key was taken again: %v", err)
	}
	again[0].KeyHash = hash("another")
	if err := led.Commit(t.Context(), again); err != nil {
		t.Fatal(err)
	}
	if _, err := led.Verify(t.Context(), line.key.Public()); err != nil {
		t.Error(err)
	}
	// States cannot be skipped or taken twice, and what has left the factory is not voided.
	if err := led.Commit(t.Context(), []ledger.Event{{State: ledger.Verified, Unit: events[0].Unit}}); err == nil {
		t.Error("a unit was verified before it was minted")
	}
	step(t, led, ledger.Minted, events[:1], "c")
	step(t, led, ledger.Verified, events[:1], "")
	step(t, led, ledger.Sealed, events[:1], "")
	step(t, led, ledger.Exported, events[:1], "")
	if err := led.Commit(t.Context(), []ledger.Event{{State: ledger.Voided, Unit: events[0].Unit}}); err == nil {
		t.Error("an exported unit was voided")
	}
}

// Invariant 7: no byte of a ledger can change unnoticed.
func TestTampering(t *testing.T) {
	for name, statement := range map[string]string{
		"serial":            `UPDATE units SET serial = 'SNX' WHERE id = 2`,
		"registration ID":   `UPDATE units SET registration_id = 'other' WHERE id = 2`,
		"key":               `UPDATE units SET key_hash = zeroblob(32) WHERE id = 2`,
		"state back":        `UPDATE units SET state = 1 WHERE id = 2`,
		"unit gone":         `DELETE FROM units WHERE id = 3`,
		"unit added":        `INSERT INTO units SELECT id + 100, serial || 'x', registration_id || 'x', NULL, NULL, state, job, at, leaf, revision FROM units WHERE id = 1`,
		"other entry":       `UPDATE units SET leaf = leaf - 5 WHERE id = 2`,
		"entries' content":  `UPDATE log SET leaves = CAST(replace(CAST(leaves AS BLOB), CAST('SN0001' AS BLOB), CAST('SN0009' AS BLOB)) AS BLOB) WHERE first = 3`,
		"stored hash":       `UPDATE log SET hashes = zeroblob(length(hashes)) WHERE first = 1`,
		"last entries gone": `DELETE FROM log WHERE first = (SELECT max(first) FROM log)`,
		"first entries":     `DELETE FROM log WHERE first = 0`,
		"checkpoint":        `UPDATE checkpoint SET note = replace(note, 'line-3', 'line-4')`,
		"no checkpoint":     `DELETE FROM checkpoint`,
		"job":               `UPDATE jobs SET profile = 'other'`,
		"job gone":          `DELETE FROM jobs`,
		"state on":          `UPDATE units SET state = 5 WHERE id = 2`,
		"state of a range":  `UPDATE units SET state = 2 WHERE id = 1`,
		"another job":       `UPDATE units SET job = 77 WHERE id = 2`,
		"another time":      `UPDATE units SET at = 0 WHERE id = 2`,
		"retired gone":      `DELETE FROM retired WHERE id = 5`,
		"retired added":     `INSERT INTO retired SELECT id + 100, serial || 'x', registration_id || 'x', NULL, NULL, state, job, at, leaf, revision, was, ending FROM retired WHERE id = 5`,
		"retired key":       `UPDATE retired SET key_hash = NULL WHERE id = 5`,
		"retired alive":     `UPDATE retired SET state = 16 WHERE id = 6`,
		"retired why":       `UPDATE retired SET ending = ending - 1 WHERE id = 5`,
		"retired was":       `UPDATE retired SET was = 3 WHERE id = 5`,
		"revision":          `UPDATE units SET revision = 7 WHERE id = 1`,
		"quantity":          `UPDATE grants SET quantity = 1000000`,
		"spent":             `UPDATE grants SET spent = 0`,
		"leased":            `UPDATE grants SET leased = 0`,
		"window":            `UPDATE grants SET ends = ends + 1`,
		"grant closed":      `UPDATE grants SET closed = 1`,
		"grant gone":        `DELETE FROM grants`,
		"grant's document":  `UPDATE documents SET document = x'00'`,
		"document gone":     `DELETE FROM documents`,
		"document added":    `INSERT INTO documents VALUES ('PO-9', x'00')`,
		"lease":             `UPDATE leases SET quantity = 1`,
		"lease back":        `UPDATE leases SET used = 0`,
		"lease's document":  `UPDATE leases SET document = x'00'`,
		"lease gone":        `DELETE FROM leases`,
		"note":              `UPDATE notes SET data = x'00'`,
		"note moved":        `UPDATE notes SET unit = 3`,
		"note gone":         `DELETE FROM notes`,
		"job's grant":       `UPDATE jobs SET grant_id = ''`,
		"operator":          `UPDATE jobs SET operator = 'somebody else'`,
		"anchor":            `UPDATE meta SET value = '1' WHERE name = 'anchor'`,
		"anchor gone":       `DELETE FROM meta WHERE name = 'anchor'`,
		"next unit":         `UPDATE meta SET value = '1' WHERE name = 'units'`,
		"next unit gone":    `DELETE FROM meta WHERE name = 'units'`,
	} {
		t.Run(name, func(t *testing.T) {
			line := newLine(t)
			led := line.open(t)
			led = lived(t, line, led)
			if _, err := led.Verify(t.Context(), line.key.Public()); err != nil {
				t.Fatal(err)
			}
			if err := led.Close(); err != nil {
				t.Fatal(err)
			}
			tamper(t, line.cfg.Path, statement)
			view, err := ledger.View(t.Context(), line.cfg.Path)
			if err != nil {
				t.Fatal(err)
			}
			defer view.Close()
			if _, err := view.Verify(t.Context(), line.key.Public()); !errors.Is(err, ledger.ErrDamaged) {
				t.Errorf("not noticed: %v", err)
			}
		})
	}
}

// What a ledger declares is part of it: without its index a serial could be there twice, and a trigger changes what is to come.
func TestForeignSchema(t *testing.T) {
	for _, statement := range []string{
		`CREATE TRIGGER t AFTER INSERT ON units BEGIN UPDATE grants SET spent = 0; END`,
		`DROP INDEX retired_serial`, `CREATE TABLE more (x)`, `CREATE VIEW v AS SELECT * FROM units`, `ALTER TABLE jobs ADD COLUMN more TEXT`,
	} {
		line := newLine(t)
		led := line.open(t)
		begin(t, led, 2)
		if err := led.Close(); err != nil {
			t.Fatal(err)
		}
		tamper(t, line.cfg.Path, statement)
		if _, err := line.open(t).Verify(t.Context(), line.key.Public()); !errors.Is(err, ledger.ErrDamaged) {
			t.Errorf("%s: %v", statement, err)
		}
	}
}

// tamper changes a closed ledger behind touchmark's back.
func tamper(t *testing.T, path, statement string) {
	t.Helper()
	db, err := sql.Open("sqlite", path)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	res, err := db.Exec(statement)
	if err != nil {
		t.Fatal(err)
	}
	if n, _ := res.RowsAffected(); n == 0 && !strings.Contains(statement, " TABLE ") && !strings.HasPrefix(statement, "CREATE") && !strings.HasPrefix(statement, "DROP") {
		t.Fatalf("%s changed nothing", statement)
	}
}

// lived makes a ledger in which everything has happened that can, and returns it open.
func lived(t *testing.T, line *line, led *ledger.Ledger) *ledger.Ledger {
	t.Helper()
	counter := &counter{}
	if err := led.Anchor(t.Context(), counter); err != nil {
		t.Fatal(err)
	}
	if err := led.Close(); err != nil {
		t.Fatal(err)
	}
	line.cfg.Anchor = counter
	led = line.open(t)
	grant := take(t, line, led, 10)
	job, _, err := led.BeginJob(t.Context(), ledger.Job{Digest: hash("job"), Profile: "x509-group", Out: "out", Grant: grant.ID, Operator: "mai"})
	if err != nil {
		t.Fatal(err)
	}
	events := made(job, 6)
	if err := led.Commit(t.Context(), events); err != nil {
		t.Fatal(err)
	}
	step(t, led, ledger.Minted, events, "certificate of ")
	step(t, led, ledger.Verified, events[:4], "")
	end(t, led, ledger.Voided, events[4].Unit)
	end(t, led, ledger.Scrapped, events[5].Unit)
	if err := led.CutLease(t.Context(), ledger.Lease{ID: "L1", Grant: grant.ID, Document: []byte("lease"), Quantity: 3}); err != nil {
		t.Fatal(err)
	}
	if _, err := led.AddNote(t.Context(), ledger.Note{Unit: 2, Kind: "reprint", Data: []byte("{}")}); err != nil {
		t.Fatal(err)
	}
	return led
}

// An endorsement key stands for one living unit; a voided unit's TPM is free again, and the table must say what the log says.
func TestEndorsement(t *testing.T) {
	line := newLine(t)
	led := line.open(t)
	job, _, err := led.BeginJob(t.Context(), ledger.Job{Digest: make([]byte, 32), Profile: "tpm"})
	if err != nil {
		t.Fatal(err)
	}
	event := func(serial string, ek byte) ledger.Event {
		return ledger.Event{State: ledger.Begun, Job: job.ID, Serial: serial, RegistrationID: serial, EKHash: bytes.Repeat([]byte{ek}, 32), Data: []byte("plan")}
	}
	first := []ledger.Event{event("SN1", 1), event("SN2", 2)}
	if err := led.Commit(t.Context(), first); err != nil {
		t.Fatal(err)
	}
	var dup *ledger.DuplicateError
	if err := led.Commit(t.Context(), []ledger.Event{event("SN3", 3), event("SN4", 1)}); !errors.As(err, &dup) || dup.Field != "endorsement key" || dup.Unit.Serial != "SN1" {
		t.Errorf("one TPM in two devices: %v", err)
	}
	if err := led.Commit(t.Context(), []ledger.Event{event("SN3", 3), event("SN4", 3)}); err == nil || !strings.Contains(err.Error(), "SN3 and SN4 have one endorsement key") {
		t.Errorf("one TPM twice in a step: %v", err)
	}
	u, err := led.Find(t.Context(), "SN2")
	if err != nil || !bytes.Equal(u.EKHash, first[1].EKHash) {
		t.Errorf("%x, %v", u.EKHash, err)
	}
	if err := led.Commit(t.Context(), []ledger.Event{{State: ledger.Voided, Unit: first[0].Unit}}); err != nil {
		t.Fatal(err)
	}
	if err := led.Commit(t.Context(), []ledger.Event{event("SN1", 1)}); err != nil {
		t.Errorf("the device begins anew: %v", err)
	}
	if _, err := led.Verify(t.Context(), line.key.Public()); err != nil {
		t.Error(err)
	}
	if err := led.Close(); err != nil {
		t.Fatal(err)
	}
	for _, statement := range []string{
		`UPDATE endorsements SET unit = unit + 7 WHERE unit = 2`, `DELETE FROM endorsements WHERE unit = 2`,
		`INSERT INTO endorsements (ek_hash, unit) VALUES (zeroblob(32), 99)`, `UPDATE endorsements SET ek_hash = zeroblob(32) WHERE unit = 2`,
	} {
		b, err := os.ReadFile(line.cfg.Path)
		if err != nil {
			t.Fatal(err)
		}
		db, err := sql.Open("sqlite", line.cfg.Path)
		if err != nil {
			t.Fatal(err)
		}
		if res, err := db.Exec(statement); err != nil {
			t.Fatal(err)
		} else if n, _ := res.RowsAffected(); n != 1 {
			t.Fatalf("%s changed %d rows", statement, n)
		}
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}
		view, err := ledger.View(t.Context(), line.cfg.Path)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := view.Verify(t.Context(), line.key.Public()); !errors.Is(err, ledger.ErrDamaged) {
			t.Errorf("%s: %v", statement, err)
		}
		if err := view.Close(); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(line.cfg.Path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func TestClock(t *testing.T) {
	line := newLine(t)
	led := line.open(t)
	_, events := begin(t, led, 2)
	line.now = line.now.Add(-time.Second) // a time service's correction
	step(t, led, ledger.Minted, events, "c")
	line.now = line.now.Add(-time.Hour)
	if err := led.CheckClock(); !errors.Is(err, ledger.ErrClock) {
		t.Errorf("CheckClock: %v", err)
	}
	if err := led.Commit(t.Context(), []ledger.Event{{State: ledger.Verified, Unit: events[0].Unit}}); !errors.Is(err, ledger.ErrClock) {
		t.Errorf("Commit: %v", err)
	}
	// A fresh process remembers.
	if err := led.Close(); err != nil {
		t.Fatal(err)
	}
	if err := line.open(t).CheckClock(); !errors.Is(err, ledger.ErrClock) {
		t.Errorf("after reopening: %v", err)
	}
}

func TestOneWriter(t *testing.T) {
	line := newLine(t)
	led := line.open(t)
	if _, err := ledger.Open(t.Context(), line.cfg); !errors.Is(err, filelock.ErrLocked) {
		t.Errorf("second writer: %v", err)
	}
	view, err := ledger.View(t.Context(), line.cfg.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer view.Close()
	begin(t, led, 2)
	if counts, err := view.Counts(t.Context()); err != nil || counts[ledger.Begun] != 2 {
		t.Errorf("reader beside the writer sees %v, %v", counts, err)
	}
	if err := view.Commit(t.Context(), []ledger.Event{{State: ledger.Begun, Serial: "s", RegistrationID: "r"}}); err == nil {
		t.Error("a reader wrote")
	}
}

func TestCancelledCommitLeavesNothing(t *testing.T) {
	line := newLine(t)
	led := line.open(t)
	begin(t, led, 1)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	err := led.Commit(ctx, []ledger.Event{{State: ledger.Begun, Job: 1, Serial: "late", RegistrationID: "late"}})
	if err == nil {
		t.Fatal("committed under a cancelled context")
	}
	if _, err := led.Find(t.Context(), "late"); !errors.Is(err, ledger.ErrNotFound) {
		t.Errorf("found: %v", err)
	}
	if _, err := led.Verify(t.Context(), line.key.Public()); err != nil {
		t.Error(err)
	}
}

func BenchmarkCommit(b *testing.B) {
	key, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	cfg := ledger.Config{Path: filepath.Join(b.TempDir(), "l.db"), Origin: "bench", Signer: key}
	if err := ledger.Create(b.Context(), cfg); err != nil {
		b.Fatal(err)
	}
	led, err := ledger.Open(b.Context(), cfg)
	if err != nil {
		b.Fatal(err)
	}
	defer led.Close()
	if _, _, err := led.BeginJob(b.Context(), ledger.Job{Digest: hash("job"), Profile: "bench"}); err != nil {
		b.Fatal(err)
	}
	const group = 1000
	n := 0
	for b.Loop() {
		events := make([]ledger.Event, group)
		for i := range events {
			n++
			s := fmt.Sprintf("SN%08d", n)
			events[i] = ledger.Event{State: ledger.Minted, Job: 1, Serial: s, RegistrationID: "pump-" + s, KeyHash: hash(s)}
		}
		if err := led.Commit(b.Context(), events); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(n), "ns/unit")
}
