package mint

import (
	"strings"
	"testing"

	"github.com/touchmark/touchmark/hsm"
)

// A serial list is somebody else's file: what it says is one value of a key URI, and never another module, device or PIN.
func TestListsDoNotWriteURIs(t *testing.T) {
	for pattern, value := range map[string]func(hsm.URI) string{
		"pkcs11:token={serial}?module-path=/good.so&pin-source=pin": func(u hsm.URI) string { return u.Token },
		"tpm:?device=unix:{serial}":                                 func(u hsm.URI) string { return strings.TrimPrefix(u.Device, "unix:") },
	} {
		segments, err := parseText(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, hostile := range []string{
			"x?module-path=/evil.so", "x&module-path=/evil.so", "x;serial=1", "x&pin-value=1", "%3Fmodule-path=/evil.so", "a+b", "/run/tpm 1.sock", "x#y",
		} {
			u, err := hsm.ParseURI(expandURI(segments, []string{"serial"}, []string{hostile}))
			if err != nil {
				t.Errorf("%s with %q: %v", pattern, hostile, err)
				continue
			}
			if value(u) != hostile || u.Serial != "" || u.HasPIN() != strings.Contains(pattern, "pin-source") || u.ModulePath != "" && u.ModulePath != "/good.so" {
				t.Errorf("%s with %q became %s", pattern, hostile, u)
			}
		}
	}
}
