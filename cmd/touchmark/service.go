package main

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/touchmark/touchmark/pkg/dps"
)

// service is a registration service, reached with an owner's connection string.
type service struct {
	host   string // host, or host:port
	policy string
	key    []byte
	roots  *x509.CertPool // nil means the system's
	client *http.Client
}

// apiVersion is the service API version that touchmark speaks.
const apiVersion = "2021-10-01"

// openService reads a connection string file, HostName=…;SharedAccessKeyName=…;SharedAccessKey=…, and the CA that the
// service's certificate is checked against: a file, else ca.pem beside the connection string, else the system's roots.
func (a *app) openService(path, caFile string) (*service, error) {
	b, err := readSmall(path)
	if err != nil {
		return nil, usageError{fmt.Errorf("reading the connection string: %w", err)}
	}
	s, err := parseConnectionString(string(b))
	clear(b)
	if err != nil {
		return nil, usageError{fmt.Errorf("%s: %w", path, err)}
	}
	if beside := filepath.Join(filepath.Dir(path), "ca.pem"); caFile == "" && exists(beside) {
		caFile = beside
	}
	if s.roots, err = loadRoots(caFile); err != nil {
		return nil, err
	}
	s.dial((&net.Dialer{Timeout: 10 * time.Second}).DialContext)
	return s, nil
}

// dial has the service be connected to in that way.
func (s *service) dial(by func(ctx context.Context, network, address string) (net.Conn, error)) {
	s.client = &http.Client{Transport: &http.Transport{
		TLSClientConfig:       &tls.Config{RootCAs: s.roots, MinVersion: tls.VersionTLS12},
		DialContext:           by,
		MaxIdleConnsPerHost:   8,
		TLSHandshakeTimeout:   10 * time.Second,
		ResponseHeaderTimeout: 30 * time.Minute, // an import answers when it is durable
	}}
}

// parseConnectionString reads HostName=…;SharedAccessKeyName=…;SharedAccessKey=…. Its errors do not show the text, which
// holds a key.
func parseConnectionString(text string) (*service, error) {
	s := &service{}
	for part := range strings.SplitSeq(strings.TrimSpace(text), ";") {
		name, value, _ := strings.Cut(part, "=")
		switch strings.ToLower(name) {
		case "hostname":
			s.host = value
		case "sharedaccesskeyname":
			s.policy = value
		case "sharedaccesskey":
			var err error
			if s.key, err = base64.StdEncoding.DecodeString(value); err != nil {
				return nil, errors.New("SharedAccessKey is not base64")
			}
		}
	}
	if s.host == "" || s.policy == "" || len(s.key) == 0 {
		return nil, errors.New("no connection string: want HostName=…;SharedAccessKeyName=…;SharedAccessKey=…")
	}
	host, _, err := net.SplitHostPort(s.host)
	if err != nil {
		host = s.host
	}
	if net.ParseIP(host) == nil {
		if err := checkHost(host); err != nil {
			return nil, fmt.Errorf("HostName: %w", err)
		}
	}
	return s, nil
}

