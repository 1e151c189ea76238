package hub

import (
	"bufio"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"time"

	"github.com/touchmark/touchmark/pkg/mqtt"
	"github.com/touchmark/touchmark/pkg/registration"
)

// Where the dynamic security plugin takes commands and answers them.
const (
	controlTopic  = "$CONTROL/dynamic-security/v1"
	responseTopic = controlTopic + "/response"
)

const (
	maxBroker = 256 << 10
	keepAlive = 60 // seconds; the broker hangs up after one and a half of them
	// idle is how long a connection may wait before it is asked whether it still stands.
	idle = time.Second
)

// A broker holds the connection on which the plugin is given commands, one after the other. It is one only: the plugin sends every
// answer to all who have subscribed to answers, and does one thing at a time anyway.
type broker struct {
	name    string
	conn    *Connection
	dialer  net.Dialer
	timeout time.Duration
	now     func() time.Time
	free    chan *session // of one; nil is one that is yet to be made
}

// A session is a connection that has subscribed to the plugin's answers.
type session struct {
	net.Conn
	r    *bufio.Reader
	used time.Time
}

func newBroker(cfg Config, conn *Connection) *broker {
	b := &broker{name: cfg.Hub.Name, conn: conn, timeout: cfg.Timeout, now: cfg.Now, free: make(chan *session, 1),
		dialer: net.Dialer{Timeout: cfg.ConnectTimeout, Control: addresses{conn.Plain, cfg.PublicOnly}.control}}
	b.free <- nil
	return b
}

// Close hangs up. It waits for calls that run, and none may come after it.
func (b *broker) Close() error {
	s := <-b.free
	if s == nil {
		return nil
	}
	s.SetDeadline(time.Now().Add(time.Second))
	s.Write(mqtt.AppendDisconnect(nil)) // to a broker that may be gone
	s.Conn.Close()
	return nil
}

// A command is one of the plugin's, and its answer.
type command struct {
	Command     string `json:"command"`
	Correlation string `json:"correlationData"`
	Username    string `json:"username,omitempty"`
	ClientID    string `json:"clientid,omitempty"`
	Password    string `json:"password,omitempty"`
	Name        string `json:"textname,omitempty"`
	Description string `json:"textdescription,omitempty"`
	RoleName    string `json:"rolename,omitempty"`
	Roles       []role `json:"roles,omitzero"`
	ACLs        []acl  `json:"acls,omitempty"`
}

type role struct {
	Name     string `json:"rolename"`
	Priority int    `json:"priority,omitempty"`
}

type acl struct {
	Type     string `json:"acltype"`
	Topic    string `json:"topic,omitempty"`
	Priority int    `json:"priority,omitempty"`
	Allow    bool   `json:"allow"`
}

// result is the plugin's answer to a command; untrusted.
type result struct {
	Command     string          `json:"command"`
	Correlation string          `json:"correlationData"`
	Error       string          `json:"error"`
	Data        json.RawMessage `json:"data"`
}

// run has the plugin do commands, in their order; one that fails stops none behind it. It fails where there was no answer; what the
// plugin says of each command is in the results.
func (b *broker) run(ctx context.Context, doing string, commands ...command) ([]result, error) {
	ctx, cancel := context.WithTimeout(ctx, b.timeout)
	defer cancel()
	var s *session
	select {
	case s = <-b.free:
	case <-ctx.Done():
		return nil, noAnswer(b.name, doing+": waiting for a connection", ctx.Err())
	}
	s, results, err := b.converse(ctx, s, commands)
	if err != nil && s != nil {
		s.Conn.Close() // an answer may still come that is not the next one's
		s = nil
	}
	b.free <- s
	if refused, ok := errors.AsType[*refusedError](err); ok {
		return nil, newError(b.name, refused.code, refused.temporary, &whileDoing{doing, err})
	}
	if err != nil {
		if ctx.Err() != nil {
			err = ctx.Err() // the deadline of the connection says less
		}
		return nil, noAnswer(b.name, doing, err)
	}
	return results, nil
}

// refusedError is a broker that answered, and does not do as we ask.
type refusedError struct {
	code, text string
	temporary  bool
}

func (e *refusedError) Error() string { return e.text }

// converse runs the commands on the session, or on a new one if that is gone. It is sent only once: nobody knows what was done of
// commands that got no answer.
func (b *broker) converse(ctx context.Context, s *session, commands []command) (*session, []result, error) {
	if s != nil {
		defer s.guard(ctx)()
		if b.now().Sub(s.used) > idle && s.ping() != nil {
			s.Conn.Close()
			s = nil
		}
	}
	if s == nil {
		var err error
		if s, err = b.open(ctx); err != nil {
			return nil, nil, err
		}
		defer s.guard(ctx)()
	}
	results, err := s.exchange(commands)
	s.used = b.now()
	return s, results, err
}

// guard has reads and writes end with the context, until it is called off.
func (s *session) guard(ctx context.Context) (off func()) {
	deadline, _ := ctx.Deadline()
	s.SetDeadline(deadline)
	stop := context.AfterFunc(ctx, func() { s.SetDeadline(time.Unix(1, 0)) })
	return func() { stop() }
}

