package main

import (
	"context"
	"crypto/tls"
	"log/slog"
	"net"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/touchmark/touchmark/pkg/amqpd"
	"github.com/touchmark/touchmark/pkg/door"
	"github.com/touchmark/touchmark/pkg/registration"
)

// amqpOptions are the flags of the AMQP door.
type amqpOptions struct {
	amqp string
}

func (o *amqpOptions) flags(c *cobra.Command) {
	c.Flags().StringVar(&o.amqp, "amqp", ":5671", "address of the AMQP door, or off")
}

// serveAMQP serves the AMQP door, if there is one, in the group.
func (o *serveOptions) serveAMQP(ctx context.Context, eg *errgroup.Group, l net.Listener, svc registration.Registrar, certificate func(*tls.ClientHelloInfo) (*tls.Certificate, error), log *slog.Logger, ready map[string]any) {
	if l == nil {
		return
	}
	ready["amqp"] = reachable(l, o.hostnames[0])
	delay := o.mqttDelay
	if delay == 0 {
		delay = -1
	}
	handle := amqpd.New(amqpd.Config{Registrar: svc, Log: log, ResponseDelay: delay}).Handle
	eg.Go(func() error {
		return door.New(door.Config{TLS: door.TLSConfig(certificate), Log: log}).Serve(ctx, l, handle)
	})
}
