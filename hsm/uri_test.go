package hsm_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/touchmark/touchmark/hsm"
)

func TestParseURI(t *testing.T) {
	u, err := hsm.ParseURI("pkcs11:token=line%203;manufacturer=A+B;object=device:1;id=%01%Ff?module-path=/usr/lib/m.so&pin-source=file:pin")
	if err != nil {
		t.Fatal(err)
	}
	if u.Token != "line 3" || u.Manufacturer != "A+B" || u.Object != "device:1" || string(u.ID) != "\x01\xff" || u.ModulePath != "/usr/lib/m.so" || u.PINSource != "file:pin" {
		t.Errorf("%+v", u)
	}
	if again, err := hsm.ParseURI(u.String()); err != nil || again.String() != u.String() {
		t.Errorf("%s reads as %s, %v", u, again, err)
	}
	if u, err := hsm.ParseURI("pkcs11:token=NSS?module-path=p11-kit:/m.so&x-init-reserved=configdir='sql:/db'%20flags="); err != nil || u.InitArgs != "configdir='sql:/db' flags=" || u.ModulePath != "p11-kit:/m.so" {
		t.Errorf("%+v, %v", u, err)
	}
	for uri, want := range map[string]string{
		"keys":                                "no scheme",
		"https://x":                           "not known",
		"pkcs11:object=k":                     "names no token",
		"pkcs11:slot-id=3":                    "slots change places",
		"pkcs11:token=a;token=b":              "twice",
		"pkcs11:token=a;colour=red":           "colour is not known",
		"pkcs11:token=a?colour=red":           "colour is not known",
		"pkcs11:token=a;pin-value=1234":       "behind a",
		"pkcs11:token=a?object=k":             "object is not known",
		"pkcs11:token=a;id=ab":                "percent-encoded",
		"pkcs11:token=a%2":                    "invalid URL escape",
		"pkcs11:token=a?module-name=softhsm2": "module-path",
		"pkcs11:token=a;object=a%2fb":         "not a key name",
		"pkcs11:token=a?pin-source=%7Ccat":    "not run",
		"pkcs11:token":                        "no value",
		"file:":                               "names no directory",
		"file:keys?module-path=x":             "not known",
		"tpm:object=k":                        "no directory for its blob",
		"tpm:object=k;object=l?keys=d":        "twice",
		"tpm:object=0x81000100?keys=d":        "handle=",
		"tpm:object=a;handle=0x81000100":      "exclude",
		"tpm:handle=0x80000000":               "persistent handle",
		"tpm:handle=81zz":                     "persistent handle",
		"tpm:handle=0x181000100":              "persistent handle",
		"tpm:device=/dev/tpm0":                "behind a",
		"tpm:colour=red":                      "colour is not known",
		"tpm:?colour=red":                     "colour is not known",
		"tpm:?object=k":                       "object is not known",
		"tpm:?module-path=/m.so":              "module-path is not known",
		"tpm:?device=/etc/passwd":             "want /dev/",
		"tpm:?device=/dev/../etc/passwd":      "want /dev/",
		"tpm:?device=unix:":                   "want /dev/",
		"tpm:?device=tcp:host":                "tcp:HOST:PORT",
		"tpm:?device=mssim::2321":             "mssim:HOST:PORT",
		"tpm:?device=tcp:host:0":              "tcp:HOST:PORT",
		"tpm:?device=a&device=b":              "twice",
		"pkcs11:token=a?device=/dev/tpm0":     "device is not known",
		"file:keys?keys=x":                    "keys is not known",
	} {
		if _, err := hsm.ParseURI(uri); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q in it", uri, err, want)
		}
	}
}

func TestParseTPMURI(t *testing.T) {
	for text, want := range map[string]hsm.URI{
		"tpm:": {Scheme: "tpm"},
		"tpm:object=device:7?device=/dev/tpmrm0&keys=my%20keys&pin-source=file:auth": {Scheme: "tpm", Object: "device:7", Device: "/dev/tpmrm0", Keys: "my keys", PINSource: "file:auth"},
		"tpm:handle=0X8100ABCD?device=unix:run/swtpm.sock":                           {Scheme: "tpm", Object: "0x8100abcd", Device: "unix:run/swtpm.sock"},
		"TPM:?keys=/k&device=tcp:%5B::1%5D:2321":                                     {Scheme: "tpm", Device: "tcp:[::1]:2321", Keys: "/k"},
		"tpm:?device=mssim:localhost:2321":                                           {Scheme: "tpm", Device: "mssim:localhost:2321"},
	} {
		u, err := hsm.ParseURI(text)
		if err != nil || fmt.Sprintf("%#v", u) != fmt.Sprintf("%#v", want) {
			t.Errorf("%s: %#v, %v", text, u, err)
		}
		if again, err := hsm.ParseURI(u.String()); err != nil || again.String() != u.String() {
			t.Errorf("%s reads as %s, %v", u, again, err)
		}
	}
	u, err := hsm.ParseURI("tpm:handle=0x81000100?pin-value=s3cr3t")
	if err != nil || !u.HasPIN() || len(u.Warnings()) != 1 || u.String() != "tpm:handle=0x81000100" {
		t.Errorf("%v, %v", u, err)
	}
	if h, ok := hsm.ParseTPMHandle(u.Object); !ok || h != 0x81000100 {
		t.Errorf("handle %x, %v", h, ok)
	}
	for _, name := range []string{"", "0x8100010", "0x80000000", "0x8100ABCD", "81000100", "0x+1000100"} {
		if h, ok := hsm.ParseTPMHandle(name); ok {
			t.Errorf("%q stands for handle %x", name, h)
		}
	}
}

