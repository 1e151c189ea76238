package devhub_test

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/devhub"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

// Create, read, update, delete, and when If-Match stands in the way. Service API, section 5.2.
func TestIdentities(t *testing.T) {
	h := open(t)
	made := h.do(t, 200, "PUT", "/devices/a%25b", `{"deviceId":"a%b","unknown":[1]}`)
	if made["status"] != "enabled" || made["connectionState"] != "Disconnected" || made["lastActivityTime"] != "0001-01-01T00:00:00Z" || made["deviceScope"] != nil {
		t.Errorf("%v", made)
	}
	keys := made["authentication"].(map[string]any)["symmetricKey"].(map[string]any)
	if b, err := base64.StdEncoding.DecodeString(keys["primaryKey"].(string)); err != nil || len(b) != 32 || keys["primaryKey"] == keys["secondaryKey"] {
		t.Errorf("%v", keys)
	}
	h.do(t, 409, "PUT", "/devices/a%25b", `{"deviceId":"a%b"}`)
	h.do(t, 404, "PUT", "/devices/b", `{"deviceId":"b"}`, "If-Match", "*")
	h.do(t, 412, "PUT", "/devices/a%25b", `{"deviceId":"a%b"}`, "If-Match", `"old"`)
	tag := made["etag"].(string)
	for _, quote := range []string{"", `"`} {
		made = h.do(t, 200, "PUT", "/devices/a%25b", `{"deviceId":"a%b","status":"Disabled","statusReason":"why"}`, "If-Match", quote+tag+quote)
		if made["etag"] == tag || made["status"] != "disabled" || made["statusReason"] != "why" || made["statusUpdatedTime"] == "0001-01-01T00:00:00Z" ||
			fmt.Sprint(made["authentication"].(map[string]any)["symmetricKey"]) != fmt.Sprint(keys) {
			t.Errorf("%v", made)
		}
		tag = made["etag"].(string)
	}
	h.do(t, 404, "GET", "/devices/A%25b", "") // IDs are told apart by case
	h.do(t, 404, "GET", "/devices/none", "")
	h.do(t, 412, "DELETE", "/devices/a%25b", "")
	h.do(t, 412, "DELETE", "/devices/a%25b", "", "If-Match", "old")
	h.do(t, 404, "DELETE", "/devices/none", "", "If-Match", "*")
	h.do(t, 204, "DELETE", "/devices/a%25b", "", "If-Match", "*")
	h.do(t, 404, "GET", "/twins/a%25b", "")
	again := h.do(t, 200, "PUT", "/Devices/a%25b", `{"deviceId":"a%b"}`)
	if again["generationId"] == made["generationId"] {
		t.Error("a device made anew has the generation of the old one")
	}

	for name, body := range map[string]string{
		"no JSON": `{`, "an array": `[]`, "something behind it": `{"deviceId":"x"}1`, "a name twice": `{"deviceId":"x","deviceId":"x"}`, "no UTF-8": "{\"deviceId\":\"x\xff\"}",
		"nested": `{"deviceId":"x","a":` + strings.Repeat("[", 40) + strings.Repeat("]", 40) + `}`, "no ID": `{}`, "another ID": `{"deviceId":"y"}`, "a number as ID": `{"deviceId":1}`,
		"status": `{"deviceId":"x","status":"on"}`, "reason": `{"deviceId":"x","statusReason":"` + strings.Repeat("x", 129) + `"}`, "capabilities": `{"deviceId":"x","capabilities":{"iotEdge":"yes"}}`,
		"one key": `{"deviceId":"x","authentication":{"symmetricKey":{"primaryKey":"` + deviceKey + `"}}}`, "a key of 15": `{"deviceId":"x","authentication":{"symmetricKey":{"primaryKey":"AAAAAAAAAAAAAAAAAAAA","secondaryKey":"AAAAAAAAAAAAAAAAAAAA"}}}`,
		"a key of 65":        `{"deviceId":"x","authentication":{"symmetricKey":{"primaryKey":"` + base64.StdEncoding.EncodeToString(make([]byte, 65)) + `","secondaryKey":"` + deviceKey + `"}}}`,
		"a key in hex":       `{"deviceId":"x","authentication":{"symmetricKey":{"primaryKey":"zz-_","secondaryKey":"zz-_"}}}`,
		"keys and thumb":     `{"deviceId":"x","authentication":{"type":"sas","x509Thumbprint":{"primaryThumbprint":"` + strings.Repeat("a", 40) + `"}}}`,
		"no thumbprint":      `{"deviceId":"x","authentication":{"type":"selfSigned"}}`,
		"a short thumbprint": `{"deviceId":"x","authentication":{"type":"selfSigned","x509Thumbprint":{"primaryThumbprint":"aa"}}}`,
		"two kinds":          `{"deviceId":"x","authentication":{"type":"selfSigned","x509Thumbprint":{"primaryThumbprint":"` + strings.Repeat("a", 40) + `","secondaryThumbprint":"` + strings.Repeat("a", 64) + `"}}}`,
		"a CA with keys":     `{"deviceId":"x","authentication":{"type":"certificateAuthority","symmetricKey":{"primaryKey":"` + deviceKey + `","secondaryKey":"` + deviceKey + `"}}}`,
		"another kind":       `{"deviceId":"x","authentication":{"type":"tpm"}}`, "a kind that is a number": `{"deviceId":"x","authentication":{"type":1}}`,
		"two parents": `{"deviceId":"x","parentScopes":["a","b"]}`, "a parent that is none": `{"deviceId":"x","deviceScope":"ms-azure-iot-edge://nobody-1"}`, "a number as parent": `{"deviceId":"x","parentScopes":[1]}`,
		"a scope of one's own": `{"deviceId":"x","capabilities":{"iotEdge":true},"deviceScope":"ms-azure-iot-edge://x-1"}`,
	} {
		if w := h.call(h.token("registryReadWrite", true), "PUT", "/devices/x"+version, body); w.Code != 400 {
			t.Errorf("%s: %d %s", name, w.Code, w.Body)
		}
	}
	for _, id := range []string{strings.Repeat("a", 129), "a b", "a/b", "ä", `a"b`, "a\x00"} {
		h.do(t, 400, "PUT", "/devices/"+url.PathEscape(id), fmt.Sprintf(`{"deviceId":%q}`, id))
	}
	h.do(t, 404, "GET", "/devices/x", "") // none of these left anything
	h.do(t, 413, "PUT", "/devices/x", `{"deviceId":"`+strings.Repeat("x", 1<<20)+`"}`)
	for _, body := range []string{`{"type":"selfSigned","x509Thumbprint":{"primaryThumbprint":"` + strings.Repeat("aB", 20) + `"},"symmetricKey":{"primaryKey":null}}`, `{"type":"none"}`, `{"type":"CertificateAuthority"}`,
		`{"x509Thumbprint":{"secondaryThumbprint":"` + strings.Repeat("0", 64) + `"}}`, `{}`, `null`} {
		h.do(t, 200, "PUT", "/devices/kinds", `{"deviceId":"kinds","authentication":`+body+`}`)
		h.do(t, 204, "DELETE", "/devices/kinds", "", "If-Match", "*")
	}
}

