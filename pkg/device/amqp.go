package device

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/touchmark/touchmark/pkg/amqp"
	"github.com/touchmark/touchmark/pkg/dps"
)

// newAMQP connects and attaches both links.
func newAMQP(ctx context.Context, cfg *Config, dial dialer, token string) (t talker, err error) {
	endpoint, err := cfg.endpoint("5671")
	if err != nil {
		return nil, err
	}
	host, _, _ := net.SplitHostPort(endpoint)
	var tpm *saslTPM
	if cfg.Stamp.TPM {
		if tpm, err = newSASLTPM(ctx, cfg); err != nil {
			return nil, err
		}
	}
	c, err := dial(ctx)
	if err != nil {
		return nil, err
	}
	err = cfg.step("open", func() (_ *dps.OperationStatus, err error) {
		t, err = openAMQP(ctx, c, cfg, host, token, tpm)
		return nil, err
	})
	return t, err
}

// amqpTalker speaks AMQP 1.0 on a connection of any kind (device API, section 12).
type amqpTalker struct {
	conn       net.Conn
	r          *bufio.Reader
	stamp      *Stamp
	apiVersion string
	maxFrame   uint32 // the service's
	credit     uint32
	next       uint32 // the next delivery's ID

	mu   sync.Mutex // for writing: the beat writes too
	beat *time.Timer
	over bool
}

// The handles of our links.
const (
	answers  uint32 = 0
	requests uint32 = 1
)

// openAMQP opens a conversation: with a TPM by SASL TPM, with a token by SASL PLAIN, and else bare, behind a client
// certificate. The connection is the talker's from here on.
func openAMQP(ctx context.Context, c net.Conn, cfg *Config, host, token string, tpm *saslTPM) (_ *amqpTalker, err error) {
	t := &amqpTalker{conn: c, r: bufio.NewReader(c), stamp: &cfg.Stamp, apiVersion: cfg.apiVersion(), maxFrame: amqp.MinMaxFrameSize}
	stop, err := t.within(ctx)
	defer stop()
	if err == nil && (token != "" || tpm != nil) {
		err = t.login(ctx, host, token, tpm)
	}
	if err == nil {
		err = t.attach(host)
	}
	if err != nil {
		t.hush()
		return nil, errors.Join(err, ctx.Err(), c.Close())
	}
	return t, nil
}

// within bounds an exchange.
func (t *amqpTalker) within(ctx context.Context) (stop func() bool, err error) {
	err = t.conn.SetDeadline(time.Now().Add(requestTime))
	return context.AfterFunc(ctx, func() { _ = t.conn.SetDeadline(time.Now()) }), err
}

func (t *amqpTalker) write(b []byte) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	_, err := t.conn.Write(b)
	return err
}

// header exchanges protocol headers; what follows ours goes with it.
func (t *amqpTalker) header(p amqp.Protocol, behind []byte) error {
	if err := t.write(append(amqp.AppendHeader(nil, p), behind...)); err != nil {
		return err
	}
	got, err := amqp.ReadHeader(t.r)
	if err == nil && got != p {
		err = fmt.Errorf("the service wants AMQP's protocol %d instead of %d", got, p)
	}
	return err
}

// read returns the next frame that says something.
func (t *amqpTalker) read() (amqp.Frame, error) {
	for {
		f, err := amqp.ReadFrame(t.r, maxAnswer)
		if err != nil || f.Body != nil {
			return f, err
		}
	}
}

func (t *amqpTalker) login(ctx context.Context, host, token string, tpm *saslTPM) error {
	if err := t.header(amqp.SASL, nil); err != nil {
		return err
	}
	scope, id := t.stamp.IDScope, t.stamp.RegistrationID
	init := &amqp.SASLInit{Mechanism: "PLAIN", Hostname: host, InitialResponse: []byte("\x00" + scope + "/registrations/" + id + "\x00" + token)}
	if tpm != nil {
		init.Mechanism, init.InitialResponse = "TPM", append([]byte("\x00"+scope+"\x00"+id+"\x00"), tpm.EK...)
	}
	var blob []byte
	for {
		f, err := t.read()
		if err != nil {
			return err
		}
		var say amqp.Performative
		switch b := f.Body.(type) {
		case *amqp.SASLMechanisms:
			if !slices.Contains(b.Mechanisms, init.Mechanism) {
				return fmt.Errorf("the service does not take the SASL mechanism %s", init.Mechanism)
			}
			say = init
		case *amqp.SASLChallenge:
			if tpm == nil || len(b.Challenge) == 0 {
				return errors.New("the service's SASL challenge is not understood")
			}
			var response []byte
			response, blob, err = tpm.respond(ctx, b.Challenge, blob)
			if err != nil {
				return err
			}
			say = &amqp.SASLResponse{Response: append([]byte{0}, response...)}
		case *amqp.SASLOutcome:
			switch b.Code {
			case amqp.SASLOK:
				return nil
			case amqp.SASLAuth:
				return &RefusedError{Code: dps.CodeUnauthorized, Message: "the SASL layer refused the proof"}
			}
			return errBusy{fmt.Errorf("the SASL layer ended with code %d", b.Code), 3 * time.Second}
		default:
			return fmt.Errorf("the service answered %T in the SASL layer", b)
		}
		if err := t.write(amqp.AppendFrame(nil, 0, say, nil)); err != nil {
			return err
		}
	}
}

