package hub

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/touchmark/touchmark/pkg/registration"
)

// maxConnection bounds a connection string, in octets: certificates stand in it.
const maxConnection = 16 << 10

// ErrMasked says that a connection string has **** where its secret belongs, and that there is none to put there.
var ErrMasked = errors.New("connection string is masked")

const secretMask = "****"

// A Connection is a parsed connection string: members Name=value with ";" between them, in any order, their names in any letter
// case. Its String is masked.
//
//	azure, builtin  HostName=hub.example.net;SharedAccessKeyName=dps;SharedAccessKey=BASE64
//	mosquitto       HostName=mq.example.net;Username=dps;Password=TEXT, or with Certificate=BASE64;Key=BASE64
//	webhook         URL=https://back.example.net/touchmark;Secret=BASE64
//
// All may have CA=BASE64: the certificates, in PEM, that the hub's own is judged by instead of the system's. With HostName goes
// Port=, or :PORT behind the name, unless it is 443, or 8883 for mosquitto. Certificate and Key are base64 of PEM too. PEM stands in the string, and not the path of a file,
// because whoever may link a hub may not for that read the files of the service, and since replicas share no files. Plain=true
// has mosquitto without TLS and webhooks over http, to loopback addresses alone. No value may contain ";".
type Connection struct {
	Kind registration.HubKind
	// Host is in lower case, without a port.
	Host string
	Port int
	// User is the name of a shared access policy, or of a broker's client.
	User string
	// Plain is without TLS, to a loopback address.
	Plain bool

	url      *url.URL // of a webhook
	secret   []byte   // what tokens or bodies are signed with
	password string
	roots    *x509.CertPool // nil is the system's
	certs    []tls.Certificate
	text     string
}

// String hides the secrets.
func (c *Connection) String() string { return Mask(c.text) }

// GoString hides the secrets.
func (c *Connection) GoString() string { return Mask(c.text) }

// memberNames are those of each kind, in lower case.
var memberNames = map[registration.HubKind][]string{
	registration.HubAzure:     {"hostname", "sharedaccesskeyname", "sharedaccesskey", "port", "ca"},
	registration.HubBuiltin:   {"hostname", "sharedaccesskeyname", "sharedaccesskey", "port", "ca"},
	registration.HubMosquitto: {"hostname", "port", "username", "password", "certificate", "key", "ca", "plain"},
	registration.HubWebhook:   {"url", "secret", "ca", "plain"},
	registration.HubRecord:    {},
}

// ParseConnection parses and checks the connection string of a kind of hub. A masked one is ErrMasked. Errors name members, not
// values.
func ParseConnection(kind registration.HubKind, text string) (*Connection, error) {
	names, ok := memberNames[kind]
	if !ok {
		return nil, fmt.Errorf("kind of hub %.32q: want azure, builtin, mosquitto, webhook or record", kind)
	}
	if kind == registration.HubRecord {
		if text != "" {
			return nil, errors.New("a record hub has no connection string")
		}
		return &Connection{Kind: kind}, nil
	}
	if len(text) > maxConnection {
		return nil, fmt.Errorf("connection string is longer than %d octets", maxConnection)
	}
	has := map[string]string{}
	for part := range strings.SplitSeq(text, ";") {
		name, value, ok := strings.Cut(part, "=")
		lower := strings.ToLower(name)
		if !ok || !slices.Contains(names, lower) {
			return nil, fmt.Errorf("connection string: want Name=value with ; between, of %s", strings.Join(names, ", "))
		}
		if _, twice := has[lower]; twice {
			return nil, fmt.Errorf("connection string: %s stands twice", lower)
		}
		if value == "" || strings.ContainsFunc(value, func(r rune) bool { return r <= ' ' || r == 0x7f }) {
			return nil, fmt.Errorf("connection string: %s is empty or has white space in it", lower)
		}
		if strings.HasSuffix(value, secretMask) {
			return nil, fmt.Errorf("%w: %s", ErrMasked, lower)
		}
		has[lower] = value
	}
	c := &Connection{Kind: kind, text: text}
	if err := c.fill(has); err != nil {
		return nil, fmt.Errorf("connection string: %w", err)
	}
	return c, nil
}

