package httpd_test

import (
	"bufio"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/touchmark/touchmark/pkg/httpd"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

// A caller without a valid proof gets an error document whatever it sends.
func FuzzRequest(f *testing.F) {
	fix := registrationtest.NewFixture(f, "hub-a.example.net")
	h := httpd.New(httpd.Config{Registrar: fix.Service, Now: fix.Now}).Handler()
	for _, s := range []string{
		"PUT /0ne00c0ffee/registrations/dev-1/register?api-version=2019-03-31 HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\n{}",
		"GET /0ne00c0ffee/registrations/a%3ab/operations/5.x?api-version=2019-03-31 HTTP/1.1\r\nHost: h\r\nAuthorization: SharedAccessSignature sr=x&sig=" + strings.Repeat("A", 43) + "&se=99999999999\r\n\r\n",
		"POST /0ne00c0ffee/registrations/dev-1?api-version=2019-03-31 HTTP/1.1\r\nHost: h\r\n\r\n",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		r, err := http.ReadRequest(bufio.NewReader(strings.NewReader(text)))
		if err != nil {
			return
		}
		r.RemoteAddr = "192.0.2.1:1"
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		var doc struct{ ErrorCode int }
		if err := json.Unmarshal(w.Body.Bytes(), &doc); err != nil || w.Code < 400 || w.Code >= 500 || doc.ErrorCode/1000 != w.Code {
			t.Fatalf("%q: %d %s", text, w.Code, w.Body)
		}
	})
}
