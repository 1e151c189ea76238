package operator

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	"github.com/touchmark/touchmark/pkg/dps"
)

// A Change is one member that differs. Values are JSON, absent ones nil; keys are shown as what they are not.
type Change struct {
	Member string          `json:"member"` // as in initialTwin.tags.site
	Have   json.RawMessage `json:"have,omitempty"`
	Want   json.RawMessage `json:"want,omitempty"`
}

// String prints the change as a line of a diff.
func (c Change) String() string {
	value := func(b json.RawMessage) string {
		if b == nil {
			return "nothing"
		}
		return string(b)
	}
	return c.Member + ": " + value(c.Have) + " → " + value(c.Want)
}

// Differs gets the enrollment of want's ID and compares. It asks for keys only if want has some. The error is ErrNotFound.
func (c *Client) Differs(ctx context.Context, want *Document) ([]Change, *Document, error) {
	have, err := c.Get(ctx, want.Kind, want.ID)
	if err != nil {
		return nil, nil, err
	}
	e, err := want.Enrollment()
	if err != nil {
		return nil, nil, err
	}
	var keys *dps.SymmetricKeyAttestation
	if a := e.Attestation; a != nil && a.SymmetricKey != nil && *a.SymmetricKey != (dps.SymmetricKeyAttestation{}) {
		is, err := c.Mechanism(ctx, want.Kind, want.ID)
		if err != nil {
			return nil, nil, err
		}
		keys = is.SymmetricKey
	}
	changes, err := Compare(have, want, keys)
	return changes, have, err
}

// Compare says in what have, as a service shows it, is another enrollment than want, as somebody would send it. What a service makes
// by itself does not count, nor do spellings of one meaning: letter case of values, what is absent and what is null, certificates
// and their thumbprints, a device ID that is the registration ID. Keys are compared where want has some, with those that
// [Client.Mechanism] showed. Changes stand in the order of their members' names.
func Compare(have, want *Document, keys *dps.SymmetricKeyAttestation) ([]Change, error) {
	is, err := plain(have)
	if err != nil {
		return nil, fmt.Errorf("%s, as the service has it: %w", have, err)
	}
	should, err := plain(want)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", want, err)
	}
	var changes []Change
	if a, ok := should["attestation"].(map[string]any); ok {
		wanted, _ := a["symmetricKey"].(map[string]any)
		delete(a, "symmetricKey")
		changes = compareKeys(wanted, keys)
	}
	if a, ok := is["attestation"].(map[string]any); ok {
		delete(a, "symmetricKey")
	}
	changes = append(changes, differences("", is, should)...)
	slices.SortFunc(changes, func(a, b Change) int { return cmp.Compare(a.Member, b.Member) })
	return changes, nil
}

func compareKeys(wanted map[string]any, keys *dps.SymmetricKeyAttestation) (changes []Change) {
	if keys == nil {
		keys = &dps.SymmetricKeyAttestation{}
	}
	for _, slot := range []struct{ name, is string }{{"primaryKey", keys.PrimaryKey}, {"secondaryKey", keys.SecondaryKey}} {
		want, _ := wanted[slot.name].(string)
		a, _ := base64.StdEncoding.DecodeString(want)
		b, _ := base64.StdEncoding.DecodeString(slot.is)
		if want != "" && !bytes.Equal(a, b) {
			changes = append(changes, Change{"attestation.symmetricKey." + slot.name, json.RawMessage(`"one key"`), json.RawMessage(`"another key"`)})
		}
	}
	return changes
}

// plain reduces a document to what it means.
func plain(d *Document) (map[string]any, error) {
	e, err := d.Enrollment()
	if err != nil {
		return nil, err
	}
	b, err := json.Marshal(d)
	if err != nil {
		return nil, err
	}
	var m map[string]any
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.UseNumber()
	if err := dec.Decode(&m); err != nil {
		return nil, err
	}
	for _, name := range append(readOnly, d.Kind.Member()) {
		delete(m, name)
	}
	if d.Kind == Individual && m["deviceId"] == d.ID {
		delete(m, "deviceId")
	}
	if delete(m, "provisioningStatus"); e.ProvisioningStatus == dps.EnrollmentDisabled {
		m["provisioningStatus"] = string(e.ProvisioningStatus)
	}
	if e.AllocationPolicy != "" {
		m["allocationPolicy"] = string(e.AllocationPolicy)
	}
	if e.Capabilities == nil || !e.Capabilities.IoTEdge {
		if c, ok := m["capabilities"].(map[string]any); ok {
			delete(c, "iotEdge")
		}
	}
	if e.IoTHubHostName != "" {
		m["iotHubHostName"] = dps.Fold(e.IoTHubHostName)
	}
	if len(e.IoTHubs) > 0 {
		hubs := make([]any, len(e.IoTHubs))
		for i, h := range e.IoTHubs {
			e.IoTHubs[i] = dps.Fold(h)
		}
		slices.Sort(e.IoTHubs)
		for i, h := range e.IoTHubs {
			hubs[i] = h
		}
		m["iotHubs"] = hubs
	}
	if e.Attestation != nil {
		a := map[string]any{"type": string(e.Attestation.Type)}
		if raw, ok := m["attestation"].(map[string]any); ok {
			for _, part := range []string{"symmetricKey", "tpm"} {
				if raw[part] != nil {
					a[part] = raw[part]
				}
			}
		}
		if x := e.Attestation.X509; x != nil {
			if a["x509"], err = plainX509(x); err != nil {
				return nil, err
			}
		}
		m["attestation"] = a
	}
	prune(m)
	return m, nil
}

