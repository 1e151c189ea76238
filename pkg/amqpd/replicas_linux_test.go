package amqpd_test

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/url"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/amqp"
	"github.com/touchmark/touchmark/pkg/device"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
	"github.com/touchmark/touchmark/pkg/sqlstore/sqlstoretest"
)

// What devices read of three replicas on one database is what they read of one service.
func TestReplicas(t *testing.T) {
	fresh := registrationtest.Replicas(sqlstoretest.Start(t))
	for name, serve := range map[string]registrationtest.Serve{"AMQP": serve, "in WebSockets": serveSocket} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			registrationtest.Doors(t, fresh, serve)
		})
	}
	t.Run("TPM", func(t *testing.T) {
		t.Parallel()
		tpmOfReplicas(t, fresh(t, "hub-a.example.net"))
	})
}

// A TPM is challenged by one replica, and its device brings the proof to another, when the connection that it was challenged on is
// gone; or it goes on there. It asks a third what became of it.
func tpmOfReplicas(t *testing.T, f *registrationtest.Fixture) {
	var doors []*service
	for _, r := range f.Replicas() {
		doors = append(doors, open(t, r))
	}
	soft, err := device.NewSoftTPM(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	ek, srk, _ := soft.Keys(t.Context())
	f.Put(t, registration.Individual, "tpm-1", dps.Enrollment{Attestation: &dps.Attestation{Type: dps.AttestationTPM, TPM: &dps.TPMAttestation{EndorsementKey: base64.StdEncoding.EncodeToString(ek)}}})
	d := registrationtest.Device{Scope: registrationtest.Scope, ID: "tpm-1", APIVersion: "2019-03-31"}
	for i := range 6 {
		at := func(n int) *service { return doors[(i+n)%len(doors)] }
		c := at(0).dial(t, nil)
		c.header(t, amqp.SASL, amqp.SASL)
		expect[*amqp.SASLMechanisms](t, c)
		c.send(t, &amqp.SASLInit{Mechanism: "TPM", InitialResponse: append([]byte("\x00"+d.Scope+"\x00tpm-1\x00"), ek...)})
		expect[*amqp.SASLChallenge](t, c)
		var blob []byte
		for _, response := range [][]byte{srk, nil} {
			c.send(t, &amqp.SASLResponse{Response: append([]byte{0}, response...)})
			blob = append(blob, expect[*amqp.SASLChallenge](t, c).Challenge[1:]...)
		}
		if err := soft.Activate(t.Context(), blob); err != nil {
			t.Fatal(err)
		}
		sr, se := url.QueryEscape(address(d)), fmt.Sprint(f.Now().Add(time.Hour).Unix())
		sum, err := soft.MAC(t.Context(), nil, []byte(sr+"\n"+se))
		if err != nil {
			t.Fatal(err)
		}
		d.Token = "SharedAccessSignature sr=" + sr + "&sig=" + url.QueryEscape(base64.StdEncoding.EncodeToString(sum)) + "&se=" + se + "&skn=registration"
		if i < 3 {
			_ = c.c.Close()
			c = at(1).connect(t, d)
		} else {
			c.send(t, &amqp.SASLResponse{Response: append([]byte{0}, d.Token...)})
			if o := expect[*amqp.SASLOutcome](t, c); o.Code != amqp.SASLOK {
				t.Fatalf("outcome %d", o.Code)
			}
			c.header(t, amqp.AMQP, amqp.AMQP)
			c.send(t, opening)
			expect[*amqp.Open](t, c)
			c.begin(t, d, 10)
		}
		a := c.Register(t, "")
		var st dps.OperationStatus
		if err := json.Unmarshal(a.Body, &st); err != nil || a.Status != 202 {
			t.Fatalf("round %d: %d %s", i, a.Status, a.Body)
		}
		a = at(2).connect(t, d).Status(t, st.OperationID, "")
		if err := json.Unmarshal(a.Body, &st); err != nil || st.Status != dps.Assigned || st.RegistrationState.TPM == nil {
			t.Errorf("round %d: %d %s", i, a.Status, a.Body)
		}
	}
}