// A policy does what it has the right to, and nothing else; and only a token that is a policy's opens anything.
func TestRights(t *testing.T) {
	h := open(t)
	h.device(t, "dev-1")
	calls := []struct {
		right                string
		method, target, body string
	}{
		{"RegistryRead", "GET", "/devices/dev-1", ""},
		{"RegistryRead", "GET", "/devices", ""},
		{"RegistryWrite", "PUT", "/devices/dev-1", `{}`},
		{"RegistryWrite", "DELETE", "/devices/nobody", ""},
		{"RegistryWrite", "POST", "/devices", `[]`},
		{"ServiceConnect", "GET", "/twins/dev-1", ""},
		{"ServiceConnect", "PATCH", "/twins/dev-1", `{}`},
		{"ServiceConnect", "PUT", "/twins/dev-1", `{}`},
		{"ServiceConnect", "POST", "/twins/nobody/methods", `{}`},
		{"ServiceConnect", "POST", "/devices/query", `{}`},
		{"ServiceConnect", "POST", "/devices/nobody/messages/devicebound", ``},
		{"ServiceConnect", "GET", "/devices/dev-1/messages/events", ``},
		{"RegistryRead ServiceConnect", "GET", "/statistics/devices", ``},
		{"RegistryRead ServiceConnect", "GET", "/statistics/service", ``},
	}
	rights := map[string]string{"iothubowner": "RegistryRead RegistryWrite ServiceConnect DeviceConnect", "service": "ServiceConnect", "device": "DeviceConnect", "registryRead": "RegistryRead",
		"registryReadWrite": "RegistryRead RegistryWrite"}
	key, _ := h.Key("iothubowner", false)
	for _, x := range calls {
		for policy, has := range rights {
			may := false
			for _, r := range strings.Fields(has) {
				may = may || strings.Contains(x.right, r)
			}
			for _, secondary := range []bool{false, true} {
				if w := h.call(h.token(policy, secondary), x.method, x.target+version, x.body); (w.Code != 401) != may {
					t.Errorf("%s %s as %s: %d %s", x.method, x.target, policy, w.Code, w.Body)
				}
			}
		}
		for name, token := range map[string]string{
			"none": "", "no token": "Bearer x", "another key": attesttest.ServiceToken(secret, hubName, "iothubowner", h.f.Now().Add(time.Hour)),
			"another hub": attesttest.ServiceToken(key, "hub2.example.net", "iothubowner", h.f.Now().Add(time.Hour)), "a longer name": attesttest.ServiceToken(key, hubName+".evil.example", "iothubowner", h.f.Now().Add(time.Hour)),
			"no such policy": attesttest.ServiceToken(key, hubName, "root", h.f.Now().Add(time.Hour)), "another's key": attesttest.ServiceToken(key, hubName, "service", h.f.Now().Add(time.Hour)),
			"expired": attesttest.ServiceToken(key, hubName, "iothubowner", h.f.Now().Add(-6*time.Minute)), "a device's": h.deviceToken("dev-1", deviceKey, time.Hour),
			"another path": attesttest.SignToken(key, url.QueryEscape(hubName+"/elsewhere"), "iothubowner", h.f.Now().Add(time.Hour)), "half a segment": attesttest.SignToken(key, url.QueryEscape(hubName+"/dev"), "iothubowner", h.f.Now().Add(time.Hour)),
		} {
			if w := h.call(token, x.method, x.target+version, x.body); w.Code != 401 || w.Header().Get("Iothub-Errorcode") != "IotHubUnauthorizedAccess" {
				t.Errorf("%s %s with %s: %d %s", x.method, x.target, name, w.Code, w.Body)
			}
		}
	}
	for _, resource := range []string{strings.ToUpper(hubName), hubName + ":8443", hubName + "/devices", hubName + "/devices/dev-1"} {
		if w := h.call(attesttest.SignToken(key, url.QueryEscape(resource), "iothubowner", h.f.Now().Add(-4*time.Minute)), "GET", "/devices/dev-1"+version, ""); w.Code != 200 {
			t.Errorf("for %s: %d %s", resource, w.Code, w.Body)
		}
	}
	owner := h.token("iothubowner", false)
	for _, target := range []string{"/devices/dev-1", "/devices/dev-1?api-version=", "/devices/dev-1?api-version=latest"} {
		if w := h.call(owner, "GET", target, ""); w.Code != 400 || w.Header().Get("Iothub-Errorcode") != "InvalidProtocolVersion" {
			t.Errorf("%s: %d %s", target, w.Code, w.Body)
		}
	}
	for target, want := range map[string]int{"/devices/a/b": 404, "/devices/a/modules": 404, "/twins": 404, "/twins/a/b/c": 404, "/statistics": 404, "/statistics/x": 404, "/devices/%zz": 400, "/jobs": 404, "/devices?top=0": 0, "/devices?top=1001": 0} {
		sep := version
		if want == 0 {
			want, sep = 400, "&"+version[1:]
		}
		r := h.call(owner, "GET", "/x"+version, "")
		if target != "/devices/%zz" { // net/http refuses that before us
			r = h.call(owner, "GET", target+sep, "")
		} else {
			want = 404
		}
		if r.Code != want {
			t.Errorf("%s: %d %s", target, r.Code, r.Body)
		}
	}
	for _, x := range [][2]string{{"PATCH", "/devices/dev-1"}, {"PUT", "/devices"}, {"DELETE", "/twins/dev-1"}, {"GET", "/twins/dev-1/methods"}, {"POST", "/statistics/devices"}, {"PUT", "/devices/dev-1/messages/devicebound"}, {"DELETE", "/devices/dev-1/messages/events"}} {
		if w := h.call(owner, x[0], x[1]+version, ""); w.Code != 405 || w.Header().Get("Allow") == "" {
			t.Errorf("%s: %d %s", x, w.Code, w.Body)
		}
	}
}

