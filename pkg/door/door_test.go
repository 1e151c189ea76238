package door_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/door"
)

const host = "dps.example.net"

// running is a door behind which lines are echoed, with the caller's address before them.
type running struct {
	*door.Door
	addr  string
	roots *x509.CertPool
	stop  context.CancelFunc
	ended chan error
}

func open(t testing.TB, cfg door.Config, handle door.Handler) *running {
	t.Helper()
	server := attesttest.Leaf(t, nil, host)
	if cfg.TLS == nil {
		cfg.TLS = door.TLSConfig(func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return server.TLS(), nil })
	}
	if handle == nil {
		handle = echo
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	r := &running{door.New(cfg), l.Addr().String(), x509.NewCertPool(), stop, make(chan error, 1)}
	r.roots.AddCert(server.Certificate)
	go func() { r.ended <- r.Serve(ctx, l, handle) }()
	t.Cleanup(func() {
		stop()
		if err := <-r.ended; err != nil {
			t.Errorf("serving: %v", err)
		}
		r.ended <- nil // for a test that waited itself
	})
	return r
}

func echo(_ context.Context, c *door.Conn) error {
	r := bufio.NewReader(c)
	for {
		if err := c.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
			return err
		}
		line, err := r.ReadString('\n')
		if err != nil {
			return err
		}
		if _, err := io.WriteString(c, c.Remote+" "+line); err != nil {
			return err
		}
	}
}

// raw connects without TLS, and writes what comes first.
func (r *running) raw(t testing.TB, first string) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", r.addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(30 * time.Second))
	if _, err := io.WriteString(c, first); err != nil {
		t.Fatal(err)
	}
	return c
}

func (r *running) over(c net.Conn) *tls.Conn {
	return tls.Client(c, &tls.Config{RootCAs: r.roots, ServerName: host, Time: func() time.Time { return attesttest.Now }})
}

func say(t testing.TB, c net.Conn, line string) (remote string) {
	t.Helper()
	if _, err := io.WriteString(c, line+"\n"); err != nil {
		t.Fatal(err)
	}
	answer, err := bufio.NewReader(c).ReadString('\n')
	remote, back, _ := strings.Cut(strings.TrimSuffix(answer, "\n"), " ")
	if err != nil || back != line {
		t.Fatalf("%q, %v", answer, err)
	}
	return remote
}

// gone waits until the other side has hung up.
func gone(t testing.TB, c net.Conn, why string) {
	t.Helper()
	if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%s: still there", why)
	}
}

// One address has so many connections, and no more; those that it closes count no longer.
func TestPerAddress(t *testing.T) {
	r := open(t, door.Config{MaxPerAddress: 2}, nil)
	a, b := r.over(r.raw(t, "")), r.over(r.raw(t, ""))
	say(t, a, "a")
	say(t, b, "b")
	gone(t, r.raw(t, ""), "a third connection")
	_ = a.Close()
	for { // the door learns of it by and by
		c := r.over(r.raw(t, ""))
		if c.Handshake() == nil {
			say(t, c, "c")
			return
		}
	}
}

// Nobody may come back as often as they like, though they close what they opened.
func TestNewPerSecond(t *testing.T) {
	r := open(t, door.Config{MaxPerAddress: 3, NewPerSecond: 1e-6}, nil)
	for range 3 {
		c := r.over(r.raw(t, ""))
		say(t, c, "hello")
		_ = c.Close()
	}
	gone(t, r.raw(t, ""), "a fourth within hours")
}

// An address of IPv6 counts with its /64, and one of IPv4 is the same however it is written.
func TestCallers(t *testing.T) {
	d := door.New(door.Config{MaxPerAddress: 1, NewPerSecond: 1000})
	admit := func(remote string) func() {
		release, _ := d.Admit(remote)
		return release
	}
	first := admit("[2001:db8::1]:5")
	if first == nil || admit("[2001:db8::ffff]:6") != nil || admit("2001:db8::2") != nil {
		t.Error("one /64 counts as several")
	}
	if admit("[2001:db8:0:1::1]:5") == nil {
		t.Error("two /64 count as one")
	}
	first()
	first() // once is enough
	if admit("[2001:db8::2]:5") == nil || admit("[2001:db8::2]:5") != nil {
		t.Error("a place that was given back is not there, or there twice")
	}
	if admit("192.0.2.1:1") == nil || admit("192.0.2.2:1") == nil || admit("[::ffff:192.0.2.1]:1") != nil || admit("192.0.2.1:2") != nil {
		t.Error("IPv4")
	}
	// Where an address is none, all such are one.
	if admit("") == nil || admit("@") != nil {
		t.Error("no address")
	}
}

// When all places are taken the next one waits for one, and is served then.
func TestAllPlaces(t *testing.T) {
	r := open(t, door.Config{MaxConnections: 1}, nil)
	a := r.over(r.raw(t, ""))
	say(t, a, "a")
	b := r.over(r.raw(t, ""))
	done := make(chan error, 1)
	go func() { done <- b.Handshake() }()
	select {
	case err := <-done:
		t.Fatalf("a second one got in: %v", err)
	default:
	}
	say(t, a, "still here")
	_ = a.Close()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	say(t, b, "b")
}

