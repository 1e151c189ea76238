package pattern_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/touchmark/touchmark/hsm"
	"github.com/touchmark/touchmark/pkg/pattern"
)

// A serial list is somebody else's file: what it says is one value of a key URI, and never another module, device or PIN.
func TestListsDoNotWriteURIs(t *testing.T) {
	for text, value := range map[string]func(hsm.URI) string{
		"pkcs11:token={serial}?module-path=/good.so&pin-source=pin": func(u hsm.URI) string { return u.Token },
		"tpm:?device=unix:{serial}":                                 func(u hsm.URI) string { return strings.TrimPrefix(u.Device, "unix:") },
	} {
		uri, err := pattern.Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		for _, hostile := range []string{
			"x?module-path=/evil.so", "x&module-path=/evil.so", "x;serial=1", "x&pin-value=1", "%3Fmodule-path=/evil.so", "a+b", "/run/tpm 1.sock", "x#y",
		} {
			u, err := hsm.ParseURI(uri.ExpandURI(func(string) string { return hostile }))
			if err != nil {
				t.Errorf("%s with %q: %v", text, hostile, err)
				continue
			}
			if value(u) != hostile || u.Serial != "" || u.HasPIN() != strings.Contains(text, "pin-source") || u.ModulePath != "" && u.ModulePath != "/good.so" {
				t.Errorf("%s with %q became %s", text, hostile, u)
			}
		}
	}
}

func TestExpand(t *testing.T) {
	value := func(field string) string {
		return map[string]string{"serial": "A-1", "minus": "-x", "Name": "N"}[field]
	}
	for text, want := range map[string]string{
		"": "", "plain": "plain", "pump-{serial}": "pump-A-1", "{serial|lower}{serial}": "a-1A-1", "{Name}.{empty}": "N.", "a{serial}b": "aA-1b",
	} {
		p, err := pattern.Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		if got := p.Expand(value); got != want {
			t.Errorf("%q became %q, want %q", text, got, want)
		}
		if p.Fixed() != !strings.Contains(text, "{") {
			t.Errorf("%q is fixed: %v", text, p.Fixed())
		}
	}
	p, err := pattern.Parse("{b}{a|lower}x{b}")
	if err != nil || !slices.Equal(p.Fields(), []string{"b", "a"}) {
		t.Errorf("fields are %q, %v", p.Fields(), err)
	}
	for _, bad := range []string{"{", "}", "{}", "a{b", "a}b", "{a{b}}", "{|lower}", "{a|upper}", "{a|lower|lower}", "{a}}"} {
		if p, err := pattern.Parse(bad); err == nil {
			t.Errorf("%q became %v", bad, p)
		}
	}
	for text, option := range map[string]bool{"{minus}": true, "{empty}{minus}": true, "{empty}-x": true, "-{serial}": false, "x{minus}": false, "--name={minus}": false} {
		p, err := pattern.Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		if word, err := p.ExpandWord(value); (err != nil) != option {
			t.Errorf("%q became %q, %v", text, word, err)
		}
	}
}
