// Package httpd is the HTTPS door: the device API of Azure IoT Hub DPS, and on the same port the handlers of whatever else is
// mounted, such as the service API.
//
// Handlers decode, call and encode; what may happen is decided behind [registration.Registrar]. Client certificates are asked for in the handshake and judged behind it, so that a refused device
// reads 401 and not a broken connection (device API, section 7.2).
package httpd

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/door"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/exchange"
	"github.com/touchmark/touchmark/pkg/registration"
)

// Config is what a server needs.
type Config struct {
	// Registrar answers devices.
	Registrar registration.Registrar
	// Handlers answer what is not the API of devices, by the folded first segment of the path. They authorize callers by
	// themselves.
	Handlers map[string]http.Handler
	// Door takes connections in.
	Door *door.Door
	// Sockets hold the conversations inside WebSockets, by folded subprotocol. Nil leaves WebSockets out.
	Sockets map[string]door.Handler
	// Forwarded is how the door's TLSProxies hand on client certificates; empty for not at all.
	Forwarded ForwardedCertificate
	Log       *slog.Logger
	Now       func() time.Time

	// HeaderTimeout and IdleTimeout bound how long a connection may say nothing; zero means 10 s and 2 minutes.
	HeaderTimeout, IdleTimeout time.Duration
	// RequestTimeout bounds how long a request may take to come in, a device's to be worked on, and its answer to be taken; zero
	// means 30 s. A bundle may take longer, as long as something of it comes in that time.
	RequestTimeout time.Duration
}

// Limits of a request.
const (
	maxHeader = 16 << 10
	maxURL    = 2 << 10
	drainTime = 10 * time.Second
)

// Server is the HTTPS door.
type Server struct {
	cfg Config
}

// New returns a server.
func New(cfg Config) *Server {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	def := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	def(&cfg.HeaderTimeout, 10*time.Second)
	def(&cfg.IdleTimeout, 2*time.Minute)
	def(&cfg.RequestTimeout, 30*time.Second)
	return &Server{cfg}
}

// Serve answers callers on a TCP listener until the context ends; then it answers those who are there, for a bounded time.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	srv := &http.Server{
		Handler: s.handler(ctx), ReadHeaderTimeout: s.cfg.HeaderTimeout, IdleTimeout: s.cfg.IdleTimeout, MaxHeaderBytes: maxHeader,
		// These hold on every path, also where nobody reads the body: net/http reads some of it away by itself.
		ReadTimeout: s.cfg.HeaderTimeout + s.cfg.RequestTimeout, WriteTimeout: s.cfg.HeaderTimeout + 3*s.cfg.RequestTimeout,
		ErrorLog:    slog.NewLogLogger(s.cfg.Log.Handler(), slog.LevelDebug),
		BaseContext: func(net.Listener) context.Context { return context.WithoutCancel(ctx) },
		// HTTP/2 has no place here: SDKs speak HTTP/1.1, and WebSockets will upgrade from it.
		TLSNextProto: map[string]func(*http.Server, *tls.Conn, http.Handler){},
	}
	done := make(chan error, 1)
	go func() {
		<-ctx.Done()
		stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTime)
		defer cancel()
		var sockets sync.WaitGroup
		sockets.Go(s.cfg.Door.Drain)
		err := srv.Shutdown(stop)
		if err != nil {
			err = errors.Join(err, srv.Close())
		}
		sockets.Wait()
		done <- err
	}()
	err := srv.Serve(s.cfg.Door.Listener(ctx, l))
	if errors.Is(err, http.ErrServerClosed) && ctx.Err() != nil {
		return <-done
	}
	return err
}

// Handler returns the routes: WebSockets by their upgrade, mounted handlers by their first path segment, everything else a
// device's.
func (s *Server) Handler() http.Handler { return s.handler(context.Background()) }

