package meter

import (
	"context"
	"errors"
	"strconv"
	"time"

	"github.com/touchmark/touchmark/pkg/registration"
)

// WatchHub returns a hub whose calls are counted, and that is up while its last call was answered.
func (m *Meter) WatchHub(name string, next registration.Hub) registration.Hub {
	return &hub{name, next, m}
}

type hub struct {
	name string
	next registration.Hub
	m    *Meter
}

// call counts a call by how it ended: a status of the hub's, "ok", "notFound", "unreachable", or "error" for the rest.
func call[T any](h *hub, operation string, do func() (T, error)) (T, error) {
	begun := time.Now()
	v, err := do()
	code, up := "ok", 1.0
	var e *registration.HubError
	switch {
	case errors.Is(err, registration.ErrNotFound):
		code = "notFound"
	case errors.As(err, &e) && e.Status != 0:
		if code = strconv.Itoa(e.Status); e.Status >= 500 {
			up = 0
		}
	case errors.As(err, &e):
		code, up = "unreachable", 0
	case err != nil:
		code = "error"
	}
	h.m.Hub(h.name, operation, code, time.Since(begun))
	if !errors.Is(err, context.Canceled) {
		h.m.setUp(h.m.hubs.of(h.name), up)
	}
	return v, err
}

// setUp says whether a hub is up; m.mu keeps it apart from unlinked.
func (m *Meter) setUp(name string, up float64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.ups == nil {
		m.ups = make(map[string]bool)
	}
	m.ups[name] = true
	m.hubUp.WithLabelValues(name).Set(up)
}

// unlinked takes hubs away from those that are up or not, but for these: one that is not linked is neither, and nobody is to be
// alarmed by it for ever.
func (m *Meter) unlinked(linked map[string]bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for name := range m.ups {
		if !linked[name] {
			delete(m.ups, name)
			m.hubUp.DeleteLabelValues(name)
		}
	}
}

// WatchWebhook returns a webhook whose calls are counted; nil for nil.
func (m *Meter) WatchWebhook(next registration.Webhook) registration.Webhook {
	if next == nil {
		return nil
	}
	return &webhook{next, m}
}

type webhook struct {
	next registration.Webhook
	m    *Meter
}

// Call implements [registration.Webhook].
func (w *webhook) Call(ctx context.Context, url string, body []byte) (answer []byte, status int, err error) {
	begun := time.Now()
	answer, status, err = w.next.Call(ctx, url, body)
	code := strconv.Itoa(status)
	if err != nil {
		code = "error"
	}
	w.m.Webhook(code, time.Since(begun))
	return answer, status, err
}

func (h *hub) Check(ctx context.Context) error {
	_, err := call(h, "check", func() (struct{}, error) { return struct{}{}, h.next.Check(ctx) })
	return err
}

func (h *hub) Device(ctx context.Context, id string) (*registration.HubDevice, error) {
	return call(h, "device", func() (*registration.HubDevice, error) { return h.next.Device(ctx, id) })
}

func (h *hub) Admit(ctx context.Context, d *registration.HubDevice) (bool, error) {
	return call(h, "admit", func() (bool, error) { return h.next.Admit(ctx, d) })
}

func (h *hub) Remove(ctx context.Context, id string) error {
	_, err := call(h, "remove", func() (struct{}, error) { return struct{}{}, h.next.Remove(ctx, id) })
	return err
}

func (h *hub) Twin(ctx context.Context, id string) (*registration.HubTwin, error) {
	return call(h, "twin", func() (*registration.HubTwin, error) { return h.next.Twin(ctx, id) })
}

func (h *hub) MergeTwin(ctx context.Context, id string, t *registration.HubTwin) error {
	_, err := call(h, "mergeTwin", func() (struct{}, error) { return struct{}{}, h.next.MergeTwin(ctx, id, t) })
	return err
}
