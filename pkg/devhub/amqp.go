package devhub

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/touchmark/touchmark/pkg/amqp"
	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/door"
)

// Services send to devices over AMQP: they show a policy's token on the links $cbs and send on a link to /messages/devicebound. It is
// all that the hub speaks of AMQP; there is no feedback, and devices use MQTT.

// Limits of such a conversation, in seconds where they are times.
const (
	maxServiceFrame   = 64 << 10
	maxServiceMessage = 2 * maxToDevice
	maxServiceHandle  = 7
	serviceCredit     = 50
	serviceSilence    = 240 // half of it is announced as idle-time-out
	serviceWindow     = 1 << 30
	loginTime         = 30 // before a token has been shown
	minIdle           = 1000
	maxHeld           = 8
	goodbyeTime       = 3
	maxGoodbye        = 1 << 20
)

const (
	cbsAddress         = "$cbs"
	deviceboundAddress = "messages/devicebound"
)

// OwnsHost reports whether an AMQP connection for a host is for this hub, if it has shown nothing else of who it is.
func (h *Hub) OwnsHost(host string) bool {
	return strings.EqualFold(host, h.cfg.Name) || slices.ContainsFunc(h.cfg.Hosts, func(name string) bool { return strings.EqualFold(host, name) })
}

// sender is a service's connection.
type sender struct {
	h        *Hub
	c        *door.Conn
	r        *bufio.Reader
	expires  time.Time // of its token; before there is one, when it must be there
	trusted  bool
	maxFrame uint32
	begun    bool
	links    map[uint32]*serviceLink
	nextIn   uint32
	nextOut  uint32
	window   uint32   // the peer's
	held     [][]byte // answers that wait for credit

	mu sync.Mutex // for writing
}

// serviceLink is one of its links, by the peer's handle.
type serviceLink struct {
	address string
	sending bool // our role
	credit  uint32
	count   uint32
	partial []byte
	id      *uint32 // of the delivery that has more to come
	settled bool
}

// An amqpFault ends a connection, and is told.
type amqpFault struct {
	condition amqp.Symbol
	text      string
}

func (f *amqpFault) Error() string { return string(f.condition) + ": " + f.text }

func protocolFault(text string) error { return &amqpFault{"amqp:not-allowed", text} }

// ServeAMQP holds the conversation of a service behind its open, which has been read already.
func (h *Hub) ServeAMQP(_ context.Context, c *door.Conn, r *bufio.Reader, open *amqp.Open) error {
	c.Unbound()
	s := &sender{h: h, c: c, r: r, expires: time.Now().Add(loginTime * h.cfg.Second), maxFrame: min(max(open.MaxFrameSize, amqp.MinMaxFrameSize), maxServiceFrame), links: make(map[uint32]*serviceLink)}
	if err := s.write(&amqp.Open{ContainerID: "touchmark-hub", MaxFrameSize: maxServiceFrame, IdleTimeout: serviceSilence * 1000 / 2}, nil); err != nil {
		return err
	}
	stop := make(chan struct{})
	var beats sync.WaitGroup
	if open.IdleTimeout > 0 {
		beats.Go(func() { s.beat(stop, time.Duration(max(open.IdleTimeout, minIdle))*h.cfg.Second/1000/3) })
	}
	err := s.converse()
	close(stop)
	beats.Wait()
	var f *amqpFault
	if errors.As(err, &f) {
		err = errors.Join(err, s.write(&amqp.Close{Error: &amqp.Error{Condition: f.condition, Description: f.text}}, nil), s.c.SetReadDeadline(time.Now().Add(goodbyeTime*s.h.cfg.Second)))
		// A connection closed on unread input could take the close with it.
		_, _ = io.Copy(io.Discard, io.LimitReader(s.r, maxGoodbye))
	}
	return err
}

// beat writes empty frames, for a peer that wants to hear something (part 2, §2.4.5).
func (s *sender) beat(stop <-chan struct{}, every time.Duration) {
	t := time.NewTicker(every)
	defer t.Stop()
	for {
		select {
		case <-stop:
			return
		case <-t.C:
			if s.write(nil, nil) != nil {
				return // the reader sees it too
			}
		}
	}
}

