package registrationtest

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"net"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/bundle"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/evidence"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/sqlstore"
)

// Names that the suite uses.
const (
	Scope      = "0ne00C0FFEE"
	Host       = "dps.example.net"
	hub        = "hub-a.example.net"
	apiVersion = "2019-03-31"
)

// A Fixture is a service with enrollments of every kind that a door can meet, on a clock that stands at [attesttest.Now]
// until it is moved.
type Fixture struct {
	Service   *registration.Service
	GroupKey  []byte
	OwnKey    []byte // of the individual enrollment "own-key"
	OtherKey  []byte // its secondary key
	Root, Mid *attesttest.Holder
	Own       *attesttest.Holder // the self-signed certificate of the individual enrollment "own-cert"

	Store  registration.Store
	front  registration.Registrar // what a test puts before Service
	offset *atomic.Int64
	others []*Fixture // the other replicas, which have a Store and a Service of their own and the rest in common
}

// Replicas are the service at each of its replicas, the fixture's own first.
func (f *Fixture) Replicas() []*Fixture { return append([]*Fixture{f}, f.others...) }

// Registrar is what a door is served on.
func (f *Fixture) Registrar() registration.Registrar {
	if f.front != nil {
		return f.front
	}
	return f.Service
}

// Now tells the fixture's time; Advance moves it.
func (f *Fixture) Now() time.Time          { return attesttest.Now.Add(time.Duration(f.offset.Load())) }
func (f *Fixture) Advance(d time.Duration) { f.offset.Add(int64(d)) }

// NewFixture starts a service on a store of its own.
func NewFixture(t testing.TB, hubs ...string) *Fixture {
	t.Helper()
	store, err := sqlstore.Open(t.Context(), sqlstore.Config{Path: filepath.Join(t.TempDir(), "service.db"), DataKey: bytes.Repeat([]byte{7}, 32)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = store.Close() })
	return NewFixtureOn(t, store, hubs...)
}

// NewFixtureOn starts a service on a store.
func NewFixtureOn(t testing.TB, store registration.Store, hubs ...string) *Fixture {
	t.Helper()
	f := &Fixture{Store: store, offset: new(atomic.Int64), GroupKey: bytes.Repeat([]byte("g"), 64), OwnKey: bytes.Repeat([]byte("k"), 32), OtherKey: bytes.Repeat([]byte("l"), 32)}
	f.Service = f.Replica(hubs...)
	f.Root = attesttest.CA(t, nil, "factory root")
	f.Mid = attesttest.CA(t, f.Root, "line 3")
	f.Own = attesttest.Leaf(t, nil, "own-cert")
	f.Put(t, registration.Group, "keys", Symmetric(f.GroupKey, nil))
	f.Put(t, registration.Group, "line", Signers(f.Root, nil))
	f.Put(t, registration.Individual, "own-key", Symmetric(f.OwnKey, f.OtherKey))
	f.Put(t, registration.Individual, "own-cert", dps.Enrollment{Attestation: &dps.Attestation{Type: dps.AttestationX509,
		X509: &dps.X509Attestation{ClientCertificates: &dps.X509Certificates{Primary: &dps.X509Certificate{Certificate: f.Own.Base64()}}}}})
	return f
}

// Replica returns another service on the same store.
func (f *Fixture) Replica(hubs ...string) *registration.Service {
	return registration.New(registration.Config{Store: f.Store, Scope: Scope, Settings: registration.Settings{Hubs: registration.Records(hubs...)},
		UnlinkedHubs: true, Now: f.Now})
}

// Policy makes, or replaces, a shared access policy with these keys.
func (f *Fixture) Policy(t testing.TB, name, rights string, primary, secondary []byte) {
	t.Helper()
	p := &registration.Policy{Name: name, Rights: rights, Primary: primary, Secondary: secondary}
	update(t, f.Store, func(tx registration.Tx) error { return tx.PutPolicy(strings.ToLower(Scope), p) })
}

