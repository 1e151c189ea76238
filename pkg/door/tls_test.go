package door_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"log/slog"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/crypto/ocsp"

	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/door"
)

// files is a directory with certificates that a CA issued.
type files struct {
	dir string
	ca  *attesttest.Holder
}

func newFiles(t testing.TB) *files {
	t.Helper()
	return &files{t.TempDir(), attesttest.CA(t, nil, "server CA")}
}

func (f *files) path(name string) string { return filepath.Join(f.dir, name) }

// write issues a certificate and writes it, with its CA behind it, and its key.
func (f *files) write(t testing.TB, name string, serial int64, key crypto.Signer) (door.Pair, *x509.Certificate) {
	t.Helper()
	c := &x509.Certificate{SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: host}, DNSNames: []string{host}, NotBefore: attesttest.Now.Add(-time.Hour),
		NotAfter: attesttest.Now.Add(100 * time.Hour), KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	der, err := x509.CreateCertificate(rand.Reader, c, f.ca.Certificate, key.Public(), f.ca.Key)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	chain := append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: f.ca.Certificate.Raw})...)
	p := door.Pair{Certificate: f.path(name + ".pem"), Key: f.path(name + ".key")}
	f.put(t, p.Certificate, chain)
	f.put(t, p.Key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}))
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return p, leaf
}

