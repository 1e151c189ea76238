package main

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/touchmark/touchmark/pkg/stamp/fat"
	"github.com/touchmark/touchmark/pkg/stamp/ihex"
	"github.com/touchmark/touchmark/pkg/stamp/nvs"
	"github.com/touchmark/touchmark/pkg/stamp/raw"
	"github.com/touchmark/touchmark/pkg/stamp/ubootenv"
	"github.com/touchmark/touchmark/templates"
)

type stampOptions struct {
	format, keys, reveal, out string
	force                     bool
}

// errNoImage says that a file is not an image of a format, or damaged.
var errNoImage = errors.New("no whole image")

func newStamp(a *app) *cobra.Command {
	o := &stampOptions{}
	show := &cobra.Command{
		Use: "show FILE", Short: "Show what an image of device storage holds", Args: cobra.ExactArgs(1),
		Long: `show reads an image as its device would, and lists what it holds: NVS partitions and their keys, U-Boot environments, FAT file
systems, touchmark's own records, and each of them as Intel HEX. Keys and passwords, or what looks like them, and files are
[redacted]; --reveal prints one value, as its octets, and no private key to a terminal.`,
		Example: `  touchmark stamp show stamps/pump-1/nvs.bin --keys stamps/pump-1/nvs.bin.keys
  touchmark stamp show stamps/pump-1/nvs.bin --reveal dps/client_key --out client.pem`,
		RunE: func(_ *cobra.Command, args []string) error { return a.runStampShow(o, args[0]) },
	}
	formats := make([]string, 0, 6)
	for _, f := range imageFormats() {
		formats = append(formats, f.name)
	}
	f := show.Flags()
	f.StringVar(&o.format, "format", "", "the image's format, instead of the one that fits: "+strings.Join(formats, ", "))
	f.StringVar(&o.keys, "keys", "", "the image of the key partition of an encrypted NVS partition")
	f.StringVar(&o.reveal, "reveal", "", "print the value of this name and nothing else")
	f.StringVar(&o.out, "out", "-", "with --reveal: write it to this file, which only its owner can read")
	f.BoolVar(&o.force, "force", false, "overwrite the file")
	_ = show.RegisterFlagCompletionFunc("format", cobra.FixedCompletions(formats, cobra.ShellCompDirectiveNoFileComp))
	reader := &cobra.Command{
		Use: "reader", Short: "Print a C header that reads touchmark's own records in a firmware", Args: cobra.NoArgs,
		Example: "  touchmark stamp reader > touchmark_tlv.h",
		RunE: func(*cobra.Command, []string) error {
			_, err := a.out.Write([]byte(templates.CHeader()))
			return err
		},
	}
	return parent("stamp", "Look into images of device storage", show, reader)
}

// stampImage is what an image holds.
type stampImage struct {
	Format  string       `json:"format"`
	Octets  int          `json:"octets"`
	Entries []stampEntry `json:"entries"`
}

type stampEntry struct {
	Name     string `json:"name"`
	Type     string `json:"type"`
	Octets   int    `json:"octets"`
	What     string `json:"what"`
	Value    string `json:"value,omitempty"`
	Redacted bool   `json:"redacted,omitempty"`

	data []byte
}

// imageFormats are the formats in the order in which they are tried.
func imageFormats() []imageFormat {
	return []imageFormat{{"ihex", showHex}, {"raw", showRaw}, {"nvs-keys", showKeys}, {"uboot-env", showUBoot}, {"fat", showFAT}, {"nvs", showNVS}}
}

type imageFormat struct {
	name string
	read func(b []byte, keys *nvs.Keys) ([]stampEntry, error)
}

