package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	crand "crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/touchmark/touchmark/hsm/signed"
	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/bundle"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/evidence"
	"github.com/touchmark/touchmark/pkg/hub/hubtest"
	"github.com/touchmark/touchmark/pkg/order"
	"github.com/touchmark/touchmark/pkg/registration"
)

// A killDevice is a device that comes in again and again: by a symmetric key, or by a certificate.
type killDevice struct {
	id   string
	key  []byte
	cert *tls.Certificate
}

// A toldDevice is one that was told its assignment.
type toldDevice struct {
	hub          string // the last
	times, moved int    // how often, and how often to another hub than before
}

// register has devices come in until the service is killed: those of the first group, and as often those of bundles.
func (d *killDrill) register(ctx context.Context, t *testing.T, address string, fleet []*killDevice) {
	shared := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}} //nolint:gosec // a test's own service
	defer shared.CloseIdleConnections()
	for ctx.Err() == nil {
		device, transport := d.devices[rand.IntN(len(d.devices))], shared
		if len(fleet) > 0 && rand.IntN(2) == 0 {
			device = fleet[rand.IntN(len(fleet))]
		}
		if device.cert != nil { // a connection is one device's
			transport = shared.Clone()
			transport.TLSClientConfig.Certificates, transport.DisableKeepAlives = []tls.Certificate{*device.cert}, true
		}
		hub, err := device.comeIn(t.Context(), &http.Client{Transport: transport, Timeout: 20 * time.Second}, address)
		if err != nil && ctx.Err() == nil {
			t.Errorf("%s comes in: %v", device.id, err)
			return
		}
		if hub == "" {
			continue
		}
		d.mu.Lock()
		told := d.told[device.id]
		if told == nil {
			told = &toldDevice{hub: hub}
			d.told[device.id] = told
		}
		if told.times++; told.hub != hub {
			told.hub = hub
			told.moved++
		}
		d.mu.Unlock()
	}
}

