package serviceapi_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/touchmark/touchmark/pkg/access"
	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
	"github.com/touchmark/touchmark/pkg/serviceapi"
)

// calls are one call of each route, and whom it is for: a letter for each right that is enough by itself, as they stand in
// letters. A call that changes something can be made again.
var calls = map[string]struct{ path, body, rights string }{
	"POST enrollments":                             {"/enrollments", `{"mode":"delete","enrollments":[{"registrationId":"nobody"}]}`, "W"},
	"POST enrollments/query":                       {"/enrollments/query", `{"query":"SELECT *"}`, "RW"},
	"GET enrollments/*":                            {"/enrollments/own-key", "", "RW"},
	"PUT enrollments/*":                            {"/enrollments/own-key", `{"registrationId":"own-key","attestation":{"type":"symmetricKey"}}`, "W"},
	"DELETE enrollments/*":                         {"/enrollments/nobody", "", "W"},
	"POST enrollments/*/attestationmechanism":      {"/enrollments/own-key/attestationmechanism", "", "WA"},
	"POST enrollmentGroups":                        {"/enrollmentGroups", `{"mode":"delete","enrollmentGroups":[{"enrollmentGroupId":"nobody"}]}`, "W"},
	"POST enrollmentGroups/query":                  {"/enrollmentGroups/query", "", "RW"},
	"GET enrollmentGroups/*":                       {"/enrollmentGroups/keys", "", "RW"},
	"PUT enrollmentGroups/*":                       {"/enrollmentGroups/keys", `{"enrollmentGroupId":"keys","attestation":{"type":"symmetricKey"}}`, "W"},
	"DELETE enrollmentGroups/*":                    {"/enrollmentGroups/nobody", "", "W"},
	"POST enrollmentGroups/*/attestationmechanism": {"/enrollmentGroups/keys/attestationmechanism", "{}", "WA"},
	"GET registrations/*":                          {"/registrations/dev-1", "", "Wr"},
	"DELETE registrations/*":                       {"/registrations/nobody", "", "Ww"},
	"POST registrations/*/query":                   {"/registrations/keys/query", "", "Wr"},
	"GET touchmark/info":                           {"/touchmark/info", "", "RW"},
	"POST touchmark/judge/enrollments":             {"/touchmark/judge/enrollments", `{"enrollments":[{"registrationId":"nobody","etag":"*","attestation":{"type":"symmetricKey"}}]}`, "W"},
	"POST touchmark/judge/enrollmentGroups":        {"/touchmark/judge/enrollmentGroups", `{"enrollmentGroups":[{"enrollmentGroupId":"nobody","etag":"*","attestation":{"type":"symmetricKey"}}]}`, "W"},
	"POST touchmark/bundles":                       {"/touchmark/bundles", "a bundle", "W"},
	"POST touchmark/groupKeys/*":                   {"/touchmark/groupKeys/keys", `{"recipient":"age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kg5sfn9aqmcac8p"}`, "W"},
	"PUT touchmark/groups/*":                       {"/touchmark/groups/keys", `{"closed":false}`, "W"},
	"GET touchmark/groups/*/devices":               {"/touchmark/groups/keys/devices", "", "Wr"},
	"GET touchmark/orders":                         {"/touchmark/orders", "", "Wr"},
	"GET touchmark/orders/*":                       {"/touchmark/orders/PO-1", "", "Wr"},
	"GET touchmark/orders/*/devices":               {"/touchmark/orders/PO-1/devices", "", "Wr"},
	"GET touchmark/orders/*/unseen":                {"/touchmark/orders/PO-1/unseen", "", "Wr"},
	"GET touchmark/orders/*/refusals":              {"/touchmark/orders/PO-1/refusals", "", "Wr"},
	"GET touchmark/registrations":                  {"/touchmark/registrations", "", "Wr"},
	"GET touchmark/groups/*/registrations":         {"/touchmark/groups/keys/registrations", "", "Wr"},
	"GET touchmark/usage":                          {"/touchmark/usage", "", "Wr"},
	"GET touchmark/diagnose/*":                     {"/touchmark/diagnose/dev-1", "", "Wr"},
	"POST touchmark/diagnose/*":                    {"/touchmark/diagnose/dev-1", handedIn, "Wr"},
	"DELETE touchmark/diagnose/*":                  {"/touchmark/diagnose/nobody", "", "Ww"},
	"GET touchmark/attempts/*":                     {"/touchmark/attempts/nothing", "", "Wr"},
	"GET touchmark/outbox":                         {"/touchmark/outbox", "", "Wr"},
	"GET touchmark/orphans":                        {"/touchmark/orphans", "", "Wr"},
	"DELETE touchmark/orphans/*":                   {"/touchmark/orphans/nobody?hub=h&deviceId=d", "", "Ww"},
	"GET touchmark/edges/*/children":               {"/touchmark/edges/gate/children", "", "Wr"},
	"GET touchmark/audit":                          {"/touchmark/audit", "", "C"},
	"GET touchmark/policies":                       {"/touchmark/policies", "", "C"},
	"GET touchmark/policies/*":                     {"/touchmark/policies/line", "", "C"},
	"PUT touchmark/policies/*":                     {"/touchmark/policies/line", `{"rights":"EnrollmentRead"}`, "C"},
	"DELETE touchmark/policies/*":                  {"/touchmark/policies/nobody", "", "C"},
}

