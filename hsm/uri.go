package hsm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// The schemes of key URIs.
const (
	SchemePKCS11 = "pkcs11"
	SchemeFile   = "file"
	SchemeTPM    = "tpm"
)

// A URI names a key store, or a key in one.
//
// "pkcs11:" URIs follow RFC 7512, with less freedom: every attribute is known by name, stands once and in its place; the
// token is named by label, serial, manufacturer or model and never by slot number alone; the module is named by path.
//
//	pkcs11:token=line-3;object=station?module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=file:/run/secrets/pin
//
// A module-path of "p11-kit:" and a path has that module loaded in a process of its own, which may crash or hang without
// harm. x-init-reserved holds parameters for modules that want some, as NSS does.
//
// "file:" URIs name a directory of encrypted key files:
//
//	file:keys?object=station&pin-source=file:/run/secrets/passphrase
//
// "tpm:" URIs name a TPM 2.0 and the directory of its key blobs, or a key at a persistent handle. The device is a device
// node (without one, /dev/tpmrm0), a Unix socket or a TCP port with bare TPM commands, as swtpm has them, or a TCP port that
// speaks the protocol of Microsoft's simulator:
//
//	tpm:object=device-key?device=/dev/tpmrm0&keys=keys&pin-source=file:/run/secrets/auth
//	tpm:handle=0x81000100?device=unix:/run/swtpm.sock
//	tpm:?device=tcp:fixture-3:2321&keys=keys
//
// The zero value names nothing.
type URI struct {
	Scheme string
	// Path is the directory of a file: URI, as written.
	Path string
	// Token, Serial, Manufacturer and Model select a PKCS#11 token; those that are empty match any.
	Token, Serial, Manufacturer, Model string
	// Object is the key's name; empty for a store. A key at a persistent handle of a TPM is called by the handle, as
	// [TPMHandleName] writes it.
	Object string
	// ID is the key's CKA_ID.
	ID []byte
	// ModulePath is the PKCS#11 module to load. Behind "p11-kit:" it is loaded in a process of its own.
	ModulePath string
	// InitArgs goes to the module when it is initialized, in CK_C_INITIALIZE_ARGS.pReserved: NSS wants its parameters there.
	// In a URI it is x-init-reserved, as p11-kit calls it.
	InitArgs string
	// Device is where a TPM answers: /dev/…, unix:PATH, tcp:HOST:PORT or mssim:HOST:PORT; empty means /dev/tpmrm0.
	Device string
	// Keys is the directory of a TPM's key blobs, as written.
	Keys string
	// PINSource is where the PIN or passphrase is read from: a path, with or without "file:".
	PINSource string

	pin Secret
}

// maxURI bounds a key URI, in octets.
const maxURI = 4096

// ParseURI parses a key URI strictly. The error names the attribute that it does not know or take.
func ParseURI(s string) (URI, error) {
	var u URI
	if len(s) > maxURI {
		return u, fmt.Errorf("key URI is longer than %d octets", maxURI)
	}
	scheme, rest, ok := strings.Cut(s, ":")
	if !ok {
		return u, errors.New("key URI has no scheme: want pkcs11:…, tpm:… or file:…")
	}
	path, query, hasQuery := strings.Cut(rest, "?")
	var err error
	switch strings.ToLower(scheme) {
	case SchemePKCS11:
		u.Scheme = SchemePKCS11
		err = u.parsePKCS11(path)
	case SchemeFile:
		u.Scheme = SchemeFile
		if u.Path, err = unescape(strings.TrimPrefix(path, "//")); err == nil && u.Path == "" {
			err = errors.New("it names no directory")
		}
		if strings.HasPrefix(u.Path, "//") { // the same directory, and it prints as itself
			u.Path = "/" + strings.TrimLeft(u.Path, "/")
		}
	case SchemeTPM:
		u.Scheme = SchemeTPM
		err = u.parseTPM(path)
	default:
		return u, errors.New("key URI scheme is not known: want pkcs11, tpm or file")
	}
	if err == nil && hasQuery {
		err = u.parseQuery(query)
	}
	if err == nil && u.Scheme == SchemePKCS11 && u.Token == "" && u.Serial == "" && u.Manufacturer == "" {
		err = errors.New("it names no token: want token, serial or manufacturer (slot numbers change, labels do not)")
	}
	if err == nil && u.Scheme == SchemeTPM {
		err = u.checkTPM()
	}
	if err == nil && len(u.String()) > maxURI {
		err = fmt.Errorf("it is longer than %d octets when properly encoded", maxURI)
	}
	if err == nil && u.Object != "" && !ValidName(u.Object) {
		err = fmt.Errorf("object %q is not a key name", u.Object)
	}
	if err != nil {
		// The text itself is not shown: it may hold a PIN, in its place or not.
		return URI{}, fmt.Errorf("key URI (%s:…): %w", strings.ToLower(scheme), err)
	}
	return u, nil
}

