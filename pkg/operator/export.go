package operator

import (
	"context"
	"encoding/base64"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"github.com/touchmark/touchmark/pkg/dps"
)

// ExportConfig says what to get out of a service.
type ExportConfig struct {
	// Keys asks for symmetric keys, one call for each enrollment that has some.
	Keys bool
	// Certificates fill in what services do not show, by thumbprint as of [Thumbprint].
	Certificates map[string]*dps.X509Certificate
	// Parallel is how many calls for keys are under way at once; 0 means 4.
	Parallel int
}

// An Exported is an enrollment as it leaves a service, without what the service made, and what keeps it from being the same
// enrollment elsewhere (service API, section 8).
type Exported struct {
	Document *Document
	Missing  []string
}

// Export hands on all enrollments of a kind, page by page.
func (c *Client) Export(ctx context.Context, k Kind, cfg ExportConfig, emit func(*Exported) error) error {
	if cfg.Parallel <= 0 {
		cfg.Parallel = 4
	}
	return ordered(ctx, cfg.Parallel, c.All(ctx, k), func(ctx context.Context, d *Document) (*Exported, error) {
		x, err := c.export(ctx, d, &cfg)
		if err != nil {
			err = fmt.Errorf("exporting %s: %w", d, err)
		}
		return x, err
	}, func(x *Exported) error {
		if x == nil {
			return nil // it went while it was read
		}
		return emit(x)
	})
}

