package devhub

import (
	"crypto/rand"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"time"

	"github.com/touchmark/touchmark/pkg/dps"
)

// The kinds of authentication (service API, section 5.2).
const (
	kindSAS        = "sas"
	kindSelfSigned = "selfSigned"
	kindCA         = "certificateAuthority"
	kindNone       = "none"
)

// record is what lasts of a device. What is published never changes: a change makes another one.
type record struct {
	ID            string
	Generation    string
	Tag           string // the identity's etag
	Disabled      bool
	Reason        string
	StatusChanged time.Time
	Kind          string
	Keys          [2]string `json:"-"` // of kindSAS: base64. Secret; the store seals them beside the rest.
	Thumbprints   [2]string // of kindSelfSigned: hexadecimal of SHA-1 or of SHA-256, both the same, either may be empty
	Edge          bool
	Scope         string // of an edge device its own, of another one its parent's, or empty
	Parent        string // scope of the edge device above, or empty
	Twin          twin
}

const scopePrefix = "ms-azure-iot-edge://"

// Limits of an identity.
const (
	maxReason      = 128
	maxChildren    = 100
	maxGenerations = 5 // of edge devices, one above the other
)

// checkDeviceID checks what IoT Hub takes as a device ID.
func checkDeviceID(id string) error {
	if err := dps.CheckDeviceID(id); err != nil {
		return badArgument("deviceId: %v", err)
	}
	return nil
}

// newTag makes an etag in the form of IoT Hub's: base64 of a number.
func newTag() string {
	var b [4]byte
	_, _ = rand.Read(b[:]) // never fails
	return base64.StdEncoding.EncodeToString(fmt.Append(nil, binary.BigEndian.Uint32(b[:])))
}

// newGeneration makes a generation ID: 18 digits, as IoT Hub's.
func newGeneration() string {
	n, err := rand.Int(rand.Reader, big.NewInt(9e17))
	if err != nil {
		return "638000000000000000" // rand.Int fails for readers that do; crypto/rand's does not
	}
	return n.Add(n, big.NewInt(1e17)).String()
}

func newKey() string {
	var b [32]byte
	_, _ = rand.Read(b[:])
	return base64.StdEncoding.EncodeToString(b[:])
}

// newRecord is a device before it has been told what it is.
func newRecord(id string, now time.Time) *record {
	return &record{ID: id, Generation: newGeneration(), Twin: newTwin(now)}
}

// read takes in an identity as a service writes it; the rest of it is what the hub makes.
func (r *record) read(o object, now time.Time) error {
	var errs [6]error
	status, reason, scope := "", "", ""
	status, errs[0] = member[string](o, "status")
	reason, errs[1] = member[string](o, "statusReason")
	scope, errs[2] = member[string](o, "deviceScope")
	parents, err := member[[]any](o, "parentScopes")
	errs[3] = err
	capabilities, err := member[object](o, "capabilities")
	errs[4] = err
	edge, err := member[bool](capabilities, "iotEdge")
	errs[5] = err
	if err := errors.Join(errs[:]...); err != nil {
		return badArgument("%s", oneLine(err))
	}
	disabled := strings.EqualFold(status, "disabled")
	switch {
	case status != "" && !disabled && !strings.EqualFold(status, "enabled"):
		return badArgument("status is neither enabled nor disabled")
	case len(reason) > maxReason:
		return badArgument("statusReason is longer than %d octets", maxReason)
	case len(parents) > 1:
		return badArgument("parentScopes: a device has one parent at most")
	}
	if disabled != r.Disabled {
		r.StatusChanged = now
	}
	r.Disabled, r.Reason = disabled, reason
	parent := ""
	if len(parents) == 1 {
		var ok bool
		if parent, ok = parents[0].(string); !ok {
			return badArgument("parentScopes has something that is no text")
		}
	}
	if err := r.place(edge, scope, parent); err != nil {
		return err
	}
	authentication, err := member[object](o, "authentication")
	if err != nil {
		return badArgument("%v", err)
	}
	return r.authenticate(authentication)
}

func oneLine(err error) string { return strings.ReplaceAll(err.Error(), "\n", ", ") }

