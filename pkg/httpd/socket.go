package httpd

import (
	"bufio"
	"context"
	"encoding/base64"
	"errors"
	"math"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/coder/websocket"

	"github.com/touchmark/touchmark/pkg/door"
	"github.com/touchmark/touchmark/pkg/dps"
)

// maxSocket is how many octets may come in on one WebSocket, with its frames' heads, pings and empty frames.
const maxSocket = 8 << 20

// goodbyeTime is how long a WebSocket that ends keeps its place for a peer that does not answer.
const goodbyeTime = 2 * time.Second

// tokens returns the comma-separated tokens of a header, as they are spelled.
func tokens(h http.Header, name string) []string {
	var all []string
	for _, line := range h.Values(name) {
		for t := range strings.SplitSeq(line, ",") {
			all = append(all, strings.Trim(t, " \t"))
		}
	}
	return all
}

func hasToken(h http.Header, name, token string) bool {
	for _, t := range tokens(h, name) {
		if strings.EqualFold(t, token) {
			return true
		}
	}
	return false
}

// socket turns a connection into a WebSocket and has the handler of its subprotocol talk on it: any path, any query, any
// origin (device API, section 13). The frames' library would refuse in plain text, so what it asks for is asked here first.
func (s *Server) socket(ctx context.Context, w http.ResponseWriter, r *http.Request, release func()) {
	handle, spelling, err := s.upgrade(w, r)
	if err != nil {
		release()
		s.fail(w, r, err)
		return
	}
	below := &belowSocket{ResponseWriter: w}
	c := &door.Conn{Remote: r.RemoteAddr}
	ws, err := websocket.Accept(below, r, &websocket.AcceptOptions{Subprotocols: []string{spelling}, InsecureSkipVerify: true,
		OnPingReceived: func(context.Context, []byte) bool { c.Aside(); return true },
		OnPongReceived: func(context.Context, []byte) { c.Aside() }})
	if err != nil {
		release()
		s.cfg.Log.Debug("no WebSocket came of an upgrade", "remote", r.RemoteAddr, "cause", err)
		return
	}
	if r.TLS != nil {
		c.Certificates = r.TLS.PeerCertificates
	}
	c.Conn = &socketConn{websocket.NetConn(context.WithoutCancel(ctx), ws, websocket.MessageBinary), below.conn}
	// In a goroutine of its own: this one's stack has grown with the handshake and the request.
	go func() {
		defer release()
		s.cfg.Door.Handle(ctx, c, handle)
	}()
}

// upgrade checks an upgrade (RFC 6455, section 4.2.1) and finds who talks, and how the client spells that.
func (s *Server) upgrade(w http.ResponseWriter, r *http.Request) (door.Handler, string, error) {
	bad := func(message string) (door.Handler, string, error) {
		return nil, "", dps.NewError(dps.CodeBadRequest, message, nil)
	}
	if r.Method != http.MethodGet {
		w.Header().Set("Allow", http.MethodGet)
		return nil, "", dps.NewError(dps.CodeMethodNotAllowed, "A WebSocket begins with GET", nil)
	}
	keys := r.Header.Values("Sec-WebSocket-Key")
	version := r.Header.Values("Sec-WebSocket-Version")
	switch {
	case !r.ProtoAtLeast(1, 1) || !hasToken(r.Header, "Connection", "Upgrade"):
		return bad("A WebSocket needs HTTP/1.1 and Connection: Upgrade")
	case r.ContentLength != 0:
		return bad("A WebSocket's request has no body")
	case len(version) != 1 || version[0] != "13":
		w.Header().Set("Sec-WebSocket-Version", "13")
		return bad("Sec-WebSocket-Version must be 13")
	case len(keys) != 1:
		return bad("Sec-WebSocket-Key must be there once")
	}
	if key, err := base64.StdEncoding.DecodeString(keys[0]); err != nil || len(key) != 16 {
		return bad("Sec-WebSocket-Key must be 16 octets in base64")
	}
	for _, spelling := range tokens(r.Header, "Sec-WebSocket-Protocol") {
		if handle := s.cfg.Sockets[strings.ToLower(spelling)]; handle != nil {
			return handle, spelling, nil
		}
	}
	return bad("Sec-WebSocket-Protocol names no protocol that is spoken here")
}

// belowSocket keeps the connection that a WebSocket is made of.
type belowSocket struct {
	http.ResponseWriter
	conn net.Conn
}

func (b *belowSocket) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	c, rw, err := http.NewResponseController(b.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	b.conn = &boundedConn{Conn: c, left: maxSocket}
	return b.conn, rw, nil
}

// boundedConn ends when too much has come.
type boundedConn struct {
	net.Conn
	left int64
}

func (c *boundedConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if c.left -= int64(n); c.left < 0 {
		return 0, errors.New("more octets than a WebSocket may bring")
	}
	return n, err
}

// NetConn is what is below the TLS, for the door.
func (c *boundedConn) NetConn() net.Conn {
	if t, ok := c.Conn.(interface{ NetConn() net.Conn }); ok {
		return t.NetConn()
	}
	return c.Conn
}

// socketConn is a WebSocket as a connection. Its deadlines are those of the connection below: the library's own would be two
// timers for each, and would not see a frame that trickles in. As with the library's, a deadline that passes in the middle of
// a Read or Write ends the connection.
type socketConn struct {
	net.Conn
	below net.Conn
}

func (c *socketConn) SetDeadline(t time.Time) error      { return c.below.SetDeadline(t) }
func (c *socketConn) SetReadDeadline(t time.Time) error  { return c.below.SetReadDeadline(t) }
func (c *socketConn) SetWriteDeadline(t time.Time) error { return c.below.SetWriteDeadline(t) }

// Close says goodbye, and waits a little for the other side's.
func (c *socketConn) Close() error {
	_ = c.below.SetDeadline(time.Now().Add(goodbyeTime))
	return c.Conn.Close()
}

// Unbound lifts the limit for what may come. Who reads calls it.
func (c *socketConn) Unbound() { c.below.(*boundedConn).left = math.MaxInt64 }

func (c *socketConn) NetConn() net.Conn { return c.below.(*boundedConn).NetConn() }