// eachAttribute calls set with every attribute of a list, as it stands and with its escapes undone. None may stand twice.
func eachAttribute(list, separator string, set func(name, raw, value string) error) error {
	seen := make(map[string]bool)
	for part := range strings.SplitSeq(list, separator) {
		if part == "" {
			continue
		}
		name, raw, ok := strings.Cut(part, "=")
		if !ok {
			return errors.New("an attribute has no value")
		}
		if seen[name] {
			return fmt.Errorf("attribute %s stands twice", name)
		}
		seen[name] = true
		value, err := unescape(raw)
		if err != nil {
			return fmt.Errorf("attribute %s: %w", name, err)
		}
		if err := set(name, raw, value); err != nil {
			return err
		}
	}
	return nil
}

func (u *URI) parsePKCS11(path string) error {
	return eachAttribute(path, ";", func(name, raw, value string) error {
		switch name {
		case "token":
			u.Token = value
		case "serial":
			u.Serial = value
		case "manufacturer":
			u.Manufacturer = value
		case "model":
			u.Model = value
		case "object":
			u.Object = value
		case "id":
			// RFC 7512 §2.3 wants it percent-encoded; taken literally, half the field's URIs would mean something else.
			if strings.Count(raw, "%")*3 != len(raw) {
				return errors.New("attribute id must be percent-encoded, every octet of it")
			}
			u.ID = []byte(value)
		case "type":
			if value != "private" && value != "public" && value != "secret-key" {
				return fmt.Errorf("attribute type is %q: want private, public or secret-key", value)
			}
		case "slot-id", "slot-description", "slot-manufacturer":
			return fmt.Errorf("attribute %s is not taken: slots change places; name the token", name)
		case "module-path", "module-name", "pin-source", "pin-value":
			return fmt.Errorf("attribute %s belongs behind a \"?\"", name)
		default:
			return fmt.Errorf("attribute %s is not known", name)
		}
		return nil
	})
}

func (u *URI) parseTPM(path string) error {
	object, handle := false, false
	err := eachAttribute(path, ";", func(name, _, value string) error {
		switch name {
		case "object":
			object = true
			if _, ok := ParseTPMHandle(value); ok {
				return errors.New("a persistent handle is written as handle=…, not as object=…")
			}
			u.Object = value
		case "handle":
			handle = true
			h, err := strconv.ParseUint(strings.TrimPrefix(strings.ToLower(value), "0x"), 16, 32)
			if u.Object = TPMHandleName(uint32(h)); err != nil || !persistent(uint32(h)) {
				return errors.New("attribute handle: want a persistent handle, 0x81000000 to 0x81ffffff")
			}
		case "device", "keys", "pin-source", "pin-value":
			return fmt.Errorf("attribute %s belongs behind a \"?\"", name)
		default:
			return fmt.Errorf("attribute %s is not known", name)
		}
		return nil
	})
	if err == nil && object && handle {
		err = errors.New("object and handle exclude each other")
	}
	return err
}

// checkTPM looks at a tpm: URI as a whole.
func (u *URI) checkTPM() error {
	_, handle := ParseTPMHandle(u.Object)
	if u.Object != "" && !handle && u.Keys == "" {
		return errors.New("it names a key and no directory for its blob: add keys=DIR, or name a handle")
	}
	kind, rest, _ := strings.Cut(u.Device, ":")
	switch {
	case u.Device == "":
	case strings.HasPrefix(u.Device, "/dev/") && filepath.Clean(u.Device) == u.Device:
	case kind == "unix" && rest != "":
	case kind == "tcp" || kind == "mssim":
		host, port, err := net.SplitHostPort(rest)
		if n, nerr := strconv.ParseUint(port, 10, 16); err != nil || host == "" || nerr != nil || n == 0 {
			return fmt.Errorf("attribute device: want %s:HOST:PORT", kind)
		}
	default:
		return errors.New("attribute device: want /dev/…, unix:PATH, tcp:HOST:PORT or mssim:HOST:PORT")
	}
	return nil
}

