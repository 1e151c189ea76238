package main

import (
	"context"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/keyfile"
	"github.com/touchmark/touchmark/hsm/sealing"
	"github.com/touchmark/touchmark/pkg/ca"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/ledger"
	"github.com/touchmark/touchmark/templates"
)

type initOptions struct {
	dir, idScope, endpoint, keyURI, subject, name, prefix string
	issuingKey, issuingChain, counter                     string
	owners                                                []string
}

func newInit(a *app) *cobra.Command {
	o := &initOptions{}
	c := &cobra.Command{
		Use:   "init DIR --id-scope SCOPE",
		Short: "Make a line: its CA, its station key, its ledger and its profiles",
		Long: `init makes the directory of a line: touchmark.toml, a root and an issuing CA, the station key that signs bundles and
the ledger (public half in station.pem), a recipient key for files that are sealed to the line (recipient.txt), an empty
ledger, and profiles to start from.

Keys are made where --key-uri says. By default that is a folder of encrypted key files in the line; for a factory it is
a PKCS#11 token, which keys made there never leave.`,
		Example: `  touchmark init line-3 --id-scope 0ne00112233
  touchmark init line-3 --id-scope 0ne00112233 \
      --key-uri 'pkcs11:token=line-3?module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=file:/run/secrets/pin'`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.dir = args[0]
			return a.runInit(cmd.Context(), o)
		},
	}
	f := c.Flags()
	f.StringVar(&o.idScope, "id-scope", "", "ID scope that devices are stamped with (required)")
	f.StringVar(&o.endpoint, "global-endpoint", dps.DefaultGlobalEndpoint, "host that devices find their registration service at")
	f.StringVar(&o.keyURI, "key-uri", "file:"+keysDir, "where the line's keys are: file:DIR or pkcs11:…")
	f.StringVar(&o.subject, "subject", "", "organization named in the CA certificates (default: the line's name)")
	f.StringVar(&o.name, "name", "", "the line's name (default: the directory's)")
	f.StringVar(&o.prefix, "key-prefix", "", "put this before the names of the line's keys, where lines share a token")
	f.StringVar(&o.issuingKey, "issuing-key", "", "name of an issuing CA's key that is in the store already, with --issuing-chain")
	f.StringVar(&o.issuingChain, "issuing-chain", "", "PEM file with the issuing CA's certificate and those above it, for stations that share one")
	f.StringArrayVar(&o.owners, "owner", nil, "PEM file with the public key of whoever signs production orders: the line makes nothing without one then; may be repeated")
	f.StringVar(&o.counter, "counter", "", "tie the ledger to a new counter of this name in the token, so that a copy of it is refused")
	_ = c.MarkFlagRequired("id-scope")
	c.MarkFlagsRequiredTogether("issuing-key", "issuing-chain")
	return c
}

