package main

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"filippo.io/age"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/touchmark/touchmark/hsm/signed"
	"github.com/touchmark/touchmark/pkg/bundle"
	"github.com/touchmark/touchmark/pkg/ca"
	"github.com/touchmark/touchmark/pkg/door"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/evidence"
	"github.com/touchmark/touchmark/pkg/filelock"
	"github.com/touchmark/touchmark/pkg/httpd"
	"github.com/touchmark/touchmark/pkg/mqttd"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/sqlstore"
)

type serveOptions struct {
	data, https, mqtt string
	hubs, hostnames   []string
	idScope           string
	tlsCert, tlsKey   string
	mqttDelay         time.Duration
	owners            []string
	requireOrders     bool
	issue             issueOptions

	httpsAsked bool
}

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

func newServe(a *app) *cobra.Command {
	o := &serveOptions{}
	c := &cobra.Command{
		Use:   "serve --data DIR",
		Short: "Run the registration service that devices meet at their first power-on",
		Long: `serve answers devices over HTTPS and MQTT as Azure IoT Hub DPS does, so that Azure's device SDKs register against it
unchanged, and operators over the service API.

The first start makes what is missing in the data directory: an ID scope, a TLS certificate from a small CA of its own
(ca.pem, which devices must trust), the owner's connection string (owner.connection), and a key that secrets in bundles
are sealed to (recipient.txt). Public keys of stations in its trust folder are trusted for every import, and production
orders count that owners signed whose public keys are in its owners folder: --owner puts one there.`,
		Example: `  touchmark serve --data service --hub hub-a.example.net --hub hub-b.example.net
  touchmark serve --data service --https 127.0.0.1:8443 --mqtt off --hub hub-a.example.net --json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.httpsAsked = cmd.Flags().Changed("https")
			return a.runServe(cmd.Context(), o)
		},
	}
	f := c.Flags()
	f.StringVar(&o.data, "data", "", "directory that the service keeps everything in (required)")
	f.StringVar(&o.https, "https", ":443", "address of the HTTPS door, or off; where 443 is not permitted, 8443")
	f.StringVar(&o.mqtt, "mqtt", ":8883", "address of the MQTT door, or off")
	f.StringArrayVar(&o.hubs, "hub", nil, "host name of a hub that devices may be assigned to; again for more")
	f.StringArrayVar(&o.hostnames, "hostname", nil, "name that the service is reached by, for its certificate and tokens; again for more (default: localhost)")
	f.StringVar(&o.idScope, "id-scope", "", "ID scope that a first start takes, instead of a random one")
	f.StringVar(&o.tlsCert, "tls-cert", "", "PEM file with the certificate chain for TLS, instead of one of the service's own")
	f.StringVar(&o.tlsKey, "tls-key", "", "PEM file with its private key")
	f.DurationVar(&o.mqttDelay, "mqtt-response-delay", 60*time.Millisecond, "pause between a PUBACK and its response, which Azure's Java SDK needs; 0 for none")
	f.StringArrayVar(&o.owners, "owner", nil, "PEM file with the public key of an owner whose production orders count, from now on; again for more")
	f.BoolVar(&o.requireOrders, "require-orders", false, "refuse every bundle that was not made on a production order of an owner's")
	o.issue.flags(c)
	_ = c.MarkFlagRequired("data")
	_ = c.MarkFlagDirname("data")
	c.MarkFlagsRequiredTogether("tls-cert", "tls-key")
	return c
}

func (a *app) runServe(ctx context.Context, o *serveOptions) (err error) {
	if o.https == "off" && o.mqtt == "off" {
		return usageError{errors.New("both doors are off")}
	}
	for _, h := range append(o.hubs, o.hostnames...) {
		if err := checkHost(h); err != nil {
			return usageError{err}
		}
	}
	if len(o.hostnames) == 0 {
		o.hostnames = []string{"localhost"}
	}
	dir, err := filepath.Abs(o.data)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	lock, err := filelock.Lock(filepath.Join(dir, lockFile))
	if err != nil {
		return fmt.Errorf("opening the service's directory %s: %w", dir, err)
	}
	defer lock.Close()
	d := &serviceData{dir: dir}
	if err := d.load(o); err != nil {
		return err
	}
	level := slog.LevelInfo
	if a.quiet {
		level = slog.LevelWarn
	}
	log := slog.New(slog.NewTextHandler(a.err, &slog.HandlerOptions{Level: level}))
	store, err := sqlstore.Open(ctx, sqlstore.Config{Path: filepath.Join(dir, storeFile), DataKey: d.dataKey})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	owner, err := d.owner(ctx, store)
	if err != nil {
		return err
	}
	if len(o.hubs) == 0 {
		a.note("no --hub is named: devices will register and fail with 400208, no hub could be chosen")
	}
	owners, err := d.owners(o.owners)
	if err != nil {
		return err
	}
	if o.requireOrders && len(owners) == 0 {
		return hint(usageError{errors.New("--require-orders without an owner would refuse every bundle")}, "name the owner's public key with --owner owner.pem")
	}
	cfg := registration.Config{Store: store, Scope: d.scope, Hubs: o.hubs, Owners: owners, RequireOrders: o.requireOrders, Log: log}
	closeIssuers, err := a.openIssuers(ctx, &o.issue, &cfg)
	defer func() { err = errors.Join(err, closeIssuers()) }()
	if err != nil {
		return err
	}
	svc := registration.New(cfg)
	certificate, err := d.certificate(o)
	if err != nil {
		return err
	}

	listenHTTPS, err := a.listenHTTPS(o)
	if err != nil {
		return err
	}
	listenMQTT, err := listen("mqtt", o.mqtt)
	if err != nil {
		if listenHTTPS != nil {
			err = errors.Join(err, listenHTTPS.Close())
		}
		return err
	}
	ready := map[string]any{"ready": true, "idScope": d.scope, "caFile": d.caFile(o), "recipient": d.recipient}
	eg, ctx := errgroup.WithContext(ctx)
	if listenHTTPS != nil {
		address := reachable(listenHTTPS, o.hostnames[0])
		if err := d.writeConnection(owner, address); err != nil {
			return err
		}
		ready["https"], ready["connectionStringFile"] = address, filepath.Join(dir, connectionFile)
		front := httpd.New(httpd.Config{
			Door:      door.New(door.Config{TLS: door.TLSConfig(certificate, "http/1.1"), Log: log}),
			Registrar: svc, Service: svc, Hosts: append(o.hostnames, "localhost", "127.0.0.1", "::1"), Recipient: d.recipient, Log: log,
			Import: func(ctx context.Context, r httpd.ImportRequest) (registration.ImportResult, error) {
				return d.importBundle(ctx, svc, r)
			},
		})
		eg.Go(func() error { return front.Serve(ctx, listenHTTPS) })
	}
	if listenMQTT != nil {
		ready["mqtt"] = reachable(listenMQTT, o.hostnames[0])
		if o.mqttDelay == 0 {
			o.mqttDelay = -1
		}
		mqtt := mqttd.New(mqttd.Config{Registrar: svc, Log: log, ResponseDelay: o.mqttDelay})
		eg.Go(func() error {
			return door.New(door.Config{TLS: door.TLSConfig(certificate), Log: log}).Serve(ctx, listenMQTT, mqtt.Handle)
		})
	}
	if a.json {
		if err := a.printJSON(ready); err != nil {
			return err
		}
	} else {
		a.printReady(ready)
	}
	err = eg.Wait()
	if ctx.Err() != nil && (err == nil || errors.Is(err, context.Canceled)) {
		a.note("stopped; everybody who was there has been answered")
		return nil
	}
	return err
}

func (a *app) printReady(ready map[string]any) {
	rows := [][]string{{"Registration service", "ready"}, {"  ID scope", fmt.Sprint(ready["idScope"])}}
	for _, r := range [][2]string{{"https", "HTTPS"}, {"mqtt", "MQTT"}, {"caFile", "CA for devices"}, {"connectionStringFile", "owner's connection"}, {"recipient", "recipient"}} {
		if v, ok := ready[r[0]]; ok && v != "" {
			rows = append(rows, []string{"  " + r[1], fmt.Sprint(v)})
		}
	}
	_ = a.table(nil, rows)
}

func listen(what, address string) (net.Listener, error) {
	if address == "off" {
		return nil, nil
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		err = fmt.Errorf("opening the %s door: %w", what, err)
		var address *net.AddrError
		var name *net.DNSError
		if errors.As(err, &address) || errors.As(err, &name) {
			return nil, hint(usageError{err}, "--%s wants HOST:PORT, :PORT or off", what)
		}
		if errors.Is(err, syscall.EADDRINUSE) {
			return nil, hint(err, "another program listens there: stop it, or choose another address with --%s", what)
		}
		return nil, err
	}
	return l, nil
}

func (a *app) listenHTTPS(o *serveOptions) (net.Listener, error) {
	l, err := listen("https", o.https)
	if errors.Is(err, fs.ErrPermission) && !o.httpsAsked {
		a.note("port 443 is not permitted here: the HTTPS door opens on 8443; Azure's device SDKs expect 443")
		return listen("https", ":8443")
	}
	return l, err
}

// reachable names a listener as a caller on this machine would: by host name where it listens on every address.
func reachable(l net.Listener, host string) string {
	a := l.Addr().(*net.TCPAddr)
	if !a.IP.IsUnspecified() && !a.IP.IsLoopback() {
		host = a.IP.String()
	}
	return net.JoinHostPort(host, fmt.Sprint(a.Port))
}

// serviceData is a service's data directory.
type serviceData struct {
	dir       string
	scope     string
	dataKey   []byte
	identity  *age.X25519Identity
	recipient string
}

func (d *serviceData) path(name string) string { return filepath.Join(d.dir, name) }

// ensure reads a file, or makes it. Each is written whole before it has its name, so a first start that is killed leaves
// files that the next one takes as they are.
func (d *serviceData) ensure(name string, mode fs.FileMode, make func() ([]byte, error)) ([]byte, error) {
	b, err := readSmall(d.path(name))
	if !errors.Is(err, fs.ErrNotExist) {
		return b, err
	}
	if b, err = make(); err != nil {
		return nil, err
	}
	return b, writeFile(d.path(name), b, mode, false)
}

func (d *serviceData) load(o *serveOptions) error {
	scope, err := d.ensure(scopeFile, 0o644, func() ([]byte, error) {
		if o.idScope != "" {
			return []byte(o.idScope + "\n"), dps.CheckIDScope(o.idScope)
		}
		b := make([]byte, 4)
		_, err := rand.Read(b)
		return fmt.Appendf(nil, "0ne%X\n", b), err
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
	if d.dataKey, err = d.ensure(dataKeyFile, 0o600, func() ([]byte, error) {
		b := make([]byte, 32)
		_, err := rand.Read(b)
		return b, err
	}); err != nil {
		return fmt.Errorf("data key: %w", err)
	}
	identity, err := d.ensure(identityFile, 0o600, func() ([]byte, error) {
		id, err := age.GenerateX25519Identity()
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
		p = &registration.Policy{Name: ownerPolicy, Rights: "ServiceConfig, DeviceConnect, EnrollmentWrite", Primary: make([]byte, 32), Secondary: make([]byte, 32)}
		if _, err := rand.Read(p.Primary); err != nil {
			return err
		}
		if _, err := rand.Read(p.Secondary); err != nil {
			return err
		}
		return tx.PutPolicy(dps.Fold(d.scope), p)
	})
	return p, err
}

// writeConnection writes the owner's connection string anew: the address may be another one than last time.
func (d *serviceData) writeConnection(p *registration.Policy, address string) error {
	host := strings.TrimSuffix(address, ":443")
	text := fmt.Sprintf("HostName=%s;SharedAccessKeyName=%s;SharedAccessKey=%s\n", host, p.Name, base64.StdEncoding.EncodeToString(p.Primary))
	return writeFile(d.path(connectionFile), []byte(text), 0o600, true)
}

// caFile is what devices must trust, where it is the service's own.
func (d *serviceData) caFile(o *serveOptions) string {
	if o.tlsCert != "" {
		return ""
	}
	return d.path(caFile)
}

// renewBefore is how long before its end a certificate of the service's own is made anew.
const renewBefore = 30 * 24 * time.Hour

// certificate returns where TLS gets its certificate from: the files that were named, or one of the small CA's, which is
// renewed in time while the service runs.
func (d *serviceData) certificate(o *serveOptions) (func(*tls.ClientHelloInfo) (*tls.Certificate, error), error) {
	if o.tlsCert != "" {
		c, err := tls.LoadX509KeyPair(o.tlsCert, o.tlsKey)
		if err != nil {
			return nil, usageError{fmt.Errorf("--tls-cert and --tls-key: %w", err)}
		}
		return func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return &c, nil }, nil
	}
	keyPEM, err := d.ensure(caKeyFile, 0o600, newKeyPEM)
	if err != nil {
		return nil, err
	}
	key, err := parseKeyPEM(keyPEM)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", d.path(caKeyFile), err)
	}
	caPEM, err := d.ensure(caFile, 0o644, func() ([]byte, error) {
		c, err := ca.NewRoot(ca.AuthorityConfig{Subject: pkix.Name{CommonName: "touchmark service " + d.scope}, Signer: key, Now: time.Now().Add(-time.Hour), Validity: 20 * 365 * 24 * time.Hour})
		if err != nil {
			return nil, err
		}
		return ca.EncodeChain(c), nil
	})
	if err != nil {
		return nil, err
	}
	root, err := ca.ParseChain(caPEM)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", d.path(caFile), err)
	}
	var current atomic.Pointer[tls.Certificate]
	make := func() (*tls.Certificate, error) {
		c, err := d.serverCertificate(root[0], key, o.hostnames)
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

func newKeyPEM() ([]byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
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

// importBundle takes a bundle as it comes in. It is written to the data directory first, which shows no secret that is not
// sealed, verified to its last octet, and only then imported: an upload that breaks off imports nothing.
func (d *serviceData) importBundle(ctx context.Context, svc *registration.Service, in httpd.ImportRequest) (registration.ImportResult, error) {
	var none registration.ImportResult
	f, err := os.CreateTemp(d.dir, ".upload-*")
	if err != nil {
		return none, err
	}
	defer f.Close()
	if err := os.Remove(f.Name()); err != nil { // nameless: a crash leaves nothing behind
		return none, err
	}
	if _, err := io.Copy(f, in.Body); err != nil {
		var onDisk *fs.PathError // the file's own errors; those of the connection are others
		if errors.As(err, &onDisk) {
			return none, dps.NewError(dps.CodeServiceOverloaded, "The service has no room for the bundle, or cannot write it", err)
		}
		return none, dps.NewError(dps.CodeBundleCorrupt, "The bundle did not arrive whole", err)
	}
	cfg := bundle.OpenConfig{Identities: []age.Identity{d.identity}}
	if cfg.Trusted, err = d.trusted(in.Trust); err != nil {
		return none, err
	}
	if in.Residency != "" {
		if cfg.RequireResidency, err = evidence.ParseResidency(in.Residency); err != nil {
			return none, dps.NewError(dps.CodeBadRequest, "Touchmark-Residency: "+err.Error(), err)
		}
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return none, err
	}
	sum, err := bundle.Verify(f, cfg)
	if err != nil {
		return none, bundleError(err)
	}
	if dps.Fold(sum.IDScope) != dps.Fold(d.scope) {
		return none, dps.NewError(dps.CodeBundleScope, fmt.Sprintf("The bundle is for ID scope %s, this is %s", sum.IDScope, d.scope), nil)
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
		Station: r.KeyID(), Grant: r.Grant(), Holders: holders, RequireOrder: in.RequireOrder, DryRun: in.DryRun})
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

// trusted returns whom an import trusts: the stations in the trust folder, and the one that the caller vouches for.
func (d *serviceData) trusted(station []byte) ([]crypto.PublicKey, error) {
	keys, err := d.keys(trustDir)
	if err != nil || station == nil {
		return keys, err
	}
	pub, err := vouched("Touchmark-Trust", station)
	return append(keys, pub), err
}

// keys reads the public keys in a folder.
func (d *serviceData) keys(dir string) ([]crypto.PublicKey, error) {
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
	if err := os.MkdirAll(d.path(ownersDir), 0o700); err != nil {
		return nil, err
	}
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
	}
	return d.keys(ownersDir)
}
