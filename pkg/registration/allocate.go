package registration

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/touchmark/touchmark/pkg/allocation"
	"github.com/touchmark/touchmark/pkg/dps"
)

// A Webhook calls the operator's own code, which chooses hubs for enrollments with custom allocation. It returns what was
// answered with which status, whatever that is; an error means that there was no answer.
type Webhook interface {
	Call(ctx context.Context, url string, body []byte) (answer []byte, status int, err error)
}

// Bounds of a webhook's answer, in octets. What a device is told must fit into its buffers.
const (
	maxAllocationAnswer  = 64 << 10
	maxAllocationPayload = 16 << 10
)

// A choice is the hub of a device, and what a webhook had to say to it.
type choice struct {
	hub     string
	payload json.RawMessage
	twin    *dps.InitialTwin // nil: the enrollment's
}

// A refusal of allocation makes the registration fail with what the device is told.
type notAllocated struct {
	code    dps.Code
	message string
	cause   error
}

func (e *notAllocated) Error() string { return fmt.Sprintf("%s: %v", e.message, e.cause) }

func (e *notAllocated) Unwrap() error { return e.cause }

func noHub(format string, args ...any) error {
	return &notAllocated{dps.CodeNoHub, "No IoT hub could be chosen", fmt.Errorf(format, args...)}
}

// sticky reports whether a device stays at its hub for ever (service API, section 4.5): by the enrollment's policy, or, without
// one, by an old api-version.
func sticky(req *Request, e *dps.Enrollment) bool {
	if e.ReprovisionPolicy != nil {
		return !e.ReprovisionPolicy.UpdateHubAssignment
	}
	return req.APIVersion <= "2018-04-01"
}

// policy returns the allocation policy that an enrollment has by itself or by its scope.
func policy(e *dps.Enrollment, set *Settings) dps.AllocationPolicy {
	switch {
	case e.AllocationPolicy != "":
		return e.AllocationPolicy
	case e.IoTHubHostName != "": // legacy: it says as much (service API, section 1.5)
		return dps.AllocationStatic
	case set.AllocationPolicy != "":
		return set.AllocationPolicy
	}
	return dps.AllocationHashed
}

// candidates are the hubs that an enrollment allows: those that it names, or all that are not reserved.
func candidates(e *dps.Enrollment, set *Settings) (hubs []LinkedHub, named bool) {
	names := e.IoTHubs
	if e.IoTHubHostName != "" {
		names = []string{e.IoTHubHostName}
	}
	for _, h := range set.Hubs {
		if len(names) == 0 && !h.Reserved || slices.ContainsFunc(names, func(n string) bool { return strings.EqualFold(n, h.Name) }) {
			hubs = append(hubs, h)
		}
	}
	return hubs, len(names) > 0
}

// allocate chooses a hub, without a webhook.
func (s *Service) allocate(req *Request, v *verdict, before *Registration) (choice, error) {
	was, _ := before.assignment()
	switch {
	case v.refused != nil:
		return choice{}, v.refused
	case v.chosen != nil:
		return *v.chosen, nil
	}
	if v.parentHub != "" { // a child is where its parent is
		if v.settings.Hub(v.parentHub) == nil {
			return choice{}, noHub("its parent's hub %s is not linked", v.parentHub)
		}
		return choice{hub: v.parentHub}, nil
	}
	if was != "" && sticky(req, v.enrollment) {
		return choice{hub: was}, nil
	}
	linked, named := candidates(v.enrollment, v.settings)
	hubs := make([]allocation.Hub, len(linked))
	for i, h := range linked {
		hubs[i] = allocation.Hub{Name: h.Name, Location: h.Location, Weight: h.Weight}
	}
	switch p := policy(v.enrollment, v.settings); {
	case len(hubs) == 0:
		return choice{}, noHub("no hub is linked that the enrollment allows")
	case p == dps.AllocationStatic && len(hubs) > 1:
		return choice{}, noHub("static allocation does not say which hub (named: %t)", named)
	case p == dps.AllocationGeoLatency:
		hubs = s.cfg.Latency.Nearest(address(req.Remote), hubs)
	}
	return choice{hub: hubs[allocation.Hashed(dps.Fold(req.RegistrationID), hubs)].Name}, nil
}

// address reads a caller's address, with or without a port; the zero one is unknown.
func address(remote string) netip.Addr {
	if ap, err := netip.ParseAddrPort(remote); err == nil {
		return ap.Addr()
	}
	a, _ := netip.ParseAddr(remote)
	return a
}

// isCustom reports whether a webhook chooses.
func (v *verdict) isCustom() bool { return v.enrollment.AllocationPolicy == dps.AllocationCustom }

