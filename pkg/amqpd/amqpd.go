// Package amqpd is the AMQP 1.0 door: one device per connection, which sends its requests on one link and has its answers on
// another (device API, section 12). It is no broker: a link leads to the registration service and nowhere else.
//
// A connection is served by one goroutine, in the order of its frames; a timer beside it keeps it alive for peers that ask
// for that.
package amqpd

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/touchmark/touchmark/pkg/amqp"
	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/door"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
)

// A Hub takes over the connections of services that send to devices: their SDK takes no port, so a hub on the same machine
// answers at the same door.
type Hub interface {
	// OwnsHost reports whether a connection that was opened for this host, and has shown nothing of who it is, is for the hub.
	OwnsHost(host string) bool
	// ServeAMQP holds the conversation behind the open, which was read already; more may be in the reader. The connection is closed
	// when it returns.
	ServeAMQP(ctx context.Context, c *door.Conn, r *bufio.Reader, open *amqp.Open) error
}

// Config is what a server needs.
type Config struct {
	// Hub has its services at this door too; nil for none.
	Hub       Hub
	Registrar registration.Registrar
	// Protocol is the door's name in records; empty means "amqp".
	Protocol string
	Log      *slog.Logger
	Now      func() time.Time
	// ResponseDelay is how long a response waits behind its disposition: one SDK loses what comes sooner (device API, section
	// 12.6). Zero means 60 ms, a negative value none.
	ResponseDelay time.Duration
	// Second is the length of the second by which times are counted; zero means a second. Tests have shorter ones.
	Second time.Duration
}

// Limits of a conversation, in seconds where they are times.
const (
	handshakeTime    = 30 // for the SASL layer, and again for what follows up to open
	tpmTime          = 90 // for a SASL layer with a TPM: one SDK looks at its token every 4 s, and waits for it for a minute
	conversationTime = 600
	silence          = 240 // half of it is announced as idle-time-out
	lingerTime       = 3   // after a refusal
	answerTime       = 30  // for the registrar
	writeTime        = 10
	minIdle          = 1000 // milliseconds: a shorter idle-time-out would be more work than talk

	maxSASL    = 4 << 10 // more than the standard's 512: tokens of long names do not fit these
	maxOpen    = 8 << 10 // from somebody who has not said much yet
	maxFrame   = 64 << 10
	maxMessage = 128 << 10
	maxChannel = 1
	maxHandle  = 7 // in each session
	maxHeld    = 8 // answers that wait for a link, credit or window
	credit     = 50
	window     = 2048
)

// Conditions of errors (part 2, §2.8.15 to 2.8.18, and Azure's own: device API, section 12.7).
const (
	unauthorized  amqp.Symbol = "amqp:unauthorized-access"
	notFound      amqp.Symbol = "amqp:not-found"
	notAllowed    amqp.Symbol = "amqp:not-allowed"
	invalidField  amqp.Symbol = "amqp:invalid-field"
	decodeError   amqp.Symbol = "amqp:decode-error"
	internalError amqp.Symbol = "amqp:internal-error"
	limitExceeded amqp.Symbol = "amqp:resource-limit-exceeded"
	framingError  amqp.Symbol = "amqp:connection:framing-error"
	forced        amqp.Symbol = "amqp:connection:forced"
	handleInUse   amqp.Symbol = "amqp:session:handle-in-use"
	unattached    amqp.Symbol = "amqp:session:unattached-handle"
	overSize      amqp.Symbol = "amqp:link:message-size-exceeded"
	argumentError amqp.Symbol = "com.microsoft:argument-error"
	throttled     amqp.Symbol = "com.microsoft:device-container-throttled"
	openError     amqp.Symbol = "com.microsoft:open-error"
)

// Server is the AMQP door.
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
		cfg.Protocol = "amqp"
	}
	return &Server{cfg}
}

