package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/touchmark/touchmark/pkg/amqpd"
	"github.com/touchmark/touchmark/pkg/door"
	"github.com/touchmark/touchmark/pkg/httpd"
	"github.com/touchmark/touchmark/pkg/mqttd"
	"github.com/touchmark/touchmark/pkg/registration"
)

// doorOptions are where serve listens.
type doorOptions struct {
	https, mqtt, amqp string
	delay             time.Duration

	httpsAsked bool
}

func (o *doorOptions) flags(c *cobra.Command) {
	f := c.Flags()
	f.StringVar(&o.https, "https", ":443", "address of the HTTPS door, which takes MQTT and AMQP in WebSockets too, or off; where 443 is not permitted, 8443")
	f.StringVar(&o.mqtt, "mqtt", ":8883", "address of the MQTT door, or off")
	f.StringVar(&o.amqp, "amqp", ":5671", "address of the AMQP door, or off")
	f.DurationVar(&o.delay, "mqtt-response-delay", 60*time.Millisecond, "pause between the acknowledgement of a request and its response, over MQTT and AMQP, which Azure's Java SDK needs; 0 for none")
}

// listenAll opens the doors' listeners, by name. A door that is off has none.
func (a *app) listenAll(o *serveOptions) (_ map[string]net.Listener, err error) {
	open := make(map[string]net.Listener)
	defer func() {
		if err != nil {
			for _, l := range open {
				err = errors.Join(err, l.Close())
			}
		}
	}()
	for _, d := range [][2]string{{"https", o.https}, {"mqtt", o.mqtt}, {"amqp", o.amqp}, {"metrics", o.meter.metrics}} {
		name, address := d[0], d[1]
		l, err := o.listen(name, address)
		if errors.Is(err, fs.ErrPermission) && name == "https" && !o.httpsAsked {
			a.note("port 443 is not permitted here: the HTTPS door opens on 8443; Azure's device SDKs expect 443")
			l, err = o.listen(name, strings.TrimSuffix(address, "443")+"8443")
		}
		if err != nil {
			return nil, err
		}
		if l != nil {
			open[name] = l
		}
	}
	return open, nil
}

func (o *serveOptions) listen(what, address string) (net.Listener, error) {
	if address == "off" {
		return nil, nil
	}
	if err := o.exposes(what, address); err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		err = fmt.Errorf("opening the %s door: %w", what, err)
		var address *net.AddrError
		var name *net.DNSError
		if errors.As(err, &address) || errors.As(err, &name) {
			return nil, hint(usageError{err}, "--%s wants HOST:PORT, :PORT or off", what)
		}
		if errors.Is(err, syscall.EADDRINUSE) {
			return nil, hint(err, "another program listens there: stop it, or choose another address with --%s", what)
		}
		return nil, err
	}
	return l, nil
}

// serveDoors has devices answered at the open doors until the context ends.
func (o *serveOptions) serveDoors(ctx context.Context, eg *errgroup.Group, open map[string]net.Listener, front *front, registrar registration.Registrar, overloaded func(*registration.Request) bool, hub hubDoors, https httpd.Config) {
	delay := o.delay
	if delay == 0 {
		delay = -1
	}
	mqtt := func(protocol string) door.Handler {
		return mqttd.New(mqttd.Config{Hub: hub, Registrar: registrar, Overloaded: overloaded, Protocol: protocol, Log: front.log, ResponseDelay: delay}).Handle
	}
	amqp := func(protocol string) door.Handler {
		return amqpd.New(amqpd.Config{Hub: hub, Registrar: registrar, Protocol: protocol, Log: front.log, ResponseDelay: delay}).Handle
	}
	if l := open["https"]; l != nil {
		https.Registrar, https.Door, https.Forwarded = registrar, front.door("https"), httpd.ForwardedCertificate(o.front.forwarded)
		https.Sockets = map[string]door.Handler{"mqtt": mqtt("mqtt-ws"), "amqpwsb10": amqp("amqp-ws")}
		server := httpd.New(https)
		eg.Go(func() error { return server.Serve(ctx, l) })
	}
	if l := open["mqtt"]; l != nil {
		eg.Go(func() error { return front.door("mqtt").Serve(ctx, l, mqtt("mqtt")) })
	}
	if l := open["amqp"]; l != nil {
		eg.Go(func() error { return front.door("amqp").Serve(ctx, l, amqp("amqp")) })
	}
}

// reachable names a listener as a caller on this machine would: by host name where it listens on every address.
func reachable(l net.Listener, host string) string {
	a := l.Addr().(*net.TCPAddr)
	if !a.IP.IsUnspecified() && !a.IP.IsLoopback() {
		host = a.IP.String()
	}
	return net.JoinHostPort(host, fmt.Sprint(a.Port))
}
