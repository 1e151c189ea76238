package arm

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/touchmark/touchmark/pkg/access"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
)

const (
	resourceType = "Microsoft.Devices/ProvisioningServices"
	// ownerPolicy is what a new service has, with ownerRights (service API, section 3.3).
	ownerPolicy = "provisioningserviceowner"
	ownerRights = access.ServiceConfig | access.DeviceConnect | access.EnrollmentWrite
	maxTags     = 50
	checkTime   = 20 * time.Second
	checkAtOnce = 16
	// editAgain is how often a change is made again that another one came before.
	editAgain = 5
)

// A resource is a provisioning service on the wire (service API, section 3.3).
type resource struct {
	ID             string            `json:"id"`
	Name           string            `json:"name"`
	Type           string            `json:"type"`
	Location       string            `json:"location"`
	Tags           map[string]string `json:"tags"`
	ETag           string            `json:"etag,omitempty"`
	ResourceGroup  string            `json:"resourcegroup"`
	SubscriptionID string            `json:"subscriptionid"`
	SKU            *sku              `json:"sku"`
	Properties     *properties       `json:"properties"`
	// Identity is of newer contracts, and refused unless it is none.
	Identity *struct {
		Type string `json:"type"`
	} `json:"identity,omitempty"`
}

type sku struct {
	Name     string `json:"name"`
	Tier     string `json:"tier,omitempty"`
	Capacity *int64 `json:"capacity,omitempty"`
}

type properties struct {
	State                      string       `json:"state"`
	ProvisioningState          string       `json:"provisioningState"`
	IoTHubs                    []linkedHub  `json:"iotHubs"`
	AllocationPolicy           string       `json:"allocationPolicy"`
	ServiceOperationsHostName  string       `json:"serviceOperationsHostName"`
	DeviceProvisioningHostName string       `json:"deviceProvisioningHostName"`
	IDScope                    string       `json:"idScope"`
	AuthorizationPolicies      []policy     `json:"authorizationPolicies,omitempty"`
	IPFilterRules              []rule       `json:"ipFilterRules"`
	PublicNetworkAccess        string       `json:"publicNetworkAccess"`
	PrivateEndpointConnections []connection `json:"privateEndpointConnections"`
	EnableDataResidency        bool         `json:"enableDataResidency"`
	// Touchmark is ours. What is missing of it stays as it is: Azure's clients do not send it back.
	Touchmark *own `json:"touchmark,omitempty"`
	// Of newer contracts, and refused.
	DisableLocalAuth        bool            `json:"disableLocalAuth,omitempty"`
	DeviceRegistryNamespace json.RawMessage `json:"deviceRegistryNamespace,omitempty"`
}

// own are the settings of a scope that Azure's contract has not.
type own struct {
	StrictRoots *bool   `json:"strictRoots,omitempty"`
	Quotas      *string `json:"quotas,omitempty"` // "azure" or "none"
}

// String hides the keys.
func (*properties) String() string { return "[redacted]" }

type linkedHub struct {
	Name                  string `json:"name"`
	ConnectionString      string `json:"connectionString"`
	Location              string `json:"location"`
	ApplyAllocationPolicy *bool  `json:"applyAllocationPolicy"`
	AllocationWeight      *int   `json:"allocationWeight"`
	// Kind is ours; Azure's clients do not send it back.
	Kind registration.HubKind `json:"kind,omitempty"`
	// Of newer contracts.
	HostName           string `json:"hostName,omitempty"`
	AuthenticationType string `json:"authenticationType,omitempty"`
}

type policy struct {
	KeyName      string `json:"keyName"`
	PrimaryKey   string `json:"primaryKey"`
	SecondaryKey string `json:"secondaryKey"`
	Rights       string `json:"rights"`
}

type rule struct {
	FilterName string `json:"filterName"`
	Action     string `json:"action"`
	IPMask     string `json:"ipMask"`
	Target     string `json:"target,omitempty"`
}

func serviceID(sc *registration.Scope) string {
	return "/subscriptions/" + sc.Subscription + "/resourceGroups/" + sc.ResourceGroup + "/providers/Microsoft.Devices/provisioningServices/" + sc.Name
}

