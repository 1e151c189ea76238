package devhub

import (
	"bufio"
	"context"
	"crypto/sha1" // thumbprints of SHA-1 are part of the wire
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/door"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/mqtt"
)

// CONNACK return codes (MQTT 3.1.1, §3.2.2.3).
const (
	accepted      = 0
	badProtocol   = 1
	badIdentifier = 2
	unavailable   = 3
	notAuthorized = 5
)

// Limits of a conversation, in seconds where they are times.
const (
	maxKeepAlive = 1767
	writeTime    = 10
	maxPacket    = maxDeviceTo + maxTopic + 8
	maxOut       = 256 // packets that wait to be written; more than there can be messages in a queue
)

var errHangUp = errors.New("device broke the protocol")

// session is one connection of a device. Its goroutine reads; another one writes, so that who tells the device something does
// not wait for it.
type session struct {
	h         *Hub
	c         *door.Conn
	r         *bufio.Reader
	id        string
	clean     bool
	keepAlive time.Duration
	expires   time.Time // of the token; zero for a certificate
	will      *Message
	out       chan []byte // closed by the reader once the device has no session any more

	mu    sync.Mutex
	ended bool
}

// Owns reports whether a CONNECT's user name is a device's of this hub.
func (h *Hub) Owns(username string) bool {
	host, _, _, ok := parseUsername(username)
	return ok && strings.EqualFold(host, h.cfg.Name)
}

// Serve holds the conversation of a device behind its CONNECT, which has been read already.
func (h *Hub) Serve(ctx context.Context, c *door.Conn, r *bufio.Reader, p *mqtt.Packet) error {
	s := &session{h: h, c: c, r: r, id: p.ClientID, clean: p.CleanSession, out: make(chan []byte, maxOut)}
	s.keepAlive = time.Duration(min(int(p.KeepAlive)*3/2, maxKeepAlive)) * h.cfg.Second // [MQTT-3.1.2-24]
	if p.KeepAlive == 0 {
		s.keepAlive = maxKeepAlive * h.cfg.Second
	}
	code, err := s.connect(p)
	if err != nil {
		return err
	}
	if code == accepted {
		code = s.attach()
	}
	if code != accepted {
		return s.write(mqtt.AppendConnack(nil, code))
	}
	c.Unbound()
	var writer sync.WaitGroup
	writer.Go(s.writeAll)
	err = s.converse()
	s.detach(err == nil)
	close(s.out)
	writer.Wait()
	return err
}

// connect decides about a CONNECT (service API, section 5.6).
func (s *session) connect(p *mqtt.Packet) (byte, error) {
	if p.ProtocolName != "MQTT" || p.ProtocolLevel != 4 {
		return badProtocol, nil
	}
	if checkDeviceID(p.ClientID) != nil {
		return badIdentifier, nil
	}
	_, id, _, ok := parseUsername(p.Username)
	if !ok || id != p.ClientID {
		return notAuthorized, nil
	}
	if p.HasWill {
		rest, ok := strings.CutPrefix(p.WillTopic, eventsTopic(id))
		if !ok || p.WillQoS == 2 || len(p.Will) > maxDeviceTo {
			return 0, errHangUp
		}
		system, properties, err := parseBag(rest)
		if err != nil {
			return 0, err
		}
		properties[willProperty] = "Will"
		s.will = &Message{DeviceID: id, System: system, Properties: properties, Body: p.Will}
	}
	s.h.mu.Lock()
	defer s.h.mu.Unlock()
	d := s.h.devices[id]
	if d == nil || d.rec.Disabled {
		return notAuthorized, nil
	}
	if !s.authentic(d.rec, string(p.Password)) {
		return notAuthorized, nil
	}
	_, _, d.modelID, _ = parseUsername(p.Username)
	return accepted, nil
}

