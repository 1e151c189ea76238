// Package attesttest makes what devices prove themselves with, for tests.
package attesttest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"testing"
	"time"
)

// Now is when the certificates are good: from an hour before to an hour after.
var Now = time.Date(2026, 6, 1, 0, 0, 0, 0, time.UTC)

// A Holder has a certificate and its key.
type Holder struct {
	Certificate *x509.Certificate
	Key         *ecdsa.PrivateKey
}

// CA signs a CA certificate; a nil parent signs itself. Edit may change the template.
func CA(t testing.TB, parent *Holder, cn string, edit ...func(*x509.Certificate)) *Holder {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return certify(t, parent, cn, key, edit...)
}

func certify(t testing.TB, parent *Holder, cn string, key *ecdsa.PrivateKey, edit ...func(*x509.Certificate)) *Holder {
	t.Helper()
	h := &Holder{Key: key}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: cn}, NotBefore: Now.Add(-time.Hour), NotAfter: Now.Add(time.Hour),
		BasicConstraintsValid: true, IsCA: true, MaxPathLen: -1, KeyUsage: x509.KeyUsageCertSign}
	for _, f := range edit {
		f(c)
	}
	p, k := c, crypto.Signer(h.Key)
	if parent != nil {
		p, k = parent.Certificate, parent.Key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, p, h.Key.Public(), k)
	if err != nil {
		t.Fatal(err)
	}
	if h.Certificate, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return h
}

// Leaf signs a certificate for a device, or for a server of that name.
func Leaf(t testing.TB, parent *Holder, cn string, edit ...func(*x509.Certificate)) *Holder {
	t.Helper()
	return CA(t, parent, cn, append([]func(*x509.Certificate){AsLeaf}, edit...)...)
}

// Again signs another certificate for a device's key, by another name.
func Again(t testing.TB, parent, device *Holder, cn string) *Holder {
	t.Helper()
	return certify(t, parent, cn, device.Key, AsLeaf)
}

// Cross signs another certificate for a CA's key, by the same name: a renewed one, or one of another issuer.
func Cross(t testing.TB, parent, ca *Holder, edit ...func(*x509.Certificate)) *Holder {
	t.Helper()
	return certify(t, parent, ca.Certificate.Subject.CommonName, ca.Key, edit...)
}

// AsLeaf makes a template a leaf's.
func AsLeaf(c *x509.Certificate) {
	c.IsCA, c.KeyUsage, c.MaxPathLen = false, x509.KeyUsageDigitalSignature, 0
	c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}
	c.DNSNames, c.IPAddresses = []string{c.Subject.CommonName}, []net.IP{net.IPv4(127, 0, 0, 1)}
}

// Base64 returns the certificate as documents have it.
func (h *Holder) Base64() string { return base64.StdEncoding.EncodeToString(h.Certificate.Raw) }

// TLS returns the certificate with others behind it, for a handshake.
func (h *Holder) TLS(chain ...*Holder) *tls.Certificate {
	c := &tls.Certificate{Certificate: [][]byte{h.Certificate.Raw}, PrivateKey: h.Key}
	for _, x := range chain {
		c.Certificate = append(c.Certificate, x.Certificate.Raw)
	}
	return c
}

// Token signs a device's token, as SDKs write it.
func Token(key []byte, scope, id string, expiry time.Time) string {
	return SignToken(key, url.QueryEscape(scope+"/registrations/"+id), "registration", expiry)
}

// ServiceToken signs a token of a shared access policy.
func ServiceToken(key []byte, host, policy string, expiry time.Time) string {
	return SignToken(key, url.QueryEscape(host), policy, expiry)
}

// SignToken signs a token over a resource as it is written.
func SignToken(key []byte, resource, skn string, expiry time.Time) string {
	h := hmac.New(sha256.New, key)
	fmt.Fprintf(h, "%s\n%d", resource, expiry.Unix())
	return fmt.Sprintf("SharedAccessSignature sr=%s&sig=%s&se=%d&skn=%s", resource, url.QueryEscape(base64.StdEncoding.EncodeToString(h.Sum(nil))), expiry.Unix(), skn)
}
