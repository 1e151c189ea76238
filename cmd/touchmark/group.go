package main

import (
	"context"
	"encoding/base64"
	"fmt"
	"net/http"
	"net/url"
	"strings"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/hsm/sealing"
	"github.com/touchmark/touchmark/pkg/dps"
)

type groupKeyOptions struct {
	name, service, recipient, out, ca string
	force                             bool
}

func newGroup(a *app) *cobra.Command {
	o := &groupKeyOptions{}
	key := &cobra.Command{
		Use:   "key NAME --service FILE --recipient R --out SEALED",
		Short: "Have a group's key sealed to a line",
		Long: `key makes the symmetric-key enrollment group NAME in the service, if it is not there, and writes its primary key to a file
that only the recipient can open. The key leaves the service in no other form; touchmark key import brings it into the
line's token.`,
		Example: `  touchmark group key pumps --service service/owner.connection --recipient "$(cat line-3/recipient.txt)" --out pumps.sealed
  touchmark key import --line line-3 --name group-key --in pumps.sealed`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.name = args[0]
			return a.runGroupKey(cmd.Context(), o)
		},
	}
	f := key.Flags()
	f.StringVar(&o.service, "service", "", "file with the service's connection string (required)")
	f.StringVar(&o.recipient, "recipient", "", "age recipient that the key is sealed to: the line's recipient.txt (required)")
	f.StringVar(&o.out, "out", "", "the sealed file to write (required)")
	f.StringVar(&o.ca, "ca", "", "PEM file with the CA of the service's certificate (default: ca.pem beside --service, else the system's)")
	f.BoolVar(&o.force, "force", false, "overwrite the file")
	for _, name := range []string{"service", "recipient", "out"} {
		_ = key.MarkFlagRequired(name)
	}
	return parent("group", "Enrollment groups", key)
}

func (a *app) runGroupKey(ctx context.Context, o *groupKeyOptions) error {
	if err := dps.CheckGroupID(o.name); err != nil {
		return usageError{err}
	}
	o.recipient = strings.TrimSpace(o.recipient)
	if _, err := sealing.ParseRecipient(o.recipient); err != nil {
		return usageError{fmt.Errorf("--recipient: %w", err)}
	}
	svc, err := a.openService(o.service, o.ca)
	if err != nil {
		return err
	}
	var answer struct {
		Sealed  string `json:"sealed"`
		Created bool   `json:"created"`
	}
	err = svc.callJSON(ctx, http.MethodPost, "/touchmark/groupKeys/"+url.PathEscape(o.name), map[string]string{"recipient": o.recipient}, &answer)
	if err != nil {
		return importError(err)
	}
	sealed, err := base64.StdEncoding.DecodeString(answer.Sealed)
	if err != nil || len(sealed) == 0 {
		return fmt.Errorf("the service's answer holds no sealed key")
	}
	if err := writeFile(o.out, sealed, 0o600, o.force); err != nil {
		return err
	}
	if a.json {
		return a.printJSON(map[string]any{"group": o.name, "created": answer.Created, "out": o.out})
	}
	made := "It was there already."
	if answer.Created {
		made = "It was made now."
	}
	fmt.Fprintf(a.out, "The key of group %s is in %s, sealed. %s\n", o.name, o.out, made)
	return nil
}
