package main

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/pkg/door"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/httpd"
	"github.com/touchmark/touchmark/pkg/meter"
	"github.com/touchmark/touchmark/pkg/registration"
)

// frontOptions say how the doors of serve meet callers.
type frontOptions struct {
	tlsCerts, tlsKeys, tlsOCSP   []string
	trustedProxies, tlsProxies   []string
	forwarded                    string
	maxConnections, maxPerCaller int

	proxies, enders []netip.Prefix // of trustedProxies, and of tlsProxies
}

func (o *frontOptions) flags(c *cobra.Command) {
	f := c.Flags()
	f.StringArrayVar(&o.tlsCerts, "tls-cert", nil, "PEM file with the certificate chain for TLS, instead of one of the service's own; again for a chain with another kind of key")
	f.StringArrayVar(&o.tlsKeys, "tls-key", nil, "PEM file with its private key; again for the next --tls-cert")
	f.StringArrayVar(&o.tlsOCSP, "tls-ocsp", nil, "DER file with the OCSP response for a --tls-cert, to be stapled while it is good; again for more")
	f.StringArrayVar(&o.trustedProxies, "trusted-proxy", nil, "address or CIDR of proxies that tell whom they speak for: by PROXY protocol v2 on every door, on HTTPS by X-Forwarded-For as well; again for more")
	f.StringArrayVar(&o.tlsProxies, "tls-proxy", nil, "address or CIDR of proxies of HTTPS that end TLS and tell whom they speak for by X-Forwarded-For; again for more")
	f.StringVar(&o.forwarded, "trust-forwarded-client-cert", "", "take client certificates from the proxies of --tls-proxy: rfc9440 (Client-Cert; the default form) or envoy (X-Forwarded-Client-Cert)")
	f.Lookup("trust-forwarded-client-cert").NoOptDefVal = string(httpd.ClientCert)
	f.IntVar(&o.maxConnections, "max-connections", 20_000, "open connections of each door; who comes then waits for one to end")
	f.IntVar(&o.maxPerCaller, "max-connections-per-address", 2_000, "open connections of one address, or one IPv6 /64; a tenth as many may be new in a second")
	_ = c.RegisterFlagCompletionFunc("trust-forwarded-client-cert", cobra.FixedCompletions([]string{string(httpd.ClientCert), string(httpd.EnvoyCert)}, cobra.ShellCompDirectiveNoFileComp))
}

func (o *frontOptions) check() error {
	switch {
	case len(o.tlsCerts) != len(o.tlsKeys):
		return usageError{fmt.Errorf("%d --tls-cert and %d --tls-key: every chain needs its key", len(o.tlsCerts), len(o.tlsKeys))}
	case len(o.tlsOCSP) > 0 && len(o.tlsCerts) == 0:
		return usageError{errors.New("--tls-ocsp is for a certificate that --tls-cert names")}
	case o.maxConnections < 1 || o.maxPerCaller < 1:
		return usageError{errors.New("--max-connections and --max-connections-per-address must be 1 at least")}
	case o.forwarded != "" && o.forwarded != string(httpd.ClientCert) && o.forwarded != string(httpd.EnvoyCert):
		return usageError{fmt.Errorf("--trust-forwarded-client-cert=%s: want rfc9440 or envoy", o.forwarded)}
	case o.forwarded != "" && len(o.tlsProxies) == 0:
		return hint(usageError{errors.New("--trust-forwarded-client-cert without --tls-proxy would let everybody be any device")}, "name the proxies that end TLS with --tls-proxy; one that passes TLS on, of --trusted-proxy, must not be among them")
	}
	var err error
	if o.proxies, err = networks("--trusted-proxy", o.trustedProxies); err != nil {
		return err
	}
	o.enders, err = networks("--tls-proxy", o.tlsProxies)
	return err
}

