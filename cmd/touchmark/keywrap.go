package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/hsm"
)

type keyWrapOptions struct {
	keyOptions
	with  string
	out   string
	force bool
}

func newKeyWrap(a *app) *cobra.Command {
	o := &keyWrapOptions{}
	c := &cobra.Command{
		Use: "wrap --name NAME --with WRAPPING-KEY", Short: "Let a key out of a token, encrypted under an AES key", Args: cobra.NoArgs,
		Long: `wrap encrypts a key inside its token under another key of that token, and writes what comes out: a JSON document with the
encrypted key and its public half. touchmark key unwrap takes it into another token that has the same wrapping key.

Only a key that was made for it leaves its token: touchmark key new --extractable. The wrapping key is an AES-256 key. It is
AES key wrap with padding (RFC 5649).`,
		Example: `  touchmark key new --store 'pkcs11:token=line-3?module-path=/usr/lib/softhsm/libsofthsm2.so' --name mover --algorithm AES-256
  touchmark key wrap --line line-3 --name spare --with mover --out spare.wrapped`,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.runKeyWrap(cmd.Context(), o) },
	}
	storeFlags(c, &o.keyOptions)
	c.Flags().StringVar(&o.name, "name", "", "the key to let out (required)")
	c.Flags().StringVar(&o.with, "with", "", "the AES-256 key to encrypt it under (required)")
	c.Flags().StringVar(&o.out, "out", "-", "where to write the wrapped key, or - for standard output")
	c.Flags().BoolVar(&o.force, "force", false, "overwrite the file")
	_ = c.MarkFlagRequired("name")
	_ = c.MarkFlagRequired("with")
	return c
}

func newKeyUnwrap(a *app) *cobra.Command {
	o := &keyWrapOptions{}
	c := &cobra.Command{
		Use: "unwrap --in WRAPPED --with WRAPPING-KEY", Short: "Take a wrapped key into a token", Args: cobra.NoArgs,
		Long: `unwrap decrypts a key inside the token, with the key that it was wrapped under, and keeps it there. It does not leave that
token again unless --extractable says so. A private key that does not go with the public half beside it is refused.`,
		Example: "  touchmark key unwrap --line line-4 --in spare.wrapped --with mover",
		RunE:    func(cmd *cobra.Command, _ []string) error { return a.runKeyUnwrap(cmd.Context(), o) },
	}
	storeFlags(c, &o.keyOptions)
	c.Flags().StringVar(&o.in, "in", "", "the wrapped key, or - for standard input (required)")
	c.Flags().StringVar(&o.with, "with", "", "the AES-256 key that it was wrapped under (required)")
	c.Flags().StringVar(&o.name, "name", "", "what to call the key (default: its name in the store that it comes from)")
	c.Flags().BoolVar(&o.extractable, "extractable", false, "let the key be wrapped out of this store again")
	_ = c.MarkFlagRequired("in")
	_ = c.MarkFlagRequired("with")
	return c
}

func (a *app) runKeyWrap(ctx context.Context, o *keyWrapOptions) error {
	return a.withStore(ctx, &o.keyOptions, func(store hsm.Store, _ *line) error {
		wrapper, ok := store.(hsm.Wrapper)
		if !ok {
			return fmt.Errorf("wrapping keys of %s: %w", store.URI(), hsm.ErrUnsupported)
		}
		key, err := store.Open(ctx, o.name)
		if err != nil {
			return err
		}
		with, err := store.Open(ctx, o.with)
		if err != nil {
			return err
		}
		wrapped, err := wrapper.WrapKey(ctx, with, key)
		if errors.Is(err, hsm.ErrUnsupported) {
			return hint(err, "only a key that was made with --extractable leaves its token, under an AES-256 key, where the token can wrap")
		}
		if err != nil {
			return err
		}
		doc, err := json.MarshalIndent(wrapped, "", "  ")
		if err != nil {
			return err
		}
		doc = append(doc, '\n')
		if o.out == "-" {
			_, err := a.out.Write(doc)
			return err
		}
		if err := writeFile(o.out, doc, 0o600, o.force); err != nil {
			return err
		}
		if a.json {
			return a.printJSON(map[string]any{"name": wrapped.Name, "algorithm": wrapped.Algorithm, "usage": wrapped.Usage, "format": wrapped.Format, "with": o.with, "out": o.out})
		}
		fmt.Fprintf(a.out, "Wrapped key %s under %s into %s\n", wrapped.Name, o.with, o.out)
		return nil
	})
}

func (a *app) runKeyUnwrap(ctx context.Context, o *keyWrapOptions) error {
	text, err := a.readInput(o.in, maxSealed)
	if err != nil {
		return err
	}
	var wrapped hsm.WrappedKey
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&wrapped); err != nil || dec.More() {
		return fmt.Errorf("%s is not a wrapped key", o.in)
	}
	if o.name == "" {
		o.name = wrapped.Name
	}
	if err := o.checkName(); err != nil {
		return err
	}
	return a.withStore(ctx, &o.keyOptions, func(store hsm.Store, _ *line) error {
		unwrapper, ok := store.(hsm.Unwrapper)
		if !ok {
			return fmt.Errorf("unwrapping keys into %s: %w", store.URI(), hsm.ErrUnsupported)
		}
		with, err := store.Open(ctx, o.with)
		if err != nil {
			return err
		}
		made, err := unwrapper.UnwrapKey(ctx, with, hsm.Spec{Name: o.name, Extractable: o.extractable}, wrapped)
		if err != nil {
			return err
		}
		r, err := describeKey(ctx, made)
		if err != nil {
			return err
		}
		if r.Attributes.Extractable && !o.extractable {
			return errors.Join(fmt.Errorf("the store says that key %q can be read out again, so it was deleted", o.name), store.Delete(ctx, o.name))
		}
		if a.json {
			return a.printJSON(r)
		}
		fmt.Fprintf(a.out, "%s\n%s", r.URI, r.PublicKey)
		return nil
	})
}