// Handle holds the conversation of one device. It is a [door.Handler].
func (s *Server) Handle(ctx context.Context, dc *door.Conn) error {
	c := &conn{Conn: dc, s: s, r: bufio.NewReaderSize(dc, 1024), maxFrame: amqp.MinMaxFrameSize}
	c.req = registration.Request{Protocol: s.cfg.Protocol, Remote: dc.Remote, Proof: attest.Proof{Certificates: dc.Certificates}}
	defer c.hush()
	return c.end(c.serve(ctx))
}

// conn is one device's conversation.
type conn struct {
	*door.Conn
	s *Server
	r *bufio.Reader

	req      registration.Request // who the device says it is
	known    bool                 // req has the names: from SASL, or from the first link of a certificate's holder
	until    time.Time            // the end of the whole conversation, or of its present part
	opened   bool                 // our open is written
	maxFrame uint32               // the peer's
	sessions [maxChannel + 1]*session
	out      []byte // what is written and not flushed

	mu   sync.Mutex // for writing to the connection
	beat *time.Timer
	over bool // no more beats
}

// A failure is a peer's breach of the protocol that ends the connection, or the session that it is returned for.
type failure struct {
	condition amqp.Symbol
	text      string
}

func (f *failure) Error() string { return string(f.condition) + ": " + f.text }

func fail(condition amqp.Symbol, text string) error { return &failure{condition, text} }

// errRefused ends a conversation with what is written, and errClosed one that is closed already.
var (
	errRefused = errors.New("device was refused")
	errClosed  = errors.New("device was refused, and has had its close")
)

func malformed(err error) bool {
	return errors.Is(err, amqp.ErrMalformed) || errors.Is(err, amqp.ErrTooLarge)
}

// describe makes an error of the wire: its description is the JSON document (device API, section 12.8).
func describe(condition amqp.Symbol, e *dps.Error) *amqp.Error {
	return &amqp.Error{Condition: condition, Description: string(dps.NewReply(nil, e).Body)}
}

func breach(f *failure) *amqp.Error {
	return describe(f.condition, dps.NewError(dps.CodeBadRequest, f.text, nil))
}

// write queues a frame. Frames that follow from what came in one piece leave in one piece: flush is called before anything
// is waited for.
func (c *conn) write(channel uint16, body amqp.Performative, payload []byte) error {
	start := len(c.out)
	c.out = amqp.AppendFrame(c.out, channel, body, payload)
	if size := len(c.out) - start; uint32(size) > c.maxFrame {
		c.out = c.out[:start]
		return fail(limitExceeded, fmt.Sprintf("An answer of %d octets is larger than the frames that the device takes", size))
	}
	return nil
}

func (c *conn) flush() error {
	if len(c.out) == 0 {
		return nil
	}
	err := c.send(c.out)
	if c.out = c.out[:0]; cap(c.out) > 2048 {
		c.out = nil
	}
	return err
}

func (c *conn) send(b []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.put(b)
}

func (c *conn) put(b []byte) error {
	if err := c.SetWriteDeadline(time.Now().Add(writeTime * c.s.cfg.Second)); err != nil {
		return err
	}
	_, err := c.Write(b)
	// TLS and WebSockets answer by themselves while we read, at any time until the end.
	return errors.Join(err, c.SetWriteDeadline(time.Now().Add(conversationTime*c.s.cfg.Second)))
}

// await flushes, unless the next frame is there already, and sets how long it may take.
func (c *conn) await() error {
	if head, _ := c.r.Peek(min(c.r.Buffered(), 4)); len(head) < 4 || binary.BigEndian.Uint32(head) > uint32(c.r.Buffered()) {
		if err := c.flush(); err != nil {
			return err
		}
	}
	deadline := c.until
	if quiet := time.Now().Add(silence * c.s.cfg.Second); quiet.Before(deadline) {
		deadline = quiet
	}
	return c.SetReadDeadline(deadline)
}

func (c *conn) read(limit uint32) (amqp.Frame, error) {
	if err := c.await(); err != nil {
		return amqp.Frame{}, err
	}
	return amqp.ReadFrame(c.r, limit)
}

