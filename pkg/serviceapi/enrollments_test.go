package serviceapi_test

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/url"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

const newKeys = `"attestation":{"type":"symmetricKey","symmetricKey":{"primaryKey":null}}`

func ofDevice(id, rest string) string { return `{"registrationId":"` + id + `",` + rest + `}` }

// DPS-S 1 to 4, 6 to 10.
func TestServiceTransport(t *testing.T) {
	_, o := newOperator(t)
	res, b := o.do(t, "GET", "/enrollments/own-key", "", "Authorization: "+o.token)
	if res.StatusCode != 400 || !strings.Contains(string(b), `"errorCode":400000`) {
		t.Errorf("no api-version: %d %s", res.StatusCode, b)
	}
	ids := map[string]bool{}
	for _, v := range []string{"2019-03-31", "2021-06-01", "2021-10-01"} {
		for _, path := range []string{"/enrollments/own-key", "/ENROLLMENTS/own-key", "/enrollmentgroups/keys", "/EnrollmentGroups/keys"} {
			res, b := o.do(t, "GET", path+"?api-version="+v, "", "Authorization: "+o.token, "X-What: ever")
			id := res.Header.Get("X-Ms-Request-Id")
			if res.StatusCode != 200 || ids[id] {
				t.Errorf("%s with %s: %d %s, request ID %s", path, v, res.StatusCode, b, id)
			}
			ids[id] = true
		}
	}
	for _, path := range []string{"/enrollments/own-key/attestationmechanism", "/enrollmentgroups/keys/AttestationMechanism"} {
		for _, body := range []string{"", "{}"} {
			o.want(t, 200, 0, "POST", path, body)
		}
	}
	o.want(t, 400, dps.CodeInvalidArgument, "PUT", "/enrollments/x", "{not JSON")
	o.want(t, 405, dps.CodeMethodNotAllowed, "PATCH", "/enrollments/own-key", "")
	o.want(t, 404, dps.CodeNotFound, "GET", "/enrollments/own-key/what/is/this", "")
	o.want(t, 413, dps.CodeTooLarge, "PUT", "/enrollments/x", `{"a":"`+strings.Repeat("x", 1<<20)+`"}`)
}

