package main

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"filippo.io/age"
	"filippo.io/age/armor"
	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/sealing"
	"github.com/touchmark/touchmark/pkg/dps"
)

type keyOptions struct {
	line, store     string
	name, algorithm string
	in              string
	yes             bool
	extractable     bool
	create          bool
}

// storeFlags adds the ways to say which key store a command works on.
func storeFlags(c *cobra.Command, o *keyOptions) {
	lineFlag(c, &o.line)
	c.Flags().StringVar(&o.store, "store", "", "a key URI, instead of the store of a line")
}

func newKey(a *app) *cobra.Command {
	list, mk, imp, del := &keyOptions{}, &keyOptions{}, &keyOptions{}, &keyOptions{}
	listCmd := &cobra.Command{
		Use: "list", Short: "List the keys of a store, with what the store says about them", Args: cobra.NoArgs,
		Example: "  touchmark key list --line line-3\n  touchmark key list --store 'pkcs11:token=line-3?module-path=/usr/lib/softhsm/libsofthsm2.so'",
		RunE:    func(cmd *cobra.Command, _ []string) error { return a.runKeyList(cmd.Context(), list) },
	}
	storeFlags(listCmd, list)
	newCmd := &cobra.Command{
		Use: "new --name NAME", Short: "Make a key that never leaves the store", Args: cobra.NoArgs,
		Example: "  touchmark key new --line line-3 --name spare --algorithm EC-P384\n  touchmark key new --store file:office --create --name owner",
		RunE:    func(cmd *cobra.Command, _ []string) error { return a.runKeyNew(cmd.Context(), mk) },
	}
	storeFlags(newCmd, mk)
	newCmd.Flags().StringVar(&mk.name, "name", "", "the key's name (required)")
	newCmd.Flags().StringVar(&mk.algorithm, "algorithm", string(hsm.ECP256), fmt.Sprintf("one of %v", hsm.Algorithms))
	newCmd.Flags().BoolVar(&mk.extractable, "extractable", false, "let the key be wrapped out of the store later (touchmark key wrap); without it, it never can")
	newCmd.Flags().BoolVar(&mk.create, "create", false, "make the folder of key files that --store names, if it is not there yet")
	_ = newCmd.MarkFlagRequired("name")
	_ = newCmd.RegisterFlagCompletionFunc("algorithm", func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		var names []string
		for _, alg := range hsm.Algorithms {
			names = append(names, string(alg))
		}
		return names, cobra.ShellCompDirectiveNoFileComp
	})
	importCmd := &cobra.Command{
		Use: "import --name NAME --in SEALED", Short: "Bring a group key into the line's store from a file that was sealed to it", Args: cobra.NoArgs,
		Long: `import opens a file that was sealed to the line's recipient key (see touchmark group key) and puts the key in it into the
line's store, where it cannot be read again. The key is in memory for that moment and never on disk in the clear.`,
		Example: "  touchmark key import --line line-3 --name group-key --in pumps.sealed",
		RunE:    func(cmd *cobra.Command, _ []string) error { return a.runKeyImport(cmd.Context(), imp) },
	}
	lineFlag(importCmd, &imp.line)
	importCmd.Flags().StringVar(&imp.name, "name", "", "what to call the key (required)")
	importCmd.Flags().StringVar(&imp.in, "in", "", "the sealed file, or - for standard input (required)")
	_ = importCmd.MarkFlagRequired("name")
	_ = importCmd.MarkFlagRequired("in")
	deleteCmd := &cobra.Command{
		Use: "delete --name NAME", Short: "Destroy a key", Args: cobra.NoArgs,
		Example: "  touchmark key delete --line line-3 --name spare --yes",
		RunE:    func(cmd *cobra.Command, _ []string) error { return a.runKeyDelete(cmd.Context(), del) },
	}
	storeFlags(deleteCmd, del)
	deleteCmd.Flags().StringVar(&del.name, "name", "", "the key's name (required)")
	deleteCmd.Flags().BoolVar(&del.yes, "yes", false, "do not ask")
	_ = deleteCmd.MarkFlagRequired("name")
	return parent("key", "Keys that stay where they were made", append(append(a.keyUses(), a.evidenceCommands()...), listCmd, newCmd, importCmd, deleteCmd, newKeyWrap(a), newKeyUnwrap(a))...)
}

