package main

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/pkg/operator"
)

func newCertificate(a *app) *cobra.Command {
	return parent("certificate", "CA certificates of a scope, which groups name or chain to", newCertificateList(a), newCertificateShow(a), newCertificateCreate(a), newCertificateDelete(a), newCertificateCode(a), newCertificateVerify(a))
}

// onCertificate has something done with a certificate of the scope that is meant.
func (a *app) onCertificate(ctx context.Context, o *managementOptions, do func(ctx context.Context, m *operator.Management, scope string) error) error {
	return a.onManagement(ctx, o, func(ctx context.Context, m *operator.Management) error {
		scope, err := o.scopeName(ctx, m)
		if err != nil {
			return err
		}
		return do(ctx, m, scope)
	})
}

func newCertificateList(a *app) *cobra.Command {
	o := &managementOptions{}
	c := &cobra.Command{
		Use: "list --management FILE", Short: "List the certificates", Args: cobra.NoArgs,
		Long:    "list shows the CA certificates of a scope, and which are verified.",
		Example: "  touchmark certificate list --management service/management.connection",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.onCertificate(cmd.Context(), o, func(ctx context.Context, m *operator.Management, scope string) error {
				all, err := m.Certificates(ctx, scope)
				if err != nil {
					return err
				}
				var rows [][]string
				for i := range all {
					if a.json {
						if err := a.printJSON(&all[i]); err != nil {
							return err
						}
						continue
					}
					p := &all[i].Props
					rows = append(rows, []string{all[i].Name, p.Subject, p.Expiry, yesNo(p.IsVerified), p.Thumbprint})
				}
				if a.json {
					return nil
				}
				return a.table([]string{"CERTIFICATE", "SUBJECT", "UNTIL", "VERIFIED", "SHA-1"}, rows)
			})
		},
	}
	o.flags(c, true)
	return c
}

func (a *app) printCertificate(c *operator.CACertificate) error {
	if a.json {
		return a.printJSON(c)
	}
	rows := [][]string{{"Certificate", c.Name}, {"  subject", c.Props.Subject}, {"  until", c.Props.Expiry}, {"  verified", yesNo(c.Props.IsVerified)}, {"  SHA-1", c.Props.Thumbprint}, {"  etag", c.ETag}}
	if c.Props.VerificationCode != "" {
		rows = append(rows, []string{"  verification code", c.Props.VerificationCode})
	}
	return a.table(nil, rows)
}

func newCertificateShow(a *app) *cobra.Command {
	o := &managementOptions{}
	c := &cobra.Command{
		Use: "show NAME --management FILE", Short: "Show a certificate", Args: cobra.ExactArgs(1),
		Long:    "show prints what a certificate is, and whether it is verified.",
		Example: "  touchmark certificate show plant-root --management service/management.connection",
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.onCertificate(cmd.Context(), o, func(ctx context.Context, m *operator.Management, scope string) error {
				c, err := m.Certificate(ctx, scope, args[0])
				if err != nil {
					return err
				}
				return a.printCertificate(c)
			})
		},
	}
	o.flags(c, true)
	return c
}

// certificateFile reads a certificate, PEM or DER.
func certificateFile(path string) (*x509.Certificate, error) {
	b, err := readSmall(path)
	if err != nil {
		return nil, usageError{fmt.Errorf("reading a certificate: %w", err)}
	}
	c, err := operator.Certificate(b)
	if err != nil {
		return nil, usageError{fmt.Errorf("%s: %w", path, err)}
	}
	return operator.ParseCertificate(c.Certificate)
}

func newCertificateCreate(a *app) *cobra.Command {
	o := &managementOptions{}
	var file, tag string
	var verified bool
	c := &cobra.Command{
		Use: "create NAME --certificate-path FILE --management FILE", Short: "Upload a certificate", Args: cobra.ExactArgs(1),
		Long: `create uploads a CA certificate. Groups may use it once it is verified: by a proof that somebody has the CA's key (touchmark certificate
code, then verify), or because whoever uploads it says so with --verified. --etag puts it in the place of the one of that name.`,
		Example: "  touchmark certificate create plant-root --certificate-path root.pem --management service/management.connection",
		RunE: func(cmd *cobra.Command, args []string) error {
			cert, err := certificateFile(file)
			if err != nil {
				return err
			}
			return a.onCertificate(cmd.Context(), o, func(ctx context.Context, m *operator.Management, scope string) error {
				if tag == "" {
					if _, err := m.Certificate(ctx, scope, args[0]); !errors.Is(err, operator.ErrNotFound) {
						if err == nil {
							err = hint(fmt.Errorf("certificate %s exists already", args[0]), "--etag says which version of it to replace")
						}
						return err
					}
				}
				c, err := m.PutCertificate(ctx, scope, args[0], cert, verified, tag)
				if err != nil {
					return err
				}
				return a.printCertificate(c)
			})
		},
	}
	o.flags(c, true)
	f := c.Flags()
	f.StringVar(&file, "certificate-path", "", "the certificate, PEM or DER (required)")
	f.StringVar(&tag, "etag", "", "replace this version")
	f.BoolVar(&verified, "verified", false, "it is verified: no proof is needed")
	_ = c.MarkFlagRequired("certificate-path")
	return c
}

