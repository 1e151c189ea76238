package device

import (
	"bufio"
	"bytes"
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
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
	// Protocol is "https", "mqtt" or "amqp".
	Protocol string
	// Endpoint is host:port; empty means the stamp's global endpoint on the protocol's port.
	Endpoint string
	// RootCAs are what the service's certificate is checked against; nil means the system's.
	RootCAs *x509.CertPool
	// Signer is the leaf's key where it is not in the stamp.
	Signer crypto.Signer
	// MAC is the symmetric key where it is not in the stamp.
	MAC MAC
	// TPM is the device's, where it attests by it.
	TPM TPM
	// Now tells the time; nil means time.Now.
	Now func() time.Time
	// Payload goes to the service with the request, as JSON.
	Payload json.RawMessage
}

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
	maxAnswer   = 128 << 10
	requestTime = 30 * time.Second
	// The assignment is mostly there when the register answer is, so the first question comes sooner than the hint says.
	firstPoll = 50 * time.Millisecond
	maxPolls  = 60
)

// errBusy is an answer that asks to come back: 429, or 5xx.
type errBusy struct {
	error
	after time.Duration
}

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
	var err error
	for try := range tries {
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
		if state, err = registerOnce(ctx, cfg); err == nil {
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

func registerOnce(ctx context.Context, cfg Config) (*dps.RegistrationState, error) {
	port := map[string]string{"https": "443", "mqtt": "8883", "amqp": "5671"}[cfg.Protocol]
	if port == "" {
		return nil, fmt.Errorf("protocol %q: want https, mqtt or amqp", cfg.Protocol)
	}
	endpoint := cfg.Endpoint
	if endpoint == "" {
		endpoint = net.JoinHostPort(cfg.Stamp.GlobalEndpoint, port)
	}
	host, _, err := net.SplitHostPort(endpoint)
	if err != nil {
		return nil, fmt.Errorf("endpoint %q: %w", endpoint, err)
	}
	tc := &tls.Config{ServerName: host, RootCAs: cfg.RootCAs, MinVersion: tls.VersionTLS12, Time: cfg.Now}
	token := ""
	body, err := json.Marshal(dps.RegisterRequest{RegistrationID: cfg.Stamp.RegistrationID, Payload: cfg.Payload})
	if err != nil {
		return nil, err
	}
	if cfg.Stamp.TPM {
		if body, err = tpmBody(ctx, &cfg); err != nil {
			return nil, err
		}
	} else if cfg.Stamp.Symmetric {
		if token, err = cfg.Stamp.token(ctx, cfg.MAC, cfg.Now()); err != nil {
			return nil, err
		}
	} else {
		cert, err := cfg.Stamp.certificate(cfg.Signer)
		if err != nil {
			return nil, err
		}
		tc.Certificates = []tls.Certificate{cert}
	}
	var t talker
	switch cfg.Protocol {
	case "https":
		t = newHTTPS(&cfg.Stamp, endpoint, tc, token)
	case "mqtt":
		t, err = dialMQTT(ctx, &cfg.Stamp, endpoint, tc, token)
	case "amqp":
		t, err = dialAMQP(ctx, &cfg.Stamp, endpoint, tc, token)
	}
	if err != nil {
		return nil, err
	}
	defer t.close()
	if cfg.Stamp.TPM {
		if err := proveTPM(ctx, &cfg, t, body); err != nil {
			return nil, err
		}
	}
	st, after, err := t.register(ctx, body)
	if err != nil {
		return nil, err
	}
	wait := firstPoll
	for range maxPolls {
		if st.Status.Terminal() {
			if st.RegistrationState == nil {
				return nil, fmt.Errorf("the service says %q and nothing more", st.Status)
			}
			return st.RegistrationState, keepKey(ctx, &cfg, st.RegistrationState)
		}
		if err := pause(ctx, min(wait, after)); err != nil {
			return nil, err
		}
		wait = time.Minute // from now on the service's hint counts
		if st, after, err = t.status(ctx, st.OperationID); err != nil {
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
			return nil, 0, fmt.Errorf("the service's answer is not understood: %w", err)
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
		return nil, 0, errBusy{fmt.Errorf("the service is busy: %d %s", int(doc.ErrorCode), doc.Message), after}
	}
	return nil, 0, refused
}

type httpsTalker struct {
	client *http.Client
	base   string
	token  string
}

func newHTTPS(s *Stamp, endpoint string, tc *tls.Config, token string) *httpsTalker {
	return &httpsTalker{
		client: &http.Client{Timeout: requestTime, Transport: &http.Transport{TLSClientConfig: tc, MaxConnsPerHost: 1, DialContext: (&net.Dialer{Timeout: 10 * time.Second}).DialContext}},
		base:   "https://" + endpoint + "/" + url.PathEscape(s.IDScope) + "/registrations/" + url.PathEscape(s.RegistrationID), token: token,
	}
}

// exchange does one request and returns the answer as it came, and its hint.
func (h *httpsTalker) exchange(ctx context.Context, method, path string, body []byte) (status int, answered []byte, after time.Duration, err error) {
	req, err := http.NewRequestWithContext(ctx, method, h.base+path+"?api-version="+apiVersion, bytes.NewReader(body))
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

func (h *httpsTalker) close() { h.client.CloseIdleConnections() }

type mqttTalker struct {
	conn net.Conn
	r    *bufio.Reader
	rid  int
}

// dialMQTT connects and subscribes.
func dialMQTT(ctx context.Context, s *Stamp, endpoint string, tc *tls.Config, token string) (*mqttTalker, error) {
	d := tls.Dialer{NetDialer: &net.Dialer{Timeout: 10 * time.Second}, Config: tc}
	c, err := d.DialContext(ctx, "tcp", endpoint)
	if err != nil {
		return nil, err
	}
	t := &mqttTalker{conn: c, r: bufio.NewReader(c)}
	var password []byte
	if token != "" {
		password = []byte(token)
	}
	user := s.IDScope + "/registrations/" + s.RegistrationID + "/api-version=" + apiVersion + "&ClientVersion=touchmark"
	p, err := t.exchange(ctx, mqtt.AppendConnect(nil, s.RegistrationID, user, password, 120), mqtt.Connack)
	if err == nil && p.ReturnCode != 0 {
		err = error(&RefusedError{Code: dps.CodeUnauthorized, Message: fmt.Sprintf("the MQTT connection was refused with code %d", p.ReturnCode)})
		if p.ReturnCode == 3 {
			err = errBusy{errors.New("the service is unavailable"), 3 * time.Second}
		}
	}
	if err == nil {
		p, err = t.exchange(ctx, mqtt.AppendSubscribe(nil, 1, "$dps/registrations/res/#", 1), mqtt.Suback)
		if err == nil && p.Codes[0] == mqtt.SubackFailure {
			err = errors.New("the service refused the subscription")
		}
	}
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return t, nil
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
		return nil, 0, fmt.Errorf("the service answered on topic %.100q", p.Topic)
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
