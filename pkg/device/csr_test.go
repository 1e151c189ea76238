package device_test

import (
	"bytes"
	"crypto"
	"crypto/elliptic"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/device"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

// A device gets a certificate for its key over both protocols, and keeps it; what is not for its key, or not for it, it refuses
// and keeps what it had.
func TestOperationalCertificate(t *testing.T) {
	s := newService(t, "hub-a.example.net")
	s.Issues(t, map[string]registration.Issuer{"ops": s.Issuer(t, s.NewAuthority(t, 200*24*time.Hour))}, "ops")
	s.busy.Registrar = s.Service
	dir := t.TempDir()
	for _, protocol := range []string{"https", "mqtt"} {
		key := registrationtest.ECKey(t, elliptic.P256())
		cfg := s.config(protocol, symmetric(t, "dev-1", attest.DeriveKey(s.GroupKey, "dev-1")))
		var err error
		if cfg.CSR, err = device.NewCSR("dev-1", key); err != nil {
			t.Fatal(err)
		}
		st, err := device.Register(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		chain, err := device.CheckChain(st, key.Public(), s.Now())
		if err != nil || len(chain) != 3 {
			t.Fatal(len(chain), err)
		}
		if err := device.SaveOperational(dir, chain, key); err != nil {
			t.Fatal(err)
		}
		name := filepath.Join(dir, device.OperationalFile)
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if fi, err := os.Stat(name); err != nil || fi.Mode().Perm() != 0o600 {
			t.Errorf("%v, %v", fi, err)
		}
		block, rest := pem.Decode(b)
		kept, err := x509.ParsePKCS8PrivateKey(block.Bytes)
		leaf, _ := pem.Decode(rest)
		if err != nil || !key.Equal(kept) || !bytes.Equal(leaf.Bytes, chain[0].Raw) {
			t.Errorf("%s keeps another key: %v", protocol, err)
		}

		other := attesttest.Leaf(t, nil, "dev-1")
		edit := func(f func(*dps.RegistrationState)) *dps.RegistrationState {
			c := *st
			c.IssuedCertificateChain = slices.Clone(st.IssuedCertificateChain)
			f(&c)
			return &c
		}
		for why, x := range map[string]struct {
			state *dps.RegistrationState
			pub   crypto.PublicKey
			at    time.Time
		}{
			"none":             {edit(func(s *dps.RegistrationState) { s.IssuedCertificateChain = nil }), key.Public(), s.Now()},
			"another key":      {st, other.Key.Public(), s.Now()},
			"another device":   {edit(func(s *dps.RegistrationState) { s.DeviceID = "Dev-1" }), key.Public(), s.Now()},
			"ended":            {st, key.Public(), s.Now().Add(91 * 24 * time.Hour)},
			"not begun":        {st, key.Public(), s.Now().Add(-24 * time.Hour)},
			"no certificate":   {edit(func(s *dps.RegistrationState) { s.IssuedCertificateChain[1] = []byte{0x30} }), key.Public(), s.Now()},
			"another issuer":   {edit(func(s *dps.RegistrationState) { s.IssuedCertificateChain[1] = other.Certificate.Raw }), key.Public(), s.Now()},
			"no root":          {edit(func(s *dps.RegistrationState) { s.IssuedCertificateChain = s.IssuedCertificateChain[:2] }), key.Public(), s.Now()},
			"a leaf by itself": {edit(func(s *dps.RegistrationState) { s.IssuedCertificateChain = s.IssuedCertificateChain[:1] }), key.Public(), s.Now()},
			"reversed":         {edit(func(s *dps.RegistrationState) { slices.Reverse(s.IssuedCertificateChain) }), key.Public(), s.Now()},
		} {
			if _, err := device.CheckChain(x.state, x.pub, x.at); !errors.Is(err, device.ErrChain) {
				t.Errorf("%s: %v", why, err)
			}
		}
	}
	if err := device.SaveOperational(filepath.Join(dir, "none"), nil, nil); err == nil {
		t.Error("kept nowhere")
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
		t.Errorf("%v, %v", left, err)
	}
}
