package templates_test

import (
	"strings"
	"testing"
	"testing/fstest"
	"unicode/utf8"

	"github.com/pelletier/go-toml/v2"

	"github.com/touchmark/touchmark/templates"
)

// The configuration must read back as TOML, with the values that went in, whatever they are.
func TestIdentityServiceConfig(t *testing.T) {
	f, err := templates.Parse("iot-identity-service.toml", nil)
	if err != nil {
		t.Fatal(err)
	}
	type config struct {
		Provisioning struct {
			Source         string
			GlobalEndpoint string `toml:"global_endpoint"`
			IDScope        string `toml:"id_scope"`
			Attestation    struct {
				Method         string
				RegistrationID string                 `toml:"registration_id"`
				IdentityCert   string                 `toml:"identity_cert"`
				IdentityPK     string                 `toml:"identity_pk"`
				SymmetricKey   struct{ Value string } `toml:"symmetric_key"`
			}
		}
	}
	for name, d := range map[string]templates.Device{
		"x509":      {IDScope: "0ne1", GlobalEndpoint: "h.example", RegistrationID: "pump-1", Attestation: "x509", CertificateChainFile: "device-chain.pem", PrivateKeyFile: "device-key.pem"},
		"token":     {IDScope: "0ne1", GlobalEndpoint: "h.example", RegistrationID: "pump-1", Attestation: "x509", CertificateChainFile: "device-chain.pem", KeyURI: "pkcs11:token=a"},
		"symmetric": {IDScope: "0ne1", GlobalEndpoint: "h.example", RegistrationID: "pump-1", Attestation: "symmetricKey", SymmetricKey: "a2V5"},
		"tpm":       {IDScope: "0ne1", GlobalEndpoint: "h.example", RegistrationID: "pump-1", Attestation: "tpm"},
		"hostile":   {IDScope: "\"\n[evil]\nx=\"", GlobalEndpoint: `\u0022`, RegistrationID: "a\x00b", Attestation: "symmetricKey", SymmetricKey: "k"},
	} {
		out, err := f.Render(nil, d)
		if err != nil {
			t.Fatal(err)
		}
		var c config
		if err := toml.NewDecoder(strings.NewReader(string(out))).DisallowUnknownFields().Decode(&c); err != nil {
			t.Errorf("%s: %v\n%s", name, err, out)
			continue
		}
		p := c.Provisioning
		if p.Source != "dps" || p.GlobalEndpoint != "https://"+d.GlobalEndpoint || p.IDScope != d.IDScope ||
			p.Attestation.RegistrationID != d.RegistrationID || p.Attestation.SymmetricKey.Value != d.SymmetricKey {
			t.Errorf("%s: %+v", name, c)
		}
		if method := map[string]string{"x509": "x509", "symmetricKey": "symmetric_key", "tpm": "tpm"}[d.Attestation]; p.Attestation.Method != method {
			t.Errorf("%s: method %q", name, p.Attestation.Method)
		}
		if d.PrivateKeyFile != "" && p.Attestation.IdentityPK != "file:///etc/aziot/device/device-key.pem" || d.KeyURI != "" && p.Attestation.IdentityPK != d.KeyURI {
			t.Errorf("%s: private key %q", name, p.Attestation.IdentityPK)
		}
	}
}

func TestOwnTemplates(t *testing.T) {
	own := fstest.MapFS{
		"label.txt":   {Data: []byte("{{.Serial}} {{.Columns.mac}}")},
		"bad.txt":     {Data: []byte("{{.Nothing}}")},
		"broken.txt":  {Data: []byte("{{")},
		"big.txt":     {Data: []byte(`{{range $i := .Serial}}{{end}}{{printf "%2000000d" 1}}`)},
		"device.tmpl": {Data: []byte(`{"subject": "mine"}`)},
	}
	f, err := templates.Parse("label.txt", own)
	if err != nil {
		t.Fatal(err)
	}
	if out, err := f.Render([]byte(">"), templates.Device{Serial: "S", Columns: map[string]string{"mac": "m"}}); err != nil || string(out) != ">S m" {
		t.Errorf("%q, %v", out, err)
	}
	if _, err := f.Render(nil, templates.Device{Serial: "S", Columns: map[string]string{}}); err == nil {
		t.Error("a missing column renders")
	}
	for _, name := range []string{"bad.txt", "broken.txt", "big.txt", "../templates.go", "nowhere"} {
		if _, err := templates.Parse(name, own); err == nil {
			t.Errorf("%s parses", name)
		}
	}
	if text, err := templates.Certificate("device", own); err != nil || !strings.Contains(text, "mine") {
		t.Errorf("the line's own template does not come first: %q, %v", text, err)
	}
	if len(templates.Profiles()) != 6 {
		t.Errorf("profiles: %v", templates.Profiles())
	}
}

// A value stays a value: whatever a column or an ID holds, the document reads back with it and with nothing else.
func FuzzRender(f *testing.F) {
	file, err := templates.Parse("iot-identity-service.toml", nil)
	if err != nil {
		f.Fatal(err)
	}
	f.Add("pump-1", "a2V5")
	f.Add("\"\n[evil]\nx=\"", "\\u0022\x00\u2028")
	f.Fuzz(func(t *testing.T, id, key string) {
		if !utf8.ValidString(id) || !utf8.ValidString(key) {
			return // TOML cannot hold it, and no ID or key is like that
		}
		out, err := file.Render(nil, templates.Device{IDScope: "0ne1", GlobalEndpoint: "h", RegistrationID: id, Attestation: "symmetricKey", SymmetricKey: key})
		if err != nil {
			return
		}
		var doc struct {
			Provisioning struct {
				Attestation struct {
					RegistrationID string                 `toml:"registration_id"`
					SymmetricKey   struct{ Value string } `toml:"symmetric_key"`
				}
			}
		}
		if err := toml.Unmarshal(out, &doc); err != nil || doc.Provisioning.Attestation.RegistrationID != id || doc.Provisioning.Attestation.SymmetricKey.Value != key {
			t.Fatalf("%q, %q: %v\n%s", id, key, err, out)
		}
	})
}