// respond answers one challenge: a zero octet asks for the storage root key; the others carry a segment of the blob behind
// a control octet with bit 7, bit 6 in the last one, and a number.
func (m *saslTPM) respond(ctx context.Context, challenge, blob []byte) (response, _ []byte, err error) {
	control := challenge[0]
	switch {
	case len(challenge) == 1 && control == 0 && blob == nil:
		return m.SRK, nil, nil
	case control&0x80 == 0 || len(challenge)+len(blob) > maxAnswer:
		return nil, nil, fmt.Errorf("the service's SASL challenge begins with %#x", control)
	}
	blob = append(blob, challenge[1:]...)
	if control&0x40 == 0 {
		return nil, blob, nil
	}
	token, err := m.Activate(ctx, blob)
	return []byte(token), blob, err
}

// attach opens connection, session and links in one flight, and waits until requests may be sent.
func (t *amqpTalker) attach(host string) error {
	address := t.stamp.IDScope + "/registrations/" + t.stamp.RegistrationID
	properties := amqp.Map{{Key: amqp.Symbol("com.microsoft:api-version"), Value: t.apiVersion}, {Key: amqp.Symbol("com.microsoft:client-version"), Value: "touchmark"}}
	zero, handle, credit := uint32(0), answers, uint32(100)
	var out []byte
	for _, p := range []amqp.Performative{
		&amqp.Open{ContainerID: t.stamp.RegistrationID, Hostname: host, MaxFrameSize: maxAnswer, ChannelMax: 0},
		&amqp.Begin{IncomingWindow: 1 << 16, OutgoingWindow: 1 << 16, HandleMax: requests},
		&amqp.Attach{Name: "answers", Handle: answers, Role: amqp.Receiver, Source: &amqp.Source{Address: address}, Target: &amqp.Target{}, Properties: properties},
		&amqp.Attach{Name: "requests", Handle: requests, Role: amqp.Sender, Source: &amqp.Source{}, Target: &amqp.Target{Address: address}, InitialDeliveryCount: &zero, Properties: properties},
		&amqp.Flow{NextIncomingID: &zero, IncomingWindow: 1 << 16, OutgoingWindow: 1 << 16, Handle: &handle, DeliveryCount: &zero, LinkCredit: &credit},
	} {
		out = amqp.AppendFrame(out, 0, p, nil)
	}
	if err := t.header(amqp.AMQP, out); err != nil {
		return err
	}
	for t.credit == 0 {
		if _, err := t.frame(); err != nil {
			return err
		}
	}
	return nil
}

// frame reads a frame, and takes in what it says about connection and links. An end of any of them is an error.
func (t *amqpTalker) frame() (amqp.Frame, error) {
	f, err := t.read()
	if err != nil {
		return f, err
	}
	switch b := f.Body.(type) {
	case *amqp.Open:
		t.maxFrame = max(t.maxFrame, min(b.MaxFrameSize, maxAnswer))
		if e, ok := b.Properties.Get(amqp.Symbol("com.microsoft:open-error")).(*amqp.Error); ok {
			return f, refusal(e, "open")
		}
		if b.IdleTimeout > 0 {
			t.keepAlive(max(time.Second, time.Duration(b.IdleTimeout)*time.Millisecond/3))
		}
	case *amqp.Flow:
		if b.Handle != nil && *b.Handle == requests && b.LinkCredit != nil {
			count := uint32(0)
			if b.DeliveryCount != nil {
				count = *b.DeliveryCount
			}
			t.credit = uint32(max(0, int32(count+*b.LinkCredit-t.next)))
		}
	case *amqp.Detach:
		return f, refusal(b.Error, "detach")
	case *amqp.End:
		return f, refusal(b.Error, "end")
	case *amqp.Close:
		return f, refusal(b.Error, "close")
	}
	return f, nil
}

func (t *amqpTalker) keepAlive(every time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.beat = time.AfterFunc(every, func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		if t.over {
			return
		}
		_ = t.conn.SetWriteDeadline(time.Now().Add(requestTime))
		if _, err := t.conn.Write(amqp.AppendFrame(nil, 0, nil, nil)); err == nil {
			t.beat.Reset(every)
		}
	})
}

func (t *amqpTalker) hush() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.over = true
	if t.beat != nil {
		t.beat.Stop()
	}
}