func (c *Connection) fill(has map[string]string) error {
	var err error
	switch has["plain"] {
	case "", "false":
	case "true":
		c.Plain = true
	default:
		return errors.New("plain: want true or false")
	}
	if ca, ok := has["ca"]; ok {
		blob, err := base64.StdEncoding.Strict().DecodeString(ca)
		if c.roots = x509.NewCertPool(); err != nil || !appendCertificates(c.roots, blob) {
			return errors.New("ca: want base64 of certificates in PEM")
		}
	}
	c.Port = 443
	if c.Kind == registration.HubMosquitto {
		c.Port = 8883
		if c.Plain {
			c.Port = 1883
		}
	}
	port, ok := has["port"]
	if host, p, err := net.SplitHostPort(has["hostname"]); err == nil && !ok {
		has["hostname"], port, ok = host, p, true
	}
	if ok {
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil || n == 0 || strconv.FormatUint(n, 10) != port {
			return errors.New("port: want 1 to 65535")
		}
		c.Port = int(n)
	}
	if c.Kind == registration.HubWebhook {
		if c.url, err = parseURL(has["url"], c.Plain); err != nil {
			return fmt.Errorf("url: %w", err)
		}
		c.Host = c.url.Hostname()
		if has["secret"] == "" {
			return errors.New("secret is missing")
		}
		c.secret, err = parseKey(has["secret"])
		if err != nil {
			return fmt.Errorf("secret: %w", err)
		}
		return nil
	}
	c.Host = strings.ToLower(has["hostname"])
	if !isHost(c.Host) {
		return errors.New("hostname: want a host name or an address, and a port if need be")
	}
	if c.Kind != registration.HubMosquitto {
		if c.User = has["sharedaccesskeyname"]; c.User == "" || has["sharedaccesskey"] == "" {
			return errors.New("want sharedaccesskeyname and sharedaccesskey")
		}
		if c.secret, err = parseKey(has["sharedaccesskey"]); err != nil {
			return fmt.Errorf("sharedaccesskey: %w", err)
		}
		return nil
	}
	c.User, c.password = has["username"], has["password"]
	if (c.User == "") != (c.password == "") || (has["certificate"] == "") != (has["key"] == "") || (c.User == "") == (has["key"] == "") {
		return errors.New("want either username and password, or certificate and key")
	}
	if len(c.User) > 0xffff || len(c.password) > 0xffff {
		return errors.New("username or password is longer than MQTT has it")
	}
	if has["key"] == "" {
		return nil
	}
	if c.Plain {
		return errors.New("a certificate needs TLS, without plain")
	}
	chain, err1 := base64.StdEncoding.Strict().DecodeString(has["certificate"])
	key, err2 := base64.StdEncoding.Strict().DecodeString(has["key"])
	pair, err3 := tls.X509KeyPair(chain, key)
	if err1 != nil || err2 != nil || err3 != nil { // what crypto/tls says of a key is not repeated
		return errors.New("certificate and key: want base64 of PEM, of one key pair")
	}
	c.certs = []tls.Certificate{pair}
	return nil
}

