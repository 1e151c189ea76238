// Package mqttd is the MQTT door: the $dps/registrations conversation of one device per connection. It is no broker:
// nothing is routed, retained or kept between connections (device API, section 11).
//
// A connection is served by one goroutine, in the order of its packets. The handshake runs in another, so that the stack
// which it grew is given back.
package mqttd

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/mqtt"
	"github.com/touchmark/touchmark/pkg/registration"
)

// Config is what a server needs.
type Config struct {
	Registrar registration.Registrar
	// TLS asks for client certificates; see httpd.TLSConfig.
	TLS *tls.Config
	Log *slog.Logger
	Now func() time.Time
	// ResponseDelay is how long a response waits behind its PUBACK: one SDK loses what comes sooner (device API, section
	// 11.4). Zero means 60 ms, a negative value none.
	ResponseDelay time.Duration
	// Second is the length of the second by which keep-alives are counted; zero means a second. Tests have shorter ones.
	Second time.Duration
	// MaxConnections and MaxPerAddress bound the open connections; zero means 20,000 and 2,000.
	MaxConnections, MaxPerAddress int
}

// Limits of a conversation, in seconds where they are times.
const (
	handshakeTime    = 10
	connectTime      = 10
	conversationTime = 600
	lingerTime       = 3 // after a refusal
	drainTime        = 10 * time.Second
	maxPacket        = 128 << 10
	maxConnect       = 8 << 10 // from somebody who has not said yet who they are
	maxHeld          = 4       // responses that wait for a SUBSCRIBE
)

// CONNACK return codes (MQTT 3.1.1, §3.2.2.3).
const (
	accepted      = 0
	badProtocol   = 1
	badIdentifier = 2
	unavailable   = 3
	notAuthorized = 5
)

// The topics (device API, sections 11.2 to 11.4).
const (
	responseFilter = "$dps/registrations/res/#"
	registerTopic  = "$dps/registrations/PUT/iotdps-register/?"
	statusTopic    = "$dps/registrations/GET/iotdps-get-operationstatus/?"
)

// Server is the MQTT door.
type Server struct {
	cfg Config

	mu     sync.Mutex
	conns  map[*conn]struct{}
	byAddr map[string]int
	ending bool
	wait   sync.WaitGroup
}

// New returns a server.
func New(cfg Config) *Server {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.ResponseDelay == 0 {
		cfg.ResponseDelay = 60 * time.Millisecond
	}
	if cfg.Second == 0 {
		cfg.Second = time.Second
	}
	if cfg.MaxConnections == 0 {
		cfg.MaxConnections = 20_000
	}
	if cfg.MaxPerAddress == 0 {
		cfg.MaxPerAddress = 2_000
	}
	return &Server{cfg: cfg, conns: make(map[*conn]struct{}), byAddr: make(map[string]int)}
}

// Serve answers devices on a TCP listener until the context ends. Requests that are being worked on are answered then, for
// a bounded time; connections that wait are closed.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	var pause time.Duration
	for {
		c, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return s.drain()
			}
			var ne net.Error
			if !errors.As(err, &ne) || errors.Is(err, net.ErrClosed) {
				return errors.Join(err, s.drain())
			}
			// Out of file descriptors, most likely: let some go, and go on.
			pause = min(max(2*pause, 5*time.Millisecond), time.Second)
			s.cfg.Log.Error("accepting", "cause", err)
			select {
			case <-time.After(pause):
			case <-ctx.Done():
			}
			continue
		}
		pause = 0
		s.accept(ctx, c)
	}
}

