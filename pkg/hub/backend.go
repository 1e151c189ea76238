package hub

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
)

// Headers of what we post. SignatureHeader holds t=SECONDS,v1=HEX: when it was signed, and the HMAC-SHA256 under the shared
// secret of those seconds in decimal, a full stop, and the body.
const (
	SignatureHeader   = "Touchmark-Signature"
	IdempotencyHeader = "Idempotency-Key"
)

func sign(secret, body []byte, now time.Time) string {
	t := strconv.FormatInt(now.Unix(), 10)
	mac := hmac.New(sha256.New, secret)
	mac.Write([]byte(t + "."))
	mac.Write(body)
	return "t=" + t + ",v1=" + hex.EncodeToString(mac.Sum(nil))
}

const maxBackend = 256 << 10

// backend posts each call to a webhook, whose words "touchmark help hubs" lists.
type backend struct {
	rest
	url    string
	secret []byte
}

func newBackend(cfg Config, conn *Connection) *backend {
	return &backend{newREST(cfg, conn, maxBackend), conn.url.String(), conn.secret}
}

// backendVersion is that of request and answer.
const backendVersion = 1

type backendRequest struct {
	Version   int                   `json:"version"`
	Operation string                `json:"operation"`
	Hub       string                `json:"hub"`
	DeviceID  string                `json:"deviceId,omitempty"`
	Device    *backendDevice        `json:"device,omitempty"`
	Twin      *registration.HubTwin `json:"twin,omitempty"`
}

// backendAnswer is untrusted.
type backendAnswer struct {
	Version int                   `json:"version"`
	Created *bool                 `json:"created"`
	Device  *backendDevice        `json:"device"`
	Twin    *registration.HubTwin `json:"twin"`
	Error   struct {
		Code    string `json:"code"`
		Message string `json:"message"`
	} `json:"error"`
}

type backendDevice struct {
	DeviceID       string                       `json:"deviceId"`
	Disabled       bool                         `json:"disabled"`
	Keys           *dps.SymmetricKeyAttestation `json:"keys,omitempty"` // only to the backend
	Thumbprints    []string                     `json:"thumbprints,omitempty"`
	IoTEdge        bool                         `json:"iotEdge"`
	Scope          string                       `json:"scope,omitempty"`
	Parent         string                       `json:"parent,omitempty"`
	RegistrationID string                       `json:"registrationId,omitempty"`
	Group          string                       `json:"group,omitempty"`
}

// post makes a call. has says whether an answer of 2xx has what belongs in it, and nothing else.
func (h *backend) post(ctx context.Context, q backendRequest, has func(*backendAnswer) bool) (*backendAnswer, error) {
	doing := "calling the webhook, operation " + q.Operation
	if q.Operation != "check" {
		doing += ", for device " + strconv.Quote(q.DeviceID)
		if err := checkID(q.DeviceID); err != nil {
			return nil, newError(h.name, codeArgument, false, err)
		}
	}
	q.Version, q.Hub = backendVersion, h.name
	body, err := dps.Marshal(q)
	if err != nil {
		return nil, newError(h.name, codeArgument, false, fmt.Errorf("%s: %w", doing, err))
	}
	header := http.Header{SignatureHeader: {sign(h.secret, body, h.now())}, IdempotencyHeader: {dps.NewUUID()}, "Accept": {"application/json"}}
	a, err := h.call(ctx, doing, http.MethodPost, h.url, header, body)
	if err != nil {
		return nil, err
	}
	got, err := parseBackend(a.body)
	if a.status/100 != 2 {
		if err != nil {
			got = new(backendAnswer) // the status says enough
		}
		e := h.refused(doing, a, got.Error.Code, got.Error.Message)
		if a.status == http.StatusNotFound && got.Error.Code == codeNotFound {
			e.Err = fmt.Errorf("%s: %w", doing, registration.ErrNotFound)
		}
		return nil, e
	}
	if err == nil && !has(got) {
		err = errors.New("it has not what belongs in an answer to " + q.Operation + ", or more")
	}
	if err != nil {
		return nil, h.invalid(doing, a.status, err)
	}
	return got, nil
}

// parseBackend reads the body of an answer.
func parseBackend(body []byte) (*backendAnswer, error) {
	a := new(backendAnswer)
	if err := decode(body, a, true); err != nil {
		return nil, err
	}
	if a.Version != backendVersion {
		return nil, fmt.Errorf("its version is %d, want %d", a.Version, backendVersion)
	}
	if a.Twin != nil {
		for _, part := range []json.RawMessage{a.Twin.Tags, a.Twin.Desired} {
			if _, err := stripped(part); err != nil {
				return nil, err
			}
		}
	}
	return a, nil
}

func empty(a *backendAnswer) bool { return a.Created == nil && a.Device == nil && a.Twin == nil }

// Check posts "check".
func (h *backend) Check(ctx context.Context) error {
	_, err := h.post(ctx, backendRequest{Operation: "check"}, empty)
	return err
}

// Device posts "device".
func (h *backend) Device(ctx context.Context, id string) (*registration.HubDevice, error) {
	a, err := h.post(ctx, backendRequest{Operation: "device", DeviceID: id}, func(a *backendAnswer) bool {
		return a.Created == nil && a.Twin == nil && a.Device != nil && a.Device.DeviceID == id && a.Device.Keys == nil
	})
	if err != nil {
		return nil, err
	}
	d := a.Device
	return &registration.HubDevice{ID: d.DeviceID, Disabled: d.Disabled, Thumbprints: d.Thumbprints, IoTEdge: d.IoTEdge, Scope: d.Scope,
		Parent: d.Parent, RegistrationID: d.RegistrationID, Group: d.Group}, nil
}

// Admit posts "admit".
func (h *backend) Admit(ctx context.Context, d *registration.HubDevice) (created bool, err error) {
	if err := checkDevice(h.name, d); err != nil {
		return false, err
	}
	a, err := h.post(ctx, backendRequest{Operation: "admit", DeviceID: d.ID, Device: &backendDevice{DeviceID: d.ID, Disabled: d.Disabled, Keys: d.Keys,
		Thumbprints: d.Thumbprints, IoTEdge: d.IoTEdge, Parent: d.Parent, RegistrationID: d.RegistrationID, Group: d.Group}}, func(a *backendAnswer) bool {
		return a.Created != nil && a.Device == nil && a.Twin == nil
	})
	if err != nil {
		return false, err
	}
	return *a.Created, nil
}

// Remove posts "remove".
func (h *backend) Remove(ctx context.Context, id string) error {
	_, err := h.post(ctx, backendRequest{Operation: "remove", DeviceID: id}, empty)
	if isNotFound(err) {
		return nil
	}
	return err
}

// Twin posts "twin".
func (h *backend) Twin(ctx context.Context, id string) (*registration.HubTwin, error) {
	a, err := h.post(ctx, backendRequest{Operation: "twin", DeviceID: id}, func(a *backendAnswer) bool {
		return a.Created == nil && a.Device == nil && a.Twin != nil
	})
	if err != nil {
		return nil, err
	}
	return a.Twin, nil
}

// MergeTwin posts "mergeTwin".
func (h *backend) MergeTwin(ctx context.Context, id string, t *registration.HubTwin) error {
	_, err := h.post(ctx, backendRequest{Operation: "mergeTwin", DeviceID: id, Twin: t}, empty)
	return err
}
