package main

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/hsm/tpm"
	"github.com/touchmark/touchmark/hsm/tpm/residency"
)

type certifyOptions struct {
	line, key, id, kind, out string
	force                    bool
}

func newTPMCertify(a *app, o *tpmOptions) *cobra.Command {
	c := &certifyOptions{}
	cmd := &cobra.Command{
		Use: "certify --key NAME --registration-id ID --out FILE", Short: "Prove that a key lives in this TPM", Args: cobra.NoArgs,
		Long: `certify has the TPM's attestation key vouch for a key, challenges the TPM to show that the attestation key is its own, and
writes the evidence, which the line's station key signs. touchmark tpm verify checks it with no TPM at hand.`,
		Example: "  touchmark tpm certify --line line-3 --tpm 'tpm:?keys=keys' --key device-key --registration-id pump-0001 --out pump-0001.residency",
		RunE:    func(cmd *cobra.Command, _ []string) error { return a.runTPMCertify(cmd.Context(), o, c) },
	}
	lineFlag(cmd, &c.line)
	f := cmd.Flags()
	f.StringVar(&c.key, "key", "", "the key's name (required)")
	f.StringVar(&c.id, "registration-id", "", "the device's registration ID (required)")
	f.StringVar(&c.out, "out", "", "the file to write (required)")
	f.BoolVar(&c.force, "force", false, "overwrite the file")
	ekTypeFlag(cmd, &c.kind)
	for _, name := range []string{"key", "registration-id", "out"} {
		_ = cmd.MarkFlagRequired(name)
	}
	return cmd
}

func (a *app) runTPMCertify(ctx context.Context, o *tpmOptions, c *certifyOptions) (err error) {
	kind, ok := ekTypes[c.kind]
	if !ok {
		return usageError{fmt.Errorf("--type %s: want rsa or ecc", c.kind)}
	}
	l, err := a.loadLine(c.line)
	if err != nil {
		return err
	}
	store, err := a.openLineStore(ctx, l)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	station, err := openSigner(ctx, store, l.Keys.Station)
	if err != nil {
		return err
	}
	return a.withTPM(ctx, o, func(s *tpm.Store) error {
		ek, err := s.EK(ctx, kind)
		if err != nil {
			return err
		}
		evidence, err := s.Attest(ctx, ek, c.key, c.id)
		if err != nil {
			return err
		}
		envelope, err := residency.Sign(evidence, station)
		if err != nil {
			return err
		}
		// What is handed out is checked as its reader will.
		v, err := residency.Verify(envelope, residency.Policy{Challengers: []crypto.PublicKey{station.Public()}, RegistrationID: c.id})
		if err != nil {
			return err
		}
		if err := writeFile(c.out, append(envelope, '\n'), 0o644, c.force); err != nil {
			return err
		}
		return a.printVerdict(v)
	})
}

type verifyResidencyOptions struct {
	trust           []string
	id, key, makers string
}

func newTPMVerify(a *app) *cobra.Command {
	o := &verifyResidencyOptions{}
	c := &cobra.Command{
		Use: "verify FILE --trust STATION --registration-id ID", Short: "Check the proof that a key lives in a TPM, with no TPM at hand", Args: cobra.ExactArgs(1),
		Long: `verify checks evidence of touchmark tpm certify. The TPM vouches for the key, its manufacturer (with --makers) for the TPM, and
the station that signed for having seen both in one TPM: name stations that you trust.`,
		Example: "  touchmark tpm verify pump-0001.residency --trust line-3/station.pem --registration-id pump-0001 --key pump-0001.pem --makers tpm-makers",
		RunE:    func(_ *cobra.Command, args []string) error { return a.runTPMVerify(args[0], o) },
	}
	f := c.Flags()
	f.StringArrayVar(&o.trust, "trust", nil, "PEM public key of a station that is trusted (required, may be repeated)")
	f.StringVar(&o.id, "registration-id", "", "the device's registration ID (required)")
	f.StringVar(&o.key, "key", "", "PEM public key or certificate that the key must be")
	makersFlag(c, &o.makers)
	_ = c.MarkFlagRequired("trust")
	_ = c.MarkFlagRequired("registration-id")
	return c
}

// maxResidency bounds a file of evidence.
const maxResidency = 64 << 10

func (a *app) runTPMVerify(path string, o *verifyResidencyOptions) error {
	envelope, err := a.readInput(path, maxResidency)
	if err != nil {
		return err
	}
	p := residency.Policy{RegistrationID: o.id}
	for _, file := range o.trust {
		pub, err := readPublicKey(file)
		if err != nil {
			return err
		}
		p.Challengers = append(p.Challengers, pub)
	}
	if o.key != "" {
		if p.Key, err = readPublicKey(o.key); err != nil {
			return err
		}
	}
	if p.Makers, err = a.loadMakers(o.makers); err != nil {
		return err
	}
	v, err := residency.Verify(envelope, p)
	if err != nil {
		return err
	}
	return a.printVerdict(v)
}

func (a *app) printVerdict(v *residency.Verdict) error {
	if a.json {
		return a.printJSON(v)
	}
	rows := [][]string{
		{"Registration ID", v.RegistrationID},
		{"Key", "lives in the TPM, was made there and cannot leave it"},
		{"Name of the key", v.KeyName},
		{"SHA-256 of the TPM's endorsement key", v.EKKey},
		{"Made", v.Made.Format(time.RFC3339)},
	}
	if c := v.Certificate; c != nil {
		rows = append(rows, []string{"Manufacturer", c.Manufacturer + " " + c.Model}, []string{"Leads to", c.Root})
	} else {
		rows = append(rows, []string{"Manufacturer", "not judged"})
	}
	return a.table(nil, rows)
}
