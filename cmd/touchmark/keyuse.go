package main

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/pkg/dps"
)

// keyUses are the commands that use a key, or show it.
func (a *app) keyUses() []*cobra.Command {
	show, sign, derive, public := &keyOptions{}, &keyUse{}, &keyUse{}, &keyUse{}
	showCmd := &cobra.Command{
		Use: "show --name NAME", Short: "Show a key: its URI, its public half, what the store says about it", Args: cobra.NoArgs,
		Example: "  touchmark key show --line line-3 --name station",
		RunE:    func(cmd *cobra.Command, _ []string) error { return a.runKeyShow(cmd.Context(), show) },
	}
	storeFlags(showCmd, show)
	nameFlag(showCmd, show)
	signCmd := &cobra.Command{
		Use: "sign --name NAME --in FILE", Short: "Sign a file with a key that stays where it is", Args: cobra.NoArgs,
		Long: `sign hashes a file and signs the digest: ECDSA in ASN.1 form, RSA as PKCS #1 v1.5 or with --pss, Ed25519 over the file
itself. openssl verifies the result. The signature goes to --out, or to standard output in base64.`,
		Example: `  touchmark key sign --line line-3 --name station --in release.tar --out release.sig
  touchmark key export-public --line line-3 --name station > station.pem
  openssl dgst -sha256 -verify station.pem -signature release.sig release.tar`,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.runKeySign(cmd.Context(), sign) },
	}
	storeFlags(signCmd, &sign.keyOptions)
	nameFlag(signCmd, &sign.keyOptions)
	signCmd.Flags().StringVar(&sign.in, "in", "", "the file to sign, or - for standard input (required)")
	signCmd.Flags().StringVar(&sign.out, "out", "", "file for the signature, in binary")
	signCmd.Flags().StringVar(&sign.hash, "hash", "", "sha256, sha384 or sha512 (default: the one that fits the key)")
	signCmd.Flags().BoolVar(&sign.pss, "pss", false, "RSA: PSS instead of PKCS #1 v1.5")
	signCmd.Flags().BoolVar(&sign.force, "force", false, "overwrite the file")
	_ = signCmd.MarkFlagRequired("in")
	_ = signCmd.RegisterFlagCompletionFunc("hash", cobra.FixedCompletions(hashNames, cobra.ShellCompDirectiveNoFileComp))
	deriveCmd := &cobra.Command{
		Use: "derive --name NAME --registration-id ID", Short: "Derive one device's symmetric key from a group's, inside the store", Args: cobra.NoArgs,
		Long: `derive computes base64(HMAC-SHA256(group key, registration ID)), the key of a device in a symmetric-key group (DPS device API,
section 8.3). The group key stays where it is. What comes out is the device's secret: it goes to a file of mode 0600, or to
standard output when --out is -.`,
		Example: "  touchmark key derive --line line-3 --name group-key --registration-id pump-0001 --out pump-0001.key",
		RunE:    func(cmd *cobra.Command, _ []string) error { return a.runKeyDerive(cmd.Context(), derive) },
	}
	storeFlags(deriveCmd, &derive.keyOptions)
	nameFlag(deriveCmd, &derive.keyOptions)
	deriveCmd.Flags().StringVar(&derive.id, "registration-id", "", "the device's registration ID (required)")
	deriveCmd.Flags().StringVar(&derive.out, "out", "", "file for the key, or - for standard output (required)")
	deriveCmd.Flags().BoolVar(&derive.force, "force", false, "overwrite the file")
	_ = deriveCmd.MarkFlagRequired("registration-id")
	_ = deriveCmd.MarkFlagRequired("out")
	publicCmd := &cobra.Command{
		Use: "export-public --name NAME", Short: "Print a key's public half, as PEM", Args: cobra.NoArgs,
		Example: "  touchmark key export-public --line line-3 --name issuing-ca > issuing-key.pem",
		RunE:    func(cmd *cobra.Command, _ []string) error { return a.runKeyExportPublic(cmd.Context(), public) },
	}
	storeFlags(publicCmd, &public.keyOptions)
	nameFlag(publicCmd, &public.keyOptions)
	publicCmd.Flags().StringVar(&public.out, "out", "-", "file to write, or - for standard output")
	publicCmd.Flags().BoolVar(&public.force, "force", false, "overwrite the file")
	return []*cobra.Command{showCmd, signCmd, deriveCmd, publicCmd}
}

