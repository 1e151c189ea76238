// Package registration is the service itself: which devices may register, which hub they get, and what became of them.
//
// A door brings a [Request]; [Service.Register] finds the individual enrollment or the group that decides about the device,
// has package attest judge the proof, chooses a hub, and writes the registration down before it answers. The answer says
// "assigning", as the wire wants it; the first [Service.Status] finds the assignment ready. Operators' side is in the
// methods on enrollments ([Service.PutEnrollment] and its neighbours) and in [Service.Import]. Where an enrollment names an
// [Issuer], a device that sends a certificate signing request gets its operational certificate with the assignment.
//
// All state is in the [Store]: any number of Services may work on one. A Service may be used by many goroutines.
//
// The device API and the service API of Azure IoT Hub DPS are the specification. A refused device learns 401002 and
// nothing else; the reason is in the log under the tracking ID of the answer.
package registration

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/touchmark/touchmark/pkg/allocation"
	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/dps"
)

// Config is what a service needs.
type Config struct {
	Store Store
	// Scope is the ID scope that the service answers for.
	Scope string
	// Settings are what the scope goes by as long as the store has none of it.
	Settings Settings
	// Owners are the public keys of those whose production orders count.
	Owners []crypto.PublicKey
	// RequireOrders refuses bundles that were not made on an order.
	RequireOrders bool
	// Intermediates complete devices' chains. They are CA certificates that admit nobody by themselves: devices that do not
	// send them need them for the way to a group's.
	Intermediates []*x509.Certificate
	// Issuers sign operational certificates for devices whose enrollment names them. Without one a CSR makes a registration fail.
	Issuers map[string]Issuer
	// PrivateNetworks, and loopback, are where callers of a scope come from that is closed to the public.
	PrivateNetworks []netip.Prefix
	// AtOnce are patterns of client versions, in which * stands for any text. Who says to be such a client is told the end of a
	// registration in the answer to register. Azure's SDKs for Node ("azure-iot-provisioning-device/*"), Python
	// ("azure-iot-device-provisioning-py/*") and C take it; those for C# and the IoT identity service do not (device API, section
	// 6.2). Nil tells nobody.
	AtOnce []string
	// UnlinkedHubs lets enrollments name hubs that are not linked: one that is linked later is assigned then.
	UnlinkedHubs bool
	// HTTPWebhooks lets enrollments name webhooks of this machine without TLS.
	HTTPWebhooks bool
	// OpenHub returns a linked hub of a scope that is told about devices; nil: the service knows hubs of kind record alone.
	OpenHub func(scope string, h LinkedHub) (Hub, error)
	// Webhook calls what chooses hubs for enrollments with custom allocation; nil: there are none.
	Webhook Webhook
	// Latency is what is known of the ways to hubs, for the policy geoLatency; nil is nothing.
	Latency *allocation.Table
	// GiveUp is for how long a device waits for its hub before its registration fails; 0 is [DefaultGiveUp].
	GiveUp time.Duration
	// OnProvision is told of every step of telling hubs; it must not block. May be nil.
	OnProvision func(Provisioning)
	// Attempt is told what each device tried, and what came of it, with the folded ID scope; an empty one is none of the
	// service's. It must not wait. Nil is nobody.
	Attempt func(scope string, a *Attempt)
	Log     *slog.Logger
	Now     func() time.Time
}

// MaxBody bounds a register body, in octets (device API, section 15.1).
const MaxBody = 64 << 10

// keepOperations is how many operations of a device can still be asked for.
const keepOperations = 4

// repeatTime is for how long a request that its transport marks as repeated can be the one before.
const repeatTime = time.Minute

// registerTime bounds a registration, which goes on when its device hangs up: another call of the device may wait for it.
const registerTime = 30 * time.Second