func (s *Server) accept(ctx context.Context, raw net.Conn) {
	addr, _, _ := net.SplitHostPort(raw.RemoteAddr().String())
	c := &conn{s: s, raw: raw, addr: addr}
	s.mu.Lock()
	if s.ending || len(s.conns) >= s.cfg.MaxConnections || s.byAddr[addr] >= s.cfg.MaxPerAddress {
		s.mu.Unlock()
		_ = raw.Close()
		return
	}
	s.conns[c] = struct{}{}
	s.byAddr[addr]++
	s.wait.Add(1)
	s.mu.Unlock()
	go func() {
		tc := tls.Server(raw, s.cfg.TLS)
		hctx, cancel := context.WithTimeout(ctx, handshakeTime*s.cfg.Second)
		err := tc.HandshakeContext(hctx)
		cancel()
		if err != nil {
			_ = raw.Close()
			s.forget(c)
			return
		}
		go func() { // a fresh goroutine: the handshake's grown stack goes
			defer s.forget(c)
			c.tls = tc
			err := c.serve(ctx)
			_ = tc.Close()
			if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
				s.cfg.Log.Debug("connection ended", "protocol", "mqtt", "remote", raw.RemoteAddr().String(), "cause", err)
			}
		}()
	}()
}

func (s *Server) forget(c *conn) {
	s.mu.Lock()
	delete(s.conns, c)
	if s.byAddr[c.addr]--; s.byAddr[c.addr] == 0 {
		delete(s.byAddr, c.addr)
	}
	s.mu.Unlock()
	s.wait.Done()
}

// drain ends what waits for a packet, lets what is being answered finish, and closes the rest after a while.
func (s *Server) drain() error {
	s.mu.Lock()
	s.ending = true
	for c := range s.conns {
		_ = c.raw.SetReadDeadline(time.Now())
	}
	s.mu.Unlock()
	done := make(chan struct{})
	go func() {
		s.wait.Wait()
		close(done)
	}()
	select {
	case <-done:
		return nil
	case <-time.After(drainTime):
	}
	s.mu.Lock()
	for c := range s.conns {
		_ = c.raw.Close()
	}
	s.mu.Unlock()
	<-done
	return nil
}

// conn is one device's conversation.
type conn struct {
	s    *Server
	raw  net.Conn
	addr string
	tls  *tls.Conn

	req        registration.Request // who the device says it is
	keepAlive  time.Duration        // 0: none
	end        time.Time            // of the whole conversation
	subscribed bool
	qos        byte
	nextID     uint16
	held       [][2]string // topic and body of responses that wait for a SUBSCRIBE
	out        []byte      // what is written and not flushed
}

// write queues a packet. Packets that follow from what came in one piece leave in one piece: flush is called before
// anything is waited for.
func (c *conn) write(b []byte) { c.out = append(c.out, b...) }

func (c *conn) flush() error {
	if len(c.out) == 0 {
		return nil
	}
	if err := c.tls.SetWriteDeadline(time.Now().Add(10 * c.s.cfg.Second)); err != nil {
		return err
	}
	_, err := c.tls.Write(c.out)
	c.out = c.out[:0]
	return err
}

// await sets how long the next packet may take.
func (c *conn) await() error {
	deadline := c.end
	if c.keepAlive > 0 {
		if d := time.Now().Add(c.keepAlive); d.Before(deadline) {
			deadline = d
		}
	}
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	if c.s.ending {
		return net.ErrClosed
	}
	return c.tls.SetReadDeadline(deadline)
}

var errHangUp = errors.New("device broke the protocol")

func (c *conn) serve(ctx context.Context) (err error) {
	defer func() { err = errors.Join(err, c.flush()) }()
	second := c.s.cfg.Second
	c.end = time.Now().Add(connectTime * second)
	if err := c.await(); err != nil {
		return err
	}
	r := bufio.NewReaderSize(c.tls, 1024)
	p, err := mqtt.Read(r, maxConnect)
	if err != nil {
		return err
	}
	if p.Type != mqtt.Connect { // [MQTT-3.1.0-1]
		return errHangUp
	}
	code := c.connect(p)
	if c.write(mqtt.AppendConnack(nil, code)); code != accepted {
		return nil
	}
	c.end = time.Now().Add(conversationTime * second)
	c.keepAlive = time.Duration(p.KeepAlive) * second * 3 / 2 // [MQTT-3.1.2-24]; 0 is no limit but the conversation's
	for {
		if r.Buffered() == 0 {
			if err := c.flush(); err != nil {
				return err
			}
		}
		if err := c.await(); err != nil {
			return err
		}
		p, err := mqtt.Read(r, maxPacket)
		if err != nil {
			return err
		}
		if done, err := c.packet(ctx, p); done || err != nil {
			return err
		}
	}
}