// keyUse says what to do with a key.
type keyUse struct {
	keyOptions
	out, hash, id string
	pss, force    bool
}

func nameFlag(c *cobra.Command, o *keyOptions) {
	c.Flags().StringVar(&o.name, "name", "", "the key's name (required)")
	_ = c.MarkFlagRequired("name")
}

// withKey opens one key of the store that the options name.
func (a *app) withKey(ctx context.Context, o *keyOptions, f func(hsm.Key) error) error {
	return a.withStore(ctx, o, func(store hsm.Store, _ *line) error {
		k, err := store.Open(ctx, o.name)
		if err != nil {
			return err
		}
		return f(k)
	})
}

func (a *app) runKeyShow(ctx context.Context, o *keyOptions) error {
	return a.withKey(ctx, o, func(k hsm.Key) error {
		r, err := describeKey(ctx, k)
		if err != nil {
			return err
		}
		if a.json {
			return a.printJSON(r)
		}
		if err := a.table(nil, [][]string{
			{"Key", r.Name}, {"  algorithm", string(r.Algorithm)}, {"  usage", string(r.Usage)}, {"  URI", r.URI},
			{"  can leave its store", yesNo(r.Attributes.Extractable)}, {"  made there", yesNo(r.Attributes.Local)},
			{"  always sensitive", yesNo(r.Attributes.AlwaysSensitive)}, {"  never extractable", yesNo(r.Attributes.NeverExtractable)},
		}); err != nil {
			return err
		}
		_, err = io.WriteString(a.out, r.PublicKey)
		return err
	})
}

var hashNames = []string{"sha256", "sha384", "sha512"}

var hashes = map[string]crypto.Hash{"sha256": crypto.SHA256, "sha384": crypto.SHA384, "sha512": crypto.SHA512}

// hashFor returns the hash that a key's strength calls for, and 0 for Ed25519, which signs the message itself.
func hashFor(alg hsm.Algorithm) crypto.Hash {
	switch alg {
	case hsm.Ed25519:
		return 0
	case hsm.ECP384:
		return crypto.SHA384
	}
	return crypto.SHA256
}

// maxMessage bounds what Ed25519 signs: the store takes it in one piece.
const maxMessage = 1 << 20

func (a *app) runKeySign(ctx context.Context, o *keyUse) error {
	if o.hash != "" && hashes[o.hash] == 0 {
		return usageError{fmt.Errorf("--hash %s: want one of %v", o.hash, hashNames)}
	}
	return a.withKey(ctx, &o.keyOptions, func(k hsm.Key) error {
		signer, err := hsm.SigningKeyOf(k)
		if err != nil {
			return usageError{err}
		}
		hash := hashFor(k.Algorithm())
		if o.hash != "" {
			if hash == 0 {
				return usageError{errors.New("--hash does not go with Ed25519, which signs the file itself")}
			}
			hash = hashes[o.hash]
		}
		var opts crypto.SignerOpts = hash
		if o.pss {
			if _, ok := signer.Public().(*rsa.PublicKey); !ok {
				return usageError{fmt.Errorf("--pss goes with RSA keys, and key %q is %s", k.Name(), k.Algorithm())}
			}
			opts = &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: hash}
		}
		digest, err := a.digest(o.in, hash)
		if err != nil {
			return err
		}
		sig, err := signer.Sign(rand.Reader, digest, opts)
		if err != nil {
			return err
		}
		// A token with a fault is found out here, and not by whoever verifies.
		if err := verifySignature(signer.Public(), digest, sig, hash, o.pss); err != nil {
			return fmt.Errorf("key %q: %w", k.Name(), err)
		}
		if o.out != "" {
			if err := writeFile(o.out, sig, 0o644, o.force); err != nil {
				return err
			}
		}
		if a.json {
			return a.printJSON(map[string]string{"key": k.Name(), "hash": hash.String(), "signature": base64.StdEncoding.EncodeToString(sig)})
		}
		if o.out == "" {
			_, err = fmt.Fprintln(a.out, base64.StdEncoding.EncodeToString(sig))
		}
		return err
	})
}

