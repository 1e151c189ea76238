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

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/operator"
)

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
