package main

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/keyfile"
	"github.com/touchmark/touchmark/hsm/pkcs11"
	"github.com/touchmark/touchmark/pkg/ca"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/mint"
	"github.com/touchmark/touchmark/pkg/settings"
	"github.com/touchmark/touchmark/templates"
)

// lineConfig is touchmark.toml, the configuration of a line. Its comments are the manual.
type lineConfig struct {
	// name of the line: it stands in the ledger's checkpoints and the certificates' names.
	Name string `toml:"name"`
	// id-scope and global-endpoint go into every stamp.
	IDScope        string `toml:"id-scope"`
	GlobalEndpoint string `toml:"global-endpoint"`
	// store is the key URI of the line's keys: file:DIR, or pkcs11:token=…?module-path=…&pin-source=….
	// Relative paths count from the line's directory.
	Store string `toml:"store"`
	// keys names the keys in the store. There is no recipient where the store cannot agree on secrets.
	Keys struct {
		Root      string `toml:"root,omitempty"` // where the line made it itself
		Issuing   string `toml:"issuing"`
		Station   string `toml:"station"`
		Recipient string `toml:"recipient,omitempty"`
	} `toml:"keys"`
	// orders is how the line works with production orders.
	Orders ordersConfig `toml:"orders,omitempty"`
}

// ordersConfig is the table [orders] of touchmark.toml.
type ordersConfig struct {
	// required has mint and station refuse to start without a production order.
	Required bool `toml:"required,omitempty"`
	// owners are PEM files with the public keys of those who may order, beside touchmark.toml.
	Owners []string `toml:"owners,omitempty"`
	// holders are PEM files with the public keys of the stations that may cut leases for this one.
	Holders []string `toml:"holders,omitempty"`
	// counter is the name of a counter in the line's store, or in counter-store, that a copied or restored ledger is told by.
	// touchmark ledger anchor makes it. Key files have none.
	Counter string `toml:"counter,omitempty"`
	// counter-store is the key URI of the token or TPM with the counter, where that is another than the line's store.
	CounterStore string `toml:"counter-store,omitempty"`
}

// The files of a line.
const (
	lineFile      = "touchmark.toml"
	ledgerFile    = "ledger.db"
	stationFile   = "station.pem"
	recipientFile = "recipient.txt"
	rootFile      = "root.pem"
	issuingFile   = "issuing.pem"
	profilesDir   = "profiles"
	templatesDir  = "templates"
	keysDir       = "keys"
)

// line is a line's directory, its configuration read.
type line struct {
	dir string
	lineConfig
}

func (a *app) loadLine(dir string) (*line, error) {
	if dir == "" {
		dir = a.getenv("TOUCHMARK_LINE")
	}
	if dir == "" {
		return nil, usageError{errors.New("which line? name its directory with --line, or in TOUCHMARK_LINE")}
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	path := filepath.Join(dir, lineFile)
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, hint(usageError{fmt.Errorf("%s is not a line: it has no %s", dir, lineFile)}, "touchmark init %s makes one", dir)
	}
	if err != nil {
		return nil, err
	}
	l := &line{dir: dir}
	faults := settings.Decode(path, b, &l.lineConfig)
	if err := dps.CheckIDScope(l.IDScope); err != nil {
		faults.Key("id-scope", "id-scope: %v", err)
	}
	for _, must := range [][2]string{{"name", l.Name}, {"global-endpoint", l.GlobalEndpoint}, {"store", l.Store},
		{"keys.issuing", l.Keys.Issuing}, {"keys.station", l.Keys.Station}} {
		if must[1] == "" {
			faults.Key(must[0], "%s is missing", must[0])
		}
	}
	if l.Orders.Required && len(l.Orders.Owners) == 0 {
		faults.Key("orders.required", "orders.required needs orders.owners: whose orders count here?")
	}
	if l.Orders.CounterStore != "" && l.Orders.Counter == "" {
		faults.Key("orders.counter-store", "orders.counter-store needs orders.counter")
	}
	if err := faults.Err(); err != nil {
		return nil, err
	}
	return l, nil
}