// connect decides about a CONNECT (device API, section 11.1). A proof that matches no enrollment is accepted here and
// refused at the register request, where the device can read why.
func (c *conn) connect(p *mqtt.Packet) byte {
	if p.ProtocolName != "MQTT" || p.ProtocolLevel != 4 {
		return badProtocol
	}
	if dps.CheckRegistrationID(p.ClientID) != nil {
		return badIdentifier
	}
	scope, id, version, client, err := parseUsername(p.Username)
	if err != nil || dps.Fold(id) != dps.Fold(p.ClientID) {
		return notAuthorized
	}
	c.req = registration.Request{IDScope: scope, RegistrationID: id, APIVersion: version, ClientVersion: client,
		Protocol: "mqtt", Remote: c.raw.RemoteAddr().String(), Proof: attest.Proof{Certificates: c.tls.ConnectionState().PeerCertificates}}
	if len(p.Password) > 0 {
		c.req.Proof.Token = string(p.Password)
		token, err := attest.ParseToken(c.req.Proof.Token)
		if err != nil || token.Expired(c.s.cfg.Now()) {
			return notAuthorized
		}
	}
	return accepted
}

// parseUsername reads {idScope}/registrations/{registrationId}/api-version={V}&ClientVersion={text}. What follows the
// third slash may hold anything; only the api-version counts.
func parseUsername(s string) (scope, id, version, client string, err error) {
	parts := strings.SplitN(s, "/", 4)
	if len(s) > 1024 || len(parts) != 4 || !strings.EqualFold(parts[1], "registrations") {
		return "", "", "", "", errors.New("user name is not idScope/registrations/registrationId/api-version=…")
	}
	for pair := range strings.SplitSeq(strings.TrimPrefix(parts[3], "?"), "&") {
		name, value, _ := strings.Cut(pair, "=")
		switch {
		case strings.EqualFold(name, "api-version"):
			version = value
		case strings.EqualFold(name, "ClientVersion"):
			if client, err = url.PathUnescape(value); err != nil {
				client, err = value, nil
			}
		}
	}
	return parts[0], parts[2], version, client, dps.CheckAPIVersion(version)
}

// packet answers one packet; done ends the conversation.
func (c *conn) packet(ctx context.Context, p *mqtt.Packet) (done bool, err error) {
	switch p.Type {
	case mqtt.Publish:
		return c.publish(ctx, p)
	case mqtt.Subscribe:
		return c.subscribe(p)
	case mqtt.Unsubscribe:
		c.subscribed = false
		c.write(mqtt.AppendUnsuback(nil, p.ID))
		return false, nil
	case mqtt.Pingreq:
		c.write(mqtt.AppendPingresp(nil))
		return false, nil
	case mqtt.Puback:
		return false, nil // nothing is sent twice, so nothing waits for it
	case mqtt.Disconnect:
		return true, nil
	}
	return true, errHangUp // a second CONNECT [MQTT-3.1.0-2], or a packet that only servers send
}