// Whoever is being answered when the service stops gets the answer; whoever waits is let go; nobody comes in any more.
func TestDrain(t *testing.T) {
	asked, answer := make(chan struct{}), make(chan struct{})
	r := open(t, door.Config{}, func(_ context.Context, c *door.Conn) error {
		line, err := bufio.NewReader(c).ReadString('\n')
		if err != nil {
			return err
		}
		close(asked)
		<-answer
		_, err = io.WriteString(c, line)
		if serr := c.SetReadDeadline(time.Now().Add(time.Hour)); !errors.Is(serr, net.ErrClosed) {
			return fmt.Errorf("a new deadline while the service stops: %v", serr)
		}
		return err
	})
	idle, busy, shaking := r.over(r.raw(t, "")), r.over(r.raw(t, "")), r.raw(t, "\x16")
	if err := idle.Handshake(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(busy, "answer me\n"); err != nil {
		t.Fatal(err)
	}
	<-asked
	r.stop()
	gone(t, idle, "who waited")
	gone(t, shaking, "in the handshake")
	select {
	case err := <-r.ended:
		t.Fatalf("it ended before everybody was answered: %v", err)
	default:
	}
	close(answer)
	if b, err := io.ReadAll(busy); err != nil || string(b) != "answer me\n" {
		t.Errorf("%q, %v", b, err)
	}
	if err := <-r.ended; err != nil {
		t.Error(err)
	}
	r.ended <- nil
	late, other := net.Pipe()
	defer other.Close()
	r.Handle(t.Context(), &door.Conn{Conn: late}, func(context.Context, *door.Conn) error {
		t.Error("somebody was taken in after the end")
		return nil
	})
}

// So many handshakes compute at once, and no more, however many come; those that wait for their callers take nobody's turn;
// and who has come in is served meanwhile.
func TestHandshakeFlood(t *testing.T) {
	server := attesttest.Leaf(t, nil, host)
	var now, most atomic.Int64
	r := open(t, door.Config{MaxHandshakes: 1, TLS: door.TLSConfig(func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
		if n := now.Add(1); n > most.Load() {
			most.Store(n)
		}
		for range 100 {
			runtime.Gosched()
		}
		now.Add(-1)
		return server.TLS(), nil
	})}, nil)
	r.roots.AddCert(server.Certificate)
	served := r.over(r.raw(t, ""))
	say(t, served, "in")
	// These have begun, and leave the rest open: the hello alone, and all but the end.
	for range 8 {
		half := r.raw(t, "\x16\x03\x01\x02\x00\x01")
		c := r.over(&muteAfter{Conn: r.raw(t, ""), writes: 1})
		go func() { _ = c.Handshake() }()
		defer half.Close()
	}
	var wg sync.WaitGroup
	for range 64 {
		c := r.over(r.raw(t, ""))
		wg.Go(func() {
			if err := c.Handshake(); err != nil {
				t.Errorf("an honest handshake in the flood: %v", err)
			}
			_ = c.Close()
		})
		say(t, served, "still served")
	}
	wg.Wait()
	if most.Load() != 1 {
		t.Errorf("%d handshakes computed at once", most.Load())
	}
}

// muteAfter swallows what is written after so many writes.
type muteAfter struct {
	net.Conn
	writes int
}

func (m *muteAfter) Write(b []byte) (int, error) {
	if m.writes--; m.writes < 0 {
		return len(b), nil
	}
	return m.Conn.Write(b)
}

// A handshake that is not done in time ends, whether its caller says nothing, a part, or octet after octet.
func TestHandshakeTime(t *testing.T) {
	r := open(t, door.Config{HandshakeTimeout: 200 * time.Millisecond, MaxConnections: 3, Proxies: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}}, nil)
	gone(t, r.raw(t, ""), "silent")
	gone(t, r.raw(t, "\x16\x03\x01"), "a part")
	trickle(t, r.raw(t, ""), "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"+strings.Repeat("x", 500), 20*time.Millisecond)
	proxied := open(t, door.Config{HandshakeTimeout: 200 * time.Millisecond, Proxies: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}}, nil)
	gone(t, proxied.raw(t, ""), "a silent proxy")
	trickle(t, proxied.raw(t, ""), proxyHeader(0x21, 0x11, 1<<11, "")+strings.Repeat("\x04", 1<<11), 20*time.Millisecond)
	say(t, r.over(r.raw(t, "")), "and all places are free again")
}

// trickle sends octet by octet until it is hung up on, which must be long before the end.
func trickle(t testing.TB, c net.Conn, text string, every time.Duration) {
	t.Helper()
	cut := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, c)
		close(cut)
	}()
	tick := time.NewTicker(every)
	defer tick.Stop()
	for i := range len(text) {
		select {
		case <-cut:
			return
		case <-tick.C:
			_, _ = io.WriteString(c, text[i:i+1])
		}
	}
	t.Error("a whole message could be trickled in")
}