// DPS-S 11 to 25, 28.
func TestServiceWrites(t *testing.T) {
	d, o := newOperator(t)
	made := o.want(t, 200, 0, "PUT", "/enrollments/dev-1", ofDevice("dev-1", newKeys+`,"unknown":{"member":1}`))
	tag, _ := made["etag"].(string)
	if tag == "" || made["createdDateTimeUtc"] != made["lastUpdatedDateTimeUtc"] || made["registrationState"] != nil {
		t.Errorf("created: %v", made)
	}
	if when, _ := made["createdDateTimeUtc"].(string); !regexp.MustCompile(`^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,7})?Z$`).MatchString(when) {
		t.Errorf("created at %s", when)
	}
	o.want(t, 409, dps.CodeEnrollmentExists, "PUT", "/enrollments/DEV-1", ofDevice("DEV-1", newKeys))
	o.want(t, 409, dps.CodeGroupExists, "PUT", "/enrollmentGroups/keys", `{"enrollmentGroupId":"keys",`+newKeys+`}`)
	d.Advance(time.Second)
	next := o.want(t, 200, 0, "PUT", "/enrollments/dev-1", ofDevice("dev-1", newKeys), "If-Match: *")
	if next["etag"] == tag || next["createdDateTimeUtc"] != made["createdDateTimeUtc"] || next["lastUpdatedDateTimeUtc"] == made["lastUpdatedDateTimeUtc"] {
		t.Errorf("replaced: %v", next)
	}
	o.want(t, 412, dps.CodeETagMismatch, "PUT", "/enrollments/dev-1", ofDevice("dev-1", newKeys+`,"deviceId":"other"`), "If-Match: "+tag)
	for _, form := range []string{"%s", `"%s"`} {
		next = o.want(t, 200, 0, "PUT", "/enrollments/dev-1", ofDevice("dev-1", newKeys), "If-Match: "+fmt.Sprintf(form, next["etag"]))
	}
	got := o.want(t, 200, 0, "GET", "/enrollments/DEV-1", "")
	if state, _ := got["registrationState"].(map[string]any); state["status"] != "unassigned" || got["deviceId"] != nil || got["reprovisionPolicy"] != nil {
		t.Errorf("got: %v", got)
	}
	// What GET answered may be PUT back as it is: DPS-S 23.
	echo, _ := json.Marshal(got)
	o.want(t, 200, 0, "PUT", "/enrollments/dev-1", string(echo), "If-Match: *")
	o.want(t, 404, dps.CodeNoEnrollment, "PUT", "/enrollments/nobody", ofDevice("nobody", newKeys), "If-Match: *")
	for id, body := range map[string]string{
		"dev-2": ofDevice("dev-3", newKeys), strings.Repeat("a", 129): ofDevice(strings.Repeat("a", 129), newKeys), "a%20b": ofDevice("a b", newKeys), "a.": ofDevice("a.", newKeys),
	} {
		o.want(t, 400, dps.CodeInvalidArgument, "PUT", "/enrollments/"+id, body)
	}
	o.want(t, 412, dps.CodeETagMismatch, "DELETE", "/enrollments/dev-1", "", "If-Match: "+tag)
	if res, b := o.call(t, "DELETE", "/enrollments/dev-1", ""); res.StatusCode != 204 || len(b) != 0 {
		t.Errorf("deleted: %d %s", res.StatusCode, b)
	}
	o.want(t, 404, dps.CodeNoEnrollment, "DELETE", "/enrollments/dev-1", "")
	o.want(t, 404, dps.CodeNoEnrollment, "GET", "/enrollments/dev-1", "")
	o.want(t, 404, dps.CodeNoGroup, "GET", "/enrollmentGroups/nobody", "")
	for _, rest := range []string{`"iotHubs":["h.example.net"],` + newKeys, `"allocationPolicy":"static","iotHubs":["a","b"],` + newKeys, `"attestation":{"type":"none"}`, `"a":1`} {
		o.want(t, 400, dps.CodeInvalidArgument, "PUT", "/enrollments/x", ofDevice("x", rest))
	}
	// DPS-S 27: the twin comes back as it went in.
	twin := `{"tags":{"version":1,"count":[1,{"a":null}]},"properties":{"desired":{"version":"x","n":1.50,"big":123456789012345678901}}}`
	o.want(t, 200, 0, "PUT", "/enrollments/t", ofDevice("t", newKeys+`,"initialTwin":`+twin))
	if _, b := o.call(t, "GET", "/enrollments/t", ""); !strings.Contains(string(b), `"desired":{"version":"x","n":1.50,"big":123456789012345678901}`) {
		t.Errorf("twin: %s", b)
	}
}

// DPS-S 29 to 32.
func TestServiceKeys(t *testing.T) {
	_, o := newOperator(t)
	for _, x := range []struct{ path, id string }{{"/enrollments/k", "registrationId"}, {"/enrollmentGroups/k", "enrollmentGroupId"}} {
		made := o.want(t, 200, 0, "PUT", x.path, `{"`+x.id+`":"k",`+newKeys+`}`)
		keys := made["attestation"].(map[string]any)["symmetricKey"].(map[string]any)
		first, _ := base64.StdEncoding.DecodeString(keys["primaryKey"].(string))
		second, _ := base64.StdEncoding.DecodeString(keys["secondaryKey"].(string))
		if len(first) != 64 || len(second) != 64 || string(first) == string(second) {
			t.Errorf("keys made: %v", keys)
		}
		got := o.want(t, 200, 0, "GET", x.path, "")["attestation"].(map[string]any)
		if got["type"] != "symmetricKey" || len(got) != 1 {
			t.Errorf("attestation shown: %v", got)
		}
		if _, b := o.call(t, "POST", strings.TrimSuffix(x.path, "/k")+"/query", `{"query":"SELECT *"}`); strings.Contains(string(b), "Key\":\"") {
			t.Errorf("a query shows keys: %s", b)
		}
		mechanism := o.want(t, 200, 0, "POST", x.path+"/attestationmechanism", "")
		if m := mechanism["symmetricKey"].(map[string]any); m["primaryKey"] != keys["primaryKey"] || m["secondaryKey"] != keys["secondaryKey"] {
			t.Errorf("mechanism: %v", mechanism)
		}
	}
	for size, ok := range map[int]bool{15: false, 16: true, 64: true, 65: false} {
		body := ofDevice("s", `"attestation":{"type":"symmetricKey","symmetricKey":{"primaryKey":"`+base64.StdEncoding.EncodeToString(make([]byte, size))+`"}}`)
		if res, b := o.call(t, "PUT", fmt.Sprintf("/enrollments/s%d", size), strings.Replace(body, `"s"`, fmt.Sprintf(`"s%d"`, size), 1)); (res.StatusCode == 200) != ok {
			t.Errorf("a key of %d octets: %d %s", size, res.StatusCode, b)
		}
	}
	o.want(t, 400, dps.CodeInvalidArgument, "PUT", "/enrollments/s", ofDevice("s", `"attestation":{"type":"symmetricKey","symmetricKey":{"primaryKey":"~~~"}}`))
}

