package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
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

// putOptions are the members of an enrollment that flags name, as az iot dps enrollment does.
type putOptions struct {
	serviceOptions
	attestation, endorsementKey     string
	certificate, secondary          string
	removePrimary, removeSecondary  bool
	caName, secondaryCA             string
	primaryKey, secondaryKey        string // files
	deviceID, tags, desired, info   string
	parent                          string
	status, reprovision, allocation string
	hubs                            []string
	webhook, webhookVersion, etag   string
	edge, showKeys                  bool
}

func newEnrollmentPut(a *app, k operator.Kind, create bool) *cobra.Command {
	o := &putOptions{}
	verb, short := "update", "Change one: what no flag names stays"
	long := `update gets the ` + k.Name() + `, changes what flags name, and puts it back unless somebody else changed it meanwhile: then it begins again,
or refuses, if --etag says which version was meant. Keys and certificates that no flag names stay. An empty value takes a member
away.`
	if create {
		verb, short = "create", "Make one"
		long = `create makes the ` + k.Name() + `. How devices prove themselves follows from what is given: a certificate, the name of a CA, an endorsement
key, else symmetric keys, which the service makes where no file names them. One that exists already is not touched.`
	}
	c := &cobra.Command{
		Use: verb + " " + argument(k) + " --service FILE", Short: short, Args: cobra.ExactArgs(1), Long: long,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkID(k, args[0]); err != nil {
				return err
			}
			return a.onService(cmd.Context(), &o.serviceOptions, func(ctx context.Context, svc *service) error {
				return a.runEnrollmentPut(ctx, svc, cmd, o, k, args[0], create)
			})
		},
	}
	on := " --service service/owner.connection"
	if create {
		c.Example = "  touchmark " + string(k) + " create " + sample(k) + " --certificate-path " + sample(k) + ".pem" + on + "\n" +
			"  touchmark " + string(k) + " create " + sample(k) + " --initial-twin-tags '{\"site\":\"A7\"}' --provisioning-status disabled" + on
	} else {
		c.Example = "  touchmark " + string(k) + " update " + sample(k) + " --allocation-policy static --iot-hubs hub-a.example.net" + on
	}
	o.serviceOptions.flags(c)
	f := c.Flags()
	f.StringVar(&o.attestation, "attestation-type", "", "symmetricKey, x509 or tpm (default: what the other flags say)")
	f.StringVar(&o.certificate, "certificate-path", "", "certificate, PEM or DER: a device's own, or the CA's that signs a group's")
	f.StringVar(&o.secondary, "secondary-certificate-path", "", "second certificate, for a roll-over")
	f.StringVar(&o.primaryKey, "primary-key-file", "", "file with the primary symmetric key, base64 of 16 to 64 octets; - is standard input")
	f.StringVar(&o.secondaryKey, "secondary-key-file", "", "file with the secondary symmetric key")
	f.StringVar(&o.tags, "initial-twin-tags", "", "tags of the initial twin: a JSON object, or @FILE")
	f.StringVar(&o.desired, "initial-twin-properties", "", "desired properties of the initial twin: a JSON object, or @FILE")
	f.StringVar(&o.status, "provisioning-status", "", "enabled or disabled")
	f.StringVar(&o.reprovision, "reprovision-policy", "", fmt.Sprintf("%s, %s or %s", operator.ReprovisionMigrate, operator.ReprovisionReset, operator.ReprovisionNever))
	f.StringVar(&o.allocation, "allocation-policy", "", "hashed, geolatency, static or custom")
	f.StringSliceVar(&o.hubs, "iot-hubs", nil, "host names of hubs that devices may be assigned to, with commas or again")
	f.StringVar(&o.webhook, "webhook-url", "", "webhook that allocates, or @FILE, where its address holds a key")
	f.StringVar(&o.webhookVersion, "api-version", "", "version of what the webhook is sent")
	f.BoolVar(&o.edge, "edge-enabled", false, "devices are IoT Edge devices")
	f.StringVar(&o.parent, "parent", "", "registration ID or device ID of the edge device that devices are put below at their hub (touchmark's services only: touchmark help allocation)")
	f.BoolVar(&o.showKeys, "show-keys", false, "print the symmetric keys that the service answers with")
	if k == operator.Individual {
		f.StringVar(&o.endorsementKey, "endorsement-key", "", "the TPM's endorsement key, base64, or @FILE")
		f.StringVar(&o.deviceID, "device-id", "", "name of the device in its hub (default: the registration ID)")
		f.StringVar(&o.info, "info", "", "device information: a JSON object, or @FILE")
	} else {
		f.StringVar(&o.caName, "ca-name", "", "name of a verified CA certificate of the service")
		f.StringVar(&o.secondaryCA, "secondary-ca-name", "", "second one, for a roll-over")
	}
	if !create {
		f.StringVar(&o.etag, "etag", "", "change this version alone")
		f.BoolVar(&o.removePrimary, "remove-certificate", false, "take the primary certificate away")
		f.BoolVar(&o.removeSecondary, "remove-secondary-certificate", false, "take the secondary certificate away")
	}
	for name, values := range map[string][]string{"attestation-type": {"symmetricKey", "x509", "tpm"}, "provisioning-status": {"enabled", "disabled"},
		"reprovision-policy": {operator.ReprovisionMigrate, operator.ReprovisionReset, operator.ReprovisionNever}, "allocation-policy": {"hashed", "geolatency", "static", "custom"}} {
		_ = c.RegisterFlagCompletionFunc(name, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp))
	}
	return c
}

