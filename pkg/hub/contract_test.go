package hub_test

import (
	"testing"

	"github.com/touchmark/touchmark/pkg/hub"
	"github.com/touchmark/touchmark/pkg/hub/hubtest"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

// open opens a hub and closes it when the test has ended.
func open(t testing.TB, cfg hub.Config) registration.Hub {
	t.Helper()
	h, err := hub.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if c, ok := h.(interface{ Close() error }); ok {
		t.Cleanup(func() { c.Close() })
	}
	return h
}

func opener(linked registration.LinkedHub) func(testing.TB) registration.Hub {
	var pool *hub.Pool
	return func(t testing.TB) registration.Hub {
		if pool == nil {
			pool = hub.NewPool(hub.PoolConfig{})
		}
		h, err := pool.Hub("0ne00000001", linked)
		if err != nil {
			t.Fatal(err)
		}
		return h
	}
}

// What IoT Hub takes in IDs beside letters, digits, "-", "." and "_".
var oddIDs = []string{":", "%25", "%2e", "*", "?", "!", "(a)", ",", "=", "@", "$", "'", "#", "+", "a;b"}

func TestAzure(t *testing.T) {
	registrationtest.Goroutines(t)
	s := hubtest.StartStub(t)
	h := open(t, hub.Config{Hub: s.Linked("hub-a.example.net")})
	hubtest.Contract(t, func(testing.TB) registration.Hub { return h }, hubtest.Caps{Twins: true, Scopes: true, IDs: oddIDs, Disable: func(_ testing.TB, id string) {
		s.Change(id, func(i map[string]any) { i["status"], i["statusReason"] = "disabled", "stolen" })
	}})
	if left := s.Devices(); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestBackend(t *testing.T) {
	registrationtest.Goroutines(t)
	b := hubtest.StartBackend(t)
	h := open(t, hub.Config{Hub: b.Linked("back.example.net")})
	hubtest.Contract(t, func(testing.TB) registration.Hub { return h }, hubtest.Caps{Twins: true, IDs: append(oddIDs, "/")})
}

// A pool's hubs keep the same promises.
func TestPooled(t *testing.T) {
	s := hubtest.StartStub(t)
	hubtest.Contract(t, opener(s.Linked("hub-a.example.net")), hubtest.Caps{Twins: true, Scopes: true})
}

func TestMosquitto(t *testing.T) {
	registrationtest.Goroutines(t)
	m := hubtest.StartMosquitto(t)
	for name, linked := range map[string]registration.LinkedHub{"password": m.Linked("mq.example.net"), "certificate": m.LinkedByCertificate(t, "mq.example.net")} {
		t.Run(name, func(t *testing.T) {
			h := open(t, hub.Config{Hub: linked})
			hubtest.Contract(t, func(testing.TB) registration.Hub { return h }, hubtest.Caps{IDs: []string{":", "*", "?", "!", "(a)", ",", "=", "@", "$", "'"}})
		})
	}
}
