// Package mqttd is the MQTT door: the $dps/registrations conversation of one device per connection. It is no broker:
// nothing is routed, retained or kept between connections (device API, section 11).
//
// A connection is served by one goroutine, in the order of its packets.
package mqttd

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"strings"
	"time"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/door"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/mqtt"
	"github.com/touchmark/touchmark/pkg/registration"
)

// A Hub takes over the connections of devices that it knows: SDKs take no port, so a hub on the same machine answers at the same
// door.
type Hub interface {
	// Owns reports whether a CONNECT with this user name is for the hub.
	Owns(username string) bool
	// Serve holds the conversation behind the CONNECT, which was read already; more may be in the reader. The connection is closed
	// when it returns.
	Serve(ctx context.Context, c *door.Conn, r *bufio.Reader, connect *mqtt.Packet) error
}

// Config is what a server needs.
type Config struct {
	// Hub has its devices at this door too; nil for none.
	Hub       Hub
	Registrar registration.Registrar
	// Overloaded reports whether a device is to be turned away at its CONNECT, with return code 3: what it asks for would be
	// refused. Nil means never.
	Overloaded func(*registration.Request) bool
	// Protocol is the door's name in records; empty means "mqtt".
	Protocol string
	Log      *slog.Logger
	Now      func() time.Time
	// ResponseDelay is how long a response waits behind its PUBACK: one SDK loses what comes sooner (device API, section
	// 11.4). Zero means 60 ms, a negative value none.
	ResponseDelay time.Duration
	// Second is the length of the second by which keep-alives are counted; zero means a second. Tests have shorter ones.
	Second time.Duration
}

// Limits of a conversation, in seconds where they are times.
const (
	connectTime      = 10
	conversationTime = 600
	lingerTime       = 3  // after a refusal
	answerTime       = 30 // for the registrar
	maxPacket        = 128 << 10
	maxConnect       = 8 << 10 // from somebody who has not said yet who they are
	maxHeld          = 4       // responses that wait for a SUBSCRIBE
	maxOut           = 2048    // what waits to be flushed, and the memory kept for it
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
	if cfg.Protocol == "" {
		cfg.Protocol = "mqtt"
	}
	return &Server{cfg}
}

// Handle holds the conversation of one device. It is a [door.Handler].
func (s *Server) Handle(ctx context.Context, dc *door.Conn) error {
	c := &conn{s: s, Conn: dc, r: bufio.NewReaderSize(dc, 1024)}
	return c.serve(ctx)
}

// conn is one device's conversation.
type conn struct {
	*door.Conn
	s *Server
	r *bufio.Reader

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
	if err := c.SetWriteDeadline(time.Now().Add(10 * c.s.cfg.Second)); err != nil {
		return err
	}
	_, err := c.Write(c.out)
	if c.out = c.out[:0]; cap(c.out) > maxOut {
		c.out = nil
	}
	// TLS and WebSockets answer by themselves while we read, at any time until the end.
	return errors.Join(err, c.SetWriteDeadline(c.end))
}

// await flushes, unless the next packet is there already, and sets how long it may take.
func (c *conn) await() error {
	if len(c.out) > maxOut || !c.buffered() {
		if err := c.flush(); err != nil {
			return err
		}
	}
	deadline := c.end
	if c.keepAlive > 0 {
		if d := time.Now().Add(c.keepAlive); d.Before(deadline) {
			deadline = d
		}
	}
	return c.SetReadDeadline(deadline)
}

// buffered reports whether the whole next packet has been read from the connection. A length that is none is for the reader.
func (c *conn) buffered() bool {
	head, _ := c.r.Peek(min(c.r.Buffered(), 5))
	for i, size := 1, 0; i < len(head); i++ { // §2.2.3
		size |= int(head[i]&0x7f) << (7 * (i - 1))
		if head[i] < 0x80 {
			return c.r.Buffered() > i+size
		}
	}
	return false
}

var errHangUp = errors.New("device broke the protocol")

func (c *conn) serve(ctx context.Context) (err error) {
	defer func() { err = errors.Join(err, c.flush()) }()
	second := c.s.cfg.Second
	c.end = time.Now().Add(connectTime * second)
	if err := c.await(); err != nil {
		return err
	}
	p, err := mqtt.Read(c.r, maxConnect)
	if err != nil {
		return err
	}
	if p.Type != mqtt.Connect { // [MQTT-3.1.0-1]
		return errHangUp
	}
	if h := c.s.cfg.Hub; h != nil && h.Owns(p.Username) {
		return h.Serve(ctx, c.Conn, c.r, p)
	}
	code := c.connect(p)
	if c.write(mqtt.AppendConnack(nil, code)); code != accepted {
		return nil
	}
	c.end = time.Now().Add(conversationTime * second)
	c.keepAlive = time.Duration(p.KeepAlive) * second * 3 / 2 // [MQTT-3.1.2-24]; 0 is no limit but the conversation's
	for {
		if err := c.await(); err != nil {
			return err
		}
		p, err := mqtt.Read(c.r, maxPacket)
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
		Protocol: c.s.cfg.Protocol, Remote: c.Remote, Proof: attest.Proof{Certificates: c.Certificates}}
	if len(p.Password) > 0 {
		c.req.Proof.Token = string(p.Password)
		token, err := attest.ParseToken(c.req.Proof.Token)
		if err != nil || token.Expired(c.s.cfg.Now()) {
			return notAuthorized
		}
	}
	if c.s.cfg.Overloaded != nil && c.s.cfg.Overloaded(&c.req) {
		return unavailable
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
	// The acknowledgement goes first: one SDK takes the two in this order only. Without a pause between them they leave together.
	if p.QoS == 1 {
		c.write(mqtt.AppendPuback(nil, p.ID))
	}
	if c.s.cfg.ResponseDelay > 0 {
		if err := c.flush(); err != nil {
			return true, err
		}
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
	work, cancel := context.WithTimeout(context.WithoutCancel(ctx), answerTime*c.s.cfg.Second)
	defer cancel()
	if register {
		req.Body, req.Repeat = p.Payload, p.Dup
		answer, err = c.s.cfg.Registrar.Register(work, &req)
	} else {
		answer, err = c.s.cfg.Registrar.Status(work, &req, operation)
	}
	if errors.Is(err, registration.ErrHangUp) {
		return true, err
	}
	reply := dps.NewReply(answer, err)
	if reply.Status == 401 {
		c.linger()
	}
	topic := responseTopic(rid, reply)
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
		c.held = append(c.held, [2]string{topic, string(reply.Body)})
		return false, nil
	}
	c.send(topic, reply.Body)
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

// responseTopic is $dps/registrations/res/{status}/?$rid={rid}, and the hint last, where there is one (device API, section
// 11.4).
func responseTopic(rid string, r dps.Reply) string {
	topic := fmt.Sprintf("$dps/registrations/res/%d/?$rid=%s", r.Status, rid)
	if r.RetryAfter != "" {
		topic += "&retry-after=" + r.RetryAfter
	}
	return topic
}

func (c *conn) send(topic string, body []byte) {
	if c.nextID++; c.nextID == 0 {
		c.nextID = 1 // [MQTT-2.3.1-1]
	}
	c.out = mqtt.AppendPublish(c.out, topic, c.qos, c.nextID, body)
}