// withStore opens the store that the options name, and closes it after f.
func (a *app) withStore(ctx context.Context, o *keyOptions, f func(hsm.Store, *line) error) (err error) {
	var store hsm.Store
	var l *line
	if o.store != "" {
		if o.line != "" {
			return usageError{errors.New("--line and --store exclude each other")}
		}
		wd, err := os.Getwd()
		if err != nil {
			return err
		}
		if store, err = a.openStore(ctx, o.store, wd); err != nil {
			return err
		}
	} else {
		if l, err = a.loadLine(o.line); err != nil {
			return err
		}
		if store, err = a.openLineStore(ctx, l); err != nil {
			return err
		}
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	return f(store, l)
}

// keyRow is a key as key list and key new show it.
type keyRow struct {
	Name       string         `json:"name"`
	Algorithm  hsm.Algorithm  `json:"algorithm"`
	Usage      hsm.Usage      `json:"usage"`
	URI        string         `json:"uri"`
	Attributes hsm.Attributes `json:"attributes"`
	PublicKey  string         `json:"publicKey,omitempty"` // PEM
}

func describeKey(ctx context.Context, k hsm.Key) (keyRow, error) {
	attr, err := k.Attributes(ctx)
	if err != nil {
		return keyRow{}, fmt.Errorf("reading the attributes of key %q: %w", k.Name(), err)
	}
	r := keyRow{Name: k.Name(), Algorithm: k.Algorithm(), Usage: k.Usage(), URI: k.URI(), Attributes: attr}
	if s, ok := k.(crypto.Signer); ok && k.Usage() == hsm.Sign {
		b, err := publicPEM(s.Public())
		if err != nil {
			return r, err
		}
		r.PublicKey = string(b)
	}
	return r, nil
}

func (a *app) runKeyList(ctx context.Context, o *keyOptions) error {
	return a.withStore(ctx, o, func(store hsm.Store, _ *line) error {
		lister, ok := store.(hsm.Lister)
		if !ok {
			return fmt.Errorf("listing keys of %s: %w", store.URI(), hsm.ErrUnsupported)
		}
		keys, err := lister.List(ctx, "")
		if err != nil {
			return err
		}
		var rows [][]string
		for _, k := range keys {
			r, err := describeKey(ctx, k)
			if err != nil {
				return err
			}
			if a.json {
				if err := a.printJSON(r); err != nil {
					return err
				}
				continue
			}
			rows = append(rows, []string{r.Name, string(r.Algorithm), string(r.Usage), yesNo(r.Attributes.Extractable), yesNo(r.Attributes.Local)})
		}
		if a.json {
			return nil
		}
		return a.table([]string{"NAME", "ALGORITHM", "USAGE", "EXTRACTABLE", "MADE HERE"}, rows)
	})
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

// checkName refuses a name that no store would take, before a token is asked.
func (o *keyOptions) checkName() error {
	_, err := hsm.Spec{Name: o.name, Algorithm: hsm.HMACSHA256}.Resolved()
	if err != nil {
		return usageError{err}
	}
	return nil
}

func (a *app) runKeyNew(ctx context.Context, o *keyOptions) error {
	if err := o.checkName(); err != nil {
		return err
	}
	alg, err := hsm.ParseAlgorithm(o.algorithm)
	if err != nil {
		return usageError{err}
	}
	if o.create {
		uri, err := hsm.ParseURI(o.store)
		if err != nil || uri.Scheme != hsm.SchemeFile {
			return usageError{errors.Join(fmt.Errorf("--create goes with --store file:DIR"), err)}
		}
		if !exists(uri.Path) {
			if err := a.createKeyFiles(ctx, uri, ""); err != nil {
				return err
			}
		}
	}
	return a.withStore(ctx, o, func(store hsm.Store, _ *line) error {
		k, err := store.Generate(ctx, hsm.Spec{Name: o.name, Algorithm: alg, Extractable: o.extractable})
		if err != nil {
			return err
		}
		r, err := describeKey(ctx, k)
		if err != nil {
			return err
		}
		if a.json {
			return a.printJSON(r)
		}
		fmt.Fprintf(a.out, "%s\n%s", r.URI, r.PublicKey)
		return nil
	})
}

func (a *app) runKeyDelete(ctx context.Context, o *keyOptions) error {
	return a.withStore(ctx, o, func(store hsm.Store, l *line) error {
		if l != nil && slices.Contains([]string{l.Keys.Root, l.Keys.Issuing, l.Keys.Station, l.Keys.Recipient}, o.name) {
			a.note("warning: the line cannot work without key %s", o.name)
		}
		if err := a.confirm(ctx, o.yes, "deleting key "+o.name, o.name); err != nil {
			return err
		}
		if err := store.Delete(ctx, o.name); err != nil {
			return err
		}
		if a.json {
			return a.printJSON(map[string]any{"deleted": o.name})
		}
		fmt.Fprintf(a.out, "Deleted key %s\n", o.name)
		return nil
	})
}

// sealedGroupKey is what a sealed group key file holds.
type sealedGroupKey struct {
	Group      string `json:"group"`
	PrimaryKey string `json:"primaryKey"` // base64
}

// maxSealed bounds a sealed key file.
const maxSealed = 64 << 10

func (a *app) runKeyImport(ctx context.Context, o *keyOptions) error {
	if err := o.checkName(); err != nil {
		return err
	}
	sealed, err := a.readInput(o.in, maxSealed)
	if err != nil {
		return err
	}
	return a.withStore(ctx, o, func(store hsm.Store, l *line) error {
		if l.Keys.Recipient == "" {
			return hint(fmt.Errorf("line %s has no recipient key: %w", l.Name, hsm.ErrUnsupported), "its token cannot agree on secrets (touchmark token show), so nothing can be sealed to it")
		}
		k, err := store.Open(ctx, l.Keys.Recipient)
		if err != nil {
			return fmt.Errorf("opening the recipient key: %w", err)
		}
		agreement, err := hsm.AgreementKeyOf(k)
		if err != nil {
			return err
		}
		plain, err := unseal(sealed, sealing.Identity(agreement))
		if err != nil {
			var none *age.NoIdentityMatchError
			if errors.As(err, &none) {
				return hint(refusedError{fmt.Errorf("%s was not sealed to this line", o.in)}, "the line's recipient is in %s", l.path(recipientFile))
			}
			return fmt.Errorf("opening %s: %w", o.in, err)
		}
		defer plain.Wipe()
		var doc sealedGroupKey
		if err := json.Unmarshal(plain, &doc); err != nil || doc.PrimaryKey == "" {
			return fmt.Errorf("%s opens, and holds no group key", o.in)
		}
		if err := dps.CheckGroupID(doc.Group); err != nil {
			return fmt.Errorf("%s opens, and names no group: %w", o.in, err)
		}
		secret, err := base64.StdEncoding.DecodeString(doc.PrimaryKey)
		if err != nil || len(secret) < 16 || len(secret) > 64 {
			return fmt.Errorf("%s opens, and its key is not base64 of 16 to 64 octets", o.in)
		}
		key := hsm.Secret(secret)
		defer key.Wipe()
		made, err := store.Import(ctx, hsm.Spec{Name: o.name, Algorithm: hsm.HMACSHA256}, key)
		if err != nil {
			return err
		}
		r, err := describeKey(ctx, made)
		if err != nil {
			return err
		}
		if r.Attributes.Extractable {
			return errors.Join(fmt.Errorf("the store says that key %q can be read out again, so it was deleted", o.name), store.Delete(ctx, o.name))
		}
		if a.json {
			return a.printJSON(map[string]any{"name": r.Name, "group": doc.Group, "uri": r.URI, "attributes": r.Attributes})
		}
		fmt.Fprintf(a.out, "Imported the key of group %s as %s; it cannot be read out again\n", doc.Group, r.Name)
		return nil
	})
}

// unseal opens an age file, armored or not.
func unseal(sealed []byte, identities ...age.Identity) (hsm.Secret, error) {
	var in io.Reader = bytes.NewReader(sealed)
	if bytes.HasPrefix(sealed, []byte(armor.Header)) {
		in = armor.NewReader(in)
	}
	r, err := age.Decrypt(in, identities...)
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(io.LimitReader(r, maxSealed))
	return b, err
}

// openInput opens a file, or standard input for "-". The caller closes it.
func (a *app) openInput(path string) (io.ReadCloser, error) {
	if path == "-" {
		return io.NopCloser(a.in), nil
	}
	return openFile(path)
}

// readInput reads a small file, or standard input for "-".
func (a *app) readInput(path string, limit int64) ([]byte, error) {
	in, err := a.openInput(path)
	if err != nil {
		return nil, err
	}
	defer in.Close()
	b, err := io.ReadAll(io.LimitReader(in, limit+1))
	if err == nil && int64(len(b)) > limit {
		err = fmt.Errorf("%s is larger than %d octets", path, limit)
	}
	return b, err
}

func publicPEM(pub crypto.PublicKey) ([]byte, error) {
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), nil
}
