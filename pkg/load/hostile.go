package load

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/touchmark/touchmark/pkg/device"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/mqtt"
)

// A harm is one kind of hostile caller. It returns what was wrong with the answer, or why there was none.
type harm struct {
	kind string
	do   func(r *run, ctx context.Context, t *tribe, protocol string) (wrong string, err error)
}

// errSkip is a harm that cannot be done now.
var errSkip = errors.New("not now")

const (
	// hangUpTime is how long a service may take to hang up on who does not talk as a device does.
	hangUpTime   = time.Minute
	slowEvery    = 500 * time.Millisecond
	oversize     = 1 << 20
	foreignScope = "0neFFFFFFFF"
)

// harms are all kinds. Who shows a proof that is not good reads 401, and nothing else; who does not speak is hung up on.
func harms() []harm {
	return []harm{
		{"forged proof", func(r *run, ctx context.Context, t *tribe, protocol string) (string, error) {
			return r.mustRefuse(ctx, t.forged[mathrand.IntN(len(t.forged))], protocol, nil)
		}},
		{"foreign scope", func(r *run, ctx context.Context, t *tribe, protocol string) (string, error) {
			return r.mustRefuse(ctx, t.honest, protocol, func(c *device.Config) { c.Stamp.IDScope = foreignScope })
		}},
		{"expired token", func(r *run, ctx context.Context, t *tribe, protocol string) (string, error) {
			if !t.honest.device.Stamp.Symmetric {
				return "", errSkip
			}
			return r.mustRefuse(ctx, t.honest, protocol, func(c *device.Config) {
				c.Now = func() time.Time { return time.Now().Add(-26 * time.Hour) }
			})
		}},
		{"another's operation", func(r *run, ctx context.Context, t *tribe, protocol string) (string, error) {
			op := r.lastOp.Load()
			if op == nil {
				return "", errSkip
			}
			return r.mustNotFind(ctx, t.honest, protocol, *op)
		}},
		{"half-open", func(r *run, ctx context.Context, _ *tribe, protocol string) (string, error) {
			c, err := r.dial(ctx, r.cfg.Endpoints[protocol], nil, true)
			return hungUp(ctx, c, err, nil)
		}},
		{"garbage", func(r *run, ctx context.Context, _ *tribe, protocol string) (string, error) {
			c, err := r.dial(ctx, r.cfg.Endpoints[protocol], nil, true)
			return hungUp(ctx, c, err, once(garbage()))
		}},
		{"garbage in TLS", inTLS(func(string) writing { return once(garbage()) })},
		{"silent in TLS", inTLS(func(string) writing { return nil })},
		{"slow writer", inTLS(func(protocol string) writing {
			return func(ctx context.Context, c net.Conn) {
				tick := time.NewTicker(slowEvery)
				defer tick.Stop()
				for _, b := range opening(protocol) {
					select {
					case <-tick.C:
					case <-ctx.Done():
						return
					}
					if _, err := c.Write([]byte{b}); err != nil {
						return
					}
				}
			}
		})},
		{"oversize", inTLS(func(protocol string) writing { return once(oversized(protocol)) })},
	}
}

// harm is one hostile caller.
func (r *run) harm(ctx context.Context, t *tribe, protocol string) {
	all := r.ledger.harms
	for range all {
		h := all[r.attack.Add(1)%uint64(len(all))]
		wrong, err := h.do(r, ctx, t, protocol)
		if errors.Is(err, errSkip) {
			continue
		}
		if ctx.Err() == nil { // else we left
			r.ledger.harmed(h, protocol, wrong, err)
		}
		return
	}
}

// mustRefuse has a device register that must read 401.
func (r *run) mustRefuse(ctx context.Context, m *member, protocol string, edit func(*device.Config)) (string, error) {
	cfg := r.config(protocol, m, nil, true)
	if edit != nil {
		edit(&cfg)
	}
	ctx, cancel := context.WithTimeout(ctx, r.cfg.Timeout)
	defer cancel()
	state, err := device.Register(ctx, cfg)
	if err == nil {
		return fmt.Sprintf("became %q", state.Status), nil
	}
	return onlyStatus(err, dps.CodeUnauthorized.Status())
}

// putOff is how long a service that is asked too much has callers wait, and putOffs how often one comes back.
const (
	putOff  = 5 * time.Second
	putOffs = 3
)

// mustNotFind asks for an operation of another's, which must read 404. A service may put off who asks too much before it has
// looked at anything: "assigning", of which nobody learns anything, and the same again after the hint (device API, section 6.5).
func (r *run) mustNotFind(ctx context.Context, m *member, protocol, operation string) (string, error) {
	for range putOffs {
		st, err := device.Status(ctx, r.config(protocol, m, nil, true), operation)
		if err != nil {
			return onlyStatus(err, dps.CodeNotFound.Status())
		}
		s := st.RegistrationState
		told := s != nil && (s.RegistrationID != m.device.Stamp.RegistrationID || s.DeviceID != "" || s.AssignedHub != "" || s.CreatedDateTimeUTC != nil)
		if st.Status != dps.Assigning || told {
			return fmt.Sprintf("was told that it is %q", st.Status), nil
		}
		select {
		case <-time.After(putOff):
		case <-ctx.Done():
			return "", ctx.Err()
		}
	}
	return "", &device.BusyError{Code: dps.CodeThrottled, Message: "put off every time"}
}