// working is for a request that is being worked on: the context's end must not cut it off, drain waits for it.
func (c *conn) working(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), answerTime*c.s.cfg.Second)
}

// within bounds what comes next.
func (c *conn) within(seconds time.Duration) { c.until = time.Now().Add(seconds * c.s.cfg.Second) }

// linger ends the conversation soon.
func (c *conn) linger() {
	if d := time.Now().Add(lingerTime * c.s.cfg.Second); d.Before(c.until) {
		c.until = d
	}
}

// keepAlive has empty frames written well before the peer's idle-time-out, whatever else is written (part 2, §2.4.5).
func (c *conn) keepAlive(every time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.beat = time.AfterFunc(every, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.over {
			return
		}
		if c.put(amqp.AppendFrame(nil, 0, nil, nil)) != nil {
			_ = c.Close() // which wakes the reader
			return
		}
		c.beat.Reset(every)
	})
}

func (c *conn) hush() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.over = true
	if c.beat != nil {
		c.beat.Stop()
	}
}

// end tells the peer why the conversation is over, as far as it can still be told.
func (c *conn) end(err error) error {
	var f *failure
	switch {
	case errors.As(err, &f):
	case errors.Is(err, amqp.ErrMalformed):
		f = &failure{decodeError, "A frame is malformed"}
	case errors.Is(err, amqp.ErrTooLarge):
		f = &failure{framingError, "A frame is too large"}
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, net.ErrClosed):
		f = &failure{forced, "The time for this conversation is over"}
	case err == nil, errors.Is(err, errRefused), errors.Is(err, amqp.ErrHeader):
		if ferr := c.flush(); ferr != nil || err == nil {
			return ferr
		}
		c.drain()
		return err
	default:
		return err // nobody is there, or is to be told
	}
	if c.opened {
		return errors.Join(err, c.shut(breach(f)))
	}
	return err
}

// shut writes a close, and waits a moment for the peer's.
func (c *conn) shut(e *amqp.Error) error {
	if err := errors.Join(c.write(0, &amqp.Close{Error: e}, nil), c.flush()); err != nil {
		return err
	}
	c.drain()
	return nil
}

// drain reads what the peer still says, for a moment, up to its close: a connection closed on unread input could take what
// was just written with it.
func (c *conn) drain() {
	c.within(lingerTime)
	if c.await() != nil {
		return
	}
	for c.opened {
		f, err := amqp.ReadFrame(c.r, maxFrame)
		if err != nil {
			break
		}
		if _, ok := f.Body.(*amqp.Close); ok {
			return
		}
	}
	_, _ = io.Copy(io.Discard, c.r)
}

func (c *conn) serve(ctx context.Context) error {
	c.within(handshakeTime)
	p, err := c.header(amqp.SASL)
	if err != nil {
		return err
	}
	if p == amqp.SASL {
		if err := c.sasl(ctx); err != nil {
			return err
		}
		c.within(handshakeTime)
		if p, err = c.header(amqp.AMQP); err == nil && p != amqp.AMQP {
			c.out = amqp.AppendHeader(c.out, amqp.AMQP)
			return errRefused
		}
		if err != nil {
			return err
		}
	}
	c.out = amqp.AppendHeader(c.out, amqp.AMQP)
	if other, err := c.open(); err != nil {
		return err
	} else if other != nil {
		return c.s.cfg.Hub.ServeAMQP(ctx, c.Conn, c.r, other)
	}
	c.within(conversationTime)
	for {
		f, err := c.read(maxFrame)
		if err != nil {
			return err
		}
		if done, err := c.frame(ctx, f); done || err != nil {
			return err
		}
	}
}

// header reads a protocol header; an unknown one is answered with the one that would do.
func (c *conn) header(wanted amqp.Protocol) (amqp.Protocol, error) {
	if err := errors.Join(c.flush(), c.SetReadDeadline(c.until)); err != nil {
		return 0, err
	}
	p, err := amqp.ReadHeader(c.r)
	if errors.Is(err, amqp.ErrHeader) {
		c.out = amqp.AppendHeader(c.out, wanted)
	}
	return p, err
}

