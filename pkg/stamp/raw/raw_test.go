package raw_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/touchmark/touchmark/pkg/stamp/raw"
)

// identity returns the records of a device with a key and a certificate.
func identity(t testing.TB, id string) []raw.Record {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: id}}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	block := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert})
	return []raw.Record{ // not in order
		{raw.PrivateKey, der},
		{raw.IDScope, []byte("0ne00112233")},
		{raw.GlobalEndpoint, []byte("global.azure-devices-provisioning.net")},
		{raw.RegistrationID, []byte(id)},
		{raw.Serial, []byte("SN-1 ä")},
		{raw.CertificateChain, append(slices.Clone(cert), cert...)},
		{raw.CertificateChainPEM, append(slices.Clone(block), block...)},
		{raw.SymmetricKey, bytes.Repeat([]byte{0xff}, 32)},
		{raw.KeyURI, []byte("pkcs11:token=a;object=b")},
		{raw.FirstUser + 7, []byte("\x00\x01\xff")},
		{77, []byte("a type of a later version")},
	}
}

func encode(t testing.TB, sequence uint32, records []raw.Record) []byte {
	t.Helper()
	b, err := raw.Encode(sequence, records)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func equal(a, b []raw.Record) bool {
	return slices.EqualFunc(a, b, func(x, y raw.Record) bool { return x.Type == y.Type && bytes.Equal(x.Value, y.Value) })
}

func sorted(records []raw.Record) []raw.Record {
	return slices.SortedFunc(slices.Values(records), func(a, b raw.Record) int { return int(a.Type) - int(b.Type) })
}

// The layout is written down and stays: devices in the field read it.
func TestLayout(t *testing.T) {
	b := encode(t, 0x01020304, []raw.Record{{raw.FirstUser, []byte("xyz")}, {raw.IDScope, []byte("0ne1")}})
	want := "TMRK\x01\x00\x02\x00" + "\x23\x00\x00\x00\x04\x03\x02\x01" + "\x01\x00\x04\x000ne1" + "\x00\x80\x03\x00xyz"
	sum := crc32.ChecksumIEEE([]byte(want))
	if want += string([]byte{byte(sum), byte(sum >> 8), byte(sum >> 16), byte(sum >> 24)}); string(b) != want {
		t.Errorf("%q\nwant %q", b, want)
	}
}

func TestParse(t *testing.T) {
	records := identity(t, "pump-1")
	b := encode(t, 9, records)
	sequence, got, err := raw.Parse(append(slices.Clone(b), 0xff, 0xff))
	if err != nil || sequence != 9 || !equal(got, sorted(records)) {
		t.Fatalf("%d, %v, %v", sequence, got, err)
	}
	for i := range b {
		for bit := range 8 {
			broken := slices.Clone(b)
			broken[i] ^= 1 << bit
			if _, _, err := raw.Parse(broken); !errors.Is(err, raw.ErrDamaged) && !(i < 4 && errors.Is(err, raw.ErrNone)) {
				t.Fatalf("bit %d of octet %d turned over: %v", bit, i, err)
			}
		}
		if _, _, err := raw.Parse(b[:i]); err == nil {
			t.Fatalf("cut at %d: parses", i)
		}
	}
	if text := fmt.Sprintf("%v %+v %#v %s", got, got, got[6], got[6]); strings.Contains(text, string(got[1].Value)) {
		t.Errorf("values show: %s", text)
	}
	// With the right CRC, and wrong all the same.
	for name, change := range map[string]func(b []byte){
		"version":         func(b []byte) { b[4] = 2 },
		"reserved":        func(b []byte) { b[5] = 1 },
		"count":           func(b []byte) { b[6]-- },
		"sequence of 0":   func(b []byte) { b[12] = 0 },
		"type of 0":       func(b []byte) { b[16] = 0 },
		"type of 0xffff":  func(b []byte) { b[16], b[17] = 0xff, 0xff },
		"order":           func(b []byte) { b[16] = 2 },
		"length of 0":     func(b []byte) { b[18] = 0 },
		"length too long": func(b []byte) { b[19] = 0xff },
		"control in text": func(b []byte) { b[20] = '\n' },
	} {
		broken := slices.Clone(b)
		change(broken)
		if _, _, err := raw.Parse(fixCRC(broken)); !errors.Is(err, raw.ErrDamaged) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// fixCRC writes the right CRC to the place that the total says, or to the end.
func fixCRC(b []byte) []byte {
	if len(b) < 20 {
		return b
	}
	total := int(b[8]) | int(b[9])<<8 | int(b[10])<<16 | int(b[11])<<24
	if total < 20 || total > len(b) {
		return b
	}
	sum := crc32.ChecksumIEEE(b[:total-4])
	copy(b[total-4:], []byte{byte(sum), byte(sum >> 8), byte(sum >> 16), byte(sum >> 24)})
	return b
}

func TestEncodeRefuses(t *testing.T) {
	der := identity(t, "x")[0].Value
	for name, records := range map[string][]raw.Record{
		"twice":          {{raw.Serial, []byte("a")}, {raw.Serial, []byte("b")}},
		"empty":          {{raw.Serial, nil}},
		"too long":       {{raw.FirstUser, make([]byte, 1<<16)}},
		"type 0":         {{0, []byte("a")}},
		"type 0xffff":    {{0xffff, []byte("a")}},
		"NUL":            {{raw.IDScope, []byte("a\x00")}},
		"not UTF-8":      {{raw.RegistrationID, []byte("\xff")}},
		"key as PEM":     {{raw.PrivateKey, []byte("-----BEGIN PRIVATE KEY-----")}},
		"two keys":       {{raw.PrivateKey, append(slices.Clone(der), der...)}},
		"chain cut off":  {{raw.CertificateChain, der[:len(der)-1]}},
		"PEM cut off":    {{raw.CertificateChainPEM, []byte("-----BEGIN CERTIFICATE-----\nAAAA\n")}},
		"PEM with words": {{raw.CertificateChainPEM, append([]byte("words\n"), identity(t, "x")[6].Value...)}},
	} {
		if _, err := raw.Encode(1, records); err == nil {
			t.Errorf("%s: encodes", name)
		}
	}
	if _, err := raw.Encode(0, nil); err == nil {
		t.Error("sequence number 0")
	}
	var large []raw.Record
	for i := range 17 {
		large = append(large, raw.Record{raw.FirstUser + raw.Type(i), make([]byte, 65535)})
	}
	if _, err := raw.Encode(1, large); !errors.Is(err, raw.ErrFull) {
		t.Errorf("more than a slot can be: %v", err)
	}
}

// errCut is the end of the power.
var errCut = errors.New("cut")

// medium is storage that loses its power: after a number of octets, or, with writes held in a cache until Sync, with just some
// of them done.
type medium struct {
	data   []byte
	octets int // until the cut; negative: never
	cached []write
	cache  bool
	syncs  int // until the cut, with a cache
	sizes  []int
}

type write struct {
	at   int64
	data []byte
}

func (m *medium) ReadAt(b []byte, at int64) (int, error) {
	// What was written is read, wherever it is.
	view := slices.Clone(m.data)
	for _, w := range m.cached {
		copy(view[w.at:], w.data)
	}
	return bytes.NewReader(view).ReadAt(b, at)
}

func (m *medium) WriteAt(b []byte, at int64) (int, error) {
	m.sizes = append(m.sizes, len(b))
	if m.cache {
		m.cached = append(m.cached, write{at, slices.Clone(b)})
		return len(b), nil
	}
	n := len(b)
	if m.octets >= 0 {
		n = min(n, m.octets)
		m.octets -= n
	}
	copy(m.data[at:], b[:n])
	if n < len(b) {
		return n, errCut
	}
	return n, nil
}

func (m *medium) Sync() error {
	if !m.cache {
		return nil
	}
	if m.syncs--; m.syncs < 0 {
		return errCut
	}
	for _, w := range m.cached {
		copy(m.data[w.at:], w.data)
	}
	m.cached = nil
	return nil
}

const (
	offset = 64
	slot   = 256
)

// twice returns storage that two stamps were written to, so that the next Write has something to lose.
func twice(t *testing.T, s raw.Slots, old []raw.Record) *medium {
	t.Helper()
	m := &medium{data: bytes.Repeat([]byte{0xff}, offset+2*slot+offset), octets: -1}
	for range 2 {
		if _, err := raw.Write(m, s, old); err != nil {
			t.Fatal(err)
		}
	}
	return m
}

// Cut at every octet, the stamp from before or the new one is there whole, and nothing outside the slots has changed. The next
// Write works.
func TestCutAtEveryOctet(t *testing.T) {
	old := []raw.Record{{raw.RegistrationID, []byte("old")}, {raw.SymmetricKey, bytes.Repeat([]byte{7}, 64)}}
	for _, page := range []int{0, 1, 8, 32, 64} {
		s := raw.Slots{Offset: offset, Size: slot, Page: page}
		// One that differs in little, where parts of both would be most alike, and one of another length.
		for _, fresh := range [][]raw.Record{{{raw.RegistrationID, []byte("olx")}, old[1]}, {{raw.RegistrationID, []byte("new")}, {raw.KeyURI, []byte("file:key")}}} {
			seen := map[string]int{}
			for n := 0; ; n++ {
				m := twice(t, s, old)
				before := slices.Clone(m.data)
				m.octets = n
				_, err := raw.Write(m, s, fresh)
				if err != nil && !errors.Is(err, errCut) {
					t.Fatal(err)
				}
				sequence, got, readErr := raw.Read(bytes.NewReader(m.data), s)
				switch {
				case readErr == nil && sequence == 2 && equal(got, old) && err != nil:
					seen["old"]++
				case readErr == nil && sequence == 3 && equal(got, fresh):
					seen["new"]++
				default:
					t.Fatalf("page %d, cut after %d: %d, %v, %v", page, n, sequence, got, readErr)
				}
				if !bytes.Equal(m.data[:offset], before[:offset]) || !bytes.Equal(m.data[offset+2*slot:], before[offset+2*slot:]) {
					t.Fatalf("page %d, cut after %d: octets outside the slots changed", page, n)
				}
				m.octets = -1
				if again, err := raw.Write(m, s, fresh); err != nil || again != sequence+1 {
					t.Fatalf("page %d, cut after %d: the next write: %d, %v", page, n, again, err)
				}
				if err == nil {
					break
				}
			}
			if seen["old"] < slot || seen["new"] == 0 {
				t.Errorf("page %d: %v", page, seen)
			}
		}
	}
}

// Between two flushes, storage with a cache may have done any of the writes and not the others, and may have left nonsense in a
// page that it was writing.
func TestCutInAnyOrder(t *testing.T) {
	old := []raw.Record{{raw.RegistrationID, []byte("old")}, {raw.SymmetricKey, bytes.Repeat([]byte{7}, 64)}}
	fresh := []raw.Record{{raw.RegistrationID, []byte("new")}, {raw.SymmetricKey, bytes.Repeat([]byte{9}, 64)}}
	s := raw.Slots{Offset: offset, Size: slot, Page: 32}
	for syncs := range 4 {
		m := twice(t, s, old)
		m.cache, m.syncs = true, syncs
		if _, err := raw.Write(m, s, fresh); (err == nil) != (syncs == 3) {
			t.Fatalf("%d flushes: %v", syncs, err)
		}
		for done := range 1 << len(m.cached) {
			for torn := -1; torn < len(m.cached); torn++ {
				data := slices.Clone(m.data)
				for i, w := range m.cached {
					if i == torn {
						copy(data[w.at:], bytes.Repeat([]byte{0xa5, 'T'}, len(w.data)/2))
					} else if done>>i&1 == 1 {
						copy(data[w.at:], w.data)
					}
				}
				sequence, got, err := raw.Read(bytes.NewReader(data), s)
				if err != nil || !(sequence == 2 && equal(got, old) || sequence == 3 && equal(got, fresh)) {
					t.Fatalf("after %d flushes, writes %b, torn %d: %d, %v, %v", syncs, done, torn, sequence, got, err)
				}
				if syncs == 3 && sequence != 3 || syncs < 2 && sequence != 2 {
					t.Fatalf("after %d flushes, writes %b: stamp %d", syncs, done, sequence)
				}
			}
		}
	}
}

// The first stamp on a device: nothing, then all of it.
func TestFirst(t *testing.T) {
	s := raw.Slots{Offset: offset, Size: slot}
	fresh := []raw.Record{{raw.RegistrationID, []byte("new")}}
	for _, erased := range []byte{0, 0xff} {
		for n := 0; ; n++ {
			m := &medium{data: bytes.Repeat([]byte{erased}, offset+2*slot), octets: n}
			_, err := raw.Write(m, s, fresh)
			_, got, readErr := raw.Read(m, s)
			if err == nil {
				break
			}
			if !errors.Is(readErr, raw.ErrNone) && !equal(got, fresh) {
				t.Fatalf("cut after %d: %v, %v", n, got, readErr)
			}
		}
	}
}

// A file, through the whole of a device's life: pages whole and aligned, copies in turn, old keys gone after the second write.
func TestFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "eeprom")
	if err := os.WriteFile(path, bytes.Repeat([]byte{0xff}, 16<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s := raw.Slots{Offset: 4096, Size: 4096, Page: 64}
	if _, _, err := raw.Read(f, s); !errors.Is(err, raw.ErrNone) {
		t.Errorf("erased: %v", err)
	}
	first := identity(t, "pump-1")
	for i := range uint32(5) {
		want := identity(t, fmt.Sprintf("pump-%d", i))
		if i == 0 {
			want = first
		}
		if n, err := raw.Write(f, s, want); err != nil || n != i+1 {
			t.Fatal(n, err)
		}
		if n, got, err := raw.Read(f, s); err != nil || n != i+1 || !equal(got, sorted(want)) {
			t.Fatal(n, err)
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if left := bytes.Contains(b, first[0].Value); left != (i < 2) {
			t.Errorf("after %d writes the first key is there: %v", i+1, left)
		}
	}
	m := &medium{data: make([]byte, 1024), octets: -1}
	if _, err := raw.Write(m, raw.Slots{Size: 512, Page: 64}, first[1:2]); err != nil {
		t.Fatal(err)
	}
	if slices.ContainsFunc(m.sizes, func(n int) bool { return n != 64 }) {
		t.Errorf("writes of %v octets with pages of 64", m.sizes)
	}
	if _, err := raw.Write(f, raw.Slots{Size: 1024}, first); !errors.Is(err, raw.ErrFull) {
		t.Errorf("slot too small: %v", err)
	}
	for _, bad := range []raw.Slots{{}, {Size: 19}, {Size: 2 << 20}, {Offset: -1, Size: 64}, {Offset: 8, Size: 64, Page: 16}, {Size: 72, Page: 16}, {Size: 64, Page: -1}} {
		if _, err := raw.Write(f, bad, first[1:2]); err == nil {
			t.Errorf("%+v", bad)
		}
	}
	if _, _, err := raw.Read(f, raw.Slots{Offset: 15 << 10, Size: 1024}); !errors.Is(err, io.EOF) {
		t.Errorf("beyond the end: %v", err)
	}
}

// stuck is storage with an octet that stays what it is.
type stuck struct {
	*medium
	at int
}

func (s stuck) WriteAt(b []byte, at int64) (int, error) {
	was := s.data[s.at]
	n, err := s.medium.WriteAt(b, at)
	s.data[s.at] = was
	return n, err
}

func TestReadsBack(t *testing.T) {
	s := raw.Slots{Offset: offset, Size: slot}
	old := []raw.Record{{raw.RegistrationID, []byte("old")}}
	for at := range slot {
		m := twice(t, s, old)
		m.data[offset+at] ^= 0x5a // slot 0 is the older one; the stamp will have 27 octets there
		if _, err := raw.Write(stuck{m, offset + at}, s, []raw.Record{{raw.RegistrationID, []byte("new")}}); !errors.Is(err, raw.ErrMismatch) {
			t.Fatalf("octet %d is stuck: %v", at, err)
		}
		if _, got, err := raw.Read(m, s); err != nil || at < 27 && !equal(got, old) {
			t.Fatalf("octet %d is stuck: %v, %v", at, got, err)
		}
	}
}

// What parses has one form.
func FuzzParse(f *testing.F) {
	// The same in every process of the fuzzer, and short.
	block := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte("\x30\x01\x00")})
	f.Add(encode(f, 1, []raw.Record{{raw.Serial, []byte("ä")}, {raw.CertificateChain, []byte("\x30\x01\x00\x30\x00")}, {raw.PrivateKey, []byte("\x30\x00")}}))
	f.Add(encode(f, 0xffffffff, []raw.Record{{raw.CertificateChainPEM, append(block, block...)}}))
	f.Add(encode(f, 3, nil))
	f.Add(encode(f, 7, []raw.Record{{raw.IDScope, []byte("0ne1")}, {raw.FirstUser, []byte("x")}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		b = fixCRC(slices.Clone(b)) // the fuzzer cannot guess it
		sequence, records, err := raw.Parse(b)
		if err != nil {
			if !errors.Is(err, raw.ErrDamaged) && !errors.Is(err, raw.ErrNone) {
				t.Fatal(err)
			}
			return
		}
		if again := encode(t, sequence, records); !bytes.HasPrefix(b, again) {
			t.Fatalf("%x encodes as %x", b, again)
		}
	})
}
