package devhub

import (
	"context"
	"encoding/json"
	"strings"
	"time"

	"github.com/touchmark/touchmark/pkg/dps"
)

// methodAnswer is what a device answered a method.
type methodAnswer struct {
	status  int
	payload json.RawMessage
}

// Limits of methods.
const (
	maxMethodName = 100
	maxMethodBody = 128 << 10
	maxMethods    = 64 // under way at one device
)

func methodFailure(name string, number int, message string) *failure {
	return &failure{name: name, number: number, message: message, structured: true}
}

func notOnline() *failure {
	return methodFailure("DeviceNotOnline", 404103, "The operation failed because the requested device isn't online or hasn't registered the direct method callback.")
}

func checkMethodName(name string) error {
	if name == "" || len(name) > maxMethodName {
		return badArgument("methodName: want 1 to %d characters", maxMethodName)
	}
	for _, c := range name {
		if c <= ' ' || c > '~' || strings.ContainsRune("$()<>@,;:\\\"/[]?={}+#", c) {
			return badArgument("methodName: %q is not allowed", c)
		}
	}
	return nil
}

// Invoke calls a direct method of a device that is connected, or connects within the first wait, and waits for its answer. The
// payload is JSON. Errors are refusals as a service would read them: no such device, not online, no answer in time.
func (h *Hub) Invoke(ctx context.Context, id, name string, payload json.RawMessage, connect, response time.Duration) (status int, answer json.RawMessage, err error) {
	if err := checkMethodName(name); err != nil {
		return 0, nil, err
	}
	if len(payload) > maxMethodBody {
		return 0, nil, tooLarge(maxMethodBody)
	}
	timer := time.NewTimer(connect)
	defer timer.Stop()
	for {
		ch, arrived, err := h.begin(id, name, payload)
		if err != nil {
			return 0, nil, err
		}
		if ch != nil {
			return h.finish(ctx, id, ch, response)
		}
		select {
		case <-arrived:
		case <-timer.C:
			return 0, nil, notOnline()
		case <-ctx.Done():
			return 0, nil, ctx.Err()
		}
	}
}

// call is a method under way.
type call struct {
	rid    string
	answer chan methodAnswer
}

// begin sends a method to a device that takes some; else it returns what is closed when it does.
func (h *Hub) begin(id, name string, payload json.RawMessage) (*call, <-chan struct{}, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	d := h.devices[id]
	if d == nil {
		return nil, nil, notFound(id)
	}
	if _, takes := d.subs[methodFilter]; !takes || d.session == nil {
		if d.arrived == nil {
			d.arrived = make(chan struct{})
		}
		return nil, d.arrived, nil
	}
	if len(d.methods) >= maxMethods {
		return nil, nil, methodFailure("ThrottlingException", 429001, "Too many methods are under way at the device.")
	}
	if d.methods == nil {
		d.methods = make(map[string]chan methodAnswer)
	}
	c := &call{dps.NewUUID(), make(chan methodAnswer, 1)}
	d.methods[c.rid] = c.answer
	d.push(methodFilter, "$iothub/methods/POST/"+name+"/?$rid="+c.rid, payload)
	return c, nil, nil
}

func (h *Hub) finish(ctx context.Context, id string, c *call, response time.Duration) (int, json.RawMessage, error) {
	timer := time.NewTimer(response)
	defer timer.Stop()
	var err error
	select {
	case a, ok := <-c.answer:
		if !ok {
			return 0, nil, notOnline()
		}
		if a.payload == nil {
			return 0, nil, methodFailure("GenericBadGateway", 502000, "The device's answer is no JSON.")
		}
		return a.status, a.payload, nil
	case <-timer.C:
		err = methodFailure("GatewayTimeout", 504101, "Timed out waiting for the response from device.")
	case <-ctx.Done():
		err = ctx.Err()
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if d := h.devices[id]; d != nil {
		delete(d.methods, c.rid)
	}
	return 0, nil, err
}

// answered takes a device's answer to a method. Nobody may wait for it any more.
func (s *session) answered(rest string, payload []byte) error {
	status, rid, ok := parseAnswer(rest)
	if !ok || len(payload) > maxMethodBody {
		return errHangUp
	}
	a := methodAnswer{status: status}
	switch {
	case len(payload) == 0:
		a.payload = json.RawMessage("null")
	default:
		if _, err := parse(payload); err == nil {
			a.payload = payload
		}
	}
	s.h.mu.Lock()
	defer s.h.mu.Unlock()
	if d := s.device(); d != nil && d.methods[rid] != nil {
		d.methods[rid] <- a // has room for one, and is gone behind it
		delete(d.methods, rid)
	}
	return nil
}