// comeIn registers the device and asks what became of it, and returns the hub that it was told, if it was. Who is not told at once goes
// away; the device comes again.
func (d *killDevice) comeIn(ctx context.Context, c *http.Client, address string) (hub string, err error) {
	do := func(method, path, body string) (*dps.OperationStatus, error) {
		req, err := http.NewRequestWithContext(ctx, method, "https://"+address+"/"+killScope+"/registrations/"+d.id+path+"?api-version=2021-06-01", strings.NewReader(body))
		if err != nil {
			return nil, err
		}
		if d.cert == nil {
			req.Header.Set("Authorization", attesttest.Token(d.key, killScope, d.id, time.Now().Add(time.Hour)))
		}
		req.Header.Set("Content-Type", "application/json")
		res, err := c.Do(req)
		if err != nil {
			return nil, err
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		if err == nil && res.StatusCode > 299 {
			err = fmt.Errorf("%s: %s", res.Status, b)
		}
		var op dps.OperationStatus
		if err == nil {
			err = json.Unmarshal(b, &op)
		}
		return &op, err
	}
	op, err := do(http.MethodPut, "/register", `{"registrationId":"`+d.id+`"}`)
	if err != nil {
		return "", err
	}
	for range 2 {
		if op.Status.Terminal() {
			break
		}
		if op, err = do(http.MethodGet, "/operations/"+op.OperationID, ""); err != nil {
			return "", nil // others came in as this device meanwhile, and the service keeps the last operations alone
		}
	}
	if op.Status != dps.Assigned || op.RegistrationState == nil {
		return "", nil
	}
	return op.RegistrationState.AssignedHub, nil
}

// A killOperator calls the service's own API, and imports with the program.
type killOperator struct {
	made     []string // enrollments that the service said it had made
	byBulk   int      // of those
	waiting  []*killBundle
	imported []*killBundle // that the service said were
	// Imports that ended without an answer; of those, as the next one of the same bundle saw it: those of which a part was there,
	// and those that were there whole.
	cut, halves, unheard int
	took                 time.Duration // what the last long bundle took
}

// makeEnrollments makes enrollments until the service is killed: one, and then ten at once.
func (o *killOperator) makeEnrollments(ctx context.Context, t *testing.T, svc *service) {
	for i, round := 0, len(o.made); ctx.Err() == nil; i++ {
		var ids []string
		var items []json.RawMessage
		for j := range 11 {
			id := fmt.Sprintf("made-%d-%d-%d", round, i, j)
			ids = append(ids, id)
			items = append(items, json.RawMessage(`{"registrationId":"`+id+`","attestation":{"type":"symmetricKey"}}`))
		}
		err := svc.call(t.Context(), http.MethodPut, "/enrollments/"+ids[0], nil, nil, strings.NewReader(string(items[0])), nil)
		if err == nil {
			o.made = append(o.made, ids[0])
			var res dps.BulkResult
			err = svc.callJSON(t.Context(), http.MethodPost, "/enrollments", map[string]any{"mode": dps.BulkCreate, "enrollments": items[1:]}, &res)
			if err == nil && !res.IsSuccessful {
				err = fmt.Errorf("bulk: %+v", res)
			}
			if err == nil {
				o.made, o.byBulk = append(o.made, ids[1:]...), o.byBulk+10
			}
		}
		if err != nil && ctx.Err() == nil {
			t.Errorf("making enrollments: %v", err)
			return
		}
	}
}

// importUntil imports what waits but for the last bundle, and then what is there already, until ctx ends.
func (o *killOperator) importUntil(ctx context.Context, t *testing.T, d *killDrill) {
	for len(o.waiting) > 1 {
		if !o.importNext(t.Context(), t, d) {
			return
		}
	}
	for ctx.Err() == nil {
		b := o.imported[rand.IntN(len(o.imported))]
		if res, err := d.importBundle(t, b); err != nil || res.Unchanged != b.entries {
			t.Errorf("%s again: %+v, %v", b.name, res, err)
			return
		}
	}
}

// importNext imports the first bundle that waits, which stays so when that fails as the service is killed: it is tried again after the
// next start. It reports whether the bundle is in.
func (o *killOperator) importNext(ctx context.Context, t *testing.T, d *killDrill) bool {
	b, begun := o.waiting[0], time.Now()
	res, err := d.importBundle(t, b)
	if err != nil && ctx.Err() != nil {
		b.cut = true
		o.cut++
		return false
	}
	known := 0 // the group, which came with the first
	if b.group && d.line.known {
		known = 1
	}
	if err != nil || res.New+res.Unchanged != b.entries || !b.cut && res.Unchanged != known {
		t.Errorf("%s, cut off before: %v: %+v, %v", b.name, b.cut, res, err)
		return false
	}
	switch {
	case res.New == 0:
		o.unheard++
	case res.Unchanged > known:
		o.halves++
	case !b.group:
		o.took = time.Since(begun)
	}
	o.waiting, o.imported = o.waiting[1:], append(o.imported, b)
	d.line.known = d.line.known || b.group
	d.line.fleet = append(d.line.fleet, b.devices...)
	return true
}

// importBundle runs the program.
func (d *killDrill) importBundle(t *testing.T, b *killBundle, more ...string) (res registration.ImportResult, err error) {
	cmd := exec.CommandContext(t.Context(), program(t), append([]string{"import", b.name, "--service", filepath.Join("svc", connectionFile), "--trust", "station.pem", "--json"}, more...)...)
	cmd.Dir = d.dir
	var said strings.Builder
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err == nil {
		err = json.Unmarshal(out, &res)
	} else {
		err = fmt.Errorf("%w: %s%s", err, out, said.String())
	}
	return res, err
}

// A killBundle is what a line exported.
type killBundle struct {
	name         string
	entries      int
	units        int64
	group        bool                // it has the line's group
	certificates map[[32]byte]string // of individual enrollments, by fingerprint
	devices      []*killDevice       // those of it that come in
	cut          bool                // an import of it ended without an answer
}

// A killLine writes bundles, all on one order.
type killLine struct {
	dir     string
	station *ecdsa.PrivateKey
	ca      *attesttest.Holder
	paper   []byte // the order
	to      age.Recipient
	bundles int
	known   bool          // the service knows the group
	fleet   []*killDevice // of bundles that were imported
}

const killOrder = "PO-1"

// newKillLine makes a line, with the public keys of its station and of the owner in a folder.
func newKillLine(t *testing.T, dir string) *killLine {
	t.Helper()
	party := func(name string) *ecdsa.PrivateKey {
		key, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		text, err := publicPEM(key.Public())
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name+".pem"), text, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		return key
	}
	l := &killLine{dir: dir, station: party("station"), ca: attesttest.CA(t, nil, "line", validToday)}
	holder, err := signed.KeyID(l.station.Public())
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now().UTC().Truncate(time.Second)
	o := &order.Order{Version: 1, ID: killOrder, Product: "pump", Profile: "pump", ProfileSHA256: strings.Repeat("ab", 32), Quantity: 1 << 30, IDScope: killScope,
		GlobalEndpoint: "dps.example.net", Issuer: keyHash(t, l.ca), Holder: holder, NotBefore: now, NotAfter: now.Add(24 * time.Hour)}
	if l.paper, err = o.Sign(party("owner")); err != nil {
		t.Fatal(err)
	}
	return l
}