// Service implements [Registrar].
type Service struct {
	cfg   Config
	scope string // folded

	mu            sync.Mutex
	inFlight      map[string]*flight
	groups        groupCache
	issuing       issuing
	searcher      *searcher
	intermediates *attest.Pool
	recent        recent
	settings      atomic.Pointer[knownSettings]
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
	s := &Service{cfg: cfg, scope: dps.Fold(cfg.Scope), inFlight: make(map[string]*flight), searcher: newSearcher(), intermediates: attest.NewPool(cfg.Intermediates)}
	s.cfg.Store = &quotaStore{Store: cfg.Store, s: s, counts: make(map[Counted]*count)}
	return s
}

// Scope returns the ID scope, as it was given.
func (s *Service) Scope() string { return s.cfg.Scope }

// Register implements [Registrar].
func (s *Service) Register(ctx context.Context, req *Request) (*dps.OperationStatus, error) {
	if err := s.checkRequest(req); err != nil {
		return nil, s.logged(req, "register", err)
	}
	body, err := parseBody(req)
	if err != nil {
		return nil, s.logged(req, "register", err)
	}
	if req.Operation != "" && !IsTicket(req.IDScope, req.RegistrationID, req.Operation) {
		return nil, s.logged(req, "register", dps.NewError(dps.CodeNotFound, "Operation not found", nil))
	}
	if body.TPM != nil && req.Proof.Token == "" && len(req.Proof.Certificates) == 0 {
		return nil, s.challenged(ctx, req, body.TPM, because("challenge", "the TPM has yet to prove itself"))
	}
	if body.TPM != nil {
		r := *req
		r.Proof.TPM = tpmKeys(body.TPM)
		req = &r
	}
	answer, err := s.registerShared(ctx, req, body)
	return answer, s.challenged(ctx, req, body.TPM, err)
}

// registerShared registers a device, or waits for the answer to the same request.
func (s *Service) registerShared(ctx context.Context, req *Request, body *dps.RegisterRequest) (*dps.OperationStatus, error) {
	proof := fingerprint(req)
	key := fmt.Sprintf("%s\x00%s\x00%s\x00%s\x00%s\x00%t", dps.Fold(req.RegistrationID), req.APIVersion, proof, req.Operation, csrHash(body), s.atOnce(req))
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
	f.err = dps.NewError(dps.CodeInternal, "Internal error", errors.New("the registration was cut off"))
	defer func() { // on a panic too
		s.mu.Lock()
		delete(s.inFlight, key)
		s.mu.Unlock()
		close(f.done)
	}()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), registerTime)
	defer cancel()
	if f.answer, f.err = s.register(ctx, req, body, proof); f.err != nil {
		f.err = s.logged(req, "register", f.err)
	}
	return f.answer, f.err
}

