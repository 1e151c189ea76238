package device

import (
	"bufio"
	"bytes"
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/mqtt"
)

// Config says how to register.
type Config struct {
	Stamp Stamp
	// Protocol is one of [Protocols].
	Protocol string
	// Endpoint is host:port; empty means the stamp's global endpoint on the protocol's port.
	Endpoint string
	// RootCAs are what the service's certificate is checked against; nil means the system's.
	RootCAs *x509.CertPool
	// Signer is the leaf's key where it is not in the stamp.
	Signer crypto.Signer
	// MAC is the symmetric key where it is not in the stamp.
	MAC MAC
	// TPM is the device's, for stamps that attest by it.
	TPM TPM
	// Now tells the time; nil means time.Now.
	Now func() time.Time
	// Payload goes to the service with the request, as JSON.
	Payload json.RawMessage
	// CSR is a certificate signing request, as DER, to be answered with an operational certificate: see [NewCSR] and
	// [CheckChain]. Nil asks for none.
	CSR []byte
	// TLS is how TLS is done, used as it stands; nil means what [Config.NewTLS] makes. Who registers many times keeps one.
	TLS *tls.Config
	// Dial connects to the endpoint; nil means a net.Dialer's.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Tries is how often a busy or silent service is tried; zero means 4.
	Tries int
	// Observe is told of every step of a registration, in the goroutine that made it; nil tells nobody.
	Observe func(Step)
}

// A Step is one thing that a device waited for.
type Step struct {
	// Name is "connect", "handshake", "websocket", "open", "challenge", "register" or "status". Open is what a protocol does before the
	// first request can be made.
	Name string
	Took time.Duration
	// Answer is what the service said to register and status; nil where Err is not.
	Answer *dps.OperationStatus
	Err    error
}

// step makes a step and tells of it.
func (c *Config) step(name string, do func() (*dps.OperationStatus, error)) error {
	if c.Observe == nil {
		_, err := do()
		return err
	}
	start := time.Now()
	st, err := do()
	c.Observe(Step{Name: name, Took: time.Since(start), Answer: st, Err: err})
	return err
}

// ErrAnswer is an answer of the service that no device can make sense of.
var ErrAnswer = errors.New("the service's answer is not understood")

// A MAC computes HMAC-SHA256, as hsm.MACKey does.
type MAC interface {
	MAC(ctx context.Context, dst, data []byte) ([]byte, error)
}

// RefusedError is the service saying no. Registering again without a change will not help.
type RefusedError struct {
	Code       dps.Code
	TrackingID string
	Message    string
}

// Error says what the service said.
func (e *RefusedError) Error() string {
	text := fmt.Sprintf("the registration service refused: %d %s", int(e.Code), e.Message)
	if e.TrackingID != "" {
		text += " (tracking ID " + e.TrackingID + ")"
	}
	return text
}

const (
	apiVersion  = "2021-06-01"
	tries       = 4
	dialTime    = 10 * time.Second
	maxAnswer   = 128 << 10
	requestTime = 30 * time.Second
	// The assignment is mostly there when the register answer is, so the first question comes sooner than the hint says.
	firstPoll = 50 * time.Millisecond
	maxPolls  = 60
)

// A BusyError is the service asking to come back later: 429, or 5xx.
type BusyError struct {
	Code    dps.Code
	Message string
}

// Error says what the service said.
func (e *BusyError) Error() string {
	return fmt.Sprintf("the service is busy: %d %s", int(e.Code), e.Message)
}

// errBusy is an answer that asks to come back, and when.
type errBusy struct {
	error
	after time.Duration
}

func (e errBusy) Unwrap() error { return e.error }

// A talker does the two requests of the protocol.
type talker interface {
	register(ctx context.Context, body []byte) (*dps.OperationStatus, time.Duration, error)
	status(ctx context.Context, operation string) (*dps.OperationStatus, time.Duration, error)
	close()
}