// place sets whether it is an edge device, and its parent. The hub makes an edge device's own scope; another's is its parent's,
// which may be named in either place.
func (r *record) place(edge bool, scope, parent string) error {
	if edge {
		own := scopePrefix + r.ID + "-" + r.Generation
		if scope != "" && scope != own && scope != r.Scope {
			return badArgument("deviceScope of an edge device is made by the hub")
		}
		scope = own
	} else {
		switch {
		case r.Edge && scope == r.Scope: // what was its own is nobody's any more
			scope = parent
		case scope != "" && parent != "" && scope != parent:
			return badArgument("deviceScope and parentScopes name two parents")
		case scope == "":
			scope = parent
		}
		parent = scope
	}
	r.Edge, r.Scope, r.Parent = edge, scope, parent
	return nil
}

// authenticate sets how the device proves itself. Without anything said it is by keys, which the hub makes where it has none;
// keys that are empty texts ask for new ones.
func (r *record) authenticate(o object) error {
	if o == nil {
		if r.Kind == "" {
			r.Kind, r.Keys = kindSAS, [2]string{newKey(), newKey()}
		}
		return nil
	}
	kind, err := member[string](o, "type")
	keys, err2 := member[object](o, "symmetricKey")
	prints, err3 := member[object](o, "x509Thumbprint")
	if err := errors.Join(err, err2, err3); err != nil {
		return badArgument("authentication: %s", oneLine(err))
	}
	var k, p [2]string
	for i, from := range []struct {
		o    object
		name string
		to   *string
	}{{keys, "primaryKey", &k[0]}, {keys, "secondaryKey", &k[1]}, {prints, "primaryThumbprint", &p[0]}, {prints, "secondaryThumbprint", &p[1]}} {
		if *from.to, err = member[string](from.o, from.name); err != nil {
			return badArgument("authentication: %v", err)
		}
		if i < 2 {
			if err := checkKey(*from.to); err != nil {
				return badArgument("authentication: %s: %v", from.name, err)
			}
		}
	}
	hasKeys, hasPrints := k != [2]string{}, p != [2]string{}
	if kind == "" {
		if kind = kindSAS; hasPrints {
			kind = kindSelfSigned
		}
	}
	next := record{}
	switch {
	case strings.EqualFold(kind, kindSAS):
		if hasPrints {
			return badArgument("authentication: a device with keys has no thumbprints")
		}
		if (k[0] == "") != (k[1] == "") {
			return badArgument("authentication: want both keys, or neither")
		}
		if !hasKeys {
			k = [2]string{newKey(), newKey()}
		}
		next.Kind, next.Keys = kindSAS, k
	case strings.EqualFold(kind, kindSelfSigned):
		if hasKeys || !hasPrints {
			return badArgument("authentication: selfSigned wants a thumbprint, and no keys")
		}
		if err := checkThumbprints(p); err != nil {
			return err
		}
		next.Kind, next.Thumbprints = kindSelfSigned, p
	case strings.EqualFold(kind, kindCA), strings.EqualFold(kind, kindNone):
		if hasKeys || hasPrints {
			return badArgument("authentication: %s has neither keys nor thumbprints", kind)
		}
		if next.Kind = kindCA; strings.EqualFold(kind, kindNone) {
			next.Kind = kindNone
		}
	default:
		return badArgument("authentication: type is not sas, selfSigned, certificateAuthority or none")
	}
	r.Kind, r.Keys, r.Thumbprints = next.Kind, next.Keys, next.Thumbprints
	return nil
}

// checkKey takes base64 of 16 to 64 octets, and nothing.
func checkKey(s string) error {
	if s == "" {
		return nil
	}
	b, err := base64.StdEncoding.Strict().DecodeString(s)
	if err != nil || len(b) < 16 || len(b) > 64 {
		return errors.New("want base64 of 16 to 64 octets")
	}
	return nil
}

func checkThumbprints(p [2]string) error {
	for _, s := range p {
		if s == "" {
			continue
		}
		if len(s) != 40 && len(s) != 64 || strings.Trim(strings.ToLower(s), "0123456789abcdef") != "" {
			return badArgument("authentication: a thumbprint has 40 hexadecimal digits, or 64")
		}
	}
	if p[0] != "" && p[1] != "" && len(p[0]) != len(p[1]) {
		return badArgument("authentication: one thumbprint is of SHA-1 and the other of SHA-256")
	}
	return nil
}

// edgeOf finds the edge device that a scope is of. The caller holds mu.
func (h *Hub) edgeOf(scope string) *record {
	name, ok := strings.CutPrefix(scope, scopePrefix)
	if !ok {
		return nil
	}
	cut := strings.LastIndexByte(name, '-')
	if cut < 0 {
		return nil
	}
	d := h.devices[name[:cut]]
	if d == nil || !d.rec.Edge || d.rec.Scope != scope {
		return nil
	}
	return d.rec
}

