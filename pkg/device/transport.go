package device

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"

	"github.com/coder/websocket"

	"github.com/touchmark/touchmark/pkg/dps"
)

// Protocols are the protocols that a device can register by.
func Protocols() []string { return []string{"https", "mqtt", "mqtt-ws", "amqp", "amqp-ws"} }

// A protocol is a transport with what is spoken on it.
type protocol struct {
	port        string
	subprotocol string // of a WebSocket; empty for TLS alone
	talk        func(ctx context.Context, cfg *Config, dial dialer, token string) (talker, error)
}

func protocolOf(name string) (protocol, error) {
	switch name {
	case "https":
		return protocol{"443", "", newHTTPS}, nil
	case "mqtt":
		return protocol{"8883", "", newMQTT}, nil
	case "mqtt-ws":
		return protocol{"443", "mqtt", newMQTT}, nil
	case "amqp":
		return protocol{"5671", "", newAMQP}, nil
	case "amqp-ws":
		return protocol{"443", "AMQPWSB10", newAMQP}, nil
	}
	return protocol{}, fmt.Errorf("protocol %q: want one of %v", name, Protocols())
}

// A dialer makes a connection that a talker can talk on.
type dialer func(ctx context.Context) (net.Conn, error)

// webSocketPath is where Azure's SDKs look for the service's WebSockets (device API, section 13).
const webSocketPath = "/$iothub/websocket"

// endpoint returns host:port.
func (c *Config) endpoint(port string) (string, error) {
	if c.Endpoint == "" {
		return net.JoinHostPort(c.Stamp.GlobalEndpoint, port), nil
	}
	if _, _, err := net.SplitHostPort(c.Endpoint); err != nil {
		return "", fmt.Errorf("endpoint %q: %w", c.Endpoint, err)
	}
	return c.Endpoint, nil
}

// NewTLS returns how TLS is done with the service: its certificate checked against RootCAs, and the device's own shown where
// it has one.
func (c *Config) NewTLS() (*tls.Config, error) {
	endpoint, err := c.endpoint("443")
	if err != nil {
		return nil, err
	}
	host, _, _ := net.SplitHostPort(endpoint)
	tc := &tls.Config{ServerName: host, RootCAs: c.RootCAs, MinVersion: tls.VersionTLS12, Time: c.Now}
	if len(c.Stamp.Certificates) > 0 {
		cert, err := c.Stamp.certificate(c.Signer)
		if err != nil {
			return nil, err
		}
		tc.Certificates = []tls.Certificate{cert}
	}
	return tc, nil
}

// Dial connects as [Register] does, with TLS and, where the protocol has one, a WebSocket. What is spoken is the caller's.
func Dial(ctx context.Context, cfg Config) (net.Conn, error) {
	p, err := protocolOf(cfg.Protocol)
	if err != nil {
		return nil, err
	}
	dial, err := cfg.dialer(p)
	if err != nil {
		return nil, err
	}
	return dial(ctx)
}

func (c *Config) dialer(p protocol) (dialer, error) {
	endpoint, err := c.endpoint(p.port)
	if err != nil {
		return nil, err
	}
	tc := c.TLS
	if tc == nil {
		if tc, err = c.NewTLS(); err != nil {
			return nil, err
		}
	}
	overTLS := func(ctx context.Context) (net.Conn, error) { return c.dialTLS(ctx, endpoint, tc) }
	if p.subprotocol == "" {
		return overTLS, nil
	}
	return func(ctx context.Context) (conn net.Conn, err error) {
		raw, err := overTLS(ctx)
		if err != nil {
			return nil, err
		}
		err = c.step("websocket", func() (*dps.OperationStatus, error) {
			conn, err = upgrade(ctx, raw, endpoint, p.subprotocol)
			return nil, err
		})
		if err != nil {
			return nil, errors.Join(err, raw.Close())
		}
		return conn, nil
	}, nil
}

func (c *Config) dialTLS(ctx context.Context, endpoint string, tc *tls.Config) (*tls.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTime)
	defer cancel()
	dial := c.Dial
	if dial == nil {
		dial = (&net.Dialer{}).DialContext
	}
	var raw net.Conn
	if err := c.step("connect", func() (_ *dps.OperationStatus, err error) {
		raw, err = dial(ctx, "tcp", endpoint)
		return nil, err
	}); err != nil {
		return nil, err
	}
	conn := tls.Client(raw, tc)
	if err := c.step("handshake", func() (*dps.OperationStatus, error) { return nil, conn.HandshakeContext(ctx) }); err != nil {
		return nil, errors.Join(err, raw.Close())
	}
	return conn, nil
}

// upgrade makes a WebSocket of a connection. A refusal reads as any request's does.
func upgrade(ctx context.Context, raw net.Conn, endpoint, subprotocol string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTime)
	defer cancel()
	client := &http.Client{
		Transport: &http.Transport{DialTLSContext: handOver(raw, func(context.Context) (net.Conn, error) {
			return nil, errors.New("the service ended the connection instead of making it a WebSocket")
		})},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	ws, res, err := websocket.Dial(ctx, "wss://"+endpoint+webSocketPath, &websocket.DialOptions{
		HTTPClient: client, Subprotocols: []string{subprotocol}, CompressionMode: websocket.CompressionDisabled})
	if err != nil {
		if res != nil && res.StatusCode >= 400 {
			body, _ := io.ReadAll(io.LimitReader(res.Body, maxAnswer)) // the library keeps its beginning
			_, _, refused := answer(res.StatusCode, body, hint(res.Header.Get("Retry-After")))
			return nil, refused
		}
		return nil, err
	}
	if ws.Subprotocol() != subprotocol {
		_ = ws.CloseNow()
		return nil, fmt.Errorf("%w: it opened a WebSocket for %.40q", ErrAnswer, ws.Subprotocol())
	}
	// The connection outlives the time that its making had.
	return websocket.NetConn(context.WithoutCancel(ctx), ws, websocket.MessageBinary), nil
}

// handOver is dialling for net/http where a connection is there already: that one first, then others.
func handOver(c net.Conn, then dialer) func(context.Context, string, string) (net.Conn, error) {
	first := make(chan net.Conn, 1)
	first <- c
	return func(ctx context.Context, _, _ string) (net.Conn, error) {
		select {
		case c := <-first:
			return c, nil
		default:
			return then(ctx)
		}
	}
}