func (s *sender) write(body amqp.Performative, payload []byte) error {
	b := amqp.AppendFrame(nil, 0, body, payload)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.c.SetWriteDeadline(time.Now().Add(writeTime * s.h.cfg.Second)); err != nil {
		return err
	}
	_, err := s.c.Write(b)
	return errors.Join(err, s.c.SetWriteDeadline(time.Now().Add(2*serviceSilence*s.h.cfg.Second)))
}

func (s *sender) converse() error {
	for {
		deadline := time.Now().Add(serviceSilence * s.h.cfg.Second)
		if s.expires.Before(deadline) {
			deadline = s.expires
		}
		if err := s.c.SetReadDeadline(deadline); err != nil {
			return err
		}
		f, err := amqp.ReadFrame(s.r, maxServiceFrame)
		if errors.Is(err, amqp.ErrMalformed) || errors.Is(err, amqp.ErrTooLarge) {
			return &amqpFault{"amqp:decode-error", "A frame is malformed or too large"}
		}
		if err != nil {
			return err
		}
		if f.SASL || f.Channel != 0 {
			return protocolFault("There is one channel, and no more SASL")
		}
		if _, ok := f.Body.(*amqp.Close); ok {
			return s.write(&amqp.Close{}, nil)
		}
		if err := s.frame(f); err != nil {
			return err
		}
	}
}

func (s *sender) frame(f amqp.Frame) error {
	begin, begins := f.Body.(*amqp.Begin)
	if f.Body != nil && begins == s.begun {
		return protocolFault("There is one session, which begins with begin")
	}
	switch b := f.Body.(type) {
	case nil, *amqp.Disposition:
		return nil
	case *amqp.Begin:
		channel := uint16(0)
		s.begun, s.nextIn, s.window = true, begin.NextOutgoingID, begin.IncomingWindow
		return s.write(&amqp.Begin{RemoteChannel: &channel, IncomingWindow: serviceWindow, OutgoingWindow: serviceWindow, HandleMax: maxServiceHandle}, nil)
	case *amqp.End:
		s.begun = false
		clear(s.links)
		return s.write(&amqp.End{}, nil)
	case *amqp.Attach:
		return s.attach(b)
	case *amqp.Flow:
		return s.flow(b)
	case *amqp.Transfer:
		return s.transfer(b, f.Payload)
	case *amqp.Detach:
		if s.links[b.Handle] == nil {
			return nil // refused, and detached by us before
		}
		delete(s.links, b.Handle)
		return s.write(&amqp.Detach{Handle: b.Handle, Closed: b.Closed}, nil)
	}
	return protocolFault("A frame came out of its order")
}

// attach takes the links that there are, and refuses the rest.
func (s *sender) attach(a *amqp.Attach) error {
	if a.Handle > maxServiceHandle || s.links[a.Handle] != nil {
		return protocolFault("A handle is in use, or beyond handle-max")
	}
	l := &serviceLink{sending: a.Role == amqp.Receiver}
	var address any
	out := &amqp.Attach{Name: a.Name, Handle: a.Handle, Role: !a.Role, SndSettleMode: a.SndSettleMode, Source: a.Source, Target: a.Target, MaxMessageSize: maxServiceMessage}
	if l.sending {
		out.InitialDeliveryCount = new(uint32)
		if a.Source != nil {
			address = a.Source.Address
		}
	} else {
		if a.InitialDeliveryCount != nil {
			l.count = *a.InitialDeliveryCount
		}
		if a.Target != nil {
			address = a.Target.Address
		}
	}
	text, _ := address.(string)
	if scheme, rest, ok := strings.Cut(text, "://"); ok && !strings.Contains(scheme, "/") {
		_, text, _ = strings.Cut(rest, "/")
	}
	l.address = strings.ToLower(strings.TrimPrefix(text, "/"))
	var refusal *amqp.Error
	switch {
	case l.address == cbsAddress:
	case !s.trusted:
		refusal = &amqp.Error{Condition: "amqp:unauthorized-access", Description: "Unauthorized"}
	case l.address != deviceboundAddress || l.sending:
		refusal = &amqp.Error{Condition: "amqp:not-found", Description: "This hub has no such node"}
	}
	if refusal != nil {
		if l.sending {
			out.Source = nil
		} else {
			out.Target = nil
		}
		return errors.Join(s.write(out, nil), s.write(&amqp.Detach{Handle: a.Handle, Closed: true, Error: refusal}, nil))
	}
	s.links[a.Handle] = l
	if err := s.write(out, nil); err != nil || l.sending {
		return err
	}
	return s.grant(a.Handle, l)
}

