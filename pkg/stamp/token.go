package stamp

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"

	"github.com/touchmark/touchmark/hsm"
)

// Application is what a stamp's data objects are for, in PKCS#11's words (CKA_APPLICATION).
const Application = "touchmark"

// ToToken puts a stamp into a device's own token: the certificate under the name of its key, so that other programs pair the
// two, and each file as a data object of its name; secret files are objects that only a login shows. Everything is read back.
// What is there already and the same is left, so a stamp that was cut off is finished by doing it again; what is there and
// differs is ErrExists, and nothing is overwritten.
func ToToken(ctx context.Context, store hsm.Store, keyName string, cert *x509.Certificate, files []File) error {
	certs, ok := store.(hsm.CertificateStore)
	data, ok2 := store.(hsm.DataStore)
	if !ok || !ok2 {
		return fmt.Errorf("stamping into %s: it holds no certificates and data objects: %w", store.URI(), hsm.ErrUnsupported)
	}
	if err := certs.PutCertificate(ctx, keyName, cert); err != nil && !errors.Is(err, hsm.ErrExists) {
		return err
	}
	for _, f := range files {
		err := data.PutData(ctx, hsm.Data{Name: f.Name, Application: Application, Value: f.Data, Private: f.Secret})
		if err != nil && !errors.Is(err, hsm.ErrExists) {
			return err
		}
	}
	have, err := certs.Certificates(ctx, keyName)
	if err != nil {
		return err
	}
	found := false
	for _, c := range have {
		if c.Name == keyName {
			if found = true; !c.Certificate.Equal(cert) {
				return fmt.Errorf("stamping into %s: %w: certificate %q is another one", store.URI(), ErrExists, keyName)
			}
		}
	}
	if !found {
		return fmt.Errorf("stamping into %s: certificate %q: %w", store.URI(), keyName, ErrMismatch)
	}
	objects, err := data.Data(ctx, "")
	if err != nil {
		return err
	}
	byName := make(map[string]hsm.Data, len(objects))
	for _, o := range objects {
		byName[o.Name] = o
	}
	for _, f := range files {
		o, ok := byName[f.Name]
		switch {
		case !ok:
			return fmt.Errorf("stamping into %s: %s: %w", store.URI(), f.Name, ErrMismatch)
		case !bytes.Equal(o.Value, f.Data):
			return fmt.Errorf("stamping into %s: %w: %s is another one", store.URI(), ErrExists, f.Name)
		case f.Secret && !o.Private:
			return fmt.Errorf("stamping into %s: %s shows without a login: %w", store.URI(), f.Name, ErrMismatch)
		}
	}
	return nil
}