// networks reads the values of a flag that names proxies.
func networks(flag string, texts []string) (all []netip.Prefix, err error) {
	for _, text := range texts {
		p, err := netip.ParsePrefix(text)
		if err != nil {
			a, aerr := netip.ParseAddr(text)
			if aerr != nil || a.Zone() != "" {
				return nil, usageError{fmt.Errorf("%s %s: want an address or ADDRESS/BITS", flag, text)}
			}
			p = netip.PrefixFrom(a, a.BitLen())
		}
		if p != p.Masked() || p.Addr().Is4In6() || p.Bits() == 0 {
			return nil, usageError{fmt.Errorf("%s %s: want a network, without bits behind it, and not everybody", flag, text)}
		}
		all = append(all, p)
	}
	return all, nil
}

// front is how the doors of a running service meet callers.
type front struct {
	o           *frontOptions
	certificate func(*tls.ClientHelloInfo) (*tls.Certificate, error)
	files       *door.Certificates // nil for a certificate of the service's own
	tickets     *door.Tickets
	log         *slog.Logger

	mu    sync.Mutex // guards doors
	doors map[string]*door.Door
}

func (d *serviceData) front(ctx context.Context, o *serveOptions, store registration.Store, log *slog.Logger) (*front, error) {
	f := &front{o: &o.front, log: log, doors: make(map[string]*door.Door)}
	var err error
	if len(o.front.tlsCerts) == 0 {
		f.certificate, err = d.certificate(o)
	} else {
		cfg := door.CertificatesConfig{OCSP: o.front.tlsOCSP, Log: log}
		for i, name := range o.front.tlsCerts {
			cfg.Pairs = append(cfg.Pairs, door.Pair{Certificate: name, Key: o.front.tlsKeys[i]})
		}
		if f.files, err = door.LoadCertificates(cfg); err != nil {
			return nil, usageError{fmt.Errorf("--tls-cert and --tls-key: %w", err)}
		}
		f.certificate = f.files.Get
	}
	if err != nil {
		return nil, err
	}
	// The first of the replicas makes the secret.
	const name = "session tickets"
	var secret []byte
	err = store.Update(ctx, func(tx registration.Tx) (err error) {
		secret, err = tx.Secret(dps.Fold(d.scope), name)
		if !errors.Is(err, registration.ErrNotFound) {
			return err
		}
		secret = make([]byte, door.TicketSecretSize)
		if _, err := rand.Read(secret); err != nil {
			return err
		}
		return tx.PutSecret(dps.Fold(d.scope), name, secret)
	})
	if err != nil {
		return nil, fmt.Errorf("secret for session tickets: %w", err)
	}
	f.tickets, err = door.NewTickets(secret, nil)
	return f, err
}

// door returns a door of that name. Proxies of HTTP may say there whom they speak for.
func (f *front) door(name string) *door.Door {
	http := name == "https"
	var alpn []string
	if http {
		alpn = []string{"http/1.1"}
	}
	cfg := door.Config{TLS: door.TLSConfig(f.certificate, alpn...), Log: f.log, MaxConnections: f.o.maxConnections, MaxPerAddress: f.o.maxPerCaller,
		Proxies: f.o.proxies, HeaderOptional: http}
	if http {
		cfg.TLSProxies = f.o.enders
	}
	f.tickets.Use(cfg.TLS)
	d := door.New(cfg)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.doors[name] = d
	return d
}

// counts are what the doors have let in.
func (f *front) counts() map[string]meter.Door {
	f.mu.Lock()
	defer f.mu.Unlock()
	all := make(map[string]meter.Door)
	for name, d := range f.doors {
		open, shook, failed := d.Counts()
		all[name] = meter.Door{Connections: open, Handshakes: shook, FailedHandshakes: failed}
	}
	return all
}

// watch reads the certificate files again at every SIGHUP, until the context ends.
func (f *front) watch(ctx context.Context) error {
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-hup:
			if f.files != nil {
				f.files.Reload()
			}
		}
	}
}
