package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"strings"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/hsm/sealing"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/operator"
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
	for _, name := range []string{"recipient", "out"} {
		_ = key.MarkFlagRequired(name)
	}
	verbs := append(enrollmentVerbs(a, operator.Group), newEnrollmentImport(a, operator.Group), newEnrollmentExport(a, operator.Group))
	return parent("group", "Enrollment groups", append(verbs, key, newGroupClose(a, true), newGroupClose(a, false), newGroupRoll(a, false), newGroupRoll(a, true))...)
}

func newGroupClose(a *app, closed bool) *cobra.Command {
	var service, ca string
	c := &cobra.Command{
		Use: "close NAME --service FILE", Short: "Let a group admit only devices that a bundle named", Args: cobra.ExactArgs(1),
		Long: `close makes an enrollment group of the service admit only the devices that an imported bundle named for it, with the key that
it named. A device with a good certificate of the group's CA that no bundle named is refused: it was not ordered.`,
		Example: "  touchmark group close x509-devices --service service/owner.connection",
	}
	if !closed {
		c.Use, c.Short = "open NAME --service FILE", "Let a group admit whoever proves to belong to it"
		c.Long = `open makes an enrollment group of the service admit every device that its CA or its key vouches for, whether or not a bundle
named it. What a bundle retired is refused still.`
		c.Example = "  touchmark group open x509-devices --service service/owner.connection"
	}
	c.RunE = func(cmd *cobra.Command, args []string) error {
		return a.runGroupClose(cmd.Context(), args[0], service, ca, closed)
	}
	c.Flags().StringVar(&service, "service", "", "file with the service's connection string (required)")
	c.Flags().StringVar(&ca, "ca", "", "PEM file with the CA of the service's certificate (default: ca.pem beside --service, else the system's)")
	return c
}

func (a *app) runGroupClose(ctx context.Context, name, service, ca string, closed bool) error {
	if err := dps.CheckGroupID(name); err != nil {
		return usageError{err}
	}
	svc, err := a.openService(service, ca)
	if err != nil {
		return err
	}
	var answer struct {
		Group   string `json:"group"`
		Closed  bool   `json:"closed"`
		Changed bool   `json:"changed"`
	}
	body, err := json.Marshal(map[string]bool{"closed": closed})
	if err != nil {
		return err
	}
	if err := svc.call(ctx, http.MethodPut, "/touchmark/groups/"+url.PathEscape(name), nil, http.Header{"Content-Type": {"application/json"}}, bytes.NewReader(body), &answer); err != nil {
		return importError(err)
	}
	if a.json {
		return a.printJSON(answer)
	}
	state := "open: it admits whoever proves to belong to it"
	if closed {
		state = "closed: it admits only devices that a bundle named"
	}
	was := "now"
	if !answer.Changed {
		was = "as before"
	}
	_, err = fmt.Fprintf(a.out, "Group %s is %s, %s.\n", name, state, was)
	return err
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