// loadRoots reads trust anchors; an empty path means the system's.
func loadRoots(path string) (*x509.CertPool, error) {
	if path == "" {
		return nil, nil
	}
	b, err := readSmall(path)
	if err != nil {
		return nil, usageError{fmt.Errorf("reading the CA file: %w", err)}
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(b) {
		return nil, usageError{fmt.Errorf("%s holds no certificate", path)}
	}
	return pool, nil
}

// token makes a SAS token for the service, good for an hour (service API, section 2.2).
func (s *service) token(now time.Time) string {
	host, _, err := net.SplitHostPort(s.host)
	if err != nil {
		host = s.host
	}
	sr, se := url.QueryEscape(host), strconv.FormatInt(now.Add(time.Hour).Unix(), 10)
	mac := hmac.New(sha256.New, s.key)
	io.WriteString(mac, sr+"\n"+se)
	return "SharedAccessSignature sr=" + sr + "&sig=" + url.QueryEscape(base64.StdEncoding.EncodeToString(mac.Sum(nil))) +
		"&se=" + se + "&skn=" + url.QueryEscape(s.policy)
}

// maxAnswer bounds what is read of an answer.
const maxAnswer = 8 << 20

// call makes one request and decodes its JSON answer into out.
func (s *service) call(ctx context.Context, method, path string, query url.Values, header http.Header, body io.Reader, out any) error {
	_, err := s.exchange(ctx, method, path, query, header, body, out)
	return err
}

// pages asks for a list page by page, and yields its items: at most limit.
func pages[T any](ctx context.Context, s *service, path string, limit int) (all []T, err error) {
	header := http.Header{"X-Ms-Max-Item-Count": {"1000"}}
	for len(all) < limit {
		var page []T
		answer, err := s.exchange(ctx, http.MethodGet, path, nil, header, nil, &page)
		if err != nil {
			return nil, err
		}
		all = append(all, page...)
		next := answer.Get("X-Ms-Continuation")
		if next == "" {
			return all, nil
		}
		header.Set("X-Ms-Continuation", next)
	}
	return all[:limit], nil
}

// exchange is call, and returns the answer's header too.
func (s *service) exchange(ctx context.Context, method, path string, query url.Values, header http.Header, body io.Reader, out any) (http.Header, error) {
	if query == nil {
		query = url.Values{}
	}
	query.Set("api-version", apiVersion)
	req, err := http.NewRequestWithContext(ctx, method, "https://"+s.host+path+"?"+query.Encode(), body)
	if err != nil {
		return nil, err
	}
	for k, v := range header {
		req.Header[k] = v
	}
	req.Header.Set("Authorization", s.token(time.Now()))
	res, err := s.client.Do(req)
	if err != nil {
		return nil, connectHint(fmt.Errorf("calling the service at %s: %w", s.host, err))
	}
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer))
	if err != nil {
		return nil, fmt.Errorf("reading the answer of %s: %w", s.host, err)
	}
	if res.StatusCode/100 != 2 {
		var doc struct {
			ErrorCode  int    `json:"errorCode"`
			Message    string `json:"message"`
			TrackingID string `json:"trackingId"`
		}
		if json.Unmarshal(b, &doc) != nil || doc.ErrorCode == 0 {
			return nil, fmt.Errorf("the service at %s answered %s", s.host, res.Status)
		}
		return nil, &serviceError{host: s.host, code: dps.Code(doc.ErrorCode), message: doc.Message, trackingID: doc.TrackingID}
	}
	if out == nil {
		return res.Header, nil
	}
	if err := json.Unmarshal(b, out); err != nil {
		return nil, fmt.Errorf("the answer of %s is not what was expected: %w", s.host, err)
	}
	return res.Header, nil
}

// connectHint says what helps most often against what keeps two programs from talking.
func connectHint(err error) error {
	var unknown x509.UnknownAuthorityError
	var name x509.HostnameError
	var record tls.RecordHeaderError
	var lookup *net.DNSError
	switch {
	case errors.As(err, &unknown):
		return hint(err, "the service's certificate is from a CA that is not trusted here: name its file with --ca (touchmark serve keeps it in ca.pem)")
	case errors.As(err, &name):
		return hint(err, "the service's certificate is for other names: use one of them, or start the service with --hostname")
	case errors.As(err, &record):
		return hint(err, "what answers there does not speak TLS: look at the port")
	case errors.As(err, &lookup):
		return hint(err, "the host's name is not known here: look at its spelling, or at this machine's name service")
	case errors.Is(err, syscall.ECONNREFUSED):
		return hint(err, "nothing listens there: is the service running, and is this its port?")
	}
	return err
}

func (s *service) callJSON(ctx context.Context, method, path string, in, out any) error {
	b, err := json.Marshal(in)
	if err != nil {
		return err
	}
	return s.call(ctx, method, path, nil, http.Header{"Content-Type": {"application/json"}}, bytes.NewReader(b), out)
}

// serviceError is the service saying no.
type serviceError struct {
	host, message, trackingID string
	code                      dps.Code
}

func (e *serviceError) Error() string {
	return fmt.Sprintf("the service at %s answered %d: %s (tracking ID %s)", e.host, int(e.code), e.message, e.trackingID)
}

// checkHost says what keeps s from being a host name or address.
func checkHost(s string) error {
	if s == "" || len(s) > 253 {
		return fmt.Errorf("host %q: want 1 to 253 characters", s)
	}
	for i := 0; i < len(s); i++ {
		c := s[i]
		if !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '-' || c == '.' || c == '_') {
			return fmt.Errorf("host %q: character %d does not belong in a host name (no scheme, no port)", s, i+1)
		}
	}
	return nil
}

func openFile(path string) (*os.File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, usageError{err}
	}
	return f, nil
}
