package access_test

import (
	"testing"

	"github.com/touchmark/touchmark/pkg/access"
)

func TestRights(t *testing.T) {
	for text, want := range map[string]access.Right{
		"ServiceConfig, DeviceConnect, EnrollmentWrite": access.ServiceConfig | access.DeviceConnect | access.EnrollmentWrite,
		"enrollmentread": access.EnrollmentRead,
		" RegistrationStatusWrite,EnrollmentRead\t ": access.RegistrationStatusWrite | access.EnrollmentRead,
	} {
		got, err := access.ParseRights(text, access.Policy)
		if err != nil || got != want {
			t.Errorf("%q: %s, %v", text, got, err)
		}
		if again, err := access.ParseRights(got.String(), access.Policy); err != nil || again != got {
			t.Errorf("%s comes back as %s, %v", got, again, err)
		}
	}
	for _, text := range []string{"", ",", "EnrollmentRead,", "EnrollmentRead EnrollmentWrite", "ManagementWrite", "Everything", "enrollment"} {
		if got, err := access.ParseRights(text, access.Policy); err == nil {
			t.Errorf("%q: %s", text, got)
		}
	}
	if got, err := access.ParseRights(access.Everything.String(), access.Everything); err != nil || got != access.Everything {
		t.Errorf("%s, %v", got, err)
	}
}

func TestPrincipal(t *testing.T) {
	p := &access.Principal{Grants: []access.Grant{{Scope: "Plant-A", Rights: access.EnrollmentWrite}, {Scope: "*", Rights: access.ServiceConfig}}}
	for _, x := range []struct {
		scope string
		right access.Right
		want  bool
	}{
		{"plant-a", access.EnrollmentRead, true}, {"plant-a", access.EnrollmentWrite | access.RegistrationStatusWrite, true}, {"PLANT-A", access.AttestationDetails, true},
		{"plant-b", access.EnrollmentRead, false}, {"plant-b", access.ServiceConfig, true}, {"plant-a", access.DeviceConnect, false}, {"plant-a", access.ManagementRead, false},
		{"", access.ServiceConfig, true}, {"", access.EnrollmentRead, false}, {"*", access.EnrollmentRead, false}, {"plant-a", 0, false},
	} {
		if got := p.May(x.scope, x.right); got != x.want {
			t.Errorf("%s in %q: %t", x.right, x.scope, got)
		}
	}
	if new(access.Principal).May("plant-a", access.EnrollmentRead) {
		t.Error("nobody may something")
	}
}
