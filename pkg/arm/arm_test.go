package arm_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	armpolicy "github.com/Azure/azure-sdk-for-go/sdk/azcore/arm"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/cloud"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/runtime"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/to"
	dpsarm "github.com/Azure/azure-sdk-for-go/sdk/resourcemanager/deviceprovisioningservices/armdeviceprovisioningservices"
	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/touchmark/touchmark/pkg/access"
	"github.com/touchmark/touchmark/pkg/arm"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/httpd"
	"github.com/touchmark/touchmark/pkg/hub"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/sqlstore"
)

const (
	sub   = "11111111-2222-3333-4444-555555555555"
	group = "plants"
	token = "the token of a test, and of nothing else"
	hubA  = "HostName=hub-a.azure-devices.net;SharedAccessKeyName=dps;SharedAccessKey=MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
)

// A bench is a management API behind the HTTPS door, on a store of its own: at one replica, or at three.
type bench struct {
	t      testing.TB
	store  *sqlstore.Store      // the first replica's
	scopes *registration.Scopes // the first replica's
	wait   func()               // for what replicas do in the background
	http   *httptest.Server     // each request goes to another replica than the last
	issuer *issuer
	path   string // of the one replica's store
	dsn    string // of three replicas' database; empty for one replica
	stop   func()
	log    lockedBuffer
}

// databases makes those of the tests below TestReplicas; the stores of others are files.
var databases atomic.Pointer[func(testing.TB) string]

type lockedBuffer struct {
	mu sync.Mutex
	bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.Buffer.Write(p)
}

// An issuer is an identity provider.
type issuer struct {
	url  string
	sign jose.Signer
}

func newIssuer(t testing.TB) *issuer {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	set, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "k", Algorithm: "ES256", Use: "sig"}}})
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(set)
	}))
	t.Cleanup(s.Close)
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: "k"}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return &issuer{s.URL, signer}
}

// token is one of a caller with a role.
func (i *issuer) token(t testing.TB, role string) string {
	t.Helper()
	now := time.Now()
	text, err := jwt.Signed(i.sign).Claims(jwt.Claims{Issuer: i.url, Subject: "user-" + role, Audience: jwt.Audience{"touchmark"}, IssuedAt: jwt.NewNumericDate(now), Expiry: jwt.NewNumericDate(now.Add(time.Hour))}).
		Claims(map[string]any{"roles": []string{role}}).Serialize()
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func newBench(t testing.TB, edit ...func(*arm.Config)) *bench {
	t.Helper()
	b := &bench{t: t, path: filepath.Join(t.TempDir(), "service.db"), issuer: newIssuer(t)}
	if strings.HasPrefix(t.Name(), "TestReplicas/") {
		b.dsn = (*databases.Load())(t)
	}
	b.start(edit...)
	return b
}

// start opens the store and serves; a bench that was stopped starts again.
func (b *bench) start(edit ...func(*arm.Config)) {
	b.t.Helper()
	log := slog.New(slog.NewTextHandler(&b.log, nil))
	oidc, err := access.ParseOIDC(fmt.Appendf(nil, `
issuer = %q
audience = "touchmark"
keys = %q
roles = [
  {claim = "roles", value = "reader", scope = "*", rights = "ManagementRead"},
  {claim = "roles", value = "writer", scope = "*", rights = "ManagementWrite"},
  {claim = "roles", value = "keys", scope = "*", rights = "ManagementKeys"},
  {claim = "roles", value = "tenant", scope = "Plant-A", rights = "ManagementWrite, ManagementKeys"},
  {claim = "roles", value = "data", scope = "*", rights = "EnrollmentWrite, ServiceConfig"},
]`, b.issuer.url, b.issuer.url))
	if err != nil {
		b.t.Fatal(err)
	}
	sum := sha256.Sum256([]byte(token))
	ctx, cancel := context.WithCancel(context.Background())
	cfg := arm.Config{Access: access.New(access.Config{Management: &sum, OIDC: oidc}), Log: log, DeleteWait: time.Hour,
		Hubs: arm.Hubs{Mask: hub.Mask, Restore: hub.Restore, Parse: func(kind registration.HubKind, text string) (string, error) {
			c, err := hub.ParseConnection(kind, text)
			if err != nil {
				return "", err
			}
			return c.Host, nil
		}}}
	for _, e := range edit {
		e(&cfg)
	}
	where := []sqlstore.Config{{Path: b.path}}
	if b.dsn != "" {
		where = []sqlstore.Config{{DSN: b.dsn}, {DSN: b.dsn}, {DSN: b.dsn}}
	}
	var stores []*sqlstore.Store
	var servers []*arm.Server
	var doors []http.Handler
	for i, sc := range where {
		sc.DataKey = bytes.Repeat([]byte{7}, 32)
		store, err := sqlstore.Open(context.Background(), sc)
		if err != nil {
			b.t.Fatal(err)
		}
		cfg.Scopes = registration.NewScopes(registration.ScopesConfig{Config: registration.Config{Store: store, Log: log}})
		server := arm.New(ctx, cfg)
		if err := server.Resume(ctx); err != nil {
			b.t.Fatal(err)
		}
		if i == 0 {
			b.store, b.scopes = store, cfg.Scopes
		}
		stores, servers = append(stores, store), append(servers, server)
		doors = append(doors, httpd.New(httpd.Config{Registrar: cfg.Scopes, Handlers: map[string]http.Handler{"subscriptions": server, "providers": server}}).Handler())
	}
	var turn atomic.Int64
	b.http = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		doors[int(turn.Add(1))%len(doors)].ServeHTTP(w, r)
	}))
	b.wait = func() {
		for _, s := range servers {
			s.Wait()
		}
	}
	b.stop = sync.OnceFunc(func() {
		b.http.Close()
		cancel()
		b.wait()
		for _, s := range stores {
			if err := s.Close(); err != nil {
				b.t.Error(err)
			}
		}
	})
	b.t.Cleanup(b.stop)
}