// handedIn is a certificate that nobody enrolled, in PEM.
var handedIn = func() string {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "dev-1"}}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		panic(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}()

// letters are all rights, one by one.
var letters = map[string]access.Right{"C": access.ServiceConfig, "R": access.EnrollmentRead, "W": access.EnrollmentWrite, "r": access.RegistrationStatusRead, "w": access.RegistrationStatusWrite,
	"D": access.DeviceConnect, "A": access.AttestationDetails, "m": access.ManagementRead, "M": access.ManagementWrite, "k": access.ManagementKeys}

// provider is an identity provider on this machine: a claim "in" of "SCOPE:LETTER" is a right there.
type provider struct {
	key *ecdsa.PrivateKey
	url string
}

func newProvider(t testing.TB, clock func() time.Time) (*provider, *access.Authenticator) {
	t.Helper()
	p := &provider{}
	var err error
	if p.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_ = json.NewEncoder(w).Encode(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: p.key.Public(), KeyID: "1"}}})
	}))
	t.Cleanup(s.Close)
	p.url = s.URL
	file := fmt.Sprintf("issuer = %q\nkeys = %[1]q\naudience = \"touchmark\"\n", s.URL)
	for _, scope := range []string{ownName, otherName, "*"} {
		for letter, right := range letters {
			file += fmt.Sprintf("[[roles]]\nclaim = \"in\"\nvalue = \"%s:%s\"\nscope = %[1]q\nrights = %[3]q\n", scope, letter, right)
		}
	}
	o, err := access.ParseOIDC([]byte(file))
	if err != nil {
		t.Fatal(err)
	}
	return p, access.New(access.Config{OIDC: o, Now: clock})
}

func (p *provider) token(t testing.TB, now time.Time, in ...string) string {
	t.Helper()
	s, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: p.key, KeyID: "1"}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	text, err := jwt.Signed(s).Claims(map[string]any{"iss": p.url, "aud": "touchmark", "sub": "alice", "exp": now.Add(time.Hour).Unix(), "in": in}).Serialize()
	if err != nil {
		t.Fatal(err)
	}
	return "Bearer " + text
}

