package main

import (
	"context"
	"crypto"
	"encoding/pem"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/pkg/evidence"
)

func (a *app) evidenceCommands() []*cobra.Command {
	o := &keyUse{}
	var trust, residency string
	mk := &cobra.Command{
		Use: "evidence --line DIR --name NAME", Short: "Have the station sign what a key's store says of where the key came from", Args: cobra.NoArgs,
		Long: `evidence asks the token about one of its keys (made there, always sensitive, never extractable) and about itself, and signs
the answers with the line's station key. The token signs none of it: the statement is worth what the station's word is worth.
touchmark key verify-evidence reads it with the station's public key alone.`,
		Example: "  touchmark key evidence --line line-3 --name issuing-ca --out issuing-ca.evidence",
		RunE:    func(cmd *cobra.Command, _ []string) error { return a.runKeyEvidence(cmd.Context(), o) },
	}
	lineFlag(mk, &o.line)
	nameFlag(mk, &o.keyOptions)
	mk.Flags().StringVar(&o.out, "out", "-", "file to write, or - for standard output")
	mk.Flags().BoolVar(&o.force, "force", false, "overwrite the file")
	verify := &cobra.Command{
		Use: "verify-evidence FILE --trust PEM", Short: "Verify what key evidence wrote", Args: cobra.ExactArgs(1),
		Example: "  touchmark key verify-evidence issuing-ca.evidence --trust line-3/station.pem --require-residency token",
		RunE:    func(_ *cobra.Command, args []string) error { return a.runVerifyEvidence(args[0], trust, residency) },
	}
	verify.Flags().StringVar(&trust, "trust", "", "PEM file with the station's public key (required)")
	_ = verify.MarkFlagRequired("trust")
	residencyFlag(verify, &residency)
	return []*cobra.Command{mk, verify}
}

func (a *app) runKeyEvidence(ctx context.Context, o *keyUse) error {
	return a.withStore(ctx, &o.keyOptions, func(store hsm.Store, l *line) error {
		identifier, ok := store.(hsm.Identifier)
		if !ok {
			return hint(usageError{fmt.Errorf("%s cannot vouch for its keys: %w", store.URI(), hsm.ErrUnsupported)}, "PKCS#11 tokens and TPMs can")
		}
		id, err := identifier.Identity(ctx)
		if err != nil {
			return err
		}
		key, err := openSigner(ctx, store, o.name)
		if err != nil {
			return err
		}
		station, err := openSigner(ctx, store, l.Keys.Station)
		if err != nil {
			return err
		}
		e, err := evidence.OfToken(ctx, key, id)
		if err != nil {
			return err
		}
		public, err := publicPEM(key.Public())
		if err != nil {
			return err
		}
		s := evidence.Statement{Made: time.Now().UTC().Truncate(time.Second), Name: o.name, Algorithm: string(key.Algorithm()), PublicKey: string(public), Evidence: e}
		b, err := s.Sign(station)
		if err != nil {
			return err
		}
		b = append(b, '\n')
		if o.out == "-" {
			_, err = a.out.Write(b)
			return err
		}
		if err := writeFile(o.out, b, 0o644, o.force); err != nil {
			return err
		}
		return a.done("evidence", o.out, "Evidence of key %s is in %s, signed by the station\n", o.name, o.out)
	})
}

func (a *app) runVerifyEvidence(path, trust, residency string) error {
	want, err := parseResidency(residency)
	if err != nil {
		return err
	}
	pub, err := readPublicKey(trust)
	if err != nil {
		return err
	}
	b, err := a.readInput(path, maxPEM)
	if err != nil {
		return err
	}
	s, keyID, err := evidence.Open(b, []crypto.PublicKey{pub})
	if err != nil {
		return fmt.Errorf("verifying %s: %w", path, err)
	}
	if s.Evidence == nil {
		return fmt.Errorf("verifying %s: %w", path, evidence.ErrResidency)
	}
	hash, err := pemKeyHash(s.PublicKey)
	if err != nil {
		return fmt.Errorf("verifying %s: %w: %w", path, evidence.ErrResidency, err)
	}
	lives := s.Evidence.Check(s.Evidence.Kind, s.Name, hash)
	if want != "" {
		lives = s.Evidence.Check(want, s.Name, hash)
	}
	if want != "" && lives != nil {
		return fmt.Errorf("verifying %s: %w", path, lives)
	}
	if a.json {
		return a.printJSON(map[string]any{"statement": s, "keyId": keyID, "resident": lives == nil})
	}
	where := "stays in its " + string(s.Evidence.Kind)
	if lives != nil {
		where = "may go anywhere: " + lives.Error()
	}
	rows := [][]string{{"Evidence", path, a.paint(a.out, "32", "verifies")}, {"  key", s.Name + ", " + s.Algorithm}, {"  made", s.Made.Format(time.RFC3339)}, {"  the key", where}}
	if st := s.Evidence.Store; st != nil {
		rows = append(rows, []string{"  token", fmt.Sprintf("%s, serial %s, %s %s", st.Label, st.Serial, st.Manufacturer, st.Model)})
	}
	return a.table(nil, append(rows, []string{"  station's key", keyID}))
}

func pemKeyHash(text string) (string, error) {
	block, _ := pem.Decode([]byte(text))
	if block == nil {
		return "", errors.New("it holds no public key")
	}
	pub, err := parsePublic(block)
	if err != nil {
		return "", err
	}
	return evidence.KeyHash(pub)
}
