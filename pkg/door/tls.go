package door

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ocsp"
)

// TLSConfig is how devices are met on every door: TLS 1.2 and 1.3, a client certificate asked for and not required, with
// an empty list of authorities and no judgement in the handshake (device API, sections 7.2 and 14). Version 1.2 has the
// suites that encrypt and authenticate in one. Key exchange is the library's choice, hybrid first. Sessions are not resumed,
// unless [Tickets] say so.
func TLSConfig(certificate func(*tls.ClientHelloInfo) (*tls.Certificate, error), alpn ...string) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12, GetCertificate: certificate, ClientAuth: tls.RequestClientCert, NextProtos: alpn, SessionTicketsDisabled: true,
		CipherSuites: []uint16{
			tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
			tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
			tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256, tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
		},
	}
}

// A Pair names PEM files with a certificate chain, leaf first, and its private key.
type Pair struct{ Certificate, Key string }

// CertificatesConfig says where certificates are.
type CertificatesConfig struct {
	// Pairs are at least one; several are of different kinds of key, as a rule.
	Pairs []Pair
	// OCSP are files with responses in DER, each for one of the certificates.
	OCSP []string
	Log  *slog.Logger
	Now  func() time.Time
}

// Certificates are read from files, and read again when the files change: a handshake looks at them, once a second at most.
// Files that do not fit together are left alone, and what was served before goes on being served. They are for many
// goroutines.
type Certificates struct {
	cfg     CertificatesConfig
	current atomic.Pointer[[]*served]

	mu     sync.Mutex
	looked time.Time
	seen   []os.FileInfo // the files as they were read, or tried
}

// served is a certificate with its staple.
type served struct {
	bare, stapled *tls.Certificate // stapled is nil without
	until         time.Time        // stapled is good for
	late          atomic.Bool      // that it is no longer was logged
}

const (
	lookEvery    = time.Second
	maxPEM       = 1 << 20
	maxOCSP      = 64 << 10
	ocspLeadTime = time.Minute // clients' clocks
)

// LoadCertificates reads the files.
func LoadCertificates(cfg CertificatesConfig) (*Certificates, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	c := &Certificates{cfg: cfg}
	c.looked, c.seen = cfg.Now(), c.look()
	return c, c.read()
}

// Get is for tls.Config.GetCertificate. It prefers ECDSA where the client can, and a certificate of the name that it asks for.
func (c *Certificates) Get(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	if c.mu.TryLock() {
		if now := c.cfg.Now(); now.Sub(c.looked) >= lookEvery {
			c.refresh(now, false)
		}
		c.mu.Unlock()
	}
	all := *c.current.Load()
	best := all[0]
	nameless := *hello
	nameless.ServerName = ""
choice:
	for _, h := range []*tls.ClientHelloInfo{hello, &nameless} {
		for _, s := range all {
			if h.SupportsCertificate(s.bare) == nil {
				best = s
				break choice
			}
		}
	}
	return c.staple(best), nil
}

func (c *Certificates) staple(s *served) *tls.Certificate {
	if s.stapled == nil {
		return s.bare
	}
	if c.cfg.Now().Before(s.until) {
		return s.stapled
	}
	if !s.late.Swap(true) {
		c.cfg.Log.Warn("the OCSP response is past its next update and no longer stapled", "certificate", s.bare.Leaf.Subject.String(), "nextUpdate", s.until)
	}
	return s.bare
}

// Reload reads the files whether they have changed or not.
func (c *Certificates) Reload() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.refresh(c.cfg.Now(), true)
}

func (c *Certificates) refresh(now time.Time, anyway bool) {
	c.looked = now
	seen := c.look()
	same := slices.EqualFunc(seen, c.seen, func(a, b os.FileInfo) bool {
		if a == nil || b == nil {
			return a == b
		}
		return os.SameFile(a, b) && a.ModTime().Equal(b.ModTime()) && a.Size() == b.Size()
	})
	if same && !anyway {
		return
	}
	c.seen = seen
	if err := c.read(); err != nil {
		c.cfg.Log.Error("the TLS certificate stays the one before", "cause", err)
		return
	}
	c.cfg.Log.Info("the TLS certificate was read anew")
}

// look returns the files' states; nil for one that is not there.
func (c *Certificates) look() []os.FileInfo {
	var all []os.FileInfo
	add := func(name string) {
		info, err := os.Stat(name)
		if err != nil {
			info = nil
		}
		all = append(all, info)
	}
	for _, p := range c.cfg.Pairs {
		add(p.Certificate)
		add(p.Key)
	}
	for _, name := range c.cfg.OCSP {
		add(name)
	}
	return all
}

