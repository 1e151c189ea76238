package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/operator"
)

func newEnrollment(a *app) *cobra.Command {
	return parent("enrollment", "Individual enrollments of a registration service", append(enrollmentVerbs(a, operator.Individual), newEnrollmentImport(a, operator.Individual), newEnrollmentExport(a, operator.Individual))...)
}

// enrollmentVerbs are what individual enrollments and groups have in common.
func enrollmentVerbs(a *app, k operator.Kind) []*cobra.Command {
	return []*cobra.Command{newEnrollmentList(a, k), newEnrollmentShow(a, k), newEnrollmentPut(a, k, true), newEnrollmentPut(a, k, false),
		newEnrollmentDelete(a, k), newEnrollmentStatus(a, k, true), newEnrollmentStatus(a, k, false)}
}

// onService opens the service and has something done there, with the exit codes and hints of a service's faults.
func (a *app) onService(ctx context.Context, o *serviceOptions, do func(context.Context, *service) error) error {
	svc, err := a.openService(o.service, o.ca)
	if err != nil {
		return err
	}
	return importError(do(ctx, svc))
}

// argument is what an ID is called in usage lines.
func argument(k operator.Kind) string {
	if k == operator.Group {
		return "NAME"
	}
	return "REGISTRATION-ID"
}

func checkID(k operator.Kind, id string) error {
	check := dps.CheckRegistrationID
	if k == operator.Group {
		check = dps.CheckGroupID
	}
	if err := check(id); err != nil {
		return usageError{err}
	}
	return nil
}

// sample is an ID for examples.
func sample(k operator.Kind) string {
	if k == operator.Group {
		return "pumps"
	}
	return "pump-0001"
}

func newEnrollmentList(a *app, k operator.Kind) *cobra.Command {
	o := &serviceOptions{}
	limit := 0
	c := &cobra.Command{
		Use: "list --service FILE", Short: "List them all", Args: cobra.NoArgs,
		Long:    "list shows every " + k.Name() + " of the service, page by page. With --json each is a line, as the service has it, without keys and certificates.",
		Example: "  touchmark " + string(k) + " list --service service/owner.connection",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.onService(cmd.Context(), o, func(ctx context.Context, svc *service) error { return a.runEnrollmentList(ctx, svc, k, limit) })
		},
	}
	o.flags(c)
	c.Flags().IntVar(&limit, "limit", 0, "stop after so many (default: all)")
	return c
}

// maxTable is how many rows a table holds back to align its columns; longer lists are more tables than one.
const maxTable = 1000

func (a *app) runEnrollmentList(ctx context.Context, svc *service, k operator.Kind, limit int) error {
	header := []string{strings.ToUpper(k.Name()), "ATTESTATION", "STATUS", "ALLOCATION", "HUBS", "UPDATED"}
	t := &longTable{a: a, header: header}
	n := 0
	for d, err := range svc.All(ctx, k) {
		if err != nil {
			return err
		}
		if a.json {
			err = a.printJSON(d)
		} else {
			err = t.add(enrollmentRow(d))
		}
		if err != nil {
			return err
		}
		if n++; n == limit {
			break
		}
	}
	return t.flush()
}

func enrollmentRow(d *operator.Document) []string {
	e, err := d.Enrollment()
	if err != nil || e.Attestation == nil {
		return []string{d.ID, "?", "", "", "", ""}
	}
	return []string{d.ID, string(e.Attestation.Type), statusOf(e), string(e.AllocationPolicy), strings.Join(hubsOf(e), " "), shortTime(e.LastUpdatedDateTimeUTC)}
}

func hubsOf(e *dps.Enrollment) []string {
	if e.IoTHubHostName != "" && len(e.IoTHubs) == 0 {
		return []string{e.IoTHubHostName}
	}
	return e.IoTHubs
}

func statusOf(e *dps.Enrollment) string {
	if e.ProvisioningStatus == dps.EnrollmentDisabled {
		return string(dps.EnrollmentDisabled)
	}
	return string(dps.EnrollmentEnabled) // absent and null too
}

func shortTime(t *dps.Time) string {
	if t == nil {
		return ""
	}
	return t.UTC().Format(time.DateTime)
}

// longTable prints a table of any length.
type longTable struct {
	a      *app
	header []string
	rows   [][]string
	begun  bool
}

func (t *longTable) add(row []string) error {
	if t.rows = append(t.rows, row); len(t.rows) < maxTable {
		return nil
	}
	return t.flush()
}