// handler ends WebSockets with the context.
func (s *Server) handler(ctx context.Context) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Strict-Transport-Security", "max-age=31536000; includeSubDomains")
		release, err := s.caller(r)
		if err != nil {
			s.fail(w, r, err)
			return
		}
		if s.cfg.Sockets != nil && hasToken(r.Header, "Upgrade", "websocket") {
			s.socket(ctx, w, r, release)
			return
		}
		defer release()
		if len(r.RequestURI) > maxURL {
			s.fail(w, r, dps.NewError(dps.CodeBadRequest, "The URL is too long", nil))
			return
		}
		first, _, _ := strings.Cut(strings.TrimPrefix(r.URL.EscapedPath(), "/"), "/")
		if first, err := url.PathUnescape(first); err == nil && s.cfg.Handlers[strings.ToLower(first)] != nil {
			s.cfg.Handlers[strings.ToLower(first)].ServeHTTP(w, r)
			return
		}
		segments, err := exchange.Segments(r)
		if err != nil {
			s.fail(w, r, err)
			return
		}
		s.device(w, r, segments)
	})
}

// device serves the device API (device API, section 10.1).
func (s *Server) device(w http.ResponseWriter, r *http.Request, seg []string) {
	if len(seg) < 3 || !strings.EqualFold(seg[1], "registrations") || seg[0] == "" || seg[2] == "" {
		s.fail(w, r, exchange.NotFound())
		return
	}
	var method string
	switch {
	case len(seg) == 3:
		method = http.MethodPost
	case len(seg) == 4 && strings.EqualFold(seg[3], "register"):
		method = http.MethodPut
	case len(seg) == 5 && strings.EqualFold(seg[3], "operations"):
		method = http.MethodGet
	default:
		s.fail(w, r, exchange.NotFound())
		return
	}
	if r.Method != method {
		s.fail(w, r, exchange.NotAllowed(w, method))
		return
	}
	req := &registration.Request{
		IDScope: seg[0], RegistrationID: seg[2], APIVersion: r.URL.Query().Get("api-version"),
		Proof: attest.Proof{Token: r.Header.Get("Authorization")}, Protocol: "https", Remote: r.RemoteAddr, ClientVersion: r.UserAgent(),
	}
	if r.TLS != nil {
		req.Proof.Certificates = r.TLS.PeerCertificates
	}
	if req.APIVersion == "" {
		s.fail(w, r, dps.NewError(dps.CodeBadRequest, "api-version is missing", nil))
		return
	}
	// A device that hung up, or has closed its side, does not cut off what is being done for it.
	answering := func() (context.Context, context.CancelFunc) {
		return context.WithTimeout(context.WithoutCancel(r.Context()), s.cfg.RequestTimeout)
	}
	if method == http.MethodGet {
		// The body of a status request is read away and ignored, whatever it holds.
		if _, err := exchange.Body(w, r, registration.MaxBody); err != nil {
			s.fail(w, r, err)
			return
		}
		ctx, cancel := answering()
		defer cancel()
		st, err := s.cfg.Registrar.Status(ctx, req, seg[4])
		s.reply(w, r, st, err)
		return
	}
	body, err := exchange.Body(w, r, registration.MaxBody)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	req.Body = body
	ctx, cancel := answering()
	defer cancel()
	if method == http.MethodPost {
		st, err := s.cfg.Registrar.Lookup(ctx, req)
		s.reply(w, r, st, err)
		return
	}
	st, err := s.cfg.Registrar.Register(ctx, req)
	s.reply(w, r, st, err)
}

// reply writes what the registrar answered a device.
func (s *Server) reply(w http.ResponseWriter, r *http.Request, answer any, err error) {
	var challenge *registration.Challenge
	switch {
	case errors.Is(err, registration.ErrHangUp):
		panic(http.ErrAbortHandler) // net/http's way to close a connection without an answer
	case errors.As(err, &challenge): // device API, section 5.5
		w.Header().Set("X-Ms-Request-Id", challenge.Refusal.TrackingID)
		b, err := dps.Marshal(struct {
			AuthenticationKey []byte `json:"authenticationKey"`
			KeyName           string `json:"keyName"`
		}{challenge.Blob, "registration"})
		if err != nil {
			s.fail(w, r, err)
			return
		}
		exchange.Write(w, http.StatusUnauthorized, b)
	case err != nil:
		s.fail(w, r, err)
	default:
		p := dps.NewReply(answer, nil)
		if p.RetryAfter != "" {
			w.Header().Set("Retry-After", p.RetryAfter)
		}
		exchange.Write(w, p.Status, p.Body)
	}
}

func (s *Server) fail(w http.ResponseWriter, r *http.Request, err error) {
	exchange.Fail(w, r, s.cfg.Log, err)
}
