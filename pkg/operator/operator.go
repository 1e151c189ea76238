// Package operator is an operator's side of the service API: what tools need to manage a registration service by its
// connection string, be it touchmark's or Azure's.
//
// A [Connection] says where a service is and holds the right to manage it. A [Client] makes its calls. An enrollment, individual
// or group ([Kind]), is a [Document]: the JSON object of the wire with every member kept as it came, those too that this package
// does not know; its typed form is package dps's. [Compare] says what differs between two. On these stand the longer works:
// [Client.Import] of [Rows], [Client.Export], [Client.RollKey] and [Client.RollCA], [Client.Diagnose] with [Explain], and [Management],
// the client of the management API.
//
// A Client serves many goroutines. It makes SAS tokens of its own, bounds every answer, waits for as long as a service asks with
// Retry-After, and goes slower after that ([Limiter]). It repeats a call whose answer was lost only where that does no harm; a
// create that is then refused because the enrollment exists is done if what exists is what was sent.
//
// Nothing beyond Azure's API version 2021-10-01 is assumed (service API, sections 1, 2 and 8), but where [Client.Info] says that the
// service is touchmark.
package operator

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/touchmark/touchmark/pkg/dps"
)

// APIVersion is the version of the service API that a Client speaks.
const APIVersion = "2021-10-01"

// A Connection says where a service is, and proves a right to manage it. Its text forms show neither key nor token.
type Connection struct {
	// Host is a name or an address, with a port where it is not 443.
	Host string
	// Policy is the shared access policy that the key is of; empty with a token.
	Policy string
	key    []byte
	token  string
}

var hostPattern = regexp.MustCompile(`^[A-Za-z0-9._-]{1,253}$`)

// maxConnection bounds connection strings, in octets.
const maxConnection = 8 << 10

// ParseConnection reads HostName=…;SharedAccessKeyName=…;SharedAccessKey=…, or SharedAccessSignature=… in the place of the latter
// two, in any order and any letter case (service API, section 2.1). Its errors do not show the text, which holds a secret.
func ParseConnection(text string) (Connection, error) {
	var c Connection
	if len(text) > maxConnection {
		return c, fmt.Errorf("no connection string: %d octets", len(text))
	}
	seen := make(map[string]bool)
	for part := range strings.SplitSeq(strings.TrimSpace(text), ";") {
		name, value, _ := strings.Cut(part, "=")
		name = strings.ToLower(strings.TrimSpace(name))
		if name == "" && value == "" {
			continue
		}
		if seen[name] {
			return c, errors.New("a part of the connection string stands there twice")
		}
		seen[name] = true
		switch name {
		case "hostname":
			c.Host = value
		case "sharedaccesskeyname":
			c.Policy = value
		case "sharedaccesskey":
			var err error
			if c.key, err = base64.StdEncoding.DecodeString(value); err != nil {
				return Connection{}, errors.New("SharedAccessKey is not base64")
			}
		case "sharedaccesssignature":
			c.token = value
			if !strings.HasPrefix(value, "SharedAccessSignature ") {
				c.token = "SharedAccessSignature " + value
			}
		}
	}
	if c.Host == "" || (c.Policy == "" || len(c.key) == 0) && c.token == "" {
		return Connection{}, errors.New("no connection string: want HostName=…;SharedAccessKeyName=…;SharedAccessKey=…")
	}
	if strings.ContainsFunc(c.Policy+c.token, func(r rune) bool { return r < ' ' || r > '~' }) {
		return Connection{}, errors.New("SharedAccessKeyName or SharedAccessSignature holds characters that do not belong there")
	}
	host, port, err := net.SplitHostPort(c.Host)
	if err != nil {
		host = strings.Trim(c.Host, "[]")
	} else if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return Connection{}, errors.New("HostName: its port is none")
	}
	if net.ParseIP(host) == nil && !hostPattern.MatchString(host) {
		return Connection{}, errors.New("HostName: want a host name or address, with a port where it is not 443, and no scheme")
	}
	return c, nil
}

// String leaves the secret out.
func (c Connection) String() string { return c.Host + " as " + c.Policy }

// GoString leaves the secret out.
func (c Connection) GoString() string { return c.String() }

// MarshalText leaves the secret out.
func (c Connection) MarshalText() ([]byte, error) { return []byte(c.String()), nil }

// authorization makes a SAS token for the service, good for an hour (service API, section 2.2).
func (c *Connection) authorization(now time.Time) string {
	if c.token != "" {
		return c.token
	}
	host, _, err := net.SplitHostPort(c.Host)
	if err != nil {
		host = c.Host
	}
	sr, se := url.QueryEscape(host), strconv.FormatInt(now.Add(time.Hour).Unix(), 10)
	mac := hmac.New(sha256.New, c.key)
	mac.Write([]byte(sr + "\n" + se))
	return "SharedAccessSignature sr=" + sr + "&sig=" + url.QueryEscape(base64.StdEncoding.EncodeToString(mac.Sum(nil))) +
		"&se=" + se + "&skn=" + url.QueryEscape(c.Policy)
}

// Errors that callers branch on. An [Error] is them by its status.
var (
	ErrUnauthorized = errors.New("not authorized")               // 401, 403
	ErrNotFound     = errors.New("not found")                    // 404
	ErrExists       = errors.New("exists already")               // 409
	ErrChanged      = errors.New("was changed meanwhile")        // 412
	ErrThrottled    = errors.New("throttled")                    // 429
	ErrUnsupported  = errors.New("the service does not do that") // of touchmark's own calls, against another service
)

// An Error is a service saying no.
type Error struct {
	Host       string
	Status     int      // as in HTTP
	Code       dps.Code // 0 where the answer named none
	Name       string   // of the fault, where the answer named it in letters, as the management API does
	TrackingID string
	Message    string // untrusted text
}

// Error says who answered what.
func (e *Error) Error() string {
	text := fmt.Sprintf("the service at %s answered %d", e.Host, e.Status)
	switch {
	case e.Code != 0:
		text = fmt.Sprintf("the service at %s answered %d", e.Host, int(e.Code))
	case e.Name != "":
		text += " " + e.Name
	}
	if e.Message != "" {
		text += ": " + e.Message
	}
	if e.TrackingID != "" {
		text += " (tracking ID " + e.TrackingID + ")"
	}
	return text
}

// Is makes errors.Is work with the sentinels above.
func (e *Error) Is(target error) bool {
	switch e.Status {
	case 401, 403:
		return target == ErrUnauthorized
	case 404:
		return target == ErrNotFound
	case 409:
		return target == ErrExists
	case 412:
		return target == ErrChanged
	case 429:
		return target == ErrThrottled
	}
	return false
}
