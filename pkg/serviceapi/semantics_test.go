package serviceapi_test

import (
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/touchmark/touchmark/hsm/tpm/residency"
	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
	"github.com/touchmark/touchmark/pkg/serviceapi"
)

func ofGroup(id, rest string) string { return `{"enrollmentGroupId":"` + id + `",` + rest + `}` }

// DPS-S 1, 2, 5, 7, 9, 10: what clients write around a call.
func TestForms(t *testing.T) {
	d, o := newOperator(t)
	auth := "Authorization: " + o.token
	for _, v := range []string{"2018-09-01-preview", "2018-11-01", "2019-03-31", "2021-06-01", "2021-10-01", "2025-07-01-preview"} {
		for _, r := range serviceapi.Routes() {
			if res, b := o.do(t, r.Method, "/"+sample(r.Pattern)+"?api-version="+v, "", auth); strings.Contains(string(b), "api-version") {
				t.Errorf("%s %s with %s: %d %s", r.Method, r.Pattern, v, res.StatusCode, b)
			}
		}
	}
	for _, v := range []string{"", "x", "2016-01-01", "2021-13-01", "2021-10-1", "2021-10-01-beta", "9999-01-01", d.Now().AddDate(0, 0, 3).Format(time.DateOnly)} {
		for _, r := range serviceapi.Routes() {
			if res, b := o.do(t, r.Method, "/"+sample(r.Pattern)+"?api-version="+v, "", auth); res.StatusCode != 400 || !strings.Contains(string(b), `"errorCode":400000`) {
				t.Errorf("%s %s with %s: %d %s", r.Method, r.Pattern, v, res.StatusCode, b)
			}
		}
	}
	// A slash at the end, letters in any case, IDs that are encoded for no reason.
	o.want(t, 400, dps.CodeInvalidArgument, "POST", "/enrollments/", "{}")
	o.want(t, 400, dps.CodeInvalidArgument, "POST", "/EnrollmentGroups/", "{}")
	o.want(t, 200, 0, "GET", "/enrollmentgroups/%6Beys", "")
	o.want(t, 200, 0, "POST", "/enrollmentgroups/KEYS/AttestationMechanism/", "")
	for _, path := range []string{"/enrollments/a+b", "/enrollments/a%2Fb", "/enrollments/a%20b", "/enrollments/%C3%A4", "/enrollments/query", "/enrollments/..%2fkeys"} {
		o.want(t, 404, dps.CodeNoEnrollment, "GET", path, "")
	}
	o.want(t, 405, dps.CodeMethodNotAllowed, "DELETE", "/enrollments/", "")
	for _, path := range []string{"/enrollments/x/y", "/touchmark", "/touchmark/nothing", "/registrations"} {
		o.want(t, 404, dps.CodeNotFound, "POST", path, "")
	}
	if res, _ := o.call(t, "PATCH", "/enrollments/own-key", ""); res.Header.Get("Allow") != "GET, PUT, DELETE" {
		t.Errorf("allowed: %q", res.Header.Get("Allow"))
	}
	// Content types; a body is read as what it is.
	body := ofDevice("typed", newKeys)
	for kind, status := range map[string]int{"application/json": 200, "application/json; charset=utf-8": 200, "text/json": 200, "": 200, "text/plain": 415, "application/x-www-form-urlencoded": 415, "application/json; charset": 415, "x": 415} {
		res, b := o.call(t, "PUT", "/enrollments/typed", body, "Content-Type: "+kind)
		if res.StatusCode != status {
			t.Errorf("%q: %d %s", kind, res.StatusCode, b)
		}
		if status == 200 {
			o.want(t, 204, 0, "DELETE", "/enrollments/typed", "{}", "Content-Type: "+kind)
		}
	}
	for _, body := range []string{"{", "[]", "null", `"x"`, "5", "{}{}", "\xff", `{"registrationId":"x","attestation":{"type":"symmetricKey"},"deviceId":"` + "\xff" + `"}`, strings.Repeat("[", 20000)} {
		o.want(t, 400, dps.CodeInvalidArgument, "PUT", "/enrollments/x", body)
		o.want(t, 400, dps.CodeInvalidArgument, "POST", "/enrollmentGroups", body)
	}
	for _, body := range []string{"{", "[]", `{"query":5}`} {
		o.want(t, 400, dps.CodeInvalidArgument, "POST", "/enrollments/query", body)
	}
	seen := map[string]bool{}
	for range 20 {
		res, _ := o.call(t, "GET", "/enrollments/own-key", "")
		if id := res.Header.Get("X-Ms-Request-Id"); seen[id] {
			t.Errorf("request ID %s came twice", id)
		} else {
			seen[id] = true
		}
	}
}

// sample is a path of a pattern.
func sample(pattern string) string { return strings.ReplaceAll(pattern, "*", "nobody") }