// tagOf returns the tag that a flag names, else the one that a certificate has now.
func tagOf(ctx context.Context, m *operator.Management, scope, name, tag string) (string, error) {
	if tag != "" {
		return tag, nil
	}
	c, err := m.Certificate(ctx, scope, name)
	if err != nil {
		return "", err
	}
	return c.ETag, nil
}

func newCertificateDelete(a *app) *cobra.Command {
	o := &managementOptions{}
	var tag string
	var yes bool
	c := &cobra.Command{
		Use: "delete NAME --management FILE", Short: "Delete a certificate", Args: cobra.ExactArgs(1),
		Long:    "delete takes a certificate away: groups that name it, or chain to it, admit nobody any more.",
		Example: "  touchmark certificate delete plant-root --management service/management.connection --yes",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := a.confirm(cmd.Context(), yes, "deleting certificate "+args[0], args[0]); err != nil {
				return err
			}
			return a.onCertificate(cmd.Context(), o, func(ctx context.Context, m *operator.Management, scope string) error {
				tag, err := tagOf(ctx, m, scope, args[0], tag)
				if err != nil {
					return err
				}
				if err := m.DeleteCertificate(ctx, scope, args[0], tag); err != nil {
					return err
				}
				return a.printDone("deleted", "certificate", args[0])
			})
		},
	}
	o.flags(c, true)
	c.Flags().StringVar(&tag, "etag", "", "delete this version alone")
	c.Flags().BoolVar(&yes, "yes", false, "do not ask")
	return c
}

func newCertificateCode(a *app) *cobra.Command {
	o := &managementOptions{}
	c := &cobra.Command{
		Use: "code NAME --management FILE", Short: "Get a code to prove with that somebody has the CA's key", Args: cobra.ExactArgs(1),
		Long: `code gets a new verification code. Have the CA sign a certificate whose common name is the code, and hand it in with touchmark
certificate verify. A new code takes the place of the one before.`,
		Example: "  touchmark certificate code plant-root --management service/management.connection",
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.onCertificate(cmd.Context(), o, func(ctx context.Context, m *operator.Management, scope string) error {
				tag, err := tagOf(ctx, m, scope, args[0], "")
				if err != nil {
					return err
				}
				c, err := m.VerificationCode(ctx, scope, args[0], tag)
				if err != nil {
					return err
				}
				return a.printCertificate(c)
			})
		},
	}
	o.flags(c, true)
	return c
}

func newCertificateVerify(a *app) *cobra.Command {
	o := &managementOptions{}
	var file string
	c := &cobra.Command{
		Use: "verify NAME --proof FILE --management FILE", Short: "Hand in the proof", Args: cobra.ExactArgs(1),
		Long:    "verify hands in the certificate that the CA signed for the code, and has the CA's certificate verified with it.",
		Example: "  touchmark certificate verify plant-root --proof code.pem --management service/management.connection",
		RunE: func(cmd *cobra.Command, args []string) error {
			proof, err := certificateFile(file)
			if err != nil {
				return err
			}
			return a.onCertificate(cmd.Context(), o, func(ctx context.Context, m *operator.Management, scope string) error {
				tag, err := tagOf(ctx, m, scope, args[0], "")
				if err != nil {
					return err
				}
				c, err := m.VerifyCertificate(ctx, scope, args[0], proof, tag)
				if err != nil {
					return err
				}
				return a.printCertificate(c)
			})
		},
	}
	o.flags(c, true)
	c.Flags().StringVar(&file, "proof", "", "certificate with the code as its common name, signed by the CA (required)")
	_ = c.MarkFlagRequired("proof")
	return c
}
