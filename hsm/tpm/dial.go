package tpm

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/google/go-tpm/tpm2/transport"

	"github.com/touchmark/touchmark/hsm"
)

const (
	// commandTimeout bounds one command. A discrete TPM may search for RSA primes for a minute.
	commandTimeout = 3 * time.Minute
	// grace is how long a command that is under way may still take once nobody waits for it: cut off, it would leave
	// behind what it loaded.
	grace       = 5 * time.Second
	dialTimeout = 10 * time.Second
	// maxResponse bounds a response, in octets: TPM_PT_MAX_RESPONSE_SIZE is 4096 in the TPMs there are.
	maxResponse = 64 << 10
	headerSize  = 10 // tag, size, code (TPM 2.0 Part 1, 18.2)
)

// conn carries one command at a time. An error of Send means that the connection is of no more use.
type conn interface {
	Send(ctx context.Context, command []byte) ([]byte, error)
	Close() error
}

// dial connects to the TPM at an address of the forms that hsm.URI.Device has.
func dial(ctx context.Context, address string) (conn, error) {
	kind, rest, _ := strings.Cut(address, ":")
	d := net.Dialer{Timeout: dialTimeout}
	switch kind {
	case "unix", "tcp":
		c, err := d.DialContext(ctx, kind, rest)
		if err != nil {
			return nil, err
		}
		return &stream{c: c}, nil
	case "mssim":
		return dialSimulator(ctx, d, rest)
	}
	t, err := openDevice(address)
	if err != nil {
		return nil, err
	}
	return &node{t}, nil
}

// node is a device node of the kernel.
type node struct{ transport.TPMCloser }

// Send does not look at ctx: the kernel has a time limit of its own for each command.
func (n *node) Send(_ context.Context, command []byte) ([]byte, error) {
	return n.TPMCloser.Send(command)
}

// stream is a socket with bare TPM commands and responses.
type stream struct{ c net.Conn }

func (s *stream) Close() error { return s.c.Close() }

func (s *stream) Send(ctx context.Context, command []byte) ([]byte, error) {
	defer limit(ctx, s.c)()
	if _, err := s.c.Write(command); err != nil {
		return nil, err
	}
	return readResponse(s.c)
}

// limit gives one command its time on a connection.
func limit(ctx context.Context, c net.Conn) (stop func() bool) {
	_ = c.SetDeadline(time.Now().Add(commandTimeout))
	return context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Now().Add(grace)) })
}

// readResponse reads one response by the size in its header.
func readResponse(r io.Reader) ([]byte, error) {
	header := make([]byte, headerSize)
	if _, err := io.ReadFull(r, header); err != nil {
		return nil, err
	}
	size := binary.BigEndian.Uint32(header[2:])
	if size < headerSize || size > maxResponse {
		return nil, fmt.Errorf("the response says that it has %d octets: this is no TPM", size)
	}
	response := make([]byte, size)
	copy(response, header)
	_, err := io.ReadFull(r, response[headerSize:])
	return response, err
}

// simulator speaks the protocol of Microsoft's reference simulator (TpmTcpProtocol.h): commands on one port, power on the
// next.
type simulator struct{ command, platform net.Conn }

const (
	simPowerOn     = 1
	simSendCommand = 8
	simNVOn        = 11
	simSessionEnd  = 20
)

func dialSimulator(ctx context.Context, d net.Dialer, address string) (_ conn, err error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return nil, err
	}
	s := &simulator{}
	defer func() {
		if err != nil {
			_ = s.Close()
		}
	}()
	if s.command, err = d.DialContext(ctx, "tcp", address); err != nil {
		return nil, err
	}
	if s.platform, err = d.DialContext(ctx, "tcp", net.JoinHostPort(host, strconv.FormatUint(n+1, 10))); err != nil {
		return nil, fmt.Errorf("platform port: %w", err)
	}
	defer limit(ctx, s.platform)()
	for _, signal := range []uint32{simPowerOn, simNVOn} { // no more than a nod where it is on already
		if err := binary.Write(s.platform, binary.BigEndian, signal); err != nil {
			return nil, err
		}
		var answer uint32
		if err := binary.Read(s.platform, binary.BigEndian, &answer); err != nil {
			return nil, err
		}
		if answer != 0 {
			return nil, fmt.Errorf("the simulator answers %d to signal %d", answer, signal)
		}
	}
	return s, nil
}

func (s *simulator) Send(ctx context.Context, command []byte) ([]byte, error) {
	defer limit(ctx, s.command)()
	b := binary.BigEndian.AppendUint32(nil, simSendCommand)
	b = append(b, 0) // locality
	b = binary.BigEndian.AppendUint32(b, uint32(len(command)))
	if _, err := s.command.Write(append(b, command...)); err != nil {
		return nil, err
	}
	var size, end uint32
	if err := binary.Read(s.command, binary.BigEndian, &size); err != nil {
		return nil, err
	}
	if size < headerSize || size > maxResponse {
		return nil, fmt.Errorf("the response says that it has %d octets", size)
	}
	response := make([]byte, size)
	if _, err := io.ReadFull(s.command, response); err != nil {
		return nil, err
	}
	if err := binary.Read(s.command, binary.BigEndian, &end); err != nil {
		return nil, err
	}
	if end != 0 {
		return nil, fmt.Errorf("the simulator ends the command with %d", end)
	}
	return response, nil
}

func (s *simulator) Close() (err error) {
	for _, c := range []net.Conn{s.command, s.platform} {
		if c != nil {
			// Said goodbye to, the simulator takes the next caller at once.
			_ = c.SetDeadline(time.Now().Add(time.Second))
			_ = binary.Write(c, binary.BigEndian, uint32(simSessionEnd))
			err = errors.Join(err, c.Close())
		}
	}
	return err
}

// managed reports whether a resource manager stands before the TPM, so that each connection has its transient objects to
// itself.
func managed(address string) bool { return strings.HasPrefix(address, "/dev/tpmrm") }

// DefaultDevice is where the TPM is looked for when a URI does not say: the kernel's resource manager.
const DefaultDevice = "/dev/tpmrm0"

func addressOf(u hsm.URI) string {
	if u.Device == "" {
		return DefaultDevice
	}
	return u.Device
}