// DPS-S 6, 8, 12, 23, 24, 26, 27, 28: members as they go in and come out.
func TestMembers(t *testing.T) {
	d, o := newOperator(t)
	d.Advance(123456700 * time.Nanosecond)
	made := o.want(t, 200, 0, "PUT", "/enrollments/m", ofDevice("m", newKeys+`,"deviceId":null,"capabilities":null,"initialTwin":{"tags":null,"properties":{"desired":null}},"iotHubs":null,"allocationPolicy":null,
		"reprovisionPolicy":null,"optionalDeviceInformation":null,"customAllocationDefinition":null,"iotHubHostName":null,"credentialPolicyName":null,"provisioningStatus":null,"etag":null,"createdDateTimeUtc":null`))
	if status, ok := made["provisioningStatus"]; !ok || status != nil || made["createdDateTimeUtc"] != made["lastUpdatedDateTimeUtc"] {
		t.Errorf("made of nulls: %v", made)
	}
	for name, v := range made {
		if v == nil && name != "provisioningStatus" {
			t.Errorf("%s is null", name)
		}
	}
	for _, path := range []string{"/enrollments/m"} {
		if _, b := o.call(t, "GET", path, ""); !strings.Contains(string(b), `"provisioningStatus":null`) {
			t.Errorf("%s: %s", path, b)
		}
	}
	if s := d.register(t, d.ByKey("m", keyOf(t, made, "primaryKey"))); !strings.Contains(s, `"status":"assigned"`) {
		t.Errorf("null is not enabled: %s", s)
	}
	if when, _ := made["createdDateTimeUtc"].(string); !strings.HasSuffix(when, ".1234567Z") {
		t.Errorf("created at %s", when)
	}
	d.Advance(-3456700 * time.Nanosecond) // to .12
	plain := o.want(t, 200, 0, "PUT", "/enrollments/plain", ofDevice("plain", newKeys))
	if when, _ := plain["createdDateTimeUtc"].(string); !strings.HasSuffix(when, ".12Z") || plain["provisioningStatus"] != "enabled" || plain["reprovisionPolicy"] != nil {
		t.Errorf("%v", plain)
	}
	// Free-form members stay to the octet; what the service made is not looked at, whatever it is; unknown members do not matter.
	tags, desired, info := `{"version":1,"count":[1,{"a":null,"b":[[]]}],"$metadata":{},"ä":"ü<&>\u2028","e":"\u00e9","n":1.50,"big":123456789012345678901e-7}`, `{"a":{"b":{"c":[true,false,null,""]}}}`, `{"type":"none","x":[{}]}`
	o.want(t, 200, 0, "PUT", "/enrollments/free", ofDevice("free", newKeys+`,"initialTwin":{"tags":`+tags+`,"properties":{"desired":`+desired+`}},"optionalDeviceInformation":`+info+
		`,"registrationState":[5],"createdDateTimeUtc":"yesterday","lastUpdatedDateTimeUtc":{},"etag":7,"unknown":{"member":1},"Another":[]`))
	for _, get := range []func() []byte{
		func() []byte { _, b := o.call(t, "GET", "/enrollments/free", ""); return b },
		func() []byte {
			_, b := o.call(t, "POST", "/enrollments/query", "{}", "X-Ms-Max-Item-Count: 1")
			return b
		},
	} {
		if b := string(get()); !strings.Contains(b, `"initialTwin":{"tags":`+tags+`,"properties":{"desired":`+desired+`}}`) || !strings.Contains(b, info) {
			t.Errorf("free-form members: %s", b)
		}
	}
	for _, member := range []string{`"initialTwin":{"tags":5}`, `"initialTwin":{"tags":[]}`, `"initialTwin":{"properties":{"desired":"x"}}`, `"optionalDeviceInformation":true`, `"initialTwin":"x"`, `"capabilities":5`, `"provisioningStatus":"maybe"`} {
		o.want(t, 400, dps.CodeInvalidArgument, "PUT", "/enrollments/wrong", ofDevice("wrong", newKeys+","+member))
	}
	// Enums in any case.
	g := o.want(t, 200, 0, "PUT", "/enrollmentGroups/cases", ofGroup("Cases", `"attestation":{"TYPE":"SYMMETRICKEY"},"provisioningStatus":"DISABLED","allocationPolicy":"GEOLATENCY","iotHubs":["HUB-A.example.net"],"credentialPolicyName":"kept","reprovisionPolicy":{"updateHubAssignment":true,"migrateDeviceData":false},"capabilities":{"iotEdge":true}`))
	if g["attestation"].(map[string]any)["type"] != "symmetricKey" || g["provisioningStatus"] != "disabled" || g["allocationPolicy"] != "geoLatency" || g["credentialPolicyName"] != "kept" || g["enrollmentGroupId"] != "Cases" {
		t.Errorf("%v", g)
	}
}

func keyOf(t testing.TB, doc map[string]any, slot string) []byte {
	t.Helper()
	a, _ := doc["attestation"].(map[string]any)
	keys, _ := a["symmetricKey"].(map[string]any)
	text, _ := keys[slot].(string)
	k, err := base64.StdEncoding.DecodeString(text)
	if err != nil || len(k) == 0 {
		t.Fatalf("no %s in %v", slot, doc)
	}
	return k
}

// DPS-S 29: absent keys stay, null and empty ones are made anew, each by itself. DPS-S 15, 16: tags in all forms.
func TestKeysAndTags(t *testing.T) {
	_, o := newOperator(t)
	doc := o.want(t, 200, 0, "PUT", "/enrollments/k", ofDevice("k", `"attestation":{"type":"symmetricKey"}`))
	for attestation, want := range map[string][2]bool{ // whether primary and secondary stay
		`{"type":"symmetricKey"}`: {true, true},
		`{"type":"symmetricKey","symmetricKey":null,"tpm":null,"x509":null}`:             {true, true},
		`{"type":"symmetricKey","symmetricKey":{}}`:                                      {true, true},
		`{"type":"symmetricKey","symmetricKey":{"primaryKey":null}}`:                     {false, true},
		`{"type":"symmetricKey","symmetricKey":{"secondaryKey":""}}`:                     {true, false},
		`{"type":"symmetricKey","symmetricKey":{"primaryKey":null,"secondaryKey":null}}`: {false, false},
	} {
		p, s := string(keyOf(t, doc, "primaryKey")), string(keyOf(t, doc, "secondaryKey"))
		doc = o.want(t, 200, 0, "PUT", "/enrollments/k", ofDevice("k", `"attestation":`+attestation), `If-Match: "*"`)
		if np, ns := string(keyOf(t, doc, "primaryKey")), string(keyOf(t, doc, "secondaryKey")); (np == p) != want[0] || (ns == s) != want[1] || np == ns {
			t.Errorf("%s: the primary key stays: %t, the secondary: %t", attestation, np == p, ns == s)
		}
	}
	old := doc["etag"].(string)
	inner, err := base64.StdEncoding.DecodeString(old)
	if err != nil || len(inner) != 38 || inner[0] != '"' {
		t.Errorf("tag %s is %s", old, inner)
	}
	o.want(t, 200, 0, "PUT", "/enrollments/k", ofDevice("k", `"attestation":{"type":"symmetricKey"}`), `If-Match: "`+old+`"`)
	for _, method := range []string{"PUT", "DELETE"} {
		for _, tag := range []string{old, `"` + old + `"`, "x", `""`, "W/" + old} {
			o.want(t, 412, dps.CodeETagMismatch, method, "/enrollments/k", ofDevice("k", `"attestation":{"type":"symmetricKey"}`), "If-Match: "+tag)
		}
	}
	o.want(t, 404, dps.CodeNoEnrollment, "PUT", "/enrollments/none", ofDevice("none", `"attestation":{"type":"symmetricKey"}`), "If-Match: "+old)
	o.want(t, 404, dps.CodeNoEnrollment, "DELETE", "/enrollments/none", "", "If-Match: "+old)
	o.want(t, 400, dps.CodeInvalidArgument, "PUT", "/enrollments/k", ofDevice("k", `"attestation":{"type":"tpm","tpm":{"endorsementKey":"AAAA"}}`), "If-Match: *")
}