// ask has the webhook choose a hub (service API, section 4.7): on every registration, under the policy never among the current hub
// alone, and for a child among its parent's. record is the enrollment's or the group's.
func (s *Service) ask(ctx context.Context, req *Request, body *dps.RegisterRequest, v *verdict, before *Registration, record *Record) (*choice, error) {
	def := v.enrollment.CustomAllocationDefinition
	failed := func(status int, cause error) error {
		return &notAllocated{dps.CodeCustomAllocation, fmt.Sprintf("Custom allocation failed with status code: %d", status), cause}
	}
	if def == nil || s.cfg.Webhook == nil {
		return nil, failed(400, errors.New("the service calls no webhooks, or the enrollment names none"))
	}
	linked, _ := candidates(v.enrollment, v.settings)
	names := make([]string, len(linked))
	for i, h := range linked {
		names[i] = h.Name
	}
	if was, _ := before.assignment(); v.parentHub != "" {
		names = []string{v.parentHub}
	} else if was != "" && sticky(req, v.enrollment) {
		names = []string{was}
	}
	call, err := webhookBody(req, body, v, before, record, names)
	if err != nil {
		return nil, err
	}
	answer, status, err := s.cfg.Webhook.Call(ctx, def.WebhookURL, call)
	switch {
	case err != nil:
		return nil, failed(408, err)
	case status < 200 || status > 299:
		return nil, failed(status, errors.New("the webhook refused"))
	}
	c, err := parseChoice(answer, names)
	if err != nil {
		return nil, failed(400, fmt.Errorf("the webhook's answer: %w", err))
	}
	return c, nil
}

// parseChoice reads a webhook's answer, untrusted. Members that it has beside the three are none of ours.
func parseChoice(answer []byte, linked []string) (*choice, error) {
	if len(answer) > maxAllocationAnswer {
		return nil, errors.New("it is too long")
	}
	var in struct {
		Hub     string           `json:"iotHubHostName"`
		Twin    *dps.InitialTwin `json:"initialTwin"`
		Payload json.RawMessage  `json:"payload"`
	}
	if err := json.Unmarshal(answer, &in); err != nil {
		return nil, errors.New("it is not the JSON object that it should be") // its text may hold what is secret
	}
	i := slices.IndexFunc(linked, func(n string) bool { return strings.EqualFold(n, in.Hub) })
	if i < 0 {
		return nil, fmt.Errorf("iotHubHostName %.100q is none of linkedHubs", in.Hub)
	}
	if bytes.Equal(in.Payload, []byte("null")) {
		in.Payload = nil
	}
	if in.Payload != nil && (in.Payload[0] != '{' || len(in.Payload) > maxAllocationPayload) {
		return nil, fmt.Errorf("payload is no object of at most %d octets", maxAllocationPayload)
	}
	if t := in.Twin; t != nil {
		parts := []json.RawMessage{t.Tags}
		if t.Properties != nil {
			parts = append(parts, t.Properties.Desired)
		}
		for _, part := range parts {
			if part != nil && part[0] != '{' && !bytes.Equal(part, []byte("null")) {
				return nil, errors.New("a part of initialTwin is no object")
			}
		}
	}
	return &choice{hub: linked[i], payload: in.Payload, twin: in.Twin}, nil
}

type runtimeContext struct {
	RegistrationID string              `json:"registrationId"`
	CurrentHub     string              `json:"currentIotHubHostName,omitempty"`
	CurrentDevice  string              `json:"currentDeviceId,omitempty"`
	X509           *runtimeX509        `json:"x509,omitempty"`
	SymmetricKey   *struct{}           `json:"symmetricKey,omitempty"`
	TPM            *dps.TPMAttestation `json:"tpm,omitempty"`
	Payload        json.RawMessage     `json:"payload,omitempty"`
}

type runtimeX509 struct {
	ClientCertificates dps.X509Certificates `json:"clientCertificates"`
}

// webhookBody is what a webhook is asked with. It holds no secret: the record is shown as by the service API, and what stands behind
// the question mark of the webhook's own address is masked.
func webhookBody(req *Request, body *dps.RegisterRequest, v *verdict, before *Registration, record *Record, linked []string) ([]byte, error) {
	d, err := open(record)
	if err != nil {
		return nil, err
	}
	hide(d)
	e := d.base()
	shown := *e.CustomAllocationDefinition
	if at, _, query := strings.Cut(shown.WebhookURL, "?"); query {
		shown.WebhookURL = at + "?****"
	}
	e.CustomAllocationDefinition = &shown
	if shown.APIVersion < "2021-10-01" { // whose entity tags are the quoted text itself (service API, section 1.5)
		if tag, err := base64.StdEncoding.DecodeString(e.ETag); err == nil {
			e.ETag = string(tag)
		}
	}
	out := struct {
		Individual *dps.IndividualEnrollment `json:"individualEnrollment,omitempty"`
		Group      *dps.EnrollmentGroup      `json:"enrollmentGroup,omitempty"`
		Device     runtimeContext            `json:"deviceRuntimeContext"`
		LinkedHubs []string                  `json:"linkedHubs"`
	}{Individual: d.individual, Group: d.group, Device: runtimeContext{RegistrationID: req.RegistrationID}, LinkedHubs: linked}
	out.Device.CurrentHub, out.Device.CurrentDevice = before.assignment()
	switch {
	case v.x509:
		c := dps.X509Certificate{Info: describe(req.Proof.Certificates[0])}
		out.Device.X509 = &runtimeX509{dps.X509Certificates{Primary: &c}}
	case v.tpm != nil:
		out.Device.TPM = &dps.TPMAttestation{EndorsementKey: base64.StdEncoding.EncodeToString(v.tpm.EK), StorageRootKey: base64.StdEncoding.EncodeToString(v.tpm.SRK)}
	default:
		out.Device.SymmetricKey = &struct{}{}
	}
	if !bytes.Equal(body.Payload, []byte("null")) {
		out.Device.Payload = body.Payload
	}
	return json.Marshal(out)
}
