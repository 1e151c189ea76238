package amqpd

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/touchmark/touchmark/pkg/amqp"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
)

// transfer takes a message in, or a part of one.
func (c *conn) transfer(ctx context.Context, s *session, t *amqp.Transfer, payload []byte) error {
	// Window and credit are given anew before they are used up, so that no peer can be seen to overrun them.
	s.nextIn++
	if s.window--; s.window < window/2 {
		s.window = window
		if err := c.tell(s, nil, false); err != nil {
			return err
		}
	}
	l := s.link(t.Handle)
	switch {
	case l == nil:
		return fail(unattached, fmt.Sprintf("Handle %d is not attached", t.Handle))
	case l.detached:
		return nil // the peer has not seen our detach yet
	case l.sending:
		return fail(notAllowed, "A transfer came on a link that the device receives on")
	case !l.more:
		if t.DeliveryID == nil || t.DeliveryTag == nil {
			return fail(invalidField, "A delivery began without delivery-id and delivery-tag")
		}
		l.credit--
		l.count++
		l.delivery, l.settles, l.partial = *t.DeliveryID, false, nil
	case t.DeliveryID != nil && *t.DeliveryID != l.delivery:
		return fail(invalidField, "A delivery began within another")
	}
	if t.Settled != nil {
		l.settles = l.settles || *t.Settled
	}
	l.more = t.More && !t.Aborted
	if t.Aborted {
		l.partial = nil
		return c.grant(s, l)
	}
	if c.unfinished()+len(payload) > maxMessage {
		return c.refuse(s, l, breach(&failure{overSize, "A message is too large"}))
	}
	if l.partial = append(l.partial, payload...); l.more {
		return nil
	}
	message := l.partial
	l.partial = nil
	if err := c.request(ctx, s, l, message); err != nil || l.detached {
		return err
	}
	return c.grant(s, l)
}

// unfinished returns how many octets of messages that have more to come are kept, on all links together.
func (c *conn) unfinished() (n int) {
	for _, s := range c.sessions {
		if s != nil {
			for _, l := range s.links {
				n += len(l.partial)
			}
		}
	}
	return n
}

// grant gives a device new credit when half is used.
func (c *conn) grant(s *session, l *link) error {
	if l.credit > credit/2 {
		return nil
	}
	l.credit = credit
	return c.tell(s, l, false)
}

// request answers one message: accepted, and a message behind it, or rejected (device API, sections 12.6 and 12.7).
func (c *conn) request(ctx context.Context, s *session, l *link, message []byte) error {
	m, err := amqp.DecodeMessage(message)
	var result any
	if err != nil {
		err = dps.NewError(dps.CodeBadRequest, "The message is malformed", err)
	} else {
		work, cancel := c.working(ctx)
		result, err = c.ask(work, m)
		cancel()
	}
	if errors.Is(err, registration.ErrHangUp) {
		return err
	}
	reply := dps.NewReply(result, err)
	if reply.Status == 401 {
		c.linger()
	}
	if reply.Status >= 300 {
		return c.reject(s, l, reply)
	}
	if !l.settles {
		if err := c.dispose(s, l, &amqp.Accepted{}); err != nil {
			return err
		}
	}
	if c.s.cfg.ResponseDelay > 0 {
		if err := c.flush(); err != nil {
			return err
		}
		select {
		case <-time.After(c.s.cfg.ResponseDelay):
		case <-ctx.Done():
		}
	}
	if len(s.held) == maxHeld {
		return fail(limitExceeded, "Too many answers wait to be taken")
	}
	s.held = append(s.held, answer{message: amqp.AppendMessage(nil, response(m, reply))})
	return c.answer(s)
}