// persistent reports whether a TPM handle is that of a persistent object (TPM 2.0 Part 2, 7.2: TPM_HT_PERSISTENT).
func persistent(h uint32) bool { return h>>24 == 0x81 }

// TPMHandleName returns the name that a key at a persistent handle of a TPM has: "0x" and eight hexadecimal digits.
func TPMHandleName(h uint32) string { return fmt.Sprintf("0x%08x", h) }

// ParseTPMHandle returns the persistent handle that a key's name stands for, and whether it stands for one.
func ParseTPMHandle(name string) (uint32, bool) {
	if len(name) != 10 || name[:2] != "0x" {
		return 0, false
	}
	h, err := strconv.ParseUint(name[2:], 16, 32)
	return uint32(h), err == nil && persistent(uint32(h)) && name == TPMHandleName(uint32(h))
}

func (u *URI) parseQuery(query string) error {
	err := eachAttribute(query, "&", func(name, _, value string) error {
		switch {
		case name == "pin-source":
			if strings.HasPrefix(value, "|") {
				return errors.New("pin-source: commands are not run, name a file")
			}
			u.PINSource = value
		case name == "pin-value":
			u.pin = Secret(value)
		case name == "module-path" && u.Scheme == SchemePKCS11:
			u.ModulePath = value
		case name == "x-init-reserved" && u.Scheme == SchemePKCS11:
			u.InitArgs = value
		case name == "module-name" && u.Scheme == SchemePKCS11:
			return errors.New("attribute module-name is not taken: name the module by module-path")
		case name == "object" && u.Scheme == SchemeFile:
			u.Object = value
		case name == "device" && u.Scheme == SchemeTPM:
			u.Device = value
		case name == "keys" && u.Scheme == SchemeTPM:
			u.Keys = value
		default:
			return fmt.Errorf("attribute %s is not known, or not behind the \"?\"", name)
		}
		return nil
	})
	if err == nil && u.PINSource != "" && u.pin != nil {
		err = errors.New("pin-source and pin-value exclude each other")
	}
	return err
}

// unescape undoes percent-encoding. A "+" is a "+": URIs are not forms.
func unescape(s string) (string, error) {
	if strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return "", errors.New("holds a control character")
	}
	return url.PathUnescape(s)
}