func (l *line) path(name string) string { return filepath.Join(l.dir, name) }

// openStore opens the key store that a URI names. Relative paths in it count from base.
func (a *app) openStore(ctx context.Context, raw, base string) (hsm.Store, error) {
	uri, err := hsm.ParseURI(raw)
	if err != nil {
		return nil, usageError{err}
	}
	for _, w := range uri.Warnings() {
		a.note("warning: %s", w)
	}
	pin := func(ctx context.Context) (hsm.Secret, error) {
		return uri.ResolvePIN(ctx, hsm.PINConfig{Base: base, Env: a.env, Prompt: func(ctx context.Context, what string) (hsm.Secret, error) {
			return a.askSecret(ctx, what)
		}})
	}
	switch uri.Scheme {
	case hsm.SchemeFile:
		store, err := keyfile.Open(ctx, keyfile.Config{Dir: under(base, uri.Path), Passphrase: pin})
		if err != nil {
			return nil, err // and not a nil pointer that is no nil interface
		}
		return store, nil
	case hsm.SchemeTPM:
		store, err := a.openTPM(ctx, uri, base, pin)
		if err != nil {
			return nil, err
		}
		return store, nil
	}
	store, err := pkcs11.Open(ctx, pkcs11.Config{URI: uri, PIN: pin})
	if err != nil {
		return nil, err
	}
	return store, nil
}

// under returns a path as it counts from base.
func under(base, path string) string {
	if path == "" || filepath.IsAbs(path) {
		return path
	}
	return filepath.Join(base, path)
}

func (a *app) openLineStore(ctx context.Context, l *line) (hsm.Store, error) {
	return a.openStore(ctx, l.Store, l.dir)
}

func openSigner(ctx context.Context, store hsm.Store, name string) (hsm.SigningKey, error) {
	k, err := store.Open(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("opening key %q: %w", name, err)
	}
	return hsm.SigningKeyOf(k)
}

// stationPublic reads the public half of the station key, which needs no PIN.
func (l *line) stationPublic() (crypto.PublicKey, error) { return readPublicKey(l.path(stationFile)) }

// origin names the line's ledger in its checkpoints.
func (l *line) origin() string { return "touchmark/" + l.Name }

