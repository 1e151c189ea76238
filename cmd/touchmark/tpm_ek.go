package main

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/hsm/tpm"
	"github.com/touchmark/touchmark/hsm/tpm/residency"
)

// ekTypes are the names that the flag has for them.
var ekTypes = map[string]tpm.EKType{"rsa": tpm.EKRSA, "ecc": tpm.EKECC}

func ekTypeFlag(c *cobra.Command, dst *string) {
	c.Flags().StringVar(dst, "type", "rsa", "rsa, which DPS takes, or ecc")
	_ = c.RegisterFlagCompletionFunc("type", cobra.FixedCompletions([]string{"rsa", "ecc"}, cobra.ShellCompDirectiveNoFileComp))
}

// ekRow is an endorsement key as tpm ek shows it.
type ekRow struct {
	Type           tpm.EKType               `json:"type"`
	RegistrationID string                   `json:"registrationId"`
	EndorsementKey []byte                   `json:"endorsementKey"` // TPM2B_PUBLIC, base64
	KeySHA256      string                   `json:"keySha256"`
	Handle         string                   `json:"handle,omitempty"`
	Certificate    *residency.EKCertificate `json:"certificate,omitempty"`
	CertificateDER []byte                   `json:"certificateDer,omitempty"`
	// Trusted: the certificate leads to one of the makers that were given.
	Trusted bool `json:"trusted"`
}

func newTPMEK(a *app, o *tpmOptions) *cobra.Command {
	var kind string
	c := &cobra.Command{
		Use: "ek", Short: "Show the endorsement key, its certificate and the registration ID that follows from it", Args: cobra.NoArgs,
		Long: `ek shows the TPM's endorsement key: the one that is in the TPM already, or else the one that the TCG's default template makes.
The registration ID is what device SDKs derive from it. With --makers its certificate is judged; without, it is only shown.`,
		Example: "  touchmark tpm ek --makers tpm-makers\n  touchmark tpm ek --type ecc --json",
		RunE:    func(cmd *cobra.Command, _ []string) error { return a.runTPMEK(cmd.Context(), o, kind) },
	}
	ekTypeFlag(c, &kind)
	makersFlag(c, &o.makers)
	return c
}

// judgeEK says what an EK's certificate says. Without makers, none is none asked for.
func judgeEK(ek *tpm.EK, makers *residency.Makers) (string, error) {
	if len(ek.Certificates) == 0 && makers == nil {
		return "none, and none asked for: --makers was not given", nil
	}
	if len(ek.Certificates) == 0 {
		return "", errors.New("the TPM holds no certificate of it")
	}
	if makers == nil {
		_, _, err := residency.ReadEKCertificate(ek.Public, ek.Certificates[0])
		return "there, and not judged: --makers was not given", err
	}
	e, err := makers.Judge(ek.Public, ek.Certificates, time.Time{})
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%s %s, by %s", e.Manufacturer, e.Model, e.Root), nil
}

func (a *app) runTPMEK(ctx context.Context, o *tpmOptions, kind string) error {
	t, ok := ekTypes[kind]
	if !ok {
		return usageError{fmt.Errorf("--type %s: want rsa or ecc", kind)}
	}
	makers, err := a.loadMakers(o.makers)
	if err != nil {
		return err
	}
	return a.withTPM(ctx, o, func(s *tpm.Store) error {
		ek, err := s.EK(ctx, t)
		if err != nil {
			return err
		}
		row := ekRow{Type: ek.Type, RegistrationID: ek.RegistrationID(), EndorsementKey: ek.Public}
		public, err := residency.ParsePublic(ek.Public)
		if err != nil {
			return err
		}
		if row.KeySHA256, err = residency.KeyHash(public); err != nil {
			return err
		}
		if ek.Handle != 0 {
			row.Handle = hsm.TPMHandleName(ek.Handle)
		}
		var verdict error
		if len(ek.Certificates) > 0 {
			row.CertificateDER = ek.Certificates[0]
			if _, row.Certificate, verdict = residency.ReadEKCertificate(ek.Public, ek.Certificates[0]); verdict == nil && makers != nil {
				var judged *residency.EKCertificate
				if judged, verdict = makers.Judge(ek.Public, ek.Certificates, time.Time{}); verdict == nil {
					row.Certificate, row.Trusted = judged, true
				}
			}
		} else if makers != nil {
			verdict = errors.New("the TPM holds none")
		}
		if err := a.printEK(row); err != nil {
			return err
		}
		if verdict != nil {
			return fmt.Errorf("%w: the endorsement key's certificate: %w", residency.ErrNotProven, verdict)
		}
		return nil
	})
}

