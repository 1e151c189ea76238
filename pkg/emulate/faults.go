package emulate

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"sync"
	"time"

	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
)

// MaxFaults is how many faults there can be at once.
const MaxFaults = 1000

// ErrTooMany says that there would be more than [MaxFaults].
var ErrTooMany = fmt.Errorf("more than %d faults", MaxFaults)

// Faults are what goes wrong at present. They are tried in the order in which they were added, and all that a request matches
// happen to it: delays add up; of those that answer in the service's place the first counts, and is not changed again; of
// those that change an answer, "assigning" comes before what the end is, and a later one goes over an earlier one. Nil has no
// faults.
type Faults struct {
	seed Seed

	mu   sync.Mutex
	list []*armed
	made int // how many there ever were: each has a random source of its own
}

// An armed fault counts.
type armed struct {
	Fault
	random           *rand.Rand
	matched, applied int

	// Of "assigning": how many polls each operation still has, and the operations in the order in which they came.
	polls map[string]int
	order []string
}

// maxOperations is how many operations a fault remembers; those before are forgotten, and may then be held up again.
const maxOperations = 4096

// FaultState says what became of a fault.
type FaultState struct {
	Fault Fault `json:"fault"`
	// Matched counts the requests that it was for, after and count aside; Applied those that it happened to.
	Matched int `json:"matched"`
	Applied int `json:"applied"`
}

// NewFaults returns an empty list. With a seed, what happens by chance is the same in every run that asks the same.
func NewFaults(seed Seed) *Faults { return &Faults{seed: seed} }

// Add adds faults, all or, with ErrTooMany, none.
func (f *Faults) Add(list ...Fault) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.add(list)
}

func (f *Faults) add(list []Fault) error {
	if len(f.list)+len(list) > MaxFaults {
		return ErrTooMany
	}
	for _, fault := range list {
		f.made++
		random := rand.New(rand.NewChaCha8([32]byte(f.seed.Bytes(fmt.Sprintf("fault %d", f.made), 32))))
		f.list = append(f.list, &armed{Fault: fault, random: random, polls: make(map[string]int)})
	}
	return nil
}

// Set has these faults take the place of all others; their counts begin anew.
func (f *Faults) Set(list ...Fault) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	old := f.list
	f.list = nil
	err := f.add(list)
	if err != nil {
		f.list = old
	}
	return err
}

// List says what became of every fault.
func (f *Faults) List() []FaultState {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := make([]FaultState, 0, len(f.list))
	for _, a := range f.list {
		out = append(out, FaultState{a.Fault, a.matched, a.applied})
	}
	return out
}

// fire counts a request that the fault is for, and reports whether it happens to it.
func (a *armed) fire() bool {
	a.matched++
	if a.matched <= a.after || a.count > 0 && a.applied >= a.count || a.p < 1 && a.random.Float64() >= a.p {
		return false
	}
	a.applied++
	return true
}

// early reports whether the fault happens before the service is asked.
func (a *armed) early() bool {
	switch a.effect {
	case "code", "lost":
		return true
	case "drop":
		return !a.dropAfter
	case "":
		return a.retryAfter == ""
	}
	return false
}

