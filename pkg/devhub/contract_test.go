package devhub_test

import (
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"net/http/httptest"
	"testing"

	"github.com/touchmark/touchmark/pkg/devhub"
	linkedhub "github.com/touchmark/touchmark/pkg/hub"
	"github.com/touchmark/touchmark/pkg/hub/hubtest"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

// The hub does what a linked hub must, in the process and over its REST as package hub speaks it.
func TestContract(t *testing.T) {
	registrationtest.Goroutines(t)
	h := open(t, func(c *devhub.Config) { c.Hosts = []string{"127.0.0.1"} })
	caps := hubtest.Caps{Twins: true, Scopes: true, IDs: []string{":", "%25", "%2e", "*", "?", "!", "(a)", ",", "=", "@", "$", "'", "#", "+", "a;b"}, Disable: func(t testing.TB, id string) {
		h.do(t, 200, "POST", "/devices", fmt.Sprintf(`[{"id":%q,"importMode":"update","status":"disabled","statusReason":"stolen"}]`, id))
	}}
	t.Run("in the process", func(t *testing.T) {
		hubtest.Contract(t, func(testing.TB) registration.Hub { return h.Linked() }, caps)
	})
	s := httptest.NewUnstartedServer(h)
	s.Config.ErrorLog = log.New(io.Discard, "", 0) // the suite hangs up in the middle
	s.StartTLS()
	t.Cleanup(s.Close)
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
	l, err := linkedhub.Open(linkedhub.Config{Now: h.f.Now, Hub: h.LinkedHub(s.Listener.Addr().String(), ca)})
	if err != nil {
		t.Fatal(err)
	}
	if c, ok := l.(interface{ Close() error }); ok {
		t.Cleanup(func() { _ = c.Close() })
	}
	t.Run("over REST", func(t *testing.T) {
		hubtest.Contract(t, func(testing.TB) registration.Hub { return l }, caps)
	})
}
