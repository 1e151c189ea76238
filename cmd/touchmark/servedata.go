package main

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"filippo.io/age"

	"github.com/touchmark/touchmark/hsm/signed"
	"github.com/touchmark/touchmark/pkg/bundle"
	"github.com/touchmark/touchmark/pkg/ca"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/emulate"
	"github.com/touchmark/touchmark/pkg/evidence"
	"github.com/touchmark/touchmark/pkg/filelock"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/serviceapi"
)

// The files of a service's data directory.
const (
	storeFile      = "service.db"
	dataKeyFile    = "data.key"
	scopeFile      = "id-scope.txt"
	identityFile   = "recipient.key"
	caFile         = "ca.pem"
	caKeyFile      = "ca.key"
	connectionFile = "owner.connection"
	trustDir       = "trust"
	ownersDir      = "owners"
)

const lockFile = "service.lock"

const ownerPolicy = "provisioningserviceowner"

// serviceData is what a service keeps beside its store: a data directory, or, without one, memory.
type serviceData struct {
	dir             string             // empty: nothing is kept
	seed            emulate.Seed       // what secrets are made of where nothing is kept; nil: chance
	stations        []crypto.PublicKey // trusted beside those in the trust folder
	scope           string
	identity        *age.X25519Identity
	recipient       string
	managementToken string // may everything
	// share has what all replicas have of sharedFiles, once the store is open. With secretsShared the store alone keeps the secret ones.
	share         func(name string, local []byte, make func() ([]byte, error)) ([]byte, error)
	secretsShared bool
	caPEM         []byte // of the service's own CA; set by certificate, nil where TLS has files
}

func (d *serviceData) path(name string) string { return filepath.Join(d.dir, name) }

// open takes a data directory, and makes it where there is none. It is the caller's until the lock is closed.
func (d *serviceData) open(dir string) (*os.File, error) {
	var err error
	if d.dir, err = filepath.Abs(dir); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(d.dir, 0o700); err != nil {
		return nil, err
	}
	lock, err := filelock.Lock(d.path(lockFile))
	if err != nil {
		err = fmt.Errorf("opening the service's directory %s: %w", d.dir, err)
	}
	return lock, err
}

// store is where the store is: a file, or empty for memory.
func (d *serviceData) store() string {
	if d.dir == "" {
		return ""
	}
	return d.path(storeFile)
}

// ensure reads a file, or makes it. Each is written whole before it has its name, so a first start that is killed leaves
// files that the next one takes as they are. Where nothing is kept it makes what it is asked for.
func (d *serviceData) ensure(name string, mode fs.FileMode, make func() ([]byte, error)) ([]byte, error) {
	if d.dir == "" {
		return make()
	}
	b, err := readSmall(d.path(name))
	there := err == nil
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	switch shared := d.share != nil && slices.Contains(sharedFiles, name); {
	case shared:
		b, err = d.share(name, b, make)
		there = there || d.secretsShared && mode == 0o600
	case !there:
		b, err = make()
	}
	if there || err != nil {
		return b, err
	}
	return b, writeFile(d.path(name), b, mode, false)
}

func (d *serviceData) load(o *serveOptions) error {
	scope, err := d.ensure(scopeFile, 0o644, func() ([]byte, error) {
		if o.idScope != "" {
			return []byte(o.idScope + "\n"), dps.CheckIDScope(o.idScope)
		}
		return fmt.Appendf(nil, "0ne%X\n", d.seed.Bytes("ID scope", 4)), nil
	})
	if err != nil {
		return usageError{fmt.Errorf("ID scope: %w", err)}
	}
	d.scope = strings.TrimSpace(string(scope))
	if err := dps.CheckIDScope(d.scope); err != nil {
		return fmt.Errorf("%s: %w", d.path(scopeFile), err)
	}
	if o.idScope != "" && o.idScope != d.scope {
		return usageError{fmt.Errorf("the service in %s has ID scope %s, not %s: it was decided at its first start", d.dir, d.scope, o.idScope)}
	}
	identity, err := d.ensure(identityFile, 0o600, func() ([]byte, error) {
		id, err := d.seed.Identity("recipient")
		if err != nil {
			return nil, err
		}
		return []byte(id.String() + "\n"), nil
	})
	if err != nil {
		return fmt.Errorf("recipient key: %w", err)
	}
	if d.identity, err = age.ParseX25519Identity(strings.TrimSpace(string(identity))); err != nil {
		return fmt.Errorf("%s is not an age identity", d.path(identityFile)) // the parser's error may show it
	}
	d.recipient = d.identity.Recipient().String()
	_, err = d.ensure(recipientFile, 0o644, func() ([]byte, error) { return []byte(d.recipient + "\n"), nil })
	return err
}