// put writes a file in the place of another, as tools that renew certificates do.
func (f *files) put(t testing.TB, name string, b []byte) {
	t.Helper()
	if err := os.WriteFile(name+".new", b, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(name+".new", name); err != nil {
		t.Fatal(err)
	}
}

func (f *files) ocsp(t testing.TB, serial int64, status int, from, until time.Time) []byte {
	t.Helper()
	b, err := ocsp.CreateResponse(f.ca.Certificate, f.ca.Certificate, ocsp.Response{Status: status, SerialNumber: big.NewInt(serial), ThisUpdate: from, NextUpdate: until}, f.ca.Key)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func ecKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// clock is moved by tests.
type clock struct{ offset atomic.Int64 }

func (c *clock) Now() time.Time          { return attesttest.Now.Add(time.Duration(c.offset.Load())) }
func (c *clock) Advance(d time.Duration) { c.offset.Add(int64(d)) }

// meet does a handshake and a line on it.
func (r *running) meet(t testing.TB, edit func(*tls.Config)) (tls.ConnectionState, error) {
	t.Helper()
	cfg := &tls.Config{RootCAs: r.roots, ServerName: host, Time: func() time.Time { return attesttest.Now }}
	if edit != nil {
		edit(cfg)
	}
	c := tls.Client(r.raw(t, ""), cfg)
	defer c.Close()
	if err := c.Handshake(); err != nil {
		return tls.ConnectionState{}, err
	}
	say(t, c, "hello") // tickets of TLS 1.3 are read by then
	return c.ConnectionState(), nil
}

func serial(t testing.TB, r *running, edit func(*tls.Config)) int64 {
	t.Helper()
	cs, err := r.meet(t, edit)
	if err != nil {
		t.Fatal(err)
	}
	return cs.PeerCertificates[0].SerialNumber.Int64()
}

// Files that change are read again within a second, or when asked to; a pair that does not fit leaves the one before; and
// connections stay.
func TestReload(t *testing.T) {
	f, now, said := newFiles(t), &clock{}, &lines{}
	key := ecKey(t)
	pair, _ := f.write(t, "server", 1, key)
	certs, err := door.LoadCertificates(door.CertificatesConfig{Pairs: []door.Pair{pair}, Now: now.Now, Log: slog.New(slog.NewTextHandler(said, nil))})
	if err != nil {
		t.Fatal(err)
	}
	r := open(t, door.Config{TLS: door.TLSConfig(certs.Get)}, nil)
	r.roots.AddCert(f.ca.Certificate)
	first := r.over(r.raw(t, ""))
	say(t, first, "before")
	f.write(t, "server", 2, key)
	if n := serial(t, r, nil); n != 1 {
		t.Errorf("looked at every handshake: %d", n)
	}
	now.Advance(time.Second)
	if n := serial(t, r, nil); n != 2 {
		t.Errorf("after a second: %d", n)
	}
	// The chain comes first, its key later: in between the old pair is served, and the log says why once.
	before, err := os.ReadFile(pair.Key)
	if err != nil {
		t.Fatal(err)
	}
	f.write(t, "server", 3, ecKey(t))
	after, err := os.ReadFile(pair.Key)
	if err != nil {
		t.Fatal(err)
	}
	f.put(t, pair.Key, before)
	for range 3 {
		now.Advance(time.Second)
		if n := serial(t, r, nil); n != 2 {
			t.Errorf("half a pair: %d", n)
		}
	}
	if n := strings.Count(said.String(), "stays the one before"); n != 1 || strings.Contains(said.String(), "PRIVATE") {
		t.Errorf("said %d times:\n%s", n, said)
	}
	f.put(t, pair.Key, after)
	now.Advance(time.Second)
	if n := serial(t, r, nil); n != 3 {
		t.Errorf("the whole pair: %d", n)
	}
	// Files that are gone for a moment change nothing either.
	if err := os.Rename(pair.Certificate, pair.Certificate+".old"); err != nil {
		t.Fatal(err)
	}
	now.Advance(time.Second)
	if n := serial(t, r, nil); n != 3 {
		t.Errorf("no chain: %d", n)
	}
	f.write(t, "server", 4, key)
	certs.Reload() // SIGHUP: at once
	if n := serial(t, r, nil); n != 4 {
		t.Errorf("reloaded: %d", n)
	}
	say(t, first, "and after")
	if _, err := door.LoadCertificates(door.CertificatesConfig{Pairs: []door.Pair{{Certificate: pair.Certificate, Key: f.path("none")}}}); err == nil {
		t.Error("a first start with half a pair")
	}
}

// An OCSP response is stapled as long as it is good, and never past its next update.
func TestOCSP(t *testing.T) {
	f, now, said := newFiles(t), &clock{}, &lines{}
	pair, _ := f.write(t, "server", 7, ecKey(t))
	name := f.path("server.ocsp")
	good := f.ocsp(t, 7, ocsp.Good, attesttest.Now.Add(-time.Hour), attesttest.Now.Add(time.Hour))
	f.put(t, name, good)
	certs, err := door.LoadCertificates(door.CertificatesConfig{Pairs: []door.Pair{pair}, OCSP: []string{name}, Now: now.Now, Log: slog.New(slog.NewTextHandler(said, nil))})
	if err != nil {
		t.Fatal(err)
	}
	r := open(t, door.Config{TLS: door.TLSConfig(certs.Get)}, nil)
	r.roots.AddCert(f.ca.Certificate)
	staple := func() []byte {
		cs, err := r.meet(t, nil)
		if err != nil {
			t.Fatal(err)
		}
		return cs.OCSPResponse
	}
	if !bytes.Equal(staple(), good) {
		t.Error("no staple")
	}
	now.Advance(time.Hour)
	for range 2 {
		if staple() != nil {
			t.Error("a staple past its next update")
		}
	}
	if n := strings.Count(said.String(), "no longer stapled"); n != 1 {
		t.Errorf("said %d times:\n%s", n, said)
	}
	fresh := f.ocsp(t, 7, ocsp.Good, now.Now(), now.Now().Add(time.Hour))
	f.put(t, name, fresh)
	now.Advance(time.Second)
	if !bytes.Equal(staple(), fresh) {
		t.Error("a new one is not stapled")
	}
	foreign := *f
	foreign.ca = attesttest.CA(t, nil, "server CA")
	for what, b := range map[string][]byte{
		"revoked":               f.ocsp(t, 7, ocsp.Revoked, now.Now(), now.Now().Add(time.Hour)),
		"for another":           f.ocsp(t, 8, ocsp.Good, now.Now(), now.Now().Add(time.Hour)),
		"of the past":           f.ocsp(t, 7, ocsp.Good, now.Now().Add(-2*time.Hour), now.Now().Add(-time.Hour)),
		"of the future":         f.ocsp(t, 7, ocsp.Good, now.Now().Add(time.Hour), now.Now().Add(2*time.Hour)),
		"without a next update": f.ocsp(t, 7, ocsp.Good, now.Now(), time.Time{}),
		"of another CA":         foreign.ocsp(t, 7, ocsp.Good, now.Now(), now.Now().Add(time.Hour)),
		"rubbish":               []byte("rubbish"),
		"too large":             make([]byte, 1<<17),
	} {
		f.put(t, name, b)
		now.Advance(time.Second)
		if staple() != nil {
			t.Errorf("%s: stapled", what)
		}
	}
	f.put(t, name, f.ocsp(t, 7, ocsp.Good, now.Now(), now.Now().Add(time.Hour)))
	now.Advance(time.Second)
	if staple() == nil {
		t.Error("none in the end")
	}
}

// Of two certificates each client gets the one that it can; both can be stapled; and suites are those of section 14.
func TestTwoKeys(t *testing.T) { // DPS-D 95
	f := newFiles(t)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	rsaPair, _ := f.write(t, "rsa", 1, rsaKey)
	ecPair, _ := f.write(t, "ec", 2, ecKey(t))
	var names []string
	for i, at := range []string{"a.ocsp", "b.ocsp"} { // in another order than the pairs
		names = append(names, f.path(at))
		f.put(t, names[i], f.ocsp(t, int64(2-i), ocsp.Good, attesttest.Now, attesttest.Now.Add(time.Hour)))
	}
	certs, err := door.LoadCertificates(door.CertificatesConfig{Pairs: []door.Pair{rsaPair, ecPair}, OCSP: names, Now: (&clock{}).Now})
	if err != nil {
		t.Fatal(err)
	}
	r := open(t, door.Config{TLS: door.TLSConfig(certs.Get)}, nil)
	r.roots.AddCert(f.ca.Certificate)
	suite := func(id uint16) func(*tls.Config) {
		return func(c *tls.Config) { c.MaxVersion, c.CipherSuites = tls.VersionTLS12, []uint16{id} }
	}
	for name, x := range map[string]struct {
		edit func(*tls.Config)
		want int64
	}{
		"1.3":                {nil, 2},
		"1.2":                {func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }, 2},
		"ECDSA, AES-128-GCM": {suite(tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256), 2},
		"ECDSA, AES-256-GCM": {suite(tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384), 2},
		"RSA, AES-128-GCM":   {suite(tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256), 1},
		"RSA, AES-256-GCM":   {suite(tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384), 1},
		"RSA, by another name": {func(c *tls.Config) {
			suite(tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256)(c)
			c.ServerName = "other"
			c.InsecureSkipVerify = true
		}, 1},
		"without a name": {func(c *tls.Config) { c.ServerName, c.InsecureSkipVerify = "", true }, 2},
		"RSA, without a name": {func(c *tls.Config) {
			suite(tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384)(c)
			c.ServerName, c.InsecureSkipVerify = "", true
		}, 1},
	} {
		cs, err := r.meet(t, x.edit)
		if err != nil || cs.PeerCertificates[0].SerialNumber.Int64() != x.want || cs.OCSPResponse == nil {
			t.Errorf("%s: %v, %v", name, cs.PeerCertificates, err)
		}
	}
	for name, edit := range map[string]func(*tls.Config){
		"1.1":          func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS10, tls.VersionTLS11 },
		"CBC":          suite(tls.TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA),
		"RSA exchange": suite(tls.TLS_RSA_WITH_AES_128_GCM_SHA256),
	} {
		if _, err := r.meet(t, edit); err == nil {
			t.Errorf("%s is let in", name)
		}
	}
}