func (t *longTable) flush() error {
	if t.a.json || len(t.rows) == 0 && t.begun {
		return nil
	}
	rows := t.rows
	t.rows = nil
	if !t.begun {
		t.begun = true
		return t.a.table(t.header, rows)
	}
	return t.a.table(nil, rows)
}

func newEnrollmentShow(a *app, k operator.Kind) *cobra.Command {
	o := &serviceOptions{}
	keys := false
	c := &cobra.Command{
		Use: "show " + argument(k) + " --service FILE", Short: "Show one", Args: cobra.ExactArgs(1),
		Long: "show prints the " + k.Name() + " as the service has it. Keys come with --show-keys alone: the service writes down who asked for them.\n" +
			"Certificates do not come out of a service again: it shows what they are.",
		Example: "  touchmark " + string(k) + " show " + sample(k) + " --service service/owner.connection",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkID(k, args[0]); err != nil {
				return err
			}
			return a.onService(cmd.Context(), o, func(ctx context.Context, svc *service) error {
				d, err := svc.Get(ctx, k, args[0])
				if err != nil {
					return err
				}
				if keys {
					m, err := svc.Mechanism(ctx, k, args[0])
					if err != nil {
						return err
					}
					if err := d.Set("attestation", m); err != nil {
						return err
					}
				}
				return a.printEnrollment(d, keys)
			})
		},
	}
	o.flags(c)
	c.Flags().BoolVar(&keys, "show-keys", false, "ask the service for the symmetric keys and print them")
	return c
}

// printEnrollment prints an enrollment, without keys unless they are asked for.
func (a *app) printEnrollment(d *operator.Document, keys bool) error {
	e, err := d.Enrollment()
	if err != nil {
		return err
	}
	if !keys && e.Attestation != nil && e.Attestation.SymmetricKey != nil {
		e.Attestation.SymmetricKey = nil
		if err := d.Set("attestation", e.Attestation); err != nil {
			return err
		}
	}
	if a.json {
		return a.printJSON(d)
	}
	rows := [][]string{{strings.ToUpper(d.Kind.Name()[:1]) + d.Kind.Name()[1:], d.ID}}
	row := func(name, value string) {
		if value != "" {
			rows = append(rows, []string{"  " + name, value})
		}
	}
	raw := func(name, member string) {
		var v json.RawMessage
		if d.Has(member) && d.Get(member, &v) == nil {
			row(name, compact(v))
		}
	}
	var device string
	_ = d.Get("deviceId", &device) // a text, or Enrollment had failed
	row("device ID", device)
	row("status", statusOf(e))
	if m := e.Attestation; m != nil {
		row("attestation", string(m.Type))
		if k := m.SymmetricKey; k != nil {
			row("  primary key", k.PrimaryKey)
			row("  secondary key", k.SecondaryKey)
		}
		if t := m.TPM; t != nil {
			row("  endorsement key", t.EndorsementKey)
			row("  storage root key", t.StorageRootKey)
		}
		if x := m.X509; x != nil {
			for kind, certs := range map[string]*dps.X509Certificates{"certificate": x.ClientCertificates, "signing certificate": x.SigningCertificates} {
				if certs != nil {
					whose, thumbprint := describeCertificate(certs.Primary)
					row("  primary "+kind, whose)
					row("    SHA-256", thumbprint)
					whose, thumbprint = describeCertificate(certs.Secondary)
					row("  secondary "+kind, whose)
					row("    SHA-256", thumbprint)
				}
			}
			if c := x.CAReferences; c != nil {
				row("  primary CA", c.Primary)
				row("  secondary CA", c.Secondary)
			}
		}
	}
	if e.Capabilities != nil {
		row("IoT Edge", yesNo(e.Capabilities.IoTEdge))
	}
	row("parent", e.Parent)
	row("reprovision", operator.FormatReprovision(e.ReprovisionPolicy))
	row("allocation", string(e.AllocationPolicy))
	row("hubs", strings.Join(hubsOf(e), " "))
	if w := e.CustomAllocationDefinition; w != nil {
		address, query, _ := strings.Cut(w.WebhookURL, "?")
		if query != "" {
			address += "?****" // a key, as a rule
		}
		row("webhook", address+" "+w.APIVersion)
	}
	if t := e.InitialTwin; t != nil {
		row("tags", compact(t.Tags))
		if t.Properties != nil {
			row("desired properties", compact(t.Properties.Desired))
		}
	}
	raw("information", "optionalDeviceInformation")
	row("created", shortTime(e.CreatedDateTimeUTC))
	row("updated", shortTime(e.LastUpdatedDateTimeUTC))
	row("etag", e.ETag)
	var st *dps.RegistrationState
	if err := d.Get("registrationState", &st); err == nil && st != nil {
		row("registration", registrationText(st))
	}
	return a.table(nil, rows)
}

