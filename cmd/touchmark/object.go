package main

import (
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/pkg/ca"
)

// objectOptions are those of cert and data.
type objectOptions struct {
	keyOptions
	out, application string
	public, force    bool
}

// objectCommand makes one of put, get, list and delete.
func (a *app) objectCommand(verb, what string, run func(context.Context, *objectOptions) error) *cobra.Command {
	o := &objectOptions{}
	c := &cobra.Command{Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error { return run(cmd.Context(), o) }}
	storeFlags(c, &o.keyOptions)
	noun := map[string]string{"cert": "a certificate", "data": "a data object"}[what]
	example := "  touchmark " + what + " " + verb + " --store 'pkcs11:token=device-7?module-path=/usr/lib/softhsm/libsofthsm2.so'"
	switch verb {
	case "put":
		c.Use, c.Short = "put --name NAME --in FILE", "Put "+noun+" on a token"
		c.Example = example + " --name pump-0001 --in pump-0001"
		if what == "data" {
			c.Flags().StringVar(&o.application, "application", "touchmark", "what the object is for")
			c.Flags().BoolVar(&o.public, "public", false, "readable without a login")
		}
		c.Flags().StringVar(&o.in, "in", "", "file to read, or - for standard input (required)")
		_ = c.MarkFlagRequired("in")
	case "get":
		c.Use, c.Short = "get --name NAME", "Read "+noun+" from a token"
		c.Example = example + " --name pump-0001"
		c.Flags().StringVar(&o.out, "out", "-", "file to write, or - for standard output")
		c.Flags().BoolVar(&o.force, "force", false, "overwrite the file")
	case "list":
		c.Use, c.Short, c.Example = "list", "List those of a token", example
		return c
	case "delete":
		c.Use, c.Short = "delete --name NAME", "Remove "+noun+" from a token"
		c.Example = example + " --name pump-0001 --yes"
		c.Flags().BoolVar(&o.yes, "yes", false, "do not ask")
	}
	nameFlag(c, &o.keyOptions)
	return c
}

func newCert(a *app) *cobra.Command {
	put := a.objectCommand("put", "cert", a.runCertPut)
	put.Long = "put stores an X.509 certificate, PEM or DER. A key of the same name on the token becomes its key for other programs, too."
	return parent("cert", "Certificates on a token", put, a.objectCommand("get", "cert", a.runCertGet), a.objectCommand("list", "cert", a.runCertList),
		a.objectCommand("delete", "cert", a.runCertDelete))
}

func newData(a *app) *cobra.Command {
	return parent("data", "Data objects on a token", a.objectCommand("put", "data", a.runDataPut), a.objectCommand("get", "data", a.runDataGet), a.objectCommand("list", "data", a.runDataList),
		a.objectCommand("delete", "data", a.runDataDelete))
}

// withObjects opens a store that holds such objects.
func withObjects[T any](ctx context.Context, a *app, o *objectOptions, what string, f func(T) error) error {
	return a.withStore(ctx, &o.keyOptions, func(store hsm.Store, _ *line) error {
		t, ok := store.(T)
		if !ok {
			return hint(usageError{fmt.Errorf("%s holds no %s: %w", store.URI(), what, hsm.ErrUnsupported)}, "PKCS#11 tokens do")
		}
		return f(t)
	})
}

func (a *app) runCertPut(ctx context.Context, o *objectOptions) error {
	b, err := a.readInput(o.in, maxPEM)
	if err != nil {
		return err
	}
	der := b
	if block, _ := pem.Decode(b); block != nil {
		if block.Type != "CERTIFICATE" {
			return usageError{fmt.Errorf("%s holds a %s, want a CERTIFICATE", o.in, block.Type)}
		}
		der = block.Bytes
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return usageError{fmt.Errorf("%s: %w", o.in, err)}
	}
	return withObjects(ctx, a, o, "certificates", func(s hsm.CertificateStore) error {
		if err := s.PutCertificate(ctx, o.name, cert); err != nil {
			return err
		}
		back, err := oneCertificate(ctx, s, o.name)
		if err != nil {
			return err
		}
		if !back.Equal(cert) {
			return fmt.Errorf("certificate %q reads back differently", o.name)
		}
		return a.done("put", o.name, "Certificate %s is on the token, and was read back\n", o.name)
	})
}

// done says that something was done, as a sentence or as JSON.
func (a *app) done(verb, name, format string, args ...any) error {
	if a.json {
		return a.printJSON(map[string]string{verb: name})
	}
	_, err := fmt.Fprintf(a.out, format, args...)
	return err
}

func oneCertificate(ctx context.Context, s hsm.CertificateStore, name string) (*x509.Certificate, error) {
	certs, err := s.Certificates(ctx, name)
	if err != nil {
		return nil, err
	}
	for _, c := range certs {
		if c.Name == name {
			return c.Certificate, nil
		}
	}
	return nil, fmt.Errorf("certificate %q: %w", name, hsm.ErrNotFound)
}