func (a *app) runStampShow(o *stampOptions, path string) error {
	const maxFile = 64 << 20
	b, err := a.readInput(path, maxFile)
	if err != nil {
		return err
	}
	var keys *nvs.Keys
	if o.keys != "" {
		k, err := a.readInput(o.keys, maxPEM)
		if err != nil {
			return err
		}
		keys, err = nvs.ParseKeys(k)
		clear(k)
		if err != nil {
			return fmt.Errorf("%s: %w: %w", o.keys, errNoImage, err)
		}
	}
	image, err := openImage(b, o.format, keys)
	if err != nil {
		err = fmt.Errorf("%s: %w", path, err)
		if keys == nil {
			err = hint(err, "an encrypted NVS partition is shown with --keys FILE, its key partition")
		}
		return err
	}
	if o.reveal != "" {
		return a.reveal(o, image)
	}
	if a.json {
		return a.printJSON(image)
	}
	rows := make([][]string, len(image.Entries))
	for i, e := range image.Entries {
		if e.Redacted {
			e.Value = "[redacted]"
		}
		rows[i] = []string{e.Name, e.Type, fmt.Sprint(e.Octets), e.What, e.Value}
	}
	fmt.Fprintf(a.out, "%s, %d octets\n", image.Format, image.Octets)
	return a.table([]string{"NAME", "TYPE", "OCTETS", "WHAT", "VALUE"}, rows)
}

func (a *app) reveal(o *stampOptions, image *stampImage) error {
	i := slices.IndexFunc(image.Entries, func(e stampEntry) bool { return e.Name == o.reveal })
	if i < 0 {
		return usageError{fmt.Errorf("the image has no %q", o.reveal)}
	}
	e := image.Entries[i]
	switch {
	case o.out != "-":
		return writeFile(o.out, e.data, 0o600, o.force)
	case isTerminal(a.out) && (e.What == whatKey || !isText(e.data)):
		return hint(usageError{fmt.Errorf("%s is %s, and standard output is a terminal", e.Name, e.What)}, "say --out FILE")
	}
	_, err := a.out.Write(e.data)
	return err
}

// openImage reads an image of a format, or of the first that fits.
func openImage(b []byte, format string, keys *nvs.Keys) (*stampImage, error) {
	known := false
	for _, f := range imageFormats() {
		if format != "" && f.name != format {
			continue
		}
		known = true
		entries, err := f.read(b, keys)
		if err != nil && format != "" {
			return nil, fmt.Errorf("%w of format %s: %w", errNoImage, format, err)
		}
		if err != nil {
			continue
		}
		for i := range entries {
			entries[i].look()
		}
		return &stampImage{f.name, len(b), entries}, nil
	}
	if !known {
		return nil, usageError{fmt.Errorf("--format %s is not known", format)}
	}
	return nil, fmt.Errorf("%w of any format that is known here", errNoImage)
}

func showHex(b []byte, keys *nvs.Keys) ([]stampEntry, error) {
	segments, err := ihex.Parse(b)
	if err != nil {
		return nil, err
	}
	var all []stampEntry
	for _, s := range segments {
		all = append(all, stampEntry{Name: fmt.Sprintf("0x%08x", s.Address), Type: "segment", data: s.Data})
		if inside, err := openImage(s.Data, "", keys); err == nil {
			all[len(all)-1].What = inside.Format
			all = append(all, inside.Entries...)
		}
	}
	return all, nil
}

func showRaw(b []byte, _ *nvs.Keys) ([]stampEntry, error) {
	_, records, err := raw.Read(bytes.NewReader(b), raw.Slots{Size: len(b) / 2})
	if err != nil {
		return nil, err
	}
	names := map[raw.Type]string{raw.IDScope: "id-scope", raw.GlobalEndpoint: "global-endpoint", raw.RegistrationID: "registration-id", raw.Serial: "serial",
		raw.CertificateChain: "certificate-chain", raw.CertificateChainPEM: "certificate-chain-pem", raw.PrivateKey: "private-key",
		raw.SymmetricKey: "symmetric-key", raw.KeyURI: "key-uri"}
	var all []stampEntry
	for _, r := range records {
		e := stampEntry{Name: names[r.Type], Type: fmt.Sprintf("0x%04x", uint16(r.Type)), data: r.Value}
		if e.Name == "" {
			e.Name = e.Type
		}
		switch r.Type {
		case raw.PrivateKey, raw.SymmetricKey:
			e.What = whatKey
		}
		all = append(all, e)
	}
	return all, nil
}

func showKeys(b []byte, _ *nvs.Keys) ([]stampEntry, error) {
	if _, err := nvs.ParseKeys(b); err != nil {
		return nil, err
	}
	return []stampEntry{{Name: "keys", Type: "XTS-AES-256", What: whatKey, data: b[:nvs.KeySize]}}, nil
}

