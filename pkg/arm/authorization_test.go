package arm_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/arm"
	"github.com/touchmark/touchmark/pkg/attest/attesttest"
)

// Who may do what: strangers learn nothing, and everybody else as far as they may.
func TestAuthorization(t *testing.T) {
	b := newBench(t, func(c *arm.Config) { c.First = "0neNONE" })
	b.put("plant-a", description())
	b.put("plant-b", description())
	ca := attesttest.CA(t, nil, "ca")
	b.call("PUT", base+"/plant-b/certificates/ca", `{"certificate":"`+ca.Base64()+`"}`)
	b.call("PUT", base+"/plant-b/privateEndpointConnections/pe", `{"properties":{"privateLinkServiceConnectionState":{"status":"Pending","description":"x"}}}`)
	whole := `{"location":"westeurope","sku":{"name":"S1"},"properties":{}}`
	keys := `{"location":"westeurope","sku":{"name":"S1"},"properties":{"authorizationPolicies":[{"keyName":"a","rights":"EnrollmentRead"}]}}`
	const read, write, showKeys, writeKeys = "read", "write", "keys", "write and keys"
	calls := []struct{ need, method, path, body string }{
		{read, "GET", base + "/NAME", ""}, {read, "GET", base + "/NAME/skus", ""}, {read, "GET", base + "/NAME/certificates", ""}, {read, "GET", base + "/NAME/certificates/ca", ""},
		{read, "GET", base + "/NAME/privateLinkResources", ""}, {read, "GET", base + "/NAME/privateLinkResources/iotDps", ""},
		{read, "GET", base + "/NAME/privateEndpointConnections", ""}, {read, "GET", base + "/NAME/privateEndpointConnections/pe", ""},
		{read, "GET", base + "/NAME/operationresults/delete-0neFFFFFFFF", ""},
		{read, "POST", "/subscriptions/" + sub + "/providers/Microsoft.Devices/checkProvisioningServiceNameAvailability", `{"name":"NAME"}`},
		{showKeys, "POST", base + "/NAME/listkeys", ""}, {showKeys, "POST", base + "/NAME/keys/provisioningserviceowner/listkeys", ""},
		{write, "PUT", base + "/NAME", whole}, {writeKeys, "PUT", base + "/NAME", keys}, {write, "PATCH", base + "/NAME", `{"tags":{}}`},
		{write, "PUT", base + "/NAME/certificates/ca", `{"certificate":"` + ca.Base64() + `"}`}, {write, "POST", base + "/NAME/certificates/ca/generateVerificationCode", ""},
		{write, "POST", base + "/NAME/certificates/ca/verify", `{"certificate":"` + ca.Base64() + `"}`}, {write, "DELETE", base + "/NAME/certificates/ca", ""},
		{write, "PUT", base + "/NAME/privateEndpointConnections/pe2", `{"properties":{"privateLinkServiceConnectionState":{"status":"Pending","description":"x"}}}`},
		{write, "DELETE", base + "/NAME/privateEndpointConnections/pe2", ""}, {write, "POST", base + "/NAME/erase", ""}, {write, "DELETE", base + "/NAME", ""},
	}
	may := map[string][]string{"reader": {read}, "writer": {read, write}, "keys": {showKeys}, "data": {}, "nobody": {}}
	for role, has := range may {
		bearer := "Bearer " + b.issuer.token(t, role)
		for _, c := range calls {
			if c.method == "DELETE" && strings.HasSuffix(c.path, "/NAME") && slices.Contains(has, write) {
				continue // below
			}
			want := slices.Contains(has, c.need)
			r := b.call(c.method, strings.ReplaceAll(c.path, "NAME", "plant-b"), strings.ReplaceAll(c.body, "NAME", "plant-b"), "Authorization", bearer)
			if refused := r.status == 403 && r.header.Get("X-Ms-Error-Code") == "AuthorizationFailed"; refused == want || r.status == 401 {
				t.Errorf("%s, %s %s: %d %.200s", role, c.method, c.path, r.status, r.text)
			}
		}
	}
	// One tenant's operator has nothing of another's, nor learns whether there is one.
	tenant := "Bearer " + b.issuer.token(t, "tenant")
	for _, c := range calls {
		for _, name := range []string{"plant-b", "plant-z"} {
			if r := b.call(c.method, strings.ReplaceAll(c.path, "NAME", name), strings.ReplaceAll(c.body, "NAME", name), "Authorization", tenant); r.status != 403 {
				t.Errorf("the tenant of plant-a, %s %s of %s: %d", c.method, c.path, name, r.status)
			}
		}
		r := b.call(c.method, strings.ReplaceAll(c.path, "NAME", "Plant-a"), strings.ReplaceAll(c.body, "NAME", "Plant-a"), "Authorization", tenant)
		if r.status == 403 || r.status == 401 {
			t.Errorf("the tenant of plant-a, %s %s: %d", c.method, c.path, r.status)
		}
	}
	b.put("plant-a", description())
	if r := b.call("GET", base, "", "Authorization", tenant); strings.Contains(r.text, "plant-b") || !strings.Contains(r.text, "plant-a") {
		t.Errorf("the tenant's list: %s", r.text)
	}
	// No token, or one that proves nothing: 401 before anything else, the same for all paths.
	policyToken := attesttest.ServiceToken([]byte("k"), "localhost", "provisioningserviceowner", time.Now().Add(time.Hour))
	for name, authorization := range map[string]string{"none": "", "wrong": "Bearer x" + token, "a part": "Bearer " + token[:10], "basic": "Basic " + token, "a policy's": policyToken, "empty": "Bearer ", "unsigned": "Bearer eyJhbGciOiJub25lIn0.eyJzdWIiOiJ4In0."} {
		for _, path := range []string{base + "/plant-b", base + "/plant-z", "/providers/Microsoft.Devices/operations", "/subscriptions", base + "/plant-b?api-version=x", base + "/plant-b/listkeys"} {
			for _, method := range []string{"GET", "PUT", "POST", "DELETE"} {
				r := b.call(method, path, whole, "Authorization", authorization)
				if r.status != 401 || r.header.Get("X-Ms-Error-Code") != "AuthenticationFailed" || r.body["message"] != "Authentication failed." {
					t.Errorf("%s, %s %s: %d %s", name, method, path, r.status, r.text)
				}
			}
		}
	}
	if strings.Contains(b.log.String(), token) {
		t.Error("the log shows the token")
	}
}