func (a *app) runEnrollmentPut(ctx context.Context, svc *service, cmd *cobra.Command, o *putOptions, k operator.Kind, id string, create bool) error {
	if create {
		d, err := operator.ParseDocument(fmt.Appendf(nil, "{%q:%q}", k.Member(), id))
		if err != nil {
			return err
		}
		if err := a.apply(cmd, o, d); err != nil {
			return err
		}
		if err := d.Check(); err != nil {
			return usageError{err}
		}
		made, err := svc.Create(ctx, d)
		if errors.Is(err, operator.ErrExists) {
			return hint(err, "touchmark %s update changes it", k)
		}
		if err != nil {
			return err
		}
		return errors.Join(a.printEnrollment(made, o.showKeys), o.parentTaken(made))
	}
	_, after, err := svc.Edit(ctx, k, id, o.etag, func(d *operator.Document) error { return a.apply(cmd, o, d) })
	if errors.Is(err, operator.ErrChanged) {
		return hint(err, "touchmark %s show %s tells its etag, and what it is now", k, id)
	}
	if err != nil {
		return err
	}
	return errors.Join(a.printEnrollment(after, o.showKeys), o.parentTaken(after))
}

// parentTaken says whether the service has kept the parent: Azure's ignores what it does not know.
func (o *putOptions) parentTaken(d *operator.Document) error {
	if o.parent == "" || d.Has("parent") {
		return nil
	}
	return hint(fmt.Errorf("%s is at the service, but without --parent, which the service does not take", d), "parents are touchmark's own: at Azure put the device below its parent at the hub")
}

// apply changes the members that flags name.
func (a *app) apply(cmd *cobra.Command, o *putOptions, d *operator.Document) error {
	changed := cmd.Flags().Changed
	member := func(flag, name string, value any) error {
		switch {
		case !changed(flag):
			return nil
		case value == "":
			d.Drop(name)
			return nil
		}
		return d.Set(name, value)
	}
	var status dps.ProvisioningStatus
	var allocation dps.AllocationPolicy
	for _, f := range []struct {
		flag, text string
		into       json.Unmarshaler
	}{{"--provisioning-status", o.status, &status}, {"--allocation-policy", o.allocation, &allocation}} {
		if f.text == "" {
			continue
		}
		b, err := json.Marshal(f.text)
		if err != nil {
			return err
		}
		if err := f.into.UnmarshalJSON(b); err != nil {
			return usageError{fmt.Errorf("%s: %w", f.flag, err)}
		}
	}
	policy, err := operator.ParseReprovision(o.reprovision)
	if err != nil {
		return usageError{fmt.Errorf("--reprovision-policy: %w", err)}
	}
	if changed("reprovision-policy") && policy == nil {
		d.Drop("reprovisionPolicy")
	} else if policy != nil {
		if err := d.Set("reprovisionPolicy", policy); err != nil {
			return err
		}
	}
	err = errors.Join(member("provisioning-status", "provisioningStatus", string(status)), member("allocation-policy", "allocationPolicy", string(allocation)),
		member("device-id", "deviceId", o.deviceID), member("parent", "parent", o.parent))
	if changed("edge-enabled") {
		err = errors.Join(err, d.Set("capabilities", dps.Capabilities{IoTEdge: o.edge}))
	}
	if changed("iot-hubs") {
		if o.hubs = slices.DeleteFunc(o.hubs, func(h string) bool { return h == "" }); len(o.hubs) == 0 {
			d.Drop("iotHubs")
		} else {
			err = errors.Join(err, d.Set("iotHubs", o.hubs))
		}
	}
	if changed("webhook-url") || changed("api-version") {
		var w dps.CustomAllocationDefinition
		if err := d.Get("customAllocationDefinition", &w); err != nil {
			return err
		}
		if changed("webhook-url") {
			text, err := a.inline("--webhook-url", o.webhook)
			if err != nil {
				return err
			}
			w.WebhookURL = strings.TrimSpace(string(text))
		}
		if changed("api-version") || w.APIVersion == "" {
			w.APIVersion = o.webhookVersion
		}
		if w.APIVersion == "" {
			w.APIVersion = operator.APIVersion
		}
		if w.WebhookURL == "" {
			d.Drop("customAllocationDefinition")
		} else {
			err = errors.Join(err, d.Set("customAllocationDefinition", w))
		}
	}
	return errors.Join(err, a.applyObjects(changed, o, d), a.applyAttestation(o, d))
}