func (s *Service) register(ctx context.Context, req *Request, body *dps.RegisterRequest, proof []byte) (*dps.OperationStatus, error) {
	if !asksCertificate(body) {
		if v := s.foresee(req); v != nil {
			op, after, task, err := s.registerForeseen(ctx, req, body, v, proof)
			if err == nil {
				s.wrote(req, v, after)
				return s.registered(req, s.workFirst(ctx, req, op, task)), nil
			}
			if !errors.Is(err, errUnforeseen) {
				return nil, err
			}
		}
	}
	id := dps.Fold(req.RegistrationID)
	for range 10 {
		var before *Registration
		var begun *Operation
		var v *verdict
		var record *Record // where a webhook is to see it
		err := s.judging(ctx, req, func(tx Tx, req *Request) (err error) {
			if before, err = found(tx.Registration(s.scope, id)); err != nil {
				return err
			}
			if begun = before.operation(req.Operation); s.began(begun, proof) {
				return nil
			}
			if v, err = s.judge(tx, req); err == nil {
				v.settings, err = s.settingsAt(tx, v.revision)
			}
			if record = nil; err != nil || v.disabled {
				return err
			}
			if v.isCustom() {
				kind, of := Individual, id
				if v.group != "" {
					kind, of = Group, dps.Fold(v.group)
				}
				if record, err = tx.Record(s.scope, kind, of); err != nil {
					return err
				}
			}
			return s.findParent(tx, v, id)
		})
		if err != nil {
			return nil, err
		}
		if begun != nil {
			return s.registered(req, begun), nil
		}
		want, err := s.issuance(req, body, v)
		if err != nil {
			return nil, err
		}
		if op := s.repeated(req, v, before, proof, csrHash(body), want); op != nil {
			return s.registered(req, op), nil
		}
		if record != nil && v.refused == nil {
			v.chosen, v.refused = s.ask(ctx, req, body, v, before, record)
		}
		decided := s.decide(req, body, v, before, proof, want)
		if err := handKey(v, before, decided); err != nil {
			return nil, err
		}
		var cert *Issued
		if want != nil && decided.State.Status == dps.Assigned {
			cert, err = s.certify(ctx, decided, want)
		}
		var after *Registration
		var task *Task
		if err == nil {
			err = s.cfg.Store.Update(ctx, func(tx Tx) error {
				if err := s.stillHolds(tx, id, v); err != nil {
					return err
				}
				after = decided.copy()
				if task, err = s.putDecision(tx, req, v, before, after, cert); err != nil || decided.State.Status != dps.Assigned {
					return err
				}
				if err := s.putIssued(tx, cert); err != nil {
					return err
				}
				return s.firstSeen(tx, v.device)
			})
		}
		if errors.Is(err, ErrConflict) {
			continue // an operator or another register of this device came first; decide again
		}
		if err != nil {
			return nil, err
		}
		s.wrote(req, v, after)
		if cert != nil {
			s.cfg.Log.Info("certificate issued", "registrationId", req.RegistrationID, "issuer", cert.Issuer, "serialNumber", cert.SerialNumber,
				"sha256", cert.Thumbprint, "notAfter", cert.NotAfter, "operationId", after.Operations[0].ID)
		}
		return s.registered(req, s.workFirst(ctx, req, &after.Operations[0], task)), nil
	}
	return nil, dps.NewError(dps.CodeServiceOverloaded, "Try again later", errors.New("the registration kept changing"))
}

// wrote logs and remembers what was written; nil is nothing.
func (s *Service) wrote(req *Request, v *verdict, after *Registration) {
	if after == nil {
		return
	}
	if after.Issued == nil { // chains are long
		s.recent.put(after.ID, &recentRegistration{after.Group, after.Operations[0]})
	}
	s.succeeded(req, v, after)
}

// repeated returns the operation that a request is about which a device sends again: because its transport says so, or because
// it wants a certificate for the same request and has one that it did not see.
func (s *Service) repeated(req *Request, v *verdict, before *Registration, proof, asked []byte, want *issuance) *Operation {
	if v.disabled || before == nil || len(before.Operations) == 0 {
		return nil
	}
	op := &before.Operations[0]
	marked := req.Repeat && bytes.Equal(op.Proof, proof)
	same := want != nil && (op.State.Status == dps.Assigned || op.State.Status == dps.Assigning) && before.Issued.by(want)
	if !marked && !same || !bytes.Equal(op.CSR, asked) || s.cfg.Now().Sub(op.Started) >= repeatTime {
		return nil
	}
	return op
}

// registered answers a register request. Only who is known to take it is told the end at once.
func (s *Service) registered(req *Request, op *Operation) *dps.OperationStatus {
	if s.atOnce(req) && op.State.Status.Terminal() {
		return &dps.OperationStatus{OperationID: op.ID, Status: op.State.Status, RegistrationState: &op.State}
	}
	return &dps.OperationStatus{OperationID: op.ID, Status: dps.Assigning}
}

func (s *Service) atOnce(req *Request) bool {
	return slices.ContainsFunc(s.cfg.AtOnce, func(p string) bool { return matches(p, req.ClientVersion) })
}

