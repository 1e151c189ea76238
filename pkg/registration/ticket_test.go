package registration_test

import (
	"strings"
	"sync"
	"testing"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

// A ticket has one form, and is one device's.
func TestTicketForm(t *testing.T) {
	op := registration.NewTicket("0ne1", "Dev-1")
	if len(op) != 55 || !registration.IsTicket("0NE1", "dev-1", op) || op == registration.NewTicket("0ne1", "Dev-1") {
		t.Fatal(op)
	}
	for _, bad := range []string{"", "4.", op[:54], op + "0", "5" + op[1:], strings.ToUpper(op), " " + op[1:], op[:19] + strings.Repeat("0", 36), op[:40] + "\x00" + op[41:],
		"4.0000000000000000" + op[18:]} {
		if registration.IsTicket("0ne1", "dev-1", bad) {
			t.Errorf("%q is a ticket", bad)
		}
	}
	if registration.IsTicket("0ne1", "dev-2", op) || registration.IsTicket("0ne2", "dev-1", op) {
		t.Error("another's ticket is a ticket")
	}
}

// A register request with a ticket makes the operation of that ID, once; what is no ticket of the device makes none.
func TestTicketOperation(t *testing.T) {
	f := registrationtest.NewFixture(t, "a.example")
	other := f.Replica("a.example")
	d := f.Derived("dev-1")
	r := request(d)
	r.Operation = registration.NewTicket(d.Scope, d.ID)
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() { // with ordinary ones of the same device and proof beside it: neither gets the other's operation
			s, req := []*registration.Service{f.Service, other}[i%2], request(d)
			if i < 8 {
				req.Operation = r.Operation
			}
			st, err := s.Register(t.Context(), req)
			if err != nil || (st.OperationID == r.Operation) != (i < 8) {
				t.Errorf("%+v, %v", st, err)
			}
		})
	}
	wg.Wait()
	for _, bad := range []string{"4.x", "5.0000000000000000.00000000-0000-4000-8000-000000000000", registration.NewTicket(d.Scope, "dev-2")} {
		r := request(d)
		r.Operation = bad
		if _, err := f.Service.Register(t.Context(), r); dps.AsError(err).Code != dps.CodeNotFound {
			t.Errorf("%s: %v", bad, err)
		}
	}
}

// Whoever is put off would have been served, and as well without the body. DPS-D 19: a payload of null is none.
func FuzzDeferrable(f *testing.F) {
	for _, body := range []string{"", " ", "{}", `{"registrationId":"DEV-1"}` + "\n", `{"registrationId":"dev-2"}`, `{"payload":null}`, `{"payload":{"a":1}}`, `{"PAYLOAD":0}`,
		`{"payload":1,"payload":null}`, `{"csr":"MIIB"}`, `{"csr":null}`, `{"tpm":{}}`, `{"tpm":null}`, "{", "[]", "null", `{"a":` + strings.Repeat("[", 300), `{"registrationId":1}`} {
		f.Add([]byte(body))
	}
	x := registrationtest.NewFixture(f, "a.example")
	d := x.Derived("dev-1")
	f.Fuzz(func(t *testing.T, body []byte) {
		r := request(d)
		r.APIVersion, r.Body = "2025-07-01-preview", body
		if !registration.Deferrable(r) {
			return
		}
		st, err := x.Service.Register(t.Context(), r)
		if err != nil {
			t.Fatalf("%q can be put off, and would be refused: %v", body, err)
		}
		if st, err = x.Service.Status(t.Context(), r, st.OperationID); err != nil || st.Status != dps.Assigned || st.RegistrationState.Payload != nil {
			t.Fatalf("%q can be put off, and comes to %+v, %v", body, st, err)
		}
		r.Proof.TPM = &attest.TPMKeys{}
		if registration.Deferrable(r) {
			t.Fatal("a TPM's challenge can be put off")
		}
	})
}