// Edge devices and their children: five generations, a hundred children, no circle.
func TestFamily(t *testing.T) {
	h := open(t)
	put := func(want int, id string, edge bool, parent string, header ...string) map[string]any {
		t.Helper()
		return h.do(t, want, "PUT", "/devices/"+id, fmt.Sprintf(`{"deviceId":%q,"capabilities":{"iotEdge":%t},"parentScopes":[%q]}`, id, edge, parent), header...)
	}
	scope := func(doc map[string]any) string { return doc["deviceScope"].(string) }
	var scopes []string
	top := h.do(t, 200, "PUT", "/devices/e1", `{"deviceId":"e1","capabilities":{"iotEdge":true}}`)
	scopes = append(scopes, scope(top))
	if scopes[0] != "ms-azure-iot-edge://e1-"+top["generationId"].(string) {
		t.Errorf("%s", scopes[0])
	}
	for i := 2; i <= 5; i++ {
		doc := put(200, fmt.Sprintf("e%d", i), true, scopes[i-2])
		if fmt.Sprint(doc["parentScopes"]) != "["+scopes[i-2]+"]" {
			t.Errorf("%v", doc)
		}
		scopes = append(scopes, scope(doc))
	}
	put(400, "e6", true, scopes[4])
	if leaf := put(200, "leaf", false, scopes[4]); leaf["deviceScope"] != scopes[4] {
		t.Errorf("%v", leaf)
	}
	put(400, "e1", true, scopes[4], "If-Match", "*")                         // a circle
	put(400, "e1", true, scopes[0], "If-Match", "*")                         // its own parent
	put(400, "leaf2", false, "ms-azure-iot-edge://leaf-1")                   // no edge device
	put(400, "leaf2", false, scopes[0]+"1")                                  // another generation
	h.do(t, 400, "PUT", "/devices/e1", `{"deviceId":"e1"}`, "If-Match", "*") // it has children
	// Below another top there is a generation too many.
	above := h.do(t, 200, "PUT", "/devices/e0", `{"deviceId":"e0","capabilities":{"iotEdge":true}}`)
	put(400, "e1", true, scope(above), "If-Match", "*")
	for i := range 99 { // and e2
		put(200, fmt.Sprintf("child-%d", i), false, scopes[0])
	}
	put(400, "one-more", false, scopes[0])
	put(200, "child-0", false, scopes[0], "If-Match", "*")
	// A parent that goes leaves its children without one.
	h.do(t, 204, "DELETE", "/devices/e1", "", "If-Match", "*")
	if doc := h.do(t, 200, "GET", "/devices/child-1", ""); doc["deviceScope"] != nil || doc["parentScopes"] != nil {
		t.Errorf("%v", doc)
	}
	if doc := h.do(t, 200, "GET", "/devices/e2", ""); doc["deviceScope"] != scopes[1] || doc["parentScopes"] != nil {
		t.Errorf("%v", doc)
	}
	put(200, "e2", true, scope(above), "If-Match", "*")
}

