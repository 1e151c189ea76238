// Package registration is the service itself: which devices may register, which hub they get, and what became of them.
//
// A door brings a [Request]; [Service.Register] finds the individual enrollment or the group that decides about the device,
// has package attest judge the proof, chooses a hub, and writes the registration down before it answers. The answer says
// "assigning", as the wire wants it; the first [Service.Status] finds the assignment ready. Operators' side is in the
// methods on enrollments ([Service.PutEnrollment] and its neighbours) and in [Service.Import].
//
// All state is in the [Store]: any number of Services may work on one. A Service may be used by many goroutines.
//
// The device API and the service API of Azure IoT Hub DPS are the specification. A refused device learns 401002 and
// nothing else; the reason is in the log under the tracking ID of the answer.
package registration

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/dps"
)

// Config is what a service needs.
type Config struct {
	Store Store
	// Scope is the ID scope that the service answers for.
	Scope string
	// Hubs are the names of the linked hubs.
	Hubs []string
	Log  *slog.Logger
	Now  func() time.Time
}

// MaxBody bounds a register body, in octets (device API, section 15.1).
const MaxBody = 64 << 10

// keepOperations is how many operations of a device can still be asked for.
const keepOperations = 4

// Service implements [Registrar].
type Service struct {
	cfg   Config
	scope string // folded

	mu       sync.Mutex
	inFlight map[string]*flight
	groups   groupCache
}

// A flight is a register call that others of the same device and proof wait for.
type flight struct {
	done   chan struct{}
	answer *dps.OperationStatus
	err    error
}

var _ Registrar = (*Service)(nil)

// New returns a service.
func New(cfg Config) *Service {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Service{cfg: cfg, scope: dps.Fold(cfg.Scope), inFlight: make(map[string]*flight)}
}

// Scope returns the ID scope, as it was given.
func (s *Service) Scope() string { return s.cfg.Scope }

// refuse is the one answer to everyone who is not let in.
func refuse(cause error) *dps.Error { return dps.NewError(dps.CodeUnauthorized, "Unauthorized", cause) }

// verdict is which enrollment admits a device.
type verdict struct {
	enrollment *dps.Enrollment
	deviceID   string // of the enrollment, if it names one
	group      string // ID as given, empty for an individual enrollment
	disabled   bool
	x509       bool
}