// refusal is an error of the wire as ours. Its description is the service's JSON document (device API, section 12.7).
func refusal(e *amqp.Error, by string) error {
	if e == nil {
		return fmt.Errorf("the service said %s: %w", by, io.ErrUnexpectedEOF)
	}
	status, known := map[amqp.Symbol]int{"amqp:unauthorized-access": 401, "amqp:not-found": 404, "com.microsoft:device-container-throttled": 429,
		"amqp:internal-error": 500, "amqp:connection:forced": 503}[e.Condition]
	if !known {
		status = 400
	}
	var doc struct {
		ErrorCode dps.Code `json:"errorCode"`
	}
	if json.Unmarshal([]byte(e.Description), &doc) == nil && status == 400 && doc.ErrorCode.Status()/100 == 4 {
		status = doc.ErrorCode.Status()
	}
	_, _, err := answer(status, []byte(e.Description), waitOf(e.Info.Get(amqp.Symbol("retry-after"))))
	return err
}

// waitOf reads a retry-after, which is an int.
func waitOf(v any) time.Duration {
	switch v := v.(type) {
	case int32:
		return hint(strconv.Itoa(int(v)))
	case string:
		return hint(v)
	}
	return hint("")
}

func (t *amqpTalker) request(ctx context.Context, properties amqp.Map, body []byte) (*dps.OperationStatus, time.Duration, error) {
	stop, err := t.within(ctx)
	defer stop()
	var m *amqp.Message
	if err == nil {
		m, err = t.exchange(properties, body)
	}
	if err != nil {
		return nil, 0, errors.Join(err, ctx.Err())
	}
	return answer(200, m.Data, waitOf(m.ApplicationProperties.Get("retry-after")))
}

// exchange sends a request, and returns its answer once it is accepted and the answer is there.
func (t *amqpTalker) exchange(properties amqp.Map, body []byte) (*amqp.Message, error) {
	for t.credit == 0 {
		if _, err := t.frame(); err != nil {
			return nil, err
		}
	}
	id := t.next
	t.next++
	t.credit--
	correlation := strconv.FormatUint(uint64(id), 10)
	payload := amqp.AppendMessage(nil, &amqp.Message{Properties: &amqp.Properties{MessageID: correlation, CorrelationID: correlation}, ApplicationProperties: properties, Data: body})
	var out []byte
	for begun := false; !begun || len(payload) > 0; begun = true {
		tr := &amqp.Transfer{Handle: requests}
		if !begun {
			tr.DeliveryID, tr.DeliveryTag, tr.MessageFormat = &id, binary.BigEndian.AppendUint32(nil, id), new(uint32)
		}
		chunk := payload[:min(len(payload), int(t.maxFrame)-64)]
		payload = payload[len(chunk):]
		tr.More = len(payload) > 0
		out = amqp.AppendFrame(out, 0, tr, chunk)
	}
	if err := t.write(out); err != nil {
		return nil, err
	}
	var message []byte
	var delivery uint32
	for accepted, whole := false, false; !accepted || !whole; {
		f, err := t.frame()
		if err != nil {
			return nil, err
		}
		switch b := f.Body.(type) {
		case *amqp.Disposition:
			if b.Role != amqp.Receiver || b.First != id {
				continue
			}
			switch s := b.State.(type) {
			case *amqp.Accepted:
				accepted = true
			case *amqp.Rejected:
				return nil, refusal(s.Error, "rejected")
			default:
				return nil, fmt.Errorf("the service answered a request with %T", s)
			}
		case *amqp.Transfer:
			if len(message)+len(f.Payload) > maxAnswer {
				return nil, errors.New("the service's answer is too large")
			}
			message = append(message, f.Payload...)
			if b.DeliveryID != nil {
				delivery = *b.DeliveryID
			}
			whole = !b.More
		}
	}
	m, err := amqp.DecodeMessage(message)
	if err == nil {
		err = t.write(amqp.AppendFrame(nil, 0, &amqp.Disposition{Role: amqp.Receiver, First: delivery, Settled: true, State: &amqp.Accepted{}}, nil))
	}
	if err == nil && (m.Properties == nil || m.Properties.CorrelationID != correlation) {
		err = errors.New("the service answered another request")
	}
	return m, err
}

func (t *amqpTalker) register(ctx context.Context, body []byte) (*dps.OperationStatus, time.Duration, error) {
	return t.request(ctx, amqp.Map{{Key: "iotdps-operation-type", Value: "iotdps-register"}}, body)
}

func (t *amqpTalker) status(ctx context.Context, operation string) (*dps.OperationStatus, time.Duration, error) {
	return t.request(ctx, amqp.Map{{Key: "iotdps-operation-type", Value: "iotdps-get-operationstatus"}, {Key: "iotdps-operation-id", Value: operation}}, nil)
}

func (t *amqpTalker) close() {
	t.hush()
	_ = t.write(amqp.AppendFrame(nil, 0, &amqp.Close{}, nil))
	_ = t.conn.Close()
}
