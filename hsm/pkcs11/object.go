//go:build cgo

package pkcs11

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/miekg/pkcs11"

	"github.com/touchmark/touchmark/hsm"
)

// maxObject bounds a certificate or data object, in octets.
const maxObject = 64 << 10

// PutCertificate implements [hsm.CertificateStore]. The certificate takes the CKA_ID of the private key of its name, so that
// other programs pair the two.
func (s *Store) PutCertificate(ctx context.Context, name string, cert *x509.Certificate) error {
	if err := checkObject(name, len(cert.Raw)); err != nil {
		return fmt.Errorf("certificate %q: %w", name, err)
	}
	err := s.with(ctx, false, func(h pkcs11.SessionHandle) error {
		if err := s.vacant(h, pkcs11.CKO_CERTIFICATE, name); err != nil {
			return err
		}
		template := []*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_CERTIFICATE), pkcs11.NewAttribute(pkcs11.CKA_CERTIFICATE_TYPE, pkcs11.CKC_X_509),
			pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, false), pkcs11.NewAttribute(pkcs11.CKA_LABEL, name),
			pkcs11.NewAttribute(pkcs11.CKA_SUBJECT, cert.RawSubject), pkcs11.NewAttribute(pkcs11.CKA_ISSUER, cert.RawIssuer), pkcs11.NewAttribute(pkcs11.CKA_VALUE, cert.Raw),
		}
		keys, err := s.find(h, pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY), pkcs11.NewAttribute(pkcs11.CKA_LABEL, name), pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true))
		if err != nil {
			return err
		}
		if len(keys) == 1 {
			if id, err := s.attribute(h, keys[0], pkcs11.CKA_ID); err == nil && len(id) > 0 {
				template = append(template, pkcs11.NewAttribute(pkcs11.CKA_ID, id))
			}
		}
		_, err = s.mod.ctx.CreateObject(h, template)
		return notMade(err)
	})
	if err != nil {
		return fmt.Errorf("putting certificate %q on the token: %w", name, err)
	}
	return nil
}

// Certificates implements [hsm.CertificateStore].
func (s *Store) Certificates(ctx context.Context, prefix string) ([]hsm.Certificate, error) {
	var out []hsm.Certificate
	err := s.with(ctx, true, func(h pkcs11.SessionHandle) error {
		out = nil
		return s.each(h, pkcs11.CKO_CERTIFICATE, prefix, func(name string, o pkcs11.ObjectHandle) error {
			der, err := s.attribute(h, o, pkcs11.CKA_VALUE)
			if err != nil || len(der) > maxObject {
				return err
			}
			cert, err := x509.ParseCertificate(der)
			if err != nil {
				return nil // not X.509, or not as we know it: no business of ours
			}
			out = append(out, hsm.Certificate{Name: name, Certificate: cert})
			return nil
		})
	})
	slices.SortStableFunc(out, func(a, b hsm.Certificate) int { return strings.Compare(a.Name, b.Name) })
	return out, err
}

// DeleteCertificate implements [hsm.CertificateStore].
func (s *Store) DeleteCertificate(ctx context.Context, name string) error {
	return s.deleteObject(ctx, pkcs11.CKO_CERTIFICATE, "certificate", name)
}

// PutData implements [hsm.DataStore].
func (s *Store) PutData(ctx context.Context, d hsm.Data) error {
	if err := errors.Join(checkObject(d.Name, len(d.Value)), notCounter(d.Name)); err != nil {
		return fmt.Errorf("data %q: %w", d.Name, err)
	}
	err := s.with(ctx, false, func(h pkcs11.SessionHandle) error {
		if err := s.vacant(h, pkcs11.CKO_DATA, d.Name); err != nil {
			return err
		}
		_, err := s.mod.ctx.CreateObject(h, []*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_DATA), pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, d.Private),
			pkcs11.NewAttribute(pkcs11.CKA_LABEL, d.Name), pkcs11.NewAttribute(pkcs11.CKA_APPLICATION, d.Application), pkcs11.NewAttribute(pkcs11.CKA_VALUE, d.Value),
		})
		return notMade(err)
	})
	if err != nil {
		return fmt.Errorf("putting data %q on the token: %w", d.Name, err)
	}
	return nil
}

