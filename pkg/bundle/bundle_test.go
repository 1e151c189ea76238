package bundle_test

import (
	"archive/tar"
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/touchmark/touchmark/hsm/signed"
	"github.com/touchmark/touchmark/pkg/bundle"
	"github.com/touchmark/touchmark/pkg/dps"
)

func station(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func trust(k *ecdsa.PrivateKey) bundle.OpenConfig {
	return bundle.OpenConfig{Trusted: []crypto.PublicKey{k.Public()}}
}

func x509Entry(n int) *bundle.Entry {
	id := fmt.Sprintf("pump-%06d", n)
	return &bundle.Entry{Serial: "SN" + id, Individual: &dps.IndividualEnrollment{RegistrationID: id, Enrollment: dps.Enrollment{
		Attestation: &dps.Attestation{Type: dps.AttestationX509, X509: &dps.X509Attestation{ClientCertificates: &dps.X509Certificates{
			Primary: &dps.X509Certificate{Certificate: base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{byte(n), byte(n >> 8)}, 200))}}}},
	}}}
}

func x509Group() dps.Enrollment {
	return dps.Enrollment{Attestation: &dps.Attestation{Type: dps.AttestationX509, X509: &dps.X509Attestation{SigningCertificates: &dps.X509Certificates{
		Primary: &dps.X509Certificate{Certificate: "AAAA"}}}}}
}

func symmetricEntry(n int) *bundle.Entry {
	id := fmt.Sprintf("sensor-%06d", n)
	return &bundle.Entry{Serial: "SN" + id, Individual: &dps.IndividualEnrollment{RegistrationID: id, Enrollment: dps.Enrollment{
		Attestation: &dps.Attestation{Type: dps.AttestationSymmetricKey, SymmetricKey: &dps.SymmetricKeyAttestation{PrimaryKey: secretOf(n)}},
	}}}
}

func secretOf(n int) string {
	return base64.StdEncoding.EncodeToString(fmt.Appendf(nil, "secret key of number %011d", n))
}

func deviceEntry(n int) *bundle.Entry {
	return &bundle.Entry{Serial: fmt.Sprintf("SN\"%d", n), Device: &bundle.GroupDevice{RegistrationID: fmt.Sprintf("valve-%06d", n), Group: "valves", KeyHash: strings.Repeat("0a", 32)}}
}

func retiredEntry(n int) *bundle.Entry {
	return &bundle.Entry{Serial: fmt.Sprintf("SN\"%d", n), Revision: int64(n % 3), Retired: &bundle.RetiredDevice{RegistrationID: fmt.Sprintf("valve-%06d", n), Group: "valves",
		KeyHash: strings.Repeat("0b", 32), State: bundle.Reworked, Reason: "radio dead", At: time.Unix(1767225600, 0).UTC()}}
}