func (a *app) printEK(r ekRow) error {
	if a.json {
		return a.printJSON(r)
	}
	where := r.Handle
	if where == "" {
		where = "made from its template"
	}
	rows := [][]string{
		{"Type", string(r.Type)},
		{"Registration ID", r.RegistrationID},
		{"Handle", where},
		{"SHA-256 of the key", r.KeySHA256},
	}
	switch {
	case r.Certificate == nil:
		rows = append(rows, []string{"Certificate", "none"})
	default:
		c := r.Certificate
		rows = append(rows, []string{"Manufacturer", strings.TrimSpace(c.Manufacturer + " " + c.Model + " " + c.Version)}, []string{"Issuer", c.Issuer})
		if r.Trusted {
			rows = append(rows, []string{"Leads to", c.Root})
		} else {
			rows = append(rows, []string{"Leads to", "no maker that was given"})
		}
	}
	rows = append(rows, []string{"Endorsement key", base64.StdEncoding.EncodeToString(r.EndorsementKey)})
	return a.table(nil, rows)
}

func newTPMSRK(a *app, o *tpmOptions) *cobra.Command {
	return &cobra.Command{
		Use: "srk", Short: "Show the storage root key that keys are made under", Args: cobra.NoArgs,
		Example: "  touchmark tpm srk --json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.withTPM(cmd.Context(), o, func(s *tpm.Store) error {
				public, h, err := s.SRK()
				if err != nil {
					return err
				}
				where := "owner"
				if h != 0 {
					where = hsm.TPMHandleName(h)
				}
				if a.json {
					return a.printJSON(map[string]any{"storageRootKey": public, "parent": where})
				}
				return a.table(nil, [][]string{{"Parent", where}, {"Storage root key", base64.StdEncoding.EncodeToString(public)}})
			})
		},
	}
}

// newTPMKey makes the key commands over a TPM.
func newTPMKey(a *app, o *tpmOptions) *cobra.Command {
	mk, del := &keyOptions{}, &keyOptions{}
	list := &cobra.Command{
		Use: "list", Short: "List the keys: blobs, and those at persistent handles", Args: cobra.NoArgs,
		Example: "  touchmark tpm key list --tpm 'tpm:?keys=keys'",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.runKeyList(cmd.Context(), &keyOptions{store: a.tpmURI(o)})
		},
	}
	newCmd := &cobra.Command{
		Use: "new --name NAME", Short: "Make a key that never leaves the TPM", Args: cobra.NoArgs,
		Example: "  touchmark tpm key new --tpm 'tpm:?keys=keys' --name device-key\n  touchmark tpm key new --name 0x81000100 --algorithm RSA-2048",
		RunE: func(cmd *cobra.Command, _ []string) error {
			mk.store = a.tpmURI(o)
			return a.runKeyNew(cmd.Context(), mk)
		},
	}
	newCmd.Flags().StringVar(&mk.name, "name", "", "the key's name, or a persistent handle (required)")
	newCmd.Flags().StringVar(&mk.algorithm, "algorithm", string(hsm.ECP256), "EC-P256, EC-P384, RSA-2048 or HMAC-SHA256")
	_ = newCmd.MarkFlagRequired("name")
	deleteCmd := &cobra.Command{
		Use: "delete --name NAME", Short: "Destroy a key: its blob's file, or the one at the persistent handle", Args: cobra.NoArgs,
		Example: "  touchmark tpm key delete --name 0x81000100 --yes",
		RunE: func(cmd *cobra.Command, _ []string) error {
			del.store = a.tpmURI(o)
			return a.runKeyDelete(cmd.Context(), del)
		},
	}
	deleteCmd.Flags().StringVar(&del.name, "name", "", "the key's name (required)")
	deleteCmd.Flags().BoolVar(&del.yes, "yes", false, "do not ask")
	_ = deleteCmd.MarkFlagRequired("name")
	return parent("key", "Keys in the TPM", list, newCmd, deleteCmd)
}
