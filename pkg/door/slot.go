package door

import (
	"net"
	"net/netip"
	"sync"
	"time"
)

// slot is an accepted connection below its TLS. It is counted out once, when it closes.
type slot struct {
	net.Conn
	d      *Door
	remote net.Addr
	head   []byte // read already

	mu     sync.Mutex
	from   netip.Prefix
	taken  bool // counted by address
	closed bool

	computing bool // the handshake is under way; only its goroutine looks

	// The pace of what comes in: below TLS, so that a record that trickles in is seen too.
	paced    bool
	fresh    bool      // nothing came yet
	began    time.Time // the wait for the first octet; then the packet
	octets   int       // of the packet
	packet   bool      // the handler has some of them
	deadline time.Time // the handler's
	armed    time.Time // the one that is set
}

// admit counts the connection by its address.
func (s *slot) admit() bool {
	n := network(addressOf(s.remote))
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || !s.d.callers.take(n) {
		return false
	}
	s.from, s.taken = n, true
	return true
}

// RemoteAddr is the caller's address, whoever brought it.
func (s *slot) RemoteAddr() net.Addr { return s.remote }

func (s *slot) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		s.closed = true
		if s.taken {
			s.d.callers.give(s.from)
		}
		s.d.open.Add(-1)
		<-s.d.slots
	}
	return s.Conn.Close()
}

// compute takes one of the places of handshakes that compute, or gives it back. While a handshake waits for its caller it has
// none: silent callers keep nobody waiting.
func (s *slot) compute(yes bool) {
	if s.computing = yes; yes {
		s.d.computing <- struct{}{}
	} else {
		<-s.d.computing
	}
}

func (s *slot) Read(b []byte) (int, error) {
	if len(s.head) > 0 {
		n := copy(b, s.head)
		if s.head = s.head[n:]; len(s.head) == 0 {
			s.head = nil
		}
		return n, nil
	}
	if s.computing {
		s.compute(false)
		defer s.compute(true)
		return s.Conn.Read(b)
	}
	s.mu.Lock()
	err := s.arm()
	s.mu.Unlock()
	if err != nil {
		return 0, err
	}
	n, err := s.Conn.Read(b)
	if n > 0 {
		s.mu.Lock()
		if s.fresh = false; s.octets == 0 && s.paced {
			s.began = time.Now()
		}
		s.octets += n
		s.mu.Unlock()
	}
	return n, err
}

// pace begins a conversation.
func (s *slot) pace() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.paced, s.fresh, s.began, s.octets = true, true, time.Now(), 0
}

// spoken says that the handler has something of what it waits for.
func (s *slot) spoken() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fresh, s.packet = false, true
}

// aside counts the octets anew where they were not the packet's.
func (s *slot) aside() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.packet {
		s.octets = 0
	}
}

// SetReadDeadline sets the handler's deadline. What comes from now on is the next packet.
func (s *slot) SetReadDeadline(t time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.deadline, s.octets, s.packet = t, 0, false
	return s.arm()
}

func (s *slot) SetDeadline(t time.Time) error {
	if err := s.SetReadDeadline(t); err != nil {
		return err
	}
	return s.SetWriteDeadline(t)
}

// arm sets the nearer of the two deadlines, the handler's and the pace's. The caller holds mu.
func (s *slot) arm() error {
	t := s.deadline
	var pace time.Time
	switch {
	case s.paced && s.fresh:
		pace = s.began.Add(s.d.cfg.FirstOctet)
	case s.paced && s.octets > 0:
		pace = s.began.Add(s.d.cfg.Slack + time.Duration(s.octets)*time.Second/time.Duration(s.d.cfg.MinRate))
	}
	if !pace.IsZero() && (t.IsZero() || pace.Before(t)) {
		t = pace
	}
	if t.Equal(s.armed) {
		return nil
	}
	s.armed = t
	return s.Conn.SetReadDeadline(t)
}