// show returns a service as answers have it: without policies, and with the secrets of hubs masked.
func (c *call) show(sc *registration.Scope) *resource {
	one := int64(1)
	p := &properties{
		State: "Active", ProvisioningState: "Succeeded", IoTHubs: []linkedHub{}, AllocationPolicy: "Hashed", ServiceOperationsHostName: c.cfg.ServiceHost(sc),
		DeviceProvisioningHostName: c.cfg.DeviceHost, IDScope: sc.ID, IPFilterRules: []rule{}, PublicNetworkAccess: "Enabled",
		PrivateEndpointConnections: connections(sc), EnableDataResidency: sc.EnableDataResidency,
	}
	if sc.Deleting {
		p.State, p.ProvisioningState = "Deleting", "Deleting"
	}
	if sc.Erasing != nil {
		p.State, p.ProvisioningState = "Transitioning", "Transitioning"
	}
	if a := string(sc.AllocationPolicy); a != "" {
		p.AllocationPolicy = strings.ToUpper(a[:1]) + a[1:]
	}
	if sc.PublicAccessDisabled {
		p.PublicNetworkAccess = "Disabled"
	}
	quotas := cmp.Or(sc.Quotas, "none")
	p.Touchmark = &own{&sc.StrictRoots, &quotas}
	for _, h := range sc.Hubs {
		apply := !h.Reserved
		shown := linkedHub{Name: h.Name, ConnectionString: c.cfg.Hubs.Mask(h.ConnectionString), Location: h.Location, ApplyAllocationPolicy: &apply}
		if h.Weight > 0 {
			shown.AllocationWeight = &h.Weight
		}
		if h.Kind != registration.HubAzure {
			shown.Kind = h.Kind
		}
		if h.ConnectionString == "" { // clients insist on one, and send it back
			shown.ConnectionString = "HostName=" + h.Name
		}
		p.IoTHubs = append(p.IoTHubs, shown)
	}
	for _, r := range sc.IPFilter {
		action := "Reject"
		if r.Accept {
			action = "Accept"
		}
		p.IPFilterRules = append(p.IPFilterRules, rule{r.Name, action, r.Mask, r.Target})
	}
	tags := sc.Tags
	if tags == nil {
		tags = map[string]string{}
	}
	return &resource{ID: serviceID(sc), Name: sc.Name, Type: resourceType, Location: sc.Location, Tags: tags, ETag: sc.ETag, ResourceGroup: sc.ResourceGroup,
		SubscriptionID: sc.Subscription, SKU: &sku{"S1", "Standard", &one}, Properties: p}
}

// find returns the service of the path, or nil.
func (c *call) find(name string) (sc *registration.Scope, err error) {
	err = c.store.View(c.r.Context(), func(tx registration.Tx) error {
		sc, err = tx.ScopeByName(name)
		return err
	})
	if errors.Is(err, registration.ErrNotFound) {
		return nil, nil
	}
	return sc, err
}

func (c *call) here(sc *registration.Scope) bool {
	return sc != nil && strings.EqualFold(sc.Subscription, c.sub) && strings.EqualFold(sc.ResourceGroup, c.rg)
}

// must returns the service of the path.
func (c *call) must(name string) (*registration.Scope, error) {
	sc, err := c.find(name)
	if err == nil && !c.here(sc) {
		err = nothing(fmt.Sprintf("The provisioning service %s in resource group %s", name, c.rg))
	}
	return sc, err
}

// service answers what is at a service, and below.
func (c *call) service() (*answer, error) {
	name := c.next()
	if err := dps.CheckServiceName(name); err != nil {
		return nil, bad("%v", err)
	}
	need := access.ManagementWrite
	what := strings.ToLower(c.next())
	switch {
	case what == "listkeys" || what == "keys":
		need = access.ManagementKeys
	case c.r.Method == http.MethodGet:
		need = access.ManagementRead
	}
	if err := c.may(name, need); err != nil {
		return nil, err
	}
	if what == "" {
		if err := c.method(http.MethodGet, http.MethodPut, http.MethodPatch, http.MethodDelete); err != nil {
			return nil, err
		}
		if c.r.Method == http.MethodPut {
			return c.put(name)
		}
	}
	if what == "operationresults" && len(c.seg) == 1 { // of what may be gone by now
		return c.operationResult(c.seg[0])
	}
	sc, err := c.must(name)
	if err != nil {
		return nil, err
	}
	if what == "erase" && len(c.seg) == 0 {
		return c.erase(sc)
	}
	if sc.Deleting && c.r.Method != http.MethodGet && c.r.Method != http.MethodDelete {
		return nil, busy(sc)
	}
	switch n := len(c.seg); {
	case what == "" && c.r.Method == http.MethodGet:
		return ok(c.show(sc)), nil
	case what == "" && c.r.Method == http.MethodPatch:
		return c.patch(sc)
	case what == "":
		return c.delete(sc)
	case what == "listkeys" && n == 0:
		return c.listKeys(sc, "")
	case what == "keys" && n == 2 && strings.EqualFold(c.seg[1], "listkeys"):
		return c.listKeys(sc, c.seg[0])
	case what == "skus" && n == 0:
		if err := c.method(http.MethodGet); err != nil {
			return nil, err
		}
		return ok(list{[]sku{{Name: "S1"}}, nil}), nil
	case what == "certificates" && n <= 2:
		return c.certificates(sc)
	case what == "privatelinkresources" && n <= 1:
		return c.privateLinks(sc)
	case what == "privateendpointconnections" && n <= 1:
		return c.privateEndpoints(sc)
	}
	return nil, errPath
}