func (c *Certificates) read() error {
	all := make([]*served, len(c.cfg.Pairs))
	for i, p := range c.cfg.Pairs {
		chain, err := readFile(p.Certificate, maxPEM)
		if err != nil {
			return err
		}
		key, err := readFile(p.Key, maxPEM)
		if err != nil {
			return err
		}
		pair, err := tls.X509KeyPair(chain, key)
		clear(key)
		if err != nil {
			return fmt.Errorf("certificate %s and key %s: %w", p.Certificate, p.Key, err)
		}
		all[i] = &served{bare: &pair}
	}
	for _, name := range c.cfg.OCSP {
		// A staple is a courtesy: nothing is refused for want of one.
		if err := c.readOCSP(name, all); err != nil {
			c.cfg.Log.Error("an OCSP response is not stapled", "file", name, "cause", err)
		}
	}
	// ECDSA is chosen where the client can do both.
	slices.SortStableFunc(all, func(a, b *served) int { return rank(a) - rank(b) })
	c.current.Store(&all)
	return nil
}

func rank(s *served) int {
	if _, ok := s.bare.Leaf.PublicKey.(*ecdsa.PublicKey); ok {
		return 0
	}
	return 1
}

// readOCSP finds the certificate that a response is for.
func (c *Certificates) readOCSP(name string, all []*served) error {
	der, err := readFile(name, maxOCSP)
	if err != nil {
		return err
	}
	for _, s := range all {
		var issuer *x509.Certificate
		if len(s.bare.Certificate) > 1 {
			if issuer, err = x509.ParseCertificate(s.bare.Certificate[1]); err != nil {
				return err
			}
		}
		r, err := ocsp.ParseResponseForCert(der, s.bare.Leaf, issuer)
		if err != nil {
			if len(all) == 1 {
				return err
			}
			continue
		}
		now := c.cfg.Now()
		switch {
		case r.Status != ocsp.Good:
			return errors.New("it does not say that the certificate is good")
		case r.ThisUpdate.After(now.Add(ocspLeadTime)):
			return fmt.Errorf("it is good from %s on", r.ThisUpdate)
		case !r.NextUpdate.After(now):
			return fmt.Errorf("it was to be updated by %s", r.NextUpdate) // or it does not say by when
		}
		stapled := *s.bare
		stapled.OCSPStaple = der
		s.stapled, s.until = &stapled, r.NextUpdate
		return nil
	}
	return errors.New("it is for no certificate that is served")
}

func readFile(name string, most int64) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, most+1))
	if err == nil && int64(len(b)) > most {
		err = fmt.Errorf("%s is larger than %d octets", name, most)
	}
	return b, err
}

// Tickets let devices resume sessions of TLS 1.3 on every replica of a service: the keys are derived from one secret, one for
// each hour, and those of this hour and the one before it are taken.
//
// A session in which the client showed a certificate is never resumed: a device proves itself again on every connection
// (DESIGN.md, invariant 8), and the one proof that TLS would carry over is the certificate. So such a session's ticket holds
// nothing. Nor does one of TLS 1.2, which would give the session's keys to whoever gets the secret.
type Tickets struct {
	secret []byte
	now    func() time.Time
}

// TicketSecretSize is the size of a secret for tickets.
const TicketSecretSize = 32

// NewTickets returns tickets under a secret. A nil clock means the real one.
func NewTickets(secret []byte, now func() time.Time) (*Tickets, error) {
	if len(secret) != TicketSecretSize {
		return nil, fmt.Errorf("the secret for session tickets must have %d octets", TicketSecretSize)
	}
	if now == nil {
		now = time.Now
	}
	return &Tickets{bytes.Clone(secret), now}, nil
}

// Use has a configuration, which nobody uses yet, hand out and take tickets.
func (t *Tickets) Use(cfg *tls.Config) {
	var mu sync.Mutex
	hour := int64(-1)
	turn := func() error {
		mu.Lock()
		defer mu.Unlock()
		h := t.now().Unix() / 3600
		if h == hour {
			return nil
		}
		var keys [][32]byte
		for _, x := range []int64{h, h - 1} {
			b, err := hkdf.Key(sha256.New, t.secret, nil, "touchmark session tickets, hour "+strconv.FormatInt(x, 10), 32)
			if err != nil {
				return err
			}
			keys = append(keys, [32]byte(b))
		}
		cfg.SetSessionTicketKeys(keys)
		hour = h
		return nil
	}
	cfg.SessionTicketsDisabled = false
	cfg.WrapSession = func(cs tls.ConnectionState, ss *tls.SessionState) ([]byte, error) {
		if len(cs.PeerCertificates) > 0 || cs.Version < tls.VersionTLS13 {
			return []byte{0}, nil // a ticket must be something, and this opens nothing
		}
		if err := turn(); err != nil {
			return nil, err
		}
		return cfg.EncryptTicket(cs, ss)
	}
	cfg.UnwrapSession = func(ticket []byte, cs tls.ConnectionState) (*tls.SessionState, error) {
		if cs.Version != 0 && cs.Version < tls.VersionTLS13 {
			return nil, nil
		}
		if err := turn(); err != nil {
			return nil, err
		}
		return cfg.DecryptTicket(ticket, cs)
	}
}
