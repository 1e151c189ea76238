package registration_test

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
	"github.com/touchmark/touchmark/pkg/sqlstore"
)

func rule(accept bool, mask, target string) registration.IPRule {
	return registration.IPRule{Name: mask + target, Accept: accept, Mask: mask, Target: target}
}

// filtered has the fixture's scope go by these rules, and returns a replica that lets a private network in.
func filtered(t testing.TB, f *registrationtest.Fixture, closed bool, rules ...registration.IPRule) *registration.Service {
	t.Helper()
	if _, _, err := registration.EditScope(t.Context(), f.Store, registrationtest.Scope, operator, "put", f.Now(), func(sc *registration.Scope) (*registration.Scope, error) {
		if sc == nil {
			sc = &registration.Scope{ID: registrationtest.Scope, Name: "filtered", Settings: registration.Settings{Hubs: registration.Records("a.example")}}
		}
		sc.PublicAccessDisabled, sc.IPFilter = closed, rules
		return sc, nil
	}); err != nil {
		t.Fatal(err)
	}
	return registration.New(registration.Config{Store: f.Store, Scope: registrationtest.Scope, Now: f.Now, PrivateNetworks: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("fd00::/8")}})
}

// DPS-S 80: the first match decides, and without one everybody is let in.
func TestFilter(t *testing.T) {
	f := registrationtest.NewFixture(t, "a.example")
	const device, service = registration.DeviceAPI, registration.ServiceAPI
	for name, x := range map[string]struct {
		closed bool
		rules  []registration.IPRule
		in     []string // "remote api"
		out    []string
	}{
		"no rules":        {false, nil, []string{"192.0.2.1:1 " + device, "nonsense " + device, " " + service}, nil},
		"first match":     {false, []registration.IPRule{rule(true, "192.0.2.0/25", "all"), rule(false, "192.0.2.0/24", "all")}, []string{"192.0.2.5:1 " + device, "198.51.100.1:1 " + service}, []string{"192.0.2.200:1 " + device, "192.0.2.200:1 " + service}},
		"the other order": {false, []registration.IPRule{rule(false, "192.0.2.0/24", "all"), rule(true, "192.0.2.0/25", "all")}, []string{"198.51.100.1:1 " + device}, []string{"192.0.2.5:1 " + device}},
		"devices":         {false, []registration.IPRule{rule(false, "0.0.0.0/0", device)}, []string{"192.0.2.5:1 " + service, "[2001:db8::1]:1 " + device}, []string{"192.0.2.5:1 " + device, "127.0.0.1:1 " + device, "[::ffff:192.0.2.5]:1 " + device}},
		"the service":     {false, []registration.IPRule{rule(false, "0.0.0.0/0", service), rule(false, "::/0", service)}, []string{"192.0.2.5:1 " + device}, []string{"192.0.2.5:1 " + service, "[2001:db8::1]:1 " + service, "[fe80::1%eth0]:1 " + service}},
		"one address":     {false, []registration.IPRule{rule(false, "192.0.2.5", "all"), rule(false, "2001:db8::5", "all")}, []string{"192.0.2.6:1 " + device}, []string{"192.0.2.5:443 " + device, "192.0.2.5 " + device, "[2001:db8::5]:1 " + device}},
		"bits behind":     {false, []registration.IPRule{rule(false, "192.0.2.77/24", "all")}, nil, []string{"192.0.2.1:1 " + device}},
		"unreadable":      {false, []registration.IPRule{rule(true, "0.0.0.0/0", "all")}, nil, []string{"nonsense " + device, " " + device}},
		"not public": {true, []registration.IPRule{rule(true, "0.0.0.0/0", "all"), rule(false, "127.0.0.0/8", "all")}, []string{"127.0.0.1:1 " + device, "[::1]:1 " + service, "10.1.2.3:1 " + device, "[fd00::1]:1 " + service},
			[]string{"192.0.2.1:1 " + device, "10.2.0.1:1 " + service, "[2001:db8::1]:1 " + device}},
	} {
		s := filtered(t, f, x.closed, x.rules...)
		for i, list := range [][]string{x.in, x.out} {
			for _, c := range list {
				remote, api, _ := strings.Cut(c, " ")
				if err := s.Admits(t.Context(), remote, api); (err == nil) != (i == 0) || err != nil && !errors.Is(err, registration.ErrAddress) {
					t.Errorf("%s: %q to %s: %v", name, remote, api, err)
				} else if want := map[bool]string{true: "network-off", false: "address"}[x.closed]; err != nil && registration.RuleOf(err) != want {
					t.Errorf("%s: %q to %s: by rule %q, not %s", name, remote, api, registration.RuleOf(err), want)
				}
			}
		}
	}
	for name, rules := range map[string][]registration.IPRule{
		"no name": {{Mask: "10.0.0.0/8", Target: "all"}}, "no mask": {{Name: "a", Target: "all"}}, "no target": {{Name: "a", Mask: "10.0.0.0/8"}}, "a long name": {{Name: strings.Repeat("a", 129), Mask: "10.0.0.0/8", Target: "all"}},
		"one name": {rule(true, "10.0.0.0/8", "all"), rule(false, "10.0.0.0/8", "all")}, "mapped": {rule(true, "::ffff:10.0.0.0/104", "all")}, "a zone": {rule(true, "fe80::1%eth0", "all")},
	} {
		sc := &registration.Scope{ID: "0ne1", Name: "plant", Settings: registration.Settings{IPFilter: rules}}
		if err := registration.CheckScope(sc); dps.AsError(err).Code != dps.CodeInvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Every way in is closed to a device whose address is: register, status, lookup and challenge, by key and by certificate, also for
// one that got in before; and open again at once. DPS-S 80.
func TestFilteredDevices(t *testing.T) {
	f := registrationtest.NewFixture(t, "a.example")
	s := filtered(t, f, false)
	req := request(f.Derived("dev-1"))
	req.Remote = "192.0.2.1:7"
	op, err := s.Register(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	other := request(f.Derived("dev-2"))
	other.Remote = "198.51.100.1:7"
	ways := map[string]func() error{
		"register": func() error { _, err := s.Register(t.Context(), req); return err },
		"status":   func() error { _, err := s.Status(t.Context(), req, op.OperationID); return err },
		"lookup":   func() error { _, err := s.Lookup(t.Context(), req); return err },
	}
	for round := range 3 {
		filtered(t, f, round == 1, rule(false, "192.0.2.0/24", registration.AllAPIs))
		if round == 2 {
			filtered(t, f, false, rule(false, "192.0.2.0/24", registration.ServiceAPI))
		}
		if _, err := s.Register(t.Context(), other); (err == nil) == (round == 1) {
			t.Errorf("round %d, another device: %v", round, err)
		}
		for name, way := range ways {
			err := way()
			if e := dps.AsError(err); round < 2 && (e.Code != dps.CodeUnauthorized || e.Message != "Unauthorized") || round == 2 && err != nil {
				t.Errorf("round %d, %s: %v", round, name, err)
			}
		}
	}
}

// Rules that are taken match what they say, and none panics.
func FuzzRule(f *testing.F) {
	for _, mask := range []string{"10.0.0.0/8", "192.0.2.1", "::/0", "fe80::1%eth0", "10.0.0.0/33", "::ffff:1.2.3.4/120", "010.0.0.1", "1.2.3", ""} {
		f.Add("name", mask, "all", "10.0.0.1")
	}
	store, err := sqlstore.Open(f.Context(), sqlstore.Config{DataKey: make([]byte, 32)})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = store.Close() })
	f.Fuzz(func(t *testing.T, name, mask, target, remote string) {
		sc := &registration.Scope{ID: "0ne1", Name: "plant", Settings: registration.Settings{IPFilter: []registration.IPRule{{Name: name, Mask: mask, Target: target}}}}
		if registration.CheckScope(sc) != nil {
			return
		}
		fx := registration.New(registration.Config{Store: store, Scope: "0ne1", Settings: sc.Settings})
		err := fx.Admits(t.Context(), remote, registration.DeviceAPI)
		a, aerr := netip.ParseAddr(remote)
		p, perr := netip.ParsePrefix(mask)
		if aerr == nil && perr == nil && target == registration.AllAPIs {
			if inside := p.Contains(a.Unmap().WithZone("")); inside != (err != nil) {
				t.Errorf("%s in %s: %t, %v", remote, mask, inside, err)
			}
		}
	})
}
