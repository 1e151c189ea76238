package operator

import (
	"context"
	"iter"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/touchmark/touchmark/pkg/dps"
)

// A Task is what hubs have yet to be told about a device, by a touchmark service.
type Task struct {
	RegistrationID string `json:"registrationId"` // folded
	// State is "assigning" while the device waits, "linking" where it is only put below its parent, and "cleanup" when it has gone on
	// and former hubs have yet to forget it.
	State     string   `json:"state"`
	Hub       string   `json:"hub,omitempty"`  // where it goes
	Away      []Place  `json:"away,omitempty"` // where it is not to stay
	Begun     dps.Time `json:"begun"`
	Due       dps.Time `json:"due"` // when it is tried next
	Attempts  int      `json:"attempts"`
	LastError string   `json:"lastError,omitempty"` // untrusted text
}

// A Place is a device at a hub.
type Place struct {
	Hub      string `json:"hub"`
	DeviceID string `json:"deviceId"`
}

// Left names the hubs that have yet to forget the device.
func (t *Task) Left() string {
	var hubs []string
	for _, p := range t.Away {
		if !slices.Contains(hubs, p.Hub) {
			hubs = append(hubs, p.Hub)
		}
	}
	return strings.Join(hubs, ", ")
}

// An Orphan is a device at a hub that could not be asked to forget it.
type Orphan struct {
	RegistrationID string   `json:"registrationId"` // folded
	Hub            string   `json:"hub"`
	DeviceID       string   `json:"deviceId"`
	Since          dps.Time `json:"since"`
	Reason         string   `json:"reason"` // untrusted text
}

// A Child is a device that names an edge device as its parent.
type Child struct {
	RegistrationID string `json:"registrationId"` // folded
	Parent         string `json:"parent"`
	Hub            string `json:"hub"`
	Linked         bool   `json:"linked"`            // the hub has it below its parent
	Pending        string `json:"pending,omitempty"` // why not; untrusted text
}

// own yields a list of touchmark's own.
func own[T any](ctx context.Context, c *Client, path string) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		pages(ctx, c.caller, http.MethodGet, path, pageSize, func(item T, err error) bool { return yield(item, unsupported(err)) })
	}
}

// Outbox yields what hubs have yet to be told, in the order of IDs. The error is ErrUnsupported where the service is another's.
func (c *Client) Outbox(ctx context.Context) iter.Seq2[*Task, error] {
	return own[*Task](ctx, c, "/touchmark/outbox")
}

// Orphans yields the devices that a hub could not be asked to forget. The error is ErrUnsupported where the service is another's.
func (c *Client) Orphans(ctx context.Context) iter.Seq2[*Orphan, error] {
	return own[*Orphan](ctx, c, "/touchmark/orphans")
}

// ForgetOrphan takes a device off that list: somebody has looked after it. The error is ErrNotFound.
func (c *Client) ForgetOrphan(ctx context.Context, id, hub, deviceID string) error {
	return c.remove(ctx, "/touchmark/orphans/"+url.PathEscape(id)+"?"+url.Values{"hub": {hub}, "deviceId": {deviceID}}.Encode(), "")
}

// Children yields the devices that name an edge device as their parent in this way, by registration ID or device ID. The error is
// ErrUnsupported where the service is another's.
func (c *Client) Children(ctx context.Context, parent string) iter.Seq2[*Child, error] {
	return own[*Child](ctx, c, "/touchmark/edges/"+url.PathEscape(parent)+"/children")
}