// before is what happens to a request instead of its being worked on, and first.
func (f *Faults) before(op string, req *registration.Request) (applied []string, delay time.Duration, err error) {
	if f == nil {
		return nil, 0, nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, a := range f.list {
		if !a.early() || !a.matches(op, req) || !a.fire() {
			continue
		}
		applied = append(applied, a.text)
		delay += a.delay
		switch a.effect {
		case "code":
			e := dps.NewError(a.code, http.StatusText(a.code.Status()), errors.New("a fault that was asked for"))
			if e.RetryAfter = a.retryAfter; e.Message == "" {
				e.Message = "Error"
			}
			err = e
		case "lost":
			err = dps.NewError(dps.CodeNotFound, "Operation not found", errors.New("a fault that was asked for"))
		case "drop":
			err = registration.ErrHangUp
		}
		if err != nil {
			return applied, delay, err
		}
	}
	return applied, delay, nil
}

// after changes what the service answered.
func (f *Faults) after(op string, req *registration.Request, answer any, was error) (_ any, applied []string, delay time.Duration, err error) {
	if f == nil {
		return answer, nil, 0, was
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	err = was
	happens := func(a *armed) {
		applied = append(applied, a.text)
		delay += a.delay
	}
	for _, a := range f.list {
		if st, ok := answer.(*dps.OperationStatus); ok && err == nil && a.effect == "assigning" && st.Status.Terminal() && a.matches(op, req) && a.hold(st.OperationID) {
			happens(a)
			answer = &dps.OperationStatus{OperationID: st.OperationID, Status: dps.Assigning, RetryAfter: a.retryAfter,
				RegistrationState: &dps.RegistrationState{RegistrationID: req.RegistrationID, Status: dps.Assigning}}
		}
	}
	for _, a := range f.list {
		if a.early() || a.effect == "assigning" || !a.matches(op, req) {
			continue
		}
		changed, cause := a.change(answer, err)
		if changed == nil && cause == nil || !a.fire() {
			continue
		}
		happens(a)
		if answer, err = changed, cause; errors.Is(err, registration.ErrHangUp) {
			break
		}
	}
	return answer, applied, delay, err
}

// hold reports whether an operation that has ended is to look as if it had not.
func (a *armed) hold(operation string) bool {
	if _, known := a.polls[operation]; !known {
		if len(a.order) == maxOperations {
			delete(a.polls, a.order[0])
			a.order = a.order[1:]
		}
		a.order = append(a.order, operation)
		a.polls[operation] = 0
		if a.fire() {
			a.polls[operation] = a.Fault.polls
		}
	}
	if a.polls[operation] == 0 {
		return false
	}
	a.polls[operation]--
	return true
}

// change returns what an answer becomes, and two nils where the fault has nothing to change in it. Answers are shared: it
// works on a copy.
func (f *Fault) change(answer any, err error) (any, error) {
	switch {
	case f.effect == "drop":
		return nil, registration.ErrHangUp
	case f.retryAfter != "":
		var e *dps.Error
		if errors.As(err, &e) && hinted(e.Code) {
			hint := *e
			hint.RetryAfter = f.retryAfter
			return nil, &hint
		}
		if st, ok := answer.(*dps.OperationStatus); ok && err == nil && !st.Status.Terminal() {
			hint := *st
			hint.RetryAfter = f.retryAfter
			return &hint, nil
		}
	case err != nil:
	default:
		switch v := answer.(type) {
		case *dps.OperationStatus:
			if !v.Status.Terminal() || v.RegistrationState == nil {
				break
			}
			if state := f.end(v.RegistrationState); state != nil {
				return &dps.OperationStatus{OperationID: v.OperationID, Status: state.Status, RegistrationState: state}, nil
			}
		case *dps.RegistrationState:
			if state := f.end(v); state != nil {
				return state, nil
			}
		}
	}
	return nil, nil
}

// end returns another end of a registration, or nil.
func (f *Fault) end(was *dps.RegistrationState) *dps.RegistrationState {
	state := &dps.RegistrationState{RegistrationID: was.RegistrationID, CreatedDateTimeUTC: was.CreatedDateTimeUTC,
		LastUpdatedDateTimeUTC: was.LastUpdatedDateTimeUTC, ETag: was.ETag, X509: was.X509, SymmetricKey: was.SymmetricKey}
	switch f.effect {
	case "disabled":
		state.Status = dps.Disabled
	case "failed":
		state.Status, state.ErrorCode, state.ErrorMessage = dps.Failed, int(f.code), "Failed, as was asked for"
	case "hub":
		if was.Status != dps.Assigned {
			return nil
		}
		*state = *was
		state.AssignedHub = f.hub
	}
	return state
}