func compact(b []byte) string {
	var out bytes.Buffer
	if json.Compact(&out, b) != nil {
		return string(b)
	}
	return out.String()
}

// describeCertificate returns whose certificate it is and until when, and its thumbprint.
func describeCertificate(c *dps.X509Certificate) (whose, thumbprint string) {
	if c == nil || c.Info == nil {
		return "", ""
	}
	return c.Info.SubjectName + ", until " + c.Info.NotAfterUTC, c.Info.SHA256Thumbprint
}

func newEnrollmentDelete(a *app, k operator.Kind) *cobra.Command {
	o := &serviceOptions{}
	var tag string
	var yes bool
	c := &cobra.Command{
		Use: "delete " + argument(k) + " --service FILE", Short: "Delete one", Args: cobra.ExactArgs(1),
		Long: `delete takes the ` + k.Name() + ` away: what it let in does not register again. Devices that were assigned keep talking to their hubs
until they are disabled or deleted there too.`,
		Example: "  touchmark " + string(k) + " delete " + sample(k) + " --service service/owner.connection --yes",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkID(k, args[0]); err != nil {
				return err
			}
			if err := a.confirm(cmd.Context(), yes, "deleting "+k.Name()+" "+args[0], args[0]); err != nil {
				return err
			}
			return a.onService(cmd.Context(), o, func(ctx context.Context, svc *service) error {
				if err := svc.Delete(ctx, k, args[0], tag); err != nil {
					return err
				}
				return a.printDone("deleted", k.Name(), args[0])
			})
		},
	}
	o.flags(c)
	c.Flags().StringVar(&tag, "etag", "", "delete this version alone")
	c.Flags().BoolVar(&yes, "yes", false, "do not ask")
	return c
}

// printDone says what was done to what.
func (a *app) printDone(did, what, id string) error {
	if a.json {
		return a.printJSON(map[string]any{did: id})
	}
	_, err := fmt.Fprintf(a.out, "%s%s %s is %s.\n", strings.ToUpper(what[:1]), what[1:], printable(id), did)
	return err
}

func newEnrollmentStatus(a *app, k operator.Kind, enable bool) *cobra.Command {
	o := &serviceOptions{}
	var tag string
	verb, status, short := "disable", dps.EnrollmentDisabled, "Have one refuse devices"
	long := "disable has the " + k.Name() + " refuse devices, until it is enabled again. Devices that were assigned keep talking to their hubs."
	if enable {
		verb, status, short, long = "enable", dps.EnrollmentEnabled, "Have one admit devices", "enable has the "+k.Name()+" admit devices again."
	} else if k == operator.Individual {
		long += "\nTo block one device of a group, create a disabled enrollment with its registration ID."
	}
	c := &cobra.Command{
		Use: verb + " " + argument(k) + " --service FILE", Short: short, Args: cobra.ExactArgs(1), Long: long,
		Example: "  touchmark " + string(k) + " " + verb + " " + sample(k) + " --service service/owner.connection",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkID(k, args[0]); err != nil {
				return err
			}
			return a.onService(cmd.Context(), o, func(ctx context.Context, svc *service) error {
				before, after, err := svc.Edit(ctx, k, args[0], tag, func(d *operator.Document) error {
					e, err := d.Enrollment()
					if err != nil {
						return err
					}
					if statusOf(e) == string(status) {
						return operator.ErrUnchanged
					}
					return d.Set("provisioningStatus", status)
				})
				if err != nil {
					return err
				}
				if a.json {
					return a.printJSON(map[string]any{k.Member(): after.ID, "provisioningStatus": status, "changed": before != after})
				}
				did := string(status)
				if before == after {
					did += ", as before"
				}
				return a.printDone(did, k.Name(), after.ID)
			})
		},
	}
	o.flags(c)
	c.Flags().StringVar(&tag, "etag", "", "change this version alone")
	return c
}
