package main

import (
	"context"
	"crypto/hkdf"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"os/signal"
	"slices"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/pkg/amqpd"
	"github.com/touchmark/touchmark/pkg/devhub"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/httpd"
	"github.com/touchmark/touchmark/pkg/mqttd"
	"github.com/touchmark/touchmark/pkg/registration"
)

// hubOptions are what serve takes for the hub in its own process.
type hubOptions struct {
	hubMessages, hubConnectionOut string

	builtin bool // asked for
}

// builtinHub is what --hub names it by; it is called what the service's host is.
const builtinHub = "builtin"

// What the hub keeps in a data directory.
const (
	hubFile           = "hub.db"
	hubKeyFile        = "hub.key"
	hubConnectionFile = "hub.connection"
	hubPolicy         = "iothubowner"
)

func (o *hubOptions) flags(c *cobra.Command) {
	f := c.Flags()
	f.StringVar(&o.hubMessages, "hub-messages", "", "with --hub builtin: file that every message from a device is appended to as a line of JSON; - is standard output")
	f.StringVar(&o.hubConnectionOut, "hub-connection-out", "", "with --hub builtin: file for the hub's connection string, written anew (default: hub.connection in the data directory)")
}

// checkHub finds the built-in hub among the hubs, and gives it its name there.
func (o *serveOptions) checkHub() error {
	i := slices.Index(o.hubs, builtinHub)
	if o.builtin = i >= 0; !o.builtin {
		if o.hubMessages != "" || o.hubConnectionOut != "" {
			return usageError{errors.New("--hub-messages and --hub-connection-out are for --hub builtin")}
		}
		return nil
	}
	o.hubs = slices.Clone(o.hubs)
	if o.hubs[i] = o.hostnames[0]; slices.Contains(o.hubs[i+1:], builtinHub) || slices.Contains(append(o.hubs[:i:i], o.hubs[i+1:]...), o.hostnames[0]) {
		return usageError{fmt.Errorf("--hub builtin is the hub %s, which is named twice", o.hostnames[0])}
	}
	return nil
}

// runningHub is the built-in hub of a service.
type runningHub struct {
	*devhub.Hub
	connectionFile string // empty: the ready line has it
}

// openHub opens the hub, where one is asked for; it is nil else. Nothing is written to standard output before ready is closed.
func (a *app) openHub(ctx context.Context, o *serveOptions, d *serviceData, ready <-chan struct{}, log *slog.Logger) (*runningHub, func() error, error) {
	none := func() error { return nil }
	if !o.builtin {
		return nil, none, nil
	}
	secret, err := d.ensure(hubKeyFile, 0o600, func() ([]byte, error) { return d.seed.Bytes("built-in hub", 32), nil })
	if err != nil {
		return nil, nil, fmt.Errorf("key of the built-in hub: %w", err)
	}
	dataKey, err := hkdf.Expand(sha256.New, secret, "data at rest", 32)
	if err != nil {
		return nil, nil, fmt.Errorf("key of the built-in hub: %w", err)
	}
	cfg := devhub.Config{Name: o.hostnames[0], Hosts: []string{"localhost", "127.0.0.1", "::1"}, Secret: secret, DataKey: dataKey, Log: log}
	if d.dir != "" {
		cfg.Path = d.path(hubFile)
	}
	var lines io.Closer
	switch o.hubMessages {
	case "":
	case "-":
		signal.Ignore(syscall.SIGPIPE) // a reader that goes away costs lines, not the service
		cfg.Lines = gate{a.out, ready}
	default:
		f, err := os.OpenFile(o.hubMessages, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
		if err != nil {
			return nil, nil, usageError{fmt.Errorf("--hub-messages: %w", err)}
		}
		cfg.Lines, lines = f, f
	}
	h, err := devhub.Open(ctx, cfg)
	if err != nil {
		if lines != nil {
			err = errors.Join(err, lines.Close())
		}
		return nil, nil, err
	}
	r := &runningHub{h, o.hubConnectionOut}
	if r.connectionFile == "" && d.dir != "" {
		r.connectionFile = d.path(hubConnectionFile)
	}
	return r, func() error {
		err := h.Close()
		if lines != nil {
			err = errors.Join(err, lines.Close())
		}
		return err
	}, nil
}

// openedBy returns what opens linked hubs: the built-in one, which is the first scope's, is asked without a connection.
func (r *runningHub) openedBy(first string, open func(string, registration.LinkedHub) (registration.Hub, error)) func(string, registration.LinkedHub) (registration.Hub, error) {
	return func(scope string, h registration.LinkedHub) (registration.Hub, error) {
		switch {
		case h.Kind != registration.HubBuiltin:
			return open(scope, h)
		case r == nil || dps.Fold(scope) != dps.Fold(first):
			return nil, errors.New("the built-in hub is not running, or is another scope's: start the service with --hub builtin")
		}
		return r.Linked(), nil
	}
}

// hubDoors is what the doors hand devices and services over to.
type hubDoors interface {
	mqttd.Hub
	amqpd.Hub
}

// door returns the hub for the doors, or nil.
func (r *runningHub) door() hubDoors {
	if r == nil {
		return nil
	}
	return r.Hub
}

// describe opens the hub's registry at the HTTPS door and says where it is. Its connection string is a secret: it goes into a file,
// or, where there is none, beside the emulator's others.
func (r *runningHub) describe(ready map[string]any, https *httpd.Config, address string) error {
	ready["hub"] = r.Name()
	if https.Handlers == nil {
		https.Handlers = make(map[string]http.Handler)
	}
	for _, segment := range []string{"devices", "twins", "statistics"} {
		https.Handlers[segment] = r.Hub
	}
	if address == "" {
		return nil
	}
	text := r.ConnectionString(address, hubPolicy)
	if r.connectionFile == "" {
		ready["hubConnectionString"] = text
		return nil
	}
	ready["hubConnectionStringFile"] = r.connectionFile
	return writeFile(r.connectionFile, []byte(text+"\n"), 0o600, true)
}
