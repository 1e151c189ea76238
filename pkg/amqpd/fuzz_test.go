package amqpd

import (
	"strings"
	"testing"

	"github.com/touchmark/touchmark/pkg/dps"
)

// Whatever an address holds, two names come out of it, or none; and what is normal stays.
func FuzzAddress(f *testing.F) {
	f.Add("0ne00000001/registrations/dev-1")
	f.Add("/0ne00000001/registrations/dev-1")
	f.Add("amqps://host:5671/0ne00000001/Registrations/a:b")
	f.Fuzz(func(t *testing.T, s string) {
		scope, id, ok := parseAddress(normalise(s))
		if !ok {
			return
		}
		again := scope + "/registrations/" + id
		if strings.Contains(scope+id, "/") || !strings.HasSuffix(dps.Fold(s), dps.Fold(again)) {
			t.Fatalf("%q: scope %q, ID %q", s, scope, id)
		}
		if x, y, ok := parseAddress(again); !ok || x != scope || y != id {
			t.Fatalf("%q: %q, %q", again, x, y)
		}
	})
}