// DPS-S 33 to 38.
func TestServiceCertificates(t *testing.T) {
	d, o := newOperator(t)
	leaf := attesttest.Leaf(t, d.Root, "c")
	asPEM, _ := json.Marshal(string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: leaf.Certificate.Raw})))
	x509 := func(certs string) string {
		return ofDevice("c", `"attestation":{"type":"x509","x509":{"clientCertificates":`+certs+`}}`)
	}
	info := func(doc map[string]any, slot string) map[string]any {
		certs := doc["attestation"].(map[string]any)["x509"].(map[string]any)["clientCertificates"].(map[string]any)
		s, _ := certs[slot].(map[string]any)
		if s["certificate"] != nil {
			t.Errorf("an answer has a certificate: %v", certs)
		}
		m, _ := s["info"].(map[string]any)
		return m
	}
	first := o.want(t, 200, 0, "PUT", "/enrollments/c", x509(`{"primary":{"certificate":`+string(asPEM)+`}}`))
	again := o.want(t, 200, 0, "PUT", "/enrollments/c", x509(`{"primary":{"certificate":"`+leaf.Base64()+`"}}`), "If-Match: *")
	a, b := info(first, "primary"), info(again, "primary")
	sum := sha256.Sum256(leaf.Certificate.Raw)
	if fmt.Sprint(a) != fmt.Sprint(b) || fmt.Sprint(a) != fmt.Sprint(info(first, "secondary")) || len(a) != 8 || !strings.EqualFold(a["sha256Thumbprint"].(string), fmt.Sprintf("%x", sum)) {
		t.Errorf("info: %v\n%v", a, b)
	}
	got := o.want(t, 200, 0, "GET", "/enrollments/c", "")
	echo, _ := json.Marshal(got)
	o.want(t, 200, 0, "PUT", "/enrollments/c", string(echo), "If-Match: *")
	if s := d.register(t, registrationtest.ByCertificate("c", leaf.TLS())); !strings.Contains(s, `"status":"assigned"`) {
		t.Errorf("after what GET answered was PUT back: %s", s)
	}
	secondary, _ := json.Marshal(info(got, "secondary"))
	only := o.want(t, 200, 0, "PUT", "/enrollments/c", x509(`{"primary":null,"secondary":{"info":`+string(secondary)+`}}`), "If-Match: *")
	if info(only, "primary") != nil || info(only, "secondary") == nil {
		t.Errorf("without its primary: %v", only)
	}
	for why, body := range map[string]string{
		"nothing":        x509(`{}`),
		"not a cert":     x509(`{"primary":{"certificate":"AAAA"}}`),
		"other info":     x509(`{"primary":{"info":{"sha256Thumbprint":"00"}}}`),
		"two members":    ofDevice("c", `"attestation":{"type":"x509","x509":{"clientCertificates":{"primary":{"certificate":"`+leaf.Base64()+`"}},"signingCertificates":{"primary":{"certificate":"`+leaf.Base64()+`"}}}}`),
		"a group's":      ofDevice("c", `"attestation":{"type":"x509","x509":{"signingCertificates":{"primary":{"certificate":"`+leaf.Base64()+`"}}}}`),
		"another's leaf": ofDevice("c", `"attestation":{"type":"x509","x509":{"clientCertificates":{"primary":{"certificate":"`+d.Own.Base64()+`"}}}}`),
	} {
		res, b := o.call(t, "PUT", "/enrollments/c", body, "If-Match: *")
		if res.StatusCode != 400 {
			t.Errorf("%s: %d %s", why, res.StatusCode, b)
		}
	}
	o.want(t, 400, dps.CodeInvalidArgument, "PUT", "/enrollmentGroups/tpm", `{"enrollmentGroupId":"tpm","attestation":{"type":"tpm","tpm":{"endorsementKey":"AAAA"}}}`)
}