// Put writes an enrollment over whatever is there.
func (f *Fixture) Put(t testing.TB, kind registration.Kind, id string, e dps.Enrollment) {
	t.Helper()
	var doc any = dps.IndividualEnrollment{RegistrationID: id, Enrollment: e}
	if kind == registration.Group {
		doc = dps.EnrollmentGroup{EnrollmentGroupID: id, Enrollment: e}
	}
	f.PutDocument(t, kind, id, doc)
}

// PutDocument writes an enrollment from its whole document.
func (f *Fixture) PutDocument(t testing.TB, kind registration.Kind, id string, doc any) {
	t.Helper()
	b, err := json.Marshal(doc)
	if err != nil {
		t.Fatal(err)
	}
	match := ""
	if _, err := f.Service.GetEnrollment(t.Context(), kind, id); err == nil {
		match = "*"
	}
	if _, err := f.Service.PutEnrollment(t.Context(), registration.Actor{}, kind, id, b, match); err != nil {
		t.Fatal(err)
	}
}

// Symmetric is an enrollment by symmetric key.
func Symmetric(primary, secondary []byte) dps.Enrollment {
	if secondary == nil {
		secondary = bytes.Repeat([]byte("s"), 32)
	}
	return dps.Enrollment{Attestation: &dps.Attestation{Type: dps.AttestationSymmetricKey, SymmetricKey: &dps.SymmetricKeyAttestation{
		PrimaryKey: base64.StdEncoding.EncodeToString(primary), SecondaryKey: base64.StdEncoding.EncodeToString(secondary)}}}
}

// Signers is a group of the devices below a CA.
func Signers(primary, secondary *attesttest.Holder) dps.Enrollment {
	certs := &dps.X509Certificates{Primary: &dps.X509Certificate{Certificate: primary.Base64()}}
	if secondary != nil {
		certs.Secondary = &dps.X509Certificate{Certificate: secondary.Base64()}
	}
	return dps.Enrollment{Attestation: &dps.Attestation{Type: dps.AttestationX509, X509: &dps.X509Attestation{SigningCertificates: certs}}}
}

// Import takes entries as a bundle of one station brings them; all must be taken.
func (f *Fixture) Import(t testing.TB, entries ...bundle.Entry) {
	t.Helper()
	res, err := f.Service.Import(t.Context(), func(yield func(bundle.Entry, error) bool) {
		for _, e := range entries {
			if !yield(e, nil) {
				return
			}
		}
	}, registration.ImportConfig{Station: "station"})
	if err != nil || res.Conflicting+res.Refused+res.Stale > 0 {
		t.Fatalf("%+v, %v", res, err)
	}
}

func keyHash(t testing.TB, h *attesttest.Holder) string {
	t.Helper()
	hash, err := evidence.KeyHash(h.Key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return hash
}

// A Listener is where a door is served for a test.
type Listener struct {
	Addr   string
	server *attesttest.Holder
	now    func() time.Time
}

// Listen serves a door on a port of this machine until the test ends. Serve gets the door's certificate.
func (f *Fixture) Listen(t testing.TB, serve func(context.Context, net.Listener, func(*tls.ClientHelloInfo) (*tls.Certificate, error)) error) *Listener {
	t.Helper()
	server := attesttest.Leaf(t, nil, Host)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error)
	go func() {
		done <- serve(ctx, l, func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return server.TLS(), nil })
	}()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Errorf("serving: %v", err)
		}
	})
	return &Listener{l.Addr().String(), server, f.Now}
}

// TLS is how a device with a certificate, or with none, meets the door.
func (l *Listener) TLS(c *tls.Certificate) *tls.Config {
	cfg := &tls.Config{RootCAs: x509.NewCertPool(), ServerName: Host, Time: l.now}
	cfg.RootCAs.AddCert(l.server.Certificate)
	if c != nil {
		// Whatever the server's list of authorities says.
		cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return c, nil }
	}
	return cfg
}

// Dial connects. The connection ends with the test, or when it has taken half a minute.
func (l *Listener) Dial(t testing.TB, c *tls.Certificate) *tls.Conn {
	t.Helper()
	conn, err := tls.Dial("tcp", l.Addr, l.TLS(c))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
	return conn
}