// ask has a request answered by the service.
func (c *conn) ask(ctx context.Context, m *amqp.Message) (any, error) {
	req := c.req
	req.Body = m.Data
	if m.Data == nil {
		switch v := m.Value.(type) {
		case []byte:
			req.Body = v
		case string:
			req.Body = []byte(v)
		}
	}
	switch operation, _ := m.ApplicationProperties.Get("iotdps-operation-type").(string); operation {
	case "iotdps-register":
		return c.s.cfg.Registrar.Register(ctx, &req)
	case "iotdps-get-operationstatus":
		req.Body = nil
		id, _ := m.ApplicationProperties.Get("iotdps-operation-id").(string)
		return c.s.cfg.Registrar.Status(ctx, &req, id)
	case "iotdps-get-registration":
		return c.s.cfg.Registrar.Lookup(ctx, &req)
	}
	return nil, dps.NewError(dps.CodeBadRequest, "iotdps-operation-type is missing or unknown", nil)
}

// response is the message that answers another: a data section, the correlation ID with its type, and the hint by both its
// names (device API, section 12.6).
func response(to *amqp.Message, r dps.Reply) *amqp.Message {
	m := &amqp.Message{Data: r.Body}
	if to.Properties != nil && to.Properties.CorrelationID != nil {
		m.Properties = &amqp.Properties{CorrelationID: to.Properties.CorrelationID}
	}
	if h := hint(r.RetryAfter); h != nil {
		m.ApplicationProperties = amqp.Map{{Key: "retry-after", Value: h}, {Key: "Retry-After", Value: h}}
	}
	return m
}

// hint is a retry-after: an int, which is the one number that every SDK reads. What is no number was made so on purpose.
func hint(s string) any {
	if s == "" {
		return nil
	}
	if n, err := strconv.ParseInt(s, 10, 32); err == nil {
		return int32(n)
	}
	return s
}

func (c *conn) dispose(s *session, l *link, state any) error {
	return c.write(s.channel, &amqp.Disposition{Role: amqp.Receiver, First: l.delivery, Settled: true, State: state}, nil)
}

// reject refuses a request. What came settled cannot be rejected any more: its link ends instead.
func (c *conn) reject(s *session, l *link, r dps.Reply) error {
	e := &amqp.Error{Condition: condition(r.Status), Description: string(r.Body)}
	if h := hint(r.RetryAfter); h != nil {
		e.Info = amqp.Map{{Key: amqp.Symbol("retry-after"), Value: h}, {Key: amqp.Symbol("Retry-After"), Value: h}}
	}
	if l.settles {
		return c.refuse(s, l, e)
	}
	return c.dispose(s, l, &amqp.Rejected{Error: e})
}

// condition is what one SDK makes its classes of errors of (device API, section 12.7).
func condition(status int) amqp.Symbol {
	switch {
	case status == 401:
		return unauthorized
	case status == 404:
		return notFound
	case status == 429:
		return throttled
	case status >= 500:
		return internalError
	}
	return argumentError
}

// answer sends what is held, as far as link, credit and window allow, in frames as large as the peer takes.
func (c *conn) answer(s *session) error {
	for l := s.replies; l != nil && len(s.held) > 0 && s.peerWindow > 0; {
		a := &s.held[0]
		t := &amqp.Transfer{Handle: l.handle}
		if !a.begun {
			if l.credit == 0 {
				return nil
			}
			a.begun = true
			l.credit--
			l.count++
			id := s.deliveries
			s.deliveries++
			t.DeliveryID, t.DeliveryTag, t.MessageFormat, t.Settled = &id, binary.BigEndian.AppendUint32(nil, id), new(uint32), &l.settled
		}
		const head = 64 // more than a transfer without its payload has
		chunk := a.message[:min(len(a.message), int(min(c.maxFrame, maxFrame))-head)]
		a.message = a.message[len(chunk):]
		t.More = len(a.message) > 0
		if !t.More {
			s.held = s.held[1:]
		}
		s.nextOut++
		s.peerWindow--
		if err := c.write(s.channel, t, chunk); err != nil {
			return err
		}
	}
	if len(s.held) == 0 {
		s.held = nil
	}
	return nil
}
