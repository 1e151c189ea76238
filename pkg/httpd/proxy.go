package httpd

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"

	"github.com/touchmark/touchmark/pkg/dps"
)

// ForwardedCertificate is how a TLS-terminating proxy hands a client's certificate on. One form is read, and the other passed
// over: a proxy takes what clients send out of the form that it writes, and knows nothing of the other.
type ForwardedCertificate string

// The forms.
const (
	ClientCert ForwardedCertificate = "rfc9440" // Client-Cert and Client-Cert-Chain (RFC 9440)
	EnvoyCert  ForwardedCertificate = "envoy"   // X-Forwarded-Client-Cert, with Cert or Chain
)

const (
	maxForwardedFor   = 32 // hops
	maxForwardedChain = 8  // certificates
)

// caller finds who sends a request that came by a trusted proxy: RemoteAddr becomes their address and TLS.PeerCertificates the
// certificates that a proxy forwards which ends TLS, and they are counted in by their address until release. A proxy's own client certificate is nobody's then.
func (s *Server) caller(r *http.Request) (release func(), err error) {
	nothing := func() {}
	if s.cfg.Door == nil || !s.cfg.Door.Trusts(r.RemoteAddr) {
		return nothing, nil
	}
	if s.cfg.Forwarded != "" && s.cfg.Door.EndsTLS(r.RemoteAddr) {
		certificates, err := s.cfg.Forwarded.read(r.Header)
		if err != nil {
			s.cfg.Log.Warn("a trusted proxy forwards a client certificate that cannot be read", "proxy", r.RemoteAddr, "cause", err)
			return nil, dps.NewError(dps.CodeBadRequest, "The forwarded client certificate cannot be read", err)
		}
		var state tls.ConnectionState
		if r.TLS != nil {
			state = *r.TLS // the connection's other requests have it too
		}
		state.PeerCertificates = certificates
		r.TLS = &state
	}
	from := forwardedFor(r.Header.Values("X-Forwarded-For"), s.cfg.Door.Trusts)
	if !from.IsValid() {
		return nothing, nil
	}
	r.RemoteAddr = net.JoinHostPort(from.String(), "0") // whatever port the proxy had from them
	if s.cfg.Door.Trusts(from.String()) {
		return nothing, nil
	}
	release, ok := s.cfg.Door.Admit(r.RemoteAddr)
	if !ok {
		return nil, dps.NewError(dps.CodeThrottled, "Too many requests from this address", nil)
	}
	return release, nil
}

// forwardedFor returns the rightmost address that is no trusted proxy's: what stands left of it, its sender may have made up.
// It is the leftmost that can be believed where all are proxies', or one cannot be read; and no address without any.
func forwardedFor(lines []string, trusted func(string) bool) (from netip.Addr) {
	hops := strings.Split(strings.Join(lines, ","), ",")
	for n := 1; n <= min(len(hops), maxForwardedFor); n++ {
		text := strings.Trim(hops[len(hops)-n], " \t")
		a, err := netip.ParseAddr(text)
		if err != nil { // some write the port as well
			p, err := netip.ParseAddrPort(text)
			if err != nil {
				return from
			}
			a = p.Addr()
		}
		if from = a.Unmap().WithZone(""); !trusted(from.String()) {
			return from
		}
	}
	return from
}

// read returns the certificates that a proxy forwards, leaf first; nil where the client showed none.
func (f ForwardedCertificate) read(h http.Header) ([]*x509.Certificate, error) {
	if f == EnvoyCert {
		return envoyCert(h.Values("X-Forwarded-Client-Cert"))
	}
	return clientCert(h.Values("Client-Cert"), h.Values("Client-Cert-Chain"))
}

