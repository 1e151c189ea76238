package serviceapi_test

import (
	"bufio"
	"crypto/sha256"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"github.com/touchmark/touchmark/pkg/access"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
	"github.com/touchmark/touchmark/pkg/serviceapi"
)

const token = "the management token of a test"

// handler is an API without a door, as strict as it can be asked to be.
func handler(t testing.TB) http.Handler {
	t.Helper()
	f := registrationtest.NewFixture(t)
	if _, _, err := registration.EditScope(t.Context(), f.Store, registrationtest.Scope, start, "create", f.Now(), func(*registration.Scope) (*registration.Scope, error) {
		return &registration.Scope{ID: registrationtest.Scope, Name: ownName}, nil
	}); err != nil {
		t.Fatal(err)
	}
	f.Policy(t, "owner", ownerRights, ownerKey, secondKey)
	sum := sha256.Sum256([]byte(token))
	return serviceapi.New(serviceapi.Config{Scopes: registration.NewScopes(registration.ScopesConfig{Config: registration.Config{Store: f.Store, Now: f.Now}}), First: registrationtest.Scope,
		Hosts: []string{"h"}, Domain: domain, StrictQuery: true, Bearer: access.New(access.Config{Management: &sum, Now: f.Now}), Now: f.Now})
}

// A caller without a valid proof gets an error document whatever it sends.
func FuzzStranger(f *testing.F) {
	h := handler(f)
	for _, s := range []string{
		"PUT /enrollments/x?api-version=2021-10-01 HTTP/1.1\r\nHost: h\r\nIf-Match: *\r\nContent-Length: 2\r\n\r\n{}",
		"POST /touchmark/bundles?api-version=2021-10-01&dryRun=true HTTP/1.1\r\nHost: h\r\nTouchmark-Trust: AAAA\r\n\r\n",
		"GET /touchmark/orders/PO-1%2Fa/unseen?api-version=2021-10-01 HTTP/1.1\r\nHost: plant-a.scopes.example.net:443\r\nX-Ms-Continuation: YWZ0ZXI6YQ\r\n\r\n",
		"PUT /touchmark/groups/line?api-version=2021-10-01 HTTP/1.1\r\nHost: [::1]\r\nContent-Length: 15\r\nAuthorization: Bearer x.y.z\r\n\r\n{\"closed\":true}",
		"POST /enrollmentGroups/query?api-version=2021-10-01 HTTP/1.1\r\nHost: h\r\nAuthorization: SharedAccessSignature sr=h&sig=" + strings.Repeat("A", 43) + "&se=99999999999&skn=owner\r\n\r\n",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		r, err := http.ReadRequest(bufio.NewReader(strings.NewReader(text)))
		if err != nil || strings.Contains(text, token) {
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

// A caller who may everything gets what it asked for or an error of its own making: never one of ours, and always JSON.
func FuzzOwner(f *testing.F) {
	h := handler(f)
	f.Add("PUT", "/enrollments/x", `{"registrationId":"x","attestation":{"type":"symmetricKey","symmetricKey":{"primaryKey":null}},"initialTwin":{"tags":{"a":[1,{"b":null}]}}}`, "", "")
	f.Add("PUT", "/enrollmentGroups/keys", `{"enrollmentGroupId":"keys","attestation":{"type":"x509","x509":{"signingCertificates":{"primary":{"certificate":"AAAA"}}}},"provisioningStatus":null}`, "*", "")
	f.Add("POST", "/enrollments/", `{"mode":"updateIfMatchEtag","enrollments":[{"registrationId":"own-key","etag":"x"},5,{}]}`, "", "")
	f.Add("POST", "/enrollments/query", `{"query":"SELECT * WHERE tags.a = 1"}`, "", "AAAA")
	f.Add("POST", "/enrollments/own-key/attestationmechanism", ``, "", "")
	f.Add("DELETE", "/registrations/own%2Dkey", ``, `"x"`, "")
	f.Add("PUT", "/touchmark/policies/p", `{"rights":"EnrollmentRead","primaryKey":null}`, "", "")
	f.Add("GET", "/touchmark/audit", ``, "", "AAAA")
	f.Fuzz(func(t *testing.T, method, path, body, match, continuation string) {
		u, err := url.Parse("https://h" + path)
		if err != nil || u.Host != "h" || strings.HasPrefix(u.Path, "/touchmark/bundles") {
			return
		}
		q := u.Query()
		q.Set("api-version", "2021-10-01")
		u.RawQuery = q.Encode()
		r := &http.Request{Method: method, URL: u, Host: "h", Header: http.Header{"Authorization": {"Bearer " + token}, "If-Match": {match}, "X-Ms-Continuation": {continuation}}, RemoteAddr: "192.0.2.1:1",
			Body: http.NoBody, ContentLength: int64(len(body))}
		if body != "" {
			r.Body = readCloser{strings.NewReader(body)}
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r.WithContext(t.Context()))
		if w.Code == http.StatusNoContent && w.Body.Len() == 0 {
			return
		}
		if w.Code >= 500 || !json.Valid(w.Body.Bytes()) {
			t.Fatalf("%s %q %q, If-Match %q: %d %s", method, path, body, match, w.Code, w.Body)
		}
		var doc struct{ ErrorCode int }
		if w.Code >= 400 && (json.Unmarshal(w.Body.Bytes(), &doc) != nil || doc.ErrorCode/1000 != w.Code) {
			t.Fatalf("%s %q: %d %s", method, path, w.Code, w.Body)
		}
	})
}

type readCloser struct{ *strings.Reader }

func (readCloser) Close() error { return nil }
