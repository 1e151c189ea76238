package door

import (
	"context"
	"crypto/tls"
	"errors"
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
	address, _, _ := net.SplitHostPort(raw.RemoteAddr().String())
	if !l.d.take(address) {
		<-l.d.slots
		_ = raw.Close()
		return
	}
	c := tls.Server(&slot{Conn: raw, release: func() {
		l.d.give(address)
		<-l.d.slots
	}}, l.d.cfg.TLS)
	go func() {
		hctx, cancel := context.WithTimeout(ctx, l.d.cfg.HandshakeTimeout)
		err := c.HandshakeContext(hctx)
		cancel()
		if err != nil {
			_ = c.NetConn().Close() // without the alert that c's own Close writes: nobody is known to read it
			return
		}
		select {
		case l.ready <- c:
		case <-l.closed:
			_ = c.Close()
		}
	}()
}

// slot is an admitted connection, counted out once when it closes.
type slot struct {
	net.Conn
	once    sync.Once
	release func()
}

func (s *slot) Close() error {
	s.once.Do(s.release)
	return s.Conn.Close()
}