// clientCert reads RFC 9440's headers: one byte sequence, and a list of them (RFC 8941, sections 3.1 and 3.3.5).
func clientCert(leaf, chain []string) ([]*x509.Certificate, error) {
	if len(leaf) == 0 {
		if len(chain) > 0 {
			return nil, errors.New("a chain without Client-Cert")
		}
		return nil, nil
	}
	items := leaf
	if len(chain) > 0 {
		items = append(items[:len(items):len(items)], strings.Split(strings.Join(chain, ","), ",")...)
	}
	if len(leaf) > 1 || len(items) > maxForwardedChain {
		return nil, errors.New("too many certificates")
	}
	var all []*x509.Certificate
	for _, item := range items {
		text, begins := strings.CutPrefix(strings.Trim(item, " \t"), ":")
		text, ends := strings.CutSuffix(text, ":")
		der, err := base64.StdEncoding.Strict().DecodeString(text)
		if !begins || !ends || err != nil {
			return nil, errors.New("not a byte sequence of RFC 8941")
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		all = append(all, c)
	}
	return all, nil
}

// envoyCert reads Envoy's header: name=value pairs, parted by semicolons. Several elements, parted by commas, are refused: who
// wrote which cannot be told, unless the proxy keeps only its own (SANITIZE_SET).
func envoyCert(lines []string) ([]*x509.Certificate, error) {
	if len(lines) == 0 {
		return nil, nil
	}
	if len(lines) > 1 {
		return nil, errors.New("more than one X-Forwarded-Client-Cert")
	}
	var leaf, chain []*x509.Certificate
	for rest, more := lines[0], true; more; {
		name, value, err := "", "", error(nil)
		if name, value, rest, more, err = envoyPair(rest); err != nil {
			return nil, err
		}
		into := &leaf
		switch strings.ToLower(name) {
		case "chain":
			into = &chain
		case "cert":
		default: // By, Hash, Subject, URI, DNS: what the certificate says itself
			continue
		}
		if *into != nil {
			return nil, fmt.Errorf("%s twice", name)
		}
		if *into, err = escapedPEM(value); err != nil {
			return nil, err
		}
	}
	switch {
	case leaf == nil && chain == nil:
		return nil, errors.New("neither Cert nor Chain")
	case len(leaf) > 1:
		return nil, errors.New("more than one certificate in Cert")
	case chain == nil:
		return leaf, nil
	case leaf != nil && !leaf[0].Equal(chain[0]):
		return nil, errors.New("the certificate in Cert is not the first of Chain")
	}
	return chain, nil
}

// envoyPair takes one pair off the front.
func envoyPair(s string) (name, value, rest string, more bool, err error) {
	bad := errors.New("not a list of name=value pairs, or more than one element")
	name, s, ok := strings.Cut(s, "=")
	if !ok || name == "" || strings.ContainsAny(name, ",;\" ") {
		return "", "", "", false, bad
	}
	if quoted, ok := strings.CutPrefix(s, `"`); ok {
		var b strings.Builder
		i := 0
		for ; i < len(quoted) && quoted[i] != '"'; i++ {
			if quoted[i] == '\\' {
				i++
			}
			if i < len(quoted) {
				b.WriteByte(quoted[i])
			}
		}
		if i >= len(quoted) {
			return "", "", "", false, bad
		}
		value, s = b.String(), quoted[i+1:]
	} else {
		i := strings.IndexAny(s, ",;\"")
		if i < 0 {
			i = len(s)
		}
		value, s = s[:i], s[i:]
	}
	if s == "" {
		return name, value, "", false, nil
	}
	if rest, ok = strings.CutPrefix(s, ";"); !ok {
		return "", "", "", false, bad
	}
	return name, value, rest, true, nil
}

func escapedPEM(s string) ([]*x509.Certificate, error) {
	text, err := url.PathUnescape(s) // a "+" is a "+"
	if err != nil {
		return nil, err
	}
	var all []*x509.Certificate
	for rest := bytes.TrimSpace([]byte(text)); len(rest) > 0; rest = bytes.TrimSpace(rest) {
		if !bytes.HasPrefix(rest, []byte("-----BEGIN CERTIFICATE-----")) { // Decode passes over what is no PEM
			return nil, errors.New("not PEM of certificates")
		}
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil || block.Type != "CERTIFICATE" {
			return nil, errors.New("not PEM of certificates")
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		if all = append(all, c); len(all) > maxForwardedChain {
			return nil, errors.New("too many certificates")
		}
	}
	if all == nil {
		return nil, errors.New("not PEM of certificates")
	}
	return all, nil
}
