package hub_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/hub"
	"github.com/touchmark/touchmark/pkg/hub/hubtest"
	"github.com/touchmark/touchmark/pkg/mqtt"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

func admit(t *testing.T, h registration.Hub, d *registration.HubDevice) {
	t.Helper()
	if _, err := h.Admit(t.Context(), d); err != nil {
		t.Fatal(err)
	}
}

func temporary(t *testing.T, err error) *registration.HubError {
	t.Helper()
	e, ok := errors.AsType[*registration.HubError](err)
	if !ok || !e.Temporary {
		t.Fatalf("not temporary: %v", err)
	}
	return e
}

func forGood(t *testing.T, err error) *registration.HubError {
	t.Helper()
	e, ok := errors.AsType[*registration.HubError](err)
	if !ok || e.Temporary {
		t.Fatalf("not for good: %v", err)
	}
	return e
}

// What devices may do at a real broker, by what it was told.
func TestMosquittoDevices(t *testing.T) {
	registrationtest.Goroutines(t)
	m := hubtest.StartMosquitto(t)
	h := open(t, hub.Config{Hub: m.Linked("mq.example.net")})
	keys := hubtest.Keys()
	admit(t, h, &registration.HubDevice{ID: "pump-1", Keys: keys})
	leaf, other := m.Leaf(t, "pump-2"), m.Leaf(t, "pump-9")
	admit(t, h, &registration.HubDevice{ID: "pump-2", Thumbprints: []string{hubtest.Thumbprint()}})

	connect := func(t *testing.T, id, password string, leaf *attesttest.Holder) *hubtest.Device {
		t.Helper()
		d, err := m.Connect(t, id, password, leaf)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	refused := func(t *testing.T, err error) {
		t.Helper()
		if !errors.Is(err, hubtest.ErrRefused) {
			t.Errorf("not refused: %v", err)
		}
	}
	// own is a device that reads what it wrote, and nothing of others.
	own := func(t *testing.T, d *hubtest.Device, id string) {
		t.Helper()
		if err := d.Subscribe("devices/" + id + "/#"); err != nil {
			t.Fatal(err)
		}
		d.Publish("devices/"+id+"/events", "42")
		if got, err := d.Next(); err != nil || got != "devices/"+id+"/events 42" {
			t.Errorf("%q, %v", got, err)
		}
	}
	t.Run("key", func(t *testing.T) { own(t, connect(t, "pump-1", keys.PrimaryKey, nil), "pump-1") })
	t.Run("certificate", func(t *testing.T) { own(t, connect(t, "pump-2", "", leaf), "pump-2") })
	t.Run("not admitted", func(t *testing.T) {
		_, err := m.Connect(t, "pump-9", keys.PrimaryKey, nil)
		refused(t, err)
		_, err = m.Connect(t, "pump-1", hubtest.Keys().PrimaryKey, nil)
		refused(t, err)
		_, err = m.Connect(t, "pump-1", "", nil)
		refused(t, err)
		_, err = m.Connect(t, "pump-2", "", nil) // it has a certificate, and no password
		refused(t, err)
		// The broker lets in who has a certificate of its root. There is nothing that such a device may do.
		refused(t, connect(t, "pump-9", "", other).Subscribe("devices/pump-9/#"))
	})
	t.Run("client ID of another", func(t *testing.T) {
		d := connect(t, "pump-2", "", leaf)
		_, err := m.ConnectAs(t, "pump-2", "pump-1", keys.PrimaryKey, nil)
		refused(t, err)
		own(t, d, "pump-2")
	})
	t.Run("topics of others", func(t *testing.T) {
		watch := connect(t, "pump-2", "", leaf)
		if err := watch.Subscribe("devices/pump-2/#"); err != nil {
			t.Fatal(err)
		}
		d := connect(t, "pump-1", keys.PrimaryKey, nil)
		for _, filter := range []string{"devices/pump-2/#", "devices/pump-2/events", "devices/#", "devices/+/events", "#", "+/#", "$CONTROL/#", "$SYS/#"} {
			refused(t, d.Subscribe(filter))
		}
		d.Publish("devices/pump-2/events", "forged")
		d.Publish("$CONTROL/dynamic-security/v1", `{"commands":[{"command":"deleteClient","username":"pump-2"}]}`)
		watch.Publish("devices/pump-2/events", "mine")
		if got, err := watch.Next(); err != nil || got != "devices/pump-2/events mine" {
			t.Errorf("%q, %v", got, err)
		}
		if _, err := h.Device(t.Context(), "pump-2"); err != nil {
			t.Error(err)
		}
	})
	t.Run("the same again leaves it connected", func(t *testing.T) {
		d := connect(t, "pump-1", keys.PrimaryKey, nil)
		admit(t, h, &registration.HubDevice{ID: "pump-1", Keys: keys})
		own(t, d, "pump-1")
	})
	t.Run("another key", func(t *testing.T) {
		d := connect(t, "pump-1", keys.PrimaryKey, nil)
		next := hubtest.Keys()
		admit(t, h, &registration.HubDevice{ID: "pump-1", Keys: next})
		if _, err := d.Next(); err == nil {
			t.Error("it is still connected")
		}
		_, err := m.Connect(t, "pump-1", keys.PrimaryKey, nil)
		refused(t, err)
		own(t, connect(t, "pump-1", next.PrimaryKey, nil), "pump-1")
		keys = next
	})
	t.Run("from a key to a certificate", func(t *testing.T) {
		was, leaf := hubtest.Keys(), m.Leaf(t, "pump-3")
		admit(t, h, &registration.HubDevice{ID: "pump-3", Keys: was})
		admit(t, h, &registration.HubDevice{ID: "pump-3", Thumbprints: []string{hubtest.Thumbprint()}})
		_, err := m.Connect(t, "pump-3", was.PrimaryKey, nil)
		refused(t, err)
		own(t, connect(t, "pump-3", "", leaf), "pump-3")
	})
	t.Run("disabled", func(t *testing.T) {
		keys := hubtest.Keys()
		admit(t, h, &registration.HubDevice{ID: "pump-4", Keys: keys, Disabled: true})
		_, err := m.Connect(t, "pump-4", keys.PrimaryKey, nil)
		refused(t, err)
		m.Control(t, "enableClient", "pump-4")
		own(t, connect(t, "pump-4", keys.PrimaryKey, nil), "pump-4")
		m.Control(t, "disableClient", "pump-4")
		admit(t, h, &registration.HubDevice{ID: "pump-4", Keys: keys})
		_, err = m.Connect(t, "pump-4", keys.PrimaryKey, nil)
		refused(t, err)

		leaf := m.Leaf(t, "pump-5")
		prints := []string{hubtest.Thumbprint()}
		admit(t, h, &registration.HubDevice{ID: "pump-5", Thumbprints: prints, Disabled: true})
		refused(t, connect(t, "pump-5", "", leaf).Subscribe("devices/pump-5/#"))
		m.Control(t, "enableClient", "pump-5")
		admit(t, h, &registration.HubDevice{ID: "pump-5", Thumbprints: prints})
		own(t, connect(t, "pump-5", "", leaf), "pump-5")
		m.Control(t, "disableClient", "pump-5")
		admit(t, h, &registration.HubDevice{ID: "pump-5", Thumbprints: prints})
		refused(t, connect(t, "pump-5", "", leaf).Subscribe("devices/pump-5/#"))
	})
	t.Run("roles that an operator gave stay", func(t *testing.T) {
		m.Control(t, "createRole", "news")
		m.Control(t, "addRoleACL", "news", "subscribePattern", "news/#", "allow")
		m.Control(t, "addClientRole", "pump-1", "news")
		keys = hubtest.Keys()
		admit(t, h, &registration.HubDevice{ID: "pump-1", Keys: keys})
		d := connect(t, "pump-1", keys.PrimaryKey, nil)
		if err := d.Subscribe("news/today"); err != nil {
			t.Error(err)
		}
		own(t, d, "pump-1")
	})
	t.Run("removed", func(t *testing.T) {
		d := connect(t, "pump-1", keys.PrimaryKey, nil)
		for _, id := range []string{"pump-1", "pump-2"} {
			if err := h.Remove(t.Context(), id); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := d.Next(); err == nil {
			t.Error("it is still connected")
		}
		_, err := m.Connect(t, "pump-1", keys.PrimaryKey, nil)
		refused(t, err)
		refused(t, connect(t, "pump-2", "", leaf).Subscribe("devices/pump-2/#"))
		if roles := m.Control(t, "listRoles"); strings.Contains(roles, "touchmark:pump-1\n") {
			t.Errorf("its role stayed: %s", roles)
		}
	})
	t.Run("clients of others are left alone", func(t *testing.T) {
		for _, id := range []string{"admin", "dps"} {
			_, err := h.Admit(t.Context(), &registration.HubDevice{ID: id, Keys: hubtest.Keys()})
			if e := forGood(t, err); e.Code != "ClientNotOurs" {
				t.Errorf("%s: %v", id, err)
			}
			if _, err := h.Device(t.Context(), id); !errors.Is(err, registration.ErrNotFound) {
				t.Errorf("%s: %v", id, err)
			}
			if err := h.Remove(t.Context(), id); err != nil {
				t.Errorf("%s: %v", id, err)
			}
			m.Control(t, "getClient", id)
		}
	})
	t.Run("IDs that are more than one level of a topic", func(t *testing.T) {
		for _, id := range []string{"+", "#", "a/b", "%c", "%u"} {
			_, err := h.Admit(t.Context(), &registration.HubDevice{ID: id, Keys: hubtest.Keys()})
			forGood(t, err)
		}
	})
	t.Run("a client that has no client ID gets it", func(t *testing.T) {
		keys := hubtest.Keys()
		h := open(t, hub.Config{Hub: m.Linked("mq.example.net")})
		admit(t, h, &registration.HubDevice{ID: "pump-6", Keys: keys})
		m.Edit(t, func(text string) string {
			return regexp.MustCompile(`"clientid":\s*"pump-6",`).ReplaceAllString(text, "")
		})
		if _, err := m.ConnectAs(t, "pump-7", "pump-6", keys.PrimaryKey, nil); err != nil {
			t.Fatal(err)
		}
		admit(t, open(t, hub.Config{Hub: m.Linked("mq.example.net")}), &registration.HubDevice{ID: "pump-6", Keys: keys})
		_, err := m.ConnectAs(t, "pump-7", "pump-6", keys.PrimaryKey, nil)
		refused(t, err)
	})
	t.Run("a broker that by default lets everybody do anything", func(t *testing.T) {
		for _, access := range []string{"publishClientSend", "subscribe"} {
			m.Edit(t, func(text string) string {
				edited := regexp.MustCompile(`"`+access+`":\s*false`).ReplaceAllString(text, `"`+access+`":true`)
				if edited == text {
					t.Fatalf("no %s in %s", access, text)
				}
				return edited
			})
			h := open(t, hub.Config{Hub: m.Linked("mq.example.net")})
			if e := forGood(t, h.Check(t.Context())); e.Code != "DefaultAccess" {
				t.Error(e)
			}
			m.Edit(t, func(text string) string {
				return regexp.MustCompile(`"`+access+`":\s*true`).ReplaceAllString(text, `"`+access+`":false`)
			})
		}
	})
}

func TestMosquittoGone(t *testing.T) {
	registrationtest.Goroutines(t)
	m := hubtest.StartMosquitto(t)
	linked := m.Linked("mq.example.net")
	c := newClock()
	h := open(t, hub.Config{Hub: linked, Now: c.Now})
	d := &registration.HubDevice{ID: "pump-1", Keys: hubtest.Keys()}
	admit(t, h, d)
	c.Forward(time.Minute)
	admit(t, h, d) // on the same connection, which is there
	m.Kill(t)
	temporary(t, h.Check(t.Context()))
	if _, err := h.Admit(t.Context(), d); temporary(t, err).Code != "Unreachable" {
		t.Error(err)
	}
	m.Start(t)
	admit(t, h, d)
	m.Kill(t) // and again, while nobody asks
	m.Start(t)
	c.Forward(time.Minute)
	if created, err := h.Admit(t.Context(), d); err != nil || created {
		t.Errorf("after a restart: %v, %v", created, err)
	}
	m.Kill(t) // and again, too soon for the connection to be asked whether it stands
	m.Start(t)
	if _, err := h.Admit(t.Context(), d); temporary(t, err).Code != "Unreachable" {
		t.Error(err)
	}
	admit(t, h, d)
	own, err := m.Connect(t, d.ID, d.Keys.PrimaryKey, nil)
	if err == nil {
		err = own.Subscribe("devices/pump-1/#")
	}
	if err != nil {
		t.Errorf("after three restarts: %v", err)
	}

	t.Run("wrong password", func(t *testing.T) {
		wrong := linked
		wrong.ConnectionString = strings.Replace(linked.ConnectionString, "Password=", "Password=x", 1)
		if e := forGood(t, open(t, hub.Config{Hub: wrong}).Check(t.Context())); e.Code != "Unauthorized" || strings.Contains(e.Error(), "correct-horse") {
			t.Error(e)
		}
	})
	t.Run("a user without rights", func(t *testing.T) {
		admit(t, h, d)
		device := linked
		device.ConnectionString = strings.NewReplacer("Username=dps", "Username=pump-1", "Password=correct-horse", "Password="+d.Keys.PrimaryKey).Replace(linked.ConnectionString)
		if e := forGood(t, open(t, hub.Config{Hub: device}).Check(t.Context())); e.Code != "Unauthorized" {
			t.Error(e)
		}
	})
	t.Run("a certificate of somebody else", func(t *testing.T) {
		other := linked
		root := hubtest.StartStub(t)
		other.ConnectionString = linked.ConnectionString[:strings.Index(linked.ConnectionString, ";CA=")] + ";CA=" + root.CA()
		temporary(t, open(t, hub.Config{Hub: other}).Check(t.Context()))
	})
	t.Run("private addresses forbidden", func(t *testing.T) {
		if e := forGood(t, open(t, hub.Config{Hub: linked, PublicOnly: true}).Check(t.Context())); !strings.Contains(e.Error(), "not public") {
			t.Error(e)
		}
	})
}

// Peers that are no broker, over plain TCP, which is for loopback addresses.
func TestMosquittoHostile(t *testing.T) {
	registrationtest.Goroutines(t)
	const hello = "\x20\x02\x00\x00" + "\x90\x03\x00\x01\x00" // CONNACK, SUBACK
	answer := func(payload string) string {
		return hello + string(mqtt.AppendPublish(nil, "$CONTROL/dynamic-security/v1/response", 0, 0, []byte(payload)))
	}
	for name, c := range map[string]struct {
		says string
		hang bool
		code string
	}{
		"hangs at once":           {"", true, "Timeout"},
		"hangs after the start":   {hello, true, "Timeout"},
		"hangs up":                {"", false, "Unreachable"},
		"hangs up later":          {hello, false, "Unreachable"},
		"is not available":        {"\x20\x02\x00\x03", true, "ServerUnavailable"},
		"refuses the ID":          {"\x20\x02\x00\x02", true, "!ConnectionRefused"},
		"lets nobody subscribe":   {"\x20\x02\x00\x00\x90\x03\x00\x01\x80", true, "!Unauthorized"},
		"speaks HTTP":             {"HTTP/1.1 400 Bad Request\r\n\r\n", false, "Unreachable"},
		"answers with no JSON":    {answer("what?"), true, "!InvalidAnswer"},
		"answers somebody else":   {answer(`{"responses":[{"command":"getClient","correlationData":"1"}]}`), true, "Timeout"},
		"announces 256 megabytes": {hello + "\x30\xff\xff\xff\x7f", true, "Unreachable"},
	} {
		t.Run(name, func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			done := make(chan struct{})
			go func() {
				defer close(done)
				for {
					conn, err := l.Accept()
					if err != nil {
						return
					}
					conn.Write([]byte(c.says))
					if c.hang {
						for b := make([]byte, 4096); err == nil; _, err = conn.Read(b) {
						}
					}
					conn.Close()
				}
			}()
			t.Cleanup(func() { l.Close(); <-done })
			h := open(t, hub.Config{Timeout: 300 * time.Millisecond, Hub: registration.LinkedHub{Name: "mq", Kind: registration.HubMosquitto,
				ConnectionString: fmt.Sprintf("HostName=127.0.0.1;Port=%d;Plain=true;Username=u;Password=hush-hush", l.Addr().(*net.TCPAddr).Port)}})
			_, err = h.Device(t.Context(), "pump-1")
			e, ok := errors.AsType[*registration.HubError](err)
			if want := strings.TrimPrefix(c.code, "!"); !ok || e.Code != want || e.Temporary != (want == c.code) || strings.Contains(e.Error(), "hush") {
				t.Errorf("%v: %+v", err, e)
			}
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			if err := h.Check(ctx); !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		})
	}
	for _, bad := range []string{"192.0.2.1", "8.8.8.8"} {
		h := open(t, hub.Config{Hub: registration.LinkedHub{Kind: registration.HubMosquitto, ConnectionString: "HostName=" + bad + ";Plain=true;Username=u;Password=p"}})
		if e := forGood(t, h.Check(t.Context())); !strings.Contains(e.Error(), "no loopback address") {
			t.Error(e)
		}
	}
}
