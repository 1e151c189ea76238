package arm

import (
	"crypto/sha1"
	"crypto/x509"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/touchmark/touchmark/pkg/registration"
)

// A certificate is one of a service's on the wire (service API, section 3.6).
type certificate struct {
	ID         string                `json:"id"`
	Name       string                `json:"name"`
	Type       string                `json:"type"`
	ETag       string                `json:"etag"`
	Properties certificateProperties `json:"properties"`
}

type certificateProperties struct {
	Subject          string `json:"subject"`
	Expiry           string `json:"expiry"`
	Thumbprint       string `json:"thumbprint"`
	IsVerified       bool   `json:"isVerified"`
	Created          string `json:"created"`
	Updated          string `json:"updated"`
	Certificate      []byte `json:"certificate"`
	VerificationCode string `json:"verificationCode,omitempty"`
}

// showCertificate returns a certificate as answers have it, without itself and its code.
func showCertificate(sc *registration.Scope, c *registration.CACertificate) (*certificate, error) {
	cert, err := x509.ParseCertificate(c.DER)
	if err != nil {
		return nil, fmt.Errorf("certificate %q in the store: %w", c.Name, err)
	}
	day := func(t time.Time) string { return t.UTC().Format(http.TimeFormat) }
	return &certificate{serviceID(sc) + "/certificates/" + c.Name, c.Name, resourceType + "/Certificates", c.ETag, certificateProperties{
		Subject: cert.Subject.CommonName, Expiry: day(cert.NotAfter), Thumbprint: fmt.Sprintf("%X", sha1.Sum(c.DER)), IsVerified: c.Verified,
		Created: day(c.Created), Updated: day(c.Updated)}}, nil
}

// certificates answers what is at a service's certificates.
func (c *call) certificates(sc *registration.Scope) (*answer, error) {
	svc, err := c.cfg.Scopes.Service(c.r.Context(), sc.ID)
	if err != nil {
		return nil, conflict("The provisioning service is being deleted.")
	}
	ctx, match, name := c.r.Context(), c.r.Header.Get("If-Match"), c.next()
	var got *registration.CACertificate
	switch verb := strings.ToLower(c.next()); {
	case name == "":
		if err := c.method(http.MethodGet); err != nil {
			return nil, err
		}
		all, err := svc.CACertificates(ctx)
		if err != nil {
			return nil, err
		}
		shown := []*certificate{}
		for _, one := range all {
			s, err := showCertificate(sc, one)
			if err != nil {
				return nil, err
			}
			shown = append(shown, s)
		}
		return ok(struct { // no list: Azure's has no nextLink here
			Value []*certificate `json:"value"`
		}{shown}), nil
	case registration.CheckCertificateName(name) != nil:
		return nil, bad("%v", registration.CheckCertificateName(name))
	case verb == "":
		if err := c.method(http.MethodGet, http.MethodPut, http.MethodDelete); err != nil {
			return nil, err
		}
		switch c.r.Method {
		case http.MethodGet:
			got, err = svc.CACertificate(ctx, name)
		case http.MethodPut:
			var in struct {
				Certificate string `json:"certificate"`
				IsVerified  *bool  `json:"isVerified"`
				Properties  *struct {
					Certificate string `json:"certificate"`
					IsVerified  *bool  `json:"isVerified"`
				} `json:"properties"`
			}
			if err := c.body(&in); err != nil {
				return nil, err
			}
			if p := in.Properties; p != nil {
				in.Certificate, in.IsVerified = p.Certificate, p.IsVerified
			}
			got, err = svc.PutCACertificate(ctx, c.by, name, in.Certificate, in.IsVerified, match)
		default:
			if err := svc.DeleteCACertificate(ctx, c.by, name, match); err != nil {
				return nil, err
			}
			return &answer{http.StatusNoContent, nil}, nil
		}
	case verb == "generateverificationcode" || verb == "verify":
		if err := c.method(http.MethodPost); err != nil {
			return nil, err
		}
		if verb == "verify" {
			var in struct {
				Certificate string `json:"certificate"`
			}
			if err := c.body(&in); err != nil {
				return nil, err
			}
			got, err = svc.VerifyCACertificate(ctx, c.by, name, in.Certificate, match)
			break
		}
		if got, err = svc.NewVerificationCode(ctx, c.by, name, match); err != nil {
			return nil, err
		}
		s, err := showCertificate(sc, got)
		if err == nil {
			s.Properties.Certificate, s.Properties.VerificationCode = got.DER, got.Code
		}
		return ok(s), err
	default:
		return nil, errPath
	}
	if err != nil {
		return nil, err
	}
	s, err := showCertificate(sc, got)
	return ok(s), err
}