// owner returns the owner's policy, made at the first start.
func (d *serviceData) owner(ctx context.Context, store registration.Store) (*registration.Policy, error) {
	var p *registration.Policy
	err := store.Update(ctx, func(tx registration.Tx) (err error) {
		p, err = tx.Policy(dps.Fold(d.scope), ownerPolicy)
		if !errors.Is(err, registration.ErrNotFound) {
			return err
		}
		p = &registration.Policy{Name: ownerPolicy, Rights: "ServiceConfig, DeviceConnect, EnrollmentWrite",
			Primary: d.seed.Bytes("owner's primary key", 32), Secondary: d.seed.Bytes("owner's secondary key", 32)}
		return tx.PutPolicy(dps.Fold(d.scope), p)
	})
	return p, err
}

// connection returns the owner's connection string, which is a secret.
func connection(p *registration.Policy, address string) string {
	host := strings.TrimSuffix(address, ":443")
	return fmt.Sprintf("HostName=%s;SharedAccessKeyName=%s;SharedAccessKey=%s", host, p.Name, base64.StdEncoding.EncodeToString(p.Primary))
}

// writeConnection writes the owner's connection string anew: the address may be another one than last time.
func (d *serviceData) writeConnection(p *registration.Policy, address string) error {
	return writeFile(d.path(connectionFile), []byte(connection(p, address)+"\n"), 0o600, true)
}

// caFile is what devices must trust, where it is the service's own and kept.
func (d *serviceData) caFile(o *serveOptions) string {
	if len(o.front.tlsCerts) > 0 || d.dir == "" {
		return ""
	}
	return d.path(caFile)
}

// renewBefore is how long before its end a certificate of the service's own is made anew.
const renewBefore = 30 * 24 * time.Hour

// certificate returns where TLS gets a certificate of the small CA's from. It is renewed in time while the service runs.
func (d *serviceData) certificate(o *serveOptions) (func(*tls.ClientHelloInfo) (*tls.Certificate, error), error) {
	keyPEM, err := d.ensure(caKeyFile, 0o600, func() ([]byte, error) {
		key, err := d.seed.Key("service CA")
		if err != nil {
			return nil, err
		}
		return keyPEM(key)
	})
	if err != nil {
		return nil, err
	}
	key, err := parseKeyPEM(keyPEM)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", d.path(caKeyFile), err)
	}
	if d.caPEM, err = d.ensure(caFile, 0o644, func() ([]byte, error) {
		c, err := d.authority("service CA", "touchmark service "+d.scope, key)
		if err != nil {
			return nil, err
		}
		return ca.EncodeChain(c), nil
	}); err != nil {
		return nil, err
	}
	root, err := ca.ParseChain(d.caPEM)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", d.path(caFile), err)
	}
	var current atomic.Pointer[tls.Certificate]
	make := func() (*tls.Certificate, error) {
		c, err := d.serverCertificate(root[0], key, o.tlsNames())
		if err == nil {
			current.Store(c)
		}
		return c, err
	}
	if _, err := make(); err != nil {
		return nil, err
	}
	return func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
		c := current.Load()
		if time.Until(c.Leaf.NotAfter) > renewBefore {
			return c, nil
		}
		return make() // two at once make two; either serves
	}, nil
}

// authority makes a root CA. Under a seed it is the same to the last octet in every run.
func (d *serviceData) authority(label, name string, key crypto.Signer) (*x509.Certificate, error) {
	begin, length := d.seed.Validity()
	return ca.NewRoot(ca.AuthorityConfig{Subject: pkix.Name{CommonName: name}, Signer: d.seed.Signer(key), Now: begin, Validity: length, Rand: d.seed.Reader(label + ", serial number")})
}

// serverCertificate makes a TLS certificate that lives in memory only: a year long, for the service's names and this
// machine's.
func (d *serviceData) serverCertificate(root *x509.Certificate, key crypto.Signer, names []string) (*tls.Certificate, error) {
	leafKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	serial := make([]byte, 16)
	if _, err := rand.Read(serial); err != nil {
		return nil, err
	}
	now := time.Now()
	t := &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes(serial), Subject: pkix.Name{CommonName: names[0]}, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(365 * 24 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback},
	}
	for _, n := range names {
		if ip := net.ParseIP(n); ip != nil {
			t.IPAddresses = append(t.IPAddresses, ip)
		} else if n != "localhost" {
			t.DNSNames = append(t.DNSNames, n)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, t, root, leafKey.Public(), key)
	if err != nil {
		return nil, err
	}
	leaf, err := x509.ParseCertificate(der)
	return &tls.Certificate{Certificate: [][]byte{der, root.Raw}, PrivateKey: leafKey, Leaf: leaf}, err
}

