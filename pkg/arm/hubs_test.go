package arm_test

import (
	"context"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore/to"
	dpsarm "github.com/Azure/azure-sdk-for-go/sdk/resourcemanager/deviceprovisioningservices/armdeviceprovisioningservices"

	"github.com/touchmark/touchmark/pkg/arm"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/hub"
	"github.com/touchmark/touchmark/pkg/registration"
)

// DPS-S 65, 66: what is shown masked comes back as it was stored, and not for somebody else's host.
func TestMaskedKeys(t *testing.T) {
	b := newBench(t)
	const hook = "URL=https://back.example.net/touchmark?code=functionkey;Secret=MDEyMzQ1Njc4OWFiY2RlZg=="
	r := b.call("PUT", base+"/plant", `{"location":"westeurope","sku":{"name":"S1"},"properties":{"iotHubs":[
		{"connectionString":"`+hubA+`","location":"westeurope","applyAllocationPolicy":false,"allocationWeight":7},
		{"connectionString":"`+hook+`","kind":"webhook"},
		{"name":"records.example.net","kind":"record"}]}}`)
	if r.status != 201 {
		t.Fatal(r.text)
	}
	if _, _, err := registration.EditScope(t.Context(), b.store, b.scope("plant").ID, registrationActor, "link", time.Now(), func(sc *registration.Scope) (*registration.Scope, error) {
		sc.Hubs = append(sc.Hubs, registration.LinkedHub{Name: "own.example.net", Kind: registration.HubBuiltin, FromStart: true}) // as a start links it
		return sc, nil
	}); err != nil {
		t.Fatal(err)
	}
	stored := b.scope("plant").Hubs
	for _, secret := range []string{"MDEyMzQ1", "functionkey"} {
		if strings.Contains(r.text, secret) {
			t.Errorf("the answer shows %s", secret)
		}
	}
	// Azure's client reads it, changes one thing, and writes it back without what it does not know.
	for range 3 {
		d := b.get("plant")
		d.Properties.AllocationPolicy = to.Ptr(dpsarm.AllocationPolicyGeoLatency)
		b.put("plant", d)
		if now := b.scope("plant"); !slices.Equal(now.Hubs, stored) || now.AllocationPolicy != dps.AllocationGeoLatency {
			t.Fatalf("%#v", now.Hubs)
		}
	}
	put := func(hubs string) reply {
		return b.call("PUT", base+"/plant", `{"location":"westeurope","sku":{"name":"S1"},"properties":{"iotHubs":`+hubs+`}}`)
	}
	d := b.get("plant")
	d.Properties.IotHubs[3].AllocationWeight = to.Ptr[int32](5)
	b.put("plant", d)
	if own := b.scope("plant").Hub("own.example.net"); own.FromStart || own.Kind != registration.HubBuiltin || own.Weight != 5 {
		t.Errorf("a hub of the start's that an operator changed: %#v", own)
	}
	stored = b.scope("plant").Hubs
	for name, hubs := range map[string]string{
		"masked, another host":     `[{"connectionString":"HostName=evil.example.net;SharedAccessKeyName=dps;SharedAccessKey=****","location":"x"}]`,
		"masked, another policy":   `[{"connectionString":"HostName=hub-a.azure-devices.net;SharedAccessKeyName=iothubowner;SharedAccessKey=****","location":"x"}]`,
		"masked, another port":     `[{"connectionString":"HostName=hub-a.azure-devices.net;Port=9;SharedAccessKeyName=dps;SharedAccessKey=****","location":"x"}]`,
		"two hosts":                `[{"connectionString":"HostName=hub-a.azure-devices.net;HostName=evil.example.net;SharedAccessKeyName=dps;SharedAccessKey=****","location":"x"}]`,
		"built in, not running":    `[{"name":"other.example.net","kind":"builtin"}]`,
		"no key":                   `[{"connectionString":"HostName=hub-b.azure-devices.net","location":"x"}]`,
		"no host":                  `[{"connectionString":"SharedAccessKeyName=dps","location":"x"}]`,
		"nothing":                  `[{}]`,
		"no location":              `[{"connectionString":"` + strings.Replace(hubA, "hub-a", "hub-b", 1) + `"}]`,
		"a weight of 0":            `[{"connectionString":"` + hubA + `","location":"x","allocationWeight":0}]`,
		"a weight of 1001":         `[{"connectionString":"` + hubA + `","location":"x","allocationWeight":1001}]`,
		"twice":                    `[{"connectionString":"` + hubA + `","location":"x"},{"connectionString":"` + strings.ToUpper(hubA[:33]) + hubA[33:] + `","location":"x"}]`,
		"a kind that there is not": `[{"connectionString":"` + hubA + `","location":"x","kind":"pigeon"}]`,
		"a managed identity":       `[{"hostName":"hub-a.azure-devices.net","authenticationType":"SystemAssigned","location":"x"}]`,
		"a host, no key stored":    `[{"hostName":"hub-c.azure-devices.net","authenticationType":"KeyBased","location":"x"}]`,
		"its text":                 `"` + hubA + `"`,
	} {
		if r := put(hubs); r.status != 400 || strings.Contains(r.text, "MDEyMzQ1") {
			t.Errorf("%s: %d %s", name, r.status, r.text)
		}
	}
	if now := b.scope("plant").Hubs; !slices.Equal(now, stored) {
		t.Errorf("refused, and changed: %#v", now)
	}
	// A newer client names the host alone; an old one writes it in capitals, or a new key.
	if r := put(`[{"hostName":"Hub-A.azure-devices.net","authenticationType":"KeyBased","location":"westeurope"}]`); r.status != 200 || b.scope("plant").Hubs[0].ConnectionString != hubA {
		t.Errorf("by host name: %s", r.text)
	}
	rolled := strings.Replace(hubA, "MDEy", "MDEz", 1)
	if r := put(`[{"connectionString":"` + rolled + `","location":"westeurope"}]`); r.status != 200 || b.scope("plant").Hubs[0].ConnectionString != rolled {
		t.Errorf("a new key: %s", r.text)
	}
	if strings.Contains(b.log.String(), "MDEyMzQ1") || strings.Contains(b.log.String(), "functionkey") {
		t.Error("the log shows a key")
	}
}