func (a *app) runCertGet(ctx context.Context, o *objectOptions) error {
	return withObjects(ctx, a, o, "certificates", func(s hsm.CertificateStore) error {
		cert, err := oneCertificate(ctx, s, o.name)
		if err != nil {
			return err
		}
		b := ca.EncodeChain(cert)
		if o.out != "-" {
			if err := writeFile(o.out, b, 0o644, o.force); err != nil {
				return err
			}
			return a.done("got", o.name, "Certificate %s is in %s\n", o.name, o.out)
		}
		if a.json {
			return a.printJSON(map[string]string{"name": o.name, "pem": string(b)})
		}
		_, err = a.out.Write(b)
		return err
	})
}

func (a *app) runCertList(ctx context.Context, o *objectOptions) error {
	return withObjects(ctx, a, o, "certificates", func(s hsm.CertificateStore) error {
		certs, err := s.Certificates(ctx, "")
		if err != nil {
			return err
		}
		var rows [][]string
		for _, c := range certs {
			info := ca.Describe(c.Certificate)
			if a.json {
				if err := a.printJSON(struct {
					Name string `json:"name"`
					ca.Info
				}{c.Name, info}); err != nil {
					return err
				}
				continue
			}
			rows = append(rows, []string{c.Name, info.Subject, info.NotAfter.Format(time.DateOnly), info.SHA256[:16]})
		}
		if a.json {
			return nil
		}
		return a.table([]string{"NAME", "SUBJECT", "UNTIL", "SHA-256"}, rows)
	})
}

func (a *app) runCertDelete(ctx context.Context, o *objectOptions) error {
	return withObjects(ctx, a, o, "certificates", func(s hsm.CertificateStore) error {
		if err := a.confirm(ctx, o.yes, "deleting certificate "+o.name, o.name); err != nil {
			return err
		}
		if err := s.DeleteCertificate(ctx, o.name); err != nil {
			return err
		}
		return a.done("deleted", o.name, "Deleted certificate %s\n", o.name)
	})
}

func (a *app) runDataPut(ctx context.Context, o *objectOptions) error {
	b, err := a.readInput(o.in, maxPEM)
	if err != nil {
		return err
	}
	return withObjects(ctx, a, o, "data objects", func(s hsm.DataStore) error {
		if err := s.PutData(ctx, hsm.Data{Name: o.name, Application: o.application, Value: b, Private: !o.public}); err != nil {
			return err
		}
		d, err := oneData(ctx, s, o.name)
		if err != nil {
			return err
		}
		if string(d.Value) != string(b) || d.Private == o.public {
			return fmt.Errorf("data %q reads back differently", o.name)
		}
		return a.done("put", o.name, "Data %s, %d octets, is on the token, and was read back\n", o.name, len(b))
	})
}

func oneData(ctx context.Context, s hsm.DataStore, name string) (hsm.Data, error) {
	all, err := s.Data(ctx, name)
	if err != nil {
		return hsm.Data{}, err
	}
	for _, d := range all {
		if d.Name == name {
			return d, nil
		}
	}
	return hsm.Data{}, fmt.Errorf("data %q: %w", name, hsm.ErrNotFound)
}

func (a *app) runDataGet(ctx context.Context, o *objectOptions) error {
	return withObjects(ctx, a, o, "data objects", func(s hsm.DataStore) error {
		d, err := oneData(ctx, s, o.name)
		if err != nil {
			return err
		}
		if o.out != "-" {
			if err := writeFile(o.out, d.Value, 0o600, o.force); err != nil {
				return err
			}
			return a.done("got", o.name, "Data %s is in %s\n", o.name, o.out)
		}
		if a.json {
			return a.printJSON(map[string]any{"name": d.Name, "application": d.Application, "private": d.Private, "value": base64.StdEncoding.EncodeToString(d.Value)})
		}
		if isTerminal(a.out) && strings.ContainsFunc(string(d.Value), func(r rune) bool { return r < ' ' && r != '\n' && r != '\t' }) {
			return hint(usageError{errors.New("the object is binary, and standard output is a terminal")}, "say --out FILE or --json")
		}
		_, err = a.out.Write(d.Value)
		return err
	})
}

func (a *app) runDataList(ctx context.Context, o *objectOptions) error {
	return withObjects(ctx, a, o, "data objects", func(s hsm.DataStore) error {
		all, err := s.Data(ctx, "")
		if err != nil {
			return err
		}
		var rows [][]string
		for _, d := range all {
			if a.json {
				if err := a.printJSON(map[string]any{"name": d.Name, "application": d.Application, "private": d.Private, "octets": len(d.Value)}); err != nil {
					return err
				}
				continue
			}
			rows = append(rows, []string{d.Name, d.Application, fmt.Sprint(len(d.Value)), yesNo(d.Private)})
		}
		if a.json {
			return nil
		}
		return a.table([]string{"NAME", "APPLICATION", "OCTETS", "PRIVATE"}, rows)
	})
}

func (a *app) runDataDelete(ctx context.Context, o *objectOptions) error {
	return withObjects(ctx, a, o, "data objects", func(s hsm.DataStore) error {
		if err := a.confirm(ctx, o.yes, "deleting data "+o.name, o.name); err != nil {
			return err
		}
		if err := s.DeleteData(ctx, o.name); err != nil {
			return err
		}
		return a.done("deleted", o.name, "Deleted data %s\n", o.name)
	})
}