// Register registers the device and returns the registration in its end state, which may be "failed" or "disabled". A
// refusal is a *RefusedError. A service that is busy, or cannot be reached, is tried again a few times.
func Register(ctx context.Context, cfg Config) (*dps.RegistrationState, error) {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Tries == 0 {
		cfg.Tries = tries
	}
	var err error
	for try := range cfg.Tries {
		if try > 0 {
			wait := time.Duration(1<<try) * 250 * time.Millisecond
			var busy errBusy
			if errors.As(err, &busy) {
				wait = max(wait, busy.after)
			}
			if err := pause(ctx, wait+rand.N(wait)); err != nil {
				return nil, err
			}
		}
		var state *dps.RegistrationState
		if state, err = registerOnce(ctx, &cfg); err == nil {
			return state, nil
		}
		var refused *RefusedError
		var busy errBusy
		var netErr net.Error
		retry := errors.As(err, &busy) || errors.As(err, &netErr) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF)
		var cert *tls.CertificateVerificationError
		if errors.As(err, &refused) || errors.As(err, &cert) || !retry || ctx.Err() != nil {
			break
		}
	}
	return nil, fmt.Errorf("registering %s: %w", cfg.Stamp.RegistrationID, err)
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Status asks what became of an operation, once, on a connection of its own: as a device does that was switched off while it
// waited.
func Status(ctx context.Context, cfg Config, operation string) (*dps.OperationStatus, error) {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	t, _, err := connect(ctx, &cfg)
	if err != nil {
		return nil, err
	}
	defer t.close()
	var st *dps.OperationStatus
	err = cfg.step("status", func() (*dps.OperationStatus, error) {
		st, _, err = t.status(ctx, operation)
		return st, err
	})
	return st, err
}

// connect connects, as far as requests can be made, and returns the register body.
func connect(ctx context.Context, cfg *Config) (talker, []byte, error) {
	p, err := protocolOf(cfg.Protocol)
	if err != nil {
		return nil, nil, err
	}
	dial, err := cfg.dialer(p)
	if err != nil {
		return nil, nil, err
	}
	token := ""
	body, err := json.Marshal(dps.RegisterRequest{RegistrationID: cfg.Stamp.RegistrationID, Payload: cfg.Payload, CSR: base64.StdEncoding.EncodeToString(cfg.CSR)})
	if err == nil && cfg.Stamp.TPM {
		body, err = tpmBody(ctx, cfg)
	} else if err == nil && cfg.Stamp.Symmetric {
		token, err = cfg.Stamp.token(ctx, cfg.MAC, cfg.Now())
	}
	if err != nil {
		return nil, nil, err
	}
	t, err := p.talk(ctx, cfg, dial, token)
	if _, can := t.(*amqpTalker); err != nil || !cfg.Stamp.TPM || can { // in AMQP it is part of SASL
		return t, body, err
	}
	if err := cfg.step("challenge", func() (*dps.OperationStatus, error) { return nil, proveTPM(ctx, cfg, t, body) }); err != nil {
		t.close()
		return nil, nil, err
	}
	return t, body, nil
}

func registerOnce(ctx context.Context, cfg *Config) (*dps.RegistrationState, error) {
	t, body, err := connect(ctx, cfg)
	if err != nil {
		return nil, err
	}
	defer t.close()
	var st *dps.OperationStatus
	var after time.Duration
	ask := func(name string, request func() (*dps.OperationStatus, time.Duration, error)) error {
		return cfg.step(name, func() (*dps.OperationStatus, error) {
			st, after, err = request()
			return st, err
		})
	}
	if err := ask("register", func() (*dps.OperationStatus, time.Duration, error) { return t.register(ctx, body) }); err != nil {
		return nil, err
	}
	wait := firstPoll
	for range maxPolls {
		if st.Status.Terminal() {
			if st.RegistrationState == nil {
				return nil, fmt.Errorf("%w: it says %q and nothing more", ErrAnswer, st.Status)
			}
			return st.RegistrationState, keepKey(ctx, cfg, st.RegistrationState)
		}
		if err := pause(ctx, min(wait, after)); err != nil {
			return nil, err
		}
		wait = time.Minute // from now on the service's hint counts
		operation := st.OperationID
		if err := ask("status", func() (*dps.OperationStatus, time.Duration, error) { return t.status(ctx, operation) }); err != nil {
			return nil, err
		}
	}
	return nil, errors.New("the service keeps assigning")
}