// DPS-S 22, 38, and the table of service API, section 1.6: what is refused, and with which words.
func TestValidation(t *testing.T) {
	_, o := newOperator(t)
	hook := func(u, v string) string {
		return `"allocationPolicy":"custom","customAllocationDefinition":{"webhookUrl":"` + u + `","apiVersion":"` + v + `"},` + newKeys
	}
	for members, want := range map[string]string{
		`"allocationPolicy":"custom",` + newKeys:                                                         "A CustomAllocationDefinition is required when the allocation policy is set to 'Custom'",
		`"iotHubs":["hub-a.example.net"],` + newKeys:                                                     "Enrollment allocationPolicy must be specified when iotHubs are specified.",
		`"allocationPolicy":"static","iotHubs":["hub-a.example.net","hub-b.example.net"],` + newKeys:     "one hub",
		`"allocationPolicy":"hashed","iotHubs":["hub-a.example.net","hub-z.example.net"],` + newKeys:     `"hub-z.example.net" is not linked`,
		`"iotHubHostName":"hub-z.example.net",` + newKeys:                                                "is not linked",
		`"allocationPolicy":"fastest",` + newKeys:                                                        "",
		hook("http://hooks.example.net/x", "2021-10-01"):                                                 "https",
		hook("http://127.0.0.1/x", "2021-10-01"):                                                         "https",
		hook("//hooks.example.net/x", "2021-10-01"):                                                      "https",
		hook("/x", "2021-10-01"):                                                                         "https",
		hook("https://u:p@hooks.example.net/", "2021-10-01"):                                             "https",
		hook("file:///etc/passwd", "2021-10-01"):                                                         "https",
		hook("https://hooks.example.net/?code=secret"+strings.Repeat("x", 2048), "2021-10-01"):           "https",
		hook("https://hooks.example.net/x", "2018-04-01"):                                                "apiVersion",
		hook("https://hooks.example.net/x", ""):                                                          "apiVersion",
		`"attestation":{"type":"x509","x509":{"caReferences":{"primary":"root"}}}`:                       "",
		`"attestation":{"type":"x509","x509":{}}`:                                                        "exactly one",
		`"attestation":{"type":"x509","x509":{"signingCertificates":{},"caReferences":{"primary":"x"}}}`: "exactly one",
		`"attestation":{"type":"symmetricKey","symmetricKey":{},"tpm":{}}`:                               "exactly",
		`"attestation":{"type":"symmetricKey","symmetricKey":{"primaryKey":"AAAA"}}`:                     "16 to 64",
		`"attestation":{"type":"none"}`:                                                                  "",
		`"attestation":null`:                                                                             "missing",
	} {
		for _, path := range []string{"/enrollments/v", "/enrollmentGroups/v"} {
			body := ofDevice("v", members)
			if path != "/enrollments/v" {
				body = ofGroup("v", members)
			}
			doc := o.want(t, 400, dps.CodeInvalidArgument, "PUT", path, body)
			if m, _ := doc["message"].(string); !strings.Contains(m, want) || strings.Contains(m, "secret") {
				t.Errorf("%s: %q", members, m)
			}
		}
	}
	for i, members := range []string{`"allocationPolicy":"static",` + newKeys, `"allocationPolicy":"static","iotHubs":["hub-b.example.net"],` + newKeys, `"iotHubHostName":"HUB-A.example.net",` + newKeys, hook("https://hooks.example.net/api?code=x", "2018-09-01-preview")} {
		o.want(t, 200, 0, "PUT", fmt.Sprint("/enrollments/ok", i), ofDevice(fmt.Sprint("ok", i), members))
		o.want(t, 200, 0, "PUT", fmt.Sprint("/enrollmentGroups/ok", i), ofGroup(fmt.Sprint("ok", i), members))
	}
	for id, want := range map[string]int{"Pump 1": 400, "a/b": 400, "ü": 400, strings.Repeat("d", 129): 400, "a-.%_#*?!(),:=@$'+Z9": 200, strings.Repeat("d", 128): 200} {
		if res, b := o.call(t, "PUT", "/enrollments/hub", ofDevice("hub", `"deviceId":`+quote(id)+`,`+newKeys)); res.StatusCode != want {
			t.Errorf("device ID %s: %d %s", id, res.StatusCode, b)
		} else if want == 200 {
			o.want(t, 204, 0, "DELETE", "/enrollments/hub", "")
		}
	}
	for _, id := range []string{strings.Repeat("a", 129), "a b", "a.", "a_", "ü", "a/b", ""} {
		o.want(t, 400, dps.CodeInvalidArgument, "PUT", "/enrollments/"+url.PathEscape("x"+id), ofDevice("x"+id, newKeys)[:0]+`{"registrationId":`+quote(id)+`,`+newKeys+`}`)
	}
}

func quote(s string) string {
	b, _ := json.Marshal(s)
	return string(b)
}

