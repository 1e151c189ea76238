package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/pkg/operator"
)

// service is a registration service, reached with an operator's connection string.
type service struct {
	*operator.Client
	cfg operator.Config
}

// serviceOptions say which service a command speaks to.
type serviceOptions struct{ service, ca string }

func (o *serviceOptions) flags(c *cobra.Command) {
	f := c.Flags()
	f.StringVar(&o.service, "service", "", "file with the service's connection string (default: $TOUCHMARK_SERVICE)")
	f.StringVar(&o.ca, "ca", "", "PEM file with the CA of the service's certificate (default: ca.pem beside --service, else the system's)")
}

// openService reads a connection string file, HostName=…;SharedAccessKeyName=…;SharedAccessKey=…, and the CA that the
// service's certificate is checked against: a file, else ca.pem beside the connection string, else the system's roots.
func (a *app) openService(path, caFile string) (*service, error) {
	if path == "" {
		if path = a.getenv("TOUCHMARK_SERVICE"); path == "" {
			return nil, hint(usageError{errors.New("required flag --service is not set, nor is TOUCHMARK_SERVICE")}, "it names a file with the service's connection string: owner.connection of touchmark's, or what az iot dps connection-string show prints")
		}
	}
	b, err := readSmall(path)
	if err != nil {
		return nil, usageError{fmt.Errorf("reading the connection string: %w", err)}
	}
	s := &service{}
	s.cfg.Connection, err = operator.ParseConnection(string(b))
	clear(b)
	if err != nil {
		return nil, usageError{fmt.Errorf("%s: %w", path, err)}
	}
	if s.cfg.Roots, err = rootsBeside(path, caFile); err != nil {
		return nil, err
	}
	s.cfg.Waiting = a.waits()
	s.Client = operator.New(s.cfg)
	return s, nil
}

// waits tells a person that a call waits, now and then.
func (a *app) waits() func(string, time.Duration) {
	var last atomic.Int64 // Unix, in seconds
	return func(host string, d time.Duration) {
		if now, was := time.Now().Unix(), last.Load(); d >= 2*time.Second && now-was >= 10 && last.CompareAndSwap(was, now) {
			a.note("%s is busy, or does not answer: the call is made again in %v", host, d.Round(time.Second))
		}
	}
}

// rootsBeside returns the CAs in a file, else those in ca.pem beside another.
func rootsBeside(path, caFile string) (*x509.CertPool, error) {
	if beside := filepath.Join(filepath.Dir(path), "ca.pem"); caFile == "" && exists(beside) {
		caFile = beside
	}
	return loadRoots(caFile)
}

// dial has the service be connected to in that way.
func (s *service) dial(by func(ctx context.Context, network, address string) (net.Conn, error)) {
	s.cfg.Dial = by
	s.Client = operator.New(s.cfg)
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

// call makes one request and decodes its JSON answer into out.
func (s *service) call(ctx context.Context, method, path string, query url.Values, header http.Header, body io.Reader, out any) error {
	return connectHint(s.Call(ctx, method, path, query, header, body, out))
}

func (s *service) callJSON(ctx context.Context, method, path string, in, out any) error {
	return connectHint(s.CallJSON(ctx, method, path, in, out))
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