// state is all that is kept of a scope that calls could change.
func (d *service) state(t testing.TB, scope string) string {
	t.Helper()
	var all []any
	if err := d.Store.View(t.Context(), func(tx registration.Tx) error {
		scope := dps.Fold(scope)
		add := func(v any, err error) error {
			all = append(all, v)
			return err
		}
		for _, f := range []func() error{
			func() error { return add(tx.Records(scope, registration.Individual, "", 1000)) },
			func() error { return add(tx.Records(scope, registration.Group, "", 1000)) },
			func() error { return add(tx.Registrations(scope, "keys", "", 1000)) },
			func() error { return add(tx.Registrations(scope, "", "", 1000)) },
			func() error { return add(tx.Policies(scope)) },
			func() error { return add(tx.Audits(scope, "", 1000)) },
			func() error { return add(tx.Scope(scope)) },
			func() error { return add(tx.Orders(scope, "", 1000)) },
		} {
			if err := f(); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(all)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// tenants are two scopes with a policy of the same name and other keys, an identity provider for both, and the same route table.
func tenants(t testing.TB) (*service, *provider) {
	t.Helper()
	var p *provider
	d := open(t, func(c *serviceapi.Config) {
		p, c.Bearer = newProvider(t, c.Now)
		c.Import = func(_ context.Context, svc *registration.Service, in serviceapi.ImportRequest) (registration.ImportResult, error) {
			_, err := io.Copy(io.Discard, in.Body)
			return registration.ImportResult{Conflicts: []registration.ImportConflict{{ID: svc.Scope(), Reason: in.By.Name}}}, err
		}
	})
	d.Policy(t, "owner", ownerRights, ownerKey, secondKey)
	if err := d.Store.Update(t.Context(), func(tx registration.Tx) error {
		return tx.PutPolicy(dps.Fold(otherScope), &registration.Policy{Name: "owner", Rights: ownerRights, Primary: otherKey, Secondary: otherKey})
	}); err != nil {
		t.Fatal(err)
	}
	d.operator(t, ownerKey, "owner").want(t, 200, 0, "PUT", "/touchmark/policies/line", `{"rights":"EnrollmentRead"}`)
	d.register(t, d.Derived("dev-1"))
	return d, p
}

var otherKey = []byte(strings.Repeat("x", 64))

// Every call with every right, by a shared access policy where one can have it, and by the identity provider: it is for those
// that the table names, and for nobody else; who is refused changes nothing. DPS-S 60 to 63.
func TestAuthorizationMatrix(t *testing.T) {
	d, p := tenants(t)
	unused := make(map[string]bool)
	for name := range calls {
		unused[name] = true
	}
	for _, r := range serviceapi.Routes() {
		name := r.Method + " " + r.Pattern
		c, ok := calls[name]
		if !ok {
			t.Errorf("%s is not in the table", name)
			continue
		}
		delete(unused, name)
		for letter, right := range letters {
			tokens := map[string]string{"bearer": p.token(t, d.Now(), ownName+":"+letter), "bearer in all scopes": p.token(t, d.Now(), "*:"+letter)}
			if right&access.Policy != 0 {
				d.Policy(t, "one", right.String(), secondKey, ownerKey)
				tokens["policy"] = attesttest.ServiceToken(secondKey, registrationtest.Host, "one", d.Now().Add(time.Hour))
			}
			for kind, token := range tokens {
				o := &operator{d.client(t, nil), registrationtest.Host, token}
				allowed := strings.Contains(c.rights, letter)
				var before string
				if !allowed {
					before = d.state(t, registrationtest.Scope)
				}
				res, b := o.call(t, r.Method, c.path, c.body, "If-Match: "+map[bool]string{true: "*"}[r.Method == "PUT" && strings.HasPrefix(r.Pattern, "e")])
				if allowed != (res.StatusCode != 401) || allowed && res.StatusCode != 200 && res.StatusCode != 204 && res.StatusCode != 404 {
					t.Errorf("%s with %s by %s: %d %s", name, right, kind, res.StatusCode, b)
				}
				if !allowed && (!isDenial(b) || d.state(t, registrationtest.Scope) != before) {
					t.Errorf("%s refused to %s by %s: %s, or it changed something", name, right, kind, b)
				}
			}
		}
	}
	for name := range unused {
		t.Errorf("%s is in the table, and no route", name)
	}
	// The owner's rights, those of the management token, and the command line's: everything.
	o := d.operator(t, ownerKey, "owner")
	for _, r := range serviceapi.Routes() {
		c := calls[r.Method+" "+r.Pattern]
		if res, b := o.call(t, r.Method, c.path, c.body); res.StatusCode == 401 {
			t.Errorf("the owner, %s %s: %s", r.Method, r.Pattern, b)
		}
	}
}

var denial = regexp.MustCompile(`^\{"errorCode":401002,"trackingId":"[0-9a-f-]{36}","message":"Unauthorized","timestampUtc":"[0-9T:.-]+Z"\}$`)

func isDenial(b []byte) bool { return denial.Match(b) }

// Every call with another scope's credentials: nothing is visible, nothing is changed. DPS-S 58, 63.
func TestIsolationMatrix(t *testing.T) {
	d, p := tenants(t)
	own, other := ownName+"."+domain, otherName+"."+domain
	hour := d.Now().Add(time.Hour)
	sas := func(key []byte, host string) string { return attesttest.ServiceToken(key, host, "owner", hour) }
	before := [2]string{d.state(t, registrationtest.Scope), d.state(t, otherScope)}
	for name, x := range map[string]struct{ host, token string }{
		"the other's key, for this host":             {own, sas(otherKey, own)},
		"the other's key, for the first host":        {registrationtest.Host, sas(otherKey, registrationtest.Host)},
		"the other's token":                          {own, sas(otherKey, other)},
		"the other's token at the first host":        {registrationtest.Host, sas(otherKey, other)},
		"our token at the other":                     {other, sas(ownerKey, own)},
		"our token for the first host, at theirs":    {other, sas(ownerKey, registrationtest.Host)},
		"our key, for the other's host, at ours":     {own, sas(ownerKey, other)},
		"our key, for the other's host, at theirs":   {other, sas(ownerKey, other)},
		"the other's key, for the first host, there": {other, sas(otherKey, registrationtest.Host)},
		"the other's path below our host":            {own, sas(otherKey, own+"/enrollments")},
		"a bearer of the other":                      {own, p.token(t, d.Now(), otherName+":W", otherName+":C")},
		"a bearer of ours at the other":              {other, p.token(t, d.Now(), ownName+":W", ownName+":C")},
		"a scope that there is not":                  {"plant-c." + domain, sas(ownerKey, "plant-c."+domain)},
		"a domain that there is not":                 {ownName + ".example.org", sas(ownerKey, ownName+".example.org")},
		"the domain":                                 {domain, sas(ownerKey, domain)},
		"below a scope":                              {"x." + own, sas(ownerKey, "x."+own)},
		"a name that begins alike":                   {own + ".evil.example", sas(ownerKey, own)},
		"an ID scope for a name":                     {registrationtest.Scope + "." + domain, sas(ownerKey, registrationtest.Scope+"."+domain)},
		"no name":                                    {"." + domain, sas(ownerKey, own)},
	} {
		o := &operator{d.client(t, nil), x.host, x.token}
		for _, r := range serviceapi.Routes() {
			c := calls[r.Method+" "+r.Pattern]
			if res, b := o.call(t, r.Method, c.path, c.body); res.StatusCode != 401 || !isDenial(b) {
				t.Errorf("%s: %s %s: %d %s", name, r.Method, r.Pattern, res.StatusCode, b)
			}
		}
	}
	if now := [2]string{d.state(t, registrationtest.Scope), d.state(t, otherScope)}; now != before {
		t.Error("calls with another scope's credentials changed something")
	}

	// The other's own credentials at its own host see nothing of this scope, and reach nothing of it.
	theirs := &operator{d.client(t, nil), other, sas(otherKey, other)}
	for _, r := range serviceapi.Routes() {
		c := calls[r.Method+" "+r.Pattern]
		if r.Pattern == "touchmark/groupKeys/*" || r.Method == "PUT" || r.Pattern == "touchmark/info" || r.Pattern == "touchmark/bundles" {
			continue // these make something of their own
		}
		res, b := theirs.call(t, r.Method, c.path, c.body)
		if r.Pattern == "touchmark/diagnose/*" && r.Method != "DELETE" { // which says of every device what is known of it
			if !strings.Contains(string(b), `"enrollment":null,"registration":null,"attempts":[]`) {
				t.Errorf("%s %s: %s", r.Method, r.Pattern, b)
			}
			continue
		}
		if seen := string(b); res.StatusCode == 200 && seen != "[]" && r.Pattern != "touchmark/audit" && r.Pattern != "touchmark/policies" && !strings.Contains(seen, `"isSuccessful":false`) || strings.Contains(seen, "own-key") ||
			strings.Contains(seen, `"line`) || strings.Contains(seen, registrationtest.Scope) || strings.Contains(seen, "dev-1") {
			t.Errorf("%s %s: %d %s", r.Method, r.Pattern, res.StatusCode, b)
		}
	}
	if doc := theirs.want(t, 200, 0, "GET", "/touchmark/info", ""); doc["idScope"] != otherScope || doc["name"] != otherName {
		t.Errorf("%v", doc)
	}
	if doc := theirs.want(t, 200, 0, "POST", "/touchmark/bundles", "a bundle"); !strings.Contains(fmt.Sprint(doc), otherScope+" reason:policy owner") {
		t.Errorf("a bundle is for another scope than its host's: %v", doc)
	}
	// The same IDs are other records there.
	made := theirs.want(t, 200, 0, "PUT", "/enrollments/own-key", ofDevice("own-key", newKeys))
	theirs.want(t, 200, 0, "PUT", "/enrollmentGroups/keys", ofGroup("keys", newKeys))
	theirs.want(t, 200, 0, "PUT", "/enrollments/z", ofDevice("z", newKeys))
	if d.state(t, registrationtest.Scope) != before[0] {
		t.Error("the other scope's writes changed this one")
	}
	for _, x := range []struct {
		host string
		key  []byte
	}{{own, ownerKey}, {registrationtest.Host, ownerKey}, {strings.ToUpper(own), ownerKey}, {own + ":8443", ownerKey}, {"localhost", ownerKey}, {"127.0.0.1", ownerKey}, {"[::1]:443", ownerKey}} {
		o := &operator{d.client(t, nil), x.host, sas(x.key, strings.ToLower(strings.TrimSuffix(x.host, ":8443")))}
		if x.host == "[::1]:443" {
			o.token = sas(x.key, "::1")
		}
		if doc := o.want(t, 200, 0, "GET", "/touchmark/info", ""); doc["idScope"] != registrationtest.Scope {
			t.Errorf("%s: %v", x.host, doc)
		}
	}

	// Continuations, tags and operations stay at home.
	ours := &operator{d.client(t, nil), own, sas(ownerKey, own)}
	res, _ := theirs.call(t, "POST", "/enrollments/query", "", "X-Ms-Max-Item-Count: 1")
	ours.want(t, 400, dps.CodeInvalidArgument, "POST", "/enrollments/query", "", "X-Ms-Continuation: "+res.Header.Get("X-Ms-Continuation"))
	ours.want(t, 412, dps.CodeETagMismatch, "DELETE", "/enrollments/own-key", "", "If-Match: "+fmt.Sprint(made["etag"]))
	dev := d.ByKey("own-key", d.OwnKey)
	operation := regexp.MustCompile(`"operationId":"([^"]+)"`).FindStringSubmatch(d.ask(t, dev, "PUT", "/register"))
	if operation == nil {
		t.Fatal("no operation")
	}
	theirDevice := dev
	theirDevice.Scope, theirDevice.Token = otherScope, attesttest.Token(keyOf(t, made, "primaryKey"), otherScope, "own-key", hour)
	if s := d.ask(t, theirDevice, "GET", "/operations/"+operation[1]); strings.Contains(s, "assigned") || !strings.Contains(s, `"errorCode":404`) {
		t.Errorf("another scope's operation: %s", s)
	}
	crossed := dev
	crossed.Scope = otherScope
	for _, call := range [][2]string{{"PUT", "/register"}, {"GET", "/operations/" + operation[1]}, {"POST", ""}} {
		for name, token := range map[string]string{"as it is": dev.Token, "signed for the other": attesttest.Token(d.OwnKey, otherScope, "own-key", hour)} {
			crossed.Token = token
			if s := d.ask(t, crossed, call[0], call[1]); !strings.Contains(s, `"errorCode":401002`) {
				t.Errorf("a device of this scope in the other, its token %s: %s %s", name, call, s)
			}
		}
	}
	if s := d.register(t, theirDevice); !strings.Contains(s, `"status":"assigned"`) {
		t.Errorf("the other's device: %s", s)
	}
	if s := d.state(t, registrationtest.Scope); strings.Contains(s, fmt.Sprint(made["etag"])) {
		t.Error("something of the other scope is in this one")
	}

	// A scope that is deleted lets nobody in, and its name is nobody's.
	if err := registrationtest.DeleteScope(t.Context(), d.Store, otherScope, start, d.Now()); err != nil {
		t.Fatal(err)
	}
	theirs.want(t, 401, dps.CodeUnauthorized, "GET", "/enrollments/own-key", "")
	ours.want(t, 200, 0, "GET", "/enrollments/own-key", "")
}

// Who is kept out by its address learns nothing either; rules for devices do not matter here. DPS-S 80.
func TestAddresses(t *testing.T) {
	d, o := newOperator(t)
	for target, want := range map[string]int{registration.ServiceAPI: 401, registration.AllAPIs: 401, registration.DeviceAPI: 200} {
		if _, _, err := registration.EditScope(t.Context(), d.Store, registrationtest.Scope, start, "filter", d.Now(), func(sc *registration.Scope) (*registration.Scope, error) {
			sc.IPFilter = []registration.IPRule{{Name: "here", Mask: "127.0.0.0/8", Target: target}}
			return sc, nil
		}); err != nil {
			t.Fatal(err)
		}
		if res, b := o.call(t, "GET", "/enrollments/own-key", ""); res.StatusCode != want || want == 401 && !isDenial(b) {
			t.Errorf("rejected for %s: %d %s", target, res.StatusCode, b)
		}
	}
}