func validToday(c *x509.Certificate) {
	c.NotBefore, c.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(24*time.Hour)
}

func keyHash(t *testing.T, h *attesttest.Holder) string {
	t.Helper()
	hash, err := evidence.KeyHash(h.Key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return hash
}

// sealTo has the line seal keys to the service.
func (l *killLine) sealTo(t *testing.T, recipient []byte) {
	t.Helper()
	var err error
	if l.to, err = age.ParseX25519Recipient(strings.TrimSpace(string(recipient))); err != nil {
		t.Fatal(err)
	}
}

// mixed writes a bundle of all that a line makes.
func (l *killLine) mixed(t *testing.T) *killBundle {
	t.Helper()
	return l.write(t, true, strings.Repeat("gxs", 12))
}

// long writes a bundle of individual enrollments alone, which the service takes by several transactions.
func (l *killLine) long(t *testing.T) *killBundle {
	t.Helper()
	return l.write(t, false, strings.Repeat("xs", 6)+strings.Repeat("s", 3376)+strings.Repeat("sx", 6))
}

// write writes a bundle, with the line's group or without: a unit for each letter of kinds, g of the group, x with a certificate of its
// own, s with a symmetric key. The first and the last few of them come in.
func (l *killLine) write(t *testing.T, group bool, kinds string) *killBundle {
	t.Helper()
	b := &killBundle{name: fmt.Sprintf("b-%d.tmb", l.bundles), entries: len(kinds), units: int64(len(kinds)), group: group, certificates: map[[32]byte]string{}}
	w, err := bundle.NewWriter(bundle.WriterConfig{Path: filepath.Join(l.dir, b.name), IDScope: killScope, Created: time.Now(), Signer: l.station, Recipients: []age.Recipient{l.to}})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abort()
	w.SetGrant(l.paper)
	add := func(e *bundle.Entry) {
		if err := w.Add(e); err != nil {
			t.Fatal(err)
		}
	}
	byCertificate := func(h *attesttest.Holder) *dps.X509Certificates {
		return &dps.X509Certificates{Primary: &dps.X509Certificate{Certificate: h.Base64()}}
	}
	if group {
		b.entries++
		add(&bundle.Entry{Closed: true, Group: &dps.EnrollmentGroup{EnrollmentGroupID: "pumps", Enrollment: comesAgain(dps.Attestation{Type: dps.AttestationX509,
			X509: &dps.X509Attestation{SigningCertificates: byCertificate(l.ca)}})}})
	}
	for i, kind := range kinds {
		device := &killDevice{id: fmt.Sprintf("pump-%d-%d", l.bundles, i)}
		var own *attesttest.Holder
		if kind != 's' {
			own = attesttest.Leaf(t, l.ca, device.id, validToday)
			device.cert = own.TLS()
		}
		e := &bundle.Entry{Serial: device.id}
		individual := func(a dps.Attestation) {
			e.Individual = &dps.IndividualEnrollment{RegistrationID: device.id, Enrollment: comesAgain(a)}
		}
		switch kind {
		case 'g':
			e.Device = &bundle.GroupDevice{RegistrationID: device.id, Group: "pumps", KeyHash: keyHash(t, own)}
		case 'x':
			b.certificates[sha256.Sum256(own.Certificate.Raw)] = device.id
			individual(dps.Attestation{Type: dps.AttestationX509, X509: &dps.X509Attestation{ClientCertificates: byCertificate(own)}})
		case 's':
			keys := hubtest.Keys()
			if device.key, err = base64.StdEncoding.DecodeString(keys.PrimaryKey); err != nil {
				t.Fatal(err)
			}
			individual(dps.Attestation{Type: dps.AttestationSymmetricKey, SymmetricKey: keys})
		}
		add(e)
		if i < 3 || i >= len(kinds)-3 {
			b.devices = append(b.devices, device)
		}
	}
	if _, err := w.Close(); err != nil {
		t.Fatal(err)
	}
	l.bundles++
	return b
}
