package registration

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/touchmark/touchmark/pkg/dps"
)

// A Place is a device at a hub.
type Place struct {
	Hub      string `json:"hub"`
	DeviceID string `json:"deviceId"`
	// New says that the device was not there before this task made it, and that its twin has yet to be written.
	New bool `json:"new,omitempty"`
}

func (p Place) is(o Place) bool { return strings.EqualFold(p.Hub, o.Hub) && p.DeviceID == o.DeviceID }

// A Task is what hubs have yet to be told about one device: where it is to be, and from where it is to go. A device has one at
// most. It is written in the transaction of the decision that it follows from, and knows everything that it takes; so whoever
// finds it can finish it, whatever became of whoever began. The store encrypts it.
//
// Before anything is made at a hub, the task says that it may be there; before the device is taken from a hub, that it is
// another's by now. So at each instant the store knows every hub that has the device.
type Task struct {
	Scope string `json:"-"` // folded; filled in when it is read
	ID    string `json:"-"` // folded registration ID
	// Version is the one that was read (0: there was none); every write raises it.
	Version int64 `json:"-"`
	// Due is when it may be taken up next. While Owner is not empty somebody works at it, until Due at most.
	Due   time.Time `json:"-"`
	Owner string    `json:"-"`
	// Hub is the one that it waits for.
	Hub string `json:"-"`

	Goal *Goal   `json:"goal,omitempty"` // nil: all that is left is Away
	Away []Place `json:"away,omitempty"` // where the device is not to stay
	// Begun is when the decision was made, Attempts how often it was tried since, and LastError why that failed.
	Begun     time.Time `json:"begun"`
	Attempts  int       `json:"attempts,omitempty"`
	LastError string    `json:"lastError,omitempty"`
}

// A Goal is where a device is to be, and how.
type Goal struct {
	Place
	// Operation is the one that waits for it; empty where none does, and a parent is all that is new.
	Operation string `json:"operation,omitempty"`
	// Device is what the hub is told, with keys.
	Device *HubDevice `json:"device"`
	Told   string     `json:"told"` // what the registration's is then
	// Final is what the registration's state is then.
	Final *dps.RegistrationState `json:"final,omitempty"`
	// AnyEdge says that the enrollment does not say whether it is an edge device: what it is at its hub, it stays.
	AnyEdge bool `json:"anyEdge,omitempty"`
	// Twin is what a new device gets; nil for nothing.
	Twin *HubTwin `json:"twin,omitempty"`
	// From is where the device was; nil where it was nowhere. Migrate has its twin go with it.
	From    *Place `json:"from,omitempty"`
	Migrate bool   `json:"migrate,omitempty"`
	// Stay says that the device was there before the decision.
	Stay bool `json:"stay,omitempty"`
	// Again says that an earlier decision wanted the device away from there.
	Again bool `json:"again,omitempty"`
	// Parent is the edge device that it is to be below, by registration ID or device ID; empty for none.
	Parent string `json:"parent,omitempty"`
	// Relink says that the parent has arrived or changed since the hub was told.
	Relink bool `json:"relink,omitempty"`
	// Pending is why the hub was not told the parent; empty where it was.
	Pending string `json:"pending,omitempty"`
	// Done says that the device is there, with its twin, and that the registration says so.
	Done bool `json:"done,omitempty"`
}

// An Orphan is a device at a hub that could not be asked to forget it.
type Orphan struct {
	ID       string    `json:"registrationId"` // folded
	Hub      string    `json:"hub"`
	DeviceID string    `json:"deviceId"`
	Since    time.Time `json:"since"`
	Reason   string    `json:"reason"`
	// New says that the device was made there, and its twin never written.
	New bool `json:"new,omitempty"`
}

// Outbox is the part of a [Tx] that is about telling hubs.
type Outbox interface {
	// Task returns a device's task, or ErrNotFound. PutTask writes it, and DeleteTask removes it, if its Version is the one that was
	// read; ErrConflict: it is not. PutTask raises it.
	Task(scope, id string) (*Task, error)
	PutTask(scope string, t *Task) error
	DeleteTask(scope string, t *Task) error
	// DueTasks returns up to limit tasks of all scopes that are due, and were not before from, those first that have waited longest,
	// without what is encrypted.
	DueTasks(from, now time.Time, limit int) ([]*Task, error)
	// Tasks returns up to limit tasks whose ID is greater than after, in order.
	Tasks(scope, after string, limit int) ([]*Task, error)

	// PutOrphan keeps an orphan, over the one of its ID, hub and device ID; DeleteOrphan forgets it, or says ErrNotFound. Orphans returns
	// up to limit, those behind one in the order of IDs, hubs and device IDs.
	PutOrphan(scope string, o *Orphan) error
	DeleteOrphan(scope string, o *Orphan) error
	Orphans(scope string, after Orphan, limit int) ([]*Orphan, error)

	// PutKin keeps what a device is below, over what it was, and DeleteKin forgets it. Kin returns it, or ErrNotFound.
	PutKin(scope string, k *Kin) error
	DeleteKin(scope, id string) error
	Kin(scope, id string) (*Kin, error)
	// Children returns up to limit devices that name a parent in this way, IDs greater than after, in order.
	Children(scope, parent, after string, limit int) ([]*Kin, error)
	// PutEdge lets an edge device be found by a folded name, over the one before. Edge returns the folded registration ID of one, or
	// ErrNotFound.
	PutEdge(scope, name, id string) error
	Edge(scope, name string) (id string, err error)
}