// open exchanges opens. Who has shown nothing of who it is learns here that it is refused (device API, section 12.8), or is for
// the hub: then its open is returned.
func (c *conn) open() (other *amqp.Open, err error) {
	f, err := c.read(maxOpen)
	if err != nil && !malformed(err) {
		return nil, err
	}
	in, ok := f.Body.(*amqp.Open)
	if ok && c.s.cfg.Hub != nil && len(c.req.Proof.Certificates) == 0 && c.req.Proof.Token == "" && c.s.cfg.Hub.OwnsHost(in.Hostname) {
		return in, c.flush()
	}
	return nil, c.answerOpen(in, err)
}

// answerOpen answers an open; nil is none, for which err may say why.
func (c *conn) answerOpen(in *amqp.Open, err error) error {
	ok := in != nil
	out := &amqp.Open{ContainerID: "touchmark", MaxFrameSize: maxFrame, ChannelMax: maxChannel, IdleTimeout: silence * 1000 / 2}
	if ok && in.MaxFrameSize >= amqp.MinMaxFrameSize {
		c.maxFrame = in.MaxFrameSize
	}
	var refusal *amqp.Error
	if len(c.req.Proof.Certificates) == 0 && c.req.Proof.Token == "" {
		refusal = describe(unauthorized, dps.NewError(dps.CodeUnauthorized, "Unauthorized", nil))
		out.Properties = amqp.Map{{Key: openError, Value: refusal}}
	}
	if err := c.write(0, out, nil); err != nil {
		return err
	}
	c.opened = true
	switch {
	case err != nil:
		return err
	case !ok:
		return fail(notAllowed, "A connection begins with open")
	case in.MaxFrameSize < amqp.MinMaxFrameSize:
		return fail(invalidField, "max-frame-size is less than 512")
	case refusal != nil:
		_ = c.shut(refusal)
		return errClosed
	case in.IdleTimeout == 0:
		return nil
	case in.IdleTimeout < minIdle:
		return fail(notAllowed, "idle-time-out is less than a second")
	}
	c.keepAlive(time.Duration(in.IdleTimeout) * c.s.cfg.Second / 1000 / 3)
	return nil
}

// A session is one session. Our channel and our handles have the peer's numbers.
type session struct {
	channel    uint16
	ended      bool // by us; the peer's end is waited for
	links      []*link
	nextIn     uint32 // the next transfer's ID
	window     uint32 // transfers that may come
	nextOut    uint32
	peerWindow uint32
	deliveries uint32 // the next delivery's ID, ours
	replies    *link  // where answers go
	held       []answer
}

// A link is one link of a session.
type link struct {
	handle   uint32
	sending  bool // our role
	detached bool // by us; the peer's detach is waited for
	settled  bool // the peer wants what we send settled
	credit   uint32
	count    uint32 // delivery-count
	partial  []byte // of a delivery that has more to come
	delivery uint32 // its ID
	more     bool
	settles  bool // the delivery comes settled
}

// An answer is a message on its way to the device.
type answer struct {
	message []byte
	begun   bool
}

func (s *session) link(handle uint32) *link {
	for _, l := range s.links {
		if l.handle == handle {
			return l
		}
	}
	return nil
}

