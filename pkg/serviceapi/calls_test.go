package serviceapi_test

import (
	"context"
	"testing"

	"github.com/touchmark/touchmark/pkg/attest/attesttest"
	"github.com/touchmark/touchmark/pkg/dps"
	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
	"github.com/touchmark/touchmark/pkg/serviceapi"
)

// Whoever may write enrollments reaches a call, by its name only; nobody else does.
func TestCalls(t *testing.T) {
	d := open(t, func(c *serviceapi.Config) {
		c.Calls = map[string]serviceapi.Call{"echo": func(_ context.Context, method string, body []byte) (any, error) {
			if string(body) == "wrong" {
				return nil, dps.NewError(dps.CodeInvalidArgument, "Wrong", nil)
			}
			return map[string]string{"method": method, "body": string(body)}, nil
		}}
	})
	d.Policy(t, "owner", ownerRights, ownerKey, secondKey)
	d.Policy(t, "reader", "EnrollmentRead, RegistrationStatusRead, RegistrationStatusWrite", secondKey, ownerKey)
	op := d.operator(t, ownerKey, "owner")
	if doc := op.want(t, 200, 0, "PUT", "/touchmark/echo", "text"); doc["method"] != "PUT" || doc["body"] != "text" {
		t.Error(doc)
	}
	op.want(t, 400, dps.CodeInvalidArgument, "POST", "/touchmark/echo", "wrong")
	op.want(t, 404, dps.CodeNotFound, "PUT", "/touchmark/other", "text")
	op.want(t, 404, dps.CodeNotFound, "PUT", "/touchmark/echo/more", "text")
	reader := d.operator(t, secondKey, "reader")
	reader.want(t, 401, dps.CodeUnauthorized, "GET", "/touchmark/echo", "")
	reader.token = attesttest.ServiceToken(registrationtest.NewFixture(t).GroupKey, registrationtest.Host, "owner", d.Now())
	reader.want(t, 401, dps.CodeUnauthorized, "GET", "/touchmark/echo", "")
	op.token = ""
	op.want(t, 401, dps.CodeUnauthorized, "DELETE", "/touchmark/echo", "")
}
