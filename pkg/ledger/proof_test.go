package ledger_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	mathrand "math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/ledger"
)

// certificate makes some certificate.
func certificate(t testing.TB, key *ecdsa.PrivateKey) []byte {
	t.Helper()
	c := &x509.Certificate{SerialNumber: big.NewInt(7), NotBefore: time.Unix(0, 0), NotAfter: time.Unix(1e9, 0)}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func prove(t *testing.T, line *line, led *ledger.Ledger, serial string) ([]byte, ledger.Statement) {
	t.Helper()
	p, err := led.Prove(t.Context(), serial)
	if err != nil {
		t.Fatal(err)
	}
	b, err := p.Encode()
	if err != nil {
		t.Fatal(err)
	}
	st, err := ledger.VerifyProof(b, line.key.Public())
	if err != nil {
		t.Fatalf("%v\n%s", err, b)
	}
	return b, st
}

// tell renders what a statement says of units.
func tell(st ledger.Statement) string {
	var b strings.Builder
	for _, u := range st.Units {
		fmt.Fprintf(&b, "%s r%d %s:", u.RegistrationID, u.Revision, u.State)
		for _, s := range u.Steps {
			fmt.Fprintf(&b, " %s@%d", s.State, s.Entry)
		}
		if u.Ending != nil {
			fmt.Fprintf(&b, " because %s", u.Ending.Reason)
		}
		b.WriteByte(';')
	}
	return b.String()
}

func TestProve(t *testing.T) {
	line := newLine(t)
	led := line.open(t)
	job, events := begin(t, led, 450)
	line.now = line.now.Add(time.Hour)
	cert := certificate(t, line.key)
	minted := make([]ledger.Event, len(events))
	for i, e := range events {
		minted[i] = ledger.Event{State: ledger.Minted, Unit: e.Unit, Serial: e.Serial, RegistrationID: e.RegistrationID, Data: append(bytes.Clone(cert), `{"evidence":1}`...)}
	}
	if err := led.Commit(t.Context(), minted); err != nil {
		t.Fatal(err)
	}
	step(t, led, ledger.Verified, events[:300], "")
	step(t, led, ledger.Verified, events[300:], "")
	middle, err := led.Checkpoint(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	line.now = line.now.Add(time.Hour)
	step(t, led, ledger.Exported, events[:400], "")
	if err := led.Commit(t.Context(), []ledger.Event{{State: ledger.Exported, Unit: events[7].Unit, Data: []byte("bundle-2")}}); err != nil {
		t.Fatal(err)
	}
	end(t, led, ledger.Reworked, events[7].Unit)
	end(t, led, ledger.Voided, events[449].Unit)
	again := []ledger.Event{{State: ledger.Minted, Job: job.ID, Serial: "SN0007", RegistrationID: "pump-7b", KeyHash: hash("7b")}}
	if err := led.Commit(t.Context(), again); err != nil {
		t.Fatal(err)
	}
	end(t, led, ledger.Scrapped, again[0].Unit)
	end(t, led, ledger.Returned, again[0].Unit)

	for serial, want := range map[string]string{
		"SN0000": "Pump-0000 r0 exported: begun@1 minted@451 verified@901 exported@903;",
		"SN0007": "Pump-0007 r0 reworked: begun@8 minted@458 verified@901 exported@903 exported@904 reworked@905 because damaged;" +
			"pump-7b r1 returned: minted@907 scrapped@908 returned@909 because damaged;",
		"SN0299": "Pump-0299 r0 exported: begun@300 minted@750 verified@901 exported@903;",
		"SN0300": "Pump-0300 r0 exported: begun@301 minted@751 verified@902 exported@903;",
		"SN0449": "Pump-0449 r0 voided: begun@450 minted@900 verified@902 voided@906 because damaged;",
	} {
		_, st := prove(t, line, led, serial)
		if got := tell(st); got != want {
			t.Errorf("%s\n got %s\nwant %s", serial, got, want)
		}
		if st.Serial != serial || st.Checkpoint.Size != 910 || st.Checkpoint.Origin != "touchmark/line-3" {
			t.Errorf("%s: %+v", serial, st)
		}
	}
	b, st := prove(t, line, led, "SN0007")
	u := st.Units[0]
	if !bytes.Equal(u.Certificate, cert) || u.KeyHash != fmt.Sprintf("%x", hash("key7")) || u.Steps[4].Bundle != "bundle-2" ||
		u.Steps[1].At.Sub(u.Steps[0].At) != time.Hour || st.Units[1].Certificate != nil || u.Ending.Operator != "mai" {
		t.Errorf("%+v", st)
	}
	if _, err := led.Prove(t.Context(), "nobody"); !errors.Is(err, ledger.ErrNotFound) {
		t.Errorf("an unknown serial: %v", err)
	}

	// Under an older checkpoint there is what there was.
	p, err := led.ProveAt(t.Context(), "SN0007", middle)
	if err != nil {
		t.Fatal(err)
	}
	old, err := p.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if st, err := ledger.VerifyProof(old, line.key.Public()); err != nil || tell(st) != "Pump-0007 r0 verified: begun@8 minted@458 verified@901;" || st.Checkpoint.Size != 903 {
		t.Errorf("%s, %v", tell(st), err)
	}

	// Another station's, and another ledger's under the same key.
	other := newLine(t)
	if _, err := ledger.VerifyProof(b, other.key.Public()); !errors.Is(err, ledger.ErrStation) {
		t.Errorf("another station's key: %v", err)
	}

	// What was put together otherwise does not hold.
	for name, edit := range map[string]func(*ledger.Proof){
		"another serial":   func(p *ledger.Proof) { p.Serial = "SN0008" },
		"no begin":         func(p *ledger.Proof) { p.Entries = p.Entries[1:] },
		"nothing":          func(p *ledger.Proof) { p.Entries = []ledger.ProofEntry{} },
		"null":             func(p *ledger.Proof) { p.Entries = nil },
		"no path":          func(p *ledger.Proof) { p.Entries[0].Path = nil },
		"out of order":     func(p *ledger.Proof) { p.Entries[1], p.Entries[2] = p.Entries[2], p.Entries[1] },
		"twice":            func(p *ledger.Proof) { p.Entries = append(p.Entries, p.Entries[len(p.Entries)-1]) },
		"an entry's octet": func(p *ledger.Proof) { p.Entries[1].Entry[60] ^= 1 },
		"an index":         func(p *ledger.Proof) { p.Entries[1].Index++ },
		"negative index":   func(p *ledger.Proof) { p.Entries[0].Index = -5 },
		"beyond":           func(p *ledger.Proof) { p.Entries[len(p.Entries)-1].Index = 910 },
		"a longer path":    func(p *ledger.Proof) { p.Entries[0].Path = append(p.Entries[0].Path, p.Entries[0].Path[0]) },
		"format":           func(p *ledger.Proof) { p.Format = "touchmark/ledger-proof/2" },
		"old checkpoint":   func(p *ledger.Proof) { p.Checkpoint = string(middle) },
		"a line twice":     func(p *ledger.Proof) { p.Checkpoint += p.Checkpoint[strings.Index(p.Checkpoint, "—"):] },
		"no checkpoint":    func(p *ledger.Proof) { p.Checkpoint = "" },
	} {
		var p ledger.Proof
		if err := json.Unmarshal(b, &p); err != nil {
			t.Fatal(err)
		}
		edit(&p)
		bad, err := p.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ledger.VerifyProof(bad, line.key.Public()); !errors.Is(err, ledger.ErrProof) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// It can be silent, as it says itself: without its last entries the unit looks alive.
	var silent ledger.Proof
	if err := json.Unmarshal(b, &silent); err != nil {
		t.Fatal(err)
	}
	silent.Entries = silent.Entries[:3]
	short, err := silent.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if st, err := ledger.VerifyProof(short, line.key.Public()); err != nil || st.Units[0].State != ledger.Verified {
		t.Errorf("%+v, %v", st, err)
	}
	// Every other octet is refused, and every other form of the same.
	for i := range b {
		bad := bytes.Clone(b)
		bad[i] ^= 1 << mathrand.IntN(8)
		if st, err := ledger.VerifyProof(bad, line.key.Public()); err == nil {
			t.Fatalf("octet %d of %s changed: %+v", i, bad, st)
		}
	}
	for name, bad := range map[string][]byte{
		"space": append([]byte(" "), b...), "no newline": b[:len(b)-1], "more": append(bytes.Clone(b), '\n'), "twice": append(bytes.Clone(b), b...),
		"upper case":     bytes.Replace(b, []byte(`"serial"`), []byte(`"Serial"`), 1),
		"member twice":   bytes.Replace(b, []byte(`{"format"`), []byte(`{"serial":"x","format"`), 1),
		"another member": bytes.Replace(b, []byte(`{"format"`), []byte(`{"more":1,"format"`), 1),
		"too long":       bytes.Repeat([]byte(" "), 5<<20),
	} {
		if _, err := ledger.VerifyProof(bad, line.key.Public()); !errors.Is(err, ledger.ErrProof) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A serial that the table has and the log does not, or otherwise, is damage and not a proof.
func TestProveDamaged(t *testing.T) {
	for _, statement := range []string{
		`UPDATE units SET serial = 'SNX' WHERE id = 2`,
		`UPDATE log SET leaves = CAST(replace(CAST(leaves AS BLOB), CAST('Pump-0001' AS BLOB), CAST('Pump-0009' AS BLOB)) AS BLOB) WHERE first = 1`,
		`UPDATE log SET hashes = zeroblob(length(hashes)) WHERE first = 1`,
		`UPDATE log SET hashes = x'00' WHERE first = 1`,
		`DELETE FROM log WHERE first > 1`,
		`UPDATE checkpoint SET note = 'nothing'`,
		`DELETE FROM checkpoint`,
	} {
		line := newLine(t)
		led := line.open(t)
		_, events := begin(t, led, 3)
		step(t, led, ledger.Minted, events, "c")
		_ = led.Close()
		tamper(t, line.cfg.Path, statement)
		view, err := ledger.View(t.Context(), line.cfg.Path)
		if err != nil {
			t.Fatal(err)
		}
		serial := "SN0001"
		if strings.Contains(statement, "SNX") {
			serial = "SNX"
		}
		_, err = view.Prove(t.Context(), serial)
		if !errors.Is(err, ledger.ErrDamaged) && !(serial == "SNX" && errors.Is(err, ledger.ErrNotFound)) {
			t.Errorf("%s: %v", statement, err)
		}
		_ = view.Close()
	}
}

func TestEntries(t *testing.T) {
	line := newLine(t)
	led := lived(t, line, line.open(t))
	var kinds []string
	var last ledger.Entry
	for e, err := range led.Entries(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		if e.Index != last.Index+1 && e.Index != 0 || e.At.IsZero() || reflect.ValueOf(e.Hash).IsZero() {
			t.Errorf("%+v", e)
		}
		last = e
		kinds = append(kinds, e.Kind.String())
		switch b, _ := json.Marshal(e); e.Kind.String() {
		case "grant":
			if e.Grant != "PO-1" || e.Quantity != 10 || !e.Opens.Equal(line.now) || !e.Ends.Equal(line.now.Add(24*time.Hour)) || e.Digest != fmt.Sprintf("%x", hash("signed")) {
				t.Errorf("%s", b)
			}
		case "job":
			if e.Operator != "mai" || e.Out != "out" || e.Profile != "x509-group" || e.Grant != "PO-1" || e.Digest != fmt.Sprintf("%x", hash("job")) {
				t.Errorf("%s", b)
			}
		case "lease":
			if e.Lease != "L1" || e.Grant != "PO-1" || e.Quantity != 3 || e.Digest != fmt.Sprintf("%x", hash("lease")) || e.Data != nil {
				t.Errorf("%s", b)
			}
		case "scrapped":
			if e.Ending == nil || e.Ending.Reason != "damaged" || e.Serial != "SN0005" || e.Data != nil {
				t.Errorf("%s", b)
			}
		case "verified":
			if e.Unit != 1 || e.Count != 4 || e.Serial != "" {
				t.Errorf("%s", b)
			}
		case "minted": // what is no certificate stays as it is
			if e.Certificate != nil || string(e.Data) != "certificate of "+e.Serial {
				t.Errorf("%s", b)
			}
		case "note":
			if e.Unit != 2 || e.Note != "reprint" || string(e.Data) != "{}" {
				t.Errorf("%s", b)
			}
		case "anchor":
			if e.Counter > 2 || e.Data != nil {
				t.Errorf("%s", b)
			}
		}
	}
	want := "[anchor grant job anchor begun begun begun begun begun begun minted minted minted minted minted minted verified voided scrapped lease anchor note]"
	if got := fmt.Sprint(kinds); got != want {
		t.Errorf("\n got %s\nwant %s", got, want)
	}
	for range led.Entries(t.Context()) {
		break
	}
	verify(t, line, led) // the connection is free again
}

// copyLedger copies a closed ledger and returns the copy's line.
func copyLedger(t *testing.T, l *line) *line {
	t.Helper()
	b, err := os.ReadFile(l.cfg.Path)
	if err != nil {
		t.Fatal(err)
	}
	c := *l
	c.cfg.Path = filepath.Join(t.TempDir(), "copy.db")
	if err := os.WriteFile(c.cfg.Path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return &c
}

func checkpoint(t testing.TB, line *line, led *ledger.Ledger) ledger.Checkpoint {
	t.Helper()
	signed, err := led.Checkpoint(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	c, err := ledger.OpenCheckpoint(signed, line.key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// note adds an entry that says something.
func note(t testing.TB, led *ledger.Ledger, text string) {
	t.Helper()
	if _, err := led.AddNote(t.Context(), ledger.Note{Kind: "test", Data: []byte(text)}); err != nil {
		t.Fatal(err)
	}
}

// Every checkpoint that a ledger ever had is extended by those after it, and none other is.
func TestConsistency(t *testing.T) {
	line := newLine(t)
	led := line.open(t)
	var all []ledger.Checkpoint
	for i := range 40 {
		note(t, led, fmt.Sprint(i))
		all = append(all, checkpoint(t, line, led))
		for _, old := range all {
			c, err := led.Consistency(t.Context(), old)
			if err != nil {
				t.Fatal(err)
			}
			c, err = ledger.ParseConsistency(c.Encode())
			if err != nil {
				t.Fatal(err)
			}
			if newer, err := ledger.CheckConsistency(old, c, line.key.Public()); err != nil || newer != all[i] {
				t.Fatalf("%+v to %+v: %v", old, newer, err)
			}
			if old.Size == int64(i+1) {
				continue
			}
			other := old
			other.Root = all[i].Root
			if _, err := ledger.CheckConsistency(other, c, line.key.Public()); !errors.Is(err, ledger.ErrForked) {
				t.Fatalf("another root of %d entries: %v", old.Size, err)
			}
			if len(c.Proof) > 0 {
				c.Proof[mathrand.IntN(len(c.Proof))][3] ^= 1
				if _, err := ledger.CheckConsistency(old, c, line.key.Public()); !errors.Is(err, ledger.ErrForked) {
					t.Fatalf("another proof from %d entries: %v", old.Size, err)
				}
			}
		}
	}
	c, err := led.Consistency(t.Context(), all[9])
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ledger.CheckConsistency(all[8], c, line.key.Public()); !errors.Is(err, ledger.ErrProof) {
		t.Errorf("a proof from 10 entries for 9: %v", err)
	}
	longer := ledger.Checkpoint{Origin: all[0].Origin, Size: 41, Root: all[0].Root}
	if _, err := led.Consistency(t.Context(), longer); !errors.Is(err, ledger.ErrRolledBack) || !strings.Contains(err.Error(), "has 40 entries, and had 41") {
		t.Errorf("a longer one: %v", err)
	}
	if _, err := ledger.CheckConsistency(longer, c, line.key.Public()); !errors.Is(err, ledger.ErrRolledBack) {
		t.Errorf("a longer one: %v", err)
	}
	if _, err := led.Consistency(t.Context(), ledger.Checkpoint{Origin: all[0].Origin, Size: 40, Root: all[0].Root}); !errors.Is(err, ledger.ErrForked) {
		t.Errorf("another of the same size: %v", err)
	}
	if _, err := led.Consistency(t.Context(), ledger.Checkpoint{Origin: "other", Size: 1, Root: all[0].Root}); !errors.Is(err, ledger.ErrOrigin) {
		t.Errorf("another ledger's: %v", err)
	}
	if _, err := led.Consistency(t.Context(), ledger.Checkpoint{Origin: all[0].Origin, Size: 1, Root: "x"}); err == nil {
		t.Error("a root that is none was taken")
	}
	if _, err := ledger.CheckConsistency(all[9], c, newLine(t).key.Public()); !errors.Is(err, ledger.ErrStation) {
		t.Errorf("another station's: %v", err)
	}
}

// Two copies are told apart at the first entry that differs, wherever that is and however far each went on.
func TestCompare(t *testing.T) {
	line := newLine(t)
	led := line.open(t)
	compare := func(a, b *ledger.Ledger) ledger.Comparison {
		t.Helper()
		c, err := ledger.Compare(t.Context(), a, b)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	for i := range 70 {
		note(t, led, fmt.Sprint(i))
		if i%9 != 0 && i != 63 && i != 62 {
			continue
		}
		if err := led.Close(); err != nil {
			t.Fatal(err)
		}
		other := copyLedger(t, line)
		led = line.open(t)
		size := int64(i + 1)
		twin := other.open(t)
		if c := compare(led, twin); c != (ledger.Comparison{Relation: ledger.Same, Size: size, Other: size, Fork: -1}) || c.Err() != nil {
			t.Fatalf("%+v", c)
		}
		for n := range int64(5) {
			note(t, twin, fmt.Sprint("twin", n))
			if c := compare(led, twin); c != (ledger.Comparison{Relation: ledger.Behind, Size: size, Other: size + n + 1, Fork: -1}) || !errors.Is(c.Err(), ledger.ErrRolledBack) {
				t.Fatalf("%+v", c)
			}
			if c := compare(twin, led); c.Relation != ledger.Ahead || c.Err() != nil {
				t.Fatalf("%+v", c)
			}
		}
		if _, err := led.Consistency(t.Context(), checkpoint(t, line, twin)); !errors.Is(err, ledger.ErrRolledBack) {
			t.Fatal(err)
		}
		// Now both go on.
		third := copyLedger(t, other) // before the twin's write-ahead log is folded back: as long as the first
		fork := third.open(t)
		for n := range int64(9) {
			note(t, fork, fmt.Sprint("fork", n))
			if c := compare(fork, twin); c != (ledger.Comparison{Relation: ledger.Forked, Size: size + n + 1, Other: size + 5, Fork: size}) || !errors.Is(c.Err(), ledger.ErrForked) {
				t.Fatalf("%+v, want a fork at %d", c, size)
			}
		}
		if _, err := fork.Consistency(t.Context(), checkpoint(t, line, twin)); !errors.Is(err, ledger.ErrForked) {
			t.Fatal(err)
		}
		if _, err := twin.Consistency(t.Context(), checkpoint(t, line, fork)); !errors.Is(err, ledger.ErrRolledBack) {
			t.Fatal(err) // by its size alone it could be
		}
		// Neither is damaged in itself: it takes both, or a witness, to see it.
		verify(t, line, fork)
		verify(t, line, twin)
	}
	empty := newLine(t)
	e := empty.open(t)
	if c := compare(e, led); c.Relation != ledger.Behind || c.Size != 0 {
		t.Errorf("an empty one: %+v", c)
	}
	if _, err := e.Consistency(t.Context(), checkpoint(t, line, led)); !errors.Is(err, ledger.ErrRolledBack) {
		t.Errorf("an empty one: %v", err)
	}
	if _, err := e.Prove(t.Context(), "SN0001"); !errors.Is(err, ledger.ErrNotFound) {
		t.Errorf("an empty one: %v", err)
	}
	foreign := newLine(t)
	foreign.cfg.Path += "2"
	foreign.cfg.Origin = "touchmark/line-4"
	if err := ledger.Create(t.Context(), foreign.cfg); err != nil {
		t.Fatal(err)
	}
	f := foreign.open(t)
	note(t, f, "x")
	if _, err := ledger.Compare(t.Context(), led, f); !errors.Is(err, ledger.ErrOrigin) {
		t.Errorf("another line's ledger: %v", err)
	}
}

// Invariant 7, on the file itself: change, cut or lengthen it anywhere, and it does not verify, or it says what it said before (of
// some octets SQLite makes no use).
func TestDamagedFile(t *testing.T) {
	line := newLine(t)
	led := lived(t, line, line.open(t))
	dump := func(led *ledger.Ledger) string {
		var b strings.Builder
		for e, err := range led.Entries(t.Context()) {
			j, _ := json.Marshal(e)
			fmt.Fprintln(&b, string(j), err)
		}
		for u, err := range led.Units(t.Context(), 0) {
			fmt.Fprintln(&b, u, err)
		}
		for u, err := range led.Retired(t.Context(), "") {
			fmt.Fprintln(&b, u, err)
		}
		g, err := led.Grants(t.Context())
		fmt.Fprintln(&b, g, err)
		return b.String()
	}
	want := dump(led)
	if err := led.Close(); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(line.cfg.Path)
	if err != nil {
		t.Fatal(err)
	}
	check := func(what string, b []byte, harmless bool) {
		t.Helper()
		c := copyLedger(t, line)
		if err := os.WriteFile(c.cfg.Path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		view, err := ledger.View(t.Context(), c.cfg.Path)
		if err == nil {
			if _, err = view.Verify(t.Context(), line.key.Public()); err == nil && harmless && dump(view) == want {
				err = ledger.ErrDamaged
			}
			_ = view.Close()
		}
		if !errors.Is(err, ledger.ErrDamaged) && !errors.Is(err, ledger.ErrStation) && !(err != nil && strings.Contains(err.Error(), "ledger format")) {
			t.Errorf("%s: %v", what, err)
		}
	}
	for n := 0; n < 300; {
		i, bit := mathrand.IntN(len(whole)), mathrand.IntN(8)
		if i < 100 || whole[i] == 0 {
			continue // SQLite's header, some octets of which have it refuse the file in other words, and what is mostly free
		}
		n++
		b := bytes.Clone(whole)
		b[i] ^= 1 << bit
		check(fmt.Sprintf("octet %d, bit %d", i, bit), b, true)
	}
	for _, n := range []int{10, 100, 4096, 8192, len(whole) / 2, len(whole) - 4096, len(whole) - 1} {
		check(fmt.Sprintf("cut off at %d", n), whole[:n], false)
	}
	check("zeros", make([]byte, len(whole)), false)
}