// What a twin takes, as IoT Hub has it. Service API, section 5.3.
func TestTwins(t *testing.T) {
	h := open(t)
	h.device(t, "dev-1")
	fresh := h.do(t, 200, "GET", "/twins/dev-1", "")
	for _, name := range []string{"deviceId", "etag", "version", "deviceEtag", "status", "statusUpdateTime", "connectionState", "lastActivityTime", "cloudToDeviceMessageCount", "authenticationType", "x509Thumbprint",
		"capabilities", "modelId", "tags", "properties"} {
		if _, ok := fresh[name]; !ok {
			t.Errorf("%s is missing", name)
		}
	}
	h.do(t, 412, "PATCH", "/twins/dev-1", `{}`, "If-Match", `"old"`)
	h.do(t, 404, "PATCH", "/twins/nobody", `{}`)
	h.do(t, 200, "PATCH", "/twins/dev-1", `{"tags":{"a":{"b":1,"c":"x"},"version":3}}`, "If-Match", `"`+fresh["etag"].(string)+`"`)
	doc := h.do(t, 200, "PATCH", "/twins/dev-1", `{"tags":{"a":{"b":null}},"properties":{"desired":{"p":{"q":[1,{"r":null}]},"s":1.50}}}`, "If-Match", "*")
	if fmt.Sprint(doc["tags"]) != "map[a:map[c:x] version:3]" {
		t.Errorf("%v", doc["tags"])
	}
	desired := doc["properties"].(map[string]any)["desired"].(map[string]any)
	meta := desired["$metadata"].(map[string]any)
	if desired["$version"] != 2.0 || meta["$lastUpdatedVersion"] != 2.0 || meta["p"].(map[string]any)["q"].(map[string]any)["$lastUpdatedVersion"] != 2.0 {
		t.Errorf("%v", desired)
	}
	// What was read may be written.
	w := h.call(h.token("service", false), "GET", "/twins/dev-1"+version, "")
	again := h.do(t, 200, "PUT", "/twins/dev-1", w.Body.String(), "If-Match", w.Header().Get("Etag"))
	if fmt.Sprint(again["tags"]) != fmt.Sprint(doc["tags"]) || again["etag"] == doc["etag"] {
		t.Errorf("%v", again)
	}
	if doc = h.do(t, 200, "PUT", "/twins/dev-1", `{"tags":{"only":true}}`); fmt.Sprint(doc["tags"]) != "map[only:true]" || len(doc["properties"].(map[string]any)["desired"].(map[string]any)) != 2 {
		t.Errorf("%v", doc)
	}
	deep := func(n int) string { return strings.Repeat(`{"a":`, n) + "1" + strings.Repeat("}", n) }
	many := func(n int) string { // n octets, as IoT Hub counts them
		var parts []string
		for i := 0; n > 0; i++ {
			size := min(n, 1000)
			if n-size < 10 && n != size {
				size -= 10
			}
			parts = append(parts, fmt.Sprintf(`"k%04d":"%s"`, i, strings.Repeat("x", size-5)))
			n -= size
		}
		return "{" + strings.Join(parts, ",") + "}"
	}
	for name, x := range map[string]struct {
		part string
		want int
	}{
		"depth 10": {deep(10), 200}, "depth 11": {deep(11), 400}, "a dot": {`{"a.b":1}`, 400}, "a dollar": {`{"a$":1}`, 400}, "a space": {`{"a b":1}`, 400}, "a control": {`{"a\u0085":1}`, 400}, "no name": {`{"":1}`, 400},
		"a name of 1 KiB": {`{"` + strings.Repeat("n", 1024) + `":1}`, 200}, "a longer name": {`{"` + strings.Repeat("n", 1025) + `":1}`, 400},
		"a text of 4 KiB": {`{"a":"` + strings.Repeat("x", 4096) + `"}`, 200}, "a longer text": {`{"a":"` + strings.Repeat("x", 4097) + `"}`, 400},
		"2^52": {`{"a":4503599627370496}`, 200}, "-2^52": {`{"a":-4503599627370496}`, 200}, "beyond 2^52": {`{"a":4503599627370497}`, 400}, "below -2^52": {`{"a":-4503599627370497}`, 400}, "beyond 2^64": {`{"a":99999999999999999999}`, 400},
		"a fraction": {`{"a":1e100}`, 200}, "no fraction any more": {`{"a":1e999}`, 400}, "an array": {`[1]`, 400}, "a text": {`"a"`, 400}, "nothing": {`null`, 200}, "names of other letters": {`{"größe":"ä"}`, 200},
		"tags of 8 KiB": {many(8 << 10), 200},
	} {
		h.do(t, x.want, "PUT", "/twins/dev-1", `{"tags":`+x.part+`}`)
		h.do(t, x.want, "PUT", "/twins/dev-1", `{"properties":{"desired":`+x.part+`}}`)
		_ = name
	}
	h.do(t, 400, "PUT", "/twins/dev-1", `{"tags":`+many(8<<10+1)+`}`)
	h.do(t, 200, "PUT", "/twins/dev-1", `{"properties":{"desired":`+many(32<<10)+`}}`)
	h.do(t, 400, "PUT", "/twins/dev-1", `{"properties":{"desired":`+many(32<<10+1)+`}}`)
	h.do(t, 400, "PATCH", "/twins/dev-1", `{"properties":{"desired":{"one":1}}}`) // full with what is there
	h.do(t, 400, "PATCH", "/twins/dev-1", `{"properties":1}`)
}