// list answers the services of a resource group or a subscription that the caller may read, page by page in the order of their ID
// scopes.
func (c *call) list() (*answer, error) {
	if err := c.method(http.MethodGet); err != nil {
		return nil, err
	}
	after, err := base64.RawURLEncoding.DecodeString(c.r.URL.Query().Get("$skipToken"))
	if err != nil || len(after) > dps.MaxIDScope {
		return nil, dps.NewError(dps.CodeBadRequest, "$skipToken is not one of this service", err)
	}
	page, next := []*resource{}, string(after)
	for more := true; more; {
		err := c.store.View(c.r.Context(), func(tx registration.Tx) error {
			all, err := tx.Scopes(next, pageSize)
			more = len(all) == pageSize
			for _, sc := range all {
				if len(page) == pageSize {
					more = true
					return nil
				}
				next = dps.Fold(sc.ID)
				if strings.EqualFold(sc.Subscription, c.sub) && (c.rg == "" || strings.EqualFold(sc.ResourceGroup, c.rg)) && c.who.May(sc.Name, access.ManagementRead) {
					page = append(page, c.show(sc))
				}
			}
			return err
		})
		if err != nil {
			return nil, err
		}
		if more && len(page) == pageSize {
			link := c.link(c.r.URL.Path, url.Values{"$skipToken": {base64.RawURLEncoding.EncodeToString([]byte(next))}})
			return ok(list{page, &link}), nil
		}
	}
	return ok(list{page, nil}), nil
}

// checkName says whether a name is free: of all services, for they share the names of hosts.
func (c *call) checkName() (*answer, error) {
	if err := c.method(http.MethodPost); err != nil {
		return nil, err
	}
	var in struct {
		Name string `json:"name"`
	}
	if err := c.body(&in); err != nil {
		return nil, err
	}
	if err := c.may(in.Name, access.ManagementRead); err != nil {
		return nil, err
	}
	out := struct {
		NameAvailable bool    `json:"nameAvailable"`
		Reason        string  `json:"reason"`
		Message       *string `json:"message"`
	}{true, "Invalid", nil} // with a reason, as Azure has it
	why := ""
	if err := dps.CheckServiceName(in.Name); err != nil {
		why = err.Error()
	} else if sc, err := c.find(in.Name); err != nil {
		return nil, err
	} else if sc != nil {
		out.Reason, why = "AlreadyExists", fmt.Sprintf("There is a provisioning service %s.", sc.Name)
	}
	if why != "" {
		out.NameAvailable, out.Message = false, &why
	}
	return ok(out), nil
}

