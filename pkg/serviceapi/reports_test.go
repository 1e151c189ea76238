package serviceapi

import (
	"bytes"
	"encoding/pem"
	"testing"

	"github.com/touchmark/touchmark/pkg/attest/attesttest"
)

// A chain is certificates in PEM and nothing else, up to a bound.
func FuzzParseChain(f *testing.F) {
	leaf := attesttest.Leaf(f, nil, "dev-1")
	one := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: leaf.Certificate.Raw})
	for _, c := range []struct {
		body []byte
		want int
	}{
		{one, 1}, {append(append([]byte("\n"), one...), one...), 2}, {bytes.Repeat(one, maxChain), maxChain}, {bytes.Repeat(one, maxChain+1), 0},
		{nil, 0}, {[]byte("text"), 0}, {append([]byte("text\n"), one...), 0}, {append(one[:len(one):len(one)], "text"...), 0},
		{pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte("secret")}), 0}, {pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte("none")}), 0},
		{pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Headers: map[string]string{"a": "b"}, Bytes: leaf.Certificate.Raw}), 0},
	} {
		if chain, err := parseChain(c.body); len(chain) != c.want || (err == nil) != (c.want > 0) {
			f.Errorf("%.60q: %d certificates, %v", c.body, len(chain), err)
		}
		f.Add(c.body)
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		chain, err := parseChain(body)
		if (err == nil) != (len(chain) > 0) || len(chain) > maxChain {
			t.Errorf("%d certificates, %v", len(chain), err)
		}
	})
}
