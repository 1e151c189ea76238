// Package hubtest has what a linked hub must do, as a suite for every kind of hub, and the hubs to run it against: a [Stub] that
// behaves as Azure IoT Hub and fails on demand, a [Backend] behind a webhook, and Debian's Mosquitto.
package hubtest

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
)

// Caps says what a hub can do.
type Caps struct {
	// Twins: it keeps them.
	Twins bool
	// Scopes: it makes scopes for edge devices, and knows parents by them only.
	Scopes bool
	// IDs that it takes beside those of letters, digits, "-", "." and "_".
	IDs []string
	// Disable bars a device at the hub, as its operator does. Nil: the suite creates a disabled one instead, and goes without.
	Disable func(t testing.TB, id string)
}

// Keys are new ones.
func Keys() *dps.SymmetricKeyAttestation {
	key := func() string {
		b := make([]byte, 32)
		rand.Read(b)
		return base64.StdEncoding.EncodeToString(b)
	}
	return &dps.SymmetricKeyAttestation{PrimaryKey: key(), SecondaryKey: key()}
}

// Thumbprint is that of no certificate.
func Thumbprint() string {
	b := make([]byte, 32)
	rand.Read(b)
	return strings.ToUpper(hex.EncodeToString(b))
}

// Contract has a hub do what [registration.Hub] promises. Open returns the same hub each time, which may have devices already.
func Contract(t *testing.T, open func(t testing.TB) registration.Hub, caps Caps) {
	ctx := t.Context()
	prefix := "t" + strings.ToLower(rand.Text()[:8]) + "-"
	fresh := func(t testing.TB) (registration.Hub, *registration.HubDevice) {
		id := prefix + strings.ToLower(rand.Text()[:8])
		h := open(t)
		t.Cleanup(func() { h.Remove(context.WithoutCancel(ctx), id) })
		return h, &registration.HubDevice{ID: id, Keys: Keys(), RegistrationID: id}
	}
	admit := func(t *testing.T, h registration.Hub, d *registration.HubDevice, want bool) {
		t.Helper()
		if created, err := h.Admit(ctx, d); err != nil || created != want {
			t.Fatalf("admitting %s: created %v, want %v, %v", d.ID, created, want, err)
		}
	}
	device := func(t *testing.T, h registration.Hub, id string) *registration.HubDevice {
		t.Helper()
		d, err := h.Device(ctx, id)
		if err != nil {
			t.Fatal(err)
		}
		if d.ID != id || d.Keys != nil {
			t.Errorf("device %s is %s, with keys: %v", id, d.ID, d.Keys != nil)
		}
		return d
	}

	t.Run("check", func(t *testing.T) {
		if err := open(t).Check(ctx); err != nil {
			t.Error(err)
		}
	})
	t.Run("nobody", func(t *testing.T) {
		h := open(t)
		if d, err := h.Device(ctx, prefix+"nobody"); !errors.Is(err, registration.ErrNotFound) {
			t.Errorf("device: %v, %v", d, err)
		}
		if tw, err := h.Twin(ctx, prefix+"nobody"); !errors.Is(err, registration.ErrNotFound) {
			t.Errorf("twin: %v, %v", tw, err)
		}
		if err := h.Remove(ctx, prefix+"nobody"); err != nil {
			t.Error(err)
		}
	})
	t.Run("keys, twice", func(t *testing.T) {
		h, d := fresh(t)
		admit(t, h, d, true)
		admit(t, h, d, false)
		if got := device(t, h, d.ID); got.Disabled || len(got.Thumbprints) > 0 || got.IoTEdge || got.Parent != "" {
			t.Errorf("%+v", got)
		}
		d.Keys = Keys()
		admit(t, h, d, false)
	})
	t.Run("DPS-S 97: certificates, and from keys to certificates and back", func(t *testing.T) {
		h, d := fresh(t)
		d.Keys, d.Thumbprints = nil, []string{Thumbprint()}
		admit(t, h, d, true)
		if got := device(t, h, d.ID); !slices.Contains(got.Thumbprints, d.Thumbprints[0]) || len(slices.Compact(got.Thumbprints)) != 1 {
			t.Errorf("%v, want %v", got.Thumbprints, d.Thumbprints)
		}
		d.Thumbprints = []string{Thumbprint(), Thumbprint()}
		admit(t, h, d, false)
		if got := device(t, h, d.ID); !slices.Equal(got.Thumbprints, d.Thumbprints) {
			t.Errorf("%v, want %v", got.Thumbprints, d.Thumbprints)
		}
		d.Keys, d.Thumbprints = Keys(), nil
		admit(t, h, d, false)
		if got := device(t, h, d.ID); len(got.Thumbprints) > 0 {
			t.Errorf("with keys: %v", got.Thumbprints)
		}
		d.Keys, d.Thumbprints = nil, []string{Thumbprint()}
		admit(t, h, d, false)
		if got := device(t, h, d.ID); !slices.Contains(got.Thumbprints, d.Thumbprints[0]) {
			t.Errorf("%v, want %v", got.Thumbprints, d.Thumbprints)
		}
	})
	t.Run("IDs", func(t *testing.T) {
		h, d := fresh(t)
		for _, id := range append([]string{d.ID + ".a_b", strings.ToUpper(d.ID)}, caps.IDs...) {
			other := *d
			if other.ID = id; slices.Contains(caps.IDs, id) {
				other.ID = d.ID + id
			}
			t.Cleanup(func() { h.Remove(context.WithoutCancel(ctx), other.ID) })
			admit(t, h, &other, true)
			device(t, h, other.ID)
			if err := h.Remove(ctx, other.ID); err != nil {
				t.Error(err)
			}
		}
		if _, err := h.Device(ctx, d.ID); !errors.Is(err, registration.ErrNotFound) {
			t.Errorf("another device's ID: %v", err)
		}
	})
	t.Run("disabled stays", func(t *testing.T) {
		for name, x509 := range map[string]bool{"keys": false, "certificates": true} {
			t.Run(name, func(t *testing.T) {
				h, d := fresh(t)
				if x509 {
					d.Keys, d.Thumbprints = nil, []string{Thumbprint()}
				}
				d.Disabled = caps.Disable == nil
				admit(t, h, d, true)
				if caps.Disable != nil {
					caps.Disable(t, d.ID)
				}
				if !device(t, h, d.ID).Disabled {
					t.Fatal("it is enabled")
				}
				d.Disabled = false
				admit(t, h, d, false)
				d.Keys, d.Thumbprints = Keys(), nil
				admit(t, h, d, false)
				if !device(t, h, d.ID).Disabled {
					t.Error("another key enabled it")
				}
			})
		}
		h, d := fresh(t)
		admit(t, h, d, true)
		d.Disabled = true
		admit(t, h, d, false)
		if device(t, h, d.ID).Disabled {
			t.Error("it was disabled by Admit, which may create such devices alone")
		}
	})
	t.Run("below an edge device", func(t *testing.T) {
		h, edge := fresh(t)
		edge.IoTEdge = true
		admit(t, h, edge, true)
		parent := device(t, h, edge.ID)
		if !parent.IoTEdge || caps.Scopes != (parent.Scope != "") {
			t.Fatalf("%+v", parent)
		}
		scope := parent.Scope
		if scope == "" {
			scope = "ms-azure-iot-edge://" + edge.ID + "-1"
		}
		_, leaf := fresh(t)
		_, below := fresh(t)
		below.IoTEdge = true
		for _, d := range []*registration.HubDevice{leaf, below} {
			d.Parent = scope
			admit(t, h, d, true)
			admit(t, h, d, false)
			got := device(t, h, d.ID)
			if got.Parent != scope || got.IoTEdge != d.IoTEdge || caps.Scopes && got.IoTEdge && (got.Scope == "" || got.Scope == scope) {
				t.Errorf("%+v", got)
			}
			was := got.Scope
			d.Parent = ""
			admit(t, h, d, false)
			if got := device(t, h, d.ID); got.Parent != "" || got.Scope != was {
				t.Errorf("%+v", got)
			}
		}
		leaf.Parent = scope
		admit(t, h, leaf, false)
		leaf.IoTEdge = true
		admit(t, h, leaf, false)
		if got := device(t, h, leaf.ID); !got.IoTEdge || got.Parent != scope || got.Scope == scope {
			t.Errorf("a leaf that became an edge device: %+v", got)
		}
	})
	t.Run("DPS-S 94: twin", func(t *testing.T) {
		h, d := fresh(t)
		admit(t, h, d, true)
		want := func(tags, desired string) {
			t.Helper()
			if !caps.Twins {
				tags, desired = "", ""
			}
			got, err := h.Twin(ctx, d.ID)
			if err != nil {
				t.Fatal(err)
			}
			if !sameJSON(got.Tags, tags) || !sameJSON(got.Desired, desired) {
				t.Errorf("tags %s, want %s; desired %s, want %s", got.Tags, tags, got.Desired, desired)
			}
		}
		merge := func(tags, desired string) {
			t.Helper()
			tw := &registration.HubTwin{}
			if tags != "" {
				tw.Tags, tw.Desired = json.RawMessage(tags), json.RawMessage(desired)
			}
			if err := h.MergeTwin(ctx, d.ID, tw); err != nil {
				t.Fatal(err)
			}
		}
		want("", "")
		merge(`{"site":"A7","line":{"no":3,"side":"left"}}`, `{"interval":30,"name":"Pümpe","big":4503599627370495}`)
		merge(`{"site":"A7","line":{"no":3,"side":"left"}}`, `{"interval":30,"name":"Pümpe","big":4503599627370495}`)
		want(`{"site":"A7","line":{"no":3,"side":"left"}}`, `{"interval":30,"name":"Pümpe","big":4503599627370495}`)
		merge(`{"line":{"side":null}}`, `{"interval":null}`)
		want(`{"site":"A7","line":{"no":3}}`, `{"name":"Pümpe","big":4503599627370495}`)
		merge("", "")
		t.Run("DPS-S 98: another key leaves it alone", func(t *testing.T) {
			d.Keys = Keys()
			admit(t, h, d, false)
			want(`{"site":"A7","line":{"no":3}}`, `{"name":"Pümpe","big":4503599627370495}`)
		})
	})
	t.Run("remove", func(t *testing.T) {
		h, d := fresh(t)
		admit(t, h, d, true)
		if err := h.MergeTwin(ctx, d.ID, &registration.HubTwin{Tags: json.RawMessage(`{"a":1}`)}); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := h.Remove(ctx, d.ID); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := h.Device(ctx, d.ID); !errors.Is(err, registration.ErrNotFound) {
			t.Errorf("removed: %v", err)
		}
		admit(t, h, d, true)
		if got, err := h.Twin(ctx, d.ID); err != nil || got.Tags != nil && !sameJSON(got.Tags, "") {
			t.Errorf("the twin of a removed device came back: %v, %v", got, err)
		}
	})
	t.Run("many at once", func(t *testing.T) {
		h, d := fresh(t)
		var wg sync.WaitGroup
		var mu sync.Mutex
		n := 0
		for i := range 8 {
			wg.Go(func() {
				mine := *d
				if i%2 == 1 {
					mine.Keys = Keys()
				}
				for { // so many want other keys that one of them may be told to come again
					created, err := h.Admit(ctx, &mine)
					if e, ok := errors.AsType[*registration.HubError](err); ok && e.Temporary && e.Code == "Conflict" {
						continue
					}
					if err != nil {
						t.Error(err)
					}
					if created {
						mu.Lock()
						n++
						mu.Unlock()
					}
					return
				}
			})
		}
		wg.Wait()
		if n != 1 {
			t.Errorf("it was created %d times", n)
		}
	})
	t.Run("what is no device", func(t *testing.T) {
		h, d := fresh(t)
		for name, edit := range map[string]func(*registration.HubDevice){
			"no credentials": func(d *registration.HubDevice) { d.Keys = nil },
			"both":           func(d *registration.HubDevice) { d.Thumbprints = []string{Thumbprint()} },
			"a short key":    func(d *registration.HubDevice) { d.Keys.SecondaryKey = "AAAA" },
			"an empty key":   func(d *registration.HubDevice) { d.Keys.SecondaryKey = "" },
			"SHA-1":          func(d *registration.HubDevice) { d.Keys, d.Thumbprints = nil, []string{strings.Repeat("A", 40)} },
			"three thumbprints": func(d *registration.HubDevice) {
				d.Keys, d.Thumbprints = nil, []string{Thumbprint(), Thumbprint(), Thumbprint()}
			},
			"no ID":               func(d *registration.HubDevice) { d.ID = "" },
			"the folder above":    func(d *registration.HubDevice) { d.ID = ".." },
			"a space":             func(d *registration.HubDevice) { d.ID += " " },
			"more than ASCII":     func(d *registration.HubDevice) { d.ID += "é" },
			"longer than hubs do": func(d *registration.HubDevice) { d.ID += strings.Repeat("a", 128) },
		} {
			bad := *d
			bad.Keys = Keys()
			edit(&bad)
			_, err := h.Admit(ctx, &bad)
			if e, ok := errors.AsType[*registration.HubError](err); !ok || e.Temporary {
				t.Errorf("%s: %v", name, err)
			}
			if bad.Keys != nil && err != nil && strings.Contains(err.Error(), bad.Keys.PrimaryKey) {
				t.Errorf("%s: the error shows the key", name)
			}
		}
	})
	t.Run("the caller goes away", func(t *testing.T) {
		h, d := fresh(t)
		gone, cancel := context.WithCancel(ctx)
		cancel()
		if _, err := h.Admit(gone, d); err != nil && !errors.Is(err, context.Canceled) { // nil: a hub in the same process is done first
			t.Errorf("%v", err)
		}
		if err := h.Check(ctx); err != nil {
			t.Errorf("and later: %v", err)
		}
	})
}

// sameJSON compares values; nothing is the same as an empty object.
func sameJSON(got []byte, want string) bool {
	parse := func(b []byte) any {
		if len(b) == 0 {
			b = []byte("{}")
		}
		d := json.NewDecoder(bytes.NewReader(b))
		d.UseNumber()
		var v any
		if d.Decode(&v) != nil {
			return string(b)
		}
		return v
	}
	return reflect.DeepEqual(parse(got), parse([]byte(want)))
}
