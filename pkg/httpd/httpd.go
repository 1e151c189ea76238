// Package httpd is the HTTPS door: the device API and the service API of Azure IoT Hub DPS on one port, and touchmark's own
// calls for bundles and group keys.
//
// Handlers decode, call and encode; what may happen is decided behind [registration.Registrar] and in
// [registration.Service]. Client certificates are asked for in the handshake and judged behind it, so that a refused device
// reads 401 and not a broken connection (device API, section 7.2).
package httpd

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/door"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/meter"
	"github.com/touchmark/touchmark/pkg/registration"
)

// Config is what a server needs.
type Config struct {
	// Registrar answers devices.
	Registrar registration.Registrar
	// Service answers operators; nil leaves the service API out.
	Service *registration.Service
	// Hosts are the names that service tokens may be for.
	Hosts []string
	// Import takes a bundle; nil leaves it out.
	Import ImportFunc
	// Calls are more of touchmark's own: each by the name that follows touchmark/ in its path, for those who may write
	// enrollments.
	Calls map[string]Call
	// Reports tell operators of their scope and its devices: each by the name that follows touchmark/ in its path, and an ID may
	// follow. Who may read registrations may ask for them, and who may write registrations may DELETE.
	Reports map[string]func(context.Context, *meter.ReportRequest) (any, error)
	// Throttle refuses an operation of a caller who may do it, because there were too many; nil is never.
	Throttle func(context.Context) error
	// Around is put around everything; nil for nothing.
	Around func(http.Handler) http.Handler
	// Handlers answer what is not an API of devices or of enrollments, by the folded first segment of the path. They authorize
	// callers by themselves.
	Handlers map[string]http.Handler
	// Recipient is whom secrets for the service are sealed to.
	Recipient string
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

// A Call answers a request of an operator's by its method and body.
type Call func(ctx context.Context, method string, body []byte) (any, error)

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

// Handler returns the routes: WebSockets by their upgrade, the service's by their first path segment, everything else a
// device's.
func (s *Server) Handler() http.Handler { return s.handler(context.Background()) }

// handler ends WebSockets with the context.
func (s *Server) handler(ctx context.Context) http.Handler {
	var h http.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
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
		// EscapedPath, split before it is decoded: an encoded slash is part of an ID and not a separator.
		path := strings.TrimSuffix(strings.TrimPrefix(r.URL.EscapedPath(), "/"), "/")
		segments := strings.Split(path, "/")
		if len(segments) > 6 {
			s.fail(w, r, notFound())
			return
		}
		for i, seg := range segments {
			decoded, err := url.PathUnescape(seg) // a "+" is a "+"
			if err != nil {
				s.fail(w, r, dps.NewError(dps.CodeBadRequest, "The path is not properly encoded", err))
				return
			}
			segments[i] = decoded
		}
		if h := s.cfg.Handlers[strings.ToLower(segments[0])]; h != nil {
			h.ServeHTTP(w, r)
			return
		}
		if s.cfg.Service != nil {
			switch strings.ToLower(segments[0]) {
			case "enrollments", "enrollmentgroups", "registrations", "touchmark":
				s.service(w, r, segments)
				return
			}
		}
		s.device(w, r, segments)
	})
	if s.cfg.Around != nil {
		h = s.cfg.Around(h)
	}
	return h
}

func notFound() *dps.Error {
	return dps.NewError(dps.CodeNotFound, "There is nothing at this path", nil)
}

// device serves the device API (device API, section 10.1).
func (s *Server) device(w http.ResponseWriter, r *http.Request, seg []string) {
	if len(seg) < 3 || !strings.EqualFold(seg[1], "registrations") || seg[0] == "" || seg[2] == "" {
		s.fail(w, r, notFound())
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
		s.fail(w, r, notFound())
		return
	}
	if r.Method != method {
		w.Header().Set("Allow", method)
		s.fail(w, r, dps.NewError(dps.CodeMethodNotAllowed, "Method not allowed", nil))
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
		if _, err := s.body(w, r, registration.MaxBody); err != nil {
			s.fail(w, r, err)
			return
		}
		ctx, cancel := answering()
		defer cancel()
		st, err := s.cfg.Registrar.Status(ctx, req, seg[4])
		s.reply(w, r, st, err)
		return
	}
	body, err := s.body(w, r, registration.MaxBody)
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
		s.answer(w, http.StatusUnauthorized, struct {
			AuthenticationKey []byte `json:"authenticationKey"`
			KeyName           string `json:"keyName"`
		}{challenge.Blob, "registration"})
	case err != nil:
		s.fail(w, r, err)
	default:
		p := dps.NewReply(answer, nil)
		if p.RetryAfter != "" {
			w.Header().Set("Retry-After", p.RetryAfter)
		}
		s.write(w, p.Status, p.Body)
	}
}

// body reads a request's body, bounded in size; the server bounds its time.
func (s *Server) body(w http.ResponseWriter, r *http.Request, limit int64) ([]byte, error) {
	if r.ContentLength == 0 {
		return nil, nil
	}
	if r.ContentLength > limit {
		return nil, dps.NewError(dps.CodeTooLarge, "Request body is too large", nil)
	}
	b, err := io.ReadAll(http.MaxBytesReader(w, r.Body, limit))
	var tooLarge *http.MaxBytesError
	if errors.As(err, &tooLarge) {
		return nil, dps.NewError(dps.CodeTooLarge, "Request body is too large", nil)
	}
	if err != nil {
		return nil, dps.NewError(dps.CodeBadRequest, "Request body cannot be read", err)
	}
	return b, nil
}

// answer writes JSON with its length: some clients cannot read chunks.
func (s *Server) answer(w http.ResponseWriter, status int, v any) {
	b, err := dps.Marshal(v)
	if err != nil {
		s.cfg.Log.Error("encoding an answer", "cause", err)
		status, b = http.StatusInternalServerError, []byte(`{"errorCode":500000,"message":"Internal error"}`)
	}
	s.write(w, status, b)
}

func (s *Server) write(w http.ResponseWriter, status int, b []byte) {
	h := w.Header()
	h.Set("Content-Type", "application/json; charset=utf-8")
	h.Set("Content-Length", strconv.Itoa(len(b)))
	if h.Get("X-Ms-Request-Id") == "" {
		h.Set("X-Ms-Request-Id", dps.NewUUID())
	}
	w.WriteHeader(status)
	_, _ = w.Write(b) // the caller may be gone
}

// fail writes an error document. There is no WWW-Authenticate: HTTP stacks would act on it.
func (s *Server) fail(w http.ResponseWriter, r *http.Request, err error) {
	e := dps.AsError(err)
	p := dps.NewReply(nil, e)
	if p.RetryAfter != "" {
		w.Header().Set("Retry-After", p.RetryAfter)
	}
	if p.Status >= 500 {
		s.cfg.Log.Error("internal error", "path", r.URL.Path, "trackingId", e.TrackingID, "cause", e.Error(), "remote", r.RemoteAddr)
	}
	w.Header().Set("X-Ms-Request-Id", e.TrackingID)
	w.Header().Set("X-Ms-Error-Code", strconv.Itoa(int(e.Code)))
	s.write(w, p.Status, p.Body)
}