// matches reports whether a text is a pattern's, in which * stands for any text.
func matches(pattern, text string) bool {
	first, rest, star := strings.Cut(pattern, "*")
	text, ok := strings.CutPrefix(text, first)
	if !star || !ok {
		return ok && text == ""
	}
	parts := strings.Split(rest, "*")
	for _, part := range parts[:len(parts)-1] {
		if _, text, ok = strings.Cut(text, part); !ok {
			return false
		}
	}
	return strings.HasSuffix(text, parts[len(parts)-1])
}

// firstSeen counts a device of an order that registers for the first time.
func (s *Service) firstSeen(tx Tx, d *Device) error {
	if d == nil || d.Grant == "" || d.Seen || !d.Lives() {
		return nil
	}
	now := *d
	now.Seen = true
	if err := tx.PutDevice(s.scope, &now); err != nil {
		return err
	}
	if d.Order() != d.Grant {
		if err := tx.AddToGrant(s.scope, d.Order(), Tally{Seen: 1}); err != nil {
			return err
		}
	}
	return tx.AddToGrant(s.scope, d.Grant, Tally{Seen: 1})
}

// decide makes the registration that follows from a verdict. It has no effect of its own.
func (s *Service) decide(req *Request, body *dps.RegisterRequest, v *verdict, before *Registration, proof []byte, want *issuance) *Registration {
	now := dps.Time{Time: s.cfg.Now()}
	r := &Registration{ID: dps.Fold(req.RegistrationID), Group: dps.Fold(v.group), Admitted: v.admitted}
	st := &r.State
	st.RegistrationID, st.CreatedDateTimeUTC, st.LastUpdatedDateTimeUTC, st.ETag = req.RegistrationID, &now, &now, newETag()
	if before != nil {
		r.Version, r.Operations, r.Issued = before.Version, before.Operations, before.Issued
		st.CreatedDateTimeUTC = before.State.CreatedDateTimeUTC
	}
	switch {
	case v.x509:
		st.X509 = &struct{}{}
	case v.group != "":
		st.SymmetricKey = &dps.SymmetricKeyState{EnrollmentGroupID: v.group}
	}
	switch chosen, err := s.allocate(req, v, before); {
	case v.disabled:
		st.Status = dps.Disabled
	case want == nil && asksCertificate(body):
		// There is no issuer for the device's operational certificates; to assign without one would hide it (device API, section 15.2).
		st.Status, st.ErrorCode, st.ErrorMessage = dps.Failed, int(dps.CodeBadRequest), "Certificate issuance is not configured"
	case err != nil:
		code, message := dps.CodeNoHub, "No IoT hub could be chosen"
		var refused *notAllocated
		if errors.As(err, &refused) {
			code, message = refused.code, refused.message
		}
		st.Status, st.ErrorCode, st.ErrorMessage, v.refused = dps.Failed, int(code), message, err
	default:
		st.Status, st.AssignedHub, st.DeviceID, st.Payload = dps.Assigned, chosen.hub, v.deviceID, chosen.payload
		if st.DeviceID == "" {
			st.DeviceID = req.RegistrationID
			if _, was := before.assignment(); dps.Fold(was) == dps.Fold(req.RegistrationID) {
				st.DeviceID = was // hubs tell device IDs apart by case; the device keeps its first one
			}
		}
		st.Substatus = substatus(before, st, v.enrollment.ReprovisionPolicy)
	}
	op := Operation{ID: cmp.Or(req.Operation, newOperationID()), Started: now.Time, Proof: proof, CSR: csrHash(body), State: *st}
	r.Operations = append([]Operation{op}, r.Operations[:min(len(r.Operations), keepOperations-1)]...)
	return r
}