// Certificates that groups refer to by name: those that the scope has, and no others. Hubs and webhooks as the operator
// allows them.
func TestReferences(t *testing.T) {
	d, o := newOperator(t)
	svc := registration.New(registration.Config{Store: d.Store, Scope: registrationtest.Scope, Now: d.Now, UnlinkedHubs: true, HTTPWebhooks: true})
	if _, err := svc.PutCACertificate(t.Context(), start, "root-2026", attesttest.CA(t, nil, "root").Base64(), nil, ""); err != nil {
		t.Fatal(err)
	}
	put := func(kind registration.Kind, body string) error {
		_, err := svc.PutEnrollment(t.Context(), start, kind, "r", []byte(body), "")
		return err
	}
	if err := put(registration.Group, ofGroup("r", `"attestation":{"type":"x509","x509":{"caReferences":{"primary":"root-2026","secondary":"old"}}}`)); err == nil || !strings.Contains(err.Error(), "CA certificate not found") {
		t.Errorf("%v", err)
	}
	if err := put(registration.Group, ofGroup("r", `"attestation":{"type":"x509","x509":{"caReferences":{"primary":"root-2026"}}}`)); err != nil {
		t.Error(err)
	}
	if doc := o.want(t, 200, 0, "GET", "/enrollmentGroups/r", ""); !strings.Contains(fmt.Sprint(doc["attestation"]), "caReferences:map[primary:root-2026]") {
		t.Errorf("%v", doc)
	}
	if err := put(registration.Individual, ofDevice("r", `"attestation":{"type":"x509","x509":{"caReferences":{"primary":"root-2026"}}}`)); err == nil {
		t.Error("an individual enrollment refers to a CA")
	}
	if err := put(registration.Individual, ofDevice("r", `"iotHubHostName":"later.example.net","allocationPolicy":"custom","customAllocationDefinition":{"webhookUrl":"http://localhost:7071/api/x","apiVersion":"2021-10-01"},`+newKeys)); err != nil {
		t.Error(err)
	}
	if _, err := svc.PutEnrollment(t.Context(), start, registration.Individual, "s", []byte(ofDevice("s", `"customAllocationDefinition":{"webhookUrl":"http://192.0.2.1/x","apiVersion":"2021-10-01"},`+newKeys)), ""); err == nil {
		t.Error("another machine's webhook without TLS")
	}
}

// A registration that is deleted is gone at once for operators, and for its device at the replica that deleted it. At one that
// answered the device a moment ago it may hear of the operation that it began for ten seconds more (help store), and no longer.
func TestForgotten(t *testing.T) {
	d, o := newOperator(t)
	dev := d.Derived("dev-1")
	var op struct{ OperationID string }
	if s := d.ask(t, dev, "PUT", "/register"); json.Unmarshal([]byte(s), &op) != nil || op.OperationID == "" {
		t.Fatal(s)
	}
	told := d.ask(t, dev, "GET", "/operations/"+op.OperationID)
	if !strings.Contains(told, `"status":"assigned"`) {
		t.Fatal(told)
	}
	o.want(t, 204, 0, "DELETE", "/registrations/dev-1", "")
	remembered := 0
	for range d.doors {
		o.want(t, 404, dps.CodeNoGroup, "GET", "/registrations/dev-1", "")
	}
	for range d.doors {
		switch s := d.ask(t, dev, "GET", "/operations/"+op.OperationID); {
		case s == told:
			remembered++
		case !strings.Contains(s, `"errorCode":404`):
			t.Error(s)
		}
	}
	if remembered > 0 && len(d.doors) == 1 || remembered > 1 {
		t.Errorf("%d of %d still know it", remembered, len(d.doors))
	}
	d.Advance(11 * time.Second)
	for range d.doors {
		if s := d.ask(t, dev, "GET", "/operations/"+op.OperationID); !strings.Contains(s, `"errorCode":404`) {
			t.Errorf("eleven seconds later: %s", s)
		}
	}
	if s := d.register(t, dev); !strings.Contains(s, `"substatus":"initialAssignment"`) {
		t.Errorf("the next registration is not its first: %s", s)
	}
}

// DPS-S 39: endorsement keys are shown. Two enrollments cannot share one here, which is argued in the table.
func TestEndorsementKeys(t *testing.T) {
	_, o := newOperator(t)
	k, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	template := tpm2.RSAEKTemplate
	template.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{Buffer: k.N.Bytes()})
	ek := base64.StdEncoding.EncodeToString(residency.MarshalPublic(template))
	body := func(id string) string {
		return ofDevice(id, `"attestation":{"type":"tpm","tpm":{"endorsementKey":"`+ek+`"}}`)
	}
	o.want(t, 200, 0, "PUT", "/enrollments/tpm-1", body("tpm-1"))
	if got := o.want(t, 200, 0, "GET", "/enrollments/tpm-1", ""); got["attestation"].(map[string]any)["tpm"].(map[string]any)["endorsementKey"] != ek {
		t.Errorf("%v", got)
	}
	o.want(t, 400, dps.CodeInvalidArgument, "PUT", "/enrollments/tpm-2", body("tpm-2"))
}