// children are the devices right below one. The caller holds mu.
func (h *Hub) children(scope string) []*record {
	var all []*record
	for _, d := range h.devices {
		if scope != "" && d.rec.Parent == scope {
			all = append(all, d.rec)
		}
	}
	return all
}

// height is how many generations of edge devices there are from this one down. The caller holds mu.
func (h *Hub) height(r *record) int {
	if !r.Edge {
		return 0
	}
	deepest := 0
	for _, c := range h.children(r.Scope) {
		deepest = max(deepest, h.height(c))
	}
	return 1 + deepest
}

// checkFamily checks a device's place among the others: its parent is there, is an edge device, has room, and is not below it.
// The caller holds mu.
func (h *Hub) checkFamily(r, old *record) error {
	if old != nil && old.Edge && !r.Edge && len(h.children(old.Scope)) > 0 {
		return badArgument("the device has children: it stays an edge device")
	}
	if r.Parent == "" || old != nil && old.Parent == r.Parent && old.Edge == r.Edge {
		return nil
	}
	parent := h.edgeOf(r.Parent)
	if parent == nil {
		return badArgument("the parent is no edge device of this hub")
	}
	generations := h.height(r)
	for above := parent; above != nil; above = h.edgeOf(above.Parent) {
		if generations++; above.ID == r.ID {
			return badArgument("the parent is below the device")
		}
	}
	if r.Edge && generations > maxGenerations {
		return badArgument("more than %d generations of edge devices", maxGenerations)
	}
	siblings := slices.DeleteFunc(h.children(r.Parent), func(c *record) bool { return c.ID == r.ID })
	if len(siblings) >= maxChildren {
		return badArgument("the parent has %d children already", maxChildren)
	}
	return nil
}

// matches judges an If-Match against an etag: with one layer of quotes or none, or a star.
func matches(ifMatch, tag string) bool {
	ifMatch = unquote(ifMatch)
	return ifMatch == "*" || ifMatch == tag
}

func unquote(s string) string {
	if len(s) >= 2 && s[0] == '"' && s[len(s)-1] == '"' {
		return s[1 : len(s)-1]
	}
	return s
}