// profile loads a profile by name, and returns the hex SHA-256 of its file, too.
func (l *line) profile(name string) (*mint.Profile, string, error) {
	if !hsm.ValidName(name) {
		return nil, "", usageError{fmt.Errorf("profile %q: want letters, digits and -._", name)}
	}
	b, err := readSmall(filepath.Join(l.path(profilesDir), name+".toml"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, "", usageError{fmt.Errorf("profile %q is not in %s (there are: %s)", name, l.path(profilesDir), strings.Join(l.profileNames(), ", "))}
	}
	if err != nil {
		return nil, "", err
	}
	p, err := mint.LoadProfile(name, bytes.NewReader(b))
	return p, profileHash(b), err
}

// profileHash names what a profile says.
func profileHash(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

func (l *line) profileNames() []string {
	entries, _ := os.ReadDir(l.path(profilesDir))
	var names []string
	for _, e := range entries {
		if n, ok := strings.CutSuffix(e.Name(), ".toml"); ok && hsm.ValidName(n) {
			names = append(names, n)
		}
	}
	return names
}

// templateFS is where a line's own templates are; built-in ones are found without it.
func (l *line) templateFS() fs.FS { return os.DirFS(l.path(templatesDir)) }

// issuer opens the issuing CA.
func (l *line) issuer(ctx context.Context, store hsm.Store) (*ca.Issuer, error) {
	chain, err := readCertificates(l.path(issuingFile))
	if err != nil {
		return nil, err
	}
	key, err := openSigner(ctx, store, l.Keys.Issuing)
	if err != nil {
		return nil, err
	}
	return ca.NewIssuer(ca.Config{Signer: key, Certificate: chain[0], Chain: chain[1:]})
}

// prepare makes ready to issue leaves of a profile.
func (l *line) prepare(issuer *ca.Issuer, p *mint.Profile, columns []string) (*ca.Prepared, error) {
	text, err := templates.Certificate(p.Certificate.Template, l.templateFS())
	if err != nil {
		return nil, usageError{fmt.Errorf("profile %s: %w", p.Name, err)}
	}
	return issuer.Prepare(p.CertificateProfile(text, columns))
}

// stampTemplates resolves a profile's stamp files.
func (l *line) stampTemplates(p *mint.Profile) ([]*templates.File, error) {
	var out []*templates.File
	for _, s := range p.Stamp.File {
		t, err := templates.Parse(s.Template, l.templateFS())
		if err != nil {
			return nil, usageError{fmt.Errorf("profile %s: %w", p.Name, err)}
		}
		out = append(out, t)
	}
	return out, nil
}

// maxPEM bounds the small files that are read whole.
const maxPEM = 1 << 20

func readSmall(path string) ([]byte, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if st.Size() > maxPEM {
		return nil, fmt.Errorf("%s is larger than %d octets", path, maxPEM)
	}
	return os.ReadFile(path)
}

func readCertificates(path string) ([]*x509.Certificate, error) {
	b, err := readSmall(path)
	if err != nil {
		return nil, err
	}
	certs, err := ca.ParseChain(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return certs, nil
}

// readPublicKey reads a PEM public key, or the key of a PEM certificate.
func readPublicKey(path string) (crypto.PublicKey, error) {
	b, err := readSmall(path)
	if err != nil {
		return nil, usageError{fmt.Errorf("reading a public key: %w", err)}
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, usageError{fmt.Errorf("%s holds no PEM", path)}
	}
	pub, err := parsePublic(block)
	if err != nil {
		return nil, usageError{fmt.Errorf("%s: %w", path, err)}
	}
	return pub, nil
}

func parsePublic(block *pem.Block) (crypto.PublicKey, error) {
	switch block.Type {
	case "PUBLIC KEY":
		return x509.ParsePKIXPublicKey(block.Bytes)
	case "CERTIFICATE":
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		return cert.PublicKey, nil
	}
	return nil, fmt.Errorf("it holds a %s, want a PUBLIC KEY or a CERTIFICATE", block.Type)
}

// writeFile puts a file in place whole: written beside it, flushed, renamed, the directory flushed. Without force nothing
// is overwritten.
func writeFile(path string, data []byte, mode fs.FileMode, force bool) (err error) {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*")
	var file *fs.PathError
	if errors.As(err, &file) {
		return fmt.Errorf("writing %s: %w", path, file.Err) // the temporary file's name tells nobody anything
	}
	if err != nil {
		return err
	}
	tmp := f.Name()
	defer func() {
		if err != nil {
			_ = os.Remove(tmp)
		}
	}()
	if err := errors.Join(f.Chmod(mode), writeAll(f, data), f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	if force {
		err = os.Rename(tmp, path)
	} else if err = os.Link(tmp, path); err == nil {
		err = os.Remove(tmp)
	}
	if errors.Is(err, fs.ErrExist) {
		return hint(fmt.Errorf("%s exists already", path), "say --force to overwrite it")
	}
	if err != nil {
		return err
	}
	return syncDir(dir)
}

func writeAll(f *os.File, b []byte) error {
	_, err := f.Write(b)
	return err
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// lineFlag adds --line to a command.
func lineFlag(c *cobra.Command, dst *string) {
	c.Flags().StringVar(dst, "line", "", "the line's directory (default: $TOUCHMARK_LINE)")
	_ = c.MarkFlagDirname("line")
}