func TestQuery(t *testing.T) {
	h := open(t)
	for i := range 5 {
		id := fmt.Sprintf("dev-%d", i)
		h.device(t, id)
		h.do(t, 200, "PATCH", "/twins/"+id, fmt.Sprintf(`{"tags":{"n":%d,"even":%t,"site":"it's %d"},"properties":{"desired":{"deep":{"er":%d}}}}`, i, i%2 == 0, i%3, i%2))
	}
	ask := func(text string, header ...string) (string, string) {
		t.Helper()
		w := h.call(h.token("service", false), "POST", "/devices/query"+version, fmt.Sprintf(`{"query":%q}`, text), header...)
		if w.Code != 200 {
			return fmt.Sprint(w.Code), ""
		}
		var ids []string
		for _, part := range strings.Split(w.Body.String(), `"deviceId":"`)[1:] {
			ids = append(ids, strings.TrimPrefix(part[:strings.IndexByte(part, '"')], "dev-"))
		}
		return strings.Join(ids, ""), w.Header().Get("X-Ms-Continuation")
	}
	for text, want := range map[string]string{
		"SELECT * FROM devices": "01234", " select *\nfrom DEVICES ; ": "01234", "SELECT * FROM devices WHERE tags.n = 3": "3", "SELECT * FROM devices WHERE tags.even=true AND tags.n != 2": "04",
		"SELECT * FROM devices WHERE devices.tags.site = 'it''s 1' and properties.desired.deep.er <> 1": "4", "SELECT * FROM devices WHERE deviceId = 'dev-2'": "2", "SELECT * FROM devices WHERE tags.none = 1": "",
		"SELECT * FROM devices WHERE tags.none != 1": "", "SELECT * FROM devices WHERE tags.n = '3'": "", "SELECT * FROM devices WHERE status = 'enabled' AND connectionState = 'Disconnected' AND capabilities.iotEdge = false AND tags.n = 1.0": "1",
		"SELECT * FROM devices.modules": "400", "SELECT deviceId FROM devices": "400", "SELECT * FROM devices WHERE tags.n > 3": "400", "SELECT * FROM devices WHERE tags.n = 3 OR tags.n = 4": "400", "SELECT * FROM devices WHERE tags.n = 3 AND": "400",
		"SELECT * FROM devices WHERE foo = 1": "400", "SELECT * FROM devices WHERE is_defined(tags.n)": "400", "SELECT * FROM devices ORDER BY deviceId": "400", "": "400", "SELECT * FROM devices WHERE": "400", "DROP TABLE devices": "400",
	} {
		if got, _ := ask(text); got != want {
			t.Errorf("%s: %q, want %q", text, got, want)
		}
	}
	first, next := ask("SELECT * FROM devices", "x-ms-max-item-count", "3")
	h.do(t, 204, "DELETE", "/devices/dev-2", "", "If-Match", "*") // paging bears it
	second, end := ask("SELECT * FROM devices", "x-ms-max-item-count", "3", "x-ms-continuation", next)
	if first != "012" || next == "" || second != "34" || end != "" {
		t.Errorf("%q %q %q %q", first, next, second, end)
	}
	if got, _ := ask("SELECT * FROM devices", "x-ms-continuation", "%%"); got != "400" {
		t.Errorf("%s", got)
	}
}