// What is judged is refused as it would be by a put, for the same reasons, and nothing is written, not even into the audit record.
func TestJudge(t *testing.T) {
	d, o := newOperator(t)
	cert := attesttest.Leaf(t, nil, "one").Base64()
	x509 := func(id, more string) string {
		return `{"registrationId":"` + id + `","attestation":{"type":"x509","x509":{"clientCertificates":{"primary":{"certificate":"` + cert + `"}}}}` + more + `}`
	}
	keys := func(id, more string) string { return `{"registrationId":"` + id + `",` + newKeys + more + `}` }
	o.want(t, 200, 0, "PUT", "/enrollments/has-it", x509("has-it", ""))
	tag := fmt.Sprint(o.want(t, 200, 0, "GET", "/enrollments/has-it", "")["etag"])
	before := d.state(t, registrationtest.Scope)
	doc := o.want(t, 200, 0, "POST", "/touchmark/judge/enrollments", `{"enrollments":[`+strings.Join([]string{
		keys("new", ""), x509("has-it", `,"etag":"`+tag+`","provisioningStatus":"disabled"`),
		x509("wants-it", ""), keys("knot", `,"parent":"KNOT"`), x509("HAS-IT", ""), x509("has-it", `,"etag":"old"`), keys("nobody", `,"etag":"x"`), keys("b b", ""), `{}`,
	}, ",")+`]}`)
	var got []string
	for _, r := range doc["errors"].([]any) {
		e := r.(map[string]any)
		got = append(got, fmt.Sprintf("%v %v", e["registrationId"], e["errorCode"]))
		if e["registrationId"] == "wants-it" && !strings.Contains(fmt.Sprint(e["errorStatus"]), "belongs to enrollment has-it") {
			t.Error(e)
		}
	}
	want := []string{"wants-it 400004", "knot 400004", fmt.Sprint("HAS-IT ", int(dps.CodeEnrollmentExists)), "has-it 412001", fmt.Sprint("nobody ", int(dps.CodeNoEnrollment)), "b b 400004", "<nil> 400004"}
	if !slices.Equal(got, want) || doc["isSuccessful"] != false {
		t.Errorf("%q, not %q", got, want)
	}
	if d.state(t, registrationtest.Scope) != before {
		t.Error("something was written")
	}
	if doc := o.want(t, 200, 0, "POST", "/touchmark/judge/enrollmentGroups", `{"enrollmentGroups":[{"enrollmentGroupId":"g",`+newKeys+`}]}`); doc["isSuccessful"] != true {
		t.Error(doc)
	}
	for _, body := range []string{"", `{}`, `{"enrollments":[]}`} {
		o.want(t, 400, dps.CodeInvalidArgument, "POST", "/touchmark/judge/enrollments", body)
	}
}

// DPS-S 50 to 54: items stand for themselves.
func TestBulk(t *testing.T) {
	_, o := newOperator(t)
	for _, k := range []struct{ path, list, id string }{{"/enrollments", "enrollments", "registrationId"}, {"/enrollmentGroups/", "enrollmentGroups", "enrollmentGroupId"}} {
		item := func(id, more string) string { return `{"` + k.id + `":"` + id + `",` + newKeys + more + `}` }
		bulk := func(mode string, items ...string) (rows []map[string]any) {
			t.Helper()
			doc := o.want(t, 200, 0, "POST", k.path, `{"`+k.list+`":[`+strings.Join(items, ",")+`],"mode":"`+mode+`"}`)
			for _, r := range doc["errors"].([]any) {
				rows = append(rows, r.(map[string]any))
			}
			if doc["isSuccessful"] != (len(rows) == 0) || len(doc) != 2 {
				t.Errorf("%v", doc)
			}
			return rows
		}
		failed := func(rows []map[string]any, want ...string) {
			t.Helper()
			var got []string
			for _, r := range rows {
				got = append(got, fmt.Sprintf("%v %v", r[k.id], r["errorCode"]))
				if s, _ := r["errorStatus"].(string); s == "" || len(r) > 3 {
					t.Errorf("%v", r)
				}
			}
			if !slices.Equal(got, want) {
				t.Errorf("failed: %q, not %q", got, want)
			}
		}
		get := func(id string) map[string]any {
			t.Helper()
			return o.want(t, 200, 0, "GET", strings.TrimSuffix(k.path, "/")+"/"+id, "")
		}
		exists := dps.CodeEnrollmentExists
		none := dps.CodeNoEnrollment
		if k.list != "enrollments" {
			exists, none = dps.CodeGroupExists, dps.CodeNoGroup
		}
		var ten []string
		for i := range 10 {
			ten = append(ten, item(fmt.Sprint("b", i), ""))
		}
		failed(bulk("create", ten...))
		o.want(t, 400, dps.CodeInvalidArgument, "POST", k.path, `{"`+k.list+`":[`+strings.Join(append(ten, ten[0]), ",")+`],"mode":"create"}`)
		for _, body := range []string{`{"` + k.list + `":[],"mode":"create"}`, `{"mode":"create"}`, `{"` + k.list + `":[` + ten[0] + `]}`, `{"` + k.list + `":[` + ten[0] + `],"mode":"merge"}`, `{"` + k.list + `":{},"mode":"create"}`, ""} {
			o.want(t, 400, dps.CodeInvalidArgument, "POST", k.path, body)
		}
		// One is there already, and one comes twice: nine and one of the two are made.
		var next []string
		for i := range 8 {
			next = append(next, item(fmt.Sprint("c", i), ""))
		}
		failed(bulk("CREATE", append(next, item("b0", ""), item("C0", ""))...), fmt.Sprint("b0 ", int(exists)), fmt.Sprint("C0 ", int(exists)))
		get("c7")
		// Items that are none.
		failed(bulk("create", `{}`, `5`, `{"`+k.id+`":"d d",`+newKeys+`}`, item("d0", ""), item("d1", `,"allocationPolicy":"x"`)), "<nil> 400004", "<nil> 400004", "d d 400004", "d1 400004")
		get("d0")
		failed(bulk("update", item("b1", `,"provisioningStatus":"disabled"`), item("nobody", "")), fmt.Sprint("b1 ", int(exists)), fmt.Sprint("nobody ", int(none)))
		if get("b1")["provisioningStatus"] != "enabled" {
			t.Error("an update without a tag changed something")
		}
		tag := fmt.Sprint(get("b1")["etag"])
		failed(bulk("update", item("b1", `,"provisioningStatus":"disabled","etag":"`+tag+`"`)))
		for _, mode := range []string{"updateIfMatchETag", "updateIfMatchEtag"} {
			fresh := fmt.Sprint(get("b2")["etag"])
			failed(bulk(mode, item("b1", `,"etag":"`+tag+`"`), item("b2", `,"etag":"`+fresh+`","provisioningStatus":"disabled"`), item("b3", ""), item("nobody", `,"etag":"x"`)),
				"b1 412001", "b3 400004", fmt.Sprint("nobody ", int(none)))
			if get("b2")["etag"] == fresh || get("b1")["provisioningStatus"] != "disabled" {
				t.Error("what the tag fits was not written, or what it does not fit was")
			}
		}
		failed(bulk("delete", item("b0", ""), item("b1", `,"etag":"x"`), item("b2", `,"etag":"`+fmt.Sprint(get("b2")["etag"])+`"`), `{"`+k.id+`":"b3"}`, item("nobody", "")), "b1 412001", fmt.Sprint("nobody ", int(none)))
		o.want(t, 404, none, "GET", strings.TrimSuffix(k.path, "/")+"/b0", "")
		get("b1")
	}
}

