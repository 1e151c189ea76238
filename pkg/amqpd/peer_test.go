package amqpd_test

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	peer "github.com/Azure/go-amqp"

	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

// peer connects with Azure's own AMQP client for Go.
func (d *service) peer(ctx context.Context, t *testing.T, device registrationtest.Device, sasl peer.SASLType) (*peer.Conn, error) {
	t.Helper()
	c, err := peer.NewConn(ctx, d.Dial(t, device.Certificate), &peer.ConnOptions{HostName: registrationtest.Host, ContainerID: device.ID, IdleTimeout: time.Minute, SASLType: sasl})
	if err == nil {
		t.Cleanup(func() { _ = c.Close() })
	}
	return c, err
}

// Azure/go-amqp, which is strict about what it reads, registers with every proof and asks until it is assigned. DPS-D 78, 80,
// 84, 86, 90.
func TestGoAMQP(t *testing.T) {
	d := newDoor(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cert, key := registrationtest.ByCertificate("own-cert", d.Own.TLS()), d.Derived("dev-1")
	leaf := registrationtest.ByCertificate("dev-2", attesttest.Leaf(t, d.Mid, "dev-2").TLS(d.Mid))
	first, unsettled := peer.ReceiverSettleModeFirst, peer.SenderSettleModeUnsettled
	settled := peer.SenderSettleModeSettled
	for name, x := range map[string]struct {
		device   registrationtest.Device
		sasl     peer.SASLType
		sender   peer.SenderOptions
		receiver peer.ReceiverOptions
	}{
		"bare":             {device: cert},
		"bare, of a group": {device: leaf},
		"EXTERNAL":         {device: cert, sasl: peer.SASLTypeExternal("")},
		"ANONYMOUS":        {device: cert, sasl: peer.SASLTypeAnonymous()},
		"PLAIN":            {device: key, sasl: peer.SASLTypePlain(address(key), key.Token)},
		"modes asked for":  {device: key, sasl: peer.SASLTypePlain(address(key), key.Token), sender: peer.SenderOptions{SettlementMode: &unsettled}, receiver: peer.ReceiverOptions{SettlementMode: &first, RequestedSenderSettleMode: &unsettled, Credit: 1}},
		"settled":          {device: key, sasl: peer.SASLTypePlain(address(key), key.Token), sender: peer.SenderOptions{SettlementMode: &settled}, receiver: peer.ReceiverOptions{RequestedSenderSettleMode: &settled}},
	} {
		t.Run(name, func(t *testing.T) {
			c, err := d.peer(ctx, t, x.device, x.sasl)
			if err != nil {
				t.Fatal(err)
			}
			s, err := c.NewSession(ctx, nil)
			if err != nil {
				t.Fatal(err)
			}
			properties := map[string]any{"com.microsoft:api-version": "2021-06-01"}
			x.receiver.Properties, x.sender.Properties = properties, properties
			in, err := s.NewReceiver(ctx, address(x.device), &x.receiver)
			if err != nil {
				t.Fatal(err)
			}
			out, err := s.NewSender(ctx, address(x.device), &x.sender)
			if err != nil {
				t.Fatal(err)
			}
			ask := func(properties map[string]any, body string) *dps.OperationStatus {
				id := peer.UUID{1, byte(len(properties))}
				m := peer.NewMessage([]byte(body))
				m.Properties, m.ApplicationProperties = &peer.MessageProperties{CorrelationID: id}, properties
				if err := out.Send(ctx, m, nil); err != nil {
					t.Fatal(err)
				}
				a, err := in.Receive(ctx, nil)
				if err != nil {
					t.Fatal(err)
				}
				if err := in.AcceptMessage(ctx, a); err != nil {
					t.Fatal(err)
				}
				var st dps.OperationStatus
				if err := json.Unmarshal(a.GetData(), &st); err != nil || a.Properties.CorrelationID != id {
					t.Fatalf("%s, %+v, %v", a.GetData(), a.Properties, err)
				}
				if hint := a.ApplicationProperties["retry-after"]; (hint == int32(3)) == st.Status.Terminal() {
					t.Errorf("%s with the hint %v", st.Status, hint)
				}
				return &st
			}
			st := ask(map[string]any{"iotdps-operation-type": "iotdps-register"}, `{"registrationId":"`+x.device.ID+`"}`)
			for !st.Status.Terminal() {
				st = ask(map[string]any{"iotdps-operation-type": "iotdps-get-operationstatus", "iotdps-operation-id": st.OperationID}, "")
			}
			if st.Status != dps.Assigned || st.RegistrationState.DeviceID != x.device.ID {
				t.Errorf("%+v", st.RegistrationState)
			}
			// Another device's address is no link, and the session goes on without it.
			var detached *peer.Error
			if _, err := s.NewSender(ctx, x.device.Scope+"/registrations/dev-9", nil); !errors.As(err, &detached) || detached.Condition != peer.ErrCondUnauthorizedAccess {
				t.Errorf("another device's address: %v", err)
			}
			for _, end := range []func(context.Context) error{in.Close, out.Close, s.Close} {
				if err := end(ctx); err != nil {
					t.Error(err)
				}
			}
			if err := c.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	t.Run("refused", func(t *testing.T) {
		none := registrationtest.Device{Scope: registrationtest.Scope, ID: "dev-1"}
		for _, sasl := range []peer.SASLType{nil, peer.SASLTypeAnonymous()} {
			c, err := d.peer(ctx, t, none, sasl)
			if err == nil {
				_, err = c.NewSession(ctx, nil)
			}
			var closed *peer.ConnError
			if !errors.As(err, &closed) || closed.RemoteErr == nil || closed.RemoteErr.Condition != peer.ErrCondUnauthorizedAccess || !strings.Contains(closed.RemoteErr.Description, "401002") {
				t.Errorf("no proof: %v", err)
			}
		}
		for _, sasl := range []peer.SASLType{peer.SASLTypeExternal(""), peer.SASLTypePlain(address(none), "secret"), peer.SASLTypeXOAUTH2("u", "b", 0)} {
			if _, err := d.peer(ctx, t, none, sasl); err == nil {
				t.Error("no proof, and let in")
			}
		}
		wrong := d.ByKey("dev-1", d.OwnKey)
		c, err := d.peer(ctx, t, wrong, peer.SASLTypePlain(address(wrong), wrong.Token))
		if err != nil {
			t.Fatal(err)
		}
		s, err := c.NewSession(ctx, nil)
		if err != nil {
			t.Fatal(err)
		}
		out, err := s.NewSender(ctx, address(wrong), nil)
		if err != nil {
			t.Fatal(err)
		}
		m := peer.NewMessage(nil)
		m.ApplicationProperties = map[string]any{"iotdps-operation-type": "iotdps-register"}
		var rejected *peer.Error
		if err := out.Send(ctx, m, nil); !errors.As(err, &rejected) || rejected.Condition != peer.ErrCondUnauthorizedAccess || !strings.Contains(rejected.Description, "401002") {
			t.Errorf("a wrong key: %v", err)
		}
	})
}
