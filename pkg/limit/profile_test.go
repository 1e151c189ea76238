package limit_test

import (
	"context"
	"fmt"
	"strconv"
	"testing"
	"testing/synctest"
	"time"

	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/limit"
	"github.com/touchmark/touchmark/pkg/registration"
)

// yes lets everything through, and counts.
type yes struct{ n int }

func (y *yes) Register(context.Context, *registration.Request) (*dps.OperationStatus, error) {
	y.n++
	return &dps.OperationStatus{}, nil
}

func (y *yes) Status(context.Context, *registration.Request, string) (*dps.OperationStatus, error) {
	y.n++
	return &dps.OperationStatus{}, nil
}

func (y *yes) Lookup(context.Context, *registration.Request) (*dps.RegistrationState, error) {
	y.n++
	return &dps.RegistrationState{}, nil
}

func (y *yes) Challenge(context.Context, *registration.Request) ([]byte, error) { return nil, nil }

// DPS-S 100: what exceeds the rates of the profile azure is 429, 429001, with an integer Retry-After behind which it goes on. Scopes
// without the profile have no such rates, and one scope's flood is not another's.
func TestProfiles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		time.Sleep(17 * time.Second) // not at the beginning of a minute
		azure, _ := registration.QuotasOf("azure")
		throttled := make(map[string]int)
		next := &yes{}
		p := limit.NewProfiles(limit.ProfilesConfig{Registrar: next, Throttled: func(api, what string) { throttled[api+" "+what]++ },
			Quotas: func(scope string) registration.Quotas {
				if scope == "0nefree" {
					return registration.Quotas{}
				}
				return azure
			}})
		req := func(scope, id string) *registration.Request {
			return &registration.Request{IDScope: scope, RegistrationID: id}
		}
		check := func(what string, most int, window time.Duration, do func(i int) error) {
			t.Helper()
			for i := range most {
				if err := do(i); err != nil {
					t.Fatalf("%s %d of %d: %v", what, i+1, most, err)
				}
			}
			e := dps.AsError(do(most))
			wait, err := strconv.Atoi(e.RetryAfter)
			if e.Code != dps.CodeThrottled || e.Code.Status() != 429 || err != nil || wait < 1 || time.Duration(wait)*time.Second > window {
				t.Errorf("%s: %+v", what, e)
			}
			time.Sleep(time.Duration(wait) * time.Second)
			if err := do(most); err != nil {
				t.Errorf("%s, after %d seconds: %v", what, wait, err)
			}
		}
		check("registrations", 1000, time.Minute, func(i int) error {
			_, err := p.Register(t.Context(), req("0neAzure", fmt.Sprint("dev-", i)))
			return err
		})
		check("polls", 5, 10*time.Second, func(i int) error {
			if i%2 == 0 {
				_, err := p.Lookup(t.Context(), req("0neazure", "Dev-1"))
				return err
			}
			_, err := p.Status(t.Context(), req("0neAzure", "dev-1"), "op")
			return err
		})
		check("operations", 1000, time.Minute, func(int) error { return p.Service("0neAzure", azure) })
		for i := range 1000 { // used up again, and for nobody else
			_, _ = p.Register(t.Context(), req("0neAzure", fmt.Sprint("dev-", i)))
		}
		if _, err := p.Register(t.Context(), req("0neOther", "dev-1")); err != nil {
			t.Errorf("another scope: %v", err)
		}
		if _, err := p.Status(t.Context(), req("0neAzure", "dev-2"), "op"); err != nil {
			t.Errorf("another device: %v", err)
		}
		for i := range 3000 {
			if _, err := p.Register(t.Context(), req("0neFree", "dev")); err != nil || p.Service("0neFree", registration.Quotas{}) != nil {
				t.Fatalf("%d, without quotas: %v", i, err)
			}
		}
		if throttled["device registrations"] < 1 || throttled["device polls"] != 1 || throttled["service operations"] != 1 {
			t.Errorf("%v", throttled)
		}
	})
}