// substatus says how the device came to its hub (device API, section 6.6).
func substatus(before *Registration, st *dps.RegistrationState, p *dps.ReprovisionPolicy) dps.Substatus {
	switch hub, id := before.assignment(); {
	case hub == "" || id != st.DeviceID:
		return dps.InitialAssignment
	case hub == st.AssignedHub:
		return dps.ReprovisionedToInitialAssignment
	case p != nil && !p.MigrateDeviceData:
		return dps.DeviceDataReset
	}
	return dps.DeviceDataMigrated
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
	if op := s.recentOperation(req, operationID); op != nil {
		return op, nil
	}
	var op *Operation
	err := s.judging(ctx, req, func(tx Tx, req *Request) error {
		r, err := found(tx.Registration(s.scope, dps.Fold(req.RegistrationID)))
		if err != nil {
			return err
		}
		if op = r.operation(operationID); s.began(op, fingerprint(req)) {
			return nil
		}
		_, err = s.judge(tx, req)
		return err
	})
	if err != nil {
		return nil, err
	}
	if op == nil {
		return nil, dps.NewError(dps.CodeNotFound, "Operation not found", nil)
	}
	return op, nil
}

// provenTime is for how long the proof that began an operation needs no second judgement: a token may run out while its device
// waits.
const provenTime = 2 * time.Hour

// began reports whether this very proof began the operation, which may be nil, a while ago at most.
func (s *Service) began(op *Operation, proof []byte) bool {
	return op != nil && bytes.Equal(op.Proof, proof) && s.cfg.Now().Sub(op.Started) < provenTime
}

// operation returns the operation of that ID, or nil; there may be no registration.
func (r *Registration) operation(id string) *Operation {
	if r == nil {
		return nil
	}
	for i := range r.Operations {
		if r.Operations[i].ID == id {
			return &r.Operations[i]
		}
	}
	return nil
}

// Lookup implements [Registrar].
func (s *Service) Lookup(ctx context.Context, req *Request) (*dps.RegistrationState, error) {
	if err := s.checkRequest(req); err != nil {
		return nil, s.logged(req, "lookup", err)
	}
	body, err := parseBody(req)
	if err != nil {
		return nil, s.logged(req, "lookup", err)
	} else if asksCertificate(body) {
		return nil, s.logged(req, "lookup", dps.NewError(dps.CodeBadRequest, "A lookup takes no certificate signing request", nil))
	}
	var state *dps.RegistrationState
	err = s.judging(ctx, req, func(tx Tx, req *Request) error {
		v, err := s.judge(tx, req)
		if err != nil {
			return err
		}
		r, err := tx.Registration(s.scope, dps.Fold(req.RegistrationID))
		if errors.Is(err, ErrNotFound) {
			return dps.NewError(dps.CodeNoGroup, "Registration not found", nil)
		}
		if err == nil {
			if state = &r.State; v.disabled {
				state.Status, state.Substatus, state.AssignedHub, state.DeviceID, state.TPM = dps.Disabled, "", "", "", nil
			}
		}
		return err
	})
	if err != nil {
		return nil, s.challenged(ctx, req, body.TPM, s.logged(req, "lookup", err))
	}
	return state, nil
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
		return because("scope", "unknown ID scope")
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
	if body.CSR != "" && !dps.AcceptsCSR(req.APIVersion) || body.ClientCertificateCSR != "" && !dps.AcceptsClientCertificateCSR(req.APIVersion) {
		return nil, dps.NewError(dps.CodeBadCSR, "This api-version takes no certificate signing request", nil)
	}
	return &body, nil
}

// newOperationID returns an ID shaped like the service's, 55 characters: some devices have room for no more.
func newOperationID() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // crypto/rand.Read never fails
	return "5." + hex.EncodeToString(b[:]) + "." + dps.NewUUID()
}

// newETag returns a fresh tag: base64 of a quoted GUID, as the service's are.
func newETag() string { return base64.StdEncoding.EncodeToString([]byte(`"` + dps.NewUUID() + `"`)) }