// frame answers one frame; done ends the conversation.
func (c *conn) frame(ctx context.Context, f amqp.Frame) (done bool, err error) {
	if f.SASL {
		return true, fail(framingError, "A SASL frame came behind the SASL layer")
	}
	switch b := f.Body.(type) {
	case nil:
		return false, nil
	case *amqp.Open:
		return true, fail(notAllowed, "open came again")
	case *amqp.Close:
		return true, c.write(0, &amqp.Close{}, nil)
	case *amqp.Begin:
		return false, c.begin(f.Channel, b)
	}
	if f.Channel > maxChannel || c.sessions[f.Channel] == nil {
		return true, fail(notAllowed, fmt.Sprintf("There is no session on channel %d", f.Channel))
	}
	s := c.sessions[f.Channel]
	if _, ok := f.Body.(*amqp.End); ok {
		c.sessions[f.Channel] = nil
		if s.ended {
			return false, nil
		}
		return false, c.write(s.channel, &amqp.End{}, nil)
	}
	if s.ended {
		return false, nil // the peer has not seen our end yet
	}
	switch b := f.Body.(type) {
	case *amqp.Attach:
		err = c.attach(s, b)
	case *amqp.Flow:
		err = c.flow(s, b)
	case *amqp.Transfer:
		err = c.transfer(ctx, s, b, f.Payload)
	case *amqp.Disposition:
		err = c.disposition(s, b)
	case *amqp.Detach:
		err = c.detach(s, b)
	}
	var broken *failure
	if errors.As(err, &broken) && strings.HasPrefix(string(broken.condition), "amqp:session:") {
		*s = session{channel: s.channel, ended: true}
		err = c.write(s.channel, &amqp.End{Error: breach(broken)}, nil)
	}
	return err != nil, err
}

func (c *conn) begin(channel uint16, b *amqp.Begin) error {
	if channel > maxChannel {
		return fail(framingError, fmt.Sprintf("Channel %d is beyond channel-max", channel))
	}
	if c.sessions[channel] != nil || b.RemoteChannel != nil {
		return fail(notAllowed, fmt.Sprintf("Channel %d has a session, or answers one that was not begun", channel))
	}
	c.sessions[channel] = &session{channel: channel, nextIn: b.NextOutgoingID, window: window, peerWindow: b.IncomingWindow}
	return c.write(channel, &amqp.Begin{RemoteChannel: &channel, IncomingWindow: window, OutgoingWindow: window, HandleMax: maxHandle}, nil)
}

func (c *conn) attach(s *session, a *amqp.Attach) error {
	if a.Handle > maxHandle {
		return fail(framingError, fmt.Sprintf("Handle %d is beyond handle-max", a.Handle))
	}
	if s.link(a.Handle) != nil {
		return fail(handleInUse, fmt.Sprintf("Handle %d is attached", a.Handle))
	}
	l := &link{handle: a.Handle, sending: a.Role == amqp.Receiver, settled: a.SndSettleMode == amqp.SendSettled}
	s.links = append(s.links, l)
	// Answered with receiver-settle-mode first whatever was asked for: one SDK asks for second and takes first.
	out := &amqp.Attach{Name: a.Name, Handle: a.Handle, Role: !a.Role, SndSettleMode: a.SndSettleMode, Source: a.Source, Target: a.Target, MaxMessageSize: maxMessage}
	var address any
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
	if !c.own(address) {
		if l.sending {
			out.Source = nil
		} else {
			out.Target = nil
		}
		return errors.Join(c.write(s.channel, out, nil), c.refuse(s, l, describe(unauthorized, dps.NewError(dps.CodeUnauthorized, "Unauthorized", nil))))
	}
	if v, ok := a.Properties.Get(amqp.Symbol("com.microsoft:api-version")).(string); ok && dps.CheckAPIVersion(v) == nil {
		c.req.APIVersion = v
	}
	if v, ok := a.Properties.Get(amqp.Symbol("com.microsoft:client-version")).(string); ok && len(v) <= 1024 {
		c.req.ClientVersion = v
	}
	if err := c.write(s.channel, out, nil); err != nil {
		return err
	}
	if l.sending {
		s.replies = l
		return nil
	}
	l.credit = credit
	return c.tell(s, l, false)
}

// own reports whether a link's address is the device's own, which for a certificate's holder is the one that it names first.
func (c *conn) own(address any) bool {
	text, _ := address.(string)
	scope, id, ok := parseAddress(normalise(text))
	if ok && !c.known {
		c.req.IDScope, c.req.RegistrationID, c.known = strings.Clone(scope), strings.Clone(id), true // and not all that stood before them
	}
	return ok && dps.Fold(scope) == dps.Fold(c.req.IDScope) && dps.Fold(id) == dps.Fold(c.req.RegistrationID)
}