func plainX509(x *dps.X509Attestation) (map[string]any, error) {
	out := make(map[string]any)
	for name, certs := range map[string]*dps.X509Certificates{"clientCertificates": x.ClientCertificates, "signingCertificates": x.SigningCertificates} {
		if certs == nil {
			continue
		}
		slots := make(map[string]any)
		for slot, c := range map[string]*dps.X509Certificate{"primary": certs.Primary, "secondary": certs.Secondary} {
			if c == nil {
				continue
			}
			print, err := Thumbprint(c)
			if err != nil {
				return nil, fmt.Errorf("the %s certificate: %w", slot, err)
			}
			slots[slot] = print
		}
		if slots["secondary"] == nil && slots["primary"] != nil {
			slots["secondary"] = slots["primary"] // as services show what came alone (service API, section 1.7)
		}
		out[name] = slots
	}
	if x.CAReferences != nil {
		out["caReferences"] = map[string]any{"primary": x.CAReferences.Primary, "secondary": x.CAReferences.Secondary}
	}
	return out, nil
}

// Thumbprint returns the SHA-256 of a certificate in upper-case hex, from the certificate or else from its description.
func Thumbprint(c *dps.X509Certificate) (string, error) {
	if c.Certificate != "" {
		cert, err := ParseCertificate(c.Certificate)
		if err != nil {
			return "", err
		}
		sum := sha256.Sum256(cert.Raw)
		return strings.ToUpper(hex.EncodeToString(sum[:])), nil
	}
	if c.Info == nil || len(c.Info.SHA256Thumbprint) != 2*sha256.Size {
		return "", errors.New("neither a certificate nor its thumbprint")
	}
	return strings.ToUpper(c.Info.SHA256Thumbprint), nil
}

// ParseCertificate reads PEM, or base64 of DER or of PEM, as clients send it (service API, section 1.7).
func ParseCertificate(text string) (*x509.Certificate, error) {
	for range 2 {
		if block, _ := pem.Decode([]byte(text)); block != nil {
			if block.Type != "CERTIFICATE" {
				return nil, errors.New("the PEM is not of a certificate")
			}
			return x509.ParseCertificate(block.Bytes)
		}
		b, err := base64.StdEncoding.DecodeString(strings.Map(func(r rune) rune {
			if r == '\n' || r == '\r' || r == ' ' || r == '\t' {
				return -1
			}
			return r
		}, text))
		if err != nil {
			return nil, errors.New("neither PEM nor base64")
		}
		if cert, err := x509.ParseCertificate(b); err == nil {
			return cert, nil
		}
		text = string(b)
	}
	return nil, errors.New("no certificate")
}

// prune takes away what means nothing: null, empty objects, empty lists, empty texts, at any depth of what the wire itself defines.
// What is free-form keeps its own empties, but for the outermost.
func prune(m map[string]any) {
	for k, v := range m {
		switch v := v.(type) {
		case nil:
			delete(m, k)
		case string:
			if v == "" {
				delete(m, k)
			}
		case []any:
			if len(v) == 0 {
				delete(m, k)
			}
		case map[string]any:
			if k != "tags" && k != "desired" && k != "optionalDeviceInformation" {
				prune(v)
			}
			if len(v) == 0 {
				delete(m, k)
			}
		}
	}
}

func differences(path string, have, want map[string]any) (changes []Change) {
	names := maps.Clone(have)
	maps.Copy(names, want)
	for name := range names {
		a, b := have[name], want[name]
		if same(a, b) {
			continue
		}
		at := strings.TrimPrefix(path+"."+name, ".")
		x, xok := a.(map[string]any)
		y, yok := b.(map[string]any)
		if xok && yok {
			changes = append(changes, differences(at, x, y)...)
			continue
		}
		c := Change{Member: at}
		if _, ok := have[name]; ok {
			c.Have, _ = json.Marshal(a) // it came from JSON
		}
		if _, ok := want[name]; ok {
			c.Want, _ = json.Marshal(b)
		}
		changes = append(changes, c)
	}
	return changes
}

// same compares JSON values: numbers by what they amount to, where their spelling differs.
func same(a, b any) bool {
	switch x := a.(type) {
	case json.Number:
		y, ok := b.(json.Number)
		if !ok || x == y {
			return ok
		}
		f, err1 := x.Float64()
		g, err2 := y.Float64()
		return err1 == nil && err2 == nil && f == g && strings.ContainsAny(x.String()+y.String(), ".eE")
	case []any:
		y, ok := b.([]any)
		return ok && slices.EqualFunc(x, y, same)
	case map[string]any:
		y, ok := b.(map[string]any)
		return ok && maps.EqualFunc(x, y, same)
	}
	return reflect.DeepEqual(a, b)
}