func (a *app) runInit(ctx context.Context, o *initOptions) (err error) {
	dir, err := filepath.Abs(o.dir)
	if err != nil {
		return err
	}
	if o.name == "" {
		o.name = filepath.Base(dir)
	}
	if !hsm.ValidName(o.name) || len(o.name) > 60 {
		return usageError{fmt.Errorf("the line's name %q: want 1 to 60 letters, digits and -._ (say --name)", o.name)}
	}
	if o.subject == "" {
		o.subject = o.name
	}
	if err := dps.CheckIDScope(o.idScope); err != nil {
		return usageError{err}
	}
	if err := checkHost(o.endpoint); err != nil {
		return usageError{fmt.Errorf("--global-endpoint: %w", err)}
	}
	if _, err := os.Lstat(dir); err == nil {
		return hint(fmt.Errorf("%s exists already", dir), "a line is made once; choose another directory")
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}

	// Everything is made in a directory beside its place and renamed there at the end: a line is there whole or not at all.
	tmp, err := os.MkdirTemp(filepath.Dir(dir), "."+filepath.Base(dir)+".*")
	var file *fs.PathError
	if errors.As(err, &file) {
		err = file.Err
	}
	if err != nil {
		return fmt.Errorf("making line %s: %w", dir, err)
	}
	made := &line{dir: tmp}
	var store hsm.Store
	var keys []string
	counter := ""
	defer func() {
		if err == nil {
			return
		}
		if counters, ok := store.(hsm.CounterStore); ok && counter != "" {
			err = errors.Join(err, counters.DeleteCounter(context.WithoutCancel(ctx), counter))
		}
		for _, name := range keys { // what was made in a token does not outlive the line that it was for
			err = errors.Join(err, store.Delete(context.WithoutCancel(ctx), name))
		}
		if store != nil {
			err = errors.Join(err, store.Close())
		}
		err = errors.Join(err, os.RemoveAll(tmp))
	}()
	made.Name, made.IDScope, made.GlobalEndpoint = o.name, o.idScope, o.endpoint
	made.Keys.Root, made.Keys.Issuing = o.prefix+"root-ca", o.prefix+"issuing-ca"
	made.Keys.Station, made.Keys.Recipient = o.prefix+"station", o.prefix+"recipient"
	uri, err := hsm.ParseURI(o.keyURI)
	if err != nil {
		return usageError{err}
	}
	made.Orders.Counter = o.counter
	made.Store = uri.String() // without a PIN, should there be one in it
	if uri.Scheme == hsm.SchemeFile {
		if err := a.createKeyFiles(ctx, uri, tmp); err != nil {
			return err
		}
	}
	if store, err = a.openStore(ctx, o.keyURI, tmp); err != nil {
		return err
	}
	make := func(name string, usage hsm.Usage) (hsm.Key, error) {
		k, err := store.Generate(ctx, hsm.Spec{Name: name, Algorithm: hsm.ECP256, Usage: usage})
		if err != nil {
			if errors.Is(err, hsm.ErrExists) {
				err = hint(err, "another line has its keys there: say --key-prefix NAME-")
			}
			return nil, err
		}
		keys = append(keys, name)
		return k, nil
	}
	if o.issuingKey != "" {
		err = a.shareAuthority(ctx, made, store, o)
	} else {
		err = a.makeAuthorities(made, make, o.subject)
	}
	if err != nil {
		return err
	}
	if len(o.owners) > 0 && o.counter == "" {
		a.note("warning: nothing tells the line's ledger from a copy of it, and two copies make an order twice before the service notices: say --counter NAME, which needs a token")
	}
	if err := made.copyOwners(o.owners); err != nil {
		return err
	}
	recipient := ""
	k, err := make(made.Keys.Recipient, hsm.Agree)
	switch {
	case errors.Is(err, hsm.ErrUnsupported):
		a.note("the line has no recipient key, so group keys cannot be brought in: %v", err)
		made.Keys.Recipient = ""
	case err != nil:
		return err
	default:
		agreement, err := hsm.AgreementKeyOf(k)
		if err != nil {
			return err
		}
		if recipient, err = sealing.Recipient(agreement); err != nil {
			return err
		}
		if err := writeFile(made.path(recipientFile), []byte(recipient+"\n"), 0o644, false); err != nil {
			return err
		}
	}
	if k, err = make(made.Keys.Station, ""); err != nil {
		return err
	}
	station, err := hsm.SigningKeyOf(k)
	if err != nil {
		return err
	}
	pub, err := publicPEM(station.Public())
	if err != nil {
		return err
	}
	config, err := toml.Marshal(made.lineConfig)
	if err != nil {
		return err
	}
	for name, content := range map[string][]byte{
		stationFile:       pub,
		stationConfigFile: []byte(templates.Station()),
		lineFile:          append([]byte("# A touchmark line. Relative paths count from this file's directory.\n\n"), config...),
	} {
		if err := writeFile(made.path(name), content, 0o644, false); err != nil {
			return err
		}
	}
	for _, sub := range []string{profilesDir, templatesDir} {
		if err := os.Mkdir(made.path(sub), 0o755); err != nil {
			return err
		}
	}
	for name, text := range templates.Profiles() {
		if err := writeFile(filepath.Join(made.path(profilesDir), name+".toml"), []byte(text), 0o644, false); err != nil {
			return err
		}
	}
	if err := ledger.Create(ctx, ledger.Config{Path: made.path(ledgerFile), Origin: made.origin(), Signer: station}); err != nil {
		return err
	}
	if o.counter != "" {
		if err := anchorNew(ctx, made, store, station, o.counter); err != nil {
			return err
		}
		counter = o.counter
	}
	if err := os.Chmod(tmp, 0o755); err != nil {
		return err
	}
	if err := os.Rename(tmp, dir); err != nil {
		return err
	}
	if err := syncDir(filepath.Dir(dir)); err != nil {
		return err
	}
	closeErr := store.Close()
	store, keys, counter = nil, nil, ""
	if closeErr != nil {
		return closeErr
	}
	if a.json {
		return a.printJSON(map[string]any{"line": dir, "idScope": o.idScope, "station": filepath.Join(dir, stationFile), "recipient": recipient})
	}
	fmt.Fprintf(a.out, "Made line %s in %s\n\n", o.name, dir)
	rows := [][]string{{"  station key", filepath.Join(dir, stationFile), "give it to whoever imports bundles"}}
	if recipient != "" {
		rows = append(rows, []string{"  recipient", recipient, "files for this line are sealed to it"})
	}
	return a.table(nil, append(rows, []string{"  profiles", filepath.Join(dir, profilesDir), "what products look like"}))
}

