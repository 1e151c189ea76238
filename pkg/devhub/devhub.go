// Package devhub is a small development hub: what a device talks to once it has registered, in the same process as the
// registration service, so that the whole way from power-on to telemetry runs on one machine.
//
// A [Hub] keeps devices, with their twins, in memory, and in one SQLite file where it is given one. [Hub.ServeHTTP] is the
// registry's REST as Azure's service SDKs speak it; [Hub.Serve] holds the conversation of one device over MQTT, once package
// mqttd has read its CONNECT; [Hub.Linked] is the hub as the registration service tells it about devices, without a round trip.
// Messages to a device go by [Hub.Send], or over AMQP, by [Hub.ServeAMQP]; those from devices come to [Config.Telemetry].
//
// It is for development: 10,000 devices unless told otherwise, messages in memory only, no modules, no jobs, no routes, no file
// uploads, no feedback, no AMQP for devices. Everything that comes from outside is bounded. A Hub may be used by many goroutines; one lock guards it.
//
// The wire is service API, section 5.
package devhub

import (
	"context"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"time"
)

// Config is what a hub needs.
type Config struct {
	// Name is the hub's host name, as devices are told it: without a port.
	Name string
	// Hosts are further names that tokens may be for.
	Hosts []string
	// Secret is what the keys of the hub's policies are derived from: 16 octets at least.
	Secret []byte
	// Path is the SQLite file that devices are kept in; it is made when it is not there. Empty keeps them in memory.
	Path string
	// DataKey encrypts devices' keys in the file: 32 octets.
	DataKey []byte
	// MaxDevices bounds the devices; zero means 10,000.
	MaxDevices int
	// Roots are the CAs for devices of type certificateAuthority; nil lets none of them in.
	Roots *x509.CertPool
	// Telemetry is told of every message of a device's before it is acknowledged, in the order of the device. It must not keep the
	// device waiting.
	Telemetry func(*Message)
	// Lines takes every message of a device's as a line of JSON.
	Lines io.Writer
	Log   *slog.Logger
	Now   func() time.Time
	// Second is the length of the second by which keep-alives and waits are counted; zero means a second. Tests have shorter ones.
	Second time.Duration
}

// Hub is a development hub.
type Hub struct {
	cfg   Config
	store *store // nil in memory

	lines sync.Mutex // guards cfg.Lines

	mu      sync.Mutex
	devices map[string]*device
	kept    int // octets of telemetry
	closed  bool
}

// device is what the hub has of one device. Hub.mu guards it; what rec points to never changes.
type device struct {
	rec *record

	session  *session        // nil while it is not connected
	subs     map[string]byte // its subscriptions by filter, with their QoS: of now, or of a session that lasts; nil for neither
	nextID   uint16          // the last packet identifier that was used
	modelID  string          // as it said when it last connected
	queue    []*queued       // to the device, oldest first
	inbox    []*Message
	methods  map[string]chan methodAnswer // by request ID
	arrived  chan struct{}                // closed when the device begins to take methods; nil while nobody waits
	active   time.Time                    // zero: never
	switched time.Time                    // when it last connected or disconnected
}

// Limits of a hub.
const (
	maxDevices  = 10_000
	maxInbox    = 100       // messages kept of one device
	maxKept     = 64 << 20  // octets kept of all, and octets that wait for all
	maxDeviceTo = 256 << 10 // octets of a message from a device
	maxToDevice = 64 << 10  // and of one to it
	maxQueue    = 50        // messages that wait for one device
)

// Open opens a hub with the devices that its file has.
func Open(ctx context.Context, cfg Config) (*Hub, error) {
	if len(cfg.Secret) < 16 {
		return nil, errors.New("the hub's secret must have 16 octets at least")
	}
	if cfg.Name == "" {
		return nil, errors.New("the hub has no name")
	}
	if cfg.MaxDevices == 0 {
		cfg.MaxDevices = maxDevices
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Second == 0 {
		cfg.Second = time.Second
	}
	h := &Hub{cfg: cfg, devices: make(map[string]*device)}
	if cfg.Path == "" {
		return h, nil
	}
	var err error
	if h.store, err = openStore(ctx, cfg.Path, cfg.DataKey); err != nil {
		return nil, fmt.Errorf("opening hub %s: %w", cfg.Path, err)
	}
	records, err := h.store.load(ctx)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("reading hub %s: %w", cfg.Path, err), h.store.close())
	}
	for _, r := range records {
		h.devices[r.ID] = &device{rec: r}
	}
	return h, nil
}

// Close hangs up on every device and closes the file. The doors are to be closed before.
func (h *Hub) Close() error {
	h.mu.Lock()
	h.closed = true
	for _, d := range h.devices {
		d.hangUp()
	}
	h.mu.Unlock()
	if h.store == nil {
		return nil
	}
	return h.store.close()
}

// Name returns the hub's host name.
func (h *Hub) Name() string { return h.cfg.Name }

func (h *Hub) now() time.Time { return h.cfg.Now().UTC() }

// A Right is what a policy allows (service API, section 5.1).
type Right byte

// The rights of a hub's policies.
const (
	RegistryRead Right = 1 << iota
	RegistryWrite
	ServiceConnect
	DeviceConnect
)

// policies are those that every hub of Azure's begins with. RegistryWrite implies reading.
var policies = map[string]Right{
	"iothubowner":       RegistryRead | RegistryWrite | ServiceConnect | DeviceConnect,
	"service":           ServiceConnect,
	"device":            DeviceConnect,
	"registryRead":      RegistryRead,
	"registryReadWrite": RegistryRead | RegistryWrite,
}

// Key returns a policy's primary or secondary key: 32 octets that are the same as long as the hub's secret is. ok says whether
// there is such a policy; names are told apart by case.
func (h *Hub) Key(policy string, secondary bool) (key []byte, ok bool) {
	if _, ok := policies[policy]; !ok {
		return nil, false
	}
	label := "policy " + policy + ", primary key"
	if secondary {
		label = "policy " + policy + ", secondary key"
	}
	key, err := hkdf.Key(sha256.New, h.cfg.Secret, []byte("touchmark hub, version 1"), label, 32)
	return key, err == nil
}

// ConnectionString returns a policy's connection string, which is a secret, for callers at an address, HOST or HOST:PORT. It is
// empty where there is no such policy.
func (h *Hub) ConnectionString(address, policy string) string {
	key, ok := h.Key(policy, false)
	if !ok {
		return ""
	}
	return fmt.Sprintf("HostName=%s;SharedAccessKeyName=%s;SharedAccessKey=%s", strings.TrimSuffix(address, ":443"), policy, base64.StdEncoding.EncodeToString(key))
}