// put creates a service or replaces what it goes by.
func (c *call) put(name string) (*answer, error) {
	var in resource
	if err := c.body(&in); err != nil {
		return nil, err
	}
	if in.Location == "" || in.SKU == nil || in.Properties == nil {
		return nil, bad("A provisioning service needs location, sku and properties")
	}
	switch {
	case !word(in.Location, 1, 64, " ()-"):
		return nil, bad("Location %.80q: want letters, digits and spaces", in.Location)
	case !strings.EqualFold(in.SKU.Name, "S1"):
		return nil, bad("SKU %.20q: there is S1", in.SKU.Name)
	case in.SKU.Capacity != nil && *in.SKU.Capacity != 1:
		return nil, bad("The capacity of a service is 1: it is bounded by its machine and by its limits")
	case in.Properties.DisableLocalAuth:
		return nil, bad("disableLocalAuth is not supported: shared access policies count")
	case in.Identity != nil && in.Identity.Type != "" && !strings.EqualFold(in.Identity.Type, "None"):
		return nil, bad("identity: this service has no managed identity")
	case len(in.Properties.DeviceRegistryNamespace) > 0 && string(in.Properties.DeviceRegistryNamespace) != "null":
		return nil, bad("deviceRegistryNamespace: there is no device registry")
	}
	if err := checkTags(in.Tags); err != nil {
		return nil, err
	}
	if in.Properties.AuthorizationPolicies != nil { // whoever sets keys has them
		if err := c.may(name, access.ManagementKeys); err != nil {
			return nil, err
		}
	}
	checked := make(map[registration.LinkedHub]bool)
	for range editAgain {
		a, err := c.putOnce(name, &in, checked)
		if !errors.Is(err, errMoved) {
			return a, err
		}
	}
	return nil, conflict("The provisioning service kept changing.")
}

// errMoved says that somebody else changed the service meanwhile.
var errMoved = errors.New("changed meanwhile")

func (c *call) putOnce(name string, in *resource, checked map[registration.LinkedHub]bool) (*answer, error) {
	ctx := c.r.Context()
	was, err := c.find(name)
	if err != nil {
		return nil, err
	}
	if err := c.matches(was, in.ETag); err != nil {
		return nil, err
	}
	next, action := &registration.Scope{Name: name, Subscription: c.sub, ResourceGroup: c.rg, Location: in.Location}, "create"
	switch {
	case was == nil:
		var b [4]byte
		_, _ = rand.Read(b[:]) // crypto/rand.Read never fails
		next.ID = fmt.Sprintf("0ne%X", b)
	case !c.here(was):
		return nil, dps.NewError(dps.CodeServiceExists, fmt.Sprintf("There is a provisioning service %s in another resource group.", name), nil)
	case was.Deleting:
		return nil, busy(was)
	case was.Location != "" && plain(was.Location) != plain(in.Location):
		return nil, &fault{http.StatusConflict, "InvalidResourceLocation", fmt.Sprintf("The provisioning service is in location %s, which does not change.", was.Location), nil}
	default:
		next, action = new(*was), "update"
		next.Location = in.Location
	}
	next.Tags = in.Tags
	if err := c.apply(next, in.Properties); err != nil {
		return nil, err
	}
	if err := c.checkHubs(ctx, was, next, checked); err != nil {
		return nil, err
	}
	var shown []policy
	_, is, err := registration.EditScopeWith(ctx, c.store, next.ID, c.by, action, c.cfg.Now(), func(tx registration.Tx, sc *registration.Scope) (*registration.Scope, error) {
		if (sc == nil) != (was == nil) || sc != nil && sc.Version != was.Version { // or the ID was somebody's
			return nil, errMoved
		}
		policies := in.Properties.AuthorizationPolicies
		if was == nil && !slices.ContainsFunc(policies, func(p policy) bool { return strings.EqualFold(p.KeyName, ownerPolicy) }) {
			policies = append([]policy{{KeyName: ownerPolicy, Rights: ownerRights.String()}}, policies...)
		}
		if policies != nil {
			var err error
			if shown, err = c.putPolicies(tx, next.ID, policies); err != nil {
				return nil, err
			}
		}
		is := *next
		return &is, nil
	})
	if err != nil {
		return nil, err
	}
	a := ok(c.show(is))
	if was == nil {
		a.status = http.StatusCreated
	}
	if in.Properties.AuthorizationPolicies != nil {
		a.body.(*resource).Properties.AuthorizationPolicies = shown
	}
	return a, nil
}

// matches holds the caller's idea of a service against what it is: If-Match and If-None-Match, or the etag in the body, which is
// how Azure's command line does it.
func (c *call) matches(was *registration.Scope, inBody string) error {
	want, h := c.r.Header.Get("If-Match"), c.r.Header
	if want == "" && was != nil { // that of a service that was deleted meanwhile does not keep it from being created again
		want = inBody
	}
	switch {
	case h.Get("If-None-Match") == "*" && was != nil:
		return dps.NewError(dps.CodeETagMismatch, "There is such a provisioning service", nil)
	case want != "" && was == nil, want != "" && want != "*" && strings.Trim(want, `"`) != was.ETag:
		return dps.NewError(dps.CodeETagMismatch, "The provisioning service was changed meanwhile", nil)
	}
	return nil
}