// grant is an envelope that calls itself that: what it holds is not this package's.
func grant(t testing.TB, id string) []byte {
	t.Helper()
	b, err := signed.Sign(station(t), "application/vnd.touchmark.order+json", fmt.Appendf(nil, `{"id":%q}`, id))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func write(t testing.TB, k *ecdsa.PrivateKey, recipients []age.Recipient, entries ...*bundle.Entry) []byte {
	t.Helper()
	path := filepath.Join(t.TempDir(), "b.tmb")
	w, err := bundle.NewWriter(bundle.WriterConfig{Path: path, IDScope: "0ne00112233", Created: time.Unix(1767225600, 0), Signer: k, Recipients: recipients, Info: map[string]string{"line": "3"}})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abort()
	for _, e := range entries {
		if err := w.Add(e); err != nil {
			t.Fatal(err)
		}
	}
	w.SetCheckpoint([]byte("a checkpoint"))
	w.SetGrant(append(grant(t, "PO-1"), '\n'))
	sum, err := w.Close()
	if err != nil {
		t.Fatal(err)
	}
	if sum.Entries != int64(len(entries)) || sum.Grant != "PO-1" {
		t.Errorf("summary %+v", sum)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if int64(len(b)) != sum.Size {
		t.Errorf("size %d, summary says %d", len(b), sum.Size)
	}
	return b
}

func read(b []byte, cfg bundle.OpenConfig) ([]bundle.Entry, error) {
	r, err := bundle.Open(bytes.NewReader(b), cfg)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	var all []bundle.Entry
	for e, err := range r.Entries() {
		if err != nil {
			return all, err
		}
		all = append(all, e)
	}
	return all, nil
}

func TestRoundTrip(t *testing.T) {
	k := station(t)
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	var entries []*bundle.Entry
	for n := range 4500 { // more than two chunks
		d := deviceEntry(n)
		d.Revision = int64(n % 2)
		entries = append(entries, d)
		if n%3 == 0 {
			entries = append(entries, x509Entry(n), symmetricEntry(n))
		}
		if n%100 == 0 {
			entries = append(entries, retiredEntry(n), &bundle.Entry{Closed: true, Group: &dps.EnrollmentGroup{EnrollmentGroupID: "valves", Enrollment: x509Group()}})
		}
	}
	b := write(t, k, []age.Recipient{id.Recipient()}, entries...)
	for n := range 4500 {
		if n%3 == 0 && bytes.Contains(b, []byte(secretOf(n))) {
			t.Fatalf("key %d stands in the bundle", n)
		}
	}
	got, err := read(b, trust(k))
	if err != nil || len(got) != len(entries) {
		t.Fatalf("%d of %d entries, %v", len(got), len(entries), err)
	}
	for i, e := range got { // without identities they come as they were added
		w := entries[i]
		if e.Serial != w.Serial || e.Revision != w.Revision || e.Closed != w.Closed || (e.Retired != nil) != (w.Retired != nil) || e.Retired != nil && *e.Retired != *w.Retired {
			t.Fatalf("entry %d is %+v, not %+v", i, e, w)
		}
		if e.Individual != nil && e.Individual.Attestation.SymmetricKey != nil {
			t.Fatal("a reader without an identity sees a key")
		}
	}
	cfg := trust(k)
	cfg.Identities = []age.Identity{id}
	if got, err = read(b, cfg); err != nil || len(got) != len(entries) {
		t.Fatalf("%d of %d entries, %v", len(got), len(entries), err)
	}
	keys := 0
	for _, e := range got {
		if e.Individual != nil && e.Individual.Attestation.SymmetricKey != nil {
			var n int
			fmt.Sscanf(e.Individual.RegistrationID, "sensor-%d", &n)
			if e.Individual.Attestation.SymmetricKey.PrimaryKey != secretOf(n) {
				t.Fatalf("%s has another key", e.Individual.RegistrationID)
			}
			keys++
		}
	}
	if keys != 1500 {
		t.Errorf("%d keys were opened", keys)
	}
	other, _ := age.GenerateX25519Identity()
	cfg.Identities = []age.Identity{other}
	if _, err := read(b, cfg); !errors.Is(err, bundle.ErrSealed) {
		t.Errorf("another identity: %v", err)
	}
	if m, keyID, err := bundle.Describe(bytes.NewReader(b)); err != nil || m.Counts.Sealed != 1500 || m.Counts.Retired != 45 || m.Counts.Revised != 2250 || m.Grant.ID != "PO-1" || len(keyID) != 64 || m.Info["line"] != "3" {
		t.Errorf("%+v %s %v", m.Counts, keyID, err)
	}
	// Standard tools open it.
	tr := tar.NewReader(bytes.NewReader(b))
	members := 0
	for {
		if _, err := tr.Next(); err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		members++
	}
	if members < 6 {
		t.Errorf("%d members", members)
	}
}

func TestSameContentSameID(t *testing.T) {
	k := station(t)
	id := func(b []byte) string {
		m, _, err := bundle.Describe(bytes.NewReader(b))
		if err != nil {
			t.Fatal(err)
		}
		return m.ID
	}
	a, b, c := write(t, k, nil, deviceEntry(1), x509Entry(2)), write(t, station(t), nil, deviceEntry(1), x509Entry(2)), write(t, k, nil, x509Entry(2), deviceEntry(1))
	if id(a) != id(b) || id(a) == id(c) {
		t.Errorf("%s %s %s", id(a), id(b), id(c))
	}
}

func TestTrust(t *testing.T) {
	k := station(t)
	b := write(t, k, nil, deviceEntry(1))
	if _, err := bundle.Open(bytes.NewReader(b), trust(station(t))); !errors.Is(err, signed.ErrUntrusted) {
		t.Errorf("another station: %v", err)
	}
	if _, err := bundle.Open(bytes.NewReader(b), bundle.OpenConfig{}); !errors.Is(err, signed.ErrUntrusted) {
		t.Errorf("nobody trusted: %v", err)
	}
	if _, err := bundle.Verify(bytes.NewReader(b), bundle.OpenConfig{Trusted: []crypto.PublicKey{station(t).Public(), k.Public()}}); err != nil {
		t.Errorf("one of two trusted: %v", err)
	}
}

// Invariant 7: no byte of a bundle can change unnoticed.
func TestEveryByteCounts(t *testing.T) {
	k := station(t)
	id, _ := age.GenerateX25519Identity()
	b := write(t, k, []age.Recipient{id.Recipient()}, deviceEntry(1), x509Entry(2), symmetricEntry(3), retiredEntry(4))
	cfg := trust(k)
	cfg.Identities = []age.Identity{id}
	for i := range b {
		for _, flip := range []byte{1, 0x80} {
			b[i] ^= flip
			if got, err := read(b, cfg); err == nil {
				t.Errorf("octet %d of %d changed by %#x is not noticed: %d entries", i, len(b), flip, len(got))
			} else if !errors.Is(err, bundle.ErrCorrupt) && !errors.Is(err, signed.ErrUntrusted) {
				t.Errorf("octet %d: %v is neither corrupt nor untrusted", i, err)
			}
			b[i] ^= flip
		}
	}
	for n := range b {
		if n%512 == 0 || n%97 == 0 {
			if _, err := read(b[:n], cfg); !errors.Is(err, bundle.ErrCorrupt) {
				t.Errorf("cut off after %d of %d: %v", n, len(b), err)
			}
		}
	}
	if _, err := read(append(bytes.Clone(b), 0), cfg); !errors.Is(err, bundle.ErrCorrupt) {
		t.Errorf("an octet more: %v", err)
	}
}

func TestWriterRefuses(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "b.tmb")
	cfg := bundle.WriterConfig{Path: path, IDScope: "0ne1", Signer: station(t)}
	w, err := bundle.NewWriter(cfg)
	if err != nil {
		t.Fatal(err)
	}
	for name, e := range map[string]*bundle.Entry{
		"nothing":                {},
		"two kinds":              {Device: deviceEntry(1).Device, Individual: x509Entry(1).Individual},
		"key, no recipient":      symmetricEntry(1),
		"bad ID":                 {Device: &bundle.GroupDevice{RegistrationID: "a b", Group: "g"}},
		"two kinds, one ended":   {Device: deviceEntry(1).Device, Retired: retiredEntry(1).Retired},
		"negative revision":      {Device: deviceEntry(1).Device, Revision: -1},
		"a group's revision":     {Group: &dps.EnrollmentGroup{EnrollmentGroupID: "g", Enrollment: x509Group()}, Revision: 1},
		"a closed device":        {Device: deviceEntry(1).Device, Closed: true},
		"key hash in capitals":   {Device: &bundle.GroupDevice{RegistrationID: "a", Group: "g", KeyHash: strings.Repeat("0A", 32)}},
		"short key hash":         {Device: &bundle.GroupDevice{RegistrationID: "a", Group: "g", KeyHash: "0a"}},
		"unknown state":          {Retired: &bundle.RetiredDevice{RegistrationID: "a", State: "lost", At: time.Now()}},
		"ended at no time":       {Retired: &bundle.RetiredDevice{RegistrationID: "a", State: bundle.Voided}},
		"ended, bad ID":          {Retired: &bundle.RetiredDevice{RegistrationID: "a b", State: bundle.Voided, At: time.Now()}},
		"ended, bad group":       {Retired: &bundle.RetiredDevice{RegistrationID: "a", Group: "a b", State: bundle.Voided, At: time.Now()}},
		"ended, long reason":     {Retired: &bundle.RetiredDevice{RegistrationID: "a", State: bundle.Voided, At: time.Now(), Reason: strings.Repeat("x", 1001)}},
		"ended, a serial of 129": {Serial: strings.Repeat("1", 129), Retired: retiredEntry(1).Retired},
		"group with its key":     {Group: &dps.EnrollmentGroup{EnrollmentGroupID: "g", Enrollment: dps.Enrollment{Attestation: symmetricEntry(1).Individual.Attestation}}},
	} {
		if err := w.Add(e); err == nil {
			t.Errorf("%s is taken", name)
		}
	}
	// Giving up leaves nothing, and what is in place is not overwritten.
	w.Abort()
	if entries, _ := os.ReadDir(dir); len(entries) != 0 {
		t.Errorf("left behind: %v", entries)
	}
	if err := os.WriteFile(path, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := bundle.NewWriter(cfg); !errors.Is(err, os.ErrExist) {
		t.Errorf("over an old file: %v", err)
	}
}

// A grant that is none, and one that the manifest does not name, are found.
func TestGrant(t *testing.T) {
	k := station(t)
	dir := t.TempDir()
	for name, doc := range map[string][]byte{"no envelope": []byte("{}"), "no ID": grant(t, ""), "long ID": grant(t, strings.Repeat("x", 129))} {
		w, err := bundle.NewWriter(bundle.WriterConfig{Path: filepath.Join(dir, "b"), IDScope: "0ne1", Signer: k})
		if err != nil {
			t.Fatal(err)
		}
		w.SetGrant(doc)
		if _, err := w.Close(); err == nil {
			t.Errorf("%s is taken", name)
		}
	}
	b := write(t, k, nil, deviceEntry(1))
	r, err := bundle.Open(bytes.NewReader(b), trust(k))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if e, err := signed.Parse(r.Grant()); err != nil || string(e.Unverified()) != `{"id":"PO-1"}` || r.Manifest().Grant.ID != "PO-1" {
		t.Errorf("%s, %v", r.Grant(), err)
	}
	// Somebody puts another grant of the same size into a signed bundle.
	other := grant(t, "PO-2")
	for len(other) != len(r.Grant()) { // ECDSA signatures differ in length
		other = grant(t, "PO-2")
	}
	if _, err := bundle.Open(bytes.NewReader(bytes.Replace(b, r.Grant(), other, 1)), trust(k)); !errors.Is(err, bundle.ErrCorrupt) {
		t.Errorf("another grant: %v", err)
	}
}

// The entry that there are most of is written by hand: as json.Marshal would.
func TestDeviceLine(t *testing.T) {
	k := station(t)
	for _, e := range []*bundle.Entry{deviceEntry(1), {Revision: 7, Device: deviceEntry(2).Device}, {Device: &bundle.GroupDevice{RegistrationID: "a", Group: "g"}}} {
		want, err := json.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		sum := sha256.New()
		sum.Write(make([]byte, sha256.Size))
		sum.Write(append(want, '\n'))
		m, _, err := bundle.Describe(bytes.NewReader(write(t, k, nil, e)))
		if err != nil || m.ID != hex.EncodeToString(sum.Sum(nil)) {
			t.Errorf("%s is written otherwise, %v", want, err)
		}
	}
}

func FuzzOpen(f *testing.F) {
	k := station(f)
	f.Add(write(f, k, nil, deviceEntry(1), x509Entry(2)))
	whole := write(f, k, nil, deviceEntry(1))
	f.Add(write(f, k, nil, retiredEntry(1), &bundle.Entry{Closed: true, Group: &dps.EnrollmentGroup{EnrollmentGroupID: "g", Enrollment: x509Group()}}))
	f.Add(whole)
	f.Add(whole[:1500])
	f.Fuzz(func(t *testing.T, b []byte) {
		_, _, _ = bundle.Describe(bytes.NewReader(b))
		if _, err := bundle.Verify(bytes.NewReader(b), trust(k)); err == nil && len(b) != len(whole) {
			if _, err := read(b, trust(k)); err != nil {
				t.Fatal(err)
			}
		}
	})
}

func BenchmarkAddDevice(b *testing.B) {
	w, err := bundle.NewWriter(bundle.WriterConfig{Path: filepath.Join(b.TempDir(), "b"), IDScope: "0ne1", Signer: station(b)})
	if err != nil {
		b.Fatal(err)
	}
	defer w.Abort()
	e := deviceEntry(1)
	for n := 0; b.Loop(); n++ {
		e.Device.RegistrationID = fmt.Sprintf("valve-%09d", n)
		if err := w.Add(e); err != nil {
			b.Fatal(err)
		}
	}
}