// credential is a token that is always the same.
type credential string

func (c credential) GetToken(context.Context, policy.TokenRequestOptions) (azcore.AccessToken, error) {
	return azcore.AccessToken{Token: string(c), ExpiresOn: time.Now().Add(time.Hour)}, nil
}

func (b *bench) options() *armpolicy.ClientOptions {
	return &armpolicy.ClientOptions{DisableRPRegistration: true, ClientOptions: policy.ClientOptions{
		Transport: b.http.Client(), Retry: policy.RetryOptions{MaxRetries: -1},
		Cloud: cloud.Configuration{ActiveDirectoryAuthorityHost: b.http.URL, Services: map[cloud.ServiceName]cloud.ServiceConfiguration{
			cloud.ResourceManager: {Endpoint: b.http.URL, Audience: "touchmark"}}},
	}}
}

func (b *bench) services() *dpsarm.IotDpsResourceClient {
	c, err := dpsarm.NewIotDpsResourceClient(sub, credential(token), b.options())
	if err != nil {
		b.t.Fatal(err)
	}
	return c
}

func (b *bench) certificates() *dpsarm.DpsCertificateClient {
	c, err := dpsarm.NewDpsCertificateClient(sub, credential(token), b.options())
	if err != nil {
		b.t.Fatal(err)
	}
	return c
}

// poll has pollers of Azure's ask every so often; they know no shorter time by themselves.
var poll = &runtime.PollUntilDoneOptions{Frequency: time.Second}

func description() dpsarm.ProvisioningServiceDescription {
	return dpsarm.ProvisioningServiceDescription{Location: to.Ptr("West Europe"), SKU: &dpsarm.IotDpsSKUInfo{Name: to.Ptr(dpsarm.IotDpsSKUS1)}, Properties: &dpsarm.IotDpsPropertiesDescription{}}
}

// put creates or replaces a service by Azure's client.
func (b *bench) put(name string, d dpsarm.ProvisioningServiceDescription) dpsarm.ProvisioningServiceDescription {
	b.t.Helper()
	p, err := b.services().BeginCreateOrUpdate(b.t.(*testing.T).Context(), group, name, d, nil)
	if err != nil {
		b.t.Fatal(err)
	}
	r, err := p.PollUntilDone(b.t.(*testing.T).Context(), poll)
	if err != nil {
		b.t.Fatal(err)
	}
	return r.ProvisioningServiceDescription
}

func (b *bench) get(name string) dpsarm.ProvisioningServiceDescription {
	b.t.Helper()
	r, err := b.services().Get(b.t.(*testing.T).Context(), name, group, nil)
	if err != nil {
		b.t.Fatal(err)
	}
	return r.ProvisioningServiceDescription
}

// code is that of an error of Azure's client.
func code(err error) string {
	var e *azcore.ResponseError
	if errors.As(err, &e) {
		return fmt.Sprintf("%d %s", e.StatusCode, e.ErrorCode)
	}
	return fmt.Sprint(err)
}

const base = "/subscriptions/" + sub + "/resourceGroups/" + group + "/providers/Microsoft.Devices/provisioningServices"

type reply struct {
	status int
	header http.Header
	body   map[string]any
	text   string
}

