package registration_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
)

// family enrolls a device by an individual enrollment of its own, with the fixture's own key.
func (s *site) family(id, parent string, edge bool, hub string) error {
	e := dps.IndividualEnrollment{RegistrationID: id, Enrollment: registrationtest.Symmetric(s.OwnKey, s.OtherKey)}
	e.Parent = parent
	if edge {
		e.Capabilities = &dps.Capabilities{IoTEdge: true}
		e.DeviceID = strings.ToUpper(id) + "-edge"
	}
	if hub != "" {
		e.AllocationPolicy, e.IoTHubs = dps.AllocationStatic, []string{hub}
	}
	match := ""
	if _, err := s.Service.GetEnrollment(s.t.Context(), registration.Individual, id); err == nil {
		match = "*"
	}
	_, err := s.Service.PutEnrollment(s.t.Context(), registration.Actor{}, registration.Individual, id, must(json.Marshal(e)), match)
	return err
}

func (s *site) enroll(id, parent string, edge bool, hub string) {
	s.t.Helper()
	if err := s.family(id, parent, edge, hub); err != nil {
		s.t.Fatal(err)
	}
}

// Parents and children meet at their hub, whoever comes first; a child is where its parent is, and follows it.
func TestNested(t *testing.T) {
	for _, by := range []string{"gate", "GATE-edge"} { // by registration ID and by device ID
		for _, childFirst := range []bool{false, true} {
			t.Run(fmt.Sprintf("by %s, child first %t", by, childFirst), func(t *testing.T) {
				s := newSite(t, registration.HubAzure, "a.example", "b.example")
				scopes := s.start()
				s.enroll("gate", "", true, "a.example")
				s.enroll("leaf", by, false, "")
				s.edit(func(sc *registration.Scope) { sc.Hubs[1].Reserved = true })
				order := []string{"gate", "leaf"}
				if childFirst {
					order = []string{"leaf", "gate"}
				}
				come := func(id string) *dps.RegistrationState {
					t.Helper()
					return s.assign(scopes, s.ByKey(id, s.OwnKey))
				}
				come(order[0])
				if childFirst {
					if d := s.p.device("a.example", "leaf"); d.Parent != "" {
						t.Fatalf("it is below %s", d.Parent)
					}
					page, _, err := s.service(scopes).Children(t.Context(), by, "", 10)
					if err != nil || len(page) != 1 || page[0].Linked || page[0].Pending == "" {
						t.Errorf("%+v, %v", page, err)
					}
					if d := must(s.service(scopes).Diagnose(t.Context(), "LEAF", nil, nil)); d.Parent == nil || *d.Parent != page[0] || !strings.Contains(strings.Join(d.Explanation, " "), "its parent has not registered") {
						t.Errorf("%+v", d)
					}
				}
				come(order[1])
				s.heal()
				linked := func(hub string) {
					t.Helper()
					if d := s.p.device(hub, "leaf"); d == nil || d.Parent != "edge://"+hub+"/GATE-edge" {
						t.Fatalf("at %s: %+v", hub, d)
					}
					page, _, err := s.service(scopes).Children(t.Context(), by, "", 10)
					if err != nil || len(page) != 1 || !page[0].Linked || page[0].Pending != "" {
						t.Errorf("%+v, %v", page, err)
					}
				}
				linked("a.example")
				// The parent moves; its child follows when it comes again.
				s.enroll("gate", "", true, "b.example")
				come("gate")
				s.heal()
				if d := s.p.device("a.example", "leaf"); d == nil || d.Parent != "" {
					t.Errorf("below a parent that has gone: %+v", d)
				}
				if st := come("leaf"); st.AssignedHub != "b.example" {
					t.Errorf("%+v", st)
				}
				linked("b.example")
				// The parent is made anew at its hub: its child is below the new one, since the old one's scope is nobody's.
				delete(s.p.hubs["b.example"], "GATE-edge")
				s.p.device("b.example", "leaf").Parent = ""
				come("gate")
				s.heal()
				linked("b.example")
				s.Advance(time.Hour)
				s.enroll("leaf", "", false, "")
				come("leaf")
				if d := s.p.device("b.example", "leaf"); d == nil && s.p.device("a.example", "leaf") == nil {
					t.Error("it is nowhere")
				}
				if page, _, err := s.service(scopes).Children(t.Context(), by, "", 10); err != nil || len(page) != 0 {
					t.Errorf("%+v, %v", page, err)
				}
			})
		}
	}
}

// Cycles, families that are too deep or too large, and parents that are none are refused: when they are enrolled, where that can be
// seen, or when they register.
func TestLineage(t *testing.T) {
	s := newSite(t, registration.HubAzure, "a.example")
	scopes := s.start()
	refused := func(what string, err error) {
		t.Helper()
		if dps.AsError(err).Code != dps.CodeInvalidArgument {
			t.Errorf("%s: %v", what, err)
		}
	}
	s.enroll("e1", "", true, "")
	for i := 2; i <= 5; i++ {
		s.enroll(fmt.Sprintf("e%d", i), fmt.Sprintf("e%d", i-1), true, "")
	}
	refused("six levels", s.family("e6", "e5", true, ""))
	s.enroll("deep", "E5", false, "")
	refused("below itself", s.family("x", "X", true, ""))
	refused("a cycle", s.family("e1", "e3", true, ""))
	refused("below a leaf", s.family("y", "deep", false, ""))
	refused("no name", s.family("y", "a b", false, ""))
	for i := 5; i >= 1; i-- { // the youngest first
		s.assign(scopes, s.ByKey(fmt.Sprintf("e%d", i), s.OwnKey))
	}
	s.heal()
	for i := 2; i <= 5; i++ {
		if d := s.p.device("a.example", fmt.Sprintf("E%d-edge", i)); d.Parent != fmt.Sprintf("edge://a.example/E%d-edge", i-1) {
			t.Errorf("level %d: %+v", i, d)
		}
	}
	// What enrollments do not show: a group's devices.
	g := registrationtest.Symmetric(s.GroupKey, nil)
	g.Parent, g.Capabilities = "dev-2", &dps.Capabilities{IoTEdge: true}
	s.Put(t, registration.Group, "keys", g)
	below := func(id string) *dps.RegistrationState {
		t.Helper()
		_, st, err := s.try(scopes, s.Derived(id))
		if err != nil {
			t.Fatal(err)
		}
		return st
	}
	if st := below("dev-2"); st.Status != dps.Failed || st.ErrorCode != int(dps.CodeBadRequest) || !strings.Contains(st.ErrorMessage, "parent") {
		t.Errorf("below itself: %+v", st)
	}
	s.enroll("dev-2", "", true, "")
	s.assign(scopes, s.ByKey("dev-2", s.OwnKey))
	for i := range 101 {
		st := below(fmt.Sprintf("child-%d", i))
		if want := i < 100; (st.Status == dps.Assigned) != want {
			t.Fatalf("child %d: %+v", i, st)
		}
	}
	if st := below("child-7"); st.Status != dps.Assigned {
		t.Errorf("one of the hundred comes again: %+v", st)
	}
	if err := s.service(scopes).DeleteRegistration(t.Context(), registration.Actor{}, "child-7", ""); err != nil {
		t.Fatal(err)
	}
	if st := below("child-100"); st.Status != dps.Assigned {
		t.Errorf("when there is room: %+v", st)
	}
}
