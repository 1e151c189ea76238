package device_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/hsmtest"
	"github.com/touchmark/touchmark/hsm/pkcs11"
	"github.com/touchmark/touchmark/pkg/amqpd"
	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/device"
	"github.com/touchmark/touchmark/pkg/door"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/httpd"
	"github.com/touchmark/touchmark/pkg/mqttd"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

// busy answers 429 to the first requests, and then lets the service answer.
type busy struct {
	registration.Registrar
	left atomic.Int32
}

func (b *busy) Register(ctx context.Context, r *registration.Request) (*dps.OperationStatus, error) {
	if b.left.Add(-1) >= 0 {
		return nil, dps.NewError(dps.CodeThrottled, "Slow down", nil)
	}
	return b.Registrar.Register(ctx, r)
}

// service is all doors on one service.
type service struct {
	*registrationtest.Fixture
	busy *busy
	at   map[string]*registrationtest.Listener // by protocol
}

func newService(t *testing.T, hubs ...string) *service {
	f := registrationtest.NewFixture(t, hubs...)
	s := &service{Fixture: f, busy: &busy{Registrar: f.Service}}
	s.at = make(map[string]*registrationtest.Listener)
	s.at["https"] = f.Listen(t, func(ctx context.Context, l net.Listener, cert func(*tls.ClientHelloInfo) (*tls.Certificate, error)) error {
		return httpd.New(httpd.Config{Registrar: s.busy, Now: f.Now, Door: door.New(door.Config{TLS: door.TLSConfig(cert)})}).Serve(ctx, l)
	})
	s.at["mqtt"] = f.Listen(t, func(ctx context.Context, l net.Listener, cert func(*tls.ClientHelloInfo) (*tls.Certificate, error)) error {
		return door.New(door.Config{TLS: door.TLSConfig(cert)}).Serve(ctx, l, mqttd.New(mqttd.Config{Registrar: s.busy, Now: f.Now}).Handle)
	})
	s.at["amqp"] = f.Listen(t, func(ctx context.Context, l net.Listener, cert func(*tls.ClientHelloInfo) (*tls.Certificate, error)) error {
		return door.New(door.Config{TLS: door.TLSConfig(cert)}).Serve(ctx, l, amqpd.New(amqpd.Config{Registrar: s.busy, Now: f.Now}).Handle)
	})
	s.at["mqtt-ws"] = f.Listen(t, webSockets("mqtt", mqttd.New(mqttd.Config{Registrar: s.busy, Protocol: "mqtt-ws", Now: f.Now}).Handle))
	s.at["amqp-ws"] = f.Listen(t, webSockets("AMQPWSB10", amqpd.New(amqpd.Config{Registrar: s.busy, Protocol: "amqp-ws", Now: f.Now}).Handle))
	return s
}

func (s *service) config(protocol string, stamp device.Stamp) device.Config {
	l := s.at[protocol]
	return device.Config{Stamp: stamp, Protocol: protocol, Endpoint: l.Addr, RootCAs: l.TLS(nil).RootCAs, Now: s.Now}
}

func writeStamp(t *testing.T, doc map[string]string, files map[string][]byte) string {
	t.Helper()
	dir := t.TempDir()
	b, err := json.Marshal(doc)
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range files {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "provisioning.json"), b, 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

func load(t *testing.T, dir string) device.Stamp {
	t.Helper()
	s, err := device.LoadStamp(dir)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func symmetric(t *testing.T, id string, key []byte) device.Stamp {
	return load(t, writeStamp(t, map[string]string{"idScope": registrationtest.Scope, "globalEndpoint": registrationtest.Host, "registrationId": id,
		"attestation": "symmetricKey", "symmetricKey": base64.StdEncoding.EncodeToString(key)}, nil))
}

func certificate(t *testing.T, id string, h *attesttest.Holder, chain ...*attesttest.Holder) device.Stamp {
	der, err := x509.MarshalPKCS8PrivateKey(h.Key)
	if err != nil {
		t.Fatal(err)
	}
	var text []byte
	for _, x := range append([]*attesttest.Holder{h}, chain...) {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: x.Certificate.Raw})...)
	}
	return load(t, writeStamp(t, map[string]string{"idScope": registrationtest.Scope, "globalEndpoint": registrationtest.Host, "registrationId": id,
		"attestation": "x509", "certificateChain": "chain.pem", "privateKey": "key.pem"},
		map[string][]byte{"chain.pem": text, "key.pem": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})}))
}