// digest hashes a file of any size; without a hash it returns a small one whole.
func (a *app) digest(path string, hash crypto.Hash) ([]byte, error) {
	if hash == 0 {
		return a.readInput(path, maxMessage)
	}
	in, err := a.openInput(path)
	if err != nil {
		return nil, err
	}
	defer in.Close()
	h := hash.New()
	if _, err := io.Copy(h, in); err != nil {
		return nil, err
	}
	return h.Sum(nil), nil
}

// verifySignature holds a signature against a public key.
func verifySignature(pub crypto.PublicKey, digest, sig []byte, hash crypto.Hash, pss bool) error {
	ok := false
	switch pub := pub.(type) {
	case *ecdsa.PublicKey:
		ok = ecdsa.VerifyASN1(pub, digest, sig)
	case *rsa.PublicKey:
		if pss {
			ok = rsa.VerifyPSS(pub, hash, digest, sig, nil) == nil
		} else {
			ok = rsa.VerifyPKCS1v15(pub, hash, digest, sig) == nil
		}
	case ed25519.PublicKey:
		ok = ed25519.Verify(pub, digest, sig)
	}
	if !ok {
		return errors.New("the signature that the store made does not verify")
	}
	return nil
}

func (a *app) runKeyDerive(ctx context.Context, o *keyUse) error {
	if err := dps.CheckRegistrationID(o.id); err != nil {
		return usageError{err}
	}
	return a.withKey(ctx, &o.keyOptions, func(k hsm.Key) error {
		mac, err := hsm.MACKeyOf(k)
		if err != nil {
			return usageError{err}
		}
		secret, err := mac.MAC(ctx, nil, []byte(o.id)) // as written: the case counts here (DPS device API, section 8.3)
		if err != nil {
			return err
		}
		text := make(hsm.Secret, base64.StdEncoding.EncodedLen(len(secret)), base64.StdEncoding.EncodedLen(len(secret))+1)
		base64.StdEncoding.Encode(text, secret)
		clear(secret)
		defer text.Wipe()
		if o.out == "-" {
			_, err := a.out.Write(append(text, '\n'))
			return err
		}
		if err := writeFile(o.out, append(text, '\n'), 0o600, o.force); err != nil {
			return err
		}
		if a.json {
			return a.printJSON(map[string]string{"registrationId": o.id, "out": o.out})
		}
		_, err = fmt.Fprintf(a.out, "The key of %s is in %s\n", o.id, o.out)
		return err
	})
}

func (a *app) runKeyExportPublic(ctx context.Context, o *keyUse) error {
	return a.withKey(ctx, &o.keyOptions, func(k hsm.Key) error {
		signer, ok := k.(crypto.Signer)
		if !ok {
			return usageError{fmt.Errorf("key %q (%s) has no public half to print", k.Name(), k.Algorithm())}
		}
		b, err := publicPEM(signer.Public())
		if err != nil {
			return err
		}
		if o.out != "-" {
			return writeFile(o.out, b, os.FileMode(0o644), o.force)
		}
		if a.json {
			return a.printJSON(map[string]string{"key": k.Name(), "publicKey": string(b)})
		}
		_, err = a.out.Write(b)
		return err
	})
}