// plain is a location as locations are compared.
func plain(location string) string {
	return strings.ToLower(strings.ReplaceAll(location, " ", ""))
}

func checkTags(tags map[string]string) error {
	if len(tags) > maxTags {
		return bad("%d tags: a resource has %d at most", len(tags), maxTags)
	}
	for name, value := range tags {
		if name == "" || len(name) > 512 || len(value) > 256 || strings.ContainsAny(name, `<>%&\?/`) {
			return bad("Tag %.60q: want a name of 1 to 512 octets without <>%%&\\?/, and a value of up to 256", name)
		}
	}
	return nil
}

// apply puts what a PUT says into a scope that is to be written, in which it finds what is stored.
func (c *call) apply(sc *registration.Scope, p *properties) error {
	stored := sc.Settings
	var allocation dps.AllocationPolicy
	if p.AllocationPolicy != "" {
		b, _ := json.Marshal(p.AllocationPolicy)
		if err := json.Unmarshal(b, &allocation); err != nil {
			return bad("allocationPolicy: %v", err)
		}
	}
	if allocation == dps.AllocationHashed { // which a scope has without one
		allocation = ""
	}
	sc.AllocationPolicy, sc.EnableDataResidency = allocation, p.EnableDataResidency
	if t := p.Touchmark; t != nil {
		if t.StrictRoots != nil {
			sc.StrictRoots = *t.StrictRoots
		}
		if t.Quotas != nil {
			if *t.Quotas != "azure" && *t.Quotas != "none" {
				return bad("quotas %.20q: want azure or none", *t.Quotas)
			}
			if *t.Quotas != cmp.Or(sc.Quotas, "none") {
				sc.Quotas = *t.Quotas
			}
		}
	}
	switch strings.ToLower(p.PublicNetworkAccess) {
	case "", "enabled":
		sc.PublicAccessDisabled = false
	case "disabled":
		sc.PublicAccessDisabled = true
	default:
		return bad("publicNetworkAccess %.20q: want Enabled or Disabled", p.PublicNetworkAccess)
	}
	sc.IPFilter = nil
	for _, r := range p.IPFilterRules {
		in := registration.IPRule{Name: r.FilterName, Mask: r.IPMask}
		switch strings.ToLower(r.Action) {
		case "accept":
			in.Accept = true
		case "reject":
		default:
			return bad("IP rule %.60q: action %.20q is not Accept or Reject", r.FilterName, r.Action)
		}
		for _, t := range []string{registration.AllAPIs, registration.ServiceAPI, registration.DeviceAPI} {
			if strings.EqualFold(cmp.Or(r.Target, registration.AllAPIs), t) {
				in.Target = t
			}
		}
		if in.Target == "" {
			return bad("IP rule %.60q: target %.20q is not all, serviceApi or deviceApi", r.FilterName, r.Target)
		}
		sc.IPFilter = append(sc.IPFilter, in)
	}
	sc.Hubs = nil
	for i := range p.IoTHubs {
		h, err := c.hub(&p.IoTHubs[i], &stored)
		if err != nil {
			return err
		}
		sc.Hubs = append(sc.Hubs, *h)
	}
	return registration.CheckScope(sc)
}

// hostOf returns the host name in a connection string, as far as it has one without its being checked.
func hostOf(text string) string {
	for part := range strings.SplitSeq(text, ";") {
		name, value, _ := strings.Cut(part, "=")
		switch strings.ToLower(name) {
		case "hostname":
			host, _, _ := strings.Cut(strings.ToLower(value), ":") // the port is the connection's, not the name's
			return host
		case "url":
			if u, err := url.Parse(value); err == nil {
				return strings.ToLower(u.Hostname())
			}
		}
	}
	return ""
}

// hub reads a linked hub. What clients were shown and send back is the stored one; one that they change is not the start's any more,
// which would undo it.
func (c *call) hub(in *linkedHub, stored *registration.Settings) (*registration.LinkedHub, error) {
	h, err := c.readHub(in, stored)
	if err == nil && h.FromStart {
		h.FromStart = *h == *stored.Hub(h.Name)
	}
	return h, err
}