// Register implements [Registrar].
func (s *Service) Register(ctx context.Context, req *Request) (*dps.OperationStatus, error) {
	if err := s.checkRequest(req); err != nil {
		return nil, s.logged(req, "register", err)
	}
	body, err := parseBody(req)
	if err != nil {
		return nil, s.logged(req, "register", err)
	}
	proof := fingerprint(req)
	key := dps.Fold(req.RegistrationID) + "\x00" + string(proof)
	s.mu.Lock()
	if f := s.inFlight[key]; f != nil {
		s.mu.Unlock()
		select {
		case <-f.done:
			return f.answer, f.err
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	f := &flight{done: make(chan struct{})}
	s.inFlight[key] = f
	s.mu.Unlock()
	f.answer, f.err = s.register(ctx, req, body, proof)
	s.mu.Lock()
	delete(s.inFlight, key)
	s.mu.Unlock()
	close(f.done)
	if f.err != nil {
		return nil, s.logged(req, "register", f.err)
	}
	return f.answer, nil
}

func (s *Service) register(ctx context.Context, req *Request, body *dps.RegisterRequest, proof []byte) (*dps.OperationStatus, error) {
	id := dps.Fold(req.RegistrationID)
	for range 10 {
		var before *Registration
		var v *verdict
		err := s.cfg.Store.View(ctx, func(tx Tx) (err error) {
			if v, err = s.judge(tx, req); err != nil {
				return err
			}
			before, err = tx.Registration(s.scope, id)
			if errors.Is(err, ErrNotFound) {
				before, err = nil, nil
			}
			return err
		})
		if err != nil {
			return nil, err
		}
		if req.Repeat && before != nil && len(before.Operations) > 0 && bytes.Equal(before.Operations[0].Proof, proof) {
			// The device did not see our acknowledgement and sends the same request again.
			return &dps.OperationStatus{OperationID: before.Operations[0].ID, Status: dps.Assigning}, nil
		}
		after := s.decide(req, body, v, before, proof)
		err = s.cfg.Store.Update(ctx, func(tx Tx) error { return tx.PutRegistration(s.scope, after) })
		if errors.Is(err, ErrConflict) {
			continue // another register of this device came first; decide again
		}
		if err != nil {
			return nil, err
		}
		s.cfg.Log.Info("registration", "registrationId", req.RegistrationID, "status", after.State.Status, "substatus", after.State.Substatus,
			"hub", after.State.AssignedHub, "group", v.group, "protocol", req.Protocol, "remote", req.Remote, "operationId", after.Operations[0].ID)
		return &dps.OperationStatus{OperationID: after.Operations[0].ID, Status: dps.Assigning}, nil
	}
	return nil, dps.NewError(dps.CodeServiceOverloaded, "Try again later", errors.New("the registration kept changing"))
}

// decide makes the registration that follows from a verdict. It has no effect of its own.
func (s *Service) decide(req *Request, body *dps.RegisterRequest, v *verdict, before *Registration, proof []byte) *Registration {
	now := dps.Time{Time: s.cfg.Now()}
	r := &Registration{ID: dps.Fold(req.RegistrationID), Group: dps.Fold(v.group)}
	st := &r.State
	st.RegistrationID, st.CreatedDateTimeUTC, st.LastUpdatedDateTimeUTC, st.ETag = req.RegistrationID, &now, &now, newETag()
	if before != nil {
		r.Version, r.Operations = before.Version, before.Operations
		st.CreatedDateTimeUTC = before.State.CreatedDateTimeUTC
	}
	switch {
	case v.x509:
		st.X509 = &struct{}{}
	case v.group != "":
		st.SymmetricKey = &dps.SymmetricKeyState{EnrollmentGroupID: v.group}
	}
	switch hub, err := s.allocate(req, v.enrollment, before); {
	case v.disabled:
		st.Status = dps.Disabled
	case body.CSR != "" || body.ClientCertificateCSR != "":
		// There is no issuer for operational certificates; to assign without one would hide it (device API, section 15.2).
		st.Status, st.ErrorCode, st.ErrorMessage = dps.Failed, int(dps.CodeBadRequest), "Certificate issuance is not configured"
	case err != nil:
		st.Status, st.ErrorCode, st.ErrorMessage = dps.Failed, int(dps.CodeNoHub), "No IoT hub could be chosen"
	default:
		st.Status, st.AssignedHub, st.DeviceID = dps.Assigned, hub, v.deviceID
		if st.DeviceID == "" {
			st.DeviceID = req.RegistrationID
			if before != nil && dps.Fold(before.State.DeviceID) == dps.Fold(req.RegistrationID) {
				st.DeviceID = before.State.DeviceID // hubs tell device IDs apart by case; the device keeps its first one
			}
		}
		st.Substatus = substatus(before, st, v.enrollment.ReprovisionPolicy)
	}
	op := Operation{ID: newOperationID(), Started: now.Time, Proof: proof, State: *st}
	r.Operations = append([]Operation{op}, r.Operations[:min(len(r.Operations), keepOperations-1)]...)
	return r
}

// substatus says how the device came to its hub (device API, section 6.6).
func substatus(before *Registration, st *dps.RegistrationState, p *dps.ReprovisionPolicy) dps.Substatus {
	switch {
	case before == nil || before.State.AssignedHub == "" || before.State.DeviceID != st.DeviceID:
		return dps.InitialAssignment
	case before.State.AssignedHub == st.AssignedHub:
		return dps.ReprovisionedToInitialAssignment
	case p != nil && !p.MigrateDeviceData:
		return dps.DeviceDataReset
	}
	return dps.DeviceDataMigrated
}

// allocate chooses a hub among those that the enrollment allows.
func (s *Service) allocate(req *Request, e *dps.Enrollment, before *Registration) (string, error) {
	if before != nil && before.State.AssignedHub != "" {
		sticky := e.ReprovisionPolicy != nil && !e.ReprovisionPolicy.UpdateHubAssignment ||
			e.ReprovisionPolicy == nil && req.APIVersion <= "2018-04-01"
		if sticky {
			return before.State.AssignedHub, nil
		}
	}
	allowed := e.IoTHubs
	if e.IoTHubHostName != "" {
		allowed = []string{e.IoTHubHostName}
	}
	var hubs []string
	for _, h := range s.cfg.Hubs {
		if len(allowed) == 0 || slices.ContainsFunc(allowed, func(a string) bool { return strings.EqualFold(a, h) }) {
			hubs = append(hubs, h)
		}
	}
	if len(hubs) == 0 {
		return "", errNoHub
	}
	return rendezvous(dps.Fold(req.RegistrationID), hubs), nil
}

var errNoHub = errors.New("no hub is linked that the enrollment allows")

// rendezvous picks the hub with the highest hash of hub and device: even, the same every time, and when a hub goes away
// only its own devices move.
func rendezvous(id string, hubs []string) string {
	best, score := "", -1.0
	for _, h := range hubs {
		sum := sha256.Sum256([]byte(strings.ToLower(h) + "\x00" + id))
		if x := float64(binary.BigEndian.Uint64(sum[:8])) / math.MaxUint64; x > score {
			best, score = h, x
		}
	}
	return best
}

// Status implements [Registrar].
func (s *Service) Status(ctx context.Context, req *Request, operationID string) (*dps.OperationStatus, error) {
	op, err := s.operation(ctx, req, operationID)
	if err != nil {
		return nil, s.logged(req, "status", err)
	}
	return &dps.OperationStatus{OperationID: op.ID, Status: op.State.Status, RegistrationState: &op.State}, nil
}

func (s *Service) operation(ctx context.Context, req *Request, operationID string) (*Operation, error) {
	if err := s.checkRequest(req); err != nil {
		return nil, err
	}
	var found *Operation
	err := s.cfg.Store.View(ctx, func(tx Tx) error {
		found = nil
		r, err := tx.Registration(s.scope, dps.Fold(req.RegistrationID))
		if err != nil && !errors.Is(err, ErrNotFound) {
			return err
		}
		if r != nil {
			for i := range r.Operations {
				if r.Operations[i].ID == operationID {
					found = &r.Operations[i]
				}
			}
		}
		// The very proof that began the operation was judged then: a token may run out while its device waits.
		if found != nil && bytes.Equal(found.Proof, fingerprint(req)) {
			return nil
		}
		_, err = s.judge(tx, req)
		return err
	})
	if err != nil {
		return nil, err
	}
	if found == nil {
		return nil, dps.NewError(dps.CodeNotFound, "Operation not found", nil)
	}
	return found, nil
}

// Lookup implements [Registrar].
func (s *Service) Lookup(ctx context.Context, req *Request) (*dps.RegistrationState, error) {
	if err := s.checkRequest(req); err != nil {
		return nil, s.logged(req, "lookup", err)
	}
	if body, err := parseBody(req); err != nil {
		return nil, s.logged(req, "lookup", err)
	} else if body.CSR != "" || body.ClientCertificateCSR != "" {
		return nil, s.logged(req, "lookup", dps.NewError(dps.CodeBadRequest, "A lookup takes no certificate signing request", nil))
	}
	var state *dps.RegistrationState
	err := s.cfg.Store.View(ctx, func(tx Tx) error {
		if _, err := s.judge(tx, req); err != nil {
			return err
		}
		r, err := tx.Registration(s.scope, dps.Fold(req.RegistrationID))
		if errors.Is(err, ErrNotFound) {
			return dps.NewError(dps.CodeNoGroup, "Registration not found", nil)
		}
		if err == nil {
			state = &r.State
		}
		return err
	})
	if err != nil {
		return nil, s.logged(req, "lookup", err)
	}
	return state, nil
}

// logged writes a refusal down with its reason and returns what the device may see.
func (s *Service) logged(req *Request, what string, err error) error {
	e := dps.AsError(err)
	level := slog.LevelInfo
	if e.Code.Status() >= 500 {
		level = slog.LevelError
	}
	s.cfg.Log.Log(context.Background(), level, "refused", "operation", what, "registrationId", clip(req.RegistrationID), "idScope", clip(req.IDScope),
		"code", int(e.Code), "trackingId", e.TrackingID, "reason", e.Error(), "protocol", req.Protocol, "remote", req.Remote)
	return e
}

func clip(s string) string {
	if len(s) > 128 {
		return s[:128]
	}
	return s
}

func (s *Service) checkRequest(req *Request) error {
	if err := dps.CheckRegistrationID(req.RegistrationID); err != nil {
		return dps.NewError(dps.CodeInvalidArgument, "Invalid registration ID", err)
	}
	if req.APIVersion != "" {
		if err := dps.CheckAPIVersion(req.APIVersion); err != nil {
			return dps.NewError(dps.CodeBadRequest, "Invalid api-version", err)
		}
	}
	if dps.Fold(req.IDScope) != s.scope {
		return refuse(errors.New("unknown ID scope"))
	}
	return nil
}

func parseBody(req *Request) (*dps.RegisterRequest, error) {
	var body dps.RegisterRequest
	if len(req.Body) > MaxBody {
		return nil, dps.NewError(dps.CodeTooLarge, "Request body is too large", nil)
	}
	trimmed := bytes.TrimSpace(req.Body)
	if len(trimmed) == 0 {
		return &body, nil
	}
	if trimmed[0] != '{' {
		return nil, dps.NewError(dps.CodeBadRequest, "Request body is not a JSON object", nil)
	}
	if err := json.Unmarshal(trimmed, &body); err != nil {
		return nil, dps.NewError(dps.CodeBadRequest, "Request body is not valid JSON", err)
	}
	if body.RegistrationID != "" && dps.Fold(body.RegistrationID) != dps.Fold(req.RegistrationID) {
		return nil, dps.NewError(dps.CodeBadRequest, "The registration ID of the body is another one", nil)
	}
	if (body.CSR != "" || body.ClientCertificateCSR != "") && !dps.AcceptsCSR(req.APIVersion) {
		return nil, dps.NewError(dps.CodeBadCSR, "This api-version takes no certificate signing request", nil)
	}
	return &body, nil
}

// fingerprint names what a device proves itself with. Where there is a token it decides.
func fingerprint(req *Request) []byte {
	h := sha256.New()
	switch {
	case req.Proof.Token != "":
		h.Write([]byte("token\x00" + req.Proof.Token))
	case len(req.Proof.Certificates) > 0:
		h.Write([]byte("certificate\x00"))
		h.Write(req.Proof.Certificates[0].Raw)
	default:
		return nil
	}
	return h.Sum(nil)
}

// judge finds the enrollment that decides about a device and holds its proof against it (device API, sections 7.3 and 8.2;
// service API, section 4.2): an individual enrollment decides alone, whatever its kind; else a group does.
func (s *Service) judge(tx Tx, req *Request) (*verdict, error) {
	now := s.cfg.Now()
	var token *attest.Token
	if req.Proof.Token != "" {
		t, err := attest.ParseToken(req.Proof.Token)
		if err != nil {
			return nil, refuse(err)
		}
		if t.Expired(now) {
			return nil, refuse(attest.ErrExpired)
		}
		if !t.ForDevice(s.scope, req.RegistrationID) {
			return nil, refuse(attest.ErrResource)
		}
		token = &t
	} else {
		if len(req.Proof.Certificates) == 0 {
			return nil, refuse(attest.ErrNoCertificate)
		}
		if err := attest.CheckLeaf(req.Proof.Certificates[0], req.RegistrationID, now); err != nil {
			return nil, refuse(err)
		}
	}
	r, err := tx.Record(s.scope, Individual, dps.Fold(req.RegistrationID))
	switch {
	case err == nil:
		v, err := s.judgeIndividual(r, req, token)
		if err == nil || v == nil {
			return v, err
		}
		// A disabled enrollment blocks its device whatever the device proves itself with, so the proof may be one for a
		// group. Whoever can prove nothing does not learn that there is an enrollment.
		if token != nil {
			_, gerr := s.judgeByKey(tx, req, token)
			return v, gerr
		}
		_, gerr := s.judgeByChain(tx, req, now)
		return v, gerr
	case !errors.Is(err, ErrNotFound):
		return nil, err
	case token != nil:
		return s.judgeByKey(tx, req, token)
	}
	return s.judgeByChain(tx, req, now)
}

// judgeIndividual holds a proof against an individual enrollment. When it fails and the enrollment is disabled, the verdict
// comes beside the error.
func (s *Service) judgeIndividual(r *Record, req *Request, token *attest.Token) (*verdict, error) {
	var e dps.IndividualEnrollment
	if err := json.Unmarshal(r.Document, &e); err != nil {
		return nil, fmt.Errorf("enrollment %q in the store: %w", r.ID, err)
	}
	v := &verdict{enrollment: &e.Enrollment, deviceID: e.DeviceID, disabled: e.ProvisioningStatus == dps.EnrollmentDisabled, x509: token == nil}
	err := proveIndividual(r, &e, req, token)
	if err != nil && !v.disabled {
		return nil, err
	}
	return v, err
}

func proveIndividual(r *Record, e *dps.IndividualEnrollment, req *Request, token *attest.Token) error {
	if token != nil {
		if e.Attestation.Type != dps.AttestationSymmetricKey {
			return refuse(errors.New("the enrollment does not attest by symmetric key"))
		}
		keys, err := keysOf(r)
		if err != nil {
			return err
		}
		for _, k := range keys {
			if token.SignedBy(k) {
				return nil
			}
		}
		return refuse(attest.ErrSignature)
	}
	if e.Attestation.Type != dps.AttestationX509 || e.Attestation.X509.ClientCertificates == nil {
		return refuse(errors.New("the enrollment does not attest by certificate"))
	}
	for _, c := range []*dps.X509Certificate{e.Attestation.X509.ClientCertificates.Primary, e.Attestation.X509.ClientCertificates.Secondary} {
		if c == nil {
			continue
		}
		if der, err := base64.StdEncoding.DecodeString(c.Certificate); err == nil && bytes.Equal(der, req.Proof.Certificates[0].Raw) {
			return nil
		}
	}
	return refuse(errors.New("the certificate is not the enrolled one"))
}

// keysOf returns the symmetric keys of a record, primary first.
func keysOf(r *Record) ([][]byte, error) {
	var k dps.SymmetricKeyAttestation
	if err := json.Unmarshal(r.Keys, &k); err != nil {
		return nil, fmt.Errorf("keys of %q in the store cannot be read", r.ID) // their text stays out of the error
	}
	var keys [][]byte
	for _, text := range []string{k.PrimaryKey, k.SecondaryKey} {
		if b, err := base64.StdEncoding.DecodeString(text); err == nil && len(b) > 0 {
			keys = append(keys, b)
		}
	}
	return keys, nil
}

// groupCache keeps what the hot path needs of groups, until the scope's groups change.
type groupCache struct {
	mu        sync.Mutex
	revision  int64
	symmetric []*cachedGroup
	loaded    bool
	subjects  map[[32]byte][]attest.Anchor[*cachedGroup]
}

// maxSubjects bounds the cache: devices choose the issuer names that are asked for.
const maxSubjects = 4096

type cachedGroup struct {
	id         string
	enrollment dps.Enrollment
	keys       [][]byte
	disabled   bool
}

func (s *Service) cachedGroup(r *Record) (*cachedGroup, error) {
	var g dps.EnrollmentGroup
	if err := json.Unmarshal(r.Document, &g); err != nil {
		return nil, fmt.Errorf("group %q in the store: %w", r.ID, err)
	}
	return &cachedGroup{id: r.ID, enrollment: g.Enrollment, disabled: g.ProvisioningStatus == dps.EnrollmentDisabled}, nil
}

// withGroups runs f on the cache as it is for the present revision of the scope's groups.
func (s *Service) withGroups(tx Tx, f func(*groupCache) error) error {
	rev, err := tx.GroupsRevision(s.scope)
	if err != nil {
		return err
	}
	c := &s.groups
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.revision != rev || c.subjects == nil || len(c.subjects) > maxSubjects {
		c.revision, c.symmetric, c.loaded = rev, nil, false
		c.subjects = make(map[[32]byte][]attest.Anchor[*cachedGroup])
	}
	return f(c)
}

func (s *Service) judgeByKey(tx Tx, req *Request, token *attest.Token) (*verdict, error) {
	var groups []*cachedGroup
	err := s.withGroups(tx, func(c *groupCache) error {
		if !c.loaded {
			records, err := tx.SymmetricGroups(s.scope)
			if err != nil {
				return err
			}
			for _, r := range records {
				g, err := s.cachedGroup(r)
				if err != nil {
					return err
				}
				if g.keys, err = keysOf(r); err != nil {
					return err
				}
				c.symmetric = append(c.symmetric, g)
			}
			c.loaded = true
		}
		groups = c.symmetric
		return nil
	})
	if err != nil {
		return nil, err
	}
	// The token names no group. The ID counts as the device writes it; folded as well, since some tools fold it first.
	ids := []string{req.RegistrationID}
	if folded := dps.Fold(req.RegistrationID); folded != req.RegistrationID {
		ids = append(ids, folded)
	}
	for _, g := range groups {
		for _, k := range g.keys {
			for _, id := range ids {
				if token.SignedBy(attest.DeriveKey(k, id)) {
					if g.disabled {
						return nil, refuse(fmt.Errorf("group %q is disabled", g.id))
					}
					return &verdict{enrollment: &g.enrollment, group: g.id}, nil
				}
			}
		}
	}
	return nil, refuse(errors.New("no enrollment has this registration ID and no group's key derives the one it was signed with"))
}

func (s *Service) judgeByChain(tx Tx, req *Request, now time.Time) (*verdict, error) {
	g, err := attest.FindGroup(req.Proof.Certificates, func(child *x509.Certificate) ([]attest.Anchor[*cachedGroup], error) {
		return s.anchors(tx, sha256.Sum256(child.RawIssuer))
	}, now)
	if errors.Is(err, attest.ErrChain) || errors.Is(err, attest.ErrNoCertificate) {
		return nil, refuse(err)
	}
	if err != nil {
		return nil, err
	}
	if g.disabled {
		return nil, refuse(fmt.Errorf("group %q is disabled", g.id))
	}
	return &verdict{enrollment: &g.enrollment, group: g.id, x509: true}, nil
}

// anchors returns the groups' certificates of a subject: one indexed read, then from memory.
func (s *Service) anchors(tx Tx, subject [32]byte) (found []attest.Anchor[*cachedGroup], err error) {
	err = s.withGroups(tx, func(c *groupCache) error {
		var ok bool
		if found, ok = c.subjects[subject]; ok {
			return nil
		}
		records, err := tx.GroupsBySubject(s.scope, subject)
		if err != nil {
			return err
		}
		for _, r := range records {
			g, err := s.cachedGroup(r)
			if err != nil {
				return err
			}
			x := g.enrollment.Attestation.X509
			if x == nil || x.SigningCertificates == nil {
				continue
			}
			for _, slot := range []*dps.X509Certificate{x.SigningCertificates.Primary, x.SigningCertificates.Secondary} {
				if slot == nil {
					continue
				}
				cert, err := parseCertificate(slot.Certificate)
				if err != nil {
					return fmt.Errorf("group %q in the store: %w", r.ID, err)
				}
				if sha256.Sum256(cert.RawSubject) == subject {
					found = append(found, attest.Anchor[*cachedGroup]{Certificate: cert, Group: g})
				}
			}
		}
		c.subjects[subject] = found
		return nil
	})
	return found, err
}

// newOperationID returns an ID shaped like the service's, 55 characters: some devices have room for no more.
func newOperationID() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // crypto/rand.Read never fails
	return "5." + hex.EncodeToString(b[:]) + "." + dps.NewUUID()
}

// newETag returns a fresh tag: base64 of a quoted GUID, as the service's are.
func newETag() string { return base64.StdEncoding.EncodeToString([]byte(`"` + dps.NewUUID() + `"`)) }