// onlyStatus takes a refusal with one status as right, and being asked to come later. Everything else that is an answer is
// wrong.
func onlyStatus(err error, status int) (string, error) {
	var refused *device.RefusedError
	if errors.As(err, &refused) && refused.Code.Status() == status {
		return "", nil
	}
	var busy *device.BusyError
	kind, wrong := kindOf(err)
	switch {
	case errors.As(err, &busy) && busy.Code.Status() == dps.CodeThrottled.Status():
		return "", nil
	case wrong:
		return kind, nil
	}
	return "", err
}

// A writing is what a caller does while it waits to be hung up on.
type writing func(context.Context, net.Conn)

// once writes and waits. What the service does not take it need not.
func once(b []byte) writing {
	return func(_ context.Context, c net.Conn) { _, _ = c.Write(b) }
}

// inTLS writes where a device would speak its protocol.
func inTLS(what func(protocol string) writing) func(*run, context.Context, *tribe, string) (string, error) {
	return func(r *run, ctx context.Context, t *tribe, protocol string) (string, error) {
		c, err := device.Dial(ctx, r.config(protocol, &member{tls: r.cfg.shared}, nil, true))
		return hungUp(ctx, c, err, what(strings.TrimSuffix(protocol, "-ws")))
	}
}

// hungUp writes, and waits until the service ends the connection, without having said yes to anything.
func hungUp(ctx context.Context, c net.Conn, err error, write writing) (string, error) {
	if err != nil {
		return onlyStatus(err, dps.CodeThrottled.Status())
	}
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(ctx, func() { _ = c.Close() })
	defer func() {
		stop()
		cancel()
		_ = c.Close()
	}()
	if err := c.SetDeadline(time.Now().Add(hangUpTime)); err != nil {
		return "", err
	}
	if write != nil {
		done := make(chan struct{})
		go func() {
			write(ctx, c)
			close(done)
		}()
		defer func() {
			cancel()
			_ = c.Close()
			<-done
		}()
	}
	var got []byte
	buf := make([]byte, 1024)
	for {
		n, err := c.Read(buf)
		if got = append(got, buf[:n]...); len(got) > 64<<10 {
			return "more than 64 KiB", nil
		}
		if err == nil {
			continue
		}
		switch kind, _ := kindOf(err); {
		case ctx.Err() != nil:
			return "", ctx.Err()
		case bytes.Contains(got, []byte("operationId")), bytes.HasPrefix(got, []byte("HTTP/1.1 2")):
			return "was taken for a device", nil
		case errors.Is(err, io.EOF), kind == "hung up", kind == "tls":
			return "", nil
		case kind == "timeout", errors.Is(err, os.ErrDeadlineExceeded):
			return fmt.Sprintf("not hung up on within %v", hangUpTime), nil
		default:
			return "", err
		}
	}
}

// garbage is no beginning of a TLS record, of an HTTP request, or of any packet.
func garbage() []byte {
	b := make([]byte, 256)
	_, _ = rand.Read(b) // crypto/rand.Read never fails
	b[0] = 0xff
	return b
}

// opening is a device's first words, long enough that they take minutes when they are said slowly.
func opening(protocol string) []byte {
	switch protocol {
	case "https":
		return []byte("PUT /" + foreignScope + "/registrations/slow/register?api-version=2021-06-01 HTTP/1.1\r\nHost: slow\r\nX-Slow: " + strings.Repeat("slow", 100) + "\r\n\r\n")
	case "mqtt":
		return mqtt.AppendConnect(nil, "slow", strings.Repeat("slow", 100), nil, 60)
	}
	return slices.Concat([]byte("AMQP\x00\x01\x00\x00"), binary.BigEndian.AppendUint32(nil, 400), []byte{2, 0, 0, 0}, make([]byte, 400-8))
}

// oversized says that it is larger than any device's word, and begins.
func oversized(protocol string) []byte {
	begin := make([]byte, 32<<10)
	switch protocol {
	case "https":
		return append(fmt.Appendf(nil, "PUT /%s/registrations/large/register?api-version=2021-06-01 HTTP/1.1\r\nHost: large\r\nContent-Length: %d\r\n\r\n", foreignScope, oversize), begin...)
	case "mqtt":
		return append([]byte{byte(mqtt.Connect) << 4, 0x80, 0x80, 0x40}, begin...) // 1 MiB, MQTT 3.1.1 §2.2.3
	}
	return slices.Concat([]byte("AMQP\x00\x01\x00\x00"), binary.BigEndian.AppendUint32(nil, oversize), []byte{2, 0, 0, 0}, begin)
}