// DPS-S 41 to 49.
func TestServiceQueries(t *testing.T) {
	d, o := newOperator(t)
	for i := range 150 {
		d.Put(t, registration.Individual, fmt.Sprintf("q-%03d", i), registrationtest.Symmetric(d.OwnKey, nil))
	}
	pages := func(path, size string) (sizes []int, seen map[string]bool) {
		seen = map[string]bool{}
		next := ""
		for {
			header := []string{"X-What: ever"}
			if size != "" {
				header = append(header, "x-ms-max-item-count: "+size)
			}
			if next != "" {
				header = append(header, "x-ms-continuation: "+next)
			}
			res, b := o.call(t, "POST", path, `{"query":"SELECT * FROM enrollments"}`, header...)
			var rows []map[string]any
			if err := json.Unmarshal(b, &rows); err != nil {
				t.Fatalf("%d %s", res.StatusCode, b)
			}
			for _, r := range rows {
				if r["registrationState"] != nil { // DPS-S 25
					t.Errorf("a row has a registrationState: %v", r)
				}
				id := fmt.Sprint(r["registrationId"], r["enrollmentGroupId"])
				if seen[id] {
					t.Errorf("%s came twice", id)
				}
				seen[id] = true
			}
			sizes = append(sizes, len(rows))
			// Paging goes on while records come and go: DPS-S 47.
			if path == "/enrollments/query" && len(sizes) == 1 && size == "50" {
				d.Put(t, registration.Individual, "a-new-one", registrationtest.Symmetric(d.OwnKey, nil))
				o.want(t, 204, 0, "DELETE", "/enrollments/own-cert", "")
			}
			if _, ok := res.Header["X-Ms-Continuation"]; !ok {
				return sizes, seen
			}
			if next = res.Header.Get("X-Ms-Continuation"); next == "" {
				t.Fatal("an empty continuation header")
			}
		}
	}
	sizes, seen := pages("/enrollments/query", "50")
	if fmt.Sprint(sizes) != "[50 50 50 2]" || len(seen) != 152 {
		t.Errorf("pages of 50: %v, %d records", sizes, len(seen))
	}
	if sizes, _ = pages("/enrollments/query", ""); fmt.Sprint(sizes) != "[100 52]" {
		t.Errorf("pages of no size: %v", sizes)
	}
	for _, query := range []string{`{"query":"SELECT *"}`, `{"query":"select * from enrollments"}`, `{"query":""}`, `{"query":"SELECT * FROM bogus"}`} {
		res, b := o.call(t, "POST", "/enrollments/query", query, "x-ms-max-item-count: 1000")
		if res.Header.Get("X-Ms-Item-Type") != "Enrollment" || strings.Count(string(b), `"registrationId":`) != 152 {
			t.Errorf("%s: %s, %d records", query, res.Header.Get("X-Ms-Item-Type"), strings.Count(string(b), `"registrationId":`))
		}
	}
	if res, b := o.call(t, "POST", "/enrollmentgroups/query", `{}`); res.Header.Get("X-Ms-Item-Type") != "EnrollmentGroup" || strings.Count(string(b), "enrollmentGroupId") != 2 {
		t.Errorf("groups: %v %s", res.Header, b)
	}
	res, b := o.call(t, "POST", "/registrations/keys/query", "")
	if res.Header.Get("X-Ms-Item-Type") != "DeviceRegistration" || string(b) != "[]" {
		t.Errorf("no registrations: %s", b)
	}
	for _, id := range []string{"dev-1", "dev-2"} {
		d.register(t, d.Derived(id))
	}
	c := attesttest.Leaf(t, d.Root, "dev-3")
	d.register(t, registrationtest.ByCertificate("dev-3", c.TLS()))
	if _, b := o.call(t, "POST", "/registrations/keys/query", ""); strings.Count(string(b), `"deviceId"`) != 2 || strings.Contains(string(b), "dev-3") {
		t.Errorf("registrations of a group: %s", b)
	}
	// Our own lists have those of individual enrollments too, and those of a group that is not there any more.
	own := func(path string, header ...string) (ids, next string) {
		res, b := o.call(t, "GET", path, "", header...)
		var rows []struct{ RegistrationID, EnrollmentGroupID string }
		if err := json.Unmarshal(b, &rows); err != nil || res.StatusCode != 200 || res.Header.Get("X-Ms-Item-Type") != "DeviceRegistration" {
			t.Fatalf("%s: %d %s", path, res.StatusCode, b)
		}
		for _, r := range rows {
			ids += r.RegistrationID + "<" + r.EnrollmentGroupID + " "
		}
		return ids, res.Header.Get("X-Ms-Continuation")
	}
	d.register(t, d.ByKey("own-key", d.OwnKey))
	o.want(t, 204, 0, "DELETE", "/enrollmentGroups/keys", "")
	o.want(t, 404, dps.CodeNoGroup, "POST", "/registrations/keys/query", "") // as Azure has it
	if ids, next := own("/touchmark/groups/KEYS/registrations"); ids != "dev-1<keys dev-2<keys " || next != "" {
		t.Errorf("registrations of a group that was deleted: %s %s", ids, next)
	}
	o.want(t, 404, dps.CodeNoGroup, "GET", "/touchmark/groups/no-such/registrations", "")
	ids, next := own("/touchmark/registrations", "x-ms-max-item-count: 2")
	if ids != "dev-1<keys dev-2<keys " || next == "" {
		t.Errorf("the first registrations: %s", ids)
	}
	o.want(t, 400, dps.CodeInvalidArgument, "GET", "/touchmark/groups/keys/registrations", "", "x-ms-continuation: "+next)
	if ids, next = own("/touchmark/registrations", "x-ms-continuation: "+next); ids != "dev-3<line own-key< " || next != "" {
		t.Errorf("the last registrations: %s %s", ids, next)
	}
	o.want(t, 400, dps.CodeInvalidArgument, "POST", "/enrollments/query", "{}", "x-ms-continuation: bm8=")
	o.want(t, 400, dps.CodeInvalidArgument, "POST", "/enrollments/query", "{}", "x-ms-max-item-count: -1")
	o.want(t, 200, 0, "GET", "/registrations/dev-3", "")
	o.want(t, 204, 0, "DELETE", "/registrations/dev-3", "")
	o.want(t, 404, dps.CodeNoGroup, "GET", "/registrations/dev-3", "")
}

