package device_test

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"strings"
	"testing"

	"github.com/touchmark/touchmark/hsm/hsmtest"
	"github.com/touchmark/touchmark/hsm/tpm"
	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/device"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

func newSoftTPM(t testing.TB) *device.SoftTPM {
	t.Helper()
	soft, err := device.NewSoftTPM(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	return soft
}

func keys(t testing.TB, d device.TPM) *attest.TPMKeys {
	t.Helper()
	ek, srk, err := d.Keys(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return &attest.TPMKeys{EK: ek, SRK: srk}
}

// Devices with a TPM, a software one and swtpm, register over HTTPS from their stamps, and end with the key that their hub is to
// know. DPS-D 50, 52.
func TestRegisterTPM(t *testing.T) {
	s := newService(t, "hub-a.example.net")
	store, err := tpm.Open(t.Context(), tpm.Config{URI: hsmtest.SWTPM(t).URI()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = store.Close() })
	stamp := func(id string) device.Stamp {
		return load(t, writeStamp(t, map[string]string{"idScope": registrationtest.Scope, "globalEndpoint": registrationtest.Host, "registrationId": id, "attestation": "tpm"}, nil))
	}
	for id, d := range map[string]device.TPM{"soft-1": newSoftTPM(t), "tpm-1": store.Identity()} {
		cfg := s.config("https", stamp(id))
		var refused *device.RefusedError
		cfg.TPM = d
		if _, err := device.Register(t.Context(), cfg); !errors.As(err, &refused) || refused.Code != dps.CodeUnauthorized {
			t.Errorf("%s, not enrolled: %v", id, err)
		}
		s.Put(t, registration.Individual, id, dps.Enrollment{Attestation: &dps.Attestation{Type: dps.AttestationTPM,
			TPM: &dps.TPMAttestation{EndorsementKey: base64.StdEncoding.EncodeToString(keys(t, d).EK)}}})
		for range 2 {
			st, err := device.Register(t.Context(), cfg)
			if err != nil || st.Status != dps.Assigned || st.DeviceID != id {
				t.Fatalf("%s: %+v, %v", id, st, err)
			}
			if err := s.Store.View(t.Context(), func(tx registration.Tx) error {
				r, err := tx.Registration(strings.ToLower(registrationtest.Scope), id)
				if err != nil {
					return err
				}
				h := hmac.New(sha256.New, r.DeviceKey)
				h.Write([]byte("hello, hub"))
				if got, err := d.MAC(t.Context(), nil, []byte("hello, hub")); err != nil || !hmac.Equal(got, h.Sum(nil)) {
					t.Errorf("%s has another key than the service: %v", id, err)
				}
				return nil
			}); err != nil {
				t.Fatal(err)
			}
		}
		cfg.TPM = newSoftTPM(t)
		if _, err := device.Register(t.Context(), cfg); !errors.As(err, &refused) {
			t.Errorf("%s with another TPM: %v", id, err)
		}
		cfg.TPM = nil
		if _, err := device.Register(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "not opened") {
			t.Errorf("%s without a TPM: %v", id, err)
		}
		cfg.TPM, cfg.Protocol, cfg.Endpoint = d, "mqtt", s.at["mqtt"].Addr
		if _, err := device.Register(t.Context(), cfg); err == nil {
			t.Errorf("%s over MQTT", id)
		}
	}
}

// The software TPM refuses what a TPM refuses: a blob for another, and one of which any octet was changed.
func TestSoftTPM(t *testing.T) {
	d, other := newSoftTPM(t), newSoftTPM(t)
	if _, err := d.MAC(t.Context(), nil, nil); err == nil {
		t.Error("an HMAC without a key")
	}
	blob, err := attest.Activation(keys(t, d), bytes.Repeat([]byte{7}, 32))
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Activate(t.Context(), blob); err == nil {
		t.Error("another TPM opens it")
	}
	for i := range blob {
		if i >= 798 {
			break // nothing looks at the URI
		}
		changed := bytes.Clone(blob)
		changed[i] ^= 0x10
		if err := d.Activate(t.Context(), changed); err == nil {
			t.Errorf("octet %d was changed", i)
		}
	}
	if err := d.Activate(context.Background(), blob); err != nil {
		t.Error(err)
	}
}

// Whatever blob comes, the software TPM opens it or says no.
func FuzzSoftTPM(f *testing.F) {
	d := newSoftTPM(f)
	blob, err := attest.Activation(keys(f, d), bytes.Repeat([]byte{7}, 32))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(blob)
	f.Add(blob[:798])
	f.Add(make([]byte, 12))
	f.Fuzz(func(t *testing.T, b []byte) {
		if d.Activate(t.Context(), b) == nil && !bytes.Equal(b[:796], blob[:796]) {
			t.Errorf("%x was taken", b)
		}
	})
}
