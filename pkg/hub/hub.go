// Package hub tells linked hubs about devices, and asks a webhook where a device is to go.
//
// [Open] returns a linked hub as package registration wants it, by its kind: Azure IoT Hub and what speaks its registry and twin
// REST, Eclipse Mosquitto with its dynamic security plugin, any backend that takes a webhook, or none. How a hub is reached stands in
// its connection string, which [ParseConnection] checks, [Mask] shows without its secrets and [Restore] completes again. A
// [Pool] keeps hubs open, and keeps one that hangs from holding up the others. A [Webhook] makes the calls of custom allocation.
//
// Everything here may be used by many goroutines. What hubs answer is bounded in size and time, and parsed strictly; calls go over
// TLS, follow no redirects, and name no secret in their errors. The wire is that of the service API reference, sections 4.7 and 5.
package hub

import (
	"context"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"time"
	"unicode"

	"github.com/touchmark/touchmark/pkg/registration"
)

// Config says how a hub is opened.
type Config struct {
	// Hub is which.
	Hub registration.LinkedHub
	// Timeout bounds one call to the hub, of which a method may make several; 0 is 10 seconds. ConnectTimeout bounds the making
	// of a connection; 0 is 5 seconds.
	Timeout, ConnectTimeout time.Duration
	// MaxConnections that are open to the hub at once; 0 is 16. A broker has one.
	MaxConnections int
	// PublicOnly refuses hubs at private, loopback and link-local addresses: for services whose tenants link hubs themselves.
	PublicOnly bool
	// Now is the clock that tokens are made by; nil is the real one.
	Now func() time.Time
}

func (c *Config) defaults() {
	if c.Timeout <= 0 {
		c.Timeout = 10 * time.Second
	}
	if c.ConnectTimeout <= 0 {
		c.ConnectTimeout = 5 * time.Second
	}
	if c.Now == nil {
		c.Now = time.Now
	}
}

// Open returns the hub. It makes no connection yet: [registration.Hub.Check] does. A hub that keeps connections is an io.Closer,
// to be closed when no call runs; a [Pool] does that.
func Open(cfg Config) (registration.Hub, error) {
	cfg.defaults()
	conn, err := ParseConnection(cfg.Hub.Kind, cfg.Hub.ConnectionString)
	if err != nil {
		return nil, fmt.Errorf("linked hub %s: %w", cfg.Hub.Name, err)
	}
	switch cfg.Hub.Kind {
	case registration.HubAzure, registration.HubBuiltin:
		return newAzure(cfg, conn), nil
	case registration.HubMosquitto:
		return newMosquitto(cfg, conn), nil
	case registration.HubWebhook:
		return newBackend(cfg, conn), nil
	default: // ParseConnection knows no further one
		return record{name: cfg.Hub.Name}, nil
	}
}

// Codes that errors have when it was not the hub that gave them one.
const (
	codeTimeout     = "Timeout"
	codeUnreachable = "Unreachable"
	codeCanceled    = "Canceled"
	codeInvalid     = "InvalidAnswer"   // the hub's answer is none
	codeArgument    = "ArgumentInvalid" // the device is none for this hub
	codeConflict    = "Conflict"        // somebody else keeps changing the device
	codeOpen        = "CircuitOpen"
	codeBusy        = "Busy"
	codeNotFound    = "DeviceNotFound"
)

func newError(hub, code string, temporary bool, err error) *registration.HubError {
	return &registration.HubError{Hub: hub, Code: code, Temporary: temporary, Err: err}
}

// noAnswer is the error of a call that ended without an answer: time may heal that.
func noAnswer(hub, doing string, err error) *registration.HubError {
	code := codeUnreachable
	var t interface{ Timeout() bool }
	switch {
	case errors.Is(err, context.Canceled):
		code = codeCanceled
	case errors.Is(err, context.DeadlineExceeded), errors.As(err, &t) && t.Timeout():
		code = codeTimeout
	case errors.Is(err, errAddress):
		return newError(hub, codeArgument, false, fmt.Errorf("%s: %w", doing, err))
	}
	if errors.Is(err, context.DeadlineExceeded) {
		err = late{err}
	}
	return newError(hub, code, true, &whileDoing{doing, err})
}