// call is a request without a client's help. A path with a "?" has its own query.
func (b *bench) call(method, path, body string, header ...string) reply {
	if !strings.Contains(path, "?") {
		path += "?api-version=2022-02-05"
	}
	r, err := http.NewRequest(method, b.http.URL+path, strings.NewReader(body))
	if err != nil {
		b.t.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer "+token)
	for i := 0; i < len(header); i += 2 {
		if r.Header.Del(header[i]); header[i+1] != "" {
			r.Header.Set(header[i], header[i+1])
		}
	}
	res, err := b.http.Client().Do(r)
	if err != nil {
		b.t.Fatal(err)
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		b.t.Fatal(err)
	}
	out := reply{status: res.StatusCode, header: res.Header, text: string(text)}
	_ = json.Unmarshal(text, &out.body)
	return out
}

// scope returns the stored scope of a name.
func (b *bench) scope(name string) (sc *registration.Scope) {
	if err := b.store.View(context.Background(), func(tx registration.Tx) (err error) { sc, err = tx.ScopeByName(name); return err }); err != nil {
		b.t.Fatal(err)
	}
	return sc
}

func (b *bench) actions(sc *registration.Scope) (all []string) {
	b.t.Helper()
	if err := b.store.View(context.Background(), func(tx registration.Tx) error {
		list, err := tx.Audits(dps.Fold(sc.ID), "", 1000)
		for _, a := range list {
			all = append(all, a.Actor+": "+a.Action+" "+a.Object)
		}
		return err
	}); err != nil {
		b.t.Fatal(err)
	}
	return all
}

var idScope = regexp.MustCompile(`^0ne[0-9A-F]{8}$`)

// DPS-S 64, 65, 68, 70, 71, 72: the life of a service as Azure's client for Go sees it.
func TestLife(t *testing.T) {
	b := newBench(t)
	ctx, c := t.Context(), b.services()
	available := func(name string) (bool, dpsarm.NameUnavailabilityReason) {
		t.Helper()
		r, err := c.CheckProvisioningServiceNameAvailability(ctx, dpsarm.OperationInputs{Name: to.Ptr(name)}, nil)
		if err != nil {
			t.Fatal(err)
		}
		return *r.NameAvailable, *r.Reason
	}
	if free, _ := available("Plant-A"); !free {
		t.Error("the name of no service is taken")
	}
	d := description()
	d.Tags = map[string]*string{"owner": to.Ptr("jo")}
	d.Properties.IotHubs = []*dpsarm.IotHubDefinitionDescription{{ConnectionString: to.Ptr(hubA), Location: to.Ptr("westeurope"), AllocationWeight: to.Ptr[int32](3)}}
	made := b.put("Plant-A", d)
	if free, why := available("plant-a"); free || why != dpsarm.NameUnavailabilityReasonAlreadyExists {
		t.Errorf("its name is free: %s", why)
	}
	if free, why := available("-"); free || why != dpsarm.NameUnavailabilityReasonInvalid {
		t.Errorf("a name that is none is free: %s", why)
	}
	got := b.get("PLANT-a")
	p := got.Properties
	if *p.State != dpsarm.StateActive || *p.ProvisioningState != "Succeeded" || !idScope.MatchString(*p.IDScope) || *made.Properties.IDScope != *p.IDScope || *made.Etag != *got.Etag ||
		*p.ServiceOperationsHostName != "Plant-A.azure-devices-provisioning.net" || *p.DeviceProvisioningHostName != dps.DefaultGlobalEndpoint ||
		*got.ID != base+"/Plant-A" || *got.Type != "Microsoft.Devices/ProvisioningServices" || *got.SKU.Name != dpsarm.IotDpsSKUS1 || *got.Tags["owner"] != "jo" {
		t.Errorf("%+v, %+v", got, p)
	}
	if len(p.IotHubs) != 1 || *p.IotHubs[0].ConnectionString != strings.Split(hubA, "SharedAccessKey=")[0]+"SharedAccessKey=****" || *p.IotHubs[0].Name != "hub-a.azure-devices.net" || *p.IotHubs[0].AllocationWeight != 3 {
		t.Errorf("hubs: %+v", p.IotHubs)
	}
	if p.AuthorizationPolicies != nil || made.Properties.AuthorizationPolicies != nil {
		t.Error("policies are shown")
	}

	// Tags, and nothing else.
	update, err := c.BeginUpdate(ctx, group, "plant-a", dpsarm.TagsResource{Tags: map[string]*string{"line": to.Ptr("3")}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if r, err := update.PollUntilDone(ctx, poll); err != nil || len(r.Tags) != 1 || *r.Tags["line"] != "3" || len(r.Properties.IotHubs) != 1 {
		t.Errorf("tags: %+v, %v", r, err)
	}
	if r := b.call("PATCH", base+"/plant-a", `{"properties":{"publicNetworkAccess":"Disabled"}}`); r.status != 400 {
		t.Errorf("PATCH of more than tags: %d", r.status)
	}

	for i := range 3 {
		b.put(fmt.Sprintf("other-%d", i), description())
	}
	var names []string
	for pager := c.NewListByResourceGroupPager(group, nil); pager.More(); {
		page, err := pager.NextPage(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, v := range page.Value {
			names = append(names, *v.Name)
		}
	}
	for pager := c.NewListBySubscriptionPager(nil); pager.More(); {
		page, err := pager.NextPage(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, v := range page.Value {
			names = append(names, *v.Name)
			if len(v.Properties.IotHubs) > 0 && strings.Contains(*v.Properties.IotHubs[0].ConnectionString, "MDEyMzQ1") {
				t.Error("a list shows a hub's key")
			}
		}
	}
	slices.Sort(names)
	if want := []string{"Plant-A", "Plant-A", "other-0", "other-0", "other-1", "other-1", "other-2", "other-2"}; !slices.Equal(names, want) {
		t.Errorf("listed: %v", names)
	}
	for _, pager := range []*runtime.Pager[dpsarm.IotDpsResourceClientListByResourceGroupResponse]{c.NewListByResourceGroupPager("nowhere", nil)} {
		if page, err := pager.NextPage(ctx); err != nil || len(page.Value) != 0 {
			t.Errorf("an empty resource group: %v, %v", page.Value, err)
		}
	}
	skus, err := c.NewListValidSKUsPager("plant-a", group, nil).NextPage(ctx)
	if err != nil || len(skus.Value) != 1 || *skus.Value[0].Name != dpsarm.IotDpsSKUS1 {
		t.Errorf("SKUs: %v, %v", skus.Value, err)
	}
	operations, err := dpsarm.NewOperationsClient(credential(token), b.options())
	if err != nil {
		t.Fatal(err)
	}
	if page, err := operations.NewListPager(nil).NextPage(ctx); err != nil || len(page.Value) < 10 {
		t.Errorf("operations: %v, %v", page.Value, err)
	}

	gone := b.scope("plant-a")
	del, err := c.BeginDelete(ctx, "plant-a", group, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := del.PollUntilDone(ctx, poll); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Get(ctx, "plant-a", group, nil); code(err) != "404 ResourceNotFound" {
		t.Errorf("after its deletion: %v", err)
	}
	if r, err := c.GetOperationResult(ctx, "delete-"+gone.ID, group, "plant-a", "true", nil); err != nil || *r.Status != "Succeeded" {
		t.Errorf("its operation: %+v, %v", r, err)
	}
	if _, err := c.GetOperationResult(ctx, "delete-"+b.scope("other-0").ID, group, "other-0", "true", nil); code(err) != "404 ResourceNotFound" {
		t.Errorf("the operation of nothing: %v", err)
	}
	if again := b.put("Plant-A", description()); *again.Properties.IDScope == gone.ID || len(again.Properties.IotHubs) != 0 {
		t.Errorf("made again: %+v", again.Properties)
	}
}

// DPS-S 67, 68, 69: policies stay, are made, rolled, and shown to those who ask for keys.
func TestPolicies(t *testing.T) {
	b := newBench(t)
	ctx, c := t.Context(), b.services()
	b.put("plant", description())
	list := func() map[string]*dpsarm.SharedAccessSignatureAuthorizationRuleAccessRightsDescription {
		t.Helper()
		all := make(map[string]*dpsarm.SharedAccessSignatureAuthorizationRuleAccessRightsDescription)
		for pager := c.NewListKeysPager("plant", group, nil); pager.More(); {
			page, err := pager.NextPage(ctx)
			if err != nil {
				t.Fatal(err)
			}
			for _, p := range page.Value {
				all[*p.KeyName] = p
			}
		}
		return all
	}
	owner := list()["provisioningserviceowner"]
	if first, err := base64.StdEncoding.DecodeString(*owner.PrimaryKey); err != nil || len(first) != 64 || *owner.PrimaryKey == *owner.SecondaryKey || *owner.Rights != "ServiceConfig, EnrollmentWrite, DeviceConnect" {
		t.Errorf("the owner: %+v", owner)
	}
	b.put("plant", b.get("plant"))
	if now := list(); len(now) != 1 || *now["provisioningserviceowner"].PrimaryKey != *owner.PrimaryKey {
		t.Error("a PUT without policies changed them")
	}
	d := b.get("plant")
	rolled := base64.StdEncoding.EncodeToString(bytes.Repeat([]byte("r"), 64))
	d.Properties.AuthorizationPolicies = []*dpsarm.SharedAccessSignatureAuthorizationRuleAccessRightsDescription{
		{KeyName: to.Ptr("reader"), Rights: to.Ptr(dpsarm.AccessRightsDescriptionEnrollmentRead)},
		{KeyName: to.Ptr("ProvisioningServiceOwner"), Rights: owner.Rights, PrimaryKey: to.Ptr(rolled), SecondaryKey: owner.SecondaryKey},
	}
	answer := b.put("plant", d)
	now := list()
	if len(now) != 2 || *now["provisioningserviceowner"].PrimaryKey != rolled || *now["provisioningserviceowner"].SecondaryKey != *owner.SecondaryKey {
		t.Errorf("after a roll: %v", now)
	}
	if p := answer.Properties.AuthorizationPolicies; len(p) != 2 || *p[0].PrimaryKey != *now["reader"].PrimaryKey || len(*p[0].SecondaryKey) < 40 {
		t.Errorf("the answer: %+v", p)
	}
	if one, err := c.ListKeysForKeyName(ctx, "plant", "READER", group, nil); err != nil || *one.KeyName != "reader" || *one.PrimaryKey != *now["reader"].PrimaryKey {
		t.Errorf("one: %+v, %v", one, err)
	}
	if _, err := c.ListKeysForKeyName(ctx, "plant", "nobody", group, nil); code(err) != "404 ResourceNotFound" {
		t.Errorf("an unknown one: %v", err)
	}
	for name, policies := range map[string]string{
		"no name":     `[{"rights":"EnrollmentRead"}]`,
		"a bad name":  `[{"keyName":"a b","rights":"EnrollmentRead"}]`,
		"no rights":   `[{"keyName":"a"}]`,
		"bad rights":  `[{"keyName":"a","rights":"ManagementWrite"}]`,
		"twice":       `[{"keyName":"a","rights":"EnrollmentRead"},{"keyName":"A","rights":"EnrollmentRead"}]`,
		"a short key": `[{"keyName":"a","rights":"EnrollmentRead","primaryKey":"MTIz"}]`,
		"no base64":   `[{"keyName":"a","rights":"EnrollmentRead","primaryKey":"*****************************"}]`,
		"a number":    `[{"keyName":7,"rights":"EnrollmentRead"}]`,
	} {
		if r := b.call("PUT", base+"/plant", `{"location":"westeurope","sku":{"name":"S1"},"properties":{"authorizationPolicies":`+policies+`}}`); r.status != 400 {
			t.Errorf("%s: %d %s", name, r.status, r.text)
		}
	}
	if after := list(); len(after) != 2 {
		t.Errorf("refused, and changed: %v", after)
	}
	b.call("PUT", base+"/plant", `{"location":"westeurope","sku":{"name":"S1"},"properties":{"authorizationPolicies":[{"keyName":"reader","rights":"enrollmentread"}]}}`)
	if after := list(); len(after) != 1 || *after["reader"].PrimaryKey != *now["reader"].PrimaryKey {
		t.Errorf("a list takes the place of what there was, and its keys stay: %v", after)
	}
	actions := strings.Join(b.actions(b.scope("plant")), "\n")
	for _, want := range []string{"management token: create scope/plant", "create policy/reader", "update policy/provisioningserviceowner", "show keys scope/plant", "show keys policy/reader", "delete policy/provisioningserviceowner"} {
		if !strings.Contains(actions, want) {
			t.Errorf("the audit record has no %q:\n%s", want, actions)
		}
	}
}

// DPS-S 73, and what else is refused, in which words.
func TestHostile(t *testing.T) {
	b := newBench(t)
	b.put("plant", description())
	b.put("elsewhere", description())
	whole := func(properties string) string {
		return `{"location":"westeurope","sku":{"name":"S1"},"properties":` + properties + `}`
	}
	other := "/subscriptions/" + sub + "/resourceGroups/other/providers/Microsoft.Devices/provisioningServices"
	rules := func(n int) string {
		var all []string
		for i := range n {
			all = append(all, fmt.Sprintf(`{"filterName":"r%d","action":"Accept","ipMask":"10.0.%d.0/24"}`, i, i))
		}
		return whole(`{"ipFilterRules":[` + strings.Join(all, ",") + `]}`)
	}
	tags := func(n int) string {
		all := make(map[string]string)
		for i := range n {
			all[fmt.Sprint("t", i)] = "x"
		}
		text, _ := json.Marshal(map[string]any{"tags": all})
		return string(text)
	}
	for name, x := range map[string]struct {
		method, path, body string
		status             int
		code               string
	}{
		"custom allocation":            {"PUT", base + "/plant", whole(`{"allocationPolicy":"Custom"}`), 400, "400004"},
		"an unknown allocation":        {"PUT", base + "/plant", whole(`{"allocationPolicy":"Nearest"}`), 400, "400004"},
		"no location":                  {"PUT", base + "/new", `{"sku":{"name":"S1"},"properties":{}}`, 400, "400004"},
		"no SKU":                       {"PUT", base + "/new", `{"location":"x","properties":{}}`, 400, "400004"},
		"no properties":                {"PUT", base + "/new", `{"location":"x","sku":{"name":"S1"}}`, 400, "400004"},
		"another SKU":                  {"PUT", base + "/new", `{"location":"x","sku":{"name":"S2"},"properties":{}}`, 400, "400004"},
		"more capacity":                {"PUT", base + "/new", `{"location":"x","sku":{"name":"S1","capacity":2},"properties":{}}`, 400, "400004"},
		"another location":             {"PUT", base + "/plant", `{"location":"eastus","sku":{"name":"S1"},"properties":{}}`, 409, "InvalidResourceLocation"},
		"an old etag in the body":      {"PUT", base + "/plant", `{"etag":"old","location":"westeurope","sku":{"name":"S1"},"properties":{}}`, 412, "412001"},
		"somebody else's name":         {"PUT", other + "/PLANT", whole(`{}`), 409, "409203"},
		"from another group":           {"GET", other + "/plant", "", 404, "ResourceNotFound"},
		"deleted from another group":   {"DELETE", other + "/plant", "", 404, "ResourceNotFound"},
		"a managed identity":           {"PUT", base + "/plant", `{"identity":{"type":"SystemAssigned"},"location":"westeurope","sku":{"name":"S1"},"properties":{}}`, 400, "400004"},
		"without local keys":           {"PUT", base + "/plant", whole(`{"disableLocalAuth":true}`), 400, "400004"},
		"a device registry":            {"PUT", base + "/plant", whole(`{"deviceRegistryNamespace":{"resourceId":"/x"}}`), 400, "400004"},
		"no body":                      {"PUT", base + "/plant", "", 400, "InvalidRequestContent"},
		"not JSON":                     {"PUT", base + "/plant", "{", 400, "InvalidRequestContent"},
		"two values":                   {"PUT", base + "/plant", whole(`{}`) + whole(`{}`), 400, "InvalidRequestContent"},
		"an array":                     {"PUT", base + "/plant", "[]", 400, "InvalidRequestContent"},
		"too large":                    {"PUT", base + "/plant", `{"tags":{"a":"` + strings.Repeat("a", 1<<20) + `"}}`, 413, "413000"},
		"deep":                         {"PUT", base + "/plant", strings.Repeat(`{"properties":`, 20000), 400, "InvalidRequestContent"},
		"a public network of a kind":   {"PUT", base + "/plant", whole(`{"publicNetworkAccess":"Perhaps"}`), 400, "400004"},
		"101 IP rules":                 {"PUT", base + "/plant", rules(101), 400, "400004"},
		"100 IP rules":                 {"PUT", base + "/plant", rules(100), 200, ""},
		"an IP rule of no action":      {"PUT", base + "/plant", whole(`{"ipFilterRules":[{"filterName":"a","action":"Maybe","ipMask":"10.0.0.0/8"}]}`), 400, "400004"},
		"an IP rule of no mask":        {"PUT", base + "/plant", whole(`{"ipFilterRules":[{"filterName":"a","action":"Accept","ipMask":"10.0.0.0/33"}]}`), 400, "400004"},
		"an IP rule of another target": {"PUT", base + "/plant", whole(`{"ipFilterRules":[{"filterName":"a","action":"Accept","ipMask":"10.0.0.0/8","target":"x"}]}`), 400, "400004"},
		"IP rules of one name":         {"PUT", base + "/plant", whole(`{"ipFilterRules":[{"filterName":"a","action":"Accept","ipMask":"10.0.0.0/8"},{"filterName":"A","action":"Reject","ipMask":"::/0"}]}`), 400, "400004"},
		"51 tags":                      {"PATCH", base + "/plant", tags(51), 400, "400004"},
		"50 tags":                      {"PATCH", base + "/plant", tags(50), 200, ""},
		"a tag with a slash":           {"PATCH", base + "/plant", `{"tags":{"a/b":""}}`, 400, "400004"},
		"a tag that is no text":        {"PATCH", base + "/plant", `{"tags":{"a":1}}`, 400, "400004"},
		"a bad name":                   {"PUT", base + "/-plant", whole(`{}`), 400, "400004"},
		"digits":                       {"PUT", base + "/12345", whole(`{}`), 400, "400004"},
		"a bad group":                  {"GET", "/subscriptions/" + sub + "/resourceGroups/a%20b/providers/Microsoft.Devices/provisioningServices", "", 400, "400004"},
		"a bad subscription":           {"GET", "/subscriptions/%2e%2e/providers/Microsoft.Devices/provisioningServices", "", 400, "400004"},
		"an empty segment":             {"GET", base + "//plant", "", 400, "400000"},
		"another provider":             {"GET", "/subscriptions/" + sub + "/resourceGroups/" + group + "/providers/Microsoft.Compute/virtualMachines", "", 404, "InvalidResourceType"},
		"nothing there":                {"GET", base + "/plant/wheels", "", 404, "InvalidResourceType"},
		"too far":                      {"GET", base + "/plant/skus/a", "", 404, "InvalidResourceType"},
		"another method":               {"POST", base + "/plant", "", 405, "405000"},
		"GET of keys":                  {"GET", base + "/plant/listkeys", "", 405, "405000"},
		"no version":                   {"GET", base + "/plant?", "", 400, "MissingApiVersionParameter"},
		"no such version":              {"GET", base + "/plant?api-version=latest", "", 400, "InvalidApiVersionParameter"},
		"a newer version":              {"GET", base + "/plant?api-version=2026-08-31", "", 200, ""},
		"a skip token":                 {"GET", base + "?api-version=2022-02-05&$skipToken=%00", "", 400, "400000"},
		"in other cases":               {"GET", strings.ToUpper(base) + "/PLANT/", "", 200, ""},
		"the certificate ..":           {"GET", base + "/plant/certificates/%2e%2e", "", 400, "400004"},
		"a certificate with a slash":   {"GET", base + "/plant/certificates/a%2fb", "", 400, "400004"},
		"quotas of a kind":             {"PUT", base + "/plant", whole(`{"touchmark":{"quotas":"all"}}`), 400, "400004"},
		"no operation":                 {"GET", base + "/plant/operationresults/x", "", 404, "ResourceNotFound"},
	} {
		t.Run(name, func(t *testing.T) {
			r := b.call(x.method, x.path, x.body)
			if r.status != x.status {
				t.Fatalf("%d %.300s", r.status, r.text)
			}
			if x.code == "" {
				return
			}
			detail, _ := r.body["error"].(map[string]any)
			if r.header.Get("X-Ms-Error-Code") != x.code || detail["code"] != x.code || detail["message"] != r.body["message"] || fmt.Sprint(r.body["code"]) == "" ||
				r.body["httpStatusCode"] != strings.ReplaceAll(http.StatusText(x.status), " ", "") || r.header.Get("X-Ms-Request-Id") == "" {
				t.Errorf("%v %s", r.header, r.text)
			}
		})
	}
	if r := b.call("GET", base+"/plant", "", "X-Ms-Correlation-Request-Id", "abc-1"); r.header.Get("X-Ms-Correlation-Request-Id") != "abc-1" {
		t.Error("the correlation ID does not come back")
	}
	if r := b.call("PUT", base+"/plant", whole(`{}`), "If-None-Match", "*"); r.status != 412 {
		t.Errorf("If-None-Match: %d", r.status)
	}
	if r := b.call("PUT", base+"/nobody", whole(`{}`), "If-Match", "*"); r.status != 412 {
		t.Errorf("If-Match of nothing: %d", r.status)
	}
	// The error code is what Azure's client calls it.
	d := description()
	d.Properties.AllocationPolicy = to.Ptr(dpsarm.AllocationPolicy("Custom"))
	if _, err := b.services().BeginCreateOrUpdate(t.Context(), group, "plant", d, nil); code(err) != "400 400004" {
		t.Error(err)
	}
}

// Private endpoint connections are kept as they are told. DPS-S 81.
func TestPrivateEndpoints(t *testing.T) {
	b := newBench(t)
	ctx, c := t.Context(), b.services()
	b.put("plant", description())
	if r := b.call("GET", base+"/plant/privateEndpointConnections", ""); r.text != "[]" {
		t.Errorf("none: %s", r.text)
	}
	in := dpsarm.PrivateEndpointConnection{Properties: &dpsarm.PrivateEndpointConnectionProperties{
		PrivateLinkServiceConnectionState: &dpsarm.PrivateLinkServiceConnectionState{Status: to.Ptr(dpsarm.PrivateLinkServiceConnectionStatusApproved), Description: to.Ptr("by jo")}}}
	for range 2 {
		p, err := c.BeginCreateOrUpdatePrivateEndpointConnection(ctx, group, "plant", "pe-1", in, nil)
		if err != nil {
			t.Fatal(err)
		}
		if r, err := p.PollUntilDone(ctx, poll); err != nil || *r.Name != "pe-1" || *r.Properties.PrivateLinkServiceConnectionState.Status != dpsarm.PrivateLinkServiceConnectionStatusApproved {
			t.Errorf("%+v, %v", r, err)
		}
	}
	b.put("plant", b.get("plant")) // which keeps them
	if all, err := c.ListPrivateEndpointConnections(ctx, group, "plant", nil); err != nil || len(all.PrivateEndpointConnectionArray) != 1 {
		t.Errorf("%+v, %v", all, err)
	}
	if len(b.get("plant").Properties.PrivateEndpointConnections) != 1 {
		t.Error("the service does not show it")
	}
	if r, err := c.GetPrivateEndpointConnection(ctx, group, "plant", "PE-1", nil); err != nil || *r.ID != base+"/plant/privateEndpointConnections/pe-1" {
		t.Errorf("%+v, %v", r, err)
	}
	if _, err := c.GetPrivateEndpointConnection(ctx, group, "plant", "pe-2", nil); code(err) != "404 ResourceNotFound" {
		t.Error(err)
	}
	for name, body := range map[string]string{
		"no state": `{"properties":{}}`, "no description": `{"properties":{"privateLinkServiceConnectionState":{"status":"Pending"}}}`,
		"a state of no kind": `{"properties":{"privateLinkServiceConnectionState":{"status":"Hanging","description":"x"}}}`,
		"long":               `{"properties":{"privateLinkServiceConnectionState":{"status":"Pending","description":"` + strings.Repeat("x", 5000) + `"}}}`,
	} {
		if r := b.call("PUT", base+"/plant/privateEndpointConnections/pe-3", body); r.status != 400 {
			t.Errorf("%s: %d", name, r.status)
		}
	}
	links, err := c.ListPrivateLinkResources(ctx, group, "plant", nil)
	if err != nil || len(links.Value) != 1 || *links.Value[0].Properties.GroupID != "iotDps" {
		t.Errorf("%+v, %v", links, err)
	}
	if one, err := c.GetPrivateLinkResources(ctx, group, "plant", "iotdps", nil); err != nil || *one.Name != "iotDps" {
		t.Errorf("%+v, %v", one, err)
	}
	for range 2 { // the second finds nothing to delete
		p, err := c.BeginDeletePrivateEndpointConnection(ctx, group, "plant", "pe-1", nil)
		if err == nil {
			_, err = p.PollUntilDone(ctx, poll)
		}
		if err != nil {
			t.Error(err)
		}
	}
	if r := b.call("GET", base+"/plant/privateEndpointConnections", ""); r.text != "[]" {
		t.Errorf("deleted: %s", r.text)
	}
}

// Lists come in pages, each service once, while others come.
func TestPages(t *testing.T) {
	b := newBench(t)
	const n = 230
	for i := range n {
		if _, _, err := registration.EditScope(t.Context(), b.store, fmt.Sprintf("0ne%08X", i*7919), registration.Actor{Name: "test"}, "put", time.Now(), func(*registration.Scope) (*registration.Scope, error) {
			sc := &registration.Scope{ID: fmt.Sprintf("0ne%08X", i*7919), Name: fmt.Sprintf("svc-%d", i), Subscription: sub, ResourceGroup: group, Location: "x"}
			if i%2 == 1 {
				sc.ResourceGroup = "odd"
			}
			return sc, nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	seen, pages := make(map[string]int), 0
	for pager := b.services().NewListBySubscriptionPager(nil); pager.More(); pages++ {
		page, err := pager.NextPage(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, v := range page.Value {
			seen[*v.Name]++
		}
		b.put(fmt.Sprintf("new-%d", pages), description())
	}
	for i := range n {
		if seen[fmt.Sprintf("svc-%d", i)] != 1 {
			t.Errorf("svc-%d came %d times", i, seen[fmt.Sprintf("svc-%d", i)])
		}
	}
	if pages != 3 {
		t.Errorf("%d pages", pages)
	}
	even := 0
	for pager := b.services().NewListByResourceGroupPager(strings.ToUpper("odd"), nil); pager.More(); {
		page, err := pager.NextPage(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		even += len(page.Value)
	}
	if even != n/2 {
		t.Errorf("%d in a resource group", even)
	}
}