func TestBulk(t *testing.T) {
	h := open(t, func(c *devhub.Config) { c.MaxDevices = 3 })
	run := func(want int, items ...string) string {
		t.Helper()
		return fmt.Sprint(h.do(t, want, "POST", "/devices", "["+strings.Join(items, ",")+"]")["errors"])
	}
	run(200, `{"id":"a","importMode":"create","tags":{"x":1},"properties":{"desired":{"y":2}}}`, `{"id":"b"}`)
	if twin := h.do(t, 200, "GET", "/twins/a", ""); fmt.Sprint(twin["tags"]) != "map[x:1]" || twin["properties"].(map[string]any)["desired"].(map[string]any)["y"] != 2.0 {
		t.Errorf("%v", twin)
	}
	if got := run(400, `{"id":"a","importMode":"create"}`, `{"id":"c","importMode":"CREATEORUPDATE"}`, `{"id":"d"}`, `{"id":"e","importMode":"update"}`, `{"id":"f","importMode":"dance"}`); !strings.Contains(got, "409001") ||
		!strings.Contains(got, "413002") || !strings.Contains(got, "404001") || !strings.Contains(got, "dance") {
		t.Errorf("%s", got)
	}
	tag := h.do(t, 200, "GET", "/devices/a", "")["etag"].(string)
	run(400, `{"id":"a","importMode":"UpdateIfMatchETag","eTag":"old"}`, `{"id":"b","importMode":"deleteIfMatchETag"}`)
	run(200, fmt.Sprintf(`{"id":"a","importMode":"UpdateIfMatchETag","etag":%q,"status":"disabled"}`, tag), `{"id":"b","importMode":"createOrUpdate","status":"disabled"}`)
	if doc := h.do(t, 200, "GET", "/statistics/devices", ""); doc["totalDeviceCount"] != 3.0 || doc["disabledDeviceCount"] != 2.0 || doc["enabledDeviceCount"] != 1.0 {
		t.Errorf("%v", doc)
	}
	twinTag := h.do(t, 200, "GET", "/twins/a", "")["etag"].(string)
	run(200, fmt.Sprintf(`{"id":"a","importMode":"updateTwinIfMatchETag","twinETag":%q,"tags":{"x":null}}`, twinTag), `{"id":"b","importMode":"updateTwin","tags":{"z":1}}`, `{"id":"c","importMode":"Delete"}`)
	for _, bad := range []string{`[]`, `{}`, `[1]`, `[{"id":"a"},{"id":"a"}]`, `[{"id":"a b"}]`, `[` + strings.Repeat(`{"id":"a"},`, 100) + `{"id":"b"}]`} {
		h.do(t, 400, "POST", "/devices", bad)
	}
	h.do(t, 200, "PUT", "/devices/c", `{"deviceId":"c"}`)
	h.do(t, 413, "PUT", "/devices/d", `{"deviceId":"d"}`)
	if w := h.call(h.token("iothubowner", false), "GET", "/devices/?top=2&"+version[1:], ""); w.Code != 200 || strings.Count(w.Body.String(), `"deviceId"`) != 2 {
		t.Errorf("%d %s", w.Code, w.Body)
	}
}