// grant gives a link credit again.
func (s *sender) grant(handle uint32, l *serviceLink) error {
	l.credit = serviceCredit
	return s.write(&amqp.Flow{NextIncomingID: &s.nextIn, IncomingWindow: serviceWindow, NextOutgoingID: s.nextOut, OutgoingWindow: serviceWindow,
		Handle: &handle, DeliveryCount: &l.count, LinkCredit: &l.credit}, nil)
}

func (s *sender) flow(f *amqp.Flow) error {
	next := uint32(0)
	if f.NextIncomingID != nil {
		next = *f.NextIncomingID
	}
	s.window = next + f.IncomingWindow - s.nextOut // part 2, §2.5.6
	if f.Handle == nil {
		if !f.Echo {
			return s.release()
		}
		return s.write(&amqp.Flow{NextIncomingID: &s.nextIn, IncomingWindow: serviceWindow, NextOutgoingID: s.nextOut, OutgoingWindow: serviceWindow}, nil)
	}
	l := s.links[*f.Handle]
	if l == nil {
		return nil
	}
	if l.sending && f.LinkCredit != nil {
		count := uint32(0)
		if f.DeliveryCount != nil {
			count = *f.DeliveryCount
		}
		l.credit = count + *f.LinkCredit - l.count // part 2, §2.6.7
	}
	if f.Echo && !l.sending {
		return s.grant(*f.Handle, l)
	}
	return s.release()
}

// transfer takes a part of a message, and with the last one the message.
func (s *sender) transfer(t *amqp.Transfer, payload []byte) error {
	l := s.links[t.Handle]
	if l == nil || l.sending {
		return protocolFault("A transfer came on a handle that takes none")
	}
	s.nextIn++
	if l.id == nil {
		if t.DeliveryID == nil || l.credit == 0 {
			return protocolFault("A delivery has no ID, or there was no credit for it")
		}
		l.credit--
		l.count++
		l.id, l.settled = t.DeliveryID, false
	}
	l.settled = l.settled || t.Settled != nil && *t.Settled
	if len(l.partial)+len(payload) > maxServiceMessage {
		return &amqpFault{"amqp:link:message-size-exceeded", "A message is too large"}
	}
	l.partial = append(l.partial, payload...)
	if t.More && !t.Aborted {
		return nil
	}
	id, b := *l.id, l.partial
	l.id, l.partial = nil, nil
	if t.Aborted {
		return nil
	}
	m, err := amqp.DecodeMessage(b)
	if err != nil {
		return &amqpFault{"amqp:decode-error", "A message is malformed"}
	}
	var outcome any = &amqp.Accepted{}
	if l.address == deviceboundAddress {
		if err := s.send(m); err != nil {
			outcome = &amqp.Rejected{Error: err}
		}
	}
	if !l.settled {
		if err := s.write(&amqp.Disposition{Role: amqp.Receiver, First: id, Settled: true, State: outcome}, nil); err != nil {
			return err
		}
	}
	if l.address == cbsAddress {
		if err := s.token(m); err != nil {
			return err
		}
	}
	if l.credit <= serviceCredit/2 {
		return s.grant(t.Handle, l)
	}
	return nil
}

