package main

import (
	"crypto/x509"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/ca"
)

// What was put into the folder is there at the next start, once; what is no CA for now is not put there.
func TestIntermediates(t *testing.T) {
	good := func(c *x509.Certificate) { c.NotAfter = time.Now().Add(time.Hour) }
	old := func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }
	d := &serviceData{dir: t.TempDir()}
	file := func(name string, h ...*attesttest.Holder) string {
		var certs []*x509.Certificate
		for _, x := range h {
			certs = append(certs, x.Certificate)
		}
		path := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(path, ca.EncodeChain(certs...), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	a, b := attesttest.CA(t, nil, "a", good), attesttest.CA(t, nil, "b", good)
	two := file("two.pem", a, b)
	for _, files := range [][]string{{two, two}, {file("a.pem", a)}, nil} {
		if got, err := d.intermediates(files); err != nil || len(got) != 2 {
			t.Errorf("%d certificates, %v", len(got), err)
		}
	}
	for _, f := range []string{file("old.pem", attesttest.CA(t, nil, "old", old)), file("leaf.pem", attesttest.Leaf(t, a, "leaf", good))} {
		if _, err := d.intermediates([]string{f}); err == nil {
			t.Errorf("%s was taken", filepath.Base(f))
		}
	}
	if got, err := d.intermediates(nil); err != nil || len(got) != 2 {
		t.Errorf("at last %d certificates, %v", len(got), err)
	}
}