// hint reads a retry-after; devices take a bare number of seconds only.
func hint(s string) time.Duration {
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 || n > 300 {
		return 3 * time.Second
	}
	return time.Duration(n) * time.Second
}

// answer decodes a response by its status.
func answer(status int, body []byte, after time.Duration) (*dps.OperationStatus, time.Duration, error) {
	if status/100 == 2 {
		st := &dps.OperationStatus{}
		if err := json.Unmarshal(body, st); err != nil {
			return nil, 0, fmt.Errorf("%w: %w", ErrAnswer, err)
		}
		return st, after, nil
	}
	var doc struct {
		ErrorCode  dps.Code `json:"errorCode"`
		TrackingID string   `json:"trackingId"`
		Message    string   `json:"message"`
	}
	_ = json.Unmarshal(body, &doc) // whatever it is, it is a refusal
	if doc.ErrorCode == 0 {
		doc.ErrorCode = dps.Code(status * 1000)
	}
	refused := &RefusedError{Code: doc.ErrorCode, TrackingID: doc.TrackingID, Message: doc.Message}
	if status == http.StatusTooManyRequests || status >= 500 {
		return nil, 0, errBusy{&BusyError{doc.ErrorCode, doc.Message}, after}
	}
	return nil, 0, refused
}

type httpsTalker struct {
	client *http.Client
	conn   net.Conn // the first one; there is seldom another
	base   string
	query  string
	token  string
}

func newHTTPS(ctx context.Context, cfg *Config, dial dialer, token string) (talker, error) {
	s := &cfg.Stamp
	endpoint, err := cfg.endpoint("443")
	if err != nil {
		return nil, err
	}
	c, err := dial(ctx)
	if err != nil {
		return nil, err
	}
	return &httpsTalker{
		client: &http.Client{Timeout: requestTime, Transport: &http.Transport{MaxConnsPerHost: 1, DialTLSContext: handOver(c, dial)}}, conn: c, query: "?api-version=" + cfg.apiVersion(),
		base: "https://" + endpoint + "/" + url.PathEscape(s.IDScope) + "/registrations/" + url.PathEscape(s.RegistrationID), token: token,
	}, nil
}

// exchange does one request and returns the answer as it came, and its hint.
func (h *httpsTalker) exchange(ctx context.Context, method, path string, body []byte) (status int, answered []byte, after time.Duration, err error) {
	req, err := http.NewRequestWithContext(ctx, method, h.base+path+h.query, bytes.NewReader(body))
	if err != nil {
		return 0, nil, 0, err
	}
	req.Header.Set("Content-Type", "application/json; charset=utf-8")
	if h.token != "" {
		req.Header.Set("Authorization", h.token)
	}
	res, err := h.client.Do(req)
	if err != nil {
		return 0, nil, 0, err
	}
	defer res.Body.Close()
	answered, err = io.ReadAll(io.LimitReader(res.Body, maxAnswer))
	return res.StatusCode, answered, hint(res.Header.Get("Retry-After")), err
}

func (h *httpsTalker) do(ctx context.Context, method, path string, body []byte) (*dps.OperationStatus, time.Duration, error) {
	status, answered, after, err := h.exchange(ctx, method, path, body)
	if err != nil {
		return nil, 0, err
	}
	return answer(status, answered, after)
}

func (h *httpsTalker) register(ctx context.Context, body []byte) (*dps.OperationStatus, time.Duration, error) {
	return h.do(ctx, http.MethodPut, "/register", body)
}

func (h *httpsTalker) status(ctx context.Context, operation string) (*dps.OperationStatus, time.Duration, error) {
	return h.do(ctx, http.MethodGet, "/operations/"+url.PathEscape(operation), nil)
}

func (h *httpsTalker) close() {
	h.client.CloseIdleConnections()
	_ = h.conn.Close()
}

type mqttTalker struct {
	conn net.Conn
	r    *bufio.Reader
	rid  int
}