// token judges a put-token request, and answers it.
func (s *sender) token(m *amqp.Message) error {
	text, _ := m.Value.(string)
	t, err := attest.ParseToken(text)
	good := err == nil && !t.Expired(s.h.now()) && policies[t.Policy]&ServiceConnect != 0 && s.h.forResource(&t, "/"+deviceboundAddress, false) && s.h.signedBy(&t)
	status, description := int32(401), "Unauthorized"
	if operation, _ := m.ApplicationProperties.Get("operation").(string); operation != "put-token" {
		status, description, good = 400, "Only put-token is known here", false
	}
	if good {
		status, description, s.trusted = 200, "OK", true
		s.expires = time.Now().Add(t.Expiry.Add(attest.Skew).Sub(s.h.now()))
	}
	answer := &amqp.Message{Properties: &amqp.Properties{}, Data: []byte{}, ApplicationProperties: amqp.Map{{Key: "status-code", Value: status}, {Key: "status-description", Value: description}}}
	if m.Properties != nil {
		answer.Properties.CorrelationID = m.Properties.MessageID
	}
	if len(s.held) == maxHeld {
		return protocolFault("The service takes no answers")
	}
	s.held = append(s.held, amqp.AppendMessage(nil, answer))
	return s.release()
}

// release sends answers, as far as there is a link, with credit, and a window: one SDK gives credit behind its first request.
func (s *sender) release() error {
	for handle, l := range s.links {
		for l.sending && len(s.held) > 0 && l.credit > 0 && s.window > 0 {
			b := s.held[0]
			if len(b) > int(s.maxFrame)-128 {
				return protocolFault("An answer does not fit the service's frames")
			}
			id, format, settled := s.nextOut, uint32(0), true
			s.held = s.held[1:]
			l.credit, s.window, l.count, s.nextOut = l.credit-1, s.window-1, l.count+1, s.nextOut+1
			if err := s.write(&amqp.Transfer{Handle: handle, DeliveryID: &id, DeliveryTag: fmt.Append(nil, id), MessageFormat: &format, Settled: &settled}, b); err != nil {
				return err
			}
		}
	}
	return nil
}

// send hands a message to the device that it names.
func (s *sender) send(m *amqp.Message) *amqp.Error {
	out := &Message{System: map[string]string{}, Properties: map[string]string{}, Body: m.Data}
	if p := m.Properties; p != nil {
		to, _ := p.To.(string)
		parts := strings.Split(strings.TrimPrefix(to, "/"), "/")
		if len(parts) == 4 && strings.EqualFold(parts[0], "devices") && strings.EqualFold(parts[2]+"/"+parts[3], deviceboundAddress) {
			out.DeviceID, _ = url.PathUnescape(parts[1]) // what is not encoded names no device
		}
		for name, v := range map[string]any{"mid": p.MessageID, "cid": p.CorrelationID, "ct": string(p.ContentType), "ce": string(p.ContentEncoding), "uid": string(p.UserID)} {
			if text := plain(v); text != "" {
				out.System[name] = text
			}
		}
		if p.AbsoluteExpiryTime != nil {
			out.Expiry = time.UnixMilli(int64(*p.AbsoluteExpiryTime))
		}
	}
	for _, p := range m.ApplicationProperties {
		name, _ := p.Key.(string)
		out.Properties[name] = plain(p.Value)
	}
	if text, ok := m.Value.(string); ok {
		out.Body = []byte(text)
	}
	err := s.h.Send(out)
	if err == nil {
		return nil
	}
	f := asFailure(err)
	condition := map[int]amqp.Symbol{404001: "amqp:not-found", 403004: "amqp:resource-limit-exceeded", 413001: "amqp:link:message-size-exceeded"}[f.number]
	if condition == "" {
		condition = "amqp:internal-error"
	}
	return &amqp.Error{Condition: condition, Description: f.message}
}

// plain writes a value as the property of a message to a device is.
func plain(v any) string {
	switch v := v.(type) {
	case nil:
		return ""
	case amqp.UUID:
		return fmt.Sprintf("%x-%x-%x-%x-%x", v[0:4], v[4:6], v[6:8], v[8:10], v[10:])
	case []byte:
		return string(v)
	}
	return fmt.Sprint(v)
}