// The hub as the registration service tells it about devices: twice is once, and what an operator did there stays.
func TestLinked(t *testing.T) {
	h := open(t)
	l, ctx := h.Linked(), t.Context()
	if err := l.Check(ctx); err != nil {
		t.Error(err)
	}
	keys := &dps.SymmetricKeyAttestation{PrimaryKey: deviceKey, SecondaryKey: deviceKey}
	admit := func(d registration.HubDevice, want bool) {
		t.Helper()
		if created, err := l.Admit(ctx, &d); err != nil || created != want {
			t.Fatalf("%+v: %t, %v", d.ID, created, err)
		}
	}
	admit(registration.HubDevice{ID: "edge", Keys: keys, IoTEdge: true}, true)
	edge, err := l.Device(ctx, "edge")
	if err != nil || edge.Scope == "" || edge.Keys != nil {
		t.Fatalf("%+v, %v", edge, err)
	}
	sum := strings.Repeat("AB", 32)
	admit(registration.HubDevice{ID: "dev", Thumbprints: []string{sum, sum}, Parent: edge.Scope, Disabled: true}, true)
	before := h.do(t, 200, "GET", "/devices/dev", "")
	if before["status"] != "disabled" || before["deviceScope"] != edge.Scope || before["authentication"].(map[string]any)["type"] != "selfSigned" {
		t.Errorf("%v", before)
	}
	admit(registration.HubDevice{ID: "dev", Thumbprints: []string{sum, sum}, Parent: edge.Scope}, false)
	if again := h.do(t, 200, "GET", "/devices/dev", ""); again["etag"] != before["etag"] {
		t.Error("admitted twice is not once")
	}
	if err := l.MergeTwin(ctx, "dev", &registration.HubTwin{Tags: []byte(`{"a":{"b":1}}`), Desired: []byte(`{"n":4503599627370496}`)}); err != nil {
		t.Error(err)
	}
	admit(registration.HubDevice{ID: "dev", Keys: keys}, false)
	after := h.do(t, 200, "GET", "/devices/dev", "")
	if after["status"] != "disabled" || after["deviceScope"] != nil || after["authentication"].(map[string]any)["type"] != "sas" || after["generationId"] != before["generationId"] {
		t.Errorf("%v", after)
	}
	if err := l.MergeTwin(ctx, "dev", &registration.HubTwin{Tags: []byte(`{"a":{"c":2}}`)}); err != nil {
		t.Error(err)
	}
	if twin, err := l.Twin(ctx, "dev"); err != nil || string(twin.Tags) != `{"a":{"b":1,"c":2}}` || string(twin.Desired) != `{"n":4503599627370496}` {
		t.Errorf("%s, %v", twin, err)
	}
	var refusal *registration.HubError
	if _, err := l.Admit(ctx, &registration.HubDevice{ID: "x", Keys: keys, Parent: "ms-azure-iot-edge://nobody-1"}); !errors.As(err, &refusal) || refusal.Temporary || refusal.Status != 400 || refusal.Hub != hubName {
		t.Errorf("%v", err)
	}
	if err := l.MergeTwin(ctx, "dev", &registration.HubTwin{Tags: []byte(`{"a.b":1}`)}); !errors.As(err, &refusal) || refusal.Code != "ArgumentInvalid" {
		t.Errorf("%v", err)
	}
	for range 2 {
		if err := l.Remove(ctx, "dev"); err != nil {
			t.Error(err)
		}
	}
	_, err1 := l.Device(ctx, "dev")
	_, err2 := l.Twin(ctx, "dev")
	for _, err := range []error{err1, err2, l.MergeTwin(ctx, "dev", &registration.HubTwin{})} {
		if !errors.Is(err, registration.ErrNotFound) {
			t.Errorf("%v", err)
		}
	}
}