// late is the error of a call whose time ran out, in words.
type late struct{ error }

func (e late) Error() string { return "no answer in time" }
func (e late) Unwrap() error { return e.error }

// whileDoing is an error, and what was being done when it came.
type whileDoing struct {
	doing string
	err   error
}

func (e *whileDoing) Error() string { return e.doing + ": " + e.err.Error() }
func (e *whileDoing) Unwrap() error { return e.err }

// notFound is the error of a device that is not there.
func notFound(hub, id string, status int) *registration.HubError {
	return &registration.HubError{Hub: hub, Status: status, Code: codeNotFound, Err: fmt.Errorf("device %.128q: %w", id, registration.ErrNotFound)}
}

func isNotFound(err error) bool { return errors.Is(err, registration.ErrNotFound) }

// checkDevice checks what Admit is given, whatever the hub.
func checkDevice(hub string, d *registration.HubDevice) error {
	bad := func(format string, args ...any) error {
		return newError(hub, codeArgument, false, fmt.Errorf("device %.128q: "+format, append([]any{d.ID}, args...)...))
	}
	if err := checkID(d.ID); err != nil {
		return bad("%w", err)
	}
	if (d.Keys == nil) == (len(d.Thumbprints) == 0) {
		return bad("want either keys or thumbprints")
	}
	if d.Keys != nil {
		for _, key := range []string{d.Keys.PrimaryKey, d.Keys.SecondaryKey} {
			if b, err := base64.StdEncoding.Strict().DecodeString(key); err != nil || len(b) < 16 || len(b) > 64 {
				return bad("a key is not base64 of 16 to 64 octets")
			}
		}
	}
	if len(d.Thumbprints) > 2 {
		return bad("it has %d thumbprints, hubs have room for two", len(d.Thumbprints))
	}
	for _, t := range d.Thumbprints {
		if b, err := hex.DecodeString(t); err != nil || len(b) != 32 || t != strings.ToUpper(t) {
			return bad("a thumbprint is not upper-case hex of SHA-256")
		}
	}
	return nil
}

// checkID refuses what no hub takes as a device ID. IoT Hub has 1 to 128 characters of ASCII; what else an ID may be is the hub's
// to say.
func checkID(id string) error {
	if id == "" || len(id) > 128 || strings.ContainsFunc(id, func(r rune) bool { return r <= ' ' || r >= unicode.MaxASCII }) || id == "." || id == ".." {
		return errors.New("want an ID of 1 to 128 visible ASCII characters")
	}
	return nil
}

// opaque finds what may be a key or a signature.
var opaque = regexp.MustCompile(`[A-Za-z0-9+/%]{22,}=*`)

// said prepares what a hub said for an error: short, printable, and without what looks like a key, for a hub may quote its caller.
func said(text string) string {
	text = strings.Map(func(r rune) rune {
		if r == unicode.ReplacementChar || !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, text)
	text = strings.TrimSpace(opaque.ReplaceAllString(text, secretMask))
	if len(text) > 200 {
		text = strings.ToValidUTF8(text[:200], "") + "…"
	}
	return text
}

// code keeps a hub's name for an error if it is one.
func code(s string) string {
	if len(s) > 64 || strings.ContainsFunc(s, func(r rune) bool {
		return (r < '0' || r > '9') && (r|0x20 < 'a' || r|0x20 > 'z') && r != '_' && r != '.'
	}) {
		return ""
	}
	return s
}

// record is a hub that is told nothing.
type record struct{ name string }

func (record) Check(context.Context) error { return nil }

func (r record) Device(_ context.Context, id string) (*registration.HubDevice, error) {
	return nil, notFound(r.name, id, 0)
}

// Admit says that the device was not there: nobody knows.
func (r record) Admit(_ context.Context, d *registration.HubDevice) (bool, error) {
	return true, checkDevice(r.name, d)
}

func (record) Remove(context.Context, string) error { return nil }

func (record) Twin(context.Context, string) (*registration.HubTwin, error) {
	return &registration.HubTwin{}, nil
}

func (record) MergeTwin(context.Context, string, *registration.HubTwin) error { return nil }