// newMQTT connects and subscribes.
func newMQTT(ctx context.Context, cfg *Config, dial dialer, token string) (talker, error) {
	c, err := dial(ctx)
	if err != nil {
		return nil, err
	}
	t := &mqttTalker{conn: c, r: bufio.NewReader(c)}
	if err := cfg.step("open", func() (*dps.OperationStatus, error) { return nil, t.open(ctx, cfg, token) }); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return t, nil
}

func (t *mqttTalker) open(ctx context.Context, cfg *Config, token string) error {
	s := &cfg.Stamp
	var password []byte
	if token != "" {
		password = []byte(token)
	}
	user := s.IDScope + "/registrations/" + s.RegistrationID + "/api-version=" + cfg.apiVersion() + "&ClientVersion=touchmark"
	p, err := t.exchange(ctx, mqtt.AppendConnect(nil, s.RegistrationID, user, password, 120), mqtt.Connack)
	switch {
	case err != nil:
		return err
	case p.ReturnCode == 3:
		return errBusy{&BusyError{dps.CodeServiceOverloaded, "the MQTT connection was refused with code 3"}, 3 * time.Second}
	case p.ReturnCode != 0:
		return &RefusedError{Code: dps.CodeUnauthorized, Message: fmt.Sprintf("the MQTT connection was refused with code %d", p.ReturnCode)}
	}
	p, err = t.exchange(ctx, mqtt.AppendSubscribe(nil, 1, "$dps/registrations/res/#", 1), mqtt.Suback)
	if err == nil && p.Codes[0] == mqtt.SubackFailure {
		err = errors.New("the service refused the subscription")
	}
	return err
}

// exchange writes and waits for a packet of a type.
func (t *mqttTalker) exchange(ctx context.Context, out []byte, want mqtt.Type) (*mqtt.Packet, error) {
	if err := t.conn.SetDeadline(time.Now().Add(requestTime)); err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = t.conn.SetDeadline(time.Now()) })
	defer stop()
	if _, err := t.conn.Write(out); err != nil {
		return nil, err
	}
	for {
		p, err := mqtt.Read(t.r, maxAnswer)
		if err != nil {
			return nil, errors.Join(err, ctx.Err())
		}
		if p.Type == want {
			return p, nil
		}
	}
}

func (t *mqttTalker) request(ctx context.Context, topic string, body []byte) (*dps.OperationStatus, time.Duration, error) {
	t.rid++
	rid := strconv.Itoa(t.rid)
	p, err := t.exchange(ctx, mqtt.AppendPublish(nil, topic+"$rid="+rid, 1, uint16(t.rid+1), body), mqtt.Publish)
	if err != nil {
		return nil, 0, err
	}
	if p.QoS == 1 {
		if _, err := t.conn.Write(mqtt.AppendPuback(nil, p.ID)); err != nil {
			return nil, 0, err
		}
	}
	rest, ok := strings.CutPrefix(p.Topic, "$dps/registrations/res/")
	code, query, ok2 := strings.Cut(rest, "/?")
	status, err := strconv.Atoi(code)
	if !ok || !ok2 || err != nil {
		return nil, 0, fmt.Errorf("%w: it came on topic %.100q", ErrAnswer, p.Topic)
	}
	after := 3 * time.Second
	for pair := range strings.SplitSeq(query, "&") {
		if v, ok := strings.CutPrefix(pair, "retry-after="); ok {
			after = hint(v)
		}
	}
	return answer(status, p.Payload, after)
}

func (t *mqttTalker) register(ctx context.Context, body []byte) (*dps.OperationStatus, time.Duration, error) {
	return t.request(ctx, "$dps/registrations/PUT/iotdps-register/?", body)
}

func (t *mqttTalker) status(ctx context.Context, operation string) (*dps.OperationStatus, time.Duration, error) {
	return t.request(ctx, "$dps/registrations/GET/iotdps-get-operationstatus/?operationId="+operation+"&", nil)
}

func (t *mqttTalker) close() {
	_, _ = t.conn.Write(mqtt.AppendDisconnect(nil))
	_ = t.conn.Close()
}