func keyPEM(key crypto.Signer) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

func parseKeyPEM(b []byte) (crypto.Signer, error) {
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, errors.New("holds no PEM")
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	signer, ok := key.(crypto.Signer)
	if err != nil || !ok {
		return nil, errors.New("holds no PKCS #8 private key")
	}
	return signer, nil
}

// importBundle takes a bundle as it comes in. It is kept first, verified to its last octet, and only then imported: an upload
// that breaks off imports nothing.
func (d *serviceData) importBundle(ctx context.Context, svc *registration.Service, in serviceapi.ImportRequest) (registration.ImportResult, error) {
	f, err := d.spool(in.Body)
	if err != nil {
		return registration.ImportResult{}, err
	}
	defer f.Close()
	return d.takeBundle(ctx, svc, f, in)
}

// maxInMemory bounds a bundle that comes in where nothing is written to disk.
const maxInMemory = 256 << 20

// spool keeps an upload: in a file without a name in the data directory, which shows no secret that is not sealed, or in
// memory.
func (d *serviceData) spool(body io.Reader) (io.ReadSeekCloser, error) {
	if d.dir == "" {
		b, err := io.ReadAll(io.LimitReader(body, maxInMemory+1))
		switch {
		case err != nil:
			return nil, dps.NewError(dps.CodeBundleCorrupt, "The bundle did not arrive whole", err)
		case len(b) > maxInMemory:
			return nil, dps.NewError(dps.CodeTooLarge, "The bundle is too large for a service that keeps all in memory", nil)
		}
		return memory{bytes.NewReader(b)}, nil
	}
	f, err := os.CreateTemp(d.dir, ".upload-*")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil { // nameless: a crash leaves nothing behind
		return nil, errors.Join(err, f.Close())
	}
	if _, err := io.Copy(f, body); err != nil {
		_ = f.Close()
		var onDisk *fs.PathError // the file's own errors; those of the connection are others
		if errors.As(err, &onDisk) {
			return nil, dps.NewError(dps.CodeServiceOverloaded, "The service has no room for the bundle, or cannot write it", err)
		}
		return nil, dps.NewError(dps.CodeBundleCorrupt, "The bundle did not arrive whole", err)
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

type memory struct{ *bytes.Reader }

func (memory) Close() error { return nil }

// identityOf returns what keys in bundles for a scope are sealed to. Other scopes than the first have one of their own each, that
// follows from the first one's: else a tenant who came by another's bundle could put its sealed keys into one for its own scope,
// and read them there.
func (d *serviceData) identityOf(scope string) (*age.X25519Identity, error) {
	if dps.Fold(scope) == dps.Fold(d.scope) {
		return d.identity, nil
	}
	seed, err := hkdf.Extract(sha256.New, []byte(d.identity.String()), []byte("touchmark recipient of a scope, version 1"))
	if err != nil {
		return nil, err
	}
	return emulate.Seed(seed).Identity(dps.Fold(scope))
}

// recipientOf returns the public half of identityOf.
func (d *serviceData) recipientOf(scope string) (string, error) {
	id, err := d.identityOf(scope)
	if err != nil {
		return "", err
	}
	return id.Recipient().String(), nil
}

// takeBundle verifies a bundle, which stands at its beginning, and imports it. The request's body is not looked at.
func (d *serviceData) takeBundle(ctx context.Context, svc *registration.Service, f io.ReadSeeker, in serviceapi.ImportRequest) (registration.ImportResult, error) {
	var none registration.ImportResult
	identity, err := d.identityOf(svc.Scope())
	if err != nil {
		return none, err
	}
	cfg := bundle.OpenConfig{Identities: []age.Identity{identity}}
	if cfg.Trusted, err = d.trusted(svc.Scope(), in.Trust); err != nil {
		return none, err
	}
	if in.Residency != "" {
		if cfg.RequireResidency, err = evidence.ParseResidency(in.Residency); err != nil {
			return none, dps.NewError(dps.CodeBadRequest, "Touchmark-Residency: "+err.Error(), err)
		}
	}
	sum, err := bundle.Verify(f, cfg)
	if err != nil {
		return none, bundleError(err)
	}
	if dps.Fold(sum.IDScope) != dps.Fold(svc.Scope()) {
		return none, dps.NewError(dps.CodeBundleScope, fmt.Sprintf("The bundle is for ID scope %s, this is %s", sum.IDScope, svc.Scope()), nil)
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return none, err
	}
	r, err := bundle.Open(f, cfg)
	if err != nil {
		return none, bundleError(err)
	}
	defer r.Close()
	holders := cfg.Trusted
	if in.Holder != nil {
		holder, err := vouched("Touchmark-Holder", in.Holder)
		if err != nil {
			return none, err
		}
		holders = append(slices.Clip(holders), holder)
	}
	res, err := svc.Import(ctx, r.Entries(), registration.ImportConfig{
		Station: r.KeyID(), Grant: r.Grant(), Holders: holders, RequireOrder: in.RequireOrder, DryRun: in.DryRun, By: in.By})
	if errors.Is(err, registration.ErrOrder) {
		err = dps.NewError(dps.CodeBundleOrder, strings.ToUpper(err.Error()[:1])+err.Error()[1:], err)
	}
	return res, err
}

func bundleError(err error) error {
	switch {
	case errors.Is(err, signed.ErrUntrusted):
		return dps.NewError(dps.CodeBundleUntrusted, "The bundle is not signed by a station that this service trusts", err)
	case errors.Is(err, evidence.ErrResidency):
		return dps.NewError(dps.CodeBundleResidency, "The bundle does not show where its devices' keys live: "+err.Error(), err)
	case errors.Is(err, bundle.ErrSealed):
		return dps.NewError(dps.CodeBundleSealed, "The bundle's keys are sealed to somebody else: mint with this service's recipient", err)
	case errors.Is(err, bundle.ErrCorrupt):
		return dps.NewError(dps.CodeBundleCorrupt, "The bundle is damaged: "+err.Error(), err)
	}
	return err
}

// trusted returns whom an import trusts: the stations in the trust folder or named at the start, and the one that the caller
// vouches for. Other scopes than the first have trust folders of their own, below scopes/ and their folded ID.
func (d *serviceData) trusted(scope string, station []byte) (keys []crypto.PublicKey, err error) {
	if dps.Fold(scope) == dps.Fold(d.scope) {
		keys, err = d.keys(trustDir)
		keys = append(keys, d.stations...)
	} else {
		keys, err = d.keys(filepath.Join("scopes", dps.Fold(scope), trustDir))
	}
	if err != nil || station == nil {
		return keys, err
	}
	pub, err := vouched("Touchmark-Trust", station)
	return append(keys, pub), err
}

// keys reads the public keys in a folder.
func (d *serviceData) keys(dir string) ([]crypto.PublicKey, error) {
	if d.dir == "" {
		return nil, nil
	}
	var keys []crypto.PublicKey
	files, err := filepath.Glob(filepath.Join(d.path(dir), "*.pem"))
	if err != nil {
		return nil, err
	}
	for _, f := range files {
		pub, err := readPublicKey(f)
		if err != nil {
			return nil, err
		}
		keys = append(keys, pub)
	}
	return keys, nil
}

// vouched reads a public key that came in a header.
func vouched(header string, text []byte) (crypto.PublicKey, error) {
	block, _ := pem.Decode(text)
	if block == nil || block.Type != "PUBLIC KEY" {
		return nil, dps.NewError(dps.CodeBadRequest, header+" is not a PEM public key", nil)
	}
	pub, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return nil, dps.NewError(dps.CodeBadRequest, header+" is not a public key", err)
	}
	return pub, nil
}

// owners puts the keys of new owners into the owners folder, and returns all that are in it.
func (d *serviceData) owners(files []string) ([]crypto.PublicKey, error) {
	if d.dir != "" {
		if err := os.MkdirAll(d.path(ownersDir), 0o700); err != nil {
			return nil, err
		}
	}
	var named []crypto.PublicKey
	for _, f := range files {
		pub, err := readPublicKey(f)
		if err != nil {
			return nil, fmt.Errorf("--owner: %w", err)
		}
		id, err := signed.KeyID(pub)
		if err != nil {
			return nil, usageError{fmt.Errorf("--owner %s: %w", f, err)}
		}
		if _, err := d.ensure(filepath.Join(ownersDir, id+".pem"), 0o644, func() ([]byte, error) { return publicPEM(pub) }); err != nil {
			return nil, err
		}
		named = append(named, pub)
	}
	if d.dir == "" {
		return named, nil
	}
	return d.keys(ownersDir)
}