// normalise drops what SDKs put before an address: scheme and authority, or a slash (device API, section 12.5).
func normalise(address string) string {
	if scheme, rest, ok := strings.Cut(address, "://"); ok && !strings.Contains(scheme, "/") {
		_, address, _ = strings.Cut(rest, "/")
		return address
	}
	return strings.TrimPrefix(address, "/")
}

// parseAddress reads {idScope}/registrations/{registrationId}.
func parseAddress(s string) (scope, id string, ok bool) {
	parts := strings.SplitN(s, "/", 4)
	if len(s) > 1024 || len(parts) != 3 || !strings.EqualFold(parts[1], "registrations") || parts[0] == "" || parts[2] == "" {
		return "", "", false
	}
	return parts[0], parts[2], true
}

// refuse detaches a link.
func (c *conn) refuse(s *session, l *link, e *amqp.Error) error {
	l.detached, l.partial, l.more = true, nil, false
	return c.write(s.channel, &amqp.Detach{Handle: l.handle, Closed: true, Error: e}, nil)
}

// tell writes a flow: the session's windows, and a link's credit unless it is nil.
func (c *conn) tell(s *session, l *link, drained bool) error {
	f := &amqp.Flow{NextIncomingID: &s.nextIn, IncomingWindow: s.window, NextOutgoingID: s.nextOut, OutgoingWindow: window}
	if l != nil {
		f.Handle, f.DeliveryCount, f.LinkCredit, f.Drain = &l.handle, &l.count, &l.credit, drained
	}
	return c.write(s.channel, f, nil)
}

func (c *conn) flow(s *session, f *amqp.Flow) error {
	seen := uint32(0)
	if f.NextIncomingID != nil {
		seen = *f.NextIncomingID
	}
	s.peerWindow = left(seen, f.IncomingWindow, s.nextOut) // part 2, §2.5.6
	var l *link
	if f.Handle != nil {
		if l = s.link(*f.Handle); l == nil {
			return fail(unattached, fmt.Sprintf("Handle %d is not attached", *f.Handle))
		}
		if l.detached {
			return nil
		}
		if l.sending && f.LinkCredit != nil {
			seen = 0
			if f.DeliveryCount != nil {
				seen = *f.DeliveryCount
			}
			l.credit = left(seen, *f.LinkCredit, l.count) // part 2, §2.6.7
		}
	}
	if err := c.answer(s); err != nil {
		return err
	}
	if l != nil && l.sending && f.Drain {
		l.count, l.credit = l.count+l.credit, 0
		return c.tell(s, l, true)
	}
	if f.Echo {
		return c.tell(s, l, false)
	}
	return nil
}

// left returns how much of a window, or of credit, there is: granted when the peer had seen so much, of what is at now.
func left(seen, granted, now uint32) uint32 {
	ahead := int64(int32(now - seen)) // what is on its way; nobody can have seen more than there was
	return uint32(max(int64(granted)-max(ahead, 0), 0))
}

func (c *conn) disposition(s *session, d *amqp.Disposition) error {
	if d.Role != amqp.Receiver || d.Settled {
		return nil // about what we settled already, or ends a delivery of ours, of which nothing is kept
	}
	return c.write(s.channel, &amqp.Disposition{Role: amqp.Sender, First: d.First, Last: d.Last, Settled: true, State: d.State}, nil)
}

func (c *conn) detach(s *session, d *amqp.Detach) error {
	for i, l := range s.links {
		if l.handle != d.Handle {
			continue
		}
		s.links = append(s.links[:i:i], s.links[i+1:]...)
		if s.replies == l {
			s.replies = nil
			if len(s.held) > 0 && s.held[0].begun {
				s.held = s.held[1:]
			}
		}
		if l.detached {
			return nil
		}
		return c.write(s.channel, &amqp.Detach{Handle: l.handle, Closed: d.Closed}, nil)
	}
	return fail(unattached, fmt.Sprintf("Handle %d is not attached", d.Handle))
}
