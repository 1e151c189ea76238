package main

import (
	"encoding/base64"
	"strings"
	"testing"
	"unicode"

	"github.com/touchmark/touchmark/pkg/stamp/fat"
	"github.com/touchmark/touchmark/pkg/stamp/ihex"
	"github.com/touchmark/touchmark/pkg/stamp/nvs"
	"github.com/touchmark/touchmark/pkg/stamp/raw"
	"github.com/touchmark/touchmark/pkg/stamp/ubootenv"
)

// Whatever an image holds, no private key is shown, and only text that cannot play with a terminal is.
func FuzzOpenImage(f *testing.F) {
	key := "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA\n-----END PRIVATE KEY-----\n"
	secret := base64.StdEncoding.EncodeToString(make([]byte, 32))
	for _, image := range [][]byte{
		must(nvs.Build(nil, nvs.MinSize, []nvs.Entry{{Namespace: "a", Key: "k", Value: key}, {Namespace: "a", Key: "n", Value: uint8(7)}, {Namespace: "a", Key: "s", Value: secret}}, nil)),
		must(ubootenv.Layout{Size: 600}.Build([]ubootenv.Var{{Name: "a", Value: key}, {Name: "b", Value: secret}}, 0)),
		must((&fat.Volume{Size: 64 << 10}).Build([]fat.File{{Name: "a/b", Data: []byte(key)}})),
		must(raw.Encode(1, []raw.Record{{Type: raw.FirstUser, Value: []byte(key)}, {Type: raw.SymmetricKey, Value: make([]byte, 32)}, {Type: raw.Serial, Value: []byte("SN1")}})),
	} {
		f.Add(image)
		f.Add(append(image, image...))
		f.Add(must(ihex.Build(0x9000, image, 16)))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		image, err := openImage(b, "", nil)
		if err != nil {
			return
		}
		for _, e := range image.Entries {
			if e.Value != "" && (isKey(e.data) || secretText.MatchString(e.Value) && e.Name != "key-uri" || strings.ContainsFunc(e.Value, unicode.IsControl)) {
				t.Errorf("%s %q is shown", e.Name, e.Value)
			}
		}
	})
}
