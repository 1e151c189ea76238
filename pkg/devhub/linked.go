package devhub

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"net"
	"strings"

	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
)

// Linked returns the hub as a linked hub of the registration service in the same process.
func (h *Hub) Linked() registration.Hub { return linked{h} }

// LinkedHub is the hub as a scope's record has it, for callers who reach it at an address, HOST:PORT, whose certificate is judged by
// a CA in PEM; nil is the system's. The host must be the hub's name or one of [Config.Hosts]. It is a secret.
func (h *Hub) LinkedHub(address string, caPEM []byte) registration.LinkedHub {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		host, port = address, "443"
	}
	text := h.ConnectionString(host, "iothubowner") + ";Port=" + port
	if caPEM != nil {
		text += ";CA=" + base64.StdEncoding.EncodeToString(caPEM)
	}
	return registration.LinkedHub{Name: h.cfg.Name, Kind: registration.HubBuiltin, ConnectionString: text}
}

type linked struct{ h *Hub }

// fault is a hub's error as the registration service has it. None of ours is healed by time, but those of the file.
func (l linked) fault(err error) error {
	if err == nil {
		return nil
	}
	f := asFailure(err)
	if f.number == 404001 {
		return registration.ErrNotFound
	}
	return &registration.HubError{Hub: l.h.cfg.Name, Status: f.status(), Code: f.name, Temporary: f.status() >= 500, Err: err}
}

func (l linked) Check(context.Context) error {
	l.h.mu.Lock()
	defer l.h.mu.Unlock()
	if l.h.closed {
		return l.fault(errors.New("hub is closed"))
	}
	return nil
}

func (l linked) Device(_ context.Context, id string) (*registration.HubDevice, error) {
	l.h.mu.Lock()
	defer l.h.mu.Unlock()
	d := l.h.devices[id]
	if d == nil {
		return nil, registration.ErrNotFound
	}
	r := d.rec
	var prints []string
	for _, p := range r.Thumbprints {
		if p != "" {
			prints = append(prints, strings.ToUpper(p))
		}
	}
	return &registration.HubDevice{ID: r.ID, Disabled: r.Disabled, Thumbprints: prints, IoTEdge: r.Edge, Scope: ownScope(r), Parent: r.Parent}, nil
}

func ownScope(r *record) string {
	if r.Edge {
		return r.Scope
	}
	return ""
}

func (l linked) Admit(_ context.Context, want *registration.HubDevice) (created bool, err error) {
	h := l.h
	if err := checkAdmitted(want); err != nil {
		return false, l.fault(err)
	}
	authentication := object{"type": kindSAS}
	if want.Keys != nil {
		authentication["symmetricKey"] = object{"primaryKey": want.Keys.PrimaryKey, "secondaryKey": want.Keys.SecondaryKey}
	} else {
		prints := object{}
		for i, name := range []string{"primaryThumbprint", "secondaryThumbprint"} {
			if i < len(want.Thumbprints) {
				prints[name] = want.Thumbprints[i]
			}
		}
		authentication = object{"type": kindSelfSigned, "x509Thumbprint": prints}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	created = h.devices[want.ID] == nil
	if d := h.devices[want.ID]; d != nil { // asked twice is done once
		same := *d.rec
		if err := edit(&same, want, authentication, false); err == nil && same.Kind == d.rec.Kind && same.Keys == d.rec.Keys && same.Thumbprints == d.rec.Thumbprints &&
			same.Edge == d.rec.Edge && same.Parent == d.rec.Parent {
			return false, nil
		}
	}
	_, err = h.write(want.ID, func(r *record) error { return edit(r, want, authentication, created) })
	return created && err == nil, l.fault(err)
}

// checkAdmitted wants credentials of one kind, which the hub does not make itself here.
func checkAdmitted(d *registration.HubDevice) error {
	if err := checkDeviceID(d.ID); err != nil {
		return err
	}
	if (d.Keys == nil) == (len(d.Thumbprints) == 0) || len(d.Thumbprints) > 2 {
		return badArgument("want either keys or one or two thumbprints")
	}
	if d.Keys != nil && (d.Keys.PrimaryKey == "" || d.Keys.SecondaryKey == "") {
		return badArgument("want both keys")
	}
	for _, p := range d.Thumbprints {
		if len(p) != 64 {
			return badArgument("a thumbprint is not of SHA-256")
		}
	}
	return nil
}

func edit(r *record, want *registration.HubDevice, authentication object, created bool) error {
	if created {
		r.Disabled = want.Disabled
	}
	if err := r.place(want.IoTEdge, "", want.Parent); err != nil {
		return err
	}
	return r.authenticate(authentication)
}

func (l linked) Remove(_ context.Context, id string) error {
	err := l.h.remove(id, "*")
	if f := asFailure(err); err != nil && f.number == 404001 {
		return nil
	}
	return l.fault(err)
}

func (l linked) Twin(_ context.Context, id string) (*registration.HubTwin, error) {
	l.h.mu.Lock()
	defer l.h.mu.Unlock()
	d := l.h.devices[id]
	if d == nil {
		return nil, registration.ErrNotFound
	}
	tags, err := dps.Marshal(d.rec.Twin.Tags)
	desired, err2 := dps.Marshal(d.rec.Twin.Desired.Values)
	return &registration.HubTwin{Tags: tags, Desired: desired}, l.fault(errors.Join(err, err2))
}

func (l linked) MergeTwin(_ context.Context, id string, t *registration.HubTwin) error {
	var p twinPatch
	for _, part := range []struct {
		from json.RawMessage
		to   *object
	}{{t.Tags, &p.tags}, {t.Desired, &p.desired}} {
		if part.from == nil {
			continue
		}
		o, err := parseObject(part.from)
		if err != nil {
			return l.fault(badJSON(err))
		}
		*part.to = o
	}
	_, err := l.h.writeTwin(id, p, false, "")
	return l.fault(err)
}