// DPS-S 47, 48: a continuation is of its list, and nothing else.
func TestContinuations(t *testing.T) {
	d, o := newOperator(t)
	for i := range 5 {
		id := fmt.Sprint("c-", i)
		d.Put(t, registration.Individual, id, registrationtest.Symmetric(d.OwnKey, nil))
		d.Put(t, registration.Group, id, registrationtest.Symmetric(d.OwnKey, nil))
	}
	token := func(path string) string {
		res, _ := o.call(t, "POST", path, "", "X-Ms-Max-Item-Count: 1")
		return res.Header.Get("X-Ms-Continuation")
	}
	good := token("/enrollments/query")
	for i := range len(good) { // each character counts
		wrong := []byte(good)
		if wrong[i]++; wrong[i] == 'z'+1 {
			wrong[i] = 'a'
		}
		o.want(t, 400, dps.CodeInvalidArgument, "POST", "/enrollments/query", "", "X-Ms-Continuation: "+string(wrong))
	}
	for _, wrong := range []string{"x", "=", good + good, good + "A", good[:len(good)-2], token("/enrollmentGroups/query"), strings.Repeat("A", 4000), "null", `[{"a":1}]`} {
		o.want(t, 400, dps.CodeInvalidArgument, "POST", "/enrollments/query", "", "X-Ms-Continuation: "+wrong)
	}
	o.want(t, 400, dps.CodeInvalidArgument, "POST", "/registrations/c-1/query", "", "X-Ms-Continuation: "+good)
	for _, n := range []string{"0", "-1", "x", "1.5", "99999999999999999999", " "} {
		if res, _ := o.call(t, "POST", "/enrollments/query", "", "X-Ms-Max-Item-Count: "+n); res.StatusCode != 400 && strings.TrimSpace(n) != "" {
			t.Errorf("a page of %q", n)
		}
	}
	// Every record that is there all the time comes once, whatever comes and goes: also the one that the page ended with.
	seen, next := map[string]int{}, ""
	for i := 0; ; i++ {
		header := []string{"X-Ms-Max-Item-Count: 1"}
		if next != "" {
			header = append(header, "X-Ms-Continuation: "+next)
		}
		res, b := o.call(t, "POST", "/enrollments/query", "", header...)
		var rows []struct{ RegistrationID string }
		if err := json.Unmarshal(b, &rows); err != nil || len(rows) > 1 {
			t.Fatalf("%s: %v", b, err)
		}
		for _, r := range rows {
			seen[r.RegistrationID]++
			o.want(t, 204, 0, "DELETE", "/enrollments/"+r.RegistrationID, "")
		}
		d.Put(t, registration.Individual, fmt.Sprint("a-", i), registrationtest.Symmetric(d.OwnKey, nil))
		values, more := res.Header["X-Ms-Continuation"]
		if !more {
			break
		}
		next = values[0]
	}
	for _, id := range []string{"c-0", "c-1", "c-2", "c-3", "c-4", "own-key", "own-cert"} {
		if seen[id] != 1 {
			t.Errorf("%s came %d times", id, seen[id])
		}
	}
}

// With --strict-query the text counts: it is understood or refused, and a page is bounded in what it looks at.
func TestStrictQuery(t *testing.T) {
	d, o := newOperator(t, func(c *serviceapi.Config) { c.StrictQuery = true })
	for i := range 450 {
		e := registrationtest.Symmetric(d.OwnKey, nil)
		e.InitialTwin = &dps.InitialTwin{Tags: json.RawMessage(fmt.Sprintf(`{"n":%d,"site":"s%d"}`, i, i%3))}
		d.Put(t, registration.Individual, fmt.Sprintf("q-%03d", i), e)
	}
	find := func(path, query, size string) (ids []string, pages int) {
		t.Helper()
		next := ""
		for {
			header := []string{"X-Ms-Max-Item-Count: " + size}
			if next != "" {
				header = append(header, "X-Ms-Continuation: "+next)
			}
			res, b := o.call(t, "POST", path, `{"query":`+quote(query)+`}`, header...)
			var rows []struct{ RegistrationID, EnrollmentGroupID string }
			if err := json.Unmarshal(b, &rows); err != nil {
				t.Fatalf("%s: %s", query, b)
			}
			for _, r := range rows {
				ids = append(ids, r.RegistrationID+r.EnrollmentGroupID)
			}
			pages++
			if next = res.Header.Get("X-Ms-Continuation"); next == "" {
				return ids, pages
			}
		}
	}
	if ids, _ := find("/enrollments/query", "SELECT * FROM enrollments WHERE tags.site = 's1' AND tags.n < 9", "2"); !slices.Equal(ids, []string{"q-001", "q-004", "q-007"}) {
		t.Errorf("%v", ids)
	}
	if ids, pages := find("/enrollments/query", "SELECT * WHERE tags.site = 's2'", "50"); len(ids) != 150 || pages != 3 {
		t.Errorf("%d in %d pages", len(ids), pages)
	}
	if ids, _ := find("/enrollments/query", "SELECT * FROM enrollments WHERE registrationId = 'Q-449'", "50"); !slices.Equal(ids, []string{"q-449"}) {
		t.Errorf("%v", ids)
	}
	if ids, _ := find("/enrollments/query", "", "1000"); len(ids) != 452 {
		t.Errorf("%d of all", len(ids))
	}
	if ids, _ := find("/enrollmentGroups/query", "SELECT * FROM enrollmentGroups WHERE attestation.type = 'x509'", "50"); !slices.Equal(ids, []string{"line"}) {
		t.Errorf("%v", ids)
	}
	d.register(t, d.Derived("dev-1"))
	d.register(t, d.Derived("dev-2"))
	if ids, _ := find("/registrations/keys/query", "SELECT * FROM deviceRegistrations WHERE status = 'assigned' AND deviceId != 'dev-2'", "50"); !slices.Equal(ids, []string{"dev-1"}) {
		t.Errorf("%v", ids)
	}
	for _, q := range []string{"SELECT registrationId FROM enrollments", "SELECT * FROM bogus", "SELECT * FROM enrollmentGroups", "SELECT * WHERE", "x"} {
		o.want(t, 400, dps.CodeInvalidArgument, "POST", "/enrollments/query", `{"query":`+quote(q)+`}`)
	}
	// Another query's continuation is refused.
	res, _ := o.call(t, "POST", "/enrollments/query", `{"query":"SELECT *"}`, "X-Ms-Max-Item-Count: 1")
	o.want(t, 400, dps.CodeInvalidArgument, "POST", "/enrollments/query", `{"query":"SELECT * WHERE tags.n = 1"}`, "X-Ms-Continuation: "+res.Header.Get("X-Ms-Continuation"))
}