func showUBoot(b []byte, _ *nvs.Keys) ([]stampEntry, error) {
	var err error
	for _, l := range []ubootenv.Layout{{}, {BigEndian: true}, {Redundant: true}, {Redundant: true, BigEndian: true}} {
		l.Size = len(b)
		var vars []ubootenv.Var
		if vars, _, err = l.Parse(b); err == nil {
			var all []stampEntry
			for _, v := range vars {
				all = append(all, stampEntry{Name: v.Name, Type: "variable", data: []byte(v.Value)})
			}
			return all, nil
		}
	}
	return nil, err
}

func showFAT(b []byte, _ *nvs.Keys) ([]stampEntry, error) {
	disk, err := fat.Parse(b)
	if err != nil {
		return nil, err
	}
	var all []stampEntry
	for _, f := range disk.Files {
		all = append(all, stampEntry{Name: f.Name, Type: "file", data: f.Data})
	}
	return all, nil
}

func showNVS(b []byte, keys *nvs.Keys) ([]stampEntry, error) {
	entries, err := nvs.Parse(b, keys)
	if err != nil {
		return nil, err
	}
	var all []stampEntry
	for _, v := range entries {
		e := stampEntry{Name: v.Namespace + "/" + v.Key}
		switch x := v.Value.(type) {
		case nil:
			e.Type = "namespace"
		case []byte:
			e.Type, e.data = "blob", x
		case string:
			e.Type, e.data = "string", []byte(x)
		default:
			kind := fmt.Sprintf("%T", x)
			e.Type, e.data = strings.NewReplacer("uint", "u", "int", "i").Replace(kind), fmt.Append(nil, x)
		}
		all = append(all, e)
	}
	return all, nil
}

// What a value is. Of a key, nothing is shown.
const (
	whatKey  = "key"
	whatText = "text"
)

var (
	secretName = regexp.MustCompile(`(?i)key|pass|psk|pswd|pwd|secret|token|pin`)
	secretText = regexp.MustCompile(`[A-Za-z0-9+/_=-]{40}`) // as keys look in base64 and hexadecimal
)

// look finds out what a value is, and what of it may be shown: short text that neither looks like a secret nor is called one.
func (e *stampEntry) look() {
	e.Octets = len(e.data)
	const longest = 256
	if names := certificateNames(e.data); e.What == "" && names != "" {
		e.What = names
		return
	}
	if e.What == "" {
		switch {
		case isKey(e.data):
			e.What = whatKey
		case isText(e.data):
			e.What = whatText
		default:
			e.What = "octets"
		}
	}
	plain := e.What == whatText && e.Type != "file" && len(e.data) <= longest && !bytes.ContainsFunc(e.data, unicode.IsControl)
	if harmless := e.Name == "key-uri" && e.Type == "0x0009" || !secretName.MatchString(e.Name) && !secretText.Match(e.data); plain && harmless {
		e.Value = string(e.data)
	} else {
		e.Redacted = len(e.data) > 0
	}
}

func isText(b []byte) bool {
	return utf8.Valid(b) && !bytes.ContainsFunc(b, func(r rune) bool { return unicode.IsControl(r) && r != '\n' && r != '\t' })
}

func isKey(b []byte) bool {
	if bytes.Contains(b, []byte("PRIVATE KEY-----")) {
		return true
	}
	_, err1 := x509.ParsePKCS8PrivateKey(b)
	_, err2 := x509.ParseECPrivateKey(b)
	_, err3 := x509.ParsePKCS1PrivateKey(b)
	return err1 == nil || err2 == nil || err3 == nil
}

// certificateNames says whose certificates a value is, or nothing where it is something else.
func certificateNames(b []byte) string {
	der := b
	if bytes.HasPrefix(b, []byte("-----BEGIN ")) {
		der = nil
		for rest := b; len(bytes.TrimSpace(rest)) > 0; {
			var block *pem.Block
			if block, rest = pem.Decode(rest); block == nil || block.Type != "CERTIFICATE" {
				return ""
			}
			der = append(der, block.Bytes...)
		}
	}
	certs, err := x509.ParseCertificates(der)
	if err != nil || len(certs) == 0 {
		return ""
	}
	names := make([]string, len(certs))
	for i, c := range certs {
		names[i] = c.Subject.String()
	}
	return "certificate of " + strings.Join(names, "; ")
}
