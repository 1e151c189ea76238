// Package door is what all doors of the service have in common: it takes connections in within limits, does their TLS
// handshakes, and ends them when the service stops. What is spoken behind a door is packages httpd, mqttd and amqpd.
//
// A [Door] is one set of limits; its listeners, and what comes to it inside WebSockets, count together. A handshake runs in
// a goroutine of its own and the conversation in a fresh one, so that the stack that the handshake grew is given back.
package door

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"
)

// Config is how a door meets callers.
type Config struct {
	// TLS is made by [TLSConfig].
	TLS *tls.Config
	Log *slog.Logger
	// HandshakeTimeout bounds the handshake; zero means 10 s.
	HandshakeTimeout time.Duration
	// MaxConnections and MaxPerAddress bound the open connections; zero means 20,000 and 2,000. Who comes when all places are
	// taken waits for one; who has too many is hung up on.
	MaxConnections, MaxPerAddress int
}

// drainTime is how long those who are being answered when the service stops have for it.
const drainTime = 10 * time.Second

// TLSConfig is how devices are met on every door: TLS 1.2 and 1.3, a client certificate asked for and not required, with
// an empty list of authorities and no judgement in the handshake (device API, sections 7.2 and 14). Sessions are not
// resumed: every connection proves itself.
func TLSConfig(certificate func(*tls.ClientHelloInfo) (*tls.Certificate, error), alpn ...string) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12, GetCertificate: certificate, ClientAuth: tls.RequestClientCert, NextProtos: alpn, SessionTicketsDisabled: true,
	}
}

// A Conn is a connection that can be talked on. Once the service stops its read deadline is over and stays so: whoever waits
// for the caller's next word ends, and whoever is answering can still write.
type Conn struct {
	net.Conn
	// Remote is the caller's address, HOST:PORT, for limits and logs.
	Remote string
	// Certificates are the client's, leaf first; possession of the first one's key has been shown.
	Certificates []*x509.Certificate

	mu     sync.Mutex
	ending bool
}

// SetReadDeadline is net.Conn's, until the service stops: then it returns net.ErrClosed.
func (c *Conn) SetReadDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ending {
		return net.ErrClosed
	}
	return c.Conn.SetReadDeadline(t)
}

func (c *Conn) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ending = true
	_ = c.Conn.SetReadDeadline(time.Now())
}

// A Handler holds one conversation. The connection is closed when it returns. The context ends when the service stops.
type Handler func(ctx context.Context, c *Conn) error

// Door takes connections in.
type Door struct {
	cfg Config

	slots chan struct{} // one per connection, from before it is accepted until it is closed

	mu     sync.Mutex
	byAddr map[string]int // connections by address
	conns  map[*Conn]struct{}
	ending bool
	wait   sync.WaitGroup // for conns
}

// New returns a door.
func New(cfg Config) *Door {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.HandshakeTimeout == 0 {
		cfg.HandshakeTimeout = 10 * time.Second
	}
	if cfg.MaxConnections == 0 {
		cfg.MaxConnections = 20_000
	}
	if cfg.MaxPerAddress == 0 {
		cfg.MaxPerAddress = 2_000
	}
	return &Door{cfg: cfg, slots: make(chan struct{}, cfg.MaxConnections), byAddr: make(map[string]int), conns: make(map[*Conn]struct{})}
}

// Serve has a handler talk to everybody who comes to a TCP listener, until the context ends. Requests that are being worked
// on are answered then, for a bounded time; connections that wait are closed.
func (d *Door) Serve(ctx context.Context, l net.Listener, handle Handler) error {
	in := d.Listener(ctx, l)
	stop := context.AfterFunc(ctx, func() { _ = in.Close() })
	defer stop()
	for {
		c, err := in.Accept()
		if err != nil {
			d.Drain()
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		tc := c.(*tls.Conn)
		go d.Handle(ctx, &Conn{Conn: tc, Remote: tc.RemoteAddr().String(), Certificates: tc.ConnectionState().PeerCertificates}, handle)
	}
}

// Handle has a handler talk on one connection, and closes it. It is for connections that came in some other way than by
// Serve, and returns when the conversation is over.
func (d *Door) Handle(ctx context.Context, c *Conn, handle Handler) {
	defer c.Close()
	d.mu.Lock()
	if d.ending {
		d.mu.Unlock()
		return
	}
	d.conns[c] = struct{}{}
	d.wait.Add(1)
	d.mu.Unlock()
	defer func() {
		d.mu.Lock()
		delete(d.conns, c)
		d.mu.Unlock()
		d.wait.Done()
	}()
	if err := handle(ctx, c); err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
		d.cfg.Log.Debug("connection ended", "remote", c.Remote, "cause", err)
	}
}

// Drain ends what waits for its caller's next word, lets what is being answered finish, and closes the rest after a while.
// The door takes nobody in afterwards.
func (d *Door) Drain() {
	d.mu.Lock()
	d.ending = true
	for c := range d.conns {
		c.end()
	}
	d.mu.Unlock()
	done := make(chan struct{})
	go func() {
		d.wait.Wait()
		close(done)
	}()
	select {
	case <-done:
		return
	case <-time.After(drainTime):
	}
	d.mu.Lock()
	for c := range d.conns {
		_ = c.Close()
	}
	d.mu.Unlock()
	<-done
}

// take counts a connection of an address in, unless it has too many; give counts it out.
func (d *Door) take(address string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.byAddr[address] >= d.cfg.MaxPerAddress {
		return false
	}
	d.byAddr[address]++
	return true
}

func (d *Door) give(address string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.byAddr[address]--; d.byAddr[address] == 0 {
		delete(d.byAddr, address)
	}
}
