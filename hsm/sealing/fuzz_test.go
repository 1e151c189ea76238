package sealing_test

import (
	"testing"

	"filippo.io/age"

	"github.com/touchmark/touchmark/hsm/sealing"
)

func FuzzParseRecipient(f *testing.F) {
	f.Add("age1tag1qtlk7s6s9z3y7nkuk0q0xq6vh4ztkzcpgvjj4z0ja6lcd2y6w9q6yzq0s6p")
	f.Add("age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kudepdyaqyq3k9d")
	f.Fuzz(func(t *testing.T, s string) {
		if r, err := sealing.ParseRecipient(s); (r == nil) == (err == nil) {
			t.Fatalf("%q: %v, %v", s, r, err)
		}
	})
}

// A sealed file's header is the sender's: it may make the key do nothing but one agreement, and never opens.
func FuzzUnwrap(f *testing.F) {
	key := agreement(f, files(f), "recipient")
	f.Add("p256tag", "AAAA", "AAAA", []byte("body"))
	f.Fuzz(func(t *testing.T, kind, mark, enc string, body []byte) {
		if k, err := sealing.Identity(key).Unwrap([]*age.Stanza{{Type: kind, Args: []string{mark, enc}, Body: body}}); err == nil {
			t.Fatalf("%q %q %q opened: %x", kind, mark, enc, k)
		}
	})
}