func TestRegister(t *testing.T) {
	s := newService(t, "hub-a.example.net")
	derived := func(id string) device.Stamp { return symmetric(t, id, attest.DeriveKey(s.GroupKey, id)) }
	for _, protocol := range device.Protocols() {
		for _, stamp := range []device.Stamp{
			symmetric(t, "own-key", s.OwnKey), derived("dev-1"),
			certificate(t, "own-cert", s.Own), certificate(t, "dev-2", attesttest.Leaf(t, s.Mid, "dev-2"), s.Mid),
		} {
			st, err := device.Register(t.Context(), s.config(protocol, stamp))
			if err != nil || st.Status != dps.Assigned || st.AssignedHub != "hub-a.example.net" || st.DeviceID != stamp.RegistrationID {
				t.Errorf("%s, %s: %+v, %v", protocol, stamp.RegistrationID, st, err)
			}
		}
		// Refused: at once, and never again by itself.
		s.busy.left.Store(0)
		_, err := device.Register(t.Context(), s.config(protocol, symmetric(t, "dev-1", s.OwnKey)))
		var refused *device.RefusedError
		if !errors.As(err, &refused) || refused.Code != dps.CodeUnauthorized || s.busy.left.Load() != -1 {
			t.Errorf("%s: %v, after %d requests", protocol, err, -s.busy.left.Load())
		}
		// Busy: later.
		s.busy.left.Store(1)
		if st, err := device.Register(t.Context(), s.config(protocol, derived("dev-3"))); err != nil || st.Status != dps.Assigned {
			t.Errorf("%s, busy: %+v, %v", protocol, st, err)
		}
		// Somebody else's server learns nothing, and is not asked again.
		s.busy.left.Store(0)
		cfg := s.config(protocol, derived("dev-1"))
		cfg.RootCAs = x509.NewCertPool()
		if _, err := device.Register(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "certificate") || s.busy.left.Load() != 0 {
			t.Errorf("%s, a server that nobody vouches for: %v", protocol, err)
		}
	}
}

// A server that says nothing does not hold the device for longer than it has time.
func TestRegisterGivesUp(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for _, protocol := range device.Protocols() {
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		_, err := device.Register(ctx, device.Config{Stamp: symmetric(t, "dev-1", []byte("k")), Protocol: protocol, Endpoint: l.Addr().String()})
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: %v", protocol, err)
		}
	}
}

// Device API, sections 6.1 and 6.4: failed and disabled are results and not errors.
func TestEndStates(t *testing.T) {
	s := newService(t)
	st, err := device.Register(t.Context(), s.config("https", symmetric(t, "own-key", s.OwnKey)))
	if err != nil || st.Status != dps.Failed || st.ErrorCode != int(dps.CodeNoHub) {
		t.Errorf("%+v, %v", st, err)
	}
}

func TestLoadStamp(t *testing.T) {
	base := map[string]string{"idScope": "0ne1", "globalEndpoint": "h.example", "registrationId": "dev-1", "attestation": "symmetricKey", "symmetricKey": "a2V5"}
	for why, edit := range map[string]map[string]string{
		"no scope": {"idScope": ""}, "bad ID": {"registrationId": "a b"}, "no attestation": {"attestation": ""}, "not base64": {"symmetricKey": "~"},
		"no key": {"symmetricKey": ""}, "no chain": {"attestation": "x509", "certificateChain": "none.pem", "privateKey": "none.pem"},
		"chain elsewhere": {"attestation": "x509", "certificateChain": "../../etc/passwd", "privateKey": "x"},
	} {
		doc := map[string]string{}
		for _, m := range []map[string]string{base, edit} {
			for k, v := range m {
				doc[k] = v
			}
		}
		if s, err := device.LoadStamp(writeStamp(t, doc, nil)); err == nil {
			t.Errorf("%s: %+v", why, s)
		} else if strings.Contains(err.Error(), "a2V5") {
			t.Errorf("%s: the error shows the key: %v", why, err)
		}
	}
	if _, err := device.LoadStamp(t.TempDir()); err == nil {
		t.Error("an empty directory is a stamp")
	}
}

// The assignment is kept beside the stamp, whole or not at all.
func TestSaveAssignment(t *testing.T) {
	dir := t.TempDir()
	for _, hub := range []string{"a.example", "b.example"} {
		if err := device.SaveAssignment(dir, &dps.RegistrationState{RegistrationID: "dev-1", Status: dps.Assigned, AssignedHub: hub, DeviceID: "dev-1"}); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(filepath.Join(dir, "assignment.json"))
		if err != nil || !strings.Contains(string(b), hub) {
			t.Errorf("%s, %v", b, err)
		}
	}
	if left, _ := os.ReadDir(dir); len(left) != 1 {
		t.Errorf("%v", left)
	}
}

// The SAS token is made by a key that stays in a token: the stamp names it and does not hold it.
func TestSymmetricKeyInToken(t *testing.T) {
	s := newService(t, "hub-a.example.net")
	store, err := pkcs11.Open(t.Context(), pkcs11.Config{URI: hsmtest.SoftHSM(t, "device"), PIN: func(context.Context) (hsm.Secret, error) { return hsm.Secret(hsmtest.PIN), nil }})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	key, err := store.Import(t.Context(), hsm.Spec{Name: "own", Algorithm: hsm.HMACSHA256}, s.OwnKey)
	if err != nil {
		t.Fatal(err)
	}
	mac, err := hsm.MACKeyOf(key)
	if err != nil {
		t.Fatal(err)
	}
	stamp, err := device.LoadStamp(writeStamp(t, map[string]string{"idScope": registrationtest.Scope, "globalEndpoint": registrationtest.Host, "registrationId": "own-key",
		"attestation": "symmetricKey", "keyUri": key.URI()}, nil))
	if err != nil || stamp.SymmetricKey != nil {
		t.Fatalf("%+v, %v", stamp, err)
	}
	for _, protocol := range device.Protocols() {
		cfg := s.config(protocol, stamp)
		if _, err := device.Register(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "was not opened") {
			t.Errorf("%s without the key: %v", protocol, err)
		}
		cfg.MAC = mac
		if st, err := device.Register(t.Context(), cfg); err != nil || st.Status != dps.Assigned {
			t.Errorf("%s: %+v, %v", protocol, st, err)
		}
	}
}
