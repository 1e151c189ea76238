package hsm

import (
	"context"
	"crypto/x509"
)

// An Identity says which token, or which other store, something was made in, in its maker's words. It is no secret and no
// proof by itself.
type Identity struct {
	Label              string `json:"label,omitempty"`
	Serial             string `json:"serial,omitempty"`
	Manufacturer       string `json:"manufacturer,omitempty"`
	Model              string `json:"model,omitempty"`
	Firmware           string `json:"firmware,omitempty"`
	Module             string `json:"module,omitempty"`
	ModuleVersion      string `json:"moduleVersion,omitempty"`
	ModuleManufacturer string `json:"moduleManufacturer,omitempty"`
}

// An Identifier can say which token it is.
type Identifier interface {
	Identity(ctx context.Context) (Identity, error)
}

// A Certificate is a certificate on a token, under a name. A key of the same name is its key.
type Certificate struct {
	Name        string
	Certificate *x509.Certificate
}

// A CertificateStore holds certificates beside its keys. Names are unique among them.
type CertificateStore interface {
	// PutCertificate stores a certificate. The error is ErrExists when the name is taken, ErrFull when there is no room.
	PutCertificate(ctx context.Context, name string, cert *x509.Certificate) error
	// Certificates returns those whose name begins with prefix, sorted by name.
	Certificates(ctx context.Context, prefix string) ([]Certificate, error)
	// DeleteCertificate removes one. The error is ErrNotFound when there is none of that name.
	DeleteCertificate(ctx context.Context, name string) error
}

// Data is a data object: octets under a name, which mean something to an application.
type Data struct {
	Name        string
	Application string
	Value       []byte
	// Private objects are shown after a login only.
	Private bool
}

// A DataStore holds data objects beside its keys. Names are unique among them.
type DataStore interface {
	// PutData stores an object. The error is ErrExists when the name is taken, ErrFull when there is no room.
	PutData(ctx context.Context, d Data) error
	// Data returns those whose name begins with prefix, sorted by name.
	Data(ctx context.Context, prefix string) ([]Data, error)
	// DeleteData removes one. The error is ErrNotFound when there is none of that name.
	DeleteData(ctx context.Context, name string) error
}
