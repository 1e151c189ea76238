package registration_test

import (
	"bytes"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/bundle"
	"github.com/touchmark/touchmark/pkg/device"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

// A tpmDevice is a device with a TPM.
type tpmDevice struct {
	*device.SoftTPM
	t   testing.TB
	f   *registrationtest.Fixture
	id  string
	tpm *dps.TPMAttestation
}

func newTPMDevice(t testing.TB, f *registrationtest.Fixture, id string, ek *rsa.PrivateKey) *tpmDevice {
	t.Helper()
	soft, err := device.NewSoftTPM(ek, nil)
	if err != nil {
		t.Fatal(err)
	}
	e, s, err := soft.Keys(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return &tpmDevice{soft, t, f, id, &dps.TPMAttestation{EndorsementKey: base64.StdEncoding.EncodeToString(e), StorageRootKey: base64.StdEncoding.EncodeToString(s)}}
}

func (d *tpmDevice) enrollment(status dps.ProvisioningStatus) dps.Enrollment {
	return dps.Enrollment{Attestation: &dps.Attestation{Type: dps.AttestationTPM, TPM: d.tpm}, ProvisioningStatus: status}
}

// request is one with the token, if there is one, and with the TPM's keys.
func (d *tpmDevice) request(token string, withKeys bool) *registration.Request {
	r := &registration.Request{IDScope: registrationtest.Scope, RegistrationID: d.id, APIVersion: "2019-03-31", Proof: attest.Proof{Token: token}}
	if withKeys {
		var err error
		if r.Body, err = json.Marshal(dps.RegisterRequest{RegistrationID: d.id, TPM: d.tpm}); err != nil {
			d.t.Fatal(err)
		}
	}
	return r
}

// token is signed by the key that the TPM has at present.
func (d *tpmDevice) token(in time.Duration) string {
	d.t.Helper()
	sr, se := url.QueryEscape(registrationtest.Scope+"/registrations/"+d.id), fmt.Sprint(d.f.Now().Add(in).Unix())
	sum, err := d.MAC(d.t.Context(), nil, []byte(sr+"\n"+se))
	if err != nil {
		d.t.Fatal(err)
	}
	return "SharedAccessSignature sr=" + sr + "&sig=" + url.QueryEscape(base64.StdEncoding.EncodeToString(sum)) + "&se=" + se + "&skn=registration"
}

// challenged wants a challenge, and returns its blob.
func (d *tpmDevice) challenged(err error) []byte {
	d.t.Helper()
	var c *registration.Challenge
	if !errors.As(err, &c) || c.Refusal.Code != dps.CodeUnauthorized || c.Refusal.TrackingID == "" {
		d.t.Fatalf("no challenge but %v", err)
	}
	return c.Blob
}

// prove opens a fresh challenge.
func (d *tpmDevice) prove(s *registration.Service) string {
	d.t.Helper()
	_, err := s.Register(d.t.Context(), d.request("", true))
	if err := d.Activate(d.t.Context(), d.challenged(err)); err != nil {
		d.t.Fatal(err)
	}
	return d.token(time.Hour)
}

// refusedTPM wants a 401 without a blob.
func refusedTPM(t testing.TB, why string, err error) {
	t.Helper()
	var c *registration.Challenge
	if e := new(dps.Error); !errors.As(err, &e) || e.Code != dps.CodeUnauthorized || errors.As(err, &c) {
		t.Errorf("%s: %v", why, err)
	}
}

// state registers and asks.
func (d *tpmDevice) state(s *registration.Service, req *registration.Request) *dps.RegistrationState {
	d.t.Helper()
	op, err := s.Register(d.t.Context(), req)
	if err != nil {
		d.t.Fatal(err)
	}
	st, err := s.Status(d.t.Context(), req, op.OperationID)
	if err != nil {
		d.t.Fatal(err)
	}
	return st.RegistrationState
}

// deviceKey is the key that the service keeps for the device's hub.
func (d *tpmDevice) deviceKey() (key []byte) {
	d.t.Helper()
	err := d.f.Store.View(d.t.Context(), func(tx registration.Tx) error {
		r, err := tx.Registration(strings.ToLower(registrationtest.Scope), d.id)
		if err == nil {
			key = r.DeviceKey
		}
		return err
	})
	if err != nil {
		d.t.Fatal(err)
	}
	return key
}

// has reports whether the TPM's key is this one.
func (d *tpmDevice) has(key []byte) bool {
	d.t.Helper()
	h := hmac.New(sha256.New, key)
	h.Write([]byte("text"))
	got, err := d.MAC(d.t.Context(), nil, []byte("text"))
	return err == nil && hmac.Equal(got, h.Sum(nil))
}

// Device API, section 9.2, through two replicas: the challenge comes from one, the proof, without the TPM's keys, goes to the other.
// DPS-D 51, 52.
func TestTPM(t *testing.T) {
	f := registrationtest.NewFixture(t, "a.example")
	one, two := f.Service, f.Replica("a.example")
	d := newTPMDevice(t, f, "tpm-1", nil)
	f.Put(t, registration.Individual, d.id, d.enrollment(""))
	token := d.prove(one)
	req := d.request(token, false)
	op, err := two.Register(t.Context(), req)
	if err != nil || op.RegistrationState != nil {
		t.Fatalf("%+v, %v", op, err)
	}
	var told []string
	for _, s := range []*registration.Service{one, two, one} {
		st, err := s.Status(t.Context(), req, op.OperationID)
		if err != nil || st.Status != dps.Assigned || st.RegistrationState.AssignedHub != "a.example" || st.RegistrationState.TPM == nil || st.RegistrationState.SymmetricKey != nil {
			t.Fatalf("%+v, %v", st, err)
		}
		told = append(told, string(st.RegistrationState.TPM.AuthenticationKey))
	}
	if told[0] != told[1] || told[1] != told[2] {
		t.Error("the key changes as the device asks")
	}
	again := d.state(one, req) // it did not see the answer
	if !bytes.Equal(again.TPM.AuthenticationKey, []byte(told[0])) {
		t.Error("another key for the same request")
	}
	if st, err := two.Lookup(t.Context(), req); err != nil || st.Status != dps.Assigned {
		t.Errorf("lookup: %+v, %v", st, err)
	}
	key := d.deviceKey()
	if len(key) != 32 || d.has(key) {
		t.Errorf("a key of %d octets, or it is there too early", len(key))
	}
	if err := d.Activate(t.Context(), []byte(told[0])); err != nil || !d.has(key) {
		t.Errorf("the device's key: %v", err)
	}
	// The TPM has the hub's key now, and proves nothing here with it, until it is challenged again.
	_, err = one.Register(t.Context(), d.request(d.token(time.Hour), false))
	refusedTPM(t, "with the hub's key", err)
	f.Advance(time.Second) // another token
	fresh := d.state(one, d.request(d.prove(two), true))
	if err := d.Activate(t.Context(), fresh.TPM.AuthenticationKey); err != nil || bytes.Equal(d.deviceKey(), key) || !d.has(d.deviceKey()) {
		t.Errorf("the next registration's key: %v", err)
	}
	if fresh.Substatus != dps.ReprovisionedToInitialAssignment {
		t.Errorf("%+v", fresh)
	}
	// The service API shows the endorsement key and no key of the device's.
	shown, err := one.GetEnrollment(t.Context(), registration.Individual, d.id)
	if err != nil {
		t.Fatal(err)
	}
	in := shown.(*dps.IndividualEnrollment)
	if in.Attestation.TPM == nil || *in.Attestation.TPM != *d.tpm || in.RegistrationState.Status != dps.Assigned || in.RegistrationState.TPM != nil {
		t.Errorf("%+v", in)
	}
	if a, err := one.AttestationMechanism(t.Context(), registration.Actor{}, registration.Individual, d.id); err != nil || *a.TPM != *d.tpm {
		t.Errorf("%+v, %v", a, err)
	}
	if st, err := one.GetRegistration(t.Context(), d.id); err != nil || st.TPM != nil {
		t.Errorf("%+v, %v", st, err)
	}
}

// What a challenge is good for, and for how long: DPS-D 53, 54.
func TestTPMChallenges(t *testing.T) {
	f := registrationtest.NewFixture(t, "a.example")
	s := f.Service
	ek, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	d, other := newTPMDevice(t, f, "tpm-1", ek), newTPMDevice(t, f, "tpm-1", nil)
	f.Put(t, registration.Individual, d.id, d.enrollment(""))
	challenge := func(d *tpmDevice, token string) error {
		_, err := s.Register(t.Context(), d.request(token, true))
		return err
	}
	for why, err := range map[string]error{
		"another endorsement key": challenge(other, ""),
		"an unknown ID":           challenge(&tpmDevice{d.SoftTPM, t, f, "tpm-2", d.tpm}, ""),
		"a key's enrollment":      challenge(&tpmDevice{d.SoftTPM, t, f, "own-key", d.tpm}, ""),
		"no base64":               challenge(&tpmDevice{d.SoftTPM, t, f, "tpm-1", &dps.TPMAttestation{EndorsementKey: "!", StorageRootKey: d.tpm.StorageRootKey}}, ""),
		"no keys":                 challenge(&tpmDevice{d.SoftTPM, t, f, "tpm-1", &dps.TPMAttestation{}}, ""),
		"no storage root key":     challenge(&tpmDevice{d.SoftTPM, t, f, "tpm-1", &dps.TPMAttestation{EndorsementKey: d.tpm.EndorsementKey}}, ""),
		"keys and no proof of one": func() error {
			_, err := s.Register(t.Context(), d.request("", false))
			return err
		}(),
	} {
		refusedTPM(t, why, err)
	}
	elsewhere := d.request("", true)
	elsewhere.IDScope = "0ne00000000"
	_, err = s.Register(t.Context(), elsewhere)
	refusedTPM(t, "another scope", err)
	_, err = s.Challenge(t.Context(), d.request("", false))
	refusedTPM(t, "nothing to challenge", err)

	for why, id := range map[string]string{"an unknown ID": "tpm-2", "a key's enrollment": "own-key"} {
		// Over AMQP a stranger's TPM gets a blob, and a refusal when it comes with what that proves.
		stranger := &tpmDevice{d.SoftTPM, t, f, id, d.tpm}
		req := stranger.request("", false)
		ek, srk, err := d.Keys(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		req.Proof.TPM = &attest.TPMKeys{EK: ek, SRK: srk}
		blob, err := s.Challenge(t.Context(), req)
		if err != nil {
			t.Fatalf("%s: %v", why, err)
		}
		if err := d.Activate(t.Context(), blob); err != nil {
			t.Errorf("%s: %v", why, err)
		}
		_, err = s.Register(t.Context(), stranger.request(stranger.token(time.Hour), false))
		refusedTPM(t, why, err)
	}

	first := d.prove(s)
	second := d.prove(s)
	_, err = s.Lookup(t.Context(), d.request("", true))
	third := d.challenged(err)
	fourth := d.challenged(challenge(d, ""))
	if bytes.Equal(third, fourth) {
		t.Error("the same challenge again")
	}
	// The network repeats it, and strangers ask for challenges who know the endorsement key, with storage root keys of their own: the
	// device's token is good whatever they do, and the hub's key is for its storage root key.
	token := d.prove(s)
	for range 5 {
		d.challenged(challenge(d, ""))
		stranger := newTPMDevice(t, f, d.id, nil)
		stranger.tpm.EndorsementKey = d.tpm.EndorsementKey
		stranger.challenged(challenge(stranger, ""))
	}
	for _, early := range []string{first, second, token} {
		if st := d.state(s, d.request(early, true)); st.Status != dps.Assigned || d.Activate(t.Context(), st.TPM.AuthenticationKey) != nil {
			t.Errorf("after other challenges: %+v", st)
		}
	}
	// Later it is another key; the one before counts for a while.
	d.prove(s)
	f.Advance(11 * time.Minute)
	late := d.token(2 * time.Hour)
	d.challenged(challenge(d, ""))
	if st := d.state(s, d.request(late, true)); st.Status != dps.Assigned {
		t.Errorf("with the challenge before: %+v", st)
	}
	f.Advance(6 * time.Minute)
	d.prove(s)
	_, err = s.Register(t.Context(), d.request(late, false))
	refusedTPM(t, "the challenge before, long ago", err)
	f.Advance(11 * time.Minute)

	token = d.prove(s)
	f.Advance(59 * time.Minute)
	if st := d.state(s, d.request(token, false)); st.Status != dps.Assigned {
		t.Errorf("after an hour: %+v", st)
	}
	late = d.token(24 * time.Hour)
	f.Advance(12 * time.Minute)
	_, err = s.Register(t.Context(), d.request(late, false))
	refusedTPM(t, "a challenge that has expired", err)
	d.challenged(challenge(d, late))
	d.challenged(challenge(d, d.token(-time.Hour)))

	// Another storage root key is another challenge. A stranger's does not get in the way of the one who has the endorsement key.
	cleared := newTPMDevice(t, f, d.id, ek)
	if st := cleared.state(s, cleared.request(cleared.prove(s), true)); st.Status != dps.Assigned || cleared.Activate(t.Context(), st.TPM.AuthenticationKey) != nil {
		t.Errorf("another storage root key: %+v", st)
	}
	f.Advance(time.Second) // another token
	token = d.prove(s)
	stranger := newTPMDevice(t, f, d.id, nil)
	stranger.tpm.EndorsementKey = d.tpm.EndorsementKey
	if err := stranger.Activate(t.Context(), stranger.challenged(challenge(stranger, ""))); err == nil {
		t.Error("somebody opened a challenge for another's endorsement key")
	}
	if st := d.state(s, d.request(token, true)); st.Status != dps.Assigned || d.Activate(t.Context(), st.TPM.AuthenticationKey) != nil {
		t.Errorf("after a stranger's challenge: %+v", st)
	}

	// The enrollment goes over to another TPM: the old one's proof is worth nothing.
	token = d.prove(s)
	f.Put(t, registration.Individual, d.id, other.enrollment(""))
	_, err = s.Register(t.Context(), d.request(token, true))
	refusedTPM(t, "the TPM from before", err)
	off := other.enrollment(dps.EnrollmentDisabled)
	f.Put(t, registration.Individual, d.id, off)
	_, err = s.Register(t.Context(), other.request("", false))
	refusedTPM(t, "disabled, without a proof", err)
	if st := other.state(s, other.request(other.prove(s), false)); st.Status != dps.Disabled || st.TPM != nil || other.deviceKey() != nil {
		t.Errorf("disabled: %+v", st)
	}
}

// An endorsement key never serves two devices, however it is written (invariant 1), and enrollments of TPMs are in order.
func TestTPMEnrollments(t *testing.T) {
	f := registrationtest.NewFixture(t, "a.example")
	d := newTPMDevice(t, f, "tpm-1", nil)
	put := func(kind registration.Kind, id string, tpm *dps.TPMAttestation) error {
		e := dps.Enrollment{Attestation: &dps.Attestation{Type: dps.AttestationTPM, TPM: tpm}}
		var doc any = dps.IndividualEnrollment{RegistrationID: id, Enrollment: e}
		if kind == registration.Group {
			doc = dps.EnrollmentGroup{EnrollmentGroupID: id, Enrollment: e}
		}
		b, err := json.Marshal(doc)
		if err != nil {
			t.Fatal(err)
		}
		_, err = f.Service.PutEnrollment(t.Context(), registration.Actor{}, kind, id, b, "")
		return err
	}
	f.Put(t, registration.Individual, d.id, d.enrollment(""))
	f.Put(t, registration.Individual, d.id, d.enrollment("")) // its own is no conflict
	ek, err := base64.StdEncoding.DecodeString(d.tpm.EndorsementKey)
	if err != nil {
		t.Fatal(err)
	}
	copy(ek[54:], []byte{0, 1, 0, 1}) // the exponent, said in full
	for why, err := range map[string]error{
		"a group":                       put(registration.Group, "tpms", d.tpm),
		"no key":                        put(registration.Individual, "tpm-2", &dps.TPMAttestation{}),
		"no base64":                     put(registration.Individual, "tpm-2", &dps.TPMAttestation{EndorsementKey: "AToA AQ"}),
		"no TPM's key":                  put(registration.Individual, "tpm-2", &dps.TPMAttestation{EndorsementKey: "AToAAQALAAMAsgAg"}),
		"a storage root key of nothing": put(registration.Individual, "tpm-2", &dps.TPMAttestation{EndorsementKey: d.tpm.EndorsementKey, StorageRootKey: "!"}),
		"the same endorsement key":      put(registration.Individual, "tpm-2", d.tpm),
		"the same, written otherwise":   put(registration.Individual, "tpm-2", &dps.TPMAttestation{EndorsementKey: base64.StdEncoding.EncodeToString(ek)}),
	} {
		if e := dps.AsError(err); e.Code.Status() != 400 {
			t.Errorf("%s: %v", why, err)
		}
	}
	if err := f.Service.DeleteEnrollment(t.Context(), registration.Actor{}, registration.Individual, d.id, ""); err != nil {
		t.Fatal(err)
	}
	if err := put(registration.Individual, "tpm-2", d.tpm); err != nil {
		t.Errorf("after the other was deleted: %v", err)
	}
}

// A factory's bundle brings the TPM, and later its end: rework and scrapping block it, under any name.
func TestTPMFromBundle(t *testing.T) {
	f := registrationtest.NewFixture(t, "a.example")
	s := f.Service
	d, board := newTPMDevice(t, f, "tpm-1", nil), newTPMDevice(t, f, "tpm-1", nil)
	hash := func(d *tpmDevice) string {
		ek, err := base64.StdEncoding.DecodeString(d.tpm.EndorsementKey)
		if err != nil {
			t.Fatal(err)
		}
		h, err := attest.EKHash(ek)
		if err != nil {
			t.Fatal(err)
		}
		return h
	}
	entry := func(d *tpmDevice, id string, revision int64) bundle.Entry {
		return bundle.Entry{Serial: strings.ToUpper(id), Revision: revision, Individual: &dps.IndividualEnrollment{RegistrationID: id, Enrollment: d.enrollment(dps.EnrollmentEnabled)}}
	}
	gone := func(d *tpmDevice, revision int64, state bundle.State) bundle.Entry {
		return bundle.Entry{Serial: strings.ToUpper(d.id), Revision: revision, Retired: &bundle.RetiredDevice{RegistrationID: d.id, KeyHash: hash(d), State: state, At: f.Now()}}
	}
	f.Import(t, entry(d, "tpm-1", 0))
	f.Import(t, entry(d, "tpm-1", 0)) // again
	if st := d.state(s, d.request(d.prove(s), true)); st.Status != dps.Assigned {
		t.Errorf("%+v", st)
	}
	res, err := s.Import(t.Context(), func(yield func(bundle.Entry, error) bool) { yield(entry(d, "tpm-7", 0), nil) }, registration.ImportConfig{Station: "station"})
	if err != nil || res.Conflicting != 1 {
		t.Errorf("one endorsement key for two devices: %+v, %v", res, err)
	}
	f.Import(t, gone(d, 0, bundle.Reworked), entry(board, "tpm-1", 1))
	if st := board.state(s, board.request(board.prove(s), true)); st.Status != dps.Assigned {
		t.Errorf("the new board: %+v", st)
	}
	_, err = s.Register(t.Context(), d.request("", true))
	refusedTPM(t, "the old board", err)
	old := &tpmDevice{d.SoftTPM, t, f, "tpm-9", d.tpm}
	f.Put(t, registration.Individual, "tpm-9", d.enrollment(""))
	_, err = s.Register(t.Context(), old.request("", true))
	refusedTPM(t, "the old board, enrolled by hand", err)
	token := board.prove(s)
	f.Import(t, gone(board, 1, bundle.Scrapped))
	for _, token := range []string{token, board.prove(s)} {
		if st := board.state(s, board.request(token, false)); st.Status != dps.Disabled || st.TPM != nil {
			t.Errorf("scrapped: %+v", st)
		}
	}
}

// Many challenges at once, of many devices through two replicas.
func TestTPMsAtOnce(t *testing.T) {
	f := registrationtest.NewFixture(t, "a.example")
	services := []*registration.Service{f.Service, f.Replica("a.example")}
	var devices []*tpmDevice
	for i := range 4 {
		d := newTPMDevice(t, f, fmt.Sprintf("tpm-%d", i), nil)
		f.Put(t, registration.Individual, d.id, d.enrollment(""))
		devices = append(devices, d)
	}
	var wg sync.WaitGroup
	for i, d := range devices {
		wg.Go(func() {
			for n := range 10 {
				st := d.state(services[(i+n)%2], d.request(d.prove(services[n%2]), n%3 == 0))
				if st.Status != dps.Assigned || d.Activate(t.Context(), st.TPM.AuthenticationKey) != nil || !d.has(d.deviceKey()) {
					t.Errorf("%s: %+v", d.id, st)
				}
			}
		})
	}
	wg.Wait()
}