// DPS-S 55 to 63.
func TestServiceAuthorization(t *testing.T) {
	d, o := newOperator(t)
	status := func(token string) int {
		x := *o
		x.token = token
		res, b := x.call(t, "GET", "/enrollments/own-key", "")
		if res.StatusCode == 401 && (!strings.Contains(string(b), `"errorCode":401002`) || !strings.Contains(string(b), `"message":"Unauthorized"`)) {
			t.Errorf("a refusal tells more: %s", b)
		}
		return res.StatusCode
	}
	hour := d.Now().Add(time.Hour)
	sign := func(resource string) string { return attesttest.ServiceToken(ownerKey, resource, "owner", hour) }
	good := sign(registrationtest.Host)
	for name, x := range map[string]struct {
		token string
		want  int
	}{
		"good":                 {good, 200},
		"second key":           {attesttest.ServiceToken(secondKey, registrationtest.Host, "owner", hour), 200},
		"upper case":           {sign(strings.ToUpper(registrationtest.Host)), 200},
		"with a path":          {sign(registrationtest.Host + "/enrollments"), 200},
		"with another path":    {sign(registrationtest.Host + "/enrollmentGroups"), 401},
		"half a segment":       {sign(registrationtest.Host + "/enroll"), 401},
		"another host":         {sign("dps.example.org"), 401},
		"begins like ours":     {sign(registrationtest.Host + ".evil.example"), 401},
		"no such policy":       {attesttest.ServiceToken(ownerKey, registrationtest.Host, "nobody", hour), 401},
		"another key":          {attesttest.ServiceToken([]byte("x"), registrationtest.Host, "owner", hour), 401},
		"changed expiry":       {strings.Replace(good, fmt.Sprint(hour.Unix()), fmt.Sprint(hour.Unix()+1), 1), 401},
		"expired":              {attesttest.ServiceToken(ownerKey, registrationtest.Host, "owner", d.Now().Add(-time.Hour)), 401},
		"just expired":         {attesttest.ServiceToken(ownerKey, registrationtest.Host, "owner", d.Now().Add(-time.Minute)), 200},
		"a device's":           {d.Derived("dev-1").Token, 401},
		"none":                 {"", 401},
		"another scheme":       {"Bearer x", 401},
		"fields in order":      {reorder(good), 200},
		"with unknown fields":  {good + "&x=y", 200},
		"the owner of nothing": {strings.Replace(good, "skn=owner", "skn=", 1), 401},
	} {
		if got := status(x.token); got != x.want {
			t.Errorf("%s: %d, want %d", name, got, x.want)
		}
	}
	// DPS-S 57: keys roll.
	d.Policy(t, "owner", ownerRights, secondKey, []byte(strings.Repeat("q", 64)))
	if got := status(good); got != 401 {
		t.Errorf("a key that was rolled away: %d", got)
	}
	d.Policy(t, "owner", ownerRights, ownerKey, secondKey)

	// DPS-S 60 to 62: what each right is good for.
	calls := []struct{ method, path, body string }{
		{"GET", "/enrollments/own-key", ""}, {"POST", "/enrollmentGroups/query", "{}"}, {"PUT", "/enrollments/own-key", ofDevice("own-key", newKeys)},
		{"DELETE", "/enrollments/nobody", ""}, {"POST", "/enrollments/own-key/attestationmechanism", ""}, {"GET", "/registrations/nobody", ""},
		{"POST", "/registrations/keys/query", ""}, {"DELETE", "/registrations/nobody", ""}, {"POST", "/touchmark/groupKeys/keys", "{}"},
	}
	for rights, want := range map[string]string{
		ownerRights: "+++++++++", "EnrollmentRead": "++-------", "RegistrationStatusRead": "-----++--", "RegistrationStatusWrite": "-------+-", "ServiceConfig, DeviceConnect": "---------",
	} {
		d.Policy(t, "p", rights, ownerKey, secondKey)
		x := d.operator(t, ownerKey, "p")
		got := ""
		for _, c := range calls {
			if res, _ := x.call(t, c.method, c.path, c.body); res.StatusCode == 401 {
				got += "-"
			} else {
				got += "+"
			}
		}
		if got != want {
			t.Errorf("%s: %s, want %s", rights, got, want)
		}
	}
}