// createKeyFiles makes the folder of a key-file store, asking twice where it asks.
func (a *app) createKeyFiles(ctx context.Context, uri hsm.URI, base string) error {
	path := uri.Path
	if !filepath.IsAbs(path) {
		path = filepath.Join(base, path)
	}
	asked := false
	pass, err := uri.ResolvePIN(ctx, hsm.PINConfig{Base: base, Env: a.env, Prompt: func(ctx context.Context, what string) (hsm.Secret, error) {
		asked = true
		return a.askNew(ctx, what)
	}})
	if err != nil {
		return err
	}
	defer pass.Wipe()
	if len(pass) == 0 {
		return refusedError{errors.New("the passphrase is empty")}
	}
	// The store is opened again right after this, and must not ask a third time.
	if asked {
		a.env = withEnv(a.env, "TOUCHMARK_PASSPHRASE", string(pass))
	}
	return keyfile.Create(path, pass)
}

func withEnv(env func(string) (string, bool), name, value string) func(string) (string, bool) {
	return func(n string) (string, bool) {
		if n == name {
			return value, true
		}
		return env(n)
	}
}

// shareAuthority has the line issue with a CA whose key is in its store already, as stations do that share a token.
func (a *app) shareAuthority(ctx context.Context, l *line, store hsm.Store, o *initOptions) error {
	chain, err := readCertificates(o.issuingChain)
	if err != nil {
		return usageError{fmt.Errorf("--issuing-chain: %w", err)}
	}
	key, err := openSigner(ctx, store, o.issuingKey)
	if err != nil {
		return err
	}
	if _, err := ca.NewIssuer(ca.Config{Signer: key, Certificate: chain[0], Chain: chain[1:]}); err != nil {
		return usageError{fmt.Errorf("--issuing-chain: %w", err)}
	}
	l.Keys.Root, l.Keys.Issuing = "", o.issuingKey
	if err := writeFile(l.path(rootFile), ca.EncodeChain(chain[len(chain)-1]), 0o644, false); err != nil {
		return err
	}
	return writeFile(l.path(issuingFile), ca.EncodeChain(chain...), 0o644, false)
}

// copyOwners keeps the public keys of those who may order in the line's directory.
func (l *line) copyOwners(files []string) error {
	for i, file := range files {
		pub, err := readPublicKey(file)
		if err != nil {
			return err
		}
		text, err := publicPEM(pub)
		if err != nil {
			return err
		}
		name := "owner.pem"
		if i > 0 {
			name = fmt.Sprintf("owner-%d.pem", i+1)
		}
		if err := writeFile(l.path(name), text, 0o644, false); err != nil {
			return err
		}
		l.Orders.Owners = append(l.Orders.Owners, name)
	}
	l.Orders.Required = len(files) > 0
	return nil
}

// anchorNew makes the counter of a new ledger and ties the two.
func anchorNew(ctx context.Context, l *line, store hsm.Store, station hsm.SigningKey, name string) (err error) {
	counters, ok := store.(hsm.CounterStore)
	if !ok {
		return usageError{fmt.Errorf("--counter: %s keeps no counters: %w", store.URI(), hsm.ErrUnsupported)}
	}
	counter, err := counters.CreateCounter(ctx, name)
	if err != nil {
		return fmt.Errorf("making the counter %q: %w", name, err)
	}
	led, err := ledger.Open(ctx, ledger.Config{Path: l.path(ledgerFile), Origin: l.origin(), Signer: station})
	if err == nil {
		err = errors.Join(led.Anchor(ctx, counter), led.Close())
	}
	if err != nil {
		err = errors.Join(err, counters.DeleteCounter(ctx, name))
	}
	return err
}

// makeAuthorities makes the root and the issuing CA of a line.
func (a *app) makeAuthorities(l *line, make func(string, hsm.Usage) (hsm.Key, error), organization string) error {
	k, err := make(l.Keys.Root, "")
	if err != nil {
		return err
	}
	rootKey, err := hsm.SigningKeyOf(k)
	if err != nil {
		return err
	}
	if k, err = make(l.Keys.Issuing, ""); err != nil {
		return err
	}
	issuingKey, err := hsm.SigningKeyOf(k)
	if err != nil {
		return err
	}
	now := time.Now()
	root, err := ca.NewRoot(ca.AuthorityConfig{
		Subject: pkix.Name{Organization: []string{organization}, CommonName: l.Name + " Root CA"}, Signer: rootKey, Now: now, Validity: 30 * 365 * 24 * time.Hour,
	})
	if err != nil {
		return fmt.Errorf("making the root CA: %w", err)
	}
	issuing, err := ca.NewIssuing(ca.AuthorityConfig{
		Subject: pkix.Name{Organization: []string{organization}, CommonName: l.Name + " Issuing CA"}, Signer: issuingKey, Now: now, Validity: 20 * 365 * 24 * time.Hour,
	}, root, rootKey)
	if err != nil {
		return fmt.Errorf("making the issuing CA: %w", err)
	}
	if err := writeFile(l.path(rootFile), ca.EncodeChain(root), 0o644, false); err != nil {
		return err
	}
	// The root stands last: whoever needs the chain has it in one file, and stamps leave the root out.
	return writeFile(l.path(issuingFile), ca.EncodeChain(issuing, root), 0o644, false)
}
