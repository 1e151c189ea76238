package sqlstore_test

import (
	"crypto/x509"
	"database/sql"
	"encoding/json"
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
	"github.com/touchmark/touchmark/pkg/sqlstore"
)

// A store from before CAs were indexed by key finds them all at its next start, also two that share a key, which were taken
// then: both can still be written.
func TestIndexOfOlderStores(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.db")
	s := open(t, path)
	service := func() *registration.Service {
		return registration.New(registration.Config{Store: s, Scope: registrationtest.Scope, Settings: registration.Settings{Hubs: registration.Records("a.example")}, Now: func() time.Time { return attesttest.Now }})
	}
	put := func(id, match string, e dps.Enrollment) {
		t.Helper()
		b, err := json.Marshal(dps.EnrollmentGroup{EnrollmentGroupID: id, Enrollment: e})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := service().PutEnrollment(t.Context(), registration.Actor{}, registration.Group, id, b, match); err != nil {
			t.Fatal(err)
		}
	}
	back := func(queries ...string) {
		t.Helper()
		db, err := sql.Open("sqlite", path)
		if err != nil {
			t.Fatal(err)
		}
		defer db.Close()
		for _, q := range queries {
			if _, err := db.Exec(q); err != nil {
				t.Fatalf("%s: %v", q, err)
			}
		}
	}
	var cas []*attesttest.Holder
	for i := range 30 {
		cas = append(cas, attesttest.CA(t, nil, "the CA"))
		put(fmt.Sprint("G-", i), "", registrationtest.Signers(cas[i], nil))
	}
	put("keys", "", registrationtest.Symmetric(key, nil))
	back(`DELETE FROM authorities`)
	put("twin", "", registrationtest.Signers(attesttest.Cross(t, nil, cas[7]), nil))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := sqlstore.Down(t.Context(), path, key, 4); err != nil {
		t.Fatal(err)
	}

	s = open(t, path)
	svc := service()
	register := func(dev *attesttest.Holder) error {
		_, err := svc.Register(t.Context(), &registration.Request{IDScope: registrationtest.Scope, RegistrationID: "dev-1", Proof: attest.Proof{Certificates: []*x509.Certificate{dev.Certificate}}})
		return err
	}
	for i, ca := range cas {
		if err := register(attesttest.Leaf(t, ca, "dev-1")); err != nil {
			t.Errorf("a device of group %d: %v", i, err)
		}
	}
	off := registrationtest.Signers(attesttest.Cross(t, nil, cas[7]), nil)
	off.ProvisioningStatus = dps.EnrollmentDisabled
	put("TWIN", "*", off)
	if err := register(attesttest.Leaf(t, cas[7], "dev-1")); dps.AsError(err).Code != dps.CodeUnauthorized {
		t.Errorf("of two groups with one CA, one is disabled: %v", err)
	}
}
