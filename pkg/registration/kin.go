package registration

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/touchmark/touchmark/pkg/dps"
)

// Limits of nested edge devices, which are IoT Hub's.
const (
	maxChildren = 100
	maxLevels   = 5 // of edge devices above each other
)

// Kin is a device below an edge device, as the service wants it.
type Kin struct {
	ID     string `json:"-"` // folded
	Parent string `json:"-"` // folded: the registration ID or the device ID of the edge device
	// Linked is the edge device's scope that the hub was told; empty while it waits for the edge device, and Reason is why.
	Linked string `json:"linked,omitempty"`
	Reason string `json:"reason,omitempty"`
	// Place is where the hub was told of the device, and Device what, with keys: the store encrypts it.
	Place  Place      `json:"place"`
	Device *HubDevice `json:"device"`
}

// edge returns the registration of a device by its folded registration ID, or else by that of an edge device with this device ID;
// nil for none.
func (s *Service) edge(tx Tx, name string) (*Registration, error) {
	r, err := found(tx.Registration(s.scope, name))
	if r != nil || err != nil {
		return r, err
	}
	id, err := tx.Edge(s.scope, name)
	if errors.Is(err, ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return found(tx.Registration(s.scope, id))
}

// lineage says why a device cannot be below a parent: it is one of its own ancestors, or they are too many.
func (s *Service) lineage(tx Tx, id, parent string, isEdge bool) (reason string, err error) {
	levels := 1
	if isEdge {
		levels++
	}
	for ; parent != ""; levels++ {
		above := parent
		r, err := s.edge(tx, parent)
		if err != nil {
			return "", err
		}
		if r != nil {
			above = r.ID
		}
		if above == id {
			return "it would be below itself", nil
		}
		if levels > maxLevels {
			return fmt.Sprintf("edge devices would be more than %d levels deep", maxLevels), nil
		}
		k, err := found(tx.Kin(s.scope, above))
		if err != nil || k == nil {
			return "", err
		}
		parent = k.Parent
	}
	return "", nil
}

// findParent has the verdict say where the device's parent is, or why it cannot be below it.
func (s *Service) findParent(tx Tx, v *verdict, id string) error {
	parent := dps.Fold(v.enrollment.Parent)
	if parent == "" {
		return nil
	}
	caps := v.enrollment.Capabilities
	reason, err := s.lineage(tx, id, parent, caps != nil && caps.IoTEdge)
	if err != nil {
		return err
	}
	r, err := s.edge(tx, parent)
	if err != nil {
		return err
	}
	names := []string{parent}
	if r != nil {
		v.parentHub = r.Hub
		names = []string{r.ID}
		if other := dps.Fold(r.DeviceID); other != r.ID {
			names = append(names, other)
		}
	}
	others := 0
	for _, name := range names {
		children, err := tx.Children(s.scope, name, "", maxChildren+1)
		if err != nil {
			return err
		}
		for _, k := range children {
			if k.ID != id {
				others++
			}
		}
	}
	if others >= maxChildren {
		reason = fmt.Sprintf("its parent has %d children already", maxChildren)
	}
	if reason != "" {
		v.refused = &notAllocated{dps.CodeBadRequest, "The device cannot be put below its parent", fmt.Errorf("parent %q: %s", v.enrollment.Parent, reason)}
	}
	return nil
}

// putKin keeps what a device is to be below, so that the parent finds it when it arrives.
func (s *Service) putKin(tx Tx, t *Task) error {
	g := t.Goal
	if g.Parent == "" {
		return tx.DeleteKin(s.scope, t.ID)
	}
	d := *g.Device
	k := &Kin{ID: t.ID, Parent: g.Parent, Linked: d.Parent, Reason: g.Pending, Place: Place{Hub: g.Hub, DeviceID: g.DeviceID}, Device: &d}
	d.Parent = ""
	return tx.PutKin(s.scope, k)
}

// parentScope returns the scope of a goal's parent at the hub, or why it has none yet.
func (s *Service) parentScope(ctx context.Context, hub Hub, t *Task) (scope, reason string, err error) {
	g := t.Goal
	var parent *Registration
	err = s.cfg.Store.View(ctx, func(tx Tx) (err error) {
		if parent, err = s.edge(tx, g.Parent); err == nil {
			reason, err = s.lineage(tx, t.ID, g.Parent, g.Device.IoTEdge)
		}
		return err
	})
	switch {
	case err != nil || reason != "":
		return "", reason, err
	case parent == nil || parent.Hub == "":
		return "", "its parent has not registered", nil
	case !strings.EqualFold(parent.Hub, g.Hub):
		return "", fmt.Sprintf("its parent is at hub %s: it follows when it registers again", parent.Hub), nil
	}
	d, err := call(ctx, s, t, func(ctx context.Context) (*HubDevice, error) { return hub.Device(ctx, parent.DeviceID) })
	switch {
	case errors.Is(err, ErrNotFound):
		return "", "its parent is not at the hub yet", nil
	case err != nil:
		return "", "", err
	case !d.IoTEdge || d.Scope == "":
		return "", "its parent is not an edge device", nil
	}
	return d.Scope, "", nil
}

// related keeps what a device that has reached its goal is below, and has those follow that are below it.
func (s *Service) related(tx Tx, w *Task) error {
	g := w.Goal
	if g.Device == nil {
		return nil
	}
	if g.Parent != "" {
		if err := s.putKin(tx, w); err != nil {
			return err
		}
	}
	if !g.Device.IoTEdge || g.Operation == "" {
		return nil
	}
	names := []string{w.ID}
	if other := dps.Fold(g.DeviceID); other != w.ID {
		names = append(names, other)
	}
	for _, name := range names {
		if err := tx.PutEdge(s.scope, name, w.ID); err != nil {
			return err
		}
		children, err := tx.Children(s.scope, name, "", maxChildren)
		if err != nil {
			return err
		}
		for _, k := range children {
			if k.Linked == "" || g.New || g.From != nil {
				if err := s.relink(tx, k); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// relink has a child's hub told where its parent is now.
func (s *Service) relink(tx Tx, k *Kin) error {
	reg, err := found(tx.Registration(s.scope, k.ID))
	if err != nil {
		return err
	}
	t, err := found(tx.Task(s.scope, k.ID))
	if err != nil {
		return err
	}
	now := s.cfg.Now()
	if t == nil {
		t = &Task{ID: k.ID}
	}
	switch link := (&Goal{Place: k.Place, Stay: true, Device: k.Device, Parent: k.Parent}); {
	case t.Goal != nil:
		t.Goal.Relink = true
	case !link.waited(reg):
		return tx.DeleteKin(s.scope, k.ID) // it is gone
	default:
		t.Goal, t.Begun, t.Attempts, t.LastError = link, now, 0, ""
	}
	if t.Owner == "" || !now.Before(t.Due) {
		t.Owner, t.Due = "", now
	}
	t.Hub = t.waitsFor()
	return tx.PutTask(s.scope, t)
}

// unlinked keeps why a hub would not have a device below its parent.
func (s *Service) unlinked(tx Tx, id string, cause error) error {
	k, err := found(tx.Kin(s.scope, id))
	if k == nil || err != nil {
		return err
	}
	k.Linked, k.Reason = "", fmt.Sprintf("%.300s", cause.Error())
	return tx.PutKin(s.scope, k)
}

// A KinReport is a device below an edge device as operators see it.
type KinReport struct {
	RegistrationID string `json:"registrationId"` // folded
	Parent         string `json:"parent"`
	Hub            string `json:"hub"`
	Linked         bool   `json:"linked"`
	Pending        string `json:"pending,omitempty"` // why it is not
}

func (k *Kin) report() KinReport {
	r := KinReport{RegistrationID: k.ID, Parent: k.Parent, Hub: k.Place.Hub, Linked: k.Linked != "", Pending: k.Reason}
	if !r.Linked {
		r.Pending = cmp.Or(r.Pending, "its hub has yet to be told")
	}
	return r
}

// Children returns a page of the devices that name an edge device as their parent in this way, and where the next one begins: ""
// at the end.
func (s *Service) Children(ctx context.Context, parent, after string, limit int) (page []KinReport, next string, err error) {
	err = s.cfg.Store.View(ctx, func(tx Tx) error {
		page, next = []KinReport{}, ""
		all, err := tx.Children(s.scope, dps.Fold(parent), after, limit+1)
		for i, k := range all {
			if i == limit {
				next = all[i-1].ID
				break
			}
			page = append(page, k.report())
		}
		return err
	})
	return page, next, err
}

// checkParent says what keeps an enrollment from naming its parent, as far as enrollments show it.
func (s *Service) checkParent(tx Tx, d *document) error {
	e := d.base()
	if e.Parent == "" {
		return nil
	}
	if err := dps.CheckRegistrationID(e.Parent); err != nil {
		return invalid("parent: %v", err)
	}
	levels := 1
	if e.Capabilities != nil && e.Capabilities.IoTEdge {
		levels++
	}
	self := []string{""}
	if d.kind == Individual {
		self = []string{dps.Fold(*d.id()), dps.Fold(d.individual.DeviceID)}
	}
	for parent := dps.Fold(e.Parent); parent != ""; levels++ {
		switch {
		case parent == self[0] || len(self) > 1 && parent == self[1]:
			return invalid("parent: the device would be below itself")
		case levels > maxLevels:
			return invalid("parent: edge devices would be more than %d levels deep", maxLevels)
		}
		r, err := found(tx.Record(s.scope, Individual, parent))
		if err != nil {
			return err
		}
		if r == nil {
			break
		}
		d, err := open(r)
		if err != nil {
			return err
		}
		above := d.individual
		if above.Capabilities == nil || !above.Capabilities.IoTEdge {
			return invalid("parent: the enrollment %.128q is not one of an edge device (capabilities.iotEdge)", r.ID)
		}
		parent = dps.Fold(above.Parent)
	}
	return nil
}
