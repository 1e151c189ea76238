package registration

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"time"

	"github.com/touchmark/touchmark/pkg/attest"
	"github.com/touchmark/touchmark/pkg/dps"
)

// Most devices belong to a group that this service knows already, and have no enrollment of their own. Their proof is held
// against the group without the store, and everything else that decides about them is read in the transaction that writes the
// registration: one instead of two. Whatever turns out otherwise there is judged again, in the ordinary way, which also says
// why a device is refused.

// errUnforeseen says that a request is to be judged in the ordinary way.
var errUnforeseen = errors.New("not the ordinary case")

// groupReader is what finding a device's group reads.
type groupReader interface {
	Revision(scope string) (int64, error)
	Scope(id string) (*Scope, error)
	CACertificates(scope string) ([]*CACertificate, error)
	ChangedGroups(scope string, after int64) ([]*Record, []string, error)
	SymmetricGroups(scope string) ([]*Record, error)
	GroupsByCA(scope string, subject [32]byte, keyID []byte, limit int) ([]*Record, error)
	Registration(scope, id string) (*Registration, error)
	Device(scope, id string) (*Device, error)
}

// recall is a groupReader of what is remembered.
type recall struct{ s *Service }

func (r recall) Revision(string) (int64, error) { return r.s.groups.revision.Load(), nil }

func (recall) Scope(string) (*Scope, error) { return nil, errUnforeseen }

func (recall) CACertificates(string) ([]*CACertificate, error) { return nil, errUnforeseen }

func (recall) ChangedGroups(string, int64) ([]*Record, []string, error) {
	return nil, nil, errUnforeseen
}

func (recall) SymmetricGroups(string) ([]*Record, error) { return nil, errUnforeseen }

func (recall) GroupsByCA(string, [32]byte, []byte, int) ([]*Record, error) {
	return nil, errUnforeseen
}

func (r recall) Registration(_, id string) (*Registration, error) {
	if known := r.s.recent.get(id); known != nil {
		return &Registration{ID: id, Group: known.group}, nil
	}
	return nil, ErrNotFound
}

func (recall) Device(string, string) (*Device, error) { return nil, ErrNotFound }

// foresee returns the group that admits a device as far as this service knows without asking, or nil.
func (s *Service) foresee(req *Request) *verdict {
	token, err := s.credentials(req)
	if err != nil {
		return nil
	}
	v, err := s.groupOf(recall{s}, req, token)
	set := s.settings.Load()
	if err != nil || set == nil || set.revision != v.revision || s.rejects(set, req.Remote, DeviceAPI) != nil || v.isCustom() || v.enrollment.Parent != "" {
		return nil
	}
	v.settings = set.Settings
	return v
}

// registerForeseen registers a device whose group was foreseen. The error is errUnforeseen when anything is otherwise.
func (s *Service) registerForeseen(ctx context.Context, req *Request, body *dps.RegisterRequest, v *verdict, proof []byte) (op *Operation, after *Registration, task *Task, err error) {
	id := dps.Fold(req.RegistrationID)
	err = s.cfg.Store.Update(ctx, func(tx Tx) error {
		op, after, task = nil, nil, nil
		v := *v
		if r, err := found(tx.Record(s.scope, Individual, id)); err != nil || r != nil {
			return errors.Join(err, errUnforeseen)
		}
		if revision, err := tx.Revision(s.scope); err != nil || revision != v.revision {
			return errors.Join(err, errUnforeseen)
		}
		before, err := found(tx.Registration(s.scope, id))
		if err != nil {
			return err
		}
		if op = before.operation(req.Operation); s.began(op, proof) {
			return nil
		}
		if err := s.known(tx, req, &v); err != nil || v.disabled {
			return errors.Join(err, errUnforeseen)
		}
		if op != nil {
			return nil
		}
		if op = s.repeated(req, &v, before, proof, nil, nil); op != nil {
			return nil
		}
		after = s.decide(req, body, &v, before, proof, nil)
		op = &after.Operations[0]
		decided := after.State.Status
		if task, err = s.putDecision(tx, req, &v, before, after, nil); err != nil || decided != dps.Assigned {
			return err
		}
		return s.firstSeen(tx, v.device)
	})
	if errors.Is(err, ErrConflict) || err != nil && dps.AsError(err).Code.Status() < 500 {
		err = errUnforeseen
	}
	return op, after, task, err
}

// recentTime is for how long an operation is answered for from memory, and maxRecent how many are remembered, twice.
const (
	recentTime = 10 * time.Second
	maxRecent  = 4096
)

// recent remembers the registrations that were written last: devices ask what became of them seconds later, and come in by the
// same group again. What an operation came to does not change. Whoever deletes a registration at another replica waits for
// recentTime until it is gone here.
type recent struct {
	mu       sync.Mutex
	now, old map[string]*recentRegistration // by folded ID, filled one after the other; the older one goes when the newer one is full
}

type recentRegistration struct {
	group string
	op    Operation
}

func (r *recent) get(id string) *recentRegistration {
	r.mu.Lock()
	defer r.mu.Unlock()
	if g := r.now[id]; g != nil {
		return g
	}
	return r.old[id]
}

func (r *recent) put(id string, g *recentRegistration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.now == nil || len(r.now) >= maxRecent {
		r.now, r.old = make(map[string]*recentRegistration), r.now
	}
	r.now[id] = g
}

func (r *recent) forget(id string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.now, id)
	delete(r.old, id)
}

// recentOperation returns an operation that came to its end a moment ago, when this very proof began it; else nil.
func (s *Service) recentOperation(req *Request, id string) *Operation {
	g, known := s.recent.get(dps.Fold(req.RegistrationID)), s.settings.Load()
	if g == nil || known == nil || s.rejects(known, req.Remote, DeviceAPI) != nil || g.op.ID != id || !g.op.State.Status.Terminal() || s.cfg.Now().Sub(g.op.Started) > recentTime || !bytes.Equal(g.op.Proof, fingerprint(req)) {
		return nil
	}
	return &g.op
}

// credentials reads what a device proves itself with, as far as that says something by itself: the token, or nil for a
// certificate (device API, sections 7.3 and 8.2).
func (s *Service) credentials(req *Request) (*attest.Token, error) {
	now := s.cfg.Now()
	if req.Proof.Token == "" {
		if len(req.Proof.Certificates) == 0 {
			return nil, refuse(attest.ErrNoCertificate)
		}
		if err := attest.CheckLeaf(req.Proof.Certificates[0], req.RegistrationID, now); err != nil {
			return nil, refuse(err)
		}
		return nil, nil
	}
	t, err := attest.ParseToken(req.Proof.Token)
	switch {
	case err != nil:
		return nil, refuse(err)
	case t.Expired(now):
		return nil, refuse(attest.ErrExpired)
	case !t.ForDevice(s.scope, req.RegistrationID):
		return nil, refuse(attest.ErrResource)
	}
	return &t, nil
}
