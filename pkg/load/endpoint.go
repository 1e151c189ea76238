package load

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"
)

// ErrNotLoopback is an endpoint that is not, or not only, this machine.
var ErrNotLoopback = errors.New("it is not this machine alone")

// An Endpoint is an address that was looked up once. What connects to it connects to what was found then, whatever the name
// means later.
type Endpoint struct {
	name  string
	addrs []netip.AddrPort
	last  atomic.Int32 // index of the address that answered last
}

// Resolve looks HOST:PORT up. Unless it may be anywhere, all of its addresses must be loopback: [ErrNotLoopback] where one is
// not.
func Resolve(ctx context.Context, name string, anywhere bool) (*Endpoint, error) {
	host, port, err := net.SplitHostPort(name)
	if err != nil {
		return nil, fmt.Errorf("endpoint %q: %w", name, err)
	}
	number, err := net.DefaultResolver.LookupPort(ctx, "tcp", port)
	if err != nil {
		return nil, fmt.Errorf("endpoint %q: %w", name, err)
	}
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, err
	}
	e := &Endpoint{name: name}
	for _, a := range addrs {
		a = a.Unmap()
		if !anywhere && !a.IsLoopback() {
			return nil, fmt.Errorf("endpoint %s is %s: %w", name, a, ErrNotLoopback)
		}
		e.addrs = append(e.addrs, netip.AddrPortFrom(a, uint16(number)))
	}
	return e, nil
}

// String returns the name as it was given.
func (e *Endpoint) String() string { return e.name }

// Dial connects to one of the addresses that were found, from local where that is not nil.
func (e *Endpoint) Dial(ctx context.Context, local net.Addr) (net.Conn, error) {
	d := net.Dialer{LocalAddr: local}
	var first error
	begin := int(e.last.Load())
	for i := range e.addrs {
		i = (begin + i) % len(e.addrs)
		c, err := d.DialContext(ctx, "tcp", e.addrs[i].String())
		if err == nil {
			e.last.Store(int32(i))
			return c, nil
		}
		if first == nil {
			first = err
		}
		if ctx.Err() != nil {
			break
		}
	}
	return nil, first
}