// applyObjects changes the members that are free-form JSON.
func (a *app) applyObjects(changed func(string) bool, o *putOptions, d *operator.Document) error {
	object := func(flag, text string) (json.RawMessage, error) {
		b, err := a.inline("--"+flag, text)
		if err != nil || len(bytes.TrimSpace(b)) == 0 {
			return nil, err
		}
		var m map[string]json.RawMessage
		if json.Unmarshal(b, &m) != nil || m == nil {
			return nil, usageError{fmt.Errorf("--%s: want a JSON object", flag)}
		}
		return b, nil
	}
	twin, properties := make(map[string]json.RawMessage), make(map[string]json.RawMessage)
	if err := d.Get("initialTwin", &twin); err != nil {
		return err
	}
	if p := twin["properties"]; p != nil {
		if err := json.Unmarshal(p, &properties); err != nil {
			return err
		}
	}
	set := func(m map[string]json.RawMessage, name, flag, text string) error {
		if !changed(flag) {
			return nil
		}
		b, err := object(flag, text)
		if b == nil {
			delete(m, name)
		} else {
			m[name] = b
		}
		return err
	}
	if changed("initial-twin-tags") || changed("initial-twin-properties") {
		if twin == nil {
			twin = make(map[string]json.RawMessage)
		}
		if properties == nil {
			properties = make(map[string]json.RawMessage)
		}
		if err := errors.Join(set(twin, "tags", "initial-twin-tags", o.tags), set(properties, "desired", "initial-twin-properties", o.desired)); err != nil {
			return err
		}
		delete(twin, "properties")
		if len(properties) > 0 {
			b, err := json.Marshal(properties)
			if err != nil {
				return err
			}
			twin["properties"] = b
		}
		if len(twin) == 0 {
			d.Drop("initialTwin")
		} else if err := d.Set("initialTwin", twin); err != nil {
			return err
		}
	}
	if changed("info") {
		b, err := object("info", o.info)
		if b == nil {
			d.Drop("optionalDeviceInformation")
			return err
		}
		return d.Set("optionalDeviceInformation", b)
	}
	return nil
}

// applyAttestation changes how devices prove themselves, one slot at a time.
func (a *app) applyAttestation(o *putOptions, d *operator.Document) error {
	var m *dps.Attestation
	if err := d.Get("attestation", &m); err != nil {
		return err
	}
	if m == nil {
		m = &dps.Attestation{}
	}
	given := dps.AttestationType("")
	for _, g := range []struct {
		t  dps.AttestationType
		by []string
	}{{dps.AttestationX509, []string{o.certificate, o.secondary, o.caName, o.secondaryCA}}, {dps.AttestationTPM, []string{o.endorsementKey}}, {dps.AttestationSymmetricKey, []string{o.primaryKey, o.secondaryKey}}} {
		if strings.Join(g.by, "") == "" {
			continue
		}
		if given != "" {
			return usageError{fmt.Errorf("flags for attestation by %s and by %s: want one", given, g.t)}
		}
		given = g.t
	}
	if o.attestation != "" {
		var t dps.AttestationType
		quoted, _ := json.Marshal(o.attestation)
		if err := t.UnmarshalJSON(quoted); err != nil {
			return usageError{fmt.Errorf("--attestation-type: %w", err)}
		}
		if given != "" && given != t {
			return usageError{fmt.Errorf("--attestation-type %s, and flags for attestation by %s", t, given)}
		}
		given = t
	}
	switch {
	case given == "" && m.Type == "":
		given = dps.AttestationSymmetricKey
	case given == "":
		given = m.Type
	case m.Type != "" && m.Type != given:
		return hint(usageError{fmt.Errorf("%s attests by %s: that cannot be changed", d, m.Type)}, "delete it and make it anew")
	}
	m.Type = given
	switch given {
	case dps.AttestationSymmetricKey:
		for _, slot := range []struct {
			file, flag string
			to         func(*dps.SymmetricKeyAttestation) *string
		}{{o.primaryKey, "--primary-key-file", func(k *dps.SymmetricKeyAttestation) *string { return &k.PrimaryKey }},
			{o.secondaryKey, "--secondary-key-file", func(k *dps.SymmetricKeyAttestation) *string { return &k.SecondaryKey }}} {
			if slot.file == "" {
				continue
			}
			key, err := a.readKeyFile(slot.flag, slot.file)
			if err != nil {
				return err
			}
			if m.SymmetricKey == nil {
				m.SymmetricKey = &dps.SymmetricKeyAttestation{}
			}
			*slot.to(m.SymmetricKey) = key
		}
	case dps.AttestationTPM:
		if o.endorsementKey != "" {
			b, err := a.inline("--endorsement-key", o.endorsementKey)
			if err != nil {
				return err
			}
			m.TPM = &dps.TPMAttestation{EndorsementKey: strings.TrimSpace(string(b))}
		}
		if m.TPM == nil {
			return usageError{errors.New("attestation by tpm needs --endorsement-key")}
		}
	case dps.AttestationX509:
		if err := applyX509(o, d.Kind, m); err != nil {
			return err
		}
	}
	return d.Set("attestation", m)
}

