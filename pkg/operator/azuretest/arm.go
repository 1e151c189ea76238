package azuretest

import (
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// management is the state of the management API (section 3).
type management struct {
	token      string
	scopes     map[string]*scope
	operations map[string]int // polls that are left until one is done
}

type scope struct {
	doc      object            // without the parts below
	hubs     []any             // with keys
	policies []any             // with keys
	certs    map[string]object // by folded name; "der" and "code" are not shown
}

const (
	subscription  = "91d12660-3dec-467a-be2a-213b5544ddc0"
	resourceGroup = "plant"
)

// Management has the server answer the management API too, and writes a connection to it into a directory beside those of Files. It
// returns the path. Every change of a scope takes three polls.
func (s *Server) Management(t testing.TB, dir string) string {
	t.Helper()
	s.mu.Lock()
	s.token, s.scopes, s.operations = uuid(), make(map[string]*scope), make(map[string]int)
	text := fmt.Sprintf("Endpoint=https://%s;Token=%s;Subscription=%s;ResourceGroup=%s\n", s.host, s.token, subscription, resourceGroup)
	s.mu.Unlock()
	path := filepath.Join(dir, "management.connection")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// HubKey returns the connection string of a linked hub, with its key.
func (s *Server) HubKey(scopeName, host string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	sc := s.scopes[strings.ToLower(scopeName)]
	if sc == nil {
		return ""
	}
	for _, h := range sc.hubs {
		if c, _ := h.(object)["connectionString"].(string); strings.EqualFold(hostOf(c), host) {
			return c
		}
	}
	return ""
}

func hostOf(connection string) string {
	for part := range strings.SplitSeq(connection, ";") {
		if k, v, _ := strings.Cut(part, "="); strings.EqualFold(k, "HostName") {
			return v
		}
	}
	return ""
}

var (
	scopePath = regexp.MustCompile(`(?i)^/subscriptions/([^/]+)/resourceGroups/([^/]+)/providers/Microsoft\.Devices/provisioningServices(?:/([^/]+)(/.*)?)?$`)
	keyPart   = regexp.MustCompile(`(?i)(SharedAccessKey=)[^;]*`)
)

func (s *Server) arm(h http.Header, r *http.Request, body []byte) (any, error) {
	if s.token == "" || r.Header.Get("Authorization") != "Bearer "+s.token {
		return nil, refuse(401002, "Unauthorized")
	}
	m := scopePath.FindStringSubmatch(r.URL.Path)
	if m == nil || !strings.EqualFold(m[1], subscription) || !strings.EqualFold(m[2], resourceGroup) {
		return nil, refuse(404001, "Not found")
	}
	if v := r.URL.Query().Get("api-version"); v != "2022-02-05" {
		return nil, refuse(400001, "api-version is not supported")
	}
	name, rest := m[3], strings.Split(strings.Trim(m[4], "/"), "/")
	if name == "" {
		all := []any{}
		for _, n := range slices.Sorted(maps.Keys(s.scopes)) {
			all = append(all, s.scopes[n].shown(false))
		}
		return object{"value": all}, nil
	}
	sc := s.scopes[strings.ToLower(name)]
	if sc == nil && (r.Method != http.MethodPut || rest[0] != "") {
		return nil, refuse(404001, "The provisioning service does not exist.")
	}
	switch {
	case rest[0] == "" && r.Method == http.MethodGet:
		return sc.shown(false), nil
	case rest[0] == "" && r.Method == http.MethodPut:
		return s.putScope(h, name, sc, body)
	case rest[0] == "" && r.Method == http.MethodDelete:
		delete(s.scopes, strings.ToLower(name))
		return nil, nil
	case strings.EqualFold(rest[0], "listkeys") && r.Method == http.MethodPost:
		return object{"value": sc.policies, "nextLink": nil}, nil
	case strings.EqualFold(rest[0], "operationresults") && len(rest) == 2:
		left, ok := s.operations[rest[1]]
		if !ok {
			return nil, refuse(404001, "No such operation.")
		}
		s.operations[rest[1]]--
		if left > 0 {
			h.Set("Retry-After", "0")
			return object{"status": "Running"}, nil
		}
		return object{"status": "Succeeded"}, nil
	case strings.EqualFold(rest[0], "certificates"):
		return s.certificates(r, sc, rest[1:], body)
	}
	return nil, refuse(404001, "Not found")
}

// shown is a scope without secrets, but for the policies in answer to a PUT that carried some.
func (sc *scope) shown(policies bool) object {
	doc, props := maps.Clone(sc.doc), maps.Clone(sc.doc["properties"].(object))
	hubs := []any{}
	for _, h := range sc.hubs {
		h := maps.Clone(h.(object))
		h["connectionString"] = keyPart.ReplaceAllString(h["connectionString"].(string), "${1}****")
		hubs = append(hubs, h)
	}
	props["iotHubs"] = hubs
	if policies {
		props["authorizationPolicies"] = sc.policies
	}
	doc["properties"] = props
	return doc
}

func newKey() string {
	b := make([]byte, 32)
	_, _ = rand.Read(b)
	return base64.StdEncoding.EncodeToString(b)
}

func (s *Server) putScope(h http.Header, name string, old *scope, body []byte) (any, error) {
	in, err := decode(body)
	if err != nil {
		return nil, err
	}
	props, _ := in["properties"].(object)
	if in["location"] == nil || in["sku"] == nil || props == nil {
		return nil, refuse(400001, "location, sku and properties are required.")
	}
	if policy, _ := props["allocationPolicy"].(string); policy != "" && !slices.ContainsFunc([]string{"Hashed", "GeoLatency", "Static"}, func(p string) bool { return strings.EqualFold(p, policy) }) {
		return nil, refuse(400001, "The allocation policy is invalid.")
	}
	if old != nil && in["etag"] != nil && in["etag"] != old.doc["etag"] {
		return nil, refuse(412001, "The resource was changed.")
	}
	sc := &scope{certs: make(map[string]object)}
	hubs, _ := props["iotHubs"].([]any)
	for _, v := range hubs {
		hub, _ := v.(object)
		c, _ := hub["connectionString"].(string)
		if strings.Contains(c, "****") && old != nil {
			for _, was := range old.hubs {
				if was := was.(object)["connectionString"].(string); strings.EqualFold(hostOf(was), hostOf(c)) {
					c = was
				}
			}
		}
		if hostOf(c) == "" || strings.Contains(c, "****") || hub["location"] == nil {
			return nil, refuse(401001, "iothub not found")
		}
		hub["connectionString"], hub["name"] = c, hostOf(c)
		sc.hubs = append(sc.hubs, hub)
	}
	policies, carried := props["authorizationPolicies"].([]any)
	switch {
	case carried:
		for _, p := range policies {
			p, _ := p.(object)
			for _, slot := range []string{"primaryKey", "secondaryKey"} {
				if p[slot] == nil || p[slot] == "" {
					p[slot] = newKey()
				}
			}
		}
		sc.policies = policies
	case old != nil:
		sc.policies = old.policies
	default:
		sc.policies = []any{object{"keyName": "provisioningserviceowner", "primaryKey": newKey(), "secondaryKey": newKey(), "rights": "ServiceConfig, DeviceConnect, EnrollmentWrite"}}
	}
	fresh := object{"state": "Active", "provisioningState": "Succeeded", "allocationPolicy": "Hashed", "idScope": "0ne" + strings.ToUpper(uuid()[:8]),
		"serviceOperationsHostName": name + ".azure-devices-provisioning.net", "deviceProvisioningHostName": "global.azure-devices-provisioning.net"}
	if old != nil {
		sc.certs = old.certs
		fresh["idScope"] = old.doc["properties"].(object)["idScope"]
	}
	for k, v := range props {
		if v != nil && !slices.Contains([]string{"iotHubs", "authorizationPolicies", "idScope", "state", "provisioningState", "serviceOperationsHostName", "deviceProvisioningHostName", "touchmark"}, k) { // the last is none of Azure's
			fresh[k] = v
		}
	}
	id := "/subscriptions/" + subscription + "/resourceGroups/" + resourceGroup + "/providers/Microsoft.Devices/provisioningServices/" + name
	sc.doc = object{"id": id, "name": name, "type": "Microsoft.Devices/ProvisioningServices", "location": in["location"], "sku": in["sku"], "tags": in["tags"],
		"etag": base64.StdEncoding.EncodeToString([]byte(uuid()[:8])), "properties": fresh}
	s.scopes[strings.ToLower(name)] = sc
	op := uuid()
	s.operations[op] = 2
	h.Set("Azure-AsyncOperation", "https://"+s.host+id+"/operationresults/"+op+"?api-version=2022-02-05&asyncinfo=true")
	shown := sc.shown(carried)
	running := shown["properties"].(object)
	running["state"], running["provisioningState"] = "Activating", "Accepted"
	return shown, nil
}

func (s *Server) certificates(r *http.Request, sc *scope, seg []string, body []byte) (any, error) {
	shown := func(c object) object {
		out := maps.Clone(c)
		delete(out, "der")
		delete(out, "code")
		return out
	}
	if len(seg) == 0 {
		all := []any{}
		for _, n := range slices.Sorted(maps.Keys(sc.certs)) {
			all = append(all, shown(sc.certs[n]))
		}
		return object{"value": all}, nil
	}
	name := strings.ToLower(seg[0])
	c := sc.certs[name]
	tag := strings.Trim(r.Header.Get("If-Match"), `"`)
	if r.Method == http.MethodPut && len(seg) == 1 {
		return s.putCertificate(sc, seg[0], c, tag, body)
	}
	switch {
	case c == nil:
		return nil, refuse(404001, "The certificate does not exist.")
	case r.Method == http.MethodGet && len(seg) == 1:
		return shown(c), nil
	case tag == "":
		return nil, refuse(400001, "If-Match is required.")
	case tag != "*" && tag != c["etag"]:
		return nil, refuse(412001, "Precondition failed.")
	case r.Method == http.MethodDelete && len(seg) == 1:
		delete(sc.certs, name)
		return nil, nil
	case r.Method != http.MethodPost || len(seg) != 2:
		return nil, refuse(405000, "Method not allowed")
	}
	c["etag"] = newTag()
	props := c["properties"].(object)
	if strings.EqualFold(seg[1], "generateVerificationCode") {
		b := make([]byte, 24)
		_, _ = rand.Read(b)
		c["code"] = strings.ToUpper(hex.EncodeToString(b))
		out := shown(c)
		p := maps.Clone(props)
		p["verificationCode"] = c["code"]
		out["properties"] = p
		return out, nil
	}
	in, err := decode(body)
	if err != nil {
		return nil, err
	}
	text, _ := in["certificate"].(string)
	leaf, err := parse(text)
	ca, err2 := x509.ParseCertificate(c["der"].([]byte))
	if errors.Join(err, err2) != nil || leaf.Subject.CommonName != c["code"] || leaf.CheckSignatureFrom(ca) != nil || time.Now().After(leaf.NotAfter) {
		return nil, refuse(400002, "The certificate does not prove possession of the key.")
	}
	delete(c, "code")
	props["isVerified"] = true
	return shown(c), nil
}

func (s *Server) putCertificate(sc *scope, name string, old object, tag string, body []byte) (any, error) {
	if old != nil && tag != "*" && tag != old["etag"] {
		return nil, refuse(412001, "Precondition failed.")
	}
	in, err := decode(body)
	if err != nil {
		return nil, err
	}
	props := in
	if p, ok := in["properties"].(object); ok {
		props = p
	}
	text, _ := props["certificate"].(string)
	cert, err := parse(text)
	if err != nil || !cert.IsCA {
		return nil, refuse(400001, "The certificate is invalid.")
	}
	verified, _ := strconv.ParseBool(fmt.Sprint(props["isVerified"]))
	i := info(cert)
	const date = "Mon, 02 Jan 2006 15:04:05 GMT"
	sc.certs[strings.ToLower(name)] = object{"name": name, "etag": newTag(), "der": cert.Raw, "type": "Microsoft.Devices/provisioningServices/Certificates",
		"properties": object{"subject": cert.Subject.CommonName, "expiry": cert.NotAfter.UTC().Format(date), "thumbprint": i["sha1Thumbprint"], "isVerified": verified,
			"created": time.Now().UTC().Format(date), "updated": time.Now().UTC().Format(date), "certificate": nil}}
	out := maps.Clone(sc.certs[strings.ToLower(name)])
	delete(out, "der")
	return out, nil
}

func parse(text string) (*x509.Certificate, error) {
	b, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		b = []byte(text)
	}
	if block, _ := pem.Decode(b); block != nil {
		b = block.Bytes
	}
	return x509.ParseCertificate(b)
}
