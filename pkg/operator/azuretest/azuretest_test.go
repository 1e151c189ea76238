package azuretest_test

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/operator/azuretest"
)

// caller speaks to the service in its own words: what stands on the wire is what is tested.
type caller struct {
	t    *testing.T
	s    *azuretest.Server
	http *http.Client
}

func start(t *testing.T, cfg azuretest.Config) *caller {
	s := azuretest.Start(t, cfg)
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(s.CA)
	return &caller{t, s, &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}}}
}

func (c *caller) call(method, path, body string, header ...string) (int, http.Header, string) {
	c.t.Helper()
	parts := make(map[string]string)
	for p := range strings.SplitSeq(c.s.Connection, ";") {
		k, v, _ := strings.Cut(p, "=")
		parts[k] = v
	}
	if !strings.Contains(path, "?") {
		path += "?api-version=2021-10-01"
	}
	req, err := http.NewRequestWithContext(c.t.Context(), method, "https://"+parts["HostName"]+path, strings.NewReader(body))
	if err != nil {
		c.t.Fatal(err)
	}
	key, err := base64.StdEncoding.DecodeString(parts["SharedAccessKey"])
	if err != nil {
		c.t.Fatal(err)
	}
	sr, se := "127.0.0.1", strconv.FormatInt(time.Now().Add(time.Hour).Unix(), 10)
	mac := hmac.New(sha256.New, key)
	mac.Write([]byte(sr + "\n" + se))
	req.Header.Set("Authorization", "SharedAccessSignature sr="+sr+"&sig="+url.QueryEscape(base64.StdEncoding.EncodeToString(mac.Sum(nil)))+"&se="+se+"&skn="+parts["SharedAccessKeyName"])
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	res, err := c.http.Do(req)
	if err != nil {
		c.t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		c.t.Fatal(err)
	}
	return res.StatusCode, res.Header, string(b)
}

func enrollment(id string) string {
	return `{"registrationId":"` + id + `","attestation":{"type":"symmetricKey"}}`
}

// What clients stumble over on Azure they stumble over here.
func TestAwkward(t *testing.T) {
	c := start(t, azuretest.Config{})
	want := func(status int, holds, method, path, body string, header ...string) (http.Header, string) {
		t.Helper()
		got, h, text := c.call(method, path, body, header...)
		if got != status || !strings.Contains(text, holds) {
			t.Errorf("%s %s: %d %s", method, path, got, text)
		}
		return h, text
	}
	want(400, "trackingId", "GET", "/enrollments/a?x=1", "")                                   // DPS-S 1
	want(200, "primaryKey", "PUT", "/enrollments/a", enrollment("A"))                          // DPS-S 11, 20, 30
	want(409, "409201", "PUT", "/enrollments/a", enrollment("a"))                              // DPS-S 13
	_, text := want(200, `"attestation":{"type":"symmetricKey"}`, "GET", "/Enrollments/A", "") // DPS-S 4, 21, 25, 30
	if !strings.Contains(text, `"status":"unassigned"`) {
		t.Error(text)
	}
	var e struct{ ETag string }
	if err := json.Unmarshal([]byte(text), &e); err != nil {
		t.Fatal(err)
	}
	want(412, "412", "PUT", "/enrollments/a", enrollment("a"), "If-Match", "old")       // DPS-S 16
	want(200, "", "PUT", "/enrollments/a", enrollment("a"), "If-Match", `"`+e.ETag+`"`) // DPS-S 15
	want(404, "404201", "PUT", "/enrollments/b", enrollment("b"), "If-Match", "*")
	want(400, "400004", "PUT", "/enrollments/b.", enrollment("b.")) // DPS-S 22
	var ten []string
	for i := range 10 {
		ten = append(ten, enrollment(fmt.Sprintf("bulk-%d", i)))
	}
	bulk := func(mode string, items ...string) string {
		return `{"mode":"` + mode + `","enrollments":[` + strings.Join(items, ",") + `]}`
	}
	want(400, "", "POST", "/enrollments", bulk("create"))                                              // DPS-S 50
	want(400, "", "POST", "/enrollments", bulk("create", append(ten, ten[0])...))                      // DPS-S 50
	want(200, `{"errors":[],"isSuccessful":true}`, "POST", "/enrollments/", bulk("create", ten...))    // DPS-S 5, 50
	want(200, `"errorCode":409201`, "POST", "/enrollments", bulk("create", enrollment("new"), ten[0])) // DPS-S 51
	want(200, "", "GET", "/enrollments/new", "")
	want(200, `"errorCode":409201`, "POST", "/enrollments", bulk("update", ten[0]))                                                                    // section 1.9
	want(200, `"errorCode":412001`, "POST", "/enrollments", bulk("updateIfMatchEtag", ten[0]))                                                         // DPS-S 53, 54
	want(200, `"isSuccessful":true`, "POST", "/enrollments", bulk("delete", ten...))                                                                   // DPS-S 52
	h, text := want(200, `[{`, "POST", "/enrollments/query", `{"query":"SELECT * FROM nowhere WHERE registrationId='x'"}`, "x-ms-max-item-count", "1") // DPS-S 41, 42
	if strings.Contains(text, "registrationState") || h.Get("X-Ms-Item-Type") != "Enrollment" || h.Get("X-Ms-Continuation") == "" {
		t.Errorf("%v %s", h, text)
	}
	h, text = want(200, `"new"`, "POST", "/enrollments/query", `{"query":""}`, "x-ms-continuation", h.Get("X-Ms-Continuation"))
	if _, there := h["X-Ms-Continuation"]; there || bytes.Count([]byte(text), []byte(`"etag"`)) != 1 { // DPS-S 46, 47
		t.Errorf("%v %s", h, text)
	}
	want(400, "", "POST", "/enrollments/query", `{"query":""}`, "x-ms-continuation", "bad") // DPS-S 48
	want(200, "[]", "POST", "/enrollmentgroups/query", `{"query":""}`)
	want(400, "CustomAllocationDefinition", "PUT", "/enrollments/c", `{"registrationId":"c","attestation":{"type":"symmetricKey"},"allocationPolicy":"Custom"}`)
	want(200, `"provisioningStatus":null`, "PUT", "/enrollments/c", `{"registrationId":"c","deviceId":null,"attestation":{"type":"SymmetricKey","tpm":null},"provisioningStatus":null}`) // DPS-S 24, 26
	want(204, "", "DELETE", "/enrollments/c", "")                                                                                                                                        // DPS-S 17
	want(404, "", "DELETE", "/enrollments/c", "")
	want(401, "401002", "GET", "/enrollments/a", "", "Authorization", "SharedAccessSignature sr=x&sig=x&se=1&skn=x")

	c = start(t, azuretest.Config{Limit: 1, Window: time.Hour, RetryAfter: 7})
	want(404, "", "GET", "/enrollments/a", "")
	if h, _ := want(429, "429001", "GET", "/enrollments/a", ""); h.Get("Retry-After") != "7" { // DPS-S 100
		t.Error(h)
	}
}
