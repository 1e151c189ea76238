package door

import (
	"net"
	"net/netip"
	"slices"
	"sync"

	"golang.org/x/time/rate"
)

// idleCallers is how many addresses without a connection are remembered, for the rate at which they come back.
const idleCallers = 50_000

// callers counts connections by address. An address that has none is remembered as long as there is room.
type callers struct {
	most      int
	perSecond rate.Limit
	room      int

	mu sync.Mutex
	by map[netip.Prefix]*caller
}

type caller struct {
	open   int
	bucket *rate.Limiter
}

// network is what counts as one caller: whoever has one address of IPv6 has its /64.
func network(a netip.Addr) netip.Prefix {
	bits := 32
	if a = a.Unmap(); a.Is6() {
		bits = 64
	}
	p, _ := a.WithZone("").Prefix(bits) // no address is one caller too
	return p
}

// take counts a connection in, unless the caller has too many or comes too often.
func (c *callers) take(n netip.Prefix) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	x := c.by[n]
	if x == nil {
		if len(c.by) >= c.room {
			c.forget()
		}
		x = &caller{bucket: rate.NewLimiter(c.perSecond, c.most+int(c.perSecond))}
		c.by[n] = x
	}
	if x.open >= c.most || !x.bucket.Allow() {
		return false
	}
	x.open++
	return true
}

// give counts it out.
func (c *callers) give(n netip.Prefix) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.by[n].open--
}

// forget makes room: of a few addresses, those that have no connection go.
func (c *callers) forget() {
	few := 16
	for n, x := range c.by {
		if x.open == 0 {
			delete(c.by, n)
		}
		if few--; few == 0 && len(c.by) < c.room {
			return
		}
	}
}

// Admit counts a caller of that address (HOST:PORT) in beside the connections, unless there are too many or they come too
// often. It is for callers behind proxies that many share a connection of. Release counts it out.
func (d *Door) Admit(remote string) (release func(), ok bool) {
	n := network(parseAddress(remote))
	if !d.callers.take(n) {
		return nil, false
	}
	return sync.OnceFunc(func() { d.callers.give(n) }), true
}

// Trusts reports whether the address (HOST, or HOST:PORT) is a trusted proxy's.
func (d *Door) Trusts(address string) bool { return d.trusts(parseAddress(address)) }

// EndsTLS reports whether the address (HOST, or HOST:PORT) is that of a trusted proxy that ends TLS.
func (d *Door) EndsTLS(address string) bool { return within(d.cfg.TLSProxies, parseAddress(address)) }

func (d *Door) trusts(a netip.Addr) bool {
	return within(d.cfg.Proxies, a) || within(d.cfg.TLSProxies, a)
}

func within(networks []netip.Prefix, a netip.Addr) bool {
	return slices.ContainsFunc(networks, func(p netip.Prefix) bool { return p.Contains(a) })
}

// parseAddress returns no address for what is none.
func parseAddress(s string) netip.Addr {
	if p, err := netip.ParseAddrPort(s); err == nil {
		return p.Addr().Unmap().WithZone("")
	}
	a, _ := netip.ParseAddr(s)
	return a.Unmap().WithZone("")
}

func addressOf(a net.Addr) netip.Addr { return parseAddress(a.String()) }