// Key exchange is hybrid where the client can.
func TestHybrid(t *testing.T) {
	r := open(t, door.Config{}, nil)
	if cs, err := r.meet(t, nil); err != nil || cs.CurveID != tls.X25519MLKEM768 {
		t.Errorf("%v, %v", cs.CurveID, err)
	}
	if cs, err := r.meet(t, func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.CurveP256} }); err != nil || cs.CurveID != tls.CurveP256 {
		t.Errorf("%v, %v", cs.CurveID, err)
	}
}

// kept counts what a client could resume.
type kept struct {
	tls.ClientSessionCache
	sessions int
}

func (k *kept) Put(key string, s *tls.ClientSessionState) {
	if s != nil {
		k.sessions++
	}
	k.ClientSessionCache.Put(key, s)
}

// Replicas that share a secret resume each other's sessions, for an hour or two; nobody else does. Invariant 8: a session in
// which a certificate was shown is never resumed.
func TestTickets(t *testing.T) {
	server := attesttest.Leaf(t, nil, host)
	now := &clock{}
	var seen atomic.Int64 // certificates
	replica := func(secret byte) *running {
		cfg := door.TLSConfig(func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return server.TLS(), nil })
		tickets, err := door.NewTickets(bytes.Repeat([]byte{secret}, door.TicketSecretSize), now.Now)
		if err != nil {
			t.Fatal(err)
		}
		tickets.Use(cfg)
		r := open(t, door.Config{TLS: cfg}, func(ctx context.Context, c *door.Conn) error {
			seen.Store(int64(len(c.Certificates)))
			return echo(ctx, c)
		})
		r.roots.AddCert(server.Certificate)
		return r
	}
	one, two, foreign := replica(1), replica(1), replica(2)
	cache := func() *kept { return &kept{tls.NewLRUClientSessionCache(4), 0} }
	resumed := func(r *running, k *kept, edit ...func(*tls.Config)) bool {
		t.Helper()
		cs, err := r.meet(t, func(c *tls.Config) {
			c.ClientSessionCache = k
			for _, e := range edit {
				e(c)
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		return cs.DidResume
	}
	k := cache()
	for i, r := range []*running{one, two, one} {
		if resumed(r, k) != (i > 0) {
			t.Errorf("connection %d resumed: %t", i, i == 0)
		}
	}
	if resumed(foreign, k) {
		t.Error("resumed under another secret")
	}
	k = cache()
	resumed(one, k)
	now.Advance(time.Hour)
	if !resumed(two, k) {
		t.Error("not resumed in the next hour")
	}
	k = cache()
	resumed(one, k)
	now.Advance(2 * time.Hour)
	if resumed(two, k) {
		t.Error("resumed two hours later")
	}

	// With a certificate there is nothing to resume, and the certificate is shown each time.
	device := attesttest.Leaf(t, nil, "dev-1")
	for name, edit := range map[string]func(*tls.Config){
		"1.3": func(c *tls.Config) { c.Certificates = []tls.Certificate{*device.TLS()} },
		"1.2": func(c *tls.Config) {
			c.Certificates, c.MaxVersion = []tls.Certificate{*device.TLS()}, tls.VersionTLS12
		},
	} {
		k := cache()
		for range 3 {
			if resumed(one, k, edit) || seen.Load() != 1 {
				t.Errorf("%s: a session with a certificate was resumed; %d certificates", name, seen.Load())
			}
		}
		if k.sessions == 0 {
			t.Errorf("%s: the client had nothing to try with", name)
		}
		// And the ticket of a session with one opens no session without.
		if resumed(two, k) || seen.Load() != 0 {
			t.Errorf("%s: resumed without the certificate", name)
		}
	}
	// Nor is anything of TLS 1.2 resumed: its tickets would hold the session's keys.
	k = cache()
	for range 2 {
		if resumed(one, k, func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }) {
			t.Error("TLS 1.2 resumed")
		}
	}
	if _, err := door.NewTickets([]byte("short"), nil); err == nil {
		t.Error("a short secret")
	}
}
