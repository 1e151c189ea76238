package tpm_test

import (
	"bytes"
	"encoding/pem"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/touchmark/touchmark/hsm/tpm"
)

func goodBlob(t testing.TB) []byte {
	t.Helper()
	b := tpm.Blob{EmptyAuth: true, Parent: tpm2.TPMRHOwner, Public: tpm2.ECCSRKTemplate, Private: []byte("encrypted")}
	text, err := b.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func TestParseBlob(t *testing.T) {
	good := goodBlob(t)
	b, err := tpm.ParseBlob(good)
	if err != nil || !b.EmptyAuth || b.Parent != tpm2.TPMRHOwner || string(b.Private) != "encrypted" {
		t.Fatalf("%+v, %v", b, err)
	}
	block, _ := pem.Decode(good)
	with := func(f func(der []byte) []byte) string {
		return string(pem.EncodeToMemory(&pem.Block{Type: block.Type, Bytes: f(bytes.Clone(block.Bytes))}))
	}
	for name, bad := range map[string]string{
		"nothing":     "",
		"other type":  strings.ReplaceAll(string(good), "TSS2", "RSA"),
		"two":         string(good) + string(good),
		"text behind": string(good) + "x",
		"headers":     strings.Replace(string(good), "KEY-----\n", "KEY-----\nA: b\n\n", 1),
		"huge":        string(good) + strings.Repeat("\n", 20000),
		"tail":        with(func(b []byte) []byte { return append(b, 0) }),
		"short":       with(func(b []byte) []byte { return b[:len(b)-1] }),
		"other OID":   with(func(b []byte) []byte { return bytes.Replace(b, []byte{0x0a, 0x01, 0x03}, []byte{0x0a, 0x01, 0x04}, 1) }),
		"parent":      with(func(b []byte) []byte { return bytes.Replace(b, []byte{0x40, 0, 0, 1}, []byte{0x40, 0, 0, 0x0b}, 1) }),
		"private":     with(func(b []byte) []byte { return bytes.Replace(b, []byte("\x00\x09encr"), []byte("\x00\x08encr"), 1) }),
	} {
		if _, err := tpm.ParseBlob([]byte(bad)); err == nil {
			t.Errorf("%s: parses", name)
		}
	}
}

// A key blob is bytes from a disk. What parses is written again as it was, as far as it counts.
func FuzzParseBlob(f *testing.F) {
	good := goodBlob(f)
	f.Add(good)
	block, _ := pem.Decode(good)
	for i := range block.Bytes {
		b := bytes.Clone(block.Bytes)
		b[i] ^= 0x41
		f.Add(pem.EncodeToMemory(&pem.Block{Type: block.Type, Bytes: b}))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		b, err := tpm.ParseBlob(text)
		if err != nil {
			return
		}
		again, err := b.Marshal()
		if err != nil {
			t.Fatalf("%+v parses and does not marshal: %v", b, err)
		}
		c, err := tpm.ParseBlob(again)
		if err != nil || !bytes.Equal(c.Private, b.Private) || c.Parent != b.Parent || c.EmptyAuth != b.EmptyAuth {
			t.Fatalf("%+v reads as %+v, %v", b, c, err)
		}
	})
}