func (b *broker) open(ctx context.Context) (*session, error) {
	address := net.JoinHostPort(b.conn.Host, strconv.Itoa(b.conn.Port))
	var c net.Conn
	var err error
	if b.conn.Plain {
		c, err = b.dialer.DialContext(ctx, "tcp", address)
	} else {
		d := tls.Dialer{NetDialer: &b.dialer, Config: &tls.Config{RootCAs: b.conn.roots, Certificates: b.conn.certs, MinVersion: tls.VersionTLS12}}
		c, err = d.DialContext(ctx, "tcp", address)
	}
	if err != nil {
		return nil, err
	}
	s := &session{Conn: c, r: bufio.NewReader(c)}
	defer s.guard(ctx)()
	if err := s.begin(b.conn); err != nil {
		c.Close()
		return nil, err
	}
	return s, nil
}

// begin connects, and subscribes to the answers.
func (s *session) begin(conn *Connection) error {
	var password []byte
	if conn.password != "" {
		password = []byte(conn.password)
	}
	if _, err := s.Write(mqtt.AppendConnect(nil, "touchmark-"+rand.Text()[:12], conn.User, password, keepAlive)); err != nil {
		return err
	}
	p, err := s.await(mqtt.Connack)
	if err != nil {
		return err
	}
	switch p.ReturnCode {
	case 0:
	case 3: // §3.2.2.3
		return &refusedError{"ServerUnavailable", "the broker is not available", true}
	case 4, 5:
		return &refusedError{"Unauthorized", "the broker refuses our credentials", false}
	default:
		return &refusedError{"ConnectionRefused", fmt.Sprintf("the broker refuses the connection: return code %d", p.ReturnCode), false}
	}
	if _, err := s.Write(mqtt.AppendSubscribe(nil, 1, responseTopic, 0)); err != nil {
		return err
	}
	if p, err = s.await(mqtt.Suback); err != nil {
		return err
	}
	if p.ID != 1 || len(p.Codes) != 1 || p.Codes[0] != 0 {
		return &refusedError{"Unauthorized", "the broker does not let us subscribe to " + responseTopic, false}
	}
	return nil
}

// await reads packets until one of that type comes.
func (s *session) await(want mqtt.Type) (*mqtt.Packet, error) {
	for {
		p, err := mqtt.Read(s.r, maxBroker)
		if err != nil {
			return nil, err
		}
		if p.Type == want {
			return p, nil
		}
	}
}

// ping asks whether the broker is still there.
func (s *session) ping() error {
	if _, err := s.Write([]byte{byte(mqtt.Pingreq) << 4, 0}); err != nil {
		return err
	}
	_, err := s.await(mqtt.Pingresp)
	return err
}

func (s *session) exchange(commands []command) ([]result, error) {
	correlation := rand.Text()
	for i := range commands {
		commands[i].Correlation = correlation
	}
	body, err := json.Marshal(struct {
		Commands []command `json:"commands"`
	}{commands})
	if err != nil {
		return nil, err
	}
	// At QoS 0: the answer says that it came, and behind a PUBACK of its own it would wait for TCP's delayed acknowledgement.
	if _, err := s.Write(mqtt.AppendPublish(nil, controlTopic, 0, 0, body)); err != nil {
		return nil, err
	}
	for {
		p, err := s.await(mqtt.Publish)
		if err != nil {
			return nil, err
		}
		if p.Topic != responseTopic {
			continue
		}
		results, err := parseResults(p.Payload, commands)
		if err != nil {
			return nil, &refusedError{codeInvalid, err.Error(), false}
		}
		if results != nil {
			return results, nil
		}
	}
}

// parseResults reads the plugin's answers to commands, or nil if they are those to somebody else's.
func parseResults(payload []byte, commands []command) ([]result, error) {
	var all struct {
		Responses []result `json:"responses"`
	}
	if err := decode(payload, &all, false); err != nil {
		return nil, fmt.Errorf("the plugin's answer: %w", err)
	}
	ours := func(r result) bool { return r.Correlation == commands[0].Correlation }
	if !slices.ContainsFunc(all.Responses, ours) {
		return nil, nil
	}
	if len(all.Responses) != len(commands) {
		return nil, fmt.Errorf("the plugin answers %d commands, not %d", len(all.Responses), len(commands))
	}
	for i, r := range all.Responses {
		if !ours(r) || r.Command != commands[i].Command {
			return nil, fmt.Errorf("the plugin answers another command than %s", commands[i].Command)
		}
	}
	return all.Responses, nil
}

// failed is the error of a command that the plugin did not do.
func (b *broker) failed(doing string, r result) error {
	temporary := r.Error == "Internal error" || r.Error == "Out of memory"
	return &registration.HubError{Hub: b.name, Code: "DynamicSecurity", Temporary: temporary, Err: fmt.Errorf("%s: %s: %s", doing, r.Command, said(r.Error))}
}