func (c *call) readHub(in *linkedHub, stored *registration.Settings) (*registration.LinkedHub, error) {
	if in.AuthenticationType != "" && !strings.EqualFold(in.AuthenticationType, "KeyBased") {
		return nil, bad("authenticationType %.30q: this service has no identity of its own; it links hubs by their keys, KeyBased", in.AuthenticationType)
	}
	host := strings.ToLower(cmp.Or(hostOf(in.ConnectionString), in.HostName, in.Name))
	was := stored.Hub(host)
	h := &registration.LinkedHub{Name: host, Kind: in.Kind, ConnectionString: in.ConnectionString, Location: in.Location}
	if was == nil {
		was = &registration.LinkedHub{}
	} else {
		h.Name, h.FromStart = was.Name, was.FromStart
	}
	switch {
	case h.Kind == "" && was.Kind != "":
		h.Kind = was.Kind
	case h.Kind == "" && strings.EqualFold(host, hostOf(in.ConnectionString)):
		h.Kind = registration.HubAzure
	case h.Kind == "":
		return nil, bad("Linked hub %.100q needs a connection string", host)
	}
	bare := in.ConnectionString == "" || strings.EqualFold(in.ConnectionString, "HostName="+host)
	same := h.Kind == was.Kind
	switch {
	case bare && (same && was.ConnectionString == "" || h.Kind == registration.HubRecord):
		h.ConnectionString = ""
	case same && in.ConnectionString == "":
		h.ConnectionString = was.ConnectionString
	}
	if h.Location == "" && was.Name == "" && h.Kind == registration.HubAzure {
		return nil, bad("Linked hub %.100q needs its location", host)
	}
	if !word(h.Location, 0, 64, " ()-") {
		return nil, bad("Linked hub %.100q: location %.80q: want letters, digits and spaces", host, h.Location)
	}
	if in.AllocationWeight != nil {
		if h.Weight = *in.AllocationWeight; h.Weight < 1 || h.Weight > 1000 {
			return nil, bad("Linked hub %.100q: allocationWeight must be 1 to 1000", host)
		}
	}
	h.Reserved = in.ApplyAllocationPolicy != nil && !*in.ApplyAllocationPolicy
	if same && h.ConnectionString == "" && was.ConnectionString == "" { // as it was linked by a start
		return h, nil
	}
	var err error
	if same {
		if h.ConnectionString, err = c.cfg.Hubs.Restore(h.ConnectionString, was.ConnectionString); err != nil {
			return nil, bad("Linked hub %.100q: %v", host, err)
		}
	}
	named, err := c.cfg.Hubs.Parse(h.Kind, h.ConnectionString)
	if err != nil {
		return nil, bad("Linked hub %.100q: %v", host, err)
	}
	if named != "" && !strings.EqualFold(named, host) || named == "" && !word(host, 1, 253, "-.:") {
		return nil, bad("Linked hub %.100q: that is not a host name", host)
	}
	return h, nil
}

// checkHubs asks the hubs that are new, or are reached in another way than before, whether they are there.
func (c *call) checkHubs(ctx context.Context, was, is *registration.Scope, checked map[registration.LinkedHub]bool) error {
	if c.cfg.Hubs.Check == nil {
		return nil
	}
	if skip := c.r.URL.Query().Get("skipHubCheck"); skip != "" {
		if skip, err := strconv.ParseBool(skip); err != nil {
			return bad("skipHubCheck must be true or false")
		} else if skip {
			return nil
		}
	}
	eg, ctx := errgroup.WithContext(ctx)
	ctx, cancel := context.WithTimeout(ctx, checkTime)
	defer cancel()
	eg.SetLimit(checkAtOnce)
	for _, h := range is.Hubs {
		if checked[h] || h.Kind == registration.HubRecord {
			continue
		}
		if was != nil {
			if old := was.Hub(h.Name); old != nil && old.Kind == h.Kind && old.ConnectionString == h.ConnectionString {
				continue
			}
		}
		checked[h] = true
		eg.Go(func() error {
			if err := c.cfg.Hubs.Check(ctx, is.ID, h); err != nil {
				return dps.NewError(dps.CodeHubUnreachable, fmt.Sprintf("iothub not found: %s cannot be reached with this connection string. How to link it all the same: touchmark help management.", h.Name), err)
			}
			return nil
		})
	}
	return eg.Wait()
}

