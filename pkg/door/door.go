// Package door is what all doors of the service have in common: it takes connections in within limits, does their TLS
// handshakes, and ends them when the service stops. What is spoken behind a door is packages httpd, mqttd and amqpd.
//
// A [Door] is one set of limits; its listeners, and what comes to it inside WebSockets, count together. A handshake runs in
// a goroutine of its own and the conversation in a fresh one, so that the stack that the handshake grew is given back.
//
// Addresses are counted alone where they are of IPv4, and by their /64 where they are of IPv6. Behind trusted proxies the
// address is the one that the proxy tells: in the PROXY protocol, version 2 (binary), or, for HTTPS, in X-Forwarded-For.
// [Certificates] and [Tickets] are what TLS serves and remembers.
package door

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
)

// Config is how a door meets callers.
type Config struct {
	// TLS is made by [TLSConfig].
	TLS *tls.Config
	Log *slog.Logger
	// HandshakeTimeout bounds the handshake, with the PROXY header before it; zero means 10 s.
	HandshakeTimeout time.Duration
	// MaxHandshakes is how many handshakes compute at once; zero means one per processor. Those that wait for their caller do
	// not count.
	MaxHandshakes int
	// MaxConnections and MaxPerAddress bound the open connections; zero means 20,000 and 2,000. Who comes when all places are
	// taken waits for one; who has too many is hung up on.
	MaxConnections, MaxPerAddress int
	// NewPerSecond bounds the new connections of an address, behind MaxPerAddress of them at once. Zero means a tenth of those
	// per second, and 50 at least.
	NewPerSecond float64

	// FirstOctet bounds a conversation's silence behind the handshake; zero means 10 s.
	FirstOctet time.Duration
	// A packet that has begun has Slack, and a second for every MinRate octets that came of it, to be whole: whoever sends
	// one octet every few seconds is cut. Silence between packets is the handler's to bound. Zero means 10 s and 128.
	Slack   time.Duration
	MinRate int
	// MaxOctets is what a conversation may bring in all; zero means 4 MiB.
	MaxOctets int64

	// Proxies are trusted to tell the address of whom they speak for. They begin every connection with a PROXY header, and are
	// not counted themselves. From anybody else such a header is a bad handshake.
	Proxies []netip.Prefix
	// HeaderOptional lets proxies leave the PROXY header out: they speak HTTP and say it there.
	HeaderOptional bool
	// TLSProxies are trusted like Proxies, and for more: they end their callers' TLS, and say whose certificates they saw. No PROXY
	// header may name one of them: behind a proxy that passes on what it gets, anybody could write one.
	TLSProxies []netip.Prefix
}

// drainTime is how long those who are being answered when the service stops have for it.
const drainTime = 10 * time.Second

// A Conn is a connection that can be talked on. Once the service stops its read deadline is over and stays so: whoever waits
// for the caller's next word ends, and whoever is answering can still write.
type Conn struct {
	net.Conn
	// Remote is the caller's address, HOST:PORT, for limits and logs.
	Remote string
	// Certificates are the client's, leaf first; possession of the first one's key has been shown.
	Certificates []*x509.Certificate

	most, read int64 // octets: what may come, and came
	slot       *slot // below, where there is one

	mu     sync.Mutex
	ending bool
}

var errTooMuch = errors.New("more octets than a conversation may bring")

// Read is net.Conn's, up to the door's limit for a conversation.
func (c *Conn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if n > 0 && c.slot != nil {
		c.slot.spoken() // the first octet may have come with the end of the handshake
	}
	if c.read += int64(n); c.most > 0 && c.read > c.most {
		return 0, errTooMuch
	}
	return n, err
}

// SetReadDeadline is net.Conn's, until the service stops: then it returns net.ErrClosed. A handler calls it before every
// packet: what comes from then on must keep the pace of [Config]. Inside WebSockets a deadline that passes while somebody
// reads ends the connection, for writing too.
func (c *Conn) SetReadDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ending {
		return net.ErrClosed
	}
	return c.Conn.SetReadDeadline(t)
}

// Unbound lifts the limit for what a conversation may bring, for one that goes on for good. The pace stays. It is called by who
// reads.
func (c *Conn) Unbound() {
	c.most = 0
	if u, ok := c.Conn.(interface{ Unbound() }); ok {
		u.Unbound()
	}
}

// Aside says that what came just now was whole, and no part of a packet: a WebSocket's ping or pong. Where nothing of the
// next packet came before it, silence is the handler's to bound again. It is called from within Read.
func (c *Conn) Aside() {
	if c.slot != nil {
		c.slot.aside()
	}
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

	slots     chan struct{} // one per connection, from before it is accepted until it is closed
	computing chan struct{} // one per handshake that computes
	callers   callers

	open, shook, failed atomic.Int64 // connections; handshakes

	mu     sync.Mutex
	conns  map[*Conn]struct{}
	ending bool
	wait   sync.WaitGroup // for conns
}

// New returns a door.
func New(cfg Config) *Door {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	orElse(&cfg.HandshakeTimeout, 10*time.Second)
	orElse(&cfg.MaxHandshakes, runtime.GOMAXPROCS(0))
	orElse(&cfg.MaxConnections, 20_000)
	orElse(&cfg.MaxPerAddress, 2_000)
	orElse(&cfg.NewPerSecond, max(float64(cfg.MaxPerAddress)/10, 50))
	orElse(&cfg.FirstOctet, 10*time.Second)
	orElse(&cfg.Slack, 10*time.Second)
	orElse(&cfg.MinRate, 128)
	orElse(&cfg.MaxOctets, 4<<20)
	return &Door{cfg: cfg, slots: make(chan struct{}, cfg.MaxConnections), computing: make(chan struct{}, cfg.MaxHandshakes), conns: make(map[*Conn]struct{}),
		callers: callers{most: cfg.MaxPerAddress, perSecond: rate.Limit(cfg.NewPerSecond), room: cfg.MaxConnections + idleCallers, by: make(map[netip.Prefix]*caller)}}
}

func orElse[T comparable](v *T, def T) {
	var zero T
	if *v == zero {
		*v = def
	}
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

// Counts returns how many connections are open, and how many handshakes ended well and otherwise since the start.
func (d *Door) Counts() (open int, shook, failed int64) {
	return int(d.open.Load()), d.shook.Load(), d.failed.Load()
}

// Handle has a handler talk on one connection, and closes it. It is for connections that came in some other way than by
// Serve, and returns when the conversation is over. A handler that panics ends its own conversation only, and is logged.
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
	c.most = d.cfg.MaxOctets
	if over, ok := c.Conn.(interface{ NetConn() net.Conn }); ok {
		if s, ok := over.NetConn().(*slot); ok {
			c.slot = s
			s.pace()
		}
	}
	defer func() {
		d.mu.Lock()
		delete(d.conns, c)
		d.mu.Unlock()
		d.wait.Done()
	}()
	defer func() {
		if what := recover(); what != nil { // one device's conversation, and not everybody's
			d.cfg.Log.Error("a conversation panicked", "remote", c.Remote, "panic", what, "stack", string(debug.Stack()))
		}
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
		go c.Close() // a WebSocket waits for its peer's goodbye; Handle returns behind it
	}
	d.mu.Unlock()
	<-done
}