// put creates a device, without ifMatch, or changes it.
func (h *Hub) put(id string, o object, ifMatch string) (*record, error) {
	if err := checkDeviceID(id); err != nil {
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	d := h.devices[id]
	switch {
	case d == nil && ifMatch != "":
		return nil, notFound(id)
	case d != nil && ifMatch == "":
		return nil, exists(id)
	case d != nil && !matches(ifMatch, d.rec.Tag):
		return nil, stale()
	}
	return h.write(id, func(r *record) error { return r.read(o, h.now()) })
}

// write changes a device, or makes it, and keeps it. Whoever is connected by what is no more is hung up on. The caller holds mu.
func (h *Hub) write(id string, edit func(*record) error) (*record, error) {
	d := h.devices[id]
	var old *record
	var r *record
	if d == nil {
		if len(h.devices) >= h.cfg.MaxDevices {
			return nil, tooMany(h.cfg.MaxDevices)
		}
		r = newRecord(id, h.now())
	} else {
		old = d.rec
		again := *old
		r = &again
	}
	if err := edit(r); err != nil {
		return nil, err
	}
	if err := h.checkFamily(r, old); err != nil {
		return nil, err
	}
	r.Tag = newTag()
	if err := h.keep([]*record{r}, ""); err != nil {
		return nil, err
	}
	if d == nil {
		h.devices[id] = &device{rec: r}
		return r, nil
	}
	d.rec = r
	if r.Disabled || r.Kind != old.Kind || r.Keys != old.Keys || r.Thumbprints != old.Thumbprints {
		d.hangUp()
	}
	return r, nil
}

// remove forgets a device. Its children have no parent any more.
func (h *Hub) remove(id, ifMatch string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	d := h.devices[id]
	switch {
	case d == nil:
		return notFound(id)
	case !matches(ifMatch, d.rec.Tag):
		return stale()
	}
	var orphans []*record
	if d.rec.Edge {
		for _, c := range h.children(d.rec.Scope) {
			again := *c
			if again.Parent = ""; !again.Edge {
				again.Scope = ""
			}
			again.Tag = newTag()
			orphans = append(orphans, &again)
		}
	}
	if err := h.keep(orphans, id); err != nil {
		return err
	}
	for _, o := range orphans {
		h.devices[o.ID].rec = o
	}
	for _, m := range d.inbox {
		h.kept -= m.size()
	}
	delete(h.devices, id)
	d.hangUp()
	return nil
}

// keep makes a change last before anybody is told of it.
func (h *Hub) keep(put []*record, remove string) error {
	switch {
	case h.closed:
		return errors.New("hub is closed")
	case h.store == nil:
		return nil
	}
	return h.store.write(put, remove)
}

// identity is a device as services read it. The caller holds mu.
func (d *device) identity() object {
	r := d.rec
	text := func(s string) any {
		if s == "" {
			return nil
		}
		return s
	}
	o := object{
		"deviceId": r.ID, "generationId": r.Generation, "etag": r.Tag, "status": status(r), "statusReason": text(r.Reason), "statusUpdatedTime": stampOr(r.StatusChanged),
		"connectionState": d.connection(), "connectionStateUpdatedTime": stampOr(d.switched), "lastActivityTime": stampOr(d.active), "cloudToDeviceMessageCount": len(d.queue),
		"authentication": object{"type": r.Kind, "symmetricKey": object{"primaryKey": text(r.Keys[0]), "secondaryKey": text(r.Keys[1])},
			"x509Thumbprint": object{"primaryThumbprint": text(r.Thumbprints[0]), "secondaryThumbprint": text(r.Thumbprints[1])}},
		"capabilities": object{"iotEdge": r.Edge},
	}
	d.family(o)
	return o
}

func (d *device) family(o object) {
	if d.rec.Scope != "" {
		o["deviceScope"] = d.rec.Scope
	}
	if d.rec.Parent != "" {
		o["parentScopes"] = []any{d.rec.Parent}
	}
}

func status(r *record) string {
	if r.Disabled {
		return "disabled"
	}
	return "enabled"
}

func (d *device) connection() string {
	if d.session == nil {
		return "Disconnected"
	}
	return "Connected"
}

// twinTag is a twin's etag, in the form of IoT Hub's.
func twinTag(t twin) string {
	return base64.StdEncoding.EncodeToString(binary.BigEndian.AppendUint64(nil, uint64(t.Version)))
}

// twinDocument is a device's twin as services read it. The caller holds mu.
func (d *device) twinDocument() object {
	r := d.rec
	o := object{
		"deviceId": r.ID, "etag": twinTag(r.Twin), "deviceEtag": r.Tag, "version": r.Twin.Version, "status": status(r), "statusUpdateTime": stampOr(r.StatusChanged),
		"connectionState": d.connection(), "lastActivityTime": stampOr(d.active), "cloudToDeviceMessageCount": len(d.queue), "authenticationType": r.Kind,
		"x509Thumbprint": object{"primaryThumbprint": nil, "secondaryThumbprint": nil}, "capabilities": object{"iotEdge": r.Edge}, "modelId": d.modelID, "tags": r.Twin.Tags,
		"properties": object{"desired": r.Twin.Desired.document(true), "reported": r.Twin.Reported.document(true)},
	}
	prints := o["x509Thumbprint"].(object)
	for i, name := range []string{"primaryThumbprint", "secondaryThumbprint"} {
		if r.Thumbprints[i] != "" {
			prints[name] = r.Thumbprints[i]
		}
	}
	d.family(o)
	return o
}

// writeTwin changes a twin, and tells the device.
func (h *Hub) writeTwin(id string, p twinPatch, replace bool, ifMatch string) (object, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	d := h.devices[id]
	switch {
	case d == nil:
		return nil, notFound(id)
	case ifMatch != "" && !matches(ifMatch, twinTag(d.rec.Twin)):
		return nil, stale()
	}
	next, told, err := d.rec.Twin.apply(p, replace, h.now())
	if err != nil {
		return nil, err
	}
	if err := h.keepTwin(d, next); err != nil {
		return nil, err
	}
	if told != nil {
		d.push(desiredFilter, desiredTopic(next.Desired.Version), told)
	}
	return d.twinDocument(), nil
}

// keepTwin puts a twin in place of the one that was. The caller holds mu.
func (h *Hub) keepTwin(d *device, t twin) error {
	again := *d.rec
	again.Twin = t
	if err := h.keep([]*record{&again}, ""); err != nil {
		return err
	}
	d.rec = &again
	return nil
}