// aim gives a task a new goal, nil for none; from is where the device is as far as hubs were told, nil for nowhere. Whatever an
// earlier decision began elsewhere goes away again.
func (t *Task) aim(g *Goal, from *Place) {
	if old := t.Goal; old != nil && !old.Done {
		if g == nil || !g.is(old.Place) {
			t.drop()
		} else {
			g.New, g.Again = old.New, old.Again
		}
	}
	if t.Goal = g; g == nil {
		return
	}
	if from != nil && !from.is(g.Place) {
		g.From = from
		if !slices.ContainsFunc(t.Away, from.is) {
			t.Away = append(t.Away, *from)
		}
	}
	if i := slices.IndexFunc(t.Away, g.is); i >= 0 {
		g.New, g.Again = t.Away[i].New, true
		t.Away = slices.Delete(slices.Clone(t.Away), i, i+1)
	}
}

// drop gives a goal up that was not reached: what was made for it goes away, and the device stays where it was.
func (t *Task) drop() {
	g := t.Goal
	if t.Goal = nil; g == nil || g.Done {
		return
	}
	if g.From != nil {
		t.Away = slices.DeleteFunc(slices.Clone(t.Away), g.From.is)
	}
	if !g.Stay && (g.New || g.Again) && !slices.ContainsFunc(t.Away, g.is) {
		t.Away = append(slices.Clone(t.Away), g.Place)
	}
}

// A TaskReport is a task as operators see it.
type TaskReport struct {
	RegistrationID string `json:"registrationId"` // folded
	// State is "assigning" while the device waits, "linking" where it is only put below its parent, and "cleanup" when it has gone on
	// and former hubs have yet to forget it.
	State     string    `json:"state"`
	Hub       string    `json:"hub,omitempty"` // where it goes
	Away      []Place   `json:"away,omitempty"`
	Begun     time.Time `json:"begun"`
	Due       time.Time `json:"due"`
	Attempts  int       `json:"attempts"`
	LastError string    `json:"lastError,omitempty"`
}

func (t *Task) report() TaskReport {
	r := TaskReport{RegistrationID: t.ID, State: "cleanup", Away: t.Away, Begun: t.Begun, Due: t.Due, Attempts: t.Attempts, LastError: t.LastError}
	if t.Goal != nil {
		if r.Hub, r.State = t.Goal.Hub, "assigning"; t.Goal.Operation == "" {
			r.State = "linking"
		}
	}
	return r
}

// Tasks returns a page of what hubs have yet to be told, in the order of IDs, and where the next one begins: "" at the end.
func (s *Service) Tasks(ctx context.Context, after string, limit int) (page []TaskReport, next string, err error) {
	err = s.cfg.Store.View(ctx, func(tx Tx) error {
		page, next = []TaskReport{}, ""
		tasks, err := tx.Tasks(s.scope, after, limit+1)
		for i, t := range tasks {
			if i == limit {
				next = tasks[i-1].ID
				break
			}
			page = append(page, t.report())
		}
		return err
	})
	return page, next, err
}

// Orphans returns a page of devices that could not be taken from a hub; the next page is that after the last one of a full page.
func (s *Service) Orphans(ctx context.Context, after Orphan, limit int) (page []*Orphan, err error) {
	err = s.cfg.Store.View(ctx, func(tx Tx) error {
		page, err = tx.Orphans(s.scope, after, limit)
		return err
	})
	return page, err
}

// ForgetOrphan takes an orphan off the list: somebody has looked after it.
func (s *Service) ForgetOrphan(ctx context.Context, o *Orphan, by Actor) error {
	return s.cfg.Store.Update(ctx, func(tx Tx) error {
		gone := Orphan{ID: dps.Fold(o.ID), Hub: o.Hub, DeviceID: o.DeviceID}
		err := tx.DeleteOrphan(s.scope, &gone)
		if errors.Is(err, ErrNotFound) {
			return dps.NewError(dps.CodeNotFound, "Orphan not found.", nil)
		}
		if err != nil {
			return err
		}
		return tx.PutAudit(s.scope, NewAudit(by, "forget", "orphan/"+o.Hub+"/"+o.DeviceID, gone, nil, s.cfg.Now()))
	})
}

// unfinished reports whether a device is an orphan at a hub that has not its twin yet.
func (s *Service) unfinished(ctx context.Context, id string, p Place) (yes bool, err error) {
	err = s.cfg.Store.View(ctx, func(tx Tx) error {
		page, err := tx.Orphans(s.scope, Orphan{ID: id, Hub: p.Hub}, 100) // one for each device ID that it ever had there
		yes = slices.ContainsFunc(page, func(o *Orphan) bool { return o.ID == id && o.New && p.is(Place{Hub: o.Hub, DeviceID: o.DeviceID}) })
		return err
	})
	return yes, err
}

// adopted forgets that a device was an orphan where it is now.
func (s *Service) adopted(tx Tx, id string, p Place) error {
	err := tx.DeleteOrphan(s.scope, &Orphan{ID: id, Hub: p.Hub, DeviceID: p.DeviceID})
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	return err
}
