// Package templates holds what a product looks like: certificate templates, configuration files that are rendered into
// stamps, labels, and profiles to start from. They are embedded; a line's own folder of templates is looked into first.
//
// Certificate templates are JSON in the form of go.step.sm/crypto/x509util. Files are Go text templates over a [Device],
// with one function more: toml quotes a string for TOML, which values from a serial list must go through.
package templates

import (
	"bytes"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strings"
	"text/template"
)

//go:embed certificates files labels profiles
var embedded embed.FS

// Limits of a template and of what it renders, in octets.
const (
	maxTemplate = 256 << 10
	maxRendered = 1 << 20
)

// Device is what a file template sees.
type Device struct {
	IDScope        string
	GlobalEndpoint string
	RegistrationID string
	Serial         string
	// Attestation is "x509" or "symmetricKey".
	Attestation string
	// CertificateChainFile and PrivateKeyFile are file names beside the rendered file; KeyURI is set instead of the latter
	// where the key is in a token.
	CertificateChainFile string
	PrivateKeyFile       string
	KeyURI               string
	// SymmetricKey is base64. A file that shows it must be secret.
	SymmetricKey string
	// Columns holds the row of the serial list, by column.
	Columns map[string]string
}

// read finds a template: in own, unless that is nil, then among the embedded ones.
func read(own fs.FS, folder, name, suffix string) (string, error) {
	if !fs.ValidPath(name) || strings.Contains(name, "/") {
		return "", fmt.Errorf("template %q: want a plain file name", name)
	}
	if own != nil {
		b, err := fs.ReadFile(own, name+suffix)
		if err == nil && len(b) > maxTemplate {
			err = fmt.Errorf("template %q is larger than %d octets", name, maxTemplate)
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return string(b), err
		}
	}
	b, err := embedded.ReadFile(path.Join(folder, name+suffix))
	if errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("template %q is neither in the line's templates folder nor built in (%s)", name, strings.Join(builtIn(folder, suffix), ", "))
	}
	return string(b), err
}

func builtIn(folder, suffix string) []string {
	entries, _ := embedded.ReadDir(folder)
	var names []string
	for _, e := range entries {
		names = append(names, strings.TrimSuffix(e.Name(), suffix))
	}
	return names
}

// Certificate returns the text of a certificate template. The name has no ending; files end in ".tmpl".
func Certificate(name string, own fs.FS) (string, error) {
	return read(own, "certificates", name, ".tmpl")
}

// Label returns the text of a label template, which pkg/label parses. The name has no ending; files end in ".toml".
func Label(name string, own fs.FS) (string, error) {
	return read(own, "labels", name, ".toml")
}

// Profiles returns the profiles that a new line begins with, by name.
func Profiles() map[string]string {
	all := make(map[string]string)
	for _, name := range builtIn("profiles", ".toml") {
		b, _ := embedded.ReadFile("profiles/" + name + ".toml") // embedded: it is there
		all[name] = string(b)
	}
	return all
}

// A File is a parsed file template. It may be used by many goroutines.
type File struct {
	name string
	t    *template.Template
}

// Parse parses a file template and checks it by rendering a sample device.
func Parse(name string, own fs.FS) (*File, error) {
	text, err := read(own, "files", name, "")
	if err != nil {
		return nil, err
	}
	t, err := template.New(name).Option("missingkey=error").Funcs(template.FuncMap{"toml": quoteTOML}).Parse(text)
	if err != nil {
		return nil, fmt.Errorf("template %q: %w", name, err)
	}
	f := &File{name: name, t: t}
	for _, sample := range []Device{
		{IDScope: "0ne00000000", GlobalEndpoint: "example.net", RegistrationID: "sample", Serial: "sample", Attestation: "x509",
			CertificateChainFile: "chain.pem", PrivateKeyFile: "key.pem", Columns: map[string]string{"serial": "sample"}},
		{IDScope: "0ne00000000", GlobalEndpoint: "example.net", RegistrationID: "sample", Serial: "sample", Attestation: "symmetricKey",
			SymmetricKey: "c2FtcGxl", Columns: map[string]string{"serial": "sample"}},
	} {
		// A column that the sample has not is no fault of the template.
		if _, err := f.Render(nil, sample); err != nil && !strings.Contains(err.Error(), "map has no entry for key") {
			return nil, err
		}
	}
	return f, nil
}

// Render appends the rendered file to dst. A column that the device's list has not is an error.
func (f *File) Render(dst []byte, d Device) ([]byte, error) {
	w := &limited{Buffer: bytes.NewBuffer(dst), left: maxRendered}
	if err := f.t.Execute(w, d); err != nil {
		return nil, fmt.Errorf("template %q: %w", f.name, err)
	}
	return w.Bytes(), nil
}

// limited refuses to grow without bound.
type limited struct {
	*bytes.Buffer
	left int
}

func (l *limited) Write(p []byte) (int, error) {
	if l.left -= len(p); l.left < 0 {
		return 0, fmt.Errorf("renders more than %d octets", maxRendered)
	}
	return l.Buffer.Write(p)
}

// quoteTOML writes a TOML basic string.
func quoteTOML(s string) string {
	var b strings.Builder
	b.WriteByte('"')
	for _, r := range s {
		switch {
		case r == '"' || r == '\\':
			b.WriteByte('\\')
			b.WriteRune(r)
		case r < ' ' || r == 0x7f:
			fmt.Fprintf(&b, `\u%04X`, r)
		default:
			b.WriteRune(r)
		}
	}
	b.WriteByte('"')
	return b.String()
}