// A hub with a file is the same when it is opened again, and shows no key in it; another data key opens nothing.
func TestFile(t *testing.T) {
	registrationtest.Goroutines(t)
	path := filepath.Join(t.TempDir(), "hub.db")
	edit := func(c *devhub.Config) { c.Path = path }
	h := open(t, edit)
	h.device(t, "dev-1")
	h.do(t, 200, "PUT", "/devices/edge", `{"deviceId":"edge","capabilities":{"iotEdge":true}}`)
	scope := h.do(t, 200, "GET", "/devices/edge", "")["deviceScope"].(string)
	h.do(t, 200, "PUT", "/devices/leaf", fmt.Sprintf(`{"deviceId":"leaf","deviceScope":%q}`, scope))
	h.do(t, 200, "PATCH", "/twins/dev-1", `{"tags":{"a":[1.50,{"b":null}]},"properties":{"desired":{"n":4503599627370496,"o":{"p":"q"}}}}`)
	h.do(t, 200, "PUT", "/devices/gone", `{"deviceId":"gone"}`)
	h.do(t, 204, "DELETE", "/devices/gone", "", "If-Match", "*")
	h.do(t, 204, "DELETE", "/devices/edge", "", "If-Match", "*")
	all := func(h *hub) string {
		return h.call(h.token("iothubowner", false), "GET", "/devices"+version, "").Body.String() + h.call(h.token("service", false), "GET", "/twins/dev-1"+version, "").Body.String()
	}
	before := all(h)
	for _, name := range []string{path, path + "-wal"} {
		if b, err := os.ReadFile(name); err != nil || bytes.Contains(b, []byte(deviceKey)) || !bytes.Contains(b, []byte("dev-1")) && name != path {
			t.Errorf("%s: %v, or a key is in it", name, err)
		}
	}
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	h.do(t, 500, "PUT", "/devices/late", `{"deviceId":"late"}`)
	if after := all(open(t, edit)); after != before || !strings.Contains(after, deviceKey) {
		t.Errorf("%s\n%s", before, after)
	}
	if _, err := devhub.Open(t.Context(), devhub.Config{Name: hubName, Secret: secret, Path: path, DataKey: bytes.Repeat([]byte{8}, 32)}); err == nil || strings.Contains(err.Error(), deviceKey) {
		t.Errorf("another data key: %v", err)
	}
	for name, cfg := range map[string]devhub.Config{"no name": {Secret: secret}, "a short secret": {Name: hubName, Secret: secret[:15]}, "a short data key": {Name: hubName, Secret: secret, Path: path, DataKey: dataKey[:16]}} {
		if _, err := devhub.Open(t.Context(), cfg); err == nil {
			t.Errorf("%s: opened", name)
		}
	}
}

// 64 writers of one device: of those who name the same etag one wins, and no change is lost of those who merge.
func TestWriters(t *testing.T) {
	h := open(t)
	h.device(t, "dev-1")
	tag := h.do(t, 200, "GET", "/devices/dev-1", "")["etag"].(string)
	var wait sync.WaitGroup
	codes := make(chan int, 64)
	for i := range 64 {
		wait.Go(func() {
			codes <- h.call(h.token("iothubowner", false), "PUT", "/devices/dev-1"+version, `{"deviceId":"dev-1"}`, "If-Match", tag).Code
			if w := h.call(h.token("iothubowner", false), "PATCH", "/twins/dev-1"+version, fmt.Sprintf(`{"tags":{"t%d":1}}`, i)); w.Code != 200 {
				t.Errorf("%d %s", w.Code, w.Body)
			}
		})
	}
	wait.Wait()
	close(codes)
	won := 0
	for c := range codes {
		if c == 200 {
			won++
		} else if c != 412 {
			t.Errorf("%d", c)
		}
	}
	if twin := h.do(t, 200, "GET", "/twins/dev-1", ""); won != 1 || len(twin["tags"].(map[string]any)) != 64 || twin["version"] != 65.0 {
		t.Errorf("%d won, %v", won, twin)
	}
}