func (c *conn) subscribe(p *mqtt.Packet) (bool, error) {
	codes := make([]byte, len(p.Filters))
	for i, f := range p.Filters {
		if f != responseFilter {
			codes[i] = mqtt.SubackFailure
			continue
		}
		codes[i] = min(p.Codes[i], 1)
		c.subscribed, c.qos = true, codes[i]
	}
	c.write(mqtt.AppendSuback(nil, p.ID, codes))
	if !c.subscribed {
		c.linger() // some devices do not read the code, and expect to be hung up on
		return false, nil
	}
	held := c.held
	c.held = nil
	for _, h := range held {
		c.send(h[0], []byte(h[1]))
	}
	return false, nil
}

// linger ends the conversation soon.
func (c *conn) linger() {
	if d := time.Now().Add(lingerTime * c.s.cfg.Second); d.Before(c.end) {
		c.end = d
	}
}

func (c *conn) publish(ctx context.Context, p *mqtt.Packet) (bool, error) {
	if p.QoS == 2 {
		return true, errHangUp // not taken, as on Azure; no SDK uses it
	}
	// The acknowledgement goes out before the work begins: one SDK takes the two in this order only.
	if p.QoS == 1 {
		c.write(mqtt.AppendPuback(nil, p.ID))
	}
	if err := c.flush(); err != nil {
		return true, err
	}
	query, register := strings.CutPrefix(p.Topic, registerTopic)
	if !register {
		var status bool
		if query, status = strings.CutPrefix(p.Topic, statusTopic); !status {
			return true, errHangUp
		}
	}
	rid, operation := parseQuery(query)
	acknowledged := time.Now()
	req := c.req
	var answer *dps.OperationStatus
	var err error
	// The context's end must not cut off a request that is being worked on: drain waits for it.
	work := context.WithoutCancel(ctx)
	if register {
		req.Body, req.Repeat = p.Payload, p.Dup
		answer, err = c.s.cfg.Registrar.Register(work, &req)
	} else {
		answer, err = c.s.cfg.Registrar.Status(work, &req, operation)
	}
	topic, body := c.response(rid, answer, register, err)
	if wait := c.s.cfg.ResponseDelay - time.Since(acknowledged); wait > 0 {
		select {
		case <-time.After(wait):
		case <-ctx.Done():
		}
	}
	if !c.subscribed {
		if len(c.held) == maxHeld {
			return true, errHangUp
		}
		c.held = append(c.held, [2]string{topic, string(body)})
		return false, nil
	}
	c.send(topic, body)
	return false, nil
}

// parseQuery reads $rid and operationId, which may come in any order. Neither is decoded: $rid is echoed as it came.
func parseQuery(s string) (rid, operation string) {
	for pair := range strings.SplitSeq(s, "&") {
		name, value, _ := strings.Cut(pair, "=")
		switch name {
		case "$rid":
			rid = value
		case "operationId":
			operation = value
		}
	}
	return rid, operation
}

// response makes topic and body: $dps/registrations/res/{status}/?$rid={rid}, and the hint last, where there is one.
func (c *conn) response(rid string, answer *dps.OperationStatus, register bool, err error) (topic string, body []byte) {
	status, hint := 200, false
	var v any = answer
	if err != nil {
		e := dps.AsError(err)
		v, status = e, e.Code.Status()
		hint = status == 429 || status >= 500
		if status == 401 {
			c.linger()
		}
	} else if register || !answer.Status.Terminal() {
		status, hint = 202, true
	}
	body, merr := dps.Marshal(v)
	if merr != nil {
		c.s.cfg.Log.Error("encoding an answer", "cause", merr)
		status, body = 500, []byte(`{"errorCode":500000,"message":"Internal error"}`)
	}
	topic = fmt.Sprintf("$dps/registrations/res/%d/?$rid=%s", status, rid)
	if hint {
		topic += "&retry-after=" + strconv.Itoa(dps.RetryAfter)
	}
	return topic, body
}

func (c *conn) send(topic string, body []byte) {
	if c.nextID++; c.nextID == 0 {
		c.nextID = 1 // [MQTT-2.3.1-1]
	}
	c.out = mqtt.AppendPublish(c.out, topic, c.qos, c.nextID, body)
}