// reorder turns a token's fields round.
func reorder(token string) string {
	fields := strings.Split(strings.TrimPrefix(token, "SharedAccessSignature "), "&")
	for i := range len(fields) / 2 {
		fields[i], fields[len(fields)-1-i] = fields[len(fields)-1-i], fields[i]
	}
	return "SharedAccessSignature " + strings.Join(fields, "&")
}

// Service API, section 2.2: the vector, and a host that is signed raw, encoded, and lower-cased.
func TestServiceTokenForms(t *testing.T) {
	for _, resource := range []string{registrationtest.Host, url.QueryEscape(registrationtest.Host + "/"), strings.ToLower(url.QueryEscape(registrationtest.Host + "/"))} {
		d, o := newOperator(t)
		o.token = attesttest.SignToken(ownerKey, resource, "owner", d.Now().Add(time.Hour))
		o.want(t, 200, 0, "GET", "/enrollments/own-key", "")
	}
}

// Orders, as they are shown; who may see them; and groups that are closed and opened.
func TestOrders(t *testing.T) {
	d, o := newOperator(t)
	scope := strings.ToLower(registrationtest.Scope)
	if err := d.Store.Update(t.Context(), func(tx registration.Tx) error {
		errs := []error{
			tx.PutGrant(scope, &registration.Grant{ID: "PO-1", Order: "PO-1", Station: "st", Quantity: 9, Digest: "d", Document: []byte("{the order}")}),
			tx.PutGrant(scope, &registration.Grant{ID: "PO-1/a", Order: "PO-1", Station: "su", Quantity: 3, Digest: "e", Document: []byte("{the lease}")}),
			tx.PutGrant(scope, &registration.Grant{ID: "PO-2.", Order: "PO-2.", Quantity: 1, Digest: "f", Document: []byte("x")}),
			tx.AddToGrant(scope, "PO-1", registration.Tally{Used: 3, Imported: 3, Seen: 1, Refused: 1}),
		}
		for i := range 3 {
			errs = append(errs, tx.PutDevice(scope, &registration.Device{ID: fmt.Sprint("dev-", i), Serial: fmt.Sprint("S", i), Grant: "PO-1/a", Seen: i == 0}))
		}
		_, err := tx.PutRefusal(scope, &registration.Refusal{Order: "PO-1", ID: "dev-9", Serial: "S9", Station: "st", Reason: "spent", At: attesttest.Now})
		return errors.Join(append(errs, err)...)
	}); err != nil {
		t.Fatal(err)
	}
	one := o.want(t, 200, 0, "GET", "/touchmark/orders/PO-1", "")
	leases, _ := one["leases"].([]any)
	if one["id"] != "PO-1" || one["quantity"] != 9.0 || one["imported"] != 3.0 || one["seen"] != 1.0 || one["refused"] != 1.0 || one["document"] != "{the order}" || len(leases) != 1 {
		t.Errorf("%v", one)
	}
	if l := o.want(t, 200, 0, "GET", "/touchmark/orders/PO-1%2Fa", ""); l["id"] != "PO-1/a" || l["order"] != "PO-1" || l["document"] != "{the lease}" {
		t.Errorf("%v", l)
	}
	for path, want := range map[string][]string{
		"/touchmark/orders":               {`"id":"PO-1"`, `"id":"PO-2."`},
		"/touchmark/orders/PO-1/devices":  {`"serial":"S0","revision":0,"grant":"PO-1/a","state":"seen"`, `"serial":"S1","revision":0,"grant":"PO-1/a","state":"imported"`, `"serial":"S2"`},
		"/touchmark/orders/PO-1/unseen":   {`"serial":"S1"`, `"serial":"S2"`},
		"/touchmark/orders/PO-1/refusals": {`"registrationId":"dev-9","serial":"S9","station":"st","reason":"spent"`},
		"/touchmark/orders/PO-2./unseen":  nil,
	} {
		var next string
		for i := 0; i == 0 || next != ""; i++ {
			res, b := o.call(t, "GET", path, "", "X-Ms-Max-Item-Count: 1", "X-Ms-Continuation: "+next)
			if next = res.Header.Get("X-Ms-Continuation"); res.StatusCode != 200 || i < len(want) && !strings.Contains(string(b), want[i]) || len(want) == 0 && string(b) != "[]" || (next != "") != (i < len(want)-1) {
				t.Errorf("%s, page %d: %d %s, %q", path, i, res.StatusCode, b, next)
				break
			}
		}
	}
	o.want(t, 404, dps.CodeNotFound, "GET", "/touchmark/orders/PO-3", "")
	o.want(t, 404, dps.CodeNotFound, "GET", "/touchmark/orders/PO-3/unseen", "")
	o.want(t, 404, dps.CodeNotFound, "GET", "/touchmark/orders/PO-1/what", "")
	if info := o.want(t, 200, 0, "GET", "/touchmark/info", ""); info["requireOrders"] != false || len(info["owners"].([]any)) != 0 {
		t.Errorf("%v", info)
	}
	for range 2 {
		if g := o.want(t, 200, 0, "PUT", "/touchmark/groups/LINE", `{"closed":true}`); g["closed"] != true {
			t.Errorf("%v", g)
		}
	}
	// Whoever writes the group's enrollment does not open it by the way.
	d.Put(t, registration.Group, "line", registrationtest.Signers(d.Root, nil))
	if g := o.want(t, 200, 0, "PUT", "/touchmark/groups/line", `{"closed":true}`); g["changed"] != false {
		t.Errorf("%v", g)
	}
	o.want(t, 404, dps.CodeNoGroup, "PUT", "/touchmark/groups/nobody", `{"closed":true}`)
	for _, body := range []string{"", "{}", `{"closed":1}`, "["} {
		o.want(t, 400, dps.CodeBadRequest, "PUT", "/touchmark/groups/line", body)
	}
	d.Policy(t, "reader", "EnrollmentRead, RegistrationStatusRead", secondKey, secondKey)
	r := d.operator(t, secondKey, "reader")
	r.want(t, 200, 0, "GET", "/touchmark/orders/PO-1", "")
	r.want(t, 401, dps.CodeUnauthorized, "PUT", "/touchmark/groups/line", `{"closed":false}`)
	d.Policy(t, "other", "EnrollmentRead", secondKey, secondKey)
	d.operator(t, secondKey, "other").want(t, 401, dps.CodeUnauthorized, "GET", "/touchmark/orders", "")
}