// appendCertificates adds PEM certificates, and nothing else that PEM may hold.
func appendCertificates(pool *x509.CertPool, blob []byte) bool {
	n := 0
	for len(blob) > 0 {
		block, rest := pem.Decode(blob)
		if block == nil {
			break
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if block.Type != "CERTIFICATE" || err != nil {
			return false
		}
		pool.AddCert(cert)
		n, blob = n+1, rest
	}
	return n > 0 && strings.TrimSpace(string(blob)) == ""
}

// parseKey parses a symmetric key.
func parseKey(text string) ([]byte, error) {
	key, err := base64.StdEncoding.Strict().DecodeString(text)
	if err != nil || len(key) < 16 || len(key) > 64 {
		return nil, errors.New("want base64 of 16 to 64 octets")
	}
	return key, nil
}

// parseURL parses where a webhook is. http is for loopback addresses, which the dialler sees to.
func parseURL(text string, plain bool) (*url.URL, error) {
	u, err := url.Parse(text)
	if err != nil || len(text) > 2048 || u.Opaque != "" || u.User != nil || u.Fragment != "" || !isHost(strings.ToLower(u.Hostname())) {
		return nil, errors.New("want https://host/path, without a user and a fragment")
	}
	if p := u.Port(); p != "" {
		if n, err := strconv.ParseUint(p, 10, 16); err != nil || n == 0 {
			return nil, errors.New("port: want 1 to 65535")
		}
	}
	if u.Scheme != "https" && !(u.Scheme == "http" && plain) {
		return nil, errors.New("want https")
	}
	return u, nil
}

// isHost reports whether s is a host name or an address, in lower case.
func isHost(s string) bool {
	if a, err := netip.ParseAddr(s); err == nil {
		return a.Zone() == ""
	}
	if s == "" || len(s) > 253 {
		return false
	}
	for label := range strings.SplitSeq(s, ".") {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' || strings.Trim(label, "abcdefghijklmnopqrstuvwxyz0123456789-_") != "" {
			return false
		}
	}
	return true
}

// shown are members that are no secret.
var shown = []string{"hostname", "sharedaccesskeyname", "port", "ca", "username", "certificate", "plain"}

// Mask returns a connection string as it may be shown, ****  in place of its secrets: SharedAccessKey, Password, Key, Secret, the
// query of a URL, and everything that it does not know, for the string need not be a good one.
func Mask(text string) string {
	if text == "" {
		return ""
	}
	parts := strings.Split(text, ";")
	for i, part := range parts {
		name, value, ok := strings.Cut(part, "=")
		switch lower := strings.ToLower(name); {
		case !ok:
			parts[i] = secretMask
		case lower == "url":
			parts[i] = name + "=" + maskURL(value)
		case !slices.Contains(shown, lower):
			if !slices.ContainsFunc([]string{"sharedaccesskey", "password", "key", "secret"}, func(s string) bool { return s == lower }) {
				name = secretMask // may be a part of a secret with a ";" in it
			}
			parts[i] = name + "=" + secretMask
		}
	}
	return strings.Join(parts, ";")
}

// maskURL hides what may be secret in a URL: a query, where function keys live, and a user.
func maskURL(text string) string {
	base, _, has := strings.Cut(text, "?")
	if u, err := url.Parse(base); err != nil || u.User != nil || u.Opaque != "" {
		return secretMask
	}
	if has {
		base += "?" + secretMask
	}
	return base
}

// Restore puts the secrets of the stored connection string into one that was shown masked, and came back. What is not masked is
// returned as it is. A secret goes back only where all else is as it was stored, in whatever order and letter case of names: it
// shall not be had by somebody who writes another host in front of it. Else the error is [ErrMasked].
func Restore(text, stored string) (string, error) {
	old, dup := split(stored)
	now, twice := split(text)
	parts := strings.Split(text, ";")
	masked := false
	for i, part := range parts {
		name, value, _ := strings.Cut(part, "=")
		if !strings.HasSuffix(value, secretMask) {
			continue
		}
		masked = true
		if lower := strings.ToLower(name); value == secretMask || lower == "url" && value == maskURL(old[lower]) {
			parts[i] = name + "=" + old[lower]
		}
	}
	if !masked {
		return text, nil
	}
	same := !dup && !twice && len(old) == len(now)
	for name, value := range now {
		was, ok := old[name]
		switch {
		case !ok:
			same = false
		case name == "hostname":
			same = same && strings.EqualFold(was, value)
		case name == "url":
			same = same && (value == was || value == maskURL(was))
		case slices.Contains(shown, name):
			same = same && value == was
		}
	}
	if !same {
		return "", fmt.Errorf("%w, and is not that of the stored one: its secret is needed", ErrMasked)
	}
	return strings.Join(parts, ";"), nil
}

func split(text string) (members map[string]string, twice bool) {
	members = map[string]string{}
	for part := range strings.SplitSeq(text, ";") {
		name, value, _ := strings.Cut(part, "=")
		name = strings.ToLower(name)
		_, has := members[name]
		members[name], twice = value, twice || has
	}
	return members, twice
}