// A hub that cannot be reached is not linked, unless the caller says so; what is linked already is not asked again.
func TestHubCheck(t *testing.T) {
	var asked []string
	var mu sync.Mutex
	b := newBench(t, func(c *arm.Config) {
		c.Hubs.Check = func(ctx context.Context, _ string, h registration.LinkedHub) error {
			mu.Lock()
			asked = append(asked, h.Name)
			mu.Unlock()
			opened, err := hub.Open(hub.Config{Hub: h})
			if err != nil {
				return err
			}
			return opened.Check(ctx)
		}
	})
	body := `{"location":"westeurope","sku":{"name":"S1"},"properties":{"iotHubs":[{"connectionString":"HostName=127.0.0.1;Port=1;SharedAccessKeyName=dps;SharedAccessKey=MDEyMzQ1Njc4OWFiY2RlZg==","location":"x"}]}}`
	if r := b.call("PUT", base+"/plant", body); r.status != 401 || r.body["code"] != float64(401001) || !strings.Contains(r.text, "iothub not found") {
		t.Errorf("%d %s", r.status, r.text)
	}
	if r := b.call("PUT", base+"/plant?api-version=2022-02-05&skipHubCheck=maybe", body); r.status != 400 {
		t.Errorf("%d %s", r.status, r.text)
	}
	if r := b.call("PUT", base+"/plant?api-version=2022-02-05&skipHubCheck=true", body); r.status != 201 {
		t.Errorf("%d %s", r.status, r.text)
	}
	if r := b.call("PUT", base+"/plant", body); r.status != 200 {
		t.Errorf("linked already: %d %s", r.status, r.text)
	}
	if len(asked) != 1 {
		t.Errorf("asked: %v", asked)
	}
	// The port may stand behind the name, which goes without it.
	r := b.call("PUT", base+"/other?api-version=2022-02-05&skipHubCheck=true", strings.Replace(body, "127.0.0.1;Port=1", "127.0.0.1:1", 1))
	if r.status != 201 || !strings.Contains(r.text, `"name":"127.0.0.1"`) {
		t.Errorf("a port behind the name: %d %s", r.status, r.text)
	}
}
