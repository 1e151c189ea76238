package registration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/touchmark/touchmark/pkg/dps"
)

// A Hub is a linked hub as this service tells it about devices. Every method may be called again after it failed, or after
// its answer was lost: doing a thing twice is doing it once. Errors that time may heal are a [*HubError] with Temporary set.
// A Hub may be used by many goroutines.
type Hub interface {
	// Check asks the hub for something cheap, to know that it is there and takes our credentials.
	Check(ctx context.Context) error
	// Device returns a device without its keys, or ErrNotFound.
	Device(ctx context.Context, id string) (*HubDevice, error)
	// Admit has the hub know a device by these credentials, capabilities and this parent. Of a device that the hub has already
	// it changes those alone, and keeps its status: an operator may have disabled it there. created says that it was not there.
	Admit(ctx context.Context, d *HubDevice) (created bool, err error)
	// Remove has the hub forget a device. That it has none of that ID is no error.
	Remove(ctx context.Context, id string) error
	// Twin returns the tags and the desired properties of a device, without the hub's own metadata, or ErrNotFound. A hub that
	// has no twins returns an empty one.
	Twin(ctx context.Context, id string) (*HubTwin, error)
	// MergeTwin merges into a device's tags and desired properties; members that are null go away. A hub that has no twins does
	// nothing.
	MergeTwin(ctx context.Context, id string, t *HubTwin) error
}

// A HubDevice is a device as a hub is to have it. It has either Keys or Thumbprints.
type HubDevice struct {
	ID string // as the hub spells it; hubs tell IDs apart by case
	// Disabled bars the device at the hub. Admit writes it only of devices that it creates.
	Disabled bool
	// Keys are what a device with a symmetric key or a TPM signs its hub tokens with: base64, in both slots. Secret.
	Keys *dps.SymmetricKeyAttestation
	// Thumbprints are those of the certificates that the device shows its hub, primary and secondary, which may be equal:
	// upper-case hex of SHA-256.
	Thumbprints []string
	// IoTEdge says that the device is an edge device, which may have children.
	IoTEdge bool
	// Scope is what the hub calls an edge device as a parent, "ms-azure-iot-edge://…"; hubs make it, Admit does not look at it.
	Scope string
	// Parent is the Scope of the edge device above this one; empty for none.
	Parent string

	// Of the registration, for hubs that are told more than IoT Hub is.
	RegistrationID string
	Group          string // empty for an individual enrollment
}

// A HubTwin is what a device's twin holds that moves with it. Its parts are JSON objects, or nil.
type HubTwin struct {
	Tags    json.RawMessage `json:"tags,omitempty"`
	Desired json.RawMessage `json:"desired,omitempty"`
}

// A HubError is what a hub answered, or that it did not.
type HubError struct {
	Hub    string // its name
	Status int    // HTTP status, or 0 without an answer
	Code   string // the hub's name for it, such as "DeviceNotFound"; may be empty
	// Temporary says that the same call may succeed later: throttled, overloaded, unreachable. RetryAfter is when at the earliest,
	// where the hub said so.
	Temporary  bool
	RetryAfter time.Duration
	Err        error // without secrets
}

// Error names the hub.
func (e *HubError) Error() string { return fmt.Sprintf("hub %s: %v", e.Hub, e.Err) }

// Unwrap returns the cause.
func (e *HubError) Unwrap() error { return e.Err }

// isTemporary reports whether time may heal a hub's error.
func isTemporary(err error) bool {
	var e *HubError
	return errors.As(err, &e) && e.Temporary
}

// HubKind says what kind of system a linked hub is.
type HubKind string

// The kinds of hubs.
const (
	HubRecord    HubKind = "record"    // nothing to tell: another system makes the devices known
	HubAzure     HubKind = "azure"     // Azure IoT Hub, or what speaks its registry and twin REST
	HubBuiltin   HubKind = "builtin"   // the small development hub of this program
	HubMosquitto HubKind = "mosquitto" // Eclipse Mosquitto with its dynamic security plugin
	HubWebhook   HubKind = "webhook"   // any backend that takes a call for each change
)

// A LinkedHub is a hub that devices of a scope may be assigned to.
type LinkedHub struct {
	// Name is what devices are told: the hub's host name, without a port. Unique in its scope, in any case.
	Name string  `json:"name"`
	Kind HubKind `json:"kind"`
	// ConnectionString is how the hub is reached, by kind (see package hub). Secret; a record hub has none.
	ConnectionString string `json:"connectionString,omitempty"`
	// Location is the region that it is in, for geoLatency.
	Location string `json:"location,omitempty"`
	// Weight is its share of evenly weighted allocation, 1 to 1000; 0 is 1.
	Weight int `json:"weight,omitempty"`
	// Reserved keeps it out of allocation unless an enrollment names it (applyAllocationPolicy false).
	Reserved bool `json:"reserved,omitempty"`
	// FromStart says that the start of the service named it: a start that does not name it unlinks it.
	FromStart bool `json:"fromStart,omitempty"`
}

// String hides the connection string.
func (h LinkedHub) String() string { return h.Name }

// GoString hides the connection string.
func (h LinkedHub) GoString() string { return h.Name }