// escape percent-encodes everything but RFC 3986's unreserved characters and those in keep.
func escape(s, keep string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		c := s[i]
		if 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || strings.IndexByte("-._~", c) >= 0 || strings.IndexByte(keep, c) >= 0 {
			b.WriteByte(c)
		} else {
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	return b.String()
}

// String returns the URI without a PIN. Parsing it gives the same URI, less the PIN.
func (u URI) String() string {
	var path, query []string
	add := func(dst *[]string, name, value, keep string) {
		if value != "" {
			*dst = append(*dst, name+"="+escape(value, keep))
		}
	}
	switch u.Scheme {
	case SchemeFile:
		add(&query, "object", u.Object, ":")
	case SchemeTPM:
		name := "object"
		if _, ok := ParseTPMHandle(u.Object); ok {
			name = "handle"
		}
		add(&path, name, u.Object, ":")
	default:
		add(&path, "token", u.Token, ":")
		add(&path, "manufacturer", u.Manufacturer, ":")
		add(&path, "model", u.Model, ":")
		add(&path, "serial", u.Serial, ":")
		add(&path, "object", u.Object, ":")
		if len(u.ID) > 0 {
			id := "id="
			for _, c := range u.ID {
				id += fmt.Sprintf("%%%02X", c)
			}
			path = append(path, id)
		}
	}
	add(&query, "module-path", u.ModulePath, "/:")
	add(&query, "x-init-reserved", u.InitArgs, "/:=',")
	add(&query, "device", u.Device, "/:")
	add(&query, "keys", u.Keys, "/:")
	add(&query, "pin-source", u.PINSource, "/:")
	s := u.Scheme + ":" + escape(u.Path, "/:") + strings.Join(path, ";")
	if len(query) > 0 {
		s += "?" + strings.Join(query, "&")
	}
	return s
}

// WithObject returns the URI of a key in the store that u names.
func (u URI) WithObject(name string) URI {
	u.Object, u.ID = name, nil
	return u
}

// HasPIN reports whether the URI itself says where its PIN is.
func (u URI) HasPIN() bool { return u.pin != nil || u.PINSource != "" }

// Warnings says what about the URI should be mended although it works.
func (u URI) Warnings() []string {
	if u.pin != nil {
		return []string{"the key URI holds a PIN, which shells and process lists show to everybody: use pin-source"}
	}
	return nil
}

// PINConfig says where a PIN or passphrase may come from besides the URI.
type PINConfig struct {
	// Base is the directory that a relative pin-source counts from.
	Base string
	// Env looks up environment variables; nil means os.LookupEnv.
	Env func(string) (string, bool)
	// Prompt asks a person; nil means that there is none.
	Prompt func(ctx context.Context, what string) (Secret, error)
}

// maxPIN bounds a PIN or passphrase, in octets.
const maxPIN = 1024

// ResolvePIN returns the PIN of a token, the authorization value of a TPM's keys, or the passphrase of a key-file store: from
// pin-source, else the environment (TOUCHMARK_PIN_FILE, TOUCHMARK_PIN; TOUCHMARK_PASSPHRASE_FILE, TOUCHMARK_PASSPHRASE), else a
// prompt. The error is ErrNoPIN when there is none of these.
func (u URI) ResolvePIN(ctx context.Context, cfg PINConfig) (Secret, error) {
	if u.pin != nil {
		return Secret(bytes.Clone(u.pin)), nil
	}
	name, what := "TOUCHMARK_PIN", fmt.Sprintf("user PIN of token %q", u.Token)
	if u.Scheme == SchemeFile {
		name, what = "TOUCHMARK_PASSPHRASE", fmt.Sprintf("passphrase of the keys in %s", u.Path)
	}
	if u.Scheme == SchemeTPM {
		what = "authorization value of the TPM key"
	}
	return cfg.resolve(ctx, u.PINSource, name, what, "pin-source in the key URI")
}

// ResolveSOPIN returns the PIN of a token's security officer: from a file, with or without "file:", else the environment
// (TOUCHMARK_SO_PIN_FILE, TOUCHMARK_SO_PIN), else a prompt. The error is ErrNoPIN when there is none of these.
func (u URI) ResolveSOPIN(ctx context.Context, source string, cfg PINConfig) (Secret, error) {
	return cfg.resolve(ctx, source, "TOUCHMARK_SO_PIN", fmt.Sprintf("SO PIN of token %q", u.Token), "--so-pin-source")
}

func (cfg *PINConfig) resolve(ctx context.Context, source, name, what, where string) (Secret, error) {
	env := cfg.Env
	if env == nil {
		env = os.LookupEnv
	}
	if source != "" {
		path := strings.TrimPrefix(strings.TrimPrefix(source, "file:"), "//")
		if !filepath.IsAbs(path) {
			path = filepath.Join(cfg.Base, path)
		}
		return readPIN(path, what)
	}
	if path, ok := env(name + "_FILE"); ok && path != "" {
		return readPIN(path, what+" from the file that "+name+"_FILE names")
	}
	if pin, ok := env(name); ok && pin != "" {
		return Secret(pin), nil
	}
	if cfg.Prompt == nil {
		return nil, fmt.Errorf("%w the %s: name a file with %s, or in %s_FILE", ErrNoPIN, what, where, name)
	}
	pin, err := cfg.Prompt(ctx, what)
	if err == nil && len(pin) == 0 {
		err = errors.New("no PIN given")
	}
	if err != nil {
		return nil, fmt.Errorf("%w: name a file with %s, or in %s_FILE", err, where, name)
	}
	return pin, nil
}

// readPIN reads a PIN or passphrase from a file, less the end of its line.
func readPIN(path, what string) (_ Secret, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("reading the %s: %w", what, err)
		}
	}()
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxPIN+3))
	if err != nil {
		return nil, err
	}
	pin := bytes.TrimRight(b, "\r\n")
	if len(pin) == 0 || len(pin) > maxPIN || bytes.ContainsAny(pin, "\r\n") {
		return nil, fmt.Errorf("%s must hold one line of 1 to %d octets", path, maxPIN)
	}
	return Secret(pin), nil
}