// Every change is in the audit record, with who made it and what it was made of: each begins with what the one before ended
// with. Denied attempts are not, and reading is not, but for keys.
func TestAudit(t *testing.T) {
	d, o := newOperator(t)
	count := func() (all []registration.Audit) {
		t.Helper()
		_, b := o.call(t, "GET", "/touchmark/audit", "", "X-Ms-Max-Item-Count: 1000")
		if err := json.Unmarshal(b, &all); err != nil {
			t.Fatal(err)
		}
		return all
	}
	d.Advance(time.Minute)
	began := len(count())
	do := func(want, method, path, body string, header ...string) {
		t.Helper()
		d.Advance(time.Millisecond)
		before := count()
		res, b := o.call(t, method, path, body, header...)
		after := count()[len(before):]
		if want == "" {
			if len(after) != 0 {
				t.Errorf("%s %s: %+v", method, path, after)
			}
			return
		}
		if res.StatusCode/100 != 2 || len(after) != 1 {
			t.Fatalf("%s %s: %d %s, %d entries", method, path, res.StatusCode, b, len(after))
		}
		if a := after[0]; a.Action+" "+a.Object != want || a.Actor != "policy owner" || a.RequestID != res.Header.Get("X-Ms-Request-Id") || !strings.HasPrefix(a.Remote, "127.0.0.1:") || !a.At.Equal(d.Now()) {
			t.Errorf("%s %s: %+v", method, path, a)
		}
	}
	do("create enrollment/a", "PUT", "/enrollments/a", ofDevice("a", newKeys))
	do("", "PUT", "/enrollments/a", ofDevice("a", newKeys))
	do("", "PUT", "/enrollments/a", ofDevice("a", newKeys), "If-Match: x")
	do("update enrollment/A", "PUT", "/enrollments/a", ofDevice("A", newKeys), "If-Match: *")
	do("", "GET", "/enrollments/a", "")
	do("", "POST", "/enrollments/query", "")
	do("show keys enrollment/A", "POST", "/enrollments/a/attestationmechanism", "")
	do("", "POST", "/enrollments/own-cert/attestationmechanism", "")
	d.register(t, d.ByKey("own-key", d.OwnKey))
	do("delete registration/own-key", "DELETE", "/registrations/own-key", "")
	do("delete enrollment/A", "DELETE", "/enrollments/a", "")
	do("", "DELETE", "/enrollments/a", "")
	do("create enrollmentGroup/g", "PUT", "/enrollmentGroups/g", ofGroup("g", newKeys))
	do("close enrollmentGroup/g", "PUT", "/touchmark/groups/G", `{"closed":true}`)
	do("", "PUT", "/touchmark/groups/G", `{"closed":true}`)
	do("open enrollmentGroup/g", "PUT", "/touchmark/groups/G", `{"closed":false}`)
	do("seal key enrollmentGroup/g", "POST", "/touchmark/groupKeys/g", `{"recipient":"age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kg5sfn9aqmcac8p"}`)
	do("create enrollment/bulk", "POST", "/enrollments", `{"mode":"create","enrollments":[`+ofDevice("bulk", newKeys)+`]}`)
	do("create policy/p", "PUT", "/touchmark/policies/p", `{"rights":"EnrollmentRead"}`)
	do("update policy/p", "PUT", "/touchmark/policies/p", `{"primaryKey":null}`)
	do("show keys policy/p", "PUT", "/touchmark/policies/P", `{"rights":"EnrollmentRead"}`) // which its answer does
	do("show keys policy/p", "PUT", "/touchmark/policies/p", `{}`)
	do("show keys policy/p", "GET", "/touchmark/policies/p", "")
	do("", "GET", "/touchmark/policies", "")
	do("delete policy/p", "DELETE", "/touchmark/policies/p", "")
	o2 := *o
	o2.token = attesttest.ServiceToken([]byte("wrong"), registrationtest.Host, "owner", d.Now().Add(time.Hour))
	o2.want(t, 401, dps.CodeUnauthorized, "DELETE", "/enrollments/own-key", "")

	last := map[string]string{}
	all := count()
	for i, a := range all[began:] {
		object := strings.ToLower(a.Object)
		if was, ok := last[object]; ok && was != a.Before {
			t.Errorf("%s %s begins with another content than it had", a.Action, a.Object)
		}
		last[object] = a.After
		if (a.Before == "") != (a.Action == "create") || (a.After == "") != (a.Action == "delete") || strings.HasPrefix(a.Action, "show") != (a.Before == a.After && a.Action != "seal key") {
			t.Errorf("%+v", a)
		}
		if n := began + i; n > 0 && a.ID <= all[n-1].ID {
			t.Errorf("entry %d is not after the one before", n)
		}
	}
	// Pages, and from a time on.
	var paged []registration.Audit
	for next := ""; ; {
		header := []string{"X-Ms-Max-Item-Count: 7"}
		if next != "" {
			header = append(header, "X-Ms-Continuation: "+next)
		}
		res, b := o.call(t, "GET", "/touchmark/audit", "", header...)
		var rows []registration.Audit
		if err := json.Unmarshal(b, &rows); err != nil || res.Header.Get("X-Ms-Item-Type") != "Audit" {
			t.Fatalf("%s: %v", b, err)
		}
		paged = append(paged, rows...)
		if next = res.Header.Get("X-Ms-Continuation"); next == "" {
			break
		}
	}
	if !slices.Equal(paged, all) {
		t.Errorf("%d entries by pages, %d in one", len(paged), len(all))
	}
	_, b := o.call(t, "GET", "/touchmark/audit?since="+url.QueryEscape(all[began].At.Format(time.RFC3339Nano)), "")
	if n := strings.Count(string(b), `"id":`); n != len(all)-began {
		t.Errorf("%d entries since then, not %d", n, len(all)-began)
	}
	o.want(t, 400, dps.CodeInvalidArgument, "GET", "/touchmark/audit?since=yesterday", "")
}

