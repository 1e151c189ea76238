package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/touchmark/touchmark/pkg/bundle"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/serviceapi"
	"github.com/touchmark/touchmark/pkg/sqlstore"
)

// A tenant who comes by another's bundle cannot have its sealed keys by putting them into a bundle for its own scope, which a station
// of its own signs.
func TestSealedToAnotherScope(t *testing.T) {
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	store, err := sqlstore.Open(t.Context(), sqlstore.Config{DataKey: make([]byte, 32)})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	d := &serviceData{scope: "0neFirst", identity: id, recipient: id.Recipient().String()}
	scopes := registration.NewScopes(registration.ScopesConfig{Config: registration.Config{Store: store}})
	all := []string{"0neFirst", "0neSecond", "0neThird"}
	for _, s := range all {
		if _, _, err := registration.EditScope(t.Context(), store, s, startActor, "create", time.Now(), func(*registration.Scope) (*registration.Scope, error) {
			return &registration.Scope{ID: s, Name: "name-" + s}, nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	station, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	trust, err := publicPEM(station.Public())
	if err != nil {
		t.Fatal(err)
	}
	for _, scope := range all {
		svc, err := scopes.Service(t.Context(), scope)
		if err != nil {
			t.Fatal(err)
		}
		for _, sealedTo := range all {
			text, err := d.recipientOf(sealedTo)
			if err != nil {
				t.Fatal(err)
			}
			recipient, err := age.ParseX25519Recipient(text)
			if err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(t.TempDir(), "b.tmb")
			w, err := bundle.NewWriter(bundle.WriterConfig{Path: path, IDScope: scope, Created: time.Now(), Signer: station, Recipients: []age.Recipient{recipient}})
			if err != nil {
				t.Fatal(err)
			}
			keys := &dps.SymmetricKeyAttestation{PrimaryKey: "MDEyMzQ1Njc4OWFiY2RlZg==", SecondaryKey: "MDEyMzQ1Njc4OWFiY2RlZg=="}
			err = w.Add(&bundle.Entry{Serial: "1", Individual: &dps.IndividualEnrollment{RegistrationID: "dev-1", Enrollment: dps.Enrollment{
				Attestation: &dps.Attestation{Type: dps.AttestationSymmetricKey, SymmetricKey: keys}, ProvisioningStatus: dps.EnrollmentEnabled}}})
			if _, cerr := w.Close(); err != nil || cerr != nil {
				t.Fatal(err, cerr)
			}
			f, err := os.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			_, err = d.takeBundle(t.Context(), svc, f, serviceapi.ImportRequest{Trust: trust})
			var e *dps.Error
			if scope == sealedTo && err != nil || scope != sealedTo && !(errors.As(err, &e) && e.Code == dps.CodeBundleSealed) {
				t.Errorf("for %s, sealed to %s: %v", scope, sealedTo, err)
			}
		}
	}
}