// Data implements [hsm.DataStore].
func (s *Store) Data(ctx context.Context, prefix string) ([]hsm.Data, error) {
	var out []hsm.Data
	err := s.with(ctx, true, func(h pkcs11.SessionHandle) error {
		out = nil
		return s.each(h, pkcs11.CKO_DATA, prefix, func(name string, o pkcs11.ObjectHandle) error {
			d := hsm.Data{Name: name}
			value, err := s.attribute(h, o, pkcs11.CKA_VALUE)
			if err != nil {
				return err
			}
			application, err := s.attribute(h, o, pkcs11.CKA_APPLICATION)
			if err != nil {
				return err
			}
			private, err := s.attribute(h, o, pkcs11.CKA_PRIVATE)
			if err != nil {
				return err
			}
			d.Value, d.Application, d.Private = value, string(application), len(private) == 1 && private[0] == 1
			out = append(out, d)
			return nil
		})
	})
	slices.SortStableFunc(out, func(a, b hsm.Data) int { return strings.Compare(a.Name, b.Name) })
	return out, err
}

// DeleteData implements [hsm.DataStore].
func (s *Store) DeleteData(ctx context.Context, name string) error {
	if err := notCounter(name); err != nil {
		return fmt.Errorf("data %q: %w", name, err)
	}
	return s.deleteObject(ctx, pkcs11.CKO_DATA, "data", name)
}

func notCounter(name string) error {
	if strings.HasPrefix(name, counterLabel) {
		return errors.New("names with " + counterLabel + " are those of counters")
	}
	return nil
}

func checkObject(name string, size int) error {
	if !hsm.ValidName(name) {
		return errors.New("its name wants 1 to 255 letters, digits or -._: characters")
	}
	if size == 0 || size > maxObject {
		return fmt.Errorf("it has %d octets: want 1 to %d", size, maxObject)
	}
	return nil
}

// vacant says hsm.ErrExists when an object of the class has the name: tokens would take a second one.
func (s *Store) vacant(h pkcs11.SessionHandle, class uint, name string) error {
	found, err := s.find(h, pkcs11.NewAttribute(pkcs11.CKA_CLASS, class), pkcs11.NewAttribute(pkcs11.CKA_LABEL, name), pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true))
	if err == nil && len(found) > 0 {
		err = hsm.ErrExists
	}
	return err
}

// each calls f with every object of a class whose name begins with prefix.
func (s *Store) each(h pkcs11.SessionHandle, class uint, prefix string, f func(string, pkcs11.ObjectHandle) error) error {
	found, err := s.find(h, pkcs11.NewAttribute(pkcs11.CKA_CLASS, class), pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true))
	if err != nil {
		return err
	}
	for _, o := range found {
		label, err := s.attribute(h, o, pkcs11.CKA_LABEL)
		if err != nil {
			return err
		}
		if name := string(bytes.TrimRight(label, "\x00")); strings.HasPrefix(name, prefix) {
			if err := f(name, o); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *Store) deleteObject(ctx context.Context, class uint, what, name string) error {
	err := s.with(ctx, true, func(h pkcs11.SessionHandle) error {
		found, err := s.find(h, pkcs11.NewAttribute(pkcs11.CKA_CLASS, class), pkcs11.NewAttribute(pkcs11.CKA_LABEL, name), pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true))
		if err != nil {
			return err
		}
		if len(found) == 0 {
			return hsm.ErrNotFound
		}
		for _, o := range found {
			if err := s.mod.ctx.DestroyObject(h, o); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("deleting %s %q: %w", what, name, err)
	}
	return nil
}