func (c *Client) export(ctx context.Context, d *Document, cfg *ExportConfig) (*Exported, error) {
	d.Portable()
	e, err := d.Enrollment()
	if err != nil {
		return nil, err
	}
	x := &Exported{Document: d}
	switch a := e.Attestation; {
	case a == nil:
		return nil, errors.New("it has no attestation")
	case a.Type == dps.AttestationSymmetricKey && !cfg.Keys:
		x.Missing = append(x.Missing, "keys: a service that takes it without makes new ones")
	case a.Type == dps.AttestationSymmetricKey:
		is, err := c.Mechanism(ctx, d.Kind, d.ID)
		if errors.Is(err, ErrNotFound) {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		if is.SymmetricKey == nil {
			return nil, errors.New("the service shows no keys")
		}
		a.SymmetricKey = is.SymmetricKey
		if err := d.Set("attestation", a); err != nil {
			return nil, err
		}
	case a.X509 != nil && a.X509.CAReferences != nil:
		x.Missing = append(x.Missing, "CA certificates: they have to be there by the same names first")
	case a.X509 != nil:
		certs := a.X509.ClientCertificates
		if certs == nil {
			certs = a.X509.SigningCertificates
		}
		whole := true
		for _, slot := range []**dps.X509Certificate{&certs.Primary, &certs.Secondary} {
			if *slot == nil || (*slot).Certificate != "" {
				continue
			}
			print, err := Thumbprint(*slot)
			if err != nil {
				return nil, err
			}
			if found := cfg.Certificates[print]; found != nil {
				*slot = found
			} else {
				whole = false
			}
		}
		if !whole {
			x.Missing = append(x.Missing, "certificates: services show thumbprints alone")
		} else if err := d.Set("attestation", a); err != nil {
			return nil, err
		}
	}
	if len(e.IoTHubs) > 0 && e.AllocationPolicy == "" {
		x.Missing = append(x.Missing, "allocationPolicy: it has to be there where iotHubs are")
	}
	if w := e.CustomAllocationDefinition; e.AllocationPolicy == dps.AllocationCustom && (w == nil || w.WebhookURL == "" || w.APIVersion == "") {
		x.Missing = append(x.Missing, "the webhook's address or version")
	}
	for name := range d.members {
		if name != d.Kind.Member() && !slices.Contains(order, name) && name != "credentialPolicyName" && d.Has(name) {
			x.Missing = append(x.Missing, "a word for "+strconv.QuoteToASCII(name)+": other services may not know it")
		}
	}
	return x, nil
}

// A Writer writes exported enrollments.
type Writer interface {
	Write(*Exported) error
	Flush() error
}

// NewJSONWriter writes a JSON object on each line: what [Rows] reads, and Azure's bulk call takes ten at a time.
func NewJSONWriter(w io.Writer) Writer {
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	return jsonWriter{enc}
}

type jsonWriter struct{ enc *json.Encoder }

func (w jsonWriter) Write(x *Exported) error { return w.enc.Encode(x.Document) }
func (w jsonWriter) Flush() error            { return nil }

// NewCSVWriter writes a table of enrollments of one kind. What has no column is added to Missing.
func NewCSVWriter(w io.Writer, k Kind) Writer {
	return &csvWriter{w: csv.NewWriter(w), columns: Columns(k)}
}

type csvWriter struct {
	w       *csv.Writer
	columns []string
	begun   bool
}

func (w *csvWriter) Flush() error {
	if !w.begun {
		w.begun = true
		_ = w.w.Write(w.columns) // its error comes below
	}
	w.w.Flush()
	return w.w.Error()
}

func (w *csvWriter) Write(x *Exported) error {
	if !w.begun {
		if err := w.Flush(); err != nil {
			return err
		}
	}
	d := x.Document
	e, err := d.Enrollment()
	if err != nil {
		return err
	}
	cells := map[string]string{d.Kind.Member(): d.ID, colAttestation: string(e.Attestation.Type), colStatus: strings.TrimPrefix(string(e.ProvisioningStatus), string(dps.EnrollmentStatusNull)),
		colHubs: strings.Join(e.IoTHubs, " "), colAllocation: string(e.AllocationPolicy), colReprovision: FormatReprovision(e.ReprovisionPolicy), colParent: e.Parent}
	if e.ProvisioningStatus == dps.EnrollmentStatusNull {
		cells[colStatus] = ""
	}
	var device string
	if err := d.Get("deviceId", &device); err != nil {
		return err
	}
	cells[colDeviceID] = device
	if e.Capabilities != nil {
		cells[colEdge] = strconv.FormatBool(e.Capabilities.IoTEdge)
	}
	if t := e.InitialTwin; t != nil {
		cells[colTags] = string(t.Tags)
		if t.Properties != nil {
			cells[colDesired] = string(t.Properties.Desired)
		}
	}
	if c := e.CustomAllocationDefinition; c != nil {
		cells[colWebhook], cells[colWebhookVersion] = c.WebhookURL, c.APIVersion
	}
	if k := e.Attestation.SymmetricKey; k != nil {
		cells[colPrimaryKey], cells[colSecondaryKey] = k.PrimaryKey, k.SecondaryKey
	}
	if t := e.Attestation.TPM; t != nil {
		cells[colEndorsementKey] = t.EndorsementKey
		if t.StorageRootKey != "" {
			x.Missing = append(x.Missing, "a column for the storage root key")
		}
	}
	if a := e.Attestation.X509; a != nil {
		certs := a.ClientCertificates
		if certs == nil {
			certs = a.SigningCertificates
		}
		if certs != nil {
			for col, c := range map[string]*dps.X509Certificate{colCertificate: certs.Primary, colSecondary: certs.Secondary} {
				if c == nil || c.Certificate == "" {
					continue
				}
				cert, err := ParseCertificate(c.Certificate)
				if err != nil {
					return err
				}
				cells[col] = base64.StdEncoding.EncodeToString(cert.Raw)
			}
		}
		if a.CAReferences != nil {
			cells[colCAName], cells[colSecondaryCA] = a.CAReferences.Primary, a.CAReferences.Secondary
		}
	}
	for _, name := range []string{"optionalDeviceInformation", "iotHubHostName", "credentialPolicyName"} {
		if d.Has(name) {
			x.Missing = append(x.Missing, "a column for "+name)
		}
	}
	record := make([]string, len(w.columns))
	for i, c := range w.columns {
		record[i] = cells[c]
	}
	return w.w.Write(record)
}
