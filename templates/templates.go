// Package templates holds what a product looks like: certificate templates, configuration files that are rendered into
// stamps, labels, and profiles to start from. They are embedded; a line's own folder of templates is looked into first.
//
// Certificate templates are JSON in the form of go.step.sm/crypto/x509util. Files are Go text templates over a [Device], with
// some functions more. Values must go through the one of the file's format, or what stands in a serial list could be more than
// a value:
//
//	toml    a TOML basic string
//	json    a JSON string
//	env     the right side of NAME=value, for a shell and for those who read such files as a shell does
//	c       C string literals, one for each line of the value
//	hex     small hexadecimal digits of the value's octets
//	base64  standard base64 of the value's octets
//	chunks  cuts text into pieces of at most so many octets: {{range chunks 192 (base64 .PrivateKey)}}
package templates

import (
	"bytes"
	"embed"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strings"
	"text/template"
)

//go:embed c certificates files labels profiles station.toml
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
	// Attestation is "x509", "symmetricKey" or "tpm".
	Attestation string
	// CertificateChainFile and PrivateKeyFile are file names beside the rendered file; KeyURI is set instead of the latter
	// where the key is in a token.
	CertificateChainFile string
	PrivateKeyFile       string
	KeyURI               string
	// CertificateChain is that file's content in PEM, the device's certificate first; PrivateKey is the other's (PKCS #8), empty
	// where there is a KeyURI. A file that shows the key must be secret.
	CertificateChain string
	PrivateKey       string
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

// Station returns the station.toml that a line starts with.
func Station() string {
	b, _ := embedded.ReadFile("station.toml") // embedded: it is there
	return string(b)
}

// CHeader returns touchmark_tlv.h, the C99 reader of what pkg/stamp/raw writes.
func CHeader() string {
	b, _ := embedded.ReadFile("c/touchmark_tlv.h") // embedded: it is there
	return string(b)
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
	t, err := template.New(name).Option("missingkey=error").Funcs(functions).Parse(text)
	if err != nil {
		return nil, fmt.Errorf("template %q: %w", name, err)
	}
	f := &File{name: name, t: t}
	for _, sample := range []Device{
		{Attestation: "x509", CertificateChainFile: "chain.pem", CertificateChain: "sample", PrivateKeyFile: "key.pem", PrivateKey: "sample"},
		{Attestation: "x509", CertificateChainFile: "chain.pem", CertificateChain: "sample", KeyURI: "pkcs11:token=sample"},
		{Attestation: "symmetricKey", SymmetricKey: "c2FtcGxl"},
		{Attestation: "tpm"},
	} {
		sample.IDScope, sample.GlobalEndpoint, sample.RegistrationID, sample.Serial = "0ne00000000", "example.net", "sample", "sample"
		sample.Columns = map[string]string{"serial": "sample"}
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

// ShowsSecret reports whether a file that was rendered for a device shows anything of its private or symmetric key, in whatever
// form: whether it would be another one for a device with other keys.
func (f *File) ShowsSecret(rendered []byte, d Device) (bool, error) {
	if d.PrivateKey == "" && d.SymmetricKey == "" {
		return false, nil
	}
	d.PrivateKey, d.SymmetricKey = strings.Repeat("A", len(d.PrivateKey)), strings.Repeat("A", len(d.SymmetricKey))
	other, err := f.Render(nil, d)
	return !bytes.Equal(rendered, other), err
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

var functions = template.FuncMap{
	"toml":   quoteTOML,
	"json":   quoteJSON,
	"env":    quoteEnv,
	"c":      quoteC,
	"hex":    func(s string) string { return hex.EncodeToString([]byte(s)) },
	"base64": func(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) },
	"chunks": chunks,
}

func quoteJSON(s string) (string, error) {
	b, err := json.Marshal(s)
	return string(b), err
}

// quoteEnv leaves a value bare where every reader of such files agrees, and puts the rest in single quotes, which shells, systemd
// and dotenv libraries know.
func quoteEnv(s string) (string, error) {
	if strings.ContainsRune(s, 0) {
		return "", errors.New("a NUL cannot be in an environment")
	}
	bare := func(r rune) bool {
		return 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || strings.ContainsRune("._-/:+=@", r)
	}
	if s != "" && !strings.ContainsFunc(s, func(r rune) bool { return !bare(r) }) {
		return s, nil
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'", nil
}

// quoteC writes string literals, a line of the value in each, joined so that they may stand in a #define. Octal escapes have
// three digits and so never run into what follows; a question mark is escaped for the sake of trigraphs.
func quoteC(s string) string {
	var b strings.Builder
	b.WriteByte('"')
	for i := range len(s) {
		switch c := s[i]; {
		case c == '\n':
			b.WriteString(`\n`)
			if i < len(s)-1 {
				b.WriteString("\" \\\n\t\"")
			}
		case c == '"' || c == '\\' || c == '?':
			b.WriteByte('\\')
			b.WriteByte(c)
		case c < ' ' || c > '~':
			fmt.Fprintf(&b, `\%03o`, c)
		default:
			b.WriteByte(c)
		}
	}
	b.WriteByte('"')
	return b.String()
}

func chunks(n int, s string) ([]string, error) {
	if n <= 0 {
		return nil, fmt.Errorf("chunks of %d octets", n)
	}
	var out []string
	for ; len(s) > n; s = s[n:] {
		out = append(out, s[:n])
	}
	return append(out, s), nil
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
