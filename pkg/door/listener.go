package door

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// Listener returns a listener whose Accept hands out *tls.Conn whose handshake is done. Handshakes run beside each other and
// end with the context; closing the listener closes the one beneath.
func (d *Door) Listener(ctx context.Context, l net.Listener) net.Listener {
	in := &listener{Listener: l, d: d, ready: make(chan *tls.Conn), closed: make(chan struct{})}
	go in.run(ctx)
	return in
}

type listener struct {
	net.Listener
	d      *Door
	ready  chan *tls.Conn
	once   sync.Once
	closed chan struct{}
	err    error // why, once closed
}

func (l *listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.ready:
		return c, nil
	case <-l.closed:
		return nil, l.err
	}
}

func (l *listener) Close() error { return l.shut(net.ErrClosed) }

func (l *listener) shut(why error) (err error) {
	l.once.Do(func() {
		l.err = why
		close(l.closed)
		err = l.Listener.Close()
	})
	return err
}

func (l *listener) run(ctx context.Context) {
	var pause time.Duration
	for {
		select {
		case l.d.slots <- struct{}{}:
		case <-l.closed:
			return
		}
		c, err := l.Listener.Accept()
		if err == nil {
			pause = 0
			l.meet(ctx, c)
			continue
		}
		<-l.d.slots
		var ne net.Error
		if !errors.As(err, &ne) || errors.Is(err, net.ErrClosed) {
			_ = l.shut(err)
			return
		}
		// Out of file descriptors, most likely: let some go, and go on.
		pause = min(max(2*pause, 5*time.Millisecond), time.Second)
		l.d.cfg.Log.Error("accepting", "cause", err)
		select {
		case <-time.After(pause):
		case <-l.closed:
			return
		}
	}
}

// meet admits a connection and does its handshake.
func (l *listener) meet(ctx context.Context, raw net.Conn) {
	s := &slot{Conn: raw, d: l.d, remote: raw.RemoteAddr()}
	l.d.open.Add(1)
	proxied := l.d.trusts(addressOf(s.remote))
	if !proxied && !s.admit() {
		_ = s.Close()
		return
	}
	go func() {
		ctx, cancel := context.WithTimeout(ctx, l.d.cfg.HandshakeTimeout)
		defer cancel()
		c, err := l.handshake(ctx, s, proxied)
		if err != nil {
			l.d.failed.Add(1)
			// Debug: anybody can cause it.
			l.d.cfg.Log.Debug("handshake failed", "remote", s.remote.String(), "cause", err)
			_ = s.Close() // without the alert that a tls.Conn's Close writes: nobody is known to read it
			return
		}
		l.d.shook.Add(1)
		select {
		case l.ready <- c:
		case <-l.closed:
			_ = c.Close()
		}
	}()
}

var errTooMany = errors.New("too many connections from there")

func (l *listener) handshake(ctx context.Context, s *slot, proxied bool) (*tls.Conn, error) {
	if proxied {
		stop := context.AfterFunc(ctx, func() { _ = s.Close() })
		from, head, err := readProxyHeader(s.Conn)
		stop()
		if within(l.d.cfg.TLSProxies, from.Addr()) {
			err = fmt.Errorf("%w: it speaks for a proxy that ends TLS", errProxyHeader)
		}
		switch {
		case errors.Is(err, errNoProxyHeader) && l.d.cfg.HeaderOptional:
			s.head = head
		case err != nil:
			l.d.cfg.Log.Warn("a trusted proxy's connection is refused", "proxy", s.remote.String(), "cause", err)
			return nil, err
		case from.IsValid():
			s.remote = net.TCPAddrFromAddrPort(from)
			if !l.d.trusts(from.Addr()) && !s.admit() {
				return nil, errTooMany
			}
		}
	}
	c := tls.Server(s, l.d.cfg.TLS)
	s.compute(true)
	err := c.HandshakeContext(ctx)
	s.compute(false)
	return c, err
}