// Invariant 5: a PIN never reaches an error or a log.
func TestPINStaysHidden(t *testing.T) {
	u, err := hsm.ParseURI("pkcs11:token=a?pin-value=s3cr3t")
	if err != nil {
		t.Fatal(err)
	}
	pin, err := u.ResolvePIN(t.Context(), hsm.PINConfig{})
	if err != nil || string(pin) != "s3cr3t" {
		t.Fatalf("%d octets, %v", len(pin), err)
	}
	_, bad := hsm.ParseURI("pkcs11:token=a?pin-value=s3cr3t&colour=red")
	if text := fmt.Sprintf("%v %+v %s %v %#v %x %d", u, u, pin, pin, pin, pin, pin) + bad.Error(); strings.Contains(text, "s3cr3t") || strings.Contains(text, "733363") {
		t.Error(text)
	}
	if len(u.Warnings()) == 0 {
		t.Error("no warning about a PIN in the URI")
	}
}

func TestResolvePIN(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "pin"), []byte("1234\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	none := func(string) (string, bool) { return "", false }
	env := func(pairs ...string) func(string) (string, bool) {
		return func(n string) (string, bool) {
			for i := 0; i < len(pairs); i += 2 {
				if pairs[i] == n {
					return pairs[i+1], true
				}
			}
			return "", false
		}
	}
	ask := func(context.Context, string) (hsm.Secret, error) { return hsm.Secret("asked"), nil }
	for name, c := range map[string]struct {
		uri  string
		cfg  hsm.PINConfig
		want string // empty: an error
	}{
		"source, relative":     {"pkcs11:token=a?pin-source=file:pin", hsm.PINConfig{Base: dir, Env: env("TOUCHMARK_PIN", "no")}, "1234"},
		"source missing":       {"pkcs11:token=a?pin-source=nowhere", hsm.PINConfig{Base: dir, Env: env("TOUCHMARK_PIN", "no")}, ""},
		"environment file":     {"pkcs11:token=a", hsm.PINConfig{Env: env("TOUCHMARK_PIN_FILE", filepath.Join(dir, "pin"))}, "1234"},
		"environment":          {"pkcs11:token=a", hsm.PINConfig{Env: env("TOUCHMARK_PIN", "99"), Prompt: ask}, "99"},
		"passphrase":           {"file:keys", hsm.PINConfig{Env: env("TOUCHMARK_PIN", "no", "TOUCHMARK_PASSPHRASE", "words")}, "words"},
		"prompt":               {"pkcs11:token=a", hsm.PINConfig{Env: none, Prompt: ask}, "asked"},
		"nothing, nobody asks": {"pkcs11:token=a", hsm.PINConfig{Env: none}, ""},
	} {
		u, err := hsm.ParseURI(c.uri)
		if err != nil {
			t.Fatal(err)
		}
		pin, err := u.ResolvePIN(t.Context(), c.cfg)
		if string(pin) != c.want || (err == nil) != (c.want != "") {
			t.Errorf("%s: %d octets, %v", name, len(pin), err)
		}
	}
}

func TestSpec(t *testing.T) {
	if s, err := (hsm.Spec{Name: "k", Algorithm: hsm.HMACSHA256}).Resolved(); err != nil || s.Usage != hsm.MAC {
		t.Errorf("%+v, %v", s, err)
	}
	for _, bad := range []hsm.Spec{
		{Name: "", Algorithm: hsm.ECP256}, {Name: "../x", Algorithm: hsm.ECP256}, {Name: "k"},
		{Name: "k", Algorithm: hsm.RSA2048, Usage: hsm.Agree}, {Name: "k", Algorithm: hsm.HMACSHA256, Usage: hsm.Sign},
	} {
		if _, err := bad.Resolved(); err == nil {
			t.Errorf("%+v passes", bad)
		}
	}
	if !errors.Is(fmt.Errorf("x: %w", hsm.ErrLost), hsm.ErrLost) {
		t.Error("sentinels do not wrap")
	}
}

func FuzzParseURI(f *testing.F) {
	f.Add("pkcs11:token=line%203;object=k;id=%01?module-path=/m.so&pin-source=file:pin")
	f.Add("pkcs11:token=a?module-path=p11-kit:/m.so&x-init-reserved=configdir='/db'%20flags=")
	f.Add("file:keys?object=a")
	f.Add("pkcs11:token=a?pin-value=1")
	f.Add("file:////var//keys")
	f.Add("tpm:object=k?device=unix:/run/tpm.sock&keys=d&pin-source=file:auth")
	f.Add("tpm:handle=0x81000100?device=mssim:localhost:2321")
	f.Add("file:" + strings.Repeat("\xca", 1400)) // longer once it is encoded
	f.Fuzz(func(t *testing.T, s string) {
		u, err := hsm.ParseURI(s)
		if err != nil {
			return
		}
		again, err := hsm.ParseURI(u.String())
		if err != nil || again.String() != u.String() {
			t.Fatalf("%q prints as %q, which reads as %q, %v", s, u, again, err)
		}
	})
}