// DPS-S 57: policies and their keys, by touchmark's own calls.
func TestPolicies(t *testing.T) {
	d, o := newOperator(t)
	key := func(doc map[string]any, slot string) []byte {
		k, err := base64.StdEncoding.DecodeString(fmt.Sprint(doc[slot]))
		if err != nil || len(k) == 0 {
			t.Fatalf("%v", doc)
		}
		return k
	}
	try := func(k []byte) int {
		res, _ := d.operator(t, k, "line-3").call(t, "GET", "/enrollments/own-key", "")
		return res.StatusCode
	}
	p := o.want(t, 200, 0, "PUT", "/touchmark/policies/line-3", `{"rights":"registrationstatusread,EnrollmentRead"}`)
	first, second := key(p, "primaryKey"), key(p, "secondaryKey")
	if p["rights"] != "EnrollmentRead, RegistrationStatusRead" || len(first) != 64 || string(first) == string(second) || try(first) != 200 || try(second) != 200 {
		t.Errorf("%v", p)
	}
	rolled := o.want(t, 200, 0, "PUT", "/touchmark/policies/line-3", `{"primaryKey":null}`)
	if try(first) != 401 || try(second) != 200 || try(key(rolled, "primaryKey")) != 200 || rolled["rights"] != p["rights"] {
		t.Errorf("the primary key rolled: %v", rolled)
	}
	rolled = o.want(t, 200, 0, "PUT", "/touchmark/policies/line-3", `{"secondaryKey":""}`)
	if try(second) != 401 || try(key(rolled, "secondaryKey")) != 200 {
		t.Errorf("the secondary key rolled: %v", rolled)
	}
	// Its name is the same in any case, and stays as it was first written.
	if same := o.want(t, 200, 0, "PUT", "/touchmark/policies/LINE-3", "{}"); !maps.Equal(same, rolled) {
		t.Errorf("%v, not %v", same, rolled)
	}
	if shown := o.want(t, 200, 0, "GET", "/touchmark/policies/Line-3", ""); !maps.Equal(shown, rolled) {
		t.Errorf("%v, not %v", shown, rolled)
	}
	if _, b := o.call(t, "GET", "/touchmark/policies", ""); !strings.Contains(string(b), `{"name":"line-3","rights":"EnrollmentRead, RegistrationStatusRead"}`) || strings.Contains(string(b), "Key") {
		t.Errorf("%s", b)
	}
	for name, body := range map[string]string{
		"no rights": `{}`, "unknown right": `{"rights":"Everything"}`, "management": `{"rights":"ManagementWrite"}`, "short key": `{"rights":"EnrollmentRead","primaryKey":"AAAA"}`,
		"no base64": `{"rights":"EnrollmentRead","primaryKey":"~"}`, "a number": `{"rights":"EnrollmentRead","primaryKey":5}`, "no JSON": `{`, "empty rights": `{"rights":""}`,
	} {
		if doc := o.want(t, 400, dps.CodeInvalidArgument, "PUT", "/touchmark/policies/new", body); strings.Contains(fmt.Sprint(doc), "AAAA") {
			t.Errorf("%s: %v", name, doc)
		}
	}
	for _, name := range []string{"a%20b", strings.Repeat("a", 65), "a%2Fb"} {
		o.want(t, 400, dps.CodeInvalidArgument, "PUT", "/touchmark/policies/"+name, `{"rights":"EnrollmentRead"}`)
	}
	o.want(t, 204, 0, "DELETE", "/touchmark/policies/line-3", "")
	o.want(t, 404, dps.CodeNotFound, "DELETE", "/touchmark/policies/line-3", "")
	o.want(t, 404, dps.CodeNotFound, "GET", "/touchmark/policies/line-3", "")
	if got := try(key(rolled, "secondaryKey")); got != 401 {
		t.Errorf("a policy that is gone: %d", got)
	}
	for i := range 99 {
		o.want(t, 200, 0, "PUT", fmt.Sprint("/touchmark/policies/p", i), `{"rights":"EnrollmentRead"}`)
	}
	o.want(t, 400, dps.CodeInvalidArgument, "PUT", "/touchmark/policies/one-more", `{"rights":"EnrollmentRead"}`)
	o.want(t, 200, 0, "PUT", "/touchmark/policies/p5", `{"rights":"EnrollmentWrite"}`)
}