// Whoever says nothing behind the handshake is let go, though the handler would wait.
func TestFirstOctet(t *testing.T) {
	r := open(t, door.Config{FirstOctet: 100 * time.Millisecond}, nil)
	c := r.over(r.raw(t, ""))
	if err := c.Handshake(); err != nil {
		t.Fatal(err)
	}
	gone(t, c, "silent behind the handshake")
}

// Silence between lines is the handler's affair; inside a line it is not, nor inside a record of TLS.
func TestTrickle(t *testing.T) {
	const slack = 300 * time.Millisecond
	r := open(t, door.Config{FirstOctet: slack, Slack: slack, MinRate: 1 << 20}, nil)
	c := r.over(r.raw(t, ""))
	for range 3 { // longer than the slack, in all and each
		say(t, c, "a poll")
		<-time.After(slack + slack/3)
	}
	say(t, c, "after a while")
	trickle(t, c, strings.Repeat("x", 500), 20*time.Millisecond)

	// Below TLS: a record of which octets come one by one gives the handler nothing to see.
	tap := &tapped{Conn: r.raw(t, "")}
	c = r.over(tap)
	say(t, c, "hello")
	tap.hold = true
	if _, err := io.WriteString(c, strings.Repeat("x", 500)+"\n"); err != nil {
		t.Fatal(err)
	}
	trickle(t, tap.Conn, tap.held.String(), 20*time.Millisecond)
}

// A long line at a slow, steady rate may take longer than the slack.
func TestSlowAndSteady(t *testing.T) {
	r := open(t, door.Config{Slack: 500 * time.Millisecond, MinRate: 100}, nil)
	c := r.over(r.raw(t, ""))
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for range 20 {
		if _, err := io.WriteString(c, strings.Repeat("y", 60)); err != nil {
			t.Fatal(err)
		}
		<-tick.C
	}
	if _, err := io.WriteString(c, "\n"); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(c).ReadString('\n'); err != nil || strings.Count(line, "y") != 1200 {
		t.Errorf("%q, %v", line, err)
	}
}

// A conversation brings in so much, and no more, in whatever lines.
func TestMaxOctets(t *testing.T) {
	r := open(t, door.Config{MaxOctets: 1000}, nil)
	c := r.over(r.raw(t, ""))
	for range 9 {
		say(t, c, strings.Repeat("x", 99))
	}
	for range 2 {
		_, _ = io.WriteString(c, strings.Repeat("x", 99)+"\n")
	}
	if b, err := io.ReadAll(c); errors.Is(err, os.ErrDeadlineExceeded) || bytes.Count(b, []byte("\n")) > 1 {
		t.Errorf("%d octets came back, %v", len(b), err)
	}
}

// lines is a log that can be waited for.
type lines struct {
	mu   sync.Mutex
	text bytes.Buffer
	more chan struct{}
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.more != nil {
		close(l.more)
		l.more = nil
	}
	return l.text.Write(b)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

func (l *lines) await(t testing.TB, what string) {
	t.Helper()
	timeout := time.After(30 * time.Second)
	for {
		l.mu.Lock()
		if strings.Contains(l.text.String(), what) {
			l.mu.Unlock()
			return
		}
		if l.more == nil {
			l.more = make(chan struct{})
		}
		more := l.more
		l.mu.Unlock()
		select {
		case <-more:
		case <-timeout:
			t.Fatalf("the log never said %q:\n%s", what, l)
		}
	}
}

// tapped keeps what is written, once it holds.
type tapped struct {
	net.Conn
	hold bool
	held bytes.Buffer
}

func (c *tapped) Write(b []byte) (int, error) {
	if c.hold {
		return c.held.Write(b)
	}
	return c.Conn.Write(b)
}

// A handler that panics ends its own conversation and nobody else's, and is in the log with its stack.
func TestPanic(t *testing.T) {
	var log bytes.Buffer
	r := open(t, door.Config{Log: slog.New(slog.NewTextHandler(&log, nil))}, func(ctx context.Context, c *door.Conn) error {
		b := make([]byte, 1)
		if _, err := c.Read(b); err == nil && b[0] == '!' {
			panic("not this one")
		}
		_, err := c.Write(b)
		return err
	})
	bad, good := r.over(r.raw(t, "")), r.over(r.raw(t, ""))
	if _, err := io.WriteString(bad, "!"); err != nil {
		t.Fatal(err)
	}
	gone(t, bad, "behind a panic")
	if _, err := io.WriteString(good, "."); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(good); err != nil || string(b) != "." {
		t.Errorf("%q, %v", b, err)
	}
	r.stop()
	if err := <-r.ended; err != nil { // not before everybody has gone
		t.Error(err)
	}
	r.ended <- nil
	if s := log.String(); !strings.Contains(s, "level=ERROR") || !strings.Contains(s, "not this one") || !strings.Contains(s, "door_test.TestPanic") {
		t.Error(s)
	}
}
