package ledger_test

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
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

func newWitness(t *testing.T, name string) (*ledger.Witness, ledger.WitnessKey) {
	t.Helper()
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return &ledger.Witness{Name: name, Key: key, State: filepath.Join(t.TempDir(), "state.json"), Now: func() time.Time { return time.Unix(1772352000, 0) }},
		ledger.WitnessKey{Name: name, Key: pub}
}

// since proves that the ledger extends what it had.
func since(t *testing.T, led *ledger.Ledger, old ledger.Checkpoint) []byte {
	t.Helper()
	c, err := led.Consistency(t.Context(), old)
	if err != nil {
		t.Fatal(err)
	}
	return c.Encode()
}

func TestWitness(t *testing.T) {
	line := newLine(t)
	led := line.open(t)
	station := line.key.Public()
	note(t, led, "one")
	first, err := led.Checkpoint(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	was := checkpoint(t, line, led)
	w, key := newWitness(t, "witness.example.com/w1")
	if _, err := w.Cosign(first, station, false); !errors.Is(err, ledger.ErrUnseen) {
		t.Errorf("an unknown ledger: %v", err)
	}
	if _, err := w.Cosign(first, newLine(t).key.Public(), true); !errors.Is(err, ledger.ErrStation) {
		t.Errorf("another station's: %v", err)
	}
	if _, err := os.Stat(w.State); err == nil {
		t.Error("a refusal left a state behind")
	}
	signed, err := w.Cosign(first, station, true)
	if err != nil {
		t.Fatal(err)
	}
	if c, err := ledger.OpenCheckpoint(signed, station); err != nil || c != was {
		t.Fatalf("a cosigned checkpoint: %+v, %v", c, err)
	}
	got, err := ledger.VerifyCosignatures(signed, []ledger.WitnessKey{key})
	if err != nil || len(got) != 1 || got[0].Witness != w.Name || !got[0].At.Equal(w.Now()) {
		t.Errorf("%+v, %v", got, err)
	}
	// The line is what C2SP tlog-cosignature says, put together here by hand.
	line1 := strings.TrimPrefix(strings.Split(strings.TrimSpace(string(signed)), "\n")[5], "— witness.example.com/w1 ")
	raw, err := base64.StdEncoding.DecodeString(line1)
	if err != nil || len(raw) != 4+8+64 {
		t.Fatalf("%q: %v", line1, err)
	}
	id := sha256.Sum256(append([]byte("witness.example.com/w1\n\x04"), key.Key...))
	message := fmt.Sprintf("cosignature/v1\ntime 1772352000\n%s\n%d\n%s\n", was.Origin, was.Size, was.Root)
	if !bytes.Equal(raw[:4], id[:4]) || binary.BigEndian.Uint64(raw[4:]) != 1772352000 || !ed25519.Verify(key.Key, []byte(message), raw[12:]) {
		t.Errorf("%x", raw)
	}

	// The same again is cosigned again, in the place of the line before; as new it is not.
	if again, err := w.Cosign(signed, station, false); err != nil || !bytes.Equal(again, signed) {
		t.Errorf("again: %q, %v", again, err)
	}
	if _, err := w.Cosign(first, station, true); err == nil || !strings.Contains(err.Error(), "not new") {
		t.Errorf("new twice: %v", err)
	}

	// It grows, and is cosigned with a proof from where the witness was, and only so.
	for i := range 5 {
		note(t, led, fmt.Sprint(i))
	}
	middle := checkpoint(t, line, led)
	skipped := since(t, led, was)
	bare, err := led.Checkpoint(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Cosign(bare, station, false); !errors.Is(err, ledger.ErrUnseen) || !strings.Contains(err.Error(), "saw 1 entries last") {
		t.Errorf("without a proof: %v", err)
	}
	if signed, err = w.Cosign(skipped, station, false); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Cosign(first, station, false); !errors.Is(err, ledger.ErrRolledBack) {
		t.Errorf("back to the first: %v", err)
	}
	if _, err := w.Cosign(skipped, station, false); err != nil {
		t.Errorf("the same with its proof: %v", err)
	}

	// A second witness adds its own line.
	w2, key2 := newWitness(t, "witness.example.org/w2")
	if signed, err = w2.Cosign(signed, station, true); err != nil {
		t.Fatal(err)
	}
	if got, err := ledger.VerifyCosignatures(signed, []ledger.WitnessKey{key2, key}); err != nil || len(got) != 2 {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := ledger.OpenCheckpoint(signed, station); err != nil {
		t.Error(err)
	}
	_, stranger := newWitness(t, "witness.example.com/w1") // the name alone makes no witness
	if got, err := ledger.VerifyCosignatures(signed, []ledger.WitnessKey{stranger}); err != nil || len(got) != 0 {
		t.Errorf("%+v, %v", got, err)
	}
	at := bytes.LastIndex(signed, []byte("w1 ")) + 20
	forged := bytes.Clone(signed)
	forged[at] ^= 1
	if got, err := ledger.VerifyCosignatures(forged, []ledger.WitnessKey{key}); err == nil {
		t.Errorf("a forged line: %+v", got)
	}

	// A fork, as long or longer, with or without a proof, is refused and changes nothing.
	if err := led.Close(); err != nil {
		t.Fatal(err)
	}
	state, err := os.ReadFile(w.State)
	if err != nil {
		t.Fatal(err)
	}
	backup := copyLedger(t, line)
	led = line.open(t)
	note(t, led, "goes on")
	if _, err := w.Cosign(since(t, led, middle), station, false); err != nil {
		t.Fatal(err)
	}
	seen := checkpoint(t, line, led)
	twin := backup.open(t)
	note(t, twin, "goes another way")
	bare, err = twin.Checkpoint(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Cosign(bare, station, false); !errors.Is(err, ledger.ErrForked) {
		t.Errorf("a fork of the same size: %v", err)
	}
	note(t, twin, "and on")
	proof := since(t, twin, middle)
	if _, err := w.Cosign(proof, station, false); !errors.Is(err, ledger.ErrUnseen) {
		t.Errorf("a fork, from before the fork: %v", err)
	}
	proof = bytes.Replace(proof, []byte(fmt.Sprintf("old %d\n", middle.Size)), []byte(fmt.Sprintf("old %d\n", seen.Size)), 1)
	if _, err := w.Cosign(proof, station, false); !errors.Is(err, ledger.ErrForked) {
		t.Errorf("a fork that says it is none: %v", err)
	}
	now, err := os.ReadFile(w.State)
	if err != nil || !bytes.Contains(now, []byte(seen.Root)) || bytes.Equal(now, state) {
		t.Errorf("%s, %v", now, err)
	}

	// Two at a time would race; what is no state is not guessed at; what cannot be written down is not cosigned.
	lock, err := filelock.Lock(w.State + ".lock")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Cosign(bare, station, false); !errors.Is(err, filelock.ErrLocked) {
		t.Errorf("two at a time: %v", err)
	}
	_ = lock.Close()
	for _, bad := range []string{"", "{}", "null", "null\n", string(now) + " ", strings.Replace(string(now), "size", "Size", 1), strings.Replace(string(now), `"root"`, `"x": 1, "root"`, 1)} {
		if err := os.WriteFile(w.State, []byte(bad), 0o600); err != nil {
			t.Fatal(err)
		}
		if signed, err := w.Cosign(first, station, true); err == nil {
			t.Errorf("state %q: %s", bad, signed)
		}
	}
}

// A proof proves what the ledger under its checkpoint says, and nothing else does.
func FuzzVerifyProof(f *testing.F) {
	line := newLine(f)
	led := line.open(f)
	begin(f, led, 5)
	p, err := led.Prove(f.Context(), "SN0003")
	if err != nil {
		f.Fatal(err)
	}
	b, err := p.Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{"format":"touchmark/ledger-proof/1","serial":"","checkpoint":"","entries":[]}` + "\n"))
	f.Fuzz(func(t *testing.T, got []byte) {
		if st, err := ledger.VerifyProof(got, line.key.Public()); err == nil && !bytes.Equal(got, b) {
			t.Fatalf("%q proves %+v", got, st)
		}
	})
}

// What parses has one form, a checkpoint alone apart.
func FuzzParseConsistency(f *testing.F) {
	line := newLine(f)
	led := line.open(f)
	begin(f, led, 5)
	old := checkpoint(f, line, led)
	note(f, led, "more")
	c, err := led.Consistency(f.Context(), old)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(c.Encode())
	f.Add(c.Checkpoint)
	f.Add([]byte("old 0\n\n"))
	f.Add([]byte("old 01\n\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := ledger.ParseConsistency(b)
		if err != nil {
			return
		}
		if bytes.HasPrefix(b, []byte("old ")) && !bytes.Equal(c.Encode(), b) {
			t.Fatalf("%q reads as %+v", b, c)
		}
		if newer, err := ledger.CheckConsistency(old, c, line.key.Public()); err == nil && newer.Size != 7 {
			t.Fatalf("%q extends to %+v", b, newer)
		}
	})
}