// authentic judges a device's proof: a token of its own or of a policy that may connect devices, or its certificate.
func (s *session) authentic(r *record, password string) bool {
	if password == "" {
		return len(s.c.Certificates) > 0 && s.h.certified(r, s.c.Certificates)
	}
	t, err := attest.ParseToken(password)
	if err != nil || !s.h.now().Before(t.Expiry) {
		return false
	}
	if !s.h.forResource(&t, "/devices/"+r.ID, t.Policy == "") {
		return false
	}
	s.expires = t.Expiry
	if t.Policy != "" {
		return policies[t.Policy]&DeviceConnect != 0 && s.h.signedBy(&t)
	}
	return r.Kind == kindSAS && r.signed(&t)
}

// signed reports whether one of the device's keys signed a token.
func (r *record) signed(t *attest.Token) bool {
	for _, k := range r.Keys {
		if key, err := base64.StdEncoding.DecodeString(k); err == nil && len(key) > 0 && t.SignedBy(key) {
			return true
		}
	}
	return false
}

// certified reports whether a device may come with a certificate, whose key it has shown to have.
func (h *Hub) certified(r *record, chain []*x509.Certificate) bool {
	leaf := chain[0]
	switch r.Kind {
	case kindSelfSigned:
		one, two := sha1.Sum(leaf.Raw), sha256.Sum256(leaf.Raw)
		for _, p := range r.Thumbprints {
			if p != "" && (strings.EqualFold(p, hex.EncodeToString(one[:])) || strings.EqualFold(p, hex.EncodeToString(two[:]))) {
				return true
			}
		}
	case kindCA:
		if h.cfg.Roots == nil || leaf.Subject.CommonName != r.ID {
			return false
		}
		between := x509.NewCertPool()
		for _, c := range chain[1:] {
			between.AddCert(c)
		}
		_, err := leaf.Verify(x509.VerifyOptions{Roots: h.cfg.Roots, Intermediates: between, CurrentTime: h.now(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
		return err == nil
	}
	return false
}

// attach makes the session the device's, in place of another one, and answers the CONNECT.
func (s *session) attach() byte {
	h := s.h
	h.mu.Lock()
	defer h.mu.Unlock()
	d := h.devices[s.id]
	if d == nil || d.rec.Disabled { // gone in between
		return notAuthorized
	}
	if h.closed {
		return unavailable
	}
	d.hangUp()
	present := !s.clean && d.subs != nil
	if !present {
		d.subs, d.nextID = map[string]byte{}, 0
	}
	for _, q := range d.queue {
		if q.in = nil; !present {
			q.id = 0
		}
	}
	ack := mqtt.AppendConnack(nil, accepted)
	if present {
		ack[2] = 1 // [MQTT-3.2.2-2]
	}
	d.session, d.switched, d.active = s, h.now(), h.now()
	s.out <- ack
	h.deliver(d)
	d.announce()
	return accepted
}

// detach takes the session from the device. What it did not acknowledge is sent again next time.
func (s *session) detach(goodbye bool) {
	h := s.h
	if s.will != nil && !goodbye {
		h.take(s.will)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	d := h.devices[s.id]
	if d == nil || d.session != s {
		return
	}
	d.session, d.switched = nil, h.now()
	if s.clean {
		d.subs = nil
	}
	for rid, answer := range d.methods {
		close(answer)
		delete(d.methods, rid)
	}
}

// hangUp ends the device's connection, if there is one. The caller holds the hub's mu.
func (d *device) hangUp() {
	if d.session != nil {
		d.session.end()
		for rid, answer := range d.methods {
			close(answer)
			delete(d.methods, rid)
		}
		if d.session.clean {
			d.subs = nil
		}
		d.session = nil
	}
}

// end has the reader and the writer stop.
func (s *session) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ended = true
	_ = s.c.SetReadDeadline(time.Now())
	_ = s.c.SetWriteDeadline(time.Now())
}

// await sets how long the next packet may take: until the keep-alive's end, or the token's.
func (s *session) await() error {
	deadline := time.Now().Add(s.keepAlive)
	if !s.expires.IsZero() {
		left := s.expires.Sub(s.h.now())
		if left <= 0 {
			return errors.New("the device's token has expired")
		}
		if end := time.Now().Add(left); end.Before(deadline) {
			deadline = end
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return errors.New("the hub ended the connection")
	}
	return s.c.SetReadDeadline(deadline)
}

// write writes at once.
func (s *session) write(b []byte) error {
	s.mu.Lock()
	ended := s.ended
	if !ended {
		ended = s.c.SetWriteDeadline(time.Now().Add(writeTime*s.h.cfg.Second)) != nil
	}
	s.mu.Unlock()
	if ended {
		return errHangUp
	}
	_, err := s.c.Write(b)
	return err
}

// writeAll writes what is in the queue until it is closed. After an error, and once the session has ended, it is only emptied.
func (s *session) writeAll() {
	var failed bool
	for b := range s.out {
		if failed {
			continue
		}
		if err := s.write(b); err != nil {
			failed = true
			s.end()
			continue
		}
		// TLS and WebSockets answer by themselves while the reader reads.
		s.mu.Lock()
		if !s.ended {
			_ = s.c.SetWriteDeadline(time.Now().Add(2 * maxKeepAlive * s.h.cfg.Second))
		}
		s.mu.Unlock()
	}
}

// tell queues a packet for a device that may be slow; one that takes nothing any more is hung up on. The caller holds the hub's
// mu, and has seen that the session is the device's.
func (s *session) tell(b []byte) {
	select {
	case s.out <- b:
	default:
		s.end()
	}
}

// reply queues a packet from the reader, which waits for room: a device that asks faster than it reads is slowed down.
func (s *session) reply(b []byte) { s.out <- b }

// converse answers packets until the device says goodbye, which is no error.
func (s *session) converse() error {
	for {
		if err := s.await(); err != nil {
			return err
		}
		p, err := mqtt.Read(s.r, maxPacket)
		if err != nil {
			return err
		}
		switch p.Type {
		case mqtt.Publish:
			err = s.publish(p)
		case mqtt.Subscribe:
			s.subscribe(p)
		case mqtt.Unsubscribe:
			s.h.mu.Lock()
			if d := s.device(); d != nil {
				for _, f := range p.Filters {
					delete(d.subs, f)
				}
			}
			s.h.mu.Unlock()
			s.reply(mqtt.AppendUnsuback(nil, p.ID))
		case mqtt.Pingreq:
			s.reply(mqtt.AppendPingresp(nil))
		case mqtt.Puback:
			s.acknowledged(p.ID)
		case mqtt.Disconnect:
			return nil
		default:
			err = errHangUp // a second CONNECT [MQTT-3.1.0-2], or a packet that only servers send
		}
		if err != nil {
			return err
		}
	}
}

// device is the device as long as the session is its. The caller holds the hub's mu.
func (s *session) device() *device {
	d := s.h.devices[s.id]
	if d == nil || d.session != s {
		return nil
	}
	d.active = s.h.now()
	return d
}

func (s *session) subscribe(p *mqtt.Packet) {
	s.h.mu.Lock()
	defer s.h.mu.Unlock()
	d := s.device()
	if d == nil {
		return
	}
	codes := make([]byte, len(p.Filters))
	for i, f := range p.Filters {
		switch f {
		case twinFilter, desiredFilter, methodFilter, deviceboundFilter(s.id):
			codes[i] = min(p.Codes[i], 1)
			d.subs[f] = codes[i]
		default:
			codes[i] = mqtt.SubackFailure
		}
	}
	s.tell(mqtt.AppendSuback(nil, p.ID, codes))
	s.h.deliver(d)
	d.announce()
}

// announce wakes those who wait for a device that takes methods. The caller holds the hub's mu.
func (d *device) announce() {
	if _, ok := d.subs[methodFilter]; ok && d.session != nil && d.arrived != nil {
		close(d.arrived)
		d.arrived = nil
	}
}

func eventsTopic(id string) string { return "devices/" + id + "/messages/events/" }

// publish takes what a device sends. What is no topic of its own ends the conversation, as on IoT Hub.
func (s *session) publish(p *mqtt.Packet) error {
	if p.QoS == 2 || len(p.Topic) > maxTopic {
		return errHangUp
	}
	if rest, ok := strings.CutPrefix(strings.TrimSuffix(p.Topic, "/")+"/", eventsTopic(s.id)); ok {
		err := s.event(strings.TrimSuffix(rest, "/"), p.Payload, p.Retain)
		if err == nil && p.QoS == 1 {
			s.reply(mqtt.AppendPuback(nil, p.ID))
		}
		return err
	}
	// The acknowledgement goes before the response: one SDK takes the two in this order only.
	if p.QoS == 1 {
		s.reply(mqtt.AppendPuback(nil, p.ID))
	}
	if rest, ok := strings.CutPrefix(p.Topic, getTwinTopic); ok {
		return s.getTwin(rest)
	}
	if rest, ok := strings.CutPrefix(p.Topic, reportedTopic); ok {
		return s.reported(rest, p.Payload)
	}
	if rest, ok := strings.CutPrefix(p.Topic, answerTopic); ok {
		return s.answered(rest, p.Payload)
	}
	return errHangUp
}

func (s *session) event(rest string, payload []byte, retain bool) error {
	if len(payload) > maxDeviceTo {
		return errHangUp
	}
	system, properties, err := parseBag(rest)
	if err != nil {
		return err
	}
	if retain {
		properties[retainProperty] = "true" // told, not kept: IoT Hub retains nothing
	}
	s.h.take(&Message{DeviceID: s.id, System: system, Properties: properties, Body: payload})
	return nil
}

// push sends a document on a topic, if the device listens there. The caller holds the hub's mu.
func (d *device) push(filter, topic string, v any) {
	qos, ok := d.subs[filter]
	if !ok || d.session == nil {
		return
	}
	body, err := dps.Marshal(v)
	if err != nil {
		return // values that came as JSON go as JSON
	}
	d.session.tell(mqtt.AppendPublish(nil, topic, qos, d.packetID(), body))
}

// packetID returns an identifier that no message in flight has. The caller holds the hub's mu.
func (d *device) packetID() uint16 {
	for {
		if d.nextID++; d.nextID != 0 && !slices.ContainsFunc(d.queue, func(q *queued) bool { return q.id == d.nextID }) {
			return d.nextID
		}
	}
}

func (s *session) getTwin(rest string) error {
	rid, ok := parseRequest(rest)
	if !ok {
		return errHangUp
	}
	s.h.mu.Lock()
	defer s.h.mu.Unlock()
	if d := s.device(); d != nil {
		d.push(twinFilter, twinResponse(200, rid, ""), d.rec.Twin.forDevice())
	}
	return nil
}

func (s *session) reported(rest string, payload []byte) error {
	rid, ok := parseRequest(rest)
	if !ok {
		return errHangUp
	}
	patch, err := parseObject(payload)
	s.h.mu.Lock()
	defer s.h.mu.Unlock()
	d := s.device()
	if d == nil {
		return nil
	}
	var next twin
	if err == nil {
		next, err = d.rec.Twin.report(patch, s.h.now())
	}
	if err != nil {
		f := badArgument("reported properties: %v", err)
		d.push(twinFilter, twinResponse(f.status(), rid, ""), json.RawMessage(f.body(s.h.now())))
		return nil
	}
	if err := s.h.keepTwin(d, next); err != nil {
		return err
	}
	qos, listens := d.subs[twinFilter]
	if listens {
		topic := twinResponse(204, rid, fmt.Sprintf("&$version=%d", next.Reported.Version))
		s.tell(mqtt.AppendPublish(nil, topic, qos, d.packetID(), nil))
	}
	return nil
}

func sorted[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