// putPolicies has a scope have these policies and no others, and returns them with their keys. Keys that are left out stay, or are
// made.
func (c *call) putPolicies(tx registration.Tx, id string, in []policy) ([]policy, error) {
	stored, err := tx.Policies(dps.Fold(id))
	if err != nil {
		return nil, err
	}
	named := func(name string) func(*registration.Policy) bool {
		return func(p *registration.Policy) bool { return strings.EqualFold(p.Name, name) }
	}
	now, next := c.cfg.Now(), []*registration.Policy{}
	for _, p := range in {
		if slices.ContainsFunc(next, named(p.KeyName)) {
			return nil, bad("Policy %.80q is there twice", p.KeyName)
		}
		is := &registration.Policy{Name: p.KeyName, Rights: p.Rights}
		if i := slices.IndexFunc(stored, named(p.KeyName)); i >= 0 {
			is.Name, is.Primary, is.Secondary = stored[i].Name, stored[i].Primary, stored[i].Secondary
		}
		for i, text := range []string{p.PrimaryKey, p.SecondaryKey} {
			key, err := base64.StdEncoding.Strict().DecodeString(text)
			switch {
			case err != nil:
				return nil, bad("Policy %.80q: a key must be base64 of 16 to 64 octets", p.KeyName)
			case text == "":
			case i == 0:
				is.Primary = key
			default:
				is.Secondary = key
			}
		}
		next = append(next, is)
	}
	for _, p := range stored {
		if !slices.ContainsFunc(next, named(p.Name)) {
			if err := registration.DeletePolicy(tx, id, c.by, p.Name, now); err != nil {
				return nil, err
			}
		}
	}
	for _, p := range next {
		if err := registration.PutPolicy(tx, id, c.by, p, now); err != nil {
			return nil, err
		}
	}
	return showPolicies(next), nil
}

func showPolicies(all []*registration.Policy) []policy {
	shown := []policy{}
	for _, p := range all {
		shown = append(shown, policy{p.Name, base64.StdEncoding.EncodeToString(p.Primary), base64.StdEncoding.EncodeToString(p.Secondary), p.Rights})
	}
	return shown
}

// listKeys shows the keys of all policies, or of one. Whoever sees them is in the audit record.
func (c *call) listKeys(sc *registration.Scope, name string) (*answer, error) {
	if err := c.method(http.MethodPost); err != nil {
		return nil, err
	}
	var all []*registration.Policy
	err := c.store.Update(c.r.Context(), func(tx registration.Tx) (err error) {
		if all, err = tx.Policies(dps.Fold(sc.ID)); err != nil {
			return err
		}
		object := "scope/" + sc.Name
		if name != "" {
			i := slices.IndexFunc(all, func(p *registration.Policy) bool { return strings.EqualFold(p.Name, name) })
			if i < 0 {
				return nothing("The policy")
			}
			all, object = all[i:i+1], "policy/"+all[i].Name
		}
		return tx.PutAudit(dps.Fold(sc.ID), registration.NewAudit(c.by, "show keys", object, nil, nil, c.cfg.Now()))
	})
	switch {
	case err != nil:
		return nil, err
	case name != "":
		return ok(showPolicies(all)[0]), nil
	}
	return ok(list{showPolicies(all), nil}), nil
}

// patch changes tags, which is all that there is to change by it.
func (c *call) patch(sc *registration.Scope) (*answer, error) {
	var in map[string]json.RawMessage
	if err := c.body(&in); err != nil {
		return nil, err
	}
	tags := make(map[string]string)
	for name, value := range in {
		if !strings.EqualFold(name, "tags") {
			return nil, bad("PATCH changes tags and nothing else: use PUT")
		}
		if err := json.Unmarshal(value, &tags); err != nil {
			return nil, bad("tags must be an object of strings")
		}
	}
	if err := checkTags(tags); err != nil {
		return nil, err
	}
	_, is, err := registration.EditScope(c.r.Context(), c.store, sc.ID, c.by, "tag", c.cfg.Now(), func(sc *registration.Scope) (*registration.Scope, error) {
		if sc == nil || sc.Deleting {
			return nil, conflict("The provisioning service is being deleted.")
		}
		if err := c.matches(sc, ""); err != nil {
			return nil, err
		}
		sc.Tags = tags
		return sc, nil
	})
	if err != nil {
		return nil, err
	}
	return ok(c.show(is)), nil
}