func applyX509(o *putOptions, k operator.Kind, m *dps.Attestation) error {
	if m.X509 == nil {
		m.X509 = &dps.X509Attestation{}
	}
	x := m.X509
	if o.caName != "" || o.secondaryCA != "" {
		if o.certificate != "" || o.secondary != "" {
			return usageError{errors.New("want certificates, or names of CAs that the service has")}
		}
		if x.CAReferences == nil {
			x.CAReferences = &dps.CAReferences{}
		}
		x.ClientCertificates, x.SigningCertificates = nil, nil
		if o.caName != "" {
			x.CAReferences.Primary = o.caName
		}
		if o.secondaryCA != "" {
			x.CAReferences.Secondary = o.secondaryCA
		}
		return nil
	}
	certs := &x.ClientCertificates
	if k == operator.Group {
		certs = &x.SigningCertificates
	}
	if o.certificate == "" && o.secondary == "" && !o.removePrimary && !o.removeSecondary {
		if *certs == nil && x.CAReferences == nil {
			return usageError{errors.New("attestation by x509 needs --certificate-path")}
		}
		return nil
	}
	x.CAReferences = nil
	if *certs == nil {
		*certs = &dps.X509Certificates{}
	}
	for _, slot := range []struct {
		file   string
		remove bool
		to     **dps.X509Certificate
	}{{o.certificate, o.removePrimary, &(*certs).Primary}, {o.secondary, o.removeSecondary, &(*certs).Secondary}} {
		if slot.remove {
			*slot.to = nil
		}
		if slot.file == "" {
			continue
		}
		b, err := readSmall(slot.file)
		if err != nil {
			return usageError{fmt.Errorf("reading a certificate: %w", err)}
		}
		if *slot.to, err = operator.Certificate(b); err != nil {
			return usageError{fmt.Errorf("%s: %w", slot.file, err)}
		}
	}
	if **certs == (dps.X509Certificates{}) {
		return usageError{errors.New("one certificate has to stay")}
	}
	return nil
}

// inline returns a flag's text, or what is in the file that it names with @.
func (a *app) inline(flag, text string) ([]byte, error) {
	path, is := strings.CutPrefix(text, "@")
	if !is {
		return []byte(text), nil
	}
	b, err := readSmall(path)
	if err != nil {
		return nil, usageError{fmt.Errorf("%s: %w", flag, err)}
	}
	return b, nil
}

// readKeyFile reads a symmetric key: base64 of 16 to 64 octets.
func (a *app) readKeyFile(flag, path string) (string, error) {
	b, err := a.readInput(path, 1<<10)
	if err != nil {
		return "", usageError{fmt.Errorf("%s: %w", flag, err)}
	}
	defer clear(b)
	key := strings.TrimSpace(string(b))
	if raw, err := base64.StdEncoding.DecodeString(key); err != nil || len(raw) < 16 || len(raw) > 64 {
		return "", usageError{fmt.Errorf("%s: %s holds no base64 of 16 to 64 octets", flag, path)}
	}
	return key, nil
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
