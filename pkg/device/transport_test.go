package device_test

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/device"
	"github.com/touchmark/touchmark/pkg/door"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

type certificateFunc = func(*tls.ClientHelloInfo) (*tls.Certificate, error)

// webSockets has a door's handler talk inside WebSockets of a subprotocol. It takes what Azure's SDKs ask for and nothing
// else: the path, the subprotocol, no extensions (device API, section 13).
func webSockets(subprotocol string, handle door.Handler) func(context.Context, net.Listener, certificateFunc) error {
	return func(ctx context.Context, l net.Listener, cert certificateFunc) error {
		d := door.New(door.Config{TLS: door.TLSConfig(cert, "http/1.1")})
		return serveHTTP(ctx, d.Listener(ctx, l), func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path != "/$iothub/websocket" || r.Header.Get("Sec-WebSocket-Protocol") != subprotocol || r.Header.Get("Sec-WebSocket-Extensions") != "" {
				http.Error(w, "no", http.StatusBadRequest)
				return
			}
			ws, err := websocket.Accept(w, r, &websocket.AcceptOptions{Subprotocols: []string{subprotocol}})
			if err == nil {
				d.Handle(ctx, &door.Conn{Conn: websocket.NetConn(ctx, ws, websocket.MessageBinary), Remote: r.RemoteAddr, Certificates: r.TLS.PeerCertificates}, handle)
			}
		})
	}
}

func serveHTTP(ctx context.Context, l net.Listener, handle http.HandlerFunc) error {
	srv := &http.Server{Handler: handle}
	stop := context.AfterFunc(ctx, func() { _ = srv.Close() })
	defer stop()
	if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

// What a service answers instead of a WebSocket is understood as any answer is.
func TestWebSocketRefused(t *testing.T) {
	f := registrationtest.NewFixture(t)
	for why, c := range map[string]struct {
		status int
		is     func(error) bool
	}{
		"refused": {http.StatusBadRequest, func(err error) bool {
			var e *device.RefusedError
			return errors.As(err, &e) && e.Code == dps.CodeBadRequest
		}},
		"busy":       {http.StatusTooManyRequests, func(err error) bool { var e *device.BusyError; return errors.As(err, &e) && e.Code.Status() == 429 }},
		"other name": {http.StatusSwitchingProtocols, func(err error) bool { return errors.Is(err, device.ErrAnswer) }},
		"hung up":    {0, func(err error) bool { return errors.Is(err, io.EOF) }},
	} {
		l := f.Listen(t, func(ctx context.Context, l net.Listener, cert certificateFunc) error {
			return serveHTTP(ctx, tls.NewListener(l, door.TLSConfig(cert, "http/1.1")), func(w http.ResponseWriter, r *http.Request) {
				switch c.status {
				case 0:
					panic(http.ErrAbortHandler)
				case http.StatusSwitchingProtocols:
					if ws, err := websocket.Accept(w, r, nil); err == nil { // no subprotocol
						_, _, _ = ws.Read(r.Context())
					}
				default:
					w.WriteHeader(c.status)
				}
			})
		})
		_, err := device.Register(t.Context(), device.Config{Protocol: "mqtt-ws", Endpoint: l.Addr, RootCAs: l.TLS(nil).RootCAs, Now: f.Now, Tries: 1,
			Stamp: symmetric(t, "dev-1", []byte("k"))})
		if err == nil || !c.is(err) {
			t.Errorf("%s: %v", why, err)
		}
	}
}

// The steps of a registration, and how long each took, can be watched; one tls.Config serves many registrations.
func TestObserve(t *testing.T) {
	s := newService(t, "hub-a.example.net")
	for protocol, want := range map[string][]string{
		"https":   {"connect", "handshake", "register", "status"},
		"mqtt":    {"connect", "handshake", "open", "register", "status"},
		"mqtt-ws": {"connect", "handshake", "websocket", "open", "register", "status"},
	} {
		id := "dev-" + protocol
		cfg := s.config(protocol, certificate(t, id, attesttest.Leaf(t, s.Root, id)))
		tc, err := cfg.NewTLS()
		if err != nil {
			t.Fatal(err)
		}
		cfg.TLS, cfg.RootCAs, cfg.Tries = tc, nil, 1
		operation := ""
		for range 2 {
			var steps []string
			var operations []string
			cfg.Observe = func(st device.Step) {
				if steps = append(steps, st.Name); st.Err != nil || st.Took <= 0 {
					t.Errorf("%s: %+v", protocol, st)
				}
				if st.Answer != nil {
					operations = append(operations, st.Answer.OperationID)
				}
			}
			if st, err := device.Register(t.Context(), cfg); err != nil || st.Status != dps.Assigned {
				t.Errorf("%s: %+v, %v", protocol, st, err)
			}
			if !slices.Equal(steps, want) || len(operations) != 2 || operations[0] != operations[1] {
				t.Errorf("%s: steps %v, operations %v", protocol, steps, operations)
			}
			operation = operations[0]
		}
		// An operation can be asked for again later, and only by its own device.
		ask := cfg
		ask.Observe = nil
		st, err := device.Status(t.Context(), ask, operation)
		if err != nil || st.Status != dps.Assigned || st.RegistrationState.DeviceID != id || st.OperationID != operation {
			t.Errorf("%s: %+v, %v", protocol, st, err)
		}
		ask.Stamp, ask.TLS, ask.RootCAs = symmetric(t, "own-key", s.OwnKey), nil, tc.RootCAs
		var refused *device.RefusedError
		if st, err := device.Status(t.Context(), ask, operation); !errors.As(err, &refused) || refused.Code != dps.CodeNotFound {
			t.Errorf("%s, another's operation: %+v, %v", protocol, st, err)
		}
		// A busy service is asked once where the caller wants it so.
		cfg.Observe = nil
		s.busy.left.Store(1)
		if _, err := device.Register(t.Context(), cfg); err == nil || s.busy.left.Load() != 0 {
			t.Errorf("%s: tried again: %v", protocol, err)
		}
	}
}

// Dial gives the connection alone, made by the caller's own dialling.
func TestDial(t *testing.T) {
	s := newService(t, "hub-a.example.net")
	for _, protocol := range device.Protocols() {
		cfg := s.config(protocol, symmetric(t, "dev-1", attest.DeriveKey(s.GroupKey, "dev-1")))
		dialled := 0
		cfg.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
			dialled++
			return (&net.Dialer{}).DialContext(ctx, network, address)
		}
		c, err := device.Dial(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		// An MQTT packet that no client may begin with, and no HTTP request: every door hangs up on it.
		if _, err := c.Write([]byte("\xe0\x00\r\n\r\n")); err != nil {
			t.Error(err)
		}
		_ = c.SetReadDeadline(time.Now().Add(30 * time.Second))
		if b, err := io.ReadAll(c); err != nil && errors.Is(err, context.DeadlineExceeded) || strings.Contains(string(b), "200") || dialled != 1 {
			t.Errorf("%s, dialled %d: %q, %v", protocol, dialled, b, err)
		}
		_ = c.Close()
	}
}
